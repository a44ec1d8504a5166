//! What a run tells: while it works, and at its end.

use std::fmt;
use std::time::Duration;

use diesel::pg::PgConnection;
use diesel::result::QueryResult;
use serde::{Serialize, Serializer};

use crate::{Blocker, Holder, Loss};

pub(crate) type Watcher = Box<dyn FnMut(Event<'_>) + Send>;

/// Progress of a run.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Another runner holds the lock.
    Waiting(&'a Holder),
    /// Settings of the role or the database, such as `statement_timeout = 30s`, that don't apply
    /// to the run.
    Lifted(&'a [String]),
    /// A migration starts.
    Started(&'a str, Direction),
    /// A migration waits for locks of these sessions. Repeated while it lasts.
    Blocked(&'a str, &'a [Blocker]),
    /// A migration waited too long for a lock and was rolled back. It is tried again after this
    /// pause.
    Retrying(&'a str, Duration),
    /// A migration has finished. In a revert or redo that is one transaction: it is committed.
    Finished(&'a Step),
}

#[cfg(feature = "tracing")]
impl Event<'_> {
    /// Sends the event to `tracing`, as `info`, or as `warn` where somebody may have to act.
    pub(crate) fn trace(&self) {
        use tracing::{info, warn};

        match self {
            Self::Waiting(holder) => warn!(pid = holder.pid, "another runner holds the lock"),
            Self::Lifted(settings) => info!(?settings, "settings don't apply to the run"),
            Self::Started(migration, direction) => info!(migration, %direction, "started"),
            Self::Blocked(migration, blockers) => {
                let pids: Vec<i32> = blockers.iter().map(|blocker| blocker.pid).collect();
                warn!(migration, ?pids, "waits for locks");
            }
            Self::Retrying(migration, pause) => {
                warn!(migration, ?pause, "rolled back, tried again")
            }
            Self::Finished(step) => info!(
                migration = step.name,
                direction = %step.direction,
                duration_ms = step.duration.as_secs_f64() * 1e3,
                "finished"
            ),
        }
    }
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
    /// What the project's [`Hook`] reports, and for which roles to grant rights.
    pub notes: Vec<Note>,
    /// What a revert lost; `None` if nothing was reverted or the revert could not be rehearsed.
    pub lost: Option<Vec<Loss>>,
    /// Applied versions that are newer than every migration of this program: a newer release has
    /// migrated the database.
    pub newer: Vec<String>,
}

/// Result of [`Runner::grant`](crate::Runner::grant).
#[derive(Debug, Clone, Default, Serialize)]
pub struct Granted {
    /// Roles that have their rights.
    pub roles: Vec<String>,
    /// Roles that don't exist.
    pub missing: Vec<String>,
    /// As [`Report::newer`]. If there are any, the rights were left as they are.
    pub newer: Vec<String>,
}

/// A project's own lines in a [`Report`] or a [`Plan`](crate::Plan), such as "Moved to the schema
/// archive: table users".
#[expect(missing_docs, reason = "the names say it")]
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Note {
    pub title: String,
    pub items: Vec<String>,
}

impl fmt::Display for Note {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:", self.title)?;
        self.items
            .iter()
            .try_for_each(|item| write!(formatter, "\n  {item}"))
    }
}

/// What a project finds in a database before a run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Preflight {
    /// What the run will do to the rest of the database.
    pub notes: Vec<Note>,
    /// Why the run would fail, and what to do about it. The runner refuses until it is done.
    pub obstacles: Vec<Note>,
}

/// A project's own code around the migrations that a run applies.
pub trait Hook: Send {
    /// Looks at the database before the versions `pending` are applied: in a plan, and in a run
    /// under the lock. It runs in a read-only transaction whose `search_path` is the schema of the
    /// migrations.
    ///
    /// # Errors
    /// An error ends the run before a migration is applied.
    fn preflight(
        &mut self,
        connection: &mut PgConnection,
        pending: &[&str],
    ) -> QueryResult<Preflight>;

    /// Runs after the last migration, also if that failed, under the lock, and returns notes for
    /// the report.
    ///
    /// # Errors
    /// An error is returned to the caller, unless a migration failed; the migrations stay applied.
    fn after(&mut self, connection: &mut PgConnection) -> QueryResult<Vec<Note>>;
}
