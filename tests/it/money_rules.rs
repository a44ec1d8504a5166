//! What the database itself keeps of money and cards, tried with plain SQL as `app_user`.

use bruhmcp_db::enums::TransactionStatus::{self, *};
use bruhmcp_db::ids::{TransactionId, UserId};
use bruhmcp_db::models::*;
use bruhmcp_db::schema::subscription_transactions;
use bruhmcp_db::{ConstraintViolation, Isolation, retry_transaction};
use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::result::Error;

use crate::fixtures::{address, user};
use crate::support::{at_once, database};

const ALL: [TransactionStatus; 6] = [Created, Authorized, Captured, Refunded, Failed, Cancelled];

/// The constraint that the statements violate; none if they succeed. Nothing stays.
fn violated(conn: &mut PgConnection, sql: &str) -> Option<String> {
    let result = conn.transaction::<(), _, _>(|conn| {
        conn.batch_execute(sql)?;
        Err(Error::RollbackTransaction)
    });
    match result {
        Err(Error::RollbackTransaction) => None,
        Err(error) => match ConstraintViolation::of(&error) {
            Some(violation) => Some(violation.constraint),
            None => panic!("{sql}: {error}"),
        },
        Ok(()) => None,
    }
}

#[track_caller]
fn refused(conn: &mut PgConnection, sql: &str, constraint: &str) {
    assert_eq!(violated(conn, sql).as_deref(), Some(constraint), "{sql}");
}

#[track_caller]
fn accepted(conn: &mut PgConnection, sql: &str) {
    assert_eq!(violated(conn, sql), None, "{sql}");
}

/// The statement that inserts a refund.
fn refund(payment: TransactionId, user: UserId, amount: i128, status: TransactionStatus) -> String {
    format!(
        "INSERT INTO subscription_transactions
            (user_id, transaction_type, amount, net_amount, status, parent_transaction_id)
         VALUES ('{user}', 'refund', {amount}, {amount}, '{status}', '{payment}')"
    )
}

fn insert_payment(
    conn: &mut PgConnection,
    user: UserId,
    amount: i64,
    status: TransactionStatus,
) -> TransactionId {
    let id = TransactionId::new();
    conn.batch_execute(&format!(
        "INSERT INTO subscription_transactions (id, user_id, amount, net_amount, status)
         VALUES ('{id}', '{user}', {amount}, {amount}, '{status}')"
    ))
    .unwrap();
    id
}

#[test]
fn what_a_transaction_is_never_changes() {
    let database = database();
    let conn = &mut database.connect();
    let (asha, ravi) = (user(conn), user(conn));
    let payment = insert_payment(conn, asha, 100, Captured);
    let other = insert_payment(conn, asha, 100, Captured);
    let update =
        |set: &str| format!("UPDATE subscription_transactions SET {set} WHERE id = '{payment}'");
    for set in [
        format!("user_id = '{ravi}'"),
        "transaction_type = 'addon'".to_owned(),
        "amount = 101".to_owned(),
        "currency = 'USD'".to_owned(),
        format!("parent_transaction_id = '{other}'"),
    ] {
        refused(conn, &update(&set), "subscription_transactions_fixed");
    }
    accepted(
        conn,
        &update("amount = 100, net_amount = 90, fee_amount = 10"),
    );
    accepted(conn, &update("subscription_id = NULL, user_id = user_id"));
}

/// Every step from every status to every other.
#[test]
pub(crate) fn a_status_moves_forwards_only() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let steps = [
        (Created, Authorized),
        (Created, Captured),
        (Created, Failed),
        (Created, Cancelled),
        (Authorized, Captured),
        (Authorized, Failed),
        (Authorized, Cancelled),
        (Failed, Authorized),
        (Failed, Captured),
        (Captured, Refunded),
    ];
    for from in ALL {
        let payment = insert_payment(conn, user, 100, from);
        for to in ALL {
            let sql = format!(
                "UPDATE subscription_transactions SET status = '{to}' WHERE id = '{payment}'"
            );
            if from == to || steps.contains(&(from, to)) {
                accepted(conn, &sql);
            } else {
                refused(conn, &sql, "subscription_transactions_status");
            }
        }
    }
}

#[test]
fn a_refund_needs_its_payment() {
    const RULE: &str = "subscription_transactions_refund_of_parent";
    let database = database();
    let conn = &mut database.connect();
    let (asha, ravi) = (user(conn), user(conn));
    let payment = insert_payment(conn, asha, 100, Captured);
    accepted(conn, &refund(payment, asha, -1, Captured));
    refused(conn, &refund(payment, ravi, -1, Captured), RULE);
    for amount in [0, 1, i128::from(i64::MAX)] {
        refused(conn, &refund(payment, asha, amount, Captured), RULE);
    }
    refused(
        conn,
        &refund(payment, asha, -1, Captured).replace(&format!("'{payment}')"), "NULL)"),
        RULE,
    );
    let in_dollars = refund(payment, asha, -1, Captured)
        .replace("(user_id,", "(currency, user_id,")
        .replace("VALUES (", "VALUES ('USD', ");
    refused(conn, &in_dollars, RULE);

    conn.batch_execute(&refund(payment, asha, -1, Captured))
        .unwrap();
    let of_refund = format!(
        "INSERT INTO subscription_transactions
            (user_id, transaction_type, amount, net_amount, status, parent_transaction_id)
         SELECT user_id, 'refund', -1, -1, 'captured', id FROM subscription_transactions
          WHERE parent_transaction_id = '{payment}'"
    );
    refused(conn, &of_refund, RULE);
}

#[test]
fn only_a_captured_payment_is_refunded() {
    const RULE: &str = "subscription_transactions_refund_of_parent";
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    for status in ALL {
        let payment = insert_payment(conn, user, 100, status);
        for of_refund in [Created, Captured, Failed] {
            let refund = refund(payment, user, -1, of_refund);
            match status {
                Captured | Refunded => accepted(conn, &refund),
                _ => refused(conn, &refund, RULE),
            }
        }
    }
}

/// A payment is captured and fails at the same time, beside its refunds.
#[test]
fn a_payment_that_fails_meanwhile_is_not_refunded() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let mut refunded = 0;
    for round in 0..30 {
        let isolation = [
            Isolation::ReadCommitted,
            Isolation::RepeatableRead,
            Isolation::Serializable,
        ][round % 3];
        let payment = insert_payment(conn, user, 100, Authorized);
        at_once(&database, 4, |number, conn| {
            let set = |status| {
                format!(
                    "UPDATE subscription_transactions SET status = '{status}' WHERE id = '{payment}'"
                )
            };
            let statement = match number {
                0 => set(Failed),
                1 => set(Captured),
                _ => refund(payment, user, -9, Created),
            };
            let result = retry_transaction(conn, isolation, |conn| -> QueryResult<()> {
                // Its snapshot is older than its lock.
                SubscriptionTransaction::find(conn, payment)?;
                conn.batch_execute(&statement)
            });
            if let Err(error) = result {
                assert!(ConstraintViolation::of(&error).is_some(), "{error}");
            }
        });
        let refunds: i64 = subscription_transactions::table
            .filter(subscription_transactions::parent_transaction_id.eq(payment))
            .count()
            .get_result(conn)
            .unwrap();
        let status = SubscriptionTransaction::find(conn, payment)
            .unwrap()
            .unwrap()
            .status;
        assert!(
            refunds == 0 || status == Captured,
            "{refunds} of a {status} payment"
        );
        refunded += refunds;
    }
    assert!(refunded > 0, "no refund was in time");
}

#[test]
pub(crate) fn refunds_never_exceed_their_payment() {
    const RULE: &str = "subscription_transactions_refund_exceeds";
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let payment = insert_payment(conn, user, 100, Captured);
    refused(conn, &refund(payment, user, -101, Created), RULE);
    refused(
        conn,
        &refund(payment, user, i128::from(i64::MIN), Captured),
        RULE,
    );
    // In one statement and in several.
    let half = refund(payment, user, -51, Captured);
    refused(conn, &format!("{half}; {half}"), RULE);
    let row = half.split_once("VALUES ").unwrap().1;
    refused(conn, &format!("{half}, {row}"), RULE);

    // A failed refund doesn't count until it succeeds after all.
    conn.batch_execute(&refund(payment, user, -60, Failed))
        .unwrap();
    conn.batch_execute(&refund(payment, user, -60, Cancelled))
        .unwrap();
    conn.batch_execute(&refund(payment, user, -60, Created))
        .unwrap();
    refused(conn, &refund(payment, user, -41, Created), RULE);
    for status in [Authorized, Captured] {
        refused(
            conn,
            &format!(
                "UPDATE subscription_transactions SET status = '{status}'
                  WHERE transaction_type = 'refund' AND status = 'failed'"
            ),
            RULE,
        );
    }
    let fail = "UPDATE subscription_transactions SET status = 'failed' WHERE amount < 0 AND status = 'created'";
    let retry = "UPDATE subscription_transactions SET status = 'captured' WHERE id = (
        SELECT id FROM subscription_transactions WHERE status = 'failed' LIMIT 1)";
    accepted(conn, &format!("{fail}; {retry}"));
    refused(conn, &format!("{fail}; {retry}; {retry}"), RULE);
}

/// Refunds by the crate and by plain SQL, new ones and failed ones that succeed after all.
#[test]
pub(crate) fn refunds_at_once_never_exceed_their_payment() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    for isolation in [
        Isolation::ReadCommitted,
        Isolation::RepeatableRead,
        Isolation::Serializable,
    ] {
        let payment = insert_payment(conn, user, 100, Captured);
        let failed: Vec<TransactionId> = (0..16)
            .map(|_| {
                let id = TransactionId::new();
                let failed = refund(payment, user, -9, Failed)
                    .replace("(user_id,", "(id, user_id,")
                    .replace("VALUES (", &format!("VALUES ('{id}', "));
                conn.batch_execute(&failed).unwrap();
                id
            })
            .collect();
        at_once(&database, 16, |number, conn| {
            let statement = match number % 3 {
                0 => Some(refund(payment, user, -9, Created)),
                1 => Some(format!(
                    "UPDATE subscription_transactions SET status = 'captured' WHERE id = '{}'",
                    failed[number]
                )),
                _ => None,
            };
            let id = format!("rfnd_{isolation:?}_{number}");
            loop {
                let result =
                    retry_transaction(conn, isolation, |conn| -> Result<(), PaymentError> {
                        // Its snapshot is older than its lock.
                        SubscriptionTransaction::find(conn, payment)?;
                        match &statement {
                            Some(statement) => conn.batch_execute(statement)?,
                            None => {
                                let refund = NewRefund::new(&id, 9);
                                SubscriptionTransaction::refund(conn, payment, &refund)?;
                            }
                        }
                        Ok(())
                    });
                match result {
                    Ok(()) | Err(PaymentError::ExceedsPayment { refundable: 1 }) => return,
                    Err(error) if bruhmcp_db::is_transient(&error) => {}
                    Err(PaymentError::Database(error)) => {
                        let violation = ConstraintViolation::of(&error);
                        let violation = violation.unwrap_or_else(|| panic!("{error}"));
                        assert!(violation.is("subscription_transactions_refund_exceeds"));
                        return;
                    }
                    Err(error) => panic!("{error:?}"),
                }
            }
        });
        let left = database.psql(&format!(
            "SELECT sum(amount) FROM subscription_transactions
              WHERE '{payment}' IN (id, parent_transaction_id) AND status <> 'failed'"
        ));
        assert_eq!(left.unwrap(), "1\n", "{isolation:?}");
    }
}

#[test]
fn amounts_and_rates_are_plausible() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    insert_payment(conn, user, 100, Captured);
    let update = |set: &str| format!("UPDATE subscription_transactions SET {set}");
    for rate in ["0", "'NaN'", "-1"] {
        refused(
            conn,
            &update(&format!("exchange_rate = {rate}")),
            "subscription_transactions_exchange_rate_check",
        );
    }
    let rule = "subscription_transactions_net_amount_check";
    refused(conn, &update("net_amount = 101"), rule);
    refused(conn, &update("net_amount = -1"), rule);
    accepted(conn, &update("net_amount = 0, exchange_rate = 0.00000001"));
}

#[test]
fn what_a_credit_is_never_changes() {
    let database = database();
    let conn = &mut database.connect();
    let (asha, ravi) = (user(conn), user(conn));
    conn.batch_execute(&format!(
        "INSERT INTO account_credits (user_id, amount, source_type, source_id)
         VALUES ('{asha}', 100, 'promotion', 'diwali')"
    ))
    .unwrap();
    let rule = "account_credits_fixed";
    for set in [
        &format!("user_id = '{ravi}'"),
        "amount = 101",
        "currency = 'USD'",
        "source_type = 'adjustment'",
        "source_type = NULL",
        "source_id = NULL",
        "source_id = 'holi'",
    ] {
        refused(conn, &format!("UPDATE account_credits SET {set}"), rule);
    }
    accepted(
        conn,
        "UPDATE account_credits SET description = 'x', expires_at = now()",
    );
    conn.batch_execute("UPDATE account_credits SET is_used = true, used_at = now()")
        .unwrap();
    for set in [
        "is_used = false, used_at = NULL",
        "is_used = false",
        "used_at = NULL",
        "used_at = used_at + interval '1 second'",
    ] {
        refused(conn, &format!("UPDATE account_credits SET {set}"), rule);
    }
    accepted(
        conn,
        "UPDATE account_credits SET description = NULL, is_used = true",
    );
}

const CARD: &str = r#"{"id": "one", "token": "token_1", "brand": "visa", "last4": "4242",
    "exp_month": 12, "exp_year": 2030}"#;

fn set_cards(cards: &str) -> String {
    format!("UPDATE user_billing_details SET cards = '{cards}'")
}

fn billed(conn: &mut PgConnection) -> UserId {
    let user = user(conn);
    UserBillingDetails::upsert(conn, &address(user)).unwrap();
    user
}

/// A value of each kind in the place of each value of a card. What the database accepts, the crate
/// reads.
#[test]
fn each_accepted_card_can_be_read() {
    const RULE: &str = "user_billing_details_no_card_secrets";
    let odd = [
        "null",
        "true",
        "0",
        "1",
        "-1",
        "12",
        "12.0",
        "1.2e1",
        "1e0",
        "1.5",
        "13",
        "255",
        "256",
        "999",
        "1000",
        "9999",
        "9999.0",
        "10000",
        "65536",
        "1e400",
        "-1e400",
        "1e-400",
        r#""""#,
        r#"" ""#,
        r#""a""#,
        r#""12""#,
        r#""4242""#,
        r#""4242\n""#,
        r#""424""#,
        r#""42424""#,
        r#""٤٢٤٢""#,
        r#""\"exp_month\": 1.0""#,
        r#""2030""#,
        "[]",
        r#"["a"]"#,
        r#"["4242"]"#,
        "[1]",
        "{}",
        r#"{"id": "a"}"#,
        r#""\u0001\ud83d\ude00\\\/""#,
    ];
    let database = database();
    let conn = &mut database.connect();
    let user = billed(conn);
    let fields = ["id", "token", "brand", "last4", "exp_month", "exp_year"];
    let mut card: serde_json::Map<String, serde_json::Value> = serde_json::from_str(CARD).unwrap();
    card.insert("id".into(), "other".into());
    let mut accepted = Vec::new();
    for field in fields {
        for value in odd {
            let parts = card.iter().map(|(key, usual)| {
                let value = if key == field {
                    value
                } else {
                    &usual.to_string()
                };
                format!("\"{key}\": {value}")
            });
            let cards = format!("[{CARD}, {{{}}}]", parts.collect::<Vec<_>>().join(", "));
            match violated(conn, &set_cards(&cards)) {
                Some(constraint) => assert_eq!(constraint, RULE, "{field}: {value}"),
                None => {
                    conn.batch_execute(&set_cards(&cards)).unwrap();
                    let read = UserBillingDetails::find_by_user(conn, user);
                    let read = read.unwrap_or_else(|error| panic!("{field}: {value}: {error}"));
                    assert_eq!(read.unwrap().cards.len(), 2);
                    accepted.push(format!("{field}: {value}"));
                }
            }
        }
    }
    for usual in [
        r#"id: "a""#,
        r#"brand: "\"exp_month\": 1.0""#,
        r#"last4: "4242""#,
        "exp_month: 1",
        "exp_month: 1e0",
        "exp_month: 12",
        "exp_year: 1000",
        "exp_year: 9999",
    ] {
        assert!(accepted.iter().any(|one| one == usual), "{usual}");
    }
    for array in [
        "[null]",
        "[1]",
        "[\"a\"]",
        "[[]]",
        "[{}]",
        &format!("[[{CARD}]]"),
    ] {
        refused(conn, &set_cards(array), RULE);
    }
    refused(conn, &set_cards(CARD), "user_billing_details_cards_check");
    refused(
        conn,
        &set_cards(&format!("[{CARD}, {CARD}]")),
        "user_billing_details_unique_card_ids",
    );
    for field in fields {
        let mut card = card.clone();
        card.remove(field);
        let cards = serde_json::Value::from(vec![serde_json::Value::from(card)]).to_string();
        refused(conn, &set_cards(&cards), RULE);
    }
    for more in ["card_number", "pan", "cvv2", "network", "id ", "", "ID"] {
        let cards = format!(
            "[{}]",
            CARD.replacen('{', &format!("{{\"{more}\": null,"), 1)
        );
        refused(conn, &set_cards(&cards), RULE);
    }
}

/// Texts with a card number.
const NUMBERS: [&str; 11] = [
    "4242424242424242",
    "token_4242424242424242",
    "x4242424242424242x",
    "4222222222222",
    "4000000000000000000",
    "4242 4242 4242 4242",
    "4242-4242-4242-4242",
    "visa 4242 4242 4242 4242",
    "4242 4242 4242 4242 visa",
    "378282246310005",
    "3782-822463-10005",
];

/// Texts that look similar and are none.
const NOT_NUMBERS: [&str; 12] = [
    "",
    "4242",
    "424242424242",
    "42424242424242424242",
    "1700000000000",
    "0.4242424242424242",
    "12345678-1234-4234-8234-223456789012",
    "550e8400-e29b-41d4-a716-446655440000",
    "token_JDyhjBFJjQ1eoO",
    "74119663031031075351326",
    "+91 98765 43210",
    "2024-01-01 10:30:45 +0530",
];

#[test]
pub(crate) fn a_card_number_is_refused_wherever_it_is() {
    let database = database();
    let conn = &mut database.connect();
    let user = billed(conn);
    insert_payment(conn, user, 100, Captured);
    let details =
        |json: &str| format!("UPDATE subscription_transactions SET method_details_json = '{json}'");
    let in_cards = "user_billing_details_no_card_secrets";
    let in_details = "subscription_transactions_no_card_secrets";
    let with_token = |token: &str| set_cards(&format!("[{}]", CARD.replace("token_1", token)));
    let shapes = |text: &str| {
        [
            format!(r#""{text}""#),
            format!(r#"{{"card": {{"a": "{text}", "b": 1}}}}"#),
            format!(r#"[["{text}"]]"#),
            format!(r#"{{"{text}": 1}}"#),
        ]
    };
    for text in NUMBERS {
        refused(conn, &with_token(text), in_cards);
        for json in shapes(text) {
            refused(conn, &details(&json), in_details);
        }
    }
    for text in NOT_NUMBERS {
        if !text.is_empty() {
            accepted(conn, &with_token(text));
        }
        for json in shapes(text) {
            accepted(conn, &details(&json));
        }
    }
    for number in ["4242424242424242", "4222222222222", "[4242424242424242]"] {
        refused(conn, &details(number), in_details);
    }
    for key in [
        "number",
        "pan",
        "PAN",
        "card_number",
        "cardNumber",
        "card-number",
        "cvv",
        "CVC",
        "cvv2",
        "cvc2",
        "card_cvc",
        "csc",
        "security_code",
        "verification value",
    ] {
        refused(
            conn,
            &details(&format!(r#"{{"a": [{{"{key}": null}}]}}"#)),
            in_details,
        );
    }
    accepted(
        conn,
        &details(
            r#"{"card": {"id": "card_JXPULjlKqC5j0i", "last4": "4242", "network": "Visa", "bin": "424242",
                "emi": false}, "acquirer_data": {"rrn": "303107535132", "auth_code": "064381"}, "vpa": "a@bank",
                "bank": "HDFC", "created_at": 1700000000, "ms": 1700000000000, "rate": 0.4242424242424242}"#,
        ),
    );
}

/// The crate refuses it first: what the server refuses is in the server's log.
#[test]
fn a_card_number_does_not_reach_the_server() {
    let database = database();
    let conn = &mut database.connect();
    let user = billed(conn);
    let payment = insert_payment(conn, user, 100, Created);
    let mut tried = |text: &str| {
        let number = text
            .parse()
            .ok()
            .map(|number: u64| serde_json::json!([number]));
        let details = [
            serde_json::json!(text),
            serde_json::json!({"a": [{"b": text}]}),
            serde_json::json!({text: null}),
        ];
        let details: Vec<_> = details.into_iter().chain(number).collect();
        let outcomes = details.iter().map(|details| {
            let new = NewSubscriptionTransaction {
                razorpay_payment_id: Some("pay_1"),
                method_details_json: Some(details),
                ..NewSubscriptionTransaction::new(user, 100, 100, Created)
            };
            let recorded = SubscriptionTransaction::record_payment(conn, &new);
            let changes = SubscriptionTransactionChangeset {
                method_details_json: Some(Some(details)),
                ..Default::default()
            };
            let advanced = SubscriptionTransaction::advance(conn, payment, Created, &changes);
            let secret = matches!(advanced, Err(PaymentError::CardSecret));
            assert!(secret || matches!(advanced, Err(PaymentError::Conflict(_))));
            match recorded {
                Err(PaymentError::CardSecret) => secret,
                Ok(_) => {
                    let delete =
                        "DELETE FROM subscription_transactions WHERE razorpay_payment_id = 'pay_1'";
                    database.psql(delete).unwrap();
                    assert!(!secret, "{details}");
                    false
                }
                Err(error) => panic!("{details}: {error:?}"),
            }
        });
        let outcomes: Vec<bool> = outcomes.collect();
        let card = serde_json::from_str::<Card>(&CARD.replace("token_1", text)).unwrap();
        let card = UserBillingDetails::add_card(conn, user, &card);
        (
            outcomes,
            matches!(card, Err(BillingError::InvalidCard("token"))),
        )
    };
    for text in NUMBERS {
        let (outcomes, card) = tried(text);
        assert!(
            card && outcomes.iter().all(|refused| *refused),
            "{text}: {outcomes:?}"
        );
    }
    for text in NOT_NUMBERS {
        let (outcomes, card) = tried(text);
        assert_eq!(card, text.is_empty(), "{text}");
        assert!(!outcomes.contains(&true), "{text}: {outcomes:?}");
    }
    for key in ["cvv", "Card_Number", "verification-value"] {
        let (outcomes, _) = tried(key);
        assert_eq!(outcomes, [false, false, true], "{key}");
    }
}

#[test]
pub(crate) fn the_default_card_is_one_of_the_cards() {
    const RULE: &str = "user_billing_details_default_card";
    let database = database();
    let conn = &mut database.connect();
    billed(conn);
    let default = |id: &str| format!("UPDATE user_billing_details SET default_card_id = {id}");
    refused(conn, &default("'one'"), RULE);
    conn.batch_execute(&set_cards(&format!("[{CARD}]")))
        .unwrap();
    refused(conn, &default("'visa'"), RULE);
    refused(conn, &default("''"), RULE);
    conn.batch_execute(&default("'one'")).unwrap();
    refused(conn, &set_cards("[]"), RULE);
    accepted(conn, &default("NULL"));
}

/// Each value at the edge of what is accepted is read; the next one is refused.
#[test]
fn each_accepted_time_and_document_can_be_read() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let payment = insert_payment(conn, user, 100, Captured);
    let mut set = |column: &str, value: &str| {
        let sql = format!("UPDATE subscription_transactions SET {column} = {value}");
        let violated = violated(conn, &sql);
        if violated.is_none() {
            conn.batch_execute(&sql).unwrap();
            SubscriptionTransaction::find(conn, payment)
                .unwrap_or_else(|error| panic!("{value}: {error}"));
        }
        violated
    };
    for time in ["0001-01-01 00:00:00+00", "9999-12-31 23:59:59.999999+00"] {
        for column in ["processed_at", "settled_at", "refunded_at", "created_at"] {
            assert_eq!(set(column, &format!("'{time}'")), None);
        }
    }
    for time in [
        "infinity",
        "-infinity",
        "10000-01-01 00:00:00+00",
        "294276-12-31 23:59:59+00",
        "0001-12-31 23:59:59+00 BC",
        "4713-01-01 00:00:00+00 BC",
    ] {
        for column in ["processed_at", "settled_at", "refunded_at", "created_at"] {
            let rule = "subscription_transactions_timestamps_check";
            assert_eq!(
                set(column, &format!("'{time}'")).as_deref(),
                Some(rule),
                "{time}"
            );
        }
    }
    let nested = |levels: usize| format!("'{}1{}'", "[".repeat(levels), "]".repeat(levels));
    for column in ["method_details_json", "gateway_response_json"] {
        let fits = [
            "'1e308'",
            "'[-1e308]'",
            "'{\"a\": \"1e400\"}'",
            "'null'",
            &nested(99),
        ];
        for json in fits {
            assert_eq!(set(column, json), None, "{json}");
        }
        let rule = format!("subscription_transactions_{column}_check");
        for json in [
            "'1.1e308'",
            "'[[{\"a\": -1e400}]]'",
            &nested(100),
            &nested(500),
        ] {
            assert_eq!(set(column, json).as_deref(), Some(&*rule), "{json}");
        }
    }
}
