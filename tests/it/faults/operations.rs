//! Faults of `docs/operations.md`.

use bruhmcp_db::enums::AuditStatus;
use bruhmcp_db::models::{McpService, NewTokenAudit, TokenAudit};
use diesel::connection::CacheSize;
use diesel::prelude::*;

use super::{Bouncer, Row, query};
use crate::fixtures;
use crate::locks::KEYED;
use crate::operations::{SERVER, block, in_use, migrated, psql, published, shell};

const COUNTERS: &str = "SELECT total_instances_created || ' created, ' || active_instances_count || ' active' FROM mcp_table";

#[test]
fn rows_loaded_past_the_triggers() {
    let old = migrated(&SERVER);
    let conn = &mut PgConnection::establish(&old.url()).unwrap();
    let gmail = fixtures::service(conn, "gmail", 4001);
    for _ in 0..5 {
        let user = fixtures::pro_user(conn);
        fixtures::create(conn, user, gmail).unwrap();
    }
    let new = migrated(&SERVER);
    let load =
        "pg_dump --data-only \"$DATABASE_URL\" | psql -X --set=VERBOSITY=terse \"$NEW_URL\" 2>&1";
    let urls = [("DATABASE_URL", &*old.url()), ("NEW_URL", &new.url())];
    let out = shell(load, &urls).unwrap();
    let errors: Vec<&str> = out
        .lines()
        .filter_map(|line| line.split_once("ERROR:  ").map(|(_, error)| error))
        .collect();
    assert_eq!(query(&old, COUNTERS), "5 created, 5 active");
    let plans = "SELECT DISTINCT plan_type FROM user_plans";
    assert_eq!(
        (query(&old, plans), query(&new, plans)),
        ("pro".into(), "free".into())
    );
    let after = query(&new, COUNTERS);
    psql(
        &new.url(),
        &block("total_instances_created = total_instances_created - ("),
    )
    .unwrap();
    let conn = &mut PgConnection::establish(&new.url()).unwrap();
    assert_eq!(McpService::recount(conn).unwrap().len(), 1);
    Row {
        test: "rows_loaded_past_the_triggers",
        fault: "a dump with --data-only of 5 users, an instance each, is loaded into a migrated \
                database",
        reported: format!("psql goes on after {}", errors.join("<br>")),
        after: format!("no instance is loaded, though counted: {after}; all plans are free"),
        then: format!(
            "after `recount` and the subtraction of docs/operations.md: {}",
            query(&new, COUNTERS)
        ),
    }
    .check();
}

#[test]
fn subscriber_without_setval() {
    let [(_old_server, _old), (_new_server, new)] = published();
    psql(&new.url(), "DROP SUBSCRIPTION move").unwrap();
    let conn = &mut PgConnection::establish(&new.url()).unwrap();
    let audit = NewTokenAudit::new(KEYED, "connect", AuditStatus::Success);
    let first = TokenAudit::insert(conn, &audit).unwrap().audit_id;
    let numbers = "SELECT count(*) - count(DISTINCT audit_id) FROM token_audit_log";
    let repeated = query(&new, numbers);
    psql(&new.url(), &block("setval")).unwrap();
    TokenAudit::insert(conn, &audit).unwrap();
    assert_eq!(query(&new, numbers), repeated);
    Row {
        test: "subscriber_without_setval",
        fault: "an application moves to a logical replica, and its sequence was not set",
        reported: format!(
            "nothing: `TokenAudit::insert` returns a row with audit_id {}",
            first.0
        ),
        after: format!("{repeated} rows of the log have the audit_id of another row"),
        then: "after setval: new rows have numbers of their own".into(),
    }
    .check();
}

#[test]
fn pooler_without_prepared_statements() {
    let database = in_use(&SERVER);
    let settings = Bouncer::without_prepared_statements("pgbouncer");
    let bouncer = Bouncer::start("pgbouncer", &SERVER, settings);
    let url = bouncer.url(&database);
    let read = |conn: &mut PgConnection| McpService::find_by_name(conn, "gmail");
    let [one, other] = &mut [(), ()].map(|()| PgConnection::establish(&url).unwrap());
    read(one).unwrap();
    let error = read(other).unwrap_err();
    for conn in [&mut *one, &mut *other] {
        conn.set_prepared_statement_cache_size(CacheSize::Disabled);
    }
    for _ in 0..3 {
        read(one).unwrap();
        read(other).unwrap();
    }
    Row {
        test: "pooler_without_prepared_statements",
        fault: "an application uses PgBouncer in transaction mode, before 1.21 or without its prepared \
                statements",
        reported: format!("the first operation of the second connection: {error}"),
        after: "unchanged".into(),
        then: "with Diesel's statement cache disabled: it works".into(),
    }
    .check();
}
