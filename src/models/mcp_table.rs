//! Services: the registry of what users can connect to.

use chrono::{DateTime, Utc};
use diesel::dsl::sql;
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::sql_types::Bool;
use diesel::upsert::excluded;
use serde::Serialize;

use crate::enums::AuthType;
use crate::ids::ServiceId;
use crate::models::found;
use crate::schema::mcp_table;

/// A row of `mcp_table`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable)]
#[diesel(table_name = mcp_table, primary_key(mcp_service_id), check_for_backend(Pg))]
pub struct McpService {
    /// Key.
    pub mcp_service_id: ServiceId,
    /// Name in URLs: `[a-z0-9][a-z0-9_-]{0,49}`; unique.
    pub mcp_service_name: String,
    /// Name for people, 1 to 100 characters.
    pub display_name: String,
    /// For people.
    pub description: Option<String>,
    /// Path of the icon.
    pub icon_url_path: Option<String>,
    /// TCP port on which it listens; unique.
    pub port: i32,
    /// How it authenticates.
    #[serde(rename = "type")]
    pub type_: AuthType,
    /// False: takes no new instance.
    pub is_active: bool,
    /// Instances ever created; kept by the database.
    pub total_instances_created: i64,
    /// Instances that are active and completed; kept by the database.
    pub active_instances_count: i64,
    /// When the row was made.
    pub created_at: DateTime<Utc>,
    /// When the row changed last, counters aside.
    pub updated_at: DateTime<Utc>,
}

/// A new row; `None` leaves a column to its default.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = mcp_table, check_for_backend(Pg))]
pub struct NewMcpService<'a> {
    /// Key.
    pub mcp_service_id: Option<ServiceId>,
    /// Name in URLs: `[a-z0-9][a-z0-9_-]{0,49}`; unique.
    pub mcp_service_name: &'a str,
    /// Name for people, 1 to 100 characters.
    pub display_name: &'a str,
    /// For people.
    pub description: Option<&'a str>,
    /// Path of the icon.
    pub icon_url_path: Option<&'a str>,
    /// TCP port on which it listens; unique.
    pub port: i32,
    /// How it authenticates.
    pub type_: AuthType,
    /// False: takes no new instance.
    pub is_active: Option<bool>,
}

/// Changes to a row: `None` keeps a column, `Some(None)` sets it to `NULL`.
#[derive(Debug, Clone, Default, AsChangeset)]
#[diesel(table_name = mcp_table)]
pub struct McpServiceChangeset<'a> {
    /// Name for people, 1 to 100 characters.
    pub display_name: Option<&'a str>,
    /// For people.
    pub description: Option<Option<&'a str>>,
    /// Path of the icon.
    pub icon_url_path: Option<Option<&'a str>>,
    /// TCP port on which it listens; unique.
    pub port: Option<i32>,
}

/// What [`McpService::register`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Registered {
    /// There was no service of this name.
    New(McpService),
    /// There was one, and it was different.
    Changed(McpService),
    /// There was one just like this. Nothing was written.
    Unchanged(McpService),
}

impl Registered {
    /// The service as it is now.
    #[must_use]
    pub fn into_service(self) -> McpService {
        let (Self::New(service) | Self::Changed(service) | Self::Unchanged(service)) = self;
        service
    }
}

impl McpService {
    /// Brings the registry in line with a service as it was deployed, found by its name. May be repeated at each start:
    /// a service that is there already, just so, isn't written to.
    ///
    /// `mcp_service_id` and `is_active` count for a new service only: one that was disabled stays so.
    ///
    /// One statement, and a read where nothing changed. It locks the row of the service until the transaction ends, and
    /// waits for transactions that are about to create an instance of it; so register each service in a transaction of
    /// its own.
    ///
    /// # Errors
    /// Any broken rule of the table, such as `mcp_table_port_key`: another service has the port. `NotFound` if somebody
    /// deletes the service at this very moment.
    pub fn register(conn: &mut PgConnection, new: &NewMcpService<'_>) -> QueryResult<Registered> {
        // The filter of the prelude has no DO UPDATE … WHERE.
        use diesel::query_dsl::methods::FilterDsl;

        let written = diesel::insert_into(mcp_table::table)
            .values(new)
            .on_conflict(mcp_table::mcp_service_name)
            .do_update()
            .set((
                mcp_table::display_name.eq(excluded(mcp_table::display_name)),
                mcp_table::description.eq(excluded(mcp_table::description)),
                mcp_table::icon_url_path.eq(excluded(mcp_table::icon_url_path)),
                mcp_table::port.eq(excluded(mcp_table::port)),
                mcp_table::type_.eq(excluded(mcp_table::type_)),
            ))
            .filter(
                mcp_table::display_name
                    .ne(excluded(mcp_table::display_name))
                    .or(mcp_table::description.is_distinct_from(excluded(mcp_table::description)))
                    .or(mcp_table::icon_url_path
                        .is_distinct_from(excluded(mcp_table::icon_url_path)))
                    .or(mcp_table::port.ne(excluded(mcp_table::port)))
                    .or(mcp_table::type_.ne(excluded(mcp_table::type_))),
            )
            // A row that is updated on conflict was locked first, and its xmax still says so.
            .returning((Self::as_returning(), sql::<Bool>("xmax = 0")))
            .get_result(conn)
            .optional()?;
        match written {
            Some((service, true)) => Ok(Registered::New(service)),
            Some((service, false)) => Ok(Registered::Changed(service)),
            None => Self::find_by_name(conn, new.mcp_service_name)?
                .map(Registered::Unchanged)
                .ok_or(diesel::NotFound),
        }
    }

    /// Enables or disables a service and returns it; `None` where there is no such service. A disabled service takes no
    /// new instance; those that exist go on, and one that is being created at this very moment may still get in.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn set_enabled(
        conn: &mut PgConnection,
        mcp_service_id: ServiceId,
        enabled: bool,
    ) -> QueryResult<Option<Self>> {
        diesel::update(mcp_table::table.find(mcp_service_id))
            .set(mcp_table::is_active.eq(enabled))
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()
    }

    /// Inserts a row and returns it with its defaults.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn insert(conn: &mut PgConnection, new: &NewMcpService<'_>) -> QueryResult<Self> {
        diesel::insert_into(mcp_table::table)
            .values(new)
            .returning(Self::as_returning())
            .get_result(conn)
    }

    /// The row of this key, if there is one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find(conn: &mut PgConnection, mcp_service_id: ServiceId) -> QueryResult<Option<Self>> {
        mcp_table::table
            .find(mcp_service_id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// The service of this name, if there is one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find_by_name(conn: &mut PgConnection, name: &str) -> QueryResult<Option<Self>> {
        mcp_table::table
            .filter(mcp_table::mcp_service_name.eq(name))
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// All services, by name.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn list(conn: &mut PgConnection) -> QueryResult<Vec<Self>> {
        mcp_table::table
            .order(mcp_table::mcp_service_name)
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
        mcp_service_id: ServiceId,
        changes: &McpServiceChangeset<'_>,
    ) -> QueryResult<Option<Self>> {
        let updated = diesel::update(mcp_table::table.find(mcp_service_id))
            .set(changes)
            .returning(Self::as_returning())
            .get_result(conn)
            .optional_empty_changeset();
        found(updated, || Self::find(conn, mcp_service_id))
    }

    /// Deletes the row of this key; says whether there was one.
    ///
    /// # Errors
    /// A foreign key, while other rows refer to it.
    pub fn delete(conn: &mut PgConnection, mcp_service_id: ServiceId) -> QueryResult<bool> {
        diesel::delete(mcp_table::table.find(mcp_service_id))
            .execute(conn)
            .map(|deleted| deleted == 1)
    }
}
