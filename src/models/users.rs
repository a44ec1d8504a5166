//! Users: people with an account.

mod anonymise;
mod export;

use chrono::{DateTime, Utc};
use diesel::dsl::now;
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::result::Error;
use serde::Serialize;

use crate::enums::AuthTokenType;
use crate::error::violates;
use crate::ids::UserId;
use crate::models::{AuthToken, UserPlan, found};
use crate::page::{Cursor, Page, newest_first};
use crate::schema::users;
use crate::secret::SecretText;

/// A row of `users`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable)]
#[diesel(table_name = users, check_for_backend(Pg))]
#[expect(missing_docs, reason = "the other fields explain themselves")]
pub struct User {
    pub id: UserId,
    /// 1 to 255 characters.
    pub first_name: String,
    /// At most 255 characters; may be empty.
    pub last_name: String,
    /// In the form that [`canonical_email`] returns; unique.
    pub email: String,
    /// A password hash (`$…`); `None` if the user signs in by other means.
    #[serde(skip_serializing)]
    pub password: Option<SecretText>,
    pub email_verified: bool,
    /// The customer at Razorpay; unique.
    pub razorpay_customer_id: Option<String>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
    pub last_login_at: Option<DateTime<Utc>>,
    /// Whether the user can sign in.
    pub is_active: bool,
}

/// Values of a new [`User`]; `None` uses the column's default.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = users, check_for_backend(Pg))]
#[expect(missing_docs, reason = "the fields are those of `User`")]
pub struct NewUser<'a> {
    pub id: Option<UserId>,
    pub first_name: &'a str,
    pub last_name: &'a str,
    /// In any spelling: [`User::sign_up`] makes it canonical.
    pub email: &'a str,
    pub password: Option<&'a SecretText>,
    pub email_verified: Option<bool>,
    pub razorpay_customer_id: Option<&'a str>,
    pub is_active: Option<bool>,
}

impl<'a> NewUser<'a> {
    /// Uses the defaults for all other columns.
    #[must_use]
    pub fn new(first_name: &'a str, last_name: &'a str, email: &'a str) -> Self {
        Self {
            id: None,
            first_name,
            last_name,
            email,
            password: None,
            email_verified: None,
            razorpay_customer_id: None,
            is_active: None,
        }
    }
}

/// Changes to a [`User`]: `None` keeps a column, `Some(None)` sets it to `NULL`.
///
/// The other columns have their own operations, such as [`User::change_email`].
#[derive(Debug, Clone, Default, AsChangeset)]
#[diesel(table_name = users)]
#[expect(missing_docs, reason = "the fields are those of `User`")]
pub struct UserChangeset<'a> {
    pub first_name: Option<&'a str>,
    pub last_name: Option<&'a str>,
    pub password: Option<Option<&'a SecretText>>,
    pub email_verified: Option<bool>,
    pub razorpay_customer_id: Option<Option<&'a str>>,
}

/// The domain of anonymised users' addresses: no mail arrives there (RFC 6761, 6.4), and sign-up
/// refuses it.
const ANONYMISED_DOMAIN: &str = "@anonymised.invalid";

/// The text is not an email address that an account can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an email address")]
pub struct InvalidEmail;

/// Why an account was not created or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages say it")]
pub enum UserError {
    #[error(transparent)]
    InvalidEmail(#[from] InvalidEmail),
    #[error("the email address is taken")]
    EmailTaken,
    #[error("database error")]
    Database(#[source] Error),
}

impl From<Error> for UserError {
    fn from(error: Error) -> Self {
        if violates(&error, "users_email_key") {
            Self::EmailTaken
        } else {
            Self::Database(error)
        }
    }
}

/// Returns the one spelling of an email address that is stored and looked up: trimmed and in
/// lowercase.
///
/// It accepts what the constraint `users_email_canonical` accepts: one `@` with text on both sides,
/// at most 255 characters. It also refuses Unicode white space inside, which the constraint sees
/// only in some locales, and NUL, which PostgreSQL can't store. It doesn't check that mail arrives.
///
/// ```
/// # use bruhmcp_db::models::{InvalidEmail, canonical_email};
/// assert_eq!(canonical_email(" Ada@Example.ORG\n"), Ok("ada@example.org".to_owned()));
/// assert_eq!(canonical_email("ada"), Err(InvalidEmail));
/// ```
///
/// # Errors
/// [`InvalidEmail`].
pub fn canonical_email(email: &str) -> Result<String, InvalidEmail> {
    let email = email.trim().to_lowercase();
    let (local, domain) = email.split_once('@').ok_or(InvalidEmail)?;
    let refused = |c: char| c.is_whitespace() || c == '\0';
    if local.is_empty()
        || domain.is_empty()
        || domain.contains('@')
        || email.contains(refused)
        || email.chars().count() > 255
    {
        return Err(InvalidEmail);
    }
    Ok(email)
}

/// Like [`canonical_email`], but refuses the addresses of anonymised users.
fn new_email(email: &str) -> Result<String, InvalidEmail> {
    let email = canonical_email(email)?;
    if email.ends_with(ANONYMISED_DOMAIN) {
        return Err(InvalidEmail);
    }
    Ok(email)
}

pub(super) fn anonymised_email(id: UserId) -> String {
    format!("{id}{ANONYMISED_DOMAIN}")
}

impl User {
    /// Creates an account; a trigger gives it the free plan.
    ///
    /// One statement. Concurrent sign-ups with one address wait for each other, and one succeeds.
    ///
    /// # Errors
    /// [`UserError::InvalidEmail`] and [`UserError::EmailTaken`], after which the caller's
    /// transaction can go on. A violated constraint on another column (`users_first_name_check`,
    /// `users_last_name_check`, `users_password_check`, `users_razorpay_customer_id_key`) is
    /// [`UserError::Database`] and aborts it.
    pub fn sign_up(conn: &mut PgConnection, new: &NewUser<'_>) -> Result<Self, UserError> {
        let email = new_email(new.email)?;
        diesel::insert_into(users::table)
            .values(NewUser {
                id: new.id.or_else(|| Some(UserId::new())),
                email: &email,
                ..*new
            })
            .on_conflict(users::email)
            .do_nothing()
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()?
            .ok_or(UserError::EmailTaken)
    }

    /// Returns the user, active or not.
    pub fn find(conn: &mut PgConnection, id: UserId) -> QueryResult<Option<Self>> {
        users::table
            .find(id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Returns the user if active.
    pub fn find_active(conn: &mut PgConnection, id: UserId) -> QueryResult<Option<Self>> {
        users::table
            .find(id)
            .filter(users::is_active)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Returns the active user with this email address, in any spelling.
    pub fn find_active_by_email(conn: &mut PgConnection, email: &str) -> QueryResult<Option<Self>> {
        let Ok(email) = canonical_email(email) else {
            return Ok(None);
        };
        users::table
            .filter(users::email.eq(email))
            .filter(users::is_active)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Returns a page of all users, newest first.
    pub fn list(conn: &mut PgConnection, page: Page<UserId>) -> QueryResult<Vec<Self>> {
        newest_first!(users::table.select(Self::as_select()), users, id, page).load(conn)
    }

    /// The user's position in [`list`](Self::list).
    #[must_use]
    pub fn cursor(&self) -> Cursor<UserId> {
        Cursor {
            created_at: self.created_at,
            id: self.id,
        }
    }

    /// Locks the user's plan (`FOR NO KEY UPDATE`) and then the user (`FOR UPDATE`) until the
    /// transaction ends.
    ///
    /// A transaction that calls several operations on one user's rows starts with this call. The
    /// operations can then follow in any order without a deadlock.
    pub fn lock(conn: &mut PgConnection, id: UserId) -> QueryResult<Option<Self>> {
        UserPlan::lock_by_user(conn, id)?;
        users::table
            .find(id)
            .select(Self::as_select())
            .for_update()
            .first(conn)
            .optional()
    }

    /// Changes the user and returns the new row. An empty changeset changes nothing.
    ///
    /// # Errors
    /// A violated constraint; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn update(
        conn: &mut PgConnection,
        id: UserId,
        changes: &UserChangeset<'_>,
    ) -> QueryResult<Option<Self>> {
        let updated = diesel::update(users::table.find(id))
            .set(changes)
            .returning(Self::as_returning())
            .get_result(conn)
            .optional_empty_changeset();
        found(updated, || Self::find(conn, id))
    }

    /// Sets `last_login_at` of an active user; returns `None` if there is none.
    ///
    /// One statement.
    pub fn record_login(conn: &mut PgConnection, id: UserId) -> QueryResult<Option<Self>> {
        diesel::update(users::table.find(id))
            .filter(users::is_active)
            .set(users::last_login_at.eq(now))
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()
    }

    /// Gives an active user another email address, in any spelling; returns `None` if there is no
    /// such user.
    ///
    /// `email_verified` becomes `proven`: whether the user has shown that mail to the new address
    /// arrives, for example by the code of an
    /// [`EmailChangePending`](AuthTokenType::EmailChangePending) token. Codes and links that were
    /// sent to the old address are revoked. Refresh tokens stay valid, so the user stays signed in.
    ///
    /// Locks the user `FOR UPDATE` until the transaction ends.
    ///
    /// # Errors
    /// [`UserError::InvalidEmail`] and [`UserError::EmailTaken`], after which the caller's
    /// transaction can go on.
    pub fn change_email(
        conn: &mut PgConnection,
        id: UserId,
        email: &str,
        proven: bool,
    ) -> Result<Option<Self>, UserError> {
        use AuthTokenType::{EmailChangePending, EmailOtp, EmailVerification, PasswordReset};
        let email = new_email(email)?;
        conn.transaction(|conn| {
            // An update of a key column locks the row FOR UPDATE, also without a SELECT before.
            let user = diesel::update(users::table.find(id))
                .filter(users::is_active)
                .set((users::email.eq(email), users::email_verified.eq(proven)))
                .returning(Self::as_returning())
                .get_result(conn)
                .optional()?;
            if user.is_some() {
                let mailed = [
                    EmailOtp,
                    PasswordReset,
                    EmailVerification,
                    EmailChangePending,
                ];
                AuthToken::revoke_all(conn, id, Some(&mailed))?;
            }
            Ok(user)
        })
    }

    /// Deactivates a user and revokes all tokens; returns `None` if there is no such user.
    ///
    /// The user can't sign in any more. The instances and the plan don't change. Locks the user
    /// until the transaction ends.
    pub fn deactivate(conn: &mut PgConnection, id: UserId) -> QueryResult<Option<Self>> {
        conn.transaction(|conn| {
            let user = diesel::update(users::table.find(id))
                .set(users::is_active.eq(false))
                .returning(Self::as_returning())
                .get_result(conn)
                .optional()?;
            if user.is_some() {
                AuthToken::revoke_all(conn, id, None)?;
            }
            Ok(user)
        })
    }

    /// Lets a deactivated user sign in again; returns `None` if there is no such user, or only an
    /// anonymised one.
    ///
    /// Revoked tokens stay revoked. One statement.
    pub fn reactivate(conn: &mut PgConnection, id: UserId) -> QueryResult<Option<Self>> {
        diesel::update(users::table.find(id))
            .filter(users::email.ne(anonymised_email(id)))
            .set(users::is_active.eq(true))
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()
    }
}
