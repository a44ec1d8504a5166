//! Conventions, read from the catalogue of the applied database.

use crate::support::database;

/// Fails with the rows that a query about the catalogue returns: each is a breach.
fn none(sql: &str) {
    let found = database().psql(sql).unwrap();
    assert_eq!(found, "");
}

const TABLES: &str =
    "pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')
                      AND relname <> '__diesel_schema_migrations'";

#[test]
fn the_twelve_tables_and_the_view_are_there() {
    let names = database()
        .psql(&format!("SELECT relname FROM {TABLES} ORDER BY relname"))
        .unwrap();
    let names: Vec<&str> = names.lines().collect();
    assert_eq!(
        names,
        [
            "account_credits",
            "auth_tokens",
            "mcp_credentials",
            "mcp_service_table",
            "mcp_table",
            "subscription_transactions",
            "token_audit_log",
            "token_audit_summary",
            "user_billing_details",
            "user_plans",
            "user_subscriptions",
            "users",
            "webhook_events",
        ]
    );
}

/// A default fills what nobody said; a nullable column with one holds NULL only where somebody insists on it.
#[test]
fn no_column_is_nullable_with_a_default() {
    none(
        "SELECT attrelid::regclass, attname FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
          WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND attnum > 0 AND NOT attisdropped
            AND atthasdef AND NOT attnotnull",
    );
}

#[test]
fn each_foreign_key_is_indexed() {
    none(
        "SELECT conrelid::regclass, conname FROM pg_constraint
          WHERE contype = 'f' AND NOT EXISTS (
              SELECT FROM pg_index
               WHERE indrelid = conrelid AND indpred IS NULL
                 AND (indkey::smallint[])[0:cardinality(conkey) - 1] = conkey)",
    );
}

/// A plain index whose columns begin another index is one index too many. A partial or unique one serves another end.
#[test]
fn no_index_is_a_duplicate_or_prefix() {
    none(
        "SELECT a.indexrelid::regclass, b.indexrelid::regclass FROM pg_index a JOIN pg_index b USING (indrelid)
          WHERE a.indexrelid <> b.indexrelid AND NOT a.indisunique
            AND pg_get_expr(a.indpred, a.indrelid) IS NOT DISTINCT FROM pg_get_expr(b.indpred, b.indrelid)
            AND b.indkey::text || ' ' LIKE a.indkey::text || ' %'",
    );
}

/// One call more writes these; an index on any of them, or with one in its predicate, ends HOT updates.
#[test]
fn no_index_names_a_column_that_a_call_writes() {
    none(
        "SELECT indexrelid::regclass FROM pg_index
          WHERE indrelid = 'mcp_service_table'::regclass
            AND pg_get_indexdef(indexrelid) ~ 'last_used_at|usage_count|updated_at|version|last_modified'",
    );
    none(
        "SELECT indexrelid::regclass FROM pg_index
          WHERE indrelid = 'mcp_table'::regclass
            AND pg_get_indexdef(indexrelid) ~ 'total_instances_created|active_instances_count'",
    );
}

#[test]
fn each_table_has_a_comment() {
    none(&format!(
        "SELECT relname FROM {TABLES} AND obj_description(oid, 'pg_class') IS NULL"
    ));
}

#[test]
fn types_are_of_the_modern_sort() {
    none(
        "SELECT attrelid::regclass, attname, format_type(atttypid, atttypmod) FROM pg_attribute
           JOIN pg_class ON pg_class.oid = attrelid
          WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND attnum > 0 AND NOT attisdropped
            AND relname <> '__diesel_schema_migrations'
            AND atttypid IN ('timestamp'::regtype, 'varchar'::regtype, 'bpchar'::regtype, 'json'::regtype,
                             'money'::regtype, 'float4'::regtype, 'float8'::regtype)",
    );
    none(
        "SELECT attrelid::regclass, attname FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
          WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND attname LIKE '%amount'
            AND atttypid <> 'bigint'::regtype",
    );
}

#[test]
fn names_follow_the_pattern() {
    let named = "unique_user_plan|unique_user_billing|check_max_instances_for_plan|check_credential_type\
                 |check_oauth_tokens|check_oauth_status_consistency|users_email_canonical\
                 |user_billing_details_no_card_secrets";
    none(&format!(
        "SELECT conrelid::regclass, conname FROM pg_constraint
          WHERE connamespace = 'public'::regnamespace AND contype IN ('p', 'u', 'c', 'f')
            AND conrelid <> '__diesel_schema_migrations'::regclass
            AND conname !~ '^({named})$'
            AND conname !~ ('^' || conrelid::regclass || '.*_' || CASE contype
                WHEN 'p' THEN 'pkey' WHEN 'u' THEN 'key' WHEN 'c' THEN 'check' ELSE 'fkey' END || '$')"
    ));
    none(
        "SELECT indexrelid::regclass FROM pg_index JOIN pg_class ON pg_class.oid = indrelid
          WHERE relnamespace = 'public'::regnamespace AND NOT indisunique
            AND indexrelid::regclass::text !~ ('^' || relname || '_.*_idx$')",
    );
}

/// A trigger function that writes elsewhere runs as its owner, in a fixed path, and can't be called by anybody.
#[test]
fn definer_functions_are_shut() {
    none(
        "SELECT proname FROM pg_proc
          WHERE pronamespace = 'public'::regnamespace AND prosecdef
            AND (proconfig IS DISTINCT FROM '{\"search_path=public, pg_temp\"}'
                 OR has_function_privilege('public', oid, 'EXECUTE'))",
    );
    none(
        "SELECT proname FROM pg_proc
          WHERE pronamespace = 'public'::regnamespace AND NOT prosecdef
            AND prosrc ~* '(insert into|update|delete from) +(users|user_plans|mcp_)'",
    );
}

#[test]
fn deletes_reach_what_they_should() {
    let rules = database()
        .psql(
            "SELECT conname, confdeltype FROM pg_constraint
              WHERE contype = 'f' AND connamespace = 'public'::regnamespace ORDER BY conname",
        )
        .unwrap();
    assert_eq!(
        rules.lines().collect::<Vec<_>>(),
        [
            "account_credits_user_id_fkey|r",
            "auth_tokens_user_id_fkey|c",
            "mcp_credentials_instance_id_fkey|c",
            "mcp_service_table_mcp_service_id_fkey|r",
            "mcp_service_table_user_id_fkey|c",
            "subscription_transactions_parent_transaction_id_fkey|r",
            "subscription_transactions_subscription_id_fkey|r",
            "subscription_transactions_user_id_fkey|r",
            "user_billing_details_user_id_fkey|c",
            "user_plans_user_id_fkey|c",
            "user_subscriptions_user_id_fkey|r",
        ]
    );
}
