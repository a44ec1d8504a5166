//! Refreshes: `claim_due` or `lease_refresh`, then `store_refreshed`, `refresh_failed` or
//! `refresh_refused`.

use chrono::{DateTime, TimeDelta, Utc};
use diesel::dsl::{now, sql};
use diesel::prelude::*;
use diesel::result::Error::QueryBuilderError;
use diesel::sql_types::{BigInt, Interval, Nullable, Timestamptz};

use super::{CredentialError, McpCredential, OauthTokens, lock_user};
use crate::enums::{AuditStatus, OauthStatus};
use crate::ids::{CredentialId, InstanceId};
use crate::models::{NewTokenAudit, TokenAudit, is_lease};
use crate::prepared::Prepare;
use crate::schema::mcp_credentials;

fn check_lease(lease: TimeDelta) -> Result<(), CredentialError> {
    if is_lease(lease) {
        Ok(())
    } else {
        Err(CredentialError::Invalid(
            "a lease or pause is not negative and at most 365 days",
        ))
    }
}

/// The operation in the audit log.
const TOKEN_REFRESH: &str = "token_refresh";

/// What [`McpCredential::lease_refresh`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RefreshLease {
    /// The caller has the lease and refreshes.
    Leased(McpCredential),
    /// The access token ends later than asked, or its end is unknown. Use it.
    Fresh(McpCredential),
    /// Another caller refreshes, or a refresh has just failed. Ask again after `until`, or earlier:
    /// the lease ends when the tokens are stored.
    Wait {
        /// The end of the lease by the database's clock.
        until: DateTime<Utc>,
    },
    /// There is no refresh token, or the authorization isn't completed. The user must grant access.
    Unrefreshable(McpCredential),
}

impl McpCredential {
    /// Leases up to `limit` rows with a refresh token whose access token ends before `due`, most
    /// urgent first. Rows that wait since a lease or a pause ended come after all others.
    ///
    /// A lease prevents two workers from spending one refresh token. It ends after `lease` by the
    /// database's clock, or when the tokens are stored. It doesn't change `version` and
    /// `updated_at`, and nothing but a refresh waits for it. Choose a lease longer than the
    /// provider's time limit for all rows of a batch: when it ends, another worker takes the row.
    ///
    /// One statement, which waits for no lock: rows that others have locked are skipped. Call it
    /// outside a transaction, and ask the provider outside one:
    ///
    /// ```no_run
    /// # use bruhmcp_db::models::{CredentialError, McpCredential, OauthTokens};
    /// # use chrono::{TimeDelta, Utc};
    /// # enum Answer { Tokens(OauthTokens<'static>), InvalidGrant, Unreachable }
    /// # fn ask_provider(_: &McpCredential) -> Answer { Answer::InvalidGrant }
    /// /// Refreshes one row; returns whether one was due.
    /// fn work(conn: &mut diesel::PgConnection) -> Result<bool, CredentialError> {
    ///     let due = Utc::now() + TimeDelta::minutes(10);
    ///     let leased = McpCredential::claim_due(conn, due, TimeDelta::minutes(1), 1)?;
    ///     for old in &leased {
    ///         match ask_provider(old) {
    ///             Answer::Tokens(tokens) => {
    ///                 McpCredential::store_refreshed(conn, old, &tokens)?;
    ///             }
    ///             Answer::InvalidGrant => {
    ///                 McpCredential::refresh_refused(conn, old)?;
    ///             }
    ///             Answer::Unreachable => {
    ///                 let pause = TimeDelta::minutes(5);
    ///                 McpCredential::refresh_failed(conn, old, "network", None, pause)?;
    ///             }
    ///         }
    ///     }
    ///     Ok(!leased.is_empty())
    /// }
    /// ```
    ///
    /// # Errors
    /// [`CredentialError::Invalid`] within `QueryBuilderError` if `lease` is negative or over 365
    /// days.
    pub fn claim_due(
        conn: &mut PgConnection,
        due: DateTime<Utc>,
        lease: TimeDelta,
        limit: u16,
    ) -> QueryResult<Vec<Self>> {
        check_lease(lease).map_err(|error| QueryBuilderError(Box::new(error)))?;
        // Two scans of the queue's index, each of which begins at the rows it takes: among the
        // others may be thousands that are leased. The order is the index's. 'completed' is a
        // literal, because a bind can't match the predicate of the index in a generic plan; an
        // array, because the planner expects few elements of it and looks them up by key.
        let mut leased: Vec<Self> = diesel::sql_query(
            "WITH waiting AS MATERIALIZED (
                 SELECT credential_id
                   FROM mcp_credentials
                  WHERE refresh_token IS NOT NULL
                    AND oauth_status = 'completed'
                    AND refresh_leased_until IS NULL
                    AND token_expires_at < $1
                  ORDER BY refresh_leased_until NULLS FIRST, token_expires_at
                  LIMIT $3
                    FOR NO KEY UPDATE SKIP LOCKED
             ), again AS MATERIALIZED (
                 SELECT credential_id
                   FROM mcp_credentials
                  WHERE refresh_token IS NOT NULL
                    AND oauth_status = 'completed'
                    AND refresh_leased_until <= now()
                    AND token_expires_at < $1
                  ORDER BY refresh_leased_until NULLS FIRST, token_expires_at
                  LIMIT $3 - (SELECT count(*) FROM waiting)
                    FOR NO KEY UPDATE SKIP LOCKED
             )
             UPDATE mcp_credentials
                SET refresh_leased_until = now() + $2
              WHERE credential_id = ANY (ARRAY(
                        SELECT credential_id FROM waiting
                         UNION ALL
                        SELECT credential_id FROM again))
             RETURNING credential_id, instance_id, api_key, client_id, client_secret, access_token,
                 refresh_token, token_expires_at, token_scope, oauth_status, oauth_completed_at,
                 oauth_authorization_url, oauth_state, oauth_state_expires_at, oauth_code_verifier,
                 refresh_leased_until, created_at, updated_at, version, last_modified",
        )
        .bind::<Timestamptz, _>(due)
        .bind::<Interval, _>(lease)
        .bind::<BigInt, _>(i64::from(limit))
        .prepared()
        .load(conn)?;
        leased.sort_by_key(|row| row.token_expires_at);
        Ok(leased)
    }

    /// Leases one row for a refresh, if its access token ends before `due` and nobody else has it.
    ///
    /// For a call that finds the access token expired: of many callers one refreshes. `due` is a
    /// time by this machine's clock. If the service refused a token before its end, ask with a
    /// `due` after it. One or two statements; call it outside a transaction, as
    /// [`claim_due`](Self::claim_due).
    ///
    /// ```no_run
    /// # use bruhmcp_db::models::{CredentialError, McpCredential, OauthTokens, RefreshLease};
    /// # use chrono::{TimeDelta, Utc};
    /// # fn ask_provider(_: &McpCredential) -> OauthTokens<'static> { unimplemented!() }
    /// /// Returns credentials with an access token that is valid for some seconds.
    /// fn fresh(
    ///     conn: &mut diesel::PgConnection,
    ///     row: &McpCredential,
    /// ) -> Result<Option<McpCredential>, CredentialError> {
    ///     for _ in 0..100 {
    ///         let due = Utc::now() + TimeDelta::seconds(5);
    ///         let lease = TimeDelta::seconds(30);
    ///         match McpCredential::lease_refresh(conn, row.credential_id, due, lease)? {
    ///             RefreshLease::Leased(old) => {
    ///                 let tokens = ask_provider(&old);
    ///                 return McpCredential::store_refreshed(conn, &old, &tokens).map(Some);
    ///             }
    ///             RefreshLease::Fresh(row) => return Ok(Some(row)),
    ///             RefreshLease::Wait { .. } => {
    ///                 std::thread::sleep(std::time::Duration::from_millis(100));
    ///             }
    ///             RefreshLease::Unrefreshable(_) => return Ok(None),
    ///         }
    ///     }
    ///     Ok(None)
    /// }
    /// ```
    ///
    /// # Errors
    /// [`CredentialError::NotFound`]; [`CredentialError::Invalid`] if `lease` is negative or over
    /// 365 days.
    pub fn lease_refresh(
        conn: &mut PgConnection,
        credential_id: CredentialId,
        due: DateTime<Utc>,
        lease: TimeDelta,
    ) -> Result<RefreshLease, CredentialError> {
        check_lease(lease)?;
        let leased = diesel::update(mcp_credentials::table.find(credential_id))
            .filter(mcp_credentials::refresh_token.is_not_null())
            .filter(mcp_credentials::oauth_status.eq(OauthStatus::Completed))
            .filter(mcp_credentials::token_expires_at.lt(due))
            .filter(
                mcp_credentials::refresh_leased_until
                    .is_null()
                    .or(mcp_credentials::refresh_leased_until.le(now)),
            )
            .set(
                mcp_credentials::refresh_leased_until
                    .eq(sql::<Nullable<Timestamptz>>("now() + ").bind::<Interval, _>(lease)),
            )
            .returning(Self::as_returning())
            .prepared()
            .get_result(conn)
            .optional()?;
        if let Some(credential) = leased {
            return Ok(RefreshLease::Leased(credential));
        }
        let current = Self::find(conn, credential_id)?
            .filter(|current| current.client_id.is_some())
            .ok_or(CredentialError::NotFound)?;
        Ok(if current.oauth_status != OauthStatus::Completed {
            RefreshLease::Unrefreshable(current)
        } else if current.token_expires_at.is_none_or(|end| end >= due) {
            RefreshLease::Fresh(current)
        } else if current.refresh_token.is_none() {
            RefreshLease::Unrefreshable(current)
        } else {
            // Without a lease, it has ended since the update.
            let until = current.refresh_leased_until.unwrap_or_else(Utc::now);
            RefreshLease::Wait { until }
        })
    }

    /// Stores refreshed tokens, if the row still has the version of `claimed`, ends the lease, and
    /// records it in the audit log. Six round trips.
    ///
    /// # Errors
    /// [`CredentialError::NotFound`]; [`CredentialError::Invalid`]; [`CredentialError::Conflict`].
    /// If the row in [`CredentialError::Conflict`] still has the spent refresh token, because only
    /// the sealing or the client changed, call again with that row, or the new tokens are lost.
    pub fn store_refreshed(
        conn: &mut PgConnection,
        claimed: &Self,
        tokens: &OauthTokens<'_>,
    ) -> Result<Self, CredentialError> {
        tokens.check()?;
        conn.transaction(|conn| {
            lock_user(conn, claimed.credential_id)?;
            let stored = diesel::update(mcp_credentials::table.find(claimed.credential_id))
                .filter(mcp_credentials::version.eq(claimed.version))
                .filter(mcp_credentials::oauth_status.eq(OauthStatus::Completed))
                .filter(mcp_credentials::client_id.is_not_null())
                .set((
                    mcp_credentials::access_token.eq(&tokens.access_token),
                    mcp_credentials::token_expires_at.eq(tokens.expires_at),
                    mcp_credentials::refresh_leased_until.eq(None::<DateTime<Utc>>),
                    tokens
                        .refresh_token
                        .as_ref()
                        .map(|token| mcp_credentials::refresh_token.eq(token)),
                    tokens
                        .scope
                        .map(|scope| mcp_credentials::token_scope.eq(scope)),
                ))
                .returning(Self::as_returning())
                .prepared()
                .get_result(conn)
                .optional()?;
            let credential = Self::or_oauth_conflict(conn, stored, claimed.credential_id)?;
            TokenAudit::insert(conn, &audit(credential.instance_id, AuditStatus::Success))?;
            credential.note_update(conn)?;
            Ok(credential)
        })
    }

    /// Records a refresh that failed for now, such as a network error or the provider's outage, and
    /// keeps the row from being leased for `pause`.
    ///
    /// The pause takes the place of the lease of `claimed`; if others have the row by now, only the
    /// audit log tells. `error_type` and `error_message` go to the audit log and must not contain a
    /// secret. Four round trips.
    ///
    /// # Errors
    /// [`CredentialError::Invalid`] within `QueryBuilderError` if `pause` is negative or over 365
    /// days.
    pub fn refresh_failed(
        conn: &mut PgConnection,
        claimed: &Self,
        error_type: &str,
        error_message: Option<&str>,
        pause: TimeDelta,
    ) -> QueryResult<TokenAudit> {
        check_lease(pause).map_err(|error| QueryBuilderError(Box::new(error)))?;
        conn.transaction(|conn| {
            let leased = claimed.refresh_leased_until;
            diesel::update(mcp_credentials::table.find(claimed.credential_id))
                .filter(mcp_credentials::version.eq(claimed.version))
                .filter(mcp_credentials::refresh_leased_until.is_not_distinct_from(leased))
                .set(
                    mcp_credentials::refresh_leased_until
                        .eq(sql::<Nullable<Timestamptz>>("now() + ").bind::<Interval, _>(pause)),
                )
                .prepared()
                .execute(conn)?;
            TokenAudit::insert(
                conn,
                &NewTokenAudit {
                    error_type: Some(error_type),
                    error_message,
                    ..audit(claimed.instance_id, AuditStatus::Failure)
                },
            )
        })
    }

    /// Marks the authorization as expired, because the provider refused the refresh token
    /// (`invalid_grant`), if the row still has the version of `claimed`. Records it in the audit
    /// log. The user must grant access again. Five round trips.
    ///
    /// # Errors
    /// [`CredentialError::NotFound`]; [`CredentialError::Conflict`]: the refused token may not be
    /// the latest.
    pub fn refresh_refused(
        conn: &mut PgConnection,
        claimed: &Self,
    ) -> Result<Self, CredentialError> {
        conn.transaction(|conn| {
            lock_user(conn, claimed.credential_id)?;
            let expired = diesel::update(mcp_credentials::table.find(claimed.credential_id))
                .filter(mcp_credentials::version.eq(claimed.version))
                .filter(mcp_credentials::oauth_status.eq(OauthStatus::Completed))
                .filter(mcp_credentials::client_id.is_not_null())
                .set((
                    mcp_credentials::oauth_status.eq(OauthStatus::Expired),
                    mcp_credentials::refresh_leased_until.eq(None::<DateTime<Utc>>),
                ))
                .returning(Self::as_returning())
                .prepared()
                .get_result(conn)
                .optional()?;
            let credential = Self::or_oauth_conflict(conn, expired, claimed.credential_id)?;
            TokenAudit::insert(
                conn,
                &NewTokenAudit {
                    error_type: Some("invalid_grant"),
                    ..audit(credential.instance_id, AuditStatus::Failure)
                },
            )?;
            Ok(credential)
        })
    }
}

fn audit(instance_id: InstanceId, status: AuditStatus) -> NewTokenAudit<'static> {
    NewTokenAudit {
        method: Some("oauth"),
        ..NewTokenAudit::new(instance_id, TOKEN_REFRESH, status)
    }
}
