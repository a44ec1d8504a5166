//! Attacks by somebody who has only the address of the service, or an account of their own.

use super::*;

/// The answer without what differs between any two.
fn comparable(response: &str) -> String {
    let mut lines: Vec<_> = response
        .lines()
        .filter(|line| !line.starts_with("date: "))
        .collect();
    lines.sort_unstable();
    lines.join("\n")
}

fn request(method: &str, path: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
    )
}

/// Status, headers and body are the same, and so is the work before the answer: it needs no table
/// that only an account has rows in.
#[test]
fn no_answer_tells_which_addresses_exist() {
    let database = database();
    let service = Service::start(&database);
    for email in ["asha@example.in", "gone@example.in"] {
        service.sign_up(email);
    }
    let new = json!({ "first_name": "Ravi", "email": "unproved@example.in", "password": PASSWORD });
    expect(202, service.post("/users", &new));
    service.mail();
    database
        .psql("UPDATE users SET is_active = false WHERE email = 'gone@example.in'")
        .unwrap();
    let emails = [
        "nobody@example.in",
        "asha@example.in",
        "unproved@example.in",
        "gone@example.in",
    ];
    let mut conn = database.connect_as_owner();
    for (path, fields, is_work_deferred) in [
        ("/codes", json!({}), true),
        ("/passwords/link", json!({}), true),
        (
            "/sessions",
            json!({ "password": "another password" }),
            false,
        ),
        ("/sessions/code", json!({ "code": "1234567" }), false),
        // Last, because it makes an account.
        (
            "/users",
            json!({ "first_name": "Eve", "password": "another password" }),
            true,
        ),
    ] {
        if is_work_deferred {
            conn.batch_execute("BEGIN; LOCK TABLE users, auth_tokens")
                .unwrap();
        }
        let answers: BTreeSet<String> = emails
            .iter()
            .map(|email| {
                let mut body = fields.clone();
                body["email"] = json!(email);
                let request = request("POST", path, "", &body.to_string());
                comparable(&service.exchange(request.as_bytes()))
            })
            .collect();
        if is_work_deferred {
            conn.batch_execute("COMMIT").unwrap();
        }
        assert_eq!(answers.len(), 1, "{path}: {answers:#?}");
    }
    // Two codes and two links, and for the sign-ups one link and three notes.
    let mails = service.mails(8);
    let of = |email: &str| mails.iter().filter(|(to, _)| to == email).count();
    assert_eq!(emails.map(of), [1, 3, 3, 1]);
}

#[test]
fn a_webhook_needs_the_signature_of_its_own_body() {
    let database = database();
    let service = Service::start(&database);
    service.sign_up("asha@example.in");
    let user = expect(200, service.log_in("asha@example.in").get("/users/me"));
    let seen = paid("pay_1", 1, "INR", &user);
    let forged = payment(&user);
    let post = |signatures: &[&str], body: &str| {
        let mut headers = "X-Razorpay-Event-Id: evt_1\r\n".to_owned();
        for signature in signatures {
            headers += &format!("X-Razorpay-Signature: {signature}\r\n");
        }
        service.send("POST", "/webhooks/razorpay", &headers, body).0
    };
    let right = signature(&forged, WEBHOOK_SECRET);
    let of_seen = signature(&seen, WEBHOOK_SECRET);
    let empty_key = signature(&forged, "");
    let longer = format!("{right}00");
    let spaced = format!("{right} ");
    assert_eq!(post(&[], &forged), 401);
    for signature in [
        "",
        "0",
        "zz",
        &right[..62],
        &longer,
        &of_seen,
        &empty_key,
        TOKEN_KEY,
    ] {
        assert_eq!(post(&[signature], &forged), 401, "{signature}");
    }
    // The body is signed, byte by byte.
    assert_eq!(post(&[&right], &format!("{forged} ")), 401);
    // Two: a proxy might have checked the other one.
    assert_eq!(post(&[&right, &of_seen], &forged), 401);
    assert_eq!(post(&[&of_seen, &right], &forged), 401);
    let none = "SELECT count(*) FROM webhook_events";
    assert_eq!(database.psql(none).unwrap(), "0\n");

    // Who has seen an event can send it again, also as another one: the id isn't signed.
    let plan = "SELECT plan_type, expires_at FROM user_plans";
    assert_eq!(post(&[&spaced], &forged), 200);
    let bought = database.psql(plan).unwrap();
    assert!(bought.starts_with("pro|"), "{bought}");
    for n in 0..5 {
        let event_id = format!("evt_replayed_{n}");
        expect(200, service.webhook(&event_id, &forged, WEBHOOK_SECRET));
    }
    assert_eq!(database.psql(plan).unwrap(), bought);
    let payments = "SELECT count(*) FROM subscription_transactions";
    assert_eq!(database.psql(payments).unwrap(), "1\n");

    let headers = |id: &str| {
        let signature = signature(&seen, WEBHOOK_SECRET);
        format!("X-Razorpay-Signature: {signature}\r\n{id}")
    };
    for id in [
        "".to_owned(),
        "X-Razorpay-Event-Id: a\r\nX-Razorpay-Event-Id: b\r\n".to_owned(),
        "X-Razorpay-Event-Id: \u{e9}\r\n".to_owned(),
        "X-Razorpay-Event-Id: \r\n".to_owned(),
        format!("X-Razorpay-Event-Id: {}\r\n", "x".repeat(5_000)),
    ] {
        let answer = service.send("POST", "/webhooks/razorpay", &headers(&id), &seen);
        expect(400, answer);
    }
}

#[test]
fn signed_nonsense_is_refused_or_fails() {
    let database = database();
    let service = Service::start(&database);
    let webhook = |body: &str| {
        let id = Uuid::new_v4().to_string();
        service.webhook(&id, body, WEBHOOK_SECRET)
    };
    let deep = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    for body in [
        "".to_owned(),
        "null".to_owned() + "x",
        "{\"event\": \"a\", \"b\": 1e999}".to_owned(),
        "{\"event\": \"\\ud800\"}".to_owned(),
        deep(30_000),
        format!("{{\"event\": {}}}", deep(1_000)),
    ] {
        expect(400, webhook(&body));
    }
    for body in [
        "[]".to_owned(),
        "{\"event\": 1}".to_owned(),
        "{\"event\": \"\"}".to_owned(),
        "{\"event\": \"order.paid\", \"note\": \"a\\u0000b\"}".to_owned(),
        json!({ "event": "x".repeat(10_000) }).to_string(),
    ] {
        expect(422, webhook(&body));
    }
    expect(413, webhook(&format!("\"{}\"", "x".repeat(64 * 1024))));

    let user = json!({ "id": Uuid::new_v4() });
    for (id, amount, currency) in [
        ("", 99_900, "INR"),
        (&*"x".repeat(1_000), 99_900, "INR"),
        ("pay_1", 0, "INR"),
        ("pay_2", i64::MIN, "INR"),
        ("pay_3", 99_900, "rupees; DROP TABLE users"),
    ] {
        let body = paid(id, amount % 1_000_000, currency, &user);
        let answer = expect(200, webhook(&body));
        assert_eq!(answer["status"], "failed", "{id} {amount} {currency}");
    }
    let rows = "SELECT count(*) FROM subscription_transactions";
    assert_eq!(database.psql(rows).unwrap(), "0\n");
}

#[test]
fn headers_change_nothing_that_they_should_not() {
    let database = database();
    let mut service = Service::start(&database);
    for email in ["asha@example.in", "eve@example.in"] {
        service.sign_up(email);
    }
    let (asha, eve) = (
        service.log_in("asha@example.in").token,
        service.log_in("eve@example.in").token,
    );
    let status = |request: &str| {
        let response = service.exchange(request.as_bytes());
        response.split(' ').nth(1).unwrap_or("closed").to_owned()
    };

    // Links don't go where the client's Host header says.
    let body = json!({ "email": "asha@example.in" }).to_string();
    for headers in [
        "Host: evil.example\r\n",
        "X-Forwarded-Host: evil.example\r\nForwarded: host=evil.example\r\n",
    ] {
        let request = request("POST", "/passwords/link", headers, &body);
        assert!(["202", "400"].contains(&&*status(&request)));
    }
    let hosts =
        request("POST", "/passwords/link", "", &body).replace("Host: a", "Host: evil.example");
    assert_eq!(status(&hosts), "202");
    let began = Instant::now();
    while service.mail_files().len() < 2 {
        assert!(began.elapsed() < PATIENCE);
    }
    let count = service.mail_files().len();
    for (_, text) in service.mails(count) {
        assert!(text.bytes().all(|byte| byte.is_ascii_hexdigit()), "{text}");
    }

    // Two sessions, or none of the right kind.
    let bearer = |token: &str| format!("Authorization: Bearer {token}\r\n");
    let both = bearer(&asha) + &bearer(&eve);
    assert_eq!(status(&request("GET", "/users/me", &both, "")), "401");
    for header in [
        format!("Authorization: bearer {asha}\r\n"),
        format!("Authorization: Bearer  {asha}\r\n"),
        format!("Authorization: Basic {asha}\r\n"),
        format!("Cookie: token={asha}\r\n"),
        format!("X-User-Id: {}\r\n", Uuid::new_v4()),
    ] {
        assert_eq!(
            status(&request("GET", "/users/me", &header, "")),
            "401",
            "{header}"
        );
    }
    assert_eq!(
        status(&request("GET", &format!("/users/me?token={asha}"), "", "")),
        "401"
    );
    let tunnelled = bearer(&asha) + "X-HTTP-Method-Override: DELETE\r\n";
    assert_eq!(status(&request("GET", "/sessions", &tunnelled, "")), "200");
    assert_eq!(
        status(&request("GET", "/users/me", &bearer(&asha), "")),
        "200"
    );

    // Another length of the body than a proxy sees.
    let smuggled = "POST /codes HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\n{}{}";
    assert_eq!(status(smuggled), "400");
    let smuggled = "POST /codes HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /users/me HTTP/1.1\r\nHost: a\r\n\r\n";
    let response = service.exchange(smuggled.as_bytes());
    assert_eq!(response.matches("HTTP/1.1").count(), 1, "{response}");
    let long = format!("X: {}\r\n", "x".repeat(1024 * 1024));
    let mut stream = TcpStream::connect(&service.address).unwrap();
    // Fails if the service has closed the connection by then.
    let _ = stream.write_all(request("GET", "/users/me", &long, "").as_bytes());
    expect(401, service.get("/users/me"));

    for path in [
        "/../users/me",
        "/users/../users/me",
        "/users//me",
        "/users/me/",
        "/users/%6de",
        "/call/figma/%2e%2e",
        "/instances/%00",
        "/instances/%FF",
        "/%",
        "/users/me%00",
    ] {
        let status = status(&request("GET", path, &bearer(&eve), ""));
        assert!(
            ["400", "404", "200"].contains(&&*status),
            "{path}: {status}"
        );
    }
    let printed = service.stop();
    assert_no_secrets(&printed, &[&asha, &eve]);
}

#[test]
fn texts_are_never_part_of_a_statement() {
    let database = database();
    as_admin(&mut database.connect(), add_services);
    let service = Service::start(&database);
    service.sign_up("asha@example.in");
    let asha = service.log_in("asha@example.in");
    for text in [
        "'; DROP TABLE users; --",
        "\" OR 1=1",
        "%",
        "\\",
        "\u{202e}",
        "{{7*7}}",
        "\r\n",
    ] {
        let login = json!({ "email": text, "password": text, "code": text });
        for path in ["/sessions", "/sessions/code"] {
            let status = service.post(path, &login).0;
            assert!([401, 429].contains(&status), "{status}");
        }
        let status = service.post("/codes", &login).0;
        assert!([202, 429].contains(&status), "{status}");
        let figma = json!({ "service": text, "api_key": text, "name": text });
        expect(422, asha.create(&figma));
        let status = asha
            .call(
                &text.replace(['%', '\r', '\n', ' ', '\\', '"'], ""),
                text.trim(),
            )
            .0;
        assert!([400, 404].contains(&status), "{status}");
        let state = json!({ "state": text, "code": text });
        expect(400, asha.post("/oauth/callback", &state));
    }
    let users = "SELECT count(*) FROM users";
    assert_eq!(database.psql(users).unwrap(), "1\n");
}
