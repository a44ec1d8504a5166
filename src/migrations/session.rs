//! Connections, and the one session that may change something.

use std::process;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use diesel::connection::{Connection, InstrumentationEvent};
use diesel::dsl::{select, sql};
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_types::{BigInt, Bool, Nullable, Text};
use diesel::{ConnectionError, sql_query};
use uuid::Uuid;

use super::url::Url;
use super::{Error, Holder, Refusal, Report, ServerReport};

/// Names the lock of this crate's migrations within a database: "bruhmcpd" in ASCII.
const LOCK: i64 = 0x6272_7568_6d63_7064;
/// How often a busy lock and an unreachable server are tried.
const POLL: Duration = Duration::from_millis(100);

/// Connects, for as long as `wait` while the server is out of reach or starting.
pub(super) fn connect(url: &Url, wait: Duration) -> Result<PgConnection, Error> {
    establish(url, &url.secret(), wait)
}

fn establish(url: &Url, secret: &str, wait: Duration) -> Result<PgConnection, Error> {
    let begin = Instant::now();
    loop {
        let text = match PgConnection::establish(secret) {
            Ok(connection) => return Ok(connection),
            Err(ConnectionError::BadConnection(text)) => text,
            Err(error) => return Err(Error::Connect(url.conceal(&error.to_string()))),
        };
        // PgBouncer's words for a server setting in `options`.
        if text.contains("unsupported startup parameter") {
            return Err(Refusal::Pooler.into());
        }
        if !may_come_up(&text) || begin.elapsed() >= wait {
            return Err(Error::Connect(url.conceal(&text)));
        }
        thread::sleep(POLL);
    }
}

/// Whether all that libpq tried, an address a line, were out of reach or starting. There is no SQLSTATE here, only
/// text, so this knows what is worth waiting for and takes anything else, a server's message in another language
/// included, as final. Compared as a whole: a name in the text may say anything.
fn may_come_up(text: &str) -> bool {
    const PASSING: [&str; 11] = [
        "Connection refused",
        "Connection reset by peer",
        "No such file or directory",
        "No route to host",
        "timeout expired",
        "server closed the connection unexpectedly",
        "FATAL:  the database system is starting up",
        "FATAL:  the database system is shutting down",
        "FATAL:  the database system is in recovery mode",
        "FATAL:  the database system is not yet accepting connections",
        "FATAL:  the database system is not accepting connections",
    ];
    let mut answers = text
        .lines()
        .filter(|line| line.starts_with("connection to server"))
        .map(|line| {
            line.rsplit_once(" failed: ")
                .map_or("", |(_, answer)| answer)
        })
        .peekable();
    answers.peek().is_some() && answers.all(|answer| PASSING.contains(&answer))
}

/// A connection that is a server process of its own for certain, with the settings of a runner.
pub(super) struct Session {
    pub(super) connection: PgConnection,
    /// What was done with it.
    pub(super) done: Report,
    caught: Arc<Mutex<Option<ServerReport>>>,
}

impl Session {
    /// Connects and refuses where the work could not be done as it should.
    pub(super) fn open(url: &Url, wait: Duration, purpose: &str) -> Result<Self, Error> {
        // A startup option reaches no further than the session that it starts. A pooler rejects it or drops it; either
        // way it shows that there is one, and no session lock is left with a stranger.
        let token = Uuid::new_v4().simple().to_string();
        let secret = url.secret_with_setting("bruhmcp_db.session", &token);
        let mut connection = establish(url, &secret, wait)?;
        let (own, read_only, schema, may_create, role) = select((
            sql::<Bool>("coalesce(current_setting('bruhmcp_db.session', true), '') = ")
                .bind::<Text, _>(&token),
            sql::<Bool>("current_setting('transaction_read_only')::boolean"),
            sql::<Nullable<Text>>("current_schema()::text"),
            sql::<Bool>(
                "coalesce(has_schema_privilege(to_regnamespace('public'), 'CREATE'), false)",
            ),
            sql::<Text>("current_user::text"),
        ))
        .get_result::<(bool, bool, Option<String>, bool, String)>(&mut connection)
        .map_err(Error::database("looking around"))?;
        if !own {
            return Err(Refusal::Pooler.into());
        }
        if read_only {
            return Err(Refusal::ReadOnly.into());
        }
        if schema.as_deref() != Some("public") {
            return Err(Refusal::SearchPath(schema).into());
        }
        if !may_create {
            return Err(Refusal::NoRights(role).into());
        }

        // idle_session_timeout: a person may be asked while the lock is held. client_connection_check_interval: if this
        // process is killed, its statement ends at once, and its locks with it.
        sql_query(
            "SELECT set_config('application_name', $1, false),
                    set_config('lock_timeout', '5s', false),
                    set_config('idle_session_timeout', '0', false),
                    set_config('client_connection_check_interval', '100ms', false)",
        )
        .bind::<Text, _>(format!("bruhmcp-db {purpose}, process {}", process::id()))
        .execute(&mut connection)
        .map_err(Error::database("setting up the session"))?;

        let caught = Arc::new(Mutex::new(None));
        let slot = Arc::clone(&caught);
        connection.set_instrumentation(move |event: InstrumentationEvent<'_>| {
            if let InstrumentationEvent::FinishQuery {
                query,
                error: Some(error),
                ..
            } = event
            {
                slot.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    // What follows the first error is only its consequence.
                    .get_or_insert_with(|| ServerReport::new(error, &query.to_string()));
            }
        });
        Ok(Self {
            connection,
            done: Report::default(),
            caught,
        })
    }

    /// What the server said about a failure: its first error, for a migration's own error type keeps only the message.
    pub(super) fn report(&self, error: &dyn std::error::Error) -> ServerReport {
        let mut caught = self.caught.lock().unwrap_or_else(PoisonError::into_inner);
        caught
            .take()
            .unwrap_or_else(|| ServerReport::from_text(error))
    }

    /// Takes the lock. Polled, because a blocked `pg_advisory_lock` deadlocks with a `CREATE INDEX CONCURRENTLY` of the
    /// holder. It belongs to the server process: a killed runner's lock lasts as long as its statement.
    pub(super) fn lock(
        &mut self,
        wait: Duration,
        mut busy: impl FnMut(&Holder),
    ) -> Result<(), Error> {
        let begin = Instant::now();
        let mut told = false;
        loop {
            if self.ask("pg_try_advisory_lock", "taking the lock")? {
                return Ok(());
            }
            if let Some(holder) = holder(&mut self.connection)? {
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

    /// Gives the lock back, and ends.
    pub(super) fn unlock(mut self) -> Result<Report, Error> {
        if self.ask("pg_advisory_unlock", "giving back the lock")? {
            Ok(self.done)
        } else {
            Err(Error::LockLost)
        }
    }

    fn ask(&mut self, function: &str, doing: &'static str) -> Result<bool, Error> {
        select(sql::<Bool>(&format!("{function}({LOCK})")))
            .get_result(&mut self.connection)
            .map_err(Error::database(doing))
    }
}

/// Who holds the lock, if anybody does.
pub(super) fn holder(connection: &mut PgConnection) -> Result<Option<Holder>, Error> {
    sql_query(
        "SELECT l.pid, nullif(a.application_name, '') AS application, host(a.client_addr) AS address,
                a.backend_start AS since
         FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
         WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
             AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
             AND (l.classid::bigint << 32) | l.objid::bigint = $1",
    )
    .bind::<BigInt, _>(LOCK)
    .get_result(connection)
    .optional()
    .map_err(Error::database("asking who holds the lock"))
}

#[cfg(test)]
mod tests {
    use super::may_come_up;

    #[test]
    fn only_what_passes_is_waited_for() {
        let socket = "connection to server on socket \"/run/.s.PGSQL.5432\" failed: ";
        let address = "connection to server at \"db\" (10.0.0.1), port 5432 failed: ";
        for text in [
            format!(
                "{address}Connection refused\n\tIs the server running on that host and accepting TCP/IP connections?"
            ),
            format!("{socket}No such file or directory\n\tIs the server running locally?"),
            format!("{socket}FATAL:  the database system is starting up"),
            format!(
                "{address}timeout expired\n{address}Connection refused\n\tIs the server running?"
            ),
        ] {
            assert!(may_come_up(&text), "{text}");
        }
        for text in [
            format!("{address}FATAL:  password authentication failed for user \"a\""),
            format!("{address}Connection refused\n\tIs it running?\n{address}FATAL:  role \"a\" does not exist"),
            format!("{socket}FATAL:  database \"x failed: Connection refused\" does not exist"),
            format!("{socket}FATAL:  database \"the database system is starting up\" does not exist"),
            "could not translate host name \"Connection refused\" to address: Name or service not known".to_owned(),
            String::new(),
        ] {
            assert!(!may_come_up(&text), "{text}");
        }
    }
}
