//! All tests that need a server, in one binary, so that they share one.
#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

mod archive;
mod audit;
mod billing;
mod conventions;
mod credits;
mod enums;
mod migrations;
mod models;
mod money;
mod payments;
mod rules;
mod subscriptions;
mod support;
mod webhooks;
