//! PostgreSQL's logical replication, decoded: no connection, no clock, no file.
//!
//! # Constraints
//!
//! - Any bytes end in a value or an error, and what is allocated is bounded by the bytes that came: servers, proxies
//!   and networks fail in the middle of a message.
//! - A value is carried exactly, or refused: nothing is coerced or rounded. A value read as text and the same value
//!   read as binary are one.
//! - The session prints as its text is read here: `client_encoding` UTF8, `datestyle` ISO, `bytea_output` hex, and
//!   `extra_float_digits` 1 or more, so that floats come back as they were. `timezone` and `intervalstyle` are set too:
//!   columns configured as text hold what they make of values.
//! - `two_phase` is not asked for: prepared transactions come with their commit, as others do.
//!
//! # Layout
//!
//! `message` decodes what the `pgoutput` plugin sends. `column_types` says what a column is carried as, and
//! `column_builder` turns values into Arrow: `numeric`, `date_time` and `plain_values` read both formats of each type.
//! `positions` holds the stored encoding of positions.

pub mod column_builder;
pub mod column_types;
mod date_time;
pub mod message;
mod numeric;
mod plain_values;
pub mod positions;
mod reader;
