//! The pages of `docs/schema/`, written from the catalogue of a migrated database.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use diesel::result::Error;

use crate::conventions::rust_files;
use crate::difference::{assert_same_set, check_generated};
use crate::support::{ROLES, TestDatabase, database, skipped};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The tables of the crate. A partition is part of its table.
const TABLES: &str = "SELECT relname FROM pg_class
    WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')
      AND relname <> '__diesel_schema_migrations' AND NOT relispartition ORDER BY relname";

/// A cell of a table in Markdown; an expression without its casts; the names of columns.
const CELL: &str = "CREATE FUNCTION pg_temp.cell(text) RETURNS text LANGUAGE sql RETURN
        replace(regexp_replace($1, '\\s+', ' ', 'g'), '|', '\\|');
    CREATE FUNCTION pg_temp.bare(text) RETURNS text LANGUAGE sql RETURN
        regexp_replace($1, '::[a-z_]+( without time zone)?', '', 'g');
    CREATE FUNCTION pg_temp.columns(oid, smallint[]) RETURNS text LANGUAGE sql RETURN (
        SELECT string_agg(attname, ', ' ORDER BY place)
          FROM unnest($2) WITH ORDINALITY AS of (number, place)
          JOIN pg_attribute ON attrelid = $1 AND attnum = number);";

/// The columns of `$table`.
const COLUMNS: &str = "
    SELECT format('| `%s` | %s | %s | %s | %s |', attname, format_type(atttypid, atttypmod),
           CASE WHEN attnotnull THEN '' ELSE 'yes' END,
           CASE WHEN attidentity <> '' THEN 'identity'
                ELSE coalesce('`' || pg_temp.cell(pg_temp.bare(pg_get_expr(adbin, adrelid))) || '`', '') END,
           coalesce(pg_temp.cell(col_description(attrelid, attnum)), ''))
      FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
     WHERE attrelid = '$table'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum";

/// The rules of `$table`, each with what breaks it.
const RULES: &str = "
    WITH rule (turn, name, kind, broken) AS (
        SELECT CASE contype WHEN 'p' THEN 1 WHEN 'u' THEN 2 WHEN 'f' THEN 4 ELSE 5 END,
               conname::text,
               CASE contype WHEN 'p' THEN 'primary key' WHEN 'u' THEN 'unique'
                            WHEN 'f' THEN 'foreign key' ELSE 'check' END,
               CASE WHEN contype IN ('p', 'u')
                    THEN format('A second row with the same `%s`.', pg_temp.columns(conrelid, conkey))
                    WHEN contype = 'f' THEN format(
                        'The `%s` is not in [%s](%2$s.md). When that row is deleted: %s.',
                        pg_temp.columns(conrelid, conkey), confrelid::regclass,
                        CASE confdeltype WHEN 'c' THEN 'this row is deleted too'
                             WHEN 'n' THEN 'this column becomes NULL'
                             ELSE 'the delete is refused, by this rule' END)
                    ELSE format('A row for which this is false: `%s`',
                        regexp_replace(pg_temp.bare(pg_get_constraintdef(oid, true)),
                            '^CHECK \\((.*)\\)$', '\\1'))
               END
          FROM pg_constraint
         WHERE conrelid = '$table'::regclass AND contype IN ('p', 'u', 'f', 'c')
         UNION ALL
        SELECT 3, indexrelid::regclass::text, 'unique',
               format('A second row with the same `%s`%s.', pg_temp.columns(indrelid, indkey::smallint[]),
                      coalesce(', both with `' || pg_temp.bare(pg_get_expr(indpred, indrelid, true)) || '`', ''))
          FROM pg_index
         WHERE indrelid = '$table'::regclass AND indisunique
           AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid AND contype IN ('p', 'u'))
         UNION ALL
        SELECT 6, split_part(encode(tgargs, 'escape'), '\\000', 1), 'trigger',
               format('%s (by `%s`)', split_part(encode(tgargs, 'escape'), '\\000', 2), tgname)
          FROM pg_trigger
         WHERE tgrelid = '$table'::regclass AND tgfoid = 'refuse_change'::regproc
         UNION ALL
        SELECT 6, found[2], 'trigger',
               format('%s (by `%s`)', replace(regexp_replace(found[1], '''\\s+''', '', 'g'), '%', '…'),
                      string_agg(tgname, '`, `' ORDER BY tgname))
          FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid,
               regexp_matches(prosrc, 'RAISE EXCEPTION ''([^;]*?)''[^'';]*?USING[^;]*?CONSTRAINT = ''(\\w+)''', 'g') AS found
         WHERE tgrelid = '$table'::regclass AND NOT tgisinternal GROUP BY found)
    SELECT format('| `%s` | %s | %s |', name, kind, pg_temp.cell(broken))
      FROM rule ORDER BY turn, name COLLATE \"C\", broken COLLATE \"C\"";

/// The indexes of `$table`.
const INDEXES: &str = "
    SELECT format('| `%s` | `%s` | %s |', indexrelid::regclass,
           pg_temp.cell(regexp_replace(pg_temp.bare(pg_get_indexdef(indexrelid, 0, true)), '^.* USING btree ', '')),
           coalesce(pg_temp.cell(obj_description(indexrelid, 'pg_class')),
                    CASE WHEN indisprimary THEN 'The row of a key.'
                         WHEN indisunique THEN 'The row of a value, and the rule of this name.' END))
      FROM pg_index WHERE indrelid = '$table'::regclass
     ORDER BY NOT indisprimary, indexrelid::regclass::text COLLATE \"C\"";

/// The triggers of `$table`.
const TRIGGERS: &str = "
    SELECT format('| `%s` | %s%s | %s |', tgname,
           lower((regexp_match(pg_get_triggerdef(oid, true),
               ' ((?:BEFORE|AFTER) .*?) ON '))[1]),
           CASE WHEN tginitdeferred THEN ', at commit' WHEN tgdeferrable THEN ', deferrable'
                ELSE '' END,
           pg_temp.cell(CASE WHEN tgfoid = 'refuse_change'::regproc
               THEN 'Raises `' || split_part(encode(tgargs, 'escape'), '\\000', 1) || '`.'
               ELSE obj_description(tgfoid, 'pg_proc') END))
      FROM pg_trigger WHERE tgrelid = '$table'::regclass AND NOT tgisinternal
     ORDER BY tgname COLLATE \"C\"";

/// The rights of both roles on `$table`.
const RIGHTS: &str = "
    WITH held AS (
        SELECT grantee, privilege_type, NULL::text AS columns
          FROM pg_class, aclexplode(relacl) WHERE pg_class.oid = '$table'::regclass
         UNION ALL
        SELECT grantee, privilege_type, string_agg(attname, ', ' ORDER BY attnum)
          FROM pg_attribute, aclexplode(attacl)
         WHERE attrelid = '$table'::regclass AND attacl IS NOT NULL GROUP BY 1, 2)
    SELECT format('| `%s` | %s |', rolname, coalesce(string_agg(
               privilege_type || coalesce(' (' || columns || ')', ''), ', '
               ORDER BY privilege_type), 'none'))
      FROM pg_roles LEFT JOIN held ON grantee = pg_roles.oid
     WHERE rolname IN ('app_user', 'app_admin') GROUP BY rolname ORDER BY rolname DESC";

/// The entities of the diagram: keys, and what refers to a row.
const ENTITY: &str = "
    SELECT format('        %s %s%s', typname, attname, coalesce(' ' || string_agg(
               DISTINCT CASE contype WHEN 'p' THEN 'PK' WHEN 'f' THEN 'FK' ELSE 'UK' END, ', '), ''))
      FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
           JOIN pg_constraint ON conrelid = attrelid AND attnum = ANY (conkey)
     WHERE attrelid = '$table'::regclass
       AND (contype IN ('p', 'f') OR (contype = 'u' AND cardinality(conkey) = 1))
     GROUP BY attnum, attname, typname ORDER BY attnum";

const RELATIONS: &str = "
    SELECT format('    %s %s--%s %s : %s', confrelid::regclass,
           CASE WHEN attnotnull THEN '||' ELSE '|o' END,
           CASE WHEN EXISTS (SELECT FROM pg_constraint AS one
                              WHERE one.conrelid = f.conrelid AND one.contype = 'u'
                                AND one.conkey = f.conkey) THEN 'o|' ELSE 'o{' END,
           f.conrelid::regclass, attname)
      FROM pg_constraint AS f JOIN pg_attribute ON attrelid = conrelid AND attnum = conkey[1]
     WHERE contype = 'f' AND connamespace = 'public'::regnamespace AND conparentid = 0
     ORDER BY confrelid::regclass::text COLLATE \"C\", conrelid::regclass::text COLLATE \"C\", attname";

const NOTE: &str = "<!-- Written by: BRUHMCP_WRITE=1 script/test generated_pages -->\n";

fn read(database: &TestDatabase, sql: &str, table: &str) -> String {
    let sql = sql.replace("$table", table);
    // The schema is no part of a name that is printed.
    database.psql(&format!("{CELL}{sql}")).unwrap()
}

/// A section with a table, if it has rows.
fn section(title: &str, head: &[&str], rows: &str) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let dashes = "| --- ".repeat(head.len());
    let head = head.join(" | ");
    format!("\n## {title}\n\n| {head} |\n{dashes}|\n{rows}")
}

/// The struct of a table's rows, and its file.
fn row_of(table: &str) -> (String, String) {
    for file in rust_files(&Path::new(ROOT).join("src/models")) {
        let text = fs::read_to_string(&file).unwrap();
        for item in text.split("#[derive(").skip(1) {
            let (attributes, rest) = item.split_once("pub struct ").unwrap_or_default();
            let is_of_table = [",", ")"]
                .iter()
                .any(|end| attributes.contains(&format!("table_name = {table}{end}")));
            if is_of_table && attributes.contains("Identifiable") {
                let name = rest.split([' ', '<', '(']).next().unwrap();
                let file = file.strip_prefix(ROOT).unwrap().display().to_string();
                return (name.to_owned(), file);
            }
        }
    }
    panic!("no row struct of {table} in src/models");
}

fn page(database: &TestDatabase, table: &str) -> String {
    let of = |sql| read(database, sql, table);
    let (row, file) = row_of(table);
    let mut text = format!(
        "{NOTE}\n# {table}\n\n{}\nRow: `{row}` in `{file}`. [All tables](README.md)\n",
        of("SELECT obj_description('$table'::regclass)")
    );
    text += &section(
        "Columns",
        &["Column", "Type", "NULL", "Default", "Meaning"],
        &of(COLUMNS),
    );
    text += &section("Rules", &["Name", "Kind", "What breaks it"], &of(RULES));
    text += &section("Indexes", &["Index", "On", "Serves"], &of(INDEXES));
    text += &section("Triggers", &["Trigger", "Runs", "Does"], &of(TRIGGERS));
    text + &section("Rights", &["Role", "May"], &of(RIGHTS))
}

fn overview(database: &TestDatabase, tables: &[String]) -> String {
    let mut text = format!(
        "{NOTE}\n# The schema\n\nOne page per table, and the [states](states.md). The diagram shows \
         keys and foreign keys;\n[er.svg](er.svg) is the same, drawn.\n\n| Table | Row | Holds |\n\
         | --- | --- | --- |\n"
    );
    for table in tables {
        let holds = "SELECT pg_temp.cell(obj_description('$table'::regclass))";
        let (row, _) = row_of(table);
        let holds = read(database, holds, table);
        text += &format!("| [{table}]({table}.md) | `{row}` | {} |\n", holds.trim());
    }
    text += "\n```mermaid\nerDiagram\n    direction LR\n";
    let relations = read(database, RELATIONS, "");
    let entities = tables.iter().map(|table| {
        let is_alone = !relations.split(' ').any(|word| word == table);
        let columns = read(database, ENTITY, table);
        (is_alone, format!("    {table} {{\n{columns}    }}\n"))
    });
    let (alone, others): (Vec<_>, Vec<_>) = entities.partition(|(is_alone, _)| *is_alone);
    // Mermaid lays them out in this order: a table without a key between others hides their lines.
    text.extend(alone.into_iter().map(|(_, entity)| entity));
    text += &relations;
    text.extend(others.into_iter().map(|(_, entity)| entity));
    text + "```\n"
}

/// A status that a diagram shows. `insert` makes a row in the state `$state`; `update` moves it there.
struct Machine {
    title: &'static str,
    drawing: &'static str,
    column: &'static str,
    of_type: &'static str,
    note: &'static str,
    insert: &'static str,
    update: &'static str,
}

const MACHINES: [Machine; 4] = [
    Machine {
        title: "Subscription",
        drawing: "subscription",
        column: "user_subscriptions.status",
        of_type: "subscription_status",
        note: "A user has at most one that is active, past_due or paused.",
        insert: "INSERT INTO user_subscriptions (user_id, status, cancelled_at)
                 SELECT id, '$state', now() FROM users",
        update: "UPDATE user_subscriptions SET status = '$state'",
    },
    Machine {
        title: "Payment",
        drawing: "payment",
        column: "subscription_transactions.status",
        of_type: "transaction_status",
        note: "Of every type of transaction.",
        insert: "INSERT INTO subscription_transactions (user_id, amount, net_amount, status)
                 SELECT id, 100, 100, '$state' FROM users",
        update: "UPDATE subscription_transactions SET status = '$state'",
    },
    Machine {
        title: "Instance",
        drawing: "instance",
        column: "mcp_service_table.status",
        of_type: "mcp_instance_status",
        note: "An instance is called, and counts for the plan, if it is active and its OAuth status is\n\
               completed.",
        insert: "INSERT INTO mcp_service_table (user_id, mcp_service_id, status)
                 SELECT id, mcp_service_id, '$state' FROM users, mcp_table",
        update: "UPDATE mcp_service_table SET status = '$state'",
    },
    Machine {
        title: "OAuth",
        drawing: "oauth",
        column: "mcp_credentials.oauth_status",
        of_type: "mcp_oauth_status",
        note: "The instance's copy follows. A row with an API key begins as completed.",
        insert: "INSERT INTO mcp_service_table (user_id, mcp_service_id)
                 SELECT id, mcp_service_id FROM users, mcp_table;
                 INSERT INTO mcp_credentials
                     (instance_id, client_id, client_secret, oauth_status, oauth_completed_at)
                 SELECT instance_id, 'client', decode(repeat('01', 64), 'hex'), '$state',
                        CASE WHEN '$state' <> 'pending' THEN now() END
                   FROM mcp_service_table",
        update: "UPDATE mcp_credentials SET oauth_status = '$state',
                     oauth_completed_at = CASE WHEN '$state' <> 'pending' THEN now() END",
    },
];

/// Runs statements that are rolled back. Returns the rule that refused them.
fn refused(conn: &mut PgConnection, sql: &str) -> Option<String> {
    let result = conn.batch_execute(&format!("BEGIN; {sql}; SET CONSTRAINTS ALL IMMEDIATE"));
    conn.batch_execute("ROLLBACK").unwrap();
    match result {
        Ok(()) => None,
        Err(Error::DatabaseError(_, info)) if info.constraint_name().is_some() => {
            info.constraint_name().map(str::to_owned)
        }
        Err(error) => panic!("{sql}: {error}"),
    }
}

/// The diagram of a status: what the database lets through when every pair of states is tried.
fn states(database: &TestDatabase, conn: &mut PgConnection, machine: &Machine) -> String {
    let labels = format!("SELECT unnest(enum_range(NULL::{}))", machine.of_type);
    let labels = database.psql(&labels).unwrap();
    let labels: Vec<&str> = labels.lines().collect();
    let (mut begins, mut goes, mut rules) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
    for &from in &labels {
        let insert = machine.insert.replace("$state", from);
        match refused(conn, &insert) {
            None => begins.push(from),
            Some(rule) => panic!("no row can be {from}, for the rule {rule}: {insert}"),
        }
        for &to in labels.iter().filter(|&&to| to != from) {
            let update = machine.update.replace("$state", to);
            match refused(conn, &format!("{insert}; {update}")) {
                None => drop(goes.insert((from, to))),
                Some(rule) => drop(rules.insert(rule)),
            }
        }
    }
    // States that may become any other one share a frame: their arrows would hide all others.
    let free = |state: &str| {
        let mut others = labels.iter().filter(|&&other| other != state);
        others.all(|&other| goes.contains(&(state, other)))
    };
    let framed: Vec<&str> = labels
        .iter()
        .copied()
        .filter(|&state| free(state))
        .collect();
    let mut text = "```mermaid\nstateDiagram-v2\n    direction LR\n".to_owned();
    if !framed.is_empty() {
        text += "    state \"each may become any other state\" as free {\n";
        for state in &framed {
            text += &format!("        {state}\n");
        }
        text += "    }\n";
    }
    for to in labels
        .iter()
        .filter(|to| !framed.is_empty() && !framed.contains(to))
    {
        text += &format!("    free --> {to}\n");
    }
    for (from, to) in goes.iter().filter(|(from, _)| !framed.contains(from)) {
        text += &format!("    {from} --> {to}\n");
    }
    for state in &labels {
        if !goes.iter().any(|(from, _)| from == state) {
            text += &format!("    {state} --> [*]\n");
        }
    }
    text += "```\n";
    let held = match rules.len() {
        0 => "The database refuses no change.".to_owned(),
        _ => {
            let rules: Vec<_> = rules.iter().map(|rule| format!("`{rule}`")).collect();
            format!("{} refuses every other change.", rules.join(", "))
        }
    };
    format!(
        "\n## {}\n\n`{}`; drawn in [{drawing}.svg]({drawing}.svg).\n{held}\n{}\n\n{text}",
        machine.title,
        machine.column,
        machine.note,
        drawing = machine.drawing,
    )
}

fn all_states(database: &TestDatabase) -> String {
    let conn = &mut database.connect_as_owner();
    conn.batch_execute(
        "INSERT INTO users (first_name, last_name, email) VALUES ('Asha', '', 'asha@example.in');
         INSERT INTO mcp_table (mcp_service_name, display_name, port, type)
         VALUES ('figma', 'Figma', 1, 'oauth')",
    )
    .unwrap();
    let mut text = format!(
        "{NOTE}\n# States\n\nWhat the database allows. The test that writes this page tries each \
         state with each other one.\nA new row may begin in any state. The operations in \
         `src/models/` take fewer ways.\n"
    );
    for machine in &MACHINES {
        text += &states(database, conn, machine);
    }
    text
}

#[test]
fn generated_pages() {
    if !*ROLES {
        skipped("the pages show the rights of app_user and app_admin");
        return;
    }
    let database = database();
    let tables = database.psql(TABLES).unwrap();
    let tables: Vec<String> = tables.lines().map(str::to_owned).collect();
    let mut pages = vec![
        ("README".to_owned(), overview(&database, &tables)),
        ("states".to_owned(), all_states(&database)),
    ];
    pages.extend(
        tables
            .iter()
            .map(|table| (table.clone(), page(&database, table))),
    );
    for (name, text) in &pages {
        check_generated("generated_pages", &format!("docs/schema/{name}.md"), text);
    }
    let files = fs::read_dir(Path::new(ROOT).join("docs/schema")).unwrap();
    let found = files.map(|file| file.unwrap().path());
    let found = found.filter(|file| file.extension().is_some_and(|of| of == "md"));
    let found = found.map(|file| file.file_stem().unwrap().to_str().unwrap().to_owned());
    assert_same_set(pages.into_iter().map(|(name, _)| name), found);
}

/// The pages say what each is for.
#[test]
fn each_index_and_trigger_function_has_a_comment() {
    let found = database()
        .psql(
            "SELECT indexrelid::regclass::text FROM pg_index JOIN pg_class ON pg_class.oid = indrelid
              WHERE relnamespace = 'public'::regnamespace AND NOT relispartition
                AND NOT EXISTS (SELECT FROM pg_constraint
                                 WHERE conindid = indexrelid AND contype IN ('p', 'u'))
                AND obj_description(indexrelid, 'pg_class') IS NULL
              UNION ALL
             SELECT proname::text FROM pg_proc
              WHERE pronamespace = 'public'::regnamespace AND prorettype = 'trigger'::regtype
                AND obj_description(oid, 'pg_proc') IS NULL",
        )
        .unwrap();
    assert_eq!(found, "", "these have no COMMENT ON in their migration");
}
