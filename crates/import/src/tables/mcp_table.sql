-- A service whose name or port the new registry refuses is left behind, with its instances.

WITH named AS (
    SELECT old.*,
           left(regexp_replace(lower(btrim(mcp_service_name)), '[^a-z0-9_-]+', '_', 'g'), 50)
               AS new_name
      FROM old_mcp_table AS old
),
judged AS (
    SELECT named.*,
           CASE
               WHEN new_name !~ '^[a-z0-9][a-z0-9_-]{0,49}$' THEN 'service_name_invalid'
               WHEN type NOT IN ('api_key', 'oauth') THEN 'service_type_unknown'
               WHEN port NOT BETWEEN 1 AND 65535 THEN 'port_invalid'
               WHEN 1 < row_number() OVER (PARTITION BY new_name ORDER BY created_at, mcp_service_id)
                   THEN 'service_name_taken'
           END AS rejected
      FROM named
)
SELECT row_number() OVER (ORDER BY mcp_service_id) AS n,
       mcp_service_id::text AS key,
       false AS extra,
       rejected,
       array_remove(ARRAY[
           CASE WHEN new_name <> mcp_service_name THEN 'service_name_canonical' END,
           CASE WHEN display_name = '' THEN 'name_empty' END,
           CASE WHEN total_instances_created < 0 THEN 'negative_count' END,
           CASE
               WHEN num_nulls(is_active, total_instances_created) > 0
                   OR num_nulls(created_at, updated_at) > 0 AND NOT odd_time
                   THEN 'null_default'
           END,
           CASE WHEN odd_time THEN 'time_out_of_range' END
       ], NULL) AS reasons,
       mcp_service_id,
       new_name AS mcp_service_name,
       left(coalesce(nullif(display_name, ''), new_name), 100) AS display_name,
       description,
       icon_url_path,
       port::integer AS port,
       type::mcp_auth_type AS type,
       coalesce(is_active, true) AS is_active,
       greatest(coalesce(total_instances_created, 0), 0) AS total_instances_created,
       -- Counted at the end of the import.
       0::bigint AS active_instances_count,
       coalesce(created_at, updated_at, now) AS created_at,
       coalesce(updated_at, created_at, now) AS updated_at
  FROM judged, settings
