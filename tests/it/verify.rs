//! `verify`: what is drift, and what isn't.

use std::sync::LazyLock;

use bruhmcp_db::migrations::{Error, Refusal, Verification, runner};
use bruhmcp_devdb::{Database, Server};
use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use diesel::prelude::*;

use crate::cli::bruhmcp;
use crate::difference::check_generated;
use crate::runner::{Folder, names, next_version, versions};
use crate::support::{TestDatabase, database, empty_database};

/// A server with the roles of `roles.sql`, which belong to the whole server.
static WITH_ROLES: LazyLock<Server> = LazyLock::new(|| {
    let server = Server::private(&[]).unwrap();
    let roles = "CREATE ROLE app_user LOGIN; CREATE ROLE app_admin LOGIN; CREATE ROLE anon LOGIN;
                 CREATE ROLE owner LOGIN; CREATE ROLE mallory LOGIN";
    let database = TestDatabase::from(server.create_database().unwrap());
    database.psql(roles).unwrap();
    server
});

/// A database of the role `owner` with all migrations and the intended rights.
static GRANTED: LazyLock<Database> = LazyLock::new(|| {
    let database = WITH_ROLES.create_database().unwrap();
    let name = database.name();
    let mut superuser = PgConnection::establish(&database.url()).unwrap();
    superuser
        .batch_execute(&format!("ALTER DATABASE {name} OWNER TO owner"))
        .unwrap();
    let mut runner = runner(&owner_url(&database.url())).unwrap();
    runner.run().unwrap();
    runner.grant().unwrap();
    database
});

fn owner_url(url: &str) -> String {
    format!("{url}&user=owner")
}

fn empty_with_roles() -> TestDatabase {
    TestDatabase::from(WITH_ROLES.create_database().unwrap())
}

fn verify(url: &str) -> Verification {
    runner(url).unwrap().verify().unwrap()
}

/// `verify` expects what the migrations build, at each version, and the rights of `roles.sql`.
#[test]
fn generated_catalogue() {
    let database = empty_with_roles();
    let mut runner = runner(&database.url()).unwrap();
    let is_right = |line: &&str| line.starts_with("right ");
    let mut text = String::new();
    let mut before = String::new();
    for (name, version) in names().iter().zip(versions()) {
        runner.run_to(Some(&version)).unwrap();
        let after = runner.catalogue().unwrap();
        text += &format!("# {name}\n");
        for (sign, one, other) in [("-", &before, &after), ("+", &after, &before)] {
            for line in one.lines().filter(|line| !is_right(line)) {
                if !other.lines().any(|same| same == line) {
                    text += &format!("{sign} {line}\n");
                }
            }
        }
        before = after;
    }
    text += "# rights\n";
    runner.grant().unwrap();
    for line in runner.catalogue().unwrap().lines().filter(is_right) {
        text += &format!("+ {line}\n");
    }
    check_generated("generated_catalogue", "migrations/catalogue.txt", &text);
}

fn is_clean(url: &str) {
    let found = verify(url);
    assert!(
        !found.has_drift() && found.extra.is_empty() && found.pending.is_empty(),
        "{found:#?}"
    );
}

/// Lines that a change of the schema makes `verify` tell: those of drift, or those that are no
/// drift.
#[track_caller]
fn after(change: &str) -> (Vec<String>, Vec<String>) {
    let database = database();
    database.psql(change).unwrap();
    told(&database)
}

fn told(database: &TestDatabase) -> (Vec<String>, Vec<String>) {
    let found = verify(&database.url());
    let missing = found.missing.iter().map(|line| format!("- {line}"));
    let changed = found.changed.iter().map(ToString::to_string);
    let drift: Vec<String> = missing.chain(changed).collect();
    assert_eq!(found.has_drift(), !drift.is_empty());
    (drift, found.extra)
}

#[track_caller]
fn drifts(change: &str, expected: &str) {
    let (drift, extra) = after(change);
    let drift = drift.join("\n");
    assert!(drift.contains(expected), "{change}: {drift}\n{extra:#?}");
}

#[test]
fn what_is_missing_or_changed_is_drift() {
    is_clean(&database().url());
    for (change, expected) in [
        (
            "ALTER TABLE account_credits ALTER COLUMN description TYPE varchar",
            "- column account_credits.description: text\n\
             + column account_credits.description: character varying",
        ),
        (
            "ALTER TABLE users ALTER COLUMN is_active DROP DEFAULT",
            "- column users.is_active: boolean not null default true\n\
             + column users.is_active: boolean not null",
        ),
        (
            "ALTER TABLE user_billing_details DROP CONSTRAINT unique_user_billing",
            "- constraint user_billing_details.unique_user_billing: UNIQUE (user_id)",
        ),
        (
            "DROP TRIGGER users_assign_default_plan ON users",
            "- trigger users.users_assign_default_plan: ",
        ),
        (
            "ALTER TABLE users DISABLE TRIGGER users_assign_default_plan",
            "EXECUTE FUNCTION assign_default_plan() disabled",
        ),
        (
            "ALTER TABLE user_billing_details DISABLE TRIGGER ALL",
            "+ constraint user_billing_details.user_billing_details_user_id_fkey: \
             FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE triggers disabled",
        ),
        (
            "CREATE OR REPLACE FUNCTION update_updated_at_column() RETURNS trigger LANGUAGE plpgsql
             AS 'BEGIN RETURN NEW; END'",
            "+ function update_updated_at_column(): ",
        ),
        (
            "ALTER FUNCTION assign_default_plan SECURITY INVOKER",
            "+ function assign_default_plan(): ",
        ),
        (
            "ALTER TYPE plan_type RENAME VALUE 'free' TO 'gratis'",
            "+ type plan_type: enum 'gratis', 'pro'",
        ),
        (
            "DROP VIEW token_audit_summary;
             CREATE VIEW token_audit_summary AS SELECT * FROM (SELECT * FROM token_audit_log) t",
            "+ view token_audit_summary: ",
        ),
        (
            "CREATE RULE nothing AS ON INSERT TO users DO INSTEAD NOTHING",
            "+ rule users.nothing: CREATE RULE nothing AS ON INSERT TO users DO INSTEAD NOTHING;",
        ),
        (
            "CREATE TRIGGER extra BEFORE UPDATE ON users FOR EACH ROW
             EXECUTE FUNCTION update_updated_at_column()",
            "+ trigger users.extra: ",
        ),
        (
            "ALTER TABLE user_billing_details SET UNLOGGED",
            "- relation user_billing_details: table\n\
             + relation user_billing_details: unlogged table",
        ),
        (
            "CREATE POLICY p ON users FOR SELECT TO PUBLIC USING (is_active)",
            "+ policy users.p: permissive select to public using is_active",
        ),
        (
            "ALTER TABLE users FORCE ROW LEVEL SECURITY",
            "+ relation users: table, row level security forced",
        ),
        (
            "ALTER TABLE token_audit_log ALTER COLUMN audit_id SET INCREMENT 7 SET CYCLE",
            "+ relation token_audit_log_audit_id_seq: sequence, bigint start 1 increment 7 min 1 max \
             9223372036854775807 cache 1 cycle, of token_audit_log.audit_id",
        ),
        (
            "ALTER TABLE token_audit_log ALTER COLUMN audit_id SET GENERATED BY DEFAULT",
            "+ column token_audit_log.audit_id: bigint not null identity",
        ),
        (
            "CREATE DOMAIN name AS text CHECK (VALUE <> 'x');
             ALTER TABLE account_credits ALTER COLUMN description TYPE public.name",
            "+ column account_credits.description: public.name",
        ),
        (
            "ALTER TABLE users REPLICA IDENTITY FULL",
            "+ relation users: table, replica identity full",
        ),
        (
            "ALTER TABLE users REPLICA IDENTITY USING INDEX users_email_key",
            "+ relation users: table, replica identity users_email_key",
        ),
        (
            "UPDATE pg_index SET indisready = false WHERE indexrelid = 'users_created_at_idx'::regclass",
            "+ index users_created_at_idx: CREATE INDEX users_created_at_idx ON users USING btree \
             (created_at) invalid",
        ),
        (
            "ALTER TABLE webhook_events ADD COLUMN moved text;
             UPDATE webhook_events SET moved = error_message;
             ALTER TABLE webhook_events DROP COLUMN error_message;
             ALTER TABLE webhook_events RENAME COLUMN moved TO error_message",
            "+ columns webhook_events: event_id, external_event_id, event_type, payment_gateway, \
             processed_at, payload, processing_status, created_at, user_id, attempts, available_at, \
             error_message",
        ),
        (
            "CREATE TABLE guests () INHERITS (users)",
            "+ child users.guests: table",
        ),
        (
            "CREATE TABLE base (id uuid NOT NULL); ALTER TABLE users INHERIT base",
            "+ relation users: table, inherits base",
        ),
        (
            "ALTER VIEW token_audit_summary SET (security_invoker = true)",
            "+ relation token_audit_summary: view, security_invoker=true",
        ),
    ] {
        drifts(change, expected);
    }
}

/// An addition that can only make a statement fail, or isn't ours, is no drift.
#[test]
fn additions_that_change_nothing_are_told() {
    for (change, expected) in [
        (
            "CREATE INDEX extra ON users (first_name)",
            "index extra: CREATE INDEX extra ON users USING btree (first_name)",
        ),
        (
            "ALTER TABLE users ADD COLUMN spare_name text",
            "column users.spare_name: text",
        ),
        (
            "ALTER TABLE users ADD CONSTRAINT extra CHECK (first_name <> 'x')",
            "constraint users.extra: CHECK (first_name <> 'x'::text)",
        ),
        (
            "ALTER TABLE users SET (autovacuum_vacuum_threshold = 1000)",
            "option users.autovacuum_vacuum_threshold: 1000",
        ),
    ] {
        assert_eq!(
            after(change),
            (vec![], vec![expected.to_owned()]),
            "{change}"
        );
    }
    for change in [
        "CREATE TABLE other (id uuid REFERENCES users); CREATE INDEX ON other (id);
         CREATE VIEW emails AS SELECT email FROM users; CREATE TYPE mood AS ENUM ('good');
         CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "ALTER TABLE users ALTER COLUMN email SET STATISTICS 500;
         COMMENT ON TABLE users IS 'ours'",
    ] {
        assert_eq!(after(change), (vec![], vec![]), "{change}");
    }
}

/// Roles and databases may have any settings.
#[test]
fn settings_do_not_matter() {
    let database = database();
    database
        .psql(
            "CREATE SCHEMA other; CREATE TYPE other.plan_type AS ENUM ('x');
             SELECT format('ALTER DATABASE %I SET %s', current_database(), setting)
             FROM unnest(ARRAY[
                 'search_path = other, public', 'default_transaction_read_only = on',
                 'quote_all_identifiers = on', 'standard_conforming_strings = off',
                 'intervalstyle = iso_8601', 'datestyle = SQL, DMY', 'bytea_output = escape',
                 'timezone = \"Asia/Kolkata\"', 'extra_float_digits = -15'
             ]) setting \\gexec",
        )
        .unwrap();
    is_clean(&database.url());
}

/// Nothing that a migration builds depends on the settings of a role or database.
#[test]
fn migrations_build_the_same_under_any_settings() {
    let database = empty_database();
    database
        .psql(
            "SELECT format('ALTER DATABASE %I SET %s', current_database(), setting)
             FROM unnest(ARRAY['standard_conforming_strings = off', 'transform_null_equals = on',
                 'check_function_bodies = off', 'quote_all_identifiers = on']) setting \\gexec",
        )
        .unwrap();
    runner(&database.url()).unwrap().run().unwrap();
    is_clean(&database.url());
}

#[test]
fn a_view_of_another_schemas_table_is_drift() {
    let (drift, _) = after(
        "CREATE SCHEMA bruhmcp_archive;
         CREATE TABLE bruhmcp_archive.token_audit_log AS TABLE token_audit_log;
         SELECT set_config('search_path', 'bruhmcp_archive, public', false);
         SELECT 'CREATE OR REPLACE VIEW public.token_audit_summary AS '
             || replace(pg_get_viewdef('public.token_audit_summary'::regclass), 'public.', '') \\gexec",
    );
    let [view] = &drift[..] else {
        panic!("{drift:#?}")
    };
    assert!(
        view.contains("\n+ view token_audit_summary: ")
            && view.contains(" FROM bruhmcp_archive.token_audit_log "),
        "{view}"
    );
}

/// Pending migrations are no drift, and hide none.
#[test]
fn each_version_has_its_own_catalogue() {
    let database = empty_database();
    let url = database.url();
    let nothing = bruhmcp(&url, &["verify"]);
    assert_eq!(nothing.code, Some(3), "{nothing:?}");
    assert!(
        nothing
            .out
            .starts_with("Nothing is applied, and nothing is expected.\n"),
        "{nothing:?}"
    );
    let names = names();
    for (index, version) in versions().iter().enumerate() {
        runner(&url).unwrap().run_to(Some(version)).unwrap();
        let found = verify(&url);
        assert_eq!(found.version.as_ref(), Some(version));
        assert_eq!(found.pending, names[index + 1..]);
        assert!(!found.has_drift() && found.extra.is_empty(), "{found:#?}");
        if version == "005" {
            assert_eq!(bruhmcp(&url, &["verify"]).code, Some(3));
            database
                .psql("ALTER TABLE user_plans DROP COLUMN features")
                .unwrap();
            let drift = bruhmcp(&url, &["verify"]);
            assert_eq!(drift.code, Some(7), "{drift:?}");
            database
                .psql("ALTER TABLE user_plans ADD COLUMN features jsonb NOT NULL DEFAULT '{}'")
                .unwrap();
            let (drift, _) = told(&database);
            let [missing, columns] = &drift[..] else {
                panic!("{drift:#?}")
            };
            assert!(missing.starts_with("- constraint user_plans.user_plans_features_check: "));
            assert!(columns.starts_with("- columns user_plans: "));
            return;
        }
    }
}

/// What an unknown migration built is unknown too.
#[test]
fn what_is_applied_must_be_known() {
    let database = database();
    let newer = next_version();
    database
        .psql(&format!(
            "INSERT INTO __diesel_schema_migrations VALUES ('{newer}')"
        ))
        .unwrap();
    let refused = runner(&database.url()).unwrap().verify().unwrap_err();
    assert!(
        matches!(&refused, Error::Refused(Refusal::Unknown(versions)) if *versions == [newer]),
        "{refused}"
    );
    let folder = Folder::new(&[("001_a", "CREATE TABLE a (b int)", "DROP TABLE a")]);
    let database = empty_database();
    let mut runner = folder.runner(&database);
    runner.run().unwrap();
    let catalogue = runner.catalogue().unwrap();
    assert!(catalogue.contains("column a.b: integer\n"), "{catalogue}");
    let lines: String = catalogue
        .lines()
        .map(|line| format!("+ {line}\n"))
        .collect();
    let verify = |catalogue: Option<String>| {
        let runner = folder.runner(&database);
        match catalogue {
            Some(catalogue) => runner.expect_catalogue(&catalogue),
            None => runner,
        }
        .verify()
    };
    assert!(
        !verify(Some(format!("# 001_a\n{lines}")))
            .unwrap()
            .has_drift()
    );
    for catalogue in [None, Some(format!("# 002_a\n{lines}"))] {
        let refused = verify(catalogue).unwrap_err();
        assert!(
            matches!(refused, Error::Refused(Refusal::NoCatalogue)),
            "{refused}"
        );
    }
}

/// Rights that `verify` finds after `change` in a migrated database with the intended ones. Takes
/// them away by their remedies.
#[track_caller]
fn leaks(change: &str) -> Vec<String> {
    let database = TestDatabase::from(WITH_ROLES.create_database_from(&GRANTED).unwrap());
    let owner = owner_url(&database.url());
    let clean = verify(&owner);
    assert_eq!((clean.rights, clean.lacking), (vec![], vec![]));
    database.psql(change).unwrap();
    // A role that may read the ledger sees the same as the owner.
    let found = verify(&database.url_with("user=app_user"));
    assert_eq!(found, verify(&owner));
    // An operator goes before its function.
    for right in found.rights.iter().rev() {
        database
            .psql(&right.remedy)
            .unwrap_or_else(|error| panic!("{}: {error}", right.remedy));
    }
    assert_eq!(verify(&owner).rights, []);
    found.rights.into_iter().map(|right| right.right).collect()
}

#[test]
fn rights_beyond_the_intended_are_drift() {
    for (change, expected) in [
        (
            "GRANT DELETE, UPDATE ON mcp_credentials, token_audit_log TO PUBLIC",
            &[
                "right PUBLIC on mcp_credentials: DELETE, UPDATE",
                "right PUBLIC on token_audit_log: DELETE, UPDATE",
            ][..],
        ),
        (
            "GRANT SELECT (email, password) ON users TO anon",
            &[
                "right anon on users(email): SELECT",
                "right anon on users(password): SELECT",
            ],
        ),
        (
            "GRANT SELECT, INSERT ON users TO app_user WITH GRANT OPTION;
             SET ROLE app_user; GRANT SELECT ON users TO anon",
            &[
                "right anon on users: SELECT",
                "right app_user on users: GRANT OPTION FOR INSERT, GRANT OPTION FOR SELECT",
            ],
        ),
        (
            "GRANT DELETE ON users TO app_user WITH GRANT OPTION",
            &["right app_user on users: DELETE, GRANT OPTION FOR DELETE"],
        ),
        (
            "GRANT EXECUTE ON FUNCTION cleanup_old_token_audit_logs TO app_user",
            &["right app_user on cleanup_old_token_audit_logs(integer): EXECUTE"],
        ),
        (
            "GRANT TRIGGER ON mcp_table TO app_user",
            &["right app_user on mcp_table: TRIGGER"],
        ),
        (
            "GRANT UPDATE ON SEQUENCE token_audit_log_audit_id_seq TO app_user",
            &["right app_user on token_audit_log_audit_id_seq: UPDATE"],
        ),
        (
            "GRANT INSERT ON __diesel_schema_migrations TO app_user",
            &["right app_user on __diesel_schema_migrations: INSERT"],
        ),
        (
            "GRANT CREATE ON SCHEMA public TO PUBLIC; GRANT CREATE ON SCHEMA public TO app_user",
            &[
                "right PUBLIC on the schema: CREATE",
                "right app_user on the schema: CREATE",
            ],
        ),
        (
            "GRANT CREATE ON SCHEMA public TO mallory; SET ROLE mallory;
             CREATE FUNCTION same(uuid, uuid) RETURNS boolean LANGUAGE sql AS 'SELECT true';
             CREATE OPERATOR public.= (LEFTARG = uuid, RIGHTARG = uuid, FUNCTION = same);
             RESET ROLE; REVOKE CREATE ON SCHEMA public FROM mallory",
            &[
                "owner mallory of function same(uuid,uuid)",
                "owner mallory of operator public.=(uuid,uuid)",
            ],
        ),
        (
            "ALTER DEFAULT PRIVILEGES FOR ROLE owner IN SCHEMA public GRANT ALL ON SEQUENCES TO anon",
            &["right anon on new sequences of owner: SELECT, UPDATE, USAGE"],
        ),
        (
            "ALTER DEFAULT PRIVILEGES FOR ROLE owner GRANT EXECUTE ON FUNCTIONS TO anon",
            &["right anon on new functions of owner: EXECUTE"],
        ),
        (
            "CREATE TABLE other (a int); GRANT ALL ON other TO PUBLIC;
             GRANT USAGE ON SCHEMA public TO anon; GRANT USAGE ON TYPE plan_type TO anon;
             CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            &[],
        ),
    ] {
        assert_eq!(leaks(change), expected, "{change}");
    }
}

/// As a hosting provider sets a database up.
#[test]
fn default_privileges_open_new_tables() {
    let database = empty_with_roles();
    database
        .psql("ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON TABLES TO anon")
        .unwrap();
    let url = database.url();
    runner(&url).unwrap().run().unwrap();
    runner(&url).unwrap().grant().unwrap();
    database
        .psql("SET ROLE anon; SELECT password FROM users")
        .unwrap();
    let found = bruhmcp(&url, &["verify"]);
    assert_eq!(found.code, Some(7));
    let all = "DELETE, INSERT, REFERENCES, SELECT, TRIGGER, TRUNCATE, UPDATE";
    for line in [
        format!(
            "  right anon on users: {all}\n      REVOKE {all} ON TABLE public.users FROM anon;\n"
        ),
        format!(
            "  right anon on new tables of postgres: {all}\n      ALTER DEFAULT PRIVILEGES FOR ROLE \
             postgres IN SCHEMA public REVOKE {all} ON TABLES FROM anon;\n"
        ),
    ] {
        assert!(
            found.out.replace("MAINTAIN, ", "").contains(&line),
            "{}",
            found.out
        );
    }
    database
        .psql("REVOKE INSERT ON users FROM app_user")
        .unwrap();
    let trusted = bruhmcp(&url, &["verify", "--trust", "backup", "--trust", "anon"]);
    assert_eq!(trusted.code, Some(0), "{trusted:?}");
    assert!(
        trusted.out.contains("  right app_user on users: INSERT\n"),
        "{trusted:?}"
    );
}

#[test]
fn unproven_not_null_is_drift() {
    let database = database();
    if database.psql("SHOW server_version_num").unwrap().as_str() < "18" {
        return crate::support::skipped("before 18 there is no NOT NULL NOT VALID");
    }
    database
        .psql(
            "ALTER TABLE users ALTER COLUMN first_name DROP NOT NULL;
             ALTER TABLE users ADD NOT NULL first_name NOT VALID",
        )
        .unwrap();
    let (drift, _) = told(&database);
    assert_eq!(
        drift,
        [
            "- column users.first_name: text not null\n+ column users.first_name: text not null not valid"
        ]
    );
}
