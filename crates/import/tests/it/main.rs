//! Imports from databases of both shapes of the old system, on a real server.

mod accounts;
mod money;
mod support;
