//! The registry of services, and users' operations on instances.

use bruhmcp_db::enums::{AuthType, InstanceStatus, OauthStatus};
use bruhmcp_db::ids::{InstanceId, ServiceId, UserId};
use bruhmcp_db::models::{
    InstanceError, InstanceFilter, McpCredential, McpInstance, McpService, NewMcpInstance,
    NewMcpService, NotCallable, Recorded, User,
};
use bruhmcp_db::schema::mcp_credentials;
use bruhmcp_db::{ConstraintViolation, Page, StateDigest};
use chrono::{DateTime, TimeDelta, Utc};
use diesel::connection::SimpleConnection;
use diesel::prelude::*;

use crate::fixtures::{
    api_key, authorize, create, create_inactive, create_pending, find, new_service, oauth,
    pro_user, sealed, service, upgrade, user,
};
use crate::support::{self, TestDatabase, as_admin};

fn register(conn: &mut PgConnection, new: &NewMcpService<'_>) -> QueryResult<Recorded<McpService>> {
    as_admin(conn, |conn| McpService::register(conn, new))
}

fn set_enabled(
    conn: &mut PgConnection,
    service: ServiceId,
    enabled: bool,
) -> QueryResult<Option<McpService>> {
    as_admin(conn, |conn| McpService::set_enabled(conn, service, enabled))
}

#[test]
fn a_service_is_registered_once() {
    let database = support::database();
    let conn = &mut database.connect();

    let first = register(conn, &new_service("gmail", 4001)).unwrap();
    let Recorded::New(new) = first else {
        panic!("{first:?}");
    };
    assert!(new.is_active);
    let again = register(conn, &new_service("gmail", 4001)).unwrap();
    assert_eq!(again, Recorded::Existing(new));
}

#[test]
fn a_registered_service_is_brought_in_line() {
    let database = support::database();
    let conn = &mut database.connect();
    let first = new_service("gmail", 4001);
    let id = service(conn, "gmail", 4001);
    let mut updated_at = McpService::find(conn, id).unwrap().unwrap().updated_at;

    let others = [
        NewMcpService {
            display_name: "Gmail",
            ..first.clone()
        },
        NewMcpService {
            description: Some("Mail"),
            ..first.clone()
        },
        NewMcpService {
            icon_url_path: Some("/gmail.svg"),
            ..first.clone()
        },
        NewMcpService {
            port: 4002,
            ..first.clone()
        },
        NewMcpService {
            type_: AuthType::ApiKey,
            ..first.clone()
        },
        first,
    ];
    for other in others {
        let outcome = register(conn, &other).unwrap();
        let Recorded::Existing(changed) = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(changed.mcp_service_id, id);
        assert_eq!(
            (
                changed.display_name.as_str(),
                changed.description.as_deref(),
                changed.icon_url_path.as_deref(),
                changed.port,
                changed.type_
            ),
            (
                other.display_name,
                other.description,
                other.icon_url_path,
                other.port,
                other.type_
            )
        );
        assert!(changed.updated_at > updated_at);
        updated_at = changed.updated_at;
        // An equal row is not written.
        assert_eq!(register(conn, &other).unwrap(), Recorded::Existing(changed));
    }
}

#[test]
fn a_port_has_one_service() {
    let database = support::database();
    let conn = &mut database.connect();
    service(conn, "gmail", 4001);
    let error = register(conn, &new_service("slack", 4001)).unwrap_err();
    assert!(
        ConstraintViolation::of(&error)
            .unwrap()
            .is("mcp_table_port_key")
    );
}

#[test]
fn a_disabled_service_stays_disabled_and_takes_no_new_instance() {
    let database = support::database();
    let conn = &mut database.connect();
    let user = pro_user(conn);
    let gmail = service(conn, "gmail", 4001);
    create(conn, user, gmail).unwrap();

    let disabled = set_enabled(conn, gmail, false).unwrap().unwrap();
    assert!(!disabled.is_active);
    let refused = create(conn, user, gmail);
    assert!(
        matches!(refused, Err(InstanceError::ServiceDisabled)),
        "{refused:?}"
    );
    assert_eq!(
        register(conn, &new_service("gmail", 4001)).unwrap(),
        Recorded::Existing(disabled)
    );

    assert!(set_enabled(conn, gmail, true).unwrap().unwrap().is_active);
    create(conn, user, gmail).unwrap();
    assert_eq!(set_enabled(conn, ServiceId::new(), true).unwrap(), None);
}

#[test]
pub(crate) fn an_instance_with_an_api_key_counts_at_once() {
    let database = support::database();
    let conn = &mut database.connect();
    let (user, gmail) = (user(conn), service(conn, "gmail", 4001));

    let new = NewMcpInstance::new(user, gmail);
    let key = api_key(new.instance_id);
    let (instance, credential) = McpInstance::create(conn, &new, &key).unwrap();
    let id = new.instance_id;
    assert_eq!((instance.instance_id, credential.instance_id), (id, id));
    assert_eq!(credential.credential_id, key.credential_id());
    assert_eq!(instance.oauth_status, OauthStatus::Completed);
    assert_eq!(instance, find(conn, id));
    assert_eq!(McpInstance::count_active(conn, user).unwrap(), 1);

    let refused = create(conn, user, gmail);
    assert!(
        matches!(refused, Err(InstanceError::LimitReached)),
        "{refused:?}"
    );
    let all = InstanceFilter::default();
    let all = McpInstance::list_by_user(conn, user, all, Page::first(9)).unwrap();
    assert_eq!(all.len(), 1, "nothing of the second one stays");

    upgrade(conn, user, None);
    create(conn, user, gmail).unwrap();
    assert_eq!(McpInstance::count_active(conn, user).unwrap(), 2);
}

#[test]
fn a_pending_instance_counts_when_it_is_authorized() {
    let database = support::database();
    let conn = &mut database.connect();
    let (user, gmail) = (user(conn), service(conn, "gmail", 4001));
    let (first, second) = (
        create_pending(conn, user, gmail),
        create_pending(conn, user, gmail),
    );
    assert_eq!(McpInstance::count_active(conn, user).unwrap(), 0);

    assert!(authorize(conn, user, first, OauthStatus::Completed).unwrap());
    assert_eq!(McpInstance::count_active(conn, user).unwrap(), 1);
    assert_eq!(find(conn, first).oauth_status, OauthStatus::Completed);
    let refused = authorize(conn, user, second, OauthStatus::Completed);
    assert!(
        matches!(refused, Err(InstanceError::LimitReached)),
        "{refused:?}"
    );
    assert_eq!(find(conn, second).oauth_status, OauthStatus::Pending);
}

/// As the owner: no operation deletes a plan.
pub(crate) fn delete_plan(database: &TestDatabase, user: UserId) {
    let sql = format!("DELETE FROM user_plans WHERE user_id = '{user}'");
    database.psql(&sql).unwrap();
}

#[test]
pub(crate) fn an_expired_or_missing_plan_allows_no_activation() {
    let database = support::database();
    let conn = &mut database.connect();
    let (user, gmail) = (user(conn), service(conn, "gmail", 4001));
    let inactive = create_inactive(conn, user, gmail);

    upgrade(conn, user, Some(Utc::now() - TimeDelta::seconds(1)));
    let refusals = [
        create(conn, user, gmail).map(drop),
        McpInstance::activate(conn, inactive, user).map(drop),
        McpInstance::renew(conn, inactive, user, None).map(drop),
    ];
    for refusal in refusals {
        assert!(
            matches!(refusal, Err(InstanceError::PlanExpired)),
            "{refusal:?}"
        );
    }
    // A pending instance is checked when it is authorized.
    create_pending(conn, user, gmail);

    delete_plan(&database, user);
    let refusals = [
        create(conn, user, gmail).map(drop),
        McpInstance::activate(conn, inactive, user).map(drop),
        McpInstance::renew(conn, inactive, user, None).map(drop),
        McpInstance::swap(conn, user, inactive, inactive).map(drop),
        authorize(conn, user, inactive, OauthStatus::Failed).map(drop),
    ];
    let [refusals @ .., without_lock] = refusals;
    for refusal in refusals {
        assert!(
            matches!(refusal, Err(InstanceError::PlanMissing)),
            "{refusal:?}"
        );
    }
    without_lock.unwrap();

    let activation = diesel::sql_query(format!(
        "UPDATE mcp_credentials SET oauth_status = 'completed' WHERE instance_id = '{inactive}';"
    ));
    activation.execute(conn).unwrap();
    let error = conn
        .batch_execute("UPDATE mcp_service_table SET status = 'active'")
        .unwrap_err();
    assert!(matches!(error.into(), InstanceError::PlanMissing));
}

#[test]
fn an_unknown_service_is_refused_and_the_transaction_survives() {
    let database = support::database();
    let conn = &mut database.connect();
    let (user, gmail) = (user(conn), service(conn, "gmail", 4001));
    conn.transaction(|conn| {
        let refused = create(conn, user, ServiceId::new());
        assert!(
            matches!(refused, Err(InstanceError::UnknownService)),
            "{refused:?}"
        );
        create(conn, user, gmail)
    })
    .unwrap();
    assert_eq!(McpInstance::count_active(conn, user).unwrap(), 1);
}

#[test]
fn another_violated_constraint_is_in_the_source() {
    let database = support::database();
    let conn = &mut database.connect();
    let (user, gmail) = (user(conn), service(conn, "gmail", 4001));
    let name = "x".repeat(256);
    let new = NewMcpInstance {
        custom_name: Some(&name),
        ..NewMcpInstance::new(user, gmail)
    };
    let refused = McpInstance::create(conn, &new, &api_key(new.instance_id)).unwrap_err();
    assert_eq!(refused.to_string(), "database error");
    let source = std::error::Error::source(&refused).unwrap();
    let error = source.downcast_ref::<diesel::result::Error>().unwrap();
    assert!(
        ConstraintViolation::of(error)
            .unwrap()
            .is("mcp_service_table_custom_name_check")
    );
}

#[test]
fn an_instance_is_found_by_its_owner_only() {
    let database = support::database();
    let conn = &mut database.connect();
    let (owner, other) = (user(conn), user(conn));
    let gmail = service(conn, "gmail", 4001);
    let id = create_pending(conn, owner, gmail);
    let credential = McpCredential::find_by_instance(conn, id).unwrap().unwrap();
    let id_of = credential.credential_id;
    let state = StateDigest::new([7; 32]);
    let lifetime = McpCredential::STATE_LIFETIME;
    McpCredential::begin_oauth(conn, id_of, &state, lifetime, &sealed(), None).unwrap();

    assert_eq!(McpInstance::find_by_user(conn, id, other).unwrap(), None);
    let details = McpInstance::find_by_user(conn, id, owner).unwrap().unwrap();
    assert_eq!(details.instance, find(conn, id));
    assert_eq!(details.service.mcp_service_id, gmail);
    let credentials = details.credentials.as_ref().unwrap();
    assert_eq!(credentials.oauth_status, OauthStatus::Pending);
    assert_eq!(credentials.client_id.as_deref(), Some("client"));
    let json = serde_json::to_string(&details).unwrap();
    assert!(
        !json.contains("oauth_state") && !json.contains("secret"),
        "{json}"
    );

    diesel::delete(mcp_credentials::table)
        .execute(conn)
        .unwrap();
    let details = McpInstance::find_by_user(conn, id, owner).unwrap().unwrap();
    assert_eq!(details.credentials, None);
}

/// Brings an instance of the user and of Gmail into a state, and back.
const NOT_CALLABLE: [(NotCallable, &str, &str); 7] = [
    (
        NotCallable::UserInactive,
        "UPDATE users SET is_active = false",
        "UPDATE users SET is_active = true",
    ),
    (
        NotCallable::ServiceDisabled,
        "UPDATE mcp_table SET is_active = false",
        "UPDATE mcp_table SET is_active = true",
    ),
    (
        NotCallable::Expired,
        "UPDATE mcp_service_table SET status = 'expired'",
        "UPDATE mcp_service_table SET status = 'active'",
    ),
    (
        NotCallable::Expired,
        "UPDATE mcp_service_table SET expires_at = now()",
        "UPDATE mcp_service_table SET expires_at = now() + interval '1 hour'",
    ),
    (
        NotCallable::Inactive,
        "UPDATE mcp_service_table SET status = 'inactive'",
        "UPDATE mcp_service_table SET status = 'active'",
    ),
    (
        NotCallable::NotAuthorized(OauthStatus::Failed),
        "UPDATE mcp_credentials SET oauth_status = 'failed'",
        "UPDATE mcp_credentials SET oauth_status = 'completed'",
    ),
    (
        NotCallable::NotAuthorized(OauthStatus::Pending),
        "DELETE FROM mcp_credentials",
        "INSERT INTO mcp_credentials (instance_id, api_key, oauth_status, oauth_completed_at)
         SELECT instance_id, decode(repeat('01', 40), 'hex'), 'completed', now()
           FROM mcp_service_table",
    ),
];

#[test]
fn what_may_not_be_called_is_refused_with_the_reason() {
    let database = support::database();
    let conn = &mut database.connect();
    let (owner, other) = (user(conn), user(conn));
    let gmail = service(conn, "gmail", 4001);
    service(conn, "slack", 4002);
    let id = create(conn, owner, gmail).unwrap();
    let mut refused = |id, name, caller| {
        let found = McpInstance::find_with_credentials(conn, id, name, caller).unwrap();
        let found = found.map(|(instance, service, credential)| {
            assert_eq!(instance.instance_id, id);
            assert_eq!(service.mcp_service_name, name);
            assert_eq!(credential.instance_id, id);
        });
        let before = McpInstance::find(conn, id).unwrap();
        let recorded = McpInstance::record_call(conn, id, caller).unwrap();
        let calls = McpInstance::find(conn, id).unwrap();
        let calls = calls.map_or(0, |after| after.usage_count - before.unwrap().usage_count);
        assert_eq!(calls, i64::from(recorded.is_ok()));
        if name == "gmail" {
            assert_eq!(found, recorded);
        }
        let any = McpInstance::find_in_any_state(conn, id, caller).unwrap();
        if let Some(any) = any.filter(|_| name == "gmail") {
            assert_eq!(any.instance.instance_id, id);
            assert_eq!(any.not_callable, found.err());
        }
        found.err()
    };
    for caller in [None, Some(owner)] {
        assert_eq!(refused(id, "gmail", caller), None);
        for (reason, into, back) in NOT_CALLABLE {
            database.psql(into).unwrap();
            assert_eq!(refused(id, "gmail", caller), Some(reason), "{into}");
            database.psql(back).unwrap();
            assert_eq!(refused(id, "gmail", caller), None, "{back}");
        }
        assert_eq!(refused(id, "slack", caller), Some(NotCallable::NotFound));
    }
    assert_eq!(
        refused(id, "gmail", Some(other)),
        Some(NotCallable::NotFound)
    );
    let unknown = InstanceId::new();
    assert_eq!(refused(unknown, "gmail", None), Some(NotCallable::NotFound));

    // An expired plan refuses activations only.
    upgrade(conn, owner, Some(Utc::now() - TimeDelta::seconds(1)));
    McpInstance::record_call(conn, id, None).unwrap().unwrap();
    let none = McpInstance::find_in_any_state(conn, id, Some(other)).unwrap();
    assert_eq!(none, None);
}

#[test]
fn an_inactive_user_gets_no_instance() {
    let database = support::database();
    let conn = &mut database.connect();
    let (owner, gmail) = (user(conn), service(conn, "gmail", 4001));
    let (on, off) = (
        create(conn, owner, gmail).unwrap(),
        create_inactive(conn, owner, gmail),
    );
    User::deactivate(conn, owner).unwrap();
    let refusals = [
        create(conn, owner, gmail).map(drop),
        {
            let new = NewMcpInstance::new(owner, gmail);
            McpInstance::create(conn, &new, &oauth(new.instance_id)).map(drop)
        },
        McpInstance::activate(conn, off, owner).map(drop),
        McpInstance::renew(conn, off, owner, None).map(drop),
        McpInstance::swap(conn, owner, on, off).map(drop),
    ];
    for refusal in refusals {
        assert!(
            matches!(refusal, Err(InstanceError::UserInactive)),
            "{refusal:?}"
        );
    }
    assert_eq!(find(conn, on).status, InstanceStatus::Active);
    User::reactivate(conn, owner).unwrap();
    McpInstance::swap(conn, owner, on, off).unwrap();
    create_pending(conn, owner, gmail);
}

#[test]
fn a_list_is_newest_first_in_pages_and_filtered() {
    let database = support::database();
    let conn = &mut database.connect();
    let (user, other) = (pro_user(conn), pro_user(conn));
    let (gmail, slack) = (service(conn, "gmail", 4001), service(conn, "slack", 4002));
    for n in 0..7 {
        let id = create(conn, user, if n % 2 == 0 { gmail } else { slack }).unwrap();
        if n < 3 {
            McpInstance::deactivate(conn, id, user).unwrap();
        }
    }
    create(conn, other, gmail).unwrap();
    // For rows with the same timestamp, the key decides.
    conn.batch_execute("UPDATE mcp_service_table SET created_at = now() WHERE status = 'inactive'")
        .unwrap();

    let mut list = |filter, page| McpInstance::list_by_user(conn, user, filter, page).unwrap();
    let first = Page::first(100);
    let all = list(InstanceFilter::default(), first);
    assert_eq!(all.len(), 7);
    let place = |i: usize| {
        let cursor = all[i].cursor();
        (cursor.created_at, cursor.id)
    };
    assert!((1..7).all(|i| place(i) < place(i - 1)));
    // A larger limit is lowered.
    assert_eq!(list(InstanceFilter::default(), Page::first(u16::MAX)), all);

    let mut pages = Vec::new();
    let mut page = Page::first(2);
    loop {
        let listed = list(InstanceFilter::default(), page);
        let Some(last) = listed.last() else { break };
        page = Page::after(last.cursor(), 2);
        pages.extend(listed);
    }
    assert_eq!(pages, all);

    let inactive = InstanceFilter {
        status: Some(InstanceStatus::Inactive),
        ..InstanceFilter::default()
    };
    assert_eq!(list(inactive, first).len(), 3);
    let slack = InstanceFilter {
        service_name: Some("slack"),
        ..InstanceFilter::default()
    };
    assert_eq!(list(slack, first).len(), 3);
    let both = InstanceFilter {
        status: inactive.status,
        ..slack
    };
    assert_eq!(list(both, first).len(), 1);
    let of_status = |oauth_status| InstanceFilter {
        oauth_status: Some(oauth_status),
        ..slack
    };
    assert_eq!(list(of_status(OauthStatus::Completed), first).len(), 3);
    assert_eq!(list(of_status(OauthStatus::Pending), first), []);
}

/// Even with a generic plan, which PostgreSQL may choose for a prepared statement.
#[test]
fn a_page_reads_no_more_than_its_rows() {
    let database = support::database();
    database
        .psql(
            "INSERT INTO users (first_name, last_name, email)
             SELECT 'Asha', '', n || '@example.in' FROM generate_series(1, 5) AS n;
             INSERT INTO mcp_table (mcp_service_name, display_name, port, type)
             VALUES ('gmail', 'Gmail', 4001, 'oauth');
             INSERT INTO mcp_service_table (user_id, mcp_service_id, created_at)
             SELECT id, mcp_service_id, now() - n * interval '1 minute'
               FROM users, mcp_table, generate_series(1, 2000) AS n;
             ANALYZE",
        )
        .unwrap();
    let conn = &mut database.connect();
    conn.batch_execute("SET plan_cache_mode = force_generic_plan")
        .unwrap();
    let user = User::find_active_by_email(conn, "1@example.in").unwrap();
    let user = user.unwrap().id;
    let mut page = Page::first(20);
    for _ in 0..3 {
        let rows = McpInstance::list_by_user(conn, user, InstanceFilter::default(), page).unwrap();
        assert_eq!(rows.len(), 20);
        page = Page::after(rows[19].cursor(), 20);
    }
    conn.batch_execute("SELECT pg_stat_force_next_flush()")
        .unwrap();
    let read = "SELECT idx_tup_read FROM pg_stat_user_indexes
                 WHERE indexrelname = 'mcp_service_table_user_id_created_at_idx'";
    let read: i64 = database.psql(read).unwrap().trim().parse().unwrap();
    assert!((60..=66).contains(&read), "{read} index entries");
}

#[test]
fn a_call_is_counted_and_leaves_the_version() {
    let database = support::database();
    let conn = &mut database.connect();
    let (user, gmail) = (user(conn), service(conn, "gmail", 4001));
    let id = create(conn, user, gmail).unwrap();
    let before = find(conn, id);
    assert_eq!((before.usage_count, before.last_used_at), (0, None));

    for caller in [None, Some(user)] {
        McpInstance::record_call(conn, id, caller).unwrap().unwrap();
    }
    let after = find(conn, id);
    assert_eq!(after.usage_count, 2);
    assert!(after.last_used_at.unwrap() > before.created_at);
    assert_eq!(
        (after.version, after.last_modified),
        (before.version, before.last_modified)
    );

    // It is prepared once.
    let prepared = diesel::sql_query(
        "SELECT FROM pg_prepared_statements WHERE statement LIKE 'UPDATE%usage_count%'",
    );
    assert_eq!(prepared.execute(conn).unwrap(), 1);
}

#[test]
fn an_instance_is_switched_off_and_on() {
    let database = support::database();
    let conn = &mut database.connect();
    let (owner, other) = (user(conn), user(conn));
    let gmail = service(conn, "gmail", 4001);
    let id = create(conn, owner, gmail).unwrap();

    assert_eq!(McpInstance::deactivate(conn, id, other).unwrap(), None);
    let off = McpInstance::deactivate(conn, id, owner).unwrap().unwrap();
    assert_eq!(off.status, InstanceStatus::Inactive);
    let again = McpInstance::deactivate(conn, id, owner).unwrap().unwrap();
    assert_eq!(again.version, off.version);

    let refused = McpInstance::activate(conn, id, other);
    assert!(
        matches!(refused, Err(InstanceError::NotFound)),
        "{refused:?}"
    );
    let on = McpInstance::activate(conn, id, owner).unwrap();
    assert_eq!(on.status, InstanceStatus::Active);

    let second = create_inactive(conn, owner, gmail);
    let refused = McpInstance::activate(conn, second, owner);
    assert!(
        matches!(refused, Err(InstanceError::LimitReached)),
        "{refused:?}"
    );
    assert_eq!(
        McpInstance::activate(conn, id, owner).unwrap().version,
        on.version
    );
}

#[test]
fn an_expired_instance_is_renewed() {
    let database = support::database();
    let conn = &mut database.connect();
    let (owner, other) = (user(conn), user(conn));
    let gmail = service(conn, "gmail", 4001);
    let past = NewMcpInstance {
        expires_at: Some(Utc::now() - TimeDelta::seconds(1)),
        ..NewMcpInstance::new(owner, gmail)
    };
    let id = past.instance_id;
    McpInstance::create(conn, &past, &api_key(id)).unwrap();
    assert_eq!(McpInstance::expire_due(conn, 10).unwrap().len(), 1);

    let refused = McpInstance::activate(conn, id, owner);
    assert!(
        matches!(refused, Err(InstanceError::InstanceExpired)),
        "{refused:?}"
    );
    let still = McpInstance::deactivate(conn, id, owner).unwrap().unwrap();
    assert_eq!(still.status, InstanceStatus::Expired);
    let refused = McpInstance::renew(conn, id, owner, past.expires_at);
    assert!(
        matches!(refused, Err(InstanceError::InstanceExpired)),
        "{refused:?}"
    );
    let refused = McpInstance::renew(conn, id, other, None);
    assert!(
        matches!(refused, Err(InstanceError::NotFound)),
        "{refused:?}"
    );

    let tomorrow = DateTime::from_timestamp(Utc::now().timestamp() + 86_400, 0);
    let renewed = McpInstance::renew(conn, id, owner, tomorrow).unwrap();
    assert_eq!(renewed.status, InstanceStatus::Active);
    assert_eq!((renewed.expires_at, renewed.renewed_count), (tomorrow, 1));
    assert!(renewed.last_renewed_at.is_some());
    let for_ever = McpInstance::renew(conn, id, owner, None).unwrap();
    assert_eq!((for_ever.expires_at, for_ever.renewed_count), (None, 2));

    let second = create_inactive(conn, owner, gmail);
    let refused = McpInstance::renew(conn, second, owner, tomorrow);
    assert!(
        matches!(refused, Err(InstanceError::LimitReached)),
        "{refused:?}"
    );
    assert_eq!(find(conn, second).renewed_count, 0);
}

#[test]
fn a_name_is_changed_from_the_latest_version_only() {
    let database = support::database();
    let conn = &mut database.connect();
    let (owner, other) = (user(conn), user(conn));
    let gmail = service(conn, "gmail", 4001);
    let id = create(conn, owner, gmail).unwrap();
    let seen = find(conn, id).version;

    let renamed = McpInstance::rename(conn, id, owner, seen, Some("Work")).unwrap();
    assert_eq!(renamed.custom_name.as_deref(), Some("Work"));
    let refused = McpInstance::rename(conn, id, owner, seen, Some("Home"));
    let Err(InstanceError::Conflict(current)) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(*current, renamed);

    let refused = McpInstance::rename(conn, id, other, renamed.version, None);
    assert!(
        matches!(refused, Err(InstanceError::NotFound)),
        "{refused:?}"
    );
    let refused = McpInstance::rename(conn, id, owner, renamed.version, Some(&"x".repeat(256)));
    let Err(InstanceError::Database(error)) = refused else {
        panic!("{refused:?}");
    };
    assert!(
        ConstraintViolation::of(&error)
            .unwrap()
            .is("mcp_service_table_custom_name_check")
    );

    McpInstance::record_call(conn, id, None).unwrap().unwrap();
    let unnamed = McpInstance::rename(conn, id, owner, renamed.version, None).unwrap();
    assert_eq!(unnamed.custom_name, None);
}

#[test]
fn an_instance_is_deleted_by_its_owner_with_its_credentials() {
    let database = support::database();
    let conn = &mut database.connect();
    let (owner, other) = (user(conn), user(conn));
    let gmail = service(conn, "gmail", 4001);
    let id = create(conn, owner, gmail).unwrap();

    assert!(!McpInstance::delete(conn, id, other).unwrap());
    assert!(McpInstance::delete(conn, id, owner).unwrap());
    assert!(!McpInstance::delete(conn, id, owner).unwrap());
    assert_eq!(McpCredential::find_by_instance(conn, id).unwrap(), None);
    let service = McpService::find(conn, gmail).unwrap().unwrap();
    assert_eq!(
        (
            service.total_instances_created,
            service.active_instances_count
        ),
        (1, 0)
    );
}

#[test]
pub(crate) fn two_instances_are_swapped_under_the_limit() {
    let database = support::database();
    let conn = &mut database.connect();
    let (owner, other) = (user(conn), user(conn));
    let (gmail, slack) = (service(conn, "gmail", 4001), service(conn, "slack", 4002));
    let on = create(conn, owner, gmail).unwrap();
    let off = create_inactive(conn, owner, slack);
    let of_other = create_inactive(conn, other, slack);

    // In both directions, so that both orders of the services occur.
    for (off, on) in [(on, off), (off, on)] {
        let switched_on = McpInstance::swap(conn, owner, off, on).unwrap();
        assert_eq!(switched_on, find(conn, on));
        assert_eq!(find(conn, on).status, InstanceStatus::Active);
        assert_eq!(find(conn, off).status, InstanceStatus::Inactive);
    }

    let refusals = [
        (on, on),
        (on, of_other),
        (on, InstanceId::new()),
        (of_other, off),
    ];
    for (off, on) in refusals {
        let refused = McpInstance::swap(conn, owner, off, on);
        assert!(
            matches!(refused, Err(InstanceError::NotFound)),
            "{refused:?}"
        );
    }

    // An inactive instance makes no room. The refusal comes at once, and the transaction goes on.
    let third = create_inactive(conn, owner, slack);
    conn.transaction::<_, InstanceError, _>(|conn| {
        for (off, on) in [(off, third), (third, off)] {
            let refused = McpInstance::swap(conn, owner, off, on);
            assert!(
                matches!(refused, Err(InstanceError::LimitReached)),
                "{refused:?}"
            );
        }
        McpInstance::swap(conn, owner, on, third)
    })
    .unwrap();
    assert_eq!(find(conn, on).status, InstanceStatus::Inactive);
    assert_eq!(find(conn, third).status, InstanceStatus::Active);
    assert_eq!(McpInstance::count_active(conn, owner).unwrap(), 1);

    conn.batch_execute("UPDATE mcp_service_table SET expires_at = now() WHERE status = 'inactive'")
        .unwrap();
    let refused = McpInstance::swap(conn, owner, third, on);
    assert!(
        matches!(refused, Err(InstanceError::InstanceExpired)),
        "{refused:?}"
    );
    assert_eq!(find(conn, third).status, InstanceStatus::Active);
}
