//! Compares the live schema with the one that the applied migrations build.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use diesel::dsl::sql;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_types::{Array, Nullable, Text};
use diesel::{QueryResult, sql_query};
use serde::Serialize;
use sha2::{Digest, Sha256};

/// Result of [`Runner::verify`](crate::Runner::verify). A line describes an object, such as
/// `column users.email: text not null`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// Newest applied version. The schema was compared with what the migrations build up to it.
    pub version: Option<String>,
    /// Names of the migrations that are not applied, oldest first. They are not expected.
    pub pending: Vec<String>,
    /// Lines that are expected, but not in the database.
    pub missing: Vec<String>,
    /// Objects that differ from what is expected.
    pub changed: Vec<Change>,
    /// Lines that are in the database, but not expected. They can make a statement fail, but not
    /// do something else than before.
    pub extra: Vec<String>,
    /// What roles may do beyond the intended rights.
    pub rights: Vec<Right>,
    /// Intended rights that an existing role doesn't have.
    pub lacking: Vec<String>,
    /// SHA-256 of the lines in the database. Equal schemas have equal fingerprints.
    pub fingerprint: String,
}

/// An object that is not as expected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// `None` for a trigger, rule, policy or child that was added to a table: it changes what
    /// statements on the table do.
    pub expected: Option<String>,
    /// The line in the database.
    pub found: String,
}

/// A right that is not intended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Right {
    /// Such as `right anon on users: SELECT`, or `owner anon of function lower(text)` for what runs
    /// code of another role.
    pub right: String,
    /// The SQL that takes it away.
    pub remedy: String,
}

impl Verification {
    /// Returns whether something is missing or changed, or a role has rights that are not intended.
    pub fn has_drift(&self) -> bool {
        !(self.missing.is_empty() && self.changed.is_empty() && self.rights.is_empty())
    }
}

impl fmt::Display for Right {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}\n    {}", self.right, self.remedy)
    }
}

impl fmt::Display for Change {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(expected) = &self.expected {
            writeln!(formatter, "- {expected}")?;
        }
        write!(formatter, "+ {}", self.found)
    }
}

/// What is expected: the lines of the applied migrations, and the rights that roles may have.
pub(crate) struct Expected {
    pub(crate) lines: Lines,
    rights: Lines,
}

/// What is in the database: the lines, the rights beyond those of owners, superusers and trusted
/// roles, and which roles with intended rights exist.
pub(crate) struct Found {
    pub(crate) lines: Lines,
    granted: Vec<Privileges>,
    roles: Vec<String>,
}

impl Expected {
    /// Sums up what these migrations, in this order, add and take away. Returns `None` if the
    /// catalogue lacks one of them.
    pub(crate) fn new(catalogue: &str, migrations: &[&str]) -> Option<Self> {
        Some(Self {
            lines: Lines::sum(catalogue, migrations)?,
            rights: Lines::sum(catalogue, &["rights"]).unwrap_or_default(),
        })
    }

    /// Returns the lines of all of them, each as in the last one that has it.
    pub(crate) fn union(all: &[Self]) -> Self {
        let lines = all.iter().flat_map(|one| one.lines.0.clone());
        Self {
            lines: Lines(lines.collect()),
            rights: Lines::default(),
        }
    }

    pub(crate) fn compare(&self, found: &Found) -> Verification {
        let line = |lines: &Lines, key: &str| Some(format!("{key}: {}", lines.0.get(key)?));
        let mut verification = Verification {
            version: None,
            pending: Vec::new(),
            missing: Vec::new(),
            changed: Vec::new(),
            extra: Vec::new(),
            rights: self.excess(&found.granted),
            lacking: self.lacking(found),
            fingerprint: found.lines.fingerprint(),
        };
        let keys: BTreeSet<&String> = self.lines.0.keys().chain(found.lines.0.keys()).collect();
        for key in keys {
            match (line(&self.lines, key), line(&found.lines, key)) {
                (Some(expected), None) => verification.missing.push(expected),
                (expected, Some(found)) if expected.as_ref() == Some(&found) => {}
                (None, Some(found)) if !acts(key) => verification.extra.push(found),
                (expected, Some(found)) => verification.changed.push(Change { expected, found }),
                (None, None) => {}
            }
        }
        verification
    }

    fn intended(&self, key: &str) -> BTreeSet<&str> {
        let privileges = self.rights.0.get(key).map(String::as_str);
        privileges.unwrap_or_default().split(", ").collect()
    }

    fn excess(&self, granted: &[Privileges]) -> Vec<Right> {
        let mut rights = Vec::new();
        for granted in granted {
            let intended = self.intended(&granted.key);
            let is_excess = |privilege: &&str| !intended.contains(privilege);
            let excess = granted.privileges.iter().map(String::as_str);
            let excess: Vec<&str> = excess.filter(is_excess).collect();
            if !excess.is_empty() || granted.privileges.is_empty() {
                rights.push(granted.as_excess(&excess));
            }
        }
        rights.sort_by(|one, other| one.right.cmp(&other.right));
        rights
    }

    fn lacking(&self, found: &Found) -> Vec<String> {
        let mut lacking = Vec::new();
        // Without an object there may be no ledger yet.
        if self.lines.0.is_empty() {
            return lacking;
        }
        for key in self.rights.0.keys() {
            let role_and_object = key
                .strip_prefix("right ")
                .and_then(|key| key.split_once(" on "));
            let Some((role, object)) = role_and_object else {
                continue;
            };
            if !found.roles.iter().any(|existing| existing == role) || !self.lines.has(object) {
                continue;
            }
            let granted = found.granted.iter().find(|granted| &granted.key == key);
            let granted = granted.map_or(&[][..], |granted| &granted.privileges);
            let mut absent = self.intended(key);
            absent.retain(|privilege| !granted.iter().any(|granted| granted == privilege));
            if !absent.is_empty() {
                let absent: Vec<&str> = absent.into_iter().collect();
                lacking.push(format!("{key}: {}", absent.join(", ")));
            }
        }
        lacking
    }
}

impl Found {
    /// Reads what is in `schema`: what has the keys of `expected` and what hangs on it, or all.
    pub(crate) fn read(
        connection: &mut PgConnection,
        schema: &str,
        expected: Option<&Expected>,
        trusted: &[String],
    ) -> QueryResult<Self> {
        let keys: Option<Vec<&String>> = expected.map(|expected| expected.lines.0.keys().collect());
        let roles: Vec<&str> = expected.map_or_else(Vec::new, |expected| {
            let keys = expected.rights.0.keys();
            keys.filter_map(|key| Some(key.strip_prefix("right ")?.split_once(" on ")?.0))
                .collect()
        });
        connection
            .build_transaction()
            .read_only()
            .repeatable_read()
            .run(|connection| {
                sql_query(PINNED).execute(connection)?;
                let roles = sql::<Text>(
                    "SELECT quote_ident(rolname) FROM pg_roles
                     WHERE rolname <> ALL (",
                )
                .bind::<Array<Text>, _>(trusted)
                .sql(") AND quote_ident(rolname) = ANY (")
                .bind::<Array<Text>, _>(roles)
                .sql(")")
                .load(connection)?;
                let lines = Lines::read(connection, schema, keys.as_deref())?;
                // The catalogue's query has changed the search_path.
                sql_query(PINNED).execute(connection)?;
                let granted = sql_query(include_str!("rights.sql"))
                    .bind::<Text, _>(schema)
                    .bind::<Nullable<Array<Text>>, _>(&keys)
                    .bind::<Array<Text>, _>(trusted)
                    .load(connection)?;
                Ok(Self {
                    lines,
                    granted,
                    roles,
                })
            })
    }
}

/// The lines of what is found, then of the rights.
impl fmt::Display for Found {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.lines)?;
        for Privileges {
            key, privileges, ..
        } in &self.granted
        {
            writeln!(formatter, "{key}: {}", privileges.join(", "))?;
        }
        Ok(())
    }
}

/// The lines of a schema: the definition of each object, by its key.
#[derive(Default)]
pub(crate) struct Lines(BTreeMap<String, String>);

impl Lines {
    /// Reads those of `schema` that have these keys, or all. Leaves the schema as the
    /// `search_path` of the transaction.
    pub(crate) fn read(
        connection: &mut PgConnection,
        schema: &str,
        keys: Option<&[&String]>,
    ) -> QueryResult<Self> {
        let lines: Vec<Line> = sql_query(include_str!("catalogue.sql"))
            .bind::<Text, _>(schema)
            .bind::<Nullable<Array<Text>>, _>(keys)
            .load(connection)?;
        Ok(lines.into_iter().collect())
    }

    fn sum(catalogue: &str, headings: &[&str]) -> Option<Self> {
        let mut lines = Self::default();
        for name in headings {
            let heading = format!("# {name}");
            let mut rest = catalogue.lines().skip_while(|&line| line != heading);
            rest.next()?;
            for line in rest.take_while(|line| !line.starts_with("# ")) {
                if let Some((key, definition)) = line.strip_prefix("+ ").and_then(split) {
                    lines.0.insert(key.to_owned(), definition.to_owned());
                } else if let Some((key, _)) = line.strip_prefix("- ").and_then(split) {
                    lines.0.remove(key);
                }
            }
        }
        Some(lines)
    }

    /// Whether a relation, column or function is among them. Beside any of them is the ledger.
    fn has(&self, object: &str) -> bool {
        let key = |kind: &str, object: &str| self.0.contains_key(&format!("{kind} {object}"));
        let relation = object.split('(').next().unwrap_or_default();
        key("relation", relation)
            || key("function", object)
            || object == "__diesel_schema_migrations"
    }

    pub(crate) fn keys(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }

    pub(crate) fn contains(&self, line: &str) -> bool {
        split(line).is_some_and(|(key, definition)| {
            self.0.get(key).is_some_and(|found| found == definition)
        })
    }

    fn fingerprint(&self) -> String {
        let digest = Sha256::digest(self.to_string());
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl fmt::Display for Lines {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = self.0.iter();
        lines.try_for_each(|(key, definition)| writeln!(formatter, "{key}: {definition}"))
    }
}

impl FromIterator<Line> for Lines {
    fn from_iter<T: IntoIterator<Item = Line>>(lines: T) -> Self {
        let on_one_line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let lines = lines.into_iter();
        let pair = |line: Line| (on_one_line(&line.key), on_one_line(&line.definition));
        Self(lines.map(pair).collect())
    }
}

/// The rights of a role on an object. `revoke` is the statement that takes them away, with `{}` for
/// the privileges; to each of them belongs `attribute`, a column in parentheses.
#[derive(QueryableByName)]
pub(crate) struct Privileges {
    #[diesel(sql_type = Text)]
    key: String,
    #[diesel(sql_type = Array<Text>)]
    privileges: Vec<String>,
    #[diesel(sql_type = Text)]
    attribute: String,
    #[diesel(sql_type = Text)]
    revoke: String,
}

const OPTION: &str = "GRANT OPTION FOR ";

impl Privileges {
    fn as_excess(&self, privileges: &[&str]) -> Right {
        let names = |privileges: &[&str]| {
            let names = privileges.iter();
            let names = names.map(|privilege| format!("{privilege}{}", self.attribute));
            names.collect::<Vec<_>>().join(", ")
        };
        let (options, plain): (Vec<&str>, Vec<&str>) = privileges
            .iter()
            .partition(|privilege| privilege.starts_with(OPTION));
        // Without the privilege there is no option.
        let options: Vec<&str> = options
            .iter()
            .filter_map(|option| option.strip_prefix(OPTION))
            .filter(|option| !plain.contains(option))
            .collect();
        let cascade = if privileges.len() > plain.len() {
            " CASCADE"
        } else {
            ""
        };
        let mut remedy = Vec::new();
        if !plain.is_empty() || privileges.is_empty() {
            remedy.push(self.revoke.replace("{}", &names(&plain)) + cascade + ";");
        }
        if !options.is_empty() {
            let options = format!("{OPTION}{}", names(&options));
            remedy.push(self.revoke.replace("{}", &options) + cascade + ";");
        }
        Right {
            right: match privileges {
                [] => self.key.clone(),
                _ => format!("{}: {}", self.key, privileges.join(", ")),
            },
            remedy: remedy.join(" "),
        }
    }
}

fn split(line: &str) -> Option<(&str, &str)> {
    line.split_once(": ")
}

/// Whether an object with this key changes what statements on its table do, instead of only
/// refusing some.
fn acts(key: &str) -> bool {
    ["trigger ", "rule ", "policy ", "child "]
        .iter()
        .any(|kind| key.starts_with(kind))
}

#[derive(QueryableByName)]
pub(crate) struct Line {
    #[diesel(sql_type = Text)]
    key: String,
    #[diesel(sql_type = Text)]
    definition: String,
}

/// Settings of a role or database that change how the server prints a definition. The query itself
/// looks names up in `pg_catalog` alone.
pub(crate) const PINNED: &str = "SELECT set_config(name, value, true) FROM (VALUES
    ('search_path', 'pg_catalog'), ('quote_all_identifiers', 'off'),
    ('standard_conforming_strings', 'on'), ('bytea_output', 'hex'), ('extra_float_digits', '1'),
    ('datestyle', 'ISO, YMD'), ('intervalstyle', 'postgres'), ('timezone', 'UTC')
) AS setting (name, value)";
