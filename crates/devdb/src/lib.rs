#![doc = include_str!("../README.md")]
#![deny(missing_docs)]

use std::collections::hash_map::RandomState;
use std::env;
use std::fmt;
use std::fs::{self, DirBuilder, OpenOptions};
use std::hash::{BuildHasher, Hasher};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use diesel::connection::{Connection, SimpleConnection};
use diesel::pg::PgConnection;
use diesel::sql_types::Text;
use diesel::{RunQueryDsl, sql_query};
use libpq_conninfo::Conninfo;

use crate::account::Account;

mod account;
mod find;

/// The longest path of a folder with a socket. macOS allows 104 bytes for that of the socket;
/// `/.s.PGSQL.5432` and a NUL take 15.
const LONGEST: usize = 104 - 15;

/// Why there is no server or no database. No text contains a password.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No PostgreSQL programs are installed.
    #[error(
        "no PostgreSQL found: install its server and client programs (Debian, Ubuntu: \
         `apt-get install postgresql`; macOS: `brew install postgresql@17`), set BRUHMCP_PG_BIN to \
         their folder, or set DATABASE_URL to a server to use"
    )]
    NotFound,
    /// The process runs as root, and there is no other account for the server.
    #[error(
        "PostgreSQL refuses to run as root, and there is no account `postgres` or `nobody` to run \
         it as"
    )]
    NoAccount,
    /// The path of a lasting server's folder is too long for a Unix-domain socket in it.
    #[error("{0:?} is too long for the path of a socket's folder, {LONGEST} bytes: name another")]
    LongPath(PathBuf),
    /// `DATABASE_URL` can't be read. The text says how to write one.
    #[error("can't read DATABASE_URL: {0}")]
    Url(&'static str),
    /// The server refuses a connection.
    #[error("can't connect to the server: {0}")]
    Connect(String),
    /// The server refuses a `CREATE DATABASE`.
    #[error("can't create a database: {0}")]
    Create(#[from] diesel::result::Error),
    /// A PostgreSQL program failed.
    #[error("{program} failed: {output}")]
    Program {
        /// File name.
        program: String,
        /// Its output.
        output: String,
    },
    /// The operating system returned an error.
    #[error("{what}: {source}")]
    Io {
        /// The file or program concerned.
        what: String,
        /// The error.
        source: io::Error,
    },
}

impl Error {
    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            what: what.into(),
            source,
        }
    }
}

/// A running server. Dropping it stops a private server and removes its data; a lasting one goes on.
pub struct Server {
    admin: Conninfo,
    bin_dir: PathBuf,
    /// Prefix of the names of its databases.
    prefix: String,
    next: AtomicU32,
    private: Option<Private>,
    _guardian: Guardian,
}

impl Server {
    /// Returns the server of `DATABASE_URL` if that is set and not empty, otherwise a new private
    /// one.
    ///
    /// # Errors
    /// No PostgreSQL is found, it doesn't start, or the URL can't be read.
    pub fn from_env() -> Result<Self, Error> {
        match env::var("DATABASE_URL") {
            Ok(url) if !url.is_empty() => Self::shared(&url),
            Ok(_) | Err(env::VarError::NotPresent) => Self::private(&[]),
            Err(env::VarError::NotUnicode(_)) => Err(Error::Url("it is not UTF-8")),
        }
    }

    /// Returns the server at `url`. Its role must be allowed to create databases. Connections to
    /// the database of `url` only create and drop databases.
    ///
    /// # Errors
    /// The URL can't be read.
    pub fn shared(url: &str) -> Result<Self, Error> {
        let admin = Conninfo::parse(url).map_err(Error::Url)?;
        let prefix = unique_name();
        let bin_dir = find::folder_with(find::CLIENT);
        let guardian = match &bin_dir {
            // Without psql, the databases of a killed process stay.
            Err(_) => Guardian(None),
            Ok(bin_dir) => {
                let mut command = Command::new("sh");
                if let Some(password) = admin.get("password") {
                    command.env("PGPASSWORD", password);
                }
                let psql = bin_dir.join("psql");
                Guardian::start(
                    command,
                    &[
                        "shared".as_ref(),
                        prefix.as_ref(),
                        &psql,
                        admin.public_url().as_ref(),
                    ],
                )?
            }
        };
        let bin_dir = bin_dir.unwrap_or_default();
        Ok(Self {
            admin,
            bin_dir,
            prefix,
            next: AtomicU32::new(0),
            private: None,
            _guardian: guardian,
        })
    }

    /// Starts a private server with additional settings, such as `[("max_connections", "20")]`. It
    /// is fast and loses data in a crash of the machine.
    ///
    /// It listens only on a Unix-domain socket, without a password. Only its account and root reach
    /// the socket's folder, and they could read the data files anyway.
    ///
    /// # Errors
    /// No PostgreSQL is found, or it doesn't start.
    pub fn private(settings: &[(&str, &str)]) -> Result<Self, Error> {
        let bin_dir = find::folder_with(find::SERVER)?;
        let account = Account::for_server()?;
        let prefix = unique_name();
        // Another account may have no access to the temporary folder of this one.
        let mut folder = env::temp_dir().join(&prefix);
        if account.is_other() || folder.as_os_str().len() > LONGEST {
            folder = Path::new("/tmp").join(&prefix);
        }
        // Started before there is anything to clean up.
        let guardian = Guardian::start(
            account.command("sh"),
            &["private".as_ref(), &folder, &bin_dir.join("pg_ctl")],
        )?;
        let private = Private {
            account,
            folder,
            bin_dir,
        };
        private.initialise(settings)?;
        private.start()?;
        Ok(Self::of_folder(private, prefix, guardian))
    }

    /// Returns the server in `folder`, for development: created the first time, started if it is
    /// not running. It outlives this process, and keeps its data in a crash of the machine. To
    /// remove it, [`stop`](Self::stop) it and remove the folder.
    ///
    /// Only its account and root reach it, as with a [private](Self::private) one.
    ///
    /// # Errors
    /// No PostgreSQL is found, it doesn't start, or the account of the server can't reach `folder`.
    pub fn lasting(folder: &Path) -> Result<Self, Error> {
        let bin_dir = find::folder_with(find::SERVER)?;
        let folder = std::path::absolute(folder).map_err(Error::io(folder.to_string_lossy()))?;
        if folder.as_os_str().len() > LONGEST {
            return Err(Error::LongPath(folder));
        }
        let server = |folder: &Path| -> Result<Private, Error> {
            Ok(Private {
                account: Account::for_server()?,
                folder: folder.to_owned(),
                bin_dir: bin_dir.clone(),
            })
        };
        if !folder.exists() {
            // Under another name until it is whole.
            let mut new = folder.clone().into_os_string();
            new.push(".unfinished");
            let new = PathBuf::from(new);
            if new.exists() {
                fs::remove_dir_all(&new).map_err(Error::io(new.to_string_lossy()))?;
            }
            server(&new)?.initialise(&[
                // Of the data: right after a move, too.
                ("unix_socket_directories", ".."),
                ("fsync", "on"),
                ("full_page_writes", "on"),
            ])?;
            fs::rename(&new, &folder).map_err(Error::io(folder.to_string_lossy()))?;
        }
        let private = server(&folder)?;
        if !private.is_running()? {
            private.start()?;
        }
        Ok(Self::of_folder(private, unique_name(), Guardian(None)))
    }

    fn of_folder(private: Private, prefix: String, guardian: Guardian) -> Self {
        let admin = Conninfo::default()
            .with("dbname", "postgres")
            .with("host", &private.folder.to_string_lossy())
            // Otherwise PGPORT would apply.
            .with("port", "5432")
            .with("user", "postgres");
        Self {
            admin,
            bin_dir: private.bin_dir.clone(),
            prefix,
            next: AtomicU32::new(0),
            private: Some(private),
            _guardian: guardian,
        }
    }

    /// Creates an empty database.
    ///
    /// # Errors
    /// The server is out of reach, or the role may not create databases.
    pub fn create_database(&self) -> Result<Database, Error> {
        // template1 may contain an administrator's objects.
        self.create("template0")
    }

    /// Creates a copy of `template`.
    ///
    /// # Errors
    /// As [`create_database`](Self::create_database), or a session is connected to `template`.
    pub fn create_database_from(&self, template: &Database) -> Result<Database, Error> {
        self.create(template.name())
    }

    fn create(&self, template: &str) -> Result<Database, Error> {
        let name = format!(
            "{}_{}",
            self.prefix,
            self.next.fetch_add(1, Ordering::Relaxed)
        );
        self.connect()?
            .batch_execute(&format!("CREATE DATABASE {name} TEMPLATE {template}"))?;
        Ok(self.named(&name, false))
    }

    /// Returns the database of this name, created empty if there is none. Dropping the value does
    /// not drop the database.
    ///
    /// # Errors
    /// The server is out of reach, or the role may not create databases.
    pub fn lasting_database(&self, name: &str) -> Result<Database, Error> {
        let connection = &mut self.connect()?;
        let exists = sql_query("SELECT FROM pg_database WHERE datname = $1")
            .bind::<Text, _>(name)
            .execute(connection)?;
        if exists == 0 {
            let quoted = name.replace('"', "\"\"");
            connection
                .batch_execute(&format!("CREATE DATABASE \"{quoted}\" TEMPLATE template0"))?;
        }
        Ok(self.named(name, true))
    }

    fn connect(&self) -> Result<PgConnection, Error> {
        PgConnection::establish(&self.admin.secret_url())
            .map_err(|error| Error::Connect(self.admin.conceal(&error.to_string())))
    }

    fn named(&self, name: &str, stays: bool) -> Database {
        Database {
            conninfo: self.admin.clone().with("dbname", name),
            name: name.to_owned(),
            admin: self.admin.clone(),
            bin_dir: self.bin_dir.clone(),
            stays,
        }
    }

    /// Returns the folder of `psql` and `pg_dump`, and of a private server's programs.
    ///
    /// # Errors
    /// They are not installed.
    pub fn bin_dir(&self) -> Result<&Path, Error> {
        if self.bin_dir.as_os_str().is_empty() {
            Err(Error::NotFound)
        } else {
            Ok(&self.bin_dir)
        }
    }

    /// Returns the process id of a running private server.
    pub fn postmaster_pid(&self) -> Option<u32> {
        let file = fs::read_to_string(self.private.as_ref()?.data().join("postmaster.pid")).ok()?;
        file.lines().next()?.parse().ok()
    }

    /// Returns the folder of a private server.
    pub fn folder(&self) -> Option<&Path> {
        self.private
            .as_ref()
            .map(|private| private.folder.as_path())
    }

    /// Stops a private server: `immediate` as in a crash, otherwise by ending all sessions and
    /// writing all data. Does nothing to a server of `DATABASE_URL`.
    ///
    /// # Errors
    /// It is not running, or doesn't stop within 60 seconds.
    pub fn stop(&self, immediate: bool) -> Result<(), Error> {
        let mode = if immediate { "immediate" } else { "fast" };
        self.private
            .as_ref()
            .map_or(Ok(()), |private| private.pg_ctl(&["stop", "-m", mode]))
    }

    /// Starts a stopped or killed private server. Does nothing to a server of `DATABASE_URL`.
    ///
    /// # Errors
    /// It is running already, or doesn't start within 60 seconds.
    pub fn start_again(&self) -> Result<(), Error> {
        self.private.as_ref().map_or(Ok(()), Private::start)
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_tuple("Server")
            .field(&self.admin.public_url())
            .finish()
    }
}

/// A database of a [`Server`]. Dropping it drops the database and ends its sessions, unless it is a
/// [lasting](Server::lasting_database) one.
pub struct Database {
    conninfo: Conninfo,
    name: String,
    admin: Conninfo,
    bin_dir: PathBuf,
    stays: bool,
}

impl Database {
    /// Returns its URL, password included.
    pub fn url(&self) -> String {
        self.conninfo.secret_url()
    }

    /// Returns its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns a command for a client program (`psql`, `pg_dump`) on this database. The password is
    /// in its environment, not in its arguments, which other users of the machine can see.
    pub fn client(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin_dir.join(program));
        command.arg("--dbname").arg(self.conninfo.public_url());
        if let Some(password) = self.conninfo.get("password") {
            command.env("PGPASSWORD", password);
        }
        command
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_tuple("Database")
            .field(&self.conninfo.public_url())
            .finish()
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        if self.stays {
            return;
        }
        // If this fails, the guardian does it: the server may be stopped now.
        if let Ok(mut connection) = PgConnection::establish(&self.admin.secret_url()) {
            let _ = connection.batch_execute(&format!(
                "DROP DATABASE IF EXISTS {} WITH (FORCE)",
                self.name()
            ));
        }
    }
}

struct Private {
    account: Account,
    folder: PathBuf,
    bin_dir: PathBuf,
}

impl Private {
    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    fn initialise(&self, settings: &[(&str, &str)]) -> Result<(), Error> {
        let make = || {
            DirBuilder::new().mode(0o700).create(&self.folder)?;
            self.account.give(&self.folder)
        };
        make().map_err(Error::io(self.folder.to_string_lossy()))?;
        run(self
            .account
            .command(self.bin_dir.join("initdb"))
            .args([
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
                "--username=postgres",
                "--pgdata",
            ])
            .arg(self.data()))?;

        let socket_folder = self.folder.to_string_lossy();
        let defaults = [
            ("listen_addresses", ""),
            ("port", "5432"),
            ("unix_socket_directories", &*socket_folder),
            ("max_connections", "200"),
            ("shared_buffers", "64MB"),
            // synchronous_commit stays on: an immediate stop must not lose a commit. Without fsync
            // it is cheap.
            ("fsync", "off"),
            ("full_page_writes", "off"),
            // Ends the statement of a killed client.
            ("client_connection_check_interval", "1s"),
        ];
        let path = self.data().join("postgresql.conf");
        let mut file = OpenOptions::new()
            .append(true)
            .open(&path)
            .map_err(Error::io(path.to_string_lossy()))?;
        for (name, value) in defaults.iter().chain(settings) {
            writeln!(file, "{name} = '{}'", value.replace('\'', "''"))
                .map_err(Error::io(path.to_string_lossy()))?;
        }
        Ok(())
    }

    fn start(&self) -> Result<(), Error> {
        let log = self.folder.join("log");
        let read = || fs::read_to_string(&log).unwrap_or_default();
        let before = read().len();
        self.pg_ctl(&["start", "-l", &log.to_string_lossy()])
            .map_err(|error| match error {
                // pg_ctl only refers to the log.
                Error::Program { output, .. } => Error::Program {
                    program: "postgres".to_owned(),
                    output: read()
                        .get(before..)
                        .filter(|text| !text.is_empty())
                        .map_or(output, str::to_owned),
                },
                other => other,
            })
    }

    fn is_running(&self) -> Result<bool, Error> {
        let mut status = self.account.command(self.bin_dir.join("pg_ctl"));
        status.arg("status").arg("-D").arg(self.data());
        match run(&mut status) {
            Ok(()) => Ok(true),
            Err(Error::Program { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn pg_ctl(&self, arguments: &[&str]) -> Result<(), Error> {
        let mut command = self.account.command(self.bin_dir.join("pg_ctl"));
        run(command
            .args(arguments)
            .args(["-w", "-t", "60", "-D"])
            .arg(self.data()))
    }
}

/// A shell that cleans up when the pipe to it closes. Rust opens pipes close-on-exec, so no other
/// child keeps it open.
struct Guardian(Option<Child>);

impl Guardian {
    fn start(mut command: Command, arguments: &[&Path]) -> Result<Self, Error> {
        use std::os::unix::process::CommandExt;

        let child = command
            .args(["-c", include_str!("guardian.sh"), "bruhmcp-devdb-guardian"])
            .args(arguments)
            .current_dir("/")
            .stdin(Stdio::piped())
            // A reader of this process's output must not wait for the guardian.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Ctrl-C at a terminal ends the process group of this process.
            .process_group(0)
            .spawn()
            .map_err(Error::io("sh"))?;
        Ok(Self(Some(child)))
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            drop(child.stdin.take());
            // Fails only if the child has been waited for already.
            let _ = child.wait();
        }
    }
}

/// Returns a unique name for a folder and databases: short, and valid in SQL without quotes.
fn unique_name() -> String {
    let random = RandomState::new().build_hasher().finish();
    format!("bruhmcp_dev_{}_{:08x}", process::id(), random >> 32)
}

fn run(command: &mut Command) -> Result<(), Error> {
    let program = Path::new(command.get_program())
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let output = command
        .current_dir("/")
        .stdin(Stdio::null())
        .output()
        .map_err(Error::io(program.as_str()))?;
    if output.status.success() {
        return Ok(());
    }
    let output = [output.stdout, output.stderr].concat();
    Err(Error::Program {
        program,
        output: String::from_utf8_lossy(&output).trim().to_owned(),
    })
}
