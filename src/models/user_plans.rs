//! Plans: how many instances a user can have active.

mod row;

use chrono::{DateTime, Utc};
use diesel::dsl::{now, sql};
use diesel::prelude::*;
use diesel::result::Error;
use diesel::sql_types::Bool;
use serde::Serialize;
use serde_json::{Value, json};

pub use self::row::UserPlan;
use crate::enums::{InstanceStatus, OauthStatus, PlanPaymentStatus, PlanType};
use crate::error::violates;
use crate::ids::{InstanceId, UserId};
use crate::models::McpInstance;
use crate::prepared::Prepare;
use crate::schema::{mcp_service_table, user_plans};

/// What [`UserPlan::upgrade`] sets. The default is a plan without payment and without an end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProPlan<'a> {
    /// The subscription at the gateway; `None` if nobody pays.
    pub subscription_id: Option<&'a str>,
    /// The customer at the gateway; `None` keeps the stored one.
    pub customer_id: Option<&'a str>,
    /// When the plan ends; `None` means never.
    pub expires_at: Option<DateTime<Utc>>,
}

/// Why a plan was not upgraded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages say the rest")]
pub enum PlanError {
    /// Or there is no such user.
    #[error("the user has no plan")]
    NotFound,
    /// `user_plans_subscription_id_key`
    #[error("the subscription belongs to another user")]
    SubscriptionTaken,
    /// `user_plans_customer_id_key`
    #[error("the customer belongs to another user")]
    CustomerTaken,
    #[error("database error")]
    Database(#[source] Error),
}

impl From<Error> for PlanError {
    fn from(error: Error) -> Self {
        if violates(&error, "user_plans_subscription_id_key") {
            Self::SubscriptionTaken
        } else if violates(&error, "user_plans_customer_id_key") {
            Self::CustomerTaken
        } else {
            Self::Database(error)
        }
    }
}

/// A plan that became free.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Downgrade {
    /// The new row.
    pub plan: UserPlan,
    /// The instances that were switched off (inactive, or expired if past their end), newest first.
    /// Empty if the free plan allows the active ones.
    pub switched_off: Vec<McpInstance>,
}

impl UserPlan {
    /// Returns the user's plan. [`McpInstance::count_active`] tells how much of it is used.
    pub fn find_by_user(conn: &mut PgConnection, user_id: UserId) -> QueryResult<Option<Self>> {
        user_plans::table
            .filter(user_plans::user_id.eq(user_id))
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Locks the user's plan (`FOR NO KEY UPDATE`): the first lock of operations that change a plan
    /// or make an instance active. Callers of the crate use [`User::lock`](crate::models::User::lock).
    pub(crate) fn lock_by_user(
        conn: &mut PgConnection,
        user_id: UserId,
    ) -> QueryResult<Option<Self>> {
        user_plans::table
            .filter(user_plans::user_id.eq(user_id))
            .select(Self::as_select())
            .for_no_key_update()
            .first(conn)
            .optional()
    }

    /// Makes the plan pro and paid, or extends a pro plan. Switches no instance on.
    ///
    /// One statement, which locks the plan until the transaction ends.
    ///
    /// # Errors
    /// [`PlanError::NotFound`]. [`PlanError::SubscriptionTaken`] and [`PlanError::CustomerTaken`]
    /// abort the caller's transaction: to go on after them, wrap the call in `conn.transaction` (a
    /// savepoint).
    pub fn upgrade(
        conn: &mut PgConnection,
        user_id: UserId,
        pro: &ProPlan<'_>,
    ) -> Result<Self, PlanError> {
        diesel::update(user_plans::table.filter(user_plans::user_id.eq(user_id)))
            .set((
                user_plans::plan_type.eq(PlanType::Pro),
                user_plans::max_instances.eq(None::<i32>),
                user_plans::expires_at.eq(pro.expires_at),
                user_plans::subscription_id.eq(pro.subscription_id),
                pro.customer_id
                    .map(|customer_id| user_plans::customer_id.eq(customer_id)),
                user_plans::payment_status.eq(PlanPaymentStatus::Active),
            ))
            .returning(Self::as_returning())
            .prepared()
            .get_result(conn)
            .optional()?
            .ok_or(PlanError::NotFound)
    }

    /// Sets one of the plan's features, or removes it (`None`), and keeps the others. Returns `None`
    /// if the user has no plan.
    ///
    /// One statement, so that of two callers who set different features neither is lost.
    pub fn set_feature(
        conn: &mut PgConnection,
        user_id: UserId,
        name: &str,
        value: Option<&Value>,
    ) -> QueryResult<Option<Self>> {
        let of_user = user_plans::table.filter(user_plans::user_id.eq(user_id));
        let changed = match value {
            Some(value) => diesel::update(of_user)
                .set(user_plans::features.eq(user_plans::features.concat(json!({ name: value }))))
                .returning(Self::as_returning())
                .prepared()
                .get_result(conn),
            None => diesel::update(of_user)
                .set(user_plans::features.eq(user_plans::features.remove(name)))
                .returning(Self::as_returning())
                .prepared()
                .get_result(conn),
        };
        changed.optional()
    }

    /// Makes the plan free, without end and subscription; the customer stays. Returns `None` if the
    /// user has no plan.
    ///
    /// If more instances are active than the free plan allows, all are switched off, and the user
    /// chooses which one to activate. `payment_status` is the reason: cancelled, failed or none.
    ///
    /// Locks the plan, then the active instances, until the transaction ends.
    pub fn downgrade(
        conn: &mut PgConnection,
        user_id: UserId,
        payment_status: PlanPaymentStatus,
    ) -> QueryResult<Option<Downgrade>> {
        conn.transaction(|conn| {
            Self::lock_by_user(conn, user_id)?
                .map(|plan| plan.make_free(conn, payment_status))
                .transpose()
        })
    }

    /// Downgrades one pro plan that is past its end; `payment_status` becomes none. Returns `None`
    /// if no plan is due or other workers have locked all that are. Call it until then.
    ///
    /// The plan that ended first comes first. One plan per call: its instances are switched off in
    /// the same transaction.
    pub fn expire_due(conn: &mut PgConnection) -> QueryResult<Option<Downgrade>> {
        conn.transaction(|conn| {
            user_plans::table
                // A literal: the planner can't match a bind parameter with the index.
                .filter(sql::<Bool>("user_plans.plan_type = 'pro'"))
                .filter(user_plans::expires_at.le(now))
                .order(user_plans::expires_at)
                .select(Self::as_select())
                .limit(1)
                .for_no_key_update()
                .skip_locked()
                .first(conn)
                .optional()?
                .map(|plan| plan.make_free(conn, PlanPaymentStatus::None))
                .transpose()
        })
    }

    /// `self` is locked.
    fn make_free(
        &self,
        conn: &mut PgConnection,
        payment_status: PlanPaymentStatus,
    ) -> QueryResult<Downgrade> {
        // The rows that the trigger switches off, locked in the order in which it locks them.
        let active = mcp_service_table::table
            .filter(mcp_service_table::user_id.eq(self.user_id))
            .filter(mcp_service_table::status.eq(InstanceStatus::Active))
            .filter(mcp_service_table::oauth_status.eq(OauthStatus::Completed))
            .order((
                mcp_service_table::mcp_service_id,
                mcp_service_table::instance_id,
            ))
            .select(mcp_service_table::instance_id)
            .for_no_key_update()
            .load::<InstanceId>(conn)?;
        let plan = diesel::update(user_plans::table.find(self.plan_id))
            .set((
                user_plans::plan_type.eq(PlanType::Free),
                user_plans::max_instances.eq(1),
                user_plans::expires_at.eq(None::<DateTime<Utc>>),
                user_plans::subscription_id.eq(None::<&str>),
                user_plans::payment_status.eq(payment_status),
            ))
            .returning(Self::as_returning())
            .prepared()
            .get_result(conn)?;
        let switched_off = mcp_service_table::table
            .filter(mcp_service_table::instance_id.eq_any(active))
            .filter(mcp_service_table::status.ne(InstanceStatus::Active))
            .order((
                mcp_service_table::created_at.desc(),
                mcp_service_table::instance_id.desc(),
            ))
            .select(McpInstance::as_select())
            .load(conn)?;
        Ok(Downgrade { plan, switched_off })
    }
}
