//! The gateway's events, by the webhook.

use chrono::Utc;

use super::*;

const DAY: i64 = 24 * 60 * 60;

/// An event at this time, with these parts.
fn event(name: &str, at: i64, parts: &Value) -> String {
    let parts: serde_json::Map<String, Value> = parts
        .as_object()
        .unwrap()
        .iter()
        .map(|(part, entity)| (part.clone(), json!({ "entity": entity })))
        .collect();
    json!({ "event": name, "created_at": at, "payload": parts }).to_string()
}

fn period(id: &str, start: i64, end: i64) -> Value {
    json!({ "id": id, "current_start": start, "current_end": end })
}

/// A payment of a subscription.
fn invoiced(id: &str, amount: i64, currency: &str, at: i64) -> Value {
    json!({
        "id": id, "amount": amount, "currency": currency, "fee": 2358, "created_at": at,
        "status": "captured", "method": "upi", "invoice_id": format!("inv_{id}"), "notes": [],
    })
}

fn refund(id: &str, amount: i64, at: i64) -> Value {
    json!({ "id": id, "amount": amount, "created_at": at })
}

/// Prepares a subscription and returns its id at the gateway.
fn subscribe(session: &Session<'_>) -> String {
    let answer = expect(201, session.post("/plan/subscription", &json!({})));
    text(&answer["subscription"]["razorpay_subscription_id"])
}

#[track_caller]
fn deliver(service: &Service, event_id: &str, body: &str) -> String {
    let answer = service.webhook(event_id, body, WEBHOOK_SECRET);
    text(&expect(200, answer)["status"])
}

#[test]
fn a_subscription_from_its_sale_to_its_end() {
    let database = database();
    let service = Service::start(&database);
    service.sign_up("asha@example.in");
    let asha = service.log_in("asha@example.in");
    let plan = || expect(200, asha.get("/plan"));
    assert_eq!(plan()["plan"]["plan_type"], "free");
    expect(404, asha.send("DELETE", "/plan/subscription", ""));

    let id = subscribe(&asha);
    // Who asks again continues with the same one.
    let again = expect(200, asha.post("/plan/subscription", &json!({})));
    assert_eq!(again["subscription"]["razorpay_subscription_id"], json!(id));

    let now = Utc::now().timestamp();
    let paid = json!({
        "subscription": period(&id, now, now + 30 * DAY),
        "payment": invoiced("pay_1", 99_900, "INR", now),
    });
    assert_eq!(plan()["plan"]["plan_type"], "free");
    let activated = event("subscription.activated", now, &paid);
    assert_eq!(deliver(&service, "evt_1", &activated), "processed");
    // The gateway's two events about one payment.
    let charged = event("subscription.charged", now, &paid);
    assert_eq!(deliver(&service, "evt_2", &charged), "processed");
    let bought = plan();
    assert_eq!(bought["plan"]["plan_type"], "pro");
    assert_eq!(bought["plan"]["subscription_id"], json!(id));
    assert_eq!(bought["subscription"]["status"], "active");
    expect(409, asha.post("/plan/subscription", &json!({})));

    let cancelled = expect(200, asha.send("DELETE", "/plan/subscription", ""));
    assert_eq!(cancelled["subscription"]["cancel_at_period_end"], true);
    assert_eq!(cancelled["plan"]["plan_type"], "pro");
    let ended = event(
        "subscription.cancelled",
        now + 1,
        &json!({ "subscription": { "id": id } }),
    );
    assert_eq!(deliver(&service, "evt_3", &ended), "processed");
    assert_eq!(plan()["plan"]["plan_type"], "pro");
    assert_eq!(plan()["subscription"], Value::Null);
    let events = "SELECT count(*) FROM webhook_events WHERE user_id IS NOT NULL";
    assert_eq!(database.psql(events).unwrap(), "3\n");
}

/// Each order, each event twice and once more under another id.
#[test]
fn events_of_a_subscription_in_any_order() {
    let database = database();
    let service = Service::start(&database);
    let now = Utc::now().timestamp();
    let orders = [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ];
    for (n, order) in orders.into_iter().enumerate() {
        let email = format!("user{n}@example.in");
        service.sign_up(&email);
        let id = subscribe(&service.log_in(&email));
        let first = invoiced(&format!("pay_{n}_1"), 99_900, "INR", now);
        let second = invoiced(&format!("pay_{n}_2"), 99_900, "INR", now + 10);
        let events = [
            event(
                "subscription.activated",
                now,
                &json!({ "subscription": period(&id, now - DAY, now + DAY), "payment": first }),
            ),
            event(
                "subscription.charged",
                now + 10,
                &json!({ "subscription": period(&id, now + DAY, now + 31 * DAY), "payment": second }),
            ),
            event(
                "refund.processed",
                now + 20,
                &json!({ "payment": second, "refund": refund(&format!("rfnd_{n}"), 50_000, now + 20) }),
            ),
        ];
        for index in order {
            deliver(&service, &format!("evt_{n}_{index}"), &events[index]);
            deliver(&service, &format!("evt_{n}_{index}"), &events[index]);
            deliver(&service, &format!("evt_{n}_{index}_again"), &events[index]);
        }
    }
    // A refund before its payment has failed. The worker takes it up.
    let failed = "SELECT count(*) FROM webhook_events WHERE processing_status = 'failed'";
    assert_eq!(database.psql(failed).unwrap(), "6\n");
    let sooner =
        "UPDATE webhook_events SET available_at = now() WHERE processing_status = 'failed'";
    database.psql(sooner).unwrap();
    let processed = "SELECT count(*) FROM webhook_events WHERE processing_status = 'processed'";
    await_result(&database, processed, "36\n");

    let ends = format!(
        "SELECT DISTINCT s.status, extract(epoch FROM s.current_period_end)::bigint - {now},
                p.plan_type, extract(epoch FROM p.expires_at)::bigint - {now},
                (SELECT string_agg(amount || ' ' || status, ', ' ORDER BY amount, processed_at)
                   FROM subscription_transactions t WHERE t.subscription_id = s.id)
           FROM user_subscriptions s JOIN user_plans p USING (user_id)"
    );
    let days = 31 * DAY;
    let grace: i64 = database
        .psql("SELECT DISTINCT grace_period_days FROM user_subscriptions")
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let until = days + grace * DAY;
    assert_eq!(
        database.psql(&ends).unwrap(),
        format!("active|{days}|pro|{until}|-50000 captured, 99900 captured, 99900 captured\n")
    );
}

#[test]
fn a_subscription_for_less_than_its_price_changes_nothing() {
    let database = database();
    let service = Service::start(&database);
    service.sign_up("asha@example.in");
    let asha = service.log_in("asha@example.in");
    let id = subscribe(&asha);
    let now = Utc::now().timestamp();
    let charged = |amount: i64, currency: &str| {
        let payment = invoiced(&format!("pay_{amount}_{currency}"), amount, currency, now);
        let parts = json!({ "subscription": period(&id, now, now + 30 * DAY), "payment": payment });
        ["subscription.activated", "subscription.charged"].map(|name| event(name, now, &parts))
    };
    let state = "SELECT s.status, p.plan_type, (SELECT count(*) FROM subscription_transactions)
                   FROM user_subscriptions s JOIN user_plans p USING (user_id)";
    for (amount, currency) in [
        (1, "INR"),
        (99_899, "INR"),
        (99_900, "IDR"),
        (-99_900, "INR"),
    ] {
        for (n, body) in charged(amount, currency).iter().enumerate() {
            let id = format!("evt_{amount}_{currency}_{n}");
            assert_eq!(deliver(&service, &id, body), "failed");
            assert_eq!(database.psql(state).unwrap(), "created|free|0\n");
        }
    }
    assert_eq!(
        deliver(&service, "evt", &charged(99_900, "INR")[0]),
        "processed"
    );
    assert_eq!(database.psql(state).unwrap(), "active|pro|1\n");
}

/// The gateway sends the last attempt to pay with each event, whatever became of it.
#[test]
fn only_a_captured_payment_buys_a_period() {
    let database = database();
    let service = Service::start(&database);
    service.sign_up("asha@example.in");
    let id = subscribe(&service.log_in("asha@example.in"));
    let now = Utc::now().timestamp();
    let state = "SELECT s.status, s.failed_payment_count, p.plan_type, p.payment_status
                   FROM user_subscriptions s JOIN user_plans p USING (user_id)";
    let mut event_id = 0;
    let mut send = |name: &str, status: Option<&str>, expected: &str| {
        event_id += 1;
        let at = now + event_id;
        let mut parts = json!({ "subscription": period(&id, now, now + 30 * DAY) });
        if let Some(status) = status {
            let payment = invoiced(&format!("pay_{event_id}"), 99_900, "INR", at);
            parts["payment"] = payment;
            parts["payment"]["status"] = json!(status);
        }
        let body = event(name, at, &parts);
        assert_eq!(
            deliver(&service, &format!("evt_{event_id}"), &body),
            expected
        );
        database.psql(state).unwrap()
    };
    for status in [None, Some("failed"), Some("authorized"), Some("refunded")] {
        let state = send("subscription.activated", status, "processed");
        assert_eq!(state, "active|0|free|none\n");
        let state = send("subscription.charged", status, "failed");
        assert_eq!(state, "active|0|free|none\n");
    }
    let state = send("subscription.charged", Some("captured"), "processed");
    assert_eq!(state, "active|0|pro|active\n");
    let state = send("subscription.pending", Some("failed"), "processed");
    assert_eq!(state, "past_due|1|pro|past_due\n");
    let state = send("subscription.pending", Some("captured"), "skipped");
    assert_eq!(state, "past_due|1|pro|past_due\n");
    let state = send("subscription.halted", Some("failed"), "processed");
    assert_eq!(state, "halted|1|free|failed\n");
    // The user has paid in the end.
    let state = send("subscription.charged", Some("captured"), "processed");
    assert_eq!(state, "active|0|pro|active\n");
}

#[test]
fn events_without_a_meaning_are_skipped() {
    let database = database();
    let service = Service::start(&database);
    service.sign_up("asha@example.in");
    let asha = service.log_in("asha@example.in");
    let subscription = json!({ "id": subscribe(&asha) });
    let user = expect(200, asha.get("/users/me"));
    let now = Utc::now().timestamp();
    let payment = invoiced("pay_1", 99_900, "INR", now);
    let ordered = json!({ "id": "pay_2", "notes": { "user_id": user["id"] } });
    for (n, (name, parts)) in [
        ("payment.captured", json!({ "payment": payment })),
        ("payment.failed", json!({ "payment": ordered })),
        ("refund.created", json!({ "payment": payment })),
        (
            "subscription.updated",
            json!({ "subscription": subscription }),
        ),
        (
            "subscription.pending",
            json!({ "subscription": subscription }),
        ),
        (
            "subscription.unheard_of",
            json!({ "subscription": subscription }),
        ),
        ("order.paid", json!({})),
    ]
    .into_iter()
    .enumerate()
    {
        let body = event(name, now, &parts);
        assert_eq!(
            deliver(&service, &format!("evt_{n}"), &body),
            "skipped",
            "{name}"
        );
    }
    // Where the payload tells whom it is about, it is erased with the account.
    let linked = "SELECT count(user_id) FROM webhook_events";
    assert_eq!(database.psql(linked).unwrap(), "4\n");

    let parts = json!({ "subscription": { "id": "sub_of_nobody" } });
    let unknown = event("subscription.halted", now, &parts);
    assert_eq!(deliver(&service, "evt_unknown", &unknown), "failed");
    for body in [
        json!({ "event": "subscription.halted" }),
        json!({ "event": "subscription.charged", "created_at": 1, "payload": { "subscription": 1 } }),
        json!({ "event": "refund.processed", "payload": [] }),
    ] {
        let id = format!("evt_{}", Uuid::new_v4());
        assert_eq!(deliver(&service, &id, &body.to_string()), "failed");
    }
    let times = [i64::MIN, -1, i64::MAX];
    for at in times {
        let body = event(
            "subscription.halted",
            at,
            &json!({ "subscription": subscription }),
        );
        assert_eq!(deliver(&service, &format!("evt_{at}"), &body), "failed");
    }
}

/// A payment without a subscription, and its refund, in both orders.
#[test]
fn a_refund_takes_back_what_the_payment_bought() {
    let database = database();
    let service = Service::start(&database);
    let now = Utc::now().timestamp();
    for (n, refund_first) in [false, true].into_iter().enumerate() {
        let email = format!("user{n}@example.in");
        service.sign_up(&email);
        let session = service.log_in(&email);
        let user = expect(200, session.get("/users/me"));
        let captured = paid(&format!("pay_{n}"), 99_900, "INR", &user);
        let refunded = |id: &str, amount: i64| {
            let captured: Value = serde_json::from_str(&captured).unwrap();
            let payment = &captured["payload"]["payment"]["entity"];
            let refund = refund(&format!("rfnd_{n}_{id}"), amount, now);
            event(
                "refund.processed",
                now,
                &json!({ "payment": payment, "refund": refund }),
            )
        };
        let mut events = [captured.clone(), refunded("1", 40_000)];
        if refund_first {
            events.reverse();
        }
        for (which, body) in events.iter().enumerate() {
            assert_eq!(
                deliver(&service, &format!("evt_{n}_{which}"), body),
                "processed"
            );
        }
        let plan = expect(200, session.get("/plan"));
        assert_eq!(plan["plan"]["plan_type"], "pro");
        // More than the rest is refused.
        let more = refunded("2", 59_901);
        assert_eq!(deliver(&service, &format!("evt_{n}_more"), &more), "failed");
        for id in ["rest", "rest_again"] {
            let rest = refunded("3", 59_900);
            assert_eq!(
                deliver(&service, &format!("evt_{n}_{id}"), &rest),
                "processed"
            );
        }
        // The worker ends the plan.
        let plan = format!(
            "SELECT p.plan_type FROM user_plans p JOIN users u ON u.id = p.user_id WHERE email = '{email}'"
        );
        await_result(&database, &plan, "free\n");
    }
    let sum = "SELECT sum(amount), count(*) FROM subscription_transactions";
    assert_eq!(database.psql(sum).unwrap(), "0|6\n");
}

#[test]
fn a_refund_that_comes_again_takes_back_nothing_more() {
    let database = database();
    let service = Service::start(&database);
    service.sign_up("asha@example.in");
    let user = expect(200, service.log_in("asha@example.in").get("/users/me"));
    for payment in ["pay_1", "pay_2"] {
        let captured = paid(payment, 99_900, "INR", &user);
        deliver(&service, payment, &captured);
    }
    let captured: Value = serde_json::from_str(&paid("pay_1", 99_900, "INR", &user)).unwrap();
    let payment = &captured["payload"]["payment"]["entity"];
    let now = Utc::now().timestamp();
    let parts = json!({ "payment": payment, "refund": refund("rfnd_1", 99_900, now) });
    let refunded = event("refund.processed", now, &parts);
    for event_id in ["evt_1", "evt_2", "evt_3"] {
        assert_eq!(deliver(&service, event_id, &refunded), "processed");
    }
    let left = "SELECT plan_type, expires_at > now() + interval '30 days',
                       expires_at < now() + interval '32 days' FROM user_plans";
    assert_eq!(database.psql(left).unwrap(), "pro|t|t\n");
}

/// One payment more doesn't shorten a plan, and a subscription doesn't take its time away.
#[test]
fn a_payment_extends_each_plan() {
    let database = database();
    let service = Service::start(&database);
    service.sign_up("asha@example.in");
    let asha = service.log_in("asha@example.in");
    let user = expect(200, asha.get("/users/me"));
    let id = subscribe(&asha);
    let now = Utc::now().timestamp();
    let parts = json!({
        "subscription": period(&id, now, now + 30 * DAY),
        "payment": invoiced("pay_1", 99_900, "INR", now),
    });
    let activated = event("subscription.activated", now, &parts);
    assert_eq!(deliver(&service, "evt_1", &activated), "processed");
    let payment = paid("pay_2", 99_900, "INR", &user);
    assert_eq!(deliver(&service, "evt_2", &payment), "processed");
    let left = "SELECT expires_at > now() + interval '60 days' FROM user_plans";
    assert_eq!(database.psql(left).unwrap(), "t\n");
    let parts = json!({ "subscription": { "id": id } });
    let halted = event("subscription.halted", now + 1, &parts);
    assert_eq!(deliver(&service, "evt_3", &halted), "processed");
    assert_eq!(database.psql(left).unwrap(), "t\n");

    database
        .psql("UPDATE user_plans SET expires_at = NULL")
        .unwrap();
    let payment = paid("pay_3", 99_900, "INR", &user);
    assert_eq!(deliver(&service, "evt_4", &payment), "processed");
    let end = "SELECT plan_type, expires_at IS NULL FROM user_plans";
    assert_eq!(database.psql(end).unwrap(), "pro|t\n");
}
