//! The row. Without the feature `operations`, it is all that the crate has of the table.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;

use crate::enums::{BillingCycle, SubscriptionPlan, SubscriptionStatus};
use crate::ids::{SubscriptionId, UserId};
use crate::models::User;
use crate::schema::user_subscriptions;

/// A row of `user_subscriptions`. Amounts are in paise.
///
/// The one to show to its user: the newest that has not ended, or was cancelled but is paid.
///
/// ```no_run
/// # use bruhmcp_db::{enums::SubscriptionStatus, ids::UserId, models::UserSubscription};
/// # use diesel::{dsl::now, prelude::*};
/// # fn show(conn: &mut PgConnection, user_id: UserId) -> QueryResult<Option<UserSubscription>> {
/// use SubscriptionStatus::{Cancelled, Completed, Halted, Replaced, Upgraded};
/// use bruhmcp_db::schema::user_subscriptions::{self, created_at, current_period_end, id, status};
///
/// user_subscriptions::table
///     .filter(user_subscriptions::user_id.eq(user_id))
///     .filter(status.ne_all([Completed, Halted, Upgraded, Replaced]))
///     .filter(status.ne(Cancelled).or(current_period_end.gt(now)))
///     .order((created_at.desc(), id.desc()))
///     .select(UserSubscription::as_select())
///     .first(conn)
///     .optional()
/// # }
/// ```
#[derive(
    Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable, Associations,
)]
#[diesel(table_name = user_subscriptions, belongs_to(User, foreign_key = user_id), check_for_backend(Pg))]
#[expect(missing_docs, reason = "the other fields explain themselves")]
pub struct UserSubscription {
    pub id: SubscriptionId,
    pub user_id: UserId,
    pub plan_code: SubscriptionPlan,
    /// Unique.
    pub razorpay_subscription_id: Option<String>,
    pub razorpay_customer_id: Option<String>,
    pub status: SubscriptionStatus,
    pub billing_cycle: BillingCycle,
    pub current_period_start: DateTime<Utc>,
    /// By default 30 days after the start.
    pub current_period_end: DateTime<Utc>,
    pub trial_start: Option<DateTime<Utc>>,
    /// Requires `trial_start` and is later.
    pub trial_end: Option<DateTime<Utc>>,
    pub cancel_at_period_end: bool,
    pub cancelled_at: Option<DateTime<Utc>>,
    /// The reason that the user chose from a list.
    pub cancellation_reason: Option<String>,
    /// The reason in the user's own words.
    pub cancellation_feedback: Option<String>,
    /// The number of pauses so far.
    pub pause_count: i32,
    /// The start of the current pause.
    pub paused_at: Option<DateTime<Utc>>,
    /// The planned end of the current pause.
    pub resume_at: Option<DateTime<Utc>>,
    pub next_billing_date: Option<DateTime<Utc>>,
    /// Negative in the user's favour.
    pub proration_amount: i64,
    pub discount_amount: i64,
    pub tax_amount: i64,
    pub total_amount: i64,
    pub auto_renewal: bool,
    /// Days past due before the subscription is halted.
    pub grace_period_days: i32,
    /// Failed payments since the last successful one.
    pub failed_payment_count: i32,
    pub last_payment_attempt: Option<DateTime<Utc>>,
    /// The time of the gateway's event that set the status; `None` if none did.
    pub status_event_at: Option<DateTime<Utc>>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}
