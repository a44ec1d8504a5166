//! What an operation sends to the server: its round trips, and that its statements are prepared.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use bruhmcp_db::enums::{
    AuditStatus, AuthTokenType, CreditSource, PaymentGateway, TransactionStatus,
};
use bruhmcp_db::ids::{InstanceId, ServiceId, UserId};
use bruhmcp_db::models::*;
use bruhmcp_db::schema::auth_tokens;
use bruhmcp_db::{Durability, HashedToken, Page, SecretText, StateDigest};
use chrono::{TimeDelta, Utc};
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::{BigInt, Integer, Text};
use serde_json::{Value, json};

use crate::fixtures::{self, create, create_inactive, create_pending, sealed};
use crate::support::{TestDatabase, database};

/// A message of a client.
#[derive(Debug)]
enum Sent {
    /// Prepares a statement, also the unnamed one.
    Parse(String),
    /// A statement without parameters that is not prepared.
    Query(String),
    /// Ends a group of messages.
    Sync,
}

/// Forwards connections to a server and notes what the clients send.
struct Proxy {
    port: u16,
    sent: Arc<Mutex<Vec<Sent>>>,
}

impl Proxy {
    fn start(database: &TestDatabase) -> Self {
        let server = Address::of(database);
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let sent = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&sent);
        thread::spawn(move || {
            for client in listener.incoming() {
                server.serve(client.unwrap(), &notes).unwrap();
            }
        });
        Self { port, sent }
    }

    /// The parameters of a URL that lead a client here.
    fn parameters(&self) -> String {
        let port = self.port;
        format!("host=127.0.0.1&port={port}&sslmode=disable&gssencmode=disable")
    }

    /// Returns what was sent since the last call.
    fn sent(&self) -> Vec<Sent> {
        std::mem::take(&mut *self.sent.lock().unwrap())
    }
}

#[derive(Clone)]
enum Address {
    Tcp(String),
    Unix(String),
}

impl Address {
    fn of(database: &TestDatabase) -> Self {
        let address = database
            .psql(
                "SELECT CASE WHEN inet_server_addr() IS NULL THEN split_part(directories, ', ', 1)
                        || '/.s.PGSQL.' || port
                    ELSE host(inet_server_addr()) || ':' || inet_server_port() END
                   FROM current_setting('unix_socket_directories') AS directories,
                        current_setting('port') AS port",
            )
            .unwrap();
        let address = address.trim().to_owned();
        if address.starts_with('/') {
            Self::Unix(address)
        } else {
            Self::Tcp(address)
        }
    }

    fn serve(&self, client: TcpStream, sent: &Arc<Mutex<Vec<Sent>>>) -> io::Result<()> {
        client.set_nodelay(true)?;
        let back = client.try_clone()?;
        let sent = Arc::clone(sent);
        match self {
            Self::Unix(path) => {
                let server = UnixStream::connect(path)?;
                pump(server.try_clone()?, back);
                thread::spawn(move || {
                    let _ = forward(client, &server, &sent);
                    server.shutdown(Shutdown::Both)
                });
            }
            Self::Tcp(address) => {
                let server = TcpStream::connect(address)?;
                server.set_nodelay(true)?;
                pump(server.try_clone()?, back);
                thread::spawn(move || {
                    let _ = forward(client, &server, &sent);
                    server.shutdown(Shutdown::Both)
                });
            }
        }
        Ok(())
    }
}

/// Passes the server's answers on.
fn pump(mut server: impl Read + Send + 'static, mut client: TcpStream) {
    thread::spawn(move || {
        let _ = io::copy(&mut server, &mut client);
        client.shutdown(Shutdown::Both)
    });
}

/// Passes a client's messages on. Each is noted before the server can answer it.
fn forward(
    mut client: impl Read,
    mut server: impl Write,
    sent: &Mutex<Vec<Sent>>,
) -> io::Result<()> {
    // The first message has no type. Without TLS, it is the only such one.
    let mut head = 0;
    loop {
        let mut message = vec![0; head + 4];
        client.read_exact(&mut message)?;
        let length: [u8; 4] = message[head..].try_into().unwrap();
        let end = head + usize::try_from(u32::from_be_bytes(length)).unwrap();
        message.resize(end, 0);
        client.read_exact(&mut message[head + 4..])?;
        if head == 1 {
            let mut texts = message[5..]
                .split(|byte| *byte == 0)
                .map(|text| String::from_utf8_lossy(text).into_owned());
            let note = match message[0] {
                // The name of the statement comes first.
                b'P' => texts.nth(1).map(Sent::Parse),
                b'Q' => texts.next().map(Sent::Query),
                b'S' => Some(Sent::Sync),
                _ => None,
            };
            sent.lock().unwrap().extend(note);
        }
        head = 1;
        server.write_all(&message)?;
    }
}

/// Statements that need no plan.
fn is_control(statement: &str) -> bool {
    [
        "BEGIN",
        "COMMIT",
        "SAVEPOINT ",
        "RELEASE ",
        "SET CONSTRAINTS ",
        "SET LOCAL ",
    ]
    .iter()
    .any(|control| statement.starts_with(control))
}

/// Counts what operations send.
struct Counter {
    proxy: Proxy,
    /// As the service, through the proxy.
    conn: PgConnection,
    /// Past it.
    direct: PgConnection,
    wrong: Vec<String>,
}

impl Counter {
    fn new(database: &TestDatabase) -> Self {
        let proxy = Proxy::start(database);
        let url = format!("{}&{}", database.app_url(), proxy.parameters());
        Self {
            conn: PgConnection::establish(&url).unwrap(),
            direct: database.connect(),
            proxy,
            wrong: Vec::new(),
        }
    }

    /// Calls an operation that prepares all its statements. The first two calls warm up.
    fn prepared<T>(
        &mut self,
        name: &str,
        round_trips: usize,
        arrange: impl FnMut(&mut PgConnection) -> T,
        operation: impl FnMut(&mut PgConnection, T),
    ) {
        self.count(name, round_trips, 0, arrange, operation);
    }

    /// Like [`prepared`](Self::prepared), for an operation that can be called again as it is.
    fn repeated(
        &mut self,
        name: &str,
        round_trips: usize,
        mut operation: impl FnMut(&mut PgConnection),
    ) {
        self.prepared(name, round_trips, |_| (), |conn, ()| operation(conn));
    }

    /// Calls an operation one of whose statements has too many forms to keep them all.
    fn unprepared<T>(
        &mut self,
        name: &str,
        round_trips: usize,
        arrange: impl FnMut(&mut PgConnection) -> T,
        operation: impl FnMut(&mut PgConnection, T),
    ) {
        self.count(name, round_trips, 1, arrange, operation);
    }

    fn count<T>(
        &mut self,
        name: &str,
        round_trips: usize,
        unprepared: usize,
        mut arrange: impl FnMut(&mut PgConnection) -> T,
        mut operation: impl FnMut(&mut PgConnection, T),
    ) {
        let mut sent = Vec::new();
        for _ in 0..3 {
            let arranged = arrange(&mut self.direct);
            self.proxy.sent();
            operation(&mut self.conn, arranged);
            sent = self.proxy.sent();
        }
        let answered = sent.iter().filter(|sent| !matches!(sent, Sent::Parse(_)));
        let found = answered.count();
        if found != round_trips {
            self.wrong.push(format!("{name}: {found} round trips"));
        }
        let parsed = sent.into_iter().filter_map(|sent| match sent {
            Sent::Parse(statement) => Some(statement),
            Sent::Query(statement) if !is_control(&statement) => Some(statement),
            Sent::Query(_) | Sent::Sync => None,
        });
        let parsed: Vec<String> = parsed.collect();
        if parsed.len() != unprepared {
            self.wrong.push(format!("{name} parses {parsed:#?}"));
        }
    }

    fn check(self) {
        assert!(self.wrong.is_empty(), "{}", self.wrong.join("\n"));
    }
}

/// A number that no other call returns.
fn unique() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn hashed(type_: AuthTokenType) -> HashedToken {
    let mut digest = [0; 32];
    digest[..8].copy_from_slice(&unique().to_be_bytes());
    HashedToken::new(type_, digest)
}

/// Only some codes and links are issued in an hour.
fn forget_issued(conn: &mut PgConnection, user: UserId) {
    diesel::delete(auth_tokens::table.filter(auth_tokens::user_id.eq(user)))
        .execute(conn)
        .unwrap();
}

fn issue(conn: &mut PgConnection, user: UserId, type_: AuthTokenType) -> HashedToken {
    forget_issued(conn, user);
    let token = hashed(type_);
    AuthToken::issue(conn, user, &token, hour())
        .unwrap()
        .unwrap();
    token
}

fn hour() -> TimeDelta {
    TimeDelta::hours(1)
}

/// A pro user, a service and an instance of the user.
fn user_with_instance(database: &TestDatabase) -> (UserId, ServiceId, InstanceId) {
    let conn = &mut database.connect();
    let user = fixtures::pro_user(conn);
    let service = fixtures::service(conn, "figma", 49280);
    let instance = create(conn, user, service).unwrap();
    (user, service, instance)
}

#[test]
fn accounts_and_tokens() {
    use AuthTokenType::{EmailOtp, EmailVerification, PasswordReset, Refresh};
    let database = database();
    let (user, ..) = user_with_instance(&database);
    let mut counter = Counter::new(&database);
    let email = |conn: &mut PgConnection| User::find(conn, user).unwrap().unwrap().email;

    counter.prepared(
        "User::sign_up",
        1,
        |_| format!("{}@example.in", unique()),
        |conn, email| {
            User::sign_up(conn, &NewUser::new("Asha", "Rao", &email)).unwrap();
        },
    );
    counter.repeated("User::find_active", 1, |conn| {
        User::find_active(conn, user).unwrap().unwrap();
    });
    counter.prepared("User::find_active_by_email", 1, email, |conn, email| {
        User::find_active_by_email(conn, &email).unwrap().unwrap();
    });
    counter.repeated("User::record_login", 1, |conn| {
        User::record_login(conn, user).unwrap().unwrap();
    });
    counter.repeated("User::update", 1, |conn| {
        let changes = UserChangeset {
            first_name: Some("Asha"),
            ..UserChangeset::default()
        };
        User::update(conn, user, &changes).unwrap().unwrap();
    });
    counter.repeated("User::lock", 2, |conn| {
        User::lock(conn, user).unwrap().unwrap();
    });
    counter.repeated("User::export", 1, |conn| {
        User::export(conn, user).unwrap().unwrap();
    });
    counter.repeated("User::change_password", 7, |conn| {
        User::change_password(conn, user, None).unwrap().unwrap();
    });

    counter.prepared(
        "AuthToken::issue",
        6,
        |conn| {
            forget_issued(conn, user);
            hashed(PasswordReset)
        },
        |conn, token| {
            AuthToken::issue(conn, user, &token, hour())
                .unwrap()
                .unwrap();
        },
    );
    let reset = |conn: &mut PgConnection| issue(conn, user, PasswordReset);
    counter.prepared("AuthToken::find_live", 1, reset, |conn, token| {
        AuthToken::find_live(conn, &token).unwrap().unwrap();
    });
    counter.prepared("AuthToken::consume", 1, reset, |conn, token| {
        AuthToken::consume(conn, &token).unwrap();
    });
    counter.prepared(
        "AuthToken::consume, refused",
        2,
        |_| hashed(EmailVerification),
        |conn, token| {
            AuthToken::consume(conn, &token).unwrap_err();
        },
    );
    counter.prepared("User::reset_password", 8, reset, |conn, token| {
        let hash = "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ$aGFzaGhhc2hoYXNoaGFzaGhhc2g";
        User::reset_password(conn, &token, &SecretText::from(hash)).unwrap();
    });
    let code = |conn: &mut PgConnection| issue(conn, user, EmailOtp);
    counter.prepared("AuthToken::check_code", 5, code, |conn, code| {
        let outcome = AuthToken::check_code(conn, user, &code).unwrap();
        assert!(matches!(outcome, CodeCheck::Right(_)), "{outcome:?}");
    });
    counter.prepared(
        "AuthToken::begin_session",
        5,
        |_| hashed(Refresh),
        |conn, token| {
            AuthToken::begin_session(conn, user, &token, hour(), hour())
                .unwrap()
                .unwrap();
        },
    );
    let session = |conn: &mut PgConnection| issue(conn, user, Refresh);
    counter.prepared(
        "AuthToken::find_live of a session",
        1,
        session,
        |conn, token| {
            AuthToken::find_live(conn, &token).unwrap().unwrap();
        },
    );
    counter.prepared("AuthToken::rotate", 6, session, |conn, token| {
        let outcome = AuthToken::rotate(conn, &token, &hashed(Refresh), hour()).unwrap();
        assert!(matches!(outcome, Rotation::Rotated(_)), "{outcome:?}");
    });
    counter.prepared(
        "AuthToken::revoke of a session",
        5,
        session,
        |conn, token| {
            assert!(AuthToken::revoke(conn, &token).unwrap());
        },
    );
    counter.repeated("AuthToken::list_sessions", 1, |conn| {
        AuthToken::list_sessions(conn, user).unwrap();
    });
    counter.prepared("AuthToken::revoke_all", 4, session, |conn, _| {
        AuthToken::revoke_all(conn, user, None).unwrap();
    });
    counter.check();
}

#[test]
fn instances_and_credentials() {
    let database = database();
    let (user, service, instance) = user_with_instance(&database);
    let mut counter = Counter::new(&database);

    counter.repeated("McpInstance::find_with_credentials", 1, |conn| {
        McpInstance::find_with_credentials(conn, instance, "figma", Some(user))
            .unwrap()
            .unwrap();
    });
    counter.repeated("McpInstance::record_call", 1, |conn| {
        McpInstance::record_call(conn, instance, Some(user))
            .unwrap()
            .unwrap();
    });
    counter.repeated("McpInstance::record_call of anybody", 1, |conn| {
        McpInstance::record_call(conn, instance, None)
            .unwrap()
            .unwrap();
    });
    for (durability, round_trips) in [(Durability::Synced, 1), (Durability::Unsynced, 4)] {
        counter.repeated("McpInstance::record_calls", round_trips, |conn| {
            McpInstance::record_calls(conn, &[InstanceCalls::one(instance)], durability).unwrap();
        });
    }
    let inactive = |conn: &mut PgConnection| create_inactive(conn, user, service);
    counter.prepared(
        "McpInstance::record_call, refused",
        2,
        inactive,
        |conn, instance| {
            McpInstance::record_call(conn, instance, Some(user))
                .unwrap()
                .unwrap_err();
        },
    );
    counter.repeated("McpInstance::list_by_user", 1, |conn| {
        let filter = InstanceFilter::default();
        McpInstance::list_by_user(conn, user, filter, Page::first(10)).unwrap();
    });
    counter.repeated("McpInstance::find_by_user", 1, |conn| {
        McpInstance::find_by_user(conn, instance, user)
            .unwrap()
            .unwrap();
    });
    counter.repeated("McpInstance::count_active", 1, |conn| {
        McpInstance::count_active(conn, user).unwrap();
    });
    counter.repeated("McpInstance::create", 6, |conn| {
        create(conn, user, service).unwrap();
    });
    counter.prepared("McpInstance::activate", 4, inactive, |conn, instance| {
        McpInstance::activate(conn, instance, user).unwrap();
    });
    counter.prepared(
        "McpInstance::deactivate",
        1,
        |conn| create(conn, user, service).unwrap(),
        |conn, instance| {
            McpInstance::deactivate(conn, instance, user)
                .unwrap()
                .unwrap();
        },
    );
    counter.prepared("McpInstance::renew", 4, inactive, |conn, instance| {
        McpInstance::renew(conn, instance, user, None).unwrap();
    });
    counter.prepared("McpInstance::rename", 1, inactive, |conn, instance| {
        McpInstance::rename(conn, instance, user, 2, Some("mine")).unwrap();
    });
    counter.prepared("McpInstance::delete", 5, inactive, |conn, instance| {
        assert!(McpInstance::delete(conn, instance, user).unwrap());
    });

    let pending = |conn: &mut PgConnection| {
        let instance = create_pending(conn, user, service);
        McpCredential::find_by_instance(conn, instance)
            .unwrap()
            .unwrap()
    };
    let state = || {
        let mut digest = [0; 32];
        digest[..8].copy_from_slice(&unique().to_be_bytes());
        StateDigest::new(digest)
    };
    let tokens = || OauthTokens {
        access_token: sealed(),
        refresh_token: Some(sealed()),
        expires_at: Some(Utc::now()),
        scope: None,
    };
    counter.prepared("McpCredential::begin_oauth", 4, pending, |conn, row| {
        let lifetime = McpCredential::STATE_LIFETIME;
        McpCredential::begin_oauth(conn, row.credential_id, &state(), lifetime, &sealed(), None)
            .unwrap();
    });
    counter.prepared(
        "McpCredential::consume_state",
        1,
        |conn| {
            let (row, state) = (pending(conn), state());
            let lifetime = McpCredential::STATE_LIFETIME;
            McpCredential::begin_oauth(conn, row.credential_id, &state, lifetime, &sealed(), None)
                .unwrap();
            state
        },
        |conn, state| {
            McpCredential::consume_state(conn, user, &state).unwrap();
        },
    );
    counter.prepared("McpCredential::complete_oauth", 10, pending, |conn, row| {
        McpCredential::complete_oauth(conn, row.credential_id, &tokens()).unwrap();
    });
    let completed = |conn: &mut PgConnection| {
        let row = pending(conn);
        McpCredential::complete_oauth(conn, row.credential_id, &tokens())
            .unwrap()
            .credential
    };
    let due = || Utc::now() + hour();
    counter.prepared("McpCredential::lease_refresh", 1, completed, |conn, row| {
        let lease = McpCredential::lease_refresh(conn, row.credential_id, due(), hour()).unwrap();
        assert!(matches!(lease, RefreshLease::Leased(_)), "{lease:?}");
    });
    counter.prepared("McpCredential::claim_due", 1, completed, |conn, _| {
        let claimed = McpCredential::claim_due(conn, due(), hour(), 1).unwrap();
        assert_eq!(claimed.len(), 1);
    });
    counter.prepared(
        "McpCredential::store_refreshed",
        6,
        completed,
        |conn, row| {
            McpCredential::store_refreshed(conn, &row, &tokens()).unwrap();
        },
    );
    counter.prepared(
        "McpCredential::refresh_failed",
        4,
        completed,
        |conn, row| {
            McpCredential::refresh_failed(conn, &row, "network", None, hour()).unwrap();
        },
    );
    counter.prepared(
        "McpCredential::refresh_refused",
        5,
        completed,
        |conn, row| {
            McpCredential::refresh_refused(conn, &row).unwrap();
        },
    );

    counter.repeated("TokenAudit::insert", 1, |conn| {
        let new = NewTokenAudit::new(instance, "call", AuditStatus::Success);
        TokenAudit::insert(conn, &new).unwrap();
    });
    for (durability, round_trips) in [(Durability::Synced, 1), (Durability::Unsynced, 4)] {
        counter.repeated("TokenAudit::insert_many", round_trips, |conn| {
            let new = NewTokenAudit::new(instance, "call", AuditStatus::Success);
            TokenAudit::insert_many(conn, &[new.clone(), new], durability).unwrap();
        });
    }
    counter.repeated("TokenAudit::list", 1, |conn| {
        TokenAudit::list(conn, AuditFilter::of_instance(instance), Page::first(10)).unwrap();
    });
    counter.check();
}

#[test]
fn money_and_webhooks() {
    let database = database();
    let (user, ..) = user_with_instance(&database);
    let mut counter = Counter::new(&database);
    let captured = |conn: &mut PgConnection| {
        let id = unique().to_string();
        pay(conn, user, &id, TransactionStatus::Captured).id
    };

    counter.prepared(
        "SubscriptionTransaction::record_payment",
        4,
        |_| unique().to_string(),
        |conn, id| {
            pay(conn, user, &id, TransactionStatus::Captured);
        },
    );
    // Sixteen optional fields: 65 536 texts.
    counter.unprepared(
        "SubscriptionTransaction::advance",
        1,
        |conn| {
            let id = unique().to_string();
            pay(conn, user, &id, TransactionStatus::Created).id
        },
        |conn, id| {
            let changes = SubscriptionTransactionChangeset::default();
            let to = TransactionStatus::Captured;
            SubscriptionTransaction::advance(conn, id, to, &changes).unwrap();
        },
    );
    counter.prepared(
        "SubscriptionTransaction::refund",
        9,
        captured,
        |conn, id| {
            let refund = unique().to_string();
            SubscriptionTransaction::refund(conn, id, &NewRefund::new(&refund, 100)).unwrap();
        },
    );
    counter.repeated("SubscriptionTransaction::list_by_user", 1, |conn| {
        SubscriptionTransaction::list_by_user(conn, user, Page::first(10)).unwrap();
    });

    counter.prepared(
        "AccountCredit::grant",
        4,
        |_| unique().to_string(),
        |conn, id| {
            AccountCredit::grant(conn, &credit(user, &id)).unwrap();
        },
    );
    counter.prepared(
        "AccountCredit::grant, again",
        5,
        |conn| {
            let id = unique().to_string();
            AccountCredit::grant(conn, &credit(user, &id)).unwrap();
            id
        },
        |conn, id| {
            let outcome = AccountCredit::grant(conn, &credit(user, &id)).unwrap();
            assert!(matches!(outcome, Recorded::Existing(_)), "{outcome:?}");
        },
    );
    counter.repeated("AccountCredit::balance", 1, |conn| {
        AccountCredit::balance(conn, user, "INR").unwrap();
    });
    counter.repeated("AccountCredit::spend", 6, |conn| {
        AccountCredit::spend(conn, user, "INR", 10).unwrap();
    });

    counter.repeated("UserPlan::find_by_user", 1, |conn| {
        UserPlan::find_by_user(conn, user).unwrap().unwrap();
    });
    counter.repeated("UserPlan::upgrade", 1, |conn| {
        UserPlan::upgrade(conn, user, &ProPlan::default()).unwrap();
    });
    counter.repeated("UserSubscription::current", 1, |conn| {
        UserSubscription::current(conn, user).unwrap();
    });

    counter.repeated("UserBillingDetails::upsert", 4, |conn| {
        UserBillingDetails::upsert(conn, &fixtures::address(user)).unwrap();
    });

    let payload = json!({});
    let event = |conn: &mut PgConnection| claimed(conn, &unique().to_string(), &payload);
    counter.prepared(
        "WebhookEvent::record_claimed",
        1,
        |_| unique().to_string(),
        |conn, id| {
            claimed(conn, &id, &payload);
        },
    );
    counter.prepared("WebhookEvent::mark_processed", 4, event, |conn, event| {
        WebhookEvent::mark_processed(conn, &event, Some(user)).unwrap();
    });
    counter.prepared("WebhookEvent::mark_failed", 4, event, |conn, event| {
        WebhookEvent::mark_failed(conn, &event, Some(user), "no").unwrap();
    });
    let recorded = |conn: &mut PgConnection| {
        let id = unique().to_string();
        let new = NewWebhookEvent::new(PaymentGateway::Razorpay, &id, "paid", &payload);
        WebhookEvent::record(conn, &new).unwrap().into_inner()
    };
    counter.prepared("WebhookEvent::claim", 1, recorded, |conn, event| {
        WebhookEvent::claim(conn, event.event_id, hour())
            .unwrap()
            .unwrap();
    });
    counter.prepared("WebhookEvent::claim_due", 1, recorded, |conn, _| {
        let claimed = WebhookEvent::claim_due(conn, hour(), 10).unwrap();
        assert_eq!(claimed.len(), 1);
    });
    counter.check();
}

fn pay(
    conn: &mut PgConnection,
    user: UserId,
    id: &str,
    status: TransactionStatus,
) -> SubscriptionTransaction {
    let new = NewSubscriptionTransaction {
        razorpay_payment_id: Some(id),
        ..NewSubscriptionTransaction::new(user, 100, 100, status)
    };
    SubscriptionTransaction::record_payment(conn, &new)
        .unwrap()
        .into_inner()
}

fn credit(user: UserId, source: &str) -> NewAccountCredit<'_> {
    NewAccountCredit {
        source_type: Some(CreditSource::Refund),
        source_id: Some(source),
        ..NewAccountCredit::new(user, 100)
    }
}

fn claimed(conn: &mut PgConnection, id: &str, payload: &Value) -> WebhookEvent {
    let new = NewWebhookEvent::new(PaymentGateway::Razorpay, id, "paid", payload);
    WebhookEvent::record_claimed(conn, &new, hour())
        .unwrap()
        .into_inner()
}

/// Connecting takes two: Diesel sets the time zone and the encoding.
#[cfg(feature = "migrator")]
#[test]
fn a_runner_with_nothing_to_do() {
    let database = database();
    let proxy = Proxy::start(&database);
    let url = database.url_with(&proxy.parameters());
    let report = bruhmcp_db::migrations::runner(&url).unwrap().run().unwrap();
    assert!(report.steps.is_empty());
    let sent = proxy.sent();
    let answered = sent.iter().filter(|sent| !matches!(sent, Sent::Parse(_)));
    assert_eq!(answered.count(), 2 + 2, "{sent:#?}");
}

#[derive(Debug, QueryableByName)]
struct Statement {
    #[diesel(sql_type = Text)]
    name: String,
    #[diesel(sql_type = Text)]
    statement: String,
    #[diesel(sql_type = BigInt)]
    generic_plans: i64,
    #[diesel(sql_type = BigInt)]
    custom_plans: i64,
    #[diesel(sql_type = Integer)]
    parameters: i32,
}

#[derive(QueryableByName)]
struct Line {
    #[diesel(sql_type = Text, column_name = "QUERY PLAN")]
    line: String,
}

/// The statements that look for this text, and the plan of each. All are planned once, after the
/// five times in which PostgreSQL learns what a plan for the values costs.
fn plans(conn: &mut PgConnection, text: &str) -> Vec<(String, String)> {
    let statements: Vec<Statement> = sql_query(
        "SELECT name, statement, generic_plans, custom_plans,
                cardinality(parameter_types) AS parameters
           FROM pg_prepared_statements
          WHERE strpos(statement, $1) > 0 AND statement NOT LIKE '%pg_prepared_statements%'",
    )
    .bind::<Text, _>(text)
    .load(conn)
    .unwrap();
    let plan = |statement: Statement| {
        assert!(
            statement.generic_plans > 0 && statement.custom_plans <= 5,
            "{statement:#?}"
        );
        let nulls = vec!["NULL"; usize::try_from(statement.parameters).unwrap()].join(", ");
        let explain = format!("EXPLAIN (COSTS off) EXECUTE {} ({nulls})", statement.name);
        let lines: Vec<Line> = sql_query(explain).load(conn).unwrap();
        let lines: Vec<_> = lines.into_iter().map(|line| line.line).collect();
        (statement.statement, lines.join("\n"))
    };
    statements.into_iter().map(plan).collect()
}

#[test]
fn a_token_is_planned_once_and_found_by_its_index() {
    use AuthTokenType::{EmailVerification, PasswordReset, Refresh};
    let database = database();
    let (user, ..) = user_with_instance(&database);
    database
        .psql(
            "INSERT INTO users (first_name, last_name, email)
             SELECT 'a', '', n || '@example.in' FROM generate_series(1, 3000) AS n;
             INSERT INTO auth_tokens (user_id, token, type, expires_at)
             SELECT id, sha256(id::text::bytea), 'password_reset', now() + interval '1 hour'
               FROM users;
             INSERT INTO auth_tokens
                 (user_id, token, type, expires_at, family_id, session_expires_at)
             SELECT id, sha256((id || 'refresh')::bytea), 'refresh', now() + interval '1 hour',
                    gen_random_uuid(), now() + interval '1 day'
               FROM users;
             ANALYZE",
        )
        .unwrap();
    let conn = &mut database.connect();
    for _ in 0..20 {
        let reset = issue(conn, user, PasswordReset);
        AuthToken::find_live(conn, &reset).unwrap().unwrap();
        AuthToken::consume(conn, &reset).unwrap();
        AuthToken::consume(conn, &reset).unwrap_err();
        assert!(!AuthToken::revoke(conn, &hashed(EmailVerification)).unwrap());
        let session = issue(conn, user, Refresh);
        AuthToken::find_live(conn, &session).unwrap().unwrap();
        let next = hashed(Refresh);
        AuthToken::rotate(conn, &session, &next, hour()).unwrap();
        assert!(AuthToken::revoke(conn, &next).unwrap());
    }
    let plans = plans(conn, "\"token\" = $");
    // By type, those of `find_live`, `consume` with its refusal, `rotate` with its lock, `revoke`.
    assert_eq!(plans.len(), 9, "{plans:#?}");
    for (statement, plan) in plans {
        assert!(
            plan.contains("auth_tokens_token_key") && !plan.contains("Seq Scan on auth_tokens"),
            "{statement}\n{plan}"
        );
    }
}
