-- Optimistic locking. An update names the version that was read, and finds no row if another update
-- came first. Recording a call is not an edit and does not change the version.

-- The column is new, so its check holds and is quick.
-- squawk-ignore-file constraint-missing-not-valid

SET LOCAL lock_timeout = '5s';

ALTER TABLE mcp_service_table
    ADD COLUMN version       integer     NOT NULL DEFAULT 1,
    ADD COLUMN last_modified timestamptz NOT NULL DEFAULT now();
ALTER TABLE mcp_credentials
    ADD COLUMN version       integer     NOT NULL DEFAULT 1,
    ADD COLUMN last_modified timestamptz NOT NULL DEFAULT now();
ALTER TABLE mcp_service_table
    ADD CONSTRAINT mcp_service_table_last_modified_check CHECK (
        last_modified AT TIME ZONE 'UTC' < '10000-01-01'
        AND last_modified AT TIME ZONE 'UTC' >= '0001-01-01'
    );
ALTER TABLE mcp_credentials
    ADD CONSTRAINT mcp_credentials_last_modified_check CHECK (
        last_modified AT TIME ZONE 'UTC' < '10000-01-01'
        AND last_modified AT TIME ZONE 'UTC' >= '0001-01-01'
    );

COMMENT ON COLUMN mcp_service_table.version IS
    'Increased by a trigger with every change, except when a call is recorded.';
COMMENT ON COLUMN mcp_service_table.last_modified IS 'When version was last increased.';
COMMENT ON COLUMN mcp_credentials.version IS
    'Increased by a trigger with every change, except of a lease.';
COMMENT ON COLUMN mcp_credentials.last_modified IS 'When version was last increased.';

CREATE FUNCTION update_version_and_timestamp() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    NEW.version := OLD.version + 1;
    NEW.last_modified := now();
    RETURN NEW;
END
$$;

-- The lists have every column but those that recording a call or leasing a refresh writes. version
-- and last_modified are in them, so that values set by hand are overwritten.
CREATE TRIGGER mcp_service_table_update_version
    BEFORE UPDATE ON mcp_service_table
    FOR EACH ROW WHEN (
        (OLD.instance_id, OLD.user_id, OLD.mcp_service_id, OLD.oauth_status, OLD.status,
            OLD.expires_at, OLD.custom_name, OLD.renewed_count, OLD.last_renewed_at,
            OLD.credentials_updated_at, OLD.created_at, OLD.version, OLD.last_modified)
        IS DISTINCT FROM
        (NEW.instance_id, NEW.user_id, NEW.mcp_service_id, NEW.oauth_status, NEW.status,
            NEW.expires_at, NEW.custom_name, NEW.renewed_count, NEW.last_renewed_at,
            NEW.credentials_updated_at, NEW.created_at, NEW.version, NEW.last_modified)
    )
    EXECUTE FUNCTION update_version_and_timestamp();
CREATE TRIGGER mcp_credentials_update_version
    BEFORE UPDATE ON mcp_credentials
    FOR EACH ROW WHEN (
        (OLD.credential_id, OLD.instance_id, OLD.api_key, OLD.client_id, OLD.client_secret,
            OLD.access_token, OLD.refresh_token, OLD.token_expires_at, OLD.token_scope,
            OLD.oauth_status, OLD.oauth_completed_at, OLD.oauth_authorization_url, OLD.oauth_state,
            OLD.oauth_state_expires_at, OLD.oauth_code_verifier, OLD.created_at, OLD.version,
            OLD.last_modified)
        IS DISTINCT FROM
        (NEW.credential_id, NEW.instance_id, NEW.api_key, NEW.client_id, NEW.client_secret,
            NEW.access_token, NEW.refresh_token, NEW.token_expires_at, NEW.token_scope,
            NEW.oauth_status, NEW.oauth_completed_at, NEW.oauth_authorization_url, NEW.oauth_state,
            NEW.oauth_state_expires_at, NEW.oauth_code_verifier, NEW.created_at, NEW.version,
            NEW.last_modified)
    )
    EXECUTE FUNCTION update_version_and_timestamp();

COMMENT ON FUNCTION update_version_and_timestamp() IS
    'Increases version and sets last_modified to now().';
