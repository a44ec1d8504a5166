//! A client that does the least: it sends the values of a prepared statement and skips the answer.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A connection to a private server, which asks for no password.
pub(crate) struct Wire {
    stream: UnixStream,
    answer: Vec<u8>,
    /// The process that serves the connection.
    pub(crate) pid: u32,
}

impl Wire {
    pub(crate) fn connect(folder: &Path, database: &str) -> io::Result<Self> {
        let mut wire = Self {
            stream: UnixStream::connect(folder.join(".s.PGSQL.5432"))?,
            answer: Vec::new(),
            pid: 0,
        };
        let startup = format!("\0\x03\0\0user\0postgres\0database\0{database}\0\0");
        let length = u32::try_from(startup.len() + 4).map_err(io::Error::other)?;
        wire.stream.write_all(&length.to_be_bytes())?;
        wire.stream.write_all(startup.as_bytes())?;
        wire.wait()?;
        let key = wire.message(b'K').ok_or(io::ErrorKind::InvalidData)?;
        wire.pid = u32::from_be_bytes(key[..4].try_into().map_err(io::Error::other)?);
        Ok(wire)
    }

    /// Prepares the statement `name`.
    pub(crate) fn prepare(&mut self, name: &str, statement: &str) -> io::Result<()> {
        let mut sent = Vec::new();
        message(&mut sent, b'P', |body| {
            body.extend(format!("{name}\0{statement}\0\0\0").bytes());
        });
        message(&mut sent, b'S', |_| {});
        self.stream.write_all(&sent)?;
        self.wait()
    }

    /// Runs it with values in binary format, which the result has too.
    pub(crate) fn execute(&mut self, name: &str, values: &[Option<&[u8]>]) -> io::Result<()> {
        let number = |number: usize| u16::try_from(number).unwrap_or(u16::MAX).to_be_bytes();
        let mut sent = Vec::with_capacity(256);
        message(&mut sent, b'B', |body| {
            body.extend(format!("\0{name}\0").bytes());
            // One format for all: binary.
            body.extend([0, 1, 0, 1]);
            body.extend(number(values.len()));
            for value in values {
                let length = value.map_or(-1, |value| i32::try_from(value.len()).unwrap_or(-1));
                body.extend(length.to_be_bytes());
                body.extend(value.unwrap_or_default());
            }
            body.extend([0, 1, 0, 1]);
        });
        // As libpq does.
        message(&mut sent, b'D', |body| body.extend(b"P\0"));
        message(&mut sent, b'E', |body| body.extend([0; 5]));
        message(&mut sent, b'S', |_| {});
        self.stream.write_all(&sent)?;
        self.wait()
    }

    /// Reads until the server is ready.
    fn wait(&mut self) -> io::Result<()> {
        self.answer.clear();
        let mut chunk = [0; 16_384];
        loop {
            let length = self.stream.read(&mut chunk)?;
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.answer.extend_from_slice(&chunk[..length]);
            // ReadyForQuery has six bytes.
            if let [.., b'Z', 0, 0, 0, 5, _] = self.answer[..] {
                return match self.message(b'E') {
                    None => Ok(()),
                    Some(error) => Err(io::Error::other(
                        String::from_utf8_lossy(error).replace('\0', " "),
                    )),
                };
            }
        }
    }

    /// The first message of this type in the answer.
    fn message(&self, type_: u8) -> Option<&[u8]> {
        let mut rest = &self.answer[..];
        while let Some((&found, after)) = rest.split_first() {
            let length = u32::from_be_bytes(*after.first_chunk()?);
            let (body, next) = after.split_at_checked(usize::try_from(length).ok()?)?;
            if found == type_ {
                return Some(&body[4..]);
            }
            rest = next;
        }
        None
    }
}

fn message(sent: &mut Vec<u8>, type_: u8, write: impl FnOnce(&mut Vec<u8>)) {
    sent.push(type_);
    let start = sent.len();
    sent.extend([0; 4]);
    write(sent);
    let length = u32::try_from(sent.len() - start).unwrap_or(u32::MAX);
    sent[start..start + 4].copy_from_slice(&length.to_be_bytes());
}

/// Nanoseconds of CPU that a process or thread has taken.
pub(crate) fn cpu(task: &str) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{task}/schedstat"))?;
    let taken = stat.split(' ').next().unwrap_or_default();
    taken.parse().map_err(io::Error::other)
}
