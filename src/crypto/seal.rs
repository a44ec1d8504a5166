//! Sealing of the secrets in `mcp_credentials`: AES-256-GCM with a ring of keys.
//!
//! A sealed value, in bytes:
//!
//! ```text
//! 1 format (1) | 1 key id | 12 nonce | as long as the text: ciphertext | 16 tag
//! ```
//!
//! Format, key id, the row's key and the column's name are authenticated too (additional data). So
//! a value doesn't open in another row or column, or after a change of its first bytes.

use std::fmt;

use aes_gcm::aead::{Aead, AeadInOut, Generate, KeyInit, Nonce, Payload, Tag};
use aes_gcm::{Aes256Gcm, Key};
use zeroize::Zeroize;

use super::KeyError;
use crate::ids::CredentialId;
use crate::secret::{Sealed, SecretText};

const FORMAT: u8 = 1;
const NONCE_LEN: usize = 12;
const TAG_LEN: usize = 16;
const OVERHEAD: usize = 2 + NONCE_LEN + TAG_LEN;

/// The database's limit.
const MAX_SEALED_LEN: usize = 16_384;

/// A column of `mcp_credentials` that holds a sealed secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the variants are named after the columns")]
pub enum SecretColumn {
    ApiKey,
    ClientSecret,
    AccessToken,
    RefreshToken,
}

impl SecretColumn {
    /// All columns.
    pub const ALL: [Self; 4] = [
        Self::ApiKey,
        Self::ClientSecret,
        Self::AccessToken,
        Self::RefreshToken,
    ];

    /// Part of the additional data: a changed name makes every value unreadable.
    fn name(self) -> &'static str {
        match self {
            Self::ApiKey => "mcp_credentials.api_key",
            Self::ClientSecret => "mcp_credentials.client_secret",
            Self::AccessToken => "mcp_credentials.access_token",
            Self::RefreshToken => "mcp_credentials.refresh_token",
        }
    }
}

/// Why a secret can't be sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// The text is longer than [`KeyRing::MAX_LEN`].
    #[error("the secret is too long")]
    TooLong,
    /// The operating system provides no random bytes.
    #[error("the operating system provides no random bytes")]
    NoRandomness,
}

/// Why a sealed value doesn't open. Contains nothing of the secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// It is shorter than any sealed value.
    #[error("the sealed value is truncated")]
    Truncated,
    /// It wasn't sealed, or by a newer version of this crate.
    #[error("the sealed value has an unknown format")]
    UnknownFormat,
    /// The ring lacks the key.
    #[error("the key ring lacks key {key_id}, which sealed the value")]
    UnknownKey {
        /// The id in the value.
        key_id: u8,
    },
    /// It was altered, cut, copied from another row or column, or sealed with another key of the
    /// same id.
    #[error("the sealed value was altered or copied from elsewhere")]
    Altered,
    /// The opened value is not UTF-8.
    #[error("the sealed value is not text")]
    NotText,
}

/// The keys for credentials. The first key seals; every key opens.
///
/// The ring wipes its keys from memory when it is dropped. It has no `Clone`: share it by reference
/// or [`Arc`](std::sync::Arc).
///
/// # Rotation
/// 1. In every process, add the new key behind the old one. Its id must never have been used.
/// 2. In every process, move it to the front.
/// 3. Call [`McpCredential::reseal`](crate::models::McpCredential::reseal) until nothing is sealed
///    under the old key.
/// 4. Remove the old key.
///
/// # How long to use a key
/// The nonce is random. Two values with the same key and nonce would reveal both secrets and allow
/// forgery. NIST SP 800-38D, 8.3, therefore allows 2³² seals per key with random nonces of 96 bits;
/// the chance of a collision is then 2⁻³³. An hourly refresh seals two tokens: 10,000 connected
/// instances use up a key in 24 years, 1,000,000 in 89 days. **Rotate well before that.** Resealing
/// counts against the new key.
///
/// # Example
/// ```
/// use bruhmcp_db::SecretText;
/// use bruhmcp_db::crypto::{KeyRing, SecretColumn};
/// use bruhmcp_db::ids::CredentialId;
///
/// // From your secret store: 32 random bytes each.
/// let (new, old) = ([7; 32], [1; 32]);
/// let ring = KeyRing::new([(2, &new[..]), (1, &old[..])])?;
///
/// let row = CredentialId::new();
/// let sealed = ring.seal(&SecretText::from("figd_abc"), row, SecretColumn::ApiKey)?;
/// assert_eq!(ring.open(&sealed, row, SecretColumn::ApiKey)?.expose(), "figd_abc");
/// assert!(ring.open(&sealed, CredentialId::new(), SecretColumn::ApiKey).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct KeyRing {
    newest: (u8, Aes256Gcm),
    older: Vec<(u8, Aes256Gcm)>,
}

impl KeyRing {
    /// The longest secret that can be sealed, in bytes.
    pub const MAX_LEN: usize = MAX_SEALED_LEN - OVERHEAD;

    /// Copies these keys, newest first. Each has an id, which is stored with its values, and 32
    /// random bytes.
    ///
    /// # Errors
    /// `Empty`, `Length`, `Duplicate`.
    pub fn new<'a>(keys: impl IntoIterator<Item = (u8, &'a [u8])>) -> Result<Self, KeyError> {
        let mut ring: Vec<(u8, Aes256Gcm)> = Vec::new();
        for (key_id, key) in keys {
            let key: &Key<Aes256Gcm> = key.try_into().map_err(|_| KeyError::Length { key_id })?;
            if ring.iter().any(|(id, _)| *id == key_id) {
                return Err(KeyError::Duplicate { key_id });
            }
            ring.push((key_id, Aes256Gcm::new(key)));
        }
        let mut ring = ring.into_iter();
        Ok(Self {
            newest: ring.next().ok_or(KeyError::Empty)?,
            older: ring.collect(),
        })
    }

    /// Seals a secret under the newest key, for one column of one row. Each call gives another
    /// value.
    ///
    /// # Errors
    /// `TooLong`, `NoRandomness`.
    pub fn seal(
        &self,
        secret: &SecretText,
        credential_id: CredentialId,
        column: SecretColumn,
    ) -> Result<Sealed, SealError> {
        let text = secret.expose().as_bytes();
        if text.len() > Self::MAX_LEN {
            return Err(SealError::TooLong);
        }
        let (key_id, key) = &self.newest;
        let nonce = Nonce::<Aes256Gcm>::try_generate().map_err(|_| SealError::NoRandomness)?;
        let payload = Payload {
            msg: text,
            aad: &additional_data(*key_id, credential_id, column),
        };
        // Fails only for more than 64 GiB.
        let encrypted = key
            .encrypt(&nonce, payload)
            .map_err(|_| SealError::TooLong)?;
        let header = self.newest_header();
        Ok(Sealed::from_ciphertext(
            [&header[..], &nonce, &encrypted].concat(),
        ))
    }

    /// Opens a value that was sealed for this column of this row under any key of the ring.
    ///
    /// # Errors
    /// [`OpenError`], which contains nothing of the secret.
    pub fn open(
        &self,
        sealed: &Sealed,
        credential_id: CredentialId,
        column: SecretColumn,
    ) -> Result<SecretText, OpenError> {
        let sealed = sealed.as_ciphertext();
        let (&[format, key_id], rest) = sealed.split_first_chunk().ok_or(OpenError::Truncated)?;
        if format != FORMAT {
            return Err(OpenError::UnknownFormat);
        }
        let (nonce, rest) = rest
            .split_first_chunk::<NONCE_LEN>()
            .ok_or(OpenError::Truncated)?;
        let (encrypted, tag) = rest
            .split_last_chunk::<TAG_LEN>()
            .ok_or(OpenError::Truncated)?;
        let key = self.key(key_id).ok_or(OpenError::UnknownKey { key_id })?;

        // Decrypted in place and moved into the SecretText: no copy of the secret stays in memory.
        let mut text = encrypted.to_vec();
        key.decrypt_inout_detached(
            &Nonce::<Aes256Gcm>::from(*nonce),
            &additional_data(key_id, credential_id, column),
            text.as_mut_slice().into(),
            &Tag::<Aes256Gcm>::from(*tag),
        )
        .map_err(|_| OpenError::Altered)?;
        match String::from_utf8(text) {
            Ok(text) => Ok(SecretText::from(text)),
            Err(error) => {
                error.into_bytes().zeroize();
                Err(OpenError::NotText)
            }
        }
    }

    /// The first bytes of every value that is sealed under the newest key.
    pub(crate) fn newest_header(&self) -> [u8; 2] {
        [FORMAT, self.newest.0]
    }

    /// Whether a value's first bytes name the newest key.
    pub(crate) fn is_newest(&self, sealed: &Sealed) -> bool {
        sealed.as_ciphertext().starts_with(&self.newest_header())
    }

    fn key(&self, key_id: u8) -> Option<&Aes256Gcm> {
        let mut keys = std::iter::once(&self.newest).chain(&self.older);
        keys.find(|(id, _)| *id == key_id).map(|(_, key)| key)
    }
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyRing(..)")
    }
}

/// The additional data. All parts but the last have a fixed length, so no two places give the same
/// bytes.
fn additional_data(key_id: u8, credential_id: CredentialId, column: SecretColumn) -> Vec<u8> {
    [
        &[FORMAT, key_id],
        &credential_id.0.as_bytes()[..],
        column.name().as_bytes(),
    ]
    .concat()
}
