//! What `verify` says about databases that were restored, upgraded or changed by hand.

use std::env;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use bruhmcp_devdb::{Database, Server};

use super::{Row, applied, full, query, state};
use crate::cli::{Outcome, bruhmcp};

/// A server without the roles of `roles.sql`, whose lacking rights `verify` would tell.
static SERVER: LazyLock<Server> = LazyLock::new(|| Server::private(&[]).unwrap());

fn verify(database: &Database) -> Outcome {
    bruhmcp(&database.url(), &["verify"])
}

/// The exit code and what was printed, without the fingerprint.
fn told(outcome: &Outcome) -> String {
    let text = format!("{}{}", outcome.out, outcome.err);
    let lines = text.lines().map(|line| {
        let (line, end) = line.split_once(" (fingerprint ").unwrap_or((line, ""));
        let dot = if end.is_empty() { "" } else { "." };
        format!("{}{dot}", line.trim())
    });
    let code = outcome.code.unwrap();
    format!(
        "`verify`: exit {code}: {}",
        lines.collect::<Vec<_>>().join("<br>")
    )
}

/// Checks the row of a change that was made by hand, and of `remedy`.
fn check(test: &'static str, fault: &'static str, change: &str, remedy: &str) {
    let database = full(&SERVER);
    query(&database, change);
    let reported = told(&verify(&database));
    query(&database, remedy);
    Row {
        test,
        fault,
        reported,
        after: state(&database),
        then: format!("after the remedy, {}", told(&verify(&database))),
    }
    .check();
}

#[test]
fn rule_on_insert() {
    check(
        "rule_on_insert",
        "a rule swallows what is inserted into `users`",
        "CREATE RULE gone AS ON INSERT TO users DO INSTEAD NOTHING",
        "DROP RULE gone ON users",
    );
}

#[test]
fn open_table() {
    check(
        "open_table",
        "every role may read the credentials",
        "GRANT SELECT ON mcp_credentials TO PUBLIC",
        "REVOKE SELECT ON TABLE public.mcp_credentials FROM PUBLIC",
    );
}

#[test]
fn open_default_privileges() {
    check(
        "open_default_privileges",
        "default privileges open each new table to every role",
        "ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO PUBLIC",
        "ALTER DEFAULT PRIVILEGES FOR ROLE postgres IN SCHEMA public REVOKE SELECT ON TABLES FROM PUBLIC",
    );
}

#[test]
fn quote_all_identifiers() {
    check(
        "quote_all_identifiers",
        "the database has `quote_all_identifiers = on`",
        "DO $$ BEGIN EXECUTE format(
             'ALTER DATABASE %I SET quote_all_identifiers = on', current_database()); END $$",
        "SELECT",
    );
}

#[test]
fn unrelated_tables() {
    check(
        "unrelated_tables",
        "5,000 unrelated foreign tables in the schema",
        "CREATE EXTENSION file_fdw; CREATE SERVER s FOREIGN DATA WRAPPER file_fdw;
         DO $$ BEGIN FOR i IN 1..5000 LOOP EXECUTE format(
             'CREATE FOREIGN TABLE f%s (a int, b text) SERVER s OPTIONS (filename %L)', i, '/x');
         END LOOP; END $$",
        "SELECT",
    );
}

#[test]
fn older_version() {
    let database = SERVER.create_database().unwrap();
    assert_eq!(
        bruhmcp(&database.url(), &["run", "--to", "005"]).code,
        Some(0)
    );
    Row {
        test: "older_version",
        fault: "a database at 005",
        reported: told(&verify(&database))
            .split_inclusive("006_add_billing_fields")
            .next()
            .unwrap()
            .to_owned()
            + ", …",
        after: state(&database),
        then: super::finish(&database),
    }
    .check();
}

/// A restore of a restored database too, by each way there is.
#[test]
fn restored() {
    let mut database = full(&SERVER);
    let folder = env::temp_dir().join(format!("bruhmcp_{}", uuid::Uuid::new_v4().simple()));
    for (format, restore) in [
        ("plain", &["psql", "-Xq", "-v", "ON_ERROR_STOP=1", "-f"][..]),
        ("custom", &["pg_restore", "--exit-on-error"]),
        ("directory", &["pg_restore", "--exit-on-error", "-j4"]),
    ] {
        let file = folder.with_extension(format);
        run(database
            .client("pg_dump")
            .args(["-F", format, "-f"])
            .arg(&file));
        let copy = SERVER.create_database().unwrap();
        run(copy.client(restore[0]).args(&restore[1..]).arg(&file));
        if file.is_dir() {
            std::fs::remove_dir_all(file).unwrap();
        } else {
            std::fs::remove_file(file).unwrap();
        }
        assert_eq!(verify(&copy).out, verify(&database).out, "{format}");
        database = copy;
    }
    Row {
        test: "restored",
        fault: "a database restored by `psql`, `pg_restore` and `pg_restore -j4`, one after the other",
        reported: told(&verify(&database)),
        after: state(&database),
        then: super::finish(&database),
    }
    .check();
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&text)
    );
}

/// `pg_upgrade` to the server programs in `BRUHMCP_PG_18`.
#[test]
fn upgraded() {
    let server = Server::private(&[]).unwrap();
    let database = full(&server);
    let before = verify(&database);
    let psql = database.client("psql");
    let old = Path::new(psql.get_program()).parent().unwrap();
    let new =
        env::var_os("BRUHMCP_PG_18").filter(|_| *query(&database, "SHOW server_version") < *"18");
    let Some(new) = new else {
        return crate::support::skipped("needs a server below 18, and BRUHMCP_PG_18");
    };
    server.stop(false).unwrap();
    let folder = server.folder().unwrap();
    // As the owner of the server's files. The new cluster takes the place of the old one.
    run(Command::new("sh")
        .args([
            "-c",
            r#"as=
            if [ "$(id -u)" = 0 ]; then as="runuser -u $(stat -c %U "$1") --"; fi
            cd "$1" && mv data old &&
            $as "$3/initdb" --auth=trust --encoding=UTF8 --locale=C --no-data-checksums --no-sync \
                --username=postgres --pgdata=data &&
            $as "$3/pg_upgrade" -b "$2" -B "$3" -d old -D data -U postgres --no-sync &&
            $as "$3/pg_ctl" start -w -D data -l log18 \
                -o "-c unix_socket_directories='$1' -c listen_addresses='' -c fsync=off""#,
            "sh",
        ])
        .args([folder, old, Path::new(&new)])
        .stdout(std::process::Stdio::null()));
    let after = verify(&database);
    let (version, applied) = (query(&database, "SHOW server_version"), applied(&database));
    let reported = told(&after);
    let then = super::finish(&database);
    assert!(version.starts_with("18"), "{version}");
    assert_eq!(
        (after.out, applied),
        (before.out, crate::runner::versions())
    );
    Row {
        test: "upgraded",
        fault: "a database upgraded to PostgreSQL 18 by `pg_upgrade`",
        reported,
        after: "all applied".into(),
        then,
    }
    .check();
}
