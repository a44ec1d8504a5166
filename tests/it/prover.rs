//! The prover, on migrations that are right and on each way to be wrong.

use std::fs;
use std::path::Path;

use diesel::connection::SimpleConnection;
use diesel_migrations::FileBasedMigrations;
use diesel_pg_migrator::Direction;
use diesel_pg_migrator::prover::{self, Error, Phase, Prover};

use crate::support::{TestDatabase, empty_database};

const USERS: (&str, &str) = (
    "CREATE TABLE users (id integer PRIMARY KEY, email text NOT NULL, name text);
     COMMENT ON COLUMN users.email IS 'As it was typed.';",
    "DROP TABLE users;",
);

/// Migrations 1, 2 … in a folder of the test's own.
fn migrations(test: &str, files: &[(&str, &str)]) -> FileBasedMigrations {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("prover_{test}"));
    let _ = fs::remove_dir_all(&folder);
    for (index, (up, down)) in files.iter().enumerate() {
        let migration = folder.join(format!("{:03}_step", index + 1));
        fs::create_dir_all(&migration).unwrap();
        fs::write(migration.join("up.sql"), up).unwrap();
        if !down.is_empty() {
            fs::write(migration.join("down.sql"), down).unwrap();
        }
    }
    FileBasedMigrations::from_path(folder).unwrap()
}

const TWO_USERS: &str =
    "INSERT INTO users VALUES (1, 'Ada@Example.com', 'Ada'), (2, 'b@x.org', 'B')";

/// A prover of [`USERS`] with two rows, and then of `second`.
fn with_users(test: &str, second: (&str, &str)) -> Prover<'static> {
    Prover::new(migrations(test, &[USERS, second]))
        .rows("001", |conn| conn.batch_execute(TWO_USERS))
}

fn refuted(test: &str, second: (&str, &str)) -> (TestDatabase, Error) {
    let database = empty_database();
    let error = with_users(test, second).prove(&database.url()).unwrap_err();
    // A failed test prints this; values of rows and passwords are not for its log.
    let text = format!("{error:?}");
    assert!(text.contains("step"), "{text}");
    assert!(!text.contains("Ada"), "{text}");
    (database, error)
}

#[test]
fn right_migrations_are_proved_and_the_database_is_as_before() {
    let database = empty_database();
    let before = database.dump(&["--exclude-table=__diesel_schema_migrations"]);
    let proof = with_users(
        "right",
        (
            "CREATE SCHEMA audit;
             CREATE TYPE audit.kind AS ENUM ('login', 'logout');
             CREATE TABLE audit.events (
                 id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
                 user_id integer NOT NULL REFERENCES users, kind audit.kind NOT NULL
             ) PARTITION BY RANGE (id);
             CREATE TABLE audit.events_1 PARTITION OF audit.events FOR VALUES FROM (1) TO (100);
             ALTER TABLE users ADD COLUMN last_login timestamptz;
             CREATE INDEX users_email_idx ON users (lower(email));",
            "DROP INDEX users_email_idx;
             ALTER TABLE users DROP COLUMN last_login;
             DROP SCHEMA audit CASCADE;",
        ),
    )
    .rows("002", |conn| {
        conn.batch_execute(
            "INSERT INTO audit.events (user_id, kind) VALUES (1, 'login');
             UPDATE users SET last_login = now() WHERE id = 1;",
        )
    })
    .prove(&database.url())
    .unwrap();
    assert_eq!(proof.reverted, ["001_step", "002_step"]);
    assert!(proof.without_rows.is_empty(), "{proof:?}");
    let after = database.dump(&["--exclude-table=__diesel_schema_migrations"]);
    assert_eq!(before, after);
}

/// Each up, its bad down, and a line of the difference.
#[test]
fn what_a_down_leaves_or_takes_is_named() {
    let cases = [
        (
            "CREATE TABLE orders (id integer)",
            "SELECT 1",
            "+ relation orders: table",
        ),
        (
            "CREATE INDEX users_email_idx ON users (email); ALTER TABLE users ADD COLUMN age int",
            "ALTER TABLE users DROP COLUMN age",
            "+ index users_email_idx: CREATE INDEX users_email_idx ON users USING btree (email)",
        ),
        (
            "ALTER TABLE users ALTER COLUMN name SET NOT NULL",
            "ALTER TABLE users ALTER COLUMN name SET DEFAULT ''",
            "- column users.name: text",
        ),
        (
            "ALTER TABLE users DROP COLUMN name",
            "ALTER TABLE users ADD COLUMN name text NOT NULL DEFAULT ''",
            "+ column users.name: text not null default ''::text",
        ),
        // Neither pg_dump of a table nor schema.rs sees these easily.
        (
            "CREATE SCHEMA audit; CREATE TABLE audit.events (id integer)",
            "DROP TABLE audit.events",
            "+ schema audit: exists",
        ),
        (
            "COMMENT ON COLUMN users.email IS 'Lowercase.'",
            "COMMENT ON COLUMN users.email IS NULL",
            "- comment on table column public.users.email: As it was typed.",
        ),
        (
            "GRANT SELECT ON users TO PUBLIC",
            "SELECT 1",
            "+ rights on table public.users: ",
        ),
        (
            "ALTER TABLE users ALTER COLUMN name SET STORAGE EXTERNAL",
            "SELECT 1",
            "+ storage of column public.users.name: e",
        ),
        (
            "CREATE FUNCTION one() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
            "CREATE OR REPLACE FUNCTION one() RETURNS integer LANGUAGE sql AS 'SELECT 2'",
            "+ function one(): ",
        ),
        (
            "CREATE STATISTICS users_names ON email, name FROM users",
            "SELECT 1",
            "+ statistics object public.users_names: ",
        ),
    ];
    for (index, (up, down, line)) in cases.into_iter().enumerate() {
        let (_database, error) = refuted(&format!("schema_{index}"), (up, down));
        match &error {
            Error::Schema {
                name,
                direction: Direction::Down,
                phase: Phase::Up,
                differences,
            } => {
                assert_eq!(name, "002_step");
                assert!(
                    differences.iter().any(|one| one.starts_with(line)),
                    "{line}\n{error}"
                );
            }
            _ => panic!("{up}: {error}"),
        }
    }
}

/// Each of them gives back the schema.
#[test]
fn lost_rows_and_values_are_counted() {
    let cases = [
        (
            "DELETE FROM users WHERE id = 2",
            "SELECT 1",
            "public.users: 2 rows before, 1 after",
        ),
        (
            "UPDATE users SET email = lower(email)",
            "SELECT 1",
            "public.users.email: 1 of 2 values are as before",
        ),
        (
            "ALTER TABLE users DROP COLUMN name",
            "ALTER TABLE users ADD COLUMN name text",
            "public.users.name: 0 of 2 values are as before",
        ),
        (
            "UPDATE users SET name = CASE id WHEN 1 THEN 'B' ELSE 'Ada' END",
            "SELECT 1",
            "public.users: 2 rows before, 0 after",
        ),
    ];
    for (index, (up, down, line)) in cases.into_iter().enumerate() {
        let test = format!("rows_{index}");
        let (_database, error) = refuted(&test, (up, down));
        let Error::Lost { changes, .. } = &error else {
            panic!("{up}: {error}");
        };
        let lines: Vec<String> = changes.iter().map(ToString::to_string).collect();
        assert_eq!(lines, [line]);
        // What is meant can be said.
        let proof = with_users(&test, (up, down)).changes("002", "public.users");
        proof.prove(&empty_database().url()).unwrap();
    }
}

/// A down that is right without rows of its own migration.
#[test]
fn a_down_that_fails_or_deletes_on_rows_is_found_on_the_way_down() {
    let up = "CREATE TYPE role AS ENUM ('member', 'owner');
              CREATE TABLE members (user_id integer REFERENCES users, role role)";
    let deletes = "CREATE TEMPORARY TABLE gone ON COMMIT DROP AS SELECT user_id FROM members;
                   DROP TABLE members;
                   DELETE FROM users USING gone WHERE user_id = id;
                   DROP TYPE role";
    let fails = "DO $$BEGIN
                     IF EXISTS (SELECT FROM members) THEN RAISE 'there are members'; END IF;
                 END$$;
                 DROP TABLE members; DROP TYPE role";
    let prove = |test, down| {
        let prover = with_users(test, (up, down)).rows("002", |conn| {
            conn.batch_execute("INSERT INTO members VALUES (1, 'owner')")
        });
        prover.prove(&empty_database().url()).unwrap_err()
    };
    match prove("way_down_rows", deletes) {
        Error::Lost {
            phase: Phase::Down,
            direction: Direction::Down,
            changes,
            ..
        } => assert_eq!(
            changes[0].to_string(),
            "public.users: 2 rows before, 1 after"
        ),
        other => panic!("{other}"),
    }
    match prove("way_down_fails", fails) {
        Error::Failed {
            phase: Phase::Down,
            direction: Direction::Down,
            report,
            ..
        } => assert!(report.contains("there are members"), "{report}"),
        other => panic!("{other}"),
    }
}

#[test]
fn an_up_that_fails_on_rows_and_a_missing_down_are_named() {
    let (_database, error) = refuted(
        "up_fails",
        (
            "ALTER TABLE users ADD COLUMN age integer NOT NULL",
            "ALTER TABLE users DROP COLUMN age",
        ),
    );
    let text = error.to_string();
    assert!(
        text.starts_with("002_step: up.sql failed as the newest migration: "),
        "{text}"
    );

    let no_down = ("CREATE TABLE orders (id integer)", "");
    let (_database, error) = refuted("no_down", no_down);
    let is_down = matches!(
        error,
        Error::Failed {
            direction: Direction::Down,
            ..
        }
    );
    assert!(is_down, "{error}");
    // Nothing below it is reverted with it in place.
    let proof = with_users("no_down", no_down).one_way("002");
    let proof = proof.prove(&empty_database().url()).unwrap();
    assert!(proof.reverted.is_empty());
    assert_eq!(proof.without_rows, ["public.orders"]);
}

#[test]
fn a_database_in_use_and_a_wrong_version_are_refused() {
    let database = empty_database();
    let error = with_users("version", USERS)
        .one_way("2")
        .prove(&database.url());
    assert!(matches!(error, Err(Error::NoSuchVersion(version)) if version == "2"));

    let files = migrations("fresh", &[USERS]);
    // It leaves the database migrated.
    let error = prover::schema_file(files, &database.url(), "no such file.rs");
    assert!(matches!(error, Err(Error::File { .. } | Error::Diesel(_))));
    let error = prover::reversible(migrations("fresh", &[USERS]), &database.url());
    assert!(matches!(error, Err(Error::NotFresh)), "{error:?}");
    assert_eq!(database.psql("SELECT count(*) FROM users").unwrap(), "0\n");

    let error = prover::reversible(
        migrations("fresh", &[USERS]),
        "postgresql://nobody:hunter2@localhost:1/none",
    );
    let text = error.unwrap_err().to_string();
    assert!(!text.contains("hunter2"), "{text}");
}
