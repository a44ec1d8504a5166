//! Accounts that block an address nobody proved.

use chrono::TimeDelta;
use diesel::dsl::{exists, not, sql};
use diesel::prelude::*;
use diesel::sql_types::{Interval, Timestamptz};

use super::{User, canonical_email};
use crate::error::NegativeSpan;
use crate::ids::UserId;
use crate::schema::{account_credits, subscription_transactions, user_subscriptions, users};

/// The outcome of [`User::release_unverified`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// The address is free. The account that had it is anonymised.
    Released(UserId),
    /// No account has the address.
    Free,
    /// The account keeps the address.
    Kept,
}

impl User {
    /// Frees the address of an account that never proved it, so that its owner can sign up: it
    /// [anonymises](Self::anonymise) the account.
    ///
    /// The account keeps the address if it was verified, ever signed in
    /// ([`record_login`](Self::record_login)), was deactivated, is a customer at Razorpay, has
    /// financial rows, or was created or changed less than `unchanged_for` ago.
    ///
    /// Call it after [`UserError::EmailTaken`](super::UserError::EmailTaken):
    ///
    /// ```no_run
    /// # use bruhmcp_db::models::{NewUser, Release, User, UserError};
    /// # use chrono::TimeDelta;
    /// # use diesel::prelude::*;
    /// fn sign_up(conn: &mut PgConnection, new: &NewUser<'_>) -> Result<User, UserError> {
    ///     match User::sign_up(conn, new) {
    ///         Err(UserError::EmailTaken) => conn.transaction(|conn| {
    ///             match User::release_unverified(conn, new.email, TimeDelta::hours(24))? {
    ///                 Release::Kept => Err(UserError::EmailTaken),
    ///                 Release::Released(_) | Release::Free => User::sign_up(conn, new),
    ///             }
    ///         }),
    ///         outcome => outcome,
    ///     }
    /// }
    /// ```
    ///
    /// Locks as [`anonymise`](Self::anonymise).
    ///
    /// # Errors
    /// [`NegativeSpan`].
    pub fn release_unverified(
        conn: &mut PgConnection,
        email: &str,
        unchanged_for: TimeDelta,
    ) -> QueryResult<Release> {
        NegativeSpan::check(unchanged_for)?;
        let Ok(email) = canonical_email(email) else {
            return Ok(Release::Free);
        };
        conn.transaction(|conn| {
            let owner = users::table
                .filter(users::email.eq(&email))
                .select(users::id)
                .first(conn)
                .optional()?;
            let Some(id) = owner else {
                return Ok(Release::Free);
            };
            // Nobody can add a financial row while the user is locked.
            Self::lock(conn, id)?;
            let before = sql::<Timestamptz>("now() - ").bind::<Interval, _>(unchanged_for);
            let unproven = users::table
                .find(id)
                .filter(users::email.eq(&email))
                .filter(not(users::email_verified))
                .filter(users::is_active)
                .filter(users::last_login_at.is_null())
                .filter(users::razorpay_customer_id.is_null())
                .filter(users::updated_at.le(before))
                .filter(not(exists(
                    user_subscriptions::table.filter(user_subscriptions::user_id.eq(id)),
                )))
                .filter(not(exists(
                    subscription_transactions::table
                        .filter(subscription_transactions::user_id.eq(id)),
                )))
                .filter(not(exists(
                    account_credits::table.filter(account_credits::user_id.eq(id)),
                )));
            if !diesel::select(exists(unproven)).get_result(conn)? {
                return Ok(Release::Kept);
            }
            Self::anonymise(conn, id)?;
            Ok(Release::Released(id))
        })
    }
}
