-- The old system's database, in its later shape: nine tables.

CREATE FUNCTION update_updated_at_column() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_at = CURRENT_TIMESTAMP;
    RETURN NEW;
END
$$;

CREATE TABLE users (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    first_name varchar(255) NOT NULL,
    last_name varchar(255) NOT NULL,
    email varchar(255) NOT NULL UNIQUE,
    password_hash varchar(255) NOT NULL,
    is_verified boolean DEFAULT false,
    razorpay_customer_id varchar(255),
    created_at timestamp DEFAULT CURRENT_TIMESTAMP,
    updated_at timestamp DEFAULT CURRENT_TIMESTAMP,
    last_login_at timestamp,
    is_active boolean DEFAULT true
);

CREATE TABLE auth_tokens (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    token text NOT NULL,
    token_type varchar(50) NOT NULL CHECK (
        token_type IN ('otp', 'password_reset', 'refresh', 'email_change_pending')
    ),
    expires_at timestamp NOT NULL,
    is_used boolean DEFAULT false,
    created_at timestamp DEFAULT CURRENT_TIMESTAMP,
    updated_at timestamp DEFAULT CURRENT_TIMESTAMP,
    UNIQUE (user_id, token_type)
);

CREATE TABLE user_subscriptions (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    plan_code varchar(50) NOT NULL DEFAULT 'free' CHECK (plan_code IN ('free', 'pro')),
    razorpay_subscription_id varchar(255) UNIQUE,
    razorpay_customer_id varchar(255),
    status varchar(50) NOT NULL DEFAULT 'active' CHECK (status IN (
        'created', 'authenticated', 'active', 'past_due', 'cancelled', 'completed', 'paused', 'halted',
        'upgraded', 'replaced'
    )),
    billing_cycle varchar(20) DEFAULT 'monthly' CHECK (billing_cycle IN ('monthly', 'yearly')),
    current_period_start timestamp NOT NULL DEFAULT CURRENT_TIMESTAMP,
    current_period_end timestamp NOT NULL DEFAULT (CURRENT_TIMESTAMP + '30 days'::interval),
    trial_start timestamp,
    trial_end timestamp,
    cancel_at_period_end boolean DEFAULT false,
    cancelled_at timestamp,
    cancellation_reason text,
    cancellation_feedback text,
    pause_count int DEFAULT 0 CHECK (pause_count >= 0),
    paused_at timestamp,
    resume_at timestamp,
    next_billing_date timestamp,
    proration_amount int DEFAULT 0,
    discount_amount int DEFAULT 0,
    tax_amount int DEFAULT 0,
    total_amount int NOT NULL DEFAULT 0 CHECK (total_amount >= 0),
    auto_renewal boolean DEFAULT true,
    grace_period_days int DEFAULT 3,
    failed_payment_count int DEFAULT 0 CHECK (failed_payment_count >= 0),
    last_payment_attempt timestamp,
    created_at timestamp DEFAULT CURRENT_TIMESTAMP,
    updated_at timestamp DEFAULT CURRENT_TIMESTAMP,
    CHECK (current_period_end > current_period_start),
    CHECK (trial_end > trial_start)
);

CREATE TABLE subscription_transactions (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    subscription_id uuid REFERENCES user_subscriptions,
    razorpay_payment_id varchar(255) UNIQUE,
    razorpay_order_id varchar(255),
    transaction_type varchar(50) NOT NULL DEFAULT 'subscription' CHECK (
        transaction_type IN ('subscription', 'addon', 'refund', 'adjustment', 'fee')
    ),
    amount int NOT NULL CHECK (amount >= 0 OR transaction_type = 'refund'),
    tax_amount int DEFAULT 0,
    discount_amount int DEFAULT 0,
    fee_amount int DEFAULT 0,
    net_amount int NOT NULL CHECK (net_amount >= 0 OR transaction_type = 'refund'),
    currency varchar(10) DEFAULT 'INR',
    exchange_rate numeric(10,4) DEFAULT 1.0 CHECK (exchange_rate > 0),
    status varchar(50) NOT NULL CHECK (
        status IN ('created', 'authorized', 'captured', 'refunded', 'failed', 'cancelled')
    ),
    gateway_status varchar(255),
    method varchar(50),
    method_details_json text,
    description text,
    receipt_number varchar(255) UNIQUE,
    invoice_id varchar(255),
    failure_reason text,
    failure_code varchar(50),
    gateway_response_json text,
    retry_count int DEFAULT 0,
    parent_transaction_id uuid REFERENCES subscription_transactions,
    processed_at timestamp,
    settled_at timestamp,
    refunded_at timestamp,
    created_at timestamp DEFAULT CURRENT_TIMESTAMP,
    updated_at timestamp DEFAULT CURRENT_TIMESTAMP
);

CREATE TABLE account_credits (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    subscription_id uuid REFERENCES user_subscriptions,
    credit_amount int NOT NULL CHECK (credit_amount > 0),
    remaining_amount int NOT NULL,
    credit_type varchar(50) NOT NULL CHECK (
        credit_type IN ('downgrade', 'refund', 'adjustment', 'promotional')
    ),
    source_transaction_id uuid REFERENCES subscription_transactions,
    description text,
    is_active boolean DEFAULT true,
    applied_count int DEFAULT 0 CHECK (applied_count >= 0),
    last_applied_at timestamp,
    expires_at timestamp,
    created_at timestamp DEFAULT CURRENT_TIMESTAMP,
    updated_at timestamp DEFAULT CURRENT_TIMESTAMP,
    CHECK (remaining_amount BETWEEN 0 AND credit_amount)
);

CREATE TABLE mcp_table (
    mcp_service_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    mcp_service_name varchar(50) NOT NULL UNIQUE,
    display_name varchar(100) NOT NULL,
    description text,
    icon_url_path varchar(500),
    port int NOT NULL UNIQUE,
    type varchar(20) NOT NULL CHECK (type IN ('api_key', 'oauth')),
    is_active boolean DEFAULT true,
    total_instances_created int DEFAULT 0,
    active_instances_count int DEFAULT 0,
    created_at timestamp DEFAULT CURRENT_TIMESTAMP,
    updated_at timestamp DEFAULT CURRENT_TIMESTAMP
);

CREATE TABLE mcp_service_table (
    instance_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    mcp_service_id uuid NOT NULL REFERENCES mcp_table ON DELETE CASCADE,
    oauth_status varchar(20) DEFAULT 'completed' CHECK (oauth_status IN ('pending', 'completed', 'failed')),
    status varchar(20) DEFAULT 'active' CHECK (status IN ('active', 'inactive', 'expired')),
    expires_at timestamp,
    last_used_at timestamp,
    usage_count int DEFAULT 0,
    custom_name varchar(255),
    renewed_count int DEFAULT 0,
    last_renewed_at timestamp,
    credentials_updated_at timestamp,
    created_at timestamp DEFAULT CURRENT_TIMESTAMP,
    updated_at timestamp DEFAULT CURRENT_TIMESTAMP,
    version int DEFAULT 1,
    last_modified timestamp DEFAULT now()
);

CREATE TABLE mcp_credentials (
    credential_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    instance_id uuid NOT NULL UNIQUE REFERENCES mcp_service_table ON DELETE CASCADE,
    api_key varchar(500),
    client_id varchar(500),
    client_secret varchar(500),
    access_token varchar(1000),
    refresh_token varchar(500),
    token_expires_at timestamp,
    token_scope text,
    oauth_status varchar(20) DEFAULT 'pending' CHECK (
        oauth_status IN ('pending', 'completed', 'failed', 'expired')
    ),
    oauth_completed_at timestamp,
    oauth_authorization_url text,
    oauth_state varchar(100),
    created_at timestamp DEFAULT CURRENT_TIMESTAMP,
    updated_at timestamp DEFAULT CURRENT_TIMESTAMP,
    version int DEFAULT 1,
    last_modified timestamp DEFAULT now(),
    CHECK (
        (api_key IS NOT NULL AND client_id IS NULL AND client_secret IS NULL)
        OR (api_key IS NULL AND client_id IS NOT NULL AND client_secret IS NOT NULL)
    ),
    CHECK (
        (access_token IS NULL AND refresh_token IS NULL)
        OR (client_id IS NOT NULL AND client_secret IS NOT NULL)
    ),
    CHECK (oauth_status = 'pending' OR oauth_completed_at IS NOT NULL)
);

CREATE TABLE token_audit_log (
    audit_id serial PRIMARY KEY,
    instance_id uuid NOT NULL REFERENCES mcp_service_table ON DELETE CASCADE,
    user_id uuid REFERENCES users ON DELETE CASCADE,
    operation varchar(50) NOT NULL,
    status varchar(20) NOT NULL,
    method varchar(50),
    error_type varchar(100),
    error_message text,
    metadata jsonb,
    created_at timestamp DEFAULT now()
);

CREATE INDEX idx_users_email ON users (email);
CREATE TRIGGER update_users_updated_at BEFORE UPDATE ON users
    FOR EACH ROW EXECUTE FUNCTION update_updated_at_column();
CREATE VIEW token_audit_summary AS
    SELECT instance_id, operation, status, count(*) AS operations
      FROM token_audit_log GROUP BY instance_id, operation, status;
