//! The old tables as views of one form, whichever shape they have.

use std::collections::{BTreeMap, BTreeSet};

use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::{BigInt, Text};

use crate::error::ImportError;
use crate::quoted;
use crate::report::{UnknownColumn, UnknownTable};
use crate::tables::{Kind, TABLES, Table};

/// Schema that migration 000 moves the old tables to.
pub(crate) const ARCHIVE: &str = "bruhmcp_archive";

/// What the archive has beyond the tables and columns that are converted.
#[derive(Debug, Default)]
pub(crate) struct Unknown {
    pub(crate) columns: Vec<UnknownColumn>,
    pub(crate) tables: Vec<UnknownTable>,
}

#[derive(QueryableByName)]
struct Column {
    #[diesel(sql_type = Text)]
    table: String,
    #[diesel(sql_type = Text)]
    name: String,
    #[diesel(sql_type = Text)]
    type_: String,
    #[diesel(sql_type = Text)]
    category: String,
}

#[derive(QueryableByName)]
struct Count {
    #[diesel(sql_type = BigInt)]
    count: i64,
}

type Columns = BTreeMap<String, BTreeMap<String, Column>>;

/// The archive's tables and their columns, as the catalogue has them.
pub(crate) struct Archive(Columns);

impl Archive {
    /// Reads the catalogue. Refuses an archive that isn't one of the old system's shapes.
    pub(crate) fn read(conn: &mut PgConnection) -> Result<Self, ImportError> {
        let found = sql_query(
            "SELECT c.relname::text AS table, a.attname::text AS name, t.typname::text AS type_,
                    t.typcategory::text AS category
               FROM pg_class c
               JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
               JOIN pg_type t ON t.oid = a.atttypid
              WHERE c.relnamespace = to_regnamespace($1) AND c.relkind IN ('r', 'p')
                AND NOT c.relispartition AND c.relname NOT LIKE 'import\\_%'",
        )
        .bind::<Text, _>(ARCHIVE)
        .load::<Column>(conn)
        .map_err(ImportError::database("reading the archive"))?;
        let mut columns = Columns::new();
        for column in found {
            let table = columns.entry(column.table.clone()).or_default();
            table.insert(column.name.clone(), column);
        }
        if columns.is_empty() {
            return Err(ImportError::NoArchive);
        }
        let archive = Self(columns);
        if !archive.has("users") {
            return Err(ImportError::UnknownShape(
                "it has no table users".to_owned(),
            ));
        }
        for table in &TABLES {
            archive.check(table)?;
        }
        Ok(archive)
    }

    pub(crate) fn has(&self, table: &str) -> bool {
        self.0.contains_key(table)
    }

    fn check(&self, table: &Table) -> Result<(), ImportError> {
        let Some(columns) = self.0.get(table.name) else {
            return Ok(());
        };
        for (name, _) in table.always {
            if !columns.contains_key(*name) {
                let text = format!("{} has no column {name}", table.name);
                return Err(ImportError::UnknownShape(text));
            }
        }
        for (name, kind) in table.columns() {
            let Some(column) = columns.get(*name) else {
                continue;
            };
            if !kind.admits(column) {
                let text = format!("{}.{name} is of type {}", table.name, column.type_);
                return Err(ImportError::UnknownShape(text));
            }
        }
        Ok(())
    }

    /// Returns the SQL of the view of one table, with its times in `zone`.
    pub(crate) fn view(&self, table: &Table, zone: &str) -> String {
        let columns = self.0.get(table.name);
        let mut selected = Vec::new();
        let mut odd = Vec::new();
        for (name, kind) in table.columns() {
            let column = columns.and_then(|columns| columns.get(*name));
            let name = quoted(name);
            let value = match column {
                None => format!("NULL::{}", kind.sql()),
                Some(column) if *kind == Kind::Time => {
                    let (value, is_odd) = time(&name, &column.type_, zone);
                    odd.push(is_odd);
                    value
                }
                Some(_) => format!("{name}::{}", kind.sql()),
            };
            selected.push(format!("{value} AS {name}"));
        }
        let odd = if odd.is_empty() {
            "false".to_owned()
        } else {
            odd.join(" OR ")
        };
        selected.push(format!("({odd}) AS odd_time"));
        let from = match columns {
            None => "WHERE false".to_owned(),
            Some(_) => format!("FROM {ARCHIVE}.{}", quoted(table.name)),
        };
        format!(
            "CREATE TEMP VIEW old_{} AS SELECT {} {from}",
            table.name,
            selected.join(", ")
        )
    }

    /// Counts what is neither converted nor left behind for a known reason.
    pub(crate) fn unknown(&self, conn: &mut PgConnection) -> Result<Unknown, ImportError> {
        let mut count = |expression: &str, table: &str| {
            let query = format!(
                "SELECT count({expression}) AS count FROM {ARCHIVE}.{}",
                quoted(table)
            );
            let row = sql_query(query).get_result::<Count>(conn);
            row.map(|row| row.count)
                .map_err(ImportError::database("counting what the archive has"))
        };
        let mut unknown = Unknown::default();
        for (table, columns) in &self.0 {
            let Some(known) = TABLES.iter().find(|known| known.name == table) else {
                let rows = count("*", table)?;
                unknown.tables.push(UnknownTable {
                    table: table.clone(),
                    rows,
                });
                continue;
            };
            let names: BTreeSet<&str> = known.columns().map(|(name, _)| *name).collect();
            for column in columns.keys() {
                if !names.contains(column.as_str()) {
                    unknown.columns.push(UnknownColumn {
                        table: table.clone(),
                        column: column.clone(),
                        values: count(&quoted(column), table)?,
                    });
                }
            }
        }
        Ok(unknown)
    }
}

/// Returns a time as the new tables hold it, or NULL, and whether it is beyond what they hold.
fn time(name: &str, type_: &str, zone: &str) -> (String, String) {
    // Compared without a zone, a day before the last one that every zone has.
    let holds = format!("{name} > '0001-01-02' AND {name} < '9999-12-31'");
    let value = match type_ {
        "timestamptz" => name.to_owned(),
        _ => format!("{name} AT TIME ZONE {}", literal(zone)),
    };
    (
        format!("CASE WHEN {holds} THEN {value} END"),
        format!("({holds}) IS FALSE"),
    )
}

fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

impl Table {
    pub(crate) fn columns(&self) -> impl Iterator<Item = &(&'static str, Kind)> {
        self.always.iter().chain(self.sometimes)
    }
}

impl Kind {
    fn sql(self) -> &'static str {
        match self {
            Self::Uuid => "uuid",
            Self::Text => "text",
            Self::Int => "bigint",
            Self::Decimal => "numeric",
            Self::Flag => "boolean",
            Self::Time => "timestamptz",
            Self::Json => "jsonb",
        }
    }

    fn admits(self, column: &Column) -> bool {
        let is = |names: &[&str]| names.contains(&column.type_.as_str());
        match self {
            Self::Uuid => is(&["uuid"]),
            // Also an enum.
            Self::Text => ["S", "E"].contains(&column.category.as_str()),
            Self::Int => is(&["int2", "int4", "int8"]),
            Self::Decimal => is(&["int2", "int4", "int8", "numeric"]),
            Self::Flag => is(&["bool"]),
            Self::Time => is(&["timestamp", "timestamptz"]),
            Self::Json => is(&["jsonb"]),
        }
    }
}
