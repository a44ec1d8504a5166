//! Codes, password resets and the sessions that they begin or end.

use std::os::unix::fs::PermissionsExt;

use super::*;

const NEW_PASSWORD: &str = "staple horse battery";

impl Service {
    fn ask(&self, path: &str, email: &str) -> (u16, Value) {
        self.post(path, &json!({ "email": email }))
    }

    fn try_code(&self, email: &str, code: &str) -> (u16, Value) {
        self.post("/sessions/code", &json!({ "email": email, "code": code }))
    }

    fn try_password(&self, email: &str, password: &str) -> (u16, Value) {
        let login = json!({ "email": email, "password": password });
        self.post("/sessions", &login)
    }

    fn reset(&self, token: &str, password: &str) -> (u16, Value) {
        let body = json!({ "token": token, "password": password });
        self.send("PUT", "/passwords", "", &body.to_string())
    }

    /// Restarts the service, which forgets the limits that it keeps in memory.
    fn restarted(mut self, database: &TestDatabase) -> Self {
        self.stop();
        Self::start(database)
    }

    fn session(&self, answer: (u16, Value)) -> Session<'_> {
        let token = text(&expect(201, answer)["token"]);
        Session {
            service: self,
            token,
        }
    }
}

#[test]
fn a_code_signs_in_once() {
    let database = database();
    let mut service = Service::start(&database);
    for email in ["asha@example.in", "ravi@example.in"] {
        service.sign_up(email);
    }
    expect(202, service.ask("/codes", " ASHA@example.in"));
    let code = service.mail();
    assert_eq!(code.len(), 6);
    // Another user's code is wrong, even if this user has one too.
    expect(202, service.ask("/codes", "ravi@example.in"));
    let ravis = service.mail();
    if ravis != code {
        expect(401, service.try_code("ravi@example.in", &code));
    }
    let asha = service.session(service.try_code("asha@example.in", &code));
    expect(200, asha.get("/users/me"));
    expect(401, service.try_code("asha@example.in", &code));
    // A newer code replaces the one before.
    expect(202, service.ask("/codes", "ravi@example.in"));
    let newer = service.mail();
    if ravis != newer {
        expect(401, service.try_code("ravi@example.in", &ravis));
    }
    expect(201, service.try_code("ravi@example.in", &newer));
    let token = asha.token.clone();
    assert_no_secrets(&service.stop(), &[&token, &code, &newer]);
}

#[test]
fn ten_wrong_codes_and_new_ones_between_never_get_in() {
    let database = database();
    let mut service = Service::start(&database);
    service.sign_up("asha@example.in");
    for round in 0..3 {
        expect(202, service.ask("/codes", "asha@example.in"));
        let code = service.mail();
        let wrong = if code == "000000" { "000001" } else { "000000" };
        for guess in 0..4 {
            // The answer doesn't tell when the guesses are used up.
            let answer = expect(401, service.try_code("asha@example.in", wrong));
            assert_eq!(
                answer["error"], "unknown address or wrong code",
                "{round} {guess}"
            );
        }
        if round > 0 {
            expect(401, service.try_code("asha@example.in", &code));
        }
        // Whatever the service forgets, the database counts.
        service = service.restarted(&database);
    }
    let guesses = "SELECT sum(attempts) FROM auth_tokens WHERE type = 'email_otp'";
    assert_eq!(database.psql(guesses).unwrap(), "5\n");
    // The password still does.
    service.log_in("asha@example.in");
}

#[test]
fn guesses_and_mails_are_limited_for_each_address() {
    let database = database();
    let service = Service::start(&database);
    service.sign_up("asha@example.in");
    for (email, sent) in [("asha@example.in", 1), ("nobody@example.in", 0)] {
        for spelling in [email, &email.to_uppercase(), &format!(" {email} ")] {
            // Another way to guess doesn't help, or a header that names another client.
            let guess = json!({ "email": spelling, "code": "000000", "password": "guess" });
            let mut statuses = Vec::new();
            for _ in 0..4 {
                let headers = format!("X-Forwarded-For: {}\r\n", Uuid::new_v4());
                for path in ["/sessions/code", "/sessions"] {
                    statuses.push(service.send("POST", path, &headers, &guess.to_string()).0);
                }
            }
            assert!(
                statuses.iter().all(|it| [401, 429].contains(it)),
                "{statuses:?}"
            );
            assert!(statuses.contains(&429), "{statuses:?}");
        }
        // The link of the sign-up counts as well.
        let statuses: Vec<u16> = (sent..6)
            .map(|n| service.ask(["/codes", "/passwords/link"][n % 2], email).0)
            .collect();
        let last = statuses.last().unwrap();
        assert!(
            *last == 429 && statuses[..5 - sent].iter().all(|it| *it == 202),
            "{statuses:?}"
        );
        let again = json!({ "first_name": "Eve", "email": email, "password": PASSWORD });
        expect(429, service.post("/users", &again));
    }
    expect(202, service.ask("/codes", "another@example.in"));
    assert!(
        service
            .mails(4)
            .iter()
            .all(|(to, _)| to == "asha@example.in")
    );
}

#[test]
fn a_reset_ends_all_sessions_and_links() {
    let database = database();
    let mut service = Service::start(&database);
    for email in ["asha@example.in", "ravi@example.in"] {
        service.sign_up(email);
    }
    let (asha, ravi) = (
        service.log_in("asha@example.in"),
        service.log_in("ravi@example.in"),
    );
    expect(202, service.ask("/passwords/link", "asha@example.in"));
    let replaced = service.mail();
    expect(202, service.ask("/passwords/link", "asha@example.in"));
    let file = loop {
        if let Some(file) = service.mail_files().pop() {
            break file;
        }
    };
    let mode = fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let link = service.mail();
    expect(202, service.ask("/codes", "asha@example.in"));
    let code = service.mail();

    for wrong in ["", "0", &replaced, &asha.token, &code, "\u{e9}"] {
        expect(409, service.reset(wrong, NEW_PASSWORD));
    }
    expect(422, service.reset(&link, "short"));
    // It isn't a link of another kind, either.
    expect(
        409,
        service.post("/users/verification", &json!({ "token": link })),
    );
    let statuses = thread::scope(|scope| {
        let resets: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| service.reset(&link, NEW_PASSWORD).0))
            .collect();
        let mut statuses: Vec<u16> = resets.into_iter().map(|it| it.join().unwrap()).collect();
        statuses.sort_unstable();
        statuses
    });
    assert_eq!(statuses, [200, 409, 409, 409]);

    expect(401, asha.get("/users/me"));
    expect(401, asha.send("PUT", "/sessions", ""));
    expect(401, service.try_code("asha@example.in", &code));
    expect(401, service.try_password("asha@example.in", PASSWORD));
    expect(201, service.try_password("asha@example.in", NEW_PASSWORD));
    expect(200, ravi.get("/users/me"));
    expect(401, service.try_password("ravi@example.in", NEW_PASSWORD));
    let tokens = [&asha.token, &ravi.token].map(String::clone);
    let printed = service.stop();
    assert_no_secrets(
        &printed,
        &[&tokens[0], &tokens[1], &link, &code, NEW_PASSWORD],
    );
}

#[test]
fn a_changed_password_leaves_one_new_session() {
    let database = database();
    let service = Service::start(&database);
    service.sign_up("asha@example.in");
    let (here, there) = (
        service.log_in("asha@example.in"),
        service.log_in("asha@example.in"),
    );
    let change = |session: &Session<'_>, old: &str, new: &str| {
        let body = json!({ "old": old, "new": new });
        session.send("PUT", "/users/me/password", &body.to_string())
    };
    expect(401, change(&here, "a guess at it", NEW_PASSWORD));
    expect(422, change(&here, PASSWORD, "short"));
    let new = service.session(change(&here, PASSWORD, NEW_PASSWORD));
    for ended in [&here, &there] {
        expect(401, ended.get("/users/me"));
        expect(401, change(ended, NEW_PASSWORD, PASSWORD));
    }
    // Who has stolen a session can't guess the password faster than others.
    let guesses: Vec<u16> = (0..4)
        .map(|_| change(&new, "a guess at it", PASSWORD).0)
        .collect();
    assert!(guesses.contains(&429), "{guesses:?}");
    expect(200, new.get("/users/me"));
}

#[test]
fn sessions_are_listed_and_ended_by_their_user() {
    let database = database();
    let service = Service::start(&database);
    for email in ["asha@example.in", "eve@example.in"] {
        service.sign_up(email);
    }
    let (here, there, eve) = (
        service.log_in("asha@example.in"),
        service.log_in("asha@example.in"),
        service.log_in("eve@example.in"),
    );
    let listed = expect(200, there.get("/sessions"));
    let sessions = listed["sessions"].as_array().unwrap();
    assert_eq!(sessions.len(), 2);
    let end =
        |session: &Session<'_>, id: &str| session.send("DELETE", &format!("/sessions/{id}"), "").0;
    let newest = text(&sessions[0]["family_id"]);
    for id in [&newest, "1", "%00", "%FF", &Uuid::new_v4().to_string()] {
        let status = end(&eve, id);
        assert!([400, 404].contains(&status), "{id}: {status}");
    }
    assert_eq!(end(&here, &newest), 200);
    expect(401, there.get("/users/me"));
    expect(200, here.get("/users/me"));
}

/// Somebody signs up with another's address and waits for its owner to prove it.
#[test]
fn a_proof_of_the_address_does_not_prove_an_attackers_password() {
    let database = database();
    let service = Service::start(&database);
    let attack = |email: &str| {
        let new = json!({ "first_name": "Eve", "email": email, "password": "the attacker's" });
        expect(202, service.post("/users", &new));
        service.mail()
    };
    attack("asha@example.in");
    expect(202, service.ask("/codes", "asha@example.in"));
    let code = service.mail();
    let asha = service.session(service.try_code("asha@example.in", &code));
    assert_eq!(expect(200, asha.get("/users/me"))["email_verified"], true);
    expect(
        401,
        service.try_password("asha@example.in", "the attacker's"),
    );

    let unused = attack("ravi@example.in");
    expect(202, service.ask("/passwords/link", "ravi@example.in"));
    expect(200, service.reset(&service.mail(), NEW_PASSWORD));
    expect(
        401,
        service.try_password("ravi@example.in", "the attacker's"),
    );
    expect(201, service.try_password("ravi@example.in", NEW_PASSWORD));
    let link = json!({ "token": unused });
    expect(409, service.post("/users/verification", &link));

    // An address that nobody proves is free after a day.
    let stale = attack("new@example.in");
    let yesterday = "ALTER TABLE users DISABLE TRIGGER USER;
                     UPDATE users SET created_at = now() - interval '2 days',
                                      updated_at = now() - interval '25 hours'
                      WHERE email = 'new@example.in'";
    database.psql(yesterday).unwrap();
    service.sign_up("new@example.in");
    service.log_in("new@example.in");
    expect(
        409,
        service.post("/users/verification", &json!({ "token": stale })),
    );
}

#[test]
fn a_mail_that_was_promised_is_sent_after_sigterm() {
    let database = database();
    let mut service = Service::start(&database);
    service.sign_up("asha@example.in");
    let mut conn = database.connect_as_owner();
    conn.batch_execute("BEGIN; LOCK TABLE auth_tokens").unwrap();
    expect(202, service.ask("/codes", "asha@example.in"));
    let waiting = "SELECT count(*) FROM pg_stat_activity
                    WHERE datname = current_database() AND wait_event_type = 'Lock'";
    // The worker's purge may wait too.
    let began = Instant::now();
    while database.psql(waiting).unwrap() == "0\n" {
        assert!(began.elapsed() < PATIENCE);
    }
    service.terminate();
    conn.batch_execute("COMMIT").unwrap();
    assert!(service.child.wait().unwrap().success());
    assert_eq!(service.mail().len(), 6);
}

#[test]
fn an_account_is_exported_and_closed_by_its_user() {
    let database = database();
    as_admin(&mut database.connect(), add_services);
    let service = Service::start(&database);
    service.sign_up("asha@example.in");
    let asha = service.log_in("asha@example.in");
    let figma = json!({ "service": "figma", "api_key": API_KEY });
    expect(201, asha.create(&figma));
    let export = expect(200, asha.get("/users/me/export")).to_string();
    assert!(export.contains("asha@example.in"));
    assert_no_secrets(&export, &[&asha.token]);

    let close = |session: &Session<'_>, password: &str| {
        let body = json!({ "password": password }).to_string();
        session.send("DELETE", "/users/me", &body).0
    };
    assert_eq!(close(&asha, "a guess at it"), 401);
    assert_eq!(close(&asha, PASSWORD), 200);
    expect(401, asha.get("/users/me"));
    assert_eq!(close(&asha, PASSWORD), 401);
    assert!(!database.dump(&[]).contains("asha@example.in"));
    // The address is free, and nothing is left to sign in to.
    expect(401, service.try_password("asha@example.in", PASSWORD));
    service.sign_up("asha@example.in");
    let new = service.log_in("asha@example.in");
    assert_eq!(expect(200, new.get("/instances"))["instances"], json!([]));
}
