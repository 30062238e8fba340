//! `shori compact`

use std::process::ExitCode;

use clap::Args;
use shori_core::Result;

use super::Which;
use super::reach::Reach;
use crate::control::Request;

/// Bring changes past the retention down to the last one per key.
///
/// Never past what a projection still needs. Runs by itself every `retention.every_seconds`.
#[derive(Args)]
#[command(after_help = "Example:\n  shori compact --dir demo")]
pub struct Compact {
    #[command(flatten)]
    pub(super) which: Which,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

impl Compact {
    pub fn act(self) -> Result<ExitCode> {
        let loaded = self.which.load()?;
        let gone = Reach::new(&loaded)?.request(&loaded, Request::Compact)?;
        if self.json {
            super::print_json(&serde_json::json!({ "rows_removed": gone }))?;
        } else {
            super::print(format_args!("{gone} rows removed from the log\n"))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
