//! The command line: `run`, `revert`, `redo`, `status`, `plan`, `adopt`, `verify`, `grant` and
//! `maintain`; `completions` and `man` for an installation.
//!
//! `--help` lists the exit codes. Without `--database-url` and the variable `DATABASE_URL`, the URL
//! is that of the file `.env`, as for the Diesel CLI.

use std::collections::{BTreeMap, BTreeSet};
use std::env::{self, VarError};
use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use std::{fs, thread};

use anstream::stream::RawStream;
use anstream::{AutoStream, ColorChoice};
use clap::builder::styling::{AnsiColor, Style};
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use diesel::pg::PgConnection;
use serde_json::{Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::error::quoted;
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

/// What to do where there is no connection.
const REACH: &str = "Look at the server, and at the URL: --database-url, DATABASE_URL or .env. The \
    database must exist (CREATE DATABASE). --wait SECS tries again while the server starts.";

/// The time between two lines about a migration that is still running.
const LINE_INTERVAL: Duration = Duration::from_secs(2);

/// What `--help` and `--version` say about a program. `version` may name that of the schema too.
#[expect(missing_docs, reason = "the names say it")]
#[derive(Debug, Clone)]
pub struct Program {
    pub name: &'static str,
    pub version: String,
    pub about: &'static str,
}

#[derive(Parser)]
struct Cli {
    /// postgresql:// URL or key=value pairs. Default: the variable DATABASE_URL, which other users
    /// of the machine can't see, then that of the file .env.
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
    /// The schema of the tables, whatever the search_path of the role is. Repeat it for more
    /// schemas. Default: public.
    #[arg(long, global = true, value_name = "NAME")]
    schema: Vec<String>,
    /// Of several schemas, leave those that follow a failed one as they are.
    #[arg(long, global = true)]
    fail_fast: bool,
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
        #[command(flatten)]
        schemas: SchemasArg,
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
    Status(SchemasArg),
    /// Show what `run` would apply. Only reads.
    Plan {
        /// The last version to apply.
        #[arg(long, value_name = "VERSION")]
        to: Option<String>,
        /// Print the SQL.
        #[arg(long)]
        sql: bool,
        #[command(flatten)]
        schemas: SchemasArg,
    },
    /// Write the rows that a lost __diesel_schema_migrations lacks, if the schema is that of a
    /// version.
    Adopt,
    /// Compare the schema and the rights with the expected ones. Only reads.
    Verify {
        /// A role that may have any right. Repeat it for more roles.
        #[arg(long, value_name = "ROLE")]
        trust: Vec<String>,
        #[command(flatten)]
        schemas: SchemasArg,
    },
    /// Give the program's roles their rights, and only these.
    Grant(SchemasArg),
    /// Do the regular maintenance: call it once a day.
    Maintain(SchemasArg),
    /// Print the completions of a shell.
    Completions {
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Write the man pages, one for each command.
    Man {
        /// The folder; it is created if it does not exist.
        folder: PathBuf,
    },
}

#[derive(Args)]
struct SchemasArg {
    /// Every schema that has a migration of this program in its __diesel_schema_migrations.
    #[arg(long, conflicts_with = "schema")]
    all: bool,
}

#[derive(Args)]
struct ExtentArgs {
    /// How many [default: 1].
    #[arg(short, value_name = "N", conflicts_with = "all")]
    n: Option<usize>,
    /// All migrations, of the named schemas.
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
            Self::Status(_) => "status",
            Self::Plan { .. } => "plan",
            Self::Adopt => "adopt",
            Self::Verify { .. } => "verify",
            Self::Grant(_) => "grant",
            Self::Maintain(_) => "maintain",
            Self::Completions { .. } => "completions",
            Self::Man { .. } => "man",
        }
    }

    /// Whether it is about every schema.
    fn is_of_all(&self) -> bool {
        match self {
            Self::Run { schemas, .. }
            | Self::Status(schemas)
            | Self::Plan { schemas, .. }
            | Self::Verify { schemas, .. }
            | Self::Grant(schemas)
            | Self::Maintain(schemas) => schemas.all,
            Self::Revert { .. }
            | Self::Redo(_)
            | Self::Adopt
            | Self::Completions { .. }
            | Self::Man { .. } => false,
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
    Maintained(BTreeMap<String, i64>),
}

impl Answer {
    fn show(self, out: &Output) {
        match self {
            Self::Report(report) => show_report(out, &report),
            Self::Status(status) => show_status(out, &status),
            Self::Plan { plan, sql } => show_plan(out, plan, sql),
            Self::Adopted(recorded) => show_adopted(out, &recorded),
            Self::Verification(verification) => show_verification(out, &verification),
            Self::Granted(granted) => show_granted(out, &granted),
            Self::Maintained(numbers) => {
                for (what, number) in numbers {
                    out.say(format!("{what:<9} {number}"));
                }
            }
        }
    }
}

/// Prints about one schema. If it was named, each line begins with its name.
#[derive(Clone)]
struct Output {
    schema: Option<String>,
}

impl Output {
    fn say(&self, text: impl Display) {
        say(self.of_schema(painted(&text, &io::stdout())));
    }

    fn tell(&self, text: impl Display) {
        tell(self.of_schema(painted(&text, &io::stderr())));
    }

    fn of_schema(&self, text: impl Display) -> String {
        let text = text.to_string();
        match &self.schema {
            None => text,
            Some(schema) => {
                // A line of its own would not be a comment in the SQL of a plan.
                let schema = schema.replace(char::is_control, "?");
                let lines = text.split('\n').map(|line| format!("{schema}: {line}"));
                lines.collect::<Vec<_>>().join("\n")
            }
        }
    }
}

/// A subcommand that the program has beside those of this module.
pub struct Extra {
    /// Its name and arguments. It has `--database-url`, `--wait`, `--schema` and `--json` too.
    pub command: clap::Command,
    /// Does the work.
    pub run: fn(&Call<'_>) -> Result<Done, Undone>,
}

/// A call of an [`Extra`].
pub struct Call<'a> {
    runner: Runner,
    /// The arguments.
    pub matches: &'a ArgMatches,
    /// Whether `--json` was given: then only the document is printed.
    pub json: bool,
}

impl Call<'_> {
    /// Connects; `--schema` is the `search_path` of the session.
    ///
    /// # Errors
    /// [`Error::Connect`] and [`Error::Database`], as what is printed.
    pub fn connect(&self) -> Result<PgConnection, Undone> {
        self.runner.session().map_err(Undone::from)
    }
}

/// What an [`Extra`] has done.
pub struct Done {
    /// Exit code.
    pub code: u8,
    /// Printed without `--json`.
    pub text: String,
    /// `result` of the document with `--json`.
    pub result: Value,
}

/// Why an [`Extra`] failed.
pub struct Undone {
    /// Exit code.
    pub code: u8,
    /// `error.kind` of the document.
    pub kind: &'static str,
    /// What happened, and what to do next.
    pub message: String,
}

impl From<Error> for Undone {
    fn from(error: Error) -> Self {
        let code = match error {
            Error::Url(_) => USAGE,
            Error::Connect(_) => NO_CONNECTION,
            _ => FAILED,
        };
        Self {
            code,
            kind: kind(&error),
            message: error.to_string(),
        }
    }
}

/// Runs the command line of `program`. `runner` creates the configured runner for a database URL.
pub fn main(
    program: Program,
    runner: impl Fn(&str) -> Result<Runner, Error>,
    extras: &[Extra],
) -> ExitCode {
    let command = Cli::command()
        .name(program.name)
        .version(program.version)
        .about(program.about)
        .after_help(EXIT_CODES)
        .subcommands(extras.iter().map(|extra| extra.command.clone()));
    let code = match command.clone().try_get_matches() {
        Ok(matches) => match extra(&matches, extras) {
            Some((extra, matches)) => run_extra(extra, matches, runner),
            None => match Cli::from_arg_matches(&matches) {
                Ok(Cli {
                    command: Command::Completions { shell },
                    ..
                }) => completions(command, shell),
                Ok(Cli {
                    command: Command::Man { folder },
                    ..
                }) => man(command, &folder),
                Ok(cli) => run(cli, runner),
                Err(error) => usage(&error),
            },
        },
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

fn extra<'a>(matches: &'a ArgMatches, extras: &'a [Extra]) -> Option<(&'a Extra, &'a ArgMatches)> {
    let (name, matches) = matches.subcommand()?;
    let extra = extras
        .iter()
        .find(|extra| extra.command.get_name() == name)?;
    Some((extra, matches))
}

fn run_extra(
    extra: &Extra,
    matches: &ArgMatches,
    runner: impl Fn(&str) -> Result<Runner, Error>,
) -> u8 {
    let command = extra.command.get_name();
    let json = matches.get_flag("json");
    let schemas: Vec<&String> = matches.get_many("schema").unwrap_or_default().collect();
    let call = || {
        let url = url(matches.get_one::<String>("database_url").cloned())?;
        let wait = matches.get_one::<u64>("wait").copied().unwrap_or_default();
        let mut runner = runner(&url)?.connect_wait(Duration::from_secs(wait));
        match schemas[..] {
            [] => {}
            [schema] => runner = runner.schema(schema),
            _ => return Err(Error::Url("give one --schema")),
        }
        (extra.run)(&Call {
            runner,
            matches,
            json,
        })
        .map_or_else(|undone| Ok(Err(undone)), |done| Ok(Ok(done)))
    };
    let outcome = call().unwrap_or_else(|error: Error| Err(error.into()));
    match outcome {
        Ok(done) => {
            if json {
                let mut document = document(Some(command), done.code);
                document["result"] = done.result;
                say(document);
            } else {
                say(done.text);
            }
            done.code
        }
        Err(undone) => {
            if json {
                say(of_error(
                    Some(command),
                    undone.code,
                    undone.kind,
                    &undone.message,
                ));
            }
            tell(format!("error: {}", undone.message));
            undone.code
        }
    }
}

fn completions(mut command: clap::Command, shell: clap_complete::Shell) -> u8 {
    // To a buffer: it panics where it can't write.
    let mut script = Vec::new();
    let name = command.get_name().to_owned();
    clap_complete::generate(shell, &mut command, name, &mut script);
    say(String::from_utf8_lossy(&script).trim_end());
    DONE
}

fn man(command: clap::Command, folder: &Path) -> u8 {
    match fs::create_dir_all(folder).and_then(|()| clap_mangen::generate_to(command, folder)) {
        Ok(()) => DONE,
        Err(error) => {
            tell(format!(
                "error: can't write the man pages to {}: {error}",
                folder.display()
            ));
            FAILED
        }
    }
}

fn run(cli: Cli, runner: impl Fn(&str) -> Result<Runner, Error>) -> u8 {
    let (json, command) = (cli.json, cli.command.name());
    let signals = Signal::catch(json, command);
    let begin = Instant::now();
    let are_named = !cli.schema.is_empty() || cli.command.is_of_all();
    let schemas = match schemas(&cli, &runner) {
        Ok(schemas) => schemas,
        Err(error) => {
            let code = signals.exit_code(&error);
            tell(format!("error: {error}"));
            if let Error::Connect(_) = error {
                tell(REACH);
            }
            if json {
                say(of_answer(command, code, &Err(error)));
            }
            return code;
        }
    };
    let mut worst = DONE;
    let mut documents = Vec::new();
    let mut left = schemas.into_iter();
    for schema in left.by_ref() {
        let out = Output { schema };
        let answer = execute(&cli, &out, &signals, begin, &runner);
        let code = signals.exit_code_of(&answer);
        worst = worse(worst, code);
        if json {
            documents.push((out.schema.clone(), of_answer(command, code, &answer)));
        }
        let failed = answer.is_err();
        match answer {
            Ok(answer) if !json => answer.show(&out),
            Ok(_) => {}
            Err(error) => {
                if let (false, Some(done)) = (json, error.done()) {
                    show_notes(&out, done);
                }
                out.tell(format!("error: {error}"));
                if let Error::Connect(_) = error {
                    out.tell(REACH);
                }
            }
        }
        if (failed && cli.fail_fast) || signals.stop.load(Ordering::Relaxed) {
            break;
        }
        // A signal can't say any more that nothing was changed.
        signals.working.store(true, Ordering::Relaxed);
    }
    for schema in left {
        let out = Output { schema };
        out.tell("not tried.");
        if signals.stop.load(Ordering::Relaxed) {
            worst = signals.code.load(Ordering::Relaxed);
        }
        let mut untried = document(Some(command), DONE);
        untried["exit_code"] = Value::Null;
        documents.push((out.schema, untried));
    }
    if json {
        if are_named {
            say(of_schemas(command, worst, documents));
        } else {
            documents.iter().for_each(|(_, document)| say(document));
        }
    }
    worst
}

/// Returns the schemas that the command is about: `None` is the program's own.
fn schemas(
    cli: &Cli,
    runner: impl Fn(&str) -> Result<Runner, Error>,
) -> Result<Vec<Option<String>>, Error> {
    let mut names = cli.schema.clone();
    if cli.command.is_of_all() {
        let runner = runner(&url(cli.database_url.clone())?)?;
        names = runner
            .connect_wait(Duration::from_secs(cli.wait))
            .schemas()?;
    }
    let mut seen = BTreeSet::new();
    names.retain(|name| seen.insert(name.clone()));
    if names.is_empty() {
        return Ok(vec![None]);
    }
    Ok(names.into_iter().map(Some).collect())
}

/// Returns the exit code that says more about what is left to do.
fn worse(one: u8, other: u8) -> u8 {
    const ORDER: [u8; 8] = [
        DONE,
        PENDING,
        DRIFT,
        LOCK_BUSY,
        REFUSED,
        NO_CONNECTION,
        TIMED_OUT,
        FAILED,
    ];
    let rank = |code: u8| {
        ORDER
            .iter()
            .position(|one| *one == code)
            .unwrap_or(ORDER.len())
    };
    if rank(other) > rank(one) { other } else { one }
}

fn usage(error: &clap::Error) -> u8 {
    if !error.use_stderr() {
        say(rendered(error, &io::stdout()).trim_end());
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
    let hidden = format!("error: {}. See --help.", error.kind());
    if env::args_os().any(|argument| argument == "--json") {
        let text = if is_public {
            &error.to_string()
        } else {
            &hidden
        };
        let message = text.trim_end().trim_start_matches("error: ");
        say(of_error(None, USAGE, "usage", message));
    }
    if is_public {
        tell(rendered(error, &io::stderr()).trim_end());
    } else {
        tell(hidden);
    }
    USAGE
}

fn url(given: Option<String>) -> Result<String, Error> {
    let url = match given {
        Some(url) => Some(url),
        None => match env::var("DATABASE_URL") {
            Err(VarError::NotPresent) => url_of_file()?,
            url => url.ok(),
        },
    };
    url.filter(|url| !url.is_empty()).ok_or(Error::Url(
        "set DATABASE_URL, also in the file .env, or give --database-url",
    ))
}

/// Returns the `DATABASE_URL` of the file `.env` in this folder or the nearest one above. The
/// environment stays as it is.
fn url_of_file() -> Result<Option<String>, Error> {
    // Neither text quotes the file, as the errors do.
    let lines = match dotenvy::dotenv_iter() {
        Ok(lines) => lines,
        Err(error) if error.not_found() => return Ok(None),
        Err(_) => return Err(Error::Url("the file .env can't be opened")),
    };
    for line in lines {
        match line {
            Ok((name, url)) if name == "DATABASE_URL" => return Ok(Some(url)),
            Ok(_) => {}
            Err(_) => return Err(Error::Url("the file .env has a line that can't be read")),
        }
    }
    Ok(None)
}

/// Does the work in one schema. The time limit counts from `begin`.
fn execute(
    cli: &Cli,
    out: &Output,
    signals: &Signal,
    begin: Instant,
    runner: impl Fn(&str) -> Result<Runner, Error>,
) -> Result<Answer, Error> {
    let working = Arc::clone(&signals.working);
    let mut progress = (!cli.json).then(|| progress(out.clone()));
    let mut runner = runner(&url(cli.database_url.clone())?)?
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
    if let Some(schema) = &out.schema {
        runner = runner.schema(schema);
    }
    if let Some(timeout) = cli.timeout {
        runner = runner.timeout(Duration::from_secs(timeout).saturating_sub(begin.elapsed()));
    }
    let confirm = |reversal: &Reversal, yes| confirm(out, reversal, yes);
    Ok(match &cli.command {
        Command::Run { to, .. } => Answer::Report(runner.run_to(to.as_deref())?),
        Command::Revert { extent, to } => {
            let steps = to.clone().map_or_else(|| extent.extent(), Extent::To);
            Answer::Report(runner.revert(&steps, |reversal| confirm(reversal, extent.yes))?)
        }
        Command::Redo(extent) => {
            Answer::Report(runner.redo(&extent.extent(), |reversal| confirm(reversal, extent.yes))?)
        }
        Command::Status(_) => Answer::Status(runner.status()?),
        Command::Plan { to, sql, .. } => Answer::Plan {
            plan: runner.plan(to.as_deref())?,
            sql: *sql,
        },
        Command::Adopt => Answer::Adopted(runner.adopt()?),
        Command::Verify { trust, .. } => {
            runner = trust.iter().fold(runner, |runner, role| runner.trust(role));
            Answer::Verification(runner.verify()?)
        }
        Command::Grant(_) => Answer::Granted(runner.grant()?),
        Command::Maintain(_) => Answer::Maintained(runner.maintain()?),
        // They need no database: `main` has done them.
        Command::Completions { .. } | Command::Man { .. } => Answer::Report(Report::default()),
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

    fn exit_code_of(&self, answer: &Result<Answer, Error>) -> u8 {
        match answer {
            Ok(Answer::Status(status)) if status.pending().next().is_some() => PENDING,
            Ok(Answer::Plan { plan, .. }) if !plan.preflight.obstacles.is_empty() => REFUSED,
            Ok(Answer::Verification(found)) if found.has_drift() => DRIFT,
            Ok(Answer::Verification(found)) if !found.pending.is_empty() => PENDING,
            Ok(_) => DONE,
            Err(error) => self.exit_code(error),
        }
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
        "maintained": null,
        "result": null,
        "error": null,
        "schemas": null,
    })
}

/// The document about named schemas: an item for each, with the keys of a document of its own.
fn of_schemas(command: &str, code: u8, documents: Vec<(Option<String>, Value)>) -> Value {
    let items = documents.into_iter().map(|(schema, mut item)| {
        if let Some(item) = item.as_object_mut() {
            item.remove("command");
            item.remove("schemas");
            item.insert("schema".to_owned(), json!(schema));
        }
        item
    });
    let mut document = document(Some(command), code);
    document["schemas"] = items.collect();
    document
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
        Ok(Answer::Maintained(numbers)) => document["maintained"] = json!(numbers),
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

fn show_report(out: &Output, report: &Report) {
    if report.steps.is_empty() {
        out.say("Nothing to do.");
    }
    show_notes(out, report);
    show_newer(out, &report.newer);
}

fn show_notes(out: &Output, report: &Report) {
    for note in &report.notes {
        out.say(note);
    }
}

fn show_newer(out: &Output, newer: &[String]) {
    if !newer.is_empty() {
        out.tell(format!(
            "warning: the database has {}, which is newer than every migration of this program. A \
             newer release has migrated it.",
            newer.join(", ")
        ));
    }
}

fn show_status(out: &Output, status: &Status) {
    let pending = status.pending().count();
    let known = status.migrations.iter().map(|one| {
        let word = one.applied_at.map_or("pending", |_| "applied");
        (word, one.applied_at, &one.name)
    });
    let unknown = status.unknown.iter();
    let unknown = unknown.map(|one| ("unknown", Some(one.applied_at), &one.version));
    for (word, at, name) in known.chain(unknown) {
        let at = at.map(|at| at.format("%F %T UTC").to_string());
        out.say(format!("{word}  {:23}  {name}", at.unwrap_or_default()));
    }
    if pending == 0 {
        out.say("Nothing is pending.");
    } else {
        out.say(format!("{pending} pending."));
    }
    match status.refusal() {
        Some(refusal) => out.tell(format!("warning: run would refuse: {refusal}")),
        None => show_newer(out, &status.newer()),
    }
}

fn show_plan(out: &Output, plan: Plan, sql: bool) {
    if plan.migrations.is_empty() {
        out.say("Nothing is pending.");
    }
    // psql can run the SQL: the rest are comments.
    if let (true, Some(schema), Some(_)) = (sql, &out.schema, plan.migrations.first()) {
        say(format!("SET search_path = {};", quoted(schema)));
    }
    for planned in plan.migrations {
        if sql {
            say(format!("-- {}", out.of_schema(planned.name)));
            say(planned.sql);
        } else {
            out.say(planned.name);
        }
    }
    let Preflight { notes, obstacles } = plan.preflight;
    // Beside SQL, the notes are no part of the output.
    for note in notes {
        let note = format!("\n{note}");
        if sql { out.tell(note) } else { out.say(note) }
    }
    if !obstacles.is_empty() {
        out.tell(format!(
            "warning: run would refuse: {}",
            Refusal::Obstacles(obstacles)
        ));
    }
}

fn show_adopted(out: &Output, recorded: &[String]) {
    if recorded.is_empty() {
        out.say("Nothing to adopt.");
    }
    for name in recorded {
        out.say(format!("recorded  {name}"));
    }
}

fn show_verification(out: &Output, verification: &Verification) {
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
    show_group(out, "Missing", missing);
    show_group(out, "Changed", changed);
    show_group(
        out,
        "Rights that are not intended (--trust accepts a role)",
        rights,
    );
    show_group(out, "Extra, no drift", extra);
    show_group(out, "Not granted, no drift (`grant` gives it)", lacking);
    out.say(match version {
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
        out.say(format!("Pending: {}.", pending.join(", ")));
    }
}

fn show_group(out: &Output, title: &str, items: &[impl Display]) {
    if !items.is_empty() {
        out.say(format!("{title}:"));
        for item in items {
            out.say(format!("  {}", item.to_string().replace('\n', "\n  ")));
        }
    }
}

fn show_granted(out: &Output, granted: &Granted) {
    for role in &granted.roles {
        out.say(format!("granted   {role}"));
    }
    for role in &granted.missing {
        out.say(format!(
            "missing   {role}: to use it, create the role and grant again"
        ));
    }
    if !granted.newer.is_empty() {
        out.say("Nothing was granted: the newer release's `grant` knows the rights.");
    }
    show_newer(out, &granted.newer);
}

/// Shows what would be lost, and asks if there is a terminal.
fn confirm(out: &Output, reversal: &Reversal, yes: bool) -> bool {
    match &reversal.losses {
        None => out.tell(
            "A migration does not run in a transaction, so what would be lost can't be counted \
             beforehand.",
        ),
        Some(losses) if losses.is_empty() => return true,
        Some(losses) => {
            out.tell("This loses:");
            losses.iter().for_each(|loss| out.tell(format!("  {loss}")));
        }
    }
    if yes {
        return true;
    }
    if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        out.tell("There is no terminal to ask at. Add --yes to confirm.");
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

/// Returns a watcher that prints a line for each migration, and one every [`LINE_INTERVAL`] while it runs.
/// Its thread ends when the watcher is dropped.
fn progress(out: Output) -> impl FnMut(Event<'_>) + Send + 'static {
    let (sender, running) = mpsc::channel();
    let of_thread = out.clone();
    thread::spawn(move || {
        let mut now: Option<(String, Instant)> = None;
        loop {
            match (running.recv_timeout(LINE_INTERVAL), &now) {
                (Ok(next), _) => now = next,
                (Err(RecvTimeoutError::Disconnected), _) => return,
                (Err(RecvTimeoutError::Timeout), None) => {}
                (Err(RecvTimeoutError::Timeout), Some((what, begin))) => {
                    let seconds = begin.elapsed().as_secs();
                    of_thread.tell(format!("{what}: running for {seconds} s"));
                }
            }
        }
    });
    move |event| match event {
        Event::Waiting(holder) => out.tell(format!("Waiting for another runner: {holder}.")),
        Event::Lifted(settings) => out.tell(format!(
            "These settings don't apply to the run: {}.",
            settings.join(", ")
        )),
        Event::Blocked(name, blockers) => {
            let blockers: Vec<String> = blockers.iter().map(ToString::to_string).collect();
            out.tell(format!("{name} waits for {}.", blockers.join("; ")));
        }
        Event::Retrying(name, pause) => out.tell(format!(
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
            out.say(format!("{done:8}  {:42} {milliseconds:>9.1} ms", step.name));
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
    let _ = writeln!(io::stderr(), "{}", painted(&text, &io::stderr()));
}

/// Whether what goes there is coloured: on a terminal, unless NO_COLOR or TERM says no.
fn is_coloured(stream: &impl RawStream) -> bool {
    AutoStream::choice(stream) != ColorChoice::Never
}

/// Colours the word that a text begins with.
fn painted(text: &impl Display, stream: &impl RawStream) -> String {
    const GREEN: Style = AnsiColor::Green.on_default();
    const YELLOW: Style = AnsiColor::Yellow.on_default();
    const RED: Style = AnsiColor::Red.on_default();
    const WORDS: [(&str, Style); 9] = [
        ("applied ", GREEN),
        ("granted ", GREEN),
        ("recorded ", GREEN),
        ("reverted ", YELLOW),
        ("pending ", YELLOW),
        ("missing ", YELLOW),
        ("unknown ", RED),
        ("warning:", YELLOW.bold()),
        ("error:", RED.bold()),
    ];
    let text = text.to_string();
    if !is_coloured(stream) {
        return text;
    }
    let word = WORDS.iter().find_map(|(word, style)| {
        let rest = text.strip_prefix(word)?;
        Some(format!("{style}{word}{style:#}{rest}"))
    });
    word.unwrap_or(text)
}

/// Returns clap's own text, in its colours where they are shown.
fn rendered(error: &clap::Error, stream: &impl RawStream) -> String {
    let text = error.render();
    if is_coloured(stream) {
        text.ansi().to_string()
    } else {
        text.to_string()
    }
}
