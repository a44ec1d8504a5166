-- The rows of {users} users of the old system, in its first shape: nine of ten tables have a row of
-- each user or more, and one row in a hundred is odd.

SET session_replication_role = replica;

CREATE FUNCTION pg_temp.id(of text, n bigint) RETURNS uuid LANGUAGE sql IMMUTABLE
RETURN md5(of || n)::uuid;

CREATE TEMP VIEW numbers AS
    SELECT n, pg_temp.id('user', n) AS user_id, timestamp '2024-01-01' + n * interval '7 s' AS at
      FROM generate_series(1, {users}::bigint) AS n;

INSERT INTO users (id, first_name, last_name, email, password, email_verified, razorpay_customer_id,
        created_at, updated_at, last_login_at)
    SELECT user_id, 'First' || n, 'Last' || n,
           -- Not canonical; of another account in other letters.
           CASE
               WHEN n % 1000 = 0 THEN 'USER' || n - 1
               WHEN n % 100 = 0 THEN 'User' || n
               ELSE 'user' || n
           END || '@example.org',
           '$2b$12$' || left(md5(n::text) || md5(n::text), 53), n % 10 <> 0, 'cust_' || n, at, at, at
      FROM numbers;

INSERT INTO auth_tokens (user_id, token, type, expires_at, created_at)
    SELECT user_id, md5(n::text), 'refresh', at + interval '30 days', at FROM numbers;

INSERT INTO user_plans (user_id, plan_type, max_instances, subscription_id, payment_status,
        created_at, updated_at, features)
    SELECT user_id,
           CASE n % 3 WHEN 0 THEN 'pro' ELSE 'free' END, CASE n % 3 WHEN 0 THEN NULL ELSE 1 END,
           CASE n % 3 WHEN 0 THEN 'sub_' || n END, CASE n % 3 WHEN 0 THEN 'active' ELSE 'none' END,
           at, at, CASE WHEN n % 100 = 0 THEN '[]' ELSE '{"support": "email"}' END::jsonb
      FROM numbers;

INSERT INTO user_subscriptions (id, user_id, plan_code, razorpay_subscription_id, total_amount,
        current_period_start, current_period_end, created_at, updated_at)
    SELECT pg_temp.id('subscription', n), user_id, 'pro', 'sub_' || n, 49900, at,
           at + interval '1 month', at, at
      FROM numbers;

INSERT INTO subscription_transactions (id, user_id, subscription_id, razorpay_payment_id,
        razorpay_order_id, amount, tax_amount, net_amount, currency, status, method,
        method_details_json, gateway_response_json, created_at, updated_at)
    SELECT pg_temp.id('payment', n), user_id, pg_temp.id('subscription', n), 'pay_' || n,
           'order_' || n, 49900, 7612, 49900, CASE WHEN n % 100 = 0 THEN 'inr' ELSE 'INR' END,
           'captured', 'card', '{"network": "Visa", "last4": "1111"}',
           CASE
               WHEN n % 100 = 0 THEN 'OK'
               ELSE format('{"id": "pay_%s", "notes": [], "fee": 1178, "captured": true}', n)
           END,
           at, at
      FROM numbers;

INSERT INTO subscription_transactions (user_id, transaction_type, parent_transaction_id, amount,
        net_amount, status, created_at, updated_at)
    SELECT user_id, 'refund', pg_temp.id('payment', n), 49900, 49900, 'captured', at, at
      FROM numbers WHERE n % 20 = 0;

INSERT INTO account_credits (user_id, amount, source_type, source_id, is_used, used_at, created_at,
        updated_at)
    SELECT user_id, 5000, 'promotion', 'spring', n % 4 = 0, CASE n % 4 WHEN 0 THEN at END, at, at
      FROM numbers WHERE n % 2 = 0;

INSERT INTO user_billing_details (user_id, address_line1, city, state, country, zip_code, cards,
        created_at, updated_at)
    SELECT user_id, n || ' Station Road', CASE WHEN n % 100 <> 0 THEN 'Pune' ELSE '' END,
           'Maharashtra', 'India', '411001',
           jsonb_build_array(jsonb_build_object('id', 'card_' || n, 'last4', '1111', 'brand', 'visa')),
           at, at
      FROM numbers;

INSERT INTO mcp_table (mcp_service_id, mcp_service_name, display_name, port, type)
    SELECT pg_temp.id('service', n), 'service' || n, 'Service ' || n, 49280 + n,
           CASE n % 2 WHEN 0 THEN 'api_key' ELSE 'oauth' END
      FROM generate_series(0, 19) AS n;

INSERT INTO mcp_service_table (instance_id, user_id, mcp_service_id, usage_count, last_used_at,
        created_at, updated_at, last_modified)
    SELECT pg_temp.id('instance' || copy, n), user_id, pg_temp.id('service', (n + copy) % 20),
           n % 1000, at, at, at, at
      FROM numbers, generate_series(0, 1) AS copy WHERE copy = 0 OR n % 4 = 0;

INSERT INTO mcp_credentials (instance_id, api_key, client_id, client_secret, access_token,
        refresh_token, oauth_status, oauth_completed_at, created_at, updated_at, last_modified)
    SELECT pg_temp.id('instance' || copy, n),
           CASE (n + copy) % 2 WHEN 0 THEN 'key_' || md5(n::text) END,
           CASE (n + copy) % 2 WHEN 1 THEN 'client_' || n END,
           CASE (n + copy) % 2 WHEN 1 THEN md5(n::text) END,
           CASE (n + copy) % 2 WHEN 1 THEN repeat(md5(n::text), 6) END,
           CASE (n + copy) % 2 WHEN 1 THEN md5(n::text) END,
           'completed', at, at, at, at
      FROM numbers, generate_series(0, 1) AS copy WHERE copy = 0 OR n % 4 = 0;

INSERT INTO token_audit_log (instance_id, user_id, operation, status, method, metadata, created_at)
    SELECT pg_temp.id('instance0', n), user_id, 'refresh',
           CASE WHEN n % 100 = 0 THEN 'info' ELSE 'success' END, 'oauth', '{"attempt": 1}', at
      FROM numbers;

INSERT INTO webhook_events (external_event_id, event_type, payment_gateway, payload,
        processing_status, processed_at, created_at)
    SELECT 'evt_' || n, 'payment.captured', 'razorpay',
           jsonb_build_object('event', 'payment.captured', 'payment', 'pay_' || n),
           CASE WHEN n % 100 = 0 THEN 'pending' ELSE 'processed' END, at, at
      FROM numbers;

RESET session_replication_role;
ANALYZE;
