//! Transactions: payments, refunds, fees and adjustments.

mod row;

use bigdecimal::BigDecimal;
use chrono::{DateTime, Utc};
use diesel::dsl::{now, sql};
use diesel::prelude::*;
use diesel::result::Error;
use diesel::sql_types::Bool;
use serde_json::Value;

pub use self::row::SubscriptionTransaction;
use crate::enums::{TransactionStatus, TransactionType};
use crate::ids::{SubscriptionId, TransactionId, UserId};
use crate::models::user_billing_details::looks_like_card_number;
use crate::models::{DEFAULT_CURRENCY, Recorded, lock_user_key};
use crate::page::{Cursor, Page, newest_first};
use crate::prepared::Prepare;
use crate::schema::subscription_transactions;

/// Values of a new [`SubscriptionTransaction`]; `None` uses the column's default.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = subscription_transactions, treat_none_as_default_value = false, check_for_backend(Pg))]
#[expect(
    missing_docs,
    reason = "the fields are those of `SubscriptionTransaction`"
)]
pub struct NewSubscriptionTransaction<'a> {
    #[diesel(treat_none_as_default_value = true)]
    pub id: Option<TransactionId>,
    pub user_id: UserId,
    pub subscription_id: Option<SubscriptionId>,
    pub razorpay_payment_id: Option<&'a str>,
    pub razorpay_order_id: Option<&'a str>,
    #[diesel(treat_none_as_default_value = true)]
    pub transaction_type: Option<TransactionType>,
    pub amount: i64,
    #[diesel(treat_none_as_default_value = true)]
    pub tax_amount: Option<i64>,
    #[diesel(treat_none_as_default_value = true)]
    pub discount_amount: Option<i64>,
    #[diesel(treat_none_as_default_value = true)]
    pub fee_amount: Option<i64>,
    pub net_amount: i64,
    #[diesel(treat_none_as_default_value = true)]
    pub currency: Option<&'a str>,
    #[diesel(treat_none_as_default_value = true)]
    pub exchange_rate: Option<&'a BigDecimal>,
    pub status: TransactionStatus,
    pub gateway_status: Option<&'a str>,
    pub method: Option<&'a str>,
    pub method_details_json: Option<&'a Value>,
    pub gateway_response_json: Option<&'a Value>,
    pub description: Option<&'a str>,
    pub receipt_number: Option<&'a str>,
    pub invoice_id: Option<&'a str>,
    pub failure_reason: Option<&'a str>,
    pub failure_code: Option<&'a str>,
    pub parent_transaction_id: Option<TransactionId>,
    pub processed_at: Option<DateTime<Utc>>,
    pub settled_at: Option<DateTime<Utc>>,
    pub refunded_at: Option<DateTime<Utc>>,
}

impl NewSubscriptionTransaction<'_> {
    /// A row with these values, all else by default.
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

/// A refund that the gateway has made.
#[derive(Debug, Clone)]
pub struct NewRefund<'a> {
    /// The key of the new row; `None` lets the database generate it.
    pub id: Option<TransactionId>,
    /// The refund's id at Razorpay; unique among payments and refunds.
    pub razorpay_refund_id: &'a str,
    /// The refunded amount, positive, in minor units of the payment's currency.
    pub amount: i64,
    /// A description for people.
    pub description: Option<&'a str>,
    /// The gateway's response.
    pub gateway_response_json: Option<&'a Value>,
    /// The time at which the gateway made the refund.
    pub processed_at: Option<DateTime<Utc>>,
}

impl<'a> NewRefund<'a> {
    /// A refund with these values and nothing else.
    #[must_use]
    pub fn new(razorpay_refund_id: &'a str, amount: i64) -> Self {
        Self {
            id: None,
            razorpay_refund_id,
            amount,
            description: None,
            gateway_response_json: None,
            processed_at: None,
        }
    }
}

/// Changes to a [`SubscriptionTransaction`]: `None` keeps a column, `Some(None)` sets it to `NULL`.
#[derive(Debug, Clone, Default, AsChangeset)]
#[diesel(table_name = subscription_transactions)]
#[expect(
    missing_docs,
    reason = "the fields are those of `SubscriptionTransaction`"
)]
pub struct SubscriptionTransactionChangeset<'a> {
    pub razorpay_payment_id: Option<Option<&'a str>>,
    pub razorpay_order_id: Option<Option<&'a str>>,
    pub fee_amount: Option<i64>,
    pub net_amount: Option<i64>,
    pub gateway_status: Option<Option<&'a str>>,
    pub method: Option<Option<&'a str>>,
    pub method_details_json: Option<Option<&'a Value>>,
    pub gateway_response_json: Option<Option<&'a Value>>,
    pub description: Option<Option<&'a str>>,
    pub receipt_number: Option<Option<&'a str>>,
    pub invoice_id: Option<Option<&'a str>>,
    pub failure_reason: Option<Option<&'a str>>,
    pub failure_code: Option<Option<&'a str>>,
    pub retry_count: Option<i32>,
    pub processed_at: Option<Option<DateTime<Utc>>>,
    pub settled_at: Option<Option<DateTime<Utc>>>,
}

/// Why an operation on a payment failed. Nothing is changed then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PaymentError {
    /// There is no such payment.
    #[error("no such payment")]
    NotFound,
    /// The status doesn't allow the operation. Holds the current row.
    #[error("the transaction's status is {}", .0.status)]
    Conflict(Box<SubscriptionTransaction>),
    /// A new payment has no gateway id, or is a refund.
    #[error("not a payment with a gateway id")]
    NotAPayment,
    /// The amount is zero or negative.
    #[error("the amount is not positive")]
    NotPositive,
    /// `method_details_json` holds a card number or security code. Its value is not shown.
    #[error("the details of the method hold a card number or security code")]
    CardSecret,
    /// The gateway id is recorded for another user, amount, currency or refunded payment. Holds
    /// that row.
    #[error("the gateway id belongs to another transaction")]
    Differs(Box<SubscriptionTransaction>),
    /// The refunds would exceed the payment.
    #[error("only {refundable} of the payment can still be refunded")]
    ExceedsPayment {
        /// The amount that can still be refunded, in minor units.
        refundable: i64,
    },
    /// Any other database error.
    #[error("database error")]
    Database(#[from] Error),
}

/// Whether the details of a method hold what `subscription_transactions_no_card_secrets` refuses.
/// Checked here too, because the server writes a refused row to its log.
fn holds_card_secret(details: &Value) -> bool {
    match details {
        Value::Object(fields) => fields.iter().any(|(key, value)| {
            is_card_secret(key) || looks_like_card_number(key) || holds_card_secret(value)
        }),
        Value::Array(items) => items.iter().any(holds_card_secret),
        Value::String(text) => looks_like_card_number(text),
        Value::Number(number) => looks_like_card_number(&number.to_string()),
        Value::Null | Value::Bool(_) => false,
    }
}

fn is_card_secret(key: &str) -> bool {
    let key: String = key.chars().filter(|char| !" _-".contains(*char)).collect();
    let key = key.to_lowercase();
    let secrets = [
        "number",
        "pan",
        "cvv",
        "cvv2",
        "cvc",
        "cvc2",
        "csc",
        "cvn",
        "securitycode",
        "verificationcode",
        "verificationvalue",
    ];
    secrets.contains(&key.strip_prefix("card").unwrap_or(&key))
}

impl SubscriptionTransaction {
    /// Returns the transaction with this id.
    pub fn find(conn: &mut PgConnection, id: TransactionId) -> QueryResult<Option<Self>> {
        subscription_transactions::table
            .find(id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Returns the payment or refund with this Razorpay id.
    pub fn find_by_razorpay_id(
        conn: &mut PgConnection,
        razorpay_payment_id: &str,
    ) -> QueryResult<Option<Self>> {
        subscription_transactions::table
            .filter(subscription_transactions::razorpay_payment_id.eq(razorpay_payment_id))
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Returns a page of the user's transactions, newest first.
    pub fn list_by_user(
        conn: &mut PgConnection,
        user_id: UserId,
        page: Page<TransactionId>,
    ) -> QueryResult<Vec<Self>> {
        let of_user = subscription_transactions::table
            .filter(subscription_transactions::user_id.eq(user_id))
            .select(Self::as_select());
        newest_first!(of_user, subscription_transactions, id, page).load(conn)
    }

    /// Returns up to `limit` transactions made before `before`, oldest first, that the gateway has
    /// neither captured nor ended: created or authorized. Ask the gateway, then
    /// [`advance`](Self::advance) them.
    pub fn list_stuck(
        conn: &mut PgConnection,
        before: DateTime<Utc>,
        limit: u16,
    ) -> QueryResult<Vec<Self>> {
        subscription_transactions::table
            // A literal: the planner can't match bind parameters with a partial index.
            .filter(sql::<Bool>("status IN ('created', 'authorized')"))
            .filter(subscription_transactions::created_at.lt(before))
            .order((
                subscription_transactions::created_at,
                subscription_transactions::id,
            ))
            .limit(limit.into())
            .select(Self::as_select())
            .load(conn)
    }

    /// The row's position in a list.
    #[must_use]
    pub fn cursor(&self) -> Cursor<TransactionId> {
        Cursor {
            created_at: self.created_at,
            id: self.id,
        }
    }

    /// Records a payment once per gateway id.
    ///
    /// It waits for a transaction that records the same payment. Four round trips.
    ///
    /// # Errors
    /// [`PaymentError::NotAPayment`]; [`PaymentError::CardSecret`]; [`PaymentError::Differs`].
    /// Violated constraints, such as a taken receipt number, are [`PaymentError::Database`].
    pub fn record_payment(
        conn: &mut PgConnection,
        new: &NewSubscriptionTransaction<'_>,
    ) -> Result<Recorded<Self>, PaymentError> {
        let Some(razorpay_payment_id) = new
            .razorpay_payment_id
            .filter(|_| new.transaction_type != Some(TransactionType::Refund))
        else {
            return Err(PaymentError::NotAPayment);
        };
        if new.method_details_json.is_some_and(holds_card_secret) {
            return Err(PaymentError::CardSecret);
        }
        conn.transaction(|conn| {
            lock_user_key(conn, new.user_id)?;
            Self::record(conn, razorpay_payment_id, new)
        })
    }

    fn record(
        conn: &mut PgConnection,
        razorpay_payment_id: &str,
        new: &NewSubscriptionTransaction<'_>,
    ) -> Result<Recorded<Self>, PaymentError> {
        loop {
            let inserted = diesel::insert_into(subscription_transactions::table)
                .values(new)
                .on_conflict(subscription_transactions::razorpay_payment_id)
                .do_nothing()
                .returning(Self::as_returning())
                .prepared()
                .get_result(conn)
                .optional()?;
            if let Some(row) = inserted {
                return Ok(Recorded::New(row));
            }
            // If the other row was deleted meanwhile, the id is free again.
            if let Some(row) = Self::find_by_razorpay_id(conn, razorpay_payment_id)? {
                return if row.is_of(new) {
                    Ok(Recorded::Existing(row))
                } else {
                    Err(PaymentError::Differs(Box::new(row)))
                };
            }
        }
    }

    fn is_of(&self, new: &NewSubscriptionTransaction<'_>) -> bool {
        let is_refund = self.transaction_type == TransactionType::Refund;
        self.user_id == new.user_id
            && self.amount == new.amount
            && self.currency == new.currency.unwrap_or(DEFAULT_CURRENCY)
            && is_refund == (new.transaction_type == Some(TransactionType::Refund))
            && (!is_refund || self.parent_transaction_id == new.parent_transaction_id)
    }

    /// Moves a payment to status `to` as reported by the gateway, and applies `changes`.
    ///
    /// Webhooks arrive late and out of order, so only these steps are allowed:
    ///
    /// | to | from |
    /// | --- | --- |
    /// | authorized | created, failed |
    /// | captured | created, authorized, failed |
    /// | failed, cancelled | created, authorized |
    ///
    /// Only [`refund`](Self::refund) makes a payment refunded. One statement, which locks the row.
    ///
    /// # Errors
    /// [`PaymentError::Conflict`] for every other step, also if the payment already has status
    /// `to`, so that each step's consequences happen once; [`PaymentError::NotFound`];
    /// [`PaymentError::CardSecret`].
    pub fn advance(
        conn: &mut PgConnection,
        id: TransactionId,
        to: TransactionStatus,
        changes: &SubscriptionTransactionChangeset<'_>,
    ) -> Result<Self, PaymentError> {
        use TransactionStatus::{Authorized, Cancelled, Captured, Created, Failed, Refunded};
        if changes
            .method_details_json
            .flatten()
            .is_some_and(holds_card_secret)
        {
            return Err(PaymentError::CardSecret);
        }
        let from: &[TransactionStatus] = match to {
            Authorized => &[Created, Failed],
            Captured => &[Created, Authorized, Failed],
            Failed | Cancelled => &[Created, Authorized],
            Created | Refunded => &[],
        };
        let advanced = diesel::update(subscription_transactions::table.find(id))
            .filter(subscription_transactions::status.eq_any(from))
            .set((changes, subscription_transactions::status.eq(to)))
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()?;
        match advanced {
            Some(row) => Ok(row),
            None => Err(match Self::find(conn, id)? {
                Some(row) => PaymentError::Conflict(Box::new(row)),
                None => PaymentError::NotFound,
            }),
        }
    }

    /// Records a refund of a captured payment once per gateway id. When nothing of the payment is
    /// left, the payment becomes refunded.
    ///
    /// The refund is a row with the payment's user, subscription and currency. Its amounts are
    /// **negative**, so the sum of all amounts is what the user has paid. One transaction, nine or
    /// ten round trips, which locks the payment. Failed and cancelled refunds don't count.
    ///
    /// `subscription_transactions_refund_exceeds` keeps the refunds of a payment within it,
    /// whichever statement records them.
    ///
    /// # Errors
    /// [`PaymentError::NotPositive`]; [`PaymentError::NotFound`]; [`PaymentError::Conflict`] if it
    /// isn't a captured payment; [`PaymentError::ExceedsPayment`]; [`PaymentError::Differs`].
    pub fn refund(
        conn: &mut PgConnection,
        payment_id: TransactionId,
        refund: &NewRefund<'_>,
    ) -> Result<Recorded<Self>, PaymentError> {
        if refund.amount <= 0 {
            return Err(PaymentError::NotPositive);
        }
        conn.transaction(|conn| {
            let user_id = subscription_transactions::table
                .find(payment_id)
                .select(subscription_transactions::user_id)
                .first(conn)
                .optional()?
                .ok_or(PaymentError::NotFound)?;
            lock_user_key(conn, user_id)?;
            // An UPDATE without a change: with only a lock, a transaction at REPEATABLE READ would
            // miss the refunds recorded since its snapshot.
            let payment = diesel::update(subscription_transactions::table.find(payment_id))
                .set(subscription_transactions::status.eq(subscription_transactions::status))
                .returning(Self::as_returning())
                .prepared()
                .get_result(conn)
                .optional()?
                .ok_or(PaymentError::NotFound)?;
            let row = NewSubscriptionTransaction {
                id: refund.id,
                subscription_id: payment.subscription_id,
                razorpay_payment_id: Some(refund.razorpay_refund_id),
                transaction_type: Some(TransactionType::Refund),
                currency: Some(&payment.currency),
                exchange_rate: Some(&payment.exchange_rate),
                gateway_response_json: refund.gateway_response_json,
                description: refund.description,
                parent_transaction_id: Some(payment_id),
                processed_at: refund.processed_at,
                ..NewSubscriptionTransaction::new(
                    payment.user_id,
                    -refund.amount,
                    -refund.amount,
                    TransactionStatus::Captured,
                )
            };
            // First of all: a refund that is reported again must not count twice.
            match Self::find_by_razorpay_id(conn, refund.razorpay_refund_id)? {
                Some(existing) if existing.is_of(&row) => {
                    return Ok(Recorded::Existing(existing));
                }
                Some(other) => return Err(PaymentError::Differs(Box::new(other))),
                None => {}
            }
            let captured = matches!(
                payment.status,
                TransactionStatus::Captured | TransactionStatus::Refunded
            );
            if !captured || payment.transaction_type == TransactionType::Refund {
                return Err(PaymentError::Conflict(Box::new(payment)));
            }
            let refundable = payment.refundable(conn)?;
            if refund.amount > refundable {
                return Err(PaymentError::ExceedsPayment { refundable });
            }
            let recorded = Self::record(conn, refund.razorpay_refund_id, &row)?;
            if refund.amount == refundable {
                diesel::update(subscription_transactions::table.find(payment_id))
                    .set((
                        subscription_transactions::status.eq(TransactionStatus::Refunded),
                        subscription_transactions::refunded_at.eq(now),
                    ))
                    .prepared()
                    .execute(conn)?;
            }
            Ok(recorded)
        })
    }

    /// The amount left after the refunds.
    fn refundable(&self, conn: &mut PgConnection) -> QueryResult<i64> {
        use TransactionStatus::{Cancelled, Failed};
        let refunds: Vec<i64> = subscription_transactions::table
            .filter(subscription_transactions::parent_transaction_id.eq(self.id))
            .filter(subscription_transactions::transaction_type.eq(TransactionType::Refund))
            .filter(subscription_transactions::status.ne_all([Failed, Cancelled]))
            .select(subscription_transactions::amount)
            .load(conn)?;
        // The refunds are negative and never exceed the payment, so the sum is in range.
        Ok(self.amount + refunds.iter().sum::<i64>())
    }
}
