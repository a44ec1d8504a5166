//! `examples/backend`, driven over HTTP.

use std::collections::{BTreeSet, HashMap};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{fs, mem};

use bruhmcp_db::enums::AuthType;
use bruhmcp_db::models::{McpService, NewMcpService};
use bruhmcp_devdb::Server;
use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use hmac::{Hmac, KeyInit, Mac};
use serde_json::{Value, json};
use sha2::Sha256;
use uuid::Uuid;

use crate::support::{TestDatabase, as_admin, database, database_on, example};

mod attacks;
mod events;
mod recovery;
mod worker;

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
    outbox: PathBuf,
}

impl Service {
    fn start(database: &TestDatabase) -> Self {
        let outbox = Path::new(env!("CARGO_TARGET_TMPDIR")).join(Uuid::new_v4().to_string());
        fs::create_dir(&outbox).unwrap();
        let mut command = Self::command(&database.app_url());
        let mut child = command.env("OUTBOX", &outbox).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut stderr = child.stderr.take().unwrap();
        let mut service = Self {
            child,
            address: String::new(),
            output: Vec::new(),
            outbox,
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
            .env("OUTBOX", env!("CARGO_TARGET_TMPDIR"))
            .env("PORT", "0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Sends these bytes as a request, and returns the answer with its head.
    fn exchange(&self, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request).unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        assert_no_secrets(&response, &INTERNALS);
        response
    }

    fn raw(&self, request: &[u8]) -> (u16, Value) {
        let response = self.exchange(request);
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

    /// Signs up and opens the link in the mail.
    fn sign_up(&self, email: &str) {
        let new = json!({ "first_name": "Asha", "email": email, "password": PASSWORD });
        expect(202, self.post("/users", &new));
        let token = self.mail();
        expect(
            200,
            self.post("/users/verification", &json!({ "token": token })),
        );
    }

    /// The text of the only mail that was not read yet.
    fn mail(&self) -> String {
        self.mails(1).remove(0).1
    }

    /// Waits for this many mails, and returns the addresses and texts of those that were not read
    /// yet, oldest first.
    fn mails(&self, count: usize) -> Vec<(String, String)> {
        let began = Instant::now();
        let files = loop {
            let files = self.mail_files();
            if files.len() >= count {
                break files;
            }
            assert!(began.elapsed() < PATIENCE, "there are {}", files.len());
            thread::sleep(Duration::from_millis(10));
        };
        assert_eq!(files.len(), count);
        let read = |file: &PathBuf| {
            let mail: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
            fs::remove_file(file).unwrap();
            (text(&mail["to"]), text(&mail["text"]))
        };
        files.iter().map(read).collect()
    }

    fn mail_files(&self) -> Vec<PathBuf> {
        let files = fs::read_dir(&self.outbox).unwrap();
        let mut files: Vec<_> = files.map(|entry| entry.unwrap().path()).collect();
        // Those with a dot are not finished.
        files.retain(|file| {
            !file
                .file_name()
                .unwrap()
                .as_encoded_bytes()
                .starts_with(b".")
        });
        files.sort();
        files
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
        let headers = format!(
            "X-Razorpay-Signature: {}\r\nX-Razorpay-Event-Id: {event_id}\r\n",
            signature(body, secret)
        );
        self.send("POST", "/webhooks/razorpay", &headers, body)
    }

    /// Sends SIGTERM.
    fn terminate(&self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").arg(pid).status().unwrap().success());
    }

    /// Stops the service as a process manager does, and returns what it printed.
    fn stop(&mut self) -> String {
        self.terminate();
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
        let _ = fs::remove_dir_all(&self.outbox);
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

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.send("POST", path, &body.to_string())
    }

    fn create(&self, new: &Value) -> (u16, Value) {
        self.post("/instances", new)
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

/// What no answer shows: hashes, texts of SQL and of its errors, places in the code.
const INTERNALS: [&str; 12] = [
    "$argon2",
    "SELECT",
    "INSERT",
    "UPDATE",
    "ERROR",
    "DETAIL",
    "violates",
    "constraint",
    "diesel",
    "panicked",
    ".rs:",
    "postgres",
];

fn add_services(conn: &mut PgConnection) {
    for (name, port, type_) in [
        ("figma", 49280, AuthType::ApiKey),
        ("gmail", 49296, AuthType::Oauth),
    ] {
        McpService::register(conn, &NewMcpService::new(name, port, type_)).unwrap();
    }
}

fn signature(body: &str, secret: &str) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    mac.update(body.as_bytes());
    let signature = mac.finalize().into_bytes();
    signature.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Waits until a query returns this.
#[track_caller]
fn await_result(database: &TestDatabase, query: &str, expected: &str) {
    let began = Instant::now();
    loop {
        let result = database.psql(query).unwrap();
        if result == expected {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "{query}: {result}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn state_in(url: &str) -> &str {
    let rest = url.split_once("&state=").unwrap().1;
    rest.split('&').next().unwrap()
}

fn payment(user: &Value) -> String {
    paid("pay_1", 99_900, "INR", user)
}

fn paid(id: &str, amount: i64, currency: &str, user: &Value) -> String {
    let entity = json!({
        "id": id, "amount": amount, "currency": currency,
        "fee": amount * 2_358 / 99_900, "tax": amount * 360 / 99_900,
        "created_at": 1_790_000_000, "notes": { "user_id": user["id"] },
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

    service.sign_up(" Asha@Example.IN ");

    let wrong = json!({ "email": "asha@example.in", "password": "wrong" });
    let unknown = json!({ "email": "nobody@example.in", "password": PASSWORD });
    let wrong = expect(401, service.post("/sessions", &wrong));
    assert_eq!(wrong, expect(401, service.post("/sessions", &unknown)));
    let asha = service.log_in("asha@example.in");
    let user = expect(200, asha.get("/users/me"));
    assert_eq!(user["email"], "asha@example.in");
    assert!(user.get("password").is_none(), "{user}");

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
    let granting = json!({ "code": CODE, "state": state_in(&url) });
    let completed = expect(200, asha.post("/oauth/callback", &granting));
    assert_eq!(completed, json!({ "instance_id": second, "active": false }));
    expect(400, asha.post("/oauth/callback", &granting));
    expect(403, asha.toggle(&second, true));

    // Refused by the provider.
    let begun = expect(201, asha.create(&gmail));
    let refused = text(&begun["instance"]["instance_id"]);
    let url = text(&begun["authorization_url"]);
    let refusal = json!({ "state": state_in(&url) });
    expect(409, asha.post("/oauth/callback", &refusal));
    expect(400, asha.post("/oauth/callback", &refusal));

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
    assert_eq!(database.psql(paid).unwrap(), "99900|97542|2358|pro|t\n");
    let events = "SELECT external_event_id, processing_status, user_id IS NOT NULL
                    FROM webhook_events ORDER BY 1";
    assert_eq!(
        database.psql(events).unwrap(),
        "evt_1|processed|t\nevt_2|processed|t\n"
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

    // A second tab may renew with the same token, for some seconds. Later, that ends the session.
    let renewed = expect(201, ravi.send("PUT", "/sessions", ""));
    let renewed = Session {
        service: &service,
        token: text(&renewed["token"]),
    };
    expect(401, ravi.get("/instances"));
    expect(200, renewed.get("/instances"));
    expect(201, ravi.send("PUT", "/sessions", ""));
    database
        .psql(
            "ALTER TABLE auth_tokens DISABLE TRIGGER auth_tokens_fixed;
             UPDATE auth_tokens SET used_at = used_at - interval '1 minute'",
        )
        .unwrap();
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
        let status = service.raw(cut.as_bytes()).0;
        assert!((400..500).contains(&status), "{status}");
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

    expect(422, asha.post("/oauth/callback", &json!({})));
    let unknown = json!({ "state": "unknown", "code": "1" });
    expect(401, service.post("/oauth/callback", &unknown));
    expect(400, asha.post("/oauth/callback", &unknown));
    expect(
        409,
        service.post("/users/verification", &json!({ "token": "0" })),
    );

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
    // A failed event is tried again after a pause, whether it is delivered again or not.
    assert_eq!(status("evt_3", &payment(&nobody)), "duplicate");
    let sooner = "UPDATE webhook_events SET available_at = now() WHERE external_event_id = 'evt_3'";
    database.psql(sooner).unwrap();
    let attempts = "SELECT attempts FROM webhook_events WHERE external_event_id = 'evt_3'";
    await_result(&database, attempts, "2\n");
    let failed =
        "SELECT error_message FROM webhook_events WHERE processing_status = 'failed' ORDER BY 1";
    assert_eq!(
        database.psql(failed).unwrap(),
        "a part of the event is missing or malformed\nthere is no such user\n"
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
            "1",
            "CREDENTIAL_KEYS isn't a list of id:key\n",
        ),
        ("PORT", "65536", "PORT isn't a port\n"),
    ] {
        assert_eq!(refused(Service::command(&url).env(name, value)), expected);
    }
    for secret in [None, Some("")] {
        let mut command = Service::command(&url);
        match secret {
            Some(secret) => command.env("WEBHOOK_SECRET", secret),
            None => command.env_remove("WEBHOOK_SECRET"),
        };
        assert_eq!(refused(&mut command), "WEBHOOK_SECRET isn't set\n");
    }
}

/// Says that it is over when it is dropped.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn the_database_goes_away_and_comes_back() {
    let server = Server::private(&[]).unwrap();
    let database = database_on(&server);
    as_admin(&mut database.connect(), add_services);
    let mut service = Service::start(&database);
    service.sign_up("asha@example.in");
    let asha = service.log_in("asha@example.in");
    let user = expect(200, asha.get("/users/me"));
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
            // Also after a panic, or the clients go on for ever.
            let end = Ending(&over);
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
            drop(end);
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
    assert!(service.child.wait().unwrap().success());
}

/// What an attacker sees does not depend on whether an address has an account.
#[test]
fn sign_up_and_login_do_not_tell_which_addresses_exist() {
    let database = database();
    let service = Service::start(&database);
    service.sign_up("asha@example.in");

    let sign_up = |email: &str| {
        let new = json!({ "first_name": "Eve", "email": email, "password": "another password" });
        expect(202, service.post("/users", &new))
    };
    assert_eq!(sign_up("ASHA@example.in"), sign_up("new@example.in"));
    let mails = service.mails(2);
    let told = ("asha@example.in", "you have an account");
    assert!(mails.contains(&(told.0.to_owned(), told.1.to_owned())));
    assert!(mails.iter().any(|mail| mail.0 == "new@example.in"));

    // The password of the second sign-up doesn't count, and that of an unproven address neither.
    let log_in = |email: &str, password: &str| {
        service.post(
            "/sessions",
            &json!({ "email": email, "password": password }),
        )
    };
    expect(401, log_in("asha@example.in", "another password"));
    expect(403, log_in("new@example.in", "another password"));

    // Both are limited after five attempts, also if the sixth has the right password.
    for email in ["asha@example.in", "nobody@example.in"] {
        let statuses: Vec<u16> = (0..6).map(|_| log_in(email, "guess").0).collect();
        assert_eq!(statuses.last(), Some(&429), "{statuses:?}");
        assert_eq!(log_in(email, PASSWORD).0, 429);
    }
    assert_eq!(log_in(" Asha@example.in", PASSWORD).0, 429);
}

#[test]
fn an_authorization_belongs_to_the_session_that_began_it() {
    let database = database();
    as_admin(&mut database.connect(), add_services);
    let service = Service::start(&database);
    for email in ["asha@example.in", "eve@example.in"] {
        service.sign_up(email);
    }
    let (asha, eve) = (
        service.log_in("asha@example.in"),
        service.log_in("eve@example.in"),
    );
    let gmail =
        json!({ "service": "gmail", "client_id": "client", "client_secret": CLIENT_SECRET });
    let begun = expect(201, asha.create(&gmail));
    let url = text(&begun["authorization_url"]);
    let granting = json!({ "code": CODE, "state": state_in(&url) });
    expect(401, service.post("/oauth/callback", &granting));
    expect(400, eve.post("/oauth/callback", &granting));
    expect(200, asha.post("/oauth/callback", &granting));
}

#[test]
fn a_payment_of_less_buys_no_plan() {
    let database = database();
    let service = Service::start(&database);
    service.sign_up("asha@example.in");
    let user = expect(200, service.log_in("asha@example.in").get("/users/me"));
    for (n, (amount, currency)) in [(1, "INR"), (99_899, "INR"), (99_900, "IDR")]
        .into_iter()
        .enumerate()
    {
        let body = paid(&format!("pay_{n}"), amount, currency, &user);
        let answer = service.webhook(&format!("evt_{n}"), &body, WEBHOOK_SECRET);
        assert_eq!(expect(200, answer)["status"], "processed");
    }
    let plan = "SELECT plan_type, (SELECT count(*) FROM subscription_transactions) FROM user_plans";
    assert_eq!(database.psql(plan).unwrap(), "free|3\n");
    let body = paid("pay_4", 99_900, "INR", &user);
    expect(200, service.webhook("evt_4", &body, WEBHOOK_SECRET));
    assert_eq!(database.psql(plan).unwrap(), "pro|4\n");
}

#[test]
fn slow_clients_do_not_keep_others_waiting() {
    let database = database();
    let service = Service::start(&database);
    let connect = |sent: &[u8]| {
        let mut stream = TcpStream::connect(&service.address).unwrap();
        stream.write_all(sent).unwrap();
        stream
    };
    let idle: Vec<TcpStream> = (0..64).map(|_| connect(b"")).collect();
    let head = b"POST /users HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{";
    let mut slow: Vec<TcpStream> = (0..64).map(|_| connect(head)).collect();
    expect(401, service.get("/instances"));
    service.sign_up("asha@example.in");

    // A body that doesn't come ends its request.
    let mut response = [0; 12];
    slow[0].set_read_timeout(Some(PATIENCE)).unwrap();
    slow[0].read_exact(&mut response).unwrap();
    assert_eq!(&response, b"HTTP/1.1 408");
    drop(idle);
}

#[test]
fn metrics_have_a_port_of_their_own() {
    let database = database();
    let mut child = Service::command(&database.app_url())
        .env("METRICS_PORT", "0")
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut address = || lines.next().unwrap().unwrap().replace("http://", "");
    let (service, metrics) = (address(), address().replace("/metrics", ""));
    let get = |address: &str, path: &str| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        response
    };
    get(&service, "/users/me");
    get(&service, "/sessions/4ae5f6a0-0000-4000-8000-000000000000");
    assert!(get(&service, "/metrics").starts_with("HTTP/1.1 404"));
    let text = get(&metrics, "/metrics");
    child.kill().unwrap();
    child.wait().unwrap();
    for line in [
        r#"http_request_seconds_count{method="GET",route="/users/me",status="401"} 1"#,
        r#"db_connections{state="idle"} "#,
    ] {
        assert!(text.contains(line), "{text}");
    }
    assert!(!text.contains("4ae5f6a0"), "{text}");
}

#[test]
fn requests_that_have_begun_are_finished_after_sigterm() {
    let database = database();
    let mut service = Service::start(&database);
    service.sign_up("asha@example.in");
    let asha = service.log_in("asha@example.in").token;
    let mut conn = database.connect_as_owner();
    conn.batch_execute("BEGIN; LOCK TABLE auth_tokens").unwrap();
    let address = service.address.clone();
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        let request = format!(
            "GET /users/me HTTP/1.1\r\nHost: a\r\nConnection: close\r\nAuthorization: Bearer {asha}\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        response
    });
    let waiting = "SELECT count(*) FROM pg_stat_activity
                    WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let began = Instant::now();
    while database.psql(waiting).unwrap() == "0\n" {
        assert!(began.elapsed() < PATIENCE);
    }
    service.terminate();
    // No new connections.
    let began = Instant::now();
    while TcpStream::connect(&service.address).is_ok() {
        assert!(began.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(10));
    }
    conn.batch_execute("COMMIT").unwrap();
    let response = client.join().unwrap();
    assert!(response.starts_with("HTTP/1.1 200"), "{response}");
    assert!(service.child.wait().unwrap().success());
}
