//! The SQL of a migration, without running it.

use std::any::Any;

use diesel::connection::{BoxableConnection, SimpleConnection};
use diesel::migration::{Migration, Result};
use diesel::pg::Pg;
use diesel::result::QueryResult;

use super::Direction;

/// A connection to nowhere, which keeps what it is told.
struct Recorder(String);

impl SimpleConnection for Recorder {
    fn batch_execute(&mut self, query: &str) -> QueryResult<()> {
        self.0.push_str(query);
        Ok(())
    }
}

impl BoxableConnection<Pg> for Recorder {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// Fails if there is no file for `direction`.
pub(super) fn sql(migration: &dyn Migration<Pg>, direction: Direction) -> Result<String> {
    let mut recorder = Recorder(String::new());
    match direction {
        Direction::Up => migration.run(&mut recorder)?,
        Direction::Down => migration.revert(&mut recorder)?,
    }
    Ok(recorder.0)
}
