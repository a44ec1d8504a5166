//! Secrets on their way to the database: one-time secrets become digests, credentials become ciphertext. With the feature
//! `crypto`, which is on by default.

mod digest;
mod seal;

pub use digest::{KeyTooShort, TokenKey, TokenPurpose, new_code, new_secret};
pub use seal::{KeyRing, KeyRingError, OpenError, SealError, SecretColumn};
