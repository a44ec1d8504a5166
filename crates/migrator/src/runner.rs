//! The runner.

use std::fmt;
use std::time::{Duration, Instant};

use diesel::connection::{AnsiTransactionManager, SimpleConnection, TransactionManager};
use diesel::migration::{MigrationConnection, MigrationSource};
use diesel::pg::{Pg, PgConnection};
use diesel_migrations::MigrationHarness;
use libpq_conninfo::Conninfo;
use sha2::{Digest, Sha256};

use crate::error::{Error, Failure, Refusal, StateAfter};
use crate::rehearsal::{self, Before, Touched};
use crate::session::{self, Ledger, Session};
use crate::source::{Known, Migrations};
use crate::verify::{self, Verification};
use crate::{Direction, Event, Hook, Loss, Planned, Report, Reversal, Status, Step};

/// Applies, reverts and checks migrations.
///
/// It opens its own connections. Each migration is applied in a transaction of its own, unless its
/// `metadata.toml` turns that off; a revert or redo is one transaction. A run that changes the
/// database holds an advisory lock and waits 5 seconds for a busy table (`lock_timeout`). With
/// nothing to do it takes no lock and only reads.
pub struct Runner {
    source: Box<dyn MigrationSource<Pg> + Send>,
    settings: Settings,
    catalogue: Option<String>,
    hook: Option<Box<dyn Hook>>,
    watcher: Box<dyn FnMut(Event<'_>) + Send>,
}

pub(crate) struct Settings {
    pub(crate) conninfo: Conninfo,
    pub(crate) program: String,
    pub(crate) schema: String,
    pub(crate) lock_key: Option<i64>,
    pub(crate) secret_tables: Vec<String>,
    pub(crate) connect_wait: Duration,
    pub(crate) lock_wait: Duration,
}

impl Settings {
    pub(crate) fn lock_key(&self) -> i64 {
        self.lock_key.unwrap_or_else(|| {
            let digest = Sha256::digest(format!("diesel-pg-migrator {}", self.schema));
            let (bytes, _) = digest.split_first_chunk().expect("SHA-256 has 32 bytes");
            i64::from_be_bytes(*bytes)
        })
    }
}

/// How many migrations to revert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extent {
    /// The newest ones, this many.
    Last(usize),
    /// All that are newer than this version.
    To(String),
    /// All.
    All,
}

impl Runner {
    /// Creates a runner of `source` for the database at `url`: a `postgresql://` URL or
    /// `key=value` pairs. Connects only when it is used. The role must be allowed to create
    /// objects in the schema, and own the tables that are there.
    ///
    /// `program` is the name in error messages, such as "Run `program status`", and in
    /// `application_name`.
    ///
    /// # Errors
    /// [`Error::Url`].
    pub fn new(
        program: &str,
        url: &str,
        source: impl MigrationSource<Pg> + Send + 'static,
    ) -> Result<Self, Error> {
        Ok(Self {
            source: Box::new(source),
            settings: Settings {
                conninfo: Conninfo::parse(url).map_err(Error::Url)?,
                program: program.to_owned(),
                schema: "public".to_owned(),
                lock_key: None,
                secret_tables: Vec::new(),
                connect_wait: Duration::ZERO,
                lock_wait: Duration::from_secs(60),
            },
            catalogue: None,
            hook: None,
            watcher: Box::new(|_| {}),
        })
    }

    /// Sets the schema of the migrations and of `__diesel_schema_migrations`. Default: `public`.
    #[must_use]
    pub fn schema(mut self, schema: &str) -> Self {
        schema.clone_into(&mut self.settings.schema);
        self
    }

    /// Sets the key of the advisory lock. By default it is derived from the schema, so that all
    /// programs that migrate one schema share the lock.
    #[must_use]
    pub fn lock_key(mut self, key: i64) -> Self {
        self.settings.lock_key = Some(key);
        self
    }

    /// Sets what [`verify`](Self::verify) expects: the text of [`catalogue`](Self::catalogue),
    /// taken from a database that the migrations built.
    #[must_use]
    pub fn expect_catalogue(mut self, catalogue: &str) -> Self {
        self.catalogue = Some(catalogue.to_owned());
        self
    }

    /// Names tables whose values never appear in an error, not even a duplicate key.
    #[must_use]
    pub fn secret_tables(mut self, tables: &[&str]) -> Self {
        self.settings.secret_tables = tables.iter().map(|&table| table.to_owned()).collect();
        self
    }

    /// Sets the project's own code around a run.
    #[must_use]
    pub fn hook(mut self, hook: impl Hook + 'static) -> Self {
        self.hook = Some(Box::new(hook));
        self
    }

    /// Sets how long to retry while the server is starting or out of reach. Default: not at all.
    /// A wrong password is returned at once.
    #[must_use]
    pub fn connect_wait(mut self, wait: Duration) -> Self {
        self.settings.connect_wait = wait;
        self
    }

    /// Sets how long to wait for another runner. Default: 60 seconds.
    #[must_use]
    pub fn lock_wait(mut self, wait: Duration) -> Self {
        self.settings.lock_wait = wait;
        self
    }

    /// Calls `watcher` with each event, for a log or a terminal.
    #[must_use]
    pub fn on_event(mut self, watcher: impl FnMut(Event<'_>) + Send + 'static) -> Self {
        self.watcher = Box::new(watcher);
        self
    }

    /// Returns which migrations are applied. Only reads: works on a replica, and for a role that
    /// may only read `__diesel_schema_migrations`.
    ///
    /// # Errors
    /// [`Error::Connect`], [`Error::Database`], [`Error::Source`].
    pub fn status(&mut self) -> Result<Status, Error> {
        let migrations = self.migrations()?;
        self.status_of(&migrations)
    }

    /// Returns what [`run_to`](Self::run_to) would apply, oldest first. Only reads.
    ///
    /// # Errors
    /// As [`status`](Self::status), and [`Error::Refused`] if `run_to` would refuse.
    pub fn plan(&mut self, to: Option<&str>) -> Result<Vec<Planned>, Error> {
        let migrations = self.migrations()?;
        let status = self.status_of(&migrations)?;
        let pending = migrations.pending(&status, to)?.into_iter();
        pending.map(|index| migrations.plan(index)).collect()
    }

    /// Compares the schema with the [expected catalogue](Self::expect_catalogue), without comments,
    /// owners and privileges. Only reads.
    ///
    /// # Errors
    /// [`Error::Connect`], [`Error::Database`], and [`Error::Refused`] without a catalogue.
    pub fn verify(&mut self) -> Result<Verification, Error> {
        let Some(expected) = &self.catalogue else {
            return Err(Refusal::NoCatalogue.into());
        };
        Ok(verify::compare(expected, &self.catalogue()?))
    }

    /// Returns the catalogue of the database: one sorted line for each object.
    ///
    /// # Errors
    /// [`Error::Connect`], [`Error::Database`].
    pub fn catalogue(&self) -> Result<String, Error> {
        let mut connection = session::connect(&self.settings)?;
        verify::catalogue(&mut connection, &self.settings.schema)
            .map_err(Error::database("reading the catalogue"))
    }

    /// Applies all pending migrations.
    ///
    /// # Errors
    /// Any. After [`Error::Failed`] the migrations before the failed one stay applied, and the next
    /// run continues there.
    pub fn run(&mut self) -> Result<Report, Error> {
        self.run_to(None)
    }

    /// Applies the pending migrations up to and including version `to`, or all.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_to(&mut self, to: Option<&str>) -> Result<Report, Error> {
        self.locked(
            "run",
            |migrations, status| migrations.pending(status, to),
            Self::up,
        )
    }

    /// Reverts applied migrations, newest first, if `confirm` returns `true`.
    ///
    /// All are reverted in one transaction, or none. `confirm` receives what would be lost. It is
    /// found by two rehearsals that are rolled back: the first finds the tables that the revert
    /// touches, the second compares their contents before and after. The revert itself compares
    /// again, while it keeps writers out, and refuses to lose more than was confirmed. Touched
    /// tables are read as a whole, and their values are hashed unless they are only dropped.
    /// Without a primary key, an exchange of values between rows is not noticed.
    ///
    /// If a migration does not run in a transaction, nothing is rehearsed and each migration is
    /// reverted on its own.
    ///
    /// # Errors
    /// Any. After [`Error::Failed`], [`Failure::together`] tells whether all was rolled back.
    pub fn revert(
        &mut self,
        extent: &Extent,
        confirm: impl FnOnce(&Reversal) -> bool,
    ) -> Result<Report, Error> {
        self.locked(
            "revert",
            |migrations, status| migrations.to_revert(status, extent),
            |runner, session, known| runner.down(session, known, false, confirm),
        )
    }

    /// Reverts as [`revert`](Self::revert) does, and applies the same migrations again in the same
    /// transaction. If one of them needs the commit of an earlier one, such as a new value of an
    /// enum type, use `revert` and [`run`](Self::run).
    ///
    /// # Errors
    /// As `revert`. If a migration does not run in a transaction, the next `run` applies what is
    /// missing.
    pub fn redo(
        &mut self,
        extent: &Extent,
        confirm: impl FnOnce(&Reversal) -> bool,
    ) -> Result<Report, Error> {
        self.locked(
            "redo",
            |migrations, status| {
                let chosen = migrations.to_revert(status, extent)?;
                migrations.check(chosen.iter().map(|&index| (index, Direction::Up)))?;
                Ok(chosen)
            },
            |runner, session, known| runner.down(session, known, true, confirm),
        )
    }

    fn migrations(&self) -> Result<Migrations, Error> {
        Migrations::load(&*self.source)
    }

    fn status_of(&self, migrations: &Migrations) -> Result<Status, Error> {
        let mut connection = session::connect(&self.settings)?;
        let ledger = session::ledger(&mut connection, &self.settings.schema)?;
        Ok(migrations.status(ledger))
    }

    /// Calls `work` under the lock with the migrations that `choose` returns, if there are any.
    fn locked(
        &mut self,
        purpose: &str,
        choose: impl Fn(&Migrations, &Status) -> Result<Vec<usize>, Error>,
        work: impl FnOnce(&mut Self, &mut Session, &[&Known]) -> Result<(), Error>,
    ) -> Result<Report, Error> {
        let migrations = self.migrations()?;
        let status = self.status_of(&migrations)?;
        if choose(&migrations, &status)?.is_empty() {
            return Ok(Report {
                newer: status.newer(),
                ..Report::default()
            });
        }
        let mut session = Session::open(&self.settings, purpose)?;
        session.lock(self.settings.lock_wait, |holder| {
            (self.watcher)(Event::Waiting(holder));
        })?;
        // Another runner may have done the work in the meantime.
        let ledger = session::ledger(&mut session.connection, &self.settings.schema)?;
        let chosen = choose(&migrations, &migrations.status(ledger))?;
        if !chosen.is_empty() {
            let known: Vec<&Known> = chosen.iter().map(|&index| migrations.get(index)).collect();
            work(self, &mut session, &known)?;
        }
        session.unlock(&self.settings.program)
    }

    fn up(&mut self, session: &mut Session, known: &[&Known]) -> Result<(), Error> {
        self.before_up(session)?;
        for known in known {
            self.step(session, known, Direction::Up)?;
        }
        self.after_up(session)
    }

    fn before_up(&mut self, session: &mut Session) -> Result<(), Error> {
        if let Some(hook) = &mut self.hook {
            hook.before(&mut session.connection)
                .map_err(Error::database("the program's code before the migrations"))?;
        }
        session
            .connection
            .setup()
            .map_err(Error::database("creating __diesel_schema_migrations"))?;
        Ok(())
    }

    fn after_up(&mut self, session: &mut Session) -> Result<(), Error> {
        if let Some(hook) = &mut self.hook {
            session.done.notes = hook
                .after(&mut session.connection)
                .map_err(Error::database("the program's code after the migrations"))?;
        }
        Ok(())
    }

    fn down(
        &mut self,
        session: &mut Session,
        known: &[&Known],
        redo: bool,
        confirm: impl FnOnce(&Reversal) -> bool,
    ) -> Result<(), Error> {
        let mut all = known.iter();
        let together = all.all(|known| known.migration.metadata().run_in_transaction());
        let rehearsed = if together {
            Some(self.rehearse(session, known)?)
        } else {
            None
        };
        let reversal = Reversal {
            names: known.iter().map(|known| known.name.clone()).collect(),
            losses: rehearsed.as_ref().map(|(_, losses)| losses.clone()),
        };
        if !confirm(&reversal) {
            return Err(Refusal::NotConfirmed.into());
        }
        let again: Vec<&Known> = known.iter().rev().copied().collect();
        let Some((touched, confirmed)) = rehearsed else {
            for known in known {
                self.step(session, known, Direction::Down)?;
            }
            return if redo {
                self.up(session, &again)
            } else {
                Ok(())
            };
        };

        let last = if redo {
            (known[0], Direction::Up)
        } else {
            (known[known.len() - 1], Direction::Down)
        };
        let (steps, losses) = self.transaction(session, Some(last), |runner, session| {
            let (mut steps, losses) = runner.reverting(session, known, &touched, true)?;
            let excess = rehearsal::excess(&losses, &confirmed);
            if !excess.is_empty() {
                return Err(Refusal::LossesGrew(excess).into());
            }
            if redo {
                runner.before_up(session)?;
                steps.extend(runner.steps(session, &again, Direction::Up, true)?);
            }
            Ok((steps, losses))
        })?;
        session.done.lost = Some(losses);
        for step in steps {
            (self.watcher)(Event::Finished(&step));
            session.done.steps.push(step);
        }
        if redo { self.after_up(session) } else { Ok(()) }
    }

    /// Returns the tables that the revert touches, and what it would lose.
    fn rehearse(
        &mut self,
        session: &mut Session,
        known: &[&Known],
    ) -> Result<(Vec<Touched>, Vec<Loss>), Error> {
        let touched = self.transaction(session, None, |runner, session| {
            let before = rehearsal::tables(&mut session.connection)?;
            runner.steps(session, known, Direction::Down, false)?;
            let after = rehearsal::tables(&mut session.connection)?;
            Ok(rehearsal::touched(before, &after))
        })?;
        let (_, losses) = self.transaction(session, None, |runner, session| {
            runner.reverting(session, known, &touched, false)
        })?;
        Ok((touched, losses))
    }

    fn reverting<'k>(
        &mut self,
        session: &mut Session,
        known: &[&'k Known],
        touched: &[Touched],
        told: bool,
    ) -> Result<(Vec<Step>, Vec<Loss>), Stop<'k>> {
        let before = Before::read(&mut session.connection, touched)?;
        let steps = self.steps(session, known, Direction::Down, told)?;
        Ok((steps, before.losses(&mut session.connection)?))
    }

    /// Runs migrations that share a transaction.
    fn steps<'k>(
        &mut self,
        session: &mut Session,
        known: &[&'k Known],
        direction: Direction,
        told: bool,
    ) -> Result<Vec<Step>, Stop<'k>> {
        let steps = known.iter().map(|&known| {
            if told {
                (self.watcher)(Event::Started(&known.name, direction));
            }
            let step = alone(&mut session.connection, known, direction);
            step.map_err(|error| Stop::Step(known, direction, error))
        });
        steps.collect()
    }

    /// Runs `work` in a transaction. It is committed if `last` is its last migration, and rolled
    /// back if that is `None` or `work` fails.
    fn transaction<'k, T>(
        &mut self,
        session: &mut Session,
        last: Option<(&'k Known, Direction)>,
        work: impl FnOnce(&mut Self, &mut Session) -> Result<T, Stop<'k>>,
    ) -> Result<T, Error> {
        let before = session::ledger(&mut session.connection, &self.settings.schema)?;
        // In a stricter level, rows that arrive before the tables are locked would stay unseen.
        AnsiTransactionManager::begin_transaction_sql(
            &mut session.connection,
            "BEGIN ISOLATION LEVEL READ COMMITTED",
        )
        .map_err(Error::database("beginning the revert"))?;
        let outcome = work(self, session).and_then(|value| {
            if !session.is_locked()? {
                return Err(Refusal::ReleasesLock.into());
            }
            let connection = &mut session.connection;
            match last {
                Some((known, direction)) => AnsiTransactionManager::commit_transaction(connection)
                    .map_err(|error| Stop::Step(known, direction, error.into()))?,
                None => AnsiTransactionManager::rollback_transaction(connection)
                    .map_err(Error::database("ending the rehearsal"))?,
            }
            Ok(value)
        });
        outcome.map_err(|stop| {
            // Fails if the transaction has ended already, or with the connection.
            let _ = AnsiTransactionManager::rollback_transaction(&mut session.connection);
            match stop {
                Stop::Error(error) => error,
                Stop::Step(known, direction, error) => {
                    let is_done = |ledger: &Ledger| *ledger != before;
                    self.failure(session, known, direction, &*error, true, is_done)
                }
            }
        })
    }

    fn step(
        &mut self,
        session: &mut Session,
        known: &Known,
        direction: Direction,
    ) -> Result<(), Error> {
        (self.watcher)(Event::Started(&known.name, direction));
        let step = attempt(&mut session.connection, known, direction).map_err(|error| {
            let is_done = |ledger: &Ledger| {
                ledger.contains_key(&known.version) == (direction == Direction::Up)
            };
            self.failure(session, known, direction, &*error, false, is_done)
        })?;
        (self.watcher)(Event::Finished(&step));
        session.done.steps.push(step);
        Ok(())
    }

    fn failure(
        &self,
        session: &mut Session,
        known: &Known,
        direction: Direction,
        error: &(dyn std::error::Error + Send + Sync),
        together: bool,
        is_done: impl Fn(&Ledger) -> bool,
    ) -> Error {
        let done = session.done.steps.iter().map(|step| step.name.clone());
        Error::Failed(Box::new(Failure {
            program: self.settings.program.clone(),
            version: known.version.clone(),
            name: known.name.clone(),
            direction,
            report: session.report(error),
            in_transaction: known.migration.metadata().run_in_transaction(),
            together,
            done: done.collect(),
            state: self.state_after(session, is_done),
        }))
    }

    fn state_after(&self, session: &mut Session, is_done: impl Fn(&Ledger) -> bool) -> StateAfter {
        let known = |connection: &mut PgConnection, holder| {
            let ledger = session::ledger(connection, &self.settings.schema)?;
            Ok(StateAfter::Known {
                newest: ledger.keys().next_back().cloned(),
                recorded: is_done(&ledger),
                holder,
            })
        };
        // The server may not have noticed yet that the first connection is lost. Then its process
        // still holds the lock.
        let again = |_: Error| {
            let mut connection = session::connect(&self.settings)?;
            let holder = session::holder(&mut connection, self.settings.lock_key())?;
            known(&mut connection, holder)
        };
        known(&mut session.connection, None)
            .or_else(again)
            .unwrap_or_else(|error| StateAfter::Unknown(error.to_string()))
    }
}

/// Why a transaction with migrations ended early.
enum Stop<'k> {
    Step(&'k Known, Direction, BoxedError),
    Error(Error),
}

type BoxedError = Box<dyn std::error::Error + Send + Sync>;

impl<E: Into<Error>> From<E> for Stop<'_> {
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}

/// Runs a migration so that it leaves to the next one in its transaction what a commit would: no
/// deferred triggers, and no setting of `SET LOCAL`.
fn alone(
    connection: &mut PgConnection,
    known: &Known,
    direction: Direction,
) -> Result<Step, BoxedError> {
    connection.batch_execute(
        "SELECT set_config(
             'diesel_pg_migrator.settings',
             jsonb_object_agg(name, current_setting(name))::text,
             true
         )
         FROM pg_settings WHERE context IN ('user', 'superuser')",
    )?;
    let step = attempt(connection, known, direction)?;
    connection.batch_execute(
        "SET CONSTRAINTS ALL IMMEDIATE;
         SET CONSTRAINTS ALL DEFERRED;
         SELECT set_config(name, value, true)
         FROM jsonb_each_text(current_setting('diesel_pg_migrator.settings')::jsonb)
             AS setting (name, value)
         WHERE current_setting(name) <> value",
    )?;
    Ok(step)
}

fn attempt(
    connection: &mut PgConnection,
    known: &Known,
    direction: Direction,
) -> Result<Step, BoxedError> {
    let begin = Instant::now();
    match direction {
        Direction::Up => connection.run_migration(&known.migration)?,
        Direction::Down => connection.revert_migration(&known.migration)?,
    };
    Ok(Step {
        version: known.version.clone(),
        name: known.name.clone(),
        direction,
        duration: begin.elapsed(),
    })
}

impl fmt::Debug for Runner {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the URL: it holds the password.
        formatter.debug_struct("Runner").finish_non_exhaustive()
    }
}
