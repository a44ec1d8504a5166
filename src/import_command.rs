//! `bruhmcp-db import` and `bruhmcp-db purge-archive`.

use std::fmt::Write;
use std::fs::{self, File};
use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::{Duration, Instant};

use bruhmcp_db::crypto::KeyRing;
use bruhmcp_db::import::{
    self, Check, DuplicateEmails, ImportError, LiveSubscription, Options, Progress, Report, System,
};
use bruhmcp_db::zeroize::Zeroizing;
use clap::{Arg, ArgAction, ArgMatches, Command};
use diesel_pg_migrator::cli::{Call, Done, Extra, Undone};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

/// Variable with the keys, as the example backend reads them.
const KEYS: &str = "CREDENTIAL_KEYS";

const DONE: u8 = 0;
const FAILED: u8 = 1;
const USAGE: u8 = 2;
const LOCK_BUSY: u8 = 4;
const REFUSED: u8 = 5;
const DRIFT: u8 = 7;
const LEFT_BEHIND: u8 = 9;

pub(crate) fn extras() -> [Extra; 2] {
    [
        Extra {
            command: import_arguments(),
            run: run_import,
        },
        Extra {
            command: purge_arguments(),
            run: run_purge,
        },
    ]
}

fn keys_file() -> Arg {
    Arg::new("keys_file")
        .long("keys-file")
        .value_name("FILE")
        .help(
            "The keys that seal credentials, newest first: 2:<64 hexadecimal digits>,1:<…>. \
               Default: the variable CREDENTIAL_KEYS",
        )
}

fn flag(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name)
        .long(name)
        .action(ArgAction::SetTrue)
        .help(help)
}

fn import_arguments() -> Command {
    Command::new("import")
        .about("Bring the rows of the previous system, which 000 archived, into the new tables")
        .after_help(
            "Exit code 9: done, and rows are left behind. docs/moving.md walks through the move.",
        )
        .arg(flag(
            "dry-run",
            "Say what would become of each row. Writes nothing",
        ))
        .arg(
            flag(
                "check",
                "Compare the archive with the new tables. Writes nothing",
            )
            .conflicts_with("dry-run"),
        )
        .arg(
            Arg::new("timezone")
                .long("timezone")
                .value_name("[TABLE=]ZONE")
                .action(ArgAction::Append)
                .help("The time zone of times without one, of all tables or of one [default: UTC]"),
        )
        .arg(
            Arg::new("duplicate-emails")
                .long("duplicate-emails")
                .value_parser(["report", "suffix"])
                .default_value("report")
                .help(
                    "What to do with an account whose address an older one has: leave it behind, \
                       or give it an address with a suffix",
                ),
        )
        .arg(
            Arg::new("live-subscription")
                .long("live-subscription")
                .value_parser(["latest", "paid"])
                .default_value("latest")
                .help(
                    "Which of a user's live subscriptions stays: the latest, or the latest that is \
                     not free. The others are replaced",
                ),
        )
        .arg(keys_file())
        .arg(
            Arg::new("report")
                .long("report")
                .value_name("FILE")
                .help("Write the rows that are left behind to this .csv or .jsonl file"),
        )
        .arg(flag(
            "allow-sessions",
            "Import although other sessions may write to the database",
        ))
}

fn purge_arguments() -> Command {
    Command::new("purge-archive")
        .about("Drop the archive of the previous system, if the import holds")
        .arg(flag("yes", "Drop it. Without, only say what would go"))
        .arg(keys_file())
}

fn usage(message: impl Into<String>) -> Undone {
    Undone {
        code: USAGE,
        kind: "usage",
        message: message.into(),
    }
}

fn undone(error: &ImportError) -> Undone {
    let (code, kind) = match error {
        ImportError::Running | ImportError::Busy(_) => (LOCK_BUSY, "lock_busy"),
        ImportError::TimeZone(_) | ImportError::UnknownTable(_) => (USAGE, "usage"),
        ImportError::Database { .. } => (FAILED, "database"),
        _ => (REFUSED, "refused"),
    };
    Undone {
        code,
        kind,
        message: error.to_string(),
    }
}

fn options(matches: &ArgMatches) -> Options {
    let mut options = Options::default();
    for zone in matches.get_many::<String>("timezone").unwrap_or_default() {
        match zone.split_once('=') {
            Some((table, zone)) => {
                options.timezones.insert(table.to_owned(), zone.to_owned());
            }
            None => options.timezone.clone_from(zone),
        }
    }
    if matches
        .get_one::<String>("duplicate-emails")
        .is_some_and(|what| what == "suffix")
    {
        options.duplicate_emails = DuplicateEmails::Suffix;
    }
    if matches
        .get_one::<String>("live-subscription")
        .is_some_and(|which| which == "paid")
    {
        options.live_subscription = LiveSubscription::Paid;
    }
    options
}

/// Reads the keys. No error has a part of them.
fn ring(matches: &ArgMatches) -> Result<Option<KeyRing>, Undone> {
    let text = match matches.get_one::<String>("keys_file") {
        Some(path) => {
            let read = fs::read_to_string(path);
            Zeroizing::new(read.map_err(|error| usage(format!("{path} can't be read: {error}")))?)
        }
        None => match std::env::var(KEYS) {
            Ok(keys) => Zeroizing::new(keys),
            Err(_) => return Ok(None),
        },
    };
    let malformed = || usage("the keys are not a list of id:key, with 64 hexadecimal digits a key");
    let keys = text.trim().split(',').map(key).collect::<Option<Vec<_>>>();
    let keys = keys.ok_or_else(malformed)?;
    let ring = KeyRing::new(keys.iter().map(|(id, key)| (*id, &key[..])));
    Ok(Some(ring.map_err(|error| usage(error.to_string()))?))
}

fn key(text: &str) -> Option<(u8, Zeroizing<Vec<u8>>)> {
    let (id, digits) = text.trim().split_once(':')?;
    if !digits.is_ascii() || digits.len() % 2 != 0 {
        return None;
    }
    let bytes = (0..digits.len()).step_by(2);
    let bytes = bytes.map(|at| u8::from_str_radix(&digits[at..at + 2], 16).ok());
    Some((
        id.parse().ok()?,
        Zeroizing::new(bytes.collect::<Option<_>>()?),
    ))
}

fn run_import(call: &Call<'_>) -> Result<Done, Undone> {
    let options = options(call.matches);
    let report_file = call.matches.get_one::<String>("report").map(Path::new);
    let write_report = match report_file {
        Some(path) => Some(ReportFile::create(path)?),
        None => None,
    };
    let ring = ring(call.matches)?;
    let system = System::new(ring.as_ref());
    let mut conn = call.connect()?;
    let failed = |error: ImportError| undone(&error);
    if call.matches.get_flag("check") {
        let check = import::check(&mut conn, &system).map_err(failed)?;
        return Ok(Done {
            code: if check.holds() { DONE } else { DRIFT },
            text: check_text(&check),
            result: json!(check),
        });
    }
    let report = if call.matches.get_flag("dry-run") {
        import::preflight(&mut conn, &system, &options).map_err(failed)?
    } else {
        let beside_others = call.matches.get_flag("allow-sessions");
        let mut shown = Shown::new(call.json);
        let mut show = |progress| shown.show(progress);
        let report = import::import(&mut conn, &system, &options, beside_others, &mut show);
        shown.end();
        let report = report.map_err(failed)?;
        if let Some(file) = write_report {
            file.write(&import::rejected(&mut conn).map_err(failed)?)?;
        }
        report
    };
    Ok(Done {
        code: if report.is_complete() {
            DONE
        } else {
            LEFT_BEHIND
        },
        text: report_text(&report),
        result: json!(report),
    })
}

fn run_purge(call: &Call<'_>) -> Result<Done, Undone> {
    let ring = ring(call.matches)?;
    let system = System::new(ring.as_ref());
    let mut conn = call.connect()?;
    let yes = call.matches.get_flag("yes");
    let mut dependents = Vec::new();
    let purged = import::purge_archive(&mut conn, &system, &mut |found| {
        dependents = found.to_vec();
        yes
    });
    let mut text = String::new();
    for dependent in &dependents {
        let _ = writeln!(
            text,
            "outside the archive, and dropped with it: {dependent}"
        );
    }
    match purged {
        Ok(check) if check.holds() => Ok(Done {
            code: DONE,
            text: text + "The archive is dropped.",
            result: json!(check),
        }),
        Ok(check) => Ok(Done {
            code: DRIFT,
            text: check_text(&check) + "\nNothing was dropped.",
            result: json!(check),
        }),
        Err(ImportError::NotConfirmed) => Err(Undone {
            code: REFUSED,
            kind: "refused",
            message: format!("{text}the archive was not dropped. Give --yes to drop it."),
        }),
        Err(error) => Err(undone(&error)),
    }
}

/// The file of the rows that are left behind. Created before the import, so that a wrong path is
/// found before hours of work.
struct ReportFile<'a> {
    path: &'a Path,
    file: File,
    is_csv: bool,
}

impl<'a> ReportFile<'a> {
    fn create(path: &'a Path) -> Result<Self, Undone> {
        let is_csv = match path.extension().and_then(|extension| extension.to_str()) {
            Some("csv") => true,
            Some("jsonl") => false,
            _ => return Err(usage("the name of the report must end in .csv or .jsonl")),
        };
        let file = File::create(path);
        let file = file.map_err(|error| usage(format!("{}: {error}", path.display())))?;
        Ok(Self { path, file, is_csv })
    }

    fn write(self, rows: &[import::Rejected]) -> Result<(), Undone> {
        let written = if self.is_csv {
            import::write_csv(rows, self.file)
        } else {
            import::write_json_lines(rows, self.file)
        };
        written.map_err(|error| Undone {
            code: FAILED,
            kind: "import",
            message: format!(
                "the import is done, but {} can't be written: {error}. Run it again to write it.",
                self.path.display()
            ),
        })
    }
}

/// Shows the progress on standard error: a bar on a terminal, lines otherwise, nothing with --json.
struct Shown {
    bar: ProgressBar,
    lines: bool,
    table: Option<&'static str>,
    last: Instant,
}

/// The shortest time between two lines about one table.
const LINE_INTERVAL: Duration = Duration::from_secs(2);

impl Shown {
    fn new(json: bool) -> Self {
        let on_terminal = io::stderr().is_terminal() && !json;
        let target = if on_terminal {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(None, target);
        let style = ProgressStyle::with_template(
            "{msg:26} {bar:30} {human_pos}/{human_len}  {per_sec}  {eta} left",
        );
        if let Ok(style) = style {
            bar.set_style(style);
        }
        Self {
            bar,
            lines: !on_terminal && !json,
            table: None,
            last: Instant::now(),
        }
    }

    fn show(&mut self, progress: Progress) {
        let Progress { table, done, total } = progress;
        let unsigned = |number: i64| u64::try_from(number).unwrap_or_default();
        if self.table != Some(table) {
            self.table = Some(table);
            self.bar.reset();
            self.bar.set_message(table);
            self.bar.set_length(unsigned(total));
        } else if self.lines && (done == total || self.last.elapsed() >= LINE_INTERVAL) {
            eprintln!("{table}: {done} of {total} rows");
            self.last = Instant::now();
        }
        self.bar.set_position(unsigned(done));
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}

fn report_text(report: &Report) -> String {
    let mut text = String::new();
    let options = &report.options;
    let _ = writeln!(text, "time zone: {}", options.timezone);
    for (table, zone) in &options.timezones {
        let _ = writeln!(text, "time zone of {table}: {zone}");
    }
    let duplicates = match options.duplicate_emails {
        DuplicateEmails::Report => "report",
        DuplicateEmails::Suffix => "suffix",
    };
    let _ = writeln!(text, "duplicate emails: {duplicates}");
    let live = match options.live_subscription {
        LiveSubscription::Latest => "latest",
        LiveSubscription::Paid => "paid",
    };
    let _ = writeln!(text, "live subscription: {live}\n");
    let _ = writeln!(
        text,
        "{:26} {:>10} {:>12} {:>10} {:>12} {:>8}",
        "table", "rows", "as they are", "converted", "left behind", "added"
    );
    for table in &report.tables {
        let _ = writeln!(
            text,
            "{:26} {:>10} {:>12} {:>10} {:>12} {:>8}",
            table.table,
            table.rows,
            table.as_they_are,
            table.converted,
            table.left_behind,
            table.added
        );
    }
    for table in &report.tables {
        for (code, reason) in &table.reasons {
            let what = if reason.left_behind {
                "left behind"
            } else {
                "converted"
            };
            let _ = write!(
                text,
                "\n{}: {} {what}: {code} ({}{})",
                table.table,
                reason.rows,
                reason.keys.join(", "),
                if reason.rows > 3 { ", …" } else { "" }
            );
        }
    }
    for column in &report.unknown_columns {
        let _ = write!(
            text,
            "\n{}.{}: unknown column, {} values left behind",
            column.table, column.column, column.values
        );
    }
    for table in &report.unknown_tables {
        let _ = write!(
            text,
            "\n{}: no such table here, {} rows left behind",
            table.table, table.rows
        );
    }
    text.trim_end().to_owned()
}

fn check_text(check: &Check) -> String {
    let mut text = String::new();
    for money in &check.money {
        let _ = writeln!(
            text,
            "{} {}: {} in the archive, {} left behind, {} by negating refunds, {} now",
            money.table, money.currency, money.archive, money.left_behind, money.negated, money.now
        );
    }
    for difference in &check.differences {
        let _ = writeln!(
            text,
            "{}: {} ({})",
            difference.what,
            difference.rows,
            difference.keys.join(", ")
        );
    }
    text + if check.holds() {
        "The new tables have what the archive has."
    } else {
        "The new tables differ from the archive."
    }
}
