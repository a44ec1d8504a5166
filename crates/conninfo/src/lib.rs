#![doc = include_str!("../README.md")]
#![deny(missing_docs)]

use std::ffi::CString;
use std::fmt::Write;

#[expect(
    unsafe_code,
    reason = "libpq is a C library; Diesel doesn't wrap these functions"
)]
mod libpq;

/// A connection string, taken apart.
#[derive(Clone, Default)]
pub struct Conninfo {
    parameters: Vec<Parameter>,
}

#[derive(Clone)]
struct Parameter {
    keyword: String,
    value: String,
    is_secret: bool,
}

/// Outcome of an attempt to connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attempt {
    /// The server accepts.
    Accepted,
    /// The server is starting, stopping, full or out of reach: a later attempt may succeed.
    Unavailable,
    /// A later attempt would fail too: a wrong password, no such database, an invalid parameter.
    Refused,
}

/// SQLSTATEs of a server that is stopping, crashed, starting or full.
const UNAVAILABLE: [&str; 4] = ["57P01", "57P02", "57P03", "53300"];

const AMBIGUOUS: &str = "its parts can't be told apart: in a user name, password or parameter \
    write @ as %40, / as %2F and % as %25";
const UNREADABLE: &str = "write postgresql://user:password@host/database, with special characters \
    as %XX, or pairs such as host=localhost dbname=app";

impl Conninfo {
    /// Reads a `postgresql://` URL or `key=value` pairs.
    ///
    /// # Errors
    /// Returns a hint that quotes nothing of `text`. A string that libpq would accept is refused
    /// if a part of its password could end up as a host, port or database: libpq prints those.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let url = ["postgresql://", "postgres://"];
        let rest = url.iter().find_map(|scheme| text.strip_prefix(scheme));
        if let Some(rest) = rest {
            let first = rest.find(['@', '/']).unwrap_or(0);
            let last = rest.rfind('@').unwrap_or(0);
            if last > first {
                return Err(AMBIGUOUS);
            }
        }
        let text = CString::new(text).map_err(|_| UNREADABLE)?;
        let parsed = Self {
            parameters: libpq::parse(&text).ok_or(UNREADABLE)?,
        };
        // %FF and the like: libpq works on bytes, this crate on text.
        let is_text = |one: &Parameter| !one.value.contains(char::REPLACEMENT_CHARACTER);
        if !parsed.parameters.iter().all(is_text) {
            return Err("its values must be UTF-8");
        }
        // Such as postgresql://user:password, which lacks a host.
        let port = parsed.get("port").unwrap_or_default();
        if port.contains(|letter: char| !letter.is_ascii_digit() && letter != ',') {
            return Err(AMBIGUOUS);
        }
        Ok(parsed)
    }

    /// Returns the value of a parameter that the string itself has.
    pub fn get(&self, keyword: &str) -> Option<&str> {
        let mut parameters = self.parameters.iter();
        let found = parameters.find(|parameter| parameter.keyword == keyword)?;
        Some(&found.value)
    }

    /// Returns the value that libpq would use: the string's, the service file's, the environment's
    /// or a default. Connects to no server. Not for `sslmode`.
    pub fn effective(&self, keyword: &str) -> Option<String> {
        // libpq fills in all parameters, then stops at this one.
        let invalid = self.clone().with("sslmode", "invalid").c_string()?;
        let resolved = Self {
            parameters: libpq::resolve(&invalid)?,
        };
        resolved.get(keyword).map(str::to_owned)
    }

    /// Sets a parameter that is not a secret.
    #[must_use]
    pub fn with(mut self, keyword: &str, value: &str) -> Self {
        self.parameters
            .retain(|parameter| parameter.keyword != keyword);
        self.parameters.push(Parameter {
            keyword: keyword.to_owned(),
            value: value.to_owned(),
            is_secret: false,
        });
        self
    }

    /// Returns a URL, passwords included.
    pub fn secret_url(&self) -> String {
        self.url(|_| true)
    }

    /// Returns a URL without its passwords.
    pub fn public_url(&self) -> String {
        self.url(|parameter| !parameter.is_secret)
    }

    fn url(&self, include: impl Fn(&Parameter) -> bool) -> String {
        let database = self.get("dbname").unwrap_or_default();
        let mut url = format!("postgresql:///{}", encode(database));
        let mut separator = '?';
        for parameter in &self.parameters {
            if parameter.keyword != "dbname" && include(parameter) {
                let Parameter { keyword, value, .. } = parameter;
                // Writing to a string can't fail.
                let _ = write!(url, "{separator}{keyword}={}", encode(value));
                separator = '&';
            }
        }
        url
    }

    fn c_string(&self) -> Option<CString> {
        CString::new(self.secret_url()).ok()
    }

    /// Returns `text`, or a placeholder if it contains a password of this string.
    pub fn conceal(&self, text: &str) -> String {
        let mut secrets = self.parameters.iter().filter(|one| one.is_secret);
        if secrets.any(|secret| !secret.value.is_empty() && text.contains(&secret.value)) {
            "the message is withheld because it contains the password".to_owned()
        } else {
            text.trim_end().to_owned()
        }
    }

    /// Tries to connect. The outcome does not depend on the language of messages.
    pub fn attempt(&self) -> Attempt {
        let Some(text) = self.c_string() else {
            return Attempt::Refused;
        };
        let Some(message) = libpq::refusal(&text) else {
            return Attempt::Accepted;
        };
        // Without a SQLSTATE no server answered. Of several hosts one may have.
        let mut codes = sqlstates(&message).peekable();
        let is_later = if codes.peek().is_some() {
            codes.all(|code| UNAVAILABLE.contains(&code))
        } else {
            libpq::is_valid(&text)
        };
        if is_later {
            Attempt::Unavailable
        } else {
            Attempt::Refused
        }
    }
}

/// Returns the SQLSTATEs of a message of libpq: `FATAL:  57P03: …`, where FATAL is translated.
fn sqlstates(message: &str) -> impl Iterator<Item = &str> {
    let is_code = |code: &&str| {
        let mut letters = code.bytes();
        code.len() == 5 && letters.all(|one| one.is_ascii_uppercase() || one.is_ascii_digit())
    };
    let after = message.split(":  ").skip(1);
    let codes = after.filter_map(|rest| rest.split_once(": ").map(|(code, _)| code));
    codes.filter(is_code)
}

/// Percent-encodes all but letters, digits and `-._~`.
fn encode(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(byte.into());
        } else {
            // Writing to a string can't fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::{Attempt, Conninfo};

    #[test]
    fn urls_and_pairs_mean_the_same() -> Result<(), &'static str> {
        for text in [
            "postgres://ann:p%40ss%20%25@h:1,i:2/a%20b?sslmode=disable",
            "user=ann password='p@ss %' host=h,i port=1,2 dbname='a b' sslmode=disable",
        ] {
            let conninfo = Conninfo::parse(text)?;
            assert_eq!(conninfo.get("password"), Some("p@ss %"));
            let secret = conninfo.secret_url();
            assert_eq!(Conninfo::parse(&secret)?.secret_url(), secret);
            assert!(secret.starts_with("postgresql:///a%20b?user=ann&password=p%40ss%20%25&"));
            let public = "postgresql:///a%20b?user=ann&host=h%2Ci&port=1%2C2&sslmode=disable";
            assert_eq!(conninfo.public_url(), public);
        }
        Ok(())
    }

    #[test]
    fn a_part_of_a_password_is_not_taken_for_something_else() {
        for text in [
            "postgres://u:secret",
            "postgres://u:secret/x@h/d",
            "postgres://u:1/secret@h/d",
            "postgres://u:x@secret@h/d",
            "postgres://u:secret%zz@h/d",
            "postgres://u:secret%00@h/d",
            "postgres://u@h/d?password=a&secret",
            "postgres://u@h/d?password=a=secret",
            "postgres:/u:secret@h/d",
            "u:secret@h",
            "password=a secret",
            "password='secret",
            "password=secret\0",
        ] {
            let Err(hint) = Conninfo::parse(text) else {
                panic!("accepted: {text}")
            };
            assert!(!hint.contains("secret"), "{hint}");
        }
    }

    #[test]
    fn a_message_with_a_password_is_withheld() -> Result<(), &'static str> {
        let conninfo = Conninfo::parse("postgres://u:secret@h/d?sslpassword=hush")?;
        assert_eq!(conninfo.conceal("no route to h\n"), "no route to h");
        for text in ["role \"secret\"", "hush!"] {
            assert!(
                conninfo
                    .conceal(text)
                    .starts_with("the message is withheld")
            );
        }
        Ok(())
    }

    #[test]
    fn the_effective_value_is_found_without_connecting() -> Result<(), &'static str> {
        let conninfo = Conninfo::parse("host=/nowhere options=-cwork_mem=1MB")?;
        assert_eq!(
            conninfo.effective("options").as_deref(),
            Some("-cwork_mem=1MB")
        );
        // A default, or PGPORT.
        assert!(conninfo.effective("port").is_some());
        Ok(())
    }

    #[test]
    fn an_attempt_tells_unavailable_from_refused() -> Result<(), &'static str> {
        let nowhere = Conninfo::parse("host=/nowhere")?;
        assert_eq!(nowhere.attempt(), Attempt::Unavailable);
        let invalid = nowhere.with("sslmode", "x");
        assert_eq!(invalid.attempt(), Attempt::Refused);
        let unknown = Conninfo::parse("host=no-such-host.invalid")?;
        assert_eq!(unknown.attempt(), Attempt::Unavailable);
        Ok(())
    }

    #[test]
    fn sqlstates_are_found_in_any_language() {
        let of = |message| super::sqlstates(message).collect::<Vec<_>>();
        assert_eq!(
            of("Verbindung zum Server fehlgeschlagen: FATAL:  53300: tut mir leid: schon zu viele"),
            ["53300"]
        );
        assert_eq!(of("connection refused:  no: one"), [""; 0]);
        assert_eq!(
            of("a: FATAL:  57P03: b\nc: FATAL:  28P01: d"),
            ["57P03", "28P01"]
        );
    }
}
