//! Instances: users' connections to MCP services.

mod batch;
mod calls;
mod monitor;
mod row;

use chrono::{DateTime, Utc};
use diesel::connection::SimpleConnection;
use diesel::dsl::{case_when, exists, now, sql};
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::sql_types::{Bool, Nullable, Timestamptz};
use serde::Serialize;

pub use self::batch::InstanceCalls;
pub use self::calls::{InstanceWithCredentials, NotCallable};
pub use self::row::McpInstance;
use crate::enums::{InstanceStatus, OauthStatus};
use crate::error::violates;
use crate::ids::{InstanceId, ServiceId, UserId};
use crate::models::{McpCredential, McpService, NewMcpCredential, UserPlan};
use crate::page::{Cursor, Page, newest_first};
use crate::prepared::Prepare;
use crate::schema::sql_types::McpInstanceStatus;
use crate::schema::{mcp_credentials, mcp_service_table, mcp_table, user_plans, users};

/// Values of a new [`McpInstance`].
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = mcp_service_table, check_for_backend(Pg))]
#[diesel(treat_none_as_default_value = false)]
#[expect(missing_docs, reason = "the fields are those of `McpInstance`")]
pub struct NewMcpInstance<'a> {
    pub instance_id: InstanceId,
    pub user_id: UserId,
    pub mcp_service_id: ServiceId,
    pub status: InstanceStatus,
    pub expires_at: Option<DateTime<Utc>>,
    pub custom_name: Option<&'a str>,
}

impl NewMcpInstance<'_> {
    /// An active instance with a new key, which never expires.
    #[must_use]
    pub fn new(user_id: UserId, mcp_service_id: ServiceId) -> Self {
        Self {
            instance_id: InstanceId::new(),
            user_id,
            mcp_service_id,
            status: InstanceStatus::Active,
            expires_at: None,
            custom_name: None,
        }
    }
}

/// The state of an instance's credentials, without secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable)]
#[diesel(table_name = mcp_credentials, check_for_backend(Pg))]
#[expect(missing_docs, reason = "the fields are those of `McpCredential`")]
pub struct CredentialState {
    pub client_id: Option<String>,
    pub token_expires_at: Option<DateTime<Utc>>,
    pub token_scope: Option<String>,
    pub oauth_status: OauthStatus,
    pub oauth_completed_at: Option<DateTime<Utc>>,
    pub updated_at: DateTime<Utc>,
}

/// An instance as its user sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable)]
#[diesel(table_name = mcp_service_table, check_for_backend(Pg))]
#[expect(missing_docs, reason = "the other fields explain themselves")]
pub struct InstanceDetails {
    #[diesel(embed)]
    pub instance: McpInstance,
    #[diesel(embed)]
    pub service: McpService,
    /// `None` if the credentials were deleted.
    #[diesel(embed)]
    pub credentials: Option<CredentialState>,
}

impl InstanceDetails {
    /// The row's position in [`McpInstance::list_by_user`].
    #[must_use]
    pub fn cursor(&self) -> Cursor<InstanceId> {
        Cursor {
            created_at: self.instance.created_at,
            id: self.instance.instance_id,
        }
    }
}

/// Restricts [`McpInstance::list_by_user`]; the default restricts nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "each field is a value that the row must have")]
pub struct InstanceFilter<'a> {
    pub status: Option<InstanceStatus>,
    pub oauth_status: Option<OauthStatus>,
    pub service_name: Option<&'a str>,
}

/// Why an operation on an instance was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InstanceError {
    /// `user_plan_active_limit`.
    #[error("the plan allows no more active instances")]
    LimitReached,
    /// `user_plan_expired`.
    #[error("the plan has expired")]
    PlanExpired,
    /// The user has no plan or doesn't exist (`user_plan_missing`).
    #[error("the user has no plan")]
    PlanMissing,
    /// The user is deactivated or anonymised (`mcp_service_table_user_inactive`).
    #[error("the user is inactive")]
    UserInactive,
    /// `mcp_table_service_disabled`.
    #[error("the service is disabled and takes no new instances")]
    ServiceDisabled,
    /// `mcp_service_table_mcp_service_id_fkey`.
    #[error("the service does not exist")]
    UnknownService,
    /// The client id is empty, has more than 2048 characters or a NUL.
    #[error("a client id has 1 to 2048 characters and no NUL")]
    InvalidClientId,
    /// The credentials were made for another instance.
    #[error("the credentials belong to another instance")]
    OtherCredential,
    /// The instance doesn't exist or belongs to another user.
    #[error("the user has no such instance")]
    NotFound,
    /// The instance is past its `expires_at`, or the new `expires_at` is past.
    #[error("the instance has expired")]
    InstanceExpired,
    /// The instance has another version. Holds the row as it is now.
    #[error("the instance was changed in the meantime")]
    Conflict(Box<McpInstance>),
    /// Any other database error.
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
        } else if violates(&error, "mcp_service_table_user_inactive") {
            Self::UserInactive
        } else if violates(&error, "mcp_table_service_disabled") {
            Self::ServiceDisabled
        } else if violates(&error, "mcp_service_table_mcp_service_id_fkey") {
            Self::UnknownService
        } else {
            Self::Database(error)
        }
    }
}

impl McpInstance {
    /// Creates an instance with its credentials. If these are completed (an API key is), the
    /// instance counts against the plan.
    ///
    /// One transaction, six round trips. Locks the user's plan. Other users don't wait.
    ///
    /// # Errors
    /// [`InstanceError::LimitReached`], [`InstanceError::PlanExpired`],
    /// [`InstanceError::PlanMissing`], [`InstanceError::UserInactive`],
    /// [`InstanceError::ServiceDisabled`], [`InstanceError::UnknownService`],
    /// [`InstanceError::InvalidClientId`], [`InstanceError::OtherCredential`]. The caller's
    /// transaction survives them.
    pub fn create(
        conn: &mut PgConnection,
        new: &NewMcpInstance<'_>,
        credential: &NewMcpCredential<'_>,
    ) -> Result<(Self, McpCredential), InstanceError> {
        if credential.instance_id != new.instance_id {
            return Err(InstanceError::OtherCredential);
        }
        if !credential.has_valid_client() {
            return Err(InstanceError::InvalidClientId);
        }
        conn.transaction(|conn| {
            // Not a lock only: an anonymisation with an older snapshot would miss the instance.
            let of_user = user_plans::table.filter(user_plans::user_id.eq(new.user_id));
            let locked = diesel::update(of_user)
                .set(user_plans::max_instances.eq(user_plans::max_instances))
                .prepared()
                .execute(conn)?;
            if locked == 0 {
                return Err(InstanceError::PlanMissing);
            }
            diesel::insert_into(mcp_service_table::table)
                .values(new)
                .execute(conn)?;
            let credential = diesel::insert_into(mcp_credentials::table)
                .values(credential)
                .returning(McpCredential::as_returning())
                .get_result(conn)?;
            // Not RETURNING of the insert: the credentials have changed the row since.
            let instance = mcp_service_table::table
                .find(new.instance_id)
                .select(Self::as_select())
                .first(conn)?;
            Ok((instance, credential))
        })
    }

    /// Returns the instance with this key, of any user.
    pub fn find(conn: &mut PgConnection, instance_id: InstanceId) -> QueryResult<Option<Self>> {
        mcp_service_table::table
            .find(instance_id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Returns a user's instance with its service and the state of its credentials.
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

    /// Returns a page of the user's instances that `filter` allows, newest first.
    pub fn list_by_user(
        conn: &mut PgConnection,
        user_id: UserId,
        filter: InstanceFilter<'_>,
        page: Page<InstanceId>,
    ) -> QueryResult<Vec<InstanceDetails>> {
        let mut rows = mcp_service_table::table
            .inner_join(mcp_table::table)
            .left_join(mcp_credentials::table)
            .filter(mcp_service_table::user_id.eq(user_id))
            .select(InstanceDetails::as_select())
            .into_boxed();
        // A statement for each set of filters, prepared once. One with `$1 IS NULL OR …` would read
        // all instances of the user when PostgreSQL chooses a generic plan.
        if let Some(status) = filter.status {
            rows = rows.filter(mcp_service_table::status.eq(status));
        }
        if let Some(oauth_status) = filter.oauth_status {
            rows = rows.filter(mcp_service_table::oauth_status.eq(oauth_status));
        }
        if let Some(service_name) = filter.service_name {
            rows = rows.filter(mcp_table::mcp_service_name.eq(service_name));
        }
        newest_first!(rows, mcp_service_table, instance_id, page).load(conn)
    }

    /// Counts the instances that use up the user's plan: active and completed.
    pub fn count_active(conn: &mut PgConnection, user_id: UserId) -> QueryResult<i64> {
        mcp_service_table::table
            .filter(mcp_service_table::user_id.eq(user_id))
            // A literal: the planner can't match bind parameters with a partial index.
            .filter(sql::<Bool>(
                "status = 'active' AND oauth_status = 'completed'",
            ))
            .count()
            .prepared()
            .get_result(conn)
    }

    /// Activates a user's instance. It counts against the plan once its authorization is completed.
    ///
    /// One transaction, four round trips. Locks the plan, then the instance.
    ///
    /// # Errors
    /// [`InstanceError::LimitReached`], [`InstanceError::PlanExpired`],
    /// [`InstanceError::PlanMissing`], [`InstanceError::UserInactive`],
    /// [`InstanceError::NotFound`]; [`InstanceError::InstanceExpired`], then use
    /// [`renew`](Self::renew).
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

    /// Deactivates a user's instance; `None` if the user has no such instance. An expired instance
    /// stays expired.
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
        .prepared()
        .get_result(conn)
        .optional()
    }

    /// Deactivates one of a user's instances and activates another, which is returned. For plans
    /// with room for one.
    ///
    /// One transaction. Locks the plan, then both instances in the order of their services. The
    /// plan's limit is checked at the end. Afterwards the constraint
    /// `mcp_service_table_active_limit_update` is immediate, even if the caller had deferred it.
    ///
    /// # Errors
    /// [`InstanceError::LimitReached`], [`InstanceError::PlanExpired`],
    /// [`InstanceError::PlanMissing`], [`InstanceError::UserInactive`],
    /// [`InstanceError::InstanceExpired`]; [`InstanceError::NotFound`], also if both are the same
    /// instance. Neither is changed.
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
            if both.len() != 2 {
                return Err(InstanceError::NotFound);
            }
            Self::deactivate(conn, off, user_id)?;
            let switched_on = Self::switch_on(conn, on, user_id)?;
            conn.batch_execute("SET CONSTRAINTS mcp_service_table_active_limit_update IMMEDIATE")?;
            Ok(switched_on)
        })
    }

    /// Sets or removes the user's name for an instance, if it still has this version.
    ///
    /// # Errors
    /// [`InstanceError::Conflict`], [`InstanceError::NotFound`]; [`InstanceError::Database`] for a
    /// name of more than 255 characters (`mcp_service_table_custom_name_check`).
    pub fn rename(
        conn: &mut PgConnection,
        instance_id: InstanceId,
        user_id: UserId,
        version: i32,
        custom_name: Option<&str>,
    ) -> Result<Self, InstanceError> {
        let of_user = mcp_service_table::table
            .find(instance_id)
            .filter(mcp_service_table::user_id.eq(user_id));
        let renamed = diesel::update(of_user.filter(mcp_service_table::version.eq(version)))
            .set(mcp_service_table::custom_name.eq(custom_name))
            .returning(Self::as_returning())
            .prepared()
            .get_result(conn)
            .optional()?;
        if let Some(renamed) = renamed {
            return Ok(renamed);
        }
        match of_user.select(Self::as_select()).first(conn).optional()? {
            Some(current) => Err(InstanceError::Conflict(Box::new(current))),
            None => Err(InstanceError::NotFound),
        }
    }

    /// Sets a new end for a user's instance (`None`: never), counts the renewal and activates the
    /// instance.
    ///
    /// One transaction, four round trips. Locks the plan, then the instance.
    ///
    /// # Errors
    /// [`InstanceError::LimitReached`], [`InstanceError::PlanExpired`],
    /// [`InstanceError::PlanMissing`], [`InstanceError::UserInactive`],
    /// [`InstanceError::NotFound`]; [`InstanceError::InstanceExpired`] if `expires_at` is past.
    /// Nothing is changed.
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
                    .filter(end.is_null().or(end.gt(now)))
                    .filter(exists(active_user(user_id))),
            )
            .set((
                mcp_service_table::expires_at.eq(expires_at),
                mcp_service_table::renewed_count.eq(mcp_service_table::renewed_count + 1),
                mcp_service_table::last_renewed_at.eq(now),
                mcp_service_table::status.eq(InstanceStatus::Active),
            ))
            .returning(Self::as_returning())
            .prepared()
            .get_result(conn)
            .optional()?
            .map_or_else(|| Err(not_switched_on(conn, instance_id, user_id)), Ok)
        })
    }

    /// Deletes a user's instance and its credentials, and returns whether it existed.
    ///
    /// One transaction, five round trips. Locks the plan, the credentials, then the instance.
    pub fn delete(
        conn: &mut PgConnection,
        instance_id: InstanceId,
        user_id: UserId,
    ) -> QueryResult<bool> {
        conn.transaction(|conn| {
            UserPlan::lock_by_user(conn, user_id)?;
            let of_user = mcp_service_table::table
                .find(instance_id)
                .filter(mcp_service_table::user_id.eq(user_id));
            mcp_credentials::table
                .filter(
                    mcp_credentials::instance_id
                        .eq_any(of_user.select(mcp_service_table::instance_id)),
                )
                .select(mcp_credentials::credential_id)
                .for_update()
                .execute(conn)?;
            diesel::delete(of_user)
                .execute(conn)
                .map(|deleted| deleted == 1)
        })
    }

    /// The caller has locked the plan.
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
                )
                .filter(exists(active_user(user_id))),
        )
        .set(mcp_service_table::status.eq(InstanceStatus::Active))
        .returning(Self::as_returning())
        .prepared()
        .get_result(conn)
        .optional()?
        .map_or_else(|| Err(not_switched_on(conn, instance_id, user_id)), Ok)
    }
}

fn lock_plan(conn: &mut PgConnection, user_id: UserId) -> Result<UserPlan, InstanceError> {
    UserPlan::lock_by_user(conn, user_id)?.ok_or(InstanceError::PlanMissing)
}

#[diesel::dsl::auto_type(no_type_alias)]
fn active_user(user_id: UserId) -> _ {
    users::table.find(user_id).filter(users::is_active)
}

/// Why an UPDATE found no row of an active user that is not expired.
fn not_switched_on(
    conn: &mut PgConnection,
    instance_id: InstanceId,
    user_id: UserId,
) -> InstanceError {
    let user_is_active = mcp_service_table::table
        .find(instance_id)
        .filter(mcp_service_table::user_id.eq(user_id))
        .inner_join(users::table)
        .select(users::is_active)
        .first(conn)
        .optional();
    match user_is_active {
        Ok(Some(true)) => InstanceError::InstanceExpired,
        Ok(Some(false)) => InstanceError::UserInactive,
        Ok(None) => InstanceError::NotFound,
        Err(error) => error.into(),
    }
}
