//! The refresh queue: `claim_due`, then `store_refreshed`, `refresh_failed` or `refresh_refused`
//! for each row.

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::sql_types::{BigInt, Text, Timestamptz};

use super::{CredentialError, McpCredential, OauthTokens, lock_user};
use crate::enums::{AuditStatus, OauthStatus};
use crate::ids::InstanceId;
use crate::models::{NewTokenAudit, TokenAudit};
use crate::schema::mcp_credentials;

/// The operation in the audit log.
const TOKEN_REFRESH: &str = "token_refresh";

impl McpCredential {
    /// Claims up to `limit` rows with a refresh token whose access token ends before `due`, most
    /// urgent first.
    ///
    /// Skips rows that another worker has locked, rows of users that are locked by `User::lock`,
    /// and rows whose refresh failed after `not_failed_since`, so that one provider's outage
    /// doesn't block the others.
    ///
    /// The claim is a row lock: it prevents two workers from spending one refresh token. So ask the
    /// provider within the transaction, with a short time limit, and claim one row at a time on a
    /// connection of the worker's own. Calls of the instance don't wait for the lock; changes to
    /// its credentials and `User::lock` do.
    ///
    /// ```no_run
    /// # use bruhmcp_db::models::{CredentialError, McpCredential, OauthTokens};
    /// # use chrono::{TimeDelta, Utc};
    /// # use diesel::Connection;
    /// # enum Answer { Tokens(OauthTokens<'static>), InvalidGrant, Unreachable }
    /// # fn ask_provider(_: &McpCredential) -> Answer { Answer::InvalidGrant }
    /// /// Refreshes one row; returns whether one was due.
    /// fn work(conn: &mut diesel::PgConnection) -> Result<bool, CredentialError> {
    ///     conn.transaction(|conn| {
    ///         let due = Utc::now() + TimeDelta::minutes(10);
    ///         let not_failed_since = Utc::now() - TimeDelta::minutes(1);
    ///         let claimed = McpCredential::claim_due(conn, due, not_failed_since, 1)?;
    ///         for old in &claimed {
    ///             match ask_provider(old) {
    ///                 Answer::Tokens(tokens) => {
    ///                     McpCredential::store_refreshed(conn, old, &tokens)?;
    ///                 }
    ///                 Answer::InvalidGrant => {
    ///                     McpCredential::refresh_refused(conn, old)?;
    ///                 }
    ///                 Answer::Unreachable => {
    ///                     McpCredential::refresh_failed(conn, old, "network", None)?;
    ///                 }
    ///             }
    ///         }
    ///         Ok(!claimed.is_empty())
    ///     })
    /// }
    /// ```
    pub fn claim_due(
        conn: &mut PgConnection,
        due: DateTime<Utc>,
        not_failed_since: DateTime<Utc>,
        limit: u16,
    ) -> QueryResult<Vec<Self>> {
        // The query builder has no FOR … OF. The user is locked for the reason that `lock_user`
        // gives. 'completed' is a literal, because a bind can't match the predicate of the queue's
        // index in a generic plan.
        diesel::sql_query(
            "SELECT credential.*
               FROM mcp_credentials AS credential
               JOIN mcp_service_table AS instance USING (instance_id)
               JOIN users ON users.id = instance.user_id
              WHERE credential.refresh_token IS NOT NULL
                AND credential.oauth_status = 'completed'
                AND credential.token_expires_at < $1
                AND NOT EXISTS (
                        SELECT FROM token_audit_log AS failed
                         WHERE failed.instance_id = credential.instance_id
                           AND failed.operation = $2
                           AND failed.status = 'failure'
                           AND failed.created_at > $3)
              ORDER BY credential.token_expires_at
              LIMIT $4
                FOR KEY SHARE OF users SKIP LOCKED
                FOR NO KEY UPDATE OF credential SKIP LOCKED",
        )
        .bind::<Timestamptz, _>(due)
        .bind::<Text, _>(TOKEN_REFRESH)
        .bind::<Timestamptz, _>(not_failed_since)
        .bind::<BigInt, _>(i64::from(limit))
        .load(conn)
    }

    /// Stores refreshed tokens, if the row still has the version of `claimed`, and records it in
    /// the audit log.
    ///
    /// # Errors
    /// `NotFound`; `Conflict`. If the row in `Conflict` still has the spent refresh token, because
    /// only the sealing or the client changed, call again with that row, or the new tokens are
    /// lost.
    pub fn store_refreshed(
        conn: &mut PgConnection,
        claimed: &Self,
        tokens: &OauthTokens<'_>,
    ) -> Result<Self, CredentialError> {
        conn.transaction(|conn| {
            lock_user(conn, claimed.credential_id)?;
            let stored = diesel::update(mcp_credentials::table.find(claimed.credential_id))
                .filter(mcp_credentials::version.eq(claimed.version))
                .filter(mcp_credentials::oauth_status.eq(OauthStatus::Completed))
                .filter(mcp_credentials::client_id.is_not_null())
                .set((
                    mcp_credentials::access_token.eq(&tokens.access_token),
                    mcp_credentials::token_expires_at.eq(tokens.expires_at),
                    tokens
                        .refresh_token
                        .as_ref()
                        .map(|token| mcp_credentials::refresh_token.eq(token)),
                    tokens
                        .scope
                        .map(|scope| mcp_credentials::token_scope.eq(scope)),
                ))
                .returning(Self::as_returning())
                .get_result(conn)
                .optional()?;
            let credential = Self::or_oauth_conflict(conn, stored, claimed.credential_id)?;
            TokenAudit::insert(conn, &audit(credential.instance_id, AuditStatus::Success))?;
            credential.note_update(conn)?;
            Ok(credential)
        })
    }

    /// Records a refresh that failed for now, such as a network error or the provider's outage.
    ///
    /// The credentials stay due. [`claim_due`](Self::claim_due) skips them for a while.
    /// `error_type` and `error_message` go to the audit log and must not contain a secret.
    pub fn refresh_failed(
        conn: &mut PgConnection,
        claimed: &Self,
        error_type: &str,
        error_message: Option<&str>,
    ) -> QueryResult<TokenAudit> {
        TokenAudit::insert(
            conn,
            &NewTokenAudit {
                error_type: Some(error_type),
                error_message,
                ..audit(claimed.instance_id, AuditStatus::Failure)
            },
        )
    }

    /// Marks the authorization as expired, because the provider refused the refresh token
    /// (`invalid_grant`), if the row still has the version of `claimed`. Records it in the audit
    /// log. The user must grant access again.
    ///
    /// # Errors
    /// `NotFound`; `Conflict`: the refused token may not be the latest.
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
                .set(mcp_credentials::oauth_status.eq(OauthStatus::Expired))
                .returning(Self::as_returning())
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
