//! Users' billing addresses and saved cards.

mod row;

use std::fmt;

use diesel::dsl::{AsExprOf, sql};
use diesel::expression::{AsExpression, SqlLiteral, UncheckedBind};
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::result::Error;
use diesel::serialize::{self, Output, ToSql};
use diesel::sql_types::{Jsonb, Nullable, Text};
use diesel::upsert::excluded;
use serde_json::{Value, json};

pub use self::row::{Card, UserBillingDetails};
use crate::ids::UserId;
use crate::models::lock_active_user;
use crate::models::users::has_length;
use crate::prepared::Prepare;
use crate::schema::user_billing_details;

impl Card {
    /// Returns the first invalid field.
    fn wrong_field(&self) -> Option<&'static str> {
        let wrong = |text: &str| {
            text.trim().is_empty() || text.contains('\0') || looks_like_card_number(text)
        };
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

    /// The JSON in the database: an array of this card, with the token.
    fn stored(&self) -> SecretJson {
        SecretJson(json!([{
            "id": self.id,
            "token": self.token.expose(),
            "brand": self.brand,
            "last4": self.last4,
            "exp_month": self.exp_month,
            "exp_year": self.exp_year,
        }]))
    }
}

/// A value that Diesel's instrumentation doesn't print.
#[derive(AsExpression)]
#[diesel(sql_type = Jsonb)]
struct SecretJson(Value);

impl fmt::Debug for SecretJson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretJson(..)")
    }
}

impl ToSql<Jsonb, Pg> for SecretJson {
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, Pg>) -> serialize::Result {
        ToSql::<Jsonb, Pg>::to_sql(&self.0, out)
    }
}

/// Whether a card number may be in the text, by the rule of `..._no_card_secrets`: 13 to 19 digits,
/// or the same with spaces or hyphens, between spaces or quotes.
pub(super) fn looks_like_card_number(text: &str) -> bool {
    let bytes = text.as_bytes();
    let ends_word = |byte: Option<&u8>| byte.is_none_or(|byte| matches!(byte, b' ' | b'"'));
    (0..bytes.len()).any(|start| {
        let (before, rest) = (bytes[..start].last(), &bytes[start..]);
        if !matches!(rest[0], b'2'..=b'6' | b'8') {
            return false;
        }
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let begins = !before.is_some_and(|byte| byte.is_ascii_digit() || *byte == b'.');
        if begins && (13..=19).contains(&digits) {
            return true;
        }
        let (mut digits, mut at) = (1, 1);
        ends_word(before)
            && loop {
                if digits >= 13 && ends_word(rest.get(at)) {
                    break true;
                }
                at += usize::from(matches!(rest.get(at), Some(b' ' | b'-')));
                if digits == 19 || !rest.get(at).is_some_and(u8::is_ascii_digit) {
                    break false;
                }
                (digits, at) = (digits + 1, at + 1);
            }
    })
}

/// The address of a new or changed [`UserBillingDetails`].
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = user_billing_details, treat_none_as_default_value = false, check_for_backend(Pg))]
#[expect(missing_docs, reason = "the fields are those of `UserBillingDetails`")]
pub struct NewUserBillingDetails<'a> {
    pub user_id: UserId,
    pub address_line1: &'a str,
    pub address_line2: Option<&'a str>,
    pub city: &'a str,
    pub state: &'a str,
    pub country: &'a str,
    pub zip_code: &'a str,
}

impl NewUserBillingDetails<'_> {
    /// Returns the first field that the database would refuse: its log would print the row, with the
    /// tokens of the cards.
    fn wrong_field(&self) -> Option<&'static str> {
        [
            ("address_line1", Some(self.address_line1), 1..=255),
            ("address_line2", self.address_line2, 0..=255),
            ("city", Some(self.city), 1..=100),
            ("state", Some(self.state), 1..=100),
            ("country", Some(self.country), 1..=100),
            ("zip_code", Some(self.zip_code), 1..=20),
        ]
        .into_iter()
        .find_map(|(field, text, length)| {
            let is_valid = text.is_none_or(|text| has_length(text, length));
            (!is_valid).then_some(field)
        })
    }
}

/// Why an operation on a card or an address failed. Nothing is changed then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BillingError {
    /// The user has no billing details yet: set an address first.
    #[error("the user has no billing details")]
    NotFound,
    /// The user has no card with this id.
    #[error("no such card")]
    CardNotFound,
    /// There is no such active user.
    #[error("no such active user")]
    NoUser,
    /// This field of the address is empty, too long or has a NUL. Its value is not shown.
    #[error("the {0} is invalid")]
    InvalidField(&'static str),
    /// This field of the card is empty, malformed or looks like a card number. Its value is not
    /// shown.
    #[error("the card's {0} is invalid")]
    InvalidCard(&'static str),
    /// Any other database error.
    #[error("database error")]
    Database(#[from] Error),
}

/// An SQL fragment with one value in it.
type WithValue = SqlLiteral<Jsonb, UncheckedBind<SqlLiteral<Jsonb>, AsExprOf<Value, Jsonb>>>;

/// The array `cards` without the card with this id. The UPDATE that writes the array evaluates this
/// under the row's lock, so no concurrent change is lost.
fn cards_without(card_id: &str) -> WithValue {
    sql("jsonb_path_query_array(cards, '$[*] ? (!(@.id == $id))', ")
        .bind::<Jsonb, _>(json!({"id": card_id}))
        .sql(")")
}

/// The user's row, if it has this card.
#[diesel::dsl::auto_type]
fn has_card(user_id: UserId, card_id: &str) -> _ {
    let cards: Value = json!([{"id": card_id}]);
    user_billing_details::user_id
        .eq(user_id)
        .and(user_billing_details::cards.contains(cards))
}

impl UserBillingDetails {
    /// Returns the user's billing details.
    pub fn find_by_user(conn: &mut PgConnection, user_id: UserId) -> QueryResult<Option<Self>> {
        user_billing_details::table
            .filter(user_billing_details::user_id.eq(user_id))
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Sets an active user's address: inserts the row, or changes the one that exists. Cards stay.
    ///
    /// One transaction of four round trips, which locks the user (`FOR KEY SHARE`).
    ///
    /// # Errors
    /// [`BillingError::InvalidField`]; [`BillingError::NoUser`].
    pub fn upsert(
        conn: &mut PgConnection,
        new: &NewUserBillingDetails<'_>,
    ) -> Result<Self, BillingError> {
        use user_billing_details as t;
        if let Some(field) = new.wrong_field() {
            return Err(BillingError::InvalidField(field));
        }
        conn.transaction(|conn| {
            if !lock_active_user(conn, new.user_id)? {
                return Err(BillingError::NoUser);
            }
            let row = diesel::insert_into(t::table)
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
                .prepared()
                .get_result(conn)?;
            Ok(row)
        })
    }

    /// Adds a card as the last one, or replaces the card with the same id. A user's first card
    /// becomes the default.
    ///
    /// One statement, which locks the row.
    ///
    /// # Errors
    /// [`BillingError::InvalidCard`]; [`BillingError::NotFound`].
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
                    .bind::<Jsonb, _>(card.stored())),
                user_billing_details::default_card_id.eq(sql::<Nullable<Text>>(
                    "CASE WHEN cards = '[]' THEN ",
                )
                .bind::<Text, _>(&card.id)
                .sql(" ELSE default_card_id END")),
            ))
            .returning(Self::as_returning())
            .prepared()
            .get_result(conn)
            .optional()?
            .ok_or(BillingError::NotFound)
    }

    /// Removes a card. If it was the default, the user has no default until one is chosen.
    ///
    /// One statement, which locks the row.
    ///
    /// # Errors
    /// [`BillingError::CardNotFound`]; [`BillingError::NotFound`].
    pub fn remove_card(
        conn: &mut PgConnection,
        user_id: UserId,
        card_id: &str,
    ) -> Result<Self, BillingError> {
        let updated =
            diesel::update(user_billing_details::table.filter(has_card(user_id, card_id)))
                .set((
                    user_billing_details::cards.eq(cards_without(card_id)),
                    user_billing_details::default_card_id.eq(sql::<Nullable<Text>>(
                        "NULLIF(default_card_id, ",
                    )
                    .bind::<Text, _>(card_id)
                    .sql(")")),
                ))
                .returning(Self::as_returning())
                .prepared()
                .get_result(conn)
                .optional()?;
        updated.map_or_else(|| Err(Self::missed(conn, user_id)), Ok)
    }

    /// Makes a card the default. One statement, which locks the row.
    ///
    /// # Errors
    /// [`BillingError::CardNotFound`]; [`BillingError::NotFound`].
    pub fn set_default_card(
        conn: &mut PgConnection,
        user_id: UserId,
        card_id: &str,
    ) -> Result<Self, BillingError> {
        let updated =
            diesel::update(user_billing_details::table.filter(has_card(user_id, card_id)))
                .set(user_billing_details::default_card_id.eq(card_id))
                .returning(Self::as_returning())
                .prepared()
                .get_result(conn)
                .optional()?;
        updated.map_or_else(|| Err(Self::missed(conn, user_id)), Ok)
    }

    /// Why an update of this card found nothing.
    fn missed(conn: &mut PgConnection, user_id: UserId) -> BillingError {
        match Self::find_by_user(conn, user_id) {
            Ok(Some(_)) => BillingError::CardNotFound,
            Ok(None) => BillingError::NotFound,
            Err(error) => BillingError::Database(error),
        }
    }
}
