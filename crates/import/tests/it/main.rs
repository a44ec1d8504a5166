//! Imports from databases of both shapes of the old system, on a real server.
#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

mod accounts;
mod course;
mod money;
mod random;
mod support;
