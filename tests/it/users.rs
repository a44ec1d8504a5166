//! Accounts: sign-up, login, email addresses, deactivation, anonymisation.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::sync::{LazyLock, mpsc};

use bruhmcp_db::enums::{AuthTokenType, PlanType};
use bruhmcp_db::ids::{SubscriptionId, UserId};
use bruhmcp_db::models::{
    AuthToken, InvalidEmail, NewUser, Release, ResetError, TokenError, User, UserChangeset,
    UserError, UserPlan, canonical_email,
};
use bruhmcp_db::schema::users;
use bruhmcp_db::{HashedToken, Isolation, Page, SecretText, retry_transaction};
use chrono::TimeDelta;
use diesel::connection::InstrumentationEvent;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::concurrency::ISOLATIONS;
use crate::rules::database_with_rows;
use crate::support::{self, TestDatabase};

/// A password hash.
pub(crate) const HASH: &str =
    "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ$aGFzaGhhc2hoYXNoaGFzaGhhc2g";

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
    let password = SecretText::new(HASH);
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
    assert!(
        matches!(error, UserError::InvalidField("first_name")),
        "{error:?}"
    );
}

/// Bad values of each field but the email address.
pub(crate) fn bad_fields() -> Vec<(&'static str, UserChangeset<'static>)> {
    static LONG: LazyLock<String> = LazyLock::new(|| "é".repeat(256));
    static PASSWORDS: LazyLock<Vec<SecretText>> = LazyLock::new(|| {
        let long = format!("$a${}$hashhashhashhashhashha", "b".repeat(490));
        let texts = [
            "",
            "$",
            "hunter2",
            "$hunter2",
            "$$$$$$$$$",
            "$hash$hash$",
            "$correct horse$battery$staple",
            "$2b$10$tooshort",
            "$2b$hashhashhashhashhashhahash",
            "2b$10$hashhashhashhashhashha",
            "$A$10$hashhashhashhashhashha",
            "$a$$hashhashhashhashhashha",
            "$a$1$hashhashhashhashhashh\0",
            "$a$1$hashhashhashhashhashhaé",
            "$a$1$hashhashhashhashhashha\n",
            &long,
        ];
        texts.map(SecretText::from).to_vec()
    });
    let none = UserChangeset::default;
    let mut bad = Vec::new();
    for name in ["", "a\0b", &LONG] {
        bad.push((
            "first_name",
            UserChangeset {
                first_name: Some(name),
                ..none()
            },
        ));
    }
    for name in ["\0", &LONG] {
        bad.push((
            "last_name",
            UserChangeset {
                last_name: Some(name),
                ..none()
            },
        ));
    }
    for id in ["", "cust\0", &LONG] {
        let razorpay_customer_id = Some(Some(id));
        bad.push((
            "razorpay_customer_id",
            UserChangeset {
                razorpay_customer_id,
                ..none()
            },
        ));
    }
    for password in &*PASSWORDS {
        bad.push((
            "password",
            UserChangeset {
                password: Some(Some(password)),
                ..none()
            },
        ));
    }
    bad
}

/// Gives the bad value to each operation that takes the field, and returns the errors.
pub(crate) fn give(
    conn: &mut PgConnection,
    id: UserId,
    bad: &UserChangeset<'_>,
    email: &str,
) -> Vec<UserError> {
    let hash = SecretText::new(HASH);
    let password = bad.password.flatten().unwrap_or(&hash);
    let new = NewUser {
        first_name: bad.first_name.unwrap_or("Ada"),
        last_name: bad.last_name.unwrap_or_default(),
        password: Some(password),
        razorpay_customer_id: bad.razorpay_customer_id.flatten(),
        ..ada(email)
    };
    let mut errors = vec![
        User::sign_up(conn, &new).unwrap_err(),
        User::update(conn, id, bad).unwrap_err(),
    ];
    if bad.password.is_some() {
        errors.push(User::change_password(conn, id, Some(password)).unwrap_err());
    }
    errors
}

#[test]
fn a_bad_field_is_named_and_its_value_is_not() {
    let database = support::database();
    let conn = &mut database.connect();
    let before = User::sign_up(conn, &ada("ada@example.org")).unwrap();
    conn.transaction(|conn| {
        for (field, bad) in bad_fields() {
            for error in give(conn, before.id, &bad, "new@example.org") {
                assert!(
                    matches!(error, UserError::InvalidField(named) if named == field),
                    "{error:?}"
                );
                assert_eq!(error.to_string(), format!("the user's {field} is invalid"));
            }
        }
        // The transaction can go on, and nothing was changed.
        assert_eq!(User::list(conn, Page::first(9))?, [before]);
        QueryResult::Ok(())
    })
    .unwrap();
    let longest = "é".repeat(255);
    let new = NewUser {
        first_name: &longest,
        last_name: &longest,
        razorpay_customer_id: Some(&longest),
        ..ada("long@example.org")
    };
    User::sign_up(conn, &new).unwrap();
}

/// What libraries make, and texts that are nearly a hash.
fn almost_a_hash() -> impl Strategy<Value = String> {
    let id = prop_oneof!["[a-z0-9-]{0,3}", "[a-z0-9-]{31,34}", "[A-Za-z_$]{1,3}"];
    let field = prop_oneof![
        "[A-Za-z0-9/+.,=-]{0,4}",
        "[ -~]{0,4}",
        "[a-z]{460,480}",
        "[\\PC\n]{0,2}"
    ];
    let hash = prop_oneof![
        "[A-Za-z0-9/+.=-]{20,24}",
        "[A-Za-z0-9,$]{20,30}",
        "[a-z]{22}\n"
    ];
    (id, prop::collection::vec(field, 0..3), hash)
        .prop_map(|(id, fields, hash)| format!("${id}${}${hash}", fields.join("$")))
}

#[test]
fn passwords_are_those_of_the_database() {
    let database = support::database();
    let conn = &mut database.connect();
    let id = user(conn, "ada@example.org");
    for hash in [
        HASH,
        "$2b$10$abcdefghijklmnopqrstuu9GCQzzPR3r0zLkXhLkM6Do5kzQnbDKe",
        "$6$saltstring$svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjlO/O817G3uBnIFNjnQJuesI68OTLiBFdcbYEdFCoEOfaS35inz1",
        "$pbkdf2-sha256$29000$N2YMIWQsBWBMae09x1jrPQ$1t8iyB2A.WF/Z5JZv.lfCIhXXN33N23OSgQYThBYRfk",
        "$y$j9T$F5Jx5fExrKuPp53xLKQ..1$X3DX6M94c7o.9agCG9G317fhZg9SqC.5i5rd.RhAtQ7",
    ] {
        User::change_password(conn, id, Some(&hash.into()))
            .unwrap()
            .unwrap();
    }
    let conn = RefCell::new(conn);
    TestRunner::new(Config::with_cases(600))
        .run(&almost_a_hash(), |hash| {
            let conn = &mut **conn.borrow_mut();
            let hash = SecretText::new(hash);
            let by_operation = User::change_password(conn, id, Some(&hash)).is_ok();
            let update = diesel::update(users::table.find(id)).set(users::password.eq(&hash));
            prop_assert_eq!(update.execute(conn).is_ok(), by_operation);
            Ok(())
        })
        .unwrap();
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
    let part = || {
        prop_oneof![
            "[a-zA-Z0-9.+_-]{1,20}",
            "[a-z0-9]{1,5}(\\.[a-z0-9]{1,5}){0,2}",
            "[\\PC]{1,8}",
            "\\w{1,4}",
            // Letters whose lowercase is longer or shorter, marks, white space, what is not seen.
            "[aßẞİıΣσςǅKÅΩé\u{301}\u{327}\u{345}\u{a0}\u{85}\u{3000}\u{200b}\u{202e}\u{ad}\u{feff}\t \n\0@]{1,4}",
            "[ -~]{1,4}",
            "[a-z]{120,130}",
        ]
    };
    let space = "[ \t\r\n\u{b}\u{c}\u{a0}\u{3000}]{0,2}";
    (space, part(), "@{0,2}", part(), space).prop_map(|(before, local, at, domain, after)| {
        format!("{before}{local}{at}{domain}{after}")
    })
}

/// The server's idea of lowercase and of white space depends on the collation.
#[test]
fn a_canonical_email_is_accepted_by_the_database() {
    for collation in ["C", "und-x-icu"] {
        let database = support::database();
        let column = format!(
            "DROP TRIGGER users_anonymised ON users;
             ALTER TABLE users ALTER email TYPE text COLLATE \"{collation}\""
        );
        if let Err(error) = database.psql(&column) {
            assert!(error.contains("42704"), "{error}");
            support::skipped("the server has no ICU");
            continue;
        }
        accepts_canonical_emails(&database);
    }
}

fn accepts_canonical_emails(database: &TestDatabase) {
    let conn = RefCell::new(database.connect());
    let accepted = RefCell::new(0);
    TestRunner::new(Config::with_cases(2000))
        .run(&almost_an_email(), |email| {
            let Ok(canonical) = canonical_email(&email) else {
                return Ok(());
            };
            *accepted.borrow_mut() += 1;
            prop_assert_eq!(canonical_email(&canonical), Ok(canonical.clone()));
            let outcome = conn.borrow_mut().transaction(|conn| {
                diesel::insert_into(users::table)
                    .values(ada(&canonical))
                    .execute(conn)?;
                Err::<(), _>(diesel::result::Error::RollbackTransaction)
            });
            prop_assert_eq!(outcome, Err(diesel::result::Error::RollbackTransaction));
            Ok(())
        })
        .unwrap();
    assert!(accepted.into_inner() > 100);
}

#[test]
fn an_email_address_has_one_spelling() {
    for (spellings, canonical) in [
        (
            &["\u{3000}Ada@Example.ORG\n", "ada@EXAMPLE.org"][..],
            "ada@example.org",
        ),
        (
            &["é@example.org", "e\u{301}@example.org", "É@example.org"],
            "é@example.org",
        ),
        (
            &[
                "a@bücher.example",
                "a@BU\u{308}CHER.example",
                "a@xn--bcher-kva.example",
                "a@bücher。example",
            ],
            "a@xn--bcher-kva.example",
        ),
        (&["o'neil+news_1.x@localhost"], "o'neil+news_1.x@localhost"),
    ] {
        for spelling in spellings {
            assert_eq!(
                canonical_email(spelling).as_deref(),
                Ok(canonical),
                "{spelling}"
            );
        }
    }
    let long = format!("{}@example.org", "a".repeat(244));
    for refused in [
        "",
        "@",
        "ada",
        "ada@",
        "@example.org",
        "a@b@example.org",
        "a b@example.org",
        "a\u{2028}b@example.org",
        "<ada@example.org>",
        "Ada <ada@example.org>",
        "\"ada\"@example.org",
        "a,b@example.org",
        "a;b@example.org",
        "a(b)@example.org",
        "a\\b@example.org",
        "a:b@example.org",
        "mailto:a@example.org",
        ".a@example.org",
        "a.@example.org",
        "a..b@example.org",
        "a\0b@example.org",
        "a\u{7f}@example.org",
        "a\u{85}b@example.org",
        "a\u{1b}[31m@example.org",
        // Zero-width, bidi, soft hyphen, BOM, variation selector, tag, Hangul filler, blank Braille.
        "a\u{200b}@example.org",
        "a\u{200d}b@example.org",
        "a\u{202e}b@example.org",
        "a\u{2066}b@example.org",
        "a\u{ad}b@example.org",
        "a\u{feff}b@example.org",
        "a\u{fe0f}@example.org",
        "a\u{e0041}@example.org",
        "a\u{3164}@example.org",
        "a\u{2800}@example.org",
        "a\u{e000}@example.org",
        "a\u{378}@example.org",
        "a@exam_ple.org",
        "a@-example.org",
        "a@example.org.",
        "a@.org",
        "a@example..org",
        "a@exa mple.org",
        "a@xn--a",
        "a@[192.0.2.1]",
        "a@192.0.2.1",
        "a@[IPv6:::1]",
        "a@example.org,b",
        "a@\u{202e}example.org",
        &long,
    ] {
        assert_eq!(canonical_email(refused), Err(InvalidEmail), "{refused:?}");
    }
}

#[test]
fn a_user_is_found_active_or_not() {
    let database = support::database();
    let conn = &mut database.connect();
    let new = NewUser {
        razorpay_customer_id: Some("cust_1"),
        ..ada("ada@example.org")
    };
    let id = User::sign_up(conn, &new).unwrap().id;
    let user = User::deactivate(conn, id).unwrap();
    assert_eq!(User::find_by_email(conn, "Ada@example.org ").unwrap(), user);
    assert_eq!(
        User::find_by_razorpay_customer_id(conn, "cust_1").unwrap(),
        user
    );
    assert_eq!(User::find_by_email(conn, "no address").unwrap(), None);
    assert_eq!(
        User::find_by_email(conn, "grace@example.org").unwrap(),
        None
    );
    assert_eq!(
        User::find_by_razorpay_customer_id(conn, "cust_2").unwrap(),
        None
    );
}

#[test]
fn a_reset_sets_the_password_and_ends_all_sessions() {
    let database = support::database();
    let conn = &mut database.connect();
    let id = user(conn, "ada@example.org");
    let other = user(conn, "grace@example.org");
    issue(conn, id, AuthTokenType::Refresh, 1);
    issue(conn, id, AuthTokenType::EmailVerification, 2);
    issue(conn, id, AuthTokenType::PasswordReset, 3);
    issue(conn, other, AuthTokenType::Refresh, 4);
    let token = |type_, byte| HashedToken::new(type_, [byte; 32]);
    let reset = token(AuthTokenType::PasswordReset, 3);
    let hash = SecretText::new(HASH);

    conn.transaction(|conn| {
        let plain = User::reset_password(conn, &reset, &"$hunter2".into()).unwrap_err();
        assert!(matches!(plain, ResetError::NotAHash), "{plain:?}");
        for wrong in [
            token(AuthTokenType::PasswordReset, 9),
            token(AuthTokenType::EmailVerification, 2),
            token(AuthTokenType::Refresh, 1),
        ] {
            let error = User::reset_password(conn, &wrong, &hash).unwrap_err();
            assert!(
                matches!(error, ResetError::Token(TokenError::NotFound)),
                "{error:?}"
            );
        }
        QueryResult::Ok(())
    })
    .unwrap();
    assert_eq!(live(&database).lines().count(), 4);

    let changed = User::reset_password(conn, &reset, &hash).unwrap();
    assert_eq!((changed.id, changed.password.as_ref()), (id, Some(&hash)));
    assert_eq!(live(&database), "refresh\n");
    let again = User::reset_password(conn, &reset, &hash).unwrap_err();
    assert!(
        matches!(again, ResetError::Token(TokenError::Used)),
        "{again:?}"
    );
    assert!(
        AuthToken::find_live(conn, &token(AuthTokenType::Refresh, 4))
            .unwrap()
            .is_some()
    );
}

#[test]
fn of_8_resets_with_one_token_one_succeeds() {
    let database = support::database();
    let conn = &mut database.connect();
    for (n, isolation) in ISOLATIONS.into_iter().enumerate() {
        let id = user(conn, &format!("{n}@example.org"));
        let byte = u8::try_from(n).unwrap();
        let reset = HashedToken::new(AuthTokenType::PasswordReset, [byte; 32]);
        issue(conn, id, reset.type_, byte);
        let outcomes = support::at_once(&database, 8, |thread, conn| {
            let hash = SecretText::new(format!("{HASH}{thread}"));
            retry_transaction(conn, isolation, |conn| {
                User::reset_password(conn, &reset, &hash)
            })
        });
        let used =
            |outcome: &&Result<_, _>| matches!(outcome, Err(ResetError::Token(TokenError::Used)));
        assert_eq!(outcomes.iter().filter(used).count(), 7, "{outcomes:?}");
        let winner = outcomes.into_iter().find_map(Result::ok);
        assert_eq!(User::find(conn, id).unwrap(), winner);
    }
}

#[test]
fn a_new_password_ends_all_sessions() {
    let database = support::database();
    let conn = &mut database.connect();
    let id = user(conn, "ada@example.org");
    issue(conn, id, AuthTokenType::Refresh, 1);
    issue(conn, id, AuthTokenType::PasswordReset, 2);
    let hash = SecretText::new(HASH);
    let changed = User::change_password(conn, id, Some(&hash))
        .unwrap()
        .unwrap();
    assert_eq!(changed.password, Some(hash));
    assert_eq!(live(&database), "");
    let without = User::change_password(conn, id, None).unwrap().unwrap();
    assert_eq!(without.password, None);
    User::deactivate(conn, id).unwrap();
    assert_eq!(User::change_password(conn, id, None).unwrap(), None);
    assert_eq!(
        User::change_password(conn, UserId::new(), None).unwrap(),
        None
    );
}

const DAY: TimeDelta = TimeDelta::days(1);

/// Makes the accounts look older than they are.
fn age(database: &TestDatabase) {
    database
        .psql(
            "ALTER TABLE users DISABLE TRIGGER USER;
             UPDATE users SET created_at = created_at - interval '2 days',
                              updated_at = updated_at - interval '2 days';
             ALTER TABLE users ENABLE TRIGGER USER",
        )
        .unwrap();
}

#[test]
fn an_address_that_nobody_proved_is_released_after_its_time() {
    let database = support::database();
    let conn = &mut database.connect();
    let id = user(conn, "ada@example.org");
    let release =
        |conn: &mut PgConnection, email: &str| User::release_unverified(conn, email, DAY).unwrap();
    assert_eq!(release(conn, "ada@example.org"), Release::Kept);
    age(&database);
    assert_eq!(release(conn, " ADA@example.org"), Release::Released(id));
    assert_eq!(release(conn, "ada@example.org"), Release::Free);
    assert_eq!(release(conn, "no address"), Release::Free);
    let new = user(conn, "ada@example.org");
    let old = User::find(conn, id).unwrap().unwrap();
    assert!(!old.is_active && old.email.ends_with("@anonymised.invalid"));
    assert_eq!(
        User::find_by_email(conn, "ada@example.org")
            .unwrap()
            .unwrap()
            .id,
        new
    );
    // The address of an anonymised user is nobody's.
    assert_eq!(release(conn, &old.email), Release::Kept);
}

#[test]
fn an_account_that_was_used_keeps_its_address() {
    let database = support::database();
    let conn = &mut database.connect();
    for (n, used) in [
        "UPDATE users SET email_verified = true",
        "UPDATE users SET last_login_at = now()",
        "UPDATE users SET is_active = false",
        "UPDATE users SET razorpay_customer_id = 'cust_1'",
        "INSERT INTO user_subscriptions (user_id) SELECT id FROM users",
        "INSERT INTO subscription_transactions (user_id, amount, net_amount, status)
         SELECT id, 1, 1, 'created' FROM users",
        "INSERT INTO account_credits (user_id, amount) SELECT id, 1 FROM users",
    ]
    .into_iter()
    .enumerate()
    {
        let email = format!("{n}@example.org");
        user(conn, &email);
        let only_this = format!("{used} WHERE email = '{email}'");
        database.psql(&only_this).unwrap();
        age(&database);
        assert_eq!(
            User::release_unverified(conn, &email, DAY).unwrap(),
            Release::Kept,
            "{used}"
        );
    }
}

#[test]
fn of_8_people_who_want_a_blocked_address_one_gets_it() {
    let database = support::database();
    let conn = &mut database.connect();
    for (n, isolation) in ISOLATIONS.into_iter().enumerate() {
        let email = format!("{n}@example.org");
        let old = user(conn, &email);
        age(&database);
        let outcomes = support::at_once(&database, 8, |_, conn| {
            retry_transaction(conn, isolation, |conn| {
                match User::release_unverified(conn, &email, DAY)? {
                    Release::Kept => Err(UserError::EmailTaken),
                    Release::Released(_) | Release::Free => User::sign_up(conn, &ada(&email)),
                }
            })
        });
        let taken = |outcome: &&Result<_, _>| matches!(outcome, Err(UserError::EmailTaken));
        assert_eq!(outcomes.iter().filter(taken).count(), 7, "{outcomes:?}");
        let winner = outcomes.into_iter().find_map(Result::ok);
        assert_eq!(User::find_by_email(conn, &email).unwrap(), winner);
        assert!(!User::find(conn, old).unwrap().unwrap().is_active);
    }
}

/// A release and the proof of the address at once: the account is verified or anonymised, not both.
#[test]
fn a_release_and_a_verification_exclude_each_other() {
    let database = support::database();
    let conn = &mut database.connect();
    for n in 0..24 {
        let email = format!("{n}@example.org");
        let id = user(conn, &email);
        age(&database);
        support::at_once(&database, 2, |thread, conn| {
            if thread == 0 {
                User::release_unverified(conn, &email, DAY).unwrap();
            } else {
                let proven = UserChangeset {
                    email_verified: Some(true),
                    ..Default::default()
                };
                User::update(conn, id, &proven).unwrap();
            }
        });
        let user = User::find(conn, id).unwrap().unwrap();
        assert_eq!(user.email_verified, user.is_active);
        assert_eq!(user.email_verified, user.email == email);
    }
}

/// A user with rows in every table; most of them name her.
const MARIE: &str = r#"
    INSERT INTO users (id, first_name, last_name, email, password, razorpay_customer_id, last_login_at)
    VALUES (:marie, 'Marie', 'Curie', 'marie@radium.example', '$scrypt$ln=15$salt$radiumradiumradiumradium', 'cust_Marie', now());
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
    SELECT instance_id, 'client of Marie', decode('01' || repeat('cd', 40), 'hex'), 'completed', now() FROM mcp_service_table;
    INSERT INTO user_billing_details (user_id, address_line1, city, state, country, zip_code, cards)
    VALUES (:marie, '36 quai de Béthune', 'Paris', 'IDF', 'France', '75004', 
        '[{"id": "card_Marie", "token": "token_Marie", "brand": "visa", "last4": "4242", "exp_month": 1, "exp_year": 2040}]');
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
    UPDATE subscription_transactions
       SET razorpay_order_id = 'order_Marie', gateway_status = 'captured by Marie', method = 'Marie''s upi',
           failure_code = 'MARIE';
    INSERT INTO webhook_events
        (external_event_id, event_type, payment_gateway, payload, processing_status, processed_at, error_message,
         user_id)
    VALUES
        ('processed', 'a', 'razorpay', '{"a": [{"email": "Marie@Radium.example"}]}', 'processed', now(), NULL, :marie),
        ('skipped', 'a', 'razorpay', '{"text": "for Marie"}', 'skipped', now(), NULL, :marie),
        ('failed', 'a', 'stripe', '{"id": "Marie"}', 'failed', now(), 'Marie?', :marie),
        ('pending', 'a', 'razorpay', '["Marie"]', 'pending', NULL, NULL, :marie),
        ('unlinked', 'a', 'razorpay', '{"email": "marie@radium.example"}', 'processed', now(), NULL, NULL);
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

    // Events are found by their user, not by their text.
    let events = "SELECT external_event_id, processing_status, payload = '{}', error_message
                    FROM webhook_events ORDER BY 1";
    assert_eq!(
        database.psql(events).unwrap(),
        "failed|skipped|t|\npending|skipped|t|\nprocessed|processed|t|\nskipped|skipped|t|\nunlinked|processed|f|\n"
    );
    database
        .psql("DELETE FROM webhook_events WHERE user_id IS NULL")
        .unwrap();
    let dump = database.dump(&["--data-only"]).to_lowercase();
    assert!(dump.contains("pay_1") && dump.contains("razorpay"));
    for trace in [
        "marie", "curie", "radium", "béthune", "paris", "75004", "abab", "cdcd",
    ] {
        assert!(!dump.contains(trace), "{trace} is in {dump}");
    }

    // The account can't be used again, and a second call changes nothing.
    assert_eq!(User::reactivate(conn, marie).unwrap(), None);
    assert_eq!(User::record_login(conn, marie).unwrap(), None);
    let named = UserChangeset {
        first_name: Some("Marie"),
        ..Default::default()
    };
    for changes in [named, UserChangeset::default()] {
        assert_eq!(User::update(conn, marie, &changes).unwrap(), None);
    }
    let hash = SecretText::new(HASH);
    assert_eq!(
        User::change_password(conn, marie, Some(&hash)).unwrap(),
        None
    );
    assert_eq!(
        User::change_email(conn, marie, "marie@radium.example", true).unwrap(),
        None
    );
    assert_eq!(
        User::deactivate(conn, marie).unwrap().as_ref(),
        Some(&anonymised)
    );
    let reset = HashedToken::new(AuthTokenType::PasswordReset, [7; 32]);
    assert_eq!(
        AuthToken::issue(conn, marie, &reset, TimeDelta::hours(1)).unwrap(),
        None
    );
    let again = NewUser {
        id: Some(marie),
        ..ada("marie@radium.example")
    };
    assert!(User::sign_up(conn, &again).is_err());
    let error = User::sign_up(conn, &ada(&anonymised.email)).unwrap_err();
    assert!(matches!(error, UserError::InvalidEmail(_)), "{error:?}");
    assert_eq!(User::anonymise(conn, marie).unwrap(), Some(anonymised));
    assert!(User::sign_up(conn, &ada("marie@radium.example")).is_ok());
}

/// Tables whose rows of an anonymised user stay, without what tells of a person.
const KEPT: [&str; 5] = [
    "account_credits",
    "subscription_transactions",
    "token_audit_log",
    "user_plans",
    "user_subscriptions",
];

/// Also those of a table that a later migration adds.
#[test]
fn no_table_keeps_rows_of_an_anonymised_user_unless_it_is_known() {
    let database = database_with_rows();
    let conn = &mut database.connect();
    for user in User::list(conn, Page::first(10)).unwrap() {
        User::anonymise(conn, user.id).unwrap();
    }
    let tables = database
        .psql(
            "SELECT attrelid::regclass FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
              WHERE attname = 'user_id' AND relkind IN ('r', 'p') AND NOT relispartition
                AND relnamespace = 'public'::regnamespace",
        )
        .unwrap();
    let keeps = |table: &&str| {
        let rows = format!("SELECT count(*) FROM {table} WHERE user_id IS NOT NULL");
        database.psql(&rows).unwrap() != "0\n"
    };
    let kept: BTreeSet<&str> = tables.lines().filter(keeps).collect();
    assert_eq!(
        kept,
        BTreeSet::from(KEPT),
        "let User::anonymise delete the rows, or empty what tells of a person and add the table to KEPT"
    );
}

/// Also a column that a later migration adds.
#[test]
fn what_tells_of_a_person_stays_anonymised() {
    let others = support::database()
        .psql(
            "SELECT attname FROM pg_attribute
              WHERE attrelid = 'users'::regclass AND attnum > 0 AND NOT attisdropped
                AND attnum <> ALL (
                    SELECT unnest(tgattr) FROM pg_trigger WHERE tgname = 'users_anonymised')
              ORDER BY 1",
        )
        .unwrap();
    assert_eq!(
        others, "created_at\nupdated_at\n",
        "if it tells of a person, let User::anonymise clear it, and drop and create the trigger \
         users_anonymised with it; otherwise add it here"
    );
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
fn concurrent_calls_of_anonymise_succeed_at_any_isolation_level() {
    for level in [
        Isolation::ReadCommitted,
        Isolation::RepeatableRead,
        Isolation::Serializable,
    ] {
        let database = support::database();
        let conn = &mut database.connect();
        let ids: Vec<UserId> = (0..24)
            .map(|n| user(conn, &format!("{n}@example.org")))
            .collect();
        database
            .psql(
                "INSERT INTO webhook_events (external_event_id, event_type, payment_gateway, payload, user_id)
                 SELECT email, 'a', 'razorpay', json_build_object('email', email), id FROM users",
            )
            .unwrap();
        support::at_once(&database, 8, |thread, conn| {
            // Each user is another thread's user too.
            for &id in ids.iter().cycle().skip(thread * 3).take(6) {
                let anonymised = retry_transaction(conn, level, |conn| User::anonymise(conn, id));
                assert!(anonymised.unwrap().is_some());
            }
        });
        let left = "SELECT count(*) FROM webhook_events WHERE payload <> '{}'";
        assert_eq!(database.psql(left).unwrap(), "0\n", "{level:?}");
    }
}

/// What the export leaves out, beside all columns of the type bytea.
const SECRETS: &[(&str, &str)] = &[
    ("users", "password"),
    ("mcp_credentials", "oauth_authorization_url"),
    ("mcp_credentials", "oauth_state"),
];

/// Each table with a path of foreign keys to `users`, or with a user's or an instance's key.
const PERSONAL: &str = "
    WITH RECURSIVE linked AS (
        SELECT 'users'::regclass::oid AS oid
         UNION
        SELECT conrelid FROM pg_constraint JOIN linked ON confrelid = linked.oid WHERE contype = 'f'
    )
    SELECT relname, attname, atttypid = 'bytea'::regtype
      FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid
     WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
       AND attnum > 0 AND NOT attisdropped
       AND (pg_class.oid IN (TABLE linked)
            OR EXISTS (
                   SELECT FROM pg_attribute AS key
                    WHERE key.attrelid = pg_class.oid AND key.attname IN ('user_id', 'instance_id')))";

#[test]
fn the_export_has_everything_about_a_user_but_secrets() {
    let database = crate::rules::database_with_rows();
    let conn = &mut database.connect();
    let asha = crate::rules::with_keys(":u1");
    let card = r#"[{"id": "card_1", "token": "token_1", "brand": "visa", "last4": "4242", "exp_month": 1,
        "exp_year": 2040}]"#;
    database
        .psql(&format!(
            "UPDATE webhook_events SET user_id = {asha};
             UPDATE users SET password = '{HASH}' WHERE id = {asha};
             INSERT INTO token_audit_log (instance_id, user_id, operation, status)
             VALUES (gen_random_uuid(), {asha}, 'of a deleted instance', 'success'),
                    (gen_random_uuid(), NULL, 'of another', 'success');
             UPDATE user_billing_details SET cards = '{card}'"
        ))
        .unwrap();
    let id: UserId = asha.trim_matches('\'').parse().unwrap();
    let export = User::export(conn, id).unwrap().unwrap();

    let mut tables = BTreeSet::new();
    for line in database.psql(PERSONAL).unwrap().lines() {
        let [table, column, bytea] = line.split('|').collect::<Vec<_>>()[..] else {
            panic!("{line}")
        };
        tables.insert(table.to_owned());
        // A later migration brings no rows.
        let empty = format!("SELECT count(*) = 0 FROM {table}");
        if database.psql(&empty).unwrap() == "t\n" {
            continue;
        }
        let row = export[table][0].as_object();
        let row = row.unwrap_or_else(|| panic!("{table} is not in the export"));
        let secret = bytea == "t" || SECRETS.contains(&(table, column));
        assert_eq!(row.contains_key(column), !secret, "{table}.{column}");
    }
    let exported: BTreeSet<String> = export.as_object().unwrap().keys().cloned().collect();
    assert_eq!(exported, tables, "see src/models/users/export.rs");

    let text = export.to_string();
    for secret in ["token_1", HASH, "0101", "aaaa", "state_1"] {
        assert!(!text.contains(secret), "{secret} is in {text}");
    }
    for known in ["asha@example.in", "1 MG Road", "4242", "pay_1", "evt_1"] {
        assert!(text.contains(known), "{known} is not in {text}");
    }
    // By the user and by the user's instances.
    let log = export["token_audit_log"].as_array().unwrap();
    assert_eq!(log.len(), 3, "{log:?}");
    // Nothing of another user.
    assert!(!text.contains("ben@example.in") && !text.contains("of another"));
    assert_eq!(User::export(conn, UserId::new()).unwrap(), None);
}
