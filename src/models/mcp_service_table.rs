//! Instances: users' connections to MCP services.

use chrono::{DateTime, TimeDelta, Utc};
use diesel::connection::SimpleConnection;
use diesel::dsl::{case_when, now};
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::query_builder::{AstPass, QueryFragment, QueryId};
use diesel::sql_types::{BigInt, Interval, Nullable, Timestamptz, Uuid};
use serde::Serialize;

use crate::enums::{InstanceStatus, OauthStatus};
use crate::error::violates;
use crate::ids::{InstanceId, ServiceId, UserId};
use crate::models::{McpCredential, McpService, NewMcpCredential, User, UserPlan, found};
use crate::page::Cursor;
use crate::schema::sql_types::McpInstanceStatus;
use crate::schema::{mcp_credentials, mcp_service_table, mcp_table};

/// A row of `mcp_service_table`.
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

/// The state of an instance's credentials, without the secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable)]
#[diesel(table_name = mcp_credentials, check_for_backend(Pg))]
pub struct CredentialState {
    /// OAuth client.
    pub client_id: Option<String>,
    /// When the access token ends.
    pub token_expires_at: Option<DateTime<Utc>>,
    /// Scopes granted, separated by spaces.
    pub token_scope: Option<String>,
    /// Where the authorisation is.
    pub oauth_status: OauthStatus,
    /// When `oauth_status` left pending; `None` exactly while pending.
    pub oauth_completed_at: Option<DateTime<Utc>>,
    /// When the credentials changed last.
    pub updated_at: DateTime<Utc>,
}

/// An instance as its owner sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable)]
#[diesel(table_name = mcp_service_table, check_for_backend(Pg))]
pub struct InstanceDetails {
    /// The instance.
    #[diesel(embed)]
    pub instance: McpInstance,
    /// Its service.
    #[diesel(embed)]
    pub service: McpService,
    /// Its credentials; `None`: they were deleted.
    #[diesel(embed)]
    pub credentials: Option<CredentialState>,
}

/// Which instances [`McpInstance::list_by_user`] returns; the default: all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InstanceFilter<'a> {
    /// Those of this status.
    pub status: Option<InstanceStatus>,
    /// Those of the service of this name.
    pub service_name: Option<&'a str>,
}

/// Why an instance wasn't created or made active.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// The user has as many active instances as the plan allows (`user_plan_active_limit`).
    #[error("the plan allows no further active instance")]
    LimitReached,
    /// The plan is past its end (`user_plan_expired`).
    #[error("the plan has expired")]
    PlanExpired,
    /// There is no such user, or the user has no plan (`user_plan_missing`).
    #[error("the user has no plan")]
    PlanMissing,
    /// The service takes no new instance (`mcp_table_service_disabled`).
    #[error("the service is disabled")]
    ServiceDisabled,
    /// There is no such service (`mcp_service_table_mcp_service_id_fkey`).
    #[error("there is no such service")]
    UnknownService,
    /// The user has no such instance.
    #[error("there is no such instance")]
    NotFound,
    /// The instance is past its end, or would be.
    #[error("the instance has expired")]
    InstanceExpired,
    /// Anything else.
    #[error("database error")]
    Database(#[source] diesel::result::Error),
}

impl From<diesel::result::Error> for InstanceError {
    fn from(error: diesel::result::Error) -> Self {
        if violates(&error, "user_plan_active_limit") {
            Self::LimitReached
        } else if violates(&error, "user_plan_expired") {
            Self::PlanExpired
        } else if violates(&error, "user_plan_missing") {
            Self::PlanMissing
        } else if violates(&error, "mcp_table_service_disabled") {
            Self::ServiceDisabled
        } else if violates(&error, "mcp_service_table_mcp_service_id_fkey") {
            Self::UnknownService
        } else {
            Self::Database(error)
        }
    }
}

/// Why an instance wasn't renamed.
#[derive(Debug, thiserror::Error)]
pub enum RenameError {
    /// The user has no such instance.
    #[error("there is no such instance")]
    NotFound,
    /// It was changed since it was read. Holds it as it is now.
    #[error("the instance was changed meanwhile")]
    Conflict(Box<McpInstance>),
    /// Anything else.
    #[error("database error")]
    Database(#[from] diesel::result::Error),
}

impl McpInstance {
    /// Inserts a row without credentials and returns it with its defaults; [`create`](Self::create) inserts both.
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

    /// Changes the row of this key and returns it as it is then; `None` where there is no such row. An empty changeset
    /// changes nothing. The status has operations of its own: [`activate`](Self::activate) and those beside it.
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
        found(updated, || Self::find(conn, instance_id))
    }

    /// Inserts an instance and its credentials. The instance's key is the one that the credentials name, and its
    /// `oauth_status` becomes theirs: with a completed status it is counted against the plan, while pending it is not.
    ///
    /// One transaction (inside another: a savepoint), in which the plan is locked first. Users wait for none but
    /// themselves.
    ///
    /// # Errors
    /// See [`InstanceError`]; `Database` where another rule is broken, such as `check_credential_type`. Nothing is
    /// inserted then.
    pub fn create(
        conn: &mut PgConnection,
        new: &NewMcpInstance<'_>,
        credential: &NewMcpCredential<'_>,
    ) -> Result<(Self, McpCredential), InstanceError> {
        conn.transaction(|conn| {
            lock_plan(conn, new.user_id)?;
            let new = NewMcpInstance {
                instance_id: Some(credential.instance_id),
                oauth_status: None,
                ..new.clone()
            };
            Self::insert(conn, &new)?;
            let credential = McpCredential::insert(conn, credential)?;
            let instance = mcp_service_table::table
                .find(credential.instance_id)
                .select(Self::as_select())
                .first(conn)?;
            Ok((instance, credential))
        })
    }

    /// A user's instance as the owner sees it.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find_by_user(
        conn: &mut PgConnection,
        instance_id: InstanceId,
        user_id: UserId,
    ) -> QueryResult<Option<InstanceDetails>> {
        mcp_service_table::table
            .inner_join(mcp_table::table)
            .left_join(mcp_credentials::table)
            .filter(mcp_service_table::instance_id.eq(instance_id))
            .filter(mcp_service_table::user_id.eq(user_id))
            .select(InstanceDetails::as_select())
            .first(conn)
            .optional()
    }

    /// An instance whose authorisation is completed, with all that it takes to call it: the service and the credentials,
    /// secrets included. `None` if there is none, of this service. Whether it is active is for the caller to look at.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find_with_credentials(
        conn: &mut PgConnection,
        instance_id: InstanceId,
        service_name: &str,
    ) -> QueryResult<Option<(Self, McpService, McpCredential)>> {
        mcp_service_table::table
            .inner_join(mcp_table::table)
            .inner_join(mcp_credentials::table)
            .filter(mcp_service_table::instance_id.eq(instance_id))
            .filter(mcp_service_table::oauth_status.eq(OauthStatus::Completed))
            .filter(mcp_table::mcp_service_name.eq(service_name))
            .select((
                Self::as_select(),
                McpService::as_select(),
                McpCredential::as_select(),
            ))
            .first(conn)
            .optional()
    }

    /// A user's instances as the owner sees them, newest first, `limit` at most, after the place given.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn list_by_user(
        conn: &mut PgConnection,
        user_id: UserId,
        filter: InstanceFilter<'_>,
        after: Option<Cursor<InstanceId>>,
        limit: i64,
    ) -> QueryResult<Vec<InstanceDetails>> {
        let mut query = mcp_service_table::table
            .inner_join(mcp_table::table)
            .left_join(mcp_credentials::table)
            .filter(mcp_service_table::user_id.eq(user_id))
            .select(InstanceDetails::as_select())
            .into_boxed();
        if let Some(status) = filter.status {
            query = query.filter(mcp_service_table::status.eq(status));
        }
        if let Some(service_name) = filter.service_name {
            query = query.filter(mcp_table::mcp_service_name.eq(service_name));
        }
        if let Some(after) = after {
            query = query
                .filter(mcp_service_table::created_at.le(after.created_at))
                .filter(
                    mcp_service_table::created_at
                        .lt(after.created_at)
                        .or(mcp_service_table::instance_id.lt(after.id)),
                );
        }
        query
            .order((
                mcp_service_table::created_at.desc(),
                mcp_service_table::instance_id.desc(),
            ))
            .limit(limit)
            .load(conn)
    }

    /// How many of a user's instances count against the plan: those that are active and completed.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn count_active(conn: &mut PgConnection, user_id: UserId) -> QueryResult<i64> {
        mcp_service_table::table
            .filter(mcp_service_table::user_id.eq(user_id))
            .filter(mcp_service_table::status.eq(InstanceStatus::Active))
            .filter(mcp_service_table::oauth_status.eq(OauthStatus::Completed))
            .count()
            .get_result(conn)
    }

    /// Counts one more call, made now; says whether there is such an instance. Leaves the version alone.
    ///
    /// One prepared statement, which updates one row in place and touches no index: one round trip. The row stays locked
    /// until the transaction ends: call it outside of any, so that calls through one instance don't wait for each other
    /// longer than that.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn record_call(conn: &mut PgConnection, instance_id: InstanceId) -> QueryResult<bool> {
        RecordCall { instance_id }
            .execute(conn)
            .map(|updated| updated == 1)
    }

    /// Switches a user's instance on and returns it. One that isn't authorised yet counts as soon as it is.
    ///
    /// One transaction (inside another: a savepoint), in which the plan is locked first.
    ///
    /// # Errors
    /// See [`InstanceError`]; `InstanceExpired` for one past its `expires_at`, which [`renew`](Self::renew) moves.
    pub fn activate(
        conn: &mut PgConnection,
        instance_id: InstanceId,
        user_id: UserId,
    ) -> Result<Self, InstanceError> {
        conn.transaction(|conn| {
            lock_plan(conn, user_id)?;
            Self::switch_on(conn, instance_id, user_id)
        })
    }

    /// Switches a user's instance off and returns it; `None` where the user has no such instance. An expired one stays
    /// expired.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn deactivate(
        conn: &mut PgConnection,
        instance_id: InstanceId,
        user_id: UserId,
    ) -> QueryResult<Option<Self>> {
        diesel::update(
            mcp_service_table::table
                .find(instance_id)
                .filter(mcp_service_table::user_id.eq(user_id)),
        )
        .set(
            mcp_service_table::status.eq(case_when(
                mcp_service_table::status.eq(InstanceStatus::Active),
                InstanceStatus::Inactive.into_sql::<McpInstanceStatus>(),
            )
            .otherwise(mcp_service_table::status)),
        )
        .returning(Self::as_returning())
        .get_result(conn)
        .optional()
    }

    /// Switches one of a user's instances off and another on, where the plan has room for only one of them. Returns the
    /// one that is on.
    ///
    /// One transaction (inside another: a savepoint), in which the plan is locked first, then both instances in
    /// registry order. The limit is checked at the end; the constraint `mcp_service_table_active_limit_update` is
    /// immediate from then on, even if the caller deferred it.
    ///
    /// # Errors
    /// See [`InstanceError`]; `NotFound` also where both are the same. Neither is changed then.
    pub fn swap(
        conn: &mut PgConnection,
        user_id: UserId,
        off: InstanceId,
        on: InstanceId,
    ) -> Result<Self, InstanceError> {
        conn.transaction(|conn| {
            lock_plan(conn, user_id)?;
            let both = mcp_service_table::table
                .filter(mcp_service_table::instance_id.eq_any([off, on]))
                .filter(mcp_service_table::user_id.eq(user_id))
                .order((
                    mcp_service_table::mcp_service_id,
                    mcp_service_table::instance_id,
                ))
                .select(mcp_service_table::instance_id)
                .for_no_key_update()
                .load::<InstanceId>(conn)?;
            let &[first, _] = both.as_slice() else {
                return Err(InstanceError::NotFound);
            };
            // In registry order, in which the counters are locked at commit. So the one to switch on may come first, and
            // for a moment there is one too many.
            conn.batch_execute("SET CONSTRAINTS mcp_service_table_active_limit_update DEFERRED")?;
            if first == off {
                Self::deactivate(conn, off, user_id)?;
            }
            let switched_on = Self::switch_on(conn, on, user_id)?;
            if first == on {
                Self::deactivate(conn, off, user_id)?;
            }
            conn.batch_execute("SET CONSTRAINTS mcp_service_table_active_limit_update IMMEDIATE")?;
            Ok(switched_on)
        })
    }

    /// Gives a user's instance another name, or none, if its version is still the one that was read, and returns it.
    ///
    /// A name is typed by somebody who looks at the old one: hence the version. The other operations are commands, which
    /// mean the same whatever changed meanwhile.
    ///
    /// # Errors
    /// See [`RenameError`]; `Database` where the name is longer than 255 characters
    /// (`mcp_service_table_custom_name_check`).
    pub fn rename(
        conn: &mut PgConnection,
        instance_id: InstanceId,
        user_id: UserId,
        version: i32,
        custom_name: Option<&str>,
    ) -> Result<Self, RenameError> {
        let of_user = mcp_service_table::table
            .find(instance_id)
            .filter(mcp_service_table::user_id.eq(user_id));
        let renamed = diesel::update(of_user.filter(mcp_service_table::version.eq(version)))
            .set(mcp_service_table::custom_name.eq(custom_name))
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()?;
        if let Some(renamed) = renamed {
            return Ok(renamed);
        }
        match of_user.select(Self::as_select()).first(conn).optional()? {
            Some(current) => Err(RenameError::Conflict(Box::new(current))),
            None => Err(RenameError::NotFound),
        }
    }

    /// Moves the end of a user's instance (`None`: never), counts the renewal, switches the instance on and returns it.
    ///
    /// One transaction (inside another: a savepoint), in which the plan is locked first.
    ///
    /// # Errors
    /// See [`InstanceError`]; `InstanceExpired` if `expires_at` is past. Nothing is changed then.
    pub fn renew(
        conn: &mut PgConnection,
        instance_id: InstanceId,
        user_id: UserId,
        expires_at: Option<DateTime<Utc>>,
    ) -> Result<Self, InstanceError> {
        conn.transaction(|conn| {
            lock_plan(conn, user_id)?;
            let end = expires_at.into_sql::<Nullable<Timestamptz>>();
            diesel::update(
                mcp_service_table::table
                    .find(instance_id)
                    .filter(mcp_service_table::user_id.eq(user_id))
                    .filter(end.is_null().or(end.gt(now))),
            )
            .set((
                mcp_service_table::expires_at.eq(expires_at),
                mcp_service_table::renewed_count.eq(mcp_service_table::renewed_count + 1),
                mcp_service_table::last_renewed_at.eq(now),
                mcp_service_table::status.eq(InstanceStatus::Active),
            ))
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()?
            .map_or_else(|| Err(not_switched_on(conn, instance_id, user_id)), Ok)
        })
    }

    /// Deletes a user's instance and its credentials; says whether there was one.
    ///
    /// One transaction, in which the credentials are locked first, as an authorisation does that completes meanwhile.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn delete(
        conn: &mut PgConnection,
        instance_id: InstanceId,
        user_id: UserId,
    ) -> QueryResult<bool> {
        conn.transaction(|conn| {
            mcp_credentials::table
                .filter(mcp_credentials::instance_id.eq(instance_id))
                .select(mcp_credentials::credential_id)
                .for_update()
                .execute(conn)?;
            diesel::delete(
                mcp_service_table::table
                    .find(instance_id)
                    .filter(mcp_service_table::user_id.eq(user_id)),
            )
            .execute(conn)
            .map(|deleted| deleted == 1)
        })
    }

    /// Marks instances past their `expires_at` as expired and returns them, `limit` at most, all of one service. None is
    /// returned where none is left, or the last of them are in the hands of others. A sweeper calls it until then, each
    /// time in a transaction of its own.
    ///
    /// One statement. Rows that are locked are passed over, so several sweepers may run. Of one service, because the
    /// order in which an UPDATE meets its rows is the planner's choice, and the counters of several services must be
    /// locked in registry order.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn expire_due(conn: &mut PgConnection, limit: i64) -> QueryResult<Vec<Self>> {
        // The query builder has no CTE. Without MATERIALIZED the planner may run a LIMIT with SKIP LOCKED more than once.
        diesel::sql_query(
            "WITH service AS MATERIALIZED (
                 SELECT mcp_service_id
                   FROM mcp_service_table
                  WHERE expires_at <= now() AND status <> 'expired'
                  ORDER BY mcp_service_id, instance_id
                  LIMIT 1
                    FOR NO KEY UPDATE SKIP LOCKED
             ), due AS MATERIALIZED (
                 SELECT instance_id
                   FROM mcp_service_table
                  WHERE expires_at <= now() AND status <> 'expired'
                    AND mcp_service_id = (SELECT mcp_service_id FROM service)
                  ORDER BY instance_id
                  LIMIT $1
                    FOR NO KEY UPDATE SKIP LOCKED
             )
             UPDATE mcp_service_table AS instance
                SET status = 'expired'
               FROM due
              WHERE instance.instance_id = due.instance_id
             RETURNING instance.*",
        )
        .bind::<BigInt, _>(limit)
        .load(conn)
    }

    /// Instances that were never authorised: it failed or is pending, there is no token, and nobody touched the credentials
    /// for as long as `idle`. Oldest first, `limit` at most. One that was in use before and is to be authorised anew has
    /// tokens, and is not among them, however long its user takes.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn list_abandoned(
        conn: &mut PgConnection,
        idle: TimeDelta,
        limit: i64,
    ) -> QueryResult<Vec<Self>> {
        mcp_service_table::table
            .inner_join(mcp_credentials::table)
            .filter(mcp_service_table::oauth_status.eq_any(UNAUTHORISED))
            .filter(mcp_credentials::access_token.is_null())
            .filter((mcp_credentials::updated_at + idle.into_sql::<Interval>()).le(now))
            .order((
                mcp_service_table::created_at,
                mcp_service_table::instance_id,
            ))
            .limit(limit)
            .select(Self::as_select())
            .load(conn)
    }

    /// Deletes those of the instances given that [`list_abandoned`](Self::list_abandoned) would still list, and returns
    /// them as they were. One whose authorisation has gone on meanwhile is kept.
    ///
    /// One transaction. Credentials and instances are locked before they are looked at; what others have locked (an
    /// authorisation that is just completing) is passed over, and never waited for.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn delete_abandoned(
        conn: &mut PgConnection,
        instance_ids: &[InstanceId],
        idle: TimeDelta,
    ) -> QueryResult<Vec<Self>> {
        conn.transaction(|conn| {
            let abandoned = mcp_credentials::table
                .inner_join(mcp_service_table::table)
                .filter(mcp_credentials::instance_id.eq_any(instance_ids))
                .filter(mcp_credentials::oauth_status.eq_any(UNAUTHORISED))
                .filter(mcp_credentials::access_token.is_null())
                .filter((mcp_credentials::updated_at + idle.into_sql::<Interval>()).le(now))
                .select(mcp_credentials::instance_id)
                .for_update()
                .skip_locked()
                .load::<InstanceId>(conn)?;
            diesel::delete(
                mcp_service_table::table.filter(mcp_service_table::instance_id.eq_any(abandoned)),
            )
            .returning(Self::as_returning())
            .get_results(conn)
        })
    }

    /// The plan is locked.
    fn switch_on(
        conn: &mut PgConnection,
        instance_id: InstanceId,
        user_id: UserId,
    ) -> Result<Self, InstanceError> {
        diesel::update(
            mcp_service_table::table
                .find(instance_id)
                .filter(mcp_service_table::user_id.eq(user_id))
                .filter(
                    mcp_service_table::expires_at
                        .is_null()
                        .or(mcp_service_table::expires_at.gt(now)),
                ),
        )
        .set(mcp_service_table::status.eq(InstanceStatus::Active))
        .returning(Self::as_returning())
        .get_result(conn)
        .optional()?
        .map_or_else(|| Err(not_switched_on(conn, instance_id, user_id)), Ok)
    }
}

/// An UPDATE by hand: those of the query builder are parsed and planned anew each time, a round trip more for the hottest
/// statement of all.
#[derive(QueryId)]
struct RecordCall {
    instance_id: InstanceId,
}

impl QueryFragment<Pg> for RecordCall {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(
            "UPDATE mcp_service_table SET usage_count = usage_count + 1, last_used_at = now() WHERE instance_id = ",
        );
        out.push_bind_param::<Uuid, _>(&self.instance_id)
    }
}

impl RunQueryDsl<PgConnection> for RecordCall {}

const UNAUTHORISED: [OauthStatus; 2] = [OauthStatus::Pending, OauthStatus::Failed];

fn lock_plan(conn: &mut PgConnection, user_id: UserId) -> Result<UserPlan, InstanceError> {
    UserPlan::lock_by_user(conn, user_id)?.ok_or(InstanceError::PlanMissing)
}

/// Why no row was updated.
fn not_switched_on(
    conn: &mut PgConnection,
    instance_id: InstanceId,
    user_id: UserId,
) -> InstanceError {
    let of_user = mcp_service_table::table
        .find(instance_id)
        .filter(mcp_service_table::user_id.eq(user_id));
    match diesel::select(diesel::dsl::exists(of_user)).get_result(conn) {
        Ok(true) => InstanceError::InstanceExpired,
        Ok(false) => InstanceError::NotFound,
        Err(error) => error.into(),
    }
}
