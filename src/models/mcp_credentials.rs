//! Credentials of instances: an API key, or an OAuth client and its tokens. Secrets are ciphertext.

use chrono::{DateTime, Utc};
use diesel::dsl::{case_when, exists, not, now, sql};
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::sql_types::Bool;
use serde::Serialize;

use crate::enums::{AuditStatus, InstanceStatus, OauthStatus};
use crate::error::violates;
use crate::ids::{CredentialId, InstanceId, UserId};
use crate::models::{McpInstance, NewTokenAudit, TokenAudit, UserPlan, found};
use crate::schema::sql_types::McpInstanceStatus;
use crate::schema::{mcp_credentials, mcp_service_table, token_audit_log};
use crate::secret::{Sealed, SecretText};

#[cfg(feature = "crypto")]
mod sealing;

#[cfg(feature = "crypto")]
pub use sealing::Resealed;

/// What refreshes are called in the audit log.
const TOKEN_REFRESH: &str = "token_refresh";

/// A row of `mcp_credentials`.
#[derive(
    Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable, Associations,
)]
#[diesel(table_name = mcp_credentials, primary_key(credential_id), belongs_to(McpInstance, foreign_key = instance_id), check_for_backend(Pg))]
pub struct McpCredential {
    /// Key.
    pub credential_id: CredentialId,
    /// The instance; one row each.
    pub instance_id: InstanceId,
    /// API key, alone.
    #[serde(skip_serializing)]
    pub api_key: Option<Sealed>,
    /// OAuth client, with its secret.
    pub client_id: Option<String>,
    /// Secret of the OAuth client.
    #[serde(skip_serializing)]
    pub client_secret: Option<Sealed>,
    /// Access token; needs the client.
    #[serde(skip_serializing)]
    pub access_token: Option<Sealed>,
    /// Refresh token; needs the client.
    #[serde(skip_serializing)]
    pub refresh_token: Option<Sealed>,
    /// When the access token ends.
    pub token_expires_at: Option<DateTime<Utc>>,
    /// Scopes granted, separated by spaces.
    pub token_scope: Option<String>,
    /// Where the authorisation is.
    pub oauth_status: OauthStatus,
    /// When `oauth_status` left pending; `None` exactly while pending.
    pub oauth_completed_at: Option<DateTime<Utc>>,
    /// Where the user grants access; holds the state.
    #[serde(skip_serializing)]
    pub oauth_authorization_url: Option<SecretText>,
    /// State of the pending authorisation; unique.
    #[serde(skip_serializing)]
    pub oauth_state: Option<SecretText>,
    /// When the row was made.
    pub created_at: DateTime<Utc>,
    /// When the row changed last.
    pub updated_at: DateTime<Utc>,
    /// Edit token: goes up with each change.
    pub version: i32,
    /// When `version` went up last.
    pub last_modified: DateTime<Utc>,
}

/// A new row; `None` leaves a column to its default.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = mcp_credentials, check_for_backend(Pg))]
pub struct NewMcpCredential<'a> {
    /// Key.
    pub credential_id: Option<CredentialId>,
    /// The instance; one row each.
    pub instance_id: InstanceId,
    /// API key, alone.
    pub api_key: Option<Sealed>,
    /// OAuth client, with its secret.
    pub client_id: Option<&'a str>,
    /// Secret of the OAuth client.
    pub client_secret: Option<Sealed>,
    /// Access token; needs the client.
    pub access_token: Option<Sealed>,
    /// Refresh token; needs the client.
    pub refresh_token: Option<Sealed>,
    /// When the access token ends.
    pub token_expires_at: Option<DateTime<Utc>>,
    /// Scopes granted, separated by spaces.
    pub token_scope: Option<&'a str>,
    /// Where the authorisation is.
    pub oauth_status: Option<OauthStatus>,
    /// When `oauth_status` left pending; `None` exactly while pending.
    pub oauth_completed_at: Option<DateTime<Utc>>,
    /// Where the user grants access; holds the state.
    pub oauth_authorization_url: Option<&'a SecretText>,
    /// State of the pending authorisation; unique.
    pub oauth_state: Option<&'a SecretText>,
}

/// Changes to a row: `None` keeps a column, `Some(None)` sets it to `NULL`.
#[derive(Debug, Clone, Default, AsChangeset)]
#[diesel(table_name = mcp_credentials)]
pub struct McpCredentialChangeset<'a> {
    /// API key, alone.
    pub api_key: Option<Option<Sealed>>,
    /// OAuth client, with its secret.
    pub client_id: Option<Option<&'a str>>,
    /// Secret of the OAuth client.
    pub client_secret: Option<Option<Sealed>>,
    /// Access token; needs the client.
    pub access_token: Option<Option<Sealed>>,
    /// Refresh token; needs the client.
    pub refresh_token: Option<Option<Sealed>>,
    /// When the access token ends.
    pub token_expires_at: Option<Option<DateTime<Utc>>>,
    /// Scopes granted, separated by spaces.
    pub token_scope: Option<Option<&'a str>>,
    /// Where the authorisation is.
    pub oauth_status: Option<OauthStatus>,
    /// When `oauth_status` left pending; `None` exactly while pending.
    pub oauth_completed_at: Option<Option<DateTime<Utc>>>,
    /// Where the user grants access; holds the state.
    pub oauth_authorization_url: Option<Option<&'a SecretText>>,
    /// State of the pending authorisation; unique.
    pub oauth_state: Option<Option<&'a SecretText>>,
}

/// What a token endpoint answered, sealed for the row it is stored in.
#[derive(Debug, Clone)]
pub struct OauthTokens<'a> {
    /// The access token.
    pub access_token: Sealed,
    /// The refresh token; `None` when a refresh brings none: the old one goes on.
    pub refresh_token: Option<Sealed>,
    /// When the access token ends, by the caller's clock; `None`: unknown or never, and it isn't refreshed.
    pub expires_at: Option<DateTime<Utc>>,
    /// Scopes granted, separated by spaces; `None` when a refresh doesn't tell: they stay the same.
    pub scope: Option<&'a str>,
}

/// Why a step of an authorisation isn't done.
#[derive(Debug, thiserror::Error)]
pub enum OauthError {
    /// There are no such credentials, or they are an API key.
    #[error("there are no such OAuth credentials")]
    NotOauth,
    /// No pending authorisation has this state: it was consumed, replaced by another, or never given out.
    #[error("no pending authorisation has this state")]
    UnknownState,
    /// Another pending authorisation has this state.
    #[error("another authorisation has this state")]
    StateTaken,
    /// The authorisation isn't pending.
    #[error("the authorisation isn't pending")]
    NotPending,
    /// Anything else.
    #[error("database error")]
    Database(#[from] diesel::result::Error),
}

/// A completed authorisation. The tokens are stored, whatever became of the instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OauthCompletion {
    /// The credentials.
    pub credential: McpCredential,
    /// Whether the instance can be called.
    pub instance: CompletedInstance,
}

/// What became of an instance whose authorisation was completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CompletedInstance {
    /// It is active.
    Active,
    /// It was inactive or is expired, and stays so.
    NotActive,
    /// It was made inactive: the user has as many active instances as the plan allows.
    LimitReached,
    /// It was made inactive: the user's plan is past its end.
    PlanExpired,
    /// It was made inactive: the user has no plan.
    PlanMissing,
}

/// Why credentials aren't changed.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// They were changed since they were read; this is how they are now.
    #[error("the credentials were changed meanwhile")]
    Conflict(Box<McpCredential>),
    /// There are no such credentials, or they aren't of the sort that is changed: an API key, an OAuth client, a
    /// completed authorisation.
    #[error("there are no such credentials")]
    NotFound,
    /// Anything else.
    #[error("database error")]
    Database(#[from] diesel::result::Error),
}

impl McpCredential {
    /// Inserts a row and returns it with its defaults.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn insert(conn: &mut PgConnection, new: &NewMcpCredential<'_>) -> QueryResult<Self> {
        diesel::insert_into(mcp_credentials::table)
            .values(new)
            .returning(Self::as_returning())
            .get_result(conn)
    }

    /// The row of this key, if there is one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find(conn: &mut PgConnection, credential_id: CredentialId) -> QueryResult<Option<Self>> {
        mcp_credentials::table
            .find(credential_id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// The credentials of an instance.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find_by_instance(
        conn: &mut PgConnection,
        instance_id: InstanceId,
    ) -> QueryResult<Option<Self>> {
        mcp_credentials::table
            .filter(mcp_credentials::instance_id.eq(instance_id))
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Changes the row of this key and returns it as it is then; `None` where there is no such row. An empty changeset
    /// changes nothing.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn update(
        conn: &mut PgConnection,
        credential_id: CredentialId,
        changes: &McpCredentialChangeset<'_>,
    ) -> QueryResult<Option<Self>> {
        let updated = diesel::update(mcp_credentials::table.find(credential_id))
            .set(changes)
            .returning(Self::as_returning())
            .get_result(conn)
            .optional_empty_changeset();
        found(updated, || Self::find(conn, credential_id))
    }

    /// Deletes the row of this key; says whether there was one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn delete(conn: &mut PgConnection, credential_id: CredentialId) -> QueryResult<bool> {
        diesel::delete(mcp_credentials::table.find(credential_id))
            .execute(conn)
            .map(|deleted| deleted == 1)
    }

    /// Begins an authorisation: stores its state and the URL where the user grants access. Also to authorise again: the
    /// status goes back to pending, so that the instance can't be called and frees its slot; an authorisation that is
    /// under way already is replaced, and its state unknown from then on. Tokens stay until others take their place.
    ///
    /// One statement. `state` must be random, with 128 bits at least.
    ///
    /// # Errors
    /// `NotOauth`, `StateTaken`. After `StateTaken` a transaction of the caller's is aborted, unless this was wrapped in a
    /// `conn.transaction` of its own.
    pub fn begin_oauth(
        conn: &mut PgConnection,
        credential_id: CredentialId,
        state: &SecretText,
        authorization_url: &SecretText,
    ) -> Result<Self, OauthError> {
        diesel::update(mcp_credentials::table.find(credential_id))
            .filter(mcp_credentials::client_id.is_not_null())
            .set((
                mcp_credentials::oauth_status.eq(OauthStatus::Pending),
                mcp_credentials::oauth_completed_at.eq(None::<DateTime<Utc>>),
                mcp_credentials::oauth_authorization_url.eq(authorization_url),
                mcp_credentials::oauth_state.eq(state),
            ))
            .returning(Self::as_returning())
            .get_result(conn)
            .map_err(|error| match error {
                diesel::NotFound => OauthError::NotOauth,
                error if violates(&error, "mcp_credentials_oauth_state_key") => {
                    OauthError::StateTaken
                }
                error => error.into(),
            })
    }

    /// Takes the pending authorisation with this state, once: the state is gone with it, and so is the URL. The row stays
    /// pending; [`complete_oauth`](Self::complete_oauth) or [`fail_oauth`](Self::fail_oauth) follows.
    ///
    /// One statement. Commit before going on: the provider has to be asked for the tokens, and `complete_oauth` locks the
    /// plan first.
    ///
    /// # Errors
    /// `UnknownState`.
    pub fn take_by_state(conn: &mut PgConnection, state: &SecretText) -> Result<Self, OauthError> {
        diesel::update(mcp_credentials::table)
            .filter(mcp_credentials::oauth_state.eq(state))
            .filter(mcp_credentials::oauth_status.eq(OauthStatus::Pending))
            .set((
                mcp_credentials::oauth_authorization_url.eq(None::<&SecretText>),
                mcp_credentials::oauth_state.eq(None::<&SecretText>),
            ))
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()?
            .ok_or(OauthError::UnknownState)
    }

    /// Completes a pending authorisation: stores the tokens, in place of any before. An active instance can be called
    /// from then on. Where the plan allows no further active instance, or is past its end, the instance is made inactive
    /// and the tokens are stored all the same. An inactive or expired instance stays so; one past its end expires.
    ///
    /// In one transaction, which locks the user's plan, then the credentials, then the instance. The rule that refuses an
    /// instance must be immediate, as it is unless the caller deferred it: deferred, it fails the commit.
    ///
    /// # Errors
    /// `NotOauth`, `NotPending`; above READ COMMITTED also a serialization failure, after which the whole transaction is
    /// to be repeated: see [`retry_transaction`](crate::retry_transaction).
    pub fn complete_oauth(
        conn: &mut PgConnection,
        credential_id: CredentialId,
        tokens: &OauthTokens<'_>,
    ) -> Result<OauthCompletion, OauthError> {
        conn.transaction(|conn| {
            let user_id: UserId = mcp_credentials::table
                .inner_join(mcp_service_table::table)
                .filter(mcp_credentials::credential_id.eq(credential_id))
                .select(mcp_service_table::user_id)
                .first(conn)
                .optional()?
                .ok_or(OauthError::NotOauth)?;
            UserPlan::lock_by_user(conn, user_id)?;
            let pending = mcp_credentials::table
                .find(credential_id)
                .filter(mcp_credentials::client_id.is_not_null())
                .select(Self::as_select())
                .for_no_key_update()
                .first(conn)
                .optional()?
                .ok_or(OauthError::NotOauth)?;
            if pending.oauth_status != OauthStatus::Pending {
                return Err(OauthError::NotPending);
            }
            let instance = mcp_service_table::table.find(pending.instance_id);
            let expired = InstanceStatus::Expired.into_sql::<McpInstanceStatus>();
            let status: InstanceStatus = diesel::update(instance)
                .set((
                    mcp_service_table::credentials_updated_at.eq(now),
                    mcp_service_table::status.eq(case_when(
                        mcp_service_table::expires_at.le(now),
                        expired,
                    )
                    .otherwise(mcp_service_table::status)),
                ))
                .returning(mcp_service_table::status)
                .get_result(conn)?;

            // The database knows the rule; where it refuses, only the savepoint is lost.
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
                mcp_credentials::oauth_authorization_url.eq(None::<&SecretText>),
                mcp_credentials::oauth_state.eq(None::<&SecretText>),
            ))
            .returning(Self::as_returning())
            .get_result(conn)
    }

    /// Marks a pending authorisation as failed: the user or the provider refused. Its state and URL are gone. A network
    /// error on the way to the provider is no refusal.
    ///
    /// One statement; locks the credentials, then the instance.
    ///
    /// # Errors
    /// `NotOauth`, `NotPending`.
    pub fn fail_oauth(
        conn: &mut PgConnection,
        credential_id: CredentialId,
    ) -> Result<Self, OauthError> {
        let failed = diesel::update(mcp_credentials::table.find(credential_id))
            .filter(mcp_credentials::client_id.is_not_null())
            .filter(mcp_credentials::oauth_status.eq(OauthStatus::Pending))
            .set((
                mcp_credentials::oauth_status.eq(OauthStatus::Failed),
                mcp_credentials::oauth_completed_at.eq(now),
                mcp_credentials::oauth_authorization_url.eq(None::<&SecretText>),
                mcp_credentials::oauth_state.eq(None::<&SecretText>),
            ))
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()?;
        match failed {
            Some(credential) => Ok(credential),
            None => Err(match Self::find(conn, credential_id)? {
                Some(credential) if credential.client_id.is_some() => OauthError::NotPending,
                _ => OauthError::NotOauth,
            }),
        }
    }

    /// Takes up to `limit` rows whose access token ends before `due` and that have a refresh token, the most urgent first,
    /// and locks them until the caller's transaction ends; rows that another worker has locked are left out. A row whose
    /// refresh failed after `not_failed_since` waits, so that one provider's outage doesn't hold up the others.
    ///
    /// The lock is what keeps two workers from spending one refresh token, so the transaction must last until
    /// [`store_refreshed`](Self::store_refreshed), [`refresh_failed`](Self::refresh_failed) or
    /// [`refresh_refused`](Self::refresh_refused) has been called for each row, the calls to the provider included. Take
    /// one row at a time, then, on a connection of the worker's own, with a short time limit on the call: new tokens are
    /// safe only once the transaction commits, and whoever wants to change those credentials waits until then. Counting
    /// calls on the instance doesn't wait.
    ///
    /// ```no_run
    /// # use bruhmcp_db::models::{CredentialError, McpCredential, OauthTokens};
    /// # use chrono::{TimeDelta, Utc};
    /// # use diesel::Connection;
    /// # enum Answer { Tokens(OauthTokens<'static>), InvalidGrant, Unreachable }
    /// # fn ask_provider(_: &McpCredential) -> Answer { Answer::InvalidGrant }
    /// /// Refreshes one; says whether there was one.
    /// fn work(conn: &mut diesel::PgConnection) -> Result<bool, CredentialError> {
    ///     conn.transaction(|conn| {
    ///         let due = Utc::now() + TimeDelta::minutes(10);
    ///         let not_failed_since = Utc::now() - TimeDelta::minutes(1);
    ///         let taken = McpCredential::lock_due_for_refresh(conn, due, not_failed_since, 1)?;
    ///         for old in &taken {
    ///             match ask_provider(old) {
    ///                 Answer::Tokens(tokens) => {
    ///                     McpCredential::store_refreshed(conn, old.credential_id, old.version, &tokens)?;
    ///                 }
    ///                 Answer::InvalidGrant => {
    ///                     McpCredential::refresh_refused(conn, old.credential_id, old.version)?;
    ///                 }
    ///                 Answer::Unreachable => {
    ///                     McpCredential::refresh_failed(conn, old.instance_id, "network", None)?;
    ///                 }
    ///             }
    ///         }
    ///         Ok(!taken.is_empty())
    ///     })
    /// }
    /// ```
    ///
    /// # Errors
    /// Only those of the connection; above READ COMMITTED also a serialization failure.
    pub fn lock_due_for_refresh(
        conn: &mut PgConnection,
        due: DateTime<Utc>,
        not_failed_since: DateTime<Utc>,
        limit: i64,
    ) -> QueryResult<Vec<Self>> {
        let failed = token_audit_log::table
            .filter(token_audit_log::instance_id.eq(mcp_credentials::instance_id))
            .filter(token_audit_log::operation.eq(TOKEN_REFRESH))
            .filter(token_audit_log::status.eq(AuditStatus::Failure))
            .filter(token_audit_log::created_at.gt(not_failed_since));
        mcp_credentials::table
            .filter(mcp_credentials::refresh_token.is_not_null())
            // A literal: with a bind, a generic plan can't use the index of the queue, which has this predicate.
            .filter(sql::<Bool>("mcp_credentials.oauth_status = 'completed'"))
            .filter(mcp_credentials::token_expires_at.lt(due))
            .filter(not(exists(failed)))
            .order(mcp_credentials::token_expires_at)
            .limit(limit)
            .select(Self::as_select())
            .for_no_key_update()
            .skip_locked()
            .load(conn)
    }

    /// Stores refreshed tokens, if the credentials are still as they were read (`version`), with a row in the audit log.
    ///
    /// In one transaction; locks the credentials, then the instance.
    ///
    /// # Errors
    /// `Conflict` with the row as it is now. Where its refresh token is still the one that was spent (only the
    /// sealing or the client changed), call again with its version, or the new tokens are lost. `NotFound`, also where the
    /// authorisation isn't completed.
    pub fn store_refreshed(
        conn: &mut PgConnection,
        credential_id: CredentialId,
        version: i32,
        tokens: &OauthTokens<'_>,
    ) -> Result<Self, CredentialError> {
        conn.transaction(|conn| {
            let stored = diesel::update(mcp_credentials::table.find(credential_id))
                .filter(mcp_credentials::version.eq(version))
                .filter(mcp_credentials::oauth_status.eq(OauthStatus::Completed))
                .filter(mcp_credentials::client_id.is_not_null())
                .set((
                    mcp_credentials::access_token.eq(&tokens.access_token),
                    mcp_credentials::token_expires_at.eq(tokens.expires_at),
                    tokens
                        .refresh_token
                        .as_ref()
                        .map(|token| mcp_credentials::refresh_token.eq(token)),
                    tokens
                        .scope
                        .map(|scope| mcp_credentials::token_scope.eq(scope)),
                ))
                .returning(Self::as_returning())
                .get_result(conn)
                .optional()?;
            let credential = Self::or_conflict(conn, stored, credential_id, version)?;
            TokenAudit::insert(
                conn,
                &refresh_audit(credential.instance_id, AuditStatus::Success),
            )?;
            credential.note_update(conn)?;
            Ok(credential)
        })
    }

    /// Records that a refresh failed for now, such as by a network error or a provider's outage. The credentials stay as
    /// they are and due; [`lock_due_for_refresh`](Self::lock_due_for_refresh) leaves them out for a while.
    ///
    /// `error_type` and `error_message` go to the audit log and must hold no secret. One statement.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn refresh_failed(
        conn: &mut PgConnection,
        instance_id: InstanceId,
        error_type: &str,
        error_message: Option<&str>,
    ) -> QueryResult<TokenAudit> {
        TokenAudit::insert(
            conn,
            &NewTokenAudit {
                error_type: Some(error_type),
                error_message,
                ..refresh_audit(instance_id, AuditStatus::Failure)
            },
        )
    }

    /// Marks an authorisation as expired, because the provider refused the refresh token for good (`invalid_grant`), if
    /// the credentials are still as they were read (`version`), with a row in the audit log. The user must authorise again.
    ///
    /// In one transaction; locks the credentials, then the instance.
    ///
    /// # Errors
    /// `Conflict` with the row as it is now: the token that was refused may not be the latest. `NotFound`, also where the
    /// authorisation isn't completed.
    pub fn refresh_refused(
        conn: &mut PgConnection,
        credential_id: CredentialId,
        version: i32,
    ) -> Result<Self, CredentialError> {
        conn.transaction(|conn| {
            let expired = diesel::update(mcp_credentials::table.find(credential_id))
                .filter(mcp_credentials::version.eq(version))
                .filter(mcp_credentials::oauth_status.eq(OauthStatus::Completed))
                .filter(mcp_credentials::client_id.is_not_null())
                .set(mcp_credentials::oauth_status.eq(OauthStatus::Expired))
                .returning(Self::as_returning())
                .get_result(conn)
                .optional()?;
            let credential = Self::or_conflict(conn, expired, credential_id, version)?;
            TokenAudit::insert(
                conn,
                &NewTokenAudit {
                    error_type: Some("invalid_grant"),
                    ..refresh_audit(credential.instance_id, AuditStatus::Failure)
                },
            )?;
            Ok(credential)
        })
    }

    /// Puts another API key in place of the one that was read (`version`). The status stays.
    ///
    /// In one transaction; locks the credentials, then the instance.
    ///
    /// # Errors
    /// `Conflict` with the row as it is now; `NotFound`, also where they are OAuth credentials.
    pub fn replace_api_key(
        conn: &mut PgConnection,
        credential_id: CredentialId,
        version: i32,
        api_key: &Sealed,
    ) -> Result<Self, CredentialError> {
        conn.transaction(|conn| {
            let replaced = diesel::update(mcp_credentials::table.find(credential_id))
                .filter(mcp_credentials::version.eq(version))
                .filter(mcp_credentials::api_key.is_not_null())
                .set(mcp_credentials::api_key.eq(api_key))
                .returning(Self::as_returning())
                .get_result(conn)
                .optional()?;
            let credential = Self::or_conflict(conn, replaced, credential_id, version)?;
            credential.note_update(conn)?;
            Ok(credential)
        })
    }

    /// Puts another secret of the same OAuth client in place of the one that was read (`version`). Status and tokens stay.
    ///
    /// In one transaction; locks the credentials, then the instance.
    ///
    /// # Errors
    /// `Conflict` with the row as it is now; `NotFound`, also where they are an API key.
    pub fn replace_client_secret(
        conn: &mut PgConnection,
        credential_id: CredentialId,
        version: i32,
        client_secret: &Sealed,
    ) -> Result<Self, CredentialError> {
        conn.transaction(|conn| {
            let replaced = diesel::update(mcp_credentials::table.find(credential_id))
                .filter(mcp_credentials::version.eq(version))
                .filter(mcp_credentials::client_secret.is_not_null())
                .set(mcp_credentials::client_secret.eq(client_secret))
                .returning(Self::as_returning())
                .get_result(conn)
                .optional()?;
            let credential = Self::or_conflict(conn, replaced, credential_id, version)?;
            credential.note_update(conn)?;
            Ok(credential)
        })
    }

    /// The row that an update guarded by `version` gave back, or why it gave none.
    fn or_conflict(
        conn: &mut PgConnection,
        updated: Option<Self>,
        credential_id: CredentialId,
        version: i32,
    ) -> Result<Self, CredentialError> {
        if let Some(credential) = updated {
            return Ok(credential);
        }
        match Self::find(conn, credential_id)? {
            Some(current) if current.version != version => {
                Err(CredentialError::Conflict(Box::new(current)))
            }
            _ => Err(CredentialError::NotFound),
        }
    }

    /// Keeps `credentials_updated_at` of the instance.
    fn note_update(&self, conn: &mut PgConnection) -> QueryResult<()> {
        diesel::update(mcp_service_table::table.find(self.instance_id))
            .set(mcp_service_table::credentials_updated_at.eq(now))
            .execute(conn)
            .map(drop)
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
        .find_map(|(rule, refused)| violates(error, rule).then_some(refused))
    }
}

fn refresh_audit(instance_id: InstanceId, status: AuditStatus) -> NewTokenAudit<'static> {
    NewTokenAudit {
        instance_id,
        user_id: None,
        operation: TOKEN_REFRESH,
        status,
        method: Some("oauth"),
        error_type: None,
        error_message: None,
        metadata: None,
    }
}
