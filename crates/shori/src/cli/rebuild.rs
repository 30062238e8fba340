//! `shori rebuild`

use std::process::ExitCode;

use clap::Args;
use shori_core::Result;

use super::Which;
use super::reach::Reach;
use crate::config::{Loaded, nearest};
use crate::control::Request;

/// Build a projection anew from the log, while everything else goes on.
///
/// Its rows stay readable until the new ones take their place. A history keeps the versions below the log's horizon.
#[derive(Args)]
#[command(after_help = "Example:\n  shori rebuild --dir demo proj_orders_latest")]
pub struct Rebuild {
    #[command(flatten)]
    pub(super) which: Which,
    /// The projection's name, as in the configuration
    projection: String,
}

impl Rebuild {
    pub fn act(self) -> Result<ExitCode> {
        let loaded = self.which.load()?;
        self.must_be_configured(&loaded)?;
        Reach::new(&loaded)?.request(&loaded, Request::Rebuild { projection: self.projection.clone() })?;
        eprintln!("{} is built anew", self.projection);
        Ok(ExitCode::SUCCESS)
    }

    fn must_be_configured(&self, loaded: &Loaded) -> Result<()> {
        let known = || loaded.config.projections.iter().map(|projection| projection.name.as_str());
        if known().any(|name| name == self.projection) {
            return Ok(());
        }
        let cause = format!("there is none of that name{}", nearest(&self.projection, known()));
        Err(loaded.wrong(&format!("projection {}", self.projection), &cause))
    }
}
