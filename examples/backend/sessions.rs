//! Sessions. A session is a refresh token: the client sends it with each request and renews it
//! before it expires. It begins with a password, or with a code that was mailed.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use bruhmcp_db::crypto::{TokenPurpose, new_code, new_secret};
use bruhmcp_db::ids::{FamilyId, UserId};
use bruhmcp_db::models::{AuthToken, CodeCheck, Rotation, User};
use bruhmcp_db::{HashedToken, SecretText};
use chrono::TimeDelta;
use diesel::Connection;
use serde::Deserialize;
use serde_json::json;

use crate::App;
use crate::accounts::PROVED;
use crate::errors::{Error, NOT_FOUND};
use crate::http::{Answer, Bearer, Payload, answer, blocking, deferred, levelled};
use crate::passwords::{Ask, verify};

const SESSION: TimeDelta = TimeDelta::days(30);
/// A session that is renewed ends too.
const LONGEST_SESSION: TimeDelta = TimeDelta::days(180);
const CODE: TimeDelta = TimeDelta::minutes(10);
pub(crate) const ENDED: Error = Error::Refused(401, "the session has ended");
pub(crate) const WRONG: Error = Error::Refused(401, "unknown address or wrong password");
const WRONG_CODE: Error = Error::Refused(401, "unknown address or wrong code");

#[derive(Deserialize)]
pub(crate) struct LogIn {
    email: String,
    password: SecretText,
}

pub(crate) async fn log_in(State(app): State<Arc<App>>, Payload(login): Payload<LogIn>) -> Answer {
    blocking(app, move |app| {
        app.logins.check(&login.email)?;
        let user = User::find_active_by_email(&mut *app.db()?, &login.email)?;
        // Verify a password also if there is no such user: the response time must not show which
        // addresses have an account.
        let password = user.as_ref().and_then(|user| user.password.as_ref());
        let is_right = verify(&login.password, password.unwrap_or(&app.nobodys_password));
        let user = user.filter(|_| is_right).ok_or(WRONG)?;
        if !user.email_verified {
            return Err(Error::Refused(403, "open the link in the mail first"));
        }
        begin(app, user.id)
    })
    .await
}

/// Mails a code to the address if it has an account. The answer doesn't depend on it.
pub(crate) async fn ask_code(State(app): State<Arc<App>>, Payload(ask): Payload<Ask>) -> Answer {
    app.mails.check(&ask.email)?;
    deferred(app, move |app| {
        let Some(user) = User::find_active_by_email(&mut *app.db()?, &ask.email)? else {
            return Ok(());
        };
        let code = new_code();
        let purpose = TokenPurpose::EmailOtp { user_id: user.id };
        let hashed = app.token_key.hash(purpose, &code);
        let issued = AuthToken::issue(&mut *app.db()?, user.id, &hashed, CODE);
        match issued? {
            Some(_) => app.outbox.send(&user.email, code.expose()),
            None => Ok(()),
        }
    })
    .await
}

#[derive(Deserialize)]
pub(crate) struct Code {
    email: String,
    code: SecretText,
}

/// Counting a guess takes longer than finding that there is nothing to guess.
pub(crate) async fn log_in_by_code(
    State(app): State<Arc<App>>,
    Payload(login): Payload<Code>,
) -> Answer {
    levelled(blocking(app, move |app| by_code(app, &login))).await
}

fn by_code(app: &App, login: &Code) -> Answer {
    app.logins.check(&login.email)?;
    let user = User::find_active_by_email(&mut *app.db()?, &login.email)?.ok_or(WRONG_CODE)?;
    let purpose = TokenPurpose::EmailOtp { user_id: user.id };
    let guess = app.token_key.hash(purpose, &login.code);
    // Every other outcome has one answer: whether there is a code would tell of an account.
    let CodeCheck::Right(_) = AuthToken::check_code(&mut *app.db()?, user.id, &guess)? else {
        return Err(WRONG_CODE);
    };
    if !user.email_verified {
        // Somebody else may have signed up with this address and a password, and waits for its
        // owner to prove it.
        app.db()?.transaction(|conn| {
            User::change_password(conn, user.id, None)?;
            User::update(conn, user.id, &PROVED)?;
            Ok::<_, Error>(())
        })?;
    }
    begin(app, user.id)
}

/// Begins a session of a user who has proved to be the one.
pub(crate) fn begin(app: &App, user_id: UserId) -> Answer {
    let token = new_secret();
    let hashed = app.token_key.hash(TokenPurpose::Refresh, &token);
    let issued = app.db()?.transaction(|conn| {
        User::record_login(conn, user_id)?;
        AuthToken::begin_session(conn, user_id, &hashed, SESSION, LONGEST_SESSION)
    })?;
    // `None` if the user was deactivated in the meantime.
    shown(&token, &issued.ok_or(WRONG)?)
}

/// Replaces the presented token with a new one. A token that is presented again later may be stolen:
/// the session ends.
pub(crate) async fn renew(State(app): State<Arc<App>>, bearer: Bearer) -> Answer {
    blocking(app, move |app| {
        let token = new_secret();
        let successor = app.token_key.hash(TokenPurpose::Refresh, &token);
        let presented = presented(app, &bearer);
        match AuthToken::rotate(&mut *app.db()?, &presented, &successor, SESSION)? {
            Rotation::Rotated(issued) => shown(&token, &issued),
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

/// Lists the user's sessions, one for each device.
pub(crate) async fn list(State(app): State<Arc<App>>, bearer: Bearer) -> Answer {
    blocking(app, move |app| {
        let user_id = user(app, &bearer)?;
        let sessions = AuthToken::list_sessions(&mut *app.db()?, user_id)?;
        answer(StatusCode::OK, json!({ "sessions": sessions }))
    })
    .await
}

/// Signs out another device.
pub(crate) async fn end(
    State(app): State<Arc<App>>,
    bearer: Bearer,
    Path(id): Path<String>,
) -> Answer {
    blocking(app, move |app| {
        let user_id = user(app, &bearer)?;
        let id: FamilyId = id.parse().map_err(|_| NOT_FOUND)?;
        if !AuthToken::end_session(&mut *app.db()?, user_id, id)? {
            return Err(NOT_FOUND);
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

fn shown(token: &SecretText, issued: &AuthToken) -> Answer {
    let body = json!({ "token": token.expose(), "expires_at": issued.expires_at });
    answer(StatusCode::CREATED, body)
}
