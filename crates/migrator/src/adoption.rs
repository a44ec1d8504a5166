//! Recognises a schema whose ledger was lost.

use diesel::dsl::sql;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_types::{Array, Bool, Text};

use crate::Verification;
use crate::error::Error;
use crate::verify::{Expected, Found};

/// Returns how the schema differs from what the first `n` migrations build, for each `n` from 0.
/// What was added by hand is no difference. Returns `None` if the catalogue lacks a migration.
pub(crate) fn differences(
    connection: &mut PgConnection,
    schema: &str,
    catalogue: &str,
    names: &[&str],
) -> Result<Option<Vec<Vec<String>>>, Error> {
    let versions = (0..=names.len()).map(|end| Expected::new(catalogue, &names[..end]));
    let Some(versions) = versions.collect::<Option<Vec<Expected>>>() else {
        return Ok(None);
    };
    let found = Found::read(connection, schema, Some(&Expected::union(&versions)), &[])
        .map_err(Error::database("reading the catalogue"))?;
    let of = |(n, version): (usize, &Expected)| {
        let Verification {
            missing,
            changed,
            extra,
            ..
        } = version.compare(&found);
        let is_later =
            |line: &&String| versions[n..].iter().any(|later| later.lines.contains(line));
        let missing = missing.iter().map(|line| format!("- {line}"));
        let changed = changed.iter().map(ToString::to_string);
        let later = extra
            .iter()
            .filter(is_later)
            .map(|line| format!("+ {line}"));
        missing.chain(changed).chain(later).collect()
    };
    Ok(Some(versions.iter().enumerate().map(of).collect()))
}

/// Returns whether the schema has an object that these migrations create. Waits for no lock.
pub(crate) fn has_traces(
    connection: &mut PgConnection,
    schema: &str,
    catalogue: &str,
    names: &[&str],
) -> Result<bool, Error> {
    let Some(expected) = Expected::new(catalogue, names) else {
        return Ok(false);
    };
    sql::<Bool>(
        "WITH relation AS (
             SELECT oid, relname, relkind
             FROM pg_class
             WHERE relnamespace = to_regnamespace(quote_ident(",
    )
    .bind::<Text, _>(schema)
    .sql(
        "))
         ),
         found (key) AS (
             SELECT format(CASE relkind WHEN 'i' THEN 'index %I' ELSE 'relation %I' END, relname)
             FROM relation
             UNION ALL
             SELECT format('column %I.%I', relname, attname)
             FROM relation JOIN pg_attribute ON attrelid = oid
             UNION ALL
             SELECT format('constraint %I.%I', relname, conname)
             FROM relation r JOIN pg_constraint ON conrelid = r.oid
             UNION ALL
             SELECT format('trigger %I.%I', relname, tgname)
             FROM relation r JOIN pg_trigger ON tgrelid = r.oid
         )
         SELECT EXISTS (SELECT FROM found WHERE key = ANY (",
    )
    .bind::<Array<Text>, _>(expected.lines.keys())
    .sql("))")
    .get_result(connection)
    .map_err(Error::database("looking for what is pending"))
}

/// Returns the other schemas that have a ledger.
pub(crate) fn ledgers_elsewhere(
    connection: &mut PgConnection,
    schema: &str,
) -> Result<Vec<String>, Error> {
    sql::<Text>(
        "SELECT quote_ident(nspname)
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relname = '__diesel_schema_migrations' AND c.relkind IN ('r', 'p')
             AND nspname <> ",
    )
    .bind::<Text, _>(schema)
    .sql(" ORDER BY nspname")
    .load(connection)
    .map_err(Error::database("looking for __diesel_schema_migrations"))
}
