//! Passwords: their hashes, a new one by a link in a mail, and a new one by the old one.

use std::sync::Arc;

use argon2::password_hash::phc::PasswordHash;
use argon2::{Argon2, PasswordHasher, PasswordVerifier};
use axum::extract::State;
use axum::http::StatusCode;
use bruhmcp_db::SecretText;
use bruhmcp_db::crypto::{TokenPurpose, new_secret};
use bruhmcp_db::models::{AuthToken, TokenError, User};
use chrono::TimeDelta;
use diesel::Connection;
use serde::Deserialize;
use serde_json::json;

use crate::App;
use crate::accounts::PROVED;
use crate::errors::Error;
use crate::http::{Answer, Bearer, Payload, answer, blocking, deferred};
use crate::sessions::{self, ENDED, WRONG};

const LINK: TimeDelta = TimeDelta::hours(1);

#[derive(Deserialize)]
pub(crate) struct Ask {
    pub(crate) email: String,
}

/// Mails a link to the address if it has an account. The answer doesn't depend on it.
pub(crate) async fn ask(State(app): State<Arc<App>>, Payload(ask): Payload<Ask>) -> Answer {
    app.mails.check(&ask.email)?;
    deferred(app, move |app| {
        let Some(user) = User::find_active_by_email(&mut *app.db()?, &ask.email)? else {
            return Ok(());
        };
        let secret = new_secret();
        let link = app.token_key.hash(TokenPurpose::PasswordReset, &secret);
        let issued = AuthToken::issue(&mut *app.db()?, user.id, &link, LINK);
        match issued? {
            Some(_) => app.outbox.send(&user.email, secret.expose()),
            None => Ok(()),
        }
    })
    .await
}

#[derive(Deserialize)]
pub(crate) struct Reset {
    token: SecretText,
    password: SecretText,
}

/// Sets the password and ends all sessions. The link was mailed, so it proves the address too.
pub(crate) async fn reset(State(app): State<Arc<App>>, Payload(reset): Payload<Reset>) -> Answer {
    check(&reset.password)?;
    blocking(app, move |app| {
        let token = app
            .token_key
            .hash(TokenPurpose::PasswordReset, &reset.token);
        // Hashing is slow by design: not for everybody.
        if AuthToken::find_live(&mut *app.db()?, &token)?.is_none() {
            return Err(TokenError::NotFound.into());
        }
        let password = hash(&reset.password)?;
        app.db()?.transaction(|conn| {
            let user = User::reset_password(conn, &token, &password)?;
            User::update(conn, user.id, &PROVED)?;
            Ok::<_, Error>(())
        })?;
        answer(StatusCode::OK, json!({}))
    })
    .await
}

#[derive(Deserialize)]
pub(crate) struct Change {
    old: SecretText,
    new: SecretText,
}

/// Changes the password and ends all sessions. The answer is a new one, for this device.
pub(crate) async fn change(
    State(app): State<Arc<App>>,
    bearer: Bearer,
    Payload(change): Payload<Change>,
) -> Answer {
    check(&change.new)?;
    blocking(app, move |app| {
        let user_id = confirm(app, &bearer, &change.old)?.id;
        let password = hash(&change.new)?;
        User::change_password(&mut *app.db()?, user_id, Some(&password))?.ok_or(ENDED)?;
        sessions::begin(app, user_id)
    })
    .await
}

/// Returns the user of the session, if this is the password. A user without one sets it by a link.
pub(crate) fn confirm(app: &App, bearer: &Bearer, password: &SecretText) -> Result<User, Error> {
    let user_id = sessions::user(app, bearer)?;
    let user = User::find_active(&mut *app.db()?, user_id)?.ok_or(ENDED)?;
    // Who has stolen a session must not guess faster than others.
    app.logins.check(&user.email)?;
    let is_right = user
        .password
        .as_ref()
        .is_some_and(|hash| verify(password, hash));
    if is_right { Ok(user) } else { Err(WRONG) }
}

pub(crate) fn check(password: &SecretText) -> Result<(), Error> {
    match password.expose().chars().count() {
        8.. => Ok(()),
        _ => Err(Error::Refused(422, "a password has at least 8 characters")),
    }
}

/// Argon2id with a random salt.
pub(crate) fn hash(password: &SecretText) -> Result<SecretText, Error> {
    let hash = Argon2::default().hash_password(password.expose().as_bytes());
    hash.map(|hash| SecretText::new(hash.to_string()))
        .map_err(|_| Error::Internal("hashing a password failed"))
}

/// Compares in constant time.
pub(crate) fn verify(password: &SecretText, hash: &SecretText) -> bool {
    PasswordHash::new(hash.expose()).is_ok_and(|hash| {
        Argon2::default()
            .verify_password(password.expose().as_bytes(), &hash)
            .is_ok()
    })
}
