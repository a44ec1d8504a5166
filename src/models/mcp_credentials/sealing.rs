//! Operations that need the keys: sealing new credentials, opening secrets, and key rotation.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::result::Error::SerializationError;
use diesel::sql_types::{Binary, Bool, Integer, Nullable};
use uuid::Uuid;

use super::{McpCredential, NewMcpCredential, OauthTokens};
use crate::crypto::{KeyRing, OpenError, SealError, SecretColumn};
use crate::ids::{CredentialId, InstanceId};
use crate::prepared::Prepare;
use crate::schema::mcp_credentials;
use crate::secret::{Sealed, SecretText};

#[diesel::declare_sql_function]
extern "SQL" {
    fn substr(bytes: Nullable<Binary>, from: Integer, count: Integer) -> Nullable<Binary>;
}

impl<'a> NewMcpCredential<'a> {
    /// An API key of this instance. It is completed, now by this machine's clock.
    ///
    /// # Errors
    /// Those of [`KeyRing::seal`].
    pub fn api_key(
        ring: &KeyRing,
        instance_id: InstanceId,
        api_key: &SecretText,
    ) -> Result<Self, SealError> {
        let api_key = ring.seal(api_key, instance_id, SecretColumn::ApiKey)?;
        Ok(Self::sealed_api_key(instance_id, api_key))
    }

    /// An OAuth client of this instance. It is pending; [`McpCredential::begin_oauth`] comes next.
    ///
    /// # Errors
    /// Those of [`KeyRing::seal`].
    pub fn oauth(
        ring: &KeyRing,
        instance_id: InstanceId,
        client_id: &'a str,
        client_secret: &SecretText,
    ) -> Result<Self, SealError> {
        let client_secret = ring.seal(client_secret, instance_id, SecretColumn::ClientSecret)?;
        Ok(Self::sealed_oauth(instance_id, client_id, client_secret))
    }
}

impl<'a> OauthTokens<'a> {
    /// Seals tokens of this instance.
    ///
    /// # Errors
    /// Those of [`KeyRing::seal`].
    pub fn seal(
        ring: &KeyRing,
        instance_id: InstanceId,
        access_token: &SecretText,
        refresh_token: Option<&SecretText>,
        expires_at: Option<DateTime<Utc>>,
        scope: Option<&'a str>,
    ) -> Result<Self, SealError> {
        let seal = |token, column| ring.seal(token, instance_id, column);
        Ok(Self {
            access_token: seal(access_token, SecretColumn::AccessToken)?,
            refresh_token: refresh_token
                .map(|token| seal(token, SecretColumn::RefreshToken))
                .transpose()?,
            expires_at,
            scope,
        })
    }
}

/// The result of one batch of [`McpCredential::reseal`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resealed {
    /// The number of rows with newly sealed values.
    pub resealed: usize,
    /// Rows with a value that doesn't open: the ring lacks its key, or it was altered. The value is
    /// unchanged.
    pub unopened: Vec<CredentialId>,
    /// The `after` of the next batch; `None` after the last one.
    pub next: Option<CredentialId>,
}

impl McpCredential {
    /// Opens the secret in a column; `None` if the column is `NULL`.
    ///
    /// # Errors
    /// [`OpenError`], which contains nothing of the secret.
    pub fn open(
        &self,
        ring: &KeyRing,
        column: SecretColumn,
    ) -> Result<Option<SecretText>, OpenError> {
        self.sealed(column)
            .map(|sealed| ring.open(sealed, self.instance_id, column))
            .transpose()
    }

    /// Seals old values again in the newest format, under the newest key. It looks at up to `limit`
    /// rows in the order of their keys, after the row `after`. Increments `version`, but leaves
    /// `credentials_updated_at`.
    ///
    /// One transaction. Skips rows that others have locked, so no change is lost, and a pass may
    /// leave rows behind. To retire a key once every process seals with the newest:
    ///
    /// ```no_run
    /// # use bruhmcp_db::{crypto::KeyRing, models::McpCredential};
    /// # fn retire(conn: &mut diesel::PgConnection, ring: &KeyRing) -> diesel::QueryResult<()> {
    /// let mut after = None;
    /// loop {
    ///     let batch = McpCredential::reseal(conn, ring, after, 500)?;
    ///     // Investigate batch.unopened.
    ///     after = batch.next;
    ///     if after.is_none() {
    ///         break;
    ///     }
    /// }
    /// if McpCredential::count_to_reseal(conn, ring)? == 0 {
    ///     // Nothing needs the older keys.
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// `SerializationError` with a [`SealError`] if the operating system provides no random bytes.
    pub fn reseal(
        conn: &mut PgConnection,
        ring: &KeyRing,
        after: Option<CredentialId>,
        limit: u16,
    ) -> QueryResult<Resealed> {
        conn.transaction(|conn| {
            let after = after.unwrap_or(CredentialId(Uuid::nil()));
            // Keys first: a limit on the rows to reseal would read all others, too.
            let keys: Vec<CredentialId> = mcp_credentials::table
                .filter(mcp_credentials::credential_id.gt(after))
                .order(mcp_credentials::credential_id)
                .limit(limit.into())
                .select(mcp_credentials::credential_id)
                .load(conn)?;
            let last = keys.last().copied().unwrap_or(after);
            let rows: Vec<Self> = mcp_credentials::table
                .filter(mcp_credentials::credential_id.gt(after))
                .filter(mcp_credentials::credential_id.le(last))
                .filter(sealed_otherwise(ring))
                .order(mcp_credentials::credential_id)
                .select(Self::as_select())
                .for_no_key_update()
                .skip_locked()
                .load(conn)?;

            let mut batch = Resealed {
                resealed: 0,
                unopened: Vec::new(),
                next: (keys.len() == usize::from(limit)).then_some(last),
            };
            for row in &rows {
                let mut changes = NewlySealed::default();
                let (mut changed, mut unopened) = (false, false);
                for column in SecretColumn::ALL {
                    let Some(sealed) = row.sealed(column) else {
                        continue;
                    };
                    if ring.is_newest(sealed) {
                        continue;
                    }
                    match ring.open(sealed, row.instance_id, column) {
                        Ok(secret) => {
                            let sealed = ring
                                .seal(&secret, row.instance_id, column)
                                .map_err(|error| SerializationError(Box::new(error)))?;
                            *changes.column(column) = Some(sealed);
                            changed = true;
                        }
                        Err(_) => unopened = true,
                    }
                }
                if changed {
                    diesel::update(mcp_credentials::table.find(row.credential_id))
                        .set(&changes)
                        .prepared()
                        .execute(conn)?;
                    batch.resealed += 1;
                }
                if unopened {
                    batch.unopened.push(row.credential_id);
                }
            }
            Ok(batch)
        })
    }

    /// Counts the rows with a value of another format or under another key than the newest,
    /// including values that don't open.
    ///
    /// Reads the whole table.
    pub fn count_to_reseal(conn: &mut PgConnection, ring: &KeyRing) -> QueryResult<i64> {
        mcp_credentials::table
            .filter(sealed_otherwise(ring))
            .count()
            .get_result(conn)
    }

    fn sealed(&self, column: SecretColumn) -> Option<&Sealed> {
        match column {
            SecretColumn::ApiKey => self.api_key.as_ref(),
            SecretColumn::ClientSecret => self.client_secret.as_ref(),
            SecretColumn::AccessToken => self.access_token.as_ref(),
            SecretColumn::RefreshToken => self.refresh_token.as_ref(),
            SecretColumn::OauthAuthorizationUrl => self.oauth_authorization_url.as_ref(),
            SecretColumn::OauthCodeVerifier => self.oauth_code_verifier.as_ref(),
        }
    }
}

/// The sealed columns; `None` keeps the value.
#[derive(Default, AsChangeset)]
#[diesel(table_name = mcp_credentials)]
struct NewlySealed {
    api_key: Option<Sealed>,
    client_secret: Option<Sealed>,
    access_token: Option<Sealed>,
    refresh_token: Option<Sealed>,
    oauth_authorization_url: Option<Sealed>,
    oauth_code_verifier: Option<Sealed>,
}

impl NewlySealed {
    fn column(&mut self, column: SecretColumn) -> &mut Option<Sealed> {
        match column {
            SecretColumn::ApiKey => &mut self.api_key,
            SecretColumn::ClientSecret => &mut self.client_secret,
            SecretColumn::AccessToken => &mut self.access_token,
            SecretColumn::RefreshToken => &mut self.refresh_token,
            SecretColumn::OauthAuthorizationUrl => &mut self.oauth_authorization_url,
            SecretColumn::OauthCodeVerifier => &mut self.oauth_code_verifier,
        }
    }
}

/// Rows with a value whose first bytes name another key than the newest.
fn sealed_otherwise(
    ring: &KeyRing,
) -> Box<dyn BoxableExpression<mcp_credentials::table, Pg, SqlType = Nullable<Bool>>> {
    let newest = ring.newest_header();
    Box::new(
        substr(mcp_credentials::api_key, 1, 2)
            .ne(newest.to_vec())
            .or(substr(mcp_credentials::client_secret, 1, 2).ne(newest.to_vec()))
            .or(substr(mcp_credentials::access_token, 1, 2).ne(newest.to_vec()))
            .or(substr(mcp_credentials::refresh_token, 1, 2).ne(newest.to_vec()))
            .or(substr(mcp_credentials::oauth_authorization_url, 1, 2).ne(newest.to_vec()))
            .or(substr(mcp_credentials::oauth_code_verifier, 1, 2).ne(newest.to_vec())),
    )
}
