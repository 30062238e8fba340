//! Decoding, from outside: what PostgreSQL writes, and what it never would; and reading real servers.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod bytes;
mod columns;
mod decimals;
mod encrypted;
mod extremes;
mod faults;
mod generated;
mod harness;
mod messages;
mod polls;
mod polls_late;
mod polls_silent;
mod polls_tables;
mod random;
mod reading;
mod recorded;
mod refused_servers;
mod replay;
mod schema_changes;
mod server;
mod snapshots;
mod source_contract;
mod store_compact;
mod store_contract;
mod store_crash;
mod store_errors;
mod store_log;
mod store_names;
mod store_output;
mod store_rates;
mod store_values;
mod stored;
mod writers;
