//! A second connection that watches the runner's session: it names who blocks a migration, and
//! cancels it on request or at the time limit.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use diesel::dsl::{select, sql};
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::{Bool, Integer};

use crate::error::{Blocker, Cause};
use crate::report::{Event, Watcher};

const POLL: Duration = Duration::from_millis(100);
/// `pg_blocking_pids` stops the server's lock manager for a moment.
const LOOK: Duration = Duration::from_millis(500);
/// Interval between two events about the same blockers.
const REPEAT: Duration = Duration::from_secs(30);

/// When a run must stop.
#[derive(Clone, Default)]
pub(crate) struct Limits {
    pub(crate) stop: Arc<AtomicBool>,
    pub(crate) deadline: Option<Instant>,
}

impl Limits {
    pub(crate) fn reached(&self) -> Option<Cause> {
        if self.stop.load(Ordering::Relaxed) {
            Some(Cause::Stopped)
        } else if self.deadline.is_some_and(|at| Instant::now() >= at) {
            Some(Cause::TimedOut)
        } else {
            None
        }
    }

    /// Sleeps for `pause`, or until a limit is reached.
    pub(crate) fn sleep(&self, pause: Duration) {
        let begin = Instant::now();
        while begin.elapsed() < pause && self.reached().is_none() {
            thread::sleep(POLL.min(pause));
        }
    }

    /// Returns `wait`, or less if the deadline comes first.
    pub(crate) fn bound(&self, wait: Duration) -> Duration {
        self.deadline.map_or(wait, |at| {
            wait.min(at.saturating_duration_since(Instant::now()))
        })
    }
}

pub(crate) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// Locked during a cancellation, which therefore never hits a later statement.
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    connection: PgConnection,
    /// What runs in the watched session.
    running: Option<String>,
    seen: Seen,
    over: bool,
}

/// What was seen while something ran.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Why it was cancelled.
    pub(crate) cancelled: Option<Cause>,
    /// The last sessions that blocked it.
    pub(crate) blockers: Vec<Blocker>,
}

impl Watch {
    /// Watches the server process `pid` over `connection`.
    pub(crate) fn start(
        connection: PgConnection,
        pid: i32,
        limits: Limits,
        watcher: Arc<Mutex<Watcher>>,
    ) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                connection,
                running: None,
                seen: Seen::default(),
                over: false,
            }),
            changed: Condvar::new(),
        });
        let theirs = Arc::clone(&shared);
        let thread = thread::spawn(move || theirs.watch(pid, &limits, &watcher));
        Self {
            shared,
            thread: Some(thread),
        }
    }

    /// Says that `name` runs now.
    pub(crate) fn begin(&self, name: &str) {
        let mut state = self.shared.lock();
        state.running = Some(name.to_owned());
        state.seen = Seen::default();
    }

    /// Says that it runs no more. Nothing is cancelled from now on.
    pub(crate) fn end(&self) -> Seen {
        let mut state = self.shared.lock();
        state.running = None;
        std::mem::take(&mut state.seen)
    }

    /// Calls `work` with the connection.
    pub(crate) fn with<T>(&self, work: impl FnOnce(&mut PgConnection) -> T) -> T {
        work(&mut self.shared.lock().connection)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic of the watcher's own code has been printed.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self, pid: i32, limits: &Limits, watcher: &Mutex<Watcher>) {
        let mut looked = Instant::now();
        let mut told = Instant::now();
        let mut state = self.lock();
        while !state.over {
            (state, _) = self
                .changed
                .wait_timeout(state, POLL)
                .unwrap_or_else(PoisonError::into_inner);
            let State {
                connection,
                running: Some(name),
                seen,
                over: false,
            } = &mut *state
            else {
                continue;
            };
            if let Some(cause) = limits.reached() {
                seen.cancelled.get_or_insert(cause);
                // Without a connection the statement ends as the session's own settings say.
                let _ =
                    select(sql::<Bool>(&format!("pg_cancel_backend({pid})"))).execute(connection);
            } else if looked.elapsed() >= LOOK {
                looked = Instant::now();
                let blockers = blockers(connection, pid).unwrap_or_default();
                if blockers.is_empty() {
                    continue;
                }
                let pids = |blockers: &[Blocker]| -> Vec<i32> {
                    blockers.iter().map(|blocker| blocker.pid).collect()
                };
                if pids(&blockers) != pids(&seen.blockers) || told.elapsed() >= REPEAT {
                    told = Instant::now();
                    let mut watcher = watcher.lock().unwrap_or_else(PoisonError::into_inner);
                    watcher(Event::Blocked(name, &blockers));
                }
                seen.blockers = blockers;
            }
        }
    }
}

fn blockers(connection: &mut PgConnection, pid: i32) -> QueryResult<Vec<Blocker>> {
    sql_query(
        "SELECT DISTINCT b.pid, nullif(a.application_name, '') AS application, a.state,
                extract(epoch FROM clock_timestamp() - a.query_start)::bigint AS query_seconds,
                extract(epoch FROM clock_timestamp() - a.xact_start)::bigint AS transaction_seconds
         FROM unnest(pg_blocking_pids($1)) b (pid) LEFT JOIN pg_stat_activity a USING (pid)
         ORDER BY b.pid",
    )
    .bind::<Integer, _>(pid)
    .load(connection)
}
