//! A PostgreSQL for development and tests that needs no set-up.
//!
//! With `DATABASE_URL` set, [`Server::from_env`] uses that server and makes databases of its own there. Otherwise it
//! starts a private server from the installed binaries (`BRUHMCP_PG_BIN` names their folder if it isn't found, or isn't
//! the one to use). Whatever becomes of this process, a panic or a `kill -9` included, what it made is removed again.
//!
//! ```no_run
//! let server = bruhmcp_devdb::Server::from_env()?;
//! let database = server.create_database()?;
//! println!("psql '{}'", database.url());
//! # Ok::<(), bruhmcp_devdb::Error>(())
//! ```
#![deny(missing_docs)]

use std::collections::hash_map::RandomState;
use std::env;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::hash::{BuildHasher, Hasher};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use diesel::connection::{Connection, SimpleConnection};
use diesel::pg::PgConnection;

use crate::account::Account;
use crate::url::Url;

mod account;
mod find;
mod url;

/// Why there is no server or no database. No text holds a password.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no server to use and none to start.
    #[error(
        "no PostgreSQL found: install its server and client programs (Debian, Ubuntu: `apt-get install postgresql`; \
         macOS: `brew install postgresql@17`), or set BRUHMCP_PG_BIN to the folder they are in, or set DATABASE_URL to a \
         server to use"
    )]
    NotFound,
    /// Run by root, who can't run a server, on a machine without an account that can.
    #[error(
        "PostgreSQL does not run as root, and there is neither an account `postgres` nor `nobody` to run it as"
    )]
    NoAccount,
    /// `DATABASE_URL` can't be read; the reason is in it.
    #[error("DATABASE_URL can't be read: {0}")]
    Url(&'static str),
    /// The server refuses a connection.
    #[error("can't connect to the server: {0}")]
    Connect(#[from] diesel::ConnectionError),
    /// The server refuses a `CREATE DATABASE`.
    #[error("can't create a database: {0}")]
    Create(#[from] diesel::result::Error),
    /// A program of PostgreSQL failed.
    #[error("{program} failed: {output}")]
    Program {
        /// Its file name.
        program: String,
        /// What it said, on both of its outputs.
        output: String,
    },
    /// The operating system refuses something.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Its answer.
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

/// A running server. Dropping it stops a private server and removes its data; of a server named by `DATABASE_URL` it
/// drops the databases made here.
pub struct Server {
    admin: Url,
    bin_dir: PathBuf,
    /// Begins the name of each database made here.
    prefix: String,
    next: AtomicU32,
    private: Option<Private>,
    _guardian: Guardian,
}

impl Server {
    /// The server of `DATABASE_URL` if that is set and not empty, otherwise a new private one.
    ///
    /// On the former this connects to no other database than the URL's own, and there only to create and drop databases.
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

    /// The server at `url`, used with that URL's role, which needs the right to create databases.
    ///
    /// # Errors
    /// The URL can't be read, or there are no client programs.
    pub fn shared(url: &str) -> Result<Self, Error> {
        let admin = Url::parse(url)?;
        let prefix = unique_name();
        let bin_dir = find::folder_with(find::CLIENT);
        let guardian = match &bin_dir {
            // Without psql only a normal end drops the databases.
            Err(_) => Guardian(None),
            Ok(bin_dir) => {
                let mut command = Command::new("sh");
                if let Some(password) = admin.password() {
                    command.env("PGPASSWORD", password);
                }
                let psql = bin_dir.join("psql");
                Guardian::start(
                    command,
                    &[
                        "shared".as_ref(),
                        prefix.as_ref(),
                        &psql,
                        admin.public().as_ref(),
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

    /// A new private server with settings added to those that make it quick (and unsafe for data that matters), as in
    /// `[("max_connections", "20")]`.
    ///
    /// It listens on a socket only, in a folder of mode 0700, and trusts whoever gets there. That is the server's account
    /// and root, who could read and write the data files as well: a password would keep nobody out.
    ///
    /// # Errors
    /// No PostgreSQL is found, or it doesn't start.
    pub fn private(settings: &[(&str, &str)]) -> Result<Self, Error> {
        let bin_dir = find::folder_with(find::SERVER)?;
        let account = Account::for_server()?;
        let prefix = unique_name();
        // 104 octets is what macOS has for a socket's path; `/.s.PGSQL.5432` and a NUL take 15. An account other than
        // one's own may be kept out of the temporary folder that the environment names.
        let mut folder = env::temp_dir().join(&prefix);
        if account.is_other() || folder.as_os_str().len() > 104 - 15 {
            folder = Path::new("/tmp").join(&prefix);
        }
        // Before there is anything to clean up.
        let guardian = Guardian::start(
            account.command("sh"),
            &["private".as_ref(), &folder, &bin_dir.join("pg_ctl")],
        )?;
        let private = Private {
            account,
            folder,
            bin_dir: bin_dir.clone(),
        };
        private.initialise(settings)?;
        private.start()?;
        let admin = Url::of_socket(&private.folder.to_string_lossy());
        Ok(Self {
            admin,
            bin_dir,
            prefix,
            next: AtomicU32::new(0),
            private: Some(private),
            _guardian: guardian,
        })
    }

    /// An empty database.
    ///
    /// # Errors
    /// The server is out of reach, or the role may not create databases.
    pub fn create_database(&self) -> Result<Database, Error> {
        // template1 may hold what an administrator put there.
        self.create("template0")
    }

    /// A copy of `template`, which nobody may be connected to.
    ///
    /// # Errors
    /// As [`create_database`](Self::create_database), or somebody is connected to `template`.
    pub fn create_database_from(&self, template: &Database) -> Result<Database, Error> {
        self.create(template.name())
    }

    fn create(&self, template: &str) -> Result<Database, Error> {
        let name = format!(
            "{}_{}",
            self.prefix,
            self.next.fetch_add(1, Ordering::Relaxed)
        );
        PgConnection::establish(&self.admin.secret())?
            .batch_execute(&format!("CREATE DATABASE {name} TEMPLATE {template}"))?;
        Ok(Database {
            url: self.admin.with_database(&name),
            admin: self.admin.clone(),
            bin_dir: self.bin_dir.clone(),
        })
    }

    /// The folder of `psql` and `pg_dump`; of the server's programs too if it is a private one.
    ///
    /// # Errors
    /// They aren't installed.
    pub fn bin_dir(&self) -> Result<&Path, Error> {
        if self.bin_dir.as_os_str().is_empty() {
            Err(Error::NotFound)
        } else {
            Ok(&self.bin_dir)
        }
    }

    /// The process id of a private server that runs.
    pub fn postmaster_pid(&self) -> Option<u32> {
        let file = fs::read_to_string(self.private.as_ref()?.data().join("postmaster.pid")).ok()?;
        file.lines().next()?.parse().ok()
    }

    /// The folder that holds all of a private server.
    pub fn folder(&self) -> Option<&Path> {
        self.private
            .as_ref()
            .map(|private| private.folder.as_path())
    }

    /// Stops a private server until [`start_again`](Self::start_again): `immediate` as in a crash, otherwise after it
    /// has broken off all sessions and written everything out. Does nothing to a server named by `DATABASE_URL`.
    ///
    /// # Errors
    /// It doesn't run, or doesn't stop within 60 seconds.
    pub fn stop(&self, immediate: bool) -> Result<(), Error> {
        let mode = if immediate { "immediate" } else { "fast" };
        self.private
            .as_ref()
            .map_or(Ok(()), |private| private.pg_ctl(&["stop", "-m", mode]))
    }

    /// Starts a private server that was stopped or killed. Does nothing to a server named by `DATABASE_URL`.
    ///
    /// # Errors
    /// It runs already, or doesn't come up within 60 seconds.
    pub fn start_again(&self) -> Result<(), Error> {
        self.private.as_ref().map_or(Ok(()), Private::start)
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_tuple("Server")
            .field(&self.admin.public())
            .finish()
    }
}

/// A database of a [`Server`], dropped with this value whoever is still connected.
pub struct Database {
    url: Url,
    admin: Url,
    bin_dir: PathBuf,
}

impl Database {
    /// Its URL, with the password if the server's URL has one.
    pub fn url(&self) -> String {
        self.url.secret()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.url.database
    }

    /// A client program (`psql`, `pg_dump`) with the arguments that make it use this database. The password is passed
    /// through the environment, for a list of processes shows arguments.
    pub fn client(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin_dir.join(program));
        command.arg("--dbname").arg(self.url.public());
        if let Some(password) = self.url.password() {
            command.env("PGPASSWORD", password);
        }
        command
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_tuple("Database")
            .field(&self.url.public())
            .finish()
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // What fails here is left to the guardian: the server may be stopped, or gone before its databases.
        if let Ok(mut connection) = PgConnection::establish(&self.admin.secret()) {
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
        // By a program, so that the folder belongs to the server's account from the start.
        run(self
            .account
            .command("mkdir")
            .args(["-m", "700"])
            .arg(&self.folder))?;
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
            // synchronous_commit stays on: an immediate stop must lose nothing that was committed. Without fsync it
            // costs next to nothing.
            ("fsync", "off"),
            ("full_page_writes", "off"),
            // A client that was killed leaves no statement running.
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
        self.pg_ctl(&["start", "-l", &log.to_string_lossy()])
            .map_err(|error| match error {
                // pg_ctl itself only says to look there.
                Error::Program { output, .. } => Error::Program {
                    program: "postgres".to_owned(),
                    output: fs::read_to_string(log)
                        .ok()
                        .filter(|text| !text.is_empty())
                        .unwrap_or(output),
                },
                other => other,
            })
    }

    fn pg_ctl(&self, arguments: &[&str]) -> Result<(), Error> {
        let mut command = self.account.command(self.bin_dir.join("pg_ctl"));
        run(command
            .args(arguments)
            .args(["-w", "-t", "60", "-D"])
            .arg(self.data()))
    }
}

/// The shell that cleans up once the pipe to it closes. Rust opens pipes close-on-exec: no other child keeps it open.
struct Guardian(Option<Child>);

impl Guardian {
    fn start(mut command: Command, arguments: &[&Path]) -> Result<Self, Error> {
        use std::os::unix::process::CommandExt;

        let child = command
            .args(["-c", include_str!("guardian.sh"), "bruhmcp-devdb-guardian"])
            .args(arguments)
            .current_dir("/")
            .stdin(Stdio::piped())
            // Whoever reads this process's output needn't wait for the guardian's end.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Ctrl-C at a terminal reaches a whole process group.
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
            // It can only fail for a child that somebody else has waited for.
            let _ = child.wait();
        }
    }
}

/// A name for a folder and for databases that no other process has: short, and no quotes needed in SQL.
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
