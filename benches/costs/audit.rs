//! The audit log by month, beside one table without partitions.

use bruhmcp_db::enums::AuditStatus;
use bruhmcp_db::ids::InstanceId;
use bruhmcp_db::models::{AuditFilter, NewTokenAudit, TokenAudit};
use bruhmcp_db::{Durability, Page};
use bruhmcp_devdb::{Database, Server};
use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use uuid::Uuid;

use crate::report::{Range, Section};
use crate::{Result, Servers, buffers, database, large, rate, wal};

const INSERTED: usize = 5_000;

/// A log with rows of the last six months, of 100 instances.
pub(crate) struct Log {
    name: &'static str,
    _database: Database,
    conn: PgConnection,
}

impl Log {
    fn new(server: &Server, by_month: bool) -> Result<Self> {
        let (database, mut conn) = database(server)?;
        if !by_month {
            conn.batch_execute(
                "ALTER TABLE token_audit_log RENAME TO by_month;
                 CREATE TABLE token_audit_log (LIKE by_month INCLUDING ALL);
                 DO $$ BEGIN
                     EXECUTE 'CREATE OR REPLACE VIEW token_audit_summary AS ' || replace(
                         pg_get_viewdef('token_audit_summary'::regclass),
                         'by_month', 'token_audit_log');
                 END $$",
            )?;
        }
        conn.batch_execute(&format!(
            "SET session_replication_role = replica;
             INSERT INTO token_audit_log (instance_id, operation, status, created_at)
             SELECT ('00000000-0000-0000-0000-' || lpad((n % 100)::text, 12, '0'))::uuid,
                    'call', 'success', now() - n * interval '180 days' / {rows}
               FROM generate_series(1, {rows}) AS n;
             RESET session_replication_role",
            rows = large()?
        ))?;
        if by_month {
            // Moves the rows out of the default partition.
            TokenAudit::maintain(&mut conn)?;
        }
        conn.batch_execute("VACUUM ANALYZE")?;
        Ok(Self {
            name: if by_month { "by month" } else { "one table" },
            _database: database,
            conn,
        })
    }
}

/// Measures one table, then the months. The logs are made once: they may have millions of rows.
fn each<T>(
    servers: &Servers,
    mut work: impl FnMut(&mut Log) -> Result<T>,
) -> Result<Vec<(String, T)>> {
    let mut logs = servers.logs.borrow_mut();
    if logs.is_empty() {
        for by_month in [false, true] {
            logs.push(Log::new(&servers.server, by_month)?);
        }
    }
    logs.iter_mut()
        .map(|log| Ok((log.name.to_owned(), work(log)?)))
        .collect()
}

fn instance() -> InstanceId {
    InstanceId(Uuid::from_u128(1))
}

/// Rows one by one and in batches.
pub(crate) fn rate_of_inserts(servers: &Servers) -> Result<Section> {
    let (_database, mut conn) = database(&servers.synced)?;
    let conn = &mut conn;
    let row = NewTokenAudit::new(instance(), "call", AuditStatus::Success);
    let one_by_one = rate(500, || {
        for _ in 0..500 {
            TokenAudit::insert(conn, &row)?;
        }
        Ok(())
    })?;
    let mut rows = vec![("one by one".to_owned(), one_by_one)];
    let batch = vec![row; 1_000];
    for durability in [Durability::Synced, Durability::Unsynced] {
        let batches = rate(20_000, || {
            for _ in 0..20 {
                TokenAudit::insert_many(conn, &batch, durability)?;
            }
            Ok(())
        })?;
        let durability = format!("{durability:?}").to_lowercase();
        rows.push((format!("batches, {durability}"), batches));
    }
    Ok(Section {
        name: "audit-rows-per-second",
        title: "Rows of the audit log one by one and in batches",
        text:
            "`TokenAudit::insert`, and `insert_many` with 1,000 rows each, over one connection, on \
               a server that syncs its commits to disk."
                .into(),
        unit: "rows a second",
        rows,
    })
}

pub(crate) fn inserts(servers: &Servers) -> Result<Section> {
    let rows = each(servers, |log| {
        let row = NewTokenAudit::new(instance(), "call", AuditStatus::Success);
        let batch = vec![row; 1_000];
        let bytes = wal(&mut log.conn, |conn| {
            for _ in 0..INSERTED / batch.len() {
                TokenAudit::insert_many(conn, &batch, Durability::Synced)?;
            }
            Ok(())
        })?;
        Ok(Range::exactly(crate::each(bytes, INSERTED)))
    })?;
    Ok(Section {
        name: "audit-inserts",
        title: "The audit log grows",
        text: format!(
            "WAL of `TokenAudit::insert_many` by 1,000 rows, {INSERTED} rows after a checkpoint, \
             beside {} of six months.",
            large()?
        ),
        unit: "bytes of WAL a row",
        rows,
    })
}

pub(crate) fn listing(servers: &Servers) -> Result<Section> {
    let rows = each(servers, |log| {
        let filter = AuditFilter {
            instance_id: Some(instance()),
            ..AuditFilter::default()
        };
        let read = buffers(&mut log.conn, |conn| {
            TokenAudit::list(conn, filter, Page::first(100))?;
            Ok(())
        })?;
        Ok(Range::exactly(read))
    })?;
    Ok(Section {
        name: "audit-listing",
        title: "The audit log of an instance",
        text: format!(
            "Buffers of `TokenAudit::list`, the newest 100 of an instance's rows, in a log of {} of \
             six months. By month it looks for the newest row of each partition: beside a default \
             partition, PostgreSQL does not take them in order.",
            large()?
        ),
        unit: "buffers a call",
        rows,
    })
}

pub(crate) fn summary(servers: &Servers) -> Result<Section> {
    let rows = each(servers, |log| {
        let read = buffers(&mut log.conn, |conn| {
            conn.batch_execute("SELECT count(*) FROM token_audit_summary")
        })?;
        Ok(Range::exactly(read))
    })?;
    Ok(Section {
        name: "audit-summary",
        title: "The summary of the audit log",
        text: format!(
            "Buffers of `token_audit_summary`, which reads the last 30 days, in a log of {} rows of \
             six months.",
            large()?
        ),
        unit: "buffers a query",
        rows,
    })
}

pub(crate) fn retention(servers: &Servers) -> Result<Section> {
    let rows = each(servers, |log| {
        let by_month = log.name == "by month";
        let bytes = wal(&mut log.conn, |conn| {
            if by_month {
                TokenAudit::maintain(conn)?;
            } else {
                while TokenAudit::purge(conn, 10_000)? == 10_000 {}
            }
            Ok(())
        })?;
        Ok(Range::exactly(crate::each(bytes, 1_000)))
    })?;
    Ok(Section {
        name: "audit-retention",
        title: "Old rows of the audit log go",
        text: format!(
            "WAL of `TokenAudit::purge` by 10,000 rows and of `TokenAudit::maintain`, which drops \
             months that are wholly past 90 days, in a log of {} rows of six months.",
            large()?
        ),
        unit: "kB of WAL",
        rows,
    })
}
