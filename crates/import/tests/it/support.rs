//! Databases of the old system, migrated but not imported.

use std::sync::LazyLock;

use bruhmcp_db::crypto::KeyRing;
use bruhmcp_db::import::{self, Check, ImportError, Options, Report, System};
use bruhmcp_db::migrations::MIGRATIONS;
use bruhmcp_devdb::{Database, Server};
use diesel::connection::SimpleConnection;
use diesel::deserialize::FromSqlRow;
use diesel::dsl::sql;
use diesel::pg::{Pg, PgConnection};
use diesel::prelude::*;
use diesel::query_builder::QueryId;
use diesel::sql_types::{SingleValue, SqlType};
use diesel_migrations::MigrationHarness;

static SERVER: LazyLock<Server> =
    LazyLock::new(|| Server::from_env().unwrap_or_else(|error| panic!("{error}")));

/// The tables of the old system, in its two shapes.
pub(crate) const SHAPES: [&str; 2] = [include_str!("old_a.sql"), include_str!("old_b.sql")];

pub(crate) struct Old {
    pub(crate) database: Database,
    pub(crate) conn: PgConnection,
}

impl Old {
    /// A database of the old system with these rows, after the migrations.
    pub(crate) fn new(shape: &str, rows: &str) -> Self {
        let mut old = Self::before_migrations(shape, rows);
        old.migrate();
        old
    }

    pub(crate) fn copy_of(template: &Database) -> Self {
        let database = SERVER.create_database_from(template).unwrap();
        let conn = PgConnection::establish(&database.url()).unwrap();
        Self { database, conn }
    }

    pub(crate) fn before_migrations(shape: &str, rows: &str) -> Self {
        let database = SERVER.create_database().unwrap();
        let mut conn = PgConnection::establish(&database.url()).unwrap();
        conn.batch_execute(shape).unwrap();
        if !rows.is_empty() {
            conn.batch_execute(rows).unwrap();
        }
        Self { database, conn }
    }

    pub(crate) fn server(&self) -> &'static Server {
        &SERVER
    }

    /// Another session of the owner.
    pub(crate) fn other(&self) -> PgConnection {
        PgConnection::establish(&self.database.url()).unwrap()
    }

    pub(crate) fn connect_again(&mut self) {
        self.conn = self.other();
    }

    pub(crate) fn migrate(&mut self) {
        self.conn.run_pending_migrations(MIGRATIONS).unwrap();
    }

    pub(crate) fn preflight(&mut self, options: &Options) -> Result<Report, ImportError> {
        import::preflight(&mut self.conn, &System::new(None), options)
    }

    pub(crate) fn import(&mut self, options: &Options) -> Result<Report, ImportError> {
        let ring = ring();
        let system = System::new(Some(&ring));
        import::import(&mut self.conn, &system, options, false, &mut |_| {})
    }

    pub(crate) fn check(&mut self) -> Check {
        let ring = ring();
        import::check(&mut self.conn, &System::new(Some(&ring))).unwrap()
    }

    /// Imports with the default options, checks that the preflight said the same, and returns the
    /// report.
    pub(crate) fn imported(shape: &str, rows: &str) -> (Self, Report) {
        let mut old = Self::new(shape, rows);
        let options = Options::default();
        let promised = old.preflight(&options).unwrap();
        let report = old.import(&options).unwrap();
        assert_eq!(report.tables, promised.tables);
        let check = old.check();
        assert!(check.holds(), "{:?}", check.differences);
        (old, report)
    }

    /// The value of an SQL expression.
    pub(crate) fn value<ST, T>(&mut self, expression: &str) -> T
    where
        ST: SqlType + SingleValue + QueryId + 'static,
        Pg: diesel::sql_types::HasSqlType<ST>,
        T: FromSqlRow<ST, Pg> + 'static,
    {
        diesel::select(sql::<ST>(expression))
            .get_result(&mut self.conn)
            .unwrap()
    }

    pub(crate) fn text(&mut self, expression: &str) -> String {
        self.value::<diesel::sql_types::Text, String>(&format!(
            "coalesce(({expression})::text, 'NULL')"
        ))
    }
}

pub(crate) fn ring() -> KeyRing {
    KeyRing::new([(1, &[7; 32][..])]).unwrap()
}

/// The keys of the rows of a table that have this reason.
pub(crate) fn keys(report: &Report, table: &str, reason: &str) -> Vec<String> {
    let table = report.tables.iter().find(|found| found.table == table);
    let reason = table.unwrap().reasons.get(reason);
    let mut keys = reason.map_or_else(Vec::new, |reason| reason.keys.clone());
    keys.sort();
    keys
}

/// A key that tells its number.
pub(crate) fn id(number: u32) -> String {
    format!("00000000-0000-4000-8000-{number:012}")
}

/// A user with the number as key.
pub(crate) fn user(shape: &str, number: u32, email: &str) -> String {
    let id = id(number);
    if shape == SHAPES[0] {
        format!(
            "INSERT INTO users (id, first_name, last_name, email) VALUES ('{id}', 'Ada', '', '{email}');"
        )
    } else {
        let hash = "$2b$10$abcdefghijklmnopqrstuuABCDEFGHIJKLMNOPQRSTUVWXYZ01234";
        format!(
            "INSERT INTO users (id, first_name, last_name, email, password_hash)
             VALUES ('{id}', 'Ada', '', '{email}', '{hash}');"
        )
    }
}
