//! Comparing the archive with the new tables.

use diesel::pg::PgConnection;
use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::{Array, BigInt, Binary, Nullable, Text, Uuid as SqlUuid};
use serde::Serialize;
use uuid::Uuid;

use crate::error::ImportError;
use crate::run::{self, Run};
use crate::stage::{self, BATCH};
use crate::tables::{Kind, TABLES, Table};
use crate::{NewSystem, SecretColumn, quoted};

/// What a comparison found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What differs; empty if nothing does.
    pub differences: Vec<Difference>,
    /// The money on both sides, by table and currency.
    pub money: Vec<Money>,
}

impl Check {
    /// Returns whether nothing differs.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.differences.is_empty()
    }
}

/// Something that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The rule that does not hold, after the name of the table.
    pub what: String,
    /// Number of rows, or of users.
    pub rows: i64,
    /// At most three keys.
    pub keys: Vec<String>,
}

/// Sums of amounts, in minor units of the currency (paise). `now` is `archive` less `left_behind`,
/// and `negated`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, QueryableByName)]
pub struct Money {
    /// Payments or credits.
    #[diesel(sql_type = Text)]
    pub table: String,
    /// Currency in capitals, also one that was left behind.
    #[diesel(sql_type = Text)]
    pub currency: String,
    /// In the archive, as written there.
    #[diesel(sql_type = BigInt)]
    pub archive: i64,
    /// In rows that were left behind.
    #[diesel(sql_type = BigInt)]
    pub left_behind: i64,
    /// What changed by giving refunds their sign.
    #[diesel(sql_type = BigInt)]
    pub negated: i64,
    /// In the new table.
    #[diesel(sql_type = BigInt)]
    pub now: i64,
}

#[derive(QueryableByName)]
struct Found {
    #[diesel(sql_type = BigInt)]
    rows: i64,
    #[diesel(sql_type = Array<Text>)]
    keys: Vec<String>,
}

/// Compares the archive with the new tables after an import: that each row is there or was rejected,
/// and nothing else is; each value; the money of each user and currency; the plan and the active
/// instances of each user; the counters of the registry; and that every credential opens. Call it
/// before the new backend starts, which changes the rows.
///
/// Writes nothing: it works in a transaction that it rolls back.
///
/// # Errors
/// [`ImportError::NotImported`], and those of [`preflight`](crate::preflight).
pub fn check(conn: &mut PgConnection, system: &dyn NewSystem) -> Result<Check, ImportError> {
    let run = Run::find(conn)?.filter(|run| run.is_finished);
    let run = run.ok_or(ImportError::NotImported)?;
    let options = run.options().ok_or(ImportError::NotImported)?;
    run::rolled_back(conn, |conn| {
        let archive = run::look(conn, &options)?;
        stage::stage(conn, system, &options, &archive, Some(&run.began_at))?;
        compare(conn, system)
    })
}

fn compare(conn: &mut PgConnection, system: &dyn NewSystem) -> Result<Check, ImportError> {
    let failed = || ImportError::database("comparing");
    let mut differences = Vec::new();
    let mut look_for = |conn: &mut PgConnection, what: &str, query: &str| {
        let found: Found = sql_query(format!(
            "SELECT count(*) AS rows,
                    coalesce(array_agg(key) FILTER (WHERE place <= 3), '{{}}') AS keys
               FROM (SELECT key, row_number() OVER () AS place FROM ({query}) AS found) AS found"
        ))
        .get_result(conn)
        .map_err(failed())?;
        if found.rows != 0 {
            differences.push(Difference {
                what: what.to_owned(),
                rows: found.rows,
                keys: found.keys,
            });
        }
        Ok::<_, ImportError>(())
    };
    for table in TABLES.iter().filter(|table| table.name != "auth_tokens") {
        for (what, query) in of_rows(table) {
            look_for(conn, &format!("{}: {what}", table.name), &query)?;
        }
    }
    look_for(
        conn,
        "auth_tokens: rows, which no import writes",
        "SELECT id::text AS key FROM auth_tokens",
    )?;
    for (what, query) in OF_ALL {
        look_for(conn, what, query)?;
    }
    let unequal = format!(
        "SELECT user_id || ' ' || currency AS key FROM ({MONEY}) AS money
          GROUP BY of, user_id, currency
         HAVING sum(archive) - sum(left_behind) + sum(negated) <> sum(now)"
    );
    look_for(
        conn,
        "money of a user that no conversion explains",
        &unequal,
    )?;
    let money = sql_query(format!(
        "SELECT of AS table, currency, sum(archive)::bigint AS archive,
                sum(left_behind)::bigint AS left_behind, sum(negated)::bigint AS negated,
                sum(now)::bigint AS now
           FROM ({MONEY}) AS money GROUP BY of, currency ORDER BY of DESC, currency"
    ))
    .load(conn)
    .map_err(failed())?;
    if let Some(difference) = unopened(conn, system)? {
        differences.push(difference);
    }
    Ok(Check { differences, money })
}

/// What must not be found in the rows of one table.
fn of_rows(table: &Table) -> Vec<(&'static str, String)> {
    let (name, key) = (table.name, table.key);
    let rejected = format!(
        "SELECT FROM bruhmcp_archive.import_rejected
          WHERE table_name = '{name}' AND import_rejected.key = old.{key}::text"
    );
    let made_here = match name {
        "account_credits" => {
            "UNION ALL SELECT md5('rest of ' || id)::uuid FROM old_account_credits
                        WHERE remaining_amount < credit_amount"
        }
        "user_plans" => "UNION ALL SELECT md5('plan of ' || id)::uuid FROM old_users",
        _ => "",
    };
    let differs = |column: &str| {
        let column = quoted(column);
        format!("new.{column} IS DISTINCT FROM old.{column}")
    };
    let as_written = table
        .columns()
        .filter(|(column, _)| !UNEQUAL.contains(column));
    let as_written = as_written.map(|(column, kind)| match kind {
        Kind::Text => format!("new.{0}::text IS DISTINCT FROM old.{0}", quoted(column)),
        _ => differs(column),
    });
    let mut unstaged = UNSTAGED.to_vec();
    if name == "mcp_service_table" {
        // That of credentials, which a constraint may have refused.
        unstaged.push("oauth_status");
    }
    // The later shape has other columns for a few of these; those are compared as staged.
    let of_both: Vec<String> = match name {
        "account_credits" => vec![
            differs("user_id"),
            differs("description"),
            differs("expires_at"),
            differs("created_at"),
            differs("updated_at"),
            "new.amount <> coalesce(old.amount, old.credit_amount)".to_owned(),
            "new.is_used <> coalesce(old.is_used, old.remaining_amount = 0)".to_owned(),
            "new.source_id IS DISTINCT FROM coalesce(old.source_id, old.source_transaction_id::text,
                old.subscription_id::text)"
                .to_owned(),
        ],
        "users" => [
            "first_name",
            "last_name",
            "email",
            "razorpay_customer_id",
            "created_at",
            "updated_at",
            "last_login_at",
            "is_active",
        ]
        .map(differs)
        .to_vec(),
        _ => as_written.collect(),
    };
    vec![
        (
            "rows that are neither carried over nor reported",
            format!(
                "SELECT old.{key}::text AS key FROM old_{name} AS old
                  WHERE NOT EXISTS (SELECT FROM {name} AS new WHERE new.{key} = old.{key})
                    AND NOT EXISTS ({rejected})"
            ),
        ),
        (
            "rows that are carried over and reported as left behind",
            format!(
                "SELECT old.{key}::text AS key FROM old_{name} AS old
                   JOIN {name} AS new USING ({key}) WHERE EXISTS ({rejected})"
            ),
        ),
        (
            "rows that are left behind or reported for a reason that the archive doesn't have",
            // What a constraint refuses, and a secret that can't be sealed, shows when it is written.
            format!(
                "SELECT key
                   FROM (SELECT key, min(rejected) AS reason FROM new_{name} GROUP BY key) AS staged
                   FULL JOIN (
                       SELECT key, reason AS reported FROM bruhmcp_archive.import_rejected
                        WHERE table_name = '{name}'
                   ) AS reported USING (key)
                  WHERE reason IS DISTINCT FROM reported
                    AND (reported ~ '^refused:|^secret_too_long$') IS NOT TRUE"
            ),
        ),
        (
            "rows that the archive does not have",
            format!(
                "SELECT {key}::text AS key FROM {name} AS new
                  WHERE NOT EXISTS (
                      SELECT FROM (SELECT {key} FROM old_{name} {made_here}) AS old
                       WHERE old.{key} = new.{key})"
            ),
        ),
        (
            "rows that are not as the archive has them, and no conversion explains it",
            format!(
                "SELECT staged.key FROM new_{name} AS staged
                   JOIN old_{name} AS old USING ({key}) JOIN {name} AS new USING ({key})
                  WHERE reasons = '{{}}' AND rejected IS NULL AND NOT extra AND ({})",
                of_both.join(" OR ")
            ),
        ),
        (
            "rows that are not as the conversion made them",
            format!(
                "SELECT staged.key
                   FROM (SELECT key, rejected, {key}, to_jsonb(staged) AS row
                           FROM new_{name} AS staged) AS staged
                   JOIN (SELECT {key}, to_jsonb(new) AS row FROM {name} AS new) AS new USING ({key})
                  WHERE rejected IS NULL
                    AND NOT new.row @> (
                        staged.row - '{{n,key,extra,rejected,reasons,{}}}'::text[])",
                unstaged.join(",")
            ),
        ),
    ]
}

/// Columns whose value is never that of the archive: sealed, parsed or counted.
const UNEQUAL: [&str; 11] = [
    "api_key",
    "client_secret",
    "access_token",
    "refresh_token",
    "oauth_authorization_url",
    "oauth_state",
    "method_details_json",
    "gateway_response_json",
    "total_instances_created",
    "active_instances_count",
    "features",
];

/// Columns that are written after staging.
const UNSTAGED: [&str; 6] = [
    "api_key",
    "client_secret",
    "access_token",
    "refresh_token",
    "total_instances_created",
    "active_instances_count",
];

/// What must not be found in several tables.
const OF_ALL: [(&str, &str); 8] = [
    (
        "users: without a plan",
        "SELECT id::text AS key FROM users
          WHERE NOT EXISTS (SELECT FROM user_plans WHERE user_id = users.id)",
    ),
    (
        "users: with more active instances than the plan allows",
        "SELECT user_id::text AS key
           FROM mcp_service_table JOIN user_plans USING (user_id)
          WHERE status = 'active' AND oauth_status = 'completed'
          GROUP BY user_id, max_instances HAVING count(*) > max_instances",
    ),
    (
        "mcp_service_table: an oauth_status that is not that of the credentials",
        "SELECT instance_id::text AS key
           FROM mcp_service_table AS instance LEFT JOIN mcp_credentials AS credentials
          USING (instance_id)
          WHERE instance.oauth_status <> coalesce(credentials.oauth_status, 'pending')",
    ),
    (
        "mcp_service_table: a status that no plan explains",
        "SELECT instance_id::text AS key
           FROM mcp_service_table AS new JOIN old_mcp_service_table AS old USING (instance_id)
           JOIN user_plans ON user_plans.user_id = new.user_id
           CROSS JOIN settings
          WHERE new.status::text <> coalesce(old.status, 'active')
            AND NOT (new.status = 'inactive'
                     AND (old.status NOT IN ('active', 'inactive', 'expired')
                          OR coalesce(old.status, 'active') = 'active'
                             AND new.oauth_status = 'completed'
                             AND (max_instances IS NOT NULL OR user_plans.expires_at <= now)))",
    ),
    (
        "users: with fewer active instances than the archive has and the plan allows",
        "SELECT user_id::text AS key
           FROM (
               SELECT new.user_id,
                      count(*) FILTER (WHERE coalesce(old.status, 'active') = 'active') AS had,
                      count(*) FILTER (WHERE new.status = 'active') AS has
                 FROM mcp_service_table AS new
                 JOIN old_mcp_service_table AS old USING (instance_id)
                WHERE new.oauth_status = 'completed'
                GROUP BY new.user_id
           ) AS counts
           JOIN user_plans USING (user_id)
           CROSS JOIN settings
          WHERE has < least(had, max_instances) AND (expires_at <= now) IS NOT TRUE",
    ),
    (
        "mcp_table: wrong counters",
        "SELECT mcp_service_id::text AS key
           FROM mcp_table
           LEFT JOIN old_mcp_table AS old USING (mcp_service_id)
           LEFT JOIN (
               SELECT mcp_service_id, count(*) AS created,
                      count(*) FILTER (WHERE status = 'active' AND oauth_status = 'completed')
                          AS active
                 FROM mcp_service_table GROUP BY mcp_service_id
           ) AS counts USING (mcp_service_id)
          WHERE mcp_table.active_instances_count <> coalesce(active, 0)
             OR mcp_table.total_instances_created
                <> greatest(coalesce(created, 0), coalesce(old.total_instances_created, 0))",
    ),
    (
        "users: a password that is not that of the archive",
        "SELECT id::text AS key FROM users AS new JOIN old_users AS old USING (id)
          WHERE new.password IS NOT NULL
            AND new.password IS DISTINCT FROM coalesce(old.password, old.password_hash)",
    ),
    (
        "subscription_transactions: amounts that are not those of the archive",
        "SELECT id::text AS key
           FROM subscription_transactions AS new
           JOIN old_subscription_transactions AS old USING (id)
          WHERE (abs(new.amount), abs(new.net_amount), new.tax_amount, new.discount_amount,
                 new.fee_amount, new.user_id)
                IS DISTINCT FROM
                (abs(old.amount), abs(old.net_amount), coalesce(old.tax_amount, 0),
                 coalesce(old.discount_amount, 0), coalesce(old.fee_amount, 0), old.user_id)",
    ),
];

/// A line for each amount on either side.
const MONEY: &str = "
    SELECT 'subscription_transactions' AS of, old.user_id,
           upper(btrim(coalesce(currency, 'INR'))) AS currency, amount AS archive,
           CASE WHEN rejected.key IS NULL THEN 0 ELSE amount END AS left_behind,
           CASE
               WHEN rejected.key IS NULL AND transaction_type = 'refund' AND amount > 0
                   THEN -2 * amount
               ELSE 0
           END AS negated,
           0 AS now
      FROM old_subscription_transactions AS old
      LEFT JOIN bruhmcp_archive.import_rejected AS rejected
        ON table_name = 'subscription_transactions' AND rejected.key = old.id::text
    UNION ALL
    SELECT 'subscription_transactions', user_id, currency, 0, 0, 0, amount
      FROM subscription_transactions
    UNION ALL
    SELECT 'account_credits', old.user_id, upper(btrim(coalesce(currency, 'INR'))),
           coalesce(amount, credit_amount),
           CASE WHEN rejected.key IS NULL THEN 0 ELSE coalesce(amount, credit_amount) END, 0, 0
      FROM old_account_credits AS old
      LEFT JOIN bruhmcp_archive.import_rejected AS rejected
        ON table_name = 'account_credits' AND rejected.key = old.id::text
    UNION ALL
    SELECT 'account_credits', user_id, currency, 0, 0, 0, amount FROM account_credits";

#[derive(QueryableByName)]
struct Pair {
    #[diesel(sql_type = SqlUuid)]
    credential_id: Uuid,
    #[diesel(sql_type = SqlUuid)]
    instance_id: Uuid,
    #[diesel(sql_type = Array<Nullable<Text>>)]
    secrets: Vec<Option<String>>,
    #[diesel(sql_type = Array<Nullable<Binary>>)]
    sealed: Vec<Option<Vec<u8>>>,
}

/// Opens every credential, and compares it with the archive's.
fn unopened(
    conn: &mut PgConnection,
    system: &dyn NewSystem,
) -> Result<Option<Difference>, ImportError> {
    const COLUMNS: [SecretColumn; 4] = [
        SecretColumn::ApiKey,
        SecretColumn::ClientSecret,
        SecretColumn::AccessToken,
        SecretColumn::RefreshToken,
    ];
    let mut difference = Difference {
        what: "mcp_credentials: secrets that don't open, or aren't those of the archive".to_owned(),
        rows: 0,
        keys: Vec::new(),
    };
    let mut last = Uuid::nil();
    loop {
        let pairs: Vec<Pair> = sql_query(
            "SELECT credential_id, instance_id,
                    ARRAY[old.api_key, old.client_secret, nullif(old.access_token, ''),
                          nullif(old.refresh_token, '')] AS secrets,
                    ARRAY[new.api_key, new.client_secret, new.access_token, new.refresh_token]
                        AS sealed
               FROM mcp_credentials AS new
               JOIN old_mcp_credentials AS old USING (credential_id, instance_id)
              WHERE credential_id > $1 ORDER BY credential_id LIMIT $2",
        )
        .bind::<SqlUuid, _>(last)
        .bind::<BigInt, _>(BATCH)
        .load(conn)
        .map_err(ImportError::database("opening the credentials"))?;
        let Some(pair) = pairs.last() else { break };
        last = pair.credential_id;
        for pair in &pairs {
            let mut columns = pair.secrets.iter().zip(&pair.sealed).zip(COLUMNS);
            let holds = columns.all(|((secret, sealed), column)| match (secret, sealed) {
                (None, None) => true,
                (Some(secret), Some(sealed)) => {
                    system.holds(sealed, secret, pair.instance_id, column)
                }
                _ => false,
            });
            if !holds {
                difference.rows += 1;
                if difference.keys.len() < 3 {
                    difference.keys.push(pair.credential_id.to_string());
                }
            }
        }
    }
    Ok((difference.rows != 0).then_some(difference))
}
