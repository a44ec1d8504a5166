//! Proves in a test that migrations can be reverted, and that `schema.rs` is theirs.
//!
//! ```no_run
//! # use diesel_migrations::FileBasedMigrations;
//! # let url = "postgresql:///shop_test";
//! # let migrations = || FileBasedMigrations::from_path("migrations").unwrap();
//! use diesel_pg_migrator::prover;
//!
//! prover::reversible(migrations(), url)?;
//! prover::schema_file(migrations(), url, "src/schema.rs")?;
//! # Ok::<(), prover::Error>(())
//! ```
//!
//! # What is proved
//!
//! On the way up, each migration is applied, reverted and applied again. Then all are reverted, the
//! newest first, each with one more `redo`. After each down the schema is the one before the up;
//! after each up it is the one of the first time. The rows of the older tables are then as they
//! were, in the columns that these tables had. [`Prover::rows`] gives the tables rows.
//!
//! The schema is what the server's catalogue says of all schemas but the system's: tables, columns
//! in their order, defaults, constraints, indexes, triggers, views, functions, types, sequences,
//! policies, partitions, comments, rights, owners, storage, extensions and settings of the
//! database. It needs no `pg_dump`.
//!
//! # What is not seen
//!
//! - The definition of rarer objects (operators, casts, aggregates, text search, foreign servers,
//!   publications, event triggers): only that they are there.
//! - The next value of a sequence, large objects, roles, and what lies outside the database.
//! - Rows in tables that the test leaves empty: [`Proof::without_rows`] names them.
//! - How long a lock is held, and whether the old release runs on the new schema.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::Path;
use std::process::Command;

use diesel::connection::{Connection, SimpleConnection};
use diesel::migration::{MigrationConnection, MigrationSource};
use diesel::pg::{Pg, PgConnection};
use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::{Array, Nullable, Text};
use diesel_migrations::MigrationHarness;
use libpq_conninfo::Conninfo;
use similar::TextDiff;

use crate::source::{Known, Migrations};
use crate::verify::{Line, Lines, PINNED};
use crate::{Direction, ServerReport};

/// Why something is not proved. No text has a value of a row, nor the password of the URL. `Debug`
/// is the text too: that is what a failed test prints.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The URL can't be read, or the server can't be reached.
    #[error("no connection: {0}")]
    Connect(String),
    /// The migrations can't be read from their source.
    #[error("can't read the migrations: {0}")]
    Source(String),
    /// The database has migrations already.
    #[error(
        "the database has migrations already, and they stay as they are. The proof needs a \
         database of its own, which nothing was migrated in."
    )]
    NotFresh,
    /// A setting of the [`Prover`] names a version that no migration has.
    #[error("no migration has the version {0}")]
    NoSuchVersion(String),
    /// A migration failed.
    #[error("{name}: {direction}.sql failed {}: {report}", at(*phase))]
    #[expect(missing_docs, reason = "the names say it")]
    Failed {
        name: String,
        direction: Direction,
        phase: Phase,
        report: String,
    },
    /// The rows of the test could not be inserted.
    #[error("the rows for {name} could not be inserted: {report}")]
    #[expect(missing_docs, reason = "the names say it")]
    Rows {
        name: String,
        report: Box<ServerReport>,
    },
    /// After a step the schema is not the one that it should be. `differences` are lines that are
    /// missing (`-`) and lines that should not be there (`+`).
    #[error(
        "{name}: {}, {}:\n{}",
        after(*direction), at(*phase), differences.join("\n")
    )]
    #[expect(missing_docs, reason = "the names say it")]
    Schema {
        name: String,
        direction: Direction,
        phase: Phase,
        differences: Vec<String>,
    },
    /// Rows or values of older tables are not as before.
    #[error(
        "{name}: {direction}.sql loses or changes rows of tables that were there before, {}:\n{}\n\
         If that is meant, name the table with Prover::changes.",
        at(*phase), changes.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    )]
    #[expect(missing_docs, reason = "the names say it")]
    Lost {
        name: String,
        direction: Direction,
        phase: Phase,
        changes: Vec<RowChange>,
    },
    /// `schema.rs` is not the one of the migrations. Has the difference as a unified diff.
    #[error("{file} is not that of the migrations. Run `diesel print-schema`, or by hand:\n{diff}")]
    #[expect(missing_docs, reason = "the names say it")]
    SchemaFile { file: String, diff: String },
    /// The Diesel CLI is not installed, or fails.
    #[error("diesel print-schema failed: {0}. It needs the Diesel CLI in PATH.")]
    Diesel(String),
    /// A file can't be read.
    #[error("{file}: {source}")]
    #[expect(missing_docs, reason = "the names say it")]
    File { file: String, source: io::Error },
    /// A query of the prover failed.
    #[error("{doing} failed: {report}")]
    #[expect(missing_docs, reason = "the names say it")]
    Database {
        doing: &'static str,
        report: Box<ServerReport>,
    },
}

impl fmt::Debug for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// When a step was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// The migration was the newest, without rows of its own.
    Up,
    /// All were applied, and the newer ones were reverted.
    Down,
}

/// Rows of a table that are not as before a step.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub struct RowChange {
    pub table: String,
    /// `None` if the number of rows changed, or a value without a change of its column's number.
    pub column: Option<String>,
    pub rows_before: usize,
    /// Of a column: the number of values that are as before.
    pub rows_after: usize,
}

impl fmt::Display for RowChange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            table,
            rows_before: before,
            rows_after: after,
            ..
        } = self;
        match &self.column {
            None => write!(formatter, "{table}: {before} rows before, {after} after"),
            Some(column) => write!(
                formatter,
                "{table}.{column}: {after} of {before} values are as before"
            ),
        }
    }
}

fn at(phase: Phase) -> &'static str {
    match phase {
        Phase::Up => "as the newest migration",
        Phase::Down => "with the rows of all migrations",
    }
}

fn after(direction: Direction) -> &'static str {
    match direction {
        Direction::Up => "up.sql after down.sql does not build the schema of the first time",
        Direction::Down => "down.sql does not undo up.sql",
    }
}

/// What was proved.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Proof {
    /// Names of the migrations that were reverted, oldest first.
    pub reverted: Vec<String>,
    /// Tables that had no row when all migrations were applied: what happens to their rows is not
    /// proved.
    pub without_rows: Vec<String>,
}

/// Proves that all migrations can be reverted, without rows. See the [module](self).
///
/// `url` is a database where nothing is migrated; its role may do what the migrations do. At the
/// end it is as before, but for an empty `__diesel_schema_migrations`. After an error it stays
/// where the proof stopped.
///
/// # Errors
/// Any. The first that is found.
pub fn reversible(migrations: impl MigrationSource<Pg>, url: &str) -> Result<Proof, Error> {
    Prover::new(migrations).prove(url)
}

type Rows<'a> = Box<dyn FnOnce(&mut PgConnection) -> QueryResult<()> + 'a>;

/// As [`reversible`], with rows and with exceptions.
pub struct Prover<'a> {
    source: Box<dyn MigrationSource<Pg> + 'a>,
    rows: BTreeMap<String, Rows<'a>>,
    changes: BTreeSet<(String, String)>,
    one_way: BTreeSet<String>,
}

impl<'a> Prover<'a> {
    /// Creates a prover of these migrations.
    pub fn new(migrations: impl MigrationSource<Pg> + 'a) -> Self {
        Self {
            source: Box::new(migrations),
            rows: BTreeMap::new(),
            changes: BTreeSet::new(),
            one_way: BTreeSet::new(),
        }
    }

    /// Inserts rows once `version` is applied: `|conn| conn.batch_execute("INSERT …")`. The newer
    /// migrations run on them.
    #[must_use]
    pub fn rows(
        mut self,
        version: &str,
        insert: impl FnOnce(&mut PgConnection) -> QueryResult<()> + 'a,
    ) -> Self {
        self.rows.insert(version.to_owned(), Box::new(insert));
        self
    }

    /// Excepts the rows of a table, such as `public.users`, or the values of a column, such as
    /// `public.users.email`, from what `version` must bring back.
    #[must_use]
    pub fn changes(mut self, version: &str, what: &str) -> Self {
        self.changes.insert((version.to_owned(), what.to_owned()));
        self
    }

    /// Excepts a migration that nobody can revert. It is only applied, and on the way down it is
    /// the end.
    #[must_use]
    pub fn one_way(mut self, version: &str) -> Self {
        self.one_way.insert(version.to_owned());
        self
    }

    /// Proves. As [`reversible`].
    ///
    /// # Errors
    /// Any. The first that is found.
    pub fn prove(mut self, url: &str) -> Result<Proof, Error> {
        let migrations = load(&*self.source)?;
        let count = migrations.names().len();
        self.check_versions(&migrations)?;
        let mut database = Connections::open(url)?;
        let applied = database.migrations.applied_migrations();
        if !applied
            .map_err(|error| Error::Source(error.to_string()))?
            .is_empty()
        {
            return Err(Error::NotFresh);
        }

        let mut states = vec![database.state()?];
        for index in 0..count {
            let known = migrations.get(index);
            let before = &states[index];
            database.step(known, Direction::Up, Phase::Up)?;
            let after = database.state()?;
            if !self.one_way.contains(&known.version) {
                database.step(known, Direction::Down, Phase::Up)?;
                let check = Check {
                    known,
                    phase: Phase::Up,
                    changes: &self.changes,
                };
                let found = database.state()?;
                check.schema(Direction::Down, before, &found)?;
                check.rows(Direction::Down, before, &found)?;
                database.step(known, Direction::Up, Phase::Up)?;
                let found = database.state()?;
                check.schema(Direction::Up, &after, &found)?;
            }
            if let Some(insert) = self.rows.remove(&known.version) {
                insert(&mut database.migrations).map_err(|error| Error::Rows {
                    name: known.name.clone(),
                    report: Box::new(ServerReport::new(&error, "", &[])),
                })?;
            }
            states.push(State {
                schema: after.schema,
                ..database.state()?
            });
        }

        let mut proof = Proof {
            reverted: Vec::new(),
            without_rows: states[count].empty_tables(),
        };
        for index in (0..count).rev() {
            let known = migrations.get(index);
            if self.one_way.contains(&known.version) {
                break;
            }
            let check = Check {
                known,
                phase: Phase::Down,
                changes: &self.changes,
            };
            let (before, after) = (&states[index], &states[index + 1]);
            let applied = database.state()?.within(before);
            database.step(known, Direction::Down, Phase::Down)?;
            let first = database.state()?;
            check.schema(Direction::Down, before, &first)?;
            check.rows(Direction::Down, &applied, &first)?;
            database.step(known, Direction::Up, Phase::Down)?;
            let again = database.state()?;
            check.schema(Direction::Up, after, &again)?;
            check.rows(Direction::Up, &applied, &again)?;
            database.step(known, Direction::Down, Phase::Down)?;
            let second = database.state()?;
            check.schema(Direction::Down, before, &second)?;
            check.rows(Direction::Down, &first, &second)?;
            proof.reverted.insert(0, known.name.clone());
        }
        Ok(proof)
    }

    fn check_versions(&self, migrations: &Migrations) -> Result<(), Error> {
        let known = (0..migrations.names().len()).map(|index| &migrations.get(index).version);
        let known: BTreeSet<&String> = known.collect();
        let changes = self.changes.iter().map(|(version, _)| version);
        let mut named = self.rows.keys().chain(&self.one_way).chain(changes);
        match named.find(|version| !known.contains(version)) {
            Some(version) => Err(Error::NoSuchVersion(version.clone())),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Prover<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Prover").finish_non_exhaustive()
    }
}

/// Compares `file`, such as `src/schema.rs`, with what `diesel print-schema` prints for the
/// migrations. The Diesel CLI runs in the current folder, for a test that of its package, with the
/// `diesel.toml` there.
///
/// `url` is a database of the test's own. The pending migrations are applied, and stay.
///
/// # Errors
/// Any, but those of the proof.
pub fn schema_file(
    migrations: impl MigrationSource<Pg>,
    url: &str,
    file: impl AsRef<Path>,
) -> Result<(), Error> {
    let file = file.as_ref();
    let conninfo = Conninfo::parse(url).map_err(|error| Error::Connect(error.to_owned()))?;
    let mut connection = connect(&conninfo)?;
    let run = connection.run_pending_migrations(migrations);
    run.map_err(|error| Error::Source(error.to_string()))?;
    // Not as an argument, which other users of the machine can see.
    let output = Command::new("diesel")
        .arg("print-schema")
        .env("DATABASE_URL", url)
        .output()
        .map_err(|error| Error::Diesel(error.to_string()))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(Error::Diesel(conninfo.conceal(text.trim())));
    }
    let name = file.display().to_string();
    let committed = std::fs::read_to_string(file).map_err(|source| Error::File {
        file: name.clone(),
        source,
    })?;
    let printed = String::from_utf8_lossy(&output.stdout);
    let (committed, printed) = (
        committed.replace("\r\n", "\n"),
        printed.replace("\r\n", "\n"),
    );
    if committed == printed {
        return Ok(());
    }
    let diff = TextDiff::from_lines(&committed, &printed);
    let diff = diff
        .unified_diff()
        .header(&name, "the migrations")
        .to_string();
    Err(Error::SchemaFile { file: name, diff })
}

fn load(source: &dyn MigrationSource<Pg>) -> Result<Migrations, Error> {
    Migrations::load(source).map_err(|error| Error::Source(error.to_string()))
}

fn connect(conninfo: &Conninfo) -> Result<PgConnection, Error> {
    PgConnection::establish(&conninfo.secret_url())
        .map_err(|error| Error::Connect(conninfo.conceal(&error.to_string())))
}

fn database(doing: &'static str) -> impl Fn(diesel::result::Error) -> Error {
    move |error| Error::Database {
        doing,
        report: Box::new(ServerReport::new(&error, "", &[])),
    }
}

/// The migrations have a session of their own: some leave a setting in it.
struct Connections {
    migrations: PgConnection,
    reader: PgConnection,
}

impl Connections {
    fn open(url: &str) -> Result<Self, Error> {
        let conninfo = Conninfo::parse(url).map_err(|error| Error::Connect(error.to_owned()))?;
        let mut migrations = connect(&conninfo)?;
        migrations
            .setup()
            .map_err(database("creating __diesel_schema_migrations"))?;
        Ok(Self {
            migrations,
            reader: connect(&conninfo)?,
        })
    }

    fn step(&mut self, known: &Known, direction: Direction, phase: Phase) -> Result<(), Error> {
        let migration = &known.migration;
        let done = match direction {
            Direction::Up => self.migrations.run_migration(migration),
            Direction::Down => self.migrations.revert_migration(migration),
        };
        done.map(drop).map_err(|error| Error::Failed {
            name: known.name.clone(),
            direction,
            phase,
            report: match error.downcast_ref::<diesel::result::Error>() {
                Some(error) => ServerReport::new(error, "", &[]).to_string(),
                None => error.to_string(),
            },
        })
    }

    fn state(&mut self) -> Result<State, Error> {
        let read = |connection: &mut PgConnection| {
            sql_query(PINNED).execute(connection)?;
            // Without rows that a policy hides, there is no proof.
            connection.batch_execute("SET LOCAL row_security = off")?;
            let schemas: Vec<Name> = sql_query(
                "SELECT nspname::text AS name FROM pg_namespace
                 WHERE nspname <> 'information_schema' AND nspname !~ '^pg_'",
            )
            .load(connection)?;
            let mut schema: BTreeSet<String> = BTreeSet::new();
            for Name { name } in schemas {
                let lines = Lines::read(connection, &name, None)?.to_string();
                sql_query(PINNED).execute(connection)?;
                let place = if name == "public" {
                    String::new()
                } else {
                    format!("{name}: ")
                };
                schema.extend(lines.lines().map(|line| format!("{place}{line}")));
            }
            let others: Vec<Line> = sql_query(include_str!("prover.sql")).load(connection)?;
            let others = others.into_iter().collect::<Lines>().to_string();
            schema.extend(others.lines().map(str::to_owned));
            Ok(State {
                schema,
                tables: tables(connection)?,
            })
        };
        let mut transaction = self
            .reader
            .build_transaction()
            .read_only()
            .repeatable_read();
        transaction
            .run(read)
            .map_err(database("reading the schema and the rows"))
    }
}

#[derive(QueryableByName)]
struct Name {
    #[diesel(sql_type = Text)]
    name: String,
}

#[derive(QueryableByName)]
struct Columns {
    #[diesel(sql_type = Text)]
    name: String,
    #[diesel(sql_type = Array<Text>)]
    columns: Vec<String>,
}

#[derive(QueryableByName)]
struct Row {
    #[diesel(sql_type = Array<Nullable<Text>>)]
    texts: Vec<Option<String>>,
}

/// The schema, and the rows of its tables by the table's name.
struct State {
    schema: BTreeSet<String>,
    tables: BTreeMap<String, Table>,
}

struct Table {
    columns: Vec<String>,
    rows: Vec<Vec<Option<String>>>,
}

fn tables(connection: &mut PgConnection) -> QueryResult<BTreeMap<String, Table>> {
    let tables: Vec<Columns> = sql_query(
        "SELECT format('%I.%I', n.nspname, c.relname) AS name,
                array_remove(array_agg(quote_ident(a.attname) ORDER BY a.attnum), NULL) AS columns
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
         WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition
             AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
             AND c.relname <> '__diesel_schema_migrations'
         GROUP BY c.oid, n.oid",
    )
    .load(connection)?;
    let read = |Columns { name, columns }| {
        let texts = columns.iter().map(|column| format!("t.{column}::text"));
        let texts = texts.collect::<Vec<_>>().join(", ");
        let rows: Vec<Row> = sql_query(format!(
            "SELECT ARRAY[{texts}]::text[] AS texts FROM {name} AS t"
        ))
        .load(connection)?;
        let rows = rows.into_iter().map(|row| row.texts).collect();
        Ok((name, Table { columns, rows }))
    };
    tables.into_iter().map(read).collect()
}

impl State {
    fn empty_tables(&self) -> Vec<String> {
        let empty = self
            .tables
            .iter()
            .filter(|(_, table)| table.rows.is_empty());
        empty.map(|(name, _)| name.clone()).collect()
    }

    /// Leaves the tables and columns that `older` has too.
    fn within(mut self, older: &Self) -> Self {
        self.tables = self
            .tables
            .into_iter()
            .filter_map(|(name, table)| {
                let table = table.project(&older.tables.get(&name)?.columns);
                Some((name, table))
            })
            .collect();
        self
    }
}

impl Table {
    /// Returns the rows in those of the columns that the table has.
    fn project(&self, columns: &[String]) -> Self {
        let places: Vec<usize> = columns
            .iter()
            .filter_map(|column| self.columns.iter().position(|own| own == column))
            .collect();
        let pick = |row: &Vec<Option<String>>| places.iter().map(|&at| row[at].clone()).collect();
        let mut rows: Vec<Vec<Option<String>>> = self.rows.iter().map(pick).collect();
        rows.sort_unstable();
        Self {
            columns: places.iter().map(|&at| self.columns[at].clone()).collect(),
            rows,
        }
    }

    /// Returns how `found` differs, in the columns of both.
    fn changes(&self, name: &str, found: Option<&Self>) -> Vec<RowChange> {
        let change = |column: Option<&String>, before, after| RowChange {
            table: name.to_owned(),
            column: column.cloned(),
            rows_before: before,
            rows_after: after,
        };
        // A table that went is the schema's business: whoever compares rows has compared it.
        let Some(found) = found else {
            return Vec::new();
        };
        let found = found.project(&self.columns);
        let before = self.project(&found.columns);
        if before.rows == found.rows {
            return Vec::new();
        }
        let total = before.rows.len();
        if total != found.rows.len() {
            return vec![change(None, total, found.rows.len())];
        }
        let column_changes = before.columns.iter().filter_map(|column| {
            let one = std::slice::from_ref(column);
            let (before, found) = (before.project(one).rows, found.project(one).rows);
            let same = common(&before, &found);
            (same < total).then(|| change(Some(column), total, same))
        });
        let mut changes: Vec<RowChange> = column_changes.collect();
        if changes.is_empty() {
            // Each column has its values, in other rows.
            changes.push(change(None, total, common(&before.rows, &found.rows)));
        }
        changes
    }
}

/// Returns how many items two sorted lists have in common.
fn common<T: Ord>(one: &[T], other: &[T]) -> usize {
    let mut counts: BTreeMap<&T, usize> = BTreeMap::new();
    for item in one {
        *counts.entry(item).or_default() += 1;
    }
    let found = other.iter().filter(|item| match counts.get_mut(item) {
        Some(left) if *left > 0 => {
            *left -= 1;
            true
        }
        _ => false,
    });
    found.count()
}

/// Compares states around a step of a migration.
struct Check<'a> {
    known: &'a Known,
    phase: Phase,
    changes: &'a BTreeSet<(String, String)>,
}

impl Check<'_> {
    fn schema(&self, direction: Direction, expected: &State, found: &State) -> Result<(), Error> {
        let missing = expected.schema.difference(&found.schema);
        let extra = found.schema.difference(&expected.schema);
        let differences: Vec<String> = missing
            .map(|line| format!("- {line}"))
            .chain(extra.map(|line| format!("+ {line}")))
            .collect();
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::Schema {
            name: self.known.name.clone(),
            direction,
            phase: self.phase,
            differences,
        })
    }

    fn rows(&self, direction: Direction, before: &State, found: &State) -> Result<(), Error> {
        let is_excepted = |what: String| self.changes.contains(&(self.known.version.clone(), what));
        let tables = before.tables.iter();
        let changes = tables.flat_map(|(name, table)| table.changes(name, found.tables.get(name)));
        let changes: Vec<RowChange> = changes
            .filter(|change| {
                let column = change.column.as_ref();
                !(is_excepted(change.table.clone())
                    || column
                        .is_some_and(|column| is_excepted(format!("{}.{column}", change.table))))
            })
            .collect();
        if changes.is_empty() {
            return Ok(());
        }
        Err(Error::Lost {
            name: self.known.name.clone(),
            direction,
            phase: self.phase,
            changes,
        })
    }
}
