-- How a plan is paid, and the log of gateway webhooks. A gateway may deliver an event several
-- times, and two gateways may use the same id, so the pair of gateway and id is unique.

-- user_plans has one row per user and is small: its constraints may be checked while it is locked.
-- squawk-ignore-file constraint-missing-not-valid, disallowed-unique-constraint

SET LOCAL lock_timeout = '5s';

CREATE TYPE plan_payment_status AS ENUM ('none', 'active', 'cancelled', 'failed', 'past_due');
CREATE TYPE payment_gateway AS ENUM ('stripe', 'razorpay');
CREATE TYPE webhook_status AS ENUM ('pending', 'processed', 'failed', 'skipped');

ALTER TABLE user_plans
    ADD COLUMN subscription_id text,
    ADD COLUMN customer_id     text,
    ADD COLUMN payment_status  plan_payment_status NOT NULL DEFAULT 'none';
-- Each alone: a distributed engine (Citus) refuses ADD CONSTRAINT beside other changes.
ALTER TABLE user_plans ADD CONSTRAINT user_plans_subscription_id_key UNIQUE (subscription_id);
ALTER TABLE user_plans ADD CONSTRAINT user_plans_customer_id_key UNIQUE (customer_id);
ALTER TABLE user_plans
    ADD CONSTRAINT user_plans_subscription_id_check CHECK (subscription_id <> '');
ALTER TABLE user_plans
    ADD CONSTRAINT user_plans_customer_id_check CHECK (customer_id <> '');

COMMENT ON COLUMN user_plans.subscription_id IS
    'Subscription id at the gateway that pays for the plan (Stripe or Razorpay).';
COMMENT ON COLUMN user_plans.customer_id IS
    'Customer id at the gateway that pays for the plan. '
    'Unique, because saved cards are looked up by it.';
COMMENT ON COLUMN user_plans.payment_status IS 'none: nobody pays for this plan.';

CREATE TABLE webhook_events (
    event_id          uuid            NOT NULL DEFAULT gen_random_uuid(),
    external_event_id text            NOT NULL,
    event_type        text            NOT NULL,
    payment_gateway   payment_gateway NOT NULL,
    processed_at      timestamptz,
    payload           jsonb           NOT NULL,
    processing_status webhook_status  NOT NULL DEFAULT 'pending',
    error_message     text,
    created_at        timestamptz     NOT NULL DEFAULT now(),
    user_id           uuid,
    attempts          integer         NOT NULL DEFAULT 0,
    available_at      timestamptz     NOT NULL DEFAULT now(),
    CONSTRAINT webhook_events_pkey PRIMARY KEY (event_id),
    CONSTRAINT webhook_events_user_id_fkey
        FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE SET NULL,
    CONSTRAINT webhook_events_timestamps_check CHECK (
        GREATEST(processed_at, created_at, available_at) AT TIME ZONE 'UTC' < '10000-01-01'
        AND LEAST(processed_at, created_at, available_at) AT TIME ZONE 'UTC' >= '0001-01-01'
    ),
    CONSTRAINT webhook_events_payment_gateway_external_event_id_key
        UNIQUE (payment_gateway, external_event_id),
    CONSTRAINT webhook_events_payload_check CHECK (
        NOT jsonb_path_exists(payload, 'strict $.**{100 to last}')
        AND NOT jsonb_path_exists(
            payload,
            'strict $.** ? (@ > "1e308".double() || @ < "-1e308".double())'
        )
    ),
    CONSTRAINT webhook_events_external_event_id_check CHECK (external_event_id <> ''),
    CONSTRAINT webhook_events_processed_at_check
        CHECK ((processing_status = 'pending') = (processed_at IS NULL)),
    CONSTRAINT webhook_events_attempts_check CHECK (attempts >= 0)
);
-- The queue, and what the queue has given up: 10 is MAX_WEBHOOK_ATTEMPTS of the models.
CREATE INDEX webhook_events_available_at_idx ON webhook_events (available_at)
    WHERE processing_status IN ('pending', 'failed') AND attempts < 10;
CREATE INDEX webhook_events_dead_idx ON webhook_events (available_at)
    WHERE processing_status IN ('pending', 'failed') AND attempts >= 10;
-- The purge reads by it.
CREATE INDEX webhook_events_processed_at_idx ON webhook_events (processed_at)
    WHERE processing_status IN ('processed', 'skipped');
CREATE INDEX webhook_events_user_id_idx ON webhook_events (user_id);

CREATE TRIGGER webhook_events_fixed
    BEFORE UPDATE OF
        external_event_id, event_type, payment_gateway, payload, processing_status, attempts
    ON webhook_events
    FOR EACH ROW WHEN (
        OLD.payment_gateway <> NEW.payment_gateway
        OR OLD.external_event_id <> NEW.external_event_id
        OR OLD.event_type <> NEW.event_type
        OR OLD.attempts > NEW.attempts
        OR (
            OLD.processing_status IN ('processed', 'skipped')
            AND OLD.processing_status <> NEW.processing_status
        )
        OR (OLD.payload <> NEW.payload AND NEW.payload <> '{}')
    )
    EXECUTE FUNCTION refuse_change(
        'webhook_events_fixed',
        'its gateway, id and type never change, its payload can only be erased to {}, its attempts '
        'only grow, and processed or skipped is final',
        'Record another event.'
    );

COMMENT ON TABLE webhook_events IS
    'Webhooks of the payment gateways: recorded on arrival, then processed.';
COMMENT ON COLUMN webhook_events.external_event_id IS
    'Event id at the gateway; unique together with payment_gateway.';
COMMENT ON COLUMN webhook_events.processed_at IS
    'When the event was processed, skipped or last failed; NULL exactly while pending.';
COMMENT ON COLUMN webhook_events.payload IS
    'What the gateway sent; {} once it is erased.';
COMMENT ON COLUMN webhook_events.error_message IS 'Why processing failed.';
COMMENT ON COLUMN webhook_events.user_id IS
    'Whom the event is about. Set when it is processed; the payload of a linked event is erased '
    'with the user.';
COMMENT ON COLUMN webhook_events.attempts IS 'Number of times that a worker has claimed the event.';
COMMENT ON COLUMN webhook_events.available_at IS
    'Not claimed before: the end of a lease, or of the pause after a failure.';

COMMENT ON INDEX webhook_events_available_at_idx IS
    'The queue: events that may be claimed, those that wait longest first.';
COMMENT ON INDEX webhook_events_dead_idx IS 'The events that the queue has given up.';
COMMENT ON INDEX webhook_events_processed_at_idx IS 'The closed events, for the purge.';
COMMENT ON INDEX webhook_events_user_id_idx IS
    'The events of a user, to erase their payloads, and the foreign key.';
