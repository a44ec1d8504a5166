//! What the statements of operations read. It must not grow with the table, only with what they
//! return or change: each is run on tables of 10,000 rows and of ten times as many.
//!
//! `BRUHMCP_BUFFERS_ROWS` sets another size for the large tables, such as 1000000.

use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::{env, fs, thread};

use bruhmcp_db::enums::AuthTokenType;
use bruhmcp_db::ids::{InstanceId, UserId};
use bruhmcp_db::models::{
    AccountCredit, AuditFilter, AuthToken, InstanceFilter, McpCredential, McpInstance,
    SubscriptionTransaction, TokenAudit, User, UserPlan, UserSubscription, WebhookEvent,
};
use bruhmcp_db::schema::users;
use bruhmcp_db::{Cursor, Page};
use bruhmcp_devdb::Server;
use chrono::{DateTime, TimeDelta, Utc};
use diesel::connection::SimpleConnection;
use diesel::dsl::{select, sql};
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_types::Uuid as SqlUuid;
use serde_json::Value;
use uuid::Uuid;

use crate::fixtures::RING;
use crate::support::{self, TestDatabase};

/// By how many buffers a statement may grow for each row that it returns, or for none: an index that
/// is ten times as large can be a level higher.
const READ: i64 = 3;

/// The same for each row that it changes, which is in several indexes.
const WRITTEN: i64 = 10;

/// One row per user in each table; `{due}` tells whether all of them are due. Every second instance
/// waits for its user. Where nothing is due, the other half of the credentials has just failed to be
/// refreshed, and half of the events wait after a failure.
const ROWS: &str = r#"
SET session_replication_role = replica;
CREATE FUNCTION key(letter text, n bigint) RETURNS uuid LANGUAGE sql IMMUTABLE
    RETURN md5(letter || n)::uuid;
INSERT INTO mcp_table (mcp_service_id, mcp_service_name, display_name, port, type)
SELECT key('m', n), 's' || n, 'S', n, 'oauth' FROM generate_series(1, 50) n;
INSERT INTO users (id, first_name, last_name, email, created_at)
SELECT key('u', n), 'a', '', n || '@example.org', now() - n * interval '1 second'
  FROM generate_series(1, {rows}) n;
INSERT INTO user_plans (user_id, plan_type, expires_at)
SELECT key('u', n), 'pro', {end} FROM generate_series(1, {rows}) n;
INSERT INTO mcp_service_table (instance_id, user_id, mcp_service_id, oauth_status, expires_at)
SELECT key('i', n), key('u', n), key('m', 1 + n % 50),
       CASE n % 2 WHEN 0 THEN 'pending' ELSE 'completed' END::mcp_oauth_status,
       {end}
  FROM generate_series(1, {rows}) n;
INSERT INTO mcp_credentials (
    credential_id, instance_id, client_id, client_secret, access_token, refresh_token,
    token_expires_at, oauth_status, oauth_completed_at, refresh_leased_until, updated_at
)
SELECT key('k', n), key('i', n), 'c', s, CASE WHEN c THEN s END, CASE WHEN c THEN s END,
       CASE WHEN c THEN now() END, CASE WHEN c THEN 'completed' ELSE 'pending' END::mcp_oauth_status,
       CASE WHEN c THEN now() END, CASE WHEN c AND NOT {due} THEN now() + interval '1 hour' END, {begin}
  FROM (SELECT n, n % 2 = 1 AS c, decode('0201' || repeat('02', 40), 'hex') AS s
          FROM generate_series(1, {rows}) n) AS n;
INSERT INTO auth_tokens (
    user_id, token, type, created_at, expires_at, family_id, session_expires_at
)
SELECT key('u', n), decode(md5('a' || n) || md5('b' || n), 'hex'), 'refresh',
       now() - interval '10 days', {end}, key('f', n), now() + interval '1 day'
  FROM generate_series(1, {rows}) n;
INSERT INTO user_subscriptions (
    id, user_id, status, cancel_at_period_end, resume_at, next_billing_date,
    current_period_start, current_period_end, created_at
)
SELECT key('s', n), key('u', n),
       ('{active,past_due,paused,created}'::subscription_status[])[1 + n % 4], n % 8 = 0,
       {end}, {end}, now() - interval '60 days',
       {end} - CASE WHEN {due} THEN 9 ELSE 0 END * interval '1 day', {begin} - interval '29.5 days'
  FROM generate_series(1, {rows}) n;
INSERT INTO subscription_transactions (
    id, user_id, subscription_id, amount, net_amount, status, created_at
)
SELECT key('x', n), key('u', n), key('s', n), 1, 1,
       CASE n % 4 WHEN 0 THEN 'created' ELSE 'captured' END::transaction_status, {begin}
  FROM generate_series(1, {rows}) n;
INSERT INTO account_credits (user_id, amount) SELECT key('u', n), 1 FROM generate_series(1, {rows}) n;
-- Closed lately, waiting after a failure, in their last attempt.
INSERT INTO webhook_events (
    event_id, external_event_id, event_type, payment_gateway, payload, processing_status,
    processed_at, attempts, available_at, user_id
)
SELECT key('w', n), 'evt_' || n, 'payment.captured', 'razorpay', '{}',
       CASE n % 2 WHEN 0 THEN 'processed' ELSE 'failed' END::webhook_status,
       {begin}, CASE n % 4 WHEN 1 THEN 10 ELSE 1 END, {end}, key('u', n)
  FROM generate_series(1, {rows}) n;
UPDATE mcp_table SET total_instances_created = {rows}, active_instances_count = {rows};
INSERT INTO user_billing_details (user_id, address_line1, city, state, country, zip_code)
SELECT key('u', n), '1', 'c', 's', 'c', '1' FROM generate_series(1, {rows}) n;
INSERT INTO token_audit_log (instance_id, user_id, operation, status, created_at)
SELECT key('i', n), key('u', n), 'call', 'success', now() - n % 80 * interval '1 day'
  FROM generate_series(1, {rows}) n;
SELECT maintain_token_audit_log();
"#;

/// The tables that `ROWS` leaves empty, after ANALYZE.
const EMPTY: &str = "SELECT relname FROM pg_class
    WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
      AND relname <> '__diesel_schema_migrations' AND reltuples = 0";

/// `n` tells one run of an operation from the next.
type Operation = fn(&mut PgConnection, n: i64);

const OPERATIONS: &[(&str, Operation)] = &[
    ("McpInstance::expire_due", |conn, _| {
        McpInstance::expire_due(conn, 10).unwrap();
    }),
    ("McpInstance::list_abandoned", |conn, _| {
        McpInstance::list_abandoned(conn, TimeDelta::hours(1), 10).unwrap();
    }),
    ("McpInstance::purge_abandoned", |conn, n| {
        let ids = [2 * n, 2 * n + 100].map(|n| InstanceId(key(conn, "i", n)));
        McpInstance::purge_abandoned(conn, &ids, TimeDelta::hours(1)).unwrap();
    }),
    ("McpInstance::list_by_user", |conn, n| {
        let (user, page) = (user(conn, n), Page::first(10));
        McpInstance::list_by_user(conn, user, InstanceFilter::default(), page).unwrap();
    }),
    ("McpInstance::count_active", |conn, n| {
        let user = user(conn, n);
        McpInstance::count_active(conn, user).unwrap();
    }),
    ("McpCredential::claim_due", |conn, _| {
        let due = Utc::now() + TimeDelta::minutes(10);
        McpCredential::claim_due(conn, due, TimeDelta::minutes(1), 10).unwrap();
    }),
    ("McpCredential::reseal", |conn, _| {
        McpCredential::reseal(conn, &RING, None, 10).unwrap();
    }),
    ("UserPlan::expire_due", |conn, _| {
        UserPlan::expire_due(conn).unwrap();
    }),
    ("User::list", |conn, _| {
        User::list(conn, Page::first(10)).unwrap();
    }),
    ("User::list, a late page", |conn, _| {
        let oldest: (DateTime<Utc>, UserId) = users::table
            .order(users::created_at)
            .select((users::created_at, users::id))
            .offset(1_000)
            .first(conn)
            .unwrap();
        let (created_at, id) = oldest;
        User::list(conn, Page::after(Cursor { created_at, id }, 10)).unwrap();
    }),
    ("User::export", |conn, n| {
        let user = user(conn, n);
        User::export(conn, user).unwrap();
    }),
    ("User::anonymise", |conn, n| {
        let user = user(conn, 1000 + n);
        User::anonymise(conn, user).unwrap();
    }),
    ("User::release_unverified", |conn, n| {
        let email = format!("{}@example.org", 2000 + n);
        User::release_unverified(conn, &email, TimeDelta::hours(1)).unwrap();
    }),
    ("AuthToken::list_by_user", |conn, n| {
        let (user, page) = (user(conn, n), Page::first(10));
        AuthToken::list_by_user(conn, user, AuthTokenType::Refresh, page).unwrap();
    }),
    ("AuthToken::list_sessions", |conn, n| {
        let user = user(conn, n);
        AuthToken::list_sessions(conn, user).unwrap();
    }),
    ("AuthToken::count_issued_since", |conn, n| {
        let (user, since) = (user(conn, n), Utc::now() - TimeDelta::hours(1));
        AuthToken::count_issued_since(conn, user, AuthTokenType::Refresh, since).unwrap();
    }),
    ("AuthToken::revoke_all", |conn, n| {
        let user = user(conn, n);
        AuthToken::revoke_all(conn, user, None).unwrap();
    }),
    ("AuthToken::purge", |conn, _| {
        AuthToken::purge(conn, TimeDelta::hours(1), 10).unwrap();
    }),
    ("UserSubscription::list_by_user", |conn, n| {
        let (user, page) = (user(conn, n), Page::first(10));
        UserSubscription::list_by_user(conn, user, page).unwrap();
    }),
    ("UserSubscription::claim_due", |conn, _| {
        UserSubscription::claim_due(conn, 10).unwrap();
    }),
    ("UserSubscription::sweep", |conn, _| {
        UserSubscription::sweep(conn).unwrap();
    }),
    ("SubscriptionTransaction::list_by_user", |conn, n| {
        let (user, page) = (user(conn, n), Page::first(10));
        SubscriptionTransaction::list_by_user(conn, user, page).unwrap();
    }),
    ("SubscriptionTransaction::list_stuck", |conn, _| {
        let before = Utc::now() - TimeDelta::hours(1);
        SubscriptionTransaction::list_stuck(conn, before, 10).unwrap();
    }),
    ("AccountCredit::balance", |conn, n| {
        let user = user(conn, n);
        AccountCredit::balance(conn, user, "INR").unwrap();
    }),
    ("AccountCredit::list_by_user", |conn, n| {
        let (user, page) = (user(conn, n), Page::first(10));
        AccountCredit::list_by_user(conn, user, page).unwrap();
    }),
    ("TokenAudit::list, of an instance", |conn, n| {
        let instance_id = Some(InstanceId(key(conn, "i", n)));
        let filter = AuditFilter {
            instance_id,
            ..AuditFilter::default()
        };
        TokenAudit::list(conn, filter, Page::first(10)).unwrap();
    }),
    ("TokenAudit::list, of a user", |conn, n| {
        let user_id = Some(user(conn, n));
        let filter = AuditFilter {
            user_id,
            ..AuditFilter::default()
        };
        TokenAudit::list(conn, filter, Page::first(10)).unwrap();
    }),
    ("TokenAudit::list, the newest", |conn, _| {
        TokenAudit::list(conn, AuditFilter::default(), Page::first(10)).unwrap();
    }),
    ("WebhookEvent::claim_due", |conn, _| {
        WebhookEvent::claim_due(conn, TimeDelta::minutes(1), 10).unwrap();
    }),
    ("WebhookEvent::list_dead", |conn, _| {
        WebhookEvent::list_dead(conn, 10).unwrap();
    }),
    ("WebhookEvent::purge", |conn, _| {
        let before = Utc::now() - TimeDelta::hours(1);
        support::as_admin(conn, |conn| WebhookEvent::purge(conn, before, 10)).unwrap();
    }),
];

/// Often enough for PostgreSQL to consider a generic plan.
const RUNS: i64 = 7;

fn key(conn: &mut PgConnection, letter: &str, n: i64) -> Uuid {
    let key = format!("md5('{letter}{n}')::uuid");
    select(sql::<SqlUuid>(&key)).get_result(conn).unwrap()
}

fn user(conn: &mut PgConnection, n: i64) -> UserId {
    UserId(key(conn, "u", n))
}

/// What a statement did.
struct Statement {
    text: String,
    buffers: i64,
    /// Rows that it returned or changed.
    rows: i64,
    writes: bool,
    seq_scans: Vec<String>,
}

impl Statement {
    fn of(logged: &Value) -> Self {
        let plan = &logged["Plan"];
        let writes = plan["Node Type"] == "ModifyTable";
        // Without RETURNING, the node itself has none.
        let parts = plan["Plans"].as_array().into_iter().flatten();
        let written = parts.filter(|_| writes).map(rows);
        let rows = written.max().unwrap_or(0).max(rows(plan));
        let mut seq_scans = Vec::new();
        find_seq_scans(plan, &mut seq_scans);
        Self {
            text: logged["Query Text"].as_str().unwrap_or_default().into(),
            buffers: buffers(plan),
            rows,
            writes,
            seq_scans,
        }
    }
}

/// A float from PostgreSQL 18 on.
fn rows(plan: &Value) -> i64 {
    let rows = &plan["Actual Rows"];
    rows.as_i64()
        .unwrap_or_else(|| rows.to_string().split('.').next().unwrap().parse().unwrap())
}

fn buffers(plan: &Value) -> i64 {
    let fields = ["Shared Hit Blocks", "Shared Read Blocks"];
    fields.iter().filter_map(|field| plan[field].as_i64()).sum()
}

fn find_seq_scans(plan: &Value, found: &mut Vec<String>) {
    // The months to come are empty.
    if plan["Node Type"] == "Seq Scan" && buffers(plan) > 0 {
        found.push(plan["Relation Name"].as_str().unwrap().into());
    }
    for part in plan["Plans"].as_array().into_iter().flatten() {
        find_seq_scans(part, found);
    }
}

struct Sized<'a> {
    server: &'a Server,
    database: TestDatabase,
}

impl<'a> Sized<'a> {
    fn new(server: &'a Server, rows: i64, due: bool) -> Self {
        let database = support::database_on(server);
        let conn = &mut database.connect_as_owner();
        let (begin, end) = if due {
            ("(now() - interval '1 day')", "(now() - interval '1 day')")
        } else {
            ("now()", "(now() + interval '1 day')")
        };
        let sql = ROWS
            .replace("{rows}", &rows.to_string())
            .replace("{due}", &due.to_string())
            .replace("{begin}", begin)
            .replace("{end}", end);
        conn.batch_execute(&sql).unwrap();
        conn.batch_execute("VACUUM ANALYZE").unwrap();
        let empty = database.psql(EMPTY).unwrap();
        assert!(
            empty.is_empty(),
            "add rows to ROWS in tests/it/buffers.rs, of:\n{empty}"
        );
        Self { server, database }
    }

    /// Runs each operation and returns its statements.
    fn run(&self) -> Vec<(&'static str, Vec<Statement>)> {
        // Superusers only may set it, before they act as another role.
        let mut conn = PgConnection::establish(
            &self
                .database
                .url_with("options=-cauto_explain.log_min_duration%3D0%20-crole%3Dapp_user"),
        )
        .unwrap();
        OPERATIONS
            .iter()
            .map(|&(name, operation)| {
                let start = self.log_len();
                for n in 0..RUNS {
                    operation(&mut conn, 10 + n);
                }
                (name, statements(&self.log(start)))
            })
            .collect()
    }

    fn log_len(&self) -> u64 {
        fs::metadata(self.log_path()).unwrap().len()
    }

    fn log(&self, start: u64) -> String {
        let mut log = String::new();
        let mut file = fs::File::open(self.log_path()).unwrap();
        file.seek(SeekFrom::Start(start)).unwrap();
        file.read_to_string(&mut log).unwrap();
        log
    }

    fn log_path(&self) -> PathBuf {
        self.server.folder().unwrap().join("log")
    }
}

/// The plans in a part of the log: JSON, whose lines begin with a tab.
fn statements(log: &str) -> Vec<Statement> {
    let plans = log.split("  plan:\n").skip(1);
    plans
        .map(|plan| {
            let lines = plan.lines().take_while(|line| line.starts_with('\t'));
            let json: String = lines.map(|line| &line[1..]).collect();
            Statement::of(&serde_json::from_str(&json).unwrap())
        })
        .filter(|statement| !statement.text.contains("md5("))
        .collect()
}

#[test]
fn no_statement_grows_with_what_it_does_not_return() {
    let rows: i64 = env::var("BRUHMCP_BUFFERS_ROWS").map_or(100_000, |rows| rows.parse().unwrap());
    let server = Server::private(&[
        ("session_preload_libraries", "auto_explain"),
        ("auto_explain.log_analyze", "on"),
        ("auto_explain.log_timing", "off"),
        ("auto_explain.log_buffers", "on"),
        ("auto_explain.log_nested_statements", "on"),
        ("auto_explain.log_format", "json"),
        ("autovacuum", "off"),
        ("max_wal_size", "4GB"),
    ])
    .unwrap();
    let mut grown = Vec::new();
    for due in [false, true] {
        let (small, large) = thread::scope(|scope| {
            let small = scope.spawn(|| Sized::new(&server, 10_000, due));
            (Sized::new(&server, rows, due), small.join().unwrap())
        });
        for ((name, small), (_, large)) in small.run().into_iter().zip(large.run()) {
            let name = format!("{name}, due: {due}");
            assert_eq!(small.len(), large.len(), "{name}");
            assert_ne!(large.len(), 0, "{name}");
            for (small, large) in small.iter().zip(&large) {
                let text = &large.text;
                let mut seq_scans = large.seq_scans.iter();
                if let Some(table) = seq_scans.find(|table| *table != "mcp_table") {
                    grown.push(format!("{name}: reads all of {table}\n{text}\n"));
                }
                let allowed = if large.writes { WRITTEN } else { READ } * large.rows.max(1);
                if large.buffers - small.buffers > allowed {
                    grown.push(format!(
                        "{name}: {} buffers instead of {} for {} rows\n{text}\n",
                        large.buffers, small.buffers, large.rows
                    ));
                }
            }
        }
    }
    // The runs of one operation often say the same.
    grown.dedup();
    assert!(grown.is_empty(), "{}", grown.join("\n"));
}
