-- The status of the credentials decides. Where the plan limits the active instances, the one that
-- was used last stays active.

WITH followed AS (
    SELECT old.*,
           coalesce(credentials.oauth_status, 'pending') AS new_oauth_status,
           CASE
               WHEN users.id IS NULL OR service.mcp_service_id IS NULL THEN 'parent_left_behind'
           END AS rejected,
           plans.max_instances,
           plans.expires_at <= now AS plan_is_over
      FROM old_mcp_service_table AS old
      CROSS JOIN settings
      LEFT JOIN new_users AS users ON users.id = old.user_id AND users.rejected IS NULL
      LEFT JOIN new_mcp_table AS service
        ON service.mcp_service_id = old.mcp_service_id AND service.rejected IS NULL
      LEFT JOIN new_user_plans AS plans ON plans.user_id = old.user_id AND plans.rejected IS NULL
      LEFT JOIN new_mcp_credentials AS credentials
        ON credentials.instance_id = old.instance_id AND credentials.rejected IS NULL
),
labelled AS (
    SELECT followed.*,
           CASE
               WHEN status IN ('active', 'inactive', 'expired') THEN status
               WHEN status IS NULL THEN 'active'
               ELSE 'inactive'
           END AS new_status
      FROM followed
),
judged AS (
    SELECT labelled.*,
           CASE
               WHEN new_status <> 'active' OR new_oauth_status <> 'completed' OR rejected IS NOT NULL
                   THEN NULL
               WHEN plan_is_over THEN 'plan_expired'
               WHEN max_instances < row_number() OVER (
                   PARTITION BY user_id,
                       new_status = 'active' AND new_oauth_status = 'completed' AND rejected IS NULL
                   ORDER BY last_used_at DESC NULLS LAST, created_at DESC, instance_id
               ) THEN 'over_plan_limit'
           END AS switched_off
      FROM labelled
)
SELECT row_number() OVER (ORDER BY instance_id) AS n,
       instance_id::text AS key,
       false AS extra,
       rejected,
       array_remove(ARRAY[
           switched_off,
           CASE
               WHEN new_oauth_status::text <> coalesce(oauth_status, 'completed')
                   THEN 'oauth_status_of_credentials'
           END,
           CASE WHEN new_status <> status THEN 'instance_status_unknown' END,
           CASE WHEN least(usage_count, renewed_count) < 0 OR version < 1 THEN 'negative_count' END,
           CASE WHEN char_length(custom_name) > 255 THEN 'text_cut' END,
           CASE
               WHEN num_nulls(oauth_status, status, usage_count, renewed_count, version) > 0
                   OR num_nulls(created_at, updated_at, last_modified) > 0 AND NOT odd_time
                   THEN 'null_default'
           END,
           CASE WHEN odd_time THEN 'time_out_of_range' END
       ], NULL) AS reasons,
       instance_id,
       user_id,
       mcp_service_id,
       new_oauth_status AS oauth_status,
       CASE WHEN switched_off IS NULL THEN new_status ELSE 'inactive' END::mcp_instance_status
           AS status,
       expires_at,
       last_used_at,
       greatest(coalesce(usage_count, 0), 0) AS usage_count,
       left(custom_name, 255) AS custom_name,
       greatest(coalesce(renewed_count, 0), 0)::integer AS renewed_count,
       last_renewed_at,
       credentials_updated_at,
       coalesce(created_at, updated_at, now) AS created_at,
       coalesce(updated_at, created_at, now) AS updated_at,
       greatest(coalesce(version, 1), 1)::integer AS version,
       coalesce(last_modified, updated_at, created_at, now) AS last_modified
  FROM judged, settings
