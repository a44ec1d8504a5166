//! Connections, and the session that holds the lock.

use std::collections::BTreeMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::process;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use diesel::connection::{Connection, InstrumentationEvent, SimpleConnection};
use diesel::dsl::{select, sql};
use diesel::migration::MigrationConnection;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::result::DatabaseErrorKind;
use diesel::result::Error::DatabaseError;
use diesel::sql_types::{Array, BigInt, Bool, Integer, Nullable, Text, Timestamptz};
use diesel::{ConnectionError, sql_query};
use libpq_conninfo::{Attempt, Conninfo};

use crate::error::{Error, Holder, Refusal, ServerReport, quoted};
use crate::report::{Event, Report, Watcher};
use crate::runner::Settings;
use crate::watch::{Seen, Watch};

/// Interval between two tries at a busy lock or an unreachable server.
const POLL: Duration = Duration::from_millis(100);
/// Bounds on a server that never answers, unless the user sets others: 10 seconds to connect, 20
/// for a connection that broke without a word.
const BOUNDS: [(&str, &str); 5] = [
    ("connect_timeout", "10"),
    ("keepalives_idle", "5"),
    ("keepalives_interval", "5"),
    ("keepalives_count", "3"),
    ("tcp_user_timeout", "20000"),
];
/// The same on the server, in milliseconds and seconds. A Unix-domain socket ignores what is TCP's.
///
/// client_connection_check_interval: if this process is killed, its statement and its lock end at
/// once. idle_session_timeout: the runner may wait for a person's answer. The timeouts of a role
/// are for its usual work. With another value of the last three, a migration builds something else,
/// in silence.
const SETTINGS: &str = "
    ('client_connection_check_interval', '100'), ('idle_session_timeout', '0'),
    ('idle_in_transaction_session_timeout', '60000'),
    ('statement_timeout', '0'), ('transaction_timeout', '0'),
    ('tcp_keepalives_idle', '5'), ('tcp_keepalives_interval', '5'), ('tcp_keepalives_count', '3'),
    ('tcp_user_timeout', '20000'),
    ('standard_conforming_strings', 'on'), ('transform_null_equals', 'off'),
    ('check_function_bodies', 'on'), ('quote_all_identifiers', 'off')";
/// Oldest server that has client_connection_check_interval.
const OLDEST_SERVER: i32 = 140_000;

/// Applied versions and when they were applied.
pub(crate) type Ledger = BTreeMap<String, DateTime<Utc>>;

pub(crate) fn connect(settings: &Settings) -> Result<PgConnection, Error> {
    let wait = settings.limits.bound(settings.connect_wait);
    establish(settings.conninfo.clone(), wait)
}

fn establish(mut conninfo: Conninfo, wait: Duration) -> Result<PgConnection, Error> {
    for (keyword, value) in BOUNDS {
        if conninfo.effective(keyword).is_none() {
            conninfo = conninfo.with(keyword, value);
        }
    }
    let url = conninfo.secret_url();
    let begin = Instant::now();
    let mut accepted = false;
    loop {
        let text = match PgConnection::establish(&url) {
            Ok(connection) => return Ok(connection),
            Err(ConnectionError::BadConnection(text)) => text,
            Err(error) => error.to_string(),
        };
        // PgBouncer's words for a server setting in `options`.
        if text.contains("unsupported startup parameter") {
            return Err(Refusal::Pooler.into());
        }
        let error = Error::Connect(conninfo.conceal(&text));
        if accepted || begin.elapsed() >= wait {
            return Err(error);
        }
        match conninfo.attempt() {
            // It has come up since, and gets a second try.
            Attempt::Accepted => accepted = true,
            Attempt::Unavailable => thread::sleep(POLL),
            Attempt::Refused => return Err(error),
        }
    }
}

/// Reads the applied versions of `schema`, whatever the search_path is. Refuses if there is no such
/// schema.
pub(crate) fn ledger(connection: &mut PgConnection, schema: &str) -> Result<Ledger, Error> {
    let table = format!("{}.__diesel_schema_migrations", quoted(schema));
    let read = |connection: &mut PgConnection| {
        // The first compares the whole name; the second cuts a longer one than the server allows.
        let exists = sql::<(Bool, Bool)>("EXISTS (SELECT FROM pg_namespace WHERE nspname = ")
            .bind::<Text, _>(schema)
            .sql("), to_regclass(")
            .bind::<Text, _>(&table)
            .sql(") IS NOT NULL");
        match select(exists).get_result(connection)? {
            (false, _) => return Ok(None),
            (true, false) => return Ok(Some(Vec::new())),
            (true, true) => {}
        }
        // run_on has no time zone. Diesel sets the zone of each of its sessions to UTC.
        let rows = sql::<(Text, Timestamptz)>(&format!(
            "SELECT version::text, run_on AT TIME ZONE 'UTC' FROM {table}"
        ));
        rows.load(connection).map(Some)
    };
    let rows = read(connection).map_err(Error::database("reading __diesel_schema_migrations"))?;
    let rows = rows.ok_or_else(|| Refusal::NoSchema(schema.to_owned()))?;
    Ok(rows.into_iter().collect())
}

/// Returns the columns of a query's row, which are numbers, by their names.
pub(crate) fn numbers(
    connection: &mut PgConnection,
    settings: &Settings,
    query: &str,
) -> Result<BTreeMap<String, i64>, Error> {
    let path = format!("SET search_path = {}", quoted(&settings.schema));
    let numbers = sql::<(Text, BigInt)>(&format!(
        "SELECT key, value::bigint FROM ({query}) AS row, jsonb_each_text(to_jsonb(row))"
    ));
    let read = |connection: &mut PgConnection| {
        connection.batch_execute(&path)?;
        numbers.load(connection)
    };
    let rows: Vec<(String, i64)> = read(connection).map_err(Error::database("maintaining"))?;
    Ok(rows.into_iter().collect())
}

/// Returns the schemas whose ledger this role may read.
pub(crate) fn schemas(connection: &mut PgConnection) -> Result<Vec<String>, Error> {
    sql::<Text>(
        "SELECT nspname::text
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relname = '__diesel_schema_migrations' AND c.relkind IN ('r', 'p')
             AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')
         ORDER BY nspname",
    )
    .load(connection)
    .map_err(Error::database("looking for __diesel_schema_migrations"))
}

/// Adds versions to the ledger, and creates it if there is none.
pub(crate) fn record<'a>(
    connection: &mut PgConnection,
    versions: impl Iterator<Item = &'a str>,
) -> QueryResult<()> {
    connection.transaction(|connection| {
        connection.setup()?;
        for version in versions {
            sql_query("INSERT INTO __diesel_schema_migrations (version) VALUES ($1)")
                .bind::<Text, _>(version)
                .execute(connection)?;
        }
        Ok(())
    })
}

/// A connection that has a server process of its own, the settings of a runner, the lock and a
/// watch.
pub(crate) struct Session {
    pub(crate) connection: PgConnection,
    pub(crate) done: Report,
    lock_key: i64,
    pid: i32,
    watch: Watch,
    caught: Arc<Mutex<Option<ServerReport>>>,
}

#[derive(QueryableByName)]
struct Surroundings {
    #[diesel(sql_type = Bool)]
    is_own_process: bool,
    #[diesel(sql_type = Integer)]
    pid: i32,
    #[diesel(sql_type = Integer)]
    version: i32,
    #[diesel(sql_type = Text)]
    version_name: String,
    #[diesel(sql_type = Bool)]
    is_read_only: bool,
    #[diesel(sql_type = Nullable<Text>)]
    schema: Option<String>,
    #[diesel(sql_type = Bool)]
    may_create: bool,
    #[diesel(sql_type = Text)]
    role: String,
}

impl Session {
    /// Connects and takes the lock. Refuses a pooler, an old server, a read-only session, another
    /// search_path and a role that may not create objects.
    pub(crate) fn open(
        settings: &Settings,
        purpose: &str,
        watcher: &Arc<Mutex<Watcher>>,
    ) -> Result<Self, Error> {
        // A pooler rejects or drops a startup option. Either shows that there is a pooler, before
        // a lock is taken in a server process that other clients get too.
        let conninfo = &settings.conninfo;
        let token = RandomState::new().build_hasher().finish().to_string();
        let options = conninfo.effective("options").unwrap_or_default();
        let mut options = format!("{options} -c diesel_pg_migrator.session={token}");
        if settings.sets_path {
            options += &format!(" -c search_path={}", option(&quoted(&settings.schema)));
        }
        let conninfo = conninfo.clone().with("options", &options);
        let wait = settings.limits.bound(settings.connect_wait);
        let mut connection = establish(conninfo, wait)?;
        let pid = check(&mut connection, settings, &token)?;
        let name = format!("{} {purpose}, process {}", settings.program, process::id());
        let tell = |event: Event<'_>| {
            watcher.lock().unwrap_or_else(PoisonError::into_inner)(event);
        };
        let lifted = set_up(&mut connection, &name)?;
        if !lifted.is_empty() {
            tell(Event::Lifted(&lifted));
        }
        let lock_key = settings.lock_key();
        let busy = |holder: &Holder| tell(Event::Waiting(holder));
        lock(&mut connection, lock_key, settings, busy)?;
        set_lock_timeout(&mut connection, settings.lock_timeout)?;

        let mut second = connect(settings)?;
        set_up(&mut second, &format!("watch of {name}"))?;
        let watch = Watch::start(second, pid, settings.limits.clone(), Arc::clone(watcher));
        let caught = Arc::new(Mutex::new(None));
        let slot = Arc::clone(&caught);
        let secret_tables = settings.secret_tables.clone();
        connection.set_instrumentation(move |event: InstrumentationEvent<'_>| {
            if let InstrumentationEvent::FinishQuery {
                query,
                error: Some(error),
                ..
            } = event
            {
                slot.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    // The errors after the first are its consequences.
                    .get_or_insert_with(|| {
                        ServerReport::new(error, &query.to_string(), &secret_tables)
                    });
            }
        });
        Ok(Self {
            connection,
            done: Report::default(),
            lock_key,
            pid,
            watch,
            caught,
        })
    }

    /// Calls `work` under the watch. `name` is the migration's.
    pub(crate) fn watched<T>(
        &mut self,
        name: &str,
        work: impl FnOnce(&mut PgConnection) -> T,
    ) -> (T, Seen) {
        self.watch.begin(name);
        let outcome = work(&mut self.connection);
        let seen = self.watch.end();
        if seen.cancelled.is_some() {
            // Takes a cancellation that came after the last statement.
            let _ = sql_query("SELECT 1").execute(&mut self.connection);
        }
        (outcome, seen)
    }

    /// Returns the server's first error, for a migration's own error has only the message.
    pub(crate) fn report(&self, error: &dyn std::error::Error) -> ServerReport {
        let mut caught = self.caught.lock().unwrap_or_else(PoisonError::into_inner);
        caught
            .take()
            .unwrap_or_else(|| ServerReport::from_text(error))
    }

    /// Returns whether `report` is about a lock timeout. Diesel doesn't tell the SQLSTATE, and the
    /// message depends on the server's language. So this session runs into a lock timeout on a lock
    /// that the watch holds, and the messages are compared.
    pub(crate) fn is_lock_timeout(&mut self, report: &ServerReport) -> bool {
        let pid = self.pid;
        let locks = |function: &str| select(sql::<Bool>(&format!("{function}({pid}, {pid})")));
        let holds = self.watch.with(|watch| {
            locks("pg_try_advisory_lock")
                .get_result(watch)
                .unwrap_or(false)
        });
        if !holds {
            return false;
        }
        let probe = format!("SET LOCAL lock_timeout = 1; SELECT pg_advisory_lock({pid}, {pid})");
        let error = self.connection.batch_execute(&probe).err();
        // If the watch is lost, so is its lock.
        let _ = self
            .watch
            .with(|watch| locks("pg_advisory_unlock").execute(watch));
        error.is_some_and(|error| {
            // Forgets it.
            let message = self.report(&error).message;
            let is_of_server = matches!(error, DatabaseError(DatabaseErrorKind::Unknown, _));
            is_of_server && message == report.message
        })
    }

    /// Returns whether this session still holds the lock.
    pub(crate) fn is_locked(&mut self) -> Result<bool, Error> {
        let holder = holder(&mut self.connection, self.lock_key)?;
        Ok(holder.is_some_and(|holder| holder.pid == self.pid))
    }

    /// Releases the lock.
    pub(crate) fn unlock(&mut self, program: &str) -> Result<(), Error> {
        let unlock = format!("pg_advisory_unlock({})", self.lock_key);
        let unlocked: bool = select(sql::<Bool>(&unlock))
            .get_result(&mut self.connection)
            .map_err(Error::database("releasing the lock"))?;
        if unlocked {
            Ok(())
        } else {
            Err(Error::LockLost {
                program: program.to_owned(),
                done: Box::default(),
            })
        }
    }
}

/// Escapes a value in a connection's `options`.
fn option(value: &str) -> String {
    let escaped = value.chars().flat_map(|letter| {
        let escape = letter == '\\' || letter.is_ascii_whitespace() || letter == '\x0b';
        escape.then_some('\\').into_iter().chain([letter])
    });
    escaped.collect()
}

/// Checks that a run can work in this session, and returns the server's process id.
fn check(connection: &mut PgConnection, settings: &Settings, token: &str) -> Result<i32, Error> {
    let schema = settings.schema.clone();
    let found: Surroundings = sql_query(
        "SELECT coalesce(current_setting('diesel_pg_migrator.session', true), '') = $1 AS is_own_process,
                pg_backend_pid() AS pid,
                current_setting('server_version_num')::integer AS version,
                current_setting('server_version') AS version_name,
                current_setting('transaction_read_only')::boolean AS is_read_only,
                current_schema()::text AS schema,
                coalesce(has_schema_privilege(to_regnamespace(quote_ident($2)), 'CREATE'), false) AS may_create,
                current_user::text AS role",
    )
    .bind::<Text, _>(token)
    .bind::<Text, _>(&schema)
    .get_result(connection)
    .map_err(Error::database("checking the session"))?;
    if !found.is_own_process {
        return Err(Refusal::Pooler.into());
    }
    if found.version < OLDEST_SERVER {
        return Err(Refusal::OldServer(found.version_name).into());
    }
    if found.is_read_only {
        return Err(Refusal::ReadOnly.into());
    }
    if found.schema.as_ref() != Some(&schema) {
        let found = found.schema;
        return Err(Refusal::SearchPath { found, schema }.into());
    }
    if !found.may_create {
        let role = found.role;
        return Err(Refusal::NoRights { role, schema }.into());
    }
    Ok(found.pid)
}

/// Makes the settings of a session the runner's, and returns those of a role or database that were
/// meant to bound its statements.
fn set_up(connection: &mut PgConnection, name: &str) -> Result<Vec<String>, Error> {
    let lifted = sql::<Text>(
        "SELECT name || ' = ' || current_setting(name) FROM pg_settings
         WHERE name IN ('statement_timeout', 'transaction_timeout', 'idle_in_transaction_session_timeout')
             AND setting <> '0'
         ORDER BY name",
    )
    .load(connection)
    .map_err(Error::database("reading the session's settings"))?;
    // Without those that this server doesn't have.
    sql_query(format!(
        "SELECT set_config(name, value, false) FROM pg_settings
         JOIN (VALUES ('application_name', $1), {SETTINGS}) wanted (name, value) USING (name)"
    ))
    .bind::<Text, _>(name)
    .execute(connection)
    .map_err(Error::database("setting up the session"))?;
    Ok(lifted)
}

/// Sets how long a statement waits for a lock; zero is without bound.
pub(crate) fn set_lock_timeout(
    connection: &mut PgConnection,
    timeout: Duration,
) -> Result<(), Error> {
    sql_query("SELECT set_config('lock_timeout', $1, false)")
        .bind::<Text, _>(timeout.as_millis().to_string())
        .execute(connection)
        .map_err(Error::database("setting lock_timeout"))?;
    Ok(())
}

/// Takes the lock. Polls, because a blocked `pg_advisory_lock` would deadlock with a
/// `CREATE INDEX CONCURRENTLY` of the holder.
fn lock(
    connection: &mut PgConnection,
    key: i64,
    settings: &Settings,
    busy: impl Fn(&Holder),
) -> Result<(), Error> {
    let begin = Instant::now();
    let wait = settings.limits.bound(settings.lock_wait);
    let mut told = false;
    loop {
        let locked: bool = select(sql::<Bool>(&format!("pg_try_advisory_lock({key})")))
            .get_result(connection)
            .map_err(Error::database("taking the lock"))?;
        if locked {
            return Ok(());
        }
        if let Some(holder) = holder(connection, key)? {
            if !told {
                told = true;
                busy(&holder);
            }
            let waited = begin.elapsed();
            if waited >= wait || settings.limits.reached().is_some() {
                return Err(Error::LockBusy { holder, waited });
            }
        }
        thread::sleep(POLL);
    }
}

/// Returns which of these roles exist.
pub(crate) fn existing_roles(
    connection: &mut PgConnection,
    names: &[String],
) -> Result<Vec<String>, Error> {
    select(
        sql::<Array<Text>>("ARRAY(SELECT name FROM unnest(")
            .bind::<Array<Text>, _>(names)
            .sql(
                ") AS name WHERE EXISTS (SELECT FROM pg_roles WHERE rolname = name) ORDER BY name)",
            ),
    )
    .get_result(connection)
    .map_err(Error::database("reading which roles exist"))
}

/// Returns the session that holds the lock.
pub(crate) fn holder(connection: &mut PgConnection, key: i64) -> Result<Option<Holder>, Error> {
    sql_query(
        "SELECT l.pid, nullif(a.application_name, '') AS application,
                host(a.client_addr) AS address, a.backend_start AS since
         FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
         WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
             AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
             AND (l.classid::bigint << 32) | l.objid::bigint = $1",
    )
    .bind::<BigInt, _>(key)
    .get_result(connection)
    .optional()
    .map_err(Error::database("reading who holds the lock"))
}

/// Returns the INVALID indexes of `schema`, without those that are being built, quoted as in SQL.
pub(crate) fn invalid_indexes(
    connection: &mut PgConnection,
    schema: &str,
) -> Result<Vec<String>, Error> {
    sql::<Text>(
        "SELECT format('%I.%I', n.nspname, c.relname) AS name
         FROM pg_index i
         JOIN pg_class c ON c.oid = i.indexrelid AND c.relkind = 'i'
         JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE NOT i.indisvalid
             AND NOT EXISTS (SELECT FROM pg_stat_progress_create_index p WHERE p.index_relid = c.oid)
             AND n.nspname = ",
    )
    .bind::<Text, _>(schema)
    .sql(" ORDER BY name")
    .load(connection)
    .map_err(Error::database("reading the INVALID indexes"))
}
