//! Secrets on their way to the database: one-time secrets become digests. With the feature `crypto`, which is on by
//! default.

mod digest;

pub use digest::{KeyTooShort, TokenKey, TokenPurpose, new_code, new_secret};
