//! engine.start: from the start of the process to the first look at the source, with the large state and nothing to do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use shori_core::event::Events;
use shori_core::pipeline::now;
use shori_core::position::{CaptureId, Micros, Position};
use shori_core::source::{BatchLimit, Head, Resume, Source, SourceBatch, Started};
use shori_core::{Error, ErrorKind, Result};
use tokio::sync::oneshot;

use super::world::World;
use crate::bench::{Measured, Place, task};
use crate::{assemble, cli};

const STARTS: usize = 5;

/// The median of several starts.
pub(super) fn measure(place: &Place) -> Result<Measured> {
    let mut seconds = Vec::with_capacity(STARTS);
    let mut peak: f64 = 0.0;
    for _ in 0..STARTS {
        let begun = now();
        let first_poll = task::run(place, super::SUITE.name, "engine.start/first_poll")?;
        seconds.push((first_poll.value - begun as f64) / 1e6);
        peak = peak.max(first_poll.parts.get(task::PEAK_RESIDENT_MB).copied().unwrap_or_default());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(Measured::new(seconds[STARTS / 2]).part("slowest_s", seconds[STARTS - 1]).part("started_mb", peak))
}

/// Starts the pipeline and stops it when the source has been asked. The value is when that was, in microseconds since
/// the epoch.
pub(super) fn first_poll(place: &Place) -> Result<Measured> {
    let loaded = World::loaded(place)?;
    let opened = assemble::open(&loaded)?;
    let mut pipeline = assemble::pipeline(&loaded, &opened, false, Events::nowhere())?;
    let (sender, asked) = oneshot::channel();
    let mut sender = Some(sender);
    let watched = |inner| Box::new(Watched { inner, asked: sender.take() }) as Box<dyn Source>;
    pipeline.sources = pipeline.sources.into_iter().map(watched).collect();
    cli::block_on(async {
        let prepared = pipeline.prepare();
        let handle = prepared.handle();
        let running = tokio::spawn(prepared.run());
        let asked = asked.await;
        handle.stop.cancel();
        let ran = running.await.map_err(|cause| Error::new(ErrorKind::Internal, "finish", "the pipeline", cause))?;
        ran?;
        let asked = asked.map_err(|cause| Error::new(ErrorKind::Internal, "reach", "the source", cause))?;
        Ok(Measured::new(asked as f64))
    })
}

/// Tells when it is asked for changes first.
struct Watched {
    inner: Box<dyn Source>,
    asked: Option<oneshot::Sender<Micros>>,
}

#[async_trait]
impl Source for Watched {
    fn timeline(&self) -> Arc<str> {
        self.inner.timeline()
    }

    async fn start(&mut self, resume: &BTreeMap<CaptureId, Resume>) -> Result<Started> {
        self.inner.start(resume).await
    }

    async fn next(&mut self, limit: BatchLimit) -> Result<SourceBatch> {
        if let Some(asked) = self.asked.take() {
            // A receiver that has gone away no longer wants to know.
            let _ = asked.send(now());
        }
        self.inner.next(limit).await
    }

    async fn wait(&mut self, at_most: Duration) -> Result<()> {
        self.inner.wait(at_most).await
    }

    async fn acknowledge(&mut self, durable: &Position) -> Result<()> {
        self.inner.acknowledge(durable).await
    }

    async fn head(&mut self) -> Result<Head> {
        self.inner.head().await
    }
}
