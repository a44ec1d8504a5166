//! All tests that need a server, in one binary, so that they share one.
#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

mod archive;
#[cfg(feature = "cli")]
mod cli;
#[cfg(all(feature = "cli", unix))]
mod faults;
mod runner;
mod support;
