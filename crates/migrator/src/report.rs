//! What a run tells: while it works, and at its end.

use std::fmt;
use std::time::Duration;

use diesel::pg::PgConnection;
use diesel::result::QueryResult;
use serde::{Serialize, Serializer};

use crate::{Holder, Loss};

/// Progress of a run.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Another runner holds the lock.
    Waiting(&'a Holder),
    /// A migration starts.
    Started(&'a str, Direction),
    /// A migration has finished. In a revert or redo that is one transaction: it is committed.
    Finished(&'a Step),
}

/// Whether a migration is applied (`up.sql`) or reverted (`down.sql`).
#[expect(missing_docs, reason = "the names say it")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    Up,
    Down,
}

impl Direction {
    /// Returns `applying` or `reverting`.
    pub fn verb(self) -> &'static str {
        match self {
            Self::Up => "applying",
            Self::Down => "reverting",
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Up => "up",
            Self::Down => "down",
        })
    }
}

/// A migration that was applied or reverted. In JSON, `duration` is `duration_ms` in milliseconds.
#[expect(missing_docs, reason = "the names say it")]
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    pub version: String,
    pub name: String,
    pub direction: Direction,
    #[serde(rename = "duration_ms", serialize_with = "milliseconds")]
    pub duration: Duration,
}

fn milliseconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64((duration.as_secs_f64() * 1e6).round() / 1e3)
}

/// Result of a run.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Migrations in the order they ran; empty if there was nothing to do.
    pub steps: Vec<Step>,
    /// What the project's [`Hook`] reports.
    pub notes: Vec<Note>,
    /// What a revert lost; `None` if nothing was reverted or the revert could not be rehearsed.
    pub lost: Option<Vec<Loss>>,
    /// Applied versions that are newer than every migration of this program: a newer release has
    /// migrated the database.
    pub newer: Vec<String>,
}

/// A project's own line in a [`Report`], such as "Moved to the schema archive: table users".
#[expect(missing_docs, reason = "the names say it")]
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Note {
    pub title: String,
    pub items: Vec<String>,
}

/// A project's own code around the migrations that a run applies. It runs under the lock.
pub trait Hook: Send {
    /// Runs before the first migration.
    ///
    /// # Errors
    /// An error ends the run before a migration is applied.
    fn before(&mut self, connection: &mut PgConnection) -> QueryResult<()>;

    /// Runs after the last migration and returns notes for the report.
    ///
    /// # Errors
    /// An error is returned to the caller; the migrations stay applied.
    fn after(&mut self, connection: &mut PgConnection) -> QueryResult<Vec<Note>>;
}
