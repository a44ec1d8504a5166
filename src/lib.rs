//! The database layer of BruhMCP: migrations, schema, rows and safe operations for twelve tables of PostgreSQL.
//!
//! - [`models`] has a file for each table: its row, insert, changeset and operations.
//! - [`enums`], [`ids`] and [`views`] are the words that the tables share; [`schema`] is Diesel's.
//! - `crypto` (a feature, on by default) turns one-time secrets into digests and seals credentials.
//! - [`ConstraintViolation`] names the rule that an error broke; [`retry_transaction`] runs a transaction again where that
//!   helps.
//! - [`migrations`] applies the migrations, and checks that a database has the schema this version expects.
//!
#![cfg_attr(feature = "migrator", doc = "```no_run")]
#![cfg_attr(not(feature = "migrator"), doc = "```ignore")]
//! use bruhmcp_db::migrations;
//! use bruhmcp_db::models::{NewUser, User};
//! use diesel::prelude::*;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let url = std::env::var("DATABASE_URL")?;
//! migrations::runner(&url)?.run()?; // feature `migrator`
//!
//! let conn = &mut PgConnection::establish(&url)?;
//! let user = User::sign_up(
//!     conn,
//!     &NewUser {
//!         id: None,
//!         first_name: "Asha",
//!         last_name: "Rao",
//!         email: "Asha@Example.in", // kept and found in lower case
//!         password: None,
//!         email_verified: None,
//!         razorpay_customer_id: None,
//!         is_active: None,
//!     },
//! )?;
//! assert_eq!(user.email, "asha@example.in");
//! # Ok(())
//! # }
//! ```
//!
//! Moments are UTC, in the microseconds that PostgreSQL keeps; money is in minor units (paise).
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

/// The README's example compiles.
#[cfg(all(doctest, feature = "crypto"))]
#[doc = include_str!("../README.md")]
struct Readme;
