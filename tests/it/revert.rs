//! `revert` and `redo`: what they count, and that they lose no more than was confirmed.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bruhmcp_db::migrations::{
    Cause, Direction, Error, Event, Extent, Failure, Loss, LossKind, Refusal, StateAfter, runner,
};
use diesel::connection::SimpleConnection;

use crate::difference::assert_same;
use crate::runner::{Folder, refusal, yes};
use crate::support::{self, TestDatabase, database, empty_database};

fn deleted(table: &str, column: Option<&str>, rows: i64) -> Loss {
    Loss {
        table: table.into(),
        column: column.map(str::to_owned),
        kind: LossKind::Deleted,
        rows,
    }
}

fn overwritten(table: &str, column: &str, rows: i64) -> Loss {
    Loss {
        kind: LossKind::Overwritten,
        ..deleted(table, Some(column), rows)
    }
}

fn failure(error: Error) -> Failure {
    match error {
        Error::Failed(failure) => *failure,
        other => panic!("{other:?}"),
    }
}

const PEOPLE: &str = "CREATE TABLE people (id int PRIMARY KEY, name text, age int);
    INSERT INTO people VALUES (1, 'a', 10), (2, 'b', NULL), (3, 'c', 30), (4, NULL, 40)";

/// A database with the table `people`, and the migration with this `down.sql` applied.
fn people(down: &str) -> (TestDatabase, Folder) {
    let database = empty_database();
    database.psql(PEOPLE).unwrap();
    let folder = Folder::new(&[("001_a", "SELECT 1", down)]);
    folder.runner(&database).run().unwrap();
    (database, folder)
}

/// Returns what the rehearsal finds, after checking that the revert then reports the same.
fn losses(database: &TestDatabase, folder: &Folder) -> Vec<Loss> {
    let mut found = Vec::new();
    let report = folder.runner(database).revert(&Extent::All, |reversal| {
        found.extend(reversal.losses.clone().unwrap());
        true
    });
    assert_eq!(report.unwrap().lost.as_ref(), Some(&found));
    found
}

#[track_caller]
fn assert_loses(down: &str, expected: &[Loss]) {
    let (database, folder) = people(down);
    assert_eq!(losses(&database, &folder), expected, "{down}");
}

#[test]
fn says_which_rows_a_revert_loses() {
    let database = database();
    let mut runner = runner(&database.url()).unwrap();
    database
        .psql(
            "INSERT INTO users (first_name, last_name, email) VALUES ('A', 'B', 'a@b.c'), ('C', 'D', 'c@d.e');
             INSERT INTO webhook_events (external_event_id, event_type, payment_gateway, payload)
             VALUES ('1', 'x', 'stripe', '{}');
             UPDATE user_plans SET customer_id = 'cus_1' WHERE user_id = (SELECT id FROM users WHERE email = 'a@b.c');",
        )
        .unwrap();
    let before = database.dump(&[]);
    let mut asked = Vec::new();
    let refused = runner.revert(&Extent::To("005".into()), |reversal| {
        asked.extend(reversal.losses.clone().unwrap());
        false
    });
    assert_eq!(refusal(refused), Refusal::NotConfirmed);
    assert_eq!(
        asked,
        [
            deleted("public.user_plans", Some("customer_id"), 1),
            deleted("public.user_plans", Some("payment_status"), 2),
            deleted("public.webhook_events", None, 1),
        ]
    );
    assert_same(&before, &database.dump(&[]));
}

#[test]
fn counts_deleted_rows() {
    let rows = |rows| [deleted("public.people", None, rows)];
    assert_loses("DELETE FROM people WHERE id > 2", &rows(2));
    assert_loses("TRUNCATE people", &rows(4));
    assert_loses("DROP TABLE people", &rows(4));
    assert_loses(
        "DO $$BEGIN
             BEGIN DELETE FROM people; RAISE 'no'; EXCEPTION WHEN raise_exception THEN NULL; END;
             DELETE FROM people WHERE id = 1;
         END$$",
        &rows(1),
    );
    // With rows written, the count of rows is net, and that of overwritten values an upper bound.
    assert_loses(
        "DELETE FROM people; INSERT INTO people (id) VALUES (1), (2), (3)",
        &[
            rows(1)[0].clone(),
            deleted("public.people", Some("age"), 2),
            overwritten("public.people", "id", 3),
            deleted("public.people", Some("name"), 2),
        ],
    );
}

#[test]
fn counts_where_statistics_are_off() {
    let (database, folder) = people("DELETE FROM people WHERE id = 1");
    let url = database.url_with("options=-ctrack_counts%3Doff");
    let mut found = None;
    let report = folder.runner_at(&url).revert(&Extent::All, |reversal| {
        found.clone_from(&reversal.losses);
        true
    });
    let expected = Some(vec![deleted("public.people", None, 1)]);
    assert_eq!((found, report.unwrap().lost), (expected.clone(), expected));
}

#[test]
fn counts_cascades_and_partitions() {
    let database = empty_database();
    database
        .psql(
            "CREATE TABLE owner (id int PRIMARY KEY);
             CREATE TABLE \"Part\" (id int, owner int REFERENCES owner ON DELETE CASCADE) PARTITION BY LIST (id);
             CREATE TABLE \"Part1\" PARTITION OF \"Part\" FOR VALUES IN (1);
             CREATE TABLE \"Part2\" PARTITION OF \"Part\" FOR VALUES IN (2);
             INSERT INTO owner VALUES (1), (2);
             INSERT INTO \"Part\" VALUES (1, 1), (2, 1), (2, 2)",
        )
        .unwrap();
    let folder = Folder::new(&[("001_a", "SELECT 1", "DELETE FROM owner WHERE id = 1")]);
    folder.runner(&database).run().unwrap();
    assert_eq!(
        losses(&database, &folder),
        [
            deleted("public.\"Part1\"", None, 1),
            deleted("public.\"Part2\"", None, 1),
            deleted("public.owner", None, 1),
        ]
    );
}

/// A deferred trigger runs at the commit, after the statements of the file.
#[test]
fn counts_what_deferred_triggers_delete() {
    let (database, folder) = people("UPDATE due SET a = 2");
    database
        .psql(
            "CREATE TABLE due AS SELECT 1 AS a;
             CREATE FUNCTION clear() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN DELETE FROM people; RETURN NULL; END';
             CREATE CONSTRAINT TRIGGER clear AFTER UPDATE ON due DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION clear()",
        )
        .unwrap();
    let expected = [
        overwritten("public.due", "a", 1),
        deleted("public.people", None, 4),
    ];
    assert_eq!(losses(&database, &folder), expected);
}

#[test]
fn counts_deleted_and_overwritten_values() {
    let name = |rows| deleted("public.people", Some("name"), rows);
    let names = |rows| overwritten("public.people", "name", rows);
    assert_loses("ALTER TABLE people DROP COLUMN name", &[name(3)]);
    assert_loses("UPDATE people SET name = NULL", &[name(3)]);
    assert_loses("UPDATE people SET name = 'x'", &[names(3)]);
    assert_loses("UPDATE people SET name = 'x' WHERE id = 2", &[names(1)]);
    assert_loses(
        "UPDATE people SET name = CASE id WHEN 1 THEN 'x' END WHERE id < 3",
        &[name(1), names(1)],
    );
    assert_loses(
        "DELETE FROM people WHERE id = 1; INSERT INTO people VALUES (1, 'x', 10)",
        &[names(1)],
    );
    assert_loses(
        "ALTER TABLE people ALTER COLUMN age TYPE bigint USING age / 20",
        &[overwritten("public.people", "age", 3)],
    );
    assert_loses(
        "ALTER TABLE people ALTER COLUMN age TYPE text USING nullif(age, 10)::text",
        &[
            deleted("public.people", Some("age"), 1),
            overwritten("public.people", "age", 2),
        ],
    );
    // Each column has the same values as before, in other rows.
    assert_loses(
        "UPDATE people SET name = CASE id WHEN 1 THEN 'b' ELSE 'a' END WHERE id < 3",
        &[names(2)],
    );
    assert_loses(
        "ALTER TABLE people RENAME id TO key; ALTER TABLE people ALTER COLUMN key TYPE text;
         UPDATE people SET age = 10 WHERE age = 10",
        &[],
    );
}

/// A nondeterministic collation takes the two values for equal.
#[test]
fn counts_values_that_a_collation_takes_for_equal() {
    let (database, folder) = people("UPDATE people SET name = upper(name) WHERE id = 1");
    let collate = database.psql(
        "CREATE COLLATION same (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
         ALTER TABLE people ALTER COLUMN name TYPE text COLLATE same",
    );
    if collate.is_err_and(|error| error.contains("0A000")) {
        return support::skipped("this server has no ICU");
    }
    let names = overwritten("public.people", "name", 1);
    assert_eq!(losses(&database, &folder), [names]);
}

#[test]
fn what_stays_is_no_loss() {
    for down in [
        "SELECT 1",
        "ALTER TABLE people RENAME TO persons; ALTER TABLE persons RENAME name TO first_name",
        "CREATE SCHEMA other; ALTER TABLE people SET SCHEMA other",
        "ALTER TABLE people ALTER COLUMN age TYPE bigint",
        "ALTER TABLE people ALTER COLUMN age TYPE text",
        "ALTER TABLE people ADD COLUMN new timestamptz DEFAULT clock_timestamp()",
        "INSERT INTO people VALUES (5, 'e', 50)",
        "UPDATE people SET name = name",
        "CREATE TABLE new AS TABLE people; DELETE FROM new; DROP TABLE new",
        "CREATE TEMP TABLE new AS TABLE people; DELETE FROM new",
        "DELETE FROM people WHERE false",
    ] {
        assert_loses(down, &[]);
    }
}

#[test]
fn rows_that_arrive_after_the_question_are_kept() {
    let (database, folder) = people("DROP TABLE people");
    let revert = || {
        let mut runner = folder.runner(&database);
        runner.revert(&Extent::All, |reversal| {
            assert_eq!(reversal.losses.as_ref().unwrap().len(), 1);
            let more = "INSERT INTO people SELECT 100 + g FROM generate_series(1, 1000) g";
            database.psql(more).unwrap();
            true
        })
    };
    assert_eq!(
        refusal(revert()),
        Refusal::LossesGrew(vec![(deleted("public.people", None, 1004), 4)])
    );
    assert_eq!(
        database.psql("SELECT count(*) FROM people").unwrap(),
        "1004\n"
    );
    assert_eq!(
        folder.runner(&database).status().unwrap().pending().count(),
        0
    );
    let report = folder.runner(&database).revert(&Extent::All, yes).unwrap();
    assert_eq!(
        report.lost,
        Some(vec![deleted("public.people", None, 1004)])
    );
}

/// Even where the role's default is a transaction that sees only what was there at its beginning.
#[test]
fn rows_that_arrive_during_the_revert_are_kept() {
    let (database, folder) = people("SELECT pg_sleep(0.3); DELETE FROM people");
    let url = database.url_with("options=-cdefault_transaction_isolation%3Dserializable");
    let mut writer = database.connect_as_owner();
    let reverted = folder.runner_at(&url).revert(&Extent::All, |_| {
        writer
            .batch_execute("BEGIN; INSERT INTO people VALUES (5)")
            .unwrap();
        std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(500));
            writer.batch_execute("COMMIT").unwrap();
        });
        true
    });
    assert!(matches!(refusal(reverted), Refusal::LossesGrew(_)));
    assert_eq!(database.psql("SELECT count(*) FROM people").unwrap(), "5\n");
}

#[test]
fn what_the_rehearsal_did_not_touch_is_kept() {
    let change = "IF EXISTS (SELECT FROM switch) THEN UPDATE people SET age = 1; END IF";
    for (before, rehearsed) in [
        ("", vec![]),
        (
            "ALTER TABLE people DROP COLUMN name;",
            vec![deleted("public.people", Some("name"), 3)],
        ),
    ] {
        let (database, folder) = people(&format!("{before} DO $$BEGIN {change}; END$$"));
        database.psql("CREATE TABLE switch (a int)").unwrap();
        let reverted = folder.runner(&database).revert(&Extent::All, |reversal| {
            assert_eq!(reversal.losses.as_ref(), Some(&rehearsed));
            database.psql("INSERT INTO switch VALUES (1)").unwrap();
            true
        });
        let table = "public.people".into();
        assert_eq!(refusal(reverted), Refusal::NotRehearsed(table));
        assert_eq!(
            database.psql("SELECT sum(age) FROM people").unwrap(),
            "80\n"
        );
    }
}

#[test]
fn a_writer_that_holds_a_lock_stops_the_revert() {
    let (database, folder) = people("DELETE FROM people");
    let mut writer = database.connect_as_owner();
    let runner = folder.runner(&database);
    let mut runner = runner.lock_timeout(Duration::from_secs(1)).tries(2);
    let error = runner.revert(&Extent::All, |_| {
        writer
            .batch_execute("BEGIN; UPDATE people SET age = 1")
            .unwrap();
        true
    });
    let Err(Error::Failed(failure)) = error else {
        panic!("it failed")
    };
    assert_eq!(
        (failure.cause, failure.together),
        (Cause::LockTimeout, true)
    );
    println!("{failure}");
    assert_eq!(failure.blockers.len(), 1);
    assert!(
        failure
            .to_string()
            .contains("Everything was rolled back. The database is at 001."),
        "{failure}"
    );
    drop(writer);
    assert_eq!(
        database.psql("SELECT sum(age) FROM people").unwrap(),
        "80\n"
    );
}

#[test]
fn a_revert_is_reverted_as_a_whole() {
    let database = empty_database();
    let folder = Folder::new(&[
        ("001_a", "CREATE TABLE a (b int)", "\nSELECT nothing"),
        ("002_b", "CREATE TABLE b AS SELECT 1 AS c", "DROP TABLE b"),
    ]);
    folder.runner(&database).run().unwrap();
    let error = folder
        .runner(&database)
        .revert(&Extent::All, yes)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "reverting 001_a failed in down.sql, line 2, column 8: column \"nothing\" does not exist\n\
         Everything was rolled back. The database is at 002."
    );
    assert_eq!(database.psql("TABLE b").unwrap(), "1\n");
    assert_eq!(
        folder.runner(&database).status().unwrap().pending().count(),
        0
    );
}

#[test]
fn a_redo_whose_up_fails_changes_nothing() {
    let database = empty_database();
    let folder = |second: &str| {
        Folder::new(&[
            ("001_a", "CREATE TABLE a (b int)", "DROP TABLE a"),
            ("002_b", second, "DROP TABLE b"),
        ])
    };
    folder("CREATE TABLE b (c int)")
        .runner(&database)
        .run()
        .unwrap();
    database
        .psql("INSERT INTO a VALUES (7); INSERT INTO b VALUES (8)")
        .unwrap();
    let broken = folder("CREATE TABLE b (c int); SELECT nothing");
    let log = Arc::new(Mutex::new(Vec::new()));
    let writer = Arc::clone(&log);
    let mut runner = broken.runner(&database).on_event(move |event| {
        writer.lock().unwrap().push(match event {
            Event::Started(name, direction) => format!("{direction} {name}"),
            other => panic!("{other:?}"),
        });
    });
    let failure = failure(runner.redo(&Extent::Last(2), yes).unwrap_err());
    // Each was started, and none is reported as finished.
    assert_eq!(
        *log.lock().unwrap(),
        ["down 002_b", "down 001_a", "up 001_a", "up 002_b"]
    );
    assert_eq!((failure.direction, failure.together), (Direction::Up, true));
    assert!(failure.done.steps.is_empty());
    let StateAfter::Known {
        newest, recorded, ..
    } = &failure.state
    else {
        panic!("{failure}")
    };
    assert_eq!((newest.as_deref(), recorded), (Some("002"), &false));
    assert!(
        failure
            .to_string()
            .ends_with("Everything was rolled back. The database is at 002."),
        "{failure}"
    );
    assert_eq!(database.psql("TABLE a; TABLE b").unwrap(), "7\n8\n");

    let redone = folder("CREATE TABLE b (c int)")
        .runner(&database)
        .redo(&Extent::Last(2), yes);
    let rows = [deleted("public.a", None, 1), deleted("public.b", None, 1)];
    assert_eq!(redone.unwrap().lost, Some(rows.into()));
}

/// Alone, each commits, and the trigger runs between them.
#[test]
fn deferred_triggers_run_between_migrations() {
    let database = empty_database();
    let folder = Folder::new(&[
        (
            "001_a",
            "CREATE TABLE a (b int PRIMARY KEY);
             CREATE TABLE c (b int CONSTRAINT c_fk REFERENCES a DEFERRABLE INITIALLY DEFERRED);
             INSERT INTO c VALUES (1); INSERT INTO a VALUES (1)",
            "DROP TABLE c, a",
        ),
        (
            "002_b",
            "ALTER TABLE c ADD COLUMN d int",
            "ALTER TABLE c DROP COLUMN d; INSERT INTO c VALUES (1)",
        ),
    ]);
    folder.runner(&database).run().unwrap();
    folder
        .runner(&database)
        .redo(&Extent::Last(2), yes)
        .unwrap();
    assert_eq!(database.psql("TABLE c").unwrap(), "1|\n");
}

/// `SET LOCAL` ends with the migration, though the transaction goes on.
#[test]
fn settings_do_not_reach_the_next_migration() {
    let database = empty_database();
    database
        .psql("CREATE SCHEMA other; CREATE TABLE other.a (b int); INSERT INTO other.a VALUES (1)")
        .unwrap();
    let folder = Folder::new(&[
        ("001_a", "CREATE TABLE a AS SELECT 1 AS b", "DROP TABLE a"),
        (
            "002_b",
            "SELECT 1",
            "SET LOCAL search_path = other, public; SET LOCAL lock_timeout = '1s'",
        ),
    ]);
    folder.runner(&database).run().unwrap();
    let report = folder.runner(&database).revert(&Extent::All, yes).unwrap();
    assert_eq!(report.lost, Some(vec![deleted("public.a", None, 1)]));
    assert_eq!(database.psql("TABLE other.a").unwrap(), "1\n");
}

#[test]
fn transaction_control_is_refused_before_anything_starts() {
    let control = |name: &str, direction, statement, line| Refusal::TransactionControl {
        name: name.into(),
        direction,
        statement,
        line,
    };
    let first = ("001_a", "CREATE TABLE a AS SELECT 1 AS b", "DROP TABLE a");
    let in_up = Folder::new(&[first, ("002_b", "SELECT 1;\nCOMMIT;", "SELECT 1")]);
    let in_down = Folder::new(&[first, ("002_b", "SELECT 1", "DELETE FROM a;\n\nCOMMIT;")]);
    let up = control("002_b", Direction::Up, "COMMIT", 2);
    let down = control("002_b", Direction::Down, "COMMIT", 3);
    let database = empty_database();
    for (folder, refused) in [(&in_up, &up), (&in_down, &down)] {
        let mut runner = folder.runner(&database);
        assert_eq!(refusal(runner.run()), *refused);
        assert_eq!(runner.status().unwrap().refusal(), Some(refused.clone()));
        let Err(Error::Refused(planned)) = runner.plan(None) else {
            panic!("it refuses")
        };
        assert_eq!(planned, *refused);
    }
    assert_eq!(database.psql("SELECT to_regclass('a')").unwrap(), "\n");

    // Applied by an earlier version of the program.
    Folder::new(&[first, ("002_b", "SELECT 1", "SELECT 1")])
        .runner(&database)
        .run()
        .unwrap();
    let no = |_: &_| panic!("it asks");
    assert_eq!(
        refusal(in_down.runner(&database).revert(&Extent::Last(1), no)),
        down
    );
    assert_eq!(
        refusal(in_up.runner(&database).redo(&Extent::Last(1), no)),
        up
    );
    assert_eq!(database.psql("TABLE a").unwrap(), "1\n");
    // What was applied no longer matters for a run or a revert.
    assert!(in_up.runner(&database).run().unwrap().steps.is_empty());
    assert_eq!(
        in_up
            .runner(&database)
            .revert(&Extent::Last(1), yes)
            .unwrap()
            .steps
            .len(),
        1
    );
}

#[test]
fn the_server_refuses_a_commit_inside_a_block() {
    for down in [
        "DELETE FROM people; DO $$BEGIN COMMIT; END$$",
        "DELETE FROM people; CALL commit_it()",
    ] {
        let (database, folder) = people(down);
        database
            .psql("CREATE PROCEDURE commit_it() LANGUAGE plpgsql AS 'BEGIN COMMIT; END'")
            .unwrap();
        let failure = failure(
            folder
                .runner(&database)
                .revert(&Extent::All, yes)
                .unwrap_err(),
        );
        assert_eq!(failure.report.message, "invalid transaction termination");
        assert_eq!(database.psql("SELECT count(*) FROM people").unwrap(), "4\n");
    }
}

#[test]
fn without_a_transaction_nothing_is_counted() {
    let database = empty_database();
    let up = "BEGIN; CREATE TABLE a (b int); COMMIT";
    let folder = Folder::new(&[("001_a", up, "DROP TABLE a")]).without_transaction("001_a");
    let mut runner = folder.runner(&database);
    runner.run().unwrap();
    let report = runner.redo(&Extent::All, |reversal| {
        assert_eq!(reversal.losses, None);
        true
    });
    let report = report.unwrap();
    assert_eq!((report.steps.len(), report.lost), (2, None));
}

#[test]
fn a_down_that_releases_the_lock_is_refused() {
    let (database, folder) = people("DELETE FROM people; SELECT pg_advisory_unlock_all()");
    let no = |_: &_| panic!("it asks");
    let reverted = folder.runner(&database).revert(&Extent::All, no);
    assert_eq!(refusal(reverted), Refusal::ReleasesLock);
    assert_eq!(database.psql("SELECT count(*) FROM people").unwrap(), "4\n");
}
