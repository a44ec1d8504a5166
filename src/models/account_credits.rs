//! Credits: money the platform owes a user.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;

use crate::enums::CreditSource;
use crate::ids::{CreditId, UserId};
use crate::models::User;
use crate::schema::account_credits;

/// A row of `account_credits`.
#[derive(
    Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable, Associations,
)]
#[diesel(table_name = account_credits, belongs_to(User, foreign_key = user_id), check_for_backend(Pg))]
pub struct AccountCredit {
    /// Key.
    pub id: CreditId,
    /// Whose credit it is.
    pub user_id: UserId,
    /// Minor units of `currency`, never 0; negative is a debit.
    pub amount: i64,
    /// ISO 4217 code; by default INR.
    pub currency: String,
    /// For people.
    pub description: Option<String>,
    /// Where it comes from.
    pub source_type: Option<CreditSource>,
    /// What it is for, in the words of its source; needed for a refund or downgrade.
    pub source_id: Option<String>,
    /// Whether it is spent.
    pub is_used: bool,
    /// When it was spent; set exactly when `is_used` is.
    pub used_at: Option<DateTime<Utc>>,
    /// From then on it can't be spent; `None`: never.
    pub expires_at: Option<DateTime<Utc>>,
    /// When the row was made.
    pub created_at: DateTime<Utc>,
    /// When the row changed last.
    pub updated_at: DateTime<Utc>,
}

/// A new row; `None` leaves a column to its default.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = account_credits, check_for_backend(Pg))]
pub struct NewAccountCredit<'a> {
    /// Key.
    pub id: Option<CreditId>,
    /// Whose credit it is.
    pub user_id: UserId,
    /// Minor units of `currency`, never 0; negative is a debit.
    pub amount: i64,
    /// ISO 4217 code; by default INR.
    pub currency: Option<&'a str>,
    /// For people.
    pub description: Option<&'a str>,
    /// Where it comes from.
    pub source_type: Option<CreditSource>,
    /// What it is for, in the words of its source; needed for a refund or downgrade.
    pub source_id: Option<&'a str>,
    /// From then on it can't be spent; `None`: never.
    pub expires_at: Option<DateTime<Utc>>,
}

/// Changes to a row: `None` keeps a column, `Some(None)` sets it to `NULL`.
#[derive(Debug, Clone, Default, AsChangeset)]
#[diesel(table_name = account_credits)]
pub struct AccountCreditChangeset<'a> {
    /// For people.
    pub description: Option<Option<&'a str>>,
    /// Whether it is spent.
    pub is_used: Option<bool>,
    /// When it was spent; set exactly when `is_used` is.
    pub used_at: Option<Option<DateTime<Utc>>>,
    /// From then on it can't be spent; `None`: never.
    pub expires_at: Option<Option<DateTime<Utc>>>,
}

impl AccountCredit {
    /// Inserts a row and returns it with its defaults.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn insert(conn: &mut PgConnection, new: &NewAccountCredit<'_>) -> QueryResult<Self> {
        diesel::insert_into(account_credits::table)
            .values(new)
            .returning(Self::as_returning())
            .get_result(conn)
    }

    /// The row of this key, if there is one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find(conn: &mut PgConnection, id: CreditId) -> QueryResult<Option<Self>> {
        account_credits::table
            .find(id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// The rows of a user, newest first, `limit` at most.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn list_by_user(
        conn: &mut PgConnection,
        user_id: UserId,
        limit: i64,
    ) -> QueryResult<Vec<Self>> {
        account_credits::table
            .filter(account_credits::user_id.eq(user_id))
            .order((
                account_credits::created_at.desc(),
                account_credits::id.desc(),
            ))
            .limit(limit)
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
        id: CreditId,
        changes: &AccountCreditChangeset<'_>,
    ) -> QueryResult<Option<Self>> {
        let updated = diesel::update(account_credits::table.find(id))
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
    pub fn delete(conn: &mut PgConnection, id: CreditId) -> QueryResult<bool> {
        diesel::delete(account_credits::table.find(id))
            .execute(conn)
            .map(|deleted| deleted == 1)
    }
}
