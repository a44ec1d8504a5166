SET LOCAL lock_timeout = '5s';

DROP TABLE user_billing_details;
DROP FUNCTION card_ids_differ(jsonb);
