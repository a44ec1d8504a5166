//! A buffer between threads that produce rows and one that writes them.

use std::io;
use std::mem;
use std::num::NonZeroUsize;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How many times [`Buffer`] offers its last rows when it is dropped.
const LAST_FLUSHES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(100);

/// When a [`Buffer`] flushes.
#[derive(Debug, Clone, Copy)]
pub struct BufferLimits {
    /// Flush as soon as so many rows wait.
    pub batch: NonZeroUsize,
    /// Flush after this time at the latest. It is what a crash of this process may lose.
    pub interval: Duration,
    /// Accept no more rows than this, while the database can't be reached for example.
    pub capacity: NonZeroUsize,
}

impl Default for BufferLimits {
    /// 1,000 rows or 1 second, and at most 100,000 rows.
    fn default() -> Self {
        const BATCH: NonZeroUsize = NonZeroUsize::new(1_000).unwrap();
        const CAPACITY: NonZeroUsize = NonZeroUsize::new(100_000).unwrap();
        Self {
            batch: BATCH,
            interval: Duration::from_secs(1),
            capacity: CAPACITY,
        }
    }
}

/// Collects rows of many threads, and hands them to one function, many at a time, in a thread of
/// its own.
///
/// [`push`](Self::push) costs a lock in memory and never waits for the database. Dropping the
/// buffer flushes it. A crash of the process loses the rows of at most one interval, and more only
/// while the database refuses them: use it for calls and audit rows, not for money.
///
/// ```no_run
/// use bruhmcp_db::ids::InstanceId;
/// use bruhmcp_db::models::{InstanceCalls, McpInstance};
/// use bruhmcp_db::{Buffer, BufferLimits, Durability};
/// use diesel::prelude::*;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let url = String::new();
/// let mut conn = PgConnection::establish(&url)?;
/// let calls = Buffer::start(BufferLimits::default(), move |calls: Vec<InstanceCalls>| {
///     // What is locked now is counted with the next batch, and everything if the server failed.
///     match McpInstance::record_calls(&mut conn, &calls, Durability::Unsynced) {
///         Ok(locked) => locked,
///         Err(_) => {
///             if let Ok(new) = PgConnection::establish(&url) {
///                 conn = new;
///             }
///             calls
///         }
///     }
/// })?;
/// # let instance_id = InstanceId::new();
/// // In the threads that serve calls:
/// if calls.push(InstanceCalls::one(instance_id)).is_err() {
///     // The database has been away for long: refuse calls, or count this one at once.
/// }
/// # Ok(())
/// # }
/// ```
pub struct Buffer<T> {
    shared: Arc<Shared<T>>,
    flusher: Option<JoinHandle<()>>,
}

struct Shared<T> {
    rows: Mutex<Rows<T>>,
    changed: Condvar,
    limits: BufferLimits,
}

struct Rows<T> {
    waiting: Vec<T>,
    /// How many the flusher has taken.
    in_flight: usize,
    closed: bool,
}

impl<T: Send + 'static> Buffer<T> {
    /// Starts the thread that flushes. `flush` returns the rows that it could not write: they come
    /// again with the next batch, after an interval.
    ///
    /// # Errors
    /// The system can't start a thread.
    pub fn start(
        limits: BufferLimits,
        flush: impl FnMut(Vec<T>) -> Vec<T> + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            rows: Mutex::new(Rows {
                waiting: Vec::new(),
                in_flight: 0,
                closed: false,
            }),
            changed: Condvar::new(),
            limits,
        });
        let flusher = thread::Builder::new().name("buffer".into()).spawn({
            let shared = Arc::clone(&shared);
            move || {
                let closing = Closing(&shared);
                closing.0.flush_until_closed(flush);
            }
        })?;
        Ok(Self {
            shared,
            flusher: Some(flusher),
        })
    }

    /// Adds a row to the next batch.
    ///
    /// # Errors
    /// The row, if the buffer is full or `flush` has panicked.
    pub fn push(&self, row: T) -> Result<(), T> {
        let mut rows = self.shared.lock();
        let held = rows.waiting.len() + rows.in_flight;
        if rows.closed || held >= self.shared.limits.capacity.get() {
            return Err(row);
        }
        rows.waiting.push(row);
        if rows.waiting.len() == self.shared.limits.batch.get() {
            self.shared.changed.notify_one();
        }
        Ok(())
    }
}

impl<T> Shared<T> {
    /// No code that can panic runs under the lock.
    fn lock(&self) -> MutexGuard<'_, Rows<T>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for an interval, until the buffer is closed, or until `until` holds.
    fn wait(&self, until: impl Fn(&Rows<T>) -> bool) -> MutexGuard<'_, Rows<T>> {
        let waiting = |rows: &mut Rows<T>| !rows.closed && !until(rows);
        self.changed
            .wait_timeout_while(self.lock(), self.limits.interval, waiting)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    fn flush_until_closed(&self, mut flush: impl FnMut(Vec<T>) -> Vec<T>) {
        let mut refused = false;
        let mut last_flushes = 0;
        loop {
            // After a refusal a full batch is no reason to hurry.
            let mut rows =
                self.wait(|rows| !refused && rows.waiting.len() >= self.limits.batch.get());
            let closed = rows.closed;
            let batch = mem::take(&mut rows.waiting);
            rows.in_flight = batch.len();
            drop(rows);
            if !batch.is_empty() {
                let kept = flush(batch);
                refused = !kept.is_empty();
                let mut rows = self.lock();
                rows.in_flight = 0;
                rows.waiting.splice(..0, kept);
            }
            if closed {
                last_flushes += 1;
                if self.lock().waiting.is_empty() || last_flushes == LAST_FLUSHES {
                    return;
                }
                thread::sleep(PAUSE);
            }
        }
    }
}

/// Refuses further rows when the flusher ends, also by a panic.
struct Closing<'a, T>(&'a Shared<T>);

impl<T> Drop for Closing<'_, T> {
    fn drop(&mut self) {
        self.0.lock().closed = true;
    }
}

impl<T> Drop for Buffer<T> {
    /// Flushes the rest and waits for it. Rows that `flush` refuses ten times, 100 ms apart, are
    /// lost.
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_one();
        if let Some(flusher) = self.flusher.take() {
            let _ = flusher.join();
        }
    }
}
