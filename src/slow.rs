//! Slow statements, for `tracing`.

use std::time::{Duration, Instant};

use diesel::connection::{DebugQuery, Instrumentation, InstrumentationEvent};

/// A warning of `tracing` for each statement that takes longer than a threshold, with its text and
/// its duration, and never with a value that is bound to it.
///
/// ```no_run
/// use std::time::Duration;
///
/// use bruhmcp_db::SlowStatements;
/// use diesel::connection::{Instrumentation, set_default_instrumentation};
///
/// fn slow() -> Option<Box<dyn Instrumentation>> {
///     Some(Box::new(SlowStatements::new(Duration::from_millis(200))))
/// }
///
/// // For each new connection, of a pool too.
/// set_default_instrumentation(slow)?;
/// # Ok::<(), diesel::result::Error>(())
/// ```
///
/// [`retry_transaction`](crate::retry_transaction) keeps the default instrumentation, not one that
/// was set on a connection only. The duration includes that of the network, but not that of reading
/// the rows. A value that a caller writes into the text of a `sql_query` is part of the text.
#[derive(Debug)]
pub struct SlowStatements {
    threshold: Duration,
    begin: Option<Instant>,
}

impl SlowStatements {
    /// Returns the instrumentation of one connection.
    pub fn new(threshold: Duration) -> Self {
        Self {
            threshold,
            begin: None,
        }
    }
}

impl Instrumentation for SlowStatements {
    fn on_connection_event(&mut self, event: InstrumentationEvent<'_>) {
        match event {
            InstrumentationEvent::StartQuery { .. } => self.begin = Some(Instant::now()),
            InstrumentationEvent::FinishQuery { query, error, .. } => {
                let duration = self.begin.take().map_or(Duration::ZERO, |at| at.elapsed());
                if duration >= self.threshold {
                    tracing::warn!(
                        statement = text(query),
                        duration_ms = duration.as_secs_f64() * 1e3,
                        failed = error.is_some(),
                        "slow statement"
                    );
                }
            }
            _ => {}
        }
    }
}

/// Returns the text without the bound values.
fn text(query: &dyn DebugQuery) -> String {
    let shown = query.to_string();
    match shown.split_once(" -- binds: ") {
        Some((text, _)) => text.to_owned(),
        // A batch, such as COMMIT, may have values in its text; so might another form than that of
        // Diesel 2.3.
        None => shown.split_whitespace().take(1).collect(),
    }
}
