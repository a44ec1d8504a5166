//! Auth tokens: one-time codes, links and refresh tokens, as digests.

use chrono::{DateTime, TimeDelta, Utc};
use diesel::dsl::{case_when, exists, not, now, sql};
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::sql_types::{BigInt, Interval, SmallInt, Timestamptz};
use serde::Serialize;

use crate::enums::AuthTokenType;
use crate::ids::{AuthTokenId, UserId};
use crate::models::User;
use crate::schema::{auth_tokens, users};
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

/// How many guesses at a code are compared. After as many wrong ones it is worth nothing, even to who has it.
pub const MAX_CODE_ATTEMPTS: i16 = 5;

/// Why [`AuthToken::consume`] didn't.
#[derive(Debug, thiserror::Error)]
pub enum ConsumeError {
    /// It came too late.
    #[error("the token has expired")]
    Expired,
    /// It was consumed, replaced or revoked before.
    #[error("the token was used before")]
    Used,
    /// There is no such token, or its user is not active.
    #[error("there is no such token")]
    Unknown,
    /// Anything else.
    #[error("database error")]
    Database(#[from] diesel::result::Error),
}

/// What [`AuthToken::check_code`] found. None of it tells whether a guess would have been right, but for the first two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CodeCheck {
    /// The right code, which is consumed by that.
    Right(AuthToken),
    /// A wrong guess, which was counted.
    Wrong {
        /// Guesses that are left; with 0, this was the last.
        attempts_left: i16,
    },
    /// There were [`MAX_CODE_ATTEMPTS`] wrong guesses before; this one was not looked at.
    TooManyAttempts,
    /// The newest code has expired.
    Expired,
    /// The newest code was consumed or revoked.
    Used,
    /// There was never a code, or the user is not active.
    Unknown,
}

/// What [`AuthToken::rotate`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rotation {
    /// The token is used and this one takes its place.
    Rotated(AuthToken),
    /// The token was used before: somebody has a copy. All refresh tokens of this user are revoked.
    Reused(UserId),
    /// The token has expired or was revoked.
    Expired,
    /// There is no such token, or its user is not active.
    Unknown,
}

diesel::define_sql_function! {
    /// Unlike `now`, goes on within a transaction.
    fn clock_timestamp() -> Timestamptz;
}

// Diesel can't tell a table from itself in a subquery.
diesel::alias!(const PRESENTED: Alias<Presented> = auth_tokens as presented);

/// The owner of a token, if active, as a subquery that locks the row. PostgreSQL runs it once, before the statement
/// around it locks the token.
#[diesel::dsl::auto_type]
fn lock_owner<'a>(type_: AuthTokenType, digest: &'a TokenDigest) -> _ {
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

/// Tokens are rows of one user. Whatever uses, replaces or revokes them locks the row of `users` first
/// (`FOR NO KEY UPDATE`), so that operations on the tokens of one user go one after the other, without deadlocks, and
/// those of different users don't wait for each other. A transaction that does more comes here last.
///
/// The digests are keyed, so it does no harm that SQL compares them in a time that depends on them: nobody without the
/// key can make a digest that begins like another.
impl AuthToken {
    /// Inserts a row and returns it with its defaults. [`issue`](Self::issue) also looks after the token that the row
    /// replaces, and whether the user is active.
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

    /// The live token of this digest: neither used nor expired, of an active user. Leaves it live, so for a refresh token that
    /// stands for a session; a link's token is [consumed](Self::consume).
    ///
    /// Not for codes, whose digests may repeat and whose guesses must be counted: there is none of those here.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find_live(
        conn: &mut PgConnection,
        type_: AuthTokenType,
        digest: &TokenDigest,
    ) -> QueryResult<Option<Self>> {
        use AuthTokenType::{EmailChangePending, EmailOtp};
        if matches!(type_, EmailOtp | EmailChangePending) {
            return Ok(None);
        }
        auth_tokens::table
            .inner_join(users::table)
            .filter(auth_tokens::type_.eq(type_))
            .filter(auth_tokens::token.eq(digest))
            .filter(not(auth_tokens::is_used))
            .filter(auth_tokens::expires_at.gt(now))
            .filter(users::is_active)
            .select(Self::as_select())
            .first(conn)
            .optional()
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

    /// Issues a token that lives for `lifetime` from now on, by the database's clock. The live token of the same user
    /// and type, if there is one, is replaced: it counts as used from then on. Refresh tokens stand beside each other.
    ///
    /// `None`: there is no such user, or not an active one.
    ///
    /// Runs in a transaction, or a savepoint of the caller's, and locks the user's row until the transaction ends.
    ///
    /// # Errors
    /// `auth_tokens_expires_at_check`, where `lifetime` is not above zero; `auth_tokens_token_key`, where a link's or
    /// refresh token's digest was there before: its secret wasn't random.
    pub fn issue(
        conn: &mut PgConnection,
        user_id: UserId,
        type_: AuthTokenType,
        digest: &TokenDigest,
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
            if type_ != AuthTokenType::Refresh {
                diesel::update(auth_tokens::table)
                    .filter(auth_tokens::user_id.eq(user_id))
                    .filter(auth_tokens::type_.eq(type_))
                    .filter(not(auth_tokens::is_used))
                    .set(auth_tokens::is_used.eq(true))
                    .execute(conn)?;
            }
            Self::insert_live(conn, user_id, type_, digest, lifetime).map(Some)
        })
    }

    fn insert_live(
        conn: &mut PgConnection,
        user_id: UserId,
        type_: AuthTokenType,
        digest: &TokenDigest,
        lifetime: TimeDelta,
    ) -> QueryResult<Self> {
        let expires_at = sql::<Timestamptz>("now() + ").bind::<Interval, _>(lifetime);
        diesel::insert_into(auth_tokens::table)
            .values((
                auth_tokens::id.eq(AuthTokenId::new()),
                auth_tokens::user_id.eq(user_id),
                auth_tokens::type_.eq(type_),
                auth_tokens::token.eq(digest),
                auth_tokens::expires_at.eq(expires_at),
            ))
            .returning(Self::as_returning())
            .get_result(conn)
    }

    /// Consumes the token of a link (`password_reset` or `email_verification`) and returns it: to one caller, whoever
    /// else presents it at the same time. Tokens of other types are unknown here: guesses at a code must be counted,
    /// and a refresh token has a successor.
    ///
    /// One statement. Only where it finds nothing, a second one looks why. Locks the user's row. As part of a
    /// transaction, the token is only used if that commits.
    ///
    /// # Errors
    /// [`ConsumeError::Expired`], [`Used`](ConsumeError::Used), [`Unknown`](ConsumeError::Unknown); none of them aborts
    /// the caller's transaction.
    pub fn consume(
        conn: &mut PgConnection,
        type_: AuthTokenType,
        digest: &TokenDigest,
    ) -> Result<Self, ConsumeError> {
        use AuthTokenType::{EmailVerification, PasswordReset};
        if !matches!(type_, PasswordReset | EmailVerification) {
            return Err(ConsumeError::Unknown);
        }
        if let Some(token) = Self::take(conn, type_, digest)? {
            return Ok(token);
        }
        let state = auth_tokens::table
            .filter(auth_tokens::type_.eq(type_))
            .filter(auth_tokens::token.eq(digest))
            .inner_join(users::table)
            .filter(users::is_active)
            .select((auth_tokens::is_used, auth_tokens::expires_at.le(now)))
            .first(conn)
            .optional()?;
        Err(match state {
            Some((true, _)) => ConsumeError::Used,
            Some((false, true)) => ConsumeError::Expired,
            // Neither: its user has become active since.
            Some((false, false)) | None => ConsumeError::Unknown,
        })
    }

    /// The live token of this digest, used from now on.
    fn take(
        conn: &mut PgConnection,
        type_: AuthTokenType,
        digest: &TokenDigest,
    ) -> QueryResult<Option<Self>> {
        diesel::update(auth_tokens::table)
            .filter(auth_tokens::type_.eq(type_))
            .filter(auth_tokens::token.eq(digest))
            .filter(not(auth_tokens::is_used))
            .filter(auth_tokens::expires_at.gt(now))
            .filter(
                auth_tokens::user_id
                    .nullable()
                    .eq(lock_owner(type_, digest).single_value()),
            )
            .set(auth_tokens::is_used.eq(true))
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()
    }

    /// Compares a guess with the user's live code (`email_otp` or `email_change_pending`; other types are unknown
    /// here): the right one consumes it, a wrong one is counted, in one statement. Where it finds no code to compare
    /// with, a second one looks why. However many guess at the same time, [`MAX_CODE_ATTEMPTS`] are compared at most.
    ///
    /// The outcomes are not errors, as an error that rolls back the caller's transaction would also take back the
    /// count: **commit after a wrong guess.**
    ///
    /// Locks the user's row. A new code has new attempts; [`count_issued_since`](Self::count_issued_since) limits
    /// those. Where no account has the address, answer as for [`CodeCheck::Wrong`].
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn check_code(
        conn: &mut PgConnection,
        user_id: UserId,
        type_: AuthTokenType,
        digest: &TokenDigest,
    ) -> QueryResult<CodeCheck> {
        use AuthTokenType::{EmailChangePending, EmailOtp};
        if !matches!(type_, EmailOtp | EmailChangePending) {
            return Ok(CodeCheck::Unknown);
        }
        let active = users::table
            .find(user_id)
            .filter(users::is_active)
            .select(users::id)
            .for_no_key_update();
        let wrong = case_when(auth_tokens::token.eq(digest), 0_i16.into_sql::<SmallInt>())
            .otherwise(1_i16.into_sql::<SmallInt>());
        let compared = diesel::update(auth_tokens::table)
            .filter(auth_tokens::user_id.nullable().eq(active.single_value()))
            .filter(auth_tokens::type_.eq(type_))
            .filter(not(auth_tokens::is_used))
            .filter(auth_tokens::expires_at.gt(now))
            .filter(auth_tokens::attempts.lt(MAX_CODE_ATTEMPTS))
            .set((
                auth_tokens::is_used.eq(auth_tokens::token.eq(digest)),
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
            .filter(auth_tokens::type_.eq(type_))
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
            // None of it: issued since.
            Some((false, false, false)) | None => CodeCheck::Unknown,
        })
    }

    /// Puts a new refresh token, which lives for `lifetime` from now on, in the place of the one presented.
    ///
    /// A token that was used before is taken for stolen: the thief or the user presents it a second time, and nobody
    /// knows who has its successor. All refresh tokens of the user are revoked, and each device signs in again. A token
    /// raises that alarm once; after it, it counts as expired.
    ///
    /// The same token presented twice at a time is no different: one call wins and the other revokes what the first
    /// just got. So a client must not repeat a refresh whose answer was lost, nor run two at once (tabs of a browser
    /// share one): its user signs in again.
    ///
    /// [`Rotation::Reused`] is no error, as an error that rolls back the caller's transaction would also take back the
    /// revocation: **commit after it.** Runs in a transaction, or a savepoint of the caller's, and locks the user's row
    /// until the transaction ends.
    ///
    /// # Errors
    /// Those of [`issue`](Self::issue) about the new token.
    pub fn rotate(
        conn: &mut PgConnection,
        presented: &TokenDigest,
        successor: &TokenDigest,
        lifetime: TimeDelta,
    ) -> QueryResult<Rotation> {
        let type_ = AuthTokenType::Refresh;
        conn.transaction(|conn| {
            let owner = lock_owner(type_, presented);
            let Some(user_id) = owner.first(conn).optional()? else {
                return Ok(Rotation::Unknown);
            };
            if Self::take(conn, type_, presented)?.is_some() {
                return Self::insert_live(conn, user_id, type_, successor, lifetime)
                    .map(Rotation::Rotated);
            }
            let alive = auth_tokens::table
                .filter(auth_tokens::type_.eq(type_))
                .filter(auth_tokens::token.eq(presented))
                // By its `now`, a transaction that waited for a revocation comes before it.
                .filter(auth_tokens::expires_at.gt(clock_timestamp()));
            if !diesel::select(exists(alive)).get_result(conn)? {
                return Ok(Rotation::Expired);
            }
            Self::revoke_all(conn, user_id, Some(&[type_]))?;
            Ok(Rotation::Reused(user_id))
        })
    }

    /// Revokes one live token of an active user, such as the refresh token of the device that signs out; says whether
    /// there was one. It ends at once, so presenting it later is no reuse.
    ///
    /// One statement; locks the user's row.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn revoke(
        conn: &mut PgConnection,
        type_: AuthTokenType,
        digest: &TokenDigest,
    ) -> QueryResult<bool> {
        diesel::update(auth_tokens::table)
            .filter(auth_tokens::type_.eq(type_))
            .filter(auth_tokens::token.eq(digest))
            .filter(not(auth_tokens::is_used))
            .filter(auth_tokens::expires_at.gt(now))
            .filter(
                auth_tokens::user_id
                    .nullable()
                    .eq(lock_owner(type_, digest).single_value()),
            )
            .set((
                auth_tokens::is_used.eq(true),
                auth_tokens::expires_at.eq(clock_timestamp()),
            ))
            .execute(conn)
            .map(|revoked| revoked == 1)
    }

    /// Revokes the tokens of a user, those of the types in `only` (`None`: all). They end at once, the refresh tokens
    /// that were used among them: what they led to is revoked, so presenting one later is no reuse.
    ///
    /// Runs in a transaction, or a savepoint of the caller's, and locks the user's row until the transaction ends: a
    /// token issued meanwhile comes before and is revoked, or after and stays.
    ///
    /// # Errors
    /// Only those of the connection.
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

    /// How many tokens of a type were issued to a user from a moment on, live or not: to limit how often mail is sent.
    /// The moment is the caller's, and compared with the database's clock.
    ///
    /// To hold the limit against parallel requests, issue first, count after, in one transaction, and roll back where
    /// it is one too many: others that issue for the same user wait meanwhile.
    ///
    /// # Errors
    /// Only those of the connection.
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

    /// Deletes tokens that expired `keep` ago or earlier, oldest first, `limit` at most; says how many. Call it again
    /// until it is fewer than `limit`.
    ///
    /// `keep` must be as long as the time over which [`count_issued_since`](Self::count_issued_since) counts. Used
    /// refresh tokens stay until they expire, so that their reuse is detected.
    ///
    /// Several at a time share the work: each leaves alone what another has locked.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn purge_expired(
        conn: &mut PgConnection,
        keep: TimeDelta,
        limit: i64,
    ) -> QueryResult<usize> {
        // Not the DSL: only a materialized CTE is sure to be evaluated once, whatever the plan.
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
        .bind::<BigInt, _>(limit)
        .execute(conn)
    }
}
