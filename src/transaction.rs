//! Transactions that are repeated when the database asks for it.

use std::error::Error as StdError;
use std::thread;
use std::time::Duration;

use diesel::pg::PgConnection;
use diesel::result::{DatabaseErrorKind, Error};

/// How often [`retry_transaction`] tries before it gives the error back.
pub const MAX_ATTEMPTS: u32 = 10;

/// The isolation level of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Isolation {
    /// Each statement sees what was committed before it began. Enough for every operation of this crate.
    #[default]
    ReadCommitted,
    /// All statements see what was committed before the first.
    RepeatableRead,
    /// As if transactions ran one after the other.
    Serializable,
}

/// Runs `work` in a transaction, and again when it fails on a serialization failure (SQLSTATE 40001) or a deadlock
/// (40P01), at most [`MAX_ATTEMPTS`] times, after a pause with jitter that doubles from 5 ms up to 320 ms.
///
/// `work` runs as a whole each time, so what it does outside the database must bear repetition.
///
/// # Errors
/// The error of `work` or of COMMIT, the last one where tries ran out; `AlreadyInTransaction` inside another
/// transaction, where a repetition could not help.
pub fn retry_transaction<T, E>(
    conn: &mut PgConnection,
    isolation: Isolation,
    mut work: impl FnMut(&mut PgConnection) -> Result<T, E>,
) -> Result<T, E>
where
    E: From<Error> + StdError + 'static,
{
    let mut attempt = 1;
    loop {
        let transaction = conn.build_transaction();
        let mut transaction = match isolation {
            Isolation::ReadCommitted => transaction.read_committed(),
            Isolation::RepeatableRead => transaction.repeatable_read(),
            Isolation::Serializable => transaction.serializable(),
        };
        match transaction.run(&mut work) {
            Err(error) if attempt < MAX_ATTEMPTS && is_transient(&error) => {
                thread::sleep(pause(attempt));
                attempt += 1;
            }
            result => return result,
        }
    }
}

/// Whether the same transaction may well succeed when it is run again: a serialization failure or a deadlock, here or
/// in what the error was caused by.
#[must_use]
pub fn is_transient(error: &(dyn StdError + 'static)) -> bool {
    match error.downcast_ref::<Error>() {
        Some(Error::DatabaseError(DatabaseErrorKind::SerializationFailure, _)) => true,
        // Diesel has no kind for 40P01 and doesn't tell the SQLSTATE.
        Some(Error::DatabaseError(DatabaseErrorKind::Unknown, info)) => {
            info.message() == "deadlock detected"
        }
        Some(Error::RollbackErrorOnCommit { commit_error, .. }) => {
            is_transient(commit_error.as_ref())
        }
        _ => error.source().is_some_and(is_transient),
    }
}

/// Between half and the whole of 5 ms × 2^(attempt − 1).
fn pause(attempt: u32) -> Duration {
    let whole = 5_000 << (attempt - 1).min(6);
    let jitter = uuid::Uuid::new_v4().as_u128() % (whole / 2);
    Duration::from_micros(u64::try_from(whole / 2 + jitter).unwrap_or(u64::MAX))
}
