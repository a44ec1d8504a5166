//! What the server's log tells of rows with secrets, at default settings.

use std::fs;

use bruhmcp_db::enums::AuthTokenType;
use bruhmcp_db::ids::UserId;
use bruhmcp_db::models::{
    AuthToken, BillingError, Card, NewUser, NewUserBillingDetails, User, UserBillingDetails,
    UserChangeset,
};
use bruhmcp_db::schema::users;
use bruhmcp_db::{HashedToken, SecretText};
use bruhmcp_devdb::Server;
use chrono::TimeDelta;
use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_types::Text;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::support::{self, TestDatabase};
use crate::users::{HASH, bad_fields, give};

/// A word in all rows, and in no value that an operation is given.
const WORD: &str = "whisper";

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
        assert!(!log.contains(WORD), "after {after}: {log}");
        // The digest of the token.
        assert!(!log.contains("abababab"), "after {after}: {log}");
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
    let token = HashedToken::new(AuthTokenType::Refresh, [0xab; 32]);
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
        let new = NewUser {
            password: Some(&format!("{HASH}{WORD}").into()),
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

    for lifetime in [TimeDelta::MAX, TimeDelta::days(i64::from(i32::MAX))] {
        let token = HashedToken::new(AuthTokenType::Refresh, [0xab; 32]);
        assert!(AuthToken::issue(conn, id, &token, lifetime).is_err());
    }
    logged.assert_silent("endless lifetimes");

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
