//! `bruhmcp-db`: the command line of the migrations.
//!
//! Exit codes: 0 done or current, 1 failed, 2 usage, 3 pending (`status`, `verify`), 4 lock busy,
//! 5 refused, 6 no connection, 7 drift (`verify`, `import --check`, `purge-archive`), 8 time limit,
//! 9 imported with rows left behind, 130 and 143 stopped by a signal. `docs/json.md` has more about
//! them.

use std::process::ExitCode;

use bruhmcp_db::migrations;
use diesel_pg_migrator::cli::{self, Program};

mod import_command;

fn main() -> ExitCode {
    let program = Program {
        name: migrations::PROGRAM,
        version: format!(
            "{} (schema {})",
            env!("CARGO_PKG_VERSION"),
            migrations::newest().unwrap_or_default()
        ),
        about: "Applies, reverts and checks the migrations of BruhMCP's database.",
    };
    cli::main(program, migrations::runner, &import_command::extras())
}
