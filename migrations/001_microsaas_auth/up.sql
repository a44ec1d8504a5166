-- User accounts, digests of their one-time secrets, and billing. Deleting a user never deletes a
-- financial row: those foreign keys are ON DELETE RESTRICT. Such a user is anonymised instead.

SET LOCAL lock_timeout = '5s';

-- Databases from PostgreSQL 14 and before let every role create in public, also after an upgrade.
DO $$
BEGIN
    IF has_schema_privilege('public', current_schema(), 'CREATE') THEN
        RAISE EXCEPTION 'every role may create objects in the schema %, and by a function or '
            'operator there run code with the rights of others', quote_ident(current_schema())
            USING ERRCODE = 'insufficient_privilege',
                  HINT    = format(
                      'As the owner of the schema, REVOKE CREATE ON SCHEMA %I FROM PUBLIC; '
                      'then run the migration again.',
                      current_schema()
                  );
    END IF;
END
$$;

CREATE TYPE auth_token_type AS ENUM (
    'email_otp', 'password_reset', 'email_verification', 'refresh', 'email_change_pending'
);
CREATE TYPE subscription_plan AS ENUM ('free', 'pro', 'plus');
CREATE TYPE subscription_status AS ENUM (
    'created', 'authenticated', 'active', 'past_due', 'cancelled', 'completed', 'paused', 'halted',
    'upgraded', 'replaced'
);
CREATE TYPE billing_cycle AS ENUM ('monthly', 'yearly');
CREATE TYPE transaction_type AS ENUM ('subscription', 'addon', 'refund', 'adjustment', 'fee');
CREATE TYPE transaction_status AS ENUM (
    'created', 'authorized', 'captured', 'refunded', 'failed', 'cancelled'
);
CREATE TYPE credit_source AS ENUM ('refund', 'adjustment', 'promotion', 'downgrade');

CREATE FUNCTION update_updated_at_column() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_at := now();
    RETURN NEW;
END
$$;
COMMENT ON FUNCTION update_updated_at_column() IS
    'Sets updated_at to now(). Its triggers have a WHEN that skips updates without a change.';

CREATE FUNCTION refuse_change() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the row of % was not changed: %', TG_TABLE_NAME, TG_ARGV[1]
        USING ERRCODE = 'check_violation',
              TABLE = TG_TABLE_NAME,
              CONSTRAINT = TG_ARGV[0],
              HINT = TG_ARGV[2];
END
$$;
COMMENT ON FUNCTION refuse_change() IS
    'Refuses an update that breaks a rule. Its trigger gives the rule''s name, what it says, and a '
    'hint, and has a WHEN for the rows that break it.';

CREATE TABLE users (
    id                   uuid        NOT NULL DEFAULT gen_random_uuid(),
    first_name           text        NOT NULL,
    last_name            text        NOT NULL,
    email                text        NOT NULL,
    password             text,
    email_verified       boolean     NOT NULL DEFAULT false,
    razorpay_customer_id text,
    created_at           timestamptz NOT NULL DEFAULT now(),
    updated_at           timestamptz NOT NULL DEFAULT now(),
    last_login_at        timestamptz,
    is_active            boolean     NOT NULL DEFAULT true,
    CONSTRAINT users_pkey PRIMARY KEY (id),
    CONSTRAINT users_email_key UNIQUE (email),
    CONSTRAINT users_razorpay_customer_id_key UNIQUE (razorpay_customer_id),
    CONSTRAINT users_first_name_check CHECK (char_length(first_name) BETWEEN 1 AND 255),
    CONSTRAINT users_last_name_check CHECK (char_length(last_name) <= 255),
    -- Login looks an address up by equality on the unique index, so it may have one spelling only.
    CONSTRAINT users_email_canonical CHECK (
        email = lower(email) AND email ~ '^[^@\s]+@[^@\s]+$' AND char_length(email) <= 255
    ),
    CONSTRAINT users_password_check CHECK (password LIKE '$%')
);
CREATE INDEX users_created_at_idx ON users (created_at);
CREATE TRIGGER users_update_updated_at
    BEFORE UPDATE ON users
    FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*)
    EXECUTE FUNCTION update_updated_at_column();

COMMENT ON TABLE users IS
    'User accounts. A user with financial rows can''t be deleted, only anonymised.';
COMMENT ON COLUMN users.last_name IS 'May be empty: not everyone has a last name.';
COMMENT ON COLUMN users.email IS 'Canonical form: lowercase, without white space, exactly one @.';
COMMENT ON COLUMN users.password IS
    'Password hash in PHC or crypt format (starts with $), never the password itself. '
    'NULL: the user signs in another way.';
COMMENT ON COLUMN users.email_verified IS
    'True once the user has proved that mail arrives at email.';
COMMENT ON COLUMN users.razorpay_customer_id IS
    'Customer id at Razorpay. Unique, because saved cards are looked up by it.';
COMMENT ON COLUMN users.is_active IS 'False: deactivated; the user can''t sign in.';

CREATE TABLE auth_tokens (
    id         uuid            NOT NULL DEFAULT gen_random_uuid(),
    user_id    uuid            NOT NULL,
    token      bytea           NOT NULL,
    type       auth_token_type NOT NULL,
    expires_at timestamptz     NOT NULL,
    is_used    boolean         NOT NULL DEFAULT false,
    attempts   smallint        NOT NULL DEFAULT 0,
    created_at timestamptz     NOT NULL DEFAULT now(),
    updated_at timestamptz     NOT NULL DEFAULT now(),
    used_at    timestamptz,
    family_id  uuid,
    session_expires_at timestamptz,
    CONSTRAINT auth_tokens_pkey PRIMARY KEY (id),
    CONSTRAINT auth_tokens_user_id_fkey
        FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE,
    CONSTRAINT auth_tokens_token_check CHECK (octet_length(token) = 32),
    CONSTRAINT auth_tokens_expires_at_check CHECK (expires_at > created_at),
    CONSTRAINT auth_tokens_attempts_check CHECK (attempts >= 0),
    CONSTRAINT auth_tokens_used_at_check CHECK (is_used = (used_at IS NOT NULL)),
    CONSTRAINT auth_tokens_family_id_check CHECK ((type = 'refresh') = (family_id IS NOT NULL)),
    CONSTRAINT auth_tokens_session_expires_at_check CHECK (
        (type = 'refresh') = (session_expires_at IS NOT NULL) AND expires_at <= session_expires_at
    ),
    -- Differences: adding an interval to a timestamp depends on the session's time zone.
    CONSTRAINT auth_tokens_lifetime CHECK (
        CASE
            WHEN type IN ('email_otp', 'email_change_pending')
                THEN expires_at - created_at <= interval '1 hour'
            WHEN type IN ('password_reset', 'email_verification')
                THEN expires_at - created_at <= interval '7 days'
            ELSE session_expires_at - created_at <= interval '365 days'
        END
    )
);
-- For long random secrets only: the digest of a six-digit code may repeat.
CREATE UNIQUE INDEX auth_tokens_token_key ON auth_tokens (token)
    WHERE type IN ('refresh', 'password_reset', 'email_verification');
CREATE UNIQUE INDEX auth_tokens_one_live_per_type ON auth_tokens (user_id, type)
    WHERE type <> 'refresh' AND NOT is_used;
CREATE INDEX auth_tokens_user_id_type_created_at_idx ON auth_tokens (user_id, type, created_at);
CREATE INDEX auth_tokens_expires_at_idx ON auth_tokens (expires_at);
CREATE INDEX auth_tokens_family_id_idx ON auth_tokens (family_id);
CREATE TRIGGER auth_tokens_fixed
    BEFORE UPDATE OF user_id, token, type, family_id, session_expires_at, is_used, used_at, attempts
    ON auth_tokens
    FOR EACH ROW WHEN (
        OLD.user_id <> NEW.user_id
        OR OLD.token <> NEW.token
        OR OLD.type <> NEW.type
        OR OLD.family_id IS DISTINCT FROM NEW.family_id
        OR OLD.session_expires_at IS DISTINCT FROM NEW.session_expires_at
        OR OLD.is_used AND NOT NEW.is_used
        OR OLD.is_used AND OLD.used_at IS DISTINCT FROM NEW.used_at
        OR OLD.attempts > NEW.attempts
    )
    EXECUTE FUNCTION refuse_change(
        'auth_tokens_fixed',
        'its user, token, type, family and session''s end never change, a used token stays used, '
        'and attempts only grow',
        'Issue a new token.'
    );
CREATE TRIGGER auth_tokens_update_updated_at
    BEFORE UPDATE ON auth_tokens
    FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*)
    EXECUTE FUNCTION update_updated_at_column();

COMMENT ON TABLE auth_tokens IS 'One-time codes, links and refresh tokens, stored as digests.';
COMMENT ON COLUMN auth_tokens.token IS
    'Keyed digest of the secret, 32 bytes; never the secret itself.';
COMMENT ON COLUMN auth_tokens.is_used IS 'True once the token is consumed, replaced or revoked.';
COMMENT ON COLUMN auth_tokens.attempts IS 'Number of wrong guesses so far.';
COMMENT ON COLUMN auth_tokens.used_at IS 'When it was consumed, replaced or revoked.';
COMMENT ON COLUMN auth_tokens.family_id IS
    'The session of a refresh token: the tokens that descend from one sign-in.';
COMMENT ON COLUMN auth_tokens.session_expires_at IS
    'When the session ends, however often its token is replaced; at most 365 days after sign-in.';

CREATE TABLE user_subscriptions (
    id                       uuid                NOT NULL DEFAULT gen_random_uuid(),
    user_id                  uuid                NOT NULL,
    plan_code                subscription_plan   NOT NULL DEFAULT 'free',
    razorpay_subscription_id text,
    razorpay_customer_id     text,
    status                   subscription_status NOT NULL DEFAULT 'active',
    billing_cycle            billing_cycle       NOT NULL DEFAULT 'monthly',
    current_period_start     timestamptz         NOT NULL DEFAULT now(),
    current_period_end       timestamptz         NOT NULL DEFAULT now() + interval '30 days',
    trial_start              timestamptz,
    trial_end                timestamptz,
    cancel_at_period_end     boolean             NOT NULL DEFAULT false,
    cancelled_at             timestamptz,
    cancellation_reason      text,
    cancellation_feedback    text,
    pause_count              integer             NOT NULL DEFAULT 0,
    paused_at                timestamptz,
    resume_at                timestamptz,
    next_billing_date        timestamptz,
    proration_amount         bigint              NOT NULL DEFAULT 0,
    discount_amount          bigint              NOT NULL DEFAULT 0,
    tax_amount               bigint              NOT NULL DEFAULT 0,
    total_amount             bigint              NOT NULL DEFAULT 0,
    auto_renewal             boolean             NOT NULL DEFAULT true,
    grace_period_days        integer             NOT NULL DEFAULT 3,
    failed_payment_count     integer             NOT NULL DEFAULT 0,
    last_payment_attempt     timestamptz,
    created_at               timestamptz         NOT NULL DEFAULT now(),
    updated_at               timestamptz         NOT NULL DEFAULT now(),
    CONSTRAINT user_subscriptions_pkey PRIMARY KEY (id),
    CONSTRAINT user_subscriptions_user_id_fkey
        FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE RESTRICT,
    CONSTRAINT user_subscriptions_razorpay_subscription_id_key UNIQUE (razorpay_subscription_id),
    CONSTRAINT user_subscriptions_current_period_check
        CHECK (current_period_end > current_period_start),
    CONSTRAINT user_subscriptions_trial_check CHECK (
        trial_end IS NULL OR (trial_start IS NOT NULL AND trial_end > trial_start)
    ),
    CONSTRAINT user_subscriptions_pause_count_check CHECK (pause_count >= 0),
    CONSTRAINT user_subscriptions_discount_amount_check CHECK (discount_amount >= 0),
    CONSTRAINT user_subscriptions_tax_amount_check CHECK (tax_amount >= 0),
    CONSTRAINT user_subscriptions_total_amount_check CHECK (total_amount >= 0),
    CONSTRAINT user_subscriptions_grace_period_days_check CHECK (grace_period_days >= 0),
    CONSTRAINT user_subscriptions_failed_payment_count_check CHECK (failed_payment_count >= 0)
);
CREATE UNIQUE INDEX user_subscriptions_one_live_per_user ON user_subscriptions (user_id)
    WHERE status IN ('active', 'past_due', 'paused');
CREATE INDEX user_subscriptions_user_id_created_at_idx
    ON user_subscriptions (user_id, created_at DESC);
CREATE INDEX user_subscriptions_next_billing_date_idx ON user_subscriptions (next_billing_date)
    WHERE status IN ('active', 'past_due');
CREATE TRIGGER user_subscriptions_update_updated_at
    BEFORE UPDATE ON user_subscriptions
    FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*)
    EXECUTE FUNCTION update_updated_at_column();

COMMENT ON TABLE user_subscriptions IS
    'Subscriptions sold to users, past and present, with their state at Razorpay. '
    'user_plans decides what a user may do.';
COMMENT ON COLUMN user_subscriptions.razorpay_customer_id IS
    'Customer id of this subscription at Razorpay; users.razorpay_customer_id is the current one.';
COMMENT ON COLUMN user_subscriptions.status IS
    'A user has at most one subscription that is active, past_due or paused.';
COMMENT ON COLUMN user_subscriptions.proration_amount IS
    'In paise; negative in the user''s favour.';
COMMENT ON COLUMN user_subscriptions.discount_amount IS 'In paise.';
COMMENT ON COLUMN user_subscriptions.tax_amount IS 'In paise.';
COMMENT ON COLUMN user_subscriptions.total_amount IS 'In paise.';
COMMENT ON COLUMN user_subscriptions.grace_period_days IS
    'How many days the subscription may be past due before it is halted.';

CREATE TABLE subscription_transactions (
    id                    uuid               NOT NULL DEFAULT gen_random_uuid(),
    user_id               uuid               NOT NULL,
    subscription_id       uuid,
    razorpay_payment_id   text,
    razorpay_order_id     text,
    transaction_type      transaction_type   NOT NULL DEFAULT 'subscription',
    amount                bigint             NOT NULL,
    tax_amount            bigint             NOT NULL DEFAULT 0,
    discount_amount       bigint             NOT NULL DEFAULT 0,
    fee_amount            bigint             NOT NULL DEFAULT 0,
    net_amount            bigint             NOT NULL,
    currency              text               NOT NULL DEFAULT 'INR',
    exchange_rate         numeric(18,8)      NOT NULL DEFAULT 1,
    status                transaction_status NOT NULL,
    gateway_status        text,
    method                text,
    method_details_json   jsonb,
    gateway_response_json jsonb,
    description           text,
    receipt_number        text,
    invoice_id            text,
    failure_reason        text,
    failure_code          text,
    retry_count           integer            NOT NULL DEFAULT 0,
    parent_transaction_id uuid,
    processed_at          timestamptz,
    settled_at            timestamptz,
    refunded_at           timestamptz,
    created_at            timestamptz        NOT NULL DEFAULT now(),
    updated_at            timestamptz        NOT NULL DEFAULT now(),
    CONSTRAINT subscription_transactions_pkey PRIMARY KEY (id),
    CONSTRAINT subscription_transactions_user_id_fkey
        FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE RESTRICT,
    CONSTRAINT subscription_transactions_subscription_id_fkey
        FOREIGN KEY (subscription_id) REFERENCES user_subscriptions (id) ON DELETE RESTRICT,
    CONSTRAINT subscription_transactions_parent_transaction_id_fkey
        FOREIGN KEY (parent_transaction_id) REFERENCES subscription_transactions (id)
        ON DELETE RESTRICT,
    CONSTRAINT subscription_transactions_razorpay_payment_id_key UNIQUE (razorpay_payment_id),
    CONSTRAINT subscription_transactions_receipt_number_key UNIQUE (receipt_number),
    CONSTRAINT subscription_transactions_amount_check CHECK (
        amount >= 0 OR transaction_type = 'refund'
    ),
    CONSTRAINT subscription_transactions_tax_amount_check CHECK (
        tax_amount >= 0 OR transaction_type = 'refund'
    ),
    CONSTRAINT subscription_transactions_discount_amount_check CHECK (
        discount_amount >= 0 OR transaction_type = 'refund'
    ),
    CONSTRAINT subscription_transactions_fee_amount_check CHECK (
        fee_amount >= 0 OR transaction_type = 'refund'
    ),
    CONSTRAINT subscription_transactions_net_amount_check CHECK (
        net_amount >= 0 OR transaction_type = 'refund'
    ),
    CONSTRAINT subscription_transactions_currency_check CHECK (currency ~ '^[A-Z]{3}$'),
    CONSTRAINT subscription_transactions_exchange_rate_check CHECK (exchange_rate > 0),
    CONSTRAINT subscription_transactions_retry_count_check CHECK (retry_count >= 0),
    CONSTRAINT subscription_transactions_parent_transaction_id_check
        CHECK (parent_transaction_id <> id)
);
CREATE INDEX subscription_transactions_user_id_created_at_idx
    ON subscription_transactions (user_id, created_at DESC);
CREATE INDEX subscription_transactions_subscription_id_idx
    ON subscription_transactions (subscription_id);
CREATE INDEX subscription_transactions_parent_transaction_id_idx
    ON subscription_transactions (parent_transaction_id);
CREATE INDEX subscription_transactions_razorpay_order_id_idx
    ON subscription_transactions (razorpay_order_id)
    WHERE razorpay_order_id IS NOT NULL;
CREATE INDEX subscription_transactions_created_at_idx ON subscription_transactions (created_at)
    WHERE status IN ('created', 'authorized');
CREATE TRIGGER subscription_transactions_update_updated_at
    BEFORE UPDATE ON subscription_transactions
    FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*)
    EXECUTE FUNCTION update_updated_at_column();

COMMENT ON TABLE subscription_transactions IS 'Payments, refunds, fees and adjustments.';
COMMENT ON COLUMN subscription_transactions.amount IS
    'Gross amount in minor units of currency (paise for INR); negative only for a refund.';
COMMENT ON COLUMN subscription_transactions.tax_amount IS 'In minor units of currency.';
COMMENT ON COLUMN subscription_transactions.discount_amount IS 'In minor units of currency.';
COMMENT ON COLUMN subscription_transactions.fee_amount IS
    'Fee of the gateway, in minor units of currency.';
COMMENT ON COLUMN subscription_transactions.net_amount IS
    'Amount that remains after tax, discount and fee, in minor units of currency.';
COMMENT ON COLUMN subscription_transactions.currency IS 'ISO 4217 code, in capitals.';
COMMENT ON COLUMN subscription_transactions.exchange_rate IS 'Rupees per unit of currency.';
COMMENT ON COLUMN subscription_transactions.razorpay_payment_id IS
    'Payment id at Razorpay. Unique: a payment that is reported twice is stored once.';
COMMENT ON COLUMN subscription_transactions.parent_transaction_id IS
    'The payment to which this refund or adjustment belongs.';

CREATE TABLE account_credits (
    id          uuid        NOT NULL DEFAULT gen_random_uuid(),
    user_id     uuid        NOT NULL,
    amount      bigint      NOT NULL,
    currency    text        NOT NULL DEFAULT 'INR',
    description text,
    source_type credit_source,
    source_id   text,
    is_used     boolean     NOT NULL DEFAULT false,
    used_at     timestamptz,
    expires_at  timestamptz,
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT account_credits_pkey PRIMARY KEY (id),
    CONSTRAINT account_credits_user_id_fkey
        FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE RESTRICT,
    CONSTRAINT account_credits_amount_check CHECK (amount <> 0),
    CONSTRAINT account_credits_currency_check CHECK (currency ~ '^[A-Z]{3}$'),
    CONSTRAINT account_credits_is_used_check CHECK (is_used = (used_at IS NOT NULL)),
    -- The unique index below can't detect a second credit without a source_id.
    CONSTRAINT account_credits_source_id_check CHECK (
        source_type NOT IN ('refund', 'downgrade') OR source_id IS NOT NULL
    )
);
CREATE UNIQUE INDEX account_credits_source_type_source_id_key
    ON account_credits (source_type, source_id)
    WHERE source_type IN ('refund', 'downgrade');
CREATE INDEX account_credits_user_id_created_at_idx ON account_credits (user_id, created_at DESC);
CREATE TRIGGER account_credits_update_updated_at
    BEFORE UPDATE ON account_credits
    FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*)
    EXECUTE FUNCTION update_updated_at_column();

COMMENT ON TABLE account_credits IS 'Money that the platform owes a user.';
COMMENT ON COLUMN account_credits.amount IS
    'In minor units of currency (paise for INR); negative is a debit.';
COMMENT ON COLUMN account_credits.source_id IS
    'Id of what the credit is for, such as a refund. A refund or downgrade is credited only once.';
COMMENT ON COLUMN account_credits.expires_at IS 'NULL: never expires.';
