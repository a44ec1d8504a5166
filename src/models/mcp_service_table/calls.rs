//! Calls: what they need, what refuses them, how they are counted.

use diesel::dsl::{exists, now};
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::sql_types::{Nullable, Uuid};
use serde::Serialize;

use super::McpInstance;
use crate::enums::{InstanceStatus, OauthStatus};
use crate::ids::{InstanceId, UserId};
use crate::models::{McpCredential, McpService};
use crate::prepared::Prepare;
use crate::schema::{mcp_credentials, mcp_service_table, mcp_table, users};

/// Why an instance can't be called. If there are several reasons, the first of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, thiserror::Error)]
pub enum NotCallable {
    /// The instance doesn't exist, is of another service, or belongs to another user.
    #[error("there is no such instance")]
    NotFound,
    /// Its user is deactivated.
    #[error("the user is inactive")]
    UserInactive,
    /// The operator has disabled its service.
    #[error("the service is disabled")]
    ServiceDisabled,
    /// It is past its end.
    #[error("the instance has expired")]
    Expired,
    /// It is switched off.
    #[error("the instance is inactive")]
    Inactive,
    /// Its authorization has this status, not completed.
    #[error("the instance is not authorized")]
    NotAuthorized(OauthStatus),
}

/// An instance in any state, with its service and its credentials, secrets included.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the other fields explain themselves")]
pub struct InstanceWithCredentials {
    pub instance: McpInstance,
    pub service: McpService,
    /// `None` if they were deleted.
    pub credential: Option<McpCredential>,
    /// `None` if the instance can be called.
    pub not_callable: Option<NotCallable>,
}

/// What decides whether an instance can be called.
#[derive(Queryable, Selectable)]
#[diesel(table_name = mcp_service_table, check_for_backend(Pg))]
struct CallState {
    status: InstanceStatus,
    oauth_status: OauthStatus,
    #[diesel(select_expression = mcp_service_table::expires_at.le(now))]
    ended: Option<bool>,
    #[diesel(select_expression = users::is_active)]
    user_is_active: bool,
    #[diesel(select_expression = mcp_table::is_active)]
    service_is_active: bool,
}

impl CallState {
    fn not_callable(&self) -> Option<NotCallable> {
        if !self.user_is_active {
            return Some(NotCallable::UserInactive);
        }
        if !self.service_is_active {
            return Some(NotCallable::ServiceDisabled);
        }
        match (self.status, self.oauth_status) {
            (InstanceStatus::Expired, _) => Some(NotCallable::Expired),
            _ if self.ended == Some(true) => Some(NotCallable::Expired),
            (InstanceStatus::Inactive, _) => Some(NotCallable::Inactive),
            (InstanceStatus::Active, OauthStatus::Completed) => None,
            (InstanceStatus::Active, other) => Some(NotCallable::NotAuthorized(other)),
        }
    }
}

impl McpInstance {
    /// Returns an instance of this service with everything a call needs, secrets included, or why
    /// it can't be called. With `caller`, only an instance of this user is found.
    ///
    /// One statement. An expired plan doesn't refuse calls, only activations.
    pub fn find_with_credentials(
        conn: &mut PgConnection,
        instance_id: InstanceId,
        service_name: &str,
        caller: Option<UserId>,
    ) -> QueryResult<Result<(Self, McpService, McpCredential), NotCallable>> {
        let found = Self::find_in_any_state(conn, instance_id, caller)?;
        let Some(found) = found.filter(|found| found.service.mcp_service_name == service_name)
        else {
            return Ok(Err(NotCallable::NotFound));
        };
        Ok(match (found.not_callable, found.credential) {
            (None, Some(credential)) => Ok((found.instance, found.service, credential)),
            (None, None) => Err(NotCallable::NotAuthorized(OauthStatus::Pending)),
            (Some(reason), _) => Err(reason),
        })
    }

    /// Returns an instance, whatever its state, with its service, its credentials and the reason
    /// why it can't be called. With `caller`, only an instance of this user is found.
    ///
    /// One statement. To show an instance, [`find_by_user`](Self::find_by_user) reads no secrets.
    pub fn find_in_any_state(
        conn: &mut PgConnection,
        instance_id: InstanceId,
        caller: Option<UserId>,
    ) -> QueryResult<Option<InstanceWithCredentials>> {
        let found = mcp_service_table::table
            .inner_join(users::table)
            .inner_join(mcp_table::table)
            .left_join(mcp_credentials::table)
            .filter(mcp_service_table::instance_id.eq(instance_id))
            .filter(is_of(caller))
            .select((
                Self::as_select(),
                McpService::as_select(),
                Option::<McpCredential>::as_select(),
                CallState::as_select(),
            ))
            .first(conn);
        let found: Option<(_, _, _, CallState)> = found.optional()?;
        Ok(found.map(
            |(instance, service, credential, state)| InstanceWithCredentials {
                instance,
                service,
                credential,
                not_callable: state.not_callable(),
            },
        ))
    }

    /// Counts one call, made now, unless the instance can't be called. With `caller`, only an
    /// instance of this user is found. The version stays.
    ///
    /// One statement that touches no index; a second one if it refuses. It locks the row
    /// until the transaction ends, so run it outside a transaction: other calls of this instance
    /// wait for the lock.
    pub fn record_call(
        conn: &mut PgConnection,
        instance_id: InstanceId,
        caller: Option<UserId>,
    ) -> QueryResult<Result<(), NotCallable>> {
        // Again only if the instance became callable between the two statements.
        loop {
            if count_call(conn, instance_id, caller)? {
                return Ok(Ok(()));
            }
            if let Some(reason) = not_callable(conn, instance_id, caller)? {
                return Ok(Err(reason));
            }
        }
    }
}

/// Whether an instance is this user's. Not a boxed query: Diesel would write its text on each call.
#[diesel::dsl::auto_type]
fn is_of(caller: Option<UserId>) -> _ {
    let caller: diesel::dsl::AsExprOf<Option<UserId>, Nullable<Uuid>> =
        caller.into_sql::<Nullable<Uuid>>();
    caller
        .is_null()
        .or(mcp_service_table::user_id.nullable().eq(caller))
}

/// The conditions are those of [`CallState`].
fn count_call(
    conn: &mut PgConnection,
    instance_id: InstanceId,
    caller: Option<UserId>,
) -> QueryResult<bool> {
    let active_user = users::table
        .filter(users::id.eq(mcp_service_table::user_id))
        .filter(users::is_active);
    let active_service = mcp_table::table
        .filter(mcp_table::mcp_service_id.eq(mcp_service_table::mcp_service_id))
        .filter(mcp_table::is_active);
    diesel::update(mcp_service_table::table.find(instance_id))
        .filter(is_of(caller))
        .filter(mcp_service_table::status.eq(InstanceStatus::Active))
        .filter(mcp_service_table::oauth_status.eq(OauthStatus::Completed))
        .filter(
            mcp_service_table::expires_at
                .is_null()
                .or(mcp_service_table::expires_at.gt(now)),
        )
        .filter(exists(active_user))
        .filter(exists(active_service))
        .set((
            mcp_service_table::usage_count.eq(mcp_service_table::usage_count + 1),
            mcp_service_table::last_used_at.eq(now),
        ))
        .prepared()
        .execute(conn)
        .map(|counted| counted == 1)
}

fn not_callable(
    conn: &mut PgConnection,
    instance_id: InstanceId,
    caller: Option<UserId>,
) -> QueryResult<Option<NotCallable>> {
    let state = mcp_service_table::table
        .inner_join(users::table)
        .inner_join(mcp_table::table)
        .filter(mcp_service_table::instance_id.eq(instance_id))
        .filter(is_of(caller))
        .select(CallState::as_select())
        .first(conn)
        .optional()?;
    Ok(state.map_or(Some(NotCallable::NotFound), |state| state.not_callable()))
}
