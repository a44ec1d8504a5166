//! The command line: `run`, `revert`, `redo`, `status`, `plan`, `adopt`, `verify` and `grant`.
//! `--help` lists the exit codes.

use std::env;
use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::process::{self, ExitCode};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use serde_json::{Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::{
    Cause, Direction, Error, Event, Extent, Granted, Plan, Preflight, Refusal, Report, Reversal,
    Runner, Status, Verification,
};

const DONE: u8 = 0;
const FAILED: u8 = 1;
const USAGE: u8 = 2;
const PENDING: u8 = 3;
const LOCK_BUSY: u8 = 4;
const REFUSED: u8 = 5;
const NO_CONNECTION: u8 = 6;
const DRIFT: u8 = 7;
const TIMED_OUT: u8 = 8;

const EXIT_CODES: &str = "Exit codes: 0 done or current, 1 failed, 2 usage, 3 pending (status, \
    verify), 4 lock busy, 5 refused, 6 no connection, 7 drift (verify), 8 time limit (--timeout), \
    130 or 143 stopped by SIGINT or SIGTERM.";

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
    /// How long to retry while the server is starting, full or out of reach.
    #[arg(long, global = true, value_name = "SECS", default_value_t = 0)]
    wait: u64,
    /// How long to wait for another runner.
    #[arg(long, global = true, value_name = "SECS", default_value_t = 60)]
    lock_wait: u64,
    /// How long a migration waits for a busy table, unless it says so itself; at least 1.
    #[arg(long, global = true, value_name = "SECS", default_value_t = 5,
        value_parser = clap::value_parser!(u64).range(1..))]
    lock_timeout: u64,
    /// How often to try a migration that waits too long for a table.
    #[arg(long, global = true, value_name = "N", default_value_t = 5,
        value_parser = clap::value_parser!(u32).range(1..))]
    tries: u32,
    /// Bound of a whole run, revert or redo. At the bound the migration that runs is cancelled.
    #[arg(long, global = true, value_name = "SECS")]
    timeout: Option<u64>,
    /// Print one JSON document, also for an error.
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
    /// Write the rows that a lost __diesel_schema_migrations lacks, if the schema is that of a
    /// version.
    Adopt,
    /// Compare the schema and the rights with the expected ones. Only reads.
    Verify {
        /// A role that may have any right. Repeat it for more roles.
        #[arg(long, value_name = "ROLE")]
        trust: Vec<String>,
    },
    /// Give the program's roles their rights, and only these.
    Grant,
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

impl Command {
    fn name(&self) -> &'static str {
        match self {
            Self::Run { .. } => "run",
            Self::Revert { .. } => "revert",
            Self::Redo(_) => "redo",
            Self::Status => "status",
            Self::Plan { .. } => "plan",
            Self::Adopt => "adopt",
            Self::Verify { .. } => "verify",
            Self::Grant => "grant",
        }
    }
}

/// What a command returns.
enum Answer {
    Report(Report),
    Status(Status),
    Plan { plan: Plan, sql: bool },
    Adopted(Vec<String>),
    Verification(Verification),
    Granted(Granted),
}

impl Answer {
    fn show(self) {
        match self {
            Self::Report(report) => show_report(&report),
            Self::Status(status) => show_status(&status),
            Self::Plan { plan, sql } => show_plan(plan, sql),
            Self::Adopted(recorded) => show_adopted(&recorded),
            Self::Verification(verification) => show_verification(&verification),
            Self::Granted(granted) => show_granted(&granted),
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
    let code = match matches.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => run(cli, runner),
        Err(error) => usage(&error),
    };
    if let Err(error) = io::stdout().flush() {
        unwritten(&error);
    }
    match UNWRITTEN.get() {
        Some(error) => {
            tell(format!("error: can't write the output: {error}"));
            if code == DONE { FAILED } else { code }
        }
        None => code,
    }
    .into()
}

fn run(cli: Cli, runner: impl FnOnce(&str) -> Result<Runner, Error>) -> u8 {
    let (json, command) = (cli.json, cli.command.name());
    let signals = Signal::catch(json, command);
    let answer = execute(cli, &signals, runner);
    let code = match &answer {
        Ok(Answer::Status(status)) if status.pending().next().is_some() => PENDING,
        Ok(Answer::Plan { plan, .. }) if !plan.preflight.obstacles.is_empty() => REFUSED,
        Ok(Answer::Verification(found)) if found.has_drift() => DRIFT,
        Ok(Answer::Verification(found)) if !found.pending.is_empty() => PENDING,
        Ok(_) => DONE,
        Err(error) => signals.exit_code(error),
    };
    if json {
        say(of_answer(command, code, &answer));
    }
    match answer {
        Ok(answer) if !json => answer.show(),
        Ok(_) => {}
        Err(error) => {
            if let (false, Some(done)) = (json, error.done()) {
                show_notes(done);
            }
            tell(format!("error: {error}"));
        }
    }
    code
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
    let is_public = env::args_os()
        .skip(1)
        .all(|argument| argument.into_string().is_ok_and(is_word));
    let text = if is_public {
        error.to_string().trim_end().to_owned()
    } else {
        format!("error: {}. See --help.", error.kind())
    };
    if env::args_os().any(|argument| argument == "--json") {
        let message = text.trim_start_matches("error: ");
        say(of_error(None, USAGE, "usage", message));
    }
    tell(text);
    USAGE
}

fn execute(
    cli: Cli,
    signals: &Signal,
    runner: impl FnOnce(&str) -> Result<Runner, Error>,
) -> Result<Answer, Error> {
    let url = cli.database_url.or_else(|| env::var("DATABASE_URL").ok());
    let url = url
        .filter(|url| !url.is_empty())
        .ok_or(Error::Url("set DATABASE_URL or give --database-url"))?;
    let working = Arc::clone(&signals.working);
    let mut progress = (!cli.json).then(progress);
    let mut runner = runner(&url)?
        .connect_wait(Duration::from_secs(cli.wait))
        .lock_wait(Duration::from_secs(cli.lock_wait))
        .lock_timeout(Duration::from_secs(cli.lock_timeout))
        .tries(cli.tries)
        .stop_flag(Arc::clone(&signals.stop))
        .on_event(move |event| {
            if let Event::Started(..) = event {
                working.store(true, Ordering::Relaxed);
            }
            if let Some(progress) = &mut progress {
                progress(event);
            }
        });
    if let Some(timeout) = cli.timeout {
        runner = runner.timeout(Duration::from_secs(timeout));
    }
    Ok(match cli.command {
        Command::Run { to } => Answer::Report(runner.run_to(to.as_deref())?),
        Command::Revert { extent, to } => {
            let steps = to.map_or_else(|| extent.extent(), Extent::To);
            Answer::Report(runner.revert(&steps, |reversal| confirm(reversal, extent.yes))?)
        }
        Command::Redo(extent) => {
            let confirm = |reversal: &Reversal| confirm(reversal, extent.yes);
            Answer::Report(runner.redo(&extent.extent(), confirm)?)
        }
        Command::Status => Answer::Status(runner.status()?),
        Command::Plan { to, sql } => Answer::Plan {
            plan: runner.plan(to.as_deref())?,
            sql,
        },
        Command::Adopt => Answer::Adopted(runner.adopt()?),
        Command::Verify { trust } => {
            runner = trust.iter().fold(runner, |runner, role| runner.trust(role));
            Answer::Verification(runner.verify()?)
        }
        Command::Grant => Answer::Granted(runner.grant()?),
    })
}

/// SIGINT and SIGTERM. A handler of our own, because process 1 of a container has none.
struct Signal {
    /// A migration has started.
    working: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    /// 128 and the number of the signal.
    code: Arc<AtomicU8>,
}

impl Signal {
    /// Before the first migration a signal ends the process. Then the first one stops the run, and
    /// the second ends the process.
    fn catch(json: bool, command: &'static str) -> Self {
        let caught = Self {
            working: Arc::default(),
            stop: Arc::default(),
            code: Arc::new(AtomicU8::new(FAILED)),
        };
        let (working, stop) = (Arc::clone(&caught.working), Arc::clone(&caught.stop));
        let code = Arc::clone(&caught.code);
        match Signals::new([SIGINT, SIGTERM]) {
            Err(error) => tell(format!("warning: signals can't be caught: {error}")),
            Ok(mut signals) => drop(thread::spawn(move || {
                for signal in signals.forever() {
                    let number = if signal == SIGINT { 130 } else { 143 };
                    code.store(number, Ordering::Relaxed);
                    let working = working.load(Ordering::Relaxed);
                    if working && !stop.swap(true, Ordering::Relaxed) {
                        tell("Stopping. Another signal ends this program at once.");
                        continue;
                    }
                    let message = if working {
                        "ended by a second signal. The resulting state is unknown: look at the \
                         status before retrying."
                    } else {
                        "stopped by a signal. Nothing was changed."
                    };
                    if json {
                        say(of_error(Some(command), number, "stopped", message));
                    }
                    tell(format!("error: {message}"));
                    process::exit(number.into());
                }
            })),
        }
        caught
    }

    fn exit_code(&self, error: &Error) -> u8 {
        match error {
            Error::Url(_) => USAGE,
            Error::LockBusy { .. } => LOCK_BUSY,
            Error::Refused(_) => REFUSED,
            Error::Connect(_) => NO_CONNECTION,
            Error::Failed(failure) if failure.cause == Cause::Stopped => {
                self.code.load(Ordering::Relaxed)
            }
            Error::Failed(failure) if failure.cause == Cause::TimedOut => TIMED_OUT,
            _ => FAILED,
        }
    }
}

/// The document of `--json`: always these keys. `docs/json.md` describes it.
fn document(command: Option<&str>, code: u8) -> Value {
    json!({
        "command": command,
        "exit_code": code,
        "report": null,
        "status": null,
        "plan": null,
        "adopted": null,
        "verification": null,
        "granted": null,
        "error": null,
    })
}

fn of_answer(command: &str, code: u8, answer: &Result<Answer, Error>) -> Value {
    let mut document = match answer {
        Ok(_) => document(Some(command), code),
        Err(error) => of_error(Some(command), code, kind(error), &error.to_string()),
    };
    match answer {
        Ok(Answer::Report(report)) => document["report"] = json!(report),
        Ok(Answer::Status(status)) => {
            let mut value = json!(status);
            value["pending"] = status.pending().count().into();
            value["refusal"] = json!(status.refusal().map(|refusal| refusal.to_string()));
            document["status"] = value;
        }
        Ok(Answer::Plan { plan, sql }) => {
            let mut plan = plan.clone();
            if !sql {
                let planned = plan.migrations.iter_mut();
                planned.for_each(|planned| planned.sql.clear());
            }
            document["plan"] = json!(plan);
        }
        Ok(Answer::Adopted(recorded)) => document["adopted"] = json!(recorded),
        Ok(Answer::Verification(verification)) => document["verification"] = json!(verification),
        Ok(Answer::Granted(granted)) => document["granted"] = json!(granted),
        Err(error) => {
            document["report"] = json!(error.done());
            match error {
                Error::Failed(failure) => document["error"]["failure"] = json!(failure),
                Error::LockBusy { holder, .. } => document["error"]["holder"] = json!(holder),
                _ => {}
            }
        }
    }
    document
}

fn of_error(command: Option<&str>, code: u8, kind: &str, message: &str) -> Value {
    let mut document = document(command, code);
    document["error"] =
        json!({ "kind": kind, "message": message, "failure": null, "holder": null });
    document
}

fn show_report(report: &Report) {
    if report.steps.is_empty() {
        say("Nothing to do.");
    }
    show_notes(report);
    show_newer(&report.newer);
}

fn show_notes(report: &Report) {
    for note in &report.notes {
        say(note);
    }
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

fn show_status(status: &Status) {
    let pending = status.pending().count();
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
    match status.refusal() {
        Some(refusal) => tell(format!("warning: run would refuse: {refusal}")),
        None => show_newer(&status.newer()),
    }
}

fn show_plan(plan: Plan, sql: bool) {
    if plan.migrations.is_empty() {
        say("Nothing is pending.");
    }
    for planned in plan.migrations {
        // A comment, so that psql can run the output.
        say(format!("{}{}", if sql { "-- " } else { "" }, planned.name));
        if sql {
            say(planned.sql);
        }
    }
    let Preflight { notes, obstacles } = plan.preflight;
    // Beside SQL, the notes are no part of the output.
    let show = if sql { tell } else { say };
    notes.iter().for_each(|note| show(format!("\n{note}")));
    if !obstacles.is_empty() {
        tell(format!(
            "warning: run would refuse: {}",
            Refusal::Obstacles(obstacles)
        ));
    }
}

fn show_adopted(recorded: &[String]) {
    if recorded.is_empty() {
        say("Nothing to adopt.");
    }
    for name in recorded {
        say(format!("recorded  {name}"));
    }
}

fn show_verification(verification: &Verification) {
    let Verification {
        version,
        pending,
        missing,
        changed,
        extra,
        rights,
        lacking,
        fingerprint,
    } = verification;
    show_group("Missing", missing);
    show_group("Changed", changed);
    show_group(
        "Rights that are not intended (--trust accepts a role)",
        rights,
    );
    show_group("Extra, no drift", extra);
    show_group("Not granted, no drift (`grant` gives it)", lacking);
    say(match version {
        None if !verification.has_drift() => "Nothing is applied, and nothing is expected.".into(),
        _ => {
            let version = version.as_deref().unwrap_or("an empty schema");
            let is = if verification.has_drift() {
                "differs from the expected one"
            } else {
                "is as expected"
            };
            format!("The schema {is} at {version} (fingerprint {fingerprint}).")
        }
    });
    if !pending.is_empty() {
        say(format!("Pending: {}.", pending.join(", ")));
    }
}

fn show_group(title: &str, items: &[impl Display]) {
    if !items.is_empty() {
        say(format!("{title}:"));
        for item in items {
            say(format!("  {}", item.to_string().replace('\n', "\n  ")));
        }
    }
}

fn show_granted(granted: &Granted) {
    for role in &granted.roles {
        say(format!("granted   {role}"));
    }
    for role in &granted.missing {
        say(format!(
            "missing   {role}: create the role, then grant again"
        ));
    }
    if !granted.newer.is_empty() {
        say("Nothing was granted.");
    }
    show_newer(&granted.newer);
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

fn kind(error: &Error) -> &'static str {
    match error {
        Error::Url(_) => "usage",
        Error::Connect(_) => "no_connection",
        Error::LockBusy { .. } => "lock_busy",
        Error::Refused(_) => "refused",
        Error::Failed(failure) => match failure.cause {
            Cause::Stopped => "stopped",
            Cause::TimedOut => "timed_out",
            Cause::Error | Cause::LockTimeout => "failed",
        },
        Error::LockLost { .. } => "lock_lost",
        Error::Database { .. } => "database",
        Error::Source(_) => "source",
        Error::Grant(_) => "grant",
    }
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
        Event::Lifted(settings) => tell(format!(
            "These settings don't apply to the run: {}.",
            settings.join(", ")
        )),
        Event::Blocked(name, blockers) => {
            let blockers: Vec<String> = blockers.iter().map(ToString::to_string).collect();
            tell(format!("{name} waits for {}.", blockers.join("; ")));
        }
        Event::Retrying(name, pause) => tell(format!(
            "{name} waited too long for a lock and was rolled back. Next try in {} s.",
            pause.as_secs()
        )),
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

/// The first error of standard output.
static UNWRITTEN: OnceLock<String> = OnceLock::new();

/// Prints to standard output. Unlike `println!` it does not end the run.
fn say(text: impl Display) {
    if let Err(error) = writeln!(io::stdout(), "{text}") {
        unwritten(&error);
    }
}

/// A reader that has gone, such as `head`, wants no more: that is no error.
fn unwritten(error: &io::Error) {
    if error.kind() != io::ErrorKind::BrokenPipe {
        UNWRITTEN.get_or_init(|| error.to_string());
    }
}

/// Prints to standard error.
fn tell(text: impl Display) {
    let _ = writeln!(io::stderr(), "{text}");
}
