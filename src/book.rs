//! The examples of the README, of the guide and of other pages are tests of this crate.

#[cfg(feature = "crypto")]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(feature = "r2d2")]
#[doc = include_str!("../docs/scaling.md")]
struct Scaling;

/// They make databases, open pools and seal credentials.
#[cfg(all(feature = "crypto", feature = "migrator", feature = "r2d2"))]
mod guide {
    #[doc = include_str!("../docs/guide/README.md")]
    struct Guide;

    #[doc = include_str!("../docs/guide/accounts.md")]
    struct Accounts;

    #[doc = include_str!("../docs/guide/connect.md")]
    struct Connect;

    #[doc = include_str!("../docs/guide/call.md")]
    struct Call;

    #[doc = include_str!("../docs/guide/oauth.md")]
    struct Oauth;

    #[doc = include_str!("../docs/guide/billing.md")]
    struct Billing;

    #[doc = include_str!("../docs/guide/limits.md")]
    struct Limits;

    #[doc = include_str!("../docs/guide/audit.md")]
    struct Audit;

    #[doc = include_str!("../docs/guide/testing.md")]
    struct Testing;

    #[doc = include_str!("../docs/guide/pools.md")]
    struct Pools;

    #[doc = include_str!("../docs/guide/errors.md")]
    struct Errors;

    #[doc = include_str!("../docs/guide/logs.md")]
    struct Logs;
}
