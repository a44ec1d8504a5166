//! Databases for the tests: one server for the whole process, one database per test.

use std::cell::Cell;
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Barrier, LazyLock};
use std::thread;

use bruhmcp_db::migrations::MIGRATIONS;
use bruhmcp_devdb::{Database, Server};
use diesel::connection::SimpleConnection;
use diesel::dsl::{select, sql};
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_types::{Bool, Text};
use diesel_migrations::MigrationHarness;

static SERVER: LazyLock<Server> =
    LazyLock::new(|| Server::from_env().unwrap_or_else(|error| panic!("{error}")));

/// Migrated once, with the rights of production, then only copied.
static TEMPLATE: LazyLock<Database> = LazyLock::new(|| {
    let template = SERVER.create_database().unwrap();
    migrate(&template.url());
    if *ROLES {
        grant(&template.url());
    }
    template
});

/// As [`TEMPLATE`], with the tables in two cells, `c7` and `c8`, and none in `public`.
static CELLS: LazyLock<Database> = LazyLock::new(|| two_cells(&SERVER));

fn two_cells(server: &Server) -> Database {
    let database = server.create_database().unwrap();
    for cell in ["c7", "c8"] {
        create_cell(&database.url(), cell);
        let url = in_schema(&database.url(), cell);
        migrate(&url);
        if *ROLES {
            grant(&url);
        }
    }
    database
}

thread_local! {
    static IN_CELL: Cell<bool> = const { Cell::new(false) };
}

/// Refuses every write to the tables of a schema.
const CLOSED: &str = "
    CREATE FUNCTION refuse_write() RETURNS trigger LANGUAGE plpgsql AS
        $$BEGIN RAISE 'a write in another cell'; END$$;
    DO $$
    DECLARE name name;
    BEGIN
        FOR name IN
            SELECT relname FROM pg_class
             WHERE relnamespace = current_schema::regnamespace AND relkind IN ('r', 'p')
        LOOP
            EXECUTE format(
                'CREATE TRIGGER closed BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON %I
                     EXECUTE FUNCTION refuse_write()', name);
        END LOOP;
    END$$";

/// Runs a test of another module in the cell `c7`: there is the [`database`] that it gets. The cell
/// beside it is empty and refuses writes.
#[cfg(feature = "cli")]
pub(crate) fn in_cell(test: impl FnOnce()) {
    IN_CELL.set(true);
    test();
    IN_CELL.set(false);
}

/// Whether the server has loaded Citus.
static CITUS: LazyLock<bool> = LazyLock::new(|| {
    let is_loaded = "current_setting('citus.enable_schema_based_sharding', true) IS NOT NULL";
    let database = SERVER.create_database().unwrap();
    let conn = &mut PgConnection::establish(&database.url()).unwrap();
    select(sql::<Bool>(is_loaded)).get_result(conn).unwrap()
});

/// Creates the schema of a cell, on Citus as a distributed one.
pub(crate) fn create_cell(url: &str, name: &str) {
    let conn = &mut PgConnection::establish(url).unwrap();
    if *CITUS {
        conn.batch_execute(
            "CREATE EXTENSION IF NOT EXISTS citus;
             SET citus.enable_schema_based_sharding = on;
             DO $$BEGIN
                 EXECUTE format(
                     'ALTER DATABASE %I SET citus.enable_unsafe_triggers = on', current_database());
             END$$",
        )
        .unwrap();
    }
    conn.batch_execute(&format!(r#"CREATE SCHEMA "{name}""#))
        .unwrap();
}

/// The URL of a session whose `search_path` is this schema.
fn in_schema(url: &str, schema: &str) -> String {
    with_options(url, &format!("-csearch_path=\"{schema}\""))
}

fn with_options(url: &str, options: &str) -> String {
    let encoded = options
        .replace('%', "%25")
        .replace(' ', "%20")
        .replace('"', "%22")
        .replace('=', "%3D");
    let separator = if url.contains('?') { '&' } else { '?' };
    format!("{url}{separator}options={encoded}")
}

pub(crate) const ROLES_SQL: &str = include_str!("../../migrations/roles.sql");

/// Whether the tests have the roles of production: the server has both, or they can be created.
/// They belong to the whole server and stay there.
pub(crate) static ROLES: LazyLock<bool> = LazyLock::new(|| {
    let database = SERVER.create_database().unwrap();
    let usable = create_roles(&mut PgConnection::establish(&database.url()).unwrap());
    if !usable {
        tell("no roles app_user and app_admin: the tests run with the rights of the owner");
    }
    usable
});

/// Prints a line that the test harness doesn't capture.
fn tell(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Returns whether the server's role is a superuser, and says that the test is skipped if not.
pub(crate) fn superuser() -> bool {
    let is_superuser = empty_database().psql("SHOW is_superuser").unwrap() == "on\n";
    if !is_superuser {
        let name = thread::current().name().unwrap_or_default().to_owned();
        tell(&format!("{name} is skipped: needs a superuser"));
    }
    is_superuser
}

/// Returns whether the connection may act as both roles.
pub(crate) fn create_roles(conn: &mut PgConnection) -> bool {
    ["app_admin", "app_user"].into_iter().all(|role| {
        // Fails where the role exists, and for a role that may not create one.
        let _ = conn.batch_execute(&format!("CREATE ROLE {role} NOLOGIN ROLE CURRENT_USER"));
        conn.batch_execute(&format!("SET ROLE {role}; RESET ROLE"))
            .is_ok()
    })
}

fn migrate(url: &str) {
    PgConnection::establish(url)
        .unwrap()
        .run_pending_migrations(MIGRATIONS)
        .unwrap();
}

fn grant(url: &str) {
    PgConnection::establish(url)
        .unwrap()
        .batch_execute(ROLES_SQL)
        .unwrap();
}

/// Runs `work` as `app_admin`, whose part are the service registry and the audit log's clean-up.
pub(crate) fn as_admin<T>(conn: &mut PgConnection, work: impl FnOnce(&mut PgConnection) -> T) -> T {
    if !*ROLES {
        return work(conn);
    }
    let before: String = select(sql::<Text>("current_setting('role')"))
        .get_result(conn)
        .unwrap();
    conn.batch_execute("SET ROLE app_admin").unwrap();
    let result = work(conn);
    // Fails in a failed transaction, whose rollback does the same.
    let _ = conn.batch_execute(&format!("SET ROLE {before}"));
    result
}

/// A database that is dropped when the test ends.
pub(crate) struct TestDatabase {
    database: Arc<Database>,
    /// The schema of all that this value does.
    cell: Option<&'static str>,
}

/// A database with all migrations applied.
pub(crate) fn database() -> TestDatabase {
    if IN_CELL.get() {
        let cells = cells();
        cells.cell("c8").psql(CLOSED).unwrap();
        return cells.cell("c7");
    }
    SERVER.create_database_from(&TEMPLATE).unwrap().into()
}

/// A database with all migrations applied in each of the cells `c7` and `c8`.
pub(crate) fn cells() -> TestDatabase {
    if *CITUS {
        // What Citus knows about a database is not copied with it.
        return two_cells(&SERVER).into();
    }
    SERVER.create_database_from(&CELLS).unwrap().into()
}

/// As [`cells`], on a private server, with the roles of production.
#[cfg(all(feature = "cli", feature = "crypto", target_os = "linux"))]
pub(crate) fn cells_on(server: &Server) -> TestDatabase {
    let database = server.create_database().unwrap();
    create_roles(&mut PgConnection::establish(&database.url()).unwrap());
    two_cells(server).into()
}

/// As [`database`], on a private server.
pub(crate) fn database_on(server: &Server) -> TestDatabase {
    let database = server.create_database().unwrap();
    migrate(&database.url());
    create_roles(&mut PgConnection::establish(&database.url()).unwrap());
    grant(&database.url());
    database.into()
}

/// An empty database.
pub(crate) fn empty_database() -> TestDatabase {
    SERVER.create_database().unwrap().into()
}

/// The `up.sql` of each migration, in the order they run.
pub(crate) fn up_sql() -> Vec<PathBuf> {
    migration_files("up.sql")
}

/// The `down.sql` of each migration, in the order of [`up_sql`]; they run in reverse.
pub(crate) fn down_sql() -> Vec<PathBuf> {
    migration_files("down.sql")
}

fn migration_files(name: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/migrations")).unwrap();
    let folders = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir());
    let mut files: Vec<PathBuf> = folders.map(|folder| folder.join(name)).collect();
    files.sort();
    files
}

/// The program of an example, which `cargo test` builds beside the tests.
#[cfg(feature = "crypto")]
pub(crate) fn example(name: &str) -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let program = tests
        .ancestors()
        .nth(2)
        .unwrap()
        .join("examples")
        .join(name);
    assert!(
        program.is_file(),
        "{} is missing: `cargo build --examples` makes it, and so does `cargo test` without `--test`",
        program.display()
    );
    program
}

/// A program of the server's folder.
pub(crate) fn program(name: &str) -> PathBuf {
    SERVER.bin_dir().unwrap().join(name)
}

/// Says why a test is not run here. `script/test-servers` reads it.
#[expect(
    clippy::explicit_write,
    reason = "eprintln! is not shown for a test that passes"
)]
pub(crate) fn skipped(reason: &str) {
    let thread = thread::current();
    let test = thread.name().unwrap_or_default();
    writeln!(io::stderr(), "skipped {test}: {reason}").unwrap();
}

impl From<Database> for TestDatabase {
    fn from(database: Database) -> Self {
        Self {
            database: Arc::new(database),
            cell: None,
        }
    }
}

impl TestDatabase {
    /// The same database, where this schema is the `search_path` of every session.
    pub(crate) fn cell(&self, schema: &'static str) -> Self {
        Self {
            database: Arc::clone(&self.database),
            cell: Some(schema),
        }
    }

    /// Its name on the server.
    #[cfg(all(feature = "cli", feature = "crypto", target_os = "linux"))]
    pub(crate) fn name(&self) -> &str {
        self.database.name()
    }

    /// The owner's URL.
    pub(crate) fn url(&self) -> String {
        let url = self.database.url();
        self.cell.map_or(url.clone(), |cell| in_schema(&url, cell))
    }

    /// The URL of a service, which acts as `app_user`. Keeps what PGOPTIONS says.
    pub(crate) fn app_url(&self) -> String {
        if *ROLES {
            let mut options = env::var("PGOPTIONS").unwrap_or_default() + " -crole=app_user";
            if let Some(cell) = self.cell {
                options += &format!(" -csearch_path=\"{cell}\"");
            }
            with_options(&self.database.url(), &options)
        } else {
            self.url()
        }
    }

    /// The owner's URL with one more parameter.
    pub(crate) fn url_with(&self, parameter: &str) -> String {
        let url = self.url();
        let separator = if url.contains('?') { '&' } else { '?' };
        format!("{url}{separator}{parameter}")
    }

    /// Connects as `app_user`.
    pub(crate) fn connect(&self) -> PgConnection {
        PgConnection::establish(&self.app_url()).unwrap()
    }

    /// Connects as the owner, who may also prepare and see what no service may.
    pub(crate) fn connect_as_owner(&self) -> PgConnection {
        PgConnection::establish(&self.url()).unwrap()
    }

    /// Returns what `pg_dump` prints with these arguments; equal for equal contents.
    pub(crate) fn dump(&self, args: &[&str]) -> String {
        let mut dump = self.database.client("pg_dump");
        if let Some(cell) = self.cell {
            dump.arg(format!("--schema=\"{cell}\""));
        }
        let dump = result(dump.args(args).output().unwrap()).unwrap();
        // `\restrict` and `\unrestrict` have a random key.
        let lines = dump
            .split_inclusive('\n')
            .filter(|line| !line.contains("restrict ") || !line.starts_with('\\'));
        lines.collect()
    }

    /// Runs statements as the owner in one `psql`, each in its own transaction, until one fails.
    /// Rows have no header; fields are separated by `|`. The error is what `psql` prints, with
    /// SQLSTATE, DETAIL and HINT.
    pub(crate) fn psql(&self, sql: &str) -> Result<String, String> {
        feed(self.psql_command("-"), sql)
    }

    /// As [`psql`](Self::psql), with this schema as the `search_path` from the start.
    pub(crate) fn psql_in(&self, schema: &str, sql: &str) -> Result<String, String> {
        let mut psql = self.psql_command("-");
        psql.env("PGOPTIONS", format!("-csearch_path=\"{schema}\""));
        feed(psql, sql)
    }

    /// As [`psql`](Self::psql), with the statements of a file.
    pub(crate) fn psql_file(&self, path: &Path) -> Result<String, String> {
        result(self.psql_command(path).output().unwrap())
    }

    fn psql_command(&self, file: impl AsRef<OsStr>) -> Command {
        let mut psql = self.database.client("psql");
        if let Some(cell) = self.cell {
            psql.env("PGOPTIONS", format!("-csearch_path=\"{cell}\""));
        }
        psql.args([
            "-XAtq",
            "--set=ON_ERROR_STOP=1",
            "--set=VERBOSITY=verbose",
            "--file",
        ])
        .arg(file);
        psql
    }
}

fn feed(mut psql: Command, sql: &str) -> Result<String, String> {
    let mut child = psql
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    thread::scope(|scope| {
        // A psql that stopped at an error doesn't read the rest.
        scope.spawn(move || stdin.write_all(sql.as_bytes()));
        result(child.wait_with_output().unwrap())
    })
}

fn result(output: Output) -> Result<String, String> {
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).unwrap())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// Runs `work` in `threads` threads that start together, each with its number and its own
/// connection, and returns the results.
pub(crate) fn at_once<T: Send>(
    database: &TestDatabase,
    threads: usize,
    work: impl Fn(usize, &mut PgConnection) -> T + Sync,
) -> Vec<T> {
    let start = Barrier::new(threads);
    // All connect before any thread waits for the others.
    let connections: Vec<_> = (0..threads).map(|_| database.connect()).collect();
    thread::scope(|scope| {
        let (start, work) = (&start, &work);
        let running: Vec<_> = connections
            .into_iter()
            .enumerate()
            .map(|(number, mut conn)| {
                scope.spawn(move || {
                    start.wait();
                    work(number, &mut conn)
                })
            })
            .collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

#[test]
fn databases_are_apart() {
    let (one, other) = (database(), database());
    one.psql("CREATE TABLE of_one (a int); INSERT INTO of_one VALUES (1), (2)")
        .unwrap();
    assert_eq!(
        one.psql("SELECT a, -a FROM of_one ORDER BY a").unwrap(),
        "1|-1\n2|-2\n"
    );
    let error = other.psql("TABLE of_one").unwrap_err();
    assert!(error.contains("42P01"), "{error}");
    one.connect_as_owner()
        .batch_execute("DROP TABLE of_one")
        .unwrap();
    assert_eq!(one.dump(&[]), other.dump(&[]));
}

#[test]
fn an_empty_database_is_empty() {
    let objects = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace";
    assert_eq!(empty_database().psql(objects).unwrap(), "0\n");
}

#[test]
fn each_up_has_a_down() {
    assert_eq!(up_sql().len(), down_sql().len());
    for path in up_sql().iter().chain(&down_sql()) {
        assert!(path.is_file(), "{} is missing", path.display());
    }
}

#[test]
fn each_up_runs_alone_under_psql() {
    let database_by_psql = empty_database();
    for path in up_sql() {
        database_by_psql.psql_file(&path).unwrap();
    }
    let args = ["--exclude-table=__diesel_schema_migrations"];
    if *ROLES {
        database_by_psql.psql(ROLES_SQL).unwrap();
    }
    assert_eq!(database_by_psql.dump(&args), database().dump(&args));
}
