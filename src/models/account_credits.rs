//! Credits: money that the platform owes a user.

mod row;

use bigdecimal::{BigDecimal, ToPrimitive};
use chrono::{DateTime, Utc};
use diesel::dsl::{now, sql, sum};
use diesel::expression::SqlLiteral;
use diesel::prelude::*;
use diesel::result::Error;
use diesel::sql_types::Bool;

pub use self::row::AccountCredit;
use crate::enums::CreditSource;
use crate::ids::{CreditId, UserId};
use crate::models::{DEFAULT_CURRENCY, Recorded, lock_user_key};
use crate::page::{Cursor, Page, newest_first};
use crate::prepared::Prepare;
use crate::schema::{account_credits, users};

/// Values of a new [`AccountCredit`]; `None` uses the column's default.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = account_credits, treat_none_as_default_value = false, check_for_backend(Pg))]
#[expect(missing_docs, reason = "the fields are those of `AccountCredit`")]
pub struct NewAccountCredit<'a> {
    #[diesel(treat_none_as_default_value = true)]
    pub id: Option<CreditId>,
    pub user_id: UserId,
    pub amount: i64,
    #[diesel(treat_none_as_default_value = true)]
    pub currency: Option<&'a str>,
    pub description: Option<&'a str>,
    pub source_type: Option<CreditSource>,
    pub source_id: Option<&'a str>,
    pub expires_at: Option<DateTime<Utc>>,
}

impl NewAccountCredit<'_> {
    /// A credit in INR without source and expiry.
    #[must_use]
    pub fn new(user_id: UserId, amount: i64) -> Self {
        Self {
            id: None,
            user_id,
            amount,
            currency: None,
            description: None,
            source_type: None,
            source_id: None,
            expires_at: None,
        }
    }
}

/// The result of [`AccountCredit::spend`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spent {
    /// The credits and debits used up, earliest expiry first.
    pub used: Vec<AccountCredit>,
    /// A new credit for the unspent part of the last one.
    pub rest: Option<AccountCredit>,
}

/// Why an operation on credits failed. Nothing is changed then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CreditError {
    /// The amount is zero or negative.
    #[error("the amount is not positive")]
    NotPositive,
    /// The source was credited to another user, or with another amount or currency. Holds that row.
    #[error("the source has another credit")]
    Differs(Box<AccountCredit>),
    /// The balance is less than the amount.
    #[error("the balance is only {balance}")]
    Insufficient {
        /// The balance in minor units; negative if debits exceed credits.
        balance: i64,
    },
    /// The balance does not fit in an `i64`.
    #[error("the balance is out of range")]
    OutOfRange,
    /// Any other database error.
    #[error("database error")]
    Database(#[from] Error),
}

/// Neither used nor expired.
#[diesel::dsl::auto_type]
fn is_open() -> _ {
    account_credits::is_used.eq(false).and(
        account_credits::expires_at
            .is_null()
            .or(account_credits::expires_at.gt(now)),
    )
}

/// Granted once per source. A literal: the planner can't match bind parameters with a partial index.
fn is_unique() -> SqlLiteral<Bool> {
    sql("source_type IN ('refund', 'downgrade')")
}

impl AccountCredit {
    /// Returns the credit with this id.
    pub fn find(conn: &mut PgConnection, id: CreditId) -> QueryResult<Option<Self>> {
        account_credits::table
            .find(id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Returns a page of the user's credits, newest first.
    pub fn list_by_user(
        conn: &mut PgConnection,
        user_id: UserId,
        page: Page<CreditId>,
    ) -> QueryResult<Vec<Self>> {
        let of_user = account_credits::table
            .filter(account_credits::user_id.eq(user_id))
            .select(Self::as_select());
        newest_first!(of_user, account_credits, id, page).load(conn)
    }

    /// The row's position in a list.
    #[must_use]
    pub fn cursor(&self) -> Cursor<CreditId> {
        Cursor {
            created_at: self.created_at,
            id: self.id,
        }
    }

    /// Grants a credit, or a debit if the amount is negative. A refund or downgrade is granted once
    /// per `source_id`, any other source each time.
    ///
    /// It waits for a transaction that grants for the same source. Four round trips.
    ///
    /// # Errors
    /// [`CreditError::Differs`]. Violated constraints, such as an amount of 0 or a refund without
    /// `source_id`, are [`CreditError::Database`].
    pub fn grant(
        conn: &mut PgConnection,
        new: &NewAccountCredit<'_>,
    ) -> Result<Recorded<Self>, CreditError> {
        conn.transaction(|conn| {
            lock_user_key(conn, new.user_id)?;
            Self::record(conn, new)
        })
    }

    fn record(
        conn: &mut PgConnection,
        new: &NewAccountCredit<'_>,
    ) -> Result<Recorded<Self>, CreditError> {
        loop {
            let granted = diesel::insert_into(account_credits::table)
                .values(new)
                .on_conflict((account_credits::source_type, account_credits::source_id))
                .filter_target(is_unique())
                .do_nothing()
                .returning(Self::as_returning())
                .prepared()
                .get_result(conn)
                .optional()?;
            if let Some(row) = granted {
                return Ok(Recorded::New(row));
            }
            let existing = account_credits::table
                .filter(is_unique())
                .filter(account_credits::source_type.eq(new.source_type))
                .filter(account_credits::source_id.eq(new.source_id))
                .select(Self::as_select())
                .prepared()
                .get_result(conn)
                .optional()?;
            // If the other row was deleted meanwhile, the source is free again.
            if let Some(row) = existing {
                let same = row.user_id == new.user_id
                    && row.amount == new.amount
                    && row.currency == new.currency.unwrap_or(DEFAULT_CURRENCY);
                return if same {
                    Ok(Recorded::Existing(row))
                } else {
                    Err(CreditError::Differs(Box::new(row)))
                };
            }
        }
    }

    /// Returns the user's balance in a currency, in minor units: the sum of all credits and debits
    /// that are neither used nor expired. It is negative if debits exceed credits.
    ///
    /// # Errors
    /// [`CreditError::OutOfRange`].
    pub fn balance(
        conn: &mut PgConnection,
        user_id: UserId,
        currency: &str,
    ) -> Result<i64, CreditError> {
        let balance: Option<BigDecimal> = account_credits::table
            .filter(account_credits::user_id.eq(user_id))
            .filter(account_credits::currency.eq(currency))
            .filter(is_open())
            .select(sum(account_credits::amount))
            .first(conn)?;
        balance
            .map_or(Some(0), |balance| balance.to_i64())
            .ok_or(CreditError::OutOfRange)
    }

    /// Spends `amount` minor units of the user's balance in a currency.
    ///
    /// It settles all debits and uses up credits for both, earliest expiry first. The unspent part
    /// of the last credit becomes a new credit: an adjustment with the same expiry, whose
    /// `source_id` is the old credit's id. Every call spends: call it in the transaction that
    /// records the purchase.
    ///
    /// One transaction of five or six round trips, which locks the user, then the credits: a user's
    /// calls run one after another.
    ///
    /// # Errors
    /// [`CreditError::NotPositive`]; [`CreditError::Insufficient`]; [`CreditError::OutOfRange`].
    pub fn spend(
        conn: &mut PgConnection,
        user_id: UserId,
        currency: &str,
        amount: i64,
    ) -> Result<Spent, CreditError> {
        if amount <= 0 {
            return Err(CreditError::NotPositive);
        }
        conn.transaction(|conn| {
            // Locks on the credits alone are not enough: a waiting transaction would not see the
            // rest that the other one inserts.
            users::table
                .find(user_id)
                .select(users::id)
                .for_no_key_update()
                .first::<UserId>(conn)
                .optional()?;
            let open: Vec<Self> = account_credits::table
                .filter(account_credits::user_id.eq(user_id))
                .filter(account_credits::currency.eq(currency))
                .filter(is_open())
                // NULL (never) comes last.
                .order((account_credits::expires_at, account_credits::id))
                .for_update()
                .select(Self::as_select())
                .load(conn)?;

            let amount = i128::from(amount);
            let balance: i128 = open.iter().map(|credit| i128::from(credit.amount)).sum();
            if balance < amount {
                return Err(match i64::try_from(balance) {
                    Ok(balance) => CreditError::Insufficient { balance },
                    Err(_) => CreditError::OutOfRange,
                });
            }
            let (debits, credits): (Vec<_>, Vec<_>) =
                open.into_iter().partition(|credit| credit.amount < 0);
            let debt: i128 = debits.iter().map(|debit| -i128::from(debit.amount)).sum();
            let mut due = amount + debt;
            let mut used: Vec<CreditId> = debits.iter().map(|debit| debit.id).collect();
            let mut last = None;
            for credit in credits {
                if due <= 0 {
                    break;
                }
                due -= i128::from(credit.amount);
                used.push(credit.id);
                last = Some(credit);
            }

            let mut used: Vec<Self> =
                diesel::update(account_credits::table.filter(account_credits::id.eq_any(used)))
                    .set((
                        account_credits::is_used.eq(true),
                        account_credits::used_at.eq(now),
                    ))
                    .returning(Self::as_returning())
                    .prepared()
                    .get_results(conn)?;
            used.sort_by_key(|credit| {
                let expires_at = credit.expires_at;
                (expires_at.is_none(), expires_at, credit.id)
            });
            let rest = match last {
                Some(credit) if due < 0 => {
                    let amount = i64::try_from(-due).map_err(|_| CreditError::OutOfRange)?;
                    let source_id = credit.id.to_string();
                    let rest = NewAccountCredit {
                        id: Some(CreditId::new()),
                        currency: Some(currency),
                        description: credit.description.as_deref(),
                        source_type: Some(CreditSource::Adjustment),
                        source_id: Some(&source_id),
                        expires_at: credit.expires_at,
                        ..NewAccountCredit::new(user_id, amount)
                    };
                    Some(Self::record(conn, &rest)?.into_inner())
                }
                _ => None,
            };
            Ok(Spent { used, rest })
        })
    }
}
