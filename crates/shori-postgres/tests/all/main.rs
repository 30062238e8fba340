//! Decoding, from outside: what PostgreSQL writes, and what it never would.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod bytes;
mod columns;
mod decimals;
mod extremes;
mod messages;
mod recorded;
