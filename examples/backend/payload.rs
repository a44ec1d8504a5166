//! The parts of the gateway's events that this service reads.

use bruhmcp_db::ids::UserId;
use bruhmcp_db::models::{GatewayPayment, GatewayPeriod, WebhookEvent};
use chrono::{DateTime, Utc};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::errors::Error;

#[derive(Deserialize)]
pub(crate) struct Subscription {
    pub(crate) id: String,
    /// The paid period. Times are in seconds since 1970.
    pub(crate) current_start: Option<i64>,
    pub(crate) current_end: Option<i64>,
}

#[derive(Deserialize)]
pub(crate) struct Payment {
    pub(crate) id: String,
    /// In paise; so is the fee, which includes the tax on it.
    pub(crate) amount: i64,
    pub(crate) currency: String,
    pub(crate) fee: Option<i64>,
    pub(crate) created_at: i64,
    /// Such as captured or failed.
    #[serde(default)]
    pub(crate) status: String,
    pub(crate) method: Option<String>,
    pub(crate) error_description: Option<String>,
    /// Only payments of subscriptions have an invoice.
    pub(crate) invoice_id: Option<String>,
    /// An empty list if there are none.
    #[serde(default)]
    pub(crate) notes: Value,
}

#[derive(Deserialize)]
pub(crate) struct Refund {
    pub(crate) id: String,
    pub(crate) amount: i64,
    pub(crate) created_at: i64,
}

impl Subscription {
    pub(crate) fn period(&self) -> Result<GatewayPeriod, Error> {
        let (start, end) = self.current_start.zip(self.current_end).ok_or(MALFORMED)?;
        Ok(GatewayPeriod {
            start: time(start)?,
            end: time(end)?,
        })
    }
}

impl Payment {
    pub(crate) fn reported(&self) -> Result<GatewayPayment<'_>, Error> {
        Ok(GatewayPayment {
            razorpay_payment_id: &self.id,
            amount: self.amount,
            fee_amount: self.fee.unwrap_or_default(),
            currency: &self.currency,
            at: time(self.created_at)?,
            method: self.method.as_deref(),
            failure_reason: self.error_description.as_deref(),
        })
    }
}

pub(crate) const MALFORMED: Error =
    Error::Refused(422, "a part of the event is missing or malformed");

/// The user whom this service noted on the order.
pub(crate) fn noted_user(notes: &Value) -> Option<UserId> {
    UserId::deserialize(&notes["user_id"]).ok()
}

pub(crate) fn part<T: DeserializeOwned>(event: &WebhookEvent, name: &str) -> Result<T, Error> {
    T::deserialize(&event.payload["payload"][name]["entity"]).map_err(|_| MALFORMED)
}

pub(crate) fn optional_part<T: DeserializeOwned>(
    event: &WebhookEvent,
    name: &str,
) -> Result<Option<T>, Error> {
    match event.payload["payload"][name] {
        Value::Null => Ok(None),
        _ => part(event, name).map(Some),
    }
}

/// Refuses what PostgreSQL can't store.
pub(crate) fn time(seconds: i64) -> Result<DateTime<Utc>, Error> {
    // Until the end of the year 9999.
    let seconds = Some(seconds).filter(|seconds| (0..253_402_300_800).contains(seconds));
    let time = seconds.and_then(|seconds| DateTime::from_timestamp(seconds, 0));
    time.ok_or(MALFORMED)
}
