-- Of several live subscriptions one stays, as the operator says, with the periods of all; the others are replaced.

WITH times AS (
    SELECT old.*,
           now,
           paid_first,
           coalesce(created_at, updated_at, now) AS new_created_at,
           coalesce(current_period_start, created_at, updated_at, now) AS start
      FROM old_user_subscriptions AS old, settings
),
judged AS (
    SELECT times.*,
           CASE
               WHEN current_period_end > start THEN current_period_end
               -- It is after the start, and beyond what the column holds: never.
               WHEN current_period_end IS NULL AND current_period_start < '9000-01-01 UTC'
                   THEN '9000-01-01 UTC'
               ELSE start + interval '30 days'
           END AS new_end,
           status IN ('active', 'past_due', 'paused') AS is_live,
           CASE
               WHEN users.id IS NULL THEN 'parent_left_behind'
               WHEN plan_code NOT IN ('free', 'pro', 'plus')
                   OR status NOT IN (
                       'created', 'authenticated', 'active', 'past_due', 'cancelled', 'completed',
                       'paused', 'halted', 'upgraded', 'replaced'
                   )
                   THEN 'subscription_unknown'
           END AS rejected
      FROM times
      LEFT JOIN new_users AS users ON users.id = times.user_id AND users.rejected IS NULL
),
old AS (
    SELECT judged.*,
           min(start) OVER live AS first_start,
           max(new_end) OVER live AS last_end,
           count(*) OVER live AS live,
           row_number() OVER (
               PARTITION BY user_id, is_live, rejected IS NULL
               ORDER BY paid_first AND plan_code = 'free', created_at DESC NULLS LAST, id
           ) AS place,
           CASE
               WHEN trial_end IS NULL THEN trial_start
               WHEN trial_start < trial_end THEN trial_start
               WHEN trial_start IS NULL AND new_created_at < trial_end THEN new_created_at
           END AS new_trial_start
      FROM judged
    WINDOW live AS (PARTITION BY user_id, is_live, rejected IS NULL)
)
SELECT row_number() OVER (ORDER BY id) AS n,
       id::text AS key,
       false AS extra,
       rejected,
       array_remove(ARRAY[
           CASE WHEN is_live AND live > 1 AND place = 1 THEN 'subscription_merged' END,
           CASE WHEN is_live AND place > 1 THEN 'subscription_replaced' END,
           CASE WHEN current_period_end <= start THEN 'period_reset' END,
           CASE
               WHEN new_end = '9000-01-01 UTC' AND current_period_end IS NULL
                   THEN 'period_endless'
           END,
           CASE
               WHEN '' IN (razorpay_subscription_id, razorpay_customer_id)
                   THEN 'gateway_id_empty'
           END,
           CASE
               WHEN trial_end IS NOT NULL AND new_trial_start IS NULL THEN 'trial_dropped'
               WHEN trial_end IS NOT NULL AND trial_start IS NULL THEN 'trial_without_start'
           END,
           CASE WHEN status = 'cancelled' AND cancelled_at IS NULL THEN 'cancelled_at_missing' END,
           CASE
               WHEN least(pause_count, grace_period_days, failed_payment_count) < 0
                   THEN 'negative_count'
           END,
           CASE
               WHEN least(discount_amount, tax_amount, total_amount) < 0 THEN 'quote_negative'
           END,
           CASE
               WHEN billing_cycle NOT IN ('monthly', 'yearly') THEN 'billing_cycle_unknown'
           END,
           CASE
               WHEN num_nulls(
                       billing_cycle, cancel_at_period_end, pause_count, proration_amount,
                       discount_amount, tax_amount, total_amount, auto_renewal, grace_period_days,
                       failed_payment_count
                   ) > 0
                   OR num_nulls(created_at, updated_at) > 0 AND NOT odd_time
                   THEN 'null_default'
           END,
           CASE WHEN odd_time THEN 'time_out_of_range' END
       ], NULL) AS reasons,
       id,
       user_id,
       CASE WHEN rejected IS NULL THEN plan_code::subscription_plan END AS plan_code,
       nullif(razorpay_subscription_id, '') AS razorpay_subscription_id,
       nullif(razorpay_customer_id, '') AS razorpay_customer_id,
       CASE
           WHEN rejected IS NOT NULL THEN NULL
           WHEN is_live AND place > 1 THEN 'replaced'
           ELSE status
       END::subscription_status AS status,
       CASE billing_cycle WHEN 'yearly' THEN 'yearly' ELSE 'monthly' END::billing_cycle
           AS billing_cycle,
       CASE WHEN is_live AND place = 1 THEN first_start ELSE start END AS current_period_start,
       CASE WHEN is_live AND place = 1 THEN last_end ELSE new_end END AS current_period_end,
       new_trial_start AS trial_start,
       CASE WHEN new_trial_start IS NOT NULL THEN trial_end END AS trial_end,
       coalesce(cancel_at_period_end, false) AS cancel_at_period_end,
       CASE
           WHEN status = 'cancelled' THEN coalesce(cancelled_at, updated_at, new_created_at)
           ELSE cancelled_at
       END AS cancelled_at,
       cancellation_reason,
       cancellation_feedback,
       greatest(coalesce(pause_count, 0), 0)::integer AS pause_count,
       paused_at,
       resume_at,
       next_billing_date,
       coalesce(proration_amount, 0) AS proration_amount,
       greatest(coalesce(discount_amount, 0), 0) AS discount_amount,
       greatest(coalesce(tax_amount, 0), 0) AS tax_amount,
       greatest(coalesce(total_amount, 0), 0) AS total_amount,
       coalesce(auto_renewal, true) AS auto_renewal,
       greatest(coalesce(grace_period_days, 3), 0)::integer AS grace_period_days,
       greatest(coalesce(failed_payment_count, 0), 0)::integer AS failed_payment_count,
       last_payment_attempt,
       new_created_at AS created_at,
       coalesce(updated_at, new_created_at) AS updated_at
  FROM old
