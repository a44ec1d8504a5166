//! A database URL, read strictly enough that no error text can repeat a part of its password.

use std::env;

use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::Error;

/// A `postgresql://` URL that libpq takes apart as its author meant it.
pub(super) struct Url {
    /// All before the `?`.
    base: String,
    /// `key=value` each, as written.
    parameters: Vec<String>,
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
        // As in libpq, a ? before the @ belongs to the user or the password.
        let (user, address) = match rest.find(['@', '/']) {
            Some(at) if rest.as_bytes()[at] == b'@' => rest.split_at(at + 1),
            _ => ("", rest),
        };
        if address.contains('@') {
            return Err(Error::Url(
                "an @ or / in a user name, password or parameter is written %40 or %2F",
            ));
        }
        let mut escapes = text
            .split('%')
            .skip(1)
            .map(|after| after.as_bytes().get(..2));
        if !escapes.all(|code| code.is_some_and(|code| code.iter().all(u8::is_ascii_hexdigit))) {
            return Err(Error::Url("a % in it is written %25"));
        }
        let (address, query) = address.split_once('?').unwrap_or((address, ""));
        let parameters = query.split('&').filter(|parameter| !parameter.is_empty());
        let parameters: Vec<String> = parameters.map(str::to_owned).collect();
        if parameters
            .iter()
            .any(|parameter| parameter.matches('=').count() != 1)
        {
            return Err(Error::Url(
                "each of its parameters is key=value, with a = in a value written %3D",
            ));
        }
        let passwords = parameters
            .iter()
            .filter_map(|parameter| parameter.split_once('='))
            .filter(|(key, _)| ["password", "sslpassword"].contains(key))
            .chain(user.trim_end_matches('@').split_once(':'))
            .map(|(_, password)| password)
            .filter(|password| !password.is_empty())
            .flat_map(|password| {
                let decoded = percent_decode_str(password).decode_utf8_lossy();
                [password.to_owned(), decoded.into_owned()]
            })
            .collect();
        Ok(Self {
            base: format!("postgresql://{user}{address}"),
            parameters,
            passwords,
        })
    }

    /// The URL for libpq, password included. A server that never answers is given up after ten seconds, unless the URL
    /// or the environment says otherwise.
    pub(super) fn secret(&self) -> String {
        let mut parameters = self.parameters.join("&");
        if self.parameter("connect_timeout").is_none() && env::var_os("PGCONNECT_TIMEOUT").is_none()
        {
            parameters.push_str("&connect_timeout=10");
        }
        format!("{}?{}", self.base, parameters.trim_start_matches('&'))
    }

    /// As [`secret`](Self::secret), with a server setting that only this connection has.
    pub(super) fn secret_with_setting(&self, name: &str, value: &str) -> String {
        let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
        let options = match self.parameter("options") {
            Some(options) => options.to_owned(),
            // A parameter hides the variable.
            None => encode(&env::var("PGOPTIONS").unwrap_or_default()),
        };
        // Of a repeated parameter libpq takes the last.
        let setting = encode(&format!(" -c {name}={value}"));
        format!("{}&options={options}{setting}", self.secret())
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
        self.parameters
            .iter()
            .rev()
            .find_map(|parameter| parameter.strip_prefix(name)?.strip_prefix('='))
    }
}
