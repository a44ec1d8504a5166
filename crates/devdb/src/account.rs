//! The account of a private server.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::Error;

/// The current account, or another for root: PostgreSQL refuses to run as root.
pub(crate) struct Account(Option<Ids>);

struct Ids {
    user: u32,
    group: u32,
}

impl Account {
    pub(crate) fn for_server() -> Result<Self, Error> {
        if id(&["-u"])? != Some(0) {
            return Ok(Self(None));
        }
        for name in ["postgres", "nobody"] {
            if let (Some(user), Some(group)) = (id(&["-u", name])?, id(&["-g", name])?) {
                return Ok(Self(Some(Ids { user, group })));
            }
        }
        Err(Error::NoAccount)
    }

    pub(crate) fn is_other(&self) -> bool {
        self.0.is_some()
    }

    /// Gives a new folder to this account.
    pub(crate) fn give(&self, folder: &Path) -> io::Result<()> {
        match self.0 {
            Some(Ids { user, group }) => chown(folder, Some(user), Some(group)),
            None => Ok(()),
        }
    }

    /// Returns a command that runs as this account, without root's groups.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        if let Some(Ids { user, group }) = self.0 {
            command.uid(user).gid(group);
        }
        command
    }
}

/// Returns the answer of `id`, or `None` if the account doesn't exist.
fn id(arguments: &[&str]) -> Result<Option<u32>, Error> {
    let output = Command::new("id")
        .args(arguments)
        .output()
        .map_err(Error::io("id"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().parse().ok())
}
