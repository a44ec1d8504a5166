//! Credentials of instances: an API key, or an OAuth client and its tokens. Secrets are ciphertext.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;

use crate::enums::OauthStatus;
use crate::ids::{CredentialId, InstanceId};
use crate::models::McpInstance;
use crate::schema::mcp_credentials;
use crate::secret::{Sealed, SecretText};

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
        match updated {
            Ok(Some(row)) => Ok(Some(row)),
            Ok(None) => Self::find(conn, credential_id),
            Err(diesel::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
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
}
