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

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use crate::check::{Check, Difference, Money, check};
pub use crate::error::{ImportError, OtherSession, ServerError};
pub use crate::purge::purge_archive;
pub use crate::reasons::{REASONS, ReasonCode};
pub use crate::report::{
    Reason, Rejected, Report, TableReport, UnknownColumn, UnknownTable, write_csv, write_json_lines,
};
pub use crate::run::{import, preflight, rejected};

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

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
