//! Reading requests, doing their work, and answering.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use bruhmcp_db::SecretText;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::App;
use crate::errors::Error;

pub(crate) type Answer = Result<(StatusCode, Json<Value>), Error>;

/// Runs `work`, which may block, away from the threads that serve the sockets.
pub(crate) async fn blocking(
    app: Arc<App>,
    work: impl FnOnce(&App) -> Answer + Send + 'static,
) -> Answer {
    tokio::task::spawn_blocking(move || work(&app))
        .await
        .unwrap_or(Err(Error::Internal("a request panicked")))
}

/// The number of requests whose work may wait until after their answer.
pub(crate) const MAX_DEFERRED: u32 = 64;

/// Answers at once and does the work afterwards: neither the answer nor the time it takes can tell
/// whether an address has an account.
pub(crate) async fn deferred(
    app: Arc<App>,
    work: impl FnOnce(&App) -> Result<(), Error> + Send + 'static,
) -> Answer {
    let slot = Arc::clone(&app.deferred).try_acquire_owned();
    let slot = slot.map_err(|_| Error::Unavailable)?;
    // So that an outage is told.
    let connects = |app: &App| app.db().and_then(|_| answer(StatusCode::OK, Value::Null));
    drop(blocking(Arc::clone(&app), connects).await?);
    tokio::task::spawn_blocking(move || {
        match work(&app) {
            // Nobody is told, and an attacker must not fill the log.
            Ok(()) | Err(Error::Refused(..)) => {}
            Err(error) => error.log(),
        }
        drop(slot);
    });
    answer(StatusCode::ACCEPTED, json!({}))
}

/// Takes at least a quarter of a second, for work whose time depends on what an account has.
pub(crate) async fn levelled(work: impl Future<Output = Answer>) -> Answer {
    tokio::join!(work, tokio::time::sleep(Duration::from_millis(250))).0
}

/// The body of a request, from JSON.
pub(crate) struct Payload<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Payload<T> {
    type Rejection = Error;

    async fn from_request(request: Request, state: &S) -> Result<Self, Error> {
        let body = Bytes::from_request(request, state).await?;
        parse(&body).map(Self)
    }
}

pub(crate) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    // PostgreSQL can't store NUL. In JSON it can only be written this way.
    if body.windows(6).any(|text| text == br"\u0000") {
        return Err(Error::Refused(422, "a text contains NUL"));
    }
    serde_json::from_slice(body).map_err(|error| {
        if error.is_data() {
            Error::Refused(422, "a field is missing or has the wrong type")
        } else {
            Error::Refused(400, "not JSON")
        }
    })
}

/// The token that the client presents.
pub(crate) struct Bearer(pub(crate) SecretText);

impl<S: Sync> FromRequestParts<S> for Bearer {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        header(&parts.headers, AUTHORIZATION.as_str())
            .and_then(|value| value.strip_prefix("Bearer "))
            .map(|token| Self(SecretText::from(token)))
            .ok_or(Error::Refused(401, "log in first"))
    }
}

/// The text of a header that was sent once. Of two, a proxy might have checked the other one.
pub(crate) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => value.to_str().ok(),
        _ => None,
    }
}

pub(crate) fn answer(status: StatusCode, body: Value) -> Answer {
    Ok((status, Json(body)))
}
