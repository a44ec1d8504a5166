//! Instances: create, list, call, activate and deactivate, authorize by OAuth.

use bruhmcp_db::crypto::{SecretColumn, code_challenge, new_secret};
use bruhmcp_db::enums::{AuthType, InstanceStatus};
use bruhmcp_db::ids::{InstanceId, UserId};
use bruhmcp_db::models::{
    CompletedInstance, InstanceDetails, InstanceFilter, McpCredential, McpInstance, McpService,
    NewMcpCredential, NewMcpInstance, OauthTokens,
};
use bruhmcp_db::{Cursor, Page, SecretText};
use chrono::{DateTime, Datelike, TimeDelta, Utc};
use diesel::Connection;
use oxhttp::model::{Body, Request};
use serde::Deserialize;
use serde_json::json;

use crate::App;
use crate::http::{Answer, Error, NOT_FOUND, query};

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
pub(crate) fn create(app: &App, user_id: UserId, new: &Create) -> Answer {
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
            let credential = NewMcpCredential::api_key(&app.key_ring, api_key)?;
            let (instance, _) = McpInstance::create(conn, &instance, &credential)?;
            Ok((201, json!({ "instance": instance })))
        }
        (AuthType::Oauth, None, Some(client_id), Some(client_secret)) => {
            if !client_id.bytes().all(needs_no_escape) {
                return Err(Error::Refused(
                    422,
                    "the client id has characters that a URL does not allow",
                ));
            }
            let credential = NewMcpCredential::oauth(&app.key_ring, client_id, client_secret)?;
            let state = new_secret();
            let digest = app.token_key.hash_state(&state);
            let verifier = new_secret();
            let url = SecretText::new(format!(
                "https://provider.example/authorize?response_type=code&client_id={client_id}&state={}\
                 &code_challenge_method=S256&code_challenge={}",
                state.expose(),
                code_challenge(&verifier),
            ));
            let verifier = app.key_ring.seal(
                &verifier,
                credential.credential_id(),
                SecretColumn::ClientSecret,
            )?;
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
            Ok((201, body))
        }
        (AuthType::ApiKey, ..) => Err(Error::Refused(422, "this service takes an API key")),
        (AuthType::Oauth, ..) => Err(Error::Refused(422, "this service takes an OAuth client")),
    }
}

/// Lists a page of the user's instances, newest first. The next page is `?after=` the value of
/// `next`.
pub(crate) fn list(app: &App, user_id: UserId, request: &Request<Body>) -> Answer {
    let limit = match query(request, "limit").map(str::parse) {
        None => 20,
        Some(Ok(limit @ 1..=100)) => limit,
        Some(_) => return Err(Error::Refused(400, "limit is a number from 1 to 100")),
    };
    let after = match query(request, "after").map(place) {
        Some(None) => return Err(Error::Refused(400, "after is not a cursor")),
        after => after.flatten(),
    };
    let filter = InstanceFilter::default();
    let page = Page { after, limit };
    let instances = McpInstance::list_by_user(&mut *app.db()?, user_id, filter, page)?;
    let last = instances.last().map(InstanceDetails::cursor);
    let next = last
        .filter(|_| instances.len() == usize::from(limit))
        .map(|last| format!("{}_{}", last.created_at.timestamp_micros(), last.id));
    Ok((200, json!({ "instances": instances, "next": next })))
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

pub(crate) fn toggle(app: &App, user_id: UserId, id: &str, toggle: &Toggle) -> Answer {
    let id = instance_id(id)?;
    let conn = &mut app.db()?;
    let instance = if toggle.active {
        McpInstance::activate(conn, id, user_id)?
    } else {
        McpInstance::deactivate(conn, id, user_id)?.ok_or(NOT_FOUND)?
    };
    Ok((200, json!({ "instance": instance })))
}

/// Calls the service for the user and counts the call.
pub(crate) fn call(app: &App, user_id: UserId, service: &str, id: &str) -> Answer {
    let id = instance_id(id)?;
    let found = McpInstance::find_with_credentials(&mut *app.db()?, id, service)?;
    let (instance, service, credential) = found
        .filter(|(instance, ..)| instance.user_id == user_id)
        .ok_or(NOT_FOUND)?;
    let ended = instance.expires_at.is_some_and(|end| end <= Utc::now());
    if instance.status != InstanceStatus::Active || ended {
        return Err(Error::Refused(409, "the instance isn't active"));
    }
    let column = match service.type_ {
        AuthType::ApiKey => SecretColumn::ApiKey,
        AuthType::Oauth => SecretColumn::AccessToken,
    };
    let secret = open(app, &credential, column)?;
    let answer = stand_in_for_calling_the_service(&service, &secret);
    McpInstance::record_call(&mut *app.db()?, id)?;
    Ok((200, json!({ "answer": answer })))
}

/// The provider redirects the user's browser here, with the state and a code or an error. The state
/// must be one that the user of this session began.
pub(crate) fn oauth_callback(app: &App, user_id: UserId, request: &Request<Body>) -> Answer {
    let state = query(request, "state").ok_or(Error::Refused(400, "the state is missing"))?;
    // Committed at once, so that of several requests with this state only one redeems the code.
    let state = app.token_key.hash_state(&SecretText::new(state));
    let credential = McpCredential::consume_state(&mut *app.db()?, user_id, &state)?;
    let id = credential.credential_id;

    let client_secret = open(app, &credential, SecretColumn::ClientSecret)?;
    let verifier = open(app, &credential, SecretColumn::ClientSecret)?;
    let granted = query(request, "code").and_then(|code| {
        stand_in_for_the_token_endpoint(&credential, &client_secret, &verifier, code)
    });
    let Some(granted) = granted else {
        McpCredential::fail_oauth(&mut *app.db()?, id)?;
        return Err(Error::Refused(409, "the authorization failed"));
    };
    let tokens = OauthTokens::seal(
        &app.key_ring,
        id,
        &granted.access_token,
        Some(&granted.refresh_token),
        Some(Utc::now() + granted.lifetime),
        None,
    )?;
    let completion = McpCredential::complete_oauth(&mut *app.db()?, id, &tokens)?;
    let body = json!({
        "instance_id": completion.credential.instance_id,
        // False if the plan limit is reached: the tokens are stored, and the user can deactivate
        // another instance.
        "active": completion.instance == CompletedInstance::Active,
    });
    Ok((200, body))
}

fn open(app: &App, from: &McpCredential, column: SecretColumn) -> Result<SecretText, Error> {
    match from.open(&app.key_ring, column) {
        Ok(Some(secret)) => Ok(secret),
        Ok(None) => Err(Error::Internal("the credentials have no secret")),
        Err(_) => Err(Error::Internal("the credentials can't be opened")),
    }
}

fn instance_id(text: &str) -> Result<InstanceId, Error> {
    text.parse().map_err(|_| NOT_FOUND)
}

fn needs_no_escape(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

struct Granted {
    access_token: SecretText,
    refresh_token: SecretText,
    lifetime: TimeDelta,
}

/// Stands for the HTTP request, with a timeout, that redeems the code at the provider's token
/// endpoint. Returns `None` if the provider refuses.
fn stand_in_for_the_token_endpoint(
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

/// Stands for the request, with a timeout, to the service that listens on `service.port`.
fn stand_in_for_calling_the_service(service: &McpService, _secret: &SecretText) -> String {
    format!("hello from {}", service.display_name)
}
