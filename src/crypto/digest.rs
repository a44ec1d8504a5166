//! One-time secrets and their digests.

use std::fmt;

use aes_gcm::aead::Generate;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::crypto::KeyError;
use crate::enums::AuthTokenType;
use crate::ids::UserId;
use crate::secret::{HashedToken, SecretText, StateDigest};

/// What a one-time secret is for, and for whom.
///
/// All of it is part of the digest. So a digest is useless as another type, and the digest of a
/// code is useless in another user's row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenPurpose<'a> {
    /// A six-digit code to sign in.
    EmailOtp {
        /// The user the code was sent to: two users can get the same code.
        user_id: UserId,
    },
    /// A six-digit code to prove a new email address.
    EmailChange {
        /// The user who changes the address.
        user_id: UserId,
        /// The address that the code was sent to, [canonical](crate::models::canonical_email).
        new_email: &'a str,
    },
    /// A link to reset a password.
    PasswordReset,
    /// A link to verify an email address.
    EmailVerification,
    /// A refresh token.
    Refresh,
}

impl TokenPurpose<'_> {
    /// The type of the token's row.
    #[must_use]
    pub fn type_(self) -> AuthTokenType {
        match self {
            Self::EmailOtp { .. } => AuthTokenType::EmailOtp,
            Self::EmailChange { .. } => AuthTokenType::EmailChangePending,
            Self::PasswordReset => AuthTokenType::PasswordReset,
            Self::EmailVerification => AuthTokenType::EmailVerification,
            Self::Refresh => AuthTokenType::Refresh,
        }
    }
}

/// The key of the digests. Keep it outside the database: with a digest and the key, a six-digit
/// code is quickly guessed.
///
/// Another key invalidates all codes, links, refresh tokens and pending authorizations. The key is
/// wiped from memory when it is dropped.
///
/// ```
/// use bruhmcp_db::crypto::{TokenKey, TokenPurpose, new_secret};
///
/// let key = TokenKey::new(b"32 bytes from the environment...")?;
/// let secret = new_secret(); // for the link
/// let token = key.hash(TokenPurpose::PasswordReset, &secret); // for AuthToken::issue
/// # Ok::<(), bruhmcp_db::crypto::KeyError>(())
/// ```
#[derive(Clone)]
pub struct TokenKey(Zeroizing<Vec<u8>>);

impl TokenKey {
    /// The minimum length of a key in bytes: the length of a digest.
    pub const MIN_LEN: usize = 32;

    /// Copies the key. Its bytes must be random; a password isn't.
    ///
    /// # Errors
    /// [`KeyError::TooShort`].
    pub fn new(key: &[u8]) -> Result<Self, KeyError> {
        if key.len() < Self::MIN_LEN {
            return Err(KeyError::TooShort);
        }
        Ok(Self(key.to_vec().into()))
    }

    /// Returns the type of the token with the HMAC-SHA-256 of its purpose and secret.
    #[must_use]
    pub fn hash(&self, purpose: TokenPurpose<'_>, secret: &SecretText) -> HashedToken {
        let mut mac = self.mac();
        // No two inputs give the same bytes: the name ends with a zero, an id has 16 bytes, and a
        // length precedes the text.
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
        mac.update(secret.expose().as_bytes());
        HashedToken::new(purpose.type_(), mac.finalize().into_bytes().into())
    }

    /// Returns the HMAC-SHA-256 of the state of an authorization, which no token has.
    #[must_use]
    pub fn hash_state(&self, state: &SecretText) -> StateDigest {
        let mut mac = self.mac();
        mac.update(b"oauth_state\0");
        mac.update(state.expose().as_bytes());
        StateDigest::new(mac.finalize().into_bytes().into())
    }

    fn mac(&self) -> Hmac<Sha256> {
        Hmac::new_from_slice(&self.0).expect("HMAC takes a key of any length")
    }
}

impl fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenKey(..)")
    }
}

/// Returns a secret for a link or a refresh token: 32 bytes of the operating system's generator in
/// hexadecimal.
///
/// # Panics
/// If the operating system has no random bytes.
#[must_use]
pub fn new_secret() -> SecretText {
    let bytes = Zeroizing::new(<[u8; 32]>::generate());
    // Allocated once: a string that grows leaves copies behind.
    let mut secret = String::with_capacity(2 * bytes.len());
    for byte in bytes.iter() {
        for digit in [byte >> 4, byte & 15] {
            secret.extend(char::from_digit(digit.into(), 16));
        }
    }
    secret.into()
}

/// Returns the S256 code challenge of a verifier for PKCE (RFC 7636, 4.2). [`new_secret`] makes a
/// verifier.
#[must_use]
pub fn code_challenge(verifier: &SecretText) -> String {
    const BASE64URL: &[u8; 64] =
        b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let digest = Sha256::digest(verifier.expose().as_bytes());
    // Six bits a character; without padding, the last byte gives a part of one.
    (0..43)
        .map(|place| {
            let (byte, bit) = (place * 6 / 8, place * 6 % 8);
            let next = digest.get(byte + 1).copied().unwrap_or(0);
            let bits = u16::from_be_bytes([digest[byte], next]) >> (10 - bit) & 63;
            char::from(BASE64URL[usize::from(bits)])
        })
        .collect()
}

/// Returns a six-digit code of the operating system's generator; each code is equally likely.
///
/// # Panics
/// If the operating system has no random bytes.
#[must_use]
pub fn new_code() -> SecretText {
    loop {
        if let Some(code) = code(u32::generate()) {
            return format!("{code:06}").into();
        }
    }
}

/// Maps a random number to a code, or to none if the number is above the last full million.
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
        let bytes: Vec<u8> = (0..32).collect();
        TokenKey::new(&bytes).unwrap()
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

    /// Stored digests must stay valid. These were computed by Python's `hmac`.
    #[test]
    fn digests_stay_the_same() {
        let hex = |purpose, secret: &str| -> String {
            let token = key().hash(purpose, &secret.into());
            token
                .digest
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
        let state = key().hash_state(&"secret".into());
        let state = state.as_bytes().iter().map(|b| format!("{b:02x}"));
        assert_eq!(
            state.collect::<String>(),
            "9a12deedb1465e6e9a4781ae049e8d9763dd3b7979a503c38587664ed216f977"
        );
    }

    #[test]
    fn equal_secrets_for_different_purposes_have_different_digests() {
        let digests: HashSet<_> = purposes()
            .iter()
            .map(|&purpose| key().hash(purpose, &"123456".into()).digest)
            .collect();
        assert_eq!(digests.len(), purposes().len());
        let other_key = TokenKey::new(&[7; 32]).unwrap();
        let other = other_key.hash(TokenPurpose::Refresh, &"123456".into());
        assert!(!digests.contains(&other.digest));
        let state = key().hash_state(&"123456".into());
        assert!(
            digests
                .iter()
                .all(|digest| digest.as_bytes() != state.as_bytes())
        );

        // Bytes can't move from the address to the code.
        let of = |new_email, code: &str| {
            let user_id = user(1);
            key().hash(
                TokenPurpose::EmailChange { user_id, new_email },
                &code.into(),
            )
        };
        assert_ne!(of("a@example.org1", "23456"), of("a@example.org", "123456"));
    }

    /// The example of RFC 7636, appendix B.
    #[test]
    fn a_code_challenge_is_that_of_the_standard() {
        let verifier = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk".into();
        assert_eq!(
            code_challenge(&verifier),
            "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"
        );
    }

    #[test]
    fn a_short_key_is_refused_and_none_is_shown() {
        assert_eq!(TokenKey::new(&[7; 31]).unwrap_err(), KeyError::TooShort);
        assert_eq!(format!("{:?}", key()), "TokenKey(..)");
    }

    #[test]
    fn secrets_are_long_and_differ() {
        let secrets: HashSet<String> = (0..1000)
            .map(|_| new_secret().expose().to_owned())
            .collect();
        assert_eq!(secrets.len(), 1000);
        for secret in secrets {
            assert_eq!(secret.len(), 64);
            assert!(secret.bytes().all(|digit| digit.is_ascii_hexdigit()));
        }
    }

    #[test]
    fn each_code_has_the_same_share_of_the_random_numbers() {
        // 4294 full millions; the numbers from 4,294,000,000 on would favour the lower codes.
        assert_eq!(code(0), Some(0));
        assert_eq!(code(1_000_000), Some(0));
        assert_eq!(code(4_293_999_999), Some(999_999));
        assert_eq!(code(4_294_000_000), None);
        assert_eq!(code(u32::MAX), None);
        for _ in 0..1000 {
            let code = new_code();
            assert_eq!(code.expose().len(), 6);
            assert!(code.expose().bytes().all(|digit| digit.is_ascii_digit()));
        }
    }
}
