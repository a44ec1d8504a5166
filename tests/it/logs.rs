//! What the server's log tells of rows with secrets, at default settings.

use std::fs;

use bruhmcp_db::enums::AuthTokenType::{self, EmailVerification, PasswordReset, Refresh};
use bruhmcp_db::ids::UserId;
use bruhmcp_db::models::{
    AuthToken, BillingError, Card, CredentialError, IssueError, McpCredential, McpInstance,
    NewMcpCredential, NewMcpInstance, NewUser, NewUserBillingDetails, OauthTokens, User,
    UserBillingDetails, UserChangeset,
};
use bruhmcp_db::schema::users;
use bruhmcp_db::{HashedToken, Sealed, SecretText, StateDigest};
use bruhmcp_devdb::Server;
use chrono::{DateTime, TimeDelta, Utc};
use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_types::Text;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::fixtures;
use crate::support::{self, TestDatabase};
use crate::users::{HASH, bad_fields, give};

/// A word in all rows, and in the secrets that operations are given.
const WORD: &str = "whisper";
const WORD_IN_HEX: &str = "77686973706572";

struct Logged {
    server: Server,
    database: TestDatabase,
}

impl Logged {
    fn new() -> Self {
        let server = Server::private(&[]).unwrap();
        let database = support::database_on(&server);
        Self { server, database }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.server.folder().unwrap().join("log")).unwrap()
    }

    /// Whether the log tells one of the rows that [`rows`] made.
    #[track_caller]
    fn assert_silent(&self, after: &str) {
        let log = self.log();
        // The digests, the sealed values, and the row of a server that speaks English.
        for part in [WORD, "abababab", "cdcdcdcd", WORD_IN_HEX, "Failing row"] {
            assert!(!log.contains(part), "{part} after {after}: {log}");
        }
    }
}

/// Makes a user with a row in each table that has secrets.
fn rows(conn: &mut PgConnection) -> UserId {
    let password = SecretText::new(format!("$argon2id$v=19${WORD}whisperwhisper22"));
    let new = NewUser {
        password: Some(&password),
        ..NewUser::new(WORD, WORD, "whisper@example.org")
    };
    let id = User::sign_up(conn, &new).unwrap().id;
    let token = HashedToken::new(Refresh, [0xab; 32]);
    AuthToken::issue(conn, id, &token, TimeDelta::hours(1)).unwrap();
    let address = NewUserBillingDetails {
        user_id: id,
        address_line1: WORD,
        address_line2: None,
        city: WORD,
        state: WORD,
        country: WORD,
        zip_code: WORD,
    };
    UserBillingDetails::upsert(conn, &address).unwrap();
    id
}

/// Shows that the test can see a row: a statement that goes past the operations logs it.
#[test]
fn a_failed_check_logs_the_row() {
    let logged = Logged::new();
    let conn = &mut logged.database.connect();
    let id = rows(conn);
    logged.assert_silent("the inserts");
    let past_the_operation = diesel::update(users::table.find(id))
        .set(users::first_name.eq(""))
        .execute(conn);
    assert!(past_the_operation.is_err());
    assert!(logged.log().contains(&format!("$argon2id$v=19${WORD}")));
}

#[test]
fn no_value_that_a_user_gives_logs_a_row() {
    let logged = Logged::new();
    let conn = &mut logged.database.connect();
    let id = rows(conn);
    let taken = NewUser {
        razorpay_customer_id: Some("cust_1"),
        ..NewUser::new("Grace", "", "taken@example.org")
    };
    User::sign_up(conn, &taken).unwrap();

    for (field, bad) in bad_fields() {
        give(conn, id, &bad, "new@example.org");
        logged.assert_silent(field);
    }
    for email in [
        "",
        "a",
        "a\0@example.org",
        "taken@example.org",
        "a@b_c",
        "\"a\"@example.org",
    ] {
        assert!(User::change_email(conn, id, email, false).is_err());
        let hash = format!("{HASH}{WORD}").into();
        let new = NewUser {
            password: Some(&hash),
            ..NewUser::new(WORD, "", email)
        };
        assert!(User::sign_up(conn, &new).is_err());
        User::find_by_email(conn, email).unwrap();
    }
    logged.assert_silent("bad addresses");
    let customer = UserChangeset {
        razorpay_customer_id: Some(Some("cust_1")),
        ..Default::default()
    };
    assert!(User::update(conn, id, &customer).is_err());
    logged.assert_silent("a customer of another user");

    let card = || Card {
        id: "card_1".into(),
        token: "token_1".into(),
        brand: "visa".into(),
        last4: "4242".into(),
        exp_month: 1,
        exp_year: 2040,
    };
    for bad in [
        Card {
            id: String::new(),
            ..card()
        },
        Card {
            token: "4242 4242 4242 4242".into(),
            ..card()
        },
        Card {
            last4: "1".into(),
            ..card()
        },
        Card {
            exp_month: 13,
            ..card()
        },
    ] {
        let refused = UserBillingDetails::add_card(conn, id, &bad).unwrap_err();
        assert!(
            matches!(refused, BillingError::InvalidCard(_)),
            "{refused:?}"
        );
    }
    logged.assert_silent("bad cards");

    let address = NewUserBillingDetails {
        user_id: id,
        address_line1: "",
        address_line2: None,
        city: WORD,
        state: WORD,
        country: WORD,
        zip_code: WORD,
    };
    assert!(UserBillingDetails::upsert(conn, &address).is_err());
    logged.assert_silent("a bad address");
}

#[test]
fn no_text_in_a_users_fields_logs_a_row() {
    let logged = Logged::new();
    let mut conn = logged.database.connect();
    let id = rows(&mut conn);
    let conn = std::cell::RefCell::new(conn);
    let text = || {
        prop_oneof![
            any::<String>(),
            "[a-z\0]{0,300}",
            "\\$[a-z$]{0,40}",
            "[ -~]{0,20}@[ -~]{0,20}"
        ]
    };
    let texts = (text(), text(), text(), text(), text());
    TestRunner::new(Config::with_cases(300))
        .run(&texts, |(first, last, email, password, customer)| {
            let conn = &mut *conn.borrow_mut();
            let password = SecretText::new(password);
            let new = NewUser {
                password: Some(&password),
                razorpay_customer_id: Some(&customer),
                ..NewUser::new(&first, &last, &email)
            };
            let changes = UserChangeset {
                first_name: Some(&first),
                last_name: Some(&last),
                password: Some(Some(&password)),
                razorpay_customer_id: Some(Some(&customer)),
                ..Default::default()
            };
            // All of them or one alone: the first one that is refused hides the others.
            let one_by_one = [
                UserChangeset {
                    password: None,
                    ..changes.clone()
                },
                UserChangeset {
                    first_name: changes.first_name,
                    ..Default::default()
                },
                UserChangeset {
                    last_name: changes.last_name,
                    ..Default::default()
                },
                UserChangeset {
                    password: changes.password,
                    ..Default::default()
                },
                UserChangeset {
                    razorpay_customer_id: changes.razorpay_customer_id,
                    ..Default::default()
                },
            ];
            conn.test_transaction::<_, diesel::result::Error, _>(|conn| {
                let _ = conn.transaction(|conn| User::sign_up(conn, &new));
                for changes in &one_by_one {
                    let _ = conn.transaction(|conn| User::update(conn, id, changes));
                }
                let _ = conn.transaction(|conn| User::change_password(conn, id, Some(&password)));
                let _ = conn.transaction(|conn| User::change_email(conn, id, &email, true));
                Ok(())
            });
            Ok(())
        })
        .unwrap();
    logged.assert_silent("texts of all kinds");
}

/// Ciphertext of this length; from 8 bytes on with [`WORD`] in it.
fn sealed(length: usize) -> Sealed {
    let text = [2].into_iter().chain(WORD.bytes().cycle());
    Sealed::from_ciphertext(text.take(length).collect()).unwrap()
}

/// Credentials of three instances: an API key, a pending authorization with all that it needs, and a
/// completed one.
fn credentials(database: &TestDatabase, user: UserId) -> [McpCredential; 3] {
    let conn = &mut database.connect();
    let service = fixtures::service(conn, "gmail", 50000);
    fixtures::upgrade(conn, user, None);
    let mut create = |oauth| {
        let new = NewMcpInstance::new(user, service);
        let credential = if oauth {
            NewMcpCredential::sealed_oauth(new.instance_id, WORD, sealed(60))
        } else {
            NewMcpCredential::sealed_api_key(new.instance_id, sealed(60))
        };
        McpInstance::create(conn, &new, &credential).unwrap().1
    };
    let [keyed, pending, completed] = [false, true, true].map(&mut create);
    let hour = TimeDelta::hours(1);
    let state = StateDigest::new([0xcd; 32]);
    let (verifier, url) = (sealed(60), sealed(80));
    let id = pending.credential_id;
    let pending =
        McpCredential::begin_oauth(conn, id, &state, hour, &verifier, Some(&url)).unwrap();
    let completed = McpCredential::complete_oauth(conn, completed.credential_id, &tokens());
    [keyed, pending, completed.unwrap().credential]
}

fn tokens() -> OauthTokens<'static> {
    OauthTokens {
        access_token: sealed(60),
        refresh_token: Some(sealed(60)),
        expires_at: Some(Utc::now()),
        scope: Some(WORD),
    }
}

#[test]
fn no_span_and_no_time_logs_a_row() {
    let logged = Logged::new();
    let conn = &mut logged.database.connect();
    let id = rows(conn);
    let [_, pending, completed] = credentials(&logged.database, id);
    let now = Utc::now();

    for span in [
        TimeDelta::MIN,
        TimeDelta::days(i64::from(i32::MIN)),
        TimeDelta::days(-4_000 * 365),
        TimeDelta::microseconds(-1),
        TimeDelta::zero(),
        TimeDelta::nanoseconds(1),
        TimeDelta::days(7) + TimeDelta::microseconds(1),
        TimeDelta::days(365) + TimeDelta::microseconds(1),
        TimeDelta::days(9_000 * 365),
        TimeDelta::days(i64::from(i32::MAX)),
        TimeDelta::MAX,
    ] {
        for &type_ in AuthTokenType::ALL {
            let token = HashedToken::new(type_, [0xcd; 32]);
            let _ = AuthToken::issue(conn, id, &token, span);
        }
        let [first, next] = [0xab, 0xcd].map(|byte| HashedToken::new(Refresh, [byte; 32]));
        let day = TimeDelta::days(1);
        for (lifetime, session) in [(span, day), (day, span), (span, span)] {
            let _ = AuthToken::begin_session(conn, id, &next, lifetime, session);
        }
        let _ = AuthToken::rotate(conn, &first, &next, span);
        logged.assert_silent("a span of a token");

        let (state, verifier) = (StateDigest::new([0xab; 32]), sealed(60));
        let begun =
            McpCredential::begin_oauth(conn, pending.credential_id, &state, span, &verifier, None);
        let _ = begun;
        let due = now + TimeDelta::hours(1);
        let _ = McpCredential::claim_due(conn, due, span, 10);
        let _ = McpCredential::lease_refresh(conn, completed.credential_id, due, span);
        let current = McpCredential::find(conn, completed.credential_id);
        let current = current.unwrap().unwrap();
        let _ = McpCredential::refresh_failed(conn, &current, "network", None, span);
        logged.assert_silent("a span of credentials");
        // They may take the rows away.
        let operations: [fn(&mut PgConnection, TimeDelta); 2] = [
            |conn, span| drop(AuthToken::purge(conn, span, 10)),
            |conn, span| drop(User::release_unverified(conn, "whisper@example.org", span)),
        ];
        for operation in operations {
            let _ = conn.transaction(|conn| {
                operation(conn, span);
                QueryResult::<()>::Err(diesel::result::Error::RollbackTransaction)
            });
        }
        logged.assert_silent("a span of a sweep");
    }

    for time in [
        DateTime::<Utc>::MIN_UTC,
        DateTime::from_timestamp(-300_000_000_000, 0).unwrap(),
        DateTime::from_timestamp(-1, 0).unwrap(),
        DateTime::from_timestamp(253_402_300_800, 0).unwrap(),
        DateTime::<Utc>::MAX_UTC,
    ] {
        let _ = McpCredential::claim_due(conn, time, TimeDelta::zero(), 10);
        let id = completed.credential_id;
        let _ = McpCredential::lease_refresh(conn, id, time, TimeDelta::zero());
        let tokens = OauthTokens {
            expires_at: Some(time),
            ..tokens()
        };
        let current = McpCredential::find(conn, id).unwrap().unwrap();
        assert!(McpCredential::store_refreshed(conn, &current, &tokens).is_err());
        assert!(McpCredential::complete_oauth(conn, pending.credential_id, &tokens).is_err());
        let _ = AuthToken::count_issued_since(conn, UserId::new(), Refresh, time);
        logged.assert_silent("a time");
    }
}

#[test]
fn no_secret_and_no_duplicate_logs_a_row() {
    let logged = Logged::new();
    let conn = &mut logged.database.connect();
    let id = rows(conn);
    let [keyed, pending, completed] = credentials(&logged.database, id);
    let service = McpInstance::find(conn, keyed.instance_id)
        .unwrap()
        .unwrap()
        .mcp_service_id;
    let hour = TimeDelta::hours(1);
    let good = sealed(60);

    for client_id in ["", "a\0b", &"é".repeat(2049)] {
        let new = NewMcpInstance::new(id, service);
        let credential = NewMcpCredential::sealed_oauth(new.instance_id, client_id, sealed(60));
        assert!(McpInstance::create(conn, &new, &credential).is_err());
        let (key, version) = (completed.credential_id, completed.version);
        assert!(McpCredential::replace_client(conn, key, version, client_id, &good).is_err());
    }
    for scope in ["a\0b", &"é".repeat(16_385)] {
        let tokens = OauthTokens {
            scope: Some(scope),
            ..tokens()
        };
        assert!(McpCredential::store_refreshed(conn, &completed, &tokens).is_err());
        assert!(McpCredential::complete_oauth(conn, pending.credential_id, &tokens).is_err());
        let _ = McpCredential::refresh_failed(conn, &completed, scope, Some(scope), hour);
    }
    logged.assert_silent("texts of credentials");

    // Of another pair of rows: the state [0xcd; 32] is taken.
    let (key, taken) = (completed.credential_id, StateDigest::new([0xcd; 32]));
    let begun = McpCredential::begin_oauth(conn, key, &taken, hour, &good, None).unwrap_err();
    assert!(matches!(begun, CredentialError::StateTaken), "{begun:?}");
    let new = NewMcpInstance {
        instance_id: keyed.instance_id,
        ..NewMcpInstance::new(id, service)
    };
    let again = NewMcpCredential::sealed_api_key(keyed.instance_id, sealed(60));
    assert!(McpInstance::create(conn, &new, &again).is_err());
    for type_ in [Refresh, PasswordReset, EmailVerification] {
        // The digest of the refresh token.
        let taken = HashedToken::new(type_, [0xab; 32]);
        let refused = AuthToken::issue(conn, id, &taken, hour).unwrap_err();
        assert!(matches!(refused, IssueError::DigestTaken), "{refused:?}");
        let _ = AuthToken::rotate(conn, &taken, &taken, hour);
        let _ = AuthToken::consume(conn, &taken);
        let _ = AuthToken::check_code(conn, id, &taken);
    }
    let again = NewUser {
        id: Some(id),
        ..NewUser::new(WORD, WORD, "other@example.org")
    };
    assert!(User::sign_up(conn, &again).is_err());
    logged.assert_silent("duplicates");
}

#[test]
fn no_text_of_a_card_logs_a_row() {
    let logged = Logged::new();
    let mut conn = logged.database.connect();
    let id = rows(&mut conn);
    let card = Card {
        id: "card_1".into(),
        token: format!("tok_{WORD}").into(),
        brand: "visa".into(),
        last4: "4242".into(),
        exp_month: 1,
        exp_year: 2040,
    };
    UserBillingDetails::add_card(&mut conn, id, &card).unwrap();
    let conn = std::cell::RefCell::new(conn);
    let text = || {
        prop_oneof![
            any::<String>(),
            "\\s{0,3}",
            "[\\s\"\\\\]{0,3}[0-9 -]{10,24}[\\s\"\\\\.]{0,3}"
        ]
    };
    let cards = (text(), text(), text(), text(), any::<u8>(), any::<u16>());
    TestRunner::new(Config::with_cases(300))
        .run(&cards, |(one, other, third, last4, exp_month, exp_year)| {
            let conn = &mut *conn.borrow_mut();
            let fields = [
                Card {
                    id: one.clone(),
                    ..card.clone()
                },
                Card {
                    token: SecretText::new(other),
                    ..card.clone()
                },
                Card {
                    brand: third,
                    ..card.clone()
                },
                Card {
                    last4,
                    ..card.clone()
                },
                Card {
                    exp_month,
                    exp_year,
                    ..card.clone()
                },
            ];
            conn.test_transaction::<_, diesel::result::Error, _>(|conn| {
                for card in &fields {
                    let _ = conn.transaction(|conn| UserBillingDetails::add_card(conn, id, card));
                    let _ = conn
                        .transaction(|conn| UserBillingDetails::set_default_card(conn, id, &one));
                    let _ =
                        conn.transaction(|conn| UserBillingDetails::remove_card(conn, id, &one));
                }
                Ok(())
            });
            Ok(())
        })
        .unwrap();
    logged.assert_silent("texts of cards");
}

/// What `docs/operations.md` says about the server's settings.
#[test]
fn settings_keep_values_out_of_the_log() {
    let logged = Logged::new();
    let conn = &mut logged.database.connect_as_owner();
    type Statement = fn(&mut PgConnection, &str);
    let failed_check: Statement = |conn, word| {
        let new = NewUser::new("", word, "a@example.org");
        diesel::insert_into(users::table)
            .values(new)
            .execute(conn)
            .unwrap_err();
    };
    let failed_with_parameter: Statement = |conn, word| {
        let statement = diesel::sql_query("SELECT 1 / (length($1) - length($1))");
        statement.bind::<Text, _>(word).execute(conn).unwrap_err();
    };
    let with_parameter: Statement = |conn, word| {
        let statement = diesel::sql_query("SELECT length($1)");
        statement.bind::<Text, _>(word).execute(conn).unwrap();
    };
    let failed_with_value: Statement = |conn, word| {
        conn.batch_execute(&format!("SELECT 1 / 0, '{word}'"))
            .unwrap_err();
    };
    let cases = [
        ("log_error_verbosity = default", failed_check, true),
        ("log_error_verbosity = terse", failed_check, false),
        (
            "log_parameter_max_length_on_error = -1",
            failed_with_parameter,
            true,
        ),
        (
            "log_parameter_max_length_on_error = 0",
            failed_with_parameter,
            false,
        ),
        (
            "log_statement = 'all'; SET log_parameter_max_length = -1",
            with_parameter,
            true,
        ),
        (
            "log_statement = 'all'; SET log_parameter_max_length = 0",
            with_parameter,
            false,
        ),
        (
            "log_min_duration_statement = 0; SET log_parameter_max_length = -1",
            with_parameter,
            true,
        ),
        (
            "log_min_duration_statement = 0; SET log_parameter_max_length = 0",
            with_parameter,
            false,
        ),
        ("log_min_error_statement = error", failed_with_value, true),
        ("log_error_verbosity = terse", failed_with_value, true),
        ("log_min_error_statement = panic", failed_with_value, false),
    ];
    for (number, (settings, statement, is_logged)) in cases.into_iter().enumerate() {
        let word = format!("value_{number}_");
        conn.batch_execute(&format!("RESET ALL; SET {settings}"))
            .unwrap();
        statement(conn, &word);
        assert_eq!(logged.log().contains(&word), is_logged, "{settings}");
    }
    let defaults = "SELECT name, setting FROM pg_settings
                     WHERE name IN ('log_error_verbosity', 'log_min_error_statement',
                                    'log_parameter_max_length', 'log_parameter_max_length_on_error')
                     ORDER BY name COLLATE \"C\"";
    assert_eq!(
        logged.database.psql(defaults).unwrap(),
        "log_error_verbosity|default\nlog_min_error_statement|error\n\
         log_parameter_max_length|-1\nlog_parameter_max_length_on_error|0\n"
    );
}
