//! The tables: a file each, named after the table, with its insert, its changeset and the operations
//! on its row. [The crate's page](crate) says what all operations have in common.

use chrono::TimeDelta;
use diesel::prelude::*;

use crate::ids::UserId;

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

pub use account_credits::{AccountCredit, CreditError, NewAccountCredit, Spent};
pub use auth_tokens::{
    AuthToken, CODE_WINDOW, CodeCheck, IssueError, MAX_CODE_ATTEMPTS, MAX_ISSUED, MAX_SESSIONS,
    REUSE_LEEWAY, Rotation, Session, TokenError,
};
#[cfg(feature = "crypto")]
pub use mcp_credentials::Resealed;
pub use mcp_credentials::{
    CompletedInstance, CredentialError, McpCredential, NewMcpCredential, OauthCompletion,
    OauthTokens, RefreshLease,
};
pub use mcp_service_table::{
    CredentialState, InstanceCalls, InstanceDetails, InstanceError, InstanceFilter,
    InstanceWithCredentials, McpInstance, NewMcpInstance, NotCallable,
};
pub use mcp_table::{McpService, NewMcpService};
pub use subscription_transactions::{
    NewRefund, NewSubscriptionTransaction, PaymentError, SubscriptionTransaction,
    SubscriptionTransactionChangeset,
};
pub use token_audit_log::{AuditFilter, Maintained, NewTokenAudit, TokenAudit};
pub use user_billing_details::{BillingError, Card, NewUserBillingDetails, UserBillingDetails};
pub use user_plans::{Downgrade, PlanError, ProPlan, UserPlan};
pub use user_subscriptions::{
    Applied, GatewayChange, GatewayError, GatewayEvent, GatewayPayment, GatewayPeriod,
    NewUserSubscription, SubscriptionError, Swept, UserSubscription, UserSubscriptionChangeset,
};
pub use users::{
    InvalidEmail, NewUser, Release, ResetError, User, UserChangeset, UserError, canonical_email,
};
pub use webhook_events::{MAX_WEBHOOK_ATTEMPTS, NewWebhookEvent, WebhookError, WebhookEvent};

/// A row that is recorded once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recorded<T> {
    /// This call inserted the row.
    New(T),
    /// The row existed before; it is returned as it is.
    Existing(T),
}

impl<T> Recorded<T> {
    /// The row.
    pub fn into_inner(self) -> T {
        let (Self::New(row) | Self::Existing(row)) = self;
        row
    }
}

/// The currency of a row that names none: the columns' default.
const DEFAULT_CURRENCY: &str = "INR";

/// The longest lease, and the longest pause.
const MAX_LEASE: TimeDelta = TimeDelta::days(365);

/// Whether a lease or pause is of use. Another one might pass the timestamps that a column takes:
/// the server's log would then print the row.
fn is_lease(lease: TimeDelta) -> bool {
    (TimeDelta::zero()..=MAX_LEASE).contains(&lease)
}

/// Locks a user's key before an INSERT that references it.
///
/// The foreign key takes this lock anyway, but only after the new row's unique keys have made
/// others wait: too late in the lock order.
fn lock_user_key(conn: &mut PgConnection, id: UserId) -> QueryResult<()> {
    use crate::schema::users;
    users::table
        .find(id)
        .select(users::id)
        .for_key_share()
        .execute(conn)?;
    Ok(())
}

/// Locks an active user before an INSERT of a row that [`User::anonymise`] deletes: it waits for this
/// lock. Returns `false` if there is no such active user.
fn lock_active_user(conn: &mut PgConnection, id: UserId) -> QueryResult<bool> {
    use crate::schema::users;
    let locked = users::table
        .find(id)
        .filter(users::is_active)
        .select(users::id)
        .for_key_share()
        .execute(conn)?;
    Ok(locked > 0)
}

/// Returns the row that an update by a changeset returned: after an empty changeset the row that
/// `find` reads, and `None` if the row is missing.
fn found<T>(
    updated: QueryResult<Option<T>>,
    find: impl FnOnce() -> QueryResult<Option<T>>,
) -> QueryResult<Option<T>> {
    match updated {
        Ok(None) => find(),
        Err(diesel::NotFound) => Ok(None),
        updated => updated,
    }
}
