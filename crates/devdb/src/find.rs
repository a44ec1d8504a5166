//! Finds the installed PostgreSQL.

use std::env;
use std::fs;
use std::path::{self, Path, PathBuf};
use std::process::Command;

use crate::Error;

pub(crate) const SERVER: &[&str] = &["initdb", "pg_ctl", "postgres", "psql", "pg_dump"];
pub(crate) const CLIENT: &[&str] = &["psql", "pg_dump"];

/// Returns the first folder with all of `programs`.
pub(crate) fn folder_with(programs: &[&str]) -> Result<PathBuf, Error> {
    candidates()
        .into_iter()
        // An entry of PATH may be relative or empty.
        .filter(|folder| folder.is_absolute())
        .find(|folder| {
            programs
                .iter()
                .all(|program| folder.join(program).is_file())
        })
        .ok_or(Error::NotFound)
}

fn candidates() -> Vec<PathBuf> {
    if let Some(folder) = env::var_os("BRUHMCP_PG_BIN").filter(|folder| !folder.is_empty()) {
        return path::absolute(folder).into_iter().collect();
    }
    let mut folders: Vec<PathBuf> = env::var_os("PATH")
        .iter()
        .flat_map(env::split_paths)
        .collect();
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        folders.push(String::from_utf8_lossy(&output.stdout).trim().into());
    }
    // Debian and Ubuntu: /usr/lib/postgresql/15/bin.
    folders.extend(newest_first(Path::new("/usr/lib/postgresql"), ""));
    // Homebrew on ARM and on Intel: /opt/homebrew/opt/postgresql@17/bin.
    for prefix in ["/opt/homebrew/opt", "/usr/local/opt"] {
        folders.extend(newest_first(Path::new(prefix), "postgresql@"));
    }
    folders
}

/// Returns `parent/<prefix><major>/bin` of each installed major version.
fn newest_first(parent: &Path, prefix: &str) -> Vec<PathBuf> {
    let mut majors: Vec<u32> = fs::read_dir(parent)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            entry
                .ok()?
                .file_name()
                .to_str()?
                .strip_prefix(prefix)?
                .parse()
                .ok()
        })
        .collect();
    majors.sort_unstable_by(|a, b| b.cmp(a));
    majors
        .iter()
        .map(|major| parent.join(format!("{prefix}{major}")).join("bin"))
        .collect()
}
