//! The binary `bruhmcp-db`.

use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

use crate::support::empty_database;

/// How a program ended and what it said.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Outcome {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// Starts the binary on the database at `url`.
pub(crate) fn start(url: &str, arguments: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_bruhmcp-db"))
        .env("DATABASE_URL", url)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Runs the binary on the database at `url` to its end.
pub(crate) fn bruhmcp(url: &str, arguments: &[&str]) -> Outcome {
    start(url, arguments).wait_with_output().unwrap().into()
}

fn json(outcome: &Outcome) -> Value {
    serde_json::from_str(&outcome.out).unwrap_or_else(|error| panic!("{error}: {outcome:?}"))
}

const USER: &str = "INSERT INTO users (first_name, last_name, email) VALUES ('A', 'B', 'a@b.c')";

#[test]
fn usage() {
    for arguments in [
        &[][..],
        &["no-such-command"],
        &["run", "--to"],
        &["revert", "-n", "1", "--all"],
        &["run", "--wait", "soon"],
    ] {
        assert_eq!(
            bruhmcp("postgresql://nobody@localhost:1/x", arguments).code,
            Some(2),
            "{arguments:?}"
        );
    }
    assert_eq!(bruhmcp("", &["status"]).code, Some(2));
    let help = bruhmcp("postgresql://user:hush@localhost:1/x", &["--help"]);
    assert_eq!(help.code, Some(0));
    assert!(
        help.out.contains("verify") && !help.out.contains("hush"),
        "{help:?}"
    );
    for arguments in [
        &["run", "postgresql://user:hush@localhost/db"][..],
        &["--wait", "postgresql://user:hush@localhost/db", "run"],
        &[
            "--database-url",
            "postgresql://user:hush@hush@localhost/db",
            "run",
        ],
        &[
            "--database-url",
            "host=localhost password=hush",
            "run",
            "--json",
        ],
    ] {
        let outcome = bruhmcp("", arguments);
        assert_eq!(outcome.code, Some(2), "{outcome:?}");
        assert!(!format!("{outcome:?}").contains("hush"), "{outcome:?}");
    }
}

#[test]
fn each_command_and_its_exit_code() {
    let database = empty_database();
    let url = database.url();
    let status = bruhmcp(&url, &["status"]);
    assert_eq!(
        (status.code, status.out.lines().last()),
        (Some(3), Some("8 pending."))
    );
    let plan = bruhmcp(&url, &["plan", "--to", "001"]);
    assert_eq!(
        (plan.code, &plan.out[..]),
        (Some(0), "000_cleanup_old_tables\n001_microsaas_auth\n")
    );
    assert!(
        bruhmcp(&url, &["plan", "--sql"])
            .out
            .contains("-- 007_add_user_billing_details\n")
    );

    let run = bruhmcp(&url, &["run", "--to", "006"]);
    assert_eq!((run.code, run.out.lines().count()), (Some(0), 7), "{run:?}");
    let drift = bruhmcp(&url, &["verify"]);
    assert_eq!(drift.code, Some(7));
    assert!(
        drift
            .out
            .contains("missing     relation user_billing_details kind r\n"),
        "{drift:?}"
    );

    let run = bruhmcp(&url, &["run"]);
    assert!(
        run.out
            .starts_with("applied   007_add_user_billing_details "),
        "{run:?}"
    );
    assert_eq!(bruhmcp(&url, &["run"]).out, "Nothing to do.\n");
    assert_eq!(bruhmcp(&url, &["verify"]).code, Some(0));
    assert_eq!(bruhmcp(&url, &["status"]).code, Some(0));
    assert_eq!(bruhmcp(&url, &["plan"]).out, "Nothing is pending.\n");
    assert_eq!(bruhmcp(&url, &["run", "--to", "008"]).code, Some(5));

    // Nothing is in the tables: nothing to confirm.
    let redo = bruhmcp(&url, &["redo", "--all"]);
    assert_eq!(
        (redo.code, redo.out.lines().count()),
        (Some(0), 16),
        "{redo:?}"
    );

    database.psql(USER).unwrap();
    let refused = bruhmcp(&url, &["revert", "--to", "000"]);
    assert_eq!((refused.code, &refused.out[..]), (Some(5), ""));
    assert_eq!(
        refused.err,
        "Rows that will be lost:\n  public.user_plans: 1 row(s)\n  public.users: 1 row(s)\n\
         No terminal to ask at: --yes is needed.\nerror: refused: not confirmed; nothing was changed\n"
    );
    assert_eq!(database.psql("SELECT count(*) FROM users").unwrap(), "1\n");
    let reverted = bruhmcp(&url, &["revert", "--to", "000", "--yes"]);
    assert_eq!(
        (reverted.code, reverted.out.lines().count()),
        (Some(0), 7),
        "{reverted:?}"
    );
    assert_eq!(bruhmcp(&url, &["revert", "-n", "1"]).code, Some(0));
}

#[test]
fn json_of_each_command() {
    let database = empty_database();
    let url = database.url();
    let status = json(&bruhmcp(&url, &["status", "--json"]));
    assert_eq!(
        (&status["pending"], &status["migrations"][0]["applied_at"]),
        (&8.into(), &Value::Null)
    );
    let plan = json(&bruhmcp(&url, &["plan", "--json", "--sql"]));
    assert!(
        plan[1]["sql"]
            .as_str()
            .unwrap()
            .contains("CREATE TABLE users")
    );
    let run = json(&bruhmcp(&url, &["--json", "run"]));
    assert_eq!(
        (&run["steps"][7]["version"], &run["steps"][7]["direction"]),
        (&"007".into(), &"up".into())
    );
    assert!(run["steps"][1]["duration_ms"].as_f64().unwrap() > 0.0);
    assert_eq!(
        json(&bruhmcp(&url, &["verify", "--json"]))["differences"],
        Value::Array(Vec::new())
    );
    assert!(json(&bruhmcp(&url, &["status", "--json"]))["migrations"][0]["applied_at"].is_string());
    database.psql(USER).unwrap();
    let refused = json(&bruhmcp(&url, &["redo", "--all", "--json"]));
    assert_eq!(refused["error"]["exit_code"], 5);
    let redo = json(&bruhmcp(&url, &["redo", "--all", "--json", "--yes"]));
    assert_eq!(
        redo["lost"][1],
        serde_json::json!({ "table": "public.users", "column": null, "rows": 1 })
    );
    let revert = json(&bruhmcp(&url, &["revert", "--json"]));
    assert_eq!(revert["steps"][0]["name"], "007_add_user_billing_details");
    database
        .psql("CREATE TABLE user_billing_details ()")
        .unwrap();
    let failed = json(&bruhmcp(&url, &["run", "--json"]));
    assert_eq!(
        failed["error"]["failure"]["message"],
        "relation \"user_billing_details\" already exists"
    );
    assert_eq!(
        failed["error"]["failure"]["state"]["known"]["newest"],
        "006"
    );
}

/// `script` (of util-linux) gives the program a terminal.
#[cfg(target_os = "linux")]
#[test]
fn asks_at_a_terminal() {
    use std::io::Write;

    let database = empty_database();
    let url = database.url();
    assert_eq!(bruhmcp(&url, &["run"]).code, Some(0));
    database.psql(USER).unwrap();
    for (answer, code) in [("no\n", 5), ("yes\n", 0)] {
        let mut child = Command::new("script")
            .args(["--quiet", "--return", "--command"])
            .arg(format!("{} revert --all", env!("CARGO_BIN_EXE_bruhmcp-db")))
            .arg("/dev/null")
            .env("DATABASE_URL", &url)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program script of util-linux is needed");
        child
            .stdin
            .as_mut()
            .unwrap()
            .write_all(answer.as_bytes())
            .unwrap();
        let outcome: Outcome = child.wait_with_output().unwrap().into();
        assert_eq!(outcome.code, Some(code), "{outcome:?}");
        assert!(
            outcome.out.contains("public.users: 1 row(s)"),
            "{outcome:?}"
        );
        assert!(outcome.out.contains("Type yes to go on: "), "{outcome:?}");
    }
}
