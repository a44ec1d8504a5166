//! Webhooks: recorded once, claimed by leases, processed once, however often they are delivered.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bruhmcp_db::enums::{PaymentGateway, WebhookStatus};
use bruhmcp_db::ids::{UserId, WebhookEventId};
use bruhmcp_db::models::{
    MAX_WEBHOOK_ATTEMPTS, NewWebhookEvent, Recorded, User, WebhookError, WebhookEvent,
};
use bruhmcp_db::{ConstraintViolation, Isolation, retry_transaction};
use chrono::{DateTime, TimeDelta, Utc};
use diesel::connection::InstrumentationEvent;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::result::Error::QueryBuilderError;
use serde_json::{Value, json};

use crate::fixtures::user;
use crate::support::{TestDatabase, as_admin, at_once, database};

static PAYLOAD: Value = Value::Null;
const LEASE: TimeDelta = TimeDelta::minutes(1);
const LEVELS: [Isolation; 3] = [
    Isolation::ReadCommitted,
    Isolation::RepeatableRead,
    Isolation::Serializable,
];

fn event(external_event_id: &str) -> NewWebhookEvent<'_> {
    NewWebhookEvent::new(
        PaymentGateway::Razorpay,
        external_event_id,
        "payment.captured",
        &PAYLOAD,
    )
}

fn record(conn: &mut PgConnection, external_event_id: &str) -> WebhookEvent {
    match WebhookEvent::record(conn, &event(external_event_id)).unwrap() {
        Recorded::New(event) => event,
        other => panic!("{other:?}"),
    }
}

fn claimed(conn: &mut PgConnection, external_event_id: &str) -> WebhookEvent {
    let id = record(conn, external_event_id).event_id;
    WebhookEvent::claim(conn, id, LEASE).unwrap().unwrap()
}

fn claimed_with(conn: &mut PgConnection, external_event_id: &str, payload: &Value) -> WebhookEvent {
    let new = NewWebhookEvent {
        payload,
        ..event(external_event_id)
    };
    WebhookEvent::record_claimed(conn, &new, LEASE)
        .unwrap()
        .into_inner()
}

fn find(conn: &mut PgConnection, id: WebhookEventId) -> WebhookEvent {
    WebhookEvent::find(conn, id).unwrap().unwrap()
}

fn ids(events: &[WebhookEvent]) -> Vec<WebhookEventId> {
    events.iter().map(|event| event.event_id).collect()
}

fn due(conn: &mut PgConnection) -> Vec<WebhookEvent> {
    WebhookEvent::claim_due(conn, LEASE, 100).unwrap()
}

/// Ends all leases and pauses.
fn time_passes(database: &TestDatabase) {
    database
        .psql("UPDATE webhook_events SET available_at = now()")
        .unwrap();
}

#[track_caller]
fn assert_lost(result: Result<(), WebhookError>) {
    assert!(matches!(result, Err(WebhookError::LeaseLost)), "{result:?}");
}

#[test]
fn an_event_is_new_once() {
    let database = database();
    let conn = &mut database.connect();
    let recorded = at_once(&database, 32, |_, conn| {
        WebhookEvent::record(conn, &event("evt_1")).unwrap()
    });
    let (new, others): (Vec<_>, Vec<_>) = recorded
        .into_iter()
        .partition(|recorded| matches!(recorded, Recorded::New(_)));
    let [Recorded::New(row)] = &new[..] else {
        panic!("{new:?}")
    };
    for other in others {
        assert_eq!(other, Recorded::Existing(row.clone()));
    }
    // Another payload is the same event; another gateway is not.
    let payload = json!({"amount": 1});
    let again = NewWebhookEvent {
        payload: &payload,
        ..event("evt_1")
    };
    assert_eq!(
        WebhookEvent::record(conn, &again).unwrap(),
        Recorded::Existing(row.clone())
    );
    let stripe = NewWebhookEvent {
        payment_gateway: PaymentGateway::Stripe,
        ..again
    };
    assert!(matches!(
        WebhookEvent::record(conn, &stripe).unwrap(),
        Recorded::New(_)
    ));
    let error = WebhookEvent::record(conn, &event("")).unwrap_err();
    assert!(
        ConstraintViolation::of(&error)
            .unwrap()
            .is("webhook_events_external_event_id_check")
    );
}

#[test]
fn an_event_delivered_many_times_is_claimed_once() {
    let database = database();
    for level in LEVELS {
        let claims = AtomicUsize::new(0);
        let name = format!("{level:?}");
        at_once(&database, 32, |_, conn| {
            let event = WebhookEvent::record(conn, &event(&name))
                .unwrap()
                .into_inner();
            let claim = |conn: &mut PgConnection| WebhookEvent::claim(conn, event.event_id, LEASE);
            if let Some(event) = retry_transaction(conn, level, claim).unwrap() {
                claims.fetch_add(1, Ordering::SeqCst);
                assert_eq!(event.attempts, 1);
                WebhookEvent::mark_processed(conn, &event, None).unwrap();
            }
        });
        assert_eq!(claims.into_inner(), 1, "{level:?}");
    }
}

#[test]
fn a_new_event_is_recorded_and_claimed_in_one_step() {
    let database = database();
    let conn = &mut database.connect();
    let new = event("evt_1");
    let Recorded::New(row) = WebhookEvent::record_claimed(conn, &new, LEASE).unwrap() else {
        panic!("it is not new")
    };
    assert_eq!(row.attempts, 1);
    assert!(row.available_at > Utc::now() + LEASE / 2);
    assert_eq!(due(conn), []);
    let again = WebhookEvent::record_claimed(conn, &new, LEASE).unwrap();
    assert_eq!(again, Recorded::Existing(row.clone()));
    time_passes(&database);
    let again = WebhookEvent::record_claimed(conn, &new, LEASE).unwrap();
    assert_eq!(again.into_inner().attempts, 1);
    assert_eq!(ids(&due(conn)), [row.event_id]);
    assert_lost(WebhookEvent::mark_processed(conn, &row, None));
}

#[test]
fn nobody_waits_for_a_worker() {
    let database = database();
    let (worker, conn) = (&mut database.connect(), &mut database.connect());
    let (one, other) = (claimed(conn, "evt_1"), record(conn, "evt_2"));
    let asha = user(conn);
    worker
        .transaction::<_, WebhookError, _>(|worker| {
            // The worker is processing.
            User::lock(worker, asha)?;
            assert!(matches!(
                WebhookEvent::record(conn, &event("evt_1"))?,
                Recorded::Existing(_)
            ));
            WebhookEvent::mark_processed(worker, &one, Some(asha))?;
            // The row is locked, and its lease ends.
            assert_eq!(WebhookEvent::claim(conn, one.event_id, LEASE)?, None);
            assert_eq!(ids(&due(conn)), [other.event_id]);
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_mark_of_an_open_event_is_final_unless_it_failed() {
    let database = database();
    let conn = &mut database.connect();
    let asha = user(conn);
    let [done, skipped] = ["evt_1", "evt_2"].map(|id| claimed(conn, id));

    WebhookEvent::mark_failed(conn, &done, Some(asha), "timeout").unwrap();
    let failed = find(conn, done.event_id);
    assert_eq!(failed.processing_status, WebhookStatus::Failed);
    assert_eq!(failed.error_message.as_deref(), Some("timeout"));
    assert_eq!(failed.user_id, Some(asha));
    assert_eq!(
        WebhookEvent::record(conn, &event("evt_1")).unwrap(),
        Recorded::Existing(failed)
    );
    // Not before the pause is over.
    assert_eq!(
        WebhookEvent::claim(conn, done.event_id, LEASE).unwrap(),
        None
    );
    assert_eq!(due(conn), []);
    time_passes(&database);
    let done = WebhookEvent::claim(conn, done.event_id, LEASE)
        .unwrap()
        .unwrap();
    let skipped = {
        assert_lost(WebhookEvent::mark_skipped(
            conn,
            &WebhookEvent {
                attempts: 2,
                ..skipped.clone()
            },
            None,
        ));
        skipped
    };
    WebhookEvent::mark_processed(conn, &done, None).unwrap();
    WebhookEvent::mark_skipped(conn, &skipped, Some(asha)).unwrap();
    time_passes(&database);
    for (event, status) in [
        (done, WebhookStatus::Processed),
        (skipped, WebhookStatus::Skipped),
    ] {
        let closed = find(conn, event.event_id);
        assert_eq!(
            (closed.processing_status, &closed.error_message),
            (status, &None)
        );
        // The link of the failure stays.
        assert_eq!(closed.user_id, Some(asha));
        assert_lost(WebhookEvent::mark_failed(conn, &event, None, "late"));
        assert_lost(WebhookEvent::mark_processed(conn, &event, None));
        assert_lost(WebhookEvent::mark_skipped(conn, &event, None));
        assert_eq!(
            WebhookEvent::claim(conn, event.event_id, LEASE).unwrap(),
            None
        );
        assert_eq!(find(conn, event.event_id), closed);
    }
    let nobody = WebhookEventId::new();
    assert_eq!(WebhookEvent::claim(conn, nobody, LEASE).unwrap(), None);
    assert_eq!(due(conn), []);
}

/// A worker that is late does nothing: its transaction is rolled back with the mark.
#[test]
fn a_late_worker_does_not_mark_what_another_has_claimed() {
    let database = database();
    let (late, next) = (&mut database.connect(), &mut database.connect());
    let first = claimed(late, "evt_1");
    time_passes(&database);
    let second = WebhookEvent::claim(next, first.event_id, LEASE)
        .unwrap()
        .unwrap();
    let processed = late.transaction(|late| {
        record(late, "made by the late worker");
        WebhookEvent::mark_processed(late, &first, None)
    });
    assert_lost(processed);
    assert_lost(WebhookEvent::mark_failed(late, &first, None, "late"));
    assert_eq!(find(next, first.event_id), second);
    WebhookEvent::mark_processed(next, &second, None).unwrap();
    assert_lost(WebhookEvent::mark_skipped(late, &first, None));
    let events = "SELECT external_event_id, processing_status FROM webhook_events";
    assert_eq!(database.psql(events).unwrap(), "evt_1|processed\n");
    // A lease that ended without another claim is still good.
    let alone = claimed(late, "evt_2");
    time_passes(&database);
    WebhookEvent::mark_processed(late, &alone, None).unwrap();
}

#[test]
fn the_pause_doubles_and_the_last_failure_makes_a_dead_letter() {
    let database = database();
    let conn = &mut database.connect();
    let id = record(conn, "evt_1").event_id;
    for attempt in 1..=MAX_WEBHOOK_ATTEMPTS {
        let [claimed] = &due(conn)[..] else {
            panic!("attempt {attempt}")
        };
        assert_eq!(claimed.attempts, attempt);
        assert_eq!(WebhookEvent::list_dead(conn, 10).unwrap(), []);
        WebhookEvent::mark_failed(conn, claimed, None, "no").unwrap();
        let failed = find(conn, id);
        let pause = failed.available_at - failed.processed_at.unwrap();
        let expected = match attempt {
            MAX_WEBHOOK_ATTEMPTS => TimeDelta::zero(),
            _ => TimeDelta::minutes(1) * 2_i32.pow((attempt - 1).try_into().unwrap()),
        };
        assert_eq!(pause, expected);
        // A dead letter needs no time to pass.
        if attempt < MAX_WEBHOOK_ATTEMPTS {
            time_passes(&database);
        }
    }
    // Neither the queue nor another delivery takes it.
    assert_eq!(due(conn), []);
    assert_eq!(WebhookEvent::claim(conn, id, LEASE).unwrap(), None);
    assert_eq!(ids(&WebhookEvent::list_dead(conn, 10).unwrap()), [id]);
    // The operator's attempt.
    let retried = WebhookEvent::retry(conn, id, LEASE).unwrap().unwrap();
    assert_eq!(retried.attempts, MAX_WEBHOOK_ATTEMPTS + 1);
    assert_eq!(WebhookEvent::list_dead(conn, 10).unwrap(), []);
    assert_eq!(WebhookEvent::retry(conn, id, LEASE).unwrap(), None);
    WebhookEvent::mark_failed(conn, &retried, None, "still").unwrap();
    assert_eq!(ids(&WebhookEvent::list_dead(conn, 10).unwrap()), [id]);
    let retried = WebhookEvent::retry(conn, id, LEASE).unwrap().unwrap();
    WebhookEvent::mark_processed(conn, &retried, None).unwrap();
    assert_eq!(WebhookEvent::list_dead(conn, 10).unwrap(), []);
    // What is not dead is not retried.
    let alive = record(conn, "evt_2").event_id;
    assert_eq!(WebhookEvent::retry(conn, alive, LEASE).unwrap(), None);
}

#[test]
fn an_event_that_kills_its_workers_becomes_a_dead_letter() {
    let database = database();
    let conn = &mut database.connect();
    let id = record(conn, "evt_1").event_id;
    for _ in 0..MAX_WEBHOOK_ATTEMPTS {
        assert_eq!(ids(&due(conn)), [id]);
        assert_eq!(WebhookEvent::list_dead(conn, 10).unwrap(), []);
        time_passes(&database);
    }
    assert_eq!(due(conn), []);
    let dead = WebhookEvent::list_dead(conn, 10).unwrap();
    assert_eq!(ids(&dead), [id]);
    assert_eq!(dead[0].processing_status, WebhookStatus::Pending);
}

#[test]
fn an_event_that_keeps_failing_does_not_block_the_queue() {
    let database = database();
    let conn = &mut database.connect();
    let poison = claimed(conn, "evt_1");
    WebhookEvent::mark_failed(conn, &poison, None, "no user").unwrap();
    let next = record(conn, "evt_2").event_id;
    let mut claim = || ids(&WebhookEvent::claim_due(conn, LEASE, 1).unwrap());
    assert_eq!(claim(), [next]);
    assert_eq!(claim(), []);
}

/// Processes what is due until nothing is open. With its first claim, a worker dies.
fn work(database: &TestDatabase, conn: PgConnection, level: Isolation, lease: TimeDelta) {
    let mut conn = conn;
    let mut dies = true;
    let began = Instant::now();
    loop {
        let claim = |conn: &mut PgConnection| WebhookEvent::claim_due(conn, lease, 4);
        let claimed = retry_transaction(&mut conn, level, claim).unwrap();
        if claimed.is_empty() {
            let open = "SELECT count(*) FROM webhook_events WHERE processed_at IS NULL";
            if database.psql(open).unwrap() == "0\n" {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "the queue waits");
            thread::sleep(Duration::from_millis(50));
            continue;
        }
        for event in &claimed {
            let process = |conn: &mut PgConnection| {
                diesel::sql_query("INSERT INTO effects VALUES ($1)")
                    .bind::<diesel::sql_types::Uuid, _>(event.event_id)
                    .execute(conn)?;
                if dies {
                    // The connection breaks before the commit.
                    return Err(WebhookError::LeaseLost);
                }
                WebhookEvent::mark_processed(conn, event, None)
            };
            match retry_transaction(&mut conn, level, process) {
                Err(WebhookError::LeaseLost) if dies => {
                    let pid = "SELECT FROM pg_terminate_backend(pg_backend_pid())";
                    assert!(diesel::sql_query(pid).execute(&mut conn).is_err());
                    conn = database.connect();
                    dies = false;
                    // Its other events wait for the end of the lease too.
                    break;
                }
                Ok(()) | Err(WebhookError::LeaseLost) => {}
                other => other.unwrap(),
            }
        }
    }
}

#[test]
fn workers_that_die_cost_a_lease_and_not_the_queue() {
    for level in LEVELS {
        let database = database();
        let conn = &mut database.connect();
        database
            .psql("CREATE TABLE effects (event_id uuid); GRANT INSERT ON effects TO PUBLIC")
            .unwrap();
        for number in 0..80 {
            record(conn, &format!("evt_{number}"));
        }
        let began = Instant::now();
        thread::scope(|scope| {
            for _ in 0..16 {
                let conn = database.connect();
                scope.spawn(|| work(&database, conn, level, TimeDelta::seconds(2)));
            }
        });
        // Each event has had its effect once.
        let effects = "SELECT count(*), count(DISTINCT event_id) FROM effects";
        assert_eq!(database.psql(effects).unwrap(), "80|80\n", "{level:?}");
        let again = "SELECT count(*) >= 16 FROM webhook_events WHERE attempts > 1";
        assert_eq!(database.psql(again).unwrap(), "t\n", "{level:?}");
        assert!(began.elapsed() >= Duration::from_secs(2));
    }
}

#[test]
fn a_lease_that_has_no_use_is_refused() {
    let database = database();
    let conn = &mut database.connect();
    let id = record(conn, "evt_1").event_id;
    let day = TimeDelta::days(1);
    for lease in [-day, day * 366, TimeDelta::MIN, TimeDelta::MAX] {
        let outcomes = [
            WebhookEvent::record_claimed(conn, &event("evt_2"), lease).err(),
            WebhookEvent::claim(conn, id, lease).err(),
            WebhookEvent::claim_due(conn, lease, 10).err(),
            WebhookEvent::retry(conn, id, lease).err(),
        ];
        for outcome in outcomes {
            let Some(QueryBuilderError(error)) = outcome else {
                panic!("{lease}: {outcome:?}");
            };
            let error = error.downcast_ref::<WebhookError>();
            assert!(
                matches!(error, Some(WebhookError::InvalidLease)),
                "{error:?}"
            );
        }
    }
    assert_eq!(
        WebhookEvent::claim_due(conn, day * 365, 10).unwrap().len(),
        1
    );
}

#[test]
fn closed_events_are_purged_in_batches() {
    let database = database();
    let conn = &mut database.connect();
    let events: Vec<_> = (0..7)
        .map(|number| claimed(conn, &format!("evt_{number}")))
        .collect();
    for event in &events[..3] {
        WebhookEvent::mark_processed(conn, event, None).unwrap();
    }
    for event in &events[3..5] {
        WebhookEvent::mark_skipped(conn, event, None).unwrap();
    }
    WebhookEvent::mark_failed(conn, &events[5], None, "no").unwrap();
    let past = Utc::now() - TimeDelta::hours(1);
    let purge = |conn: &mut PgConnection, before, limit| {
        as_admin(conn, |conn| WebhookEvent::purge(conn, before, limit)).unwrap()
    };
    assert_eq!(purge(conn, past, 10), 0);
    let future = Utc::now() + TimeDelta::hours(1);
    let batches: Vec<_> = (0..3).map(|_| purge(conn, future, 3)).collect();
    assert_eq!(batches, [3, 2, 0]);
    time_passes(&database);
    let left: BTreeSet<_> = ids(&due(conn)).into_iter().collect();
    assert_eq!(left, ids(&events[5..]).into_iter().collect());
}

/// The generic plans of the statements on `webhook_events` that `work` runs.
fn plans(database: &TestDatabase, work: impl FnOnce(&mut PgConnection)) -> String {
    let conn = &mut database.connect();
    let (sender, statements) = mpsc::channel();
    conn.set_instrumentation(move |event: InstrumentationEvent<'_>| {
        if let InstrumentationEvent::StartQuery { query, .. } = event {
            sender.send(query.to_string()).unwrap();
        }
    });
    work(conn);
    let mut plans = String::new();
    for statement in statements.try_iter() {
        let statement = statement.split(" -- binds").next().unwrap();
        if !statement.contains("webhook_events") || statement.starts_with("INSERT") {
            continue;
        }
        let parameters = (1..20)
            .filter(|n| statement.contains(&format!("${n}")))
            .count();
        let execute = match vec!["NULL"; parameters].join(", ") {
            nulls if nulls.is_empty() => "it".to_owned(),
            nulls => format!("it ({nulls})"),
        };
        let explain = format!(
            "SET plan_cache_mode = force_generic_plan; PREPARE it AS {statement};
             EXPLAIN (COSTS off) EXECUTE {execute}"
        );
        plans += &database.psql(&explain).unwrap();
    }
    plans
}

#[test]
fn each_statement_has_its_index() {
    let database = database();
    let conn = &mut database.connect();
    let asha = user(conn);
    database
        .psql(
            "INSERT INTO webhook_events
                 (external_event_id, event_type, payment_gateway, payload, processing_status, processed_at)
             SELECT n, 'a', 'razorpay', '{}', 'processed', now() - n * interval '1 minute'
               FROM generate_series(1, 30000) AS n;
             ANALYZE webhook_events",
        )
        .unwrap();
    let old = Utc::now() - TimeDelta::minutes(29_900);
    let id = record(conn, "evt_1").event_id;
    type Work<'a> = &'a dyn Fn(&mut PgConnection);
    let works: [(&str, Work<'_>); 6] = [
        ("webhook_events_pkey", &|conn| {
            WebhookEvent::claim(conn, id, LEASE).unwrap();
        }),
        ("webhook_events_available_at_idx", &|conn| {
            due(conn);
        }),
        ("webhook_events_dead_idx", &|conn| {
            WebhookEvent::list_dead(conn, 10).unwrap();
        }),
        ("webhook_events_pkey", &|conn| {
            WebhookEvent::retry(conn, id, LEASE).unwrap();
        }),
        ("webhook_events_user_id_idx", &|conn| {
            User::anonymise(conn, asha).unwrap();
        }),
        ("webhook_events_processed_at_idx", &|conn| {
            as_admin(conn, |conn| WebhookEvent::purge(conn, old, 10)).unwrap();
        }),
    ];
    for (index, work) in works {
        let plans = plans(&database, work);
        assert!(plans.contains(index), "{index}: {plans}");
        assert!(!plans.contains("Seq Scan on webhook_events"), "{plans}");
    }
    // 90 are left that are old; a purge reads not much more than those that it deletes.
    let buffers = |before: DateTime<Utc>| {
        let plan = database
            .psql(&format!(
                "EXPLAIN (ANALYZE, BUFFERS, COSTS off, TIMING off, SUMMARY off)
                 SELECT event_id FROM webhook_events
                  WHERE processing_status IN ('processed', 'skipped') AND processed_at < '{before}'
                  ORDER BY processed_at LIMIT 10 FOR UPDATE SKIP LOCKED"
            ))
            .unwrap();
        let shared = plan.split("Buffers: shared").nth(1).unwrap();
        let line = shared.lines().next().unwrap();
        let numbers = line
            .split([' ', '='])
            .filter_map(|word| word.parse::<u32>().ok());
        numbers.sum::<u32>()
    };
    for before in [old, old - TimeDelta::days(90), Utc::now()] {
        assert!(buffers(before) < 60, "{}", buffers(before));
    }
}

/// At READ COMMITTED one waits for the other, above it one of them is retried.
#[test]
fn no_payload_survives_its_user_at_any_isolation_level() {
    let database = database();
    let conn = &mut database.connect();
    let payload = json!({"email": "asha@example.in"});
    for (n, level) in LEVELS.into_iter().cycle().take(60).enumerate() {
        let asha = user(conn);
        let event = claimed_with(conn, &format!("evt_{n}"), &payload);
        at_once(&database, 2, |side, conn| {
            if side == 0 {
                retry_transaction(conn, level, |conn| {
                    User::anonymise(conn, asha)?;
                    thread::sleep(Duration::from_millis(n as u64 / 3));
                    Ok::<_, diesel::result::Error>(())
                })
                .unwrap();
            } else {
                retry_transaction(conn, level, |conn| {
                    // The snapshot of the upper levels.
                    assert!(User::find(conn, asha)?.is_some());
                    thread::sleep(Duration::from_millis(n as u64 % 7));
                    match n % 2 {
                        0 => WebhookEvent::mark_processed(conn, &event, Some(asha)),
                        _ => WebhookEvent::mark_failed(conn, &event, Some(asha), "asha@example.in"),
                    }
                })
                .unwrap();
            }
        });
        let left = find(conn, event.event_id);
        assert_eq!(left.payload, json!({}), "{level:?}: {left:?}");
        assert_eq!(left.error_message, None, "{level:?}: {left:?}");
        let closed = [WebhookStatus::Processed, WebhookStatus::Skipped];
        assert!(closed.contains(&left.processing_status), "{left:?}");
    }
}

#[test]
fn an_anonymised_or_missing_user_gets_no_link() {
    let database = database();
    let conn = &mut database.connect();
    let asha = user(conn);
    User::anonymise(conn, asha).unwrap();
    let payload = json!({"email": "asha@example.in"});
    for (n, user_id) in [asha, UserId::new()].into_iter().enumerate() {
        let event = claimed_with(conn, &format!("evt_{n}"), &payload);
        WebhookEvent::mark_processed(conn, &event, Some(user_id)).unwrap();
        let marked = find(conn, event.event_id);
        assert_eq!(marked.user_id, None);
        assert_eq!(marked.processing_status, WebhookStatus::Processed);
        assert_eq!(marked.payload == json!({}), user_id == asha);
    }
}
