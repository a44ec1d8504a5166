//! OAuth: authorizations, refreshes, the queue of due rows, and changes guarded by a version.

use std::collections::HashSet;
use std::sync::LazyLock;

use bruhmcp_db::crypto::{SecretColumn, TokenKey};
use bruhmcp_db::enums::{AuditStatus, InstanceStatus, OauthStatus};
use bruhmcp_db::ids::{CredentialId, InstanceId};
use bruhmcp_db::models::{
    AuditFilter, CompletedInstance, CredentialError, InstanceError, McpCredential, McpInstance,
    McpService, NewMcpCredential, NewMcpInstance, OauthTokens, RefreshLease, TokenAudit,
};
use bruhmcp_db::schema::mcp_service_table;
use bruhmcp_db::{Isolation, Page, SecretText, StateDigest, is_transient, retry_transaction};
use chrono::{TimeDelta, TimeZone, Utc};
use diesel::connection::SimpleConnection;
use diesel::prelude::*;

use crate::fixtures::{
    RING, completed, in_minutes, pending, pro_user, sealed, service, text, tokens, upgrade, user,
    with_api_key,
};
use crate::instances::delete_plan;
use crate::support::{at_once, database};

fn state(name: &str) -> StateDigest {
    static KEY: LazyLock<TokenKey> = LazyLock::new(|| TokenKey::new(&[1; 32]).unwrap());
    KEY.hash_state(&name.into())
}

/// Begins an authorization with the state `name`, a verifier and a URL.
fn begin(
    conn: &mut PgConnection,
    id: CredentialId,
    name: &str,
) -> Result<McpCredential, CredentialError> {
    let lifetime = McpCredential::STATE_LIFETIME;
    McpCredential::begin_oauth(conn, id, &state(name), lifetime, &sealed(), Some(&sealed()))
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

    let begun = begin(conn, id, "a").unwrap();
    assert_eq!(begun.oauth_state, Some(state("a")));
    assert_eq!(begun.oauth_authorization_url, Some(sealed()));

    let taken = McpCredential::consume_state(conn, user_id, &state("a")).unwrap();
    assert_eq!(taken.credential_id, id);
    assert_eq!(taken.oauth_status, OauthStatus::Pending);
    assert_eq!(taken.oauth_state, None);
    assert_eq!(taken.oauth_state_expires_at, None);
    assert_eq!(taken.oauth_authorization_url, None);
    assert_eq!(taken.oauth_code_verifier, Some(sealed()));

    let done = McpCredential::complete_oauth(conn, id, &tokens(new.instance_id, "one")).unwrap();
    assert_eq!(done.instance, CompletedInstance::Active);
    assert_eq!(done.credential, find(conn, &new));
    assert_eq!(done.credential.oauth_status, OauthStatus::Completed);
    assert_eq!(done.credential.oauth_code_verifier, None);
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
        ..tokens(new.instance_id, "two")
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
    let again = begin(conn, id, "b").unwrap();
    assert_eq!(again.oauth_status, OauthStatus::Pending);
    assert_eq!(again.oauth_completed_at, None);
    let failed = McpCredential::fail_oauth(conn, id).unwrap();
    assert_eq!(failed.oauth_status, OauthStatus::Failed);
    assert!(failed.oauth_completed_at.is_some());
    assert_eq!(failed.oauth_state, None);
    assert_eq!(failed.oauth_authorization_url, None);

    // In a third, the user grants access, but there is no refresh token.
    begin(conn, id, "c").unwrap();
    let other = OauthTokens {
        refresh_token: None,
        ..tokens(new.instance_id, "three")
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
        let begun = begin(conn, id, "x");
        assert!(matches!(begun, Err(CredentialError::NotFound)), "{begun:?}");
        let completed = McpCredential::complete_oauth(conn, id, &tokens(InstanceId::new(), "x"));
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

    begin(conn, one, "a").unwrap();
    // The caller's transaction survives the refusal.
    conn.transaction(|conn| {
        let taken = begin(conn, other, "a");
        assert!(
            matches!(taken, Err(CredentialError::StateTaken)),
            "{taken:?}"
        );
        McpCredential::find(conn, other)
    })
    .unwrap();

    // A second authorization replaces the state of the first.
    begin(conn, one, "b").unwrap();
    let replaced = McpCredential::consume_state(conn, user_id, &state("a"));
    assert!(
        matches!(replaced, Err(CredentialError::UnknownState)),
        "{replaced:?}"
    );
    McpCredential::consume_state(conn, user_id, &state("b")).unwrap();
    let used = McpCredential::consume_state(conn, user_id, &state("b"));
    assert!(
        matches!(used, Err(CredentialError::UnknownState)),
        "{used:?}"
    );

    McpCredential::complete_oauth(conn, one, &tokens(InstanceId::new(), "x")).unwrap();
    let current = McpCredential::find(conn, one).unwrap().unwrap();
    let twice = McpCredential::complete_oauth(conn, one, &tokens(InstanceId::new(), "y")).map(drop);
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
    begin(conn, id, "a").unwrap();

    let taken = at_once(&database, 32, |_, conn| match McpCredential::consume_state(
        conn,
        user_id,
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
fn a_state_is_consumed_in_time_by_the_user_who_began() {
    let database = database();
    let conn = &mut database.connect();
    let (asha, ravi) = (user(conn), user(conn));
    let service_id = service(conn, "gmail", 4001);
    let id = pending(conn, asha, service_id).credential_id;
    pending(conn, ravi, service_id);
    let consume =
        |conn: &mut PgConnection, user_id| McpCredential::consume_state(conn, user_id, &state("a"));

    for lifetime in [-1, 0, 3601].map(TimeDelta::seconds) {
        let begun = McpCredential::begin_oauth(conn, id, &state("a"), lifetime, &sealed(), None);
        assert!(
            matches!(begun, Err(CredentialError::Invalid(_))),
            "{begun:?}"
        );
    }
    let begun = begin(conn, id, "a").unwrap();
    let left = begun.oauth_state_expires_at.unwrap() - begun.last_modified;
    assert_eq!(left, McpCredential::STATE_LIFETIME);

    let of_another = consume(conn, ravi);
    assert!(matches!(of_another, Err(CredentialError::UnknownState)));
    let expire = |at: &str| {
        database
            .psql(&format!("UPDATE mcp_credentials SET oauth_state_expires_at = {at} WHERE oauth_state IS NOT NULL"))
            .unwrap()
    };
    expire("now()");
    let late = consume(conn, asha);
    assert!(matches!(late, Err(CredentialError::UnknownState)));
    expire("now() + interval '1 minute'");
    assert_eq!(consume(conn, asha).unwrap().credential_id, id);
}

#[test]
fn what_the_database_would_refuse_is_refused_before() {
    let database = database();
    let conn = &mut database.connect();
    let user_id = user(conn);
    let service_id = service(conn, "gmail", 4001);
    let row = pending(conn, user_id, service_id);
    let id = row.credential_id;
    let scopes = ["mail\0".to_owned(), "x".repeat(16385)];
    let ends = [10000, 1969].map(|year| Utc.with_ymd_and_hms(year, 6, 1, 0, 0, 0).unwrap());
    let wrong = scopes
        .iter()
        .map(|scope| OauthTokens {
            scope: Some(scope),
            ..tokens(row.instance_id, "x")
        })
        .chain(ends.map(|end| OauthTokens {
            expires_at: Some(end),
            ..tokens(row.instance_id, "x")
        }));
    for wrong in wrong {
        let completed = McpCredential::complete_oauth(conn, id, &wrong);
        assert!(
            matches!(completed, Err(CredentialError::Invalid(_))),
            "{completed:?}"
        );
        let stored = McpCredential::store_refreshed(conn, &row, &wrong);
        assert!(
            matches!(stored, Err(CredentialError::Invalid(_))),
            "{stored:?}"
        );
    }
    for client_id in ["", "a\0", &"x".repeat(2049)] {
        let replaced = McpCredential::replace_client(conn, id, row.version, client_id, &sealed());
        assert!(
            matches!(replaced, Err(CredentialError::Invalid(_))),
            "{replaced:?}"
        );
    }
    assert_eq!(find(conn, &row), row);

    let new = NewMcpInstance::new(user_id, service_id);
    let credential = NewMcpCredential::sealed_oauth(new.instance_id, "a\0", sealed());
    let created = McpInstance::create(conn, &new, &credential);
    assert!(
        matches!(created, Err(InstanceError::InvalidClientId)),
        "{created:?}"
    );
}

#[test]
fn completing_never_loses_the_tokens() {
    let database = database();
    let conn = &mut database.connect();
    let service_id = service(conn, "gmail", 4001);
    let complete = |conn: &mut PgConnection, credential: &McpCredential| {
        let id = credential.credential_id;
        let done = McpCredential::complete_oauth(conn, id, &tokens(credential.instance_id, "kept"))
            .unwrap();
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
        let tokens = tokens(rows[number].instance_id, &number.to_string());
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
    let new_key = seal("new", api_key.instance_id, SecretColumn::ApiKey);
    let new_secret = seal("new", oauth.instance_id, SecretColumn::ClientSecret);

    let key = McpCredential::replace_api_key(conn, key_id, api_key.version, &new_key).unwrap();
    assert_eq!(text(&key, SecretColumn::ApiKey), "new");
    assert!(find_instance(conn, &key).credentials_updated_at.is_some());
    let secret =
        McpCredential::replace_client(conn, oauth_id, oauth.version, "other", &new_secret).unwrap();
    assert_eq!(secret.client_id.as_deref(), Some("other"));
    assert_eq!(text(&secret, SecretColumn::ClientSecret), "new");
    assert_eq!(secret.oauth_status, OauthStatus::Completed);

    // These versions are old.
    let tokens = tokens(oauth.instance_id, "late");
    let conflicts = [
        McpCredential::replace_api_key(conn, key_id, api_key.version, &new_key),
        McpCredential::replace_client(conn, oauth_id, oauth.version, "other", &new_secret),
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
        McpCredential::replace_client(conn, key_id, key.version, "other", &new_secret),
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
            let next = RING
                .seal(&next, row.instance_id, SecretColumn::ApiKey)
                .unwrap();
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

fn due(conn: &mut PgConnection) -> Vec<McpCredential> {
    McpCredential::claim_due(conn, in_minutes(10), TimeDelta::minutes(1), 10).unwrap()
}

fn ids(rows: &[McpCredential]) -> Vec<CredentialId> {
    rows.iter().map(|row| row.credential_id).collect()
}

/// Ends all leases and pauses.
fn end_leases(conn: &mut PgConnection) {
    conn.batch_execute(
        "UPDATE mcp_credentials SET refresh_leased_until = now() - interval '1 second'
          WHERE refresh_leased_until IS NOT NULL",
    )
    .unwrap();
}

#[test]
fn a_lease_keeps_others_away_until_it_ends() {
    let database = database();
    let conn = &mut database.connect();
    let user_id = pro_user(conn);
    let service_id = service(conn, "gmail", 4001);
    let first = completed(conn, user_id, service_id, in_minutes(1));
    let second = completed(conn, user_id, service_id, in_minutes(2));
    completed(conn, user_id, service_id, in_minutes(60));

    let leased = due(conn);
    assert_eq!(ids(&leased), ids(&[first.clone(), second.clone()]));
    assert_eq!(due(conn), []);
    // A lease is no edit.
    let unleased = McpCredential {
        refresh_leased_until: None,
        ..leased[0].clone()
    };
    assert_eq!(unleased, first);

    // A worker that died costs one lease. Rows without a lease come first.
    end_leases(conn);
    let third = completed(conn, user_id, service_id, in_minutes(3));
    let one = McpCredential::claim_due(conn, in_minutes(10), TimeDelta::minutes(1), 1).unwrap();
    assert_eq!(ids(&one), [third.credential_id]);
    let again = due(conn);
    assert_eq!(ids(&again), ids(&[first.clone(), second.clone()]));

    // A refresh that failed waits for its pause.
    let pause = TimeDelta::minutes(5);
    let audit = McpCredential::refresh_failed(conn, &again[0], "network", Some("timed out"), pause)
        .unwrap();
    assert_eq!(audit.status, AuditStatus::Failure);
    assert_eq!(audit.operation, "token_refresh");
    assert_eq!(audit.error_type.as_deref(), Some("network"));
    assert_eq!(audit.error_message.as_deref(), Some("timed out"));
    let paused = find(conn, &first);
    let end = paused.refresh_leased_until.unwrap();
    assert!(end > in_minutes(4), "{end}");
    assert_eq!(paused.version, first.version);
    // The one who failed later has no lease to replace.
    McpCredential::refresh_failed(conn, &again[0], "network", None, TimeDelta::zero()).unwrap();
    assert_eq!(find(conn, &first), paused);

    // Stored and refused tokens end the lease.
    let tokens = tokens(first.instance_id, "new");
    let stored = McpCredential::store_refreshed(conn, &again[0], &tokens).unwrap();
    assert_eq!(stored.refresh_leased_until, None);
    let refused = McpCredential::refresh_refused(conn, &again[1]).unwrap();
    assert_eq!(refused.refresh_leased_until, None);
    end_leases(conn);
    assert_eq!(ids(&due(conn)), [third.credential_id]);

    // Nor is a new authorization held back by an old lease.
    let id = third.credential_id;
    begin(conn, id, "a").unwrap();
    let done = McpCredential::complete_oauth(conn, id, &tokens).unwrap();
    assert_eq!(done.credential.refresh_leased_until, None);
}

#[test]
fn one_row_is_leased_fresh_awaited_or_not_refreshable() {
    let database = database();
    let conn = &mut database.connect();
    let user_id = pro_user(conn);
    let service_id = service(conn, "gmail", 4001);
    let row = completed(conn, user_id, service_id, in_minutes(-1));
    let lease = |conn: &mut PgConnection, id| {
        McpCredential::lease_refresh(conn, id, Utc::now(), TimeDelta::minutes(1))
    };
    let id = row.credential_id;

    let Ok(RefreshLease::Leased(leased)) = lease(conn, id) else {
        panic!("not leased");
    };
    let until = leased.refresh_leased_until.unwrap();
    assert_eq!(lease(conn, id).unwrap(), RefreshLease::Wait { until });
    assert_eq!(due(conn), []);
    end_leases(conn);
    assert!(matches!(lease(conn, id).unwrap(), RefreshLease::Leased(_)));

    let stored =
        McpCredential::store_refreshed(conn, &row, &tokens(row.instance_id, "new")).unwrap();
    assert_eq!(lease(conn, id).unwrap(), RefreshLease::Fresh(stored));
    // The service refused the token all the same.
    let later = McpCredential::lease_refresh(conn, id, in_minutes(90), TimeDelta::minutes(1));
    let Ok(RefreshLease::Leased(leased)) = later else {
        panic!("{later:?}");
    };
    let refused = McpCredential::refresh_refused(conn, &leased).unwrap();
    assert_eq!(
        lease(conn, id).unwrap(),
        RefreshLease::Unrefreshable(refused)
    );

    let pending = pending(conn, user_id, service_id);
    let id = pending.credential_id;
    assert_eq!(
        lease(conn, id).unwrap(),
        RefreshLease::Unrefreshable(pending)
    );
    let without = OauthTokens {
        refresh_token: None,
        expires_at: Some(in_minutes(-1)),
        ..tokens(InstanceId::new(), "x")
    };
    let done = McpCredential::complete_oauth(conn, id, &without)
        .unwrap()
        .credential;
    assert_eq!(lease(conn, id).unwrap(), RefreshLease::Unrefreshable(done));

    let api_key = with_api_key(conn, user_id, service_id, "key").credential_id;
    for id in [api_key, CredentialId::new()] {
        let none = lease(conn, id);
        assert!(matches!(none, Err(CredentialError::NotFound)), "{none:?}");
    }
}

/// All find the token expired; one asks the provider, the others take its result.
fn of_32_callers_one_refreshes(isolation: Isolation) {
    let database = database();
    let conn = &mut database.connect();
    let user_id = user(conn);
    let service_id = service(conn, "gmail", 4001);
    let row = completed(conn, user_id, service_id, in_minutes(-1));
    let id = row.credential_id;

    let outcomes = at_once(&database, 32, |_, conn| {
        let mut refreshed = false;
        loop {
            let lease = |conn: &mut PgConnection| {
                McpCredential::lease_refresh(conn, id, Utc::now(), TimeDelta::minutes(1))
            };
            match retry_transaction(conn, isolation, lease) {
                Ok(RefreshLease::Leased(old)) => {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    let tokens = tokens(row.instance_id, "new");
                    let store = |conn: &mut PgConnection| {
                        McpCredential::store_refreshed(conn, &old, &tokens)
                    };
                    retry_transaction(conn, isolation, store).unwrap();
                    refreshed = true;
                }
                Ok(RefreshLease::Fresh(row)) => {
                    assert_eq!(text(&row, SecretColumn::AccessToken), "access new");
                    return refreshed;
                }
                Ok(RefreshLease::Wait { until }) => {
                    assert!(until > Utc::now());
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
                Ok(lost) => panic!("{lost:?}"),
                // At SERIALIZABLE so many rivals may use up all attempts.
                Err(error) => assert!(is_transient(&error), "{error:?}"),
            }
        }
    });
    assert_eq!(outcomes.iter().filter(|refreshed| **refreshed).count(), 1);
    let log = TokenAudit::list(
        conn,
        AuditFilter::of_instance(row.instance_id),
        Page::first(10),
    )
    .unwrap();
    assert_eq!(log.len(), 1);
}

#[test]
fn of_32_callers_one_refreshes_at_read_committed() {
    of_32_callers_one_refreshes(Isolation::ReadCommitted);
}

#[test]
fn of_32_callers_one_refreshes_at_repeatable_read() {
    of_32_callers_one_refreshes(Isolation::RepeatableRead);
}

#[test]
fn of_32_callers_one_refreshes_at_serializable() {
    of_32_callers_one_refreshes(Isolation::Serializable);
}

fn eight_workers_refresh_each_row_once(isolation: Isolation) {
    const ROWS: usize = 100;
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
            let claim = |conn: &mut PgConnection| {
                McpCredential::claim_due(conn, in_minutes(10), TimeDelta::minutes(1), 3)
            };
            let leased = match retry_transaction(conn, isolation, claim) {
                Ok(leased) => leased,
                Err(error) => {
                    assert!(is_transient(&error), "{error:?}");
                    continue;
                }
            };
            if leased.is_empty() {
                return refreshed;
            }
            for row in leased {
                assert_eq!(text(&row, SecretColumn::RefreshToken), "refresh first");
                let tokens = tokens(row.instance_id, "second");
                McpCredential::store_refreshed(conn, &row, &tokens).unwrap();
                refreshed.push(row.credential_id);
            }
        }
    });
    let refreshed: Vec<_> = refreshed.into_iter().flatten().collect();
    assert_eq!(refreshed.len(), ROWS);
    let distinct: HashSet<_> = refreshed.iter().collect();
    assert_eq!(distinct.len(), ROWS);
    assert_eq!(due(conn), []);
}

#[test]
fn eight_workers_refresh_each_row_once_at_read_committed() {
    eight_workers_refresh_each_row_once(Isolation::ReadCommitted);
}

#[test]
fn eight_workers_refresh_each_row_once_at_repeatable_read() {
    eight_workers_refresh_each_row_once(Isolation::RepeatableRead);
}

#[test]
fn eight_workers_refresh_each_row_once_at_serializable() {
    eight_workers_refresh_each_row_once(Isolation::Serializable);
}

/// A transaction that has locked a user may change the user's instances and credentials in any
/// order. The queue waits for none of them.
#[test]
fn a_locked_user_is_waited_for_and_locked_credentials_are_skipped_by_the_queue() {
    let database = database();
    let conn = &mut database.connect();
    let (one, other) = (pro_user(conn), pro_user(conn));
    let service_id = service(conn, "gmail", 4001);
    let mine = completed(conn, one, service_id, in_minutes(1));
    let theirs = completed(conn, other, service_id, in_minutes(2));
    let lock = |conn: &mut PgConnection| {
        conn.batch_execute(&format!("SELECT FROM users WHERE id = '{one}' FOR UPDATE"))
    };

    let begun = std::thread::scope(|scope| {
        let waiting = conn
            .transaction(|conn| {
                lock(conn)?;
                McpInstance::deactivate(conn, mine.instance_id, one)?;
                let waiting =
                    scope.spawn(|| begin(&mut database.connect(), mine.credential_id, "a"));
                let waits = "SELECT count(*) FROM pg_stat_activity
                              WHERE datname = current_database() AND wait_event_type = 'Lock'";
                while database.psql(waits).unwrap() == "0\n" {
                    std::thread::yield_now();
                }
                // The other thread waits for the user and has not locked the credentials.
                let secret = mine.client_secret.clone().unwrap();
                let (id, version) = (mine.credential_id, mine.version);
                McpCredential::replace_client(conn, id, version, "client", &secret)?;
                assert_eq!(ids(&due(&mut database.connect())), [theirs.credential_id]);
                Ok::<_, CredentialError>(waiting)
            })
            .unwrap();
        waiting.join().unwrap().unwrap()
    });
    assert_eq!(begun.oauth_status, OauthStatus::Pending);
}

/// Neither thousands of leased rows nor thousands whose pause has not ended are read, whatever the
/// plan. The buffers of the operation's statement are not accessible; the entries of the index and
/// the rows that it read are.
#[test]
fn the_refresh_queue_reads_what_it_takes() {
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
                  token_expires_at, oauth_status, oauth_completed_at, refresh_leased_until)
             SELECT instance_id, 'client', secret, secret, secret,
                    now() + (n - 3000) * interval '1 minute', 'completed', now(),
                    CASE WHEN n <= 2900 THEN now() + interval '1 hour' END
               FROM (SELECT instance_id, row_number() OVER () AS n,
                            decode('01' || repeat('00', 39), 'hex') AS secret
                       FROM mcp_service_table) AS instances;
             ANALYZE",
        )
        .unwrap();
    let read = |conn: &mut PgConnection| {
        diesel::sql_query("SELECT pg_stat_force_next_flush()")
            .execute(conn)
            .unwrap();
        let counts = database
            .psql(
                "SELECT idx_tup_read FROM pg_stat_user_indexes
                  WHERE indexrelname = 'mcp_credentials_refresh_leased_until_token_expires_at_idx'
                  UNION ALL
                 SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'mcp_credentials'",
            )
            .unwrap();
        let counts: Vec<i64> = counts.lines().map(|line| line.parse().unwrap()).collect();
        (counts[0], counts[1])
    };

    let conn = &mut database.connect();
    // The worst case of a prepared statement.
    diesel::sql_query("SET plan_cache_mode = force_generic_plan")
        .execute(conn)
        .unwrap();
    let before = read(conn);
    let lease = TimeDelta::minutes(1);
    let rows = McpCredential::claim_due(conn, in_minutes(10), lease, 5).unwrap();
    assert_eq!(rows.len(), 5);
    assert!(rows.is_sorted_by_key(|row| row.token_expires_at));
    end_leases(conn);
    let rows = McpCredential::claim_due(conn, in_minutes(10), lease, 200).unwrap();
    assert_eq!(rows.len(), 200);
    let after = read(conn);
    assert!(after.0 - before.0 < 1000, "{before:?} {after:?}");
    // One sequential scan is that of `end_leases`.
    assert!(after.1 - before.1 <= 3000, "{before:?} {after:?}");
}
