//! What `plan` says before 000 moves anything, and what stands in the way.

use bruhmcp_db::migrations::{Error, Note, Preflight, Refusal, runner};
use diesel::connection::SimpleConnection;

use crate::cli::bruhmcp;
use crate::difference::{assert_same, assert_same_set};
use crate::json;
use crate::support::{TestDatabase, database, empty_database};

const LEGACY: &str = include_str!("../fixtures/legacy.sql");
const MOVES: &str = "000 moves to the schema bruhmcp_archive";

fn plan(database: &TestDatabase) -> Preflight {
    plan_at(&database.url())
}

fn plan_at(url: &str) -> Preflight {
    runner(url).unwrap().plan(None).unwrap().preflight
}

/// The items of the note whose title begins so.
fn items<'a>(notes: &'a [Note], title: &str) -> &'a [String] {
    let note = notes.iter().find(|note| note.title.starts_with(title));
    note.map_or(&[], |note| &note.items)
}

/// A run refuses with these obstacles and changes nothing.
fn assert_refused(database: &TestDatabase, url: &str, obstacles: &[Note]) {
    assert!(!obstacles.is_empty());
    let before = database.dump(&[]);
    let error = runner(url).unwrap().run().unwrap_err();
    let Error::Refused(Refusal::Obstacles(found)) = error else {
        panic!("{error:?}")
    };
    assert_eq!(found, obstacles);
    assert_same(&before, &database.dump(&[]));
}

#[test]
fn an_empty_database_has_nothing_to_say() {
    assert_eq!(plan(&empty_database()), Preflight::default());
}

#[test]
fn plan_lists_what_moves_and_what_stays() {
    let database = empty_database();
    database.psql(LEGACY).unwrap();
    let before = database.dump(&[]);
    let found = plan(&database);
    assert_eq!(found.obstacles, []);
    assert_same(&before, &database.dump(&[]));

    let moves = items(&found.notes, MOVES);
    for item in [
        "table users (400 rows)",
        "table beta_users (25 rows)",
        "table token_audit_log",
        "view token_audit_summary",
        "type payment_gateway",
        "function update_updated_at_column()",
    ] {
        assert!(
            moves.iter().any(|found| found == item),
            "{item}: {moves:#?}"
        );
    }
    assert_eq!(
        items(&found.notes, "Stays"),
        [
            "column plan of table support_tickets",
            "constraint support_tickets_user_id_fkey on table support_tickets",
            "materialized view revenue_per_user",
            "trigger touch_ticket on table support_tickets",
            "view active_people",
        ]
    );
    assert_eq!(
        items(&found.notes, "Publications that go on"),
        ["warehouse: users"]
    );

    // The run says the same, in the past tense.
    let report = runner(&database.url()).unwrap().run().unwrap();
    assert_eq!(items(&report.notes, "Moved to the schema"), moves);
    assert_eq!(report.notes[1..found.notes.len()], found.notes[1..]);
    // What was said is what was moved.
    let moved = database
        .psql(
            "SET search_path = bruhmcp_archive;
             SELECT pg_describe_object(d.classid, d.objid, 0)
             FROM pg_depend d
             LEFT JOIN pg_sequence s ON d.classid = 'pg_class'::regclass AND s.seqrelid = d.objid
             WHERE d.refclassid = 'pg_namespace'::regclass
                 AND d.refobjid = 'bruhmcp_archive'::regnamespace
                 AND NOT EXISTS (
                     SELECT FROM pg_depend o
                     WHERE o.objid = s.seqrelid AND o.deptype IN ('a', 'i')
                         AND o.classid = 'pg_class'::regclass
                 )",
        )
        .unwrap();
    assert_same_set(
        moved.lines(),
        moves.iter().map(|item| item.split(" (").next().unwrap()),
    );
}

#[test]
fn a_big_table_is_not_read() {
    let database = empty_database();
    database
        .psql(
            "CREATE TABLE users (a int, b text) WITH (autovacuum_enabled = false);
             INSERT INTO users SELECT i, repeat('x', 100) FROM generate_series(1, 100000) i",
        )
        .unwrap();
    assert_eq!(
        items(&plan(&database).notes, MOVES),
        ["table users (13 MB)"]
    );
    database.psql("ANALYZE users").unwrap();
    assert_eq!(
        items(&plan(&database).notes, MOVES),
        ["table users (about 100,000 rows)"]
    );
}

#[test]
fn a_locked_table_is_not_waited_for() {
    let database = empty_database();
    database.psql("CREATE TABLE users (a int)").unwrap();
    let mut holder = database.connect_as_owner();
    holder.batch_execute("BEGIN; LOCK TABLE users").unwrap();
    assert_eq!(
        items(&plan(&database).notes, MOVES),
        ["table users (locked by another session)"]
    );
}

#[test]
fn publications_that_change_are_named() {
    let database = empty_database();
    database
        .psql(
            "CREATE TABLE users (id int PRIMARY KEY);
             CREATE PUBLICATION one FOR TABLE users;
             CREATE PUBLICATION schema_wide FOR TABLES IN SCHEMA public;
             CREATE PUBLICATION every FOR ALL TABLES",
        )
        .unwrap();
    let notes = plan(&database).notes;
    assert_eq!(items(&notes, "Publications that go on"), ["one: users"]);
    assert_eq!(items(&notes, "Publications of the whole"), ["schema_wide"]);
    assert_eq!(items(&notes, "Publications FOR ALL"), ["every"]);
}

#[test]
fn functions_that_mean_another_table_afterwards_are_named() {
    let database = empty_database();
    database
        .psql(
            r#"CREATE TABLE users (id int);
               CREATE TABLE sessions (id int);
               CREATE SCHEMA other; CREATE TABLE other.sessions (id int);
               CREATE FUNCTION reads() RETURNS bigint LANGUAGE sql AS 'SELECT count(*) FROM USERS, "sessions"';
               CREATE FUNCTION qualified() RETURNS bigint LANGUAGE sql AS 'SELECT count(*) FROM public.users, other.sessions';
               CREATE FUNCTION other() RETURNS text LANGUAGE sql AS 'SELECT ''users_of_today''';
               CREATE FUNCTION bound() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT count(*) FROM users; END"#,
        )
        .unwrap();
    let notes = plan(&database).notes;
    assert_eq!(
        items(&notes, "Functions whose text"),
        ["qualified(): users", "reads(): sessions, users"]
    );
    assert_eq!(items(&notes, "Stays"), ["function bound()"]);
}

#[test]
fn names_that_are_taken_refuse_the_run() {
    let database = empty_database();
    database
        .psql(
            "CREATE TABLE users (id int CONSTRAINT users_pkey PRIMARY KEY, created_at date);
             CREATE INDEX users_created_at_idx ON users (created_at);
             CREATE TABLE people (id int CONSTRAINT auth_tokens_pkey PRIMARY KEY, at date);
             CREATE INDEX users_email_key ON people (at)",
        )
        .unwrap();
    let found = plan(&database);
    assert_eq!(
        items(&found.obstacles, "The names of these"),
        [
            "index auth_tokens_pkey of table people",
            "index users_email_key of table people"
        ]
    );
    assert_refused(&database, &database.url(), &found.obstacles);
    // They stand in the way of 001, not of 000.
    let runner = &mut runner(&database.url()).unwrap();
    assert_eq!(runner.plan(Some("000")).unwrap().preflight.obstacles, []);
    runner.run_to(Some("000")).unwrap();
    let obstacles = plan(&database).obstacles;
    assert_eq!(obstacles, found.obstacles);
    assert_refused(&database, &database.url(), &obstacles);
    database
        .psql("ALTER INDEX users_email_key RENAME TO a; ALTER INDEX auth_tokens_pkey RENAME TO b")
        .unwrap();
    runner.run().unwrap();
}

#[test]
fn an_archive_in_the_way_refuses_the_run() {
    let database = empty_database();
    database
        .psql("CREATE SCHEMA bruhmcp_archive; CREATE TABLE users (id int)")
        .unwrap();
    let found = plan(&database).obstacles;
    assert_eq!(items(&found, "The schema bruhmcp_archive").len(), 1);
    assert_refused(&database, &database.url(), &found);
}

#[test]
fn rights_that_are_missing_refuse_the_run() {
    let database = empty_database();
    database
        .psql(
            "GRANT CREATE ON SCHEMA public TO pg_monitor;
             CREATE TABLE users (id int)",
        )
        .unwrap();
    let url = database.url_with("options=-crole%3Dpg_monitor");
    let found = plan_at(&url).obstacles;
    let owner = items(&found, "Only the owner");
    assert!(owner[0].starts_with("table users (owner: "), "{owner:?}");
    let create = items(&found, "The role may not create");
    assert!(
        create[0].starts_with("GRANT CREATE ON DATABASE "),
        "{create:?}"
    );
    assert_refused(&database, &url, &found);
}

#[test]
fn public_may_create_refuses_the_run() {
    let database = empty_database();
    database
        .psql("GRANT CREATE ON SCHEMA public TO PUBLIC")
        .unwrap();
    let found = plan(&database).obstacles;
    assert_eq!(
        items(&found, "Every role may create"),
        ["REVOKE CREATE ON SCHEMA public FROM PUBLIC"]
    );
    assert_refused(&database, &database.url(), &found);
    // It stands in the way of 001, not of 000.
    runner(&database.url())
        .unwrap()
        .run_to(Some("000"))
        .unwrap();
}

/// The search_path of the role is not what counts.
#[test]
fn plan_looks_at_the_schema_of_the_migrations() {
    let database = empty_database();
    database
        .psql(
            "CREATE SCHEMA other; CREATE TABLE users (a int); CREATE TABLE other.sessions (a int)",
        )
        .unwrap();
    let url = database.url_with("options=-csearch_path%3Dother");
    assert_eq!(items(&plan_at(&url).notes, MOVES), ["table users (0 rows)"]);
}

/// As `adopt` and 000 say.
#[test]
fn this_schema_with_drift_and_without_its_ledger_refuses_the_run() {
    let database = database();
    database
        .psql("ALTER TABLE users DROP COLUMN last_login_at CASCADE; DROP TABLE __diesel_schema_migrations")
        .unwrap();
    let found = plan(&database);
    assert_eq!(found.notes, []);
    assert_eq!(
        items(
            &found.obstacles,
            "The tables of bruhmcp-db are here, but __diesel_schema_migrations lacks "
        ),
        ["bruhmcp-db adopt"]
    );
    assert_refused(&database, &database.url(), &found.obstacles);
}

#[test]
fn the_command_shows_groups_and_exits_with_5_if_the_run_would_fail() {
    let database = empty_database();
    database
        .psql("CREATE TABLE users (id int); INSERT INTO users VALUES (1)")
        .unwrap();
    let plan = bruhmcp(&database.url(), &["plan"]);
    assert_eq!(plan.code, Some(0), "{plan:?}");
    let group = "\n000 moves to the schema bruhmcp_archive:\n  \
                 table users (1 row)\n";
    assert!(plan.out.ends_with(group), "{plan:?}");
    let sql = bruhmcp(&database.url(), &["plan", "--sql"]);
    assert!(
        sql.err.contains(group.trim_start()) && !sql.out.contains(group),
        "{sql:?}"
    );

    database.psql("CREATE SCHEMA bruhmcp_archive").unwrap();
    let plan = bruhmcp(&database.url(), &["plan"]);
    assert_eq!(plan.code, Some(5), "{plan:?}");
    assert!(
        plan.err.contains("ALTER SCHEMA bruhmcp_archive RENAME TO"),
        "{plan:?}"
    );
    let plan = bruhmcp(&database.url(), &["plan", "--json"]);
    assert_eq!(plan.code, Some(5), "{plan:?}");
    let json = &json::check(&plan)["plan"];
    assert_eq!(json["migrations"][0]["version"], "000");
    assert_eq!(json["notes"][0]["items"][0], "table users (1 row)");
    assert_eq!(
        json["obstacles"][0]["items"][0],
        "ALTER SCHEMA bruhmcp_archive RENAME TO …"
    );
}
