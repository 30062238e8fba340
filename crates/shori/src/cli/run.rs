//! `shori run`

use std::process::ExitCode;

use clap::Args;
use shori_core::Result;
use shori_core::event::{Event, Events};

use super::Which;
use crate::assemble;
use crate::config::Loaded;
use crate::control::Server;

/// Run a pipeline until it is stopped.
///
/// SIGINT or SIGTERM finishes the batch in hand and stops; what was committed stays, and the next start goes on from
/// there. So does a start after a crash.
#[derive(Args)]
#[command(after_help = "Examples:\n  shori run -c pipelines/demo/shori.toml\n  shori run --dir demo --once")]
pub struct Run {
    #[command(flatten)]
    which: Which,
    /// Catch up with where the source is now, then end
    #[arg(long)]
    once: bool,
}

impl Run {
    pub fn act(self) -> Result<ExitCode> {
        let loaded = self.which.load()?;
        super::block_on(run(&loaded, self.once, events(&loaded, self.once)))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Runs a pipeline with its socket, until a signal or, with `once`, until it has caught up.
pub async fn run(loaded: &Loaded, once: bool, events: Events) -> Result<()> {
    let opened = assemble::open(loaded)?;
    let prepared = assemble::pipeline(loaded, &opened, once, events)?.prepare();
    let handle = prepared.handle();
    super::signals::cancel_on_signal(handle.stop.clone())?;
    let server = Server { handle, stores: opened.stores.clone() };
    let _listening = server.listen(&loaded.state_directory())?;
    tracing::info!(pipeline = loaded.config.pipeline.name, "running");
    prepared.run().await
}

/// Log lines of a pipeline. What also ends it is told as its error, once.
pub fn events(loaded: &Loaded, once: bool) -> Events {
    let one_source = loaded.config.sources.len() == 1;
    Events::new(move |event| match event {
        Event::SourceFailed { .. } if one_source => {}
        Event::ProjectionFailed { projection, reason } if once => {
            tracing::debug!(%projection, reason, "projection failed")
        }
        event => log_event(event),
    })
}

/// Events as log lines: what needs a person warns, the rest informs.
fn log_event(event: &Event) {
    match event {
        Event::Appended { timeline, rows, took, .. } => tracing::debug!(%timeline, rows, ?took, "appended"),
        Event::Snapshot { capture, rows, done: true } => tracing::info!(%capture, rows, "snapshot done"),
        Event::Snapshot { capture, rows, .. } => tracing::debug!(%capture, rows, "snapshot"),
        Event::Rejected { capture, reason, .. } => {
            tracing::warn!(%capture, reason, "rejected, kept in ctl_rejected_changes")
        }
        Event::CaptureFailed { capture, reason } => tracing::error!(%capture, reason, "capture stands still"),
        Event::SourceFailed { timeline, reason } => tracing::error!(%timeline, reason, "source ended"),
        Event::Advanced { rows, took } => tracing::debug!(rows, ?took, "state advanced"),
        Event::Projected { projection, rows, took, .. } => tracing::debug!(%projection, rows, ?took, "projected"),
        Event::ProjectionFailed { projection, reason } => {
            tracing::error!(%projection, reason, "projection failed, will be tried again")
        }
        Event::Retrying { what, reason, after } => tracing::warn!(what, reason, ?after, "trying again"),
        Event::Compacted { capture, rows_before, rows_after } => {
            tracing::info!(%capture, rows_before, rows_after, "compacted")
        }
    }
}
