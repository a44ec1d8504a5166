-- None is taken over: the new table holds digests, and users sign in again.

SELECT row_number() OVER (ORDER BY id) AS n,
       id::text AS key,
       false AS extra,
       CASE
           WHEN coalesce(type, token_type) = 'email_change_pending' AND is_used IS NOT TRUE
               THEN 'address_change_lost'
           ELSE 'signs_in_again'
       END AS rejected,
       ARRAY[]::text[] AS reasons
  FROM old_auth_tokens
