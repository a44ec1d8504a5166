//! Secrets made unreadable before they reach the database.

mod seal;

pub use seal::{KeyRing, KeyRingError, OpenError, SealError, SecretColumn};
