//! Rows that many tests begin with.

use bruhmcp_db::Sealed;
use bruhmcp_db::enums::{AuthType, InstanceStatus, OauthStatus};
use bruhmcp_db::ids::{InstanceId, ServiceId, UserId};
use bruhmcp_db::models::{
    InstanceError, McpCredential, McpCredentialChangeset, McpInstance, McpService,
    NewMcpCredential, NewMcpInstance, NewMcpService, NewUser, ProPlan, User, UserPlan,
};
use chrono::{DateTime, Utc};
use diesel::pg::PgConnection;
use diesel::prelude::*;

/// An active user with the free plan.
pub(crate) fn user(conn: &mut PgConnection) -> UserId {
    let id = UserId::new();
    let email = format!("{id}@example.com");
    let new = NewUser {
        id: Some(id),
        ..NewUser::new("Asha", "", &email)
    };
    User::sign_up(conn, &new).unwrap().id
}

/// A user whose plan is pro: any number of active instances.
pub(crate) fn pro_user(conn: &mut PgConnection) -> UserId {
    let user = user(conn);
    upgrade(conn, user, None);
    user
}

pub(crate) fn upgrade(conn: &mut PgConnection, user: UserId, expires_at: Option<DateTime<Utc>>) {
    let pro = ProPlan {
        expires_at,
        ..ProPlan::default()
    };
    UserPlan::upgrade(conn, user, &pro).unwrap();
}

pub(crate) fn new_service(name: &str, port: i32) -> NewMcpService<'_> {
    NewMcpService {
        mcp_service_id: None,
        mcp_service_name: name,
        display_name: name,
        description: None,
        icon_url_path: None,
        port,
        type_: AuthType::Oauth,
        is_active: None,
    }
}

pub(crate) fn service(conn: &mut PgConnection, name: &str, port: i32) -> ServiceId {
    let service = McpService::register(conn, &new_service(name, port)).unwrap();
    service.into_service().mcp_service_id
}

pub(crate) fn new_instance(user_id: UserId, mcp_service_id: ServiceId) -> NewMcpInstance<'static> {
    NewMcpInstance {
        instance_id: None,
        user_id,
        mcp_service_id,
        oauth_status: None,
        status: None,
        expires_at: None,
        custom_name: None,
    }
}

pub(crate) fn sealed() -> Sealed {
    Sealed::from_ciphertext(vec![7; 29])
}

/// Credentials that are completed at once.
pub(crate) fn api_key(instance_id: InstanceId) -> NewMcpCredential<'static> {
    NewMcpCredential {
        credential_id: None,
        instance_id,
        api_key: Some(sealed()),
        client_id: None,
        client_secret: None,
        access_token: None,
        refresh_token: None,
        token_expires_at: None,
        token_scope: None,
        oauth_status: Some(OauthStatus::Completed),
        oauth_completed_at: Some(Utc::now()),
        oauth_authorization_url: None,
        oauth_state: None,
    }
}

/// Credentials that wait for the user.
pub(crate) fn oauth(instance_id: InstanceId) -> NewMcpCredential<'static> {
    NewMcpCredential {
        api_key: None,
        client_id: Some("client"),
        client_secret: Some(sealed()),
        oauth_status: None,
        oauth_completed_at: None,
        ..api_key(instance_id)
    }
}

/// An instance with an API key.
pub(crate) fn create(
    conn: &mut PgConnection,
    user: UserId,
    service: ServiceId,
) -> Result<InstanceId, InstanceError> {
    let key = api_key(InstanceId::new());
    McpInstance::create(conn, &new_instance(user, service), &key)
        .map(|(instance, _)| instance.instance_id)
}

/// An instance that waits for its authorisation.
pub(crate) fn create_pending(
    conn: &mut PgConnection,
    user: UserId,
    service: ServiceId,
) -> InstanceId {
    let pending = oauth(InstanceId::new());
    let (instance, _) = McpInstance::create(conn, &new_instance(user, service), &pending).unwrap();
    instance.instance_id
}

/// An instance with an API key that is switched off.
pub(crate) fn create_inactive(
    conn: &mut PgConnection,
    user: UserId,
    service: ServiceId,
) -> InstanceId {
    let new = NewMcpInstance {
        status: Some(InstanceStatus::Inactive),
        ..new_instance(user, service)
    };
    let (instance, _) = McpInstance::create(conn, &new, &api_key(InstanceId::new())).unwrap();
    instance.instance_id
}

/// An authorisation comes to its end, good or bad; false where the instance has no credentials (any more).
pub(crate) fn authorise(
    conn: &mut PgConnection,
    user: UserId,
    instance: InstanceId,
    oauth_status: OauthStatus,
) -> Result<bool, InstanceError> {
    conn.transaction(|conn| {
        User::lock(conn, user)?;
        let Some(credential) = McpCredential::find_by_instance(conn, instance)? else {
            return Ok(false);
        };
        let changes = McpCredentialChangeset {
            oauth_status: Some(oauth_status),
            oauth_completed_at: Some(Some(Utc::now())),
            ..Default::default()
        };
        Ok(McpCredential::update(conn, credential.credential_id, &changes)?.is_some())
    })
}

pub(crate) fn find(conn: &mut PgConnection, instance: InstanceId) -> McpInstance {
    McpInstance::find(conn, instance).unwrap().unwrap()
}
