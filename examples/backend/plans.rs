//! The user's plan, and the subscription that pays for it.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use bruhmcp_db::enums::{SubscriptionPlan, SubscriptionStatus};
use bruhmcp_db::ids::{SubscriptionId, UserId};
use bruhmcp_db::models::{
    GatewayChange, GatewayEvent, NewUserSubscription, User, UserPlan, UserSubscription,
    UserSubscriptionChangeset,
};
use bruhmcp_db::{Isolation, Page, retry_transaction};
use chrono::Utc;
use serde_json::json;

use crate::App;
use crate::billing::PRICE;
use crate::errors::{Error, NOT_FOUND};
use crate::http::{Answer, Bearer, answer, blocking};
use crate::sessions::user;

pub(crate) async fn show(State(app): State<Arc<App>>, bearer: Bearer) -> Answer {
    blocking(app, move |app| {
        let user_id = user(app, &bearer)?;
        let conn = &mut app.db()?;
        let plan = UserPlan::find_by_user(conn, user_id)?.ok_or(NOT_FOUND)?;
        let subscription = UserSubscription::current(conn, user_id)?;
        let body = json!({ "plan": plan, "subscription": subscription });
        answer(StatusCode::OK, body)
    })
    .await
}

/// Prepares a subscription to the pro plan, which the user confirms at the gateway. Its events make
/// it active.
pub(crate) async fn subscribe(State(app): State<Arc<App>>, bearer: Bearer) -> Answer {
    blocking(app, move |app| {
        let user_id = user(app, &bearer)?;
        // The row comes first: whoever asks again continues with it, also if this process dies.
        let prepared = prepare(app, user_id)?;
        if prepared.razorpay_subscription_id.is_some() {
            return answer(StatusCode::OK, json!({ "subscription": prepared }));
        }
        let gateway_id = stand_in_for_the_gateway(prepared.id);
        let changes = UserSubscriptionChangeset {
            razorpay_subscription_id: Some(Some(&gateway_id)),
            ..UserSubscriptionChangeset::default()
        };
        let status = prepared.status;
        let conn = &mut app.db()?;
        let row = UserSubscription::change_status(conn, prepared.id, status, status, &changes)?;
        answer(StatusCode::CREATED, json!({ "subscription": row }))
    })
    .await
}

/// Returns the subscription that the user has not confirmed yet, or a new one.
fn prepare(app: &App, user_id: UserId) -> Result<UserSubscription, Error> {
    use SubscriptionStatus::{Authenticated, Created};
    retry_transaction(&mut *app.db()?, Isolation::ReadCommitted, |conn| {
        let user = User::lock(conn, user_id)?.ok_or(NOT_FOUND)?;
        if UserSubscription::current(conn, user_id)?.is_some() {
            return Err(Error::Refused(409, "there is a subscription"));
        }
        let newest = UserSubscription::list_by_user(conn, user_id, Page::first(1))?.pop();
        if let Some(row) = newest.filter(|row| matches!(row.status, Created | Authenticated)) {
            return Ok(row);
        }
        let new = NewUserSubscription {
            plan_code: Some(SubscriptionPlan::Pro),
            razorpay_customer_id: user.razorpay_customer_id.as_deref(),
            total_amount: Some(PRICE),
            ..NewUserSubscription::new(user_id)
        };
        Ok(UserSubscription::start(conn, &new, Created)?)
    })
}

/// Lets the subscription end with its period. Until then the plan stays.
pub(crate) async fn cancel(State(app): State<Arc<App>>, bearer: Bearer) -> Answer {
    blocking(app, move |app| {
        let user_id = user(app, &bearer)?;
        let conn = &mut app.db()?;
        let current = UserSubscription::current(conn, user_id)?.ok_or(NOT_FOUND)?;
        // Here the backend tells the gateway, which sends no event before the end of the period.
        let event = GatewayEvent {
            razorpay_subscription_id: current.razorpay_subscription_id.as_deref().unwrap_or(""),
            at: Utc::now(),
            change: GatewayChange::CancelledAtPeriodEnd,
        };
        let applied = retry_transaction(conn, Isolation::ReadCommitted, |conn| {
            UserSubscription::apply(conn, &event)
        })?;
        let body = json!({ "plan": applied.plan, "subscription": applied.subscription });
        answer(StatusCode::OK, body)
    })
    .await
}

/// Stands for the HTTP request, with a timeout, that creates the subscription at the gateway, once
/// for this key. Returns its id there.
fn stand_in_for_the_gateway(key: SubscriptionId) -> String {
    format!("sub_{}", key.0.simple())
}
