//! The migration runner as a library.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bruhmcp_db::migrations::{
    Direction, Error, Event, Extent, MIGRATIONS, Note, Refusal, Report, Reversal, Runner,
    StateAfter, runner,
};
use diesel::migration::MigrationSource;
use diesel::pg::Pg;
use diesel_migrations::FileBasedMigrations;

use crate::difference::assert_same;
use crate::support::{TestDatabase, empty_database};

/// A temporary folder of migrations.
pub(crate) struct Folder(PathBuf);

impl Folder {
    /// Creates it from `(name, up, down)`.
    pub(crate) fn new(migrations: &[(&str, &str, &str)]) -> Self {
        let path = std::env::temp_dir().join(format!("bruhmcp_{}", uuid::Uuid::new_v4().simple()));
        for (name, up, down) in migrations {
            fs::create_dir_all(path.join(name)).unwrap();
            fs::write(path.join(name).join("up.sql"), up).unwrap();
            fs::write(path.join(name).join("down.sql"), down).unwrap();
        }
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Turns a migration's transaction off.
    pub(crate) fn without_transaction(self, name: &str) -> Self {
        fs::write(
            self.0.join(name).join("metadata.toml"),
            "run_in_transaction = false\n",
        )
        .unwrap();
        self
    }

    pub(crate) fn runner(&self, database: &TestDatabase) -> Runner {
        self.runner_at(&database.url())
    }

    pub(crate) fn runner_at(&self, url: &str) -> Runner {
        let source = FileBasedMigrations::from_path(&self.0).unwrap();
        Runner::new("test", url, source).unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Names of the migrations, oldest first.
pub(crate) fn names() -> Vec<String> {
    let migrations = MigrationSource::<Pg>::migrations(&MIGRATIONS).unwrap();
    migrations
        .iter()
        .map(|migration| migration.name().to_string())
        .collect()
}

/// Versions of the migrations, oldest first.
pub(crate) fn versions() -> Vec<String> {
    let version = |name: &String| name.split('_').next().unwrap().to_owned();
    names().iter().map(version).collect()
}

/// A version that comes after all of them.
pub(crate) fn next_version() -> String {
    format!("{:03}", versions().len())
}

pub(crate) fn yes(_: &Reversal) -> bool {
    true
}

#[test]
fn runs_reverts_and_redoes_what_it_reports() {
    let database = empty_database();
    let before = database.dump(&["--exclude-table=__diesel_schema_migrations"]);
    let log = Arc::new(Mutex::new(Vec::new()));
    let writer = Arc::clone(&log);
    let mut runner = runner(&database.url()).unwrap().on_event(move |event| {
        writer.lock().unwrap().push(match event {
            Event::Started(name, direction) => format!("{direction} {name}"),
            Event::Finished(step) => format!("{} {} done", step.direction, step.name),
            other => panic!("{other:?}"),
        });
    });

    let versions = versions();
    let steps = |report: Report| -> Vec<String> {
        let steps = report.steps.into_iter();
        steps
            .map(|step| format!("{} {}", step.direction, step.version))
            .collect()
    };
    let expected = |direction: &str, versions: &[String]| -> Vec<String> {
        let versions = versions.iter();
        versions
            .map(|version| format!("{direction} {version}"))
            .collect()
    };

    let report = runner.run_to(Some(&versions[2])).unwrap();
    assert!(
        report
            .steps
            .iter()
            .all(|step| step.duration > Duration::ZERO)
    );
    assert_eq!(steps(report), expected("up", &versions[..3]));
    let first = &names()[0];
    assert_eq!(
        log.lock().unwrap()[..2],
        [format!("up {first}"), format!("up {first} done")]
    );

    assert_eq!(steps(runner.run().unwrap()), expected("up", &versions[3..]));
    assert!(runner.run().unwrap().steps.is_empty());
    assert_eq!(runner.status().unwrap().pending().count(), 0);
    assert!(!runner.verify().unwrap().has_drift());

    let newest: Vec<String> = versions.iter().rev().cloned().collect();
    let redone = runner.redo(&Extent::Last(2), yes).unwrap();
    let up = expected("up", &versions[versions.len() - 2..]);
    assert_eq!(steps(redone), [expected("down", &newest[..2]), up].concat());
    let reverted = runner.revert(&Extent::To(newest[2].clone()), yes).unwrap();
    assert_eq!(steps(reverted), expected("down", &newest[..2]));
    let reverted = runner.revert(&Extent::Last(1), yes).unwrap();
    assert_eq!(steps(reverted), expected("down", &newest[2..3]));
    runner.revert(&Extent::All, yes).unwrap();
    assert_same(
        &before,
        &database.dump(&["--exclude-table=__diesel_schema_migrations"]),
    );
    let again = runner.revert(&Extent::All, |_| panic!("nothing to confirm"));
    assert!(again.unwrap().steps.is_empty());
    assert_eq!(runner.status().unwrap().pending().count(), versions.len());
}

#[test]
fn status_and_plan_write_nothing() {
    let database = empty_database();
    let before = database.dump(&[]);
    let mut runner = runner(&database.url()).unwrap();
    assert_eq!(runner.status().unwrap().pending().count(), names().len());
    let planned = runner.plan(Some(&versions()[3])).unwrap().migrations;
    let planned_names: Vec<&str> = planned.iter().map(|planned| &*planned.name).collect();
    assert_eq!(planned_names, names()[..4]);
    assert!(planned[1].sql.contains("CREATE TABLE users"));
    assert_same(&before, &database.dump(&[]));
}

#[test]
fn says_what_went_to_the_archive() {
    let database = empty_database();
    database
        .psql("CREATE TABLE users (a serial); CREATE TYPE plan_type AS ENUM ('a')")
        .unwrap();
    let mut runner = runner(&database.url()).unwrap();
    let note = Note {
        title: "Moved to the schema bruhmcp_archive".into(),
        items: ["table users (0 rows)", "type plan_type"]
            .map(Into::into)
            .into(),
    };
    let report = runner.run_to(Some(&versions()[0])).unwrap();
    assert!(report.notes.contains(&note), "{report:?}");
    let report = runner.run().unwrap();
    assert!(!report.notes.contains(&note), "{report:?}");
}

#[test]
fn a_failure_says_where_and_what_is_left() {
    let database = empty_database();
    let folder = Folder::new(&[
        (
            "001_first",
            "CREATE TABLE first (id int PRIMARY KEY, word text)",
            "DROP TABLE first",
        ),
        (
            "002_second",
            "CREATE TABLE second (a int);\n-- größer, so that characters and bytes differ\n  SELECT 'ä', nothing FROM first;\n",
            "DROP TABLE second",
        ),
    ]);
    let Err(Error::Failed(failure)) = folder.runner(&database).run() else {
        panic!("it failed")
    };
    assert_eq!(
        (failure.name.as_str(), failure.direction),
        ("002_second", Direction::Up)
    );
    assert_eq!(
        (failure.report.line, failure.report.column),
        (Some(3), Some(15))
    );
    assert!(failure.report.message.contains("nothing"), "{failure}");
    let done: Vec<&str> = failure.done.steps.iter().map(|step| &*step.name).collect();
    assert_eq!(done, ["001_first"]);
    let StateAfter::Known {
        newest, recorded, ..
    } = &failure.state
    else {
        panic!("{failure}")
    };
    assert_eq!((newest.as_deref(), recorded), (Some("001"), &false));
    assert_eq!(
        failure.to_string(),
        format!(
            "applying 002_second failed in up.sql, line 3, column 15: {}\n\
             The migration was rolled back. The database is at 001.",
            failure.report.message
        )
    );
    assert_eq!(
        database
            .psql("SELECT to_regclass('second') IS NULL")
            .unwrap(),
        "t\n"
    );
}

#[test]
fn detail_and_hint_are_told_but_no_row() {
    let failure = |up: &str| {
        let database = empty_database();
        let folder = Folder::new(&[("001_first", up, "SELECT 1")]);
        let mut runner = folder.runner(&database).secret_tables(&["tokens"]);
        let Err(Error::Failed(failure)) = runner.run() else {
            panic!("it failed")
        };
        failure.report
    };
    let report = failure("DO $$BEGIN RAISE 'no' USING DETAIL = 'why', HINT = 'what to do'; END$$");
    assert_eq!(
        (report.detail.as_deref(), report.hint.as_deref()),
        (Some("why"), Some("what to do"))
    );
    let report = failure("CREATE TABLE a (b int UNIQUE); INSERT INTO a VALUES (7), (7)");
    assert!(report.detail.unwrap().contains("(b)=(7)"));
    for secret in [
        "CREATE TABLE a (b text CHECK (b = '')); INSERT INTO a VALUES ('s3cret')",
        "CREATE TABLE a (b text, c int NOT NULL); INSERT INTO a VALUES ('s3cret')",
        "CREATE TABLE tokens (b text UNIQUE); INSERT INTO tokens VALUES ('s3cret'), ('s3cret')",
    ] {
        let report = failure(secret);
        assert!(!report.to_string().contains("s3cret"), "{report}");
        assert_eq!(
            report.detail.as_deref(),
            Some("withheld because it may quote a row")
        );
    }
}

#[test]
fn outside_a_transaction_a_failure_says_so() {
    let database = empty_database();
    let folder = Folder::new(&[
        (
            "001_table",
            "CREATE TABLE a (b int); INSERT INTO a VALUES (1), (1)",
            "DROP TABLE a",
        ),
        (
            "002_index",
            "CREATE UNIQUE INDEX CONCURRENTLY a_b_idx ON a (b)",
            "DROP INDEX a_b_idx",
        ),
    ])
    .without_transaction("002_index");
    let error = folder.runner(&database).run().unwrap_err().to_string();
    assert!(
        error.contains(
            "The migration does not run in a transaction: some of its changes may remain."
        ),
        "{error}"
    );
    database.psql("DROP INDEX a_b_idx; DELETE FROM a").unwrap();
    assert_eq!(folder.runner(&database).run().unwrap().steps.len(), 1);
    let mut losses = Some(Vec::new());
    folder
        .runner(&database)
        .revert(&Extent::Last(1), |reversal| {
            losses.clone_from(&reversal.losses);
            true
        })
        .unwrap();
    assert_eq!(losses, None);
}

pub(crate) fn refusal(result: Result<Report, Error>) -> Refusal {
    match result {
        Err(Error::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

#[test]
fn refuses_to_guess() {
    let three = [
        ("001_a", "SELECT 1", "SELECT 1"),
        ("002_b", "SELECT 1", "SELECT 1"),
        ("003_c", "SELECT 1", "SELECT 1"),
    ];

    let twins = Folder::new(&[three[0], ("001_other", "SELECT 1", "SELECT 1")]);
    let database = empty_database();
    assert!(matches!(
        refusal(twins.runner(&database).run()),
        Refusal::DuplicateVersion(..)
    ));

    let gap = Folder::new(&[three[0], three[2]]);
    gap.runner(&database).run().unwrap();
    let all = Folder::new(&three);
    let out_of_order = Refusal::OutOfOrder {
        pending: "002_b".into(),
        applied: "003_c".into(),
    };
    assert_eq!(refusal(all.runner(&database).run()), out_of_order);
    assert_eq!(
        all.runner(&database).status().unwrap().refusal(),
        Some(out_of_order)
    );

    // Only newer ones are unknown: an old replica during a rolling deploy.
    let older = Folder::new(&three[..1]);
    assert_eq!(older.runner(&database).run().unwrap().newer, ["003"]);
    assert_eq!(
        refusal(older.runner(&database).revert(&Extent::Last(1), yes)),
        Refusal::Unknown(vec!["003".into()])
    );

    let two = Folder::new(&three[..2]);
    assert_eq!(
        refusal(two.runner(&database).run()),
        Refusal::Unknown(vec!["003".into()])
    );

    // An unknown older one is no rolling deploy.
    let newest = Folder::new(&three[2..]);
    assert_eq!(
        refusal(newest.runner(&database).run()),
        Refusal::Unknown(vec!["001".into()])
    );

    assert_eq!(
        refusal(gap.runner(&database).run_to(Some("002"))),
        Refusal::NoSuchVersion("002".into())
    );

    let no_down = Folder::new(&[("004_d", "SELECT 1", "SELECT 1")]);
    fs::remove_file(no_down.0.join("004_d/down.sql")).unwrap();
    let database = empty_database();
    no_down.runner(&database).run().unwrap();
    assert_eq!(
        refusal(no_down.runner(&database).revert(&Extent::All, yes)),
        Refusal::NoDown("004_d".into())
    );
}

#[test]
fn a_lost_lock_is_told() {
    let database = empty_database();
    let folder = Folder::new(&[("001_a", "SELECT pg_advisory_unlock_all()", "SELECT 1")]);
    let error = folder.runner(&database).run().unwrap_err();
    assert!(matches!(error, Error::LockLost { .. }), "{error}");
    assert_eq!(error.done().unwrap().steps.len(), 1);
}

/// The old tables are gone, so it must be told where they are.
#[test]
fn a_failure_hides_no_note() {
    let database = empty_database();
    // The function stands in the way of 001.
    database
        .psql(
            "CREATE TABLE users (a int);
             CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql
             AS $$BEGIN RAISE 'no'; END$$;
             CREATE EVENT TRIGGER refuse ON ddl_command_end WHEN TAG IN ('CREATE TYPE')
             EXECUTE FUNCTION refuse()",
        )
        .unwrap();
    let error = runner(&database.url()).unwrap().run().unwrap_err();
    let done = error.done().unwrap();
    assert_eq!(done.steps.len(), 1, "{error}");
    assert_eq!(done.notes[0].title, "Moved to the schema bruhmcp_archive");
    assert_eq!(done.notes[0].items, ["table users (0 rows)"]);
}

/// The second half of a redo fails: in one transaction nothing was done, otherwise the report has
/// what was reverted.
#[test]
fn a_failed_redo_tells_its_first_half() {
    let folder = || {
        Folder::new(&[(
            "001_a",
            "CREATE TABLE a AS SELECT 1 AS b WHERE to_regclass('again') IS NULL;
             SELECT 1 / (to_regclass('again') IS NULL)::int",
            "DROP TABLE a; CREATE TABLE again ()",
        )])
    };
    let redo = |folder: Folder| {
        let database = empty_database();
        folder.runner(&database).run().unwrap();
        let mut runner = folder.runner(&database);
        let error = runner.redo(&Extent::All, yes).unwrap_err();
        let steps = error.done().unwrap().steps.iter();
        let done: Vec<Direction> = steps.map(|step| step.direction).collect();
        let left = database.psql("SELECT to_regclass('a') IS NOT NULL");
        (done, left.unwrap())
    };
    assert_eq!(redo(folder()), (vec![], "t\n".to_owned()));
    let alone = folder().without_transaction("001_a");
    assert_eq!(redo(alone), (vec![Direction::Down], "f\n".to_owned()));
}

#[test]
fn settings_stay_in_the_runners_own_session() {
    let database = empty_database();
    let settings = "SELECT name, current_setting(name) AS value FROM pg_settings WHERE name IN (
        'lock_timeout', 'client_connection_check_interval', 'statement_timeout',
        'idle_in_transaction_session_timeout', 'idle_session_timeout') ORDER BY name";
    let folder = Folder::new(&[(
        "001_a",
        &format!("CREATE TABLE seen AS {settings}"),
        "DROP TABLE seen",
    )]);
    folder.runner(&database).run().unwrap();
    assert_eq!(
        database.psql("TABLE seen").unwrap(),
        "client_connection_check_interval|100ms\nidle_in_transaction_session_timeout|1min\n\
         idle_session_timeout|0\nlock_timeout|5s\nstatement_timeout|0\n"
    );
    assert_eq!(database.psql("SELECT count(*) FROM pg_db_role_setting WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())").unwrap(), "0\n");
    assert_eq!(
        database.psql("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())").unwrap(),
        "0\n"
    );
}

#[test]
fn another_schema_has_its_own_migrations_and_lock() {
    let database = empty_database();
    database.psql("CREATE SCHEMA \"Other 1\"").unwrap();
    let url = database.url_with("options=-csearch_path%3D%22Other\\%201%22");
    let folder = Folder::new(&[(
        "001_a",
        "CREATE TABLE a AS SELECT objid FROM pg_locks
         WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
        "DROP TABLE a",
    )]);
    folder.runner(&database).run().unwrap();
    let mut other = folder.runner_at(&url).schema("Other 1");
    assert_eq!(other.status().unwrap().pending().count(), 1);
    other.run().unwrap();
    assert_eq!(other.status().unwrap().pending().count(), 0);
    let catalogue = other.catalogue().unwrap();
    assert!(catalogue.contains("column a.objid: oid\n"), "{catalogue}");
    let locks =
        "SELECT count(DISTINCT objid) FROM (TABLE public.a UNION ALL TABLE \"Other 1\".a) a";
    assert_eq!(database.psql(locks).unwrap(), "2\n");
}

#[test]
fn a_runner_can_move_to_another_thread() {
    let database = empty_database();
    let mut runner = runner(&database.url()).unwrap().on_event(|_| {});
    let steps = std::thread::spawn(move || runner.run().unwrap().steps.len());
    assert_eq!(steps.join().unwrap(), names().len());
}

#[test]
fn no_password_in_any_text() {
    // The passwords repeat one word, so that each part of them is found.
    for url in [
        "postgresql://user:hushhush@localhost:1/db",
        "postgresql://user:hush@hush@localhost:1/db",
        "postgresql://user:hush/hush@localhost:1/db",
        "postgresql://user:hush%zzhush@localhost:1/db",
        "postgresql://user:hush%00hush@localhost:1/db",
        "postgresql://user:hush%+1hush@localhost:1/db",
        "postgresql://user:hush?hush@localhost:1/db",
        "postgresql://user:hush#hush@localhost:1/db",
        "postgresql://user:hush:hush@localhost:1/db",
        "postgresql://user:hush hush@localhost:1/db",
        "postgresql://user:hush@localhost:port/db",
        "postgresql://user:hush@[localhost:1/db",
        "postgresql://user:hush@localhost:1/db?nonsense=1",
        "postgresql://user:hush@localhost:1/db?sslmode=hush",
        "postgresql://user@localhost:1/db?password=hush",
        "postgresql://user@localhost:1/db?password=hush&",
        "postgresql://user@localhost:1/db?password=hu=sh",
        "postgresql://user@localhost:1/db?passwordhush",
        "postgresql://hush:hush@hush:1/db",
        "postgresql://user:hush",
        "postgresql:/user:hush@localhost/db",
        "host=localhost port=1 password=hush",
        "user:hush@localhost",
        "postgresql://user:hush\0@localhost:1/db",
    ] {
        let text = match runner(url) {
            Err(error) => format!("{error} {error:?}"),
            Ok(mut runner) => {
                let error = runner.run().unwrap_err();
                assert!(matches!(error, Error::Connect(_)), "{url}: {error}");
                format!("{error} {error:?} {runner:?}")
            }
        };
        assert!(!text.contains("hush"), "{url}: {text}");
    }
}

#[test]
fn parameters_of_the_url_keep_their_meaning() {
    let database = empty_database();
    let url = database.url_with("options=-cwork_mem%3D123kB%20-c%20a.b%3D%22x");
    let folder = Folder::new(&[(
        "001_a",
        "CREATE TABLE seen AS SELECT current_setting('work_mem') AS w, current_setting('a.b') AS b",
        "DROP TABLE seen",
    )]);
    folder.runner_at(&url).run().unwrap();
    assert_eq!(database.psql("TABLE seen").unwrap(), "123kB|\"x\n");
}
