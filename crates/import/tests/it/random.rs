//! Random rows that the old constraints admit: their import succeeds, and the check holds.

use std::env;
use std::sync::LazyLock;

use bruhmcp_db::import::{DuplicateEmails, LiveSubscription, Options};
use bruhmcp_devdb::Database;
use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use crate::support::{Old, SHAPES, id};

/// A migrated database of each shape, without rows.
static EMPTY: LazyLock<[Database; 2]> = LazyLock::new(|| {
    SHAPES.map(|shape| {
        // A database with a session can't be copied.
        let Old { database, .. } = Old::new(shape, "");
        database
    })
});

/// A table of the archive: its name, and for each column values to choose from. `@table` stands for
/// the key of a row of that table.
type Rows = (
    &'static str,
    &'static [(&'static str, &'static [&'static str])],
);

const TIMES: &[&str] = &[
    "NULL",
    "'2020-01-01'",
    "'2021-06-15 12:00'",
    "'2199-01-01'",
    "'infinity'",
    "'-infinity'",
    "'0044-03-15 BC'",
    "'20000-01-01'",
];
const SOME_TIMES: &[&str] = &[
    "'2020-01-01'",
    "'2021-06-15 12:00'",
    "'2199-01-01'",
    "'infinity'",
];
const COUNTS: &[&str] = &["NULL", "0", "1", "-1", "2147483647"];
const AMOUNTS: &[&str] = &["0", "1", "100", "-100", "2147483647", "-2147483647"];
const FLAGS: &[&str] = &["NULL", "true", "false"];
const IDS: &[&str] = &["NULL", "''", "'id_1'", "'id_2'", "'id_3'", "' id_1'"];
const JSON: &[&str] = &[
    "NULL",
    "'{}'",
    "'[]'",
    "'null'",
    "'\"text\"'",
    "'{\"a\": [1, {\"b\": null}]}'",
    "'[1e999]'",
    "(repeat('[', 120) || repeat(']', 120))::jsonb",
];
const TEXTS: &[&str] = &[
    "NULL",
    "''",
    "' '",
    "'text'",
    "E'a\\nb'",
    "repeat('é', 200)",
    "'{\"a\": 1}'",
    "'{\"a\": \"\\u0000\"}'",
    "'{\"number\": \"4111111111111111\"}'",
    "'[1e999]'",
    "'4111 1111 1111 1111'",
];

const USERS: [Rows; 2] = [
    (
        "users",
        &[
            ("first_name", &["''", "'Ada'", "repeat('é', 255)"]),
            ("last_name", &["''", "'Lovelace'"]),
            (
                "email",
                &[
                    "'ada@example.org'",
                    "'Ada@Example.org'",
                    "' ADA@example.org'",
                    "'bob@bücher.example'",
                    "'bob@xn--bcher-kva.example'",
                    "''",
                    "'nobody'",
                    "'a b@example.org'",
                    "'x@example.org'",
                    "repeat('x', 240) || '@example.org'",
                    "repeat('X', 240) || '@example.org'",
                ],
            ),
            (
                "password",
                &[
                    "NULL",
                    "''",
                    "'plain'",
                    "'$2b$10$abcdefghijklmnopqrstuuABCDEFGHIJKLMNOPQRSTUVWXYZ01234'",
                ],
            ),
            ("email_verified", FLAGS),
            ("razorpay_customer_id", IDS),
            ("created_at", TIMES),
            ("updated_at", TIMES),
            ("last_login_at", TIMES),
            ("is_active", FLAGS),
        ],
    ),
    (
        "users",
        &[
            ("first_name", &["''", "'Ada'"]),
            ("last_name", &["''", "'Lovelace'"]),
            (
                "email",
                &[
                    "'ada@example.org'",
                    "'Ada@Example.org'",
                    "'nobody'",
                    "'x@example.org'",
                ],
            ),
            (
                "password_hash",
                &[
                    "''",
                    "'plain'",
                    "'$2b$10$abcdefghijklmnopqrstuuABCDEFGHIJKLMNOPQRSTUVWXYZ01234'",
                ],
            ),
            ("is_verified", FLAGS),
            ("razorpay_customer_id", IDS),
            ("created_at", TIMES),
            ("updated_at", TIMES),
        ],
    ),
];

const CREDITS: [Rows; 2] = [
    (
        "account_credits",
        &[
            ("user_id", &["@users"]),
            ("amount", AMOUNTS),
            (
                "currency",
                &["NULL", "'INR'", "'inr'", "' usd'", "'rupees'", "''"],
            ),
            (
                "source_type",
                &["NULL", "'refund'", "'downgrade'", "'promotion'"],
            ),
            ("source_id", IDS),
            ("is_used", FLAGS),
            ("used_at", TIMES),
            ("expires_at", TIMES),
            ("created_at", TIMES),
            ("updated_at", TIMES),
        ],
    ),
    (
        "account_credits",
        &[
            ("user_id", &["@users"]),
            ("credit_amount", &["1", "100", "2147483647"]),
            ("remaining_amount", &["0", "1", "40", "100"]),
            (
                "credit_type",
                &["'refund'", "'downgrade'", "'promotional'", "'adjustment'"],
            ),
            ("subscription_id", &["NULL", "@user_subscriptions"]),
            (
                "source_transaction_id",
                &["NULL", "@subscription_transactions"],
            ),
            ("is_active", FLAGS),
            ("applied_count", &["NULL", "0", "3"]),
            ("last_applied_at", TIMES),
            ("expires_at", TIMES),
            ("created_at", TIMES),
            ("updated_at", TIMES),
        ],
    ),
];

/// The tables of both shapes before the credits.
const BEFORE: [Rows; 2] = [
    (
        "user_subscriptions",
        &[
            ("user_id", &["@users"]),
            ("plan_code", &["'free'", "'pro'"]),
            ("razorpay_subscription_id", IDS),
            ("razorpay_customer_id", IDS),
            (
                "status",
                &[
                    "'active'",
                    "'past_due'",
                    "'paused'",
                    "'cancelled'",
                    "'completed'",
                    "'created'",
                ],
            ),
            ("billing_cycle", &["NULL", "'monthly'", "'yearly'"]),
            ("current_period_start", SOME_TIMES),
            ("current_period_end", SOME_TIMES),
            ("trial_start", TIMES),
            ("trial_end", TIMES),
            ("cancelled_at", TIMES),
            ("pause_count", COUNTS),
            ("discount_amount", AMOUNTS),
            ("total_amount", AMOUNTS),
            ("grace_period_days", COUNTS),
            ("created_at", TIMES),
            ("updated_at", TIMES),
        ],
    ),
    (
        "subscription_transactions",
        &[
            ("user_id", &["@users"]),
            ("subscription_id", &["NULL", "@user_subscriptions"]),
            ("razorpay_payment_id", IDS),
            ("receipt_number", IDS),
            (
                "transaction_type",
                &[
                    "'subscription'",
                    "'refund'",
                    "'refund'",
                    "'adjustment'",
                    "'fee'",
                ],
            ),
            ("amount", AMOUNTS),
            ("net_amount", AMOUNTS),
            ("tax_amount", &["NULL", "0", "-1", "18"]),
            (
                "currency",
                &["NULL", "'INR'", "'inr'", "' usd'", "'rupees'", "''"],
            ),
            ("exchange_rate", &["NULL", "1", "0.5", "'NaN'"]),
            (
                "status",
                &[
                    "'created'",
                    "'captured'",
                    "'captured'",
                    "'refunded'",
                    "'failed'",
                    "'cancelled'",
                ],
            ),
            ("method_details_json", TEXTS),
            ("gateway_response_json", TEXTS),
            ("retry_count", COUNTS),
            (
                "parent_transaction_id",
                &[
                    "NULL",
                    "@subscription_transactions",
                    "@subscription_transactions",
                ],
            ),
            ("processed_at", TIMES),
            ("created_at", TIMES),
            ("updated_at", TIMES),
        ],
    ),
];

const AFTER: [Rows; 4] = [
    (
        "mcp_table",
        &[
            (
                "mcp_service_name",
                &["'figma'", "'Figma'", "'google drive'", "'-'", "''"],
            ),
            ("display_name", &["''", "'Figma'"]),
            ("port", &["1", "0", "-1", "70000", "49280", "443"]),
            ("type", &["'oauth'", "'api_key'"]),
            ("is_active", FLAGS),
            ("total_instances_created", COUNTS),
            ("created_at", TIMES),
        ],
    ),
    (
        "mcp_service_table",
        &[
            ("user_id", &["@users"]),
            ("mcp_service_id", &["@mcp_table"]),
            (
                "oauth_status",
                &[
                    "NULL",
                    "'completed'",
                    "'completed'",
                    "'pending'",
                    "'failed'",
                ],
            ),
            (
                "status",
                &["NULL", "'active'", "'active'", "'inactive'", "'expired'"],
            ),
            ("expires_at", TIMES),
            ("last_used_at", TIMES),
            ("usage_count", COUNTS),
            ("custom_name", &["NULL", "''", "repeat('é', 255)"]),
            ("renewed_count", COUNTS),
            ("version", COUNTS),
            ("last_modified", TIMES),
            ("created_at", TIMES),
            ("updated_at", TIMES),
        ],
    ),
    (
        "mcp_credentials",
        &[
            ("instance_id", &["@mcp_service_table"]),
            ("api_key", &["NULL", "NULL", "''", "'figd'"]),
            ("client_id", &["NULL", "''", "'client'"]),
            ("client_secret", &["NULL", "''", "repeat('é', 500)"]),
            ("access_token", &["NULL", "''", "repeat('x', 1000)"]),
            ("refresh_token", &["NULL", "''", "'refresh'"]),
            (
                "oauth_status",
                &[
                    "NULL",
                    "'completed'",
                    "'completed'",
                    "'pending'",
                    "'failed'",
                    "'expired'",
                ],
            ),
            ("oauth_completed_at", TIMES),
            ("oauth_state", IDS),
            ("token_expires_at", TIMES),
            ("token_scope", TEXTS),
            ("version", COUNTS),
            ("created_at", TIMES),
            ("updated_at", TIMES),
        ],
    ),
    (
        "token_audit_log",
        &[
            ("instance_id", &["@mcp_service_table"]),
            ("user_id", &["NULL", "@users"]),
            ("operation", &["''", "'refresh'"]),
            ("status", &["'success'", "'failed'", "'info'", "''"]),
            ("metadata", JSON),
            ("created_at", TIMES),
        ],
    ),
];

/// The tables of the first shape only.
const FIRST: [Rows; 3] = [
    (
        "user_plans",
        &[
            ("user_id", &["@users"]),
            ("plan_type", &["'free'", "'pro'"]),
            ("max_instances", &["NULL", "1"]),
            ("features", JSON),
            ("expires_at", TIMES),
            ("subscription_id", IDS),
            ("customer_id", IDS),
            ("payment_status", &["NULL", "'none'", "'active'"]),
            ("created_at", TIMES),
            ("updated_at", TIMES),
        ],
    ),
    (
        "user_billing_details",
        &[
            ("user_id", &["@users"]),
            ("address_line1", &["''", "'Road 1'"]),
            ("city", &["''", "'Pune'"]),
            ("state", &["''", "'MH'"]),
            ("country", &["''", "'IN'"]),
            ("zip_code", &["''", "'1'"]),
            (
                "cards",
                &[
                    "NULL",
                    "'[]'",
                    "'null'",
                    "'{}'",
                    "'[1, null, [], {}]'",
                    r#"'[{"id": "a", "token": "t", "brand": "visa", "last4": "4242", "exp_month": 1, "exp_year": 2030}]'"#,
                    r#"'[{"id": "a", "token": "t", "number": "4111111111111111", "exp_month": "02", "exp_year": "2030"}]'"#,
                    r#"'[{"id": "a", "token": "4111111111111111", "last4": "4242", "exp_month": 1, "exp_year": 2030}]'"#,
                    r#"'[{"id": 1, "token": "t", "last4": 4242, "exp_month": 1.0, "exp_year": 2030}]'"#,
                    r#"'[{"id": ["a"], "token": {"x": 1}, "brand": null, "last4": "4242", "exp_month": 13, "exp_year": 1}]'"#,
                ],
            ),
            ("default_card_id", &["NULL", "''", "'a'", "'b'"]),
            ("created_at", TIMES),
            ("updated_at", TIMES),
        ],
    ),
    (
        "webhook_events",
        &[
            (
                "external_event_id",
                &["''", "'evt_1'", "'evt_2'", "'pay_1'", "' id'"],
            ),
            ("event_type", &["''", "'payment.captured'"]),
            ("payment_gateway", &["'stripe'", "'razorpay'"]),
            ("processed_at", TIMES),
            (
                "payload",
                &[
                    "'{}'",
                    "'[1e999]'",
                    "'{\"id\": \"evt_1\"}'",
                    "'{\"id\": \"evt_2\"}'",
                ],
            ),
            (
                "processing_status",
                &["NULL", "'pending'", "'processed'", "'failed'", "'skipped'"],
            ),
            ("created_at", TIMES),
        ],
    ),
];

fn key_of(table: &str) -> &'static str {
    match table {
        "mcp_table" => "mcp_service_id",
        "mcp_service_table" => "instance_id",
        "mcp_credentials" => "credential_id",
        "token_audit_log" => "audit_id",
        "user_plans" => "plan_id",
        "user_billing_details" => "billing_id",
        "webhook_events" => "event_id",
        _ => "id",
    }
}

/// Inserts rows that follow from `entropy`; those that the old system would refuse are left out.
fn fill(conn: &mut PgConnection, shape: usize, entropy: &[u16]) {
    let mut tables = vec![USERS[shape]];
    tables.extend(BEFORE);
    tables.push(CREDITS[shape]);
    tables.extend(AFTER);
    if shape == 0 {
        // The plans before the instances, as in the old system.
        tables.extend(FIRST);
    }
    let mut entropy = entropy.iter().copied().cycle();
    let mut draw = |below: usize| usize::from(entropy.next().unwrap_or_default()) % below.max(1);
    conn.batch_execute("BEGIN; SET LOCAL search_path = bruhmcp_archive")
        .unwrap();
    for (table, columns) in tables {
        for row in 0..6 {
            let mut names = vec![key_of(table)];
            let own = if table == "token_audit_log" {
                (row + 1).to_string()
            } else {
                format!("'{}'", id(row))
            };
            let mut values = vec![own];
            for (name, choices) in columns {
                names.push(name);
                let choice = choices[draw(choices.len())];
                values.push(match choice.strip_prefix('@') {
                    Some(_) => format!("'{}'", id(u32::try_from(draw(6)).unwrap())),
                    None => choice.to_owned(),
                });
            }
            let insert = format!(
                "SAVEPOINT row; INSERT INTO {table} ({}) VALUES ({})",
                names.join(", "),
                values.join(", ")
            );
            if conn.batch_execute(&insert).is_err() {
                conn.batch_execute("ROLLBACK TO row").unwrap();
            }
        }
    }
    conn.batch_execute("COMMIT").unwrap();
}

fn holds(shape: usize, entropy: &[u16]) -> Result<(), TestCaseError> {
    let mut old = Old::copy_of(&EMPTY[shape]);
    fill(&mut old.conn, shape, entropy);
    let mut options = Options::default();
    if entropy[0] % 2 == 0 {
        options.timezone = "Asia/Kolkata".to_owned();
        options.duplicate_emails = DuplicateEmails::Suffix;
        options.live_subscription = LiveSubscription::Paid;
    }
    let promised = old
        .preflight(&options)
        .map_err(|error| TestCaseError::fail(error.to_string()))?;
    let report = old
        .import(&options)
        .map_err(|error| TestCaseError::fail(error.to_string()))?;
    prop_assert_eq!(&promised.tables, &report.tables);
    let refused = report.tables.iter().flat_map(|table| table.reasons.keys());
    let refused: Vec<_> = refused
        .filter(|code| code.starts_with("refused:"))
        .collect();
    prop_assert!(refused.is_empty(), "{:?}", refused);
    let check = old.check();
    prop_assert!(check.holds(), "{:?}", check.differences);
    Ok(())
}

/// `BRUHMCP_IMPORT_CASES`: how many.
#[test]
fn whatever_the_old_system_had_is_imported() {
    let cases = env::var("BRUHMCP_IMPORT_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok());
    let mut runner = TestRunner::new(Config {
        cases: cases.unwrap_or(16),
        failure_persistence: None,
        max_shrink_iters: 40,
        ..Config::default()
    });
    let found = runner.run(&(0..2_usize, vec(any::<u16>(), 600)), |(shape, entropy)| {
        holds(shape, &entropy)
    });
    found.unwrap_or_else(|error| panic!("{error}"));
}
