//! `examples/backend`, driven over HTTP.

use std::collections::{BTreeSet, HashMap};
use std::io::{BufRead, BufReader, Read, Write};
use std::mem;
use std::net::{Shutdown, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bruhmcp_db::enums::AuthType;
use bruhmcp_db::models::{McpService, NewMcpService};
use bruhmcp_devdb::Server;
use diesel::pg::PgConnection;
use hmac::{Hmac, KeyInit, Mac};
use serde_json::{Value, json};
use sha2::Sha256;

use crate::support::{TestDatabase, as_admin, database, database_on, example};

const PASSWORD: &str = "correct horse battery";
const API_KEY: &str = "figd_0123456789";
const CLIENT_SECRET: &str = "client-secret-0123456789";
const CODE: &str = "code-0123456789";
const WEBHOOK_SECRET: &str = "webhook-secret-0123456789";
/// 64 hexadecimal digits each.
const TOKEN_KEY: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
const CREDENTIAL_KEY: &str = "ffeeddccbbaa99887766554433221100ffeeddccbbaa99887766554433221100";

/// The time after which a test gives up.
const PATIENCE: Duration = Duration::from_secs(60);

/// The running service, killed when it is dropped.
struct Service {
    child: Child,
    address: String,
    output: Vec<JoinHandle<String>>,
}

impl Service {
    fn start(database: &TestDatabase) -> Self {
        let mut child = Self::command(&database.app_url()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut stderr = child.stderr.take().unwrap();
        let mut service = Self {
            child,
            address: String::new(),
            output: Vec::new(),
        };
        let read = move || {
            let mut text = String::new();
            stderr.read_to_string(&mut text).unwrap();
            text
        };
        service.output.push(thread::spawn(read));
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        match line.trim_end().strip_prefix("http://") {
            Some(address) => address.clone_into(&mut service.address),
            None => panic!("the service doesn't start: {line}{}", service.stop()),
        }
        let read = move || {
            stdout.read_to_string(&mut line).unwrap();
            line
        };
        service.output.push(thread::spawn(read));
        service
    }

    fn command(database_url: &str) -> Command {
        let mut command = Command::new(example("backend"));
        command
            .env_clear()
            .env("DATABASE_URL", database_url)
            .env("TOKEN_KEY", TOKEN_KEY)
            .env("CREDENTIAL_KEYS", format!("1:{CREDENTIAL_KEY}"))
            .env("WEBHOOK_SECRET", WEBHOOK_SECRET)
            .env("PORT", "0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Sends these bytes as a request.
    fn raw(&self, request: &[u8]) -> (u16, Value) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        let status = response.split(' ').nth(1).unwrap().parse().unwrap();
        let (_, body) = response.split_once("\r\n\r\n").unwrap();
        (status, serde_json::from_str(body).unwrap_or_default())
    }

    fn send(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, Value) {
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}",
            self.address
        );
        self.raw(request.as_bytes())
    }

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.send("POST", path, "", &body.to_string())
    }

    fn get(&self, path: &str) -> (u16, Value) {
        self.send("GET", path, "", "")
    }

    fn sign_up(&self, email: &str) -> Value {
        let new = json!({ "first_name": "Asha", "email": email, "password": PASSWORD });
        expect(201, self.post("/users", &new))
    }

    fn log_in(&self, email: &str) -> Session<'_> {
        let login = json!({ "email": email, "password": PASSWORD });
        let answer = expect(201, self.post("/sessions", &login));
        Session {
            service: self,
            token: text(&answer["token"]),
        }
    }

    fn webhook(&self, event_id: &str, body: &str, secret: &str) -> (u16, Value) {
        let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
        mac.update(body.as_bytes());
        let signature = mac.finalize().into_bytes();
        let signature: String = signature.iter().map(|byte| format!("{byte:02x}")).collect();
        let headers =
            format!("X-Razorpay-Signature: {signature}\r\nX-Razorpay-Event-Id: {event_id}\r\n");
        self.send("POST", "/webhooks/razorpay", &headers, body)
    }

    /// Stops the service as a process manager does, and returns what it printed.
    fn stop(&mut self) -> String {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").arg(pid).status().unwrap().success());
        self.child.wait().unwrap();
        let output = mem::take(&mut self.output).into_iter();
        output.map(|reader| reader.join().unwrap()).collect()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Fails if the service has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A signed-in user.
struct Session<'a> {
    service: &'a Service,
    token: String,
}

impl Session<'_> {
    fn send(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let headers = format!("Authorization: Bearer {}\r\n", self.token);
        self.service.send(method, path, &headers, body)
    }

    fn get(&self, path: &str) -> (u16, Value) {
        self.send("GET", path, "")
    }

    fn create(&self, new: &Value) -> (u16, Value) {
        self.send("POST", "/instances", &new.to_string())
    }

    fn toggle(&self, id: &str, active: bool) -> (u16, Value) {
        let body = json!({ "active": active }).to_string();
        self.send("PATCH", &format!("/instances/{id}"), &body)
    }

    fn call(&self, service: &str, id: &str) -> (u16, Value) {
        self.send("POST", &format!("/call/{service}/{id}"), "")
    }
}

#[track_caller]
fn expect(status: u16, answer: (u16, Value)) -> Value {
    assert_eq!(answer.0, status, "{}", answer.1);
    answer.1
}

#[track_caller]
fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

/// Checks that no secret was printed or stored.
#[track_caller]
fn assert_no_secrets(text: &str, others: &[&str]) {
    let access = format!("access-{CODE}");
    let refresh = format!("refresh-{CODE}");
    let secrets = [
        PASSWORD,
        API_KEY,
        CLIENT_SECRET,
        WEBHOOK_SECRET,
        TOKEN_KEY,
        CREDENTIAL_KEY,
        &access,
        &refresh,
    ];
    for secret in secrets.iter().chain(others) {
        assert!(!text.contains(secret), "{secret} in {text}");
    }
}

fn add_services(conn: &mut PgConnection) {
    for (name, port, type_) in [
        ("figma", 49280, AuthType::ApiKey),
        ("gmail", 49296, AuthType::Oauth),
    ] {
        McpService::register(conn, &NewMcpService::new(name, port, type_)).unwrap();
    }
}

fn state_in(url: &str) -> &str {
    let rest = url.split_once("&state=").unwrap().1;
    rest.split('&').next().unwrap()
}

fn payment(user: &Value) -> String {
    let entity = json!({
        "id": "pay_1", "amount": 99_900, "currency": "INR", "fee": 2_358, "tax": 360,
        "notes": { "user_id": user["id"] },
    });
    let payload =
        json!({ "event": "payment.captured", "payload": { "payment": { "entity": entity } } });
    payload.to_string()
}

#[test]
fn a_customer_from_sign_up_to_pro() {
    let database = database();
    as_admin(&mut database.connect(), add_services);
    let mut service = Service::start(&database);

    let user = service.sign_up(" Asha@Example.IN ");
    assert_eq!(user["email"], "asha@example.in");
    assert!(user.get("password").is_none(), "{user}");
    let again = json!({ "first_name": "A", "email": "ASHA@example.in", "password": PASSWORD });
    expect(409, service.post("/users", &again));

    let wrong = json!({ "email": "asha@example.in", "password": "wrong" });
    let unknown = json!({ "email": "nobody@example.in", "password": PASSWORD });
    let wrong = expect(401, service.post("/sessions", &wrong));
    assert_eq!(wrong, expect(401, service.post("/sessions", &unknown)));
    let asha = service.log_in("asha@example.in");

    // The free plan allows one active instance.
    let figma = json!({ "service": "figma", "api_key": API_KEY, "name": "drawings" });
    let first = expect(201, asha.create(&figma))["instance"].clone();
    let first = text(&first["instance_id"]);
    expect(403, asha.create(&figma));
    for _ in 0..3 {
        expect(200, asha.call("figma", &first));
    }
    let listed = expect(200, asha.get("/instances"));
    assert_eq!(listed["instances"][0]["instance"]["usage_count"], 3);
    assert_eq!(listed["next"], Value::Null);

    // Another user's instance is not found.
    service.sign_up("ravi@example.in");
    let ravi = service.log_in("ravi@example.in");
    expect(404, ravi.call("figma", &first));
    expect(404, ravi.toggle(&first, false));
    assert_eq!(expect(200, ravi.get("/instances"))["instances"], json!([]));

    let off = expect(200, asha.toggle(&first, false));
    assert_eq!(off["instance"]["status"], "inactive");
    expect(409, asha.call("figma", &first));
    let on = expect(200, asha.toggle(&first, true));
    assert_eq!(on["instance"]["status"], "active");

    // Authorized when the plan limit is reached: the tokens are stored, the instance is inactive.
    let gmail =
        json!({ "service": "gmail", "client_id": "client", "client_secret": CLIENT_SECRET });
    let begun = expect(201, asha.create(&gmail));
    let second = text(&begun["instance"]["instance_id"]);
    expect(404, asha.call("gmail", &second));
    let url = text(&begun["authorization_url"]);
    let state = state_in(&url);
    let callback = format!("/oauth/callback?code={CODE}&state={state}");
    // With her state and his session, her instance would run on his account.
    expect(401, service.get(&callback));
    expect(400, ravi.get(&callback));
    let completed = expect(200, asha.get(&callback));
    assert_eq!(completed, json!({ "instance_id": second, "active": false }));
    expect(400, asha.get(&callback));
    expect(403, asha.toggle(&second, true));

    // Refused by the provider.
    let begun = expect(201, asha.create(&gmail));
    let refused = text(&begun["instance"]["instance_id"]);
    let url = text(&begun["authorization_url"]);
    let state = state_in(&url);
    let callback = format!("/oauth/callback?error=access_denied&state={state}");
    expect(409, asha.get(&callback));
    expect(400, asha.get(&callback));

    // 32 concurrent deliveries and another event report the same payment.
    let payment = payment(&user);
    expect(401, service.webhook("evt_1", &payment, "another secret"));
    assert_eq!(
        database
            .psql("SELECT count(*) FROM webhook_events")
            .unwrap(),
        "0\n"
    );
    let barrier = Barrier::new(32);
    let statuses = thread::scope(|scope| {
        let deliveries: Vec<_> = (0..32)
            .map(|_| {
                scope.spawn(|| {
                    barrier.wait();
                    let answer = service.webhook("evt_1", &payment, WEBHOOK_SECRET);
                    text(&expect(200, answer)["status"])
                })
            })
            .collect();
        let mut statuses: HashMap<String, u32> = HashMap::new();
        for delivery in deliveries {
            *statuses.entry(delivery.join().unwrap()).or_default() += 1;
        }
        statuses
    });
    let once = [("processed".to_owned(), 1), ("duplicate".to_owned(), 31)];
    assert_eq!(statuses, HashMap::from(once));
    expect(200, service.webhook("evt_2", &payment, WEBHOOK_SECRET));
    let paid = "SELECT t.amount, t.net_amount, t.fee_amount, p.plan_type, p.expires_at < now() + interval '32 days'
                  FROM subscription_transactions t JOIN user_plans p USING (user_id)";
    assert_eq!(database.psql(paid).unwrap(), "99900|97542|1998|pro|t\n");
    let events = "SELECT external_event_id, processing_status FROM webhook_events ORDER BY 1";
    assert_eq!(
        database.psql(events).unwrap(),
        "evt_1|processed\nevt_2|processed\n"
    );

    // The plan has no limit now.
    expect(200, asha.toggle(&second, true));
    expect(200, asha.call("gmail", &second));
    let mut path = "/instances?limit=2".to_owned();
    let mut pages = Vec::new();
    loop {
        let page = expect(200, asha.get(&path));
        let ids = page["instances"].as_array().unwrap().iter();
        pages.push(
            ids.map(|details| text(&details["instance"]["instance_id"]))
                .collect::<Vec<_>>(),
        );
        match &page["next"] {
            Value::Null => break,
            next => path = format!("/instances?limit=2&after={}", text(next)),
        }
    }
    assert_eq!(pages, [vec![refused, second], vec![first]]);

    // Renewing one token twice ends all sessions of the user.
    let renewed = expect(201, ravi.send("PUT", "/sessions", ""));
    let renewed = Session {
        service: &service,
        token: text(&renewed["token"]),
    };
    expect(401, ravi.get("/instances"));
    expect(200, renewed.get("/instances"));
    expect(401, ravi.send("PUT", "/sessions", ""));
    expect(401, renewed.get("/instances"));
    expect(200, asha.send("DELETE", "/sessions", ""));
    expect(401, asha.get("/instances"));

    let stored = database.dump(&[]);
    let tokens = [&asha.token, &ravi.token, &renewed.token];
    assert_no_secrets(&stored, &tokens.map(String::as_str));
    let output = service.stop();
    assert_eq!(output, format!("http://{}\n", service.address));
}

#[test]
fn bad_requests() {
    let database = database();
    as_admin(&mut database.connect(), add_services);
    let mut service = Service::start(&database);
    service.sign_up("asha@example.in");
    let asha = service.log_in("asha@example.in");

    let sign_up = |first_name: &str, email: &str, password: &str| {
        let new = json!({ "first_name": first_name, "email": email, "password": password });
        service.post("/users", &new).0
    };
    assert_eq!(sign_up("Ravi", "ravi", PASSWORD), 422);
    assert_eq!(sign_up("", "ravi@example.in", PASSWORD), 422);
    assert_eq!(sign_up("Ra\0vi", "ravi@example.in", PASSWORD), 422);
    assert_eq!(sign_up("Ravi", "ravi@example.in", "short"), 422);
    expect(422, service.post("/users", &json!({ "email": 1 })));
    expect(400, service.send("POST", "/users", "", "{\"first_name\": "));
    expect(400, service.send("POST", "/users", "", "\u{1}"));
    expect(
        422,
        service.send("POST", "/sessions", "", &"[".repeat(10_000)),
    );

    let most = 64 * 1024;
    expect(400, service.send("POST", "/users", "", &"x".repeat(most)));
    expect(
        413,
        service.send("POST", "/users", "", &"x".repeat(most + 1)),
    );
    let chunk = format!("{:x}\r\n{}\r\n0\r\n\r\n", most + 1, "x".repeat(most + 1));
    let chunked = "POST /users HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n";
    expect(413, service.raw(format!("{chunked}{chunk}").as_bytes()));
    for length in [i64::MAX as u64, u64::MAX] {
        let cut = format!(
            "POST /users HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{{"
        );
        // The server library answers this itself.
        expect(500, service.raw(cut.as_bytes()));
    }
    expect(400, service.raw(b"nonsense\r\n\r\n"));
    expect(400, service.raw(b"\x00\xff\r\n\r\n"));

    for path in ["/", "/nothing", "/users/", "/instances/1", "//"] {
        expect(404, service.get(path));
    }
    expect(404, service.send("DELETE", "/users", "", ""));

    expect(401, service.get("/instances"));
    for bearer in ["", "Basic x", "Bearer ", "Bearer 0000", "Bearer \u{e9}"] {
        let header = format!("Authorization: {bearer}\r\n");
        expect(401, service.send("GET", "/instances", &header, ""));
    }

    let oauth = |client_id: &str| json!({ "service": "gmail", "client_id": client_id, "client_secret": CLIENT_SECRET });
    for new in [
        json!({}),
        json!({ "service": "unknown", "api_key": API_KEY }),
        json!({ "service": "figma" }),
        json!({ "service": "gmail", "api_key": API_KEY }),
        json!({ "service": "figma", "api_key": "x".repeat(20_000) }),
        json!({ "service": "figma", "api_key": API_KEY, "name": "x".repeat(256) }),
        oauth("a b"),
    ] {
        expect(422, asha.create(&new));
    }
    expect(404, asha.toggle("not-a-key", true));
    let nobodys = "00000000-0000-0000-0000-000000000000";
    expect(404, asha.toggle(nobodys, true));
    expect(404, asha.toggle(nobodys, false));
    expect(404, asha.call("figma", nobodys));
    for query in [
        "limit=0",
        "limit=101",
        "limit=x",
        "after=1",
        &format!("after=9223372036854775807_{nobodys}"),
        &format!("after=-9223372036854775808_{nobodys}"),
    ] {
        expect(400, asha.get(&format!("/instances?{query}")));
    }
    expect(200, asha.get(&format!("/instances?after=0_{nobodys}")));

    expect(400, asha.get("/oauth/callback"));
    expect(400, asha.get("/oauth/callback?state=unknown&code=1"));

    let webhook = |body: &str| service.webhook("evt", body, WEBHOOK_SECRET);
    expect(400, webhook("{"));
    expect(422, webhook("{}"));
    expect(422, webhook("{\"event\": \"\\u0000\"}"));
    expect(401, service.post("/webhooks/razorpay", &json!({})));
    let status = |event_id: &str, body: &str| {
        let answer = service.webhook(event_id, body, WEBHOOK_SECRET);
        text(&expect(200, answer)["status"])
    };
    assert_eq!(status("evt_1", "{\"event\": \"order.paid\"}"), "skipped");
    assert_eq!(
        status("evt_2", "{\"event\": \"payment.captured\"}"),
        "failed"
    );
    let nobody = json!({ "id": nobodys });
    assert_eq!(status("evt_3", &payment(&nobody)), "failed");
    // A failed event is processed again when it is delivered again.
    assert_eq!(status("evt_3", &payment(&nobody)), "failed");
    let failed =
        "SELECT error_message FROM webhook_events WHERE processing_status = 'failed' ORDER BY 1";
    assert_eq!(
        database.psql(failed).unwrap(),
        "the payment was not made through this service\nthere is no such user\n"
    );

    assert_eq!(service.stop(), format!("http://{}\n", service.address));
}

#[test]
fn it_refuses_to_start_with_a_wrong_configuration() {
    let refused = |command: &mut Command| {
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(output.stdout.is_empty());
        String::from_utf8(output.stderr).unwrap()
    };
    let database = database();
    let url = database.app_url();
    let secret_url = "postgresql://somebody:hush@127.0.0.1:1/nothing";
    assert_eq!(
        refused(&mut Service::command(secret_url)),
        "no connection to the database of DATABASE_URL\n"
    );
    let unmigrated = crate::support::empty_database();
    assert_eq!(
        refused(&mut Service::command(&unmigrated.url())),
        "the database isn't migrated\n"
    );
    for (name, value, expected) in [
        ("TOKEN_KEY", "00", "TOKEN_KEY is too short\n"),
        ("TOKEN_KEY", "x", "TOKEN_KEY isn't hexadecimal\n"),
        (
            "CREDENTIAL_KEYS",
            "",
            "CREDENTIAL_KEYS isn't a list of id:key\n",
        ),
        ("PORT", "65536", "PORT isn't a port\n"),
    ] {
        assert_eq!(refused(Service::command(&url).env(name, value)), expected);
    }
    let mut command = Service::command(&url);
    assert_eq!(
        refused(command.env_remove("WEBHOOK_SECRET")),
        "WEBHOOK_SECRET isn't set\n"
    );
}

#[test]
fn the_database_goes_away_and_comes_back() {
    let server = Server::private(&[]).unwrap();
    let database = database_on(&server);
    as_admin(&mut database.connect(), add_services);
    let mut service = Service::start(&database);
    let user = service.sign_up("asha@example.in");
    let asha = service.log_in("asha@example.in");
    let figma = json!({ "service": "figma", "api_key": API_KEY });
    let instance = text(&expect(201, asha.create(&figma))["instance"]["instance_id"]);
    let payment = payment(&user);

    let answers = |status: u16| {
        let began = Instant::now();
        while asha.get("/instances").0 != status {
            assert!(began.elapsed() < PATIENCE, "it never answers {status}");
        }
    };
    // `immediate` is like a crash; `fast` tells the sessions.
    for immediate in [false, true] {
        let over = AtomicBool::new(false);
        let statuses = thread::scope(|scope| {
            // Some requests are running at that time.
            let clients: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        let mut statuses = BTreeSet::new();
                        while !over.load(Ordering::Relaxed) {
                            statuses.insert(asha.toggle(&instance, true).0);
                            statuses.insert(asha.call("figma", &instance).0);
                        }
                        statuses
                    })
                })
                .collect();
            server.stop(immediate).unwrap();
            answers(503);
            let (status, answer) = service.webhook("evt_1", &payment, WEBHOOK_SECRET);
            assert_eq!(
                (status, answer),
                (503, json!({ "error": "try again in a moment" }))
            );
            server.start_again().unwrap();
            answers(200);
            over.store(true, Ordering::Relaxed);
            let statuses = clients.into_iter().map(|client| client.join().unwrap());
            statuses.flatten().collect::<BTreeSet<_>>()
        });
        assert_eq!(statuses, BTreeSet::from([200, 503]));
    }
    // Gateways deliver again what failed.
    let answer = service.webhook("evt_1", &payment, WEBHOOK_SECRET);
    assert_eq!(expect(200, answer)["status"], "processed");
    let token = asha.token;
    assert_no_secrets(&service.stop(), &[&token, &database.app_url()]);
    assert_eq!(service.child.wait().unwrap().signal(), Some(15));
}
