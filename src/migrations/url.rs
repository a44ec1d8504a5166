//! A database URL, read strictly enough that no error text can repeat a part of its password.

use std::env;
use std::fmt::Write as _;

use super::Error;

/// A `postgresql://` URL that libpq takes apart as its author meant it.
pub(super) struct Url {
    text: String,
    /// As written and decoded.
    passwords: Vec<String>,
}

impl Url {
    /// libpq's messages quote what it can't read, so what is ambiguous must not get that far: with a bare `@` or `/` in
    /// a password it takes the rest for a host name or a port.
    pub(super) fn parse(text: &str) -> Result<Self, Error> {
        let rest = text
            .strip_prefix("postgresql://")
            .or_else(|| text.strip_prefix("postgres://"))
            .ok_or(Error::Url(
                "it does not begin with postgres:// or postgresql://",
            ))?;
        let (user, rest) = match rest.find(['@', '/']) {
            Some(at) if rest.as_bytes()[at] == b'@' => (&rest[..at], &rest[at + 1..]),
            _ => ("", rest),
        };
        if rest.contains('@') {
            return Err(Error::Url(
                "an @ or / in a user name, password or parameter is written %40 or %2F",
            ));
        }
        let mut passwords: Vec<&str> = user
            .split_once(':')
            .map(|(_, password)| password)
            .into_iter()
            .collect();
        for parameter in rest
            .split_once('?')
            .map_or("", |(_, query)| query)
            .split('&')
        {
            match parameter.split_once('=') {
                None if parameter.is_empty() => {}
                Some((_, value)) if !value.contains('=') => {
                    if matches!(
                        parameter.split_once('='),
                        Some(("password" | "sslpassword", _))
                    ) {
                        passwords.push(value);
                    }
                }
                _ => {
                    return Err(Error::Url(
                        "each of its parameters is key=value, with a = in a value written %3D",
                    ));
                }
            }
        }
        if decode(text).is_none_or(|text| text.contains('\0')) {
            return Err(Error::Url(
                "a % in it is written %25, and it must decode to UTF-8 without NUL",
            ));
        }
        let passwords = passwords
            .into_iter()
            .flat_map(|password| [Some(password.to_owned()), decode(password)])
            .flatten()
            .filter(|password| !password.is_empty())
            .collect();
        Ok(Self {
            text: text.to_owned(),
            passwords,
        })
    }

    /// The URL for libpq, password included. A server that never answers is given up after ten seconds, unless the URL
    /// or the environment says otherwise.
    pub(super) fn secret(&self) -> String {
        if self.parameter("connect_timeout").is_some() || env::var_os("PGCONNECT_TIMEOUT").is_some()
        {
            return self.text.clone();
        }
        self.with("connect_timeout=10")
    }

    /// As [`secret`](Self::secret), with a server setting that only this connection has.
    pub(super) fn secret_with_setting(&self, name: &str, value: &str) -> String {
        let mut options = match self.parameter("options") {
            Some(options) => options.to_owned(),
            // A parameter hides the variable.
            None => encode(&env::var("PGOPTIONS").unwrap_or_default()),
        };
        options.push_str(&encode(&format!(" -c {name}={value}")));
        // Of a repeated parameter libpq takes the last.
        let url = Self {
            text: self.with(&format!("options={options}")),
            passwords: Vec::new(),
        };
        url.secret()
    }

    /// `text` unless it holds the password.
    pub(super) fn conceal(&self, text: &str) -> String {
        if self
            .passwords
            .iter()
            .any(|password| text.contains(password))
        {
            "its text is withheld, for it contains the password".to_owned()
        } else {
            text.trim_end().to_owned()
        }
    }

    fn parameter(&self, name: &str) -> Option<&str> {
        let (_, query) = self.address().split_once('?')?;
        let parameters = query
            .split('&')
            .filter_map(|parameter| parameter.split_once('='));
        parameters
            .filter(|(key, _)| *key == name)
            .map(|(_, value)| value)
            .next_back()
    }

    fn with(&self, parameter: &str) -> String {
        let separator = if self.address().contains('?') {
            '&'
        } else {
            '?'
        };
        format!("{}{separator}{parameter}", self.text)
    }

    /// What follows the user and password, in which a `?` means nothing.
    fn address(&self) -> &str {
        self.text
            .rsplit_once('@')
            .map_or(&self.text, |(_, address)| address)
    }
}

fn encode(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() {
            encoded.push(byte.into());
        } else {
            write!(encoded, "%{byte:02X}").expect("a String takes any text");
        }
    }
    encoded
}

fn decode(text: &str) -> Option<String> {
    let mut pieces = text.split('%');
    let mut bytes = pieces.next()?.as_bytes().to_vec();
    for piece in pieces {
        let (code, rest) = piece.split_at_checked(2)?;
        // from_str_radix takes a sign.
        if !code.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        bytes.push(u8::from_str_radix(code, 16).ok()?);
        bytes.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8(bytes).ok()
}
