//! Webhooks of the payment gateways: recorded first, processed after.

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
use crate::schema::webhook_events;

/// A row of `webhook_events`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable)]
#[diesel(table_name = webhook_events, primary_key(event_id), check_for_backend(Pg))]
pub struct WebhookEvent {
    /// Key.
    pub event_id: WebhookEventId,
    /// The gateway's id of the event; unique together with the gateway, not empty.
    pub external_event_id: String,
    /// What happened, in the gateway's words.
    pub event_type: String,
    /// Who sent it.
    pub payment_gateway: PaymentGateway,
    /// When it was processed, skipped or failed last; `None` exactly while pending.
    pub processed_at: Option<DateTime<Utc>>,
    /// What was sent.
    pub payload: Value,
    /// What became of it.
    pub processing_status: WebhookStatus,
    /// Why it failed.
    pub error_message: Option<String>,
    /// When it arrived first.
    pub created_at: DateTime<Utc>,
}

/// A new row; `None` leaves a column to its default.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = webhook_events, check_for_backend(Pg))]
pub struct NewWebhookEvent<'a> {
    /// Key.
    pub event_id: Option<WebhookEventId>,
    /// The gateway's id of the event; unique together with the gateway, not empty.
    pub external_event_id: &'a str,
    /// What happened, in the gateway's words.
    pub event_type: &'a str,
    /// Who sent it.
    pub payment_gateway: PaymentGateway,
    /// What was sent.
    pub payload: &'a Value,
}

/// What an arriving webhook is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recorded {
    /// It arrived for the first time.
    New(WebhookEvent),
    /// It arrived before, and is pending, processed or skipped. The row, its payload too, is that of the first time.
    Duplicate(WebhookEvent),
    /// It arrived before and its processing failed: worth another try now.
    FailedEarlier(WebhookEvent),
}

/// Pending or failed: the predicate of the index `webhook_events_created_at_idx`. A literal: the planner can't match bound
/// values with a partial index.
fn is_open() -> SqlLiteral<Bool> {
    sql("webhook_events.processing_status IN ('pending', 'failed')")
}

impl WebhookEvent {
    /// Inserts a row and returns it with its defaults.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn insert(conn: &mut PgConnection, new: &NewWebhookEvent<'_>) -> QueryResult<Self> {
        diesel::insert_into(webhook_events::table)
            .values(new)
            .returning(Self::as_returning())
            .get_result(conn)
    }

    /// The row of this key, if there is one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find(conn: &mut PgConnection, event_id: WebhookEventId) -> QueryResult<Option<Self>> {
        webhook_events::table
            .find(event_id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// The event that a gateway calls by this id.
    ///
    /// # Errors
    /// Only those of the connection.
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

    /// Records a webhook before anything is done about it. Of one that is delivered many times at once, one call gets
    /// [`Recorded::New`].
    ///
    /// One statement where it is new, two where it isn't. Takes no lock of an event that is here, so that a gateway's
    /// delivery doesn't wait for a worker. Commit before processing: an event rolled back with its processing is lost.
    ///
    /// # Errors
    /// Rules of the table, as an empty id.
    pub fn record(conn: &mut PgConnection, new: &NewWebhookEvent<'_>) -> QueryResult<Recorded> {
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
            // None if it was purged meanwhile: then it is new again.
            if let Some(event) =
                Self::find_by_external_id(conn, new.payment_gateway, new.external_event_id)?
            {
                return Ok(match event.processing_status {
                    WebhookStatus::Failed => Recorded::FailedEarlier(event),
                    _ => Recorded::Duplicate(event),
                });
            }
        }
    }

    /// Takes an event to process it: locks it until the caller's transaction ends. `None` where it is processed or
    /// skipped, another worker has it, or there is none.
    ///
    /// To be called in a transaction that marks the event at its end. What processing changes belongs into a
    /// `conn.transaction` within it, so that the event can be [marked failed](Self::mark_failed) after that was rolled
    /// back. A worker that dies leaves the event as it was.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn take(conn: &mut PgConnection, event_id: WebhookEventId) -> QueryResult<Option<Self>> {
        webhook_events::table
            .find(event_id)
            .filter(is_open())
            .for_update()
            .skip_locked()
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// As [`take`](Self::take), of all events that wait: those pending, and those failed that were tried last before
    /// `retry_before`; `None`: only those pending. Oldest first, `limit` at most.
    ///
    /// Several workers share the queue: an event that another has is passed over. One that fails each time keeps nobody
    /// waiting, as long as `retry_before` lies some minutes back.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn take_open(
        conn: &mut PgConnection,
        retry_before: Option<DateTime<Utc>>,
        limit: i64,
    ) -> QueryResult<Vec<Self>> {
        webhook_events::table
            .filter(is_open())
            .filter(
                webhook_events::processed_at
                    .is_null()
                    .or(webhook_events::processed_at.lt(retry_before)),
            )
            .order((webhook_events::created_at, webhook_events::event_id))
            .limit(limit)
            .for_update()
            .skip_locked()
            .select(Self::as_select())
            .load(conn)
    }

    /// Marks an open event as processed. False where there is none: it was processed or skipped before.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn mark_processed(conn: &mut PgConnection, event_id: WebhookEventId) -> QueryResult<bool> {
        Self::mark(conn, event_id, WebhookStatus::Processed, None)
    }

    /// Marks an open event as of no interest. False where there is none: it was processed or skipped before.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn mark_skipped(conn: &mut PgConnection, event_id: WebhookEventId) -> QueryResult<bool> {
        Self::mark(conn, event_id, WebhookStatus::Skipped, None)
    }

    /// Marks an open event as failed, and why, without secrets. False where there is none: it was processed or skipped
    /// before, and stays so.
    ///
    /// # Errors
    /// Only those of the connection.
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

    /// Deletes events that were processed or skipped before a moment, `limit` at most; says how many. Call it until that is
    /// less than `limit`.
    ///
    /// An event that a gateway delivers again after that is new: keep them longer than any gateway retries. Each call reads
    /// the table up to the last row it deletes.
    ///
    /// # Errors
    /// Only those of the connection, and a missing right to delete.
    pub fn purge(conn: &mut PgConnection, before: DateTime<Utc>, limit: i64) -> QueryResult<usize> {
        // Two statements: a LIMIT in a subquery of DELETE may be evaluated more than once.
        conn.transaction(|conn| {
            let closed = [WebhookStatus::Processed, WebhookStatus::Skipped];
            let old: Vec<WebhookEventId> = webhook_events::table
                .filter(webhook_events::processing_status.eq_any(closed))
                .filter(webhook_events::processed_at.lt(before))
                .limit(limit)
                .for_update()
                .skip_locked()
                .select(webhook_events::event_id)
                .load(conn)?;
            diesel::delete(webhook_events::table.filter(webhook_events::event_id.eq_any(old)))
                .execute(conn)
        })
    }

    /// Deletes the row of this key; says whether there was one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn delete(conn: &mut PgConnection, event_id: WebhookEventId) -> QueryResult<bool> {
        diesel::delete(webhook_events::table.find(event_id))
            .execute(conn)
            .map(|deleted| deleted == 1)
    }
}
