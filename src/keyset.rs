//! Pages of a list that is sorted newest first.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// The place of a row in a list that is sorted newest first: the next page begins after the last row of this one.
///
/// Unlike an OFFSET it costs the same on each page, and rows that come or go meanwhile shift nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keyset<Id> {
    /// The row's `created_at`.
    pub created_at: DateTime<Utc>,
    /// The row's key, which decides between rows of one moment.
    pub id: Id,
}
