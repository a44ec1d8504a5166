//! A small HTTP service to start from: accounts, instances, OAuth and the payment gateway's
//! webhook.
//!
//! It is built on [axum]. The crate's operations block, so each request does its work on one of 16
//! threads made for that ([`http::blocking`]). Put it behind a proxy that does TLS and limits rates
//! and connections. The environment configures it:
//!
//! - `DATABASE_URL`: a migrated database, with the role `app_user`
//! - `PORT`: 0 or unset for any free port; the first line of standard output has the address
//! - `METRICS_PORT`: the port of [`metrics`], if they are wanted
//! - `TOKEN_KEY`: 64 hexadecimal digits, the key for digests of one-time secrets
//! - `CREDENTIAL_KEYS`: the keys that seal credentials, newest first: `2:<64 hexadecimal
//!   digits>,1:…`
//! - `WEBHOOK_SECRET`: the secret with which the gateway signs its webhooks
//! - `OUTBOX`: the folder that stands for a mail server. Each mail is a file that only this user can
//!   read; nothing else shows a code or a link
//!
//! A worker does what no request waits for ([`worker`]). After SIGTERM or Ctrl-C the program finishes
//! the requests and the work that it has begun.

use std::env;
use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::header::CACHE_CONTROL;
use axum::http::{HeaderValue, StatusCode};
use axum::middleware;
use axum::routing::{delete, get, patch, post, put};
use bruhmcp_db::crypto::{KeyRing, TokenKey};
use bruhmcp_db::migrations;
use bruhmcp_db::{SecretText, crypto};
use diesel::connection::SimpleConnection;
use diesel::pg::PgConnection;
use diesel::r2d2::{self, ConnectionManager, CustomizeConnection, Pool, PooledConnection};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, oneshot};
use tower_http::set_header::SetResponseHeaderLayer;
use tower_http::timeout::TimeoutLayer;

use crate::errors::{Error, NOT_FOUND};
use crate::http::MAX_DEFERRED;
use crate::limits::Limit;
use crate::metrics::Metrics;
use crate::outbox::Outbox;

mod accounts;
mod billing;
mod errors;
mod http;
mod instances;
mod limits;
mod metrics;
mod outbox;
mod passwords;
mod payload;
mod plans;
mod provider;
mod sessions;
mod webhooks;
mod worker;

/// The state that all requests share.
struct App {
    pool: Pool<ConnectionManager<PgConnection>>,
    token_key: TokenKey,
    key_ring: KeyRing,
    webhook_secret: SecretText,
    /// A hash to verify against if there is no such user.
    nobodys_password: SecretText,
    logins: Limit,
    mails: Limit,
    metrics: Metrics,
    outbox: Outbox,
    /// A permit for each request whose work waits until after its answer.
    deferred: Arc<Semaphore>,
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
                .connection_customizer(Box::new(StatementTimeout))
                .build(ConnectionManager::new(url))
                .map_err(|_| "the pool can't connect to the database")?,
            token_key: TokenKey::new(&token_key).map_err(|_| "TOKEN_KEY is too short")?,
            key_ring: KeyRing::new(keys.iter().map(|(id, key)| (*id, &key[..])))
                .map_err(|_| "CREDENTIAL_KEYS needs different ids, and 32 bytes for each key")?,
            webhook_secret: variable("WEBHOOK_SECRET")?.into(),
            nobodys_password: passwords::hash(&crypto::new_secret())
                .map_err(|_| "hashing a password failed")?,
            logins: Limit::of_logins(),
            mails: Limit::of_mails(),
            metrics: Metrics::new().map_err(|_| "the metrics can't be made")?,
            outbox: Outbox(variable("OUTBOX")?.into()),
            deferred: Arc::new(Semaphore::new(MAX_DEFERRED as usize)),
        })
    }

    /// Takes a connection from the pool. Hold it only while using the database, not while hashing a
    /// password or waiting for another service.
    fn db(&self) -> Result<PooledConnection<ConnectionManager<PgConnection>>, Error> {
        self.pool.get().map_err(|_| Error::Unavailable)
    }
}

/// Ends a statement before [`REQUEST_TIMEOUT`] ends its request.
#[derive(Debug)]
struct StatementTimeout;

impl CustomizeConnection<PgConnection, r2d2::Error> for StatementTimeout {
    fn on_acquire(&self, conn: &mut PgConnection) -> Result<(), r2d2::Error> {
        conn.batch_execute("SET statement_timeout = '5s'")
            .map_err(r2d2::Error::QueryError)
    }
}

const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// In bytes.
const MAX_BODY_LEN: usize = 64 * 1024;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        // No message contains a value: DATABASE_URL has a password in it.
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), &'static str> {
    let app = Arc::new(App::from_env()?);
    let port = match env::var("PORT") {
        Ok(port) => port.parse().map_err(|_| "PORT isn't a port")?,
        Err(_) => 0,
    };
    tokio::runtime::Builder::new_multi_thread()
        // Argon2 takes 19 MiB in each. One more is for the worker.
        .max_blocking_threads(17)
        .enable_all()
        .build()
        .map_err(|_| "the threads can't be started")?
        .block_on(serve(app, port))
}

async fn serve(app: Arc<App>, port: u16) -> Result<(), &'static str> {
    let mut terminated = signal(SignalKind::terminate()).map_err(|_| "no signal handler")?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
        .await
        .map_err(|_| "the port is taken")?;
    let address = listener.local_addr().map_err(|_| "the port is taken")?;
    println!("http://{address}");
    if let Ok(port) = env::var("METRICS_PORT") {
        let port = port.parse().map_err(|_| "METRICS_PORT isn't a port")?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
            .await
            .map_err(|_| "the port of the metrics is taken")?;
        let address = listener
            .local_addr()
            .map_err(|_| "the port of the metrics is taken")?;
        println!("http://{address}/metrics");
        tokio::spawn(axum::serve(listener, metrics::routes(Arc::clone(&app))).into_future());
    }
    let (stop, stopped) = mpsc::channel();
    let app_of_worker = Arc::clone(&app);
    let mut worker = tokio::task::spawn_blocking(move || worker::run(&app_of_worker, &stopped));
    let (quit, quitting) = oneshot::channel::<()>();
    let server = axum::serve(listener, routes(Arc::clone(&app))).with_graceful_shutdown(async {
        let _ = quitting.await;
    });
    let server = tokio::spawn(server.into_future());

    let ended_early = tokio::select! {
        _ = terminated.recv() => None,
        _ = tokio::signal::ctrl_c() => None,
        // A panic: the process ends, and whoever started it starts another one.
        ended = &mut worker => Some(ended),
    };
    drop((quit, stop));
    let served = server.await;
    // The work of requests that were answered before.
    let _ = app.deferred.acquire_many(MAX_DEFERRED).await;
    let worked = match ended_early {
        Some(ended) => ended,
        None => worker.await,
    };
    match (served, worked) {
        (Ok(Ok(())), Ok(())) => Ok(()),
        (_, Err(_)) => Err("the worker failed"),
        _ => Err("the server failed"),
    }
}

fn routes(app: Arc<App>) -> Router {
    Router::new()
        .route("/users", post(accounts::sign_up))
        .route("/users/verification", post(accounts::verify_email))
        .route("/users/me", get(accounts::me))
        .route("/users/me", delete(accounts::close))
        .route("/users/me/export", get(accounts::export))
        .route("/users/me/password", put(passwords::change))
        .route("/passwords/link", post(passwords::ask))
        .route("/passwords", put(passwords::reset))
        .route("/sessions", post(sessions::log_in))
        .route("/sessions", put(sessions::renew))
        .route("/sessions", delete(sessions::log_out))
        .route("/sessions", get(sessions::list))
        .route("/sessions/{id}", delete(sessions::end))
        .route("/sessions/code", post(sessions::log_in_by_code))
        .route("/codes", post(sessions::ask_code))
        .route("/plan", get(plans::show))
        .route("/plan/subscription", post(plans::subscribe))
        .route("/plan/subscription", delete(plans::cancel))
        .route("/instances", get(instances::list))
        .route("/instances", post(instances::create))
        .route("/instances/{id}", patch(instances::toggle))
        .route("/call/{service}/{id}", post(instances::call))
        .route("/oauth/callback", post(instances::oauth_callback))
        .route("/webhooks/razorpay", post(webhooks::razorpay))
        .fallback(async || NOT_FOUND)
        .method_not_allowed_fallback(async || NOT_FOUND)
        .route_layer(middleware::from_fn_with_state(
            Arc::clone(&app),
            metrics::measure,
        ))
        .layer(DefaultBodyLimit::max(MAX_BODY_LEN))
        .layer(SetResponseHeaderLayer::overriding(
            CACHE_CONTROL,
            HeaderValue::from_static("no-store"),
        ))
        // Also for a client that sends its body slowly.
        .layer(TimeoutLayer::with_status_code(
            StatusCode::REQUEST_TIMEOUT,
            REQUEST_TIMEOUT,
        ))
        .with_state(app)
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

/// An empty value is none: an HMAC with an empty key, for example, can be forged by everybody.
fn variable(name: &'static str) -> Result<String, &'static str> {
    let value = env::var(name).ok().filter(|value| !value.is_empty());
    value.ok_or(match name {
        "DATABASE_URL" => "DATABASE_URL isn't set",
        "TOKEN_KEY" => "TOKEN_KEY isn't set",
        "CREDENTIAL_KEYS" => "CREDENTIAL_KEYS isn't set",
        "OUTBOX" => "OUTBOX isn't set",
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
