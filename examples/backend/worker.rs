//! Work that no request waits for: what has failed, is due, or is over.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use bruhmcp_db::models::{AuthToken, McpInstance, UserPlan, UserSubscription};
use chrono::TimeDelta;

use crate::errors::Error;
use crate::{App, provider, webhooks};

/// Does a part of its work and returns whether more may be left.
type Step = fn(&App) -> Result<bool, Error>;

const STEPS: [Step; 6] = [
    webhooks::process_due,
    sweep_subscriptions,
    expire_plans,
    expire_instances,
    provider::refresh_due,
    purge_tokens,
];

/// The number of rows that a step changes at most.
const BATCH: u16 = 100;

/// Works until `stop` is closed, and then finishes its step.
///
/// A step takes one connection, only while it uses the database, so that the requests have the rest
/// of the pool. Several processes can run it: each row is claimed, or locked rows are skipped.
pub(crate) fn run(app: &App, stop: &Receiver<()>) {
    let mut pause = Duration::ZERO;
    while stop.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
        pause = Duration::from_secs(1);
        // In turn, so that a long queue or a failing step doesn't keep the others waiting.
        for step in STEPS {
            match step(app) {
                Ok(true) => pause = Duration::ZERO,
                Ok(false) => {}
                Err(error) => error.log(),
            }
        }
    }
}

fn sweep_subscriptions(app: &App) -> Result<bool, Error> {
    let swept = UserSubscription::sweep(&mut *app.db()?)?;
    Ok(swept.is_some())
}

fn expire_plans(app: &App) -> Result<bool, Error> {
    let expired = UserPlan::expire_due(&mut *app.db()?)?;
    Ok(expired.is_some())
}

fn expire_instances(app: &App) -> Result<bool, Error> {
    let expired = McpInstance::expire_due(&mut *app.db()?, BATCH)?;
    Ok(!expired.is_empty())
}

/// Longer than wrong guesses count. Purges of webhook events and of the audit log are the
/// operator's, as `app_admin`.
const KEEP_TOKENS: TimeDelta = TimeDelta::days(1);

fn purge_tokens(app: &App) -> Result<bool, Error> {
    let purged = AuthToken::purge(&mut *app.db()?, KEEP_TOKENS, BATCH)?;
    Ok(purged == usize::from(BATCH))
}
