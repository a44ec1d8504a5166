//! The migrations as files, and each of them up, down and up again, by the prover.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use bruhmcp_db::migrations::MIGRATIONS;
use diesel::connection::SimpleConnection;
use diesel::dsl::{select, sql};
use diesel::prelude::*;
use diesel::sql_types::Text;
use diesel_pg_migrator::prover::{self, Prover};
use sha2::{Digest, Sha256};

use crate::difference::{assert_same, check_generated};
use crate::rules::with_keys;
use crate::runner::versions;
use crate::support::{TestDatabase, database, down_sql, empty_database, skipped, up_sql};

/// Runs a file as Diesel does: in one transaction.
fn apply(database: &TestDatabase, file: &Path) {
    let sql = fs::read_to_string(file).unwrap();
    database
        .psql(&format!("BEGIN;\n{sql}\nCOMMIT;"))
        .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
}

#[test]
fn each_down_undoes_its_up() {
    prover::reversible(MIGRATIONS, &empty_database().url()).unwrap();
}

/// Also 000, on the archive of an old database.
#[test]
fn each_down_keeps_the_rows_that_remain_and_each_up_takes_them() {
    let database = empty_database();
    database
        .psql(include_str!("../fixtures/legacy.sql"))
        .unwrap();
    let dump = || database.dump(&["--exclude-table=__diesel_schema_migrations"]);
    let old = dump();
    let mut tables: Vec<String> = Vec::new();
    let proof = Prover::new(MIGRATIONS)
        .rows(versions().last().unwrap(), |conn| {
            conn.batch_execute(&with_keys(include_str!("../fixtures/rows.sql")))?;
            let names = "format('%I.%I', schemaname, tablename) FROM pg_tables
                         WHERE schemaname = 'public'";
            tables = select(sql::<Text>(names)).load(conn)?;
            Ok(())
        })
        .prove(&database.url())
        .unwrap();
    assert_eq!(proof.reverted.len(), up_sql().len());
    for table in tables {
        assert!(
            !proof.without_rows.contains(&table),
            "{table} has no rows: add some to tests/fixtures/rows.sql"
        );
    }
    // The prover's own reading, against pg_dump's.
    assert_same(&old, &dump());
}

/// The Diesel CLI with the database's partitions, enums and comments.
#[test]
fn schema_rs_is_that_of_the_migrations() {
    match prover::schema_file(MIGRATIONS, &empty_database().url(), "schema.rs") {
        Err(prover::Error::Diesel(reason)) => skipped(&reason),
        result => result.unwrap(),
    }
}

/// The server would read other patterns, without an error.
#[test]
fn strings_that_lose_backslashes_are_refused() {
    let database = empty_database();
    let first = fs::read_to_string(&up_sql()[0]).unwrap();
    let error = database
        .psql(&format!("SET standard_conforming_strings = off; {first}"))
        .unwrap_err();
    assert!(error.contains("standard_conforming_strings"), "{error}");
}

/// Users from before 005 get the free plan, and its limit applies at once.
#[test]
fn plans_are_backfilled() {
    let database = empty_database();
    for up in &up_sql()[..5] {
        apply(&database, up);
    }
    // Of the schema of 004, which never changes.
    database
        .psql(&with_keys(
            "INSERT INTO users (id, first_name, last_name, email) VALUES
                 (:u1, 'Asha', 'Rao', 'asha@example.in'), (:u2, 'Ben', '', 'ben@example.in');
             INSERT INTO mcp_table (mcp_service_id, mcp_service_name, display_name, port, type)
             VALUES (:m1, 'figma', 'Figma', 49280, 'api_key'), (:m2, 'gmail', 'Gmail', 49296, 'oauth');
             INSERT INTO mcp_service_table (instance_id, user_id, mcp_service_id) VALUES
                 (:i1, :u1, :m1), (:i2, :u2, :m2), (:i3, :u1, :m1);
             INSERT INTO mcp_credentials (instance_id, api_key, oauth_status, oauth_completed_at)
             SELECT instance, decode(repeat('01', 40), 'hex'), 'completed', now()
               FROM unnest(ARRAY[:i1, :i3]::uuid[]) AS instance",
        ))
        .unwrap();
    for up in &up_sql()[5..] {
        apply(&database, up);
    }
    assert_eq!(
        database
            .psql("SELECT plan_type, max_instances, count(*) FROM user_plans GROUP BY 1, 2")
            .unwrap(),
        "free|1|2\n"
    );
    assert_eq!(
        database
            .psql(&with_keys(
                "SELECT status FROM mcp_service_table WHERE user_id = :u1"
            ))
            .unwrap(),
        "inactive\ninactive\n"
    );
    assert_eq!(
        database
            .psql("SELECT mcp_service_name, active_instances_count FROM mcp_table ORDER BY 1")
            .unwrap(),
        "figma|0\ngmail|0\n"
    );
}

#[test]
fn versions_are_unique_and_ascend() {
    let names: Vec<String> = up_sql()
        .iter()
        .map(|file| {
            file.parent()
                .unwrap()
                .file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned()
        })
        .collect();
    let versions: Vec<&str> = names
        .iter()
        .map(|name| name.split('_').next().unwrap())
        .collect();
    for (number, version) in versions.iter().enumerate() {
        assert_eq!(*version, format!("{number:03}"), "{names:?}");
    }
    assert_eq!(
        versions.iter().collect::<BTreeSet<_>>().len(),
        versions.len()
    );
}

/// Removes comments and all between `$$`, where BEGIN has another meaning.
fn bare(sql: &str) -> String {
    let lines = sql
        .lines()
        .map(|line| line.split("--").next().unwrap_or_default());
    let code = lines.collect::<Vec<_>>().join("\n");
    code.split("$$").step_by(2).collect::<Vec<_>>().join(" ")
}

/// An applied migration is never edited. `BRUHMCP_WRITE=1` adds new files and leaves the other
/// lines.
#[test]
fn generated_hashes() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/migrations");
    let digest = |file: &Path| {
        let text = fs::read_to_string(file).unwrap().replace("\r\n", "\n");
        let digest = Sha256::digest(text);
        let hash: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let name = file.strip_prefix(root).unwrap().to_str().unwrap();
        (name.replace('\\', "/"), hash)
    };
    let files = up_sql().into_iter().chain(down_sql());
    let mut hashes: BTreeMap<String, String> = files.map(|file| digest(&file)).collect();
    let committed = fs::read_to_string(format!("{root}/hashes.txt")).unwrap_or_default();
    if std::env::var_os("BRUHMCP_WRITE").is_some() {
        for (hash, file) in committed.lines().filter_map(|line| line.split_once("  ")) {
            hashes.insert(file.to_owned(), hash.to_owned());
        }
    }
    let lines = hashes
        .iter()
        .map(|(file, hash)| format!("{hash}  {file}\n"));
    let text: String = lines.collect();
    check_generated("generated_hashes", "migrations/hashes.txt", &text);
}

#[test]
fn migrations_keep_their_rules() {
    for file in up_sql().iter().chain(&down_sql()) {
        let sql = fs::read_to_string(file).unwrap();
        let code = bare(&sql).to_uppercase();
        let name = file.display();
        assert!(
            code.trim_start()
                .starts_with("SET LOCAL LOCK_TIMEOUT = '5S';"),
            "{name}: does not begin with lock_timeout"
        );
        // The tables belong to the current schema, whatever its name is.
        for schema in ["public.", "search_path = public", "search_path = 'public"] {
            assert!(!sql.contains(schema), "{name}: names the schema {schema}");
        }
        for statement in code.split(';').map(str::trim) {
            let first = statement.split_whitespace().next().unwrap_or_default();
            let control = [
                "BEGIN",
                "COMMIT",
                "END",
                "ROLLBACK",
                "START",
                "SAVEPOINT",
                "ABORT",
            ];
            assert!(
                !control.contains(&first),
                "{name}: transaction control: {statement}"
            );
            assert!(
                !first.starts_with('\\'),
                "{name}: psql command: {statement}"
            );
            if first == "SET" {
                let local = ["SET LOCAL", "SET CONSTRAINTS"]
                    .iter()
                    .any(|ok| statement.starts_with(ok));
                assert!(local, "{name}: session setting: {statement}");
            }
        }
        if !name.to_string().contains("000_") {
            for word in [
                "IF EXISTS",
                "IF NOT EXISTS",
                "OR REPLACE",
                " CASCADE;",
                "SERIAL",
                "VARCHAR",
            ] {
                assert!(!code.contains(word), "{name}: {word}");
            }
        }
    }
    for entry in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/migrations")).unwrap() {
        let folder = entry.unwrap().path();
        if folder.is_dir() {
            let mut files: Vec<_> = fs::read_dir(&folder)
                .unwrap()
                .map(|file| file.unwrap().file_name())
                .collect();
            files.sort();
            // Even an empty metadata.toml turns the transaction off.
            assert_eq!(files, ["down.sql", "up.sql"], "{}", folder.display());
        }
    }
}

/// A distributed engine takes `ADD CONSTRAINT` only as the one change of its `ALTER TABLE`.
#[test]
fn add_constraint_stands_alone() {
    for file in up_sql() {
        let sql = fs::read_to_string(&file).unwrap();
        for statement in bare(&sql).split(';').map(str::trim) {
            let mut depth = 0;
            let several = statement.chars().any(|letter| {
                depth += i32::from(letter == '(') - i32::from(letter == ')');
                letter == ',' && depth == 0
            });
            let adds = statement.starts_with("ALTER TABLE") && statement.contains("ADD CONSTRAINT");
            assert!(!(adds && several), "{}: {statement}", file.display());
        }
    }
}

/// Deferred triggers of one migration must not block the ALTER TABLE of the next.
#[test]
fn all_migrations_run_in_one_transaction() {
    let database_with_one = empty_database();
    let conn = &mut database_with_one.connect_as_owner();
    let all = up_sql()
        .iter()
        .map(|file| fs::read_to_string(file).unwrap())
        .collect::<Vec<_>>()
        .join("\n");
    conn.batch_execute(&format!("BEGIN;{all};COMMIT")).unwrap();
    let args = [
        "--exclude-table=__diesel_schema_migrations",
        "--no-privileges",
    ];
    assert_same(&database().dump(&args), &database_with_one.dump(&args));
}
