//! What `tracing` is told: slow statements and the events of the runner, and no bound value.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bruhmcp_db::models::{NewUser, User};
use bruhmcp_db::{SlowStatements, migrations};
use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel::sql_types::Text;
use tracing_subscriber::fmt;

use crate::locks::each_operation;
use crate::support::{database, empty_database};
use crate::users::HASH;

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns what `work` tells `tracing` in this thread.
fn told(work: impl FnOnce()) -> String {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = fmt().with_writer(move || writer.clone()).finish();
    tracing::subscriber::with_default(subscriber, work);
    let lines = lines.0.lock().unwrap().clone();
    String::from_utf8(lines).unwrap()
}

#[test]
fn a_slow_statement_is_told_without_its_values() {
    let database = database();
    let conn = &mut database.connect();
    conn.set_instrumentation(SlowStatements::new(Duration::from_millis(100)));
    let told = told(|| {
        diesel::sql_query("SELECT pg_sleep(0.2), $1::text")
            .bind::<Text, _>("whisper -- binds: whisper")
            .execute(conn)
            .unwrap();
        diesel::sql_query("SELECT $1::text")
            .bind::<Text, _>("quick")
            .execute(conn)
            .unwrap();
        conn.batch_execute("SELECT pg_sleep(0.2), 'whisper'")
            .unwrap();
    });
    let lines: Vec<&str> = told.lines().collect();
    let [statement, batch] = lines[..] else {
        panic!("{told}")
    };
    assert!(statement.contains("WARN"), "{told}");
    assert!(
        statement.contains(r#"statement="SELECT pg_sleep(0.2), $1::text" duration_ms=2"#),
        "{told}"
    );
    assert!(
        batch.contains(r#"statement="SELECT" duration_ms=2"#),
        "{told}"
    );
    assert!(!told.contains("whisper"), "{told}");
}

/// With a threshold of zero each statement is slow.
#[test]
fn no_operation_tells_a_value() {
    each_operation(|operation, conn| {
        conn.set_instrumentation(SlowStatements::new(Duration::ZERO));
        let told = told(|| operation.succeed(conn));
        assert!(told.contains("statement="), "{}", operation.name);
        for value in ["-- binds", HASH, "token_1", "example", "[0, "] {
            assert!(!told.contains(value), "{}: {told}", operation.name);
        }
    });
}

#[test]
fn a_failed_statement_is_told_without_its_values() {
    let database = database();
    let conn = &mut database.connect();
    let sign_up = |conn: &mut PgConnection, email| {
        let new = NewUser {
            razorpay_customer_id: Some("whisper"),
            ..NewUser::new("whisper", "", email)
        };
        User::sign_up(conn, &new)
    };
    sign_up(conn, "asha@example.in").unwrap();
    conn.set_instrumentation(SlowStatements::new(Duration::ZERO));
    let told = told(|| {
        sign_up(conn, "ravi@example.in").unwrap_err();
    });
    assert!(told.contains("failed=true"), "{told}");
    assert!(!told.contains("whisper"), "{told}");
}

#[test]
fn the_runner_tells_what_it_does() {
    let database = empty_database();
    let told = told(|| {
        migrations::runner(&database.url()).unwrap().run().unwrap();
    });
    let first = "001_microsaas_auth";
    assert!(
        told.contains(&format!("started migration=\"{first}\" direction=up")),
        "{told}"
    );
    let finished = format!("finished migration=\"{first}\" direction=up duration_ms=");
    assert!(told.contains(&finished), "{told}");
}
