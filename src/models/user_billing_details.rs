//! Billing address and saved cards of users.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;
use serde_json::Value;

use crate::ids::{BillingId, UserId};
use crate::models::User;
use crate::schema::user_billing_details;

/// A row of `user_billing_details`.
#[derive(
    Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable, Associations,
)]
#[diesel(table_name = user_billing_details, primary_key(billing_id), belongs_to(User, foreign_key = user_id), check_for_backend(Pg))]
pub struct UserBillingDetails {
    /// Key.
    pub billing_id: BillingId,
    /// Whose address it is; one row each.
    pub user_id: UserId,
    /// 1 to 255 characters.
    pub address_line1: String,
    /// At most 255 characters.
    pub address_line2: Option<String>,
    /// 1 to 100 characters.
    pub city: String,
    /// 1 to 100 characters.
    pub state: String,
    /// 1 to 100 characters.
    pub country: String,
    /// 1 to 20 characters.
    pub zip_code: String,
    /// An array of gateway tokens with what may be shown of each card; never a number or security code.
    pub cards: Value,
    /// The id of one of `cards`.
    pub default_card_id: Option<String>,
    /// When the row was made.
    pub created_at: DateTime<Utc>,
    /// When the row changed last.
    pub updated_at: DateTime<Utc>,
}

/// A new row; `None` leaves a column to its default.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = user_billing_details, check_for_backend(Pg))]
pub struct NewUserBillingDetails<'a> {
    /// Key.
    pub billing_id: Option<BillingId>,
    /// Whose address it is; one row each.
    pub user_id: UserId,
    /// 1 to 255 characters.
    pub address_line1: &'a str,
    /// At most 255 characters.
    pub address_line2: Option<&'a str>,
    /// 1 to 100 characters.
    pub city: &'a str,
    /// 1 to 100 characters.
    pub state: &'a str,
    /// 1 to 100 characters.
    pub country: &'a str,
    /// 1 to 20 characters.
    pub zip_code: &'a str,
    /// An array of gateway tokens with what may be shown of each card; never a number or security code.
    pub cards: Option<&'a Value>,
    /// The id of one of `cards`.
    pub default_card_id: Option<&'a str>,
}

/// Changes to a row: `None` keeps a column, `Some(None)` sets it to `NULL`.
#[derive(Debug, Clone, Default, AsChangeset)]
#[diesel(table_name = user_billing_details)]
pub struct UserBillingDetailsChangeset<'a> {
    /// 1 to 255 characters.
    pub address_line1: Option<&'a str>,
    /// At most 255 characters.
    pub address_line2: Option<Option<&'a str>>,
    /// 1 to 100 characters.
    pub city: Option<&'a str>,
    /// 1 to 100 characters.
    pub state: Option<&'a str>,
    /// 1 to 100 characters.
    pub country: Option<&'a str>,
    /// 1 to 20 characters.
    pub zip_code: Option<&'a str>,
    /// An array of gateway tokens with what may be shown of each card; never a number or security code.
    pub cards: Option<&'a Value>,
    /// The id of one of `cards`.
    pub default_card_id: Option<Option<&'a str>>,
}

impl UserBillingDetails {
    /// Inserts a row and returns it with its defaults.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn insert(conn: &mut PgConnection, new: &NewUserBillingDetails<'_>) -> QueryResult<Self> {
        diesel::insert_into(user_billing_details::table)
            .values(new)
            .returning(Self::as_returning())
            .get_result(conn)
    }

    /// The row of this key, if there is one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find(conn: &mut PgConnection, billing_id: BillingId) -> QueryResult<Option<Self>> {
        user_billing_details::table
            .find(billing_id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// The row of a user.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find_by_user(conn: &mut PgConnection, user_id: UserId) -> QueryResult<Option<Self>> {
        user_billing_details::table
            .filter(user_billing_details::user_id.eq(user_id))
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Changes the row of this key and returns it as it is then; `None` where there is no such row. An empty changeset
    /// changes nothing.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn update(
        conn: &mut PgConnection,
        billing_id: BillingId,
        changes: &UserBillingDetailsChangeset<'_>,
    ) -> QueryResult<Option<Self>> {
        let updated = diesel::update(user_billing_details::table.find(billing_id))
            .set(changes)
            .returning(Self::as_returning())
            .get_result(conn)
            .optional_empty_changeset();
        match updated {
            Ok(Some(row)) => Ok(Some(row)),
            Ok(None) => Self::find(conn, billing_id),
            Err(diesel::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Deletes the row of this key; says whether there was one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn delete(conn: &mut PgConnection, billing_id: BillingId) -> QueryResult<bool> {
        diesel::delete(user_billing_details::table.find(billing_id))
            .execute(conn)
            .map(|deleted| deleted == 1)
    }
}
