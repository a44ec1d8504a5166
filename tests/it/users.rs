//! Accounts: sign-up, login, email addresses, deactivation, anonymisation.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::sync::mpsc;

use bruhmcp_db::enums::{AuthTokenType, PlanType};
use bruhmcp_db::ids::{SubscriptionId, UserId};
use bruhmcp_db::models::{
    AuthToken, InvalidEmail, NewUser, User, UserError, UserPlan, canonical_email,
};
use bruhmcp_db::schema::users;
use bruhmcp_db::{ConstraintViolation, HashedToken, Page, SecretText};
use chrono::TimeDelta;
use diesel::connection::InstrumentationEvent;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::support::{self, TestDatabase};

fn ada(email: &str) -> NewUser<'_> {
    NewUser::new("Ada", "", email)
}

/// An active user with this address.
pub(crate) fn user(conn: &mut PgConnection, email: &str) -> UserId {
    User::sign_up(conn, &ada(email)).unwrap().id
}

fn issue(conn: &mut PgConnection, user: UserId, type_: AuthTokenType, byte: u8) -> AuthToken {
    let token = HashedToken::new(type_, [byte; 32]);
    AuthToken::issue(conn, user, &token, TimeDelta::hours(1))
        .unwrap()
        .unwrap()
}

#[test]
fn sign_up_takes_any_spelling_of_an_address_once() {
    let database = support::database();
    let conn = &mut database.connect();
    let password = SecretText::new("$argon2id$v=19$hash");
    let new = NewUser {
        password: Some(&password),
        ..ada(" Ada@Example.ORG\n")
    };
    let user = User::sign_up(conn, &new).unwrap();
    assert_eq!(user.email, "ada@example.org");
    assert_eq!(user.password, Some(password));
    assert!(user.is_active && !user.email_verified);
    let plan = UserPlan::find_by_user(conn, user.id).unwrap().unwrap();
    assert_eq!(plan.plan_type, PlanType::Free);

    // The caller's transaction can go on after both errors.
    conn.transaction(|conn| {
        let taken = User::sign_up(conn, &ada("ADA@example.org")).unwrap_err();
        assert!(matches!(taken, UserError::EmailTaken), "{taken:?}");
        let invalid = User::sign_up(conn, &ada("ada")).unwrap_err();
        assert!(
            matches!(invalid, UserError::InvalidEmail(InvalidEmail)),
            "{invalid:?}"
        );
        User::sign_up(conn, &ada("grace@example.org"))
    })
    .unwrap();

    let nameless = NewUser {
        first_name: "",
        ..ada("nameless@example.org")
    };
    let error = User::sign_up(conn, &nameless).unwrap_err();
    let UserError::Database(error) = error else {
        panic!("{error:?}")
    };
    assert!(
        ConstraintViolation::of(&error)
            .unwrap()
            .is("users_first_name_check")
    );
}

#[test]
fn of_32_sign_ups_with_one_address_one_wins() {
    let database = support::database();
    let outcomes = support::at_once(&database, 32, |thread, conn| {
        let spelling = if thread % 2 == 0 {
            "ada@example.org"
        } else {
            "ADA@Example.org "
        };
        User::sign_up(conn, &ada(spelling))
    });
    let taken = |outcome: &&Result<_, _>| matches!(outcome, Err(UserError::EmailTaken));
    assert_eq!(outcomes.iter().filter(taken).count(), 31);
    let winner = outcomes.into_iter().find_map(Result::ok).unwrap();

    let conn = &mut database.connect();
    assert!(UserPlan::find_by_user(conn, winner.id).unwrap().is_some());
    assert_eq!(User::list(conn, Page::first(10)).unwrap(), [winner]);
}

#[test]
fn only_active_users_are_found_and_sign_in() {
    let database = support::database();
    let conn = &mut database.connect();
    let id = user(conn, "ada@example.org");
    let found = User::find_active(conn, id).unwrap().unwrap();
    assert_eq!(found.last_login_at, None);
    let by_email = User::find_active_by_email(conn, "\tADA@example.org").unwrap();
    assert_eq!(by_email, Some(found));
    let signed_in = User::record_login(conn, id).unwrap().unwrap();
    assert_eq!(signed_in.last_login_at, Some(signed_in.updated_at));

    assert!(!User::deactivate(conn, id).unwrap().unwrap().is_active);
    assert_eq!(User::find_active(conn, id).unwrap(), None);
    assert_eq!(
        User::find_active_by_email(conn, "ada@example.org").unwrap(),
        None
    );
    assert_eq!(User::record_login(conn, id).unwrap(), None);
    assert!(User::reactivate(conn, id).unwrap().unwrap().is_active);
    assert!(User::record_login(conn, id).unwrap().is_some());

    for nobody in ["nobody@example.org", "not an address", ""] {
        assert_eq!(User::find_active_by_email(conn, nobody).unwrap(), None);
    }
    let nobody = UserId::new();
    assert_eq!(User::find_active(conn, nobody).unwrap(), None);
    assert_eq!(User::record_login(conn, nobody).unwrap(), None);
    assert_eq!(User::deactivate(conn, nobody).unwrap(), None);
    assert_eq!(User::reactivate(conn, nobody).unwrap(), None);
    assert_eq!(User::anonymise(conn, nobody).unwrap(), None);
    assert!(
        User::change_email(conn, nobody, "a@example.org", true)
            .unwrap()
            .is_none()
    );
}

#[test]
fn deactivating_revokes_all_tokens() {
    let database = support::database();
    let conn = &mut database.connect();
    let id = user(conn, "ada@example.org");
    issue(conn, id, AuthTokenType::Refresh, 1);
    issue(conn, id, AuthTokenType::Refresh, 2);
    issue(conn, id, AuthTokenType::EmailOtp, 3);
    User::deactivate(conn, id).unwrap();
    User::reactivate(conn, id).unwrap();
    assert_eq!(live(&database), "");
}

/// Types of the live tokens.
fn live(database: &TestDatabase) -> String {
    database
        .psql("SELECT type FROM auth_tokens WHERE NOT is_used AND expires_at > now() ORDER BY type")
        .unwrap()
}

#[test]
fn a_new_email_address_revokes_what_was_sent_to_the_old_one() {
    let database = support::database();
    let conn = &mut database.connect();
    let id = user(conn, "ada@example.org");
    user(conn, "grace@example.org");
    issue(conn, id, AuthTokenType::Refresh, 1);
    issue(conn, id, AuthTokenType::PasswordReset, 2);
    issue(conn, id, AuthTokenType::EmailVerification, 3);
    issue(conn, id, AuthTokenType::EmailOtp, 4);
    issue(conn, id, AuthTokenType::EmailChangePending, 5);

    // After both errors the caller's transaction can go on, and no token is revoked.
    conn.transaction(|conn| {
        let taken = User::change_email(conn, id, "Grace@example.org", true).unwrap_err();
        assert!(matches!(taken, UserError::EmailTaken), "{taken:?}");
        let invalid = User::change_email(conn, id, "ada@", true).unwrap_err();
        assert!(matches!(invalid, UserError::InvalidEmail(_)), "{invalid:?}");
        let code = HashedToken::new(AuthTokenType::EmailOtp, [4; 32]);
        assert!(AuthToken::revoke(conn, &code)?);
        QueryResult::Ok(())
    })
    .unwrap();
    assert_eq!(live(&database).lines().count(), 4);

    let proven = User::change_email(conn, id, " Ada@example.com", true)
        .unwrap()
        .unwrap();
    assert_eq!(
        (&*proven.email, proven.email_verified),
        ("ada@example.com", true)
    );
    assert_eq!(live(&database), "refresh\n");
    let unproven = User::change_email(conn, id, "ada@example.net", false)
        .unwrap()
        .unwrap();
    assert_eq!(
        (&*unproven.email, unproven.email_verified),
        ("ada@example.net", false)
    );

    User::deactivate(conn, id).unwrap();
    let inactive = User::change_email(conn, id, "ada@example.org", true).unwrap();
    assert_eq!(inactive, None);
}

#[test]
fn of_8_changes_to_one_address_one_wins() {
    let database = support::database();
    let conn = &mut database.connect();
    let ids: Vec<UserId> = (0..8)
        .map(|i| user(conn, &format!("{i}@example.org")))
        .collect();
    let outcomes = support::at_once(&database, 8, |thread, conn| {
        User::change_email(conn, ids[thread], "wanted@example.org", true)
    });
    let taken = |outcome: &&Result<_, _>| matches!(outcome, Err(UserError::EmailTaken));
    assert_eq!(outcomes.iter().filter(taken).count(), 7);
    assert_eq!(outcomes.into_iter().flatten().flatten().count(), 1);
}

/// Email addresses, and texts that are nearly one.
fn almost_an_email() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        "[a-zA-Z0-9.+_-]{1,20}",
        "[\\PC]{1,8}",
        // Letters whose lowercase is longer or shorter, several kinds of white space, NUL.
        "[aßẞİıΣσςǅK\u{a0}\u{85}\u{3000}\u{b}\t \n\0@]{0,4}",
        "[a-z]{120,130}",
    ];
    let space = "[ \t\r\n\u{b}\u{c}\u{a0}\u{3000}]{0,2}";
    (space, part.clone(), "@{0,2}", part, space).prop_map(|(before, local, at, domain, after)| {
        format!("{before}{local}{at}{domain}{after}")
    })
}

#[test]
fn canonical_emails_are_those_of_the_database() {
    let database = support::database();
    let conn = RefCell::new(database.connect());
    let accepted_by_database = |email: &str| {
        let outcome = conn.borrow_mut().transaction(|conn| {
            diesel::insert_into(users::table)
                .values(ada(email))
                .execute(conn)?;
            Err::<(), _>(diesel::result::Error::RollbackTransaction)
        });
        outcome == Err(diesel::result::Error::RollbackTransaction)
    };
    TestRunner::new(Config::with_cases(1000))
        .run(&almost_an_email(), |email| {
            let folded = email.trim().to_lowercase();
            // In the C locale the constraint sees only ASCII white space.
            let expected = accepted_by_database(&folded) && !folded.contains(char::is_whitespace);
            match canonical_email(&email) {
                Ok(canonical) => {
                    prop_assert!(expected, "the database refuses it");
                    prop_assert_eq!(&canonical, &folded);
                    prop_assert_eq!(canonical_email(&canonical), Ok(folded));
                }
                Err(InvalidEmail) => prop_assert!(!expected, "the database accepts it"),
            }
            Ok(())
        })
        .unwrap();
}

/// A user with rows in every table; most of them name her.
const MARIE: &str = r#"
    INSERT INTO users (id, first_name, last_name, email, password, razorpay_customer_id, last_login_at)
    VALUES (:marie, 'Marie', 'Curie', 'marie@radium.example', '$scrypt$radium', 'cust_Marie', now());
    UPDATE user_plans
       SET plan_type = 'pro', max_instances = NULL, customer_id = 'cus_stripe_Marie', subscription_id = 'sub_Marie',
           payment_status = 'active', features = '{"beta": "Marie"}', expires_at = now() + interval '1 day'
     WHERE user_id = :marie;
    INSERT INTO auth_tokens (user_id, token, type, expires_at, family_id, session_expires_at)
    VALUES (:marie, decode(repeat('ab', 32), 'hex'), 'refresh', now() + interval '1 day', gen_random_uuid(),
            now() + interval '1 day');
    INSERT INTO mcp_table (mcp_service_name, display_name, port, type)
    VALUES ('gmail', 'Gmail', 49296, 'oauth'), ('figma', 'Figma', 49280, 'api_key');
    INSERT INTO mcp_service_table (user_id, mcp_service_id, custom_name)
    SELECT :marie, mcp_service_id, 'Marie''s ' || display_name FROM mcp_table, generate_series(1, 2);
    INSERT INTO mcp_credentials (instance_id, client_id, client_secret, oauth_status, oauth_completed_at)
    SELECT instance_id, 'client of Marie', decode(repeat('cd', 40), 'hex'), 'completed', now() FROM mcp_service_table;
    INSERT INTO user_billing_details (user_id, address_line1, city, state, country, zip_code, cards)
    VALUES (:marie, '36 quai de Béthune', 'Paris', 'IDF', 'France', '75004', '[{"id": "card_Marie"}]');
    INSERT INTO user_subscriptions
        (id, user_id, plan_code, razorpay_subscription_id, razorpay_customer_id, total_amount,
         cancellation_reason, cancellation_feedback)
    VALUES (:subscription, :marie, 'pro', 'sub_1', 'cust_old_Marie', 49900, 'said Marie', 'Marie has no time');
    INSERT INTO subscription_transactions
        (user_id, subscription_id, razorpay_payment_id, receipt_number, amount, net_amount, status, description,
         failure_reason, method_details_json, gateway_response_json)
    VALUES (:marie, :subscription, 'pay_1', 'receipt_1', 49900, 49000, 'captured', 'Pro for Marie', 'Marie was out',
            '{"vpa": "marie@bank"}', '{"email": "Marie@radium.example"}');
    INSERT INTO account_credits (user_id, amount, description, source_type, source_id)
    VALUES (:marie, 5000, 'sorry, Marie', 'refund', 'rfnd_1');
    INSERT INTO webhook_events
        (external_event_id, event_type, payment_gateway, payload, processing_status, processed_at, error_message)
    VALUES
        ('by_email', 'a', 'razorpay', '{"a": [{"email": "Marie@Radium.example"}]}', 'processed', now(), 'Marie?'),
        ('by_customer', 'a', 'razorpay', '{"id": "cust_Marie", "name": "Marie"}', 'skipped', now(), NULL),
        ('by_plan', 'a', 'stripe', '{"id": "cus_stripe_Marie"}', 'processed', now(), NULL),
        ('by_old_customer', 'a', 'razorpay', '["cust_old_Marie"]', 'processed', now(), NULL),
        ('of_another', 'a', 'razorpay', '{"email": "anne-marie@radium.example"}', 'processed', now(), NULL),
        ('open', 'a', 'razorpay', '{"email": "marie@radium.example"}', 'pending', NULL, NULL);
"#;

#[test]
fn anonymising_keeps_the_money_and_nothing_of_the_person() {
    let database = support::database();
    let conn = &mut database.connect();
    let marie = UserId::new();
    let subscription = SubscriptionId::new();
    let other = user(conn, "other@example.org");
    let keys = format!("\\set marie '''{marie}'''\n\\set subscription '''{subscription}'''\n");
    database.psql(&format!("{keys}{MARIE}")).unwrap();
    let other_before = User::find(conn, other).unwrap();

    let anonymised = User::anonymise(conn, marie).unwrap().unwrap();
    assert_eq!(anonymised.email, format!("{marie}@anonymised.invalid"));
    assert!(!anonymised.is_active);
    let emptied = "SELECT (SELECT count(*) FROM mcp_service_table),
                          (SELECT count(*) FROM mcp_credentials),
                          (SELECT count(*) FROM auth_tokens),
                          (SELECT count(*) FROM user_billing_details)";
    assert_eq!(database.psql(emptied).unwrap(), "0|0|0|0\n");
    let money = "SELECT plan_code, razorpay_subscription_id, s.total_amount, razorpay_payment_id, receipt_number,
                        t.amount, net_amount, c.amount, source_id, plan_type, payment_status, features
                   FROM user_subscriptions s
                   JOIN subscription_transactions t USING (user_id)
                   JOIN account_credits c           USING (user_id)
                   JOIN user_plans                  USING (user_id)";
    assert_eq!(
        database.psql(money).unwrap(),
        "pro|sub_1|49900|pay_1|receipt_1|49900|49000|5000|rfnd_1|free|none|{}\n"
    );
    // The counters of the registry are right.
    let counters = "SELECT total_instances_created, active_instances_count FROM mcp_table";
    assert_eq!(database.psql(counters).unwrap(), "2|0\n2|0\n");
    assert_eq!(User::find(conn, other).unwrap(), other_before);

    // These events are open, or name another user.
    let events = "SELECT external_event_id FROM webhook_events WHERE payload::text ILIKE '%marie%' ORDER BY 1";
    assert_eq!(database.psql(events).unwrap(), "of_another\nopen\n");
    database
        .psql("DELETE FROM webhook_events WHERE payload <> '{}'")
        .unwrap();
    let dump = database.dump(&["--data-only"]).to_lowercase();
    assert!(dump.contains("pay_1") && dump.contains("by_email"));
    for trace in [
        "marie", "curie", "radium", "béthune", "paris", "75004", "abab", "cdcd",
    ] {
        assert!(!dump.contains(trace), "{trace} is in {dump}");
    }

    // The account can't be used again, and a second call changes nothing.
    assert_eq!(User::reactivate(conn, marie).unwrap(), None);
    let error = User::sign_up(conn, &ada(&anonymised.email)).unwrap_err();
    assert!(matches!(error, UserError::InvalidEmail(_)), "{error:?}");
    assert_eq!(User::anonymise(conn, marie).unwrap(), Some(anonymised));
    assert!(User::sign_up(conn, &ada("marie@radium.example")).is_ok());
}

#[test]
fn pages_of_users_come_from_one_statement_that_reads_an_index() {
    let database = support::database();
    let conn = &mut database.connect();
    database
        .psql(
            "ALTER TABLE users DISABLE TRIGGER USER;
             INSERT INTO users (first_name, last_name, email, created_at)
             SELECT 'Ada', '', n || '@example.org', now() - n / 3 * interval '1 minute'
               FROM generate_series(1, 20000) AS n;
             ANALYZE users",
        )
        .unwrap();
    let (sender, statements) = mpsc::channel();
    conn.set_instrumentation(move |event: InstrumentationEvent<'_>| {
        if let InstrumentationEvent::StartQuery { query, .. } = event {
            sender.send(query.to_string()).unwrap();
        }
    });
    let mut page = Page::first(50);
    let mut listed = Vec::new();
    for _ in 0..3 {
        listed.extend(User::list(conn, page).unwrap());
        page = Page::after(listed[listed.len() - 1].cursor(), 50);
    }
    assert_eq!(listed.len(), 150);
    assert!(listed.is_sorted_by_key(|user| Reverse((user.created_at, user.id))));

    let statements: Vec<String> = statements.try_iter().collect();
    let [first, _, third] = [0, 1, 2].map(|n: usize| statements[n].split(" -- binds").next());
    assert_eq!(first, third);
    let cursor = page.after.unwrap();
    let plan = database
        .psql(&format!(
            "SET plan_cache_mode = force_generic_plan;
             PREPARE page AS {};
             EXPLAIN (ANALYZE, COSTS off, TIMING off)
             EXECUTE page ('{created_at}', '{created_at}', '{}', 50)",
            first.unwrap(),
            cursor.id,
            created_at = cursor.created_at.to_rfc3339(),
        ))
        .unwrap();
    // Sorts only the rows of one timestamp, and reads no row after the page but those.
    for part in [
        "Index Scan Backward using users_created_at_idx",
        "Presorted Key: created_at",
    ] {
        assert!(plan.contains(part), "{plan}");
    }
    assert!(!plan.contains("Seq Scan"), "{plan}");
}

#[test]
fn concurrent_calls_of_anonymise_succeed_at_serializable() {
    let database = support::database();
    let conn = &mut database.connect();
    let ids: Vec<UserId> = (0..24)
        .map(|n| user(conn, &format!("{n}@example.org")))
        .collect();
    database
        .psql(
            "INSERT INTO webhook_events
                 (external_event_id, event_type, payment_gateway, payload, processing_status, processed_at)
             SELECT email, 'a', 'razorpay', json_build_object('email', email), 'processed', now() FROM users",
        )
        .unwrap();
    // Without a retry: none is needed.
    support::at_once(&database, 8, |thread, conn| {
        for &id in &ids[thread * 3..][..3] {
            let transaction = &mut conn.build_transaction().serializable();
            let anonymised = transaction.run(|conn| User::anonymise(conn, id));
            assert!(anonymised.unwrap().is_some());
        }
    });
    let left = "SELECT count(*) FROM webhook_events WHERE payload <> '{}'";
    assert_eq!(database.psql(left).unwrap(), "0\n");
}
