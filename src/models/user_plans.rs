//! Plans: what a user may have.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;
use serde_json::Value;

use crate::enums::{PlanPaymentStatus, PlanType};
use crate::ids::{PlanId, UserId};
use crate::models::User;
use crate::schema::user_plans;

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

impl UserPlan {
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

    /// The row of a user.
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
        match updated {
            Ok(Some(row)) => Ok(Some(row)),
            Ok(None) => Self::find(conn, plan_id),
            Err(diesel::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
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
