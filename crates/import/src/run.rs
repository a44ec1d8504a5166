//! The course of an import.

use std::thread;
use std::time::{Duration, Instant};

use diesel::connection::{AnsiTransactionManager, SimpleConnection, TransactionManager};
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::result::DatabaseErrorKind;
use diesel::result::Error::DatabaseError;
use diesel::sql_query;
use diesel::sql_types::{Array, BigInt, Binary, Bool, Nullable, Text, Uuid as SqlUuid};
use uuid::Uuid;

use crate::error::{ImportError, OtherSession};
use crate::old::{ARCHIVE, Archive};
use crate::report::{Rejected, Report};
use crate::stage::{self, BATCH};
use crate::tables::{TABLES, Table};
use crate::{NewSystem, Options, Progress, REASONS, SecretColumn};

/// Says what would become of each row. Writes nothing: it works in a transaction that it rolls back.
///
/// # Errors
/// Any [`ImportError`] but `Running`, `Sessions`, `Busy` and `NoKeys`.
pub fn preflight(
    conn: &mut PgConnection,
    system: &dyn NewSystem,
    options: &Options,
) -> Result<Report, ImportError> {
    rolled_back(conn, |conn| {
        let archive = look(conn, options)?;
        let began_at = Run::find(conn)?.map(|run| run.began_at);
        stage::stage(conn, system, options, &archive, began_at.as_deref())
    })
}

/// Calls `work` in a transaction that is rolled back.
pub(crate) fn rolled_back<T>(
    conn: &mut PgConnection,
    work: impl FnOnce(&mut PgConnection) -> Result<T, ImportError>,
) -> Result<T, ImportError> {
    let began = AnsiTransactionManager::begin_transaction(conn);
    began.map_err(ImportError::database("connecting"))?;
    let done = work(conn);
    // After an error of the connection there is nothing left to roll back.
    let ended = AnsiTransactionManager::rollback_transaction(conn);
    let done = done?;
    ended.map_err(ImportError::database("rolling back"))?;
    Ok(done)
}

/// Converts the rows of the archive and writes them, and returns what became of each.
///
/// It holds an advisory lock, and refuses while other sessions may write to the database unless
/// `beside_others`. Each batch is one transaction, in which the table is locked against writes and
/// the triggers that would spoil old rows are off. Nothing of the archive changes; the progress is
/// kept in tables beside it, whose names begin with `import_`. After the end it does nothing but
/// report.
///
/// # Errors
/// [`ImportError`].
pub fn import(
    conn: &mut PgConnection,
    system: &dyn NewSystem,
    options: &Options,
    beside_others: bool,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report, ImportError> {
    let doing = ImportError::database("connecting");
    lock(conn)
        .map_err(doing)?
        .then_some(())
        .ok_or(ImportError::Running)?;
    let imported = locked(conn, system, options, beside_others, progress);
    let freed = conn.batch_execute(&format!(
        "SELECT pg_advisory_unlock({KEY});
         DISCARD TEMP;
         RESET client_connection_check_interval;
         RESET statement_timeout;
         RESET idle_session_timeout;
         RESET idle_in_transaction_session_timeout;
         RESET jit"
    ));
    let report = imported?;
    freed.map_err(ImportError::database("ending the import"))?;
    Ok(report)
}

/// The key of the advisory lock: one import at a time in each schema.
const KEY: &str = "hashtextextended('bruhmcp-import ' || current_schema(), 0)";

fn lock(conn: &mut PgConnection) -> QueryResult<bool> {
    // If this process is killed, its statement and its lock end at once.
    conn.batch_execute(
        "SET client_connection_check_interval = '1s';
         SET statement_timeout = 0;
         SET idle_session_timeout = 0;
         SET idle_in_transaction_session_timeout = 0",
    )?;
    // The server may take a moment to find out that the client of a killed import is gone.
    let give_up = Instant::now() + Duration::from_secs(5);
    loop {
        let locked = diesel::dsl::sql::<Bool>(&format!("pg_try_advisory_lock({KEY})"));
        if diesel::select(locked).get_result(conn)? {
            return Ok(true);
        }
        if Instant::now() >= give_up {
            return Ok(false);
        }
        thread::sleep(Duration::from_millis(100));
    }
}

fn locked(
    conn: &mut PgConnection,
    system: &dyn NewSystem,
    options: &Options,
    beside_others: bool,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report, ImportError> {
    let archive = look(conn, options)?;
    if !beside_others {
        refuse_others(conn)?;
    }
    let run = match Run::find(conn)? {
        Some(run) => run.check(options)?,
        None => {
            refuse_rows(conn)?;
            if !system.has_keys() && has_credentials(conn, &archive)? {
                return Err(ImportError::NoKeys);
            }
            Run::begin(conn, options).map_err(ImportError::database("beginning the import"))?
        }
    };
    let drop = conn.batch_execute("DISCARD TEMP");
    drop.map_err(ImportError::database("beginning the import"))?;
    let mut report = stage::stage(conn, system, options, &archive, Some(&run.began_at))?;
    if run.is_finished {
        return Ok(report);
    }
    // Credentials refer to their instance, which is staged after them.
    let (credentials, others): (Vec<_>, Vec<_>) = TABLES
        .iter()
        .partition(|table| table.name == "mcp_credentials");
    for table in others.into_iter().chain(credentials) {
        write(conn, system, table, progress)?;
    }
    finish(conn).map_err(ImportError::database("finishing the import"))?;
    stage::reject_again(conn).map_err(ImportError::database("reading the rejected rows"))?;
    for (table, counted) in TABLES.iter().zip(&mut report.tables) {
        *counted = crate::report::of_table(conn, table)?;
    }
    Ok(report)
}

#[derive(QueryableByName)]
struct NewTable {
    #[diesel(sql_type = Text)]
    name: String,
    #[diesel(sql_type = Bool)]
    exists: bool,
    #[diesel(sql_type = Bool)]
    is_owned: bool,
}

/// Looks at both sides, and refuses what can't be imported.
pub(crate) fn look(conn: &mut PgConnection, options: &Options) -> Result<Archive, ImportError> {
    let archive = Archive::read(conn)?;
    let doing = || ImportError::database("looking at the tables");
    let of_schema: Option<String> = diesel::select(diesel::dsl::sql::<Nullable<Text>>(
        "(SELECT current_schema()::text
            WHERE NOT starts_with(
                obj_description(to_regnamespace('bruhmcp_archive'), 'pg_namespace'),
                format('Moved from schema %I by ', current_schema())))",
    ))
    .get_result(conn)
    .map_err(doing())?;
    if let Some(schema) = of_schema {
        return Err(ImportError::OtherSchema(schema));
    }
    let tables: Vec<NewTable> = sql_query(
        "SELECT name, c.oid IS NOT NULL AS exists,
                coalesce(pg_has_role(c.relowner, 'USAGE'), false) AS is_owned
           FROM unnest($1) AS name
           LEFT JOIN pg_class AS c ON c.oid = to_regclass(format('%I.%I', current_schema(), name))",
    )
    .bind::<Array<Text>, _>(TABLES.map(|table| table.name).to_vec())
    .load(conn)
    .map_err(doing())?;
    if let Some(missing) = tables.iter().find(|table| !table.exists) {
        return Err(ImportError::NotMigrated(missing.name.clone()));
    }
    if let Some(foreign) = tables.iter().find(|table| !table.is_owned) {
        return Err(ImportError::NotOwner(foreign.name.clone()));
    }
    for table in options.timezones.keys() {
        if !TABLES.iter().any(|known| known.name == table) {
            return Err(ImportError::UnknownTable(table.clone()));
        }
    }
    for zone in options.timezones.values().chain([&options.timezone]) {
        let exists: bool = diesel::select(
            diesel::dsl::sql::<Bool>("EXISTS (SELECT FROM pg_timezone_names WHERE name = ")
                .bind::<Text, _>(zone)
                .sql(")"),
        )
        .get_result(conn)
        .map_err(doing())?;
        if !exists {
            return Err(ImportError::TimeZone(zone.clone()));
        }
    }
    Ok(archive)
}

fn refuse_others(conn: &mut PgConnection) -> Result<(), ImportError> {
    let others: Vec<OtherSession> = sql_query(
        "SELECT pid, usename::text AS role, application_name AS application
           FROM pg_stat_activity
          WHERE datname = current_database()
            -- NULL: this role may not see it.
            AND coalesce(backend_type, 'client backend') = 'client backend'
            AND pid <> pg_backend_pid()
            AND has_table_privilege(usesysid, 'users', 'INSERT')
          ORDER BY pid",
    )
    .load(conn)
    .map_err(ImportError::database("looking for other sessions"))?;
    if others.is_empty() {
        Ok(())
    } else {
        Err(ImportError::Sessions(others))
    }
}

fn refuse_rows(conn: &mut PgConnection) -> Result<(), ImportError> {
    for name in TABLES.iter().map(|table| table.name) {
        let has_rows = has_rows(conn, name);
        if has_rows.map_err(ImportError::database("looking at the new tables"))? {
            return Err(ImportError::NotEmpty(name));
        }
    }
    Ok(())
}

fn has_rows(conn: &mut PgConnection, table: &str) -> QueryResult<bool> {
    let exists = diesel::dsl::sql::<Bool>(&format!("EXISTS (SELECT FROM {table})"));
    diesel::select(exists).get_result(conn)
}

fn has_credentials(conn: &mut PgConnection, archive: &Archive) -> Result<bool, ImportError> {
    if !archive.has("mcp_credentials") {
        return Ok(false);
    }
    has_rows(conn, &format!("{ARCHIVE}.mcp_credentials"))
        .map_err(ImportError::database("looking for credentials"))
}

/// An import that has begun.
#[derive(QueryableByName)]
pub(crate) struct Run {
    #[diesel(sql_type = Text)]
    pub(crate) began_at: String,
    #[diesel(sql_type = Bool)]
    pub(crate) is_finished: bool,
    #[diesel(sql_type = Text)]
    options: String,
}

impl Run {
    pub(crate) fn find(conn: &mut PgConnection) -> Result<Option<Self>, ImportError> {
        let find = |conn: &mut PgConnection| {
            let exists = "to_regclass('bruhmcp_archive.import_run') IS NOT NULL";
            if !diesel::select(diesel::dsl::sql::<Bool>(exists)).get_result(conn)? {
                return Ok(None);
            }
            sql_query(
                "SELECT began_at::text, finished_at IS NOT NULL AS is_finished,
                        options::text FROM bruhmcp_archive.import_run",
            )
            .get_result(conn)
            .optional()
        };
        find(conn).map_err(ImportError::database("reading the progress"))
    }

    fn begin(conn: &mut PgConnection, options: &Options) -> QueryResult<Self> {
        let options =
            serde_json::to_string(options).map_err(|_| diesel::result::Error::NotFound)?;
        let began_at = stage::clock(conn)?;
        conn.transaction(|conn| {
            conn.batch_execute(
                "CREATE TABLE bruhmcp_archive.import_run (
                     began_at timestamptz NOT NULL, finished_at timestamptz, options jsonb NOT NULL
                 );
                 CREATE TABLE bruhmcp_archive.import_progress (
                     table_name text PRIMARY KEY, done bigint NOT NULL
                 );
                 CREATE TABLE bruhmcp_archive.import_rejected (
                     table_name text NOT NULL, key text NOT NULL, reason text NOT NULL,
                     PRIMARY KEY (table_name, key)
                 )",
            )?;
            sql_query(
                "INSERT INTO bruhmcp_archive.import_run (began_at, options)
                 VALUES ($1::timestamptz, $2::jsonb)",
            )
            .bind::<Text, _>(&began_at)
            .bind::<Text, _>(&options)
            .execute(conn)
        })?;
        Ok(Self {
            began_at,
            is_finished: false,
            options,
        })
    }

    /// The options that it began with, if this version can read them.
    pub(crate) fn options(&self) -> Option<Options> {
        serde_json::from_str(&self.options).ok()
    }

    fn check(self, options: &Options) -> Result<Self, ImportError> {
        if self.options().as_ref() == Some(options) {
            return Ok(self);
        }
        Err(ImportError::OtherOptions(self.options))
    }
}

/// Writes what is left to write of a table.
fn write(
    conn: &mut PgConnection,
    system: &dyn NewSystem,
    table: &'static Table,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), ImportError> {
    let extent = Extent::of(conn, table).map_err(ImportError::database("reading the progress"))?;
    let (mut done, total) = (extent.done, extent.total);
    let mut tell = |done| {
        progress(Progress {
            table: table.name,
            done,
            total,
        });
    };
    tell(done);
    while done < total {
        let end = (done + BATCH).min(total);
        if table.name == "mcp_credentials" {
            seal(conn, system, done, end)?;
        }
        conn.transaction(|conn| write_batch(conn, table, &extent.columns, done, end))?;
        done = end;
        tell(done);
    }
    Ok(())
}

/// How far a table is.
#[derive(QueryableByName)]
struct Extent {
    #[diesel(sql_type = BigInt)]
    done: i64,
    #[diesel(sql_type = BigInt)]
    total: i64,
    /// The columns that are written, as SQL.
    #[diesel(sql_type = Text)]
    columns: String,
}

impl Extent {
    fn of(conn: &mut PgConnection, table: &Table) -> QueryResult<Self> {
        sql_query(format!(
            "SELECT coalesce(
                        (SELECT done FROM bruhmcp_archive.import_progress WHERE table_name = $1), 0
                    ) AS done,
                    (SELECT count(*) FROM new_{0}) AS total,
                    coalesce(
                        (SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum)
                           FROM pg_attribute
                          WHERE attrelid = 'pg_temp.new_{0}'::regclass AND attnum > 0
                            AND attname NOT IN ('n', 'key', 'extra', 'rejected', 'reasons')),
                        ''
                    ) AS columns",
            table.name
        ))
        .bind::<Text, _>(table.name)
        .get_result(conn)
    }
}

/// Writes the staged rows after `done` up to `end`, and the progress.
fn write_batch(
    conn: &mut PgConnection,
    table: &Table,
    columns: &str,
    done: i64,
    end: i64,
) -> Result<(), ImportError> {
    let name = table.name;
    conn.batch_execute("SET LOCAL lock_timeout = '5s'")?;
    let lock = format!("LOCK TABLE {name} IN SHARE ROW EXCLUSIVE MODE");
    conn.batch_execute(&lock).map_err(|error| match error {
        DatabaseError(DatabaseErrorKind::Unknown, _) => ImportError::Busy(name),
        error => error.into(),
    })?;
    switch(conn, table, "DISABLE")?;
    if !columns.is_empty() {
        insert(conn, name, columns, done, end)?;
    }
    switch(conn, table, "ENABLE")?;
    // One-time codes and links are not worth a line each.
    sql_query(format!(
        "INSERT INTO bruhmcp_archive.import_rejected
         SELECT $1, key, min(rejected) FROM new_{name}
          WHERE n > $2 AND n <= $3 AND rejected IS NOT NULL AND $1 <> 'auth_tokens'
          GROUP BY key
         ON CONFLICT DO NOTHING"
    ))
    .bind::<Text, _>(name)
    .bind::<BigInt, _>(done)
    .bind::<BigInt, _>(end)
    .execute(conn)?;
    sql_query(
        "INSERT INTO bruhmcp_archive.import_progress VALUES ($1, $2)
         ON CONFLICT (table_name) DO UPDATE SET done = excluded.done",
    )
    .bind::<Text, _>(name)
    .bind::<BigInt, _>(end)
    .execute(conn)?;
    Ok(())
}

/// Switches the triggers off or on that old rows don't go through. Both within one transaction: a
/// crash leaves none of them off.
fn switch(conn: &mut PgConnection, table: &Table, how: &str) -> QueryResult<()> {
    if table.triggers.is_empty() {
        return Ok(());
    }
    let triggers = table
        .triggers
        .iter()
        .map(|name| format!("{how} TRIGGER {name}"));
    let triggers = triggers.collect::<Vec<_>>().join(", ");
    conn.batch_execute(&format!("ALTER TABLE {} {triggers}", table.name))
}

/// Inserts the rows after `done` up to `end`. If a constraint refuses one of them, halves them until
/// it is found, and rejects it.
fn insert(
    conn: &mut PgConnection,
    table: &str,
    columns: &str,
    done: i64,
    end: i64,
) -> Result<(), ImportError> {
    let inserted = conn.transaction(|conn| {
        sql_query(format!(
            "INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE
             SELECT {columns} FROM new_{table}
              WHERE n > $1 AND n <= $2 AND rejected IS NULL ORDER BY n"
        ))
        .bind::<BigInt, _>(done)
        .bind::<BigInt, _>(end)
        .execute(conn)
    });
    match inserted {
        Ok(_) => Ok(()),
        Err(error) => {
            let constraint = violated(&error).ok_or(error)?;
            if end - done == 1 {
                sql_query(format!(
                    "UPDATE new_{table} SET rejected = 'refused:' || $1 WHERE n = $2"
                ))
                .bind::<Text, _>(constraint)
                .bind::<BigInt, _>(end)
                .execute(conn)?;
                return Ok(());
            }
            let middle = done + (end - done) / 2;
            insert(conn, table, columns, done, middle)?;
            insert(conn, table, columns, middle, end)
        }
    }
}

/// Returns the name of the constraint that a row violated.
fn violated(error: &diesel::result::Error) -> Option<String> {
    use DatabaseErrorKind::{
        CheckViolation, ExclusionViolation, ForeignKeyViolation, NotNullViolation,
        RestrictViolation, UniqueViolation,
    };
    let DatabaseError(
        CheckViolation | ExclusionViolation | ForeignKeyViolation | NotNullViolation
        | RestrictViolation | UniqueViolation,
        information,
    ) = error
    else {
        return None;
    };
    let name = information.constraint_name().or(information.column_name());
    Some(name.unwrap_or("unnamed").to_owned())
}

#[derive(QueryableByName)]
struct Secrets {
    #[diesel(sql_type = BigInt)]
    n: i64,
    #[diesel(sql_type = SqlUuid)]
    instance_id: Uuid,
    #[diesel(sql_type = Nullable<Text>)]
    api_key: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    client_secret: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    access_token: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    refresh_token: Option<String>,
}

/// Seals the secrets of the staged credentials after `done` up to `end`.
fn seal(
    conn: &mut PgConnection,
    system: &dyn NewSystem,
    done: i64,
    end: i64,
) -> Result<(), ImportError> {
    let failed = ImportError::database("sealing");
    let rows: Vec<Secrets> = sql_query(
        "SELECT n, instance_id, old.api_key, old.client_secret,
                nullif(old.access_token, '') AS access_token,
                nullif(old.refresh_token, '') AS refresh_token
           FROM new_mcp_credentials
           JOIN old_mcp_credentials AS old USING (credential_id, instance_id)
          WHERE n > $1 AND n <= $2 AND rejected IS NULL",
    )
    .bind::<BigInt, _>(done)
    .bind::<BigInt, _>(end)
    .load(conn)
    .map_err(failed)?;
    if rows.is_empty() {
        return Ok(());
    }
    if !system.has_keys() {
        return Err(ImportError::NoKeys);
    }
    let columns = [
        SecretColumn::ApiKey,
        SecretColumn::ClientSecret,
        SecretColumn::AccessToken,
        SecretColumn::RefreshToken,
    ];
    let mut numbers = Vec::new();
    let mut sealed = [const { Vec::<Option<Vec<u8>>>::new() }; 4];
    let mut unsealed = Vec::new();
    for row in &rows {
        let secrets = [
            &row.api_key,
            &row.client_secret,
            &row.access_token,
            &row.refresh_token,
        ];
        let values = secrets
            .iter()
            .zip(columns)
            .map(|(secret, column)| match secret {
                None => Some(None),
                Some(secret) => system.seal(secret, row.instance_id, column).map(Some),
            });
        match values.collect::<Option<Vec<_>>>() {
            Some(values) => {
                numbers.push(row.n);
                for (column, value) in sealed.iter_mut().zip(values) {
                    column.push(value);
                }
            }
            None => unsealed.push(row.n),
        }
    }
    let [api_keys, client_secrets, access_tokens, refresh_tokens] = sealed;
    let write = |conn: &mut PgConnection| {
        sql_query(
            "UPDATE new_mcp_credentials AS new
                SET api_key = sealed.api_key, client_secret = sealed.client_secret,
                    access_token = sealed.access_token, refresh_token = sealed.refresh_token
               FROM unnest($1, $2, $3, $4, $5)
                    AS sealed (n, api_key, client_secret, access_token, refresh_token)
              WHERE new.n = sealed.n",
        )
        .bind::<Array<BigInt>, _>(numbers)
        .bind::<Array<Nullable<Binary>>, _>(api_keys)
        .bind::<Array<Nullable<Binary>>, _>(client_secrets)
        .bind::<Array<Nullable<Binary>>, _>(access_tokens)
        .bind::<Array<Nullable<Binary>>, _>(refresh_tokens)
        .execute(conn)?;
        sql_query("UPDATE new_mcp_credentials SET rejected = 'secret_too_long' WHERE n = ANY ($1)")
            .bind::<Array<BigInt>, _>(unsealed)
            .execute(conn)
    };
    write(conn).map_err(ImportError::database("sealing"))?;
    Ok(())
}

/// Counts once what triggers count per row, and marks the import as finished.
fn finish(conn: &mut PgConnection) -> QueryResult<()> {
    conn.transaction(|conn| conn.batch_execute(include_str!("finish.sql")))
}

/// Returns the rows that stay in the archive. Codes, links and refresh tokens aren't among them.
///
/// # Errors
/// `NoArchive` if no import has begun, and `Database`.
pub fn rejected(conn: &mut PgConnection) -> Result<Vec<Rejected>, ImportError> {
    if Run::find(conn)?.is_none() {
        return Err(ImportError::NoArchive);
    }
    let rows: Vec<Rejected> = sql_query(
        "SELECT table_name AS table, key, reason, '' AS column
           FROM bruhmcp_archive.import_rejected ORDER BY table_name, key",
    )
    .load(conn)
    .map_err(ImportError::database("reading the rejected rows"))?;
    let with_column = |row: Rejected| {
        let reason = REASONS.iter().find(|reason| reason.code == row.reason);
        Rejected {
            column: reason.map_or_else(String::new, |reason| reason.column.to_owned()),
            ..row
        }
    };
    Ok(rows.into_iter().map(with_column).collect())
}
