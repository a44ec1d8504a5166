//! The row. Without the feature `operations`, it is all that the crate has of the table.

use chrono::{DateTime, Utc};
use diesel::pg::Pg;
use diesel::prelude::*;
use serde::Serialize;

use crate::ids::UserId;
use crate::schema::users;
use crate::secret::SecretText;

/// A row of `users`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Queryable, Selectable, Identifiable)]
#[diesel(table_name = users, check_for_backend(Pg))]
#[expect(missing_docs, reason = "the other fields explain themselves")]
pub struct User {
    pub id: UserId,
    /// 1 to 255 characters.
    pub first_name: String,
    /// At most 255 characters; may be empty.
    pub last_name: String,
    /// In the form that [`canonical_email`](crate::models::canonical_email) returns; unique.
    pub email: String,
    /// A password hash in PHC or crypt form (`$id$…$hash`), at most 512 characters; `None` if the
    /// user signs in by other means.
    #[serde(skip_serializing)]
    pub password: Option<SecretText>,
    pub email_verified: bool,
    /// The customer at Razorpay: 1 to 255 characters, unique.
    pub razorpay_customer_id: Option<String>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
    pub last_login_at: Option<DateTime<Utc>>,
    /// Whether the user can sign in.
    pub is_active: bool,
}
