//! The end of the archive.

use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::Text;

use crate::NewSystem;
use crate::check::{self, Check};
use crate::error::ImportError;

/// Nothing of the archive changes, and nothing more depends on it, after the check.
const LOCK: &str = "
    SET LOCAL lock_timeout = '5s';
    DO $$
    DECLARE
        archived regclass;
    BEGIN
        FOR archived IN
            SELECT oid FROM pg_class
             WHERE relnamespace = to_regnamespace('bruhmcp_archive') AND relkind IN ('r', 'p')
        LOOP
            EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', archived);
        END LOOP;
    END
    $$";

/// Drops the archive, if [`check`](crate::check()) holds and `confirm` returns `true`. `confirm` gets
/// what outside the archive depends on it and is dropped too: views, foreign keys. Returns the check.
///
/// One transaction, which locks the archive's tables from before the check until after `confirm`.
///
/// # Errors
/// [`ImportError::NotConfirmed`], and those of [`check`](crate::check()). A check that doesn't hold is
/// no error: nothing was dropped, and its differences say why.
pub fn purge_archive(
    conn: &mut PgConnection,
    system: &dyn NewSystem,
    confirm: &mut dyn FnMut(&[String]) -> bool,
) -> Result<Check, ImportError> {
    conn.transaction(|conn| {
        let locked = conn.batch_execute(LOCK);
        locked.map_err(ImportError::database("locking the archive"))?;
        let check = check::check(conn, system)?;
        if !check.holds() {
            return Ok(check);
        }
        let gone = drop_archive(conn).map_err(ImportError::database("dropping the archive"))?;
        if !confirm(&gone) {
            return Err(ImportError::NotConfirmed);
        }
        Ok(check)
    })
}

#[derive(QueryableByName)]
struct Gone {
    #[diesel(sql_type = Text)]
    object: String,
}

/// Drops the archive, and returns what outside it is gone with it: also a view on a view on it.
fn drop_archive(conn: &mut PgConnection) -> QueryResult<Vec<String>> {
    // Every object outside has entries in pg_depend, of its schema at least. What is internal to
    // another, such as the rule of a view, is left out.
    conn.batch_execute(
        "CREATE TEMP TABLE outside ON COMMIT DROP AS
         SELECT DISTINCT classid, objid, objsubid,
                pg_describe_object(classid, objid, objsubid) AS object
           FROM pg_depend,
                pg_identify_object_as_address(classid, objid, objsubid) AS address
          WHERE (address.object_names[1] IN ('bruhmcp_archive', 'pg_toast')) IS NOT TRUE
            AND (starts_with(address.object_names[1], 'bruhmcp_archive.')) IS NOT TRUE
             OR classid = 'pg_publication_rel'::regclass;
         DELETE FROM outside
          USING pg_depend AS d
          WHERE (d.classid, d.objid, d.deptype) = (outside.classid, outside.objid, 'i');
         DROP SCHEMA bruhmcp_archive CASCADE",
    )?;
    let gone: Vec<Gone> = sql_query(
        "SELECT object FROM outside
          WHERE NOT EXISTS (
              SELECT FROM pg_depend AS d
               WHERE (d.classid, d.objid, d.objsubid)
                     = (outside.classid, outside.objid, outside.objsubid))
          ORDER BY object",
    )
    .load(conn)?;
    Ok(gone.into_iter().map(|gone| gone.object).collect())
}
