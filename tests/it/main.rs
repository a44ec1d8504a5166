//! All tests that need a server. They are one binary, so that they share the server.
#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

#[cfg(feature = "cli")]
mod adopt;
mod archive;
mod audit;
#[cfg(all(feature = "crypto", feature = "migrator", feature = "r2d2"))]
mod backend;
mod batches;
mod billing;
#[cfg(feature = "crypto")]
mod binds;
// As `logs`, and with the keys of `sealing`.
#[cfg(all(feature = "crypto", target_os = "linux"))]
mod buffers;
#[cfg(feature = "cli")]
mod cells;
#[cfg(feature = "cli")]
mod cli;
mod concurrency;
mod conventions;
mod counters;
mod credits;
mod difference;
#[cfg(all(feature = "crypto", feature = "migrator"))]
mod directory;
mod enums;
// Limits and poolers are set up the Linux way.
#[cfg(all(feature = "cli", target_os = "linux"))]
mod faults;
mod fixtures;
mod gateway;
mod instances;
#[cfg(feature = "cli")]
mod json;
#[cfg(feature = "crypto")]
mod locks;
// Each reads the log of a private server.
#[cfg(target_os = "linux")]
mod logs;
mod migrations;
mod models;
mod money_rules;
mod money_walk;
mod monitor;
#[cfg(feature = "crypto")]
mod oauth;
// As `faults`, and with the keys of `locks`.
#[cfg(all(feature = "cli", feature = "crypto", target_os = "linux"))]
mod operations;
mod pages;
mod payments;
mod plans;
#[cfg(feature = "cli")]
mod preflight;
#[cfg(all(feature = "crypto", feature = "migrator"))]
mod quickstart;
#[cfg(feature = "migrator")]
mod revert;
mod rights;
// Passes a server's Unix-domain socket on.
#[cfg(unix)]
mod round_trips;
mod rules;
#[cfg(feature = "migrator")]
mod runner;
#[cfg(feature = "migrator")]
mod schemas;
#[cfg(feature = "crypto")]
mod sealing;
mod subscriptions;
mod support;
#[cfg(feature = "crypto")]
mod tokens;
mod transactions;
mod users;
#[cfg(feature = "cli")]
mod verify;
mod webhooks;
