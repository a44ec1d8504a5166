//! Sealing of the secrets in `mcp_credentials`: AES-256-GCM under a ring of keys.
//!
//! A sealed value is, in octets:
//!
//! ```text
//! 1 format (1) | 1 key id | 12 nonce | as long as the text: ciphertext | 16 tag
//! ```
//!
//! Format, key id, the row's key and the column's name are authenticated with it (additional data), so that a value that
//! was copied to another row or column, or whose first octets were changed, doesn't open.

use std::fmt;

use aes_gcm::aead::{Aead, AeadInOut, Generate, KeyInit, Nonce, Payload, Tag};
use aes_gcm::{Aes256Gcm, Key};
use secrecy::zeroize::Zeroize;
use secrecy::{ExposeSecret, SecretString};

use crate::ids::CredentialId;
use crate::secret::Sealed;

const FORMAT: u8 = 1;
const NONCE_LEN: usize = 12;
const TAG_LEN: usize = 16;
const OVERHEAD: usize = 2 + NONCE_LEN + TAG_LEN;

/// What the database takes.
const MAX_SEALED_LEN: usize = 16_384;

/// A column of `mcp_credentials` that holds a sealed secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SecretColumn {
    /// `api_key`
    ApiKey,
    /// `client_secret`
    ClientSecret,
    /// `access_token`
    AccessToken,
    /// `refresh_token`
    RefreshToken,
}

impl SecretColumn {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::ApiKey,
        Self::ClientSecret,
        Self::AccessToken,
        Self::RefreshToken,
    ];

    /// Part of what is authenticated: a name that changes makes every value unreadable.
    fn name(self) -> &'static str {
        match self {
            Self::ApiKey => "mcp_credentials.api_key",
            Self::ClientSecret => "mcp_credentials.client_secret",
            Self::AccessToken => "mcp_credentials.access_token",
            Self::RefreshToken => "mcp_credentials.refresh_token",
        }
    }
}

/// Why keys don't make a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyRingError {
    /// There is no key.
    #[error("a key ring needs a key")]
    Empty,
    /// A key isn't 32 octets long.
    #[error("key {key_id} must have 32 octets")]
    Length {
        /// Its id.
        key_id: u8,
    },
    /// Two keys have the same id.
    #[error("there are two keys {key_id}")]
    Duplicate {
        /// Their id.
        key_id: u8,
    },
}

/// Why a secret can't be sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The text is longer than [`KeyRing::MAX_LEN`].
    #[error("the secret is too long")]
    TooLong,
    /// The operating system gave no random octets.
    #[error("no random octets to be had")]
    NoRandomness,
}

/// Why a sealed value doesn't open. Tells nothing of what is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Too short to have been sealed.
    #[error("the sealed value is truncated")]
    Truncated,
    /// Sealed in a way this version doesn't know, or not sealed at all.
    #[error("the sealed value has an unknown format")]
    UnknownFormat,
    /// The ring lacks the key.
    #[error("the sealed value needs key {key_id}, which isn't on the ring")]
    UnknownKey {
        /// Its id.
        key_id: u8,
    },
    /// Altered, cut, copied from another row or column, or sealed under another key with the same id.
    #[error("the sealed value was altered or belongs elsewhere")]
    Altered,
    /// What was sealed isn't text.
    #[error("the sealed value isn't text")]
    NotText,
}

/// The keys that seal and open credentials: the first seals, each of them opens.
///
/// To rotate: put the new key, with an id that was never used, behind the old one in every process, so that all can open
/// what it seals; then put it in front in every process; then call
/// [`McpCredential::reseal`](crate::models::McpCredential::reseal) until nothing is left under the old key; then take
/// the old key off. The ring wipes its keys from memory when it is dropped. It doesn't clone; share it by reference or
/// [`Arc`](std::sync::Arc).
///
/// # How long a key may be used
/// The nonce is random. Two seals under one key with the same nonce would give both texts away, and with them the means
/// to forge. NIST SP 800-38D, 8.3, therefore allows 2³² seals under a key with random nonces of 96 bits; the chance that
/// any two of those nonces are equal is then 2⁻³³. A seal is one secret stored: an hourly refresh stores two tokens, so
/// that 10,000 connected instances use up a key in 24 years, and 1,000,000 in 89 days. **Put a new key in front of the
/// ring well before that.** A value that is sealed anew, for rotation, counts as a seal under the new key.
///
/// # Example
/// ```
/// use bruhmcp_db::crypto::{KeyRing, SecretColumn};
/// use bruhmcp_db::ids::CredentialId;
/// use secrecy::{ExposeSecret, SecretString};
///
/// // From the secret store: 32 random octets each.
/// let (new, old) = ([7; 32], [1; 32]);
/// let ring = KeyRing::new([(2, &new[..]), (1, &old[..])])?;
///
/// let row = CredentialId::new();
/// let sealed = ring.seal(&SecretString::from("figd_abc"), row, SecretColumn::ApiKey)?;
/// assert_eq!(ring.open(&sealed, row, SecretColumn::ApiKey)?.expose_secret(), "figd_abc");
/// assert!(ring.open(&sealed, CredentialId::new(), SecretColumn::ApiKey).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct KeyRing {
    newest: (u8, Aes256Gcm),
    older: Vec<(u8, Aes256Gcm)>,
}

impl KeyRing {
    /// The longest secret that can be sealed, in octets: what the database takes, less what sealing adds.
    pub const MAX_LEN: usize = MAX_SEALED_LEN - OVERHEAD;

    /// A ring of copies of these keys, newest first: an id, which is stored with each value, and 32 random octets each.
    ///
    /// # Errors
    /// No key, a key of another length, or an id that is there twice.
    pub fn new<'a>(keys: impl IntoIterator<Item = (u8, &'a [u8])>) -> Result<Self, KeyRingError> {
        let mut ring: Vec<(u8, Aes256Gcm)> = Vec::new();
        for (key_id, key) in keys {
            let key: &Key<Aes256Gcm> = key
                .try_into()
                .map_err(|_| KeyRingError::Length { key_id })?;
            if ring.iter().any(|(id, _)| *id == key_id) {
                return Err(KeyRingError::Duplicate { key_id });
            }
            ring.push((key_id, Aes256Gcm::new(key)));
        }
        let mut ring = ring.into_iter();
        Ok(Self {
            newest: ring.next().ok_or(KeyRingError::Empty)?,
            older: ring.collect(),
        })
    }

    /// Seals a secret under the newest key, for this column of this row only. Sealing twice gives different values.
    ///
    /// # Errors
    /// The secret is too long.
    pub fn seal(
        &self,
        secret: &SecretString,
        credential_id: CredentialId,
        column: SecretColumn,
    ) -> Result<Sealed, SealError> {
        let text = secret.expose_secret().as_bytes();
        if text.len() > Self::MAX_LEN {
            return Err(SealError::TooLong);
        }
        let (key_id, key) = &self.newest;
        let nonce = Nonce::<Aes256Gcm>::try_generate().map_err(|_| SealError::NoRandomness)?;
        let payload = Payload {
            msg: text,
            aad: &additional_data(*key_id, credential_id, column),
        };
        // Only for texts of more than 64 GiB.
        let encrypted = key
            .encrypt(&nonce, payload)
            .map_err(|_| SealError::TooLong)?;
        let header = self.newest_header();
        Ok(Sealed::from_ciphertext(
            [&header[..], &nonce, &encrypted].concat(),
        ))
    }

    /// Opens a value that was sealed for this column of this row, under any key of the ring.
    ///
    /// # Errors
    /// See [`OpenError`]; none says anything of the secret.
    pub fn open(
        &self,
        sealed: &Sealed,
        credential_id: CredentialId,
        column: SecretColumn,
    ) -> Result<SecretString, OpenError> {
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

        // As long as the text from the first, so that the secret isn't copied about on its way into the SecretString.
        let mut text = encrypted.to_vec();
        key.decrypt_inout_detached(
            &Nonce::<Aes256Gcm>::from(*nonce),
            &additional_data(key_id, credential_id, column),
            text.as_mut_slice().into(),
            &Tag::<Aes256Gcm>::from(*tag),
        )
        .map_err(|_| OpenError::Altered)?;
        match String::from_utf8(text) {
            Ok(text) => Ok(SecretString::from(text)),
            Err(error) => {
                error.into_bytes().zeroize();
                Err(OpenError::NotText)
            }
        }
    }

    /// The first octets of each value that is sealed under the newest key.
    pub(crate) fn newest_header(&self) -> [u8; 2] {
        [FORMAT, self.newest.0]
    }

    /// Whether a value is sealed under the newest key, as far as its first octets tell.
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

/// What is authenticated beside the text. All but the last part have a fixed length, so that no two places look alike.
fn additional_data(key_id: u8, credential_id: CredentialId, column: SecretColumn) -> Vec<u8> {
    [
        &[FORMAT, key_id],
        &credential_id.0.as_bytes()[..],
        column.name().as_bytes(),
    ]
    .concat()
}
