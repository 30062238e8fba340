//! Capture of real SQLite files in temporary directories.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod capture;
mod errors;
mod evolution;
mod harness;
mod random;
mod reading;
mod source_contract;
mod values;
