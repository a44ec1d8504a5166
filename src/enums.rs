//! The database's enum types. A label is the same snake_case word in SQL, serde, `Display` and
//! `FromStr`.
//!
//! A row with a label that this crate doesn't know fails to load. Add a new label here, release the
//! crate, and use the label after that.

use std::fmt;
use std::str::FromStr;

use diesel_derive_enum::DbEnum;
use serde::de::value::{Error, StrDeserializer};
use serde::{Deserialize, Serialize};

/// What a token in `auth_tokens` is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::AuthTokenType"]
#[serde(rename_all = "snake_case")]
pub enum AuthTokenType {
    /// A six-digit code to sign in.
    EmailOtp,
    /// A link to set a new password.
    PasswordReset,
    /// A link that proves an email address.
    EmailVerification,
    /// A refresh token. A user may have several live ones; of the other types, one.
    Refresh,
    /// A six-digit code that proves a new email address.
    EmailChangePending,
}

/// The plan that a subscription pays for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::SubscriptionPlan"]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "labels without a doc explain themselves")]
pub enum SubscriptionPlan {
    Free,
    Pro,
    Plus,
}

/// The status of a subscription, in the gateway's terms. A user has at most one that is active,
/// past due or paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::SubscriptionStatus"]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "labels without a doc explain themselves")]
pub enum SubscriptionStatus {
    Created,
    /// The payment method is confirmed.
    Authenticated,
    Active,
    /// A payment failed; the grace period runs.
    PastDue,
    /// Ended by the user.
    Cancelled,
    /// Ended after its last period.
    Completed,
    Paused,
    /// Stopped after failed payments.
    Halted,
    /// Replaced by a subscription to a higher plan.
    Upgraded,
    /// Replaced by another subscription.
    Replaced,
}

impl SubscriptionStatus {
    /// Whether this status is final: cancelled, completed, upgraded or replaced. Halted is not: the
    /// gateway resumes a halted subscription when the user pays.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(
            self,
            Self::Cancelled | Self::Completed | Self::Upgraded | Self::Replaced
        )
    }
}

/// How often a subscription is charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::BillingCycle"]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "labels without a doc explain themselves")]
pub enum BillingCycle {
    Monthly,
    Yearly,
}

/// The type of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::TransactionType"]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "labels without a doc explain themselves")]
pub enum TransactionType {
    Subscription,
    Addon,
    /// Money returned to the user; its amounts are negative.
    Refund,
    Adjustment,
    Fee,
}

/// The status of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::TransactionStatus"]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "labels without a doc explain themselves")]
pub enum TransactionStatus {
    /// Created, not paid yet.
    Created,
    /// Reserved on the payer's account.
    Authorized,
    Captured,
    /// Paid and fully refunded.
    Refunded,
    Failed,
    Cancelled,
}

/// The source of a credit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::CreditSource"]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "labels without a doc explain themselves")]
pub enum CreditSource {
    /// A refund, credited once per `source_id`.
    Refund,
    /// A correction, or the remainder of a partly spent credit.
    Adjustment,
    Promotion,
    /// The unused part of a higher plan, credited once per `source_id`.
    Downgrade,
}

/// How a service authenticates its users.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::McpAuthType"]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "labels without a doc explain themselves")]
pub enum AuthType {
    ApiKey,
    Oauth,
}

/// The status of an authorization. An API key is completed at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::McpOauthStatus"]
#[serde(rename_all = "snake_case")]
pub enum OauthStatus {
    /// The user has not granted access yet.
    Pending,
    /// The credentials can be used.
    Completed,
    /// The user or the provider refused.
    Failed,
    /// The provider withdrew access; the user must grant it again.
    Expired,
}

/// Whether an instance can be called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::McpInstanceStatus"]
#[serde(rename_all = "snake_case")]
pub enum InstanceStatus {
    /// It can be called once its authorization is completed.
    Active,
    /// Switched off by its user or by a plan limit.
    Inactive,
    /// Its `expires_at` has passed.
    Expired,
}

/// The outcome of an audited operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::TokenAuditStatus"]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "labels without a doc explain themselves")]
pub enum AuditStatus {
    Success,
    Failure,
    Pending,
    /// It succeeded, but somebody should look at it.
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

/// The payment status of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::PlanPaymentStatus"]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "labels without a doc explain themselves")]
pub enum PlanPaymentStatus {
    /// No payment is expected.
    None,
    Active,
    Cancelled,
    /// The last payment failed and will not be retried.
    Failed,
    /// The last payment is overdue.
    PastDue,
}

/// The payment gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::PaymentGateway"]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "labels without a doc explain themselves")]
pub enum PaymentGateway {
    Stripe,
    Razorpay,
}

/// The processing status of a webhook event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, DbEnum)]
#[ExistingTypePath = "crate::schema::sql_types::WebhookStatus"]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "labels without a doc explain themselves")]
pub enum WebhookStatus {
    /// Recorded, not processed yet.
    Pending,
    Processed,
    /// Processing failed and can be retried.
    Failed,
    /// Needs no processing.
    Skipped,
}

macro_rules! labels {
    ($($name:ident: $($variant:ident)*;)*) => {$(
        impl $name {
            /// All variants, in the order of the database's labels.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.serialize(f)
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(label: &str) -> Result<Self, Error> {
                Self::deserialize(StrDeserializer::new(label))
            }
        }
    )*};
}
labels! {
    AuthTokenType: EmailOtp PasswordReset EmailVerification Refresh EmailChangePending;
    SubscriptionPlan: Free Pro Plus;
    SubscriptionStatus: Created Authenticated Active PastDue Cancelled Completed Paused Halted
        Upgraded Replaced;
    BillingCycle: Monthly Yearly;
    TransactionType: Subscription Addon Refund Adjustment Fee;
    TransactionStatus: Created Authorized Captured Refunded Failed Cancelled;
    CreditSource: Refund Adjustment Promotion Downgrade;
    AuthType: ApiKey Oauth;
    OauthStatus: Pending Completed Failed Expired;
    InstanceStatus: Active Inactive Expired;
    AuditStatus: Success Failure Pending Warning;
    PlanType: Free Pro;
    PlanPaymentStatus: None Active Cancelled Failed PastDue;
    PaymentGateway: Stripe Razorpay;
    WebhookStatus: Pending Processed Failed Skipped;
}
