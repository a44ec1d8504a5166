-- The plan limits active instances: one on free, any number on pro. The limit holds at every
-- isolation level, whichever statement makes an instance active. Each activation first updates the
-- user's plan row, so a concurrent one waits, or fails with a serialization error if its snapshot
-- is older.

SET LOCAL lock_timeout = '5s';

CREATE TYPE plan_type AS ENUM ('free', 'pro');

-- A fifth of each page stays free, so that the update by each activation stays HOT.
CREATE TABLE user_plans (
    plan_id       uuid        NOT NULL DEFAULT gen_random_uuid(),
    user_id       uuid        NOT NULL,
    plan_type     plan_type   NOT NULL,
    max_instances integer,
    features      jsonb       NOT NULL DEFAULT '{}',
    expires_at    timestamptz,
    created_at    timestamptz NOT NULL DEFAULT now(),
    updated_at    timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT user_plans_pkey PRIMARY KEY (plan_id),
    CONSTRAINT user_plans_timestamps_check CHECK (
        GREATEST(expires_at, created_at, updated_at) AT TIME ZONE 'UTC' < '10000-01-01'
        AND LEAST(expires_at, created_at, updated_at) AT TIME ZONE 'UTC' >= '0001-01-01'
    ),
    CONSTRAINT user_plans_user_id_fkey
        FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE,
    CONSTRAINT unique_user_plan UNIQUE (user_id),
    CONSTRAINT check_max_instances_for_plan CHECK (
        CASE plan_type
            WHEN 'free' THEN max_instances IS NOT DISTINCT FROM 1
            WHEN 'pro' THEN max_instances IS NULL
            ELSE false
        END
    ),
    CONSTRAINT user_plans_features_check CHECK (
        jsonb_typeof(features) = 'object'
        AND NOT jsonb_path_exists(features, 'strict $.**{100 to last}')
        AND NOT jsonb_path_exists(
            features,
            'strict $.** ? (@ > "1e308".double() || @ < "-1e308".double())'
        )
    )
) WITH (fillfactor = 80);
-- What a sweep ends.
CREATE INDEX user_plans_expires_at_idx ON user_plans (expires_at)
    WHERE plan_type = 'pro' AND expires_at IS NOT NULL;
CREATE TRIGGER user_plans_update_updated_at
    BEFORE UPDATE ON user_plans
    FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*)
    EXECUTE FUNCTION update_updated_at_column();
CREATE TRIGGER user_plans_user_fixed
    BEFORE UPDATE OF user_id ON user_plans
    FOR EACH ROW WHEN (OLD.user_id <> NEW.user_id)
    EXECUTE FUNCTION refuse_change(
        'user_plans_user_fixed',
        'the user of a plan never changes',
        'Change the plan that the other user has.'
    );

COMMENT ON TABLE user_plans IS
    'What each user may do. One row per user; a trigger gives every new user the free plan.';
COMMENT ON COLUMN user_plans.max_instances IS
    'How many instances may be active and completed at once; NULL: any number. '
    'If it falls below the current number, all of the user''s active instances are deactivated.';
COMMENT ON COLUMN user_plans.features IS 'Features enabled for this user, a JSON object.';
COMMENT ON COLUMN user_plans.expires_at IS
    'From this time on no instance can be activated; NULL: the plan does not end.';

CREATE FUNCTION assign_default_plan() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO user_plans (user_id, plan_type, max_instances) VALUES (NEW.id, 'free', 1);
    RETURN NULL;
END
$$;
CREATE TRIGGER users_assign_default_plan
    AFTER INSERT ON users
    FOR EACH ROW EXECUTE FUNCTION assign_default_plan();

CREATE FUNCTION mcp_service_table_check_active_limit() RETURNS trigger
LANGUAGE plpgsql AS $$
DECLARE
    plan   user_plans;
    active bigint;
BEGIN
    -- An update that changes nothing, instead of a row lock: after a lock, a transaction at
    -- REPEATABLE READ would count the instances in its older snapshot.
    UPDATE user_plans
       SET max_instances = max_instances
     WHERE user_id = NEW.user_id
    RETURNING * INTO plan;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the instance was not activated: user % has no plan', NEW.user_id
            USING ERRCODE = 'check_violation',
                  TABLE = 'mcp_service_table',
                  CONSTRAINT = 'user_plan_missing',
                  HINT = 'Insert a row for the user into user_plans.';
    END IF;
    IF plan.expires_at <= now() THEN
        RAISE EXCEPTION 'the instance was not activated: the plan of user % expired at %',
            NEW.user_id, plan.expires_at
            USING ERRCODE = 'check_violation',
                  TABLE = 'mcp_service_table',
                  CONSTRAINT = 'user_plan_expired',
                  HINT = 'Extend the plan, or downgrade it to free.';
    END IF;
    IF plan.max_instances IS NOT NULL THEN
        SELECT count(*)
          INTO active
          FROM mcp_service_table
         WHERE user_id = NEW.user_id
           AND status OPERATOR(pg_catalog.=) 'active'
           AND oauth_status OPERATOR(pg_catalog.=) 'completed';
        IF active > plan.max_instances THEN
            RAISE EXCEPTION 'the instance was not activated: user % may have % active instance(s)',
                NEW.user_id, plan.max_instances
                USING ERRCODE = 'check_violation',
                      TABLE = 'mcp_service_table',
                      CONSTRAINT = 'user_plan_active_limit',
                      HINT = 'Deactivate another instance, or upgrade the plan.';
        END IF;
    END IF;
    RETURN NULL;
END
$$;
-- Immediate, so that the statement fails and not the commit. A transaction that swaps two instances
-- can use either order after SET CONSTRAINTS ALL DEFERRED.
-- An insert needs no check: a new instance is pending.
CREATE CONSTRAINT TRIGGER mcp_service_table_active_limit_update
    AFTER UPDATE OF status, oauth_status ON mcp_service_table
    DEFERRABLE INITIALLY IMMEDIATE
    FOR EACH ROW WHEN (
        NEW.status = 'active' AND NEW.oauth_status = 'completed'
        AND (OLD.status <> 'active' OR OLD.oauth_status <> 'completed')
    )
    EXECUTE FUNCTION mcp_service_table_check_active_limit();

CREATE FUNCTION user_plans_deactivate_surplus() RETURNS trigger
LANGUAGE plpgsql AS $$
DECLARE
    surplus uuid;
BEGIN
    IF NEW.max_instances >= (
        SELECT count(*)
          FROM mcp_service_table
         WHERE user_id = NEW.user_id
           AND status OPERATOR(pg_catalog.=) 'active'
           AND oauth_status OPERATOR(pg_catalog.=) 'completed'
    ) THEN
        RETURN NULL;
    END IF;
    -- One by one, in the order in which other operations lock them.
    FOR surplus IN
        SELECT instance_id
          FROM mcp_service_table
         WHERE user_id = NEW.user_id
           AND status OPERATOR(pg_catalog.=) 'active'
           AND oauth_status OPERATOR(pg_catalog.=) 'completed'
         ORDER BY mcp_service_id, instance_id
           FOR NO KEY UPDATE
    LOOP
        UPDATE mcp_service_table
           SET status = (
                   CASE WHEN expires_at <= now() THEN 'expired' ELSE 'inactive' END
               )::mcp_instance_status
         WHERE instance_id = surplus;
    END LOOP;
    RETURN NULL;
END
$$;
CREATE TRIGGER user_plans_deactivate_surplus_insert
    AFTER INSERT ON user_plans
    FOR EACH ROW WHEN (NEW.max_instances IS NOT NULL)
    EXECUTE FUNCTION user_plans_deactivate_surplus();
CREATE TRIGGER user_plans_deactivate_surplus_update
    AFTER UPDATE OF max_instances ON user_plans
    FOR EACH ROW WHEN (
        NEW.max_instances IS NOT NULL
        AND (OLD.max_instances IS NULL OR NEW.max_instances < OLD.max_instances)
    )
    EXECUTE FUNCTION user_plans_deactivate_surplus();

REVOKE EXECUTE ON FUNCTION
    assign_default_plan(),
    mcp_service_table_check_active_limit(),
    user_plans_deactivate_surplus()
FROM PUBLIC;

-- The functions run as their owner from here on, and find only the tables of this schema.
DO $$
DECLARE
    signature text;
BEGIN
    FOREACH signature IN ARRAY ARRAY[
        'assign_default_plan()',
        'mcp_service_table_check_active_limit()',
        'user_plans_deactivate_surplus()'
    ] LOOP
        EXECUTE format(
            'ALTER FUNCTION %s SECURITY DEFINER SET search_path = %I, pg_temp',
            signature, current_schema()
        );
    END LOOP;
END
$$;

COMMENT ON INDEX user_plans_expires_at_idx IS 'The plans that a sweep returns to free.';
COMMENT ON FUNCTION assign_default_plan() IS 'Gives a new user the free plan.';
COMMENT ON FUNCTION mcp_service_table_check_active_limit() IS
    'Refuses to activate an instance without a plan, with an expired one, or beyond its limit.';
COMMENT ON FUNCTION user_plans_deactivate_surplus() IS
    'Deactivates all active instances of a user who has more of them than the plan allows.';

-- Existing users get the free plan. A user with more than one active instance has all of them
-- deactivated, as after a downgrade.
INSERT INTO user_plans (user_id, plan_type, max_instances) SELECT id, 'free', 1 FROM users;
-- The counter triggers are due at commit. Run them now, so that a later migration in the same
-- transaction can alter their tables.
SET CONSTRAINTS ALL IMMEDIATE;
