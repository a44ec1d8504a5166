//! `bruhmcp-db import` and `purge-archive`. The conversions are tested in `crates/import`.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Child;
use std::thread;
use std::time::Duration;

use bruhmcp_devdb::Server;
use diesel::connection::SimpleConnection;
use diesel::dsl::sql;
use diesel::prelude::*;
use diesel::sql_types::BigInt;

use crate::cli::{Outcome, bruhmcp, command};
use crate::json;
use crate::support::{TestDatabase, create_cell, empty_database};
use crate::transactions::in_german;

const OLD: &str = include_str!("../../crates/import/tests/it/old_a.sql");

const KEYS: &str = "2:0707070707070707070707070707070707070707070707070707070707070707";

/// An archive of this many users, each with an instance and its credentials, and one that is no
/// user.
fn archive(users: u32) -> TestDatabase {
    let database = empty_database();
    fill(&database.url(), users);
    assert_eq!(bruhmcp(&database.url(), &["run"]).code, Some(0));
    database
}

fn fill(url: &str, users: u32) {
    let rows = format!(
        "INSERT INTO users (first_name, last_name, email)
             SELECT 'Ada', '', 'ada' || n || '@example.org' FROM generate_series(1, {users}) AS n
             UNION ALL SELECT 'Ada', '', 'hush';
         INSERT INTO mcp_table (mcp_service_name, display_name, port, type)
             VALUES ('figma', 'Figma', 1, 'api_key');
         INSERT INTO mcp_service_table (user_id, mcp_service_id)
             SELECT id, mcp_service_id FROM users, mcp_table;
         INSERT INTO mcp_credentials (instance_id, api_key, oauth_status, oauth_completed_at)
             SELECT instance_id, 'hush', 'completed', '2020-01-01' FROM mcp_service_table;
         INSERT INTO subscription_transactions (user_id, amount, net_amount, status)
             SELECT id, 100, 100, 'captured' FROM users;"
    );
    let conn = &mut PgConnection::establish(url).unwrap();
    conn.batch_execute(OLD).unwrap();
    conn.batch_execute(&rows).unwrap();
}

fn start(url: &str, arguments: &[&str]) -> Child {
    let mut command = command(url, arguments);
    command.env("CREDENTIAL_KEYS", KEYS).spawn().unwrap()
}

fn run(url: &str, arguments: &[&str]) -> Outcome {
    let outcome: Outcome = start(url, arguments).wait_with_output().unwrap().into();
    assert!(!format!("{outcome:?}").contains("hush"), "{outcome:?}");
    outcome
}

fn file(name: &str) -> PathBuf {
    env::temp_dir().join(format!("bruhmcp-import-{}-{name}", std::process::id()))
}

#[test]
fn the_old_rows_are_moved() {
    let database = archive(3);
    let plan = run(
        &database.url(),
        &["import", "--dry-run", "--timezone", "Asia/Kolkata"],
    );
    assert_eq!(plan.code, Some(9), "{plan:?}");
    assert!(plan.out.contains("time zone: Asia/Kolkata"), "{plan:?}");
    assert_eq!(run(&database.url(), &["import", "--check"]).code, Some(5));

    let report = file("report.csv");
    let arguments = ["import", "--json", "--report", report.to_str().unwrap()];
    let outcome = run(&database.url(), &arguments);
    let document = json::check(&outcome);
    assert_eq!(outcome.code, Some(9), "{outcome:?}");
    assert_eq!(document["result"]["tables"][0]["left_behind"], 1);
    let csv = fs::read_to_string(&report).unwrap();
    fs::remove_file(&report).unwrap();
    assert_eq!(csv.lines().count(), 5, "{csv}");
    assert!(
        csv.contains(",email_invalid,email\n") && !csv.contains("hush"),
        "{csv}"
    );

    let check = run(&database.url(), &["import", "--check"]);
    assert_eq!(check.code, Some(0), "{check:?}");
    assert!(
        check
            .out
            .contains("subscription_transactions INR: 400 in the archive"),
        "{check:?}"
    );
    let again = run(&database.url(), &["import"]);
    assert_eq!(again.code, Some(9), "{again:?}");

    let asked = run(&database.url(), &["purge-archive"]);
    assert_eq!(asked.code, Some(5), "{asked:?}");
    let dropped = run(&database.url(), &["purge-archive", "--yes", "--json"]);
    json::check(&dropped);
    assert_eq!(dropped.code, Some(0), "{dropped:?}");
    assert_eq!(run(&database.url(), &["import"]).code, Some(5));
    let verified = bruhmcp(&database.url(), &["verify", "--json"]);
    assert_eq!(
        json::check(&verified)["verification"]["changed"],
        serde_json::json!([])
    );
}

#[test]
fn the_old_rows_are_moved_in_german() {
    in_german("import::the_old_rows_are_moved");
}

#[test]
fn a_cell_gets_its_own_rows() {
    let database = empty_database();
    for cell in ["c7", "c8"] {
        create_cell(&database.url(), cell);
    }
    fill(&database.cell("c7").url(), 3);
    for cell in ["c7", "c8"] {
        let migrated = bruhmcp(&database.url(), &["run", "--schema", cell]);
        assert_eq!(migrated.code, Some(0), "{migrated:?}");
    }
    let other = run(&database.url(), &["import", "--schema", "c8"]);
    assert_eq!(other.code, Some(5), "{other:?}");
    assert!(other.err.contains("moved from another schema"), "{other:?}");
    let imported = run(&database.url(), &["import", "--schema", "c7"]);
    assert_eq!(imported.code, Some(9), "{imported:?}");
    let check = run(&database.url(), &["import", "--check", "--schema", "c7"]);
    assert_eq!(check.code, Some(0), "{check:?}");
    let users = "SELECT (SELECT count(*) FROM c7.users), (SELECT count(*) FROM c8.users)";
    assert_eq!(database.psql(users).unwrap(), "3|0\n");
}

#[test]
fn the_owner_imports_and_others_are_refused() {
    // Roles belong to the whole server.
    let server = Server::private(&[]).unwrap();
    let database = server.create_database().unwrap();
    let by = |role: &str| {
        database
            .url()
            .replace("user=postgres", &format!("user={role}"))
    };
    let admin = &mut PgConnection::establish(&database.url()).unwrap();
    let roles = format!(
        r#"CREATE ROLE app_user LOGIN; CREATE ROLE app_admin LOGIN; CREATE ROLE owner LOGIN;
           ALTER DATABASE "{}" OWNER TO owner"#,
        database.name()
    );
    admin.batch_execute(&roles).unwrap();
    fill(&by("owner"), 3);
    for command in ["run", "grant"] {
        let outcome = bruhmcp(&by("owner"), &[command]);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
    }
    let refused = run(&by("app_admin"), &["import"]);
    assert_eq!(refused.code, Some(5), "{refused:?}");
    assert!(refused.err.contains("Import as the owner"), "{refused:?}");
    admin
        .batch_execute("GRANT USAGE ON SCHEMA bruhmcp_archive TO app_admin")
        .unwrap();
    let refused = run(&by("app_admin"), &["import"]);
    assert_eq!(refused.code, Some(5), "{refused:?}");

    // The session of the superuser, who may write.
    let others = run(&by("owner"), &["import"]);
    assert_eq!(others.code, Some(5), "{others:?}");
    let imported = run(&by("owner"), &["import", "--allow-sessions"]);
    assert_eq!(imported.code, Some(9), "{imported:?}");
    let check = run(&by("owner"), &["import", "--check"]);
    assert_eq!(check.code, Some(0), "{check:?}");
    let purged = run(&by("owner"), &["purge-archive", "--yes"]);
    assert_eq!(purged.code, Some(0), "{purged:?}");
}

#[test]
fn keys_and_reports_are_read_before_the_work() {
    let database = archive(1);
    let keys = file("keys");
    for (text, code) in [("hush", 2), ("1:hu", 2), ("1:0707", 2), ("", 2), (KEYS, 9)] {
        fs::write(&keys, text).unwrap();
        let outcome = run(
            &database.url(),
            &["import", "--dry-run", "--keys-file", keys.to_str().unwrap()],
        );
        assert_eq!(outcome.code, Some(code), "{outcome:?}");
    }
    fs::remove_file(&keys).unwrap();
    for arguments in [
        &["--keys-file", "/no/such/file"][..],
        &["--report", "report.txt"],
        &["--report", "/no/such/folder/report.csv"],
        &["--timezone", "Mars"],
        &["--timezone", "nothing=UTC"],
        &["--duplicate-emails", "merge"],
        &["--dry-run", "--check"],
        &["--schema", "a", "--schema", "b"],
    ] {
        let outcome = run(&database.url(), &[&["import"], arguments].concat());
        assert_eq!(outcome.code, Some(2), "{outcome:?}");
    }
    let without_keys = bruhmcp(&database.url(), &["import", "--json"]);
    assert_eq!(json::check(&without_keys)["error"]["kind"], "refused");
    let nowhere = bruhmcp("postgresql://nobody@localhost:1/x", &["import", "--json"]);
    assert_eq!(json::check(&nowhere)["exit_code"], 6);
}

#[test]
fn an_import_killed_twenty_times_completes() {
    let database = archive(12_000);
    let mut written = 0;
    for kill in 1..=20 {
        let mut child = start(&database.url(), &["import"]);
        // Longer each time: staging takes its time before the first row is written.
        thread::sleep(Duration::from_millis(kill * 100));
        child.kill().unwrap();
        child.wait().unwrap();
        let conn = &mut database.connect_as_owner();
        let disabled: i64 = diesel::select(sql::<BigInt>(
            "(SELECT count(*) FROM pg_trigger WHERE tgenabled <> 'O')",
        ))
        .get_result(conn)
        .unwrap();
        assert_eq!(disabled, 0);
        let rows: i64 = diesel::select(sql::<BigInt>("(SELECT count(*) FROM users)"))
            .get_result(conn)
            .unwrap();
        assert!(rows >= written, "{rows} of {written}");
        written = rows;
    }
    let last = run(&database.url(), &["import"]);
    assert_eq!(last.code, Some(9), "{last:?}");
    let check = run(&database.url(), &["import", "--check"]);
    assert_eq!(check.code, Some(0), "{check:?}");
}

#[test]
fn a_full_disk_is_told_and_the_import_goes_on() {
    // A limit of the session's temporary files stands for the disk.
    let database = archive(20_000);
    let limited = database.url_with("options=-c%20temp_file_limit%3D64%20-c%20work_mem%3D64");
    let outcome = run(&limited, &["import"]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.err.contains("Run it again"), "{outcome:?}");
    assert_eq!(run(&database.url(), &["import"]).code, Some(9));
    assert_eq!(run(&database.url(), &["import", "--check"]).code, Some(0));
}
