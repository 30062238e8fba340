//! What goes to stdout. Who reads it may go away at any time: nothing here panics, and the verb then ends quietly.

use std::fmt::Display;
use std::io::Write;

use shori_core::{Error, ErrorKind, Result};

const PRINT: &str = "print";

/// Prints as it stands and hands it on at once.
pub fn print(text: impl Display) -> Result<()> {
    let mut out = std::io::stdout().lock();
    write!(out, "{text}").and_then(|()| out.flush()).map_err(unprinted)
}

/// One line of JSON.
pub fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string(value)
        .map_err(|cause| Error::new(ErrorKind::Internal, PRINT, "the result as JSON", cause))?;
    print(format_args!("{text}\n"))
}

/// Why something was not printed.
pub fn unprinted(cause: std::io::Error) -> Error {
    Error::new(ErrorKind::Refused, PRINT, "the answer", cause)
}

/// Whether an error only says that nobody reads stdout any more. A pipeline's socket is another pipe: its errors are
/// those of another operation.
pub fn reader_is_gone(error: &Error) -> bool {
    let cause = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<std::io::Error>());
    error.operation() == PRINT && cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::BrokenPipe)
}
