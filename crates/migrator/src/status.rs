//! Which migrations are applied, and which are pending.

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::{Preflight, Refusal};

/// State of a database's migrations.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// Migrations of this program, oldest first.
    pub migrations: Vec<MigrationStatus>,
    /// Applied migrations that this program doesn't have, oldest first.
    pub unknown: Vec<Applied>,
    /// Why a file of a pending migration can't run.
    #[serde(skip)]
    pub(crate) unfit: Option<Refusal>,
}

/// A migration of this program. `name` is its folder's, such as `003_add_plans`. `applied_at` is
/// UTC, and `None` while the migration is pending.
#[expect(missing_docs, reason = "the names say it")]
#[derive(Debug, Clone, Serialize)]
pub struct MigrationStatus {
    pub version: String,
    pub name: String,
    pub applied_at: Option<DateTime<Utc>>,
}

/// A row of `__diesel_schema_migrations`. `applied_at` is UTC.
#[expect(missing_docs, reason = "the names say it")]
#[derive(Debug, Clone, Serialize)]
pub struct Applied {
    pub version: String,
    pub applied_at: DateTime<Utc>,
}

/// A migration that [`Runner::run`](crate::Runner::run) would apply. `sql` is its `up.sql`.
#[expect(missing_docs, reason = "the names say it")]
#[derive(Debug, Clone, Serialize)]
pub struct Planned {
    pub version: String,
    pub name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub sql: String,
}

/// What [`Runner::run`](crate::Runner::run) would do.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// Migrations in the order they would run.
    pub migrations: Vec<Planned>,
    /// What the project's [`Hook`](crate::Hook) finds.
    #[serde(flatten)]
    pub preflight: Preflight,
}

impl Status {
    /// Returns the names of the pending migrations, oldest first.
    pub fn pending(&self) -> impl Iterator<Item = &str> {
        self.migrations
            .iter()
            .filter(|migration| migration.applied_at.is_none())
            .map(|migration| &*migration.name)
    }

    pub(crate) fn applied(&self) -> impl Iterator<Item = &MigrationStatus> {
        let applied = |one: &&MigrationStatus| one.applied_at.is_some();
        self.migrations.iter().filter(applied)
    }

    /// Returns why [`Runner::run`](crate::Runner::run) would refuse, if it would.
    pub fn refusal(&self) -> Option<Refusal> {
        let is_applied = |migration: &&MigrationStatus| migration.applied_at.is_some();
        let pending = self.migrations.iter().find(|one| !is_applied(one));
        let applied = self.migrations.iter().rfind(is_applied);
        let unknown = self.unknown_after(None);
        if unknown.len() > self.newer().len() || (pending.is_some() && !unknown.is_empty()) {
            return Some(Refusal::Unknown(unknown));
        }
        let pair = pending.zip(applied);
        let out_of_order = pair.filter(|(pending, applied)| pending.version < applied.version);
        let out_of_order = out_of_order.map(|(pending, applied)| Refusal::OutOfOrder {
            pending: pending.name.clone(),
            applied: applied.name.clone(),
        });
        out_of_order.or_else(|| self.unfit.clone())
    }

    /// Returns the applied versions that are newer than every migration of this program.
    pub fn newer(&self) -> Vec<String> {
        self.unknown_after(self.migrations.last().map(|migration| &migration.version))
    }

    pub(crate) fn unknown_after(&self, version: Option<&String>) -> Vec<String> {
        let unknown = self.unknown.iter().map(|unknown| &unknown.version);
        let after = unknown.filter(|unknown| Some(*unknown) > version);
        after.cloned().collect()
    }
}
