//! Brings the rows of BruhMCP's previous database, which migration 000 moved to the schema
//! `bruhmcp_archive`, into the new tables.
//!
//! [`preflight`] says what would become of each row and writes nothing. [`import`] converts and
//! writes, in batches; killed anywhere and called again, it goes on where it stopped. [`check()`]
//! compares the archive with the new tables. `bruhmcp_db::import` and the command `bruhmcp-db
//! import` give it what it needs of the new system: the canonical form of an email address, and the
//! key ring.
//!
//! The conversions are SQL: one file for each table in `src/tables`. They run in temporary views and
//! tables of the session, so connect directly, not through a pooler, and not inside a transaction.

#![deny(missing_docs)]

use std::collections::BTreeMap;

use diesel::pg::PgConnection;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use crate::check::{Check, Difference, Money};
pub use crate::error::{ImportError, OtherSession, ServerError};
pub use crate::reasons::{REASONS, ReasonCode};
pub use crate::report::{
    Reason, Rejected, Report, TableReport, UnknownColumn, UnknownTable, write_csv, write_json_lines,
};

mod check;
mod error;
mod old;
mod purge;
mod reasons;
mod report;
mod run;
mod stage;
mod tables;

/// What the operator decides. A run that goes on must have those of the first one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// The time zone in which the old system wrote its times, where they have none.
    pub timezone: String,
    /// The time zones of tables that differ, by table.
    pub timezones: BTreeMap<String, String>,
    /// What to do with accounts whose addresses differ only in their spelling.
    pub duplicate_emails: DuplicateEmails,
    /// Which of a user's live subscriptions stays live. Its period becomes that of all of them, and
    /// the others are replaced.
    pub live_subscription: LiveSubscription,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            timezone: "UTC".to_owned(),
            timezones: BTreeMap::new(),
            duplicate_emails: DuplicateEmails::Report,
            live_subscription: LiveSubscription::Latest,
        }
    }
}

impl Options {
    fn zone(&self, table: &str) -> &str {
        self.timezones.get(table).unwrap_or(&self.timezone)
    }
}

/// What becomes of an account whose address an older account has in another spelling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DuplicateEmails {
    /// It is left behind, with all that it has, and reported.
    Report,
    /// It gets another address, with its id in it: `ada+duplicate-<32 digits>@example.org`.
    Suffix,
}

/// Which of several live subscriptions of a user stays live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LiveSubscription {
    /// The latest one, even if it is free.
    Latest,
    /// The latest one that is not free, if there is one.
    Paid,
}

/// What an import needs of the new system.
pub trait NewSystem {
    /// Returns the one spelling of an email address, or `None` if it isn't one.
    fn canonical_email(&self, email: &str) -> Option<String>;

    /// Whether there are keys for [`seal`](Self::seal).
    fn has_keys(&self) -> bool;

    /// Seals a secret of an instance for this column of `mcp_credentials`; `None` if it can't.
    fn seal(&self, secret: &str, instance_id: Uuid, column: SecretColumn) -> Option<Vec<u8>>;

    /// Whether a sealed value of an instance opens, and holds this secret.
    fn holds(&self, sealed: &[u8], secret: &str, instance_id: Uuid, column: SecretColumn) -> bool;
}

/// A column of `mcp_credentials` that is sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of the columns")]
pub enum SecretColumn {
    ApiKey,
    ClientSecret,
    AccessToken,
    RefreshToken,
}

/// How far an import is with a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The table.
    pub table: &'static str,
    /// Rows that are done.
    pub done: i64,
    /// Rows to do, those that are left behind too.
    pub total: i64,
}

/// Says what would become of each row. Writes nothing: it works in a transaction that it rolls back.
///
/// # Errors
/// Any [`ImportError`] but `Running`, `Sessions`, `Busy` and `NoKeys`.
pub fn preflight(
    conn: &mut PgConnection,
    system: &dyn NewSystem,
    options: &Options,
) -> Result<Report, ImportError> {
    run::preflight(conn, system, options)
}

/// Converts the rows of the archive and writes them, and returns what became of each.
///
/// It holds an advisory lock, and refuses while other sessions may write to the database unless
/// `beside_others`. Each batch is one transaction, in which the table is locked against writes and
/// the triggers that would spoil old rows are off. Nothing of the archive changes; the progress is
/// kept in tables beside it, whose names begin with `import_`. After the end it does nothing but
/// report.
///
/// # Errors
/// [`ImportError`].
pub fn import(
    conn: &mut PgConnection,
    system: &dyn NewSystem,
    options: &Options,
    beside_others: bool,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report, ImportError> {
    run::import(conn, system, options, beside_others, progress)
}

/// Returns the rows that stay in the archive. Codes, links and refresh tokens aren't among them.
///
/// # Errors
/// `NoArchive` if no import has begun, and `Database`.
pub fn rejected(conn: &mut PgConnection) -> Result<Vec<Rejected>, ImportError> {
    run::rejected(conn)
}

/// Compares the archive with the new tables after an import: that each row is there or was rejected,
/// and nothing else is; each value; the money of each user and currency; the plan and the active
/// instances of each user; the counters of the registry; and that every credential opens. Call it
/// before the new backend starts, which changes the rows.
///
/// Writes nothing: it works in a transaction that it rolls back.
///
/// # Errors
/// `NotImported`, and those of [`preflight`].
pub fn check(conn: &mut PgConnection, system: &dyn NewSystem) -> Result<Check, ImportError> {
    check::check(conn, system)
}

/// Drops the archive, if [`check()`] holds and `confirm` returns `true`. It gets what outside the
/// archive depends on it and is dropped too: views, foreign keys. Returns the check.
///
/// One transaction, which locks the archive's tables from before the check until after `confirm`.
///
/// # Errors
/// `NotConfirmed`, and those of [`check()`]. A check that doesn't hold is no error: its differences
/// tell, and nothing was dropped.
pub fn purge_archive(
    conn: &mut PgConnection,
    system: &dyn NewSystem,
    confirm: &mut dyn FnMut(&[String]) -> bool,
) -> Result<Check, ImportError> {
    purge::purge_archive(conn, system, confirm)
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
