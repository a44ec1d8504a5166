-- No amount is changed but the sign of a refund: what breaks a rule of money is left behind.
-- Parents come before their children.

WITH RECURSIVE tree AS (
    SELECT id, 0 AS depth
      FROM old_subscription_transactions AS old
     WHERE parent_transaction_id IS NULL
        OR parent_transaction_id = id
        OR NOT EXISTS (
            SELECT
              FROM old_subscription_transactions AS parent
             WHERE parent.id = old.parent_transaction_id
        )
    UNION ALL
    SELECT child.id, depth + 1
      FROM tree
      JOIN old_subscription_transactions AS child ON child.parent_transaction_id = tree.id
     WHERE child.id <> tree.id
),
converted AS (
    SELECT old.*,
           now,
           depth,
           transaction_type = 'refund' AS is_refund,
           CASE WHEN transaction_type = 'refund' THEN -abs(amount) ELSE amount END AS new_amount,
           CASE WHEN transaction_type = 'refund' THEN -abs(net_amount) ELSE net_amount END
               AS new_net,
           upper(btrim(coalesce(currency, 'INR'))) AS new_currency,
           coalesce(old.created_at, old.updated_at, now) AS new_created_at,
           pg_temp.document_of(method_details_json) AS details,
           pg_temp.document_of(gateway_response_json) AS response
      FROM old_subscription_transactions AS old
      CROSS JOIN settings
      LEFT JOIN tree USING (id)
),
-- What a row says of itself.
judged AS (
    SELECT converted.*,
           CASE
               WHEN users.id IS NULL THEN 'parent_left_behind'
               WHEN transaction_type NOT IN ('subscription', 'addon', 'refund', 'adjustment', 'fee')
                   OR status NOT IN (
                       'created', 'authorized', 'captured', 'refunded', 'failed', 'cancelled'
                   )
                   THEN 'transaction_unknown'
               WHEN new_currency !~ '^[A-Z]{3}$' THEN 'currency_unknown'
               -- NaN is greater than any number.
               WHEN exchange_rate <= 0
                   OR exchange_rate >= 1e10
                   AND NOT (exchange_rate = 'NaN' AND new_currency = 'INR')
                   THEN 'exchange_rate_invalid'
               WHEN is_refund AND new_amount = 0 THEN 'refund_of_nothing'
               WHEN is_refund THEN NULL
               WHEN least(amount, net_amount, tax_amount, discount_amount, fee_amount) < 0
                   THEN 'amount_negative'
               WHEN net_amount > amount THEN 'net_exceeds_amount'
           END AS own_verdict
      FROM converted
      LEFT JOIN new_users AS users ON users.id = converted.user_id AND users.rejected IS NULL
),
-- What the payment says of its refund. A payment is no refund, so its own verdict is the last.
refunds AS (
    SELECT refund.id,
           CASE
               WHEN payment.id IS NULL OR payment.is_refund OR payment.depth IS NULL
                   OR payment.user_id <> refund.user_id
                   OR payment.new_currency <> refund.new_currency
                   THEN 'refund_without_payment'
               WHEN payment.own_verdict IS NOT NULL THEN 'parent_left_behind'
               WHEN payment.status NOT IN ('captured', 'refunded') THEN 'refund_of_unpaid'
               WHEN payment.amount < -sum(refund.new_amount) FILTER (
                   WHERE refund.status NOT IN ('failed', 'cancelled')
               ) OVER (
                   PARTITION BY payment.id ORDER BY refund.new_created_at, refund.id
               ) AND refund.status NOT IN ('failed', 'cancelled')
                   THEN 'refund_exceeds'
           END AS verdict
      FROM judged AS refund
      LEFT JOIN judged AS payment
        ON payment.id = refund.parent_transaction_id AND payment.id <> refund.id
     WHERE refund.is_refund AND refund.own_verdict IS NULL
),
verdicts AS (
    SELECT judged.*,
           coalesce(own_verdict, refunds.verdict) AS rejected,
           details = pg_temp.wrapped(method_details_json) AS details_are_wrapped,
           CASE
               WHEN details = pg_temp.wrapped(method_details_json)
                   THEN pg_temp.text_has_card_secret(method_details_json)
               ELSE pg_temp.has_card_secret(details)
           END AS has_card_secret
      FROM judged
      LEFT JOIN refunds USING (id)
),
old AS (
    SELECT child.*,
           parent.id AS new_parent,
           subscription.id AS new_subscription
      FROM verdicts AS child
      LEFT JOIN verdicts AS parent
        ON parent.id = child.parent_transaction_id
       AND parent.id <> child.id
       AND parent.rejected IS NULL
       AND child.depth > 0
      LEFT JOIN new_user_subscriptions AS subscription
        ON subscription.id = child.subscription_id AND subscription.rejected IS NULL
)
SELECT row_number() OVER (ORDER BY depth NULLS FIRST, id) AS n,
       id::text AS key,
       false AS extra,
       rejected,
       array_remove(ARRAY[
           CASE WHEN new_amount <> amount OR new_net <> net_amount THEN 'refund_negated' END,
           CASE WHEN new_currency <> currency THEN 'currency_upper' END,
           CASE WHEN exchange_rate = 'NaN' THEN 'exchange_rate_reset' END,
           CASE
               WHEN parent_transaction_id IS NOT NULL AND new_parent IS NULL THEN 'parent_unlinked'
           END,
           CASE
               WHEN subscription_id IS NOT NULL AND new_subscription IS NULL
                   THEN 'subscription_unlinked'
           END,
           CASE
               WHEN '' IN (razorpay_payment_id, razorpay_order_id, receipt_number, invoice_id)
                   THEN 'gateway_id_empty'
           END,
           CASE
               WHEN method_details_json IS NOT NULL AND details IS NULL
                   OR gateway_response_json IS NOT NULL AND response IS NULL
                   THEN 'gateway_text_empty'
           END,
           CASE
               WHEN details_are_wrapped OR response = pg_temp.wrapped(gateway_response_json)
                   THEN 'gateway_text_wrapped'
           END,
           CASE WHEN has_card_secret THEN 'card_number_stripped' END,
           CASE WHEN retry_count < 0 THEN 'negative_count' END,
           CASE
               WHEN num_nulls(
                       tax_amount, discount_amount, fee_amount, currency, exchange_rate, retry_count
                   ) > 0
                   OR num_nulls(created_at, updated_at) > 0 AND NOT odd_time
                   THEN 'null_default'
           END,
           CASE WHEN odd_time THEN 'time_out_of_range' END
       ], NULL) AS reasons,
       id,
       user_id,
       new_subscription AS subscription_id,
       nullif(razorpay_payment_id, '') AS razorpay_payment_id,
       nullif(razorpay_order_id, '') AS razorpay_order_id,
       CASE WHEN rejected IS NULL THEN transaction_type::transaction_type END AS transaction_type,
       new_amount AS amount,
       coalesce(tax_amount, 0) AS tax_amount,
       coalesce(discount_amount, 0) AS discount_amount,
       coalesce(fee_amount, 0) AS fee_amount,
       new_net AS net_amount,
       new_currency AS currency,
       CASE WHEN exchange_rate = 'NaN' THEN 1 ELSE coalesce(exchange_rate, 1) END AS exchange_rate,
       CASE WHEN rejected IS NULL THEN status::transaction_status END AS status,
       gateway_status,
       method,
       CASE
           WHEN NOT has_card_secret THEN details
           WHEN details_are_wrapped THEN '{"removed": "a card number"}'
           ELSE pg_temp.without_card_secrets(details)
       END AS method_details_json,
       response AS gateway_response_json,
       description,
       nullif(receipt_number, '') AS receipt_number,
       nullif(invoice_id, '') AS invoice_id,
       failure_reason,
       failure_code,
       greatest(coalesce(retry_count, 0), 0)::integer AS retry_count,
       new_parent AS parent_transaction_id,
       processed_at,
       settled_at,
       refunded_at,
       new_created_at AS created_at,
       coalesce(updated_at, new_created_at) AS updated_at
  FROM old
