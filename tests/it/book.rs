//! Every public operation has an example that compiles, and the README's diagram is the schema's.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::difference::assert_same_set;
use crate::support::database;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The files of a folder and those in it.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|it| it == extension) {
                found.push(path);
            }
        }
    }
    found
}

fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap()
}

/// The blocks of a page that rustdoc compiles.
fn blocks<'a>(lines: impl Iterator<Item = &'a str>) -> String {
    let mut code = String::new();
    let mut fence: Option<&str> = None;
    for line in lines {
        match (line.strip_prefix("```"), fence) {
            (Some(language), None) => fence = Some(language),
            (Some(_), Some(_)) => fence = None,
            (None, Some("" | "no_run" | "rust" | "rust,no_run")) => {
                code.push_str(line);
                code.push('\n');
            }
            (None, _) => {}
        }
    }
    code
}

/// Everything that shows how to use the crate, and is compiled by the tests.
fn shown() -> String {
    let mut code: String = files("examples", "rs").iter().map(text).collect();
    for path in files("src", "rs") {
        let source = text(path);
        let docs = source.lines().filter_map(|line| {
            let line = line.trim_start();
            let doc = line.strip_prefix("///").or(line.strip_prefix("//!"))?;
            Some(doc.strip_prefix(' ').unwrap_or(doc))
        });
        code.push_str(&blocks(docs));
    }
    let compiled = text(root().join("src/book.rs"));
    for path in files("docs", "md")
        .into_iter()
        .chain([root().join("README.md")])
    {
        let name = path.strip_prefix(root()).unwrap().display();
        if compiled.contains(&format!("include_str!(\"../{name}\")")) {
            code.push_str(&blocks(text(path).lines()));
        }
    }
    code
}

/// The calls that an example of each public function contains: `User::sign_up(`, or `.cursor(` of a
/// method.
fn operations() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let sources = files("src/models", "rs");
    for path in sources.into_iter().chain([root().join("src/views.rs")]) {
        let source = text(path);
        let mut owner = String::new();
        let mut rest = source.as_str();
        while let Some((line, after)) = rest.split_once('\n') {
            if let Some(head) = line.strip_prefix("impl") {
                let head = match head.strip_prefix('<') {
                    Some(generic) => generic.split_once("> ").unwrap().1,
                    None => head.trim_start(),
                };
                owner = head.chars().take_while(|c| c.is_alphanumeric()).collect();
            }
            let function = line.trim_start().strip_prefix("pub fn ");
            if let Some((name, _)) = function.and_then(|it| it.split_once(['(', '<'])) {
                let arguments = rest.split(')').next().unwrap();
                found.insert(if !line.starts_with(' ') {
                    format!("{name}(")
                } else if arguments.contains("self") {
                    format!(".{name}(")
                } else {
                    format!("{owner}::{name}(")
                });
            }
            rest = after;
        }
    }
    found
}

#[test]
fn every_operation_has_an_example() {
    let shown = shown();
    let operations = operations();
    assert!(operations.len() > 100, "{operations:?}");
    let missing: Vec<_> = operations
        .iter()
        .filter(|call| !shown.contains(*call))
        .collect();
    assert!(
        missing.is_empty(),
        "no example in docs/guide, rustdoc or examples calls these: {missing:#?}"
    );
}

/// The lines of the README's block of this language.
fn readme_block(language: &str) -> Vec<String> {
    let readme = text(root().join("README.md"));
    let fence = format!("```{language}");
    let lines = readme.lines().skip_while(|line| *line != fence).skip(1);
    lines
        .take_while(|line| *line != "```")
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_diagram_of_the_readme_shows_foreign_keys() {
    let drawn = readme_block("mermaid").into_iter().filter_map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        let [parent, "||--o{" | "||--o|", child, ..] = words[..] else {
            return None;
        };
        Some(format!("{child} {parent}"))
    });
    let foreign_keys = database()
        .psql(
            "SELECT DISTINCT concat_ws(' ', conrelid::regclass, confrelid::regclass)
               FROM pg_constraint
              WHERE contype = 'f' AND connamespace = 'public'::regnamespace",
        )
        .unwrap();
    let drawn: Vec<_> = drawn.collect();
    assert!(drawn.len() > 10, "{drawn:?}");
    for line in drawn {
        assert!(foreign_keys.lines().any(|key| key == line), "{line}");
    }
}

/// The columns of the README's table of tables: name, row type, operations.
#[test]
fn the_readme_names_operations_of_each_table() {
    let readme = text(root().join("README.md"));
    let operations = operations();
    let mut tables = Vec::new();
    for line in readme.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        let [_, table, row, .., named, _] = cells[..] else {
            continue;
        };
        let table = table.trim_matches('`').to_owned();
        if !root().join(format!("src/models/{table}.rs")).exists() {
            continue;
        }
        tables.push(table);
        for name in named.split('`').skip(1).step_by(2) {
            let call = format!("{}::{name}(", row.trim_matches('`'));
            assert!(operations.contains(&call), "{call} of README.md");
        }
    }
    let entities = readme_block("mermaid").into_iter().flat_map(|line| {
        let of_a_relation = line.split(':').next().unwrap().split_whitespace();
        let names: Vec<_> = of_a_relation.map(str::to_owned).collect();
        names
            .into_iter()
            .filter(|it| it.contains("_") || it == "users")
    });
    // Those of the table of README.md, and those of its diagram.
    assert_same_set(tables, entities);
}
