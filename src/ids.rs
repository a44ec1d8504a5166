//! Keys of the tables, a type each, so that the compiler tells a user from an instance.

use diesel_derive_newtype::DieselNewType;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! uuid_key {
    ($(#[$doc:meta] $name:ident = $new:ident;)*) => {$(
        #[$doc]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, DieselNewType)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A new key, to be known before the row is inserted.
            ///
            /// Tables with many inserts have keys that ascend (UUIDv7, which tells when it was made), so that
            /// neighbours in time are neighbours in the index; keys that the public sees are random.
            #[must_use]
            #[expect(clippy::new_without_default, reason = "a default that differs each time surprises")]
            pub fn new() -> Self {
                Self(Uuid::$new())
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}

uuid_key! {
    /// Key of `users`.
    UserId = now_v7;
    /// Key of `auth_tokens`.
    AuthTokenId = now_v7;
    /// Key of `user_subscriptions`.
    SubscriptionId = now_v7;
    /// Key of `subscription_transactions`.
    TransactionId = now_v7;
    /// Key of `account_credits`.
    CreditId = now_v7;
    /// Key of `mcp_table`.
    ServiceId = new_v4;
    /// Key of `mcp_service_table`; stands in the instance's public URL.
    InstanceId = new_v4;
    /// Key of `mcp_credentials`.
    CredentialId = new_v4;
    /// Key of `user_plans`.
    PlanId = new_v4;
    /// Key of `webhook_events`.
    WebhookEventId = now_v7;
    /// Key of `user_billing_details`.
    BillingId = new_v4;
}

/// Key of `token_audit_log`, given out by the database.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, DieselNewType,
)]
#[serde(transparent)]
pub struct AuditId(pub i64);
