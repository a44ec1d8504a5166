//! The enum types of the database. Labels are the same in SQL and in serde: snake_case.
//!
//! A label that the database has and this crate doesn't know fails the load of a row: add it here, release, and only
//! then use it.

use diesel_derive_enum::DbEnum;
use serde::{Deserialize, Serialize};

/// What a token in `auth_tokens` is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::AuthTokenType"]
#[serde(rename_all = "snake_case")]
pub enum AuthTokenType {
    /// A six-digit code, to sign in.
    EmailOtp,
    /// A link, to set a new password.
    PasswordReset,
    /// A link, to prove an address.
    EmailVerification,
    /// A refresh token; the only type of which a user may have several live ones.
    Refresh,
    /// A six-digit code, to prove a new address.
    EmailChangePending,
}

/// The plan that a subscription pays for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::SubscriptionPlan"]
#[serde(rename_all = "snake_case")]
pub enum SubscriptionPlan {
    /// Nothing is paid.
    Free,
    /// The pro plan.
    Pro,
    /// The plus plan.
    Plus,
}

/// Where a subscription is in its life, in the gateway's words. At most one of a user's is active, past due or paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::SubscriptionStatus"]
#[serde(rename_all = "snake_case")]
pub enum SubscriptionStatus {
    /// Made at the gateway, not paid yet.
    Created,
    /// The payment method is confirmed.
    Authenticated,
    /// Paid.
    Active,
    /// A payment failed; within the days of grace.
    PastDue,
    /// Ended by the user.
    Cancelled,
    /// Ran to its end.
    Completed,
    /// Paused by the user.
    Paused,
    /// Ended by failed payments.
    Halted,
    /// Followed by one of a higher plan.
    Upgraded,
    /// Followed by another.
    Replaced,
}

/// How often a subscription is charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::BillingCycle"]
#[serde(rename_all = "snake_case")]
pub enum BillingCycle {
    /// Every month.
    Monthly,
    /// Every year.
    Yearly,
}

/// What a transaction is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::TransactionType"]
#[serde(rename_all = "snake_case")]
pub enum TransactionType {
    /// A charge for a subscription.
    Subscription,
    /// A charge beside it.
    Addon,
    /// Money given back; its amounts may be negative.
    Refund,
    /// A correction.
    Adjustment,
    /// A fee.
    Fee,
}

/// Where a transaction is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::TransactionStatus"]
#[serde(rename_all = "snake_case")]
pub enum TransactionStatus {
    /// Made, not paid yet.
    Created,
    /// Reserved at the payer's bank.
    Authorized,
    /// Paid.
    Captured,
    /// Paid, and given back.
    Refunded,
    /// Refused.
    Failed,
    /// Given up.
    Cancelled,
}

/// Where a credit comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::CreditSource"]
#[serde(rename_all = "snake_case")]
pub enum CreditSource {
    /// A refund; credited once per source.
    Refund,
    /// A correction, or what is left of a credit that was spent in part.
    Adjustment,
    /// A gift.
    Promotion,
    /// The unused rest of a higher plan; credited once per source.
    Downgrade,
}

/// How a service authenticates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::McpAuthType"]
#[serde(rename_all = "snake_case")]
pub enum AuthType {
    /// By a key of the user's.
    ApiKey,
    /// By OAuth 2.0.
    Oauth,
}

/// Where an authorisation is. An API key is completed at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::McpOauthStatus"]
#[serde(rename_all = "snake_case")]
pub enum OauthStatus {
    /// The user hasn't granted access yet.
    Pending,
    /// The credentials can be used.
    Completed,
    /// The user or the provider refused.
    Failed,
    /// The provider withdrew it; the user must grant access again.
    Expired,
}

/// Whether an instance may be called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::McpInstanceStatus"]
#[serde(rename_all = "snake_case")]
pub enum InstanceStatus {
    /// Yes.
    Active,
    /// Switched off.
    Inactive,
    /// Past its `expires_at`.
    Expired,
}

/// How an audited operation went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::TokenAuditStatus"]
#[serde(rename_all = "snake_case")]
pub enum AuditStatus {
    /// Done.
    Success,
    /// Failed.
    Failure,
    /// Under way.
    Pending,
    /// Done, with something to look at.
    Warning,
}

/// A user's plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::PlanType"]
#[serde(rename_all = "snake_case")]
pub enum PlanType {
    /// One active instance.
    Free,
    /// Any number of active instances.
    Pro,
}

/// How the payments of a plan go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::PlanPaymentStatus"]
#[serde(rename_all = "snake_case")]
pub enum PlanPaymentStatus {
    /// Nobody pays.
    None,
    /// Paid.
    Active,
    /// Cancelled.
    Cancelled,
    /// The last payment failed for good.
    Failed,
    /// The last payment is late.
    PastDue,
}

/// Who takes the payments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::PaymentGateway"]
#[serde(rename_all = "snake_case")]
pub enum PaymentGateway {
    /// Stripe.
    Stripe,
    /// Razorpay.
    Razorpay,
}

/// What became of a webhook.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::WebhookStatus"]
#[serde(rename_all = "snake_case")]
pub enum WebhookStatus {
    /// Recorded, not processed yet.
    Pending,
    /// Processed.
    Processed,
    /// Processing failed; worth another try.
    Failed,
    /// Of no interest.
    Skipped,
}
