//! Limits for each email address.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::num::NonZeroU32;
use std::time::Duration;

use bruhmcp_db::models::canonical_email;
use governor::clock::DefaultClock;
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};

use crate::errors::Error;

/// Allows 5 requests at once, then one in each period. It is the same for an address without an
/// account, so that it shows nothing.
///
/// It counts in this process only, and each address in one of 65,536 places, so that an attacker
/// who makes up addresses can't fill the memory.
pub(crate) struct Limit {
    limiter: RateLimiter<u16, HashMapStateStore<u16>, DefaultClock>,
    places: RandomState,
    refusal: &'static str,
}

impl Limit {
    /// Logins, right or wrong.
    pub(crate) fn of_logins() -> Self {
        let refusal = "too many attempts: wait 10 seconds";
        Self::new(Duration::from_secs(10), refusal)
    }

    /// Requests that send a mail.
    pub(crate) fn of_mails() -> Self {
        let refusal = "too many mails: wait 10 minutes";
        Self::new(Duration::from_secs(600), refusal)
    }

    fn new(period: Duration, refusal: &'static str) -> Self {
        let quota = Quota::with_period(period)
            .map(|quota| quota.allow_burst(const { NonZeroU32::new(5).unwrap() }));
        Self {
            limiter: RateLimiter::hashmap(quota.unwrap_or(Quota::per_minute(NonZeroU32::MIN))),
            places: RandomState::new(),
            refusal,
        }
    }

    pub(crate) fn check(&self, email: &str) -> Result<(), Error> {
        let address = canonical_email(email).unwrap_or_default();
        let [first, second, ..] = self.places.hash_one(address).to_le_bytes();
        self.limiter
            .check_key(&u16::from_le_bytes([first, second]))
            .map_err(|_| Error::Refused(429, self.refusal))
    }
}
