//! Reading requests, and mapping outcomes to responses.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::header::{AUTHORIZATION, RETRY_AFTER};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use bruhmcp_db::models::{
    CredentialError, InstanceError, IssueError, PaymentError, PlanError, UserError, WebhookError,
};
use bruhmcp_db::{ConstraintKind, ConstraintViolation, SecretText, crypto};
use diesel::result::Error as DieselError;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::App;

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

pub(crate) const NOT_FOUND: Error = Error::Refused(404, "not found");

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The request is refused with this status and message.
    #[error("{1}")]
    Refused(u16, &'static str),
    #[error("no database connection is free")]
    Unavailable,
    #[error("{0}")]
    Internal(&'static str),
    #[error("database error")]
    Database(#[from] DieselError),
}

impl Error {
    /// Status and message for the client, if the request itself is at fault.
    pub(crate) fn refusal(&self) -> Option<(u16, String)> {
        match self {
            Self::Refused(status, why) => Some((*status, (*why).to_owned())),
            Self::Database(error) => ConstraintViolation::of(error).map(|violation| {
                let status = match violation.kind {
                    ConstraintKind::Unique => 409,
                    _ => 422,
                };
                (status, format!("violates {}", violation.constraint))
            }),
            Self::Unavailable | Self::Internal(_) => None,
        }
    }
}

impl From<UserError> for Error {
    fn from(error: UserError) -> Self {
        match error {
            UserError::InvalidEmail(_) => Error::Refused(422, "not an email address"),
            UserError::InvalidField(_) => Error::Refused(422, "a name is empty or too long"),
            UserError::EmailTaken => Error::Refused(409, "the email address is taken"),
            UserError::Database(error) => error.into(),
            _ => Error::Internal("the account was not changed"),
        }
    }
}

impl From<IssueError> for Error {
    fn from(error: IssueError) -> Self {
        match error {
            IssueError::TooMany { .. } => Error::Refused(429, "too many mails: wait an hour"),
            IssueError::Database(error) => error.into(),
            _ => Self::Internal("no token was issued"),
        }
    }
}

impl From<InstanceError> for Error {
    fn from(error: InstanceError) -> Self {
        match error {
            InstanceError::LimitReached => {
                Error::Refused(403, "the plan allows no more active instances")
            }
            InstanceError::PlanExpired => Error::Refused(403, "the plan has expired"),
            InstanceError::PlanMissing => Error::Refused(403, "there is no plan"),
            InstanceError::ServiceDisabled => Error::Refused(409, "the service is disabled"),
            InstanceError::UnknownService => Error::Refused(422, "there is no such service"),
            InstanceError::InvalidClientId => {
                Error::Refused(422, "the client id is empty or too long")
            }
            InstanceError::NotFound => NOT_FOUND,
            InstanceError::InstanceExpired => Error::Refused(409, "the instance has expired"),
            InstanceError::Database(error) => error.into(),
            _ => Self::Internal("the instance was not changed"),
        }
    }
}

impl From<CredentialError> for Error {
    fn from(error: CredentialError) -> Self {
        match error {
            CredentialError::UnknownState => Error::Refused(400, "no authorization has this state"),
            CredentialError::Conflict(_) => Error::Refused(409, "the authorization isn't pending"),
            CredentialError::Invalid(why) => Error::Refused(422, why),
            CredentialError::NotFound => Error::Refused(409, "the instance is gone"),
            CredentialError::Database(error) => error.into(),
            _ => Self::Internal("the credentials were not changed"),
        }
    }
}

impl From<PaymentError> for Error {
    fn from(error: PaymentError) -> Self {
        match error {
            PaymentError::Database(error) => error.into(),
            PaymentError::Differs(_) => Error::Refused(409, "another payment has this id"),
            // This service neither refunds nor advances payments.
            _ => Error::Refused(422, "not a payment"),
        }
    }
}

impl From<PlanError> for Error {
    fn from(error: PlanError) -> Self {
        match error {
            PlanError::NotFound => Error::Refused(422, "there is no such user"),
            PlanError::SubscriptionTaken | PlanError::CustomerTaken => {
                Error::Refused(409, "another user has the subscription")
            }
            PlanError::Database(error) => error.into(),
            _ => Error::Internal("the plan was not changed"),
        }
    }
}

impl From<WebhookError> for Error {
    fn from(error: WebhookError) -> Self {
        match error {
            WebhookError::Database(error) => error.into(),
            _ => Error::Internal("another worker has the event"),
        }
    }
}

impl From<crypto::SealError> for Error {
    fn from(error: crypto::SealError) -> Self {
        match error {
            crypto::SealError::TooLong => Error::Refused(422, "the secret is too long"),
            _ => Self::Internal("no random bytes"),
        }
    }
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

impl From<BytesRejection> for Error {
    fn from(rejection: BytesRejection) -> Self {
        if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
            Self::Refused(413, "the body is too large")
        } else {
            Self::Refused(400, "the body can't be read")
        }
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

pub(crate) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

pub(crate) fn answer(status: StatusCode, body: Value) -> Answer {
    Ok((status, Json(body)))
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let (status, why) = self.refusal().unwrap_or_else(|| failure(&self));
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = Json(json!({ "error": why }));
        let later = [
            StatusCode::SERVICE_UNAVAILABLE,
            StatusCode::TOO_MANY_REQUESTS,
        ];
        if later.contains(&status) {
            (status, [(RETRY_AFTER, "1")], body).into_response()
        } else {
            (status, body).into_response()
        }
    }
}

/// Returns status and message of a failure that is not the client's fault, and logs it.
///
/// A database error that is no violated constraint is an outage or a conflict after all retries:
/// the client can try again. The log gets the kind of error only, because PostgreSQL's messages may
/// quote values.
fn failure(error: &Error) -> (u16, String) {
    match error {
        Error::Database(DieselError::DatabaseError(kind, _)) => eprintln!("{error}: {kind:?}"),
        Error::Database(reason) => eprintln!("{error}: {reason}"),
        error => eprintln!("{error}"),
    }
    match error {
        Error::Internal(_) => (500, "internal error".to_owned()),
        _ => (503, "try again in a moment".to_owned()),
    }
}
