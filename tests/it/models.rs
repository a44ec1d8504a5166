//! Every row type: write, read back, change, and hide secrets.

use bigdecimal::BigDecimal;
use bruhmcp_db::enums::*;
use bruhmcp_db::ids::*;
use bruhmcp_db::models::*;
use bruhmcp_db::schema::mcp_credentials;
use bruhmcp_db::{ConstraintViolation, HashedToken, Page, Sealed, SecretText, StateDigest};
use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use diesel::pg::PgConnection;
use diesel::prelude::*;
use serde::Serialize;
use serde_json::json;

use crate::fixtures;
use crate::support::database;

/// A time in microseconds, as PostgreSQL stores it.
fn in_days(days: i64) -> DateTime<Utc> {
    (Utc::now() + TimeDelta::days(days))
        .duration_round(TimeDelta::microseconds(1))
        .unwrap()
}

fn user(conn: &mut PgConnection) -> User {
    let hash = SecretText::new("$argon2id$v=19$whisperwhisperwhisper22");
    let new = NewUser {
        id: Some(UserId::new()),
        password: Some(&hash),
        email_verified: Some(true),
        razorpay_customer_id: Some("cust_1"),
        ..NewUser::new("Asha", "Rao", "asha@example.in")
    };
    let user = User::sign_up(conn, &new).unwrap();
    assert_eq!(Some(user.id), new.id);
    user
}

/// Checks that neither `Debug` nor `Serialize` shows these columns. (Bytes would show as numbers.)
fn hides(row: &(impl Serialize + std::fmt::Debug), columns: &[&str]) {
    let json = serde_json::to_value(row).unwrap();
    for column in columns {
        assert!(json.get(column).is_none(), "{column} in {json}");
        assert!(
            format!("{row:?}").contains(&format!("{column}: ")),
            "{column} is no column of {row:?}"
        );
    }
    let shown = format!("{row:?} {row:#?} {json}");
    for secret in ["whisper", "171, 171", "171,\n", "q6ur", "abab"] {
        assert!(!shown.contains(secret), "{secret} in {shown}");
    }
}

#[test]
fn users() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    assert_eq!(User::find(conn, user.id).unwrap().as_ref(), Some(&user));
    assert_eq!(
        (
            user.first_name.as_str(),
            user.last_name.as_str(),
            user.email.as_str()
        ),
        ("Asha", "Rao", "asha@example.in")
    );
    assert_eq!(
        user.password.as_ref().unwrap().expose(),
        "$argon2id$v=19$whisperwhisperwhisper22"
    );
    assert!(user.email_verified && user.is_active && user.last_login_at.is_none());
    assert_eq!(user.razorpay_customer_id.as_deref(), Some("cust_1"));
    hides(&user, &["password"]);

    let changes = UserChangeset {
        last_name: Some(""),
        password: Some(None),
        ..Default::default()
    };
    let changed = User::update(conn, user.id, &changes).unwrap().unwrap();
    assert_eq!(
        (changed.last_name.as_str(), changed.password.as_ref()),
        ("", None)
    );
    assert_eq!(changed.first_name, "Asha");
    assert!(changed.updated_at > user.updated_at);
    assert_eq!(
        User::update(conn, user.id, &UserChangeset::default()).unwrap(),
        Some(changed)
    );
    assert_eq!(User::update(conn, UserId::new(), &changes).unwrap(), None);
    assert_eq!(User::find(conn, UserId::new()).unwrap(), None);
}

#[test]
fn auth_tokens() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let hashed = HashedToken::new(AuthTokenType::PasswordReset, [171; 32]);
    let token = AuthToken::issue(conn, user.id, &hashed, TimeDelta::days(1))
        .unwrap()
        .unwrap();
    let listed = AuthToken::list_by_user(conn, user.id, hashed.type_, Page::first(2));
    assert_eq!(listed.unwrap().as_slice(), std::slice::from_ref(&token));
    assert_eq!(
        (&token.token, token.expires_at, token.attempts),
        (&hashed.digest, token.created_at + TimeDelta::days(1), 0)
    );
    hides(&token, &["token"]);
    assert_eq!(
        serde_json::to_value(&token).unwrap()["type"],
        "password_reset"
    );
}

#[test]
fn money() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let subscription = UserSubscription::start(
        conn,
        &NewUserSubscription {
            plan_code: Some(SubscriptionPlan::Plus),
            razorpay_subscription_id: Some("sub_1"),
            billing_cycle: Some(BillingCycle::Yearly),
            total_amount: Some(49_900),
            ..NewUserSubscription::new(user.id)
        },
        SubscriptionStatus::Active,
    )
    .unwrap();
    assert_eq!(
        UserSubscription::find(conn, subscription.id)
            .unwrap()
            .as_ref(),
        Some(&subscription)
    );
    assert_eq!(
        (
            subscription.plan_code,
            subscription.status,
            subscription.total_amount
        ),
        (SubscriptionPlan::Plus, SubscriptionStatus::Active, 49_900)
    );
    assert_eq!(
        subscription.current_period_end - subscription.current_period_start,
        TimeDelta::days(30)
    );

    let rate: BigDecimal = "83.12345678".parse().unwrap();
    let details = json!({"vpa": "asha@upi"});
    let payment = SubscriptionTransaction::record_payment(
        conn,
        &NewSubscriptionTransaction {
            razorpay_payment_id: Some("pay_1"),
            subscription_id: Some(subscription.id),
            currency: Some("USD"),
            exchange_rate: Some(&rate),
            method_details_json: Some(&details),
            tax_amount: Some(1),
            ..NewSubscriptionTransaction::new(
                user.id,
                i64::MAX,
                i64::MAX - 1,
                TransactionStatus::Captured,
            )
        },
    )
    .unwrap()
    .into_inner();
    assert_eq!(
        SubscriptionTransaction::find(conn, payment.id)
            .unwrap()
            .as_ref(),
        Some(&payment)
    );
    assert_eq!(
        (payment.amount, payment.net_amount),
        (i64::MAX, i64::MAX - 1)
    );
    assert_eq!(
        (&payment.exchange_rate, payment.method_details_json.as_ref()),
        (&rate, Some(&details))
    );
    assert_eq!(
        (payment.transaction_type, payment.parent_transaction_id),
        (TransactionType::Subscription, None)
    );

    let credit = AccountCredit::grant(
        conn,
        &NewAccountCredit {
            description: Some("Fee"),
            source_type: Some(CreditSource::Adjustment),
            ..NewAccountCredit::new(user.id, -5)
        },
    )
    .unwrap()
    .into_inner();
    assert_eq!(
        AccountCredit::find(conn, credit.id).unwrap().as_ref(),
        Some(&credit)
    );
    assert_eq!((credit.amount, credit.currency.as_str()), (-5, "INR"));

    let error = diesel::delete(bruhmcp_db::schema::users::table.find(user.id))
        .execute(&mut database.connect_as_owner())
        .unwrap_err();
    assert!(
        ConstraintViolation::of(&error)
            .unwrap()
            .constraint
            .ends_with("_user_id_fkey")
    );
}

#[test]
fn instances_and_credentials() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn).id;
    let service = || McpService::find_by_name(&mut database.connect(), "gmail").unwrap();
    fixtures::service(conn, "gmail", 4001);
    let registered = service().unwrap();

    let new = NewMcpInstance {
        expires_at: Some(in_days(30)),
        custom_name: Some("Work"),
        ..NewMcpInstance::new(user, registered.mcp_service_id)
    };
    let whispered = Sealed::from_ciphertext([&[2][..], &[171; 41]].concat()).unwrap();
    let client = NewMcpCredential::sealed_oauth(new.instance_id, "client", whispered.clone());
    let (instance, credential) = McpInstance::create(conn, &new, &client).unwrap();
    assert_eq!(
        McpInstance::find(conn, new.instance_id).unwrap().as_ref(),
        Some(&instance)
    );
    assert_eq!(
        (instance.user_id, instance.mcp_service_id),
        (user, registered.mcp_service_id)
    );
    assert_eq!(
        (
            instance.status,
            instance.oauth_status,
            instance.usage_count,
            instance.version
        ),
        (InstanceStatus::Active, OauthStatus::Pending, 0, 1)
    );
    assert_eq!(
        (instance.expires_at, instance.custom_name.as_deref()),
        (new.expires_at, new.custom_name)
    );
    let created = service().unwrap();
    assert_eq!(
        (
            created.total_instances_created,
            created.active_instances_count
        ),
        (1, 0)
    );

    let found = McpCredential::find(conn, client.credential_id()).unwrap();
    assert_eq!(found.as_ref(), Some(&credential));
    let found = McpCredential::find_by_instance(conn, instance.instance_id).unwrap();
    assert_eq!(found.as_ref(), Some(&credential));
    assert_eq!(credential.client_id.as_deref(), Some("client"));
    assert_eq!(credential.client_secret, Some(whispered.clone()));

    // Every secret column has a value, except the API key, which excludes the others.
    let credential: McpCredential = diesel::update(&credential)
        .set((
            mcp_credentials::access_token.eq(&whispered),
            mcp_credentials::refresh_token.eq(&whispered),
            mcp_credentials::oauth_status.eq(OauthStatus::Completed),
            mcp_credentials::oauth_completed_at.eq(in_days(0)),
            mcp_credentials::oauth_authorization_url.eq(&whispered),
            mcp_credentials::oauth_code_verifier.eq(&whispered),
            mcp_credentials::oauth_state.eq(StateDigest::new([7; 32])),
            mcp_credentials::oauth_state_expires_at.eq(in_days(1)),
        ))
        .get_result(conn)
        .unwrap();
    hides(
        &credential,
        &[
            "api_key",
            "client_secret",
            "access_token",
            "refresh_token",
            "oauth_authorization_url",
            "oauth_code_verifier",
            "oauth_state",
        ],
    );
    let inactive = NewMcpInstance {
        status: InstanceStatus::Inactive,
        ..NewMcpInstance::new(user, registered.mcp_service_id)
    };
    let key = NewMcpCredential::sealed_api_key(inactive.instance_id, whispered.clone());
    let (_, key) = McpInstance::create(conn, &inactive, &key).unwrap();
    assert_eq!(key.api_key, Some(whispered));
    hides(&key, &["api_key"]);

    // The instance and the registry follow the credentials.
    let completed = fixtures::find(conn, instance.instance_id);
    assert_eq!(
        (completed.oauth_status, completed.version),
        (OauthStatus::Completed, 2)
    );
    let counted = service().unwrap();
    assert_eq!(
        (counted.active_instances_count, counted.updated_at),
        (1, registered.updated_at)
    );
    diesel::delete(&credential).execute(conn).unwrap();
    let pending = fixtures::find(conn, instance.instance_id);
    assert_eq!(pending.oauth_status, OauthStatus::Pending);
    let counted = service().unwrap();
    assert_eq!(
        (
            counted.total_instances_created,
            counted.active_instances_count
        ),
        (2, 0)
    );
}

#[test]
fn audit_log() {
    let database = database();
    let conn = &mut database.connect();
    let metadata = json!({"scopes": 2});
    let new = NewTokenAudit {
        instance_id: InstanceId::new(),
        user_id: Some(UserId::new()),
        operation: "refresh",
        status: AuditStatus::Warning,
        method: Some("oauth"),
        error_type: Some("slow"),
        error_message: Some("took long"),
        metadata: Some(&metadata),
    };
    let audit = TokenAudit::insert(conn, &new).unwrap();
    assert_eq!((audit.user_id, audit.status), (new.user_id, new.status));
    assert_eq!(
        (audit.method.as_deref(), audit.error_type.as_deref()),
        (new.method, new.error_type)
    );
    assert_eq!(audit.error_message.as_deref(), new.error_message);
    assert_eq!(audit.metadata.as_ref(), new.metadata);
    let listed = TokenAudit::list(
        conn,
        AuditFilter::of_instance(new.instance_id),
        Page::first(2),
    )
    .unwrap();
    assert_eq!(listed, [audit]);
}

#[test]
fn plan_webhook_and_billing() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let plan = UserPlan::find_by_user(conn, user.id).unwrap().unwrap();
    assert_eq!(
        (plan.plan_type, plan.max_instances),
        (PlanType::Free, Some(1))
    );
    assert_eq!(
        (&plan.features, plan.payment_status),
        (&json!({}), PlanPaymentStatus::None)
    );
    let pro = ProPlan {
        subscription_id: Some("sub_1"),
        customer_id: Some("cust_1"),
        expires_at: Some(in_days(30)),
    };
    let changed = UserPlan::upgrade(conn, user.id, &pro).unwrap();
    assert_eq!(
        (changed.plan_type, changed.max_instances),
        (PlanType::Pro, None)
    );
    let found = UserPlan::find_by_user(conn, user.id).unwrap();
    assert_eq!(found, Some(changed));

    let payload = json!({"amount": 49900});
    let event = WebhookEvent::record(
        conn,
        &NewWebhookEvent::new(
            PaymentGateway::Razorpay,
            "evt_1",
            "payment.captured",
            &payload,
        ),
    )
    .unwrap()
    .into_inner();
    assert_eq!(
        WebhookEvent::find(conn, event.event_id).unwrap().as_ref(),
        Some(&event)
    );
    assert_eq!(
        WebhookEvent::find_by_external_id(conn, PaymentGateway::Razorpay, "evt_1")
            .unwrap()
            .as_ref(),
        Some(&event)
    );
    assert_eq!(
        (event.processing_status, event.processed_at, &event.payload),
        (WebhookStatus::Pending, None, &payload)
    );

    let billing = UserBillingDetails::upsert(conn, &fixtures::address(user.id)).unwrap();
    assert_eq!(
        UserBillingDetails::find_by_user(conn, user.id)
            .unwrap()
            .as_ref(),
        Some(&billing)
    );
    assert_eq!(billing.cards, []);
}

/// Generated keys are unique; keys of tables with many inserts ascend.
#[test]
fn keys_ascend_where_many_are_inserted() {
    let keys: Vec<UserId> = (0..1000).map(|_| UserId::new()).collect();
    assert!(keys.is_sorted());
    assert_eq!(InstanceId::new().0.get_version_num(), 4);
    assert_eq!(TransactionId::new().0.get_version_num(), 7);
    assert_eq!(serde_json::to_value(keys[0]).unwrap(), keys[0].to_string());
}
