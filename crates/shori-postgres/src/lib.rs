//! PostgreSQL's logical replication, decoded: no connection, no clock, no file.
//!
//! # Constraints
//!
//! - Any bytes end in a value or an error, and what is allocated is bounded by the bytes that came: servers, proxies
//!   and networks fail in the middle of a message.
//! - `two_phase` is not asked for: prepared transactions come with their commit, as others do.
//!
//! # Layout
//!
//! `message` decodes what the `pgoutput` plugin sends. `positions` holds the stored encoding of positions.

pub mod message;
pub mod positions;
mod reader;
