-- Of the accounts whose addresses are one in canonical form, the oldest keeps the address. Of those
-- that share a customer id, the oldest keeps the id.

WITH canonical AS (
    SELECT old.*,
           emails.email AS canonical_email,
           row_number() OVER (
               PARTITION BY emails.email ORDER BY old.created_at, old.id
           ) AS place
      FROM old_users AS old
      JOIN emails USING (id)
),
addressed AS (
    SELECT canonical.*,
           CASE
               WHEN place = 1 THEN canonical_email
               WHEN suffix_emails THEN format(
                   '%s+duplicate-%s@%s',
                   split_part(canonical_email, '@', 1),
                   replace(id::text, '-', ''),
                   split_part(canonical_email, '@', 2)
               )
           END AS new_email,
           now
      FROM canonical, settings
),
judged AS (
    SELECT addressed.*,
           CASE
               WHEN canonical_email IS NULL THEN 'email_invalid'
               WHEN new_email IS NULL OR char_length(new_email) > 255 THEN 'email_duplicate'
           END AS rejected
      FROM addressed
),
old AS (
    SELECT judged.*,
           nullif(razorpay_customer_id, '') IS NOT NULL
           AND 1 < row_number() OVER (
               PARTITION BY rejected IS NULL, nullif(razorpay_customer_id, '')
               ORDER BY created_at, id
           ) AS shares_customer,
           coalesce(password, password_hash) AS hash,
           coalesce(password, password_hash)
               ~ '^\$[a-z0-9-]{1,32}(\$[A-Za-z0-9/+.,=-]+)+\$[A-Za-z0-9/+.=-]{22,}$'
           AND char_length(coalesce(password, password_hash)) <= 512 AS is_hash
      FROM judged
)
SELECT row_number() OVER (ORDER BY id) AS n,
       id::text AS key,
       false AS extra,
       rejected,
       array_remove(ARRAY[
           CASE WHEN first_name = '' THEN 'name_empty' END,
           CASE
               WHEN greatest(char_length(first_name), char_length(last_name)) > 255 THEN 'text_cut'
           END,
           CASE WHEN canonical_email <> email THEN 'email_canonical' END,
           CASE WHEN place > 1 THEN 'email_suffixed' END,
           CASE WHEN NOT is_hash THEN 'password_not_phc' END,
           CASE WHEN razorpay_customer_id = '' THEN 'gateway_id_empty' END,
           CASE WHEN shares_customer THEN 'gateway_id_shared' END,
           CASE
               WHEN num_nulls(coalesce(email_verified, is_verified), is_active) > 0
                   OR num_nulls(created_at, updated_at) > 0 AND NOT odd_time
                   THEN 'null_default'
           END,
           CASE WHEN odd_time THEN 'time_out_of_range' END
       ], NULL) AS reasons,
       id,
       left(coalesce(nullif(first_name, ''), split_part(new_email, '@', 1)), 255) AS first_name,
       left(last_name, 255) AS last_name,
       new_email AS email,
       CASE WHEN is_hash THEN hash END AS password,
       coalesce(email_verified, is_verified, false) AS email_verified,
       CASE WHEN NOT shares_customer THEN nullif(razorpay_customer_id, '') END
           AS razorpay_customer_id,
       coalesce(created_at, updated_at, now) AS created_at,
       coalesce(updated_at, created_at, now) AS updated_at,
       last_login_at,
       coalesce(is_active, true) AS is_active
  FROM old
