//! Who may do what: `migrations/roles.sql`. The server is a private one, because roles belong to the
//! whole server.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use bruhmcp_db::migrations::MIGRATIONS;
#[cfg(feature = "migrator")]
use bruhmcp_db::migrations::{Extent, Note, runner};
use bruhmcp_devdb::Server;
use diesel_migrations::MigrationHarness;

use crate::difference::{assert_same, assert_same_set};
use crate::rules::with_keys;
use crate::support::{ROLES_SQL, TestDatabase, create_roles, database_on, down_sql, up_sql};

static SERVER: LazyLock<Server> = LazyLock::new(|| {
    let server = Server::private(&[]).unwrap();
    let database = TestDatabase::from(server.create_database().unwrap());
    assert!(create_roles(&mut database.connect_as_owner()));
    server
});

const ROLES: [&str; 2] = ["app_user", "app_admin"];

/// Relations, with the rights of `app_user` and of `app_admin` as psql shows them: `r` SELECT,
/// `a` INSERT, `w` UPDATE, `d` DELETE.
const RIGHTS: [(&str, [&str; 2]); 15] = [
    ("users", ["raw", "rawd"]),
    ("auth_tokens", ["rawd", "rawd"]),
    ("user_subscriptions", ["raw", "rawd"]),
    ("subscription_transactions", ["raw", "rawd"]),
    ("account_credits", ["raw", "rawd"]),
    ("mcp_table", ["r", "rawd"]),
    ("mcp_service_table", ["rawd", "rawd"]),
    ("mcp_credentials", ["rawd", "rawd"]),
    ("token_audit_log", ["r", "r"]),
    ("token_audit_log_audit_id_seq", ["", ""]),
    ("token_audit_summary", ["r", "r"]),
    ("user_plans", ["raw", "rawd"]),
    ("webhook_events", ["raw", "rawd"]),
    ("user_billing_details", ["rawd", "rawd"]),
    ("__diesel_schema_migrations", ["r", "r"]),
];

/// Columns of `token_audit_log` that both roles may insert.
const LOGGED: [&str; 8] = [
    "error_message",
    "error_type",
    "instance_id",
    "metadata",
    "method",
    "operation",
    "status",
    "user_id",
];

fn database() -> TestDatabase {
    database_on(&SERVER)
}

fn empty_database() -> TestDatabase {
    TestDatabase::from(SERVER.create_database().unwrap())
}

fn lines(database: &TestDatabase, sql: &str) -> Vec<String> {
    let rows = database.psql(sql).unwrap();
    rows.lines().map(str::to_owned).collect()
}

#[track_caller]
fn assert_denied(database: &TestDatabase, role: &str, sql: &str) {
    let error = database
        .psql(&format!("SET ROLE {role}; {sql}"))
        .expect_err(sql);
    assert!(error.contains("42501"), "{role}: {sql}: {error}");
}

/// What a role may do with each relation, whether it was granted to it or to everyone.
fn rights_on_relations(database: &TestDatabase, role: &str) -> BTreeMap<String, String> {
    let rows = lines(
        database,
        &format!(
            "SELECT relname, string_agg(letter, '' ORDER BY position(letter IN 'rawdDxtm'))
               FROM pg_class
               LEFT JOIN (VALUES ('r', 'SELECT'), ('a', 'INSERT'), ('w', 'UPDATE'), ('d', 'DELETE'),
                                 ('D', 'TRUNCATE'), ('x', 'REFERENCES'), ('t', 'TRIGGER'),
                                 ('m', CASE WHEN current_setting('server_version_num')::int >= 170000
                                            THEN 'MAINTAIN' END)) AS p (letter, privilege)
                 ON has_table_privilege('{role}', pg_class.oid, privilege)
              WHERE relnamespace = 'public'::regnamespace
                AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND NOT relispartition
              GROUP BY relname"
        ),
    );
    let pairs = rows.iter().map(|row| row.split_once('|').unwrap());
    pairs
        .map(|(name, rights)| (name.to_owned(), rights.to_owned()))
        .collect()
}

/// A table that is not on the list keeps the convention, so a new one needs no change here.
/// The rule tells its own trigger from one that a role makes on a temporary table.
#[test]
fn a_trigger_of_a_role_does_not_switch_oauth_status() {
    let database = database();
    database
        .psql(
            "INSERT INTO users (first_name, last_name, email) VALUES ('a', '', 'a@b.example');
             INSERT INTO mcp_table (mcp_service_name, display_name, port, type)
             VALUES ('figma', 'Figma', 1, 'oauth');
             INSERT INTO mcp_service_table (user_id, mcp_service_id)
             SELECT id, mcp_service_id FROM users, mcp_table",
        )
        .unwrap();
    for role in ROLES {
        let error = database
            .psql(&format!(
                "SET ROLE {role};
                 CREATE TEMP TABLE mine (a int);
                 CREATE FUNCTION pg_temp.switch() RETURNS trigger LANGUAGE plpgsql AS $$
                 BEGIN
                     UPDATE mcp_service_table SET oauth_status = 'completed';
                     RETURN NULL;
                 END$$;
                 CREATE TRIGGER switch AFTER INSERT ON mine
                     FOR EACH ROW EXECUTE FUNCTION pg_temp.switch();
                 INSERT INTO mine VALUES (1)"
            ))
            .unwrap_err();
        let rule = "mcp_service_table_oauth_status_synced";
        assert!(error.contains(rule), "{error}");
        database
            .psql(&format!(
                "SET ROLE {role};
                 INSERT INTO mcp_credentials (instance_id, api_key, oauth_status, oauth_completed_at)
                 SELECT instance_id, decode(repeat('01', 40), 'hex'), 'completed', now()
                   FROM mcp_service_table"
            ))
            .unwrap();
        let status = "SELECT oauth_status FROM mcp_service_table";
        assert_eq!(database.psql(status).unwrap(), "completed\n");
        database.psql("DELETE FROM mcp_credentials").unwrap();
        assert_eq!(database.psql(status).unwrap(), "pending\n");
    }
}

#[test]
fn each_role_has_its_rights_on_relations_and_no_others() {
    let database = database();
    let listed = BTreeMap::from(RIGHTS);
    for (number, role) in ROLES.into_iter().enumerate() {
        let found = rights_on_relations(&database, role);
        for (relation, rights) in &found {
            match listed.get(relation.as_str()) {
                Some(expected) => assert_eq!(rights, expected[number], "{role}: {relation}"),
                None if role == "app_admin" => assert_eq!(rights, "rawd", "{relation}"),
                None => assert!(
                    rights.starts_with('r') && rights.chars().all(|one| "rawd".contains(one)),
                    "{relation}: {rights}"
                ),
            }
        }
        let missing: Vec<_> = listed
            .keys()
            .filter(|name| !found.contains_key(**name))
            .collect();
        assert!(missing.is_empty(), "{missing:?}");
    }
    let everyone = rights_on_relations(&database, "public");
    assert!(everyone.values().all(String::is_empty), "{everyone:?}");
}

#[test]
fn the_log_takes_only_its_own_columns() {
    let database = database();
    for role in ROLES {
        let columns = lines(
            &database,
            &format!(
                "SELECT relname, attname, privilege
                   FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid,
                        unnest('{{INSERT, UPDATE, REFERENCES}}'::text[]) AS privilege
                  WHERE relnamespace = 'public'::regnamespace
                    AND relkind IN ('r', 'p', 'v') AND attnum > 0 AND NOT attisdropped
                    AND has_column_privilege('{role}', attrelid, attnum, privilege)
                    AND NOT has_table_privilege('{role}', attrelid, privilege)"
            ),
        );
        let expected = LOGGED.map(|column| format!("token_audit_log|{column}|INSERT"));
        assert_same_set(expected, columns);
    }
}

#[test]
fn functions_and_schema() {
    let database = database();
    let callable = |role: &str| {
        lines(
            &database,
            &format!(
                "SELECT oid::regprocedure FROM pg_proc WHERE pronamespace = 'public'::regnamespace
                    AND has_function_privilege('{role}', oid, 'EXECUTE')"
            ),
        )
    };
    let everyone = callable("public");
    assert_same_set(everyone.clone(), callable("app_user"));
    let clean_up = [
        "cleanup_old_token_audit_logs(integer)",
        "maintain_token_audit_log()",
    ];
    let clean_up = clean_up.map(str::to_owned).to_vec();
    assert_same_set([everyone, clean_up].concat(), callable("app_admin"));
    for role in ROLES {
        let sql = format!(
            "SELECT has_schema_privilege('{role}', 'public', 'USAGE'),
                    has_schema_privilege('{role}', 'public', 'CREATE'),
                    has_database_privilege('{role}', current_database(), 'CREATE')"
        );
        assert_eq!(database.psql(&sql).unwrap(), "t|f|f\n");
    }
}

#[test]
fn the_service_is_denied_what_is_not_its_part() {
    let database = database();
    for sql in [
        "DELETE FROM users",
        "DELETE FROM user_plans",
        "DELETE FROM subscription_transactions",
        "TRUNCATE auth_tokens",
        "UPDATE mcp_table SET is_active = false",
        "UPDATE token_audit_log SET operation = 'x'",
        "DELETE FROM token_audit_log",
        "TRUNCATE token_audit_log",
        "INSERT INTO token_audit_log (instance_id, operation, status, created_at)
         VALUES (gen_random_uuid(), 'x', 'success', '1999-01-01')",
        "INSERT INTO token_audit_log (audit_id, instance_id, operation, status)
         OVERRIDING SYSTEM VALUE VALUES (7, gen_random_uuid(), 'x', 'success')",
        "SELECT setval('token_audit_log_audit_id_seq', 1)",
        "SELECT cleanup_old_token_audit_logs()",
        "SELECT maintain_token_audit_log()",
        "INSERT INTO __diesel_schema_migrations VALUES ('999')",
        "CREATE TABLE own (a int)",
        "CREATE FUNCTION own() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE TRIGGER own BEFORE UPDATE ON users
            FOR EACH ROW EXECUTE FUNCTION update_updated_at_column()",
    ] {
        assert_denied(&database, "app_user", sql);
    }
}

/// Rights on the old tables travel into the archive, but its schema is closed.
#[test]
fn the_archive_is_closed() {
    let database = empty_database();
    database
        .psql_file(Path::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/fixtures/legacy.sql"
        )))
        .unwrap();
    database
        .psql("GRANT ALL ON users TO app_user, app_admin")
        .unwrap();
    for up in up_sql() {
        database.psql_file(&up).unwrap();
    }
    database.psql(ROLES_SQL).unwrap();
    for role in ROLES {
        assert_denied(&database, role, "SELECT FROM bruhmcp_archive.users");
        database
            .psql(&format!("SET ROLE {role}; SELECT FROM users"))
            .unwrap();
    }
}

/// All that is granted in the database, for the comparison of two.
fn grants(database: &TestDatabase) -> Vec<String> {
    lines(
        database,
        "SELECT name, grantee::regrole, privilege_type, is_grantable
           FROM (SELECT 'schema ' || nspname, nspacl FROM pg_namespace WHERE nspname = 'public'
                  UNION ALL SELECT relname, relacl FROM pg_class
                  WHERE relnamespace = 'public'::regnamespace
                  UNION ALL SELECT relname || '.' || attname, attacl
                   FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
                  WHERE relnamespace = 'public'::regnamespace
                  UNION ALL SELECT oid::regprocedure::text, proacl FROM pg_proc
                  WHERE pronamespace = 'public'::regnamespace) AS object (name, acl),
                aclexplode(acl)
          WHERE grantee <> 10 ORDER BY 1, 2, 3",
    )
}

/// An older release gave ALL, an administrator's default privileges gave more, and `app_admin` could
/// run code as the owner of the tables: the owner's functions write `mcp_table`.
#[test]
fn what_is_too_much_is_taken_back() {
    let attack = "CREATE FUNCTION pg_temp.attack() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN DELETE FROM public.users; RETURN NULL; END $$;
         CREATE TRIGGER attack AFTER UPDATE ON mcp_table
            FOR EACH ROW EXECUTE FUNCTION pg_temp.attack()";
    let given = empty_database();
    given
        .psql(
            "ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO app_user, app_admin;
             ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO app_user, app_admin;
             ALTER DEFAULT PRIVILEGES GRANT ALL ON FUNCTIONS TO app_user, app_admin;
             GRANT CREATE ON SCHEMA public TO app_user, app_admin",
        )
        .unwrap();
    given
        .connect_as_owner()
        .run_pending_migrations(MIGRATIONS)
        .unwrap();
    given
        .psql(
            "GRANT CREATE ON SCHEMA public TO PUBLIC;
             GRANT UPDATE (created_at) ON token_audit_log TO app_user",
        )
        .unwrap();
    given
        .psql(&format!("SET ROLE app_admin; BEGIN; {attack}; ROLLBACK"))
        .unwrap();

    given.psql(ROLES_SQL).unwrap();
    assert_same_set(grants(&database()), grants(&given));
    for role in ROLES {
        assert_denied(&given, role, attack);
    }
}

#[test]
fn a_second_time_changes_nothing() {
    let database = database();
    let acls = || {
        database
            .psql(
                "SELECT nspname, nspacl FROM pg_namespace;
                 SELECT oid::regclass, relacl FROM pg_class ORDER BY 1;
                 SELECT attrelid::regclass, attname, attacl FROM pg_attribute
                  WHERE attacl IS NOT NULL ORDER BY 1, 2;
                 SELECT oid::regprocedure, proacl FROM pg_proc ORDER BY 1",
            )
            .unwrap()
    };
    let once = acls();
    database.psql(ROLES_SQL).unwrap();
    assert_same(&once, &acls());
}

/// Each down takes the rights on its tables with it.
#[test]
fn the_file_works_at_each_version_and_downs_undo_it() {
    let (database, migrated) = (empty_database(), database());
    database.psql(ROLES_SQL).unwrap();
    let before = database.dump(&[]);
    for up in up_sql() {
        database.psql_file(&up).unwrap();
        database.psql(ROLES_SQL).unwrap();
    }
    let of_tables = |database: &TestDatabase| -> Vec<String> {
        let mut grants = grants(database);
        grants.retain(|grant| !grant.starts_with("__diesel"));
        grants
    };
    assert_same_set(of_tables(&migrated), of_tables(&database));
    for down in down_sql().iter().rev() {
        let sql = fs::read_to_string(down).unwrap();
        database.psql(&format!("BEGIN; {sql}; COMMIT")).unwrap();
        database.psql(ROLES_SQL).unwrap();
    }
    assert_same(&before, &database.dump(&[]));
}

#[test]
fn the_file_works_in_the_current_schema_only() {
    let database = database();
    let before = grants(&database);
    let found = database
        .psql(&format!(
            r#"CREATE SCHEMA "A cell"; SET search_path = "A cell", public;
               CREATE TABLE users (id int); CREATE TABLE auth_tokens (id int);
               GRANT TRIGGER ON users TO app_user;
               {ROLES_SQL}
               SHOW search_path;
               SELECT relname, acl FROM pg_class, unnest(relacl) AS acl
                WHERE relnamespace = '"A cell"'::regnamespace AND acl::text LIKE 'app%'
                ORDER BY 1, acl::text;
               SELECT has_schema_privilege('app_user', 'A cell', 'USAGE')"#
        ))
        .unwrap();
    assert_eq!(
        found,
        "\"A cell\", public\n\
         auth_tokens|app_admin=arwd/postgres\n\
         auth_tokens|app_user=arwd/postgres\n\
         users|app_admin=arwd/postgres\n\
         users|app_user=arw/postgres\n\
         t\n"
    );
    assert_same_set(before, grants(&database));
}

/// Tables that a migration creates again have no rights.
#[test]
#[cfg(feature = "migrator")]
fn a_run_says_that_rights_are_to_be_granted() {
    let database = database();
    let mut runner = runner(&database.url()).unwrap();
    let report = runner.redo(&Extent::All, |_| true).unwrap();
    let title = "For rights on what is new, run `bruhmcp-db grant`".to_owned();
    let items = vec!["app_admin".to_owned(), "app_user".to_owned()];
    assert_eq!(
        report.notes,
        [Note {
            title,
            items: items.clone()
        }]
    );
    let service = "SET ROLE app_user; SELECT FROM user_billing_details";
    assert!(database.psql(service).is_err());
    assert_eq!(runner.grant().unwrap().roles, items);
    database.psql(service).unwrap();
}

/// A superuser's rights can't be taken, and only the owner can grant.
#[test]
fn it_fails_where_it_cannot_hold() {
    let database = database();
    for (prepare, message) in [
        (
            "ALTER ROLE app_user SUPERUSER",
            "app_user must have USAGE and not CREATE on the schema public",
        ),
        (
            "SET LOCAL ROLE pg_monitor",
            "the role pg_monitor does not own",
        ),
        (
            "SET LOCAL search_path = nowhere",
            "no schema of the search_path exists",
        ),
    ] {
        let error = database
            .psql(&format!("BEGIN; {prepare}; {ROLES_SQL}"))
            .unwrap_err();
        assert!(error.contains(message), "{prepare}: {error}");
    }
}

/// The triggers work for a role without rights on the tables they write, and don't take a temporary
/// table for the real one.
#[test]
fn triggers_write_for_the_service() {
    let database = database();
    let rows = with_keys(include_str!("../fixtures/rows.sql"));
    database.psql(&rows).unwrap();
    let sql = with_keys(
        "SET ROLE app_user;
         CREATE TEMPORARY TABLE user_plans (user_id uuid, max_instances integer, expires_at timestamptz);
         INSERT INTO public.users (id, first_name, last_name, email) VALUES (:u3, 'Cy', '', 'cy@example.in');
         INSERT INTO public.mcp_service_table (instance_id, user_id, mcp_service_id) VALUES (:i4, :u3, :m1);
         INSERT INTO public.mcp_credentials (instance_id, api_key, oauth_status, oauth_completed_at)
         VALUES (:i4, decode(repeat('01', 40), 'hex'), 'completed', now());
         SELECT plan_type, active_instances_count FROM public.user_plans, public.mcp_table
          WHERE user_id = :u3 AND mcp_service_id = :m1",
    );
    assert_eq!(database.psql(&sql).unwrap(), "free|2\n");
    assert_eq!(
        database
            .psql("SET ROLE app_admin; SELECT cleanup_old_token_audit_logs()")
            .unwrap(),
        "1\n"
    );
}
