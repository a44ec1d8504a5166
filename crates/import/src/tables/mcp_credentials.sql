-- The secrets are read again when they are sealed: here they would be stored once more. A pending
-- authorization is not taken over, so the user starts it again.

WITH parent AS (
    SELECT instance.instance_id
      FROM old_mcp_service_table AS instance
      JOIN new_users AS users ON users.id = instance.user_id AND users.rejected IS NULL
      JOIN new_mcp_table AS service
        ON service.mcp_service_id = instance.mcp_service_id AND service.rejected IS NULL
),
judged AS (
    SELECT old.*,
           -- A status that was never written.
           CASE
               WHEN oauth_status IN ('pending', 'completed', 'failed', 'expired') THEN oauth_status
               WHEN oauth_completed_at IS NOT NULL THEN 'completed'
               ELSE 'pending'
           END AS new_status,
           CASE
               WHEN parent.instance_id IS NULL THEN 'parent_left_behind'
               WHEN 1 < row_number() OVER (
                   PARTITION BY old.instance_id ORDER BY old.created_at, credential_id
               ) THEN 'credentials_repeated'
               WHEN NOT (
                   api_key IS NOT NULL AND num_nonnulls(client_id, client_secret) = 0
                   OR api_key IS NULL AND num_nulls(client_id, client_secret) = 0
               ) THEN 'credentials_incomplete'
               WHEN api_key IS NOT NULL AND num_nonnulls(access_token, refresh_token) > 0
                   THEN 'credentials_incomplete'
               WHEN '' IN (api_key, client_id, client_secret) THEN 'credentials_empty'
               WHEN char_length(client_id) > 2048
                   OR 16000 < greatest(
                       octet_length(api_key), octet_length(client_secret),
                       octet_length(access_token), octet_length(refresh_token)
                   )
                   THEN 'secret_too_long'
           END AS rejected
      FROM old_mcp_credentials AS old
      LEFT JOIN parent USING (instance_id)
)
SELECT row_number() OVER (ORDER BY credential_id) AS n,
       credential_id::text AS key,
       false AS extra,
       rejected,
       array_remove(ARRAY[
           CASE WHEN oauth_status <> new_status THEN 'oauth_status_unknown' END,
           CASE
               WHEN new_status = 'pending' AND oauth_completed_at IS NOT NULL
                   THEN 'completed_at_of_pending'
               WHEN new_status <> 'pending' AND oauth_completed_at IS NULL AND NOT odd_time
                   THEN 'completed_at_missing'
           END,
           CASE
               WHEN num_nonnulls(oauth_state, oauth_authorization_url) > 0
                   THEN 'authorization_dropped'
           END,
           CASE WHEN char_length(token_scope) > 16384 THEN 'token_scope_dropped' END,
           CASE WHEN '' IN (access_token, refresh_token) THEN 'token_empty' END,
           CASE WHEN version < 1 THEN 'negative_count' END,
           CASE
               WHEN oauth_status IS NULL
                   OR num_nulls(created_at, updated_at, last_modified) > 0 AND NOT odd_time
                   OR version IS NULL
                   THEN 'null_default'
           END,
           CASE WHEN odd_time THEN 'time_out_of_range' END
       ], NULL) AS reasons,
       credential_id,
       instance_id,
       NULL::bytea AS api_key,
       client_id,
       NULL::bytea AS client_secret,
       NULL::bytea AS access_token,
       NULL::bytea AS refresh_token,
       token_expires_at,
       CASE WHEN char_length(token_scope) <= 16384 THEN token_scope END AS token_scope,
       new_status::mcp_oauth_status AS oauth_status,
       CASE
           WHEN new_status <> 'pending'
               THEN coalesce(oauth_completed_at, updated_at, created_at, now)
       END AS oauth_completed_at,
       coalesce(created_at, updated_at, now) AS created_at,
       coalesce(updated_at, created_at, now) AS updated_at,
       greatest(coalesce(version, 1), 1)::integer AS version,
       coalesce(last_modified, updated_at, created_at, now) AS last_modified
  FROM judged, settings
