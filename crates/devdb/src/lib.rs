//! A PostgreSQL for development and tests that needs no set-up.
