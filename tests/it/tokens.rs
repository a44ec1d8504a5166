//! One-time codes, links and refresh tokens.

use std::sync::mpsc;

use bruhmcp_db::enums::AuthTokenType::{
    self, EmailChangePending, EmailOtp, EmailVerification, PasswordReset, Refresh,
};
use bruhmcp_db::ids::{FamilyId, UserId};
use bruhmcp_db::models::{
    AuthToken, CODE_WINDOW, CodeCheck, IssueError, MAX_CODE_ATTEMPTS, MAX_ISSUED, MAX_SESSIONS,
    Rotation, TokenError, User,
};
use bruhmcp_db::{HashedToken, Isolation, NegativeSpan, Page, retry_transaction};
use chrono::{DateTime, TimeDelta, Utc};
use diesel::connection::InstrumentationEvent;
use diesel::pg::PgConnection;
use diesel::prelude::*;

use crate::support::{self, TestDatabase};
use crate::users::user;

fn hashed(type_: AuthTokenType, number: usize) -> HashedToken {
    let mut digest = [0; 32];
    digest[..8].copy_from_slice(&number.to_be_bytes());
    HashedToken::new(type_, digest)
}

fn hour() -> TimeDelta {
    TimeDelta::hours(1)
}

fn issue(conn: &mut PgConnection, user: UserId, type_: AuthTokenType, number: usize) -> AuthToken {
    AuthToken::issue(conn, user, &hashed(type_, number), hour())
        .unwrap()
        .unwrap()
}

/// Moves all tokens into the past.
fn let_pass(database: &TestDatabase, time: &str) {
    let sql = format!(
        "ALTER TABLE auth_tokens DISABLE TRIGGER USER;
         UPDATE auth_tokens
            SET created_at = created_at - interval '{time}', expires_at = expires_at - interval '{time}',
                used_at = used_at - interval '{time}',
                session_expires_at = session_expires_at - interval '{time}';
         ALTER TABLE auth_tokens ENABLE TRIGGER USER"
    );
    database.psql(&sql).unwrap();
}

fn let_two_hours_pass(database: &TestDatabase) {
    let_pass(database, "2 hours");
}

fn live(conn: &mut PgConnection, user: UserId, type_: AuthTokenType) -> Vec<AuthToken> {
    let tokens = AuthToken::list_by_user(conn, user, type_, Page::first(100)).unwrap();
    tokens.into_iter().filter(|token| !token.is_used).collect()
}

#[test]
fn a_new_token_replaces_the_live_one_of_its_type() {
    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    let first = issue(conn, ada, PasswordReset, 1);
    assert_eq!(first.expires_at - first.created_at, hour());
    issue(conn, ada, EmailVerification, 2);
    let second = issue(conn, ada, PasswordReset, 3);
    assert_eq!(live(conn, ada, PasswordReset), [second]);
    assert_eq!(live(conn, ada, EmailVerification).len(), 1);
    // An expired token does not block a new one.
    let_two_hours_pass(&database);
    issue(conn, ada, PasswordReset, 4);

    // Each device has a refresh token.
    issue(conn, ada, Refresh, 5);
    issue(conn, ada, Refresh, 6);
    assert_eq!(live(conn, ada, Refresh).len(), 2);

    User::deactivate(conn, ada).unwrap();
    for user in [ada, UserId::new()] {
        let issued = AuthToken::issue(conn, user, &hashed(EmailOtp, 7), hour()).unwrap();
        assert_eq!(issued, None);
    }
}

const ONE_TIME: [AuthTokenType; 4] = [
    EmailOtp,
    PasswordReset,
    EmailVerification,
    EmailChangePending,
];

/// Issues a token; the error is when the next one can be issued.
fn try_issue(
    conn: &mut PgConnection,
    user: UserId,
    type_: AuthTokenType,
    number: usize,
) -> QueryResult<Result<AuthToken, DateTime<Utc>>> {
    match AuthToken::issue(conn, user, &hashed(type_, number), hour()) {
        Ok(token) => Ok(Ok(token.unwrap())),
        Err(IssueError::TooMany { next_at }) => Ok(Err(next_at)),
        Err(IssueError::Database(error)) => Err(error),
        Err(error) => panic!("{error:?}"),
    }
}

#[test]
fn the_sixth_code_or_link_within_an_hour_is_refused() {
    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    let grace = user(conn, "grace@example.org");
    for (n, type_) in ONE_TIME.into_iter().enumerate() {
        let mut number = n * 100;
        let mut try_issue = |conn: &mut PgConnection, user| {
            number += 1;
            try_issue(conn, user, type_, number).unwrap()
        };
        // Consumed, revoked or replaced: each counts.
        let first = try_issue(conn, ada).unwrap();
        AuthToken::revoke_all(conn, ada, None).unwrap();
        for _ in 2..MAX_ISSUED {
            try_issue(conn, ada).unwrap();
        }
        let_pass(&database, "30 minutes");
        let last = try_issue(conn, ada).unwrap();
        let last_at = last.created_at;
        conn.transaction(|conn| {
            let next_at = try_issue(conn, ada).unwrap_err();
            assert_eq!(
                next_at,
                first.created_at - TimeDelta::minutes(30) + CODE_WINDOW
            );
            // The transaction goes on, and the token that was issued before lives.
            assert_eq!(live(conn, ada, type_), [last]);
            QueryResult::Ok(())
        })
        .unwrap();
        try_issue(conn, grace).unwrap();

        // The window moves on: four of them are too old now.
        let_pass(&database, "31 minutes");
        for _ in 0..4 {
            try_issue(conn, ada).unwrap();
        }
        let next_at = try_issue(conn, ada).unwrap_err();
        assert_eq!(next_at, last_at - TimeDelta::minutes(31) + CODE_WINDOW);
        let_two_hours_pass(&database);
    }
    for number in 0..2 * usize::from(MAX_ISSUED) {
        issue(conn, ada, Refresh, number);
    }
}

#[test]
fn of_16_who_ask_for_a_token_at_a_time_five_get_one() {
    let database = support::database();
    let conn = &mut database.connect();
    for (n, isolation) in LEVELS.into_iter().enumerate() {
        let ada = user(conn, &format!("ada{n}@example.org"));
        for (m, type_) in ONE_TIME.into_iter().enumerate() {
            let outcomes = support::at_once(&database, 16, |thread, conn| {
                let number = n * 1000 + m * 100 + thread;
                let outcome =
                    with_old_snapshot(conn, isolation, |conn| try_issue(conn, ada, type_, number));
                // So that the next one need not replace it.
                if thread % 2 == 0 {
                    AuthToken::revoke(conn, &hashed(type_, number)).unwrap();
                }
                outcome
            });
            let issued = outcomes.iter().flatten().count();
            assert_eq!(issued, usize::from(MAX_ISSUED), "{isolation:?}, {type_:?}");
            let since = Utc::now() - hour();
            let stored = AuthToken::count_issued_since(conn, ada, type_, since).unwrap();
            assert_eq!(stored, i64::from(MAX_ISSUED));
            assert!(live(conn, ada, type_).len() <= 1);
        }
    }
}

#[test]
fn an_old_snapshot_hides_no_token_from_the_limit() {
    let database = support::database();
    let conn = &mut database.connect();
    let other = &mut database.connect();
    for (n, isolation) in LEVELS.into_iter().enumerate() {
        let ada = user(conn, &format!("ada{n}@example.org"));
        let mut attempts = 0;
        let outcome = retry_transaction(conn, isolation, |conn| {
            attempts += 1;
            diesel::sql_query("SELECT 1 FROM auth_tokens LIMIT 1").execute(conn)?;
            if attempts == 1 {
                // None is live in the end, so the next one replaces none.
                for number in 0..usize::from(MAX_ISSUED) {
                    issue(other, ada, PasswordReset, n * 100 + number);
                    AuthToken::revoke_all(other, ada, None)?;
                }
            }
            try_issue(conn, ada, PasswordReset, n * 100 + 50)
        });
        assert!(outcome.unwrap().is_err(), "{isolation:?}");
    }
}

#[test]
fn the_limit_reads_an_index() {
    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    database
        .psql(
            "INSERT INTO auth_tokens (user_id, token, type, is_used, used_at, created_at, expires_at)
             SELECT id, decode(lpad(to_hex(n), 64, '0'), 'hex'), 'email_otp', true, time, time,
                    time + interval '1 hour'
               FROM users, generate_series(1, 20000) AS n, LATERAL (SELECT now() - n * interval '1 hour') AS t(time);
             ANALYZE auth_tokens",
        )
        .unwrap();
    let (sender, statements) = mpsc::channel();
    conn.set_instrumentation(move |event: InstrumentationEvent<'_>| {
        if let InstrumentationEvent::StartQuery { query, .. } = event {
            sender.send(query.to_string()).unwrap();
        }
    });
    issue(conn, ada, EmailOtp, 1);
    let statements: Vec<String> = statements.try_iter().collect();
    let limit = statements.iter().find(|text| text.contains("OFFSET"));
    let plan = database
        .psql(&format!(
            "SET plan_cache_mode = force_generic_plan;
             PREPARE newest (uuid, auth_token_type, interval, bigint, bigint) AS {};
             EXPLAIN (COSTS off) EXECUTE newest ('{ada}', 'email_otp', '1 hour', 1, 4)",
            limit.unwrap().split(" -- binds").next().unwrap()
        ))
        .unwrap();
    let index = "Index Only Scan Backward using auth_tokens_user_id_type_created_at_idx";
    assert!(plan.contains(index) && !plan.contains("Sort"), "{plan}");
}

#[test]
fn a_limit_of_issued_tokens_holds() {
    #[derive(Debug, thiserror::Error)]
    enum Error {
        #[error("too many codes")]
        TooMany,
        #[error("database error")]
        Database(#[from] diesel::result::Error),
    }
    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    issue(conn, ada, EmailOtp, 100);
    let_two_hours_pass(&database);
    let since = Utc::now() - hour();
    let outcomes = support::at_once(&database, 8, |thread, conn| {
        conn.transaction(|conn| {
            issue(conn, ada, EmailOtp, thread);
            let issued = AuthToken::count_issued_since(conn, ada, EmailOtp, since)?;
            if issued > 3 {
                Err(Error::TooMany)
            } else {
                Ok(())
            }
        })
    });
    let refused = |outcome: &&Result<_, _>| matches!(outcome, Err(Error::TooMany));
    assert_eq!(outcomes.iter().filter(refused).count(), 5);
    assert_eq!(outcomes.iter().flatten().count(), 3);
}

#[test]
fn a_lifetime_is_positive_and_not_too_long() {
    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    let day = TimeDelta::days(1);
    let tick = TimeDelta::microseconds(1);
    let invalid = |outcome: &Result<_, IssueError>| matches!(outcome, Err(IssueError::Lifetime));
    for (n, (type_, longest)) in [
        (EmailOtp, hour()),
        (EmailChangePending, hour()),
        (PasswordReset, day * 7),
        (EmailVerification, day * 7),
        (Refresh, day * 365),
    ]
    .into_iter()
    .enumerate()
    {
        let mut issue = |number, lifetime| {
            AuthToken::issue(conn, ada, &hashed(type_, n * 10 + number), lifetime)
        };
        for lifetime in [
            TimeDelta::zero(),
            -tick,
            TimeDelta::nanoseconds(999),
            longest + tick,
        ] {
            assert!(invalid(&issue(0, lifetime)), "{type_:?}, {lifetime}");
        }
        for (number, lifetime) in [(1, tick), (2, longest)] {
            let token = issue(number, lifetime).unwrap().unwrap();
            assert_eq!(token.expires_at - token.created_at, lifetime);
        }
    }
    let token = hashed(Refresh, 100);
    for (lifetime, session) in [(TimeDelta::zero(), day), (day, TimeDelta::zero())] {
        assert!(invalid(&AuthToken::begin_session(
            conn, ada, &token, lifetime, session
        )));
    }
    AuthToken::begin_session(conn, ada, &token, day, day).unwrap();
    for lifetime in [TimeDelta::zero(), TimeDelta::MAX] {
        let refused = AuthToken::rotate(conn, &token, &hashed(Refresh, 101), lifetime);
        assert!(matches!(refused, Err(IssueError::Lifetime)), "{refused:?}");
    }
    assert!(AuthToken::find_live(conn, &token).unwrap().is_some());
}

#[test]
fn a_digest_that_exists_is_refused_and_changes_nothing() {
    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    let grace = user(conn, "grace@example.org");
    issue(conn, ada, PasswordReset, 1);
    let own = issue(conn, grace, EmailVerification, 2);
    let session = issue(conn, grace, Refresh, 3);
    conn.transaction(|conn| {
        for type_ in [PasswordReset, EmailVerification, Refresh] {
            let refused = AuthToken::issue(conn, grace, &hashed(type_, 1), hour());
            assert!(
                matches!(refused, Err(IssueError::DigestTaken)),
                "{refused:?}"
            );
        }
        let (presented, successor) = (hashed(Refresh, 3), hashed(Refresh, 1));
        let refused = AuthToken::rotate(conn, &presented, &successor, hour());
        assert!(
            matches!(refused, Err(IssueError::DigestTaken)),
            "{refused:?}"
        );
        // What would have been replaced lives.
        assert_eq!(live(conn, grace, EmailVerification), [own]);
        assert_eq!(live(conn, grace, Refresh), [session]);
        QueryResult::Ok(())
    })
    .unwrap();
    // Two users may have the same code.
    for user in [ada, grace] {
        issue(conn, user, EmailOtp, 1);
    }
}

#[test]
fn a_live_token_is_found_and_stays_live() {
    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    let session = issue(conn, ada, Refresh, 1);
    issue(conn, ada, EmailOtp, 2);
    let mut find = |type_, number| AuthToken::find_live(conn, &hashed(type_, number)).unwrap();
    for _ in 0..2 {
        assert_eq!(find(Refresh, 1).as_ref(), Some(&session));
    }
    assert_eq!(find(PasswordReset, 1), None, "another type");
    assert_eq!(find(Refresh, 9), None, "unknown");
    assert_eq!(find(EmailOtp, 2), None, "a code");

    let_two_hours_pass(&database);
    assert_eq!(find(Refresh, 1), None, "expired");
    let conn = &mut database.connect();
    issue(conn, ada, Refresh, 3);
    AuthToken::revoke(conn, &hashed(Refresh, 3)).unwrap();
    assert_eq!(
        AuthToken::find_live(conn, &hashed(Refresh, 3)).unwrap(),
        None,
        "revoked"
    );
    issue(conn, ada, Refresh, 4);
    let user = diesel::update(bruhmcp_db::schema::users::table.find(ada));
    user.set(bruhmcp_db::schema::users::is_active.eq(false))
        .execute(conn)
        .unwrap();
    assert_eq!(
        AuthToken::find_live(conn, &hashed(Refresh, 4)).unwrap(),
        None,
        "not active"
    );
}

#[test]
fn a_link_is_consumed_once() {
    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    let token = issue(conn, ada, PasswordReset, 1);
    let consumed = AuthToken::consume(conn, &hashed(PasswordReset, 1)).unwrap();
    assert_eq!((consumed.id, consumed.user_id), (token.id, ada));

    let mut error = |type_, number| AuthToken::consume(conn, &hashed(type_, number)).unwrap_err();
    assert!(matches!(error(PasswordReset, 1), TokenError::Used));
    assert!(matches!(error(PasswordReset, 2), TokenError::NotFound));
    // Another type, and types that consume refuses.
    assert!(matches!(error(EmailVerification, 1), TokenError::NotFound));
    for type_ in [Refresh, EmailOtp, EmailChangePending] {
        issue(&mut database.connect(), ada, type_, 3);
        assert!(matches!(error(type_, 3), TokenError::NotFound));
    }
    // Replaced.
    for number in [4, 5] {
        issue(&mut database.connect(), ada, EmailVerification, number);
    }
    assert!(matches!(error(EmailVerification, 4), TokenError::Used));
    // Expired.
    let_two_hours_pass(&database);
    assert!(matches!(error(EmailVerification, 5), TokenError::Expired));
    // A live token of an inactive user.
    let token = issue(&mut database.connect(), ada, EmailVerification, 6);
    database.psql("UPDATE users SET is_active = false").unwrap();
    assert!(matches!(error(EmailVerification, 6), TokenError::NotFound));
    assert_eq!(live(conn, ada, EmailVerification), [token]);
}

#[test]
fn of_32_who_present_a_link_one_consumes_it() {
    let database = support::database();
    let ada = user(&mut database.connect(), "ada@example.org");
    issue(&mut database.connect(), ada, EmailVerification, 1);
    let outcomes = support::at_once(&database, 32, |_, conn| {
        AuthToken::consume(conn, &hashed(EmailVerification, 1))
    });
    let used = |outcome: &&Result<_, _>| matches!(outcome, Err(TokenError::Used));
    assert_eq!(outcomes.iter().filter(used).count(), 31);
    assert_eq!(outcomes.iter().flatten().count(), 1);
}

/// Both lock the user before the token.
#[test]
fn consuming_and_replacing_do_not_deadlock() {
    let database = support::database();
    let conn = &mut database.connect();
    // Each is issued a token by each thread.
    let users: Vec<_> = (0..50)
        .map(|n| user(conn, &format!("{n}@example.org")))
        .collect();
    support::at_once(&database, 4, |thread, conn| {
        for (round, &ada) in users.iter().enumerate() {
            let number = thread * 1000 + round;
            issue(conn, ada, PasswordReset, number);
            conn.transaction(|conn| {
                match AuthToken::consume(conn, &hashed(PasswordReset, number)) {
                    Ok(_) | Err(TokenError::Used) => {}
                    Err(error) => panic!("{error:?}"),
                }
                AuthToken::revoke_all(conn, ada, None)
            })
            .unwrap();
        }
    });
}

#[test]
fn a_code_survives_a_few_wrong_guesses() {
    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    let grace = user(conn, "grace@example.org");
    let mut check =
        |user, type_, number| AuthToken::check_code(conn, user, &hashed(type_, number)).unwrap();
    let issue = |type_, number| issue(&mut database.connect(), ada, type_, number);

    assert_eq!(check(ada, EmailOtp, 1), CodeCheck::NotFound);
    issue(EmailOtp, 1);
    for attempts_left in (1..MAX_CODE_ATTEMPTS).rev() {
        assert_eq!(check(ada, EmailOtp, 2), CodeCheck::Wrong { attempts_left });
    }
    // Guesses by another user or of another type don't count.
    assert_eq!(check(grace, EmailOtp, 1), CodeCheck::NotFound);
    assert_eq!(check(ada, EmailChangePending, 1), CodeCheck::NotFound);
    let CodeCheck::Right(token) = check(ada, EmailOtp, 1) else {
        panic!("the right code was refused")
    };
    assert_eq!(
        (token.user_id, token.attempts),
        (ada, MAX_CODE_ATTEMPTS - 1)
    );
    assert_eq!(check(ada, EmailOtp, 1), CodeCheck::Used);
    assert_eq!(check(ada, EmailOtp, 2), CodeCheck::Used);

    issue(EmailChangePending, 1);
    for attempts_left in (0..MAX_CODE_ATTEMPTS).rev() {
        assert_eq!(
            check(ada, EmailChangePending, 2),
            CodeCheck::Wrong { attempts_left }
        );
    }
    assert_eq!(
        check(ada, EmailChangePending, 1),
        CodeCheck::TooManyAttempts
    );
    // A new code has no new attempts.
    issue(EmailChangePending, 3);
    assert_eq!(
        check(ada, EmailChangePending, 3),
        CodeCheck::TooManyAttempts
    );
    // It has them an hour later; the replaced code is not compared.
    let_pass(&database, "61 minutes");
    issue(EmailChangePending, 6);
    let attempts_left = MAX_CODE_ATTEMPTS - 1;
    assert_eq!(
        check(ada, EmailChangePending, 3),
        CodeCheck::Wrong { attempts_left }
    );
    let_two_hours_pass(&database);
    assert_eq!(check(ada, EmailChangePending, 6), CodeCheck::Expired);

    // Links and refresh tokens are refused.
    issue(Refresh, 4);
    assert_eq!(check(ada, Refresh, 4), CodeCheck::NotFound);
    issue(EmailOtp, 5);
    database.psql("UPDATE users SET is_active = false").unwrap();
    assert_eq!(check(ada, EmailOtp, 5), CodeCheck::NotFound);
}

#[test]
fn parallel_guesses_do_not_pass_the_limit() {
    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    issue(conn, ada, EmailOtp, 100);
    let outcomes = support::at_once(&database, 32, |thread, conn| {
        AuthToken::check_code(conn, ada, &hashed(EmailOtp, thread)).unwrap()
    });
    let mut left: Vec<i16> = Vec::new();
    for outcome in outcomes {
        match outcome {
            CodeCheck::Wrong { attempts_left } => left.push(attempts_left),
            other => assert_eq!(other, CodeCheck::TooManyAttempts),
        }
    }
    left.sort_unstable();
    assert_eq!(left, (0..MAX_CODE_ATTEMPTS).collect::<Vec<_>>());
    let right = AuthToken::check_code(conn, ada, &hashed(EmailOtp, 100)).unwrap();
    assert_eq!(right, CodeCheck::TooManyAttempts);
    assert_eq!(live(conn, ada, EmailOtp)[0].attempts, MAX_CODE_ATTEMPTS);
}

#[test]
fn of_32_right_guesses_one_counts() {
    let database = support::database();
    let ada = user(&mut database.connect(), "ada@example.org");
    issue(&mut database.connect(), ada, EmailOtp, 1);
    let outcomes = support::at_once(&database, 32, |_, conn| {
        AuthToken::check_code(conn, ada, &hashed(EmailOtp, 1)).unwrap()
    });
    let right = |outcome: &&_| matches!(outcome, CodeCheck::Right(_));
    assert_eq!(outcomes.iter().filter(right).count(), 1);
    let used = |outcome: &&_| matches!(outcome, CodeCheck::Used);
    assert_eq!(outcomes.iter().filter(used).count(), 31);
}

fn rotate(conn: &mut PgConnection, presented: usize, successor: usize) -> Rotation {
    AuthToken::rotate(
        conn,
        &hashed(Refresh, presented),
        &hashed(Refresh, successor),
        hour(),
    )
    .unwrap()
}

#[test]
fn a_wrong_guess_is_not_lost_in_a_transaction() {
    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    issue(conn, ada, EmailOtp, 1);
    let refused = conn.transaction(|conn| AuthToken::check_code(conn, ada, &hashed(EmailOtp, 1)));
    assert_eq!(refused, Err(diesel::result::Error::AlreadyInTransaction));
    let check = AuthToken::check_code(conn, ada, &hashed(EmailOtp, 2)).unwrap();
    assert!(matches!(check, CodeCheck::Wrong { .. }));
}

fn begin(conn: &mut PgConnection, user: UserId, number: usize, days: i64) -> FamilyId {
    let session = TimeDelta::days(days);
    let token = hashed(Refresh, number);
    let token = AuthToken::begin_session(conn, user, &token, hour(), session).unwrap();
    token.unwrap().family_id.unwrap()
}

fn families(conn: &mut PgConnection, user: UserId) -> Vec<FamilyId> {
    let sessions = AuthToken::list_sessions(conn, user).unwrap();
    sessions.iter().map(|session| session.family_id).collect()
}

#[test]
fn a_refresh_token_has_successors_until_its_session_ends() {
    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    let family = begin(conn, ada, 1, 1);
    issue(conn, ada, PasswordReset, 30);
    let lifetime = TimeDelta::hours(20);
    let mut rotate = |presented, successor| {
        let (presented, successor) = (hashed(Refresh, presented), hashed(Refresh, successor));
        AuthToken::rotate(conn, &presented, &successor, lifetime).unwrap()
    };
    let Rotation::Rotated(second) = rotate(1, 2) else {
        panic!("a live token was refused")
    };
    assert_eq!((second.user_id, second.family_id), (ada, Some(family)));
    assert_eq!(second.expires_at - second.created_at, lifetime);
    let_pass(&database, "10 hours");
    let Rotation::Rotated(third) = rotate(2, 3) else {
        panic!("a live token was refused")
    };
    assert_eq!(Some(third.expires_at), third.session_expires_at);

    assert_eq!(rotate(99, 7), Rotation::NotFound);
    assert_eq!(rotate(30, 7), Rotation::NotFound, "not a refresh token");
    let_pass(&database, "15 hours");
    assert_eq!(rotate(3, 7), Rotation::Expired);
    assert_eq!(rotate(1, 7), Rotation::Expired);
    issue(&mut database.connect(), ada, Refresh, 8);
    database.psql("UPDATE users SET is_active = false").unwrap();
    assert_eq!(rotate(8, 9), Rotation::NotFound);
}

#[test]
fn a_token_presented_again_ends_its_session_after_ten_seconds() {
    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    let family_id = begin(conn, ada, 1, 30);
    let other = begin(conn, ada, 10, 30);
    let reused = Rotation::Reused {
        user_id: ada,
        family_id,
    };
    for successor in 2..4 {
        let Rotation::Rotated(token) = rotate(conn, 1, successor) else {
            panic!("the answer was lost")
        };
        assert_eq!(token.family_id, Some(family_id));
    }
    let_pass(&database, "11 seconds");
    assert!(matches!(rotate(conn, 2, 4), Rotation::Rotated(_)));
    assert_eq!(rotate(conn, 1, 5), reused);
    assert_eq!(families(conn, ada), [other]);
    // All of them, also within ten seconds of a use.
    for presented in 1..=4 {
        assert_eq!(rotate(conn, presented, 5), Rotation::Expired);
    }
    assert!(matches!(rotate(conn, 10, 11), Rotation::Rotated(_)));
}

const LEVELS: [Isolation; 3] = [
    Isolation::ReadCommitted,
    Isolation::RepeatableRead,
    Isolation::Serializable,
];

/// Retries until the operation succeeds, with a snapshot that is older than its locks.
fn with_old_snapshot<T, E: From<diesel::result::Error> + std::error::Error + 'static>(
    conn: &mut PgConnection,
    isolation: Isolation,
    work: impl Fn(&mut PgConnection) -> Result<T, E>,
) -> T {
    loop {
        let result = retry_transaction(conn, isolation, |conn| {
            diesel::sql_query("SELECT 1 FROM auth_tokens LIMIT 1").execute(conn)?;
            work(conn)
        });
        match result {
            Ok(outcome) => return outcome,
            Err(error) if bruhmcp_db::is_transient(&error) => {}
            Err(error) => panic!("{error:?}"),
        }
    }
}

#[test]
fn sixteen_who_present_a_refresh_token_share_its_session() {
    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    for (round, isolation) in (1..).zip(LEVELS) {
        let first = round * 1000;
        for old in [false, true] {
            let first = first + usize::from(old) * 100;
            let family_id = begin(conn, ada, first, 30);
            rotate(conn, first, first + 50);
            if old {
                let_pass(&database, "11 seconds");
            }
            let outcomes = support::at_once(&database, 16, |thread, conn| {
                with_old_snapshot(conn, isolation, |conn| {
                    let (presented, next) = (first, first + thread + 1);
                    let (presented, next) = (hashed(Refresh, presented), hashed(Refresh, next));
                    AuthToken::rotate(conn, &presented, &next, hour())
                })
            });
            let count = |is: fn(&Rotation) -> bool| outcomes.iter().filter(|one| is(one)).count();
            let rotated = count(|one| matches!(one, Rotation::Rotated(_)));
            let reused = count(|one| matches!(one, Rotation::Reused { .. }));
            let live = families(conn, ada).contains(&family_id);
            if old {
                assert_eq!((rotated, reused, live), (0, 1, false), "{isolation:?}");
            } else {
                assert_eq!((rotated, reused, live), (16, 0, true), "{isolation:?}");
            }
        }
    }
}

#[test]
fn no_token_survives_the_end_of_its_session() {
    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    for (round, isolation) in (0..30).zip(LEVELS.into_iter().cycle()) {
        let first = round * 100;
        let family_id = begin(conn, ada, first, 30);
        rotate(conn, first, first + 1);
        support::at_once(&database, 4, |thread, conn| {
            with_old_snapshot(conn, isolation, |conn| match thread {
                0 => AuthToken::end_session(conn, ada, family_id)
                    .map(drop)
                    .map_err(IssueError::from),
                // A sibling, or a successor.
                _ => AuthToken::rotate(
                    conn,
                    &hashed(Refresh, first + thread % 2),
                    &hashed(Refresh, first + 10 + thread),
                    hour(),
                )
                .map(drop),
            });
        });
        assert!(!families(conn, ada).contains(&family_id), "{isolation:?}");
    }
}

#[test]
fn sessions_are_listed_and_ended_one_by_one() {
    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    let grace = user(conn, "grace@example.org");
    let first = begin(conn, ada, 1, 30);
    let second = begin(conn, ada, 2, 30);
    assert_eq!(families(conn, ada), [second, first]);
    rotate(conn, 1, 3);
    rotate(conn, 1, 4);
    assert_eq!(families(conn, ada), [first, second], "one row a session");

    assert!(!AuthToken::end_session(conn, grace, first).unwrap());
    assert!(AuthToken::end_session(conn, ada, first).unwrap());
    assert!(!AuthToken::end_session(conn, ada, first).unwrap());
    assert_eq!(families(conn, ada), [second]);
    for presented in [1, 3, 4] {
        assert_eq!(rotate(conn, presented, 5), Rotation::Expired);
    }

    // A replaced token signs out too.
    rotate(conn, 2, 6);
    assert!(AuthToken::revoke(conn, &hashed(Refresh, 2)).unwrap());
    assert_eq!(families(conn, ada), []);

    for number in 0..=MAX_SESSIONS {
        begin(conn, ada, 100 + number, 30);
    }
    assert_eq!(families(conn, ada).len(), MAX_SESSIONS);
    assert_eq!(rotate(conn, 100, 7), Rotation::Expired, "the oldest ended");
}

#[test]
fn revoking_is_not_using() {
    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    for number in 1..=3 {
        issue(conn, ada, Refresh, number);
    }
    rotate(conn, 3, 4);
    issue(conn, ada, EmailOtp, 5);

    assert!(AuthToken::revoke(conn, &hashed(Refresh, 1)).unwrap());
    assert!(!AuthToken::revoke(conn, &hashed(Refresh, 1)).unwrap());
    assert!(!AuthToken::revoke(conn, &hashed(Refresh, 9)).unwrap());
    // Presenting a revoked token leaves other devices signed in.
    assert_eq!(rotate(conn, 1, 9), Rotation::Expired);
    assert_eq!(live(conn, ada, Refresh).len(), 2);

    AuthToken::revoke_all(conn, ada, Some(&[Refresh])).unwrap();
    assert!(live(conn, ada, Refresh).is_empty());
    assert_eq!(live(conn, ada, EmailOtp).len(), 1);
    issue(conn, ada, Refresh, 6);
    for revoked in 1..=4 {
        assert_eq!(rotate(conn, revoked, 9), Rotation::Expired);
    }
    assert_eq!(live(conn, ada, Refresh).len(), 1);

    // Also tokens issued in this transaction.
    conn.transaction(|conn| {
        issue(conn, ada, EmailChangePending, 7);
        AuthToken::revoke_all(conn, ada, None)
    })
    .unwrap();
    for type_ in [Refresh, EmailOtp, EmailChangePending] {
        assert!(live(conn, ada, type_).is_empty());
    }
    AuthToken::revoke_all(conn, UserId::new(), None).unwrap();
}

#[test]
fn purge_deletes_what_expired_long_enough_ago() {
    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    for number in 0..40 {
        issue(conn, ada, Refresh, number);
    }
    rotate(conn, 0, 40);
    assert_eq!(AuthToken::purge(conn, TimeDelta::zero(), 100).unwrap(), 0);
    let days = TimeDelta::days(-60);
    let refused = AuthToken::purge(conn, days, 100).unwrap_err();
    assert_eq!(NegativeSpan::of(&refused), Some(NegativeSpan(days)));
    assert_eq!(live(conn, ada, Refresh).len(), 40);
    // All expired one hour ago.
    let_two_hours_pass(&database);
    issue(conn, ada, Refresh, 50);
    assert_eq!(
        AuthToken::purge(conn, TimeDelta::minutes(61), 100).unwrap(),
        0
    );

    database
        .psql("UPDATE auth_tokens SET expires_at = expires_at - interval '1 minute' WHERE is_used")
        .unwrap();
    assert_eq!(AuthToken::purge(conn, hour(), 1).unwrap(), 1);
    assert_eq!(
        rotate(conn, 0, 60),
        Rotation::NotFound,
        "the oldest went first"
    );

    // Four workers delete each row once.
    let purged = support::at_once(&database, 4, |_, conn| {
        let batches = std::iter::repeat_with(|| AuthToken::purge(conn, hour(), 7).unwrap());
        batches.take_while(|&rows| rows > 0).sum::<usize>()
    });
    assert_eq!(purged.iter().sum::<usize>(), 40);
    assert_eq!(
        AuthToken::list_by_user(conn, ada, Refresh, Page::first(100))
            .unwrap()
            .len(),
        1
    );
}

#[test]
fn purge_keeps_what_still_counts() {
    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    let minute = TimeDelta::minutes(1);
    for number in 0..usize::from(MAX_ISSUED) {
        AuthToken::issue(conn, ada, &hashed(EmailOtp, number), minute).unwrap();
    }
    let wrong = AuthToken::check_code(conn, ada, &hashed(EmailOtp, 9)).unwrap();
    assert!(matches!(wrong, CodeCheck::Wrong { .. }), "{wrong:?}");
    // All have expired.
    let_pass(&database, "50 minutes");
    assert_eq!(AuthToken::purge(conn, TimeDelta::zero(), 100).unwrap(), 0);
    try_issue(conn, ada, EmailOtp, 10).unwrap().unwrap_err();
    let_pass(&database, "10 minutes");
    assert_eq!(AuthToken::purge(conn, TimeDelta::zero(), 100).unwrap(), 5);
    try_issue(conn, ada, EmailOtp, 10).unwrap().unwrap();
}

#[cfg(feature = "crypto")]
#[test]
fn a_secret_is_known_by_its_digest() {
    use bruhmcp_db::crypto::{TokenKey, TokenPurpose, new_code, new_secret};

    let database = support::database();
    let conn = &mut database.connect();
    let ada = user(conn, "ada@example.org");
    let grace = user(conn, "grace@example.org");
    let key = TokenKey::new(&[7; 32]).unwrap();

    let secret = new_secret();
    let token = key.hash(TokenPurpose::PasswordReset, &secret);
    AuthToken::issue(conn, ada, &token, hour()).unwrap();
    let from_link = secret.expose().into();
    let token = key.hash(TokenPurpose::PasswordReset, &from_link);
    assert_eq!(AuthToken::consume(conn, &token).unwrap().user_id, ada);

    // A code that was copied into another user's row is not that user's code.
    let code = new_code();
    let of = |user_id| key.hash(TokenPurpose::EmailOtp { user_id }, &code);
    AuthToken::issue(conn, ada, &of(ada), hour()).unwrap();
    AuthToken::issue(conn, grace, &of(ada), hour()).unwrap();
    let mut check = |user| AuthToken::check_code(conn, user, &of(user)).unwrap();
    assert!(matches!(check(grace), CodeCheck::Wrong { .. }));
    assert!(matches!(check(ada), CodeCheck::Right(_)));
}
