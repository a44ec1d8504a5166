//! The gateway's events: one operation applies each to subscription, payment and plan.

use chrono::{DateTime, TimeDelta, Utc};
use diesel::dsl::{max, now};
use diesel::prelude::*;
use diesel::result::Error;
use diesel::sql_types::Timestamptz;
use serde::Serialize;

use super::UserSubscription;
use crate::enums::{
    PlanPaymentStatus, PlanType, SubscriptionPlan, SubscriptionStatus, TransactionStatus,
    TransactionType,
};
use crate::error::violates;
use crate::ids::{SubscriptionId, UserId};
use crate::models::{
    McpInstance, NewRefund, NewSubscriptionTransaction, PaymentError, Recorded,
    SubscriptionTransaction, SubscriptionTransactionChangeset, UserPlan,
};
use crate::prepared::Prepare;
use crate::schema::{subscription_transactions, user_plans, user_subscriptions, users};

/// What happened to a subscription at Razorpay.
#[derive(Debug, Clone)]
pub struct GatewayEvent<'a> {
    /// The subscription's id at Razorpay.
    pub razorpay_subscription_id: &'a str,
    /// The time of the event at the gateway, not of its delivery.
    pub at: DateTime<Utc>,
    /// What has changed.
    pub change: GatewayChange<'a>,
}

/// What a [`GatewayEvent`] changes.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum GatewayChange<'a> {
    /// The user has confirmed the payment method.
    Authenticated,
    /// The first period has begun.
    Activated {
        /// The first period.
        period: GatewayPeriod,
        /// Its payment; `None` for a trial.
        payment: Option<GatewayPayment<'a>>,
    },
    /// A further period is paid.
    Renewed {
        /// The period that is paid.
        period: GatewayPeriod,
        /// Its payment.
        payment: GatewayPayment<'a>,
    },
    /// A renewal was not paid; the gateway tries again.
    PaymentFailed {
        /// The failed payment.
        payment: GatewayPayment<'a>,
    },
    /// The subscription will end with its period.
    CancelledAtPeriodEnd,
    /// The subscription has ended.
    Cancelled,
    /// The subscription is paused.
    Paused {
        /// The planned end of the pause.
        resume_at: Option<DateTime<Utc>>,
    },
    /// The pause is over.
    Resumed,
    /// The gateway has given up on payments.
    Halted,
    /// The subscription has ended after its last period.
    Completed,
    /// A payment is refunded, in whole or in part. The subscription goes on.
    Refunded {
        /// The refunded payment.
        payment: GatewayPayment<'a>,
        /// The refund.
        refund: NewRefund<'a>,
    },
}

/// A billing period as the gateway reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the other fields explain themselves")]
pub struct GatewayPeriod {
    pub start: DateTime<Utc>,
    /// Later than `start`.
    pub end: DateTime<Utc>,
}

/// A payment as the gateway reports it. All its events give the same id, amount, currency and time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GatewayPayment<'a> {
    /// The payment's id at Razorpay.
    pub razorpay_payment_id: &'a str,
    /// The gross amount, in minor units of `currency`.
    pub amount: i64,
    /// The gateway's fee, with the tax on it.
    pub fee_amount: i64,
    /// ISO 4217 code, in capitals.
    pub currency: &'a str,
    /// The time of the payment at the gateway: the order of a subscription's payments.
    pub at: DateTime<Utc>,
    /// The means of payment, such as card or upi.
    pub method: Option<&'a str>,
    /// The reason for a failure, for people.
    pub failure_reason: Option<&'a str>,
}

/// The state after a [`GatewayEvent`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Applied {
    /// The subscription.
    pub subscription: UserSubscription,
    /// The event's payment, if it has one.
    pub payment: Option<SubscriptionTransaction>,
    /// The user's plan.
    pub plan: UserPlan,
    /// The instances that this event switched off, newest first.
    pub switched_off: Vec<McpInstance>,
}

/// Why a [`GatewayEvent`] was not applied. Nothing is changed then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GatewayError {
    /// No subscription has this Razorpay id.
    #[error("no subscription has this Razorpay id")]
    NotFound,
    /// The user has another live subscription. [End](UserSubscription::replace) it, and apply the
    /// event again.
    #[error("the user has another live subscription")]
    LiveExists,
    /// The subscription's Razorpay customer belongs to another user.
    #[error("the Razorpay customer belongs to another user")]
    CustomerTaken,
    /// The payment or refund contradicts what is recorded.
    #[error("the payment was not recorded")]
    Payment(#[source] PaymentError),
    /// Any other database error.
    #[error("database error")]
    Database(#[source] Error),
}

impl From<Error> for GatewayError {
    fn from(error: Error) -> Self {
        if violates(&error, "user_subscriptions_one_live_per_user") {
            Self::LiveExists
        } else if violates(&error, "user_plans_customer_id_key")
            || violates(&error, "users_razorpay_customer_id_key")
        {
            Self::CustomerTaken
        } else {
            Self::Database(error)
        }
    }
}

impl From<PaymentError> for GatewayError {
    fn from(error: PaymentError) -> Self {
        match error {
            PaymentError::Database(error) => error.into(),
            error => Self::Payment(error),
        }
    }
}

impl GatewayChange<'_> {
    fn status(&self) -> Option<SubscriptionStatus> {
        match self {
            Self::Authenticated => Some(SubscriptionStatus::Authenticated),
            Self::Activated { .. } | Self::Renewed { .. } | Self::Resumed => {
                Some(SubscriptionStatus::Active)
            }
            Self::PaymentFailed { .. } => Some(SubscriptionStatus::PastDue),
            Self::Cancelled => Some(SubscriptionStatus::Cancelled),
            Self::Paused { .. } => Some(SubscriptionStatus::Paused),
            Self::Halted => Some(SubscriptionStatus::Halted),
            Self::Completed => Some(SubscriptionStatus::Completed),
            Self::CancelledAtPeriodEnd | Self::Refunded { .. } => None,
        }
    }

    fn period(&self) -> Option<GatewayPeriod> {
        match self {
            Self::Activated { period, .. } | Self::Renewed { period, .. } => Some(*period),
            _ => None,
        }
    }

    fn payment(&self) -> Option<(&GatewayPayment<'_>, TransactionStatus)> {
        match self {
            Self::Activated { payment, .. } => {
                payment.as_ref().map(|it| (it, TransactionStatus::Captured))
            }
            Self::Renewed { payment, .. } | Self::Refunded { payment, .. } => {
                Some((payment, TransactionStatus::Captured))
            }
            Self::PaymentFailed { payment } => Some((payment, TransactionStatus::Failed)),
            _ => None,
        }
    }
}

/// Which status wins if the gateway reports two for the same second: the later one in its life.
fn rank(status: SubscriptionStatus) -> u8 {
    use SubscriptionStatus::{
        Active, Authenticated, Cancelled, Completed, Created, Halted, PastDue, Paused, Replaced,
        Upgraded,
    };
    match status {
        Created => 0,
        Authenticated => 1,
        PastDue => 2,
        Halted => 3,
        Active => 4,
        Paused => 5,
        Cancelled | Completed | Upgraded | Replaced => 6,
    }
}

/// What the payments of a subscription say.
pub(super) struct Payments {
    /// Failed ones after the last successful one.
    failed: i32,
    last_attempt: Option<DateTime<Utc>>,
    /// The last successful one is refunded in whole.
    pub(super) refunded: bool,
}

impl UserSubscription {
    /// Applies an event of the gateway to the subscription, its payment and the user's plan.
    ///
    /// Events may come several times and in any order: the final state is the same.
    ///
    /// - **Status**: that of the latest event. A final status stays.
    /// - **Period**: the one that ends last.
    /// - **Payments** are recorded whatever the status is, once per id, and never fall back.
    /// - **Plan**: pro until the period ends, and for `grace_period_days` more if the gateway
    ///   renews it; also after a cancellation. Free, with instances switched off, when that time is
    ///   over, the subscription is halted, or its last payment is refunded in whole. A plan that
    ///   has another subscription, or was granted for longer, stays as it is; so does every plan if
    ///   `plan_code` is free.
    ///
    /// Leave the period of a new subscription to the gateway: it counts as paid from the first
    /// event that has one. Amounts are recorded as they are:
    ///
    /// ```no_run
    /// # use bruhmcp_db::{Isolation, models::*, retry_transaction};
    /// # use diesel::pg::PgConnection;
    /// # fn apply(conn: &mut PgConnection, event: &GatewayEvent<'_>) -> Result<(), GatewayError> {
    /// retry_transaction(conn, Isolation::ReadCommitted, |conn| {
    ///     let applied = UserSubscription::apply(conn, event)?;
    ///     let price = applied.subscription.total_amount;
    ///     if applied.payment.is_some_and(|it| it.currency != "INR" || it.amount < price) {
    ///         // Tell a person, or return an error, which undoes it all.
    ///     }
    ///     Ok(())
    /// })
    /// # }
    /// ```
    ///
    /// One transaction, which locks the plan, the user, the subscription and the payment.
    ///
    /// # Errors
    /// Those of [`GatewayError`]. The caller's transaction stays usable.
    pub fn apply(
        conn: &mut PgConnection,
        event: &GatewayEvent<'_>,
    ) -> Result<Applied, GatewayError> {
        conn.transaction(|conn| {
            let (id, user_id): (SubscriptionId, UserId) = user_subscriptions::table
                .filter(
                    user_subscriptions::razorpay_subscription_id.eq(event.razorpay_subscription_id),
                )
                .select((user_subscriptions::id, user_subscriptions::user_id))
                .first(conn)
                .optional()?
                .ok_or(GatewayError::NotFound)?;
            let plan = UserPlan::lock_by_user(conn, user_id)?.ok_or(Error::NotFound)?;
            users::table
                .find(user_id)
                .select(users::id)
                .for_update()
                .execute(conn)?;
            let (before, clock) = user_subscriptions::table
                .find(id)
                .select((Self::as_select(), now.into_sql::<Timestamptz>()))
                .for_no_key_update()
                .first::<(Self, DateTime<Utc>)>(conn)?;
            let payment = match event.change.payment() {
                Some((payment, status)) => Some(before.record(conn, payment, status)?),
                None => None,
            };
            let payment = match (&event.change, payment) {
                (GatewayChange::Refunded { refund, .. }, Some(payment)) => {
                    SubscriptionTransaction::refund(conn, payment.id, refund)?;
                    SubscriptionTransaction::find(conn, payment.id)?
                }
                (_, payment) => payment,
            };
            let payments = before.payments(conn)?;
            let subscription = before.follow(conn, event, &payments)?;
            let (plan, switched_off) =
                subscription.carry_to_plan(conn, plan, payments.refunded, clock)?;
            if plan.customer_id == subscription.razorpay_customer_id {
                subscription.carry_to_user(conn)?;
            }
            Ok(Applied {
                subscription,
                payment,
                plan,
                switched_off,
            })
        })
    }

    /// Records the payment, or moves the recorded one on to `status`.
    fn record(
        &self,
        conn: &mut PgConnection,
        payment: &GatewayPayment<'_>,
        status: TransactionStatus,
    ) -> Result<SubscriptionTransaction, GatewayError> {
        let net_amount = payment.amount.saturating_sub(payment.fee_amount);
        let new = NewSubscriptionTransaction {
            subscription_id: Some(self.id),
            razorpay_payment_id: Some(payment.razorpay_payment_id),
            fee_amount: Some(payment.fee_amount),
            currency: Some(payment.currency),
            method: payment.method,
            failure_reason: payment.failure_reason,
            processed_at: Some(payment.at),
            ..NewSubscriptionTransaction::new(self.user_id, payment.amount, net_amount, status)
        };
        let recorded = match SubscriptionTransaction::record_payment(conn, &new)? {
            Recorded::New(row) => return Ok(row),
            Recorded::Existing(row) => row,
        };
        let changes = SubscriptionTransactionChangeset {
            fee_amount: Some(payment.fee_amount),
            net_amount: Some(net_amount),
            method: payment.method.map(Some),
            failure_reason: Some(payment.failure_reason),
            processed_at: Some(Some(payment.at)),
            ..Default::default()
        };
        let row = match SubscriptionTransaction::advance(conn, recorded.id, status, &changes) {
            Ok(row) => row,
            Err(PaymentError::Conflict(row)) => *row,
            Err(error) => return Err(error.into()),
        };
        if row.subscription_id.is_some() && row.processed_at.is_some() {
            return Ok(row);
        }
        // Recorded from an event that names no subscription.
        let of_this = (
            subscription_transactions::subscription_id.eq(self.id),
            subscription_transactions::processed_at.eq(payment.at),
        );
        Ok(
            diesel::update(subscription_transactions::table.find(row.id))
                .set(of_this)
                .returning(SubscriptionTransaction::as_returning())
                .prepared()
                .get_result(conn)?,
        )
    }

    pub(super) fn payments(&self, conn: &mut PgConnection) -> QueryResult<Payments> {
        use TransactionStatus::{Captured, Failed, Refunded};
        let payments = || {
            subscription_transactions::table
                .filter(subscription_transactions::subscription_id.eq(self.id))
                .filter(subscription_transactions::transaction_type.ne(TransactionType::Refund))
                .filter(subscription_transactions::processed_at.is_not_null())
        };
        let last: Option<(TransactionStatus, Option<DateTime<Utc>>)> = payments()
            .filter(subscription_transactions::status.eq_any([Captured, Refunded]))
            .order((
                subscription_transactions::processed_at.desc(),
                subscription_transactions::razorpay_payment_id.desc(),
            ))
            .select((
                subscription_transactions::status,
                subscription_transactions::processed_at,
            ))
            .first(conn)
            .optional()?;
        let paid_at = last.and_then(|(_, at)| at).unwrap_or(DateTime::UNIX_EPOCH);
        let failed: i64 = payments()
            .filter(subscription_transactions::status.eq(Failed))
            .filter(subscription_transactions::processed_at.gt(paid_at))
            .count()
            .get_result(conn)?;
        let last_attempt = payments()
            .select(max(subscription_transactions::processed_at))
            .get_result(conn)?;
        Ok(Payments {
            failed: i32::try_from(failed).unwrap_or(i32::MAX),
            last_attempt,
            refunded: last.is_some_and(|(status, _)| status == Refunded),
        })
    }

    /// The status after the event, and the time of the event that set it.
    fn next_status(&self, event: &GatewayEvent<'_>) -> (SubscriptionStatus, Option<DateTime<Utc>>) {
        use SubscriptionStatus::{Authenticated, Created};
        let before = (self.status, self.status_event_at);
        match event.change.status() {
            _ if self.status.is_final() => before,
            None => before,
            // It precedes all others, whatever the clock says.
            Some(Authenticated) if self.status == Created => (Authenticated, None),
            Some(Authenticated) => before,
            Some(status) => {
                let seen = self.status_event_at.map(|at| (at, rank(self.status)));
                if status.is_final() || Some((event.at, rank(status))) > seen {
                    (status, Some(event.at))
                } else {
                    before
                }
            }
        }
    }

    /// Writes what the event says about the subscription. `self` is locked.
    fn follow(
        &self,
        conn: &mut PgConnection,
        event: &GatewayEvent<'_>,
        payments: &Payments,
    ) -> QueryResult<Self> {
        use SubscriptionStatus::{Cancelled, Paused};
        let (status, at) = self.next_status(event);
        let changed = at != self.status_event_at || status != self.status;
        let pause = match event.change {
            GatewayChange::Paused { resume_at } if changed => (Some(event.at), resume_at),
            _ if status == Paused => (self.paused_at, self.resume_at),
            _ => (None, None),
        };
        let pauses = status == Paused && self.status != Paused;
        let period = event
            .change
            .period()
            .filter(|period| {
                let current = (self.current_period_end, self.current_period_start);
                !self.has_period() || (period.end, period.start) > current
            })
            .unwrap_or(GatewayPeriod {
                start: self.current_period_start,
                end: self.current_period_end,
            });
        let ends = matches!(event.change, GatewayChange::CancelledAtPeriodEnd);
        let cancelled_at = if changed && status == Cancelled {
            Some(event.at)
        } else {
            self.cancelled_at
        };
        // Also without a change: a transaction at REPEATABLE READ that waits for this one must not
        // go on with the payments of its older snapshot.
        diesel::update(user_subscriptions::table.find(self.id))
            .set((
                user_subscriptions::status.eq(status),
                user_subscriptions::status_event_at.eq(at),
                user_subscriptions::current_period_start.eq(period.start),
                user_subscriptions::current_period_end.eq(period.end),
                user_subscriptions::cancel_at_period_end.eq(self.cancel_at_period_end || ends),
                user_subscriptions::cancelled_at.eq(cancelled_at),
                user_subscriptions::paused_at.eq(pause.0),
                user_subscriptions::resume_at.eq(pause.1),
                user_subscriptions::pause_count.eq(self.pause_count + i32::from(pauses)),
                user_subscriptions::failed_payment_count.eq(payments.failed),
                user_subscriptions::last_payment_attempt
                    .eq(self.last_payment_attempt.max(payments.last_attempt)),
            ))
            .returning(Self::as_returning())
            .prepared()
            .get_result(conn)
    }

    /// Makes the subscription's customer the user's. The user is locked.
    fn carry_to_user(&self, conn: &mut PgConnection) -> QueryResult<()> {
        if let Some(customer) = &self.razorpay_customer_id {
            diesel::update(users::table.find(self.user_id))
                .filter(users::razorpay_customer_id.is_distinct_from(Some(customer)))
                .set(users::razorpay_customer_id.eq(customer))
                .prepared()
                .execute(conn)?;
        }
        Ok(())
    }

    /// Whether the period is more than the column's default.
    fn has_period(&self) -> bool {
        self.current_period_start != self.created_at
    }

    /// The time until which the subscription entitles its user to the plan; `None` if it doesn't.
    fn paid_until(&self) -> Option<DateTime<Utc>> {
        use SubscriptionStatus::{Active, Cancelled, Completed, PastDue, Paused};
        let grace = match self.status {
            Active | PastDue if !self.cancel_at_period_end => self.grace_period_days,
            Active | PastDue | Paused | Cancelled | Completed => 0,
            _ => return None,
        };
        let end = self.current_period_end;
        let until = end.checked_add_signed(TimeDelta::days(grace.into()));
        Some(until.unwrap_or(DateTime::<Utc>::MAX_UTC))
    }

    /// Writes what the subscription means for the user's plan, which is locked.
    pub(super) fn carry_to_plan(
        &self,
        conn: &mut PgConnection,
        plan: UserPlan,
        refunded: bool,
        clock: DateTime<Utc>,
    ) -> QueryResult<(UserPlan, Vec<McpInstance>)> {
        use SubscriptionStatus::{
            Active, Authenticated, Cancelled, Created, Halted, PastDue, Replaced, Upgraded,
        };
        let decides = self.plan_code != SubscriptionPlan::Free
            && self.has_period()
            && !matches!(self.status, Created | Authenticated | Upgraded | Replaced);
        let Some(gateway_id) = self.razorpay_subscription_id.as_deref().filter(|_| decides) else {
            return Ok((plan, Vec::new()));
        };
        let until = self
            .paid_until()
            .filter(|until| !refunded && *until > clock);
        // Another's plan, or one that was granted, is taken over only to last longer.
        let linked = plan.subscription_id.as_deref() == Some(gateway_id);
        let longer = plan.expires_at.is_some_and(|end| until > Some(end));
        if !linked && plan.plan_type == PlanType::Pro && !longer {
            return Ok((plan, Vec::new()));
        }
        let status = match (self.status, until) {
            (Cancelled, _) => PlanPaymentStatus::Cancelled,
            (PastDue, Some(_)) => PlanPaymentStatus::PastDue,
            (_, Some(_)) => PlanPaymentStatus::Active,
            (Active | PastDue | Halted, None) => PlanPaymentStatus::Failed,
            (_, None) => PlanPaymentStatus::None,
        };
        let customer = self
            .razorpay_customer_id
            .as_deref()
            .map(|customer| user_plans::customer_id.eq(customer));
        let of_user = user_plans::table.find(plan.plan_id);
        if until.is_some() {
            let plan = diesel::update(of_user)
                .set((
                    user_plans::plan_type.eq(PlanType::Pro),
                    user_plans::max_instances.eq(None::<i32>),
                    user_plans::expires_at.eq(until),
                    user_plans::subscription_id.eq(gateway_id),
                    user_plans::payment_status.eq(status),
                    customer,
                ))
                .returning(UserPlan::as_returning())
                .prepared()
                .get_result(conn)?;
            return Ok((plan, Vec::new()));
        }
        let mut switched_off = Vec::new();
        if plan.plan_type == PlanType::Pro {
            if let Some(downgrade) = UserPlan::downgrade(conn, self.user_id, status)? {
                switched_off = downgrade.switched_off;
            }
        }
        let plan = diesel::update(of_user)
            .set((user_plans::payment_status.eq(status), customer))
            .returning(UserPlan::as_returning())
            .prepared()
            .get_result(conn)?;
        Ok((plan, switched_off))
    }
}
