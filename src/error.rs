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
    ///
    /// Citus adds the number of a shard to names, as in `users_email_key_102038`: it is taken off.
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
            _ => info.constraint_name().map(without_shard),
        };
        Some(Self {
            kind,
            table: without_shard(info.table_name().unwrap_or_default()).to_owned(),
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
    matches!(
        error,
        Error::DatabaseError(_, info) if info.constraint_name().map(without_shard) == Some(constraint)
    )
}

/// Takes the number of a Citus shard off a name: `_` and five or more digits. No name of this schema
/// ends like that.
fn without_shard(name: &str) -> &str {
    let plain = name.trim_end_matches(|letter: char| letter.is_ascii_digit());
    match plain.strip_suffix('_') {
        Some(plain) if name.len() - plain.len() > 5 && !plain.is_empty() => plain,
        _ => name,
    }
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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that can't go on panics")]
mod tests {
    use diesel::result::DatabaseErrorInformation;

    use super::*;

    struct Violated(&'static str, &'static str);

    impl DatabaseErrorInformation for Violated {
        fn message(&self) -> &str {
            "duplicate key value violates unique constraint"
        }
        fn details(&self) -> Option<&str> {
            None
        }
        fn hint(&self) -> Option<&str> {
            None
        }
        fn table_name(&self) -> Option<&str> {
            Some(self.0)
        }
        fn column_name(&self) -> Option<&str> {
            Some("line_10000")
        }
        fn constraint_name(&self) -> Option<&str> {
            Some(self.1)
        }
        fn statement_position(&self) -> Option<i32> {
            None
        }
    }

    #[test]
    fn the_number_of_a_shard_is_taken_off() {
        for (table, name, plain_table, plain) in [
            ("users", "users_email_key", "users", "users_email_key"),
            (
                "users_102008",
                "users_email_key_102038",
                "users",
                "users_email_key",
            ),
            (
                "users_10200",
                "users_email_key_10203",
                "users",
                "users_email_key",
            ),
            (
                "users_2",
                "users_email_key_1020",
                "users_2",
                "users_email_key_1020",
            ),
            ("users102008", "users102038", "users102008", "users102038"),
            ("102008", "_102038", "102008", "_102038"),
        ] {
            let of = |kind| Error::DatabaseError(kind, Box::new(Violated(table, name)));
            let error = of(DatabaseErrorKind::UniqueViolation);
            let violation = ConstraintViolation::of(&error).unwrap();
            assert_eq!(
                (&*violation.table, &*violation.constraint),
                (plain_table, plain)
            );
            assert!(violates(&error, plain) && !violates(&error, "users"));
            let null = ConstraintViolation::of(&of(DatabaseErrorKind::NotNullViolation)).unwrap();
            assert_eq!(
                (&*null.table, &*null.constraint),
                (plain_table, "line_10000")
            );
        }
    }
}
