//! What an import found and did.

use std::collections::BTreeMap;
use std::io::{self, Write};

use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::{Array, BigInt, Text};
use serde::Serialize;

use crate::Options;
use crate::error::ImportError;
use crate::tables::Table;

/// What becomes of the archive's rows. No value of a row is in it, only keys.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The decisions, those by default too.
    pub options: Options,
    /// The tables, in the order in which they are written.
    pub tables: Vec<TableReport>,
    /// Columns that no version of the old system has. Their values stay behind.
    pub unknown_columns: Vec<UnknownColumn>,
    /// Tables that have no successor. Their rows stay behind.
    pub unknown_tables: Vec<UnknownTable>,
}

impl Report {
    /// Returns whether every row of the tables that users need again is carried over. Codes, links
    /// and refresh tokens never are.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        let users_need = self
            .tables
            .iter()
            .filter(|table| table.table != "auth_tokens");
        users_need.map(|table| table.left_behind).sum::<i64>() == 0
            && self.unknown_columns.iter().all(|column| column.values == 0)
            && self.unknown_tables.iter().all(|table| table.rows == 0)
    }
}

/// What becomes of the rows of one table. `rows` is the sum of the next three.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct TableReport {
    /// Name of the old and the new table.
    pub table: String,
    /// Rows in the archive.
    pub rows: i64,
    /// Rows without a change.
    pub as_they_are: i64,
    /// Rows with at least one reason.
    pub converted: i64,
    /// Rows that stay in the archive.
    pub left_behind: i64,
    /// Rows that the new table has beyond those: the rest of a credit, the plan of a user without
    /// one.
    pub added: i64,
    /// Why rows are converted or left behind, by code. docs/moving.md explains the codes. A row can
    /// have several.
    pub reasons: BTreeMap<String, Reason>,
}

/// How many rows a reason concerns, and a few of their keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// Number of rows.
    pub rows: i64,
    /// Whether the rows stay behind.
    pub left_behind: bool,
    /// At most three keys.
    pub keys: Vec<String>,
}

/// A column that is not carried over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct UnknownColumn {
    pub table: String,
    pub column: String,
    /// Number of values that are not NULL.
    pub values: i64,
}

/// A table that is not carried over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct UnknownTable {
    pub table: String,
    pub rows: i64,
}

/// A row that stays in the archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, QueryableByName)]
pub struct Rejected {
    /// Table in the archive.
    #[diesel(sql_type = Text)]
    pub table: String,
    /// Its primary key.
    #[diesel(sql_type = Text)]
    pub key: String,
    /// Code of the reason, or `refused:` and the name of the constraint that refused the row.
    #[diesel(sql_type = Text)]
    pub reason: String,
    /// Column concerned; empty where it is more than one.
    #[diesel(sql_type = Text)]
    pub column: String,
}

/// Writes rejected rows as CSV with a header.
///
/// # Errors
/// Those of the writer.
pub fn write_csv(rows: &[Rejected], writer: impl Write) -> io::Result<()> {
    let mut writer = csv::Writer::from_writer(writer);
    if rows.is_empty() {
        writer.write_record(["table", "key", "reason", "column"])?;
    }
    for row in rows {
        writer.serialize(row)?;
    }
    writer.flush()
}

/// Writes rejected rows as JSON, one object a line.
///
/// # Errors
/// Those of the writer.
pub fn write_json_lines(rows: &[Rejected], mut writer: impl Write) -> io::Result<()> {
    for row in rows {
        serde_json::to_writer(&mut writer, row)?;
        writeln!(writer)?;
    }
    writer.flush()
}

#[derive(QueryableByName)]
struct Counts {
    #[diesel(sql_type = BigInt)]
    rows: i64,
    #[diesel(sql_type = BigInt)]
    as_they_are: i64,
    #[diesel(sql_type = BigInt)]
    left_behind: i64,
    #[diesel(sql_type = BigInt)]
    added: i64,
}

#[derive(QueryableByName)]
struct ReasonRow {
    #[diesel(sql_type = Text)]
    reason: String,
    #[diesel(sql_type = diesel::sql_types::Bool)]
    left_behind: bool,
    #[diesel(sql_type = BigInt)]
    rows: i64,
    #[diesel(sql_type = Array<Text>)]
    keys: Vec<String>,
}

/// Counts the staged rows of a table.
pub(crate) fn of_table(conn: &mut PgConnection, table: &Table) -> Result<TableReport, ImportError> {
    let failed = ImportError::database("counting the rows to convert");
    let name = table.name;
    let read = |conn: &mut PgConnection| {
        let counts = sql_query(format!(
            "SELECT count(*) FILTER (WHERE NOT extra) AS rows,
                    count(*) FILTER (WHERE NOT extra AND rejected IS NULL AND reasons = '{{}}')
                        AS as_they_are,
                    count(*) FILTER (WHERE NOT extra AND rejected IS NOT NULL) AS left_behind,
                    count(*) FILTER (WHERE extra AND rejected IS NULL) AS added
               FROM new_{name}"
        ))
        .get_result::<Counts>(conn)?;
        let reasons = sql_query(format!(
            "SELECT reason, left_behind, count(*) AS rows,
                    array_agg(key) FILTER (WHERE place <= 3) AS keys
               FROM (
                   SELECT key, reason, rejected IS NOT NULL AS left_behind,
                          row_number() OVER (PARTITION BY reason, rejected IS NOT NULL ORDER BY n) AS place
                     FROM new_{name},
                          unnest(CASE WHEN rejected IS NULL THEN reasons ELSE ARRAY[rejected] END)
                              AS reason
                    WHERE NOT extra OR rejected IS NULL
               ) AS reasons
              GROUP BY reason, left_behind"
        ))
        .load::<ReasonRow>(conn)?;
        Ok((counts, reasons))
    };
    let (counts, reasons) = read(conn).map_err(failed)?;
    Ok(TableReport {
        table: name.to_owned(),
        rows: counts.rows,
        as_they_are: counts.as_they_are,
        converted: counts.rows - counts.as_they_are - counts.left_behind,
        left_behind: counts.left_behind,
        added: counts.added,
        reasons: reasons
            .into_iter()
            .map(|row| {
                let reason = Reason {
                    rows: row.rows,
                    left_behind: row.left_behind,
                    keys: row.keys,
                };
                (row.reason, reason)
            })
            .collect(),
    })
}
