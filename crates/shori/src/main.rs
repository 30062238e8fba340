//! The `shori` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    shori::cli::main()
}
