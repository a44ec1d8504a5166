//! Users, plans, services, instances and credentials.

use bruhmcp_db::crypto::SecretColumn;
use bruhmcp_db::ids::InstanceId;
use bruhmcp_db::import::{DuplicateEmails, Options};
use bruhmcp_db::models::McpCredential;
use diesel::prelude::*;

use crate::support::{Old, SHAPES, id, keys, ring, user};

const A: &str = SHAPES[0];
const B: &str = SHAPES[1];

#[test]
fn an_empty_system_is_imported() {
    for shape in SHAPES {
        let (_, report) = Old::imported(shape, "");
        assert!(report.is_complete());
        assert!(report.tables.iter().all(|table| table.rows == 0));
    }
}

#[test]
fn an_ordinary_user_is_carried_over_as_it_is() {
    let rows = format!(
        "{} UPDATE users SET password = '$2b$10$abcdefghijklmnopqrstuuABCDEFGHIJKLMNOPQRSTUVWXYZ01234',
             created_at = '2020-02-03 04:05:06.789', updated_at = '2021-01-01',
             last_login_at = '2021-01-02', email_verified = true, is_active = false,
             razorpay_customer_id = 'cust_1'",
        user(A, 1, "ada@example.org")
    );
    // The old trigger would set updated_at.
    let rows = rows.replace("UPDATE", "ALTER TABLE users DISABLE TRIGGER USER; UPDATE");
    let (mut old, report) = Old::imported(A, &rows);
    let users = &report.tables[0];
    assert_eq!((users.rows, users.as_they_are), (1, 1));
    assert_eq!(
        old.text("SELECT users FROM users"),
        old.text(
            "SELECT (id, first_name, last_name, email, password, email_verified, razorpay_customer_id,
                     created_at AT TIME ZONE 'UTC', updated_at AT TIME ZONE 'UTC',
                     last_login_at AT TIME ZONE 'UTC', is_active)
               FROM bruhmcp_archive.users"
        )
    );
    assert_eq!(keys(&report, "user_plans", "plan_default").len(), 1);
    assert_eq!(
        old.text("SELECT (user_id, plan_type, max_instances) FROM user_plans"),
        format!("({},free,1)", id(1))
    );
}

#[test]
fn times_are_read_in_the_zone_of_their_writer() {
    let rows = user(A, 1, "ada@example.org")
        + "INSERT INTO webhook_events (external_event_id, event_type, payment_gateway, payload, created_at)
             VALUES ('evt_1', 'x', 'stripe', '{}', '2020-06-01 12:00');
           ALTER TABLE users DISABLE TRIGGER USER;
           UPDATE users SET created_at = '2020-06-01 12:00', last_login_at = 'infinity';";
    let mut old = Old::new(A, &rows);
    let mut options = Options {
        timezone: "Asia/Kolkata".to_owned(),
        ..Options::default()
    };
    let zone = "America/New_York".to_owned();
    options.timezones.insert("webhook_events".to_owned(), zone);
    let report = old.import(&options).unwrap();
    assert_eq!(
        old.text("SELECT created_at AT TIME ZONE 'UTC' FROM users"),
        "2020-06-01 06:30:00"
    );
    assert_eq!(
        old.text("SELECT created_at AT TIME ZONE 'UTC' FROM webhook_events"),
        "2020-06-01 16:00:00"
    );
    assert_eq!(keys(&report, "users", "time_out_of_range"), [id(1)]);
    assert_eq!(old.text("SELECT last_login_at FROM users"), "NULL");
}

#[test]
fn odd_users_are_converted_or_reported() {
    let rows = user(A, 1, "Ada@Example.org ")
        + &user(A, 2, "ada@example.org")
        + &user(A, 3, "no address")
        + &user(A, 4, "bob@example.org")
        + &user(A, 5, "eve@example.org")
        + "ALTER TABLE users DISABLE TRIGGER USER;
           UPDATE users SET created_at = '2020-01-01' WHERE email LIKE 'Ada%';
           UPDATE users SET first_name = '', password = 'plain', razorpay_customer_id = 'cust_1'
            WHERE email = 'bob@example.org';
           UPDATE users SET razorpay_customer_id = 'cust_1', is_active = NULL, created_at = NULL,
               updated_at = NULL, email_verified = NULL
            WHERE email = 'eve@example.org';
           INSERT INTO user_plans (user_id, plan_type, max_instances)
               SELECT id, 'free', 1 FROM users WHERE email = 'ada@example.org';";
    let (mut old, report) = Old::imported(A, &rows);
    let reason = |code| keys(&report, "users", code);
    assert_eq!(reason("email_canonical"), [id(1)]);
    assert_eq!(reason("email_duplicate"), [id(2)]);
    assert_eq!(reason("email_invalid"), [id(3)]);
    assert_eq!(reason("name_empty"), [id(4)]);
    assert_eq!(reason("password_not_phc"), [id(4)]);
    assert_eq!(reason("gateway_id_shared"), [id(5)]);
    assert_eq!(reason("null_default"), [id(5)]);
    assert_eq!(keys(&report, "user_plans", "parent_left_behind").len(), 1);
    assert!(!report.is_complete());
    assert_eq!(
        old.text("SELECT string_agg(email || ' ' || first_name, ', ' ORDER BY id) FROM users"),
        "ada@example.org Ada, bob@example.org bob, eve@example.org Ada"
    );
    assert_eq!(
        old.text(
            "SELECT string_agg(concat_ws(' ', table_name, key, reason), ', ' ORDER BY 1)
               FROM (SELECT * FROM bruhmcp_archive.import_rejected
                      WHERE table_name = 'users' ORDER BY key) AS rejected"
        ),
        format!(
            "users {} email_duplicate, users {} email_invalid",
            id(2),
            id(3)
        )
    );

    let mut old = Old::new(A, &rows);
    let options = Options {
        duplicate_emails: DuplicateEmails::Suffix,
        ..Options::default()
    };
    let report = old.import(&options).unwrap();
    assert_eq!(keys(&report, "users", "email_suffixed"), [id(2)]);
    assert_eq!(
        old.text(&format!("SELECT email FROM users WHERE id = '{}'", id(2))),
        "ada+duplicate-00000000000040008000000000000002@example.org"
    );
}

#[test]
fn tokens_stay_behind() {
    let rows = user(A, 1, "ada@example.org")
        + "INSERT INTO auth_tokens (user_id, token, type, expires_at)
               SELECT id, type, type, 'yesterday'
                 FROM users, unnest('{refresh,email_otp,email_change_pending}'::text[]) AS type;";
    let (mut old, report) = Old::imported(A, &rows);
    assert_eq!(keys(&report, "auth_tokens", "signs_in_again").len(), 2);
    assert_eq!(keys(&report, "auth_tokens", "address_change_lost").len(), 1);
    assert!(report.is_complete());
    assert_eq!(old.text("SELECT count(*) FROM auth_tokens"), "0");
}

/// A service, and an instance of it for each of these users.
fn instances(users: &[u32], more: &str) -> String {
    let mut rows = format!(
        "INSERT INTO mcp_table (mcp_service_id, mcp_service_name, display_name, port, type, is_active,
             total_instances_created, active_instances_count)
         VALUES ('{}', 'figma', 'Figma', 49280, 'api_key', false, 40, -3);",
        id(90)
    );
    for (place, user) in users.iter().enumerate() {
        rows += &format!(
            "INSERT INTO mcp_service_table (instance_id, user_id, mcp_service_id, last_used_at, usage_count,
                 version)
             VALUES ('{0}', '{1}', '{2}', '2020-01-0{3}', {3}, 4{3});
             INSERT INTO mcp_credentials (instance_id, api_key, oauth_status, oauth_completed_at)
             VALUES ('{0}', 'figd_{3}', 'completed', '2020-01-01');",
            id(100 + u32::try_from(place).unwrap()),
            id(*user),
            id(90),
            place + 1,
        );
    }
    rows + more
}

#[test]
fn instances_keep_their_history_and_their_credentials_open() {
    let rows = user(A, 1, "ada@example.org") + &instances(&[1], "");
    let (mut old, report) = Old::imported(A, &rows);
    assert!(report.is_complete(), "{report:?}");
    assert_eq!(
        old.text("SELECT (usage_count, version, status, oauth_status) FROM mcp_service_table"),
        "(1,41,active,completed)"
    );
    assert_eq!(
        old.text(
            "SELECT (total_instances_created, active_instances_count, is_active) FROM mcp_table"
        ),
        "(40,1,f)"
    );
    let row: McpCredential = bruhmcp_db::schema::mcp_credentials::table
        .select(McpCredential::as_select())
        .get_result(&mut old.conn)
        .unwrap();
    let instance = InstanceId(id(100).parse().unwrap());
    let opened = ring().open(&row.api_key.unwrap(), instance, SecretColumn::ApiKey);
    assert_eq!(opened.unwrap().expose(), "figd_1");
    // The rules hold again.
    assert_eq!(
        old.text(
            "SELECT count(*) FROM pg_trigger
              WHERE tgenabled <> 'O' AND tgrelid = 'mcp_service_table'::regclass"
        ),
        "0"
    );
}

#[test]
fn a_plan_switches_off_what_it_does_not_allow() {
    let rows = user(A, 1, "ada@example.org")
        + &user(A, 2, "bob@example.org")
        + &user(A, 3, "eve@example.org")
        + "INSERT INTO user_plans (user_id, plan_type, max_instances, expires_at, features)
               SELECT id, 'free', 1, NULL::timestamp, '[]'::jsonb FROM users WHERE email LIKE 'ada%'
               UNION ALL SELECT id, 'pro', NULL, 'yesterday', '{}' FROM users WHERE email LIKE 'bob%'
               UNION ALL SELECT id, 'pro', NULL, NULL, NULL FROM users WHERE email LIKE 'eve%';"
        + &instances(
            &[1, 1, 2, 3, 3],
            "UPDATE mcp_service_table SET oauth_status = 'failed' WHERE usage_count = 5;",
        );
    let (mut old, report) = Old::imported(A, &rows);
    let reason = |code| keys(&report, "mcp_service_table", code);
    assert_eq!(reason("over_plan_limit"), [id(100)]);
    assert_eq!(reason("plan_expired"), [id(102)]);
    assert_eq!(reason("oauth_status_of_credentials"), [id(104)]);
    assert_eq!(keys(&report, "user_plans", "plan_features_reset").len(), 2);
    assert_eq!(
        old.text(
            "SELECT string_agg(status::text, ' ' ORDER BY instance_id) FROM mcp_service_table"
        ),
        "inactive active inactive active active"
    );
    assert_eq!(
        old.text("SELECT active_instances_count FROM mcp_table"),
        "3"
    );
}

#[test]
fn odd_credentials_are_converted() {
    let more = "
        UPDATE mcp_credentials SET oauth_status = 'pending', oauth_state = 'same' WHERE api_key = 'figd_1';
        UPDATE mcp_credentials SET oauth_status = NULL, version = NULL, oauth_state = 'same'
         WHERE api_key = 'figd_2';
        UPDATE mcp_credentials SET api_key = '' WHERE api_key = 'figd_3';
        UPDATE mcp_credentials SET api_key = NULL, client_id = 'c', client_secret = 's',
               access_token = 'a', refresh_token = '' WHERE api_key = 'figd_4';
        DELETE FROM mcp_credentials WHERE api_key = 'figd_5';
        UPDATE mcp_service_table SET usage_count = -1, status = NULL WHERE usage_count = 5;";
    let rows = (1..=5)
        .map(|n| user(A, n, &format!("u{n}@example.org")))
        .collect::<String>()
        + &instances(&[1, 2, 3, 4, 5], more);
    let (mut old, report) = Old::imported(A, &rows);
    let reason = |code| keys(&report, "mcp_credentials", code);
    assert_eq!(reason("completed_at_of_pending").len(), 1);
    assert_eq!(reason("authorization_dropped").len(), 2);
    assert_eq!(reason("null_default").len(), 1);
    assert_eq!(reason("credentials_empty").len(), 1);
    assert_eq!(reason("token_empty").len(), 1);
    assert_eq!(
        keys(&report, "mcp_service_table", "negative_count"),
        [id(104)]
    );
    assert_eq!(
        old.text(
            "SELECT string_agg(oauth_status::text, ' ' ORDER BY instance_id) FROM mcp_service_table"
        ),
        "pending completed pending completed pending"
    );
    assert_eq!(
        old.text(
            "SELECT (client_id, client_secret IS NOT NULL, access_token IS NOT NULL, refresh_token)
               FROM mcp_credentials WHERE client_id IS NOT NULL"
        ),
        "(c,t,t,)"
    );
}

#[test]
fn services_get_names_that_the_registry_takes() {
    let rows = "INSERT INTO mcp_table (mcp_service_name, display_name, port, type) VALUES
        ('Google Drive', '', 1, 'oauth'), ('figma', 'Figma', 70000, 'oauth'), ('---', 'x', 3, 'oauth');";
    let (mut old, report) = Old::imported(A, rows);
    assert_eq!(
        old.text("SELECT (mcp_service_name, display_name) FROM mcp_table"),
        "(google_drive,google_drive)"
    );
    for code in [
        "service_name_canonical",
        "name_empty",
        "port_invalid",
        "service_name_invalid",
    ] {
        assert_eq!(keys(&report, "mcp_table", code).len(), 1, "{code}");
    }
}

#[test]
fn without_plans_a_paid_subscription_gives_one() {
    let rows = user(B, 1, "ada@example.org")
        + &user(B, 2, "bob@example.org")
        + &format!(
            "INSERT INTO user_subscriptions (user_id, plan_code, status, razorpay_subscription_id,
                 current_period_end)
             VALUES ('{}', 'pro', 'active', 'sub_1', '2199-01-01'),
                    ('{}', 'pro', 'active', 'sub_2', current_timestamp + interval '1 second'),
                    ('{}', 'pro', 'halted', 'sub_3', '2199-01-01');",
            id(1),
            id(2),
            id(2)
        );
    let (mut old, report) = Old::imported(B, &rows);
    assert_eq!(
        keys(&report, "user_plans", "plan_from_subscription").len(),
        2
    );
    assert_eq!(
        old.text(
            "SELECT string_agg(concat_ws(' ', plan_type, subscription_id, payment_status), ', '
                     ORDER BY user_id) FROM user_plans"
        ),
        "pro sub_1 active, pro sub_2 active"
    );
    assert_eq!(
        old.text(&format!(
            "SELECT expires_at AT TIME ZONE 'UTC' FROM user_plans WHERE user_id = '{}'",
            id(1)
        )),
        "2199-01-04 00:00:00"
    );
}
