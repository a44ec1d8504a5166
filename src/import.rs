//! The rows of the previous system's database: `docs/moving.md` walks through the move.
//!
//! ```no_run
//! use bruhmcp_db::crypto::KeyRing;
//! use bruhmcp_db::import::{self, Options, System};
//! use diesel::prelude::*;
//!
//! let conn = &mut PgConnection::establish("postgresql://owner@db.example/bruhmcp")?;
//! let ring = KeyRing::new([(1, &[7; 32][..])])?; // of your secret store
//! let system = System::new(Some(&ring));
//! let report = import::preflight(conn, &system, &Options::default())?;
//! for table in &report.tables {
//!     println!("{}: {} rows, {} left behind", table.table, table.rows, table.left_behind);
//! }
//! import::import(conn, &system, &Options::default(), false, &mut |_| {})?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub use bruhmcp_import::*;

use uuid::Uuid;

use crate::crypto::{KeyRing, SecretColumn as Column};
use crate::ids::InstanceId;
use crate::models::canonical_email;
use crate::{Sealed, SecretText};

/// This crate's email addresses and key ring, for an import.
pub struct System<'a> {
    ring: Option<&'a KeyRing>,
}

impl<'a> System<'a> {
    /// Seals with this ring. Without one, an archive with credentials is refused.
    #[must_use]
    pub fn new(ring: Option<&'a KeyRing>) -> Self {
        Self { ring }
    }
}

fn column(column: SecretColumn) -> Column {
    match column {
        SecretColumn::ApiKey => Column::ApiKey,
        SecretColumn::ClientSecret => Column::ClientSecret,
        SecretColumn::AccessToken => Column::AccessToken,
        SecretColumn::RefreshToken => Column::RefreshToken,
    }
}

impl NewSystem for System<'_> {
    fn canonical_email(&self, email: &str) -> Option<String> {
        canonical_email(email).ok()
    }

    fn has_keys(&self) -> bool {
        self.ring.is_some()
    }

    fn seal(&self, secret: &str, instance_id: Uuid, of: SecretColumn) -> Option<Vec<u8>> {
        let secret = SecretText::from(secret);
        let sealed = self
            .ring?
            .seal(&secret, InstanceId(instance_id), column(of));
        Some(sealed.ok()?.as_ciphertext().to_vec())
    }

    fn holds(&self, sealed: &[u8], secret: &str, instance_id: Uuid, of: SecretColumn) -> bool {
        let Ok(sealed) = Sealed::from_ciphertext(sealed.to_vec()) else {
            return false;
        };
        let opened = self
            .ring
            .map(|ring| ring.open(&sealed, InstanceId(instance_id), column(of)));
        opened.is_some_and(|opened| opened.is_ok_and(|opened| opened.expose() == secret))
    }
}
