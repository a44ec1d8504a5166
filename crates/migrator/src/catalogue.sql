-- One line, `key: definition`, for each object that a program can rely on: the relations, types and
-- functions of the schema $1, and what hangs on them. $2 has the keys that are expected; NULL reads
-- the whole schema. Left out: owners, rights, comments, what only tunes (statistics, storage), the
-- ledger of migrations, partitions (their number depends on the date) and what extensions brought.
--
-- The search_path is changed while the query runs: the names in the query are looked up before, in
-- pg_catalog alone, and the definitions after, so that only names of other schemas are qualified.
WITH path AS MATERIALIZED (
    SELECT set_config('search_path', quote_ident($1), true)
),
relation AS MATERIALIZED (
    SELECT c.*, quote_ident(c.relname) AS name
    FROM path CROSS JOIN pg_class c
    WHERE c.relnamespace = to_regnamespace(quote_ident($1))
        AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
        AND CASE
            WHEN $2 IS NOT NULL THEN 'relation ' || quote_ident(c.relname) = ANY ($2)
            ELSE c.relname <> '__diesel_schema_migrations' AND NOT c.relispartition
                AND NOT EXISTS (
                    SELECT FROM pg_depend d
                    WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
                )
        END
),
attribute AS MATERIALIZED (
    SELECT a.*, c.name AS relation, format('column %s.%I', c.name, a.attname) AS key
    FROM relation c
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    WHERE c.relkind <> 'S'
),
type AS MATERIALIZED (
    SELECT t.*, 'type ' || quote_ident(t.typname) AS key
    FROM path CROSS JOIN pg_type t
    LEFT JOIN pg_class c ON c.oid = t.typrelid
    WHERE t.typnamespace = to_regnamespace(quote_ident($1))
        AND (t.typtype IN ('e', 'd', 'r') OR c.relkind = 'c')
        AND CASE
            WHEN $2 IS NOT NULL THEN 'type ' || quote_ident(t.typname) = ANY ($2)
            ELSE NOT EXISTS (
                SELECT FROM pg_depend d
                WHERE d.classid = 'pg_type'::regclass AND d.objid = t.oid AND d.deptype = 'e'
            )
        END
),
routine AS MATERIALIZED (
    SELECT p.*, format('function %I(%s)', p.proname, pg_get_function_identity_arguments(p.oid)) AS key
    FROM path CROSS JOIN pg_proc p
    WHERE p.pronamespace = to_regnamespace(quote_ident($1))
        AND ($2 IS NOT NULL OR NOT EXISTS (
            SELECT FROM pg_depend d
            WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
        ))
)
SELECT 'relation ' || name AS key, concat_ws(
    ', ',
    CASE relpersistence WHEN 'u' THEN 'unlogged ' WHEN 't' THEN 'temporary ' ELSE '' END
        || CASE relkind
            WHEN 'r' THEN 'table'
            WHEN 'p' THEN 'table partitioned by ' || pg_get_partkeydef(c.oid)
            WHEN 'v' THEN 'view'
            WHEN 'm' THEN 'materialized view'
            WHEN 'f' THEN 'foreign table'
            ELSE 'sequence'
        END,
    CASE WHEN relkind = 'v' THEN array_to_string(reloptions, ', ') END,
    CASE WHEN EXISTS (SELECT FROM pg_partitioned_table p WHERE p.partrelid = c.oid AND p.partdefid <> 0)
        THEN 'default partition' END,
    CASE WHEN relispartition THEN 'partition ' || pg_get_expr(relpartbound, c.oid, true) END,
    (
        SELECT 'inherits ' || string_agg(i.inhparent::regclass::text, ', ' ORDER BY i.inhseqno)
        FROM pg_inherits i
        WHERE i.inhrelid = c.oid
    ),
    CASE WHEN relrowsecurity THEN 'row level security' END,
    CASE WHEN relforcerowsecurity THEN 'row level security forced' END,
    CASE CASE WHEN relkind IN ('r', 'p') THEN relreplident END
        WHEN 'n' THEN 'replica identity nothing'
        WHEN 'f' THEN 'replica identity full'
        WHEN 'i' THEN 'replica identity ' || coalesce((
            SELECT i.indexrelid::regclass::text
            FROM pg_index i
            WHERE i.indrelid = c.oid AND i.indisreplident
        ), 'nothing')
    END,
    (
        SELECT concat_ws(
            ' ', format_type(s.seqtypid, NULL), 'start', s.seqstart, 'increment', s.seqincrement,
            'min', s.seqmin, 'max', s.seqmax, 'cache', s.seqcache, CASE WHEN s.seqcycle THEN 'cycle' END
        )
        FROM pg_sequence s
        WHERE s.seqrelid = c.oid
    ),
    (
        SELECT format('of %s.%I', d.refobjid::regclass, a.attname)
        FROM pg_depend d
        JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
        WHERE relkind = 'S' AND d.classid = 'pg_class'::regclass AND d.objid = c.oid
            AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')
    )
) AS definition
FROM relation c
UNION ALL
SELECT format('option %s.%s', c.name, split_part(o, '=', 1)), substr(o, strpos(o, '=') + 1)
FROM relation c
CROSS JOIN unnest(c.reloptions) o
WHERE relkind <> 'v'
UNION ALL
-- Their order, without those that were added by hand.
SELECT 'columns ' || relation, string_agg(quote_ident(attname), ', ' ORDER BY attnum)
FROM attribute
WHERE $2 IS NULL OR key = ANY ($2)
GROUP BY relation
UNION ALL
SELECT a.key, concat(
    format_type(a.atttypid, a.atttypmod),
    CASE WHEN a.attcollation <> t.typcollation THEN ' collate ' || a.attcollation::regcollation END,
    CASE WHEN a.attnotnull THEN ' not null' END,
    -- PostgreSQL 18 has NOT NULL in pg_constraint too, and there it may be unproven.
    CASE WHEN EXISTS (
        SELECT FROM pg_constraint o
        WHERE o.conrelid = a.attrelid AND o.contype = 'n' AND o.conkey = ARRAY[a.attnum]
            AND NOT o.convalidated
    ) THEN ' not valid' END,
    CASE a.attidentity WHEN 'a' THEN ' identity always' WHEN 'd' THEN ' identity' END,
    CASE a.attgenerated WHEN '' THEN ' default ' WHEN 'v' THEN ' virtual ' ELSE ' generated ' END
        || pg_get_expr(d.adbin, d.adrelid, true)
)
FROM attribute a
JOIN pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
UNION ALL
-- PostgreSQL 15 qualifies the columns of a single relation, 16 and later don't.
SELECT 'view ' || name, regexp_replace(
    pg_get_viewdef(c.oid, true),
    (
        SELECT '\m(' || string_agg(regexp_replace(r.relname, '(\W)', '\\\1', 'g'), '|') || ')"?\.'
        FROM pg_rewrite w
        JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
        JOIN pg_class r ON d.refclassid = 'pg_class'::regclass AND r.oid = d.refobjid
        WHERE w.ev_class = c.oid AND r.oid <> c.oid
    ), '', 'g'
)
FROM relation c
WHERE relkind IN ('v', 'm')
UNION ALL
-- Not a constraint trigger, nor NOT NULL. The triggers of a foreign key have no name of their own.
SELECT format('constraint %s.%I', c.name, o.conname), pg_get_constraintdef(o.oid, true) || coalesce((
    SELECT ' triggers ' || string_agg(DISTINCT
        CASE g.tgenabled WHEN 'D' THEN 'disabled' WHEN 'R' THEN 'replica' ELSE 'always' END, ', ')
    FROM pg_trigger g
    WHERE g.tgconstraint = o.oid AND g.tgenabled <> 'O'
), '')
FROM relation c
JOIN pg_constraint o ON o.conrelid = c.oid AND o.contype IN ('c', 'f', 'p', 'u', 'x')
UNION ALL
SELECT 'index ' || i.indexrelid::regclass, concat(
    pg_get_indexdef(i.indexrelid, 0, true),
    CASE WHEN NOT (i.indisvalid AND i.indisready AND i.indislive) THEN ' invalid' END
)
FROM relation c
JOIN pg_index i ON i.indrelid = c.oid
UNION ALL
-- Not pretty, a comparison of rows is printed otherwise before a dump than after it.
SELECT format('trigger %s.%I', c.name, g.tgname), concat(
    pg_get_triggerdef(g.oid, true),
    CASE g.tgenabled WHEN 'D' THEN ' disabled' WHEN 'R' THEN ' replica' WHEN 'A' THEN ' always' END
)
FROM relation c
JOIN pg_trigger g ON g.tgrelid = c.oid AND NOT g.tgisinternal
UNION ALL
SELECT format('rule %s.%I', c.name, w.rulename), concat(
    pg_get_ruledef(w.oid, true),
    CASE w.ev_enabled WHEN 'D' THEN ' disabled' WHEN 'R' THEN ' replica' WHEN 'A' THEN ' always' END
)
FROM relation c
JOIN pg_rewrite w ON w.ev_class = c.oid AND w.rulename <> '_RETURN'
UNION ALL
SELECT format('policy %s.%I', c.name, p.polname), concat(
    CASE WHEN p.polpermissive THEN 'permissive' ELSE 'restrictive' END,
    CASE p.polcmd
        WHEN 'r' THEN ' select' WHEN 'a' THEN ' insert' WHEN 'w' THEN ' update' WHEN 'd' THEN ' delete'
        ELSE ' all'
    END,
    ' to ' || (
        SELECT string_agg(CASE role WHEN 0 THEN 'public' ELSE role::regrole::text END, ', ' ORDER BY role)
        FROM unnest(p.polroles) role
    ),
    ' using ' || pg_get_expr(p.polqual, p.polrelid, true),
    ' check ' || pg_get_expr(p.polwithcheck, p.polrelid, true)
)
FROM relation c
JOIN pg_policy p ON p.polrelid = c.oid
UNION ALL
-- A query of the parent reads the child's rows too.
SELECT format('child %s.%s', c.name, k.oid::regclass), 'table'
FROM relation c
JOIN pg_inherits i ON i.inhparent = c.oid
JOIN pg_class k ON k.oid = i.inhrelid AND NOT k.relispartition
UNION ALL
SELECT key, format(
    '%s returns %s language %s%s sha256 %s',
    pg_get_function_arguments(oid), coalesce(pg_get_function_result(oid), 'nothing'),
    (SELECT l.lanname FROM pg_language l WHERE l.oid = prolang),
    concat(
        CASE WHEN prosecdef THEN ' security definer' END,
        CASE WHEN proisstrict THEN ' strict' END,
        CASE WHEN proleakproof THEN ' leakproof' END,
        CASE provolatile WHEN 'i' THEN ' immutable' WHEN 's' THEN ' stable' ELSE ' volatile' END,
        CASE proparallel WHEN 's' THEN ' parallel safe' WHEN 'r' THEN ' parallel restricted' END,
        ' set ' || (
            SELECT string_agg(
                regexp_replace(
                    setting,
                    '(^search_path=|, *)' || regexp_replace(quote_ident($1), '(\W)', '\\\1', 'g') || '(?=,|$)',
                    CASE WHEN setting LIKE 'search_path=%' THEN '\1<schema>' ELSE '\&' END, 'g'
                ), ', '
            )
            FROM unnest(proconfig) setting
        )
    ),
    encode(sha256(convert_to(
        replace(coalesce(pg_get_function_sqlbody(oid), prosrc), E'\r', ''), 'UTF8'
    )), 'hex')
)
FROM routine
WHERE $2 IS NULL OR key = ANY ($2)
UNION ALL
SELECT key, CASE typtype
    WHEN 'e' THEN (
        SELECT 'enum ' || string_agg(quote_literal(e.enumlabel), ', ' ORDER BY e.enumsortorder)
        FROM pg_enum e
        WHERE e.enumtypid = t.oid
    )
    WHEN 'd' THEN concat(
        'domain ', format_type(typbasetype, typtypmod),
        CASE WHEN typcollation <> 0 THEN ' collate ' || typcollation::regcollation END,
        CASE WHEN typnotnull THEN ' not null' END,
        ' default ' || typdefault,
        (
            SELECT string_agg(format(' %I %s', o.conname, pg_get_constraintdef(o.oid, true)), '' ORDER BY o.conname)
            FROM pg_constraint o
            WHERE o.contypid = t.oid AND o.contype = 'c'
        )
    )
    WHEN 'c' THEN (
        SELECT format(
            'composite (%s)',
            string_agg(format('%I %s', a.attname, format_type(a.atttypid, a.atttypmod)), ', ' ORDER BY a.attnum)
        )
        FROM pg_attribute a
        WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
    )
    ELSE (
        SELECT 'range of ' || format_type(r.rngsubtype, NULL)
        FROM pg_range r
        WHERE r.rngtypid = t.oid
    )
END
FROM type t
