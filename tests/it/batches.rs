//! Calls counted many at a time, and the buffer that collects them.

use std::num::NonZeroUsize;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use bruhmcp_db::ids::InstanceId;
use bruhmcp_db::models::{InstanceCalls, McpInstance};
use bruhmcp_db::schema::mcp_service_table;
use bruhmcp_db::{Buffer, BufferLimits, Durability};
use chrono::{TimeDelta, Utc};
use diesel::connection::SimpleConnection;
use diesel::dsl::sql;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::result::Error;
use diesel::sql_types::Text;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::fixtures::{create, create_inactive, find, pro_user, service};
use crate::support::{at_once, database};

/// A user with `count` instances of one service.
fn instances(conn: &mut PgConnection, count: usize) -> Vec<InstanceId> {
    let user = pro_user(conn);
    let figma = service(conn, "figma", 1);
    (0..count)
        .map(|_| create(conn, user, figma).unwrap())
        .collect()
}

fn counts(conn: &mut PgConnection, ids: &[InstanceId]) -> Vec<i64> {
    ids.iter().map(|id| find(conn, *id).usage_count).collect()
}

fn calls(instance_id: InstanceId, calls: u32) -> InstanceCalls {
    InstanceCalls {
        calls,
        ..InstanceCalls::one(instance_id)
    }
}

fn limits(batch: usize, interval: Duration, capacity: usize) -> BufferLimits {
    BufferLimits {
        batch: NonZeroUsize::new(batch).unwrap(),
        interval,
        capacity: NonZeroUsize::new(capacity).unwrap(),
    }
}

const HOUR: Duration = Duration::from_secs(3_600);

#[test]
fn calls_of_many_instances_are_counted() {
    let database = database();
    let conn = &mut database.connect();
    let ids = instances(conn, 3);
    let before = find(conn, ids[0]);
    let given = [
        calls(ids[0], 2),
        calls(ids[1], 1),
        calls(ids[0], 3),
        calls(ids[2], 0),
        // Deleted meanwhile.
        calls(InstanceId::new(), 7),
    ];
    for durability in [Durability::Synced, Durability::Unsynced] {
        let locked = McpInstance::record_calls(conn, &given, durability).unwrap();
        assert_eq!(locked, []);
    }
    assert_eq!(counts(conn, &ids), [10, 2, 0]);
    let after = find(conn, ids[0]);
    assert_eq!(
        (after.version, after.last_modified),
        (before.version, before.last_modified)
    );
    assert!(after.last_used_at.unwrap() >= given[2].last_used_at - TimeDelta::microseconds(1));
}

#[test]
fn nothing_is_a_batch_too() {
    let database = database();
    let conn = &mut database.connect();
    assert_eq!(
        McpInstance::record_calls(conn, &[], Durability::Unsynced).unwrap(),
        []
    );
}

#[test]
fn the_last_use_never_goes_back_nor_into_the_future() {
    let database = database();
    let conn = &mut database.connect();
    let id = instances(conn, 1)[0];
    let mut last_use = |at| {
        let call = InstanceCalls {
            last_used_at: at,
            ..InstanceCalls::one(id)
        };
        McpInstance::record_calls(conn, &[call], Durability::Synced).unwrap();
        find(conn, id).last_used_at.unwrap()
    };
    let first = last_use(Utc::now() - TimeDelta::minutes(1));
    assert!(first < Utc::now() - TimeDelta::seconds(59));
    assert_eq!(last_use(Utc::now() - TimeDelta::hours(1)), first);
    let now = last_use(chrono::DateTime::<Utc>::MAX_UTC - TimeDelta::days(1));
    assert!(now > first && now < Utc::now() + TimeDelta::minutes(1));
}

#[test]
fn calls_count_whatever_the_state_is_by_now() {
    let database = database();
    let conn = &mut database.connect();
    let user = pro_user(conn);
    let figma = service(conn, "figma", 1);
    let id = create_inactive(conn, user, figma);
    McpInstance::record_calls(conn, &[calls(id, 2)], Durability::Synced).unwrap();
    assert_eq!(find(conn, id).usage_count, 2);
}

#[test]
fn locked_instances_are_given_back_and_nobody_waits() {
    let database = database();
    let conn = &mut database.connect();
    let ids = instances(conn, 3);
    let given = [calls(ids[0], 1), calls(ids[1], 2), calls(ids[1], 3)];
    let locked = database
        .connect()
        .transaction::<_, Error, _>(|other| {
            mcp_service_table::table
                .find(ids[1])
                .select(mcp_service_table::instance_id)
                .for_no_key_update()
                .first::<InstanceId>(other)?;
            McpInstance::record_calls(conn, &given, Durability::Synced)
        })
        .unwrap();
    assert_eq!(locked, given[1..]);
    assert_eq!(counts(conn, &ids), [1, 0, 0]);
    assert_eq!(
        McpInstance::record_calls(conn, &locked, Durability::Synced).unwrap(),
        []
    );
    assert_eq!(counts(conn, &ids), [1, 5, 0]);
}

#[test]
fn an_unsynced_batch_leaves_the_session_as_it_was() {
    let database = database();
    let conn = &mut database.connect();
    let ids = instances(conn, 1);
    let setting = sql::<Text>("current_setting('synchronous_commit')");
    let unsynced = |conn: &mut PgConnection| {
        McpInstance::record_calls(conn, &[calls(ids[0], 1)], Durability::Unsynced)
    };
    assert_eq!(unsynced(conn), Ok(vec![]));
    let after: String = diesel::select(setting).get_result(conn).unwrap();
    assert_eq!(after, "on");
    // The other writes of the transaction would be lost as well.
    let within = conn.transaction(|conn| unsynced(conn));
    assert_eq!(within, Err(Error::AlreadyInTransaction));
    assert_eq!(counts(conn, &ids), [1]);
}

/// Batches in opposite orders, beside single calls and deletions.
#[test]
fn batches_deadlock_with_nobody_and_lose_nothing() {
    let database = database();
    let conn = &mut database.connect();
    let ids = instances(conn, 20);
    at_once(&database, 6, |number, conn| {
        let mut ids = ids.clone();
        if number % 2 == 1 {
            ids.reverse();
        }
        for round in 0..20 {
            if number < 4 {
                let mut waiting: Vec<_> = ids.iter().map(|id| calls(*id, 1)).collect();
                while !waiting.is_empty() {
                    waiting =
                        McpInstance::record_calls(conn, &waiting, Durability::Unsynced).unwrap();
                }
            } else {
                McpInstance::record_call(conn, ids[round], None)
                    .unwrap()
                    .unwrap();
            }
        }
    });
    assert_eq!(counts(conn, &ids), [4 * 20 + 2; 20]);
}

/// Batches of random entries count what a sum counts.
#[test]
fn a_batch_counts_the_sum_of_its_entries() {
    let database = database();
    let conn = &mut database.connect();
    let ids = instances(conn, 5);
    let mut expected = vec![0_i64; ids.len()];
    let entries = prop::collection::vec((0..ids.len(), any::<u32>()), 0..40);
    let config = Config {
        cases: 40,
        failure_persistence: None,
        ..Config::default()
    };
    let conn = std::cell::RefCell::new(conn);
    let expected = std::cell::RefCell::new(&mut expected);
    TestRunner::new(config)
        .run(&entries, |entries| {
            let (conn, expected) = (&mut **conn.borrow_mut(), &mut **expected.borrow_mut());
            let given: Vec<_> = entries
                .iter()
                .map(|(n, count)| calls(ids[*n], *count))
                .collect();
            McpInstance::record_calls(conn, &given, Durability::Synced).unwrap();
            for (n, count) in entries {
                expected[n] += i64::from(count);
            }
            prop_assert_eq!(&counts(conn, &ids), &*expected);
            Ok(())
        })
        .unwrap();
}

/// A buffer whose batches are sent to the test.
fn reporting(limits: BufferLimits) -> (Buffer<u32>, mpsc::Receiver<Vec<u32>>) {
    let (sender, batches) = mpsc::channel();
    let buffer = Buffer::start(limits, move |rows| {
        sender.send(rows).unwrap();
        Vec::new()
    });
    (buffer.unwrap(), batches)
}

#[test]
fn a_full_batch_is_flushed_at_once() {
    let (buffer, batches) = reporting(limits(3, HOUR, 100));
    for row in 0..3 {
        buffer.push(row).unwrap();
    }
    assert_eq!(batches.recv().unwrap(), [0, 1, 2]);
}

#[test]
fn a_row_waits_for_an_interval_at_most() {
    let (buffer, batches) = reporting(limits(1_000, Duration::from_millis(10), 1_000));
    buffer.push(1).unwrap();
    assert_eq!(batches.recv().unwrap(), [1]);
    buffer.push(2).unwrap();
    assert_eq!(batches.recv().unwrap(), [2]);
}

#[test]
fn dropping_a_buffer_flushes_the_rest() {
    let (buffer, batches) = reporting(limits(1_000, HOUR, 1_000));
    for row in 0..5 {
        buffer.push(row).unwrap();
    }
    drop(buffer);
    assert_eq!(
        batches.iter().flatten().collect::<Vec<_>>(),
        [0, 1, 2, 3, 4]
    );
}

#[test]
fn rows_that_are_refused_come_again_first() {
    let (sender, batches) = mpsc::channel();
    let mut refuse = true;
    let buffer = Buffer::start(
        limits(2, Duration::from_millis(10), 100),
        move |rows: Vec<u32>| {
            sender.send(rows.clone()).unwrap();
            if std::mem::take(&mut refuse) {
                rows
            } else {
                Vec::new()
            }
        },
    )
    .unwrap();
    buffer.push(1).unwrap();
    buffer.push(2).unwrap();
    assert_eq!(batches.recv().unwrap()[0], 1);
    buffer.push(3).unwrap();
    drop(buffer);
    let rest: Vec<_> = batches.iter().flatten().collect();
    // The first batch may have had one row or both.
    let again = rest.iter().position(|row| *row == 1).unwrap();
    assert!(rest[again..].contains(&2) && rest.contains(&3), "{rest:?}");
}

/// The flusher is held in its function, so nothing leaves the buffer meanwhile.
#[test]
fn a_full_buffer_gives_the_row_back() {
    let (entered, started) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let buffer = Buffer::start(limits(1, HOUR, 3), move |rows: Vec<u32>| {
        entered.send(rows.len()).unwrap();
        let _ = released.recv();
        Vec::new()
    })
    .unwrap();
    buffer.push(1).unwrap();
    assert_eq!(started.recv().unwrap(), 1);
    buffer.push(2).unwrap();
    buffer.push(3).unwrap();
    assert_eq!(buffer.push(4), Err(4));
    drop(release);
    drop(buffer);
    assert_eq!(started.iter().sum::<usize>(), 2);
}

#[test]
fn a_buffer_whose_function_panicked_takes_no_rows() {
    let buffer = Buffer::start(limits(1, HOUR, 100), |rows: Vec<u32>| -> Vec<u32> {
        std::panic::resume_unwind(Box::new(rows.len()))
    })
    .unwrap();
    buffer.push(1).unwrap();
    while buffer.push(2).is_ok() {
        thread::yield_now();
    }
}

#[test]
fn a_buffer_gives_up_rows_that_nobody_takes() {
    let offered = Arc::new(Mutex::new(0));
    let buffer = Buffer::start(limits(1_000, HOUR, 1_000), {
        let offered = Arc::clone(&offered);
        move |rows: Vec<u32>| {
            *offered.lock().unwrap() += 1;
            rows
        }
    })
    .unwrap();
    buffer.push(1).unwrap();
    drop(buffer);
    assert_eq!(*offered.lock().unwrap(), 10);
}

/// Threads push while the server closes the flusher's connection again and again.
#[test]
fn a_buffer_counts_every_call_across_lost_connections() {
    let database = Arc::new(database());
    let conn = &mut database.connect_as_owner();
    let ids = instances(conn, 4);
    let buffer = Buffer::start(limits(50, Duration::from_millis(5), 100_000), {
        let database = Arc::clone(&database);
        let mut conn = database.connect();
        move |calls: Vec<InstanceCalls>| match McpInstance::record_calls(
            &mut conn,
            &calls,
            Durability::Synced,
        ) {
            Ok(locked) => locked,
            Err(_) => {
                // The new connection may be closed too.
                if let Ok(new) = PgConnection::establish(&database.app_url()) {
                    conn = new;
                }
                calls
            }
        }
    })
    .unwrap();
    thread::scope(|scope| {
        for id in &ids {
            scope.spawn(|| {
                for _ in 0..2_000 {
                    buffer.push(InstanceCalls::one(*id)).unwrap();
                }
            });
        }
        for _ in 0..20 {
            conn.batch_execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                  WHERE datname = current_database() AND pid <> pg_backend_pid() AND state = 'idle'",
            )
            .unwrap();
        }
    });
    drop(buffer);
    // A statement is interrupted before its commit or not at all, so none is counted twice.
    assert_eq!(counts(conn, &ids), [2_000; 4]);
}
