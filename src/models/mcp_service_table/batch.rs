//! Calls counted many at a time.

use std::collections::HashSet;

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Timestamptz, Uuid};

use super::McpInstance;
use crate::ids::InstanceId;
use crate::prepared::Prepare;
use crate::transaction::Durability;

/// Calls of one instance that were made but not counted yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InstanceCalls {
    /// The instance.
    pub instance_id: InstanceId,
    /// How many.
    pub calls: u32,
    /// When the last of them was made. A time in the future counts as now.
    pub last_used_at: DateTime<Utc>,
}

impl InstanceCalls {
    /// One call, made now.
    #[must_use]
    pub fn one(instance_id: InstanceId) -> Self {
        Self {
            instance_id,
            calls: 1,
            last_used_at: Utc::now(),
        }
    }
}

#[derive(QueryableByName)]
struct Locked {
    #[diesel(sql_type = Uuid)]
    instance_id: InstanceId,
}

impl McpInstance {
    /// Counts calls of many instances, and returns those of instances that others have locked:
    /// count these again later. An instance may appear several times in `calls`.
    ///
    /// The calls were made, so they count whatever the instance's state is now: ask
    /// [`find_with_credentials`](Self::find_with_credentials) before each call. Calls of an instance
    /// that was deleted since are dropped. Versions stay, and `last_used_at` never goes back.
    ///
    /// One statement, which waits for no lock and so deadlocks with nobody. With
    /// [`Durability::Unsynced`] a crash of the server may lose what was counted last.
    /// [`Buffer`](crate::Buffer) collects the calls.
    ///
    /// # Errors
    /// [`Error::AlreadyInTransaction`](diesel::result::Error::AlreadyInTransaction) with
    /// [`Durability::Unsynced`] inside a transaction.
    pub fn record_calls(
        conn: &mut PgConnection,
        calls: &[InstanceCalls],
        durability: Durability,
    ) -> QueryResult<Vec<InstanceCalls>> {
        if calls.is_empty() {
            return Ok(Vec::new());
        }
        let ids: Vec<_> = calls.iter().map(|call| call.instance_id).collect();
        let numbers: Vec<_> = calls.iter().map(|call| i64::from(call.calls)).collect();
        let times: Vec<_> = calls.iter().map(|call| call.last_used_at).collect();
        let locked: HashSet<_> = durability.run(conn, |conn| {
            // The query builder has neither CTE nor UNNEST of several arrays.
            diesel::sql_query(
                "WITH given AS MATERIALIZED (
                     SELECT instance_id, sum(calls)::bigint AS calls, max(last_used_at) AS last_used_at
                       FROM unnest($1, $2, $3) AS call (instance_id, calls, last_used_at)
                      GROUP BY instance_id
                 ), free AS MATERIALIZED (
                     SELECT instance.instance_id
                       FROM mcp_service_table AS instance
                       JOIN given USING (instance_id)
                        FOR NO KEY UPDATE OF instance SKIP LOCKED
                 ), counted AS (
                     UPDATE mcp_service_table AS instance
                        SET usage_count  = usage_count + given.calls,
                            last_used_at = greatest(instance.last_used_at,
                                                    least(given.last_used_at, now()))
                       FROM free JOIN given USING (instance_id)
                      WHERE instance.instance_id = free.instance_id
                     RETURNING instance.instance_id
                 )
                 SELECT given.instance_id
                   FROM given
                   JOIN mcp_service_table AS instance USING (instance_id)
                  WHERE NOT EXISTS (SELECT FROM counted
                                     WHERE counted.instance_id = given.instance_id)",
            )
            .bind::<Array<Uuid>, _>(ids)
            .bind::<Array<BigInt>, _>(numbers)
            .bind::<Array<Timestamptz>, _>(times)
            .prepared()
            .load(conn)
            .map(|rows: Vec<Locked>| rows.into_iter().map(|row| row.instance_id).collect())
        })?;
        let again = calls
            .iter()
            .filter(|call| locked.contains(&call.instance_id));
        Ok(again.copied().collect())
    }
}
