//! The row. Without the feature `operations`, it is all that the crate has of the table.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;
use serde_json::Value;

use crate::enums::AuditStatus;
use crate::ids::{AuditId, InstanceId, UserId};
use crate::schema::token_audit_log;

/// A row of `token_audit_log`. It must not contain a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable)]
#[diesel(table_name = token_audit_log, primary_key(instance_id, created_at, audit_id), check_for_backend(Pg))]
#[expect(missing_docs, reason = "the other fields explain themselves")]
pub struct TokenAudit {
    pub audit_id: AuditId,
    /// The instance. It may be deleted: the log has no foreign keys.
    pub instance_id: InstanceId,
    /// The user, who may be deleted; `None` for an operation of the system.
    pub user_id: Option<UserId>,
    /// The operation, such as `token_refresh`; not empty.
    pub operation: String,
    pub status: AuditStatus,
    /// The method, such as `oauth` or `api_key`.
    pub method: Option<String>,
    pub error_type: Option<String>,
    pub error_message: Option<String>,
    /// Details. Never a token, key, code or other secret: the row can't be changed for 90 days.
    pub metadata: Option<Value>,
    /// Set by the database.
    pub created_at: DateTime<Utc>,
}
