//! What frequent statements cost, each beside the rejected alternative in the same run. Prefers counts
//! that don't depend on the machine, such as bytes of WAL.
//!
//! `cargo bench --features migrator --bench costs` starts private servers, removes them at the end,
//! and writes `docs/performance.md`. With names of sections after `--`, such as `build-cost`, it
//! writes only these anew. `BRUHMCP_BENCH_ROWS` sets the size of the largest tables, such as 1000000.

mod audit;
mod build;
mod report;
mod wire;

use std::cell::RefCell;
use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bruhmcp_db::enums::{AuditStatus, AuthTokenType, TransactionStatus};
use bruhmcp_db::ids::{InstanceId, ServiceId, TransactionId, UserId};
use bruhmcp_db::migrations::MIGRATIONS;
use bruhmcp_db::models::{
    AuthToken, InstanceCalls, McpInstance, NewMcpCredential, NewMcpInstance,
    NewSubscriptionTransaction, NewTokenAudit, TokenAudit, User, WebhookEvent,
};
use bruhmcp_db::schema::{mcp_service_table, mcp_table, subscription_transactions, users};
use bruhmcp_db::{Durability, HashedToken, Page, Sealed};
use bruhmcp_devdb::{Database, Server};
use chrono::TimeDelta;
use diesel::connection::{CacheSize, SimpleConnection};
use diesel::dsl::sql;
use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Text, Uuid as SqlUuid};
use diesel_migrations::MigrationHarness;
use indicatif::{ProgressBar, ProgressStyle};
use report::{Range, Report, Section};
use uuid::Uuid;
use wire::{Wire, cpu};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const USERS: i64 = 1_000;
const INSTANCES: i64 = 10_000;
const CALLS: usize = 20_000;
const ROWS: usize = 100_000;
const INSERTS: usize = 5_000;
const ROUNDS: usize = 5;
const TURNS: usize = 30;
const BULK: i64 = 32_000;
const WORKERS: usize = 16;
const SECONDS: u64 = 2;
const DUE: usize = 10_000;

fn main() -> Result {
    let cores = std::thread::available_parallelism()?;
    // As in production: the first change of a page after a checkpoint writes the whole page to the
    // WAL.
    let server = Server::private(&[("full_page_writes", "on"), ("autovacuum", "off")])?;
    let synced = Server::private(&[("fsync", "on"), ("synchronous_commit", "on")])?;
    let version = version(&server)?;
    let mut report = Report::new(format!(
        "Figures of `cargo bench --features migrator --bench costs`, which writes this page: \
         PostgreSQL {version}, {cores} cores shared by client and server, release build. Compare \
         them with each other, not with another machine's. A range is the lowest and the highest of \
         {ROUNDS} rounds, and a ratio that of their middles to the first line's."
    ));
    let mut steps: Vec<(&str, Step)> = vec![
        ("wal-per-call", wal_of_calls),
        ("wal-per-payment", wal_of_payments),
        ("calls-per-second", rate_of_calls),
        ("webhook-workers", rate_of_webhooks),
        ("counters", counters),
        ("sweep-workers", rate_of_sweeps),
        ("migrations", migrations),
        ("buffers", buffers_by_size),
        ("audit-rows-per-second", audit::rate_of_inserts),
        ("audit-listing", audit::listing),
        ("audit-summary", audit::summary),
        ("audit-inserts", audit::inserts),
        ("audit-retention", audit::retention),
    ];
    // The CPU of a process is read the Linux way.
    if cfg!(target_os = "linux") {
        steps.push(("cpu-by-client", client_library));
        steps.push(("build-cost", |_| build::build_cost()));
    }
    // Cargo adds `--bench`.
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    if !wanted.is_empty() {
        steps.retain(|(name, _)| wanted.iter().any(|wanted| wanted == name));
        report.keep()?;
    }
    let servers = Servers {
        logs: RefCell::default(),
        server,
        synced,
    };
    // Only on a terminal.
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len}, {elapsed}, {eta} left")?;
    let progress = ProgressBar::new(steps.len().try_into()?).with_style(style);
    progress.enable_steady_tick(Duration::from_secs(1));
    for (_, step) in steps {
        let section = step(&servers)?;
        progress.suspend(|| report.add(section))?;
        progress.inc(1);
    }
    report.write()
}

type Step = fn(&Servers) -> Result<Section>;

struct Servers {
    /// Those of the audit log, which are dropped before their server.
    logs: RefCell<Vec<audit::Log>>,
    server: Server,
    /// Waits for the disk at each commit.
    synced: Server,
}

fn version(server: &Server) -> Result<String> {
    let database = server.create_database()?;
    let mut conn = PgConnection::establish(&database.url())?;
    let version = sql::<Text>("split_part(current_setting('server_version'), ' ', 1)");
    Ok(diesel::select(version).get_result(&mut conn)?)
}

fn wal_of_calls(servers: &Servers) -> Result<Section> {
    let bump = "CREATE TRIGGER bump BEFORE UPDATE ON mcp_service_table
                FOR EACH ROW EXECUTE FUNCTION update_version_and_timestamp()";
    let designs = [
        ("as migrated", None),
        ("each call raises the version", Some(bump)),
        (
            "a partial index on updated_at",
            Some("CREATE INDEX ON mcp_service_table (updated_at) WHERE status = 'active'"),
        ),
        (
            "an index on last_used_at",
            Some("CREATE INDEX ON mcp_service_table (last_used_at)"),
        ),
    ];
    let mut rows = Vec::new();
    for (name, change) in designs {
        let (bytes, hot) = calls(&servers.server, change)?;
        rows.push((format!("{name} ({hot} % HOT)"), Range::exactly(bytes)));
    }
    Ok(Section {
        name: "wal-per-call",
        title: "One more call",
        text: format!(
            "WAL of `McpInstance::record_call`, {CALLS} times, spread over {INSTANCES} instances, \
             and the share of HOT updates. No index names a column that a call writes."
        ),
        unit: "bytes of WAL a call",
        rows,
    })
}

fn wal_of_payments(servers: &Servers) -> Result<Section> {
    let row = |name: &str, new_key: fn() -> Uuid| -> Result<_> {
        let bytes = inserts(&servers.server, new_key)?;
        Ok((name.to_owned(), Range::exactly(bytes)))
    };
    Ok(Section {
        name: "wal-per-payment",
        title: "One more payment",
        text: format!(
            "WAL of an insert into `subscription_transactions`, {INSERTS} after a checkpoint, \
             beside {ROWS} rows."
        ),
        unit: "bytes of WAL a row",
        rows: vec![
            row("keys that ascend (UUIDv7)", Uuid::now_v7)?,
            row("random keys (UUIDv4)", Uuid::new_v4)?,
        ],
    })
}

fn rate_of_calls(servers: &Servers) -> Result<Section> {
    let (_database, mut conn) = database(&servers.synced)?;
    let conn = &mut conn;
    let all = instances(conn, None)?;
    let mut rows = Vec::new();
    for (name, ids) in [
        ("one instance", &all[..1]),
        ("1,000 instances", &all[..1_000]),
    ] {
        let of = |number: usize| ids.iter().copied().cycle().take(number);
        let one_by_one = rate(500, || {
            for id in of(500) {
                McpInstance::record_call(conn, id, None)?.map_err(|reason| reason.to_string())?;
            }
            Ok(())
        })?;
        rows.push((format!("{name}, one by one"), one_by_one));
        for durability in [Durability::Synced, Durability::Unsynced] {
            let batches = rate(20_000, || {
                let calls: Vec<_> = of(1_000).map(InstanceCalls::one).collect();
                for _ in 0..20 {
                    McpInstance::record_calls(conn, &calls, durability)?;
                }
                Ok(())
            })?;
            let durability = format!("{durability:?}").to_lowercase();
            rows.push((format!("{name}, batches, {durability}"), batches));
        }
    }
    Ok(Section {
        name: "calls-per-second",
        title: "Calls counted one by one and in batches",
        text: "`record_call` and `record_calls` with 1,000 calls each, over one connection, on a \
               server that syncs its commits to disk."
            .into(),
        unit: "calls a second",
        rows,
    })
}

/// Workers that claim ten events at a time, and process each in a transaction of its own.
fn rate_of_webhooks(servers: &Servers) -> Result<Section> {
    const EVENTS: u32 = 500;
    let (database, mut conn) = database(&servers.synced)?;
    let conn = &mut conn;
    let mut rows = Vec::new();
    for workers in [1, 2, 4, 8, 16] {
        let mut connections = (0..workers)
            .map(|_| PgConnection::establish(&database.url()))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        let range = rate_after(
            EVENTS,
            || {
                conn.batch_execute(&format!(
                    "DELETE FROM webhook_events;
                     INSERT INTO webhook_events (external_event_id, event_type, payment_gateway, payload)
                     SELECT n, 'payment.captured', 'razorpay', '{{}}'
                       FROM generate_series(1, {EVENTS}) AS n"
                ))?;
                Ok(conn.batch_execute("VACUUM ANALYZE webhook_events")?)
            },
            || {
                std::thread::scope(|scope| {
                    let running: Vec<_> = connections
                        .iter_mut()
                        .map(|conn| scope.spawn(|| process_webhooks(conn)))
                        .collect();
                    running.into_iter().try_for_each(|thread| {
                        thread
                            .join()
                            .map_err(|_| "a worker panicked")?
                            .map_err(Into::into)
                    })
                })
            },
        )?;
        rows.push((count(workers, "worker"), range));
    }
    Ok(Section {
        name: "webhook-workers",
        title: "Webhook queue by workers",
        text: format!(
            "{EVENTS} events, claimed ten at a time, each marked in a transaction of its own, on a \
             server that syncs its commits to disk."
        ),
        unit: "events a second",
        rows,
    })
}

fn process_webhooks(conn: &mut PgConnection) -> std::result::Result<(), String> {
    loop {
        let claimed = WebhookEvent::claim_due(conn, TimeDelta::minutes(5), 10)
            .map_err(|error| error.to_string())?;
        if claimed.is_empty() {
            return Ok(());
        }
        for event in &claimed {
            WebhookEvent::mark_processed(conn, event, None).map_err(|error| error.to_string())?;
        }
    }
}

/// How often a second `work`, which does `number` things, does one.
fn rate(number: u32, work: impl FnMut() -> Result) -> Result<Range> {
    rate_after(number, || Ok(()), work)
}

/// As [`rate`], with preparations before each round that don't count.
fn rate_after(
    number: u32,
    mut prepare: impl FnMut() -> Result,
    mut work: impl FnMut() -> Result,
) -> Result<Range> {
    let mut rates = Vec::new();
    for _ in 0..ROUNDS {
        prepare()?;
        let start = Instant::now();
        work()?;
        rates.push(f64::from(number) / start.elapsed().as_secs_f64());
    }
    Ok(Range::of(&rates))
}

/// Creates a migrated database with users for one case, so that cases don't affect each other.
fn database(server: &Server) -> Result<(Database, PgConnection)> {
    let database = server.create_database()?;
    let mut conn = PgConnection::establish(&database.url())?;
    conn.run_pending_migrations(MIGRATIONS)
        .map_err(|error| error.to_string())?;
    conn.batch_execute(&format!(
        "INSERT INTO users (first_name, last_name, email)
         SELECT 'a', '', n || '@example.in' FROM generate_series(1, {USERS}) AS n;
         UPDATE user_plans SET plan_type = 'pro', max_instances = NULL;"
    ))?;
    Ok((database, conn))
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn each(total: i64, number: usize) -> f64 {
    total as f64 / number as f64
}

fn number(conn: &mut PgConnection, query: &str) -> QueryResult<i64> {
    diesel::select(sql::<BigInt>(&format!("({query})::bigint"))).get_result(conn)
}

/// Returns the bytes of WAL that `work` writes.
fn wal(
    conn: &mut PgConnection,
    work: impl FnOnce(&mut PgConnection) -> QueryResult<()>,
) -> QueryResult<i64> {
    let position = "pg_current_wal_insert_lsn() - '0/0'";
    conn.batch_execute("CHECKPOINT")?;
    let before = number(conn, position)?;
    work(conn)?;
    Ok(number(conn, position)? - before)
}

/// The size of the largest tables.
fn large() -> Result<i64> {
    Ok(std::env::var("BRUHMCP_BENCH_ROWS").map_or(Ok(100_000), |rows| rows.parse())?)
}

/// Returns the buffers that a call of `work` reads after the first ones, with those of the catalogue.
fn buffers(
    conn: &mut PgConnection,
    mut work: impl FnMut(&mut PgConnection) -> QueryResult<()>,
) -> Result<f64> {
    const CALLS: usize = 100;
    let read =
        "SELECT blks_hit + blks_read FROM pg_stat_database WHERE datname = current_database()";
    // Until the plans of its statements are kept.
    for _ in 0..10 {
        work(conn)?;
    }
    conn.batch_execute("SELECT pg_stat_force_next_flush()")?;
    let before = number(conn, read)?;
    for _ in 0..CALLS {
        work(conn)?;
    }
    conn.batch_execute("SELECT pg_stat_force_next_flush()")?;
    Ok(each(number(conn, read)? - before, CALLS))
}

/// What frequent operations read, by the number of instances and of users.
fn buffers_by_size(servers: &Servers) -> Result<Section> {
    type Operation = fn(&mut PgConnection, InstanceId, UserId) -> QueryResult<()>;
    let operations: [(&str, Operation); 5] = [
        ("McpInstance::find_with_credentials", |conn, id, user| {
            McpInstance::find_with_credentials(conn, id, "figma", Some(user)).map(drop)
        }),
        ("McpInstance::record_call", |conn, id, user| {
            McpInstance::record_call(conn, id, Some(user)).map(drop)
        }),
        ("McpInstance::expire_due, none due", |conn, _, _| {
            McpInstance::expire_due(conn, 10).map(drop)
        }),
        ("McpInstance::count_active", |conn, _, user| {
            McpInstance::count_active(conn, user).map(drop)
        }),
        ("User::list", |conn, _, _| {
            User::list(conn, Page::first(10)).map(drop)
        }),
    ];
    let mut rows = Vec::new();
    for (name, operation) in operations {
        for size in [large()? / 10, large()?] {
            let (_database, mut conn) = database(&servers.server)?;
            let conn = &mut conn;
            conn.batch_execute(&format!(
                "SET session_replication_role = replica;
                 INSERT INTO users (first_name, last_name, email, created_at)
                 SELECT 'a', '', n || '@example.org', now() - n * interval '1 second'
                   FROM generate_series(1, {size}) AS n;
                 INSERT INTO user_plans (user_id, plan_type) SELECT id, 'pro' FROM users
                     ON CONFLICT DO NOTHING;
                 INSERT INTO mcp_table (mcp_service_name, display_name, port, type)
                 VALUES ('figma', 'Figma', 49280, 'api_key');
                 INSERT INTO mcp_service_table (user_id, mcp_service_id, oauth_status)
                 SELECT id, mcp_service_id, 'completed' FROM mcp_table, users;
                 RESET session_replication_role"
            ))?;
            conn.batch_execute("VACUUM ANALYZE")?;
            let (id, user) = mcp_service_table::table
                .select((mcp_service_table::instance_id, mcp_service_table::user_id))
                .first(conn)?;
            let read = buffers(conn, |conn| operation(conn, id, user))?;
            rows.push((format!("{name}, {size} rows"), Range::exactly(read)));
        }
    }
    Ok(Section {
        name: "buffers",
        title: "Buffers by table size",
        text: "What a call reads, in tables of users and instances with so many rows each. \
               `tests/it/buffers.rs` holds it for more operations."
            .into(),
        unit: "buffers a call",
        rows,
    })
}

/// Creates instances that can be called, and changes the schema; returns their keys, spread over the table.
fn instances(conn: &mut PgConnection, change: Option<&str>) -> Result<Vec<InstanceId>> {
    conn.batch_execute(&format!(
        "INSERT INTO mcp_table (mcp_service_name, display_name, port, type) VALUES ('figma', 'Figma', 49280, 'api_key');
         INSERT INTO mcp_service_table (user_id, mcp_service_id)
         SELECT id, mcp_service_id FROM mcp_table, users, generate_series(1, {INSTANCES} / {USERS});
         INSERT INTO mcp_credentials (instance_id, api_key, oauth_status, oauth_completed_at)
         SELECT instance_id, decode(repeat('01', 40), 'hex'), 'completed', now() FROM mcp_service_table;"
    ))?;
    // The credentials have updated each instance.
    conn.batch_execute("VACUUM FULL mcp_service_table")?;
    if let Some(change) = change {
        conn.batch_execute(change)?;
    }
    conn.batch_execute("VACUUM ANALYZE")?;
    conn.batch_execute("SELECT pg_stat_force_next_flush(), pg_stat_reset()")?;
    let ids = mcp_service_table::table
        .select(mcp_service_table::instance_id)
        .order(mcp_service_table::instance_id)
        .load(conn)?;
    Ok(ids)
}

/// Returns the bytes of WAL of a call and the share of HOT updates in percent.
fn calls(server: &Server, change: Option<&str>) -> Result<(f64, i64)> {
    let (_database, mut conn) = database(server)?;
    let conn = &mut conn;
    let ids = instances(conn, change)?;
    let bytes = wal(conn, |conn| {
        for id in ids.iter().cycle().take(CALLS) {
            McpInstance::record_call(conn, *id, None)?
                .map_err(|reason| diesel::result::Error::QueryBuilderError(reason.into()))?;
        }
        Ok(())
    })?;
    conn.batch_execute("SELECT pg_stat_force_next_flush()")?;
    let of_updates = "SELECT 100 * n_tup_hot_upd / n_tup_upd FROM pg_stat_user_tables WHERE relname = 'mcp_service_table'";
    let hot = number(conn, of_updates)?;
    Ok((each(bytes, CALLS), hot))
}

/// Returns the bytes of WAL of an insert.
fn inserts(server: &Server, new_key: fn() -> Uuid) -> Result<f64> {
    let (_database, mut conn) = database(server)?;
    let conn = &mut conn;
    let user_id: UserId = User::list(conn, Page::first(1))?
        .first()
        .ok_or("no user")?
        .id;
    let keys: Vec<Uuid> = (0..ROWS).map(|_| new_key()).collect();
    diesel::sql_query(
        "INSERT INTO subscription_transactions (id, user_id, amount, net_amount, status)
         SELECT key, $2, 1, 1, 'captured' FROM unnest($1) AS key",
    )
    .bind::<Array<SqlUuid>, _>(keys)
    .bind::<SqlUuid, _>(user_id)
    .execute(conn)?;
    conn.batch_execute("VACUUM ANALYZE")?;
    let bytes = wal(conn, |conn| {
        for _ in 0..INSERTS {
            let payment = NewSubscriptionTransaction {
                id: Some(TransactionId(new_key())),
                ..NewSubscriptionTransaction::new(user_id, 1, 1, TransactionStatus::Captured)
            };
            diesel::insert_into(subscription_transactions::table)
                .values(&payment)
                .execute(conn)?;
        }
        Ok(())
    })?;
    Ok(each(bytes, INSERTS))
}

/// An empty database migrated by the runner and by `psql`, in turns.
fn migrations(servers: &Servers) -> Result<Section> {
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("migrations.sql");
    let mut folders = fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/migrations"))?
        .map(|entry| Ok(entry?.path().join("up.sql")))
        .collect::<Result<Vec<_>>>()?;
    folders.retain(|up| up.exists());
    folders.sort();
    let files = folders.iter().map(fs::read_to_string);
    fs::write(&file, files.collect::<std::io::Result<String>>()?)?;
    let (mut by_psql, mut by_runner) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let database = servers.server.create_database()?;
        let start = Instant::now();
        let psql = database
            .client("psql")
            .args(["-Xq1", "-v", "ON_ERROR_STOP=1", "-f"])
            .arg(&file)
            .output()?;
        by_psql.push(1_000.0 * start.elapsed().as_secs_f64());
        if !psql.status.success() {
            return Err(String::from_utf8_lossy(&psql.stderr).into());
        }
        let database = servers.server.create_database()?;
        let start = Instant::now();
        bruhmcp_db::migrations::runner(&database.url())?.run()?;
        by_runner.push(1_000.0 * start.elapsed().as_secs_f64());
    }
    Ok(Section {
        name: "migrations",
        title: "An empty database migrated",
        text: format!(
            "{} migrations, each in a transaction of its own by the runner, and all in one file and \
             transaction by `psql`, with the start of each.",
            folders.len()
        ),
        unit: "ms",
        rows: vec![
            ("psql, one file".to_owned(), Range::of(&by_psql)),
            ("the runner".to_owned(), Range::of(&by_runner)),
        ],
    })
}

/// The registry row of a popular service, which each creation on it counts up.
fn counters(servers: &Servers) -> Result<Section> {
    let mut rows = Vec::new();
    let mut shares = Vec::new();
    for services in [1, 50] {
        let (updates, share) = bulk(&servers.server, services)?;
        shares.push(format!(
            "{updates} updates and {share:.1} % of the time with {services}"
        ));
    }
    for (name, services) in [("50 services", 50), ("1 service", 1)] {
        let rates = (0..ROUNDS).map(|_| creations(&servers.synced, services));
        let rates = rates.collect::<Result<Vec<f64>>>()?;
        rows.push((name.to_owned(), Range::of(&rates)));
    }
    Ok(Section {
        name: "counters",
        title: "Creations on popular services",
        text: format!(
            "`McpInstance::create` by {WORKERS} clients, on a server that syncs its commits to \
             disk. A counter that is exact at each commit makes the commits on one service follow \
             each other. The commit of one transaction that creates {BULK} instances takes, by \
             number of services: {}.",
            shares.join(", ")
        ),
        unit: "instances a second",
        rows,
    })
}

fn rate_of_sweeps(servers: &Servers) -> Result<Section> {
    let mut rows = Vec::new();
    for workers in [1, 4, WORKERS] {
        let rates = (0..ROUNDS).map(|_| sweeps(&servers.synced, workers));
        let rates = rates.collect::<Result<Vec<f64>>>()?;
        rows.push((count(workers, "worker"), Range::of(&rates)));
    }
    Ok(Section {
        name: "sweep-workers",
        title: "Expiry by workers",
        text: format!(
            "`McpInstance::expire_due` in batches of 10, {DUE} instances of 50 services due, on a \
             server that syncs its commits to disk."
        ),
        unit: "instances a second",
        rows,
    })
}

fn count(number: usize, name: &str) -> String {
    format!("{number} {name}{}", if number == 1 { "" } else { "s" })
}

fn services(conn: &mut PgConnection, services: i64) -> QueryResult<()> {
    conn.batch_execute(&format!(
        "INSERT INTO mcp_table (mcp_service_name, display_name, port, type)
         SELECT 's' || n, 'S', n, 'api_key' FROM generate_series(1, {services}) AS n"
    ))
}

/// Returns the number of updates of counters, and the commit's percentage of the time.
fn bulk(server: &Server, count: i64) -> Result<(i64, f64)> {
    let (_database, mut conn) = database(server)?;
    let conn = &mut conn;
    services(conn, count)?;
    let start = Instant::now();
    conn.batch_execute(&format!(
        "BEGIN;
         INSERT INTO mcp_service_table (user_id, mcp_service_id)
         SELECT id, mcp_service_id
           FROM users, mcp_table, generate_series(1, {BULK} / {USERS} / {count} + 1) LIMIT {BULK}"
    ))?;
    let inserted = Instant::now();
    conn.batch_execute("COMMIT")?;
    let share = 100.0 * inserted.elapsed().as_secs_f64() / start.elapsed().as_secs_f64();
    conn.batch_execute("SELECT pg_stat_force_next_flush()")?;
    let of_updates = "SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'mcp_table'";
    Ok((number(conn, of_updates)?, share))
}

/// Runs `work` in connections of their own until the time is over or it returns 0, and returns the
/// sum of what it returned, per second.
fn at_once(
    database: &Database,
    workers: usize,
    work: impl Fn(&mut PgConnection) -> Result<usize> + Sync,
) -> Result<f64> {
    let url = database.url();
    let start = Instant::now();
    let run = || -> std::result::Result<usize, String> {
        let mut conn = PgConnection::establish(&url).map_err(|error| error.to_string())?;
        let mut done = 0;
        while start.elapsed().as_secs() < SECONDS {
            match work(&mut conn).map_err(|error| error.to_string())? {
                0 => break,
                more => done += more,
            }
        }
        Ok(done)
    };
    let done: std::result::Result<Vec<usize>, String> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..workers).map(|_| scope.spawn(run)).collect();
        let ended = running.into_iter().map(|worker| worker.join());
        ended
            .map(|outcome| outcome.unwrap_or_else(|_| Err("a worker panicked".into())))
            .collect()
    });
    let done = u32::try_from(done?.into_iter().sum::<usize>())?;
    Ok(f64::from(done) / start.elapsed().as_secs_f64())
}

/// Returns how many instances the clients create in a second. Each is the next user's.
fn creations(server: &Server, count: i64) -> Result<f64> {
    let (database, mut conn) = database(server)?;
    services(&mut conn, count)?;
    let users: Vec<UserId> = users::table.select(users::id).load(&mut conn)?;
    let services: Vec<ServiceId> = mcp_table::table
        .select(mcp_table::mcp_service_id)
        .load(&mut conn)?;
    let next = AtomicUsize::new(0);
    at_once(&database, WORKERS, |conn| {
        let n = next.fetch_add(1, Ordering::Relaxed);
        let new = NewMcpInstance::new(users[n % users.len()], services[n % services.len()]);
        let key = Sealed::from_ciphertext(vec![2; 42])?;
        let key = NewMcpCredential::sealed_api_key(new.instance_id, key);
        McpInstance::create(conn, &new, &key)?;
        Ok(1)
    })
}

/// Returns how many due instances of 50 services the workers expire in a second, in batches of 10.
fn sweeps(server: &Server, workers: usize) -> Result<f64> {
    let (database, mut conn) = database(server)?;
    services(&mut conn, 50)?;
    conn.batch_execute(&format!(
        "INSERT INTO mcp_service_table (user_id, mcp_service_id, expires_at)
         SELECT id, mcp_service_id, now() FROM users, mcp_table, generate_series(1, 2) LIMIT {DUE}"
    ))?;
    conn.batch_execute("VACUUM ANALYZE")?;
    at_once(&database, workers, |conn| {
        Ok(McpInstance::expire_due(conn, 10)?.len())
    })
}

/// What Diesel adds to a statement that is prepared by hand, and what it would be unprepared: CPU
/// of this thread and of the server's process together.
fn client_library(servers: &Servers) -> Result<Section> {
    let server = &servers.server;
    let (database, mut conn) = database(server)?;
    let instance = instances(&mut conn, None)?[0];
    let user: UserId = mcp_service_table::table
        .filter(mcp_service_table::instance_id.eq(instance))
        .select(mcp_service_table::user_id)
        .first(&mut conn)?;
    let token = HashedToken::new(AuthTokenType::Refresh, [7; 32]);
    AuthToken::issue(&mut conn, user, &token, TimeDelta::hours(1))?.ok_or("no token")?;
    let audit = NewTokenAudit::new(instance, "call", AuditStatus::Success);

    let folder = server.folder().ok_or("a server of its own")?;
    let mut wire = Wire::connect(folder, database.name())?;
    let (instance_id, user_id) = (instance.0.as_bytes(), user.0.as_bytes());
    type Operation<'a> = Box<dyn Fn(&mut PgConnection) -> Result + 'a>;
    type Values<'a> = Vec<Option<&'a [u8]>>;
    let operations: [(&str, Operation<'_>, &str, Values<'_>); 5] = [
        (
            "McpInstance::record_call",
            Box::new(|conn| {
                McpInstance::record_call(conn, instance, Some(user))??;
                Ok(())
            }),
            "UPDATE mcp_service_table AS instance
                SET usage_count = usage_count + 1, last_used_at = now()
              WHERE status = 'active' AND oauth_status = 'completed'
                AND (expires_at IS NULL OR expires_at > now())
                AND EXISTS (SELECT FROM users WHERE id = instance.user_id AND is_active)
                AND EXISTS (SELECT FROM mcp_table AS service
                             WHERE service.mcp_service_id = instance.mcp_service_id
                               AND service.is_active)
                AND instance_id = $1 AND user_id = $2",
            vec![Some(instance_id), Some(user_id)],
        ),
        (
            "McpInstance::find_with_credentials",
            Box::new(|conn| {
                McpInstance::find_with_credentials(conn, instance, "figma", Some(user))??;
                Ok(())
            }),
            "SELECT instance.*, service.*, credentials.*, users.is_active
               FROM mcp_service_table AS instance
               JOIN users ON users.id = instance.user_id
               JOIN mcp_table AS service USING (mcp_service_id)
               LEFT JOIN mcp_credentials AS credentials USING (instance_id)
              WHERE instance_id = $1 AND instance.user_id = $2",
            vec![Some(instance_id), Some(user_id)],
        ),
        (
            "AuthToken::find_live",
            Box::new(|conn| {
                AuthToken::find_live(conn, &token)?.ok_or("no token")?;
                Ok(())
            }),
            "SELECT auth_tokens.* FROM auth_tokens JOIN users ON users.id = user_id
              WHERE type = 'refresh' AND token = $1 AND NOT is_used AND expires_at > now()
                AND users.is_active",
            vec![Some(token.digest.as_bytes())],
        ),
        (
            "User::record_login",
            Box::new(|conn| {
                User::record_login(conn, user)?.ok_or("no user")?;
                Ok(())
            }),
            "UPDATE users SET last_login_at = now() WHERE id = $1 AND is_active RETURNING *",
            vec![Some(user_id)],
        ),
        (
            "TokenAudit::insert",
            Box::new(|conn| {
                TokenAudit::insert(conn, &audit)?;
                Ok(())
            }),
            "INSERT INTO token_audit_log
                 (instance_id, user_id, operation, status, method, error_type, error_message,
                  metadata)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8) RETURNING *",
            vec![
                Some(instance_id),
                None,
                Some(b"call"),
                Some(b"success"),
                None,
                None,
                None,
                None,
            ],
        ),
    ];
    let mut unprepared = PgConnection::establish(&database.url())?;
    unprepared.set_prepared_statement_cache_size(CacheSize::Disabled);
    let of_conn = |conn: &mut PgConnection| number(conn, "pg_backend_pid()");
    let (pid, unprepared_pid) = (of_conn(&mut conn)?, of_conn(&mut unprepared)?);
    let mut rows = Vec::new();
    for (name, operation, statement, values) in operations {
        wire.prepare(name, statement)?;
        let (mut ratios, mut unprepared_ratios) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let mut costs = [const { Vec::new() }; 3];
            // In turns, so that what else the machine does is spread over all.
            for _ in 0..TURNS {
                costs[0].push(cpu_of(
                    wire.pid.into(),
                    || Ok(wire.execute(name, &values)?),
                )?);
                costs[1].push(cpu_of(pid, || operation(&mut conn))?);
                costs[2].push(cpu_of(unprepared_pid, || operation(&mut unprepared))?);
            }
            let [by_hand, by_diesel, anew] = costs.map(median);
            ratios.push(by_diesel / by_hand);
            unprepared_ratios.push(anew / by_hand);
        }
        rows.push((name.to_owned(), Range::of(&ratios)));
        rows.push((format!("{name}, unprepared"), Range::of(&unprepared_ratios)));
    }
    Ok(Section {
        name: "cpu-by-client",
        title: "CPU of a call by client",
        text:
            "Client and server together, as a multiple of the same statement prepared by hand over \
               the wire protocol, whose answer is not decoded. *Unprepared* is Diesel without its \
               statement cache."
                .into(),
        unit: "times the CPU by hand",
        rows,
    })
}

fn median(mut costs: Vec<f64>) -> f64 {
    costs.sort_by(f64::total_cmp);
    costs[costs.len() / 2]
}

/// Nanoseconds of CPU that 100 calls take here and in the server's process.
fn cpu_of(server: i64, mut call: impl FnMut() -> Result) -> Result<f64> {
    let server = server.to_string();
    let taken = || -> Result<u64> { Ok(cpu("thread-self")? + cpu(&server)?) };
    let before = taken()?;
    for _ in 0..100 {
        call()?;
    }
    Ok(f64::from(u32::try_from(taken()? - before)?))
}
