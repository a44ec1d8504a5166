SET LOCAL lock_timeout = '5s';

DROP TABLE mcp_credentials;
DROP TABLE mcp_service_table;
DROP TABLE mcp_table;

DROP FUNCTION mcp_service_table_count_instances();
DROP FUNCTION mcp_service_table_collect_counts();
DROP FUNCTION mcp_service_table_check_insert();
DROP FUNCTION mcp_credentials_sync_oauth_status();

DROP TYPE mcp_instance_status;
DROP TYPE mcp_oauth_status;
DROP TYPE mcp_auth_type;
