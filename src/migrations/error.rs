//! What can go wrong with a migration, in words.

use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::result::DatabaseErrorKind;
use diesel::sql_types::{Integer, Nullable, Text, Timestamptz};
use serde::Serialize;

use super::Direction;

/// Why a [`Runner`](super::Runner) did not do what it was told. No text holds the URL's password.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The database URL can't be read; the reason is in it.
    #[error("the database URL can't be read: {0}")]
    Url(&'static str),
    /// No connection; the text is libpq's.
    #[error("no connection: {0}")]
    Connect(String),
    /// Another runner held the lock for all of the time allowed.
    #[error("another runner holds the lock: {holder}; gave up after {:.1} s", waited.as_secs_f64())]
    LockBusy {
        /// Who it is.
        holder: Holder,
        /// How long this one waited.
        waited: Duration,
    },
    /// Nothing was done, because it would have been a guess.
    #[error("refused: {0}")]
    Refused(#[from] Refusal),
    /// A migration failed.
    #[error("{0}")]
    Failed(Box<Failure>),
    /// The lock was gone when it was to be given back: a migration released it, and another runner may have been at
    /// work meanwhile.
    #[error("the lock was lost during the work; look at the status before anything else")]
    LockLost,
    /// A query of the runner's own failed.
    #[error("{doing} failed: {report}")]
    Database {
        /// What it was for.
        doing: &'static str,
        /// What the server said.
        report: ServerReport,
    },
    /// The source of the migrations can't be read.
    #[error("the migrations can't be read: {0}")]
    Source(String),
}

impl Error {
    pub(super) fn database(doing: &'static str) -> impl FnOnce(diesel::result::Error) -> Self {
        move |error| Self::Database {
            doing,
            report: ServerReport::new(&error, ""),
        }
    }
}

/// Why a runner refuses, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Two migrations with one version.
    #[error("{0} and {1} have the same version: rename the one that was not released")]
    DuplicateVersion(String, String),
    /// A pending migration sorts before one that is applied.
    #[error(
        "{pending} is pending, but {applied} after it is applied already: give it a version after {applied}, or \
         revert to the version before it first"
    )]
    OutOfOrder {
        /// The version that comes too late.
        pending: String,
        /// The newest applied version.
        applied: String,
    },
    /// The database has migrations that this program does not know.
    #[error(
        "the database has {}, which this program does not know: use the program that applied it; if that migration was \
         given up and nothing of it is left, delete its row from __diesel_schema_migrations", .0.join(", ")
    )]
    Unknown(Vec<String>),
    /// A version was asked for that isn't there.
    #[error("this program has no migration {0}: its status lists those it has")]
    NoSuchVersion(String),
    /// A migration without `down.sql` was to be reverted.
    #[error("{0} has no down.sql, so it can't be reverted")]
    NoDown(String),
    /// Unqualified names would not end up in `public`.
    #[error(
        "this role's search_path leads to {}, but all migrations belong to the schema public: set it to public for the \
         role, the database or in the URL (?options=-csearch_path%3Dpublic)",
        .0.as_ref().map_or_else(|| "no schema".to_owned(), |schema| format!("the schema {schema}"))
    )]
    SearchPath(Option<String>),
    /// A replica, or `default_transaction_read_only`.
    #[error("the session is read-only: connect to the primary, with a role that may write")]
    ReadOnly,
    /// The role may not create anything.
    #[error(
        "the role {0} has no right to create in the schema public: use the owner's role, or GRANT CREATE ON SCHEMA \
         public"
    )]
    NoRights(String),
    /// A pooler stands between: the lock would belong to whoever gets its server connection next.
    #[error(
        "a connection pooler stands between this program and the server, and may share a session among clients: give \
         the server's own address; when nothing is pending, a pooler's address is fine"
    )]
    Pooler,
    /// The caller's `confirm` said no.
    #[error("not confirmed; nothing was changed")]
    NotConfirmed,
}

/// Who holds the lock.
#[derive(Debug, Clone, Serialize, QueryableByName)]
pub struct Holder {
    /// Its backend's process id.
    #[diesel(sql_type = Integer)]
    pub pid: i32,
    /// Its `application_name`; `None` if this role may not see it.
    #[diesel(sql_type = Nullable<Text>)]
    pub application: Option<String>,
    /// Where it is connected from; `None` for a socket, or if this role may not see it.
    #[diesel(sql_type = Nullable<Text>)]
    pub address: Option<String>,
    /// When it connected, which is no later than when it took the lock; `None` if this role may not see it.
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub since: Option<DateTime<Utc>>,
}

impl fmt::Display for Holder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "backend {}", self.pid)?;
        if let Some(application) = &self.application {
            write!(formatter, ", {application}")?;
        }
        if let Some(address) = &self.address {
            write!(formatter, ", from {address}")?;
        }
        if let Some(since) = self.since {
            write!(formatter, ", connected since {}", since.format("%F %T UTC"))?;
        }
        Ok(())
    }
}

/// A migration that failed, and what it left behind.
#[derive(Debug, Clone, Serialize)]
pub struct Failure {
    /// Its version.
    pub version: String,
    /// Its folder's name.
    pub name: String,
    /// Up or down.
    pub direction: Direction,
    /// What the server said.
    #[serde(flatten)]
    pub report: ServerReport,
    /// Whether what the file had done so far was undone as a whole.
    pub in_transaction: bool,
    /// Names of those that were done before it.
    pub done: Vec<String>,
    /// What the database was found to be in afterwards.
    pub state: StateAfter,
}

/// The state after a failure, read again.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StateAfter {
    /// What is applied now.
    Known {
        /// The newest applied version.
        newest: Option<String>,
        /// Whether the migration that failed is among the applied ones.
        recorded: bool,
        /// A session that holds the lock still, or again, and may yet change this.
        holder: Option<Holder>,
    },
    /// Nobody could be asked; the reason.
    Unknown(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = self.direction;
        write!(formatter, "{} {} failed", direction.verb(), self.name)?;
        if let Some((line, column)) = self.report.line.zip(self.report.column) {
            let place = format!("{direction}.sql, line {line}, column {column}");
            write!(formatter, " in {place}")?;
        }
        writeln!(formatter, ": {}", self.report)?;
        let (newest, recorded, holder) = match &self.state {
            StateAfter::Unknown(why) => {
                return write!(
                    formatter,
                    "What it left is not known, for the database can't be asked ({why}): look at the status before \
                     anything else."
                );
            }
            StateAfter::Known {
                newest,
                recorded,
                holder,
            } => (newest, *recorded, holder),
        };
        formatter.write_str(if recorded == (direction == Direction::Up) {
            "The database says that it is done nevertheless: it was finished as the connection broke, or by another \
             tool at the same time."
        } else if self.in_transaction {
            "It was rolled back as a whole."
        } else {
            "It does not run in a transaction, so that parts of it may have stayed: clean them up by hand."
        })?;
        match newest {
            None => formatter.write_str(" The database has none applied.")?,
            Some(newest) => write!(formatter, " The database is at {newest}.")?,
        }
        if let Some(holder) = holder {
            let still = "so that this may still change";
            write!(formatter, " The lock is held ({holder}), {still}.")?;
        }
        Ok(())
    }
}

/// What the server said about a statement.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ServerReport {
    /// The message.
    pub message: String,
    /// The DETAIL. Withheld where it would quote a row, which may hold a secret.
    pub detail: Option<String>,
    /// The HINT.
    pub hint: Option<String>,
    /// The line in the file, from 1.
    pub line: Option<usize>,
    /// The column in that line, in characters from 1.
    pub column: Option<usize>,
}

/// Not even a key of these is shown.
const SECRET_TABLES: [&str; 2] = ["auth_tokens", "mcp_credentials"];

impl ServerReport {
    /// Of an error that came from `sql`.
    pub(super) fn new(error: &diesel::result::Error, sql: &str) -> Self {
        let diesel::result::Error::DatabaseError(kind, information) = error else {
            return Self::from_text(error);
        };
        let mut message = information.message().trim_end().to_owned();
        if let DatabaseErrorKind::ClosedConnection = kind {
            // libpq goes on about what this probably means.
            let first = message.lines().next().unwrap_or_default();
            message = format!("the connection was lost ({first})");
        }
        let table = information.table_name().unwrap_or_default();
        let quotes_a_row = matches!(
            kind,
            DatabaseErrorKind::CheckViolation | DatabaseErrorKind::NotNullViolation
        );
        let detail = information.details().map(|detail| {
            if quotes_a_row || SECRET_TABLES.contains(&table) {
                "withheld, for it may quote a row"
            } else {
                detail
            }
        });
        let position = information.statement_position();
        let (line, column) = position
            .and_then(|position| line_and_column(sql, position))
            .unzip();
        Self {
            message,
            detail: detail.map(str::to_owned),
            hint: information.hint().map(str::to_owned),
            line,
            column,
        }
    }

    pub(super) fn from_text(error: &dyn std::error::Error) -> Self {
        Self {
            message: error.to_string(),
            ..Self::default()
        }
    }
}

impl fmt::Display for ServerReport {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)?;
        if let Some(detail) = &self.detail {
            write!(formatter, "\nDETAIL: {detail}")?;
        }
        if let Some(hint) = &self.hint {
            write!(formatter, "\nHINT: {hint}")?;
        }
        Ok(())
    }
}

/// Of a position in characters from 1, as the server counts.
fn line_and_column(sql: &str, position: i32) -> Option<(usize, usize)> {
    let before = usize::try_from(position).ok()?.checked_sub(1)?;
    let (end, _) = sql.char_indices().nth(before)?;
    let start = sql[..end].rfind('\n').map_or(0, |newline| newline + 1);
    let line = sql[..start].matches('\n').count() + 1;
    Some((line, sql[start..end].chars().count() + 1))
}
