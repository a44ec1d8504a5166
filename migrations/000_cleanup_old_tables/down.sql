-- Moves the archived objects back to the schema they came from. Does nothing if there is no
-- archive, or if up.sql did not create it from the current schema.

SET LOCAL lock_timeout = '5s';

DO $$
DECLARE
    archive CONSTANT oid := (
        SELECT oid
        FROM pg_namespace
        WHERE nspname = 'bruhmcp_archive'
          AND starts_with(
              obj_description(oid, 'pg_namespace'),
              format('Moved from schema %I by migration 000_cleanup_old_tables', current_schema())
          )
    );
    object record;
BEGIN
    -- Repeated for psql without --single-transaction, where the statement above has no effect.
    SET LOCAL lock_timeout = '5s';

    IF archive IS NULL THEN
        RETURN;
    END IF;

    -- The progress of an import. The rows that it wrote are gone with 001–007.
    DROP TABLE IF EXISTS
        bruhmcp_archive.import_run, bruhmcp_archive.import_progress, bruhmcp_archive.import_rejected;

    FOR object IN
        WITH candidate (turn, kind, classid, objid) AS (
            SELECT 1, 'ROUTINE', 'pg_proc'::regclass, oid
            FROM pg_proc
            WHERE pronamespace = archive
            UNION ALL
            SELECT 2, 'TYPE', 'pg_type'::regclass, oid
            FROM pg_type
            WHERE typnamespace = archive
            UNION ALL
            SELECT 3,
                   CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END,
                   'pg_class'::regclass,
                   oid
            FROM pg_class
            WHERE relnamespace = archive AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
        )
        SELECT kind, classid, objid
        FROM candidate
        -- Row types, array types and owned sequences move with their owner.
        WHERE NOT EXISTS (
            SELECT
            FROM pg_depend
            WHERE (pg_depend.classid, pg_depend.objid, objsubid)
                  = (candidate.classid, candidate.objid, 0)
              AND (deptype IN ('e', 'i') OR (deptype = 'a' AND kind = 'SEQUENCE'))
        )
        ORDER BY turn, objid DESC
    LOOP
        EXECUTE format(
            'ALTER %s %s SET SCHEMA %I',
            object.kind,
            (pg_identify_object(object.classid, object.objid, 0)).identity,
            current_schema()
        );
    END LOOP;

    DROP SCHEMA bruhmcp_archive;
END
$$;
