//! The providers of OAuth tokens and the services, which answer without a network here.

use bruhmcp_db::SecretText;
use bruhmcp_db::crypto::SecretColumn;
use bruhmcp_db::models::{McpCredential, McpService, OauthTokens};
use chrono::{TimeDelta, Utc};

use crate::App;
use crate::errors::Error;

/// Longer than the provider takes to answer.
const LEASE: TimeDelta = TimeDelta::minutes(1);

/// Refreshes an access token that ends soon, and returns whether there was one.
pub(crate) fn refresh_due(app: &App) -> Result<bool, Error> {
    let soon = Utc::now() + TimeDelta::minutes(10);
    let due = McpCredential::claim_due(&mut *app.db()?, soon, LEASE, 1)?;
    let Some(old) = due.first() else {
        return Ok(false);
    };
    let client_secret = open(app, old, SecretColumn::ClientSecret)?;
    let refresh_token = open(app, old, SecretColumn::RefreshToken)?;
    // No connection of the pool waits for the provider.
    let refreshed = refresh(old, &client_secret, &refresh_token);
    let conn = &mut app.db()?;
    match refreshed {
        Some(granted) => {
            McpCredential::store_refreshed(conn, old, &granted.seal(app, old)?)?;
        }
        // The user must grant access again.
        None => {
            McpCredential::refresh_refused(conn, old)?;
        }
    }
    Ok(true)
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
fn refresh(
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
