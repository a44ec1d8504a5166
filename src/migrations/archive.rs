//! What 000 moves to the schema `bruhmcp_archive`: said before the run, and again after it.

use diesel::dsl::sql;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::{Array, Bool, Nullable, Text};
use diesel_pg_migrator::{Hook, Note, Preflight};

use super::configured::CATALOGUE;

const UP: &str = include_str!("../../migrations/000_cleanup_old_tables/up.sql");

#[derive(Default)]
pub(super) struct Archive {
    moves: Vec<Note>,
}

#[derive(QueryableByName)]
struct Finding {
    #[diesel(sql_type = Text)]
    topic: String,
    #[diesel(sql_type = Text)]
    item: String,
    #[diesel(sql_type = Nullable<Text>)]
    countable: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    size: Option<String>,
}

const MOVES: &str = "moves";
const OWN: &str = "own";

/// Topics of `preflight.sql` that are only reported: what each means and what to do about it.
const NOTES: [(&str, &str); 6] = [
    (MOVES, "000 moves to the schema bruhmcp_archive"),
    (
        "stays",
        "Stays, and goes on using what moves. Recreate it on the new tables, or drop it before the \
         archive",
    ),
    (
        "published",
        "Publications that go on publishing a table that moves. For the new table: ALTER \
         PUBLICATION … ADD TABLE",
    ),
    (
        "published_schema",
        "Publications of the whole schema: what moves leaves them, and the new tables join. Check \
         what their subscribers may see",
    ),
    (
        "published_all",
        "Publications FOR ALL TABLES: the archive stays in them, and the new tables join. Check \
         what their subscribers may see",
    ),
    (
        "mentions",
        "Functions whose text has the name of a table that moves (found by the word alone). They \
         will use the new table. Rewrite them, or write bruhmcp_archive before the name",
    ),
];

/// Topics of `preflight.sql` that keep the migrations from running.
const OBSTACLES: [(&str, &str); 6] = [
    (
        OWN,
        "The tables of bruhmcp-db are here, but __diesel_schema_migrations lacks their migrations, \
         and the schema is that of no version. Restore the table from a backup, or repair the \
         schema and write them by",
    ),
    (
        "taken",
        "The names of these are needed, and 000 does not move them. Rename or drop them",
    ),
    (
        "not_owned",
        "Only the owner can move these. Run as a role that is a member of the owner's, or change \
         the owner",
    ),
    (
        "no_archive",
        "The role may not create the schema bruhmcp_archive. As the database's owner",
    ),
    (
        "archive_exists",
        "The schema bruhmcp_archive already exists. Rename it, or drop it if nothing in it is \
         needed",
    ),
    (
        "public_creates",
        "Every role may create objects in the schema, and by a function or operator there run code \
         with the rights of others. As the owner of the schema",
    ),
];

impl Hook for Archive {
    fn preflight(
        &mut self,
        connection: &mut PgConnection,
        pending: &[&str],
    ) -> QueryResult<Preflight> {
        self.moves.clear();
        let is_pending = |version| pending.contains(&version);
        if !is_pending("000") && !is_pending("001") {
            return Ok(Preflight::default());
        }
        let mut lists = UP.split("ARRAY[").skip(1).map(quoted);
        let mut moved = || {
            lists
                .next()
                .filter(|_| is_pending("000"))
                .unwrap_or_default()
        };
        let created = Created::by(pending);
        let findings: Vec<Finding> = sql_query(include_str!("preflight.sql"))
            .bind::<Array<Text>, _>(moved())
            .bind::<Array<Text>, _>(moved())
            .bind::<Array<Text>, _>(created.relations)
            .bind::<Array<Text>, _>(created.types)
            .bind::<Array<Text>, _>(created.functions)
            .load(connection)?;
        let mut group = |&(topic, title): &(&str, &str)| {
            let same = findings.iter().filter(|finding| finding.topic == topic);
            let items: Vec<String> = same
                .map(|finding| described(connection, finding))
                .collect::<QueryResult<_>>()?;
            let title = title.to_owned();
            Ok((!items.is_empty()).then_some(Note { title, items }))
        };
        // 001 refuses it, not 000.
        let matters = |(topic, _): &&(&str, &str)| *topic != "public_creates" || is_pending("001");
        let obstacles = OBSTACLES.iter().filter(matters);
        let obstacles = obstacles.filter_map(|one| group(one).transpose());
        let obstacles = obstacles.collect::<QueryResult<_>>()?;
        let has = |topic: &str| findings.iter().any(|finding| finding.topic == topic);
        // A publication matters only if something moves.
        if has(MOVES) && !has(OWN) {
            let notes = NOTES.iter().filter_map(|one| group(one).transpose());
            self.moves = notes.collect::<QueryResult<_>>()?;
        }
        Ok(Preflight {
            notes: self.moves.clone(),
            obstacles,
        })
    }

    fn after(&mut self, connection: &mut PgConnection) -> QueryResult<Vec<Note>> {
        let exists = sql::<Bool>("SELECT to_regnamespace('bruhmcp_archive') IS NOT NULL");
        let mut notes = std::mem::take(&mut self.moves);
        if notes.is_empty() || !exists.get_result::<bool>(connection)? {
            return Ok(Vec::new());
        }
        "Moved to the schema bruhmcp_archive".clone_into(&mut notes[0].title);
        Ok(notes)
    }
}

/// Adds the number of rows, exact for a small table.
fn described(connection: &mut PgConnection, finding: &Finding) -> QueryResult<String> {
    let item = &finding.item;
    if let Some(table) = &finding.countable {
        let count = sql::<Text>(&format!(
            "SELECT ltrim(to_char(count(*), '999,999,999,999,990')) FROM ONLY {table}"
        ));
        let count: String = count.get_result(connection)?;
        let unit = if count == "1" { "row" } else { "rows" };
        return Ok(format!("{item} ({count} {unit})"));
    }
    let size = finding.size.iter().map(|size| format!(" ({size})"));
    Ok(item.clone() + &size.collect::<String>())
}

/// Returns the quoted words up to the end of a list.
fn quoted(list: &str) -> Vec<String> {
    let (list, _) = list.split_once(']').unwrap_or_default();
    let words = list.split('\'').skip(1).step_by(2);
    words.map(str::to_owned).collect()
}

/// Names that can stand in the way, and must not.
#[derive(Default)]
struct Created {
    relations: Vec<String>,
    types: Vec<String>,
    functions: Vec<String>,
}

impl Created {
    /// Reads what these versions create.
    fn by(versions: &[&str]) -> Self {
        let mut created = Self::default();
        let mut is_read = false;
        for line in CATALOGUE.lines() {
            if let Some(migration) = line.strip_prefix("# ") {
                let version = migration.split('_').next().unwrap_or_default();
                is_read = versions.contains(&version);
            }
            let object = line.strip_prefix("+ ").filter(|_| is_read);
            let object = object.and_then(|object| object.split_once(": "));
            match object.and_then(|(key, _)| key.split_once(' ')) {
                Some(("relation" | "index", name)) => created.relations.push(name.to_owned()),
                Some(("type", name)) => created.types.push(name.to_owned()),
                Some(("function", name)) => created.functions.push(name.to_owned()),
                _ => {}
            }
        }
        // A relation's row type has its name.
        created.types.extend_from_slice(&created.relations);
        created
    }
}
