SET LOCAL lock_timeout = '5s';

DROP TRIGGER mcp_service_table_active_limit_update ON mcp_service_table;
DROP TRIGGER users_assign_default_plan ON users;

DROP TABLE user_plans;

DROP FUNCTION user_plans_deactivate_surplus();
DROP FUNCTION mcp_service_table_check_active_limit();
DROP FUNCTION assign_default_plan();

DROP TYPE plan_type;
