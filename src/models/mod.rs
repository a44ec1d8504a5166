//! The tables: a file each, named after the table, with its row, its insert, its changeset and its operations.
//!
//! All operations take the connection first and work inside a transaction of the caller's as well as alone.

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

pub use account_credits::{AccountCredit, AccountCreditChangeset, NewAccountCredit};
pub use auth_tokens::{
    AuthToken, CodeCheck, ConsumeError, MAX_CODE_ATTEMPTS, NewAuthToken, Rotation,
};
pub use mcp_credentials::{McpCredential, McpCredentialChangeset, NewMcpCredential};
pub use mcp_service_table::{
    CredentialState, InstanceDetails, InstanceError, InstanceFilter, McpInstance,
    McpInstanceChangeset, NewMcpInstance, RenameError,
};
pub use mcp_table::{McpService, McpServiceChangeset, NewMcpService, Registered};
pub use subscription_transactions::{
    NewSubscriptionTransaction, SubscriptionTransaction, SubscriptionTransactionChangeset,
};
pub use token_audit_log::{NewTokenAudit, TokenAudit};
pub use user_billing_details::{
    NewUserBillingDetails, UserBillingDetails, UserBillingDetailsChangeset,
};
pub use user_plans::{Downgrade, NewUserPlan, ProPlan, UpgradeError, UserPlan, UserPlanChangeset};
pub use user_subscriptions::{NewUserSubscription, UserSubscription, UserSubscriptionChangeset};
pub use users::{EmailError, InvalidEmail, NewUser, User, UserChangeset, canonical_email};
pub use webhook_events::{NewWebhookEvent, WebhookEvent, WebhookEventChangeset};
