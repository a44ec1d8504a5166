//! The migrations, and this crate's settings for the migration runner.
//!
//! [`MIGRATIONS`] works with Diesel's `MigrationHarness`. With the feature `migrator`, `runner`
//! returns a runner for deploys: it locks, reports, verifies and reverts.

use diesel_migrations::{EmbeddedMigrations, embed_migrations};

#[cfg(feature = "migrator")]
mod archive;

#[cfg(feature = "migrator")]
pub use self::configured::{PROGRAM, newest, runner};
#[cfg(feature = "migrator")]
pub use diesel_pg_migrator::*;

/// The migrations, compiled in.
pub const MIGRATIONS: EmbeddedMigrations = embed_migrations!("migrations");

#[cfg(feature = "migrator")]
mod configured {
    use diesel::migration::MigrationSource;
    use diesel::pg::Pg;
    use diesel_pg_migrator::{Error, Runner};

    use super::MIGRATIONS;
    use super::archive::Archive;

    /// What the migrations build.
    pub(super) const CATALOGUE: &str = include_str!("../migrations/catalogue.txt");

    /// Name of the binary.
    pub const PROGRAM: &str = "bruhmcp-db";

    /// Returns the name of the newest of [`MIGRATIONS`].
    pub fn newest() -> Option<String> {
        let migrations = MigrationSource::<Pg>::migrations(&MIGRATIONS).ok()?;
        migrations.iter().map(|one| one.name().to_string()).max()
    }

    /// Returns a runner of [`MIGRATIONS`] for the database at `url`. Connects only when it is used.
    ///
    /// ```no_run
    /// let report = bruhmcp_db::migrations::runner("postgresql://owner@db.example/bruhmcp")?.run()?;
    /// for step in report.steps {
    ///     println!("{} {:?}", step.name, step.duration);
    /// }
    /// # Ok::<(), bruhmcp_db::migrations::Error>(())
    /// ```
    ///
    /// With [`schema`](Runner::schema) it is the runner of a cell.
    ///
    /// # Errors
    /// [`Error::Url`].
    pub fn runner(url: &str) -> Result<Runner, Error> {
        Ok(Runner::new(PROGRAM, url, MIGRATIONS)?
            .expect_catalogue(CATALOGUE)
            .roles(
                &["app_admin", "app_user"],
                include_str!("../migrations/roles.sql"),
            )
            .maintenance("SELECT * FROM maintain_token_audit_log()")
            .secret_tables(&["auth_tokens", "mcp_credentials"])
            .hook(Archive::default()))
    }
}
