//! A small HTTP service to start from: accounts, instances, OAuth and the payment gateway's
//! webhook.
//!
//! It has one thread per connection and a pool of database connections. It speaks plain HTTP and
//! JSON on the loopback interface; put it behind a proxy that does TLS and limits rates. The
//! environment configures it:
//!
//! - `DATABASE_URL`: a migrated database, with the role `app_user`
//! - `PORT`: 0 or unset for any free port; the first line of standard output has the address
//! - `TOKEN_KEY`: 64 hexadecimal digits, the key for digests of session tokens
//! - `CREDENTIAL_KEYS`: the keys that seal credentials, newest first: `2:<64 hexadecimal
//!   digits>,1:…`
//! - `WEBHOOK_SECRET`: the secret with which the gateway signs its webhooks

use std::env;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::process::ExitCode;
use std::time::Duration;

use bruhmcp_db::crypto::{KeyRing, TokenKey};
use bruhmcp_db::migrations;
use bruhmcp_db::{SecretText, crypto};
use diesel::pg::PgConnection;
use diesel::r2d2::{ConnectionManager, Pool, PooledConnection};
use oxhttp::model::{Body, Request};
use oxhttp::{ListeningServer, Server};

use crate::http::{Answer, Error, NOT_FOUND, json, response};

mod accounts;
mod http;
mod instances;
mod webhooks;

/// The state that all threads share.
struct App {
    pool: Pool<ConnectionManager<PgConnection>>,
    token_key: TokenKey,
    key_ring: KeyRing,
    webhook_secret: SecretText,
    /// A hash to verify against if there is no such user.
    nobodys_password: SecretText,
}

impl App {
    fn from_env() -> Result<Self, &'static str> {
        let token_key = from_hex(&variable("TOKEN_KEY")?).ok_or("TOKEN_KEY isn't hexadecimal")?;
        let keys = variable("CREDENTIAL_KEYS")?;
        let keys: Option<Vec<_>> = keys.split(',').map(credential_key).collect();
        let keys = keys.ok_or("CREDENTIAL_KEYS isn't a list of id:key")?;
        let url = variable("DATABASE_URL")?;
        check_schema(&url)?;
        Ok(Self {
            // The pool tests each connection before it hands it out, and replaces broken ones: it
            // survives a restart of the database server.
            pool: Pool::builder()
                .max_size(8)
                .connection_timeout(Duration::from_secs(2))
                .build(ConnectionManager::new(url))
                .map_err(|_| "the pool can't connect to the database")?,
            token_key: TokenKey::new(&token_key).map_err(|_| "TOKEN_KEY is too short")?,
            key_ring: KeyRing::new(keys.iter().map(|(id, key)| (*id, &key[..])))
                .map_err(|_| "CREDENTIAL_KEYS needs different ids, and 32 bytes for each key")?,
            webhook_secret: variable("WEBHOOK_SECRET")?.into(),
            nobodys_password: accounts::hash(&crypto::new_secret())
                .map_err(|_| "hashing a password failed")?,
        })
    }

    /// Takes a connection from the pool. Hold it only while using the database, not while hashing a
    /// password or waiting for another service.
    fn db(&self) -> Result<PooledConnection<ConnectionManager<PgConnection>>, Error> {
        self.pool.get().map_err(|_| Error::Unavailable)
    }
}

fn main() -> ExitCode {
    match start() {
        Ok(server) => match server.join() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        // No message contains a value: DATABASE_URL has a password in it.
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Refuses to start on a database with pending migrations. The deploy runs them, once.
fn check_schema(url: &str) -> Result<(), &'static str> {
    let mut runner = migrations::runner(url).map_err(|_| "DATABASE_URL isn't a URL")?;
    let status = runner
        .status()
        .map_err(|_| "no connection to the database of DATABASE_URL")?;
    match status.pending().next() {
        None => Ok(()),
        Some(_) => Err("the database isn't migrated"),
    }
}

fn start() -> Result<ListeningServer, &'static str> {
    let app = App::from_env()?;
    let port = match env::var("PORT") {
        Ok(port) => port.parse().map_err(|_| "PORT isn't a port")?,
        Err(_) => 0,
    };
    let port = free_port(port).map_err(|_| "the port is taken")?;
    let server = Server::new(move |request| response(route(&app, request)))
        .with_max_concurrent_connections(16)
        .with_global_timeout(Duration::from_secs(10))
        .bind((Ipv4Addr::LOCALHOST, port))
        .spawn()
        .map_err(|_| "the port is taken")?;
    println!("http://{}:{port}", Ipv4Addr::LOCALHOST);
    Ok(server)
}

fn route(app: &App, request: &mut Request<Body>) -> Answer {
    let path = request.uri().path().to_owned();
    let path: Vec<&str> = path.split('/').skip(1).collect();
    match (request.method().as_str(), &path[..]) {
        ("POST", ["users"]) => accounts::sign_up(app, &json(request)?),
        ("POST", ["sessions"]) => accounts::log_in(app, &json(request)?),
        ("PUT", ["sessions"]) => accounts::renew(app, request),
        ("DELETE", ["sessions"]) => accounts::log_out(app, request),
        ("GET", ["instances"]) => instances::list(app, accounts::user(app, request)?, request),
        ("POST", ["instances"]) => {
            instances::create(app, accounts::user(app, request)?, &json(request)?)
        }
        ("PATCH", ["instances", id]) => {
            instances::toggle(app, accounts::user(app, request)?, id, &json(request)?)
        }
        ("POST", ["call", service, id]) => {
            instances::call(app, accounts::user(app, request)?, service, id)
        }
        ("GET", ["oauth", "callback"]) => {
            instances::oauth_callback(app, accounts::user(app, request)?, request)
        }
        ("POST", ["webhooks", "razorpay"]) => webhooks::razorpay(app, request),
        _ => Err(NOT_FOUND),
    }
}

/// Finds a free port first, because the server doesn't tell which port it got.
fn free_port(port: u16) -> io::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    Ok(listener.local_addr()?.port())
}

fn variable(name: &'static str) -> Result<String, &'static str> {
    env::var(name).map_err(|_| match name {
        "DATABASE_URL" => "DATABASE_URL isn't set",
        "TOKEN_KEY" => "TOKEN_KEY isn't set",
        "CREDENTIAL_KEYS" => "CREDENTIAL_KEYS isn't set",
        _ => "WEBHOOK_SECRET isn't set",
    })
}

fn credential_key(text: &str) -> Option<(u8, Vec<u8>)> {
    let (id, key) = text.split_once(':')?;
    Some((id.parse().ok()?, from_hex(key)?))
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |digit: char| {
        digit
            .to_digit(16)
            .and_then(|digit| u8::try_from(digit).ok())
    };
    let digits: Vec<u8> = text.chars().map(digit).collect::<Option<_>>()?;
    let pairs = digits.chunks_exact(2);
    let complete = pairs.remainder().is_empty();
    complete.then(|| pairs.map(|pair| pair[0] << 4 | pair[1]).collect())
}
