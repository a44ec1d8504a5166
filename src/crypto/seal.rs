//! Sealing of the secrets in `mcp_credentials`: XChaCha20-Poly1305 with a ring of keys.
//!
//! A sealed value, in bytes:
//!
//! ```text
//! 1 format | 1 key id | nonce | as long as the text: ciphertext | 16 tag
//! ```
//!
//! Format 2 is sealed, with a nonce of 24 bytes. Format 1, AES-256-GCM with a nonce of 12 bytes,
//! still opens. Format, key id, the instance and the column's name are authenticated too
//! (associated data). So a value doesn't open for another instance or in another column, or after a
//! change of its first bytes.

use std::fmt;

use aes_gcm::Aes256Gcm;
use chacha20poly1305::XChaCha20Poly1305;
use chacha20poly1305::aead::{Aead, AeadInOut, Generate, KeyInit, Nonce, Payload, Tag};
use hmac::{Hmac, Mac};
use sha2::Sha256;
use zeroize::{Zeroize, Zeroizing};

use super::KeyError;
use crate::ids::InstanceId;
use crate::secret::{Sealed, SecretText};

/// The format of new values.
const FORMAT: u8 = 2;
const NONCE_LEN: usize = 24;
const TAG_LEN: usize = 16;
const OVERHEAD: usize = 2 + NONCE_LEN + TAG_LEN;

/// AES-256-GCM.
const FORMAT_1: u8 = 1;
const NONCE_1_LEN: usize = 12;

/// A column of `mcp_credentials` that holds a sealed secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the variants are named after the columns")]
pub enum SecretColumn {
    ApiKey,
    ClientSecret,
    AccessToken,
    RefreshToken,
    OauthAuthorizationUrl,
    OauthCodeVerifier,
}

impl SecretColumn {
    /// All columns.
    pub const ALL: [Self; 6] = [
        Self::ApiKey,
        Self::ClientSecret,
        Self::AccessToken,
        Self::RefreshToken,
        Self::OauthAuthorizationUrl,
        Self::OauthCodeVerifier,
    ];

    /// Part of the associated data: a changed name makes every value unreadable.
    fn name(self) -> &'static str {
        match self {
            Self::ApiKey => "mcp_credentials.api_key",
            Self::ClientSecret => "mcp_credentials.client_secret",
            Self::AccessToken => "mcp_credentials.access_token",
            Self::RefreshToken => "mcp_credentials.refresh_token",
            Self::OauthAuthorizationUrl => "mcp_credentials.oauth_authorization_url",
            Self::OauthCodeVerifier => "mcp_credentials.oauth_code_verifier",
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
    /// It was altered, cut, copied from another instance or column, or sealed with another key of
    /// the same id.
    #[error("the sealed value was altered or copied from elsewhere")]
    Altered,
    /// The opened value is not UTF-8.
    #[error("the sealed value is not text")]
    NotText,
}

/// The keys for credentials. The first key seals; every key opens.
///
/// The ring wipes its keys from memory when it is dropped. It has no `Clone`: share it by reference
/// or [`Arc`](std::sync::Arc). A key management service may keep them wrapped
/// ([`from_wrapped`](Self::from_wrapped)).
///
/// # Rotation
/// 1. In every process, add the new key behind the old one. Its id must never have been used.
/// 2. In every process, move it to the front.
/// 3. Call [`McpCredential::reseal`](crate::models::McpCredential::reseal) until nothing is sealed
///    under the old key.
/// 4. Remove the old key.
///
/// # How long to use a key
/// Two values with the same key and nonce would reveal both secrets and allow forgery. A random
/// nonce of 192 bits never repeats in practice: after 2⁸⁰ seals under one key the chance of a
/// repetition is 2⁻³³. So a key has no end of its own. Rotate it when somebody who had it leaves, or
/// by the rules of your organisation.
///
/// Values of format 1 have nonces of 96 bits. [`reseal`](crate::models::McpCredential::reseal)
/// changes their format, also under the same key. Each format has its own key, derived from the
/// ring's.
///
/// # Example
/// ```
/// use bruhmcp_db::SecretText;
/// use bruhmcp_db::crypto::{KeyRing, SecretColumn};
/// use bruhmcp_db::ids::InstanceId;
///
/// // From your secret store: 32 random bytes each.
/// let (new, old) = ([7; 32], [1; 32]);
/// let ring = KeyRing::new([(2, &new[..]), (1, &old[..])])?;
///
/// let instance = InstanceId::new();
/// let sealed = ring.seal(&SecretText::from("figd_abc"), instance, SecretColumn::ApiKey)?;
/// assert_eq!(ring.open(&sealed, instance, SecretColumn::ApiKey)?.expose(), "figd_abc");
/// assert!(ring.open(&sealed, InstanceId::new(), SecretColumn::ApiKey).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct KeyRing {
    newest: RingKey,
    older: Vec<RingKey>,
}

struct RingKey {
    id: u8,
    cipher: XChaCha20Poly1305,
    /// Opens format 1.
    aes: Aes256Gcm,
}

impl RingKey {
    fn new(id: u8, key: &[u8; 32]) -> Self {
        // Not the key itself: format 1 uses that.
        // HMAC pads a key with zeros to the length of a block.
        let mut block = Zeroizing::new([0; 64]);
        block[..32].copy_from_slice(key);
        let mut mac = <Hmac<Sha256> as hmac::KeyInit>::new((&*block).into());
        mac.update(b"bruhmcp-db: sealed values, format 2");
        let derived = Zeroizing::new(<[u8; 32]>::from(mac.finalize().into_bytes()));
        Self {
            id,
            cipher: XChaCha20Poly1305::new((&*derived).into()),
            aes: Aes256Gcm::new(key.into()),
        }
    }
}

impl KeyRing {
    /// The longest secret that can be sealed, in bytes.
    pub const MAX_LEN: usize = Sealed::MAX_LEN - OVERHEAD;

    /// Copies these keys, newest first. Each has an id, which is stored with its values, and 32
    /// random bytes.
    ///
    /// # Errors
    /// [`KeyError::Empty`], [`KeyError::Length`], [`KeyError::Duplicate`].
    pub fn new<'a>(keys: impl IntoIterator<Item = (u8, &'a [u8])>) -> Result<Self, KeyError> {
        let mut ring: Vec<RingKey> = Vec::new();
        for (key_id, key) in keys {
            let key = key.try_into().map_err(|_| KeyError::Length { key_id })?;
            if ring.iter().any(|key| key.id == key_id) {
                return Err(KeyError::Duplicate { key_id });
            }
            ring.push(RingKey::new(key_id, key));
        }
        let mut ring = ring.into_iter();
        Ok(Self {
            newest: ring.next().ok_or(KeyError::Empty)?,
            older: ring.collect(),
        })
    }

    /// Seals a secret under the newest key, for one column of one instance's credentials. Each call
    /// gives another value.
    ///
    /// # Errors
    /// [`SealError::TooLong`], [`SealError::NoRandomness`].
    pub fn seal(
        &self,
        secret: &SecretText,
        instance_id: InstanceId,
        column: SecretColumn,
    ) -> Result<Sealed, SealError> {
        let text = secret.expose().as_bytes();
        if text.len() > Self::MAX_LEN {
            return Err(SealError::TooLong);
        }
        let nonce =
            Nonce::<XChaCha20Poly1305>::try_generate().map_err(|_| SealError::NoRandomness)?;
        let header = self.newest_header();
        let payload = Payload {
            msg: text,
            aad: &associated_data(header, instance_id, column),
        };
        // Fails only for more than 256 GiB.
        let encrypted = self
            .newest
            .cipher
            .encrypt(&nonce, payload)
            .map_err(|_| SealError::TooLong)?;
        Sealed::from_ciphertext([&header[..], &nonce, &encrypted].concat())
            .map_err(|_| SealError::TooLong)
    }

    /// Opens a value that was sealed for this column of this instance under any key of the ring.
    ///
    /// # Errors
    /// [`OpenError`], which contains nothing of the secret.
    pub fn open(
        &self,
        sealed: &Sealed,
        instance_id: InstanceId,
        column: SecretColumn,
    ) -> Result<SecretText, OpenError> {
        let sealed = sealed.as_ciphertext();
        let (&header, rest) = sealed.split_first_chunk().ok_or(OpenError::Truncated)?;
        let [format, key_id] = header;
        let nonce_len = match format {
            FORMAT => NONCE_LEN,
            FORMAT_1 => NONCE_1_LEN,
            _ => return Err(OpenError::UnknownFormat),
        };
        let (nonce, rest) = rest
            .split_at_checked(nonce_len)
            .ok_or(OpenError::Truncated)?;
        let (encrypted, tag) = rest
            .split_last_chunk::<TAG_LEN>()
            .ok_or(OpenError::Truncated)?;
        let mut keys = std::iter::once(&self.newest).chain(&self.older);
        let key = keys
            .find(|key| key.id == key_id)
            .ok_or(OpenError::UnknownKey { key_id })?;

        // Decrypted in place and moved into the SecretText: no copy of the secret stays in memory.
        let mut text = encrypted.to_vec();
        let data = associated_data(header, instance_id, column);
        match format {
            FORMAT => decrypt(&key.cipher, nonce, &data, &mut text, *tag)?,
            _ => decrypt(&key.aes, nonce, &data, &mut text, *tag)?,
        }
        match String::from_utf8(text) {
            Ok(text) => Ok(SecretText::from(text)),
            Err(error) => {
                error.into_bytes().zeroize();
                Err(OpenError::NotText)
            }
        }
    }

    /// The first bytes of every value in the newest format and under the newest key.
    pub(crate) fn newest_header(&self) -> [u8; 2] {
        [FORMAT, self.newest.id]
    }

    /// Whether a value's first bytes name the newest format and key.
    pub(crate) fn is_newest(&self, sealed: &Sealed) -> bool {
        sealed.as_ciphertext().starts_with(&self.newest_header())
    }
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyRing(..)")
    }
}

fn decrypt<C: AeadInOut>(
    cipher: &C,
    nonce: &[u8],
    data: &[u8],
    text: &mut [u8],
    tag: [u8; TAG_LEN],
) -> Result<(), OpenError> {
    let nonce = nonce.try_into().map_err(|_| OpenError::Truncated)?;
    let tag: &Tag<C> = tag
        .as_slice()
        .try_into()
        .map_err(|_| OpenError::Truncated)?;
    cipher
        .decrypt_inout_detached(nonce, data, text.into(), tag)
        .map_err(|_| OpenError::Altered)
}

/// All parts but the last have a fixed length, so no two places give the same bytes.
fn associated_data(header: [u8; 2], instance_id: InstanceId, column: SecretColumn) -> Vec<u8> {
    [
        &header[..],
        instance_id.0.as_bytes(),
        column.name().as_bytes(),
    ]
    .concat()
}
