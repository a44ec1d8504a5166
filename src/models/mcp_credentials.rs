//! Credentials of instances: an API key, or an OAuth client with its tokens. Secrets are stored as
//! ciphertext.

mod oauth;
mod refresh;
mod row;
#[cfg(feature = "crypto")]
mod sealing;

use chrono::{DateTime, Datelike, Utc};
use diesel::dsl::now;
use diesel::prelude::*;

pub use self::oauth::{CompletedInstance, OauthCompletion};
pub use self::refresh::RefreshLease;
pub use self::row::McpCredential;
#[cfg(feature = "crypto")]
pub use self::sealing::Resealed;
use crate::enums::OauthStatus;
use crate::error::violates;
use crate::ids::{CredentialId, InstanceId};
use crate::prepared::Prepare;
use crate::schema::{mcp_credentials, mcp_service_table, users};
use crate::secret::Sealed;

/// Credentials for [`McpInstance::create`](crate::models::McpInstance::create): an API key, or an
/// OAuth client that waits for its user.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = mcp_credentials, treat_none_as_default_value = false, check_for_backend(Pg))]
pub struct NewMcpCredential<'a> {
    credential_id: CredentialId,
    pub(crate) instance_id: InstanceId,
    api_key: Option<Sealed>,
    client_id: Option<&'a str>,
    client_secret: Option<Sealed>,
    oauth_status: OauthStatus,
    oauth_completed_at: Option<DateTime<Utc>>,
}

impl<'a> NewMcpCredential<'a> {
    /// An API key, sealed for this instance; completed, now by this machine's clock.
    #[must_use]
    pub fn sealed_api_key(instance_id: InstanceId, api_key: Sealed) -> Self {
        Self {
            credential_id: CredentialId::new(),
            instance_id,
            api_key: Some(api_key),
            client_id: None,
            client_secret: None,
            oauth_status: OauthStatus::Completed,
            oauth_completed_at: Some(Utc::now()),
        }
    }

    /// An OAuth client with a secret sealed for this instance; pending.
    /// [`McpCredential::begin_oauth`] comes next.
    #[must_use]
    pub fn sealed_oauth(
        instance_id: InstanceId,
        client_id: &'a str,
        client_secret: Sealed,
    ) -> Self {
        Self {
            credential_id: CredentialId::new(),
            instance_id,
            api_key: None,
            client_id: Some(client_id),
            client_secret: Some(client_secret),
            oauth_status: OauthStatus::Pending,
            oauth_completed_at: None,
        }
    }

    pub(super) fn has_valid_client(&self) -> bool {
        self.client_id.is_none_or(is_valid_client_id)
    }

    /// The key of the row.
    #[must_use]
    pub fn credential_id(&self) -> CredentialId {
        self.credential_id
    }
}

/// The answer of a token endpoint, sealed for one instance.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "the other fields explain themselves")]
pub struct OauthTokens<'a> {
    pub access_token: Sealed,
    /// In a refresh, `None` keeps the old token.
    pub refresh_token: Option<Sealed>,
    /// The end of the access token by this machine's clock; `None`: it is never refreshed.
    pub expires_at: Option<DateTime<Utc>>,
    /// The granted scopes, separated by spaces. In a refresh, `None` keeps the old ones.
    pub scope: Option<&'a str>,
}

/// Why an operation on credentials was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialError {
    /// They don't exist or are of the other kind (API key, OAuth client).
    #[error("there are no such credentials")]
    NotFound,
    /// They have another version or status. Holds the row as it is now.
    #[error("the credentials were changed in the meantime")]
    Conflict(Box<McpCredential>),
    /// The state was used, replaced or never issued, has expired or is another user's.
    #[error("no pending authorization has this state")]
    UnknownState,
    /// Another authorization has the state (`mcp_credentials_oauth_state_key`).
    #[error("another authorization has this state")]
    StateTaken,
    /// A value that is never stored; says which. The database was not asked.
    #[error("{0}")]
    Invalid(&'static str),
    /// Any other database error.
    #[error("database error")]
    Database(#[source] diesel::result::Error),
}

impl From<diesel::result::Error> for CredentialError {
    fn from(error: diesel::result::Error) -> Self {
        if violates(&error, "mcp_credentials_oauth_state_key") {
            Self::StateTaken
        } else {
            Self::Database(error)
        }
    }
}

impl McpCredential {
    /// Returns the credentials with this key.
    pub fn find(conn: &mut PgConnection, credential_id: CredentialId) -> QueryResult<Option<Self>> {
        mcp_credentials::table
            .find(credential_id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Returns the credentials of an instance.
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

    /// Replaces an API key, if the row still has this version.
    ///
    /// # Errors
    /// [`CredentialError::Conflict`], [`CredentialError::NotFound`].
    pub fn replace_api_key(
        conn: &mut PgConnection,
        credential_id: CredentialId,
        version: i32,
        api_key: &Sealed,
    ) -> Result<Self, CredentialError> {
        conn.transaction(|conn| {
            lock_user(conn, credential_id)?;
            let replaced = diesel::update(mcp_credentials::table.find(credential_id))
                .filter(mcp_credentials::version.eq(version))
                .filter(mcp_credentials::api_key.is_not_null())
                .set(mcp_credentials::api_key.eq(api_key))
                .returning(Self::as_returning())
                .prepared()
                .get_result(conn)
                .optional()?;
            let Some(credential) = replaced else {
                return Err(match Self::find(conn, credential_id)? {
                    Some(current) if current.api_key.is_some() => {
                        CredentialError::Conflict(Box::new(current))
                    }
                    _ => CredentialError::NotFound,
                });
            };
            credential.note_update(conn)?;
            Ok(credential)
        })
    }

    /// Replaces an OAuth client's secret, and its id by `client_id` or the same, if the row still
    /// has this version. Status and tokens stay: the refresh token of another client is of no use,
    /// so [`begin_oauth`](Self::begin_oauth) comes next.
    ///
    /// # Errors
    /// [`CredentialError::Conflict`], [`CredentialError::NotFound`], [`CredentialError::Invalid`].
    pub fn replace_client(
        conn: &mut PgConnection,
        credential_id: CredentialId,
        version: i32,
        client_id: &str,
        client_secret: &Sealed,
    ) -> Result<Self, CredentialError> {
        if !is_valid_client_id(client_id) {
            return Err(CredentialError::Invalid(
                "a client id has 1 to 2048 characters and no NUL",
            ));
        }
        conn.transaction(|conn| {
            lock_user(conn, credential_id)?;
            let replaced = diesel::update(mcp_credentials::table.find(credential_id))
                .filter(mcp_credentials::version.eq(version))
                .filter(mcp_credentials::client_secret.is_not_null())
                .set((
                    mcp_credentials::client_id.eq(client_id),
                    mcp_credentials::client_secret.eq(client_secret),
                ))
                .returning(Self::as_returning())
                .prepared()
                .get_result(conn)
                .optional()?;
            let credential = Self::or_oauth_conflict(conn, replaced, credential_id)?;
            credential.note_update(conn)?;
            Ok(credential)
        })
    }

    /// The row that an update of OAuth credentials returned, or why it found none.
    fn or_oauth_conflict(
        conn: &mut PgConnection,
        updated: Option<Self>,
        credential_id: CredentialId,
    ) -> Result<Self, CredentialError> {
        if let Some(credential) = updated {
            return Ok(credential);
        }
        match Self::find(conn, credential_id)? {
            Some(current) if current.client_id.is_some() => {
                Err(CredentialError::Conflict(Box::new(current)))
            }
            _ => Err(CredentialError::NotFound),
        }
    }

    fn note_update(&self, conn: &mut PgConnection) -> QueryResult<()> {
        diesel::update(mcp_service_table::table.find(self.instance_id))
            .set(mcp_service_table::credentials_updated_at.eq(now))
            .prepared()
            .execute(conn)?;
        Ok(())
    }
}

impl OauthTokens<'_> {
    fn check(&self) -> Result<(), CredentialError> {
        if self
            .scope
            .is_some_and(|scope| scope.contains('\0') || scope.chars().count() > 16384)
        {
            return Err(CredentialError::Invalid(
                "a scope has at most 16384 characters and no NUL",
            ));
        }
        if self
            .expires_at
            .is_some_and(|end| !(1970..=9999).contains(&end.year()))
        {
            return Err(CredentialError::Invalid(
                "the end of an access token is in the years 1970 to 9999",
            ));
        }
        Ok(())
    }
}

fn is_valid_client_id(client_id: &str) -> bool {
    !client_id.contains('\0') && (1..=2048).contains(&client_id.chars().count())
}

/// Locks the user of the credentials (FOR KEY SHARE), for operations that lock credentials and then
/// the instance.
///
/// Otherwise they would deadlock with a transaction that has locked the user and changes the
/// instance first. Ordinary operations on the user don't wait for this lock.
fn lock_user(conn: &mut PgConnection, credential_id: CredentialId) -> QueryResult<()> {
    let user_id = mcp_service_table::table
        .inner_join(mcp_credentials::table)
        .filter(mcp_credentials::credential_id.eq(credential_id))
        .select(mcp_service_table::user_id);
    users::table
        .filter(users::id.eq_any(user_id))
        .select(users::id)
        .for_key_share()
        .execute(conn)?;
    Ok(())
}
