//! `shori generate`

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use shori_core::{Error, ErrorKind, Result};

use super::Which;
use crate::config::SourceKind;
use crate::generate::{GenerateConfig, run};

/// Write to the sample source as an application would: orders, payments, customers, late changes, deletes, key updates,
/// in transactions of 1 to 100,000 rows.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  shori generate --dir demo --changes 100000\n  shori generate --dir demo --rate 5000 --seed 7"
)]
pub struct Generate {
    #[command(flatten)]
    which: Which,
    /// Row changes in all; without it, until stopped
    #[arg(long)]
    changes: Option<u64>,
    /// Row changes per second; without it, flat out
    #[arg(long)]
    rate: Option<f64>,
    /// The same seed on the same database makes the same changes
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Customers to have at least
    #[arg(long, default_value_t = 10_000)]
    customers: u32,
    /// Most rows of one transaction
    #[arg(long, default_value_t = 100_000)]
    transaction_max_rows: u32,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

impl Generate {
    pub fn act(self) -> Result<ExitCode> {
        let loaded = self.which.load()?;
        let none = || Error::new(ErrorKind::Usage, "generate", "changes", "the pipeline has no SQLite source");
        let source = loaded.config.sources.iter().find(|source| source.kind == SourceKind::Sqlite).ok_or_else(none)?;
        let mut config = GenerateConfig::new(loaded.resolve(source.file()));
        config.changes = self.changes;
        config.rate = self.rate;
        config.seed = self.seed;
        config.customers = self.customers;
        config.transaction_max_rows = self.transaction_max_rows;
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
            let work = move || run(&config, &stopped, |progress| bar.set_position(progress.changes));
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
