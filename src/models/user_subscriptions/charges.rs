//! The queue of subscriptions that this service charges by itself, without a subscription at the
//! gateway.

use std::collections::HashSet;

use chrono::{DateTime, Utc};
use diesel::dsl::{not, now, sql};
use diesel::expression::SqlLiteral;
use diesel::prelude::*;
use diesel::sql_types::Bool;

use super::{SubscriptionError, UserSubscription};
use crate::enums::SubscriptionStatus;
use crate::ids::{SubscriptionId, UserId};
use crate::prepared::Prepare;
use crate::schema::{user_subscriptions, users};

/// The predicate of the index `user_subscriptions_next_billing_date_idx`.
fn is_charged() -> SqlLiteral<Bool> {
    sql("user_subscriptions.status IN ('active', 'past_due')")
}

impl UserSubscription {
    /// Counts a failed payment of an active or past due subscription, makes it past due and sets
    /// its next billing date. `None` removes it from the queue of [`claim_due`](Self::claim_due).
    ///
    /// One statement, which locks the row. Every call counts: record the failed payment first, and
    /// call this only if that was new.
    ///
    /// # Errors
    /// [`SubscriptionError::Conflict`]; [`SubscriptionError::NotFound`].
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
            .prepared()
            .get_result(conn)
            .optional()?
            .map_or_else(|| Err(Self::missed(conn, id)), Ok)
    }

    /// Claims up to `limit` active and past due subscriptions whose billing date has come, earliest
    /// first, for a worker that charges them. It skips those that end with their period.
    ///
    /// Call it in a transaction: the rows and their users' keys stay locked until that ends, and
    /// other workers skip them. The worker must change `next_billing_date`, whether the charge
    /// succeeds or fails, or the row stays due. Change the user's plan in another transaction: a
    /// plan is locked before its user.
    pub fn claim_due(conn: &mut PgConnection, limit: u16) -> QueryResult<Vec<Self>> {
        let mut due: Vec<Self> = user_subscriptions::table
            .filter(is_charged())
            .filter(user_subscriptions::next_billing_date.le(now))
            .filter(user_subscriptions::auto_renewal)
            .filter(not(user_subscriptions::cancel_at_period_end))
            .order(user_subscriptions::next_billing_date)
            .limit(limit.into())
            .for_no_key_update()
            .skip_locked()
            .select(Self::as_select())
            .prepared()
            .load(conn)?;
        // The worker will insert payments of these users. It must not wait for a user while it
        // holds the subscription, so a locked user's subscription is left to the next call.
        let users: HashSet<UserId> = users::table
            .filter(users::id.eq_any(due.iter().map(|row| row.user_id)))
            .for_key_share()
            .skip_locked()
            .select(users::id)
            .load(conn)?
            .into_iter()
            .collect();
        due.retain(|row| users.contains(&row.user_id));
        Ok(due)
    }
}
