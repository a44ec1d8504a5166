SET LOCAL lock_timeout = '5s';

DROP TABLE webhook_events;

ALTER TABLE user_plans
    DROP COLUMN payment_status,
    DROP COLUMN customer_id,
    DROP COLUMN subscription_id;

DROP TYPE webhook_status;
DROP TYPE payment_gateway;
DROP TYPE plan_payment_status;
