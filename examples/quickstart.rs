//! A tutorial: from an empty database to a user on the pro plan.
//!
//! `script/quickstart` runs it. It creates a database, on a private server or on the server of
//! `DATABASE_URL`, and drops it at the end.

use std::error::Error;

use bruhmcp_db::crypto::{KeyRing, SecretColumn, TokenKey, TokenPurpose, new_code, new_secret};
use bruhmcp_db::enums::{
    AuditStatus, AuthType, CreditSource, PaymentGateway, SubscriptionPlan, SubscriptionStatus,
};
use bruhmcp_db::ids::{InstanceId, ServiceId, TransactionId, UserId};
use bruhmcp_db::migrations::{self, Event};
use bruhmcp_db::models::{
    AccountCredit, AuthToken, Card, CodeCheck, CredentialError, GatewayChange, GatewayEvent,
    GatewayPayment, GatewayPeriod, InstanceError, InstanceFilter, McpCredential, McpInstance,
    McpService, NewAccountCredit, NewMcpCredential, NewMcpInstance, NewMcpService, NewRefund,
    NewTokenAudit, NewUser, NewUserBillingDetails, NewUserSubscription, NewWebhookEvent,
    OauthTokens, PaymentError, Recorded, SubscriptionTransaction, TokenAudit, User,
    UserBillingDetails, UserPlan, UserSubscription, WebhookEvent,
};
use bruhmcp_db::views::TokenAuditSummary;
use bruhmcp_db::{Page, SecretText};
use bruhmcp_devdb::Server;
use chrono::{TimeDelta, Utc};
use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use serde_json::json;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result {
    let server = Server::from_env()?;
    let database = server.create_database()?;
    migrate(&database.url())?;
    let conn = &mut PgConnection::establish(&database.url())?;

    register_services(conn)?;
    let user = sign_up(conn)?;
    // In production, keys come from your secret store, 32 random bytes each: one for the digests of
    // one-time secrets, and those that seal credentials, with an id each, newest first.
    let digests = TokenKey::new(&[8; 32])?;
    let keys = KeyRing::new([(1, &[7; 32][..])])?;
    sign_in(conn, &digests, user.id)?;
    let figma = connect_figma(conn, &keys, user.id)?;
    call(conn, figma)?;
    reach_the_limit(conn, &keys, user.id)?;
    let payment = upgrade_once(conn, user.id)?;
    settle(conn, user.id, payment)?;
    let gmail = connect_gmail(conn, &digests, &keys, user.id)?;
    rename_twice(conn, user.id, figma)?;
    audit(conn, user.id, gmail)?;
    print_tables(conn)
}

fn heading(text: &str) {
    println!("\n{text}");
}

/// Applies the migrations. `diesel migration run` does the same during development.
fn migrate(url: &str) -> Result {
    heading("Migrations");
    migrations::runner(url)?
        .on_event(|event| {
            if let Event::Finished(step) = event {
                println!(
                    "  {:<42} {:>6.1} ms",
                    step.name,
                    step.duration.as_secs_f64() * 1e3
                );
            }
        })
        .run()?;
    Ok(())
}

/// Registers the services of a file, as the operator's job does each time it starts. A service that
/// exists is brought in line with the file.
fn register_services(conn: &mut PgConnection) -> Result {
    heading("Services");
    for time in ["first", "second"] {
        let [mut new, mut existing] = [0, 0];
        let mut file = csv::Reader::from_reader(include_str!("services.csv").as_bytes());
        for row in file.deserialize() {
            let row: ServiceRow = row?;
            let service = NewMcpService {
                mcp_service_name: &row.mcp_service_name,
                display_name: &row.display_name,
                description: Some(&row.description),
                icon_url_path: Some(&row.icon_url_path),
                port: row.port,
                type_: row.r#type,
            };
            match McpService::register(conn, &service)? {
                Recorded::New(_) => new += 1,
                Recorded::Existing(_) => existing += 1,
            }
        }
        println!("  {time} time: {new} new, {existing} existing");
    }
    Ok(())
}

#[derive(serde::Deserialize)]
struct ServiceRow {
    mcp_service_name: String,
    display_name: String,
    port: i32,
    r#type: AuthType,
    icon_url_path: String,
    description: String,
}

/// Creates an account with the free plan. The email address is stored in its canonical form.
fn sign_up(conn: &mut PgConnection) -> Result<User> {
    heading("Sign-up");
    // In production, a hash made by argon2 or a similar crate. Plain text is refused.
    let hash =
        SecretText::new("$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ$aGFzaGhhc2hoYXNoaGFzaGhhc2g");
    let new = NewUser {
        password: Some(&hash),
        ..NewUser::new("Asha", "Rao", "  Asha@Example.IN ")
    };
    let user = User::sign_up(conn, &new)?;
    let plan = UserPlan::find_by_user(conn, user.id)?.ok_or("no plan")?;
    println!("  {} has the plan {:?}", user.email, plan.plan_type);
    match User::sign_up(conn, &new) {
        Err(refused) => println!("  a second sign-up: {refused}"),
        Ok(_) => return Err("two accounts have the same address".into()),
    }
    Ok(user)
}

/// Signs in with a code that was mailed. Guesses are counted, and the session is a refresh token.
fn sign_in(conn: &mut PgConnection, digests: &TokenKey, user_id: UserId) -> Result {
    heading("Sign-in with a code");
    let code = new_code();
    let hash = |code: &SecretText| digests.hash(TokenPurpose::EmailOtp { user_id }, code);
    AuthToken::issue(conn, user_id, &hash(&code), TimeDelta::minutes(10))?;
    for guess in [&"a guess".into(), &code] {
        match AuthToken::check_code(conn, user_id, &hash(guess))? {
            CodeCheck::Wrong { attempts_left } => {
                println!("  wrong: {attempts_left} attempts are left");
            }
            CodeCheck::Right(_) => println!("  right"),
            other => return Err(format!("{other:?}").into()),
        }
    }
    let refresh = digests.hash(TokenPurpose::Refresh, &new_secret());
    let (days, half_a_year) = (TimeDelta::days(30), TimeDelta::days(180));
    AuthToken::begin_session(conn, user_id, &refresh, days, half_a_year)?;
    let sessions = AuthToken::list_sessions(conn, user_id)?;
    println!("  live sessions: {}", sessions.len());
    Ok(())
}

fn service_id(conn: &mut PgConnection, name: &str) -> Result<ServiceId> {
    let service = McpService::find_by_name(conn, name)?.ok_or("no such service")?;
    Ok(service.mcp_service_id)
}

fn new_instance(user_id: UserId, mcp_service_id: ServiceId) -> NewMcpInstance<'static> {
    NewMcpInstance {
        expires_at: Some(Utc::now() + TimeDelta::days(30)),
        ..NewMcpInstance::new(user_id, mcp_service_id)
    }
}

/// Connects a service by API key. The key is sealed in this process: the database sees only
/// ciphertext.
fn connect_figma(conn: &mut PgConnection, keys: &KeyRing, user_id: UserId) -> Result<InstanceId> {
    heading("Connect Figma with an API key");
    let new = new_instance(user_id, service_id(conn, "figma")?);
    let api_key = SecretText::from("figd_a_secret");
    let credential = NewMcpCredential::api_key(keys, new.instance_id, &api_key)?;
    let (instance, credential) = McpInstance::create(conn, &new, &credential)?;
    println!(
        "  instance {:?}, credentials {:?}",
        instance.status, credential.oauth_status
    );
    println!("  Debug shows: {:?}", credential.api_key);
    let opened = credential
        .open(keys, SecretColumn::ApiKey)?
        .ok_or("no key")?;
    println!("  the opened key is the same: {}", opened == api_key);
    Ok(instance.instance_id)
}

/// Makes three calls: each loads the instance with its service and credentials, and is counted.
fn call(conn: &mut PgConnection, instance_id: InstanceId) -> Result {
    for _ in 0..3 {
        let found = McpInstance::find_with_credentials(conn, instance_id, "figma", None)?;
        let (_, service, _) = found?;
        McpInstance::record_call(conn, instance_id, None)??;
        println!("  call to port {}", service.port);
    }
    let instance = McpInstance::find(conn, instance_id)?.ok_or("gone")?;
    println!(
        "  {} calls counted, version still {}",
        instance.usage_count, instance.version
    );
    Ok(())
}

/// The free plan allows one active instance, also when several requests arrive at once.
fn reach_the_limit(conn: &mut PgConnection, keys: &KeyRing, user_id: UserId) -> Result {
    heading("Activate a second instance on the free plan");
    let new = new_instance(user_id, service_id(conn, "airtable")?);
    let credential = NewMcpCredential::api_key(keys, new.instance_id, &"pat_a_secret".into())?;
    match McpInstance::create(conn, &new, &credential) {
        Err(refused @ InstanceError::LimitReached) => println!("  refused: {refused}"),
        Err(other) => return Err(other.into()),
        Ok(_) => return Err("the plan limit was not enforced".into()),
    }
    Ok(())
}

/// A gateway may deliver an event several times. It is recorded first and processed once: the
/// subscription becomes active, its payment is recorded, and the plan becomes pro.
fn upgrade_once(conn: &mut PgConnection, user_id: UserId) -> Result<TransactionId> {
    heading("Upgrade the plan by a webhook that arrives twice");
    let new = NewUserSubscription {
        plan_code: Some(SubscriptionPlan::Pro),
        razorpay_subscription_id: Some("sub_1"),
        razorpay_customer_id: Some("cust_1"),
        ..NewUserSubscription::new(user_id)
    };
    UserSubscription::start(conn, &new, SubscriptionStatus::Created)?;

    let payload = json!({"event": "subscription.activated", "payment": "pay_1", "amount": 49900});
    let webhook = NewWebhookEvent {
        event_id: None,
        external_event_id: "evt_1",
        event_type: "subscription.activated",
        payment_gateway: PaymentGateway::Razorpay,
        payload: &payload,
    };
    let at = Utc::now();
    let activated = GatewayEvent {
        razorpay_subscription_id: "sub_1",
        at,
        change: GatewayChange::Activated {
            period: GatewayPeriod {
                start: at,
                end: at + TimeDelta::days(30),
            },
            payment: Some(GatewayPayment {
                razorpay_payment_id: "pay_1",
                amount: 49900,
                fee_amount: 1178,
                currency: "INR",
                at,
                method: Some("upi"),
                failure_reason: None,
            }),
        },
    };
    let mut paid = None;
    for _ in 0..2 {
        let event = match WebhookEvent::record_claimed(conn, &webhook, TimeDelta::minutes(1))? {
            Recorded::New(event) => event,
            Recorded::Existing(event) => {
                println!("  duplicate of {}: nothing to do", event.external_event_id);
                continue;
            }
        };
        conn.transaction(|conn| -> Result {
            let applied = UserSubscription::apply(conn, &activated)?;
            WebhookEvent::mark_processed(conn, &event, Some(user_id))?;
            println!(
                "  subscription {:?}, plan {:?}",
                applied.subscription.status, applied.plan.plan_type
            );
            paid = applied.payment;
            Ok(())
        })?;
    }
    Ok(paid.ok_or("no payment")?.id)
}

/// Refunds part of a payment, uses a credit, and saves a card.
fn settle(conn: &mut PgConnection, user_id: UserId, payment: TransactionId) -> Result {
    heading("Refund, credit and card");
    for (refund_id, amount) in [("rfnd_1", 10_000), ("rfnd_1", 10_000), ("rfnd_2", 40_000)] {
        match SubscriptionTransaction::refund(conn, payment, &NewRefund::new(refund_id, amount)) {
            Ok(Recorded::New(row)) => println!("  refunded: {} paise", row.amount),
            Ok(Recorded::Existing(_)) => println!("  {refund_id} was recorded before"),
            Err(refused @ PaymentError::ExceedsPayment { .. }) => println!("  refused: {refused}"),
            Err(other) => return Err(other.into()),
        }
    }
    let promotion = NewAccountCredit {
        source_type: Some(CreditSource::Promotion),
        ..NewAccountCredit::new(user_id, 5_000)
    };
    AccountCredit::grant(conn, &promotion)?;
    AccountCredit::spend(conn, user_id, "INR", 2_000)?;
    let balance = AccountCredit::balance(conn, user_id, "INR")?;
    println!("  credit left: {balance} paise");

    let address = NewUserBillingDetails {
        user_id,
        address_line1: "1 MG Road",
        address_line2: None,
        city: "Bengaluru",
        state: "Karnataka",
        country: "India",
        zip_code: "560001",
    };
    UserBillingDetails::upsert(conn, &address)?;
    // The gateway keeps the number, and gives a token for it.
    let card = Card {
        id: "card_1".to_owned(),
        token: "token_secret".into(),
        brand: "visa".to_owned(),
        last4: "4242".to_owned(),
        exp_month: 12,
        exp_year: 2040,
    };
    let details = UserBillingDetails::add_card(conn, user_id, &card)?;
    println!("  saved for its owner: {}", json!(details.cards));
    Ok(())
}

/// Connects a service by OAuth: the user leaves with a state and returns with it.
fn connect_gmail(
    conn: &mut PgConnection,
    digests: &TokenKey,
    keys: &KeyRing,
    user_id: UserId,
) -> Result<InstanceId> {
    heading("Connect Gmail with OAuth");
    let new = new_instance(user_id, service_id(conn, "gmail")?);
    let client =
        NewMcpCredential::oauth(keys, new.instance_id, "client-1", &"client_secret".into())?;
    let (instance, credential) = McpInstance::create(conn, &new, &client)?;
    println!("  created: {:?}", instance.oauth_status);

    // The user leaves for the provider with the state and the challenge of the verifier in the URL.
    let state = digests.hash_state(&new_secret());
    let id = credential.credential_id;
    let verifier = keys.seal(
        &new_secret(),
        new.instance_id,
        SecretColumn::OauthCodeVerifier,
    )?;
    let lifetime = McpCredential::STATE_LIFETIME;
    McpCredential::begin_oauth(conn, id, &state, lifetime, &verifier, None)?;

    // The callback, in the session of the user: a state can be used once.
    let credential = McpCredential::consume_state(conn, user_id, &state)?;
    if let Err(refused) = McpCredential::consume_state(conn, user_id, &state) {
        println!("  the same state a second time: {refused}");
    }
    // Here the backend asks the provider for the tokens.
    let tokens = |number: u32| {
        OauthTokens::seal(
            keys,
            credential.instance_id,
            &format!("access_secret_{number}").into(),
            Some(&format!("refresh_secret_{number}").into()),
            Some(Utc::now() + TimeDelta::hours(1)),
            Some("mail.read"),
        )
    };
    let completed = McpCredential::complete_oauth(conn, credential.credential_id, &tokens(1)?)?;
    println!("  completed: the instance is {:?}", completed.instance);

    // Two workers read this version and refresh the tokens. The second gets a conflict.
    let read = completed.credential;
    for worker in [1, 2] {
        match McpCredential::store_refreshed(conn, &read, &tokens(worker + 1)?) {
            Ok(row) => println!(
                "  refreshed by worker {worker}: version {} to {}",
                read.version, row.version
            ),
            Err(CredentialError::Conflict(row)) => {
                println!(
                    "  worker {worker} is refused: the version is {}",
                    row.version
                )
            }
            Err(other) => return Err(other.into()),
        }
    }
    Ok(instance.instance_id)
}

/// Two browsers read the same version and both write. The second gets the current row instead.
fn rename_twice(conn: &mut PgConnection, user_id: UserId, instance_id: InstanceId) -> Result {
    heading("Optimistic locking");
    let read = McpInstance::find(conn, instance_id)?.ok_or("gone")?;
    for name in ["Design", "Drafts"] {
        match McpInstance::rename(conn, instance_id, user_id, read.version, Some(name)) {
            Ok(row) => println!(
                "  renamed to {name}, version {} to {}",
                read.version, row.version
            ),
            Err(InstanceError::Conflict(row)) => {
                println!(
                    "  not renamed to {name}: the name is {:?} now, version {}",
                    row.custom_name, row.version
                );
            }
            Err(other) => return Err(other.into()),
        }
    }
    Ok(())
}

/// Appends to the audit log, reads its summary, and shows that rows can't be deleted.
fn audit(conn: &mut PgConnection, user_id: UserId, instance_id: InstanceId) -> Result {
    heading("Audit");
    for status in [
        AuditStatus::Success,
        AuditStatus::Success,
        AuditStatus::Failure,
    ] {
        TokenAudit::insert(
            conn,
            &NewTokenAudit {
                user_id: Some(user_id),
                method: Some("oauth"),
                ..NewTokenAudit::new(instance_id, "list_messages", status)
            },
        )?;
    }
    for row in TokenAuditSummary::list_by_instance(conn, instance_id)? {
        println!(
            "  {:<14} {:<8} {}",
            row.operation,
            format!("{:?}", row.status),
            row.operation_count
        );
    }
    match conn.batch_execute("DELETE FROM token_audit_log") {
        Err(refused) => println!("  DELETE: {refused}"),
        Ok(()) => return Err("a row of the audit log was deleted".into()),
    }
    Ok(())
}

fn print_tables(conn: &mut PgConnection) -> Result {
    use bruhmcp_db::schema as s;

    heading("Instances");
    let user = User::list(conn, Page::first(1))?.pop().ok_or("no user")?;
    for row in McpInstance::list_by_user(conn, user.id, InstanceFilter::default(), Page::first(10))?
    {
        let name = row.instance.custom_name.unwrap_or_default();
        println!(
            "  {:<8} {name:<8} {:?}, {:?}, {} calls",
            row.service.display_name,
            row.instance.status,
            row.instance.oauth_status,
            row.instance.usage_count
        );
    }
    heading("Rows");
    macro_rules! count {
        ($($table:ident)*) => {$(
            let rows: i64 = s::$table::table.count().get_result(conn)?;
            println!("  {:<26} {rows}", stringify!($table));
        )*};
    }
    count! {
        users auth_tokens user_subscriptions subscription_transactions account_credits mcp_table mcp_service_table
        mcp_credentials token_audit_log user_plans webhook_events user_billing_details
    }
    Ok(())
}
