//! `bruhmcp-db`: the migration runner from a shell.
//!
//! Exit codes: 0 done or current, 1 failed, 2 usage, 3 pending (`status`), 4 lock busy, 5 refused, 6 no connection,
//! 7 drift (`verify`).

use std::env;
use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use bruhmcp_db::migrations::{
    Direction, Error, Event, Extent, Planned, Report, Reversal, Runner, Status, Verification,
};
use clap::{Args, Parser, Subcommand};
use serde_json::{Value, json};

const DONE: u8 = 0;
const FAILED: u8 = 1;
const USAGE: u8 = 2;
const PENDING: u8 = 3;
const LOCK_BUSY: u8 = 4;
const REFUSED: u8 = 5;
const NO_CONNECTION: u8 = 6;
const DRIFT: u8 = 7;

/// How often a long migration is said to be running still.
const LIVE: Duration = Duration::from_secs(2);

/// Applies, reverts and checks the migrations of BruhMCP's database.
///
/// Exit codes: 0 done or current, 1 failed, 2 usage, 3 pending (status), 4 lock busy, 5 refused, 6 no connection,
/// 7 drift (verify).
#[derive(Parser)]
#[command(name = "bruhmcp-db", version)]
struct Cli {
    /// postgresql://…; without it DATABASE_URL, which other users of the machine can't see.
    #[arg(long, global = true, value_name = "URL")]
    database_url: Option<String>,
    /// How long to try while the server is out of reach or starting.
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
    /// Apply what is pending.
    Run {
        /// The last version to apply.
        #[arg(long, value_name = "VERSION")]
        to: Option<String>,
    },
    /// Revert what was applied last.
    Revert {
        #[command(flatten)]
        extent: ExtentArgs,
        /// Revert all after this version.
        #[arg(long, value_name = "VERSION", conflicts_with_all = ["n", "all"])]
        to: Option<String>,
    },
    /// Revert what was applied last, and apply it again.
    Redo(ExtentArgs),
    /// Say what is applied, since when, and what is pending. Only reads.
    Status,
    /// Say what `run` would apply. Only reads.
    Plan {
        /// The last version to apply.
        #[arg(long, value_name = "VERSION")]
        to: Option<String>,
        /// Print the SQL.
        #[arg(long)]
        sql: bool,
    },
    /// Compare the live schema with what this program expects. Only reads.
    Verify,
}

#[derive(Args)]
struct ExtentArgs {
    /// How many; 1 if it isn't said.
    #[arg(short, value_name = "N", conflicts_with = "all")]
    n: Option<usize>,
    /// All of them.
    #[arg(long)]
    all: bool,
    /// Don't ask, though rows are lost.
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

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let text = error.to_string();
            if !error.use_stderr() {
                say(text);
                return DONE.into();
            }
            // A URL in the wrong place would be quoted, password and all.
            tell(if text.contains("://") {
                "error: the arguments can't be read; a URL follows --database-url. See --help."
            } else {
                text.trim_end()
            });
            return USAGE.into();
        }
    };
    let json = cli.json;
    match execute(cli) {
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

fn execute(cli: Cli) -> Result<u8, Error> {
    let json = cli.json;
    let url = cli.database_url.or_else(|| env::var("DATABASE_URL").ok());
    let url = url
        .filter(|url| !url.is_empty())
        .ok_or(Error::Url("neither --database-url nor DATABASE_URL is set"))?;
    let mut runner = Runner::new(&url)?
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
    if !report.archived.is_empty() {
        let archived = report.archived.join(", ");
        say(format!("Moved to the schema bruhmcp_archive: {archived}."));
    }
    show_newer(&report.newer);
}

fn show_newer(newer: &[String]) {
    if !newer.is_empty() {
        tell(format!(
            "warning: the database has {}, newer than all that this program knows; a newer program has been here.",
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
        // With the SQL, a comment: the whole can be read by psql.
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

/// Says on standard error what would be lost, and asks at a terminal.
fn confirm(reversal: &Reversal, yes: bool) -> bool {
    match &reversal.losses {
        None => tell(
            "A migration among them runs outside a transaction: what will be lost can't be told beforehand.",
        ),
        Some(losses) if losses.is_empty() => return true,
        Some(losses) => {
            tell("Rows that will be lost:");
            losses.iter().for_each(|loss| tell(format!("  {loss}")));
        }
    }
    if yes {
        return true;
    }
    if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        tell("No terminal to ask at: --yes is needed.");
        return false;
    }
    let names = reversal.names.join(", ");
    let _ = write!(io::stderr(), "Reverting {names}. Type yes to go on: ");
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

/// A line for each migration, and one from time to time while it runs, by a thread that ends with what is returned.
fn progress() -> impl FnMut(Event<'_>) + 'static {
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
        _ => {}
    }
}

/// To standard output. A reader that has gone away must not end a run halfway, as `println!` would.
fn say(text: impl Display) {
    let _ = writeln!(io::stdout(), "{text}");
}

/// To standard error, likewise.
fn tell(text: impl Display) {
    let _ = writeln!(io::stderr(), "{text}");
}
