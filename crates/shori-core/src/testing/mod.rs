//! What tests of every crate share: contract suites, in-memory parts with faults, and an oracle.
//!
//! Everything here is deterministic: one seed gives one run. There is no thread, no wall clock and no hash order; time
//! is the runtime's, which a simulation pauses.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod faults;
pub mod value;
