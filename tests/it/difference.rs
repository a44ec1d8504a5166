//! Assertions that fail with the difference, and files that tests generate.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::io::Write;
use std::path::Path;
use std::{fs, io};

/// Compares two texts line by line and fails with the lines that differ.
#[track_caller]
pub(crate) fn assert_same(expected: &str, found: &str) {
    assert!(expected == found, "{}", difference(expected, found));
}

/// Fails with the difference of two sets: what is missing from `found`, and what is extra in it.
#[track_caller]
pub(crate) fn assert_same_set<T: Ord + Debug>(
    expected: impl IntoIterator<Item = T>,
    found: impl IntoIterator<Item = T>,
) {
    let expected: BTreeSet<T> = expected.into_iter().collect();
    let found: BTreeSet<T> = found.into_iter().collect();
    let missing: Vec<&T> = expected.difference(&found).collect();
    let extra: Vec<&T> = found.difference(&expected).collect();
    assert!(
        missing.is_empty() && extra.is_empty(),
        "missing: {missing:#?}\nextra: {extra:#?}"
    );
}

/// Compares a file that the test `test` generates with the committed one. With `BRUHMCP_WRITE` set
/// it writes the file instead.
#[track_caller]
pub(crate) fn check_generated(test: &str, path: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("BRUHMCP_WRITE").is_some() {
        fs::write(&path, text).unwrap();
        // Past the capture of the test's output.
        let mut terminal = io::stderr();
        writeln!(terminal, "wrote {}", path.display()).unwrap();
        return;
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == text,
        "{} differs from what the tests find. If the tests are right, write it with\n\
         BRUHMCP_WRITE=1 script/test {test}\n{}",
        path.display(),
        difference(&committed, text)
    );
}

/// Lines only in `expected` with `-`, lines only in `found` with `+`.
fn difference(expected: &str, found: &str) -> String {
    let only = |sign, one: &str, other: &str| -> String {
        let lines = one
            .lines()
            .filter(|&line| !other.lines().any(|same| same == line));
        lines.map(|line| format!("{sign} {line}\n")).collect()
    };
    let lines = only('-', expected, found) + &only('+', found, expected);
    if lines.is_empty() {
        "the same lines, in another order or number\n".to_owned()
    } else {
        lines
    }
}
