//! Plans: what a user may have.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;
use serde_json::Value;

use crate::enums::{InstanceStatus, OauthStatus, PlanPaymentStatus, PlanType};
use crate::error::violates;
use crate::ids::{InstanceId, PlanId, UserId};
use crate::models::{McpInstance, User, found};
use crate::schema::{mcp_service_table, user_plans};

/// A row of `user_plans`.
#[derive(
    Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable, Associations,
)]
#[diesel(table_name = user_plans, primary_key(plan_id), belongs_to(User, foreign_key = user_id), check_for_backend(Pg))]
pub struct UserPlan {
    /// Key.
    pub plan_id: PlanId,
    /// Whose plan it is; one each.
    pub user_id: UserId,
    /// Which plan.
    pub plan_type: PlanType,
    /// How many instances may be active at a time: 1 on free, `None` (any number) on pro.
    pub max_instances: Option<i32>,
    /// Features that are switched on, an object.
    pub features: Value,
    /// From then on no instance can be activated; `None`: never.
    pub expires_at: Option<DateTime<Utc>>,
    /// When the row was made.
    pub created_at: DateTime<Utc>,
    /// When the row changed last.
    pub updated_at: DateTime<Utc>,
    /// Subscription at the gateway; unique, not empty.
    pub subscription_id: Option<String>,
    /// Customer at the gateway; unique, not empty.
    pub customer_id: Option<String>,
    /// How the payments go.
    pub payment_status: PlanPaymentStatus,
}

/// A new row; `None` leaves a column to its default.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = user_plans, check_for_backend(Pg))]
pub struct NewUserPlan<'a> {
    /// Key.
    pub plan_id: Option<PlanId>,
    /// Whose plan it is; one each.
    pub user_id: UserId,
    /// Which plan.
    pub plan_type: PlanType,
    /// How many instances may be active at a time: 1 on free, `None` (any number) on pro.
    pub max_instances: Option<i32>,
    /// Features that are switched on, an object.
    pub features: Option<&'a Value>,
    /// From then on no instance can be activated; `None`: never.
    pub expires_at: Option<DateTime<Utc>>,
    /// Subscription at the gateway; unique, not empty.
    pub subscription_id: Option<&'a str>,
    /// Customer at the gateway; unique, not empty.
    pub customer_id: Option<&'a str>,
    /// How the payments go.
    pub payment_status: Option<PlanPaymentStatus>,
}

/// Changes to a row: `None` keeps a column, `Some(None)` sets it to `NULL`.
#[derive(Debug, Clone, Default, AsChangeset)]
#[diesel(table_name = user_plans)]
pub struct UserPlanChangeset<'a> {
    /// Which plan.
    pub plan_type: Option<PlanType>,
    /// How many instances may be active at a time: 1 on free, `None` (any number) on pro.
    pub max_instances: Option<Option<i32>>,
    /// Features that are switched on, an object.
    pub features: Option<&'a Value>,
    /// From then on no instance can be activated; `None`: never.
    pub expires_at: Option<Option<DateTime<Utc>>>,
    /// Subscription at the gateway; unique, not empty.
    pub subscription_id: Option<Option<&'a str>>,
    /// Customer at the gateway; unique, not empty.
    pub customer_id: Option<Option<&'a str>>,
    /// How the payments go.
    pub payment_status: Option<PlanPaymentStatus>,
}

/// What a user paid for, as [`UserPlan::upgrade`] takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProPlan<'a> {
    /// Subscription at the gateway; `None`: given by hand.
    pub subscription_id: Option<&'a str>,
    /// Customer at the gateway; `None` keeps the one that is known.
    pub customer_id: Option<&'a str>,
    /// When the plan ends; `None`: never.
    pub expires_at: Option<DateTime<Utc>>,
}

/// Why a plan wasn't upgraded.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    /// There is no such user, or the user has no plan.
    #[error("the user has no plan")]
    PlanMissing,
    /// Another user's plan has the subscription (`user_plans_subscription_id_key`).
    #[error("the subscription belongs to another user")]
    SubscriptionTaken,
    /// Another user's plan has the customer (`user_plans_customer_id_key`).
    #[error("the customer belongs to another user")]
    CustomerTaken,
    /// Anything else.
    #[error("database error")]
    Database(#[source] diesel::result::Error),
}

impl From<diesel::result::Error> for UpgradeError {
    fn from(error: diesel::result::Error) -> Self {
        if violates(&error, "user_plans_subscription_id_key") {
            Self::SubscriptionTaken
        } else if violates(&error, "user_plans_customer_id_key") {
            Self::CustomerTaken
        } else {
            Self::Database(error)
        }
    }
}

/// A plan that became the free one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Downgrade {
    /// The plan as it is now.
    pub plan: UserPlan,
    /// The instances that were switched off (inactive, or expired where they were due), newest first. None, if the user
    /// had no more active ones than the free plan allows.
    pub switched_off: Vec<McpInstance>,
}

impl UserPlan {
    /// Makes the plan pro, paid, with this end; also extends one that is pro already. Switches no instance on.
    ///
    /// One statement, which locks the row until the transaction ends. A refusal aborts the caller's transaction: wrap
    /// the call in `conn.transaction` (a savepoint) to go on after it.
    ///
    /// # Errors
    /// See [`UpgradeError`].
    pub fn upgrade(
        conn: &mut PgConnection,
        user_id: UserId,
        pro: &ProPlan<'_>,
    ) -> Result<Self, UpgradeError> {
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
            .get_result(conn)
            .optional()?
            .ok_or(UpgradeError::PlanMissing)
    }

    /// Makes the plan the free one, without end and subscription; the customer stays. If more instances are active than
    /// it allows, all of them are switched off: which one to keep is for the user to choose. `None` where the user has
    /// no plan.
    ///
    /// `payment_status` says why: cancelled, failed, or none.
    ///
    /// One transaction, in which the plan is locked first, then the active instances in registry order.
    ///
    /// # Errors
    /// Only those of the connection.
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

    /// Downgrades one pro plan that is past its end, as [`downgrade`](Self::downgrade) does, with nobody paying; `None`
    /// where no such plan is left, or the last of them are in the hands of others. A sweeper calls it until then.
    ///
    /// Several may do so at the same time: a locked plan is passed over. One plan per call, each in a transaction of its
    /// own: the instances of several users can't be switched off in one without locking the counters of services out of
    /// order.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn expire_next(conn: &mut PgConnection) -> QueryResult<Option<Downgrade>> {
        conn.transaction(|conn| {
            user_plans::table
                .filter(user_plans::plan_type.eq(PlanType::Pro))
                .filter(user_plans::expires_at.le(diesel::dsl::now))
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

    /// The row is locked.
    fn make_free(
        &self,
        conn: &mut PgConnection,
        payment_status: PlanPaymentStatus,
    ) -> QueryResult<Downgrade> {
        // The trigger locks the same rows in the same order. Locked here, they are still active when it looks.
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

    /// Inserts a row and returns it with its defaults.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn insert(conn: &mut PgConnection, new: &NewUserPlan<'_>) -> QueryResult<Self> {
        diesel::insert_into(user_plans::table)
            .values(new)
            .returning(Self::as_returning())
            .get_result(conn)
    }

    /// The row of this key, if there is one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find(conn: &mut PgConnection, plan_id: PlanId) -> QueryResult<Option<Self>> {
        user_plans::table
            .find(plan_id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// The current plan of a user: every user has one. [`McpInstance::count_active`] tells how much of it is used.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find_by_user(conn: &mut PgConnection, user_id: UserId) -> QueryResult<Option<Self>> {
        user_plans::table
            .filter(user_plans::user_id.eq(user_id))
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// The row of a user, locked (`FOR NO KEY UPDATE`) until the transaction ends.
    ///
    /// Transactions that make an instance active or change a plan lock the plan first, then `mcp_credentials`, then
    /// `mcp_service_table`: in that order they wait for each other instead of running into a deadlock.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn lock_by_user(conn: &mut PgConnection, user_id: UserId) -> QueryResult<Option<Self>> {
        user_plans::table
            .filter(user_plans::user_id.eq(user_id))
            .select(Self::as_select())
            .for_no_key_update()
            .first(conn)
            .optional()
    }

    /// Changes the row of this key and returns it as it is then; `None` where there is no such row. An empty changeset
    /// changes nothing.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn update(
        conn: &mut PgConnection,
        plan_id: PlanId,
        changes: &UserPlanChangeset<'_>,
    ) -> QueryResult<Option<Self>> {
        let updated = diesel::update(user_plans::table.find(plan_id))
            .set(changes)
            .returning(Self::as_returning())
            .get_result(conn)
            .optional_empty_changeset();
        found(updated, || Self::find(conn, plan_id))
    }

    /// Deletes the row of this key; says whether there was one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn delete(conn: &mut PgConnection, plan_id: PlanId) -> QueryResult<bool> {
        diesel::delete(user_plans::table.find(plan_id))
            .execute(conn)
            .map(|deleted| deleted == 1)
    }
}
