//! Auth tokens: one-time codes, links and refresh tokens, as digests.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;

use crate::enums::AuthTokenType;
use crate::ids::{AuthTokenId, UserId};
use crate::models::User;
use crate::schema::auth_tokens;
use crate::secret::TokenDigest;

/// A row of `auth_tokens`.
#[derive(
    Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable, Associations,
)]
#[diesel(table_name = auth_tokens, belongs_to(User, foreign_key = user_id), check_for_backend(Pg))]
pub struct AuthToken {
    /// Key.
    pub id: AuthTokenId,
    /// Whose token it is.
    pub user_id: UserId,
    /// Digest of the secret.
    #[serde(skip_serializing)]
    pub token: TokenDigest,
    /// What it is good for.
    #[serde(rename = "type")]
    pub type_: AuthTokenType,
    /// From then on it is worth nothing.
    pub expires_at: DateTime<Utc>,
    /// Consumed, replaced or revoked.
    pub is_used: bool,
    /// Wrong guesses so far.
    pub attempts: i16,
    /// When it was issued.
    pub created_at: DateTime<Utc>,
    /// When the row changed last.
    pub updated_at: DateTime<Utc>,
}

/// A new row; `None` leaves a column to its default.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = auth_tokens, check_for_backend(Pg))]
pub struct NewAuthToken<'a> {
    /// Key.
    pub id: Option<AuthTokenId>,
    /// Whose token it is.
    pub user_id: UserId,
    /// Digest of the secret.
    pub token: &'a TokenDigest,
    /// What it is good for.
    pub type_: AuthTokenType,
    /// From then on it is worth nothing.
    pub expires_at: DateTime<Utc>,
}

/// Changes to a row: `None` keeps a column.
#[derive(Debug, Clone, Default, AsChangeset)]
#[diesel(table_name = auth_tokens)]
pub struct AuthTokenChangeset {
    /// From then on it is worth nothing.
    pub expires_at: Option<DateTime<Utc>>,
    /// Consumed, replaced or revoked.
    pub is_used: Option<bool>,
    /// Wrong guesses so far.
    pub attempts: Option<i16>,
}

impl AuthToken {
    /// Inserts a row and returns it with its defaults.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn insert(conn: &mut PgConnection, new: &NewAuthToken<'_>) -> QueryResult<Self> {
        diesel::insert_into(auth_tokens::table)
            .values(new)
            .returning(Self::as_returning())
            .get_result(conn)
    }

    /// The row of this key, if there is one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find(conn: &mut PgConnection, id: AuthTokenId) -> QueryResult<Option<Self>> {
        auth_tokens::table
            .find(id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// The tokens of a user, of one type, newest first.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn list_by_user(
        conn: &mut PgConnection,
        user_id: UserId,
        type_: AuthTokenType,
    ) -> QueryResult<Vec<Self>> {
        auth_tokens::table
            .filter(
                auth_tokens::user_id
                    .eq(user_id)
                    .and(auth_tokens::type_.eq(type_)),
            )
            .order(auth_tokens::created_at.desc())
            .select(Self::as_select())
            .load(conn)
    }

    /// Changes the row of this key and returns it as it is then; `None` where there is no such row. An empty changeset
    /// changes nothing.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn update(
        conn: &mut PgConnection,
        id: AuthTokenId,
        changes: &AuthTokenChangeset,
    ) -> QueryResult<Option<Self>> {
        let updated = diesel::update(auth_tokens::table.find(id))
            .set(changes)
            .returning(Self::as_returning())
            .get_result(conn)
            .optional_empty_changeset();
        match updated {
            Ok(Some(row)) => Ok(Some(row)),
            Ok(None) => Self::find(conn, id),
            Err(diesel::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Deletes the row of this key; says whether there was one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn delete(conn: &mut PgConnection, id: AuthTokenId) -> QueryResult<bool> {
        diesel::delete(auth_tokens::table.find(id))
            .execute(conn)
            .map(|deleted| deleted == 1)
    }
}
