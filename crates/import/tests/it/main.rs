//! Imports from databases of both shapes of the old system, on a real server.

mod accounts;
mod course;
mod money;
mod random;
mod support;
