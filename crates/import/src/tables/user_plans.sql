-- A user without a plan gets what the subscription entitles to, by the rules of
-- UserSubscription::apply, or the free plan.

WITH entitled AS (
    SELECT DISTINCT ON (user_id) *
      FROM (
          SELECT new_user_subscriptions.*,
                 -- NULL: without end.
                 CASE
                     WHEN current_period_end >= '9000-01-01 UTC' THEN NULL
                     WHEN status IN ('active', 'past_due') AND NOT cancel_at_period_end
                         THEN current_period_end
                             + make_interval(days => least(grace_period_days, 3650))
                     ELSE current_period_end
                 END AS until
            FROM new_user_subscriptions
           WHERE rejected IS NULL
             AND plan_code <> 'free'
             AND status IN ('active', 'past_due', 'paused', 'cancelled', 'completed')
      ) AS paid
     WHERE until IS NULL OR until > (SELECT now FROM settings)
     ORDER BY user_id, until DESC NULLS FIRST, id
),
merged AS (
    SELECT old.plan_id,
           old.user_id,
           false AS extra,
           old.plan_type,
           old.max_instances,
           old.features,
           old.expires_at,
           old.created_at,
           old.updated_at,
           old.subscription_id,
           old.customer_id,
           old.payment_status,
           old.odd_time,
           NULL::text AS origin
      FROM old_user_plans AS old
    UNION ALL
    SELECT md5('plan of ' || users.id)::uuid,
           users.id,
           true,
           CASE WHEN entitled.user_id IS NULL THEN 'free' ELSE 'pro' END,
           CASE WHEN entitled.user_id IS NULL THEN 1 END,
           '{}',
           entitled.until,
           users.created_at,
           users.updated_at,
           entitled.razorpay_subscription_id,
           entitled.razorpay_customer_id,
           CASE
               WHEN entitled.user_id IS NULL THEN 'none'
               WHEN entitled.status = 'cancelled' THEN 'cancelled'
               WHEN entitled.status = 'past_due' THEN 'past_due'
               ELSE 'active'
           END,
           false,
           CASE WHEN entitled.user_id IS NULL THEN 'plan_default' ELSE 'plan_from_subscription' END
      FROM new_users AS users
      LEFT JOIN entitled ON entitled.user_id = users.id
     WHERE users.rejected IS NULL
       AND NOT EXISTS (SELECT FROM old_user_plans AS old WHERE old.user_id = users.id)
),
judged AS (
    SELECT merged.*,
           CASE WHEN users.id IS NULL THEN 'parent_left_behind' END AS rejected,
           coalesce(jsonb_typeof(features) = 'object' AND pg_temp.is_readable(features), false)
               AS has_features,
           -- The old system had no other pair.
           CASE
               WHEN plan_type IN ('free', 'pro') THEN plan_type
               WHEN max_instances IS NULL THEN 'pro'
               ELSE 'free'
           END AS new_type
      FROM merged
      LEFT JOIN new_users AS users ON users.id = merged.user_id AND users.rejected IS NULL
),
old AS (
    SELECT judged.*,
           nullif(subscription_id, '') IS NOT NULL
           AND 1 < row_number() OVER (
               PARTITION BY rejected IS NULL, nullif(subscription_id, '')
               ORDER BY extra, created_at, plan_id
           ) AS shares_subscription,
           nullif(customer_id, '') IS NOT NULL
           AND 1 < row_number() OVER (
               PARTITION BY rejected IS NULL, nullif(customer_id, '')
               ORDER BY extra, created_at, plan_id
           ) AS shares_customer
      FROM judged
)
SELECT row_number() OVER (ORDER BY plan_id) AS n,
       plan_id::text AS key,
       extra,
       rejected,
       array_remove(ARRAY[
           origin,
           CASE WHEN new_type <> plan_type THEN 'plan_type_unknown' END,
           CASE
               WHEN max_instances IS DISTINCT FROM CASE new_type WHEN 'free' THEN 1 END
                   THEN 'plan_limit_reset'
           END,
           CASE WHEN NOT has_features THEN 'plan_features_reset' END,
           CASE WHEN subscription_id = '' OR customer_id = '' THEN 'gateway_id_empty' END,
           CASE WHEN shares_subscription OR shares_customer THEN 'gateway_id_shared' END,
           CASE
               WHEN payment_status NOT IN ('none', 'active', 'cancelled', 'failed', 'past_due')
                   THEN 'payment_status_unknown'
           END,
           CASE
               WHEN payment_status IS NULL
                   OR num_nulls(created_at, updated_at) > 0 AND NOT odd_time
                   THEN 'null_default'
           END,
           CASE WHEN odd_time THEN 'time_out_of_range' END
       ], NULL) AS reasons,
       plan_id,
       user_id,
       new_type::plan_type AS plan_type,
       CASE new_type WHEN 'free' THEN 1 END AS max_instances,
       CASE WHEN has_features THEN features ELSE '{}' END AS features,
       expires_at,
       CASE WHEN NOT shares_subscription THEN nullif(subscription_id, '') END AS subscription_id,
       CASE WHEN NOT shares_customer THEN nullif(customer_id, '') END AS customer_id,
       CASE
           WHEN payment_status IN ('active', 'cancelled', 'failed', 'past_due') THEN payment_status
           ELSE 'none'
       END::plan_payment_status AS payment_status,
       coalesce(created_at, updated_at, now) AS created_at,
       coalesce(updated_at, created_at, now) AS updated_at
  FROM old, settings
