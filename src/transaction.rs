//! Transactions that are retried after a serialization failure or a deadlock.

use std::error::Error as StdError;
use std::thread;
use std::time::Duration;

use diesel::QueryResult;
use diesel::connection::{
    Connection, Instrumentation, InstrumentationEvent, SimpleConnection,
    get_default_instrumentation,
};
use diesel::pg::PgConnection;
use diesel::result::{DatabaseErrorKind, Error};

/// The number of times [`retry_transaction`] runs a transaction before it gives up.
pub const MAX_ATTEMPTS: u32 = 16;

/// The server's message of a deadlock, in each language that PostgreSQL 15 to 18 speaks. Diesel has
/// no kind for SQLSTATE 40P01 and doesn't tell the SQLSTATE.
const DEADLOCK_DETECTED: &[&str] = &[
    "deadlock detected",
    "Verklemmung (Deadlock) entdeckt",
    "se ha detectado un deadlock",
    "interblocage (deadlock) détecté",
    "terdeteksi 'deadlock'",
    "rilevato deadlock",
    "デッドロックを検出しました",
    "ნაპოვნია ურთიერთბლოკირება",
    "deadlock 발생했음",
    "wykryto zakleszczenie",
    "impasse detectado",
    "обнаружена взаимоблокировка",
    "deadlock upptäckt",
    "çıkmaz (deadlock) durumu saptandı",
    "виявлено взаємне блокування",
    "检测到死锁",
    "發現死結",
];

/// The isolation level of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Isolation {
    /// Each statement sees what was committed before it began. Every operation of this crate is
    /// safe at this level.
    #[default]
    ReadCommitted,
    /// All statements see what was committed before the first one.
    RepeatableRead,
    /// Transactions behave as if they ran one after another.
    Serializable,
}

/// Whether an operation waits until the server has written its commit to disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// It waits: what it reports is never lost.
    #[default]
    Synced,
    /// It doesn't wait (`synchronous_commit = off`, for this operation only). A crash of the server
    /// may lose what was committed in the last 3 × `wal_writer_delay`, 0.6 s by default. The rest
    /// stays consistent. Not inside a transaction, whose other writes would be lost as well.
    Unsynced,
}

impl Durability {
    /// Runs `work`; three more round trips if unsynced.
    pub(crate) fn run<T>(
        self,
        conn: &mut PgConnection,
        work: impl FnOnce(&mut PgConnection) -> QueryResult<T>,
    ) -> QueryResult<T> {
        match self {
            Self::Synced => work(conn),
            Self::Unsynced => conn.build_transaction().run(|conn| {
                conn.batch_execute("SET LOCAL synchronous_commit = off")?;
                work(conn)
            }),
        }
    }
}

/// Runs `work` in a transaction and retries it after a serialization failure (SQLSTATE 40001) or a
/// deadlock (40P01).
///
/// It gives up after [`MAX_ATTEMPTS`] attempts. Before each retry it sleeps for a random time of at
/// most 5 ms, doubled with each attempt up to 640 ms. `work` runs again from its start, so its
/// effects outside the database are repeated.
///
/// `E` may wrap the database error in any way (`anyhow`, thiserror's `transparent`): the cause is
/// seen on the connection, by Diesel's instrumentation. This function installs one that passes all
/// events on to [the default one](diesel::connection::set_default_instrumentation). It replaces an
/// instrumentation that was set on this connection only, because Diesel can't combine two.
///
/// # Errors
/// The last error of `work` or of COMMIT; `AlreadyInTransaction` inside another transaction, which
/// a retry could not help.
pub fn retry_transaction<T, E>(
    conn: &mut PgConnection,
    isolation: Isolation,
    mut work: impl FnMut(&mut PgConnection) -> Result<T, E>,
) -> Result<T, E>
where
    E: From<Error>,
{
    let mut attempt = 1;
    loop {
        Watcher::start(conn);
        let transaction = conn.build_transaction();
        let mut transaction = match isolation {
            Isolation::ReadCommitted => transaction.read_committed(),
            Isolation::RepeatableRead => transaction.repeatable_read(),
            Isolation::Serializable => transaction.serializable(),
        };
        match transaction.run(&mut work) {
            Err(_) if attempt < MAX_ATTEMPTS && Watcher::saw_transient_error(conn) => {
                thread::sleep(pause(attempt));
                attempt += 1;
            }
            result => return result,
        }
    }
}

/// Whether a retry of the transaction is likely to succeed: the error, or one that caused it, is a
/// serialization failure or a deadlock.
#[must_use]
pub fn is_transient(error: &(dyn StdError + 'static)) -> bool {
    match error.downcast_ref::<Error>() {
        Some(Error::DatabaseError(DatabaseErrorKind::SerializationFailure, _)) => true,
        Some(Error::DatabaseError(DatabaseErrorKind::Unknown, info)) => {
            DEADLOCK_DETECTED.contains(&info.message())
        }
        Some(Error::RollbackErrorOnCommit { commit_error, .. }) => {
            is_transient(commit_error.as_ref())
        }
        _ => error.source().is_some_and(is_transient),
    }
}

/// Remembers whether a statement failed with a transient error.
struct Watcher {
    saw_transient_error: bool,
    next: Option<Box<dyn Instrumentation>>,
}

impl Watcher {
    fn start(conn: &mut PgConnection) {
        match conn.instrumentation().downcast_mut::<Self>() {
            Some(watcher) => watcher.saw_transient_error = false,
            None => conn.set_instrumentation(Self {
                saw_transient_error: false,
                next: get_default_instrumentation(),
            }),
        }
    }

    fn saw_transient_error(conn: &mut PgConnection) -> bool {
        let watcher = conn.instrumentation().downcast_ref::<Self>();
        watcher.is_some_and(|watcher| watcher.saw_transient_error)
    }
}

impl Instrumentation for Watcher {
    fn on_connection_event(&mut self, event: InstrumentationEvent<'_>) {
        if let InstrumentationEvent::FinishQuery {
            error: Some(error), ..
        } = event
        {
            self.saw_transient_error |= is_transient(error);
        }
        self.next.on_connection_event(event);
    }
}

/// A random time up to 5 ms × 2^(attempt − 1). The range starts at 0, so that transactions that
/// collided don't meet again.
fn pause(attempt: u32) -> Duration {
    let longest = 5_000 << (attempt - 1).min(7);
    let micros = uuid::Uuid::new_v4().as_u128() % longest;
    Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
}
