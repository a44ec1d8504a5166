//! Recognises a schema whose ledger was lost.

use diesel::dsl::sql;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_types::Text;

use crate::Verification;
use crate::error::Error;
use crate::verify::Lines;

/// How many of the migrations the schema has, as far as it shows.
pub(crate) struct Recognised {
    pub(crate) migrations: usize,
    /// What differs from the schema that they build.
    pub(crate) differences: Vec<String>,
}

/// Finds the version that the schema comes nearest to, of those with `at_least` migrations. Of
/// versions that build the same it is the oldest. Returns `None` without a catalogue of them all.
pub(crate) fn recognise(
    connection: &mut PgConnection,
    schema: &str,
    catalogue: &str,
    names: &[&str],
    at_least: usize,
) -> Result<Option<Recognised>, Error> {
    let versions = (0..=names.len()).map(|end| Lines::expected(catalogue, &names[..end]));
    let Some(versions) = versions.collect::<Option<Vec<Lines>>>() else {
        return Ok(None);
    };
    let found = Lines::found(connection, schema, versions.last())
        .map_err(Error::database("reading the catalogue"))?;
    let candidates = (at_least..versions.len()).map(|migrations| {
        let Verification {
            missing,
            changed,
            extra,
            ..
        } = versions[migrations].compare(&found);
        let missing = missing.iter().map(|line| format!("- {line}"));
        let changed = changed.iter().map(ToString::to_string);
        // Something else may have been added by hand.
        let later = extra.iter().filter(|line| {
            let mut later = versions[migrations..].iter();
            later.any(|version| version.contains(line))
        });
        let later = later.map(|line| format!("+ {line}"));
        Recognised {
            migrations,
            differences: missing.chain(changed).chain(later).collect(),
        }
    });
    Ok(candidates.min_by_key(|candidate| candidate.differences.len()))
}

/// Returns the other schemas that have a ledger.
pub(crate) fn ledgers_elsewhere(
    connection: &mut PgConnection,
    schema: &str,
) -> Result<Vec<String>, Error> {
    sql::<Text>(
        "SELECT nspname::text
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relname = '__diesel_schema_migrations' AND c.relkind IN ('r', 'p')
             AND nspname <> ",
    )
    .bind::<Text, _>(schema)
    .sql(" ORDER BY nspname")
    .load(connection)
    .map_err(Error::database("looking for __diesel_schema_migrations"))
}
