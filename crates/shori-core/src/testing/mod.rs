//! What tests of every crate share: contract suites, in-memory parts with faults, and an oracle.
//!
//! Everything here is deterministic: one seed gives one run. There is no thread, no wall clock and no hash order; time
//! is the runtime's, which a simulation pauses.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod faults;
pub mod hand_driven;
pub mod memory_database;
pub mod memory_log;
pub mod memory_query;
pub mod memory_source;
pub mod memory_state;
pub mod memory_store;
pub mod memory_target;
pub mod memory_transform;
pub mod model_projections;
pub mod oracle;
pub mod planted;
pub mod simulation;
pub mod source_contract;
pub mod store_contract;
pub mod store_twin;
pub mod transactions;
pub mod transform_contract;
pub mod value;
