-- The previous system used the same names for tables, types and functions as 001–007. This
-- migration moves such objects into the schema bruhmcp_archive. They keep their rows, indexes,
-- triggers and privileges; nothing is dropped. On an empty database it does nothing.

SET LOCAL lock_timeout = '5s';

DO $$
DECLARE
    -- One list for relations and types: each relation has a row type of the same name.
    relation_and_type_names CONSTANT text[] := ARRAY[
        -- Relations of the previous system and of 001–007
        'users', 'auth_tokens', 'user_subscriptions', 'subscription_transactions',
        'account_credits', 'mcp_table', 'mcp_service_table', 'mcp_credentials', 'token_audit_log',
        'token_audit_summary', 'user_plans', 'webhook_events', 'user_billing_details', 'api_keys',
        'magic_links', 'sessions', 'password_resets',
        -- Enums of 001–007
        'auth_token_type', 'subscription_plan', 'subscription_status', 'billing_cycle',
        'transaction_type', 'transaction_status', 'credit_source', 'mcp_auth_type',
        'mcp_oauth_status', 'mcp_instance_status', 'token_audit_status', 'plan_type',
        'plan_payment_status', 'payment_gateway', 'webhook_status'
    ];
    -- Functions of the previous system and of 001–007
    routine_names CONSTANT text[] := ARRAY[
        'update_updated_at_column', 'refuse_change',
        'subscription_transactions_check_refund', 'mcp_credentials_sync_oauth_status',
        'mcp_service_table_check_insert', 'mcp_service_table_collect_counts',
        'mcp_service_table_count_instances',
        'token_audit_log_refuse_change',
        'maintain_token_audit_log', 'cleanup_old_token_audit_logs', 'update_version_and_timestamp', 'assign_default_plan',
        'mcp_service_table_check_active_limit', 'user_plans_deactivate_surplus', 'card_ids_differ'
    ];
    origin          CONSTANT oid     := (
        SELECT oid FROM pg_namespace WHERE nspname = current_schema()
    );
    archive_existed CONSTANT boolean := to_regnamespace('bruhmcp_archive') IS NOT NULL;
    moved           integer          := 0;
    object          record;
    owner           text;
    grantee         text;
    relations       text;
    pattern         text;
    left_behind     text;
    functions       text;
    publications    text;
BEGIN
    -- Repeated for psql without --single-transaction, where the statement above has no effect.
    SET LOCAL lock_timeout = '5s';

    -- The backslashes of later patterns would be lost, and with them what they refuse.
    IF current_setting('standard_conforming_strings') <> 'on' THEN
        RAISE EXCEPTION 'standard_conforming_strings is off'
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT    = 'Turn it on for the database or the role that migrates. '
                            '"bruhmcp-db run" does that itself.';
    END IF;

    -- Without a ledger, Diesel begins at 000 again.
    IF EXISTS (
        SELECT
        FROM pg_constraint
        JOIN pg_class ON pg_class.oid = conrelid
        WHERE relnamespace = origin AND relname = 'users' AND conname = 'users_email_canonical'
    ) AND 7 = (
        SELECT count(*)
        FROM pg_type
        WHERE typnamespace = origin
          AND typtype = 'e'
          AND typname IN (
              'auth_token_type', 'subscription_plan', 'subscription_status', 'billing_cycle',
              'transaction_type', 'transaction_status', 'credit_source'
          )
    ) THEN
        RAISE EXCEPTION 'the tables of bruhmcp-db are here, but __diesel_schema_migrations lacks '
            'their migrations: nothing was moved'
            USING ERRCODE = 'duplicate_table',
                  HINT    = format(
                      'Run "bruhmcp-db adopt", which writes them, or restore '
                      '%I.__diesel_schema_migrations from a backup.',
                      current_schema()
                  );
    END IF;

    FOR object IN
        WITH RECURSIVE relation AS (
            SELECT oid, relkind
            FROM pg_class
            WHERE relnamespace = origin
              AND relname = ANY (relation_and_type_names)
              AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
            UNION
            SELECT child.oid, child.relkind
            FROM relation
            JOIN pg_inherits    ON inhparent = relation.oid
            JOIN pg_class child ON child.oid = inhrelid
            WHERE child.relnamespace = origin
        ),
        candidate (turn, kind, classid, objid) AS (
            SELECT 1,
                   CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END,
                   'pg_class'::regclass,
                   oid
            FROM relation
            UNION ALL
            SELECT 2, 'TYPE', 'pg_type'::regclass, oid
            FROM pg_type
            WHERE typnamespace = origin AND typname = ANY (relation_and_type_names)
            UNION ALL
            SELECT 3, 'ROUTINE', 'pg_proc'::regclass, oid
            FROM pg_proc
            WHERE pronamespace = origin AND proname = ANY (routine_names)
        )
        SELECT kind, classid, objid
        FROM candidate
        -- Objects of an extension stay. Row types, array types and owned sequences move with their
        -- owner.
        WHERE NOT EXISTS (
            SELECT
            FROM pg_depend
            WHERE (pg_depend.classid, pg_depend.objid, objsubid)
                  = (candidate.classid, candidate.objid, 0)
              AND (deptype IN ('e', 'i') OR (deptype = 'a' AND kind = 'SEQUENCE'))
        )
        ORDER BY turn, objid
    LOOP
        IF archive_existed THEN
            RAISE EXCEPTION 'old tables were not archived: schema "bruhmcp_archive" already exists'
                USING ERRCODE = 'duplicate_schema',
                      HINT    = 'Rename that schema, or drop it if nothing in it is needed. '
                          'Then run the migration again.';
        END IF;

        IF moved = 0 THEN
            CREATE SCHEMA bruhmcp_archive;
        END IF;

        -- Read the identity here: a function's argument types may have moved in this loop.
        EXECUTE format(
            'ALTER %s %s SET SCHEMA bruhmcp_archive',
            object.kind,
            (pg_identify_object(object.classid, object.objid, 0)).identity
        );
        moved := moved + 1;
    END LOOP;

    IF moved = 0 THEN
        RETURN;
    END IF;

    -- The archive holds password hashes, and default privileges may have given others access.
    FOR grantee IN
        SELECT DISTINCT CASE acl.grantee WHEN 0 THEN 'PUBLIC' ELSE acl.grantee::regrole::text END
        FROM pg_namespace, aclexplode(nspacl) AS acl
        WHERE nspname = 'bruhmcp_archive' AND acl.grantee <> nspowner
    LOOP
        EXECUTE format('REVOKE ALL ON SCHEMA bruhmcp_archive FROM %s', grantee);
    END LOOP;

    -- A foreign key is checked with the rights of the referenced table's owner, who must still
    -- reach that table.
    FOR owner IN
        SELECT DISTINCT relowner::regrole::text
        FROM pg_class
        JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE nspname = 'bruhmcp_archive' AND relowner <> nspowner
    LOOP
        EXECUTE format('GRANT USAGE ON SCHEMA bruhmcp_archive TO %s', owner);
    END LOOP;

    -- Objects that depend on the archive without being part of it. Constraints and triggers are
    -- part of it.
    WITH RECURSIVE archived AS (
        SELECT 'pg_class'::regclass::oid AS classid, oid AS objid
        FROM pg_class
        WHERE relnamespace = 'bruhmcp_archive'::regnamespace
        UNION
        SELECT 'pg_type'::regclass, oid
        FROM pg_type
        WHERE typnamespace = 'bruhmcp_archive'::regnamespace
        UNION
        SELECT 'pg_proc'::regclass, oid
        FROM pg_proc
        WHERE pronamespace = 'bruhmcp_archive'::regnamespace
    ),
    part AS (
        SELECT classid, objid
        FROM archived
        UNION
        SELECT pg_depend.classid, pg_depend.objid
        FROM part
        JOIN pg_depend ON (refclassid, refobjid) = (part.classid, part.objid)
        WHERE deptype IN ('a', 'i') AND pg_depend.classid <> 'pg_publication_rel'::regclass
    )
    SELECT string_agg(DISTINCT E'\n- ' || pg_describe_object(classid, objid, objsubid), '')
    INTO left_behind
    FROM pg_depend
    WHERE (refclassid, refobjid) IN (SELECT archived.classid, archived.objid FROM archived)
      AND (classid, objid) NOT IN (SELECT part.classid, part.objid FROM part);

    SELECT string_agg(relname, ', ' ORDER BY relname),
           string_agg(regexp_replace(relname, '(\W)', '\\\1', 'g'), '|')
    INTO relations, pattern
    FROM pg_class
    WHERE relnamespace = 'bruhmcp_archive'::regnamespace
      AND relkind IN ('r', 'p', 'v', 'm', 'f');

    -- PostgreSQL stores their source as text, so they find the tables that have the names now.
    SELECT string_agg(
        DISTINCT E'\n- ' || pg_describe_object('pg_proc'::regclass, pg_proc.oid, 0), ''
    )
    INTO functions
    FROM pg_proc
    JOIN pg_language  ON pg_language.oid = prolang
    JOIN pg_namespace ON pg_namespace.oid = pronamespace
    WHERE lanname NOT IN ('internal', 'c')
      AND nspname NOT IN ('pg_catalog', 'information_schema', 'bruhmcp_archive')
      AND replace(prosrc, format('%I.', current_schema()), '')
          ~* format('(?<!\.)\m(%s)\M', pattern);

    SELECT string_agg(format(E'\n- publication %I', pubname), '' ORDER BY pubname)
    INTO publications
    FROM pg_publication
    WHERE puballtables
       OR EXISTS (
           SELECT
           FROM pg_publication_namespace
           WHERE pnpubid = pg_publication.oid AND pnnspid = origin
       );

    -- down.sql recognises the archive and the schema it came from by the first words.
    EXECUTE format(
        'COMMENT ON SCHEMA bruhmcp_archive IS %L',
        format('Moved from schema %I by migration 000_cleanup_old_tables', current_schema())
            || ', which moves it back when reverted.'
            || E'\nIt holds password hashes: drop it when it is no longer needed.'
            || coalesce(E'\nRelations: ' || relations, '')
            || coalesce(E'\nObjects outside that still refer to it:' || left_behind, '')
            || coalesce(
                E'\nFunctions outside that name a relation, and find the new one from now on:'
                    || functions,
                ''
            )
            || coalesce(E'\nPublications whose tables change:' || publications, '')
    );
END
$$;
