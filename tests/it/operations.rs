//! `docs/operations.md`: the commands of the page run here.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use bruhmcp_db::crypto::KeyRing;
use bruhmcp_db::enums::{AuditStatus, AuthTokenType, PaymentGateway};
use bruhmcp_db::models::*;
use bruhmcp_db::views::TokenAuditSummary;
use bruhmcp_db::{Durability, HashedToken, Isolation, Page, retry_transaction};
use bruhmcp_devdb::{Database, Server};
use chrono::{TimeDelta, Utc};
use diesel::connection::{AnsiTransactionManager, CacheSize, SimpleConnection, TransactionManager};
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::result::{DatabaseErrorKind, Error as DbError};

use crate::cli::bruhmcp;
use crate::concurrency::assert_counters_right;
use crate::difference::{assert_same, assert_same_set};
use crate::faults::{Bouncer, until};
use crate::fixtures;
use crate::locks::{
    AUTHORISED, GMAIL, KEYED, OPEN_EVENT, OPERATIONS, Outcome, PAYMENT, SERVICES, SUBSCRIPTION,
    USER, USER_WITH_ROWS, of, tokens,
};
use crate::runner::Folder;
use crate::support::{self, TestDatabase, as_admin};

const PAGE: &str = include_str!("../../docs/operations.md");
const COUNTERS: &str = "SELECT mcp_service_name, total_instances_created, active_instances_count
                          FROM mcp_table ORDER BY mcp_service_name";

/// The server of the tests that configure nothing and need no role that migrations grant to.
pub(crate) static SERVER: LazyLock<Server> = LazyLock::new(|| Server::private(&[]).unwrap());

/// The block of the page that contains `part`.
pub(crate) fn block(part: &str) -> String {
    let blocks = PAGE.split("```").skip(1).step_by(2);
    let mut blocks = blocks.filter(|block| block.contains(part));
    let (Some(block), None) = (blocks.next(), blocks.next()) else {
        panic!("{part} is not in exactly one block")
    };
    block.split_once('\n').unwrap().1.to_owned()
}

/// Runs a block of shell commands in a folder of its own.
pub(crate) fn shell(block: &str, variables: &[(&str, &str)]) -> Result<String, String> {
    let folder = Folder::new(&[("empty", "", "")]);
    let mut path = vec![
        Path::new(env!("CARGO_BIN_EXE_bruhmcp-db"))
            .parent()
            .unwrap()
            .to_owned(),
        SERVER.bin_dir().unwrap().to_owned(),
    ];
    path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap()));
    let mut bash = Command::new("bash");
    bash.args(["-euo", "pipefail", "-c", block])
        .current_dir(folder.path())
        .env("PATH", std::env::join_paths(path).unwrap())
        .envs(variables.iter().copied());
    result(&bash.output().unwrap())
}

fn result(output: &Output) -> Result<String, String> {
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    if output.status.success() {
        Ok(out.into_owned())
    } else {
        Err(format!("{out}{err}"))
    }
}

/// Runs statements in one `psql` that stops at the first error, and returns the rows.
pub(crate) fn psql(url: &str, sql: &str) -> Result<String, String> {
    let mut psql = Command::new(SERVER.bin_dir().unwrap().join("psql"));
    psql.args(["-XAtq", "--set=ON_ERROR_STOP=1", "--set=VERBOSITY=verbose"])
        .arg(url);
    // psql reads \gexec from a file only.
    let folder = Folder::new(&[("sql", sql, "")]);
    psql.arg("--file").arg(folder.path().join("sql/up.sql"));
    result(&psql.output().unwrap())
}

fn connect(url: &str) -> PgConnection {
    PgConnection::establish(url).unwrap()
}

/// A migrated database.
pub(crate) fn migrated(server: &Server) -> Database {
    let database = server.create_database().unwrap();
    migrate(&database.url());
    support::create_roles(&mut connect(&database.url()));
    psql(&database.url(), support::ROLES_SQL).unwrap();
    database
}

fn migrate(url: &str) {
    let run = bruhmcp(url, &["run"]);
    assert_eq!(run.code, Some(0), "{run:?}");
}

/// A database in use: a user on the pro plan with rows in all tables.
pub(crate) fn in_use(server: &Server) -> Database {
    let database = migrated(server);
    fill(&database.url());
    database
}

fn fill(url: &str) {
    let conn = &mut connect(url);
    conn.batch_execute(SERVICES).unwrap();
    conn.batch_execute(&USER_WITH_ROWS).unwrap();
    let audit = NewTokenAudit::new(KEYED, "connect", AuditStatus::Success);
    for _ in 0..3 {
        TokenAudit::insert(conn, &audit).unwrap();
    }
    // A row that refers to a later one of its table.
    SubscriptionTransaction::refund(conn, PAYMENT, &NewRefund::new("rfnd_0", 100)).unwrap();
    conn.batch_execute("UPDATE subscription_transactions SET description = 'a' WHERE amount > 0")
        .unwrap();
}

/// All rows but the ledger's.
fn rows(url: &str) -> String {
    rows_by(SERVER.bin_dir().unwrap(), url)
}

/// The same by a version of `pg_dump`, which must not be older than the server.
fn rows_by(bin_dir: &Path, url: &str) -> String {
    let mut dump = Command::new(bin_dir.join("pg_dump"));
    dump.args([
        "--data-only",
        "--inserts",
        "--exclude-table=__diesel_schema_migrations",
        url,
    ]);
    let dump = result(&dump.output().unwrap()).unwrap();
    let mut lines: Vec<&str> = dump
        .lines()
        .filter(|line| line.starts_with("INSERT") || line.starts_with("SELECT pg_catalog.setval"))
        .collect();
    lines.sort_unstable();
    lines.join("\n")
}

/// A database, and its URL with a role that owns it and may do nothing else.
fn owned(server: &Server) -> (Database, String) {
    let database = server.create_database().unwrap();
    let sql = format!(
        "DO $$ BEGIN
             CREATE ROLE owner LOGIN;
         EXCEPTION WHEN duplicate_object OR unique_violation THEN
         END $$;
         ALTER DATABASE {} OWNER TO owner",
        database.name()
    );
    psql(&database.url(), &sql).unwrap();
    let url = database.url().replace("user=postgres", "user=owner");
    (database, url)
}

#[test]
fn a_whole_dump_is_restored() {
    let (_old, old) = owned(&SERVER);
    migrate(&old);
    fill(&old);
    let archive = "CREATE SCHEMA bruhmcp_archive; CREATE TABLE bruhmcp_archive.users (a int)";
    psql(&old, archive).unwrap();
    let restore = block("pg_restore --jobs=4");
    let (_new, new) = owned(&SERVER);
    let out = shell(&restore, &[("DATABASE_URL", &old), ("NEW_URL", &new)]).unwrap();
    assert!(out.contains("Nothing is pending"), "{out}");
    assert_same(&rows(&old), &rows(&new));
    assert_eq!(psql(&new, COUNTERS).unwrap(), "figma|2|1\ngmail|4|2\n");
    psql(&new, "TABLE bruhmcp_archive.users").unwrap();
    assert_eq!(McpService::recount(&mut connect(&new)).unwrap(), []);

    let restore = restore.replace("pg_dump", "pg_dump --exclude-schema=bruhmcp_archive");
    let (_new, new) = owned(&SERVER);
    shell(&restore, &[("DATABASE_URL", &old), ("NEW_URL", &new)]).unwrap();
    let error = psql(&new, "TABLE bruhmcp_archive.users").unwrap_err();
    assert!(error.contains("42P01"), "{error}");
}

/// Roles belong to the server, so each of the two is a new one.
#[test]
fn a_dump_with_roles_needs_them() {
    let [old_server, new_server] = [(), ()].map(|()| Server::private(&[]).unwrap());
    let postgres = old_server.create_database().unwrap();
    psql(
        &postgres.url(),
        "CREATE ROLE app_user; CREATE ROLE app_admin",
    )
    .unwrap();
    let old = in_use(&old_server);
    let restore = block("pg_restore --jobs=4");
    let to = |commands: &str| {
        let new = new_server.create_database().unwrap();
        let out = shell(
            commands,
            &[("DATABASE_URL", &old.url()), ("NEW_URL", &new.url())],
        );
        (out, new)
    };
    let (out, _new) = to(&restore);
    let error = out.unwrap_err();
    assert!(error.contains("role \"app_"), "{error}");
    let (out, new) = to(&restore.replace("pg_restore", "pg_restore --no-owner --no-acl"));
    // `verify` finds functions that everybody may call.
    out.unwrap_err();
    assert_same(&rows(&old.url()), &rows(&new.url()));
    psql(&new.url(), "CREATE ROLE app_user; CREATE ROLE app_admin").unwrap();
    let grant = bruhmcp(&new.url(), &["grant"]);
    assert_eq!(grant.code, Some(0), "{grant:?}");
    let verify = bruhmcp(&new.url(), &["verify"]);
    assert_eq!(verify.code, Some(0), "{verify:?}");
    let (out, new) = to(&restore);
    out.unwrap();
    psql(&new.url(), "SET ROLE app_user; TABLE users").unwrap();
}

#[test]
fn the_first_time() {
    let server = Server::private(&[]).unwrap();
    let postgres = server.create_database().unwrap();
    psql(&postgres.url(), &block("CREATE ROLE bruhmcp_owner")).unwrap();
    let url =
        |role: &str| url_on(&server, "bruhmcp").replace("user=postgres", &format!("user={role}"));
    let release = block("bruhmcp-db grant\nbruhmcp-db verify");
    let out = shell(&release, &[("DATABASE_URL", &url("bruhmcp_owner"))]).unwrap();
    assert!(out.contains("granted   app_user"), "{out}");
    psql(&url("app_user"), "TABLE users").unwrap();
    let maintain = block("bruhmcp-db maintain");
    shell(&maintain, &[("DATABASE_URL", &url("app_admin"))]).unwrap();
    shell(&maintain, &[("DATABASE_URL", &url("app_user"))]).unwrap_err();
}

#[test]
fn the_owner_loads_rows() {
    let old = in_use(&SERVER);
    // A disabled service keeps its instances.
    McpService::set_enabled(&mut connect(&old.url()), GMAIL, false).unwrap();
    let (_new, url) = owned(&SERVER);
    assert_eq!(bruhmcp(&url, &["run"]).code, Some(0));
    for refused in [
        "SET session_replication_role = replica",
        "ALTER TABLE users DISABLE TRIGGER ALL",
    ] {
        let error = psql(&url, refused).unwrap_err();
        assert!(error.contains("42501"), "{error}");
    }
    let load = block("--data-only");
    let variables = [("DATABASE_URL", &*old.url()), ("NEW_URL", &url)];
    shell(&load, &variables).unwrap();
    assert_same(&rows(&old.url()), &rows(&url));
    let verify = bruhmcp(&url, &["verify"]);
    assert_eq!(verify.code, Some(0), "{verify:?}");

    // The second time, the keys exist.
    shell(&load, &variables).unwrap_err();
    let verify = bruhmcp(&url, &["verify"]);
    assert!(verify.out.contains("disabled"), "{verify:?}");
    assert_same(&rows(&old.url()), &rows(&url));
    let last_line = load
        .replace("pg_restore", "true")
        .replace("triggers DISABLE", "");
    shell(&last_line, &variables).unwrap();
    assert_eq!(bruhmcp(&url, &["verify"]).code, Some(0));
}

/// What a load without the steps above leaves, table by table.
#[test]
fn rows_loaded_past_the_page() {
    let old = in_use(&SERVER);
    let conn = &mut connect(&old.url());
    conn.batch_execute(
        "UPDATE user_plans SET customer_id = NULL, plan_type = 'pro', max_instances = NULL",
    )
    .unwrap();
    let new = migrated(&SERVER);
    let load =
        "pg_dump --data-only \"$DATABASE_URL\" | psql -X --set=VERBOSITY=verbose \"$NEW_URL\" 2>&1";
    let out = shell(
        load,
        &[("DATABASE_URL", &old.url()), ("NEW_URL", &new.url())],
    )
    .unwrap();
    for constraint in ["unique_user_plan", "mcp_service_table_oauth_status_synced"] {
        assert!(out.contains(constraint), "{constraint}: {out}");
    }
    let half = "SELECT (SELECT plan_type FROM user_plans), (SELECT count(*) FROM mcp_credentials),
                       (SELECT count(*) FROM user_subscriptions)";
    assert_eq!(psql(&new.url(), half).unwrap(), "free|0|1\n");
}

#[test]
fn recount_corrects_the_counters() {
    let database = in_use(&SERVER);
    let url = database.url();
    let conn = &mut connect(&url);
    assert_eq!(McpService::recount(conn).unwrap(), []);
    let wrong = "UPDATE mcp_table SET active_instances_count = 70, total_instances_created = 1
                  WHERE mcp_service_name = 'gmail';
                 UPDATE mcp_table SET total_instances_created = 9 WHERE mcp_service_name = 'figma'";
    conn.batch_execute(wrong).unwrap();
    let [changed] = &McpService::recount(conn).unwrap()[..] else {
        panic!("only gmail was wrong")
    };
    assert_eq!(
        (
            changed.mcp_service_id,
            changed.total_instances_created,
            changed.active_instances_count
        ),
        (GMAIL, 4, 2)
    );
    let right = "figma|9|1\ngmail|4|2\n";
    assert_eq!(psql(&url, COUNTERS).unwrap(), right);

    // The page's statements do the same.
    conn.batch_execute(wrong).unwrap();
    let changed = psql(&url, &block("RETURNING mcp_service_name")).unwrap();
    assert!(changed.ends_with("gmail|2\n"), "{changed}");
    assert_eq!(psql(&url, COUNTERS).unwrap(), right);
}

/// Instances that the same transaction creates are counted once.
#[test]
fn recount_after_changes_in_its_transaction() {
    let database = in_use(&SERVER);
    let conn = &mut connect(&database.url());
    conn.transaction::<_, InstanceError, _>(|conn| {
        let instance = fixtures::create(conn, USER, GMAIL)?;
        McpService::recount(conn)?;
        McpInstance::delete(conn, KEYED, USER)?;
        McpInstance::deactivate(conn, instance, USER)?;
        Ok(())
    })
    .unwrap();
    assert_eq!(
        psql(&database.url(), COUNTERS).unwrap(),
        "figma|2|1\ngmail|5|1\n"
    );
}

/// A transaction has changed a counter and has not committed: its instance is not missed.
#[test]
fn recount_waits_for_a_commit() {
    let database = in_use(&SERVER);
    let url = database.url();
    psql(&url, "UPDATE mcp_table SET active_instances_count = 70").unwrap();
    for (isolation, succeeds) in [
        (Isolation::ReadCommitted, true),
        (Isolation::RepeatableRead, false),
    ] {
        let other = &mut connect(&url);
        AnsiTransactionManager::begin_transaction(other).unwrap();
        fixtures::create(other, USER, GMAIL).unwrap();
        other
            .batch_execute("SET CONSTRAINTS ALL IMMEDIATE")
            .unwrap();
        let outcome = thread::scope(|scope| {
            let recount = scope.spawn(|| {
                let conn = &mut connect(&url);
                let mut transaction = conn.build_transaction();
                match isolation {
                    Isolation::ReadCommitted => transaction.run(McpService::recount),
                    _ => transaction.repeatable_read().run(McpService::recount),
                }
            });
            until("a recount that waits", || {
                let waiting = "SELECT count(*) FROM pg_stat_activity
                                WHERE datname = current_database() AND wait_event_type = 'Lock'";
                psql(&url, waiting).unwrap() == "1\n"
            });
            AnsiTransactionManager::commit_transaction(other).unwrap();
            recount.join().unwrap()
        });
        assert_eq!(outcome.is_ok(), succeeds, "{outcome:?}");
    }
    assert_eq!(psql(&url, COUNTERS).unwrap(), "figma|2|1\ngmail|6|4\n");
}

/// One thread spoils and recounts, while others create, switch and delete. Counters and instances
/// become visible together, so after each recount they agree.
#[test]
fn recount_beside_live_traffic() {
    let database = support::database();
    let conn = &mut database.connect();
    let services =
        [("gmail", 4001), ("figma", 4002)].map(|(name, port)| fixtures::service(conn, name, port));
    let users = [(); 6].map(|()| fixtures::pro_user(conn));
    let at_work = AtomicUsize::new(users.len());
    support::at_once(&database, users.len() + 1, |n, conn| {
        let Some(&user) = users.get(n) else {
            while at_work.load(Ordering::Relaxed) > 0 {
                let spoil = "UPDATE mcp_table SET active_instances_count = 1000";
                as_admin(conn, |conn| conn.batch_execute(spoil)).unwrap();
                assert_eq!(as_admin(conn, McpService::recount).unwrap().len(), 2);
                assert_counters_right(&database);
            }
            return;
        };
        for round in 0..60 {
            let instance = conn.transaction(|conn| {
                let instance = fixtures::create(conn, user, services[(n + round) % 2]);
                if round % 4 == 0 {
                    // A slow commit: the counter is changed, and not visible.
                    conn.batch_execute("SET CONSTRAINTS ALL IMMEDIATE; SELECT pg_sleep(0.005)")?;
                }
                instance
            });
            let instance = instance.unwrap();
            if round % 2 == 0 {
                McpInstance::deactivate(conn, instance, user).unwrap();
            }
            if round % 5 == 0 {
                McpInstance::delete(conn, instance, user).unwrap();
            }
        }
        at_work.fetch_sub(1, Ordering::Relaxed);
    });
    assert_counters_right(&database);
    let created = "SELECT sum(total_instances_created) FROM mcp_table";
    assert_eq!(database.psql(created).unwrap(), "360\n");
}

/// The rights of `migrations/roles.sql` are enough, and only for app_admin.
#[test]
fn recount_needs_app_admin() {
    let server = Server::private(&[]).unwrap();
    let database = in_use(&server);
    let conn = &mut connect(&database.url());
    conn.batch_execute("UPDATE mcp_table SET active_instances_count = 7; SET ROLE app_user")
        .unwrap();
    let error = McpService::recount(conn).unwrap_err();
    assert!(error.to_string().contains("permission denied"), "{error}");
    conn.batch_execute("SET ROLE app_admin").unwrap();
    assert_eq!(McpService::recount(conn).unwrap().len(), 2);
}

#[test]
fn plans_for_users_without_one() {
    let database = in_use(&SERVER);
    let url = database.url();
    let conn = &mut connect(&url);
    let other = fixtures::pro_user(conn);
    conn.batch_execute(&format!("DELETE FROM user_plans WHERE user_id = '{USER}'"))
        .unwrap();
    let missing = McpInstance::activate(conn, crate::locks::INACTIVE, USER);
    assert!(missing.is_err(), "{missing:?}");
    let insert = block("INSERT INTO user_plans");
    psql(&url, &insert).unwrap();
    psql(&url, &insert).unwrap();
    let plan = |conn: &mut PgConnection, user| {
        UserPlan::find_by_user(conn, user)
            .unwrap()
            .unwrap()
            .plan_type
            .to_string()
    };
    assert_eq!(
        (plan(conn, USER), plan(conn, other)),
        ("free".into(), "pro".into())
    );
    // Three were active; the free plan allows one.
    assert_eq!(McpInstance::count_active(conn, USER).unwrap(), 0);
    assert_eq!(psql(&url, COUNTERS).unwrap(), "figma|2|0\ngmail|4|0\n");
}

/// A command for a program of the account that a private server runs as.
fn as_account_of(server: &Server, program: impl AsRef<OsStr>) -> Command {
    let folder = server.folder().unwrap();
    let account = fs::metadata(folder).unwrap();
    let mut command = Command::new(program);
    command
        .uid(account.uid())
        .gid(account.gid())
        .current_dir("/")
        .env("HOME", folder);
    command
}

fn url_on(server: &Server, database: &str) -> String {
    format!(
        "postgresql:///{database}?host={}&port=5432&user=postgres",
        server.folder().unwrap().display()
    )
}

#[test]
fn move_by_logical_replication() {
    let [(_old_server, old), (new_server, new)] = published();
    let (old_url, new_url) = (old.url(), new.url());
    assert_same(
        &rows_without_sequences(&old_url),
        &rows_without_sequences(&new_url),
    );

    let old_conn = &mut connect(&old_url);
    fixtures::create(old_conn, USER, GMAIL).unwrap();
    McpInstance::record_call(old_conn, KEYED, None)
        .unwrap()
        .unwrap();
    let another = fixtures::user(old_conn);
    User::deactivate(old_conn, another).unwrap();
    caught_up(&old_url);
    assert_same(
        &rows_without_sequences(&old_url),
        &rows_without_sequences(&new_url),
    );
    assert_eq!(psql(&new_url, COUNTERS).unwrap(), "figma|2|1\ngmail|5|3\n");

    // A migration of the old database alone.
    psql(&old_url, "ALTER TABLE users ADD COLUMN spare_name text").unwrap();
    fixtures::user(old_conn);
    until("an error of the subscription", || {
        psql(
            &new_url,
            "SELECT apply_error_count > 0 FROM pg_stat_subscription_stats",
        )
        .unwrap()
            == "t\n"
    });
    let log = fs::read_to_string(new_server.folder().unwrap().join("log")).unwrap();
    assert!(
        log.contains("is missing replicated column: \"spare_name\""),
        "{log}"
    );
    psql(&new_url, "ALTER TABLE users ADD COLUMN spare_name text").unwrap();
    caught_up(&old_url);
    assert_same(
        &rows_without_sequences(&old_url),
        &rows_without_sequences(&new_url),
    );

    psql(&new_url, "DROP SUBSCRIPTION move").unwrap();
    let sequences = "SELECT string_agg(relname, ', ') FROM pg_class
                      WHERE relkind = 'S' AND relnamespace = 'public'::regnamespace";
    assert_eq!(
        psql(&new_url, sequences).unwrap(),
        "token_audit_log_audit_id_seq\n"
    );
    psql(&new_url, &block("setval")).unwrap();
    let new_conn = &mut connect(&new_url);
    TokenAudit::insert(
        new_conn,
        &NewTokenAudit::new(KEYED, "a", AuditStatus::Success),
    )
    .unwrap();
    fixtures::create(new_conn, USER, GMAIL).unwrap();
    assert_eq!(McpService::recount(new_conn).unwrap(), []);
    let run = bruhmcp(&new_url, &["run"]);
    assert_eq!(run.out, "Nothing to do.\n", "{run:?}");
    let verify = bruhmcp(&new_url, &["verify"]);
    assert_eq!(verify.code, Some(0), "{verify:?}");
}

/// A database in use that is published, a new one that subscribed to it and has copied its rows,
/// and their servers.
pub(crate) fn published() -> [(Server, Database); 2] {
    let old_server = Server::private(&[("wal_level", "logical")]).unwrap();
    let new_server = Server::private(&[]).unwrap();
    let (old, new) = (in_use(&old_server), migrated(&new_server));
    psql(&old.url(), &block("CREATE PUBLICATION")).unwrap();
    let subscribe = format!(
        "CREATE SUBSCRIPTION move CONNECTION '{}' PUBLICATION move",
        old.url()
    );
    psql(&new.url(), &subscribe).unwrap();
    let copied = block("pg_subscription_rel");
    until("the end of the copy", || {
        psql(&new.url(), &copied).unwrap() == "0\n"
    });
    [(old_server, old), (new_server, new)]
}

fn caught_up(old_url: &str) {
    let caught_up = block("pg_stat_replication");
    until("the end of the replication", || {
        psql(old_url, &caught_up).unwrap() == "t\n"
    });
}

fn rows_without_sequences(url: &str) -> String {
    let rows = rows(url);
    let rows: Vec<&str> = rows
        .lines()
        .filter(|line| line.starts_with("INSERT"))
        .collect();
    rows.join("\n")
}

#[test]
fn pg_upgrade() {
    let server = Server::private(&[]).unwrap();
    let version = psql(&in_use(&server).url(), "SHOW server_version").unwrap();
    let new_bin = std::env::var_os("BRUHMCP_PG_18").filter(|_| *version < *"18");
    let Some(new_bin) = new_bin.map(PathBuf::from) else {
        return support::skipped("needs a server below 18, and BRUHMCP_PG_18");
    };
    let database = in_use(&server);
    psql(&database.url(), "ANALYZE").unwrap();
    let before = rows(&database.url());
    server.stop(false).unwrap();
    let folder = server.folder().unwrap();
    let new_data = folder.join("new");
    let initdb = |options: &[&str]| {
        let _ = fs::remove_dir_all(&new_data);
        let mut initdb = as_account_of(&server, new_bin.join("initdb"));
        initdb.args([
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
            "--username=postgres",
        ]);
        result(
            &initdb
                .args(options)
                .arg("-D")
                .arg(&new_data)
                .output()
                .unwrap(),
        )
        .unwrap();
    };
    let upgrade = || {
        let mut bash = as_account_of(&server, "bash");
        let commands = block("pg_upgrade").replace("pg_upgrade ", "\"$NEW_BIN\"/pg_upgrade ");
        bash.args(["-euc", &commands]).current_dir(folder);
        bash.env("OLD_BIN", server.bin_dir().unwrap())
            .env("NEW_BIN", &new_bin)
            .env("OLD_DATA", folder.join("data"))
            .env("NEW_DATA", &new_data);
        result(&bash.output().unwrap())
    };
    let version = Command::new(new_bin.join("postgres"))
        .arg("--version")
        .output()
        .unwrap();
    let is_18 = String::from_utf8_lossy(&version.stdout).contains(" 18.");
    if is_18 {
        initdb(&[]);
        let error = upgrade().unwrap_err();
        let expected = "old cluster does not use data checksums but the new one does";
        assert!(error.contains(expected), "{error}");
        initdb(&["--no-data-checksums"]);
    } else {
        initdb(&[]);
    }
    upgrade().unwrap();
    let pg_ctl = |action: &str| {
        let mut pg_ctl = as_account_of(&server, new_bin.join("pg_ctl"));
        let options = format!("-k {} -h '' -p 5432", folder.display());
        pg_ctl
            .args([action, "-w", "-o", &options, "-D"])
            .arg(&new_data);
        pg_ctl.arg("-l").arg(folder.join("log of the new one"));
        assert!(pg_ctl.status().unwrap().success());
    };
    pg_ctl("start");
    let url = database.url();
    let outcome = std::panic::catch_unwind(|| {
        // From 17 on, a partition has the identity column of its table.
        let after = rows_by(&new_bin, &url);
        assert_same(&before, &after.replace(" OVERRIDING SYSTEM VALUE", ""));
        let known = "SELECT count(*) > 0 FROM pg_stats WHERE tablename = 'mcp_table'";
        if !is_18 {
            assert_eq!(psql(&url, known).unwrap(), "f\n");
            let mut analyze = as_account_of(&server, new_bin.join("vacuumdb"));
            analyze.args(["--all", "--analyze-in-stages", "-U", "postgres", "-h"]);
            result(&analyze.arg(folder).output().unwrap()).unwrap();
        }
        assert_eq!(psql(&url, known).unwrap(), "t\n");
        let status = bruhmcp(&url, &["status"]);
        assert_eq!(status.code, Some(0), "{status:?}");
        let conn = &mut connect(&url);
        fixtures::create(conn, USER, GMAIL).unwrap();
        assert_eq!(McpService::recount(conn).unwrap(), []);
    });
    pg_ctl("stop");
    outcome.unwrap();
}

/// A hot standby of `primary`.
fn standby_of(primary: &Server) -> Server {
    let standby = Server::private(&[]).unwrap();
    standby.stop(false).unwrap();
    let data = standby.folder().unwrap().join("data");
    fs::remove_dir_all(&data).unwrap();
    let mut copy = as_account_of(&standby, primary.bin_dir().unwrap().join("pg_basebackup"));
    copy.args([
        "--username=postgres",
        "--port=5432",
        "--checkpoint=fast",
        "--write-recovery-conf",
    ])
    .arg("--host")
    .arg(primary.folder().unwrap())
    .arg("--pgdata")
    .arg(&data);
    result(&copy.output().unwrap()).unwrap();
    let mut settings = OpenOptions::new()
        .append(true)
        .open(data.join("postgresql.conf"))
        .unwrap();
    let folder = standby.folder().unwrap().display();
    writeln!(settings, "unix_socket_directories = '{folder}'").unwrap();
    standby.start_again().unwrap();
    standby
}

/// An operation and its name.
type Named = (&'static str, fn(&mut PgConnection) -> Outcome);

/// Every operation that only reads. Each finds something.
static READS: &[Named] = &[
    ("User::find", |conn| Ok(User::find(conn, USER)?.is_some())),
    ("User::find_active", |conn| {
        Ok(User::find_active(conn, USER)?.is_some())
    }),
    ("User::find_active_by_email", |conn| {
        Ok(User::find_active_by_email(conn, "asha@example.in")?.is_some())
    }),
    ("User::find_by_email", |conn| {
        Ok(User::find_by_email(conn, "asha@example.in")?.is_some())
    }),
    ("User::find_by_razorpay_customer_id", |conn| {
        Ok(User::find_by_razorpay_customer_id(conn, "cust_1")?.is_some())
    }),
    ("User::list", |conn| {
        Ok(User::list(conn, Page::first(1))?.len() == 1)
    }),
    ("User::export", |conn| {
        Ok(User::export(conn, USER)?.is_some())
    }),
    ("AuthToken::find_live", |conn| {
        Ok(AuthToken::find_live(conn, &refresh_token())?.is_some())
    }),
    ("AuthToken::list_by_user", |conn| {
        Ok(
            !AuthToken::list_by_user(conn, USER, AuthTokenType::Refresh, Page::first(1))?
                .is_empty(),
        )
    }),
    ("AuthToken::list_sessions", |conn| {
        Ok(!AuthToken::list_sessions(conn, USER)?.is_empty())
    }),
    ("AuthToken::count_issued_since", |conn| {
        let since = Utc::now() - TimeDelta::days(1);
        Ok(AuthToken::count_issued_since(conn, USER, AuthTokenType::Refresh, since)? > 0)
    }),
    ("UserSubscription::find", |conn| {
        Ok(UserSubscription::find(conn, SUBSCRIPTION)?.is_some())
    }),
    ("UserSubscription::current", |conn| {
        Ok(UserSubscription::current(conn, USER)?.is_some())
    }),
    ("UserSubscription::find_by_razorpay_id", |conn| {
        Ok(UserSubscription::find_by_razorpay_id(conn, "sub_1")?.is_some())
    }),
    ("UserSubscription::list_by_user", |conn| {
        Ok(!UserSubscription::list_by_user(conn, USER, Page::first(1))?.is_empty())
    }),
    ("SubscriptionTransaction::find", |conn| {
        Ok(SubscriptionTransaction::find(conn, PAYMENT)?.is_some())
    }),
    ("SubscriptionTransaction::find_by_razorpay_id", |conn| {
        Ok(SubscriptionTransaction::find_by_razorpay_id(conn, "pay_1")?.is_some())
    }),
    ("SubscriptionTransaction::list_by_user", |conn| {
        Ok(!SubscriptionTransaction::list_by_user(conn, USER, Page::first(1))?.is_empty())
    }),
    ("SubscriptionTransaction::list_stuck", |conn| {
        Ok(!SubscriptionTransaction::list_stuck(conn, Utc::now(), 1)?.is_empty())
    }),
    ("AccountCredit::find", |conn| {
        let listed = AccountCredit::list_by_user(conn, USER, Page::first(1))?;
        Ok(AccountCredit::find(conn, listed[0].id)?.is_some())
    }),
    ("AccountCredit::list_by_user", |conn| {
        Ok(!AccountCredit::list_by_user(conn, USER, Page::first(1))?.is_empty())
    }),
    ("AccountCredit::balance", |conn| {
        Ok(AccountCredit::balance(conn, USER, "INR")? == 1000)
    }),
    ("UserBillingDetails::find_by_user", |conn| {
        Ok(UserBillingDetails::find_by_user(conn, USER)?.is_some())
    }),
    ("UserPlan::find_by_user", |conn| {
        Ok(UserPlan::find_by_user(conn, USER)?.is_some())
    }),
    ("WebhookEvent::find", |conn| {
        Ok(WebhookEvent::find(conn, OPEN_EVENT)?.is_some())
    }),
    ("WebhookEvent::find_by_external_id", |conn| {
        Ok(WebhookEvent::find_by_external_id(conn, PaymentGateway::Razorpay, "evt_1")?.is_some())
    }),
    ("WebhookEvent::list_dead", |conn| {
        Ok(!WebhookEvent::list_dead(conn, 1)?.is_empty())
    }),
    ("McpService::find", |conn| {
        Ok(McpService::find(conn, GMAIL)?.is_some())
    }),
    ("McpService::find_by_name", |conn| {
        Ok(McpService::find_by_name(conn, "gmail")?.is_some())
    }),
    ("McpInstance::find", |conn| {
        Ok(McpInstance::find(conn, KEYED)?.is_some())
    }),
    ("McpInstance::find_by_user", |conn| {
        Ok(McpInstance::find_by_user(conn, KEYED, USER)?.is_some())
    }),
    ("McpInstance::find_with_credentials", |conn| {
        Ok(McpInstance::find_with_credentials(conn, KEYED, "gmail", Some(USER))?.is_ok())
    }),
    ("McpInstance::find_in_any_state", |conn| {
        Ok(McpInstance::find_in_any_state(conn, KEYED, None)?.is_some())
    }),
    ("McpInstance::list_by_user", |conn| {
        let filter = InstanceFilter::default();
        Ok(!McpInstance::list_by_user(conn, USER, filter, Page::first(1))?.is_empty())
    }),
    ("McpInstance::count_active", |conn| {
        Ok(McpInstance::count_active(conn, USER)? == 3)
    }),
    ("McpInstance::list_abandoned", |conn| {
        Ok(!McpInstance::list_abandoned(conn, TimeDelta::hours(1), 1)?.is_empty())
    }),
    ("McpCredential::find", |conn| {
        Ok(McpCredential::find(conn, of(KEYED))?.is_some())
    }),
    ("McpCredential::find_by_instance", |conn| {
        Ok(McpCredential::find_by_instance(conn, KEYED)?.is_some())
    }),
    ("McpCredential::count_to_reseal", |conn| {
        let ring = KeyRing::new([(9, &[9; 32][..])])?;
        Ok(McpCredential::count_to_reseal(conn, &ring)? > 0)
    }),
    ("TokenAudit::list", |conn| {
        Ok(!TokenAudit::list(conn, AuditFilter::of_instance(KEYED), Page::first(1))?.is_empty())
    }),
    ("TokenAuditSummary::list_by_instance", |conn| {
        Ok(!TokenAuditSummary::list_by_instance(conn, KEYED)?.is_empty())
    }),
];

/// Writing operations that [`OPERATIONS`] calls only inside others, or that are no single user's.
static INNER: &[Named] = &[
    ("TokenAudit::insert_many", |conn| {
        let rows = [NewTokenAudit::new(KEYED, "connect", AuditStatus::Success)];
        Ok(TokenAudit::insert_many(conn, &rows, Durability::Synced)? == 1)
    }),
    ("TokenAudit::maintain", |conn| {
        Ok(TokenAudit::maintain(conn)?.created == 0)
    }),
    ("WebhookEvent::mark_processed", |conn| {
        let event = WebhookEvent::find(conn, OPEN_EVENT)?.unwrap();
        Ok(WebhookEvent::mark_processed(conn, &event, None).map(|()| true)?)
    }),
    ("WebhookEvent::mark_skipped", |conn| {
        let event = WebhookEvent::find(conn, OPEN_EVENT)?.unwrap();
        Ok(WebhookEvent::mark_skipped(conn, &event, None).map(|()| true)?)
    }),
    ("WebhookEvent::mark_failed", |conn| {
        let event = WebhookEvent::find(conn, OPEN_EVENT)?.unwrap();
        Ok(WebhookEvent::mark_failed(conn, &event, None, "a").map(|()| true)?)
    }),
    ("McpCredential::store_refreshed", |conn| {
        let claimed = authorised(conn);
        Ok(McpCredential::store_refreshed(conn, &claimed, &tokens()).map(|_| true)?)
    }),
    ("McpCredential::refresh_failed", |conn| {
        let claimed = authorised(conn);
        Ok(
            McpCredential::refresh_failed(conn, &claimed, "a", None, TimeDelta::zero())
                .map(|_| true)?,
        )
    }),
    ("McpCredential::refresh_refused", |conn| {
        let claimed = authorised(conn);
        Ok(McpCredential::refresh_refused(conn, &claimed).map(|_| true)?)
    }),
];

fn authorised(conn: &mut PgConnection) -> McpCredential {
    McpCredential::find(conn, of(AUTHORISED)).unwrap().unwrap()
}

fn refresh_token() -> HashedToken {
    HashedToken::new(AuthTokenType::Refresh, [3; 32])
}

/// `Type::function` of an operation, without the case it is called for.
fn function(name: &str) -> &str {
    name.split([',', ' ']).next().unwrap()
}

#[test]
fn a_replica_reads() {
    let listed = PAGE
        .split_once("## Replicas")
        .unwrap()
        .1
        .split_once("\n## ")
        .unwrap()
        .0;
    let listed = listed
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|name| name.contains("::"));
    assert_same_set(
        READS.iter().map(|(name, _)| (*name).to_owned()),
        listed.map(str::to_owned),
    );

    let writes = OPERATIONS.iter().map(|operation| function(operation.name));
    let known: BTreeSet<&str> = READS
        .iter()
        .chain(INNER)
        .map(|(name, _)| *name)
        .chain(writes)
        .collect();
    let public = public_operations();
    let new: Vec<&String> = public
        .iter()
        .filter(|name| !known.contains(&***name))
        .collect();
    assert!(
        new.is_empty(),
        "{new:?}: list what writes in OPERATIONS (tests/it/locks.rs), what reads only in READS \
         (tests/it/operations.rs) and in \"Replicas\" (docs/operations.md)"
    );
    assert_same_set(public, known.iter().map(|&name| name.to_owned()));

    let primary = Server::private(&[]).unwrap();
    let database = in_use(&primary);
    let standby = standby_of(&primary);
    let url = url_on(&standby, database.name());
    assert_eq!(psql(&url, "SELECT pg_is_in_recovery()").unwrap(), "t\n");
    let conn = &mut connect(&url);
    let mut wrong = Vec::new();
    for (name, read) in READS {
        let outcome = read(conn);
        if !matches!(outcome, Ok(true)) {
            wrong.push((*name, outcome));
        }
    }
    let writes = OPERATIONS
        .iter()
        .map(|operation| (operation.name, operation.run));
    for (name, write) in writes.chain(INNER.iter().copied()) {
        let outcome = write(conn);
        let refused = |error: &(dyn std::error::Error + 'static)| {
            let mut causes = std::iter::successors(Some(error), |error| error.source());
            causes.any(|error| {
                matches!(
                    error.downcast_ref::<DbError>(),
                    Some(DbError::DatabaseError(
                        DatabaseErrorKind::ReadOnlyTransaction,
                        _
                    ))
                )
            })
        };
        if !matches!(&outcome, Err(error) if refused(&**error)) {
            wrong.push((name, outcome));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    for command in ["status", "plan", "verify"] {
        let outcome = bruhmcp(&url, &[command]);
        assert_eq!(outcome.code, Some(0), "{command}: {outcome:?}");
    }
}

/// Every public function of the models and views that takes a connection, as `Type::function`.
fn public_operations() -> BTreeSet<String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = crate::conventions::rust_files(&source.join("models"));
    files.push(source.join("views.rs"));
    let mut operations = BTreeSet::new();
    for file in files {
        let text = fs::read_to_string(file).unwrap();
        let mut type_ = "";
        for (at, _) in text.match_indices('\n') {
            let rest = &text[at + 1..];
            if let Some(rest) = rest.strip_prefix("impl ") {
                (type_, _) = rest.split_once(' ').unwrap();
            }
            if let Some(rest) = rest.strip_prefix("    pub fn ") {
                let (signature, _) = rest.split_once('{').unwrap();
                let (name, arguments) = signature.split_once('(').unwrap();
                if arguments.contains("conn: &mut PgConnection") {
                    operations.insert(format!("{type_}::{name}"));
                }
            }
        }
    }
    operations
}

/// All operations through a pooler in transaction mode, each on the next of four connections.
fn all_operations_through(program: &OsStr, settings: &str, cache: Option<CacheSize>) {
    let server = Server::private(&[]).unwrap();
    let database = in_use(&server);
    let settings = format!("default_pool_size = 2\n{settings}");
    let bouncer = Bouncer::start(program, &server, &settings);
    let url = bouncer.url(&database);
    let connect = || {
        let mut conn = connect(&url);
        if let Some(size) = cache {
            conn.set_prepared_statement_cache_size(size);
        }
        conn
    };
    let mut pooled = [(); 4].map(|()| connect());
    let direct = &mut PgConnection::establish(&database.url()).unwrap();
    let mut wrong = Vec::new();
    for round in 0..2 {
        for (n, operation) in OPERATIONS.iter().enumerate() {
            operation.set_up(direct);
            let outcome = (operation.run)(&mut pooled[(n + round) % 4]);
            if !matches!(outcome, Ok(true)) {
                wrong.push((operation.name, outcome));
            }
        }
        direct.batch_execute(&USER_WITH_ROWS).unwrap();
        for (n, (name, read)) in READS.iter().enumerate() {
            let outcome = read(&mut pooled[(n + round) % 4]);
            if !matches!(outcome, Ok(true)) {
                wrong.push((*name, outcome));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");

    // Retried transactions of more clients than the pooler has connections to the server.
    let plan = UserPlan::find_by_user(direct, USER).unwrap().unwrap();
    thread::scope(|scope| {
        for conn in &mut pooled {
            scope.spawn(|| {
                for _ in 0..20 {
                    retry_transaction(conn, Isolation::Serializable, |conn| {
                        conn.batch_execute("SET LOCAL statement_timeout = '5s'")?;
                        UserPlan::find_by_user(conn, plan.user_id)?;
                        McpInstance::record_call(conn, KEYED, None).map(Result::unwrap)
                    })
                    .unwrap();
                }
            });
        }
    });
    let calls = McpInstance::find(direct, KEYED)
        .unwrap()
        .unwrap()
        .usage_count;
    assert_eq!(calls, 80);
}

#[test]
fn pooler_without_statement_cache() {
    assert!(block("set_prepared_statement_cache_size").contains("CacheSize::Disabled"));
    all_operations_through("pgbouncer".as_ref(), "", Some(CacheSize::Disabled));
}

#[test]
fn pooler_with_prepared_statements() {
    let Some(program) = std::env::var_os("BRUHMCP_PGBOUNCER_1_21") else {
        return support::skipped("BRUHMCP_PGBOUNCER_1_21 names no pgbouncer from 1.21 on");
    };
    assert!(PAGE.contains("`max_prepared_statements = 200`"));
    all_operations_through(&program, "max_prepared_statements = 200", None);
}

/// Changes that a running old release survives, and changes that break it.
#[test]
fn an_old_release_beside_a_new_schema() {
    let changed = |sql: &str| {
        let database = TestDatabase::from(in_use(&SERVER));
        let conn = database.connect_as_owner();
        database.psql(sql).unwrap();
        (database, conn)
    };
    let (_database, mut conn) = changed(
        "ALTER TABLE users ADD COLUMN spare_name text, ADD COLUMN spare_points integer NOT NULL DEFAULT 0;
         CREATE TABLE support (id uuid PRIMARY KEY);
         CREATE INDEX users_first_name_idx ON users (first_name);
         ALTER TYPE mcp_instance_status ADD VALUE 'paused'",
    );
    for operation in OPERATIONS {
        operation.set_up(&mut conn);
        operation.succeed(&mut conn);
    }
    conn.batch_execute("UPDATE mcp_service_table SET status = 'paused'")
        .unwrap();
    let error = McpInstance::find(&mut conn, KEYED).unwrap_err();
    assert!(format!("{error:?}").contains("paused"), "{error:?}");

    let (_database, mut conn) = changed("ALTER TABLE users DROP COLUMN last_login_at CASCADE");
    let error = User::find(&mut conn, USER).unwrap_err();
    assert!(
        error.to_string().contains("last_login_at does not exist"),
        "{error}"
    );

    let (_database, mut conn) = changed(
        "ALTER TABLE users ADD COLUMN spare_name text; UPDATE users SET spare_name = 'a';
         ALTER TABLE users ALTER COLUMN spare_name SET NOT NULL",
    );
    let new = NewUser::new("Asha", "", "new@example.in");
    let error = User::sign_up(&mut conn, &new).unwrap_err();
    assert!(format!("{error:?}").contains("spare_name"), "{error:?}");
    User::find(&mut conn, USER).unwrap().unwrap();
}

/// What a release does with the column: insert a row, update it, read it.
struct Release(&'static str);

impl Release {
    fn works(&self, database: &TestDatabase, code: &str) {
        let column = self.0;
        let user = fixtures::user(&mut database.connect());
        let read = format!("SELECT {column} FROM user_billing_details WHERE user_id = '{user}'");
        let insert = format!(
            "INSERT INTO user_billing_details (user_id, address_line1, city, state, country, {column})
             VALUES ('{user}', 'a', 'a', 'a', 'a', '{code}'); {read}"
        );
        assert_eq!(database.psql(&insert).unwrap(), format!("{code}\n"));
        let update = format!(
            "UPDATE user_billing_details SET {column} = '{code}0' WHERE user_id = '{user}'; {read}"
        );
        assert_eq!(database.psql(&update).unwrap(), format!("{code}0\n"));
    }

    /// Reads the codes of all rows, whichever release wrote them.
    fn codes(&self, database: &TestDatabase) -> String {
        let column = self.0;
        database
            .psql(&format!(
                "SELECT {column} FROM user_billing_details ORDER BY {column} COLLATE \"C\""
            ))
            .unwrap()
    }
}

#[test]
fn a_column_is_renamed_in_three_releases() {
    let database = support::database();
    let (old, new) = (Release("zip_code"), Release("postal_code"));
    old.works(&database, "1");
    let run = |file: &str| {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/rename");
        let sql = fs::read_to_string(Path::new(path).join(file)).unwrap();
        let first = sql
            .lines()
            .find(|line| !line.starts_with("--") && !line.is_empty());
        assert_eq!(first, Some("SET LOCAL lock_timeout = '5s';"), "{file}");
        let conn = &mut database.connect_as_owner();
        conn.transaction(|conn| conn.batch_execute(&sql)).unwrap();
    };
    let schema = || database.dump(&["--schema-only"]);
    let up_and_down = |migration: &str| {
        let before = schema();
        run(&format!("{migration}/up.sql"));
        run(&format!("{migration}/down.sql"));
        assert_same(&before, &schema());
        run(&format!("{migration}/up.sql"));
    };

    up_and_down("008_add_postal_code");
    // Releases 0 and 1 use the old column, and 2 may come before its migration has filled the rows.
    old.works(&database, "2");
    new.works(&database, "3");

    up_and_down("009_fill_postal_code");
    assert!(schema().contains("postal_code text NOT NULL"));
    old.works(&database, "4");
    new.works(&database, "5");
    assert_eq!(old.codes(&database), "10\n20\n30\n40\n50\n");
    assert_eq!(old.codes(&database), new.codes(&database));

    run("010_drop_zip_code/up.sql");
    assert!(!schema().contains("zip_code text"));
    run("010_drop_zip_code/down.sql");
    old.works(&database, "6");
    new.works(&database, "7");
    run("010_drop_zip_code/up.sql");
    new.works(&database, "8");
    assert_eq!(new.codes(&database), "10\n20\n30\n40\n50\n60\n70\n80\n");
}

#[test]
fn timeouts_of_the_application() {
    let server = Server::private(&[]).unwrap();
    let database = in_use(&server);
    psql(&database.url(), "ALTER ROLE app_user LOGIN").unwrap();
    psql(&database.url(), &block("ALTER ROLE app_user")).unwrap();
    let url = database.url().replace("user=postgres", "user=app_user");
    let shown = psql(
        &url,
        "SHOW statement_timeout; SHOW idle_in_transaction_session_timeout",
    );
    assert_eq!(shown.unwrap(), "30s\n1min\n");
    // Shorter ones, of the same kind.
    psql(
        &database.url(),
        "ALTER ROLE app_user SET statement_timeout = '200ms';
         ALTER ROLE app_user SET idle_in_transaction_session_timeout = '100ms'",
    )
    .unwrap();
    let conn = &mut connect(&url);
    let error = conn.batch_execute("SELECT pg_sleep(5)").unwrap_err();
    assert!(error.to_string().contains("statement timeout"), "{error}");
    conn.batch_execute("BEGIN; SELECT FROM users FOR UPDATE")
        .unwrap();
    let free = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app_user'";
    until("the end of the idle session", || {
        psql(&database.url(), free).unwrap() == "0\n"
    });
    assert!(User::find(conn, USER).is_err());
}
