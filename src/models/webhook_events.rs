//! Webhooks of the payment gateways: recorded first, then processed.

mod row;

use chrono::{DateTime, TimeDelta, Utc};
use diesel::dsl::{now, sql};
use diesel::expression::SqlLiteral;
use diesel::prelude::*;
use diesel::result::Error::{self, QueryBuilderError};
use diesel::sql_types::{BigInt, Bool, Interval, Timestamptz, Uuid};
use serde_json::{Value, json};

pub use self::row::WebhookEvent;
use crate::enums::{PaymentGateway, WebhookStatus};
use crate::ids::{UserId, WebhookEventId};
use crate::models::users::anonymised_email;
use crate::models::{Recorded, is_lease};
use crate::prepared::Prepare;
use crate::schema::{users, webhook_events};

/// Values of a new [`WebhookEvent`]; `None` uses the column's default.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = webhook_events, check_for_backend(Pg))]
#[expect(missing_docs, reason = "the fields are those of `WebhookEvent`")]
pub struct NewWebhookEvent<'a> {
    pub event_id: Option<WebhookEventId>,
    pub external_event_id: &'a str,
    pub event_type: &'a str,
    pub payment_gateway: PaymentGateway,
    pub payload: &'a Value,
}

impl<'a> NewWebhookEvent<'a> {
    /// An event with a generated key.
    #[must_use]
    pub fn new(
        payment_gateway: PaymentGateway,
        external_event_id: &'a str,
        event_type: &'a str,
        payload: &'a Value,
    ) -> Self {
        Self {
            event_id: Some(WebhookEventId::new()),
            external_event_id,
            event_type,
            payment_gateway,
            payload,
        }
    }
}

/// The number of claims after which an event is a dead letter, unless it is marked as processed or
/// skipped. The indexes of the queue know the number too.
pub const MAX_WEBHOOK_ATTEMPTS: i32 = 10;

/// The pause after the first failure. It doubles with each further one, up to 4 h 16 min: the
/// attempts of an event that keeps failing spread over 8½ hours.
const PAUSE: TimeDelta = TimeDelta::minutes(1);

/// The pause after a failure of the attempt with this number. A dead letter has none.
fn pause(attempts: i32) -> TimeDelta {
    match attempts {
        1..MAX_WEBHOOK_ATTEMPTS => PAUSE * (1 << (attempts - 1)),
        _ => TimeDelta::zero(),
    }
}

/// Why an event was not claimed or marked. The event is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WebhookError {
    /// Another worker has claimed the event since, or it is closed or missing. Roll back what was
    /// done for it.
    #[error("the lease of the event ended and it is another worker's now")]
    LeaseLost,
    /// A lease is negative or over 365 days.
    #[error("a lease is not negative and at most 365 days")]
    InvalidLease,
    /// Any other database error.
    #[error("database error")]
    Database(#[from] Error),
}

fn check_lease(lease: TimeDelta) -> QueryResult<()> {
    if is_lease(lease) {
        Ok(())
    } else {
        Err(QueryBuilderError(Box::new(WebhookError::InvalidLease)))
    }
}

/// A literal because the planner can't match bind parameters with the predicate of an index.
fn is_open() -> SqlLiteral<Bool> {
    sql("webhook_events.processing_status IN ('pending', 'failed')")
}

/// Claims the open and available events that fulfil a condition, for the lease `$1`. Not the query
/// builder: it has no `FROM` in an update. The rows are selected in a `WITH`, because PostgreSQL may
/// evaluate a `LIMIT` in a subquery of UPDATE more than once.
macro_rules! claim {
    ($condition:literal) => {
        diesel::sql_query(concat!(
            "WITH due AS MATERIALIZED (
                 SELECT event_id
                   FROM webhook_events
                  WHERE processing_status IN ('pending', 'failed') AND available_at <= now() AND ",
            $condition,
            "        FOR NO KEY UPDATE SKIP LOCKED
             )
             UPDATE webhook_events
                SET attempts = attempts + 1, available_at = now() + $1
               FROM due
              WHERE webhook_events.event_id = due.event_id
             RETURNING webhook_events.event_id, external_event_id, event_type, payment_gateway,
                 processed_at, payload, processing_status, error_message, created_at, user_id,
                 attempts, available_at"
        ))
    };
}

impl WebhookEvent {
    /// Returns the event with this id.
    pub fn find(conn: &mut PgConnection, event_id: WebhookEventId) -> QueryResult<Option<Self>> {
        webhook_events::table
            .find(event_id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Returns the event with this id at this gateway.
    pub fn find_by_external_id(
        conn: &mut PgConnection,
        payment_gateway: PaymentGateway,
        external_event_id: &str,
    ) -> QueryResult<Option<Self>> {
        webhook_events::table
            .filter(webhook_events::payment_gateway.eq(payment_gateway))
            .filter(webhook_events::external_event_id.eq(external_event_id))
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Records a webhook once, before it is processed. Of concurrent deliveries, one gets
    /// [`Recorded::New`].
    ///
    /// An existing event keeps its first payload. A delivery doesn't wait for a worker that processes
    /// the event, only for the commit of one that has marked it. Commit before processing, or a
    /// failure loses the event.
    ///
    /// # Errors
    /// Violated constraints, such as an empty external id.
    pub fn record(
        conn: &mut PgConnection,
        new: &NewWebhookEvent<'_>,
    ) -> QueryResult<Recorded<Self>> {
        Self::insert(conn, new, 0, TimeDelta::zero())
    }

    /// Records like [`record`](Self::record), and claims a new event in the same statement, so that
    /// no other worker comes in between. An existing event is not claimed.
    ///
    /// # Errors
    /// Those of `record` and [`claim`](Self::claim).
    pub fn record_claimed(
        conn: &mut PgConnection,
        new: &NewWebhookEvent<'_>,
        lease: TimeDelta,
    ) -> QueryResult<Recorded<Self>> {
        check_lease(lease)?;
        Self::insert(conn, new, 1, lease)
    }

    fn insert(
        conn: &mut PgConnection,
        new: &NewWebhookEvent<'_>,
        attempts: i32,
        lease: TimeDelta,
    ) -> QueryResult<Recorded<Self>> {
        loop {
            let inserted = diesel::insert_into(webhook_events::table)
                .values((
                    new,
                    webhook_events::attempts.eq(attempts),
                    webhook_events::available_at.eq(after(lease)),
                ))
                .on_conflict((
                    webhook_events::payment_gateway,
                    webhook_events::external_event_id,
                ))
                .do_nothing()
                .returning(Self::as_returning())
                .prepared()
                .get_result(conn)
                .optional()?;
            if let Some(event) = inserted {
                return Ok(Recorded::New(event));
            }
            // If the other row was purged meanwhile, the event is new again.
            if let Some(event) =
                Self::find_by_external_id(conn, new.payment_gateway, new.external_event_id)?
            {
                return Ok(Recorded::Existing(event));
            }
        }
    }

    /// Claims an event for the time of a lease. Returns `None` if it is closed, claimed by another
    /// worker, not yet due after a failure, a dead letter, or missing.
    ///
    /// One statement, which waits for nobody. Commit it before processing, or a worker that dies
    /// claims the event for ever without counting an attempt. Take a lease longer than the
    /// processing: when it ends, another worker may claim the event.
    ///
    /// # Errors
    /// [`WebhookError::InvalidLease`] within `QueryBuilderError`.
    pub fn claim(
        conn: &mut PgConnection,
        event_id: WebhookEventId,
        lease: TimeDelta,
    ) -> QueryResult<Option<Self>> {
        check_lease(lease)?;
        claim!("attempts < 10 AND event_id = $2")
            .bind::<Interval, _>(lease)
            .bind::<Uuid, _>(event_id)
            .prepared()
            .get_result(conn)
            .optional()
    }

    /// Claims up to `limit` events like [`claim`](Self::claim), those that have been due for longest
    /// first. One lease is for all of them.
    ///
    /// # Errors
    /// Those of [`claim`](Self::claim).
    pub fn claim_due(
        conn: &mut PgConnection,
        lease: TimeDelta,
        limit: u16,
    ) -> QueryResult<Vec<Self>> {
        check_lease(lease)?;
        let mut claimed: Vec<Self> = claim!("attempts < 10 ORDER BY available_at LIMIT $2")
            .bind::<Interval, _>(lease)
            .bind::<BigInt, _>(i64::from(limit))
            .prepared()
            .load(conn)?;
        claimed.sort_by_key(|event| (event.created_at, event.event_id));
        Ok(claimed)
    }

    /// Returns up to `limit` dead letters, in the order in which they died: open events after
    /// [`MAX_WEBHOOK_ATTEMPTS`] claims, of which the last failed or its lease ended.
    pub fn list_dead(conn: &mut PgConnection, limit: u16) -> QueryResult<Vec<Self>> {
        webhook_events::table
            .filter(is_open())
            .filter(sql::<Bool>("webhook_events.attempts >= 10"))
            .filter(webhook_events::available_at.le(now))
            .order(webhook_events::available_at)
            .limit(limit.into())
            .select(Self::as_select())
            .load(conn)
    }

    /// Claims a dead letter for one more attempt, like [`claim`](Self::claim). Marked as failed, it
    /// is a dead letter again.
    ///
    /// # Errors
    /// Those of [`claim`](Self::claim).
    pub fn retry(
        conn: &mut PgConnection,
        event_id: WebhookEventId,
        lease: TimeDelta,
    ) -> QueryResult<Option<Self>> {
        check_lease(lease)?;
        claim!("attempts >= 10 AND event_id = $2")
            .bind::<Interval, _>(lease)
            .bind::<Uuid, _>(event_id)
            .prepared()
            .get_result(conn)
            .optional()
    }

    /// Marks a claimed event as processed, and links it with the user it is about.
    ///
    /// Call it in the transaction that processes the event, as its last operation, in four round
    /// trips: it updates the user (`FOR NO KEY UPDATE`), then the event. Name the user whenever the
    /// payload tells: [`User::anonymise`](crate::models::User::anonymise) erases the payloads of
    /// linked events, and only those. A user who doesn't exist gets no link. If the user was
    /// anonymised, the event gets no link either and is erased at once; one that failed is skipped
    /// then.
    ///
    /// # Errors
    /// [`WebhookError::LeaseLost`].
    pub fn mark_processed(
        conn: &mut PgConnection,
        claimed: &Self,
        user_id: Option<UserId>,
    ) -> Result<(), WebhookError> {
        Self::mark(conn, claimed, user_id, WebhookStatus::Processed, None)
    }

    /// Marks a claimed event as skipped, because nothing has to be done. As
    /// [`mark_processed`](Self::mark_processed).
    ///
    /// # Errors
    /// [`WebhookError::LeaseLost`].
    pub fn mark_skipped(
        conn: &mut PgConnection,
        claimed: &Self,
        user_id: Option<UserId>,
    ) -> Result<(), WebhookError> {
        Self::mark(conn, claimed, user_id, WebhookStatus::Skipped, None)
    }

    /// Marks a claimed event as failed with a message, which must not contain secrets. As
    /// [`mark_processed`](Self::mark_processed), but after the processing was rolled back.
    ///
    /// The event is due again after a minute, and after twice as long for each further attempt.
    ///
    /// # Errors
    /// [`WebhookError::LeaseLost`].
    pub fn mark_failed(
        conn: &mut PgConnection,
        claimed: &Self,
        user_id: Option<UserId>,
        error_message: &str,
    ) -> Result<(), WebhookError> {
        let failed = WebhookStatus::Failed;
        Self::mark(conn, claimed, user_id, failed, Some(error_message))
    }

    fn mark(
        conn: &mut PgConnection,
        claimed: &Self,
        user_id: Option<UserId>,
        status: WebhookStatus,
        error_message: Option<&str>,
    ) -> Result<(), WebhookError> {
        // The attempts tell one claim from the next.
        let event = webhook_events::table
            .find(claimed.event_id)
            .filter(is_open())
            .filter(webhook_events::attempts.eq(claimed.attempts));
        conn.transaction(|conn| {
            let (mut linked, mut erased) = (None, false);
            if let Some(user_id) = user_id.or(claimed.user_id) {
                // An update without a change, not only a lock: at REPEATABLE READ a concurrent
                // `anonymise`, which doesn't see the new link, fails and is retried.
                let email: Option<String> = diesel::update(users::table.find(user_id))
                    .set(users::is_active.eq(users::is_active))
                    .returning(users::email)
                    .prepared()
                    .get_result(conn)
                    .optional()?;
                erased = email.as_ref() == Some(&anonymised_email(user_id));
                linked = email.filter(|_| !erased).map(|_| user_id);
            }
            let (status, error_message) = match status {
                WebhookStatus::Failed if erased => (WebhookStatus::Skipped, None),
                _ => (status, error_message),
            };
            let failed = status == WebhookStatus::Failed;
            let pause = pause(if failed { claimed.attempts } else { 0 });
            let marked = diesel::update(event)
                .set((
                    webhook_events::processing_status.eq(status),
                    webhook_events::processed_at.eq(now),
                    webhook_events::error_message.eq(error_message),
                    webhook_events::user_id.eq(linked),
                    webhook_events::available_at.eq(after(pause)),
                ))
                .prepared()
                .execute(conn)?;
            if marked == 0 {
                return Err(WebhookError::LeaseLost);
            }
            if erased {
                diesel::update(webhook_events::table.find(claimed.event_id))
                    .set(webhook_events::payload.eq(json!({})))
                    .prepared()
                    .execute(conn)?;
            }
            Ok(())
        })
    }

    /// Deletes up to `limit` events that were processed or skipped before this time, oldest first,
    /// and returns their number. Repeat until that is less than `limit`.
    ///
    /// A purged event that is delivered again counts as new: keep events longer than gateways
    /// retry. Until then, the payload of an event without a user keeps what the gateway sent about
    /// a person.
    ///
    /// # Errors
    /// A missing right: `app_admin` may delete events, and `app_user` may not.
    pub fn purge(conn: &mut PgConnection, before: DateTime<Utc>, limit: u16) -> QueryResult<usize> {
        // Two statements: PostgreSQL may evaluate a LIMIT in a subquery of DELETE more than once.
        conn.transaction(|conn| {
            let old: Vec<WebhookEventId> = webhook_events::table
                .filter(sql::<Bool>(
                    "webhook_events.processing_status IN ('processed', 'skipped')",
                ))
                .filter(webhook_events::processed_at.lt(before))
                .order(webhook_events::processed_at)
                .limit(limit.into())
                .for_update()
                .skip_locked()
                .select(webhook_events::event_id)
                .load(conn)?;
            diesel::delete(webhook_events::table.filter(webhook_events::event_id.eq_any(old)))
                .execute(conn)
        })
    }
}

#[diesel::dsl::auto_type]
fn after(time: TimeDelta) -> _ {
    let time: diesel::dsl::AsExprOf<TimeDelta, Interval> = time.into_sql::<Interval>();
    now.into_sql::<Timestamptz>() + time
}
