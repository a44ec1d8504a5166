SET LOCAL lock_timeout = '5s';
LOCK TABLE mcp_table, mcp_service_table, mcp_credentials IN SHARE ROW EXCLUSIVE MODE;

-- Instances whose credentials a constraint refused. Their versions and times are kept.
ALTER TABLE mcp_service_table
    DISABLE TRIGGER mcp_service_table_update_updated_at,
    DISABLE TRIGGER mcp_service_table_update_version,
    DISABLE TRIGGER mcp_service_table_oauth_status_synced,
    DISABLE TRIGGER mcp_service_table_collect_update,
    DISABLE TRIGGER mcp_service_table_count_update;
UPDATE mcp_service_table AS instance
   SET oauth_status = 'pending'
 WHERE oauth_status <> 'pending'
   AND NOT EXISTS (
       SELECT FROM mcp_credentials WHERE mcp_credentials.instance_id = instance.instance_id
   );
ALTER TABLE mcp_service_table
    ENABLE TRIGGER mcp_service_table_update_updated_at,
    ENABLE TRIGGER mcp_service_table_update_version,
    ENABLE TRIGGER mcp_service_table_oauth_status_synced,
    ENABLE TRIGGER mcp_service_table_collect_update,
    ENABLE TRIGGER mcp_service_table_count_update;

UPDATE mcp_table
   SET total_instances_created = greatest(total_instances_created, created),
       active_instances_count = active
  FROM (
      SELECT mcp_service_id,
             count(*) AS created,
             count(*) FILTER (WHERE status = 'active' AND oauth_status = 'completed') AS active
        FROM mcp_service_table
       GROUP BY mcp_service_id
  ) AS counts
 WHERE counts.mcp_service_id = mcp_table.mcp_service_id;

SELECT setval(
    pg_get_serial_sequence('token_audit_log', 'audit_id'), max(audit_id)
) FROM token_audit_log HAVING max(audit_id) > 0;

UPDATE bruhmcp_archive.import_run SET finished_at = clock_timestamp();
ANALYZE users, mcp_table, mcp_service_table, mcp_credentials, user_plans, user_subscriptions,
    subscription_transactions, account_credits, user_billing_details, webhook_events,
    token_audit_log;
