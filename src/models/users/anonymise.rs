//! Removal of a person from the database.

use chrono::{DateTime, Utc};
use diesel::dsl::{now, sql};
use diesel::prelude::*;
use diesel::sql_types::Bool;
use serde_json::{Value, json};

use super::{User, anonymised_email};
use crate::enums::{PlanPaymentStatus, PlanType, WebhookStatus};
use crate::ids::{CredentialId, InstanceId, UserId};
use crate::models::UserPlan;
use crate::schema::{
    account_credits, auth_tokens, mcp_credentials, mcp_service_table, subscription_transactions,
    user_billing_details, user_plans, user_subscriptions, users, webhook_events,
};
use crate::secret::SecretText;

impl User {
    /// Removes the person for good and keeps the financial rows; returns `None` if there is no such
    /// user.
    ///
    /// - The user becomes inactive, with the email address `<id>@anonymised.invalid`, and loses
    ///   names, password, gateway customer and last login.
    /// - Instances, credentials, tokens and billing details are deleted. The plan becomes free,
    ///   without gateway ids.
    /// - Subscriptions lose the gateway customer, the reason and the feedback; transactions the order,
    ///   the method and its details, the gateway's status and answer, the description, and the reason
    ///   and code of failure; credits the description.
    /// - Webhook events that are linked with the user lose payload and error message. Those that
    ///   are still open are skipped: process them first.
    ///
    /// What stays:
    /// - Amounts, dates, statuses, and the numbers of receipts and invoices: the books need them.
    /// - The gateway's ids of payments and subscriptions: an event that arrives late or again is
    ///   recognised by them, and not recorded twice.
    /// - The source of a credit, which never changes: a refund is credited once per source.
    /// - Webhook events that no worker has linked: their text names people in too many ways to be
    ///   searched. Pass the user to [`WebhookEvent::mark_processed`], and purge closed events.
    /// - The audit log, which holds only keys, for 90 days.
    /// - The gateway's own records (end the subscription there first), the schema
    ///   `bruhmcp_archive`, and backups.
    ///
    /// Locks the plan, the user (`FOR UPDATE`) and the rows above until the transaction ends. Above
    /// READ COMMITTED it may fail beside other changes to the user's rows: retry it.
    ///
    /// [`WebhookEvent::mark_processed`]: crate::models::WebhookEvent::mark_processed
    pub fn anonymise(conn: &mut PgConnection, id: UserId) -> QueryResult<Option<Self>> {
        conn.transaction(|conn| {
            UserPlan::lock_by_user(conn, id)?;
            let locked = users::table
                .find(id)
                .select(users::id)
                .for_update()
                .first::<UserId>(conn)
                .optional()?;
            if locked.is_none() {
                return Ok(None);
            }
            anonymise_money(conn, id)?;
            diesel::delete(
                user_billing_details::table.filter(user_billing_details::user_id.eq(id)),
            )
            .execute(conn)?;
            delete_instances(conn, id)?;
            diesel::delete(auth_tokens::table.filter(auth_tokens::user_id.eq(id))).execute(conn)?;
            // Only now: a downgrade would switch the instances off before their credentials are
            // locked.
            reset_plan(conn, id)?;
            let user = diesel::update(users::table.find(id))
                .set((
                    users::first_name.eq("Anonymised"),
                    users::last_name.eq(""),
                    users::email.eq(anonymised_email(id)),
                    users::password.eq(None::<SecretText>),
                    users::email_verified.eq(false),
                    users::razorpay_customer_id.eq(None::<&str>),
                    users::last_login_at.eq(None::<DateTime<Utc>>),
                    users::is_active.eq(false),
                ))
                .returning(Self::as_returning())
                .get_result(conn)?;
            anonymise_webhooks(conn, id)?;
            Ok(Some(user))
        })
    }
}

fn anonymise_money(conn: &mut PgConnection, user_id: UserId) -> QueryResult<()> {
    let subscriptions = user_subscriptions::table.filter(user_subscriptions::user_id.eq(user_id));
    diesel::update(subscriptions)
        .set((
            user_subscriptions::razorpay_customer_id.eq(None::<&str>),
            user_subscriptions::cancellation_reason.eq(None::<&str>),
            user_subscriptions::cancellation_feedback.eq(None::<&str>),
        ))
        .execute(conn)?;
    let transactions =
        subscription_transactions::table.filter(subscription_transactions::user_id.eq(user_id));
    diesel::update(transactions)
        .set((
            subscription_transactions::razorpay_order_id.eq(None::<&str>),
            subscription_transactions::gateway_status.eq(None::<&str>),
            subscription_transactions::method.eq(None::<&str>),
            subscription_transactions::method_details_json.eq(None::<Value>),
            subscription_transactions::gateway_response_json.eq(None::<Value>),
            subscription_transactions::description.eq(None::<&str>),
            subscription_transactions::failure_reason.eq(None::<&str>),
            subscription_transactions::failure_code.eq(None::<&str>),
        ))
        .execute(conn)?;
    diesel::update(account_credits::table.filter(account_credits::user_id.eq(user_id)))
        .set(account_credits::description.eq(None::<&str>))
        .execute(conn)?;
    Ok(())
}

fn delete_instances(conn: &mut PgConnection, user_id: UserId) -> QueryResult<()> {
    // The order in which other operations lock them.
    let instances: Vec<InstanceId> = mcp_service_table::table
        .filter(mcp_service_table::user_id.eq(user_id))
        .order((
            mcp_service_table::mcp_service_id,
            mcp_service_table::instance_id,
        ))
        .select(mcp_service_table::instance_id)
        .load(conn)?;
    // The cascade would lock credentials after their instance.
    mcp_credentials::table
        .filter(mcp_credentials::instance_id.eq_any(&instances))
        .order(mcp_credentials::instance_id)
        .select(mcp_credentials::credential_id)
        .for_update()
        .load::<CredentialId>(conn)?;
    for instance in instances {
        diesel::delete(mcp_service_table::table.find(instance)).execute(conn)?;
    }
    Ok(())
}

fn reset_plan(conn: &mut PgConnection, user_id: UserId) -> QueryResult<()> {
    diesel::update(user_plans::table.filter(user_plans::user_id.eq(user_id)))
        .set((
            user_plans::plan_type.eq(PlanType::Free),
            user_plans::max_instances.eq(1),
            user_plans::features.eq(json!({})),
            user_plans::expires_at.eq(None::<DateTime<Utc>>),
            user_plans::subscription_id.eq(None::<&str>),
            user_plans::customer_id.eq(None::<&str>),
            user_plans::payment_status.eq(PlanPaymentStatus::None),
        ))
        .execute(conn)?;
    Ok(())
}

/// Reads only the user's events, by the index on `user_id`.
fn anonymise_webhooks(conn: &mut PgConnection, user_id: UserId) -> QueryResult<()> {
    let linked = webhook_events::table.filter(webhook_events::user_id.eq(user_id));
    diesel::update(linked.filter(sql::<Bool>("processing_status IN ('pending', 'failed')")))
        .set((
            webhook_events::processing_status.eq(WebhookStatus::Skipped),
            webhook_events::processed_at.eq(now),
        ))
        .execute(conn)?;
    diesel::update(linked)
        .set((
            webhook_events::payload.eq(json!({})),
            webhook_events::error_message.eq(None::<&str>),
        ))
        .execute(conn)?;
    Ok(())
}
