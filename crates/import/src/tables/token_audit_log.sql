-- A status that the new log has no label for is a warning, and its metadata names the word.

WITH old AS (
    SELECT old.*,
           now,
           CASE
               WHEN status IN ('success', 'failure', 'pending', 'warning') THEN status
               WHEN status = 'failed' THEN 'failure'
               ELSE 'warning'
           END AS new_status,
           CASE
               WHEN pg_temp.is_readable(metadata) THEN metadata
               ELSE pg_temp.wrapped(metadata::text)
           END AS new_metadata
      FROM old_token_audit_log AS old, settings
)
SELECT row_number() OVER (ORDER BY audit_id) AS n,
       audit_id::text AS key,
       false AS extra,
       NULL::text AS rejected,
       array_remove(ARRAY[
           CASE WHEN new_status <> status THEN 'audit_status_unknown' END,
           CASE WHEN operation = '' THEN 'operation_empty' END,
           CASE WHEN NOT pg_temp.is_readable(metadata) THEN 'gateway_text_wrapped' END,
           CASE WHEN created_at > now THEN 'time_in_future' END,
           CASE WHEN created_at IS NULL AND NOT odd_time THEN 'null_default' END,
           CASE WHEN odd_time THEN 'time_out_of_range' END
       ], NULL) AS reasons,
       audit_id,
       instance_id,
       user_id,
       coalesce(nullif(operation, ''), 'unknown') AS operation,
       new_status::token_audit_status AS status,
       method,
       error_type,
       error_message,
       CASE
           WHEN new_status = status OR status = 'failed' THEN new_metadata
           WHEN new_metadata IS NULL THEN jsonb_build_object('status', status)
           WHEN jsonb_typeof(new_metadata) = 'object' AND NOT new_metadata ? 'status'
               THEN new_metadata || jsonb_build_object('status', status)
           ELSE jsonb_build_object('status', status, 'metadata', new_metadata)
       END AS metadata,
       least(created_at, now) AS created_at
  FROM old
