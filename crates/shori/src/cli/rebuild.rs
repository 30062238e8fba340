//! `shori rebuild`

use std::process::ExitCode;

use clap::Args;
use shori_core::Result;

use super::Which;
use super::reach::Reach;
use crate::control::Request;

/// Build a projection anew from the log, while everything else goes on.
///
/// Its rows stay readable until the new ones take their place. A history keeps the versions below the log's horizon.
#[derive(Args)]
#[command(after_help = "Example:\n  shori rebuild --dir demo proj_orders_latest")]
pub struct Rebuild {
    #[command(flatten)]
    which: Which,
    /// The projection's name, as in the configuration
    projection: String,
}

impl Rebuild {
    pub fn act(self) -> Result<ExitCode> {
        let loaded = self.which.load()?;
        Reach::new(&loaded)?.request(&loaded, Request::Rebuild { projection: self.projection.clone() })?;
        eprintln!("{} is built anew", self.projection);
        Ok(ExitCode::SUCCESS)
    }
}
