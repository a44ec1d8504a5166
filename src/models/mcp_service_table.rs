//! Instances: users' connections to MCP services.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;

use crate::enums::{InstanceStatus, OauthStatus};
use crate::ids::{InstanceId, ServiceId, UserId};
use crate::models::{McpService, User};
use crate::schema::mcp_service_table;

/// A row of `mcp_service_table`.
#[derive(
    Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable, Associations,
)]
#[diesel(table_name = mcp_service_table, primary_key(instance_id), belongs_to(User, foreign_key = user_id), belongs_to(McpService, foreign_key = mcp_service_id), check_for_backend(Pg))]
pub struct McpInstance {
    /// Key; stands in the public URL.
    pub instance_id: InstanceId,
    /// Whose instance it is.
    pub user_id: UserId,
    /// The service; stays the same.
    pub mcp_service_id: ServiceId,
    /// Copy of the credentials' status, kept by the database.
    pub oauth_status: OauthStatus,
    /// Whether it may be called.
    pub status: InstanceStatus,
    /// When it ends; `None`: never.
    pub expires_at: Option<DateTime<Utc>>,
    /// When it was called last.
    pub last_used_at: Option<DateTime<Utc>>,
    /// Calls so far.
    pub usage_count: i64,
    /// The user's own name for it, at most 255 characters.
    pub custom_name: Option<String>,
    /// How often it was renewed.
    pub renewed_count: i32,
    /// When it was renewed last.
    pub last_renewed_at: Option<DateTime<Utc>>,
    /// When its credentials were changed last.
    pub credentials_updated_at: Option<DateTime<Utc>>,
    /// When the row was made.
    pub created_at: DateTime<Utc>,
    /// When the row changed last, calls included.
    pub updated_at: DateTime<Utc>,
    /// Edit token: goes up with each change but the counting of calls.
    pub version: i32,
    /// When `version` went up last.
    pub last_modified: DateTime<Utc>,
}

/// A new row; `None` leaves a column to its default.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = mcp_service_table, check_for_backend(Pg))]
pub struct NewMcpInstance<'a> {
    /// Key; stands in the public URL.
    pub instance_id: Option<InstanceId>,
    /// Whose instance it is.
    pub user_id: UserId,
    /// The service; stays the same.
    pub mcp_service_id: ServiceId,
    /// Copy of the credentials' status, kept by the database.
    pub oauth_status: Option<OauthStatus>,
    /// Whether it may be called.
    pub status: Option<InstanceStatus>,
    /// When it ends; `None`: never.
    pub expires_at: Option<DateTime<Utc>>,
    /// The user's own name for it, at most 255 characters.
    pub custom_name: Option<&'a str>,
}

/// Changes to a row: `None` keeps a column, `Some(None)` sets it to `NULL`.
#[derive(Debug, Clone, Default, AsChangeset)]
#[diesel(table_name = mcp_service_table)]
pub struct McpInstanceChangeset<'a> {
    /// Whether it may be called.
    pub status: Option<InstanceStatus>,
    /// When it ends; `None`: never.
    pub expires_at: Option<Option<DateTime<Utc>>>,
    /// The user's own name for it, at most 255 characters.
    pub custom_name: Option<Option<&'a str>>,
    /// How often it was renewed.
    pub renewed_count: Option<i32>,
    /// When it was renewed last.
    pub last_renewed_at: Option<Option<DateTime<Utc>>>,
    /// When its credentials were changed last.
    pub credentials_updated_at: Option<Option<DateTime<Utc>>>,
}

impl McpInstance {
    /// Inserts a row and returns it with its defaults.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn insert(conn: &mut PgConnection, new: &NewMcpInstance<'_>) -> QueryResult<Self> {
        diesel::insert_into(mcp_service_table::table)
            .values(new)
            .returning(Self::as_returning())
            .get_result(conn)
    }

    /// The row of this key, if there is one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find(conn: &mut PgConnection, instance_id: InstanceId) -> QueryResult<Option<Self>> {
        mcp_service_table::table
            .find(instance_id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// The rows of a user, newest first, `limit` at most.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn list_by_user(
        conn: &mut PgConnection,
        user_id: UserId,
        limit: i64,
    ) -> QueryResult<Vec<Self>> {
        mcp_service_table::table
            .filter(mcp_service_table::user_id.eq(user_id))
            .order((
                mcp_service_table::created_at.desc(),
                mcp_service_table::instance_id.desc(),
            ))
            .limit(limit)
            .select(Self::as_select())
            .load(conn)
    }

    /// Changes the row of this key and returns it as it is then; `None` where there is no such row. An empty changeset
    /// changes nothing.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn update(
        conn: &mut PgConnection,
        instance_id: InstanceId,
        changes: &McpInstanceChangeset<'_>,
    ) -> QueryResult<Option<Self>> {
        let updated = diesel::update(mcp_service_table::table.find(instance_id))
            .set(changes)
            .returning(Self::as_returning())
            .get_result(conn)
            .optional_empty_changeset();
        match updated {
            Ok(Some(row)) => Ok(Some(row)),
            Ok(None) => Self::find(conn, instance_id),
            Err(diesel::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Deletes the row of this key; says whether there was one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn delete(conn: &mut PgConnection, instance_id: InstanceId) -> QueryResult<bool> {
        diesel::delete(mcp_service_table::table.find(instance_id))
            .execute(conn)
            .map(|deleted| deleted == 1)
    }
}
