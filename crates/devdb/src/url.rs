//! The parts of a database URL that this crate needs to tell apart.

use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use crate::Error;

/// A `postgresql://` URL without its database, its password kept apart.
#[derive(Clone)]
pub(crate) struct Url {
    /// `postgresql://user@host:port`
    authority: String,
    /// As it stands in the URL, percent-encoded.
    password: Option<String>,
    pub(crate) database: String,
    /// `key=value` each, without `dbname` and `password`.
    parameters: Vec<String>,
}

impl Url {
    /// Reads a URL as libpq does, but refuses what libpq would take apart in another way than its author meant:
    /// libpq's error messages would then repeat a part of the password.
    pub(crate) fn parse(url: &str) -> Result<Self, Error> {
        let rest = url
            .strip_prefix("postgresql://")
            .or_else(|| url.strip_prefix("postgres://"))
            .ok_or(Error::Url(
                "it does not begin with postgres:// or postgresql://",
            ))?;
        let (user, rest) = match rest.find(['@', '/']) {
            Some(at) if rest.as_bytes()[at] == b'@' => (&rest[..at], &rest[at + 1..]),
            _ => ("", rest),
        };
        if rest.contains('@') {
            return Err(Error::Url(
                "an @ or / in a user name or password is written %40 or %2F",
            ));
        }
        let (user, mut password) = match user.split_once(':') {
            Some((user, password)) => (user, Some(password)),
            None => (user, None),
        };
        let (address, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (host, mut database) = address.split_once('/').unwrap_or((address, ""));

        let mut parameters = Vec::new();
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            match parameter.split_once('=') {
                Some((_, value)) if value.contains('=') => {
                    return Err(Error::Url("an = in a parameter's value is written %3D"));
                }
                Some(("password", value)) => password = Some(value),
                Some(("dbname", value)) => database = value,
                Some(_) => parameters.push(parameter.to_owned()),
                None => return Err(Error::Url("each of its parameters must be key=value")),
            }
        }
        let mut escapes = url
            .split('%')
            .skip(1)
            .map(|after| after.as_bytes().get(..2));
        if !escapes.all(|code| code.is_some_and(|code| code.iter().all(u8::is_ascii_hexdigit))) {
            return Err(Error::Url("a % in it is written %25"));
        }
        let at = if user.is_empty() { "" } else { "@" };
        Ok(Self {
            authority: format!("postgresql://{user}{at}{host}"),
            password: password.map(str::to_owned),
            database: database.to_owned(),
            parameters,
        })
    }

    /// The URL of the superuser's connection to a server whose socket is in `folder`.
    pub(crate) fn of_socket(folder: &str) -> Self {
        let host = format!("host={}", utf8_percent_encode(folder, NON_ALPHANUMERIC));
        Self {
            authority: "postgresql://".to_owned(),
            password: None,
            database: "postgres".to_owned(),
            // The port names the socket; without it a PGPORT of the environment would count.
            parameters: vec![host, "port=5432".to_owned(), "user=postgres".to_owned()],
        }
    }

    pub(crate) fn with_database(&self, name: &str) -> Self {
        Self {
            database: name.to_owned(),
            ..self.clone()
        }
    }

    /// The whole URL, password included.
    pub(crate) fn secret(&self) -> String {
        let separator = if self.parameters.is_empty() { '?' } else { '&' };
        let password = self.password.as_ref();
        let password = password.map(|password| format!("{separator}password={password}"));
        self.public() + &password.unwrap_or_default()
    }

    /// The URL without its password.
    pub(crate) fn public(&self) -> String {
        let question_mark = if self.parameters.is_empty() { "" } else { "?" };
        format!(
            "{}/{}{question_mark}{}",
            self.authority,
            self.database,
            self.parameters.join("&")
        )
    }

    /// The password in the clear, as `PGPASSWORD` takes it.
    pub(crate) fn password(&self) -> Option<String> {
        let password = percent_decode_str(self.password.as_deref()?);
        Some(password.decode_utf8_lossy().into_owned())
    }
}
