//! Auth tokens: one-time codes, links and refresh tokens, stored as digests.

use chrono::{DateTime, TimeDelta, Utc};
use diesel::dsl::{case_when, exists, not, now, sql};
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::result::Error;
use diesel::sql_types::{BigInt, Interval, SmallInt, Timestamptz};
use serde::Serialize;

use crate::enums::AuthTokenType;
use crate::ids::{AuthTokenId, UserId};
use crate::models::User;
use crate::page::{Cursor, Page, newest_first};
use crate::schema::{auth_tokens, users};
use crate::secret::{HashedToken, TokenDigest};

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
}

/// The number of wrong guesses after which even the right code is rejected.
pub const MAX_CODE_ATTEMPTS: i16 = 5;

/// Why a link's token was not consumed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages say the rest")]
pub enum TokenError {
    #[error("the token has expired")]
    Expired,
    /// Consumed, replaced or revoked.
    #[error("the token was used before")]
    Used,
    /// There is no such token, or its user is not active.
    #[error("no such token")]
    NotFound,
    #[error("database error")]
    Database(#[from] Error),
}

/// The outcome of [`AuthToken::check_code`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CodeCheck {
    /// The code is consumed.
    Right(AuthToken),
    /// The guess was counted.
    Wrong {
        /// How many guesses are left.
        attempts_left: i16,
    },
    /// After [`MAX_CODE_ATTEMPTS`] wrong guesses this one was not compared.
    TooManyAttempts,
    /// The newest code has expired.
    Expired,
    /// The newest code was consumed or revoked.
    Used,
    /// The user has no code, or is not active.
    NotFound,
}

/// The outcome of [`AuthToken::rotate`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rotation {
    /// This is the successor.
    Rotated(AuthToken),
    /// The token was used before: all refresh tokens of this user are revoked.
    Reused(UserId),
    /// The token has expired or was revoked.
    Expired,
    /// There is no such refresh token, or its user is not active.
    NotFound,
}

diesel::define_sql_function! {
    /// Unlike `now()`, it advances within a transaction.
    fn clock_timestamp() -> Timestamptz;
}

// Diesel can't tell a table from itself in a subquery.
diesel::alias!(const PRESENTED: Alias<Presented> = auth_tokens as presented);

/// A subquery for the active owner of a token, which locks the user. PostgreSQL runs it once,
/// before the statement around it locks the token.
#[diesel::dsl::auto_type]
fn lock_owner<'a>(token: &'a HashedToken) -> _ {
    let type_: AuthTokenType = token.type_;
    let digest: &'a TokenDigest = &token.digest;
    let owner = PRESENTED
        .filter(PRESENTED.field(auth_tokens::type_).eq(type_))
        .filter(PRESENTED.field(auth_tokens::token).eq(digest))
        .select(PRESENTED.field(auth_tokens::user_id));
    users::table
        .filter(users::id.eq_any(owner))
        .filter(users::is_active)
        .select(users::id)
        .for_no_key_update()
}

/// Operations that use, replace or revoke tokens first lock the user (`FOR NO KEY UPDATE`) until
/// the transaction ends, so that they run one after another for each user.
///
/// SQL compares digests in a time that depends on their bytes. This reveals nothing to a client,
/// who lacks the key to choose digests.
impl AuthToken {
    /// Returns a page of the user's tokens of one type, newest first.
    pub fn list_by_user(
        conn: &mut PgConnection,
        user_id: UserId,
        type_: AuthTokenType,
        page: Page<AuthTokenId>,
    ) -> QueryResult<Vec<Self>> {
        let tokens = auth_tokens::table
            .filter(auth_tokens::user_id.eq(user_id))
            .filter(auth_tokens::type_.eq(type_))
            .select(Self::as_select());
        newest_first!(tokens, auth_tokens, id, page).load(conn)
    }

    /// The token's position in [`list_by_user`](Self::list_by_user).
    #[must_use]
    pub fn cursor(&self) -> Cursor<AuthTokenId> {
        Cursor {
            created_at: self.created_at,
            id: self.id,
        }
    }

    /// Returns the token if it is neither used nor expired and its user is active. It stays live:
    /// use this for the refresh token of a session, and [`consume`](Self::consume) for a link.
    ///
    /// Codes are never found: their guesses must be counted by [`check_code`](Self::check_code).
    pub fn find_live(conn: &mut PgConnection, token: &HashedToken) -> QueryResult<Option<Self>> {
        use AuthTokenType::{EmailChangePending, EmailOtp};
        if matches!(token.type_, EmailOtp | EmailChangePending) {
            return Ok(None);
        }
        auth_tokens::table
            .inner_join(users::table)
            .filter(auth_tokens::type_.eq(token.type_))
            .filter(auth_tokens::token.eq(&token.digest))
            .filter(not(auth_tokens::is_used))
            .filter(auth_tokens::expires_at.gt(now))
            .filter(users::is_active)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Issues a token that expires after `lifetime`, by the database's clock; returns `None` if
    /// there is no such active user.
    ///
    /// It replaces the user's live token of its type, which counts as used then. Only refresh
    /// tokens replace none.
    ///
    /// # Errors
    /// `auth_tokens_expires_at_check` if `lifetime` is not positive. `auth_tokens_token_key` if the
    /// digest of a link or refresh token exists: its secret was not random.
    pub fn issue(
        conn: &mut PgConnection,
        user_id: UserId,
        token: &HashedToken,
        lifetime: TimeDelta,
    ) -> QueryResult<Option<Self>> {
        conn.transaction(|conn| {
            let active = users::table
                .find(user_id)
                .filter(users::is_active)
                .select(users::id)
                .for_no_key_update();
            if active.first::<UserId>(conn).optional()?.is_none() {
                return Ok(None);
            }
            if token.type_ != AuthTokenType::Refresh {
                diesel::update(auth_tokens::table)
                    .filter(auth_tokens::user_id.eq(user_id))
                    .filter(auth_tokens::type_.eq(token.type_))
                    .filter(not(auth_tokens::is_used))
                    .set(auth_tokens::is_used.eq(true))
                    .execute(conn)?;
            }
            Self::insert_live(conn, user_id, token, lifetime).map(Some)
        })
    }

    fn insert_live(
        conn: &mut PgConnection,
        user_id: UserId,
        token: &HashedToken,
        lifetime: TimeDelta,
    ) -> QueryResult<Self> {
        let expires_at = sql::<Timestamptz>("now() + ").bind::<Interval, _>(lifetime);
        diesel::insert_into(auth_tokens::table)
            .values((
                auth_tokens::id.eq(AuthTokenId::new()),
                auth_tokens::user_id.eq(user_id),
                auth_tokens::type_.eq(token.type_),
                auth_tokens::token.eq(&token.digest),
                auth_tokens::expires_at.eq(expires_at),
            ))
            .returning(Self::as_returning())
            .get_result(conn)
    }

    /// Consumes the token of a link (`password_reset` or `email_verification`) and returns it. Of
    /// several concurrent calls, one succeeds.
    ///
    /// Tokens of other types are not found. One statement; a second one finds the reason of a
    /// refusal. If the caller's transaction rolls back, the token stays live.
    ///
    /// # Errors
    /// [`TokenError::Expired`], [`TokenError::Used`] and [`TokenError::NotFound`], after which the
    /// caller's transaction can go on.
    pub fn consume(conn: &mut PgConnection, token: &HashedToken) -> Result<Self, TokenError> {
        use AuthTokenType::{EmailVerification, PasswordReset};
        if !matches!(token.type_, PasswordReset | EmailVerification) {
            return Err(TokenError::NotFound);
        }
        if let Some(row) = Self::use_up(conn, token)? {
            return Ok(row);
        }
        let state = auth_tokens::table
            .filter(auth_tokens::type_.eq(token.type_))
            .filter(auth_tokens::token.eq(&token.digest))
            .inner_join(users::table)
            .filter(users::is_active)
            .select((auth_tokens::is_used, auth_tokens::expires_at.le(now)))
            .first(conn)
            .optional()?;
        Err(match state {
            Some((true, _)) => TokenError::Used,
            Some((false, true)) => TokenError::Expired,
            // Live: its user has become active since.
            Some((false, false)) | None => TokenError::NotFound,
        })
    }

    /// Marks a live token as used.
    fn use_up(conn: &mut PgConnection, token: &HashedToken) -> QueryResult<Option<Self>> {
        diesel::update(auth_tokens::table)
            .filter(auth_tokens::type_.eq(token.type_))
            .filter(auth_tokens::token.eq(&token.digest))
            .filter(not(auth_tokens::is_used))
            .filter(auth_tokens::expires_at.gt(now))
            .filter(
                auth_tokens::user_id
                    .nullable()
                    .eq(lock_owner(token).single_value()),
            )
            .set(auth_tokens::is_used.eq(true))
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()
    }

    /// Compares a guess with the user's live code (`email_otp` or `email_change_pending`; other
    /// types are not found). At most [`MAX_CODE_ATTEMPTS`] guesses are compared, also concurrent
    /// ones.
    ///
    /// **Commit after a wrong guess**: a rollback takes back the count. This is why outcomes are
    /// not errors. One statement; a second one finds the reason of a refusal.
    ///
    /// Limit new codes by [`count_issued_since`](Self::count_issued_since): each has new attempts.
    /// If no account has the email address, answer as for [`CodeCheck::Wrong`].
    pub fn check_code(
        conn: &mut PgConnection,
        user_id: UserId,
        guess: &HashedToken,
    ) -> QueryResult<CodeCheck> {
        use AuthTokenType::{EmailChangePending, EmailOtp};
        if !matches!(guess.type_, EmailOtp | EmailChangePending) {
            return Ok(CodeCheck::NotFound);
        }
        let active = users::table
            .find(user_id)
            .filter(users::is_active)
            .select(users::id)
            .for_no_key_update();
        let right = || auth_tokens::token.eq(&guess.digest);
        let wrong = case_when(right(), 0_i16.into_sql::<SmallInt>())
            .otherwise(1_i16.into_sql::<SmallInt>());
        let compared = diesel::update(auth_tokens::table)
            .filter(auth_tokens::user_id.nullable().eq(active.single_value()))
            .filter(auth_tokens::type_.eq(guess.type_))
            .filter(not(auth_tokens::is_used))
            .filter(auth_tokens::expires_at.gt(now))
            .filter(auth_tokens::attempts.lt(MAX_CODE_ATTEMPTS))
            .set((
                auth_tokens::is_used.eq(right()),
                auth_tokens::attempts.eq(auth_tokens::attempts + wrong),
            ))
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()?;
        if let Some(token) = compared {
            return Ok(if token.is_used {
                CodeCheck::Right(token)
            } else {
                CodeCheck::Wrong {
                    attempts_left: MAX_CODE_ATTEMPTS - token.attempts,
                }
            });
        }
        let newest = auth_tokens::table
            .filter(auth_tokens::user_id.eq(user_id))
            .filter(auth_tokens::type_.eq(guess.type_))
            .inner_join(users::table)
            .filter(users::is_active)
            .order((auth_tokens::is_used, auth_tokens::created_at.desc()))
            .select((
                auth_tokens::is_used,
                auth_tokens::expires_at.le(now),
                auth_tokens::attempts.ge(MAX_CODE_ATTEMPTS),
            ))
            .first(conn)
            .optional()?;
        Ok(match newest {
            Some((true, _, _)) => CodeCheck::Used,
            Some((_, true, _)) => CodeCheck::Expired,
            Some((_, _, true)) => CodeCheck::TooManyAttempts,
            // Live: issued since.
            Some((false, false, false)) | None => CodeCheck::NotFound,
        })
    }

    /// Replaces the presented refresh token by `successor`, which expires after `lifetime`. Tokens
    /// of other types are not found.
    ///
    /// A token that is presented a second time counts as stolen: all refresh tokens of the user are
    /// revoked, and each device must sign in again. After that the token counts as expired. This
    /// includes concurrent calls, so a client must not repeat a refresh whose response was lost,
    /// and browser tabs must share one.
    ///
    /// **Commit after [`Rotation::Reused`]**: a rollback takes back the revocation. This is why it
    /// is not an error.
    ///
    /// # Errors
    /// Those of [`issue`](Self::issue), about the successor.
    pub fn rotate(
        conn: &mut PgConnection,
        presented: &HashedToken,
        successor: &HashedToken,
        lifetime: TimeDelta,
    ) -> QueryResult<Rotation> {
        use AuthTokenType::Refresh;
        if [presented, successor]
            .iter()
            .any(|token| token.type_ != Refresh)
        {
            return Ok(Rotation::NotFound);
        }
        conn.transaction(|conn| {
            let Some(user_id) = lock_owner(presented).first(conn).optional()? else {
                return Ok(Rotation::NotFound);
            };
            if Self::use_up(conn, presented)?.is_some() {
                return Self::insert_live(conn, user_id, successor, lifetime)
                    .map(Rotation::Rotated);
            }
            let alive = auth_tokens::table
                .filter(auth_tokens::type_.eq(Refresh))
                .filter(auth_tokens::token.eq(&presented.digest))
                // The `now` of a transaction that waited for a revocation is before it.
                .filter(auth_tokens::expires_at.gt(clock_timestamp()));
            if !diesel::select(exists(alive)).get_result(conn)? {
                return Ok(Rotation::Expired);
            }
            Self::revoke_all(conn, user_id, Some(&[Refresh]))?;
            Ok(Rotation::Reused(user_id))
        })
    }

    /// Revokes a live token of an active user, for example when a device signs out; returns whether
    /// there was one. Presenting it later is not a reuse. One statement.
    pub fn revoke(conn: &mut PgConnection, token: &HashedToken) -> QueryResult<bool> {
        diesel::update(auth_tokens::table)
            .filter(auth_tokens::type_.eq(token.type_))
            .filter(auth_tokens::token.eq(&token.digest))
            .filter(not(auth_tokens::is_used))
            .filter(auth_tokens::expires_at.gt(now))
            .filter(
                auth_tokens::user_id
                    .nullable()
                    .eq(lock_owner(token).single_value()),
            )
            .set((
                auth_tokens::is_used.eq(true),
                auth_tokens::expires_at.eq(clock_timestamp()),
            ))
            .execute(conn)
            .map(|revoked| revoked == 1)
    }

    /// Revokes the user's tokens of the types in `only` (`None`: all types). Presenting a refresh
    /// token later, also a used one, is not a reuse.
    pub fn revoke_all(
        conn: &mut PgConnection,
        user_id: UserId,
        only: Option<&[AuthTokenType]>,
    ) -> QueryResult<()> {
        conn.transaction(|conn| {
            let user = users::table.find(user_id).select(users::id);
            user.for_no_key_update().execute(conn)?;
            let mut update = diesel::update(auth_tokens::table)
                .filter(auth_tokens::user_id.eq(user_id))
                .filter(auth_tokens::expires_at.gt(now))
                .set((
                    auth_tokens::is_used.eq(true),
                    auth_tokens::expires_at.eq(clock_timestamp()),
                ))
                .into_boxed();
            if let Some(types) = only {
                update = update.filter(auth_tokens::type_.eq_any(types));
            }
            update.execute(conn)?;
            Ok(())
        })
    }

    /// Returns how many tokens of a type the user was issued since `since`, live or not.
    ///
    /// To enforce a limit on mails against concurrent requests, issue first, then count in the same
    /// transaction, and roll back if the limit is exceeded.
    pub fn count_issued_since(
        conn: &mut PgConnection,
        user_id: UserId,
        type_: AuthTokenType,
        since: DateTime<Utc>,
    ) -> QueryResult<i64> {
        auth_tokens::table
            .filter(auth_tokens::user_id.eq(user_id))
            .filter(auth_tokens::type_.eq(type_))
            .filter(auth_tokens::created_at.ge(since))
            .count()
            .get_result(conn)
    }

    /// Deletes up to `limit` tokens that expired at least `keep` ago, oldest first, and returns how
    /// many. Call it until that is less than `limit`.
    ///
    /// `keep` must be at least the period of [`count_issued_since`](Self::count_issued_since).
    /// Several workers can run it: locked rows are skipped.
    pub fn purge(conn: &mut PgConnection, keep: TimeDelta, limit: u16) -> QueryResult<usize> {
        // Not the DSL: only a materialized CTE is evaluated exactly once.
        diesel::sql_query(
            "WITH old AS MATERIALIZED (
                 SELECT id
                   FROM auth_tokens
                  WHERE expires_at <= now() - $1
                  ORDER BY expires_at
                  LIMIT $2
                    FOR UPDATE SKIP LOCKED
             )
             DELETE FROM auth_tokens USING old WHERE auth_tokens.id = old.id",
        )
        .bind::<Interval, _>(keep)
        .bind::<BigInt, _>(i64::from(limit))
        .execute(conn)
    }
}
