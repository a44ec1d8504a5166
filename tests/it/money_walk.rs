//! Random statements of several connections at once, as `app_user`, against the rules of money.

use std::collections::BTreeSet;

use bruhmcp_db::ids::UserId;
use bruhmcp_db::models::{NewUser, User};
use bruhmcp_db::{ConstraintViolation, is_transient};
use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::result::Error;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use uuid::Uuid;

use crate::support::{TestDatabase, at_once, database};

const CONNECTIONS: usize = 4;
/// Of each connection.
const STATEMENTS: usize = 500;
/// The statements of connection `n` are made from this seed plus `n`.
const SEED: u8 = 1;

/// Rows have numbers, of which their ids are made. Refunds are numbered after payments, which are
/// few: a payment has several refunds, and connections meet at it.
const PAYMENTS: u128 = 20;
const REFUNDS: u128 = 200;
const CREDITS: u128 = 40;
const SUBSCRIPTIONS: u128 = 40;

const TRANSACTION_STATUSES: [&str; 6] = [
    "created",
    "authorized",
    "captured",
    "refunded",
    "failed",
    "cancelled",
];
const SUBSCRIPTION_STATUSES: [&str; 10] = [
    "created",
    "authenticated",
    "active",
    "past_due",
    "cancelled",
    "completed",
    "paused",
    "halted",
    "upgraded",
    "replaced",
];

/// Each rule that the walk must meet.
const RULES: [&str; 6] = [
    "account_credits_fixed",
    "subscription_transactions_fixed",
    "subscription_transactions_refund_exceeds",
    "subscription_transactions_refund_of_parent",
    "subscription_transactions_status",
    "user_subscriptions_status_final",
];

/// What each accepted change made of a row, in the order of the changes to that row: a change is
/// entered while the row is locked. The owner's, without triggers.
const WITNESS: &str = "
    CREATE TABLE witness (
        entry   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        kind    text NOT NULL,
        row_id  uuid NOT NULL,
        fixed   text NOT NULL,
        state   text NOT NULL
    );
    GRANT INSERT ON witness TO PUBLIC";

/// What the walk must not leave behind, and the query that finds it.
const FAULTS: [(&str, &str); 6] = [
    (
        "refunds exceed their payment",
        "SELECT payment.id, payment.amount, sum(refund.amount)
           FROM subscription_transactions payment
           JOIN subscription_transactions refund ON refund.parent_transaction_id = payment.id
          WHERE refund.status NOT IN ('failed', 'cancelled')
          GROUP BY payment.id HAVING -sum(refund.amount) > payment.amount",
    ),
    (
        "a refund is of no captured payment of its user and currency",
        "SELECT refund.id, payment.id, payment.status
           FROM subscription_transactions refund
           LEFT JOIN subscription_transactions payment ON payment.id = refund.parent_transaction_id
          WHERE refund.transaction_type = 'refund'
            AND (
                payment.status IN ('captured', 'refunded') AND payment.transaction_type <> 'refund'
                AND (payment.user_id, payment.currency) = (refund.user_id, refund.currency)
                AND refund.amount < 0
            ) IS NOT TRUE",
    ),
    (
        "what is fixed changed",
        "SELECT kind, row_id, array_agg(DISTINCT fixed)
           FROM witness GROUP BY kind, row_id HAVING count(DISTINCT fixed) > 1",
    ),
    (
        "a transaction's status moved backwards",
        "SELECT row_id, before, state
           FROM (SELECT *, lag(state) OVER (PARTITION BY row_id ORDER BY entry) AS before
                   FROM witness WHERE kind = 'transaction') steps
          WHERE before <> state AND (before, state) NOT IN (
                ('created', 'authorized'), ('created', 'captured'), ('created', 'failed'),
                ('created', 'cancelled'), ('authorized', 'captured'), ('authorized', 'failed'),
                ('authorized', 'cancelled'), ('failed', 'authorized'), ('failed', 'captured'),
                ('captured', 'refunded'))",
    ),
    (
        "a used credit changed",
        "SELECT row_id, before, state
           FROM (SELECT *, lag(state) OVER (PARTITION BY row_id ORDER BY entry) AS before
                   FROM witness WHERE kind = 'credit') steps
          WHERE before <> state AND before <> 'unused'",
    ),
    (
        "a subscription left a final status",
        "SELECT row_id, before, state
           FROM (SELECT *, lag(state) OVER (PARTITION BY row_id ORDER BY entry) AS before
                   FROM witness WHERE kind = 'subscription') steps
          WHERE before <> state AND before IN ('completed', 'upgraded', 'replaced')",
    ),
];

/// Rows that are not what the witness saw last; none, or the other queries prove nothing.
const UNSEEN: &str = "
    WITH seen AS (
        SELECT DISTINCT ON (kind, row_id) kind, row_id, fixed, state
          FROM witness ORDER BY kind, row_id, entry DESC
    ), are AS (
        SELECT 'transaction' AS kind, id,
               (user_id, transaction_type, amount, currency, parent_transaction_id)::text AS fixed,
               status::text AS state
          FROM subscription_transactions
         UNION ALL
        SELECT 'credit', id, (user_id, amount, currency, source_type, source_id)::text,
               COALESCE(used_at::text, 'unused')
          FROM account_credits
         UNION ALL
        SELECT 'subscription', id, '', status::text FROM user_subscriptions
    )
    SELECT * FROM seen FULL JOIN are ON are.kind = seen.kind AND id = row_id
     WHERE (seen.fixed, seen.state) IS DISTINCT FROM (are.fixed, are.state)";

/// The statement, with an entry in the witness for each row that it changes.
fn witnessed(statement: &str) -> String {
    let entry = if statement.contains("subscription_transactions") {
        "'transaction', id,
         (user_id, transaction_type, amount, currency, parent_transaction_id)::text, status"
    } else if statement.contains("account_credits") {
        "'credit', id, (user_id, amount, currency, source_type, source_id)::text,
         COALESCE(used_at::text, 'unused')"
    } else {
        "'subscription', id, '', status"
    };
    format!(
        "WITH changed AS ({statement} RETURNING *)
         INSERT INTO witness (kind, row_id, fixed, state) SELECT {entry} FROM changed"
    )
}

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

/// One of three users.
fn user(number: u128) -> Uuid {
    id(1 + number % 3)
}

/// Of a payment and its refunds.
fn currency(number: u128) -> &'static str {
    ["INR", "USD"][usize::from(number % 2 == 1)]
}

fn payment() -> BoxedStrategy<String> {
    let types = prop_oneof![
        4 => Just("subscription"),
        1 => select(&["addon", "adjustment", "fee"][..]),
    ];
    let statuses = prop_oneof![1 => Just("captured"), 1 => select(&TRANSACTION_STATUSES[..])];
    (0..PAYMENTS, types, 1..=300_i64, statuses, on_conflict())
        .prop_map(|(number, of_type, amount, status, on_conflict)| {
            format!(
                "INSERT INTO subscription_transactions
                    (id, user_id, currency, transaction_type, amount, net_amount, status)
                 VALUES ('{}', '{}', '{}', '{of_type}', {amount}, {amount}, '{status}')
                 {on_conflict}",
                id(number),
                user(number),
                currency(number),
            )
        })
        .boxed()
}

/// Mostly one that the payment allows, if it is captured.
fn refund() -> BoxedStrategy<String> {
    let amounts = prop_oneof![15 => -60..0_i64, 1 => 0..3_i64, 1 => Just(i64::MIN)];
    let payer = prop_oneof![9 => Just(0_u128), 1 => 1..4_u128];
    (
        PAYMENTS..PAYMENTS + REFUNDS,
        // Some are of a refund.
        0..PAYMENTS + 5,
        payer,
        amounts,
        select(&TRANSACTION_STATUSES[..]),
        on_conflict(),
    )
        .prop_map(|(number, payment, other, amount, status, on_conflict)| {
            format!(
                "INSERT INTO subscription_transactions
                    (id, user_id, currency, transaction_type, amount, net_amount, status,
                     parent_transaction_id)
                 VALUES ('{}', '{}', '{}', 'refund', {amount}, {amount}, '{status}', '{}')
                 {on_conflict}",
                id(number),
                user(payment + other),
                currency(payment + other / 2),
                id(payment),
            )
        })
        .boxed()
}

fn on_conflict() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        4 => Just(""),
        1 => select(&[
            "ON CONFLICT (id) DO UPDATE SET status = EXCLUDED.status",
            "ON CONFLICT (id) DO UPDATE SET amount = EXCLUDED.amount, net_amount = 0",
            "ON CONFLICT (id) DO UPDATE SET parent_transaction_id = EXCLUDED.parent_transaction_id",
        ][..]),
    ]
}

fn transaction_update() -> BoxedStrategy<String> {
    let numbers = || prop_oneof![0..PAYMENTS, PAYMENTS..PAYMENTS + REFUNDS];
    let fixed = (numbers(), 0..6_u8).prop_map(|(number, column)| match column {
        0 => format!("user_id = '{}'", user(number)),
        1 => "transaction_type = 'fee', parent_transaction_id = NULL".to_owned(),
        2 => "amount = amount / 2 - 1".to_owned(),
        3 => "currency = 'EUR'".to_owned(),
        4 => format!("parent_transaction_id = '{}'", id(number)),
        _ => "description = 'x', retry_count = retry_count + 1".to_owned(),
    });
    let status = || select(&TRANSACTION_STATUSES[..]).prop_map(|to| format!("status = '{to}'"));
    let set = prop_oneof![
        3 => status(),
        1 => fixed.clone(),
        1 => (fixed, status()).prop_map(|(one, other)| format!("{one}, {other}")),
    ];
    let rows = prop_oneof![
        4 => numbers().prop_map(|number| format!("id = '{}'", id(number))),
        1 => (0..PAYMENTS, select(&TRANSACTION_STATUSES[..])).prop_map(|(number, status)| {
            format!("parent_transaction_id = '{}' AND status = '{status}'", id(number))
        }),
    ];
    (set, rows)
        .prop_map(|(set, rows)| format!("UPDATE subscription_transactions SET {set} WHERE {rows}"))
        .boxed()
}

fn credit() -> BoxedStrategy<String> {
    let source = select(&["'promotion'", "'refund'", "'downgrade'", "NULL"][..]);
    let insert = (0..CREDITS, -20..80_i64, source).prop_map(|(number, amount, source)| {
        format!(
            "INSERT INTO account_credits (id, user_id, amount, currency, source_type, source_id)
             VALUES ('{}', '{}', {amount}, '{}', {source}, '{}')",
            id(number),
            user(number),
            currency(number),
            number / 2,
        )
    });
    let set = select(
        &[
            "is_used = true, used_at = now()",
            "is_used = true, used_at = now()",
            "is_used = false, used_at = NULL",
            "amount = amount + 1",
            "currency = 'EUR'",
            "source_id = 'other'",
            "source_type = 'adjustment'",
            "expires_at = now()",
        ][..],
    );
    let update = (0..CREDITS, set).prop_map(|(number, set)| {
        let id = id(number);
        format!("UPDATE account_credits SET {set} WHERE id = '{id}'")
    });
    prop_oneof![1 => insert, 2 => update].boxed()
}

fn subscription() -> BoxedStrategy<String> {
    let change = (0..SUBSCRIPTIONS, select(&SUBSCRIPTION_STATUSES[..]));
    let insert = change.clone().prop_map(|(number, status)| {
        format!(
            "INSERT INTO user_subscriptions (id, user_id, status, cancelled_at)
             VALUES ('{}', '{}', '{status}', now())",
            id(number),
            user(number),
        )
    });
    let update = change.prop_map(|(number, status)| {
        let id = id(number);
        format!("UPDATE user_subscriptions SET status = '{status}' WHERE id = '{id}'")
    });
    prop_oneof![1 => insert, 2 => update].boxed()
}

#[derive(Debug, Clone, Copy)]
enum Isolation {
    ReadCommitted,
    RepeatableRead,
    Serializable,
}

/// Some statements of one transaction.
#[derive(Debug, Clone)]
struct Transaction {
    isolation: Isolation,
    statements: Vec<String>,
    commits: bool,
}

fn transaction() -> impl Strategy<Value = Transaction> {
    let isolation = select(
        &[
            Isolation::ReadCommitted,
            Isolation::RepeatableRead,
            Isolation::Serializable,
        ][..],
    );
    let statement = prop_oneof![
        3 => payment(),
        6 => refund(),
        6 => transaction_update(),
        3 => credit(),
        3 => subscription(),
    ];
    (isolation, vec(statement, 1..4), prop::bool::weighted(0.9)).prop_map(
        |(isolation, statements, commits)| Transaction {
            isolation,
            statements,
            commits,
        },
    )
}

/// Adds the rules that refuse a statement; the others stay.
fn run(
    conn: &mut PgConnection,
    transaction: &Transaction,
    rules: &mut BTreeSet<String>,
) -> QueryResult<()> {
    let builder = conn.build_transaction();
    let mut builder = match transaction.isolation {
        Isolation::ReadCommitted => builder.read_committed(),
        Isolation::RepeatableRead => builder.repeatable_read(),
        Isolation::Serializable => builder.serializable(),
    };
    builder.run(|conn| {
        for statement in &transaction.statements {
            let statement = witnessed(statement);
            if let Err(error) = conn.transaction(|conn| conn.batch_execute(&statement)) {
                let Some(violation) = ConstraintViolation::of(&error) else {
                    return Err(error);
                };
                rules.insert(violation.constraint);
            }
        }
        if transaction.commits {
            Ok(())
        } else {
            Err(Error::RollbackTransaction)
        }
    })
}

/// Returns the rules that have refused a statement.
fn walk(database: &TestDatabase) -> BTreeSet<String> {
    let conn = &mut database.connect();
    for number in 0..3 {
        let email = format!("asha{number}@example.com");
        let new = NewUser {
            id: Some(UserId::from(user(number))),
            ..NewUser::new("Asha", "", &email)
        };
        User::sign_up(conn, &new).unwrap();
    }
    let owner = &mut database.connect_as_owner();
    owner.batch_execute(WITNESS).unwrap();

    let rules = at_once(database, CONNECTIONS, |connection, conn| {
        let seed = SEED + u8::try_from(connection).unwrap();
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32]);
        let mut runner = TestRunner::new_with_rng(Config::default(), rng);
        let transactions = transaction();
        let (mut rules, mut statements) = (BTreeSet::new(), 0);
        while statements < STATEMENTS {
            let transaction = transactions.new_tree(&mut runner).unwrap().current();
            statements += transaction.statements.len();
            match run(conn, &transaction, &mut rules) {
                Ok(()) | Err(Error::RollbackTransaction) => {}
                Err(error) if is_transient(&error) => {}
                Err(error) => panic!("seed {seed}, {transaction:?}: {error}"),
            }
        }
        rules
    });
    rules.into_iter().flatten().collect()
}

fn faults(database: &TestDatabase) -> Vec<(&'static str, String)> {
    assert_eq!(database.psql(UNSEEN).unwrap(), "", "seed {SEED}");
    let found = FAULTS.map(|(fault, query)| (fault, database.psql(query).unwrap()));
    found
        .into_iter()
        .filter(|(_, rows)| !rows.is_empty())
        .collect()
}

#[test]
fn no_walk_breaks_a_rule_of_money() {
    let database = database();
    let rules = walk(&database);
    let faults = faults(&database);
    assert!(faults.is_empty(), "seed {SEED}: {faults:?}");
    for rule in RULES {
        assert!(rules.contains(rule), "seed {SEED}: {rule} refused nothing");
    }
}

/// The walk would notice a rule that is missing.
#[test]
fn without_the_triggers_a_walk_breaks_each_rule_of_money() {
    let database = database();
    let owner = &mut database.connect_as_owner();
    owner
        .batch_execute(
            "DROP TRIGGER subscription_transactions_fixed ON subscription_transactions;
             DROP TRIGGER subscription_transactions_status ON subscription_transactions;
             DROP TRIGGER subscription_transactions_refund_insert ON subscription_transactions;
             DROP TRIGGER subscription_transactions_refund_update ON subscription_transactions;
             DROP TRIGGER account_credits_fixed ON account_credits;
             DROP TRIGGER user_subscriptions_status_final ON user_subscriptions",
        )
        .unwrap();
    walk(&database);
    let found: Vec<_> = faults(&database)
        .into_iter()
        .map(|(fault, _)| fault)
        .collect();
    assert_eq!(found, FAULTS.map(|(fault, _)| fault), "seed {SEED}");
}
