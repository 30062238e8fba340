//! One ingestor per source: reads, appends, acknowledges, in that order (contract 5).
//!
//! The next batch is read while the last one is appended. Whatever goes wrong, the ingestor starts the source again from
//! the watermarks that the store holds; nothing else is remembered.

#[cfg(test)]
mod retry_tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::change::{ChangeBatch, Op};
use crate::error::{Error, ErrorKind, Response, Result};
use crate::event::{CommitRun, Event, Events};
use crate::failpoint;
use crate::position::{CaptureId, Position, Watermark};
use crate::recent::Recent;
use crate::retry::{Backoff, RetryPolicy};
use crate::schema::SchemaChange;
use crate::source::{BatchLimit, CaptureInfo, Resume, SnapshotProgress, Source, SourceBatch, Started};
use crate::store::{Append, Appended, CaptureState, Store};

/// Appends for each step of a projector that is busy.
const APPENDS_PER_STEP: u32 = 2;
/// Longest time that changes wait for others because of that.
const LINGER_MAX: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, Debug)]
pub struct IngestSettings {
    pub batch: BatchLimit,
    /// Longest pause between two looks at an idle source.
    pub poll_interval: Duration,
    /// Shortest time from one append to the next while the source is level: commits that come closer share a batch.
    pub linger: Duration,
    pub retry: RetryPolicy,
    /// Stop when what the source held at start is in the log.
    pub once: bool,
}

/// What the log holds, as the ingestors of this process know it.
#[derive(Clone, Default, Debug)]
pub struct LogState {
    pub captures: BTreeMap<CaptureId, CaptureState>,
    /// Sources that have been started at least once, by timeline.
    pub ready: BTreeMap<Arc<str>, Activity>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Activity {
    Reading,
    /// Nothing more will come: caught up where that was asked for, or stopped.
    Ended,
}

/// Asks a running ingestor for something; the answer tells when it is stored.
pub enum IngestRequest {
    Resnapshot { capture: CaptureId, retyped: bool, done: oneshot::Sender<Result<()>> },
}

pub struct Ingestor {
    source: Box<dyn Source>,
    store: Arc<dyn Store>,
    recent: Recent,
    log: Arc<watch::Sender<LogState>>,
    requests: mpsc::Receiver<IngestRequest>,
    events: Events,
    settings: IngestSettings,
}

/// Why one reading session ended, other than by an error.
enum Ended {
    /// Asked to stop, or caught up.
    Finished,
    /// What the store holds has changed under us: start from there.
    Again,
}

/// How far captures are staged.
type Staged = BTreeMap<CaptureId, Position>;

/// Where a session stands.
struct Session {
    /// Active captures and their staged positions, as this writer believes them stored.
    expected: Staged,
    watermark: Watermark,
    /// What `once` waits for.
    goal: Option<Position>,
    /// When it was last seen whether other processes had written.
    looked: Instant,
}

impl Ingestor {
    pub fn new(
        source: Box<dyn Source>,
        store: Arc<dyn Store>,
        recent: Recent,
        log: Arc<watch::Sender<LogState>>,
        requests: mpsc::Receiver<IngestRequest>,
        events: Events,
        settings: IngestSettings,
    ) -> Self {
        Self { source, store, recent, log, requests, events, settings }
    }

    pub(crate) fn set_events(&mut self, events: Events) {
        self.events = events;
    }

    /// Reads until stopped. An error returned is one that trying again does not mend.
    pub async fn run(mut self, stop: CancellationToken) -> Result<()> {
        let timeline = self.source.timeline();
        let mut backoff = Backoff::new(self.settings.retry);
        let result = loop {
            match self.session(&stop, &mut backoff).await {
                Ok(Ended::Finished) => break Ok(()),
                Ok(Ended::Again) => {}
                Err(error) if error.response() == Response::Retry => {
                    let after = backoff.failed();
                    let what = format!("source {timeline}");
                    self.events.send(Event::Retrying { what, reason: error.to_string(), after });
                    tokio::select! { biased; _ = stop.cancelled() => break Ok(()), _ = tokio::time::sleep(after) => {} }
                }
                Err(error) => {
                    self.events.send(Event::SourceFailed { timeline: timeline.clone(), reason: error.to_string() });
                    break Err(error);
                }
            }
        };
        self.log.send_modify(|log| {
            log.ready.insert(timeline, Activity::Ended);
        });
        result
    }

    async fn session(&mut self, stop: &CancellationToken, backoff: &mut Backoff) -> Result<Ended> {
        let mut session = self.begin().await?;
        if stop.is_cancelled() {
            return Ok(Ended::Finished);
        }
        if self.settings.once {
            session.goal = Some(self.source.head().await?.boundary);
        }
        let started = Instant::now();
        let mut batch = self.source.next(self.settings.batch).await?;
        loop {
            let begun = Instant::now();
            let failed = std::mem::take(&mut batch.failed);
            self.leave_out(failed, &mut session.expected).await?;
            let is_news = is_news(&batch, &session);
            let ahead = if is_news { self.append(&mut batch, &mut session).await? } else { None };
            // To have started is no success: what fails right after would be tried again without a pause.
            if is_news || started.elapsed() >= self.settings.retry.longest {
                backoff.succeeded();
            }
            if stop.is_cancelled() || self.reached(&session) {
                return Ok(Ended::Finished);
            }
            // Under load there is no pause in which a request would be taken.
            if let Ok(request) = self.requests.try_recv() {
                return Ok(self.serve(request).await);
            }
            batch = match ahead {
                Some(next) => next,
                None if batch.more => self.source.next(self.settings.batch).await?,
                None => match self.pause(stop, begun + self.linger()).await? {
                    Some(ended) => return Ok(ended),
                    None if self.others_wrote(&mut session).await? => return Ok(Ended::Again),
                    None => self.source.next(self.settings.batch).await?,
                },
            };
        }
    }

    /// Starts the source where the store stands, and makes the store ready for what it captures.
    async fn begin(&mut self) -> Result<Session> {
        let timeline = self.source.timeline();
        let mut known = self.store.captures().await?;
        known.retain(|_, state| state.timeline == timeline);
        let furthest = known.values().map(|state| state.watermark).max_by_key(|mark| mark.staged);
        let resume = known.iter().map(|(id, state)| {
            // A capture that stands still must not hold reading back; what comes for it is dropped.
            let watermark = if state.failed.is_some() { furthest.unwrap_or(state.watermark) } else { state.watermark };
            let counts = state.watermark != Watermark::ZERO && !state.schema_forgotten;
            let schema = counts.then(|| state.schema.clone());
            (id.clone(), Resume { watermark, snapshot: state.snapshot.clone(), schema })
        });
        let resume = resume.collect();
        let Started { identity, captures, failed } = self.source.start(&resume).await?;
        let mut read: Staged = known.iter().map(|(id, state)| (id.clone(), state.watermark.staged)).collect();
        let mut left_out = self.leave_out(failed, &mut read).await?;
        let (captures, misfits) = Self::compatible(captures, &known);
        left_out.extend(self.leave_out(misfits, &mut Staged::new()).await?);
        self.store.prepare_captures(&timeline, &identity, &captures).await?;
        let mut stored = self.store.captures().await?;
        stored.retain(|_, state| state.timeline == timeline);
        for (id, reason) in left_out {
            if let Some(state) = stored.get_mut(&id) {
                // Where it was mended meanwhile, this session leaves it out all the same: the next one reads it.
                state.failed.get_or_insert(reason);
            }
        }
        let active = |id: &CaptureId, state: &CaptureState| {
            state.failed.is_none() && captures.iter().any(|capture| capture.id == *id)
        };
        let active: Vec<_> = stored.iter().filter(|(id, state)| active(id, state)).collect();
        let began = |id: &CaptureId| {
            known.get(id).map_or((Position::ZERO, 1), |state| (state.watermark.staged, state.snapshot.generation))
        };
        if active.iter().any(|(id, state)| (state.watermark.staged, state.snapshot.generation) != began(id)) {
            // The source goes on from where the store stood before, and knows of the snapshots asked for by then.
            return Err(self.overtaken());
        }
        let expected = active.iter().map(|(id, state)| ((*id).clone(), state.watermark.staged)).collect();
        let watermark = active.iter().map(|(_, state)| state.watermark).min_by_key(|mark| mark.staged);
        self.log.send_modify(|log| {
            log.captures.retain(|_, state| state.timeline != timeline);
            log.captures.extend(stored);
            log.ready.insert(timeline, Activity::Reading);
        });
        let (watermark, looked) = (watermark.unwrap_or(Watermark::ZERO), Instant::now());
        Ok(Session { expected, watermark, goal: None, looked })
    }

    /// Captures whose schema can follow the stored one, and the others with the reason.
    fn compatible(
        captures: Vec<CaptureInfo>,
        known: &BTreeMap<CaptureId, CaptureState>,
    ) -> (Vec<CaptureInfo>, Vec<(CaptureId, Error)>) {
        let mut fit = Vec::with_capacity(captures.len());
        let mut misfits = Vec::new();
        for capture in captures {
            let stored = known.get(&capture.id).filter(|state| !state.schema_forgotten);
            match stored.map(|state| state.schema.change_to(&capture.schema)) {
                Some(SchemaChange::Incompatible { reason }) => {
                    let table = capture.schema.table.clone();
                    let error = Error::new(ErrorKind::Schema, "capture", format!("table {table}"), reason)
                        .with_remedy(format!("run shori resnapshot --retyped {table}"));
                    misfits.push((capture.id, error));
                }
                _ => fit.push(capture),
            }
        }
        (fit, misfits)
    }

    /// Marks captures that cannot go on, and goes on without them (contract 11).
    ///
    /// `read` tells where reading stood: if another process has moved a capture on since, the source may well have let
    /// go of what that one has read, and the capture is not at fault.
    /// Returns them with their reasons.
    async fn leave_out(
        &mut self,
        failed: Vec<(CaptureId, Error)>,
        read: &mut Staged,
    ) -> Result<Vec<(CaptureId, String)>> {
        let mut left_out = Vec::with_capacity(failed.len());
        for (capture, error) in failed {
            let mut reason = error.to_string();
            if let Some(state) = self.store.captures().await?.get(&capture) {
                if !reason.contains("shori resnapshot") {
                    // Whatever else is to be done, what it missed meanwhile is to be read.
                    reason = format!("{reason}; then run shori resnapshot {}", state.schema.table);
                }
                if read.get(&capture).is_some_and(|staged| *staged != state.watermark.staged) {
                    return Err(self.overtaken());
                }
                if state.failed.is_none() {
                    self.store.mark_failed(&capture, &reason).await?;
                }
            }
            read.remove(&capture);
            self.log.send_modify(|log| {
                if let Some(state) = log.captures.get_mut(&capture) {
                    state.failed = Some(reason.clone());
                }
            });
            self.events.send(Event::CaptureFailed { capture: capture.clone(), reason: reason.clone() });
            left_out.push((capture, reason));
        }
        Ok(left_out)
    }

    /// Appends `batch`, and reads the next one meanwhile if more is known to wait. Fails when another writer has been
    /// here (contract 6); the next session starts from what it left.
    async fn append(&mut self, batch: &mut SourceBatch, session: &mut Session) -> Result<Option<SourceBatch>> {
        let started = Instant::now();
        batch.changes.retain(|changes| session.expected.contains_key(&changes.capture));
        batch.snapshots.retain(|(capture, _)| session.expected.contains_key(capture));
        let timeline = self.source.timeline();
        let append = Append {
            timeline: &timeline,
            expected: &session.expected,
            changes: &batch.changes,
            watermark: batch.watermark,
            snapshots: &batch.snapshots,
            schemas: &batch.schemas,
            rejected: &batch.rejected,
        };
        failpoint::reached(failpoint::INGEST_BEFORE_APPEND);
        let source = &mut self.source;
        let limit = self.settings.batch;
        let read_ahead = async { if batch.more { source.next(limit).await.map(Some) } else { Ok(None) } };
        let (appended, ahead) = futures::join!(self.store.append(&append), read_ahead);
        let reread = session.expected.values().all(|staged| *staged >= batch.watermark.staged);
        match appended? {
            Appended::Applied { rows } => {
                let (watermark, took) = (batch.watermark, started.elapsed());
                let commits = commit_runs(&batch.changes)?;
                self.events.send(Event::Appended { timeline, rows, watermark, took, commits });
            }
            Appended::AlreadyApplied if reread => {}
            // What another process has written up to here need not be what was read: its snapshot has other chunks.
            Appended::AlreadyApplied | Appended::Conflict => return Err(self.overtaken()),
        }
        failpoint::reached(failpoint::INGEST_AFTER_APPEND);
        self.appended(batch, session)?;
        self.source.acknowledge(&batch.watermark.staged).await?;
        failpoint::reached(failpoint::INGEST_AFTER_ACKNOWLEDGE);
        ahead
    }

    fn overtaken(&self) -> Error {
        let cause = "another process has written it meanwhile";
        Error::new(ErrorKind::Unavailable, "append to", format!("the log of {}", self.source.timeline()), cause)
    }

    /// The batch is durable: tells the projector and the world.
    fn appended(&mut self, batch: &mut SourceBatch, session: &mut Session) -> Result<()> {
        let staged = batch.watermark.staged;
        let mut by_capture: BTreeMap<CaptureId, Vec<_>> = BTreeMap::new();
        for changes in batch.changes.drain(..) {
            by_capture.entry(changes.capture.clone()).or_default().push(changes);
        }
        for (capture, expected) in &mut session.expected {
            if staged > *expected {
                let mut changes = Vec::new();
                for part in by_capture.remove(capture).unwrap_or_default() {
                    changes.push(part.between(expected, &staged)?);
                }
                self.recent.push(capture, *expected, staged, changes)?;
                *expected = staged;
            }
        }
        session.watermark = batch.watermark;
        for rejected in &batch.rejected {
            let (capture, reason) = (rejected.capture.clone(), rejected.reason.clone());
            self.events.send(Event::Rejected { capture, count: 1, reason });
        }
        let log = self.log.borrow();
        let was_done = |capture: &CaptureId, progress: &SnapshotProgress| {
            let known = log.captures.get(capture).map(|state| &state.snapshot);
            known.is_some_and(|known| known.is_done() && known.generation == progress.generation)
        };
        // A source that polls keeps its place in the progress of a snapshot that has ended.
        for (capture, progress) in batch.snapshots.iter().filter(|(capture, progress)| !was_done(capture, progress)) {
            let (rows, done) = (progress.rows, progress.is_done());
            self.events.send(Event::Snapshot { capture: capture.clone(), rows, done });
        }
        drop(log);
        self.log.send_modify(|log| publish(log, batch, session));
        Ok(())
    }

    fn reached(&self, session: &Session) -> bool {
        let Some(goal) = session.goal else { return false };
        let log = self.log.borrow();
        session.watermark.boundary >= goal
            && session.expected.keys().all(|id| log.captures.get(id).is_none_or(|state| state.snapshot.is_done()))
    }

    /// Does what was asked; the next session starts from what that left.
    async fn serve(&mut self, request: IngestRequest) -> Ended {
        let IngestRequest::Resnapshot { capture, retyped, done } = request;
        let stored = self.store.request_snapshot(&capture, retyped).await;
        failpoint::reached(failpoint::INGEST_AFTER_REQUEST);
        if let Ok(progress) = &stored {
            // Who has asked may wait for the snapshot's end, and must not take the former one for it.
            self.log.send_modify(|log| {
                if let Some(state) = log.captures.get_mut(&capture) {
                    (state.snapshot, state.failed) = (progress.clone(), None);
                }
            });
        }
        // A receiver that has gone away no longer wants the answer.
        let _ = done.send(stored.map(|_| ()));
        Ended::Again
    }

    /// Shortest time between two appends. Each is a transaction of its own, and what comes during one step of the projector
    /// is read by the next, however many they were: while steps follow each other, a few appends for each will do.
    fn linger(&self) -> Duration {
        paced(self.settings.linger, self.recent.pace())
    }

    /// Waits for the source, but at least until `earliest`, for a request or the end.
    async fn pause(&mut self, stop: &CancellationToken, earliest: Instant) -> Result<Option<Ended>> {
        let (source, interval) = (&mut self.source, self.settings.poll_interval);
        let changed = async {
            source.wait(interval).await?;
            tokio::time::sleep_until(earliest).await;
            Ok(None)
        };
        tokio::select! {
            biased;
            _ = stop.cancelled() => Ok(Some(Ended::Finished)),
            Some(request) = self.requests.recv() => Ok(Some(self.serve(request).await)),
            waited = changed => waited,
        }
    }

    /// Whether another process has moved the log on, asked for a snapshot or mended a capture. An idle source would not
    /// tell: it may have nothing more to say.
    async fn others_wrote(&mut self, session: &mut Session) -> Result<bool> {
        if session.looked.elapsed() < self.settings.poll_interval {
            return Ok(false);
        }
        session.looked = Instant::now();
        let timeline = self.source.timeline();
        let stored = self.store.captures().await?;
        let log = self.log.borrow();
        let moved = |(id, stored): (&CaptureId, &CaptureState)| {
            let Some(known) = log.captures.get(id) else { return stored.timeline == timeline };
            stored.watermark.staged > known.watermark.staged
                || stored.snapshot.generation > known.snapshot.generation
                || stored.failed.is_none() && known.failed.is_some()
        };
        Ok(stored.iter().any(moved))
    }
}

/// Runs of the stream's changes, in position order within each capture. Rows of a snapshot are left out: they were
/// committed long before. The image before a key update is no change of its own.
fn commit_runs(changes: &[ChangeBatch]) -> Result<Vec<CommitRun>> {
    let not_a_change = [Op::Snapshot as u8, Op::UpdateBefore as u8];
    let mut runs = Vec::new();
    for batch in changes {
        let times = batch.commit_time.values();
        let streamed = (0..batch.len()).filter(|&row| !not_a_change.contains(&batch.op.value(row)));
        let mut last: Option<(usize, u64)> = None;
        for row in streamed {
            match &mut last {
                Some((end, rows)) if times[*end] == times[row] => (*end, *rows) = (row, *rows + 1),
                _ => {
                    if let Some((end, rows)) = last {
                        runs.push(CommitRun { up_to: batch.position(end)?, time: times[end], rows });
                    }
                    last = Some((row, 1));
                }
            }
        }
        if let Some((end, rows)) = last {
            runs.push(CommitRun { up_to: batch.position(end)?, time: times[end], rows });
        }
    }
    Ok(runs)
}

fn paced(linger: Duration, pace: Duration) -> Duration {
    linger.max((pace / APPENDS_PER_STEP).min(LINGER_MAX))
}

fn is_news(batch: &SourceBatch, session: &Session) -> bool {
    batch.watermark.staged > session.watermark.staged
        || batch.watermark.boundary > session.watermark.boundary
        || batch.rows() > 0
        || !batch.snapshots.is_empty()
        || !batch.schemas.is_empty()
        || !batch.rejected.is_empty()
}

fn publish(log: &mut LogState, batch: &SourceBatch, session: &Session) {
    for capture in session.expected.keys() {
        if let Some(state) = log.captures.get_mut(capture) {
            // As in the store: reading a stretch again, otherwise split, moves neither part back.
            let (mark, new) = (&mut state.watermark, batch.watermark);
            mark.staged = mark.staged.max(new.staged);
            if new.boundary > mark.boundary {
                (mark.boundary, mark.boundary_time) = (new.boundary, new.boundary_time);
            }
        }
    }
    for (capture, progress) in &batch.snapshots {
        if let Some(state) = log.captures.get_mut(capture) {
            if state.snapshot.generation < progress.generation && state.snapshot.is_done() {
                state.earlier_snapshots.push(state.snapshot.clone());
            }
            state.snapshot = progress.clone();
        }
    }
    for info in &batch.schemas {
        if let Some(state) = log.captures.get_mut(&info.id) {
            state.schema = info.schema.clone();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn appends_follow_the_steps_of_a_busy_projector_within_bounds() {
        let ms = Duration::from_millis;
        for (pace, linger) in [(0, 25), (40, 25), (400, 200), (2_000, 500), (60_000, 500)] {
            assert_eq!(paced(ms(25), ms(pace)), ms(linger), "a step each {pace} ms");
        }
        assert_eq!(paced(ms(900), ms(400)), ms(900), "what is configured is the least");
    }
}
