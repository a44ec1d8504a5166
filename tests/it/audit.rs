//! The audit log: inserts, pages, the summary, the purge.

use bigdecimal::BigDecimal;
use bruhmcp_db::enums::AuditStatus;
use bruhmcp_db::ids::{InstanceId, UserId};
use bruhmcp_db::models::{AuditFilter, NewTokenAudit, TokenAudit};
use bruhmcp_db::schema::{mcp_service_table, users};
use bruhmcp_db::views::{TokenAuditSummary, token_audit_summary};
use bruhmcp_db::{ConstraintViolation, Page};
use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use diesel::prelude::*;

use crate::fixtures;
use crate::support::{as_admin, database};

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
        (AuditFilter::of_instance(key), "instance_id_created_at_idx"),
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
        let read = format!(
            "SELECT idx_tup_read FROM pg_stat_user_indexes
              WHERE indexrelname = 'token_audit_log_{index}'"
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
