//! Cells: whole sets of the tables, each in a schema of its own, beside each other in a database.

use std::thread;

use bruhmcp_db::migrations::{Error, Extent, Refusal, Runner, runner};
use diesel::connection::SimpleConnection;
use serde_json::Value;

use crate::cli::{Outcome, bruhmcp, start};
use crate::difference::assert_same;
use crate::runner::{names, refusal, versions};
use crate::support::{TestDatabase, cells, create_cell, empty_database, in_cell};
use crate::{audit, billing, concurrency, instances, json, money_rules, plans, rules};

/// Legal names, as they stand in SQL and in a connection's options.
const NAMES: [&str; 5] = ["c7", "C 8", r#"c"9"#, r"c\10", "cé';--"];

fn create(database: &TestDatabase, name: &str) {
    create_cell(&database.url(), &name.replace('"', "\"\""));
}

fn runner_in(database: &TestDatabase, schema: &str) -> Runner {
    runner(&database.url()).unwrap().schema(schema)
}

#[test]
fn the_rules_of_instances_and_plans_hold_in_a_cell() {
    for test in [
        plans::a_downgrade_switches_the_surplus_off,
        plans::a_plan_past_its_end_expires,
        instances::an_instance_with_an_api_key_counts_at_once,
        instances::an_expired_or_missing_plan_allows_no_activation,
        instances::two_instances_are_swapped_under_the_limit,
    ] {
        in_cell(test);
    }
}

#[test]
fn races_end_well_in_a_cell() {
    for test in [
        concurrency::of_32_creates_one_succeeds,
        concurrency::of_32_activations_one_succeeds,
        concurrency::of_32_authorizations_one_succeeds,
        concurrency::the_copy_of_the_status_follows_at_each_isolation_level,
        concurrency::two_users_of_one_service_do_not_wait_for_each_other,
        concurrency::calls_from_everywhere_are_all_counted,
        money_rules::refunds_at_once_never_exceed_their_payment,
        billing::concurrent_changes_of_cards_are_not_lost,
    ] {
        in_cell(test);
    }
}

#[test]
fn the_rules_of_money_cards_and_the_log_hold_in_a_cell() {
    for test in [
        rules::each_violated_constraint_is_named,
        rules::what_is_allowed_is_allowed,
        money_rules::a_status_moves_forwards_only,
        money_rules::refunds_never_exceed_their_payment,
        money_rules::a_card_number_is_refused_wherever_it_is,
        money_rules::the_default_card_is_one_of_the_cards,
        billing::cards_come_and_go,
        audit::old_rows_are_purged_in_batches,
        audit::the_summary_counts_by_operation_status_and_method,
    ] {
        in_cell(test);
    }
}

/// The runner's own setting counts, not the search_path of the URL or the role.
#[test]
fn a_schema_of_any_name_is_migrated_beside_the_others() {
    let database = empty_database();
    for name in NAMES {
        create(&database, name);
        let mut runner = runner_in(&database, name);
        assert_eq!(runner.status().unwrap().pending().count(), names().len());
        assert_eq!(runner.run().unwrap().steps.len(), names().len(), "{name}");
        assert!(!runner.verify().unwrap().has_drift(), "{name}");
        runner.grant().unwrap();
    }
    let mut expected = NAMES.map(str::to_owned);
    expected.sort();
    let mut found = runner(&database.url()).unwrap().schemas().unwrap();
    found.sort();
    assert_eq!(found, expected);
    let tables = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace";
    assert_eq!(database.psql(tables).unwrap(), "0\n");

    let elsewhere = database.url_with("options=-csearch_path%3Dpublic");
    let mut other = runner(&elsewhere).unwrap().schema("C 8");
    other.redo(&Extent::All, |_| true).unwrap();
    assert_eq!(database.psql(tables).unwrap(), "0\n");
}

#[test]
fn a_missing_schema_is_refused() {
    let database = empty_database();
    let longer_than_allowed = "c".repeat(64);
    create(&database, &"c".repeat(63));
    for name in ["c7", "", &longer_than_allowed] {
        let missing = Refusal::NoSchema(name.to_owned());
        let mut runner = runner_in(&database, name);
        assert_eq!(refusal(runner.run()), missing);
        assert!(matches!(runner.status(), Err(Error::Refused(found)) if found == missing));
        assert!(matches!(runner.plan(None), Err(Error::Refused(found)) if found == missing));
        assert!(matches!(runner.verify(), Err(Error::Refused(found)) if found == missing));
        assert!(matches!(runner.grant(), Err(Error::Refused(_))));
    }
    let run = bruhmcp(&database.url(), &["run", "--schema", "c7"]);
    assert_eq!(run.code, Some(5), "{run:?}");
    let error = "c7: error: refused, nothing was changed: the schema c7 does not exist. Create it as \
                 its owner: CREATE SCHEMA \"c7\";\n";
    assert_eq!(run.err, error);
    let all = bruhmcp(&database.url(), &["status", "--all"]);
    assert_eq!(all.code, Some(5), "{all:?}");
    assert!(all.err.contains("no schema has"), "{all:?}");
}

fn schemas(outcome: &Outcome) -> Vec<(String, Value)> {
    let document = json::check(outcome);
    let items = document["schemas"].as_array().unwrap().iter();
    items
        .map(|item| (item["schema"].as_str().unwrap().to_owned(), item.clone()))
        .collect()
}

#[test]
fn the_command_line_names_each_schema() {
    let database = empty_database();
    let url = database.url();
    for name in ["c7", "c8", "public_2"] {
        create(&database, name);
    }
    // A ledger of another project is none of a cell.
    database
        .psql(
            "CREATE TABLE __diesel_schema_migrations (version text, run_on timestamp);
             INSERT INTO __diesel_schema_migrations VALUES ('20200101000000', now())",
        )
        .unwrap();
    let run = bruhmcp(
        &url,
        &[
            "run", "--schema", "c8", "--schema", "c7", "--schema", "c8", "--to", "006",
        ],
    );
    assert_eq!(run.code, Some(0), "{run:?}");
    let of = |name: &str| {
        run.out
            .lines()
            .filter(|line| line.starts_with(name))
            .count()
    };
    assert_eq!((of("c8: applied "), of("c7: applied ")), (7, 7), "{run:?}");
    assert!(run.out.starts_with("c8: "), "{run:?}");

    // One of them further.
    assert_eq!(bruhmcp(&url, &["run", "--schema", "c7"]).code, Some(0));
    let status = bruhmcp(&url, &["status", "--all"]);
    assert_eq!(status.code, Some(3), "{status:?}");
    assert!(
        status
            .out
            .contains("\nc7: Nothing is pending.\nc8: applied "),
        "{status:?}"
    );
    assert!(status.out.ends_with("\nc8: 1 pending.\n"), "{status:?}");
    let plan = bruhmcp(&url, &["plan", "--all"]);
    let last = names().pop().unwrap();
    assert_eq!(plan.out, format!("c7: Nothing is pending.\nc8: {last}\n"));
    let verify = bruhmcp(&url, &["verify", "--all", "--json"]);
    let codes: Vec<_> = schemas(&verify)
        .into_iter()
        .map(|(name, item)| {
            let version = item["verification"]["version"].clone();
            (name, item["exit_code"].as_i64().unwrap(), version)
        })
        .collect();
    assert_eq!(verify.code, Some(3), "{verify:?}");
    let versions = versions();
    let newest = versions.last().unwrap();
    assert_eq!(
        codes,
        [
            ("c7".to_owned(), 0, (&**newest).into()),
            ("c8".to_owned(), 3, "006".into())
        ]
    );
    let sql = bruhmcp(&url, &["plan", "--sql", "--schema", "c8"]).out;
    database.psql(&sql).unwrap();
    let tables = "SELECT relnamespace::regnamespace FROM pg_class
                   WHERE relname = 'user_billing_details' ORDER BY 1";
    assert_eq!(database.psql(tables).unwrap(), "c7\nc8\n");

    // The ledger lacks what psql did.
    let grant = bruhmcp(&url, &["grant", "--all"]);
    assert_eq!(grant.code, Some(0), "{grant:?}");
    assert!(grant.out.contains("c8: "), "{grant:?}");
    let adopted = bruhmcp(&url, &["adopt", "--schema", "c8", "--json"]);
    assert_eq!(schemas(&adopted)[0].1["adopted"][0], *last);
    let reverted = bruhmcp(&url, &["revert", "--schema", "c8", "--all"]);
    assert_eq!(reverted.code, Some(0), "{reverted:?}");
    assert!(
        reverted.out.starts_with(&format!("c8: reverted  {last} ")),
        "{reverted:?}"
    );
    let left = runner(&url).unwrap().schemas().unwrap();
    assert_eq!(left, ["c7"]);
    assert_eq!(
        bruhmcp(&url, &["run", "--all", "--schema", "c7"]).code,
        Some(2)
    );
    assert_eq!(bruhmcp(&url, &["verify", "--schema", "c7"]).code, Some(0));
}

#[test]
fn a_failure_in_one_schema_does_not_stop_the_others() {
    let database = empty_database();
    let url = database.url();
    for name in ["c7", "c8", "c9"] {
        create(&database, name);
    }
    let all = ["--schema", "c7", "--schema", "c8", "--schema", "c9"];
    let run = |arguments: &[&str]| bruhmcp(&url, &[&["run"], &all[..], arguments].concat());
    assert_eq!(run(&["--to", "006"]).code, Some(0));
    database
        .psql("CREATE TABLE c7.user_billing_details ()")
        .unwrap();

    let stopped = run(&["--fail-fast", "--json"]);
    assert_eq!(stopped.code, Some(1), "{stopped:?}");
    let codes: Vec<Value> = schemas(&stopped)
        .into_iter()
        .map(|(_, item)| item["exit_code"].clone())
        .collect();
    assert_eq!(codes, [1.into(), Value::Null, Value::Null]);
    assert!(
        stopped
            .err
            .ends_with("c8: not tried (--fail-fast).\nc9: not tried (--fail-fast).\n")
    );

    let failed = run(&["--json"]);
    assert_eq!(failed.code, Some(1), "{failed:?}");
    let outcomes: Vec<_> = schemas(&failed)
        .into_iter()
        .map(|(_, item)| {
            let steps = item["report"]["steps"].as_array().unwrap().len();
            (item["exit_code"].as_i64().unwrap(), steps)
        })
        .collect();
    assert_eq!(outcomes, [(1, 0), (0, 1), (0, 1)]);
    // The worst of 0, 1 and 5.
    let dropped = bruhmcp(
        &url,
        &["run", "--schema", "c6", "--schema", "c7", "--schema", "c8"],
    );
    assert_eq!(dropped.code, Some(1), "{dropped:?}");
    assert!(dropped.err.contains("c6: error: refused"), "{dropped:?}");
    assert!(dropped.err.contains("c7: error: "), "{dropped:?}");
    let lines = dropped.err.lines().chain(dropped.out.lines());
    assert!(
        lines.clone().all(|line| line.starts_with('c')),
        "{dropped:?}"
    );
    assert!(dropped.out.ends_with("c8: Nothing to do.\n"), "{dropped:?}");
    // The time limit is that of the whole run.
    database.psql("DROP TABLE c7.user_billing_details").unwrap();
    bruhmcp(&url, &["revert", "--schema", "c8", "--schema", "c9"]);
    let late = bruhmcp(&url, &[&["run"], &all[..], &["--timeout", "0"]].concat());
    assert_eq!(late.code, Some(8), "{late:?}");
    let of = |name: &str| late.err.lines().any(|line| line.starts_with(name));
    assert!(
        of("c7: error") && of("c8: error") && of("c9: error"),
        "{late:?}"
    );
}

/// Each cell has a lock of its own: a run of one waits for no other.
#[test]
fn two_cells_are_migrated_at_once_and_each_once() {
    let database = empty_database();
    for name in ["c7", "c8"] {
        create(&database, name);
    }
    // Holds the run of c7 in its first table.
    let held = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'
                    AND (classid, objid) = (7, 7)";
    database
        .psql(
            "CREATE FUNCTION wait() RETURNS event_trigger LANGUAGE plpgsql AS $$
             BEGIN
                 IF current_schema = 'c7' THEN PERFORM pg_advisory_xact_lock(7, 7); END IF;
             END$$;
             CREATE EVENT TRIGGER wait ON ddl_command_start WHEN TAG IN ('CREATE TABLE')
                 EXECUTE FUNCTION public.wait()",
        )
        .unwrap();
    let mut holder = database.connect_as_owner();
    holder
        .batch_execute("SELECT pg_advisory_lock(7, 7)")
        .unwrap();
    // The wait is a lock that lock_timeout bounds.
    let url = database.url();
    let first = start(&url, &["run", "--schema", "c7", "--lock-timeout", "600"]);
    while database.psql(held).unwrap() == "0\n" {
        thread::yield_now();
    }
    let other = bruhmcp(&url, &["run", "--schema", "c8", "--lock-wait", "0"]);
    assert_eq!(other.code, Some(0), "{other:?}");
    let same = bruhmcp(&url, &["run", "--schema", "c7", "--lock-wait", "0"]);
    assert_eq!(same.code, Some(4), "{same:?}");
    drop(holder);
    let first: Outcome = first.wait_with_output().unwrap().into();
    assert_eq!(first.code, Some(0), "{first:?}");
    let verify = bruhmcp(&url, &["verify", "--all"]);
    assert_eq!(verify.code, Some(0), "{verify:?}");
    assert_eq!(
        verify.out.matches("is as expected at ").count(),
        2,
        "{verify:?}"
    );
}

/// 000 finds the tables of the previous system in one cell, and leaves the other alone.
#[test]
fn an_archive_of_one_cell_leaves_the_other_alone() {
    let database = cells();
    let (c7, old) = (database.cell("c7"), database.cell("old"));
    c7.psql(&rules::with_keys(include_str!("../fixtures/rows.sql")))
        .unwrap();
    create(&database, "old");
    old.psql(
        "CREATE TABLE users (id serial PRIMARY KEY, email text);
         INSERT INTO users (email) VALUES ('a@b.c')",
    )
    .unwrap();
    let before = c7.dump(&[]);
    let run = runner_in(&database, "old").run().unwrap();
    assert_eq!(run.steps.len(), names().len());
    assert_eq!(
        database.psql("TABLE bruhmcp_archive.users").unwrap(),
        "1|a@b.c\n"
    );
    assert_same(&before, &c7.dump(&[]));

    // One database has one archive.
    create(&database, "older");
    database.psql("CREATE TABLE older.users (id int)").unwrap();
    let mut older = runner_in(&database, "older");
    let refused = older.run().unwrap_err().to_string();
    assert!(
        refused.contains("The schema bruhmcp_archive already exists"),
        "{refused}"
    );
    runner_in(&database, "old")
        .revert(&Extent::All, |_| true)
        .unwrap();
    assert_eq!(old.psql("TABLE users").unwrap(), "1|a@b.c\n");
    assert_eq!(older.run().unwrap().steps.len(), names().len());
    assert_same(&before, &c7.dump(&[]));
}
