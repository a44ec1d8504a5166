//! `docs/schema/`: pages and diagrams that are generated from the migrated database.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::Path;

use crate::difference::check_generated;
use crate::rules::database_with_rows;
use crate::support::{self, TestDatabase, database};

/// Tables, except partitions and the ledger.
const TABLES: &str = "SELECT oid, relname FROM pg_class
    WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p')
      AND NOT relispartition AND relname <> '__diesel_schema_migrations'";

/// Returns the rows of a query, each with its fields. A field is fit for a cell of a Markdown table.
fn rows(database: &TestDatabase, sql: &str) -> Vec<Vec<String>> {
    let rows: String = database
        .psql(&format!(
            "\\pset fieldsep '\\x1f'\n\\pset recordsep '\\x1e'\n{sql};"
        ))
        .unwrap();
    let cell = |field: &str| field.trim().replace('\n', " ").replace('|', "\\|");
    let rows = rows.split('\x1e').filter(|row| !row.trim().is_empty());
    rows.map(|row| row.split('\x1f').map(cell).collect())
        .collect()
}

fn table(page: &mut String, title: &str, header: &[&str], rows: &[Vec<String>]) {
    if rows.is_empty() {
        return;
    }
    let line = |cells: &[&str]| format!("| {} |", cells.join(" | "));
    let rule = vec!["---"; header.len()];
    let _ = writeln!(page, "\n## {title}\n\n{}\n{}", line(header), line(&rule));
    for row in rows {
        let cells: Vec<&str> = row.iter().map(String::as_str).collect();
        let _ = writeln!(page, "{}", line(&cells));
    }
}

/// The page of one table.
fn page(database: &TestDatabase, name: &str, purpose: &str) -> String {
    let of = format!("'{name}'::regclass");
    let mut page = format!("# {name}\n\n{purpose}\n");
    if let Some((file, row)) = model(name) {
        let _ = writeln!(page, "\nIn Rust: `{row}`, in [{file}](../../{file}).");
    }
    table(
        &mut page,
        "Columns",
        &["Column", "Type", "Default", "Meaning"],
        &rows(
            database,
            &format!(
                "SELECT format('`%s`', attname),
                        format('%s%s', format_type(atttypid, atttypmod),
                               CASE WHEN NOT attnotnull THEN ', NULL' END),
                        CASE
                            WHEN attidentity <> '' THEN 'identity'
                            WHEN adbin IS NOT NULL THEN format('`%s`', pg_get_expr(adbin, adrelid))
                        END,
                        col_description(attrelid, attnum)
                   FROM pg_attribute LEFT JOIN pg_attrdef ON (adrelid, adnum) = (attrelid, attnum)
                  WHERE attrelid = {of} AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
            ),
        ),
    );
    table(
        &mut page,
        "Rules",
        &["Name", "Holds"],
        &rows(
            database,
            // Of a trigger that calls refuse_change: its rule, and what the error says.
            &format!(
                "SELECT format('`%s`', name), holds FROM (
                     SELECT contype::text AS turn, conname::text AS name,
                            format('`%s`', regexp_replace(
                                pg_get_constraintdef(oid, true), '\\s+', ' ', 'g')) AS holds
                       FROM pg_constraint
                      WHERE conrelid = {of} AND contype IN ('p', 'u', 'c', 'f')
                     UNION ALL
                     SELECT 'v', argument[1], 'Refuses a change: ' || argument[2] || '.'
                       FROM pg_trigger, LATERAL (
                           SELECT string_to_array(encode(tgargs, 'escape'), '\\000')
                       ) AS arguments (argument)
                      WHERE tgrelid = {of} AND tgfoid = 'refuse_change'::regproc
                     UNION
                     SELECT 'w', raised[1],
                            format('Kept by `%s`. %s', proname, replace(raised[2], '''''', ''''))
                       FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid,
                            regexp_matches(
                                prosrc,
                                'CONSTRAINT = ''([^'']+)'',\s+HINT = ''((?:[^'']|'''')*)''', 'g'
                            ) AS raised
                      WHERE tgrelid = {of}
                 ) AS rules
                 ORDER BY position(turn IN 'pufcvw'), name"
            ),
        ),
    );
    table(
        &mut page,
        "Indexes",
        &["Index", "On", "Serves"],
        &rows(
            database,
            &format!(
                "SELECT format('`%s`', indexrelid::regclass),
                        format('`%s`', regexp_replace(
                            pg_get_indexdef(indexrelid), '^.* USING (btree )?', '')),
                        coalesce(obj_description(indexrelid, 'pg_class'),
                                 'The rule of the same name.')
                   FROM pg_index WHERE indrelid = {of}
                  ORDER BY NOT indisprimary, indexrelid::regclass::text"
            ),
        ),
    );
    table(
        &mut page,
        "Triggers",
        &["Trigger", "When", "Calls"],
        &rows(
            database,
            &format!(
                "SELECT format('`%s`', tgname),
                        concat_ws(
                            ' ',
                            CASE WHEN tgtype & 2 <> 0 THEN 'before' ELSE 'after' END,
                            concat_ws(
                                ' or ',
                                CASE WHEN tgtype & 4 <> 0 THEN 'insert' END,
                                CASE WHEN tgtype & 8 <> 0 THEN 'delete' END,
                                CASE WHEN tgtype & 16 <> 0 THEN 'update' END,
                                CASE WHEN tgtype & 32 <> 0 THEN 'truncate' END
                            ),
                            CASE WHEN tginitdeferred THEN 'at commit' END
                        ),
                        format('`%s`', tgfoid::regproc) || coalesce(
                            CASE
                                WHEN tgfoid = 'refuse_change'::regproc THEN format(
                                    ': `%s`', split_part(encode(tgargs, 'escape'), '\000', 1))
                                ELSE ': ' || obj_description(tgfoid, 'pg_proc')
                            END, '')
                   FROM pg_trigger WHERE tgrelid = {of} AND NOT tgisinternal ORDER BY tgname"
            ),
        ),
    );
    table(
        &mut page,
        "Rights",
        &["Role", "Table", "Columns"],
        &rows(
            database,
            &format!(
                "SELECT format('`%s`', role),
                        (SELECT string_agg(privilege_type, ', ' ORDER BY privilege_type)
                           FROM pg_class, aclexplode(relacl) AS acl
                          WHERE pg_class.oid = {of} AND grantee = role::regrole),
                        (SELECT string_agg(
                                    format('%s (`%s`)', privilege_type, columns), ', '
                                    ORDER BY privilege_type)
                           FROM (
                               SELECT privilege_type,
                                      string_agg(attname, '`, `' ORDER BY attnum) AS columns
                                 FROM pg_attribute, aclexplode(attacl)
                                WHERE attrelid = {of} AND grantee = role::regrole
                                GROUP BY privilege_type
                           ) AS granted)
                   FROM (VALUES ('app_user'), ('app_admin')) AS roles (role)"
            ),
        ),
    );
    page
}

/// The file and the row type of a table's model.
fn model(table: &str) -> Option<(String, String)> {
    let file = format!("src/models/{table}.rs");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(&file);
    let text = fs::read_to_string(path).ok()?;
    let (_, row) = text.split_once(&format!("/// A row of `{table}`"))?;
    let (_, row) = row.split_once("pub struct ")?;
    let end = row.find(|c: char| !c.is_alphanumeric())?;
    Some((file, row[..end].to_owned()))
}

/// The diagram of the tables: keys, states, and foreign keys.
fn entities(database: &TestDatabase) -> String {
    let mut diagram = "```mermaid\nerDiagram\n".to_owned();
    // A foreign key whose columns are unique leads to at most one row.
    for row in rows(
        database,
        &format!(
            "SELECT confrelid::regclass, conrelid::regclass,
                    CASE
                        WHEN EXISTS (
                            SELECT FROM pg_index
                             WHERE indrelid = conrelid AND indisunique AND indpred IS NULL
                               AND indkey::smallint[] <@ conkey AND conkey <@ indkey::smallint[]
                        ) THEN 'o|' ELSE 'o{{' END,
                    CASE WHEN attnotnull THEN '||' ELSE '|o' END,
                    attname,
                    CASE confdeltype WHEN 'c' THEN 'cascade' WHEN 'r' THEN 'restrict'
                                     WHEN 'n' THEN 'set null' ELSE 'no action' END
               FROM pg_constraint
               JOIN ({TABLES}) AS tables ON tables.oid = conrelid
               JOIN pg_attribute ON (attrelid, attnum) = (conrelid, conkey[1])
              WHERE contype = 'f' ORDER BY 1, 2, 5"
        ),
    ) {
        let [parent, child, many, one, column, delete] = &row[..] else {
            panic!("{row:?}")
        };
        let _ = writeln!(
            diagram,
            "    {parent} {}--{} {child} : \"{column}, {delete}\"",
            one.replace("\\|", "|"),
            many.replace("\\|", "|")
        );
    }
    let mut last = String::new();
    for row in rows(
        database,
        &format!(
            "SELECT relname, format_type(atttypid, NULL), attname,
                    concat_ws(', ',
                        CASE WHEN attnum = ANY (key.conkey) THEN 'PK' END,
                        CASE WHEN EXISTS (
                            SELECT FROM pg_constraint
                             WHERE conrelid = attrelid AND contype = 'f' AND attnum = ANY (conkey)
                        ) THEN 'FK' END)
               FROM ({TABLES}) AS tables
               JOIN pg_attribute ON attrelid = tables.oid AND attnum > 0 AND NOT attisdropped
               JOIN pg_type ON pg_type.oid = atttypid
               JOIN pg_constraint AS key ON key.conrelid = tables.oid AND key.contype = 'p'
              WHERE attnum = ANY (key.conkey) OR typtype = 'e' OR EXISTS (
                  SELECT FROM pg_constraint
                   WHERE conrelid = attrelid AND contype = 'f' AND attnum = ANY (conkey))
              ORDER BY relname, attnum"
        ),
    ) {
        let [table, type_, column, keys] = &row[..] else {
            panic!("{row:?}")
        };
        if *table != last {
            let end = if last.is_empty() { "" } else { "    }\n" };
            let _ = writeln!(diagram, "{end}    {table} {{");
            table.clone_into(&mut last);
        }
        let type_ = type_.replace("timestamp with time zone", "timestamptz");
        let line = format!("        {type_} {column} {keys}");
        let _ = writeln!(diagram, "{}", line.trim_end());
    }
    diagram + "    }\n```\n"
}

/// A column of states, and how a row of it goes from one to another.
struct States {
    title: &'static str,
    /// Enum type.
    type_: &'static str,
    /// Inserts a row in the state `$state`. Rows of `tests/fixtures/rows.sql` are there.
    insert: &'static str,
    /// Sets that row to the state `$state`.
    update: &'static str,
}

const STATES: [States; 5] = [
    States {
        title: "Subscription: user_subscriptions.status",
        type_: "subscription_status",
        insert: "INSERT INTO user_subscriptions (user_id, status, cancelled_at)
                 SELECT user_id, '$state', now() FROM state_user",
        update: "UPDATE user_subscriptions SET status = '$state' WHERE user_id IN (TABLE state_user)",
    },
    States {
        title: "Payment: subscription_transactions.status",
        type_: "transaction_status",
        insert: "INSERT INTO subscription_transactions (user_id, amount, net_amount, status)
                 SELECT user_id, 1, 1, '$state' FROM state_user",
        update: "UPDATE subscription_transactions SET status = '$state'
                  WHERE user_id IN (TABLE state_user)",
    },
    States {
        title: "Instance: mcp_service_table.status",
        type_: "mcp_instance_status",
        insert: "INSERT INTO mcp_service_table (user_id, mcp_service_id, status)
                 SELECT user_id, (SELECT mcp_service_id FROM mcp_table WHERE is_active LIMIT 1), '$state'
                   FROM state_user",
        update: "UPDATE mcp_service_table SET status = '$state' WHERE user_id IN (TABLE state_user)",
    },
    States {
        title: "OAuth: mcp_credentials.oauth_status",
        type_: "mcp_oauth_status",
        insert: "INSERT INTO mcp_service_table (user_id, mcp_service_id)
                 SELECT user_id, (SELECT mcp_service_id FROM mcp_table WHERE is_active LIMIT 1)
                   FROM state_user;
                 INSERT INTO mcp_credentials (instance_id, client_id, client_secret, oauth_status,
                         oauth_completed_at)
                 SELECT instance_id, 'c', decode(repeat('02', 42), 'hex'), '$state',
                        CASE WHEN '$state' <> 'pending' THEN now() END
                   FROM mcp_service_table WHERE user_id IN (TABLE state_user)",
        update: "UPDATE mcp_credentials
                    SET oauth_status = '$state',
                        oauth_completed_at = CASE WHEN '$state' <> 'pending' THEN now() END
                  WHERE instance_id IN (
                      SELECT instance_id FROM mcp_service_table WHERE user_id IN (TABLE state_user))",
    },
    States {
        title: "Webhook event: webhook_events.processing_status",
        type_: "webhook_status",
        insert: "INSERT INTO webhook_events (external_event_id, event_type, payment_gateway, payload,
                         processing_status, processed_at)
                 VALUES ('state', 'x', 'stripe', '{}', '$state',
                         CASE WHEN '$state' <> 'pending' THEN now() END)",
        update: "UPDATE webhook_events
                    SET processing_status = '$state',
                        processed_at = CASE WHEN '$state' <> 'pending' THEN now() END
                  WHERE external_event_id = 'state'",
    },
];

/// Tries each pair of states on the database, and returns the states that each can become.
fn transitions(database: &TestDatabase, states: &States) -> BTreeMap<String, BTreeSet<String>> {
    let labels = rows(
        database,
        &format!(
            "SELECT enumlabel FROM pg_enum WHERE enumtypid = '{}'::regtype ORDER BY enumsortorder",
            states.type_
        ),
    );
    let labels: Vec<String> = labels.into_iter().flatten().collect();
    let mut reached = BTreeMap::new();
    for from in &labels {
        let mut tries = format!(
            "BEGIN;
             CREATE TEMP TABLE state_user ON COMMIT DROP AS
                 WITH added AS (
                     INSERT INTO users (first_name, last_name, email)
                     VALUES ('State', '', 'state@example.org') RETURNING id
                 ) SELECT id AS user_id FROM added;
             {};",
            states.insert.replace("$state", from)
        );
        for to in labels.iter().filter(|to| *to != from) {
            let update = states.update.replace("$state", to).replace('\'', "''");
            // The row goes back to its state by the end of the subtransaction.
            let _ = write!(
                tries,
                "DO $$ BEGIN
                     BEGIN
                         EXECUTE '{update}';
                         RAISE 'reached' USING ERRCODE = 'ZZ001';
                     EXCEPTION
                         WHEN check_violation THEN
                             PERFORM set_config('state.{to}', '', true);
                         WHEN SQLSTATE 'ZZ001' THEN
                             PERFORM set_config('state.{to}', '{to}', true);
                     END;
                 END $$;
                 SELECT current_setting('state.{to}');"
            );
        }
        tries += "ROLLBACK;";
        let printed = database.psql(&tries).unwrap();
        let printed = printed
            .lines()
            .filter(|line| labels.contains(&(*line).to_owned()));
        reached.insert(from.clone(), printed.map(str::to_owned).collect());
    }
    reached
}

/// Draws states that lead to each other, and to the same others, as one group.
fn diagram(states: &States, reached: &BTreeMap<String, BTreeSet<String>>) -> String {
    let mut groups: BTreeMap<BTreeSet<String>, Vec<&String>> = BTreeMap::new();
    for (state, next) in reached {
        let mut closed = next.clone();
        closed.insert(state.clone());
        groups.entry(closed).or_default().push(state);
    }
    let mut drawn = format!(
        "## {}\n\n```mermaid\nstateDiagram-v2\n    direction LR\n",
        states.title
    );
    let name = |members: &[&String]| match members {
        [only] => (*only).clone(),
        _ => format!("any_of_{}", members[0]),
    };
    for members in groups.values().filter(|members| members.len() > 1) {
        let _ = writeln!(drawn, "    state {} {{", name(members));
        for member in members {
            let _ = writeln!(drawn, "        {member}");
        }
        let _ = writeln!(drawn, "    }}");
    }
    for (closed, members) in &groups {
        let others = groups.values().filter(|other| *other != members);
        let mut leads = false;
        for other in others {
            if other.iter().all(|state| closed.contains(*state)) {
                let _ = writeln!(drawn, "    {} --> {}", name(members), name(other));
                leads = true;
            }
        }
        if !leads && groups.len() > 1 {
            let _ = writeln!(drawn, "    {} --> [*]", name(members));
        }
    }
    drawn + "```\n"
}

#[test]
fn generated_pages() {
    let database = database_with_rows();
    if rows(&database, "SELECT to_regrole('app_user'), to_regrole('app_admin')")
        .concat()
        .contains(&String::new())
    {
        support::skipped("the rights of app_user and app_admin need these roles");
        return;
    }
    let tables = rows(
        &database,
        &format!(
            "SELECT relname, obj_description(oid, 'pg_class') FROM ({TABLES}) AS tables
              ORDER BY relname"
        ),
    );
    let mut overview =
        "# Schema\n\nGenerated from the migrated database. [Architecture](../architecture.md) \
        says how the tables\nwork together, [states](states.md) how a row may change.\n\n\
        | Table | Contents |\n| --- | --- |\n"
            .to_owned();
    for row in &tables {
        let _ = writeln!(overview, "| [`{0}`]({0}.md) | {1} |", row[0], row[1]);
    }
    let _ = write!(
        overview,
        "\n## Diagram\n\nKeys and states only; the pages have all columns. A line names the column of the \
         foreign key, and what\na delete does.\n\n{}",
        entities(&database)
    );
    check_generated("generated_pages", "docs/schema/README.md", &overview);

    let mut drawn =
        "# States\n\nEach pair of states was tried on the database: a line is an update that it \
        accepts. States in one frame\nlead to each other. `[*]` marks a final state.\n"
            .to_owned();
    for states in &STATES {
        let _ = write!(
            drawn,
            "\n{}",
            diagram(states, &transitions(&database, states))
        );
    }
    check_generated("generated_pages", "docs/schema/states.md", &drawn);
    for row in &tables {
        let file = format!("docs/schema/{}.md", row[0]);
        check_generated("generated_pages", &file, &page(&database, &row[0], &row[1]));
    }
    let pages = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/schema")).unwrap();
    let pages =
        pages.filter(|page| page.as_ref().unwrap().path().extension() == Some("md".as_ref()));
    assert_eq!(
        pages.count(),
        tables.len() + 2,
        "a page of a table that is gone"
    );
}

/// The pages say what each index is for.
#[test]
fn each_index_says_what_it_serves() {
    let silent = rows(
        &database(),
        &format!(
            "SELECT indexrelid::regclass FROM pg_index JOIN ({TABLES}) AS tables ON indrelid = tables.oid
              WHERE obj_description(indexrelid, 'pg_class') IS NULL
                AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)"
        ),
    );
    assert!(silent.is_empty(), "COMMENT ON INDEX is missing: {silent:?}");
}
