//! A schema in which the migrations must not run.

use super::*;

#[test]
fn open_schema() {
    let database = SERVER.create_database().unwrap();
    // As in a database from PostgreSQL 14 or before.
    query(&database, "GRANT CREATE ON SCHEMA public TO PUBLIC");
    let outcome = bruhmcp(&database.url(), &["run"]);
    let after = state(&database);
    query(&database, "REVOKE CREATE ON SCHEMA public FROM PUBLIC");
    Row {
        test: "open_schema",
        fault: "every role may create in the schema",
        reported: said(&outcome),
        after,
        then: format!("after the REVOKE: {}", finish(&database)),
    }
    .check();
}

#[test]
fn ledger_lost() {
    let database = with_user(&SERVER);
    let before = dump(&database);
    query(
        &database,
        "CREATE TABLE kept AS TABLE __diesel_schema_migrations;
         DROP TABLE __diesel_schema_migrations",
    );
    let outcome = bruhmcp(&database.url(), &["run"]);
    let after = state(&database);
    query(
        &database,
        "INSERT INTO __diesel_schema_migrations TABLE kept; DROP TABLE kept",
    );
    assert_same(&before, &dump(&database));
    Row {
        test: "ledger_lost",
        fault: "the ledger is lost, the tables are there",
        reported: said(&outcome),
        after: format!("{after}, the tables and rows as before"),
        then: format!("with the ledger restored: {}", finish(&database)),
    }
    .check();
}
