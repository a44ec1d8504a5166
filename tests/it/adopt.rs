//! A lost ledger: `run` refuses to migrate what is migrated, and `adopt` writes the ledger again.

use bruhmcp_db::migrations::{Error, Refusal, runner};

use crate::cli::bruhmcp;
use crate::difference::assert_same;
use crate::json;
use crate::runner::{Folder, names, next_version, versions};
use crate::support::{self, TestDatabase, database, empty_database};

const LEDGER: &str = "SELECT version FROM __diesel_schema_migrations ORDER BY version";

fn ledger(database: &TestDatabase) -> Vec<String> {
    let versions = database.psql(LEDGER).unwrap();
    versions.lines().map(str::to_owned).collect()
}

/// A database at `version`.
fn at(version: &str) -> TestDatabase {
    let database = empty_database();
    runner(&database.url())
        .unwrap()
        .run_to(Some(version))
        .unwrap();
    database
}

fn forget(database: &TestDatabase, condition: &str) {
    let delete = format!("DELETE FROM __diesel_schema_migrations WHERE {condition}");
    database.psql(&delete).unwrap();
}

fn adopt(database: &TestDatabase) -> Result<Vec<String>, Error> {
    runner(&database.url()).unwrap().adopt()
}

/// Running and adopting are refused and change nothing.
#[track_caller]
fn refusal(
    database: &TestDatabase,
    run: impl FnOnce(&TestDatabase) -> Result<(), Error>,
) -> Refusal {
    let before = database.dump(&[]);
    let error = run(database).unwrap_err();
    assert_same(&before, &database.dump(&[]));
    match error {
        Error::Refused(refusal) => refusal,
        other => panic!("{other:?}"),
    }
}

fn run(database: &TestDatabase) -> Result<(), Error> {
    runner(&database.url()).unwrap().run().map(drop)
}

fn run_adopt(database: &TestDatabase) -> Result<(), Error> {
    adopt(database).map(drop)
}

#[test]
fn a_truncated_ledger_costs_no_user() {
    let database = database();
    database
        .psql(
            "INSERT INTO users (first_name, last_name, email)
             SELECT 'A', 'B', 'user' || i || '@example.com' FROM generate_series(1, 1000) i;
             TRUNCATE __diesel_schema_migrations",
        )
        .unwrap();
    let lost = Refusal::LostLedger {
        found: names().pop().unwrap(),
        schema: "public".into(),
        elsewhere: Vec::new(),
    };
    assert_eq!(refusal(&database, run), lost);
    let plan = runner(&database.url()).unwrap().plan(None).unwrap_err();
    assert!(matches!(plan, Error::Refused(refusal) if refusal == lost));

    assert_eq!(adopt(&database).unwrap(), names());
    assert_eq!(ledger(&database), versions());
    assert_eq!(run(&database).unwrap(), ());
    assert_eq!(
        database.psql("SELECT count(*) FROM public.users").unwrap(),
        "1000\n"
    );
    assert_eq!(adopt(&database).unwrap(), Vec::<String>::new());
}

#[test]
fn each_version_is_recognised() {
    for (index, version) in versions().iter().enumerate().skip(1) {
        let database = at(version);
        database
            .psql("DROP TABLE __diesel_schema_migrations")
            .unwrap();
        let Refusal::LostLedger { found, .. } = refusal(&database, run) else {
            panic!("{version}")
        };
        assert_eq!(found, names()[index]);
        assert_eq!(adopt(&database).unwrap(), names()[..=index]);
        assert_eq!(ledger(&database), versions()[..=index]);
        run(&database).unwrap();
    }
}

#[test]
fn rows_that_are_left_stay() {
    let database = database();
    let first =
        "SELECT version, run_on FROM __diesel_schema_migrations WHERE version <= '002' ORDER BY 1";
    let before = database.psql(first).unwrap();
    // The newest ones.
    forget(&database, "version > '002'");
    assert!(matches!(
        refusal(&database, run),
        Refusal::LostLedger { .. }
    ));
    assert_eq!(adopt(&database).unwrap(), names()[3..]);
    assert_eq!(database.psql(first).unwrap(), before);
    // Some in the middle, and the oldest.
    forget(&database, "version IN ('000', '003', '004')");
    assert!(matches!(
        refusal(&database, run),
        Refusal::OutOfOrder { .. }
    ));
    let lost = [0, 3, 4].map(|index| names()[index].clone());
    assert_eq!(adopt(&database).unwrap(), lost);
    assert_eq!(ledger(&database), versions());
}

#[test]
fn what_was_added_by_hand_does_not_matter() {
    let database = database();
    database
        .psql(
            "ALTER TABLE users ADD COLUMN spare_name text;
             CREATE TABLE support_tickets (id int);
             CREATE INDEX ON users (last_name);
             TRUNCATE __diesel_schema_migrations",
        )
        .unwrap();
    assert!(matches!(
        refusal(&database, run),
        Refusal::LostLedger { .. }
    ));
    assert_eq!(adopt(&database).unwrap(), names());
}

#[test]
fn a_drifted_schema_is_not_adopted() {
    let database = database();
    database
        .psql(
            "ALTER TABLE account_credits DROP COLUMN description;
             ALTER TABLE users ALTER COLUMN is_active DROP DEFAULT;
             TRUNCATE __diesel_schema_migrations",
        )
        .unwrap();
    let Refusal::NotAdopted(nearest, differences) = refusal(&database, run_adopt) else {
        panic!()
    };
    assert_eq!(nearest.as_ref(), names().last());
    assert_eq!(
        differences[..2],
        [
            "- column account_credits.description: text",
            "- column users.is_active: boolean not null default true\n\
             + column users.is_active: boolean not null",
        ]
    );
}

/// A ledger that is ahead of the schema is not made longer.
#[test]
fn a_ledger_without_its_schema_is_not_adopted() {
    let database = at("004");
    let insert = "INSERT INTO __diesel_schema_migrations (version) VALUES ('006')";
    database.psql(insert).unwrap();
    assert!(matches!(
        refusal(&database, run_adopt),
        Refusal::NotAdopted(..)
    ));
    database
        .psql(&insert.replace("006", &next_version()))
        .unwrap();
    assert_eq!(
        refusal(&database, run_adopt),
        Refusal::Unknown(vec![next_version()])
    );
}

#[test]
fn there_is_nothing_to_adopt_before_the_first_migration() {
    let database = empty_database();
    let before = database.dump(&[]);
    assert_eq!(adopt(&database).unwrap(), Vec::<String>::new());
    assert_same(&before, &database.dump(&[]));
    // 000 leaves no trace in an empty database.
    let database = at("000");
    forget(&database, "true");
    assert_eq!(adopt(&database).unwrap(), Vec::<String>::new());
    run(&database).unwrap();
}

#[test]
fn a_database_that_psql_migrated_is_adopted() {
    let database = empty_database();
    for path in support::up_sql() {
        database.psql_file(&path).unwrap();
    }
    assert!(matches!(
        refusal(&database, run),
        Refusal::LostLedger { .. }
    ));
    assert_eq!(adopt(&database).unwrap(), names());
    run(&database).unwrap();
}

#[test]
fn a_restored_dump_without_its_ledger_is_adopted() {
    let dump = database().dump(&["--exclude-table=__diesel_schema_migrations"]);
    let database = empty_database();
    database.psql(&dump).unwrap();
    assert!(matches!(
        refusal(&database, run),
        Refusal::LostLedger { .. }
    ));
    assert_eq!(adopt(&database).unwrap(), names());
}

#[test]
fn a_ledger_in_another_schema_is_named() {
    let database = database();
    database
        .psql(
            "CREATE SCHEMA other;
             ALTER TABLE __diesel_schema_migrations SET SCHEMA other",
        )
        .unwrap();
    let refused = refusal(&database, run);
    let Refusal::LostLedger { elsewhere, .. } = &refused else {
        panic!("{refused:?}")
    };
    assert_eq!(elsewhere, &["other"]);
    let text = refused.to_string();
    assert!(
        text.contains("ALTER TABLE other.__diesel_schema_migrations SET SCHEMA"),
        "{text}"
    );
}

/// A migration that changes only rows can't be recognised: the next run applies it.
#[test]
fn a_migration_that_leaves_no_trace_is_run_again() {
    let folder = Folder::new(&[
        ("001_a", "CREATE TABLE a (id int)", "DROP TABLE a"),
        ("002_row", "INSERT INTO a VALUES (1)", "DELETE FROM a"),
    ]);
    let catalogue =
        "# 001_a\n+ relation a: table\n+ columns a: id\n+ column a.id: integer\n# 002_row\n";
    let database = empty_database();
    let mut runner = folder.runner(&database).expect_catalogue(catalogue);
    runner.run_to(Some("001")).unwrap();
    // 002 is pending, not lost.
    assert_eq!(runner.run().unwrap().steps.len(), 1);
    forget(&database, "true");
    assert_eq!(runner.adopt().unwrap(), ["001_a"]);
    assert_eq!(runner.run().unwrap().steps.len(), 1);
    assert_eq!(database.psql("SELECT count(*) FROM a").unwrap(), "2\n");
}

#[test]
fn without_a_catalogue_nothing_is_recognised() {
    let folder = Folder::new(&[("001_a", "CREATE TABLE a (id int)", "DROP TABLE a")]);
    let database = empty_database();
    let mut runner = folder.runner(&database);
    assert!(matches!(
        runner.adopt(),
        Err(Error::Refused(Refusal::NoCatalogue))
    ));
    runner.run().unwrap();
}

#[test]
fn the_command_says_what_it_wrote() {
    let database = database();
    let url = database.url();
    let nothing = bruhmcp(&url, &["adopt"]);
    assert_eq!(
        (nothing.code, &*nothing.out),
        (Some(0), "Nothing to adopt.\n")
    );
    forget(&database, "version > '005'");
    let adopted = bruhmcp(&url, &["adopt", "--json"]);
    assert_eq!(
        json::check(&adopted)["adopted"],
        serde_json::json!(names()[6..])
    );
    forget(&database, "true");
    let refused = bruhmcp(&url, &["run"]);
    assert_eq!(refused.code, Some(5), "{refused:?}");
    assert!(refused.err.contains("`adopt`"), "{refused:?}");
    let adopted = bruhmcp(&url, &["adopt"]);
    assert_eq!(adopted.code, Some(0));
    assert!(
        adopted
            .out
            .starts_with("recorded  000_cleanup_old_tables\n"),
        "{adopted:?}"
    );
}
