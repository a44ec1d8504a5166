//! A directory of cells: which schema has the user with an email address, an instance, or an id of
//! a payment gateway.
//!
//! The directory stands outside the cells, in a schema of its own, and may be in another database.
//! So no transaction spans it and a cell. What keeps them together is an order: an entry is
//! reserved before the row is written, and removed after the row is gone. After a crash in between
//! there may be an entry without its row, never a row without its entry, and the same step can be
//! done again.
//!
//! `cargo run --example directory --features migrator` runs it in a database of its own, on a
//! private server or on the server of `DATABASE_URL`.

use std::collections::BTreeMap;
use std::error::Error;

use bruhmcp_db::Sealed;
use bruhmcp_db::enums::AuthType;
use bruhmcp_db::ids::{InstanceId, UserId};
use bruhmcp_db::migrations;
use bruhmcp_db::models::{
    McpInstance, McpService, NewMcpCredential, NewMcpInstance, NewMcpService, NewUser, User,
    UserChangeset, canonical_email,
};
use bruhmcp_devdb::Server;
use diesel::connection::SimpleConnection;
use diesel::prelude::*;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const SCHEMA: &str = "
    CREATE SCHEMA directory;
    CREATE TABLE directory.cells (
        name    text    PRIMARY KEY CHECK (name ~ '^[a-z][a-z0-9_]{0,62}$'),
        -- Whether new users are placed here.
        is_open boolean NOT NULL DEFAULT true
    );
    CREATE TABLE directory.entries (
        kind    text NOT NULL CHECK (kind IN ('email', 'instance', 'gateway')),
        key     text NOT NULL CHECK (key <> ''),
        user_id uuid NOT NULL,
        cell    text NOT NULL REFERENCES directory.cells,
        PRIMARY KEY (kind, key)
    );
    CREATE INDEX entries_user_id_idx ON directory.entries (user_id);
    CREATE INDEX entries_cell_idx ON directory.entries (cell)";

diesel::table! {
    directory.cells (name) {
        name -> Text,
        is_open -> Bool,
    }
}

diesel::table! {
    directory.entries (kind, key) {
        kind -> Text,
        key -> Text,
        user_id -> Uuid,
        cell -> Text,
    }
}

diesel::allow_tables_to_appear_in_same_query!(cells, entries);

/// By what a cell is found.
enum Key<'a> {
    /// In its canonical form.
    Email(&'a str),
    Instance(InstanceId),
    /// A customer's or subscription's id.
    Gateway(&'a str),
}

impl Key<'_> {
    fn columns(&self) -> (&'static str, String) {
        match self {
            Self::Email(email) => ("email", (*email).to_owned()),
            Self::Instance(id) => ("instance", id.to_string()),
            Self::Gateway(id) => ("gateway", (*id).to_owned()),
        }
    }
}

#[derive(Debug, PartialEq, Eq, Queryable)]
struct Entry {
    user_id: UserId,
    cell: String,
}

struct Directory(PgConnection);

impl Directory {
    fn find(&mut self, key: &Key<'_>) -> QueryResult<Option<Entry>> {
        entries::table
            .find(key.columns())
            .select((entries::user_id, entries::cell))
            .first(&mut self.0)
            .optional()
    }

    /// Returns the open cell with the fewest users.
    fn emptiest(&mut self) -> QueryResult<String> {
        let users = entries::kind.eq("email").and(entries::cell.eq(cells::name));
        cells::table
            .left_join(entries::table.on(users))
            .filter(cells::is_open)
            .group_by(cells::name)
            .order((diesel::dsl::count(entries::key.nullable()), cells::name))
            .select(cells::name)
            .first(&mut self.0)
    }

    /// Reserves a key for a user, and returns who has it: this user, or the one who came first.
    fn reserve(&mut self, key: &Key<'_>, user: UserId, cell: &str) -> QueryResult<Entry> {
        let (kind, text) = key.columns();
        diesel::insert_into(entries::table)
            .values((
                entries::kind.eq(kind),
                entries::key.eq(text),
                entries::user_id.eq(user),
                entries::cell.eq(cell),
            ))
            .on_conflict_do_nothing()
            .execute(&mut self.0)?;
        self.find(key)?.ok_or(diesel::NotFound)
    }

    fn release(&mut self, key: &Key<'_>) -> QueryResult<usize> {
        diesel::delete(entries::table.find(key.columns())).execute(&mut self.0)
    }

    /// Removes all keys of a user, after `User::anonymise`.
    fn forget(&mut self, user: UserId) -> QueryResult<usize> {
        diesel::delete(entries::table.filter(entries::user_id.eq(user))).execute(&mut self.0)
    }
}

/// One connection for each cell; in a service, one pool for each. A connection never changes its
/// cell: it knows the numbers of the enum types of this one.
struct Cells {
    url: String,
    connections: BTreeMap<String, PgConnection>,
}

impl Cells {
    fn get(&mut self, cell: &str) -> Result<&mut PgConnection> {
        if !self.connections.contains_key(cell) {
            // Through PgBouncer: an entry with a connect_query, or a role with a search_path.
            let separator = if self.url.contains('?') { '&' } else { '?' };
            let url = format!("{}{separator}options=-csearch_path%3D{cell}", self.url);
            let connection = PgConnection::establish(&url)?;
            self.connections.insert(cell.to_owned(), connection);
        }
        self.connections
            .get_mut(cell)
            .ok_or_else(|| "the connection was just made".into())
    }
}

fn main() -> Result {
    let server = Server::from_env()?;
    let database = server.create_database()?;
    let url = database.url();
    let mut directory = Directory(PgConnection::establish(&url)?);
    directory.0.batch_execute(SCHEMA)?;
    let mut cells = Cells {
        url,
        connections: BTreeMap::new(),
    };
    for cell in ["c1", "c2"] {
        add_cell(&mut directory, &mut cells, cell)?;
    }

    println!("\nSign-up");
    for email in [
        "asha@example.in",
        "ravi@example.in",
        "mei@example.in",
        "Asha@Example.in",
    ] {
        sign_up(&mut directory, &mut cells, email)?;
    }

    println!("\nRequests");
    let entry = directory.find(&Key::Email("ravi@example.in"))?;
    let Entry { user_id, cell } = entry.ok_or("ravi has signed up")?;
    let conn = cells.get(&cell)?;
    let user = User::find_active_by_email(conn, "ravi@example.in")?.ok_or("ravi is active")?;
    println!("  login: {} is in {cell}", user.email);

    let instance = create_instance(&mut directory, &mut cells, user_id, &cell)?;
    let entry = directory.find(&Key::Instance(instance))?;
    let cell = entry.ok_or("the instance was reserved")?.cell;
    let counted = McpInstance::record_call(cells.get(&cell)?, instance, None)?;
    println!(
        "  call: the instance is in {cell}, {}",
        said(counted.is_ok())
    );

    link_gateway(&mut directory, &mut cells, user_id, &cell, "cust_1")?;
    let entry = directory.find(&Key::Gateway("cust_1"))?;
    println!(
        "  webhook: cust_1 is in {}",
        entry.ok_or("cust_1 was reserved")?.cell
    );

    println!("\nErasure");
    User::anonymise(cells.get(&cell)?, user_id)?;
    let forgotten = directory.forget(user_id)?;
    let is_left = directory.find(&Key::Email("ravi@example.in"))?.is_some();
    println!(
        "  {forgotten} entries removed, the address is {}",
        if is_left { "left" } else { "free" }
    );
    Ok(())
}

fn said(is_counted: bool) -> &'static str {
    if is_counted { "counted" } else { "refused" }
}

/// Makes a schema, migrates it and opens it for new users. The schema comes first, so that no user
/// is placed where no tables are.
fn add_cell(directory: &mut Directory, cells: &mut Cells, cell: &str) -> Result {
    // On Citus, with citus.enable_schema_based_sharding.
    directory
        .0
        .batch_execute(&format!("CREATE SCHEMA {cell}"))?;
    let report = migrations::runner(&cells.url)?.schema(cell).run()?;
    println!("{cell}: {} migrations", report.steps.len());
    let service = NewMcpService::new("figma", 4001, AuthType::ApiKey);
    McpService::register(cells.get(cell)?, &service)?;
    diesel::insert_into(cells::table)
        .values(cells::name.eq(cell))
        .execute(&mut directory.0)?;
    Ok(())
}

/// Reserves the address, then inserts the user. An entry whose user is missing is of a sign-up that
/// did not finish: whoever signs up with the address again finishes it, under the reserved id.
fn sign_up(directory: &mut Directory, cells: &mut Cells, email: &str) -> Result {
    let email = canonical_email(email)?;
    let cell = directory.emptiest()?;
    let Entry { user_id, cell } = directory.reserve(&Key::Email(&email), UserId::new(), &cell)?;
    let conn = cells.get(&cell)?;
    if User::find(conn, user_id)?.is_some() {
        println!("  {email} is taken");
        return Ok(());
    }
    let new = NewUser {
        id: Some(user_id),
        ..NewUser::new("A", "", &email)
    };
    User::sign_up(conn, &new)?;
    println!("  {email} is placed in {cell}");
    Ok(())
}

fn create_instance(
    directory: &mut Directory,
    cells: &mut Cells,
    user: UserId,
    cell: &str,
) -> Result<InstanceId> {
    let conn = cells.get(cell)?;
    let service = McpService::find_by_name(conn, "figma")?.ok_or("figma is registered")?;
    let new = NewMcpInstance::new(user, service.mcp_service_id);
    let instance = new.instance_id;
    directory.reserve(&Key::Instance(instance), user, cell)?;
    // In a service the key is sealed: see the quickstart.
    let sealed = Sealed::from_ciphertext(vec![2; 42])?;
    let key = NewMcpCredential::sealed_api_key(instance, sealed);
    if let Err(error) = McpInstance::create(conn, &new, &key) {
        directory.release(&Key::Instance(instance))?;
        return Err(error.into());
    }
    Ok(instance)
}

fn link_gateway(
    directory: &mut Directory,
    cells: &mut Cells,
    user: UserId,
    cell: &str,
    customer: &str,
) -> Result {
    let entry = directory.reserve(&Key::Gateway(customer), user, cell)?;
    if entry.user_id != user {
        return Err("another user has this customer id".into());
    }
    let changes = UserChangeset {
        razorpay_customer_id: Some(Some(customer)),
        ..UserChangeset::default()
    };
    User::update(cells.get(cell)?, user, &changes)?;
    Ok(())
}
