//! A pipeline in one process: starts its parts, watches over them, and ends them together.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::error::{Error, ErrorKind, Response, Result};
use crate::event::{Event, Events};
use crate::failpoint;
use crate::ingest::{IngestRequest, IngestSettings, Ingestor, LogState};
use crate::position::{CaptureId, Micros, Position};
use crate::project::{Progress, ProjectRequest, ProjectSettings, Projector};
use crate::projection::Projection;
use crate::recent::Recent;
use crate::retry::{Backoff, RetryPolicy};
use crate::source::Source;
use crate::store::{CaptureState, RunRecord, RunStatus, Store};
use crate::transform::Transform;

/// Requests of one kind that may wait at a time.
const REQUESTS_MAX: usize = 16;

/// What a pipeline is made of.
pub struct Pipeline {
    pub name: String,
    pub run_id: String,
    pub sources: Vec<Box<dyn Source>>,
    pub staging: Arc<dyn Store>,
    pub transform: Arc<dyn Transform>,
    pub projections: Vec<(Projection, Arc<dyn Store>)>,
    pub settings: Settings,
    pub events: Events,
}

#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub ingest: IngestSettings,
    pub project: ProjectSettings,
    pub retention: Retention,
}

/// How much of the log is kept whole. Changes past either bound are brought down to the last image per key, as far as
/// every projection has consumed them.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    pub keep: Option<Duration>,
    pub keep_rows: Option<u64>,
    /// How often it is looked at; `None`: only when asked.
    pub every: Option<Duration>,
}

/// Reaches a running pipeline.
#[derive(Clone)]
pub struct Handle {
    pub stop: CancellationToken,
    pub log: watch::Receiver<LogState>,
    pub progress: watch::Receiver<Progress>,
    ingest: BTreeMap<Arc<str>, mpsc::Sender<IngestRequest>>,
    project: mpsc::Sender<ProjectRequest>,
    compact: mpsc::Sender<oneshot::Sender<Result<u64>>>,
}

impl Handle {
    /// Reads a table anew while everything else goes on; returns when the request is stored.
    pub async fn resnapshot(&self, table: &str, retyped: bool) -> Result<()> {
        let found = self
            .log
            .borrow()
            .captures
            .iter()
            .find(|(_, state)| &*state.schema.table == table)
            .map(|(id, state)| (id.clone(), state.timeline.clone()));
        let unknown = || Error::new(ErrorKind::Usage, "resnapshot", format!("table {table}"), "it is not captured");
        let (capture, timeline) = found.ok_or_else(unknown)?;
        let sender = self.ingest.get(&timeline).ok_or_else(unknown)?;
        let (done, answer) = oneshot::channel();
        sender.send(IngestRequest::Resnapshot { capture, retyped, done }).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }

    /// Builds a projection anew; returns when its new rows are committed.
    pub async fn rebuild(&self, projection: &str) -> Result<()> {
        let (done, answer) = oneshot::channel();
        let request = ProjectRequest::Rebuild { projection: projection.into(), done };
        self.project.send(request).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }

    /// Returns when every source has been started.
    pub async fn ready(&self) -> Result<()> {
        let mut log = self.log.clone();
        let sources = self.ingest.len();
        tokio::select! {
            biased;
            waited = log.wait_for(|log| log.ready.len() >= sources) => waited.map(|_| ()).map_err(|_| ended()),
            _ = self.stop.cancelled() => Err(ended()),
        }
    }

    /// Returns when the newest snapshot of a table is complete and every projection shows it.
    pub async fn snapshot_done(&self, table: &str) -> Result<()> {
        let of_table = |state: &&CaptureState| &*state.schema.table == table;
        let done = |log: &LogState| {
            let mut captures = log.captures.values().filter(of_table);
            captures.all(|state| state.snapshot.is_done() || state.failed.is_some())
        };
        let mut log = self.log.clone();
        let ends: BTreeMap<CaptureId, Position> = tokio::select! {
            biased;
            log = log.wait_for(done) => {
                let log = log.map_err(|_| ended())?;
                if let Some(reason) = log.captures.values().filter(of_table).find_map(|state| state.failed.as_ref()) {
                    return Err(Error::new(ErrorKind::Schema, "resnapshot", format!("table {table}"), reason.clone()));
                }
                log.captures.iter().filter(|(_, state)| &*state.schema.table == table).map(|(id, state)| (id.clone(), state.snapshot.end)).collect()
            }
            _ = self.stop.cancelled() => return Err(ended()),
        };
        let shown = |progress: &Progress| {
            progress.checkpoints.iter().all(|(name, checkpoint)| {
                let reached = |(id, end): (&CaptureId, &Position)| {
                    checkpoint.as_ref().and_then(|checkpoint| checkpoint.get(id)).is_none_or(|at| at >= end)
                };
                progress.failed.contains_key(name) || ends.iter().all(reached)
            })
        };
        let mut progress = self.progress.clone();
        tokio::select! {
            biased;
            waited = progress.wait_for(shown) => waited.map(|_| ()).map_err(|_| ended()),
            _ = self.stop.cancelled() => Err(ended()),
        }
    }

    /// Applies the retention now; returns how many rows went.
    pub async fn compact(&self) -> Result<u64> {
        let (done, answer) = oneshot::channel();
        self.compact.send(done).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }
}

fn ended() -> Error {
    Error::new(ErrorKind::Unavailable, "ask", "the pipeline", "it has ended")
}

/// A pipeline's parts, connected but not yet running.
pub struct Prepared {
    pipeline: Parts,
    handle: Handle,
}

struct Parts {
    name: String,
    run_id: String,
    staging: Arc<dyn Store>,
    ingestors: Vec<Ingestor>,
    projector: Projector,
    compactor: Compactor,
    events: Events,
    ingest_retry: RetryPolicy,
}

impl Pipeline {
    pub fn prepare(self) -> Prepared {
        let stop = CancellationToken::new();
        let (log, log_receiver) = watch::channel(LogState::default());
        let log = Arc::new(log);
        let (progress, progress_receiver) = watch::channel(Progress::default());
        let recent = Recent::default();
        let timelines = self.sources.len();
        let mut ingest = BTreeMap::new();
        let mut ingestors = Vec::with_capacity(timelines);
        for source in self.sources {
            let (sender, requests) = mpsc::channel(REQUESTS_MAX);
            ingest.insert(source.timeline(), sender);
            let (staging, events) = (self.staging.clone(), self.events.clone());
            let settings = self.settings.ingest;
            ingestors.push(Ingestor::new(source, staging, recent.clone(), log.clone(), requests, events, settings));
        }
        let (project, requests) = mpsc::channel(REQUESTS_MAX);
        let (compact, compact_requests) = mpsc::channel(REQUESTS_MAX);
        let handle =
            Handle { stop, log: log_receiver.clone(), progress: progress_receiver.clone(), ingest, project, compact };
        let projector = Projector {
            staging: self.staging.clone(),
            transform: self.transform,
            projections: self.projections,
            log: log_receiver.clone(),
            timelines,
            recent,
            requests,
            progress: Arc::new(progress),
            events: self.events.clone(),
            settings: self.settings.project,
            run_id: self.run_id.as_str().into(),
        };
        let compactor = Compactor {
            staging: self.staging.clone(),
            log,
            progress: progress_receiver,
            requests: compact_requests,
            retention: self.settings.retention,
            events: self.events.clone(),
        };
        let pipeline = Parts {
            name: self.name,
            run_id: self.run_id,
            staging: self.staging,
            ingestors,
            projector,
            compactor,
            events: self.events,
            ingest_retry: self.settings.ingest.retry,
        };
        Prepared { pipeline, handle }
    }
}

impl Prepared {
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Runs until stopped through the handle, until an error that stops the pipeline, or with `once` until all is
    /// done. The run's record is closed in every case that leaves the process alive.
    pub async fn run(self) -> Result<()> {
        let Prepared { pipeline, handle } = self;
        let record = RunRecord {
            pipeline: pipeline.name.clone(),
            run_id: pipeline.run_id.clone(),
            started: now(),
            ended: None,
            status: RunStatus::Running,
            records_processed: 0,
            records_successful: 0,
            records_failed: 0,
            error: None,
            metrics: "{}".into(),
        };
        let (staging, ingest_retry) = (pipeline.staging.clone(), pipeline.ingest_retry);
        let (events, retry) = (pipeline.events.clone(), pipeline.ingest_retry);
        if !open_staging(&*staging, &record, &handle.stop, &events, retry).await? {
            return Ok(());
        }
        let (record, pipeline) = counting(record, pipeline);
        let result = pipeline.supervise(&handle).await;
        let mut record = record.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        record.ended = Some(now());
        record.error = result.as_ref().err().map(|error| error.to_string());
        record.status = match &result {
            Err(_) => RunStatus::Failed,
            Ok(()) if handle.stop.is_cancelled() => RunStatus::Cancelled,
            Ok(()) => RunStatus::Completed,
        };
        // The first error is the one to tell; that the record could not be closed follows from it, as a rule.
        match (result, close_run(&*staging, &record, ingest_retry).await) {
            (Ok(()), Err(error)) => Err(error),
            (result, _) => result,
        }
    }
}

/// How often a run's record is tried to be closed; left open, the next start closes it.
const CLOSE_TRIES_MAX: u32 = 5;

async fn close_run(staging: &dyn Store, record: &RunRecord, retry: crate::retry::RetryPolicy) -> Result<()> {
    let mut backoff = Backoff::new(retry);
    for _ in 1..CLOSE_TRIES_MAX {
        match staging.update_run(record).await {
            Err(error) if error.response() == Response::Retry => tokio::time::sleep(backoff.failed()).await,
            closed => return closed,
        }
    }
    staging.update_run(record).await
}

/// Counts what events tell into the run's record.
fn counting(record: RunRecord, mut pipeline: Parts) -> (Arc<std::sync::Mutex<RunRecord>>, Parts) {
    let record = Arc::new(std::sync::Mutex::new(record));
    let (counted, listener) = (record.clone(), pipeline.events.clone());
    let events = Events::new(move |event| {
        let mut record = counted.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match event {
            Event::Appended { rows, .. } => {
                record.records_processed += rows;
                record.records_successful += rows;
            }
            Event::Rejected { count, .. } => {
                record.records_processed += count;
                record.records_failed += count;
            }
            _ => {}
        }
        drop(record);
        listener.send(event.clone());
    });
    for ingestor in &mut pipeline.ingestors {
        ingestor.set_events(events.clone());
    }
    pipeline.projector.events = events.clone();
    pipeline.compactor.events = events;
    (record, pipeline)
}

/// Waits for the staging store and opens the run record; false if stopped before.
async fn open_staging(
    staging: &dyn Store,
    record: &RunRecord,
    stop: &CancellationToken,
    events: &Events,
    retry: RetryPolicy,
) -> Result<bool> {
    let mut backoff = Backoff::new(retry);
    loop {
        let opened = async {
            staging.bootstrap().await?;
            staging.start_run(record).await
        };
        match opened.await {
            Ok(()) => return Ok(true),
            Err(error) if error.response() == Response::Retry => {
                let after = backoff.failed();
                events.send(Event::Retrying { what: "the staging store".into(), reason: error.to_string(), after });
                tokio::select! { biased; _ = stop.cancelled() => return Ok(false), _ = tokio::time::sleep(after) => {} }
            }
            Err(error) => return Err(error),
        }
    }
}

impl Parts {
    /// Runs all parts side by side. An error that stops the pipeline stops every part at its next safe place.
    async fn supervise(self, handle: &Handle) -> Result<()> {
        // Parts are stopped by a child, so that a failure is not taken for a wish of the user.
        let stop = handle.stop.child_token();
        let ingest_stop = stop.clone();
        let sources_left = Arc::new(AtomicUsize::new(self.ingestors.len()));
        let ingestors = self.ingestors.into_iter().map(|ingestor| {
            let (stop, sources_left) = (ingest_stop.clone(), sources_left.clone());
            async move {
                let result = ingestor.run(stop.clone()).await;
                if let Err(error) = &result {
                    let last = sources_left.fetch_sub(1, Ordering::Relaxed) == 1;
                    if last || error.response() == Response::StopPipeline {
                        stop.cancel();
                    }
                }
                result
            }
        });
        let projector = async {
            let result = self.projector.run(stop.clone()).await;
            // With `once` the projector is the last to have work.
            stop.cancel();
            result
        };
        let (ingested, projected, compacted) =
            futures::join!(join_all(ingestors), projector, self.compactor.run(stop.clone()));
        let ingested = ingested.into_iter().collect::<Result<Vec<()>>>().map(|_| ());
        ingested.and(projected).and(compacted)
    }
}

/// Applies the retention now and then.
struct Compactor {
    staging: Arc<dyn Store>,
    log: Arc<watch::Sender<LogState>>,
    progress: watch::Receiver<Progress>,
    requests: mpsc::Receiver<oneshot::Sender<Result<u64>>>,
    retention: Retention,
    events: Events,
}

impl Compactor {
    async fn run(mut self, stop: CancellationToken) -> Result<()> {
        loop {
            let every = self.retention.every;
            let pause = async {
                match every {
                    Some(every) => tokio::time::sleep(every).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                _ = stop.cancelled() => return Ok(()),
                Some(done) = self.requests.recv() => {
                    // A receiver that has gone away no longer wants the answer.
                    let _ = done.send(self.compact().await);
                }
                _ = pause => match self.compact().await {
                    Ok(_) => {}
                    Err(error) if error.response() == Response::StopPipeline => return Err(error),
                    Err(error) => {
                        let (what, reason) = ("compaction of the log".into(), error.to_string());
                        self.events.send(Event::Retrying { what, reason, after: every.unwrap_or_default() });
                    }
                },
            }
        }
    }

    async fn compact(&mut self) -> Result<u64> {
        let captures = self.log.borrow().captures.clone();
        let before = self.retention.keep.map(|keep| now() - keep.as_micros() as Micros);
        let mut gone = 0;
        for (capture, state) in &captures {
            let Some(consumed) = self.consumed(capture) else { continue };
            let allowed = self.staging.retention_horizon(capture, before, self.retention.keep_rows).await?;
            let horizon = allowed.min(consumed);
            if horizon <= state.horizon {
                continue;
            }
            let compacted = self.staging.compact(capture, &horizon, false).await?;
            let (rows_before, rows_after) = (compacted.rows_before, compacted.rows_after);
            failpoint::reached(failpoint::COMPACT_BETWEEN);
            gone += rows_before - rows_after;
            self.log.send_modify(|log| {
                if let Some(state) = log.captures.get_mut(capture) {
                    state.horizon = horizon;
                }
            });
            self.events.send(Event::Compacted { capture: capture.clone(), rows_before, rows_after });
        }
        Ok(gone)
    }

    /// What every projection of this capture has consumed; `None` while one has not begun, or none is known yet.
    fn consumed(&self, capture: &CaptureId) -> Option<Position> {
        let progress = self.progress.borrow();
        if progress.checkpoints.is_empty() || progress.checkpoints.values().any(Option::is_none) {
            return None;
        }
        let positions: BTreeSet<Position> =
            progress.checkpoints.values().flatten().filter_map(|checkpoint| checkpoint.get(capture).copied()).collect();
        positions
            .first()
            .copied()
            .or_else(|| self.log.borrow().captures.get(capture).map(|state| state.watermark.boundary))
    }
}

/// Microseconds since the epoch, by this machine's clock.
pub fn now() -> Micros {
    chrono::Utc::now().timestamp_micros()
}
