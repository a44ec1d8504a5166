//! `bruhmcp-db`: the migration runner from a shell.
//!
//! Exit codes: 0 done or current, 1 failed, 2 usage, 3 pending (`status`), 4 lock busy, 5 refused, 6 no connection,
//! 7 drift (`verify`).

use std::env;
use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bruhmcp_db::migrations::{
    Difference, Direction, Error, Event, Extent, Report, Reversal, Runner, Status, Step,
};
use clap::{Args, Parser, Subcommand};
use serde_json::{Value, json};

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
        /// Don't ask, though rows are lost.
        #[arg(long)]
        yes: bool,
    },
    /// Revert what was applied last, and apply it again.
    Redo {
        #[command(flatten)]
        extent: ExtentArgs,
        /// Don't ask, though rows are lost.
        #[arg(long)]
        yes: bool,
    },
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
        Err(error) if !error.use_stderr() => {
            say(error);
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            let text = error.to_string();
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
    let Some(url) = cli
        .database_url
        .or_else(|| env::var("DATABASE_URL").ok())
        .filter(|url| !url.is_empty())
    else {
        return Err(Error::Url("neither --database-url nor DATABASE_URL is set"));
    };
    let mut runner = Runner::new(&url)?
        .connect_wait(Duration::from_secs(cli.wait))
        .lock_wait(Duration::from_secs(cli.lock_wait));
    if !json {
        let mut progress = Progress::default();
        runner = runner.on_event(move |event| progress.show(&event));
    }
    match cli.command {
        Command::Run { to } => {
            let report = runner.run_to(to.as_deref())?;
            Ok(show_report(&report, None, json))
        }
        Command::Revert { extent, to, yes } => {
            let extent = to.map_or_else(|| extent.extent(), Extent::To);
            let mut asked = None;
            let report = runner.revert(&extent, |reversal| {
                confirm(asked.insert(reversal.clone()), yes)
            })?;
            Ok(show_report(&report, asked.as_ref(), json))
        }
        Command::Redo { extent, yes } => {
            let mut asked = None;
            let report = runner.redo(&extent.extent(), |reversal| {
                confirm(asked.insert(reversal.clone()), yes)
            })?;
            Ok(show_report(&report, asked.as_ref(), json))
        }
        Command::Status => Ok(show_status(&runner.status()?, json)),
        Command::Plan { to, sql } => {
            let planned = runner.plan(to.as_deref())?;
            if json {
                let planned = planned.iter().map(|planned| {
                    let mut value = json!({ "version": planned.version, "name": planned.name });
                    if sql {
                        value["sql"] = planned.sql.as_str().into();
                    }
                    value
                });
                say(Value::Array(planned.collect()));
            } else if planned.is_empty() {
                say("Nothing is pending.");
            } else {
                for planned in planned {
                    // With --sql, a comment: the whole can be read by psql.
                    say(format!("{}{}", if sql { "-- " } else { "" }, planned.name));
                    if sql {
                        say(planned.sql);
                    }
                }
            }
            Ok(0)
        }
        Command::Verify => {
            let verification = runner.verify()?;
            let drift = !verification.differences.is_empty();
            if json {
                say(json!(verification));
            } else if drift {
                for difference in &verification.differences {
                    say(difference);
                }
                let missing = verification
                    .differences
                    .iter()
                    .filter(|one| matches!(one, Difference::Missing(_)))
                    .count();
                let unexpected = verification.differences.len() - missing;
                say(format!(
                    "The schema differs: {missing} missing, {unexpected} unexpected (fingerprint {}, expected {}).",
                    verification.found, verification.expected
                ));
            } else {
                say(format!(
                    "The schema is as expected (fingerprint {}).",
                    verification.found
                ));
            }
            Ok(if drift { DRIFT } else { 0 })
        }
    }
}

fn show_report(report: &Report, reversal: Option<&Reversal>, json: bool) -> u8 {
    if json {
        let mut value = json!(report);
        if let Some(reversal) = reversal {
            value["lost"] = json!(reversal.losses);
        }
        say(value);
        return 0;
    }
    if report.steps.is_empty() {
        say("Nothing to do.");
    }
    if !report.archived.is_empty() {
        say(format!(
            "Moved to the schema bruhmcp_archive: {}.",
            report.archived.join(", ")
        ));
    }
    show_newer(&report.newer);
    0
}

fn show_newer(newer: &[String]) {
    if !newer.is_empty() {
        tell(format!(
            "warning: the database has {}, newer than all that this program knows; a newer program has been here.",
            newer.join(", ")
        ));
    }
}

fn show_status(status: &Status, json: bool) -> u8 {
    let pending = status.pending().count();
    let refusal = status.refusal().map(|refusal| refusal.to_string());
    if json {
        let mut value = json!(status);
        value["pending"] = pending.into();
        value["refusal"] = json!(refusal);
        say(value);
    } else {
        for migration in &status.migrations {
            match migration.applied_at {
                Some(at) => say(format!(
                    "applied  {}  {}",
                    at.format("%F %T UTC"),
                    migration.name
                )),
                None => say(format!("pending  {:23}  {}", "", migration.name)),
            }
        }
        for unknown in &status.unknown {
            say(format!(
                "unknown  {}  {}",
                unknown.applied_at.format("%F %T UTC"),
                unknown.version
            ));
        }
        say(match pending {
            0 => "Nothing is pending.".to_owned(),
            _ => format!("{pending} pending."),
        });
        if let Some(refusal) = refusal {
            tell(format!("warning: run would refuse: {refusal}"));
        } else {
            show_newer(&status.newer());
        }
    }
    if pending == 0 { 0 } else { PENDING }
}

/// Says on standard error what would be lost, and asks at a terminal.
fn confirm(reversal: &Reversal, yes: bool) -> bool {
    match reversal.losses.as_deref() {
        Some([]) => return true,
        Some(losses) => {
            tell("Rows that will be lost:");
            for loss in losses {
                tell(format!("  {loss}"));
            }
        }
        None => tell(
            "A migration among them runs outside a transaction: what will be lost can't be told beforehand.",
        ),
    }
    if yes {
        return true;
    }
    if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        tell("No terminal to ask at: --yes is needed.");
        return false;
    }
    let _ = write!(
        io::stderr(),
        "Reverting {}. Type yes to go on: ",
        reversal.names.join(", ")
    );
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

/// A line for each migration, and one from time to time while it runs.
#[derive(Default)]
struct Progress(Option<(Sender<()>, JoinHandle<()>)>);

impl Progress {
    fn show(&mut self, event: &Event<'_>) {
        match event {
            Event::Waiting(holder) => tell(format!("Waiting for another runner: {holder}.")),
            Event::Started(name, direction) => self.start(format!("{} {name}", verb(*direction))),
            Event::Finished(step) => {
                self.stop();
                let Step {
                    name,
                    direction,
                    duration,
                    ..
                } = step;
                say(format!(
                    "{:8}  {name:42} {:>9.1} ms",
                    if *direction == Direction::Up {
                        "applied"
                    } else {
                        "reverted"
                    },
                    duration.as_secs_f64() * 1e3
                ));
            }
            _ => {}
        }
    }

    fn start(&mut self, what: String) {
        let (sender, stopped) = mpsc::channel();
        let thread = thread::spawn(move || {
            let begin = Instant::now();
            while stopped.recv_timeout(LIVE) == Err(RecvTimeoutError::Timeout) {
                tell(format!(
                    "{what}: running for {} s",
                    begin.elapsed().as_secs()
                ));
            }
        });
        self.0 = Some((sender, thread));
    }

    fn stop(&mut self) {
        if let Some((sender, thread)) = self.0.take() {
            drop(sender);
            // It only prints.
            let _ = thread.join();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.stop();
    }
}

fn verb(direction: Direction) -> &'static str {
    match direction {
        Direction::Up => "applying",
        Direction::Down => "reverting",
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
