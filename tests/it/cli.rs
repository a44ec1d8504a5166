//! The binary `bruhmcp-db`.

use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

use crate::json;
use crate::runner::{names, next_version, versions};
use crate::support::empty_database;

/// Exit code and output of a program.
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
    command(url, arguments).spawn().unwrap()
}

/// The binary on the database at `url`, without input and with its output piped.
pub(crate) fn command(url: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bruhmcp-db"));
    command
        .env("DATABASE_URL", url)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Runs the binary on the database at `url`. Each document of `--json` has the documented shape.
pub(crate) fn bruhmcp(url: &str, arguments: &[&str]) -> Outcome {
    let outcome: Outcome = start(url, arguments).wait_with_output().unwrap().into();
    if arguments.contains(&"--json") {
        json::check(&outcome);
    }
    outcome
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
            "host=localhost password=hush hush",
            "run",
            "--json",
        ],
        &["--database-url", "postgres://user:hush", "status"],
        &["postgres://user:hush", "status"],
        &["--no-such-option=postgres://user:hush", "status"],
        &["host=localhost", "password=hush", "status"],
        &["run", "--to", "001", "user:hush@localhost"],
    ] {
        let outcome = bruhmcp("", arguments);
        assert_eq!(outcome.code, Some(2), "{outcome:?}");
        assert!(!format!("{outcome:?}").contains("hush"), "{outcome:?}");
    }
}

/// A typing error is quoted, unless an argument may be a part of a URL.
#[test]
fn usage_names_the_wrong_argument() {
    let outcome = bruhmcp("", &["verfiy"]);
    assert!(outcome.err.contains("'verfiy'"), "{outcome:?}");
    let outcome = bruhmcp("", &["--database-url", "postgres:///x", "verfiy"]);
    assert_eq!(outcome.err, "error: unrecognized subcommand. See --help.\n");
}

/// libpq's other ways to name a server: pairs, and a service file with options of its own.
#[test]
fn pairs_and_service_files() {
    let database = empty_database();
    let url = database.url();
    let (name, parameters) = url
        .strip_prefix("postgresql:///")
        .and_then(|rest| rest.split_once('?'))
        .unwrap();
    let pairs = parameters.replace("%2F", "/").replace('&', "\n");
    let pairs = format!("dbname={name}\n{pairs}");
    let status = bruhmcp(&pairs.replace('\n', " "), &["status"]);
    assert_eq!(status.code, Some(3), "{status:?}");

    let file = std::env::temp_dir().join(format!("{name}_service"));
    let service = |options: &str| {
        std::fs::write(&file, format!("[here]\n{pairs}\noptions={options}\n")).unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_bruhmcp-db"))
            .env("PGSERVICEFILE", &file)
            .args(["--database-url", "service=here", "run"])
            .output();
        Outcome::from(output.unwrap())
    };
    let refused = service("-cdefault_transaction_read_only=on");
    assert!(
        refused.err.contains("the session is read-only"),
        "{refused:?}"
    );
    let run = service("");
    std::fs::remove_file(&file).unwrap();
    assert_eq!(run.code, Some(0), "{run:?}");
}

#[test]
fn each_command_and_its_exit_code() {
    let database = empty_database();
    let url = database.url();
    let names = names();
    let [.., before_last, _] = &versions()[..] else {
        panic!("two migrations at least")
    };
    let last = names.last().unwrap();
    let status = bruhmcp(&url, &["status"]);
    assert_eq!(
        (status.code, status.out.lines().last()),
        (Some(3), Some(&*format!("{} pending.", names.len())))
    );
    let plan = bruhmcp(&url, &["plan", "--to", &versions()[1]]);
    assert_eq!(
        (plan.code, plan.out),
        (Some(0), format!("{}\n{}\n", names[0], names[1]))
    );
    let plan = bruhmcp(&url, &["plan", "--sql"]);
    assert!(plan.out.contains(&format!("-- {last}\n")), "{plan:?}");

    let run = bruhmcp(&url, &["run", "--to", "006"]);
    let applied = run.out.lines().filter(|line| line.starts_with("applied "));
    assert_eq!((run.code, applied.count()), (Some(0), 7), "{run:?}");
    let verify = bruhmcp(&url, &["verify"]);
    assert_eq!(verify.code, Some(3));
    assert!(
        verify.out.contains("The schema is as expected at 006 "),
        "{verify:?}"
    );
    assert!(verify.out.ends_with(&format!("{last}.\n")), "{verify:?}");

    let run = bruhmcp(&url, &["run", "--to", before_last]);
    assert_eq!(run.code, Some(0), "{run:?}");
    let run = bruhmcp(&url, &["run"]);
    assert!(
        run.out.starts_with(&format!("applied   {last} ")),
        "{run:?}"
    );
    assert_eq!(bruhmcp(&url, &["run"]).out, "Nothing to do.\n");
    assert_eq!(bruhmcp(&url, &["verify"]).code, Some(0));
    assert_eq!(bruhmcp(&url, &["status"]).code, Some(0));
    assert_eq!(bruhmcp(&url, &["plan"]).out, "Nothing is pending.\n");
    assert_eq!(
        bruhmcp(&url, &["run", "--to", &next_version()]).code,
        Some(5)
    );

    // The tables are empty, so there is nothing to confirm.
    let redo = bruhmcp(&url, &["redo", "--all"]);
    let steps = redo.out.lines().filter(|line| line.ends_with(" ms"));
    assert_eq!(
        (redo.code, steps.count()),
        (Some(0), 2 * names.len()),
        "{redo:?}"
    );

    database.psql(USER).unwrap();
    let refused = bruhmcp(&url, &["revert", "--to", "000"]);
    assert_eq!((refused.code, &refused.out[..]), (Some(5), ""));
    assert_eq!(
        refused.err,
        "This loses:\n  public.user_plans: 1 row\n  public.users: 1 row\n\
         There is no terminal to ask at. Add --yes to confirm.\n\
         error: refused, nothing was changed: the revert was not confirmed.\n"
    );
    assert_eq!(database.psql("SELECT count(*) FROM users").unwrap(), "1\n");
    let reverted = bruhmcp(&url, &["revert", "--to", "000", "--yes"]);
    assert_eq!(
        (reverted.code, reverted.out.lines().count()),
        (Some(0), names.len() - 1),
        "{reverted:?}"
    );
    assert_eq!(bruhmcp(&url, &["revert", "-n", "1"]).code, Some(0));
}

#[test]
fn json_of_each_command() {
    let database = empty_database();
    let url = database.url();
    let status = &json::check(&bruhmcp(&url, &["status", "--json"]))["status"];
    assert_eq!(
        (&status["pending"], &status["migrations"][0]["applied_at"]),
        (&names().len().into(), &Value::Null)
    );
    let plan = &json::check(&bruhmcp(&url, &["plan", "--json", "--sql"]))["plan"];
    assert!(
        plan["migrations"][1]["sql"]
            .as_str()
            .unwrap()
            .contains("CREATE TABLE users")
    );
    let run = &json::check(&bruhmcp(&url, &["--json", "run"]))["report"];
    let step = run["steps"].as_array().unwrap().last().unwrap();
    assert_eq!(
        (&step["version"], &step["direction"]),
        (&(&**versions().last().unwrap()).into(), &"up".into())
    );
    assert!(run["steps"][1]["duration_ms"].as_f64().unwrap() > 0.0);
    let verify = &json::check(&bruhmcp(&url, &["verify", "--json"]))["verification"];
    assert_eq!(
        (&verify["version"], &verify["missing"]),
        (
            &(&**versions().last().unwrap()).into(),
            &Value::Array(Vec::new())
        )
    );
    let status = &json::check(&bruhmcp(&url, &["status", "--json"]))["status"];
    assert!(status["migrations"][0]["applied_at"].is_string());
    database.psql(USER).unwrap();
    let refused = json::check(&bruhmcp(&url, &["redo", "--all", "--json"]));
    assert_eq!(refused["exit_code"], 5);
    let redo = &json::check(&bruhmcp(&url, &["redo", "--all", "--json", "--yes"]))["report"];
    assert_eq!(
        redo["lost"][1],
        serde_json::json!({ "table": "public.users", "column": null, "kind": "deleted", "rows": 1 })
    );
    let revert = json::check(&bruhmcp(
        &url,
        &["revert", "--to", "006", "--yes", "--json"],
    ));
    let newest = &revert["report"]["steps"][0]["name"];
    assert_eq!(newest, names().last().unwrap());
    database
        .psql("CREATE TABLE user_billing_details ()")
        .unwrap();
    let failed = json::check(&bruhmcp(&url, &["run", "--json"]));
    let message = failed["error"]["failure"]["message"].as_str().unwrap();
    assert!(message.contains("user_billing_details"), "{message}");
    assert_eq!(
        failed["error"]["failure"]["state"]["known"]["newest"],
        "006"
    );
}

/// `script` of util-linux gives the program a terminal.
#[cfg(target_os = "linux")]
#[test]
fn asks_at_a_terminal() {
    use std::io::{Read, Write};

    let database = empty_database();
    let url = database.url();
    assert_eq!(bruhmcp(&url, &["run"]).code, Some(0));
    database.psql(USER).unwrap();
    // The terminal makes a SIGINT of the second.
    for (answer, code) in [("no\n", 5), ("\x03", 130), ("yes\n", 0)] {
        let mut child = Command::new("script")
            .args(["--quiet", "--return", "--command"])
            .arg(format!("{} revert --all", env!("CARGO_BIN_EXE_bruhmcp-db")))
            .arg("/dev/null")
            .env("DATABASE_URL", &url)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program script of util-linux is needed");
        let mut out = child.stdout.take().unwrap();
        let mut text = Vec::new();
        while !text.ends_with(b"Type yes to confirm: ") {
            let mut byte = [0];
            out.read_exact(&mut byte).unwrap();
            text.extend(byte);
        }
        let input = child.stdin.as_mut().unwrap();
        input.write_all(answer.as_bytes()).unwrap();
        out.read_to_end(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code), "{text}");
        assert!(text.contains("public.users: 1 row"), "{text}");
        assert_eq!(text.contains("Nothing was changed."), code == 130, "{text}");
    }
}

#[test]
fn the_audit_log_is_maintained() {
    let database = empty_database();
    let url = database.url();
    let pending = format!("{} migrations are pending", names().len());
    let refused = bruhmcp(&url, &["maintain", "--json"]);
    assert_eq!(refused.code, Some(5), "{refused:?}");
    assert!(refused.err.contains(&pending), "{refused:?}");
    assert_eq!(bruhmcp(&url, &["run"]).code, Some(0));
    database
        .psql(
            "INSERT INTO token_audit_log (instance_id, operation, status, created_at)
             SELECT gen_random_uuid(), 'refresh', 'success', now() - n * interval '40 days'
               FROM generate_series(1, 2) AS n",
        )
        .unwrap();
    let maintained = bruhmcp(&url, &["maintain"]);
    assert_eq!(maintained.code, Some(0), "{maintained:?}");
    assert_eq!(maintained.out, "created   2\ndropped   0\nmoved     2\n");
    let again = bruhmcp(&url, &["maintain", "--json"]);
    let again: Value = serde_json::from_str(&again.out).unwrap();
    assert_eq!(
        again["maintained"],
        serde_json::json!({ "created": 0, "dropped": 0, "moved": 0 })
    );
}
