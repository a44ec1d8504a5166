//! The one spelling of an email address, and its change.

use diesel::prelude::*;
use unicode_normalization::UnicodeNormalization;
use unicode_properties::{GeneralCategory, UnicodeGeneralCategory};

use super::{User, UserError};
use crate::enums::AuthTokenType;
use crate::ids::UserId;
use crate::models::AuthToken;
use crate::prepared::Prepare;
use crate::schema::users;

/// The domain of anonymised users' addresses: no mail arrives there (RFC 6761, 6.4), and sign-up
/// refuses it.
pub(super) const ANONYMISED_DOMAIN: &str = "@anonymised.invalid";

/// The text is not an email address that an account can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an email address")]
pub struct InvalidEmail;

/// Returns the one spelling of an email address that is stored and looked up: trimmed, in lowercase,
/// before the `@` in Unicode's form NFC, after it in ASCII (IDNA, UTS 46).
///
/// It accepts `local@domain` with at most 255 characters. Before the `@`: letters, digits, other
/// visible characters and single dots between them, but none that mail reserves (`"(),:;<>[\]`, so
/// no quotes, no comment, no `Ada <ada@example.org>`), no white space, and none that is invisible,
/// private or unknown to Unicode. After it: a host name, so no underscore, no IP address, no dot at
/// the end. The constraint `users_email_canonical` accepts all that this returns. Whether mail
/// arrives is not checked.
///
/// Two addresses can still look alike: Latin and Cyrillic `a`, `l` and `1`, full-width letters before
/// the `@`. So can two mailboxes be one: `ada+news@` is not `ada@`. Trust an address only by what its
/// mailbox received.
///
/// ```
/// # use bruhmcp_db::models::{InvalidEmail, canonical_email};
/// assert_eq!(canonical_email(" Ada@Example.ORG\n"), Ok("ada@example.org".to_owned()));
/// assert_eq!(canonical_email("ada@bücher.example"), Ok("ada@xn--bcher-kva.example".to_owned()));
/// assert_eq!(canonical_email("ada"), Err(InvalidEmail));
/// assert_eq!(canonical_email("Ada <ada@example.org>"), Err(InvalidEmail));
/// ```
///
/// # Errors
/// [`InvalidEmail`].
pub fn canonical_email(email: &str) -> Result<String, InvalidEmail> {
    let email = email.trim();
    // No longer text is worth the work. Mapping can shorten a text, so 255 would be too few.
    if email.len() > 4 * 255 {
        return Err(InvalidEmail);
    }
    let (local, domain) = email.split_once('@').ok_or(InvalidEmail)?;
    let local = local_part(local)?;
    let domain = idna::domain_to_ascii_strict(domain).map_err(|_| InvalidEmail)?;
    let last = domain.rsplit('.').next().unwrap_or_default();
    let email = format!("{local}@{domain}");
    // A last label of digits alone is that of an IPv4 address.
    if last.bytes().all(|byte| byte.is_ascii_digit()) || email.chars().count() > 255 {
        return Err(InvalidEmail);
    }
    Ok(email)
}

fn local_part(local: &str) -> Result<String, InvalidEmail> {
    let local: String = local.to_lowercase().nfc().collect();
    if local.split('.').any(str::is_empty) || !local.chars().all(is_allowed) {
        return Err(InvalidEmail);
    }
    Ok(local)
}

/// Whether the character may stand before the `@`.
fn is_allowed(c: char) -> bool {
    use GeneralCategory::{
        Control, Format, LineSeparator, ParagraphSeparator, PrivateUse, SpaceSeparator, Surrogate,
        Unassigned,
    };
    if c.is_ascii() {
        return c.is_ascii_graphic() && !"\"(),:;<>@[\\]".contains(c);
    }
    !is_ignorable(c)
        // U+2800 is a symbol without ink.
        && c != '\u{2800}'
        && !matches!(
            c.general_category(),
            Control
                | Format
                | LineSeparator
                | ParagraphSeparator
                | PrivateUse
                | SpaceSeparator
                | Surrogate
                | Unassigned
        )
}

/// Whether the character is a letter or a mark that is not to be seen: those of Unicode's
/// `Default_Ignorable_Code_Point` whose category doesn't tell.
fn is_ignorable(c: char) -> bool {
    matches!(
        c,
        '\u{34f}'
            | '\u{115f}'..='\u{1160}'
            | '\u{17b4}'..='\u{17b5}'
            | '\u{180b}'..='\u{180f}'
            | '\u{3164}'
            | '\u{fe00}'..='\u{fe0f}'
            | '\u{ffa0}'
            | '\u{e0100}'..='\u{e01ef}'
    )
}

/// Like [`canonical_email`], but refuses the addresses of anonymised users.
pub(super) fn new_email(email: &str) -> Result<String, InvalidEmail> {
    let email = canonical_email(email)?;
    if email.ends_with(ANONYMISED_DOMAIN) {
        return Err(InvalidEmail);
    }
    Ok(email)
}

pub(in crate::models) fn anonymised_email(id: UserId) -> String {
    format!("{id}{ANONYMISED_DOMAIN}")
}

impl User {
    /// Gives an active user another email address, in any spelling; returns `None` if there is no
    /// such user.
    ///
    /// `email_verified` becomes `proven`: whether the user has shown that mail to the new address
    /// arrives, for example by the code of an
    /// [`EmailChangePending`](AuthTokenType::EmailChangePending) token. Codes and links that were
    /// sent to the old address are revoked. Refresh tokens stay valid, so the user stays signed in.
    ///
    /// Locks the user `FOR UPDATE` until the transaction ends.
    ///
    /// # Errors
    /// [`UserError::InvalidEmail`] and [`UserError::EmailTaken`], after which the caller's
    /// transaction can go on.
    pub fn change_email(
        conn: &mut PgConnection,
        id: UserId,
        email: &str,
        proven: bool,
    ) -> Result<Option<Self>, UserError> {
        use AuthTokenType::{EmailChangePending, EmailOtp, EmailVerification, PasswordReset};
        let email = new_email(email)?;
        conn.transaction(|conn| {
            // An update of a key column locks the row FOR UPDATE, also without a SELECT before.
            let user = diesel::update(users::table.find(id))
                .filter(users::is_active)
                .set((users::email.eq(email), users::email_verified.eq(proven)))
                .returning(Self::as_returning())
                .prepared()
                .get_result(conn)
                .optional()?;
            if user.is_some() {
                let mailed = [
                    EmailOtp,
                    PasswordReset,
                    EmailVerification,
                    EmailChangePending,
                ];
                AuthToken::revoke_all(conn, id, Some(&mailed))?;
            }
            Ok(user)
        })
    }
}
