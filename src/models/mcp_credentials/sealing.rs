//! What needs the keys: rows made with secrets sealed, secrets opened, and sealed anew when keys are rotated.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::result::Error::SerializationError;
use diesel::sql_types::{Binary, Bool, Integer, Nullable};
use secrecy::SecretString;
use uuid::Uuid;

use super::{McpCredential, McpCredentialChangeset, NewMcpCredential, OauthTokens};
use crate::crypto::{KeyRing, OpenError, SealError, SecretColumn};
use crate::enums::OauthStatus;
use crate::ids::{CredentialId, InstanceId};
use crate::schema::mcp_credentials;
use crate::secret::Sealed;

#[diesel::declare_sql_function]
extern "SQL" {
    fn substr(octets: Nullable<Binary>, from: Integer, count: Integer) -> Nullable<Binary>;
}

impl<'a> NewMcpCredential<'a> {
    /// Credentials that are an API key: completed at once, by this machine's clock.
    ///
    /// # Errors
    /// The key is too long.
    pub fn api_key(
        ring: &KeyRing,
        instance_id: InstanceId,
        api_key: &SecretString,
    ) -> Result<Self, SealError> {
        let credential_id = CredentialId::new();
        Ok(Self {
            api_key: Some(ring.seal(api_key, credential_id, SecretColumn::ApiKey)?),
            oauth_status: Some(OauthStatus::Completed),
            oauth_completed_at: Some(Utc::now()),
            ..Self::empty(credential_id, instance_id)
        })
    }

    /// Credentials that are an OAuth client, pending. [`McpCredential::begin_oauth`] follows once the row is there.
    ///
    /// # Errors
    /// The secret is too long.
    pub fn oauth(
        ring: &KeyRing,
        instance_id: InstanceId,
        client_id: &'a str,
        client_secret: &SecretString,
    ) -> Result<Self, SealError> {
        let credential_id = CredentialId::new();
        let client_secret = ring.seal(client_secret, credential_id, SecretColumn::ClientSecret)?;
        Ok(Self {
            client_id: Some(client_id),
            client_secret: Some(client_secret),
            ..Self::empty(credential_id, instance_id)
        })
    }

    fn empty(credential_id: CredentialId, instance_id: InstanceId) -> Self {
        Self {
            credential_id: Some(credential_id),
            instance_id,
            api_key: None,
            client_id: None,
            client_secret: None,
            access_token: None,
            refresh_token: None,
            token_expires_at: None,
            token_scope: None,
            oauth_status: None,
            oauth_completed_at: None,
            oauth_authorization_url: None,
            oauth_state: None,
        }
    }
}

impl<'a> OauthTokens<'a> {
    /// Seals the tokens for this row.
    ///
    /// # Errors
    /// A token is too long.
    pub fn seal(
        ring: &KeyRing,
        credential_id: CredentialId,
        access_token: &SecretString,
        refresh_token: Option<&SecretString>,
        expires_at: Option<DateTime<Utc>>,
        scope: Option<&'a str>,
    ) -> Result<Self, SealError> {
        let seal = |token, column| ring.seal(token, credential_id, column);
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

/// What became of one batch of [`McpCredential::reseal`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resealed {
    /// Rows with values that are sealed under the newest key now, and weren't.
    pub resealed: usize,
    /// Rows with a value that doesn't open, which is left as it is: its key isn't on the ring, or it was altered.
    pub unopened: Vec<CredentialId>,
    /// After which row the next batch begins; `None`: this was the last.
    pub next: Option<CredentialId>,
}

impl McpCredential {
    /// Opens the secret in a column; `None` where the column is `NULL`.
    ///
    /// # Errors
    /// See [`OpenError`]; none says anything of the secret.
    pub fn open(
        &self,
        ring: &KeyRing,
        column: SecretColumn,
    ) -> Result<Option<SecretString>, OpenError> {
        self.sealed(column)
            .map(|sealed| ring.open(sealed, self.credential_id, column))
            .transpose()
    }

    /// Seals values anew that aren't sealed under the newest key of the ring: `limit` rows at most, in the order of
    /// their keys, after the row `after`. `version` goes up, as with each change; `credentials_updated_at` doesn't.
    ///
    /// In one transaction, which locks the rows it changes and leaves out those that others have locked; so nobody's
    /// change is lost, and a pass may leave rows behind. To retire a key, when every process
    /// seals with the newest:
    ///
    /// ```no_run
    /// # use bruhmcp_db::{crypto::KeyRing, models::McpCredential};
    /// # fn retire(conn: &mut diesel::PgConnection, ring: &KeyRing) -> diesel::QueryResult<()> {
    /// let mut after = None;
    /// loop {
    ///     let batch = McpCredential::reseal(conn, ring, after, 500)?;
    ///     // batch.unopened: look into these.
    ///     after = batch.next;
    ///     if after.is_none() {
    ///         break;
    ///     }
    /// }
    /// if McpCredential::count_to_reseal(conn, ring)? == 0 {
    ///     // Nothing needs the older keys any more.
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Only those of the connection; above READ COMMITTED also a serialization failure, where a row was changed
    /// meanwhile; `SerializationError` with a [`SealError`] in it, where the operating system gives no random octets.
    pub fn reseal(
        conn: &mut PgConnection,
        ring: &KeyRing,
        after: Option<CredentialId>,
        limit: i64,
    ) -> QueryResult<Resealed> {
        conn.transaction(|conn| {
            let after = after.unwrap_or(CredentialId(Uuid::nil()));
            let rows: Vec<Self> = mcp_credentials::table
                .filter(mcp_credentials::credential_id.gt(after))
                .filter(sealed_otherwise(ring))
                .order(mcp_credentials::credential_id)
                .limit(limit)
                .select(Self::as_select())
                .for_no_key_update()
                .skip_locked()
                .load(conn)?;

            let mut batch = Resealed {
                resealed: 0,
                unopened: Vec::new(),
                next: None,
            };
            for row in &rows {
                let mut changes = McpCredentialChangeset::default();
                let (mut changed, mut unopened) = (false, false);
                for column in SecretColumn::ALL {
                    let Some(sealed) = row.sealed(column) else {
                        continue;
                    };
                    if ring.is_newest(sealed) {
                        continue;
                    }
                    match ring.open(sealed, row.credential_id, column) {
                        Ok(secret) => {
                            let sealed = ring
                                .seal(&secret, row.credential_id, column)
                                .map_err(|error| SerializationError(Box::new(error)))?;
                            *changes.sealed_mut(column) = Some(Some(sealed));
                            changed = true;
                        }
                        Err(_) => unopened = true,
                    }
                }
                if changed {
                    Self::update(conn, row.credential_id, &changes)?;
                    batch.resealed += 1;
                }
                if unopened {
                    batch.unopened.push(row.credential_id);
                }
            }
            if i64::try_from(rows.len()) == Ok(limit) {
                batch.next = rows.last().map(|row| row.credential_id);
            }
            Ok(batch)
        })
    }

    /// How many rows hold a value that isn't sealed under the newest key of the ring, those that don't open included.
    /// Reads the whole table.
    ///
    /// # Errors
    /// Only those of the connection.
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
        }
    }
}

impl McpCredentialChangeset<'_> {
    fn sealed_mut(&mut self, column: SecretColumn) -> &mut Option<Option<Sealed>> {
        match column {
            SecretColumn::ApiKey => &mut self.api_key,
            SecretColumn::ClientSecret => &mut self.client_secret,
            SecretColumn::AccessToken => &mut self.access_token,
            SecretColumn::RefreshToken => &mut self.refresh_token,
        }
    }
}

/// Rows that hold a value that isn't sealed under the newest key: its first octets tell.
fn sealed_otherwise(
    ring: &KeyRing,
) -> Box<dyn BoxableExpression<mcp_credentials::table, Pg, SqlType = Nullable<Bool>>> {
    let newest = ring.newest_header().to_vec();
    Box::new(
        substr(mcp_credentials::api_key, 1, 2)
            .ne(newest.clone())
            .or(substr(mcp_credentials::client_secret, 1, 2).ne(newest.clone()))
            .or(substr(mcp_credentials::access_token, 1, 2).ne(newest.clone()))
            .or(substr(mcp_credentials::refresh_token, 1, 2).ne(newest)),
    )
}
