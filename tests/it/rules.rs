//! Statements that violate the database's constraints, and the name that a caller sees.

use std::collections::BTreeSet;

use bruhmcp_db::{ConstraintKind, ConstraintViolation};
use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_types::Text;

use crate::difference::assert_same_set;
use crate::support::{TestDatabase, database};

/// Replaces `:u1` and the like with UUIDs, the same ones each time.
pub(crate) fn with_keys(sql: &str) -> String {
    let mut out = String::new();
    let mut rest = sql;
    while let Some(at) = rest.find(':') {
        let (before, key) = rest.split_at(at);
        out.push_str(before);
        let mut chars = key[1..].chars();
        match (chars.next(), chars.next()) {
            (Some(letter @ 'a'..='z'), Some(digit @ '0'..='9')) => {
                let key_number = u32::from(letter) * 0x100 + digit as u32;
                out.push_str(&format!("'00000000-0000-4000-8000-{key_number:012x}'"));
                rest = &key[3..];
            }
            _ => {
                out.push(':');
                rest = &key[1..];
            }
        }
    }
    out + rest
}

/// A migrated database with the rows of `tests/fixtures/rows.sql`.
pub(crate) fn database_with_rows() -> TestDatabase {
    let database = database();
    let rows = with_keys(include_str!("../fixtures/rows.sql"));
    database.connect_as_owner().batch_execute(&rows).unwrap();
    database
}

/// A constraint, and a statement that violates it on the rows of `tests/fixtures/rows.sql`.
#[rustfmt::skip]
const VIOLATIONS: &[(&str, &str)] = &[
    ("users_pkey",
        "INSERT INTO users (id, first_name, last_name, email) VALUES
            (:u1, 'a', '', 'new@example.in')"),
    ("users_email_key",
        "INSERT INTO users (first_name, last_name, email) VALUES ('a', '', 'asha@example.in')"),
    ("users_razorpay_customer_id_key",
        "UPDATE users SET razorpay_customer_id = 'cust_1' WHERE id = :u2"),
    ("users_first_name_check", "UPDATE users SET first_name = '' WHERE id = :u1"),
    ("users_first_name_check", "UPDATE users SET first_name = repeat('é', 256) WHERE id = :u1"),
    ("users_last_name_check", "UPDATE users SET last_name = repeat('é', 256) WHERE id = :u1"),
    ("users_email_canonical", "UPDATE users SET email = 'Asha@example.in' WHERE id = :u1"),
    ("users_email_canonical", "UPDATE users SET email = ' asha@example.in' WHERE id = :u1"),
    ("users_email_canonical", "UPDATE users SET email = E'asha@example.in\\n' WHERE id = :u1"),
    ("users_email_canonical", "UPDATE users SET email = 'asha.example.in' WHERE id = :u1"),
    ("users_email_canonical", "UPDATE users SET email = 'a@b@example.in' WHERE id = :u1"),
    ("users_email_canonical", "UPDATE users SET email = 'a@' WHERE id = :u1"),
    ("users_email_canonical",
        "UPDATE users SET email = repeat('a', 245) || '@example.in' WHERE id = :u1"),
    ("users_email_canonical", "UPDATE users SET email = E'a\\u0001@example.in' WHERE id = :u1"),
    ("users_email_canonical", "UPDATE users SET email = E'a\\u0085@example.in' WHERE id = :u1"),
    ("users_email_canonical", "UPDATE users SET email = '<a@example.in>' WHERE id = :u1"),
    ("users_email_canonical", "UPDATE users SET email = 'a\\b@example.in' WHERE id = :u1"),
    ("users_email_canonical", "UPDATE users SET email = 'a@bücher.example' WHERE id = :u1"),
    ("users_password_check", "UPDATE users SET password = 'hunter2' WHERE id = :u1"),
    ("users_password_check", "UPDATE users SET password = '$hunter2' WHERE id = :u1"),
    ("users_password_check",
        "UPDATE users SET password = '$a$' || repeat('correct horse ', 4) WHERE id = :u1"),
    ("users_password_check",
        "UPDATE users SET password = '$a$' || repeat('b', 490) || '$' || repeat('c', 22)
            WHERE id = :u1"),
    ("users_razorpay_customer_id_check",
        "UPDATE users SET razorpay_customer_id = '' WHERE id = :u1"),
    ("users_anonymised",
        "UPDATE users SET email = id || '@anonymised.invalid', is_active = false WHERE id = :u1;
         UPDATE users SET email_verified = email_verified WHERE id = :u1;
         UPDATE users SET is_active = true WHERE id = :u1"),

    ("auth_tokens_pkey", "INSERT INTO auth_tokens (id, user_id, token, type, expires_at)
        VALUES (:t1, :u2, decode(repeat('09', 32), 'hex'), 'password_reset', now() + interval '1 day')"),
    ("auth_tokens_user_id_fkey", "INSERT INTO auth_tokens (user_id, token, type, expires_at)
        VALUES (:u9, decode(repeat('09', 32), 'hex'), 'password_reset', now() + interval '1 day')"),
    ("auth_tokens_token_key", "INSERT INTO auth_tokens (user_id, token, type, expires_at)
        VALUES (:u2, decode(repeat('01', 32), 'hex'), 'password_reset', now() + interval '1 day')"),
    ("auth_tokens_token_check", "INSERT INTO auth_tokens (user_id, token, type, expires_at)
        VALUES (:u2, decode(repeat('09', 31), 'hex'), 'password_reset', now() + interval '1 day')"),
    ("auth_tokens_token_check", "INSERT INTO auth_tokens (user_id, token, type, expires_at)
        VALUES (:u2, decode(repeat('09', 33), 'hex'), 'password_reset', now() + interval '1 day')"),
    ("auth_tokens_expires_at_check",
        "UPDATE auth_tokens SET expires_at = created_at WHERE id = :t1"),
    ("auth_tokens_attempts_check", "INSERT INTO auth_tokens (user_id, token, type, expires_at, attempts)
        VALUES (:u2, decode(repeat('09', 32), 'hex'), 'password_reset', now() + interval '1 day', -1)"),
    ("auth_tokens_one_live_per_type", "INSERT INTO auth_tokens (user_id, token, type, expires_at)
        VALUES (:u1, decode(repeat('09', 32), 'hex'), 'email_otp', now() + interval '1 hour')"),
    ("auth_tokens_used_at_check", "UPDATE auth_tokens SET is_used = true WHERE id = :t1"),
    ("auth_tokens_used_at_check", "UPDATE auth_tokens SET used_at = now() WHERE id = :t1"),
    ("auth_tokens_family_id_check", "INSERT INTO auth_tokens
            (user_id, token, type, expires_at, session_expires_at)
        VALUES (:u2, decode(repeat('09', 32), 'hex'), 'refresh', now() + interval '1 day', now() + interval '1 day')"),
    ("auth_tokens_family_id_check", "INSERT INTO auth_tokens
            (user_id, token, type, expires_at, family_id)
        VALUES (:u2, decode(repeat('09', 32), 'hex'), 'password_reset', now() + interval '1 day', :f1)"),
    ("auth_tokens_session_expires_at_check", "INSERT INTO auth_tokens
            (user_id, token, type, expires_at, family_id)
        VALUES (:u2, decode(repeat('09', 32), 'hex'), 'refresh', now() + interval '1 day', :f1)"),
    ("auth_tokens_session_expires_at_check", "INSERT INTO auth_tokens
            (user_id, token, type, expires_at, session_expires_at)
        VALUES (:u2, decode(repeat('09', 32), 'hex'), 'password_reset', now() + interval '1 day',
            now() + interval '1 day')"),
    ("auth_tokens_session_expires_at_check",
        "UPDATE auth_tokens SET expires_at = session_expires_at + interval '1 second' WHERE id = :t1"),
    ("auth_tokens_lifetime",
        "UPDATE auth_tokens SET expires_at = created_at + interval '61 minutes' WHERE id = :t2"),
    ("auth_tokens_lifetime", "INSERT INTO auth_tokens (user_id, token, type, expires_at)
        VALUES (:u2, decode(repeat('09', 32), 'hex'), 'email_verification', now() + interval '169 hours')"),
    ("auth_tokens_lifetime", "INSERT INTO auth_tokens
            (user_id, token, type, expires_at, family_id, session_expires_at)
        VALUES (:u2, decode(repeat('09', 32), 'hex'), 'refresh', now() + interval '1 day', :f1,
            now() + interval '366 days')"),
    ("auth_tokens_fixed", "UPDATE auth_tokens SET user_id = :u2 WHERE id = :t1"),
    ("auth_tokens_fixed",
        "UPDATE auth_tokens SET token = decode(repeat('09', 32), 'hex') WHERE id = :t1"),
    ("auth_tokens_fixed", "UPDATE auth_tokens SET type = 'email_change_pending' WHERE id = :t2"),
    ("auth_tokens_fixed",
        "UPDATE auth_tokens SET created_at = now() + interval '1 day',
                                expires_at = now() + interval '2 days' WHERE id = :t1"),
    ("auth_tokens_fixed", "UPDATE auth_tokens SET family_id = :f2 WHERE id = :t1"),
    ("auth_tokens_fixed",
        "UPDATE auth_tokens SET session_expires_at = session_expires_at + interval '1 day' WHERE id = :t1"),
    ("auth_tokens_fixed", "UPDATE auth_tokens SET is_used = true, used_at = now() WHERE id = :t1;
        UPDATE auth_tokens SET is_used = false, used_at = NULL WHERE id = :t1"),
    ("auth_tokens_fixed", "UPDATE auth_tokens SET is_used = true, used_at = now() WHERE id = :t1;
        UPDATE auth_tokens SET used_at = now() + interval '1 second' WHERE id = :t1"),
    ("auth_tokens_fixed", "UPDATE auth_tokens SET attempts = 2 WHERE id = :t2;
        UPDATE auth_tokens SET attempts = 1 WHERE id = :t2"),

    ("user_subscriptions_pkey", "INSERT INTO user_subscriptions (id, user_id) VALUES (:s1, :u2)"),
    ("user_subscriptions_user_id_fkey", "INSERT INTO user_subscriptions (user_id) VALUES (:u9)"),
    ("user_subscriptions_user_id_fkey",
        "DELETE FROM subscription_transactions; DELETE FROM account_credits;
        DELETE FROM users WHERE id = :u1"),
    ("user_subscriptions_razorpay_subscription_id_key",
        "INSERT INTO user_subscriptions (user_id, razorpay_subscription_id) VALUES (:u2, 'sub_1')"),
    ("user_subscriptions_one_live_per_user",
        "INSERT INTO user_subscriptions (user_id, status) VALUES (:u1, 'paused')"),
    ("user_subscriptions_current_period_check",
        "UPDATE user_subscriptions SET current_period_end = current_period_start"),
    ("user_subscriptions_trial_check", "UPDATE user_subscriptions SET trial_end = now()"),
    ("user_subscriptions_trial_check",
        "UPDATE user_subscriptions SET trial_start = now(), trial_end = now()"),
    ("user_subscriptions_cancelled_at_check",
        "UPDATE user_subscriptions SET status = 'cancelled'"),
    ("user_subscriptions_status_final",
        "UPDATE user_subscriptions SET status = 'completed';
        UPDATE user_subscriptions SET status = 'active'"),
    ("user_subscriptions_status_final",
        "UPDATE user_subscriptions SET status = 'upgraded';
        UPDATE user_subscriptions SET status = 'cancelled', cancelled_at = now()"),
    ("user_subscriptions_status_final",
        "UPDATE user_subscriptions SET status = 'replaced';
        UPDATE user_subscriptions SET status = 'upgraded'"),
    ("user_subscriptions_pause_count_check", "UPDATE user_subscriptions SET pause_count = -1"),
    ("user_subscriptions_discount_amount_check",
        "UPDATE user_subscriptions SET discount_amount = -1"),
    ("user_subscriptions_tax_amount_check", "UPDATE user_subscriptions SET tax_amount = -1"),
    ("user_subscriptions_total_amount_check", "UPDATE user_subscriptions SET total_amount = -1"),
    ("user_subscriptions_grace_period_days_check",
        "UPDATE user_subscriptions SET grace_period_days = -1"),
    ("user_subscriptions_failed_payment_count_check",
        "UPDATE user_subscriptions SET failed_payment_count = -1"),

    ("subscription_transactions_pkey",
        "INSERT INTO subscription_transactions (id, user_id, amount, net_amount, status)
        VALUES (:x1, :u1, 1, 1, 'created')"),
    ("subscription_transactions_user_id_fkey",
        "INSERT INTO subscription_transactions (user_id, amount, net_amount, status)
        VALUES (:u9, 1, 1, 'created')"),
    ("subscription_transactions_user_id_fkey", "DELETE FROM account_credits;
        UPDATE subscription_transactions SET subscription_id = NULL; DELETE FROM user_subscriptions;
        DELETE FROM users WHERE id = :u1"),
    ("subscription_transactions_subscription_id_fkey",
        "UPDATE subscription_transactions SET subscription_id = :s9"),
    ("subscription_transactions_subscription_id_fkey",
        "DELETE FROM user_subscriptions WHERE id = :s1"),
    ("subscription_transactions_parent_transaction_id_fkey",
        "INSERT INTO subscription_transactions
            (user_id, amount, net_amount, status, parent_transaction_id)
        VALUES (:u1, 1, 1, 'created', :x9)"),
    ("subscription_transactions_parent_transaction_id_check",
        "INSERT INTO subscription_transactions
            (id, user_id, amount, net_amount, status, parent_transaction_id)
        VALUES (:x9, :u1, 1, 1, 'created', :x9)"),
    ("subscription_transactions_razorpay_payment_id_key",
        "INSERT INTO subscription_transactions
            (user_id, amount, net_amount, status, razorpay_payment_id)
         VALUES (:u2, 1, 1, 'created', 'pay_1')"),
    ("subscription_transactions_receipt_number_key",
        "INSERT INTO subscription_transactions (user_id, amount, net_amount, status, receipt_number)
         VALUES (:u2, 1, 1, 'created', 'receipt_1')"),
    ("subscription_transactions_amount_check",
        "INSERT INTO subscription_transactions (user_id, amount, net_amount, status)
        VALUES (:u1, -1, 0, 'created')"),
    ("subscription_transactions_tax_amount_check",
        "UPDATE subscription_transactions SET tax_amount = -1"),
    ("subscription_transactions_discount_amount_check",
        "UPDATE subscription_transactions SET discount_amount = -1"),
    ("subscription_transactions_fee_amount_check",
        "UPDATE subscription_transactions SET fee_amount = -1"),
    ("subscription_transactions_net_amount_check",
        "UPDATE subscription_transactions SET net_amount = -1"),
    ("subscription_transactions_net_amount_check",
        "UPDATE subscription_transactions SET net_amount = amount + 1"),
    ("subscription_transactions_currency_check",
        "INSERT INTO subscription_transactions (user_id, amount, net_amount, status, currency)
        VALUES (:u1, 1, 1, 'created', 'inr')"),
    ("subscription_transactions_currency_check",
        "INSERT INTO subscription_transactions (user_id, amount, net_amount, status, currency)
        VALUES (:u1, 1, 1, 'created', 'INRX')"),
    ("subscription_transactions_exchange_rate_check",
        "UPDATE subscription_transactions SET exchange_rate = 0"),
    ("subscription_transactions_exchange_rate_check",
        "UPDATE subscription_transactions SET exchange_rate = 'NaN'"),
    ("subscription_transactions_retry_count_check",
        "UPDATE subscription_transactions SET retry_count = -1"),
    ("subscription_transactions_no_card_secrets",
        r#"UPDATE subscription_transactions SET method_details_json = '{"card": {"CVV": "1"}}'"#),
    ("subscription_transactions_fixed", "UPDATE subscription_transactions SET amount = 1"),
    ("subscription_transactions_status", "UPDATE subscription_transactions SET status = 'failed'"),
    ("subscription_transactions_refund_of_parent",
        "INSERT INTO subscription_transactions
            (user_id, transaction_type, amount, net_amount, status)
        VALUES (:u1, 'refund', -1, -1, 'captured')"),
    ("subscription_transactions_refund_of_parent",
        "INSERT INTO subscription_transactions
            (user_id, transaction_type, amount, net_amount, status, parent_transaction_id)
        VALUES (:u2, 'refund', -1, -1, 'captured', :x1)"),
    ("subscription_transactions_refund_exceeds",
        "INSERT INTO subscription_transactions
            (user_id, transaction_type, amount, net_amount, status, parent_transaction_id)
        VALUES (:u1, 'refund', -49901, -49901, 'created', :x1)"),

    ("account_credits_pkey",
        "INSERT INTO account_credits (id, user_id, amount) VALUES (:c1, :u1, 1)"),
    ("account_credits_user_id_fkey",
        "INSERT INTO account_credits (user_id, amount) VALUES (:u9, 1)"),
    ("account_credits_user_id_fkey",
        "DELETE FROM subscription_transactions; DELETE FROM user_subscriptions;
        DELETE FROM users WHERE id = :u1"),
    ("account_credits_amount_check",
        "INSERT INTO account_credits (user_id, amount) VALUES (:u1, 0)"),
    ("account_credits_currency_check",
        "INSERT INTO account_credits (user_id, amount, currency) VALUES (:u1, 1, 'rs')"),
    ("account_credits_fixed", "UPDATE account_credits SET amount = 1"),
    ("account_credits_is_used_check", "UPDATE account_credits SET is_used = true"),
    ("account_credits_is_used_check", "UPDATE account_credits SET used_at = now()"),
    ("account_credits_source_id_check", "INSERT INTO account_credits (user_id, amount, source_type)
        VALUES (:u1, 1, 'downgrade')"),
    ("account_credits_source_type_source_id_key",
        "INSERT INTO account_credits (user_id, amount, source_type, source_id)
        VALUES (:u2, 5000, 'refund', 'rfnd_1')"),

    ("mcp_table_pkey",
        "INSERT INTO mcp_table (mcp_service_id, mcp_service_name, display_name, port, type)
        VALUES (:m1, 'x', 'X', 1, 'oauth')"),
    ("mcp_table_mcp_service_name_key",
        "UPDATE mcp_table SET mcp_service_name = 'figma' WHERE mcp_service_id = :m2"),
    ("mcp_table_port_key", "UPDATE mcp_table SET port = 49280 WHERE mcp_service_id = :m2"),
    ("mcp_table_mcp_service_name_check",
        "UPDATE mcp_table SET mcp_service_name = 'Figma' WHERE mcp_service_id = :m1"),
    ("mcp_table_mcp_service_name_check",
        "UPDATE mcp_table SET mcp_service_name = '-x' WHERE mcp_service_id = :m1"),
    ("mcp_table_mcp_service_name_check",
        "UPDATE mcp_table SET mcp_service_name = repeat('x', 51) WHERE mcp_service_id = :m1"),
    ("mcp_table_display_name_check", "UPDATE mcp_table SET display_name = ''"),
    ("mcp_table_display_name_check", "UPDATE mcp_table SET display_name = repeat('x', 101)"),
    ("mcp_table_port_check", "UPDATE mcp_table SET port = 0 WHERE mcp_service_id = :m1"),
    ("mcp_table_port_check", "UPDATE mcp_table SET port = 65536 WHERE mcp_service_id = :m1"),
    ("mcp_table_total_instances_created_check",
        "UPDATE mcp_table SET total_instances_created = -1"),
    ("mcp_table_active_instances_count_check", "UPDATE mcp_table SET active_instances_count = -1"),

    ("mcp_service_table_pkey",
        "INSERT INTO mcp_service_table (instance_id, user_id, mcp_service_id) VALUES
            (:i1, :u2, :m1)"),
    ("mcp_service_table_user_id_fkey",
        "INSERT INTO mcp_service_table (user_id, mcp_service_id) VALUES (:u9, :m1)"),
    ("mcp_service_table_mcp_service_id_fkey",
        "INSERT INTO mcp_service_table (user_id, mcp_service_id) VALUES (:u1, :m9)"),
    ("mcp_service_table_mcp_service_id_fkey", "DELETE FROM mcp_table WHERE mcp_service_id = :m1"),
    ("mcp_service_table_usage_count_check", "UPDATE mcp_service_table SET usage_count = -1"),
    ("mcp_service_table_custom_name_check",
        "UPDATE mcp_service_table SET custom_name = repeat('x', 256)"),
    ("mcp_service_table_renewed_count_check", "UPDATE mcp_service_table SET renewed_count = -1"),
    ("mcp_service_table_oauth_status_synced",
        "UPDATE mcp_service_table SET oauth_status = 'completed' WHERE instance_id = :i2"),
    ("mcp_service_table_oauth_status_synced",
        "DELETE FROM mcp_credentials WHERE credential_id = :k2;
        UPDATE mcp_service_table SET oauth_status = 'failed' WHERE instance_id = :i2"),
    ("mcp_service_table_oauth_status_synced",
        "INSERT INTO mcp_service_table (user_id, mcp_service_id, oauth_status)
        VALUES (:u2, :m1, 'completed')"),
    ("mcp_service_table_service_fixed",
        "UPDATE mcp_service_table SET mcp_service_id = :m2 WHERE instance_id = :i1"),
    ("mcp_service_table_user_fixed",
        "UPDATE mcp_service_table SET user_id = :u1 WHERE instance_id = :i2"),
    ("mcp_service_table_user_inactive", "UPDATE users SET is_active = false WHERE id = :u2;
        INSERT INTO mcp_service_table (user_id, mcp_service_id) VALUES (:u2, :m1)"),
    ("mcp_service_table_counts_kept",
        "INSERT INTO mcp_service_table (user_id, mcp_service_id)
         SELECT user_id, mcp_service_id FROM mcp_service_table LIMIT 1;
         RESET ALL; SET CONSTRAINTS ALL IMMEDIATE"),
    ("mcp_table_service_disabled",
        "INSERT INTO mcp_service_table (user_id, mcp_service_id) VALUES (:u2, :m3)"),

    ("mcp_credentials_pkey",
        "UPDATE mcp_credentials SET credential_id = :k1 WHERE credential_id = :k2"),
    ("mcp_credentials_instance_id_key", "INSERT INTO mcp_credentials (instance_id, api_key)
        VALUES (:i1, decode(repeat('01', 40), 'hex'))"),
    ("mcp_credentials_instance_id_fkey", "INSERT INTO mcp_credentials (instance_id, api_key)
        VALUES (:i9, decode(repeat('01', 40), 'hex'))"),
    ("mcp_credentials_fixed",
        "UPDATE mcp_credentials SET instance_id = :i4 WHERE credential_id = :k1"),
    ("mcp_credentials_oauth_state_key",
        "UPDATE mcp_credentials SET oauth_state = decode(repeat('cc', 32), 'hex'),
        oauth_state_expires_at = now() WHERE credential_id = :k1"),
    ("mcp_credentials_oauth_state_check",
        "UPDATE mcp_credentials SET oauth_state = decode(repeat('cc', 31), 'hex')
        WHERE credential_id = :k2"),
    ("mcp_credentials_oauth_state_expires_at_check",
        "UPDATE mcp_credentials SET oauth_state = NULL WHERE credential_id = :k2"),
    ("mcp_credentials_oauth_state_expires_at_check",
        "UPDATE mcp_credentials SET oauth_state_expires_at = now() WHERE credential_id = :k1"),
    ("mcp_credentials_client_id_check",
        "UPDATE mcp_credentials SET client_id = '' WHERE credential_id = :k2"),
    ("mcp_credentials_client_id_check",
        "UPDATE mcp_credentials SET client_id = repeat('x', 2049) WHERE credential_id = :k2"),
    ("mcp_credentials_token_scope_check",
        "UPDATE mcp_credentials SET token_scope = repeat('x', 16385) WHERE credential_id = :k2"),
    ("mcp_credentials_api_key_check",
        "UPDATE mcp_credentials SET api_key = decode(repeat('01', 29), 'hex')
        WHERE credential_id = :k1"),
    ("mcp_credentials_api_key_check",
        "UPDATE mcp_credentials SET api_key = decode(repeat('01', 16385), 'hex')
        WHERE credential_id = :k1"),
    ("mcp_credentials_client_secret_check",
        "UPDATE mcp_credentials SET client_secret = 'short' WHERE credential_id = :k2"),
    ("mcp_credentials_access_token_check",
        "UPDATE mcp_credentials SET access_token = 'short' WHERE credential_id = :k2"),
    ("mcp_credentials_refresh_token_check",
        "UPDATE mcp_credentials SET refresh_token = 'short' WHERE credential_id = :k2"),
    ("check_credential_type",
        "UPDATE mcp_credentials SET client_id = 'both' WHERE credential_id = :k1"),
    ("check_credential_type",
        "UPDATE mcp_credentials SET api_key = NULL WHERE credential_id = :k1"),
    ("check_credential_type",
        "UPDATE mcp_credentials SET client_secret = NULL WHERE credential_id = :k2"),
    ("check_oauth_tokens",
        "UPDATE mcp_credentials SET access_token = api_key WHERE credential_id = :k1"),
    ("check_oauth_tokens",
        "UPDATE mcp_credentials SET refresh_token = api_key WHERE credential_id = :k1"),
    ("check_oauth_status_consistency",
        "UPDATE mcp_credentials SET oauth_status = 'completed' WHERE credential_id = :k2"),
    ("check_oauth_status_consistency",
        "UPDATE mcp_credentials SET oauth_completed_at = now() WHERE credential_id = :k2"),
    ("check_oauth_status_consistency",
        "UPDATE mcp_credentials SET oauth_status = 'pending' WHERE credential_id = :k1"),

    ("token_audit_log_operation_check",
        "INSERT INTO token_audit_log (instance_id, operation, status)
        VALUES (:i1, '', 'success')"),
    ("token_audit_log_append_only", "UPDATE token_audit_log SET operation = 'y'"),
    ("token_audit_log_append_only", "TRUNCATE token_audit_log"),
    ("token_audit_log_not_from_the_future",
        "INSERT INTO token_audit_log (instance_id, operation, status, created_at)
        VALUES (:i1, 'x', 'success', '9999-01-01')"),
    ("token_audit_log_not_from_the_future",
        "INSERT INTO token_audit_log (instance_id, operation, status, created_at)
        VALUES (:i1, 'x', 'success', '-infinity')"),
    ("token_audit_log_append_only",
        "DELETE FROM token_audit_log WHERE created_at > now() - interval '89 days'"),

    ("user_plans_pkey",
        "UPDATE user_plans SET plan_id = (SELECT plan_id FROM user_plans WHERE user_id = :u1)
        WHERE user_id = :u2"),
    ("user_plans_user_id_fkey", "INSERT INTO user_plans (user_id, plan_type) VALUES (:u9, 'pro')"),
    ("unique_user_plan", "INSERT INTO user_plans (user_id, plan_type) VALUES (:u1, 'pro')"),
    ("check_max_instances_for_plan", "UPDATE user_plans SET max_instances = 2"),
    ("check_max_instances_for_plan", "UPDATE user_plans SET max_instances = NULL"),
    ("check_max_instances_for_plan", "UPDATE user_plans SET plan_type = 'pro'"),
    ("user_plans_features_check", "UPDATE user_plans SET features = '[]'"),
    ("user_plans_user_fixed", "DELETE FROM user_plans WHERE user_id = :u2;
        UPDATE user_plans SET user_id = :u2 WHERE user_id = :u1"),
    ("user_plans_subscription_id_key",
        "UPDATE user_plans SET subscription_id = 'sub_plan_1' WHERE user_id = :u2"),
    ("user_plans_customer_id_key",
        "UPDATE user_plans SET customer_id = 'cust_plan_1' WHERE user_id = :u2"),
    ("user_plans_subscription_id_check",
        "UPDATE user_plans SET subscription_id = '' WHERE user_id = :u1"),
    ("user_plans_customer_id_check", "UPDATE user_plans SET customer_id = '' WHERE user_id = :u1"),
    ("user_plan_active_limit",
        "UPDATE mcp_service_table SET status = 'active' WHERE instance_id = :i3"),
    ("user_plan_active_limit",
        "INSERT INTO mcp_service_table (instance_id, user_id, mcp_service_id) VALUES (:i4, :u1, :m1);
        INSERT INTO mcp_credentials (instance_id, api_key, oauth_status, oauth_completed_at)
        VALUES (:i4, decode(repeat('01', 40), 'hex'), 'completed', now())"),
    ("user_plan_expired", "UPDATE user_plans SET expires_at = now() WHERE user_id = :u2;
        UPDATE mcp_credentials SET oauth_status = 'completed', oauth_completed_at = now()
            WHERE credential_id = :k2"),
    ("user_plan_missing", "DELETE FROM user_plans WHERE user_id = :u2;
        UPDATE mcp_credentials SET oauth_status = 'completed', oauth_completed_at = now()
            WHERE credential_id = :k2"),

    ("webhook_events_pkey",
        "INSERT
            INTO webhook_events (event_id, external_event_id, event_type, payment_gateway, payload)
        VALUES (:w1, 'evt_2', 'x', 'stripe', '{}')"),
    ("webhook_events_payment_gateway_external_event_id_key",
        "INSERT INTO webhook_events (external_event_id, event_type, payment_gateway, payload)
         VALUES ('evt_1', 'x', 'razorpay', '{}')"),
    ("webhook_events_external_event_id_check",
        "INSERT INTO webhook_events (external_event_id, event_type, payment_gateway, payload)
         VALUES ('', 'x', 'razorpay', '{}')"),
    ("webhook_events_attempts_check", "INSERT INTO webhook_events
            (external_event_id, event_type, payment_gateway, payload, attempts)
        VALUES ('evt_2', 'x', 'stripe', '{}', -1)"),
    ("webhook_events_user_id_fkey", "UPDATE webhook_events SET user_id = :u9"),
    ("webhook_events_fixed", "UPDATE webhook_events SET payment_gateway = 'stripe'"),
    ("webhook_events_fixed", "UPDATE webhook_events SET external_event_id = 'evt_2'"),
    ("webhook_events_fixed", "UPDATE webhook_events SET event_type = 'x'"),
    ("webhook_events_fixed", "UPDATE webhook_events SET payload = '[]'"),
    ("webhook_events_fixed", "UPDATE webhook_events SET attempts = 2;
        UPDATE webhook_events SET attempts = 1"),
    ("webhook_events_fixed",
        "UPDATE webhook_events SET processing_status = 'processed', processed_at = now();
         UPDATE webhook_events SET processing_status = 'skipped'"),
    ("webhook_events_fixed",
        "UPDATE webhook_events SET processing_status = 'skipped', processed_at = now();
         UPDATE webhook_events SET processing_status = 'failed'"),
    ("webhook_events_processed_at_check", "UPDATE webhook_events SET processed_at = now()"),
    ("webhook_events_processed_at_check", "UPDATE webhook_events SET processing_status = 'failed'"),

    ("user_billing_details_pkey", "INSERT INTO user_billing_details
        (billing_id, user_id, address_line1, city, state, country, zip_code) VALUES
            (:b1, :u2, 'a', 'b', 'c', 'd', 'e')"),
    ("user_billing_details_user_id_fkey", "UPDATE user_billing_details SET user_id = :u9"),
    ("unique_user_billing", "INSERT INTO user_billing_details
        (user_id, address_line1, city, state, country, zip_code) VALUES
            (:u1, 'a', 'b', 'c', 'd', 'e')"),
    ("user_billing_details_address_line1_check",
        "UPDATE user_billing_details SET address_line1 = ''"),
    ("user_billing_details_address_line1_check",
        "UPDATE user_billing_details SET address_line1 = repeat('x', 256)"),
    ("user_billing_details_address_line2_check",
        "UPDATE user_billing_details SET address_line2 = repeat('x', 256)"),
    ("user_billing_details_city_check", "UPDATE user_billing_details SET city = repeat('x', 101)"),
    ("user_billing_details_state_check", "UPDATE user_billing_details SET state = ''"),
    ("user_billing_details_country_check", "UPDATE user_billing_details SET country = ''"),
    ("user_billing_details_zip_code_check",
        "UPDATE user_billing_details SET zip_code = repeat('1', 21)"),
    ("user_billing_details_cards_check", "UPDATE user_billing_details SET cards = '{}'"),
    ("user_billing_details_unique_card_ids",
        r#"UPDATE user_billing_details SET cards = (
            SELECT jsonb_agg('{"id": "a", "last4": "4242", "token": "t", "brand": "visa",
                "exp_month": 12, "exp_year": 2030}'::jsonb) FROM generate_series(1, 2))"#),
    ("user_billing_details_no_card_secrets",
        r#"UPDATE user_billing_details SET cards = '[{"number": "4111"}]'"#),
    ("user_billing_details_no_card_secrets",
        r#"UPDATE user_billing_details SET cards = '[{"a": [[{"CVV": 1}]]}]'"#),
    ("user_billing_details_no_card_secrets",
        r#"UPDATE user_billing_details SET cards = '[[{"a": {"cvc": null}}]]'"#),
    ("user_billing_details_default_card", "UPDATE user_billing_details SET default_card_id = 'x'"),
];

/// Runs the statements in a transaction that is rolled back, and returns what they violated.
fn violation(conn: &mut PgConnection, sql: &str) -> ConstraintViolation {
    let error = conn
        .transaction::<(), _, _>(|conn| {
            conn.batch_execute(&with_keys(sql))?;
            Err(diesel::result::Error::RollbackTransaction)
        })
        .unwrap_err();
    ConstraintViolation::of(&error).unwrap_or_else(|| panic!("{sql}: {error}"))
}

#[test]
pub(crate) fn each_violated_constraint_is_named() {
    assert_violations(&mut database_with_rows().connect_as_owner());
}

/// Violates each constraint, in a database with the rows of `tests/fixtures/rows.sql`.
pub(crate) fn assert_violations(conn: &mut PgConnection) {
    for (constraint, sql) in VIOLATIONS {
        let violation = violation(conn, sql);
        assert!(
            violation.is(constraint),
            "{sql}: {violation} instead of {constraint}"
        );
        let unique = constraint.ends_with("_pkey")
            || constraint.ends_with("_key")
            || constraint.contains("_one_live_per_")
            || constraint.starts_with("unique_");
        let kind = if constraint.ends_with("_fkey") {
            ConstraintKind::ForeignKey
        } else if unique {
            ConstraintKind::Unique
        } else {
            ConstraintKind::Check
        };
        assert_eq!(violation.kind, kind, "{constraint}");
        assert_ne!(violation.table, "", "{constraint}");
    }
}

#[test]
fn an_exclusion_constraint_has_its_own_kind() {
    let database = database();
    let conn = &mut database.connect();
    conn.batch_execute("CREATE TEMP TABLE seats (seat int, EXCLUDE USING btree (seat WITH =))")
        .unwrap();
    let violation = violation(conn, "INSERT INTO seats VALUES (1), (1)");
    assert_eq!(violation.kind, ConstraintKind::Exclusion);
    assert!(violation.is("seats_seat_excl"), "{violation}");
}

#[derive(QueryableByName)]
struct Name {
    #[diesel(sql_type = Text)]
    name: String,
}

fn names(sql: &str) -> BTreeSet<String> {
    let names = diesel::sql_query(sql)
        .load::<Name>(&mut database().connect_as_owner())
        .unwrap();
    names.into_iter().map(|row| row.name).collect()
}

/// The constraints that triggers raise. Their names are in the functions, or arguments of
/// `refuse_change`.
const RAISED: &str = "SELECT (regexp_matches(prosrc, 'CONSTRAINT = ''(\\w+)''', 'g'))[1] AS name
    FROM pg_proc WHERE pronamespace = 'public'::regnamespace
      UNION
    SELECT split_part(encode(tgargs, 'escape'), '\\000', 1)
      FROM pg_trigger WHERE tgfoid = 'public.refuse_change'::regproc";

/// The constraints and unique indexes of the schema.
const DECLARED: &str = "SELECT conname::text AS name FROM pg_constraint
      WHERE connamespace = 'public'::regnamespace AND contype IN ('c', 'f', 'p', 'u', 'x')
      UNION
     SELECT indexrelid::regclass::text FROM pg_index JOIN pg_class ON pg_class.oid = indrelid
      WHERE indisunique AND relnamespace = 'public'::regnamespace";

fn violated() -> BTreeSet<String> {
    let names = VIOLATIONS.iter().map(|(name, _)| (*name).to_owned());
    names.collect()
}

/// A new constraint needs a case if a trigger raises it, or if it has a name of its own for callers
/// to match on. It needs none if its name follows the pattern: PostgreSQL enforces it.
#[test]
fn each_named_constraint_is_violated_once() {
    let mut expected = names(RAISED);
    let ends = ["_pkey", "_key", "_fkey", "_check"];
    let declared = names(DECLARED);
    let named = declared
        .into_iter()
        .filter(|name| !ends.iter().any(|end| name.ends_with(end)));
    expected.extend(named);
    let violated = violated();
    let found: Vec<String> = expected.intersection(&violated).cloned().collect();
    assert_same_set(expected, found);
}

#[test]
fn each_violated_constraint_exists() {
    let mut known = names(RAISED);
    known.extend(names(DECLARED));
    let violated = violated();
    let found: Vec<String> = violated.intersection(&known).cloned().collect();
    assert_same_set(violated, found);
}

/// Statements that look similar but violate nothing.
#[test]
pub(crate) fn what_is_allowed_is_allowed() {
    let database = database_with_rows();
    let conn = &mut database.connect_as_owner();
    for sql in [
        "UPDATE users SET last_name = '', password = '$2b$10$' || repeat('x', 53),
            email = 'é''+%s@example.in' WHERE id = :u1",
        "DELETE FROM users WHERE id = :u2",
        "INSERT INTO auth_tokens (user_id, token, type, expires_at, family_id, session_expires_at)
         SELECT :u1, decode(repeat(n, 32), 'hex'), 'refresh', now() + interval '1 day', :f1,
                now() + interval '365 days'
             FROM unnest('{07,08}'::text[]) n",
        "INSERT INTO auth_tokens (user_id, token, type, expires_at)
         VALUES (:u2, decode(repeat('02', 32), 'hex'), 'email_otp', now() + interval '1 hour')",
        "UPDATE auth_tokens SET is_used = true, used_at = now();
         INSERT INTO auth_tokens (user_id, token, type, expires_at)
         VALUES (:u1, decode(repeat('02', 32), 'hex'), 'email_otp', now() + interval '1 hour')",
        "INSERT INTO user_subscriptions (user_id, status) VALUES (:u1, 'completed'),
            (:u1, 'halted')",
        "UPDATE user_subscriptions
            SET proration_amount = -100, trial_start = now(), trial_end = now() + interval '1 day'",
        "INSERT INTO subscription_transactions
            (user_id, transaction_type, amount, tax_amount, net_amount, status,
             parent_transaction_id) VALUES (:u1, 'refund', -49900, -100, -49800, 'captured', :x1)",
        "INSERT INTO account_credits (user_id, amount, source_type) VALUES (:u1, -1, 'promotion'),
            (:u1, 1, 'promotion')",
        "UPDATE account_credits SET is_used = true, used_at = now()",
        "UPDATE mcp_table SET is_active = false;
         UPDATE mcp_service_table SET status = 'inactive'; UPDATE mcp_service_table
             SET status = 'active' WHERE instance_id = :i1",
        "UPDATE mcp_credentials SET api_key = decode(repeat('01', 16384), 'hex')
            WHERE credential_id = :k1;
         UPDATE mcp_credentials SET api_key = decode(repeat('01', 30), 'hex')
             WHERE credential_id = :k1",
        "DELETE FROM token_audit_log WHERE created_at < now() - interval '90 days'",
        "INSERT INTO webhook_events (external_event_id, event_type, payment_gateway, payload)
         VALUES ('evt_1', 'x', 'stripe', '{}')",
        r#"INSERT INTO webhook_events (external_event_id, event_type, payment_gateway, payload)
         VALUES ('evt_2', 'x', 'stripe', '{"a": 1}');
         UPDATE webhook_events SET attempts = attempts + 1, payload = '{}', user_id = :u1,
             processing_status = 'failed', processed_at = now(), error_message = 'a';
         UPDATE webhook_events SET processing_status = 'processed', user_id = NULL"#,
        r#"UPDATE user_billing_details
            SET cards = '[{"id": "number", "last4": "4242", "token": "cvv", "brand": "visa",
                "exp_month": 12, "exp_year": 2030}]', default_card_id = 'number'"#,
    ] {
        conn.test_transaction::<_, diesel::result::Error, _>(|conn| {
            conn.batch_execute(&with_keys(sql))
                .inspect_err(|error| panic!("{sql}: {error}"))
        });
    }
}
