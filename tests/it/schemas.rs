//! The migrations in any schema, several sets of tables in one database, and functions that run as
//! their owner.

use std::fs;
use std::path::Path;

use bruhmcp_db::migrations::{Extent, runner};
use bruhmcp_devdb::Server;
use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use diesel::prelude::*;

use crate::difference::assert_same;
use crate::rules::{assert_violations, with_keys};
use crate::support::{TestDatabase, database, down_sql, empty_database, up_sql};

/// Names of schemas; two of them need quotes.
const SCHEMAS: [&str; 3] = ["c7", "c-7", "C7"];

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

fn rows() -> String {
    with_keys(include_str!("../fixtures/rows.sql"))
}

fn create_schema(database: &TestDatabase, schema: &str) {
    let sql = format!(r#"CREATE SCHEMA "{schema}""#);
    database.psql(&sql).unwrap();
}

/// Runs each `up.sql` in `schema`, each statement in its own transaction.
fn up(database: &TestDatabase, schema: &str) {
    for path in up_sql() {
        database
            .psql_in(schema, &read(&path))
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

/// What the migrations made in a schema, with `public` for its name.
fn structure(database: &TestDatabase, schema: &str) -> String {
    let dump = database.dump(&[
        "--schema-only",
        "--no-privileges",
        &format!(r#"--schema="{schema}""#),
        "--exclude-table=*.__diesel_schema_migrations",
    ]);
    // Before the first type comes the schema itself.
    let (_, objects) = dump.split_once("Type: TYPE").unwrap();
    objects
        .replace(&format!(r#""{schema}""#), "public")
        .replace(&format!("{schema}."), "public.")
        .replace(&format!("Schema: {schema};"), "Schema: public;")
        .replace(&format!("TO '{schema}'"), "TO 'public'")
}

fn public(database: &TestDatabase) -> String {
    database.dump(&["--schema=public"])
}

/// The URL of a session whose `search_path` is this schema.
fn url_in(database: &TestDatabase, schema: &str) -> String {
    database.url_with(&format!("options=-csearch_path%3D%22{schema}%22"))
}

#[test]
fn psql_migrates_any_schema_beside_public() {
    let database = database();
    database.psql(&rows()).unwrap();
    for schema in SCHEMAS {
        create_schema(&database, schema);
        let before = database.dump(&[]);
        let of_public = public(&database);

        up(&database, schema);
        database.psql_in(schema, &rows()).unwrap();
        let conn = &mut PgConnection::establish(&url_in(&database, schema)).unwrap();
        assert_violations(conn);
        assert_same(&of_public, &public(&database));
        assert_same(
            &structure(&database, "public"),
            &structure(&database, schema),
        );

        for path in down_sql().iter().rev() {
            database.psql_in(schema, &read(path)).unwrap();
        }
        assert_same(&before, &database.dump(&[]));
    }
}

#[test]
fn the_runner_migrates_any_schema_beside_public() {
    let database = database();
    for schema in SCHEMAS {
        create_schema(&database, schema);
        let url = url_in(&database, schema);
        let mut runner = runner(&url).unwrap().schema(schema);
        runner.run().unwrap();
        let migrated = structure(&database, schema);
        assert_same(&structure(&database, "public"), &migrated);

        let conn = &mut PgConnection::establish(&url).unwrap();
        conn.batch_execute(&rows()).unwrap();
        assert_violations(conn);
        runner.revert(&Extent::All, |_| true).unwrap();
        runner.run().unwrap();
        assert_same(&migrated, &structure(&database, schema));
    }
}

/// The triggers of a table work in its schema, whatever the `search_path` of the session is.
#[test]
fn nothing_crosses_from_one_schema_to_another() {
    let database = database();
    create_schema(&database, "c7");
    create_schema(&database, "c8");
    up(&database, "c7");
    database.psql(&rows()).unwrap();
    database.psql_in("c7", &rows()).unwrap();
    let of_public = public(&database);
    let answers = [("c7", "u3"), ("public", "u4"), ("c8", "u5")].map(|(path, user)| {
        let sql = "
            INSERT INTO c7.users (id, first_name, last_name, email)
            VALUES (:user, 'Cy', '', ':user@example.in');
            INSERT INTO c7.mcp_service_table (instance_id, user_id, mcp_service_id)
            VALUES (:user, :user, :m1);
            INSERT INTO c7.mcp_credentials (instance_id, api_key, oauth_status, oauth_completed_at)
            VALUES (:user, decode(repeat('01', 40), 'hex'), 'completed', now());
            UPDATE c7.user_plans SET plan_type = 'pro', max_instances = NULL WHERE user_id = :user;
            INSERT INTO c7.token_audit_log (instance_id, operation, status, created_at)
            VALUES (:user, 'connect', 'success', now() - interval '91 days');
            SELECT plan_type, oauth_status, active_instances_count, c7.cleanup_old_token_audit_logs() > 0
              FROM c7.user_plans JOIN c7.mcp_service_table USING (user_id)
              JOIN c7.mcp_table USING (mcp_service_id) WHERE user_id = :user;
            UPDATE c7.user_plans SET plan_type = 'free', max_instances = 1 WHERE user_id = :user;";
        let sql = sql.replace(":user@", &format!("{user}@")).replace(":user", &format!(":{user}"));
        database.psql_in(path, &with_keys(&sql)).unwrap()
    });
    assert_eq!(
        answers,
        [
            "pro|completed|2|t\n",
            "pro|completed|3|t\n",
            "pro|completed|4|t\n"
        ]
    );
    assert_same(&of_public, &public(&database));
}

/// Also while psql runs the files without a transaction, and in a schema with any name.
#[test]
fn a_function_that_runs_as_its_owner_is_never_open() {
    for schema in SCHEMAS {
        let database = empty_database();
        create_schema(&database, schema);
        database
            .psql(
                "CREATE SCHEMA watch;
                 CREATE FUNCTION watch.refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$
                 DECLARE
                     open regproc := (
                         SELECT oid FROM pg_proc
                          WHERE prosecdef
                            AND (proconfig IS NULL OR has_function_privilege('public', oid, 'EXECUTE'))
                     );
                 BEGIN
                     IF open IS NOT NULL THEN RAISE '% is open after %', open, tg_tag; END IF;
                 END $$;
                 CREATE EVENT TRIGGER watch ON ddl_command_end EXECUTE FUNCTION watch.refuse()",
            )
            .unwrap();
        up(&database, schema);
        let pinned = database
            .psql(
                "SELECT count(*), min(setting), max(setting)
                   FROM pg_proc, unnest(proconfig) AS setting
                  WHERE prosecdef AND setting LIKE 'search_path=%'",
            )
            .unwrap();
        let path = database
            .psql(&format!(
                "SELECT format('search_path=%I, pg_temp', '{schema}')"
            ))
            .unwrap();
        let path = path.trim_end();
        assert_eq!(pinned, format!("9|{path}|{path}\n"));
    }
}

#[test]
fn a_schema_where_everybody_may_create_is_refused() {
    for schema in ["public", "c-7"] {
        let database = empty_database();
        let create = format!(r#"CREATE SCHEMA IF NOT EXISTS "{schema}""#);
        let grant = format!(r#"GRANT CREATE ON SCHEMA "{schema}" TO PUBLIC"#);
        database.psql(&format!("{create}; {grant}")).unwrap();
        let before = database.dump(&[]);

        let error = database.psql_in(schema, &read(&up_sql()[1])).unwrap_err();
        assert!(
            error.contains("ERROR:  42501: every role may create"),
            "{error}"
        );
        let revoke = if schema == "public" {
            "REVOKE CREATE ON SCHEMA public FROM PUBLIC;"
        } else {
            r#"REVOKE CREATE ON SCHEMA "c-7" FROM PUBLIC;"#
        };
        let risk = "and by a function or operator there run code with the rights of others";
        assert!(error.contains(risk), "{error}");
        assert!(
            error.contains("HINT:  As the owner of the schema, "),
            "{error}"
        );
        assert!(error.contains(revoke), "{error}");
        assert_same(&before, &database.dump(&[]));

        let mut runner = runner(&url_in(&database, schema)).unwrap().schema(schema);
        let error = runner.run().unwrap_err().to_string();
        assert!(error.contains("Every role may create"), "{error}");
        assert!(error.contains(risk), "{error}");
        assert!(error.contains("As the owner of the schema:"), "{error}");
        assert!(error.contains(revoke.trim_end_matches(';')), "{error}");
        database.psql(revoke).unwrap();
        assert_eq!(runner.run().unwrap().steps.len(), up_sql().len());
    }
}

/// An operator with exactly the types of an enum comparison wins over the one of `pg_catalog`, if
/// its schema is in the `search_path`. A role that the owner once let create in the schema must not
/// run code with the owner's rights by it.
#[test]
fn an_operator_of_another_role_never_runs_as_the_owner() {
    // Roles belong to the whole server.
    let server = Server::private(&[]).unwrap();
    let database = TestDatabase::from(server.create_database().unwrap());
    database
        .psql("CREATE ROLE old_app; CREATE SCHEMA c7; CREATE SCHEMA trace")
        .unwrap();
    up(&database, "c7");
    let operators = "
        SET ROLE old_app;
        DO $$
        DECLARE
            enum regtype;
            operator text;
        BEGIN
            FOR enum IN SELECT oid FROM pg_type WHERE typtype = 'e' LOOP
                EXECUTE format(
                    'CREATE FUNCTION c7.take(a %1$s, b %1$s) RETURNS boolean LANGUAGE plpgsql AS
                     ''BEGIN INSERT INTO trace.calls VALUES (current_user); RETURN enum_eq(a, b); END''',
                    enum);
                EXECUTE format(
                    'CREATE FUNCTION c7.take_not(a %1$s, b %1$s) RETURNS boolean LANGUAGE plpgsql AS
                     ''BEGIN INSERT INTO trace.calls VALUES (current_user); RETURN enum_ne(a, b); END''',
                    enum);
                EXECUTE format(
                    'CREATE OPERATOR c7.= (LEFTARG = %1$s, RIGHTARG = %1$s, FUNCTION = c7.take)', enum);
                EXECUTE format(
                    'CREATE OPERATOR c7.<> (LEFTARG = %1$s, RIGHTARG = %1$s, FUNCTION = c7.take_not)', enum);
            END LOOP;
        END $$";
    database
        .psql(
            "GRANT USAGE ON SCHEMA c7, trace TO old_app;
             GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA c7 TO old_app;
             CREATE TABLE trace.calls (as_role name);
             GRANT INSERT ON trace.calls TO PUBLIC",
        )
        .unwrap();

    // Where only the owner may create, there is no such operator.
    let error = database.psql(operators).unwrap_err();
    assert!(error.contains("42501"), "{error}");

    database
        .psql("GRANT CREATE ON SCHEMA c7 TO old_app")
        .unwrap();
    database.psql(operators).unwrap();
    let fire = with_keys(
        "SET ROLE old_app;
         UPDATE mcp_service_table SET status = 'inactive' WHERE status = 'active';
         UPDATE mcp_service_table SET status = 'active' WHERE instance_id = :i1;
         UPDATE mcp_credentials SET oauth_status = 'failed', oauth_completed_at = now();
         UPDATE mcp_credentials SET oauth_status = 'completed' WHERE instance_id <> :i2;
         UPDATE user_plans SET plan_type = 'pro', max_instances = NULL;
         UPDATE mcp_service_table SET status = 'active';
         UPDATE user_plans SET plan_type = 'free', max_instances = 1;
         DELETE FROM mcp_credentials WHERE instance_id = :i2;
         DELETE FROM mcp_service_table",
    );
    database
        .psql_in("c7", &format!("SET ROLE old_app;\n{}", rows()))
        .unwrap();
    database.psql_in("c7", &fire).unwrap();
    assert_eq!(
        database
            .psql("SELECT DISTINCT as_role FROM trace.calls")
            .unwrap(),
        "old_app\n"
    );
}
