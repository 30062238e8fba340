//! The real program, end to end: real files, other processes, real signals.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod answers;
mod change_logs;
mod crates;
mod demo;
mod failpoints;
mod flow;
mod full_server;
mod harness;
mod histories;
mod mistakes;
mod mistakes_files;
mod mistakes_folders;
mod mistakes_sql;
mod orders_history;
mod own_names;
mod polled;
mod postgres;
mod printed;
mod projections;
#[path = "../../../shori-postgres/tests/all/server.rs"]
#[allow(dead_code, reason = "the crate whose file it is uses all of it")]
mod server;
mod small;
mod small_disk;
mod spec4;
mod spec4_log;
mod verify;
