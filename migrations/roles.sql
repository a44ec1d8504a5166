-- Rights of the roles app_user (the service) and app_admin (the operator) in the current schema.
-- `bruhmcp-db grant` and `psql -f` apply it: after migrations, and after a role was created. It
-- takes from the two roles whatever else they have here, from default privileges or an older
-- release: with TRIGGER, for example, a role can run code as the owner. From everybody it takes
-- CREATE, and EXECUTE of the functions that run as their owner.

DO $$
DECLARE
    here      CONSTANT regnamespace :=
        pg_catalog.to_regnamespace(pg_catalog.quote_ident(pg_catalog.current_schema()));
    path      CONSTANT text := pg_catalog.current_setting('search_path');
    read      CONSTANT text := 'SELECT';
    keep      CONSTANT text := 'SELECT, INSERT, UPDATE';
    manage    CONSTANT text := 'SELECT, INSERT, UPDATE, DELETE';
    -- Without audit_id and created_at, which are the database's.
    log       CONSTANT text := 'SELECT, INSERT (instance_id, user_id, operation, status, method, '
                               'error_type, error_message, metadata)';
    role      name;
    statement text;
    one       record;
BEGIN
    IF here IS NULL THEN
        RAISE EXCEPTION 'no schema of the search_path exists' USING ERRCODE = 'invalid_schema_name';
    END IF;
    -- Another role's function or operator in the schema must not run here as the owner.
    PERFORM pg_catalog.set_config('search_path', '', true);

    EXECUTE format('REVOKE CREATE ON SCHEMA %s FROM PUBLIC', here);
    IF has_schema_privilege('public', here, 'CREATE') THEN
        RAISE EXCEPTION 'every role may create objects in the schema %', here
            USING ERRCODE = 'insufficient_privilege',
                  HINT = format('Its owner can REVOKE CREATE ON SCHEMA %s FROM PUBLIC.', here);
    END IF;

    -- A restore without privileges lets everybody call functions that run as their owner. A trigger
    -- that is there needs no EXECUTE.
    FOR statement IN
        SELECT format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', oid::regprocedure)
          FROM pg_proc
         WHERE pronamespace = here
           AND prosecdef
           AND (
               prorettype = 'trigger'::regtype
               OR proname IN ('cleanup_old_token_audit_logs', 'maintain_token_audit_log')
           )
           AND pg_has_role(proowner, 'USAGE')
    LOOP
        EXECUTE statement;
    END LOOP;

    FOR role IN
        SELECT rolname FROM pg_roles WHERE rolname IN ('app_user', 'app_admin') ORDER BY rolname
    LOOP
        EXECUTE format('REVOKE CREATE ON SCHEMA %s FROM %I', here, role);
        EXECUTE format('GRANT USAGE ON SCHEMA %s TO %I', here, role);
        IF has_schema_privilege(role, here, 'CREATE')
            OR NOT has_schema_privilege(role, here, 'USAGE')
        THEN
            RAISE EXCEPTION '% must have USAGE and not CREATE on the schema %', role, here
                USING ERRCODE = 'insufficient_privilege',
                      HINT = 'The owner of the schema can change that. A superuser or a member of '
                             'the owner always has CREATE.';
        END IF;

        -- What an extension or another role owns stays as it is.
        FOR statement IN
            SELECT format('REVOKE ALL ON TABLE %s.%I FROM %I', here, relname, role)
              FROM pg_class
             WHERE relnamespace = here
               AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
               AND pg_has_role(relowner, 'USAGE')
             UNION ALL
            SELECT format('REVOKE ALL ON ROUTINE %s FROM %I', oid::regprocedure, role)
              FROM pg_proc
             WHERE pronamespace = here
               AND pg_has_role(proowner, 'USAGE')
        LOOP
            EXECUTE statement;
        END LOOP;

        FOR one IN
            SELECT name,
                   CASE role WHEN 'app_user' THEN app_user ELSE app_admin END AS privileges,
                   pg_has_role(relowner, 'USAGE') AS is_owner
              FROM (VALUES
                  -- name,                      app_user, app_admin
                  ('users',                      keep,     manage),
                  ('auth_tokens',                manage,   manage),
                  ('user_subscriptions',         keep,     manage),
                  ('subscription_transactions',  keep,     manage),
                  ('account_credits',            keep,     manage),
                  ('mcp_table',                  read,     manage),
                  ('mcp_service_table',          manage,   manage),
                  ('mcp_credentials',            manage,   manage),
                  ('token_audit_log',            log,      log),
                  ('token_audit_summary',        read,     read),
                  ('user_plans',                 keep,     manage),
                  ('webhook_events',             keep,     manage),
                  ('user_billing_details',       manage,   manage),
                  ('__diesel_schema_migrations', read,     read)
              ) AS rights (name, app_user, app_admin)
              JOIN pg_class ON relnamespace = here AND relname = name
             ORDER BY name
        LOOP
            IF NOT one.is_owner THEN
                RAISE EXCEPTION 'the role % does not own %', current_user, one.name
                    USING ERRCODE = 'insufficient_privilege',
                          HINT = 'Use the role that runs the migrations.';
            END IF;
            EXECUTE format('GRANT %s ON TABLE %s.%I TO %I', one.privileges, here, one.name, role);
        END LOOP;

        FOR statement IN
            SELECT format('GRANT EXECUTE ON FUNCTION %s TO app_admin', oid::regprocedure)
              FROM pg_proc
             WHERE role = 'app_admin'
               AND pronamespace = here
               AND proname IN ('cleanup_old_token_audit_logs', 'maintain_token_audit_log')
        LOOP
            EXECUTE statement;
        END LOOP;
    END LOOP;

    PERFORM set_config('search_path', path, true);
END
$$;
