//! The row. Without the feature `operations`, it is all that the crate has of the table.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;
use serde_json::Value;

use crate::enums::{PlanPaymentStatus, PlanType};
use crate::ids::{PlanId, UserId};
use crate::models::User;
use crate::schema::user_plans;

/// A row of `user_plans`. Each user has exactly one.
///
/// A webhook names the subscription or the customer; each has its unique index:
///
/// ```no_run
/// # use bruhmcp_db::models::UserPlan;
/// # use bruhmcp_db::schema::user_plans;
/// # use diesel::prelude::*;
/// # fn f(conn: &mut PgConnection) -> QueryResult<()> {
/// let of_subscription = user_plans::table.filter(user_plans::subscription_id.eq("sub_1"));
/// let plan = of_subscription.select(UserPlan::as_select()).first(conn).optional()?;
/// let of_customer = user_plans::table.filter(user_plans::customer_id.eq("cust_1"));
/// let plan = of_customer.select(UserPlan::as_select()).first(conn).optional()?;
/// # Ok(())
/// # }
/// ```
///
/// Plans that end within a week, first the one that ends first:
///
/// ```no_run
/// # use bruhmcp_db::models::UserPlan;
/// # use bruhmcp_db::schema::user_plans;
/// # use chrono::{TimeDelta, Utc};
/// # use diesel::prelude::*;
/// # fn f(conn: &mut PgConnection) -> QueryResult<Vec<UserPlan>> {
/// let now = Utc::now();
/// user_plans::table
///     .filter(user_plans::expires_at.between(now, now + TimeDelta::days(7)))
///     .order((user_plans::expires_at, user_plans::plan_id))
///     .limit(100)
///     .select(UserPlan::as_select())
///     .load(conn)
/// # }
/// ```
#[derive(
    Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable, Associations,
)]
#[diesel(table_name = user_plans, primary_key(plan_id), belongs_to(User, foreign_key = user_id), check_for_backend(Pg))]
#[expect(missing_docs, reason = "the other fields explain themselves")]
pub struct UserPlan {
    pub plan_id: PlanId,
    pub user_id: UserId,
    pub plan_type: PlanType,
    /// How many instances can be active at a time: 1 on free, `None` (any number) on pro.
    pub max_instances: Option<i32>,
    /// The features that are switched on, a JSON object.
    pub features: Value,
    /// After this time no instance can be activated; `None` means never.
    pub expires_at: Option<DateTime<Utc>>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
    /// The subscription at the gateway; unique, not empty.
    pub subscription_id: Option<String>,
    /// The customer at the gateway; unique, not empty.
    pub customer_id: Option<String>,
    pub payment_status: PlanPaymentStatus,
}
