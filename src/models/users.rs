//! Users: people with an account.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;

use crate::ids::UserId;
use crate::schema::users;
use crate::secret::SecretText;

/// A row of `users`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable)]
#[diesel(table_name = users, check_for_backend(Pg))]
pub struct User {
    /// Key.
    pub id: UserId,
    /// 1 to 255 characters.
    pub first_name: String,
    /// At most 255 characters; may be empty.
    pub last_name: String,
    /// Canonical: lower case, without white space, one `@`.
    pub email: String,
    /// Password hash (`$…`); `None`: signs in by other means.
    #[serde(skip_serializing)]
    pub password: Option<SecretText>,
    /// Whether the address is proven.
    pub email_verified: bool,
    /// Customer at Razorpay; unique.
    pub razorpay_customer_id: Option<String>,
    /// When the row was made.
    pub created_at: DateTime<Utc>,
    /// When the row changed last.
    pub updated_at: DateTime<Utc>,
    /// When the user signed in last.
    pub last_login_at: Option<DateTime<Utc>>,
    /// False: deactivated, can't sign in.
    pub is_active: bool,
}

/// A new row; `None` leaves a column to its default.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = users, check_for_backend(Pg))]
pub struct NewUser<'a> {
    /// Key.
    pub id: Option<UserId>,
    /// 1 to 255 characters.
    pub first_name: &'a str,
    /// At most 255 characters; may be empty.
    pub last_name: &'a str,
    /// Canonical: lower case, without white space, one `@`.
    pub email: &'a str,
    /// Password hash (`$…`); `None`: signs in by other means.
    pub password: Option<&'a SecretText>,
    /// Whether the address is proven.
    pub email_verified: Option<bool>,
    /// Customer at Razorpay; unique.
    pub razorpay_customer_id: Option<&'a str>,
    /// False: deactivated, can't sign in.
    pub is_active: Option<bool>,
}

/// Changes to a row: `None` keeps a column, `Some(None)` sets it to `NULL`.
#[derive(Debug, Clone, Default, AsChangeset)]
#[diesel(table_name = users)]
pub struct UserChangeset<'a> {
    /// 1 to 255 characters.
    pub first_name: Option<&'a str>,
    /// At most 255 characters; may be empty.
    pub last_name: Option<&'a str>,
    /// Canonical: lower case, without white space, one `@`.
    pub email: Option<&'a str>,
    /// Password hash (`$…`); `None`: signs in by other means.
    pub password: Option<Option<&'a SecretText>>,
    /// Whether the address is proven.
    pub email_verified: Option<bool>,
    /// Customer at Razorpay; unique.
    pub razorpay_customer_id: Option<Option<&'a str>>,
    /// When the user signed in last.
    pub last_login_at: Option<Option<DateTime<Utc>>>,
    /// False: deactivated, can't sign in.
    pub is_active: Option<bool>,
}

impl User {
    /// Inserts a row and returns it with its defaults.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn insert(conn: &mut PgConnection, new: &NewUser<'_>) -> QueryResult<Self> {
        diesel::insert_into(users::table)
            .values(new)
            .returning(Self::as_returning())
            .get_result(conn)
    }

    /// The row of this key, if there is one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find(conn: &mut PgConnection, id: UserId) -> QueryResult<Option<Self>> {
        users::table
            .find(id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// All users, oldest first, `limit` at most, after the one given.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn list(
        conn: &mut PgConnection,
        after: Option<&Self>,
        limit: i64,
    ) -> QueryResult<Vec<Self>> {
        let mut query = users::table.select(Self::as_select()).into_boxed();
        if let Some(after) = after {
            query = query.filter(
                users::created_at.gt(after.created_at).or(users::created_at
                    .eq(after.created_at)
                    .and(users::id.gt(after.id))),
            );
        }
        query
            .order((users::created_at, users::id))
            .limit(limit)
            .load(conn)
    }

    /// Changes the row of this key and returns it as it is then; `None` where there is no such row. An empty changeset
    /// changes nothing.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
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
    /// A foreign key, while other rows refer to it.
    pub fn delete(conn: &mut PgConnection, id: UserId) -> QueryResult<bool> {
        diesel::delete(users::table.find(id))
            .execute(conn)
            .map(|deleted| deleted == 1)
    }
}
