-- One line, `key: definition`, for what catalogue.sql leaves out, in all schemas of the user's.
WITH object AS (
    -- What neither catalogue.sql reads nor the server names by numbers. Every object depends on
    -- something, but for schemas, publications and roles.
    SELECT DISTINCT classid, objid
    FROM pg_depend
    WHERE deptype <> 'e' AND objid >= 16384 AND classid <> ALL (ARRAY[
        'pg_class', 'pg_type', 'pg_proc', 'pg_attrdef', 'pg_constraint', 'pg_trigger', 'pg_rewrite',
        'pg_policy', 'pg_default_acl'
    ]::regclass[])
    UNION
    SELECT 'pg_namespace'::regclass, oid FROM pg_namespace WHERE nspname !~ '^pg_(temp|toast)'
    UNION
    SELECT 'pg_publication'::regclass, oid FROM pg_publication
),
own_schema AS (
    SELECT * FROM pg_namespace
    WHERE nspname <> 'information_schema' AND nspname !~ '^pg_'
),
relation AS (
    SELECT c.* FROM pg_class c JOIN own_schema n ON n.oid = c.relnamespace
    WHERE c.relname <> '__diesel_schema_migrations' AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
),
owned AS (
    SELECT 'pg_class'::regclass AS classid, oid AS objid, 0 AS objsubid, relowner AS owner,
        relacl AS acl, CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::"char" AS kind
    FROM relation
    UNION ALL
    SELECT 'pg_class'::regclass, c.oid, a.attnum, c.relowner, a.attacl, 'c'
    FROM relation c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
    UNION ALL
    SELECT 'pg_proc'::regclass, p.oid, 0, p.proowner, p.proacl, 'f'
    FROM pg_proc p JOIN own_schema n ON n.oid = p.pronamespace
    UNION ALL
    SELECT 'pg_type'::regclass, t.oid, 0, t.typowner, t.typacl, 'T'
    FROM pg_type t JOIN own_schema n ON n.oid = t.typnamespace
    WHERE t.typtype IN ('e', 'd', 'r')
    UNION ALL
    SELECT 'pg_namespace'::regclass, oid, 0, nspowner, nspacl, 'n' FROM own_schema
)
SELECT format('%s %s', i.type, i.identity) AS key, CASE classid
    WHEN 'pg_extension'::regclass
    THEN (SELECT 'version ' || extversion FROM pg_extension WHERE oid = objid)
    WHEN 'pg_statistic_ext'::regclass THEN pg_get_statisticsobjdef(objid)
    ELSE 'exists'
END AS definition
FROM object, pg_identify_object(classid, objid, 0) i
UNION ALL
SELECT 'partition ' || oid::regclass, pg_get_expr(relpartbound, oid, true)
FROM relation
WHERE relispartition
UNION ALL
SELECT format('storage of column %s.%I', c.oid::regclass, a.attname), concat_ws(
    ' ', a.attstorage, nullif(a.attcompression, ''), nullif(a.attstattarget, -1), a.attoptions
)
FROM relation c
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
JOIN pg_type t ON t.oid = a.atttypid
WHERE c.relkind IN ('r', 'p') AND (
    a.attstorage <> t.typstorage OR a.attcompression <> '' OR nullif(a.attstattarget, -1) >= 0
    OR a.attoptions IS NOT NULL
)
UNION ALL
SELECT format('comment on %s %s', i.type, i.identity), d.description
FROM pg_description d, pg_identify_object(d.classoid, d.objoid, d.objsubid) i
WHERE d.objoid >= 16384
UNION ALL
SELECT format('owner of %s %s', i.type, i.identity), owner::regrole::text
FROM owned, pg_identify_object(classid, objid, objsubid) i
WHERE objsubid = 0 AND owner <> current_user::regrole
UNION ALL
-- Rights that a GRANT gave and a REVOKE took again are those of the beginning.
SELECT format('rights on %s %s', i.type, i.identity), array(SELECT unnest(acl)::text ORDER BY 1)::text
FROM owned, pg_identify_object(classid, objid, objsubid) i
WHERE array(SELECT unnest(acl)::text ORDER BY 1)
    <> array(SELECT unnest(acldefault(kind, owner))::text ORDER BY 1)
    AND acl IS NOT NULL
UNION ALL
SELECT 'default rights ' || i.identity, array(SELECT unnest(defaclacl)::text ORDER BY 1)::text
FROM pg_default_acl d, pg_identify_object('pg_default_acl'::regclass, d.oid, 0) i
UNION ALL
SELECT 'settings of ' || CASE setrole WHEN 0 THEN 'the database' ELSE setrole::regrole::text END,
    setconfig::text
FROM pg_db_role_setting
WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
