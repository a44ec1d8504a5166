-- The old system's database, in its first shape: all twelve tables.

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
    password varchar(255),
    email_verified boolean DEFAULT false,
    razorpay_customer_id varchar(255),
    created_at timestamp DEFAULT CURRENT_TIMESTAMP,
    updated_at timestamp DEFAULT CURRENT_TIMESTAMP,
    last_login_at timestamp,
    is_active boolean DEFAULT true
);

CREATE TABLE auth_tokens (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    token varchar(255) NOT NULL UNIQUE,
    type varchar(50) NOT NULL CHECK (
        type IN ('email_otp', 'password_reset', 'email_verification', 'refresh', 'email_change_pending')
    ),
    expires_at timestamp NOT NULL,
    is_used boolean DEFAULT false,
    created_at timestamp DEFAULT CURRENT_TIMESTAMP
);

CREATE TABLE user_subscriptions (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    plan_code varchar(50) NOT NULL DEFAULT 'free' CHECK (plan_code IN ('free', 'pro', 'plus')),
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
    amount int NOT NULL CHECK (amount > 0 OR transaction_type = 'refund'),
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
    amount int NOT NULL,
    currency varchar(10) DEFAULT 'INR',
    description text,
    source_type varchar(50) CHECK (source_type IN ('refund', 'adjustment', 'promotion', 'downgrade')),
    source_id varchar(255),
    is_used boolean DEFAULT false,
    used_at timestamp,
    expires_at timestamp,
    created_at timestamp DEFAULT CURRENT_TIMESTAMP,
    updated_at timestamp DEFAULT CURRENT_TIMESTAMP
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

CREATE TABLE user_plans (
    plan_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL UNIQUE REFERENCES users ON DELETE CASCADE,
    plan_type varchar(20) NOT NULL,
    max_instances int,
    features jsonb DEFAULT '{}',
    expires_at timestamp,
    created_at timestamp DEFAULT CURRENT_TIMESTAMP,
    updated_at timestamp DEFAULT CURRENT_TIMESTAMP,
    subscription_id varchar(255),
    customer_id varchar(255),
    payment_status varchar(50) DEFAULT 'none' CHECK (
        payment_status IN ('none', 'active', 'cancelled', 'failed', 'past_due')
    ),
    CHECK ((plan_type = 'free' AND max_instances = 1) OR (plan_type = 'pro' AND max_instances IS NULL))
);

CREATE TABLE webhook_events (
    event_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    external_event_id varchar(255) NOT NULL UNIQUE,
    event_type varchar(100) NOT NULL,
    payment_gateway varchar(20) NOT NULL CHECK (payment_gateway IN ('stripe', 'razorpay')),
    processed_at timestamp DEFAULT CURRENT_TIMESTAMP,
    payload jsonb NOT NULL,
    processing_status varchar(20) DEFAULT 'pending' CHECK (
        processing_status IN ('pending', 'processed', 'failed', 'skipped')
    ),
    error_message text,
    created_at timestamp DEFAULT CURRENT_TIMESTAMP
);

CREATE TABLE user_billing_details (
    billing_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL UNIQUE REFERENCES users ON DELETE CASCADE,
    address_line1 varchar(255) NOT NULL,
    address_line2 varchar(255),
    city varchar(100) NOT NULL,
    state varchar(100) NOT NULL,
    country varchar(100) NOT NULL,
    zip_code varchar(20) NOT NULL,
    cards jsonb DEFAULT '[]',
    default_card_id varchar(255),
    created_at timestamp DEFAULT CURRENT_TIMESTAMP,
    updated_at timestamp DEFAULT CURRENT_TIMESTAMP
);

CREATE INDEX idx_users_email ON users (email);
CREATE TRIGGER update_users_updated_at BEFORE UPDATE ON users
    FOR EACH ROW EXECUTE FUNCTION update_updated_at_column();
CREATE VIEW token_audit_summary AS
    SELECT instance_id, operation, status, count(*) AS operations
      FROM token_audit_log GROUP BY instance_id, operation, status;
