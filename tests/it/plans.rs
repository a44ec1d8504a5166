//! Plans: upgrades, downgrades and expiry.

use std::collections::HashSet;
use std::sync::Barrier;
use std::thread;

use bruhmcp_db::enums::{InstanceStatus, PlanPaymentStatus, PlanType};
use bruhmcp_db::ids::UserId;
use bruhmcp_db::models::{McpInstance, PlanError, ProPlan, UserPlan};
use chrono::{DateTime, TimeDelta, Utc};
use diesel::connection::SimpleConnection;
use serde_json::{Value, json};

use crate::fixtures::{
    create, create_inactive, create_pending, find, pro_user, service, upgrade, user,
};
use crate::support;

#[test]
fn a_plan_is_upgraded_and_extended() {
    let database = support::database();
    let conn = &mut database.connect();
    let (user, gmail) = (user(conn), service(conn, "gmail", 4001));
    let free = UserPlan::find_by_user(conn, user).unwrap().unwrap();
    assert_eq!(
        (free.plan_type, free.max_instances),
        (PlanType::Free, Some(1))
    );
    let inactive = create_inactive(conn, user, gmail);

    let month = DateTime::from_timestamp(Utc::now().timestamp() + 30 * 86_400, 0);
    let paid = ProPlan {
        subscription_id: Some("sub_1"),
        customer_id: Some("cust_1"),
        expires_at: month,
    };
    let plan = UserPlan::upgrade(conn, user, &paid).unwrap();
    assert_eq!((plan.plan_type, plan.max_instances), (PlanType::Pro, None));
    assert_eq!(plan.payment_status, PlanPaymentStatus::Active);
    assert_eq!(plan.expires_at, month);
    assert_eq!(plan.subscription_id.as_deref(), Some("sub_1"));
    assert_eq!(find(conn, inactive).status, InstanceStatus::Inactive);

    let extended = ProPlan {
        subscription_id: Some("sub_2"),
        customer_id: None,
        expires_at: None,
    };
    let plan = UserPlan::upgrade(conn, user, &extended).unwrap();
    assert_eq!(plan.subscription_id.as_deref(), Some("sub_2"));
    assert_eq!(plan.customer_id.as_deref(), Some("cust_1"));
    assert_eq!(plan.expires_at, None);
    assert_eq!(UserPlan::find_by_user(conn, user).unwrap(), Some(plan));
}

#[test]
fn an_upgrade_is_refused() {
    let database = support::database();
    let conn = &mut database.connect();
    let (first, second) = (user(conn), user(conn));
    let mut upgrade = |user, subscription_id, customer_id| {
        let pro = ProPlan {
            subscription_id,
            customer_id,
            expires_at: None,
        };
        UserPlan::upgrade(conn, user, &pro)
    };
    upgrade(first, Some("sub_1"), Some("cust_1")).unwrap();
    let refused = upgrade(second, Some("sub_1"), None);
    assert!(
        matches!(refused, Err(PlanError::SubscriptionTaken)),
        "{refused:?}"
    );
    let refused = upgrade(second, None, Some("cust_1"));
    assert!(
        matches!(refused, Err(PlanError::CustomerTaken)),
        "{refused:?}"
    );
    let refused = upgrade(second, Some(""), None);
    assert!(
        matches!(refused, Err(PlanError::Database(_))),
        "{refused:?}"
    );
    let refused = upgrade(UserId::new(), None, None);
    assert!(matches!(refused, Err(PlanError::NotFound)), "{refused:?}");
}

#[test]
pub(crate) fn a_downgrade_switches_the_surplus_off() {
    let database = support::database();
    let conn = &mut database.connect();
    let user = pro_user(conn);
    let (gmail, slack) = (service(conn, "gmail", 4001), service(conn, "slack", 4002));
    let paid = ProPlan {
        subscription_id: Some("sub_1"),
        customer_id: Some("cust_1"),
        expires_at: Some(Utc::now() + TimeDelta::days(1)),
    };
    UserPlan::upgrade(conn, user, &paid).unwrap();
    let first = create(conn, user, gmail).unwrap();
    let second = create(conn, user, slack).unwrap();
    let due = create(conn, user, slack).unwrap();
    conn.batch_execute(&format!(
        "UPDATE mcp_service_table SET expires_at = now() WHERE instance_id = '{due}'"
    ))
    .unwrap();
    create_inactive(conn, user, gmail);
    create_pending(conn, user, gmail);

    let downgrade = UserPlan::downgrade(conn, user, PlanPaymentStatus::Cancelled);
    let downgrade = downgrade.unwrap().unwrap();
    let plan = downgrade.plan;
    assert_eq!(
        (plan.plan_type, plan.max_instances),
        (PlanType::Free, Some(1))
    );
    assert_eq!(plan.payment_status, PlanPaymentStatus::Cancelled);
    assert_eq!((plan.expires_at, plan.subscription_id), (None, None));
    assert_eq!(plan.customer_id.as_deref(), Some("cust_1"));
    let off: Vec<_> = downgrade
        .switched_off
        .iter()
        .map(|row| (row.instance_id, row.status))
        .collect();
    assert_eq!(
        off,
        [
            (due, InstanceStatus::Expired),
            (second, InstanceStatus::Inactive),
            (first, InstanceStatus::Inactive)
        ]
    );
    assert_eq!(McpInstance::count_active(conn, user).unwrap(), 0);
    McpInstance::activate(conn, first, user).unwrap();

    // A second downgrade switches nothing off.
    let again = UserPlan::downgrade(conn, user, PlanPaymentStatus::None)
        .unwrap()
        .unwrap();
    assert_eq!(again.switched_off, []);
    assert_eq!(McpInstance::count_active(conn, user).unwrap(), 1);
    let nobody = UserPlan::downgrade(conn, UserId::new(), PlanPaymentStatus::None);
    assert_eq!(nobody.unwrap(), None);
}

#[test]
pub(crate) fn a_plan_past_its_end_expires() {
    let database = support::database();
    let conn = &mut database.connect();
    let gmail = service(conn, "gmail", 4001);
    let (due, later, free) = (pro_user(conn), pro_user(conn), user(conn));
    for _ in 0..2 {
        create(conn, due, gmail).unwrap();
        create(conn, later, gmail).unwrap();
    }
    create(conn, free, gmail).unwrap();
    upgrade(conn, due, Some(Utc::now() - TimeDelta::seconds(1)));
    upgrade(conn, later, Some(Utc::now() + TimeDelta::days(1)));

    let expired = UserPlan::expire_due(conn).unwrap().unwrap();
    assert_eq!(expired.plan.user_id, due);
    assert_eq!(expired.plan.plan_type, PlanType::Free);
    assert_eq!(expired.plan.payment_status, PlanPaymentStatus::None);
    assert_eq!(expired.switched_off.len(), 2);
    assert_eq!(UserPlan::expire_due(conn).unwrap(), None);
    assert_eq!(McpInstance::count_active(conn, later).unwrap(), 2);
    assert_eq!(McpInstance::count_active(conn, free).unwrap(), 1);
}

#[test]
fn eight_workers_expire_each_plan_once() {
    let database = support::database();
    let conn = &mut database.connect();
    let services = [4001, 4002].map(|port| service(conn, &format!("s{port}"), port));
    let due: HashSet<_> = (0..24)
        .map(|_| {
            let user = pro_user(conn);
            for service in services {
                create(conn, user, service).unwrap();
            }
            upgrade(conn, user, Some(Utc::now() - TimeDelta::seconds(1)));
            user
        })
        .collect();

    let start = Barrier::new(8);
    let mut expired: Vec<_> = thread::scope(|scope| {
        let sweepers: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let conn = &mut database.connect();
                    start.wait();
                    let mut expired = Vec::new();
                    while let Some(downgrade) = UserPlan::expire_due(conn).unwrap() {
                        assert_eq!(downgrade.switched_off.len(), 2);
                        expired.push(downgrade.plan.user_id);
                    }
                    expired
                })
            })
            .collect();
        sweepers
            .into_iter()
            .flat_map(|sweeper| sweeper.join().unwrap())
            .collect()
    });
    while let Some(downgrade) = UserPlan::expire_due(conn).unwrap() {
        expired.push(downgrade.plan.user_id);
    }
    assert_eq!(expired.len(), due.len());
    assert_eq!(expired.into_iter().collect::<HashSet<_>>(), due);
}

#[test]
fn a_feature_is_switched_beside_the_others() {
    let database = support::database();
    let conn = &mut database.connect();
    let user = user(conn);
    let mut set = |name, value: Option<Value>| {
        let plan = UserPlan::set_feature(conn, user, name, value.as_ref()).unwrap();
        plan.unwrap().features
    };
    assert_eq!(set("beta", Some(json!(true))), json!({"beta": true}));
    assert_eq!(
        set("limits", Some(json!({"calls": 9}))),
        json!({"beta": true, "limits": {"calls": 9}})
    );
    // A feature is replaced as a whole.
    assert_eq!(
        set("limits", Some(json!({"users": 2}))),
        json!({"beta": true, "limits": {"users": 2}})
    );
    assert_eq!(
        set("none", None),
        json!({"beta": true, "limits": {"users": 2}})
    );
    assert_eq!(set("beta", None), json!({"limits": {"users": 2}}));
    let nobody = UserPlan::set_feature(conn, UserId::new(), "beta", None);
    assert_eq!(nobody.unwrap(), None);
}

#[test]
fn no_feature_is_lost_when_many_are_switched_at_once() {
    let database = support::database();
    let conn = &mut database.connect();
    let user = user(conn);
    support::at_once(&database, 8, |n, conn| {
        for i in 0..10 {
            let name = format!("{n}.{i}");
            UserPlan::set_feature(conn, user, &name, Some(&json!(i))).unwrap();
        }
    });
    let plan = UserPlan::find_by_user(conn, user).unwrap().unwrap();
    assert_eq!(plan.features.as_object().unwrap().len(), 80);
}
