//! `shori run`

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use clap::Args;
use shori_core::Result;
use shori_core::event::{Event, Events};
use shori_core::position::CaptureId;

use super::Which;
use crate::assemble;
use crate::config::Loaded;
use crate::control::Server;

/// Run a pipeline until it is stopped.
///
/// SIGINT or SIGTERM finishes the batch in hand and stops; what was committed stays, and the next start goes on from
/// there. So does a start after a crash.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  shori run -c pipelines/demo/shori.toml\n  shori run --dir demo --once\n  shori run -c shori.toml --log-level info --log-dir logs"
)]
pub struct Run {
    #[command(flatten)]
    pub(super) which: Which,
    /// Catch up with where the source is now, then end
    #[arg(long)]
    once: bool,
    /// Log to files in this folder, one a day, the newest called shori.log; to stderr then only if that is a terminal
    #[arg(long, value_name = "DIR")]
    pub(super) log_dir: Option<PathBuf>,
}

impl Run {
    pub fn act(self) -> Result<ExitCode> {
        let loaded = self.which.load()?;
        let failed = Failed::default();
        let ran = super::block_on(run(&loaded, self.once, &failed));
        let failed = failed.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if !self.once || failed.is_empty() {
            return ran.map(|()| ExitCode::SUCCESS);
        }
        for reason in failed.values() {
            eprintln!("error: {reason}");
        }
        match ran {
            // A projection that waits for a capture repeats its reason.
            Err(error) if !failed.values().any(|reason| error.to_string().contains(reason)) => Err(error),
            _ => Ok(ExitCode::from(1)),
        }
    }
}

/// Configured tables that are not captured, each with the reason.
#[derive(Clone, Default)]
struct Failed(Arc<Mutex<BTreeMap<CaptureId, String>>>);

impl Failed {
    fn insert(&self, capture: &CaptureId, reason: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(capture.clone(), reason.to_string());
    }
}

/// Runs a pipeline with its socket, until a signal or, with `once`, until it has caught up.
async fn run(loaded: &Loaded, once: bool, failed: &Failed) -> Result<()> {
    assemble::must_be_able_to_begin(loaded)?;
    let opened = assemble::open(loaded)?;
    let (log, heard) = (events(loaded, once), failed.clone());
    let events = Events::new(move |event| {
        log.send(event.clone());
        if let Event::CaptureFailed { capture, reason } = event {
            heard.insert(capture, reason);
        }
    });
    let prepared = assemble::pipeline(loaded, &opened, once, events)?.prepare();
    let handle = prepared.handle();
    super::signals::cancel_on_signal(handle.stop.clone())?;
    let server = Server { handle, stores: opened.stores.clone() };
    let _listening = server.listen(&loaded.state_directory())?;
    tell_start(loaded, once);
    prepared.run().await?;
    if once {
        // Captures that stand still since an earlier run have said so then.
        for (id, state) in opened.staging.store().captures().await? {
            let mut sources = loaded.config.sources.iter().filter(|source| *source.name == *id.source);
            if let Some(reason) =
                state.failed.filter(|_| sources.any(|source| source.tables.contains_key(&*id.instance)))
            {
                failed.insert(&id, &reason);
            }
        }
    }
    Ok(())
}

/// A program that goes on without a word looks like one that hangs.
fn tell_start(loaded: &Loaded, once: bool) {
    let config = &loaded.config;
    let captures: usize = config.sources.iter().map(|source| source.tables.len()).sum();
    let projections = config.projections.iter().filter(|projection| projection.enabled).count();
    if std::io::stderr().is_terminal() && !once {
        let name = &config.pipeline.name;
        eprintln!("pipeline {name} runs: {captures} captures, {projections} projections; Ctrl-C ends it");
    } else {
        tracing::info!(pipeline = config.pipeline.name, captures, projections, "running");
    }
}

/// Log lines of a pipeline. What also ends it is told as its error, once.
pub fn events(loaded: &Loaded, once: bool) -> Events {
    let one_source = loaded.config.sources.len() == 1;
    Events::new(move |event| match event {
        Event::SourceFailed { .. } if one_source => {}
        Event::CaptureFailed { capture, reason } if once => tracing::debug!(%capture, reason, "capture stands still"),
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
        Event::MissedByCompaction { projection } => tracing::warn!(
            %projection,
            "it missed changes that have been compacted, and is built anew; a history lacks the versions between"
        ),
        Event::Compacted { capture, rows_before, rows_after } => {
            tracing::info!(%capture, rows_before, rows_after, "compacted")
        }
    }
}
