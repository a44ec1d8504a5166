SET LOCAL lock_timeout = '5s';

DROP TRIGGER mcp_credentials_update_version ON mcp_credentials;
DROP TRIGGER mcp_service_table_update_version ON mcp_service_table;

DROP FUNCTION update_version_and_timestamp();

ALTER TABLE mcp_credentials
    DROP COLUMN last_modified,
    DROP COLUMN version;
ALTER TABLE mcp_service_table
    DROP COLUMN last_modified,
    DROP COLUMN version;
