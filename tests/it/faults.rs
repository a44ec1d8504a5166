//! Faults around the runner, each with the real binary and a real server. `docs/faults.md` has what
//! they see: `BRUHMCP_WRITE=1 script/test faults::` writes it.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bruhmcp_db::migrations::MIGRATIONS;
use bruhmcp_devdb::{Database, Server};
use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel_migrations::MigrationHarness;

use crate::cli::{Outcome, bruhmcp, start};
use crate::difference::assert_same;
use crate::runner::{Folder, names, next_version, versions};

mod ledger;
mod networks;
mod operations;
mod revert;
mod rights;
mod servers;
mod verify;

const USER: &str = "INSERT INTO users (first_name, last_name, email) VALUES ('A', 'B', 'a@b.c')";
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/faults.md");
const HEADER: &str = "\
# What can go wrong while migrations run

Each row is written by the test of that name in `tests/it/faults.rs` or `tests/it/faults/`. The test
causes the fault with the real binary and a real server, and compares what it sees with the row. For
the last column it checks that the schema is the expected one, that each migration was applied once
and that the rows from before are still there. Process ids, times and folders are left out (`…`).

| Fault | Reported | State after | The next run | Test |
| --- | --- | --- | --- | --- |
";

/// The server of the scenarios that neither stop nor configure one.
static SERVER: LazyLock<Server> = LazyLock::new(|| Server::private(&[]).unwrap());

/// A row of the page.
struct Row {
    test: &'static str,
    fault: &'static str,
    reported: String,
    after: String,
    then: String,
}

impl Row {
    /// A row of what was said, the state after it, and the next run.
    fn of(test: &'static str, fault: &'static str, outcome: &Outcome, database: &Database) -> Self {
        Self {
            test,
            fault,
            reported: said(outcome),
            after: state(database),
            then: finish(database),
        }
    }

    /// Compares the row with the page's, or writes it if `BRUHMCP_WRITE` is set.
    #[track_caller]
    fn check(self) {
        let Self {
            test,
            fault,
            reported,
            after,
            then,
        } = self;
        // The newest migration changes.
        let names = names();
        let newest = names.last().unwrap();
        let (version, _) = newest.split_once('_').unwrap();
        let cells = [&reported, &after, &then].map(|cell| {
            cell.replace(newest, "the newest")
                .replace(&format!("at {version}"), "at the newest")
        });
        let row = format!("| {fault} | {} | `{test}` |", cells.join(" | "));
        if std::env::var_os("BRUHMCP_WRITE").is_some() {
            return rewrite(
                |rows| match rows.iter_mut().find(|row| test_of(row) == test) {
                    Some(same) => *same = row,
                    None => rows.push(row),
                },
            );
        }
        let rows = rows();
        let committed = rows.iter().find(|row| test_of(row) == test);
        assert_same(committed.map_or("", String::as_str), &row);
    }
}

/// Rows of the page.
fn rows() -> Vec<String> {
    let page = fs::read_to_string(PAGE).unwrap_or_default();
    let rows = page.lines().filter(|line| line.ends_with("` |"));
    rows.map(str::to_owned).collect()
}

/// Name of the test that writes the row.
fn test_of(row: &str) -> &str {
    row.rsplit('`').nth(1).unwrap_or_default()
}

/// Writes the page with changed rows. Tests of one process take turns.
fn rewrite(change: impl FnOnce(&mut Vec<String>)) {
    static WRITING: Mutex<()> = Mutex::new(());
    let _writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    let mut rows = rows();
    change(&mut rows);
    fs::write(PAGE, format!("{HEADER}{}\n", rows.join("\n"))).unwrap();
}

/// Each row has its test, and each test its row.
#[test]
fn page_is_complete() {
    let tests = Command::new(std::env::current_exe().unwrap())
        .args(["faults::", "--list", "--format", "terse"])
        .output()
        .unwrap();
    let tests = String::from_utf8(tests.stdout).unwrap();
    let mut tests: Vec<&str> = tests
        .lines()
        .filter_map(|line| line.strip_prefix("faults::")?.strip_suffix(": test"))
        .filter_map(|test| test.rsplit("::").next())
        .filter(|&test| test != "page_is_complete")
        .collect();
    if std::env::var_os("BRUHMCP_WRITE").is_some() {
        return rewrite(|rows| rows.retain(|row| tests.contains(&test_of(row))));
    }
    let rows = rows();
    let page = fs::read_to_string(PAGE).unwrap();
    assert_same(&page, &format!("{HEADER}{}\n", rows.join("\n")));
    let mut listed: Vec<&str> = rows.iter().map(|row| test_of(row)).collect();
    listed.sort_unstable();
    tests.sort_unstable();
    assert_same(&tests.join("\n"), &listed.join("\n"));
}

/// Returns the rows of a query, one per line.
fn query(database: &Database, sql: &str) -> String {
    let output = database
        .client("psql")
        .args(["-XAtqc", sql])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{sql}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout)
        .unwrap()
        .trim_end()
        .to_owned()
}

fn dump(database: &Database) -> String {
    let output = database
        .client("pg_dump")
        .args([
            "--schema-only",
            "--exclude-table=__diesel_schema_migrations",
        ])
        .output()
        .unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines()
        .filter(|line| !line.starts_with('\\'))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Polls for something outside this process.
pub(crate) fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !happened() {
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "{what} did not happen"
        );
        thread::sleep(Duration::from_millis(10));
    }
}

/// Returns the applied versions, oldest first.
fn applied(database: &Database) -> Vec<String> {
    if query(
        database,
        "SELECT to_regclass('__diesel_schema_migrations') IS NULL",
    ) == "t"
    {
        return Vec::new();
    }
    let versions = query(
        database,
        "SELECT version FROM __diesel_schema_migrations ORDER BY version",
    );
    versions.lines().map(str::to_owned).collect()
}

/// Describes what is applied, after checking that no version is left out.
fn state(database: &Database) -> String {
    let applied = applied(database);
    assert_eq!(applied, versions()[..applied.len()]);
    match &applied[..] {
        [] => "nothing applied".into(),
        [..] if applied.len() == versions().len() => "all applied".into(),
        [.., last] => format!("applied to {last}"),
    }
}

/// Adds a row to the ledger.
fn record(database: &Database, version: &str) {
    let insert = format!("INSERT INTO __diesel_schema_migrations VALUES ('{version}')");
    query(database, &insert);
}

/// Deletes a row of the ledger.
fn forget(database: &Database, version: &str) {
    let delete = format!("DELETE FROM __diesel_schema_migrations WHERE version = '{version}'");
    query(database, &delete);
}

/// Creates a database at 001, with a user in it.
fn with_user(server: &Server) -> Database {
    let database = server.create_database().unwrap();
    let run = bruhmcp(&database.url(), &["run", "--to", "001"]);
    assert_eq!(run.code, Some(0), "{run:?}");
    query(&database, USER);
    database
}

/// Applies what is pending, and checks that nothing is missing.
fn finish(database: &Database) -> String {
    let url = database.url();
    let users = "SELECT count(*) FROM users";
    let before = if applied(database).len() > 1 {
        query(database, users)
    } else {
        "0".into()
    };
    let run = bruhmcp(&url, &["run"]);
    assert_eq!(run.code, Some(0), "{run:?}");
    assert_eq!(applied(database), versions());
    let verify = bruhmcp(&url, &["verify"]);
    assert_eq!(verify.code, Some(0), "{verify:?}");
    assert_eq!(query(database, users), before);
    let left = query(
        database,
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
    );
    assert_eq!(left, "0");
    "exit 0, complete".into()
}

/// Returns the exit code and the messages, without what differs from run to run.
fn said(outcome: &Outcome) -> String {
    let mut text = outcome.err.clone();
    for (before, after) in [
        ("process ", ""),
        ("transaction ", " s old"),
        ("query ", " s old"),
        ("Process ", ""),
        ("on relation ", ""),
        ("of database ", ""),
        ("since ", " UTC"),
        ("up after ", " s"),
        ("host=", "&"),
        ("on socket \"", "\""),
        // The reason differs between versions.
        ("extend file ", "\n"),
        ("was lost (", ")\n"),
        ("be reached (", "). Run"),
        ("database \"bruhmcp_dev", "\""),
    ] {
        let mut rest = text.as_str();
        let mut cleaned = String::new();
        while let Some((head, tail)) = rest.split_once(before) {
            let end = if after.is_empty() {
                let is_other = |letter: char| !letter.is_ascii_digit();
                Some(tail.find(is_other).unwrap_or(tail.len()))
            } else {
                tail.find(after)
            };
            let dots = end.map_or("", |_| "…");
            write!(cleaned, "{head}{before}{dots}").unwrap();
            rest = &tail[end.unwrap_or(0)..];
        }
        text = cleaned + rest;
    }
    let text = text.replace(&next_version(), "…");
    let code = outcome
        .code
        .map_or("killed".into(), |code| format!("exit {code}"));
    let lines: Vec<&str> = text
        .lines()
        .map(|line| line.trim().trim_start_matches("error: "))
        .filter(|line| !line.is_empty())
        // How often these come depends on timers.
        .filter(|line| {
            !line.contains(": running for ") && !line.contains(" waits for server process ")
        })
        .collect();
    if lines.is_empty() {
        code
    } else {
        format!("{code}: {}", lines.join("<br>").replace('|', "\\|"))
    }
}

/// Opens a session that locks `users` until it is dropped.
fn hold_users(database: &Database) -> PgConnection {
    let mut connection = PgConnection::establish(&database.url()).unwrap();
    connection.batch_execute("BEGIN; LOCK TABLE users").unwrap();
    connection
}

const RUNNERS: &str = "FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'bruhmcp-db %'";

/// Starts a run on a database at 001 that waits in 002 for the lock of [`hold_users`].
fn stuck_run(database: &Database, arguments: &[&str]) -> Child {
    let child = start(&database.url(), &[&["run"], arguments].concat());
    until_stuck(database);
    child
}

fn until_stuck(database: &Database) {
    until("a runner waiting for the table", || {
        query(
            database,
            &format!("SELECT count(*) {RUNNERS} AND wait_event_type = 'Lock'"),
        ) == "1"
    });
}

fn ended(child: Child) -> Outcome {
    child.wait_with_output().unwrap().into()
}

fn with_parameter(database: &Database, parameter: &str) -> String {
    format!("{}&{parameter}", database.url())
}

#[test]
fn runners_at_once() {
    let server = &*SERVER;
    for _ in 0..25 {
        let database = server.create_database().unwrap();
        let runners: Vec<Child> = (0..16)
            .map(|_| start(&database.url(), &["run", "--json"]))
            .collect();
        let mut steps = 0;
        for outcome in runners.into_iter().map(ended) {
            assert_eq!(outcome.code, Some(0), "{outcome:?}");
            let report: serde_json::Value = serde_json::from_str(&outcome.out).unwrap();
            steps += report["report"]["steps"].as_array().unwrap().len();
        }
        assert_eq!(steps, versions().len());
        finish(&database);
    }
    Row {
        test: "runners_at_once",
        fault: "16 runners start at once on an empty database, 25 times",
        reported: "exit 0 from each of the 400; each migration is reported by one of 16".into(),
        after: "all applied".into(),
        then: "exit 0, nothing to do".into(),
    }
    .check();
}

/// Kills a command at 20 points spread over the time it takes, each on a copy of `template`, and
/// calls `check` with the database.
fn killed(server: &Server, template: &Database, arguments: &[&str], check: impl Fn(&Database)) {
    // The schema by the number of applied versions.
    let clean = server.create_database().unwrap();
    let mut states = vec![dump(&clean)];
    for version in versions() {
        let run = bruhmcp(&clean.url(), &["run", "--to", &version]);
        assert_eq!(run.code, Some(0), "{run:?}");
        states.push(dump(&clean));
    }
    let database = server.create_database_from(template).unwrap();
    let begin = Instant::now();
    assert_eq!(bruhmcp(&database.url(), arguments).code, Some(0));
    let duration = begin.elapsed();
    for point in 0..20 {
        let database = server.create_database_from(template).unwrap();
        let mut child = start(&database.url(), arguments);
        // Not a wait for something: the time of the kill is what varies.
        thread::sleep(duration * point / 20);
        child.kill().unwrap();
        child.wait().unwrap();
        until("the end of the killed runner's session", || {
            query(&database, &format!("SELECT count(*) {RUNNERS}")) == "0"
        });
        state(&database);
        assert_same(&states[applied(&database).len()], &dump(&database));
        check(&database);
    }
}

const BOUNDARY: &str = "each time that of a complete run to some version; the session ends by itself and releases its locks";

#[test]
fn kill_minus_9_during_run() {
    let server = &*SERVER;
    killed(server, &with_user(server), &["run"], |database| {
        finish(database);
        assert_eq!(query(database, "SELECT count(*) FROM users"), "1");
    });
    Row {
        test: "kill_minus_9_during_run",
        fault: "kill -9 of the client during run, at 20 points",
        reported: "nothing".into(),
        after: BOUNDARY.into(),
        then: "exit 0, complete".into(),
    }
    .check();
}

/// Creates a database with all migrations and a user.
fn full(server: &Server) -> Database {
    let database = with_user(server);
    assert_eq!(bruhmcp(&database.url(), &["run"]).code, Some(0));
    database
}

#[test]
fn kill_minus_9_during_revert() {
    let server = &*SERVER;
    killed(
        server,
        &full(server),
        &["revert", "--to", "001", "--yes"],
        |database| {
            assert!([2, versions().len()].contains(&applied(database).len()));
            let revert = bruhmcp(&database.url(), &["revert", "--to", "001", "--yes"]);
            assert_eq!(revert.code, Some(0), "{revert:?}");
            assert_eq!(applied(database), versions()[..2]);
            finish(database);
            assert_eq!(query(database, "SELECT count(*) FROM users"), "1");
        },
    );
    Row {
        test: "kill_minus_9_during_revert",
        fault: "kill -9 of the client during revert to 001, at 20 points",
        reported: "nothing".into(),
        after: "each time all applied or at 001; the session ends by itself and releases its locks"
            .into(),
        then: "revert: exit 0, at 001; run: exit 0, complete".into(),
    }
    .check();
}

#[test]
fn kill_minus_9_during_redo() {
    let server = &*SERVER;
    killed(
        server,
        &full(server),
        &["redo", "-n", "4", "--yes"],
        |database| {
            assert_eq!(applied(database), versions());
            finish(database);
            assert_eq!(query(database, "SELECT count(*) FROM users"), "1");
        },
    );
    Row {
        test: "kill_minus_9_during_redo",
        fault: "kill -9 of the client during redo of the last 4, at 20 points",
        reported: "nothing".into(),
        after: "each time all applied; the session ends by itself and releases its locks".into(),
        then: "exit 0, complete".into(),
    }
    .check();
}

#[test]
fn backend_terminated() {
    let server = &*SERVER;
    let database = with_user(server);
    let holder = hold_users(&database);
    let run = stuck_run(&database, &[]);
    query(
        &database,
        &format!("SELECT pg_terminate_backend(pid) {RUNNERS}"),
    );
    let outcome = ended(run);
    drop(holder);
    Row::of(
        "backend_terminated",
        "pg_terminate_backend in the middle of 002",
        &outcome,
        &database,
    )
    .check();
}

#[test]
fn server_crashes() {
    let server = Server::private(&[]).unwrap();
    let database = with_user(&server);
    let holder = hold_users(&database);
    let run = stuck_run(&database, &[]);
    server.stop(true).unwrap();
    let outcome = ended(run);
    drop(holder);
    server.start_again().unwrap();
    Row::of(
        "server_crashes",
        "the server crashes in the middle of 002",
        &outcome,
        &database,
    )
    .check();
}

#[test]
fn server_crashes_and_returns() {
    let server = Server::private(&[]).unwrap();
    let database = with_user(&server);
    let holder = hold_users(&database);
    let run = stuck_run(&database, &["--wait", "3600"]);
    server.stop(true).unwrap();
    drop(holder);
    server.start_again().unwrap();
    let outcome = ended(run);
    Row::of(
        "server_crashes_and_returns",
        "the server crashes in the middle of 002 and restarts, with --wait",
        &outcome,
        &database,
    )
    .check();
}

/// Runs other migrations by the library. The binary prints the same text.
fn custom(database: &Database, folder: &Folder) -> Outcome {
    match folder.runner_at(&database.url()).run() {
        Ok(_) => Outcome {
            code: Some(0),
            out: String::new(),
            err: String::new(),
        },
        Err(error) => Outcome {
            code: Some(1),
            out: String::new(),
            err: error.to_string(),
        },
    }
}

/// Only root could fill a file system. A limit on the size of the server's files makes the same
/// system call fail.
#[test]
fn no_space() {
    let server = Server::private(&[]).unwrap();
    let database = server.create_database().unwrap();
    // The server sets it: its account may limit its own process.
    let limit = |size: &str| {
        let pid = server.postmaster_pid().unwrap();
        query(
            &database,
            &format!("COPY (SELECT) TO PROGRAM 'prlimit --pid {pid} --fsize={size}:'"),
        );
    };
    let folder = Folder::new(&[
        (
            "001_small",
            "CREATE TABLE small AS SELECT 1 AS a",
            "DROP TABLE small",
        ),
        (
            "002_big",
            "CREATE TABLE big (a text);\nINSERT INTO big SELECT repeat('x', 1000) FROM generate_series(1, 40000)",
            "DROP TABLE big",
        ),
    ]);
    limit("25000000");
    let outcome = custom(&database, &folder);
    let after = query(
        &database,
        "SELECT string_agg(relname, ', ') FROM pg_class WHERE relname IN ('small', 'big')",
    );
    assert_eq!(after, "small");
    limit("unlimited");
    assert_eq!(custom(&database, &folder).code, Some(0));
    assert_eq!(query(&database, "SELECT count(*) FROM big"), "40000");
    Row {
        test: "no_space",
        fault: "no space for a table's file (simulated: the server's files are limited to 25 MB)",
        reported: said(&outcome),
        after: "applied to 001".into(),
        then: "exit 0, complete".into(),
    }
    .check();
}

#[test]
fn failing_statement() {
    let server = &*SERVER;
    let database = server.create_database().unwrap();
    let broken = [
        (
            "001_first",
            "CREATE TABLE first (a int PRIMARY KEY)",
            "DROP TABLE first",
        ),
        (
            "002_second",
            "CREATE TABLE second (a int);\nINSERT INTO second VALUES (1);\nUPDATE second\nSET b = 2;",
            "DROP TABLE second",
        ),
    ];
    let outcome = custom(&database, &Folder::new(&broken));
    assert_eq!(
        query(
            &database,
            "SELECT to_regclass('second') IS NULL AND to_regclass('first') IS NOT NULL"
        ),
        "t"
    );
    let mended = [
        broken[0],
        (
            "002_second",
            "CREATE TABLE second (a int)",
            "DROP TABLE second",
        ),
    ];
    assert_eq!(custom(&database, &Folder::new(&mended)).code, Some(0));
    Row {
        test: "failing_statement",
        fault: "a statement fails in the middle of a file",
        reported: said(&outcome),
        after: "applied to 001".into(),
        then: "with the file corrected: exit 0, complete".into(),
    }
    .check();
}

#[test]
fn failing_outside_transaction() {
    let server = &*SERVER;
    let database = server.create_database().unwrap();
    let folder = Folder::new(&[
        (
            "001_first",
            "CREATE TABLE first AS SELECT 1 AS a FROM generate_series(1, 2)",
            "DROP TABLE first",
        ),
        (
            "002_index",
            "CREATE UNIQUE INDEX CONCURRENTLY first_a_idx ON first (a)",
            "DROP INDEX first_a_idx",
        ),
    ])
    .without_transaction("002_index");
    let outcome = custom(&database, &folder);
    assert_eq!(
        query(
            &database,
            "SELECT indisvalid FROM pg_index WHERE indexrelid = 'first_a_idx'::regclass"
        ),
        "f"
    );
    query(&database, "DROP INDEX first_a_idx");
    query(&database, "DELETE FROM first WHERE ctid = '(0,1)'");
    assert_eq!(custom(&database, &folder).code, Some(0));
    Row {
        test: "failing_outside_transaction",
        fault: "CREATE INDEX CONCURRENTLY fails outside a transaction",
        reported: said(&outcome),
        after: "applied to 001, with an invalid index".into(),
        then: "after DROP INDEX and with the rows corrected: exit 0, complete".into(),
    }
    .check();
}

#[test]
fn lock_held() {
    let server = &*SERVER;
    let database = with_user(server);
    let holder = hold_users(&database);
    let first = stuck_run(&database, &[]);
    let outcome = bruhmcp(&database.url(), &["run", "--lock-wait", "0"]);
    let after = state(&database);
    drop(holder);
    assert_eq!(ended(first).code, Some(0));
    Row {
        test: "lock_held",
        fault: "another runner works, with --lock-wait 0",
        reported: said(&outcome),
        after,
        then: format!("when the other has finished: {}", finish(&database)),
    }
    .check();
}

#[test]
fn lock_released() {
    let server = &*SERVER;
    let database = with_user(server);
    let holder = hold_users(&database);
    let first = stuck_run(&database, &[]);
    let second = start(&database.url(), &["run"]);
    until("both runners", || {
        query(&database, &format!("SELECT count(*) {RUNNERS}")) == "2"
    });
    drop(holder);
    assert_eq!(ended(first).code, Some(0));
    let outcome = ended(second);
    assert_eq!(outcome.out, "Nothing to do.\n");
    Row::of(
        "lock_released",
        "another runner works and finishes",
        &outcome,
        &database,
    )
    .check();
}

#[test]
fn table_held() {
    let server = &*SERVER;
    let database = with_user(server);
    let holder = hold_users(&database);
    let outcome = ended(stuck_run(&database, &["--tries", "1"]));
    let after = state(&database);
    drop(holder);
    assert!(
        outcome
            .err
            .contains("applying 002_mcp_tables: running for 2 s"),
        "{outcome:?}"
    );
    Row {
        test: "table_held",
        fault: "another session locks a table for more than 5 s, with --tries 1",
        reported: said(&outcome),
        after,
        then: finish(&database),
    }
    .check();
}

#[test]
fn server_down() {
    let server = Server::private(&[]).unwrap();
    let database = with_user(&server);
    server.stop(false).unwrap();
    let outcome = bruhmcp(&database.url(), &["run"]);
    let run = start(&database.url(), &["run", "--wait", "3600"]);
    server.start_again().unwrap();
    assert_eq!(ended(run).code, Some(0));
    Row {
        test: "server_down",
        fault: "the server is down",
        reported: said(&outcome),
        after: "unchanged".into(),
        then: format!(
            "with --wait, before the server starts: {}",
            finish(&database)
        ),
    }
    .check();
}

/// The server starts as long as its recovery waits for a file.
#[test]
fn server_starting() {
    let settings = [
        (
            "restore_command",
            "while [ ! -e go ]; do sleep 0.1; done; false",
        ),
        ("hot_standby", "off"),
    ];
    let server = Server::private(&settings).unwrap();
    let database = with_user(&server);
    let folder = server.folder().unwrap();
    server.stop(false).unwrap();
    fs::write(folder.join("data/recovery.signal"), "").unwrap();
    let refused = || {
        fs::read_to_string(folder.join("log"))
            .unwrap()
            .matches("the database system is starting up")
            .count()
    };
    let (outcome, run) = thread::scope(|scope| {
        scope.spawn(|| server.start_again().unwrap());
        until("a starting server", || {
            PgConnection::establish(&database.url())
                .is_err_and(|error| error.to_string().contains("starting up"))
        });
        let outcome = bruhmcp(&database.url(), &["run"]);
        let run = start(&database.url(), &["run", "--wait", "3600"]);
        let before = refused();
        until("more tries of the runner", || refused() > before + 20);
        fs::write(folder.join("data/go"), "").unwrap();
        (outcome, ended(run))
    });
    assert_eq!(run.code, Some(0), "{run:?}");
    Row {
        test: "server_starting",
        fault: "the server is starting",
        reported: said(&outcome),
        after: "unchanged".into(),
        then: format!("with --wait: {}", finish(&database)),
    }
    .check();
}

#[test]
fn wrong_password() {
    let server = Server::private(&[]).unwrap();
    let database = with_user(&server);
    query(&database, "CREATE ROLE somebody LOGIN PASSWORD 'right'");
    fs::write(
        server.folder().unwrap().join("data/pg_hba.conf"),
        "local all postgres trust\nlocal all all scram-sha-256\n",
    )
    .unwrap();
    server.stop(false).unwrap();
    server.start_again().unwrap();
    let url = database
        .url()
        .replace("user=postgres", "user=somebody&password=hushhush");
    let outcome = bruhmcp(&url, &["run", "--wait", "86400"]);
    assert!(!format!("{outcome:?}").contains("hush"), "{outcome:?}");
    Row::of(
        "wrong_password",
        "a wrong password, with --wait 86400",
        &outcome,
        &database,
    )
    .check();
}

#[test]
fn wrong_database() {
    let server = &*SERVER;
    let database = with_user(server);
    let url = database.url().replace(database.name(), "no_such_database");
    let outcome = bruhmcp(&url, &["run", "--wait", "86400"]);
    Row::of(
        "wrong_database",
        "a database that doesn't exist, with --wait 86400",
        &outcome,
        &database,
    )
    .check();
}

#[test]
fn no_rights() {
    let server = &*SERVER;
    let database = with_user(server);
    query(&database, "CREATE ROLE stranger LOGIN");
    let url = database.url().replace("user=postgres", "user=stranger");
    let outcome = bruhmcp(&url, &["run"]);
    assert_eq!(said(&bruhmcp(&url, &["status"])), said(&outcome));
    let after = state(&database);
    let then = finish(&database);
    let verify = bruhmcp(&url, &["verify"]);
    assert_eq!(said(&verify), said(&bruhmcp(&url, &["status"])));
    Row {
        test: "no_rights",
        fault: "a role without rights",
        reported: format!(
            "{}<br>`status` and `verify` report the same.",
            said(&outcome)
        ),
        after,
        then: format!("with the owner's role: {then}"),
    }
    .check();
}

#[test]
fn read_only() {
    let server = &*SERVER;
    let database = with_user(server);
    let url = with_parameter(&database, "options=-cdefault_transaction_read_only%3Don");
    let outcome = bruhmcp(&url, &["run"]);
    assert_eq!(bruhmcp(&url, &["status"]).code, Some(3));
    let after = state(&database);
    let then = finish(&database);
    assert_eq!(bruhmcp(&url, &["verify"]).code, Some(0));
    Row {
        test: "read_only",
        fault: "a read-only session",
        reported: format!("{}<br>`status` and `verify` work.", said(&outcome)),
        after,
        then: format!("without it: {then}"),
    }
    .check();
}

/// A standby without a primary.
#[test]
fn replica() {
    let server = Server::private(&[]).unwrap();
    let database = with_user(&server);
    let signal = server.folder().unwrap().join("data/standby.signal");
    server.stop(false).unwrap();
    fs::write(&signal, "").unwrap();
    server.start_again().unwrap();
    assert_eq!(query(&database, "SELECT pg_is_in_recovery()"), "t");
    let outcome = bruhmcp(&database.url(), &["run"]);
    let status = bruhmcp(&database.url(), &["status"]);
    assert_eq!(status.code, Some(3), "{status:?}");
    assert_eq!(bruhmcp(&database.url(), &["verify"]).code, Some(3));
    server.stop(false).unwrap();
    fs::remove_file(&signal).unwrap();
    server.start_again().unwrap();
    Row {
        test: "replica",
        fault: "a replica",
        reported: format!("{}<br>`status` and `verify` work.", said(&outcome)),
        after: state(&database),
        then: format!("on the primary: {}", finish(&database)),
    }
    .check();
}

#[test]
fn search_path() {
    let server = &*SERVER;
    let database = with_user(server);
    query(&database, "CREATE SCHEMA other");
    let url = with_parameter(&database, "options=-csearch_path%3Dother");
    let outcome = bruhmcp(&url, &["run"]);
    let status = bruhmcp(&url, &["status"]);
    assert_eq!(
        (status.code, status.out.matches("pending  ").count()),
        (Some(3), names().len() - 2),
        "{status:?}"
    );
    Row {
        test: "search_path",
        fault: "a search_path that begins with another schema",
        reported: format!("{}<br>`status` reads public.", said(&outcome)),
        after: state(&database),
        then: format!("without it: {}", finish(&database)),
    }
    .check();
}

#[test]
fn newer_version() {
    let server = &*SERVER;
    let database = full(server);
    record(&database, &next_version());
    let outcome = bruhmcp(&database.url(), &["run"]);
    Row {
        test: "newer_version",
        fault: "a newer program has applied a newer version, nothing is pending (a rolling deploy)",
        reported: said(&outcome),
        after: "unchanged".into(),
        then: "the same".into(),
    }
    .check();
}

#[test]
fn unknown_version() {
    let server = &*SERVER;
    let database = with_user(server);
    record(&database, &next_version());
    let outcome = bruhmcp(&database.url(), &["run"]);
    forget(&database, &next_version());
    Row {
        test: "unknown_version",
        fault: "an unknown version is applied, others are pending",
        reported: said(&outcome),
        after: state(&database),
        then: format!("with the row deleted: {}", finish(&database)),
    }
    .check();
}

#[test]
fn out_of_order() {
    let server = &*SERVER;
    let database = with_user(server);
    let run = bruhmcp(&database.url(), &["run", "--to", "004"]);
    assert_eq!(run.code, Some(0), "{run:?}");
    forget(&database, "003");
    let outcome = bruhmcp(&database.url(), &["run"]);
    record(&database, "003");
    Row {
        test: "out_of_order",
        fault: "a pending version is older than an applied one",
        reported: said(&outcome),
        after: "unchanged".into(),
        then: format!("with the row put back: {}", finish(&database)),
    }
    .check();
}

#[test]
fn diesel_cli() {
    let server = &*SERVER;
    for _ in 0..5 {
        let database = server.create_database().unwrap();
        let folder = Folder::new(&[("empty", "", "")]);
        let config = folder.path().join("diesel.toml");
        fs::write(&config, "").unwrap();
        let diesel = Command::new("diesel")
            .args([
                "migration",
                "run",
                "--migration-dir",
                concat!(env!("CARGO_MANIFEST_DIR"), "/migrations"),
                "--config-file",
            ])
            .arg(&config)
            .env("DATABASE_URL", database.url())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let run = start(&database.url(), &["run"]);
        if let Ok(diesel) = diesel {
            let outcome = ended(diesel);
            assert!(matches!(outcome.code, Some(0 | 1)), "{outcome:?}");
        } else {
            // Success and failure are both right, as above.
            let _ = PgConnection::establish(&database.url())
                .unwrap()
                .run_pending_migrations(MIGRATIONS);
        }
        let outcome = ended(run);
        assert!(matches!(outcome.code, Some(0 | 1)), "{outcome:?}");
        state(&database);
        finish(&database);
    }
    Row {
        test: "diesel_cli",
        fault: "`diesel migration run` (or its harness, without the CLI), which takes no lock, at the same time, 5 times",
        reported: "exit 0, or exit 1 from the one that was second at a migration and names it"
            .into(),
        after: "applied to some version, each once".into(),
        then: "exit 0, complete".into(),
    }
    .check();
}

/// PgBouncer in transaction mode, for a server.
pub(crate) struct Bouncer {
    folder: PathBuf,
    child: Child,
}

impl Bouncer {
    /// Starts a version of `pgbouncer` with further settings, a line each.
    pub(crate) fn start(program: impl AsRef<OsStr>, server: &Server, settings: &str) -> Self {
        let folder =
            std::env::temp_dir().join(format!("bruhmcp_{}", uuid::Uuid::new_v4().simple()));
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        let path = folder.display();
        let users = ["postgres", "app_c7", "app_c8"].map(|user| format!("\"{user}\" \"\"\n"));
        fs::write(folder.join("users"), users.concat()).unwrap();
        fs::write(
            folder.join("ini"),
            format!(
                "[databases]\n* = host={} port=5432\n[pgbouncer]\nlisten_addr =\nlisten_port = 6432\nunix_socket_dir = {path}\n\
                 auth_type = trust\nauth_file = {path}/users\npool_mode = transaction\n{settings}\n",
                server.folder().unwrap().display()
            ),
        )
        .unwrap();
        let id = Command::new("id").arg("-u").output().unwrap();
        let mut command = Self::command(program);
        if id.stdout == b"0\n" {
            command.args(["-u", "postgres"]);
        }
        let child = command
            .arg("-q")
            .arg(folder.join("ini"))
            .stderr(Stdio::null())
            .spawn()
            .expect("pgbouncer is needed: apt-get install pgbouncer, or brew install pgbouncer");
        Self { folder, child }
    }

    fn command(program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        // Debian has pgbouncer in a folder of root's PATH.
        if let Some(path) = std::env::var_os("PATH") {
            let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
            folders.push("/usr/sbin".into());
            command.env("PATH", std::env::join_paths(folders).unwrap());
        }
        command
    }

    /// Returns the setting that turns prepared statements off. Before 1.21 there are neither.
    pub(crate) fn without_prepared_statements(program: &str) -> &'static str {
        let version = Self::command(program).arg("--version").output().unwrap();
        let version = String::from_utf8(version.stdout).unwrap();
        let minor = version.split('.').nth(1).unwrap();
        if minor.parse::<u32>().unwrap() < 21 {
            ""
        } else {
            "max_prepared_statements = 0"
        }
    }

    pub(crate) fn url(&self, database: &Database) -> String {
        self.url_of(database.name(), "postgres")
    }

    /// The URL of a database as PgBouncer names it.
    pub(crate) fn url_of(&self, database: &str, user: &str) -> String {
        let url = format!(
            "postgresql:///{database}?host={}&port=6432&user={user}",
            self.folder.display()
        );
        until("pgbouncer's start", || {
            PgConnection::establish(&url).is_ok()
        });
        url
    }
}

impl Drop for Bouncer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn through_pooler(server: &Server, ignored: &str) -> (String, String, String) {
    let database = with_user(server);
    let settings = format!("ignore_startup_parameters = {ignored}");
    let bouncer = Bouncer::start("pgbouncer", server, &settings);
    let url = bouncer.url(&database);
    let runners: Vec<Child> = (0..4).map(|_| start(&url, &["run"])).collect();
    let outcomes: Vec<String> = runners
        .into_iter()
        .map(|runner| said(&ended(runner)))
        .collect();
    assert!(
        outcomes.iter().all(|outcome| *outcome == outcomes[0]),
        "{outcomes:?}"
    );
    assert_eq!(bruhmcp(&url, &["status"]).code, Some(3));
    let after = state(&database);
    let then = finish(&database);
    let run = bruhmcp(&url, &["run"]);
    assert_eq!(
        (run.code, &run.out[..]),
        (Some(0), "Nothing to do.\n"),
        "{run:?}"
    );
    assert_eq!(bruhmcp(&url, &["verify"]).code, Some(0));
    (
        format!(
            "{}<br>`status`, `verify`, and `run` with nothing pending work.",
            outcomes[0]
        ),
        after,
        format!("with the server's own address: {then}"),
    )
}

#[test]
fn pooler() {
    let server = &*SERVER;
    let (reported, after, then) = through_pooler(server, "extra_float_digits");
    Row {
        test: "pooler",
        fault: "PgBouncer in transaction mode, 4 runners at once",
        reported,
        after,
        then,
    }
    .check();
}

#[test]
fn pooler_that_drops_options() {
    let server = &*SERVER;
    let (reported, after, then) = through_pooler(server, "extra_float_digits, options");
    Row {
        test: "pooler_that_drops_options",
        fault: "PgBouncer in transaction mode with ignore_startup_parameters = options, 4 runners at once",
        reported,
        after,
        then,
    }
    .check();
}
