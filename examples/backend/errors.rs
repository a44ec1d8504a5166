//! Why a request fails, and what its client is told.

use axum::Json;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use axum::http::header::RETRY_AFTER;
use axum::response::{IntoResponse, Response};
use bruhmcp_db::models::{
    CredentialError, GatewayError, InstanceError, IssueError, PaymentError, PlanError, ResetError,
    SubscriptionError, TokenError, UserError, WebhookError,
};
use bruhmcp_db::{ConstraintKind, ConstraintViolation, crypto};
use diesel::result::Error as DieselError;
use serde_json::json;

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
    /// The reason, if the request itself is at fault. It holds no value of the request.
    pub(crate) fn reason(&self) -> Option<String> {
        match self {
            Self::Refused(_, why) => Some((*why).to_owned()),
            Self::Database(error) => {
                ConstraintViolation::of(error).map(|it| format!("violates {}", it.constraint))
            }
            Self::Unavailable | Self::Internal(_) => None,
        }
    }

    /// Prints the kind of a failure only, because PostgreSQL's messages may quote values.
    pub(crate) fn log(&self) {
        match self {
            Self::Database(DieselError::DatabaseError(kind, _)) => eprintln!("{self}: {kind:?}"),
            Self::Database(reason) => eprintln!("{self}: {reason}"),
            error => eprintln!("{error}"),
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
            IssueError::TooMany { .. } => Error::Refused(429, "no more mails for now"),
            IssueError::Database(error) => error.into(),
            _ => Error::Internal("no token was issued"),
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
            PaymentError::Conflict(_) => Error::Refused(409, "the payment is not captured"),
            PaymentError::ExceedsPayment { .. } => {
                Error::Refused(409, "the refunds exceed the payment")
            }
            _ => Error::Refused(422, "not a payment"),
        }
    }
}

impl From<GatewayError> for Error {
    fn from(error: GatewayError) -> Self {
        match error {
            // The gateway may be faster than the request that stores the subscription's id.
            GatewayError::NotFound => Error::Refused(409, "no subscription has this id"),
            GatewayError::LiveExists => {
                Error::Refused(409, "the user has another live subscription")
            }
            GatewayError::CustomerTaken => {
                Error::Refused(409, "the customer belongs to another user")
            }
            GatewayError::Payment(error) => error.into(),
            GatewayError::Database(error) => error.into(),
            _ => Error::Internal("the event was not applied"),
        }
    }
}

impl From<SubscriptionError> for Error {
    fn from(error: SubscriptionError) -> Self {
        match error {
            SubscriptionError::NotFound => NOT_FOUND,
            SubscriptionError::Conflict(_) | SubscriptionError::Ended => {
                Error::Refused(409, "the subscription has changed")
            }
            SubscriptionError::LiveExists => Error::Refused(409, "there is a subscription"),
            SubscriptionError::Database(error) => error.into(),
            _ => Error::Internal("the subscription was not changed"),
        }
    }
}

impl From<TokenError> for Error {
    fn from(error: TokenError) -> Self {
        match error {
            TokenError::Database(error) => error.into(),
            _ => Error::Refused(409, "the link was used or has expired"),
        }
    }
}

impl From<ResetError> for Error {
    fn from(error: ResetError) -> Self {
        match error {
            ResetError::Token(error) => error.into(),
            _ => Error::Internal("the password was not reset"),
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

impl From<BytesRejection> for Error {
    fn from(rejection: BytesRejection) -> Self {
        if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
            Self::Refused(413, "the body is too large")
        } else {
            Self::Refused(400, "the body can't be read")
        }
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let (status, why) = self.told();
        if self.reason().is_none() {
            self.log();
        }
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

impl Error {
    /// Status and message for the client, who learns nothing about the database.
    fn told(&self) -> (u16, &'static str) {
        match self {
            Self::Refused(status, why) => (*status, why),
            Self::Database(error) => match ConstraintViolation::of(error) {
                Some(violation) if violation.kind == ConstraintKind::Unique => {
                    (409, "another one has this value")
                }
                Some(_) => (422, "a value is not allowed"),
                // An outage, or a conflict after all retries.
                None => (503, "try again in a moment"),
            },
            Self::Unavailable => (503, "try again in a moment"),
            Self::Internal(_) => (500, "internal error"),
        }
    }
}
