//! Each model written, read back, changed and deleted; and what of it is shown.

use bigdecimal::BigDecimal;
use bruhmcp_db::enums::*;
use bruhmcp_db::ids::*;
use bruhmcp_db::models::*;
use bruhmcp_db::{ConstraintViolation, Sealed, SecretText, TokenDigest};
use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use diesel::pg::PgConnection;
use serde::Serialize;
use serde_json::json;

use crate::support::database;

/// A moment as PostgreSQL keeps it: in microseconds.
fn in_days(days: i64) -> DateTime<Utc> {
    (Utc::now() + TimeDelta::days(days))
        .duration_round(TimeDelta::microseconds(1))
        .unwrap()
}

fn user(conn: &mut PgConnection) -> User {
    let new = NewUser {
        id: Some(UserId::new()),
        first_name: "Asha",
        last_name: "Rao",
        email: "asha@example.in",
        password: Some(&SecretText::new("$argon2id$whisper")),
        email_verified: Some(true),
        razorpay_customer_id: Some("cust_1"),
        is_active: None,
    };
    let user = User::insert(conn, &new).unwrap();
    assert_eq!(Some(user.id), new.id);
    user
}

fn service(conn: &mut PgConnection) -> McpService {
    let new = NewMcpService {
        mcp_service_id: None,
        mcp_service_name: "gmail",
        display_name: "Gmail",
        description: Some("Mail"),
        icon_url_path: Some("/mcp-logos/gmail.svg"),
        port: 49296,
        type_: AuthType::Oauth,
        is_active: None,
    };
    McpService::insert(conn, &new).unwrap()
}

fn instance(conn: &mut PgConnection, user: &User) -> McpInstance {
    let new = NewMcpInstance {
        instance_id: Some(InstanceId::new()),
        user_id: user.id,
        mcp_service_id: service(conn).mcp_service_id,
        oauth_status: None,
        status: None,
        expires_at: Some(in_days(30)),
        custom_name: Some("Work"),
    };
    McpInstance::insert(conn, &new).unwrap()
}

fn sealed(octet: u8) -> Sealed {
    Sealed::from_ciphertext(vec![octet; 40])
}

/// Nothing of these may be seen, however a row is shown. (Octets show as a list of numbers.)
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
        "$argon2id$whisper"
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
    assert!(User::delete(conn, user.id).unwrap());
    assert!(!User::delete(conn, user.id).unwrap());
    assert_eq!(User::find(conn, user.id).unwrap(), None);
}

#[test]
fn auth_tokens() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let digest = TokenDigest::new([171; 32]);
    let expires_at = in_days(1);
    let new = NewAuthToken {
        id: None,
        user_id: user.id,
        token: &digest,
        type_: AuthTokenType::PasswordReset,
        expires_at,
    };
    let token = AuthToken::insert(conn, &new).unwrap();
    assert_eq!(
        AuthToken::find(conn, token.id).unwrap().as_ref(),
        Some(&token)
    );
    assert_eq!(
        (&token.token, token.expires_at, token.attempts),
        (&digest, expires_at, 0)
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

    let error = User::delete(conn, user.id).unwrap_err();
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
    let user = user(conn);
    let instance = instance(conn, &user);
    assert_eq!(
        McpInstance::find(conn, instance.instance_id)
            .unwrap()
            .as_ref(),
        Some(&instance)
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
    let service = McpService::find(conn, instance.mcp_service_id)
        .unwrap()
        .unwrap();
    assert_eq!(
        (
            service.total_instances_created,
            service.active_instances_count
        ),
        (1, 0)
    );
    assert_eq!(
        McpService::find_by_name(conn, "gmail").unwrap().as_ref(),
        Some(&service)
    );

    let new = NewMcpCredential {
        credential_id: Some(CredentialId::new()),
        instance_id: instance.instance_id,
        api_key: None,
        client_id: Some("client"),
        client_secret: Some(sealed(171)),
        access_token: Some(sealed(171)),
        refresh_token: Some(sealed(171)),
        token_expires_at: Some(in_days(1)),
        token_scope: Some("mail.read"),
        oauth_status: Some(OauthStatus::Completed),
        oauth_completed_at: Some(in_days(0)),
        oauth_authorization_url: Some(&SecretText::new("https://example.in/?state=whisper")),
        oauth_state: Some(&SecretText::new("whisper")),
    };
    let credential = McpCredential::insert(conn, &new).unwrap();
    assert_eq!(
        McpCredential::find(conn, credential.credential_id)
            .unwrap()
            .as_ref(),
        Some(&credential)
    );
    assert_eq!(
        McpCredential::find_by_instance(conn, instance.instance_id)
            .unwrap()
            .as_ref(),
        Some(&credential)
    );
    assert_eq!(credential.access_token, Some(sealed(171)));
    assert_eq!(credential.oauth_state, Some(SecretText::new("whisper")));
    hides(
        &credential,
        &[
            "api_key",
            "client_secret",
            "access_token",
            "refresh_token",
            "oauth_authorization_url",
            "oauth_state",
        ],
    );

    // The instance and the registry follow the credentials.
    let completed = McpInstance::find(conn, instance.instance_id)
        .unwrap()
        .unwrap();
    assert_eq!(
        (completed.oauth_status, completed.version),
        (OauthStatus::Completed, 2)
    );
    let counted = McpService::find(conn, service.mcp_service_id)
        .unwrap()
        .unwrap();
    assert_eq!(
        (counted.active_instances_count, counted.updated_at),
        (1, service.updated_at)
    );
    assert!(McpCredential::delete(conn, credential.credential_id).unwrap());
    let pending = McpInstance::find(conn, instance.instance_id)
        .unwrap()
        .unwrap();
    assert_eq!(pending.oauth_status, OauthStatus::Pending);
    let counted = McpService::find(conn, service.mcp_service_id)
        .unwrap()
        .unwrap();
    assert_eq!(
        (
            counted.total_instances_created,
            counted.active_instances_count
        ),
        (1, 0)
    );
}

#[test]
fn audit_plan_webhook_and_billing() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let metadata = json!({"scopes": 2});
    let audit = TokenAudit::insert(
        conn,
        &NewTokenAudit {
            instance_id: InstanceId::new(),
            user_id: Some(user.id),
            operation: "refresh",
            status: AuditStatus::Warning,
            method: Some("oauth"),
            error_type: Some("slow"),
            error_message: Some("took long"),
            metadata: Some(&metadata),
        },
    )
    .unwrap();
    assert_eq!(
        TokenAudit::find(conn, audit.audit_id).unwrap().as_ref(),
        Some(&audit)
    );
    assert_eq!(audit.metadata, Some(metadata));

    let plan = UserPlan::find_by_user(conn, user.id).unwrap().unwrap();
    assert_eq!(
        (plan.plan_type, plan.max_instances),
        (PlanType::Free, Some(1))
    );
    assert_eq!(
        (&plan.features, plan.payment_status),
        (&json!({}), PlanPaymentStatus::None)
    );
    let features = json!({"beta": true});
    let changes = UserPlanChangeset {
        plan_type: Some(PlanType::Pro),
        max_instances: Some(None),
        features: Some(&features),
        expires_at: Some(Some(in_days(30))),
        subscription_id: Some(Some("sub_1")),
        customer_id: Some(Some("cust_1")),
        payment_status: Some(PlanPaymentStatus::Active),
    };
    let changed = UserPlan::update(conn, plan.plan_id, &changes)
        .unwrap()
        .unwrap();
    assert_eq!(
        (changed.plan_type, changed.max_instances),
        (PlanType::Pro, None)
    );
    assert_eq!(UserPlan::find(conn, plan.plan_id).unwrap(), Some(changed));

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

    let billing = UserBillingDetails::upsert(
        conn,
        &NewUserBillingDetails {
            user_id: user.id,
            address_line1: "1 MG Road",
            address_line2: None,
            city: "Bengaluru",
            state: "Karnataka",
            country: "India",
            zip_code: "560001",
        },
    )
    .unwrap();
    assert_eq!(
        UserBillingDetails::find_by_user(conn, user.id)
            .unwrap()
            .as_ref(),
        Some(&billing)
    );
    assert_eq!(billing.cards, []);
}

/// Every key of the crate's making is new, and those of tables with many inserts ascend.
#[test]
fn keys_ascend_where_many_are_inserted() {
    let keys: Vec<UserId> = (0..1000).map(|_| UserId::new()).collect();
    assert!(keys.is_sorted());
    assert_eq!(InstanceId::new().0.get_version_num(), 4);
    assert_eq!(TransactionId::new().0.get_version_num(), 7);
    assert_eq!(serde_json::to_value(keys[0]).unwrap(), keys[0].to_string());
}
