//! The migrations of this crate and what applies them.

use diesel::PgConnection;
use diesel::migration::Result;
use diesel_migrations::{EmbeddedMigrations, MigrationHarness, embed_migrations};

/// Migrations 000 to 007, compiled in.
pub const MIGRATIONS: EmbeddedMigrations = embed_migrations!();

/// Applies all pending migrations on `conn`, each in a transaction of its own.
///
/// # Errors
///
/// What the first failing migration reports; those before it stay applied.
pub fn run(conn: &mut PgConnection) -> Result<()> {
    conn.run_pending_migrations(MIGRATIONS).map(drop)
}
