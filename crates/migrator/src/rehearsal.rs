//! Counts what a revert loses, by the contents of the tables before and after it.

use std::collections::BTreeMap;
use std::fmt;

use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::{Array, BigInt, Nullable, Oid, SmallInt, Text};
use serde::Serialize;

use crate::{Error, Refusal};

const COUNTING: &str = "counting what the revert would lose (nothing was changed)";

/// What a revert would do. The caller of [`Runner::revert`](crate::Runner::revert) confirms it.
#[derive(Debug, Clone, Serialize)]
pub struct Reversal {
    /// Names of the migrations in the order they would be reverted.
    pub names: Vec<String>,
    /// What would be lost; `None` if it is unknown, because a migration does not run in a
    /// transaction and so can't be rehearsed.
    pub losses: Option<Vec<Loss>>,
}

/// Rows or values that a revert loses. Renamed, moved to another schema, or converted to a type
/// that has the same text, they are not lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Loss {
    /// Table with its schema, quoted as in SQL. Of partitions, the one that has the rows.
    pub table: String,
    /// Column, quoted as in SQL; `None` if whole rows are deleted.
    pub column: Option<String>,
    /// What happens to them.
    pub kind: LossKind,
    /// Number of rows; of a column, of values that are not NULL. Overwritten values: at most this
    /// many.
    pub rows: i64,
}

/// How rows or values are lost. In JSON: `deleted` or `overwritten`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LossKind {
    /// The rows are deleted; the column is dropped, or its values become NULL.
    Deleted,
    /// The column has other values afterwards.
    Overwritten,
}

impl fmt::Display for Loss {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, rows, .. } = self;
        let s = if *rows == 1 { "" } else { "s" };
        match (&self.column, self.kind) {
            (None, _) => write!(formatter, "{table}: {rows} row{s}"),
            (Some(column), LossKind::Deleted) => {
                write!(formatter, "{table}.{column}: {rows} value{s}")
            }
            (Some(column), LossKind::Overwritten) => {
                write!(
                    formatter,
                    "{table}.{column}: up to {rows} value{s}, overwritten"
                )
            }
        }
    }
}

/// Returns the losses that exceed what was confirmed, each with the confirmed number.
pub(crate) fn excess(losses: &[Loss], confirmed: &[Loss]) -> Vec<(Loss, i64)> {
    let confirmed = |loss: &Loss| {
        let same = confirmed.iter().find(|one| {
            (&one.table, &one.column, one.kind) == (&loss.table, &loss.column, loss.kind)
        });
        same.map_or(0, |same| same.rows)
    };
    let pairs = losses.iter().map(|loss| (loss.clone(), confirmed(loss)));
    pairs
        .filter(|(loss, confirmed)| loss.rows > *confirmed)
        .collect()
}

/// Tables by their number, so that a rename is no loss.
pub(crate) type Tables = BTreeMap<u32, Table>;

#[derive(QueryableByName)]
pub(crate) struct Table {
    #[diesel(sql_type = Oid)]
    oid: u32,
    #[diesel(sql_type = Text)]
    name: String,
    /// TRUNCATE and a change of type that rewrites the rows give the table another file.
    #[diesel(sql_type = Oid)]
    file: u32,
    /// Modes of the locks that this transaction holds.
    #[diesel(sql_type = Array<Text>)]
    locks: Vec<String>,
    #[diesel(sql_type = Array<SmallInt>)]
    numbers: Vec<i16>,
    #[diesel(sql_type = Array<Text>)]
    columns: Vec<String>,
    /// Numbers of the columns of the primary key.
    #[diesel(sql_type = Array<SmallInt>)]
    key: Vec<i16>,
}

/// Reads all tables but the ledger.
pub(crate) fn tables(connection: &mut PgConnection) -> Result<Tables, Error> {
    let tables: Vec<Table> = sql_query(
        "WITH own AS MATERIALIZED (
             SELECT relation, mode FROM pg_locks
             WHERE locktype = 'relation' AND pid = pg_backend_pid()
         )
         SELECT c.oid, format('%I.%I', n.nspname, c.relname) AS name, c.relfilenode AS file,
                ARRAY(SELECT mode FROM own WHERE relation = c.oid) AS locks,
                array_remove(array_agg(a.attnum ORDER BY a.attnum), NULL) AS numbers,
                array_remove(array_agg(quote_ident(a.attname) ORDER BY a.attnum), NULL) AS columns,
                ARRAY(
                    SELECT unnest(conkey) FROM pg_constraint
                    WHERE conrelid = c.oid AND contype = 'p'
                ) AS key
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
         WHERE c.relkind = 'r' AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
             AND c.relname <> '__diesel_schema_migrations'
         GROUP BY c.oid, n.oid",
    )
    .load(connection)
    .map_err(Error::database(COUNTING))?;
    Ok(tables.into_iter().map(|table| (table.oid, table)).collect())
}

/// A table that a revert may take something from.
pub(crate) struct Touched {
    table: Table,
    /// Whether values may change, not only go.
    is_written: bool,
    is_locked_for_all: bool,
}

impl Touched {
    fn key(&self) -> Option<&[i16]> {
        self.is_written.then_some(&self.table.key)
    }
}

/// Returns the tables of `before` that lose rows or values, or may. Called in the transaction of
/// the revert: whoever writes a row holds that lock until the end.
pub(crate) fn touched(before: Tables, after: &Tables) -> Vec<Touched> {
    let touched = before.into_values().filter_map(|table| {
        let Some(left) = after.get(&table.oid) else {
            // Its rows are all that is to be counted.
            let (numbers, columns) = (Vec::new(), Vec::new());
            return Some(Touched {
                table: Table {
                    numbers,
                    columns,
                    ..table
                },
                is_written: false,
                is_locked_for_all: true,
            });
        };
        let has = |lock: &str| left.locks.iter().any(|mode| mode == lock);
        let is_written = table.file != left.file || has("RowExclusiveLock");
        let is_narrower = table.numbers.iter().any(|one| !left.numbers.contains(one));
        (is_written || is_narrower).then(|| Touched {
            is_written,
            is_locked_for_all: has("AccessExclusiveLock"),
            table,
        })
    });
    touched.collect()
}

/// Contents of a table. The arrays have an item for each column.
#[derive(QueryableByName)]
struct Profile {
    #[diesel(sql_type = BigInt)]
    rows: i64,
    /// Rows that this transaction wrote.
    #[diesel(sql_type = BigInt)]
    own_rows: i64,
    #[diesel(sql_type = Array<BigInt>)]
    values: Vec<i64>,
    #[diesel(sql_type = Array<BigInt>)]
    own_values: Vec<i64>,
    /// They do not depend on the order of the rows.
    #[diesel(sql_type = Array<Nullable<Text>>)]
    digests: Vec<Option<String>>,
}

/// Hashes the values together with this key of their row, so that an exchange between rows shows.
/// Without a key, or with `None`, they are hashed alone, or not at all.
fn profile(
    connection: &mut PgConnection,
    table: &Table,
    key: Option<&[i16]>,
) -> Result<Profile, Error> {
    // The age of a row that a savepoint of this transaction wrote is negative.
    const OWN: &str = "FILTER (WHERE age(t.xmin) <= 0)";
    let each = |item: &dyn Fn(&String) -> String| {
        let items: Vec<String> = table.columns.iter().map(item).collect();
        items.join(", ")
    };
    let values = each(&|column| format!("count(t.{column})"));
    let own_values = each(&|column| format!("count(t.{column}) {OWN}"));
    let digests = each(&|column| match key {
        Some(_) => format!("sum(hashtextextended(t.{column}::text COLLATE \"C\", k.seed))::text"),
        None => "NULL".to_owned(),
    });
    let seed = key.map_or_else(String::new, |key| {
        let columns = table.numbers.iter().zip(&table.columns);
        let key = columns.filter(|(number, _)| key.contains(number));
        let key: Vec<String> = key.map(|(_, column)| format!("t.{column}")).collect();
        let key = key.join(", ");
        // OFFSET 0: once for each row, not for each column.
        format!(
            ", LATERAL (
                 SELECT hashtextextended(ROW({key})::text COLLATE \"C\", 0) OFFSET 0
             ) AS k (seed)"
        )
    });
    sql_query(format!(
        "SELECT count(*) AS rows, count(*) {OWN} AS own_rows,
                ARRAY[{values}]::bigint[] AS values, ARRAY[{own_values}]::bigint[] AS own_values,
                ARRAY[{digests}]::text[] AS digests
         FROM ONLY {} AS t{seed}",
        table.name
    ))
    .get_result(connection)
    .map_err(Error::database(COUNTING))
}

/// The touched tables before the revert.
pub(crate) struct Before<'a> {
    tables: Tables,
    profiles: BTreeMap<u32, (&'a Touched, Profile)>,
}

impl<'a> Before<'a> {
    /// Locks the touched tables, so that no row arrives, and counts.
    pub(crate) fn read(
        connection: &mut PgConnection,
        touched: &'a [Touched],
    ) -> Result<Self, Error> {
        for touched in touched {
            let mode = if touched.is_locked_for_all {
                "ACCESS EXCLUSIVE"
            } else {
                "SHARE ROW EXCLUSIVE"
            };
            let name = &touched.table.name;
            connection
                .batch_execute(&format!("LOCK TABLE ONLY {name} IN {mode} MODE"))
                .map_err(Error::database(COUNTING))?;
        }
        let profiles = touched.iter().map(|touched| {
            let profile = profile(connection, &touched.table, touched.key())?;
            Ok((touched.table.oid, (touched, profile)))
        });
        Ok(Self {
            profiles: profiles.collect::<Result<_, Error>>()?,
            tables: tables(connection)?,
        })
    }

    /// Compares with the tables after the revert, in its transaction.
    pub(crate) fn losses(self, connection: &mut PgConnection) -> Result<Vec<Loss>, Error> {
        let after = tables(connection)?;
        let is_rehearsed = |now: &Touched| {
            let rehearsed = self.profiles.get(&now.table.oid);
            rehearsed.is_some_and(|(rehearsed, _)| rehearsed.is_written || !now.is_written)
        };
        let mut touched = touched(self.tables, &after).into_iter();
        if let Some(other) = touched.find(|now| !is_rehearsed(now)) {
            return Err(Refusal::NotRehearsed(other.table.name).into());
        }
        let mut losses = Vec::new();
        for (oid, (touched, before)) in self.profiles {
            let left = after.get(&oid);
            let profile = left.map(|left| profile(connection, left, touched.key()));
            let profile = profile.transpose()?;
            losses.extend(compare(&touched.table, &before, left.zip(profile.as_ref())));
        }
        losses.sort_by(|one, other| {
            (&one.table, &one.column, one.kind).cmp(&(&other.table, &other.column, other.kind))
        });
        Ok(losses)
    }
}

fn compare(table: &Table, before: &Profile, after: Option<(&Table, &Profile)>) -> Vec<Loss> {
    let loss = |column: Option<&String>, kind, rows| Loss {
        table: table.name.clone(),
        column: column.cloned(),
        kind,
        rows,
    };
    let mut losses = Vec::new();
    let deleted = before.rows - after.map_or(0, |(_, after)| after.rows);
    losses.push(loss(None, LossKind::Deleted, deleted));
    for (index, number) in table.numbers.iter().enumerate() {
        let Some((left, after)) = after else { break };
        let column = Some(&table.columns[index]);
        let Some(place) = left.numbers.iter().position(|one| one == number) else {
            losses.push(loss(column, LossKind::Deleted, before.values[index]));
            continue;
        };
        // Values of the rows that were deleted or updated, and of those that were written.
        let new = after.own_values[place];
        let old = before.values[index] - (after.values[place] - new);
        // If nothing was written, rows were only deleted; with no row gone, rows were only added.
        let is_kept = after.rows - after.own_rows == before.rows;
        let is_same = before.digests[index] == after.digests[place];
        if after.own_rows > 0 && !is_kept && !is_same {
            losses.push(loss(column, LossKind::Deleted, old - new - deleted.max(0)));
            losses.push(loss(column, LossKind::Overwritten, old.min(new)));
        }
    }
    losses.retain(|loss| loss.rows > 0);
    losses
}
