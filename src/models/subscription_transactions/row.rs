//! The row. Without the feature `operations`, it is all that the crate has of the table.

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

/// A row of `subscription_transactions`. Amounts are in minor units (paise) of `currency`.
///
/// Questions that no method answers, each with its index:
///
/// ```no_run
/// # use bruhmcp_db::enums::{TransactionStatus, TransactionType};
/// # use bruhmcp_db::ids::{SubscriptionId, TransactionId, UserId};
/// # use bruhmcp_db::models::SubscriptionTransaction;
/// # use bruhmcp_db::schema::subscription_transactions as t;
/// # use chrono::{DateTime, Utc};
/// # use diesel::prelude::*;
/// # fn questions(
/// #     conn: &mut PgConnection, user_id: UserId, subscription_id: SubscriptionId,
/// #     payment_id: TransactionId, from: DateTime<Utc>, to: DateTime<Utc>,
/// # ) -> QueryResult<()> {
/// // The transactions of a subscription, newest first.
/// let of_subscription = t::table
///     .filter(t::subscription_id.eq(subscription_id))
///     .order((t::created_at.desc(), t::id.desc()))
///     .select(SubscriptionTransaction::as_select())
///     .load(conn)?;
///
/// // A user's captured charges of a period: their number, and the second page of 20.
/// let charges = || {
///     t::table
///         .filter(t::user_id.eq(user_id))
///         .filter(t::transaction_type.eq(TransactionType::Subscription))
///         .filter(t::status.eq(TransactionStatus::Captured))
///         .filter(t::created_at.ge(from).and(t::created_at.lt(to)))
/// };
/// let number: i64 = charges().count().get_result(conn)?;
/// let page = charges()
///     .order((t::created_at.desc(), t::id.desc()))
///     .limit(20)
///     .offset(20)
///     .select(SubscriptionTransaction::as_select())
///     .load(conn)?;
///
/// // The payment for an invoice: this user's, and paid, even if it was refunded since.
/// let paid = [TransactionStatus::Captured, TransactionStatus::Refunded];
/// let invoiced = t::table
///     .find(payment_id)
///     .filter(t::user_id.eq(user_id))
///     .filter(t::transaction_type.ne(TransactionType::Refund))
///     .filter(t::status.eq_any(paid))
///     .select(SubscriptionTransaction::as_select())
///     .first(conn)
///     .optional()?;
/// # Ok(())
/// # }
/// ```
#[derive(
    Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable, Associations,
)]
#[diesel(table_name = subscription_transactions, belongs_to(User, foreign_key = user_id), check_for_backend(Pg))]
#[expect(missing_docs, reason = "the other fields explain themselves")]
pub struct SubscriptionTransaction {
    pub id: TransactionId,
    pub user_id: UserId,
    pub subscription_id: Option<SubscriptionId>,
    /// The id of the payment or refund at Razorpay; unique.
    pub razorpay_payment_id: Option<String>,
    pub razorpay_order_id: Option<String>,
    pub transaction_type: TransactionType,
    /// The gross amount; negative only for a refund.
    pub amount: i64,
    pub tax_amount: i64,
    pub discount_amount: i64,
    /// The gateway's fee.
    pub fee_amount: i64,
    /// The amount after tax, discount and fee.
    pub net_amount: i64,
    /// ISO 4217 code; by default INR.
    pub currency: String,
    /// Rupees per unit of `currency`, with eight decimals.
    pub exchange_rate: BigDecimal,
    pub status: TransactionStatus,
    /// The status in the gateway's words.
    pub gateway_status: Option<String>,
    /// The means of payment, such as card or upi.
    pub method: Option<String>,
    pub method_details_json: Option<Value>,
    pub gateway_response_json: Option<Value>,
    pub description: Option<String>,
    /// Unique.
    pub receipt_number: Option<String>,
    /// The id of the invoice at the gateway.
    pub invoice_id: Option<String>,
    /// The reason for a failure, for people.
    pub failure_reason: Option<String>,
    /// The reason for a failure, as the gateway's code.
    pub failure_code: Option<String>,
    pub retry_count: i32,
    /// The payment that a refund or adjustment belongs to.
    pub parent_transaction_id: Option<TransactionId>,
    /// The time at which the gateway accepted it.
    pub processed_at: Option<DateTime<Utc>>,
    /// The time at which the money arrived.
    pub settled_at: Option<DateTime<Utc>>,
    pub refunded_at: Option<DateTime<Utc>>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}
