//! A ledger that was lost, and old tables that 000 would move.

use bruhmcp_devdb::Database;

use super::{Row, SERVER, applied, finish, forget, full, query, said};
use crate::cli::{Outcome, bruhmcp};
use crate::runner::{names, versions};

/// Damages the ledger of a complete database with a user, and checks what `run` and `adopt` say.
fn lost(test: &'static str, fault: &'static str, damage: &str) {
    let database = full(&SERVER);
    query(&database, damage);
    let url = database.url();
    let outcome = bruhmcp(&url, &["run"]);
    assert_eq!(bruhmcp(&url, &["plan"]).code, Some(5));
    let users = query(&database, "SELECT count(*) FROM public.users");
    let adopt = bruhmcp(&url, &["adopt"]);
    assert_eq!(adopt.code, Some(0), "{adopt:?}");
    Row {
        test,
        fault,
        reported: said(&outcome),
        after: format!("unchanged, {users} user in public"),
        then: format!("`adopt`: exit 0; run: {}", finish(&database)),
    }
    .check();
}

#[test]
fn ledger_truncated() {
    lost(
        "ledger_truncated",
        "__diesel_schema_migrations is truncated, or left out of a dump",
        "TRUNCATE __diesel_schema_migrations",
    );
}

#[test]
fn ledger_dropped() {
    lost(
        "ledger_dropped",
        "__diesel_schema_migrations is dropped",
        "DROP TABLE __diesel_schema_migrations",
    );
}

#[test]
fn ledger_in_another_schema() {
    lost(
        "ledger_in_another_schema",
        "__diesel_schema_migrations lies in another schema",
        "CREATE SCHEMA other; ALTER TABLE __diesel_schema_migrations SET SCHEMA other",
    );
}

#[test]
fn ledger_without_its_newest_rows() {
    lost(
        "ledger_without_its_newest_rows",
        "__diesel_schema_migrations lost its rows after 003",
        "DELETE FROM __diesel_schema_migrations WHERE version > '003'",
    );
}

#[test]
fn ledger_without_its_oldest_rows() {
    lost(
        "ledger_without_its_oldest_rows",
        "__diesel_schema_migrations lost its rows before 003",
        "DELETE FROM __diesel_schema_migrations WHERE version < '003'",
    );
}

#[test]
fn adopt_on_a_drifted_schema() {
    let database = full(&SERVER);
    let versions = versions();
    forget(&database, versions.last().unwrap());
    query(&database, "DROP INDEX users_created_at_idx");
    let url = database.url();
    let adopt = bruhmcp(&url, &["adopt"]);
    assert_eq!(applied(&database), versions[..versions.len() - 1]);
    query(
        &database,
        "CREATE INDEX users_created_at_idx ON users (created_at)",
    );
    assert_eq!(bruhmcp(&url, &["adopt"]).code, Some(0));
    Row {
        test: "adopt_on_a_drifted_schema",
        fault: "`adopt` on a schema that was changed by hand",
        reported: said(&adopt),
        after: "recorded as before".into(),
        then: format!("repaired, `adopt`: exit 0; run: {}", finish(&database)),
    }
    .check();
}

/// A database of the previous system: a table with a row, and what `more` adds.
fn old(more: &str) -> Database {
    let database = SERVER.create_database().unwrap();
    query(
        &database,
        "CREATE TABLE users (id int); INSERT INTO users VALUES (1)",
    );
    query(&database, more);
    database
}

/// Runs on the old database, and returns what the program said on both of its outputs.
fn told(outcome: Outcome) -> String {
    let is_migration =
        |line: &str| line.starts_with("applied ") || names().iter().any(|name| name == line);
    let lines = outcome.out.lines();
    let notes: Vec<&str> = lines
        .filter(|line| !line.is_empty() && !is_migration(line))
        .map(str::trim)
        .collect();
    let notes = notes.join("<br>");
    let said = said(&outcome);
    if notes.is_empty() {
        said
    } else {
        format!("{said}<br>{notes}")
    }
}

fn users_in(database: &Database) -> String {
    let schema = query(
        database,
        "SELECT string_agg(relnamespace::regnamespace::text, ', ' ORDER BY 1)
         FROM pg_class WHERE relname = 'users' AND relkind = 'r'",
    );
    format!("users in: {schema}")
}

/// An old database that is moved without a refusal.
fn moved(test: &'static str, fault: &'static str, more: &str) {
    let database = old(more);
    let plan = bruhmcp(&database.url(), &["plan"]);
    assert_eq!(plan.code, Some(0), "{plan:?}");
    let reported = format!("`plan`: {}", told(plan));
    let then = finish(&database);
    Row {
        test,
        fault,
        reported,
        after: "unchanged".into(),
        then: format!("{then}; {}", users_in(&database)),
    }
    .check();
}

#[test]
fn old_tables_with_a_view_of_others() {
    moved(
        "old_tables_with_a_view_of_others",
        "old tables, and a view of others on them",
        "CREATE VIEW people AS SELECT id FROM users",
    );
}

#[test]
fn old_tables_in_a_publication_of_all() {
    moved(
        "old_tables_in_a_publication_of_all",
        "old tables, and a publication FOR ALL TABLES",
        "CREATE PUBLICATION warehouse FOR ALL TABLES",
    );
}

/// An old database that is refused until `remedy`, which `then` describes.
fn refused(
    test: &'static str,
    fault: &'static str,
    more: &str,
    role: &str,
    (remedy, then): (&str, &str),
) {
    let database = old(more);
    let url = super::with_parameter(&database, &format!("options=-crole%3D{role}"));
    assert_eq!(bruhmcp(&url, &["plan"]).code, Some(5));
    let outcome = bruhmcp(&url, &["run"]);
    let after = users_in(&database);
    query(&database, remedy);
    Row {
        test,
        fault,
        reported: said(&outcome).replace(database.name(), "…"),
        after: format!("nothing applied; {after}"),
        then: format!("{then}: {}; {}", finish(&database), users_in(&database)),
    }
    .check();
}

#[test]
fn old_tables_and_a_name_that_is_taken() {
    refused(
        "old_tables_and_a_name_that_is_taken",
        "old tables, and an index of another table with a name that 001 needs",
        "CREATE TABLE people (at date); CREATE INDEX users_created_at_idx ON people (at)",
        "postgres",
        (
            "ALTER INDEX users_created_at_idx RENAME TO people_at_idx",
            "after ALTER INDEX … RENAME",
        ),
    );
}

#[test]
fn old_tables_of_another_owner() {
    refused(
        "old_tables_of_another_owner",
        "old tables that belong to another role",
        "GRANT CREATE ON SCHEMA public TO pg_monitor",
        "pg_monitor",
        (
            "REVOKE CREATE ON SCHEMA public FROM pg_monitor",
            "with the owner's role",
        ),
    );
}

#[test]
fn everybody_may_create() {
    refused(
        "everybody_may_create",
        "PUBLIC may create in the schema",
        "GRANT CREATE ON SCHEMA public TO PUBLIC",
        "postgres",
        (
            "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
            "after the REVOKE",
        ),
    );
}

#[test]
fn failure_after_the_move() {
    let database = old(
        "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql
             AS $$ BEGIN RAISE EXCEPTION 'no types'; END $$;
         CREATE EVENT TRIGGER no_types ON ddl_command_start WHEN TAG IN ('CREATE TYPE')
             EXECUTE FUNCTION refuse()",
    );
    let outcome = bruhmcp(&database.url(), &["run"]);
    assert_eq!(applied(&database), versions()[..1]);
    let after = users_in(&database);
    query(&database, "DROP EVENT TRIGGER no_types");
    Row {
        test: "failure_after_the_move",
        fault: "001 fails after 000 has moved old tables",
        reported: told(outcome),
        after: format!("applied to 000; {after}"),
        then: finish(&database),
    }
    .check();
}
