//! What the server itself refuses, alike on each supported version.

use super::*;

#[test]
fn deadlock() {
    let database = SERVER.create_database().unwrap();
    let tables = (
        "001_tables",
        "CREATE TABLE one ();\nCREATE TABLE two ()",
        "DROP TABLE one, two",
    );
    let columns = (
        "002_columns",
        "ALTER TABLE one ADD a int;\nALTER TABLE two ADD a int",
        "ALTER TABLE one DROP a;\nALTER TABLE two DROP a",
    );
    assert_eq!(custom(&database, &Folder::new(&[tables])).code, Some(0));
    let folder = Folder::new(&[tables, columns]);
    // Time for the other session to close the circle, before the lock_timeout of 5 s.
    let patience = format!(
        "ALTER DATABASE {} SET deadlock_timeout = '3s'",
        database.name()
    );
    query(&database, &patience);
    let mut other = PgConnection::establish(&database.url()).unwrap();
    // The runner is the one that looks for a deadlock.
    other
        .batch_execute("SET deadlock_timeout = '1min'; BEGIN; LOCK TABLE two")
        .unwrap();
    let outcome = thread::scope(|scope| {
        let run = scope.spawn(|| custom(&database, &folder));
        until("a runner waiting for the table", || {
            let waiting =
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'two'::regclass";
            query(&database, waiting) == "1"
        });
        other.batch_execute("LOCK TABLE one").unwrap();
        run.join().unwrap()
    });
    let columns = "SELECT count(*) FROM pg_attribute WHERE attname = 'a' AND attrelid IN ('one'::regclass, 'two'::regclass)";
    assert_eq!(query(&database, columns), "0");
    drop(other);
    assert_eq!(custom(&database, &folder).code, Some(0));
    assert_eq!(query(&database, columns), "2");
    Row {
        test: "deadlock",
        fault: "a deadlock with another session",
        reported: said(&outcome),
        after: "applied to 001".into(),
        then: "exit 0, complete".into(),
    }
    .check();
}
