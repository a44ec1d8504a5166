//! The row. Without the feature `operations`, it is all that the crate has of the table.

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
#[expect(missing_docs, reason = "the other fields explain themselves")]
pub struct AccountCredit {
    pub id: CreditId,
    pub user_id: UserId,
    /// Minor units (paise) of `currency`, never 0; negative for a debit.
    pub amount: i64,
    /// ISO 4217 code; by default INR.
    pub currency: String,
    pub description: Option<String>,
    pub source_type: Option<CreditSource>,
    /// The source's id. Required and unique for a refund or downgrade.
    pub source_id: Option<String>,
    pub is_used: bool,
    /// Set if and only if `is_used` is true.
    pub used_at: Option<DateTime<Utc>>,
    /// The time from which the credit can't be spent; `None` for never.
    pub expires_at: Option<DateTime<Utc>>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}
