//! Billing address and saved cards of users.

use chrono::{DateTime, Utc};
use diesel::deserialize::{self, FromSql, FromSqlRow};
use diesel::dsl::{AsExprOf, sql};
use diesel::expression::{SqlLiteral, UncheckedBind};
use diesel::pg::{Pg, PgValue};
use diesel::prelude::*;
use diesel::result::Error;
use diesel::sql_types::{Jsonb, Nullable, Text};
use diesel::upsert::excluded;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::ids::{BillingId, UserId};
use crate::models::{User, found};
use crate::schema::user_billing_details;
use crate::secret::SecretText;

/// A saved card: a gateway's token and what may be shown of the card. There is no place for its number or security code.
///
/// Serialized, for a user's eyes, it leaves out the token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// By which the card is called here: one of each in a user's cards.
    pub id: String,
    /// By which the gateway charges it.
    #[serde(skip_serializing, deserialize_with = "secret")]
    pub token: SecretText,
    /// Such as `visa`.
    pub brand: String,
    /// The last four digits of its number.
    pub last4: String,
    /// 1 to 12.
    pub exp_month: u8,
    /// Four digits.
    pub exp_year: u16,
}

fn secret<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<SecretText, D::Error> {
    String::deserialize(deserializer).map(SecretText::new)
}

impl Card {
    /// The first field that can't be right.
    fn wrong_field(&self) -> Option<&'static str> {
        let wrong = |text: &str| text.trim().is_empty() || looks_like_card_number(text);
        let is_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        [
            ("id", wrong(&self.id)),
            ("token", wrong(self.token.expose())),
            ("brand", wrong(&self.brand)),
            ("last4", self.last4.len() != 4 || !is_digits(&self.last4)),
            ("exp_month", !(1..=12).contains(&self.exp_month)),
            ("exp_year", !(1000..=9999).contains(&self.exp_year)),
        ]
        .into_iter()
        .find_map(|(field, wrong)| wrong.then_some(field))
    }

    /// As it is stored, with its token.
    fn stored(&self) -> Value {
        json!({
            "id": self.id,
            "token": self.token.expose(),
            "brand": self.brand,
            "last4": self.last4,
            "exp_month": self.exp_month,
            "exp_year": self.exp_year,
        })
    }
}

/// Nothing but 12 to 19 digits, and what people write between them.
fn looks_like_card_number(text: &str) -> bool {
    let digits = text.bytes().filter(u8::is_ascii_digit).count();
    let others = text
        .bytes()
        .all(|byte| byte.is_ascii_digit() || matches!(byte, b' ' | b'-'));
    others && (12..=19).contains(&digits)
}

/// `cards`, as Diesel reads it.
#[derive(FromSqlRow)]
pub struct StoredCards(Vec<Card>);

impl FromSql<Jsonb, Pg> for StoredCards {
    fn from_sql(value: PgValue<'_>) -> deserialize::Result<Self> {
        let value = <Value as FromSql<Jsonb, Pg>>::from_sql(value)?;
        // What serde_json says of a wrong value may print it.
        let cards = serde_json::from_value(value)
            .map_err(|_| "user_billing_details.cards holds what is not a card")?;
        Ok(Self(cards))
    }
}

impl From<StoredCards> for Vec<Card> {
    fn from(cards: StoredCards) -> Self {
        cards.0
    }
}

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
    /// Saved cards, in the order they were added.
    #[diesel(deserialize_as = StoredCards)]
    pub cards: Vec<Card>,
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
}

/// Changes to the address: `None` keeps a column, `Some(None)` sets it to `NULL`. Cards are added and removed one by one.
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
}

/// Why an operation on a card was not done.
#[derive(Debug, thiserror::Error)]
pub enum BillingError {
    /// The user has no billing details yet.
    #[error("the user has no billing details")]
    NoDetails,
    /// The user has no card of this id.
    #[error("no such card")]
    NoSuchCard,
    /// This field of the card is missing, malformed, or looks like a card's number. Its value is not told.
    #[error("the card's {0} can't be right")]
    InvalidCard(&'static str),
    /// The database refuses, or can't be reached.
    #[error("database error")]
    Database(#[from] Error),
}

/// An SQL fragment with one value in it.
type WithValue = SqlLiteral<Jsonb, UncheckedBind<SqlLiteral<Jsonb>, AsExprOf<Value, Jsonb>>>;

/// The array `cards` without the card of this id, in its order. Read by the UPDATE that writes it, so under its lock.
fn cards_without(card_id: &str) -> WithValue {
    sql("jsonb_path_query_array(cards, '$[*] ? (!(@.id == $id))', ")
        .bind::<Jsonb, _>(json!({"id": card_id}))
        .sql(")")
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

    /// Sets the address of a user, and inserts the row where there is none. Cards stay. One statement, which locks the row.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn upsert(conn: &mut PgConnection, new: &NewUserBillingDetails<'_>) -> QueryResult<Self> {
        use user_billing_details as t;
        diesel::insert_into(t::table)
            .values(new)
            .on_conflict(t::user_id)
            .do_update()
            .set((
                t::address_line1.eq(excluded(t::address_line1)),
                t::address_line2.eq(excluded(t::address_line2)),
                t::city.eq(excluded(t::city)),
                t::state.eq(excluded(t::state)),
                t::country.eq(excluded(t::country)),
                t::zip_code.eq(excluded(t::zip_code)),
            ))
            .returning(Self::as_returning())
            .get_result(conn)
    }

    /// Adds a card, as the last one, in place of the one that has its id. A user's first card becomes the default.
    ///
    /// One statement, which locks the row: of cards that are added at once none is lost.
    ///
    /// # Errors
    /// [`BillingError::InvalidCard`]; [`BillingError::NoDetails`]: an address comes first.
    pub fn add_card(
        conn: &mut PgConnection,
        user_id: UserId,
        card: &Card,
    ) -> Result<Self, BillingError> {
        if let Some(field) = card.wrong_field() {
            return Err(BillingError::InvalidCard(field));
        }
        let of_user = user_billing_details::table.filter(user_billing_details::user_id.eq(user_id));
        diesel::update(of_user)
            .set((
                user_billing_details::cards.eq(cards_without(&card.id)
                    .sql(" || ")
                    .bind::<Jsonb, _>(json!([card.stored()]))),
                user_billing_details::default_card_id.eq(sql::<Nullable<Text>>(
                    "CASE WHEN cards = '[]' THEN ",
                )
                .bind::<Text, _>(&card.id)
                .sql(" ELSE default_card_id END")),
            ))
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()?
            .ok_or(BillingError::NoDetails)
    }

    /// Removes a card. Where it was the default there is none then: nobody is charged by a card that was not chosen.
    ///
    /// One statement, which locks the row.
    ///
    /// # Errors
    /// [`BillingError::NoSuchCard`]; [`BillingError::NoDetails`].
    pub fn remove_card(
        conn: &mut PgConnection,
        user_id: UserId,
        card_id: &str,
    ) -> Result<Self, BillingError> {
        let of_user = user_billing_details::table
            .filter(user_billing_details::user_id.eq(user_id))
            .filter(user_billing_details::cards.contains(json!([{"id": card_id}])));
        let updated = diesel::update(of_user)
            .set((
                user_billing_details::cards.eq(cards_without(card_id)),
                user_billing_details::default_card_id.eq(sql::<Nullable<Text>>(
                    "NULLIF(default_card_id, ",
                )
                .bind::<Text, _>(card_id)
                .sql(")")),
            ))
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()?;
        Self::found(conn, user_id, updated)
    }

    /// Makes a card the default one. One statement, which locks the row.
    ///
    /// # Errors
    /// [`BillingError::NoSuchCard`]; [`BillingError::NoDetails`].
    pub fn set_default_card(
        conn: &mut PgConnection,
        user_id: UserId,
        card_id: &str,
    ) -> Result<Self, BillingError> {
        let of_user = user_billing_details::table
            .filter(user_billing_details::user_id.eq(user_id))
            .filter(user_billing_details::cards.contains(json!([{"id": card_id}])));
        let updated = diesel::update(of_user)
            .set(user_billing_details::default_card_id.eq(card_id))
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()?;
        Self::found(conn, user_id, updated)
    }

    fn found(
        conn: &mut PgConnection,
        user_id: UserId,
        updated: Option<Self>,
    ) -> Result<Self, BillingError> {
        match updated {
            Some(row) => Ok(row),
            None if Self::find_by_user(conn, user_id)?.is_some() => Err(BillingError::NoSuchCard),
            None => Err(BillingError::NoDetails),
        }
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
        found(updated, || Self::find(conn, billing_id))
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
