//! Rehearses a revert in a transaction that is rolled back, to count the rows it would delete.

use std::collections::BTreeMap;
use std::fmt;

use diesel::connection::{AnsiTransactionManager, TransactionManager};
use diesel::dsl::{select, sql};
use diesel::migration::{Migration, Result};
use diesel::pg::{Pg, PgConnection};
use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::{BigInt, Nullable, Oid, SmallInt, Text};
use serde::Serialize;

/// What a revert would do. The caller of [`Runner::revert`](crate::Runner::revert) confirms it.
#[derive(Debug, Clone, Serialize)]
pub struct Reversal {
    /// Names of the migrations in the order they would be reverted.
    pub names: Vec<String>,
    /// Rows that would be deleted; `None` if a migration can't be rehearsed because it does not
    /// run in a transaction.
    pub losses: Option<Vec<Loss>>,
}

/// Rows or values that a revert deletes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, QueryableByName)]
pub struct Loss {
    /// Table with its schema, quoted as in SQL.
    #[diesel(sql_type = Text)]
    pub table: String,
    /// Dropped column; `None` if whole rows are deleted.
    #[diesel(sql_type = Nullable<Text>)]
    pub column: Option<String>,
    /// Number of rows; of a column, those that are not NULL.
    #[diesel(sql_type = BigInt)]
    pub rows: i64,
}

impl fmt::Display for Loss {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, rows, .. } = self;
        let s = if *rows == 1 { "" } else { "s" };
        match &self.column {
            None => write!(formatter, "{table}: {rows} row{s}"),
            Some(column) => write!(formatter, "{table}.{column}: {rows} value{s}"),
        }
    }
}

/// Columns by the numbers of table and column, so that a rename is no loss; column 0 is the table
/// itself. The values are the quoted names of the table and the column.
type Columns = BTreeMap<(u32, i16), (String, Option<String>)>;

/// Returns `None` if a migration does not run in a transaction. `migrations` are in the order they
/// would be reverted.
pub(crate) fn losses(
    connection: &mut PgConnection,
    migrations: &[&dyn Migration<Pg>],
) -> Result<Option<Vec<Loss>>> {
    let mut metadata = migrations.iter().map(|migration| migration.metadata());
    if metadata.any(|metadata| !metadata.run_in_transaction()) {
        return Ok(None);
    }
    AnsiTransactionManager::begin_transaction(connection)?;
    let rehearsed = revert(connection, migrations);
    let rolled_back = AnsiTransactionManager::rollback_transaction(connection);
    let (gone, mut losses) = rehearsed?;
    rolled_back?;

    for (&(oid, number), (table, column)) in &gone {
        // Its table is gone as a whole.
        if number != 0 && gone.contains_key(&(oid, 0)) {
            continue;
        }
        let counted = column.as_deref().unwrap_or("*");
        let count = format!("(SELECT count({counted}) FROM ONLY {table})");
        let rows = select(sql::<BigInt>(&count)).get_result(connection)?;
        if rows > 0 {
            losses.push(Loss {
                table: table.clone(),
                column: column.clone(),
                rows,
            });
        }
    }
    losses.sort_by(|one, other| (&one.table, &one.column).cmp(&(&other.table, &other.column)));
    Ok(Some(losses))
}

/// Reverts, and returns the dropped tables and columns, and the rows that were deleted.
fn revert(
    connection: &mut PgConnection,
    migrations: &[&dyn Migration<Pg>],
) -> Result<(Columns, Vec<Loss>)> {
    let mut gone = columns(connection)?;
    for migration in migrations {
        migration.revert(connection)?;
    }
    let left = columns(connection)?;
    gone.retain(|key, _| !left.contains_key(key));
    let deleted = sql_query(
        "SELECT format('%I.%I', schemaname, relname) AS table, NULL::text AS column, n_tup_del AS rows
         FROM pg_stat_xact_user_tables
         WHERE n_tup_del > 0 AND relname <> '__diesel_schema_migrations'",
    )
    .load(connection)?;
    Ok((gone, deleted))
}

fn columns(connection: &mut PgConnection) -> QueryResult<Columns> {
    let columns = sql::<(Oid, SmallInt, Text, Nullable<Text>)>(
        "WITH relation AS (
             SELECT c.oid, format('%I.%I', n.nspname, c.relname) AS name
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind = 'r' AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
         )
         SELECT oid, 0::smallint, name, NULL::text FROM relation
         UNION ALL
         SELECT r.oid, a.attnum, r.name, quote_ident(a.attname)
         FROM relation r JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped",
    )
    .load(connection)?;
    Ok(columns
        .into_iter()
        .map(|(oid, number, table, column)| ((oid, number), (table, column)))
        .collect())
}
