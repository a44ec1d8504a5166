//! Each Rust enum has the labels of its SQL type, no more and no fewer.

use bruhmcp_db::enums::*;
use bruhmcp_db::schema::sql_types as sql;
use diesel::deserialize::FromSqlRow;
use diesel::dsl::sql as raw;
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::sql_types::Array;
use serde::Serialize;

use crate::support::database;

/// Loads every label of the SQL type, and compares how serde writes them with how the database does.
fn same_labels<Sql, Rust>(conn: &mut PgConnection, name: &str, variants: usize)
where
    Array<Sql>: diesel::sql_types::SingleValue,
    Sql: diesel::sql_types::SqlType + diesel::query_builder::QueryId + 'static,
    Pg: diesel::sql_types::HasSqlType<Sql>,
    Vec<Rust>: FromSqlRow<Array<Sql>, Pg> + diesel::deserialize::FromSql<Array<Sql>, Pg> + 'static,
    Rust: Serialize,
{
    let values: Vec<Rust> = diesel::select(raw::<Array<Sql>>(&format!("enum_range(NULL::{name})")))
        .get_result(conn)
        .unwrap();
    let labels: Vec<String> = diesel::select(raw::<Array<diesel::sql_types::Text>>(&format!(
        "enum_range(NULL::{name})::text[]"
    )))
    .get_result(conn)
    .unwrap();
    let written: Vec<String> = values
        .iter()
        .map(|value| {
            serde_json::to_value(value)
                .unwrap()
                .as_str()
                .unwrap()
                .to_owned()
        })
        .collect();
    assert_eq!(written, labels, "{name}");
    assert_eq!(labels.len(), variants, "{name}");
}

/// The number of variants, by a match that doesn't compile when one is missing here.
macro_rules! same_labels {
    ($conn:expr; $($name:literal $sql:ident $rust:ident { $($variant:ident)* })*) => {$(
        let number = |value: $rust| match value { $($rust::$variant => (),)* };
        let variants = [$($rust::$variant),*];
        variants.into_iter().for_each(number);
        same_labels::<sql::$sql, $rust>($conn, $name, variants.len());
    )*};
}

#[test]
fn enums_equal_the_database() {
    let database = database();
    let conn = &mut database.connect();
    same_labels! { conn;
        "auth_token_type" AuthTokenType AuthTokenType { EmailOtp PasswordReset EmailVerification Refresh EmailChangePending }
        "subscription_plan" SubscriptionPlan SubscriptionPlan { Free Pro Plus }
        "subscription_status" SubscriptionStatus SubscriptionStatus {
            Created Authenticated Active PastDue Cancelled Completed Paused Halted Upgraded Replaced
        }
        "billing_cycle" BillingCycle BillingCycle { Monthly Yearly }
        "transaction_type" TransactionType TransactionType { Subscription Addon Refund Adjustment Fee }
        "transaction_status" TransactionStatus TransactionStatus {
            Created Authorized Captured Refunded Failed Cancelled
        }
        "credit_source" CreditSource CreditSource { Refund Adjustment Promotion Downgrade }
        "mcp_auth_type" McpAuthType AuthType { ApiKey Oauth }
        "mcp_oauth_status" McpOauthStatus OauthStatus { Pending Completed Failed Expired }
        "mcp_instance_status" McpInstanceStatus InstanceStatus { Active Inactive Expired }
        "token_audit_status" TokenAuditStatus AuditStatus { Success Failure Pending Warning }
        "plan_type" PlanType PlanType { Free Pro }
        "plan_payment_status" PlanPaymentStatus PlanPaymentStatus { None Active Cancelled Failed PastDue }
        "payment_gateway" PaymentGateway PaymentGateway { Stripe Razorpay }
        "webhook_status" WebhookStatus WebhookStatus { Pending Processed Failed Skipped }
    }
    let types = database
        .psql("SELECT count(*) FROM pg_type WHERE typtype = 'e'")
        .unwrap();
    assert_eq!(types, "15\n");
}
