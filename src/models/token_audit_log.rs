//! The audit log of tokens and credentials. Rows can't be changed, nor deleted before they are 90
//! days old.

mod row;

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Integer, Jsonb, Nullable, Text, Uuid};
use serde::Serialize;
use serde_json::Value;

pub use self::row::TokenAudit;
use crate::enums::AuditStatus;
use crate::ids::{AuditId, InstanceId, UserId};
use crate::page::{Cursor, Page, newest_first};
use crate::prepared::Prepare;
use crate::schema::sql_types::TokenAuditStatus;
use crate::schema::token_audit_log;
use crate::transaction::Durability;

/// Values of a new [`TokenAudit`].
#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = token_audit_log, treat_none_as_default_value = false, check_for_backend(Pg))]
#[expect(missing_docs, reason = "the fields are those of `TokenAudit`")]
pub struct NewTokenAudit<'a> {
    pub instance_id: InstanceId,
    pub user_id: Option<UserId>,
    pub operation: &'a str,
    pub status: AuditStatus,
    pub method: Option<&'a str>,
    pub error_type: Option<&'a str>,
    pub error_message: Option<&'a str>,
    pub metadata: Option<&'a Value>,
}

impl<'a> NewTokenAudit<'a> {
    /// An operation of the system, without further details.
    #[must_use]
    pub fn new(instance_id: InstanceId, operation: &'a str, status: AuditStatus) -> Self {
        Self {
            instance_id,
            user_id: None,
            operation,
            status,
            method: None,
            error_type: None,
            error_message: None,
            metadata: None,
        }
    }
}

/// Restricts [`TokenAudit::list`]; the default restricts nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "each field is a value that the row must have")]
pub struct AuditFilter<'a> {
    pub instance_id: Option<InstanceId>,
    pub user_id: Option<UserId>,
    pub operation: Option<&'a str>,
    pub status: Option<AuditStatus>,
    /// The first time that is listed.
    pub since: Option<DateTime<Utc>>,
    /// The first time that is no longer listed.
    pub until: Option<DateTime<Utc>>,
}

impl AuditFilter<'_> {
    /// The log of an instance.
    #[must_use]
    pub fn of_instance(instance_id: InstanceId) -> Self {
        Self {
            instance_id: Some(instance_id),
            ..Self::default()
        }
    }
}

#[diesel::declare_sql_function]
extern "SQL" {
    fn cleanup_old_token_audit_logs(max_rows: Integer) -> BigInt;
}

/// What [`TokenAudit::maintain`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, QueryableByName)]
pub struct Maintained {
    /// Partitions of coming months, and of months whose rows had none.
    #[diesel(sql_type = Integer)]
    pub created: i32,
    /// Rows moved from the default partition to that of their month.
    #[diesel(sql_type = BigInt)]
    pub moved: i64,
    /// Partitions with no row younger than 90 days.
    #[diesel(sql_type = Integer)]
    pub dropped: i32,
}

impl TokenAudit {
    /// Appends a row and returns it.
    ///
    /// # Errors
    /// `token_audit_log_operation_check` for an empty operation.
    pub fn insert(conn: &mut PgConnection, new: &NewTokenAudit<'_>) -> QueryResult<Self> {
        diesel::insert_into(token_audit_log::table)
            .values(new)
            .returning(Self::as_returning())
            .get_result(conn)
    }

    /// Appends rows in this order, and returns how many. All or none are appended.
    ///
    /// One statement, with one array a column. With [`Durability::Unsynced`] a crash of the server
    /// may lose the newest rows. A [`Buffer`](crate::Buffer) collects rows of many threads.
    ///
    /// # Errors
    /// `token_audit_log_operation_check` for an empty operation;
    /// [`Error::AlreadyInTransaction`](diesel::result::Error::AlreadyInTransaction) with
    /// [`Durability::Unsynced`] inside a transaction.
    pub fn insert_many(
        conn: &mut PgConnection,
        rows: &[NewTokenAudit<'_>],
        durability: Durability,
    ) -> QueryResult<usize> {
        if rows.is_empty() {
            return Ok(0);
        }
        fn column<'a, T>(
            rows: &'a [NewTokenAudit<'_>],
            value: impl Fn(&'a NewTokenAudit<'_>) -> T,
        ) -> Vec<T> {
            rows.iter().map(value).collect()
        }
        durability.run(conn, |conn| {
            // The query builder sends a bind for each value: a text for each number of rows.
            diesel::sql_query(
                "INSERT INTO token_audit_log (instance_id, user_id, operation, status, method,
                                              error_type, error_message, metadata)
                 SELECT * FROM unnest($1, $2, $3, $4, $5, $6, $7, $8)",
            )
            .bind::<Array<Uuid>, _>(column(rows, |row| row.instance_id))
            .bind::<Array<Nullable<Uuid>>, _>(column(rows, |row| row.user_id))
            .bind::<Array<Text>, _>(column(rows, |row| row.operation))
            .bind::<Array<TokenAuditStatus>, _>(column(rows, |row| row.status))
            .bind::<Array<Nullable<Text>>, _>(column(rows, |row| row.method))
            .bind::<Array<Nullable<Text>>, _>(column(rows, |row| row.error_type))
            .bind::<Array<Nullable<Text>>, _>(column(rows, |row| row.error_message))
            .bind::<Array<Nullable<Jsonb>>, _>(column(rows, |row| row.metadata))
            .prepared()
            .execute(conn)
        })
    }

    /// Returns a page of the rows that `filter` allows, newest first.
    ///
    /// There is an index for an instance, a user and the time. With only an operation or a status,
    /// it reads as many rows as the times allow.
    pub fn list(
        conn: &mut PgConnection,
        filter: AuditFilter<'_>,
        page: Page<AuditId>,
    ) -> QueryResult<Vec<Self>> {
        let mut rows = token_audit_log::table
            .select(Self::as_select())
            .into_boxed();
        if let Some(instance_id) = filter.instance_id {
            rows = rows.filter(token_audit_log::instance_id.eq(instance_id));
        }
        if let Some(user_id) = filter.user_id {
            rows = rows.filter(token_audit_log::user_id.eq(user_id));
        }
        if let Some(operation) = filter.operation {
            rows = rows.filter(token_audit_log::operation.eq(operation));
        }
        if let Some(status) = filter.status {
            rows = rows.filter(token_audit_log::status.eq(status));
        }
        if let Some(since) = filter.since {
            rows = rows.filter(token_audit_log::created_at.ge(since));
        }
        if let Some(until) = filter.until {
            rows = rows.filter(token_audit_log::created_at.lt(until));
        }
        newest_first!(rows, token_audit_log, audit_id, page).load(conn)
    }

    /// The row's position in [`list`](Self::list).
    #[must_use]
    pub fn cursor(&self) -> Cursor<AuditId> {
        Cursor {
            created_at: self.created_at,
            id: self.audit_id,
        }
    }

    /// Deletes up to `limit` rows older than 90 days, oldest first, and returns their number.
    /// Repeat it while that is `limit`.
    ///
    /// Skips rows that another call is deleting. Needs the right to execute
    /// `cleanup_old_token_audit_logs`, which `app_admin` has and `app_user` hasn't.
    pub fn purge(conn: &mut PgConnection, limit: u16) -> QueryResult<i64> {
        diesel::select(cleanup_old_token_audit_logs(i32::from(limit))).get_result(conn)
    }

    /// Makes the partitions of this month and the next three, moves rows that had none to that of
    /// their month, and drops months that are wholly past 90 days. Run it once a day, outside a
    /// transaction; with nothing to do, nobody waits for it.
    ///
    /// One statement. It locks the whole log for the time that it works: milliseconds, unless rows
    /// are to be moved. If others hold the log for 2 s, it fails with the server's lock timeout
    /// (SQLSTATE 55P03) and changes nothing: call it again later. Needs the right to execute
    /// `maintain_token_audit_log`, which `app_admin` has and `app_user` hasn't.
    pub fn maintain(conn: &mut PgConnection) -> QueryResult<Maintained> {
        diesel::sql_query("SELECT * FROM maintain_token_audit_log()").get_result(conn)
    }
}
