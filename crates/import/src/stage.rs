//! The new rows, in temporary tables of the session.

use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::{Array, Bool, Nullable, Text, Uuid as SqlUuid};
use uuid::Uuid;

use crate::error::ImportError;
use crate::old::{Archive, Unknown};
use crate::report::{self, Report};
use crate::run::Run;
use crate::tables::{TABLES, Table};
use crate::{DuplicateEmails, LiveSubscription, NewSystem, Options};

/// Rows that are read or written at once.
pub(crate) const BATCH: i64 = 10_000;

#[derive(QueryableByName)]
struct Email {
    #[diesel(sql_type = SqlUuid)]
    id: Uuid,
    #[diesel(sql_type = Text)]
    email: String,
}

/// Converts every row, as of `began_at`, and counts what becomes of it.
pub(crate) fn stage(
    conn: &mut PgConnection,
    system: &dyn NewSystem,
    options: &Options,
    archive: &Archive,
    began_at: Option<&str>,
) -> Result<Report, ImportError> {
    prepare(conn, options, archive, began_at).map_err(ImportError::database("converting"))?;
    spell_emails(conn, system).map_err(ImportError::database("reading the email addresses"))?;
    for table in &TABLES {
        let name = table.name;
        let staging = format!(
            "CREATE TEMP TABLE new_{name} AS {};
             ALTER TABLE new_{name} ADD PRIMARY KEY (n);
             ANALYZE new_{name}",
            table.sql
        );
        let staged = conn.batch_execute(&staging);
        staged.map_err(ImportError::database("converting"))?;
    }
    if Run::find(conn)?.is_some() {
        reject_again(conn).map_err(ImportError::database("reading the rejected rows"))?;
    }
    let tables = TABLES.iter().map(|table| report::of_table(conn, table));
    let tables = tables.collect::<Result<_, _>>()?;
    let Unknown {
        columns: unknown_columns,
        tables: unknown_tables,
    } = archive.unknown(conn)?;
    Ok(Report {
        options: options.clone(),
        tables,
        unknown_columns,
        unknown_tables,
    })
}

/// Marks the rows that were found out only when they were written. After the staging of all tables:
/// no conversion may depend on it, for it is another one in the next run.
pub(crate) fn reject_again(conn: &mut PgConnection) -> QueryResult<()> {
    for Table { name, key, .. } in TABLES.iter().filter(|table| table.name != "auth_tokens") {
        conn.batch_execute(&format!(
            "UPDATE new_{name} AS staged SET rejected = import_rejected.reason
               FROM bruhmcp_archive.import_rejected
              WHERE table_name = '{name}' AND import_rejected.key = staged.key
                AND (reason LIKE 'refused:%' OR reason = 'secret_too_long')
                AND rejected IS NULL
                AND NOT EXISTS (SELECT FROM {name} AS written WHERE written.{key} = staged.{key})"
        ))?;
    }
    // As the end of the import leaves them.
    conn.batch_execute(
        "UPDATE new_mcp_service_table AS instance
            SET oauth_status = 'pending',
                reasons = array_append(instance.reasons, 'oauth_status_of_credentials')
           FROM new_mcp_credentials AS credentials
          WHERE credentials.instance_id = instance.instance_id
            AND credentials.rejected IS NOT NULL AND instance.oauth_status <> 'pending'",
    )
}

fn prepare(
    conn: &mut PgConnection,
    options: &Options,
    archive: &Archive,
    began_at: Option<&str>,
) -> QueryResult<()> {
    conn.batch_execute(include_str!("session.sql"))?;
    // Conversions that depend on the time give the same in each run of one import.
    sql_query(
        "CREATE TEMP TABLE settings (
             now timestamptz NOT NULL, suffix_emails boolean NOT NULL, paid_first boolean NOT NULL
         )",
    )
    .execute(conn)?;
    sql_query("INSERT INTO settings VALUES (coalesce($1::timestamptz, now()), $2, $3)")
        .bind::<Nullable<Text>, _>(began_at)
        .bind::<Bool, _>(options.duplicate_emails == DuplicateEmails::Suffix)
        .bind::<Bool, _>(options.live_subscription == LiveSubscription::Paid)
        .execute(conn)?;
    for table in &TABLES {
        conn.batch_execute(&archive.view(table, options.zone(table.name)))?;
    }
    Ok(())
}

fn spell_emails(conn: &mut PgConnection, system: &dyn NewSystem) -> QueryResult<()> {
    let mut last = Uuid::nil();
    let mut is_first = true;
    loop {
        let rows: Vec<Email> = sql_query(
            "SELECT id, email FROM old_users WHERE id > $1 OR $2 AND id = $1 ORDER BY id LIMIT $3",
        )
        .bind::<SqlUuid, _>(last)
        .bind::<Bool, _>(is_first)
        .bind::<diesel::sql_types::BigInt, _>(BATCH)
        .load(conn)?;
        let Some(row) = rows.last() else { break };
        (last, is_first) = (row.id, false);
        let (ids, emails): (Vec<_>, Vec<_>) = rows
            .iter()
            .map(|row| (row.id, system.canonical_email(&row.email)))
            .unzip();
        sql_query("INSERT INTO emails SELECT * FROM unnest($1, $2)")
            .bind::<Array<SqlUuid>, _>(ids)
            .bind::<Array<Nullable<Text>>, _>(emails)
            .execute(conn)?;
    }
    conn.batch_execute("ANALYZE emails")
}

/// Reads the server's clock, as text that [`stage`] takes.
pub(crate) fn clock(conn: &mut PgConnection) -> QueryResult<String> {
    diesel::select(diesel::dsl::sql::<Text>("now()::text")).get_result(conn)
}
