//! Columns that nobody must see by accident: their types have no `Serialize`, and a `Debug` that says nothing. A row that
//! derives `Serialize` without skipping such a column doesn't compile:
//!
//! ```compile_fail,E0277
//! use bruhmcp_db::{Sealed, SecretText, TokenDigest};
//!
//! #[derive(serde::Serialize)]
//! struct Row {
//!     name: String,
//!     password: SecretText,
//! }
//! ```
//!
//! Skipped, it does:
//!
//! ```
//! # use bruhmcp_db::{Sealed, SecretText, TokenDigest};
//! #[derive(serde::Serialize)]
//! struct Row {
//!     name: String,
//!     #[serde(skip_serializing)]
//!     password: SecretText,
//! }
//! ```

use diesel_derive_newtype::DieselNewType;

/// A keyed digest in `auth_tokens.token`: 32 octets. Whoever has a digest can't sign in with it, but can look for it.
#[derive(Clone, PartialEq, Eq, Hash, DieselNewType)]
pub struct TokenDigest(Vec<u8>);

impl TokenDigest {
    /// Takes a digest made elsewhere.
    #[must_use]
    pub fn new(digest: [u8; 32]) -> Self {
        Self(digest.to_vec())
    }

    /// The 32 octets.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Ciphertext in `mcp_credentials`: 29 to 16384 octets. Not readable without its key; still nobody's business.
#[derive(Clone, PartialEq, Eq, DieselNewType)]
pub struct Sealed(Vec<u8>);

impl Sealed {
    /// Takes ciphertext as it is. The database refuses fewer than 29 and more than 16384 octets.
    #[must_use]
    pub fn from_ciphertext(ciphertext: Vec<u8>) -> Self {
        Self(ciphertext)
    }

    /// The ciphertext.
    #[must_use]
    pub fn as_ciphertext(&self) -> &[u8] {
        &self.0
    }
}

/// A text column that is secret: a password hash, an OAuth state, an authorisation URL that holds the state.
#[derive(Clone, PartialEq, Eq, DieselNewType)]
pub struct SecretText(String);

impl SecretText {
    /// Wraps a text.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself: for the one place that needs it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

macro_rules! say_nothing {
    ($($name:ident)*) => {$(
        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(concat!(stringify!($name), "(..)"))
            }
        }
    )*};
}
say_nothing!(TokenDigest Sealed SecretText);

/// What must not compile, beside what does in the same words: no secret is serialised, and no row or insert can be made
/// from what a client sends.
///
/// ```
/// fn shown<T: serde::Serialize>() {}
/// fn taken<T: for<'de> serde::Deserialize<'de>>() {}
/// shown::<bruhmcp_db::models::User>();
/// taken::<bruhmcp_db::ids::UserId>();
/// ```
///
/// ```compile_fail,E0277
/// fn shown<T: serde::Serialize>() {}
/// shown::<bruhmcp_db::TokenDigest>();
/// ```
///
/// ```compile_fail,E0277
/// fn shown<T: serde::Serialize>() {}
/// shown::<bruhmcp_db::Sealed>();
/// ```
///
/// ```compile_fail,E0277
/// fn shown<T: serde::Serialize>() {}
/// shown::<bruhmcp_db::SecretText>();
/// ```
///
/// ```compile_fail,E0277
/// fn taken<T: for<'de> serde::Deserialize<'de>>() {}
/// taken::<bruhmcp_db::models::User>();
/// ```
///
/// ```compile_fail,E0277
/// fn taken<T: for<'de> serde::Deserialize<'de>>() {}
/// taken::<bruhmcp_db::models::McpCredential>();
/// ```
///
/// ```compile_fail,E0277
/// fn taken<T: for<'de> serde::Deserialize<'de>>() {}
/// taken::<bruhmcp_db::models::AuthToken>();
/// ```
///
/// ```compile_fail,E0277
/// fn taken<T: for<'de> serde::Deserialize<'de>>() {}
/// taken::<bruhmcp_db::models::NewMcpCredential>();
/// ```
#[cfg(doctest)]
struct MustNotCompile;
