//! What the binary shows on a terminal and what it doesn't, its completions, its man pages, and the
//! URL of `.env`.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::cli::{Outcome, bruhmcp};
use crate::runner::names;
use crate::support::empty_database;

const ESCAPE: &str = "\x1b[";

/// A command without the settings of this shell.
fn clean(program: &str) -> Command {
    let mut command = Command::new(program);
    for name in [
        "CI",
        "CLICOLOR",
        "CLICOLOR_FORCE",
        "DATABASE_URL",
        "NO_COLOR",
    ] {
        command.env_remove(name);
    }
    command.env("TERM", "xterm-256color").stdin(Stdio::null());
    command
}

/// Runs the binary on a terminal, which `script` of util-linux makes.
fn on_terminal(arguments: &str, setting: (&str, &str)) -> String {
    let binary = env!("CARGO_BIN_EXE_bruhmcp-db");
    let output = clean("script")
        .args(["--quiet", "--return", "--command"])
        .arg(format!("stty rows 40 cols 80; {binary} {arguments}"))
        .arg("/dev/null")
        .env(setting.0, setting.1)
        .output()
        .expect("the program script of util-linux is needed");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn colours_are_for_terminals() {
    let none = ("UNSET", "");
    for (arguments, coloured) in [
        ("statuz", "\x1b[1m\x1b[31merror:\x1b[0m"),
        ("--help", "\x1b[1m"),
        (
            "--database-url postgresql://localhost:1/x status",
            "\x1b[1m\x1b[31merror:\x1b[0m",
        ),
    ] {
        let shown = on_terminal(arguments, none);
        assert!(shown.contains(coloured), "{shown:?}");
        for setting in [("NO_COLOR", "1"), ("TERM", "dumb")] {
            let shown = on_terminal(arguments, setting);
            assert!(!shown.contains(ESCAPE), "{setting:?}: {shown:?}");
        }
        let output = clean(env!("CARGO_BIN_EXE_bruhmcp-db"))
            .args(arguments.split(' '))
            .output();
        let piped = Outcome::from(output.unwrap());
        assert!(
            !format!("{}{}", piped.out, piped.err).contains(ESCAPE),
            "{piped:?}"
        );
    }

    let url = empty_database();
    let url = url.url();
    let binary = |arguments: &[&str], setting: (&str, &str)| {
        let output = clean(env!("CARGO_BIN_EXE_bruhmcp-db"))
            .env("DATABASE_URL", &url)
            .env(setting.0, setting.1)
            .args(arguments)
            .output();
        Outcome::from(output.unwrap()).out
    };
    let forced = ("CLICOLOR_FORCE", "1");
    let status = binary(&["status"], forced);
    assert!(status.starts_with("\x1b[33mpending \x1b[0m"), "{status:?}");
    assert!(!binary(&["status"], none).contains(ESCAPE));
    for arguments in [&["status", "--json"][..], &["plan", "--sql"]] {
        assert!(!binary(arguments, forced).contains(ESCAPE), "{arguments:?}");
    }
}

#[test]
fn help_fits_the_terminal() {
    for command in ["", "run", "revert", "verify", "plan"] {
        let shown = on_terminal(&format!("{command} --help"), ("NO_COLOR", "1"));
        let widest = shown
            .lines()
            .map(|line| line.trim_end().chars().count())
            .max();
        assert!(widest > Some(40) && widest <= Some(80), "{shown}");
    }
}

#[test]
fn a_typing_error_gets_a_suggestion() {
    for (arguments, meant) in [
        (&["statuz"][..], "'status'"),
        (&["run", "--lock-wayt", "1"], "'--lock-wait'"),
    ] {
        let outcome = bruhmcp("", arguments);
        assert_eq!(outcome.code, Some(2));
        assert!(
            outcome.err.contains("tip: a similar") && outcome.err.contains(meant),
            "{outcome:?}"
        );
    }
}

#[test]
fn the_version_is_also_that_of_the_schema() {
    let version = format!(
        "bruhmcp-db {} (schema {})\n",
        env!("CARGO_PKG_VERSION"),
        names().last().unwrap()
    );
    assert_eq!(bruhmcp("", &["--version"]).out, version);
}

/// A folder that is removed again.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder = env::temp_dir().join(format!("bruhmcp_{name}_{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        Self(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn completions_and_man_pages() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let completions = bruhmcp("", &["completions", shell]);
        assert_eq!(completions.code, Some(0), "{completions:?}");
        for word in ["bruhmcp-db", "maintain", "lock-timeout"] {
            assert!(completions.out.contains(word), "{shell}: {word}");
        }
    }
    let bash = bruhmcp("", &["completions", "bash"]).out;
    let script = format!(
        "{bash}\nCOMP_WORDS=(bruhmcp-db ver) COMP_CWORD=1
        _bruhmcp__db bruhmcp-db ver bruhmcp-db; echo \"${{COMPREPLY[@]}}\""
    );
    let output = Command::new("bash").args(["-c", &script]).output().unwrap();
    assert_eq!(Outcome::from(output).out, "verify\n");

    let temporary = Folder::new("man");
    let folder = temporary.0.join("man1");
    let man = bruhmcp("", &["man", folder.to_str().unwrap()]);
    assert_eq!(man.code, Some(0), "{man:?}");
    let page = fs::read_to_string(folder.join("bruhmcp-db.1")).unwrap();
    assert!(
        page.contains(".SH NAME") && page.contains("Exit codes"),
        "{page}"
    );
    let page = fs::read_to_string(folder.join("bruhmcp-db-run.1")).unwrap();
    assert!(page.contains("lock\\-timeout"), "{page}");
    let below_a_file = folder.join("bruhmcp-db.1/man1");
    let refused = bruhmcp("", &["man", below_a_file.to_str().unwrap()]);
    assert_eq!(refused.code, Some(1));
    assert!(
        refused.err.contains("can't write the man pages"),
        "{refused:?}"
    );
}

#[test]
fn the_url_of_a_file() {
    let database = empty_database();
    let folder = Folder::new("env");
    let below = folder.0.join("below");
    fs::create_dir(&below).unwrap();
    let run = |variable: Option<&str>| {
        let mut command = clean(env!("CARGO_BIN_EXE_bruhmcp-db"));
        if let Some(url) = variable {
            command.env("DATABASE_URL", url);
        }
        let command = command.arg("status").current_dir(&below);
        Outcome::from(command.output().unwrap())
    };
    let write = |text: &str| fs::write(folder.0.join(".env"), text).unwrap();

    write(&format!(
        "# a comment\nOTHER=1\nDATABASE_URL='{}' # mark\n",
        database.url()
    ));
    let outcome = run(None);
    assert_eq!(outcome.code, Some(3), "{outcome:?}");
    // The variable wins, also an empty one.
    let outcome = run(Some("postgresql://localhost:1/x"));
    assert_eq!(outcome.code, Some(6), "{outcome:?}");
    assert!(outcome.err.contains("--wait SECS"), "{outcome:?}");
    assert_eq!(run(Some("")).code, Some(2));

    for (text, reason) in [
        ("OTHER=1\n", "set DATABASE_URL"),
        (
            "DATABASE_URL=host=x password=hush\n",
            "a line that can't be read",
        ),
        ("hush hush\n", "a line that can't be read"),
    ] {
        write(text);
        let outcome = run(None);
        assert_eq!(outcome.code, Some(2), "{outcome:?}");
        assert!(outcome.err.contains(reason), "{outcome:?}");
        assert!(!outcome.err.contains("hush"), "{outcome:?}");
    }
    fs::remove_file(folder.0.join(".env")).unwrap();
    assert_eq!(run(None).code, Some(2));
}
