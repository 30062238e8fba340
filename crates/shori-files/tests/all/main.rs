//! Change logs in temporary folders.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod damage;
mod harness;
mod round_trip;
mod shapes;
mod source_contract;
