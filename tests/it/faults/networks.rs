//! Cut networks, signals, busy tables, servers that are full or old, and what a user types.

use std::io::{BufRead, BufReader, Read};
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bruhmcp_db::migrations::{Event, Runner};

use super::*;

/// Runs a program that prepares a scenario.
fn must(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn signal(child: &Child, signal: &str) {
    must("kill", &[signal, &child.id().to_string()]);
}

/// Calls `work` when the program has told `words`, and returns its outcome.
fn when_told(words: &str, mut run: Child, work: impl FnOnce(&Child)) -> Outcome {
    let mut told = BufReader::new(run.stderr.take().unwrap());
    let mut err = String::new();
    while !err.contains(words) {
        assert_ne!(told.read_line(&mut err).unwrap(), 0, "{err}");
    }
    work(&run);
    told.read_to_string(&mut err).unwrap();
    Outcome { err, ..ended(run) }
}

/// A network of two: this machine, and a namespace in which a client runs.
struct Network {
    namespace: String,
    link: String,
    address: Ipv4Addr,
}

impl Network {
    /// Returns `None` where it can't be made.
    fn new() -> Option<Self> {
        let id = std::process::id();
        let [_, _, third, fourth] = id.to_be_bytes();
        let address = |last| Ipv4Addr::new(10, 213, third, (fourth & 0xFC) + last);
        let network = Self {
            namespace: format!("bruhmcp{id}"),
            link: format!("bm{id}"),
            address: address(1),
        };
        let Self {
            namespace, link, ..
        } = &network;
        let made = Command::new("ip")
            .args(["netns", "add", namespace])
            .stderr(Stdio::null())
            .status();
        if !made.is_ok_and(|status| status.success()) {
            return None;
        }
        let peer = format!("{link}p");
        let here = format!("{}/30", network.address);
        let there = format!("{}/30", address(2));
        for command in [
            format!("link add {link} type veth peer name {peer} netns {namespace}"),
            format!("addr add {here} dev {link}"),
            format!("link set {link} up"),
            format!("-n {namespace} addr add {there} dev {peer}"),
            format!("-n {namespace} link set {peer} up"),
        ] {
            must("ip", &command.split(' ').collect::<Vec<_>>());
        }
        Some(network)
    }

    /// From now on nothing arrives, in both directions.
    fn cut(&self) {
        must("ip", &["link", "set", &self.link, "down"]);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // The link goes with the namespace.
        let _ = Command::new("ip")
            .args(["netns", "delete", &self.namespace])
            .status();
    }
}

/// Lets clients of these addresses connect by TCP.
fn trust(server: &Server, database: &Database, addresses: &str) {
    let rules = format!("local all all trust\nhost all all {addresses} trust\n");
    fs::write(server.folder().unwrap().join("data/pg_hba.conf"), rules).unwrap();
    query(database, "SELECT pg_reload_conf()");
}

#[test]
fn partition() {
    let Some(network) = Network::new() else {
        return crate::support::skipped("a network namespace needs root and iproute2");
    };
    let address = network.address.to_string();
    let server = Server::private(&[("listen_addresses", &address)]).unwrap();
    let database = with_user(&server);
    trust(&server, &database, "10.213.0.0/16");
    let holder = hold_users(&database);
    let run = Command::new("ip")
        .args(["netns", "exec", &network.namespace])
        .arg(env!("CARGO_BIN_EXE_bruhmcp-db"))
        .arg("run")
        .env(
            "DATABASE_URL",
            format!("postgresql://postgres@{address}/{}", database.name()),
        )
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    until_stuck(&database);
    network.cut();
    let begin = Instant::now();
    let outcome = ended(run);
    assert!(begin.elapsed() < Duration::from_secs(45), "{outcome:?}");
    until("the end of the runner's session", || {
        query(&database, &format!("SELECT count(*) {RUNNERS}")) == "0"
    });
    assert!(begin.elapsed() < Duration::from_secs(45));
    drop(holder);
    let reported = said(&outcome);
    Row {
        test: "partition",
        fault: "the network is cut in the middle of 002, in both directions, without a word",
        reported: format!("within 45 s {reported}<br>The server ends the session by then, too."),
        after: state(&database),
        then: finish(&database),
    }
    .check();
}

#[test]
fn sigterm_in_transaction() {
    let database = with_user(&SERVER);
    let holder = hold_users(&database);
    let run = stuck_run(&database, &[]);
    signal(&run, "-TERM");
    let outcome = ended(run);
    drop(holder);
    Row::of(
        "sigterm_in_transaction",
        "SIGTERM in the middle of 002",
        &outcome,
        &database,
    )
    .check();
}

/// In a namespace of processes, where the default action of a signal does not apply to the first.
#[test]
fn ctrl_c_as_process_1() {
    let unshare = ["--pid", "--fork", "--kill-child"];
    let probe = Command::new("unshare").args(unshare).arg("true").output();
    if !probe.is_ok_and(|output| output.status.success()) {
        return crate::support::skipped("a namespace of processes needs root and util-linux");
    }
    let database = with_user(&SERVER);
    let holder = hold_users(&database);
    let run = Command::new("unshare")
        .args(unshare)
        .arg(env!("CARGO_BIN_EXE_bruhmcp-db"))
        .arg("run")
        .env("DATABASE_URL", database.url())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    until_stuck(&database);
    let children = format!("/proc/{0}/task/{0}/children", run.id());
    let child = fs::read_to_string(children).unwrap();
    must("kill", &["-INT", child.trim()]);
    let outcome = ended(run);
    drop(holder);
    Row::of(
        "ctrl_c_as_process_1",
        "Ctrl-C in the middle of 002, as process 1 of a container",
        &outcome,
        &database,
    )
    .check();
}

#[test]
fn sigterm_while_waiting() {
    let database = with_user(&SERVER);
    let holder = hold_users(&database);
    let first = stuck_run(&database, &[]);
    let waiting = start(&database.url(), &["run"]);
    let outcome = when_told("Waiting for", waiting, |run| signal(run, "-TERM"));
    drop(holder);
    assert_eq!(ended(first).code, Some(0));
    Row::of(
        "sigterm_while_waiting",
        "SIGTERM while the run waits for another runner",
        &outcome,
        &database,
    )
    .check();
}

/// Returns the outcome of a library's run, with what the binary prints.
fn outcome_of(mut runner: Runner) -> Outcome {
    let result = runner.run();
    Outcome {
        code: Some(result.is_err().into()),
        out: String::new(),
        err: result.map_or_else(|error| error.to_string(), |_| String::new()),
    }
}

#[test]
fn stopped_between() {
    let database = SERVER.create_database().unwrap();
    let folder = Folder::new(&[
        ("001_a", "CREATE TABLE a ()", "DROP TABLE a"),
        ("002_b", "CREATE TABLE b ()", "DROP TABLE b"),
    ]);
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let runner = folder
        .runner_at(&database.url())
        .stop_flag(stop)
        .on_event(move |event| {
            if let Event::Finished(_) = event {
                flag.store(true, Ordering::Relaxed);
            }
        });
    let outcome = outcome_of(runner);
    assert_eq!(
        query(
            &database,
            "SELECT to_regclass('a') IS NOT NULL AND to_regclass('b') IS NULL"
        ),
        "t"
    );
    assert_eq!(custom(&database, &folder).code, Some(0));
    Row {
        test: "stopped_between",
        fault: "SIGTERM between two migrations (by the flag that the signal sets)",
        reported: said(&outcome),
        after: "applied to 001".into(),
        then: "exit 0, complete".into(),
    }
    .check();
}

/// A table and an index on it that is built outside a transaction.
fn index_folder() -> Folder {
    Folder::new(&[
        ("001_a", "CREATE TABLE a (b int)", "DROP TABLE a"),
        (
            "002_index",
            "CREATE INDEX CONCURRENTLY a_b_idx ON a (b)",
            "DROP INDEX a_b_idx",
        ),
    ])
    .without_transaction("002_index")
}

/// Opens a transaction that `CREATE INDEX CONCURRENTLY` waits for.
fn old_snapshot(database: &Database) -> PgConnection {
    let mut connection = PgConnection::establish(&database.url()).unwrap();
    connection
        .batch_execute("SET application_name = 'a report'; BEGIN ISOLATION LEVEL REPEATABLE READ; TABLE pg_class")
        .unwrap();
    connection
}

#[test]
fn stopped_outside_transaction() {
    let database = SERVER.create_database().unwrap();
    let folder = index_folder();
    let old = old_snapshot(&database);
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let runner = folder
        .runner_at(&database.url())
        .stop_flag(stop)
        .on_event(move |event| {
            if let Event::Blocked(..) = event {
                flag.store(true, Ordering::Relaxed);
            }
        });
    let outcome = outcome_of(runner);
    drop(old);
    assert!(
        outcome
            .err
            .contains("DROP INDEX CONCURRENTLY public.a_b_idx;"),
        "{outcome:?}"
    );
    query(&database, "DROP INDEX CONCURRENTLY public.a_b_idx;");
    assert_eq!(custom(&database, &folder).code, Some(0));
    Row {
        test: "stopped_outside_transaction",
        fault: "Ctrl-C during CREATE INDEX CONCURRENTLY (by the flag that the signal sets)",
        reported: said(&outcome),
        after: "applied to 001, with an INVALID index".into(),
        then: "after that DROP INDEX: exit 0, complete".into(),
    }
    .check();
}

#[test]
fn old_snapshot_beside_index() {
    let database = SERVER.create_database().unwrap();
    let folder = index_folder();
    let old = old_snapshot(&database);
    let log = Arc::new(Mutex::new(Vec::new()));
    let writer = Arc::clone(&log);
    let mut runner = folder.runner_at(&database.url()).on_event(move |event| {
        if let Event::Blocked(name, blockers) = event {
            let who = (blockers[0].application.clone(), blockers[0].state.clone());
            writer.lock().unwrap().push((name.to_owned(), who));
        }
    });
    thread::scope(|scope| {
        let run = scope.spawn(move || runner.run());
        // Longer than the lock_timeout of a migration in a transaction.
        thread::sleep(Duration::from_secs(6));
        assert!(!run.is_finished());
        drop(old);
        assert_eq!(run.join().unwrap().unwrap().steps.len(), 2);
    });
    let who = (
        Some("a report".to_owned()),
        Some("idle in transaction".to_owned()),
    );
    assert_eq!(*log.lock().unwrap(), [("002_index".to_owned(), who)]);
    let again = folder.runner_at(&database.url()).run().unwrap();
    assert!(again.steps.is_empty());
    Row {
        test: "old_snapshot_beside_index",
        fault: "CREATE INDEX CONCURRENTLY beside a transaction that is open for more than 5 s",
        reported: "who blocks it; exit 0 when that transaction ends".into(),
        after: "all applied".into(),
        then: "exit 0, nothing to do".into(),
    }
    .check();
}

#[test]
fn table_released() {
    let database = with_user(&SERVER);
    let holder = hold_users(&database);
    let run = start(&database.url(), &["run"]);
    let outcome = when_told("Next try", run, |_| drop(holder));
    assert!(
        outcome
            .err
            .contains("002_mcp_tables waits for server process "),
        "{outcome:?}"
    );
    assert_eq!(outcome.out.matches("applied   002_mcp_tables").count(), 1);
    Row::of(
        "table_released",
        "another session locks a table for more than 5 s and then releases it",
        &outcome,
        &database,
    )
    .check();
}

#[test]
fn time_limit() {
    let database = with_user(&SERVER);
    let holder = hold_users(&database);
    let outcome = ended(stuck_run(&database, &["--timeout", "3"]));
    drop(holder);
    Row::of(
        "time_limit",
        "the run reaches --timeout in the middle of 002",
        &outcome,
        &database,
    )
    .check();
}

#[test]
fn too_many_connections() {
    let server = Server::private(&[("max_connections", "10")]).unwrap();
    let database = with_user(&server);
    let mut connections = Vec::new();
    while let Ok(connection) = PgConnection::establish(&database.url()) {
        connections.push(connection);
    }
    let outcome = bruhmcp(&database.url(), &["run"]);
    let run = start(&database.url(), &["run", "--wait", "3600"]);
    let refused = || {
        let log = fs::read_to_string(server.folder().unwrap().join("log")).unwrap();
        log.matches("too many clients").count()
    };
    let before = refused();
    until("more tries of the runner", || refused() > before + 9);
    drop(connections);
    let waited = ended(run);
    assert_eq!(waited.code, Some(0), "{waited:?}");
    Row {
        test: "too_many_connections",
        fault: "the server has no connection left",
        reported: said(&outcome),
        after: "unchanged".into(),
        then: format!("with --wait, before one is free: {}", finish(&database)),
    }
    .check();
}

#[test]
fn unknown_host() {
    let begin = Instant::now();
    let outcome = bruhmcp(
        "postgresql://postgres@no-such-host.invalid/x",
        &["run", "--wait", "2"],
    );
    assert!(begin.elapsed() > Duration::from_secs(2), "{outcome:?}");
    assert_eq!(outcome.code, Some(6), "{outcome:?}");
    assert!(outcome.err.contains("no-such-host.invalid"), "{outcome:?}");

    // In a namespace where /etc/hosts is another file.
    let unshare = ["--mount", "sh", "-ec"];
    let probe = Command::new("unshare").args(unshare).arg(":").output();
    if !probe.is_ok_and(|output| output.status.success()) {
        return crate::support::skipped("a namespace of mounts needs root and util-linux");
    }
    let [_, second, third, fourth] = std::process::id().to_be_bytes();
    let address = Ipv4Addr::new(127, second | 1, third, fourth | 1).to_string();
    let server = Server::private(&[("listen_addresses", &address)]).unwrap();
    let database = with_user(&server);
    trust(&server, &database, "127.0.0.0/8");
    let hosts = std::env::temp_dir().join(format!("{}_hosts", database.name()));
    fs::write(&hosts, "").unwrap();
    let url = format!(
        "postgresql://postgres@no-such-host.invalid/{}",
        database.name()
    );
    let mut run = Command::new("unshare")
        .args(unshare)
        .arg(r#"mount --bind "$0" /etc/hosts; exec "$1" run --wait 3600"#)
        .arg(&hosts)
        .arg(env!("CARGO_BIN_EXE_bruhmcp-db"))
        .env("DATABASE_URL", url)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    thread::sleep(Duration::from_secs(1));
    assert!(run.try_wait().unwrap().is_none());
    fs::write(&hosts, format!("{address} no-such-host.invalid\n")).unwrap();
    let waited = ended(run);
    fs::remove_file(&hosts).unwrap();
    assert_eq!(waited.code, Some(0), "{waited:?}");
    Row {
        test: "unknown_host",
        fault: "a host name that does not resolve, with --wait 2 (a container that starts first)",
        reported: "after 2 s exit 6: no connection, with libpq's reason".into(),
        after: "unchanged".into(),
        then: format!("with the name known in that time: {}", finish(&database)),
    }
    .check();
}

#[test]
fn timeouts_of_the_role() {
    let database = with_user(&SERVER);
    // Before the settings, which would end its session.
    let holder = hold_users(&database);
    for setting in [
        "statement_timeout = '300ms'",
        "idle_in_transaction_session_timeout = '100ms'",
        "lock_timeout = '10ms'",
    ] {
        query(
            &database,
            &format!("ALTER DATABASE {} SET {setting}", database.name()),
        );
    }
    let run = stuck_run(&database, &[]);
    thread::sleep(Duration::from_secs(1));
    drop(holder);
    let outcome = ended(run);
    let line = outcome.err.lines().next().unwrap().to_owned();
    Row {
        test: "timeouts_of_the_role",
        fault: "a statement_timeout and other timeouts of the role or database, shorter than a migration",
        reported: said(&Outcome { err: line, ..outcome }),
        after: state(&database),
        then: finish(&database),
    }
    .check();
}

#[test]
fn output_that_cannot_be_written() {
    let database = with_user(&SERVER);
    let to_full = |arguments: &[&str]| -> Outcome {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        Command::new(env!("CARGO_BIN_EXE_bruhmcp-db"))
            .env("DATABASE_URL", database.url())
            .args(arguments)
            .stdout(full)
            .output()
            .unwrap()
            .into()
    };
    // Its own code, where that is not 0.
    assert_eq!(to_full(&["verify", "--json"]).code, Some(3));
    let outcome = to_full(&["run"]);
    let after = state(&database);
    // A reader that has gone is no error.
    let piped = Command::new("sh")
        .args(["-c", "{ \"$0\" plan --sql; echo $? >&2; } | true"])
        .arg(env!("CARGO_BIN_EXE_bruhmcp-db"))
        .env("DATABASE_URL", SERVER.create_database().unwrap().url())
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(piped.stderr).unwrap(), "0\n");
    Row {
        test: "output_that_cannot_be_written",
        fault: "standard output can't be written (/dev/full)",
        reported: format!(
            "{}<br>A closed pipe (`\\| head`) is no error.",
            said(&outcome)
        ),
        after,
        then: finish(&database),
    }
    .check();
}

#[test]
fn password_in_arguments() {
    let mut reported = Vec::new();
    for arguments in [
        &["postgres://u:hush@h/d", "status"][..],
        &["status", "--database-ulr", "postgres://u:hush@h/d"],
        &["--database-url=postgres://u:hush@h:x/d", "status", "--json"],
        &[
            "--database-url=postgres://u:hush@no-such-host.invalid/d",
            "status",
            "--json",
        ],
    ] {
        let outcome = bruhmcp("", arguments);
        assert!(!format!("{outcome:?}").contains("hush"), "{outcome:?}");
        reported.push(said(&outcome));
    }
    let database = with_user(&SERVER);
    let run = bruhmcp("", &["--database-url", &database.url(), "run"]);
    assert_eq!(run.code, Some(0), "{run:?}");
    Row {
        test: "password_in_arguments",
        fault: "a URL in the wrong place of the arguments",
        reported: format!("{}<br>No password, here and with other slips.", reported[0]),
        after: "unchanged".into(),
        then: format!("with --database-url or DATABASE_URL: {}", finish(&database)),
    }
    .check();
}

#[test]
fn service_file() {
    let database = with_user(&SERVER);
    let file = std::env::temp_dir().join(format!("{}_service", database.name()));
    let folder = SERVER.folder().unwrap().display();
    fs::write(
        &file,
        format!("[here]\nhost={folder}\nport=5432\nuser=postgres\n"),
    )
    .unwrap();
    // The database's name comes from the environment.
    let run = |service: &str| -> Outcome {
        Command::new(env!("CARGO_BIN_EXE_bruhmcp-db"))
            .env("DATABASE_URL", format!("service={service}"))
            .env("PGSERVICEFILE", &file)
            .env("PGDATABASE", database.name())
            .arg("run")
            .output()
            .unwrap()
            .into()
    };
    let outcome = run("nowhere");
    let after = state(&database);
    assert_eq!(run("here").code, Some(0));
    fs::remove_file(&file).unwrap();
    Row {
        test: "service_file",
        fault: "DATABASE_URL is service=…, and the service file lacks it",
        reported: said(&outcome).replace(&*file.to_string_lossy(), "…"),
        after,
        then: format!("with the service, and PGDATABASE: {}", finish(&database)),
    }
    .check();
}

/// A server of PostgreSQL 13, from the folder of programs that `BRUHMCP_PG_13` names.
#[test]
fn old_server() {
    let Some(programs) = std::env::var_os("BRUHMCP_PG_13") else {
        return crate::support::skipped("BRUHMCP_PG_13 is not set");
    };
    let folder = PathBuf::from(format!("/tmp/bruhmcp_{}", uuid::Uuid::new_v4().simple()));
    let as_server = |program: &str, arguments: &[&str]| {
        let program = Path::new(&programs).join(program);
        let mut command = Command::new("runuser");
        command.args(["-u", "postgres", "--"]).arg(program);
        let output = command.args(arguments).current_dir("/").output().unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    let path = folder.to_str().unwrap();
    as_server(
        "initdb",
        &["-A", "trust", "-N", "-U", "postgres", "-D", path],
    );
    let options = format!("-c listen_addresses= -c unix_socket_directories={path} -p 5432");
    let log = format!("{path}/log");
    as_server(
        "pg_ctl",
        &["start", "-w", "-D", path, "-l", &log, "-o", &options],
    );
    let url = format!("postgresql:///postgres?host={path}&port=5432&user=postgres");
    let outcome = bruhmcp(&url, &["run"]);
    let status = bruhmcp(&url, &["status"]);
    as_server("pg_ctl", &["stop", "-m", "immediate", "-D", path]);
    fs::remove_dir_all(&folder).unwrap();
    assert_eq!(status.code, Some(3), "{status:?}");
    Row {
        test: "old_server",
        fault: "a server of PostgreSQL 13",
        reported: format!("{}<br>`status` works.", said(&outcome)),
        after: "unchanged".into(),
        then: "the same".into(),
    }
    .check();
}
