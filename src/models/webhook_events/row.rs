//! The row. Without the feature `operations`, it is all that the crate has of the table.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;
use serde_json::Value;

use crate::enums::{PaymentGateway, WebhookStatus};
use crate::ids::{UserId, WebhookEventId};
use crate::schema::webhook_events;

/// A row of `webhook_events`.
///
/// The table is a queue. A worker claims an event for the time of a lease, processes it in a
/// transaction of its own, and marks it there:
///
/// ```no_run
/// # use bruhmcp_db::ids::UserId;
/// # use bruhmcp_db::models::{WebhookError, WebhookEvent};
/// # use chrono::TimeDelta;
/// # use diesel::{Connection, PgConnection};
/// # fn user_of(_: &WebhookEvent) -> Option<UserId> { None }
/// # fn process(_: &mut PgConnection, _: &WebhookEvent) -> Result<(), WebhookError> { Ok(()) }
/// /// Returns the number of events that were due.
/// fn work(conn: &mut PgConnection) -> Result<usize, WebhookError> {
///     // Outside a transaction, so that the claims are committed at once.
///     let claimed = WebhookEvent::claim_due(conn, TimeDelta::minutes(5), 10)?;
///     for event in &claimed {
///         let user_id = user_of(event);
///         let done = conn.transaction(|conn| {
///             process(conn, event)?;
///             WebhookEvent::mark_processed(conn, event, user_id)
///         });
///         match done {
///             // Another worker has the event; what this one did is rolled back.
///             Ok(()) | Err(WebhookError::LeaseLost) => {}
///             Err(_) => WebhookEvent::mark_failed(conn, event, user_id, "not processed")?,
///         }
///     }
///     Ok(claimed.len())
/// }
/// ```
///
/// A worker that dies costs its lease: the event is due again when that ends. After
/// [`MAX_WEBHOOK_ATTEMPTS`](crate::models::MAX_WEBHOOK_ATTEMPTS) claims it is a dead letter, which
/// [`list_dead`](Self::list_dead) shows and [`retry`](Self::retry) claims once more.
///
/// A page of the failed events; `'pending'` works the same way. The status is a literal, so that the
/// planner uses the index of the queue:
///
/// ```no_run
/// # use bruhmcp_db::models::WebhookEvent;
/// # use bruhmcp_db::schema::webhook_events as t;
/// # use chrono::{DateTime, Utc};
/// # use diesel::dsl::sql;
/// # use diesel::prelude::*;
/// # use diesel::sql_types::Bool;
/// fn failed(conn: &mut PgConnection, after: &WebhookEvent) -> QueryResult<Vec<WebhookEvent>> {
///     t::table
///         .filter(sql::<Bool>("processing_status = 'failed' AND attempts < 10"))
///         .filter(t::available_at.ge(after.available_at))
///         .filter((t::available_at.gt(after.available_at)).or(t::event_id.gt(after.event_id)))
///         .order((t::available_at, t::event_id))
///         .limit(50)
///         .select(WebhookEvent::as_select())
///         .load(conn)
/// }
/// ```
#[derive(
    Debug, Clone, PartialEq, Eq, Serialize, Queryable, QueryableByName, Selectable, Identifiable,
)]
#[diesel(table_name = webhook_events, primary_key(event_id), check_for_backend(Pg))]
#[expect(missing_docs, reason = "the other fields explain themselves")]
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
    /// What the gateway sent; `{}` once it is erased.
    pub payload: Value,
    pub processing_status: WebhookStatus,
    /// The reason for the last failure.
    pub error_message: Option<String>,
    pub created_at: DateTime<Utc>,
    /// Whom the event is about, if a worker has said so.
    pub user_id: Option<UserId>,
    /// The number of claims so far.
    pub attempts: i32,
    /// The end of a lease, or of the pause after a failure.
    pub available_at: DateTime<Utc>,
}
