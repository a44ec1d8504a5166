//! Compares the live schema with the one that the applied migrations build.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_types::{Array, Nullable, Text};
use diesel::{QueryResult, sql_query};
use serde::Serialize;
use sha2::{Digest, Sha256};

/// Result of [`Runner::verify`](crate::Runner::verify). A line describes an object, such as
/// `column users.email: text not null`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// Newest applied version. The schema was compared with what the migrations build up to it.
    pub version: Option<String>,
    /// Names of the migrations that are not applied, oldest first. They are not expected.
    pub pending: Vec<String>,
    /// Lines that are expected, but not in the database.
    pub missing: Vec<String>,
    /// Objects that differ from what is expected.
    pub changed: Vec<Change>,
    /// Lines that are in the database, but not expected. They can make a statement fail, but not
    /// do something else than before.
    pub extra: Vec<String>,
    /// SHA-256 of the lines in the database. Equal schemas have equal fingerprints.
    pub fingerprint: String,
}

/// An object that is not as expected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// `None` for a trigger, rule, policy or child that was added to a table: it changes what
    /// statements on the table do.
    pub expected: Option<String>,
    /// The line in the database.
    pub found: String,
}

impl Verification {
    /// Returns whether the schema differs from the expected one in a way that matters.
    pub fn has_drift(&self) -> bool {
        !(self.missing.is_empty() && self.changed.is_empty())
    }
}

impl fmt::Display for Change {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(expected) = &self.expected {
            writeln!(formatter, "- {expected}")?;
        }
        write!(formatter, "+ {}", self.found)
    }
}

/// The lines of a schema: the definition of each object, by its key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Lines(BTreeMap<String, String>);

impl Lines {
    /// Sums up what these migrations, in this order, add and take away. Returns `None` if the
    /// catalogue lacks one of them.
    pub(crate) fn expected(catalogue: &str, migrations: &[&str]) -> Option<Self> {
        let mut lines = Self::default();
        for name in migrations {
            let heading = format!("# {name}");
            let mut rest = catalogue.lines().skip_while(|&line| line != heading);
            rest.next()?;
            for line in rest.take_while(|line| !line.starts_with("# ")) {
                if let Some((key, definition)) = line.strip_prefix("+ ").and_then(split) {
                    lines.0.insert(key.to_owned(), definition.to_owned());
                } else if let Some((key, _)) = line.strip_prefix("- ").and_then(split) {
                    lines.0.remove(key);
                }
            }
        }
        Some(lines)
    }

    /// Returns the objects of all of them, each as in the last one that has it.
    pub(crate) fn union(all: &[Self]) -> Self {
        Self(all.iter().flat_map(|lines| lines.0.clone()).collect())
    }

    pub(crate) fn keys(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }

    pub(crate) fn contains(&self, line: &str) -> bool {
        split(line).is_some_and(|(key, definition)| {
            self.0.get(key).is_some_and(|found| found == definition)
        })
    }

    /// Reads the lines of `schema`: what has the keys of `expected` and what hangs on it, or all.
    pub(crate) fn found(
        connection: &mut PgConnection,
        schema: &str,
        expected: Option<&Self>,
    ) -> QueryResult<Self> {
        let keys: Option<Vec<&String>> = expected.map(|lines| lines.0.keys().collect());
        let lines: Vec<Line> = connection
            .build_transaction()
            .read_only()
            .repeatable_read()
            .run(|connection| {
                sql_query(PINNED).execute(connection)?;
                sql_query(include_str!("catalogue.sql"))
                    .bind::<Text, _>(schema)
                    .bind::<Nullable<Array<Text>>, _>(keys)
                    .load(connection)
            })?;
        let on_one_line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let lines = lines.iter();
        Ok(Self(
            lines
                .map(|line| (on_one_line(&line.key), on_one_line(&line.definition)))
                .collect(),
        ))
    }

    pub(crate) fn compare(&self, found: &Self) -> Verification {
        let line = |lines: &Self, key: &str| Some(format!("{key}: {}", lines.0.get(key)?));
        let mut verification = Verification {
            version: None,
            pending: Vec::new(),
            missing: Vec::new(),
            changed: Vec::new(),
            extra: Vec::new(),
            fingerprint: found.fingerprint(),
        };
        let keys: BTreeSet<&String> = self.0.keys().chain(found.0.keys()).collect();
        for key in keys {
            match (line(self, key), line(found, key)) {
                (Some(expected), None) => verification.missing.push(expected),
                (expected, Some(found)) if expected.as_ref() == Some(&found) => {}
                (None, Some(found)) if !acts(key) => verification.extra.push(found),
                (expected, Some(found)) => verification.changed.push(Change { expected, found }),
                (None, None) => {}
            }
        }
        verification
    }

    fn fingerprint(&self) -> String {
        let digest = Sha256::digest(self.to_string());
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl fmt::Display for Lines {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = self.0.iter();
        lines.try_for_each(|(key, definition)| writeln!(formatter, "{key}: {definition}"))
    }
}

fn split(line: &str) -> Option<(&str, &str)> {
    line.split_once(": ")
}

/// Whether an object with this key changes what statements on its table do, instead of only
/// refusing some.
fn acts(key: &str) -> bool {
    ["trigger ", "rule ", "policy ", "child "]
        .iter()
        .any(|kind| key.starts_with(kind))
}

#[derive(QueryableByName)]
struct Line {
    #[diesel(sql_type = Text)]
    key: String,
    #[diesel(sql_type = Text)]
    definition: String,
}

/// Settings of a role or database that change how the server prints a definition. The query itself
/// looks names up in `pg_catalog` alone.
const PINNED: &str = "SELECT set_config(name, value, true) FROM (VALUES
    ('search_path', 'pg_catalog'), ('quote_all_identifiers', 'off'),
    ('standard_conforming_strings', 'on'), ('bytea_output', 'hex'), ('extra_float_digits', '1'),
    ('datestyle', 'ISO, YMD'), ('intervalstyle', 'postgres'), ('timezone', 'UTC')
) AS setting (name, value)";
