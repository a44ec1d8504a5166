//! Transactions: payments, refunds, fees and adjustments.

use bigdecimal::BigDecimal;
use chrono::{DateTime, Utc};
use diesel::dsl::now;
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::result::Error;
use serde::Serialize;
use serde_json::Value;

use crate::enums::{TransactionStatus, TransactionType};
use crate::ids::{SubscriptionId, TransactionId, UserId};
use crate::models::{DEFAULT_CURRENCY, User, found};
use crate::page::Cursor;
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
    /// Payment or refund at Razorpay; unique.
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

/// A refund that the gateway has made.
#[derive(Debug, Clone)]
pub struct NewRefund<'a> {
    /// Key of its row; `None`: the database gives one.
    pub id: Option<TransactionId>,
    /// Refund at Razorpay; unique among payments and refunds.
    pub razorpay_refund_id: &'a str,
    /// What was given back, positive, in minor units of the payment's currency.
    pub amount: i64,
    /// For people.
    pub description: Option<&'a str>,
    /// The gateway's answer.
    pub gateway_response_json: Option<&'a Value>,
    /// When the gateway made it.
    pub processed_at: Option<DateTime<Utc>>,
}

/// Changes to a row: `None` keeps a column, `Some(None)` sets it to `NULL`. The status is not among them: see
/// [`SubscriptionTransaction::advance`].
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
    /// The status in the gateway's words.
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
}

/// What became of a payment or refund that the gateway reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordedPayment {
    /// It is new. What hangs on it is to be done now.
    Recorded(SubscriptionTransaction),
    /// It was here already, as it is in this row.
    Existing(SubscriptionTransaction),
}

/// Why an operation on a payment was not done.
#[derive(Debug, thiserror::Error)]
pub enum PaymentError {
    /// There is no such payment.
    #[error("no such payment")]
    NotFound,
    /// What was to be recorded as a payment has no gateway's id, or is a refund.
    #[error("not a payment of a gateway")]
    NotAPayment,
    /// A refund of nothing or less.
    #[error("the amount is not positive")]
    NotPositive,
    /// The gateway's id is here already, for another user, amount, currency, or payment refunded. Holds that row.
    #[error("the gateway's id belongs to another payment")]
    Differs(Box<SubscriptionTransaction>),
    /// The status doesn't allow it, or is the one it has already. Holds the row as it is.
    #[error("the payment is in another status")]
    Conflict(Box<SubscriptionTransaction>),
    /// The refunds would be more than the payment.
    #[error("only {refundable} of the payment can still be refunded")]
    ExceedsPayment {
        /// What can still be refunded, in minor units.
        refundable: i64,
    },
    /// The database refuses, or can't be reached.
    #[error("database error")]
    Database(#[from] Error),
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

    /// The payment or refund that Razorpay calls by this id.
    ///
    /// # Errors
    /// Only those of the connection.
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

    /// The rows of a user, newest first, `limit` at most, from the newest or from the place given.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn list_by_user(
        conn: &mut PgConnection,
        user_id: UserId,
        after: Option<Cursor<TransactionId>>,
        limit: i64,
    ) -> QueryResult<Vec<Self>> {
        let mut query = subscription_transactions::table
            .filter(subscription_transactions::user_id.eq(user_id))
            .select(Self::as_select())
            .into_boxed();
        if let Some(after) = after {
            query = query.filter(
                subscription_transactions::created_at
                    .le(after.created_at)
                    .and(
                        subscription_transactions::created_at
                            .lt(after.created_at)
                            .or(subscription_transactions::id.lt(after.id)),
                    ),
            );
        }
        query
            .order((
                subscription_transactions::created_at.desc(),
                subscription_transactions::id.desc(),
            ))
            .limit(limit)
            .load(conn)
    }

    /// Records a payment under its gateway's id, once.
    ///
    /// One statement where it is new, two where it isn't; waits for a transaction that records the same payment.
    ///
    /// # Errors
    /// [`PaymentError::NotAPayment`]; [`PaymentError::Differs`] where the id is here for another user, amount or currency, or
    /// for a refund. Other rules of the table, as of the receipt's number, are [`PaymentError::Database`].
    pub fn record_payment(
        conn: &mut PgConnection,
        new: &NewSubscriptionTransaction<'_>,
    ) -> Result<RecordedPayment, PaymentError> {
        let Some(razorpay_payment_id) = new
            .razorpay_payment_id
            .filter(|_| new.transaction_type != Some(TransactionType::Refund))
        else {
            return Err(PaymentError::NotAPayment);
        };
        Self::record(conn, razorpay_payment_id, new)
    }

    /// Inserts a row whose gateway's id is new, or finds the one that has it.
    fn record(
        conn: &mut PgConnection,
        razorpay_payment_id: &str,
        new: &NewSubscriptionTransaction<'_>,
    ) -> Result<RecordedPayment, PaymentError> {
        loop {
            let inserted = diesel::insert_into(subscription_transactions::table)
                .values(new)
                .on_conflict(subscription_transactions::razorpay_payment_id)
                .do_nothing()
                .returning(Self::as_returning())
                .get_result(conn)
                .optional()?;
            if let Some(row) = inserted {
                return Ok(RecordedPayment::Recorded(row));
            }
            // None if it was deleted meanwhile: then the id is free again.
            if let Some(row) = Self::find_by_razorpay_id(conn, razorpay_payment_id)? {
                return if row.is_of(new) {
                    Ok(RecordedPayment::Existing(row))
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

    /// Moves a payment on as its gateway reports, and makes `changes` with it.
    ///
    /// Webhooks come late and out of order, so only these steps are taken: a payment that is created or failed becomes
    /// authorized; one that is created, authorized or failed becomes captured; one that is created or authorized becomes
    /// failed or cancelled. It becomes refunded by [`refund`](Self::refund) alone. One statement, which locks the row.
    ///
    /// # Errors
    /// [`PaymentError::Conflict`] for every other step, also where the payment is there already, so that what hangs on the
    /// step is done once; [`PaymentError::NotFound`].
    pub fn advance(
        conn: &mut PgConnection,
        id: TransactionId,
        to: TransactionStatus,
        changes: &SubscriptionTransactionChangeset<'_>,
    ) -> Result<Self, PaymentError> {
        use TransactionStatus::{Authorized, Cancelled, Captured, Created, Failed, Refunded};
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

    /// Records a refund of a captured payment under its gateway's id, once, and links it to the payment. The payment
    /// becomes refunded when nothing of it is left.
    ///
    /// A refund is a row of the payment's user, subscription and currency whose amount and net amount are **negative**, so
    /// that amounts add up to what a user has paid. One transaction that locks the payment first, so that refunds of one
    /// payment run one after the other and never exceed it. Failed and cancelled refunds don't count.
    ///
    /// # Errors
    /// [`PaymentError::NotPositive`]; [`PaymentError::NotFound`]; [`PaymentError::Conflict`] where it isn't a payment that was
    /// captured; [`PaymentError::ExceedsPayment`]; [`PaymentError::Differs`] where the refund's id is here for another payment
    /// or amount. Nothing is changed then.
    pub fn refund(
        conn: &mut PgConnection,
        payment_id: TransactionId,
        refund: &NewRefund<'_>,
    ) -> Result<RecordedPayment, PaymentError> {
        if refund.amount <= 0 {
            return Err(PaymentError::NotPositive);
        }
        conn.transaction(|conn| {
            // Changes nothing but the row's version: at REPEATABLE READ a lock alone would let a stale snapshot miss the
            // refunds that were recorded since.
            let payment = diesel::update(subscription_transactions::table.find(payment_id))
                .set(subscription_transactions::status.eq(subscription_transactions::status))
                .returning(Self::as_returning())
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
            // Before what is left is looked at: a refund that is reported again is no refund of the rest.
            match Self::find_by_razorpay_id(conn, refund.razorpay_refund_id)? {
                Some(existing) if existing.is_of(&row) => {
                    return Ok(RecordedPayment::Existing(existing));
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
                    .execute(conn)?;
            }
            Ok(recorded)
        })
    }

    /// What is left of this payment after its refunds, whichever sign they were recorded with.
    fn refundable(&self, conn: &mut PgConnection) -> QueryResult<i64> {
        use TransactionStatus::{Cancelled, Failed};
        let refunds: Vec<i64> = subscription_transactions::table
            .filter(subscription_transactions::parent_transaction_id.eq(self.id))
            .filter(subscription_transactions::transaction_type.eq(TransactionType::Refund))
            .filter(subscription_transactions::status.ne_all([Failed, Cancelled]))
            .select(subscription_transactions::amount)
            .load(conn)?;
        // Saturating is exact enough: with more than i64::MAX given back nothing is left.
        let left = refunds.iter().fold(self.amount, |left, refund| {
            left.saturating_sub_unsigned(refund.unsigned_abs())
        });
        Ok(left.max(0))
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
        found(updated, || Self::find(conn, id))
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
