//! The registry of MCP services.

mod row;

use diesel::connection::SimpleConnection;
use diesel::dsl::sql;
use diesel::prelude::*;
use diesel::sql_types::Bool;
use diesel::upsert::excluded;

pub use self::row::McpService;
use crate::enums::AuthType;
use crate::ids::ServiceId;
use crate::models::Recorded;
use crate::schema::mcp_table;

/// A service as it is deployed, for [`McpService::register`].
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = mcp_table, treat_none_as_default_value = false, check_for_backend(Pg))]
#[expect(missing_docs, reason = "the fields are those of `McpService`")]
pub struct NewMcpService<'a> {
    pub mcp_service_name: &'a str,
    pub display_name: &'a str,
    pub description: Option<&'a str>,
    pub icon_url_path: Option<&'a str>,
    pub port: i32,
    pub type_: AuthType,
}

impl<'a> NewMcpService<'a> {
    /// A service without description and icon. Its name is also its display name.
    #[must_use]
    pub fn new(mcp_service_name: &'a str, port: i32, type_: AuthType) -> Self {
        Self {
            mcp_service_name,
            display_name: mcp_service_name,
            description: None,
            icon_url_path: None,
            port,
            type_,
        }
    }
}

impl McpService {
    /// Inserts a service, or brings the existing one of this name in line with `new`. Call it in
    /// each deploy, as `app_admin`.
    ///
    /// `Existing` holds the row after the change; an equal row is not written. A disabled service
    /// stays disabled.
    ///
    /// Locks the service's row and waits for transactions that create an instance of it. Register
    /// each service in a transaction of its own.
    ///
    /// # Errors
    /// The constraints of the table, such as `mcp_table_port_key` when another service has the
    /// port.
    pub fn register(
        conn: &mut PgConnection,
        new: &NewMcpService<'_>,
    ) -> QueryResult<Recorded<Self>> {
        // The prelude's filter has no DO UPDATE … WHERE.
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
            // ON CONFLICT locks a row before it updates it, and the lock leaves the xmax.
            .returning((Self::as_returning(), sql::<Bool>("xmax = 0")))
            .get_result(conn)
            .optional()?;
        match written {
            Some((service, true)) => Ok(Recorded::New(service)),
            Some((service, false)) => Ok(Recorded::Existing(service)),
            None => Self::find_by_name(conn, new.mcp_service_name)?
                .map(Recorded::Existing)
                .ok_or(diesel::NotFound),
        }
    }

    /// Enables or disables a service and returns it; `None` if it doesn't exist. Call it as
    /// `app_admin`.
    ///
    /// A disabled service takes no new instance, and its instances can't be called. Disabling
    /// doesn't wait for open transactions, so an instance that one of them creates may still
    /// appear.
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

    /// Returns the service with this key.
    pub fn find(conn: &mut PgConnection, mcp_service_id: ServiceId) -> QueryResult<Option<Self>> {
        mcp_table::table
            .find(mcp_service_id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Returns the service with this name in URLs.
    pub fn find_by_name(conn: &mut PgConnection, name: &str) -> QueryResult<Option<Self>> {
        mcp_table::table
            .filter(mcp_table::mcp_service_name.eq(name))
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Counts the instances of all services again, corrects the counters that are wrong, and
    /// returns the services that it changed. For a database whose rows were loaded past the
    /// triggers, or twice (`docs/operations.md`).
    ///
    /// `total_instances_created` also counts deleted instances, of which no row is left. It is only
    /// raised to the number of existing instances, never lowered.
    ///
    /// Safe beside other transactions. Locks all services, so that commits that change a counter
    /// wait. Call it last in a transaction. Needs UPDATE on `mcp_table`, which `app_admin` has.
    ///
    /// # Errors
    /// A serialization failure at the stricter isolation levels, if a counter has changed since the
    /// transaction began.
    pub fn recount(conn: &mut PgConnection) -> QueryResult<Vec<Self>> {
        conn.transaction(|conn| {
            // Instances of this transaction that are still to be counted would be counted twice.
            conn.batch_execute(
                "SET CONSTRAINTS mcp_service_table_count_insert, mcp_service_table_count_update,
                    mcp_service_table_count_delete IMMEDIATE",
            )?;
            // Not by the UPDATE itself: having waited for a commit, it would still count in its
            // older snapshot. After the lock, every other transaction is either visible or counts
            // itself later.
            mcp_table::table
                .select(mcp_table::mcp_service_id)
                .order(mcp_table::mcp_service_id)
                .for_no_key_update()
                .execute(conn)?;
            // The query builder has no UPDATE … FROM; subqueries would count once per service.
            diesel::sql_query(
                "UPDATE mcp_table AS service
                    SET active_instances_count = counted.active,
                        total_instances_created =
                            greatest(total_instances_created, counted.existing)
                   FROM (SELECT mcp_table.mcp_service_id,
                                count(instance_id) AS existing,
                                count(*) FILTER (
                                    WHERE status = 'active' AND oauth_status = 'completed'
                                ) AS active
                           FROM mcp_table
                           LEFT JOIN mcp_service_table USING (mcp_service_id)
                          GROUP BY mcp_table.mcp_service_id) AS counted
                  WHERE service.mcp_service_id = counted.mcp_service_id
                    AND (active_instances_count <> counted.active
                        OR total_instances_created < counted.existing)
                 RETURNING service.*, type AS type_",
            )
            .load(conn)
        })
    }
}
