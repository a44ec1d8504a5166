//! The course of an import: what it refuses, how it goes on, the check, and the way back.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

use bruhmcp_db::import::{
    self, ImportError, Options, REASONS, Report, System, write_csv, write_json_lines,
};
use bruhmcp_db::migrations::MIGRATIONS;
use diesel::connection::SimpleConnection;
use diesel_migrations::MigrationHarness;

use crate::support::{Old, SHAPES, id, ring, user};

const A: &str = SHAPES[0];

/// Users of every table, some of them odd.
fn rows(shape: &str, users: u32) -> String {
    let mut rows: String = (1..=users)
        .map(|number| user(shape, number, &format!("User{number}@example.org")))
        .collect();
    rows += &user(shape, 900, "nobody");
    rows += "
        INSERT INTO mcp_table (mcp_service_name, display_name, port, type) VALUES ('figma', 'Figma', 1, 'oauth');
        INSERT INTO mcp_service_table (instance_id, user_id, mcp_service_id)
            SELECT users.id, users.id, mcp_service_id FROM users, mcp_table;
        INSERT INTO mcp_credentials (instance_id, client_id, client_secret, access_token, oauth_status,
                oauth_completed_at)
            SELECT instance_id, 'client', 'secret of ' || instance_id, 'token', 'completed', '2020-01-01'
              FROM mcp_service_table;
        INSERT INTO token_audit_log (instance_id, operation, status)
            SELECT instance_id, 'refresh', 'success' FROM mcp_service_table;
        INSERT INTO user_subscriptions (user_id, plan_code) SELECT id, 'pro' FROM users;
        INSERT INTO subscription_transactions (user_id, subscription_id, amount, net_amount, status)
            SELECT user_id, id, 1000, 900, 'captured' FROM user_subscriptions;
        INSERT INTO subscription_transactions (user_id, transaction_type, amount, net_amount, status,
                parent_transaction_id)
            SELECT user_id, 'refund', 400, 400, 'captured', id FROM subscription_transactions;";
    rows
}

fn dump(old: &Old) -> String {
    let mut dump = Command::new(old.server().bin_dir().unwrap().join("pg_dump"));
    let output = dump.arg(old.database.url()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    // A random key of newer versions.
    text.lines()
        .filter(|line| !line.starts_with('\\') || line.starts_with("\\."))
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn after_an_import_all_migrations_can_be_reverted() {
    for shape in SHAPES {
        let mut old = Old::before_migrations(shape, &rows(shape, 3));
        let before = dump(&old);
        old.migrate();
        old.import(&Options::default()).unwrap();
        assert!(old.check().holds());
        old.conn.revert_all_migrations(MIGRATIONS).unwrap();
        old.conn
            .batch_execute("DROP TABLE __diesel_schema_migrations")
            .unwrap();
        assert_eq!(before, dump(&old));
    }
}

#[test]
fn an_import_that_stops_anywhere_goes_on() {
    for shape in SHAPES {
        let mut whole = Old::new(shape, &rows(shape, 3));
        whole.import(&Options::default()).unwrap();
        let mut stops = 0;
        loop {
            let mut old = Old::new(shape, &rows(shape, 3));
            let ring = ring();
            let mut left = stops;
            let stopped = catch_unwind(AssertUnwindSafe(|| {
                let mut stop = |_| {
                    assert_ne!(left, 0, "stopped on purpose");
                    left -= 1;
                };
                let system = System::new(Some(&ring));
                import::import(
                    &mut old.conn,
                    &system,
                    &Options::default(),
                    false,
                    &mut stop,
                )
            }));
            old.connect_again();
            old.import(&Options::default()).unwrap();
            assert!(old.check().holds());
            for table in ["users", "mcp_service_table", "subscription_transactions"] {
                let count = format!("SELECT count(*) FROM {table}");
                assert_eq!(old.text(&count), whole.text(&count), "{table}");
            }
            if stopped.is_ok() {
                break;
            }
            stops += 5;
        }
        assert!(stops > 15);
    }
}

#[test]
fn a_second_import_does_nothing() {
    let mut old = Old::new(A, &rows(A, 2));
    let first = old.import(&Options::default()).unwrap();
    let before = old.text("SELECT string_agg(users::text, ' ' ORDER BY id) FROM users");
    let second = old.import(&Options::default()).unwrap();
    assert_eq!(first.tables, second.tables);
    assert_eq!(
        before,
        old.text("SELECT string_agg(users::text, ' ' ORDER BY id) FROM users")
    );
}

#[test]
fn the_preflight_writes_nothing() {
    let old = &mut Old::new(A, &rows(A, 2));
    let before = dump(old);
    old.preflight(&Options::default()).unwrap();
    assert_eq!(before, dump(old));
}

/// What must be refused, and leave the database as it is.
fn refused(old: &mut Old, options: &Options) -> ImportError {
    let before = dump(old);
    let error = old.import(options).unwrap_err();
    assert_eq!(before, dump(old), "{error}");
    error
}

#[test]
fn what_is_no_archive_is_refused() {
    let mut old = Old::new("SELECT 1", "");
    assert!(matches!(
        refused(&mut old, &Options::default()),
        ImportError::NoArchive
    ));

    let mut old = Old::new("CREATE TABLE users (id serial)", "");
    let error = refused(&mut old, &Options::default());
    assert!(
        error.to_string().contains("users has no column first_name"),
        "{error}"
    );

    let mut old = Old::new("CREATE TABLE webhook_events (id serial)", "");
    let error = refused(&mut old, &Options::default());
    assert!(
        error.to_string().contains("it has no table users"),
        "{error}"
    );

    let mut old = Old::new(A, "ALTER TABLE users ALTER COLUMN is_active TYPE text");
    let error = refused(&mut old, &Options::default());
    assert!(
        error
            .to_string()
            .contains("users.is_active is of type text"),
        "{error}"
    );
}

#[test]
fn what_can_not_be_imported_is_refused() {
    let mut old = Old::new(A, &rows(A, 1));
    let mut options = Options::default();
    options
        .timezones
        .insert("users".to_owned(), "Mars/Olympus".to_owned());
    assert!(matches!(
        refused(&mut old, &options),
        ImportError::TimeZone(_)
    ));

    let error = import::import(
        &mut old.conn,
        &System::new(None),
        &Options::default(),
        false,
        &mut |_| {},
    );
    assert!(matches!(error, Err(ImportError::NoKeys)), "{error:?}");

    let mut other = old.other();
    let error = refused(&mut old, &Options::default());
    assert!(
        matches!(&error, ImportError::Sessions(others) if others.len() == 1),
        "{error:?}"
    );
    other
        .batch_execute(
            "INSERT INTO users (first_name, last_name, email) VALUES ('Ada', '', 'ada@example.org')",
        )
        .unwrap();
    drop(other);
    let error = refused(&mut old, &Options::default());
    assert!(matches!(error, ImportError::NotEmpty("users")), "{error:?}");
}

#[test]
fn another_import_or_other_options_are_refused() {
    let mut old = Old::new(A, &rows(A, 1));
    let ring = ring();
    let mut other = old.other();
    let mut first = true;
    let mut beside = |_| {
        if first {
            let system = System::new(Some(&ring));
            let error = import::import(&mut other, &system, &Options::default(), true, &mut |_| {});
            assert!(matches!(error, Err(ImportError::Running)), "{error:?}");
        }
        first = false;
    };
    let system = System::new(Some(&ring));
    import::import(
        &mut old.conn,
        &system,
        &Options::default(),
        true,
        &mut beside,
    )
    .unwrap();
    let options = Options {
        timezone: "Asia/Kolkata".to_owned(),
        ..Options::default()
    };
    drop(other);
    assert!(matches!(
        refused(&mut old, &options),
        ImportError::OtherOptions(_)
    ));
}

#[test]
fn a_backend_that_writes_is_told() {
    let mut old = Old::new(A, &rows(A, 1));
    let mut backend = old.other();
    backend
        .batch_execute("BEGIN; LOCK TABLE webhook_events IN ROW EXCLUSIVE MODE")
        .unwrap();
    let ring = ring();
    let system = System::new(Some(&ring));
    let error = import::import(
        &mut old.conn,
        &system,
        &Options::default(),
        true,
        &mut |_| {},
    );
    // The table is empty, so nothing is written to it.
    assert!(error.is_ok(), "{error:?}");

    let mut old = Old::new(A, &rows(A, 1));
    let mut backend = old.other();
    backend
        .batch_execute("BEGIN; LOCK TABLE mcp_service_table IN ROW EXCLUSIVE MODE")
        .unwrap();
    let error = import::import(
        &mut old.conn,
        &system,
        &Options::default(),
        true,
        &mut |_| {},
    );
    assert!(
        matches!(error, Err(ImportError::Busy("mcp_service_table"))),
        "{error:?}"
    );
    backend.batch_execute("ROLLBACK").unwrap();
    drop(backend);
    old.import(&Options::default()).unwrap();
    assert!(old.check().holds());
}

#[test]
fn a_row_that_a_constraint_refuses_is_rejected_alone() {
    let mut old = Old::new(A, &rows(A, 5));
    old.conn
        .batch_execute(&format!(
            "ALTER TABLE users ADD CONSTRAINT mine CHECK (id <> '{}')",
            id(4)
        ))
        .unwrap();
    let report = old.import(&Options::default()).unwrap();
    assert!(report.tables[0].reasons.contains_key("refused:mine"));
    let rejected = import::rejected(&mut old.conn).unwrap();
    let refused = rejected
        .iter()
        .filter(|row| row.reason.starts_with("refused:"));
    assert!(refused.clone().count() > 5, "{rejected:?}");
    assert!(refused.clone().all(|row| row.key != id(3)));
    assert_eq!(old.text("SELECT count(*) FROM users"), "4");
    assert!(old.check().holds(), "{:?}", old.check());

    let mut csv = Vec::new();
    write_csv(&rejected, &mut csv).unwrap();
    let csv = String::from_utf8(csv).unwrap();
    assert!(csv.starts_with("table,key,reason,column\n"), "{csv}");
    assert!(
        csv.contains(&format!("\nusers,{},email_invalid,email\n", id(900))),
        "{csv}"
    );
    let mut lines = Vec::new();
    write_json_lines(&rejected, &mut lines).unwrap();
    let lines = String::from_utf8(lines).unwrap();
    assert_eq!(lines.lines().count(), rejected.len());
    for secret in ["secret", "token", "client"] {
        assert!(
            !csv.replace("token_audit_log", "").contains(secret),
            "{csv}"
        );
    }
}

#[test]
fn a_refused_row_is_told_again() {
    let mut old = Old::new(A, &rows(A, 3));
    old.conn
        .batch_execute(
            "ALTER TABLE mcp_credentials
                 ADD CONSTRAINT mine CHECK (client_id <> 'client' OR instance_id::text NOT LIKE '%2')",
        )
        .unwrap();
    let kept = "SELECT string_agg(concat_ws(' ', oauth_status, version, updated_at), ', ' ORDER BY instance_id)
                  FROM mcp_service_table";
    let first = old.import(&Options::default()).unwrap();
    let credentials = |report: &Report| {
        let mut tables = report.tables.iter();
        tables
            .find(|table| table.table == "mcp_credentials")
            .cloned()
    };
    assert!(
        credentials(&first)
            .unwrap()
            .reasons
            .contains_key("refused:mine")
    );
    assert!(old.text(kept).contains("pending 1 "), "{}", old.text(kept));
    assert!(old.check().holds(), "{:?}", old.check());
    let second = old.import(&Options::default()).unwrap();
    assert_eq!(first.tables, second.tables);
}

#[test]
fn a_check_finds_every_damage() {
    for shape in SHAPES {
        let mut old = Old::new(shape, &rows(shape, 3));
        old.import(&Options::default()).unwrap();
        assert!(old.check().holds());
        let key = id(2);
        let of_key = format!("WHERE user_id = '{key}'");
        let find = |old: &mut Old, damage: &str, what: &str| {
            old.conn
                .batch_execute(&format!(
                    "BEGIN; SET session_replication_role = replica; {damage}"
                ))
                .unwrap();
            let found = old.check().differences;
            assert!(
                found.iter().any(|found| found.what.contains(what)),
                "{damage}: {found:?}"
            );
            old.conn
                .batch_execute("ROLLBACK; RESET session_replication_role")
                .unwrap();
        };
        for (damage, what) in [
            ("DELETE FROM mcp_service_table", "neither carried over nor"),
            ("DELETE FROM token_audit_log", "neither carried over nor"),
            ("DELETE FROM user_plans", "without a plan"),
            (
                "DELETE FROM bruhmcp_archive.import_rejected",
                "neither carried over nor",
            ),
            (
                "INSERT INTO users (first_name, last_name, email) VALUES ('a', '', 'x@example.org')",
                "the archive does not have",
            ),
            (
                "INSERT INTO auth_tokens (user_id, type, token, expires_at)
                 SELECT id, 'password_reset', sha256('x'), now() + interval '1 day' FROM users LIMIT 1",
                "auth_tokens",
            ),
            (
                "UPDATE users SET password = '$2b$10$abcdefghijklmnopqrstuuABCDEFGHIJKLMNOPQRSTUVWXYZ99999'",
                "a password that is not",
            ),
            (
                "UPDATE subscription_transactions SET amount = 999, net_amount = 0 WHERE amount = 1000",
                "money of a user",
            ),
            (
                "UPDATE subscription_transactions SET amount = -401 WHERE amount = -400",
                "money of a user",
            ),
            (
                "DELETE FROM subscription_transactions WHERE amount = -400",
                "money of a user",
            ),
            (
                "UPDATE subscription_transactions SET currency = 'USD'",
                "money of a user",
            ),
            (
                "UPDATE mcp_service_table SET usage_count = 7",
                "as the conversion made them",
            ),
            (
                "UPDATE mcp_service_table SET status = 'inactive'",
                "fewer active instances",
            ),
            (
                "UPDATE mcp_service_table SET oauth_status = 'failed'",
                "not that of the credentials",
            ),
            (
                "UPDATE mcp_credentials SET oauth_status = 'failed'",
                "as the conversion made them",
            ),
            (
                "UPDATE mcp_credentials SET access_token = client_secret",
                "secrets that don't open",
            ),
            (
                "UPDATE mcp_credentials SET access_token = NULL",
                "secrets that don't open",
            ),
            (
                "UPDATE mcp_credentials SET instance_id = gen_random_uuid()",
                "as the conversion made them",
            ),
            (
                "UPDATE mcp_table SET active_instances_count = 9",
                "wrong counters",
            ),
            (
                "UPDATE mcp_table SET total_instances_created = 0",
                "wrong counters",
            ),
            (
                "UPDATE user_subscriptions SET plan_code = 'free'",
                "no conversion explains it",
            ),
            (
                "UPDATE token_audit_log SET created_at = created_at + interval '330 minutes'",
                "as the conversion made them",
            ),
        ] {
            find(&mut old, damage, what);
        }
        for (damage, what) in [
            (
                format!(
                    "UPDATE users SET created_at = created_at - interval '1 day' WHERE id = '{key}'"
                ),
                "as the conversion made them",
            ),
            (
                format!("UPDATE users SET first_name = 'Eve' WHERE id = '{key}'"),
                "as the conversion made them",
            ),
            (
                format!("UPDATE mcp_service_table SET status = 'expired' {of_key}"),
                "a status that no plan explains",
            ),
            (
                format!(
                    "UPDATE subscription_transactions SET user_id = '{}' {of_key}",
                    id(1)
                ),
                "money of a user",
            ),
            (
                format!(
                    "INSERT INTO bruhmcp_archive.import_rejected VALUES ('users', '{key}', 'x')"
                ),
                "carried over and reported",
            ),
            // A row that is gone, and a report that hides it.
            (
                format!(
                    "DELETE FROM mcp_service_table {of_key};
                     INSERT INTO bruhmcp_archive.import_rejected
                     VALUES ('mcp_service_table', '{key}', 'parent_left_behind')"
                ),
                "a reason that the archive doesn't have",
            ),
        ] {
            find(&mut old, &damage, what);
        }
        assert!(old.check().holds());
    }
}

#[test]
fn money_is_told_to_the_paisa() {
    let mut old = Old::new(A, &rows(A, 3));
    old.import(&Options::default()).unwrap();
    let money = old.check().money;
    assert_eq!(money.len(), 1, "{money:?}");
    let sums = (
        money[0].archive,
        money[0].left_behind,
        money[0].negated,
        money[0].now,
    );
    assert_eq!(sums, (5600, 1400, -2400, 1800));
}

#[test]
fn the_archive_is_dropped_only_if_the_check_holds() {
    let mut old = Old::new(A, &rows(A, 2));
    let ring = ring();
    let system = System::new(Some(&ring));
    let purge = |old: &mut Old, yes: bool| {
        let mut named = Vec::new();
        let purged = import::purge_archive(&mut old.conn, &system, &mut |dependents| {
            named = dependents.to_vec();
            yes
        });
        (purged, named)
    };
    assert!(matches!(
        purge(&mut old, true).0,
        Err(ImportError::NotImported)
    ));
    old.import(&Options::default()).unwrap();
    old.conn
        .batch_execute(
            "CREATE SCHEMA reports;
             CREATE VIEW reports.emails AS SELECT email FROM bruhmcp_archive.users;
             CREATE VIEW reports.domains AS SELECT split_part(email, '@', 2) FROM reports.emails;
             CREATE TABLE reports.notes (
                 id bigint DEFAULT nextval('bruhmcp_archive.token_audit_log_audit_id_seq'),
                 author bruhmcp_archive.users,
                 user_id uuid REFERENCES bruhmcp_archive.users
             );
             CREATE FUNCTION reports.users() RETURNS bigint
                 BEGIN ATOMIC SELECT count(*) FROM bruhmcp_archive.users; END;",
        )
        .unwrap();
    old.conn
        .batch_execute("UPDATE users SET last_name = 'x'")
        .unwrap();
    let (check, _) = purge(&mut old, true);
    assert!(!check.unwrap().holds());
    old.conn
        .batch_execute(
            "SET session_replication_role = replica;
            UPDATE users SET last_name = '', updated_at = old.updated_at AT TIME ZONE 'UTC'
              FROM bruhmcp_archive.users AS old WHERE old.id = users.id;
            RESET session_replication_role",
        )
        .unwrap();
    let (purged, named) = purge(&mut old, false);
    assert!(
        matches!(purged, Err(ImportError::NotConfirmed)),
        "{purged:?}"
    );
    let expected = [
        "column author of table reports.notes",
        "constraint notes_user_id_fkey on table reports.notes",
        "default value for column id of table reports.notes",
        "function reports.users()",
        "view reports.domains",
        "view reports.emails",
    ];
    assert_eq!(named, expected);
    assert_ne!(old.text("SELECT to_regclass('reports.domains')"), "NULL");
    let (purged, _) = purge(&mut old, true);
    assert!(purged.unwrap().holds());
    assert_eq!(
        old.text("SELECT to_regnamespace('bruhmcp_archive')"),
        "NULL"
    );
    assert_eq!(old.text("SELECT to_regclass('reports.emails')"), "NULL");
    assert_eq!(old.text("SELECT count(*) FROM users"), "2");
}

#[test]
fn what_nobody_knows_is_named() {
    let more = "ALTER TABLE users ADD COLUMN phone text;
                UPDATE users SET phone = '1' WHERE email = 'ada@example.org';
                CREATE TABLE sessions (id int); INSERT INTO sessions VALUES (1), (2);";
    let (_, report) = Old::imported(A, &(user(A, 1, "ada@example.org") + more));
    assert!(!report.is_complete());
    assert_eq!(report.unknown_columns.len(), 1);
    assert_eq!(
        (
            report.unknown_columns[0].column.as_str(),
            report.unknown_columns[0].values
        ),
        ("phone", 1)
    );
    assert_eq!(
        (
            report.unknown_tables[0].table.as_str(),
            report.unknown_tables[0].rows
        ),
        ("sessions", 2)
    );
}

#[test]
fn the_guide_has_all_codes() {
    let guide = include_str!("../../../../docs/moving.md");
    let (_, table) = guide.split_once("| --- | --- |\n| `null_default`").unwrap();
    let table = format!("| `null_default`{table}");
    let codes = REASONS
        .iter()
        .map(|reason| format!("| `{}` | {} |", reason.code, reason.meaning));
    assert_eq!(table.lines().collect::<Vec<_>>(), codes.collect::<Vec<_>>());
}

#[test]
fn each_code_is_in_the_conversions() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/tables");
    let mut conversions: String = std::fs::read_dir(folder)
        .unwrap()
        .map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap())
        .collect();
    conversions += include_str!("../../src/run.rs");
    for reason in REASONS {
        assert!(
            conversions.contains(&format!("'{}'", reason.code)),
            "{}",
            reason.code
        );
    }
}
