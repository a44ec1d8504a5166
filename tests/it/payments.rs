//! Payments: recorded once, moved forwards only, never refunded beyond the paid amount.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use bruhmcp_db::enums::TransactionStatus::{self, *};
use bruhmcp_db::enums::{CreditSource, SubscriptionStatus, TransactionType};
use bruhmcp_db::ids::{SubscriptionId, TransactionId, UserId};
use bruhmcp_db::models::*;
use bruhmcp_db::schema::{subscription_transactions, users};
use bruhmcp_db::{ConstraintViolation, Isolation, Page, retry_transaction};
use chrono::{TimeDelta, Utc};
use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::fixtures::{address, user};
use crate::support::{TestDatabase, at_once, database};

fn payment(
    user_id: UserId,
    razorpay_payment_id: &str,
    amount: i64,
    status: TransactionStatus,
) -> NewSubscriptionTransaction<'_> {
    NewSubscriptionTransaction {
        razorpay_payment_id: Some(razorpay_payment_id),
        ..NewSubscriptionTransaction::new(user_id, amount, amount, status)
    }
}

fn recorded(outcome: Recorded<SubscriptionTransaction>) -> SubscriptionTransaction {
    match outcome {
        Recorded::New(row) => row,
        Recorded::Existing(row) => panic!("{row:?}"),
    }
}

/// A captured payment of a new user.
fn captured(conn: &mut PgConnection, amount: i64) -> SubscriptionTransaction {
    let user = user(conn);
    let id = TransactionId::new().to_string();
    let new = payment(user, &id, amount, Captured);
    recorded(SubscriptionTransaction::record_payment(conn, &new).unwrap())
}

fn find(conn: &mut PgConnection, id: TransactionId) -> SubscriptionTransaction {
    SubscriptionTransaction::find(conn, id).unwrap().unwrap()
}

#[test]
fn a_payment_is_recorded_once() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let outcomes = at_once(&database, 32, |_, conn| {
        let new = payment(user, "pay_1", 49_900, Captured);
        SubscriptionTransaction::record_payment(conn, &new).unwrap()
    });
    let (new, existing): (Vec<_>, Vec<_>) = outcomes
        .into_iter()
        .partition(|outcome| matches!(outcome, Recorded::New(_)));
    assert_eq!((new.len(), existing.len()), (1, 31));
    let row = SubscriptionTransaction::find_by_razorpay_id(conn, "pay_1")
        .unwrap()
        .unwrap();
    assert_eq!(new[0], Recorded::New(row.clone()));
    for outcome in existing {
        assert_eq!(outcome, Recorded::Existing(row.clone()));
    }
    let rows = SubscriptionTransaction::list_by_user(conn, user, Page::first(10)).unwrap();
    assert_eq!(rows, [row]);
}

#[test]
fn another_payment_under_the_same_id_is_not_accepted() {
    let database = database();
    let conn = &mut database.connect();
    let (asha, ravi) = (user(conn), user(conn));
    let first = payment(asha, "pay_1", 100, Captured);
    let row = recorded(SubscriptionTransaction::record_payment(conn, &first).unwrap());
    let with_currency = |currency| NewSubscriptionTransaction {
        currency: Some(currency),
        ..first.clone()
    };
    for other in [
        payment(ravi, "pay_1", 100, Captured),
        payment(asha, "pay_1", 101, Captured),
        with_currency("USD"),
    ] {
        match SubscriptionTransaction::record_payment(conn, &other) {
            Err(PaymentError::Differs(existing)) => assert_eq!(*existing, row),
            other => panic!("{other:?}"),
        }
    }
    // No currency means the column's default.
    let outcome = SubscriptionTransaction::record_payment(conn, &with_currency("INR"));
    assert_eq!(outcome.unwrap(), Recorded::Existing(row.clone()));

    SubscriptionTransaction::refund(conn, row.id, &NewRefund::new("rfnd_1", 10)).unwrap();
    let result =
        SubscriptionTransaction::record_payment(conn, &payment(asha, "rfnd_1", 10, Captured));
    assert!(matches!(result, Err(PaymentError::Differs(_))));
}

#[test]
fn only_payments_of_a_gateway_are_recorded() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let without_id = NewSubscriptionTransaction::new(user, 1, 1, Captured);
    let refund = NewSubscriptionTransaction {
        transaction_type: Some(TransactionType::Refund),
        ..payment(user, "pay_1", 1, Captured)
    };
    for new in [without_id, refund] {
        let result = SubscriptionTransaction::record_payment(conn, &new);
        assert!(matches!(result, Err(PaymentError::NotAPayment)));
    }
    let negative = payment(user, "pay_1", -1, Captured);
    match SubscriptionTransaction::record_payment(conn, &negative) {
        Err(PaymentError::Database(error)) => {
            let broken = ConstraintViolation::of(&error).unwrap();
            assert_eq!(broken.table, "subscription_transactions");
        }
        other => panic!("{other:?}"),
    }
}

/// Every step from every status to every other, and to itself.
#[test]
fn a_payment_moves_forwards_only() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let all = [Created, Authorized, Captured, Refunded, Failed, Cancelled];
    let steps = [
        (Created, Authorized),
        (Created, Captured),
        (Created, Failed),
        (Created, Cancelled),
        (Authorized, Captured),
        (Authorized, Failed),
        (Authorized, Cancelled),
        (Failed, Authorized),
        (Failed, Captured),
    ];
    let changes = SubscriptionTransactionChangeset {
        gateway_status: Some(Some("as reported")),
        ..Default::default()
    };
    for (from, to) in all.iter().flat_map(|from| all.map(|to| (*from, to))) {
        let id = TransactionId::new().to_string();
        let new = payment(user, &id, 100, from);
        let row = recorded(SubscriptionTransaction::record_payment(conn, &new).unwrap());
        match SubscriptionTransaction::advance(conn, row.id, to, &changes) {
            Ok(row) => {
                assert!(steps.contains(&(from, to)), "{from:?} to {to:?}");
                assert_eq!(row.status, to);
                assert_eq!(row.gateway_status.as_deref(), Some("as reported"));
            }
            Err(PaymentError::Conflict(current)) => {
                assert!(!steps.contains(&(from, to)), "{from:?} to {to:?}");
                assert_eq!(*current, row);
            }
            Err(error) => panic!("{error:?}"),
        }
    }
    let result = SubscriptionTransaction::advance(conn, TransactionId::new(), Captured, &changes);
    assert!(matches!(result, Err(PaymentError::NotFound)));
}

#[test]
fn a_payment_is_captured_once() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let new = payment(user, "pay_1", 100, Authorized);
    let id = recorded(SubscriptionTransaction::record_payment(conn, &new).unwrap()).id;
    let captured = at_once(&database, 32, |_, conn| {
        let none = SubscriptionTransactionChangeset::default();
        SubscriptionTransaction::advance(conn, id, Captured, &none).is_ok()
    });
    assert_eq!(captured.into_iter().filter(|done| *done).count(), 1);
}

#[test]
fn a_refund_belongs_to_its_payment() {
    let database = database();
    let conn = &mut database.connect();
    let paid = captured(conn, 100);
    let refund = |conn: &mut _, id: &str, amount| {
        SubscriptionTransaction::refund(conn, paid.id, &NewRefund::new(id, amount))
    };
    let row = recorded(refund(conn, "rfnd_1", 60).unwrap());
    assert_eq!(
        (row.amount, row.net_amount, row.transaction_type, row.status),
        (-60, -60, TransactionType::Refund, Captured)
    );
    assert_eq!(
        (row.parent_transaction_id, row.user_id, &row.currency),
        (Some(paid.id), paid.user_id, &paid.currency)
    );
    assert_eq!(find(conn, paid.id), paid);

    let result = refund(conn, "rfnd_2", 41);
    assert!(matches!(
        result,
        Err(PaymentError::ExceedsPayment { refundable: 40 })
    ));
    recorded(refund(conn, "rfnd_2", 40).unwrap());
    let refunded = find(conn, paid.id);
    assert_eq!(refunded.status, Refunded);
    assert!(refunded.refunded_at.is_some());

    // Reported again, even after nothing is left.
    assert_eq!(
        refund(conn, "rfnd_1", 60).unwrap(),
        Recorded::Existing(row.clone())
    );
    let result = refund(conn, "rfnd_1", 59);
    assert!(matches!(result, Err(PaymentError::Differs(_))));
    let other = captured(conn, 100);
    let result = SubscriptionTransaction::refund(conn, other.id, &NewRefund::new("rfnd_1", 60));
    assert!(matches!(result, Err(PaymentError::Differs(existing)) if *existing == row));
    let result = refund(conn, "rfnd_3", 1);
    assert!(matches!(
        result,
        Err(PaymentError::ExceedsPayment { refundable: 0 })
    ));
}

#[test]
fn only_captured_payments_are_refunded() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    for status in [Created, Authorized, Failed, Cancelled] {
        let id = TransactionId::new().to_string();
        let new = payment(user, &id, 100, status);
        let row = recorded(SubscriptionTransaction::record_payment(conn, &new).unwrap());
        let result = SubscriptionTransaction::refund(conn, row.id, &NewRefund::new("rfnd_1", 1));
        assert!(matches!(result, Err(PaymentError::Conflict(current)) if *current == row));
    }
    let paid = captured(conn, 100);
    let refund = SubscriptionTransaction::refund(conn, paid.id, &NewRefund::new("rfnd_1", 50));
    let refund = recorded(refund.unwrap());
    let result = SubscriptionTransaction::refund(conn, refund.id, &NewRefund::new("rfnd_2", 1));
    assert!(matches!(result, Err(PaymentError::Conflict(_))));
    for amount in [0, -1, i64::MIN] {
        let result =
            SubscriptionTransaction::refund(conn, paid.id, &NewRefund::new("rfnd_2", amount));
        assert!(matches!(result, Err(PaymentError::NotPositive)));
    }
    let nobody = TransactionId::new();
    let result = SubscriptionTransaction::refund(conn, nobody, &NewRefund::new("rfnd_2", 1));
    assert!(matches!(result, Err(PaymentError::NotFound)));
}

/// A failed refund doesn't count, and no sum overflows.
#[test]
fn refunds_that_failed_do_not_count() {
    let database = database();
    let conn = &mut database.connect();
    let paid = captured(conn, i64::MAX);
    let insert = |conn: &mut PgConnection, amount, status| {
        let new = NewSubscriptionTransaction {
            transaction_type: Some(TransactionType::Refund),
            parent_transaction_id: Some(paid.id),
            ..NewSubscriptionTransaction::new(paid.user_id, amount, amount, status)
        };
        diesel::insert_into(subscription_transactions::table)
            .values(&new)
            .execute(conn)
            .unwrap();
    };
    insert(conn, -30, Captured);
    insert(conn, 100 - i64::MAX, Created);
    insert(conn, i64::MIN, Failed);
    insert(conn, -70, Cancelled);
    let result =
        SubscriptionTransaction::refund(conn, paid.id, &NewRefund::new("rfnd_1", i64::MAX));
    assert!(matches!(
        result,
        Err(PaymentError::ExceedsPayment { refundable: 70 })
    ));
    insert(conn, -70, Captured);
    let result = SubscriptionTransaction::refund(conn, paid.id, &NewRefund::new("rfnd_1", 1));
    assert!(matches!(
        result,
        Err(PaymentError::ExceedsPayment { refundable: 0 })
    ));
}

#[test]
fn refunds_at_once_never_exceed_the_payment() {
    let database = database();
    let conn = &mut database.connect();
    // At the higher levels each commit makes the others start again: fewer threads save time.
    for (isolation, threads) in [
        (Isolation::ReadCommitted, 32),
        (Isolation::RepeatableRead, 12),
        (Isolation::Serializable, 12),
    ] {
        let paid = captured(conn, 100);
        let refunded = at_once(&database, threads, |number, conn| {
            let id = format!("rfnd_{isolation:?}_{number}");
            // A transaction at REPEATABLE READ is retried until it sees the earlier ones.
            loop {
                let result = retry_transaction(conn, isolation, |conn| {
                    // Its snapshot is older than its lock.
                    SubscriptionTransaction::find(conn, paid.id)?;
                    SubscriptionTransaction::refund(conn, paid.id, &NewRefund::new(&id, 9))
                });
                match result {
                    Ok(row) => return -recorded(row).amount,
                    Err(PaymentError::ExceedsPayment { refundable }) => {
                        assert_eq!(refundable, 1);
                        return 0;
                    }
                    Err(error) if bruhmcp_db::is_transient(&error) => {}
                    Err(error) => panic!("{error:?}"),
                }
            }
        });
        assert_eq!(refunded.into_iter().sum::<i64>(), 99, "{isolation:?}");
        assert_eq!(find(conn, paid.id).status, Captured);
    }
}

#[test]
fn one_refund_reported_many_times_is_one() {
    let database = database();
    let conn = &mut database.connect();
    let paid = captured(conn, 100);
    let new = at_once(&database, 32, |_, conn| {
        let refund = NewRefund::new("rfnd_1", 100);
        match SubscriptionTransaction::refund(conn, paid.id, &refund).unwrap() {
            Recorded::New(_) => 1,
            Recorded::Existing(_) => 0,
        }
    });
    assert_eq!(new.into_iter().sum::<i32>(), 1);
    assert_eq!(find(conn, paid.id).status, Refunded);
}

#[test]
fn any_refunds_add_up() {
    let database = database();
    let conn = RefCell::new(database.connect());
    let refunds = prop::collection::vec(prop_oneof![1..60_i64, 1..=i64::MAX], 1..12);
    let cases = (prop_oneof![1..200_i64, 1..=i64::MAX], refunds);
    TestRunner::new(Config::with_cases(48))
        .run(&cases, |(amount, refunds)| {
            let conn = &mut *conn.borrow_mut();
            let paid = captured(conn, amount);
            let mut left = amount;
            for refund in refunds {
                let id = TransactionId::new().to_string();
                match SubscriptionTransaction::refund(conn, paid.id, &NewRefund::new(&id, refund)) {
                    Ok(Recorded::New(_)) if refund <= left => left -= refund,
                    Err(PaymentError::ExceedsPayment { refundable }) if refund > left => {
                        prop_assert_eq!(refundable, left);
                    }
                    other => prop_assert!(false, "{} of {}: {:?}", refund, left, other),
                }
                let status = if left == 0 { Refunded } else { Captured };
                prop_assert_eq!(find(conn, paid.id).status, status);
            }
            let rows = SubscriptionTransaction::list_by_user(conn, paid.user_id, Page::first(100));
            let sum: i128 = rows.unwrap().iter().map(|row| i128::from(row.amount)).sum();
            prop_assert_eq!(sum, i128::from(left));
            Ok(())
        })
        .unwrap();
}

#[test]
fn history_comes_in_pages() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    // Two transactions, so two timestamps with three rows each.
    let mut ids = Vec::new();
    for _ in 0..2 {
        conn.transaction::<_, diesel::result::Error, _>(|conn| {
            for _ in 0..3 {
                let new = NewSubscriptionTransaction {
                    id: Some(TransactionId::new()),
                    ..NewSubscriptionTransaction::new(user, 1, 1, Captured)
                };
                diesel::insert_into(subscription_transactions::table)
                    .values(&new)
                    .execute(conn)?;
                ids.extend(new.id);
            }
            Ok(())
        })
        .unwrap();
    }
    ids.reverse();
    let mut seen = Vec::new();
    let mut page = Page::first(2);
    loop {
        let rows = SubscriptionTransaction::list_by_user(conn, user, page).unwrap();
        let Some(last) = rows.last() else { break };
        page = Page::after(last.cursor(), 2);
        seen.extend(rows.iter().map(|row| row.id));
    }
    assert_eq!(seen, ids);
    assert_eq!(seen.iter().collect::<BTreeSet<_>>().len(), 6);
}

/// Oldest first, by the index of these few rows, whatever else there is.
#[test]
fn stuck_payments_are_found() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    database
        .psql(&format!(
            "INSERT INTO subscription_transactions (user_id, amount, net_amount, status, created_at)
             SELECT '{user}', n, n, status, now() - n * interval '1 hour'
               FROM generate_series(1, 4) AS n, unnest(enum_range(NULL::transaction_status)) AS status;
             INSERT INTO subscription_transactions (user_id, amount, net_amount, status)
             SELECT '{user}', 1, 1, 'captured' FROM generate_series(1, 2000);
             ANALYZE subscription_transactions"
        ))
        .unwrap();
    // The worst case of a prepared statement.
    conn.batch_execute("SET plan_cache_mode = force_generic_plan")
        .unwrap();
    let before = Utc::now() - TimeDelta::minutes(90);
    let rows = SubscriptionTransaction::list_stuck(conn, before, 5).unwrap();
    let mut found: Vec<_> = rows.iter().map(|row| (-row.amount, row.status)).collect();
    found.sort_by_key(|(hours, status)| (*hours, *status == Authorized));
    assert_eq!(
        found[..4],
        [
            (-4, Created),
            (-4, Authorized),
            (-3, Created),
            (-3, Authorized)
        ]
    );
    assert_eq!((rows.len(), rows[4].amount), (5, 2));
    let all = SubscriptionTransaction::list_stuck(conn, before, 100).unwrap();
    assert_eq!(all.len(), 6);
    assert!(all.is_sorted_by_key(|row| row.created_at));
    conn.batch_execute("DO $$BEGIN PERFORM pg_stat_force_next_flush(); END$$")
        .unwrap();
    let scans = "SELECT idx_scan FROM pg_stat_user_indexes
                  WHERE indexrelname = 'subscription_transactions_created_at_id_idx'";
    assert_eq!(database.psql(scans).unwrap(), "2\n");
}

type Operation = fn(&mut PgConnection, &SubscriptionTransaction, SubscriptionId) -> bool;

/// An operation waits for a user who is locked before it holds anything that the holder of that
/// lock may need.
#[test]
fn an_operation_locks_the_user_first() {
    let database = database();
    let conn = &mut database.connect();
    // What runs alone, and what another transaction does after it has locked the user.
    let pairs: [(&str, Operation, Operation); 6] = [
        ("record_payment", record, record),
        ("refund", refund, change),
        ("grant", grant, grant),
        ("start", start, start),
        ("upgrade", upgrade, pause),
        ("upsert", set_address, set_address),
    ];
    let mut deadlocks = Vec::new();
    for (name, alone, after_lock) in pairs {
        let paid = captured(conn, 100);
        // Only one subscription can be live, so `start` begins without.
        let status = if name == "start" {
            SubscriptionStatus::Created
        } else {
            SubscriptionStatus::Active
        };
        let new = NewUserSubscription::new(paid.user_id);
        let subscription = UserSubscription::start(conn, &new, status).unwrap().id;
        let locked = Barrier::new(2);
        thread::scope(|scope| {
            let (locked, database, paid) = (&locked, &database, &paid);
            let waiting = scope.spawn(move || {
                let conn = &mut database.connect();
                locked.wait();
                alone(conn, paid, subscription)
            });
            let done = conn.transaction(|conn| {
                users::table
                    .find(paid.user_id)
                    .select(users::id)
                    .for_update()
                    .first::<UserId>(conn)?;
                locked.wait();
                wait_for_a_blocked_session(database);
                if after_lock(conn, paid, subscription) {
                    Ok(())
                } else {
                    Err(diesel::result::Error::RollbackTransaction)
                }
            });
            if !waiting.join().unwrap() || done.is_err() {
                deadlocks.push(name);
            }
        });
    }
    assert_eq!(deadlocks, [""; 0]);
}

/// Another role does not see what a session waits for.
fn wait_for_a_blocked_session(database: &TestDatabase) {
    let conn = &mut database.connect_as_owner();
    let blocked = "SELECT FROM pg_stat_activity
                    WHERE datname = current_database() AND wait_event_type = 'Lock'";
    while diesel::sql_query(blocked).execute(conn).unwrap() == 0 {
        thread::sleep(Duration::from_millis(5));
    }
}

/// Whether the operation succeeded or was refused, without a database error.
fn decided<T>(result: Result<T, PaymentError>) -> bool {
    !matches!(result, Err(PaymentError::Database(_)))
}

fn record(conn: &mut PgConnection, paid: &SubscriptionTransaction, _: SubscriptionId) -> bool {
    let new = payment(paid.user_id, "pay_locked", 1, Captured);
    decided(SubscriptionTransaction::record_payment(conn, &new))
}

fn refund(conn: &mut PgConnection, paid: &SubscriptionTransaction, _: SubscriptionId) -> bool {
    decided(SubscriptionTransaction::refund(
        conn,
        paid.id,
        &NewRefund::new("rfnd_locked", 1),
    ))
}

fn change(conn: &mut PgConnection, paid: &SubscriptionTransaction, _: SubscriptionId) -> bool {
    diesel::update(subscription_transactions::table.find(paid.id))
        .set(subscription_transactions::gateway_status.eq("settled"))
        .execute(conn)
        .is_ok()
}

fn grant(conn: &mut PgConnection, paid: &SubscriptionTransaction, _: SubscriptionId) -> bool {
    let new = NewAccountCredit {
        source_type: Some(CreditSource::Refund),
        source_id: Some("rfnd_locked"),
        ..NewAccountCredit::new(paid.user_id, 1)
    };
    !matches!(
        AccountCredit::grant(conn, &new),
        Err(CreditError::Database(_))
    )
}

fn start(conn: &mut PgConnection, paid: &SubscriptionTransaction, _: SubscriptionId) -> bool {
    let new = NewUserSubscription::new(paid.user_id);
    let started = UserSubscription::start(conn, &new, SubscriptionStatus::Active);
    !matches!(started, Err(SubscriptionError::Database(_)))
}

fn upgrade(conn: &mut PgConnection, paid: &SubscriptionTransaction, id: SubscriptionId) -> bool {
    let new = NewUserSubscription::new(paid.user_id);
    let upgraded = UserSubscription::upgrade(conn, id, &new);
    !matches!(upgraded, Err(SubscriptionError::Database(_)))
}

fn pause(conn: &mut PgConnection, _: &SubscriptionTransaction, id: SubscriptionId) -> bool {
    let (from, to) = (SubscriptionStatus::Active, SubscriptionStatus::Paused);
    let paused = UserSubscription::change_status(conn, id, from, to, &Default::default());
    !matches!(paused, Err(SubscriptionError::Database(_)))
}

fn set_address(conn: &mut PgConnection, paid: &SubscriptionTransaction, _: SubscriptionId) -> bool {
    UserBillingDetails::upsert(conn, &address(paid.user_id)).is_ok()
}
