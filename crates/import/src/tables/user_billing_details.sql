-- A card is kept if it has a gateway token and all that may be shown; nothing else of it is.

WITH element AS (
    SELECT old.billing_id,
           position,
           card,
           card ->> 'id' AS id,
           card ->> 'token' AS token,
           CASE WHEN card ->> 'brand' ~ '\S' THEN card ->> 'brand' ELSE 'unknown' END AS brand,
           coalesce(
               substring(card ->> 'last4' FROM '^[0-9]{4}$'),
               right(regexp_replace(card ->> 'number', '[^0-9]', '', 'g'), 4)
           ) AS last4,
           substring(card ->> 'exp_month' FROM '^0?([1-9]|1[0-2])$')::integer AS exp_month,
           substring(card ->> 'exp_year' FROM '^[1-9][0-9]{3}$')::integer AS exp_year
      FROM old_user_billing_details AS old
     CROSS JOIN jsonb_array_elements(
           CASE jsonb_typeof(cards) WHEN 'array' THEN cards ELSE '[]' END
     ) WITH ORDINALITY AS element (card, position)
),
readable AS (
    SELECT element.*,
           jsonb_build_object(
               'id', id, 'token', token, 'brand', brand, 'last4', last4,
               'exp_month', exp_month, 'exp_year', exp_year
           ) AS new_card,
           row_number() OVER (PARTITION BY billing_id, id ORDER BY position) AS place
      FROM element
     WHERE jsonb_typeof(card) = 'object'
       AND id ~ '\S' AND token ~ '\S' AND last4 ~ '^[0-9]{4}$'
       AND num_nulls(exp_month, exp_year) = 0
       AND NOT pg_temp.has_card_secret(jsonb_build_array(id, token, brand))
),
kept AS (
    SELECT billing_id,
           jsonb_agg(new_card ORDER BY position) AS cards,
           count(*) AS number,
           bool_or(new_card <> card AND pg_temp.has_card_secret(card)) AS are_stripped,
           bool_or(new_card <> card AND NOT pg_temp.has_card_secret(card)) AS are_rewritten
      FROM readable
     WHERE place = 1
     GROUP BY billing_id
),
old AS (
    SELECT old.*,
           now,
           users.id IS NULL AS is_orphan,
           coalesce(kept.cards, '[]') AS new_cards,
           coalesce(number, 0) < CASE jsonb_typeof(old.cards)
               WHEN 'array' THEN jsonb_array_length(old.cards)
               WHEN 'null' THEN 0
               ELSE 1
           END AS are_dropped,
           are_stripped,
           are_rewritten
      FROM old_user_billing_details AS old
      CROSS JOIN settings
      LEFT JOIN kept USING (billing_id)
      LEFT JOIN new_users AS users ON users.id = old.user_id AND users.rejected IS NULL
)
SELECT row_number() OVER (ORDER BY billing_id) AS n,
       billing_id::text AS key,
       false AS extra,
       CASE WHEN is_orphan THEN 'parent_left_behind' END AS rejected,
       array_remove(ARRAY[
           CASE
               WHEN '' IN (address_line1, city, state, country, zip_code)
                   THEN 'address_part_empty'
           END,
           CASE WHEN are_dropped THEN 'card_dropped' END,
           CASE WHEN are_stripped THEN 'card_number_stripped' END,
           CASE WHEN are_rewritten THEN 'card_rewritten' END,
           CASE
               WHEN default_card_id IS NOT NULL
                   AND NOT new_cards @> jsonb_build_array(jsonb_build_object('id', default_card_id))
                   THEN 'default_card_unknown'
           END,
           CASE
               WHEN coalesce(cards, 'null') = 'null'
                   OR num_nulls(created_at, updated_at) > 0 AND NOT odd_time
                   THEN 'null_default'
           END,
           CASE WHEN odd_time THEN 'time_out_of_range' END
       ], NULL) AS reasons,
       billing_id,
       user_id,
       coalesce(nullif(address_line1, ''), '-') AS address_line1,
       address_line2,
       coalesce(nullif(city, ''), '-') AS city,
       coalesce(nullif(state, ''), '-') AS state,
       coalesce(nullif(country, ''), '-') AS country,
       coalesce(nullif(zip_code, ''), '-') AS zip_code,
       new_cards AS cards,
       CASE
           WHEN new_cards @> jsonb_build_array(jsonb_build_object('id', default_card_id))
               THEN default_card_id
       END AS default_card_id,
       coalesce(created_at, updated_at, now) AS created_at,
       coalesce(updated_at, created_at, now) AS updated_at
  FROM old
