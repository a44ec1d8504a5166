//! The row. Without the feature `operations`, it is all that the crate has of the table.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;

use crate::enums::AuthTokenType;
use crate::ids::{AuthTokenId, FamilyId, UserId};
use crate::models::User;
use crate::schema::auth_tokens;
use crate::secret::TokenDigest;

/// A row of `auth_tokens`.
#[derive(
    Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable, Associations,
)]
#[diesel(table_name = auth_tokens, belongs_to(User, foreign_key = user_id), check_for_backend(Pg))]
#[expect(missing_docs, reason = "the other fields explain themselves")]
pub struct AuthToken {
    pub id: AuthTokenId,
    pub user_id: UserId,
    /// The keyed digest of the secret.
    #[serde(skip_serializing)]
    pub token: TokenDigest,
    #[serde(rename = "type")]
    pub type_: AuthTokenType,
    pub expires_at: DateTime<Utc>,
    /// Whether the token was consumed, replaced or revoked.
    pub is_used: bool,
    /// The number of wrong guesses.
    pub attempts: i16,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
    pub used_at: Option<DateTime<Utc>>,
    /// The session of a refresh token; other types have none.
    pub family_id: Option<FamilyId>,
    /// When the session ends; other types have none.
    pub session_expires_at: Option<DateTime<Utc>>,
}
