//! Secrets on their way to the database: one-time secrets become digests, credentials become ciphertext. With the feature
//! `crypto`, which is on by default.

mod digest;
mod seal;

pub use digest::{KeyTooShort, TokenKey, TokenPurpose, new_code, new_secret};
pub use seal::{KeyRing, OpenError, SealError, SecretColumn};

/// Why keys can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The key of a [`TokenKey`] has less than 32 bytes.
    #[error("the key has less than 32 bytes")]
    TooShort,
    /// A [`KeyRing`] without a key.
    #[error("the key ring has no key")]
    Empty,
    /// A key of a [`KeyRing`] has more or less than 32 bytes.
    #[error("key {key_id} does not have 32 bytes")]
    Length {
        /// The key's id.
        key_id: u8,
    },
    /// Two keys of a [`KeyRing`] have the same id.
    #[error("two keys have the id {key_id}")]
    Duplicate {
        /// Their id.
        key_id: u8,
    },
}
