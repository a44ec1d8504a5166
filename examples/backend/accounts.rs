//! Accounts: sign-up, the proof of the email address, and what is stored about a user.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use bruhmcp_db::crypto::{TokenPurpose, new_secret};
use bruhmcp_db::models::{
    AuthToken, NewUser, Release, User, UserChangeset, UserError, canonical_email,
};
use bruhmcp_db::{Isolation, SecretText, retry_transaction};
use chrono::TimeDelta;
use diesel::Connection;
use diesel::pg::PgConnection;
use serde::Deserialize;
use serde_json::json;

use crate::App;
use crate::errors::Error;
use crate::http::{Answer, Bearer, Payload, answer, blocking, deferred};
use crate::passwords;
use crate::sessions::{ENDED, user};

const LINK: TimeDelta = TimeDelta::days(1);

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
    passwords::check(&new.password)?;
    // The spelling of the account: another one may be somebody else's mailbox.
    let email = canonical_email(&new.email).map_err(UserError::from)?;
    let is_name = |name: &str| name.chars().count() <= 255;
    if new.first_name.is_empty() || !is_name(&new.first_name) || !is_name(&new.last_name) {
        return Err(UserError::InvalidField("name").into());
    }
    app.mails.check(&email)?;
    deferred(app, move |app| {
        let password = passwords::hash(&new.password)?;
        let row = NewUser {
            password: Some(&password),
            ..NewUser::new(&new.first_name, &new.last_name, &email)
        };
        let user = match insert(&mut *app.db()?, &row) {
            Ok(user) => user,
            Err(UserError::EmailTaken) => {
                return app.outbox.send(&email, "you have an account");
            }
            Err(error) => return Err(error.into()),
        };
        let secret = new_secret();
        let link = app.token_key.hash(TokenPurpose::EmailVerification, &secret);
        let issued = AuthToken::issue(&mut *app.db()?, user.id, &link, LINK);
        match issued? {
            Some(_) => app.outbox.send(&user.email, secret.expose()),
            None => Ok(()),
        }
    })
    .await
}

/// An address that nobody has proved for a day is free again.
fn insert(conn: &mut PgConnection, new: &NewUser<'_>) -> Result<User, UserError> {
    match User::sign_up(conn, new) {
        Err(UserError::EmailTaken) => {
            conn.transaction(
                |conn| match User::release_unverified(conn, new.email, LINK)? {
                    Release::Kept => Err(UserError::EmailTaken),
                    Release::Released(_) | Release::Free => User::sign_up(conn, new),
                },
            )
        }
        outcome => outcome,
    }
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
            let consumed = AuthToken::consume(conn, &token)?;
            User::update(conn, consumed.user_id, &PROVED)?;
            Ok::<_, Error>(())
        })?;
        answer(StatusCode::OK, json!({}))
    })
    .await
}

/// What a mail that was received says about the user.
pub(crate) const PROVED: UserChangeset<'static> = UserChangeset {
    first_name: None,
    last_name: None,
    password: None,
    email_verified: Some(true),
    razorpay_customer_id: None,
};

pub(crate) async fn me(State(app): State<Arc<App>>, bearer: Bearer) -> Answer {
    blocking(app, move |app| {
        let user_id = user(app, &bearer)?;
        let user = User::find_active(&mut *app.db()?, user_id)?.ok_or(ENDED)?;
        answer(StatusCode::OK, json!(user))
    })
    .await
}

/// Everything that is stored about the user.
pub(crate) async fn export(State(app): State<Arc<App>>, bearer: Bearer) -> Answer {
    blocking(app, move |app| {
        let user_id = user(app, &bearer)?;
        let export = User::export(&mut *app.db()?, user_id)?.ok_or(ENDED)?;
        answer(StatusCode::OK, export)
    })
    .await
}

#[derive(Deserialize)]
pub(crate) struct Close {
    password: SecretText,
}

/// Removes the person for good. A stolen session is not enough.
pub(crate) async fn close(
    State(app): State<Arc<App>>,
    bearer: Bearer,
    Payload(close): Payload<Close>,
) -> Answer {
    blocking(app, move |app| {
        let user = passwords::confirm(app, &bearer, &close.password)?;
        // Here the backend ends the subscription at the gateway.
        retry_transaction(&mut *app.db()?, Isolation::ReadCommitted, |conn| {
            User::anonymise(conn, user.id)
        })?;
        answer(StatusCode::OK, json!({}))
    })
    .await
}
