//! Sign-up and sessions. A session is a refresh token: the client sends it with each request and
//! renews it before it expires.

use argon2::password_hash::phc::PasswordHash;
use argon2::{Argon2, PasswordHasher, PasswordVerifier};
use bruhmcp_db::crypto::{TokenPurpose, new_secret};
use bruhmcp_db::ids::UserId;
use bruhmcp_db::models::{AuthToken, NewUser, Rotation, User};
use bruhmcp_db::{HashedToken, SecretText};
use chrono::TimeDelta;
use diesel::Connection;
use oxhttp::model::{Body, Request};
use serde::Deserialize;
use serde_json::json;

use crate::App;
use crate::http::{Answer, Error, header};

const SESSION: TimeDelta = TimeDelta::days(30);
/// A session that is renewed ends too.
const LONGEST_SESSION: TimeDelta = TimeDelta::days(180);
const ENDED: Error = Error::Refused(401, "the session has ended");
const WRONG: Error = Error::Refused(401, "unknown address or wrong password");

#[derive(Deserialize)]
pub(crate) struct SignUp {
    first_name: String,
    #[serde(default)]
    last_name: String,
    email: String,
    password: SecretText,
}

/// Creates an account. A real service also sends a mail to prove the address.
pub(crate) fn sign_up(app: &App, new: &SignUp) -> Answer {
    if new.password.expose().chars().count() < 8 {
        return Err(Error::Refused(422, "a password has at least 8 characters"));
    }
    let password = hash(&new.password)?;
    let new = NewUser {
        password: Some(&password),
        ..NewUser::new(&new.first_name, &new.last_name, &new.email)
    };
    let user = User::sign_up(&mut *app.db()?, &new)?;
    Ok((201, json!(user)))
}

#[derive(Deserialize)]
pub(crate) struct LogIn {
    email: String,
    password: SecretText,
}

pub(crate) fn log_in(app: &App, login: &LogIn) -> Answer {
    let user = User::find_active_by_email(&mut *app.db()?, &login.email)?;
    // Verify a password also if there is no such user: the response time must not show which
    // addresses have an account.
    let password = user.as_ref().and_then(|user| user.password.as_ref());
    let is_right = verify(&login.password, password.unwrap_or(&app.nobodys_password));
    let user = user.filter(|_| is_right).ok_or(WRONG)?;

    let token = new_secret();
    let hashed = app.token_key.hash(TokenPurpose::Refresh, &token);
    let issued = app.db()?.transaction(|conn| {
        User::record_login(conn, user.id)?;
        AuthToken::begin_session(conn, user.id, &hashed, SESSION, LONGEST_SESSION)
    })?;
    // `None` if the user was deactivated in the meantime.
    issued.map(|issued| session(&token, &issued)).ok_or(WRONG)
}

/// Replaces the presented token with a new one. A token that is presented again later may be stolen:
/// the session ends.
pub(crate) fn renew(app: &App, request: &Request<Body>) -> Answer {
    let presented = presented(app, request)?;
    let token = new_secret();
    let successor = app.token_key.hash(TokenPurpose::Refresh, &token);
    match AuthToken::rotate(&mut *app.db()?, &presented, &successor, SESSION)? {
        Rotation::Rotated(issued) => Ok(session(&token, &issued)),
        Rotation::Reused { .. } | Rotation::Expired | Rotation::NotFound => Err(ENDED),
    }
}

pub(crate) fn log_out(app: &App, request: &Request<Body>) -> Answer {
    let presented = presented(app, request)?;
    if !AuthToken::revoke(&mut *app.db()?, &presented)? {
        return Err(ENDED);
    }
    Ok((200, json!({})))
}

/// Returns the user of the request's session.
pub(crate) fn user(app: &App, request: &Request<Body>) -> Result<UserId, Error> {
    let presented = presented(app, request)?;
    AuthToken::find_live(&mut *app.db()?, &presented)?
        .map(|session| session.user_id)
        .ok_or(ENDED)
}

fn presented(app: &App, request: &Request<Body>) -> Result<HashedToken, Error> {
    let token = header(request, "authorization")
        .and_then(|value| value.strip_prefix("Bearer "))
        .ok_or(Error::Refused(401, "log in first"))?;
    let token = SecretText::from(token);
    Ok(app.token_key.hash(TokenPurpose::Refresh, &token))
}

fn session(token: &SecretText, issued: &AuthToken) -> (u16, serde_json::Value) {
    let body = json!({ "token": token.expose(), "expires_at": issued.expires_at });
    (201, body)
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
