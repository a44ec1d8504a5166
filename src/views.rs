//! Views, which the Diesel CLI doesn't print into `schema.rs`.

use bigdecimal::BigDecimal;
use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;

use crate::enums::AuditStatus;
use crate::ids::InstanceId;

diesel::table! {
    use diesel::sql_types::*;
    use crate::schema::sql_types::TokenAuditStatus;

    /// The last 30 days of `token_audit_log`. A view has no key: these columns are unique together.
    token_audit_summary (instance_id, operation, status, method) {
        /// The instance.
        instance_id -> Uuid,
        /// What was done.
        operation -> Text,
        /// How it went.
        status -> TokenAuditStatus,
        /// How it was done.
        method -> Nullable<Text>,
        /// Operations in all.
        operation_count -> Int8,
        /// Those that succeeded.
        success_count -> Int8,
        /// Those that failed.
        failure_count -> Int8,
        /// Percent, two decimals.
        success_rate -> Numeric,
        /// The latest.
        last_operation -> Timestamptz,
        /// The earliest.
        first_operation -> Timestamptz,
    }
}

/// A row of the view `token_audit_summary`: the last 30 days of one instance, operation, status and method.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable)]
#[diesel(table_name = token_audit_summary, check_for_backend(Pg))]
pub struct TokenAuditSummary {
    /// The instance, which may be gone.
    pub instance_id: InstanceId,
    /// What was done.
    pub operation: String,
    /// How it went.
    pub status: AuditStatus,
    /// How it was done.
    pub method: Option<String>,
    /// Operations in all.
    pub operation_count: i64,
    /// Those that succeeded.
    pub success_count: i64,
    /// Those that failed.
    pub failure_count: i64,
    /// Percent, two decimals.
    pub success_rate: BigDecimal,
    /// The latest.
    pub last_operation: DateTime<Utc>,
    /// The earliest.
    pub first_operation: DateTime<Utc>,
}

impl TokenAuditSummary {
    /// The summary of an instance, by operation, status and method.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn list_by_instance(
        conn: &mut PgConnection,
        instance_id: InstanceId,
    ) -> QueryResult<Vec<Self>> {
        token_audit_summary::table
            .filter(token_audit_summary::instance_id.eq(instance_id))
            .order((
                token_audit_summary::operation,
                token_audit_summary::status,
                token_audit_summary::method,
            ))
            .select(Self::as_select())
            .load(conn)
    }
}
