//! The monitor's sweeps: expired instances, and instances that were never authorized.
//!
//! A sweep takes no plan's lock. It locks all its rows at once and skips those that others have
//! locked, so it waits for nobody while it holds a lock.

use chrono::TimeDelta;
use diesel::dsl::{now, sql};
use diesel::expression::SqlLiteral;
use diesel::prelude::*;
use diesel::sql_types::{BigInt, Bool, Interval, Timestamptz};

use super::McpInstance;
use crate::error::NegativeSpan;
use crate::ids::InstanceId;
use crate::schema::{mcp_credentials, mcp_service_table};

impl McpInstance {
    /// Marks up to `limit` instances past their `expires_at` as expired, and returns them. It takes
    /// those that ended first.
    ///
    /// Returns none when nothing is due or every due row is locked. Repeat it until then, each time
    /// in a transaction of its own. Several workers may run it at once.
    pub fn expire_due(conn: &mut PgConnection, limit: u16) -> QueryResult<Vec<Self>> {
        // The query builder has no CTE. Without MATERIALIZED, the planner may run LIMIT with SKIP
        // LOCKED twice. An array, because the planner looks its elements up by key.
        diesel::sql_query(
            "WITH due AS MATERIALIZED (
                 SELECT instance_id
                   FROM mcp_service_table
                  WHERE expires_at <= now() AND status <> 'expired'
                  ORDER BY expires_at
                  LIMIT $1
                    FOR NO KEY UPDATE SKIP LOCKED
             )
             UPDATE mcp_service_table
                SET status = 'expired'
              WHERE instance_id = ANY (ARRAY(SELECT instance_id FROM due))
             RETURNING *",
        )
        .bind::<BigInt, _>(i64::from(limit))
        .load(conn)
    }

    /// Returns up to `limit` instances that were never authorized: pending or failed, without an
    /// access token, and with credentials that didn't change for `idle`. Those with the oldest change
    /// come first.
    ///
    /// An instance that waits for a second authorization has a token and is not listed.
    ///
    /// # Errors
    /// [`NegativeSpan`].
    pub fn list_abandoned(
        conn: &mut PgConnection,
        idle: TimeDelta,
        limit: u16,
    ) -> QueryResult<Vec<Self>> {
        NegativeSpan::check(idle)?;
        mcp_service_table::table
            .inner_join(mcp_credentials::table)
            .filter(unauthorized())
            .filter(unchanged_for(idle))
            .order((mcp_credentials::updated_at, mcp_credentials::instance_id))
            .limit(limit.into())
            .select(Self::as_select())
            .load(conn)
    }

    /// Deletes those of these instances that [`list_abandoned`](Self::list_abandoned) would still
    /// list, and returns them.
    ///
    /// One transaction. Skips instances whose row or credentials are locked, for example by an
    /// authorization that is being completed.
    ///
    /// # Errors
    /// [`NegativeSpan`].
    pub fn purge_abandoned(
        conn: &mut PgConnection,
        instance_ids: &[InstanceId],
        idle: TimeDelta,
    ) -> QueryResult<Vec<Self>> {
        NegativeSpan::check(idle)?;
        conn.transaction(|conn| {
            let abandoned = mcp_credentials::table
                .inner_join(mcp_service_table::table)
                .filter(mcp_credentials::instance_id.eq_any(instance_ids))
                .filter(unauthorized())
                .filter(unchanged_for(idle))
                .select(mcp_credentials::instance_id)
                .for_update()
                .skip_locked()
                .load::<InstanceId>(conn)?;
            diesel::delete(
                mcp_service_table::table.filter(mcp_service_table::instance_id.eq_any(abandoned)),
            )
            .returning(Self::as_returning())
            .get_results(conn)
        })
    }
}

/// The predicate of `mcp_credentials_updated_at_instance_id_idx`. A literal, because a bind can't
/// match it in a generic plan.
fn unauthorized() -> SqlLiteral<Bool> {
    sql("mcp_credentials.oauth_status IN ('pending', 'failed')
         AND mcp_credentials.access_token IS NULL")
}

#[diesel::dsl::auto_type]
fn unchanged_for(idle: TimeDelta) -> _ {
    let idle: diesel::dsl::AsExprOf<TimeDelta, Interval> = idle.into_sql::<Interval>();
    mcp_credentials::updated_at.le(now.into_sql::<Timestamptz>() - idle)
}
