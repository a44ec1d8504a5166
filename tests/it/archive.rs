//! 000 on a database of the previous system: it archives everything, and its down restores it.

use std::path::Path;

use bruhmcp_db::migrations::MIGRATIONS;
use diesel::connection::{Connection, SimpleConnection};
use diesel_migrations::MigrationHarness;

use crate::difference::assert_same;
use crate::support::{self, TestDatabase, superuser};

const LEGACY: &str = include_str!("../fixtures/legacy.sql");

/// Relations of the fixture that 000 moves, with partitions and inheriting tables.
const MOVED: [&str; 20] = [
    "users",
    "beta_users",
    "auth_tokens",
    "user_subscriptions",
    "subscription_transactions",
    "account_credits",
    "mcp_table",
    "mcp_service_table",
    "mcp_credentials",
    "token_audit_log",
    "token_audit_log_2023",
    "token_audit_log_2024",
    "token_audit_summary",
    "user_plans",
    "webhook_events",
    "user_billing_details",
    "api_keys",
    "magic_links",
    "sessions",
    "password_resets",
];

fn legacy() -> TestDatabase {
    let database = support::empty_database();
    database.psql(LEGACY).unwrap();
    database
}

/// The fixture, owned by a role that has just the rights that 000 needs.
fn legacy_of_pg_monitor() -> TestDatabase {
    let database = support::empty_database();
    database
        .psql(
            r#"GRANT CREATE ON DATABASE :"DBNAME" TO pg_monitor;
               GRANT CREATE ON SCHEMA public TO pg_monitor;"#,
        )
        .unwrap();
    database
        .psql(&format!("SET ROLE pg_monitor;\n{LEGACY}"))
        .unwrap();
    database
}

fn up(database: &TestDatabase) -> Result<String, String> {
    database.psql_file(&support::up_sql()[0])
}

fn down(database: &TestDatabase) -> Result<String, String> {
    database.psql_file(&support::down_sql()[0])
}

/// Returns each moved relation with the number and a digest of its rows.
fn contents(database: &TestDatabase, schema: &str) -> String {
    let statements = MOVED.map(|name| {
        format!(
            r#"SELECT '{name}', count(*), md5(string_agg(r::text, '' ORDER BY r::text COLLATE "C"))
               FROM {schema}.{name} AS r;"#
        )
    });
    database.psql(&statements.concat()).unwrap()
}

/// Lists the objects of a schema, without indexes and what belongs to a table.
fn objects(database: &TestDatabase, schema: &str) -> String {
    database
        .psql(&format!(
            r#"SELECT (pg_identify_object(classid, objid, 0)).identity COLLATE "C"
               FROM pg_depend
               WHERE refclassid = 'pg_namespace'::regclass AND refobjid = '{schema}'::regnamespace
               ORDER BY 1"#
        ))
        .unwrap()
}

fn has_archive(database: &TestDatabase) -> bool {
    let answer = database.psql("SELECT to_regnamespace('bruhmcp_archive') IS NOT NULL");
    answer.unwrap() == "t\n"
}

/// Runs 000's up or down, which must fail with this SQLSTATE and change nothing.
fn assert_refused(
    database: &TestDatabase,
    run: impl FnOnce(&TestDatabase) -> Result<String, String>,
    sqlstate: &str,
) -> String {
    let before = database.dump(&[]);
    let error = run(database).unwrap_err();
    assert!(error.contains(&format!(":  {sqlstate}: ")), "{error}");
    assert_same(&before, &database.dump(&[]));
    error
}

#[test]
fn every_row_is_archived() {
    let database = legacy();
    let before = contents(&database, "public");
    assert!(!before.contains("|0|"), "each table needs a row: {before}");

    up(&database).unwrap();

    assert_same(&before, &contents(&database, "bruhmcp_archive"));
    assert_eq!(
        objects(&database, "public"),
        "public.active_people\n\
         public.receipt_number_seq\n\
         public.revenue_per_user\n\
         public.support_tickets\n\
         public.support_tickets_ticket_id_seq\n\
         public.users_flags\n"
    );
}

#[test]
fn down_restores_every_byte_and_so_does_a_second_round() {
    let database = legacy();
    let before = database.dump(&[]);
    up(&database).unwrap();
    let archived = database.dump(&[]);
    down(&database).unwrap();
    assert_same(&before, &database.dump(&[]));

    up(&database).unwrap();
    assert_same(&archived, &database.dump(&[]));
    down(&database).unwrap();
    assert_same(&before, &database.dump(&[]));
}

#[test]
fn all_migrations_run_on_top_and_back() {
    let database = legacy();
    let before = database.dump(&[]);
    let rows = contents(&database, "public");
    for path in support::up_sql() {
        database.psql_file(&path).unwrap();
    }
    assert_same(&rows, &contents(&database, "bruhmcp_archive"));
    for path in support::down_sql().iter().rev() {
        database.psql_file(path).unwrap();
    }
    assert_same(&before, &database.dump(&[]));
}

/// 000 finds everything that 001 to 007 create. A later migration needs no place in its list: 000
/// has run before it.
#[test]
fn no_name_of_a_later_migration_is_forgotten() {
    let database = support::empty_database();
    for path in support::up_sql() {
        database.psql_file(&path).unwrap();
        if path.ends_with("007_add_user_billing_details/up.sql") {
            break;
        }
    }
    // With this constraint, 000 would recognise its own schema and refuse.
    database
        .psql("ALTER TABLE users DROP CONSTRAINT users_email_canonical")
        .unwrap();
    let before = database.dump(&[]);
    let created = objects(&database, "public");
    assert!(
        created.contains("public.user_billing_details\n"),
        "{created}"
    );

    up(&database).unwrap();
    assert_eq!(objects(&database, "public"), "");
    assert_eq!(
        objects(&database, "bruhmcp_archive"),
        created.replace("public.", "bruhmcp_archive.")
    );
    down(&database).unwrap();
    assert_same(&before, &database.dump(&[]));
}

#[test]
fn the_comment_lists_what_moved_and_whom_it_concerns() {
    let database = legacy();
    database
        .psql(
            "CREATE FUNCTION sign_in() RETURNS bigint LANGUAGE sql AS
                 'SELECT count(*) FROM \"sessions\" JOIN public.users ON true';
             CREATE FUNCTION sign_out() RETURNS void LANGUAGE plpgsql AS
                 $$ BEGIN DELETE FROM Magic_Links; END $$;
             CREATE FUNCTION of_others() RETURNS text LANGUAGE sql AS
                 $$ SELECT 'users_flags ' || 'crm.users' $$;
             CREATE PUBLICATION everything FOR ALL TABLES;
             CREATE PUBLICATION \"Of public\" FOR TABLES IN SCHEMA public;
             CREATE SCHEMA other;
             CREATE PUBLICATION of_other FOR TABLES IN SCHEMA other;",
        )
        .unwrap();
    // The server describes objects in its language.
    let up = format!("SET lc_messages = 'C';\n{}", read(&support::up_sql()[0]));
    database.psql(&up).unwrap();
    let comment = database
        .psql("SELECT obj_description('bruhmcp_archive'::regnamespace, 'pg_namespace')")
        .unwrap();
    let (_, list) = comment.split_once("no longer needed.\n").unwrap();
    let mut moved = MOVED;
    moved.sort_unstable();
    assert_same(
        &format!(
            "Relations: {}\n\
             Objects outside that still refer to it:\n\
             - column plan of table support_tickets\n\
             - constraint support_tickets_user_id_fkey on table support_tickets\n\
             - publication of table bruhmcp_archive.users in publication warehouse\n\
             - rule _RETURN on materialized view revenue_per_user\n\
             - rule _RETURN on view active_people\n\
             - trigger touch_ticket on table support_tickets\n\
             Functions outside that name a relation, and find the new one from now on:\n\
             - function sign_in()\n\
             - function sign_out()\n\
             Publications whose tables change:\n\
             - publication \"Of public\"\n\
             - publication everything\n",
            moved.join(", ")
        ),
        list,
    );
}

/// What 000 and the runner say in common.
const LOST: &str = ", but __diesel_schema_migrations lacks ";

/// A database at each version that creates something, whose ledger was lost: users and tables stay
/// where they are, whatever client runs 000.
#[test]
fn this_schema_without_its_ledger_is_never_archived() {
    for version in [1, 7] {
        for lose in [
            "TRUNCATE __diesel_schema_migrations",
            "DROP TABLE __diesel_schema_migrations",
            "CREATE SCHEMA other; ALTER TABLE __diesel_schema_migrations SET SCHEMA other",
        ] {
            let database = support::empty_database();
            let conn = &mut database.connect_as_owner();
            for _ in 0..=version {
                conn.run_next_migration(MIGRATIONS).unwrap();
            }
            database
                .psql(
                    "INSERT INTO users (first_name, last_name, email)
                     SELECT 'A', '', n || '@example.in' FROM generate_series(1, 1000) AS n",
                )
                .unwrap();
            database.psql(lose).unwrap();

            let error = assert_refused(&database, up, "42P07");
            assert!(error.contains(LOST), "{error}");
            let hint = "HINT:  Run \"bruhmcp-db adopt\", which writes them, or restore \
                        public.__diesel_schema_migrations from a backup.";
            assert!(error.contains(hint), "{error}");

            let users = database.dump(&["--table=users"]);
            let error = conn
                .run_pending_migrations(MIGRATIONS)
                .unwrap_err()
                .to_string();
            assert!(error.contains(LOST), "{error}");
            #[cfg(feature = "migrator")]
            {
                let mut runner = bruhmcp_db::migrations::runner(&database.url()).unwrap();
                let error = runner.run().unwrap_err().to_string();
                assert!(error.contains(LOST), "{error}");
                assert!(error.contains("Run `adopt`"), "{error}");
            }
            assert_same(&users, &database.dump(&["--table=users"]));
            assert!(!has_archive(&database));
        }
    }
}

/// Some names of this schema don't make an old one into it.
#[test]
fn an_old_schema_with_some_of_the_names_is_archived() {
    for names in [
        "CREATE TYPE auth_token_type AS ENUM (); CREATE TYPE subscription_plan AS ENUM ();
         CREATE TYPE subscription_status AS ENUM (); CREATE TYPE billing_cycle AS ENUM ();
         CREATE TYPE transaction_type AS ENUM (); CREATE TYPE transaction_status AS ENUM ();
         CREATE TYPE credit_source AS ENUM ();",
        "ALTER TABLE users ADD CONSTRAINT users_email_canonical CHECK (email <> '') NOT VALID;
         CREATE TYPE billing_cycle AS ENUM ();",
    ] {
        let database = legacy();
        database.psql(names).unwrap();
        let before = contents(&database, "public");
        for path in support::up_sql() {
            database.psql_file(&path).unwrap();
        }
        assert_same(&before, &contents(&database, "bruhmcp_archive"));
    }
}

#[test]
fn what_is_left_behind_works_on() {
    let database = legacy();
    let people = "SELECT count(*), sum(id) FROM active_people";
    let before = database.psql(people).unwrap();
    up(&database).unwrap();
    let psql = |sql| database.psql(sql).unwrap();

    assert_eq!(psql(people), before);

    let error = database
        .psql("INSERT INTO support_tickets (user_id, subject) VALUES (9999, 'nobody')")
        .unwrap_err();
    assert!(error.contains("support_tickets_user_id_fkey"), "{error}");
    psql(
        "INSERT INTO support_tickets (user_id, subject, plan) VALUES (398, 'a', 'basic'), (399, 'b', 'basic')",
    );
    psql("DELETE FROM bruhmcp_archive.users WHERE id = 398");
    assert_eq!(
        psql("SELECT user_id FROM support_tickets WHERE user_id IN (398, 399)"),
        "399\n"
    );

    psql("UPDATE support_tickets SET subject = 'touched' WHERE ticket_id = 1");
    assert_eq!(
        psql("SELECT updated_at > '2024-01-01' FROM support_tickets WHERE ticket_id = 1"),
        "t\n"
    );

    psql(
        "INSERT INTO bruhmcp_archive.subscription_transactions (user_id, amount, status)
         VALUES (399, 12.5, 'captured')",
    );
    psql("REFRESH MATERIALIZED VIEW CONCURRENTLY revenue_per_user");
    assert_eq!(
        psql("SELECT revenue FROM revenue_per_user WHERE user_id = 399"),
        "12.50\n"
    );

    assert_eq!(
        psql(
            "SELECT schemaname, tablename FROM pg_publication_tables WHERE pubname = 'warehouse' ORDER BY 2"
        ),
        "public|support_tickets\nbruhmcp_archive|users\n"
    );
}

#[test]
fn archived_tables_keep_triggers_rules_sequences_and_rights() {
    let database = legacy();
    up(&database).unwrap();
    let psql = |sql| database.psql(sql).unwrap();

    assert_eq!(
        psql(
            "UPDATE bruhmcp_archive.users SET name = 'New' WHERE id = 1 RETURNING updated_at > '2024-01-01'"
        ),
        "t\n"
    );
    assert_eq!(
        psql(
            "UPDATE bruhmcp_archive.mcp_service_table SET usage_count = 0 WHERE usage_count = 5 RETURNING version"
        ),
        "2\n"
    );
    psql("DELETE FROM bruhmcp_archive.mcp_table");
    assert_eq!(
        psql("SELECT count(*) FROM bruhmcp_archive.mcp_table"),
        "200\n"
    );
    assert_eq!(
        psql(
            "INSERT INTO bruhmcp_archive.account_credits (user_id, amount) VALUES (1, 1) RETURNING id"
        ),
        "201\n"
    );
    assert_eq!(
        psql(
            "SELECT bruhmcp_archive.cleanup_old_token_audit_logs('basic'::bruhmcp_archive.plan_type)"
        ),
        "1\n"
    );
    assert_eq!(
        psql("SELECT has_column_privilege('pg_monitor', 'bruhmcp_archive.users', 'name', 'SELECT'),
                     has_column_privilege('pg_monitor', 'bruhmcp_archive.users', 'password_hash', 'SELECT')"),
        "t|f\n"
    );
}

#[test]
fn an_existing_archive_is_never_added_to() {
    let database = legacy();
    up(&database).unwrap();
    // With nothing to move, an archive may exist.
    let archived = database.dump(&[]);
    up(&database).unwrap();
    assert_same(&archived, &database.dump(&[]));

    database.psql("CREATE TABLE users (id int)").unwrap();
    let error = assert_refused(&database, up, "42P06");
    assert!(error.contains("Rename that schema"), "{error}");

    // An empty archive schema is refused too.
    let database = legacy();
    database.psql("CREATE SCHEMA bruhmcp_archive").unwrap();
    assert_refused(&database, up, "42P06");
}

#[test]
fn an_empty_database_stays_empty() {
    let database = support::empty_database();
    let before = database.dump(&[]);
    up(&database).unwrap();
    assert_same(&before, &database.dump(&[]));
    down(&database).unwrap();
    assert_same(&before, &database.dump(&[]));
}

#[test]
fn down_leaves_alone_what_up_did_not_make() {
    // Nothing was archived.
    let database = legacy();
    let before = database.dump(&[]);
    down(&database).unwrap();
    assert_same(&before, &database.dump(&[]));

    // The archive was dropped.
    up(&database).unwrap();
    database
        .psql("DROP SCHEMA bruhmcp_archive CASCADE")
        .unwrap();
    let before = database.dump(&[]);
    down(&database).unwrap();
    assert_same(&before, &database.dump(&[]));

    // Another schema has the name.
    database
        .psql("CREATE SCHEMA bruhmcp_archive; CREATE TABLE bruhmcp_archive.users (id int)")
        .unwrap();
    let before = database.dump(&[]);
    down(&database).unwrap();
    assert_same(&before, &database.dump(&[]));
}

#[test]
fn down_moves_back_what_the_owner_kept() {
    let database = legacy();
    up(&database).unwrap();
    database
        .psql("DROP TABLE bruhmcp_archive.sessions")
        .unwrap();
    down(&database).unwrap();
    assert!(!has_archive(&database));

    let kept = legacy();
    kept.psql("DROP TABLE sessions").unwrap();
    assert_same(&kept.dump(&[]), &database.dump(&[]));
}

#[test]
fn down_refuses_where_a_name_is_taken() {
    let database = legacy();
    up(&database).unwrap();
    database.psql("CREATE TABLE sessions (id int)").unwrap();
    let error = assert_refused(&database, down, "42P07");
    assert!(error.contains("sessions"), "{error}");

    database
        .psql("DROP TABLE sessions; CREATE TYPE plan_type AS ENUM ()")
        .unwrap();
    assert_refused(&database, down, "42710");
}

/// Up and down, for odd schema names and all kinds of objects.
#[test]
fn only_the_current_schema_is_touched() {
    if !superuser() {
        return;
    }
    let database = support::empty_database();
    database
        .psql(
            r#"CREATE SCHEMA "Tenant 1's";
               CREATE SCHEMA partitions;
               CREATE TABLE users (id int);
               ALTER DATABASE :"DBNAME" SET search_path = "Tenant 1's", public;"#,
        )
        .unwrap();
    // Names of the list, on objects of each kind.
    database
        .psql(
            r#"CREATE TYPE subscription_plan AS RANGE (subtype = int4);
               CREATE TYPE subscription_status AS (since int, plan subscription_plan);
               CREATE DOMAIN billing_cycle AS subscription_plan;
               CREATE TABLE plan_type (a int);
               CREATE SEQUENCE webhook_status;
               CREATE VIEW users AS SELECT 1 AS id;
               CREATE MATERIALIZED VIEW sessions AS SELECT id FROM users;
               CREATE FOREIGN DATA WRAPPER nowhere;
               CREATE SERVER nowhere FOREIGN DATA WRAPPER nowhere;
               CREATE FOREIGN TABLE api_keys (a int) SERVER nowhere;
               CREATE TABLE mcp_table (a int, b text) PARTITION BY LIST (a);
               CREATE TABLE "Of (1" PARTITION OF mcp_table FOR VALUES IN (1) PARTITION BY HASH (b);
               CREATE TABLE "Of 'one'" PARTITION OF "Of (1" FOR VALUES WITH (MODULUS 1, REMAINDER 0);
               CREATE TABLE partitions.of_two PARTITION OF mcp_table FOR VALUES IN (2);
               CREATE PROCEDURE assign_default_plan(subscription_status, OUT a int, INOUT b plan_type[])
                   LANGUAGE sql AS 'SELECT 1, NULL::plan_type[]';
               CREATE AGGREGATE update_updated_at_column(*) (sfunc = int8inc, stype = int8, initcond = '0');
               CREATE TABLE other (status subscription_status, id int DEFAULT nextval('webhook_status'));
               CREATE INDEX webhook_events ON other (id);"#,
        )
        .unwrap();
    let before = database.dump(&[]);

    up(&database).unwrap();
    assert_eq!(
        objects(&database, "bruhmcp_archive"),
        r#"bruhmcp_archive."Of 'one'"
bruhmcp_archive."Of (1"
bruhmcp_archive.api_keys
bruhmcp_archive.assign_default_plan(bruhmcp_archive.subscription_status,bruhmcp_archive.plan_type[])
bruhmcp_archive.billing_cycle
bruhmcp_archive.mcp_table
bruhmcp_archive.plan_type
bruhmcp_archive.sessions
bruhmcp_archive.subscription_plan
bruhmcp_archive.subscription_status
bruhmcp_archive.update_updated_at_column()
bruhmcp_archive.users
bruhmcp_archive.webhook_status
"#
    );
    assert_eq!(objects(&database, "public"), "public.users\n");
    assert_eq!(objects(&database, "partitions"), "partitions.of_two\n");

    // From another schema, down leaves this archive alone.
    let archived = database.dump(&[]);
    database
        .psql(&format!(
            "SET search_path = public;\n{}",
            read(&support::down_sql()[0])
        ))
        .unwrap();
    assert_same(&archived, &database.dump(&[]));

    down(&database).unwrap();
    assert_same(&before, &database.dump(&[]));
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn members_of_an_extension_stay() {
    if !superuser() {
        return;
    }
    let database = support::empty_database();
    database
        .psql(
            "CREATE TABLE sessions (id int);
             CREATE TYPE plan_type AS ENUM ();
             CREATE FUNCTION assign_default_plan() RETURNS int LANGUAGE sql AS 'SELECT 1';
             ALTER EXTENSION plpgsql ADD TABLE sessions;
             ALTER EXTENSION plpgsql ADD TYPE plan_type;
             ALTER EXTENSION plpgsql ADD FUNCTION assign_default_plan();",
        )
        .unwrap();
    up(&database).unwrap();
    assert!(!has_archive(&database));
}

#[test]
fn nobody_else_may_enter_the_archive() {
    if !superuser() {
        return;
    }
    let database = legacy();
    let before = database.dump(&[]);
    database
        .psql("ALTER DEFAULT PRIVILEGES GRANT ALL ON SCHEMAS TO PUBLIC, pg_monitor")
        .unwrap();
    up(&database).unwrap();
    let others = database
        .psql(
            "SELECT grantee FROM pg_namespace, aclexplode(nspacl)
             WHERE nspname = 'bruhmcp_archive' AND grantee <> nspowner",
        )
        .unwrap();
    assert_eq!(others, "");
    let error = database
        .psql("SET ROLE pg_monitor; SELECT name FROM bruhmcp_archive.users")
        .unwrap_err();
    assert!(
        error.contains("42501") && error.contains("bruhmcp_archive"),
        "{error}"
    );

    down(&database).unwrap();
    database
        .psql("ALTER DEFAULT PRIVILEGES REVOKE ALL ON SCHEMAS FROM PUBLIC, pg_monitor")
        .unwrap();
    assert_same(&before, &database.dump(&[]));
}

/// A foreign key is checked as the owner of the referenced table, who may not own the archive.
#[test]
fn owners_still_reach_their_archived_tables() {
    if !superuser() {
        return;
    }
    let database = legacy_of_pg_monitor();
    let before = database.dump(&[]);
    up(&database).unwrap();
    database
        .psql(
            "BEGIN;
             SET ROLE pg_monitor;
             INSERT INTO support_tickets (user_id, subject) VALUES (1, 'new');
             DELETE FROM bruhmcp_archive.users WHERE id = 390;
             ROLLBACK;
             SELECT setval('support_tickets_ticket_id_seq', 200)",
        )
        .unwrap();
    down(&database).unwrap();
    assert_same(&before, &database.dump(&[]));
}

#[test]
fn a_busy_table_stops_it_after_the_lock_timeout() {
    let database = legacy();
    // Runs 000 while another session reads a table.
    let while_read = |table: &str, run: fn(&TestDatabase) -> Result<String, String>| {
        let mut reader = database.connect_as_owner();
        reader
            .transaction(|reader| {
                reader.batch_execute(&format!("SELECT FROM {table} LIMIT 1"))?;
                assert_refused(&database, run, "55P03");
                diesel::QueryResult::Ok(())
            })
            .unwrap();
    };
    while_read("sessions", up);
    up(&database).unwrap();
    while_read("bruhmcp_archive.sessions", down);
    down(&database).unwrap();
}

#[test]
fn one_table_of_another_owner_stops_it() {
    if !superuser() {
        return;
    }
    let database = legacy_of_pg_monitor();
    let as_pg_monitor =
        |path: &Path| database.psql(&format!("SET ROLE pg_monitor;\n{}", read(path)));
    database
        .psql("ALTER TABLE sessions OWNER TO CURRENT_USER")
        .unwrap();
    let error = assert_refused(&database, |_| as_pg_monitor(&support::up_sql()[0]), "42501");
    assert!(error.contains("sessions"), "{error}");

    database
        .psql("ALTER TABLE sessions OWNER TO pg_monitor")
        .unwrap();
    as_pg_monitor(&support::up_sql()[0]).unwrap();
    database
        .psql("ALTER TABLE bruhmcp_archive.sessions OWNER TO CURRENT_USER")
        .unwrap();
    assert_refused(
        &database,
        |_| as_pg_monitor(&support::down_sql()[0]),
        "42501",
    );
}

#[test]
fn the_veto_of_an_event_trigger_stops_it() {
    if !superuser() {
        return;
    }
    let database = legacy();
    // Routines move last, after tables and types.
    database
        .psql(
            "CREATE FUNCTION veto() RETURNS event_trigger LANGUAGE plpgsql
                 AS $$ BEGIN RAISE 'not here' USING ERRCODE = 'insufficient_privilege'; END $$;
             CREATE EVENT TRIGGER veto ON ddl_command_end WHEN TAG IN ('ALTER ROUTINE') EXECUTE FUNCTION veto();",
        )
        .unwrap();
    let error = assert_refused(&database, up, "42501");
    assert!(error.contains("not here"), "{error}");
}
