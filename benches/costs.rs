//! Costs of frequent writes, as counts that don't depend on the machine: bytes of WAL, the share of
//! HOT updates, the growth of indexes. Each is compared with the rejected alternative in the same
//! run. Rates are for comparison within a run only.
//!
//! `cargo bench --bench costs` starts a private server and removes it at the end.

use std::error::Error;
use std::time::Instant;

use bruhmcp_db::enums::{AuditStatus, AuthTokenType, TransactionStatus};
use bruhmcp_db::ids::{InstanceId, TransactionId, UserId};
use bruhmcp_db::migrations::MIGRATIONS;
use bruhmcp_db::models::{
    AuthToken, InstanceCalls, McpInstance, NewSubscriptionTransaction, NewTokenAudit, TokenAudit,
    User,
};
use bruhmcp_db::schema::{mcp_service_table, subscription_transactions};
use bruhmcp_db::{Durability, HashedToken};
use bruhmcp_devdb::{Database, Server};
use chrono::TimeDelta;
use diesel::connection::{CacheSize, SimpleConnection};
use diesel::dsl::sql;
use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Uuid as SqlUuid};
use diesel_migrations::MigrationHarness;
use uuid::Uuid;

use wire::{Wire, cpu};

#[path = "costs/wire.rs"]
mod wire;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const USERS: i64 = 1_000;
const INSTANCES: i64 = 10_000;
const CALLS: usize = 20_000;
const ROWS: usize = 100_000;
const INSERTS: usize = 5_000;
const ROUNDS: usize = 5;
const TURNS: usize = 30;

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

    batches()?;
    // The CPU of a process is read the Linux way.
    if cfg!(target_os = "linux") {
        client_library()?;
    }
    Ok(())
}

/// Calls of one hot instance and of many, counted one by one and in batches, on a server that syncs
/// its commits to disk.
fn batches() -> Result {
    let server = Server::private(&[("fsync", "on"), ("synchronous_commit", "on")])?;
    let (_database, mut conn) = database(&server)?;
    let conn = &mut conn;
    let all = instances(conn, None)?;
    println!("Calls per second, with the minimum and maximum of {ROUNDS} rounds");
    for (name, ids) in [
        ("one instance", &all[..1]),
        ("1,000 instances", &all[..1_000]),
    ] {
        let of = |number: usize| ids.iter().copied().cycle().take(number);
        rate(&format!("{name}, one by one"), 200, || {
            for id in of(200) {
                McpInstance::record_call(conn, id, None)?.map_err(|reason| reason.to_string())?;
            }
            Ok(())
        })?;
        for durability in [Durability::Synced, Durability::Unsynced] {
            rate(
                &format!("{name}, batches of 1,000, {durability:?}"),
                20_000,
                || {
                    let calls: Vec<_> = of(1_000).map(InstanceCalls::one).collect();
                    for _ in 0..20 {
                        McpInstance::record_calls(conn, &calls, durability)?;
                    }
                    Ok(())
                },
            )?;
        }
    }
    Ok(())
}

/// Prints how often a second `work`, which does `number` things, does one.
fn rate(name: &str, number: u32, mut work: impl FnMut() -> Result) -> Result {
    let mut rates = Vec::new();
    for _ in 0..ROUNDS {
        let start = Instant::now();
        work()?;
        rates.push(f64::from(number) / start.elapsed().as_secs_f64());
    }
    rates.sort_by(f64::total_cmp);
    println!(
        "  {name:<48} {:>9.0} to {:>9.0}",
        rates[0],
        rates[ROUNDS - 1]
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

/// Creates instances that can be called, and an index; returns their keys, spread over the table.
fn instances(conn: &mut PgConnection, index: Option<&str>) -> Result<Vec<InstanceId>> {
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
    conn.batch_execute("SELECT pg_stat_force_next_flush(), pg_stat_reset()")?;
    let ids = mcp_service_table::table
        .select(mcp_service_table::instance_id)
        .order(mcp_service_table::instance_id)
        .load(conn)?;
    Ok(ids)
}

fn calls(server: &Server, name: &str, index: Option<&str>) -> Result<i64> {
    let (_database, mut conn) = database(server)?;
    let conn = &mut conn;
    let ids = instances(conn, index)?;
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

/// What Diesel adds to a statement that is prepared by hand, and what it would be unprepared: CPU
/// of this thread and of the server's process together.
fn client_library() -> Result {
    let server = Server::private(&[])?;
    let (database, mut conn) = database(&server)?;
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
    println!("CPU by Diesel to CPU by hand, with the minimum and maximum of {ROUNDS} rounds");
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
        ratios.sort_by(f64::total_cmp);
        unprepared_ratios.sort_by(f64::total_cmp);
        println!(
            "  {name:<36} {:.2} to {:.2}; unprepared {:.2} to {:.2}",
            ratios[0],
            ratios[ROUNDS - 1],
            unprepared_ratios[0],
            unprepared_ratios[ROUNDS - 1],
        );
    }
    Ok(())
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
