//! Views. The Diesel CLI doesn't print them into `schema.rs`.

use bigdecimal::BigDecimal;
use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;

use crate::enums::AuditStatus;
use crate::ids::InstanceId;
use crate::schema::{
    account_credits, auth_tokens, mcp_credentials, mcp_service_table, mcp_table,
    subscription_transactions, token_audit_log, user_billing_details, user_plans,
    user_subscriptions, users, webhook_events,
};

mod tables {
    #![expect(missing_docs, reason = "the columns are those of `TokenAuditSummary`")]

    diesel::table! {
        use diesel::sql_types::*;
        use crate::schema::sql_types::TokenAuditStatus;

        /// The view `token_audit_summary`. A view has no key: these columns are unique together.
        token_audit_summary (instance_id, operation, status, method) {
            instance_id -> Uuid,
            operation -> Text,
            status -> TokenAuditStatus,
            method -> Nullable<Text>,
            operation_count -> Int8,
            success_count -> Int8,
            failure_count -> Int8,
            success_rate -> Numeric,
            last_operation -> Timestamptz,
            first_operation -> Timestamptz,
        }
    }
}
pub use tables::token_audit_summary;

// Not one call with all tables: the tables among themselves are in schema.rs already.
macro_rules! joined_with {
    ($($table:ident)*) => {$(
        diesel::allow_tables_to_appear_in_same_query!(token_audit_summary, $table);
    )*};
}
joined_with! {
    account_credits
    auth_tokens
    mcp_credentials
    mcp_service_table
    mcp_table
    subscription_transactions
    token_audit_log
    user_billing_details
    user_plans
    user_subscriptions
    users
    webhook_events
}

/// A row of the view `token_audit_summary`: the last 30 days of the audit log by instance,
/// operation, status and method.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable)]
#[diesel(table_name = token_audit_summary, check_for_backend(Pg))]
#[expect(missing_docs, reason = "the other columns are those of `TokenAudit`")]
pub struct TokenAuditSummary {
    pub instance_id: InstanceId,
    pub operation: String,
    pub status: AuditStatus,
    pub method: Option<String>,
    /// The number of rows in the log.
    pub operation_count: i64,
    /// `operation_count` if the status is success, else 0.
    pub success_count: i64,
    /// `operation_count` if the status is failure, else 0.
    pub failure_count: i64,
    /// A percentage with two decimals.
    pub success_rate: BigDecimal,
    /// The time of the newest row.
    pub last_operation: DateTime<Utc>,
    /// The time of the oldest row.
    pub first_operation: DateTime<Utc>,
}

impl TokenAuditSummary {
    /// Returns the summary of an instance, sorted by operation, status and method.
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
