//! Passwords: their form, and what else ends when one is set.

use diesel::prelude::*;
use diesel::result::Error;

use super::{User, UserError, check};
use crate::enums::AuthTokenType;
use crate::ids::UserId;
use crate::models::{AuthToken, TokenError};
use crate::prepared::Prepare;
use crate::schema::users;
use crate::secret::{HashedToken, SecretText};

/// Why a password was not reset. Nothing is changed then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResetError {
    /// The token can't be consumed.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The new password is not in the form of a hash. The token stays live.
    #[error("the password is not a hash")]
    NotAHash,
}

impl From<Error> for ResetError {
    fn from(error: Error) -> Self {
        Self::Token(error.into())
    }
}

/// Whether `users_password_check` accepts the text: `$id$…$hash`.
pub(super) fn is_hash(password: &SecretText) -> bool {
    let text = password.expose();
    let mut fields = text.split('$');
    let (Some(""), Some(id), Some(hash)) = (fields.next(), fields.next(), fields.next_back())
    else {
        return false;
    };
    let is_base64 = |c: u8| c.is_ascii_alphanumeric() || b"/+.=-".contains(&c);
    let is_id = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    let mut middle = fields.peekable();
    (1..=32).contains(&id.len())
        && id.bytes().all(is_id)
        && middle.peek().is_some()
        && middle.all(|field| !field.is_empty() && field.bytes().all(|c| is_base64(c) || c == b','))
        && hash.len() >= 22
        && hash.bytes().all(is_base64)
        && text.len() <= 512
}

impl User {
    /// Consumes a `password_reset` token, sets the password and revokes all tokens of the user, so
    /// each device must sign in again. Of several concurrent calls with one token, one succeeds.
    ///
    /// Locks the user until the transaction ends. Eight round trips.
    ///
    /// # Errors
    /// [`ResetError::NotAHash`], and [`ResetError::Token`] with the reason; a token of another type
    /// is not found. The caller's transaction can go on after each but
    /// [`TokenError::Database`].
    pub fn reset_password(
        conn: &mut PgConnection,
        token: &HashedToken,
        password: &SecretText,
    ) -> Result<Self, ResetError> {
        if !is_hash(password) {
            return Err(ResetError::NotAHash);
        }
        if token.type_ != AuthTokenType::PasswordReset {
            return Err(TokenError::NotFound.into());
        }
        conn.transaction(|conn| {
            let token = AuthToken::consume(conn, token)?;
            let user = set_password(conn, token.user_id, Some(password))?;
            user.ok_or_else(|| TokenError::NotFound.into())
        })
    }

    /// Sets an active user's password (`None`: the user signs in by other means) and revokes all
    /// tokens, so each device must sign in again; returns `None` if there is no such user.
    ///
    /// To keep this device signed in, issue it a new refresh token after this call. Locks the user
    /// until the transaction ends. Seven round trips.
    ///
    /// # Errors
    /// [`UserError::InvalidField`] if the password is not in the form of a hash.
    pub fn change_password(
        conn: &mut PgConnection,
        id: UserId,
        password: Option<&SecretText>,
    ) -> Result<Option<Self>, UserError> {
        check("password", password.is_none_or(is_hash))?;
        conn.transaction(|conn| Ok(set_password(conn, id, password)?))
    }
}

fn set_password(
    conn: &mut PgConnection,
    id: UserId,
    password: Option<&SecretText>,
) -> QueryResult<Option<User>> {
    let user = diesel::update(users::table.find(id))
        .filter(users::is_active)
        .set(users::password.eq(password))
        .returning(User::as_returning())
        .prepared()
        .get_result(conn)
        .optional()?;
    if user.is_some() {
        AuthToken::revoke_all(conn, id, None)?;
    }
    Ok(user)
}
