//! The rows of the tables: a file each, named after the table.

mod account_credits;
mod auth_tokens;
mod mcp_credentials;
mod mcp_service_table;
mod mcp_table;
mod subscription_transactions;
mod token_audit_log;
mod user_billing_details;
mod user_plans;
mod user_subscriptions;
mod users;
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
