//! `shori generate`

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use shori_core::{Error, ErrorKind, Result};

use super::Which;
use crate::config::{Loaded, SourceConfig, SourceKind};
use crate::generate::{Pacing, Workload};
use crate::systems::System;

/// Write to the sample source as an application would.
///
/// In SQLite: orders, payments, customers, late changes, deletes, key updates, in transactions of 1 to 100,000 rows. In
/// PostgreSQL: orders. A round of --interval has there 1 to 3 inserts with a chance of 30 %, 1 to 3 updates with 40 %,
/// 1 or 2 deletes with 20 %; with --rate or flat out, they come in the same proportion.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  shori generate --dir demo --changes 100000\n  shori generate --dir demo --rate 5000 --seed 7\n  shori generate -c pipelines/orders-history/shori.toml --interval 5\n  shori generate -c pipelines/orders-history/shori.toml --rate 2000 --writers 4"
)]
pub struct Generate {
    #[command(flatten)]
    pub(super) which: Which,
    /// Row changes in all; without it, until stopped
    #[arg(long)]
    changes: Option<u64>,
    /// Row changes per second; without it, flat out
    #[arg(long)]
    rate: Option<f64>,
    /// A round of a few changes every so many seconds; without --changes and --rate, the configuration's
    /// generate.interval_seconds
    #[arg(long, value_name = "SECONDS", value_parser = seconds, conflicts_with = "rate")]
    interval: Option<Duration>,
    /// The same seed on the same database makes the same changes
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Customers that orders are of; where they are a table, at least so many are made
    #[arg(long, default_value_t = 10_000)]
    customers: u32,
    /// Most rows of one transaction
    #[arg(long, default_value_t = 100_000)]
    transaction_max_rows: u32,
    /// Connections that write at once, to PostgreSQL; how their changes interleave, no seed tells
    #[arg(long, default_value_t = 1)]
    writers: u32,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

impl Generate {
    pub fn act(self) -> Result<ExitCode> {
        let loaded = self.which.load()?;
        let application = System::of(&loaded, sample_source(&loaded)?)?.application()?;
        let workload = Workload {
            changes: self.changes,
            pacing: self.pacing(&loaded),
            seed: self.seed,
            customers: self.customers,
            transaction_max_rows: self.transaction_max_rows,
            writers: self.writers,
        };
        let stop = Arc::new(AtomicBool::new(false));
        let bar = progress_bar(self.changes);
        let stopped = stop.clone();
        let generated = super::block_on(async move {
            let token = tokio_util::sync::CancellationToken::new();
            super::signals::cancel_on_signal(token.clone())?;
            let watched = stopped.clone();
            tokio::spawn(async move {
                token.cancelled().await;
                watched.store(true, Ordering::Relaxed);
            });
            let work = move || application.run(&workload, &stopped, |progress| bar.set_position(progress.changes));
            let joined = tokio::task::spawn_blocking(work).await;
            joined.map_err(|cause| Error::new(ErrorKind::Internal, "finish", "generating", cause))?
        })?;
        if self.json {
            super::print_json(&generated)?;
        } else {
            super::print(format_args!("{generated}\n"))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    fn pacing(&self, loaded: &Loaded) -> Pacing {
        let usual = || loaded.config.generate.interval_seconds.filter(|_| self.changes.is_none());
        match (self.rate, self.interval) {
            (Some(rate), _) => Pacing::Rate(rate),
            (None, Some(interval)) => Pacing::Rounds(interval),
            (None, None) => usual().map_or(Pacing::FlatOut, |seconds| Pacing::Rounds(Duration::from_secs_f64(seconds))),
        }
    }
}

/// The source that has the pipeline's sample tables. A server's tables may be anybody's: without a sample of its own, a
/// pipeline is nothing to write to.
fn sample_source(loaded: &Loaded) -> Result<&SourceConfig> {
    let has_sample = |source: &&SourceConfig| match source.kind {
        SourceKind::Sqlite => true,
        SourceKind::Postgres => loaded.config.pipeline.sample.is_some(),
        SourceKind::Files => false,
    };
    loaded.config.sources.iter().find(has_sample).ok_or_else(|| {
        let cause = "this pipeline has no sample tables, and nothing writes to tables that are not samples";
        loaded.wrong("pipeline.sample", cause).with_remedy("name the SQL file that makes them")
    })
}

fn seconds(text: &str) -> std::result::Result<Duration, String> {
    let seconds = text.parse::<f64>().map_err(|cause| cause.to_string())?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        Ok(_) => Err("it must be above 0".into()),
        Err(cause) => Err(cause.to_string()),
    }
}

/// On stderr, and only on a terminal.
pub fn progress_bar(total: Option<u64>) -> ProgressBar {
    let bar = match total {
        Some(total) => ProgressBar::new(total),
        None => ProgressBar::new_spinner(),
    };
    let template = "{elapsed_precise} {wide_bar} {human_pos}/{human_len} changes {per_sec}";
    match ProgressStyle::with_template(template) {
        Ok(style) if total.is_some() => bar.with_style(style),
        _ => bar,
    }
}
