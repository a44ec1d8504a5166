SET LOCAL lock_timeout = '5s';

DROP TABLE account_credits;
DROP TABLE subscription_transactions;
DROP TABLE user_subscriptions;
DROP TABLE auth_tokens;
DROP TABLE users;

DROP FUNCTION subscription_transactions_check_refund();
DROP FUNCTION refuse_change();
DROP FUNCTION update_updated_at_column();

DROP TYPE credit_source;
DROP TYPE transaction_status;
DROP TYPE transaction_type;
DROP TYPE billing_cycle;
DROP TYPE subscription_status;
DROP TYPE subscription_plan;
DROP TYPE auth_token_type;
