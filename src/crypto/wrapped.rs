//! Keys that a key management service (KMS) keeps or wraps.

use std::error::Error;

use zeroize::Zeroizing;

use super::{KeyError, KeyRing};

/// Unwraps the keys of a [`KeyRing`]: a KMS, an HSM, or a local master key as in
/// `examples/wrapped_key.rs`.
///
/// Configuration and backups then hold wrapped keys only, which are worthless without the service.
/// It is asked once a key, when the process starts. A service that keeps whole keys, such as a
/// secret store, takes the name of a key as `wrapped` and returns the key.
pub trait KeyUnwrap {
    /// Why a key can't be unwrapped. Contains nothing of it.
    type Error: Error;

    /// Returns the 32 bytes of a key. Give `key_id` to the service as context ("encryption context",
    /// "additional authenticated data"), so that a wrapped key can't take the place of another.
    ///
    /// # Errors
    /// The service can't be reached, refuses, or doesn't know the wrapped key.
    fn unwrap_key(&self, key_id: u8, wrapped: &[u8]) -> Result<Zeroizing<Vec<u8>>, Self::Error>;
}

/// Why no [`KeyRing`] was made of wrapped keys.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnwrapError<E: Error> {
    /// A key can't be unwrapped.
    #[error("key {key_id} of the key ring can't be unwrapped")]
    Unwrap {
        /// The id of the key.
        key_id: u8,
        /// What the service says.
        #[source]
        source: E,
    },
    /// The keys are not those of a ring.
    #[error(transparent)]
    Key(#[from] KeyError),
}

impl KeyRing {
    /// As [`new`](Self::new), with keys that `service` unwraps: newest first, each with its id.
    ///
    /// # Errors
    /// [`UnwrapError::Unwrap`] for the first key that fails; [`UnwrapError::Key`].
    pub fn from_wrapped<'a, S: KeyUnwrap>(
        service: &S,
        keys: impl IntoIterator<Item = (u8, &'a [u8])>,
    ) -> Result<Self, UnwrapError<S::Error>> {
        let keys = keys.into_iter().map(|(key_id, wrapped)| {
            let key = service.unwrap_key(key_id, wrapped);
            key.map(|key| (key_id, key))
                .map_err(|source| UnwrapError::Unwrap { key_id, source })
        });
        let keys: Vec<_> = keys.collect::<Result<_, _>>()?;
        Ok(Self::new(keys.iter().map(|(id, key)| (*id, &key[..])))?)
    }
}
