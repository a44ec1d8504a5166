//! Webhooks of the payment gateways: recorded first, then processed.

use chrono::{DateTime, Utc};
use diesel::dsl::{now, sql};
use diesel::expression::SqlLiteral;
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::sql_types::Bool;
use serde::Serialize;
use serde_json::Value;

use crate::enums::{PaymentGateway, WebhookStatus};
use crate::ids::WebhookEventId;
use crate::models::Recorded;
use crate::schema::webhook_events;

/// A row of `webhook_events`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable)]
#[diesel(table_name = webhook_events, primary_key(event_id), check_for_backend(Pg))]
#[expect(missing_docs, reason = "the names of the other fields say it all")]
pub struct WebhookEvent {
    pub event_id: WebhookEventId,
    /// The gateway's id of the event; unique per gateway, not empty.
    pub external_event_id: String,
    /// The event's type in the gateway's words.
    pub event_type: String,
    pub payment_gateway: PaymentGateway,
    /// The time of the last processing, skip or failure; `None` if and only if the event is
    /// pending.
    pub processed_at: Option<DateTime<Utc>>,
    pub payload: Value,
    pub processing_status: WebhookStatus,
    /// The reason for the last failure.
    pub error_message: Option<String>,
    pub created_at: DateTime<Utc>,
}

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

/// Pending or failed: the predicate of the index `webhook_events_created_at_idx`. It is a literal
/// because the planner can't match bind parameters with a partial index.
fn is_open() -> SqlLiteral<Bool> {
    sql("webhook_events.processing_status IN ('pending', 'failed')")
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
    /// An existing event keeps its first payload. If its status is failed, try it again now. It
    /// locks no existing event, so a delivery doesn't wait for a worker. Commit before processing,
    /// or a failure loses the event.
    ///
    /// # Errors
    /// Violated constraints, such as an empty external id.
    pub fn record(
        conn: &mut PgConnection,
        new: &NewWebhookEvent<'_>,
    ) -> QueryResult<Recorded<Self>> {
        loop {
            let inserted = diesel::insert_into(webhook_events::table)
                .values(new)
                .on_conflict((
                    webhook_events::payment_gateway,
                    webhook_events::external_event_id,
                ))
                .do_nothing()
                .returning(Self::as_returning())
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

    /// Claims a pending or failed event for a worker that processes it. Returns `None` if it is
    /// closed, claimed by another worker or missing.
    ///
    /// Call it in a transaction that marks the event at its end: the row stays locked until that
    /// ends. Process the event in a nested `conn.transaction`, so that a failure is rolled back
    /// before the event is [marked failed](Self::mark_failed). If the worker dies, the event is
    /// open again.
    pub fn claim(conn: &mut PgConnection, event_id: WebhookEventId) -> QueryResult<Option<Self>> {
        webhook_events::table
            .find(event_id)
            .filter(is_open())
            .for_update()
            .skip_locked()
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Claims up to `limit` events like [`claim`](Self::claim), oldest first: pending ones, and
    /// those that failed before `retry_before`. `None` claims only pending ones.
    ///
    /// Other workers skip them. With `retry_before` some minutes ago, an event that keeps failing
    /// does not block the queue.
    pub fn claim_due(
        conn: &mut PgConnection,
        retry_before: Option<DateTime<Utc>>,
        limit: u16,
    ) -> QueryResult<Vec<Self>> {
        webhook_events::table
            .filter(is_open())
            .filter(
                webhook_events::processed_at
                    .is_null()
                    .or(webhook_events::processed_at.lt(retry_before)),
            )
            .order((webhook_events::created_at, webhook_events::event_id))
            .limit(limit.into())
            .for_update()
            .skip_locked()
            .select(Self::as_select())
            .load(conn)
    }

    /// Marks an open event as processed. Returns false if there is none.
    pub fn mark_processed(conn: &mut PgConnection, event_id: WebhookEventId) -> QueryResult<bool> {
        Self::mark(conn, event_id, WebhookStatus::Processed, None)
    }

    /// Marks an open event as skipped: nothing has to be done. Returns false if there is none.
    pub fn mark_skipped(conn: &mut PgConnection, event_id: WebhookEventId) -> QueryResult<bool> {
        Self::mark(conn, event_id, WebhookStatus::Skipped, None)
    }

    /// Marks an open event as failed with a message, which must not contain secrets. Returns false
    /// if there is none.
    pub fn mark_failed(
        conn: &mut PgConnection,
        event_id: WebhookEventId,
        error_message: &str,
    ) -> QueryResult<bool> {
        Self::mark(conn, event_id, WebhookStatus::Failed, Some(error_message))
    }

    fn mark(
        conn: &mut PgConnection,
        event_id: WebhookEventId,
        status: WebhookStatus,
        error_message: Option<&str>,
    ) -> QueryResult<bool> {
        diesel::update(webhook_events::table.find(event_id))
            .filter(is_open())
            .set((
                webhook_events::processing_status.eq(status),
                webhook_events::processed_at.eq(now),
                webhook_events::error_message.eq(error_message),
            ))
            .execute(conn)
            .map(|marked| marked == 1)
    }

    /// Deletes up to `limit` events that were processed or skipped before this time, and returns
    /// their number. Repeat until that is less than `limit`.
    ///
    /// A purged event that is delivered again counts as new: keep events longer than gateways
    /// retry. Each call reads the table up to the last row it deletes.
    ///
    /// # Errors
    /// A missing right: `app_admin` may delete events, and `app_user` may not.
    pub fn purge(conn: &mut PgConnection, before: DateTime<Utc>, limit: u16) -> QueryResult<usize> {
        // Two statements: PostgreSQL may evaluate a LIMIT in a subquery of DELETE more than once.
        conn.transaction(|conn| {
            let closed = [WebhookStatus::Processed, WebhookStatus::Skipped];
            let old: Vec<WebhookEventId> = webhook_events::table
                .filter(webhook_events::processing_status.eq_any(closed))
                .filter(webhook_events::processed_at.lt(before))
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
