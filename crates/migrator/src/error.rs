//! Errors: what happened, which state is left, and what to do next.

use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::result::DatabaseErrorKind;
use diesel::sql_types::{Integer, Nullable, Text, Timestamptz};
use serde::Serialize;

use crate::{Direction, Loss};

/// Error of a [`Runner`](crate::Runner). No text contains the password of the URL.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The database URL can't be read.
    #[error("can't read the database URL: {0}")]
    Url(&'static str),
    /// No connection. The text is libpq's.
    #[error("no connection: {0}")]
    Connect(String),
    /// Another runner held the lock until `lock_wait` was over.
    #[error(
        "another runner holds the lock ({holder}); gave up after {:.1} s. Nothing was changed. \
         Retry when it has finished.",
        waited.as_secs_f64()
    )]
    #[expect(missing_docs, reason = "the names say it")]
    LockBusy { holder: Holder, waited: Duration },
    /// The runner refused. Nothing was changed.
    #[error("refused, nothing was changed: {0}")]
    Refused(#[from] Refusal),
    /// A migration failed.
    #[error("{0}")]
    Failed(Box<Failure>),
    /// The migrations ran, but one of them released the lock.
    #[error(
        "the migrations were applied or reverted, but one of them released the lock, so another \
         runner may have worked at the same time. Run `{program} status`."
    )]
    #[expect(missing_docs, reason = "the names say it")]
    LockLost { program: String },
    /// A query of the runner failed.
    #[error("{doing} failed: {report}")]
    #[expect(missing_docs, reason = "the names say it")]
    Database {
        doing: &'static str,
        report: ServerReport,
    },
    /// The migrations can't be read from their source.
    #[error("can't read the migrations: {0}")]
    Source(String),
}

impl Error {
    pub(crate) fn database(doing: &'static str) -> impl FnOnce(diesel::result::Error) -> Self {
        move |error| Self::Database {
            doing,
            report: ServerReport::new(&error, "", &[]),
        }
    }
}

/// Why a runner refuses, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Two migrations have the same version.
    #[error("{0} and {1} have the same version. Rename the one that is not released.")]
    DuplicateVersion(String, String),
    /// A pending migration is older than an applied one.
    #[error(
        "{pending} is pending, but the newer {applied} is applied. Give {pending} a version after \
         {applied}, or first revert to the version before it."
    )]
    #[expect(missing_docs, reason = "the names say it")]
    OutOfOrder { pending: String, applied: String },
    /// The database has migrations that this program doesn't have.
    #[error(
        "the database has {}, which this program does not know. Use the program that applied it. \
         If that migration was abandoned and undone by hand, delete its row from \
         __diesel_schema_migrations.",
        .0.join(", ")
    )]
    Unknown(Vec<String>),
    /// This program has no migration of the requested version.
    #[error("this program has no migration {0}. The status lists the ones it has.")]
    NoSuchVersion(String),
    /// A migration to revert has no `down.sql`.
    #[error("{0} can't be reverted: it has no down.sql.")]
    NoDown(String),
    /// Unqualified names would not be created in the schema of the migrations.
    #[error(
        "the role's search_path begins with {}, but the migrations belong to the schema {schema}. \
         Set the search_path for the role, for the database or in the URL \
         (?options=-csearch_path%3D{schema}).",
        found.as_ref().map_or_else(|| "no schema".to_owned(), |found| format!("the schema {found}"))
    )]
    #[expect(missing_docs, reason = "the names say it")]
    SearchPath {
        found: Option<String>,
        schema: String,
    },
    /// The server is a replica, or `default_transaction_read_only` is on.
    #[error("the session is read-only. Connect to the primary, with a role that may write.")]
    ReadOnly,
    /// The role may not create objects in the schema.
    #[error(
        "the role {role} may not create objects in the schema {schema}. Use the owner's role, or \
         GRANT CREATE ON SCHEMA {schema}."
    )]
    #[expect(missing_docs, reason = "the names say it")]
    NoRights { role: String, schema: String },
    /// A connection pooler is in between. The lock would stay in a server process that other
    /// clients use.
    #[error(
        "a connection pooler is between this program and the server. Give the server's own \
         address. With nothing pending, the pooler's address works too."
    )]
    Pooler,
    /// The program was built without an expected catalogue.
    #[error("this program has no expected catalogue to verify against.")]
    NoCatalogue,
    /// A migration that runs in a transaction has a statement that begins or ends one, so that it
    /// could not be rolled back.
    #[error(
        "{name} runs in a transaction, but {direction}.sql has {statement} in line {line}. Remove \
         it, or turn the transaction off (run_in_transaction = false in metadata.toml)."
    )]
    #[expect(missing_docs, reason = "the names say it")]
    TransactionControl {
        name: String,
        direction: Direction,
        statement: &'static str,
        line: usize,
    },
    /// Rows arrived after `confirm`. Each loss has the number that was confirmed.
    #[error(
        "more would be lost than was confirmed: {}. Run it again.",
        .0.iter()
            .map(|(loss, confirmed)| format!("{loss}, not {confirmed}"))
            .collect::<Vec<_>>()
            .join("; ")
    )]
    LossesGrew(Vec<(Loss, i64)>),
    /// The revert touched this table, which the rehearsal did not.
    #[error("the revert touched {0}, which its rehearsal did not. Run it again.")]
    NotRehearsed(String),
    /// A migration released the lock of the runner.
    #[error(
        "a migration releases the runner's lock, so another runner might work at the same time. \
         Remove pg_advisory_unlock from it."
    )]
    ReleasesLock,
    /// `confirm` returned `false`.
    #[error("the revert was not confirmed.")]
    NotConfirmed,
}

/// The session that holds the lock. A field is `None` if this role may not see it; `address` is
/// `None` for a Unix-domain socket too. `since` is when the session connected (UTC).
#[derive(Debug, Clone, Serialize, QueryableByName)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Holder {
    #[diesel(sql_type = Integer)]
    pub pid: i32,
    #[diesel(sql_type = Nullable<Text>)]
    pub application: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    pub address: Option<String>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub since: Option<DateTime<Utc>>,
}

impl fmt::Display for Holder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "server process {}", self.pid)?;
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

/// A migration that failed, and the state it left. `done` has the names of the migrations that the
/// run finished before.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Failure {
    #[serde(skip)]
    pub(crate) program: String,
    pub version: String,
    pub name: String,
    pub direction: Direction,
    #[serde(flatten)]
    pub report: ServerReport,
    pub in_transaction: bool,
    /// Whether all migrations of the revert or redo share one transaction.
    pub together: bool,
    pub done: Vec<String>,
    pub state: StateAfter,
}

/// State of the database after a failure.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StateAfter {
    /// The state that was read after the failure.
    Known {
        /// Newest applied version.
        newest: Option<String>,
        /// Whether the database records that what failed was done.
        recorded: bool,
        /// A session that holds the lock and may still change this state.
        holder: Option<Holder>,
    },
    /// The database could not be reached, for this reason.
    Unknown(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = self.direction;
        write!(formatter, "{} {} failed", direction.verb(), self.name)?;
        if let Some((line, column)) = self.report.line.zip(self.report.column) {
            write!(
                formatter,
                " in {direction}.sql, line {line}, column {column}"
            )?;
        }
        writeln!(formatter, ": {}", self.report)?;
        let (newest, recorded, holder) = match &self.state {
            StateAfter::Unknown(why) => {
                return write!(
                    formatter,
                    "The resulting state is unknown: the database could not be reached ({why}). \
                     Run `{} status` before retrying.",
                    self.program
                );
            }
            StateAfter::Known {
                newest,
                recorded,
                holder,
            } => (newest, *recorded, holder),
        };
        formatter.write_str(if recorded {
            "The database records it as done: the connection broke after the commit, or another \
             tool did it at the same time."
        } else if self.together {
            "Everything was rolled back."
        } else if self.in_transaction {
            "The migration was rolled back."
        } else {
            "The migration does not run in a transaction: some of its changes may remain. Remove \
             them by hand before retrying."
        })?;
        match newest {
            None => formatter.write_str(" No migration is applied.")?,
            Some(newest) => write!(formatter, " The database is at {newest}.")?,
        }
        if let Some(holder) = holder {
            write!(
                formatter,
                " The lock is still held ({holder}), so this state may change."
            )?;
        }
        Ok(())
    }
}

/// The server's message about a statement. `detail` is withheld if it may quote a row. `line` and
/// `column` are those of the migration's file, from 1; a column is a character.
#[derive(Debug, Clone, Default, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct ServerReport {
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
    pub line: Option<usize>,
    pub column: Option<usize>,
}

impl ServerReport {
    pub(crate) fn new(error: &diesel::result::Error, sql: &str, secret_tables: &[String]) -> Self {
        let diesel::result::Error::DatabaseError(kind, information) = error else {
            return Self::from_text(error);
        };
        let mut message = information.message().trim_end().to_owned();
        if let DatabaseErrorKind::ClosedConnection = kind {
            // The lines after the first are libpq's guesses about the reason.
            let first = message.lines().next().unwrap_or_default();
            message = format!("the connection was lost ({first})");
        }
        let table = information.table_name().unwrap_or_default();
        let quotes_a_row = matches!(
            kind,
            DatabaseErrorKind::CheckViolation | DatabaseErrorKind::NotNullViolation
        );
        let detail = information.details().map(|detail| {
            if quotes_a_row || secret_tables.iter().any(|secret| secret == table) {
                "withheld because it may quote a row"
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

    pub(crate) fn from_text(error: &dyn std::error::Error) -> Self {
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

/// Converts a position in characters from 1, as the server counts.
fn line_and_column(sql: &str, position: i32) -> Option<(usize, usize)> {
    let before = usize::try_from(position).ok()?.checked_sub(1)?;
    let (end, _) = sql.char_indices().nth(before)?;
    let start = sql[..end].rfind('\n').map_or(0, |newline| newline + 1);
    let line = sql[..start].matches('\n').count() + 1;
    Some((line, sql[start..end].chars().count() + 1))
}
