-- Log of operations on tokens and credentials, kept for at least 90 days. It has no foreign keys:
-- the log outlives the instances and users it names, and a cascade would contradict append-only.
-- Partitioned by month, so that old rows go by DROP TABLE instead of a DELETE and its vacuum.

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
    -- Also the index for the list of an instance. A key of a partitioned table has the column that
    -- partitions it.
    CONSTRAINT token_audit_log_pkey PRIMARY KEY (instance_id, created_at, audit_id),
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
) PARTITION BY RANGE (created_at);
CREATE INDEX token_audit_log_user_id_created_at_idx
    ON token_audit_log (user_id, created_at DESC)
    WHERE user_id IS NOT NULL;
CREATE INDEX token_audit_log_created_at_idx ON token_audit_log (created_at);

COMMENT ON TABLE token_audit_log IS
    'Log of operations on tokens and credentials. Append-only; rows can be deleted after 90 days. '
    'Partitioned by month (UTC): maintain_token_audit_log() makes and drops the partitions.';
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
-- Triggers for rows are those of the partitions too; those for statements are not.
CREATE TRIGGER token_audit_log_append_only_row
    BEFORE UPDATE ON token_audit_log
    FOR EACH ROW EXECUTE FUNCTION token_audit_log_refuse_change();
-- Such a row could never be deleted. The roles of the application can't set the column at all. Not
-- now(): maintenance moves rows that arrived while it waited for its lock.
CREATE TRIGGER token_audit_log_not_from_the_future
    BEFORE INSERT ON token_audit_log
    FOR EACH ROW WHEN (NEW.created_at > clock_timestamp() OR NOT isfinite(NEW.created_at))
    EXECUTE FUNCTION refuse_change(
        'token_audit_log_not_from_the_future',
        'created_at is later than now, or infinite',
        'Leave created_at to the database.'
    );
CREATE TRIGGER token_audit_log_keep_90_days
    BEFORE DELETE ON token_audit_log
    FOR EACH ROW WHEN (OLD.created_at > now() - interval '90 days')
    EXECUTE FUNCTION token_audit_log_refuse_change();

-- The partition for what no month's partition takes: an insert never fails for want of one.
CREATE TABLE token_audit_log_default PARTITION OF token_audit_log DEFAULT;
CREATE TRIGGER token_audit_log_append_only
    BEFORE TRUNCATE ON token_audit_log_default
    FOR EACH STATEMENT EXECUTE FUNCTION token_audit_log_refuse_change();

-- A month's partition is attached to the log before its rows are moved there, so that whoever lists
-- the log meanwhile waits for the lock instead of missing them.
CREATE FUNCTION maintain_token_audit_log(
    OUT created integer, OUT moved bigint, OUT dropped integer
)
LANGUAGE plpgsql SET lock_timeout = '2s' SET timezone = 'UTC' AS $$
DECLARE
    this_month CONSTANT timestamptz := date_trunc('month', now());
    prefix     CONSTANT text        := 'token_audit_log_';
    oldest     CONSTANT text        := prefix || to_char(now() - interval '90 days', 'YYYY_MM');
    parts      CONSTANT text[]      := ARRAY(
        SELECT relname
          FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
         WHERE inhparent = 'token_audit_log'::regclass AND relname ~ '_\d{4}_\d\d$'
    );
    month      timestamptz;
    part       text;
BEGIN
    created := 0;
    moved   := 0;
    dropped := 0;
    -- One call at a time, before anything is read: two that have read the default partition could
    -- not lock it. Who reads or writes the log does not wait for this lock.
    LOCK TABLE ONLY token_audit_log IN SHARE UPDATE EXCLUSIVE MODE;
    -- Once a month there is something to do.
    IF NOT EXISTS (
        SELECT
          FROM generate_series(0, 3) AS n
         WHERE prefix || to_char(this_month + n * interval '1 month', 'YYYY_MM') <> ALL (parts)
    ) AND NOT EXISTS (SELECT FROM unnest(parts) AS one WHERE one < oldest)
        AND NOT EXISTS (SELECT FROM token_audit_log_default)
    THEN
        RETURN;
    END IF;
    LOCK TABLE ONLY token_audit_log IN ACCESS EXCLUSIVE MODE;

    FOR part IN SELECT one FROM unnest(parts) AS one WHERE one < oldest ORDER BY one
    LOOP
        EXECUTE format('DROP TABLE %I', part);
        dropped := dropped + 1;
    END LOOP;

    -- Without its triggers and its bounds, the default partition is a plain table.
    ALTER TABLE token_audit_log DETACH PARTITION token_audit_log_default;
    FOR month IN
        SELECT this_month + n * interval '1 month' FROM generate_series(0, 3) AS n
         UNION
        SELECT date_trunc('month', created_at) FROM token_audit_log_default
         ORDER BY 1
    LOOP
        part := prefix || to_char(month, 'YYYY_MM');
        CONTINUE WHEN part = ANY (parts) AND part >= oldest;
        EXECUTE format(
            'CREATE TABLE %I PARTITION OF token_audit_log FOR VALUES FROM (%L) TO (%L)',
            part, month, month + interval '1 month'
        );
        EXECUTE format(
            'CREATE TRIGGER token_audit_log_append_only BEFORE TRUNCATE ON %I'
                ' FOR EACH STATEMENT EXECUTE FUNCTION token_audit_log_refuse_change()',
            part
        );
        created := created + 1;
    END LOOP;
    INSERT INTO token_audit_log OVERRIDING SYSTEM VALUE SELECT * FROM token_audit_log_default;
    GET DIAGNOSTICS moved = ROW_COUNT;
    IF moved > 0 THEN
        DELETE FROM token_audit_log_default;
    END IF;
    ALTER TABLE token_audit_log ATTACH PARTITION token_audit_log_default DEFAULT;
END
$$;
REVOKE EXECUTE ON FUNCTION maintain_token_audit_log() FROM PUBLIC;
COMMENT ON FUNCTION maintain_token_audit_log() IS
    'Makes the partitions of this month and the next three, moves rows of the default partition '
    'into those of their months, and drops partitions with no row younger than 90 days. Locks the '
    'log while it has something to do, and gives up after 2 s.';

-- Skips rows that another session is deleting. The limit is a literal: with a parameter, the planner
-- would expect a tenth of all rows.
CREATE FUNCTION cleanup_old_token_audit_logs(max_rows integer DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    deleted bigint;
BEGIN
    EXECUTE format(
        'WITH old AS MATERIALIZED (
             SELECT instance_id, created_at, audit_id
               FROM token_audit_log
              WHERE created_at < now() - interval ''90 days''
              ORDER BY created_at
              LIMIT %L
                FOR UPDATE SKIP LOCKED
         )
         DELETE FROM token_audit_log AS log
          USING old
          WHERE (log.instance_id, log.created_at, log.audit_id)
              = (old.instance_id, old.created_at, old.audit_id)',
        max_rows
    );
    GET DIAGNOSTICS deleted = ROW_COUNT;
    RETURN deleted;
END
$$;
REVOKE EXECUTE ON FUNCTION cleanup_old_token_audit_logs(integer) FROM PUBLIC;
COMMENT ON FUNCTION cleanup_old_token_audit_logs(integer) IS
    'Deletes rows older than 90 days, oldest first, at most max_rows (NULL: all). '
    'Returns how many it deleted.';
DO $$
BEGIN
    EXECUTE format(
        'ALTER FUNCTION maintain_token_audit_log()'
            ' SECURITY DEFINER SET search_path = %I, pg_temp',
        current_schema()
    );
    EXECUTE format(
        'ALTER FUNCTION cleanup_old_token_audit_logs(integer)'
            ' SECURITY DEFINER SET search_path = %I, pg_temp',
        current_schema()
    );
    PERFORM maintain_token_audit_log();
END
$$;

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

COMMENT ON INDEX token_audit_log_user_id_created_at_idx IS
    'The audit rows of a user, newest first.';
COMMENT ON INDEX token_audit_log_created_at_idx IS
    'The audit rows of a time: the summary, and those old enough to delete.';
COMMENT ON FUNCTION token_audit_log_refuse_change() IS
    'Refuses to change the audit log, or to delete a row younger than 90 days.';
