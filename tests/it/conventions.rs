//! Conventions of the schema and of the row structs. They are read from the catalogue of a migrated
//! database and from the crate's sources, so a new table is held to them without a change here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::difference::assert_same_set;
use crate::support::{TestDatabase, database, up_sql};

/// Tables and views of the crate. Here and below, a partition is part of its table.
const RELATIONS: &str =
    "pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v')
        AND relname <> '__diesel_schema_migrations' AND NOT relispartition";

/// Columns of the crate's tables.
const COLUMNS: &str = "pg_attribute JOIN pg_class ON pg_class.oid = attrelid
    WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')
        AND relname <> '__diesel_schema_migrations' AND NOT relispartition
        AND attnum > 0 AND NOT attisdropped";

/// Triggers of the crate's tables.
const TRIGGERS: &str = "pg_trigger JOIN pg_class ON pg_class.oid = tgrelid
    WHERE relnamespace = 'public'::regnamespace AND NOT tgisinternal AND NOT relispartition";

/// Names of constraints that callers match on and that don't follow the pattern of the others.
const NAMED: [&str; 14] = [
    "auth_tokens_fixed",
    "auth_tokens_lifetime",
    "check_credential_type",
    "check_max_instances_for_plan",
    "check_oauth_status_consistency",
    "check_oauth_tokens",
    "subscription_transactions_no_card_secrets",
    "subscription_transactions_refund_of_parent",
    "unique_user_billing",
    "unique_user_plan",
    "user_billing_details_default_card",
    "user_billing_details_no_card_secrets",
    "user_billing_details_unique_card_ids",
    "users_email_canonical",
];

fn lines(database: &TestDatabase, sql: &str) -> Vec<String> {
    let rows = database.psql(sql).unwrap();
    rows.lines().map(str::to_owned).collect()
}

/// Fails with the rows that a query on the catalogue returns: each of them breaks a convention.
#[track_caller]
fn none(sql: &str) {
    let found = lines(&database(), sql);
    assert!(found.is_empty(), "these break the convention: {found:#?}");
}

#[test]
fn no_column_with_a_default_is_nullable() {
    none(&format!(
        "SELECT relname, attname FROM {COLUMNS} AND atthasdef AND NOT attnotnull"
    ));
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

/// A partial or unique index serves another purpose than a plain one.
#[test]
fn no_index_is_a_duplicate_or_prefix() {
    none(
        "SELECT a.indexrelid::regclass, b.indexrelid::regclass
           FROM pg_index a JOIN pg_index b USING (indrelid)
          WHERE a.indexrelid <> b.indexrelid AND NOT a.indisunique
            AND pg_get_expr(a.indpred, a.indrelid)
                IS NOT DISTINCT FROM pg_get_expr(b.indpred, b.indrelid)
            AND b.indkey::text || ' ' LIKE a.indkey::text || ' %'",
    );
}

/// Recording a call writes these columns. An index that names one of them, even in its predicate,
/// ends HOT updates.
#[test]
fn no_index_names_a_column_that_a_call_writes() {
    none(
        "SELECT indexrelid::regclass FROM pg_index
          WHERE indrelid = 'mcp_service_table'::regclass
            AND pg_get_indexdef(indexrelid)
                ~ 'last_used_at|usage_count|updated_at|version|last_modified'",
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
        "SELECT relname FROM {RELATIONS} AND obj_description(oid, 'pg_class') IS NULL"
    ));
}

#[test]
fn no_column_has_an_outdated_type() {
    none(&format!(
        "SELECT relname, attname, format_type(atttypid, atttypmod) FROM {COLUMNS}
            AND atttypid IN ('timestamp'::regtype, 'varchar'::regtype, 'bpchar'::regtype,
                'json'::regtype, 'money'::regtype, 'float4'::regtype, 'float8'::regtype)"
    ));
    none(&format!(
        "SELECT relname, attname FROM {COLUMNS}
            AND attname LIKE '%amount' AND atttypid <> 'bigint'::regtype"
    ));
}

/// The crate reads whatever the database accepts: no infinity, no year of five digits, and no JSON
/// that is too deep for its parser or has a number that no double can hold.
#[test]
fn each_value_can_be_read() {
    let held = |of_type: &str, by: &str| {
        none(&format!(
            "SELECT relname, attname FROM {COLUMNS} AND atttypid = '{of_type}'::regtype
                AND NOT EXISTS (
                    SELECT FROM pg_constraint
                     WHERE conrelid = attrelid AND attnum = ANY (conkey)
                       AND pg_get_constraintdef(pg_constraint.oid) ~ '{by}')"
        ));
    };
    held(
        "timestamptz",
        "< ''10000-01-01 00:00:00''.*>= ''0001-01-01 00:00:00''",
    );
    // Cards have a shape of their own.
    held(
        "jsonb",
        "\\{100 to last\\}.*double\\(\\)|cards = jsonb_path_query_array",
    );
}

#[test]
fn names_follow_the_pattern() {
    none(&format!(
        "SELECT conrelid::regclass, conname
           FROM pg_constraint JOIN pg_class ON pg_class.oid = conrelid
          WHERE connamespace = 'public'::regnamespace AND contype IN ('p', 'u', 'c', 'f')
            AND NOT relispartition AND conrelid <> '__diesel_schema_migrations'::regclass
            AND conname <> ALL ('{{{}}}')
            AND conname !~ ('^' || conrelid::regclass || '.*_' || CASE contype WHEN 'p' THEN 'pkey'
                WHEN 'u' THEN 'key' WHEN 'c' THEN 'check' ELSE 'fkey' END || '$')",
        NAMED.join(",")
    ));
    none(
        "SELECT indexrelid::regclass FROM pg_index JOIN pg_class ON pg_class.oid = indrelid
          WHERE relnamespace = 'public'::regnamespace AND NOT relispartition AND NOT indisunique
            AND indexrelid::regclass::text !~ ('^' || relname || '_.*_idx$')",
    );
}

/// A trigger function that writes other tables runs with its owner's rights and a fixed search
/// path, and nobody else can call it.
#[test]
fn definer_functions_are_shut() {
    none(
        "SELECT proname FROM pg_proc
          WHERE pronamespace = 'public'::regnamespace AND prosecdef
            AND ('search_path=public, pg_temp' <> ALL (coalesce(proconfig, '{}'))
                 OR has_function_privilege('public', oid, 'EXECUTE'))",
    );
    none(
        "SELECT proname FROM pg_proc
          WHERE pronamespace = 'public'::regnamespace AND NOT prosecdef
            AND prosrc ~* '(insert into|update|delete from) +(users|user_plans|mcp_)'",
    );
}

/// The tokens of a statement: words in lower case and signs, without texts and comments.
fn tokens(sql: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = sql;
    while let Some(first) = rest.chars().next() {
        let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '$';
        let end = if rest.starts_with("--") {
            rest.find('\n').unwrap_or(rest.len())
        } else if first == '\'' {
            rest[1..].find('\'').map_or(rest.len(), |end| end + 2)
        } else if is_word(first) {
            rest.find(|c| !is_word(c)).unwrap_or(rest.len())
        } else {
            first.len_utf8()
        };
        let (token, after) = rest.split_at(end);
        if is_word(first) || first.is_ascii_punctuation() && !token.starts_with(['\'', '"', '-']) {
            tokens.push(token.to_lowercase());
        }
        rest = after;
    }
    tokens
}

/// The tokens of each CASE and COALESCE.
fn conditionals(tokens: &[String]) -> Vec<&[String]> {
    let mut found = Vec::new();
    for (begin, token) in tokens.iter().enumerate() {
        let (open, close) = match &**token {
            "case" => ("case", "end"),
            "coalesce" => ("(", ")"),
            _ => continue,
        };
        let mut depth = 0;
        for (end, token) in tokens.iter().enumerate().skip(begin) {
            depth += i32::from(token == open) - i32::from(token == close);
            if depth == 0 && token == close {
                found.push(&tokens[begin..=end]);
                break;
            }
        }
    }
    found
}

/// What Citus refuses in a statement that writes, of functions by their volatility.
fn refused_by_citus(tokens: &[String], mutable: &BTreeMap<String, String>) -> Vec<String> {
    let has = |word: &str| tokens.iter().position(|token| token == word);
    let is_update = has("update")
        .zip(has("set"))
        .is_some_and(|(at, set)| at < set);
    if has("insert").is_none() && has("delete").is_none() && !is_update {
        return Vec::new();
    }
    let mut refused = Vec::new();
    let calls = |tokens: &[String], volatility: &[&str]| -> Vec<String> {
        let followed = tokens.windows(2).filter(|pair| pair[1] == "(");
        let called = followed.map(|pair| &pair[0]).filter(|name| {
            let of = mutable.get(*name);
            of.is_some_and(|of| volatility.iter().any(|one| of.contains(one)))
        });
        called.cloned().collect()
    };
    refused.extend(calls(tokens, &["v"]));
    for part in conditionals(tokens) {
        refused.extend(calls(part, &["v", "s"]));
        let not_immutable =
            |word: &&String| ["select", "now"].contains(&&***word) || word.starts_with("current_");
        refused.extend(part.iter().filter(not_immutable).cloned());
    }
    if let Some(insert) = has("insert") {
        let mut depth = 0;
        for token in &tokens[insert..] {
            depth += i32::from(token == "(") - i32::from(token == ")");
            match &**token {
                "select" if depth == 0 => refused.push("insert … select".to_owned()),
                _ if depth < 0 => break,
                _ => {}
            }
        }
    }
    refused
}

/// Functions that are not immutable, with their volatility.
fn mutable_functions() -> BTreeMap<String, String> {
    let functions = "SELECT proname, string_agg(DISTINCT provolatile::text, '') FROM pg_proc
                      WHERE provolatile <> 'i' GROUP BY proname";
    let lines = lines(&database(), functions);
    let pairs = lines.iter().map(|line| line.split_once('|').unwrap());
    pairs
        .map(|(name, of)| (name.to_owned(), of.to_owned()))
        .collect()
}

#[test]
fn what_citus_refuses_is_found() {
    let mutable = mutable_functions();
    let found = |sql: &str| refused_by_citus(&tokens(sql), &mutable);
    for (sql, refused) in [
        (
            "UPDATE a SET b = clock_timestamp()",
            &["clock_timestamp"][..],
        ),
        (
            "UPDATE \"a\" SET b = CASE WHEN c = $1 THEN now() ELSE d END",
            &["now", "now"],
        ),
        ("UPDATE a SET b = COALESCE(d, (SELECT 1))", &["select"]),
        (
            "UPDATE a SET b = CASE WHEN c THEN CURRENT_TIMESTAMP END",
            &["current_timestamp"],
        ),
        (
            "WITH x AS (DELETE FROM a RETURNING *) INSERT INTO b SELECT * FROM x",
            &["insert … select"],
        ),
        (
            "WITH x AS (INSERT INTO b (c) SELECT d FROM a) SELECT 1",
            &["insert … select"],
        ),
        (
            "INSERT INTO b VALUES ($1, gen_random_uuid())",
            &["gen_random_uuid"],
        ),
        (
            "INSERT INTO b (c) VALUES ((SELECT max(c) FROM d), 'random()')",
            &[],
        ),
        (
            "UPDATE a SET b = now(), c = CASE WHEN d THEN 1 ELSE 2 END -- random()",
            &[],
        ),
        (
            "WITH x AS (SELECT a FROM b FOR UPDATE) SELECT set_config('a', 'b', true)",
            &[],
        ),
        ("WITH x AS (INSERT INTO b VALUES (1)) SELECT 1", &[]),
    ] {
        assert_eq!(found(sql), refused, "{sql}");
    }
}

/// Cells can be placed on several machines by Citus, which refuses what is searched for here.
#[cfg(feature = "crypto")]
#[test]
fn operations_do_without_what_citus_refuses() {
    let mutable = mutable_functions();
    let statements = crate::locks::statements();
    assert!(statements.len() > 100, "{statements:#?}");
    let refused: Vec<_> = statements
        .iter()
        .map(|(sql, operation)| (operation, sql, refused_by_citus(&tokens(sql), &mutable)))
        .filter(|(.., refused)| !refused.is_empty())
        .collect();
    assert!(refused.is_empty(), "{refused:#?}");

    // Statements that no case of an operation comes to: at least those that are written in one piece.
    for file in rust_files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/models")) {
        let text = fs::read_to_string(&file).unwrap();
        let mut words = text.split(|c: char| !(c.is_alphanumeric() || c == '_'));
        let volatile = ["clock_timestamp", "nextval", "timeofday", "txid_current"];
        let found = words.find(|word| volatile.contains(word));
        assert_eq!(found, None, "{}", file.display());
        for (at, _) in text.match_indices("case_when(") {
            let end = text[at..].find(';').map_or(text.len(), |end| at + end);
            let tokens = tokens(&text[at..end]);
            let mut depth = 0;
            let end = tokens.iter().position(|token| {
                depth += i32::from(token == "(") - i32::from(token == ")");
                depth < 0
            });
            let inside = &tokens[..end.unwrap_or(tokens.len())];
            for word in ["now", "exists", "select", "sql"] {
                let found = inside.iter().any(|token| token == word);
                assert!(!found, "{word} in a CASE in {}: {inside:?}", file.display());
            }
        }
    }
}

/// Citus adds `_` and the number of a shard, and cuts a name that becomes too long.
#[test]
fn a_constraint_leaves_room_for_the_number_of_a_shard() {
    none(
        "SELECT conname FROM pg_constraint
          WHERE connamespace = 'public'::regnamespace AND octet_length(conname) > 56
          UNION
         SELECT relname FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
          WHERE relnamespace = 'public'::regnamespace AND indisunique
            AND octet_length(relname) > 56",
    );
}

/// Citus refuses ADD CONSTRAINT beside another change.
#[test]
fn a_constraint_is_added_alone() {
    for path in up_sql() {
        let text = fs::read_to_string(&path).unwrap();
        for statement in tokens(&text).split(|token| token == ";") {
            let is_added = |pair: &[String]| pair[0] == "add" && pair[1] == "constraint";
            if !statement.windows(2).any(is_added) {
                continue;
            }
            let mut depth = 0;
            let commas = statement.iter().filter(|token| {
                depth += i32::from(*token == "(") - i32::from(*token == ")");
                depth == 0 && *token == ","
            });
            assert_eq!(commas.count(), 0, "{}: {statement:?}", path.display());
        }
    }
}

/// Deleting a user or a service never deletes a financial row or an instance of another user.
#[test]
fn each_foreign_key_says_what_a_delete_does() {
    none(
        "SELECT conrelid::regclass, conname FROM pg_constraint
          WHERE contype = 'f' AND connamespace = 'public'::regnamespace AND confdeltype = 'a'",
    );
    none(
        "SELECT conrelid::regclass, conname FROM pg_constraint
          WHERE contype = 'f' AND connamespace = 'public'::regnamespace AND confdeltype <> 'r'
            AND (confrelid = 'mcp_table'::regclass
                 OR conrelid IN ('user_subscriptions'::regclass,
                     'subscription_transactions'::regclass, 'account_credits'::regclass))",
    );
    none(
        "SELECT relname, 'not deleted with the user' FROM pg_class
          WHERE oid IN ('auth_tokens'::regclass, 'mcp_service_table'::regclass,
                        'user_plans'::regclass, 'user_billing_details'::regclass)
            AND NOT EXISTS (
                SELECT FROM pg_constraint
                 WHERE conrelid = pg_class.oid AND confrelid = 'users'::regclass
                   AND confdeltype = 'c')",
    );
}

/// The Rust files in a folder and in those below it.
pub(crate) fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else {
            files.push(path);
        }
    }
    files
}

/// The columns in the row struct of each table and view. A row struct derives `Selectable` and
/// `Identifiable`, or stands in `views.rs`. Diesel checks that its fields are columns; what it
/// can't see is a column without a field.
fn row_structs() -> BTreeMap<String, BTreeSet<String>> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = rust_files(&source.join("models"));
    files.push(source.join("views.rs"));
    let mut rows = BTreeMap::new();
    for file in files {
        let view = file.ends_with("views.rs");
        let text = fs::read_to_string(&file).unwrap();
        for item in text.split("\n\n") {
            let Some((header, body)) = item.split_once("\npub struct ") else {
                continue;
            };
            if !header.contains("Selectable") || !(view || header.contains("Identifiable")) {
                continue;
            }
            let (_, table) = header.split_once("table_name = ").unwrap();
            let table = table.split([',', ')']).next().unwrap();
            let table = table.rsplit(':').next().unwrap().trim();
            let fields = body.lines().filter_map(|line| {
                let (name, _) = line.strip_prefix("    pub ")?.split_once(": ")?;
                // `type_` is the column `type`.
                Some(name.trim_end_matches('_').to_owned())
            });
            let other = rows.insert(table.to_owned(), fields.collect());
            assert_eq!(other, None, "two row structs for {table}");
            let place = file.with_extension("");
            assert!(
                view || place.iter().any(|part| part == table),
                "the row struct of {table} is in {}, not in src/models/{table}",
                file.display()
            );
        }
    }
    rows
}

#[test]
fn each_column_is_in_the_row_struct_of_its_table() {
    let columns = lines(
        &database(),
        "SELECT table_name || '.' || column_name FROM information_schema.columns
          WHERE table_schema = 'public' AND table_name <> '__diesel_schema_migrations'
            AND NOT (SELECT relispartition FROM pg_class
                      WHERE oid = table_name::regclass)",
    );
    let fields = row_structs().into_iter().flat_map(|(table, columns)| {
        columns
            .into_iter()
            .map(move |column| format!("{table}.{column}"))
    });
    assert_same_set(columns, fields);
}

/// Triggers that note a change of the row, and the columns whose change they don't note.
const NOT_NOTED: [(&str, &str, &[&str]); 4] = [
    (
        "mcp_credentials_update_updated_at",
        "leasing a refresh is not an edit, and what changes the version is named",
        &["refresh_leased_until", "version", "last_modified"],
    ),
    (
        "mcp_credentials_update_version",
        "leasing a refresh is not an edit",
        &["refresh_leased_until", "updated_at"],
    ),
    (
        "mcp_service_table_update_version",
        "recording a call is not an edit",
        &["usage_count", "last_used_at", "updated_at"],
    ),
    (
        "mcp_table_update_updated_at",
        "counting instances is not a change of the service",
        &["total_instances_created", "active_instances_count"],
    ),
];

/// Row triggers on UPDATE that run without a WHEN.
const WITHOUT_WHEN: [(&str, &str); 2] = [
    (
        "mcp_credentials_sync_oauth_status",
        "it fires on INSERT and DELETE too, where a WHEN can't name both OLD and NEW",
    ),
    ("token_audit_log_append_only_row", "it refuses every update"),
];

/// The triggers that `condition` selects: table, name and definition.
fn triggers(database: &TestDatabase, condition: &str) -> Vec<(String, String, String)> {
    let sql = format!(
        "SELECT relname || ' ' || tgname || ' ' || pg_get_triggerdef(pg_trigger.oid)
           FROM {TRIGGERS} AND {condition}"
    );
    let split = |line: String| {
        let mut parts = line.splitn(3, ' ').map(str::to_owned);
        let mut next = || parts.next().unwrap();
        (next(), next(), next())
    };
    lines(database, &sql).into_iter().map(split).collect()
}

/// The columns that a trigger's WHEN names with `old.`.
fn columns_in_when(statement: &str) -> BTreeSet<String> {
    let (_, when) = statement.split_once(" WHEN ").unwrap();
    let words = when.split(|c: char| !(c.is_alphanumeric() || "._*".contains(c)));
    words
        .filter_map(|word| word.strip_prefix("old."))
        .map(str::to_owned)
        .collect()
}

fn columns_of(database: &TestDatabase, table: &str) -> Vec<String> {
    lines(
        database,
        &format!("SELECT attname FROM {COLUMNS} AND relname = '{table}'"),
    )
}

#[test]
fn a_trigger_that_notes_changes_names_every_column() {
    let database = database();
    let noting = triggers(
        &database,
        "tgqual IS NOT NULL AND tgfoid IN (
            'update_updated_at_column'::regproc, 'update_version_and_timestamp'::regproc)",
    );
    let (mut expected, mut found) = (Vec::new(), Vec::new());
    for (table, name, statement) in &noting {
        let mut named = columns_in_when(statement);
        if named.contains("*") {
            continue;
        }
        let excepted = NOT_NOTED.iter().filter(|(trigger, ..)| trigger == name);
        named.extend(excepted.flat_map(|(.., columns)| columns.iter().map(|c| (*c).to_owned())));
        let of_trigger = |column| format!("{name}: {column}");
        expected.extend(columns_of(&database, table).into_iter().map(of_trigger));
        found.extend(named.into_iter().map(of_trigger));
    }
    assert_same_set(expected, found);
    for (trigger, ..) in NOT_NOTED {
        assert!(
            noting.iter().any(|(_, name, _)| name == trigger),
            "{trigger} does not exist: remove it from NOT_NOTED"
        );
    }
}

#[test]
fn each_updated_at_and_version_has_its_trigger() {
    for (column, function) in [
        ("updated_at", "update_updated_at_column"),
        ("version", "update_version_and_timestamp"),
    ] {
        none(&format!(
            "SELECT relname, attname FROM {COLUMNS} AND attname = '{column}' AND NOT EXISTS (
                 SELECT FROM pg_trigger
                  WHERE tgrelid = attrelid AND tgfoid = '{function}'::regproc
                    AND tgqual IS NOT NULL)"
        ));
    }
}

/// Without a WHEN, every update pays for the trigger, even the one that records a call.
#[test]
fn a_row_trigger_on_update_has_a_when() {
    let (row, update) = (1, 16);
    let without = lines(
        &database(),
        &format!(
            "SELECT tgname FROM {TRIGGERS}
                AND tgtype & {row} <> 0 AND tgtype & {update} <> 0 AND tgqual IS NULL"
        ),
    );
    let excepted = WITHOUT_WHEN.map(|(trigger, _)| trigger.to_owned());
    assert_same_set(excepted, without);
}

/// A trigger doesn't fire for a column that its WHEN names and its UPDATE OF list doesn't.
#[test]
fn an_update_of_list_names_each_column_of_the_when() {
    let database = database();
    for (_, name, statement) in triggers(&database, "tgattr <> '' AND tgqual IS NOT NULL") {
        let (_, list) = statement.split_once(" UPDATE OF ").unwrap();
        let (list, _) = list.split_once(" ON ").unwrap();
        let listed: BTreeSet<&str> = list.split(", ").collect();
        let missing: Vec<String> = columns_in_when(&statement)
            .into_iter()
            // No UPDATE changes a system column.
            .filter(|column| !listed.contains(column.as_str()) && column != "tableoid")
            .collect();
        assert!(missing.is_empty(), "{name}: missing {missing:?}");
    }
}

/// The layers of `docs/architecture.md`: shared types know no models, and models know no runner.
#[test]
fn imports_point_downwards() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut upwards = Vec::new();
    let (models, shared): (Vec<PathBuf>, Vec<PathBuf>) = rust_files(&source)
        .into_iter()
        .filter(|file| {
            let top = file.strip_prefix(&source).unwrap();
            let own = [
                "import.rs",
                "import_command.rs",
                "lib.rs",
                "main.rs",
                "migrations",
                "migrations.rs",
            ];
            !own.iter().any(|own| top.starts_with(own))
        })
        .partition(|file| file.starts_with(source.join("models")) || file.ends_with("views.rs"));
    for (files, forbidden) in [
        (&models, &["crate::migrations"][..]),
        (
            &shared,
            &["crate::migrations", "crate::models", "crate::views"],
        ),
    ] {
        assert!(!files.is_empty());
        for file in files {
            let text = fs::read_to_string(file).unwrap();
            let imports = text
                .lines()
                .filter(|line| line.trim_start().starts_with("use "));
            for import in imports {
                if forbidden.iter().any(|above| import.contains(above)) {
                    upwards.push(format!("{}: {import}", file.display()));
                }
            }
        }
    }
    assert!(upwards.is_empty(), "{upwards:#?}");
}

/// Each row of the table in `docs/architecture.md` leads to a row struct and functions that exist.
#[test]
fn the_map_names_what_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let map = fs::read_to_string(root.join("docs/architecture.md")).unwrap();
    let (_, table) = map.split_once("| Main operations |\n").unwrap();
    let (table, _) = table.split_once("\n\n").unwrap();
    let sources = rust_files(&root.join("src/models"));
    let mut missing = Vec::new();
    for line in table.lines().skip(1) {
        let names: Vec<&str> = line.split('`').skip(1).step_by(2).collect();
        let [table, row, operations @ ..] = &names[..] else {
            panic!("{line}")
        };
        let texts = sources
            .iter()
            .filter(|file| file.with_extension("").iter().any(|part| part == *table))
            .map(|file| fs::read_to_string(file).unwrap());
        let text: String = texts.collect();
        let items = operations.iter().map(|name| format!("pub fn {name}("));
        for item in items.chain([format!("pub struct {row} {{")]) {
            if !text.contains(&item) {
                missing.push(format!("{table}: {item}"));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}
