//! The database layer of BruhMCP.
#![deny(missing_docs)]

#[cfg(feature = "crypto")]
pub mod crypto;
pub mod enums;
mod error;
pub mod ids;
mod keyset;
pub mod migrations;
pub mod models;
#[expect(
    missing_docs,
    reason = "generated: `schema.rs` carries the database's comments and no others"
)]
#[path = "../schema.rs"]
pub mod schema;
mod secret;
mod transaction;
pub mod views;

pub use error::{ConstraintViolation, RuleKind};
pub use keyset::Keyset;
pub use secret::{Sealed, SecretText, TokenDigest};
pub use transaction::{Isolation, MAX_ATTEMPTS, is_transient, retry_transaction};
