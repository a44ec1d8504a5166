//! Subscriptions at the payment gateway: their rows, and the changes that this service makes.
//! `gateway` applies what the gateway reports, `sweep` ends what is over, and `charges` is the queue
//! of a service that charges by itself.

mod charges;
mod gateway;
mod row;
mod sweep;

use chrono::{DateTime, Utc};
use diesel::dsl::{now, sql};
use diesel::expression::SqlLiteral;
use diesel::prelude::*;
use diesel::result::Error;
use diesel::sql_types::Bool;

pub use self::gateway::{
    Applied, GatewayChange, GatewayError, GatewayEvent, GatewayPayment, GatewayPeriod,
};
pub use self::row::UserSubscription;
pub use self::sweep::Swept;
use crate::enums::{BillingCycle, SubscriptionPlan, SubscriptionStatus};
use crate::error::violates;
use crate::ids::{SubscriptionId, UserId};
use crate::models::lock_user_key;
use crate::page::{Cursor, Page, newest_first};
use crate::prepared::Prepare;
use crate::schema::user_subscriptions;

/// Values of a new [`UserSubscription`]; `None` uses the column's default.
///
/// The operation sets the status.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = user_subscriptions, check_for_backend(Pg))]
#[expect(missing_docs, reason = "the fields are those of `UserSubscription`")]
pub struct NewUserSubscription<'a> {
    pub id: Option<SubscriptionId>,
    pub user_id: UserId,
    pub plan_code: Option<SubscriptionPlan>,
    pub razorpay_subscription_id: Option<&'a str>,
    pub razorpay_customer_id: Option<&'a str>,
    pub billing_cycle: Option<BillingCycle>,
    pub current_period_start: Option<DateTime<Utc>>,
    pub current_period_end: Option<DateTime<Utc>>,
    pub trial_start: Option<DateTime<Utc>>,
    pub trial_end: Option<DateTime<Utc>>,
    pub cancel_at_period_end: Option<bool>,
    pub next_billing_date: Option<DateTime<Utc>>,
    pub proration_amount: Option<i64>,
    pub discount_amount: Option<i64>,
    pub tax_amount: Option<i64>,
    pub total_amount: Option<i64>,
    pub auto_renewal: Option<bool>,
    pub grace_period_days: Option<i32>,
}

impl NewUserSubscription<'_> {
    /// A subscription of `user_id`, all else by default.
    #[must_use]
    pub fn new(user_id: UserId) -> Self {
        Self {
            id: None,
            user_id,
            plan_code: None,
            razorpay_subscription_id: None,
            razorpay_customer_id: None,
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

/// Changes to a [`UserSubscription`]: `None` keeps a column, `Some(None)` sets it to `NULL`.
#[derive(Debug, Clone, Default, AsChangeset)]
#[diesel(table_name = user_subscriptions)]
#[expect(missing_docs, reason = "the fields are those of `UserSubscription`")]
pub struct UserSubscriptionChangeset<'a> {
    pub plan_code: Option<SubscriptionPlan>,
    pub razorpay_subscription_id: Option<Option<&'a str>>,
    pub razorpay_customer_id: Option<Option<&'a str>>,
    pub billing_cycle: Option<BillingCycle>,
    pub current_period_start: Option<DateTime<Utc>>,
    pub current_period_end: Option<DateTime<Utc>>,
    pub trial_start: Option<Option<DateTime<Utc>>>,
    pub trial_end: Option<Option<DateTime<Utc>>>,
    pub cancel_at_period_end: Option<bool>,
    pub cancellation_reason: Option<Option<&'a str>>,
    pub cancellation_feedback: Option<Option<&'a str>>,
    /// Only a change to `Paused` may set it; every other status clears the column.
    pub resume_at: Option<Option<DateTime<Utc>>>,
    pub next_billing_date: Option<Option<DateTime<Utc>>>,
    pub proration_amount: Option<i64>,
    pub discount_amount: Option<i64>,
    pub tax_amount: Option<i64>,
    pub total_amount: Option<i64>,
    pub auto_renewal: Option<bool>,
    pub grace_period_days: Option<i32>,
}

/// Why an operation on a subscription failed. Nothing is changed then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SubscriptionError {
    /// There is no such subscription, or it belongs to another user.
    #[error("no such subscription")]
    NotFound,
    /// The status has changed, or does not allow the operation. Holds the current row.
    #[error("the subscription's status is {}", .0.status)]
    Conflict(Box<UserSubscription>),
    /// The expected status is final: nothing follows it.
    #[error("the subscription has ended")]
    Ended,
    /// The user already has a live subscription: active, past due or paused.
    #[error("the user already has a live subscription")]
    LiveExists,
    /// Another subscription has the same Razorpay id.
    #[error("the Razorpay subscription id is taken")]
    GatewayIdTaken,
    /// Any other database error.
    #[error("database error")]
    Database(#[source] Error),
}

impl From<Error> for SubscriptionError {
    fn from(error: Error) -> Self {
        if violates(&error, "user_subscriptions_one_live_per_user") {
            Self::LiveExists
        } else if violates(&error, "user_subscriptions_razorpay_subscription_id_key") {
            Self::GatewayIdTaken
        } else {
            Self::Database(error)
        }
    }
}

/// The predicate of the index `user_subscriptions_one_live_per_user`. It is a literal because the
/// planner can't match bind parameters with a partial index.
fn is_live() -> SqlLiteral<Bool> {
    sql("user_subscriptions.status IN ('active', 'past_due', 'paused')")
}

impl UserSubscription {
    /// Returns the subscription with this id.
    pub fn find(conn: &mut PgConnection, id: SubscriptionId) -> QueryResult<Option<Self>> {
        user_subscriptions::table
            .find(id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Returns the user's live subscription: active, past due or paused. There is at most one.
    pub fn current(conn: &mut PgConnection, user_id: UserId) -> QueryResult<Option<Self>> {
        user_subscriptions::table
            .filter(user_subscriptions::user_id.eq(user_id))
            .filter(is_live())
            .select(Self::as_select())
            .prepared()
            .get_result(conn)
            .optional()
    }

    /// Returns the subscription with this Razorpay id.
    pub fn find_by_razorpay_id(
        conn: &mut PgConnection,
        razorpay_subscription_id: &str,
    ) -> QueryResult<Option<Self>> {
        user_subscriptions::table
            .filter(user_subscriptions::razorpay_subscription_id.eq(razorpay_subscription_id))
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Returns a page of the user's subscriptions, newest first.
    pub fn list_by_user(
        conn: &mut PgConnection,
        user_id: UserId,
        page: Page<SubscriptionId>,
    ) -> QueryResult<Vec<Self>> {
        let of_user = user_subscriptions::table
            .filter(user_subscriptions::user_id.eq(user_id))
            .select(Self::as_select());
        newest_first!(of_user, user_subscriptions, id, page).load(conn)
    }

    /// The row's position in a list.
    #[must_use]
    pub fn cursor(&self) -> Cursor<SubscriptionId> {
        Cursor {
            created_at: self.created_at,
            id: self.id,
        }
    }

    /// Inserts a subscription with this status.
    ///
    /// It waits for a transaction that starts or ends a live subscription of the same user.
    ///
    /// # Errors
    /// [`SubscriptionError::LiveExists`] if `status` is a live one;
    /// [`SubscriptionError::GatewayIdTaken`]. The caller's transaction stays usable.
    pub fn start(
        conn: &mut PgConnection,
        new: &NewUserSubscription<'_>,
        status: SubscriptionStatus,
    ) -> Result<Self, SubscriptionError> {
        conn.transaction(|conn| {
            lock_user_key(conn, new.user_id)?;
            Self::insert(conn, new, status)
        })
    }

    fn insert(
        conn: &mut PgConnection,
        new: &NewUserSubscription<'_>,
        status: SubscriptionStatus,
    ) -> Result<Self, SubscriptionError> {
        let row = diesel::insert_into(user_subscriptions::table)
            .values((
                new,
                user_subscriptions::status.eq(status),
                (status == SubscriptionStatus::Cancelled)
                    .then(|| user_subscriptions::cancelled_at.eq(now)),
            ))
            .returning(Self::as_returning())
            .get_result(conn)?;
        Ok(row)
    }

    /// Moves a subscription from status `from` to status `to` and applies `changes`.
    ///
    /// `from` is the status on which the caller based its decision: of two concurrent changes, one
    /// gets a conflict. `from` and `to` may be equal, to apply changes only. Dependent columns
    /// follow: `cancelled_at`; `paused_at`, `pause_count` and `resume_at`; `failed_payment_count`,
    /// which is 0 after a change to active. One statement, which locks the row.
    ///
    /// # Errors
    /// [`SubscriptionError::Ended`] if `from` [is final](SubscriptionStatus::is_final): a late
    /// webhook revives nothing. [`SubscriptionError::Conflict`]; [`SubscriptionError::NotFound`].
    /// [`SubscriptionError::LiveExists`] and [`SubscriptionError::GatewayIdTaken`] abort the
    /// caller's transaction: wrap the call in `conn.transaction` to continue after them.
    pub fn change_status(
        conn: &mut PgConnection,
        id: SubscriptionId,
        from: SubscriptionStatus,
        to: SubscriptionStatus,
        changes: &UserSubscriptionChangeset<'_>,
    ) -> Result<Self, SubscriptionError> {
        use SubscriptionStatus::{Active, Cancelled, Paused};
        if from.is_final() {
            return Err(SubscriptionError::Ended);
        }
        let pauses = to == Paused && from != Paused;
        let changes = &UserSubscriptionChangeset {
            resume_at: if to == Paused {
                changes.resume_at
            } else {
                Some(None)
            },
            ..changes.clone()
        };
        diesel::update(user_subscriptions::table.find(id))
            .filter(user_subscriptions::status.eq(from))
            .set((
                changes,
                user_subscriptions::status.eq(to),
                (to == Cancelled).then(|| user_subscriptions::cancelled_at.eq(now)),
                pauses.then(|| {
                    (
                        user_subscriptions::paused_at.eq(now),
                        user_subscriptions::pause_count.eq(user_subscriptions::pause_count + 1),
                    )
                }),
                (to != Paused).then(|| user_subscriptions::paused_at.eq(None::<DateTime<Utc>>)),
                (to == Active).then(|| user_subscriptions::failed_payment_count.eq(0)),
            ))
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()?
            .map_or_else(|| Err(Self::missed(conn, id)), Ok)
    }

    /// Ends the live subscription `id` as upgraded and starts `new` as active, in one transaction.
    /// Returns the new subscription.
    ///
    /// # Errors
    /// [`SubscriptionError::NotFound`] if `id` isn't a subscription of `new.user_id`;
    /// [`SubscriptionError::Conflict`] if it isn't live, so only one of two concurrent upgrades
    /// succeeds; [`SubscriptionError::GatewayIdTaken`]. The caller's transaction stays usable.
    pub fn upgrade(
        conn: &mut PgConnection,
        id: SubscriptionId,
        new: &NewUserSubscription<'_>,
    ) -> Result<Self, SubscriptionError> {
        Self::succeed(conn, id, SubscriptionStatus::Upgraded, new)
    }

    /// Like [`upgrade`](Self::upgrade), but ends the old subscription as replaced: by a lower plan,
    /// another billing cycle or another gateway.
    ///
    /// # Errors
    /// Those of [`upgrade`](Self::upgrade).
    pub fn replace(
        conn: &mut PgConnection,
        id: SubscriptionId,
        new: &NewUserSubscription<'_>,
    ) -> Result<Self, SubscriptionError> {
        Self::succeed(conn, id, SubscriptionStatus::Replaced, new)
    }

    fn succeed(
        conn: &mut PgConnection,
        id: SubscriptionId,
        end: SubscriptionStatus,
        new: &NewUserSubscription<'_>,
    ) -> Result<Self, SubscriptionError> {
        conn.transaction(|conn| {
            lock_user_key(conn, new.user_id)?;
            let ended = diesel::update(user_subscriptions::table.find(id))
                .filter(user_subscriptions::user_id.eq(new.user_id))
                .filter(is_live())
                .set((
                    user_subscriptions::status.eq(end),
                    user_subscriptions::paused_at.eq(None::<DateTime<Utc>>),
                    user_subscriptions::resume_at.eq(None::<DateTime<Utc>>),
                ))
                .prepared()
                .execute(conn)?;
            if ended == 0 {
                return match Self::missed(conn, id) {
                    SubscriptionError::Conflict(row) if row.user_id != new.user_id => {
                        Err(SubscriptionError::NotFound)
                    }
                    error => Err(error),
                };
            }
            Self::insert(conn, new, SubscriptionStatus::Active)
        })
    }

    /// Why an update of this row found nothing.
    fn missed(conn: &mut PgConnection, id: SubscriptionId) -> SubscriptionError {
        match Self::find(conn, id) {
            Ok(Some(row)) => SubscriptionError::Conflict(Box::new(row)),
            Ok(None) => SubscriptionError::NotFound,
            Err(error) => SubscriptionError::Database(error),
        }
    }
}
