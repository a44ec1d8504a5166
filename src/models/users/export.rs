//! Everything that the database holds about a person.

use diesel::prelude::*;
use diesel::sql_types::{Jsonb, Uuid};
use serde_json::Value;

use super::User;
use crate::ids::UserId;
use crate::prepared::Prepare;

#[derive(QueryableByName)]
struct Export {
    #[diesel(sql_type = Jsonb)]
    export: Value,
}

impl User {
    /// Returns everything about a user as JSON, for the person's right of access (GDPR, Art. 15):
    /// per table an array of rows with all their columns. Returns `None` if there is no such user.
    ///
    /// - Left out are secrets: the password hash, digests and sealed values, and the gateway's
    ///   tokens of cards. Answers and events of the gateway are as it sent them.
    /// - Webhook events are those that are linked with the user, and the audit log's rows those of
    ///   the user and of the user's instances. Not in it: the schema `bruhmcp_archive`.
    ///
    /// One statement, so all rows are of one moment. The value is made in the server's memory and in
    /// this program's: about half a kilobyte per row of the audit log.
    pub fn export(conn: &mut PgConnection, id: UserId) -> QueryResult<Option<Value>> {
        // Not the query builder: it has no json_agg. A new column is in it without a change here,
        // and a test finds a new table.
        let export: Option<Export> = diesel::sql_query(
            "SELECT jsonb_build_object(
                 'users', jsonb_build_array(to_jsonb(users) - 'password'),
                 'user_plans', (
                     SELECT jsonb_agg(to_jsonb(t) ORDER BY t.created_at)
                       FROM user_plans AS t WHERE t.user_id = $1),
                 'user_billing_details', (
                     SELECT jsonb_agg(
                                to_jsonb(t) || jsonb_build_object('cards', (
                                    SELECT jsonb_agg(card - 'token')
                                      FROM jsonb_array_elements(t.cards) AS card))
                                ORDER BY t.created_at)
                       FROM user_billing_details AS t WHERE t.user_id = $1),
                 'user_subscriptions', (
                     SELECT jsonb_agg(to_jsonb(t) ORDER BY t.created_at)
                       FROM user_subscriptions AS t WHERE t.user_id = $1),
                 'subscription_transactions', (
                     SELECT jsonb_agg(to_jsonb(t) ORDER BY t.created_at)
                       FROM subscription_transactions AS t WHERE t.user_id = $1),
                 'account_credits', (
                     SELECT jsonb_agg(to_jsonb(t) ORDER BY t.created_at)
                       FROM account_credits AS t WHERE t.user_id = $1),
                 'auth_tokens', (
                     SELECT jsonb_agg(to_jsonb(t) - 'token' ORDER BY t.created_at)
                       FROM auth_tokens AS t WHERE t.user_id = $1),
                 'mcp_service_table', (
                     SELECT jsonb_agg(to_jsonb(t) ORDER BY t.created_at)
                       FROM mcp_service_table AS t WHERE t.user_id = $1),
                 'mcp_credentials', (
                     SELECT jsonb_agg(
                                to_jsonb(t) - '{api_key, client_secret, access_token, refresh_token,
                                    oauth_authorization_url, oauth_state, oauth_code_verifier}'::text[]
                                ORDER BY t.created_at)
                       FROM mcp_credentials AS t
                       JOIN mcp_service_table USING (instance_id)
                      WHERE mcp_service_table.user_id = $1),
                 'webhook_events', (
                     SELECT jsonb_agg(to_jsonb(t) ORDER BY t.created_at)
                       FROM webhook_events AS t WHERE t.user_id = $1),
                 'token_audit_log', (
                     SELECT jsonb_agg(to_jsonb(t) ORDER BY t.created_at, t.audit_id)
                       FROM (SELECT * FROM token_audit_log WHERE user_id = $1
                              UNION
                             SELECT log.*
                               FROM mcp_service_table
                               JOIN token_audit_log AS log USING (instance_id)
                              WHERE mcp_service_table.user_id = $1) AS t)
             ) AS export
               FROM users
              WHERE id = $1",
        )
        .bind::<Uuid, _>(id)
        .prepared()
        .get_result(conn)
        .optional()?;
        Ok(export.map(|row| row.export))
    }
}
