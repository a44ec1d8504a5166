//! One-time secrets, and the digests that the database keeps instead of them.

use std::fmt;

use aes_gcm::aead::Generate;
use hmac::{Hmac, KeyInit, Mac};
use secrecy::zeroize::Zeroizing;
use secrecy::{ExposeSecret, SecretSlice, SecretString};
use sha2::Sha256;

use crate::ids::UserId;
use crate::secret::TokenDigest;

/// What a secret is good for, and for whom. All of it goes into the digest, so that a digest is worth nothing as
/// another type, and a code's digest is worth nothing in another user's row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenPurpose<'a> {
    /// A six-digit code, to sign in: [`AuthTokenType::EmailOtp`](crate::enums::AuthTokenType::EmailOtp).
    EmailOtp {
        /// Whose code it is: two users may well get the same six digits.
        user_id: UserId,
    },
    /// A six-digit code, to prove a new address:
    /// [`AuthTokenType::EmailChangePending`](crate::enums::AuthTokenType::EmailChangePending).
    EmailChange {
        /// Whose code it is.
        user_id: UserId,
        /// The address that the code was sent to, [canonical](crate::models::canonical_email): it proves no other.
        new_email: &'a str,
    },
    /// A link: [`AuthTokenType::PasswordReset`](crate::enums::AuthTokenType::PasswordReset).
    PasswordReset,
    /// A link: [`AuthTokenType::EmailVerification`](crate::enums::AuthTokenType::EmailVerification).
    EmailVerification,
    /// A refresh token: [`AuthTokenType::Refresh`](crate::enums::AuthTokenType::Refresh).
    Refresh,
}

/// The key under which secrets are digested. It must not be in the database: six digits are soon guessed by who has
/// both the digest and the key.
///
/// With another key all digests differ: codes and links out there stop working and users must sign in again.
///
/// ```
/// use bruhmcp_db::crypto::{TokenKey, TokenPurpose, new_secret};
///
/// let key = TokenKey::new(b"32 octets, from the environment.")?;
/// let secret = new_secret(); // goes into the link
/// let digest = key.digest(TokenPurpose::PasswordReset, &secret); // goes into AuthToken::issue
/// # Ok::<(), bruhmcp_db::crypto::KeyTooShort>(())
/// ```
#[derive(Clone)]
pub struct TokenKey(SecretSlice<u8>);

/// A key of fewer than [`TokenKey::MIN_LEN`] octets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a key has at least {} octets", TokenKey::MIN_LEN)]
pub struct KeyTooShort;

impl TokenKey {
    /// Octets that a key has at least: as many as the digest.
    pub const MIN_LEN: usize = 32;

    /// Takes a copy of the key, which is wiped from memory when it is dropped. The octets must be random; a password
    /// isn't.
    ///
    /// # Errors
    /// [`KeyTooShort`].
    pub fn new(key: &[u8]) -> Result<Self, KeyTooShort> {
        if key.len() < Self::MIN_LEN {
            return Err(KeyTooShort);
        }
        Ok(Self(key.to_vec().into()))
    }

    /// HMAC-SHA-256 of the purpose and the secret.
    #[must_use]
    pub fn digest(&self, purpose: TokenPurpose<'_>, secret: &SecretString) -> TokenDigest {
        let mut mac = Hmac::<Sha256>::new_from_slice(self.0.expose_secret())
            .expect("HMAC takes a key of any length");
        // Each part ends where no other reading is possible: a zero after the name, 16 octets, a length before the
        // text.
        match purpose {
            TokenPurpose::EmailOtp { user_id } => {
                mac.update(b"email_otp\0");
                mac.update(user_id.0.as_bytes());
            }
            TokenPurpose::EmailChange { user_id, new_email } => {
                mac.update(b"email_change_pending\0");
                mac.update(user_id.0.as_bytes());
                mac.update(&(new_email.len() as u64).to_be_bytes());
                mac.update(new_email.as_bytes());
            }
            TokenPurpose::PasswordReset => mac.update(b"password_reset\0"),
            TokenPurpose::EmailVerification => mac.update(b"email_verification\0"),
            TokenPurpose::Refresh => mac.update(b"refresh\0"),
        }
        mac.update(secret.expose_secret().as_bytes());
        TokenDigest::new(mac.finalize().into_bytes().into())
    }
}

impl fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenKey(..)")
    }
}

/// A secret for a link or a refresh token: 32 octets of the operating system's generator, as 64 hexadecimal digits.
///
/// # Panics
/// Where the operating system has no random octets.
#[must_use]
pub fn new_secret() -> SecretString {
    let octets = Zeroizing::new(<[u8; 32]>::generate());
    // Allocated once, so that no copy is left behind by growing.
    let mut secret = String::with_capacity(2 * octets.len());
    for octet in octets.iter() {
        for digit in [octet >> 4, octet & 15] {
            secret.extend(char::from_digit(digit.into(), 16));
        }
    }
    secret.into()
}

/// A code of six digits, each of the million equally likely, from the operating system's generator.
///
/// # Panics
/// Where the operating system has no random octets.
#[must_use]
pub fn new_code() -> SecretString {
    loop {
        if let Some(code) = code(u32::generate()) {
            return format!("{code:06}").into();
        }
    }
}

/// The code of a random number: each code has as many numbers as any other. The numbers left over have none.
fn code(random: u32) -> Option<u32> {
    const CODES: u32 = 1_000_000;
    const EVEN: u32 = u32::MAX - u32::MAX % CODES;
    (random < EVEN).then_some(random % CODES)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that can't go on panics")]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use uuid::Uuid;

    fn key() -> TokenKey {
        let octets: Vec<u8> = (0..32).collect();
        TokenKey::new(&octets).unwrap()
    }

    fn user(id: u128) -> UserId {
        UserId(Uuid::from_u128(id))
    }

    fn purposes() -> [TokenPurpose<'static>; 8] {
        let email_change = |id, new_email| TokenPurpose::EmailChange {
            user_id: user(id),
            new_email,
        };
        [
            TokenPurpose::EmailOtp { user_id: user(1) },
            TokenPurpose::EmailOtp { user_id: user(2) },
            email_change(1, "a@example.org"),
            email_change(2, "a@example.org"),
            email_change(1, "b@example.org"),
            TokenPurpose::PasswordReset,
            TokenPurpose::EmailVerification,
            TokenPurpose::Refresh,
        ]
    }

    /// Digests outlive a release: these were computed by Python's `hmac`.
    #[test]
    fn digests_stay_the_same() {
        let hex = |purpose, secret: &str| -> String {
            let digest = key().digest(purpose, &secret.into());
            digest
                .as_bytes()
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect()
        };
        let [otp, _, email_change, .., refresh] = purposes();
        assert_eq!(
            hex(otp, "012345"),
            "5388644c0122e7bc55f04ebadc12671caccfd3dd226fa064dd51e0869db4d726"
        );
        assert_eq!(
            hex(email_change, "012345"),
            "9768a63644b46d853f1fb4a65b41f5d3d69ebbc51adf17c7587f39be875b4c37"
        );
        assert_eq!(
            hex(refresh, "secret"),
            "04d29fb0afa78b2ebbfcde733dc499ead6409df0fc36f9d2e88ddf7b5cb7d426"
        );
    }

    #[test]
    fn equal_secrets_for_different_purposes_have_different_digests() {
        let digests: HashSet<_> = purposes()
            .iter()
            .map(|&purpose| key().digest(purpose, &"123456".into()))
            .collect();
        assert_eq!(digests.len(), purposes().len());
        let other_key = TokenKey::new(&[7; 32]).unwrap();
        assert!(!digests.contains(&other_key.digest(TokenPurpose::Refresh, &"123456".into())));

        // The end of the address is not the beginning of the code.
        let of = |new_email, code: &str| {
            let user_id = user(1);
            key().digest(
                TokenPurpose::EmailChange { user_id, new_email },
                &code.into(),
            )
        };
        assert_ne!(of("a@example.org1", "23456"), of("a@example.org", "123456"));
    }

    #[test]
    fn a_short_key_is_refused_and_none_is_shown() {
        assert_eq!(TokenKey::new(&[7; 31]).unwrap_err(), KeyTooShort);
        assert_eq!(KeyTooShort.to_string(), "a key has at least 32 octets");
        assert_eq!(format!("{:?}", key()), "TokenKey(..)");
    }

    #[test]
    fn secrets_are_long_and_differ() {
        let secrets: HashSet<String> = (0..1000)
            .map(|_| new_secret().expose_secret().to_owned())
            .collect();
        assert_eq!(secrets.len(), 1000);
        for secret in secrets {
            assert_eq!(secret.len(), 64);
            assert!(secret.bytes().all(|digit| digit.is_ascii_hexdigit()));
        }
    }

    #[test]
    fn each_code_has_the_same_share_of_the_random_numbers() {
        // 4294 rounds of a million; the numbers from 4,294,000,000 on would be a 4295th that is cut short.
        assert_eq!(code(0), Some(0));
        assert_eq!(code(1_000_000), Some(0));
        assert_eq!(code(4_293_999_999), Some(999_999));
        assert_eq!(code(4_294_000_000), None);
        assert_eq!(code(u32::MAX), None);
        for _ in 0..1000 {
            let code = new_code();
            assert_eq!(code.expose_secret().len(), 6);
            assert!(
                code.expose_secret()
                    .bytes()
                    .all(|digit| digit.is_ascii_digit())
            );
        }
    }
}
