//! The rows of the tables. The operations on them need the feature `operations`.

#[path = "account_credits/row.rs"]
mod account_credits;
#[path = "auth_tokens/row.rs"]
mod auth_tokens;
#[path = "mcp_credentials/row.rs"]
mod mcp_credentials;
#[path = "mcp_service_table/row.rs"]
mod mcp_service_table;
#[path = "mcp_table/row.rs"]
mod mcp_table;
#[path = "subscription_transactions/row.rs"]
mod subscription_transactions;
#[path = "token_audit_log/row.rs"]
mod token_audit_log;
#[path = "user_billing_details/row.rs"]
mod user_billing_details;
#[path = "user_plans/row.rs"]
mod user_plans;
#[path = "user_subscriptions/row.rs"]
mod user_subscriptions;
#[path = "users/row.rs"]
mod users;
#[path = "webhook_events/row.rs"]
mod webhook_events;

pub use account_credits::AccountCredit;
pub use auth_tokens::AuthToken;
pub use mcp_credentials::McpCredential;
pub use mcp_service_table::McpInstance;
pub use mcp_table::McpService;
pub use subscription_transactions::SubscriptionTransaction;
pub use token_audit_log::TokenAudit;
pub use user_billing_details::{Card, UserBillingDetails};
pub use user_plans::UserPlan;
pub use user_subscriptions::UserSubscription;
pub use users::User;
pub use webhook_events::WebhookEvent;
