//! `retry_transaction`: what it retries, whatever error type the caller uses.

use std::env;
use std::error::Error as StdError;
use std::fmt::Debug;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use bruhmcp_db::ids::UserId;
use bruhmcp_db::models::User;
use bruhmcp_db::schema::users;
use bruhmcp_db::{Isolation, MAX_ATTEMPTS, is_transient, retry_transaction};
use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::result::{DatabaseErrorKind, Error};

use crate::fixtures::user;
use crate::support::{self, TestDatabase};

#[derive(Debug, thiserror::Error)]
enum Transparent {
    #[error(transparent)]
    Db(#[from] Error),
    #[error("refused")]
    Refused,
}

#[derive(Debug, thiserror::Error)]
#[error("the sign-up failed")]
struct Nested(#[source] Transparent);

impl From<Error> for Nested {
    fn from(error: Error) -> Self {
        Self(error.into())
    }
}

/// Keeps nothing of the database's error.
#[derive(Debug)]
struct Opaque;

impl From<Error> for Opaque {
    fn from(_: Error) -> Self {
        Self
    }
}

fn rename(conn: &mut PgConnection, id: UserId, first_name: &str) -> QueryResult<Option<User>> {
    diesel::update(users::table.find(id))
        .set(users::first_name.eq(first_name))
        .returning(User::as_returning())
        .get_result(conn)
        .optional()
}

/// Lets another connection change a row between the snapshot and the update of the first two
/// attempts. Returns the number of attempts.
fn attempts_after_conflicts<E: From<Error> + Debug>(database: &TestDatabase) -> u32 {
    let (conn, other) = (&mut database.connect(), &mut database.connect());
    let id = user(conn);
    let mut attempts = 0;
    let renamed = retry_transaction(conn, Isolation::RepeatableRead, |conn| {
        attempts += 1;
        User::find(conn, id)?;
        if attempts < 3 {
            rename(other, id, "Other")?;
        }
        Ok::<_, E>(rename(conn, id, "Mine")?)
    });
    assert_eq!(renamed.unwrap().unwrap().first_name, "Mine");
    attempts
}

#[test]
fn a_serialization_failure_is_retried_whatever_wraps_it() {
    let database = support::database();
    assert_eq!(attempts_after_conflicts::<Error>(&database), 3);
    assert_eq!(attempts_after_conflicts::<Transparent>(&database), 3);
    assert_eq!(attempts_after_conflicts::<Nested>(&database), 3);
    assert_eq!(attempts_after_conflicts::<anyhow::Error>(&database), 3);
    assert_eq!(attempts_after_conflicts::<Box<dyn StdError>>(&database), 3);
    assert_eq!(
        attempts_after_conflicts::<Box<dyn StdError + Send + Sync>>(&database),
        3
    );
    assert_eq!(attempts_after_conflicts::<Opaque>(&database), 3);
}

#[test]
fn a_failure_at_commit_is_retried() {
    let database = support::database();
    let (conn, other) = (&mut database.connect(), &mut database.connect());
    let (one, two) = (user(conn), user(conn));
    let mut attempts = 0;
    // Each reads the row that the other writes. The other one commits first.
    retry_transaction(conn, Isolation::Serializable, |conn| {
        attempts += 1;
        rename(conn, one, "Mine")?;
        User::find(conn, two)?;
        if attempts == 1 {
            other.build_transaction().serializable().run(|other| {
                User::find(other, one)?;
                rename(other, two, "Other")
            })?;
        }
        Ok::<_, Transparent>(())
    })
    .unwrap();
    assert_eq!(attempts, 2);
}

/// Precedes the error in the output of [`a_deadlock_is_retried`].
const SEEN: &str = "seen: ";

#[test]
fn a_deadlock_is_retried() {
    let database = support::database();
    let conn = &mut database.connect();
    let ids = [user(conn), user(conn)];
    let attempts: u32 = support::at_once(&database, 2, |thread, conn| {
        let [first, second] = if thread == 0 { ids } else { [ids[1], ids[0]] };
        let mut attempts = 0;
        retry_transaction(conn, Isolation::ReadCommitted, |conn| {
            attempts += 1;
            rename(conn, first, "First")?;
            if attempts == 1 {
                conn.batch_execute("SELECT pg_sleep(0.2)")?;
            }
            let renamed = rename(conn, second, "Second");
            if let Err(error) = &renamed {
                println!("{SEEN}{error}");
            }
            Ok::<_, anyhow::Error>(renamed?)
        })
        .unwrap();
        attempts
    })
    .into_iter()
    .sum();
    // One of both is the victim, on a busy machine more than once.
    assert!(attempts > 2);
}

/// The strings of each language that the server has: message, translation, message …
fn languages() -> Vec<(PathBuf, Vec<String>)> {
    let mut pg_config = Command::new(support::program("pg_config"));
    let Ok(folder) = pg_config.arg("--localedir").output() else {
        return Vec::new();
    };
    let folder = String::from_utf8(folder.stdout).unwrap();
    let folders = fs::read_dir(folder.trim()).into_iter().flatten();
    let files = folders
        .flat_map(|folder| fs::read_dir(folder.unwrap().path().join("LC_MESSAGES")))
        .flatten()
        .map(|file| file.unwrap().path());
    files
        .filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy();
            name.starts_with("postgres-") && name.ends_with(".mo")
        })
        .map(|path| {
            let file = fs::read(&path).unwrap();
            let strings = file.split(|byte| *byte == 0);
            let strings = strings.map(|bytes| String::from_utf8_lossy(bytes).into_owned());
            (path, strings.collect())
        })
        .collect()
}

#[test]
fn a_deadlock_is_known_in_each_language() {
    let languages = languages();
    if languages.is_empty() {
        return support::skipped("this server has no translations");
    }
    let is_deadlock = |text: &&String| {
        let information = Box::new((*text).clone());
        is_transient(&Error::DatabaseError(
            DatabaseErrorKind::Unknown,
            information,
        ))
    };
    for (path, strings) in languages {
        let known: Vec<&String> = strings.iter().filter(is_deadlock).collect();
        let english = strings.iter().any(|text| text == "deadlock detected");
        // The message and its translation; neither where it is not translated.
        assert_eq!(
            known.len(),
            if english { 2 } else { 0 },
            "{path:?}: {known:?}"
        );
    }
}

/// Runs a test in a process of its own whose server speaks German, and returns what it prints.
/// `None` if the server can't.
pub(crate) fn in_german(test: &str) -> Option<String> {
    if !languages()
        .iter()
        .any(|(path, _)| path.iter().any(|name| name == "de"))
    {
        support::skipped("this server speaks no German");
        return None;
    }
    // The language of a server is that of its environment.
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("LANGUAGE", "de")
        .env("PGOPTIONS", "-c lc_messages=C.UTF-8")
        .env_remove("DATABASE_URL")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    Some(String::from_utf8(output.stdout).unwrap())
}

#[test]
fn a_deadlock_is_retried_in_german() {
    if let Some(seen) = in_german("transactions::a_deadlock_is_retried") {
        let german = format!("{SEEN}Verklemmung (Deadlock) entdeckt");
        assert!(seen.contains(&german), "{seen}");
    }
}

#[test]
#[cfg(feature = "migrator")]
fn a_lock_timeout_is_known_in_german() {
    if let Some(seen) = in_german("revert::a_writer_that_holds_a_lock_stops_the_revert") {
        assert!(seen.contains("storniere Anfrage wegen"), "{seen}");
    }
}

#[test]
fn other_errors_are_not_retried() {
    let database = support::database();
    let conn = &mut database.connect();
    let id = user(conn);
    let mut attempts = 0;
    let refused = retry_transaction(conn, Isolation::Serializable, |conn| {
        attempts += 1;
        rename(conn, id, "Mine")?;
        Err::<(), _>(Transparent::Refused)
    });
    assert!(matches!(refused, Err(Transparent::Refused)));
    let violated = retry_transaction(conn, Isolation::Serializable, |conn| {
        attempts += 1;
        Ok::<_, anyhow::Error>(rename(conn, id, "")?)
    });
    assert!(!is_transient(violated.unwrap_err().as_ref()));
    assert_eq!(attempts, 2);
    assert_eq!(User::find(conn, id).unwrap().unwrap().first_name, "Asha");
}

#[test]
fn it_gives_up_in_the_end() {
    let database = support::database();
    let (conn, other) = (&mut database.connect(), &mut database.connect());
    let id = user(conn);
    let mut attempts = 0;
    let given_up = retry_transaction(conn, Isolation::RepeatableRead, |conn| {
        attempts += 1;
        User::find(conn, id)?;
        rename(other, id, &attempts.to_string())?;
        Ok::<_, anyhow::Error>(rename(conn, id, "Mine")?)
    });
    assert!(is_transient(given_up.unwrap_err().as_ref()));
    assert_eq!(attempts, MAX_ATTEMPTS);
    let names = users::table.select(users::first_name);
    assert_eq!(names.first::<String>(conn).unwrap(), attempts.to_string());
}

#[test]
fn inside_another_transaction_it_refuses() {
    let database = support::database();
    let conn = &mut database.connect();
    let refused = conn.transaction(|conn| {
        retry_transaction(conn, Isolation::Serializable, |_| Ok::<_, Error>(()))
    });
    assert_eq!(refused, Err(Error::AlreadyInTransaction));
}
