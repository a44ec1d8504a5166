//! Users: people with an account.

mod anonymise;
mod email;
mod export;
mod password;
mod row;
mod unverified;

use std::ops::RangeInclusive;

use diesel::dsl::now;
use diesel::prelude::*;
use diesel::result::Error;

pub(in crate::models) use self::email::anonymised_email;
use self::email::{ANONYMISED_DOMAIN, new_email};
pub use self::email::{InvalidEmail, canonical_email};
pub use self::password::ResetError;
use self::password::is_hash;
pub use self::row::User;
pub use self::unverified::Release;
use crate::error::violates;
use crate::ids::UserId;
use crate::models::{AuthToken, UserPlan, found};
use crate::page::{Cursor, Page, newest_first};
use crate::prepared::Prepare;
use crate::schema::users;
use crate::secret::SecretText;

/// Values of a new [`User`]; `None` uses the column's default.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = users, treat_none_as_default_value = false, check_for_backend(Pg))]
#[expect(missing_docs, reason = "the fields are those of `User`")]
pub struct NewUser<'a> {
    #[diesel(treat_none_as_default_value = true)]
    pub id: Option<UserId>,
    pub first_name: &'a str,
    pub last_name: &'a str,
    /// In any spelling: [`User::sign_up`] makes it canonical.
    pub email: &'a str,
    pub password: Option<&'a SecretText>,
    #[diesel(treat_none_as_default_value = true)]
    pub email_verified: Option<bool>,
    pub razorpay_customer_id: Option<&'a str>,
    #[diesel(treat_none_as_default_value = true)]
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
    /// For a new hash of the same password. A new password: [`User::change_password`].
    pub password: Option<Option<&'a SecretText>>,
    pub email_verified: Option<bool>,
    pub razorpay_customer_id: Option<Option<&'a str>>,
}

/// Why an account was not created or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages say the rest")]
pub enum UserError {
    #[error(transparent)]
    InvalidEmail(#[from] InvalidEmail),
    #[error("the email address is taken")]
    EmailTaken,
    /// This field is empty, too long or malformed. Its value is not shown.
    #[error("the user's {0} is invalid")]
    InvalidField(&'static str),
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

/// Refuses what a CHECK would refuse: the server's log would then print the row, with the password.
fn check(field: &'static str, is_valid: bool) -> Result<(), UserError> {
    is_valid.then_some(()).ok_or(UserError::InvalidField(field))
}

/// Whether a text of this many characters can be stored.
pub(super) fn has_length(text: &str, length: RangeInclusive<usize>) -> bool {
    length.contains(&text.chars().count()) && !text.contains('\0')
}

fn check_fields(
    first_name: Option<&str>,
    last_name: Option<&str>,
    password: Option<&SecretText>,
    customer: Option<&str>,
) -> Result<(), UserError> {
    check(
        "first_name",
        first_name.is_none_or(|name| has_length(name, 1..=255)),
    )?;
    check(
        "last_name",
        last_name.is_none_or(|name| has_length(name, 0..=255)),
    )?;
    check("password", password.is_none_or(is_hash))?;
    check(
        "razorpay_customer_id",
        customer.is_none_or(|id| has_length(id, 1..=255)),
    )
}

impl User {
    /// Creates an account; a trigger gives it the free plan.
    ///
    /// One statement. Concurrent sign-ups with one address wait for each other, and one succeeds.
    ///
    /// # Errors
    /// [`UserError::InvalidEmail`], [`UserError::InvalidField`] and [`UserError::EmailTaken`],
    /// after which the caller's transaction can go on. A violated `users_razorpay_customer_id_key`
    /// is [`UserError::Database`] and aborts it.
    pub fn sign_up(conn: &mut PgConnection, new: &NewUser<'_>) -> Result<Self, UserError> {
        let email = new_email(new.email)?;
        check_fields(
            Some(new.first_name),
            Some(new.last_name),
            new.password,
            new.razorpay_customer_id,
        )?;
        diesel::insert_into(users::table)
            .values(NewUser {
                id: new.id.or_else(|| Some(UserId::new())),
                email: &email,
                ..*new
            })
            .on_conflict(users::email)
            .do_nothing()
            .returning(Self::as_returning())
            .prepared()
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

    /// Returns the user with this email address, in any spelling, active or not.
    pub fn find_by_email(conn: &mut PgConnection, email: &str) -> QueryResult<Option<Self>> {
        let Ok(email) = canonical_email(email) else {
            return Ok(None);
        };
        users::table
            .filter(users::email.eq(email))
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Returns the user who is this customer at Razorpay, active or not.
    pub fn find_by_razorpay_customer_id(
        conn: &mut PgConnection,
        customer_id: &str,
    ) -> QueryResult<Option<Self>> {
        users::table
            .filter(users::razorpay_customer_id.eq(customer_id))
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
    /// transaction ends. Two round trips.
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

    /// Changes the user and returns the new row; `None` if there is no such user, or only an
    /// anonymised one. An empty changeset changes nothing.
    ///
    /// # Errors
    /// [`UserError::InvalidField`], after which the caller's transaction can go on. A violated
    /// `users_razorpay_customer_id_key` is [`UserError::Database`].
    pub fn update(
        conn: &mut PgConnection,
        id: UserId,
        changes: &UserChangeset<'_>,
    ) -> Result<Option<Self>, UserError> {
        check_fields(
            changes.first_name,
            changes.last_name,
            changes.password.flatten(),
            changes.razorpay_customer_id.flatten(),
        )?;
        let updated = diesel::update(users::table.find(id))
            .filter(users::email.ne(anonymised_email(id)))
            .set(changes)
            .returning(Self::as_returning())
            .prepared()
            .get_result(conn)
            .optional_empty_changeset();
        let user = found(updated, || Self::find(conn, id))?;
        Ok(user.filter(|user| !user.email.ends_with(ANONYMISED_DOMAIN)))
    }

    /// Sets `last_login_at` of an active user; returns `None` if there is none.
    ///
    /// One statement.
    pub fn record_login(conn: &mut PgConnection, id: UserId) -> QueryResult<Option<Self>> {
        diesel::update(users::table.find(id))
            .filter(users::is_active)
            .set(users::last_login_at.eq(now))
            .returning(Self::as_returning())
            .prepared()
            .get_result(conn)
            .optional()
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
                .prepared()
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
            .prepared()
            .get_result(conn)
            .optional()
    }
}
