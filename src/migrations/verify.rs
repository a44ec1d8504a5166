//! The live schema against the one that this version of the crate was built for.

use std::collections::BTreeSet;
use std::fmt;

use diesel::dsl::sql;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_types::Text;
use serde::Serialize;
use sha2::{Digest, Sha256};

/// What a database that is at [`MIGRATIONS`](super::MIGRATIONS) holds; written by a test.
const EXPECTED: &str = include_str!("../../migrations/catalogue.txt");

/// What [`verify`] found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// SHA-256 of the catalogue as it should be.
    pub expected: String,
    /// SHA-256 of the catalogue as it is.
    pub found: String,
    /// Each difference; something altered is missing in its one form and unexpected in the other.
    pub differences: Vec<Difference>,
}

/// A line of the catalogue, such as `column users.email text not null`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Difference {
    /// This version relies on it, and it isn't there.
    Missing(String),
    /// It is there, and this version doesn't know it. After a newer version's migration that is no fault.
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

/// Compares the schema `public` with what this version of the crate expects: columns, types, defaults, constraints,
/// indexes, triggers, functions and enum labels, but no comments, owners or privileges.
///
/// Only reads, in a transaction of its own, takes no lock and needs no right but to connect. Expressions are in the
/// words of the server, which were taken from PostgreSQL 15.
///
/// # Errors
/// A query fails, or `connection` is in a transaction.
pub fn verify(connection: &mut PgConnection) -> QueryResult<Verification> {
    let found = catalogue(connection)?;
    let found: BTreeSet<&str> = found.lines().collect();
    let expected: BTreeSet<&str> = EXPECTED.lines().collect();
    let missing = expected
        .difference(&found)
        .map(|line| Difference::Missing((*line).to_owned()));
    let unexpected = found
        .difference(&expected)
        .map(|line| Difference::Unexpected((*line).to_owned()));
    Ok(Verification {
        expected: fingerprint(&expected),
        found: fingerprint(&found),
        differences: missing.chain(unexpected).collect(),
    })
}

/// The catalogue as [`verify`] compares it, a sorted line each.
fn catalogue(connection: &mut PgConnection) -> QueryResult<String> {
    let lines: Vec<String> = connection
        .build_transaction()
        .read_only()
        .repeatable_read()
        .run(|connection| {
            // Whatever the role's own is: every name outside pg_catalog is then written with its schema.
            diesel::sql_query("SET LOCAL search_path = pg_catalog").execute(connection)?;
            sql::<Text>(include_str!("catalogue.sql")).load(connection)
        })?;
    let mut lines: Vec<String> = lines
        .into_iter()
        .map(|line| line.replace(['\n', '\r'], " ") + "\n")
        .collect();
    lines.sort();
    Ok(lines.concat())
}

fn fingerprint(lines: &BTreeSet<&str>) -> String {
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
