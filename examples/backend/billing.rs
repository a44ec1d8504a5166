//! What the gateway's events mean: a change of a subscription, a payment, a refund, or nothing.
//! Everything here can come twice and in any order.

use bruhmcp_db::enums::{PlanType, TransactionStatus};
use bruhmcp_db::ids::{TransactionId, UserId};
use bruhmcp_db::models::{
    GatewayChange, GatewayEvent, NewRefund, NewSubscriptionTransaction, ProPlan, Recorded,
    SubscriptionTransaction, User, UserPlan, UserSubscription, WebhookEvent,
};
use chrono::{TimeDelta, Utc};
use diesel::pg::PgConnection;
use diesel::prelude::QueryResult;

use crate::errors::Error;
use crate::payload::{
    MALFORMED, Payment, Refund, Subscription, noted_user, optional_part, part, time,
};

/// What a month of the pro plan costs, in paise.
pub(crate) const PRICE: i64 = 99_900;
const CURRENCY: &str = "INR";
/// What a payment without a subscription buys.
const PAID: TimeDelta = TimeDelta::days(31);

/// Does what the event means, and returns whether it means anything to this service.
pub(crate) fn carry_out(conn: &mut PgConnection, event: &WebhookEvent) -> Result<bool, Error> {
    match event.event_type.as_str() {
        "payment.captured" => {
            let payment: Payment = part(event, "payment")?;
            // The event of the subscription carries the same payment, with the period it pays.
            if payment.invoice_id.is_some() {
                return Ok(false);
            }
            record_payment(conn, &payment)?;
            Ok(true)
        }
        "refund.processed" => {
            let (payment, refund) = (part(event, "payment")?, part(event, "refund")?);
            record_refund(conn, event, &payment, &refund)?;
            Ok(true)
        }
        name if name.starts_with("subscription.") => change_subscription(conn, event),
        _ => Ok(false),
    }
}

/// Returns whom the event is about, so that the payload is erased with the account.
pub(crate) fn user_of(
    conn: &mut PgConnection,
    event: &WebhookEvent,
) -> QueryResult<Option<UserId>> {
    let payload = &event.payload["payload"];
    if let Some(id) = payload["subscription"]["entity"]["id"].as_str() {
        if let Some(row) = UserSubscription::find_by_razorpay_id(conn, id)? {
            return Ok(Some(row.user_id));
        }
    }
    let payment = &payload["payment"]["entity"];
    if let Some(user_id) = noted_user(&payment["notes"]) {
        return Ok(Some(user_id));
    }
    match payment["id"].as_str() {
        Some(id) => {
            let row = SubscriptionTransaction::find_by_razorpay_id(conn, id)?;
            Ok(row.map(|row| row.user_id))
        }
        None => Ok(None),
    }
}

fn change_subscription(conn: &mut PgConnection, event: &WebhookEvent) -> Result<bool, Error> {
    let subscription: Subscription = part(event, "subscription")?;
    // The last attempt to pay, also one that failed.
    let attempt: Option<Payment> = optional_part(event, "payment")?;
    let status = attempt.as_ref().map(|it| it.status.as_str());
    let payment = attempt.as_ref().map(Payment::reported).transpose()?;
    let change = match (event.event_type.as_str(), payment, status) {
        ("subscription.authenticated", ..) => GatewayChange::Authenticated,
        ("subscription.activated", Some(payment), Some("captured")) => GatewayChange::Activated {
            period: subscription.period()?,
            payment: Some(payment),
        },
        // Active, but this period is not paid yet. This service sells no trial.
        ("subscription.activated", ..) => GatewayChange::Resumed,
        ("subscription.charged", Some(payment), Some("captured")) => GatewayChange::Renewed {
            period: subscription.period()?,
            payment,
        },
        ("subscription.charged", ..) => return Err(MALFORMED),
        ("subscription.pending", Some(payment), Some("failed")) => {
            GatewayChange::PaymentFailed { payment }
        }
        ("subscription.halted", ..) => GatewayChange::Halted,
        ("subscription.cancelled", ..) => GatewayChange::Cancelled,
        ("subscription.completed", ..) => GatewayChange::Completed,
        ("subscription.paused", ..) => GatewayChange::Paused { resume_at: None },
        ("subscription.resumed", ..) => GatewayChange::Resumed,
        _ => return Ok(false),
    };
    apply(conn, event, &subscription.id, change)?;
    Ok(true)
}

/// Takes a change through subscription, payment and plan, unless the payment is less than the price:
/// then nothing is changed, and people decide.
fn apply(
    conn: &mut PgConnection,
    event: &WebhookEvent,
    razorpay_subscription_id: &str,
    change: GatewayChange<'_>,
) -> Result<(), Error> {
    let pays = matches!(
        change,
        GatewayChange::Activated { .. } | GatewayChange::Renewed { .. }
    );
    let at = event.payload["created_at"].as_i64().ok_or(MALFORMED)?;
    let event = GatewayEvent {
        razorpay_subscription_id,
        at: time(at)?,
        change,
    };
    let applied = UserSubscription::apply(conn, &event)?;
    let price = applied.subscription.total_amount;
    match applied.payment {
        Some(it) if pays && (it.amount < price || it.currency != CURRENCY) => {
            Err(Error::Refused(422, "the payment is less than the price"))
        }
        _ => Ok(()),
    }
}

/// Records a payment that a user made without a subscription, and extends the plan once.
fn record_payment(
    conn: &mut PgConnection,
    payment: &Payment,
) -> Result<SubscriptionTransaction, Error> {
    let user_id = noted_user(&payment.notes).ok_or(Error::Refused(
        422,
        "the payment was not made through this service",
    ))?;
    User::lock(conn, user_id)?;
    let plan = UserPlan::find_by_user(conn, user_id)?
        .ok_or(Error::Refused(422, "there is no such user"))?;
    let reported = payment.reported()?;
    let new = NewSubscriptionTransaction {
        id: Some(TransactionId::new()),
        razorpay_payment_id: Some(reported.razorpay_payment_id),
        currency: Some(reported.currency),
        fee_amount: Some(reported.fee_amount),
        method: reported.method,
        processed_at: Some(reported.at),
        ..NewSubscriptionTransaction::new(
            user_id,
            reported.amount,
            reported.amount.saturating_sub(reported.fee_amount),
            TransactionStatus::Captured,
        )
    };
    let paid = match SubscriptionTransaction::record_payment(conn, &new)? {
        Recorded::New(paid) => paid,
        // Another event has reported this payment.
        Recorded::Existing(paid) => return Ok(paid),
    };
    let never_ends = plan.plan_type == PlanType::Pro && plan.expires_at.is_none();
    // A payment of less is recorded, and people decide what becomes of it.
    if buys_the_plan(&paid) && !never_ends {
        // A payment before the plan ends extends it. Without the subscription's id, the plan lasts
        // until then whatever the subscription does.
        let begin = plan.expires_at.unwrap_or_default().max(Utc::now());
        let pro = ProPlan {
            expires_at: Some(begin + PAID),
            ..ProPlan::default()
        };
        UserPlan::upgrade(conn, user_id, &pro)?;
    }
    Ok(paid)
}

fn record_refund(
    conn: &mut PgConnection,
    event: &WebhookEvent,
    payment: &Payment,
    refund: &Refund,
) -> Result<(), Error> {
    let new = NewRefund {
        processed_at: Some(time(refund.created_at)?),
        ..NewRefund::new(&refund.id, refund.amount)
    };
    if payment.invoice_id.is_some() {
        let id = subscription_of(conn, &payment.id)?;
        // The invoice doesn't name the subscription; the event of the payment does.
        let id = id.ok_or(Error::Refused(409, "the payment is not recorded yet"))?;
        let payment = payment.reported()?;
        let refund = new;
        return apply(
            conn,
            event,
            &id,
            GatewayChange::Refunded { payment, refund },
        );
    }
    let paid = record_payment(conn, payment)?;
    let recorded = SubscriptionTransaction::refund(conn, paid.id, &new)?;
    let paid = SubscriptionTransaction::find(conn, paid.id)?.unwrap_or(paid);
    let in_whole = paid.status == TransactionStatus::Refunded;
    if matches!(recorded, Recorded::New(_)) && in_whole && buys_the_plan(&paid) {
        take_back(conn, paid.user_id)?;
    }
    Ok(())
}

/// Takes the time back that a payment bought. The worker ends a plan whose time is over.
fn take_back(conn: &mut PgConnection, user_id: UserId) -> Result<(), Error> {
    let plan = UserPlan::find_by_user(conn, user_id)?;
    // A plan that a subscription has taken over lasts as long as that is paid.
    let granted = plan.filter(|plan| plan.subscription_id.is_none());
    if let Some(end) = granted.and_then(|plan| plan.expires_at) {
        let pro = ProPlan {
            expires_at: Some(end - PAID),
            ..ProPlan::default()
        };
        UserPlan::upgrade(conn, user_id, &pro)?;
    }
    Ok(())
}

fn subscription_of(conn: &mut PgConnection, payment_id: &str) -> QueryResult<Option<String>> {
    let payment = SubscriptionTransaction::find_by_razorpay_id(conn, payment_id)?;
    match payment.and_then(|payment| payment.subscription_id) {
        Some(id) => {
            let subscription = UserSubscription::find(conn, id)?;
            Ok(subscription.and_then(|row| row.razorpay_subscription_id))
        }
        None => Ok(None),
    }
}

fn buys_the_plan(paid: &SubscriptionTransaction) -> bool {
    paid.amount >= PRICE && paid.currency == CURRENCY
}
