//! The database layer of BruhMCP.
#![deny(missing_docs)]

pub mod migrations;
