//! `verify`: what is drift, and what isn't.

use bruhmcp_db::migrations::{Error, Refusal, Verification, runner};

use crate::cli::bruhmcp;
use crate::difference::check_generated;
use crate::runner::{Folder, names, versions};
use crate::support::{TestDatabase, database, empty_database};

fn verify(url: &str) -> Verification {
    runner(url).unwrap().verify().unwrap()
}

/// `verify` expects what the migrations build, at each version.
#[test]
fn generated_catalogue() {
    let database = empty_database();
    let mut runner = runner(&database.url()).unwrap();
    let mut text = String::new();
    let mut before = String::new();
    for (name, version) in names().iter().zip(versions()) {
        runner.run_to(Some(&version)).unwrap();
        let after = runner.catalogue().unwrap();
        text += &format!("# {name}\n");
        let absent = |line: &&str, text: &str| !text.lines().any(|other| other == *line);
        for line in before.lines().filter(|line| absent(line, &after)) {
            text += &format!("- {line}\n");
        }
        for line in after.lines().filter(|line| absent(line, &before)) {
            text += &format!("+ {line}\n");
        }
        before = after;
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
            "ALTER TABLE users ALTER COLUMN first_name TYPE varchar",
            "- column users.first_name: text not null\n\
             + column users.first_name: character varying not null",
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
            "+ column token_audit_log.audit_id: bigint not null identity\n",
        ),
        (
            "CREATE DOMAIN name AS text CHECK (VALUE <> 'x');
             ALTER TABLE users ALTER COLUMN first_name TYPE public.name",
            "+ column users.first_name: public.name not null",
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
            "ALTER TABLE users ADD COLUMN moved boolean;
             UPDATE users SET moved = email_verified;
             ALTER TABLE users DROP COLUMN email_verified;
             ALTER TABLE users RENAME COLUMN moved TO email_verified;
             ALTER TABLE users ALTER COLUMN email_verified SET DEFAULT false,
                 ALTER COLUMN email_verified SET NOT NULL",
            "+ columns users: id, first_name, last_name, email, password, razorpay_customer_id, \
             created_at, updated_at, last_login_at, is_active, email_verified",
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
