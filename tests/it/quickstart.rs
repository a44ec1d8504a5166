//! The quickstart runs in a database of its own and prints what it did.

use std::process::{Command, Stdio};

use crate::support::{empty_database, example};

#[test]
fn the_quickstart_runs_and_leaves_nothing_behind() {
    let other = empty_database();
    other
        .psql("CREATE TABLE users (id int); INSERT INTO users VALUES (1)")
        .unwrap();
    let before = other.dump(&[]);

    let quickstart = Command::new(example("quickstart"))
        .env("DATABASE_URL", other.url())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let process = quickstart.id();
    let output = quickstart.wait_with_output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{printed}{errors}");
    for line in [
        "first time: 9 new, 0 existing",
        "second time: 0 new, 9 existing",
        "asha@example.in has the plan Free",
        "a second sign-up: the email address is taken",
        "3 calls counted, version still 2",
        "refused: the plan allows no more active instances",
        "duplicate of evt_1: nothing to do",
        "completed: the instance is Active",
        "worker 2 is refused: the version is 5",
        "not renamed to Drafts",
        "list_messages  Success  2",
        "DELETE: token_audit_log is append-only",
    ] {
        assert!(printed.contains(line), "{line} is missing:\n{printed}");
    }
    for (table, rows) in [
        ("users", 1),
        ("mcp_table", 9),
        ("mcp_service_table", 2),
        ("subscription_transactions", 1),
    ] {
        assert!(
            printed.contains(&format!("  {table:<26} {rows}\n")),
            "{table}:\n{printed}"
        );
    }
    for secret in [
        "figd_a_secret",
        "pat_a_secret",
        "client_secret",
        "access_secret",
        "refresh_secret",
    ] {
        assert!(
            !printed.contains(secret) && !errors.contains(secret),
            "{secret}"
        );
    }
    assert_eq!(other.dump(&[]), before);
    let left =
        format!("SELECT datname FROM pg_database WHERE datname LIKE 'bruhmcp_dev_{process}_%'");
    assert_eq!(other.psql(&left).unwrap(), "");
}
