//! The documents of `--json`: each has the shape of `docs/json.schema.json`.

use std::thread;
use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;
use serde_json::{Map, Value};

use crate::cli::{Outcome, bruhmcp, start};
use crate::support::{TestDatabase, empty_database};

const SCHEMA: &str = include_str!("../../docs/json.schema.json");

/// Returns the document of an outcome, after comparing it with the schema.
#[track_caller]
pub(crate) fn check(outcome: &Outcome) -> Value {
    let document: Value =
        serde_json::from_str(&outcome.out).unwrap_or_else(|error| panic!("{error}: {outcome:?}"));
    let schema: Value = serde_json::from_str(SCHEMA).unwrap();
    if let Err(difference) = validate(&schema, &schema, &document) {
        panic!("{difference}: {document:#}");
    }
    assert_eq!(document["exit_code"], outcome.code.unwrap(), "{outcome:?}");
    document
}

/// Compares a value with the part of JSON Schema that the schema uses, and refuses another part.
fn validate(root: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    let schema = schema.as_object().ok_or("a schema is an object")?;
    for (keyword, rule) in schema {
        let fits = match keyword.as_str() {
            "$schema" | "title" | "description" | "$defs" => true,
            "$ref" => {
                let name = rule.as_str().and_then(|rule| rule.strip_prefix("#/$defs/"));
                let part = &root["$defs"][name.ok_or("a reference to $defs")?];
                validate(root, part, value)?;
                true
            }
            "anyOf" => {
                let one = array(rule).iter().map(|one| validate(root, one, value));
                let errors: Vec<String> = one.filter_map(Result::err).collect();
                if errors.len() == array(rule).len() {
                    return Err(errors.join("; or "));
                }
                true
            }
            "enum" => array(rule).contains(value),
            "type" => match rule {
                Value::Array(rules) => rules.iter().any(|rule| is_of(rule, value)),
                rule => is_of(rule, value),
            },
            "items" => {
                let mut items = value.as_array().into_iter().flatten();
                items.try_for_each(|item| validate(root, rule, item))?;
                true
            }
            "properties" => {
                for (key, part) in value.as_object().unwrap_or(&Map::new()) {
                    let rule = rule.get(key).ok_or(format!("{key} is not described"))?;
                    validate(root, rule, part).map_err(|error| format!("{key}: {error}"))?;
                }
                true
            }
            // Held by "properties".
            "additionalProperties" if rule.is_object() => {
                let mut values = value.as_object().into_iter().flat_map(Map::values);
                values.try_for_each(|value| validate(root, rule, value))?;
                true
            }
            "additionalProperties" => *rule == Value::Bool(false),
            "required" => {
                let has = |key: &Value| value.get(key.as_str().unwrap_or_default()).is_some();
                !value.is_object() || array(rule).iter().all(has)
            }
            other => return Err(format!("the test does not know {other}")),
        };
        if !fits {
            return Err(format!("{value} is not {keyword} {rule}"));
        }
    }
    Ok(())
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn is_of(rule: &Value, value: &Value) -> bool {
    match rule.as_str() {
        Some("null") => value.is_null(),
        Some("boolean") => value.is_boolean(),
        Some("integer") => value.is_i64() || value.is_u64(),
        Some("number") => value.is_number(),
        Some("string") => value.is_string(),
        Some("array") => value.is_array(),
        Some("object") => value.is_object(),
        _ => false,
    }
}

/// Each kind of error that the schema lists but `source`: the migrations are compiled in.
#[test]
fn each_kind_of_error() {
    let database = empty_database();
    let url = database.url();
    let kind = |url: &str, arguments: &[&str]| -> String {
        let outcome = bruhmcp(url, &[arguments, &["--json"]].concat());
        let document = check(&outcome);
        document["error"]["kind"].as_str().unwrap().to_owned()
    };
    let mut kinds = vec![
        kind(&url, &["no-such-command"]),
        kind("", &["status"]),
        kind("postgresql:///?host=/nowhere", &["verify"]),
        kind(&url, &["run", "--to", "no-such-version"]),
    ];
    let run = bruhmcp(&url, &["run", "--to", "001", "--json"]);
    assert_eq!(run.code, Some(0), "{run:?}");

    let mut holder = database.connect_as_owner();
    holder.batch_execute("BEGIN; LOCK TABLE users").unwrap();
    let stuck = start(&url, &["run", "--json"]);
    until_waiting(&database);
    kinds.push(kind(&url, &["run", "--lock-wait", "0"]));
    std::process::Command::new("kill")
        .arg(stuck.id().to_string())
        .status()
        .unwrap();
    let stopped: Outcome = stuck.wait_with_output().unwrap().into();
    assert_eq!(stopped.code, Some(143), "{stopped:?}");
    kinds.push(
        check(&stopped)["error"]["kind"]
            .as_str()
            .unwrap()
            .to_owned(),
    );
    kinds.push(kind(&url, &["run", "--timeout", "1"]));
    drop(holder);

    database.psql("CREATE TABLE mcp_table ()").unwrap();
    kinds.push(kind(&url, &["run"]));
    database
        .psql(
            "DROP TABLE mcp_table;
             CREATE FUNCTION release() RETURNS event_trigger LANGUAGE plpgsql
             AS $$BEGIN PERFORM pg_advisory_unlock_all(); END$$;
             CREATE EVENT TRIGGER release ON ddl_command_end WHEN TAG IN ('CREATE TABLE')
             EXECUTE FUNCTION release()",
        )
        .unwrap();
    let lost = bruhmcp(&url, &["run", "--to", "002", "--json"]);
    let lost = check(&lost);
    assert_eq!(lost["report"]["steps"].as_array().unwrap().len(), 1);
    kinds.push(lost["error"]["kind"].as_str().unwrap().to_owned());
    database
        .psql(
            "ALTER TABLE __diesel_schema_migrations RENAME version TO v;
             DROP EVENT TRIGGER release",
        )
        .unwrap();
    kinds.push(kind(&url, &["status"]));
    assert_eq!(
        kinds,
        [
            "usage",
            "usage",
            "no_connection",
            "refused",
            "lock_busy",
            "stopped",
            "timed_out",
            "failed",
            "lock_lost",
            "database"
        ]
    );
    let schema: Value = serde_json::from_str(SCHEMA).unwrap();
    let mut listed = array(&schema["$defs"]["error"]["properties"]["kind"]["enum"]).to_vec();
    listed.retain(|listed| !kinds.iter().any(|kind| kind == listed));
    // A fault of `grant` has a test of its own.
    assert_eq!(listed, ["source", "grant"]);
}

fn until_waiting(database: &TestDatabase) {
    let waiting = "SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let begin = Instant::now();
    while database.psql(waiting).unwrap() != "1\n" {
        assert!(begin.elapsed() < Duration::from_secs(60));
        thread::sleep(Duration::from_millis(10));
    }
}
