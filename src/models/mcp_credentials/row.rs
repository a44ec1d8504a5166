//! The row. Without the feature `operations`, it is all that the crate has of the table.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;

use crate::enums::OauthStatus;
use crate::ids::{CredentialId, InstanceId};
use crate::models::McpInstance;
use crate::schema::mcp_credentials;
use crate::secret::{Sealed, StateDigest};

/// A row of `mcp_credentials`. An instance has at most one.
///
/// Operations that also change the instance are one transaction. They lock the user (`FOR KEY
/// SHARE`), the credentials, then the instance.
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
#[diesel(table_name = mcp_credentials, primary_key(credential_id), check_for_backend(Pg))]
#[diesel(belongs_to(McpInstance, foreign_key = instance_id))]
#[expect(missing_docs, reason = "the other fields explain themselves")]
pub struct McpCredential {
    pub credential_id: CredentialId,
    pub instance_id: InstanceId,
    /// Set for an API key, without any of the OAuth columns.
    #[serde(skip_serializing)]
    pub api_key: Option<Sealed>,
    /// Set for an OAuth client, together with `client_secret`.
    pub client_id: Option<String>,
    #[serde(skip_serializing)]
    pub client_secret: Option<Sealed>,
    #[serde(skip_serializing)]
    pub access_token: Option<Sealed>,
    #[serde(skip_serializing)]
    pub refresh_token: Option<Sealed>,
    /// The end of the access token; `None` if unknown or never.
    pub token_expires_at: Option<DateTime<Utc>>,
    /// The granted scopes, separated by spaces.
    pub token_scope: Option<String>,
    /// The authoritative status; the instance has a copy.
    pub oauth_status: OauthStatus,
    /// When `oauth_status` left pending; `None` while pending.
    pub oauth_completed_at: Option<DateTime<Utc>>,
    /// Where the user grants access. Contains the state.
    #[serde(skip_serializing)]
    pub oauth_authorization_url: Option<Sealed>,
    /// Unique.
    #[serde(skip_serializing)]
    pub oauth_state: Option<StateDigest>,
    /// Set exactly with `oauth_state`.
    pub oauth_state_expires_at: Option<DateTime<Utc>>,
    /// PKCE's, until the authorization ends.
    #[serde(skip_serializing)]
    pub oauth_code_verifier: Option<Sealed>,
    /// Until then another caller refreshes the tokens, or nobody does after a failure.
    pub refresh_leased_until: Option<DateTime<Utc>>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
    /// Incremented by each change but that of a lease.
    pub version: i32,
    /// When `version` was incremented.
    pub last_modified: DateTime<Utc>,
}
