//! The modules behind the command line, as a library so that tests and examples reach them.

pub mod generate;
pub mod verify;
