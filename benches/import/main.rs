//! How fast old rows are imported and compared, and how much memory that takes, by the number of
//! users.
//!
//! `cargo bench --features import --bench import -- 10000 1000000` prints a line for each number. A
//! million users take some 15 GB of disk.

use std::env;
use std::error::Error;
use std::fs;
use std::time::Instant;

use bruhmcp_db::crypto::KeyRing;
use bruhmcp_db::import::{self, Options, System};
use bruhmcp_db::migrations::MIGRATIONS;
use bruhmcp_devdb::Server;
use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel_migrations::MigrationHarness;

type Result<T = ()> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const OLD: &str = include_str!("../../crates/import/tests/it/old_a.sql");
const ROWS: &str = include_str!("rows.sql");

fn main() -> Result {
    let mut numbers = env::args()
        .filter_map(|argument| argument.parse().ok())
        .collect::<Vec<u32>>();
    if numbers.is_empty() {
        numbers = vec![10_000, 100_000];
    }
    // As in production: a batch that is committed is on the disk.
    let server = Server::private(&[
        ("fsync", "on"),
        ("synchronous_commit", "on"),
        ("full_page_writes", "on"),
        ("max_wal_size", "4GB"),
    ])?;
    println!("| Users | Rows | Import, s | Rows a minute | Check, s | Program, MB |");
    println!("| ---: | ---: | ---: | ---: | ---: | ---: |");
    for users in numbers {
        println!("{}", measure(&server, users)?);
    }
    Ok(())
}

/// Imports a database of this many users, and returns the line about it.
fn measure(server: &Server, users: u32) -> Result<String> {
    let database = server.create_database()?;
    let mut conn = PgConnection::establish(&database.url())?;
    conn.batch_execute(OLD)?;
    conn.batch_execute(&ROWS.replace("{users}", &users.to_string()))?;
    conn.run_pending_migrations(MIGRATIONS)?;
    // As a deploy finds it.
    let mut conn = PgConnection::establish(&database.url())?;
    conn.batch_execute("CHECKPOINT")?;

    let ring = KeyRing::new([(1, &[7; 32][..])])?;
    let system = System::new(Some(&ring));
    let options = Options::default();
    forget_peak()?;
    let (imported, report) =
        timed(|| import::import(&mut conn, &system, &options, true, &mut |_| {}))?;
    let (checked, check) = timed(|| import::check(&mut conn, &system))?;
    if !check.holds() {
        return Err(format!("{:?}", check.differences).into());
    }
    let rows = report.tables.iter().map(|table| table.rows).sum::<i64>();
    let rows = u32::try_from(rows)?;
    Ok(format!(
        "| {users} | {rows} | {imported:.1} | {:.0} | {checked:.1} | {} |",
        f64::from(rows) / imported * 60.0,
        peak()?,
    ))
}

fn timed<T, E: Into<Box<dyn Error + Send + Sync>>>(
    work: impl FnOnce() -> std::result::Result<T, E>,
) -> Result<(f64, T)> {
    let start = Instant::now();
    let done = work().map_err(Into::into)?;
    Ok((start.elapsed().as_secs_f64(), done))
}

/// Lets the peak of this process's memory begin anew. Linux only, as is `peak`.
fn forget_peak() -> Result {
    Ok(fs::write("/proc/self/clear_refs", "5")?)
}

/// Returns the peak of this process's memory in megabytes.
fn peak() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next());
    Ok(kilobytes.ok_or("no VmHWM")?.parse::<u64>()? / 1000)
}
