#![doc = include_str!("../README.md")]
#![deny(missing_docs)]

mod adoption;
#[cfg(feature = "cli")]
pub mod cli;
mod control;
mod error;
#[cfg(feature = "prover")]
pub mod prover;
mod rehearsal;
mod report;
mod runner;
mod session;
mod source;
mod status;
mod verify;
mod watch;

pub use error::{Blocker, Cause, Error, Failure, Holder, Refusal, ServerReport, StateAfter};
pub use rehearsal::{Loss, LossKind, Reversal};
pub use report::{Direction, Event, Granted, Hook, Note, Preflight, Report, Step};
pub use runner::{Extent, Runner};
pub use status::{Applied, MigrationStatus, Plan, Planned, Status};
pub use verify::{Change, Verification};
