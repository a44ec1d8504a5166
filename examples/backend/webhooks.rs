//! The payment gateway's webhook: record and claim the event first, then process it once.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderMap, StatusCode};
use bruhmcp_db::enums::{PaymentGateway, TransactionStatus};
use bruhmcp_db::ids::{TransactionId, UserId, WebhookEventId};
use bruhmcp_db::models::{
    NewSubscriptionTransaction, NewWebhookEvent, ProPlan, Recorded, SubscriptionTransaction, User,
    UserPlan, WebhookEvent,
};
use bruhmcp_db::{Isolation, retry_transaction};
use chrono::{TimeDelta, Utc};
use diesel::pg::PgConnection;
use hmac::{Hmac, KeyInit, Mac};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::Sha256;

use crate::http::{Answer, Error, answer, blocking, header, parse};
use crate::{App, from_hex};

/// What the pro plan costs, in paise, and for how long.
const PRICE: i64 = 99_900;
const CURRENCY: &str = "INR";
const PAID: TimeDelta = TimeDelta::days(31);

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
    let event = NewWebhookEvent {
        event_id: Some(WebhookEventId::new()),
        external_event_id: header(headers, "x-razorpay-event-id")
            .ok_or(Error::Refused(400, "the event id is missing"))?,
        event_type: payload["event"]
            .as_str()
            .ok_or(Error::Refused(422, "the event type is missing"))?,
        payment_gateway: PaymentGateway::Razorpay,
        payload: &payload,
    };
    // The event is stored. If processing fails, `work` tries it again.
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

/// Processes the events that were not processed on delivery, for ever.
pub(crate) fn work(app: &App) {
    loop {
        thread::sleep(Duration::from_secs(1));
        if let Err(error) = process_due(app) {
            eprintln!("webhooks wait: {error}");
        }
    }
}

fn process_due(app: &App) -> Result<(), Error> {
    let conn = &mut app.db()?;
    // One at a time: the lease is for one event.
    while let Some(event) = WebhookEvent::claim_due(conn, LEASE, 1)?.pop() {
        process(conn, &event)?;
    }
    Ok(())
}

fn process(conn: &mut PgConnection, event: &WebhookEvent) -> Result<&'static str, Error> {
    let payment = Payment::deserialize(&event.payload["payload"]["payment"]["entity"]);
    let user_id = payment.as_ref().ok().map(|payment| payment.notes.user_id);
    if event.event_type != "payment.captured" {
        WebhookEvent::mark_skipped(conn, event, user_id)?;
        return Ok("skipped");
    }
    let processed = payment
        .map_err(|_| Error::Refused(422, "the payment was not made through this service"))
        .and_then(|payment| {
            // If the event is another worker's meanwhile, nothing of this is left.
            retry_transaction(conn, Isolation::ReadCommitted, |conn| {
                record_payment(conn, &payment)?;
                WebhookEvent::mark_processed(conn, event, user_id)?;
                Ok(())
            })
        });
    match processed {
        Ok(()) => Ok("processed"),
        Err(error) => {
            let (_, why) = error.refusal().ok_or(error)?;
            WebhookEvent::mark_failed(conn, event, user_id, &why)?;
            Ok("failed")
        }
    }
}

#[derive(Deserialize)]
struct Payment {
    id: String,
    /// In paise; so are the fee and the tax in it.
    amount: i64,
    currency: String,
    fee: i64,
    tax: i64,
    notes: Notes,
}

/// The notes that this service attached to the order.
#[derive(Deserialize)]
struct Notes {
    user_id: UserId,
}

fn record_payment(conn: &mut PgConnection, payment: &Payment) -> Result<(), Error> {
    let user_id = payment.notes.user_id;
    User::lock(conn, user_id)?;
    let plan = UserPlan::find_by_user(conn, user_id)?
        .ok_or(Error::Refused(422, "there is no such user"))?;
    let new = NewSubscriptionTransaction {
        id: Some(TransactionId::new()),
        razorpay_payment_id: Some(&payment.id),
        currency: Some(&payment.currency),
        fee_amount: Some(payment.fee.saturating_sub(payment.tax)),
        tax_amount: Some(payment.tax),
        ..NewSubscriptionTransaction::new(
            user_id,
            payment.amount,
            payment.amount.saturating_sub(payment.fee),
            TransactionStatus::Captured,
        )
    };
    match SubscriptionTransaction::record_payment(conn, &new)? {
        // A payment of less is recorded, and people decide what becomes of it.
        Recorded::New(paid) if paid.amount < PRICE || paid.currency != CURRENCY => {}
        Recorded::New(_) => {
            // A payment before the plan ends extends it.
            let begin = plan.expires_at.unwrap_or_default().max(Utc::now());
            let pro = ProPlan {
                subscription_id: plan.subscription_id.as_deref(),
                customer_id: None,
                expires_at: Some(begin + PAID),
            };
            UserPlan::upgrade(conn, user_id, &pro)?;
        }
        // Another event has reported this payment.
        Recorded::Existing(_) => {}
    }
    Ok(())
}
