//! What the database itself keeps of money and cards, tried with plain SQL as `app_user`.

use bruhmcp_db::enums::TransactionStatus::{self, *};
use bruhmcp_db::ids::{TransactionId, UserId};
use bruhmcp_db::models::*;
use bruhmcp_db::{ConstraintViolation, Isolation, retry_transaction};
use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::result::Error;

use crate::fixtures::user;
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
fn a_status_moves_forwards_only() {
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
fn refunds_never_exceed_their_payment() {
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
fn refunds_at_once_never_exceed_their_payment() {
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
