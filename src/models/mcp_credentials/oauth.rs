//! The authorization flow: `begin_oauth`, `consume_state`, then `complete_oauth` or `fail_oauth`.

use chrono::{DateTime, TimeDelta, Utc};
use diesel::dsl::{exists, not, now, sql};
use diesel::prelude::*;
use diesel::sql_types::{Interval, Nullable, Timestamptz};

use super::{CredentialError, McpCredential, OauthTokens, lock_user};
use crate::enums::{InstanceStatus, OauthStatus};
use crate::error::violates;
use crate::ids::{CredentialId, UserId};
use crate::models::UserPlan;
use crate::prepared::Prepare;
use crate::schema::{mcp_credentials, mcp_service_table};
use crate::secret::{Sealed, StateDigest};

// Diesel can't tell a table from itself in a subquery.
diesel::alias!(const OTHER: Alias<Other> = mcp_credentials as other);

/// Clears what only an authorization under way needs.
#[derive(AsChangeset)]
#[diesel(table_name = mcp_credentials, treat_none_as_null = true)]
struct UnderWay {
    oauth_state: Option<StateDigest>,
    oauth_state_expires_at: Option<DateTime<Utc>>,
    oauth_code_verifier: Option<Sealed>,
    oauth_authorization_url: Option<Sealed>,
}

const FORGOTTEN: UnderWay = UnderWay {
    oauth_state: None,
    oauth_state_expires_at: None,
    oauth_code_verifier: None,
    oauth_authorization_url: None,
};

/// A completed authorization. The tokens are stored in any case.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields explain themselves")]
pub struct OauthCompletion {
    pub credential: McpCredential,
    pub instance: CompletedInstance,
}

/// Whether an instance can be called after its authorization.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CompletedInstance {
    /// The instance can be called.
    Active,
    /// It is still inactive or expired.
    NotActive,
    /// Deactivated: the plan allows no more active instances.
    LimitReached,
    /// Deactivated: the plan has expired.
    PlanExpired,
    /// Deactivated: the user has no plan.
    PlanMissing,
}

impl McpCredential {
    /// How long a state is usually valid: the time a user takes to grant access.
    pub const STATE_LIFETIME: TimeDelta = TimeDelta::minutes(10);

    /// Begins an authorization, also a second one. The credentials become pending, so the instance
    /// can't be called.
    ///
    /// Replaces state, verifier and URL of an authorization that is under way. Old tokens stay
    /// until new ones are stored. `state` is the digest of at least 128 random bits, and is valid
    /// for `lifetime` by the database's clock. `code_verifier` is that of PKCE (RFC 7636); the
    /// credentials keep it until the authorization ends. Store the URL only if it is shown again.
    /// Four round trips.
    ///
    /// # Errors
    /// [`CredentialError::NotFound`], [`CredentialError::StateTaken`]; [`CredentialError::Invalid`]
    /// unless `lifetime` is positive and at most an hour. The caller's transaction can go on,
    /// unless another one began with the same state at the same moment.
    pub fn begin_oauth(
        conn: &mut PgConnection,
        credential_id: CredentialId,
        state: &StateDigest,
        lifetime: TimeDelta,
        code_verifier: &Sealed,
        authorization_url: Option<&Sealed>,
    ) -> Result<Self, CredentialError> {
        if lifetime <= TimeDelta::zero() || lifetime > TimeDelta::hours(1) {
            return Err(CredentialError::Invalid(
                "a state is valid for more than nothing and at most an hour",
            ));
        }
        let expires_at = sql::<Nullable<Timestamptz>>("now() + ").bind::<Interval, _>(lifetime);
        // The unique index would make the server log the digest.
        let taken = OTHER
            .filter(OTHER.field(mcp_credentials::oauth_state).eq(state))
            .filter(
                OTHER
                    .field(mcp_credentials::credential_id)
                    .ne(credential_id),
            );
        conn.transaction(|conn| {
            lock_user(conn, credential_id)?;
            let begun = diesel::update(mcp_credentials::table.find(credential_id))
                .filter(mcp_credentials::client_id.is_not_null())
                .filter(not(exists(taken)))
                .set((
                    mcp_credentials::oauth_status.eq(OauthStatus::Pending),
                    mcp_credentials::oauth_completed_at.eq(None::<DateTime<Utc>>),
                    mcp_credentials::oauth_state.eq(state),
                    mcp_credentials::oauth_state_expires_at.eq(expires_at),
                    mcp_credentials::oauth_code_verifier.eq(code_verifier),
                    mcp_credentials::oauth_authorization_url.eq(authorization_url),
                ))
                .returning(Self::as_returning())
                .prepared()
                .get_result(conn)
                .optional()?;
            if let Some(credential) = begun {
                return Ok(credential);
            }
            Err(match Self::find(conn, credential_id)? {
                Some(current) if current.client_id.is_some() => CredentialError::StateTaken,
                _ => CredentialError::NotFound,
            })
        })
    }

    /// Consumes the state of a pending authorization of this user and removes the URL. Only one
    /// caller succeeds.
    ///
    /// `user_id` is the user of the session that the provider's redirect arrives in. A state that
    /// another user began would connect that user's instance to this user's account (RFC 6749,
    /// 10.12).
    ///
    /// One statement. Commit before you ask the provider for the tokens with the code and the
    /// verifier of the returned row. Then call [`complete_oauth`](Self::complete_oauth) or
    /// [`fail_oauth`](Self::fail_oauth): the credentials are still pending.
    ///
    /// # Errors
    /// [`CredentialError::UnknownState`].
    pub fn consume_state(
        conn: &mut PgConnection,
        user_id: UserId,
        state: &StateDigest,
    ) -> Result<Self, CredentialError> {
        let of_user = mcp_service_table::table
            .filter(mcp_service_table::instance_id.eq(mcp_credentials::instance_id))
            .filter(mcp_service_table::user_id.eq(user_id));
        diesel::update(mcp_credentials::table)
            .filter(mcp_credentials::oauth_state.eq(state))
            .filter(mcp_credentials::oauth_state_expires_at.gt(now))
            .filter(mcp_credentials::oauth_status.eq(OauthStatus::Pending))
            .filter(exists(of_user))
            .set((
                mcp_credentials::oauth_state.eq(None::<&StateDigest>),
                mcp_credentials::oauth_state_expires_at.eq(None::<DateTime<Utc>>),
                mcp_credentials::oauth_authorization_url.eq(None::<&Sealed>),
            ))
            .returning(Self::as_returning())
            .prepared()
            .get_result(conn)
            .optional()?
            .ok_or(CredentialError::UnknownState)
    }

    /// Completes a pending authorization and replaces all tokens.
    ///
    /// An active instance can be called from now on. If the plan refuses that, the instance becomes
    /// inactive and the tokens are stored all the same. An instance past its end becomes expired.
    ///
    /// One transaction, ten round trips. Locks the plan, the credentials, then the instance. The
    /// caller must not defer the constraint `mcp_service_table_active_limit_update`, or a refusal
    /// fails the commit.
    ///
    /// # Errors
    /// [`CredentialError::NotFound`]; [`CredentialError::Conflict`] if the credentials are not
    /// pending; [`CredentialError::Invalid`].
    pub fn complete_oauth(
        conn: &mut PgConnection,
        credential_id: CredentialId,
        tokens: &OauthTokens<'_>,
    ) -> Result<OauthCompletion, CredentialError> {
        tokens.check()?;
        conn.transaction(|conn| {
            let user_id: UserId = mcp_credentials::table
                .inner_join(mcp_service_table::table)
                .filter(mcp_credentials::credential_id.eq(credential_id))
                .select(mcp_service_table::user_id)
                .first(conn)
                .optional()?
                .ok_or(CredentialError::NotFound)?;
            UserPlan::lock_by_user(conn, user_id)?;
            let pending = mcp_credentials::table
                .find(credential_id)
                .filter(mcp_credentials::client_id.is_not_null())
                .select(Self::as_select())
                .for_no_key_update()
                .first(conn)
                .optional()?
                .ok_or(CredentialError::NotFound)?;
            if pending.oauth_status != OauthStatus::Pending {
                return Err(CredentialError::Conflict(Box::new(pending)));
            }
            let instance = mcp_service_table::table.find(pending.instance_id);
            diesel::update(instance.filter(mcp_service_table::expires_at.le(now)))
                .set(mcp_service_table::status.eq(InstanceStatus::Expired))
                .prepared()
                .execute(conn)?;
            let status: InstanceStatus = diesel::update(instance)
                .set(mcp_service_table::credentials_updated_at.eq(now))
                .returning(mcp_service_table::status)
                .prepared()
                .get_result(conn)?;

            // The database decides whether the plan allows it. A refusal loses only the savepoint.
            match conn.transaction(|conn| Self::store_tokens(conn, credential_id, tokens)) {
                Ok(credential) => Ok(OauthCompletion {
                    credential,
                    instance: match status {
                        InstanceStatus::Active => CompletedInstance::Active,
                        InstanceStatus::Inactive | InstanceStatus::Expired => {
                            CompletedInstance::NotActive
                        }
                    },
                }),
                Err(error) => {
                    let refused = CompletedInstance::refused_by(&error).ok_or(error)?;
                    diesel::update(instance)
                        .set(mcp_service_table::status.eq(InstanceStatus::Inactive))
                        .prepared()
                        .execute(conn)?;
                    Ok(OauthCompletion {
                        credential: Self::store_tokens(conn, credential_id, tokens)?,
                        instance: refused,
                    })
                }
            }
        })
    }

    fn store_tokens(
        conn: &mut PgConnection,
        credential_id: CredentialId,
        tokens: &OauthTokens<'_>,
    ) -> QueryResult<Self> {
        diesel::update(mcp_credentials::table.find(credential_id))
            .set((
                mcp_credentials::access_token.eq(&tokens.access_token),
                mcp_credentials::refresh_token.eq(tokens.refresh_token.as_ref()),
                mcp_credentials::token_expires_at.eq(tokens.expires_at),
                mcp_credentials::token_scope.eq(tokens.scope),
                mcp_credentials::oauth_status.eq(OauthStatus::Completed),
                mcp_credentials::oauth_completed_at.eq(now),
                mcp_credentials::refresh_leased_until.eq(None::<DateTime<Utc>>),
                FORGOTTEN,
            ))
            .returning(Self::as_returning())
            .prepared()
            .get_result(conn)
    }

    /// Marks a pending authorization as failed, because the user or the provider refused. Removes
    /// state, verifier and URL.
    ///
    /// Don't call it for a network error: the user can try again.
    ///
    /// # Errors
    /// [`CredentialError::NotFound`]; [`CredentialError::Conflict`] if the credentials are not
    /// pending.
    pub fn fail_oauth(
        conn: &mut PgConnection,
        credential_id: CredentialId,
    ) -> Result<Self, CredentialError> {
        conn.transaction(|conn| {
            lock_user(conn, credential_id)?;
            let failed = diesel::update(mcp_credentials::table.find(credential_id))
                .filter(mcp_credentials::client_id.is_not_null())
                .filter(mcp_credentials::oauth_status.eq(OauthStatus::Pending))
                .set((
                    mcp_credentials::oauth_status.eq(OauthStatus::Failed),
                    mcp_credentials::oauth_completed_at.eq(now),
                    FORGOTTEN,
                ))
                .returning(Self::as_returning())
                .prepared()
                .get_result(conn)
                .optional()?;
            Self::or_oauth_conflict(conn, failed, credential_id)
        })
    }
}

impl CompletedInstance {
    fn refused_by(error: &diesel::result::Error) -> Option<Self> {
        [
            ("user_plan_active_limit", Self::LimitReached),
            ("user_plan_expired", Self::PlanExpired),
            ("user_plan_missing", Self::PlanMissing),
        ]
        .into_iter()
        .find_map(|(constraint, refused)| violates(error, constraint).then_some(refused))
    }
}
