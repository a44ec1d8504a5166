//! The example of a directory of cells runs in a database of its own and prints what it did.

use std::process::Command;

use crate::support::{empty_database, example, up_sql};

#[test]
fn the_directory_finds_each_cell() {
    let other = empty_database();
    let count = up_sql().len();
    let output = Command::new(example("directory"))
        .env("DATABASE_URL", other.url())
        .output()
        .unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{printed}{errors}");
    for line in [
        &*format!("c1: {count} migrations\nc2: {count} migrations\n"),
        "asha@example.in is placed in c1",
        "ravi@example.in is placed in c2",
        "mei@example.in is placed in c1\n  asha@example.in is taken",
        "login: ravi@example.in is in c2",
        "call: the instance is in c2, counted",
        "webhook: cust_1 is in c2",
        "3 entries removed, the address is free",
    ] {
        assert!(printed.contains(line), "{line} is missing:\n{printed}");
    }
    let database = other.psql("SELECT count(*) FROM pg_class WHERE relname = 'users'");
    assert_eq!(database.unwrap(), "0\n");
}
