-- An event that failed isn't tried again: 10 attempts are MAX_WEBHOOK_ATTEMPTS. One that is pending
-- waits for the new worker.

WITH old AS (
    SELECT old.*,
           now,
           CASE
               WHEN processing_status IN ('processed', 'failed', 'skipped') THEN processing_status
               ELSE 'pending'
           END AS new_status,
           CASE WHEN payment_gateway NOT IN ('stripe', 'razorpay') THEN 'gateway_unknown' END
               AS rejected
      FROM old_webhook_events AS old, settings
)
SELECT row_number() OVER (ORDER BY event_id) AS n,
       event_id::text AS key,
       false AS extra,
       rejected,
       array_remove(ARRAY[
           CASE WHEN external_event_id = '' THEN 'event_id_empty' END,
           CASE WHEN processing_status <> new_status THEN 'event_status_unknown' END,
           CASE
               WHEN (new_status = 'pending') <> (processed_at IS NULL) AND NOT odd_time
                   THEN 'event_processed_at'
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
       coalesce(nullif(external_event_id, ''), 'imported ' || event_id) AS external_event_id,
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
       coalesce(created_at, processed_at, now) AS available_at
  FROM old
