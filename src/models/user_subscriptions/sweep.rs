//! The sweep: subscriptions that are over although no event of the gateway says so.

use chrono::{DateTime, Utc};
use diesel::dsl::{now, sql};
use diesel::prelude::*;
use diesel::sql_types::{Bool, Timestamptz};
use serde::Serialize;

use super::UserSubscription;
use crate::enums::SubscriptionStatus;
use crate::models::{McpInstance, UserPlan};
use crate::prepared::Prepare;
use crate::schema::{user_plans, user_subscriptions, users};

/// A subscription that [`UserSubscription::sweep`] has changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Swept {
    /// The new row.
    pub subscription: UserSubscription,
    /// The user's plan.
    pub plan: UserPlan,
    /// The instances that were switched off, newest first.
    pub switched_off: Vec<McpInstance>,
}

/// Why a subscription is over.
#[derive(Clone, Copy)]
enum Over {
    Cancelled,
    PastDue,
    Paused,
    Unpaid,
}

impl Over {
    const ALL: [Self; 4] = [Self::Cancelled, Self::PastDue, Self::Paused, Self::Unpaid];

    /// The predicate of its index, what the index is on, and up to which value that is due.
    /// Literals: the planner can't match bind parameters with an index.
    fn queue(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Cancelled => (
                "user_subscriptions.cancel_at_period_end
                 AND user_subscriptions.status IN ('active', 'past_due', 'paused')",
                "user_subscriptions.current_period_end",
                "now()",
            ),
            Self::PastDue => (
                "user_subscriptions.status = 'past_due'",
                "(extract(epoch FROM user_subscriptions.current_period_end AT TIME ZONE 'UTC')
                  + user_subscriptions.grace_period_days * 86400.0)",
                "extract(epoch FROM now())",
            ),
            Self::Paused => (
                "user_subscriptions.status = 'paused'",
                "user_subscriptions.resume_at",
                "now()",
            ),
            Self::Unpaid => (
                "user_subscriptions.status = 'created'",
                "user_subscriptions.created_at",
                "now() - interval '30 days'",
            ),
        }
    }
}

impl UserSubscription {
    /// Changes one subscription that is over, and the user's plan with it. Returns `None` if none
    /// is or other workers have locked all that are. Call it until then.
    ///
    /// | what is over | becomes |
    /// | --- | --- |
    /// | its period, and it was to end with it | cancelled |
    /// | the grace period of one that is past due | halted |
    /// | its pause | active, as of `resume_at` |
    /// | 30 days since it was created, and it was never confirmed or paid | cancelled |
    ///
    /// The gateway is not asked. An [event](Self::apply) that comes later still counts, unless the
    /// subscription is cancelled. What is cancelled but paid ends with its plan: see
    /// [`UserPlan::expire_due`].
    ///
    /// One subscription per call, so that a transaction switches off the instances of one user only.
    /// It takes its first locks, on the subscription, the user and the plan, without waiting.
    pub fn sweep(conn: &mut PgConnection) -> QueryResult<Option<Swept>> {
        conn.transaction(|conn| {
            for over in Over::ALL {
                let (is_queued, end, until) = over.queue();
                let due = user_subscriptions::table
                    .inner_join(users::table.inner_join(user_plans::table))
                    .filter(sql::<Bool>(&format!("{is_queued} AND {end} <= {until}")))
                    .order(sql::<Timestamptz>(end))
                    .select((
                        Self::as_select(),
                        UserPlan::as_select(),
                        now.into_sql::<Timestamptz>(),
                    ))
                    .limit(1)
                    .for_no_key_update()
                    .skip_locked()
                    .prepared()
                    .get_result::<(Self, UserPlan, DateTime<Utc>)>(conn)
                    .optional()?;
                if let Some((row, plan, clock)) = due {
                    let subscription = row.end(conn, over)?;
                    let payments = subscription.payments(conn)?;
                    let (plan, switched_off) =
                        subscription.carry_to_plan(conn, plan, payments.refunded, clock)?;
                    return Ok(Some(Swept {
                        subscription,
                        plan,
                        switched_off,
                    }));
                }
            }
            Ok(None)
        })
    }

    fn end(&self, conn: &mut PgConnection, over: Over) -> QueryResult<Self> {
        let status = match over {
            Over::Cancelled | Over::Unpaid => SubscriptionStatus::Cancelled,
            Over::PastDue => SubscriptionStatus::Halted,
            Over::Paused => SubscriptionStatus::Active,
        };
        let cancelled = status == SubscriptionStatus::Cancelled;
        // Else a repeated event would begin the pause again.
        let resumed = matches!(over, Over::Paused);
        diesel::update(user_subscriptions::table.find(self.id))
            .set((
                user_subscriptions::status.eq(status),
                cancelled.then(|| user_subscriptions::cancelled_at.eq(now)),
                resumed
                    .then(|| user_subscriptions::status_event_at.eq(user_subscriptions::resume_at)),
                user_subscriptions::paused_at.eq(None::<DateTime<Utc>>),
                user_subscriptions::resume_at.eq(None::<DateTime<Utc>>),
            ))
            .returning(Self::as_returning())
            .prepared()
            .get_result(conn)
    }
}
