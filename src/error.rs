//! Which rule of the database an error broke.

use diesel::result::{DatabaseErrorKind, Error};

/// What sort of rule was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RuleKind {
    /// The value is there already: a unique index.
    Unique,
    /// What is referred to isn't there, or is still referred to: a foreign key.
    ForeignKey,
    /// A CHECK, or a rule that a trigger keeps: both look the same.
    Check,
    /// A value is missing: NOT NULL.
    NotNull,
}

/// A rule of the database that a statement broke, by name.
///
/// Holds no value of the row: the server's DETAIL, which prints the whole of it, is left behind.
///
/// ```
/// # use bruhmcp_db::{ConstraintViolation, RuleKind};
/// # fn handle(error: diesel::result::Error) -> u16 {
/// match ConstraintViolation::of(&error) {
///     Some(broken) if broken.is("user_plan_active_limit") => 403,
///     Some(broken) if broken.kind == RuleKind::Unique => 409,
///     Some(_) => 422,
///     None => 500,
/// }
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
#[error("{table}: {rule} doesn't hold")]
pub struct ConstraintViolation {
    /// What sort of rule.
    pub kind: RuleKind,
    /// The table whose rule it is.
    pub table: String,
    /// The constraint's name; for [`RuleKind::NotNull`] the column's.
    pub rule: String,
}

impl ConstraintViolation {
    /// The broken rule, if that is what the error is about.
    #[must_use]
    pub fn of(error: &Error) -> Option<Self> {
        let Error::DatabaseError(kind, info) = error else {
            return None;
        };
        let kind = match kind {
            DatabaseErrorKind::UniqueViolation => RuleKind::Unique,
            DatabaseErrorKind::ForeignKeyViolation => RuleKind::ForeignKey,
            DatabaseErrorKind::CheckViolation => RuleKind::Check,
            DatabaseErrorKind::NotNullViolation => RuleKind::NotNull,
            _ => return None,
        };
        let rule = match kind {
            RuleKind::NotNull => info.column_name(),
            _ => info.constraint_name(),
        };
        Some(Self {
            kind,
            table: info.table_name().unwrap_or_default().to_owned(),
            rule: rule.unwrap_or_default().to_owned(),
        })
    }

    /// Whether it is this rule.
    #[must_use]
    pub fn is(&self, rule: &str) -> bool {
        self.rule == rule
    }
}

/// Whether `error` says that the rule of this name was broken.
pub(crate) fn breaks(error: &Error, rule: &str) -> bool {
    matches!(error, Error::DatabaseError(_, info) if info.constraint_name() == Some(rule))
}
