//! The quickstart runs in a database of its own and prints what it did.

use std::process::{Command, Stdio};

use crate::support::{empty_database, example};

/// What README.md shows of the output: its lines, some left out.
fn shown_by_the_readme() -> Vec<&'static str> {
    let readme = include_str!("../../README.md");
    let lines = readme.lines().skip_while(|line| *line != "```text").skip(1);
    lines
        .take_while(|line| *line != "```")
        .filter(|line| !matches!(line.trim(), "" | "…"))
        .collect()
}

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
        "wrong: 4 attempts are left\n  right\n  live sessions: 1",
        "subscription Active, plan Pro",
        "refunded: -10000 paise\n  rfnd_1 was recorded before\n  refused: only 39900",
        "credit left: 3000 paise",
        "\"last4\":\"4242\"",
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
    let mut lines = printed.lines();
    let shown = shown_by_the_readme();
    assert!(shown.len() > 10, "{shown:?}");
    for line in shown {
        assert!(
            lines.any(|printed| printed == line),
            "README.md shows this line, or shows it later: {line}\n{printed}"
        );
    }
    for (table, rows) in [
        ("users", 1),
        ("auth_tokens", 2),
        ("user_subscriptions", 1),
        ("subscription_transactions", 2),
        ("account_credits", 2),
        ("mcp_table", 9),
        ("mcp_service_table", 2),
        ("mcp_credentials", 2),
        ("token_audit_log", 4),
        ("user_plans", 1),
        ("webhook_events", 1),
        ("user_billing_details", 1),
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
        "token_secret",
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
