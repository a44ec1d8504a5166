//! Users: people with an account.

use chrono::{DateTime, Utc};
use diesel::dsl::now;
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::sql_types::{Array, Text};
use serde::Serialize;
use serde_json::json;

use crate::enums::{AuthTokenType, PlanPaymentStatus, PlanType};
use crate::error::violates;
use crate::ids::{CredentialId, InstanceId, UserId};
use crate::models::{AuthToken, UserPlan, found};
use crate::schema::{
    account_credits, auth_tokens, mcp_credentials, mcp_service_table, subscription_transactions,
    user_billing_details, user_plans, user_subscriptions, users,
};
use crate::secret::SecretText;

/// A row of `users`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable)]
#[diesel(table_name = users, check_for_backend(Pg))]
pub struct User {
    /// Key.
    pub id: UserId,
    /// 1 to 255 characters.
    pub first_name: String,
    /// At most 255 characters; may be empty.
    pub last_name: String,
    /// Canonical: lower case, without white space, one `@`.
    pub email: String,
    /// Password hash (`$…`); `None`: signs in by other means.
    #[serde(skip_serializing)]
    pub password: Option<SecretText>,
    /// Whether the address is proven.
    pub email_verified: bool,
    /// Customer at Razorpay; unique.
    pub razorpay_customer_id: Option<String>,
    /// When the row was made.
    pub created_at: DateTime<Utc>,
    /// When the row changed last.
    pub updated_at: DateTime<Utc>,
    /// When the user signed in last.
    pub last_login_at: Option<DateTime<Utc>>,
    /// False: deactivated, can't sign in.
    pub is_active: bool,
}

/// A new row; `None` leaves a column to its default.
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = users, check_for_backend(Pg))]
pub struct NewUser<'a> {
    /// Key.
    pub id: Option<UserId>,
    /// 1 to 255 characters.
    pub first_name: &'a str,
    /// At most 255 characters; may be empty.
    pub last_name: &'a str,
    /// Canonical: lower case, without white space, one `@`.
    pub email: &'a str,
    /// Password hash (`$…`); `None`: signs in by other means.
    pub password: Option<&'a SecretText>,
    /// Whether the address is proven.
    pub email_verified: Option<bool>,
    /// Customer at Razorpay; unique.
    pub razorpay_customer_id: Option<&'a str>,
    /// False: deactivated, can't sign in.
    pub is_active: Option<bool>,
}

/// Changes to a row: `None` keeps a column, `Some(None)` sets it to `NULL`. The address, the last login and whether the
/// user is active have operations of their own.
#[derive(Debug, Clone, Default, AsChangeset)]
#[diesel(table_name = users)]
pub struct UserChangeset<'a> {
    /// 1 to 255 characters.
    pub first_name: Option<&'a str>,
    /// At most 255 characters; may be empty.
    pub last_name: Option<&'a str>,
    /// Password hash (`$…`); `None`: signs in by other means.
    pub password: Option<Option<&'a SecretText>>,
    /// Whether the address is proven.
    pub email_verified: Option<bool>,
    /// Customer at Razorpay; unique.
    pub razorpay_customer_id: Option<Option<&'a str>>,
}

/// Domain of the addresses of anonymised users. No mail gets there (RFC 6761, 6.4), and nobody signs up with it.
const ANONYMISED_DOMAIN: &str = "@anonymised.invalid";

/// Not an address that an account can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an email address")]
pub struct InvalidEmail;

/// Why an address was not taken over.
#[derive(Debug, thiserror::Error)]
pub enum EmailError {
    /// It isn't one.
    #[error(transparent)]
    InvalidEmail(#[from] InvalidEmail),
    /// Another account has it.
    #[error("the email address is taken")]
    EmailTaken,
    /// Anything else.
    #[error("database error")]
    Database(#[from] diesel::result::Error),
}

/// The one spelling of an address under which an account is kept and found: without white space around it, in lower
/// case.
///
/// What it accepts is what `users_email_canonical` accepts: one `@` with something on either side, 255 characters at
/// most. White space inside, in the sense of Unicode, and NUL, which PostgreSQL can't store, are refused whatever the
/// database's locale thinks of them. Whether mail arrives there, only a mail can tell.
///
/// # Errors
/// [`InvalidEmail`].
///
/// ```
/// # use bruhmcp_db::models::{InvalidEmail, canonical_email};
/// assert_eq!(canonical_email(" Ada@Example.ORG\n"), Ok("ada@example.org".to_owned()));
/// assert_eq!(canonical_email("ada"), Err(InvalidEmail));
/// ```
pub fn canonical_email(email: &str) -> Result<String, InvalidEmail> {
    let email = email.trim().to_lowercase();
    let (local, domain) = email.split_once('@').ok_or(InvalidEmail)?;
    let refused = |c: char| c.is_whitespace() || c == '\0';
    if local.is_empty()
        || domain.is_empty()
        || domain.contains('@')
        || email.contains(refused)
        || email.chars().count() > 255
    {
        return Err(InvalidEmail);
    }
    Ok(email)
}

/// A canonical address for an account of a living person.
fn new_email(email: &str) -> Result<String, InvalidEmail> {
    let email = canonical_email(email)?;
    if email.ends_with(ANONYMISED_DOMAIN) {
        return Err(InvalidEmail);
    }
    Ok(email)
}

impl User {
    /// Inserts a row and returns it with its defaults. [`sign_up`](Self::sign_up) takes an address in any spelling.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn insert(conn: &mut PgConnection, new: &NewUser<'_>) -> QueryResult<Self> {
        diesel::insert_into(users::table)
            .values(new)
            .returning(Self::as_returning())
            .get_result(conn)
    }

    /// The row of this key, if there is one.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find(conn: &mut PgConnection, id: UserId) -> QueryResult<Option<Self>> {
        users::table
            .find(id)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// All users, oldest first, `limit` at most, after the one given.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn list(
        conn: &mut PgConnection,
        after: Option<&Self>,
        limit: i64,
    ) -> QueryResult<Vec<Self>> {
        let mut query = users::table.select(Self::as_select()).into_boxed();
        if let Some(after) = after {
            query = query.filter(
                users::created_at.gt(after.created_at).or(users::created_at
                    .eq(after.created_at)
                    .and(users::id.gt(after.id))),
            );
        }
        query
            .order((users::created_at, users::id))
            .limit(limit)
            .load(conn)
    }

    /// Changes the row of this key and returns it as it is then; `None` where there is no such row. An empty changeset
    /// changes nothing.
    ///
    /// # Errors
    /// Any broken rule of the table; see [`ConstraintViolation`](crate::ConstraintViolation).
    pub fn update(
        conn: &mut PgConnection,
        id: UserId,
        changes: &UserChangeset<'_>,
    ) -> QueryResult<Option<Self>> {
        let updated = diesel::update(users::table.find(id))
            .set(changes)
            .returning(Self::as_returning())
            .get_result(conn)
            .optional_empty_changeset();
        found(updated, || Self::find(conn, id))
    }

    /// Deletes the row of this key; says whether there was one.
    ///
    /// # Errors
    /// A foreign key, while other rows refer to it.
    pub fn delete(conn: &mut PgConnection, id: UserId) -> QueryResult<bool> {
        diesel::delete(users::table.find(id))
            .execute(conn)
            .map(|deleted| deleted == 1)
    }

    /// Makes an account and returns it. `new.email` may be in any spelling; the account has the [canonical
    /// one](canonical_email). The free plan comes with it, by a trigger.
    ///
    /// One statement. Of several sign-ups with one address at the same time one wins, and the others wait for its
    /// outcome.
    ///
    /// # Errors
    /// [`EmailError::InvalidEmail`] and [`EmailTaken`](EmailError::EmailTaken), neither of which aborts the caller's
    /// transaction. Broken rules about the other columns do (`users_first_name_check`, `users_last_name_check`,
    /// `users_password_check`, `users_razorpay_customer_id_key`).
    pub fn sign_up(conn: &mut PgConnection, new: &NewUser<'_>) -> Result<Self, EmailError> {
        let email = new_email(new.email)?;
        diesel::insert_into(users::table)
            .values(NewUser {
                id: new.id.or_else(|| Some(UserId::new())),
                email: &email,
                ..*new
            })
            .on_conflict(users::email)
            .do_nothing()
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()?
            .ok_or(EmailError::EmailTaken)
    }

    /// The active user of this key.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find_active(conn: &mut PgConnection, id: UserId) -> QueryResult<Option<Self>> {
        users::table
            .find(id)
            .filter(users::is_active)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// The active user of this address, in any spelling. What isn't an address has no user.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn find_active_by_email(conn: &mut PgConnection, email: &str) -> QueryResult<Option<Self>> {
        let Ok(email) = canonical_email(email) else {
            return Ok(None);
        };
        users::table
            .filter(users::email.eq(email))
            .filter(users::is_active)
            .select(Self::as_select())
            .first(conn)
            .optional()
    }

    /// Records that an active user signed in now; `None` where there is no such user, or not an active one.
    ///
    /// One statement.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn record_login(conn: &mut PgConnection, id: UserId) -> QueryResult<Option<Self>> {
        diesel::update(users::table.find(id))
            .filter(users::is_active)
            .set(users::last_login_at.eq(now))
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()
    }

    /// Gives an active user another address, in any spelling; `None` where there is no such user, or not an active one.
    /// `email_verified` becomes `proven`: whether the user has shown that mail to the new address arrives, as by the
    /// code of an [`EmailChangePending`](AuthTokenType::EmailChangePending) token. Nothing carries over from the old
    /// address.
    ///
    /// Codes and links that went to the old address are revoked; refresh tokens stay, so the user stays signed in.
    ///
    /// Runs in a transaction, or a savepoint of the caller's, and locks the user's row until the transaction ends.
    ///
    /// # Errors
    /// [`EmailError::InvalidEmail`] and [`EmailTaken`](EmailError::EmailTaken), neither of which aborts the caller's
    /// transaction.
    pub fn change_email(
        conn: &mut PgConnection,
        id: UserId,
        email: &str,
        proven: bool,
    ) -> Result<Option<Self>, EmailError> {
        let email = new_email(email)?;
        let changed = conn.transaction(|conn| {
            let user = diesel::update(users::table.find(id))
                .filter(users::is_active)
                .set((users::email.eq(email), users::email_verified.eq(proven)))
                .returning(Self::as_returning())
                .get_result(conn)
                .optional()?;
            if user.is_some() {
                use AuthTokenType::{
                    EmailChangePending, EmailOtp, EmailVerification, PasswordReset,
                };
                let mailed = [
                    EmailOtp,
                    PasswordReset,
                    EmailVerification,
                    EmailChangePending,
                ];
                AuthToken::revoke_all(conn, id, Some(&mailed))?;
            }
            Ok(user)
        });
        changed.map_err(|error| {
            if violates(&error, "users_email_key") {
                EmailError::EmailTaken
            } else {
                EmailError::Database(error)
            }
        })
    }

    /// Deactivates a user, who can't sign in from then on, and revokes all tokens; `None` where there is no such user.
    /// Instances and the plan stay as they are.
    ///
    /// Runs in a transaction, or a savepoint of the caller's, and locks the user's row until the transaction ends.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn deactivate(conn: &mut PgConnection, id: UserId) -> QueryResult<Option<Self>> {
        conn.transaction(|conn| {
            let user = diesel::update(users::table.find(id))
                .set(users::is_active.eq(false))
                .returning(Self::as_returning())
                .get_result(conn)
                .optional()?;
            if user.is_some() {
                AuthToken::revoke_all(conn, id, None)?;
            }
            Ok(user)
        })
    }

    /// Lets a deactivated user sign in again; `None` where there is no such user, or an anonymised one. Tokens that
    /// were revoked stay so.
    ///
    /// One statement.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn reactivate(conn: &mut PgConnection, id: UserId) -> QueryResult<Option<Self>> {
        diesel::update(users::table.find(id))
            .filter(users::email.ne(anonymised_email(id)))
            .set(users::is_active.eq(true))
            .returning(Self::as_returning())
            .get_result(conn)
            .optional()
    }

    /// Removes the person for good and keeps the rows that are money; `None` where there is no such user. A user
    /// without such rows can be [deleted](Self::delete) instead. The gateway's own records, and a subscription that
    /// still runs there, are the caller's to end first.
    ///
    /// - The user's names, password, gateway customer and last login go; the address becomes
    ///   `<id>@anonymised.invalid`; the user is inactive.
    /// - Instances with their credentials, tokens and billing details are deleted. The plan is free, without a trace of
    ///   the gateway.
    /// - Subscriptions lose the gateway customer, reason and feedback; transactions the gateway's answer, details of
    ///   the method, description and reason of failure; credits the description. Amounts, dates, states and the numbers
    ///   of payments, orders, receipts and invoices stay.
    /// - Webhooks that name the address or a gateway customer, and are processed or skipped, lose their payload. This
    ///   reads the whole table. Those that are still open keep it: process them before.
    ///
    /// The audit log has keys only, and forgets them after 90 days. A schema `bruhmcp_archive` and backups are not
    /// touched.
    ///
    /// Runs in a transaction, or a savepoint of the caller's. Locks, in this order, the user's plan, credentials,
    /// instances, and the user's row.
    ///
    /// # Errors
    /// Only those of the connection.
    pub fn anonymise(conn: &mut PgConnection, id: UserId) -> QueryResult<Option<Self>> {
        conn.transaction(|conn| {
            let plan = UserPlan::lock_by_user(conn, id)?;
            delete_instances(conn, id)?;
            diesel::update(user_plans::table.filter(user_plans::user_id.eq(id)))
                .set((
                    user_plans::plan_type.eq(PlanType::Free),
                    user_plans::max_instances.eq(1),
                    user_plans::features.eq(json!({})),
                    user_plans::expires_at.eq(None::<DateTime<Utc>>),
                    user_plans::subscription_id.eq(None::<&str>),
                    user_plans::customer_id.eq(None::<&str>),
                    user_plans::payment_status.eq(PlanPaymentStatus::None),
                ))
                .execute(conn)?;

            let person = users::table
                .find(id)
                .select(Self::as_select())
                .for_no_key_update()
                .first(conn)
                .optional()?;
            let Some(person) = person else {
                return Ok(None);
            };
            let user = diesel::update(users::table.find(id))
                .set((
                    users::first_name.eq("Anonymised"),
                    users::last_name.eq(""),
                    users::email.eq(anonymised_email(id)),
                    users::password.eq(None::<SecretText>),
                    users::email_verified.eq(false),
                    users::razorpay_customer_id.eq(None::<&str>),
                    users::last_login_at.eq(None::<DateTime<Utc>>),
                    users::is_active.eq(false),
                ))
                .returning(Self::as_returning())
                .get_result(conn)?;
            diesel::delete(auth_tokens::table.filter(auth_tokens::user_id.eq(id))).execute(conn)?;
            diesel::delete(
                user_billing_details::table.filter(user_billing_details::user_id.eq(id)),
            )
            .execute(conn)?;

            let mut names = vec![person.email];
            names.extend(person.razorpay_customer_id);
            names.extend(plan.and_then(|plan| plan.customer_id));
            names.extend(anonymise_money(conn, id)?);
            anonymise_webhooks(conn, &names)?;
            Ok(Some(user))
        })
    }
}

fn anonymised_email(id: UserId) -> String {
    format!("{id}{ANONYMISED_DOMAIN}")
}

fn delete_instances(conn: &mut PgConnection, user_id: UserId) -> QueryResult<()> {
    // Registry order: the order in which the counters of mcp_table are locked at commit.
    let instances: Vec<InstanceId> = mcp_service_table::table
        .filter(mcp_service_table::user_id.eq(user_id))
        .order((
            mcp_service_table::mcp_service_id,
            mcp_service_table::instance_id,
        ))
        .select(mcp_service_table::instance_id)
        .load(conn)?;
    // The cascade would lock credentials after their instance.
    mcp_credentials::table
        .filter(mcp_credentials::instance_id.eq_any(&instances))
        .order(mcp_credentials::instance_id)
        .select(mcp_credentials::credential_id)
        .for_update()
        .load::<CredentialId>(conn)?;
    for instance in instances {
        diesel::delete(mcp_service_table::table.find(instance)).execute(conn)?;
    }
    Ok(())
}

/// Returns the gateway customers that the subscriptions had.
fn anonymise_money(conn: &mut PgConnection, user_id: UserId) -> QueryResult<Vec<String>> {
    let subscriptions = user_subscriptions::table.filter(user_subscriptions::user_id.eq(user_id));
    let customers = subscriptions
        .filter(user_subscriptions::razorpay_customer_id.is_not_null())
        .select(user_subscriptions::razorpay_customer_id.assume_not_null())
        .load(conn)?;
    diesel::update(subscriptions)
        .set((
            user_subscriptions::razorpay_customer_id.eq(None::<&str>),
            user_subscriptions::cancellation_reason.eq(None::<&str>),
            user_subscriptions::cancellation_feedback.eq(None::<&str>),
        ))
        .execute(conn)?;
    let transactions =
        subscription_transactions::table.filter(subscription_transactions::user_id.eq(user_id));
    diesel::update(transactions)
        .set((
            subscription_transactions::method_details_json.eq(None::<serde_json::Value>),
            subscription_transactions::gateway_response_json.eq(None::<serde_json::Value>),
            subscription_transactions::description.eq(None::<&str>),
            subscription_transactions::failure_reason.eq(None::<&str>),
        ))
        .execute(conn)?;
    diesel::update(account_credits::table.filter(account_credits::user_id.eq(user_id)))
        .set(account_credits::description.eq(None::<&str>))
        .execute(conn)?;
    Ok(customers)
}

/// Empties the payload of each settled webhook in which a string is one of `names`, in any case.
fn anonymise_webhooks(conn: &mut PgConnection, names: &[String]) -> QueryResult<()> {
    // Not the DSL: it has no set-returning function in FROM.
    diesel::sql_query(
        r#"UPDATE webhook_events
              SET payload = '{}', error_message = NULL
            WHERE processing_status IN ('processed', 'skipped')
              AND EXISTS (
                      SELECT
                        FROM jsonb_path_query(payload, 'strict $.** ? (@.type() == "string")') AS text
                       WHERE lower(text #>> '{}') IN (SELECT lower(name) FROM unnest($1) AS name)
                  )"#,
    )
    .bind::<Array<Text>, _>(names)
    .execute(conn)?;
    Ok(())
}
