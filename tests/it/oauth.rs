//! OAuth: authorizations, refreshes, the queue of due rows, and changes guarded by a version.

use std::collections::HashSet;

use bruhmcp_db::crypto::SecretColumn;
use bruhmcp_db::enums::{AuditStatus, InstanceStatus, OauthStatus};
use bruhmcp_db::ids::CredentialId;
use bruhmcp_db::models::{
    AuditFilter, CompletedInstance, CredentialError, McpCredential, McpInstance, McpService,
    OauthTokens, TokenAudit,
};
use bruhmcp_db::schema::{mcp_credentials, mcp_service_table};
use bruhmcp_db::{Isolation, Page, SecretText, is_transient, retry_transaction};
use chrono::Utc;
use diesel::connection::SimpleConnection;
use diesel::prelude::*;

use crate::fixtures::{
    RING, completed, in_minutes, pending, pro_user, service, text, tokens, upgrade, user,
    with_api_key,
};
use crate::instances::delete_plan;
use crate::support::{at_once, database};

fn state(name: &str) -> SecretText {
    SecretText::new(format!("state {name}"))
}

fn url(name: &str) -> SecretText {
    SecretText::new(format!("https://accounts.example/authorize?state={name}"))
}

fn find(conn: &mut PgConnection, credential: &McpCredential) -> McpCredential {
    McpCredential::find(conn, credential.credential_id)
        .unwrap()
        .unwrap()
}

fn find_instance(conn: &mut PgConnection, credential: &McpCredential) -> McpInstance {
    McpInstance::find(conn, credential.instance_id)
        .unwrap()
        .unwrap()
}

#[test]
fn an_authorization_from_first_to_last() {
    let database = database();
    let conn = &mut database.connect();
    let user_id = user(conn);
    let service_id = service(conn, "gmail", 4001);
    let new = pending(conn, user_id, service_id);
    let id = new.credential_id;
    assert_eq!(new.oauth_status, OauthStatus::Pending);

    let begun = McpCredential::begin_oauth(conn, id, &state("a"), &url("a")).unwrap();
    assert_eq!(begun.oauth_state, Some(state("a")));
    assert_eq!(begun.oauth_authorization_url, Some(url("a")));

    let taken = McpCredential::consume_state(conn, &state("a")).unwrap();
    assert_eq!(taken.credential_id, id);
    assert_eq!(taken.oauth_status, OauthStatus::Pending);
    assert_eq!(
        (&taken.oauth_state, &taken.oauth_authorization_url),
        (&None, &None)
    );

    let done = McpCredential::complete_oauth(conn, id, &tokens(id, "one")).unwrap();
    assert_eq!(done.instance, CompletedInstance::Active);
    assert_eq!(done.credential, find(conn, &new));
    assert_eq!(done.credential.oauth_status, OauthStatus::Completed);
    assert_eq!(
        done.credential.token_scope.as_deref(),
        Some("mail.read mail.send")
    );
    assert_eq!(
        text(&done.credential, SecretColumn::AccessToken),
        "access one"
    );
    assert_eq!(
        text(&done.credential, SecretColumn::RefreshToken),
        "refresh one"
    );
    let instance = find_instance(conn, &new);
    assert_eq!(instance.oauth_status, OauthStatus::Completed);
    assert_eq!(instance.status, InstanceStatus::Active);
    let first_update = instance.credentials_updated_at.unwrap();

    // A refresh without a refresh token and a scope.
    let refreshed = OauthTokens {
        refresh_token: None,
        scope: None,
        ..tokens(id, "two")
    };
    let row = McpCredential::store_refreshed(conn, &done.credential, &refreshed).unwrap();
    assert_eq!(text(&row, SecretColumn::AccessToken), "access two");
    assert_eq!(text(&row, SecretColumn::RefreshToken), "refresh one");
    assert_eq!(row.token_scope.as_deref(), Some("mail.read mail.send"));
    assert_eq!(row.token_expires_at, refreshed.expires_at);
    assert!(find_instance(conn, &new).credentials_updated_at.unwrap() > first_update);

    let row = McpCredential::refresh_refused(conn, &row).unwrap();
    assert_eq!(row.oauth_status, OauthStatus::Expired);
    assert_eq!(find_instance(conn, &new).oauth_status, OauthStatus::Expired);
    let log = TokenAudit::list(
        conn,
        AuditFilter::of_instance(new.instance_id),
        Page::first(10),
    )
    .unwrap();
    let log: Vec<_> = log
        .iter()
        .map(|row| (row.status, row.error_type.as_deref()))
        .collect();
    assert_eq!(
        log,
        [
            (AuditStatus::Failure, Some("invalid_grant")),
            (AuditStatus::Success, None)
        ]
    );

    // In a second authorization, the user refuses.
    let again = McpCredential::begin_oauth(conn, id, &state("b"), &url("b")).unwrap();
    assert_eq!(again.oauth_status, OauthStatus::Pending);
    assert_eq!(again.oauth_completed_at, None);
    let failed = McpCredential::fail_oauth(conn, id).unwrap();
    assert_eq!(failed.oauth_status, OauthStatus::Failed);
    assert!(failed.oauth_completed_at.is_some());
    assert_eq!(failed.oauth_state, None);
    assert_eq!(failed.oauth_authorization_url, None);

    // In a third, the user grants access, but there is no refresh token.
    McpCredential::begin_oauth(conn, id, &state("c"), &url("c")).unwrap();
    let other = OauthTokens {
        refresh_token: None,
        ..tokens(id, "three")
    };
    let done = McpCredential::complete_oauth(conn, id, &other).unwrap();
    assert_eq!(done.instance, CompletedInstance::Active);
    assert_eq!(done.credential.refresh_token, None);
    assert_eq!(done.credential.oauth_state, None);
}

#[test]
fn steps_out_of_order_are_refused() {
    let database = database();
    let conn = &mut database.connect();
    let user_id = pro_user(conn);
    let service_id = service(conn, "gmail", 4001);
    let one = pending(conn, user_id, service_id).credential_id;
    let other = pending(conn, user_id, service_id).credential_id;
    let api_key = with_api_key(conn, user_id, service_id, "key").credential_id;

    for id in [api_key, CredentialId::new()] {
        let begun = McpCredential::begin_oauth(conn, id, &state("x"), &url("x"));
        assert!(matches!(begun, Err(CredentialError::NotFound)), "{begun:?}");
        let completed = McpCredential::complete_oauth(conn, id, &tokens(id, "x"));
        assert!(
            matches!(completed, Err(CredentialError::NotFound)),
            "{completed:?}"
        );
        let failed = McpCredential::fail_oauth(conn, id);
        assert!(
            matches!(failed, Err(CredentialError::NotFound)),
            "{failed:?}"
        );
    }

    McpCredential::begin_oauth(conn, one, &state("a"), &url("a")).unwrap();
    // The caller's transaction survives the refusal.
    conn.transaction(|conn| {
        let taken = McpCredential::begin_oauth(conn, other, &state("a"), &url("a"));
        assert!(
            matches!(taken, Err(CredentialError::StateTaken)),
            "{taken:?}"
        );
        assert!(!format!("{taken:?}").contains("state a"), "{taken:?}");
        McpCredential::find(conn, other)
    })
    .unwrap();

    // A second authorization replaces the state of the first.
    McpCredential::begin_oauth(conn, one, &state("b"), &url("b")).unwrap();
    let replaced = McpCredential::consume_state(conn, &state("a"));
    assert!(
        matches!(replaced, Err(CredentialError::UnknownState)),
        "{replaced:?}"
    );
    McpCredential::consume_state(conn, &state("b")).unwrap();
    let used = McpCredential::consume_state(conn, &state("b"));
    assert!(
        matches!(used, Err(CredentialError::UnknownState)),
        "{used:?}"
    );

    McpCredential::complete_oauth(conn, one, &tokens(one, "x")).unwrap();
    let current = McpCredential::find(conn, one).unwrap().unwrap();
    let twice = McpCredential::complete_oauth(conn, one, &tokens(one, "y")).map(drop);
    let late = McpCredential::fail_oauth(conn, one).map(drop);
    for refused in [twice, late] {
        let Err(CredentialError::Conflict(row)) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(*row, current);
    }
}

#[test]
fn a_state_is_consumed_once() {
    let database = database();
    let conn = &mut database.connect();
    let user_id = user(conn);
    let service_id = service(conn, "gmail", 4001);
    let id = pending(conn, user_id, service_id).credential_id;
    McpCredential::begin_oauth(conn, id, &state("a"), &url("a")).unwrap();

    let taken = at_once(&database, 32, |_, conn| match McpCredential::consume_state(
        conn,
        &state("a"),
    ) {
        Ok(row) => Some(row.credential_id),
        Err(CredentialError::UnknownState) => None,
        Err(error) => panic!("{error:?}"),
    });
    let taken: Vec<_> = taken.into_iter().flatten().collect();
    assert_eq!(taken, [id]);
}

#[test]
fn completing_never_loses_the_tokens() {
    let database = database();
    let conn = &mut database.connect();
    let service_id = service(conn, "gmail", 4001);
    let complete = |conn: &mut PgConnection, credential: &McpCredential| {
        let id = credential.credential_id;
        let done = McpCredential::complete_oauth(conn, id, &tokens(id, "kept")).unwrap();
        assert_eq!(done.credential.oauth_status, OauthStatus::Completed);
        let stored = find(conn, credential);
        assert_eq!(text(&stored, SecretColumn::RefreshToken), "refresh kept");
        let instance = find_instance(conn, credential);
        assert_eq!(instance.oauth_status, OauthStatus::Completed);
        assert!(instance.credentials_updated_at.is_some());
        (done.instance, instance.status)
    };

    let asha = user(conn);
    let inactive = pending(conn, asha, service_id);
    McpInstance::deactivate(conn, inactive.instance_id, asha).unwrap();
    assert_eq!(
        complete(conn, &inactive),
        (CompletedInstance::NotActive, InstanceStatus::Inactive)
    );

    let past_its_end = |conn: &mut PgConnection| {
        let credential = pending(conn, asha, service_id);
        diesel::update(mcp_service_table::table.find(credential.instance_id))
            .set(mcp_service_table::expires_at.eq(in_minutes(-1)))
            .execute(conn)
            .unwrap();
        credential
    };
    let expired = past_its_end(conn);
    assert_eq!(McpInstance::expire_due(conn, 10).unwrap().len(), 1);
    assert_eq!(
        complete(conn, &expired),
        (CompletedInstance::NotActive, InstanceStatus::Expired)
    );
    // The monitor hasn't marked this one yet.
    let due = past_its_end(conn);
    assert_eq!(
        complete(conn, &due),
        (CompletedInstance::NotActive, InstanceStatus::Expired)
    );

    let first = pending(conn, asha, service_id);
    assert_eq!(
        complete(conn, &first),
        (CompletedInstance::Active, InstanceStatus::Active)
    );
    let second = pending(conn, asha, service_id);
    assert_eq!(
        complete(conn, &second),
        (CompletedInstance::LimitReached, InstanceStatus::Inactive)
    );

    let ravi = user(conn);
    let third = pending(conn, ravi, service_id);
    upgrade(conn, ravi, Some(in_minutes(-1)));
    assert_eq!(
        complete(conn, &third),
        (CompletedInstance::PlanExpired, InstanceStatus::Inactive)
    );

    let mina = user(conn);
    let fourth = pending(conn, mina, service_id);
    delete_plan(&database, mina);
    assert_eq!(
        complete(conn, &fourth),
        (CompletedInstance::PlanMissing, InstanceStatus::Inactive)
    );
}

fn one_of_32_completions_is_active(isolation: Isolation) {
    let database = database();
    let conn = &mut database.connect();
    let user_id = user(conn);
    let service_id = service(conn, "gmail", 4001);
    let rows: Vec<_> = (0..32)
        .map(|_| pending(conn, user_id, service_id))
        .collect();

    let outcomes = at_once(&database, rows.len(), |number, conn| {
        let id = rows[number].credential_id;
        let tokens = tokens(id, &number.to_string());
        let complete = |conn: &mut PgConnection| McpCredential::complete_oauth(conn, id, &tokens);
        // At SERIALIZABLE so many rivals may use up all attempts.
        loop {
            match retry_transaction(conn, isolation, complete) {
                Ok(done) => return done.instance,
                Err(error) => assert!(is_transient(&error), "{error:?}"),
            }
        }
    });
    let count = |wanted| {
        outcomes
            .iter()
            .filter(|outcome| **outcome == wanted)
            .count()
    };
    assert_eq!(count(CompletedInstance::Active), 1, "{outcomes:?}");
    assert_eq!(count(CompletedInstance::LimitReached), 31, "{outcomes:?}");

    for (number, row) in rows.iter().enumerate() {
        let stored = find(conn, row);
        assert_eq!(stored.oauth_status, OauthStatus::Completed);
        assert_eq!(
            text(&stored, SecretColumn::RefreshToken),
            format!("refresh {number}")
        );
        let status = find_instance(conn, row).status;
        let expected = match outcomes[number] {
            CompletedInstance::Active => InstanceStatus::Active,
            _ => InstanceStatus::Inactive,
        };
        assert_eq!(status, expected);
    }
    let service = McpService::find(conn, service_id).unwrap().unwrap();
    assert_eq!(service.active_instances_count, 1);
}

#[test]
fn one_of_32_completions_is_active_at_read_committed() {
    one_of_32_completions_is_active(Isolation::ReadCommitted);
}

#[test]
fn one_of_32_completions_is_active_at_repeatable_read() {
    one_of_32_completions_is_active(Isolation::RepeatableRead);
}

#[test]
fn one_of_32_completions_is_active_at_serializable() {
    one_of_32_completions_is_active(Isolation::Serializable);
}

#[test]
fn changes_are_guarded_by_the_version() {
    let database = database();
    let conn = &mut database.connect();
    let user_id = pro_user(conn);
    let service_id = service(conn, "gmail", 4001);
    let oauth = completed(conn, user_id, service_id, in_minutes(60));
    let api_key = with_api_key(conn, user_id, service_id, "old");
    let (oauth_id, key_id) = (oauth.credential_id, api_key.credential_id);
    let seal = |text: &str, id, column| RING.seal(&SecretText::from(text), id, column).unwrap();
    let new_key = seal("new", key_id, SecretColumn::ApiKey);
    let new_secret = seal("new", oauth_id, SecretColumn::ClientSecret);

    let key = McpCredential::replace_api_key(conn, key_id, api_key.version, &new_key).unwrap();
    assert_eq!(text(&key, SecretColumn::ApiKey), "new");
    assert!(find_instance(conn, &key).credentials_updated_at.is_some());
    let secret =
        McpCredential::replace_client_secret(conn, oauth_id, oauth.version, &new_secret).unwrap();
    assert_eq!(text(&secret, SecretColumn::ClientSecret), "new");
    assert_eq!(secret.oauth_status, OauthStatus::Completed);

    // These versions are old.
    let tokens = tokens(oauth_id, "late");
    let conflicts = [
        McpCredential::replace_api_key(conn, key_id, api_key.version, &new_key),
        McpCredential::replace_client_secret(conn, oauth_id, oauth.version, &new_secret),
        McpCredential::store_refreshed(conn, &oauth, &tokens),
        McpCredential::refresh_refused(conn, &oauth),
    ];
    for (conflict, current) in conflicts.iter().zip([&key, &secret, &secret, &secret]) {
        let Err(CredentialError::Conflict(row)) = conflict else {
            panic!("{conflict:?}");
        };
        assert_eq!(**row, *current);
    }
    assert_eq!(find(conn, &key), key);
    assert_eq!(find(conn, &secret), secret);

    // These are of the other kind or don't exist.
    let unknown = McpCredential {
        credential_id: CredentialId::new(),
        ..oauth.clone()
    };
    let misfits = [
        McpCredential::replace_api_key(conn, oauth_id, secret.version, &new_key),
        McpCredential::replace_client_secret(conn, key_id, key.version, &new_secret),
        McpCredential::store_refreshed(conn, &key, &tokens),
        McpCredential::refresh_refused(conn, &key),
        McpCredential::replace_api_key(conn, unknown.credential_id, 1, &new_key),
        McpCredential::store_refreshed(conn, &unknown, &tokens),
    ];
    for misfit in misfits {
        assert!(
            matches!(misfit, Err(CredentialError::NotFound)),
            "{misfit:?}"
        );
    }
    // None of them was refreshed.
    let log = TokenAudit::list(
        conn,
        AuditFilter::of_instance(oauth.instance_id),
        Page::first(10),
    )
    .unwrap();
    assert_eq!(log, []);
}

/// Each update increments a sealed number, so a lost one would show in the sum.
#[test]
fn of_10_000_guarded_updates_none_is_lost() {
    const ROWS: usize = 4;
    const THREADS: usize = 8;
    const EACH: usize = 10_000 / THREADS;

    let database = database();
    let conn = &mut database.connect();
    let user_id = pro_user(conn);
    let service_id = service(conn, "gmail", 4001);
    let rows: Vec<_> = (0..ROWS)
        .map(|_| with_api_key(conn, user_id, service_id, "0"))
        .collect();

    at_once(&database, THREADS, |number, conn| {
        let mut row = rows[number % ROWS].clone();
        let id = row.credential_id;
        let mut done = 0;
        while done < EACH {
            let count: usize = text(&row, SecretColumn::ApiKey).parse().unwrap();
            let next = SecretText::from((count + 1).to_string());
            let next = RING.seal(&next, id, SecretColumn::ApiKey).unwrap();
            row = match McpCredential::replace_api_key(conn, id, row.version, &next) {
                Ok(row) => {
                    done += 1;
                    row
                }
                Err(CredentialError::Conflict(current)) => *current,
                Err(error) => panic!("{error:?}"),
            };
        }
    });

    for row in &rows {
        let row = find(conn, row);
        assert_eq!(
            text(&row, SecretColumn::ApiKey),
            (10_000 / ROWS).to_string()
        );
        assert_eq!(row.version, 1 + i32::try_from(10_000 / ROWS).unwrap());
    }
}

#[test]
fn a_refresh_that_failed_for_now_waits() {
    let database = database();
    let conn = &mut database.connect();
    let user_id = pro_user(conn);
    let service_id = service(conn, "gmail", 4001);
    let first = completed(conn, user_id, service_id, in_minutes(1));
    let second = completed(conn, user_id, service_id, in_minutes(2));
    completed(conn, user_id, service_id, in_minutes(60));
    let due = |conn: &mut PgConnection, not_failed_since| {
        let rows = McpCredential::claim_due(conn, in_minutes(10), not_failed_since, 10).unwrap();
        let ids: Vec<_> = rows.iter().map(|row| row.credential_id).collect();
        ids
    };
    let (past, future) = (in_minutes(-5), in_minutes(5));
    assert_eq!(due(conn, past), [first.credential_id, second.credential_id]);

    let audit = McpCredential::refresh_failed(conn, &first, "network", Some("timed out")).unwrap();
    assert_eq!(audit.status, AuditStatus::Failure);
    assert_eq!(audit.operation, "token_refresh");
    assert_eq!(audit.error_type.as_deref(), Some("network"));
    assert_eq!(audit.error_message.as_deref(), Some("timed out"));
    // The row is unchanged and due again later.
    assert_eq!(find(conn, &first), first);
    assert_eq!(due(conn, past), [second.credential_id]);
    assert_eq!(
        due(conn, future),
        [first.credential_id, second.credential_id]
    );

    // Refreshed and refused rows are not due.
    let id = first.credential_id;
    McpCredential::store_refreshed(conn, &first, &tokens(id, "new")).unwrap();
    McpCredential::refresh_refused(conn, &second).unwrap();
    assert_eq!(due(conn, future), []);
}

#[test]
fn eight_workers_refresh_each_row_once() {
    const ROWS: usize = 200;
    let database = database();
    let conn = &mut database.connect();
    let user_id = pro_user(conn);
    let service_id = service(conn, "gmail", 4001);
    for number in 0..ROWS {
        let minutes = i64::try_from(number % 10).unwrap();
        completed(conn, user_id, service_id, in_minutes(minutes - 5));
    }

    let refreshed = at_once(&database, 8, |_, conn| {
        let mut refreshed = Vec::new();
        loop {
            let batch = conn
                .transaction(|conn| {
                    let due = in_minutes(10);
                    let taken = McpCredential::claim_due(conn, due, in_minutes(-1), 3)?;
                    for row in &taken {
                        let id = row.credential_id;
                        assert_eq!(text(row, SecretColumn::RefreshToken), "refresh first");
                        McpCredential::store_refreshed(conn, row, &tokens(id, "second"))?;
                    }
                    Ok::<_, CredentialError>(taken)
                })
                .unwrap();
            if batch.is_empty() {
                return refreshed;
            }
            refreshed.extend(batch.into_iter().map(|row| row.credential_id));
        }
    });
    let refreshed: Vec<_> = refreshed.into_iter().flatten().collect();
    assert_eq!(refreshed.len(), ROWS);
    let distinct: HashSet<_> = refreshed.iter().collect();
    assert_eq!(distinct.len(), ROWS);
    let left = McpCredential::claim_due(conn, in_minutes(10), Utc::now(), 1).unwrap();
    assert_eq!(left, []);
}

/// A transaction that has locked a user may change the user's instances and credentials in any
/// order.
#[test]
fn a_locked_user_is_skipped_by_the_queue_and_waited_for_by_others() {
    let database = database();
    let conn = &mut database.connect();
    let (one, other) = (pro_user(conn), pro_user(conn));
    let service_id = service(conn, "gmail", 4001);
    let mine = completed(conn, one, service_id, in_minutes(1));
    let theirs = completed(conn, other, service_id, in_minutes(2));
    let claim = |conn: &mut PgConnection| {
        let claimed = McpCredential::claim_due(conn, in_minutes(10), in_minutes(-1), 10).unwrap();
        claimed
            .into_iter()
            .map(|row| row.credential_id)
            .collect::<Vec<_>>()
    };
    let lock = |conn: &mut PgConnection| {
        conn.batch_execute(&format!("SELECT FROM users WHERE id = '{one}' FOR UPDATE"))
    };

    let begun = std::thread::scope(|scope| {
        let waiting = conn
            .transaction(|conn| {
                lock(conn)?;
                McpInstance::deactivate(conn, mine.instance_id, one)?;
                assert_eq!(claim(&mut database.connect()), [theirs.credential_id]);

                let begin = || {
                    let conn = &mut database.connect();
                    McpCredential::begin_oauth(conn, mine.credential_id, &state("a"), &url("a"))
                };
                let waiting = scope.spawn(begin);
                let waits = "SELECT count(*) FROM pg_stat_activity
                              WHERE datname = current_database() AND wait_event_type = 'Lock'";
                while database.psql(waits).unwrap() == "0\n" {
                    std::thread::yield_now();
                }
                // The other thread waits for the user and has not locked the credentials.
                let secret = mine.client_secret.clone().unwrap();
                let (id, version) = (mine.credential_id, mine.version);
                McpCredential::replace_client_secret(conn, id, version, &secret)?;
                Ok::<_, CredentialError>(waiting)
            })
            .unwrap();
        waiting.join().unwrap().unwrap()
    });
    assert_eq!(begun.oauth_status, OauthStatus::Pending);

    // A claim blocks `lock`, but neither calls nor changes of the user's columns.
    McpCredential::complete_oauth(
        conn,
        mine.credential_id,
        &tokens(mine.credential_id, "first"),
    )
    .unwrap();
    let soon = Some(in_minutes(1));
    diesel::update(mcp_credentials::table.find(mine.credential_id))
        .set(mcp_credentials::token_expires_at.eq(soon))
        .execute(conn)
        .unwrap();
    McpInstance::activate(conn, mine.instance_id, one).unwrap();
    conn.transaction(|conn| {
        assert_eq!(claim(conn), [mine.credential_id, theirs.credential_id]);
        let other = &mut database.connect();
        other.batch_execute("SET lock_timeout = '50ms'")?;
        McpInstance::record_call(other, mine.instance_id, None)?.unwrap();
        other.batch_execute("UPDATE users SET last_login_at = now()")?;
        assert!(lock(other).is_err());
        QueryResult::Ok(())
    })
    .unwrap();
    lock(conn).unwrap();
}

/// The plan of the operation's statement isn't accessible; the number of index scans is.
#[test]
fn the_refresh_queue_reads_its_index() {
    let database = database();
    database
        .psql(
            "INSERT INTO users (first_name, last_name, email)
             VALUES ('Asha', '', 'asha@example.in');
             UPDATE user_plans SET plan_type = 'pro', max_instances = NULL;
             INSERT INTO mcp_table (mcp_service_name, display_name, port, type)
             VALUES ('gmail', 'Gmail', 49296, 'oauth');
             INSERT INTO mcp_service_table (user_id, mcp_service_id)
             SELECT id, mcp_service_id FROM users, mcp_table, generate_series(1, 3000);
             INSERT INTO mcp_credentials
                 (instance_id, client_id, client_secret, access_token, refresh_token,
                  token_expires_at, oauth_status, oauth_completed_at)
             SELECT instance_id, 'client', secret, secret, secret,
                    now() + n * interval '1 minute', 'completed', now()
               FROM (SELECT instance_id, row_number() OVER () AS n,
                            decode(repeat('00', 40), 'hex') AS secret
                       FROM mcp_service_table) AS instances;
             ANALYZE",
        )
        .unwrap();
    let scans = |conn: &mut PgConnection| {
        diesel::sql_query("SELECT pg_stat_force_next_flush()")
            .execute(conn)
            .unwrap();
        database
            .psql(
                "SELECT idx_scan FROM pg_stat_user_indexes \
                  WHERE indexrelname = 'mcp_credentials_token_expires_at_idx'",
            )
            .unwrap()
    };

    let conn = &mut database.connect();
    // The worst case of a prepared statement.
    diesel::sql_query("SET plan_cache_mode = force_generic_plan")
        .execute(conn)
        .unwrap();
    assert_eq!(scans(conn), "0\n");
    let rows = McpCredential::claim_due(conn, in_minutes(10), in_minutes(-1), 5).unwrap();
    assert_eq!(rows.len(), 5);
    assert!(rows.is_sorted_by_key(|row| row.token_expires_at));
    assert_eq!(scans(conn), "1\n");
}
