//! The command line: `run`, `revert`, `redo`, `status`, `plan` and `verify`. `--help` lists the
//! exit codes.

use std::env;
use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use serde_json::{Value, json};

use crate::{
    Direction, Error, Event, Extent, Planned, Report, Reversal, Runner, Status, Verification,
};

const DONE: u8 = 0;
const FAILED: u8 = 1;
const USAGE: u8 = 2;
const PENDING: u8 = 3;
const LOCK_BUSY: u8 = 4;
const REFUSED: u8 = 5;
const NO_CONNECTION: u8 = 6;
const DRIFT: u8 = 7;

const EXIT_CODES: &str = "Exit codes: 0 done or current, 1 failed, 2 usage, 3 pending (status), \
    4 lock busy, 5 refused, 6 no connection, 7 drift (verify).";

/// Interval between two lines about a migration that is still running.
const LIVE: Duration = Duration::from_secs(2);

/// What `--help` and `--version` say about a program.
#[expect(missing_docs, reason = "the names say it")]
#[derive(Debug, Clone, Copy)]
pub struct Program {
    pub name: &'static str,
    pub version: &'static str,
    pub about: &'static str,
}

#[derive(Parser)]
struct Cli {
    /// postgresql:// URL or key=value pairs. Default: the variable DATABASE_URL, which other users
    /// of the machine can't see.
    #[arg(long, global = true, value_name = "URL")]
    database_url: Option<String>,
    /// How long to retry while the server is starting or out of reach.
    #[arg(long, global = true, value_name = "SECS", default_value_t = 0)]
    wait: u64,
    /// How long to wait for another runner.
    #[arg(long, global = true, value_name = "SECS", default_value_t = 60)]
    lock_wait: u64,
    /// Print one JSON document.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Apply pending migrations.
    Run {
        /// The last version to apply.
        #[arg(long, value_name = "VERSION")]
        to: Option<String>,
    },
    /// Revert the newest applied migrations.
    Revert {
        #[command(flatten)]
        extent: ExtentArgs,
        /// Revert all after this version.
        #[arg(long, value_name = "VERSION", conflicts_with_all = ["n", "all"])]
        to: Option<String>,
    },
    /// Revert the newest applied migrations, then apply them again.
    Redo(ExtentArgs),
    /// Show applied and pending migrations. Only reads.
    Status,
    /// Show what `run` would apply. Only reads.
    Plan {
        /// The last version to apply.
        #[arg(long, value_name = "VERSION")]
        to: Option<String>,
        /// Print the SQL.
        #[arg(long)]
        sql: bool,
    },
    /// Compare the schema with the expected one. Only reads.
    Verify,
}

#[derive(Args)]
struct ExtentArgs {
    /// How many [default: 1].
    #[arg(short, value_name = "N", conflicts_with = "all")]
    n: Option<usize>,
    /// All migrations.
    #[arg(long)]
    all: bool,
    /// Don't ask before rows or values are lost.
    #[arg(long)]
    yes: bool,
}

impl ExtentArgs {
    fn extent(&self) -> Extent {
        if self.all {
            Extent::All
        } else {
            Extent::Last(self.n.unwrap_or(1))
        }
    }
}

/// Runs the command line of `program`. `runner` creates the configured runner for a database URL.
pub fn main(program: Program, runner: impl FnOnce(&str) -> Result<Runner, Error>) -> ExitCode {
    let command = Cli::command()
        .name(program.name)
        .version(program.version)
        .about(program.about)
        .after_help(EXIT_CODES);
    let matches = command.try_get_matches();
    let cli = match matches.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => return usage(&error).into(),
    };
    let json = cli.json;
    match execute(cli, runner) {
        Ok(code) => code.into(),
        Err(error) => {
            if json {
                say(json_of_error(&error));
            }
            tell(format!("error: {error}"));
            exit_code(&error).into()
        }
    }
}

fn usage(error: &clap::Error) -> u8 {
    if !error.use_stderr() {
        say(error.to_string().trim_end());
        return DONE;
    }
    // clap quotes arguments. One that may be a part of a URL is never printed.
    let is_word = |argument: String| {
        let mut letters = argument.chars();
        letters.all(|letter| letter.is_ascii_alphanumeric() || "-_.".contains(letter))
    };
    if env::args_os()
        .skip(1)
        .all(|argument| argument.into_string().is_ok_and(is_word))
    {
        tell(error.to_string().trim_end());
    } else {
        tell(format!("error: {}. See --help.", error.kind()));
    }
    USAGE
}

fn execute(cli: Cli, runner: impl FnOnce(&str) -> Result<Runner, Error>) -> Result<u8, Error> {
    let json = cli.json;
    let url = cli.database_url.or_else(|| env::var("DATABASE_URL").ok());
    let url = url
        .filter(|url| !url.is_empty())
        .ok_or(Error::Url("set DATABASE_URL or give --database-url"))?;
    let mut runner = runner(&url)?
        .connect_wait(Duration::from_secs(cli.wait))
        .lock_wait(Duration::from_secs(cli.lock_wait));
    if !json {
        runner = runner.on_event(progress());
    }
    match cli.command {
        Command::Run { to } => show_report(&runner.run_to(to.as_deref())?, json),
        Command::Revert { extent, to } => {
            let steps = to.map_or_else(|| extent.extent(), Extent::To);
            let report = runner.revert(&steps, |reversal| confirm(reversal, extent.yes))?;
            show_report(&report, json);
        }
        Command::Redo(extent) => {
            let confirm = |reversal: &Reversal| confirm(reversal, extent.yes);
            show_report(&runner.redo(&extent.extent(), confirm)?, json);
        }
        Command::Status => {
            let status = runner.status()?;
            show_status(&status, json);
            if status.pending().next().is_some() {
                return Ok(PENDING);
            }
        }
        Command::Plan { to, sql } => show_plan(runner.plan(to.as_deref())?, sql, json),
        Command::Verify => {
            let verification = runner.verify()?;
            show_verification(&verification, json);
            if !verification.differences.is_empty() {
                return Ok(DRIFT);
            }
        }
    }
    Ok(DONE)
}

fn show_report(report: &Report, json: bool) {
    if json {
        return say(json!(report));
    }
    if report.steps.is_empty() {
        say("Nothing to do.");
    }
    for note in &report.notes {
        say(format!("{}: {}.", note.title, note.items.join(", ")));
    }
    show_newer(&report.newer);
}

fn show_newer(newer: &[String]) {
    if !newer.is_empty() {
        tell(format!(
            "warning: the database has {}, which is newer than every migration of this program. A \
             newer release has migrated it.",
            newer.join(", ")
        ));
    }
}

fn show_status(status: &Status, json: bool) {
    let pending = status.pending().count();
    let refusal = status.refusal().map(|refusal| refusal.to_string());
    if json {
        let mut value = json!(status);
        value["pending"] = pending.into();
        value["refusal"] = json!(refusal);
        return say(value);
    }
    let known = status.migrations.iter().map(|one| {
        let word = one.applied_at.map_or("pending", |_| "applied");
        (word, one.applied_at, &one.name)
    });
    let unknown = status.unknown.iter();
    let unknown = unknown.map(|one| ("unknown", Some(one.applied_at), &one.version));
    for (word, at, name) in known.chain(unknown) {
        let at = at.map(|at| at.format("%F %T UTC").to_string());
        say(format!("{word}  {:23}  {name}", at.unwrap_or_default()));
    }
    if pending == 0 {
        say("Nothing is pending.");
    } else {
        say(format!("{pending} pending."));
    }
    match refusal {
        Some(refusal) => tell(format!("warning: run would refuse: {refusal}")),
        None => show_newer(&status.newer()),
    }
}

fn show_plan(mut plan: Vec<Planned>, sql: bool, json: bool) {
    if json {
        if !sql {
            plan.iter_mut().for_each(|planned| planned.sql.clear());
        }
        return say(json!(plan));
    }
    if plan.is_empty() {
        say("Nothing is pending.");
    }
    for planned in plan {
        // A comment, so that psql can run the output.
        say(format!("{}{}", if sql { "-- " } else { "" }, planned.name));
        if sql {
            say(planned.sql);
        }
    }
}

fn show_verification(verification: &Verification, json: bool) {
    if json {
        return say(json!(verification));
    }
    for difference in &verification.differences {
        say(difference);
    }
    let Verification {
        expected, found, ..
    } = verification;
    say(match verification.differences.len() {
        0 => format!("The schema is as expected (fingerprint {found})."),
        count => format!("Differences: {count} (fingerprint {found}, expected {expected})."),
    });
}

/// Shows what would be lost, and asks if there is a terminal.
fn confirm(reversal: &Reversal, yes: bool) -> bool {
    match &reversal.losses {
        None => tell(
            "A migration does not run in a transaction, so what would be lost can't be counted \
             beforehand.",
        ),
        Some(losses) if losses.is_empty() => return true,
        Some(losses) => {
            tell("This loses:");
            losses.iter().for_each(|loss| tell(format!("  {loss}")));
        }
    }
    if yes {
        return true;
    }
    if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        tell("There is no terminal to ask at. Add --yes to confirm.");
        return false;
    }
    let names = reversal.names.join(", ");
    let _ = write!(io::stderr(), "Reverting {names}. Type yes to confirm: ");
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).is_ok() && answer.trim() == "yes"
}

fn exit_code(error: &Error) -> u8 {
    match error {
        Error::Url(_) => USAGE,
        Error::LockBusy { .. } => LOCK_BUSY,
        Error::Refused(_) => REFUSED,
        Error::Connect(_) => NO_CONNECTION,
        _ => FAILED,
    }
}

fn json_of_error(error: &Error) -> Value {
    let mut value = json!({ "exit_code": exit_code(error), "message": error.to_string() });
    match error {
        Error::Failed(failure) => value["failure"] = json!(failure),
        Error::LockBusy { holder, .. } => value["holder"] = json!(holder),
        _ => {}
    }
    json!({ "error": value })
}

/// Returns a watcher that prints a line for each migration, and one every [`LIVE`] while it runs.
/// Its thread ends when the watcher is dropped.
fn progress() -> impl FnMut(Event<'_>) + Send + 'static {
    let (sender, running) = mpsc::channel();
    thread::spawn(move || {
        let mut now: Option<(String, Instant)> = None;
        loop {
            match (running.recv_timeout(LIVE), &now) {
                (Ok(next), _) => now = next,
                (Err(RecvTimeoutError::Disconnected), _) => return,
                (Err(RecvTimeoutError::Timeout), None) => {}
                (Err(RecvTimeoutError::Timeout), Some((what, begin))) => {
                    let seconds = begin.elapsed().as_secs();
                    tell(format!("{what}: running for {seconds} s"));
                }
            }
        }
    });
    move |event| match event {
        Event::Waiting(holder) => tell(format!("Waiting for another runner: {holder}.")),
        Event::Started(name, direction) => {
            let what = format!("{} {name}", direction.verb());
            let _ = sender.send(Some((what, Instant::now())));
        }
        Event::Finished(step) => {
            let _ = sender.send(None);
            let done = match step.direction {
                Direction::Up => "applied",
                Direction::Down => "reverted",
            };
            let milliseconds = step.duration.as_secs_f64() * 1e3;
            say(format!("{done:8}  {:42} {milliseconds:>9.1} ms", step.name));
        }
    }
}

/// Prints to standard output. Unlike `println!` it does not end the run if the reader has gone.
fn say(text: impl Display) {
    let _ = writeln!(io::stdout(), "{text}");
}

/// Prints to standard error.
fn tell(text: impl Display) {
    let _ = writeln!(io::stderr(), "{text}");
}
