//! The providers of OAuth tokens and the services, which answer without a network here.

use bruhmcp_db::SecretText;
use bruhmcp_db::crypto::SecretColumn;
use bruhmcp_db::models::{McpCredential, McpService, OauthTokens, RefreshLease};
use chrono::{TimeDelta, Utc};

use crate::App;
use crate::errors::Error;

/// Longer than the provider takes to answer.
const LEASE: TimeDelta = TimeDelta::minutes(1);

/// Refreshes an access token that ends soon, and returns whether there was one.
pub(crate) fn refresh_due(app: &App) -> Result<bool, Error> {
    let soon = Utc::now() + TimeDelta::minutes(10);
    let due = McpCredential::claim_due(&mut *app.db()?, soon, LEASE, 1)?;
    match due.first() {
        Some(old) => refresh(app, old).map(|_| true),
        None => Ok(false),
    }
}

/// Returns the credentials with an access token that is valid for some seconds. Of many requests
/// that find it expired, one refreshes it.
pub(crate) fn with_fresh_token(app: &App, read: McpCredential) -> Result<McpCredential, Error> {
    let due = Utc::now() + TimeDelta::seconds(5);
    if read.token_expires_at.is_none_or(|end| end >= due) {
        return Ok(read);
    }
    let id = read.credential_id;
    let lease = McpCredential::lease_refresh(&mut *app.db()?, id, due, LEASE)?;
    let refreshed = match lease {
        RefreshLease::Leased(old) => refresh(app, &old)?,
        RefreshLease::Fresh(row) => Some(row),
        RefreshLease::Wait { .. } => {
            return Err(Error::Refused(503, "the access is being refreshed"));
        }
        RefreshLease::Unrefreshable(_) => None,
    };
    refreshed.ok_or(Error::Refused(409, "the access has ended: grant it again"))
}

/// Spends a leased refresh token. Returns `None` if the provider refuses it.
fn refresh(app: &App, leased: &McpCredential) -> Result<Option<McpCredential>, Error> {
    let client_secret = open(app, leased, SecretColumn::ClientSecret)?;
    let refresh_token = open(app, leased, SecretColumn::RefreshToken)?;
    // No connection of the pool waits for the provider.
    let granted = redeem_refresh_token(leased, &client_secret, &refresh_token);
    let conn = &mut app.db()?;
    match granted {
        Some(granted) => {
            let tokens = granted.seal(app, leased)?;
            Ok(Some(McpCredential::store_refreshed(conn, leased, &tokens)?))
        }
        // The user must grant access again.
        None => {
            McpCredential::refresh_refused(conn, leased)?;
            Ok(None)
        }
    }
}

pub(crate) fn open(
    app: &App,
    from: &McpCredential,
    column: SecretColumn,
) -> Result<SecretText, Error> {
    match from.open(&app.key_ring, column) {
        Ok(Some(secret)) => Ok(secret),
        Ok(None) => Err(Error::Internal("the credentials have no secret")),
        Err(_) => Err(Error::Internal("the credentials can't be opened")),
    }
}

/// What a provider grants.
pub(crate) struct Granted {
    access_token: SecretText,
    refresh_token: SecretText,
    lifetime: TimeDelta,
}

impl Granted {
    pub(crate) fn seal(
        &self,
        app: &App,
        credential: &McpCredential,
    ) -> Result<OauthTokens<'static>, Error> {
        let tokens = OauthTokens::seal(
            &app.key_ring,
            credential.instance_id,
            &self.access_token,
            Some(&self.refresh_token),
            Some(Utc::now() + self.lifetime),
            None,
        )?;
        Ok(tokens)
    }
}

/// Stands for the HTTP request, with a timeout, that redeems the code at the provider's token
/// endpoint. Returns `None` if the provider refuses.
pub(crate) fn redeem_code(
    _client: &McpCredential,
    _client_secret: &SecretText,
    _code_verifier: &SecretText,
    code: &str,
) -> Option<Granted> {
    (code != "refused").then(|| Granted {
        access_token: format!("access-{code}").into(),
        refresh_token: format!("refresh-{code}").into(),
        lifetime: TimeDelta::hours(1),
    })
}

/// Stands for the HTTP request, with a timeout, that redeems a refresh token. Returns `None` if the
/// provider refuses, because the user has withdrawn access.
fn redeem_refresh_token(
    _client: &McpCredential,
    _client_secret: &SecretText,
    refresh_token: &SecretText,
) -> Option<Granted> {
    (refresh_token.expose() != "refresh-withdrawn").then(|| Granted {
        access_token: format!("access-by-{}", refresh_token.expose()).into(),
        refresh_token: refresh_token.clone(),
        lifetime: TimeDelta::hours(1),
    })
}

/// Stands for the request, with a timeout, to the service that listens on `service.port`.
pub(crate) fn call(service: &McpService, _secret: &SecretText) -> String {
    format!("hello from {}", service.display_name)
}
