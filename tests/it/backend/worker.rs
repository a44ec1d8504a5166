//! The worker of the backend.

use super::*;

#[test]
fn what_is_over_ends_and_what_is_due_is_done() {
    let database = database();
    as_admin(&mut database.connect(), add_services);
    let service = Service::start(&database);
    service.sign_up("asha@example.in");
    let asha = service.log_in("asha@example.in");
    let user = expect(200, asha.get("/users/me"));
    // So that there may be several instances.
    let payment = payment(&user);
    expect(200, service.webhook("evt_1", &payment, WEBHOOK_SECRET));
    let figma = json!({ "service": "figma", "api_key": API_KEY });
    for _ in 0..2 {
        expect(201, asha.create(&figma));
    }
    let gmail =
        json!({ "service": "gmail", "client_id": "client", "client_secret": CLIENT_SECRET });
    for code in [CODE, "withdrawn"] {
        let begun = expect(201, asha.create(&gmail));
        let url = text(&begun["authorization_url"]);
        let granting = json!({ "code": code, "state": state_in(&url) });
        expect(200, asha.post("/oauth/callback", &granting));
    }

    // Access tokens that end soon. The provider refuses one.
    let refreshed = "SELECT string_agg(oauth_status::text, ' ' ORDER BY oauth_status::text)
                       FROM mcp_credentials WHERE client_id IS NOT NULL";
    assert_eq!(database.psql(refreshed).unwrap(), "completed completed\n");
    let soon = "UPDATE mcp_credentials SET token_expires_at = now() WHERE client_id IS NOT NULL";
    database.psql(soon).unwrap();
    await_result(&database, refreshed, "completed expired\n");
    let fresh = "SELECT count(*) FROM mcp_credentials
                  WHERE token_expires_at > now() + interval '50 minutes'";
    await_result(&database, fresh, "1\n");
    let audit = "SELECT status, error_type FROM token_audit_log
                  WHERE operation = 'token_refresh' ORDER BY status::text";
    assert_eq!(
        database.psql(audit).unwrap(),
        "failure|invalid_grant\nsuccess|\n"
    );

    // An instance past its end.
    let past = "UPDATE mcp_service_table SET created_at = now() - interval '2 days',
                       expires_at = now() - interval '1 day'
                 WHERE instance_id = (SELECT min(instance_id::text)::uuid FROM mcp_service_table
                                       JOIN mcp_table USING (mcp_service_id)
                                      WHERE mcp_service_name = 'figma')";
    database.psql(past).unwrap();
    let expired = "SELECT count(*) FROM mcp_service_table WHERE status = 'expired'";
    await_result(&database, expired, "1\n");

    // A plan past its end: more instances are active than the free one allows.
    database
        .psql("UPDATE user_plans SET expires_at = now() - interval '1 second'")
        .unwrap();
    await_result(&database, "SELECT plan_type FROM user_plans", "free\n");
    let active = "SELECT count(*) FROM mcp_service_table
                   WHERE status = 'active' AND oauth_status = 'completed'";
    let active: u32 = database.psql(active).unwrap().trim().parse().unwrap();
    assert!(active <= 1, "{active}");

    // A subscription that was never paid.
    expect(201, asha.post("/plan/subscription", &json!({})));
    let created = "ALTER TABLE user_subscriptions DISABLE TRIGGER USER;
                   UPDATE user_subscriptions SET created_at = now() - interval '31 days'";
    database.psql(created).unwrap();
    await_result(
        &database,
        "SELECT status FROM user_subscriptions",
        "cancelled\n",
    );

    // Tokens that expired long ago; the session goes on.
    let old = "ALTER TABLE auth_tokens DISABLE TRIGGER USER;
               UPDATE auth_tokens SET created_at = now() - interval '4 days',
                      expires_at = now() - interval '3 days'
                WHERE type = 'email_verification'";
    database.psql(old).unwrap();
    await_result(&database, "SELECT count(*) FROM auth_tokens", "1\n");
    expect(200, asha.get("/users/me"));
}

/// An event that a process claimed before it died, also before the first start.
#[test]
fn an_event_of_a_dead_worker_is_processed() {
    let database = database();
    let mut service = Service::start(&database);
    service.sign_up("asha@example.in");
    let user = expect(200, service.log_in("asha@example.in").get("/users/me"));
    service.stop();
    let payment = payment(&user);
    database
        .psql(&format!(
            "INSERT INTO webhook_events
                    (external_event_id, event_type, payment_gateway, payload, attempts, available_at)
             VALUES ('evt_1', 'payment.captured', 'razorpay', '{payment}', 1, now())"
        ))
        .unwrap();
    let service = Service::start(&database);
    await_result(&database, "SELECT plan_type FROM user_plans", "pro\n");
    let answer = service.webhook("evt_1", &payment, WEBHOOK_SECRET);
    assert_eq!(expect(200, answer)["status"], "duplicate");
}

#[test]
fn the_worker_finishes_its_step_after_sigterm_and_starves_nobody() {
    let database = database();
    let mut service = Service::start(&database);
    service.sign_up("asha@example.in");
    let asha = service.log_in("asha@example.in");
    let user = expect(200, asha.get("/users/me"));
    let mut conn = database.connect_as_owner();
    conn.batch_execute("BEGIN; LOCK TABLE user_plans").unwrap();
    database
        .psql(&format!(
            "INSERT INTO webhook_events (external_event_id, event_type, payment_gateway, payload)
             VALUES ('evt_1', 'payment.captured', 'razorpay', '{}')",
            payment(&user)
        ))
        .unwrap();
    let waiting = "SELECT count(*) FROM pg_stat_activity
                    WHERE datname = current_database() AND wait_event_type = 'Lock'";
    await_result(&database, waiting, "1\n");
    // The worker waits with one connection; the others are the requests'.
    thread::scope(|scope| {
        for _ in 0..32 {
            scope.spawn(|| expect(200, asha.get("/users/me")));
        }
    });
    service.terminate();
    let began = Instant::now();
    while TcpStream::connect(&service.address).is_ok() {
        assert!(began.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(10));
    }
    conn.batch_execute("COMMIT").unwrap();
    assert!(service.child.wait().unwrap().success());
    let done = "SELECT processing_status, attempts, plan_type FROM webhook_events, user_plans";
    assert_eq!(database.psql(done).unwrap(), "processed|1|pro\n");
}

/// Calls and the worker find the same access token expired; the refresh token is spent once.
#[test]
fn one_of_many_calls_refreshes_the_access() {
    let database = database();
    as_admin(&mut database.connect(), add_services);
    let service = Service::start(&database);
    service.sign_up("asha@example.in");
    let asha = service.log_in("asha@example.in");
    let gmail =
        json!({ "service": "gmail", "client_id": "client", "client_secret": CLIENT_SECRET });
    let connect = |code: &str| {
        let begun = expect(201, asha.create(&gmail));
        let url = text(&begun["authorization_url"]);
        let granting = json!({ "code": code, "state": state_in(&url) });
        expect(200, asha.post("/oauth/callback", &granting));
        text(&begun["instance"]["instance_id"])
    };
    let end_access = "UPDATE mcp_credentials SET token_expires_at = now()";
    let refreshes = "SELECT count(*) FROM token_audit_log WHERE operation = 'token_refresh'";

    let id = connect(CODE);
    database.psql(end_access).unwrap();
    let statuses: BTreeSet<u16> = thread::scope(|scope| {
        let calls: Vec<_> = (0..16)
            .map(|_| scope.spawn(|| asha.call("gmail", &id).0))
            .collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    });
    // The others may find it just being refreshed.
    assert!(
        statuses.is_subset(&BTreeSet::from([200, 503])),
        "{statuses:?}"
    );
    await_result(&database, refreshes, "1\n");
    expect(200, asha.call("gmail", &id));

    expect(200, asha.toggle(&id, false));
    let withdrawn = connect("withdrawn");
    database.psql(end_access).unwrap();
    let began = Instant::now();
    let refused = loop {
        let status = asha.call("gmail", &withdrawn).0;
        if ![200, 503].contains(&status) {
            break status;
        }
        assert!(began.elapsed() < PATIENCE);
    };
    // By the call that refreshed, or after it.
    assert!([404, 409].contains(&refused), "{refused}");
    expect(404, asha.call("gmail", &withdrawn));
}
