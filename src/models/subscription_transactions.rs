//! Transactions: payments, refunds, fees and adjustments.

use bigdecimal::BigDecimal;
use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;
use serde_json::Value;

use crate::enums::{TransactionStatus, TransactionType};
use crate::ids::{SubscriptionId, TransactionId, UserId};
use crate::models::User;
use crate::schema::subscription_transactions;

/// A row of `subscription_transactions`.
#[derive(
    Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable, Associations,
)]
#[diesel(table_name = subscription_transactions, belongs_to(User, foreign_key = user_id), check_for_backend(Pg))]
pub struct SubscriptionTransaction {
    /// Key.
    pub id: TransactionId,
    /// Whose money it is.
    pub user_id: UserId,
    /// The subscription that is paid for.
    pub subscription_id: Option<SubscriptionId>,
    /// Payment at Razorpay; unique.
    pub razorpay_payment_id: Option<String>,
    /// Order at Razorpay.
    pub razorpay_order_id: Option<String>,
    /// What it is.
    pub transaction_type: TransactionType,
    /// Gross, in minor units of `currency`; negative only for a refund.
    pub amount: i64,
    /// Minor units of `currency`.
    pub tax_amount: i64,
    /// Minor units of `currency`.
    pub discount_amount: i64,
    /// The gateway's fee, in minor units of `currency`.
    pub fee_amount: i64,
    /// What is left after tax, discount and fee, in minor units of `currency`.
    pub net_amount: i64,
    /// ISO 4217 code; by default INR.
    pub currency: String,
    /// Rupees for one unit of `currency`, eight decimals.
    pub exchange_rate: BigDecimal,
    /// Where it is in its life.
    pub status: TransactionStatus,
    /// The same in the gateway's words.
    pub gateway_status: Option<String>,
    /// How it was paid, such as card or upi.
    pub method: Option<String>,
    /// What may be known of the means of payment.
    pub method_details_json: Option<Value>,
    /// The gateway's answer.
    pub gateway_response_json: Option<Value>,
    /// For people.
    pub description: Option<String>,
    /// Number of the receipt; unique.
    pub receipt_number: Option<String>,
    /// Invoice at the gateway.
    pub invoice_id: Option<String>,
    /// Why it failed, for people.
    pub failure_reason: Option<String>,
    /// Why it failed, in the gateway's code.
    pub failure_code: Option<String>,
    /// How often it was tried again.
    pub retry_count: i32,
    /// The payment that a refund or adjustment belongs to.
    pub parent_transaction_id: Option<TransactionId>,
    /// When the gateway took it.
    pub processed_at: Option<DateTime<Utc>>,
    /// When the money arrived.
    pub settled_at: Option<DateTime<Utc>>,
    /// When it was given back.
    pub refunded_at: Option<DateTime<Utc>>,
    /// When the row was made.
    pub created_at: DateTime<Utc>,
    /// When the row changed last.
    pub updated_at: DateTime<Utc>,
}

/// A new row; `None` leaves a column to its default.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = subscription_transactions, check_for_backend(Pg))]
pub struct NewSubscriptionTransaction<'a> {
    /// Key.
    pub id: Option<TransactionId>,
    /// Whose money it is.
    pub user_id: UserId,
    /// The subscription that is paid for.
    pub subscription_id: Option<SubscriptionId>,
    /// Payment at Razorpay; unique.
    pub razorpay_payment_id: Option<&'a str>,
    /// Order at Razorpay.
    pub razorpay_order_id: Option<&'a str>,
    /// What it is.
    pub transaction_type: Option<TransactionType>,
    /// Gross, in minor units of `currency`; negative only for a refund.
    pub amount: i64,
    /// Minor units of `currency`.
    pub tax_amount: Option<i64>,
    /// Minor units of `currency`.
    pub discount_amount: Option<i64>,
    /// The gateway's fee, in minor units of `currency`.
    pub fee_amount: Option<i64>,
    /// What is left after tax, discount and fee, in minor units of `currency`.
    pub net_amount: i64,
    /// ISO 4217 code; by default INR.
    pub currency: Option<&'a str>,
    /// Rupees for one unit of `currency`, eight decimals.
    pub exchange_rate: Option<&'a BigDecimal>,
    /// Where it is in its life.
    pub status: TransactionStatus,
    /// The same in the gateway's words.
    pub gateway_status: Option<&'a str>,
    /// How it was paid, such as card or upi.
    pub method: Option<&'a str>,
    /// What may be known of the means of payment.
    pub method_details_json: Option<&'a Value>,
    /// The gateway's answer.
    pub gateway_response_json: Option<&'a Value>,
    /// For people.
    pub description: Option<&'a str>,
    /// Number of the receipt; unique.
    pub receipt_number: Option<&'a str>,
    /// Invoice at the gateway.
    pub invoice_id: Option<&'a str>,
    /// Why it failed, for people.
    pub failure_reason: Option<&'a str>,
    /// Why it failed, in the gateway's code.
    pub failure_code: Option<&'a str>,
    /// The payment that a refund or adjustment belongs to.
    pub parent_transaction_id: Option<TransactionId>,
    /// When the gateway took it.
    pub processed_at: Option<DateTime<Utc>>,
    /// When the money arrived.
    pub settled_at: Option<DateTime<Utc>>,
    /// When it was given back.
    pub refunded_at: Option<DateTime<Utc>>,
}

impl NewSubscriptionTransaction<'_> {
    /// A new row with all columns at their defaults but these.
    #[must_use]
    pub fn new(user_id: UserId, amount: i64, net_amount: i64, status: TransactionStatus) -> Self {
        Self {
            id: None,
            user_id,
            subscription_id: None,
            razorpay_payment_id: None,
            razorpay_order_id: None,
            transaction_type: None,
            amount,
            tax_amount: None,
            discount_amount: None,
            fee_amount: None,
            net_amount,
            currency: None,
            exchange_rate: None,
            status,
            gateway_status: None,
            method: None,
            method_details_json: None,
            gateway_response_json: None,
            description: None,
            receipt_number: None,
            invoice_id: None,
            failure_reason: None,
            failure_code: None,
            parent_transaction_id: None,
            processed_at: None,
            settled_at: None,
            refunded_at: None,
        }
    }
}

/// Changes to a row: `None` keeps a column, `Some(None)` sets it to `NULL`.
#[derive(Debug, Clone, Default, AsChangeset)]
#[diesel(table_name = subscription_transactions)]
pub struct SubscriptionTransactionChangeset<'a> {
    /// Payment at Razorpay; unique.
    pub razorpay_payment_id: Option<Option<&'a str>>,
    /// Order at Razorpay.
    pub razorpay_order_id: Option<Option<&'a str>>,
    /// The gateway's fee, in minor units of `currency`.
    pub fee_amount: Option<i64>,
    /// What is left after tax, discount and fee, in minor units of `currency`.
    pub net_amount: Option<i64>,
    /// Where it is in its life.
    pub status: Option<TransactionStatus>,
    /// The same in the gateway's words.
    pub gateway_status: Option<Option<&'a str>>,
    /// How it was paid, such as card or upi.
    pub method: Option<Option<&'a str>>,
    /// What may be known of the means of payment.
    pub method_details_json: Option<Option<&'a Value>>,
    /// The gateway's answer.
    pub gateway_response_json: Option<Option<&'a Value>>,
    /// For people.
    pub description: Option<Option<&'a str>>,
    /// Number of the receipt; unique.
    pub receipt_number: Option<Option<&'a str>>,
    /// Invoice at the gateway.
    pub invoice_id: Option<Option<&'a str>>,
    /// Why it failed, for people.
    pub failure_reason: Option<Option<&'a str>>,
    /// Why it failed, in the gateway's code.
    pub failure_code: Option<Option<&'a str>>,
    /// How often it was tried again.
    pub retry_count: Option<i32>,
    /// When the gateway took it.
    pub processed_at: Option<Option<DateTime<Utc>>>,
    /// When the money arrived.
    pub settled_at: Option<Option<DateTime<Utc>>>,
    /// When it was given back.
    pub refunded_at: Option<Option<DateTime<Utc>>>,
}

impl SubscriptionTransaction {
    /// Inserts a row and returns it with its defaults.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn insert(
        conn: &mut PgConnection,
        new: &NewSubscriptionTransaction<'_>,
    ) -> QueryResult<Self> {
        diesel::insert_into(subscription_transactions::table)
            .values(new)
            .returning(Self::as_returning())
            .get_result(conn)
    }

    /// The row of this key, if there is one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find(conn: &mut PgConnection, id: TransactionId) -> QueryResult<Option<Self>> {
        subscription_transactions::table
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
        subscription_transactions::table
            .filter(subscription_transactions::user_id.eq(user_id))
            .order((
                subscription_transactions::created_at.desc(),
                subscription_transactions::id.desc(),
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
        id: TransactionId,
        changes: &SubscriptionTransactionChangeset<'_>,
    ) -> QueryResult<Option<Self>> {
        let updated = diesel::update(subscription_transactions::table.find(id))
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
    pub fn delete(conn: &mut PgConnection, id: TransactionId) -> QueryResult<bool> {
        diesel::delete(subscription_transactions::table.find(id))
            .execute(conn)
            .map(|deleted| deleted == 1)
    }
}
