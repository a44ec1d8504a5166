//! Pages of lists that are sorted newest first.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// Which rows of a list to return, newest first.
///
/// ```
/// # use bruhmcp_db::Page;
/// # use bruhmcp_db::models::User;
/// # fn all(conn: &mut diesel::PgConnection) -> diesel::QueryResult<()> {
/// let mut page = Page::first(100);
/// loop {
///     let users = User::list(conn, page)?;
///     let Some(last) = users.last() else { break };
///     page = Page::after(last.cursor(), 100);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page<Id> {
    /// The last row of the page before; `None` starts with the newest row.
    pub after: Option<Cursor<Id>>,
    /// The number of rows, at most [`MAX_LIMIT`](Page::MAX_LIMIT): a larger limit is lowered to it.
    pub limit: u16,
}

impl<Id> Page<Id> {
    /// The largest number of rows in a page.
    pub const MAX_LIMIT: u16 = 1000;

    /// The newest `limit` rows.
    #[must_use]
    pub fn first(limit: u16) -> Self {
        Self { after: None, limit }
    }

    /// The `limit` rows that follow the row at `cursor`.
    #[must_use]
    pub fn after(cursor: Cursor<Id>, limit: u16) -> Self {
        Self {
            after: Some(cursor),
            limit,
        }
    }

    pub(crate) fn limit(&self) -> i64 {
        self.limit.min(Self::MAX_LIMIT).into()
    }
}

/// The position of a row in a list, given by the row's `cursor()`.
///
/// Unlike an `OFFSET`, it costs the same on every page, and rows inserted or deleted meanwhile move
/// nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor<Id> {
    /// The row's `created_at`.
    pub created_at: DateTime<Utc>,
    /// The row's key, which orders rows with the same `created_at`.
    pub id: Id,
}

/// Restricts a query to a [`Page`] and sorts it newest first by `created_at` and the table's key.
///
/// `created_at <= x AND (created_at < x OR id < y)` means `(created_at, id) < (x, y)`, which Diesel
/// can't write. The first half is what an index on `created_at` can start from. Without a cursor,
/// `x` is later than any row: the statement is the same on every page, so it is prepared once.
macro_rules! newest_first {
    ($query:expr, $table:ident, $key:ident, $page:expr) => {{
        let page = $page;
        let before = page
            .after
            .as_ref()
            .map_or(chrono::DateTime::<chrono::Utc>::MAX_UTC, |cursor| {
                cursor.created_at
            });
        $query
            .filter(
                $table::created_at.le(before).and(
                    $table::created_at.lt(before).or($table::$key
                        .nullable()
                        .lt(page.after.map(|cursor| cursor.id))),
                ),
            )
            .order(($table::created_at.desc(), $table::$key.desc()))
            .limit(page.limit())
    }};
}
pub(crate) use newest_first;
