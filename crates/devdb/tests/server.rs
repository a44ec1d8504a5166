//! Servers and databases are created, and removed however their process ends.
#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bruhmcp_devdb::{Database, Error, Server};

const WITH_DATABASE: &str = env!("CARGO_BIN_EXE_with-database");

/// Returns the rows of a query, one per line.
fn query(database: &Database, sql: &str) -> String {
    let output = database
        .client("psql")
        .args(["-XAtqc", sql])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn runs(pid: u32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        // An orphan stays a zombie if process 1 collects none, as in many containers.
        Ok(stat) => !stat.contains(") Z "),
        Err(_) if Path::new("/proc/self").exists() => false,
        Err(_) => Command::new("kill")
            .args(["-0", &pid.to_string()])
            .stderr(Stdio::null())
            .status()
            .unwrap()
            .success(),
    }
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < end, "not within 30 s: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Starts `with-database` with a shell that prints the result of `query` and waits to be killed.
fn start_with_database(database_url: &str, query: &str) -> (Child, String) {
    let script = format!(r#""$PSQL" -XAtqd "$DATABASE_URL" -c "{query}" && exec sleep 60"#);
    let mut child = Command::new(WITH_DATABASE)
        .args(["sh", "-c", &script])
        .env("DATABASE_URL", database_url)
        .env("PSQL", psql())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    (child, line.trim_end().to_owned())
}

fn psql() -> PathBuf {
    Server::private(&[])
        .unwrap()
        .bin_dir()
        .unwrap()
        .join("psql")
}

#[test]
fn databases_are_made_copied_and_dropped() {
    let server = Server::private(&[("work_mem", "5MB")]).unwrap();
    let template = server.create_database().unwrap();
    assert_eq!(query(&template, "SHOW work_mem"), "5MB\n");
    query(&template, "CREATE TABLE kept (a int)");
    let copy = server.create_database_from(&template).unwrap();
    assert_eq!(query(&copy, "SELECT count(*) FROM kept"), "0\n");

    let name = copy.name().to_owned();
    let count = format!("SELECT count(*) FROM pg_database WHERE datname = '{name}'");
    assert_eq!(query(&template, &count), "1\n");
    drop(copy);
    assert_eq!(query(&template, &count), "0\n");
}

#[test]
fn drop_leaves_nothing() {
    let server = Server::private(&[]).unwrap();
    let (pid, folder) = (
        server.postmaster_pid().unwrap(),
        server.folder().unwrap().to_owned(),
    );
    assert!(runs(pid) && folder.is_dir());
    drop(server);
    assert!(!folder.exists());
    eventually("the server is gone", || !runs(pid));
}

#[test]
fn a_panic_leaves_nothing() {
    let (sender, receiver) = mpsc::channel();
    let panicking = thread::spawn(move || {
        let server = Server::private(&[]).unwrap();
        let _database = server.create_database().unwrap();
        sender
            .send((
                server.postmaster_pid().unwrap(),
                server.folder().unwrap().to_owned(),
            ))
            .unwrap();
        panic!("on purpose");
    });
    assert!(panicking.join().is_err());
    let (pid, folder) = receiver.recv().unwrap();
    assert!(!folder.exists());
    eventually("the server is gone", || !runs(pid));
}

#[test]
fn a_kill_leaves_nothing() {
    let (mut child, folder) = start_with_database("", "SHOW unix_socket_directories");
    let postmaster = fs::read_to_string(Path::new(&folder).join("data/postmaster.pid")).unwrap();
    let pid: u32 = postmaster.lines().next().unwrap().parse().unwrap();
    assert!(runs(pid));

    // SIGKILL. The shell it started lives on, and must not keep the guardian's pipe open.
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("the server is gone", || !runs(pid));
    eventually("its folder is gone", || !Path::new(&folder).exists());
}

#[test]
fn a_server_stops_and_starts_again() {
    let server = Server::private(&[]).unwrap();
    let database = server.create_database().unwrap();
    query(&database, "CREATE TABLE kept (a int)");
    for immediate in [true, false] {
        let pid = server.postmaster_pid().unwrap();
        server.stop(immediate).unwrap();
        eventually("the server is gone", || !runs(pid));
        assert!(matches!(server.create_database(), Err(Error::Connect(_))));
        server.start_again().unwrap();
        assert_eq!(query(&database, "SELECT count(*) FROM kept"), "0\n");
    }
}

#[test]
fn a_wrong_setting_is_named() {
    let error = Server::private(&[("no_such_setting", "1")])
        .unwrap_err()
        .to_string();
    assert!(error.contains("no_such_setting"), "{error}");
}

#[test]
fn no_postgresql_is_one_sentence() {
    for (database_url, expected) in [
        ("", "no PostgreSQL found: install"),
        ("postgresql:///x?host=/nowhere", "/nowhere"),
    ] {
        let output = Command::new(WITH_DATABASE)
            .arg("true")
            .env("DATABASE_URL", database_url)
            .env("BRUHMCP_PG_BIN", "/nowhere")
            .output()
            .unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success());
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn the_command_gets_a_database_and_its_exit_code_is_passed_on() {
    let status = Command::new(WITH_DATABASE)
        .args(["sh", "-c", "exit 7"])
        .env("DATABASE_URL", "")
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(7));
}

/// A server with a role that may only create databases, and a password with odd characters.
fn somebody_elses_server() -> (Server, Database, String) {
    let server = Server::private(&[]).unwrap();
    let home = server.create_database().unwrap();
    query(
        &home,
        "CREATE ROLE developer LOGIN CREATEDB PASSWORD 'p@ss/w?rd'",
    );
    query(&home, "CREATE TABLE precious (a int)");
    let rules = server.folder().unwrap().join("data/pg_hba.conf");
    let with_password = "local all developer scram-sha-256\nlocal all all trust\n";
    fs::write(&rules, with_password).unwrap();
    query(&home, "SELECT pg_reload_conf()");
    // The new rules apply once the postmaster has handled the signal.
    let as_developer = home.url().replace("user=postgres", "user=developer");
    let refused = || {
        let attempt = Command::new(server.bin_dir().unwrap().join("psql"))
            .args(["-XwqAtc", "", &as_developer])
            .stderr(Stdio::null())
            .status();
        !attempt.unwrap().success()
    };
    eventually("passwords are asked for", refused);
    let host = server.folder().unwrap().display();
    let url = format!(
        "postgres://developer:p%40ss%2Fw%3Frd@/{}?host={host}&port=5432",
        home.name()
    );
    (server, home, url)
}

const DATABASES: &str = "SELECT string_agg(datname, ' ' ORDER BY datname) FROM pg_database";

#[test]
fn a_given_server_keeps_only_its_own() {
    let (_server, home, url) = somebody_elses_server();
    let before = query(&home, DATABASES);
    let dump = || {
        home.client("pg_dump")
            .arg("--schema-only")
            .output()
            .unwrap()
            .stdout
            .len()
    };
    let size = dump();
    {
        let guest = Server::shared(&url).unwrap();
        assert_eq!(guest.postmaster_pid(), None);
        let one = guest.create_database().unwrap();
        query(&one, "CREATE TABLE mine (a int)");
        let copy = guest.create_database_from(&one).unwrap();
        assert_eq!(
            query(
                &copy,
                "SELECT current_user FROM mine RIGHT JOIN (VALUES (1)) v ON true"
            ),
            "developer\n"
        );
        assert_ne!(query(&home, DATABASES), before);
        // The guardian drops this one.
        std::mem::forget(copy);
    }
    assert_eq!(query(&home, DATABASES), before);
    assert_eq!(dump(), size);
}

#[test]
fn a_kill_leaves_nothing_on_a_given_server() {
    let (_server, home, url) = somebody_elses_server();
    let before = query(&home, DATABASES);
    let (mut child, name) = start_with_database(&url, "SELECT current_database()");
    assert!(query(&home, DATABASES).contains(&name));
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("the database is gone", || query(&home, DATABASES) == before);
}

#[test]
fn errors_hold_no_password() {
    let (_server, _home, url) = somebody_elses_server();
    let wrong = url.replace("p%40ss", "secret");
    let database_error = Server::shared(&wrong)
        .unwrap()
        .create_database()
        .unwrap_err()
        .to_string();
    assert!(
        database_error.contains("password authentication failed"),
        "{database_error}"
    );
    let mut texts = vec![
        database_error,
        format!("{:?}", Server::shared(&wrong).unwrap()),
    ];

    for url in [
        "mysql://u:secret@h/d",
        "host=h password=secret secret",
        "postgresql://u:secret",
        "postgresql://u:secret/x@h/d",
        "postgresql://u:1/secret@h/d",
        "postgresql://u:x@secret@h/d",
        "postgresql://u:secret%zz@h/d",
        "postgresql://u@h/d?password=a&secret",
        "postgresql://u@h/d?password=a=secret",
    ] {
        let error = Server::shared(url).unwrap_err();
        assert!(matches!(error, Error::Url(_)), "{url}: {error}");
        texts.push(format!("{error} {error:?}"));
    }
    for text in texts {
        assert!(!text.contains("secret"), "{text}");
    }
}

/// Stops the server and removes the folder.
struct Lasting(PathBuf);

impl Drop for Lasting {
    fn drop(&mut self) {
        if self.0.join("data/postmaster.pid").exists() {
            Server::lasting(&self.0).unwrap().stop(true).unwrap();
        }
        fs::remove_dir_all(&self.0).unwrap();
    }
}

#[test]
fn a_lasting_server_stays_and_moves() {
    let folder = PathBuf::from(format!("/tmp/bruhmcp_lasting_{}", std::process::id()));
    // As an interrupted start leaves it.
    fs::create_dir_all(folder.with_extension("unfinished").join("data")).unwrap();
    let mut lasting = Lasting(folder.clone());
    let pid = {
        let server = Server::lasting(&folder).unwrap();
        let database = server.lasting_database("some \"name\"").unwrap();
        query(&database, "CREATE TABLE kept AS SELECT 1 AS a");
        server.postmaster_pid().unwrap()
    };
    assert!(runs(pid));
    let again = Server::lasting(&folder).unwrap();
    assert_eq!(again.postmaster_pid(), Some(pid));
    let database = again.lasting_database("some \"name\"").unwrap();
    assert_eq!(query(&database, "TABLE kept"), "1\n");
    assert_eq!(query(&database, "SHOW fsync"), "on\n");
    // Its other databases are dropped as always.
    let name = again.create_database().unwrap().name().to_owned();
    let left = format!("SELECT count(*) FROM pg_database WHERE datname = '{name}'");
    assert_eq!(query(&database, &left), "0\n");

    again.stop(false).unwrap();
    // Its last act is to remove the file that pg_ctl waits for.
    eventually("the server is gone", || !runs(pid));
    lasting.0 = folder.with_extension("moved");
    fs::rename(&folder, &lasting.0).unwrap();
    let moved = Server::lasting(&lasting.0).unwrap();
    let database = moved.lasting_database("some \"name\"").unwrap();
    assert_eq!(query(&database, "TABLE kept"), "1\n");

    let long = Path::new("/tmp").join("a".repeat(100));
    let refused = Server::lasting(&long).unwrap_err();
    assert!(matches!(refused, Error::LongPath(_)), "{refused}");
}
