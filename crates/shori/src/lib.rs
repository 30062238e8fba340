//! The modules behind the command line, as a library so that tests and examples reach them.

pub mod assemble;
pub mod bench;
pub mod cli;
pub mod config;
pub mod control;
pub mod failpoints;
pub mod freshness;
pub mod generate;
pub mod stores;
pub mod systems;
pub mod verify;
