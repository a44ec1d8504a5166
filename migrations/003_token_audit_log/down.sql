SET LOCAL lock_timeout = '5s';

DROP VIEW token_audit_summary;
DROP FUNCTION cleanup_old_token_audit_logs(integer);
DROP FUNCTION maintain_token_audit_log();
DROP TABLE token_audit_log;
DROP FUNCTION token_audit_log_refuse_change();
DROP TYPE token_audit_status;
