//! The migrations that a program has.

use std::any::Any;

use diesel::connection::{BoxableConnection, SimpleConnection};
use diesel::migration::{self, Migration, MigrationSource};
use diesel::pg::Pg;
use diesel::result::QueryResult;

use crate::status::{Applied, MigrationStatus, Planned, Status};
use crate::{Direction, Error, Extent, Refusal, control};

/// The migrations of a source, oldest first.
pub(crate) struct Migrations(Vec<Known>);

pub(crate) struct Known {
    pub(crate) version: String,
    pub(crate) name: String,
    pub(crate) migration: Box<dyn Migration<Pg>>,
}

impl Migrations {
    pub(crate) fn load(source: &dyn MigrationSource<Pg>) -> Result<Self, Error> {
        let migrations = source.migrations().map_err(unreadable)?;
        let known = migrations.into_iter().map(|migration| Known {
            version: migration.name().version().to_string(),
            name: migration.name().to_string(),
            migration,
        });
        let mut known: Vec<Known> = known.collect();
        known.sort_by(|one, other| one.version.cmp(&other.version));
        let mut pairs = known.windows(2);
        if let Some([one, other]) = pairs.find(|pair| pair[0].version == pair[1].version) {
            let (one, other) = (one.name.clone(), other.name.clone());
            return Err(Refusal::DuplicateVersion(one, other).into());
        }
        Ok(Self(known))
    }

    pub(crate) fn get(&self, index: usize) -> &Known {
        &self.0[index]
    }

    pub(crate) fn names(&self) -> Vec<&str> {
        self.0.iter().map(|known| &*known.name).collect()
    }

    /// Compares the migrations with the applied ones.
    pub(crate) fn status(&self, mut ledger: crate::session::Ledger) -> Status {
        let migrations = self.0.iter().map(|known| MigrationStatus {
            version: known.version.clone(),
            name: known.name.clone(),
            applied_at: ledger.remove(&known.version),
        });
        let migrations = migrations.collect();
        let unknown = ledger.into_iter().map(|(version, applied_at)| Applied {
            version,
            applied_at,
        });
        let mut status = Status {
            migrations,
            unknown: unknown.collect(),
            unfit: None,
        };
        let is_pending = |index: &usize| status.migrations[*index].applied_at.is_none();
        let pending = (0..self.0.len()).filter(is_pending);
        let files = pending.flat_map(|index| [(index, Direction::Up), (index, Direction::Down)]);
        status.unfit = self.check(files).err();
        status
    }

    /// Refuses the first of these files that would begin or end the runner's transaction.
    pub(crate) fn check(
        &self,
        files: impl IntoIterator<Item = (usize, Direction)>,
    ) -> Result<(), Refusal> {
        for (index, direction) in files {
            let known = &self.0[index];
            if !known.migration.metadata().run_in_transaction() {
                continue;
            }
            // A file that can't be read is reported when it is needed.
            let sql = sql(&*known.migration, direction).unwrap_or_default();
            if let Some((statement, line)) = control::transaction_control(&sql) {
                return Err(Refusal::TransactionControl {
                    name: known.name.clone(),
                    direction,
                    statement,
                    line,
                });
            }
        }
        Ok(())
    }

    /// Returns the indexes of the pending migrations up to version `to`, oldest first.
    pub(crate) fn pending(&self, status: &Status, to: Option<&str>) -> Result<Vec<usize>, Error> {
        if let Some(refusal) = status.refusal() {
            return Err(refusal.into());
        }
        let end = match to {
            None => self.0.len(),
            Some(to) => self.index(to)? + 1,
        };
        let is_pending = |index: &usize| status.migrations[*index].applied_at.is_none();
        Ok((0..end).filter(is_pending).collect())
    }

    /// Returns the indexes of the migrations that are not applied, oldest first, whatever their
    /// order.
    pub(crate) fn missing(&self, status: &Status) -> Result<Vec<usize>, Error> {
        if !status.unknown.is_empty() {
            return Err(Refusal::Unknown(status.unknown_after(None)).into());
        }
        let is_missing = |index: &usize| status.migrations[*index].applied_at.is_none();
        Ok((0..self.0.len()).filter(is_missing).collect())
    }

    /// Returns the indexes of the migrations to revert, newest first.
    pub(crate) fn to_revert(&self, status: &Status, extent: &Extent) -> Result<Vec<usize>, Error> {
        let (begin, most) = match extent {
            Extent::To(to) => (self.index(to)? + 1, usize::MAX),
            Extent::Last(most) => (0, *most),
            Extent::All => (0, usize::MAX),
        };
        let applied: Vec<usize> = (begin..self.0.len())
            .rev()
            .filter(|&index| status.migrations[index].applied_at.is_some())
            .take(most)
            .collect();
        let Some(&oldest) = applied.last() else {
            return Ok(applied);
        };
        // An unknown newer migration may build on the ones to revert.
        let newer = status.unknown_after(Some(&self.0[oldest].version));
        if !newer.is_empty() {
            return Err(Refusal::Unknown(newer).into());
        }
        for &index in &applied {
            let Known {
                name, migration, ..
            } = &self.0[index];
            if sql(&**migration, Direction::Down).is_err() {
                return Err(Refusal::NoDown(name.clone()).into());
            }
        }
        self.check(applied.iter().map(|&index| (index, Direction::Down)))?;
        Ok(applied)
    }

    pub(crate) fn plan(&self, index: usize) -> Result<Planned, Error> {
        let known = &self.0[index];
        Ok(Planned {
            version: known.version.clone(),
            name: known.name.clone(),
            sql: sql(&*known.migration, Direction::Up).map_err(unreadable)?,
        })
    }

    fn index(&self, version: &str) -> Result<usize, Error> {
        let mut known = self.0.iter();
        let index = known.position(|known| known.version == version);
        index.ok_or_else(|| Refusal::NoSuchVersion(version.to_owned()).into())
    }
}

fn unreadable(error: Box<dyn std::error::Error + Send + Sync>) -> Error {
    Error::Source(error.to_string())
}

/// A connection that records SQL instead of running it.
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

/// Returns the SQL of a migration. Fails if it has none for `direction`.
fn sql(migration: &dyn Migration<Pg>, direction: Direction) -> migration::Result<String> {
    let mut recorder = Recorder(String::new());
    match direction {
        Direction::Up => migration.run(&mut recorder)?,
        Direction::Down => migration.revert(&mut recorder)?,
    }
    Ok(recorder.0)
}
