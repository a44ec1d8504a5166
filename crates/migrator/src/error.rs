//! Errors: what happened, which state is left, and what to do next.

use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::result::DatabaseErrorKind;
use diesel::sql_types::{BigInt, Integer, Nullable, Text, Timestamptz};
use serde::Serialize;

use crate::{Direction, Loss, Note, Report};

/// Error of a [`Runner`](crate::Runner). No text contains the password of the URL. `done` is what
/// the run did before.
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
    LockLost { program: String, done: Box<Report> },
    /// A query of the runner failed.
    #[error("{doing} failed: {report}")]
    #[expect(missing_docs, reason = "the names say it")]
    Database {
        doing: &'static str,
        report: Box<ServerReport>,
        done: Box<Report>,
    },
    /// The SQL of [`Runner::roles`](crate::Runner::roles) failed.
    #[error(
        "granting the rights failed: {0}\nNo right was changed. When the reason is removed, grant \
         again."
    )]
    Grant(ServerReport),
    /// The migrations can't be read from their source.
    #[error("can't read the migrations: {0}")]
    Source(String),
}

impl Error {
    /// Returns what the run did before this error: steps, notes and losses. `None` if the error
    /// can only come before a migration.
    pub fn done(&self) -> Option<&Report> {
        match self {
            Self::Failed(failure) => Some(&failure.done),
            Self::LockLost { done, .. } | Self::Database { done, .. } => Some(done),
            _ => None,
        }
    }

    pub(crate) fn with_done(mut self, report: Report) -> Self {
        match &mut self {
            Self::Failed(failure) => failure.done = report,
            Self::LockLost { done, .. } | Self::Database { done, .. } => **done = report,
            _ => {}
        }
        self
    }

    pub(crate) fn database(doing: &'static str) -> impl FnOnce(diesel::result::Error) -> Self {
        move |error| Self::Database {
            doing,
            report: Box::new(ServerReport::new(&error, "", &[])),
            done: Box::default(),
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
        "{pending} is pending, but the newer {applied} is applied. If {pending} was applied and its \
         row in __diesel_schema_migrations was lost, run `adopt`. Otherwise give {pending} a version \
         after {applied}, or first revert to the version before it."
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
    #[error("this program has no migration {0}. `status` lists the ones it has.")]
    NoSuchVersion(String),
    /// A migration to revert has no `down.sql`.
    #[error(
        "{0} can't be reverted: it has no down.sql. Undo it by a new migration, or give it one."
    )]
    NoDown(String),
    /// The schema of the migrations does not exist.
    #[error(
        "the schema {} does not exist. Create it as its owner: CREATE SCHEMA {};",
        .0, quoted(.0)
    )]
    NoSchema(String),
    /// No schema of the database has a migration of this program.
    #[error(
        "no schema has a __diesel_schema_migrations with a migration of this program. Name one \
         (`--schema`)."
    )]
    NoLedgers,
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
    /// The server lacks settings that a run needs.
    #[error("the server is PostgreSQL {0}. A run needs PostgreSQL 14; tested are 15 and newer.")]
    OldServer(String),
    /// The server is a replica, or `default_transaction_read_only` is on.
    #[error("the session is read-only. Connect to the primary, with a role that may write.")]
    ReadOnly,
    /// The role may not create objects in the schema.
    #[error(
        "the role {role} may not create objects in the schema {schema}. Use the owner's role. \
         Grant CREATE only to a role that no service uses."
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
    /// The schema has more migrations than `__diesel_schema_migrations`. `found` is the name of the
    /// newest; `elsewhere` names other schemas that have such a table.
    #[error(
        "the schema {schema} is that of {found}, but __diesel_schema_migrations lacks it. Rows \
         were lost, or another tool migrated the database. Run `adopt`, which writes them, or \
         restore the table from a backup.{}",
        elsewhere.iter().map(|other| format!(
            " If the table in the schema {other} is the right one: ALTER TABLE \
             {other}.__diesel_schema_migrations SET SCHEMA {schema}."
        )).collect::<String>()
    )]
    #[expect(missing_docs, reason = "the names say it")]
    LostLedger {
        found: String,
        schema: String,
        elsewhere: Vec<String>,
    },
    /// The schema is that of no version that the ledger allows. Has the name of the nearest, and
    /// the differences from it: what is missing begins with `-`, what should not be there with `+`.
    #[error(
        "the schema is that of no version from the newest recorded one on. It comes nearest to \
         {}:\n{}\nRepair it, or restore __diesel_schema_migrations from a backup.",
        .0.as_deref().unwrap_or("a schema without migrations"),
        first(.1)
    )]
    NotAdopted(Option<String>, Vec<String>),
    /// The project's [`Hook`](crate::Hook) knows that the migrations would fail.
    #[error(
        "the migrations would fail.{}",
        .0.iter().map(|note| format!("\n{note}")).collect::<String>()
    )]
    Obstacles(Vec<Note>),
    /// The program was built without an expected catalogue of the applied migrations.
    #[error(
        "this program has no expected catalogue of what is applied, to verify against. Build it \
         with one: Runner::expect_catalogue."
    )]
    NoCatalogue,
    /// The program was built without roles.
    #[error("this program has no roles to grant rights to. Build it with some: Runner::roles.")]
    NoRoles,
    /// None of the [`Runner::roles`](crate::Runner::roles) exists.
    #[error(
        "there is nobody to grant rights to. Create the roles that you need, then grant again: {}",
        .0.iter()
            .map(|role| format!("CREATE ROLE {};", quoted(role)))
            .collect::<Vec<_>>()
            .join(" ")
    )]
    RolesMissing(Vec<String>),
    /// The program was built without a maintenance.
    #[error("this program has no maintenance to do. Build it with one: Runner::maintenance.")]
    NoMaintenance,
    /// Migrations are pending, and what was asked for needs them.
    #[error("{0} migrations are pending. Run them first (`run`).")]
    Pending(usize),
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

/// Quotes an identifier for SQL.
pub(crate) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Joins the first lines.
fn first(lines: &[String]) -> String {
    const SHOWN: usize = 20;
    let mut text = lines[..lines.len().min(SHOWN)].join("\n");
    if let Some(more) = lines.len().checked_sub(SHOWN + 1) {
        text += &format!("\n… and {} more", more + 1);
    }
    text
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

/// A session whose lock a migration waits for. A field is `None` if this role may not see it. A
/// prepared transaction has the `pid` 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, QueryableByName)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Blocker {
    #[diesel(sql_type = Integer)]
    pub pid: i32,
    #[diesel(sql_type = Nullable<Text>)]
    pub application: Option<String>,
    /// `active`, `idle in transaction` and so on.
    #[diesel(sql_type = Nullable<Text>)]
    pub state: Option<String>,
    /// Age of its last query.
    #[diesel(sql_type = Nullable<BigInt>)]
    pub query_seconds: Option<i64>,
    /// Age of its transaction.
    #[diesel(sql_type = Nullable<BigInt>)]
    pub transaction_seconds: Option<i64>,
}

impl fmt::Display for Blocker {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.pid == 0 {
            return formatter.write_str("a prepared transaction (see pg_prepared_xacts)");
        }
        write!(formatter, "server process {}", self.pid)?;
        for text in [&self.application, &self.state].into_iter().flatten() {
            write!(formatter, ", {text}")?;
        }
        if let Some(seconds) = self.transaction_seconds {
            write!(formatter, ", transaction {seconds} s old")?;
        }
        if let Some(seconds) = self.query_seconds {
            write!(formatter, ", query {seconds} s old")?;
        }
        Ok(())
    }
}

/// Why a migration did not finish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The server refused a statement, or the connection was lost.
    Error,
    /// It waited for a lock too long, as often as the runner tries.
    LockTimeout,
    /// The [stop flag](crate::Runner::stop_flag) was set.
    Stopped,
    /// The run reached its [time limit](crate::Runner::timeout).
    TimedOut,
}

/// A migration that failed or was stopped, and the state it left. `begun` is `false` if the run
/// ended before it. `blockers` held the lock that it waited for last. `done` is what the run did
/// before; in JSON it stands beside the error.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Failure {
    #[serde(skip)]
    pub(crate) program: String,
    pub version: String,
    pub name: String,
    pub direction: Direction,
    pub cause: Cause,
    pub begun: bool,
    #[serde(flatten)]
    pub report: ServerReport,
    pub blockers: Vec<Blocker>,
    pub in_transaction: bool,
    /// Whether all migrations of the revert or redo share one transaction.
    pub together: bool,
    #[serde(skip)]
    pub done: Report,
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
        /// INVALID indexes of the schema, quoted as in SQL, if the migration does not run in a
        /// transaction. `CREATE INDEX CONCURRENTLY` leaves one when it fails.
        invalid_indexes: Vec<String>,
        /// A session that holds the lock and may still change this state.
        holder: Option<Holder>,
    },
    /// The database could not be reached, for this reason.
    Unknown(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fmt_event(formatter)?;
        let (newest, recorded, invalid_indexes, holder) = match &self.state {
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
                invalid_indexes,
                holder,
            } => (newest, *recorded, invalid_indexes, holder),
        };
        if self.begun || self.together {
            formatter.write_str(if recorded {
                "The database records it as done: the connection broke after the commit, or \
                 another tool did it at the same time. "
            } else if self.together {
                "Everything was rolled back. "
            } else if self.in_transaction {
                "The migration was rolled back. "
            } else {
                "The migration does not run in a transaction: some of its changes may remain. \
                 Remove them by hand before retrying. "
            })?;
        }
        match newest {
            None => formatter.write_str("No migration is applied.")?,
            Some(newest) => write!(formatter, "The database is at {newest}.")?,
        }
        if matches!(self.cause, Cause::Stopped | Cause::TimedOut) && self.direction == Direction::Up
        {
            formatter.write_str(" The next run continues there.")?;
        }
        for index in invalid_indexes {
            write!(
                formatter,
                "\nThe index {index} is INVALID: DROP INDEX CONCURRENTLY {index};"
            )?;
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

impl Failure {
    fn fmt_event(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name, direction, ..
        } = self;
        let verb = direction.verb();
        let when = if self.begun { "while" } else { "before" };
        match self.cause {
            Cause::Stopped => return writeln!(formatter, "stopped {when} {verb} {name}"),
            Cause::TimedOut => {
                return writeln!(
                    formatter,
                    "stopped {when} {verb} {name}: the run reached its time limit"
                );
            }
            Cause::Error | Cause::LockTimeout => write!(formatter, "{verb} {name} failed")?,
        }
        if let Some((line, column)) = self.report.line.zip(self.report.column) {
            write!(
                formatter,
                " in {direction}.sql, line {line}, column {column}"
            )?;
        }
        writeln!(formatter, ": {}", self.report)?;
        for blocker in &self.blockers {
            writeln!(formatter, "The lock was held by {blocker}.")?;
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
