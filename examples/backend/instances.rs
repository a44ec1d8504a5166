//! Instances: create, list, call, activate and deactivate, authorize by OAuth.

use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use bruhmcp_db::crypto::{SecretColumn, code_challenge, new_secret};
use bruhmcp_db::enums::AuthType;
use bruhmcp_db::ids::{InstanceId, UserId};
use bruhmcp_db::models::{
    CompletedInstance, InstanceDetails, InstanceFilter, McpCredential, McpInstance, McpService,
    NewMcpCredential, NewMcpInstance, NotCallable,
};
use bruhmcp_db::{Cursor, Page, SecretText};
use chrono::{DateTime, Datelike};
use diesel::Connection;
use serde::Deserialize;
use serde_json::json;

use crate::App;
use crate::errors::{Error, NOT_FOUND};
use crate::http::{Answer, Bearer, Payload, answer, blocking};
use crate::provider;
use crate::sessions::user;

#[derive(Deserialize)]
pub(crate) struct Create {
    service: String,
    name: Option<String>,
    api_key: Option<SecretText>,
    client_id: Option<String>,
    client_secret: Option<SecretText>,
}

/// Creates an instance. With an API key it can be called at once; with an OAuth client, after the
/// user has granted access at the `authorization_url`.
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    bearer: Bearer,
    Payload(new): Payload<Create>,
) -> Answer {
    blocking(app, move |app| create_for(app, user(app, &bearer)?, &new)).await
}

fn create_for(app: &App, user_id: UserId, new: &Create) -> Answer {
    let conn = &mut app.db()?;
    let service = McpService::find_by_name(conn, &new.service)?
        .ok_or(Error::Refused(422, "there is no such service"))?;
    let instance = NewMcpInstance {
        custom_name: new.name.as_deref(),
        ..NewMcpInstance::new(user_id, service.mcp_service_id)
    };
    match (
        service.type_,
        &new.api_key,
        &new.client_id,
        &new.client_secret,
    ) {
        (AuthType::ApiKey, Some(api_key), None, None) => {
            let credential =
                NewMcpCredential::api_key(&app.key_ring, instance.instance_id, api_key)?;
            let (instance, _) = McpInstance::create(conn, &instance, &credential)?;
            answer(StatusCode::CREATED, json!({ "instance": instance }))
        }
        (AuthType::Oauth, None, Some(client_id), Some(client_secret)) => {
            if !client_id.bytes().all(needs_no_escape) {
                return Err(Error::Refused(
                    422,
                    "the client id has characters that a URL does not allow",
                ));
            }
            let id = instance.instance_id;
            let credential = NewMcpCredential::oauth(&app.key_ring, id, client_id, client_secret)?;
            let state = new_secret();
            let digest = app.token_key.hash_state(&state);
            let verifier = new_secret();
            let url = SecretText::new(format!(
                "https://provider.example/authorize?response_type=code&client_id={client_id}&state={}\
                 &code_challenge_method=S256&code_challenge={}",
                state.expose(),
                code_challenge(&verifier),
            ));
            let verifier = app
                .key_ring
                .seal(&verifier, id, SecretColumn::OauthCodeVerifier)?;
            let instance = conn.transaction(|conn| {
                let (instance, credential) = McpInstance::create(conn, &instance, &credential)?;
                McpCredential::begin_oauth(
                    conn,
                    credential.credential_id,
                    &digest,
                    McpCredential::STATE_LIFETIME,
                    &verifier,
                    None,
                )?;
                Ok::<_, Error>(instance)
            })?;
            let body = json!({ "instance": instance, "authorization_url": url.expose() });
            answer(StatusCode::CREATED, body)
        }
        (AuthType::ApiKey, ..) => Err(Error::Refused(422, "this service takes an API key")),
        (AuthType::Oauth, ..) => Err(Error::Refused(422, "this service takes an OAuth client")),
    }
}

#[derive(Deserialize)]
pub(crate) struct Listing {
    limit: Option<u16>,
    after: Option<String>,
}

/// Lists a page of the user's instances, newest first. The next page is `?after=` the value of
/// `next`.
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    bearer: Bearer,
    Query(listing): Query<Listing>,
) -> Answer {
    blocking(app, move |app| {
        let limit = listing.limit.unwrap_or(20);
        if !(1..=100).contains(&limit) {
            return Err(Error::Refused(400, "limit is a number from 1 to 100"));
        }
        let after = match listing.after.as_deref().map(place) {
            Some(None) => return Err(Error::Refused(400, "after is not a cursor")),
            after => after.flatten(),
        };
        let user_id = user(app, &bearer)?;
        let filter = InstanceFilter::default();
        let page = Page { after, limit };
        let instances = McpInstance::list_by_user(&mut *app.db()?, user_id, filter, page)?;
        let last = instances.last().map(InstanceDetails::cursor);
        let next = last
            .filter(|_| instances.len() == usize::from(limit))
            .map(|last| format!("{}_{}", last.created_at.timestamp_micros(), last.id));
        let body = json!({ "instances": instances, "next": next });
        answer(StatusCode::OK, body)
    })
    .await
}

/// A cursor as text: microseconds since 1970, and the key.
fn place(text: &str) -> Option<Cursor<InstanceId>> {
    let (micros, id) = text.split_once('_')?;
    let created_at = DateTime::from_timestamp_micros(micros.parse().ok()?)?;
    // The range of dates that PostgreSQL and chrono share.
    (1970..=9999).contains(&created_at.year()).then_some(())?;
    Some(Cursor {
        created_at,
        id: instance_id(id).ok()?,
    })
}

#[derive(Deserialize)]
pub(crate) struct Toggle {
    active: bool,
}

pub(crate) async fn toggle(
    State(app): State<Arc<App>>,
    bearer: Bearer,
    Path(id): Path<String>,
    Payload(toggle): Payload<Toggle>,
) -> Answer {
    blocking(app, move |app| {
        let user_id = user(app, &bearer)?;
        let id = instance_id(&id)?;
        let conn = &mut app.db()?;
        let instance = if toggle.active {
            McpInstance::activate(conn, id, user_id)?
        } else {
            McpInstance::deactivate(conn, id, user_id)?.ok_or(NOT_FOUND)?
        };
        answer(StatusCode::OK, json!({ "instance": instance }))
    })
    .await
}

/// Calls the service for the user and counts the call.
pub(crate) async fn call(
    State(app): State<Arc<App>>,
    bearer: Bearer,
    Path((service, id)): Path<(String, String)>,
) -> Answer {
    blocking(app, move |app| {
        let user_id = user(app, &bearer)?;
        let id = instance_id(&id)?;
        let found =
            McpInstance::find_with_credentials(&mut *app.db()?, id, &service, Some(user_id))?;
        let (_, service, credential) = found.map_err(not_callable)?;
        let (credential, column) = match service.type_ {
            AuthType::ApiKey => (credential, SecretColumn::ApiKey),
            AuthType::Oauth => {
                let credential = provider::with_fresh_token(app, credential)?;
                (credential, SecretColumn::AccessToken)
            }
        };
        let secret = provider::open(app, &credential, column)?;
        McpInstance::record_call(&mut *app.db()?, id, Some(user_id))?.map_err(not_callable)?;
        let said = provider::call(&service, &secret);
        answer(StatusCode::OK, json!({ "answer": said }))
    })
    .await
}

fn not_callable(reason: NotCallable) -> Error {
    match reason {
        NotCallable::NotFound | NotCallable::NotAuthorized(_) => NOT_FOUND,
        NotCallable::Expired | NotCallable::Inactive => {
            Error::Refused(409, "the instance isn't active")
        }
        NotCallable::UserInactive => Error::Refused(403, "the user is inactive"),
        NotCallable::ServiceDisabled => Error::Refused(503, "the service is disabled"),
    }
}

#[derive(Deserialize)]
pub(crate) struct Granting {
    state: SecretText,
    /// `None` if the provider refused.
    code: Option<String>,
}

/// The provider redirects the user's browser to a page, which sends the state and the code here
/// with the user's session. Without the session, one user's state and another's code would give
/// the first one's instance the other's tokens.
pub(crate) async fn oauth_callback(
    State(app): State<Arc<App>>,
    bearer: Bearer,
    Payload(granting): Payload<Granting>,
) -> Answer {
    blocking(app, move |app| {
        let user_id = user(app, &bearer)?;
        // Committed at once, so that of several requests with this state only one redeems the code.
        let state = app.token_key.hash_state(&granting.state);
        let credential = McpCredential::consume_state(&mut *app.db()?, user_id, &state)?;
        let id = credential.credential_id;

        let client_secret = provider::open(app, &credential, SecretColumn::ClientSecret)?;
        let verifier = provider::open(app, &credential, SecretColumn::OauthCodeVerifier)?;
        let granted = granting
            .code
            .and_then(|code| provider::redeem_code(&credential, &client_secret, &verifier, &code));
        let Some(granted) = granted else {
            McpCredential::fail_oauth(&mut *app.db()?, id)?;
            return Err(Error::Refused(409, "the authorization failed"));
        };
        let tokens = granted.seal(app, &credential)?;
        let completion = McpCredential::complete_oauth(&mut *app.db()?, id, &tokens)?;
        let body = json!({
            "instance_id": completion.credential.instance_id,
            // False if the plan limit is reached: the tokens are stored, and the user can
            // deactivate another instance.
            "active": completion.instance == CompletedInstance::Active,
        });
        answer(StatusCode::OK, body)
    })
    .await
}

fn instance_id(text: &str) -> Result<InstanceId, Error> {
    text.parse().map_err(|_| NOT_FOUND)
}

fn needs_no_escape(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}
