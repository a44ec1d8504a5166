-- The services of examples/services.csv, and demo users with instances in each state. psql runs it
-- at the root of the repository. Services follow the file; users that exist stay as they are.
--
-- Each user has the password "demo demo demo". The digests and sealed values have the right form,
-- and no key opens them.

BEGIN;

CREATE TEMPORARY TABLE seed_services (
    mcp_service_name text,
    display_name     text,
    port             integer,
    type             mcp_auth_type,
    icon_url_path    text,
    description      text
) ON COMMIT DROP;
\copy seed_services FROM examples/services.csv WITH (FORMAT csv, HEADER)
INSERT INTO mcp_table AS t (mcp_service_name, display_name, port, type, icon_url_path, description)
SELECT mcp_service_name, display_name, port, type, icon_url_path, description FROM seed_services
ON CONFLICT (mcp_service_name) DO UPDATE SET
    display_name = excluded.display_name,
    port = excluded.port,
    type = excluded.type,
    icon_url_path = excluded.icon_url_path,
    description = excluded.description
WHERE (t.display_name, t.port, t.type, t.icon_url_path, t.description) IS DISTINCT FROM
    (excluded.display_name, excluded.port, excluded.type, excluded.icon_url_path, excluded.description);

SELECT NOT EXISTS (SELECT FROM users WHERE email LIKE '%@demo.example') AS unseeded \gset
\if :unseeded
-- Nothing prints the results of the functions.
\o /dev/null

CREATE FUNCTION pg_temp.seed_user(name text) RETURNS uuid
LANGUAGE sql AS $$
    INSERT INTO users (first_name, last_name, email, password, email_verified)
    VALUES (
        initcap(name), 'Demo', name || '@demo.example',
        '$argon2id$v=19$m=19456,t=2,p=1$XzOfTNK5hRrBq+bT8ziqZQ$B2UhYmphm0wskx4AAHFnjh2D/Pj8G1iGNk5BNvBVhP8',
        true
    )
    RETURNING id
$$;

-- A value of a sealed column: format 2, then zeros.
CREATE FUNCTION pg_temp.sealed() RETURNS bytea
LANGUAGE sql AS $$ SELECT decode('02' || repeat('00', 63), 'hex') $$;

-- An instance with its credentials, whose kind is that of the service.
CREATE FUNCTION pg_temp.seed_instance(
    user_id uuid, service text, name text, status mcp_instance_status,
    oauth_status mcp_oauth_status, age interval, lifetime interval DEFAULT '30 days'
) RETURNS void
LANGUAGE sql AS $$
    WITH service AS (
        SELECT mcp_service_id, type FROM mcp_table WHERE mcp_service_name = service
    ), instance AS (
        INSERT INTO mcp_service_table
            (user_id, mcp_service_id, custom_name, status, created_at, expires_at, usage_count,
                last_used_at)
        SELECT user_id, mcp_service_id, name, status, now() - age, now() - age + lifetime,
            CASE oauth_status WHEN 'completed' THEN 42 ELSE 0 END,
            CASE oauth_status WHEN 'completed' THEN now() - age / 2 END
        FROM service
        RETURNING instance_id
    ), audit AS (
        INSERT INTO token_audit_log (instance_id, user_id, operation, status, method, created_at)
        SELECT instance_id, user_id, 'create', 'success', service.type::text, now() - age
        FROM instance, service
    )
    INSERT INTO mcp_credentials
        (instance_id, api_key, client_id, client_secret, access_token, refresh_token,
            token_expires_at, oauth_status, oauth_completed_at)
    SELECT
        instance_id,
        CASE type WHEN 'api_key' THEN pg_temp.sealed() END,
        CASE type WHEN 'oauth' THEN 'demo-client' END,
        CASE type WHEN 'oauth' THEN pg_temp.sealed() END,
        CASE WHEN type = 'oauth' AND oauth_status = 'completed' THEN pg_temp.sealed() END,
        CASE WHEN type = 'oauth' AND oauth_status = 'completed' THEN pg_temp.sealed() END,
        CASE WHEN type = 'oauth' AND oauth_status = 'completed' THEN now() + interval '1 hour' END,
        oauth_status,
        CASE WHEN oauth_status <> 'pending' THEN now() - age END
    FROM instance, service
$$;

-- free: one active instance, all that the plan allows.
SELECT pg_temp.seed_user('free') AS free \gset
SELECT pg_temp.seed_instance(:'free', 'figma', 'Designs', 'active', 'completed', '9 days');
SELECT pg_temp.seed_instance(:'free', 'airtable', 'Old tables', 'inactive', 'completed', '20 days');
INSERT INTO auth_tokens (user_id, token, type, expires_at, family_id, session_expires_at) VALUES (
    :'free', decode(repeat('00', 32), 'hex'), 'refresh', now() + interval '30 days',
    gen_random_uuid(), now() + interval '180 days'
);

-- pro: paid, with instances in each state.
SELECT pg_temp.seed_user('pro') AS pro \gset
UPDATE user_plans
SET plan_type = 'pro', max_instances = NULL, payment_status = 'active',
    subscription_id = 'sub_demo_pro', customer_id = 'cust_demo_pro'
WHERE user_id = :'pro';
INSERT INTO user_subscriptions (user_id, plan_code, razorpay_subscription_id, razorpay_customer_id)
VALUES (:'pro', 'pro', 'sub_demo_pro', 'cust_demo_pro')
RETURNING id AS subscription \gset
INSERT INTO subscription_transactions
    (user_id, subscription_id, razorpay_payment_id, amount, fee_amount, net_amount, status, method,
        processed_at)
VALUES (:'pro', :'subscription', 'pay_demo_pro', 49900, 1178, 48722, 'captured', 'upi', now());
INSERT INTO user_billing_details (user_id, address_line1, city, state, country, zip_code)
VALUES (:'pro', '1 Example Street', 'Bengaluru', 'Karnataka', 'India', '560001');
INSERT INTO account_credits (user_id, amount, description, source_type)
VALUES (:'pro', 5000, 'Demo credit', 'promotion');
INSERT INTO webhook_events
    (external_event_id, event_type, payment_gateway, payload, processing_status, processed_at,
        user_id)
VALUES
    ('evt_demo_1', 'subscription.activated', 'razorpay', '{"demo": true}', 'processed', now(),
        :'pro'),
    ('evt_demo_2', 'payment.captured', 'razorpay', '{"demo": true}', 'pending', NULL, NULL);
SELECT pg_temp.seed_instance(:'pro', 'gmail', 'Work mail', 'active', 'completed', '12 days');
SELECT pg_temp.seed_instance(:'pro', 'notion', 'Wiki', 'active', 'completed', '3 days');
SELECT pg_temp.seed_instance(:'pro', 'slack', 'Team', 'active', 'pending', '10 minutes');
SELECT pg_temp.seed_instance(:'pro', 'dropbox', 'Files', 'active', 'failed', '1 day');
SELECT pg_temp.seed_instance(:'pro', 'reddit', 'News', 'inactive', 'expired', '25 days');
SELECT pg_temp.seed_instance(:'pro', 'sheets', 'Budget', 'expired', 'completed', '40 days');

-- late: pro, with a payment that failed.
SELECT pg_temp.seed_user('late') AS late \gset
UPDATE user_plans
SET plan_type = 'pro', max_instances = NULL, payment_status = 'past_due',
    subscription_id = 'sub_demo_late', customer_id = 'cust_demo_late'
WHERE user_id = :'late';
INSERT INTO user_subscriptions
    (user_id, plan_code, razorpay_subscription_id, status, current_period_start,
        current_period_end, failed_payment_count, last_payment_attempt)
VALUES (:'late', 'pro', 'sub_demo_late', 'past_due', now() - interval '31 days',
    now() - interval '1 day', 1, now());
SELECT pg_temp.seed_instance(:'late', 'gmail', 'Mail', 'active', 'completed', '5 days');

-- gone: deactivated.
SELECT pg_temp.seed_user('gone') AS gone \gset
UPDATE users SET is_active = false WHERE id = :'gone';

\o
\endif

COMMIT;
