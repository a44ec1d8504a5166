//! The lock order: no two operations on one user's rows run into a deadlock, alone or composed in a
//! transaction.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Barrier, LazyLock, mpsc};
use std::thread;
use std::time::Duration;

use bruhmcp_db::crypto::{KeyRing, SecretColumn};
use bruhmcp_db::enums::AuthTokenType::{EmailOtp, PasswordReset, Refresh};
use bruhmcp_db::enums::{
    AuditStatus, AuthType, CreditSource, PaymentGateway, PlanPaymentStatus, SubscriptionStatus,
    TransactionStatus,
};
use bruhmcp_db::ids::{
    CredentialId, InstanceId, ServiceId, SubscriptionId, TransactionId, UserId, WebhookEventId,
};
use bruhmcp_db::models::*;
use bruhmcp_db::{ConstraintViolation, Durability, HashedToken, Sealed, StateDigest};
use chrono::{TimeDelta, Utc};
use diesel::connection::{InstrumentationEvent, SimpleConnection};
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::result::Error as DbError;
use serde_json::json;
use uuid::Uuid;

use crate::concurrency::Dice;
use crate::support::{self, TestDatabase, as_admin};
use crate::users::HASH;

/// Databases in which pairs race at the same time.
const LANES: usize = 12;

pub(crate) type Outcome = Result<bool, Box<dyn Error + Send + Sync>>;

/// An operation, the state it needs beside [`USER_WITH_ROWS`], and whether a composition can call
/// it.
pub(crate) struct Operation {
    pub(crate) name: &'static str,
    pub(crate) arrange: &'static str,
    pub(crate) run: fn(&mut PgConnection) -> Outcome,
    composes: bool,
}

impl Operation {
    /// Makes the state that the operation needs. `owner` is the tables' owner.
    pub(crate) fn set_up(&self, owner: &mut PgConnection) {
        owner.batch_execute(&USER_WITH_ROWS).unwrap();
        owner.batch_execute(self.arrange).unwrap();
    }

    /// Runs the operation once, which must do what its name says.
    pub(crate) fn succeed(&self, conn: &mut PgConnection) {
        let outcome = (self.run)(conn);
        assert!(matches!(outcome, Ok(true)), "{}: {outcome:?}", self.name);
    }
}

/// Calls `test` for each operation, with the state that it needs and a new connection as the service.
pub(crate) fn each_operation(mut test: impl FnMut(&Operation, &mut PgConnection)) {
    let database = support::database();
    let owner = &mut database.connect_as_owner();
    owner.batch_execute(SERVICES).unwrap();
    for operation in OPERATIONS {
        operation.set_up(owner);
        test(operation, &mut database.connect());
    }
}

const fn key(number: u128) -> Uuid {
    Uuid::from_u128(0x7000_8000_0000_0000_0000 + number)
}

pub(crate) const USER: UserId = UserId(key(1));
pub(crate) const GMAIL: ServiceId = ServiceId(key(2));
const FIGMA: ServiceId = ServiceId(key(3));
/// An API key of Gmail; active.
pub(crate) const KEYED: InstanceId = InstanceId(key(11));
/// An API key of Figma; inactive.
pub(crate) const INACTIVE: InstanceId = InstanceId(key(12));
/// Waits for its authorisation.
const PENDING: InstanceId = InstanceId(key(13));
/// Authorised; its access token ends soon.
pub(crate) const AUTHORISED: InstanceId = InstanceId(key(14));
/// Never authorised.
const ABANDONED: InstanceId = InstanceId(key(15));
/// Past its end.
const DUE: InstanceId = InstanceId(key(16));
pub(crate) const SUBSCRIPTION: SubscriptionId = SubscriptionId(key(21));
pub(crate) const PAYMENT: TransactionId = TransactionId(key(31));
const ORDER: TransactionId = TransactionId(key(32));
pub(crate) const OPEN_EVENT: WebhookEventId = WebhookEventId(key(41));
const DEAD_EVENT: WebhookEventId = WebhookEventId(key(42));

/// The credentials of an instance.
pub(crate) const fn of(instance: InstanceId) -> CredentialId {
    CredentialId(instance.0)
}

static OLD_RING: LazyLock<KeyRing> = LazyLock::new(|| KeyRing::new([(1, &[1; 32][..])]).unwrap());
static NEW_RING: LazyLock<KeyRing> =
    LazyLock::new(|| KeyRing::new([(2, &[2; 32][..]), (1, &[1; 32][..])]).unwrap());

fn sealed(instance: InstanceId, column: SecretColumn) -> Sealed {
    OLD_RING.seal(&"secret".into(), instance, column).unwrap()
}

pub(crate) fn tokens() -> OauthTokens<'static> {
    OauthTokens {
        access_token: sealed(AUTHORISED, SecretColumn::AccessToken),
        refresh_token: Some(sealed(AUTHORISED, SecretColumn::RefreshToken)),
        expires_at: Some(Utc::now() + TimeDelta::hours(1)),
        scope: None,
    }
}

fn token(type_: bruhmcp_db::enums::AuthTokenType, byte: u8) -> HashedToken {
    HashedToken::new(type_, [byte; 32])
}

fn hour() -> TimeDelta {
    TimeDelta::hours(1)
}

/// Deletes all users and events, and inserts one user with rows in all tables.
pub(crate) static USER_WITH_ROWS: LazyLock<String> = LazyLock::new(|| {
    let mut sql = format!(
        r#"
        DELETE FROM subscription_transactions;
        DELETE FROM account_credits;
        DELETE FROM user_subscriptions;
        DELETE FROM webhook_events;
        DELETE FROM users;
        INSERT INTO users (id, first_name, last_name, email, razorpay_customer_id)
        VALUES ('{USER}', 'Asha', 'Rao', 'asha@example.in', 'cust_1');
        UPDATE user_plans
           SET plan_type = 'pro', max_instances = NULL, customer_id = 'cust_1', payment_status = 'active';
        INSERT INTO auth_tokens (user_id, token, type, created_at, expires_at)
        VALUES ('{USER}', decode(repeat('01', 32), 'hex'), 'password_reset', now(), now() + interval '1 hour'),
               ('{USER}', decode(repeat('02', 32), 'hex'), 'email_otp', now(), now() + interval '1 hour');
        INSERT INTO auth_tokens
            (user_id, token, type, created_at, expires_at, used_at, is_used, family_id, session_expires_at)
        SELECT '{USER}', decode(repeat(byte, 32), 'hex'), 'refresh', now() - interval '2 hours',
               now() + lifetime::interval, used_at, used_at IS NOT NULL,
               '00000000-0000-4000-8000-0000000000f1', now() + interval '1 day'
          FROM (VALUES ('03', '1 hour', NULL), ('04', '1 hour', now() - interval '1 hour'),
                       ('05', '-1 hour', NULL)) AS token (byte, lifetime, used_at);
        INSERT INTO user_billing_details
            (user_id, address_line1, city, state, country, zip_code, cards)
        VALUES ('{USER}', '1 MG Road', 'Bengaluru', 'Karnataka', 'India', '560001', '[{{"id": "card_1",
            "token": "token_1", "brand": "visa", "last4": "4242", "exp_month": 1, "exp_year": 2040}}]');
        INSERT INTO user_subscriptions
            (id, user_id, plan_code, razorpay_subscription_id, razorpay_customer_id, next_billing_date)
        VALUES ('{SUBSCRIPTION}', '{USER}', 'pro', 'sub_1', 'cust_1', now());
        INSERT INTO subscription_transactions
            (id, user_id, subscription_id, razorpay_payment_id, amount, net_amount, status)
        VALUES ('{PAYMENT}', '{USER}', '{SUBSCRIPTION}', 'pay_1', 10000, 10000, 'captured'),
               ('{ORDER}', '{USER}', '{SUBSCRIPTION}', 'pay_2', 10000, 10000, 'created');
        INSERT INTO account_credits (user_id, amount, description)
        VALUES ('{USER}', 500, 'sorry'), ('{USER}', 500, 'again');
        INSERT INTO webhook_events (event_id, external_event_id, event_type, payment_gateway, payload)
        VALUES ('{OPEN_EVENT}', 'evt_1', 'a', 'razorpay', '{{"email": "asha@example.in"}}');
        INSERT INTO webhook_events
            (external_event_id, event_type, payment_gateway, payload, processing_status, processed_at, user_id)
        SELECT 'evt_' || n, 'a', 'razorpay', '{{"email": "asha@example.in"}}', 'processed', now() - interval '1 day',
               '{USER}'
          FROM generate_series(2, 4) AS n;
        INSERT INTO webhook_events
            (event_id, external_event_id, event_type, payment_gateway, payload, processing_status, processed_at,
             user_id, attempts)
        VALUES ('{DEAD_EVENT}', 'evt_5', 'a', 'razorpay', '{{"email": "asha@example.in"}}', 'failed', now(), '{USER}',
            {MAX_WEBHOOK_ATTEMPTS});
        INSERT INTO mcp_service_table (instance_id, user_id, mcp_service_id, status, expires_at)
        VALUES ('{KEYED}', '{USER}', '{GMAIL}', 'active', NULL),
               ('{INACTIVE}', '{USER}', '{FIGMA}', 'inactive', NULL),
               ('{PENDING}', '{USER}', '{GMAIL}', 'active', NULL),
               ('{AUTHORISED}', '{USER}', '{FIGMA}', 'active', NULL),
               ('{ABANDONED}', '{USER}', '{GMAIL}', 'active', NULL),
               ('{DUE}', '{USER}', '{GMAIL}', 'active', now() - interval '1 minute');
        "#,
    );
    let hex = |sealed: Sealed| {
        let bytes = sealed.as_ciphertext().iter();
        bytes.fold(String::from("\\x"), |mut hex, byte| {
            write!(hex, "{byte:02x}").unwrap();
            hex
        })
    };
    for instance in [KEYED, INACTIVE, DUE] {
        writeln!(
            sql,
            "INSERT INTO mcp_credentials (credential_id, instance_id, api_key, oauth_status, oauth_completed_at)
             VALUES ('{instance}', '{instance}', '{}', 'completed', now());",
            hex(sealed(instance, SecretColumn::ApiKey)),
        )
        .unwrap();
    }
    for (instance, state, updated_at) in [
        (
            PENDING,
            "decode(repeat('07', 32), 'hex'), now() + interval '1 hour'",
            "now()",
        ),
        (ABANDONED, "NULL, NULL", "now() - interval '1 day'"),
    ] {
        writeln!(
            sql,
            "INSERT INTO mcp_credentials (credential_id, instance_id, client_id, client_secret, oauth_state,
                 oauth_state_expires_at, updated_at)
             VALUES ('{instance}', '{instance}', 'client', '{}', {state}, {updated_at});",
            hex(sealed(instance, SecretColumn::ClientSecret)),
        )
        .unwrap();
    }
    writeln!(
        sql,
        "INSERT INTO mcp_credentials (credential_id, instance_id, client_id, client_secret, access_token,
             refresh_token, token_expires_at, oauth_status, oauth_completed_at)
         VALUES ('{AUTHORISED}', '{AUTHORISED}', 'client', '{}', '{}', '{}', now(), 'completed', now());",
        hex(sealed(AUTHORISED, SecretColumn::ClientSecret)),
        hex(sealed(AUTHORISED, SecretColumn::AccessToken)),
        hex(sealed(AUTHORISED, SecretColumn::RefreshToken)),
    )
    .unwrap();
    sql
});

pub(crate) const SERVICES: &str = "
    INSERT INTO mcp_table (mcp_service_id, mcp_service_name, display_name, port, type)
    VALUES ('00000000-0000-7000-8000-000000000002', 'gmail', 'Gmail', 4001, 'oauth'),
           ('00000000-0000-7000-8000-000000000003', 'figma', 'Figma', 4002, 'api_key')";

/// The account is old and has no money.
const UNVERIFIED: &str = "DELETE FROM subscription_transactions;
     DELETE FROM account_credits;
     DELETE FROM user_subscriptions;
     ALTER TABLE users DISABLE TRIGGER USER;
     UPDATE users SET razorpay_customer_id = NULL, updated_at = now() - interval '1 day';
     ALTER TABLE users ENABLE TRIGGER USER";

/// The plan has ended: [`UserPlan::expire_due`] has something to do.
const PLAN_ENDED: &str = "UPDATE user_plans SET expires_at = now() - interval '1 second'";

/// The plan follows the subscription, which has a period.
const SUBSCRIPTION_PAID: &str = "UPDATE user_subscriptions
    SET current_period_start = now() - interval '1 day';
    UPDATE user_plans SET subscription_id = 'sub_1'";

/// The subscription ends the plan: [`UserSubscription::sweep`] has something to do.
const SUBSCRIPTION_ENDED: &str = "UPDATE user_subscriptions
    SET cancel_at_period_end = true, current_period_start = now() - interval '30 days',
        current_period_end = now() - interval '1 day';
    UPDATE user_plans SET subscription_id = 'sub_1'";

const fn operation(name: &'static str, run: fn(&mut PgConnection) -> Outcome) -> Operation {
    Operation {
        name,
        arrange: "SELECT",
        run,
        composes: true,
    }
}

/// An operation that takes its rows from a queue of all users, works on no user's rows, or needs a
/// transaction of its own.
const fn worker(name: &'static str, run: fn(&mut PgConnection) -> Outcome) -> Operation {
    Operation {
        composes: false,
        ..operation(name, run)
    }
}

/// Every operation of the crate that writes. Each returns whether it did what its name says.
pub(crate) static OPERATIONS: &[Operation] = &[
    // users
    operation("User::sign_up", |conn| {
        Ok(User::sign_up(conn, &NewUser::new("Asha", "", "new@example.in")).map(|_| true)?)
    }),
    operation("User::update", |conn| {
        let changes = UserChangeset {
            razorpay_customer_id: Some(Some("cust_2")),
            ..Default::default()
        };
        Ok(User::update(conn, USER, &changes)?.is_some())
    }),
    operation("User::record_login", |conn| {
        Ok(User::record_login(conn, USER)?.is_some())
    }),
    operation("User::change_email", |conn| {
        Ok(User::change_email(conn, USER, "new@example.in", true)?.is_some())
    }),
    operation("User::change_password", |conn| {
        Ok(User::change_password(conn, USER, Some(&HASH.into()))?.is_some())
    }),
    operation("User::reset_password", |conn| {
        Ok(User::reset_password(conn, &token(PasswordReset, 1), &HASH.into()).map(|_| true)?)
    }),
    Operation {
        arrange: UNVERIFIED,
        ..operation("User::release_unverified", |conn| {
            let email = "asha@example.in";
            let release = User::release_unverified(conn, email, TimeDelta::hours(1))?;
            Ok(release == Release::Released(USER))
        })
    },
    operation("User::deactivate", |conn| {
        Ok(User::deactivate(conn, USER)?.is_some())
    }),
    operation("User::reactivate", |conn| {
        Ok(User::reactivate(conn, USER)?.is_some())
    }),
    operation("User::anonymise", |conn| {
        Ok(User::anonymise(conn, USER)?.is_some())
    }),
    operation("User::lock", |conn| {
        conn.transaction(|conn| Ok(User::lock(conn, USER)?.is_some()))
    }),
    // auth_tokens
    operation("AuthToken::issue a code", |conn| {
        Ok(AuthToken::issue(conn, USER, &token(EmailOtp, 20), hour())?.is_some())
    }),
    operation("AuthToken::issue a refresh token", |conn| {
        let random = HashedToken::new(Refresh, random_bytes());
        Ok(AuthToken::issue(conn, USER, &random, hour())?.is_some())
    }),
    operation("AuthToken::consume", |conn| {
        Ok(AuthToken::consume(conn, &token(PasswordReset, 1)).map(|_| true)?)
    }),
    worker("AuthToken::check_code, right", |conn| {
        let check = AuthToken::check_code(conn, USER, &token(EmailOtp, 2))?;
        Ok(matches!(check, CodeCheck::Right(_)))
    }),
    worker("AuthToken::check_code, wrong", |conn| {
        let check = AuthToken::check_code(conn, USER, &token(EmailOtp, 9))?;
        Ok(matches!(check, CodeCheck::Wrong { .. }))
    }),
    operation("AuthToken::rotate", |conn| {
        let successor = HashedToken::new(Refresh, random_bytes());
        let rotation = AuthToken::rotate(conn, &token(Refresh, 3), &successor, hour())?;
        Ok(matches!(rotation, Rotation::Rotated(_)))
    }),
    operation("AuthToken::rotate, reused", |conn| {
        let successor = HashedToken::new(Refresh, random_bytes());
        let rotation = AuthToken::rotate(conn, &token(Refresh, 4), &successor, hour())?;
        Ok(matches!(rotation, Rotation::Reused { .. }))
    }),
    operation("AuthToken::revoke", |conn| {
        Ok(AuthToken::revoke(conn, &token(Refresh, 3))?)
    }),
    operation("AuthToken::begin_session", |conn| {
        let random = HashedToken::new(Refresh, random_bytes());
        Ok(AuthToken::begin_session(conn, USER, &random, hour(), hour())?.is_some())
    }),
    operation("AuthToken::end_session", |conn| {
        let family = "00000000-0000-4000-8000-0000000000f1".parse()?;
        Ok(AuthToken::end_session(conn, USER, family)?)
    }),
    operation("AuthToken::revoke_all", |conn| {
        AuthToken::revoke_all(conn, USER, None)?;
        Ok(true)
    }),
    operation("AuthToken::purge", |conn| {
        Ok(AuthToken::purge(conn, TimeDelta::minutes(1), 100)? > 0)
    }),
    // user_plans
    operation("UserPlan::set_feature", |conn| {
        Ok(UserPlan::set_feature(conn, USER, "beta", Some(&json!(true)))?.is_some())
    }),
    operation("UserPlan::upgrade", |conn| {
        let pro = ProPlan {
            subscription_id: Some("sub_2"),
            ..ProPlan::default()
        };
        Ok(UserPlan::upgrade(conn, USER, &pro).map(|_| true)?)
    }),
    operation("UserPlan::downgrade", |conn| {
        let downgrade = UserPlan::downgrade(conn, USER, PlanPaymentStatus::Cancelled)?;
        Ok(downgrade.is_some_and(|downgrade| !downgrade.switched_off.is_empty()))
    }),
    Operation {
        arrange: PLAN_ENDED,
        ..operation("UserPlan::expire_due", |conn| {
            Ok(UserPlan::expire_due(conn)?.is_some())
        })
    },
    // user_subscriptions
    Operation {
        arrange: SUBSCRIPTION_PAID,
        ..operation("UserSubscription::apply", |conn| {
            let start = Utc::now() + TimeDelta::days(1);
            let end = start + TimeDelta::days(30);
            let event = GatewayEvent {
                razorpay_subscription_id: "sub_1",
                at: start,
                change: GatewayChange::Renewed {
                    period: GatewayPeriod { start, end },
                    payment: GatewayPayment {
                        razorpay_payment_id: "pay_4",
                        amount: 100,
                        fee_amount: 2,
                        currency: "INR",
                        at: start,
                        method: None,
                        failure_reason: None,
                    },
                },
            };
            let applied = UserSubscription::apply(conn, &event)?;
            Ok(applied.plan.expires_at > Some(end))
        })
    },
    Operation {
        arrange: SUBSCRIPTION_PAID,
        ..operation("UserSubscription::apply, halted", |conn| {
            let event = GatewayEvent {
                razorpay_subscription_id: "sub_1",
                at: Utc::now(),
                change: GatewayChange::Halted,
            };
            let applied = UserSubscription::apply(conn, &event)?;
            Ok(!applied.switched_off.is_empty())
        })
    },
    Operation {
        arrange: SUBSCRIPTION_ENDED,
        ..worker("UserSubscription::sweep", |conn| {
            let swept = UserSubscription::sweep(conn)?;
            Ok(swept.is_some_and(|swept| !swept.switched_off.is_empty()))
        })
    },
    operation("UserSubscription::start", |conn| {
        let new = NewUserSubscription::new(USER);
        Ok(UserSubscription::start(conn, &new, SubscriptionStatus::Created).map(|_| true)?)
    }),
    operation("UserSubscription::change_status", |conn| {
        let (from, to) = (SubscriptionStatus::Active, SubscriptionStatus::Paused);
        let changes = UserSubscriptionChangeset::default();
        Ok(
            UserSubscription::change_status(conn, SUBSCRIPTION, from, to, &changes)
                .map(|_| true)?,
        )
    }),
    operation("UserSubscription::upgrade", |conn| {
        let new = NewUserSubscription::new(USER);
        Ok(UserSubscription::upgrade(conn, SUBSCRIPTION, &new).map(|_| true)?)
    }),
    operation("UserSubscription::replace", |conn| {
        let new = NewUserSubscription::new(USER);
        Ok(UserSubscription::replace(conn, SUBSCRIPTION, &new).map(|_| true)?)
    }),
    operation("UserSubscription::record_failed_payment", |conn| {
        Ok(UserSubscription::record_failed_payment(conn, SUBSCRIPTION, None).map(|_| true)?)
    }),
    worker("UserSubscription::claim_due", |conn| {
        conn.transaction(|conn| {
            let claimed = UserSubscription::claim_due(conn, 10)?;
            for subscription in &claimed {
                UserSubscription::record_failed_payment(conn, subscription.id, None)?;
            }
            Ok(!claimed.is_empty())
        })
    }),
    worker("UserSubscription::claim_due, with a payment", |conn| {
        conn.transaction(|conn| {
            let claimed = UserSubscription::claim_due(conn, 10)?;
            for subscription in &claimed {
                let payment = NewSubscriptionTransaction {
                    razorpay_payment_id: Some("pay_3"),
                    ..NewSubscriptionTransaction::new(USER, 100, 100, TransactionStatus::Captured)
                };
                SubscriptionTransaction::record_payment(conn, &payment)?;
                UserSubscription::record_failed_payment(conn, subscription.id, None)?;
            }
            Ok(!claimed.is_empty())
        })
    }),
    // subscription_transactions
    operation("SubscriptionTransaction::record_payment", |conn| {
        let payment = NewSubscriptionTransaction {
            subscription_id: Some(SUBSCRIPTION),
            razorpay_payment_id: Some("pay_3"),
            ..NewSubscriptionTransaction::new(USER, 100, 100, TransactionStatus::Captured)
        };
        Ok(SubscriptionTransaction::record_payment(conn, &payment).map(|_| true)?)
    }),
    operation("SubscriptionTransaction::advance", |conn| {
        let changes = SubscriptionTransactionChangeset::default();
        let to = TransactionStatus::Captured;
        Ok(SubscriptionTransaction::advance(conn, ORDER, to, &changes).map(|_| true)?)
    }),
    operation("SubscriptionTransaction::refund", |conn| {
        let refund = NewRefund::new("rfnd_1", 10_000);
        Ok(SubscriptionTransaction::refund(conn, PAYMENT, &refund).map(|_| true)?)
    }),
    // account_credits
    operation("AccountCredit::grant", |conn| {
        let credit = NewAccountCredit {
            source_type: Some(CreditSource::Refund),
            source_id: Some("rfnd_1"),
            ..NewAccountCredit::new(USER, 100)
        };
        Ok(AccountCredit::grant(conn, &credit).map(|_| true)?)
    }),
    operation("AccountCredit::spend", |conn| {
        Ok(AccountCredit::spend(conn, USER, "INR", 700).map(|_| true)?)
    }),
    // user_billing_details
    operation("UserBillingDetails::upsert", |conn| {
        Ok(UserBillingDetails::upsert(conn, &address()).map(|_| true)?)
    }),
    Operation {
        arrange: "DELETE FROM user_billing_details",
        ..operation("UserBillingDetails::upsert, new", |conn| {
            Ok(UserBillingDetails::upsert(conn, &address()).map(|_| true)?)
        })
    },
    operation("UserBillingDetails::add_card", |conn| {
        let card = serde_json::from_value(json!({
            "id": "card_2", "token": "token_2", "brand": "visa", "last4": "4242", "exp_month": 1, "exp_year": 2040
        }))?;
        Ok(UserBillingDetails::add_card(conn, USER, &card).map(|_| true)?)
    }),
    operation("UserBillingDetails::set_default_card", |conn| {
        Ok(UserBillingDetails::set_default_card(conn, USER, "card_1").map(|_| true)?)
    }),
    operation("UserBillingDetails::remove_card", |conn| {
        Ok(UserBillingDetails::remove_card(conn, USER, "card_1").map(|_| true)?)
    }),
    // webhook_events
    worker("WebhookEvent::record", |conn| {
        let payload = json!({"email": "asha@example.in"});
        let event = NewWebhookEvent {
            event_id: None,
            external_event_id: "evt_9",
            event_type: "a",
            payment_gateway: PaymentGateway::Razorpay,
            payload: &payload,
        };
        WebhookEvent::record(conn, &event)?;
        Ok(true)
    }),
    worker("WebhookEvent::record_claimed", |conn| {
        let payload = json!({"email": "asha@example.in"});
        let event = NewWebhookEvent::new(PaymentGateway::Stripe, "evt_9", "a", &payload);
        match WebhookEvent::record_claimed(conn, &event, hour())? {
            Recorded::New(event) => {
                Ok(WebhookEvent::mark_processed(conn, &event, Some(USER)).map(|()| true)?)
            }
            Recorded::Existing(_) => Ok(false),
        }
    }),
    worker("WebhookEvent::claim", |conn| {
        match WebhookEvent::claim(conn, OPEN_EVENT, hour())? {
            Some(event) => Ok(WebhookEvent::mark_skipped(conn, &event, Some(USER)).map(|()| true)?),
            None => Ok(false),
        }
    }),
    worker("WebhookEvent::claim_due", |conn| {
        let claimed = WebhookEvent::claim_due(conn, hour(), 10)?;
        for event in &claimed {
            WebhookEvent::mark_failed(conn, event, Some(USER), "later")?;
        }
        Ok(!claimed.is_empty())
    }),
    worker("WebhookEvent::claim, with a payment", |conn| {
        let Some(event) = WebhookEvent::claim(conn, OPEN_EVENT, hour())? else {
            return Ok(false);
        };
        conn.transaction(|conn| {
            User::lock(conn, USER)?;
            let payment = NewSubscriptionTransaction {
                razorpay_payment_id: Some("pay_3"),
                ..NewSubscriptionTransaction::new(USER, 100, 100, TransactionStatus::Captured)
            };
            SubscriptionTransaction::record_payment(conn, &payment)?;
            UserSubscription::upgrade(conn, SUBSCRIPTION, &NewUserSubscription::new(USER))?;
            UserPlan::upgrade(conn, USER, &ProPlan::default())?;
            Ok(WebhookEvent::mark_processed(conn, &event, Some(USER)).map(|()| true)?)
        })
    }),
    worker("WebhookEvent::retry", |conn| {
        match WebhookEvent::retry(conn, DEAD_EVENT, hour())? {
            Some(event) => {
                Ok(WebhookEvent::mark_failed(conn, &event, None, "again").map(|()| true)?)
            }
            None => Ok(false),
        }
    }),
    worker("WebhookEvent::purge", |conn| {
        let before = Utc::now() - TimeDelta::hours(1);
        Ok(as_admin(conn, |conn| WebhookEvent::purge(conn, before, 2))? > 0)
    }),
    // mcp_table
    worker("McpService::register", |conn| {
        let name = format!("Gmail {}", Uuid::new_v4());
        let new = NewMcpService {
            display_name: &name,
            ..NewMcpService::new("gmail", 4001, AuthType::Oauth)
        };
        let service = as_admin(conn, |conn| McpService::register(conn, &new))?.into_inner();
        Ok(service.display_name == name)
    }),
    worker("McpService::set_enabled", |conn| {
        let service = as_admin(conn, |conn| McpService::set_enabled(conn, GMAIL, true))?;
        Ok(service.is_some())
    }),
    Operation {
        arrange: "UPDATE mcp_table SET active_instances_count = 70",
        ..worker("McpService::recount", |conn| {
            Ok(as_admin(conn, McpService::recount)?.len() == 2)
        })
    },
    // mcp_service_table
    operation("McpInstance::create", |conn| {
        let new = NewMcpInstance::new(USER, FIGMA);
        let credential = NewMcpCredential::api_key(&OLD_RING, new.instance_id, &"secret".into())?;
        Ok(McpInstance::create(conn, &new, &credential).map(|_| true)?)
    }),
    operation("McpInstance::activate", |conn| {
        Ok(McpInstance::activate(conn, INACTIVE, USER).map(|_| true)?)
    }),
    operation("McpInstance::deactivate", |conn| {
        Ok(McpInstance::deactivate(conn, KEYED, USER)?.is_some())
    }),
    operation("McpInstance::swap", |conn| {
        Ok(McpInstance::swap(conn, USER, KEYED, INACTIVE).map(|_| true)?)
    }),
    operation("McpInstance::rename", |conn| {
        let instance = McpInstance::find(conn, AUTHORISED)?;
        let version = instance.map_or(0, |instance| instance.version);
        Ok(McpInstance::rename(conn, AUTHORISED, USER, version, Some("Work")).map(|_| true)?)
    }),
    operation("McpInstance::rename, pending", |conn| {
        let instance = McpInstance::find(conn, PENDING)?;
        let version = instance.map_or(0, |instance| instance.version);
        Ok(McpInstance::rename(conn, PENDING, USER, version, Some("Work")).map(|_| true)?)
    }),
    operation("McpInstance::renew", |conn| {
        Ok(McpInstance::renew(conn, DUE, USER, None).map(|_| true)?)
    }),
    operation("McpInstance::delete", |conn| {
        Ok(McpInstance::delete(conn, AUTHORISED, USER)?)
    }),
    operation("McpInstance::delete, pending", |conn| {
        Ok(McpInstance::delete(conn, PENDING, USER)?)
    }),
    operation("McpInstance::record_call", |conn| {
        Ok(McpInstance::record_call(conn, AUTHORISED, Some(USER))?.is_ok())
    }),
    operation("McpInstance::record_calls", |conn| {
        let calls = [AUTHORISED, KEYED, INACTIVE].map(InstanceCalls::one);
        let locked = McpInstance::record_calls(conn, &calls, Durability::Synced)?;
        Ok(locked.len() < calls.len())
    }),
    operation("McpInstance::expire_due", |conn| {
        Ok(!McpInstance::expire_due(conn, 10)?.is_empty())
    }),
    operation("McpInstance::purge_abandoned", |conn| {
        Ok(!McpInstance::purge_abandoned(conn, &[ABANDONED], hour())?.is_empty())
    }),
    // mcp_credentials
    operation("McpCredential::begin_oauth", |conn| {
        let state = StateDigest::new(random_bytes());
        let lifetime = McpCredential::STATE_LIFETIME;
        let verifier = sealed(AUTHORISED, SecretColumn::OauthCodeVerifier);
        let begun =
            McpCredential::begin_oauth(conn, of(AUTHORISED), &state, lifetime, &verifier, None);
        Ok(begun.map(|_| true)?)
    }),
    operation("McpCredential::consume_state", |conn| {
        Ok(McpCredential::consume_state(conn, USER, &StateDigest::new([7; 32])).map(|_| true)?)
    }),
    operation("McpCredential::complete_oauth", |conn| {
        Ok(McpCredential::complete_oauth(conn, of(PENDING), &tokens()).map(|_| true)?)
    }),
    operation("McpCredential::fail_oauth", |conn| {
        Ok(McpCredential::fail_oauth(conn, of(PENDING)).map(|_| true)?)
    }),
    worker("McpCredential::claim_due, refreshed", |conn| {
        let claimed = claim_refresh(conn)?;
        for row in &claimed {
            McpCredential::store_refreshed(conn, row, &tokens())?;
        }
        Ok(!claimed.is_empty())
    }),
    worker("McpCredential::claim_due, refused", |conn| {
        let claimed = claim_refresh(conn)?;
        for row in &claimed {
            McpCredential::refresh_refused(conn, row)?;
        }
        Ok(!claimed.is_empty())
    }),
    worker("McpCredential::claim_due, failed", |conn| {
        let claimed = claim_refresh(conn)?;
        for row in &claimed {
            McpCredential::refresh_failed(conn, row, "network", None, TimeDelta::zero())?;
        }
        Ok(!claimed.is_empty())
    }),
    operation("McpCredential::lease_refresh", |conn| {
        let due = Utc::now() + hour();
        let lease = McpCredential::lease_refresh(conn, of(AUTHORISED), due, TimeDelta::zero())?;
        Ok(matches!(lease, RefreshLease::Leased(_)))
    }),
    operation("McpCredential::replace_api_key", |conn| {
        let Some(row) = McpCredential::find(conn, of(KEYED))? else {
            return Ok(false);
        };
        let key = sealed(KEYED, SecretColumn::ApiKey);
        Ok(McpCredential::replace_api_key(conn, of(KEYED), row.version, &key).map(|_| true)?)
    }),
    operation("McpCredential::replace_client", |conn| {
        let Some(row) = McpCredential::find(conn, of(AUTHORISED))? else {
            return Ok(false);
        };
        let secret = sealed(AUTHORISED, SecretColumn::ClientSecret);
        let (id, version) = (of(AUTHORISED), row.version);
        Ok(McpCredential::replace_client(conn, id, version, "client", &secret).map(|_| true)?)
    }),
    operation("McpCredential::reseal", |conn| {
        Ok(McpCredential::reseal(conn, &NEW_RING, None, 10)?.resealed > 0)
    }),
    // token_audit_log
    operation("TokenAudit::insert", |conn| {
        let audit = NewTokenAudit::new(KEYED, "a", AuditStatus::Success);
        TokenAudit::insert(conn, &audit)?;
        Ok(true)
    }),
    worker("TokenAudit::purge", |conn| {
        as_admin(conn, |conn| TokenAudit::purge(conn, 100))?;
        Ok(true)
    }),
];

fn claim_refresh(conn: &mut PgConnection) -> QueryResult<Vec<McpCredential>> {
    McpCredential::claim_due(conn, Utc::now() + hour(), TimeDelta::zero(), 10)
}

fn address() -> NewUserBillingDetails<'static> {
    NewUserBillingDetails {
        user_id: USER,
        address_line1: "2 MG Road",
        address_line2: None,
        city: "Bengaluru",
        state: "Karnataka",
        country: "India",
        zip_code: "560001",
    }
}

fn random_bytes() -> [u8; 32] {
    let half = Uuid::new_v4().into_bytes();
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(&half);
    bytes
}

/// One side of a race: an operation alone, or two in a transaction that begins with [`User::lock`].
#[derive(Clone, Copy)]
enum Side {
    Alone(&'static Operation),
    Composed(&'static Operation, &'static Operation),
}

impl Side {
    fn name(self) -> String {
        match self {
            Self::Alone(one) => one.name.to_owned(),
            Self::Composed(first, second) => format!("({}; {})", first.name, second.name),
        }
    }

    fn arrange(self, conn: &mut PgConnection) {
        let (one, other) = match self {
            Self::Alone(one) => (one, one),
            Self::Composed(first, second) => (first, second),
        };
        conn.batch_execute(one.arrange).unwrap();
        conn.batch_execute(other.arrange).unwrap();
    }

    fn run(self, conn: &mut PgConnection) -> Result<(), Unexpected> {
        match self {
            Self::Alone(one) => unexpected((one.run)(conn)),
            Self::Composed(first, second) => conn.transaction(|conn| {
                User::lock(conn, USER)?;
                for operation in [first, second] {
                    // A refusal rolls back a savepoint, not the other operation.
                    let outcome = conn.transaction(|conn| (operation.run)(conn).map_err(Refusal));
                    unexpected(outcome.map_err(|Refusal(error)| error))?;
                }
                Ok(())
            }),
        }
    }
}

struct Refusal(Box<dyn Error + Send + Sync>);

impl From<DbError> for Refusal {
    fn from(error: DbError) -> Self {
        Self(error.into())
    }
}

/// An error that is not an outcome of an operation, such as a deadlock.
struct Unexpected(String);

impl From<DbError> for Unexpected {
    fn from(error: DbError) -> Self {
        Self(error.to_string())
    }
}

/// Drops the outcome and the errors that name one; a violated constraint is an outcome too.
fn unexpected(outcome: Outcome) -> Result<(), Unexpected> {
    let Err(error) = outcome else {
        return Ok(());
    };
    let mut cause: Option<&(dyn Error + 'static)> = Some(&*error);
    while let Some(error) = cause {
        match error.downcast_ref::<DbError>() {
            Some(error) if ConstraintViolation::of(error).is_none() => {
                return Err(Unexpected(error.to_string()));
            }
            _ => {}
        }
        cause = error.source();
    }
    Ok(())
}

/// A database for the pairs of one thread, with two connections that race. The owner's stays open:
/// to compile the triggers anew for each pair would take most of the time.
struct Lane {
    database: TestDatabase,
    owner: PgConnection,
    racers: [PgConnection; 2],
    dice: Dice,
}

impl Lane {
    fn new(seed: u64) -> Self {
        let database = support::database();
        database.psql(SERVICES).unwrap();
        let racers = [seed, seed + 1].map(|seed| {
            let mut conn = database.connect_as_owner();
            // A superuser's setting. Without it, each deadlock takes a second.
            let _ = conn.batch_execute("SET deadlock_timeout = '10ms'");
            if *support::ROLES {
                conn.batch_execute("SET ROLE app_user").unwrap();
            }
            conn.set_instrumentation(stumble(seed));
            conn
        });
        Self {
            owner: database.connect_as_owner(),
            database,
            racers,
            dice: Dice(seed),
        }
    }

    /// Lets both sides run at once, several times, and returns what went wrong.
    fn race(&mut self, sides: [Side; 2], rounds: usize) -> Vec<String> {
        let conn = &mut self.owner;
        let mut wrong = Vec::new();
        for _ in 0..rounds {
            conn.batch_execute(&USER_WITH_ROWS).unwrap();
            sides.iter().for_each(|side| side.arrange(conn));
            // An operation of few statements must also meet the later ones of another.
            let head_start = Duration::from_millis(self.dice.roll(4) as u64 * 5);
            let late = self.dice.roll(2);
            let start = Barrier::new(2);
            let results = thread::scope(|scope| {
                let running: Vec<_> = self
                    .racers
                    .iter_mut()
                    .zip(sides)
                    .enumerate()
                    .map(|(n, (conn, side))| {
                        let start = &start;
                        scope.spawn(move || {
                            start.wait();
                            if n == late {
                                thread::sleep(head_start);
                            }
                            side.run(conn)
                        })
                    })
                    .collect();
                running
                    .into_iter()
                    .map(|side| side.join().unwrap())
                    .collect::<Vec<_>>()
            });
            for Unexpected(error) in results.into_iter().filter_map(Result::err) {
                let [one, other] = sides.map(Side::name);
                wrong.push(format!("{one} beside {other}: {error}"));
            }
        }
        wrong
    }

    fn deadlocks(mut self) -> i64 {
        for conn in &mut self.racers {
            conn.batch_execute("SELECT pg_stat_force_next_flush()")
                .unwrap();
        }
        let sql = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
        self.database.psql(sql).unwrap().trim().parse().unwrap()
    }
}

/// Waits up to 2 ms before each statement, so that the statements of two operations meet in many
/// orders.
fn stumble(seed: u64) -> impl FnMut(InstrumentationEvent<'_>) + Send {
    let mut dice = Dice(seed);
    move |event| {
        if let InstrumentationEvent::StartQuery { .. } = event {
            let micros = dice.roll(4) * 500;
            thread::sleep(Duration::from_micros(micros.try_into().unwrap()));
        }
    }
}

/// Races all pairs, and demands that no deadlock happens.
fn race_all(pairs: &[[Side; 2]], rounds: usize) {
    let next = AtomicUsize::new(0);
    let lanes: Vec<(Vec<String>, i64)> = thread::scope(|scope| {
        let lanes: Vec<_> = (0..LANES)
            .map(|lane| {
                let next = &next;
                scope.spawn(move || {
                    let mut lane = Lane::new(2 * u64::try_from(lane).unwrap());
                    let mut wrong = Vec::new();
                    while let Some(&sides) = pairs.get(next.fetch_add(1, Ordering::Relaxed)) {
                        wrong.extend(lane.race(sides, rounds));
                    }
                    (wrong, lane.deadlocks())
                })
            })
            .collect();
        lanes.into_iter().map(|lane| lane.join().unwrap()).collect()
    });
    let deadlocks: i64 = lanes.iter().map(|(_, deadlocks)| deadlocks).sum();
    let mut wrong: Vec<String> = lanes.into_iter().flat_map(|(wrong, _)| wrong).collect();
    wrong.sort();
    assert!(
        wrong.is_empty() && deadlocks == 0,
        "{deadlocks} deadlocks:\n{}",
        wrong.join("\n")
    );
}

/// The statements of every operation that writes, each with the operation's name.
pub(crate) fn statements() -> BTreeSet<(String, &'static str)> {
    let mut lane = Lane::new(0);
    let conn = &mut lane.owner;
    let (sender, seen) = mpsc::channel();
    for operation in OPERATIONS {
        conn.batch_execute(&USER_WITH_ROWS).unwrap();
        Side::Alone(operation).arrange(conn);
        let sender = sender.clone();
        lane.racers[0].set_instrumentation(move |event: InstrumentationEvent<'_>| {
            if let InstrumentationEvent::StartQuery { query, .. } = event {
                let query = query.to_string();
                let sql = query.split(" -- binds: ").next().unwrap_or_default();
                sender.send((sql.to_owned(), operation.name)).unwrap();
            }
        });
        operation.succeed(&mut lane.racers[0]);
    }
    seen.try_iter().collect()
}

#[test]
fn each_operation_does_what_its_name_says() {
    let mut lane = Lane::new(0);
    let conn = &mut lane.owner;
    let mut wrong = Vec::new();
    for operation in OPERATIONS {
        conn.batch_execute(&USER_WITH_ROWS).unwrap();
        Side::Alone(operation).arrange(conn);
        let outcome = (operation.run)(&mut lane.racers[0]);
        if !matches!(outcome, Ok(true)) {
            wrong.push((operation.name, outcome));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn no_two_operations_run_into_a_deadlock() {
    let mut pairs = Vec::new();
    for (n, one) in OPERATIONS.iter().enumerate() {
        for other in &OPERATIONS[n..] {
            pairs.push([Side::Alone(one), Side::Alone(other)]);
        }
    }
    race_all(&pairs, 2);
}

/// Compositions that lock rows in the opposite order to the operation beside them.
const AGAINST_THE_ORDER: &[(&str, &str, &str)] = &[
    (
        "McpInstance::rename, pending",
        "McpCredential::fail_oauth",
        "McpCredential::fail_oauth",
    ),
    (
        "McpInstance::rename, pending",
        "McpCredential::consume_state",
        "McpInstance::delete, pending",
    ),
    (
        "McpInstance::record_call",
        "McpCredential::begin_oauth",
        "McpCredential::begin_oauth",
    ),
    (
        "McpInstance::record_call",
        "McpCredential::replace_client",
        "McpCredential::claim_due, refreshed",
    ),
    (
        "McpInstance::rename",
        "McpCredential::begin_oauth",
        "McpCredential::claim_due, refused",
    ),
    (
        "McpInstance::deactivate",
        "McpCredential::replace_api_key",
        "McpCredential::replace_api_key",
    ),
    (
        "McpInstance::rename",
        "McpCredential::replace_client",
        "McpInstance::delete",
    ),
    (
        "McpInstance::activate",
        "McpInstance::deactivate",
        "UserPlan::downgrade",
    ),
    ("User::record_login", "UserPlan::upgrade", "User::anonymise"),
    (
        "AuthToken::issue a code",
        "UserSubscription::change_status",
        "UserSubscription::upgrade",
    ),
    (
        "UserSubscription::start",
        "UserSubscription::record_failed_payment",
        "UserSubscription::replace",
    ),
    (
        "AccountCredit::grant",
        "SubscriptionTransaction::advance",
        "SubscriptionTransaction::refund",
    ),
    (
        "SubscriptionTransaction::refund",
        "UserSubscription::change_status",
        "UserSubscription::upgrade",
    ),
    (
        "AuthToken::revoke_all",
        "User::change_email",
        "AccountCredit::spend",
    ),
    (
        "User::record_login",
        "UserSubscription::record_failed_payment",
        "UserSubscription::claim_due, with a payment",
    ),
    (
        "User::record_login",
        "User::anonymise",
        "UserSubscription::claim_due, with a payment",
    ),
    (
        "User::record_login",
        "User::anonymise",
        "McpCredential::claim_due, refreshed",
    ),
    // Both insert the same key; the foreign key of the one beside waits for the user.
    (
        "User::record_login",
        "UserBillingDetails::upsert, new",
        "UserBillingDetails::upsert, new",
    ),
    (
        "User::record_login",
        "SubscriptionTransaction::record_payment",
        "SubscriptionTransaction::record_payment",
    ),
    (
        "User::record_login",
        "AccountCredit::grant",
        "AccountCredit::grant",
    ),
    (
        "User::record_login",
        "UserSubscription::start",
        "UserSubscription::start",
    ),
];

#[test]
fn compositions_against_the_order_run_into_no_deadlock() {
    let named = |name: &str| {
        let mut operations = OPERATIONS.iter();
        let operation = operations.find(|operation| operation.name == name);
        operation.unwrap_or_else(|| panic!("there is no {name}"))
    };
    let pairs: Vec<_> = AGAINST_THE_ORDER
        .iter()
        .map(|(first, second, beside)| {
            let composed = Side::Composed(named(first), named(second));
            [composed, Side::Alone(named(beside))]
        })
        .collect();
    race_all(&pairs, 20);
}

#[test]
fn compositions_that_lock_the_user_first_run_into_no_deadlock() {
    let composing: Vec<&Operation> = OPERATIONS.iter().filter(|one| one.composes).collect();
    let mut dice = Dice(7);
    let mut any = |of: &[&'static Operation]| of[dice.roll(of.len())];
    let mut pairs = Vec::new();
    for first in &composing {
        for other in OPERATIONS {
            let composed = Side::Composed(first, any(&composing));
            pairs.push([composed, Side::Alone(other)]);
        }
        for _ in 0..4 {
            let composed = Side::Composed(first, any(&composing));
            let other = Side::Composed(any(&composing), any(&composing));
            pairs.push([composed, other]);
        }
    }
    race_all(&pairs, 1);
}
