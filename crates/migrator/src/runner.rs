//! The runner.

use std::fmt;
use std::time::{Duration, Instant};

use diesel::connection::{Connection, SimpleConnection};
use diesel::migration::{Migration, MigrationConnection, MigrationSource};
use diesel::pg::{Pg, PgConnection};
use diesel_migrations::MigrationHarness;
use libpq_conninfo::Conninfo;
use sha2::{Digest, Sha256};

use crate::error::{Error, Failure, Refusal, StateAfter};
use crate::session::{self, Session};
use crate::source::{Known, Migrations};
use crate::verify::{Expected, Found, Verification};
use crate::{
    Direction, Event, Granted, Hook, Note, Planned, Report, Reversal, Status, Step, rehearsal,
};

/// Applies, reverts and checks migrations.
///
/// It opens its own connections. Each migration runs in a transaction of its own, unless its
/// `metadata.toml` turns that off. A run that changes the database holds an advisory lock and waits
/// 5 seconds for a busy table (`lock_timeout`). With nothing to do it takes no lock and only reads.
pub struct Runner {
    source: Box<dyn MigrationSource<Pg> + Send>,
    settings: Settings,
    catalogue: Option<String>,
    trusted: Vec<String>,
    roles: Option<Roles>,
    hook: Option<Box<dyn Hook>>,
    watcher: Box<dyn FnMut(Event<'_>) + Send>,
}

/// Roles of the project, and the SQL that grants their rights.
struct Roles {
    names: Vec<String>,
    sql: String,
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
            trusted: Vec::new(),
            roles: None,
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

    /// Sets what [`verify`](Self::verify) expects: for each migration a line `# <name>`, and under
    /// it the lines of the [catalogue](Self::catalogue) that it adds (`+ …`) and takes away (`- …`).
    /// Under `# rights` stand the rights that roles may have; another right is drift.
    #[must_use]
    pub fn expect_catalogue(mut self, catalogue: &str) -> Self {
        self.catalogue = Some(catalogue.to_owned());
        self
    }

    /// Names a role whose rights and functions [`verify`](Self::verify) accepts, such as one that
    /// makes backups.
    #[must_use]
    pub fn trust(mut self, role: &str) -> Self {
        self.trusted.push(role.to_owned());
        self
    }

    /// Sets what [`grant`](Self::grant) does: `sql` gives the roles `names`, where they exist, their
    /// rights on what exists. It must bring the same result each time it runs.
    #[must_use]
    pub fn roles(mut self, names: &[&str], sql: &str) -> Self {
        let names = names.iter().map(|&name| name.to_owned()).collect();
        let sql = sql.to_owned();
        self.roles = Some(Roles { names, sql });
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

    /// Compares the schema with what the applied migrations build, by the
    /// [expected catalogue](Self::expect_catalogue). Only what the migrations made is compared, and
    /// what hangs on it; comments, owners and other objects in the schema are left out. The rights
    /// on it are compared with the intended ones. Only reads: works on a replica, and for a role
    /// that may only read `__diesel_schema_migrations`.
    ///
    /// # Errors
    /// [`Error::Connect`], [`Error::Database`], and [`Error::Refused`] without a catalogue of what
    /// is applied: this program does not know a migration, or one is missing among the applied.
    pub fn verify(&mut self) -> Result<Verification, Error> {
        let Some(catalogue) = &self.catalogue else {
            return Err(Refusal::NoCatalogue.into());
        };
        let migrations = self.migrations()?;
        let mut connection = session::connect(&self.settings)?;
        let ledger = session::ledger(&mut connection, &self.settings.schema)?;
        let status = migrations.status(ledger);
        if let Some(refusal) = status.refusal() {
            return Err(refusal.into());
        }
        if !status.unknown.is_empty() {
            return Err(Refusal::Unknown(status.newer()).into());
        }
        let applied = status.applied().map(|one| &*one.name).collect::<Vec<_>>();
        let expected = Expected::new(catalogue, &applied).ok_or(Refusal::NoCatalogue)?;
        let schema = &self.settings.schema;
        let found = Found::read(&mut connection, schema, Some(&expected), &self.trusted)
            .map_err(Error::database("reading the catalogue"))?;
        Ok(Verification {
            version: status.applied().last().map(|one| one.version.clone()),
            pending: status.pending().map(str::to_owned).collect(),
            ..expected.compare(&found)
        })
    }

    /// Returns the catalogue of the database: a sorted line for each object in the schema, and one
    /// for the rights of each role on an object.
    ///
    /// # Errors
    /// [`Error::Connect`], [`Error::Database`].
    pub fn catalogue(&self) -> Result<String, Error> {
        let mut connection = session::connect(&self.settings)?;
        let found = Found::read(&mut connection, &self.settings.schema, None, &[])
            .map_err(Error::database("reading the catalogue"))?;
        Ok(found.to_string())
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
    /// The revert is first rehearsed in a transaction that is rolled back, to count the rows it
    /// would delete; `confirm` receives that count. The rehearsal locks the same tables.
    ///
    /// # Errors
    /// Any. After [`Error::Failed`] the migrations before the failed one stay reverted.
    pub fn revert(
        &mut self,
        extent: &Extent,
        confirm: impl FnOnce(&Reversal) -> bool,
    ) -> Result<Report, Error> {
        self.locked(
            "revert",
            |migrations, status| migrations.to_revert(status, extent),
            |runner, session, known| runner.down(session, known, confirm),
        )
    }

    /// Reverts as [`revert`](Self::revert) does, then applies the same migrations again.
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
            |migrations, status| migrations.to_revert(status, extent),
            |runner, session, known| {
                runner.down(session, known, confirm)?;
                let again: Vec<&Known> = known.iter().rev().copied().collect();
                runner.up(session, &again)
            },
        )
    }

    /// Gives the [`roles`](Self::roles) that exist their rights, in one transaction, at any version.
    /// Leaves the rights as they are if a newer release has migrated the database.
    ///
    /// # Errors
    /// [`Error::Grant`]; [`Error::Refused`] without roles and as [`run`](Self::run) is refused;
    /// [`Error::Connect`], [`Error::Database`], [`Error::LockBusy`].
    pub fn grant(&mut self) -> Result<Granted, Error> {
        let Some(Roles { names, sql }) = &self.roles else {
            return Err(Refusal::NoRoles.into());
        };
        let migrations = self.migrations()?;
        let mut session = Session::open(&self.settings, "grant")?;
        session.lock(self.settings.lock_wait, |holder| {
            (self.watcher)(Event::Waiting(holder));
        })?;
        let ledger = session::ledger(&mut session.connection, &self.settings.schema)?;
        let status = migrations.status(ledger);
        if let Some(refusal) = status.refusal() {
            return Err(refusal.into());
        }
        let mut granted = Granted {
            newer: status.newer(),
            ..Granted::default()
        };
        if granted.newer.is_empty() {
            let existing = session::existing_roles(&mut session.connection, names)?;
            (granted.roles, granted.missing) = names
                .iter()
                .cloned()
                .partition(|name| existing.contains(name));
            session
                .connection
                .transaction(|connection| connection.batch_execute(sql))
                .map_err(|error: diesel::result::Error| Error::Grant(session.report(&error)))?;
        }
        session.unlock(&self.settings.program)?;
        Ok(granted)
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
        if let Some(hook) = &mut self.hook {
            hook.before(&mut session.connection)
                .map_err(Error::database("the program's code before the migrations"))?;
        }
        session
            .connection
            .setup()
            .map_err(Error::database("creating __diesel_schema_migrations"))?;
        for known in known {
            self.step(session, known, Direction::Up)?;
        }
        if let Some(hook) = &mut self.hook {
            session.done.notes = hook
                .after(&mut session.connection)
                .map_err(Error::database("the program's code after the migrations"))?;
        }
        if let Some(roles) = &self.roles {
            let items = session::existing_roles(&mut session.connection, &roles.names)?;
            if !items.is_empty() {
                let program = &self.settings.program;
                let title = format!("For rights on what is new, run `{program} grant`");
                session.done.notes.push(Note { title, items });
            }
        }
        Ok(())
    }

    fn down(
        &mut self,
        session: &mut Session,
        known: &[&Known],
        confirm: impl FnOnce(&Reversal) -> bool,
    ) -> Result<(), Error> {
        let migrations: Vec<&dyn Migration<Pg>> =
            known.iter().map(|known| &*known.migration).collect();
        let losses = rehearsal::losses(&mut session.connection, &migrations).map_err(|error| {
            Error::Database {
                doing: "the rehearsal of the revert",
                report: session.report(&*error),
            }
        })?;
        let names = known.iter().map(|known| known.name.clone()).collect();
        let reversal = Reversal { names, losses };
        if !confirm(&reversal) {
            return Err(Refusal::NotConfirmed.into());
        }
        session.done.lost = reversal.losses;
        for known in known {
            self.step(session, known, Direction::Down)?;
        }
        Ok(())
    }

    fn step(
        &mut self,
        session: &mut Session,
        known: &Known,
        direction: Direction,
    ) -> Result<(), Error> {
        let Known {
            version,
            name,
            migration,
        } = known;
        (self.watcher)(Event::Started(name, direction));
        let begin = Instant::now();
        let outcome = match direction {
            Direction::Up => session.connection.run_migration(migration),
            Direction::Down => session.connection.revert_migration(migration),
        };
        let duration = begin.elapsed();
        if let Err(error) = outcome {
            let done = session.done.steps.iter().map(|step| step.name.clone());
            return Err(Error::Failed(Box::new(Failure {
                program: self.settings.program.clone(),
                version: version.clone(),
                name: name.clone(),
                direction,
                report: session.report(&*error),
                in_transaction: migration.metadata().run_in_transaction(),
                done: done.collect(),
                state: self.state_after(session, version),
            })));
        }
        let step = Step {
            version: version.clone(),
            name: name.clone(),
            direction,
            duration,
        };
        (self.watcher)(Event::Finished(&step));
        session.done.steps.push(step);
        Ok(())
    }

    fn state_after(&self, session: &mut Session, version: &str) -> StateAfter {
        let known = |connection: &mut PgConnection, holder| {
            let ledger = session::ledger(connection, &self.settings.schema)?;
            Ok(StateAfter::Known {
                newest: ledger.keys().next_back().cloned(),
                recorded: ledger.contains_key(version),
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

impl fmt::Debug for Runner {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the URL: it holds the password.
        formatter.debug_struct("Runner").finish_non_exhaustive()
    }
}
