//! The payment gateway's webhook: check the signature, record and claim the event, then process it
//! once.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderMap, StatusCode};
use bruhmcp_db::enums::PaymentGateway;
use bruhmcp_db::models::{NewWebhookEvent, Recorded, WebhookEvent};
use bruhmcp_db::{Isolation, retry_transaction};
use chrono::TimeDelta;
use diesel::pg::PgConnection;
use hmac::{Hmac, KeyInit, Mac};
use serde_json::{Value, json};
use sha2::Sha256;

use crate::errors::Error;
use crate::http::{Answer, answer, blocking, header, parse};
use crate::{App, billing, from_hex};

/// Longer than processing takes. An event whose worker died is free again after this time.
const LEASE: TimeDelta = TimeDelta::minutes(1);

pub(crate) async fn razorpay(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Answer {
    let body = body?;
    blocking(app, move |app| receive(app, &headers, &body)).await
}

fn receive(app: &App, headers: &HeaderMap, body: &[u8]) -> Answer {
    let signature = header(headers, "x-razorpay-signature").and_then(from_hex);
    let mut mac = Hmac::<Sha256>::new_from_slice(app.webhook_secret.expose().as_bytes())
        .map_err(|_| Error::Internal("no HMAC"))?;
    mac.update(body);
    // Compares in constant time.
    mac.verify_slice(&signature.unwrap_or_default())
        .map_err(|_| Error::Refused(401, "the signature is wrong"))?;

    let payload: Value = parse(body)?;
    let conn = &mut app.db()?;
    let is_short = |text: &&str| (1..=255).contains(&text.len());
    let external_id = header(headers, "x-razorpay-event-id")
        .filter(is_short)
        .ok_or(Error::Refused(400, "the event id is missing"))?;
    let event_type = payload["event"]
        .as_str()
        .filter(is_short)
        .ok_or(Error::Refused(422, "the event type is missing"))?;
    // The id isn't signed: who has seen an event can send it again with another one. So processing
    // doesn't rely on it, and does nothing twice.
    let event = NewWebhookEvent::new(PaymentGateway::Razorpay, external_id, event_type, &payload);
    // The event is stored. If processing fails, the worker tries it again.
    let claimed = match WebhookEvent::record_claimed(conn, &event, LEASE)? {
        Recorded::New(event) => Some(event),
        Recorded::Existing(event) => WebhookEvent::claim(conn, event.event_id, LEASE)?,
    };
    let status = match claimed {
        Some(event) => process(conn, &event)?,
        None => "duplicate",
    };
    answer(StatusCode::OK, json!({ "status": status }))
}

/// Processes an event that was not processed on delivery, because that failed or its process died.
/// Returns whether there was one.
pub(crate) fn process_due(app: &App) -> Result<bool, Error> {
    let conn = &mut app.db()?;
    // One at a time: the lease is for one event.
    match WebhookEvent::claim_due(conn, LEASE, 1)?.pop() {
        Some(event) => process(conn, &event).map(|_| true),
        None => Ok(false),
    }
}

fn process(conn: &mut PgConnection, event: &WebhookEvent) -> Result<&'static str, Error> {
    let user_id = billing::user_of(conn, event)?;
    // If the event is another worker's meanwhile, nothing of this is left.
    let processed: Result<_, Error> = retry_transaction(conn, Isolation::ReadCommitted, |conn| {
        if billing::carry_out(conn, event)? {
            WebhookEvent::mark_processed(conn, event, user_id)?;
            Ok("processed")
        } else {
            WebhookEvent::mark_skipped(conn, event, user_id)?;
            Ok("skipped")
        }
    });
    match processed {
        Ok(status) => Ok(status),
        Err(error) => {
            let why = error.reason().ok_or(error)?;
            WebhookEvent::mark_failed(conn, event, user_id, &why)?;
            Ok("failed")
        }
    }
}
