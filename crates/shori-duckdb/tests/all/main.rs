#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod simulation;
mod store;
mod store_compact;
mod store_contract;
mod store_errors;
mod store_layers;
mod store_log;
mod store_names;
mod store_output;
mod store_questions;
mod transform_contract;
mod transform_random;
