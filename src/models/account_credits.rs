//! Credits: money the platform owes a user.

use bigdecimal::{BigDecimal, ToPrimitive};
use chrono::{DateTime, Utc};
use diesel::dsl::{now, sql};
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::result::Error;
use diesel::sql_types::Bool;
use serde::Serialize;

use crate::enums::CreditSource;
use crate::ids::{CreditId, UserId};
use crate::models::{DEFAULT_CURRENCY, User, found};
use crate::page::Cursor;
use crate::schema::{account_credits, users};

/// A row of `account_credits`.
#[derive(
    Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable, Associations,
)]
#[diesel(table_name = account_credits, belongs_to(User, foreign_key = user_id), check_for_backend(Pg))]
pub struct AccountCredit {
    /// Key.
    pub id: CreditId,
    /// Whose credit it is.
    pub user_id: UserId,
    /// Minor units of `currency`, never 0; negative is a debit.
    pub amount: i64,
    /// ISO 4217 code; by default INR.
    pub currency: String,
    /// For people.
    pub description: Option<String>,
    /// Where it comes from.
    pub source_type: Option<CreditSource>,
    /// What it is for, in the words of its source; needed for a refund or downgrade.
    pub source_id: Option<String>,
    /// Whether it is spent.
    pub is_used: bool,
    /// When it was spent; set exactly when `is_used` is.
    pub used_at: Option<DateTime<Utc>>,
    /// From then on it can't be spent; `None`: never.
    pub expires_at: Option<DateTime<Utc>>,
    /// When the row was made.
    pub created_at: DateTime<Utc>,
    /// When the row changed last.
    pub updated_at: DateTime<Utc>,
}

/// A new row; `None` leaves a column to its default.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = account_credits, check_for_backend(Pg))]
pub struct NewAccountCredit<'a> {
    /// Key.
    pub id: Option<CreditId>,
    /// Whose credit it is.
    pub user_id: UserId,
    /// Minor units of `currency`, never 0; negative is a debit.
    pub amount: i64,
    /// ISO 4217 code; by default INR.
    pub currency: Option<&'a str>,
    /// For people.
    pub description: Option<&'a str>,
    /// Where it comes from.
    pub source_type: Option<CreditSource>,
    /// What it is for, in the words of its source; needed for a refund or downgrade.
    pub source_id: Option<&'a str>,
    /// From then on it can't be spent; `None`: never.
    pub expires_at: Option<DateTime<Utc>>,
}

/// Changes to a row: `None` keeps a column, `Some(None)` sets it to `NULL`. It becomes used by [`AccountCredit::spend`].
#[derive(Debug, Clone, Default, AsChangeset)]
#[diesel(table_name = account_credits)]
pub struct AccountCreditChangeset<'a> {
    /// For people.
    pub description: Option<Option<&'a str>>,
    /// From then on it can't be spent; `None`: never.
    pub expires_at: Option<Option<DateTime<Utc>>>,
}

/// What became of a credit that was to be granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Granted {
    /// It is new.
    Granted(AccountCredit),
    /// Its source was credited before, by this row.
    AlreadyGranted(AccountCredit),
}

/// What a spending did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spent {
    /// The credits and debits that it used up, soonest expiry first.
    pub used: Vec<AccountCredit>,
    /// What is left of the last of them: a new credit.
    pub rest: Option<AccountCredit>,
}

/// Why credit was not granted, counted or spent.
#[derive(Debug, thiserror::Error)]
pub enum CreditError {
    /// The source was credited before, to another user or with another amount or currency. Holds that row.
    #[error("the source has another credit")]
    Differs(Box<AccountCredit>),
    /// Nothing or less was to be spent.
    #[error("the amount is not positive")]
    NotPositive,
    /// The balance is less than what was to be spent.
    #[error("the balance is only {balance}")]
    Insufficient {
        /// The balance, in minor units; negative where debits prevail.
        balance: i64,
    },
    /// The balance is beyond an `i64`.
    #[error("the balance is out of range")]
    OutOfRange,
    /// The database refuses, or can't be reached.
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

impl AccountCredit {
    /// Inserts a row and returns it with its defaults.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn insert(conn: &mut PgConnection, new: &NewAccountCredit<'_>) -> QueryResult<Self> {
        diesel::insert_into(account_credits::table)
            .values(new)
            .returning(Self::as_returning())
            .get_result(conn)
    }

    /// The row of this key, if there is one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find(conn: &mut PgConnection, id: CreditId) -> QueryResult<Option<Self>> {
        account_credits::table
            .find(id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// The rows of a user, newest first, `limit` at most, from the newest or from the place given.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn list_by_user(
        conn: &mut PgConnection,
        user_id: UserId,
        after: Option<Cursor<CreditId>>,
        limit: i64,
    ) -> QueryResult<Vec<Self>> {
        let mut query = account_credits::table
            .filter(account_credits::user_id.eq(user_id))
            .select(Self::as_select())
            .into_boxed();
        if let Some(after) = after {
            query = query.filter(
                account_credits::created_at.le(after.created_at).and(
                    account_credits::created_at
                        .lt(after.created_at)
                        .or(account_credits::id.lt(after.id)),
                ),
            );
        }
        query
            .order((
                account_credits::created_at.desc(),
                account_credits::id.desc(),
            ))
            .limit(limit)
            .load(conn)
    }

    /// Grants a credit, or a debit where the amount is negative: a refund or downgrade once per `source_id`, others each
    /// time.
    ///
    /// One statement where it is new, two where it isn't; waits for a transaction that grants for the same source.
    ///
    /// # Errors
    /// [`CreditError::Differs`]. Rules of the table, as an amount of 0 or a refund without `source_id`, are
    /// [`CreditError::Database`].
    pub fn grant(
        conn: &mut PgConnection,
        new: &NewAccountCredit<'_>,
    ) -> Result<Granted, CreditError> {
        loop {
            let granted = diesel::insert_into(account_credits::table)
                .values(new)
                .on_conflict((account_credits::source_type, account_credits::source_id))
                // A literal: bound values can't be matched with a partial index.
                .filter_target(sql::<Bool>("source_type IN ('refund', 'downgrade')"))
                .do_nothing()
                .returning(Self::as_returning())
                .get_result(conn)
                .optional()?;
            if let Some(row) = granted {
                return Ok(Granted::Granted(row));
            }
            let existing = account_credits::table
                .filter(account_credits::source_type.eq(new.source_type))
                .filter(account_credits::source_id.eq(new.source_id))
                .select(Self::as_select())
                .first(conn)
                .optional()?;
            // None if it was deleted meanwhile: then the source is free again.
            if let Some(row) = existing {
                let same = row.user_id == new.user_id
                    && row.amount == new.amount
                    && row.currency == new.currency.unwrap_or(DEFAULT_CURRENCY);
                return if same {
                    Ok(Granted::AlreadyGranted(row))
                } else {
                    Err(CreditError::Differs(Box::new(row)))
                };
            }
        }
    }

    /// What a user can spend in a currency, in minor units: the sum of what is neither used nor expired. Debits subtract;
    /// the balance is negative where they prevail.
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
            .select(diesel::dsl::sum(account_credits::amount))
            .first(conn)?;
        balance
            .map_or(Some(0), |balance| balance.to_i64())
            .ok_or(CreditError::OutOfRange)
    }

    /// Spends `amount` of a user's balance in a currency, in minor units; the balance is less by exactly that then.
    ///
    /// All debits are settled with it, and credits used up for both, soonest expiry first. What is left of the last one
    /// becomes a new credit with the same expiry, an adjustment whose `source_id` is the key of the credit it comes from.
    ///
    /// One transaction, which locks the user's row in `users` and then the credits: spendings of a user run one after the
    /// other, and what one leaves is seen by the next. In a transaction that takes other locks as well, spend first. Spends
    /// whenever it is called: do it in the transaction that records what it was spent on.
    ///
    /// # Errors
    /// [`CreditError::NotPositive`]; [`CreditError::Insufficient`]; [`CreditError::OutOfRange`] for a negative balance that
    /// can't be told. Nothing is changed then.
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
            // Locks on the credits alone don't do: one who waits for them would not see the rest that the other inserts.
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
                // NULL, never, comes last.
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
                    .get_results(conn)?;
            used.sort_by_key(|credit| {
                let expires_at = credit.expires_at;
                (expires_at.is_none(), expires_at, credit.id)
            });
            let rest = match last {
                Some(credit) if due < 0 => Some(Self::insert(
                    conn,
                    &NewAccountCredit {
                        id: Some(CreditId::new()),
                        user_id,
                        amount: i64::try_from(-due).map_err(|_| CreditError::OutOfRange)?,
                        currency: Some(currency),
                        description: credit.description.as_deref(),
                        source_type: Some(CreditSource::Adjustment),
                        source_id: Some(&credit.id.to_string()),
                        expires_at: credit.expires_at,
                    },
                )?),
                _ => None,
            };
            Ok(Spent { used, rest })
        })
    }

    /// Changes the row of this key and returns it as it is then; `None` where there is no such row. An empty changeset
    /// changes nothing.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn update(
        conn: &mut PgConnection,
        id: CreditId,
        changes: &AccountCreditChangeset<'_>,
    ) -> QueryResult<Option<Self>> {
        let updated = diesel::update(account_credits::table.find(id))
            .set(changes)
            .returning(Self::as_returning())
            .get_result(conn)
            .optional_empty_changeset();
        found(updated, || Self::find(conn, id))
    }

    /// Deletes the row of this key; says whether there was one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn delete(conn: &mut PgConnection, id: CreditId) -> QueryResult<bool> {
        diesel::delete(account_credits::table.find(id))
            .execute(conn)
            .map(|deleted| deleted == 1)
    }
}
