//! Faults of a revert: what it loses, and files that end the runner's transaction.

use bruhmcp_db::migrations::{Error, Extent, Refusal, Report};
use bruhmcp_devdb::Database;

use super::{Row, SERVER, query, said};
use crate::cli::Outcome;
use crate::runner::Folder;

const UP: &str = "CREATE TABLE people (name text); INSERT INTO people VALUES ('a'), ('b'), (NULL)";
const CONTENTS: &str = "SELECT count(*), count(name) FROM people";

/// Creates a database with the table `people`, and migrations that revert it in this way.
fn people(down: &str) -> (Database, Folder) {
    let database = SERVER.create_database().unwrap();
    query(&database, UP);
    let folder = Folder::new(&[("001_people", "SELECT 1", down)]);
    folder.runner_at(&database.url()).run().unwrap();
    (database, folder)
}

fn outcome(result: Result<Report, Error>) -> Outcome {
    let (code, err) = match result {
        Ok(_) => (0, String::new()),
        Err(error @ Error::Refused(_)) => (5, error.to_string()),
        Err(error) => (1, error.to_string()),
    };
    Outcome {
        code: Some(code),
        out: String::new(),
        err,
    }
}

/// Checks a revert whose loss must be confirmed.
fn asks(test: &'static str, fault: &'static str, down: &str, parameter: &str, expected: &str) {
    let (database, folder) = people(down);
    let url = format!("{}{parameter}", database.url());
    let mut asked = Vec::new();
    let refused = folder.runner_at(&url).revert(&Extent::All, |reversal| {
        asked.extend(reversal.losses.iter().flatten().map(ToString::to_string));
        false
    });
    assert!(
        matches!(refused, Err(Error::Refused(Refusal::NotConfirmed))),
        "{refused:?}"
    );
    assert_eq!(query(&database, CONTENTS), "3|2");
    let confirmed = folder.runner_at(&url).revert(&Extent::All, |_| true);
    assert_eq!(outcome(confirmed).code, Some(0));
    assert_eq!(query(&database, CONTENTS), expected);
    Row {
        test,
        fault,
        reported: format!("asks: this loses {}", asked.join(", ")),
        after: "without a yes: unchanged".into(),
        then: "with a yes: exit 0".into(),
    }
    .check();
}

#[test]
fn truncate_in_down() {
    let fault = "down.sql has TRUNCATE";
    asks("truncate_in_down", fault, "TRUNCATE people", "", "0|0");
}

#[test]
fn update_to_null_in_down() {
    let fault = "down.sql sets values to NULL";
    let down = "UPDATE people SET name = NULL";
    asks("update_to_null_in_down", fault, down, "", "3|0");
}

#[test]
fn overwrite_in_down() {
    let fault = "down.sql overwrites values";
    let down = "UPDATE people SET name = 'x' WHERE name = 'a'";
    asks("overwrite_in_down", fault, down, "", "3|2");
}

#[test]
fn track_counts_off() {
    let fault = "down.sql deletes rows, and the server keeps no statistics (track_counts = off)";
    let parameter = "&options=-ctrack_counts%3Doff";
    let down = "DELETE FROM people WHERE name IS NULL";
    asks("track_counts_off", fault, down, parameter, "2|2");
}

#[test]
fn rows_arrive_during_the_prompt() {
    let (database, folder) = people("DROP TABLE people");
    let mut runner = folder.runner_at(&database.url());
    let reverted = runner.revert(&Extent::All, |_| {
        query(
            &database,
            "INSERT INTO people SELECT 'c' FROM generate_series(1, 1000)",
        );
        true
    });
    assert_eq!(query(&database, CONTENTS), "1003|1002");
    let again = runner.revert(&Extent::All, |reversal| {
        assert_eq!(reversal.losses.as_ref().unwrap()[0].rows, 1003);
        true
    });
    assert_eq!(outcome(again).code, Some(0));
    Row {
        test: "rows_arrive_during_the_prompt",
        fault: "1,000 rows arrive between the question and the revert",
        reported: said(&outcome(reverted)),
        after: "unchanged, with the new rows".into(),
        then: "asks about all rows; with a yes: exit 0".into(),
    }
    .check();
}

#[test]
fn commit_in_down() {
    let (database, folder) = people("SELECT 1");
    let broken = Folder::new(&[("001_people", "SELECT 1", "DELETE FROM people;\nCOMMIT;")]);
    let mut runner = broken.runner_at(&database.url());
    let reverted = runner.revert(&Extent::All, |_| panic!("it asks"));
    assert_eq!(query(&database, CONTENTS), "3|2");
    let mended = folder
        .runner_at(&database.url())
        .revert(&Extent::All, |_| true);
    assert_eq!(outcome(mended).code, Some(0));
    Row {
        test: "commit_in_down",
        fault: "down.sql has COMMIT",
        reported: said(&outcome(reverted)),
        after: "unchanged".into(),
        then: "with the file corrected: exit 0".into(),
    }
    .check();
}

#[test]
fn commit_in_up() {
    let database = SERVER.create_database().unwrap();
    let first = (
        "001_first",
        "CREATE TABLE first (a int)",
        "DROP TABLE first",
    );
    let broken = Folder::new(&[first, ("002_second", "SELECT 1;\nCOMMIT;", "SELECT 1")]);
    let ran = broken.runner_at(&database.url()).run();
    assert_eq!(query(&database, "SELECT to_regclass('first') IS NULL"), "t");
    let mended = Folder::new(&[first, ("002_second", "SELECT 1", "SELECT 1")]);
    assert_eq!(
        outcome(mended.runner_at(&database.url()).run()).code,
        Some(0)
    );
    Row {
        test: "commit_in_up",
        fault: "up.sql of the second pending migration has COMMIT",
        reported: said(&outcome(ran)),
        after: "unchanged: the first is not applied either".into(),
        then: "with the file corrected: exit 0".into(),
    }
    .check();
}

#[test]
fn redo_whose_up_fails() {
    let (database, _) = people("SELECT 1");
    let broken = [("001_people", "SELECT nothing", "DELETE FROM people")];
    let redo = |folder: Folder| {
        folder
            .runner_at(&database.url())
            .redo(&Extent::All, |_| true)
    };
    let redone = redo(Folder::new(&broken));
    assert_eq!(query(&database, CONTENTS), "3|2");
    let mended = [("001_people", "SELECT 1", "DELETE FROM people")];
    assert_eq!(outcome(redo(Folder::new(&mended))).code, Some(0));
    Row {
        test: "redo_whose_up_fails",
        fault: "redo, and up.sql fails after down.sql has deleted rows",
        reported: said(&outcome(redone)),
        after: "unchanged".into(),
        then: "with the file corrected: exit 0".into(),
    }
    .check();
}
