//! The `shori` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    shori::heap::bound();
    shori::cli::main()
}
