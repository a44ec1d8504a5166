-- A row for each role and object: the rights that a role does not have by owning something here, by
-- being a superuser or by being trusted ($3). The objects are the relations and functions with the
-- keys $2 in the schema $1 (NULL: all), the ledger of migrations, the schema itself, and what the
-- owners' default privileges give on new ones. Left out is what gives nothing by itself: USAGE of
-- the schema, EXECUTE of a function that has the caller's rights. `revoke` is the remedy; {} stands
-- for the privileges. The search_path is that of catalogue.sql, for the same reason.
WITH RECURSIVE path AS MATERIALIZED (
    SELECT set_config('search_path', quote_ident($1), true)
),
schema AS MATERIALIZED (
    SELECT n.oid, n.nspowner, n.nspacl, quote_ident(n.nspname) AS name
    FROM path CROSS JOIN pg_namespace n
    WHERE n.nspname = $1
),
own AS (
    SELECT c.oid, c.relowner
    FROM schema s
    JOIN pg_class c ON c.relnamespace = s.oid
    WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
        AND ($2 IS NULL OR c.relname = '__diesel_schema_migrations'
            OR 'relation ' || quote_ident(c.relname) = ANY ($2))
),
-- A partition has rights of its own.
relation AS (
    SELECT oid FROM own
    UNION
    SELECT i.inhrelid FROM relation r JOIN pg_inherits i ON i.inhparent = r.oid
),
-- What runs code for whoever uses the schema.
code AS (
    SELECT p.oid, p.proowner AS owner, 'pg_proc'::regclass AS class,
        'function ' || p.oid::regprocedure AS key,
        format('FUNCTION %s.%I(%s)', s.name, p.proname, pg_get_function_identity_arguments(p.oid)) AS name
    FROM schema s JOIN pg_proc p ON p.pronamespace = s.oid
    UNION ALL
    SELECT o.oid, o.oprowner, 'pg_operator'::regclass, 'operator ' || o.oid::regoperator,
        format('OPERATOR %s.%s (%s, %s)', s.name, o.oprname,
            coalesce(nullif(o.oprleft, 0)::regtype::text, 'NONE'), o.oprright::regtype)
    FROM schema s JOIN pg_operator o ON o.oprnamespace = s.oid
),
exempt AS MATERIALIZED (
    SELECT relowner AS role FROM own
    UNION SELECT nspowner FROM schema
    UNION SELECT datdba FROM pg_database WHERE datname = current_database()
    UNION SELECT oid FROM pg_roles WHERE rolsuper OR rolname = ANY ($3)
),
target (acl, object, attribute, revoke) AS (
    SELECT c.relacl, c.oid::regclass::text, NULL, format(
        'REVOKE {} ON %s %I.%I', CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END,
        n.nspname, c.relname
    )
    FROM relation JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace
    UNION ALL
    SELECT a.attacl, format('%s(%I)', c.oid::regclass, a.attname), format(' (%I)', a.attname),
        format('REVOKE {} ON TABLE %I.%I', n.nspname, c.relname)
    FROM relation JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attacl IS NOT NULL AND NOT a.attisdropped
    UNION ALL
    SELECT coalesce(p.proacl, acldefault('f', p.proowner)), p.oid::regprocedure::text, NULL,
        'REVOKE {} ON ' || c.name
    FROM code c JOIN pg_proc p ON c.class = 'pg_proc'::regclass AND p.oid = c.oid
    WHERE p.prosecdef AND ($2 IS NULL OR c.key = ANY ($2))
    UNION ALL
    SELECT nspacl, 'the schema', NULL, 'REVOKE {} ON SCHEMA ' || name
    FROM schema
    UNION ALL
    SELECT d.defaclacl, format('new %s of %s', lower(kind), d.defaclrole::regrole), NULL, concat(
        'ALTER DEFAULT PRIVILEGES FOR ROLE ', d.defaclrole::regrole,
        CASE WHEN d.defaclnamespace <> 0 THEN ' IN SCHEMA ' || s.name END, ' REVOKE {} ON ', kind
    )
    FROM schema s
    JOIN pg_default_acl d ON d.defaclnamespace IN (0, s.oid)
        AND d.defaclrole IN (SELECT relowner FROM own)
    JOIN (VALUES ('r', 'TABLES'), ('S', 'SEQUENCES'), ('f', 'FUNCTIONS')) k (type, kind)
        ON k.type = d.defaclobjtype::text
)
SELECT format('right %s on %s', g.grantee, t.object) AS key,
    array_agg(DISTINCT g.privilege ORDER BY g.privilege) AS privileges,
    coalesce(t.attribute, '') AS attribute, format('%s FROM %s', t.revoke, g.grantee) AS revoke
FROM target t
CROSS JOIN LATERAL (
    SELECT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END AS grantee, p.privilege
    FROM aclexplode(t.acl) a
    CROSS JOIN LATERAL (
        VALUES (a.privilege_type),
            (CASE WHEN a.is_grantable THEN 'GRANT OPTION FOR ' || a.privilege_type END)
    ) p (privilege)
    WHERE p.privilege IS NOT NULL AND a.grantee NOT IN (SELECT role FROM exempt)
) g
WHERE NOT (t.object = 'the schema' AND g.privilege LIKE '%USAGE')
    -- Every function has it when it is new.
    AND NOT (t.object LIKE 'new functions of %' AND g.grantee = 'PUBLIC')
GROUP BY g.grantee, t.object, t.attribute, t.revoke
UNION ALL
SELECT format('owner %s of %s', c.owner::regrole, c.key), '{}', '', 'DROP ' || c.name
FROM code c
WHERE c.owner NOT IN (SELECT role FROM exempt)
    AND NOT EXISTS (
        SELECT FROM pg_depend d WHERE d.classid = c.class AND d.objid = c.oid AND d.deptype = 'e'
    )
