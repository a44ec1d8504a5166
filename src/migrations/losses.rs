//! Which rows a revert would lose: found by doing it, in a transaction that is rolled back.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::error::Error;
use std::fmt;

use diesel::migration::Migration;
use diesel::pg::{Pg, PgConnection};
use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::{BigInt, Nullable, Oid, SmallInt, Text};
use serde::Serialize;

/// Rows that would be lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Loss {
    /// The table, with its schema.
    pub table: String,
    /// The column that would be dropped; `None` if the rows themselves would go.
    pub column: Option<String>,
    /// How many rows, or how many that aren't NULL in the column.
    pub rows: i64,
}

impl fmt::Display for Loss {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            table,
            column,
            rows,
        } = self;
        match column {
            None => write!(formatter, "{table}: {rows} rows"),
            Some(column) => write!(formatter, "{table}, column {column}: {rows} values"),
        }
    }
}

/// What a transaction that only tries something ends with.
enum End<T> {
    Tried(T),
    Failed(Box<dyn Error + Send + Sync>),
}

impl<T> From<diesel::result::Error> for End<T> {
    fn from(error: diesel::result::Error) -> Self {
        Self::Failed(error.into())
    }
}

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Runs `work` in a transaction or a savepoint and rolls it back, its locks included.
fn tried<T>(
    connection: &mut PgConnection,
    work: impl FnOnce(&mut PgConnection) -> Outcome<T>,
) -> Outcome<T> {
    let outcome: Result<Infallible, End<T>> =
        connection.transaction(|connection| match work(connection) {
            Ok(value) => Err(End::Tried(value)),
            Err(error) => Err(End::Failed(error)),
        });
    match outcome {
        Err(End::Tried(value)) => Ok(value),
        Err(End::Failed(error)) => Err(error),
    }
}

#[derive(QueryableByName)]
struct Column {
    #[diesel(sql_type = Oid)]
    oid: u32,
    /// 0 stands for the table itself.
    #[diesel(sql_type = SmallInt)]
    number: i16,
    #[diesel(sql_type = Text)]
    table: String,
    #[diesel(sql_type = Nullable<Text>)]
    column: Option<String>,
}

#[derive(QueryableByName)]
struct Count {
    #[diesel(sql_type = BigInt)]
    rows: i64,
}

#[derive(QueryableByName)]
struct Deleted {
    #[diesel(sql_type = Text)]
    table: String,
    #[diesel(sql_type = BigInt)]
    rows: i64,
}

/// `None` if one of the migrations, given in the order they would be reverted, can't be tried in a transaction.
pub(super) fn find(
    connection: &mut PgConnection,
    migrations: &[&dyn Migration<Pg>],
) -> Outcome<Option<Vec<Loss>>> {
    if migrations
        .iter()
        .any(|migration| !migration.metadata().run_in_transaction())
    {
        return Ok(None);
    }
    tried(connection, |connection| {
        let mut gone = columns(connection)?;
        let deleted: Vec<Deleted> = tried(connection, |connection| {
            for migration in migrations {
                migration.revert(connection)?;
            }
            for left in columns(connection)?.keys() {
                gone.remove(left);
            }
            Ok(sql_query(
                "SELECT format('%I.%I', schemaname, relname) AS table, n_tup_del AS rows
                 FROM pg_stat_xact_user_tables
                 WHERE n_tup_del > 0 AND relname <> '__diesel_schema_migrations'",
            )
            .load(connection)?)
        })?;

        let mut losses: Vec<Loss> = deleted
            .into_iter()
            .map(|Deleted { table, rows }| Loss {
                table,
                column: None,
                rows,
            })
            .collect();
        for (&(oid, number), gone_column) in &gone {
            // A table's columns go with it.
            if number != 0 && gone.contains_key(&(oid, 0)) {
                continue;
            }
            let Column { table, column, .. } = gone_column;
            // Names come quoted from the catalogue.
            let counted = column.as_deref().unwrap_or("*");
            let count: Count =
                sql_query(format!("SELECT count({counted}) AS rows FROM ONLY {table}"))
                    .get_result(connection)?;
            if count.rows > 0 {
                losses.push(Loss {
                    table: table.clone(),
                    column: column.clone(),
                    rows: count.rows,
                });
            }
        }
        losses.sort_by(|one, other| (&one.table, &one.column).cmp(&(&other.table, &other.column)));
        Ok(Some(losses))
    })
}

/// Tables that hold rows, and their columns, known by number so that a change of name or schema is no loss.
fn columns(connection: &mut PgConnection) -> QueryResult<BTreeMap<(u32, i16), Column>> {
    let columns: Vec<Column> = sql_query(
        "WITH relation AS (
             SELECT c.oid, format('%I.%I', n.nspname, c.relname) AS name
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind = 'r' AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
         )
         SELECT oid, 0::smallint AS number, name AS table, NULL::text AS column FROM relation
         UNION ALL
         SELECT r.oid, a.attnum, r.name, quote_ident(a.attname)
         FROM relation r JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped",
    )
    .load(connection)?;
    Ok(columns
        .into_iter()
        .map(|column| ((column.oid, column.number), column))
        .collect())
}
