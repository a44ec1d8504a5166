//! The audit log: inserts, pages, the summary, the purge.

use bigdecimal::BigDecimal;
use bruhmcp_db::enums::AuditStatus;
use bruhmcp_db::ids::{InstanceId, UserId};
use bruhmcp_db::models::{AuditFilter, Maintained, NewTokenAudit, TokenAudit};
use bruhmcp_db::schema::{mcp_service_table, token_audit_log, users};
use bruhmcp_db::views::{TokenAuditSummary, token_audit_summary};
use bruhmcp_db::{ConstraintViolation, Durability, Page, is_transient};
use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use diesel::prelude::*;

use crate::fixtures;
use crate::support::{self, ROLES, TestDatabase, as_admin, at_once, database};

fn append(
    conn: &mut PgConnection,
    instance_id: InstanceId,
    operation: &str,
    status: AuditStatus,
) -> TokenAudit {
    let new = NewTokenAudit {
        method: Some("oauth"),
        ..NewTokenAudit::new(instance_id, operation, status)
    };
    TokenAudit::insert(conn, &new).unwrap()
}

#[test]
fn the_log_is_listed_in_pages() {
    let database = database();
    let conn = &mut database.connect();
    let (instance, other) = (InstanceId::new(), InstanceId::new());
    let mut rows: Vec<_> = conn
        .transaction::<_, diesel::result::Error, _>(|conn| {
            append(conn, other, "refresh", AuditStatus::Success);
            Ok((0..5)
                .map(|_| append(conn, instance, "refresh", AuditStatus::Success))
                .collect())
        })
        .unwrap();
    rows.push(append(conn, instance, "revoke", AuditStatus::Warning));
    rows.reverse();
    let mut seen = Vec::new();
    let mut page = Page::first(2);
    loop {
        let listed = TokenAudit::list(conn, AuditFilter::of_instance(instance), page).unwrap();
        let Some(last) = listed.last() else { break };
        page = Page::after(last.cursor(), 2);
        seen.extend(listed);
    }
    assert_eq!(seen, rows);
    // Inserts and pages are prepared once.
    let prepared = diesel::sql_query(
        "SELECT FROM pg_prepared_statements WHERE statement LIKE '%token_audit_log%'",
    );
    assert_eq!(prepared.execute(conn).unwrap(), 2);
    let error = diesel::sql_query("UPDATE token_audit_log SET operation = 'x'")
        .execute(&mut database.connect_as_owner())
        .unwrap_err();
    assert!(
        ConstraintViolation::of(&error)
            .unwrap()
            .is("token_audit_log_append_only")
    );
}

#[test]
fn many_rows_are_appended_in_their_order() {
    let database = database();
    let conn = &mut database.connect();
    let (instance, user) = (InstanceId::new(), UserId::new());
    let metadata = serde_json::json!({"n": [1, null, "é\"'"]});
    let rows: Vec<_> = (0..100)
        .map(|n| NewTokenAudit {
            user_id: (n % 2 == 0).then_some(user),
            method: (n % 3 == 0).then_some("oauth, {\"quoted\"}"),
            error_type: (n % 5 == 0).then_some(""),
            error_message: (n % 7 == 0).then_some("NULL"),
            metadata: (n % 4 == 0).then_some(&metadata),
            ..NewTokenAudit::new(instance, "refresh", AuditStatus::ALL[n % 4])
        })
        .collect();
    for durability in [Durability::Synced, Durability::Unsynced] {
        let appended = TokenAudit::insert_many(conn, &rows, durability).unwrap();
        assert_eq!(appended, rows.len());
        let filter = AuditFilter::of_instance(instance);
        let mut listed = TokenAudit::list(conn, filter, Page::first(100)).unwrap();
        listed.reverse();
        assert!(listed.is_sorted_by_key(|row| row.audit_id.0));
        for (row, new) in listed.iter().zip(&rows) {
            assert_eq!(
                (row.user_id, row.status, row.method.as_deref()),
                (new.user_id, new.status, new.method)
            );
            assert_eq!(
                (
                    row.error_type.as_deref(),
                    row.error_message.as_deref(),
                    row.metadata.as_ref()
                ),
                (new.error_type, new.error_message, new.metadata)
            );
        }
    }
    assert_eq!(
        TokenAudit::insert_many(conn, &[], Durability::Unsynced),
        Ok(0)
    );

    let empty = NewTokenAudit::new(instance, "", AuditStatus::Success);
    let error = TokenAudit::insert_many(conn, &[rows[0].clone(), empty], Durability::Synced);
    let violation = ConstraintViolation::of(&error.unwrap_err()).unwrap();
    assert!(
        violation.is("token_audit_log_operation_check"),
        "{violation}"
    );
    let count: i64 = token_audit_log::table.count().get_result(conn).unwrap();
    assert_eq!(count, 200);
}

#[test]
fn the_log_is_filtered() {
    let database = database();
    let conn = &mut database.connect();
    let (instance, user) = (InstanceId::new(), UserId::new());
    let mut insert = |user_id, operation, status| {
        let new = NewTokenAudit {
            user_id,
            ..NewTokenAudit::new(instance, operation, status)
        };
        TokenAudit::insert(conn, &new).unwrap()
    };
    let rows = [
        insert(Some(user), "refresh", AuditStatus::Success),
        insert(Some(user), "refresh", AuditStatus::Failure),
        insert(None, "refresh", AuditStatus::Failure),
        insert(Some(UserId::new()), "revoke", AuditStatus::Success),
    ];
    append(conn, InstanceId::new(), "refresh", AuditStatus::Success);

    let of_instance = AuditFilter::of_instance(instance);
    let filters: [(AuditFilter<'_>, &[usize]); 8] = [
        (of_instance, &[3, 2, 1, 0]),
        (
            AuditFilter {
                user_id: Some(user),
                ..AuditFilter::default()
            },
            &[1, 0],
        ),
        (
            AuditFilter {
                operation: Some("revoke"),
                ..AuditFilter::default()
            },
            &[3],
        ),
        (
            AuditFilter {
                status: Some(AuditStatus::Failure),
                ..AuditFilter::default()
            },
            &[2, 1],
        ),
        (
            AuditFilter {
                since: Some(rows[2].created_at),
                ..of_instance
            },
            &[3, 2],
        ),
        (
            AuditFilter {
                until: Some(rows[2].created_at),
                ..of_instance
            },
            &[1, 0],
        ),
        (
            AuditFilter {
                user_id: Some(user),
                operation: Some("refresh"),
                status: Some(AuditStatus::Success),
                since: Some(rows[0].created_at),
                until: Some(rows[3].created_at),
                ..of_instance
            },
            &[0],
        ),
        (
            AuditFilter {
                operation: Some("refresh"),
                since: Some(rows[3].created_at),
                ..of_instance
            },
            &[],
        ),
    ];
    for (filter, expected) in filters {
        let expected: Vec<_> = expected.iter().map(|n| rows[*n].clone()).collect();
        let listed = TokenAudit::list(conn, filter, Page::first(10)).unwrap();
        assert_eq!(listed, expected, "{filter:?}");
    }
}

/// Even with a generic plan, which PostgreSQL may choose for a prepared statement.
#[test]
fn a_page_reads_no_more_than_its_rows() {
    let database = database();
    let key = InstanceId::new();
    database
        .psql(&format!(
            "INSERT INTO token_audit_log (instance_id, user_id, operation, status, created_at)
             SELECT key, key, 'refresh', 'success', now() - n * interval '1 minute'
               FROM (SELECT '{key}'::uuid AS key
                     UNION ALL
                     SELECT gen_random_uuid() FROM generate_series(1, 199)) AS keys,
                    generate_series(1, 500) AS n;
             ANALYZE"
        ))
        .unwrap();
    let conn = &mut database.connect();
    conn.batch_execute("SET plan_cache_mode = force_generic_plan")
        .unwrap();
    let of_user = AuditFilter {
        user_id: Some(UserId(key.0)),
        ..AuditFilter::default()
    };
    for (filter, index) in [
        (AuditFilter::of_instance(key), "pkey"),
        (of_user, "user_id_created_at_idx"),
        (AuditFilter::default(), "created_at_idx"),
    ] {
        let mut page = Page::first(20);
        for _ in 0..3 {
            let rows = TokenAudit::list(conn, filter, page).unwrap();
            assert_eq!(rows.len(), 20);
            page = Page::after(rows[19].cursor(), 20);
        }
        conn.batch_execute("SELECT pg_stat_force_next_flush()")
            .unwrap();
        // The rows are in the partitions of one or two months.
        let read = format!(
            "SELECT sum(idx_tup_read)
               FROM pg_inherits JOIN pg_stat_user_indexes ON indexrelid = inhrelid
              WHERE inhparent = 'token_audit_log_{index}'::regclass"
        );
        let read: i64 = database.psql(&read).unwrap().trim().parse().unwrap();
        // Rows with the same time are sorted by their key.
        assert!((60..=1000).contains(&read), "{index}: {read} entries");
    }
}

#[test]
pub(crate) fn the_summary_counts_by_operation_status_and_method() {
    let database = database();
    let conn = &mut database.connect();
    let instance = InstanceId::new();
    append(conn, instance, "refresh", AuditStatus::Failure);
    let first = append(conn, instance, "refresh", AuditStatus::Success);
    let last = append(conn, instance, "refresh", AuditStatus::Success);
    append(conn, InstanceId::new(), "refresh", AuditStatus::Success);
    database
        .psql(&format!(
            "INSERT INTO token_audit_log (instance_id, operation, status, created_at)
             VALUES ('{instance}', 'revoke', 'success', now() - interval '31 days')"
        ))
        .unwrap();
    let summary = TokenAuditSummary::list_by_instance(conn, instance).unwrap();
    let [success, failure] = &summary[..] else {
        panic!("{summary:?}")
    };
    assert_eq!(
        (
            success.status,
            success.operation_count,
            success.success_count,
            success.failure_count
        ),
        (AuditStatus::Success, 2, 2, 0)
    );
    assert_eq!(success.success_rate, BigDecimal::from(100));
    assert_eq!(
        (success.first_operation, success.last_operation),
        (first.created_at, last.created_at)
    );
    assert_eq!(
        (
            failure.status,
            failure.operation_count,
            failure.success_count,
            failure.failure_count
        ),
        (AuditStatus::Failure, 1, 0, 1)
    );
    assert_eq!(failure.success_rate, BigDecimal::from(0));
}

/// Another crate can't allow this join itself (orphan rule).
#[test]
fn the_summary_is_joined_with_tables() {
    let database = database();
    let conn = &mut database.connect();
    let (user, gmail) = (fixtures::user(conn), fixtures::service(conn, "gmail", 4001));
    let instance = fixtures::create(conn, user, gmail).unwrap();
    append(conn, instance, "refresh", AuditStatus::Success);
    append(conn, InstanceId::new(), "refresh", AuditStatus::Success);

    let of_users: Vec<(UserId, String, TokenAuditSummary)> = token_audit_summary::table
        .inner_join(
            mcp_service_table::table
                .on(mcp_service_table::instance_id.eq(token_audit_summary::instance_id)),
        )
        .inner_join(users::table.on(users::id.eq(mcp_service_table::user_id)))
        .select((users::id, users::first_name, TokenAuditSummary::as_select()))
        .load(conn)
        .unwrap();
    let [(id, first_name, summary)] = &of_users[..] else {
        panic!("{of_users:?}");
    };
    assert_eq!((*id, first_name.as_str()), (user, "Asha"));
    assert_eq!(
        (summary.instance_id, summary.operation_count),
        (instance, 1)
    );
}

/// Rows of the log, one a day, from `first` to `last` days ago.
fn days_ago(database: &TestDatabase, first: u32, last: u32) {
    database
        .psql(&format!(
            "INSERT INTO token_audit_log (instance_id, operation, status, created_at)
             SELECT gen_random_uuid(), 'refresh', 'success', now() - n * interval '1 day'
               FROM generate_series({first}, {last}) AS n"
        ))
        .unwrap();
}

/// The partitions as months from this one, with the number of their rows; the default one is `d`.
fn partitions(database: &TestDatabase) -> Vec<(String, i64)> {
    let rows = database
        .psql(
            "SELECT coalesce(substring(relname, '\\d{4}')::int * 12
                             + substring(relname, '\\d\\d$')::int
                             - extract(year FROM now() AT TIME ZONE 'UTC') * 12
                             - extract(month FROM now() AT TIME ZONE 'UTC') || '', 'd'),
                    (xpath('//c/text()',
                           query_to_xml('SELECT count(*) AS c FROM ' || relname, false, true, '')
                    ))[1]
               FROM pg_inherits JOIN pg_class ON oid = inhrelid
              WHERE inhparent = 'token_audit_log'::regclass
              ORDER BY relname",
        )
        .unwrap();
    rows.lines()
        .map(|line| {
            let (month, count) = line.split_once('|').unwrap();
            (month.to_owned(), count.parse().unwrap())
        })
        .collect()
}

fn maintain(conn: &mut PgConnection) -> Maintained {
    as_admin(conn, TokenAudit::maintain).unwrap()
}

const NOTHING: Maintained = Maintained {
    created: 0,
    moved: 0,
    dropped: 0,
};

#[test]
fn coming_months_have_a_partition() {
    let database = database();
    let conn = &mut database.connect();
    let months: Vec<_> = partitions(&database).into_iter().map(|row| row.0).collect();
    assert_eq!(months, ["0", "1", "2", "3", "d"]);
    assert_eq!(maintain(conn), NOTHING);
    // As if nobody had called it for two months.
    database
        .psql(
            "DO $$
             DECLARE part text;
             BEGIN
                 FOR part IN SELECT relname FROM pg_inherits JOIN pg_class ON oid = inhrelid
                              WHERE relname ~ '_\\d\\d$' ORDER BY 1 DESC LIMIT 2
                 LOOP EXECUTE 'DROP TABLE ' || part; END LOOP;
             END $$",
        )
        .unwrap();
    let created = Maintained {
        created: 2,
        ..NOTHING
    };
    assert_eq!(maintain(conn), created);
    assert_eq!(maintain(conn), NOTHING);
}

#[test]
fn rows_without_a_month_are_moved_and_old_months_dropped() {
    let database = database();
    let conn = &mut database.connect();
    let kept = append(conn, InstanceId::new(), "refresh", AuditStatus::Success);
    days_ago(&database, 32, 200);
    let all = partitions(&database);
    assert_eq!(all.last().unwrap(), &("d".to_owned(), 169));

    let done = maintain(conn);
    assert_eq!((done.moved, done.dropped), (169, 0));
    assert!(done.created >= 5, "{done:?}");
    assert_eq!(partitions(&database).last().unwrap().1, 0);
    let listed = TokenAudit::list(conn, AuditFilter::default(), Page::first(1_000)).unwrap();
    assert_eq!((listed.len(), &listed[0]), (170, &kept));
    assert!(listed.is_sorted_by(|a, b| a.created_at > b.created_at));

    // The month that began before the 90th day stays, until its last row is old enough.
    let dropped = maintain(conn);
    assert_eq!((dropped.created, dropped.moved), (0, 0));
    assert!(dropped.dropped >= 3, "{dropped:?}");
    let left = TokenAudit::list(conn, AuditFilter::default(), Page::first(1_000)).unwrap();
    let young = chrono::Utc::now() - chrono::TimeDelta::days(90);
    let younger = |rows: &[TokenAudit]| rows.iter().filter(|row| row.created_at > young).count();
    assert_eq!(younger(&left), younger(&listed));
    assert!(left.len() <= younger(&left) + 31, "{}", left.len());
    assert_eq!(maintain(conn), NOTHING);

    assert!(as_admin(conn, |conn| TokenAudit::purge(conn, 1_000)).unwrap() > 0);
    let left = TokenAudit::list(conn, AuditFilter::default(), Page::first(1_000)).unwrap();
    assert_eq!(left.len(), younger(&listed));
}

/// Whoever has the owner's rights may as well address a partition.
#[test]
fn each_partition_is_append_only() {
    let database = database();
    append(
        &mut database.connect(),
        InstanceId::new(),
        "refresh",
        AuditStatus::Success,
    );
    days_ago(&database, 40, 80);
    for maintained in [false, true] {
        if maintained {
            maintain(&mut database.connect());
        }
        let parts = database
            .psql(
                "SELECT inhrelid::regclass FROM pg_inherits
                  WHERE inhparent = 'token_audit_log'::regclass",
            )
            .unwrap();
        let mut with_rows = 0;
        for part in parts.lines() {
            let error = database.psql(&format!("TRUNCATE {part}")).unwrap_err();
            assert!(
                error.contains("token_audit_log_append_only"),
                "{part}: {error}"
            );
            if database.psql(&format!("TABLE {part}")).unwrap().is_empty() {
                continue;
            }
            with_rows += 1;
            for statement in ["UPDATE {} SET operation = 'x'", "DELETE FROM {}"] {
                let error = database.psql(&statement.replace("{}", part)).unwrap_err();
                assert!(
                    error.contains("token_audit_log_append_only"),
                    "{part}: {error}"
                );
            }
        }
        assert!(with_rows >= 2, "{parts}");
    }
}

/// Rows that fall into the default partition, others, and four calls of maintain at once.
#[test]
fn maintaining_loses_nothing_and_deadlocks_with_nobody() {
    let database = database();
    const WRITERS: usize = 4;
    const ROWS: usize = 200;
    let done = at_once(&database, WRITERS + 4, |number, conn| {
        let mut created = 0;
        if number < WRITERS {
            for row in 0..ROWS {
                append(conn, InstanceId::new(), "refresh", AuditStatus::Success);
                if row % 20 == 0 {
                    days_ago(&database, 30 + row as u32 / 20, 30 + row as u32 / 20);
                }
            }
        } else {
            for _ in 0..20 {
                // It gives up on a busy machine, which is not a deadlock.
                match as_admin(conn, TokenAudit::maintain) {
                    Ok(done) => created += done.created,
                    Err(error) => assert!(!is_transient(&error), "{error}"),
                }
                let page = Page::first(10);
                TokenAudit::list(conn, AuditFilter::default(), page).unwrap();
            }
        }
        created
    });
    let conn = &mut database.connect();
    let last = maintain(conn).created;
    // 30 to 39 days ago are one month or two.
    let created = last + done.iter().sum::<i32>();
    assert!((1..=2).contains(&created), "{created}");
    let rows = partitions(&database);
    assert_eq!(rows.last().unwrap(), &("d".to_owned(), 0));
    let total: i64 = rows.iter().map(|row| row.1).sum();
    assert_eq!(total, i64::try_from(WRITERS * (ROWS + ROWS / 20)).unwrap());
}

/// One that arrived in the default partition while maintenance waited for its lock.
#[test]
fn a_row_that_is_newer_than_the_transaction_is_moved() {
    let database = database();
    database
        .psql(
            "DO $$ BEGIN
                 EXECUTE 'DROP TABLE token_audit_log_' || to_char(now() AT TIME ZONE 'UTC', 'YYYY_MM');
             END $$",
        )
        .unwrap();
    let conn = &mut database.connect();
    let maintained = conn.transaction(|conn| {
        append(
            &mut database.connect(),
            InstanceId::new(),
            "refresh",
            AuditStatus::Success,
        );
        as_admin(conn, TokenAudit::maintain)
    });
    assert_eq!(maintained.unwrap().moved, 1);
}

/// It gives up, instead of keeping everybody who reads or writes the log behind it.
#[test]
fn maintain_does_not_wait_long() {
    let database = database();
    let conn = &mut database.connect();
    days_ago(&database, 40, 40);
    let other = &mut database.connect();
    other
        .transaction::<_, diesel::result::Error, _>(|other| {
            TokenAudit::list(other, AuditFilter::default(), Page::first(1))?;
            as_admin(conn, TokenAudit::maintain).unwrap_err();
            append(other, InstanceId::new(), "refresh", AuditStatus::Success);
            Ok(())
        })
        .unwrap();
    assert_eq!(maintain(conn).moved, 1);
}

#[test]
fn the_service_does_not_maintain_the_log() {
    if !*ROLES {
        return support::skipped("there are no roles");
    }
    let database = database();
    let error = TokenAudit::maintain(&mut database.connect()).unwrap_err();
    assert!(
        error.to_string().contains("maintain_token_audit_log"),
        "{error}"
    );
}

#[test]
pub(crate) fn old_rows_are_purged_in_batches() {
    let database = database();
    let conn = &mut database.connect();
    let instance = InstanceId::new();
    let old = format!(
        "INSERT INTO token_audit_log (instance_id, operation, status, created_at)
         SELECT '{instance}', 'refresh', 'success', now() - interval '91 days'
           FROM generate_series(1, 5)"
    );
    database.psql(&old).unwrap();
    let kept = append(conn, instance, "refresh", AuditStatus::Pending);
    let batches: Vec<_> = (0..4)
        .map(|_| as_admin(conn, |conn| TokenAudit::purge(conn, 2)).unwrap())
        .collect();
    assert_eq!(batches, [2, 2, 1, 0]);
    let left = TokenAudit::list(conn, AuditFilter::of_instance(instance), Page::first(10)).unwrap();
    assert_eq!(left, [kept]);
}
