//! The audit log of tokens and credentials: append-only for 90 days.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;
use serde_json::Value;

use crate::enums::AuditStatus;
use crate::ids::{AuditId, InstanceId, UserId};
use crate::page::Cursor;
use crate::schema::token_audit_log;

/// A row of `token_audit_log`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable)]
#[diesel(table_name = token_audit_log, primary_key(audit_id), check_for_backend(Pg))]
pub struct TokenAudit {
    /// Key.
    pub audit_id: AuditId,
    /// The instance, which may be gone.
    pub instance_id: InstanceId,
    /// The user, who may be gone; `None`: done by the system.
    pub user_id: Option<UserId>,
    /// What was done, such as `token_refresh`; not empty.
    pub operation: String,
    /// How it went.
    pub status: AuditStatus,
    /// How, such as `oauth`.
    pub method: Option<String>,
    /// What sort of error.
    pub error_type: Option<String>,
    /// The error, without secrets.
    pub error_message: Option<String>,
    /// More, without secrets.
    pub metadata: Option<Value>,
    /// When.
    pub created_at: DateTime<Utc>,
}

/// A new row; `None` leaves a column to its default.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = token_audit_log, check_for_backend(Pg))]
pub struct NewTokenAudit<'a> {
    /// The instance, which may be gone.
    pub instance_id: InstanceId,
    /// The user, who may be gone; `None`: done by the system.
    pub user_id: Option<UserId>,
    /// What was done, such as `token_refresh`; not empty.
    pub operation: &'a str,
    /// How it went.
    pub status: AuditStatus,
    /// How, such as `oauth`.
    pub method: Option<&'a str>,
    /// What sort of error.
    pub error_type: Option<&'a str>,
    /// The error, without secrets.
    pub error_message: Option<&'a str>,
    /// More, without secrets.
    pub metadata: Option<&'a Value>,
}

#[diesel::declare_sql_function]
extern "SQL" {
    fn cleanup_old_token_audit_logs(
        max_rows: diesel::sql_types::Integer,
    ) -> diesel::sql_types::BigInt;
}

impl TokenAudit {
    /// Appends a row and returns it with its defaults. It can't be changed any more.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn insert(conn: &mut PgConnection, new: &NewTokenAudit<'_>) -> QueryResult<Self> {
        diesel::insert_into(token_audit_log::table)
            .values(new)
            .returning(Self::as_returning())
            .get_result(conn)
    }

    /// The row of this key, if there is one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find(conn: &mut PgConnection, audit_id: AuditId) -> QueryResult<Option<Self>> {
        token_audit_log::table
            .find(audit_id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// What was done with an instance, newest first, `limit` at most, from the newest or from the place given.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn list_by_instance(
        conn: &mut PgConnection,
        instance_id: InstanceId,
        after: Option<Cursor<AuditId>>,
        limit: i64,
    ) -> QueryResult<Vec<Self>> {
        let mut query = token_audit_log::table
            .filter(token_audit_log::instance_id.eq(instance_id))
            .select(Self::as_select())
            .into_boxed();
        if let Some(after) = after {
            query = query.filter(
                token_audit_log::created_at.le(after.created_at).and(
                    token_audit_log::created_at
                        .lt(after.created_at)
                        .or(token_audit_log::audit_id.lt(after.id)),
                ),
            );
        }
        query
            .order((
                token_audit_log::created_at.desc(),
                token_audit_log::audit_id.desc(),
            ))
            .limit(limit)
            .load(conn)
    }

    /// Deletes rows older than 90 days, oldest first, `max_rows` at most; says how many. Call it until that is less than
    /// `max_rows`.
    ///
    /// Rows that another clean-up is deleting are left to it.
    ///
    /// # Errors
    /// Only those of the connection, and a missing right: only administrators may.
    pub fn clean_up(conn: &mut PgConnection, max_rows: i32) -> QueryResult<i64> {
        diesel::select(cleanup_old_token_audit_logs(max_rows)).get_result(conn)
    }
}
