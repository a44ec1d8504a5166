//! Removal of a person from the database.

use chrono::{DateTime, Utc};
use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel::sql_types::{Array, Text};
use serde_json::{Value, json};

use super::{User, anonymised_email};
use crate::enums::{PlanPaymentStatus, PlanType};
use crate::ids::{CredentialId, InstanceId, UserId};
use crate::models::UserPlan;
use crate::schema::{
    account_credits, auth_tokens, mcp_credentials, mcp_service_table, subscription_transactions,
    user_billing_details, user_plans, user_subscriptions, users,
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
    /// - Subscriptions lose the gateway customer, the reason and the feedback; transactions the
    ///   gateway's answer, the method details, the description and the reason of failure; credits
    ///   the description. Amounts, dates, statuses and the numbers of payments, orders, receipts
    ///   and invoices stay.
    /// - Processed and skipped webhook events that name the email address or a gateway customer
    ///   lose their payload. This reads the whole table. Process open events first: they keep
    ///   theirs.
    ///
    /// Not touched: the gateway's own records (end the subscription there first), the audit log (it
    /// holds only keys, for 90 days), the schema `bruhmcp_archive`, and backups.
    ///
    /// Locks the plan, the user (`FOR UPDATE`) and the rows above until the transaction ends. Call
    /// it at READ COMMITTED: at SERIALIZABLE it needs retries, because it reads all webhook events.
    pub fn anonymise(conn: &mut PgConnection, id: UserId) -> QueryResult<Option<Self>> {
        conn.transaction(|conn| {
            lock_out_other_calls(conn)?;
            let plan = UserPlan::lock_by_user(conn, id)?;
            let person = users::table
                .find(id)
                .select(Self::as_select())
                .for_update()
                .first(conn)
                .optional()?;
            let Some(person) = person else {
                return Ok(None);
            };
            let mut names = anonymise_money(conn, id)?;
            names.push(person.email);
            names.extend(person.razorpay_customer_id);
            names.extend(plan.and_then(|plan| plan.customer_id));
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
            anonymise_webhooks(conn, &names)?;
            Ok(Some(user))
        })
    }
}

/// At SERIALIZABLE, makes concurrent calls run one after another: each reads and changes
/// `webhook_events`, so of two that overlap one fails. Neither statement takes a snapshot, so the
/// one that waits sees what the other has committed.
fn lock_out_other_calls(conn: &mut PgConnection) -> QueryResult<()> {
    let isolation = diesel::sql_query("SHOW transaction_isolation").get_result::<Setting>(conn)?;
    if isolation.transaction_isolation == "serializable" {
        // Conflicts with itself, but not with those who read or write the table.
        conn.batch_execute("LOCK TABLE webhook_events IN SHARE UPDATE EXCLUSIVE MODE")?;
    }
    Ok(())
}

#[derive(QueryableByName)]
struct Setting {
    #[diesel(sql_type = Text)]
    transaction_isolation: String,
}

/// Returns the gateway customers of the subscriptions.
fn anonymise_money(conn: &mut PgConnection, user_id: UserId) -> QueryResult<Vec<String>> {
    let subscriptions = user_subscriptions::table.filter(user_subscriptions::user_id.eq(user_id));
    let customers = subscriptions
        .filter(user_subscriptions::razorpay_customer_id.is_not_null())
        .select(user_subscriptions::razorpay_customer_id.assume_not_null())
        .load(conn)?;
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
            subscription_transactions::method_details_json.eq(None::<Value>),
            subscription_transactions::gateway_response_json.eq(None::<Value>),
            subscription_transactions::description.eq(None::<&str>),
            subscription_transactions::failure_reason.eq(None::<&str>),
        ))
        .execute(conn)?;
    diesel::update(account_credits::table.filter(account_credits::user_id.eq(user_id)))
        .set(account_credits::description.eq(None::<&str>))
        .execute(conn)?;
    Ok(customers)
}

fn delete_instances(conn: &mut PgConnection, user_id: UserId) -> QueryResult<()> {
    // Registry order: the order in which the counters of mcp_table are locked at commit.
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

/// Empties the payload of each closed event in which a string is one of `names`, in any case.
fn anonymise_webhooks(conn: &mut PgConnection, names: &[String]) -> QueryResult<()> {
    // Not the DSL: it has no set-returning function in FROM. Locked in the order of the key,
    // because an event can name two users who are anonymised at once.
    diesel::sql_query(
        r#"WITH naming AS MATERIALIZED (
               SELECT event_id
                 FROM webhook_events
                WHERE processing_status IN ('processed', 'skipped')
                  AND EXISTS (
                          SELECT
                            FROM jsonb_path_query(payload, 'strict $.** ? (@.type() == "string")') AS text
                           WHERE lower(text #>> '{}') IN (SELECT lower(name) FROM unnest($1) AS name)
                      )
                ORDER BY event_id
                  FOR UPDATE
           )
           UPDATE webhook_events
              SET payload = '{}', error_message = NULL
             FROM naming
            WHERE webhook_events.event_id = naming.event_id"#,
    )
    .bind::<Array<Text>, _>(names)
    .execute(conn)?;
    Ok(())
}
