//! `shori bench`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use clap::builder::PossibleValuesParser;
use shori_core::Result;

use crate::bench::{self, Place, Request};

/// Measure this machine and this build against targets, and against floors measured in the same run.
///
/// Reports, and does not judge: the exit status is 0 even when a target is missed, 1 when a figure could not be
/// measured. The suite `engine` writes about 5 GB and takes about 15 minutes; `postgres` starts a server of its own.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  shori bench engine\n  shori bench engine --json --figure engine.backlog\n  shori bench engine --scale 0.01"
)]
pub struct Bench {
    /// What to measure
    #[arg(value_parser = PossibleValuesParser::new(bench::suites()))]
    suite: String,
    /// Measure this figure alone; may be repeated
    #[arg(long, value_name = "NAME")]
    figure: Vec<String>,
    /// Fraction of the data, to try things out; no target is held against it
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Folder to work in; large data that an earlier run left there is used again. Default: a new one here
    #[arg(long)]
    work: Option<PathBuf>,
    /// Leave the data where it is
    #[arg(long)]
    keep: bool,
    /// Print the report as one line of JSON
    #[arg(long)]
    json: bool,
    /// One step, in a process of its own
    #[arg(long, hide = true, requires = "work")]
    task: Option<String>,
}

impl Bench {
    pub fn act(self) -> Result<ExitCode> {
        let Bench { suite, figure, scale, work, keep, json, task } = self;
        if let (Some(task), Some(work)) = (&task, &work) {
            bench::run_task(&suite, task, &Place { work: work.clone(), scale })?;
            return Ok(ExitCode::SUCCESS);
        }
        let report = bench::run(&Request { suite, figures: figure, scale, work, keep })?;
        if json {
            super::print_json(&report)?;
        } else {
            super::print(&report)?;
        }
        Ok(ExitCode::from(u8::from(!report.is_complete())))
    }
}
