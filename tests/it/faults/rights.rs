//! Roles: the service's, missing ones, and an owner of nothing but its database.

use std::sync::LazyLock;

use bruhmcp_devdb::{Database, Server};

use super::{Row, finish, query, said, state, with_user};
use crate::cli::{Outcome, bruhmcp};
use crate::json;

/// The server that has the roles.
static SERVER: LazyLock<Server> = LazyLock::new(|| {
    let server = Server::private(&[]).unwrap();
    query(&server.create_database().unwrap(), ROLES);
    server
});

const ROLES: &str = "CREATE ROLE app_user LOGIN; CREATE ROLE app_admin LOGIN";

fn url_as(database: &Database, role: &str) -> String {
    let user = format!("user={role}");
    database.url().replace("user=postgres", &user)
}

#[track_caller]
fn succeeds(url: &str, arguments: &[&str]) -> Outcome {
    let outcome = bruhmcp(url, arguments);
    assert_eq!(outcome.code, Some(0), "{arguments:?}: {outcome:?}");
    outcome
}

/// The lines of standard output, for a row.
fn printed(outcome: &Outcome) -> String {
    let lines = outcome.out.lines().map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.join(" ")
    });
    lines.collect::<Vec<_>>().join("<br>")
}

#[test]
fn service_with_pending() {
    let database = with_user(&SERVER);
    succeeds(&database.url(), &["grant"]);
    let url = url_as(&database, "app_user");
    let outcome = bruhmcp(&url, &["run"]);
    let status = bruhmcp(&url, &["status"]);
    assert_eq!(status.code, Some(3), "{status:?}");
    Row {
        test: "service_with_pending",
        fault: "`run` as app_user, migrations are pending",
        reported: format!("{}<br>`status` works.", said(&outcome)),
        after: state(&database),
        then: format!("with the owner's role: {}", finish(&database)),
    }
    .check();
}

#[test]
fn service_without_pending() {
    let database = with_user(&SERVER);
    finish(&database);
    succeeds(&database.url(), &["grant"]);
    let url = url_as(&database, "app_user");
    let outcome = succeeds(&url, &["run"]);
    for command in ["status", "plan", "verify"] {
        succeeds(&url, &[command]);
    }
    Row {
        test: "service_without_pending",
        fault: "`run` as app_user, nothing is pending",
        reported: format!(
            "{}: {}<br>`status`, `plan` and `verify` work.",
            said(&outcome),
            printed(&outcome)
        ),
        after: state(&database),
        then: finish(&database),
    }
    .check();
}

#[test]
fn grant_by_another_role() {
    let database = with_user(&SERVER);
    succeeds(&database.url(), &["grant"]);
    let outcome = bruhmcp(&url_as(&database, "app_admin"), &["grant"]);
    Row {
        test: "grant_by_another_role",
        fault: "`grant` as app_admin",
        reported: said(&outcome),
        after: state(&database),
        then: format!("with the owner's role: {}", finish(&database)),
    }
    .check();
}

/// An older program's file would take the rights on newer tables away.
#[test]
fn grant_by_an_older_program() {
    let database = with_user(&SERVER);
    finish(&database);
    let version = crate::runner::next_version();
    query(
        &database,
        "CREATE TABLE newer (a int); GRANT SELECT ON newer TO app_user",
    );
    super::record(&database, &version);
    let outcome = succeeds(&database.url(), &["grant"]);
    assert_eq!(
        query(
            &database,
            "SELECT has_table_privilege('app_user', 'newer', 'SELECT')"
        ),
        "t"
    );
    Row {
        test: "grant_by_an_older_program",
        fault: "`grant`, a newer program has applied a newer version",
        reported: format!("{}<br>{}", said(&outcome), printed(&outcome)),
        after: "unchanged".into(),
        then: "the same".into(),
    }
    .check();
}

#[test]
fn roles_created_later() {
    let server = Server::private(&[]).unwrap();
    let database = with_user(&server);
    finish(&database);
    let outcome = bruhmcp(&database.url(), &["grant"]);
    assert_eq!(outcome.code, Some(5), "{outcome:?}");
    let document = json::check(&bruhmcp(&database.url(), &["grant", "--json"]));
    assert_eq!(document["error"]["kind"], "refused");
    query(&database, "CREATE ROLE app_user LOGIN");
    let denied = bruhmcp(&url_as(&database, "app_user"), &["run"]);
    let document = json::check(&succeeds(&database.url(), &["grant", "--json"]));
    assert_eq!(
        document["granted"],
        serde_json::json!({ "roles": ["app_user"], "missing": ["app_admin"], "newer": [] })
    );
    query(&database, "CREATE ROLE app_admin LOGIN");
    let again = succeeds(&database.url(), &["grant"]);
    succeeds(&url_as(&database, "app_user"), &["run"]);
    Row {
        test: "roles_created_later",
        fault: "`grant`, the roles don't exist",
        reported: said(&outcome),
        after: format!(
            "{}; when the roles are created, `run` as app_user says: {}",
            state(&database),
            said(&denied)
        ),
        then: format!("{}: {}", said(&again), printed(&again)),
    }
    .check();
}

/// The roles exist, and the owner may create neither roles nor databases.
#[test]
fn owner_of_one_database() {
    let server = &*SERVER;
    let database = server.create_database().unwrap();
    query(
        &database,
        &format!(
            "CREATE ROLE owner LOGIN NOSUPERUSER NOCREATEROLE NOCREATEDB;
             ALTER DATABASE {} OWNER TO owner",
            database.name()
        ),
    );
    let url = url_as(&database, "owner");
    assert_eq!(bruhmcp(&url, &["status"]).code, Some(3));
    let commands: [&[&str]; 7] = [
        &["plan"],
        &["run"],
        &["verify"],
        &["redo", "--all", "--yes"],
        &["grant"],
        &["status"],
        &["revert", "--yes"],
    ];
    let mut reported = Vec::new();
    for command in commands {
        let outcome = succeeds(&url, command);
        assert_eq!(outcome.err, "", "{command:?}");
        reported.push(format!("`{}`", command[0]));
    }
    succeeds(&url, &["run"]);
    succeeds(&url, &["grant"]);
    succeeds(&url_as(&database, "app_user"), &["run"]);
    Row {
        test: "owner_of_one_database",
        fault: "a role that owns its database and may not create roles or databases",
        reported: format!("exit 0 from {}", reported.join(", ")),
        after: state(&database),
        then: finish(&database),
    }
    .check();
}

#[test]
fn grant_by_a_role_that_does_not_own_the_tables() {
    let database = with_user(&SERVER);
    let role = "CREATE ROLE colleague LOGIN; GRANT CREATE ON SCHEMA public TO colleague;
                GRANT SELECT ON __diesel_schema_migrations TO colleague";
    query(&database, role);
    let refused = bruhmcp(&url_as(&database, "colleague"), &["grant"]);
    let document = bruhmcp(&url_as(&database, "colleague"), &["grant", "--json"]);
    assert_eq!(json::check(&document)["error"]["kind"], "grant");
    let after = state(&database);
    query(&database, "DROP OWNED BY colleague; DROP ROLE colleague");
    succeeds(&database.url(), &["grant"]);
    Row {
        test: "grant_by_a_role_that_does_not_own_the_tables",
        fault: "`grant` as a role that may create objects and does not own the tables",
        reported: said(&refused),
        after,
        then: format!("with the owner's role: {}", finish(&database)),
    }
    .check();
}
