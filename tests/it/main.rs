//! All tests that need a server, in one binary, so that they share one.
#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

mod archive;
mod concurrency;
mod conventions;
mod enums;
mod instances;
mod migrations;
mod models;
mod monitor;
#[cfg(feature = "crypto")]
mod oauth;
mod plans;
mod rules;
#[cfg(feature = "crypto")]
mod sealing;
mod support;
mod tokens;
mod users;
