//! The outbox, a folder that stands for a mail server. Nothing secret is printed or answered: a code
//! or link is only in its file, which nobody but this user can read.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use bruhmcp_db::ids::AuthTokenId;
use serde_json::json;

use crate::errors::Error;

pub(crate) struct Outbox(pub(crate) PathBuf);

impl Outbox {
    pub(crate) fn send(&self, to: &str, text: &str) -> Result<(), Error> {
        self.write(&json!({ "to": to, "text": text }).to_string())
            .map_err(|_| Error::Internal("the mail was not sent"))
    }

    /// The name appears when the file is complete. Names sort by time.
    fn write(&self, mail: &str) -> io::Result<()> {
        let name = AuthTokenId::new().to_string();
        let unfinished = self.0.join(format!(".{name}"));
        let mut new = OpenOptions::new();
        new.write(true).create_new(true).mode(0o600);
        new.open(&unfinished)?.write_all(mail.as_bytes())?;
        fs::rename(unfinished, self.0.join(name))
    }
}
