//! The row. Without the feature `operations`, it is all that the crate has of the table.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;

use crate::enums::AuthType;
use crate::ids::ServiceId;
use crate::schema::mcp_table;

/// A row of `mcp_table`: a service that users can connect to.
///
/// The services that a user can choose from, by name. The table is small:
///
/// ```no_run
/// # use bruhmcp_db::models::McpService;
/// # use bruhmcp_db::schema::mcp_table;
/// # use diesel::prelude::*;
/// # fn f(conn: &mut PgConnection) -> QueryResult<Vec<McpService>> {
/// mcp_table::table
///     .filter(mcp_table::is_active)
///     .order(mcp_table::mcp_service_name)
///     .select(McpService::as_select())
///     .load(conn)
/// # }
/// ```
#[derive(
    Debug, Clone, PartialEq, Eq, Serialize, Queryable, QueryableByName, Selectable, Identifiable,
)]
#[diesel(table_name = mcp_table, primary_key(mcp_service_id), check_for_backend(Pg))]
#[expect(missing_docs, reason = "the other fields explain themselves")]
pub struct McpService {
    pub mcp_service_id: ServiceId,
    /// The name in URLs: `[a-z0-9][a-z0-9_-]{0,49}`, unique.
    pub mcp_service_name: String,
    /// The name shown to users, 1 to 100 characters.
    pub display_name: String,
    pub description: Option<String>,
    pub icon_url_path: Option<String>,
    /// The TCP port, unique.
    pub port: i32,
    #[serde(rename = "type")]
    pub type_: AuthType,
    /// `false`: no new instances, and the existing ones can't be called.
    pub is_active: bool,
    /// Kept by triggers at commit; deleted instances count too.
    pub total_instances_created: i64,
    /// Instances that are active and completed. Kept by triggers at commit.
    pub active_instances_count: i64,
    pub created_at: DateTime<Utc>,
    /// The counters don't touch it.
    pub updated_at: DateTime<Utc>,
}
