-- The registry of services, the users' connections to them (instances), and the encrypted
-- credentials of the instances. Recording a call is the hottest statement of the system and must
-- stay a HOT update.

SET LOCAL lock_timeout = '5s';

CREATE TYPE mcp_auth_type AS ENUM ('api_key', 'oauth');
CREATE TYPE mcp_oauth_status AS ENUM ('pending', 'completed', 'failed', 'expired');
CREATE TYPE mcp_instance_status AS ENUM ('active', 'inactive', 'expired');

-- Half of each page stays free, so that counter updates stay HOT.
CREATE TABLE mcp_table (
    mcp_service_id          uuid          NOT NULL DEFAULT gen_random_uuid(),
    mcp_service_name        text          NOT NULL,
    display_name            text          NOT NULL,
    description             text,
    icon_url_path           text,
    port                    integer       NOT NULL,
    type                    mcp_auth_type NOT NULL,
    is_active               boolean       NOT NULL DEFAULT true,
    total_instances_created bigint        NOT NULL DEFAULT 0,
    active_instances_count  bigint        NOT NULL DEFAULT 0,
    created_at              timestamptz   NOT NULL DEFAULT now(),
    updated_at              timestamptz   NOT NULL DEFAULT now(),
    CONSTRAINT mcp_table_pkey PRIMARY KEY (mcp_service_id),
    CONSTRAINT mcp_table_timestamps_check CHECK (
        GREATEST(created_at, updated_at) AT TIME ZONE 'UTC' < '10000-01-01'
        AND LEAST(created_at, updated_at) AT TIME ZONE 'UTC' >= '0001-01-01'
    ),
    CONSTRAINT mcp_table_mcp_service_name_key UNIQUE (mcp_service_name),
    CONSTRAINT mcp_table_port_key UNIQUE (port),
    CONSTRAINT mcp_table_mcp_service_name_check
        CHECK (mcp_service_name ~ '^[a-z0-9][a-z0-9_-]{0,49}$'),
    CONSTRAINT mcp_table_display_name_check CHECK (char_length(display_name) BETWEEN 1 AND 100),
    CONSTRAINT mcp_table_port_check CHECK (port BETWEEN 1 AND 65535),
    CONSTRAINT mcp_table_total_instances_created_check CHECK (total_instances_created >= 0),
    CONSTRAINT mcp_table_active_instances_count_check CHECK (active_instances_count >= 0)
) WITH (fillfactor = 50);
CREATE TRIGGER mcp_table_update_updated_at
    BEFORE UPDATE ON mcp_table
    FOR EACH ROW WHEN (
        (OLD.mcp_service_id, OLD.mcp_service_name, OLD.display_name, OLD.description,
            OLD.icon_url_path, OLD.port, OLD.type, OLD.is_active, OLD.created_at, OLD.updated_at)
        IS DISTINCT FROM
        (NEW.mcp_service_id, NEW.mcp_service_name, NEW.display_name, NEW.description,
            NEW.icon_url_path, NEW.port, NEW.type, NEW.is_active, NEW.created_at, NEW.updated_at)
    )
    EXECUTE FUNCTION update_updated_at_column();

COMMENT ON TABLE mcp_table IS 'Registry of MCP services. Their instances are in mcp_service_table.';
COMMENT ON COLUMN mcp_table.port IS 'TCP port on which the service listens.';
COMMENT ON COLUMN mcp_table.type IS 'How instances of this service authenticate.';
COMMENT ON COLUMN mcp_table.is_active IS 
    'False: no new instances, and the existing ones can''t be called.';
COMMENT ON COLUMN mcp_table.total_instances_created IS
    'Number of instances ever created. Maintained by triggers at commit.';
COMMENT ON COLUMN mcp_table.active_instances_count IS
    'Number of instances that are active and completed. Maintained by triggers at commit.';
COMMENT ON COLUMN mcp_table.updated_at IS 'Not changed when a counter changes.';

-- A fifth of each page stays free for HOT updates. No index may name usage_count, last_used_at,
-- updated_at, version or last_modified, not even in its predicate.
CREATE TABLE mcp_service_table (
    instance_id            uuid                NOT NULL DEFAULT gen_random_uuid(),
    user_id                uuid                NOT NULL,
    mcp_service_id         uuid                NOT NULL,
    oauth_status           mcp_oauth_status    NOT NULL DEFAULT 'pending',
    status                 mcp_instance_status NOT NULL DEFAULT 'active',
    expires_at             timestamptz,
    last_used_at           timestamptz,
    usage_count            bigint              NOT NULL DEFAULT 0,
    custom_name            text,
    renewed_count          integer             NOT NULL DEFAULT 0,
    last_renewed_at        timestamptz,
    credentials_updated_at timestamptz,
    created_at             timestamptz         NOT NULL DEFAULT now(),
    updated_at             timestamptz         NOT NULL DEFAULT now(),
    CONSTRAINT mcp_service_table_pkey PRIMARY KEY (instance_id),
    CONSTRAINT mcp_service_table_timestamps_check CHECK (
        GREATEST(
            expires_at, last_used_at, last_renewed_at, credentials_updated_at, created_at,
            updated_at
        ) AT TIME ZONE 'UTC' < '10000-01-01'
        AND LEAST(
            expires_at, last_used_at, last_renewed_at, credentials_updated_at, created_at,
            updated_at
        ) AT TIME ZONE 'UTC' >= '0001-01-01'
    ),
    CONSTRAINT mcp_service_table_user_id_fkey
        FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE,
    CONSTRAINT mcp_service_table_mcp_service_id_fkey
        FOREIGN KEY (mcp_service_id) REFERENCES mcp_table (mcp_service_id) ON DELETE RESTRICT,
    CONSTRAINT mcp_service_table_usage_count_check CHECK (usage_count >= 0),
    CONSTRAINT mcp_service_table_custom_name_check CHECK (char_length(custom_name) <= 255),
    CONSTRAINT mcp_service_table_renewed_count_check CHECK (renewed_count >= 0)
) WITH (fillfactor = 80);
CREATE INDEX mcp_service_table_user_id_created_at_idx
    ON mcp_service_table (user_id, created_at DESC);
CREATE INDEX mcp_service_table_user_id_active_idx ON mcp_service_table (user_id)
    WHERE status = 'active' AND oauth_status = 'completed';
CREATE INDEX mcp_service_table_mcp_service_id_idx ON mcp_service_table (mcp_service_id);
CREATE INDEX mcp_service_table_expires_at_idx ON mcp_service_table (expires_at)
    WHERE expires_at IS NOT NULL AND status <> 'expired';
CREATE INDEX mcp_service_table_created_at_idx ON mcp_service_table (created_at)
    WHERE oauth_status IN ('pending', 'failed');
CREATE TRIGGER mcp_service_table_update_updated_at
    BEFORE UPDATE ON mcp_service_table
    FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*)
    EXECUTE FUNCTION update_updated_at_column();

COMMENT ON TABLE mcp_service_table IS
    'Instances: connections of users to MCP services. The services are in mcp_table.';
COMMENT ON COLUMN mcp_service_table.instance_id IS
    'Part of the instance''s public URL, and therefore random.';
COMMENT ON COLUMN mcp_service_table.oauth_status IS
    'Copy of mcp_credentials.oauth_status, maintained by a trigger.';
COMMENT ON COLUMN mcp_service_table.expires_at IS 'NULL: never expires.';
COMMENT ON COLUMN mcp_service_table.usage_count IS 'Number of calls through this instance.';
COMMENT ON COLUMN mcp_service_table.custom_name IS 'Name that the user gave the instance.';
COMMENT ON COLUMN mcp_service_table.renewed_count IS 'How often expires_at was extended.';

CREATE TABLE mcp_credentials (
    credential_id           uuid             NOT NULL DEFAULT gen_random_uuid(),
    instance_id             uuid             NOT NULL,
    api_key                 bytea,
    client_id               text,
    client_secret           bytea,
    access_token            bytea,
    refresh_token           bytea,
    token_expires_at        timestamptz,
    token_scope             text,
    oauth_status            mcp_oauth_status NOT NULL DEFAULT 'pending',
    oauth_completed_at      timestamptz,
    oauth_authorization_url bytea,
    oauth_state             bytea,
    oauth_state_expires_at  timestamptz,
    oauth_code_verifier     bytea,
    refresh_leased_until    timestamptz,
    created_at              timestamptz      NOT NULL DEFAULT now(),
    updated_at              timestamptz      NOT NULL DEFAULT now(),
    CONSTRAINT mcp_credentials_pkey PRIMARY KEY (credential_id),
    CONSTRAINT mcp_credentials_timestamps_check CHECK (
        GREATEST(
            token_expires_at, oauth_completed_at, oauth_state_expires_at, refresh_leased_until,
            created_at, updated_at
        ) AT TIME ZONE 'UTC' < '10000-01-01'
        AND LEAST(
            token_expires_at, oauth_completed_at, oauth_state_expires_at, refresh_leased_until,
            created_at, updated_at
        ) AT TIME ZONE 'UTC' >= '0001-01-01'
    ),
    CONSTRAINT mcp_credentials_instance_id_fkey
        FOREIGN KEY (instance_id) REFERENCES mcp_service_table (instance_id) ON DELETE CASCADE,
    CONSTRAINT mcp_credentials_instance_id_key UNIQUE (instance_id),
    CONSTRAINT mcp_credentials_oauth_state_key UNIQUE (oauth_state),
    -- A sealed value begins with its format. The shortest one, of format 1, has 30 bytes: format,
    -- key id, a nonce of 12 and a tag of 16.
    CONSTRAINT mcp_credentials_api_key_check CHECK (
        octet_length(api_key) BETWEEN 30 AND 16384
        AND substr(api_key, 1, 1) IN ('\x01', '\x02')
    ),
    CONSTRAINT mcp_credentials_client_secret_check CHECK (
        octet_length(client_secret) BETWEEN 30 AND 16384
        AND substr(client_secret, 1, 1) IN ('\x01', '\x02')
    ),
    CONSTRAINT mcp_credentials_access_token_check CHECK (
        octet_length(access_token) BETWEEN 30 AND 16384
        AND substr(access_token, 1, 1) IN ('\x01', '\x02')
    ),
    CONSTRAINT mcp_credentials_refresh_token_check CHECK (
        octet_length(refresh_token) BETWEEN 30 AND 16384
        AND substr(refresh_token, 1, 1) IN ('\x01', '\x02')
    ),
    CONSTRAINT mcp_credentials_oauth_authorization_url_check CHECK (
        octet_length(oauth_authorization_url) BETWEEN 30 AND 16384
        AND substr(oauth_authorization_url, 1, 1) IN ('\x01', '\x02')
    ),
    CONSTRAINT mcp_credentials_oauth_code_verifier_check CHECK (
        octet_length(oauth_code_verifier) BETWEEN 30 AND 16384
        AND substr(oauth_code_verifier, 1, 1) IN ('\x01', '\x02')
    ),
    CONSTRAINT mcp_credentials_client_id_check CHECK (char_length(client_id) BETWEEN 1 AND 2048),
    CONSTRAINT mcp_credentials_token_scope_check CHECK (char_length(token_scope) <= 16384),
    CONSTRAINT mcp_credentials_oauth_state_check CHECK (octet_length(oauth_state) = 32),
    CONSTRAINT mcp_credentials_oauth_state_expires_at_check
        CHECK ((oauth_state IS NULL) = (oauth_state_expires_at IS NULL)),
    CONSTRAINT check_credential_type CHECK (
        (api_key IS NOT NULL AND client_id IS NULL AND client_secret IS NULL)
        OR (api_key IS NULL AND client_id IS NOT NULL AND client_secret IS NOT NULL)
    ),
    CONSTRAINT check_oauth_tokens CHECK (
        (access_token IS NULL AND refresh_token IS NULL)
        OR (client_id IS NOT NULL AND client_secret IS NOT NULL)
    ),
    CONSTRAINT check_oauth_status_consistency
        CHECK ((oauth_status = 'pending') = (oauth_completed_at IS NULL))
);
-- The refresh queue: rows without a lease first, then those whose lease ends first.
CREATE INDEX mcp_credentials_refresh_leased_until_token_expires_at_idx
    ON mcp_credentials (refresh_leased_until NULLS FIRST, token_expires_at)
    WHERE refresh_token IS NOT NULL AND oauth_status = 'completed';
-- The instances that were never authorized.
CREATE INDEX mcp_credentials_updated_at_instance_id_idx
    ON mcp_credentials (updated_at, instance_id)
    WHERE oauth_status IN ('pending', 'failed') AND access_token IS NULL;
-- The list has every column but refresh_leased_until: a lease is not an edit.
CREATE TRIGGER mcp_credentials_update_updated_at
    BEFORE UPDATE ON mcp_credentials
    FOR EACH ROW WHEN (
        (OLD.credential_id, OLD.instance_id, OLD.api_key, OLD.client_id, OLD.client_secret,
            OLD.access_token, OLD.refresh_token, OLD.token_expires_at, OLD.token_scope,
            OLD.oauth_status, OLD.oauth_completed_at, OLD.oauth_authorization_url, OLD.oauth_state,
            OLD.oauth_state_expires_at, OLD.oauth_code_verifier, OLD.created_at, OLD.updated_at)
        IS DISTINCT FROM
        (NEW.credential_id, NEW.instance_id, NEW.api_key, NEW.client_id, NEW.client_secret,
            NEW.access_token, NEW.refresh_token, NEW.token_expires_at, NEW.token_scope,
            NEW.oauth_status, NEW.oauth_completed_at, NEW.oauth_authorization_url, NEW.oauth_state,
            NEW.oauth_state_expires_at, NEW.oauth_code_verifier, NEW.created_at, NEW.updated_at)
    )
    EXECUTE FUNCTION update_updated_at_column();

CREATE TRIGGER mcp_credentials_fixed
    BEFORE UPDATE OF instance_id ON mcp_credentials
    FOR EACH ROW WHEN (OLD.instance_id <> NEW.instance_id)
    EXECUTE FUNCTION refuse_change(
        'mcp_credentials_fixed', 'credentials keep their instance',
        'Insert credentials for the other instance.'
    );

COMMENT ON TABLE mcp_credentials IS
    'Credentials of an instance: an API key, or an OAuth client with its tokens.';
COMMENT ON COLUMN mcp_credentials.api_key IS 'Sealed by the application.';
COMMENT ON COLUMN mcp_credentials.client_secret IS 'Sealed by the application.';
COMMENT ON COLUMN mcp_credentials.access_token IS 'Sealed by the application.';
COMMENT ON COLUMN mcp_credentials.refresh_token IS 'Sealed by the application.';
COMMENT ON COLUMN mcp_credentials.token_expires_at IS
    'When access_token expires; NULL: unknown or never.';
COMMENT ON COLUMN mcp_credentials.token_scope IS
    'Granted scopes, separated by spaces (RFC 6749, 3.3).';
COMMENT ON COLUMN mcp_credentials.oauth_status IS
    'Authoritative; mcp_service_table has a copy. An API key is completed from the start.';
COMMENT ON COLUMN mcp_credentials.oauth_completed_at IS
    'When oauth_status left pending, whatever the outcome; NULL exactly while pending.';
COMMENT ON COLUMN mcp_credentials.oauth_authorization_url IS
    'URL where the user grants access, sealed by the application: it contains the state.';
COMMENT ON COLUMN mcp_credentials.oauth_code_verifier IS
    'PKCE verifier of the pending authorization (RFC 7636), sealed by the application.';
COMMENT ON COLUMN mcp_credentials.oauth_state IS
    'Keyed digest of the state of the pending authorization (RFC 6749, 10.12). Consumed once.';
COMMENT ON COLUMN mcp_credentials.oauth_state_expires_at IS
    'When the state can no longer be consumed.';
COMMENT ON COLUMN mcp_credentials.refresh_leased_until IS
    'Until then a worker refreshes the tokens, or nobody does after a failure; NULL: nobody does.';

-- Keeps the instance's copy of oauth_status. An instance without credentials is pending.
-- Functions that run as their owner compare enums with OPERATOR(pg_catalog.…): an operator that
-- another role made in this schema for exactly these types would win over a plain = or <>.
CREATE FUNCTION mcp_credentials_sync_oauth_status() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        UPDATE mcp_service_table
           SET oauth_status = 'pending'
         WHERE instance_id = OLD.instance_id AND oauth_status OPERATOR(pg_catalog.<>) 'pending';
    ELSE
        -- An insert updates an equal copy too. It may be equal only in an older snapshot, from
        -- before other credentials of the instance were deleted; then the update fails.
        UPDATE mcp_service_table
           SET oauth_status = NEW.oauth_status
         WHERE instance_id = NEW.instance_id
           AND (TG_OP = 'INSERT' OR oauth_status OPERATOR(pg_catalog.<>) NEW.oauth_status);
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER mcp_credentials_sync_oauth_status
    AFTER INSERT OR DELETE OR UPDATE OF oauth_status ON mcp_credentials
    FOR EACH ROW EXECUTE FUNCTION mcp_credentials_sync_oauth_status();

-- Only the function above, at a depth of one, writes the instance's copy. The rule needs no look at
-- the credentials, which another transaction may be inserting.
CREATE TRIGGER mcp_service_table_oauth_status_pending
    BEFORE INSERT ON mcp_service_table
    FOR EACH ROW WHEN (NEW.oauth_status <> 'pending')
    EXECUTE FUNCTION refuse_change(
        'mcp_service_table_oauth_status_synced',
        'oauth_status follows the credentials, and a new instance has none',
        'Insert the instance as pending, then its credentials.'
    );
-- A trigger of mcp_credentials changes it, as the owner. The right TRIGGER tells the owner from a
-- role that writes rows, and that may have triggers on temporary tables of its own.
CREATE TRIGGER mcp_service_table_oauth_status_synced
    BEFORE UPDATE OF oauth_status ON mcp_service_table
    FOR EACH ROW WHEN (
        OLD.oauth_status <> NEW.oauth_status
        AND (pg_trigger_depth() = 0 OR NOT has_table_privilege(OLD.tableoid, 'TRIGGER'))
    )
    EXECUTE FUNCTION refuse_change(
        'mcp_service_table_oauth_status_synced',
        'oauth_status follows the credentials',
        'Update mcp_credentials.oauth_status instead.'
    );

-- A service that is disabled at the same time may still get the instance. To close that gap, each
-- insert would have to lock the registry row, and users of one service would wait for each other.
-- The same holds for a user who is deactivated. An anonymisation locks the user FOR UPDATE, so one
-- of the two waits: it removes the instance, or the insert finds the user inactive.
CREATE FUNCTION mcp_service_table_check_insert() RETURNS trigger
LANGUAGE plpgsql AS $$
DECLARE
    user_is_active boolean;
BEGIN
    SELECT is_active INTO user_is_active FROM users WHERE id = NEW.user_id FOR KEY SHARE;
    IF NOT user_is_active THEN
        RAISE EXCEPTION 'the instance was not created: user % is inactive', NEW.user_id
            USING ERRCODE = 'check_violation',
                  TABLE = 'mcp_service_table',
                  CONSTRAINT = 'mcp_service_table_user_inactive',
                  HINT = 'Reactivate the user first.';
    END IF;
    IF EXISTS (
        SELECT FROM mcp_table WHERE mcp_service_id = NEW.mcp_service_id AND NOT is_active
    ) THEN
        RAISE EXCEPTION 'the instance was not created: service % is disabled', NEW.mcp_service_id
            USING ERRCODE = 'check_violation',
                  TABLE = 'mcp_table',
                  CONSTRAINT = 'mcp_table_service_disabled',
                  HINT = 'Set mcp_table.is_active to enable the service.';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER mcp_service_table_check_insert
    BEFORE INSERT ON mcp_service_table
    FOR EACH ROW EXECUTE FUNCTION mcp_service_table_check_insert();
CREATE TRIGGER mcp_service_table_service_fixed
    BEFORE UPDATE OF mcp_service_id ON mcp_service_table
    FOR EACH ROW WHEN (OLD.mcp_service_id <> NEW.mcp_service_id)
    EXECUTE FUNCTION refuse_change(
        'mcp_service_table_service_fixed',
        'the service of an instance never changes',
        'Create a new instance of the other service.'
    );
CREATE TRIGGER mcp_service_table_user_fixed
    BEFORE UPDATE OF user_id ON mcp_service_table
    FOR EACH ROW WHEN (OLD.user_id <> NEW.user_id)
    EXECUTE FUNCTION refuse_change(
        'mcp_service_table_user_fixed',
        'the user of an instance never changes',
        'Create a new instance for the other user.'
    );

-- The counters take two steps, so that a transaction updates a service once, however many instances
-- it changes, and locks the registry row only during commit. This function adds up the changes in a
-- setting that ends with the transaction. A rollback to a savepoint rolls the setting back too. Its
-- value is {transaction: {service: [created, active]}}; a transaction ignores another one's.
CREATE FUNCTION mcp_service_table_collect_counts() RETURNS trigger
LANGUAGE plpgsql AS $$
DECLARE
    -- One transaction may change the tables of several schemas.
    setting     CONSTANT text := 'bruhmcp.counts_' || TG_RELID;
    transaction CONSTANT text := pg_current_xact_id();
    service     CONSTANT text := coalesce(NEW.mcp_service_id, OLD.mcp_service_id);
    counts      jsonb         := coalesce(
        nullif(current_setting(setting, true), '')::jsonb -> transaction, '{}'
    );
    created     bigint        := coalesce((counts -> service ->> 0)::bigint, 0);
    active      bigint        := coalesce((counts -> service ->> 1)::bigint, 0);
BEGIN
    -- A new instance is pending.
    IF TG_OP = 'INSERT' THEN
        created := created + 1;
    ELSIF TG_OP = 'UPDATE'
        AND NEW.status OPERATOR(pg_catalog.=) 'active'
        AND NEW.oauth_status OPERATOR(pg_catalog.=) 'completed'
    THEN
        active := active + 1;
    ELSE
        active := active - 1;
    END IF;
    counts := counts || jsonb_build_object(service, jsonb_build_array(created, active));
    PERFORM set_config(setting, jsonb_build_object(transaction, counts)::text, true);
    RETURN NULL;
END
$$;

-- The first of the transaction's deferred triggers writes what was collected; the others find
-- nothing left. The services are locked in the order of their keys.
CREATE FUNCTION mcp_service_table_count_instances() RETURNS trigger
LANGUAGE plpgsql AS $$
DECLARE
    setting     CONSTANT text := 'bruhmcp.counts_' || TG_RELID;
    transaction CONSTANT text := pg_current_xact_id();
    counts      jsonb;
    change      record;
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        UPDATE mcp_table SET active_instances_count = 0 WHERE active_instances_count <> 0;
        RETURN NULL;
    END IF;
    counts := nullif(current_setting(setting, true), '')::jsonb -> transaction;
    IF counts IS NULL THEN
        RAISE EXCEPTION 'the instances were not changed: their count is lost'
            USING ERRCODE = 'check_violation',
                  TABLE = 'mcp_service_table',
                  CONSTRAINT = 'mcp_service_table_counts_kept',
                  HINT = 'Don''t reset the settings of a transaction that changes instances.';
    END IF;
    IF counts = '{}' THEN
        RETURN NULL;
    END IF;
    FOR change IN
        SELECT key::uuid AS service,
               (value ->> 0)::bigint AS created,
               (value ->> 1)::bigint AS active
          FROM jsonb_each(counts)
         WHERE value <> '[0, 0]'
         ORDER BY 1
    LOOP
        UPDATE mcp_table
           SET total_instances_created = total_instances_created + change.created,
               active_instances_count  = active_instances_count + change.active
         WHERE mcp_service_id = change.service;
    END LOOP;
    PERFORM set_config(setting, jsonb_build_object(transaction, '{}'::jsonb)::text, true);
    RETURN NULL;
END
$$;

-- Of two triggers of one event, the one whose name sorts first runs first: collect, then count.
CREATE TRIGGER mcp_service_table_collect_insert
    AFTER INSERT ON mcp_service_table
    FOR EACH ROW EXECUTE FUNCTION mcp_service_table_collect_counts();
CREATE TRIGGER mcp_service_table_collect_update
    AFTER UPDATE OF status, oauth_status ON mcp_service_table
    FOR EACH ROW WHEN (
        (OLD.status = 'active' AND OLD.oauth_status = 'completed')
        <> (NEW.status = 'active' AND NEW.oauth_status = 'completed')
    )
    EXECUTE FUNCTION mcp_service_table_collect_counts();
CREATE TRIGGER mcp_service_table_collect_delete
    AFTER DELETE ON mcp_service_table
    FOR EACH ROW WHEN (OLD.status = 'active' AND OLD.oauth_status = 'completed')
    EXECUTE FUNCTION mcp_service_table_collect_counts();
CREATE CONSTRAINT TRIGGER mcp_service_table_count_insert
    AFTER INSERT ON mcp_service_table
    DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION mcp_service_table_count_instances();
CREATE CONSTRAINT TRIGGER mcp_service_table_count_update
    AFTER UPDATE OF status, oauth_status ON mcp_service_table
    DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (
        (OLD.status = 'active' AND OLD.oauth_status = 'completed')
        <> (NEW.status = 'active' AND NEW.oauth_status = 'completed')
    )
    EXECUTE FUNCTION mcp_service_table_count_instances();
CREATE CONSTRAINT TRIGGER mcp_service_table_count_delete
    AFTER DELETE ON mcp_service_table
    DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (OLD.status = 'active' AND OLD.oauth_status = 'completed')
    EXECUTE FUNCTION mcp_service_table_count_instances();
CREATE TRIGGER mcp_service_table_count_truncate
    AFTER TRUNCATE ON mcp_service_table
    FOR EACH STATEMENT EXECUTE FUNCTION mcp_service_table_count_instances();

REVOKE EXECUTE ON FUNCTION
    mcp_credentials_sync_oauth_status(),
    mcp_service_table_check_insert(),
    mcp_service_table_count_instances()
FROM PUBLIC;

-- The functions run as their owner from here on, and find only the tables of this schema.
DO $$
DECLARE
    signature text;
BEGIN
    FOREACH signature IN ARRAY ARRAY[
        'mcp_credentials_sync_oauth_status()',
        'mcp_service_table_check_insert()',
        'mcp_service_table_count_instances()'
    ] LOOP
        EXECUTE format(
            'ALTER FUNCTION %s SECURITY DEFINER SET search_path = %I, pg_temp',
            signature, current_schema()
        );
    END LOOP;
END
$$;

COMMENT ON INDEX mcp_service_table_user_id_created_at_idx IS
    'The instances of a user, newest first.';
COMMENT ON INDEX mcp_service_table_user_id_active_idx IS
    'The active instances of a user: their count against the plan.';
COMMENT ON INDEX mcp_service_table_mcp_service_id_idx IS
    'The instances of a service: the recount, and its foreign key.';
COMMENT ON INDEX mcp_service_table_expires_at_idx IS 'The instances that are due to expire.';
COMMENT ON INDEX mcp_service_table_created_at_idx IS
    'The instances that wait for authorization, or failed to get it.';
COMMENT ON INDEX mcp_credentials_refresh_leased_until_token_expires_at_idx IS
    'The refresh queue: rows without a lease first, then those whose lease ends first.';
COMMENT ON INDEX mcp_credentials_updated_at_instance_id_idx IS
    'The credentials that were never authorized, for the sweep that deletes their instances.';
COMMENT ON FUNCTION mcp_credentials_sync_oauth_status() IS
    'Copies oauth_status of the credentials to their instance.';
COMMENT ON FUNCTION mcp_service_table_check_insert() IS
    'Refuses an instance of an inactive user or of a disabled service.';
COMMENT ON FUNCTION mcp_service_table_collect_counts() IS
    'Adds a change of the instances to the sums of this transaction.';
COMMENT ON FUNCTION mcp_service_table_count_instances() IS
    'Writes the sums of this transaction to the counters of mcp_table, one update per service.';
