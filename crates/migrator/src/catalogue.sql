-- One line for each thing in the schema public that a program can rely on. Owners, privileges and comments are left out,
-- and so are the ledger of migrations and whatever an extension brought. Names are qualified or not by search_path alone,
-- which the caller sets.
WITH relation AS (
    SELECT c.*
    FROM pg_class c
    WHERE c.relnamespace = to_regnamespace(quote_ident($1))
        AND c.relname <> '__diesel_schema_migrations'
        AND NOT EXISTS (
            SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
        )
)
SELECT format(
    'relation %s kind %s%s%s', relname, relkind, ' with (' || array_to_string(reloptions, ', ') || ')',
    CASE WHEN relrowsecurity THEN ' row level security' END
) AS line
FROM relation
WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
UNION ALL
SELECT format(
    'column %s.%s %s%s%s%s%s', c.relname, a.attname, format_type(a.atttypid, a.atttypmod),
    CASE WHEN a.attcollation <> t.typcollation THEN ' collate ' || a.attcollation::regcollation END,
    CASE WHEN a.attnotnull THEN ' not null' END,
    CASE a.attidentity WHEN 'a' THEN ' identity always' WHEN 'd' THEN ' identity' END,
    CASE WHEN a.attgenerated = '' THEN ' default ' ELSE ' generated ' END || pg_get_expr(d.adbin, d.adrelid)
)
FROM relation c
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
JOIN pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f')
UNION ALL
-- PostgreSQL 16 and later qualify fewer names.
SELECT format(
    'view %s sha256 %s', relname,
    encode(sha256(convert_to(regexp_replace(pg_get_viewdef(oid), '\m[a-z_]+\.|\s+', '', 'g'), 'UTF8')), 'hex')
)
FROM relation
WHERE relkind IN ('v', 'm')
UNION ALL
-- Not those of NOT NULL, which PostgreSQL 18 has here, or of a constraint trigger.
SELECT format('constraint %s.%s %s', c.relname, o.conname, pg_get_constraintdef(o.oid))
FROM relation c
JOIN pg_constraint o ON o.conrelid = c.oid AND o.contype IN ('c', 'f', 'p', 'u', 'x')
UNION ALL
SELECT format('index %s%s', pg_get_indexdef(i.indexrelid), CASE WHEN NOT i.indisvalid THEN ' INVALID' END)
FROM relation c
JOIN pg_index i ON i.indrelid = c.oid
UNION ALL
SELECT format('trigger %s.%s %s', c.relname, g.tgname, pg_get_triggerdef(g.oid))
FROM relation c
JOIN pg_trigger g ON g.tgrelid = c.oid AND NOT g.tgisinternal
UNION ALL
-- The triggers of a foreign key are internal, and named by number.
SELECT DISTINCT format(
    'trigger state %s.%s %s', c.relname, coalesce(o.conname, g.tgname),
    CASE g.tgenabled WHEN 'D' THEN 'disabled' WHEN 'R' THEN 'replica only' ELSE 'always' END
)
FROM relation c
JOIN pg_trigger g ON g.tgrelid = c.oid AND g.tgenabled <> 'O'
LEFT JOIN pg_constraint o ON o.oid = g.tgconstraint
UNION ALL
SELECT format(
    'function %s(%s) returns %s language %s%s%s volatility %s%s sha256 %s', p.proname, pg_get_function_arguments(p.oid),
    coalesce(pg_get_function_result(p.oid), 'nothing'), l.lanname,
    CASE WHEN p.prosecdef THEN ' security definer' END, CASE WHEN p.proisstrict THEN ' strict' END, p.provolatile,
    ' set ' || array_to_string(p.proconfig, ', '),
    encode(sha256(convert_to(replace(coalesce(pg_get_function_sqlbody(p.oid), p.prosrc), E'\r', ''), 'UTF8')), 'hex')
)
FROM pg_proc p
JOIN pg_language l ON l.oid = p.prolang
WHERE p.pronamespace = to_regnamespace(quote_ident($1))
    AND NOT EXISTS (
        SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
    )
UNION ALL
SELECT format('enum %s %s', t.typname, string_agg(quote_literal(e.enumlabel), ', ' ORDER BY e.enumsortorder))
FROM pg_type t
JOIN pg_enum e ON e.enumtypid = t.oid
WHERE t.typnamespace = to_regnamespace(quote_ident($1))
GROUP BY t.typname
