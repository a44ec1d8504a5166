//! Rust enums and SQL types: a label is the same word in SQL, serde, `Display` and `FromStr`.

use std::collections::BTreeMap;
use std::fmt::{Debug, Display};
use std::fs;
use std::str::FromStr;

use bruhmcp_db::enums::*;
use bruhmcp_db::schema::sql_types as sql;
use diesel::deserialize::FromSqlRow;
use diesel::dsl::sql as raw;
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::sql_types::{Array, Text};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::difference::assert_same_set;
use crate::support::database;

fn pascal_case(snake_case: &str) -> String {
    let words = snake_case.split('_').map(|word| {
        let (first, rest) = word.split_at(1);
        first.to_uppercase() + rest
    });
    words.collect()
}

/// The source of each enum in `enums.rs`, by the name of its SQL type in `schema.rs`.
fn sources() -> BTreeMap<String, String> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/enums.rs");
    let text = fs::read_to_string(path).unwrap();
    let items = text.split("\n\n").filter_map(|item| {
        let (_, name) = item.split_once("ExistingTypePath = \"crate::schema::sql_types::")?;
        Some((name.split('"').next().unwrap().to_owned(), item.to_owned()))
    });
    items.collect()
}

/// Reads the sources, so a new type is checked without a change here.
#[test]
fn each_sql_enum_has_a_rust_enum_with_its_labels() {
    let labels = database()
        .psql("SELECT typname, enumlabel FROM pg_enum JOIN pg_type ON pg_type.oid = enumtypid")
        .unwrap();
    let expected = labels.lines().map(|line| {
        let (name, label) = line.split_once('|').unwrap();
        format!("{}::{}", pascal_case(name), pascal_case(label))
    });
    let sources = sources();
    let found = sources.iter().flat_map(|(name, source)| {
        let (_, variants) = source.split_once("\npub enum ").unwrap();
        variants.lines().filter_map(move |line| {
            let variant = line.strip_prefix("    ")?.strip_suffix(',')?;
            Some(format!("{name}::{variant}"))
        })
    });
    assert_same_set(expected, found);
    for (name, source) in &sources {
        assert!(
            source.contains("#[serde(rename_all = \"snake_case\")]"),
            "{name} has no serde(rename_all"
        );
    }
}

/// Compares the labels of the SQL type, in their order, with what Rust reads and writes.
fn same_labels<Sql, Rust>(conn: &mut PgConnection, name: &str, all: &[Rust])
where
    Array<Sql>: diesel::sql_types::SingleValue,
    Sql: diesel::sql_types::SqlType + diesel::query_builder::QueryId + 'static,
    Pg: diesel::sql_types::HasSqlType<Sql>,
    Vec<Rust>: FromSqlRow<Array<Sql>, Pg> + diesel::deserialize::FromSql<Array<Sql>, Pg> + 'static,
    Rust: Serialize + DeserializeOwned + Display + FromStr + PartialEq + Debug,
    Rust::Err: Debug,
{
    let range = format!("enum_range(NULL::{name})");
    let loaded: Vec<Rust> = diesel::select(raw::<Array<Sql>>(&range))
        .get_result(conn)
        .unwrap();
    let labels: Vec<String> = diesel::select(raw::<Array<Text>>(&format!("{range}::text[]")))
        .get_result(conn)
        .unwrap();
    assert_eq!(loaded, all, "{name}");
    for (label, value) in labels.iter().zip(all) {
        let json = serde_json::Value::from(label.as_str());
        assert_eq!(&value.to_string(), label);
        assert_eq!(&label.parse::<Rust>().unwrap(), value);
        assert_eq!(serde_json::to_value(value).unwrap(), json);
        assert_eq!(&serde_json::from_value::<Rust>(json).unwrap(), value);
    }
}

macro_rules! same_labels {
    ($conn:expr; $($name:literal $sql:ident $rust:ident)*) => {$(
        same_labels::<sql::$sql, $rust>($conn, $name, $rust::ALL);
    )*};
}

#[test]
fn labels_are_equal_in_sql_and_rust() {
    let database = database();
    let conn = &mut database.connect();
    same_labels! { conn;
        "auth_token_type" AuthTokenType AuthTokenType
        "subscription_plan" SubscriptionPlan SubscriptionPlan
        "subscription_status" SubscriptionStatus SubscriptionStatus
        "billing_cycle" BillingCycle BillingCycle
        "transaction_type" TransactionType TransactionType
        "transaction_status" TransactionStatus TransactionStatus
        "credit_source" CreditSource CreditSource
        "mcp_auth_type" McpAuthType AuthType
        "mcp_oauth_status" McpOauthStatus OauthStatus
        "mcp_instance_status" McpInstanceStatus InstanceStatus
        "token_audit_status" TokenAuditStatus AuditStatus
        "plan_type" PlanType PlanType
        "plan_payment_status" PlanPaymentStatus PlanPaymentStatus
        "payment_gateway" PaymentGateway PaymentGateway
        "webhook_status" WebhookStatus WebhookStatus
    }
}
