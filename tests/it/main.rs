//! All tests that need a server, in one binary, so that they share one.
#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

mod archive;
#[cfg(feature = "cli")]
mod cli;
mod concurrency;
mod conventions;
mod enums;
// Limits and poolers are set up the Linux way.
#[cfg(all(feature = "cli", target_os = "linux"))]
mod faults;
mod instances;
mod migrations;
mod models;
mod monitor;
mod plans;
mod rules;
mod runner;
mod support;
mod tokens;
mod users;
