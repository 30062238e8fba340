//! Capture of real SQLite files in temporary directories.

mod capture;
mod errors;
mod evolution;
mod harness;
mod random;
mod reading;
mod values;
