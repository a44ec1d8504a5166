//! What becomes of a database when something goes wrong around the runner; `docs/faults.md` is this test's report.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bruhmcp_db::migrations::MIGRATIONS;
use bruhmcp_devdb::{Database, Server};
use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel_migrations::MigrationHarness;

use crate::cli::{Outcome, bruhmcp, start};
use crate::difference::check_generated;
use crate::runner::Folder;

const VERSIONS: [&str; 8] = ["000", "001", "002", "003", "004", "005", "006", "007"];
const USER: &str = "INSERT INTO users (first_name, last_name, email) VALUES ('A', 'B', 'a@b.c')";

/// A line of the matrix.
struct Row {
    fault: &'static str,
    reported: String,
    after: String,
    then: String,
}

type Scenario = fn(&Server) -> Row;

#[test]
fn generated_faults() {
    let scenarios: [Scenario; 27] = [
        race,
        killed_run,
        killed_revert,
        killed_redo,
        backend_terminated,
        server_stopped,
        server_restarted,
        no_space,
        failing_statement,
        failing_outside_transaction,
        lock_held,
        lock_released,
        table_held,
        server_down,
        server_coming_up,
        wrong_password,
        wrong_database,
        no_rights,
        read_only,
        replica,
        search_path,
        newer_version,
        unknown_version,
        out_of_order,
        diesel_cli,
        pooler,
        pooler_that_drops_options,
    ];
    let server = Server::private(&[]).unwrap();
    let next = AtomicUsize::new(0);
    let rows = Mutex::new(BTreeMap::new());
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(scenario) = scenarios.get(index) else {
                        break;
                    };

                    let row = scenario(&server);

                    rows.lock().unwrap().insert(index, row);
                }
            });
        }
    });
    check_generated(
        "generated_faults",
        "docs/faults.md",
        &page(rows.into_inner().unwrap().values()),
    );
}

fn page<'a>(rows: impl Iterator<Item = &'a Row>) -> String {
    let mut page = String::from(
        "# What can go wrong while migrations run\n\n\
         Written by a test (`generated_faults` in `tests/it/faults.rs`), which brings each fault about with the real binary \
         and a real server, compares the outcome with this page, and proves before the last column is filled that the schema \
         is exactly the expected one, that each migration was applied once and that the rows from before are still there. \
         Process numbers, times and folders are left out.\n\n\
         | Fault | Reported | State after | The next run |\n| --- | --- | --- | --- |\n",
    );
    for Row {
        fault,
        reported,
        after,
        then,
    } in rows
    {
        writeln!(page, "| {fault} | {reported} | {after} | {then} |").unwrap();
    }
    page
}

// Tools.

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

/// Waits for something outside of this process; each try is a query.
fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !happened() {
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "{what} did not happen"
        );
        thread::sleep(Duration::from_millis(10));
    }
}

/// Applied versions in their order.
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

/// What is applied, in words.
fn state(database: &Database) -> String {
    let applied = applied(database);
    assert_eq!(applied, VERSIONS[..applied.len()]);
    match &applied[..] {
        [] => "nothing applied".into(),
        [.., last] if applied.len() == VERSIONS.len() => format!("all applied, to {last}"),
        [.., last] => format!("applied to {last}, nothing of the next"),
    }
}

/// A database at 001 with a user in it.
fn with_user(server: &Server) -> Database {
    let database = server.create_database().unwrap();
    assert_eq!(
        bruhmcp(&database.url(), &["run", "--to", "001"]).code,
        Some(0)
    );
    query(&database, USER);
    database
}

/// Runs what is left and proves that nothing is missing.
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
    assert_eq!(applied(database), VERSIONS);
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

/// What was said, without what differs from run to run.
fn said(outcome: &Outcome) -> String {
    let mut text = outcome.err.clone();
    for (before, after) in [
        ("server process ", ""),
        ("process ", ""),
        ("since ", " UTC"),
        ("up after ", " s"),
        ("host=", "&"),
        ("on socket \"", "\""),
        ("extend file \"", "\""),
        ("was lost (", ")\n"),
        ("be reached (", "). Run"),
        ("database \"bruhmcp_dev", "\""),
    ] {
        let mut rest = text.as_str();
        let mut cleaned = String::new();
        while let Some((head, tail)) = rest.split_once(before) {
            let end = if after.is_empty() {
                tail.find(|letter: char| !letter.is_ascii_digit())
                    .unwrap_or(tail.len())
            } else {
                tail.find(after).unwrap_or(0)
            };
            write!(cleaned, "{head}{before}…").unwrap();
            rest = &tail[end..];
        }
        text = cleaned + rest;
    }
    let code = outcome
        .code
        .map_or("killed".into(), |code| format!("exit {code}"));
    let lines: Vec<&str> = text
        .lines()
        .map(|line| line.trim().trim_start_matches("error: "))
        .filter(|line| !line.is_empty())
        .collect();
    if lines.is_empty() {
        code
    } else {
        format!("{code}: {}", lines.join("<br>").replace('|', "\\|"))
    }
}

/// A session of the test's own that keeps `users` to itself until it is dropped.
fn hold_users(database: &Database) -> PgConnection {
    let mut connection = PgConnection::establish(&database.url()).unwrap();
    connection.batch_execute("BEGIN; LOCK TABLE users").unwrap();
    connection
}

const RUNNERS: &str = "FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'bruhmcp-db %'";

/// Starts a run on a database at 001 that gets stuck in the middle of 002, behind the lock of [`hold_users`].
fn stuck_run(database: &Database, arguments: &[&str]) -> Child {
    let child = start(&database.url(), &[&["run"], arguments].concat());
    until("a runner waiting for the table", || {
        query(
            database,
            &format!("SELECT count(*) {RUNNERS} AND wait_event_type = 'Lock'"),
        ) == "1"
    });
    child
}

fn ended(child: Child) -> Outcome {
    child.wait_with_output().unwrap().into()
}

fn with_parameter(database: &Database, parameter: &str) -> String {
    format!("{}&{parameter}", database.url())
}

// The faults.

fn race(server: &Server) -> Row {
    for _ in 0..25 {
        let database = server.create_database().unwrap();
        let runners: Vec<Child> = (0..16)
            .map(|_| start(&database.url(), &["run", "--json"]))
            .collect();
        let mut steps = 0;
        for outcome in runners.into_iter().map(ended) {
            assert_eq!(outcome.code, Some(0), "{outcome:?}");
            let report: serde_json::Value = serde_json::from_str(&outcome.out).unwrap();
            steps += report["steps"].as_array().unwrap().len();
        }
        assert_eq!(steps, VERSIONS.len());
        finish(&database);
    }
    Row {
        fault: "16 runners at once on an empty database, 25 times",
        reported: "exit 0 from each of the 400; of 16, each migration is reported by one".into(),
        after: "all applied, to 007".into(),
        then: "exit 0, nothing to do".into(),
    }
}

/// Kills a command at 20 moments spread over the time it takes, each on a copy of `template`. `check` gets what is left.
fn killed(server: &Server, template: &Database, arguments: &[&str], check: impl Fn(&Database)) {
    // The schema at each number of applied versions.
    let clean = server.create_database().unwrap();
    let mut states = vec![dump(&clean)];
    for version in VERSIONS {
        assert_eq!(
            bruhmcp(&clean.url(), &["run", "--to", version]).code,
            Some(0)
        );
        states.push(dump(&clean));
    }
    let database = server.create_database_from(template).unwrap();
    let begin = Instant::now();
    assert_eq!(bruhmcp(&database.url(), arguments).code, Some(0));
    let duration = begin.elapsed();
    for moment in 0..20 {
        let database = server.create_database_from(template).unwrap();
        let mut child = start(&database.url(), arguments);
        // The moment is what is varied here, not what is waited for.
        thread::sleep(duration * moment / 20);
        child.kill().unwrap();
        child.wait().unwrap();
        until("the end of the killed runner's session", || {
            query(&database, &format!("SELECT count(*) {RUNNERS}")) == "0"
        });
        state(&database);
        assert!(
            dump(&database) == states[applied(&database).len()],
            "moment {moment}"
        );
        check(&database);
    }
}

const BOUNDARY: &str = "each time exactly that of a clean run up to some version; its session ends without help, and its locks with it";

fn killed_run(server: &Server) -> Row {
    killed(server, &with_user(server), &["run"], |database| {
        finish(database);
        assert_eq!(query(database, "SELECT count(*) FROM users"), "1");
    });
    Row {
        fault: "kill -9 of the client, run, at 20 moments",
        reported: "nothing: it was killed".into(),
        after: BOUNDARY.into(),
        then: "exit 0, complete".into(),
    }
}

fn full(server: &Server) -> Database {
    let database = with_user(server);
    assert_eq!(bruhmcp(&database.url(), &["run"]).code, Some(0));
    database
}

fn killed_revert(server: &Server) -> Row {
    killed(
        server,
        &full(server),
        &["revert", "--to", "001", "--yes"],
        |database| {
            let revert = bruhmcp(&database.url(), &["revert", "--to", "001", "--yes"]);
            assert_eq!(revert.code, Some(0), "{revert:?}");
            assert_eq!(applied(database), VERSIONS[..2]);
            finish(database);
            assert_eq!(query(database, "SELECT count(*) FROM users"), "1");
        },
    );
    Row {
        fault: "kill -9 of the client, revert to 001, at 20 moments",
        reported: "nothing: it was killed".into(),
        after: BOUNDARY.into(),
        then: "revert: exit 0, at 001; run: exit 0, complete".into(),
    }
}

fn killed_redo(server: &Server) -> Row {
    killed(
        server,
        &full(server),
        &["redo", "-n", "4", "--yes"],
        |database| {
            finish(database);
            assert_eq!(query(database, "SELECT count(*) FROM users"), "1");
        },
    );
    Row {
        fault: "kill -9 of the client, redo of the last 4, at 20 moments",
        reported: "nothing: it was killed".into(),
        after: BOUNDARY.into(),
        then: "exit 0, complete".into(),
    }
}

fn backend_terminated(server: &Server) -> Row {
    let database = with_user(server);
    let holder = hold_users(&database);
    let run = stuck_run(&database, &[]);
    query(
        &database,
        &format!("SELECT pg_terminate_backend(pid) {RUNNERS}"),
    );
    let outcome = ended(run);
    drop(holder);
    Row {
        fault: "the backend terminated in the middle of 002",
        reported: said(&outcome),
        after: state(&database),
        then: finish(&database),
    }
}

fn server_stopped(_: &Server) -> Row {
    let server = Server::private(&[]).unwrap();
    let database = with_user(&server);
    let holder = hold_users(&database);
    let run = stuck_run(&database, &[]);
    server.stop(true).unwrap();
    let outcome = ended(run);
    drop(holder);
    server.start_again().unwrap();
    Row {
        fault: "the server crashes in the middle of 002",
        reported: said(&outcome),
        after: state(&database),
        then: finish(&database),
    }
}

fn server_restarted(_: &Server) -> Row {
    let server = Server::private(&[]).unwrap();
    let database = with_user(&server);
    let holder = hold_users(&database);
    let run = stuck_run(&database, &["--wait", "3600"]);
    server.stop(true).unwrap();
    drop(holder);
    server.start_again().unwrap();
    let outcome = ended(run);
    Row {
        fault: "the server crashes in the middle of 002 and comes back, run with --wait",
        reported: said(&outcome),
        after: state(&database),
        then: finish(&database),
    }
}

/// Migrations of the test's own through the library: what the binary prints is the error's text.
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

/// No file system can be filled up without root's rights, but a limit on the size of the server's files stops it at the
/// same call.
fn no_space(_: &Server) -> Row {
    let server = Server::private(&[]).unwrap();
    let database = server.create_database().unwrap();
    // By the server's own account, which may do so to its own process.
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
        fault: "no space for a table's file (the server's files limited to 25 MB, in place of a full disk)",
        reported: said(&outcome),
        after: "applied to 001, nothing of the next".into(),
        then: "exit 0, complete".into(),
    }
}

fn failing_statement(server: &Server) -> Row {
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
        fault: "a statement fails in the middle of a file",
        reported: said(&outcome),
        after: "applied to 001, nothing of the next".into(),
        then: "with the file mended: exit 0, complete".into(),
    }
}

fn failing_outside_transaction(server: &Server) -> Row {
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
        fault: "CREATE INDEX CONCURRENTLY fails, outside a transaction",
        reported: said(&outcome),
        after: "applied to 001, and an invalid index is there".into(),
        then: "after DROP INDEX and with the rows mended: exit 0, complete".into(),
    }
}

fn lock_held(server: &Server) -> Row {
    let database = with_user(server);
    let holder = hold_users(&database);
    let first = stuck_run(&database, &[]);
    let outcome = bruhmcp(&database.url(), &["run", "--lock-wait", "0"]);
    let after = state(&database);
    drop(holder);
    assert_eq!(ended(first).code, Some(0));
    Row {
        fault: "another runner is at work, --lock-wait 0",
        reported: said(&outcome),
        after,
        then: format!("once the other is done: {}", finish(&database)),
    }
}

fn lock_released(server: &Server) -> Row {
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
    Row {
        fault: "another runner is at work and finishes",
        reported: said(&outcome),
        after: state(&database),
        then: finish(&database),
    }
}

fn table_held(server: &Server) -> Row {
    let database = with_user(server);
    let holder = hold_users(&database);
    let outcome = ended(stuck_run(&database, &[]));
    let after = state(&database);
    drop(holder);
    assert!(
        outcome
            .err
            .contains("applying 002_mcp_tables: running for 2 s"),
        "{outcome:?}"
    );
    Row {
        fault: "another session holds a table for longer than 5 s",
        reported: said(&outcome),
        after,
        then: finish(&database),
    }
}

fn server_down(_: &Server) -> Row {
    let server = Server::private(&[]).unwrap();
    let database = with_user(&server);
    server.stop(false).unwrap();
    let outcome = bruhmcp(&database.url(), &["run"]);
    let run = start(&database.url(), &["run", "--wait", "3600"]);
    server.start_again().unwrap();
    assert_eq!(ended(run).code, Some(0));
    Row {
        fault: "the server is down",
        reported: said(&outcome),
        after: "unchanged".into(),
        then: format!(
            "with --wait, started before the server: {}",
            finish(&database)
        ),
    }
}

/// A recovery that waits for a file keeps the server from coming up for as long as the test wants.
fn server_coming_up(_: &Server) -> Row {
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
        until("the runner's second try", || refused() > before + 20);
        fs::write(folder.join("data/go"), "").unwrap();
        (outcome, ended(run))
    });
    assert_eq!(run.code, Some(0), "{run:?}");
    Row {
        fault: "the server is still starting",
        reported: said(&outcome),
        after: "unchanged".into(),
        then: format!("with --wait: {}", finish(&database)),
    }
}

fn wrong_password(_: &Server) -> Row {
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
    Row {
        fault: "a wrong password, with --wait 86400",
        reported: said(&outcome),
        after: state(&database),
        then: finish(&database),
    }
}

fn wrong_database(server: &Server) -> Row {
    let database = with_user(server);
    let url = database.url().replace(database.name(), "no_such_database");
    let outcome = bruhmcp(&url, &["run", "--wait", "86400"]);
    Row {
        fault: "a database that doesn't exist, with --wait 86400",
        reported: said(&outcome),
        after: state(&database),
        then: finish(&database),
    }
}

fn no_rights(server: &Server) -> Row {
    let database = with_user(server);
    query(&database, "CREATE ROLE reader LOGIN");
    query(
        &database,
        "GRANT SELECT ON __diesel_schema_migrations TO reader",
    );
    let url = database.url().replace("user=postgres", "user=reader");
    let outcome = bruhmcp(&url, &["run"]);
    let status = bruhmcp(&url, &["status"]);
    assert_eq!(
        (status.code, status.out.matches("pending  ").count()),
        (Some(3), 6),
        "{status:?}"
    );
    let after = state(&database);
    let then = finish(&database);
    assert_eq!(bruhmcp(&url, &["verify"]).code, Some(0));
    Row {
        fault: "a role without CREATE",
        reported: format!("{}; status and verify work", said(&outcome)),
        after,
        then: format!("with the owner's role: {then}"),
    }
}

fn read_only(server: &Server) -> Row {
    let database = with_user(server);
    let url = with_parameter(&database, "options=-cdefault_transaction_read_only%3Don");
    let outcome = bruhmcp(&url, &["run"]);
    assert_eq!(bruhmcp(&url, &["status"]).code, Some(3));
    let after = state(&database);
    let then = finish(&database);
    assert_eq!(bruhmcp(&url, &["verify"]).code, Some(0));
    Row {
        fault: "a read-only session",
        reported: format!("{}; status and verify work", said(&outcome)),
        after,
        then: format!("without it: {then}"),
    }
}

/// A server in recovery, as a replica is; without a primary to follow it waits for one.
fn replica(_: &Server) -> Row {
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
    assert_eq!(bruhmcp(&database.url(), &["verify"]).code, Some(7));
    server.stop(false).unwrap();
    fs::remove_file(&signal).unwrap();
    server.start_again().unwrap();
    Row {
        fault: "a replica",
        reported: format!("{}; status and verify work", said(&outcome)),
        after: state(&database),
        then: format!("on the primary: {}", finish(&database)),
    }
}

fn search_path(server: &Server) -> Row {
    let database = with_user(server);
    query(&database, "CREATE SCHEMA other");
    let url = with_parameter(&database, "options=-csearch_path%3Dother");
    let outcome = bruhmcp(&url, &["run"]);
    let status = bruhmcp(&url, &["status"]);
    assert_eq!(
        (status.code, status.out.matches("pending  ").count()),
        (Some(3), 6),
        "{status:?}"
    );
    Row {
        fault: "a search_path that leads elsewhere",
        reported: format!("{}; status reads public all the same", said(&outcome)),
        after: state(&database),
        then: format!("without it: {}", finish(&database)),
    }
}

fn newer_version(server: &Server) -> Row {
    let database = full(server);
    query(
        &database,
        "INSERT INTO __diesel_schema_migrations VALUES ('008')",
    );
    let outcome = bruhmcp(&database.url(), &["run"]);
    Row {
        fault: "a newer version applied by a newer program, nothing pending (a rolling deploy)",
        reported: said(&outcome),
        after: "unchanged".into(),
        then: "the same".into(),
    }
}

fn unknown_version(server: &Server) -> Row {
    let database = with_user(server);
    query(
        &database,
        "INSERT INTO __diesel_schema_migrations VALUES ('008')",
    );
    let outcome = bruhmcp(&database.url(), &["run"]);
    query(
        &database,
        "DELETE FROM __diesel_schema_migrations WHERE version = '008'",
    );
    Row {
        fault: "an unknown version together with pending ones",
        reported: said(&outcome),
        after: state(&database),
        then: format!("with the row deleted: {}", finish(&database)),
    }
}

fn out_of_order(server: &Server) -> Row {
    let database = full(server);
    query(
        &database,
        "DELETE FROM __diesel_schema_migrations WHERE version = '003'",
    );
    let outcome = bruhmcp(&database.url(), &["run"]);
    query(
        &database,
        "INSERT INTO __diesel_schema_migrations VALUES ('003')",
    );
    Row {
        fault: "a pending version before an applied one",
        reported: said(&outcome),
        after: "unchanged".into(),
        then: format!("with the row put back: {}", finish(&database)),
    }
}

fn diesel_cli(server: &Server) -> Row {
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
            // Either outcome is right, as above.
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
        fault: "`diesel migration run` (or its harness, where the CLI is not installed), which takes no lock, at the same time, 5 times",
        reported: "exit 0, or exit 1 from the one that came second to a migration, which names it"
            .into(),
        after: "applied to some version, nothing of the next, each once".into(),
        then: "exit 0, complete".into(),
    }
}

/// PgBouncer in transaction mode in front of a server.
struct Bouncer {
    folder: PathBuf,
    child: Child,
}

impl Bouncer {
    fn start(server: &Server, ignored: &str) -> Self {
        let folder =
            std::env::temp_dir().join(format!("bruhmcp_{}", uuid::Uuid::new_v4().simple()));
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        let path = folder.display();
        fs::write(folder.join("users"), "\"postgres\" \"\"\n").unwrap();
        fs::write(
            folder.join("ini"),
            format!(
                "[databases]\n* = host={} port=5432\n[pgbouncer]\nlisten_addr =\nlisten_port = 6432\nunix_socket_dir = {path}\n\
                 auth_type = trust\nauth_file = {path}/users\npool_mode = transaction\nignore_startup_parameters = {ignored}\n",
                server.folder().unwrap().display()
            ),
        )
        .unwrap();
        let id = Command::new("id").arg("-u").output().unwrap();
        let mut command = Command::new("pgbouncer");
        // Debian has it where only root's PATH leads.
        if let Some(path) = std::env::var_os("PATH") {
            let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
            folders.push("/usr/sbin".into());
            command.env("PATH", std::env::join_paths(folders).unwrap());
        }
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

    fn url(&self, database: &Database) -> String {
        let url = format!(
            "postgresql:///{}?host={}&port=6432&user=postgres",
            database.name(),
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
    let bouncer = Bouncer::start(server, ignored);
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
            "{}; status and verify work, and so does run with nothing pending",
            outcomes[0]
        ),
        after,
        format!("with the server's own address: {then}"),
    )
}

fn pooler(server: &Server) -> Row {
    let (reported, after, then) = through_pooler(server, "extra_float_digits");
    Row {
        fault: "PgBouncer in transaction mode, 4 runners at once",
        reported,
        after,
        then,
    }
}

fn pooler_that_drops_options(server: &Server) -> Row {
    let (reported, after, then) = through_pooler(server, "extra_float_digits, options");
    Row {
        fault: "PgBouncer in transaction mode with ignore_startup_parameters = options, 4 runners at once",
        reported,
        after,
        then,
    }
}
