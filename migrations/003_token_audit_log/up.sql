-- Log of operations on tokens and credentials, kept for at least 90 days. It has no foreign keys:
-- the log outlives the instances and users it names, and a cascade would contradict append-only.

SET LOCAL lock_timeout = '5s';

CREATE TYPE token_audit_status AS ENUM ('success', 'failure', 'pending', 'warning');

CREATE TABLE token_audit_log (
    audit_id      bigint             NOT NULL GENERATED ALWAYS AS IDENTITY,
    instance_id   uuid               NOT NULL,
    user_id       uuid,
    operation     text               NOT NULL,
    status        token_audit_status NOT NULL,
    method        text,
    error_type    text,
    error_message text,
    metadata      jsonb,
    created_at    timestamptz        NOT NULL DEFAULT now(),
    CONSTRAINT token_audit_log_pkey PRIMARY KEY (audit_id),
    CONSTRAINT token_audit_log_timestamps_check CHECK (
        created_at AT TIME ZONE 'UTC' < '10000-01-01'
        AND created_at AT TIME ZONE 'UTC' >= '0001-01-01'
    ),
    CONSTRAINT token_audit_log_metadata_check CHECK (
        NOT jsonb_path_exists(metadata, 'strict $.**{100 to last}')
        AND NOT jsonb_path_exists(
            metadata,
            'strict $.** ? (@ > "1e308".double() || @ < "-1e308".double())'
        )
    ),
    CONSTRAINT token_audit_log_operation_check CHECK (operation <> '')
);
CREATE INDEX token_audit_log_instance_id_created_at_idx
    ON token_audit_log (instance_id, created_at DESC);
CREATE INDEX token_audit_log_user_id_created_at_idx
    ON token_audit_log (user_id, created_at DESC)
    WHERE user_id IS NOT NULL;
CREATE INDEX token_audit_log_created_at_idx ON token_audit_log (created_at);

COMMENT ON TABLE token_audit_log IS
    'Log of operations on tokens and credentials. Append-only; rows can be deleted after 90 days.';
COMMENT ON COLUMN token_audit_log.instance_id IS
    'Not a foreign key: the instance may have been deleted.';
COMMENT ON COLUMN token_audit_log.user_id IS
    'Not a foreign key: the user may have been deleted. NULL: done by the system.';
COMMENT ON COLUMN token_audit_log.operation IS 'What was done, such as token_refresh.';
COMMENT ON COLUMN token_audit_log.method IS 'How it was done, such as oauth or api_key.';
COMMENT ON COLUMN token_audit_log.metadata IS 'Must not contain a secret.';
COMMENT ON COLUMN token_audit_log.created_at IS
    'Set by the database. Only the owner can insert an older row; none is from the future.';

CREATE FUNCTION token_audit_log_refuse_change() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'token_audit_log is append-only: % was refused', TG_OP
        USING ERRCODE = 'check_violation',
              TABLE = 'token_audit_log',
              CONSTRAINT = 'token_audit_log_append_only',
              HINT = 'Rows older than 90 days are deleted by cleanup_old_token_audit_logs().';
END
$$;
REVOKE EXECUTE ON FUNCTION token_audit_log_refuse_change() FROM PUBLIC;
CREATE TRIGGER token_audit_log_append_only
    BEFORE UPDATE OR TRUNCATE ON token_audit_log
    FOR EACH STATEMENT EXECUTE FUNCTION token_audit_log_refuse_change();
-- Such a row could never be deleted. The roles of the application can't set the column at all.
CREATE TRIGGER token_audit_log_not_from_the_future
    BEFORE INSERT ON token_audit_log
    FOR EACH ROW WHEN (NEW.created_at > now() OR NOT isfinite(NEW.created_at))
    EXECUTE FUNCTION refuse_change(
        'token_audit_log_not_from_the_future',
        'created_at is later than now, or infinite',
        'Leave created_at to the database.'
    );
CREATE TRIGGER token_audit_log_keep_90_days
    BEFORE DELETE ON token_audit_log
    FOR EACH ROW WHEN (OLD.created_at > now() - interval '90 days')
    EXECUTE FUNCTION token_audit_log_refuse_change();

-- Skips rows that another session is deleting.
CREATE FUNCTION cleanup_old_token_audit_logs(max_rows integer DEFAULT NULL) RETURNS bigint
LANGUAGE sql AS $$
    WITH old AS MATERIALIZED (
        SELECT audit_id
          FROM token_audit_log
         WHERE created_at < now() - interval '90 days'
         ORDER BY created_at
         LIMIT max_rows
           FOR UPDATE SKIP LOCKED
    ), deleted AS (
        DELETE FROM token_audit_log
         USING old
         WHERE token_audit_log.audit_id = old.audit_id
        RETURNING 1
    )
    SELECT count(*) FROM deleted
$$;
REVOKE EXECUTE ON FUNCTION cleanup_old_token_audit_logs(integer) FROM PUBLIC;
DO $$
BEGIN
    EXECUTE format(
        'ALTER FUNCTION cleanup_old_token_audit_logs(integer)'
            ' SECURITY DEFINER SET search_path = %I, pg_temp',
        current_schema()
    );
END
$$;
COMMENT ON FUNCTION cleanup_old_token_audit_logs(integer) IS
    'Deletes rows older than 90 days, oldest first, at most max_rows (NULL: all). '
    'Returns how many it deleted.';

CREATE VIEW token_audit_summary AS
SELECT instance_id,
       operation,
       status,
       method,
       count(*)                                                                AS operation_count,
       count(*) FILTER (WHERE status = 'success')                              AS success_count,
       count(*) FILTER (WHERE status = 'failure')                              AS failure_count,
       round(100.0 * count(*) FILTER (WHERE status = 'success') / count(*), 2) AS success_rate,
       max(created_at)                                                         AS last_operation,
       min(created_at)                                                         AS first_operation
  FROM token_audit_log
 WHERE created_at >= now() - interval '30 days'
 GROUP BY instance_id, operation, status, method;

COMMENT ON VIEW token_audit_summary IS
    'Summary of the last 30 days of token_audit_log, per instance, operation, status and method.';
COMMENT ON COLUMN token_audit_summary.success_rate IS 'In percent, with two decimals.';
