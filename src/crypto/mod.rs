//! Digests of one-time secrets, and encryption of credentials. Needs the feature `crypto`, which is
//! on by default.

mod digest;
mod seal;
mod wrapped;

pub use digest::{TokenKey, TokenPurpose, code_challenge, new_code, new_secret};
pub use seal::{KeyRing, OpenError, SealError, SecretColumn};
pub use wrapped::{KeyUnwrap, UnwrapError};

/// Why keys were refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The key of a [`TokenKey`] is too short.
    #[error("the token key is shorter than {} bytes", TokenKey::MIN_LEN)]
    TooShort,
    /// A [`KeyRing`] got no key.
    #[error("the key ring has no key")]
    Empty,
    /// A key of a [`KeyRing`] does not have 32 bytes.
    #[error("key {key_id} of the key ring does not have 32 bytes")]
    Length {
        /// The id of the key.
        key_id: u8,
    },
    /// Two keys of a [`KeyRing`] have the same id.
    #[error("the key ring has two keys with the id {key_id}")]
    Duplicate {
        /// The id of the keys.
        key_id: u8,
    },
}
