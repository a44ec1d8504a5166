//! The migrations of this crate, and a runner for start-up and deploys.
//!
//! It keeps Diesel's own table `__diesel_schema_migrations`, so that `diesel migration` and [`Runner`] take turns
//! freely. What the runner adds: many may start at once, errors say where and what state they leave, and what would be a
//! guess is refused.
//!
//! ```no_run
//! use bruhmcp_db::migrations::Runner;
//!
//! let report = Runner::new("postgresql://owner@db.example/bruhmcp")?.run()?;
//! for step in report.steps {
//!     println!("{} {:?}", step.name, step.duration);
//! }
//! # Ok::<(), bruhmcp_db::migrations::Error>(())
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use diesel::dsl::{select, sql};
use diesel::migration::{Migration, MigrationConnection, MigrationSource};
use diesel::pg::{Pg, PgConnection};
use diesel::prelude::*;
use diesel::sql_types::{Bool, Text, Timestamptz};
use diesel_migrations::{EmbeddedMigrations, MigrationHarness, embed_migrations};
use serde::{Serialize, Serializer};

pub use self::error::{Error, Failure, Holder, Refusal, ServerReport, StateAfter};
pub use self::losses::Loss;
use self::session::Session;
use self::url::Url;
pub use self::verify::{Difference, Verification, verify};

mod error;
mod losses;
mod recorder;
mod session;
mod url;
mod verify;

/// Migrations 000 to 007, compiled in.
// Without an argument the macro takes src/migrations, the modules of this one.
pub const MIGRATIONS: EmbeddedMigrations = embed_migrations!("migrations");

/// Applies and reverts migrations, over connections of its own.
///
/// Each migration runs in a transaction of its own, unless its `metadata.toml` says otherwise. Whatever changes the
/// database does so under an advisory lock of that database, which is polled for [`lock_wait`](Self::lock_wait); the
/// session waits for a table no longer than 5 s (`lock_timeout`). With nothing to do there is no lock and no write.
pub struct Runner {
    url: Url,
    /// In the order of their versions, which come first.
    migrations: Vec<(String, Box<dyn Migration<Pg>>)>,
    connect_wait: Duration,
    lock_wait: Duration,
    watcher: Box<dyn FnMut(Event<'_>)>,
}

/// What a runner is about, as it happens.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Another one holds the lock.
    Waiting(&'a Holder),
    /// A migration begins.
    Started(&'a str, Direction),
    /// A migration is done.
    Finished(&'a Step),
}

/// Whether a migration is applied or reverted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// By its `up.sql`.
    Up,
    /// By its `down.sql`.
    Down,
}

impl Direction {
    /// What a runner is doing: `applying` or `reverting`.
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

/// One migration, applied or reverted.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    /// Its version, such as `003`.
    pub version: String,
    /// Its folder's name.
    pub name: String,
    /// Up or down.
    pub direction: Direction,
    /// How long it took; in JSON, milliseconds.
    #[serde(rename = "duration_ms", serialize_with = "milliseconds")]
    pub duration: Duration,
}

fn milliseconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64((duration.as_secs_f64() * 1e6).round() / 1e3)
}

/// What a runner did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// What it applied and reverted, in that order of time; empty if there was nothing to do.
    pub steps: Vec<Step>,
    /// What 000 moved to the schema `bruhmcp_archive`, such as `table users`.
    pub archived: Vec<String>,
    /// The rows that were lost; `None` if nothing was reverted, or if it could not be tried beforehand.
    pub lost: Option<Vec<Loss>>,
    /// Applied versions newer than all that this program knows: it is the older one of a rolling deploy.
    pub newer: Vec<String>,
}

/// What is applied and what isn't.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// The migrations that this program knows, oldest first.
    pub migrations: Vec<MigrationStatus>,
    /// Applied ones that it doesn't know, oldest first.
    pub unknown: Vec<Applied>,
}

/// A migration that this program knows.
#[derive(Debug, Clone, Serialize)]
pub struct MigrationStatus {
    /// Its version, such as `003`.
    pub version: String,
    /// Its folder's name.
    pub name: String,
    /// When it was applied (UTC); `None` while it is pending.
    pub applied_at: Option<DateTime<Utc>>,
}

/// A row of `__diesel_schema_migrations`.
#[derive(Debug, Clone, Serialize)]
pub struct Applied {
    /// The version.
    pub version: String,
    /// When it was applied (UTC).
    pub applied_at: DateTime<Utc>,
}

/// How far to go back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extent {
    /// The newest so many.
    Last(usize),
    /// All after this version, which stays.
    To(String),
    /// All.
    All,
}

/// What going back would do, for the caller of [`Runner::revert`] and [`Runner::redo`] to agree to.
#[derive(Debug, Clone, Serialize)]
pub struct Reversal {
    /// Names of the migrations, in the order they would be reverted.
    pub names: Vec<String>,
    /// The rows that would be lost; `None` if one of the migrations doesn't run in a transaction, so that it could not
    /// be tried.
    pub losses: Option<Vec<Loss>>,
}

/// What would be applied.
#[derive(Debug, Clone, Serialize)]
pub struct Planned {
    /// Its version, such as `003`.
    pub version: String,
    /// Its folder's name.
    pub name: String,
    /// Its `up.sql`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub sql: String,
}

impl Runner {
    /// A runner for [`MIGRATIONS`] on the database at `url`, which begins with `postgresql://`. It connects later, and
    /// only as needed. The role owns what is in the schema `public`, or will own it.
    ///
    /// # Errors
    /// [`Error::Url`].
    pub fn new(url: &str) -> Result<Self, Error> {
        Self::with_source(url, &MIGRATIONS)
    }

    /// A runner for other migrations.
    ///
    /// # Errors
    /// [`Error::Url`], [`Error::Source`].
    pub fn with_source(url: &str, source: &impl MigrationSource<Pg>) -> Result<Self, Error> {
        let url = Url::parse(url)?;
        let migrations = source
            .migrations()
            .map_err(|error| Error::Source(error.to_string()))?
            .into_iter()
            .map(|migration| (migration.name().version().to_string(), migration));
        let mut migrations: Vec<_> = migrations.collect();
        migrations.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(Self {
            url,
            migrations,
            connect_wait: Duration::ZERO,
            lock_wait: Duration::from_secs(60),
            watcher: Box::new(|_| {}),
        })
    }

    /// How long to try while the server is out of reach or starting; not at all if it isn't said. A wrong password or
    /// database is told at once.
    #[must_use]
    pub fn connect_wait(mut self, wait: Duration) -> Self {
        self.connect_wait = wait;
        self
    }

    /// How long to wait for another runner; 60 s if it isn't said.
    #[must_use]
    pub fn lock_wait(mut self, wait: Duration) -> Self {
        self.lock_wait = wait;
        self
    }

    /// Calls `watcher` with whatever happens, for a log or a terminal.
    #[must_use]
    pub fn on_event(mut self, watcher: impl FnMut(Event<'_>) + 'static) -> Self {
        self.watcher = Box::new(watcher);
        self
    }

    /// What is applied and what isn't. Only reads: a role without any right to write and a replica will do.
    ///
    /// # Errors
    /// [`Error::Connect`], [`Error::Database`].
    pub fn status(&mut self) -> Result<Status, Error> {
        let mut connection = session::connect(&self.url, self.connect_wait)?;
        self.status_on(&mut connection)
    }

    /// What [`run_to`](Self::run_to) would apply, oldest first. Only reads.
    ///
    /// # Errors
    /// As [`run_to`](Self::run_to).
    pub fn plan(&mut self, to: Option<&str>) -> Result<Vec<Planned>, Error> {
        let status = self.status()?;
        let planned = self.pending(&status, to)?.into_iter().map(|index| {
            let (version, migration) = &self.migrations[index];
            Ok(Planned {
                version: version.clone(),
                name: name(&**migration),
                sql: recorder::sql(&**migration, Direction::Up)
                    .map_err(|error| Error::Source(error.to_string()))?,
            })
        });
        planned.collect()
    }

    /// [`verify`], over a connection of the runner's own.
    ///
    /// # Errors
    /// [`Error::Connect`], [`Error::Database`].
    pub fn verify(&mut self) -> Result<Verification, Error> {
        let mut connection = session::connect(&self.url, self.connect_wait)?;
        verify(&mut connection).map_err(Error::database("reading the catalogue"))
    }

    /// Applies all that is pending.
    ///
    /// # Errors
    /// Any. After [`Error::Failed`] those before the failing one stay applied, and the next run goes on from there.
    pub fn run(&mut self) -> Result<Report, Error> {
        self.run_to(None)
    }

    /// Applies what is pending up to and with version `to`, or all.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_to(&mut self, to: Option<&str>) -> Result<Report, Error> {
        self.locked("run", |runner, status| runner.pending(status, to), Self::up)
    }

    /// Reverts applied migrations, newest first, if `confirm` agrees. It is asked under the lock, after all of it was
    /// tried in a transaction that is rolled back to learn which rows would be lost; for that moment the tables are
    /// locked as they are in the end.
    ///
    /// # Errors
    /// Any. After [`Error::Failed`] those before the failing one stay reverted.
    pub fn revert(
        &mut self,
        extent: &Extent,
        confirm: impl FnOnce(&Reversal) -> bool,
    ) -> Result<Report, Error> {
        self.locked(
            "revert",
            |runner, status| runner.applied(status, extent),
            |runner, session, indexes| runner.down(session, indexes, confirm),
        )
    }

    /// Reverts as [`revert`](Self::revert) does and applies the same ones again.
    ///
    /// # Errors
    /// Any. After [`Error::Failed`] the next [`run`](Self::run) applies what is missing.
    pub fn redo(
        &mut self,
        extent: &Extent,
        confirm: impl FnOnce(&Reversal) -> bool,
    ) -> Result<Report, Error> {
        self.locked(
            "redo",
            |runner, status| runner.applied(status, extent),
            |runner, session, indexes| {
                runner.down(session, indexes, confirm)?;
                let again: Vec<usize> = indexes.iter().rev().copied().collect();
                runner.up(session, &again)
            },
        )
    }

    /// Does `work` under the lock with what `choose` finds to be done there, if it finds anything without.
    fn locked(
        &mut self,
        purpose: &str,
        choose: impl Fn(&Self, &Status) -> Result<Vec<usize>, Error>,
        work: impl FnOnce(&mut Self, &mut Session, &[usize]) -> Result<(), Error>,
    ) -> Result<Report, Error> {
        let status = self.status()?;
        if choose(self, &status)?.is_empty() {
            return Ok(Report {
                newer: status.newer(),
                ..Report::default()
            });
        }
        let mut session = Session::open(&self.url, self.connect_wait, purpose)?;
        session.lock(self.lock_wait, |holder| {
            (self.watcher)(Event::Waiting(holder))
        })?;
        // Another runner may have done it all in the meantime.
        let status = self.status_on(&mut session.connection)?;
        let chosen = choose(self, &status)?;
        if !chosen.is_empty() {
            work(self, &mut session, &chosen)?;
        }
        session.unlock()
    }

    fn up(&mut self, session: &mut Session, indexes: &[usize]) -> Result<(), Error> {
        session
            .connection
            .setup()
            .map_err(Error::database("creating __diesel_schema_migrations"))?;
        let archive = archive(&mut session.connection)?;
        for &index in indexes {
            self.step(session, index, Direction::Up)?;
        }
        if archive.is_empty() {
            session.done.archived = self::archive(&mut session.connection)?;
        }
        Ok(())
    }

    fn down(
        &mut self,
        session: &mut Session,
        indexes: &[usize],
        confirm: impl FnOnce(&Reversal) -> bool,
    ) -> Result<(), Error> {
        let migrations = indexes.iter().map(|&index| &*self.migrations[index].1);
        let migrations: Vec<&dyn Migration<Pg>> = migrations.collect();
        let losses = losses::find(&mut session.connection, &migrations).map_err(|error| {
            Error::Database {
                doing: "trying the revert",
                report: session.report(&*error),
            }
        })?;
        let names = migrations.into_iter().map(name).collect();
        let reversal = Reversal { names, losses };
        if !confirm(&reversal) {
            return Err(Refusal::NotConfirmed.into());
        }
        session.done.lost = reversal.losses;
        for &index in indexes {
            self.step(session, index, Direction::Down)?;
        }
        Ok(())
    }

    fn step(
        &mut self,
        session: &mut Session,
        index: usize,
        direction: Direction,
    ) -> Result<(), Error> {
        let (version, migration) = &self.migrations[index];
        let name = name(&**migration);
        (self.watcher)(Event::Started(&name, direction));
        let begin = Instant::now();
        let outcome = match direction {
            Direction::Up => session.connection.run_migration(migration),
            Direction::Down => session.connection.revert_migration(migration),
        };
        let duration = begin.elapsed();
        if let Err(error) = outcome {
            return Err(Error::Failed(Box::new(Failure {
                version: version.clone(),
                direction,
                report: session.report(&*error),
                in_transaction: migration.metadata().run_in_transaction(),
                done: session
                    .done
                    .steps
                    .iter()
                    .map(|step| step.name.clone())
                    .collect(),
                state: self.state_after(session, version),
                name,
            })));
        }
        let step = Step {
            version: version.clone(),
            name,
            direction,
            duration,
        };
        (self.watcher)(Event::Finished(&step));
        session.done.steps.push(step);
        Ok(())
    }

    fn state_after(&self, session: &mut Session, version: &str) -> StateAfter {
        let known = |connection: &mut PgConnection, holder| {
            let applied = ledger(connection)?;
            Ok(StateAfter::Known {
                newest: applied.keys().next_back().cloned(),
                recorded: applied.contains_key(version),
                holder,
            })
        };
        // Once the connection is lost, its server process may live on for as long as that isn't noticed.
        let again = |_: Error| {
            let mut connection = session::connect(&self.url, self.connect_wait)?;
            let holder = session::holder(&mut connection)?;
            known(&mut connection, holder)
        };
        known(&mut session.connection, None)
            .or_else(again)
            .unwrap_or_else(|error| StateAfter::Unknown(error.to_string()))
    }

    fn status_on(&self, connection: &mut PgConnection) -> Result<Status, Error> {
        let mut pairs = self.migrations.windows(2);
        if let Some([(_, one), (_, other)]) = pairs.find(|pair| pair[0].0 == pair[1].0) {
            return Err(Refusal::DuplicateVersion(name(&**one), name(&**other)).into());
        }
        let mut applied = ledger(connection)?;
        let migrations = self
            .migrations
            .iter()
            .map(|(version, migration)| MigrationStatus {
                version: version.clone(),
                name: name(&**migration),
                applied_at: applied.remove(version),
            })
            .collect();
        let unknown = applied
            .into_iter()
            .map(|(version, applied_at)| Applied {
                version,
                applied_at,
            })
            .collect();
        Ok(Status {
            migrations,
            unknown,
        })
    }

    /// Indexes of what [`run_to`](Self::run_to) is to apply.
    fn pending(&self, status: &Status, to: Option<&str>) -> Result<Vec<usize>, Error> {
        if let Some(refusal) = status.refusal() {
            return Err(refusal.into());
        }
        let end = match to {
            None => self.migrations.len(),
            Some(to) => self.index(to)? + 1,
        };
        let pending = status.migrations[..end].iter().enumerate();
        Ok(pending
            .filter(|(_, migration)| migration.applied_at.is_none())
            .map(|(index, _)| index)
            .collect())
    }

    /// Indexes of what [`revert`](Self::revert) is to revert.
    fn applied(&self, status: &Status, extent: &Extent) -> Result<Vec<usize>, Error> {
        let (begin, most) = match extent {
            Extent::To(to) => (self.index(to)? + 1, usize::MAX),
            Extent::Last(most) => (0, *most),
            Extent::All => (0, usize::MAX),
        };
        let applied: Vec<usize> = (begin..self.migrations.len())
            .rev()
            .filter(|&index| status.migrations[index].applied_at.is_some())
            .take(most)
            .collect();
        // An unknown one was applied after those it is newer than, and may build on them.
        let oldest = applied.last().map(|&oldest| &self.migrations[oldest].0);
        let newer = status.unknown_after(oldest);
        if oldest.is_some() && !newer.is_empty() {
            return Err(Refusal::Unknown(newer).into());
        }
        for &index in &applied {
            let migration = &*self.migrations[index].1;
            if recorder::sql(migration, Direction::Down).is_err() {
                return Err(Refusal::NoDown(name(migration)).into());
            }
        }
        Ok(applied)
    }

    fn index(&self, version: &str) -> Result<usize, Error> {
        let mut migrations = self.migrations.iter();
        let index = migrations.position(|(known, _)| known == version);
        index.ok_or_else(|| Refusal::NoSuchVersion(version.to_owned()).into())
    }
}

impl fmt::Debug for Runner {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the URL: it holds the password.
        formatter.debug_struct("Runner").finish_non_exhaustive()
    }
}

impl Status {
    /// Names of those not applied yet, oldest first.
    pub fn pending(&self) -> impl Iterator<Item = &str> {
        self.migrations
            .iter()
            .filter(|migration| migration.applied_at.is_none())
            .map(|migration| &*migration.name)
    }

    /// Why [`Runner::run`] would refuse this state, if it would.
    pub fn refusal(&self) -> Option<Refusal> {
        let is_applied = |migration: &&MigrationStatus| migration.applied_at.is_some();
        let pending = self.migrations.iter().find(|one| !is_applied(one));
        let applied = self.migrations.iter().rfind(is_applied);
        let unknown = self.unknown_after(None);
        if unknown.len() > self.newer().len() || (pending.is_some() && !unknown.is_empty()) {
            return Some(Refusal::Unknown(unknown));
        }
        let (pending, applied) = pending.zip(applied)?;
        (pending.version < applied.version).then(|| Refusal::OutOfOrder {
            pending: pending.name.clone(),
            applied: applied.name.clone(),
        })
    }

    /// Applied versions newer than all that this program knows.
    pub fn newer(&self) -> Vec<String> {
        self.unknown_after(self.migrations.last().map(|migration| &migration.version))
    }

    fn unknown_after(&self, version: Option<&String>) -> Vec<String> {
        let unknown = self.unknown.iter().map(|unknown| &unknown.version);
        unknown
            .filter(|unknown| Some(*unknown) > version)
            .cloned()
            .collect()
    }
}

fn name(migration: &dyn Migration<Pg>) -> String {
    migration.name().to_string()
}

/// The applied versions. Always those of `public`, whatever the search_path; there may be no table yet.
fn ledger(connection: &mut PgConnection) -> Result<BTreeMap<String, DateTime<Utc>>, Error> {
    let read = |connection: &mut PgConnection| {
        let exists = sql::<Bool>("to_regclass('public.__diesel_schema_migrations') IS NOT NULL");
        if !select(exists).get_result(connection)? {
            return Ok(Vec::new());
        }
        // run_on has no zone; Diesel's sessions, and so the CLI's and this one, are set to UTC.
        sql::<(Text, Timestamptz)>(
            "SELECT version::text, run_on AT TIME ZONE 'UTC' FROM public.__diesel_schema_migrations",
        )
        .load(connection)
    };
    let rows = read(connection).map_err(Error::database("reading __diesel_schema_migrations"))?;
    Ok(rows.into_iter().collect())
}

/// What the archive of the old system holds.
fn archive(connection: &mut PgConnection) -> Result<Vec<String>, Error> {
    sql::<Text>(
        "SELECT CASE c.relkind WHEN 'v' THEN 'view ' WHEN 'm' THEN 'materialized view ' WHEN 'S' THEN 'sequence '
                    WHEN 'f' THEN 'foreign table ' ELSE 'table ' END || c.relname AS object
         FROM pg_class c
         WHERE c.relnamespace = to_regnamespace('bruhmcp_archive') AND c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
         UNION ALL
         SELECT 'type ' || t.typname
         FROM pg_type t
         WHERE t.typnamespace = to_regnamespace('bruhmcp_archive') AND t.typtype IN ('e', 'd')
         UNION ALL
         SELECT 'function ' || p.proname
         FROM pg_proc p
         WHERE p.pronamespace = to_regnamespace('bruhmcp_archive')
         ORDER BY object",
    )
    .load(connection)
    .map_err(Error::database("reading what the archive holds"))
}
