//! The row. Without the feature `operations`, it is all that the crate has of the table.

use chrono::{DateTime, Utc};
use diesel::deserialize::{self, FromSql, FromSqlRow};
use diesel::pg::{Pg, PgValue};
use diesel::prelude::*;
use diesel::sql_types::Jsonb;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ids::{BillingId, UserId};
use crate::models::User;
use crate::schema::user_billing_details;
use crate::secret::SecretText;

/// A saved card: the gateway's token and what may be shown of the card, never its number or
/// security code.
///
/// `Serialize` leaves out the token, so a card can be sent to its owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// Unique among the user's cards.
    pub id: String,
    /// The token with which the gateway charges the card.
    #[serde(skip_serializing)]
    pub token: SecretText,
    /// Such as `visa`.
    pub brand: String,
    /// The last four digits of the number.
    pub last4: String,
    /// 1 to 12.
    pub exp_month: u8,
    /// Four digits.
    pub exp_year: u16,
}

/// The column `cards`.
#[derive(FromSqlRow)]
pub struct StoredCards(Vec<Card>);

impl FromSql<Jsonb, Pg> for StoredCards {
    fn from_sql(value: PgValue<'_>) -> deserialize::Result<Self> {
        let value = <Value as FromSql<Jsonb, Pg>>::from_sql(value)?;
        // serde_json's error may print the value.
        let cards = serde_json::from_value(value)
            .map_err(|_| "user_billing_details.cards holds an invalid card")?;
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
#[expect(missing_docs, reason = "the other fields explain themselves")]
pub struct UserBillingDetails {
    pub billing_id: BillingId,
    /// Unique.
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
    /// The saved cards, oldest first.
    #[diesel(deserialize_as = StoredCards)]
    pub cards: Vec<Card>,
    /// The id of one of `cards`.
    pub default_card_id: Option<String>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}
