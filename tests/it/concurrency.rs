//! Many connections at once: the plan's limit, the lock order, the counters.

use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::thread;

use bruhmcp_db::enums::{OauthStatus, PlanPaymentStatus};
use bruhmcp_db::ids::{InstanceId, ServiceId, UserId};
use bruhmcp_db::models::{
    InstanceError, InstanceFilter, McpCredential, McpInstance, NewMcpInstance, OauthTokens, User,
    UserPlan,
};
use bruhmcp_db::{
    ConstraintViolation, Isolation, Page, StateDigest, is_transient, retry_transaction,
};
use bruhmcp_devdb::Server;
use chrono::{TimeDelta, Utc};
use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::result::{DatabaseErrorKind, Error::DatabaseError};
use uuid::Uuid;

use crate::fixtures::{
    authorize, create, create_inactive, create_pending, find, oauth, pro_user, sealed, service,
    upgrade, user,
};
use crate::support::{self, TestDatabase};

pub(crate) const ISOLATIONS: [Isolation; 3] = [
    Isolation::ReadCommitted,
    Isolation::RepeatableRead,
    Isolation::Serializable,
];

/// 32 connections each try to activate an instance of one free user: one succeeds, the others get
/// `LimitReached`. Two users for each isolation level.
fn one_of_32_succeeds<T: Sync>(
    prepare: impl Fn(&mut PgConnection, UserId, ServiceId) -> T,
    attempt: impl Fn(&mut PgConnection, UserId, ServiceId, &T, usize) -> Result<(), InstanceError>
    + Sync,
) {
    let database = support::database();
    let conn = &mut database.connect();
    let gmail = service(conn, "gmail", 4001);
    for isolation in ISOLATIONS {
        for _ in 0..2 {
            let user = user(conn);
            let prepared = prepare(conn, user, gmail);
            let outcomes = support::at_once(&database, 32, |n, conn| {
                retry_transaction(conn, isolation, |conn| {
                    attempt(conn, user, gmail, &prepared, n)
                })
            });
            let refused = outcomes
                .iter()
                .filter(|outcome| matches!(outcome, Err(InstanceError::LimitReached)));
            assert_eq!(refused.count(), 31, "{isolation:?}: {outcomes:?}");
            assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
            assert_eq!(McpInstance::count_active(conn, user).unwrap(), 1);
        }
    }
    assert_counters_right(&database);
}

#[test]
pub(crate) fn of_32_creates_one_succeeds() {
    one_of_32_succeeds(
        |_, _, _| (),
        |conn, user, service, (), _| create(conn, user, service).map(drop),
    );
}

#[test]
pub(crate) fn of_32_activations_one_succeeds() {
    one_of_32_succeeds(
        |conn, user, service| [(); 32].map(|()| create_inactive(conn, user, service)),
        |conn, user, _, ids, n| McpInstance::activate(conn, ids[n], user).map(drop),
    );
}

#[test]
pub(crate) fn of_32_authorizations_one_succeeds() {
    one_of_32_succeeds(
        |conn, user, service| [(); 32].map(|()| create_pending(conn, user, service)),
        |conn, user, _, ids, n| authorize(conn, user, ids[n], OauthStatus::Completed).map(drop),
    );
}

/// Compares the registry's counters with a recount.
pub(crate) fn assert_counters_right(database: &TestDatabase) {
    let wrong = "SELECT mcp_service_name, active_instances_count, count(instance_id)
                   FROM mcp_table
                   LEFT JOIN mcp_service_table AS i
                          ON i.mcp_service_id = mcp_table.mcp_service_id
                         AND status = 'active' AND oauth_status = 'completed'
                  GROUP BY mcp_table.mcp_service_id
                 HAVING active_instances_count <> count(instance_id)";
    assert_eq!(database.psql(wrong).unwrap(), "");
}

/// Starts `late` beside a transaction that has run `early`, which commits once `late` waits for it or
/// has ended. Returns what became of `late`, whose snapshot is older than that commit.
fn beside_uncommitted(
    database: &TestDatabase,
    isolation: Isolation,
    early: &str,
    late: &str,
) -> QueryResult<()> {
    let level = match isolation {
        Isolation::ReadCommitted => "READ COMMITTED",
        Isolation::RepeatableRead => "REPEATABLE READ",
        Isolation::Serializable => "SERIALIZABLE",
    };
    let begin = format!("BEGIN ISOLATION LEVEL {level}; SELECT FROM users LIMIT 1");
    let (first, second) = (
        &mut database.connect_as_owner(),
        &mut database.connect_as_owner(),
    );
    first.batch_execute(&begin).unwrap();
    first.batch_execute(early).unwrap();
    second.batch_execute(&begin).unwrap();
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let running = scope.spawn(|| {
            let outcome = second.batch_execute(late);
            ended.store(true, Ordering::Release);
            let end = if outcome.is_ok() {
                "COMMIT"
            } else {
                "ROLLBACK"
            };
            outcome.and(second.batch_execute(end))
        });
        let waits = "SELECT count(*) FROM pg_stat_activity
                      WHERE datname = current_database() AND wait_event_type = 'Lock'";
        while !ended.load(Ordering::Acquire) && database.psql(waits).unwrap() == "0\n" {
            thread::yield_now();
        }
        first.batch_execute("COMMIT").unwrap();
        running.join().unwrap()
    })
}

/// The instances whose copy of the status differs from their credentials'.
fn unsynced(database: &TestDatabase) -> String {
    let sql = "SELECT i.oauth_status, c.oauth_status
                 FROM mcp_service_table AS i LEFT JOIN mcp_credentials AS c USING (instance_id)
                WHERE i.oauth_status <> coalesce(c.oauth_status, 'pending')";
    database.psql(sql).unwrap()
}

#[test]
pub(crate) fn the_copy_of_the_status_follows_at_each_isolation_level() {
    let database = support::database();
    let conn = &mut database.connect();
    let user = pro_user(conn);
    let gmail = service(conn, "gmail", 4001);
    for isolation in ISOLATIONS {
        let id = create(conn, user, gmail).unwrap();
        let delete = format!("DELETE FROM mcp_credentials WHERE instance_id = '{id}'");
        let [pending, completed] = ["'pending', NULL", "'completed', now()"].map(|status| {
            format!(
                "INSERT INTO mcp_credentials
                     (instance_id, api_key, oauth_status, oauth_completed_at)
                 VALUES ('{id}', decode(repeat('01', 40), 'hex'), {status})"
            )
        });
        let [complete, fail] = ["completed", "failed"].map(|status| {
            format!(
                "UPDATE mcp_service_table SET oauth_status = '{status}' WHERE instance_id = '{id}'"
            )
        });
        database.psql(&delete).unwrap();
        for (early, late) in [
            (&pending, &complete),
            (&delete, &fail),
            (&completed, &fail),
            // Other credentials take the place of those that are being deleted.
            (&delete, &completed),
            (&delete, &pending),
        ] {
            let outcome = beside_uncommitted(&database, isolation, early, late);
            let case = format!("{isolation:?}: {early}, {late}: {outcome:?}");
            assert_eq!(unsynced(&database), "", "{case}");
            let rule = "mcp_service_table_oauth_status_synced";
            match outcome {
                Ok(()) => assert!(late.starts_with("INSERT"), "{case}"),
                Err(error) => assert!(
                    ConstraintViolation::of(&error).is_some_and(|violated| violated.is(rule))
                        || (is_transient(&error) && isolation != Isolation::ReadCommitted),
                    "{case}"
                ),
            }
        }
    }
    assert_counters_right(&database);
}

/// Whoever comes first: an anonymised user has no instance.
#[test]
fn an_anonymised_user_gets_no_instance() {
    let database = support::database();
    let conn = &mut database.connect();
    let gmail = service(conn, "gmail", 4001);
    for isolation in ISOLATIONS {
        for _ in 0..10 {
            let id = user(conn);
            let created = support::at_once(&database, 4, |n, conn| {
                retry_transaction(conn, isolation, |conn| match n {
                    0 => User::anonymise(conn, id).map(drop).map_err(Into::into),
                    1 => create(conn, id, gmail).map(drop),
                    _ => {
                        let new = NewMcpInstance::new(id, gmail);
                        McpInstance::create(conn, &new, &oauth(new.instance_id)).map(drop)
                    }
                })
            });
            for outcome in &created[1..] {
                assert!(
                    matches!(outcome, Ok(()) | Err(InstanceError::UserInactive)),
                    "{isolation:?}: {outcome:?}"
                );
            }
            assert!(created[0].is_ok(), "{isolation:?}: {created:?}");
            assert_eq!(instances(conn, id).unwrap(), [], "{isolation:?}");
        }
    }
    assert_counters_right(&database);
}

/// A small random number generator (Knuth's LCG). The same seed gives the same numbers.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self, sides: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % sides
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> Option<T> {
        (!of.is_empty()).then(|| of[self.roll(of.len())])
    }
}

const THREADS: usize = 8;
const OPERATIONS: usize = 125;

struct World {
    users: Vec<UserId>,
    services: [ServiceId; 3],
    /// Instances created, refused ones not counted.
    created: AtomicI64,
    /// Threads that are not finished yet.
    at_work: AtomicUsize,
}

impl World {
    /// One operation on a random user's instance.
    fn operate(&self, conn: &mut PgConnection, dice: &mut Dice) -> QueryResult<()> {
        let user = self.users[dice.roll(self.users.len())];
        let service = self.services[dice.roll(self.services.len())];
        let instances = instances(conn, user)?;
        let Some(instance) = dice.pick(&instances) else {
            return self.create(conn, user, service);
        };
        if dice.roll(17) == 0 {
            let (_, other, _) = instances[dice.roll(instances.len())];
            return refused(McpInstance::swap(conn, user, instance.1, other));
        }
        self.operate_on(conn, dice, user, (service, instance.1, instance.2))
    }

    /// Three operations on a user's instances in one transaction, which begins with the user's
    /// lock.
    fn compose(&self, conn: &mut PgConnection, dice: &mut Dice) -> QueryResult<()> {
        let user = self.users[dice.roll(self.users.len())];
        conn.transaction(|conn| {
            User::lock(conn, user)?;
            let instances = instances(conn, user)?;
            let chosen: Vec<_> = (0..3).filter_map(|_| dice.pick(&instances)).collect();
            chosen.into_iter().try_for_each(|instance| {
                self.operate_on(conn, dice, user, instance)?;
                // Other work, so that operations overlap.
                conn.batch_execute("SELECT pg_sleep(0.002)")
            })
        })
    }

    /// One operation that touches instances of this service only.
    fn operate_on(
        &self,
        conn: &mut PgConnection,
        dice: &mut Dice,
        user: UserId,
        (service, id, version): (ServiceId, InstanceId, i32),
    ) -> QueryResult<()> {
        let operation = dice.roll(17);
        let credential = if operation > 10 {
            McpCredential::find_by_instance(conn, id)?
        } else {
            None
        };
        match (operation, credential) {
            (0 | 1, _) => self.create(conn, user, service),
            (2, _) => {
                create_pending(conn, user, service);
                self.created.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            (3, _) => refused(authorize(conn, user, id, OauthStatus::Completed)),
            (4, _) => refused(authorize(conn, user, id, OauthStatus::Failed)),
            (5, _) => refused(McpInstance::activate(conn, id, user)),
            (6, _) => McpInstance::deactivate(conn, id, user).map(drop),
            (7, _) => McpInstance::delete(conn, id, user).map(drop),
            (8, _) => {
                // Soon due, for the sweeper.
                let end = Utc::now() + TimeDelta::milliseconds(20);
                refused(McpInstance::renew(conn, id, user, Some(end)))
            }
            (9, _) => refused(McpInstance::rename(conn, id, user, version, Some("Work"))),
            (10, _) => McpInstance::record_call(conn, id, None).map(drop),
            (_, None) => Ok(()),
            (11 | 12, Some(row)) => {
                let mut state = [0; 32];
                state[..16].copy_from_slice(Uuid::new_v4().as_bytes());
                refused(McpCredential::begin_oauth(
                    conn,
                    row.credential_id,
                    &StateDigest::new(state),
                    McpCredential::STATE_LIFETIME,
                    &sealed(),
                    None,
                ))
            }
            (13, Some(row)) => {
                let done = McpCredential::complete_oauth(conn, row.credential_id, &tokens());
                refused(done)
            }
            (14, Some(row)) => refused(McpCredential::fail_oauth(conn, row.credential_id)),
            (15, Some(row)) => {
                let id = row.credential_id;
                refused(McpCredential::replace_api_key(
                    conn,
                    id,
                    row.version,
                    &sealed(),
                ))
            }
            (_, Some(row)) => {
                let id = row.credential_id;
                refused(McpCredential::replace_client(
                    conn,
                    id,
                    row.version,
                    "client",
                    &sealed(),
                ))
            }
        }
    }

    fn create(&self, conn: &mut PgConnection, user: UserId, service: ServiceId) -> QueryResult<()> {
        let created = create(conn, user, service);
        self.created
            .fetch_add(i64::from(created.is_ok()), Ordering::Relaxed);
        refused(created)
    }

    /// Upgrades and downgrades until the operations end.
    fn change_plans(&self, conn: &mut PgConnection, dice: &mut Dice) -> QueryResult<()> {
        while self.at_work.load(Ordering::Acquire) > 0 {
            let user = self.users[dice.roll(self.users.len())];
            if dice.roll(3) > 0 {
                let end = Utc::now() + TimeDelta::milliseconds(50);
                upgrade(conn, user, (dice.roll(4) == 0).then_some(end));
            } else {
                UserPlan::downgrade(conn, user, PlanPaymentStatus::Cancelled)?;
            }
        }
        Ok(())
    }

    /// Sweeps until the operations end.
    fn monitor(&self, conn: &mut PgConnection) -> QueryResult<()> {
        while self.at_work.load(Ordering::Acquire) > 0 {
            McpInstance::expire_due(conn, 10)?;
            UserPlan::expire_due(conn)?;
            let idle = TimeDelta::milliseconds(20);
            let abandoned: Vec<InstanceId> = McpInstance::list_abandoned(conn, idle, 3)?
                .iter()
                .map(|instance| instance.instance_id)
                .collect();
            McpInstance::purge_abandoned(conn, &abandoned, idle)?;
        }
        Ok(())
    }

    /// Refreshes tokens until the operations end.
    fn refresh(&self, conn: &mut PgConnection, dice: &mut Dice) -> QueryResult<()> {
        while self.at_work.load(Ordering::Acquire) > 0 {
            let due = Utc::now() + TimeDelta::hours(1);
            for claimed in McpCredential::claim_due(conn, due, TimeDelta::seconds(1), 1)? {
                match dice.roll(3) {
                    0 => refused(McpCredential::refresh_refused(conn, &claimed))?,
                    1 => {
                        let pause = TimeDelta::zero();
                        McpCredential::refresh_failed(conn, &claimed, "network", None, pause)
                            .map(drop)?;
                    }
                    _ => refused(McpCredential::store_refreshed(conn, &claimed, &tokens()))?,
                }
            }
        }
        Ok(())
    }
}

/// A user's newest instances: service, key and version. Few, so that operations meet.
fn instances(
    conn: &mut PgConnection,
    user: UserId,
) -> QueryResult<Vec<(ServiceId, InstanceId, i32)>> {
    let all = InstanceFilter::default();
    let listed = McpInstance::list_by_user(conn, user, all, Page::first(3))?;
    let keys = listed.into_iter().map(|details| {
        let row = details.instance;
        (row.mcp_service_id, row.instance_id, row.version)
    });
    Ok(keys.collect())
}

/// Tokens that are due for a refresh at once.
fn tokens() -> OauthTokens<'static> {
    OauthTokens {
        access_token: sealed(),
        refresh_token: Some(sealed()),
        expires_at: Some(Utc::now()),
        scope: None,
    }
}

/// A refusal is fine. An error of the database, which only `Database` has as its source, is not.
fn refused<T, E: Error + Send + Sync + 'static>(outcome: Result<T, E>) -> QueryResult<()> {
    match outcome {
        Err(error) if error.source().is_some() => {
            Err(diesel::result::Error::QueryBuilderError(error.into()))
        }
        _ => Ok(()),
    }
}

#[test]
fn a_thousand_mixed_operations_do_not_deadlock() {
    let database = support::database();
    let conn = &mut database.connect();
    let world = World {
        users: (0..6).map(|_| pro_user(conn)).collect(),
        services: [4001, 4002, 4003].map(|port| service(conn, &format!("s{port}"), port)),
        created: AtomicI64::new(0),
        at_work: AtomicUsize::new(THREADS),
    };
    support::at_once(&database, THREADS + 6, |n, conn| {
        let dice = &mut Dice(u64::try_from(n).unwrap());
        match n.checked_sub(THREADS) {
            None => {
                let done = (0..OPERATIONS).try_for_each(|_| match n {
                    0..5 => world.operate(conn, dice),
                    _ => world.compose(conn, dice),
                });
                world.at_work.fetch_sub(1, Ordering::Release);
                done.unwrap();
            }
            Some(0 | 1) => world.change_plans(conn, dice).unwrap(),
            Some(2 | 3) => world.monitor(conn).unwrap(),
            Some(_) => world.refresh(conn, dice).unwrap(),
        }
        conn.batch_execute("SELECT pg_stat_force_next_flush()")
            .unwrap();
    });

    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(database.psql(deadlocks).unwrap(), "0\n");
    assert_counters_right(&database);
    let created = world.created.into_inner();
    let counted = database.psql("SELECT sum(total_instances_created) FROM mcp_table");
    assert_eq!(counted.unwrap(), format!("{created}\n"));
    let too_many = "SELECT user_id FROM user_plans
                     WHERE max_instances < (SELECT count(*) FROM mcp_service_table AS i
                                             WHERE i.user_id = user_plans.user_id
                                               AND status = 'active'
                                               AND oauth_status = 'completed')";
    assert_eq!(database.psql(too_many).unwrap(), "");
}

#[test]
pub(crate) fn two_users_of_one_service_do_not_wait_for_each_other() {
    let database = support::database();
    let (a, b) = (&mut database.connect(), &mut database.connect());
    let (user_a, user_b) = (user(a), user(b));
    let gmail = service(a, "gmail", 4001);
    b.batch_execute("SET lock_timeout = '1s'").unwrap();

    let (of_a, of_b) = a
        .transaction(|a| {
            let of_a = create(a, user_a, gmail)?;
            // This commits, counters included, while A's transaction is open.
            let of_b = create(b, user_b, gmail)?;
            // A create of the same user waits. So the timeout works, and nothing waited above.
            let waited = create(b, user_a, gmail);
            let Err(InstanceError::Database(error)) = waited else {
                panic!("{waited:?}");
            };
            let is_unknown = matches!(error, DatabaseError(DatabaseErrorKind::Unknown, _));
            assert!(is_unknown && !is_transient(&error), "{error}");
            Ok::<_, InstanceError>((of_a, of_b))
        })
        .unwrap();
    assert_eq!(find(b, of_a).user_id, user_a);
    assert_eq!(find(a, of_b).user_id, user_b);
    assert_counters_right(&database);
}

/// Each call is a HOT update, and writes little WAL.
#[test]
fn calls_are_counted_in_place() {
    const CALLS: usize = 2_000;
    // Alone on its server: an old transaction of another test would delay the clean-up of pages,
    // and its WAL would count. No page is logged in full there.
    let server = Server::private(&[("autovacuum", "off")]).unwrap();
    let database = support::database_on(&server);
    let conn = &mut database.connect();
    let user = pro_user(conn);
    let gmail = service(conn, "gmail", 4001);
    let ids: Vec<_> = (0..50)
        .map(|_| create(conn, user, gmail).unwrap())
        .collect();
    let versions: Vec<_> = ids.iter().map(|id| find(conn, *id).version).collect();
    let statistics = |conn: &mut PgConnection| -> [i64; 3] {
        conn.batch_execute("SELECT pg_stat_force_next_flush()")
            .unwrap();
        let statistics = database
            .psql(
                "SELECT n_tup_upd, n_tup_hot_upd, pg_current_wal_insert_lsn() - '0/0'
                   FROM pg_stat_user_tables WHERE relname = 'mcp_service_table'",
            )
            .unwrap();
        let mut numbers = statistics.trim().split('|').map(|n| n.parse().unwrap());
        [(); 3].map(|()| numbers.next().unwrap())
    };

    let before = statistics(conn);
    for id in ids.iter().cycle().take(CALLS) {
        McpInstance::record_call(conn, *id, None).unwrap().unwrap();
    }
    let after = statistics(conn);
    let [updates, hot, bytes] = [0, 1, 2].map(|n| usize::try_from(after[n] - before[n]).unwrap());
    assert_eq!((updates, hot), (CALLS, CALLS));
    // 218 were measured, and 538 with a partial index on usage_count that no row is in.
    assert!(bytes / CALLS < 350, "{} bytes of WAL", bytes / CALLS);
    for (id, version) in ids.iter().zip(versions) {
        let instance = find(conn, *id);
        assert_eq!((instance.usage_count, instance.version), (40, version));
    }
}

#[test]
pub(crate) fn calls_from_everywhere_are_all_counted() {
    let database = support::database();
    let conn = &mut database.connect();
    let (user, gmail) = (user(conn), service(conn, "gmail", 4001));
    let id = create(conn, user, gmail).unwrap();
    support::at_once(&database, 8, |_, conn| {
        for _ in 0..50 {
            McpInstance::record_call(conn, id, None).unwrap().unwrap();
        }
    });
    assert_eq!(find(conn, id).usage_count, 400);
}
