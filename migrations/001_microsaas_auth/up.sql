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

-- The timestamps checks refuse what other languages can't read: infinity, and years beyond four
-- digits.
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
    CONSTRAINT users_timestamps_check CHECK (
        GREATEST(created_at, updated_at, last_login_at) AT TIME ZONE 'UTC' < '10000-01-01'
        AND LEAST(created_at, updated_at, last_login_at) AT TIME ZONE 'UTC' >= '0001-01-01'
    ),
    CONSTRAINT users_email_key UNIQUE (email),
    CONSTRAINT users_razorpay_customer_id_key UNIQUE (razorpay_customer_id),
    CONSTRAINT users_first_name_check CHECK (char_length(first_name) BETWEEN 1 AND 255),
    CONSTRAINT users_last_name_check CHECK (char_length(last_name) <= 255),
    -- Login looks an address up by equality on the unique index, so it may have one spelling only.
    CONSTRAINT users_email_canonical CHECK (
        email = lower(email)
        AND email ~ '^[^]["(),:;<>@\\\s\u0001-\u001f\u007f-\u009f]+@[a-z0-9.-]+$'
        AND char_length(email) <= 255
    ),
    -- $id$…$hash: a plain password that begins with $ has not this form.
    CONSTRAINT users_password_check CHECK (
        password ~ '^\$[a-z0-9-]{1,32}(\$[A-Za-z0-9/+.,=-]+)+\$[A-Za-z0-9/+.=-]{22,}$'
        AND char_length(password) <= 512
    ),
    CONSTRAINT users_razorpay_customer_id_check CHECK (
        char_length(razorpay_customer_id) BETWEEN 1 AND 255
    )
);
CREATE INDEX users_created_at_idx ON users (created_at);
CREATE TRIGGER users_update_updated_at
    BEFORE UPDATE ON users
    FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*)
    EXECUTE FUNCTION update_updated_at_column();
CREATE TRIGGER users_anonymised
    BEFORE UPDATE OF
        id, first_name, last_name, email, password, email_verified, razorpay_customer_id,
        last_login_at, is_active
    ON users
    FOR EACH ROW WHEN (
        OLD.email = OLD.id || '@anonymised.invalid'
        AND (
            OLD.id, OLD.first_name, OLD.last_name, OLD.email, OLD.password, OLD.email_verified,
            OLD.razorpay_customer_id, OLD.last_login_at, OLD.is_active
        ) IS DISTINCT FROM (
            NEW.id, NEW.first_name, NEW.last_name, NEW.email, NEW.password, NEW.email_verified,
            NEW.razorpay_customer_id, NEW.last_login_at, NEW.is_active
        )
    )
    EXECUTE FUNCTION refuse_change(
        'users_anonymised', 'an anonymised user stays anonymised', 'Let the person sign up again.'
    );

COMMENT ON TABLE users IS
    'User accounts. A user with financial rows can''t be deleted, only anonymised, for good.';
COMMENT ON COLUMN users.last_name IS 'May be empty: not everyone has a last name.';
COMMENT ON COLUMN users.email IS
    'Canonical form: lowercase, exactly one @, no white space or control character, the domain in '
    'ASCII.';
COMMENT ON COLUMN users.password IS
    'Password hash in PHC or crypt form ($id$…$hash, at most 512 characters), never the password '
    'itself. NULL: the user signs in another way.';
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
    CONSTRAINT auth_tokens_timestamps_check CHECK (
        GREATEST(
            expires_at, used_at, session_expires_at, created_at, updated_at
        ) AT TIME ZONE 'UTC' < '10000-01-01'
        AND LEAST(
            expires_at, used_at, session_expires_at, created_at, updated_at
        ) AT TIME ZONE 'UTC' >= '0001-01-01'
    ),
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
    BEFORE UPDATE OF
        user_id, token, type, created_at, family_id, session_expires_at, is_used, used_at, attempts
    ON auth_tokens
    FOR EACH ROW WHEN (
        OLD.user_id <> NEW.user_id
        OR OLD.token <> NEW.token
        OR OLD.type <> NEW.type
        OR OLD.created_at <> NEW.created_at
        OR OLD.family_id IS DISTINCT FROM NEW.family_id
        OR OLD.session_expires_at IS DISTINCT FROM NEW.session_expires_at
        OR OLD.is_used AND NOT NEW.is_used
        OR OLD.is_used AND OLD.used_at IS DISTINCT FROM NEW.used_at
        OR OLD.attempts > NEW.attempts
    )
    EXECUTE FUNCTION refuse_change(
        'auth_tokens_fixed',
        'its user, token, type, creation, family and session''s end never change, a used token '
        'stays used, and attempts only grow',
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
    status_event_at          timestamptz,
    created_at               timestamptz         NOT NULL DEFAULT now(),
    updated_at               timestamptz         NOT NULL DEFAULT now(),
    CONSTRAINT user_subscriptions_pkey PRIMARY KEY (id),
    CONSTRAINT user_subscriptions_timestamps_check CHECK (
        GREATEST(
            current_period_start, current_period_end, trial_start, trial_end, cancelled_at,
            paused_at, resume_at, next_billing_date, last_payment_attempt, status_event_at,
            created_at, updated_at
        ) AT TIME ZONE 'UTC' < '10000-01-01'
        AND LEAST(
            current_period_start, current_period_end, trial_start, trial_end, cancelled_at,
            paused_at, resume_at, next_billing_date, last_payment_attempt, status_event_at,
            created_at, updated_at
        ) AT TIME ZONE 'UTC' >= '0001-01-01'
    ),
    CONSTRAINT user_subscriptions_user_id_fkey
        FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE RESTRICT,
    CONSTRAINT user_subscriptions_razorpay_subscription_id_key UNIQUE (razorpay_subscription_id),
    CONSTRAINT user_subscriptions_current_period_check
        CHECK (current_period_end > current_period_start),
    CONSTRAINT user_subscriptions_trial_check CHECK (
        trial_end IS NULL OR (trial_start IS NOT NULL AND trial_end > trial_start)
    ),
    CONSTRAINT user_subscriptions_cancelled_at_check
        CHECK (status <> 'cancelled' OR cancelled_at IS NOT NULL),
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
-- What a sweep ends: one index per reason.
CREATE INDEX user_subscriptions_cancel_at_period_end_idx ON user_subscriptions (current_period_end)
    WHERE cancel_at_period_end AND status IN ('active', 'past_due', 'paused');
-- The end of the grace period, in seconds: as a timestamp, a long one would be out of range.
CREATE INDEX user_subscriptions_past_due_idx
    ON user_subscriptions (
        (extract(epoch FROM current_period_end AT TIME ZONE 'UTC') + grace_period_days * 86400.0)
    )
    WHERE status = 'past_due';
CREATE INDEX user_subscriptions_resume_at_idx ON user_subscriptions (resume_at)
    WHERE status = 'paused';
CREATE INDEX user_subscriptions_created_at_idx ON user_subscriptions (created_at)
    WHERE status = 'created';
CREATE TRIGGER user_subscriptions_update_updated_at
    BEFORE UPDATE ON user_subscriptions
    FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*)
    EXECUTE FUNCTION update_updated_at_column();
CREATE TRIGGER user_subscriptions_status_final
    BEFORE UPDATE OF status ON user_subscriptions
    FOR EACH ROW WHEN (
        OLD.status IN ('completed', 'upgraded', 'replaced') AND NEW.status <> OLD.status
    )
    EXECUTE FUNCTION refuse_change(
        'user_subscriptions_status_final',
        'a subscription that is completed, replaced or upgraded stays so',
        'Start a new subscription.'
    );

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
COMMENT ON COLUMN user_subscriptions.status_event_at IS
    'When the gateway made the status what it is; NULL: no event has. An older event changes no status.';

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
    CONSTRAINT subscription_transactions_timestamps_check CHECK (
        GREATEST(
            processed_at, settled_at, refunded_at, created_at, updated_at
        ) AT TIME ZONE 'UTC' < '10000-01-01'
        AND LEAST(
            processed_at, settled_at, refunded_at, created_at, updated_at
        ) AT TIME ZONE 'UTC' >= '0001-01-01'
    ),
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
        net_amount BETWEEN 0 AND amount OR transaction_type = 'refund'
    ),
    CONSTRAINT subscription_transactions_currency_check CHECK (currency ~ '^[A-Z]{3}$'),
    -- NaN is greater than any number, even than Infinity.
    CONSTRAINT subscription_transactions_exchange_rate_check
        CHECK (exchange_rate > 0 AND exchange_rate < 'Infinity'),
    -- JSON that parsers read: at most 100 levels, and no number beyond double precision.
    CONSTRAINT subscription_transactions_method_details_json_check CHECK (
        NOT jsonb_path_exists(method_details_json, 'strict $.**{100 to last}')
        AND NOT jsonb_path_exists(
            method_details_json,
            'strict $.** ? (@ > "1e308".double() || @ < "-1e308".double())'
        )
    ),
    CONSTRAINT subscription_transactions_gateway_response_json_check CHECK (
        NOT jsonb_path_exists(gateway_response_json, 'strict $.**{100 to last}')
        AND NOT jsonb_path_exists(
            gateway_response_json,
            'strict $.** ? (@ > "1e308".double() || @ < "-1e308".double())'
        )
    ),
    -- PCI DSS 3.3, 3.5. A card number is 13 to 19 digits, whatever is around them, or the same with
    -- spaces or hyphens between quotes or spaces. The first digit tells it from a time in
    -- milliseconds.
    CONSTRAINT subscription_transactions_no_card_secrets CHECK (
        NOT jsonb_path_exists(
            method_details_json,
            'strict $.** ? (@.type() == "object").keyvalue() ? (@.key like_regex'
            ' "^(card[ _-]?)?(number|pan|cvv2?|cvc2?|csc|cvn|security[ _-]?code'
            '|verification[ _-]?(code|value))$" flag "i")'
        )
        AND method_details_json::text
            !~ '(^|[^0-9.])[2-68][0-9]{12,18}([^0-9]|$)|[" ][2-68]([ -]?[0-9]){12,18}[" ]'
    ),
    CONSTRAINT subscription_transactions_retry_count_check CHECK (retry_count >= 0),
    CONSTRAINT subscription_transactions_parent_transaction_id_check
        CHECK (parent_transaction_id <> id),
    -- A trigger adds what the payment must be.
    CONSTRAINT subscription_transactions_refund_of_parent CHECK (
        transaction_type <> 'refund' OR (amount < 0 AND parent_transaction_id IS NOT NULL)
    )
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
CREATE INDEX subscription_transactions_created_at_id_idx
    ON subscription_transactions (created_at, id)
    WHERE status IN ('created', 'authorized');
CREATE TRIGGER subscription_transactions_update_updated_at
    BEFORE UPDATE ON subscription_transactions
    FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*)
    EXECUTE FUNCTION update_updated_at_column();
CREATE TRIGGER subscription_transactions_fixed
    BEFORE UPDATE OF user_id, transaction_type, amount, currency, parent_transaction_id
    ON subscription_transactions
    FOR EACH ROW WHEN (
        (OLD.user_id, OLD.transaction_type, OLD.amount, OLD.currency, OLD.parent_transaction_id)
        IS DISTINCT FROM
        (NEW.user_id, NEW.transaction_type, NEW.amount, NEW.currency, NEW.parent_transaction_id)
    )
    EXECUTE FUNCTION refuse_change(
        'subscription_transactions_fixed',
        'its user, type, amount, currency and parent never change',
        'Record another transaction, such as a refund or an adjustment.'
    );
CREATE TRIGGER subscription_transactions_status
    BEFORE UPDATE OF status ON subscription_transactions
    FOR EACH ROW WHEN (
        OLD.status <> NEW.status
        AND NOT (
            (NEW.status = 'authorized' AND OLD.status IN ('created', 'failed'))
            OR (NEW.status = 'captured' AND OLD.status IN ('created', 'authorized', 'failed'))
            OR (NEW.status = 'refunded' AND OLD.status = 'captured')
            OR (NEW.status IN ('failed', 'cancelled') AND OLD.status IN ('created', 'authorized'))
        )
    )
    EXECUTE FUNCTION refuse_change(
        'subscription_transactions_status',
        'its status only moves forwards',
        'Read the row: the gateway may have reported a later status before.'
    );

CREATE FUNCTION subscription_transactions_check_refund() RETURNS trigger
LANGUAGE plpgsql AS $$
DECLARE
    payment  subscription_transactions;
    refunded numeric;
BEGIN
    -- An update that changes nothing, instead of a row lock: after a lock, a transaction at
    -- REPEATABLE READ would sum the refunds in its older snapshot.
    UPDATE subscription_transactions
       SET status = status
     WHERE id = NEW.parent_transaction_id
    RETURNING * INTO payment;
    IF payment.user_id IS DISTINCT FROM NEW.user_id
        OR payment.currency IS DISTINCT FROM NEW.currency
        OR payment.transaction_type OPERATOR(pg_catalog.=) 'refund'
        OR NOT (
            payment.status OPERATOR(pg_catalog.=) 'captured'
            OR payment.status OPERATOR(pg_catalog.=) 'refunded'
        )
    THEN
        RAISE EXCEPTION 'refund % was not recorded: transaction % is not a captured payment of '
            'the same user in the same currency', NEW.id, NEW.parent_transaction_id
            USING ERRCODE = 'check_violation',
                  TABLE = 'subscription_transactions',
                  CONSTRAINT = 'subscription_transactions_refund_of_parent',
                  HINT = 'Set parent_transaction_id to the payment that is refunded.';
    END IF;
    SELECT -sum(amount)
      INTO refunded
      FROM subscription_transactions
     WHERE parent_transaction_id = NEW.parent_transaction_id
       AND transaction_type OPERATOR(pg_catalog.=) 'refund'
       AND status OPERATOR(pg_catalog.<>) 'failed'
       AND status OPERATOR(pg_catalog.<>) 'cancelled';
    IF refunded > payment.amount::numeric THEN
        RAISE EXCEPTION 'refund % was not recorded: the refunds of payment % would be % of %',
            NEW.id, NEW.parent_transaction_id, refunded, payment.amount
            USING ERRCODE = 'check_violation',
                  TABLE = 'subscription_transactions',
                  CONSTRAINT = 'subscription_transactions_refund_exceeds',
                  HINT = 'Refund at most what the other refunds leave of the payment.';
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION subscription_transactions_check_refund() IS
    'Locks the payment of a refund, and checks that it is captured and that its refunds, but failed '
    'and cancelled ones, don''t exceed it.';
CREATE TRIGGER subscription_transactions_refund_insert
    AFTER INSERT ON subscription_transactions
    FOR EACH ROW WHEN (NEW.transaction_type = 'refund')
    EXECUTE FUNCTION subscription_transactions_check_refund();
CREATE TRIGGER subscription_transactions_refund_update
    AFTER UPDATE OF status ON subscription_transactions
    FOR EACH ROW WHEN (
        NEW.transaction_type = 'refund'
        AND OLD.status IN ('failed', 'cancelled')
        AND NEW.status NOT IN ('failed', 'cancelled')
    )
    EXECUTE FUNCTION subscription_transactions_check_refund();
REVOKE EXECUTE ON FUNCTION subscription_transactions_check_refund() FROM PUBLIC;
-- The function runs as its owner from here on, and finds only the tables of this schema.
DO $$
BEGIN
    EXECUTE format(
        'ALTER FUNCTION subscription_transactions_check_refund()'
            ' SECURITY DEFINER SET search_path = %I, pg_temp',
        current_schema()
    );
END
$$;

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
COMMENT ON COLUMN subscription_transactions.method_details_json IS
    'What may be shown of the means of payment; never a card number or security code.';
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
    CONSTRAINT account_credits_timestamps_check CHECK (
        GREATEST(
            used_at, expires_at, created_at, updated_at
        ) AT TIME ZONE 'UTC' < '10000-01-01'
        AND LEAST(
            used_at, expires_at, created_at, updated_at
        ) AT TIME ZONE 'UTC' >= '0001-01-01'
    ),
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
CREATE TRIGGER account_credits_fixed
    BEFORE UPDATE OF user_id, amount, currency, source_type, source_id, is_used, used_at
    ON account_credits
    FOR EACH ROW WHEN (
        (OLD.user_id, OLD.amount, OLD.currency, OLD.source_type, OLD.source_id)
        IS DISTINCT FROM
        (NEW.user_id, NEW.amount, NEW.currency, NEW.source_type, NEW.source_id)
        OR (OLD.is_used AND (OLD.is_used, OLD.used_at) IS DISTINCT FROM (NEW.is_used, NEW.used_at))
    )
    EXECUTE FUNCTION refuse_change(
        'account_credits_fixed',
        'its user, amount, currency and source never change, and used stays used',
        'Grant another credit, or a debit.'
    );

COMMENT ON TABLE account_credits IS 'Money that the platform owes a user.';
COMMENT ON COLUMN account_credits.amount IS
    'In minor units of currency (paise for INR); negative is a debit.';
COMMENT ON COLUMN account_credits.source_id IS
    'Id of what the credit is for, such as a refund. A refund or downgrade is credited only once.';
COMMENT ON COLUMN account_credits.expires_at IS 'NULL: never expires.';

COMMENT ON INDEX users_created_at_idx IS
    'Users by the time of their sign-up: pages of a list, and sign-ups that were never verified.';
COMMENT ON INDEX auth_tokens_token_key IS
    'A token by its digest. Codes are excluded: they may be equal for two users.';
COMMENT ON INDEX auth_tokens_one_live_per_type IS
    'The live code or link of a user, and that there is only one of a type.';
COMMENT ON INDEX auth_tokens_user_id_type_created_at_idx IS
    'The tokens of a user by type since a time: the limit of issues, and revocation.';
COMMENT ON INDEX auth_tokens_expires_at_idx IS 'Expired tokens, for the purge.';
COMMENT ON INDEX auth_tokens_family_id_idx IS
    'The refresh tokens of a session: its end, and the answer to a reused token.';
COMMENT ON INDEX user_subscriptions_one_live_per_user IS
    'The live subscription of a user, and that there is only one.';
COMMENT ON INDEX user_subscriptions_user_id_created_at_idx IS
    'The subscriptions of a user, newest first.';
COMMENT ON INDEX user_subscriptions_next_billing_date_idx IS
    'The subscriptions whose billing is due.';
COMMENT ON INDEX user_subscriptions_cancel_at_period_end_idx IS
    'What a sweep ends: a cancelled subscription whose period is over.';
COMMENT ON INDEX user_subscriptions_past_due_idx IS
    'What a sweep ends: a grace period that is over.';
COMMENT ON INDEX user_subscriptions_resume_at_idx IS 'What a sweep resumes: a pause that is over.';
COMMENT ON INDEX user_subscriptions_created_at_idx IS
    'What a sweep ends: a subscription that was created and never paid.';
COMMENT ON INDEX subscription_transactions_user_id_created_at_idx IS
    'The transactions of a user, newest first.';
COMMENT ON INDEX subscription_transactions_subscription_id_idx IS
    'The transactions of a subscription, and its foreign key.';
COMMENT ON INDEX subscription_transactions_parent_transaction_id_idx IS
    'The refunds of a payment, and its foreign key.';
COMMENT ON INDEX subscription_transactions_razorpay_order_id_idx IS
    'The transactions of an order at Razorpay.';
COMMENT ON INDEX subscription_transactions_created_at_id_idx IS
    'Payments that were begun and not ended, oldest first.';
COMMENT ON INDEX account_credits_source_type_source_id_key IS
    'That a refund or a downgrade is credited once.';
COMMENT ON INDEX account_credits_user_id_created_at_idx IS
    'The credits of a user: the balance, and a list with the newest first.';
