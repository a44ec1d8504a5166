//! The constraint that a failed statement violated, and spans that are refused before one.

use chrono::TimeDelta;
use diesel::prelude::QueryResult;
use diesel::result::{DatabaseErrorKind, Error};

/// The kind of a violated constraint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ConstraintKind {
    /// A unique index: the value exists already.
    Unique,
    /// A foreign key: the referenced row is missing, or other rows still refer to this one. The
    /// server tells `ON DELETE RESTRICT` from the rest since PostgreSQL 18; this kind does not.
    ForeignKey,
    /// A CHECK constraint, or a rule kept by a trigger: both look the same to a client.
    Check,
    /// NOT NULL: a value is missing.
    NotNull,
    /// An exclusion constraint: the row conflicts with another one.
    Exclusion,
}

/// A constraint that a statement violated.
///
/// It holds no value of the row: the server's DETAIL, which prints the whole row, is dropped.
///
/// ```
/// # use bruhmcp_db::{ConstraintKind, ConstraintViolation};
/// # fn http_status(error: diesel::result::Error) -> u16 {
/// match ConstraintViolation::of(&error) {
///     Some(violation) if violation.is("user_plan_active_limit") => 403,
///     Some(violation) if violation.kind == ConstraintKind::Unique => 409,
///     Some(_) => 422,
///     None => 500,
/// }
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
#[error("table {table} violates {constraint}")]
pub struct ConstraintViolation {
    /// The constraint's kind.
    pub kind: ConstraintKind,
    /// The table that has the constraint.
    pub table: String,
    /// The constraint's name; for [`ConstraintKind::NotNull`] the column's name.
    pub constraint: String,
}

impl ConstraintViolation {
    /// Returns the violated constraint, or `None` if the error has another cause.
    #[must_use]
    pub fn of(error: &Error) -> Option<Self> {
        let Error::DatabaseError(kind, info) = error else {
            return None;
        };
        let kind = match kind {
            DatabaseErrorKind::UniqueViolation => ConstraintKind::Unique,
            DatabaseErrorKind::ForeignKeyViolation | DatabaseErrorKind::RestrictViolation => {
                ConstraintKind::ForeignKey
            }
            DatabaseErrorKind::CheckViolation => ConstraintKind::Check,
            DatabaseErrorKind::NotNullViolation => ConstraintKind::NotNull,
            DatabaseErrorKind::ExclusionViolation => ConstraintKind::Exclusion,
            _ => return None,
        };
        let constraint = match kind {
            ConstraintKind::NotNull => info.column_name(),
            _ => info.constraint_name(),
        };
        Some(Self {
            kind,
            table: info.table_name().unwrap_or_default().to_owned(),
            constraint: constraint.unwrap_or_default().to_owned(),
        })
    }

    /// Whether this constraint was violated.
    #[must_use]
    pub fn is(&self, constraint: &str) -> bool {
        self.constraint == constraint
    }
}

/// Whether `error` reports a violation of this constraint.
pub(crate) fn violates(error: &Error, constraint: &str) -> bool {
    matches!(error, Error::DatabaseError(_, info) if info.constraint_name() == Some(constraint))
}
/// A span of time was negative. It would point to the future, and a purge would delete live rows.
///
/// Operations with such an argument return it within [`Error::QueryBuilderError`], before they run a
/// statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the span {0} is negative; nothing was changed: pass zero or more")]
pub struct NegativeSpan(pub TimeDelta);

impl NegativeSpan {
    /// Returns the refused span, or `None` if the error has another cause.
    #[must_use]
    pub fn of(error: &Error) -> Option<Self> {
        match error {
            Error::QueryBuilderError(cause) => cause.downcast_ref().copied(),
            _ => None,
        }
    }

    /// Refuses a negative span.
    pub(crate) fn check(span: TimeDelta) -> QueryResult<()> {
        if span < TimeDelta::zero() {
            return Err(Error::QueryBuilderError(Box::new(Self(span))));
        }
        Ok(())
    }
}
