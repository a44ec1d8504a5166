//! The monitor's sweeps.

use std::collections::HashSet;
use std::sync::Barrier;
use std::thread;

use bruhmcp_db::enums::{InstanceStatus, OauthStatus};
use bruhmcp_db::ids::InstanceId;
use bruhmcp_db::models::McpInstance;
use bruhmcp_db::schema::mcp_credentials;
use chrono::TimeDelta;
use diesel::connection::{AnsiTransactionManager, SimpleConnection, TransactionManager};
use diesel::pg::PgConnection;
use diesel::prelude::*;

use crate::concurrency::assert_counters_right;
use crate::fixtures::{authorize, create, create_pending, find, pro_user, sealed, service};
use crate::support::{self, TestDatabase};

const IDLE: TimeDelta = TimeDelta::minutes(5);

/// Lets every instance expire.
fn all_due(conn: &mut PgConnection) {
    conn.batch_execute("UPDATE mcp_service_table SET expires_at = now() - interval '1 second'")
        .unwrap();
}

/// Makes all credentials look unchanged for an hour, which only their owner can.
fn all_idle(database: &TestDatabase) {
    let sql = "ALTER TABLE mcp_credentials DISABLE TRIGGER USER;
         UPDATE mcp_credentials SET updated_at = now() - interval '1 hour';
         ALTER TABLE mcp_credentials ENABLE TRIGGER USER";
    database.psql(sql).unwrap();
}

fn ids(instances: &[McpInstance]) -> Vec<InstanceId> {
    let mut ids: Vec<_> = instances
        .iter()
        .map(|instance| instance.instance_id)
        .collect();
    ids.sort();
    ids
}

#[test]
fn due_instances_expire_once() {
    let database = support::database();
    let conn = &mut database.connect();
    let user = pro_user(conn);
    let (gmail, slack) = (service(conn, "gmail", 4001), service(conn, "slack", 4002));
    let mut due: Vec<_> = [gmail, gmail, gmail, slack]
        .map(|service| create(conn, user, service).unwrap())
        .into();
    McpInstance::deactivate(conn, due[0], user).unwrap();
    all_due(conn);
    let later = create(conn, user, gmail).unwrap();
    McpInstance::renew(conn, later, user, Some(chrono::Utc::now() + IDLE)).unwrap();
    let never = create(conn, user, gmail).unwrap();

    let mut expired = Vec::new();
    loop {
        let batch = McpInstance::expire_due(conn, 2).unwrap();
        if batch.is_empty() {
            break;
        }
        assert!(batch.len() <= 2);
        assert!(
            batch
                .iter()
                .all(|row| row.status == InstanceStatus::Expired)
        );
        expired.extend(ids(&batch));
    }
    due.sort();
    expired.sort();
    assert_eq!(expired, due);
    assert_eq!(find(conn, later).status, InstanceStatus::Active);
    assert_eq!(find(conn, never).status, InstanceStatus::Active);
}

/// All sixteen transactions are open at the same time, so nobody waits for another's lock.
#[test]
fn sixteen_sweepers_do_not_wait_for_each_other() {
    let database = support::database();
    let conn = &mut database.connect();
    let user = pro_user(conn);
    let services = [4001, 4002, 4003].map(|port| service(conn, &format!("s{port}"), port));
    let mut due: Vec<_> = (0..64)
        .map(|n| create(conn, user, services[n % 3]).unwrap())
        .collect();
    all_due(conn);

    let mut sweepers: Vec<_> = (0..16).map(|_| database.connect()).collect();
    let mut expired = Vec::new();
    for sweeper in &mut sweepers {
        sweeper.batch_execute("SET lock_timeout = '1s'").unwrap();
        AnsiTransactionManager::begin_transaction(sweeper).unwrap();
        let batch = ids(&McpInstance::expire_due(sweeper, 4).unwrap());
        assert_eq!(batch.len(), 4);
        expired.extend(batch);
    }
    assert_eq!(McpInstance::expire_due(conn, 4).unwrap(), []);
    for sweeper in &mut sweepers {
        AnsiTransactionManager::commit_transaction(sweeper).unwrap();
    }
    due.sort();
    expired.sort();
    assert_eq!(expired, due);
    assert_counters_right(&database);
}

#[test]
fn eight_sweepers_take_each_due_instance_once() {
    let database = support::database();
    let conn = &mut database.connect();
    let user = pro_user(conn);
    let services = [4001, 4002, 4003].map(|port| service(conn, &format!("s{port}"), port));
    let mut due: Vec<_> = (0..60)
        .map(|n| create(conn, user, services[n % 3]).unwrap())
        .collect();
    all_due(conn);

    let expired = support::at_once(&database, 8, |_, conn| {
        let mut expired = Vec::new();
        loop {
            let batch = McpInstance::expire_due(conn, 3).unwrap();
            if batch.is_empty() {
                return expired;
            }
            expired.extend(ids(&batch));
        }
    });
    let mut expired = expired.concat();
    // A sweeper that found only locked rows left them to others, which have committed.
    expired.extend(ids(&McpInstance::expire_due(conn, 60).unwrap()));
    due.sort();
    expired.sort();
    assert_eq!(expired, due);
}

#[test]
fn a_locked_instance_is_skipped() {
    let database = support::database();
    let (conn, other) = (&mut database.connect(), &mut database.connect());
    let user = pro_user(conn);
    let (gmail, slack) = (service(conn, "gmail", 4001), service(conn, "slack", 4002));
    let (free, locked) = (
        create(conn, user, gmail.max(slack)).unwrap(),
        create(conn, user, gmail.min(slack)).unwrap(),
    );
    all_due(conn);
    other
        .transaction(|other| {
            McpInstance::deactivate(other, locked, user)?;
            assert_eq!(ids(&McpInstance::expire_due(conn, 10)?), [free]);
            assert_eq!(McpInstance::expire_due(conn, 10)?, []);
            QueryResult::Ok(())
        })
        .unwrap();
    assert_eq!(ids(&McpInstance::expire_due(conn, 10).unwrap()), [locked]);
}

#[test]
fn abandoned_instances_are_listed_and_removed() {
    let database = support::database();
    let conn = &mut database.connect();
    let user = pro_user(conn);
    let gmail = service(conn, "gmail", 4001);
    let [pending, failed, completed, expired, again] =
        [(); 5].map(|()| create_pending(conn, user, gmail));
    authorize(conn, user, failed, OauthStatus::Failed).unwrap();
    authorize(conn, user, completed, OauthStatus::Completed).unwrap();
    authorize(conn, user, expired, OauthStatus::Expired).unwrap();
    // It was in use before. Its user must grant access again and may take any time.
    diesel::update(mcp_credentials::table)
        .filter(mcp_credentials::instance_id.eq(again))
        .set(mcp_credentials::access_token.eq(sealed()))
        .execute(conn)
        .unwrap();
    all_idle(&database);
    let fresh = create_pending(conn, user, gmail);

    let refused = McpInstance::list_abandoned(conn, -IDLE, 10).unwrap_err();
    assert!(bruhmcp_db::NegativeSpan::of(&refused).is_some());
    let refused = McpInstance::purge_abandoned(conn, &[], -IDLE).unwrap_err();
    assert!(bruhmcp_db::NegativeSpan::of(&refused).is_some());
    let listed = McpInstance::list_abandoned(conn, IDLE, 10).unwrap();
    let mut unauthorized = [pending, failed];
    unauthorized.sort();
    let in_order: Vec<_> = listed.iter().map(|row| row.instance_id).collect();
    assert_eq!(in_order, unauthorized, "of one time, by key");
    let first = McpInstance::list_abandoned(conn, IDLE, 1).unwrap();
    assert_eq!(first, listed[..1]);

    let all = [
        pending,
        failed,
        completed,
        expired,
        again,
        fresh,
        InstanceId::new(),
    ];
    let mut removed = McpInstance::purge_abandoned(conn, &all, IDLE).unwrap();
    removed.sort_by_key(|row| row.instance_id);
    assert_eq!(removed, listed);
    assert_eq!(McpInstance::list_abandoned(conn, IDLE, 10).unwrap(), []);
    for kept in [completed, expired, again, fresh] {
        find(conn, kept);
    }
    assert_eq!(McpInstance::purge_abandoned(conn, &[], IDLE).unwrap(), []);
}

#[test]
fn an_authorization_that_is_completing_is_not_lost() {
    let database = support::database();
    let (conn, callback) = (&mut database.connect(), &mut database.connect());
    let user = pro_user(conn);
    let gmail = service(conn, "gmail", 4001);
    let [completing, renamed, abandoned] = [(); 3].map(|()| create_pending(conn, user, gmail));
    all_idle(&database);
    let listed = ids(&McpInstance::list_abandoned(conn, IDLE, 10).unwrap());
    assert_eq!(listed.len(), 3);

    callback
        .transaction(|callback| {
            authorize(callback, user, completing, OauthStatus::Completed).unwrap();
            let version = find(callback, renamed).version;
            McpInstance::rename(callback, renamed, user, version, Some("Work")).unwrap();
            // The locked instances are skipped.
            let removed = McpInstance::purge_abandoned(conn, &listed, IDLE)?;
            assert_eq!(ids(&removed), [abandoned]);
            QueryResult::Ok(())
        })
        .unwrap();
    let removed = McpInstance::purge_abandoned(conn, &listed, IDLE).unwrap();
    assert_eq!(ids(&removed), [renamed]);
    assert_eq!(find(conn, completing).oauth_status, OauthStatus::Completed);
}

#[test]
fn an_authorization_and_its_removal_race_and_one_wins() {
    let database = support::database();
    let conn = &mut database.connect();
    let user = pro_user(conn);
    let gmail = service(conn, "gmail", 4001);
    let pending: Vec<_> = (0..100)
        .map(|_| create_pending(conn, user, gmail))
        .collect();
    all_idle(&database);

    let start = Barrier::new(3);
    let (completed, deleted, removed) = thread::scope(|scope| {
        let callbacks = scope.spawn(|| {
            let conn = &mut database.connect();
            start.wait();
            let done =
                |id: &&InstanceId| authorize(conn, user, **id, OauthStatus::Completed).unwrap();
            pending.iter().filter(done).copied().collect::<HashSet<_>>()
        });
        // The user's delete waits for the others, in the lock order.
        let owner = scope.spawn(|| {
            let conn = &mut database.connect();
            start.wait();
            let chosen = pending.iter().step_by(5);
            chosen
                .filter(|id| McpInstance::delete(conn, **id, user).unwrap())
                .copied()
                .collect::<HashSet<_>>()
        });
        let conn = &mut database.connect();
        start.wait();
        let removed: HashSet<_> = pending
            .rchunks(10)
            .flat_map(|ids| McpInstance::purge_abandoned(conn, ids, IDLE).unwrap())
            .map(|row| row.instance_id)
            .collect();
        (callbacks.join().unwrap(), owner.join().unwrap(), removed)
    });

    assert!(completed.is_disjoint(&removed));
    assert!(deleted.is_disjoint(&removed));
    for id in &pending {
        let exists = McpInstance::find(conn, *id).unwrap().is_some();
        assert_eq!(exists, !removed.contains(id) && !deleted.contains(id));
    }
    let left = completed.difference(&deleted).count();
    assert_eq!(
        McpInstance::count_active(conn, user).unwrap(),
        i64::try_from(left).unwrap()
    );
}
