//! A key ring whose keys lie on disk wrapped only, by a master key of this machine. A key management
//! service does the same with a master key that never leaves it: then `LocalMaster` is a client of
//! that service.
//!
//! ```sh
//! cargo run --example wrapped_key        # in a new temporary folder
//! cargo run --example wrapped_key keys   # in this folder, which keeps its keys
//! ```

use std::error::Error;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bruhmcp_db::SecretText;
use bruhmcp_db::crypto::{KeyRing, KeyUnwrap, SecretColumn, UnwrapError};
use bruhmcp_db::ids::InstanceId;
use bruhmcp_db::zeroize::Zeroizing;
use chacha20poly1305::XChaCha20Poly1305;
use chacha20poly1305::aead::{Aead, Generate, KeyInit, Nonce, Payload};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// A master key in a file that only its owner can read.
struct LocalMaster(XChaCha20Poly1305);

#[derive(Debug)]
struct NotOfThisMaster;

impl std::fmt::Display for NotOfThisMaster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the key was wrapped by another master key, or altered")
    }
}

impl Error for NotOfThisMaster {}

impl LocalMaster {
    fn open_or_make(file: &Path) -> Result<Self> {
        if !file.exists() {
            write_new(file, &Zeroizing::new(<[u8; 32]>::generate())[..])?;
        }
        let key = Zeroizing::new(fs::read(file)?);
        let cipher = XChaCha20Poly1305::new_from_slice(&key)?;
        Ok(Self(cipher))
    }

    fn wrap(&self, key_id: u8, key: &[u8; 32]) -> Result<Vec<u8>> {
        let nonce = Nonce::<XChaCha20Poly1305>::try_generate()?;
        let payload = Payload {
            msg: key,
            aad: &[key_id],
        };
        let encrypted = self
            .0
            .encrypt(&nonce, payload)
            .map_err(|_| "not encrypted")?;
        Ok([&nonce[..], &encrypted].concat())
    }
}

impl KeyUnwrap for LocalMaster {
    type Error = NotOfThisMaster;

    fn unwrap_key(
        &self,
        key_id: u8,
        wrapped: &[u8],
    ) -> std::result::Result<Zeroizing<Vec<u8>>, NotOfThisMaster> {
        let (nonce, msg) = wrapped.split_at_checked(24).ok_or(NotOfThisMaster)?;
        let nonce = nonce.try_into().map_err(|_| NotOfThisMaster)?;
        let payload = Payload {
            msg,
            aad: &[key_id],
        };
        let key = self.0.decrypt(nonce, payload);
        key.map(Zeroizing::new).map_err(|_| NotOfThisMaster)
    }
}

/// Refuses to replace a file: a lost key is lost data.
fn write_new(file: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Makes a key, unless it is there, and stores it wrapped.
fn make_key(master: &LocalMaster, folder: &Path, key_id: u8) -> Result<Vec<u8>> {
    let file = folder.join(format!("key-{key_id}.wrapped"));
    if !file.exists() {
        let key = Zeroizing::new(<[u8; 32]>::generate());
        write_new(&file, &master.wrap(key_id, &key)?)?;
    }
    Ok(fs::read(file)?)
}

fn main() -> Result {
    let folder = match std::env::args_os().nth(1) {
        Some(folder) => PathBuf::from(folder),
        None => std::env::temp_dir().join(format!("wrapped-keys-{}", std::process::id())),
    };
    fs::create_dir_all(&folder)?;
    let master = LocalMaster::open_or_make(&folder.join("master.key"))?;

    let first = make_key(&master, &folder, 1)?;
    let ring = KeyRing::from_wrapped(&master, [(1, &first[..])])?;
    let instance = InstanceId::new();
    let secret = SecretText::from("figd_a_secret");
    let sealed = ring.seal(&secret, instance, SecretColumn::ApiKey)?;
    println!(
        "sealed under key 1, which lies wrapped in {}",
        folder.display()
    );

    // A rotation: the new key in front, the old one still opens.
    let second = make_key(&master, &folder, 2)?;
    let ring = KeyRing::from_wrapped(&master, [(2, &second[..]), (1, &first[..])])?;
    let opened = ring.open(&sealed, instance, SecretColumn::ApiKey)?;
    println!("opened after the rotation: {}", opened == secret);

    match KeyRing::from_wrapped(&master, [(2, &first[..])]) {
        Err(UnwrapError::Unwrap { key_id, source }) => {
            println!("key 1 in the place of key {key_id}: {source}");
        }
        _ => return Err("a wrapped key took the place of another".into()),
    }
    Ok(())
}
