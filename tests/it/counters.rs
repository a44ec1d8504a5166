//! The counters of `mcp_table`: right after every commit, with one update per service.

use bruhmcp_db::ids::{InstanceId, ServiceId, UserId};
use bruhmcp_db::is_transient;
use bruhmcp_db::models::{InstanceError, McpInstance, McpService};
use diesel::connection::SimpleConnection;
use diesel::dsl::{select, sql};
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::result::Error::RollbackTransaction;
use diesel::sql_types::BigInt;

use crate::concurrency::assert_counters_right;
use crate::fixtures::{create, create_pending, pro_user, service};
use crate::support::{self, TestDatabase};

/// A pro user and two services, in the order of their keys.
fn user_and_services() -> (TestDatabase, UserId, [ServiceId; 2]) {
    let database = support::database();
    let conn = &mut database.connect();
    let user = pro_user(conn);
    let mut services =
        [("gmail", 4001), ("slack", 4002)].map(|(name, port)| service(conn, name, port));
    services.sort();
    (database, user, services)
}

/// Ever created, and active.
fn counts(conn: &mut PgConnection, service: ServiceId) -> (i64, i64) {
    let service = McpService::find(conn, service).unwrap().unwrap();
    (
        service.total_instances_created,
        service.active_instances_count,
    )
}

/// The number of updates of `mcp_table` that this session has made lately.
fn updates(conn: &mut PgConnection) -> i64 {
    let of_table = "pg_stat_get_xact_tuples_updated('mcp_table'::regclass)";
    select(sql::<BigInt>(of_table)).get_result(conn).unwrap()
}

fn instances(conn: &mut PgConnection, user: UserId, service: ServiceId) -> Vec<InstanceId> {
    (0..3)
        .map(|_| create(conn, user, service).unwrap())
        .collect()
}

/// Runs `work` in a savepoint that is rolled back.
fn undo(conn: &mut PgConnection, work: impl Fn(&mut PgConnection)) {
    let undone = conn.transaction(|conn| {
        work(conn);
        QueryResult::<()>::Err(RollbackTransaction)
    });
    assert_eq!(undone, Err(RollbackTransaction));
}

#[test]
fn a_transaction_updates_each_service_once() {
    let (database, user, [a, b]) = user_and_services();
    let conn = &mut database.connect();
    conn.transaction(|conn| {
        let before = updates(conn);
        instances(conn, user, b);
        let of_a = instances(conn, user, a);
        create_pending(conn, user, a);
        McpInstance::deactivate(conn, of_a[0], user)?;
        McpInstance::delete(conn, of_a[1], user)?;
        assert_eq!(updates(conn) - before, 0);
        conn.batch_execute("SET CONSTRAINTS ALL IMMEDIATE")?;
        assert_eq!(updates(conn) - before, 2);
        assert_eq!((counts(conn, a), counts(conn, b)), ((4, 1), (3, 3)));
        // From here on each statement counts at once.
        McpInstance::deactivate(conn, of_a[2], user)?;
        assert_eq!(updates(conn) - before, 3);
        conn.batch_execute("SET CONSTRAINTS ALL DEFERRED")?;
        create(conn, user, a).unwrap();
        McpInstance::activate(conn, of_a[2], user).unwrap();
        assert_eq!(updates(conn) - before, 3);
        QueryResult::Ok(())
    })
    .unwrap();
    assert_eq!((counts(conn, a), counts(conn, b)), ((5, 2), (3, 3)));
    assert_counters_right(&database);
}

/// What was neither created nor switched in sum locks no service.
#[test]
fn an_instance_that_is_switched_off_and_on_updates_nothing() {
    let (database, user, [a, _]) = user_and_services();
    let conn = &mut database.connect();
    let instance = create(conn, user, a).unwrap();
    conn.transaction(|conn| {
        let before = updates(conn);
        McpInstance::deactivate(conn, instance, user)?;
        McpInstance::activate(conn, instance, user).unwrap();
        conn.batch_execute("SET CONSTRAINTS ALL IMMEDIATE")?;
        assert_eq!(updates(conn), before);
        QueryResult::Ok(())
    })
    .unwrap();
    assert_eq!(counts(conn, a), (1, 1));
}

#[test]
fn a_rollback_to_a_savepoint_counts_what_is_left() {
    let (database, user, [a, b]) = user_and_services();
    let conn = &mut database.connect();
    for level in ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"] {
        let (of_a, of_b) = (counts(conn, a), counts(conn, b));
        conn.transaction(|conn| {
            conn.batch_execute(&format!("SET TRANSACTION ISOLATION LEVEL {level}"))?;
            // Before anything is collected, after something is, and after it is counted.
            undo(conn, |conn| drop(instances(conn, user, a)));
            let kept = instances(conn, user, b);
            undo(conn, |conn| {
                McpInstance::deactivate(conn, kept[0], user).unwrap();
                instances(conn, user, a);
                conn.batch_execute("SET CONSTRAINTS ALL IMMEDIATE").unwrap();
                instances(conn, user, a);
            });
            conn.transaction(|conn| McpInstance::delete(conn, kept[1], user))?;
            conn.batch_execute("SET CONSTRAINTS ALL IMMEDIATE; SET CONSTRAINTS ALL DEFERRED")?;
            undo(conn, |conn| drop(instances(conn, user, b)));
            create(conn, user, a).unwrap();
            QueryResult::Ok(())
        })
        .unwrap();
        assert_eq!(counts(conn, a), (of_a.0 + 1, of_a.1 + 1), "{level}");
        assert_eq!(counts(conn, b), (of_b.0 + 3, of_b.1 + 2), "{level}");
        assert_counters_right(&database);
    }
}

/// A setting that a session brings along, and one that an aborted transaction left.
#[test]
fn another_transactions_counts_are_ignored() {
    let (database, user, [a, _]) = user_and_services();
    let conn = &mut database.connect();
    conn.batch_execute(&format!(
        "DO $$ BEGIN
             PERFORM set_config(
                 'bruhmcp.counts_' || 'mcp_service_table'::regclass::oid,
                 '{{\"1\": {{\"{a}\": [70, 70]}}}}', false
             );
         END $$"
    ))
    .unwrap();
    create(conn, user, a).unwrap();
    create(conn, user, a).unwrap();
    assert_eq!(counts(conn, a), (2, 2));
}

#[test]
fn raw_statements_are_counted() {
    let (database, user, [a, b]) = user_and_services();
    let sql = format!(
        "INSERT INTO mcp_service_table (user_id, mcp_service_id)
         SELECT '{user}', service FROM unnest('{{{a},{b}}}'::uuid[]) AS service,
                                       generate_series(1, 1000);
         INSERT INTO mcp_credentials (instance_id, api_key, oauth_status, oauth_completed_at)
         SELECT instance_id, decode(repeat('01', 40), 'hex'), 'completed', now()
           FROM mcp_service_table;
         UPDATE mcp_service_table SET status = 'inactive' WHERE mcp_service_id = '{b}';
         DELETE FROM mcp_service_table WHERE instance_id IN (
             SELECT instance_id FROM mcp_service_table WHERE mcp_service_id = '{a}' LIMIT 10)"
    );
    // Each statement alone, then all of them as one transaction.
    database.psql(&sql).unwrap();
    let conn = &mut database.connect();
    assert_eq!((counts(conn, a), counts(conn, b)), ((1000, 990), (1000, 0)));
    database.psql("TRUNCATE mcp_service_table CASCADE").unwrap();
    assert_eq!((counts(conn, a), counts(conn, b)), ((1000, 0), (1000, 0)));
    database.psql(&format!("BEGIN; {sql}; COMMIT")).unwrap();
    assert_eq!((counts(conn, a), counts(conn, b)), ((2000, 990), (2000, 0)));
}

/// Transactions that touch two services in opposite orders, at each isolation level.
#[test]
fn opposite_orders_run_into_no_deadlock() {
    let (database, _, [a, b]) = user_and_services();
    let conn = &mut database.connect();
    let users: Vec<UserId> = (0..8).map(|_| pro_user(conn)).collect();
    let rounds = 12;
    support::at_once(&database, users.len(), |n, conn| {
        let level = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"][n % 3];
        conn.batch_execute(&format!(
            "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL {level}"
        ))
        .unwrap();
        for round in 0..rounds {
            let services = if (n + round) % 2 == 0 { [a, b] } else { [b, a] };
            while let Err(error) = conn.transaction(|conn| {
                for service in services {
                    create(conn, users[n], service).map_err(|error| match error {
                        InstanceError::Database(error) => error,
                        other => panic!("{other}"),
                    })?;
                }
                QueryResult::Ok(())
            }) {
                assert!(is_transient(&error), "{error}");
            }
        }
    });
    let created = i64::try_from(users.len() * rounds).unwrap();
    for service in [a, b] {
        assert_eq!(counts(conn, service), (created, created));
    }
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    conn.batch_execute("SELECT pg_stat_clear_snapshot()")
        .unwrap();
    assert_eq!(database.psql(deadlocks).unwrap(), "0\n");
}
