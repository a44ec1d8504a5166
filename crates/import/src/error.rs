//! What can go wrong.

use std::error::Error;
use std::fmt;

use diesel::result::DatabaseErrorKind;

/// Why an import stopped. What the batches before wrote stays, and running it again goes on behind
/// them. No text has a value of a row.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// There is no archive, or it is empty.
    #[error(
        "there is no archive: bruhmcp_archive has no tables. Migration 000 makes it from the tables \
         of the old system; run the migrations on a database that has these."
    )]
    NoArchive,
    /// The archive is not that of a shape which this version knows.
    #[error(
        "the archive is not of a known shape: {0}. Nothing was written. docs/moving.md has the \
         tables and columns that are expected."
    )]
    UnknownShape(String),
    /// The new tables are missing or older than this version.
    #[error("the new tables are not complete: {0} is missing. Run the migrations first.")]
    NotMigrated(String),
    /// The new tables belong to another role.
    #[error(
        "{0} belongs to another role. Import as the owner of the tables, who ran the migrations."
    )]
    NotOwner(String),
    /// The archive is that of another schema.
    #[error(
        "the archive was moved from another schema than {0}. Import into that one: its name is in \
         the comment of bruhmcp_archive."
    )]
    OtherSchema(String),
    /// A new table has rows that no import wrote.
    #[error(
        "{0} has rows that no import wrote. Import before the new backend starts, or remove these \
         rows."
    )]
    NotEmpty(&'static str),
    /// The import began with other options.
    #[error(
        "the import began with other options: {0}. Give the same options, or revert all migrations, \
         which removes what was imported, and begin again."
    )]
    OtherOptions(String),
    /// Another import holds the lock.
    #[error("another import of this schema is running. Wait for its end, then run it again.")]
    Running,
    /// Sessions that may write are connected.
    #[error(
        "other sessions may write to this database: {}. Stop them, or allow other sessions if they \
         only read.",
        .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    )]
    Sessions(Vec<OtherSession>),
    /// PostgreSQL doesn't know the time zone.
    #[error("unknown time zone {0:?}. pg_timezone_names lists those that this server knows.")]
    TimeZone(String),
    /// An option names a table that is not converted.
    #[error("there is no table {0:?} to convert.")]
    UnknownTable(String),
    /// There are credentials, and no keys to seal them with.
    #[error("the archive has credentials, and there are no keys to seal them with. Give the keys.")]
    NoKeys,
    /// No import has ended.
    #[error("the import has not ended. Run it to its end first.")]
    NotImported,
    /// `confirm` returned `false`.
    #[error("the archive was not dropped: it was not confirmed.")]
    NotConfirmed,
    /// A table is locked: something writes to it.
    #[error(
        "{0} is locked by another session for longer than five seconds: does a backend write to it? \
         Stop it, then run the import again: it goes on where it stopped."
    )]
    Busy(&'static str),
    /// The server failed.
    #[error(
        "{doing} failed: {error}. Run it again when that is mended: it goes on where it stopped."
    )]
    Database {
        /// What was tried.
        doing: &'static str,
        /// What the server said.
        error: ServerError,
    },
}

impl ImportError {
    pub(crate) fn database(doing: &'static str) -> impl FnOnce(diesel::result::Error) -> Self {
        move |error| Self::Database {
            doing,
            error: ServerError(error),
        }
    }
}

impl From<diesel::result::Error> for ImportError {
    fn from(error: diesel::result::Error) -> Self {
        Self::database("writing")(error)
    }
}

/// An error of the server. Its text names a violated constraint, and has no value of a row.
pub struct ServerError(pub(crate) diesel::result::Error);

impl fmt::Display for ServerError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            diesel::result::Error::DatabaseError(kind, information) => {
                match information.constraint_name() {
                    Some(name) => write!(formatter, "{name} was violated"),
                    None if matches!(kind, DatabaseErrorKind::ClosedConnection) => {
                        formatter.write_str("the connection was lost")
                    }
                    // A message about a value quotes it behind a colon.
                    None => {
                        let message = information.message();
                        let quotes = [": \"", ": »", ": «", ": „", ": “"];
                        let ends = quotes.iter().filter_map(|quote| message.find(quote));
                        let end = ends.min().unwrap_or(message.len());
                        formatter.write_str(&message[..end])
                    }
                }
            }
            // These say what a row lacks, or that a transaction is broken.
            error => write!(formatter, "{error}"),
        }
    }
}

impl fmt::Debug for ServerError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "ServerError({self})")
    }
}

impl Error for ServerError {}

/// A session of somebody else. `application` is the name that its program gave itself.
#[derive(Debug, Clone, PartialEq, Eq, diesel::QueryableByName)]
#[expect(missing_docs, reason = "the names say it")]
pub struct OtherSession {
    #[diesel(sql_type = diesel::sql_types::Integer)]
    pub pid: i32,
    #[diesel(sql_type = diesel::sql_types::Text)]
    pub role: String,
    #[diesel(sql_type = diesel::sql_types::Text)]
    pub application: String,
}

impl fmt::Display for OtherSession {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "server process {} of {}", self.pid, self.role)?;
        if !self.application.is_empty() {
            write!(formatter, " ({})", self.application)?;
        }
        Ok(())
    }
}
