//! `shori resnapshot`

use std::process::ExitCode;

use clap::Args;
use shori_core::Result;

use super::Which;
use super::reach::Reach;
use crate::config::{Loaded, nearest};
use crate::control::Request;

/// Read a table of the source anew, while everything else goes on.
///
/// Repairs what was missed: after a gap, rows that are gone from the source go from the projections too.
#[derive(Args)]
#[command(after_help = "Example:\n  shori resnapshot --dir demo orders")]
pub struct Resnapshot {
    #[command(flatten)]
    pub(super) which: Which,
    /// The table's name
    table: String,
    /// Start the table's log afresh: its key or a column's type has changed
    #[arg(long)]
    retyped: bool,
}

impl Resnapshot {
    pub fn act(self) -> Result<ExitCode> {
        let loaded = self.which.load()?;
        self.must_be_configured(&loaded)?;
        let reach = Reach::new(&loaded)?;
        let running = reach.is_running();
        reach.request(&loaded, Request::Resnapshot { table: self.table.clone(), retyped: self.retyped })?;
        let state = if running { "is being read anew" } else { "has been read anew; the next run projects it" };
        eprintln!("table {} {state}", self.table);
        Ok(ExitCode::SUCCESS)
    }

    fn must_be_configured(&self, loaded: &Loaded) -> Result<()> {
        let known = || loaded.config.sources.iter().flat_map(|source| source.tables.keys()).map(String::as_str);
        if known().any(|name| name.eq_ignore_ascii_case(&self.table)) {
            return Ok(());
        }
        let cause = format!("it is not captured{}", nearest(&self.table, known()));
        Err(loaded.wrong(&format!("table {}", self.table), &cause))
    }
}
