//! Reading requests, and mapping outcomes to responses.

use std::io::Read;

use bruhmcp_db::models::{CredentialError, InstanceError, PaymentError, PlanError, UserError};
use bruhmcp_db::{ConstraintKind, ConstraintViolation, crypto};
use diesel::result::Error as DieselError;
use oxhttp::model::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use oxhttp::model::{Body, HeaderValue, Request, Response, StatusCode};
use serde::de::DeserializeOwned;
use serde_json::Value;

pub(crate) type Answer = Result<(u16, Value), Error>;

pub(crate) const NOT_FOUND: Error = Error::Refused(404, "not found");

const MAX_BODY_LEN: u64 = 64 * 1024;

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
            UserError::EmailTaken => Error::Refused(409, "the email address is taken"),
            UserError::Database(error) => error.into(),
            _ => Error::Internal("the account was not changed"),
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

impl From<crypto::SealError> for Error {
    fn from(error: crypto::SealError) -> Self {
        match error {
            crypto::SealError::TooLong => Error::Refused(422, "the secret is too long"),
            _ => Self::Internal("no random bytes"),
        }
    }
}

/// Reads the body, if it is not longer than [`MAX_BODY_LEN`] bytes.
pub(crate) fn body(request: &mut Request<Body>) -> Result<Vec<u8>, Error> {
    let mut body = Vec::new();
    let mut reader = request.body_mut().take(MAX_BODY_LEN + 1);
    reader
        .read_to_end(&mut body)
        .map_err(|_| Error::Refused(400, "the body can't be read"))?;
    if body.len() as u64 > MAX_BODY_LEN {
        return Err(Error::Refused(413, "the body is too large"));
    }
    Ok(body)
}

pub(crate) fn json<T: DeserializeOwned>(request: &mut Request<Body>) -> Result<T, Error> {
    parse(&body(request)?)
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

/// Returns a value of the query string. The values that this service expects need no unescaping.
pub(crate) fn query<'a>(request: &'a Request<Body>, key: &str) -> Option<&'a str> {
    let mut pairs = request.uri().query()?.split('&');
    pairs.find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='))
}

pub(crate) fn header<'a>(request: &'a Request<Body>, name: &str) -> Option<&'a str> {
    request.headers().get(name)?.to_str().ok()
}

pub(crate) fn response(answer: Answer) -> Response<Body> {
    let (status, body) = answer.unwrap_or_else(|error| {
        let (status, why) = error.refusal().unwrap_or_else(|| failure(&error));
        (status, serde_json::json!({ "error": why }))
    });
    let mut response = Response::new(Body::from(body.to_string()));
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if status == StatusCode::SERVICE_UNAVAILABLE {
        headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
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
