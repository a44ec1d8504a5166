//! A database that stays, for development: `script/dev` calls it.
//!
//! `lasting-database FOLDER url` starts the server in the folder, creates the database `bruhmcp`
//! where they are missing, and prints its URL. `psql [ARGUMENT…]` runs psql in it, `stop` stops the
//! server.

use std::env;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::ExitCode;

use bruhmcp_devdb::Server;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lasting-database: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    let [folder, command, rest @ ..] = &arguments[..] else {
        return Err("give a folder, then url, psql or stop".into());
    };
    let folder = Path::new(folder);
    match command.to_str() {
        Some("url") => {
            let database = Server::lasting(folder)?.lasting_database("bruhmcp")?;
            println!("{}", database.url());
        }
        Some("psql") => {
            let database = Server::lasting(folder)?.lasting_database("bruhmcp")?;
            return Err(database.client("psql").args(rest).exec().into());
        }
        Some("stop") if folder.join("data/postmaster.pid").exists() => {
            Server::lasting(folder)?.stop(false)?;
        }
        Some("stop") => {}
        _ => return Err("the commands are url, psql and stop".into()),
    }
    Ok(())
}
