//! The gateway's events, in any order and at once, and the sweep of what is over.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use bruhmcp_db::enums::SubscriptionStatus::{self, *};
use bruhmcp_db::enums::{PlanPaymentStatus, PlanType, SubscriptionPlan, TransactionStatus};
use bruhmcp_db::ids::{SubscriptionId, UserId};
use bruhmcp_db::models::*;
use bruhmcp_db::schema::{user_plans, user_subscriptions};
use bruhmcp_db::{Isolation, Page, retry_transaction};
use chrono::{DateTime, SubsecRound, TimeDelta, Utc};
use diesel::connection::InstrumentationEvent;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::fixtures::{create, service, upgrade, user};
use crate::support::{TestDatabase, at_once, database};

const ISOLATIONS: [Isolation; 3] = [
    Isolation::ReadCommitted,
    Isolation::RepeatableRead,
    Isolation::Serializable,
];

/// What the gateway says at a time, with numbers for periods and payments.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Told {
    at: DateTime<Utc>,
    what: What,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum What {
    Authenticated,
    Activated,
    /// The period and its payment.
    Renewed(i64, Paid),
    Failed(Paid),
    EndsWithPeriod,
    Cancelled,
    Paused,
    Resumed,
    Halted,
    Completed,
    /// Of the payment's 100.
    Refunded(Paid, i64),
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Paid {
    number: usize,
    at: DateTime<Utc>,
}

/// Two months ago, in whole seconds as the gateway counts.
fn base() -> DateTime<Utc> {
    (Utc::now() - TimeDelta::days(60)).trunc_subsecs(0)
}

fn days(number: i64) -> TimeDelta {
    TimeDelta::days(number)
}

/// A user with a subscription that waits for the gateway.
fn subscribed(conn: &mut PgConnection) -> UserId {
    let user = user(conn);
    let (subscription, customer) = (format!("sub_{user}"), format!("cust_{user}"));
    let new = NewUserSubscription {
        plan_code: Some(SubscriptionPlan::Pro),
        razorpay_subscription_id: Some(&subscription),
        razorpay_customer_id: Some(&customer),
        ..NewUserSubscription::new(user)
    };
    UserSubscription::start(conn, &new, Created).unwrap();
    user
}

/// Periods are 30 days from `base`.
fn apply_from(
    conn: &mut PgConnection,
    user: UserId,
    base: DateTime<Utc>,
    told: &Told,
) -> Result<Applied, GatewayError> {
    let payment_id = |paid: Paid| format!("pay_{user}_{}", paid.number);
    let id = match told.what {
        What::Renewed(_, paid) | What::Failed(paid) | What::Refunded(paid, _) => payment_id(paid),
        _ => format!("pay_{user}_0"),
    };
    let refund_id = format!("rfnd_{id}_{}", told.at.timestamp());
    let payment = |paid: Paid, failure_reason| GatewayPayment {
        razorpay_payment_id: &id,
        amount: 100,
        fee_amount: 2,
        currency: "INR",
        at: paid.at,
        method: Some("upi"),
        failure_reason,
    };
    let period = |number| GatewayPeriod {
        start: base + days(30 * number),
        end: base + days(30 * number + 30),
    };
    let change = match told.what {
        What::Authenticated => GatewayChange::Authenticated,
        What::Activated => GatewayChange::Activated {
            period: period(0),
            payment: Some(payment(
                Paid {
                    number: 0,
                    at: base,
                },
                None,
            )),
        },
        What::Renewed(number, paid) => GatewayChange::Renewed {
            period: period(number),
            payment: payment(paid, None),
        },
        What::Failed(paid) => GatewayChange::PaymentFailed {
            payment: payment(paid, Some("no funds")),
        },
        What::EndsWithPeriod => GatewayChange::CancelledAtPeriodEnd,
        What::Cancelled => GatewayChange::Cancelled,
        What::Paused => GatewayChange::Paused {
            resume_at: Some(told.at + days(9)),
        },
        What::Resumed => GatewayChange::Resumed,
        What::Halted => GatewayChange::Halted,
        What::Completed => GatewayChange::Completed,
        What::Refunded(paid, amount) => GatewayChange::Refunded {
            payment: payment(paid, None),
            refund: NewRefund::new(&refund_id, amount),
        },
    };
    let event = GatewayEvent {
        razorpay_subscription_id: &format!("sub_{user}"),
        at: told.at,
        change,
    };
    UserSubscription::apply(conn, &event)
}

/// What must not depend on the order, with the user's id taken out.
fn state(conn: &mut PgConnection, user: UserId) -> String {
    let subscription = find(conn, user);
    let plan = UserPlan::find_by_user(conn, user).unwrap().unwrap();
    let person = User::find(conn, user).unwrap().unwrap();
    let payments = SubscriptionTransaction::list_by_user(conn, user, Page::first(100)).unwrap();
    let payments: BTreeSet<_> = payments
        .iter()
        .map(|row| {
            format!(
                "{:?} {} {} {} {:?} {:?}",
                row.razorpay_payment_id,
                row.amount,
                row.net_amount,
                row.status,
                row.failure_reason,
                row.processed_at
            )
        })
        .collect();
    let s = subscription;
    format!(
        "{:#?}",
        (
            (s.status, s.current_period_start, s.current_period_end),
            (s.cancel_at_period_end, s.cancelled_at, s.status_event_at),
            (s.paused_at, s.resume_at),
            (s.failed_payment_count, s.last_payment_attempt),
            (plan.plan_type, plan.expires_at, plan.payment_status),
            (plan.subscription_id, plan.customer_id),
            person.razorpay_customer_id,
            payments,
        )
    )
    .replace(&user.to_string(), "USER")
}

fn find(conn: &mut PgConnection, user: UserId) -> UserSubscription {
    UserSubscription::find_by_razorpay_id(conn, &format!("sub_{user}"))
        .unwrap()
        .unwrap()
}

/// A history as the gateway could tell it, an event a week. `choices` that don't fit are left out.
fn history(base: DateTime<Utc>, choices: &[u8]) -> Vec<Told> {
    let first = Paid {
        number: 0,
        at: base,
    };
    let mut told = vec![
        Told {
            at: base,
            what: What::Authenticated,
        },
        Told {
            at: base,
            what: What::Activated,
        },
    ];
    let (mut status, mut ends, mut at) = (Active, false, base);
    let (mut period, mut number) = (0, 0);
    let (mut failed, mut captured) = (None, Some((first, 100)));
    for choice in choices {
        at += days(7);
        let what = match (choice, status) {
            (0 | 1, Active | PastDue | Halted) => {
                number += 1;
                period += 1;
                let paid = Paid { number, at };
                (status, captured, failed) = (Active, Some((paid, 100)), None);
                What::Renewed(period, paid)
            }
            (2 | 3, Active | PastDue) => {
                number += 1;
                let paid = Paid { number, at };
                (status, failed) = (PastDue, Some(paid));
                What::Failed(paid)
            }
            // The payment that has failed succeeds after all.
            (4, PastDue) => {
                let Some(paid) = failed.take() else { continue };
                period += 1;
                (status, captured) = (Active, Some((paid, 100)));
                What::Renewed(period, paid)
            }
            (5, Active) => {
                status = Paused;
                What::Paused
            }
            (5 | 6, Paused) => {
                status = Active;
                What::Resumed
            }
            (6, PastDue) => {
                status = Halted;
                What::Halted
            }
            (7, Active | PastDue) if !ends => {
                ends = true;
                What::EndsWithPeriod
            }
            (8 | 9, _) => {
                let Some((paid, left)) = captured.filter(|(_, left)| *left > 0) else {
                    continue;
                };
                let amount = if *choice == 8 { 40.min(left) } else { left };
                captured = Some((paid, left - amount));
                What::Refunded(paid, amount)
            }
            (10, Active | PastDue | Paused | Halted) => {
                status = Cancelled;
                What::Cancelled
            }
            (11, Active) => {
                status = Completed;
                What::Completed
            }
            _ => continue,
        };
        told.push(Told { at, what });
    }
    told
}

#[test]
fn the_order_of_arrival_does_not_matter() {
    let database = database();
    let base = base();
    let histories = vec(0..12_u8, 0..10).prop_flat_map(move |choices| {
        let told = history(base, &choices);
        let repeated = vec(0..told.len(), 0..told.len());
        repeated.prop_flat_map(move |repeated| {
            let arrival: Vec<Told> = told
                .iter()
                .copied()
                .chain(repeated.iter().map(|index| told[*index]))
                .collect();
            (Just(told.clone()), Just(arrival).prop_shuffle())
        })
    });
    let config = Config {
        cases: 24,
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new(config)
        .run(&histories, |(told, arrival)| {
            let conn = &mut database.connect();
            let (one, other) = (subscribed(conn), subscribed(conn));
            for event in &told {
                apply_from(conn, one, base, event).unwrap();
            }
            for event in &arrival {
                apply_from(conn, other, base, event).unwrap();
            }
            prop_assert_eq!(state(conn, one), state(conn, other));
            Ok(())
        })
        .unwrap();
}

/// The plan's type, end and payment status.
fn plan(
    conn: &mut PgConnection,
    user: UserId,
) -> (PlanType, Option<DateTime<Utc>>, PlanPaymentStatus) {
    let plan = UserPlan::find_by_user(conn, user).unwrap().unwrap();
    (plan.plan_type, plan.expires_at, plan.payment_status)
}

#[test]
fn a_subscriptions_life() {
    let database = database();
    let conn = &mut database.connect();
    let user = subscribed(conn);
    let gmail = service(conn, "gmail", 4001);
    let base = (Utc::now() - days(10)).trunc_subsecs(0);
    let mut number = 0;
    let tell = |conn: &mut PgConnection, day, what| {
        let told = Told {
            at: base + days(day),
            what,
        };
        apply_from(conn, user, base, &told).unwrap()
    };
    let mut paid = |day| {
        number += 1;
        Paid {
            number,
            at: base + days(day),
        }
    };
    let free = |why| (PlanType::Free, None, why);
    let pro = |day, why| (PlanType::Pro, Some(base + days(day)), why);

    let applied = tell(conn, 0, What::Authenticated);
    assert_eq!(applied.subscription.status, Authenticated);
    assert_eq!(plan(conn, user), free(PlanPaymentStatus::None));

    // Paid until the period ends, and three days of grace.
    let applied = tell(conn, 0, What::Activated);
    assert_eq!(applied.subscription.status, Active);
    assert_eq!(applied.subscription.current_period_end, base + days(30));
    assert_eq!(applied.payment.unwrap().net_amount, 98);
    assert_eq!(plan(conn, user), pro(33, PlanPaymentStatus::Active));
    let customer = format!("cust_{user}");
    assert_eq!(applied.plan.customer_id.as_ref(), Some(&customer));
    let person = User::find(conn, user).unwrap().unwrap();
    assert_eq!(person.razorpay_customer_id, Some(customer));
    for _ in 0..2 {
        create(conn, user, gmail).unwrap();
    }

    let applied = tell(conn, 1, What::Failed(paid(1)));
    assert_eq!(applied.subscription.failed_payment_count, 1);
    assert_eq!(plan(conn, user), pro(33, PlanPaymentStatus::PastDue));
    let second = paid(2);
    let applied = tell(conn, 2, What::Renewed(1, second));
    assert_eq!(applied.subscription.failed_payment_count, 0);
    assert_eq!(plan(conn, user), pro(63, PlanPaymentStatus::Active));
    let applied = tell(conn, 3, What::Paused);
    assert_eq!(applied.subscription.pause_count, 1);
    assert_eq!(plan(conn, user), pro(60, PlanPaymentStatus::Active));
    tell(conn, 4, What::Resumed);
    assert_eq!(plan(conn, user), pro(63, PlanPaymentStatus::Active));
    tell(conn, 5, What::EndsWithPeriod);
    assert_eq!(plan(conn, user), pro(60, PlanPaymentStatus::Active));
    let applied = tell(conn, 6, What::Cancelled);
    assert_eq!(applied.subscription.cancelled_at, Some(base + days(6)));
    assert_eq!(plan(conn, user), pro(60, PlanPaymentStatus::Cancelled));
    assert_eq!(applied.switched_off, []);

    // A part is nothing; the whole ends what was paid for.
    tell(conn, 7, What::Refunded(second, 40));
    assert_eq!(plan(conn, user), pro(60, PlanPaymentStatus::Cancelled));
    let applied = tell(conn, 8, What::Refunded(second, 60));
    assert_eq!(applied.payment.unwrap().status, TransactionStatus::Refunded);
    assert_eq!(plan(conn, user), free(PlanPaymentStatus::Cancelled));
    assert_eq!(applied.switched_off.len(), 2);
}

#[test]
fn a_halt_ends_the_plan_and_a_payment_begins_it_again() {
    let database = database();
    let conn = &mut database.connect();
    let (user, base) = (subscribed(conn), base());
    let tell = |conn: &mut PgConnection, day, what| {
        let told = Told {
            at: base + days(day),
            what,
        };
        apply_from(conn, user, base, &told).unwrap()
    };
    tell(conn, 0, What::Activated);
    tell(conn, 0, What::Halted);
    let free = (PlanType::Free, None, PlanPaymentStatus::Failed);
    assert_eq!(plan(conn, user), free);
    let paid = Paid {
        number: 1,
        at: base + days(50),
    };
    tell(conn, 50, What::Renewed(2, paid));
    assert_eq!(plan(conn, user).0, PlanType::Pro);
}

#[test]
fn another_plan_stays_as_it_is() {
    let database = database();
    let conn = &mut database.connect();
    let base = base();
    let activated = Told {
        at: base + days(50),
        what: What::Renewed(
            2,
            Paid {
                number: 1,
                at: base,
            },
        ),
    };
    let cancelled = Told {
        at: base + days(55),
        what: What::Cancelled,
    };
    let halted = Told {
        at: base + days(51),
        what: What::Halted,
    };
    // Granted for ever, and for longer than is paid.
    for expires_at in [None, Some(base + days(300))] {
        let user = subscribed(conn);
        upgrade(conn, user, expires_at);
        for told in [&activated, &halted, &cancelled] {
            let applied = apply_from(conn, user, base, told).unwrap();
            assert_eq!(applied.plan.expires_at, expires_at);
            assert_eq!(applied.plan.plan_type, PlanType::Pro);
        }
    }
    // Granted for a shorter time.
    let shorter = subscribed(conn);
    upgrade(conn, shorter, Some(base + days(70)));
    let applied = apply_from(conn, shorter, base, &activated).unwrap();
    assert_eq!(applied.plan.expires_at, Some(base + days(93)));

    // A successor's plan isn't touched by what is told of the old one.
    let old = find(conn, shorter);
    let new = NewUserSubscription::new(shorter);
    UserSubscription::upgrade(conn, old.id, &new).unwrap();
    let applied = apply_from(conn, shorter, base, &halted).unwrap();
    assert_eq!(applied.subscription.status, Upgraded);
    assert_eq!(applied.plan.expires_at, Some(base + days(93)));
}

/// Neither the free plan nor a period that nobody has paid is worth a plan.
#[test]
fn what_is_not_paid_gives_no_plan() {
    let database = database();
    let conn = &mut database.connect();
    let base = base();
    let free = subscribed(conn);
    diesel::update(user_subscriptions::table.filter(user_subscriptions::user_id.eq(free)))
        .set(user_subscriptions::plan_code.eq(SubscriptionPlan::Free))
        .execute(conn)
        .unwrap();
    let paid = Paid {
        number: 1,
        at: base + days(50),
    };
    let renewed = Told {
        at: paid.at,
        what: What::Renewed(2, paid),
    };
    let none = (PlanType::Free, None, PlanPaymentStatus::None);
    apply_from(conn, free, base, &renewed).unwrap();
    assert_eq!(plan(conn, free), none);

    let unpaid = subscribed(conn);
    let failed = Told {
        at: base + days(49),
        what: What::Failed(Paid {
            number: 0,
            at: base,
        }),
    };
    let applied = apply_from(conn, unpaid, base, &failed).unwrap();
    assert_eq!(applied.subscription.status, PastDue);
    assert_eq!(plan(conn, unpaid), none);
    apply_from(conn, unpaid, base, &renewed).unwrap();
    assert_eq!(plan(conn, unpaid).0, PlanType::Pro);
}

#[test]
fn what_is_refused_changes_nothing() {
    let database = database();
    let conn = &mut database.connect();
    let base = base();
    let (user, other) = (subscribed(conn), subscribed(conn));
    let activated = Told {
        at: base,
        what: What::Activated,
    };
    let live = NewUserSubscription::new(user);
    let live = UserSubscription::start(conn, &live, Active).unwrap();
    let before = state(conn, user);
    conn.transaction::<_, GatewayError, _>(|conn| {
        let result = apply_from(conn, UserId::new(), base, &activated);
        assert!(matches!(result, Err(GatewayError::NotFound)));
        let result = apply_from(conn, user, base, &activated);
        assert!(matches!(result, Err(GatewayError::LiveExists)));
        assert_eq!(state(conn, user), before);
        Ok(())
    })
    .unwrap();
    let none = UserSubscriptionChangeset::default();
    UserSubscription::change_status(conn, live.id, Active, Cancelled, &none).unwrap();
    apply_from(conn, user, base, &activated).unwrap();

    let renewed = Told {
        at: base + days(55),
        what: What::Renewed(
            2,
            Paid {
                number: 1,
                at: base + days(55),
            },
        ),
    };
    let taken = format!("cust_{other}");
    diesel::update(user_plans::table.filter(user_plans::user_id.eq(user)))
        .set(user_plans::customer_id.eq(&taken))
        .execute(conn)
        .unwrap();
    let before = state(conn, other);
    let result = apply_from(conn, other, base, &renewed);
    assert!(matches!(result, Err(GatewayError::CustomerTaken)));
    assert_eq!(state(conn, other), before);

    // A refund of more than the payment.
    let refund = Told {
        at: base + days(56),
        what: What::Refunded(
            Paid {
                number: 0,
                at: base,
            },
            101,
        ),
    };
    let result = apply_from(conn, user, base, &refund);
    let exceeds = PaymentError::ExceedsPayment { refundable: 100 };
    match result {
        Err(GatewayError::Payment(error)) => assert_eq!(error.to_string(), exceeds.to_string()),
        other => panic!("{other:?}"),
    }
}

/// Runs each event on as many connections as `times`, all at once, and compares with the order.
fn at_once_as_in_order(database: &TestDatabase, told: &[Told], times: usize) {
    let conn = &mut database.connect();
    let base = told[0].at;
    for isolation in ISOLATIONS {
        let (one, other) = (subscribed(conn), subscribed(conn));
        for event in told {
            apply_from(conn, one, base, event).unwrap();
        }
        at_once(database, told.len() * times, |number, conn| {
            let event = &told[number % told.len()];
            retry_transaction(conn, isolation, |conn| apply_from(conn, other, base, event))
                .unwrap();
        });
        assert_eq!(state(conn, one), state(conn, other), "{isolation:?}");
    }
}

#[test]
fn one_event_on_16_connections_counts_once() {
    let database = database();
    let told = [Told {
        at: base(),
        what: What::Activated,
    }];
    at_once_as_in_order(&database, &told, 16);
}

#[test]
fn different_events_of_one_subscription_at_once() {
    let database = database();
    // Renewed, failed, refunded in part, failed again and paid, paused, cancelled.
    let told = history(base(), &[0, 2, 8, 3, 4, 0, 5, 10, 9]);
    assert_eq!(told.len(), 11);
    at_once_as_in_order(&database, &told, 1);
}

/// A subscription in this state, whose period ended some days ago.
fn ended(conn: &mut PgConnection, status: SubscriptionStatus, days_ago: i64, sets: &str) -> UserId {
    let (user, base) = (subscribed(conn), Utc::now() - days(30 + days_ago));
    let told = Told {
        at: base,
        what: What::Activated,
    };
    apply_from(conn, user, base, &told).unwrap();
    diesel::sql_query(format!(
        "UPDATE user_subscriptions SET status = '{status}' {sets} WHERE user_id = '{user}'"
    ))
    .execute(conn)
    .unwrap();
    // As it was before the end.
    diesel::update(user_plans::table.filter(user_plans::user_id.eq(user)))
        .set((
            user_plans::plan_type.eq(PlanType::Pro),
            user_plans::max_instances.eq(None::<i32>),
            user_plans::subscription_id.eq(format!("sub_{user}")),
        ))
        .execute(conn)
        .unwrap();
    user
}

#[test]
fn a_sweep_ends_what_is_over() {
    let database = database();
    let conn = &mut database.connect();
    let paused = ", paused_at = now() - interval '9 days', resume_at = now() - interval '1 day'";
    let later = ", paused_at = now(), resume_at = now() + interval '1 day'";
    let over = [
        (
            ended(conn, Active, 1, ", cancel_at_period_end = true"),
            Cancelled,
            PlanType::Free,
        ),
        (ended(conn, PastDue, 4, ""), Halted, PlanType::Free),
        (ended(conn, Paused, -9, paused), Active, PlanType::Pro),
        (
            ended(
                conn,
                Created,
                1,
                ", created_at = now() - interval '31 days'",
            ),
            Cancelled,
            PlanType::Free,
        ),
    ];
    let not_over = [
        ended(conn, Active, -1, ", cancel_at_period_end = true"),
        ended(conn, Active, 9, ""),
        ended(conn, PastDue, 2, ""),
        ended(conn, PastDue, 40, ", grace_period_days = 2147483647"),
        ended(conn, Paused, 1, later),
        ended(conn, Paused, 1, ""),
        ended(conn, Created, 1, ""),
        ended(
            conn,
            Authenticated,
            1,
            ", created_at = now() - interval '99 days'",
        ),
    ];
    let kept: Vec<_> = not_over.iter().map(|user| find(conn, *user)).collect();
    let mut swept = BTreeSet::new();
    while let Some(row) = UserSubscription::sweep(conn).unwrap() {
        assert!(swept.insert(row.subscription.user_id));
    }
    assert_eq!(swept, over.iter().map(|(user, ..)| *user).collect());
    for (user, status, plan_type) in over {
        let row = find(conn, user);
        assert_eq!(row.status, status);
        assert_eq!((row.paused_at, row.resume_at), (None, None));
        assert_eq!(row.cancelled_at.is_some(), status == Cancelled);
        if row.status != Cancelled || row.current_period_end > Utc::now() {
            assert_eq!(plan(conn, user).0, plan_type);
        }
    }
    for row in kept {
        assert_eq!(UserSubscription::find(conn, row.id).unwrap(), Some(row));
    }

    // A repeated event begins no pause again.
    let user = over[2].0;
    let row = find(conn, user);
    let again = Told {
        at: row.status_event_at.unwrap() - days(1),
        what: What::Paused,
    };
    let applied = apply_from(conn, user, row.current_period_start, &again).unwrap();
    assert_eq!(applied.subscription.status, Active);
}

#[test]
fn eight_workers_sweep_each_once() {
    let database = database();
    let conn = &mut database.connect();
    let due: BTreeSet<SubscriptionId> = (0..24)
        .map(|number| {
            let user = if number % 2 == 0 {
                ended(conn, Active, 1, ", cancel_at_period_end = true")
            } else {
                ended(conn, PastDue, 4, "")
            };
            find(conn, user).id
        })
        .collect();
    let swept = at_once(&database, 8, |_, conn| {
        let mut swept = Vec::new();
        while let Some(row) = UserSubscription::sweep(conn).unwrap() {
            swept.push(row.subscription.id);
        }
        swept
    })
    .concat();
    assert_eq!(swept.len(), 24);
    assert_eq!(swept.into_iter().collect::<BTreeSet<_>>(), due);
}

/// A sweep and a renewal at once: the subscription is halted or active, and so is the plan.
#[test]
fn a_sweep_races_a_payment() {
    let database = database();
    let conn = &mut database.connect();
    for isolation in ISOLATIONS {
        let user = ended(conn, PastDue, 4, "");
        let period = find(conn, user);
        let renewed = Told {
            at: Utc::now(),
            what: What::Renewed(
                1,
                Paid {
                    number: 1,
                    at: Utc::now(),
                },
            ),
        };
        at_once(&database, 8, |number, conn| {
            if number % 2 == 0 {
                let sweep = |conn: &mut PgConnection| UserSubscription::sweep(conn);
                retry_transaction(conn, isolation, sweep).unwrap();
            } else {
                retry_transaction(conn, isolation, |conn| {
                    apply_from(conn, user, period.current_period_start, &renewed)
                })
                .unwrap();
            }
        });
        assert_eq!(find(conn, user).status, Active);
        assert_eq!(plan(conn, user).0, PlanType::Pro);
    }
}

#[test]
fn a_sweep_reads_its_indexes() {
    let database = database();
    database
        .psql(
            "INSERT INTO users (first_name, last_name, email)
             SELECT 'Asha', '', n || '@example.in' FROM generate_series(1, 20000) AS n;
             INSERT INTO user_subscriptions (user_id) SELECT id FROM users;
             INSERT INTO user_subscriptions (user_id, status)
             SELECT id, 'created' FROM users, generate_series(1, 2);
             INSERT INTO user_subscriptions (user_id, status)
             SELECT id, 'completed' FROM users, generate_series(1, 2);
             UPDATE user_subscriptions SET status = 'past_due'
              WHERE status = 'active' AND get_byte(uuid_send(id), 0) < 32;
             UPDATE user_subscriptions SET status = 'paused', resume_at = now() + interval '1 day'
              WHERE status = 'active' AND get_byte(uuid_send(id), 0) < 64;
             UPDATE user_subscriptions SET cancel_at_period_end = true WHERE status <> 'created';
             VACUUM ANALYZE",
        )
        .unwrap();
    let conn = &mut database.connect();
    let statements = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&statements);
    conn.set_instrumentation(move |event: InstrumentationEvent<'_>| {
        if let InstrumentationEvent::StartQuery { query, .. } = event {
            seen.lock().unwrap().push(query.to_string());
        }
    });
    assert_eq!(UserSubscription::sweep(conn).unwrap(), None);
    let statements = statements.lock().unwrap().clone();
    for index in [
        "user_subscriptions_cancel_at_period_end_idx",
        "user_subscriptions_past_due_idx",
        "user_subscriptions_resume_at_idx",
        "user_subscriptions_created_at_idx",
    ] {
        let plans = statements.iter().filter(|sql| sql.starts_with("SELECT"));
        let plans: Vec<String> = plans
            .map(|sql| {
                let sql = sql.split(" -- binds").next().unwrap().replace("$1", "1");
                database.psql(&format!("EXPLAIN {sql}")).unwrap()
            })
            .collect();
        assert_eq!(plans.len(), 4);
        let reads = |plan: &&String| plan.contains(index);
        assert_eq!(plans.iter().filter(reads).count(), 1, "{index}: {plans:#?}");
        assert!(!plans.concat().contains("Seq Scan"), "{plans:#?}");
    }
}

/// The recipe of the docs, by its index.
#[test]
fn the_subscription_to_show() {
    let database = database();
    let conn = &mut database.connect();
    let user = subscribed(conn);
    let show = |conn: &mut PgConnection| {
        user_subscriptions::table
            .filter(user_subscriptions::user_id.eq(user))
            .filter(user_subscriptions::status.ne_all([Completed, Halted, Upgraded, Replaced]))
            .filter(
                user_subscriptions::status
                    .ne(Cancelled)
                    .or(user_subscriptions::current_period_end.gt(diesel::dsl::now)),
            )
            .order((
                user_subscriptions::created_at.desc(),
                user_subscriptions::id.desc(),
            ))
            .select(user_subscriptions::status)
            .first(conn)
            .optional()
            .unwrap()
    };
    assert_eq!(show(conn), Some(Created));
    let base = base();
    let activated = Told {
        at: base,
        what: What::Activated,
    };
    apply_from(conn, user, base, &activated).unwrap();
    let cancelled = Told {
        at: base + days(1),
        what: What::Cancelled,
    };
    apply_from(conn, user, base, &cancelled).unwrap();
    assert_eq!(show(conn), None);
    let paid = Paid {
        number: 1,
        at: base + days(50),
    };
    let renewed = Told {
        at: base + days(50),
        what: What::Renewed(2, paid),
    };
    apply_from(conn, user, base, &renewed).unwrap();
    assert_eq!(show(conn), Some(Cancelled));
}
