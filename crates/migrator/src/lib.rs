#![doc = include_str!("../README.md")]
#![deny(missing_docs)]

#[cfg(feature = "cli")]
pub mod cli;
mod control;
mod error;
mod rehearsal;
mod report;
mod runner;
mod session;
mod source;
mod status;
mod verify;

pub use error::{Error, Failure, Holder, Refusal, ServerReport, StateAfter};
pub use rehearsal::{Loss, LossKind, Reversal};
pub use report::{Direction, Event, Hook, Note, Report, Step};
pub use runner::{Extent, Runner};
pub use status::{Applied, MigrationStatus, Planned, Status};
pub use verify::{Difference, Verification};
