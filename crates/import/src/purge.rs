//! The end of the archive.

use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::Text;

use crate::NewSystem;
use crate::check::{self, Check};
use crate::error::ImportError;

pub(crate) fn purge_archive(
    conn: &mut PgConnection,
    system: &dyn NewSystem,
    confirm: &mut dyn FnMut(&[String]) -> bool,
) -> Result<Check, ImportError> {
    let check = check::check(conn, system)?;
    if !check.holds() {
        return Ok(check);
    }
    conn.transaction(|conn| {
        let dependents =
            dependents(conn).map_err(ImportError::database("looking for dependents"))?;
        if !confirm(&dependents) {
            return Err(ImportError::NotConfirmed);
        }
        let dropped = conn
            .batch_execute("SET LOCAL lock_timeout = '5s'; DROP SCHEMA bruhmcp_archive CASCADE");
        dropped.map_err(ImportError::database("dropping the archive"))
    })?;
    Ok(check)
}

#[derive(QueryableByName)]
struct Dependent {
    #[diesel(sql_type = Text)]
    object: String,
}

/// Returns what outside the archive goes with it.
fn dependents(conn: &mut PgConnection) -> QueryResult<Vec<String>> {
    // A view depends by its rule, a column default by its own entry: what these belong to is named.
    let rows: Vec<Dependent> = sql_query(
        "WITH archived AS (
             SELECT 'pg_class'::regclass::oid AS classid, oid AS objid FROM pg_class
              WHERE relnamespace = 'bruhmcp_archive'::regnamespace
             UNION ALL
             SELECT 'pg_type'::regclass, oid FROM pg_type
              WHERE typnamespace = 'bruhmcp_archive'::regnamespace
             UNION ALL
             SELECT 'pg_proc'::regclass, oid FROM pg_proc
              WHERE pronamespace = 'bruhmcp_archive'::regnamespace
         ),
         dependent AS (
             SELECT DISTINCT d.classid, d.objid, d.objsubid
               FROM archived
               JOIN pg_depend AS d ON (d.refclassid, d.refobjid) = (archived.classid, archived.objid)
              WHERE d.deptype IN ('n', 'a')
         )
         SELECT DISTINCT pg_describe_object(classid, objid, objsubid) AS object
           FROM dependent
           LEFT JOIN pg_constraint ON classid = 'pg_constraint'::regclass
                                  AND pg_constraint.oid = objid
           LEFT JOIN pg_rewrite ON classid = 'pg_rewrite'::regclass AND pg_rewrite.oid = objid
           LEFT JOIN pg_attrdef ON classid = 'pg_attrdef'::regclass AND pg_attrdef.oid = objid
           LEFT JOIN pg_trigger ON classid = 'pg_trigger'::regclass AND pg_trigger.oid = objid
           LEFT JOIN pg_class ON pg_class.oid = coalesce(
               conrelid, ev_class, adrelid, tgrelid,
               CASE classid WHEN 'pg_class'::regclass THEN objid END)
           LEFT JOIN pg_proc ON classid = 'pg_proc'::regclass AND pg_proc.oid = objid
           LEFT JOIN pg_type ON classid = 'pg_type'::regclass AND pg_type.oid = objid
          WHERE coalesce(relnamespace, pronamespace, typnamespace)
                IS DISTINCT FROM 'bruhmcp_archive'::regnamespace
          ORDER BY 1",
    )
    .load(conn)?;
    Ok(rows.into_iter().map(|row| row.object).collect())
}
