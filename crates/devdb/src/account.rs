//! The account that a private server runs as.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::Error;

/// One's own account, or another one for root, as whom PostgreSQL refuses to run.
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

    /// A command that runs as this account, without root's other groups.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        if let Some(Ids { user, group }) = self.0 {
            command.uid(user).gid(group);
        }
        command
    }
}

/// What the program `id` answers, `None` for an account that doesn't exist.
fn id(arguments: &[&str]) -> Result<Option<u32>, Error> {
    let output = Command::new("id")
        .args(arguments)
        .output()
        .map_err(Error::io("id"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().parse().ok())
}
