//! Requests read, outcomes answered.

use std::io::Read;

use bruhmcp_db::models::{EmailError, InstanceError, OauthError, PaymentError, UpgradeError};
use bruhmcp_db::{ConstraintViolation, RuleKind, crypto, is_transient};
use diesel::result::{DatabaseErrorKind, Error as DieselError};
use oxhttp::model::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use oxhttp::model::{Body, HeaderValue, Request, Response, StatusCode};
use serde::de::DeserializeOwned;
use serde_json::Value;

pub(crate) type Answer = Result<(StatusCode, Value), Error>;

const MAX_BODY_LEN: u64 = 64 * 1024;

/// Why a request isn't done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The client hears why.
    #[error("{1}")]
    Refused(StatusCode, &'static str),
    #[error("no database connection is free")]
    Unavailable,
    #[error("{0}")]
    Internal(&'static str),
    #[error("database error")]
    Database(#[from] DieselError),
}

impl Error {
    /// What the client is told, where it is about the request: the same request would be refused again.
    pub(crate) fn refusal(&self) -> Option<(StatusCode, String)> {
        match self {
            Self::Refused(status, why) => Some((*status, (*why).to_owned())),
            Self::Database(error) => ConstraintViolation::of(error).map(|broken| {
                let status = match broken.kind {
                    RuleKind::Unique => StatusCode::CONFLICT,
                    _ => StatusCode::UNPROCESSABLE_ENTITY,
                };
                (status, format!("breaks the rule {}", broken.rule))
            }),
            Self::Unavailable | Self::Internal(_) => None,
        }
    }
}

impl From<EmailError> for Error {
    fn from(error: EmailError) -> Self {
        match error {
            EmailError::InvalidEmail(_) => unprocessable("not an email address"),
            EmailError::EmailTaken => conflict("the email address is taken"),
            EmailError::Database(error) => error.into(),
        }
    }
}

impl From<InstanceError> for Error {
    fn from(error: InstanceError) -> Self {
        match error {
            InstanceError::LimitReached => forbidden("the plan allows no further active instance"),
            InstanceError::PlanExpired => forbidden("the plan has expired"),
            InstanceError::PlanMissing => forbidden("there is no plan"),
            InstanceError::ServiceDisabled => conflict("the service is disabled"),
            InstanceError::UnknownService => unprocessable("there is no such service"),
            InstanceError::NotFound => not_found(),
            InstanceError::InstanceExpired => conflict("the instance has expired"),
            InstanceError::Database(error) => error.into(),
        }
    }
}

impl From<OauthError> for Error {
    fn from(error: OauthError) -> Self {
        match error {
            OauthError::UnknownState => bad_request("no authorisation has this state"),
            OauthError::NotPending => conflict("the authorisation isn't pending"),
            OauthError::NotOauth => conflict("the instance is gone"),
            OauthError::StateTaken => Self::Internal("a state came twice"),
            OauthError::Database(error) => error.into(),
        }
    }
}

impl From<PaymentError> for Error {
    fn from(error: PaymentError) -> Self {
        match error {
            PaymentError::Database(error) => error.into(),
            PaymentError::Differs(_) => conflict("another payment has this id"),
            // Refunds and steps of a payment, which this service doesn't know.
            _ => unprocessable("not a payment"),
        }
    }
}

impl From<UpgradeError> for Error {
    fn from(error: UpgradeError) -> Self {
        match error {
            UpgradeError::PlanMissing => unprocessable("there is no such user"),
            UpgradeError::SubscriptionTaken | UpgradeError::CustomerTaken => {
                conflict("another user has the subscription")
            }
            UpgradeError::Database(error) => error.into(),
        }
    }
}

impl From<crypto::SealError> for Error {
    fn from(error: crypto::SealError) -> Self {
        match error {
            crypto::SealError::TooLong => unprocessable("the secret is too long"),
            crypto::SealError::NoRandomness => Self::Internal("no random octets"),
        }
    }
}

pub(crate) fn bad_request(why: &'static str) -> Error {
    Error::Refused(StatusCode::BAD_REQUEST, why)
}

pub(crate) fn unauthorized(why: &'static str) -> Error {
    Error::Refused(StatusCode::UNAUTHORIZED, why)
}

pub(crate) fn forbidden(why: &'static str) -> Error {
    Error::Refused(StatusCode::FORBIDDEN, why)
}

pub(crate) fn not_found() -> Error {
    Error::Refused(StatusCode::NOT_FOUND, "there is no such thing")
}

pub(crate) fn conflict(why: &'static str) -> Error {
    Error::Refused(StatusCode::CONFLICT, why)
}

pub(crate) fn unprocessable(why: &'static str) -> Error {
    Error::Refused(StatusCode::UNPROCESSABLE_ENTITY, why)
}

/// The body, up to a length.
pub(crate) fn body(request: &mut Request<Body>) -> Result<Vec<u8>, Error> {
    let mut body = Vec::new();
    let mut reader = request.body_mut().take(MAX_BODY_LEN + 1);
    reader
        .read_to_end(&mut body)
        .map_err(|_| bad_request("the body can't be read"))?;
    if body.len() as u64 > MAX_BODY_LEN {
        let why = "the body is too large";
        return Err(Error::Refused(StatusCode::PAYLOAD_TOO_LARGE, why));
    }
    Ok(body)
}

pub(crate) fn json<T: DeserializeOwned>(request: &mut Request<Body>) -> Result<T, Error> {
    parse(&body(request)?)
}

pub(crate) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    // PostgreSQL can't store NUL, which JSON can only spell so.
    if body.windows(6).any(|text| text == br"\u0000") {
        return Err(unprocessable("a text holds NUL"));
    }
    serde_json::from_slice(body).map_err(|error| {
        if error.is_data() {
            unprocessable("a field is missing, or of another type")
        } else {
            bad_request("not JSON")
        }
    })
}

/// The value of a key of the query, as it is: what this service expects there needs no escapes.
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
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if status == StatusCode::SERVICE_UNAVAILABLE {
        headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

/// What the client is told of a failure that isn't the client's: nothing. The log gets the kind of it only, for
/// PostgreSQL's messages may quote values. It writes them into its own log.
fn failure(error: &Error) -> (StatusCode, String) {
    let temporary = match error {
        Error::Unavailable => true,
        Error::Database(error) => is_transient(error) || is_disconnected(error),
        _ => false,
    };
    if temporary {
        let why = "try again in a moment";
        return (StatusCode::SERVICE_UNAVAILABLE, why.to_owned());
    }
    match error {
        Error::Database(DieselError::DatabaseError(kind, _)) => {
            eprintln!("failed: database error, {kind:?}");
        }
        error => eprintln!("failed: {error}"),
    }
    let why = "something is wrong here";
    (StatusCode::INTERNAL_SERVER_ERROR, why.to_owned())
}

/// Whether the server went away in the middle of it.
fn is_disconnected(error: &DieselError) -> bool {
    use DatabaseErrorKind::{ClosedConnection, UnableToSendCommand, Unknown};
    match error {
        DieselError::BrokenTransactionManager => true,
        DieselError::DatabaseError(ClosedConnection | UnableToSendCommand, _) => true,
        // 57P01 and 57P02: Diesel doesn't tell them apart from others.
        DieselError::DatabaseError(Unknown, info) => {
            info.message().starts_with("terminating connection")
        }
        _ => false,
    }
}
