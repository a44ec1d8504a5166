//! Statements that the server parses and plans once per connection.

use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::query_builder::{AstPass, Query, QueryFragment, QueryId};
use diesel::sql_types::Integer;

/// Prepares statements that Diesel would send anew each time.
pub(crate) trait Prepare: QueryFragment<Pg> + Sized {
    /// Lets Diesel prepare the statement and keep it for the connection's next calls.
    ///
    /// By itself Diesel caches no UPDATE, no DO UPDATE, nothing with `sql()` and no `sql_query`,
    /// because their text might have any number of forms. Call this where it has few. Diesel finds
    /// the statement by its text and the types of its values, so none is taken for another.
    ///
    /// The server keeps each form until the connection ends: don't prepare a changeset with many
    /// optional fields. Name the columns that a statement returns: one with `RETURNING *` fails on
    /// open connections once a migration has added a column.
    fn prepared(self) -> Prepared<Self> {
        Prepared(self)
    }
}

impl<Q: QueryFragment<Pg>> Prepare for Q {}

/// A statement after [`prepared`](Prepare::prepared).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Prepared<Q>(Q);

impl<Q: QueryFragment<Pg>> QueryFragment<Pg> for Prepared<Q> {
    fn walk_ast<'b>(&'b self, out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        self.0.walk_ast(out)
    }

    // The default asks the statement.
    fn is_safe_to_cache_prepared(&self, _: &Pg) -> QueryResult<bool> {
        Ok(true)
    }
}

/// Without an id, the key in Diesel's cache is the text.
impl<Q> QueryId for Prepared<Q> {
    type QueryId = ();

    const HAS_STATIC_QUERY_ID: bool = false;
}

impl<Q: Query> Query for Prepared<Q> {
    type SqlType = Q::SqlType;
}

impl<Q> RunQueryDsl<PgConnection> for Prepared<Q> {}

impl<Q: QueryFragment<Pg>> Prepared<Q> {
    /// Runs an INSERT, UPDATE or DELETE and returns the number of rows.
    ///
    /// Diesel's `execute` sends it unprepared: it asks a reference, which passes the question on to
    /// the statement.
    pub(crate) fn execute(self, conn: &mut PgConnection) -> QueryResult<usize> {
        let rows: Vec<i32> = Prepared(Counted(self.0)).load(conn)?;
        Ok(rows.len())
    }
}

/// Returns a row for each row that the statement changes.
struct Counted<Q>(Q);

impl<Q: QueryFragment<Pg>> QueryFragment<Pg> for Counted<Q> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        self.0.walk_ast(out.reborrow())?;
        out.push_sql(" RETURNING 1");
        Ok(())
    }
}

impl<Q> Query for Counted<Q> {
    type SqlType = Integer;
}
