-- An event that failed isn't tried again: 10 attempts are MAX_WEBHOOK_ATTEMPTS. One that is pending
-- waits for the new worker.

-- Stripe's payload names the event. That id is taken where the old system gave one of its own, so
-- that the event is known when it is delivered again.

WITH named AS (
    SELECT DISTINCT ON (id) event_id, id
      FROM (
          SELECT *, payload ->> 'id' AS id
            FROM old_webhook_events
           WHERE payment_gateway = 'stripe' AND payload ->> 'id' ~ '^evt_\w{1,250}$'
      ) AS of_stripe
     WHERE NOT EXISTS (SELECT FROM old_webhook_events AS other WHERE external_event_id = id)
     ORDER BY id, created_at, event_id
),
old AS (
    SELECT old.*,
           now,
           named.id AS id_of_payload,
           CASE
               WHEN processing_status IN ('processed', 'failed', 'skipped') THEN processing_status
               ELSE 'pending'
           END AS new_status,
           CASE WHEN payment_gateway NOT IN ('stripe', 'razorpay') THEN 'gateway_unknown' END
               AS rejected
      FROM old_webhook_events AS old
      CROSS JOIN settings
      LEFT JOIN named USING (event_id)
)
SELECT row_number() OVER (ORDER BY event_id) AS n,
       event_id::text AS key,
       false AS extra,
       rejected,
       array_remove(ARRAY[
           CASE
               WHEN id_of_payload IS NOT NULL THEN 'event_id_of_payload'
               WHEN external_event_id = '' THEN 'event_id_empty'
               WHEN external_event_id ~ '^(pay|order|sub|cust|inv|rfnd|plan)_'
                   AND payment_gateway = 'razorpay'
                   THEN 'event_id_of_another'
           END,
           CASE WHEN processing_status <> new_status THEN 'event_status_unknown' END,
           CASE
               WHEN (new_status = 'pending') <> (processed_at IS NULL) THEN 'event_processed_at'
           END,
           CASE WHEN new_status = 'failed' THEN 'event_given_up' END,
           CASE WHEN NOT pg_temp.is_readable(payload) THEN 'gateway_text_wrapped' END,
           CASE
               WHEN processing_status IS NULL OR created_at IS NULL AND NOT odd_time
                   THEN 'null_default'
           END,
           CASE WHEN odd_time THEN 'time_out_of_range' END
       ], NULL) AS reasons,
       event_id,
       coalesce(id_of_payload, nullif(external_event_id, ''), 'imported ' || event_id)
           AS external_event_id,
       event_type,
       CASE WHEN rejected IS NULL THEN payment_gateway::payment_gateway END AS payment_gateway,
       CASE
           WHEN new_status <> 'pending' THEN coalesce(processed_at, created_at, now)
       END AS processed_at,
       CASE
           WHEN pg_temp.is_readable(payload) THEN payload
           ELSE pg_temp.wrapped(payload::text)
       END AS payload,
       new_status::webhook_status AS processing_status,
       error_message,
       coalesce(created_at, processed_at, now) AS created_at,
       CASE WHEN new_status = 'failed' THEN 10 ELSE 0 END AS attempts,
       least(created_at, processed_at, now) AS available_at
  FROM old
