//! Compares the live schema with the expected one.

use std::collections::BTreeSet;
use std::fmt;

use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_types::Text;
use diesel::{QueryResult, sql_query};
use serde::Serialize;
use sha2::{Digest, Sha256};

/// Result of [`Runner::verify`](crate::Runner::verify).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// SHA-256 of the expected catalogue.
    pub expected: String,
    /// SHA-256 of the catalogue in the database.
    pub found: String,
    /// Differences. A changed object is missing in its old form and unexpected in its new one.
    pub differences: Vec<Difference>,
}

/// A line of the catalogue, such as `column users.email text not null`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Difference {
    /// Expected, but not in the database.
    Missing(String),
    /// In the database, but not expected: made by hand, or by a newer release.
    Unexpected(String),
}

impl fmt::Display for Difference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(line) => write!(formatter, "missing     {line}"),
            Self::Unexpected(line) => write!(formatter, "unexpected  {line}"),
        }
    }
}

pub(crate) fn compare(expected: &str, found: &str) -> Verification {
    let expected: BTreeSet<&str> = expected.lines().collect();
    let found: BTreeSet<&str> = found.lines().collect();
    let missing = expected.difference(&found);
    let missing = missing.map(|&line| Difference::Missing(line.to_owned()));
    let unexpected = found.difference(&expected);
    let unexpected = unexpected.map(|&line| Difference::Unexpected(line.to_owned()));
    Verification {
        expected: digest(&expected),
        found: digest(&found),
        differences: missing.chain(unexpected).collect(),
    }
}

fn digest(lines: &BTreeSet<&str>) -> String {
    let mut hash = Sha256::new();
    for line in lines {
        hash.update(line);
        hash.update("\n");
    }
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[derive(QueryableByName)]
struct Line {
    #[diesel(sql_type = Text)]
    line: String,
}

pub(crate) fn catalogue(connection: &mut PgConnection, schema: &str) -> QueryResult<String> {
    let lines: Vec<Line> = connection
        .build_transaction()
        .read_only()
        .repeatable_read()
        .run(|connection| {
            // Makes the server qualify each name outside pg_catalog, whatever the role's own is.
            sql_query("SET LOCAL search_path = pg_catalog").execute(connection)?;
            sql_query(include_str!("catalogue.sql"))
                .bind::<Text, _>(schema)
                .load(connection)
        })?;
    let lines = lines.into_iter();
    let mut lines: Vec<String> = lines
        .map(|Line { line }| line.replace(['\n', '\r'], " ") + "\n")
        .collect();
    lines.sort();
    Ok(lines.concat())
}
