//! Subscriptions of users at the payment gateway.

use chrono::{DateTime, Utc};
use diesel::dsl::{now, sql};
use diesel::expression::SqlLiteral;
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::result::Error;
use diesel::sql_types::Bool;
use serde::Serialize;

use crate::enums::{BillingCycle, SubscriptionPlan, SubscriptionStatus};
use crate::error::violates;
use crate::ids::{SubscriptionId, UserId};
use crate::models::{User, found};
use crate::page::Cursor;
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

/// Changes to a row: `None` keeps a column, `Some(None)` sets it to `NULL`. The status, and what follows from it, is not
/// among them: see [`UserSubscription::change_status`].
#[derive(Debug, Clone, Default, AsChangeset)]
#[diesel(table_name = user_subscriptions)]
pub struct UserSubscriptionChangeset<'a> {
    /// What it pays for.
    pub plan_code: Option<SubscriptionPlan>,
    /// Subscription at Razorpay; unique.
    pub razorpay_subscription_id: Option<Option<&'a str>>,
    /// Customer at Razorpay.
    pub razorpay_customer_id: Option<Option<&'a str>>,
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
    /// Why it was cancelled, as chosen.
    pub cancellation_reason: Option<Option<&'a str>>,
    /// Why, in the user's words.
    pub cancellation_feedback: Option<Option<&'a str>>,
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
}

/// Why an operation on a subscription was not done.
#[derive(Debug, thiserror::Error)]
pub enum SubscriptionError {
    /// There is no such subscription, or it is another user's.
    #[error("no such subscription")]
    NotFound,
    /// It is in another status than the operation needs. Holds the row as it is.
    #[error("the subscription is in another status")]
    Conflict(Box<UserSubscription>),
    /// The status is one that nothing follows.
    #[error("the subscription has ended")]
    Ended,
    /// The user has a live subscription: active, past due or paused.
    #[error("the user has a live subscription")]
    LiveExists,
    /// The gateway's id belongs to a subscription that is here already.
    #[error("the gateway's id is taken")]
    GatewayIdTaken,
    /// The database refuses, or can't be reached.
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

/// The predicate of the index `user_subscriptions_one_live_per_user`. A literal: the planner can't match bound values
/// with a partial index.
fn is_live() -> SqlLiteral<Bool> {
    sql("user_subscriptions.status IN ('active', 'past_due', 'paused')")
}

/// The predicate of the index `user_subscriptions_next_billing_date_idx`.
fn is_charged() -> SqlLiteral<Bool> {
    sql("user_subscriptions.status IN ('active', 'past_due')")
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

    /// The live subscription of a user: active, past due or paused. There is at most one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn current(conn: &mut PgConnection, user_id: UserId) -> QueryResult<Option<Self>> {
        user_subscriptions::table
            .filter(user_subscriptions::user_id.eq(user_id))
            .filter(is_live())
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// The subscription that Razorpay calls by this id.
    ///
    /// # Errors
    /// Only those of the connection.
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

    /// The rows of a user, newest first, `limit` at most, from the newest or from the place given.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn list_by_user(
        conn: &mut PgConnection,
        user_id: UserId,
        after: Option<Cursor<SubscriptionId>>,
        limit: i64,
    ) -> QueryResult<Vec<Self>> {
        let mut query = user_subscriptions::table
            .filter(user_subscriptions::user_id.eq(user_id))
            .select(Self::as_select())
            .into_boxed();
        if let Some(after) = after {
            query = query.filter(
                user_subscriptions::created_at.le(after.created_at).and(
                    user_subscriptions::created_at
                        .lt(after.created_at)
                        .or(user_subscriptions::id.lt(after.id)),
                ),
            );
        }
        query
            .order((
                user_subscriptions::created_at.desc(),
                user_subscriptions::id.desc(),
            ))
            .limit(limit)
            .load(conn)
    }

    /// Begins a subscription.
    ///
    /// Where its status is a live one, the user must have no other live one. One statement; waits for a transaction that
    /// begins or ends a subscription of the same user.
    ///
    /// # Errors
    /// [`SubscriptionError::LiveExists`], which leaves a transaction of the caller's usable.
    /// [`SubscriptionError::GatewayIdTaken`], which doesn't: wrap the call in `conn.transaction` to go on after it.
    pub fn start(
        conn: &mut PgConnection,
        new: &NewUserSubscription<'_>,
    ) -> Result<Self, SubscriptionError> {
        diesel::insert_into(user_subscriptions::table)
            .values(new)
            .on_conflict(user_subscriptions::user_id)
            .filter_target(sql::<Bool>("status IN ('active', 'past_due', 'paused')"))
            .do_nothing()
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()?
            .ok_or(SubscriptionError::LiveExists)
    }

    /// Moves a subscription from one status to another, if it still is in the former, and makes `changes` with it.
    ///
    /// `from` is the status on which the decision was taken: of two that decide at once, one finds a conflict. What follows
    /// from the status is kept as well: the moment of a cancellation; since when and how often it was paused, and no pause
    /// where it isn't; no failed payments where it becomes active. One statement, which locks the row.
    ///
    /// # Errors
    /// [`SubscriptionError::Ended`] where `from` [is final](SubscriptionStatus::is_final), so that a late webhook revives
    /// nothing; [`SubscriptionError::Conflict`]; [`SubscriptionError::NotFound`]. [`SubscriptionError::LiveExists`] and
    /// [`SubscriptionError::GatewayIdTaken`] abort a transaction of the caller's: wrap the call in `conn.transaction` to go on
    /// after them.
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
        // A moment to resume may come with the changes of a pause, never with those of another status.
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

    /// Ends the live subscription `id` as upgraded and begins `new`, active whatever its `status` says, in one transaction.
    /// Gives the new one.
    ///
    /// # Errors
    /// [`SubscriptionError::NotFound`] where `id` isn't a subscription of `new.user_id`; [`SubscriptionError::Conflict`] where it
    /// isn't live, so of two upgrades at once one is done; [`SubscriptionError::GatewayIdTaken`]. Nothing is changed then.
    pub fn upgrade(
        conn: &mut PgConnection,
        id: SubscriptionId,
        new: &NewUserSubscription<'_>,
    ) -> Result<Self, SubscriptionError> {
        Self::succeed(conn, id, SubscriptionStatus::Upgraded, new)
    }

    /// As [`upgrade`](Self::upgrade), but ends the former as replaced: by a lower plan, another cycle, another gateway.
    ///
    /// # Errors
    /// The same.
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
            let ended = diesel::update(user_subscriptions::table.find(id))
                .filter(user_subscriptions::user_id.eq(new.user_id))
                .filter(is_live())
                .set((
                    user_subscriptions::status.eq(end),
                    user_subscriptions::paused_at.eq(None::<DateTime<Utc>>),
                    user_subscriptions::resume_at.eq(None::<DateTime<Utc>>),
                ))
                .execute(conn)?;
            if ended == 0 {
                return match Self::missed(conn, id) {
                    SubscriptionError::Conflict(row) if row.user_id != new.user_id => {
                        Err(SubscriptionError::NotFound)
                    }
                    error => Err(error),
                };
            }
            Ok(Self::insert(
                conn,
                &NewUserSubscription {
                    status: Some(SubscriptionStatus::Active),
                    ..new.clone()
                },
            )?)
        })
    }

    /// Counts a failed payment of an active or past due subscription, which is past due then, and sets when to charge it
    /// again; `None`: never, it leaves the [queue](Self::lock_due).
    ///
    /// One statement, which locks the row. Counts whenever it is called: record the failed payment first, and call this
    /// where it was new.
    ///
    /// # Errors
    /// [`SubscriptionError::Conflict`] where it is neither active nor past due; [`SubscriptionError::NotFound`].
    pub fn record_failed_payment(
        conn: &mut PgConnection,
        id: SubscriptionId,
        next_attempt: Option<DateTime<Utc>>,
    ) -> Result<Self, SubscriptionError> {
        diesel::update(user_subscriptions::table.find(id))
            .filter(is_charged())
            .set((
                user_subscriptions::status.eq(SubscriptionStatus::PastDue),
                user_subscriptions::failed_payment_count
                    .eq(user_subscriptions::failed_payment_count + 1),
                user_subscriptions::last_payment_attempt.eq(now),
                user_subscriptions::next_billing_date.eq(next_attempt),
            ))
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()?
            .map_or_else(|| Err(Self::missed(conn, id)), Ok)
    }

    /// Active and past due subscriptions to be charged by now, the longest due first, `limit` at most, locked until the
    /// caller's transaction ends. Those that end with their period are not among them.
    ///
    /// Several workers share the queue: one that another holds is passed over. To be called in a transaction; a row leaves
    /// the queue when its `next_billing_date` moves, so move it whether the charge succeeds or fails.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn lock_due(conn: &mut PgConnection, limit: i64) -> QueryResult<Vec<Self>> {
        user_subscriptions::table
            .filter(is_charged())
            .filter(user_subscriptions::next_billing_date.le(now))
            .filter(user_subscriptions::auto_renewal)
            .filter(diesel::dsl::not(user_subscriptions::cancel_at_period_end))
            .order(user_subscriptions::next_billing_date)
            .limit(limit)
            .for_no_key_update()
            .skip_locked()
            .select(Self::as_select())
            .load(conn)
    }

    /// Why an update of this row found nothing.
    fn missed(conn: &mut PgConnection, id: SubscriptionId) -> SubscriptionError {
        match Self::find(conn, id) {
            Ok(Some(row)) => SubscriptionError::Conflict(Box::new(row)),
            Ok(None) => SubscriptionError::NotFound,
            Err(error) => SubscriptionError::Database(error),
        }
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
        found(updated, || Self::find(conn, id))
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
