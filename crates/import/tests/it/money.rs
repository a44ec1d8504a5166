//! Subscriptions, payments, credits and billing details.

use bruhmcp_db::import::{LiveSubscription, Options};

use crate::support::{Old, SHAPES, id, keys, user};

const A: &str = SHAPES[0];
const B: &str = SHAPES[1];

#[test]
fn of_several_live_subscriptions_the_latest_stays() {
    let rows = user(A, 1, "ada@example.org")
        + &format!(
            "INSERT INTO user_subscriptions (id, user_id, status, current_period_start,
                 current_period_end, created_at)
             VALUES ('{1}', '{0}', 'active', '2020-01-01', '2030-01-01', '2020-01-01'),
                    ('{2}', '{0}', 'past_due', '2021-01-01', '2022-01-01', '2021-01-01'),
                    ('{3}', '{0}', 'halted', '2018-01-01', '2040-01-01', '2022-01-01');",
            id(1),
            id(11),
            id(12),
            id(13),
        );
    let (mut old, report) = Old::imported(A, &rows);
    assert_eq!(
        keys(&report, "user_subscriptions", "subscription_replaced"),
        [id(11)]
    );
    assert_eq!(
        keys(&report, "user_subscriptions", "subscription_merged"),
        [id(12)]
    );
    assert_eq!(
        old.text(
            "SELECT string_agg(concat_ws(' ', status, current_period_start::date,
                     current_period_end::date), ', ' ORDER BY id) FROM user_subscriptions"
        ),
        "replaced 2020-01-01 2030-01-01, past_due 2020-01-01 2030-01-01, \
         halted 2018-01-01 2040-01-01"
    );
}

#[test]
fn a_paid_subscription_stays_if_the_operator_says_so() {
    let rows = user(A, 1, "ada@example.org")
        + &format!(
            "INSERT INTO user_subscriptions (id, user_id, plan_code, created_at)
             VALUES ('{1}', '{0}', 'pro', '2020-01-01'), ('{2}', '{0}', 'free', '2021-01-01');",
            id(1),
            id(11),
            id(12),
        );
    for (live_subscription, replaced) in
        [(LiveSubscription::Latest, 11), (LiveSubscription::Paid, 12)]
    {
        let mut old = Old::new(A, &rows);
        let options = Options {
            live_subscription,
            ..Options::default()
        };
        let report = old.import(&options).unwrap();
        let found = keys(&report, "user_subscriptions", "subscription_replaced");
        assert_eq!(found, [id(replaced)]);
        assert!(old.check().holds());
    }
}

#[test]
fn odd_subscriptions_are_converted() {
    let rows = user(A, 1, "ada@example.org")
        + &format!(
            "INSERT INTO user_subscriptions (id, user_id, status, trial_end, discount_amount,
                 razorpay_customer_id, billing_cycle, created_at, grace_period_days, current_period_end)
             VALUES ('{1}', '{0}', 'cancelled', '2199-01-01', -5, '', NULL, '2020-01-01', -1,
                     'infinity'),
                    ('{2}', '{0}', 'cancelled', '1999-01-01', 5, 'c', 'yearly', NULL, NULL,
                     '2199-01-01');",
            id(1),
            id(11),
            id(12),
        );
    let (mut old, report) = Old::imported(A, &rows);
    for (code, number) in [
        ("trial_without_start", 11),
        ("trial_dropped", 12),
        ("quote_negative", 11),
        ("gateway_id_empty", 11),
        ("negative_count", 11),
        ("time_out_of_range", 11),
        ("period_endless", 11),
    ] {
        assert_eq!(
            keys(&report, "user_subscriptions", code),
            [id(number)],
            "{code}"
        );
    }
    for code in ["cancelled_at_missing", "null_default"] {
        assert_eq!(
            keys(&report, "user_subscriptions", code),
            [id(11), id(12)],
            "{code}"
        );
    }
    assert_eq!(
        old.text(
            "SELECT string_agg(concat_ws(' ', billing_cycle, discount_amount, grace_period_days,
                     trial_start::date, current_period_end > '2999-01-01'), ', '
                     ORDER BY id) FROM user_subscriptions"
        ),
        "monthly 0 0 2020-01-01 t, yearly 5 3 f"
    );
}

#[test]
fn a_period_without_end_gives_a_plan_without_end() {
    let rows = user(B, 1, "ada@example.org")
        + &format!(
            "INSERT INTO user_subscriptions (id, user_id, plan_code, current_period_end)
             VALUES ('{}', '{}', 'pro', 'infinity');",
            id(11),
            id(1),
        );
    let (mut old, report) = Old::imported(B, &rows);
    assert_eq!(
        keys(&report, "user_subscriptions", "period_endless"),
        [id(11)]
    );
    assert_eq!(
        old.text("SELECT (plan_type, max_instances, expires_at) FROM user_plans"),
        "(pro,,)"
    );
}

#[test]
fn a_period_that_ends_in_the_hour_that_is_skipped_is_reset() {
    let rows = user(A, 1, "ada@example.org")
        + &format!(
            "INSERT INTO user_subscriptions (id, user_id, current_period_start, current_period_end)
             VALUES ('{}', '{}', '2021-03-14 02:30', '2021-03-14 03:00');",
            id(11),
            id(1),
        );
    let mut old = Old::new(A, &rows);
    let options = Options {
        timezone: "America/New_York".to_owned(),
        ..Options::default()
    };
    let report = old.import(&options).unwrap();
    assert_eq!(
        keys(&report, "user_subscriptions", "period_reset"),
        [id(11)]
    );
    assert!(old.check().holds());
}

/// A payment of 1,000 paise by user 1, and a refund of it.
fn payment(more: &str) -> String {
    user(A, 1, "ada@example.org")
        + &user(A, 2, "bob@example.org")
        + &format!(
            "INSERT INTO subscription_transactions (id, user_id, transaction_type, amount, net_amount,
                 status, parent_transaction_id, created_at)
             VALUES ('{1}', '{0}', 'subscription', 1000, 900, 'captured', NULL, '2020-01-01'),
                    ('{2}', '{0}', 'refund', 400, 400, 'captured', '{1}', '2020-01-02');",
            id(1),
            id(50),
            id(10),
        )
        + more
}

#[test]
fn a_positive_refund_is_negated() {
    let (mut old, report) = Old::imported(A, &payment(""));
    assert!(report.is_complete(), "{report:?}");
    assert_eq!(
        keys(&report, "subscription_transactions", "refund_negated"),
        [id(10)]
    );
    assert_eq!(
        old.text(
            "SELECT string_agg(concat_ws(' ', amount, net_amount, parent_transaction_id), ', '
                     ORDER BY amount) FROM subscription_transactions"
        ),
        format!("-400 -400 {}, 1000 900", id(50))
    );
}

#[test]
fn refunds_that_no_payment_covers_stay_behind() {
    let refund = |number, user, amount, parent: &str, status: &str| {
        format!(
            "INSERT INTO subscription_transactions (id, user_id, transaction_type, amount, net_amount,
                 status, parent_transaction_id, created_at)
             VALUES ('{}', '{}', 'refund', {amount}, 0, '{status}', {parent}, '2020-02-0{}');",
            id(number),
            id(user),
            number % 10,
        )
    };
    let parent = format!("'{}'", id(50));
    let more = refund(21, 1, 100, "NULL", "captured")
        + &refund(22, 2, 100, &parent, "captured")
        + &refund(23, 1, 0, &parent, "captured")
        + &refund(24, 1, 601, &parent, "failed")
        + &refund(25, 1, 601, &parent, "captured")
        + &refund(26, 1, 600, &format!("'{}'", id(51)), "captured")
        + &format!(
            "INSERT INTO subscription_transactions (id, user_id, transaction_type, amount, net_amount,
                 status, parent_transaction_id) VALUES ('{}', '{}', 'fee', 5, 5, 'captured', '{}');",
            id(60),
            id(1),
            id(21),
        );
    let unpaid = format!(
        "INSERT INTO subscription_transactions (id, user_id, amount, net_amount, status)
         VALUES ('{}', '{}', 600, 600, 'failed');",
        id(51),
        id(1)
    );
    let (mut old, report) = Old::imported(A, &payment(&(unpaid + &more)));
    for (code, numbers) in [
        ("refund_without_payment", vec![id(21), id(22)]),
        ("refund_of_nothing", vec![id(23)]),
        ("refund_exceeds", vec![id(25)]),
        ("refund_of_unpaid", vec![id(26)]),
        ("parent_unlinked", vec![id(60)]),
    ] {
        assert_eq!(
            keys(&report, "subscription_transactions", code),
            numbers,
            "{code}"
        );
    }
    assert_eq!(
        old.text("SELECT count(*) FROM subscription_transactions"),
        "5"
    );
}

#[test]
fn odd_payments_are_converted() {
    let more = format!(
        r#"INSERT INTO subscription_transactions (id, user_id, amount, net_amount, status, currency,
               exchange_rate, razorpay_payment_id, method_details_json, gateway_response_json, retry_count)
           VALUES ('{1}', '{0}', 5, 5, 'created', 'inr', 'NaN', '', 'not json', '{{"a": "\u0000"}}', -1),
                  ('{2}', '{0}', 5, 5, 'created', 'usd', 'NaN', NULL, NULL, NULL, 0),
                  ('{3}', '{0}', 5, 6, 'created', NULL, NULL, NULL, ' ', NULL, 0),
                  ('{4}', '{0}', 5, 5, 'created', 'Rupees', 1, NULL, NULL, NULL, 0),
                  ('{5}', '{0}', 5, 5, 'created', 'INR', 1, NULL,
                   '{{"number": "4111 1111 1111 1111"}}', '[1e999]', 0);
           UPDATE subscription_transactions SET parent_transaction_id = id WHERE id = '{1}';
           UPDATE subscription_transactions SET tax_amount = -1 WHERE id = '{4}';"#,
        id(1),
        id(31),
        id(32),
        id(33),
        id(34),
        id(35),
    );
    let (mut old, report) = Old::imported(A, &payment(&more));
    for (code, numbers) in [
        ("currency_upper", vec![id(31)]),
        ("exchange_rate_reset", vec![id(31)]),
        ("exchange_rate_invalid", vec![id(32)]),
        ("net_exceeds_amount", vec![id(33)]),
        ("currency_unknown", vec![id(34)]),
        ("gateway_id_empty", vec![id(31)]),
        ("gateway_text_wrapped", vec![id(31), id(35)]),
        ("card_number_stripped", vec![id(35)]),
        ("negative_count", vec![id(31)]),
        ("parent_unlinked", vec![id(31)]),
    ] {
        assert_eq!(
            keys(&report, "subscription_transactions", code),
            numbers,
            "{code}"
        );
    }
    assert_eq!(
        old.text(&format!(
            "SELECT (currency, exchange_rate, method_details_json, gateway_response_json)
               FROM subscription_transactions WHERE id = '{}'",
            id(31)
        )),
        r#"(INR,1.00000000,"{""unreadable"": ""not json""}","{""unreadable"": ""{\\""a\\"": \\""\\\\u0000\\""}""}")"#
    );
    assert_eq!(
        old.text(&format!(
            "SELECT (method_details_json, gateway_response_json)
               FROM subscription_transactions WHERE id = '{}'",
            id(35)
        )),
        r#"({},"{""unreadable"": ""[1e999]""}")"#
    );
}

#[test]
fn card_numbers_are_taken_out_of_the_details() {
    let more = format!(
        r#"INSERT INTO subscription_transactions (id, user_id, amount, net_amount, status,
               method_details_json, gateway_response_json)
           VALUES ('{1}', '{0}', 5, 5, 'created', NULL, NULL),
                  ('{2}', '{0}', 5, 5, 'created', E' \n', '{{"a": null}}'),
                  ('{3}', '{0}', 5, 5, 'created',
                   '{{"card": {{"number": "x", "last4": "1111", "CVV": 123}},
                      "seen": ["4111-1111-1111-1111", 5111111111111111, "visa"]}}', NULL),
                  ('{4}', '{0}', 5, 5, 'created', '{{''cvv'': ''123''}}', NULL),
                  ('{5}', '{0}', 5, 5, 'created', 'card=4111 1111 1111 1111;', NULL),
                  ('{6}', '{0}', 5, 5, 'created', '{{''last4'': ''1111''}}', NULL);"#,
        id(1),
        id(31),
        id(32),
        id(33),
        id(34),
        id(35),
        id(36),
    );
    let (mut old, report) = Old::imported(A, &payment(&more));
    for (code, numbers) in [
        ("gateway_text_empty", vec![id(32)]),
        ("card_number_stripped", vec![id(33), id(34), id(35)]),
        ("gateway_text_wrapped", vec![id(34), id(35), id(36)]),
    ] {
        assert_eq!(
            keys(&report, "subscription_transactions", code),
            numbers,
            "{code}"
        );
    }
    for (number, details) in [
        (31, "NULL"),
        (32, "NULL"),
        (
            33,
            r#"{"card": {"last4": "1111"}, "seen": ["removed", "removed", "visa"]}"#,
        ),
        (34, r#"{"removed": "a card number"}"#),
        (35, r#"{"removed": "a card number"}"#),
        (36, r#"{"unreadable": "{'last4': '1111'}"}"#),
    ] {
        let query = format!(
            "SELECT method_details_json FROM subscription_transactions WHERE id = '{}'",
            id(number)
        );
        assert_eq!(old.text(&query), details, "{number}");
    }
    assert_eq!(
        old.text(
            "SELECT string_agg(gateway_response_json::text, ', ') FROM subscription_transactions"
        ),
        r#"{"a": null}"#
    );
}

#[test]
fn parents_in_a_circle_are_unlinked() {
    let more = format!(
        "INSERT INTO subscription_transactions (id, user_id, amount, net_amount, status)
         SELECT id, '{0}', 5, 5, 'created' FROM unnest(ARRAY['{1}', '{2}', '{3}']::uuid[]) AS id;
         UPDATE subscription_transactions SET parent_transaction_id = '{2}' WHERE id = '{1}';
         UPDATE subscription_transactions SET parent_transaction_id = '{1}' WHERE id = '{2}';
         UPDATE subscription_transactions SET parent_transaction_id = '{4}' WHERE id = '{3}';",
        id(1),
        id(41),
        id(42),
        id(43),
        id(50),
    );
    let (mut old, report) = Old::imported(A, &payment(&more));
    assert_eq!(
        keys(&report, "subscription_transactions", "parent_unlinked"),
        [id(41), id(42)]
    );
    assert_eq!(
        old.text(
            "SELECT count(*) FROM subscription_transactions WHERE parent_transaction_id IS NOT NULL"
        ),
        "2"
    );
}

#[test]
fn odd_credits_of_the_first_shape_are_converted() {
    let rows = user(A, 1, "ada@example.org")
        + &format!(
            "INSERT INTO account_credits (id, user_id, amount, source_type, source_id, is_used, used_at,
                 currency)
             VALUES ('{1}', '{0}', 100, 'refund', NULL, false, NULL, 'INR'),
                    ('{2}', '{0}', 100, 'refund', 'r', true, NULL, 'INR'),
                    ('{3}', '{0}', 100, 'refund', 'r', false, '2020-01-01', 'INR'),
                    ('{4}', '{0}', 0, NULL, NULL, false, NULL, 'INR'),
                    ('{5}', '{0}', -7, 'promotion', 'p', NULL, '2020-01-01', NULL),
                    ('{6}', '{0}', 9, 'promotion', 'p', NULL, NULL, 'inr');
             UPDATE account_credits SET created_at = '2020-01-01' WHERE id = '{2}';",
            id(1),
            id(11),
            id(12),
            id(13),
            id(14),
            id(15),
            id(16),
        );
    let (mut old, report) = Old::imported(A, &rows);
    for (code, numbers) in [
        ("credit_source_missing", vec![id(11)]),
        ("credit_source_repeated", vec![id(13)]),
        ("used_without_date", vec![id(12)]),
        ("used_at_of_unused", vec![id(13)]),
        ("amount_zero", vec![id(14)]),
        ("null_default", vec![id(15), id(16)]),
        ("currency_upper", vec![id(16)]),
    ] {
        assert_eq!(keys(&report, "account_credits", code), numbers, "{code}");
    }
    assert_eq!(
        old.text(
            "SELECT string_agg(concat_ws(' ', amount, is_used), ', ' ORDER BY id) FROM account_credits"
        ),
        "100 f, 100 t, 100 f, -7 t, 9 f"
    );
}

#[test]
fn the_source_of_a_credit_is_kept() {
    let rows = user(A, 1, "ada@example.org")
        + &format!(
            "INSERT INTO account_credits (id, user_id, amount, source_type, source_id, created_at)
             VALUES ('{1}', '{0}', 100, 'promotion', '', '2020-01-01'),
                    ('{2}', '{0}', 0, 'refund', 'r', '2020-01-01'),
                    ('{3}', '{0}', 100, 'refund', 'r', '2020-01-02'),
                    ('{4}', '{0}', 100, 'downgrade', '', '2020-01-02');",
            id(1),
            id(11),
            id(12),
            id(13),
            id(14),
        );
    let (mut old, report) = Old::imported(A, &rows);
    assert!(keys(&report, "account_credits", "credit_source_repeated").is_empty());
    assert_eq!(
        keys(&report, "account_credits", "credit_source_missing"),
        [id(14)]
    );
    assert_eq!(
        old.text("SELECT json_agg(source_id ORDER BY id) FROM account_credits"),
        format!(r#"["", "r", "imported {}"]"#, id(14))
    );
}

#[test]
fn what_a_credit_has_no_column_for_is_named() {
    let rows = user(B, 1, "ada@example.org")
        + &format!(
            "INSERT INTO user_subscriptions (id, user_id) VALUES ('{1}', '{0}');
             INSERT INTO subscription_transactions (id, user_id, amount, net_amount, status)
             VALUES ('{2}', '{0}', 5, 5, 'captured');
             INSERT INTO account_credits (id, user_id, credit_amount, remaining_amount, credit_type,
                 subscription_id, source_transaction_id, applied_count, is_active)
             VALUES ('{3}', '{0}', 5, 5, 'refund', '{1}', '{2}', 0, true),
                    ('{4}', '{0}', 5, 0, 'adjustment', NULL, NULL, 2, true),
                    ('{5}', '{0}', 5, 5, 'downgrade', '{1}', NULL, 0, NULL);",
            id(1),
            id(21),
            id(22),
            id(11),
            id(12),
            id(13),
        );
    let (mut old, report) = Old::imported(B, &rows);
    for (code, numbers) in [
        ("credit_history_dropped", vec![id(11), id(12)]),
        ("null_default", vec![id(13)]),
    ] {
        assert_eq!(keys(&report, "account_credits", code), numbers, "{code}");
    }
    assert_eq!(
        old.text("SELECT json_agg(source_id ORDER BY id) FROM account_credits"),
        format!(r#"["{}", null, "{}"]"#, id(22), id(21))
    );
}

#[test]
fn credits_that_are_spent_in_part_become_two() {
    let rows = user(B, 1, "ada@example.org")
        + &format!(
            "INSERT INTO account_credits (id, user_id, credit_amount, remaining_amount, credit_type,
                 is_active, last_applied_at, updated_at)
             VALUES ('{1}', '{0}', 100, 0, 'promotional', true, '2020-01-01', '2020-05-05'),
                    ('{2}', '{0}', 100, 30, 'refund', true, NULL, '2020-05-05'),
                    ('{3}', '{0}', 100, 100, 'adjustment', false, NULL, '2020-05-05'),
                    ('{4}', '{0}', 50, 20, 'adjustment', false, '2020-04-04', '2020-05-05');",
            id(1),
            id(11),
            id(12),
            id(13),
            id(14),
        );
    let (mut old, report) = Old::imported(B, &rows);
    assert!(report.is_complete());
    let credits = report
        .tables
        .iter()
        .find(|table| table.table == "account_credits");
    let credits = credits.unwrap();
    assert_eq!((credits.rows, credits.added), (4, 2));
    for (code, numbers) in [
        ("credit_split", vec![id(12), id(14)]),
        ("credit_inactive_rest", vec![id(13), id(14)]),
        ("used_without_date", vec![id(12)]),
    ] {
        assert_eq!(keys(&report, "account_credits", code), numbers, "{code}");
    }
    assert_eq!(
        old.text(
            "SELECT string_agg(concat_ws(' ', amount, source_type, is_used, used_at::date,
                     expires_at::date), ', ' ORDER BY amount, source_type, is_used) FROM account_credits"
        ),
        "20 adjustment f 2020-05-05, 30 refund f, 30 adjustment t 2020-04-04, \
         70 refund t 2020-05-05, 100 adjustment f 2020-05-05, 100 promotion t 2020-01-01"
    );
}

#[test]
fn cards_without_numbers_are_kept() {
    let card =
        r#""token": "tok_1", "brand": "visa", "last4": "4242", "exp_month": 1, "exp_year": 2030"#;
    let rows = user(A, 1, "ada@example.org")
        + &user(A, 2, "bob@example.org")
        + &format!(
            r#"INSERT INTO user_billing_details (billing_id, user_id, address_line1, city, state,
                   country, zip_code, cards, default_card_id)
               VALUES ('{2}', '{0}', 'Road 1', '', '', 'IN', '1',
                       '[{{"id": "a", {card}}}, {{"id": "b", "number": "4111111111111111", {card}}},
                         {{"id": "c"}}, {{"id": "a", {card}}}]', 'c'),
                      ('{3}', '{1}', 'Road 1', 'Pune', 'MH', 'IN', '1', '{{}}', NULL);"#,
            id(1),
            id(2),
            id(11),
            id(12),
        );
    let (mut old, report) = Old::imported(A, &rows);
    for (code, numbers) in [
        ("address_part_empty", vec![id(11)]),
        ("card_dropped", vec![id(11), id(12)]),
        ("card_number_stripped", vec![id(11)]),
        ("default_card_unknown", vec![id(11)]),
    ] {
        assert_eq!(
            keys(&report, "user_billing_details", code),
            numbers,
            "{code}"
        );
    }
    assert_eq!(
        old.text(
            "SELECT string_agg(concat_ws(' ', city, jsonb_path_query_array(cards, '$[*].id')), ', '
                     ORDER BY billing_id) FROM user_billing_details"
        ),
        r#"- ["a", "b"], Pune []"#
    );
}

#[test]
fn a_card_is_kept_in_the_form_of_the_new_column() {
    let rows = (1..=3)
        .map(|number| user(A, number, &format!("{number}@example.org")))
        .collect::<String>()
        + &format!(
            r#"INSERT INTO user_billing_details (billing_id, user_id, address_line1, city, state,
                   country, zip_code, cards)
               VALUES ('{3}', '{0}', 'Road 1', 'Pune', 'MH', 'IN', '1', 'null'),
                      ('{4}', '{1}', 'Road 1', 'Pune', 'MH', 'IN', '1',
                       '[{{"id": "a", "token": "t", "brand": "\t", "last4": 4242, "exp_month": "02",
                           "exp_year": "2030", "funding": "credit"}}]'),
                      ('{5}', '{2}', 'Road 1', 'Pune', 'MH', 'IN', '1',
                       '[{{"id": "a", "token": "t", "brand": "visa", "last4": "4242", "exp_month": 2,
                           "exp_year": 2030}}]');"#,
            id(1),
            id(2),
            id(3),
            id(11),
            id(12),
            id(13),
        );
    let (mut old, report) = Old::imported(A, &rows);
    for (code, numbers) in [
        ("null_default", vec![id(11)]),
        ("card_rewritten", vec![id(12)]),
        ("card_number_stripped", vec![]),
        ("card_dropped", vec![]),
    ] {
        assert_eq!(
            keys(&report, "user_billing_details", code),
            numbers,
            "{code}"
        );
    }
    assert_eq!(
        old.text(
            "SELECT string_agg(coalesce(cards -> 0 ->> 'brand', 'none'), ', ' ORDER BY billing_id)
               FROM user_billing_details"
        ),
        "none, unknown, visa"
    );
}

#[test]
fn events_have_the_ids_of_the_gateway() {
    let rows = r#"INSERT INTO webhook_events (event_id, external_event_id, event_type,
                      payment_gateway, payload, created_at)
                  SELECT ('00000000-0000-4000-8000-00000000000' || id)::uuid, external, 'x', gateway,
                         payload::jsonb, '2199-01-01'
                    FROM (VALUES (1, 'own-1', 'stripe', '{"id": "evt_1"}'),
                                 (2, 'own-2', 'stripe', '{"id": "evt_1"}'),
                                 (3, 'own-3', 'stripe', '{"id": "evt_4"}'),
                                 (4, 'evt_4', 'stripe', '{"id": "evt_4"}'),
                                 (5, '', 'stripe', '{"id": "evt_5"}'),
                                 (6, 'pay_1', 'razorpay', '{"id": "evt_6"}'),
                                 (7, 'x', 'razorpay', '[1]')) AS events (id, external, gateway, payload)"#;
    let (mut old, report) = Old::imported(A, rows);
    for (code, numbers) in [
        ("event_id_of_payload", vec![id(1), id(5)]),
        ("event_id_of_another", vec![id(6)]),
        ("event_id_empty", vec![]),
    ] {
        assert_eq!(keys(&report, "webhook_events", code), numbers, "{code}");
    }
    assert_eq!(
        old.text("SELECT string_agg(external_event_id, ' ' ORDER BY event_id) FROM webhook_events"),
        "evt_1 own-2 own-3 evt_4 evt_5 pay_1 x"
    );
    assert_eq!(
        old.text("SELECT count(*) FROM webhook_events WHERE available_at > now()"),
        "0"
    );
}

#[test]
fn events_are_not_processed_again() {
    let rows =
        "INSERT INTO webhook_events (external_event_id, event_type, payment_gateway, processed_at,
                    payload, processing_status)
                VALUES ('1', 'x', 'stripe', current_timestamp, '{}', 'pending'),
                       ('2', 'x', 'stripe', NULL, '{}', 'processed'),
                       ('3', 'x', 'razorpay', NULL, '[1e400]', 'failed'),
                       ('', 'x', 'razorpay', NULL, '{}', NULL);";
    let (mut old, report) = Old::imported(A, rows);
    for (code, rows) in [
        ("event_processed_at", 3),
        ("event_given_up", 1),
        ("event_id_empty", 1),
        ("null_default", 1),
        ("gateway_text_wrapped", 1),
    ] {
        assert_eq!(keys(&report, "webhook_events", code).len(), rows, "{code}");
    }
    assert_eq!(
        old.text(
            "SELECT string_agg(concat_ws(' ', left(external_event_id, 1), processing_status,
                     processed_at IS NOT NULL, attempts), ', ' ORDER BY external_event_id)
               FROM webhook_events"
        ),
        "1 pending f 0, 2 processed t 0, 3 failed t 10, i pending f 0"
    );
}

#[test]
fn the_audit_log_keeps_its_words_and_numbers() {
    let rows = user(A, 1, "ada@example.org")
        + &format!(
            "INSERT INTO mcp_table (mcp_service_id, mcp_service_name, display_name, port, type)
             VALUES ('{1}', 'figma', 'Figma', 1, 'oauth');
             INSERT INTO mcp_service_table (instance_id, user_id, mcp_service_id)
             VALUES ('{2}', '{0}', '{1}');
             INSERT INTO token_audit_log (audit_id, instance_id, operation, status, metadata, created_at)
             VALUES (7, '{2}', 'refresh', 'failed', NULL, '2020-01-01'),
                    (9, '{2}', 'refresh', 'info', '{{\"a\": 1}}', '2020-01-01'),
                    (11, '{2}', '', 'success', '[1]', '2199-01-01'),
                    (13, '{2}', 'x', 'odd', '[1]', NULL);",
            id(1),
            id(2),
            id(3)
        );
    let (mut old, report) = Old::imported(A, &rows);
    for (code, numbers) in [
        ("audit_status_unknown", vec!["13", "7", "9"]),
        ("operation_empty", vec!["11"]),
        ("time_in_future", vec!["11"]),
        ("null_default", vec!["13"]),
    ] {
        assert_eq!(keys(&report, "token_audit_log", code), numbers, "{code}");
    }
    assert_eq!(
        old.text(
            "SELECT string_agg(concat_ws(' ', audit_id, operation, status, metadata), ', '
                     ORDER BY audit_id) FROM token_audit_log"
        ),
        r#"7 refresh failure, 9 refresh warning {"a": 1, "status": "info"}, 11 unknown success [1], 13 x warning {"status": "odd", "metadata": [1]}"#
    );
    assert_eq!(
        old.text("SELECT nextval(pg_get_serial_sequence('token_audit_log', 'audit_id'))"),
        "14"
    );
}

#[test]
fn the_metadata_of_the_audit_log_keep_all_they_have() {
    let rows = user(A, 1, "ada@example.org")
        + &format!(
            r#"INSERT INTO mcp_table (mcp_service_id, mcp_service_name, display_name, port, type)
               VALUES ('{1}', 'figma', 'Figma', 1, 'oauth');
               INSERT INTO mcp_service_table (instance_id, user_id, mcp_service_id)
               VALUES ('{2}', '{0}', '{1}');
               INSERT INTO token_audit_log (audit_id, instance_id, operation, status, metadata)
               VALUES (-3, '{2}', 'x', 'info', '{{"status": 200, "a": null}}'),
                      (-2, '{2}', 'x', 'info', '[{{"a": null}}]'),
                      (-1, '{2}', 'x', 'info', NULL);"#,
            id(1),
            id(2),
            id(3)
        );
    let (mut old, _) = Old::imported(A, &rows);
    assert_eq!(
        old.text("SELECT string_agg(metadata::text, ', ' ORDER BY audit_id) FROM token_audit_log"),
        r#"{"status": "info", "metadata": {"a": null, "status": 200}}, {"status": "info", "metadata": [{"a": null}]}, {"status": "info"}"#
    );
    assert_eq!(
        old.text("SELECT nextval(pg_get_serial_sequence('token_audit_log', 'audit_id'))"),
        "1"
    );
}
