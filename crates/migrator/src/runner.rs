//! The runner.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use diesel::connection::{
    AnsiTransactionManager, Connection, SimpleConnection, TransactionManager,
};
use diesel::migration::{MigrationConnection, MigrationSource};
use diesel::pg::{Pg, PgConnection};
use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::Text;
use diesel_migrations::MigrationHarness;
use libpq_conninfo::Conninfo;
use sha2::{Digest, Sha256};

use crate::error::{Blocker, Cause, Error, Failure, Refusal, ServerReport, StateAfter};
use crate::rehearsal::{self, Before, Touched};
use crate::report::Watcher;
use crate::session::{self, Ledger, Session};
use crate::source::{Known, Migrations};
use crate::verify::{Expected, Found, Verification};
use crate::watch::{Limits, Seen};
use crate::{
    Direction, Event, Granted, Hook, Loss, MigrationStatus, Note, Plan, Preflight, Report,
    Reversal, Status, Step, adoption,
};

/// Applies, reverts and checks migrations.
///
/// It opens its own connections. Each migration is applied in a transaction of its own, unless its
/// `metadata.toml` turns that off; a revert or redo is one transaction. A run that changes the
/// database holds an advisory lock, and has a second connection that watches the first. With
/// nothing to do it takes no lock and only reads.
pub struct Runner {
    source: Box<dyn MigrationSource<Pg> + Send>,
    settings: Settings,
    catalogue: Option<String>,
    trusted: Vec<String>,
    roles: Option<Roles>,
    maintenance: Option<String>,
    hook: Option<Box<dyn Hook>>,
    watcher: Arc<Mutex<Watcher>>,
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
    /// Whether a run sets the `search_path` of its session to the schema, or only checks it.
    pub(crate) sets_path: bool,
    pub(crate) lock_key: Option<i64>,
    pub(crate) secret_tables: Vec<String>,
    pub(crate) connect_wait: Duration,
    pub(crate) lock_wait: Duration,
    pub(crate) lock_timeout: Duration,
    pub(crate) tries: u32,
    pub(crate) timeout: Option<Duration>,
    pub(crate) limits: Limits,
}

/// Pause before the second try at a migration. It doubles with each further one, up to the last.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(60);

impl Settings {
    pub(crate) fn lock_key(&self) -> i64 {
        self.lock_key.unwrap_or_else(|| {
            let digest = Sha256::digest(format!("diesel-pg-migrator {}", self.schema));
            let (bytes, _) = digest.split_first_chunk().expect("SHA-256 has 32 bytes");
            i64::from_be_bytes(*bytes)
        })
    }
}

/// The version that a schema comes nearest to.
struct Recognised {
    /// The migrations up to that version, as the ledger has them.
    migrations: Vec<MigrationStatus>,
    differences: Vec<String>,
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
                sets_path: false,
                lock_key: None,
                secret_tables: Vec::new(),
                connect_wait: Duration::ZERO,
                lock_wait: Duration::from_secs(60),
                lock_timeout: Duration::from_secs(5),
                tries: 5,
                timeout: None,
                limits: Limits::default(),
            },
            catalogue: None,
            trusted: Vec::new(),
            roles: None,
            maintenance: None,
            hook: None,
            watcher: Arc::new(Mutex::new(traced(|_| {}))),
        })
    }

    /// Sets the schema of the migrations and of `__diesel_schema_migrations`, and makes it the
    /// `search_path` of each run, whatever the role and the URL say. It must exist.
    ///
    /// Default: `public`, which must come first in the session's `search_path`.
    #[must_use]
    pub fn schema(mut self, schema: &str) -> Self {
        schema.clone_into(&mut self.settings.schema);
        self.settings.sets_path = true;
        self
    }

    /// Sets the key of the advisory lock, for every schema. By default it is derived from the
    /// schema, so that all programs that migrate one schema share the lock, and two schemas of a
    /// database can be migrated at once.
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

    /// Sets what [`maintain`](Self::maintain) does: a query without parameters, whose one row has a
    /// number for each thing that it did, such as `SELECT * FROM my_maintenance()`.
    #[must_use]
    pub fn maintenance(mut self, sql: &str) -> Self {
        self.maintenance = Some(sql.to_owned());
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

    /// Sets how long to retry while the server is starting, full or out of reach. Default: not at
    /// all. A wrong password is returned at once.
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

    /// Sets how long a statement waits for a busy table. Default: 5 seconds. A `SET LOCAL` of the
    /// migration goes before. A migration outside a transaction waits without bound, because a
    /// failed `CREATE INDEX CONCURRENTLY` leaves an INVALID index.
    #[must_use]
    pub fn lock_timeout(mut self, timeout: Duration) -> Self {
        self.settings.lock_timeout = timeout;
        self
    }

    /// Sets how often to try a migration that waits too long for a lock. It is rolled back, and
    /// the pauses grow: 1, 2, 4 … seconds. Default: 5 times.
    #[must_use]
    pub fn tries(mut self, tries: u32) -> Self {
        self.settings.tries = tries;
        self
    }

    /// Bounds a whole run, revert or redo. At the bound the migration that runs is cancelled.
    /// Default: no bound.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.settings.timeout = Some(timeout);
        self
    }

    /// Sets a flag that stops a run when it becomes `true`, such as one that a signal sets. The
    /// migration that runs is cancelled.
    #[must_use]
    pub fn stop_flag(mut self, flag: Arc<AtomicBool>) -> Self {
        self.settings.limits.stop = flag;
        self
    }

    /// Calls `watcher` with each event, for a log or a terminal. A second thread calls it too.
    #[must_use]
    pub fn on_event(mut self, watcher: impl FnMut(Event<'_>) + Send + 'static) -> Self {
        self.watcher = Arc::new(Mutex::new(traced(watcher)));
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

    /// Returns the schemas of the database that have a migration of this program in a
    /// `__diesel_schema_migrations` that the role may read, sorted by name. Only reads.
    ///
    /// # Errors
    /// As [`status`](Self::status); [`Error::Refused`] if there is none.
    pub fn schemas(&self) -> Result<Vec<String>, Error> {
        let migrations = self.migrations()?;
        let mut connection = session::connect(&self.settings)?;
        let mut own = Vec::new();
        for schema in session::schemas(&mut connection)? {
            let ledger = session::ledger(&mut connection, &schema)?;
            if migrations.status(ledger).applied().next().is_some() {
                own.push(schema);
            }
        }
        if own.is_empty() {
            return Err(Refusal::NoLedgers.into());
        }
        Ok(own)
    }

    /// Connects for work beside the migrations.
    #[cfg(feature = "cli")]
    pub(crate) fn session(&self) -> Result<PgConnection, Error> {
        let mut connection = session::connect(&self.settings)?;
        if self.settings.sets_path {
            let path = crate::error::quoted(&self.settings.schema);
            connection
                .batch_execute(&format!("SET search_path = {path}"))
                .map_err(Error::database("setting the search_path"))?;
        }
        Ok(connection)
    }

    /// Returns what [`run_to`](Self::run_to) would do. Only reads.
    ///
    /// # Errors
    /// As [`status`](Self::status), and [`Error::Refused`] if `run_to` would refuse, except for an
    /// obstacle of the project's, which the plan has.
    pub fn plan(&mut self, to: Option<&str>) -> Result<Plan, Error> {
        let migrations = self.migrations()?;
        let status = self.status_of(&migrations)?;
        let pending = migrations.pending(&status, to)?;
        let known: Vec<&Known> = pending.iter().map(|&index| migrations.get(index)).collect();
        let mut preflight = Preflight::default();
        if !known.is_empty() {
            let mut connection = session::connect(&self.settings)?;
            self.refuse_lost_ledger(&mut connection, &known)?;
            preflight = self.preflight(&mut connection, &known)?;
        }
        let planned = pending.into_iter().map(|index| migrations.plan(index));
        Ok(Plan {
            migrations: planned.collect::<Result<_, _>>()?,
            preflight,
        })
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
        let (mut connection, status) = self.connect(&migrations)?;
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
            |runner, session, known| {
                runner.refuse_lost_ledger(&mut session.connection, known)?;
                runner.up(session, known)
            },
        )
    }

    /// Writes the rows that `__diesel_schema_migrations` lacks, if the schema is that of a version
    /// by the [expected catalogue](Self::expect_catalogue). What was added by hand does not matter.
    /// Returns the names of the migrations that it recorded, oldest first.
    ///
    /// For a database whose ledger was lost, or that another tool migrated. Migrations that leave
    /// no trace in the schema are not recorded after the last one that does.
    ///
    /// # Errors
    /// Any but [`Error::Failed`].
    pub fn adopt(&mut self) -> Result<Vec<String>, Error> {
        let mut recorded = Vec::new();
        self.locked("adopt", Migrations::missing, |runner, session, _| {
            let connection = &mut session.connection;
            let found = runner.recognise(connection)?;
            let found = found.ok_or(Refusal::NoCatalogue)?;
            let newest = found.migrations.last();
            if !found.differences.is_empty() {
                let nearest = newest.map(|newest| newest.name.clone());
                let differences = found.differences;
                return Err(Refusal::NotAdopted(nearest, differences).into());
            }
            let lost = found
                .migrations
                .iter()
                .filter(|one| one.applied_at.is_none());
            let lost: Vec<&MigrationStatus> = lost.collect();
            if !lost.is_empty() {
                session::record(connection, lost.iter().map(|one| &*one.version))
                    .map_err(Error::database("writing __diesel_schema_migrations"))?;
            }
            recorded = lost.into_iter().map(|one| one.name.clone()).collect();
            Ok(())
        })?;
        Ok(recorded)
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

    /// Gives the [`roles`](Self::roles) that exist their rights, in one transaction, at any version.
    /// Leaves the rights as they are if a newer release has migrated the database.
    ///
    /// # Errors
    /// [`Error::Grant`]; [`Error::Refused`] if none of the roles exists, and as [`run`](Self::run) is;
    /// [`Error::Connect`], [`Error::Database`], [`Error::LockBusy`].
    pub fn grant(&mut self) -> Result<Granted, Error> {
        let Some(Roles { names, sql }) = &self.roles else {
            return Err(Refusal::NoRoles.into());
        };
        let migrations = self.migrations()?;
        let mut session = Session::open(&self.settings, "grant", &self.watcher)?;
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
            if granted.roles.is_empty() {
                return Err(Refusal::RolesMissing(granted.missing).into());
            }
            session
                .connection
                .transaction(|connection| connection.batch_execute(sql))
                .map_err(|error: diesel::result::Error| Error::Grant(session.report(&error)))?;
        }
        session.unlock(&self.settings.program)?;
        Ok(granted)
    }

    /// Does the project's regular [maintenance](Self::maintenance), and returns what it did. Takes no
    /// lock of its own and needs no owner: only the right to do what the query does.
    ///
    /// # Errors
    /// [`Error::Refused`] without a maintenance, while migrations are pending, and as
    /// [`run`](Self::run) is refused; [`Error::Connect`], [`Error::Database`].
    pub fn maintain(&mut self) -> Result<BTreeMap<String, i64>, Error> {
        let Some(query) = &self.maintenance else {
            return Err(Refusal::NoMaintenance.into());
        };
        let migrations = self.migrations()?;
        let (mut connection, status) = self.connect(&migrations)?;
        let pending = status.pending().count();
        if pending > 0 {
            return Err(Refusal::Pending(pending).into());
        }
        session::numbers(&mut connection, &self.settings, query)
    }

    fn migrations(&self) -> Result<Migrations, Error> {
        Migrations::load(&*self.source)
    }

    /// Connects and reads what is applied, unless that is refused.
    fn connect(&self, migrations: &Migrations) -> Result<(PgConnection, Status), Error> {
        let mut connection = session::connect(&self.settings)?;
        let ledger = session::ledger(&mut connection, &self.settings.schema)?;
        let status = migrations.status(ledger);
        match status.refusal() {
            Some(refusal) => Err(refusal.into()),
            None => Ok((connection, status)),
        }
    }

    fn status_of(&self, migrations: &Migrations) -> Result<Status, Error> {
        let mut connection = session::connect(&self.settings)?;
        let ledger = session::ledger(&mut connection, &self.settings.schema)?;
        Ok(migrations.status(ledger))
    }

    /// Finds the version that the schema comes nearest to, at least the newest applied one. Of
    /// versions that build the same it is the oldest.
    fn recognise(&self, connection: &mut PgConnection) -> Result<Option<Recognised>, Error> {
        let Some(catalogue) = &self.catalogue else {
            return Ok(None);
        };
        let schema = &self.settings.schema;
        let migrations = self.migrations()?;
        let Some(differences) =
            adoption::differences(connection, schema, catalogue, &migrations.names())?
        else {
            return Ok(None);
        };
        // After the schema: what another runner applies in between has its row here.
        let mut applied = migrations
            .status(session::ledger(connection, schema)?)
            .migrations;
        let is_applied = |one: &MigrationStatus| one.applied_at.is_some();
        let at_least = applied
            .iter()
            .rposition(is_applied)
            .map_or(0, |last| last + 1);
        let candidates = differences.into_iter().enumerate().skip(at_least);
        let nearest = candidates.min_by_key(|(_, differences)| differences.len());
        Ok(nearest.map(|(count, differences)| {
            applied.truncate(count);
            Recognised {
                migrations: applied,
                differences,
            }
        }))
    }

    /// Refuses if the schema has more migrations than the ledger, which lacks `pending`.
    fn refuse_lost_ledger(
        &self,
        connection: &mut PgConnection,
        pending: &[&Known],
    ) -> Result<(), Error> {
        let catalogue = self.catalogue.as_deref().unwrap_or_default();
        let names: Vec<&str> = pending.iter().map(|known| &*known.name).collect();
        if !adoption::has_traces(connection, &self.settings.schema, catalogue, &names)? {
            return Ok(());
        }
        let Some(found) = self.recognise(connection)? else {
            return Ok(());
        };
        match found.migrations.last() {
            Some(newest) if newest.applied_at.is_none() && found.differences.is_empty() => {
                Err(Refusal::LostLedger {
                    found: newest.name.clone(),
                    schema: self.settings.schema.clone(),
                    elsewhere: adoption::ledgers_elsewhere(connection, &self.settings.schema)?,
                }
                .into())
            }
            _ => Ok(()),
        }
    }

    fn tell(&self, event: Event<'_>) {
        self.watcher.lock().unwrap_or_else(PoisonError::into_inner)(event);
    }

    /// Calls `work` under the lock with the migrations that `choose` returns, if there are any.
    fn locked(
        &mut self,
        purpose: &str,
        choose: impl Fn(&Migrations, &Status) -> Result<Vec<usize>, Error>,
        work: impl FnOnce(&mut Self, &mut Session, &[&Known]) -> Result<(), Error>,
    ) -> Result<Report, Error> {
        let timeout = self.settings.timeout;
        self.settings.limits.deadline = timeout.map(|timeout| Instant::now() + timeout);
        let report = self.within_limits(purpose, choose, work);
        self.settings.limits.deadline = None;
        report
    }

    fn within_limits(
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
        let mut session = Session::open(&self.settings, purpose, &self.watcher)?;
        // Another runner may have done the work in the meantime.
        let ledger = session::ledger(&mut session.connection, &self.settings.schema)?;
        let chosen = choose(&migrations, &migrations.status(ledger))?;
        let known: Vec<&Known> = chosen.iter().map(|&index| migrations.get(index)).collect();
        let worked = if known.is_empty() {
            Ok(())
        } else {
            work(self, &mut session, &known)
        };
        // After an error the end of the session releases the lock.
        match worked.and_then(|()| session.unlock(&self.settings.program)) {
            Ok(()) => Ok(session.done),
            Err(error) => Err(error.with_done(session.done)),
        }
    }

    fn preflight(
        &mut self,
        connection: &mut PgConnection,
        known: &[&Known],
    ) -> Result<Preflight, Error> {
        let Some(hook) = &mut self.hook else {
            return Ok(Preflight::default());
        };
        let pending: Vec<&str> = known.iter().map(|known| &*known.version).collect();
        let schema = &self.settings.schema;
        let lock_timeout = self.settings.lock_timeout.as_millis().to_string();
        connection
            .build_transaction()
            .read_only()
            .run(|connection| {
                sql_query(
                    "SELECT set_config('search_path', quote_ident($1), true),
                            set_config('lock_timeout', $2, true)",
                )
                .bind::<Text, _>(schema)
                .bind::<Text, _>(lock_timeout)
                .execute(connection)?;
                hook.preflight(connection, &pending)
            })
            .map_err(Error::database("the program's look at the database"))
    }

    fn up(&mut self, session: &mut Session, known: &[&Known]) -> Result<(), Error> {
        let obstacles = self.preflight(&mut session.connection, known)?.obstacles;
        // In the second half of a redo it is too late.
        if !obstacles.is_empty() && session.done.steps.is_empty() {
            // Another tool, which takes no lock, may just have created what is in the way.
            let ledger = session::ledger(&mut session.connection, &self.settings.schema)?;
            if !known
                .iter()
                .any(|known| ledger.contains_key(&known.version))
            {
                return Err(Refusal::Obstacles(obstacles).into());
            }
        }
        session
            .connection
            .setup()
            .map_err(Error::database("creating __diesel_schema_migrations"))?;
        let applied = known
            .iter()
            .try_for_each(|known| self.step(session, known, Direction::Up));
        if let Some(hook) = &mut self.hook {
            match hook.after(&mut session.connection) {
                Ok(notes) => session.done.notes = notes,
                Err(error) => {
                    let doing = "the program's code after the migrations";
                    return applied.and_then(|()| Err(Error::database(doing)(error)));
                }
            }
        }
        applied?;
        self.note_roles(session)
    }

    fn note_roles(&self, session: &mut Session) -> Result<(), Error> {
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
                steps.extend(runner.steps(session, &again, Direction::Up, true)?);
            }
            Ok((steps, losses))
        })?;
        session.done.lost = Some(losses);
        for step in steps {
            self.tell(Event::Finished(&step));
            session.done.steps.push(step);
        }
        if redo {
            self.note_roles(session)
        } else {
            Ok(())
        }
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
        let before = reading(session, known, |connection| {
            Before::read(connection, touched)
        })?;
        let steps = self.steps(session, known, Direction::Down, told)?;
        let losses = reading(session, known, |connection| before.losses(connection))?;
        Ok((steps, losses))
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
            if let Some(cause) = self.settings.limits.reached() {
                return Err(Stop::Limit(known, direction, cause));
            }
            if told {
                self.tell(Event::Started(&known.name, direction));
            }
            let (step, seen) = session.watched(&known.name, |connection| {
                alone(connection, known, direction)
            });
            step.map_err(|error| Stop::Step(known, direction, error, seen))
        });
        steps.collect()
    }

    /// Runs `work` in a transaction, again after a lock timeout. It is committed if `last` is its
    /// last migration, and rolled back if that is `None` or `work` fails.
    fn transaction<'k, T>(
        &mut self,
        session: &mut Session,
        last: Option<(&'k Known, Direction)>,
        mut work: impl FnMut(&mut Self, &mut Session) -> Result<T, Stop<'k>>,
    ) -> Result<T, Error> {
        let mut tried = 0;
        loop {
            session::set_lock_timeout(&mut session.connection, self.settings.lock_timeout)?;
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
                    Some((known, direction)) => {
                        AnsiTransactionManager::commit_transaction(connection).map_err(
                            |error| Stop::Step(known, direction, error.into(), Seen::default()),
                        )?;
                    }
                    None => AnsiTransactionManager::rollback_transaction(connection)
                        .map_err(Error::database("ending the rehearsal"))?,
                }
                Ok(value)
            });
            let stop = match outcome {
                Ok(value) => return Ok(value),
                Err(stop) => stop,
            };
            // Fails if the transaction has ended already, or with the connection.
            let _ = AnsiTransactionManager::rollback_transaction(&mut session.connection);
            let is_done = |ledger: &Ledger| *ledger != before;
            let failure = match stop {
                Stop::Error(error) => return Err(error),
                Stop::Limit(known, direction, cause) => {
                    self.unfinished(session, known, direction, cause, is_done)
                }
                Stop::Step(known, direction, error, seen) => {
                    tried += 1;
                    match self.failed(session, &known.name, &*error, seen, tried) {
                        None => continue,
                        Some(failed) => {
                            let cause = failed.cause;
                            failed.of(self.unfinished(session, known, direction, cause, is_done))
                        }
                    }
                }
            };
            return Err(Error::Failed(Box::new(Failure {
                together: true,
                ..failure
            })));
        }
    }

    fn step(
        &mut self,
        session: &mut Session,
        known: &Known,
        direction: Direction,
    ) -> Result<(), Error> {
        let Known { version, name, .. } = known;
        let is_done =
            |ledger: &Ledger| ledger.contains_key(version) == (direction == Direction::Up);
        let lock_timeout = if known.migration.metadata().run_in_transaction() {
            self.settings.lock_timeout
        } else {
            Duration::ZERO
        };
        let mut tried = 0;
        loop {
            if let Some(cause) = self.settings.limits.reached() {
                let failure = self.unfinished(session, known, direction, cause, is_done);
                return Err(Error::Failed(Box::new(failure)));
            }
            if tried == 0 {
                self.tell(Event::Started(name, direction));
            }
            session::set_lock_timeout(&mut session.connection, lock_timeout)?;
            let (outcome, seen) =
                session.watched(name, |connection| attempt(connection, known, direction));
            let error = match outcome {
                Ok(step) => {
                    self.tell(Event::Finished(&step));
                    session.done.steps.push(step);
                    return Ok(());
                }
                Err(error) => error,
            };
            tried += 1;
            if let Some(failed) = self.failed(session, name, &*error, seen, tried) {
                let failure = self.unfinished(session, known, direction, failed.cause, is_done);
                return Err(Error::Failed(Box::new(failed.of(failure))));
            }
        }
    }

    /// Returns why a try failed, or pauses for the next one and returns `None`.
    fn failed(
        &mut self,
        session: &mut Session,
        name: &str,
        error: &(dyn std::error::Error + Send + Sync + 'static),
        seen: Seen,
        tried: u32,
    ) -> Option<Failed> {
        let report = session.report(error);
        let cause = match seen.cancelled {
            Some(cause) => cause,
            None if session.is_lock_timeout(&report) => Cause::LockTimeout,
            None => Cause::Error,
        };
        if cause == Cause::LockTimeout && tried < self.settings.tries {
            let pause = LAST_PAUSE.min(FIRST_PAUSE * 2_u32.saturating_pow(tried - 1));
            self.tell(Event::Retrying(name, pause));
            self.settings.limits.sleep(pause);
            return None;
        }
        Some(Failed {
            cause,
            report,
            blockers: seen.blockers,
        })
    }

    /// Describes a run that ends before `known`.
    fn unfinished(
        &self,
        session: &mut Session,
        known: &Known,
        direction: Direction,
        cause: Cause,
        is_done: impl Fn(&Ledger) -> bool,
    ) -> Failure {
        let in_transaction = known.migration.metadata().run_in_transaction();
        Failure {
            program: self.settings.program.clone(),
            version: known.version.clone(),
            name: known.name.clone(),
            direction,
            cause,
            begun: false,
            report: ServerReport::default(),
            blockers: Vec::new(),
            in_transaction,
            together: false,
            done: Report::default(),
            state: self.state_after(session, in_transaction, is_done),
        }
    }

    fn state_after(
        &self,
        session: &mut Session,
        in_transaction: bool,
        is_done: impl Fn(&Ledger) -> bool,
    ) -> StateAfter {
        let schema = &self.settings.schema;
        let known = |connection: &mut PgConnection, holder| {
            let ledger = session::ledger(connection, schema)?;
            Ok(StateAfter::Known {
                newest: ledger.keys().next_back().cloned(),
                recorded: is_done(&ledger),
                invalid_indexes: if in_transaction {
                    Vec::new()
                } else {
                    session::invalid_indexes(connection, schema)?
                },
                holder,
            })
        };
        if let Ok(state) = known(&mut session.connection, None) {
            return state;
        }
        // The server may not have noticed yet that the first connection is lost. Then its process
        // still holds the lock.
        let mut again = || {
            session.connection = session::connect(&self.settings)?;
            let holder = session::holder(&mut session.connection, self.settings.lock_key())?;
            known(&mut session.connection, holder)
        };
        again().unwrap_or_else(|error: Error| StateAfter::Unknown(error.to_string()))
    }
}

/// With the feature `tracing`, each event goes there too.
fn traced(mut watcher: impl FnMut(Event<'_>) + Send + 'static) -> Watcher {
    Box::new(move |event| {
        #[cfg(feature = "tracing")]
        event.trace();
        watcher(event);
    })
}

/// Why a try of a migration failed.
struct Failed {
    cause: Cause,
    report: ServerReport,
    blockers: Vec<Blocker>,
}

impl Failed {
    fn of(self, unfinished: Failure) -> Failure {
        Failure {
            begun: true,
            report: self.report,
            blockers: if self.cause == Cause::LockTimeout {
                self.blockers
            } else {
                Vec::new()
            },
            ..unfinished
        }
    }
}

/// Why a transaction with migrations ended early.
enum Stop<'k> {
    Step(&'k Known, Direction, BoxedError, Seen),
    Limit(&'k Known, Direction, Cause),
    Error(Error),
}

type BoxedError = Box<dyn std::error::Error + Send + Sync>;

impl<E: Into<Error>> From<E> for Stop<'_> {
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}

/// Reads tables around a revert. May take long, so it can be stopped.
fn reading<'k, T>(
    session: &mut Session,
    known: &[&'k Known],
    work: impl FnOnce(&mut PgConnection) -> Result<T, Error>,
) -> Result<T, Stop<'k>> {
    let (outcome, seen) = session.watched("the comparison of the tables", work);
    outcome.map_err(|error| match error {
        // A lock timeout is worth another try.
        Error::Database { .. } => Stop::Step(known[0], Direction::Down, Box::new(error), seen),
        error => Stop::Error(error),
    })
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
