//! Which rows a revert would lose: found by doing it, in a transaction that is rolled back.

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

/// Rows that would be lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, QueryableByName)]
pub struct Loss {
    /// The table, with its schema.
    #[diesel(sql_type = Text)]
    pub table: String,
    /// The column that would be dropped; `None` if the rows themselves would go.
    #[diesel(sql_type = Nullable<Text>)]
    pub column: Option<String>,
    /// How many rows, or how many that aren't NULL in the column.
    #[diesel(sql_type = BigInt)]
    pub rows: i64,
}

impl fmt::Display for Loss {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, rows, .. } = self;
        match &self.column {
            None => write!(formatter, "{table}: {rows} row(s)"),
            Some(column) => write!(formatter, "{table}, column {column}: {rows} values"),
        }
    }
}

/// Tables that hold rows, and their columns, known by number so that a change of name or schema is no loss. The number 0
/// stands for the table itself. Names are quoted, a table's with its schema.
type Columns = BTreeMap<(u32, i16), (String, Option<String>)>;

/// `None` if one of the migrations, given in the order they would be reverted, can't be tried in a transaction.
pub(super) fn find(
    connection: &mut PgConnection,
    migrations: &[&dyn Migration<Pg>],
) -> Result<Option<Vec<Loss>>> {
    if migrations
        .iter()
        .any(|migration| !migration.metadata().run_in_transaction())
    {
        return Ok(None);
    }
    AnsiTransactionManager::begin_transaction(connection)?;
    let tried = revert(connection, migrations);
    let rolled_back = AnsiTransactionManager::rollback_transaction(connection);
    let (gone, mut losses) = tried?;
    rolled_back?;

    for (&(oid, number), (table, column)) in &gone {
        // A table's columns go with it.
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

/// What is gone after the migrations are reverted, and the rows that they deleted.
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
