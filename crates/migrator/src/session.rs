//! Connections, and the session that holds the lock.

use std::collections::BTreeMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::process;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use diesel::connection::{Connection, InstrumentationEvent};
use diesel::dsl::{select, sql};
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_types::{BigInt, Bool, Integer, Nullable, Text, Timestamptz};
use diesel::{ConnectionError, sql_query};
use libpq_conninfo::{Conninfo, Ping};

use crate::error::{Error, Holder, Refusal, ServerReport};
use crate::report::Report;
use crate::runner::Settings;

/// Interval between two tries at a busy lock or an unreachable server.
const POLL: Duration = Duration::from_millis(100);
/// Seconds until a server that never answers is given up, unless the user says otherwise.
const CONNECT_TIMEOUT: &str = "10";

/// Applied versions and when they were applied.
pub(crate) type Ledger = BTreeMap<String, DateTime<Utc>>;

pub(crate) fn connect(settings: &Settings) -> Result<PgConnection, Error> {
    establish(settings.conninfo.clone(), settings.connect_wait)
}

fn establish(mut conninfo: Conninfo, wait: Duration) -> Result<PgConnection, Error> {
    if conninfo.effective("connect_timeout").is_none() {
        conninfo = conninfo.with("connect_timeout", CONNECT_TIMEOUT);
    }
    let url = conninfo.secret_url();
    let begin = Instant::now();
    let mut accepting = false;
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
        if accepting || begin.elapsed() >= wait {
            return Err(error);
        }
        match conninfo.ping() {
            // It may have come up since the attempt, which therefore gets a second try.
            Ping::Accepting => accepting = true,
            Ping::Unavailable => thread::sleep(POLL),
            Ping::Invalid => return Err(error),
        }
    }
}

/// Reads the applied versions of `schema`, whatever the search_path is.
pub(crate) fn ledger(connection: &mut PgConnection, schema: &str) -> Result<Ledger, Error> {
    let table = format!(
        "\"{}\".__diesel_schema_migrations",
        schema.replace('"', "\"\"")
    );
    let read = |connection: &mut PgConnection| {
        let exists = sql::<Bool>("to_regclass(")
            .bind::<Text, _>(&table)
            .sql(") IS NOT NULL");
        if !select(exists).get_result(connection)? {
            return Ok(Vec::new());
        }
        // run_on has no time zone. Diesel sets the zone of each of its sessions to UTC.
        sql::<(Text, Timestamptz)>(&format!(
            "SELECT version::text, run_on AT TIME ZONE 'UTC' FROM {table}"
        ))
        .load(connection)
    };
    let rows = read(connection).map_err(Error::database("reading __diesel_schema_migrations"))?;
    Ok(rows.into_iter().collect())
}

/// A connection that has a server process of its own, and the settings of a runner.
pub(crate) struct Session {
    pub(crate) connection: PgConnection,
    pub(crate) done: Report,
    lock_key: i64,
    caught: Arc<Mutex<Option<ServerReport>>>,
}

#[derive(QueryableByName)]
struct Surroundings {
    #[diesel(sql_type = Bool)]
    is_own_process: bool,
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
    /// Connects. Refuses a pooler, a read-only session, another search_path and a role that may
    /// not create objects.
    pub(crate) fn open(settings: &Settings, purpose: &str) -> Result<Self, Error> {
        // A pooler rejects or drops a startup option. Either shows that there is a pooler, before
        // a lock is taken in a server process that other clients get too.
        let conninfo = &settings.conninfo;
        let token = RandomState::new().build_hasher().finish().to_string();
        let options = conninfo.effective("options").unwrap_or_default();
        let options = format!("{options} -c diesel_pg_migrator.session={token}");
        let conninfo = conninfo.clone().with("options", &options);
        let mut connection = establish(conninfo, settings.connect_wait)?;
        let found: Surroundings = sql_query(
            "SELECT coalesce(current_setting('diesel_pg_migrator.session', true), '') = $1 AS is_own_process,
                    current_setting('transaction_read_only')::boolean AS is_read_only,
                    current_schema()::text AS schema,
                    coalesce(has_schema_privilege(to_regnamespace(quote_ident($2)), 'CREATE'), false) AS may_create,
                    current_user::text AS role",
        )
        .bind::<Text, _>(&token)
        .bind::<Text, _>(&settings.schema)
        .get_result(&mut connection)
        .map_err(Error::database("checking the session"))?;
        let schema = settings.schema.clone();
        if !found.is_own_process {
            return Err(Refusal::Pooler.into());
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

        // idle_session_timeout: the runner may wait for a person's answer.
        // client_connection_check_interval: if this process is killed, its statement and its lock
        // end at once.
        sql_query(
            "SELECT set_config('application_name', $1, false),
                    set_config('lock_timeout', '5s', false),
                    set_config('idle_session_timeout', '0', false),
                    set_config('client_connection_check_interval', '100ms', false)",
        )
        .bind::<Text, _>(format!(
            "{} {purpose}, process {}",
            settings.program,
            process::id()
        ))
        .execute(&mut connection)
        .map_err(Error::database("setting up the session"))?;

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
            lock_key: settings.lock_key(),
            caught,
        })
    }

    /// Returns the server's first error, for a migration's own error has only the message.
    pub(crate) fn report(&self, error: &dyn std::error::Error) -> ServerReport {
        let mut caught = self.caught.lock().unwrap_or_else(PoisonError::into_inner);
        caught
            .take()
            .unwrap_or_else(|| ServerReport::from_text(error))
    }

    /// Takes the lock. Polls, because a blocked `pg_advisory_lock` would deadlock with a
    /// `CREATE INDEX CONCURRENTLY` of the holder.
    pub(crate) fn lock(
        &mut self,
        wait: Duration,
        mut busy: impl FnMut(&Holder),
    ) -> Result<(), Error> {
        let begin = Instant::now();
        let mut told = false;
        loop {
            if self.call("pg_try_advisory_lock", "taking the lock")? {
                return Ok(());
            }
            if let Some(holder) = holder(&mut self.connection, self.lock_key)? {
                if !told {
                    told = true;
                    busy(&holder);
                }
                let waited = begin.elapsed();
                if waited >= wait {
                    return Err(Error::LockBusy { holder, waited });
                }
            }
            thread::sleep(POLL);
        }
    }

    /// Returns whether this session still holds the lock.
    pub(crate) fn is_locked(&mut self) -> Result<bool, Error> {
        let own: i32 = select(sql::<Integer>("pg_backend_pid()"))
            .get_result(&mut self.connection)
            .map_err(Error::database("reading who holds the lock"))?;
        let holder = holder(&mut self.connection, self.lock_key)?;
        Ok(holder.is_some_and(|holder| holder.pid == own))
    }

    /// Releases the lock and returns the report.
    pub(crate) fn unlock(mut self, program: &str) -> Result<Report, Error> {
        if self.call("pg_advisory_unlock", "releasing the lock")? {
            Ok(self.done)
        } else {
            let program = program.to_owned();
            Err(Error::LockLost { program })
        }
    }

    fn call(&mut self, function: &str, doing: &'static str) -> Result<bool, Error> {
        let key = self.lock_key;
        select(sql::<Bool>(&format!("{function}({key})")))
            .get_result(&mut self.connection)
            .map_err(Error::database(doing))
    }
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
