//! Sign-up and sessions. A session is a refresh token: the client sends it with each request and
//! renews it before it expires.

use std::fs;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use argon2::password_hash::phc::PasswordHash;
use argon2::{Argon2, PasswordHasher, PasswordVerifier};
use axum::extract::State;
use axum::http::StatusCode;
use bruhmcp_db::crypto::{TokenPurpose, new_secret};
use bruhmcp_db::ids::{AuthTokenId, UserId};
use bruhmcp_db::models::{
    AuthToken, NewUser, Rotation, User, UserChangeset, UserError, canonical_email,
};
use bruhmcp_db::{HashedToken, SecretText};
use chrono::TimeDelta;
use diesel::Connection;
use governor::clock::DefaultClock;
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};
use serde::Deserialize;
use serde_json::json;

use crate::App;
use crate::http::{Answer, Bearer, Error, Payload, answer, blocking};

const SESSION: TimeDelta = TimeDelta::days(30);
const LINK: TimeDelta = TimeDelta::days(1);
/// A session that is renewed ends too.
const LONGEST_SESSION: TimeDelta = TimeDelta::days(180);
const ENDED: Error = Error::Refused(401, "the session has ended");
const WRONG: Error = Error::Refused(401, "unknown address or wrong password");

/// Limits logins for an address, right or wrong: 5 at once, then one in 10 seconds.
pub(crate) struct Guesses(RateLimiter<String, HashMapStateStore<String>, DefaultClock>);

impl Default for Guesses {
    fn default() -> Self {
        let quota = Quota::with_period(Duration::from_secs(10))
            .map(|quota| quota.allow_burst(const { NonZeroU32::new(5).unwrap() }));
        Self(RateLimiter::hashmap(
            quota.unwrap_or(Quota::per_minute(NonZeroU32::MIN)),
        ))
    }
}

impl Guesses {
    const MAX_ADDRESSES: usize = 10_000;

    fn check(&self, email: &str) -> Result<(), Error> {
        // An address without an account has the same limit, so that the answer shows nothing.
        let address = canonical_email(email).unwrap_or_default();
        if self.0.len() > Self::MAX_ADDRESSES {
            self.0.retain_recent();
        }
        self.0
            .check_key(&address)
            .map_err(|_| Error::Refused(429, "too many attempts: wait 10 seconds"))
    }
}

#[derive(Deserialize)]
pub(crate) struct SignUp {
    first_name: String,
    #[serde(default)]
    last_name: String,
    email: String,
    password: SecretText,
}

/// Creates an account and mails a link that proves the address.
///
/// The answer is the same if the address has an account; only its owner gets another mail.
pub(crate) async fn sign_up(State(app): State<Arc<App>>, Payload(new): Payload<SignUp>) -> Answer {
    blocking(app, move |app| {
        if new.password.expose().chars().count() < 8 {
            return Err(Error::Refused(422, "a password has at least 8 characters"));
        }
        let password = hash(&new.password)?;
        let row = NewUser {
            password: Some(&password),
            ..NewUser::new(&new.first_name, &new.last_name, &new.email)
        };
        let secret = new_secret();
        let link = app.token_key.hash(TokenPurpose::EmailVerification, &secret);
        let signed_up = app.db()?.transaction(|conn| {
            let user = match User::sign_up(conn, &row) {
                Err(UserError::EmailTaken) => return Ok(None),
                signed_up => signed_up?,
            };
            AuthToken::issue(conn, user.id, &link, LINK)?;
            Ok::<_, Error>(Some(user))
        })?;
        match signed_up {
            Some(user) => mail(app, &user.email, secret.expose())?,
            None => mail(app, &new.email, "you have an account")?,
        }
        answer(StatusCode::ACCEPTED, json!({}))
    })
    .await
}

#[derive(Deserialize)]
pub(crate) struct Link {
    token: SecretText,
}

pub(crate) async fn verify_email(
    State(app): State<Arc<App>>,
    Payload(link): Payload<Link>,
) -> Answer {
    blocking(app, move |app| {
        let token = app
            .token_key
            .hash(TokenPurpose::EmailVerification, &link.token);
        app.db()?.transaction(|conn| {
            let consumed = AuthToken::consume(conn, &token)
                .map_err(|_| Error::Refused(409, "the link was used or has expired"))?;
            let verified = UserChangeset {
                email_verified: Some(true),
                ..UserChangeset::default()
            };
            User::update(conn, consumed.user_id, &verified)?;
            Ok::<_, Error>(())
        })?;
        answer(StatusCode::OK, json!({}))
    })
    .await
}

pub(crate) async fn me(State(app): State<Arc<App>>, bearer: Bearer) -> Answer {
    blocking(app, move |app| {
        let user_id = user(app, &bearer)?;
        let user = User::find_active(&mut *app.db()?, user_id)?.ok_or(ENDED)?;
        answer(StatusCode::OK, json!(user))
    })
    .await
}

#[derive(Deserialize)]
pub(crate) struct LogIn {
    email: String,
    password: SecretText,
}

pub(crate) async fn log_in(State(app): State<Arc<App>>, Payload(login): Payload<LogIn>) -> Answer {
    blocking(app, move |app| {
        app.guesses.check(&login.email)?;
        let user = User::find_active_by_email(&mut *app.db()?, &login.email)?;
        // Verify a password also if there is no such user: the response time must not show which
        // addresses have an account.
        let password = user.as_ref().and_then(|user| user.password.as_ref());
        let is_right = verify(&login.password, password.unwrap_or(&app.nobodys_password));
        let user = user.filter(|_| is_right).ok_or(WRONG)?;
        if !user.email_verified {
            return Err(Error::Refused(403, "open the link in the mail first"));
        }

        let token = new_secret();
        let hashed = app.token_key.hash(TokenPurpose::Refresh, &token);
        let issued = app.db()?.transaction(|conn| {
            User::record_login(conn, user.id)?;
            AuthToken::begin_session(conn, user.id, &hashed, SESSION, LONGEST_SESSION)
        })?;
        // `None` if the user was deactivated in the meantime.
        session(&token, &issued.ok_or(WRONG)?)
    })
    .await
}

/// Replaces the presented token with a new one. A token that is presented again later may be stolen:
/// the session ends.
pub(crate) async fn renew(State(app): State<Arc<App>>, bearer: Bearer) -> Answer {
    blocking(app, move |app| {
        let token = new_secret();
        let successor = app.token_key.hash(TokenPurpose::Refresh, &token);
        match AuthToken::rotate(
            &mut *app.db()?,
            &presented(app, &bearer),
            &successor,
            SESSION,
        )? {
            Rotation::Rotated(issued) => session(&token, &issued),
            Rotation::Reused { .. } | Rotation::Expired | Rotation::NotFound => Err(ENDED),
        }
    })
    .await
}

pub(crate) async fn log_out(State(app): State<Arc<App>>, bearer: Bearer) -> Answer {
    blocking(app, move |app| {
        if !AuthToken::revoke(&mut *app.db()?, &presented(app, &bearer))? {
            return Err(ENDED);
        }
        answer(StatusCode::OK, json!({}))
    })
    .await
}

/// Returns the user of the request's session.
pub(crate) fn user(app: &App, bearer: &Bearer) -> Result<UserId, Error> {
    AuthToken::find_live(&mut *app.db()?, &presented(app, bearer))?
        .map(|session| session.user_id)
        .ok_or(ENDED)
}

fn presented(app: &App, Bearer(token): &Bearer) -> HashedToken {
    app.token_key.hash(TokenPurpose::Refresh, token)
}

/// Stands for a mail: writes it into a file of the outbox.
fn mail(app: &App, to: &str, text: &str) -> Result<(), Error> {
    let file = app.outbox.join(AuthTokenId::new().to_string());
    fs::write(file, json!({ "to": to, "text": text }).to_string())
        .map_err(|_| Error::Internal("the mail was not sent"))
}

fn session(token: &SecretText, issued: &AuthToken) -> Answer {
    let body = json!({ "token": token.expose(), "expires_at": issued.expires_at });
    answer(StatusCode::CREATED, body)
}

/// Argon2id with a random salt.
pub(crate) fn hash(password: &SecretText) -> Result<SecretText, Error> {
    let hash = Argon2::default().hash_password(password.expose().as_bytes());
    hash.map(|hash| SecretText::new(hash.to_string()))
        .map_err(|_| Error::Internal("hashing a password failed"))
}

/// Compares in constant time.
fn verify(password: &SecretText, hash: &SecretText) -> bool {
    PasswordHash::new(hash.expose()).is_ok_and(|hash| {
        Argon2::default()
            .verify_password(password.expose().as_bytes(), &hash)
            .is_ok()
    })
}
