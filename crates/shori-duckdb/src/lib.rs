//! DuckDB, embedded: as the place where state is kept and outputs are computed, and as a store.

mod background;
mod checkpoint;
pub mod database;
mod freed_memory;
mod known_targets;
mod scattered;
pub mod store;
pub mod transform;
mod types;
