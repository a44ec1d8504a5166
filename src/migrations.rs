//! The migrations, and this crate's settings for the migration runner.
//!
//! [`MIGRATIONS`] works with Diesel's `MigrationHarness`. With the feature `migrator`, `runner`
//! returns a runner for deploys: it locks, reports, verifies and reverts.

use diesel_migrations::{EmbeddedMigrations, embed_migrations};

#[cfg(feature = "migrator")]
pub use self::configured::{PROGRAM, runner};
#[cfg(feature = "migrator")]
pub use diesel_pg_migrator::*;

/// The migrations, compiled in.
pub const MIGRATIONS: EmbeddedMigrations = embed_migrations!("migrations");

#[cfg(feature = "migrator")]
mod configured {
    use diesel::QueryResult;
    use diesel::dsl::sql;
    use diesel::pg::PgConnection;
    use diesel::prelude::*;
    use diesel::sql_types::Text;
    use diesel_pg_migrator::{Error, Hook, Note, Runner};

    use super::MIGRATIONS;

    /// Name of the binary.
    pub const PROGRAM: &str = "bruhmcp-db";

    /// Key of the advisory lock: "bruhmcpd" in ASCII.
    const LOCK_KEY: i64 = i64::from_be_bytes(*b"bruhmcpd");

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
    /// # Errors
    /// [`Error::Url`].
    pub fn runner(url: &str) -> Result<Runner, Error> {
        Ok(Runner::new(PROGRAM, url, MIGRATIONS)?
            .lock_key(LOCK_KEY)
            .expect_catalogue(include_str!("../migrations/catalogue.txt"))
            .roles(
                &["app_admin", "app_user"],
                include_str!("../migrations/roles.sql"),
            )
            .secret_tables(&["auth_tokens", "mcp_credentials"])
            .hook(Archive::default()))
    }

    /// Reports what 000 moved to the schema `bruhmcp_archive`.
    #[derive(Default)]
    struct Archive {
        existed: bool,
    }

    impl Hook for Archive {
        fn before(&mut self, connection: &mut PgConnection) -> QueryResult<()> {
            self.existed = !archived(connection)?.is_empty();
            Ok(())
        }

        fn after(&mut self, connection: &mut PgConnection) -> QueryResult<Vec<Note>> {
            let items = archived(connection)?;
            if self.existed || items.is_empty() {
                return Ok(Vec::new());
            }
            let title = "Moved to the schema bruhmcp_archive".to_owned();
            Ok(vec![Note { title, items }])
        }
    }

    fn archived(connection: &mut PgConnection) -> QueryResult<Vec<String>> {
        sql::<Text>(
            "SELECT CASE c.relkind WHEN 'v' THEN 'view ' WHEN 'm' THEN 'materialized view '
                        WHEN 'S' THEN 'sequence ' WHEN 'f' THEN 'foreign table ' ELSE 'table '
                    END || c.relname AS object
             FROM pg_class c
             WHERE c.relnamespace = to_regnamespace('bruhmcp_archive')
                 AND c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
             UNION ALL
             SELECT 'type ' || t.typname
             FROM pg_type t
             WHERE t.typnamespace = to_regnamespace('bruhmcp_archive') AND t.typtype IN ('e', 'd')
             UNION ALL
             SELECT 'function ' || p.proname
             FROM pg_proc p
             WHERE p.pronamespace = to_regnamespace('bruhmcp_archive')
             ORDER BY object",
        )
        .load(connection)
    }
}
