//! Cells: whole sets of the tables, each in a schema of its own, beside each other in a database.

use std::process::Command;
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
    let versions = versions();
    let [.., older, newest] = &versions[..] else {
        panic!("{versions:?}")
    };
    let run = bruhmcp(
        &url,
        &[
            "run", "--schema", "c8", "--schema", "c7", "--schema", "c8", "--to", older,
        ],
    );
    assert_eq!(run.code, Some(0), "{run:?}");
    let of = |name: &str| {
        run.out
            .lines()
            .filter(|line| line.starts_with(name))
            .count()
    };
    let applied = versions.len() - 1;
    assert_eq!(
        (of("c8: applied "), of("c7: applied ")),
        (applied, applied),
        "{run:?}"
    );
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
    assert_eq!(
        codes,
        [
            ("c7".to_owned(), 0, (&**newest).into()),
            ("c8".to_owned(), 3, (&**older).into())
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
    let left = names().len() - 7;
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
    assert!(stopped.err.ends_with("c8: not tried.\nc9: not tried.\n"));

    let failed = run(&["--json"]);
    assert_eq!(failed.code, Some(1), "{failed:?}");
    let outcomes: Vec<_> = schemas(&failed)
        .into_iter()
        .map(|(_, item)| {
            let steps = item["report"]["steps"].as_array().unwrap().len();
            (item["exit_code"].as_i64().unwrap(), steps)
        })
        .collect();
    assert_eq!(outcomes, [(1, 0), (0, left), (0, left)]);
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

/// Each cell has a lock of its own: a run of one waits for no other. A signal ends them all.
#[test]
fn two_cells_are_migrated_at_once_and_each_once() {
    let database = empty_database();
    for name in ["c7", "c8"] {
        create(&database, name);
    }
    // Holds the run of c7 in 001.
    let held = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'
                    AND (classid, objid) = (7, 7)";
    database
        .psql(
            "CREATE FUNCTION wait() RETURNS event_trigger LANGUAGE plpgsql AS $$
             BEGIN
                 IF current_schema = 'c7' THEN PERFORM pg_advisory_xact_lock(7, 7); END IF;
             END$$;
             CREATE EVENT TRIGGER wait ON ddl_command_start WHEN TAG IN ('CREATE TYPE')
                 EXECUTE FUNCTION public.wait()",
        )
        .unwrap();
    let mut holder = database.connect_as_owner();
    holder
        .batch_execute("SELECT pg_advisory_lock(7, 7)")
        .unwrap();
    let until = |number: &str| {
        while database.psql(held).unwrap() != number {
            thread::yield_now();
        }
    };
    // The wait is a lock that lock_timeout bounds.
    let url = database.url();
    let first = ["run", "--schema", "c7", "--lock-timeout", "600"];
    let stopped = start(&url, &[&first[..], &["--schema", "c8", "--json"]].concat());
    until("1\n");
    let kill = Command::new("kill").arg(stopped.id().to_string()).status();
    assert!(kill.unwrap().success());
    let stopped: Outcome = stopped.wait_with_output().unwrap().into();
    assert_eq!(stopped.code, Some(143), "{stopped:?}");
    assert_eq!(schemas(&stopped)[1].1["exit_code"], Value::Null);
    until("0\n");

    let first = start(&url, &first);
    until("1\n");
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

#[cfg(feature = "crypto")]
mod connections {
    //! A connection belongs to one cell: also behind a pooler.

    use bruhmcp_db::models::User;
    use diesel::connection::CacheSize;
    use diesel::dsl::{select, sql};
    use diesel::pg::PgConnection;
    use diesel::prelude::*;
    use diesel::sql_types::Text;

    use super::*;
    use crate::locks::{OPERATIONS, SERVICES, USER, USER_WITH_ROWS};

    /// A hash of all rows of a cell.
    fn contents(cell: &TestDatabase) -> String {
        let all = "SELECT md5(string_agg(query_to_xml(
                'SELECT * FROM ' || oid::regclass || ' ORDER BY 1', true, false, '')::text, '' ORDER BY oid))
             FROM pg_class WHERE relnamespace = current_schema::regnamespace AND relkind = 'r'";
        cell.psql(all).unwrap()
    }

    fn fill(cell: &TestDatabase, arrange: &str) {
        let mut conn = cell.connect_as_owner();
        conn.batch_execute(&USER_WITH_ROWS).unwrap();
        conn.batch_execute(arrange).unwrap();
    }

    /// Diesel keeps the numbers of the enums of the first cell, so what names an enum fails. What
    /// does not follows the `search_path`. Nothing is written to the first cell.
    #[test]
    fn a_connection_that_changes_its_cell_fails_where_an_enum_is_named() {
        let database = cells();
        let (c7, c8) = (database.cell("c7"), database.cell("c8"));
        for cell in [&c7, &c8] {
            cell.psql(SERVICES).unwrap();
        }
        let (mut unchanged, mut done) = (Vec::new(), Vec::new());
        for operation in OPERATIONS {
            fill(&c7, operation.arrange);
            let mut conn = c7.connect();
            operation.succeed(&mut conn);
            fill(&c8, operation.arrange);
            let before = [&c7, &c8].map(contents);
            conn.batch_execute("SET search_path = c8").unwrap();
            let outcome = (operation.run)(&mut conn);
            let after = [&c7, &c8].map(contents);
            assert_eq!(before[0], after[0], "{}", operation.name);
            match outcome {
                Ok(is_done) => {
                    assert!(is_done, "{}", operation.name);
                    done.push(operation.name);
                }
                // A worker's first statement may have leased rows.
                Err(_) if before[1] != after[1] => {}
                Err(_) => unchanged.push(operation.name),
            }
        }
        for name in [
            "UserPlan::upgrade",
            "SubscriptionTransaction::refund",
            "McpInstance::create",
            "McpCredential::complete_oauth",
        ] {
            assert!(unchanged.contains(&name), "{name}: {done:#?}");
        }
        for name in ["User::sign_up", "AuthToken::revoke"] {
            assert!(done.contains(&name), "{name}: {done:#?}");
        }
    }

    #[cfg(target_os = "linux")]
    mod poolers {
        use std::ffi::OsString;

        use bruhmcp_devdb::Server;

        use super::*;
        use crate::faults::Bouncer;
        use crate::support::{cells_on, skipped};

        /// A server with a database of two cells.
        fn pooled() -> (Server, TestDatabase) {
            let server = Server::private(&[]).unwrap();
            let database = cells_on(&server);
            for cell in ["c7", "c8"] {
                let cell = database.cell(cell);
                cell.psql(SERVICES).unwrap();
                fill(&cell, "SELECT");
            }
            (server, database)
        }

        /// Runs every operation in c7 through a pooler, which a client of c8 uses in between.
        fn use_through(database: &TestDatabase, [c7, c8]: [&str; 2], cache: Option<CacheSize>) {
            let connect = |url: &str| {
                let mut conn = PgConnection::establish(url).unwrap();
                if let Some(size) = cache {
                    conn.set_prepared_statement_cache_size(size);
                }
                conn
            };
            let mut of_c7 = [connect(c7), connect(c7)];
            let of_c8 = &mut connect(c8);
            let cell = database.cell("c7");
            let beside = contents(&database.cell("c8"));
            for (n, operation) in OPERATIONS.iter().enumerate() {
                fill(&cell, operation.arrange);
                operation.succeed(&mut of_c7[n % 2]);
                let schema: String = select(sql::<Text>("current_schema()::text"))
                    .get_result(of_c8)
                    .unwrap();
                assert_eq!(schema, "c8");
                assert!(User::find(of_c8, USER).unwrap().is_some());
            }
            assert_eq!(contents(&database.cell("c8")), beside);
        }

        /// In `[databases]` of PgBouncer, one entry for each cell.
        fn entries(server: &Server, database: &TestDatabase) -> String {
            let entries = ["c7", "c8"].map(|cell| {
                format!(
                    "{cell} = host={} port=5432 dbname={} connect_query='SET search_path = {cell}'\n",
                    server.folder().unwrap().display(),
                    database.name()
                )
            });
            format!("default_pool_size = 1\n[databases]\n{}", entries.concat())
        }

        /// A PgBouncer of each kind, and what it needs for prepared statements.
        fn programs() -> Vec<(OsString, &'static str, Option<CacheSize>)> {
            let mut programs = vec![("pgbouncer".into(), "", Some(CacheSize::Disabled))];
            match std::env::var_os("BRUHMCP_PGBOUNCER_1_21") {
                Some(program) => programs.push((program, "max_prepared_statements = 200\n", None)),
                None => skipped("BRUHMCP_PGBOUNCER_1_21 names no pgbouncer from 1.21 on"),
            }
            programs
        }

        #[test]
        fn an_entry_of_pgbouncer_with_a_connect_query_is_a_cell() {
            let (server, database) = pooled();
            let entries = entries(&server, &database);
            for (program, settings, cache) in programs() {
                let settings = format!("{settings}{entries}");
                let bouncer = Bouncer::start(program, &server, &settings);
                // What only reads works, too.
                let verify = bruhmcp(
                    &bouncer.url_of(database.name(), "postgres"),
                    &["verify", "--schema", "c7", "--schema", "c8"],
                );
                assert_eq!(verify.code, Some(0), "{verify:?}");
                let urls = ["c7", "c8"].map(|cell| bouncer.url_of(cell, "postgres"));
                use_through(&database, [&urls[0], &urls[1]], cache);
            }
        }

        /// In session mode PgBouncer resets what the query has set. A role's setting comes back.
        #[test]
        fn a_connect_query_is_lost_in_session_mode() {
            let (server, database) = pooled();
            let settings = format!("pool_mode = session\n{}", entries(&server, &database));
            let bouncer = Bouncer::start("pgbouncer", &server, &settings);
            let second = |url: &str| {
                let schemas = [(); 2].map(|()| {
                    let conn = &mut PgConnection::establish(url).unwrap();
                    let schema = select(sql::<Text>("current_schema()::text"));
                    schema.get_result::<String>(conn).unwrap()
                });
                schemas[1].clone()
            };
            assert_eq!(second(&bouncer.url_of("c7", "postgres")), "public");
            database
                .psql(
                    "CREATE ROLE app_c7 LOGIN; ALTER ROLE app_c7 SET search_path = c7;
                       GRANT USAGE ON SCHEMA c7 TO app_c7",
                )
                .unwrap();
            assert_eq!(second(&bouncer.url_of(database.name(), "app_c7")), "c7");
        }

        #[test]
        fn a_role_with_a_search_path_is_a_cell() {
            let (server, database) = pooled();
            for cell in ["c7", "c8"] {
                database
                    .psql(&format!(
                        "CREATE ROLE app_{cell} LOGIN IN ROLE app_user, app_admin;
                         ALTER ROLE app_{cell} SET search_path = {cell}"
                    ))
                    .unwrap();
            }
            for (program, settings, cache) in programs() {
                let settings = format!("{settings}default_pool_size = 1");
                let bouncer = Bouncer::start(program, &server, &settings);
                let urls = ["app_c7", "app_c8"].map(|role| bouncer.url_of(database.name(), role));
                use_through(&database, [&urls[0], &urls[1]], cache);
            }
        }

        /// They are refused, or dropped. Then the session is in `public`, where nothing is.
        #[test]
        fn options_in_the_url_do_not_pass_pgbouncer() {
            let (server, database) = pooled();
            for (program, settings, _) in programs() {
                let mut cases = vec![("", false), ("ignore_startup_parameters = options", true)];
                let is_new = !settings.is_empty();
                let version = database.psql("SHOW server_version_num").unwrap();
                if is_new && version.trim_end().parse::<u32>().unwrap() < 180_000 {
                    cases.push(("track_extra_parameters = search_path", true));
                }
                for (ignored, connects) in cases {
                    let settings = format!("{settings}{ignored}");
                    let bouncer = Bouncer::start(&program, &server, &settings);
                    let url = bouncer.url_of(database.name(), "postgres");
                    let found = PgConnection::establish(&(url + "&options=-csearch_path%3Dc7"));
                    assert_eq!(found.is_ok(), connects, "{settings}");
                    if let Ok(mut conn) = found {
                        let error = User::find(&mut conn, USER).unwrap_err();
                        assert!(error.to_string().contains("users"), "{error}");
                    }
                }
            }
        }
    }
}
