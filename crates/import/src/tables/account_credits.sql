-- The later system counted down what is left of a credit. A credit that is spent in part becomes
-- two rows here: one that is used, and one with the rest.

WITH shaped AS (
    SELECT old.*,
           now,
           upper(btrim(coalesce(currency, 'INR'))) AS new_currency,
           CASE coalesce(source_type, credit_type)
               WHEN 'promotional' THEN 'promotion'
               ELSE coalesce(source_type, credit_type)
           END AS source,
           coalesce(source_id, source_transaction_id::text, subscription_id::text) AS new_source_id,
           coalesce(created_at, updated_at, now) AS new_created_at,
           CASE
               WHEN credit_amount IS NULL THEN is_used OR is_used IS NULL AND used_at IS NOT NULL
               ELSE remaining_amount = 0
           END IS TRUE AS is_spent
      FROM old_account_credits AS old, settings
),
parts AS (
    -- The whole, or what is spent of it.
    SELECT shaped.*,
           0 AS part,
           coalesce(amount, credit_amount - remaining_amount) AS rest,
           credit_amount IS NULL AND is_spent OR credit_amount IS NOT NULL AS new_is_used
      FROM shaped
     WHERE credit_amount IS NULL OR remaining_amount < credit_amount
    UNION ALL
    SELECT shaped.*,
           CASE WHEN remaining_amount < credit_amount THEN 1 ELSE 0 END,
           remaining_amount,
           false
      FROM shaped
     WHERE remaining_amount > 0
),
judged AS (
    SELECT parts.*,
           source IN ('refund', 'downgrade') IS TRUE AS once,
           CASE
               WHEN users.id IS NULL THEN 'parent_left_behind'
               WHEN rest = 0 OR rest IS NULL THEN 'amount_zero'
               WHEN source NOT IN ('refund', 'adjustment', 'promotion', 'downgrade')
                   THEN 'credit_source_unknown'
               WHEN new_currency !~ '^[A-Z]{3}$' THEN 'currency_unknown'
           END AS rejected
      FROM parts
      LEFT JOIN new_users AS users ON users.id = parts.user_id AND users.rejected IS NULL
),
old AS (
    SELECT judged.*,
           row_number() OVER (
               PARTITION BY rejected IS NULL, source, new_source_id
               ORDER BY new_created_at, id, part
           ) AS place
      FROM judged
)
SELECT row_number() OVER (ORDER BY id, part) AS n,
       id::text AS key,
       part = 1 AS extra,
       rejected,
       CASE part
           -- The other reasons of the row are counted once.
           WHEN 1 THEN ARRAY(SELECT 'credit_inactive_rest' WHERE is_active IS FALSE)
           ELSE array_remove(ARRAY[
               CASE
                   WHEN remaining_amount BETWEEN 1 AND credit_amount - 1 THEN 'credit_split'
                   WHEN is_active IS FALSE AND remaining_amount > 0 THEN 'credit_inactive_rest'
               END,
               CASE WHEN new_currency <> currency THEN 'currency_upper' END,
               CASE
                   WHEN NOT once THEN NULL
                   WHEN coalesce(new_source_id, '') = '' THEN 'credit_source_missing'
                   WHEN place > 1 THEN 'credit_source_repeated'
               END,
               CASE
                   WHEN num_nulls(source_transaction_id, subscription_id) = 0 OR applied_count > 1
                       THEN 'credit_history_dropped'
               END,
               CASE
                   WHEN new_is_used AND coalesce(used_at, last_applied_at) IS NULL
                       THEN 'used_without_date'
                   WHEN NOT new_is_used AND used_at IS NOT NULL THEN 'used_at_of_unused'
               END,
               CASE
                   WHEN credit_amount IS NULL AND num_nulls(currency, is_used) > 0
                       OR credit_amount IS NOT NULL AND is_active IS NULL
                       OR num_nulls(created_at, updated_at) > 0 AND NOT odd_time
                       THEN 'null_default'
               END,
               CASE WHEN odd_time THEN 'time_out_of_range' END
           ], NULL)
       END AS reasons,
       CASE part WHEN 0 THEN id ELSE md5('rest of ' || id)::uuid END AS id,
       user_id,
       rest AS amount,
       new_currency AS currency,
       description,
       CASE WHEN rejected IS NULL THEN source::credit_source END AS source_type,
       CASE
           WHEN NOT once THEN new_source_id
           WHEN coalesce(new_source_id, '') = '' OR place > 1
               THEN concat_ws(' ', nullif(new_source_id, ''), 'imported', id, nullif(part, 0))
           ELSE new_source_id
       END AS source_id,
       new_is_used AS is_used,
       CASE WHEN new_is_used THEN coalesce(used_at, last_applied_at, updated_at, new_created_at) END
           AS used_at,
       -- A credit that was switched off can't be spent.
       CASE
           WHEN is_active IS FALSE AND NOT new_is_used
               THEN least(expires_at, coalesce(updated_at, new_created_at))
           ELSE expires_at
       END AS expires_at,
       new_created_at AS created_at,
       coalesce(updated_at, new_created_at) AS updated_at
  FROM old
