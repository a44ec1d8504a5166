//! The row. Without the feature `operations`, it is all that the crate has of the table.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;

use crate::enums::{InstanceStatus, OauthStatus};
use crate::ids::{InstanceId, ServiceId, UserId};
use crate::models::{McpService, User};
use crate::schema::mcp_service_table;

/// A row of `mcp_service_table`: a user's connection to a service.
#[derive(
    Debug,
    Clone,
    PartialEq,
    Eq,
    Serialize,
    Queryable,
    QueryableByName,
    Selectable,
    Identifiable,
    Associations,
)]
#[diesel(table_name = mcp_service_table, primary_key(instance_id), check_for_backend(Pg))]
#[diesel(belongs_to(User, foreign_key = user_id))]
#[diesel(belongs_to(McpService, foreign_key = mcp_service_id))]
#[expect(missing_docs, reason = "the other fields explain themselves")]
pub struct McpInstance {
    /// Part of the instance's public URL.
    pub instance_id: InstanceId,
    pub user_id: UserId,
    pub mcp_service_id: ServiceId,
    /// A copy of the credentials' status, kept by a trigger.
    pub oauth_status: OauthStatus,
    pub status: InstanceStatus,
    /// `None`: it never expires.
    pub expires_at: Option<DateTime<Utc>>,
    pub last_used_at: Option<DateTime<Utc>>,
    /// The number of calls.
    pub usage_count: i64,
    /// The user's name for it, at most 255 characters.
    pub custom_name: Option<String>,
    pub renewed_count: i32,
    pub last_renewed_at: Option<DateTime<Utc>>,
    pub credentials_updated_at: Option<DateTime<Utc>>,
    pub created_at: DateTime<Utc>,
    /// Calls change it too.
    pub updated_at: DateTime<Utc>,
    /// Incremented by each change, but not by calls.
    pub version: i32,
    /// When `version` was incremented.
    pub last_modified: DateTime<Utc>,
}
