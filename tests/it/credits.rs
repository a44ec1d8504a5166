//! Credits: granted once per source, never spent twice.

use std::cell::RefCell;

use bruhmcp_db::enums::CreditSource;
use bruhmcp_db::ids::{CreditId, UserId};
use bruhmcp_db::models::*;
use bruhmcp_db::{ConstraintViolation, Isolation, Page, is_transient, retry_transaction};
use chrono::{DateTime, TimeDelta, Utc};
use diesel::pg::PgConnection;
use diesel::prelude::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::fixtures::user;
use crate::support::{at_once, database};

fn credit(user_id: UserId, amount: i64) -> NewAccountCredit<'static> {
    NewAccountCredit {
        source_type: Some(CreditSource::Promotion),
        ..NewAccountCredit::new(user_id, amount)
    }
}

fn from_source(
    user_id: UserId,
    source_type: CreditSource,
    amount: i64,
) -> NewAccountCredit<'static> {
    NewAccountCredit {
        source_type: Some(source_type),
        source_id: Some("rfnd_1"),
        ..credit(user_id, amount)
    }
}

fn grant(conn: &mut PgConnection, new: &NewAccountCredit<'_>) -> AccountCredit {
    match AccountCredit::grant(conn, new).unwrap() {
        Recorded::New(row) => row,
        Recorded::Existing(row) => panic!("{row:?}"),
    }
}

fn expiring(user_id: UserId, amount: i64, expires_at: DateTime<Utc>) -> NewAccountCredit<'static> {
    NewAccountCredit {
        expires_at: Some(expires_at),
        ..credit(user_id, amount)
    }
}

fn balance(conn: &mut PgConnection, user: UserId) -> i64 {
    AccountCredit::balance(conn, user, "INR").unwrap()
}

fn in_days(days: i64) -> DateTime<Utc> {
    Utc::now() + TimeDelta::days(days)
}

#[test]
fn a_source_is_credited_once() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    for (source, sum) in [(CreditSource::Refund, 50), (CreditSource::Downgrade, 100)] {
        let granted = at_once(&database, 32, |_, conn| {
            AccountCredit::grant(conn, &from_source(user, source, 50)).unwrap()
        });
        let (new, existing): (Vec<_>, Vec<_>) = granted
            .into_iter()
            .partition(|outcome| matches!(outcome, Recorded::New(_)));
        let [Recorded::New(row)] = &new[..] else {
            panic!("{new:?}")
        };
        assert_eq!(existing.len(), 31);
        for outcome in existing {
            assert_eq!(outcome, Recorded::Existing(row.clone()));
        }
        assert_eq!(balance(conn, user), sum);
    }
}

#[test]
fn another_credit_of_the_same_source_is_not_accepted() {
    let database = database();
    let conn = &mut database.connect();
    let (asha, ravi) = (user(conn), user(conn));
    let first = from_source(asha, CreditSource::Refund, 50);
    let row = grant(conn, &first);
    let in_currency = |currency| NewAccountCredit {
        currency: Some(currency),
        ..first.clone()
    };
    for other in [
        from_source(ravi, CreditSource::Refund, 50),
        from_source(asha, CreditSource::Refund, 51),
        in_currency("USD"),
    ] {
        match AccountCredit::grant(conn, &other) {
            Err(CreditError::Differs(existing)) => assert_eq!(*existing, row),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(
        AccountCredit::grant(conn, &in_currency("INR")).unwrap(),
        Recorded::Existing(row)
    );
    // Promotions and adjustments are granted each time.
    for source in [CreditSource::Promotion, CreditSource::Adjustment] {
        for _ in 0..2 {
            grant(conn, &from_source(ravi, source, 1));
        }
    }
    assert_eq!(balance(conn, ravi), 4);
    match AccountCredit::grant(conn, &credit(asha, 0)) {
        Err(CreditError::Database(error)) => assert!(
            ConstraintViolation::of(&error)
                .unwrap()
                .is("account_credits_amount_check")
        ),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_balance_can_be_spent() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    assert_eq!(balance(conn, user), 0);
    grant(conn, &credit(user, 100));
    grant(conn, &credit(user, -30));
    grant(conn, &expiring(user, 5, in_days(1)));
    grant(conn, &expiring(user, 1000, in_days(-1)));
    grant(
        conn,
        &NewAccountCredit {
            currency: Some("USD"),
            ..credit(user, 7)
        },
    );
    assert_eq!(balance(conn, user), 75);
    assert_eq!(AccountCredit::balance(conn, user, "USD").unwrap(), 7);
    match AccountCredit::spend(conn, user, "INR", 76) {
        Err(CreditError::Insufficient { balance: 75 }) => {}
        other => panic!("{other:?}"),
    }
    for amount in [0, -1, i64::MIN] {
        let result = AccountCredit::spend(conn, user, "INR", amount);
        assert!(matches!(result, Err(CreditError::NotPositive)));
    }
    AccountCredit::spend(conn, user, "INR", 75).unwrap();
    assert_eq!(balance(conn, user), 0);
    assert_eq!(AccountCredit::balance(conn, user, "USD").unwrap(), 7);
    let result = AccountCredit::spend(conn, UserId::new(), "INR", 1);
    assert!(matches!(
        result,
        Err(CreditError::Insufficient { balance: 0 })
    ));
}

#[test]
fn the_earliest_expiry_is_spent_first() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let never = grant(conn, &credit(user, 100));
    let late = grant(
        conn,
        &NewAccountCredit {
            description: Some("Diwali"),
            ..expiring(user, 100, in_days(9))
        },
    );
    let soon = grant(conn, &expiring(user, 100, in_days(1)));
    let debit = grant(conn, &credit(user, -20));

    // 30 and the debit of 20 are taken from the credit that expires first.
    let spent = AccountCredit::spend(conn, user, "INR", 30).unwrap();
    let used: Vec<_> = spent.used.iter().map(|credit| credit.id).collect();
    assert_eq!(used, [soon.id, debit.id]);
    assert!(
        spent
            .used
            .iter()
            .all(|credit| credit.is_used && credit.used_at.is_some())
    );
    let rest = spent.rest.unwrap();
    assert_eq!((rest.amount, rest.expires_at), (50, soon.expires_at));
    assert_eq!(rest.source_type, Some(CreditSource::Adjustment));
    assert_eq!(rest.source_id, Some(soon.id.to_string()));
    assert_eq!(balance(conn, user), 250);

    let spent = AccountCredit::spend(conn, user, "INR", 51).unwrap();
    let used: Vec<_> = spent.used.iter().map(|credit| credit.id).collect();
    assert_eq!(used, [rest.id, late.id]);
    let rest = spent.rest.unwrap();
    assert_eq!(
        (rest.amount, rest.description.as_deref()),
        (99, Some("Diwali"))
    );

    let spent = AccountCredit::spend(conn, user, "INR", 199).unwrap();
    let used: Vec<_> = spent.used.iter().map(|credit| credit.id).collect();
    assert_eq!((used, spent.rest), (vec![rest.id, never.id], None));
    assert_eq!(balance(conn, user), 0);
}

#[test]
fn an_insufficient_balance_changes_nothing() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    grant(conn, &credit(user, 10));
    grant(conn, &credit(user, -40));
    let before = AccountCredit::list_by_user(conn, user, Page::first(10)).unwrap();
    match AccountCredit::spend(conn, user, "INR", 1) {
        Err(CreditError::Insufficient { balance: -30 }) => {}
        other => panic!("{other:?}"),
    }
    let after = AccountCredit::list_by_user(conn, user, Page::first(10)).unwrap();
    assert_eq!(after, before);
}

#[test]
fn a_balance_out_of_range_is_an_error() {
    let database = database();
    let conn = &mut database.connect();
    let (asha, ravi) = (user(conn), user(conn));
    for _ in 0..2 {
        grant(conn, &credit(asha, i64::MAX));
        grant(conn, &credit(ravi, i64::MIN));
    }
    for user in [asha, ravi] {
        let result = AccountCredit::balance(conn, user, "INR");
        assert!(matches!(result, Err(CreditError::OutOfRange)));
    }
    let result = AccountCredit::spend(conn, ravi, "INR", 1);
    assert!(matches!(result, Err(CreditError::OutOfRange)));
    // A balance out of range can still be spent.
    for _ in 0..2 {
        AccountCredit::spend(conn, asha, "INR", i64::MAX).unwrap();
    }
    assert_eq!(balance(conn, asha), 0);
}

#[test]
fn credit_is_never_spent_twice() {
    let database = database();
    let conn = &mut database.connect();
    // At the higher levels each commit makes the others start again: fewer threads save time.
    for (isolation, threads) in [
        (Isolation::ReadCommitted, 32),
        (Isolation::RepeatableRead, 12),
        (Isolation::Serializable, 12),
    ] {
        let user = user(conn);
        grant(conn, &expiring(user, 70, in_days(1)));
        grant(conn, &credit(user, 60));
        grant(conn, &credit(user, -30));
        let spent = at_once(&database, threads, |_, conn| {
            loop {
                let result = retry_transaction(conn, isolation, |conn| {
                    // Its snapshot is older than its lock.
                    AccountCredit::balance(conn, user, "INR")?;
                    AccountCredit::spend(conn, user, "INR", 9)
                });
                match result {
                    Ok(_) => return 9,
                    Err(CreditError::Insufficient { balance }) => {
                        assert_eq!(balance, 1);
                        return 0;
                    }
                    Err(error) if is_transient(&error) => {}
                    Err(error) => panic!("{error:?}"),
                }
            }
        });
        assert_eq!(spent.into_iter().sum::<i64>(), 99, "{isolation:?}");
        assert_eq!(balance(conn, user), 1);
    }
}

#[derive(Debug, Clone)]
enum Step {
    Grant(i64, Option<i64>),
    Spend(i64),
}

#[test]
fn money_is_conserved() {
    let database = database();
    let conn = RefCell::new(database.connect());
    let step = prop_oneof![
        (1..100_i64, prop::option::of(1..9_i64)).prop_map(|(a, days)| Step::Grant(a, days)),
        (-40..0_i64).prop_map(|amount| Step::Grant(amount, None)),
        (1..120_i64).prop_map(Step::Spend),
    ];
    TestRunner::new(Config::with_cases(32))
        .run(&prop::collection::vec(step, 1..20), |steps| {
            let conn = &mut *conn.borrow_mut();
            let user = user(conn);
            let (mut granted, mut spent) = (0, 0);
            for step in steps {
                match step {
                    Step::Grant(amount, days) => {
                        let new = NewAccountCredit {
                            expires_at: days.map(in_days),
                            ..credit(user, amount)
                        };
                        grant(conn, &new);
                        granted += amount;
                    }
                    Step::Spend(amount) => match AccountCredit::spend(conn, user, "INR", amount) {
                        Ok(done) => {
                            prop_assert!(amount <= granted - spent);
                            let used: i64 = done.used.iter().map(|row| row.amount).sum();
                            let rest = done.rest.map_or(0, |rest| rest.amount);
                            prop_assert_eq!(used - rest, amount);
                            spent += amount;
                        }
                        Err(CreditError::Insufficient { balance }) => {
                            prop_assert!(amount > balance);
                            prop_assert_eq!(balance, granted - spent);
                        }
                        Err(error) => prop_assert!(false, "{:?}", error),
                    },
                }
                prop_assert_eq!(balance(conn, user), granted - spent);
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn history_comes_in_pages() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let mut ids: Vec<CreditId> = conn
        .transaction::<_, diesel::result::Error, _>(|conn| {
            Ok((0..5)
                .map(|_| {
                    let new = NewAccountCredit {
                        id: Some(CreditId::new()),
                        ..credit(user, 1)
                    };
                    grant(conn, &new).id
                })
                .collect())
        })
        .unwrap();
    ids.reverse();
    let first = AccountCredit::list_by_user(conn, user, Page::first(3)).unwrap();
    let second =
        AccountCredit::list_by_user(conn, user, Page::after(first[2].cursor(), 3)).unwrap();
    let seen: Vec<_> = first.iter().chain(&second).map(|row| row.id).collect();
    assert_eq!(seen, ids);
}
