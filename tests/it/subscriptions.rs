//! Subscriptions: one live subscription per user, and no lost change.

use std::collections::BTreeSet;

use bruhmcp_db::Page;
use bruhmcp_db::enums::SubscriptionStatus::{self, *};
use bruhmcp_db::ids::{SubscriptionId, UserId};
use bruhmcp_db::models::*;
use bruhmcp_db::schema::users;
use chrono::{TimeDelta, Utc};
use diesel::pg::PgConnection;
use diesel::prelude::*;

use crate::fixtures::user;
use crate::support::{at_once, database};

fn start(
    conn: &mut PgConnection,
    user_id: UserId,
    status: SubscriptionStatus,
) -> Result<UserSubscription, SubscriptionError> {
    UserSubscription::start(conn, &NewUserSubscription::new(user_id), status)
}

fn change(
    conn: &mut PgConnection,
    id: SubscriptionId,
    from: SubscriptionStatus,
    to: SubscriptionStatus,
) -> Result<UserSubscription, SubscriptionError> {
    UserSubscription::change_status(conn, id, from, to, &UserSubscriptionChangeset::default())
}

#[test]
fn a_user_has_one_live_subscription() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    assert_eq!(UserSubscription::current(conn, user).unwrap(), None);
    let started = at_once(&database, 32, |_, conn| start(conn, user, Active));
    let mut live: Vec<_> = started
        .into_iter()
        .filter_map(|result| match result {
            Ok(row) => Some(row),
            Err(SubscriptionError::LiveExists) => None,
            Err(error) => panic!("{error:?}"),
        })
        .collect();
    assert_eq!(live.len(), 1);
    assert_eq!(UserSubscription::current(conn, user).unwrap(), live.pop());
    // An unpaid subscription may exist beside it, but can't become live.
    let created = start(conn, user, Created).unwrap();
    let result = conn.transaction(|conn| change(conn, created.id, Created, Active));
    assert!(matches!(result, Err(SubscriptionError::LiveExists)));
}

#[test]
fn a_refused_start_leaves_the_transaction_usable() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    start(conn, user, PastDue).unwrap();
    conn.transaction::<_, SubscriptionError, _>(|conn| {
        let result = start(conn, user, Active);
        assert!(matches!(result, Err(SubscriptionError::LiveExists)));
        let with_id = NewUserSubscription {
            razorpay_subscription_id: Some("sub_1"),
            ..NewUserSubscription::new(user)
        };
        UserSubscription::start(conn, &with_id, Created)?;
        let result = UserSubscription::start(conn, &with_id, Created);
        assert!(matches!(result, Err(SubscriptionError::GatewayIdTaken)));
        assert!(UserSubscription::current(conn, user)?.is_some());
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_gateways_id_is_one_subscription() {
    let database = database();
    let conn = &mut database.connect();
    let (asha, ravi) = (user(conn), user(conn));
    let with_id = |user| NewUserSubscription {
        razorpay_subscription_id: Some("sub_1"),
        ..NewUserSubscription::new(user)
    };
    let row = UserSubscription::start(conn, &with_id(asha), Active).unwrap();
    let result = UserSubscription::start(conn, &with_id(ravi), Active);
    assert!(matches!(result, Err(SubscriptionError::GatewayIdTaken)));
    let found = UserSubscription::find_by_razorpay_id(conn, "sub_1").unwrap();
    assert_eq!(found, Some(row));
    let found = UserSubscription::find_by_razorpay_id(conn, "sub_2").unwrap();
    assert_eq!(found, None);
    let result = start(conn, UserId::new(), Active);
    assert!(matches!(result, Err(SubscriptionError::Database(_))));
}

#[test]
fn a_status_carries_what_follows_from_it() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let id = start(conn, user, Created).unwrap().id;
    assert_eq!(change(conn, id, Created, Active).unwrap().status, Active);

    let until = Utc::now() + TimeDelta::days(7);
    let pause = UserSubscriptionChangeset {
        resume_at: Some(Some(until)),
        ..Default::default()
    };
    let paused = UserSubscription::change_status(conn, id, Active, Paused, &pause).unwrap();
    assert_eq!((paused.status, paused.pause_count), (Paused, 1));
    assert!(paused.paused_at.is_some() && paused.resume_at.is_some());
    let again = change(conn, id, Paused, Paused).unwrap();
    assert_eq!(
        (again.pause_count, again.paused_at, again.resume_at),
        (1, paused.paused_at, paused.resume_at)
    );
    let resumed = change(conn, id, Paused, Active).unwrap();
    assert_eq!((resumed.paused_at, resumed.resume_at), (None, None));

    let late = UserSubscription::record_failed_payment(conn, id, Some(until)).unwrap();
    assert_eq!((late.status, late.failed_payment_count), (PastDue, 1));
    assert!(late.last_payment_attempt.is_some() && late.next_billing_date.is_some());
    let late = UserSubscription::record_failed_payment(conn, id, None).unwrap();
    assert_eq!(
        (late.failed_payment_count, late.next_billing_date),
        (2, None)
    );
    let paid = change(conn, id, PastDue, Active).unwrap();
    assert_eq!(paid.failed_payment_count, 0);

    let reason = UserSubscriptionChangeset {
        cancellation_reason: Some(Some("too dear")),
        ..Default::default()
    };
    let cancelled = UserSubscription::change_status(conn, id, Active, Cancelled, &reason).unwrap();
    assert!(cancelled.cancelled_at.is_some());
    assert_eq!(cancelled.cancellation_reason.as_deref(), Some("too dear"));
    assert_eq!(UserSubscription::current(conn, user).unwrap(), None);
}

#[test]
fn a_late_webhook_revives_nothing() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let id = start(conn, user, Active).unwrap().id;
    let cancelled = change(conn, id, Active, Cancelled).unwrap();
    match change(conn, id, PastDue, Active) {
        Err(SubscriptionError::Conflict(row)) => assert_eq!(*row, cancelled),
        other => panic!("{other:?}"),
    }
    for end in [Cancelled, Completed, Upgraded, Replaced] {
        let result = change(conn, id, end, Active);
        assert!(matches!(result, Err(SubscriptionError::Ended)), "{end:?}");
    }
    let result = UserSubscription::record_failed_payment(conn, id, None);
    assert!(matches!(result, Err(SubscriptionError::Conflict(_))));

    let nobody = SubscriptionId::new();
    let result = change(conn, nobody, Created, Active);
    assert!(matches!(result, Err(SubscriptionError::NotFound)));
    let result = UserSubscription::record_failed_payment(conn, nobody, None);
    assert!(matches!(result, Err(SubscriptionError::NotFound)));
}

#[test]
fn of_many_changes_of_one_status_one_is_made() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let id = start(conn, user, Active).unwrap().id;
    let changed = at_once(&database, 32, |_, conn| {
        match change(conn, id, Active, Paused) {
            Ok(_) => 1,
            Err(SubscriptionError::Conflict(row)) if row.status == Paused => 0,
            Err(error) => panic!("{error:?}"),
        }
    });
    assert_eq!(changed.iter().sum::<i32>(), 1);
    let row = UserSubscription::find(conn, id).unwrap().unwrap();
    assert_eq!(row.pause_count, 1);
}

#[test]
fn failed_payments_are_all_counted() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let id = start(conn, user, Active).unwrap().id;
    at_once(&database, 32, |_, conn| {
        UserSubscription::record_failed_payment(conn, id, None).unwrap();
    });
    let row = UserSubscription::find(conn, id).unwrap().unwrap();
    assert_eq!((row.status, row.failed_payment_count), (PastDue, 32));
}

#[test]
fn an_upgrade_ends_the_old_subscription() {
    let database = database();
    let conn = &mut database.connect();
    let (asha, ravi) = (user(conn), user(conn));
    let first = start(conn, asha, Paused).unwrap();

    let followed = at_once(&database, 32, |_, conn| {
        match UserSubscription::upgrade(conn, first.id, &NewUserSubscription::new(asha)) {
            Ok(row) => Some(row),
            Err(SubscriptionError::Conflict(row)) if row.status == Upgraded => None,
            Err(error) => panic!("{error:?}"),
        }
    });
    let second: Vec<_> = followed.into_iter().flatten().collect();
    let [second] = &second[..] else {
        panic!("{second:?}")
    };
    assert_eq!(second.status, Active);
    assert_eq!(
        UserSubscription::current(conn, asha).unwrap().as_ref(),
        Some(second)
    );

    let third = UserSubscription::replace(
        conn,
        second.id,
        &NewUserSubscription {
            razorpay_subscription_id: Some("sub_3"),
            ..NewUserSubscription::new(asha)
        },
    )
    .unwrap();
    let replaced = UserSubscription::find(conn, second.id).unwrap().unwrap();
    assert_eq!(replaced.status, Replaced);
    assert_eq!(
        UserSubscription::current(conn, asha).unwrap(),
        Some(third.clone())
    );

    // Nothing changes if the new one can't start, or the old one is another user's or missing.
    let taken = NewUserSubscription {
        razorpay_subscription_id: Some("sub_3"),
        ..NewUserSubscription::new(asha)
    };
    let result = UserSubscription::upgrade(conn, third.id, &taken);
    assert!(matches!(result, Err(SubscriptionError::GatewayIdTaken)));
    for id in [third.id, SubscriptionId::new()] {
        let result = UserSubscription::upgrade(conn, id, &NewUserSubscription::new(ravi));
        assert!(matches!(result, Err(SubscriptionError::NotFound)));
    }
    assert_eq!(UserSubscription::current(conn, asha).unwrap(), Some(third));
    assert_eq!(UserSubscription::current(conn, ravi).unwrap(), None);
}

#[test]
fn history_comes_in_pages() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    // One transaction, so one timestamp: the key decides.
    let ids: BTreeSet<_> = conn
        .transaction(|conn| {
            (0..5)
                .map(|_| Ok(start(conn, user, Completed)?.id))
                .collect::<Result<_, SubscriptionError>>()
        })
        .unwrap();
    let mut seen = Vec::new();
    let mut page = Page::first(2);
    loop {
        let rows = UserSubscription::list_by_user(conn, user, page).unwrap();
        let Some(last) = rows.last() else { break };
        page = Page::after(last.cursor(), 2);
        seen.extend(rows.iter().map(|row| row.id));
    }
    assert_eq!(seen.len(), 5);
    assert_eq!(seen.into_iter().collect::<BTreeSet<_>>(), ids);
}

#[test]
fn eight_workers_share_the_due_subscriptions() {
    let database = database();
    let conn = &mut database.connect();
    let now = Utc::now();
    let mut due = BTreeSet::new();
    let begin = |conn: &mut PgConnection, days, status, auto_renewal, ends| {
        let new = NewUserSubscription {
            next_billing_date: Some(now + TimeDelta::days(days)),
            auto_renewal: Some(auto_renewal),
            cancel_at_period_end: Some(ends),
            ..NewUserSubscription::new(user(conn))
        };
        UserSubscription::start(conn, &new, status).unwrap().id
    };
    for days in 1..=40 {
        let status = if days % 2 == 0 { Active } else { PastDue };
        due.insert(begin(conn, -days, status, true, false));
    }
    for (days, status, auto_renewal, ends) in [
        (1, Active, true, false),
        (-1, Paused, true, false),
        (-1, Active, false, false),
        (-1, Active, true, true),
    ] {
        begin(conn, days, status, auto_renewal, ends);
    }
    // Earliest billing date first.
    let first = conn
        .transaction(|conn| UserSubscription::claim_due(conn, 2))
        .unwrap();
    assert!(first[0].next_billing_date < first[1].next_billing_date);
    assert!(first[0].next_billing_date.unwrap() < now - TimeDelta::days(39));

    let charged = at_once(&database, 8, |_, conn| {
        let mut charged = Vec::new();
        loop {
            let batch = conn
                .transaction::<_, SubscriptionError, _>(|conn| {
                    let batch = UserSubscription::claim_due(conn, 3)?;
                    for row in &batch {
                        let later = now + TimeDelta::days(3);
                        UserSubscription::record_failed_payment(conn, row.id, Some(later))?;
                    }
                    Ok(batch)
                })
                .unwrap();
            if batch.is_empty() {
                return charged;
            }
            charged.extend(batch.into_iter().map(|row| row.id));
        }
    })
    .concat();
    assert_eq!(charged.len(), 40);
    assert_eq!(charged.into_iter().collect::<BTreeSet<_>>(), due);
}

#[test]
fn a_locked_users_subscription_is_claimed_later() {
    let database = database();
    let (conn, other) = (&mut database.connect(), &mut database.connect());
    let user = user(conn);
    let new = NewUserSubscription {
        next_billing_date: Some(Utc::now() - TimeDelta::days(1)),
        ..NewUserSubscription::new(user)
    };
    let id = UserSubscription::start(conn, &new, Active).unwrap().id;
    let claim = |conn: &mut PgConnection| {
        let claimed = conn.transaction(|conn| UserSubscription::claim_due(conn, 9));
        claimed
            .unwrap()
            .iter()
            .map(|row| row.id)
            .collect::<Vec<_>>()
    };
    conn.transaction(|conn| {
        users::table
            .find(user)
            .select(users::id)
            .for_update()
            .first::<UserId>(conn)?;
        assert_eq!(claim(other), []);
        QueryResult::Ok(())
    })
    .unwrap();
    assert_eq!(claim(other), [id]);
}
