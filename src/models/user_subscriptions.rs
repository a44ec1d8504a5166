//! Subscriptions of users at the payment gateway.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;

use crate::enums::{BillingCycle, SubscriptionPlan, SubscriptionStatus};
use crate::ids::{SubscriptionId, UserId};
use crate::models::User;
use crate::schema::user_subscriptions;

/// A row of `user_subscriptions`.
#[derive(
    Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable, Associations,
)]
#[diesel(table_name = user_subscriptions, belongs_to(User, foreign_key = user_id), check_for_backend(Pg))]
pub struct UserSubscription {
    /// Key.
    pub id: SubscriptionId,
    /// Whose subscription it is.
    pub user_id: UserId,
    /// What it pays for.
    pub plan_code: SubscriptionPlan,
    /// Subscription at Razorpay; unique.
    pub razorpay_subscription_id: Option<String>,
    /// Customer at Razorpay.
    pub razorpay_customer_id: Option<String>,
    /// Where it is in its life.
    pub status: SubscriptionStatus,
    /// How often it is charged.
    pub billing_cycle: BillingCycle,
    /// Start of the period paid for.
    pub current_period_start: DateTime<Utc>,
    /// End of it; by default 30 days after the start.
    pub current_period_end: DateTime<Utc>,
    /// Start of the trial.
    pub trial_start: Option<DateTime<Utc>>,
    /// End of the trial; needs a start, and is later.
    pub trial_end: Option<DateTime<Utc>>,
    /// Whether it ends with the period.
    pub cancel_at_period_end: bool,
    /// When it was cancelled.
    pub cancelled_at: Option<DateTime<Utc>>,
    /// Why, as chosen.
    pub cancellation_reason: Option<String>,
    /// Why, in the user's words.
    pub cancellation_feedback: Option<String>,
    /// How often it was paused.
    pub pause_count: i32,
    /// Since when it is paused.
    pub paused_at: Option<DateTime<Utc>>,
    /// When the pause ends.
    pub resume_at: Option<DateTime<Utc>>,
    /// When it is charged next.
    pub next_billing_date: Option<DateTime<Utc>>,
    /// Paise; negative: in the user's favour.
    pub proration_amount: i64,
    /// Paise.
    pub discount_amount: i64,
    /// Paise.
    pub tax_amount: i64,
    /// Paise.
    pub total_amount: i64,
    /// Whether it is charged again at the end of the period.
    pub auto_renewal: bool,
    /// Days past due before it is halted.
    pub grace_period_days: i32,
    /// Payments that failed in a row.
    pub failed_payment_count: i32,
    /// When a payment was tried last.
    pub last_payment_attempt: Option<DateTime<Utc>>,
    /// When the row was made.
    pub created_at: DateTime<Utc>,
    /// When the row changed last.
    pub updated_at: DateTime<Utc>,
}

/// A new row; `None` leaves a column to its default.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = user_subscriptions, check_for_backend(Pg))]
pub struct NewUserSubscription<'a> {
    /// Key.
    pub id: Option<SubscriptionId>,
    /// Whose subscription it is.
    pub user_id: UserId,
    /// What it pays for.
    pub plan_code: Option<SubscriptionPlan>,
    /// Subscription at Razorpay; unique.
    pub razorpay_subscription_id: Option<&'a str>,
    /// Customer at Razorpay.
    pub razorpay_customer_id: Option<&'a str>,
    /// Where it is in its life.
    pub status: Option<SubscriptionStatus>,
    /// How often it is charged.
    pub billing_cycle: Option<BillingCycle>,
    /// Start of the period paid for.
    pub current_period_start: Option<DateTime<Utc>>,
    /// End of it; by default 30 days after the start.
    pub current_period_end: Option<DateTime<Utc>>,
    /// Start of the trial.
    pub trial_start: Option<DateTime<Utc>>,
    /// End of the trial; needs a start, and is later.
    pub trial_end: Option<DateTime<Utc>>,
    /// Whether it ends with the period.
    pub cancel_at_period_end: Option<bool>,
    /// When it is charged next.
    pub next_billing_date: Option<DateTime<Utc>>,
    /// Paise; negative: in the user's favour.
    pub proration_amount: Option<i64>,
    /// Paise.
    pub discount_amount: Option<i64>,
    /// Paise.
    pub tax_amount: Option<i64>,
    /// Paise.
    pub total_amount: Option<i64>,
    /// Whether it is charged again at the end of the period.
    pub auto_renewal: Option<bool>,
    /// Days past due before it is halted.
    pub grace_period_days: Option<i32>,
}

impl NewUserSubscription<'_> {
    /// A new row with all columns at their defaults but these.
    #[must_use]
    pub fn new(user_id: UserId) -> Self {
        Self {
            id: None,
            user_id,
            plan_code: None,
            razorpay_subscription_id: None,
            razorpay_customer_id: None,
            status: None,
            billing_cycle: None,
            current_period_start: None,
            current_period_end: None,
            trial_start: None,
            trial_end: None,
            cancel_at_period_end: None,
            next_billing_date: None,
            proration_amount: None,
            discount_amount: None,
            tax_amount: None,
            total_amount: None,
            auto_renewal: None,
            grace_period_days: None,
        }
    }
}

/// Changes to a row: `None` keeps a column, `Some(None)` sets it to `NULL`.
#[derive(Debug, Clone, Default, AsChangeset)]
#[diesel(table_name = user_subscriptions)]
pub struct UserSubscriptionChangeset<'a> {
    /// What it pays for.
    pub plan_code: Option<SubscriptionPlan>,
    /// Subscription at Razorpay; unique.
    pub razorpay_subscription_id: Option<Option<&'a str>>,
    /// Customer at Razorpay.
    pub razorpay_customer_id: Option<Option<&'a str>>,
    /// Where it is in its life.
    pub status: Option<SubscriptionStatus>,
    /// How often it is charged.
    pub billing_cycle: Option<BillingCycle>,
    /// Start of the period paid for.
    pub current_period_start: Option<DateTime<Utc>>,
    /// End of it; by default 30 days after the start.
    pub current_period_end: Option<DateTime<Utc>>,
    /// Start of the trial.
    pub trial_start: Option<Option<DateTime<Utc>>>,
    /// End of the trial; needs a start, and is later.
    pub trial_end: Option<Option<DateTime<Utc>>>,
    /// Whether it ends with the period.
    pub cancel_at_period_end: Option<bool>,
    /// When it was cancelled.
    pub cancelled_at: Option<Option<DateTime<Utc>>>,
    /// Why, as chosen.
    pub cancellation_reason: Option<Option<&'a str>>,
    /// Why, in the user's words.
    pub cancellation_feedback: Option<Option<&'a str>>,
    /// How often it was paused.
    pub pause_count: Option<i32>,
    /// Since when it is paused.
    pub paused_at: Option<Option<DateTime<Utc>>>,
    /// When the pause ends.
    pub resume_at: Option<Option<DateTime<Utc>>>,
    /// When it is charged next.
    pub next_billing_date: Option<Option<DateTime<Utc>>>,
    /// Paise; negative: in the user's favour.
    pub proration_amount: Option<i64>,
    /// Paise.
    pub discount_amount: Option<i64>,
    /// Paise.
    pub tax_amount: Option<i64>,
    /// Paise.
    pub total_amount: Option<i64>,
    /// Whether it is charged again at the end of the period.
    pub auto_renewal: Option<bool>,
    /// Days past due before it is halted.
    pub grace_period_days: Option<i32>,
    /// Payments that failed in a row.
    pub failed_payment_count: Option<i32>,
    /// When a payment was tried last.
    pub last_payment_attempt: Option<Option<DateTime<Utc>>>,
}

impl UserSubscription {
    /// Inserts a row and returns it with its defaults.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn insert(conn: &mut PgConnection, new: &NewUserSubscription<'_>) -> QueryResult<Self> {
        diesel::insert_into(user_subscriptions::table)
            .values(new)
            .returning(Self::as_returning())
            .get_result(conn)
    }

    /// The row of this key, if there is one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find(conn: &mut PgConnection, id: SubscriptionId) -> QueryResult<Option<Self>> {
        user_subscriptions::table
            .find(id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// The rows of a user, newest first, `limit` at most.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn list_by_user(
        conn: &mut PgConnection,
        user_id: UserId,
        limit: i64,
    ) -> QueryResult<Vec<Self>> {
        user_subscriptions::table
            .filter(user_subscriptions::user_id.eq(user_id))
            .order((
                user_subscriptions::created_at.desc(),
                user_subscriptions::id.desc(),
            ))
            .limit(limit)
            .select(Self::as_select())
            .load(conn)
    }

    /// Changes the row of this key and returns it as it is then; `None` where there is no such row. An empty changeset
    /// changes nothing.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn update(
        conn: &mut PgConnection,
        id: SubscriptionId,
        changes: &UserSubscriptionChangeset<'_>,
    ) -> QueryResult<Option<Self>> {
        let updated = diesel::update(user_subscriptions::table.find(id))
            .set(changes)
            .returning(Self::as_returning())
            .get_result(conn)
            .optional_empty_changeset();
        match updated {
            Ok(Some(row)) => Ok(Some(row)),
            Ok(None) => Self::find(conn, id),
            Err(diesel::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Deletes the row of this key; says whether there was one.
    ///
    /// # Errors
    /// A foreign key, while other rows refer to it.
    pub fn delete(conn: &mut PgConnection, id: SubscriptionId) -> QueryResult<bool> {
        diesel::delete(user_subscriptions::table.find(id))
            .execute(conn)
            .map(|deleted| deleted == 1)
    }
}
