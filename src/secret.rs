//! Types of secret columns. None has `Serialize`, and their `Debug` shows nothing. A row that
//! derives `Serialize` must skip such a column, or it doesn't compile:
//!
//! ```compile_fail,E0277
//! use bruhmcp_db::SecretText;
//!
//! #[derive(serde::Serialize)]
//! struct Row {
//!     name: String,
//!     password: SecretText,
//! }
//! ```
//!
//! This compiles:
//!
//! ```
//! # use bruhmcp_db::SecretText;
//! #[derive(serde::Serialize)]
//! struct Row {
//!     name: String,
//!     #[serde(skip_serializing)]
//!     password: SecretText,
//! }
//! ```

use std::fmt;

use diesel::deserialize::{self, FromSql, FromSqlRow};
use diesel::expression::AsExpression;
use diesel::pg::{Pg, PgValue};
use diesel::serialize::{self, Output, ToSql};
use diesel::sql_types::Text;
use diesel_derive_newtype::DieselNewType;
use serde::{Deserialize, Deserializer};
use zeroize::Zeroize;

use crate::enums::AuthTokenType;

/// A secret string: a password hash, a credential, a one-time secret, an authorization URL.
///
/// It is wiped from memory when it is dropped. It can be read from a request (`Deserialize`), but
/// not written to a response or a log: there is no `Serialize`, and `Debug` shows nothing.
#[derive(Clone, PartialEq, Eq, AsExpression, FromSqlRow)]
#[diesel(sql_type = Text)]
pub struct SecretText(String);

impl SecretText {
    /// Wraps a secret.
    #[must_use]
    pub fn new(secret: impl Into<String>) -> Self {
        Self(secret.into())
    }

    /// The secret itself.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for SecretText {
    fn from(secret: String) -> Self {
        Self(secret)
    }
}

impl From<&str> for SecretText {
    fn from(secret: &str) -> Self {
        Self(secret.to_owned())
    }
}

impl Drop for SecretText {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl<'de> Deserialize<'de> for SecretText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self)
    }
}

impl ToSql<Text, Pg> for SecretText {
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, Pg>) -> serialize::Result {
        ToSql::<Text, Pg>::to_sql(&self.0, out)
    }
}

impl FromSql<Text, Pg> for SecretText {
    fn from_sql(value: PgValue<'_>) -> deserialize::Result<Self> {
        FromSql::<Text, Pg>::from_sql(value).map(Self)
    }
}

/// A keyed digest of a one-time secret: the 32 bytes in `auth_tokens.token`.
#[derive(Clone, PartialEq, Eq, Hash, DieselNewType)]
pub struct TokenDigest(Vec<u8>);

impl TokenDigest {
    /// Takes a digest that was made elsewhere.
    #[must_use]
    pub fn new(digest: [u8; 32]) -> Self {
        Self(digest.to_vec())
    }

    /// The 32 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// A keyed digest of the state of an authorization: the 32 bytes in `mcp_credentials.oauth_state`.
///
/// `TokenKey::hash_state` (feature `crypto`) makes one from the state.
#[derive(Clone, PartialEq, Eq, Hash, DieselNewType)]
pub struct StateDigest(Vec<u8>);

impl StateDigest {
    /// Takes a digest that was made elsewhere.
    #[must_use]
    pub fn new(digest: [u8; 32]) -> Self {
        Self(digest.to_vec())
    }

    /// The 32 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// A one-time secret as the database knows it: its type and its digest.
///
/// `TokenKey::hash` (feature `crypto`) makes one from the secret.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HashedToken {
    /// What the secret is for.
    pub type_: AuthTokenType,
    /// The digest of the secret.
    pub digest: TokenDigest,
}

impl HashedToken {
    /// Takes a digest that was made elsewhere.
    #[must_use]
    pub fn new(type_: AuthTokenType, digest: [u8; 32]) -> Self {
        Self {
            type_,
            digest: TokenDigest::new(digest),
        }
    }
}

/// Ciphertext in `mcp_credentials`: up to 16384 bytes, of which the first is the format.
#[derive(Clone, PartialEq, Eq, DieselNewType)]
pub struct Sealed(Vec<u8>);

/// Bytes that can't be a sealed value. Shows none of them: they may be a secret that was not sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a sealed value")]
pub struct NotSealed;

impl Sealed {
    /// The longest value in bytes.
    pub(crate) const MAX_LEN: usize = 16_384;

    /// The length in bytes of the shortest value of a known format, for an empty text.
    pub(crate) fn min_len(format: u8) -> Option<usize> {
        match format {
            // Format, key id, nonce, tag.
            1 => Some(2 + 12 + 16),
            2 => Some(2 + 24 + 16),
            _ => None,
        }
    }

    /// Takes a value that was sealed elsewhere. Only its format and length are checked, as the
    /// database does, whose log would show the row.
    ///
    /// # Errors
    /// [`NotSealed`].
    pub fn from_ciphertext(ciphertext: Vec<u8>) -> Result<Self, NotSealed> {
        let min_len = ciphertext.first().copied().and_then(Self::min_len);
        match min_len {
            Some(min_len) if (min_len..=Self::MAX_LEN).contains(&ciphertext.len()) => {
                Ok(Self(ciphertext))
            }
            _ => Err(NotSealed),
        }
    }

    /// The ciphertext.
    #[must_use]
    pub fn as_ciphertext(&self) -> &[u8] {
        &self.0
    }
}

macro_rules! silent_debug {
    ($($name:ident)*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "(..)"))
            }
        }
    )*};
}
silent_debug!(SecretText TokenDigest StateDigest Sealed);

/// Secrets have no `Serialize`, and rows and inserts have no `Deserialize`: a client's request
/// can't make one. The first example shows that the others fail for that reason alone.
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
