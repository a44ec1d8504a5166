//! Costs of frequent writes, as counts that don't depend on the machine: bytes of WAL, the share of
//! HOT updates, the growth of indexes. Each is compared with the rejected alternative in the same
//! run. What many clients do at once is a ratio of two rates, and needs an idle machine.
//!
//! `cargo bench --bench costs` starts a private server and removes it at the end.

use std::error::Error;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use bruhmcp_db::Sealed;
use bruhmcp_db::enums::TransactionStatus;
use bruhmcp_db::ids::{InstanceId, ServiceId, TransactionId, UserId};
use bruhmcp_db::migrations::MIGRATIONS;
use bruhmcp_db::models::{
    McpInstance, NewMcpCredential, NewMcpInstance, NewSubscriptionTransaction, User,
};
use bruhmcp_db::schema::{mcp_service_table, mcp_table, subscription_transactions, users};
use bruhmcp_devdb::{Database, Server};
use diesel::connection::SimpleConnection;
use diesel::dsl::sql;
use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Uuid as SqlUuid};
use diesel_migrations::MigrationHarness;
use uuid::Uuid;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const USERS: i64 = 1_000;
const INSTANCES: i64 = 10_000;
const CALLS: usize = 20_000;
const ROWS: usize = 100_000;
const INSERTS: usize = 5_000;
const BULK: i64 = 32_000;
const WORKERS: usize = 16;
const SECONDS: u64 = 3;

fn main() -> Result {
    // As in production: the first change of a page after a checkpoint writes the whole page to the
    // WAL.
    let server = Server::private(&[("full_page_writes", "on"), ("autovacuum", "off")])?;

    println!("One more call: {CALLS}, spread over {INSTANCES} instances");
    let taken = calls(&server, "as migrated", None)?;
    let index = "CREATE INDEX ON mcp_service_table (updated_at) WHERE status = 'active'";
    let other = calls(&server, "with a partial index on updated_at", Some(index))?;
    println!("  ratio of WAL: 1 to {:.2}", ratio(other, taken));

    println!("One more payment: {INSERTS} after a checkpoint, beside {ROWS}");
    let taken = inserts(&server, "keys that ascend (UUIDv7)", Uuid::now_v7)?;
    let other = inserts(&server, "random keys (UUIDv4)", Uuid::new_v4)?;
    println!("  ratio of WAL: 1 to {:.2}", ratio(other, taken));

    println!("The counters of {BULK} instances made in one transaction");
    for services in [1, 50] {
        let (updates, share) = bulk(&server, services)?;
        println!(
            "  {services:>2} services: {updates} updates, {share:.1} % of the time is the commit"
        );
    }

    println!("{WORKERS} clients for {SECONDS} s");
    let popular = creations(&server, 1)?;
    let spread = creations(&server, 50)?;
    println!(
        "  creations on 1 service to those on 50: {:.2}",
        ratio(popular, spread)
    );
    let (one, all) = (sweeps(&server, 1)?, sweeps(&server, WORKERS)?);
    println!(
        "  sweeps by {WORKERS} workers to those by 1: {:.2}",
        ratio(all, one)
    );
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
fn ratio(other: i64, taken: i64) -> f64 {
    other as f64 / taken as f64
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

fn calls(server: &Server, name: &str, index: Option<&str>) -> Result<i64> {
    let (_database, mut conn) = database(server)?;
    let conn = &mut conn;
    conn.batch_execute(&format!(
        "INSERT INTO mcp_table (mcp_service_name, display_name, port, type) VALUES ('figma', 'Figma', 49280, 'api_key');
         INSERT INTO mcp_service_table (user_id, mcp_service_id)
         SELECT id, mcp_service_id FROM mcp_table, users, generate_series(1, {INSTANCES} / {USERS});
         INSERT INTO mcp_credentials (instance_id, api_key, oauth_status, oauth_completed_at)
         SELECT instance_id, decode(repeat('01', 40), 'hex'), 'completed', now() FROM mcp_service_table;"
    ))?;
    // The credentials have updated each instance.
    conn.batch_execute("VACUUM FULL mcp_service_table")?;
    if let Some(index) = index {
        conn.batch_execute(index)?;
    }
    conn.batch_execute("VACUUM ANALYZE")?;
    // Ordered by random keys: spread over the table.
    let ids: Vec<InstanceId> = mcp_service_table::table
        .select(mcp_service_table::instance_id)
        .order(mcp_service_table::instance_id)
        .load(conn)?;
    let size = "pg_indexes_size('mcp_service_table')";
    let size_before = number(conn, size)?;
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
    let grown = number(conn, size)? - size_before;
    let per_call = bytes / i64::try_from(CALLS)?;
    println!(
        "  {name:<36} {per_call:>6} bytes of WAL, {hot:>3} % HOT, indexes grew by {} kB",
        grown / 1024
    );
    Ok(bytes)
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
/// sum of what it returned.
fn at_once(
    database: &Database,
    workers: usize,
    work: impl Fn(&mut PgConnection) -> Result<usize> + Sync,
) -> Result<i64> {
    let url = database.url();
    let run = || -> std::result::Result<usize, String> {
        let mut conn = PgConnection::establish(&url).map_err(|error| error.to_string())?;
        let start = Instant::now();
        let mut done = 0;
        while start.elapsed().as_secs() < SECONDS {
            match work(&mut conn).map_err(|error| error.to_string())? {
                0 => break,
                more => done += more,
            }
        }
        Ok(done)
    };
    let done: std::result::Result<Vec<usize>, String> = thread::scope(|scope| {
        let running: Vec<_> = (0..workers).map(|_| scope.spawn(run)).collect();
        let ended = running.into_iter().map(|worker| worker.join());
        ended
            .map(|outcome| outcome.unwrap_or_else(|_| Err("a worker panicked".into())))
            .collect()
    });
    Ok(i64::try_from(done?.into_iter().sum::<usize>())?)
}

/// Returns how many instances the clients create. Each is the next user's.
fn creations(server: &Server, count: i64) -> Result<i64> {
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
        let key = Sealed::from_ciphertext(vec![2; 42]);
        let key = NewMcpCredential::sealed_api_key(new.instance_id, key);
        McpInstance::create(conn, &new, &key)?;
        Ok(1)
    })
}

/// Returns how many due instances of 50 services the workers expire in batches of 10.
fn sweeps(server: &Server, workers: usize) -> Result<i64> {
    let (database, mut conn) = database(server)?;
    services(&mut conn, 50)?;
    conn.batch_execute(&format!(
        "INSERT INTO mcp_service_table (user_id, mcp_service_id, expires_at)
         SELECT id, mcp_service_id, now() FROM users, mcp_table, generate_series(1, 2) LIMIT {ROWS}"
    ))?;
    conn.batch_execute("VACUUM ANALYZE")?;
    at_once(&database, workers, |conn| {
        Ok(McpInstance::expire_due(conn, 10)?.len())
    })
}

fn inserts(server: &Server, name: &str, new_key: fn() -> Uuid) -> Result<i64> {
    let (_database, mut conn) = database(server)?;
    let conn = &mut conn;
    let user_id: UserId = User::list(conn, bruhmcp_db::Page::first(1))?
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
    println!(
        "  {name:<36} {:>6} bytes of WAL",
        bytes / i64::try_from(INSERTS)?
    );
    Ok(bytes)
}
