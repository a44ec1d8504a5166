//! Sessions: families of refresh tokens.

use chrono::{DateTime, TimeDelta, Utc};
use diesel::dsl::{max, not, now, sql};
use diesel::prelude::*;
use diesel::sql_types::{Interval, Timestamptz};
use serde::Serialize;

use super::{AuthToken, IssueError, check_lifetime, is_of, lock_owner};
use crate::enums::AuthTokenType::Refresh;
use crate::ids::{FamilyId, UserId};
use crate::prepared::Prepare;
use crate::schema::{auth_tokens, users};
use crate::secret::HashedToken;

/// For this long after its use, a refresh token that is presented again gets another successor:
/// two tabs of a browser renewed at once, or the answer was lost.
pub const REUSE_LEEWAY: TimeDelta = TimeDelta::seconds(10);

/// The number of live sessions a user can have. One more ends the one that was renewed least
/// recently.
pub const MAX_SESSIONS: usize = 50;

/// A live session: one sign-in, for example of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Queryable)]
pub struct Session {
    /// Its key, for [`AuthToken::end_session`].
    pub family_id: FamilyId,
    /// When it ends at the latest.
    pub session_expires_at: DateTime<Utc>,
    /// When its newest live token was issued.
    pub renewed_at: DateTime<Utc>,
    /// When it ends if it is not renewed.
    pub expires_at: DateTime<Utc>,
}

/// The outcome of [`AuthToken::rotate`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rotation {
    /// This is the successor.
    Rotated(AuthToken),
    /// The token was used more than [`REUSE_LEEWAY`] ago: its session is revoked.
    Reused {
        /// The owner.
        user_id: UserId,
        /// The session that ended.
        family_id: FamilyId,
    },
    /// The token has expired, or its session has ended or was revoked.
    Expired,
    /// There is no such refresh token, or its user is not active.
    NotFound,
}

/// A session is revoked exactly when each of its tokens is used.
impl AuthToken {
    /// Begins a session with its first refresh token; returns `None` if there is no such active
    /// user. The token expires after `lifetime`, and the session after `session_lifetime`, however
    /// often the token is [replaced](Self::rotate).
    ///
    /// If the user has [`MAX_SESSIONS`], the one that was renewed least recently ends. Five round
    /// trips, or six then.
    ///
    /// # Errors
    /// [`IssueError::Lifetime`] and [`IssueError::DigestTaken`], after which the caller's transaction
    /// can go on.
    pub fn begin_session(
        conn: &mut PgConnection,
        user_id: UserId,
        token: &HashedToken,
        lifetime: TimeDelta,
        session_lifetime: TimeDelta,
    ) -> Result<Option<Self>, IssueError> {
        if token.type_ != Refresh {
            return Ok(None);
        }
        check_lifetime(Refresh, lifetime)?;
        check_lifetime(Refresh, session_lifetime)?;
        conn.transaction(|conn| {
            let session_end = sql::<Timestamptz>("now() + ").bind::<Interval, _>(session_lifetime);
            let active = users::table
                .find(user_id)
                .filter(users::is_active)
                .select(session_end)
                .for_no_key_update()
                .prepared();
            let Some(session_end) = active.get_result(conn).optional()? else {
                return Ok(None);
            };
            let sessions = Self::list_sessions(conn, user_id)?;
            let excess = sessions.iter().skip(MAX_SESSIONS - 1);
            let excess: Vec<_> = excess.map(|session| session.family_id).collect();
            if !excess.is_empty() {
                Self::end_families(conn, &excess)?;
            }
            let session = (FamilyId(uuid::Uuid::now_v7()), session_end);
            Self::insert_live(conn, user_id, token, lifetime, Some(session)).map(Some)
        })
    }

    /// Returns the user's live sessions, the one renewed last first: at most [`MAX_SESSIONS`].
    pub fn list_sessions(conn: &mut PgConnection, user_id: UserId) -> QueryResult<Vec<Session>> {
        auth_tokens::table
            .filter(auth_tokens::user_id.eq(user_id))
            .filter(auth_tokens::type_.eq(Refresh))
            .filter(not(auth_tokens::is_used))
            .filter(auth_tokens::expires_at.gt(now))
            .group_by((auth_tokens::family_id, auth_tokens::session_expires_at))
            .order((
                max(auth_tokens::created_at).desc(),
                auth_tokens::family_id.desc(),
            ))
            .select((
                auth_tokens::family_id.assume_not_null(),
                auth_tokens::session_expires_at.assume_not_null(),
                max(auth_tokens::created_at).assume_not_null(),
                max(auth_tokens::expires_at).assume_not_null(),
            ))
            .load(conn)
    }

    /// Revokes a session of the user's, for example to sign out a device; returns whether it was
    /// live. Presenting one of its tokens later is not a reuse.
    pub fn end_session(
        conn: &mut PgConnection,
        user_id: UserId,
        family_id: FamilyId,
    ) -> QueryResult<bool> {
        conn.transaction(|conn| {
            let user = users::table.find(user_id).select(users::id);
            user.for_no_key_update().execute(conn)?;
            let of_user = auth_tokens::table
                .filter(auth_tokens::family_id.eq(family_id))
                .filter(auth_tokens::user_id.eq(user_id))
                .select(auth_tokens::family_id.assume_not_null());
            match of_user.first::<FamilyId>(conn).optional()? {
                Some(family) => Ok(Self::end_families(conn, &[family])? > 0),
                None => Ok(false),
            }
        })
    }

    /// Replaces the presented refresh token by `successor`, which expires after `lifetime`, or with
    /// the session if that is earlier. Tokens of other types are not found.
    ///
    /// A token that is presented again within [`REUSE_LEEWAY`] gets another successor in the same
    /// session. After that it counts as stolen: the session is revoked, and its device must sign in
    /// again. A token of a session that has ended is only expired. Six round trips.
    ///
    /// **Commit after [`Rotation::Reused`]**: a rollback takes back the revocation. This is why it
    /// is not an error.
    ///
    /// # Errors
    /// [`IssueError::Lifetime`] and [`IssueError::DigestTaken`], about the successor. The presented
    /// token stays live, and the caller's transaction can go on.
    pub fn rotate(
        conn: &mut PgConnection,
        presented: &HashedToken,
        successor: &HashedToken,
        lifetime: TimeDelta,
    ) -> Result<Rotation, IssueError> {
        if [presented, successor]
            .iter()
            .any(|token| token.type_ != Refresh)
        {
            return Ok(Rotation::NotFound);
        }
        check_lifetime(Refresh, lifetime)?;
        conn.transaction(|conn| {
            let owner = lock_owner(presented).prepared();
            let Some(user_id) = owner.get_result(conn).optional()? else {
                return Ok(Rotation::NotFound);
            };
            let first_use = Self::use_up(conn, presented)?.is_some();
            let leeway = sql::<Timestamptz>("now() - ").bind::<Interval, _>(REUSE_LEEWAY);
            let used = auth_tokens::table
                .filter(is_of("auth_tokens", Refresh))
                .filter(auth_tokens::token.eq(&presented.digest))
                .filter(auth_tokens::is_used)
                .select((
                    auth_tokens::family_id.assume_not_null(),
                    auth_tokens::session_expires_at.assume_not_null(),
                    auth_tokens::used_at.assume_not_null().gt(leeway),
                ))
                .prepared();
            let Some((family_id, session_end, recent)) = used
                .get_result::<(FamilyId, DateTime<Utc>, bool)>(conn)
                .optional()?
            else {
                return Ok(Rotation::Expired);
            };
            if !first_use && !recent {
                return Ok(match Self::end_families(conn, &[family_id])? {
                    0 => Rotation::Expired,
                    _ => Rotation::Reused { user_id, family_id },
                });
            }
            if !first_use && !Self::touch_family(conn, family_id)? {
                return Ok(Rotation::Expired);
            }
            Self::insert_live(
                conn,
                user_id,
                successor,
                lifetime,
                Some((family_id, session_end)),
            )
            .map(Rotation::Rotated)
        })
    }

    /// Marks the live tokens of sessions as used, and returns how many.
    pub(super) fn end_families(
        conn: &mut PgConnection,
        families: &[FamilyId],
    ) -> QueryResult<usize> {
        diesel::update(auth_tokens::table)
            .filter(auth_tokens::family_id.eq_any(families))
            .filter(not(auth_tokens::is_used))
            .filter(auth_tokens::expires_at.gt(now))
            .set((auth_tokens::is_used.eq(true), auth_tokens::used_at.eq(now)))
            .prepared()
            .execute(conn)
    }

    /// Writes the live tokens of a session as they are, and returns whether there are any. So a
    /// revocation with an older snapshot fails, instead of missing the token that is issued next.
    fn touch_family(conn: &mut PgConnection, family_id: FamilyId) -> QueryResult<bool> {
        diesel::update(auth_tokens::table)
            .filter(auth_tokens::family_id.eq(family_id))
            .filter(not(auth_tokens::is_used))
            .filter(auth_tokens::expires_at.gt(now))
            .set(auth_tokens::is_used.eq(false))
            .prepared()
            .execute(conn)
            .map(|live| live > 0)
    }
}
