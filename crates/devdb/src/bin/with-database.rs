//! Runs a command with `DATABASE_URL` set to a new, empty database, then drops the database:
//! `cargo run -p bruhmcp-devdb --bin with-database -- diesel migration run`.

use std::env;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};

use bruhmcp_devdb::Server;

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("with-database: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut arguments = env::args_os().skip(1);
    let program = arguments.next().ok_or("give the command to run")?;
    let server = Server::from_env()?;
    let database = server.create_database()?;
    let status = Command::new(&program)
        .args(arguments)
        .env("DATABASE_URL", database.url())
        .status()
        .map_err(|error| format!("{}: {error}", program.to_string_lossy()))?;
    // A shell's exit code for a command that a signal has ended.
    let code = status
        .code()
        .or(status.signal().map(|signal| 128 + signal))
        .unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}
