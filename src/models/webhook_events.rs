//! Webhooks of the payment gateways: recorded first, processed after.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
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

/// Changes to a row: `None` keeps a column, `Some(None)` sets it to `NULL`.
#[derive(Debug, Clone, Default, AsChangeset)]
#[diesel(table_name = webhook_events)]
pub struct WebhookEventChangeset<'a> {
    /// When it was processed, skipped or failed last; `None` exactly while pending.
    pub processed_at: Option<Option<DateTime<Utc>>>,
    /// What became of it.
    pub processing_status: Option<WebhookStatus>,
    /// Why it failed.
    pub error_message: Option<Option<&'a str>>,
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

    /// Changes the row of this key and returns it as it is then; `None` where there is no such row. An empty changeset
    /// changes nothing.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn update(
        conn: &mut PgConnection,
        event_id: WebhookEventId,
        changes: &WebhookEventChangeset<'_>,
    ) -> QueryResult<Option<Self>> {
        let updated = diesel::update(webhook_events::table.find(event_id))
            .set(changes)
            .returning(Self::as_returning())
            .get_result(conn)
            .optional_empty_changeset();
        match updated {
            Ok(Some(row)) => Ok(Some(row)),
            Ok(None) => Self::find(conn, event_id),
            Err(diesel::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
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
