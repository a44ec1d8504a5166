//! Rows that many tests need.

use bruhmcp_db::Sealed;
use bruhmcp_db::enums::{AuthType, InstanceStatus, OauthStatus};
use bruhmcp_db::ids::{InstanceId, ServiceId, UserId};
use bruhmcp_db::models::{
    InstanceError, McpInstance, McpService, NewMcpCredential, NewMcpInstance, NewMcpService,
    NewUser, NewUserBillingDetails, ProPlan, User, UserPlan,
};
use bruhmcp_db::schema::mcp_credentials;
use chrono::{DateTime, Utc};
use diesel::pg::PgConnection;
use diesel::prelude::*;

use crate::support::as_admin;

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

/// A user with the pro plan: any number of active instances.
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
    NewMcpService::new(name, port, AuthType::Oauth)
}

pub(crate) fn service(conn: &mut PgConnection, name: &str, port: i32) -> ServiceId {
    let new = new_service(name, port);
    let service = as_admin(conn, |conn| McpService::register(conn, &new)).unwrap();
    service.into_inner().mcp_service_id
}

/// A billing address of the user.
pub(crate) fn address(user_id: UserId) -> NewUserBillingDetails<'static> {
    NewUserBillingDetails {
        user_id,
        address_line1: "1 MG Road",
        address_line2: None,
        city: "Bengaluru",
        state: "Karnataka",
        country: "India",
        zip_code: "560001",
    }
}

/// Ciphertext of no key.
pub(crate) fn sealed() -> Sealed {
    Sealed::from_ciphertext(vec![2; 42]).unwrap()
}

/// Credentials that are completed at once.
pub(crate) fn api_key(instance: InstanceId) -> NewMcpCredential<'static> {
    NewMcpCredential::sealed_api_key(instance, sealed())
}

/// Credentials that wait for the user.
pub(crate) fn oauth(instance: InstanceId) -> NewMcpCredential<'static> {
    NewMcpCredential::sealed_oauth(instance, "client", sealed())
}

/// An instance with an API key.
pub(crate) fn create(
    conn: &mut PgConnection,
    user: UserId,
    service: ServiceId,
) -> Result<InstanceId, InstanceError> {
    let new = NewMcpInstance::new(user, service);
    McpInstance::create(conn, &new, &api_key(new.instance_id))
        .map(|(instance, _)| instance.instance_id)
}

/// An instance that waits for its authorization.
pub(crate) fn create_pending(
    conn: &mut PgConnection,
    user: UserId,
    service: ServiceId,
) -> InstanceId {
    let new = NewMcpInstance::new(user, service);
    let (instance, _) = McpInstance::create(conn, &new, &oauth(new.instance_id)).unwrap();
    instance.instance_id
}

/// An inactive instance with an API key.
pub(crate) fn create_inactive(
    conn: &mut PgConnection,
    user: UserId,
    service: ServiceId,
) -> InstanceId {
    let new = NewMcpInstance {
        status: InstanceStatus::Inactive,
        ..NewMcpInstance::new(user, service)
    };
    let (instance, _) = McpInstance::create(conn, &new, &api_key(new.instance_id)).unwrap();
    instance.instance_id
}

/// Ends an authorization with any status; returns false if the instance has no credentials.
pub(crate) fn authorize(
    conn: &mut PgConnection,
    user: UserId,
    instance: InstanceId,
    oauth_status: OauthStatus,
) -> Result<bool, InstanceError> {
    conn.transaction(|conn| {
        User::lock(conn, user)?;
        let of_instance = mcp_credentials::instance_id.eq(instance);
        let updated = diesel::update(mcp_credentials::table.filter(of_instance))
            .set((
                mcp_credentials::oauth_status.eq(oauth_status),
                mcp_credentials::oauth_completed_at.eq(Utc::now()),
            ))
            .execute(conn)?;
        Ok(updated == 1)
    })
}

pub(crate) fn find(conn: &mut PgConnection, instance: InstanceId) -> McpInstance {
    McpInstance::find(conn, instance).unwrap().unwrap()
}

#[cfg(feature = "crypto")]
pub(crate) use with_keys::*;

#[cfg(feature = "crypto")]
mod with_keys {
    use std::sync::LazyLock;

    use bruhmcp_db::SecretText;
    use bruhmcp_db::crypto::{KeyRing, SecretColumn};
    use bruhmcp_db::models::{McpCredential, OauthTokens};
    use chrono::TimeDelta;

    use super::*;

    pub(crate) static RING: LazyLock<KeyRing> =
        LazyLock::new(|| KeyRing::new([(1, &[1; 32][..])]).unwrap());

    /// The credentials of a new instance, an API key under [`RING`].
    pub(crate) fn with_api_key(
        conn: &mut PgConnection,
        user: UserId,
        service: ServiceId,
        api_key: &str,
    ) -> McpCredential {
        let instance = NewMcpInstance::new(user, service);
        let api_key = SecretText::from(api_key);
        let new = NewMcpCredential::api_key(&RING, instance.instance_id, &api_key).unwrap();
        McpInstance::create(conn, &instance, &new).unwrap().1
    }

    /// The OAuth credentials of a new instance, pending, without a state.
    pub(crate) fn pending(
        conn: &mut PgConnection,
        user: UserId,
        service: ServiceId,
    ) -> McpCredential {
        let secret = SecretText::from("client secret");
        let instance = NewMcpInstance::new(user, service);
        let id = instance.instance_id;
        let new = NewMcpCredential::oauth(&RING, id, "client", &secret).unwrap();
        McpInstance::create(conn, &instance, &new).unwrap().1
    }

    /// The OAuth credentials of a new instance, completed, with the tokens `first`.
    pub(crate) fn completed(
        conn: &mut PgConnection,
        user: UserId,
        service: ServiceId,
        expires_at: DateTime<Utc>,
    ) -> McpCredential {
        let row = pending(conn, user, service);
        let tokens = OauthTokens {
            expires_at: Some(expires_at),
            ..tokens(row.instance_id, "first")
        };
        McpCredential::complete_oauth(conn, row.credential_id, &tokens)
            .unwrap()
            .credential
    }

    /// The tokens `access <name>` and `refresh <name>`, for an hour.
    pub(crate) fn tokens(instance: InstanceId, name: &str) -> OauthTokens<'static> {
        OauthTokens::seal(
            &RING,
            instance,
            &SecretText::from(format!("access {name}")),
            Some(&SecretText::from(format!("refresh {name}"))),
            Some(in_minutes(60)),
            Some("mail.read mail.send"),
        )
        .unwrap()
    }

    /// The opened secret of a column.
    pub(crate) fn text(credential: &McpCredential, column: SecretColumn) -> String {
        let secret = credential.open(&RING, column).unwrap().unwrap();
        secret.expose().to_owned()
    }

    /// In microseconds, as the database stores it.
    pub(crate) fn in_minutes(minutes: i64) -> DateTime<Utc> {
        let micros = (Utc::now() + TimeDelta::minutes(minutes)).timestamp_micros();
        DateTime::from_timestamp_micros(micros).unwrap()
    }
}
