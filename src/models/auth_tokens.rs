//! Auth tokens: one-time codes, links and refresh tokens, stored as digests.

mod row;
mod sessions;

use chrono::{DateTime, TimeDelta, Utc};
use diesel::connection::{AnsiTransactionManager, TransactionManager};
use diesel::dsl::{not, now, sql, sum};
use diesel::expression::SqlLiteral;
use diesel::prelude::*;
use diesel::result::Error;
use diesel::sql_types::{BigInt, Bool, Interval, Nullable, Timestamptz};

pub use self::row::AuthToken;
pub use self::sessions::{MAX_SESSIONS, REUSE_LEEWAY, Rotation, Session};
use crate::enums::AuthTokenType;
use crate::error::NegativeSpan;
use crate::ids::{AuthTokenId, FamilyId, UserId};
use crate::page::{Cursor, Page, newest_first};
use crate::prepared::Prepare;
use crate::schema::{auth_tokens, users};
use crate::secret::{HashedToken, TokenDigest};

/// The number of wrong guesses within [`CODE_WINDOW`] after which even the right code is rejected.
pub const MAX_CODE_ATTEMPTS: i16 = 5;

/// The number of codes or links of one type that a user is issued within [`CODE_WINDOW`].
pub const MAX_ISSUED: u16 = 5;

/// Wrong guesses at all codes of a user and type that were issued within this time count together,
/// and so do the codes and links themselves.
pub const CODE_WINDOW: TimeDelta = TimeDelta::hours(1);

/// Why a token was not issued. Nothing is changed then: a token that it would replace stays live.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IssueError {
    /// The user was issued [`MAX_ISSUED`] codes or links of this type within [`CODE_WINDOW`].
    #[error("too many were issued; the next one can be issued at {next_at}")]
    TooMany {
        /// When the next one can be issued, by the database's clock.
        next_at: DateTime<Utc>,
    },
    /// It is less than a microsecond, or over 1 hour for a code, 7 days for a link, or 365 days for
    /// a refresh token and its session. The database was not asked.
    #[error("a token of this type can't live for this long")]
    Lifetime,
    /// A link or refresh token has this digest (`auth_tokens_token_key`): its secret was not random.
    #[error("the digest exists: make a new secret")]
    DigestTaken,
    /// Any other database error.
    #[error("database error")]
    Database(#[from] Error),
}

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
    /// After [`MAX_CODE_ATTEMPTS`] wrong guesses, also at earlier codes, this one was not compared.
    TooManyAttempts,
    /// The newest code has expired.
    Expired,
    /// The newest code was consumed or revoked.
    Used,
    /// The user has no code, or is not active.
    NotFound,
}

// Diesel can't tell a table from itself in a subquery.
diesel::alias!(const PRESENTED: Alias<Presented> = auth_tokens as presented);

/// A literal, because a bind can't match the predicate of the index on digests in a generic plan.
fn is_of(table: &str, type_: AuthTokenType) -> SqlLiteral<Bool> {
    sql(&format!("{table}.type = '{type_}'"))
}

/// A subquery for the active owner of a token, which locks the user. PostgreSQL runs it once,
/// before the statement around it locks the token.
#[diesel::dsl::auto_type]
fn lock_owner<'a>(token: &'a HashedToken) -> _ {
    let is_presented: SqlLiteral<Bool> = is_of("presented", token.type_);
    let digest: &'a TokenDigest = &token.digest;
    let owner = PRESENTED
        .filter(is_presented)
        .filter(PRESENTED.field(auth_tokens::token).eq(digest))
        .select(PRESENTED.field(auth_tokens::user_id));
    users::table
        .filter(users::id.eq_any(owner))
        .filter(users::is_active)
        .select(users::id)
        .for_no_key_update()
}

/// Refuses what `auth_tokens_lifetime` would refuse: the server's log would then print the row.
fn check_lifetime(type_: AuthTokenType, lifetime: TimeDelta) -> Result<(), IssueError> {
    use AuthTokenType::{EmailChangePending, EmailOtp, EmailVerification, PasswordReset, Refresh};
    let longest = match type_ {
        EmailOtp | EmailChangePending => TimeDelta::hours(1),
        PasswordReset | EmailVerification => TimeDelta::days(7),
        Refresh => TimeDelta::days(365),
    };
    if lifetime < TimeDelta::microseconds(1) || lifetime > longest {
        return Err(IssueError::Lifetime);
    }
    Ok(())
}

/// Locks an active user, and returns whether there is one.
fn lock_active(conn: &mut PgConnection, user_id: UserId) -> QueryResult<bool> {
    let active = users::table
        .find(user_id)
        .filter(users::is_active)
        .select(users::id)
        .for_no_key_update();
    let locked = active.first::<UserId>(conn).optional()?;
    Ok(locked.is_some())
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
            .filter(is_of("auth_tokens", token.type_))
            .filter(auth_tokens::token.eq(&token.digest))
            .filter(not(auth_tokens::is_used))
            .filter(auth_tokens::expires_at.gt(now))
            .filter(users::is_active)
            .select(Self::as_select())
            .prepared()
            .get_result(conn)
            .optional()
    }

    /// Issues a token that expires after `lifetime`, by the database's clock; returns `None` if
    /// there is no such active user.
    ///
    /// It replaces the user's live token of its type, which counts as used then. Six round trips.
    /// A refresh token replaces none: it begins a session that ends with it, see
    /// [`begin_session`](Self::begin_session) for one that is renewed.
    ///
    /// Of [`MAX_ISSUED`] codes or links within [`CODE_WINDOW`] all count, also those that were
    /// consumed, replaced or revoked; the next one is refused, also among concurrent calls and at
    /// each isolation level. The latest one stays live until it expires, but whoever may ask for
    /// mails to an address can use the number up: limit requests by their sender as well.
    ///
    /// # Errors
    /// [`IssueError::TooMany`], [`IssueError::Lifetime`] and [`IssueError::DigestTaken`], after which
    /// the caller's transaction can go on.
    pub fn issue(
        conn: &mut PgConnection,
        user_id: UserId,
        token: &HashedToken,
        lifetime: TimeDelta,
    ) -> Result<Option<Self>, IssueError> {
        if token.type_ == AuthTokenType::Refresh {
            return Self::begin_session(conn, user_id, token, lifetime, lifetime);
        }
        check_lifetime(token.type_, lifetime)?;
        conn.transaction(|conn| {
            // Not a lock only: a transaction with an older snapshot would miss the tokens that were
            // issued since, and so fails.
            let active = diesel::update(users::table.find(user_id))
                .filter(users::is_active)
                .set(users::is_active.eq(true))
                .prepared()
                .execute(conn)?;
            if active == 0 {
                return Ok(None);
            }
            if let Some(next_at) = Self::next_issue(conn, user_id, token.type_)? {
                return Err(IssueError::TooMany { next_at });
            }
            diesel::update(auth_tokens::table)
                .filter(auth_tokens::user_id.eq(user_id))
                .filter(auth_tokens::type_.eq(token.type_))
                .filter(not(auth_tokens::is_used))
                .set((auth_tokens::is_used.eq(true), auth_tokens::used_at.eq(now)))
                .prepared()
                .execute(conn)?;
            Self::insert_live(conn, user_id, token, lifetime, None).map(Some)
        })
    }

    /// When the window has room for one more token of this type; `None` if it has now.
    fn next_issue(
        conn: &mut PgConnection,
        user_id: UserId,
        type_: AuthTokenType,
    ) -> QueryResult<Option<DateTime<Utc>>> {
        let window_start = sql::<Timestamptz>("now() - ").bind::<Interval, _>(CODE_WINDOW);
        let oldest_that_counts = auth_tokens::table
            .filter(auth_tokens::user_id.eq(user_id))
            .filter(auth_tokens::type_.eq(type_))
            .filter(auth_tokens::created_at.gt(window_start))
            .order(auth_tokens::created_at.desc())
            .offset(i64::from(MAX_ISSUED) - 1)
            .limit(1)
            .select(auth_tokens::created_at)
            .prepared()
            .get_result::<DateTime<Utc>>(conn)
            .optional()?;
        Ok(oldest_that_counts.map(|created_at| created_at + CODE_WINDOW))
    }

    /// Inserts a token; one of a session expires with it at the latest.
    fn insert_live(
        conn: &mut PgConnection,
        user_id: UserId,
        token: &HashedToken,
        lifetime: TimeDelta,
        session: Option<(FamilyId, DateTime<Utc>)>,
    ) -> Result<Self, IssueError> {
        let (family_id, session_expires_at) = session.unzip();
        // LEAST ignores NULL.
        let expires_at = sql::<Timestamptz>("LEAST(now() + ")
            .bind::<Interval, _>(lifetime)
            .sql(", ")
            .bind::<Nullable<Timestamptz>, _>(session_expires_at)
            .sql(")");
        diesel::insert_into(auth_tokens::table)
            .values((
                auth_tokens::id.eq(AuthTokenId::new()),
                auth_tokens::user_id.eq(user_id),
                auth_tokens::type_.eq(token.type_),
                auth_tokens::token.eq(&token.digest),
                auth_tokens::expires_at.eq(expires_at),
                auth_tokens::family_id.eq(family_id),
                auth_tokens::session_expires_at.eq(session_expires_at),
            ))
            // An error would make the server log the digest. Without a target, it is also the
            // snapshot's failure that is reported where a newer token of the user is live.
            .on_conflict_do_nothing()
            .returning(Self::as_returning())
            .prepared()
            .get_result(conn)
            .optional()?
            .ok_or(IssueError::DigestTaken)
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
            .filter(is_of("auth_tokens", token.type_))
            .filter(auth_tokens::token.eq(&token.digest))
            .inner_join(users::table)
            .filter(users::is_active)
            .select((auth_tokens::is_used, auth_tokens::expires_at.le(now)))
            .prepared()
            .get_result(conn)
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
            .filter(is_of("auth_tokens", token.type_))
            .filter(auth_tokens::token.eq(&token.digest))
            .filter(not(auth_tokens::is_used))
            .filter(auth_tokens::expires_at.gt(now))
            .filter(
                auth_tokens::user_id
                    .nullable()
                    .eq(lock_owner(token).single_value()),
            )
            .set((auth_tokens::is_used.eq(true), auth_tokens::used_at.eq(now)))
            .returning(Self::as_returning())
            .prepared()
            .get_result(conn)
            .optional()
    }

    /// Compares a guess with the user's live code (`email_otp` or `email_change_pending`; other
    /// types are not found). At most [`MAX_CODE_ATTEMPTS`] guesses within [`CODE_WINDOW`] are
    /// compared, also concurrent ones and those at replaced codes.
    ///
    /// A transaction of its own, five round trips, because a rollback would take back the count. If
    /// no account has the email address, answer as for [`CodeCheck::Wrong`].
    ///
    /// # Errors
    /// [`Error::AlreadyInTransaction`] inside a transaction of Diesel's; nothing was compared. One
    /// that was opened by the statement `BEGIN` can't be seen: don't.
    pub fn check_code(
        conn: &mut PgConnection,
        user_id: UserId,
        guess: &HashedToken,
    ) -> QueryResult<CodeCheck> {
        use AuthTokenType::{EmailChangePending, EmailOtp};
        if AnsiTransactionManager::transaction_manager_status_mut(conn)
            .transaction_depth()?
            .is_some()
        {
            return Err(Error::AlreadyInTransaction);
        }
        if !matches!(guess.type_, EmailOtp | EmailChangePending) {
            return Ok(CodeCheck::NotFound);
        }
        conn.transaction(|conn| {
            if !lock_active(conn, user_id)? {
                return Ok(CodeCheck::NotFound);
            }
            let window_start = sql::<Timestamptz>("now() - ").bind::<Interval, _>(CODE_WINDOW);
            let guessed = auth_tokens::table
                .filter(auth_tokens::user_id.eq(user_id))
                .filter(auth_tokens::type_.eq(guess.type_))
                .filter(auth_tokens::created_at.gt(window_start))
                .select(sum(auth_tokens::attempts))
                .prepared()
                .get_result::<Option<i64>>(conn)?
                .unwrap_or(0);
            let left = i64::from(MAX_CODE_ATTEMPTS) - guessed;
            let compared = match left {
                1.. => Self::compare(conn, user_id, guess)?,
                _ => None,
            };
            if let Some(token) = compared {
                return Ok(if token.is_used {
                    CodeCheck::Right(token)
                } else {
                    CodeCheck::Wrong {
                        attempts_left: i16::try_from(left - 1).unwrap_or_default(),
                    }
                });
            }
            let newest = auth_tokens::table
                .filter(auth_tokens::user_id.eq(user_id))
                .filter(auth_tokens::type_.eq(guess.type_))
                .order((auth_tokens::is_used, auth_tokens::created_at.desc()))
                .select((auth_tokens::is_used, auth_tokens::expires_at.le(now)))
                .first(conn)
                .optional()?;
            Ok(match newest {
                Some((true, _)) => CodeCheck::Used,
                Some((false, true)) => CodeCheck::Expired,
                Some((false, false)) => CodeCheck::TooManyAttempts,
                None => CodeCheck::NotFound,
            })
        })
    }

    /// Consumes the live code if the guess is right, and counts a wrong one.
    fn compare(
        conn: &mut PgConnection,
        user_id: UserId,
        guess: &HashedToken,
    ) -> QueryResult<Option<Self>> {
        let live = || {
            auth_tokens::table
                .filter(auth_tokens::user_id.eq(user_id))
                .filter(auth_tokens::type_.eq(guess.type_))
                .filter(not(auth_tokens::is_used))
                .filter(auth_tokens::expires_at.gt(now))
        };
        let right = diesel::update(live().filter(auth_tokens::token.eq(&guess.digest)))
            .set((auth_tokens::is_used.eq(true), auth_tokens::used_at.eq(now)))
            .returning(Self::as_returning())
            .prepared()
            .get_result(conn)
            .optional()?;
        if right.is_some() {
            return Ok(right);
        }
        diesel::update(live())
            .set(auth_tokens::attempts.eq(auth_tokens::attempts + 1))
            .returning(Self::as_returning())
            .prepared()
            .get_result(conn)
            .optional()
    }

    /// Revokes a live token of an active user; of a refresh token its session, as
    /// [`end_session`](Self::end_session) does, also if it was replaced since. Returns whether
    /// there was one. Of a refresh token, five round trips.
    pub fn revoke(conn: &mut PgConnection, token: &HashedToken) -> QueryResult<bool> {
        if token.type_ != AuthTokenType::Refresh {
            return Ok(Self::use_up(conn, token)?.is_some());
        }
        conn.transaction(|conn| {
            let owner = lock_owner(token).prepared();
            let owner = owner.get_result::<UserId>(conn).optional()?;
            let family = auth_tokens::table
                .filter(is_of("auth_tokens", token.type_))
                .filter(auth_tokens::token.eq(&token.digest))
                .select(auth_tokens::family_id.assume_not_null())
                .prepared();
            match (owner, family.get_result(conn).optional()?) {
                (Some(_), Some(family)) => Ok(Self::end_families(conn, &[family])? > 0),
                _ => Ok(false),
            }
        })
    }

    /// Revokes the user's tokens of the types in `only` (`None`: all types). Presenting a refresh
    /// token later, also a used one, is not a reuse. Four round trips.
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
                .filter(not(auth_tokens::is_used))
                .set((auth_tokens::is_used.eq(true), auth_tokens::used_at.eq(now)))
                .into_boxed();
            if let Some(types) = only {
                update = update.filter(auth_tokens::type_.eq_any(types));
            }
            update.prepared().execute(conn)?;
            Ok(())
        })
    }

    /// Returns how many tokens of a type the user was issued since `since`, live or not.
    ///
    /// [`issue`](Self::issue) keeps a limit itself. To enforce a stricter one, or one of a longer
    /// time, against concurrent requests, issue first, then count in the same transaction, and roll
    /// back if the limit is exceeded.
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
    /// Whatever `keep` is, tokens that were issued within [`CODE_WINDOW`] stay: their wrong guesses
    /// count, and so do they. `keep` must be at least the period of
    /// [`count_issued_since`](Self::count_issued_since). Several workers can run it: locked rows are
    /// skipped.
    ///
    /// # Errors
    /// [`NegativeSpan`].
    pub fn purge(conn: &mut PgConnection, keep: TimeDelta, limit: u16) -> QueryResult<usize> {
        NegativeSpan::check(keep)?;
        // Not the DSL: only a materialized CTE is evaluated exactly once.
        diesel::sql_query(
            "WITH old AS MATERIALIZED (
                 SELECT id
                   FROM auth_tokens
                  WHERE expires_at <= now() - $1
                    AND created_at <= now() - $3
                  ORDER BY expires_at
                  LIMIT $2
                    FOR UPDATE SKIP LOCKED
             )
             DELETE FROM auth_tokens USING old WHERE auth_tokens.id = old.id",
        )
        .bind::<Interval, _>(keep)
        .bind::<BigInt, _>(i64::from(limit))
        .bind::<Interval, _>(CODE_WINDOW)
        .execute(conn)
    }
}
