//! Webhooks: processed once, however often they are delivered.

use std::collections::BTreeSet;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use bruhmcp_db::ConstraintViolation;
use bruhmcp_db::enums::{PaymentGateway, WebhookStatus};
use bruhmcp_db::ids::WebhookEventId;
use bruhmcp_db::models::{NewWebhookEvent, Recorded, WebhookEvent};
use chrono::{TimeDelta, Utc};
use diesel::pg::PgConnection;
use diesel::prelude::*;
use serde_json::{Value, json};

use crate::support::{as_admin, at_once, database};

static PAYLOAD: Value = Value::Null;

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

fn find(conn: &mut PgConnection, id: WebhookEventId) -> WebhookEvent {
    WebhookEvent::find(conn, id).unwrap().unwrap()
}

fn open(conn: &mut PgConnection) -> Vec<WebhookEventId> {
    let retry_before = Some(Utc::now() + TimeDelta::minutes(1));
    conn.transaction(|conn| WebhookEvent::claim_due(conn, retry_before, 100))
        .unwrap()
        .into_iter()
        .map(|event| event.event_id)
        .collect()
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
fn an_event_delivered_many_times_is_processed_once() {
    let database = database();
    let processed = AtomicUsize::new(0);
    let all_tried = Barrier::new(32);
    at_once(&database, 32, |_, conn| {
        let event = WebhookEvent::record(conn, &event("evt_1"))
            .unwrap()
            .into_inner();
        conn.transaction::<_, diesel::result::Error, _>(|conn| {
            let claimed = WebhookEvent::claim(conn, event.event_id)?;
            all_tried.wait();
            if let Some(event) = claimed {
                processed.fetch_add(1, Ordering::SeqCst);
                assert!(WebhookEvent::mark_processed(conn, event.event_id)?);
            }
            Ok(())
        })
        .unwrap();
    });
    assert_eq!(processed.into_inner(), 1);
}

#[test]
fn recording_does_not_wait_for_a_worker() {
    let database = database();
    let (worker, conn) = (&mut database.connect(), &mut database.connect());
    let row = record(conn, "evt_1");
    worker
        .transaction::<_, diesel::result::Error, _>(|worker| {
            assert!(WebhookEvent::claim(worker, row.event_id)?.is_some());
            assert!(WebhookEvent::claim(conn, row.event_id)?.is_none());
            assert_eq!(open(conn), []);
            assert_eq!(
                WebhookEvent::record(conn, &event("evt_1"))?,
                Recorded::Existing(row.clone())
            );
            Ok(())
        })
        .unwrap();
    // The worker ended without marking the event.
    assert_eq!(open(conn), [row.event_id]);
}

#[test]
fn a_mark_of_an_open_event_is_final_unless_it_failed() {
    let database = database();
    let conn = &mut database.connect();
    let [done, skipped] = ["evt_1", "evt_2"].map(|id| record(conn, id).event_id);

    assert!(WebhookEvent::mark_failed(conn, done, "timeout").unwrap());
    let failed = find(conn, done);
    assert_eq!(failed.processing_status, WebhookStatus::Failed);
    assert_eq!(failed.error_message.as_deref(), Some("timeout"));
    assert!(failed.processed_at.is_some());
    assert_eq!(
        WebhookEvent::record(conn, &event("evt_1")).unwrap(),
        Recorded::Existing(failed)
    );
    assert!(WebhookEvent::mark_processed(conn, done).unwrap());
    assert!(WebhookEvent::mark_skipped(conn, skipped).unwrap());
    for (id, status) in [
        (done, WebhookStatus::Processed),
        (skipped, WebhookStatus::Skipped),
    ] {
        let closed = find(conn, id);
        assert_eq!(
            (closed.processing_status, &closed.error_message),
            (status, &None)
        );
        assert!(!WebhookEvent::mark_failed(conn, id, "late").unwrap());
        assert!(!WebhookEvent::mark_processed(conn, id).unwrap());
        assert!(!WebhookEvent::mark_skipped(conn, id).unwrap());
        assert_eq!(WebhookEvent::claim(conn, id).unwrap(), None);
        assert_eq!(find(conn, id), closed);
    }
    let nobody = WebhookEventId::new();
    assert!(!WebhookEvent::mark_processed(conn, nobody).unwrap());
    assert_eq!(WebhookEvent::claim(conn, nobody).unwrap(), None);
    assert_eq!(open(conn), []);
}

#[test]
fn an_event_that_keeps_failing_does_not_block_the_queue() {
    let database = database();
    let conn = &mut database.connect();
    let poison = record(conn, "evt_1").event_id;
    let next = record(conn, "evt_2").event_id;
    let mut claim = |retry_before| {
        conn.transaction::<_, diesel::result::Error, _>(|conn| {
            let batch = WebhookEvent::claim_due(conn, retry_before, 1)?;
            let Some(event) = batch.into_iter().next() else {
                return Ok(None);
            };
            // The processing is rolled back, the mark is not.
            let processed: QueryResult<()> = conn.transaction(|conn| {
                record(conn, "made by the processing");
                Err(diesel::NotFound)
            });
            assert!(processed.is_err());
            assert!(WebhookEvent::mark_failed(conn, event.event_id, "no user")?);
            Ok(Some(event.event_id))
        })
        .unwrap()
    };
    let an_hour_ago = Some(Utc::now() - TimeDelta::hours(1));
    assert_eq!(claim(an_hour_ago), Some(poison));
    assert_eq!(claim(an_hour_ago), Some(next));
    assert_eq!(claim(an_hour_ago), None);
    assert_eq!(claim(None), None);
    // Later, the oldest comes first again.
    assert_eq!(claim(Some(Utc::now() + TimeDelta::hours(1))), Some(poison));
}

#[test]
fn eight_workers_share_the_queue() {
    let database = database();
    let conn = &mut database.connect();
    let mut waiting = BTreeSet::new();
    for number in 0..60 {
        let id = record(conn, &format!("evt_{number}")).event_id;
        if number % 3 == 0 {
            assert!(WebhookEvent::mark_failed(conn, id, "once").unwrap());
        }
        waiting.insert(id);
    }
    let retry_before = Some(Utc::now() + TimeDelta::hours(1));
    let processed = at_once(&database, 8, |_, conn| {
        let mut processed = Vec::new();
        loop {
            let batch = conn
                .transaction::<_, diesel::result::Error, _>(|conn| {
                    let batch = WebhookEvent::claim_due(conn, retry_before, 4)?;
                    for event in &batch {
                        assert!(WebhookEvent::mark_processed(conn, event.event_id)?);
                    }
                    Ok(batch)
                })
                .unwrap();
            if batch.is_empty() {
                return processed;
            }
            processed.extend(batch.into_iter().map(|event| event.event_id));
        }
    })
    .concat();
    assert_eq!(processed.len(), 60);
    assert_eq!(processed.into_iter().collect::<BTreeSet<_>>(), waiting);
}

#[test]
fn closed_events_are_purged_in_batches() {
    let database = database();
    let conn = &mut database.connect();
    let ids: Vec<_> = (0..7)
        .map(|number| record(conn, &format!("evt_{number}")).event_id)
        .collect();
    for id in &ids[..3] {
        assert!(WebhookEvent::mark_processed(conn, *id).unwrap());
    }
    for id in &ids[3..5] {
        assert!(WebhookEvent::mark_skipped(conn, *id).unwrap());
    }
    assert!(WebhookEvent::mark_failed(conn, ids[5], "no").unwrap());
    let past = Utc::now() - TimeDelta::hours(1);
    let purge = |conn: &mut PgConnection, before, limit| {
        as_admin(conn, |conn| WebhookEvent::purge(conn, before, limit)).unwrap()
    };
    assert_eq!(purge(conn, past, 10), 0);
    let future = Utc::now() + TimeDelta::hours(1);
    let batches: Vec<_> = (0..3).map(|_| purge(conn, future, 3)).collect();
    assert_eq!(batches, [3, 2, 0]);
    assert_eq!(open(conn), ids[5..]);
}
