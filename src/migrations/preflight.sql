-- What 000 would do to the current schema, one line for each finding. $1 and $2 are its lists of names; $3 to $5 are the
-- relations, types and functions that the later migrations create. `relation` is 000's own query.
WITH RECURSIVE origin AS (
    SELECT oid, nspname
    FROM pg_namespace
    WHERE nspname = current_schema()
),
relation AS (
    SELECT c.oid, c.relkind
    FROM pg_class c
    JOIN origin ON origin.oid = c.relnamespace
    WHERE c.relname = ANY ($1) AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
    UNION
    SELECT child.oid, child.relkind
    FROM relation
    JOIN pg_inherits    ON inhparent = relation.oid
    JOIN pg_class child ON child.oid = inhrelid
    JOIN origin         ON origin.oid = child.relnamespace
),
candidate (classid, objid, relkind, owner) AS (
    SELECT 'pg_class'::regclass, c.oid, c.relkind, c.relowner
    FROM relation
    JOIN pg_class c USING (oid)
    UNION ALL
    SELECT 'pg_type'::regclass, t.oid, NULL, t.typowner
    FROM pg_type t
    JOIN origin ON origin.oid = t.typnamespace
    WHERE t.typname = ANY ($1)
    UNION ALL
    SELECT 'pg_proc'::regclass, p.oid, NULL, p.proowner
    FROM pg_proc p
    JOIN origin ON origin.oid = p.pronamespace
    WHERE p.proname = ANY ($2)
),
moving AS (
    SELECT *
    FROM candidate
    WHERE NOT EXISTS (
        SELECT
        FROM pg_depend d
        WHERE (d.classid, d.objid, d.objsubid) = (candidate.classid, candidate.objid, 0)
            AND (d.deptype IN ('e', 'i') OR (d.deptype = 'a' AND candidate.relkind = 'S'))
    )
),
-- With what belongs to it: indexes, constraints, triggers, sequences.
part AS (
    SELECT classid::oid, objid
    FROM moving
    UNION
    SELECT d.classid, d.objid
    FROM part
    JOIN pg_depend d ON (d.refclassid, d.refobjid) = (part.classid, part.objid)
    WHERE d.deptype IN ('a', 'i') AND d.classid <> 'pg_publication_rel'::regclass
),
-- Relations that the later migrations need the names of.
taken (object) AS (
    SELECT pg_describe_object('pg_class'::regclass, c.oid, 0)
        || coalesce(' of ' || pg_describe_object('pg_class'::regclass, i.indrelid, 0), '')
    FROM pg_class c
    JOIN origin ON origin.oid = c.relnamespace
    LEFT JOIN pg_index i ON i.indexrelid = c.oid
    WHERE quote_ident(c.relname) = ANY ($3) AND ('pg_class'::regclass, c.oid) NOT IN (SELECT classid, objid FROM part)
        AND c.reltype NOT IN (SELECT objid FROM moving WHERE classid = 'pg_type'::regclass)
    UNION ALL
    -- Row types are listed with their relation, and the server renames an array type that is in the way.
    SELECT pg_describe_object('pg_type'::regclass, t.oid, 0)
    FROM pg_type t
    JOIN origin ON origin.oid = t.typnamespace
    WHERE quote_ident(t.typname) = ANY ($4) AND t.typrelid = 0 AND t.typcategory <> 'A'
        AND ('pg_type'::regclass, t.oid) NOT IN (SELECT classid, objid FROM part)
    UNION ALL
    SELECT pg_describe_object('pg_proc'::regclass, p.oid, 0)
    FROM pg_proc p
    JOIN origin ON origin.oid = p.pronamespace
    WHERE format('%I(%s)', p.proname, pg_get_function_identity_arguments(p.oid)) = ANY ($5)
        AND ('pg_proc'::regclass, p.oid) NOT IN (SELECT classid, objid FROM part)
),
finding (topic, item, relid) AS (
    SELECT 'moves', pg_describe_object(classid, objid, 0), CASE WHEN relkind IN ('r', 'm') THEN objid END
    FROM moving
    UNION
    SELECT 'stays',
        CASE WHEN r.rulename = '_RETURN' THEN pg_describe_object('pg_class'::regclass, r.ev_class, 0)
             ELSE pg_describe_object(d.classid, d.objid, d.objsubid) END,
        NULL
    FROM pg_depend d
    LEFT JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
    WHERE (d.refclassid, d.refobjid) IN (SELECT classid, objid FROM part)
        AND (d.classid, d.objid) NOT IN (SELECT classid, objid FROM part)
        AND d.classid <> 'pg_publication_rel'::regclass
    UNION
    SELECT 'published', format('%I: %I', p.pubname, c.relname), NULL
    FROM pg_publication_rel r
    JOIN pg_publication p ON p.oid = r.prpubid
    JOIN pg_class c       ON c.oid = r.prrelid
    JOIN moving           ON moving.classid = 'pg_class'::regclass AND moving.objid = c.oid
    UNION
    SELECT 'published_schema', quote_ident(p.pubname), NULL
    FROM pg_publication_namespace n
    JOIN origin           ON origin.oid = n.pnnspid
    JOIN pg_publication p ON p.oid = n.pnpubid
    UNION
    SELECT 'published_all', quote_ident(pubname), NULL
    FROM pg_publication
    WHERE puballtables
    UNION
    SELECT 'mentions', format('%s: %s', p.oid::regprocedure, string_agg(c.relname, ', ' ORDER BY c.relname)), NULL
    FROM pg_proc p
    JOIN pg_language l ON l.oid = p.prolang AND l.lanname NOT IN ('c', 'internal')
    JOIN moving        ON moving.classid = 'pg_class'::regclass
    JOIN pg_class c    ON c.oid = moving.objid
    WHERE p.pronamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
        AND ('pg_proc'::regclass, p.oid) NOT IN (SELECT classid, objid FROM moving)
        AND NOT EXISTS (
            SELECT
            FROM pg_depend d
            WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
        )
        -- The name alone or with this schema, which both mean the new table afterwards.
        AND replace(p.prosrc, format('%I.', current_schema()), '')
            ~* format('(?<!\.|\.")\m%s\M', regexp_replace(c.relname, '(\W)', '\\\1', 'g'))
    GROUP BY p.oid
    UNION
    SELECT 'taken', object, NULL
    FROM taken
    UNION
    SELECT 'not_owned', format('%s (owner: %I)', pg_describe_object(classid, objid, 0), owner::regrole), NULL
    FROM moving
    WHERE NOT pg_has_role(owner, 'USAGE')
    UNION
    SELECT 'no_archive', format('GRANT CREATE ON DATABASE %I TO %I', current_database(), current_user), NULL
    WHERE EXISTS (SELECT FROM moving) AND NOT has_database_privilege(current_database(), 'CREATE')
    UNION
    SELECT 'archive_exists', 'ALTER SCHEMA bruhmcp_archive RENAME TO …', NULL
    WHERE EXISTS (SELECT FROM moving) AND to_regnamespace('bruhmcp_archive') IS NOT NULL
    UNION
    SELECT 'public_creates', format('REVOKE CREATE ON SCHEMA %I FROM PUBLIC', nspname), NULL
    FROM origin
    WHERE has_schema_privilege('public', oid, 'CREATE')
    UNION
    -- As 000 recognises it.
    SELECT 'own', 'bruhmcp-db adopt', NULL
    FROM moving
    JOIN pg_class c      ON moving.classid = 'pg_class'::regclass AND c.oid = moving.objid
    JOIN pg_constraint o ON o.conrelid = c.oid
    WHERE c.relname = 'users' AND o.conname = 'users_email_canonical' AND 7 = (
        SELECT count(*)
        FROM pg_type t
        JOIN origin ON origin.oid = t.typnamespace
        WHERE t.typtype = 'e' AND t.typname IN (
            'auth_token_type', 'subscription_plan', 'subscription_status', 'billing_cycle',
            'transaction_type', 'transaction_status', 'credit_source'
        )
    )
)
SELECT f.topic, f.item,
    -- A big table is not read, nor one that row level security filters.
    CASE WHEN s.bytes <= 8 * 1024 * 1024
            AND has_table_privilege(c.oid, 'SELECT')
            AND NOT row_security_active(c.oid)
            AND c.relispopulated
        THEN c.oid::regclass::text END AS countable,
    CASE WHEN c.oid IS NULL THEN NULL
         WHEN c.reltuples >= 0 THEN format('about %s rows', ltrim(to_char(c.reltuples::numeric, '999,999,999,999,990')))
         ELSE coalesce(pg_size_pretty(s.bytes), 'locked by another session') END AS size
FROM finding f
LEFT JOIN pg_class c ON c.oid = f.relid
-- Reading the size waits for a lock.
LEFT JOIN LATERAL (
    SELECT CASE WHEN NOT EXISTS (
        SELECT
        FROM pg_locks l
        JOIN pg_database d ON d.oid = l.database AND d.datname = current_database()
        WHERE l.relation = c.oid AND l.mode = 'AccessExclusiveLock'
    ) THEN pg_relation_size(c.oid) END AS bytes
) s ON true
ORDER BY f.topic, f.item COLLATE "C"
