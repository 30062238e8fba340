//! Applies the log to state, and brings each projection's target to where state stands.
//!
//! One projector serves a pipeline; each projection has its own worker state, its own pauses after failures, and commits
//! beside the others: a slow or broken target delays no neighbour (contract 11).
//!
//! The target's checkpoint is the truth. State is advanced in steps that end at boundaries only (contract 3): at the
//! cutoff, and on the way at every checkpoint that a target already has and at the ends of snapshots. So an output always
//! starts exactly where its target stands.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, ErrorKind, Response, Result};
use crate::event::{Event, Events};
use crate::failpoint;
use crate::ingest::{Activity, LogState};
use crate::position::{CaptureId, Position, Positions};
use crate::projection::{Derivation, Projection, Target, TargetShape};
use crate::recent::Recent;
use crate::retry::{Backoff, RetryPolicy};
use crate::step::{self, Range, Step, StepReader};
use crate::store::{Committed, OutputCommit, OutputReader, Store};
use crate::transform::{Applied, Computed, StateTable, Transform};

/// Changes kept for a lagging projection, at most; past it the projection is computed afresh.
pub const KEPT_CHANGES_MAX_ROWS: u64 = 5_000_000;

/// Kept changes above which consumed ones are let go of while more wait.
const FORGET_ABOVE_ROWS: u64 = 10_000;

#[derive(Clone, Copy, Debug)]
pub struct ProjectSettings {
    /// Longest pause between two looks at the log.
    pub interval: Duration,
    /// Shortest time from one step to the next: commits that come closer together share a step.
    pub debounce: Duration,
    pub retry: RetryPolicy,
    /// Stop when everything that the ingestors of this process staged is projected.
    pub once: bool,
}

/// Asks the running projector for something.
pub enum ProjectRequest {
    /// Builds a projection anew; the answer comes when it shows again what the log held when it was asked for.
    Rebuild { projection: String, done: oneshot::Sender<Result<()>> },
}

/// How far the projections of this process have come.
#[derive(Clone, Default, Debug)]
pub struct Progress {
    pub checkpoints: BTreeMap<Arc<str>, Option<Positions>>,
    /// Why a projection does not move.
    pub failed: BTreeMap<Arc<str>, String>,
}

/// Everything a projector works on and with.
pub struct Projector {
    pub staging: Arc<dyn Store>,
    pub transform: Arc<dyn Transform>,
    pub projections: Vec<(Projection, Arc<dyn Store>)>,
    pub log: watch::Receiver<LogState>,
    pub timelines: usize,
    pub recent: Recent,
    pub requests: mpsc::Receiver<ProjectRequest>,
    pub progress: Arc<watch::Sender<Progress>>,
    pub events: Events,
    pub settings: ProjectSettings,
    pub run_id: Arc<str>,
}

/// One projection's worker.
struct Worker {
    projection: Projection,
    store: Arc<dyn Store>,
    /// Known once the tables it reads are captured and its SQL binds.
    target: Option<Arc<Target>>,
    checkpoint: Option<Positions>,
    /// Whether `checkpoint` is what the store holds.
    loaded: bool,
    committing: bool,
    backoff: Backoff,
    not_before: Option<Instant>,
    waiting: Vec<oneshot::Sender<Result<()>>>,
    /// Where the projection must stand before those who wait for it are answered.
    goal: Positions,
}

impl Worker {
    /// Tells those who wait that the projection is built, if it has come as far as they asked.
    fn answer(&mut self) {
        let Some(checkpoint) = &self.checkpoint else { return };
        if self.goal.iter().all(|(id, goal)| checkpoint.get(id).is_none_or(|at| at >= goal)) {
            for waiting in self.waiting.drain(..) {
                // A receiver that has gone away no longer wants the answer.
                let _ = waiting.send(Ok(()));
            }
        }
    }
}

/// What a commit task brings back.
struct Outcome {
    worker: usize,
    result: Result<Positions>,
}

struct State {
    store_id: Option<String>,
    workers: Vec<Worker>,
    applied: BTreeMap<CaptureId, Applied>,
    /// The log's horizon when state was last begun from the log's start. Below it, state is not yet what the source
    /// held: nothing goes out from there.
    compacted: Positions,
    tables: Vec<StateTable>,
    commits: JoinSet<Outcome>,
    /// Whether the transform has let go of everything consumed.
    forgotten: bool,
}

impl Projector {
    /// Projects until stopped, or with `once` until all is done. An error returned is one that trying again does not
    /// mend; with `once`, also the first failure of a projection.
    pub async fn run(mut self, stop: CancellationToken) -> Result<()> {
        let mut state = State {
            store_id: None,
            workers: std::mem::take(&mut self.projections).into_iter().map(|(p, s)| self.worker(p, s)).collect(),
            applied: BTreeMap::new(),
            compacted: BTreeMap::new(),
            tables: Vec::new(),
            commits: JoinSet::new(),
            forgotten: false,
        };
        // Known to all before any is read: a projection of which nothing is known yet holds compaction back.
        state.workers.iter().for_each(|worker| self.report(worker, None));
        let mut backoff = Backoff::new(self.settings.retry);
        let mut last_step = None;
        loop {
            if stop.is_cancelled() {
                break;
            }
            // Under load there is no pause in which a request would be taken.
            while let Ok(request) = self.requests.try_recv() {
                self.serve(&mut state, request).await?;
            }
            let mut log = self.log.borrow_and_update().clone();
            match self.cycle(&mut state, &mut log).await {
                Ok(moved) => {
                    backoff.succeeded();
                    if moved {
                        self.rest(&mut last_step, &stop).await;
                        continue;
                    }
                }
                Err(error) if error.response() == Response::Retry => {
                    // What failed may have been done all the same: where state stands is read anew.
                    state.tables.clear();
                    let after = backoff.failed();
                    self.events.send(Event::Retrying { what: "state".into(), reason: error.to_string(), after });
                    tokio::select! { biased; _ = stop.cancelled() => break, _ = tokio::time::sleep(after) => continue }
                }
                Err(error) => return Err(error),
            }
            if self.settings.once && self.finished(&state, &log) {
                return self.first_failure();
            }
            self.wait(&mut state, &stop).await?;
        }
        // What is being committed is finished, not torn (contract 10).
        while let Some(done) = state.commits.join_next().await {
            self.committed(&mut state, done).await?;
        }
        Ok(())
    }

    fn worker(&self, projection: Projection, store: Arc<dyn Store>) -> Worker {
        Worker {
            projection,
            store,
            target: None,
            checkpoint: None,
            loaded: false,
            committing: false,
            backoff: Backoff::new(self.settings.retry),
            not_before: None,
            waiting: Vec::new(),
            goal: Positions::new(),
        }
    }

    /// One look at the log: applies a step if there is one, and starts what outputs can be made. Whether anything moved.
    async fn cycle(&mut self, state: &mut State, log: &mut LogState) -> Result<bool> {
        if log.ready.len() < self.timelines {
            return Ok(false);
        }
        if self.has_ended(log) {
            // Nobody tells any more what other processes write, and compaction may have passed what is known here.
            let mut stored = self.staging.captures().await?;
            // Mended or not, this process reads no more of what it left out.
            for (id, state) in &mut stored {
                let known = log.captures.get(id).and_then(|known| known.failed.clone());
                state.failed = state.failed.take().or(known);
            }
            log.captures = stored;
        }
        self.open(state, log).await?;
        self.load_checkpoints(state).await?;
        // Outputs of the step before go out before state moves on, so that neighbours share one step.
        let mut moved = self.start_outputs(state, log).await?;
        if let Some(step) = self.next_step(state, log) {
            self.advance(state, &step).await?;
            moved = true;
            self.start_outputs(state, log).await?;
        }
        if !moved && !state.forgotten && state.commits.is_empty() {
            self.forget(state).await?;
        }
        Ok(moved)
    }

    /// Opens the transform when tables are new or have changed, and describes targets not described yet.
    async fn open(&mut self, state: &mut State, log: &LogState) -> Result<()> {
        let capture = |(id, capture): (&CaptureId, &crate::store::CaptureState)| StateTable {
            capture: id.clone(),
            schema: capture.schema.clone(),
        };
        let tables: Vec<StateTable> = log.captures.iter().map(capture).collect();
        if tables == state.tables && !state.tables.is_empty() {
            return Ok(());
        }
        if tables.is_empty() {
            return Ok(());
        }
        // Pending outputs are bound to the old shape.
        while let Some(done) = state.commits.join_next().await {
            self.committed(state, done).await?;
        }
        let store_id = match &state.store_id {
            Some(store_id) => store_id.clone(),
            None => self.staging.bootstrap().await?,
        };
        let named = |worker: &Worker| worker.projection.with_key_names(|table| key_of(&tables, table));
        let projections: Vec<Projection> = state.workers.iter().map(named).collect();
        self.transform.open(&store_id, &tables, &projections).await?;
        state.store_id = Some(store_id);
        state.applied = self.transform.applied().await?;
        state.tables = tables;
        for index in 0..state.workers.len() {
            state.workers[index].target = None;
            state.workers[index].loaded = false;
        }
        Ok(())
    }

    /// For workers that do not know where their target stands: makes it ready, reads the checkpoint, settles.
    async fn load_checkpoints(&mut self, state: &mut State) -> Result<()> {
        for index in 0..state.workers.len() {
            let worker = &state.workers[index];
            if worker.loaded || worker.committing || worker.not_before.is_some_and(|time| time > Instant::now()) {
                continue;
            }
            match self.load_checkpoint(&state.workers[index], &state.tables).await {
                Ok((target, checkpoint)) => {
                    let worker = &mut state.workers[index];
                    worker.target = Some(Arc::new(target));
                    worker.checkpoint = checkpoint;
                    worker.loaded = true;
                    worker.not_before = None;
                    state.forgotten = false;
                    // Another process may have built what was asked of this one.
                    worker.answer();
                    self.report(&state.workers[index], None);
                }
                Err(error) => self.failed(state, index, error).await?,
            }
        }
        Ok(())
    }

    async fn load_checkpoint(&self, worker: &Worker, tables: &[StateTable]) -> Result<(Target, Option<Positions>)> {
        let name = &worker.projection.name;
        let mut captures = Vec::new();
        for table in worker.projection.tables() {
            let found: Vec<&StateTable> = tables.iter().filter(|state| state.schema.table == table).collect();
            if found.is_empty() {
                let cause = format!("table {table} is not captured");
                return Err(Error::new(ErrorKind::Projection, "build", format!("projection {name}"), cause)
                    .with_remedy(format!("add {table} to the tables of a source")));
            }
            captures.extend(found.iter().map(|state| state.capture.clone()));
        }
        let columns = self.transform.describe(name).await?;
        let named = worker.projection.with_key_names(|table| key_of(tables, table));
        let (shape, key) = match &named.derivation {
            Derivation::Sql(sql) => (TargetShape::Rows, sql.key.clone()),
            Derivation::Latest { table } => (TargetShape::Rows, key_of(tables, table)),
            Derivation::History(history) => (TargetShape::Versions, history.key.clone()),
        };
        let target = Target { projection: name.clone(), shape, key, columns, captures };
        worker.store.bootstrap().await?;
        worker.store.prepare_target(&target).await?;
        let checkpoint = worker.store.checkpoint(name).await?.map(|checkpoint| checkpoint.positions);
        self.transform.settle(name, checkpoint.as_ref()).await?;
        Ok((target, checkpoint))
    }

    /// State may not move before every target's checkpoint is known: it could pass one.
    fn next_step(&self, state: &State, log: &LogState) -> Option<Step> {
        let undecided = |worker: &Worker| !worker.loaded && worker.not_before.is_none();
        if state.workers.iter().any(undecided) {
            return None;
        }
        let checkpoints = state.workers.iter().filter_map(|worker| worker.checkpoint.as_ref());
        step::next(&log.captures, &state.applied, checkpoints)
    }

    async fn advance(&mut self, state: &mut State, step: &Step) -> Result<()> {
        let started = Instant::now();
        let zero = Applied { position: Position::ZERO, time: 0 };
        let ranges = step.captures.iter().map(|capture| Range {
            after: state.applied.get(&capture.capture).unwrap_or(&zero).position,
            capture: capture.clone(),
        });
        let ranges: VecDeque<Range> = ranges.filter(|range| range.capture.to.position > range.after).collect();
        let mut reader = StepReader::new(self.staging.clone(), self.recent.clone(), ranges, state.compacted.clone());
        failpoint::reached(failpoint::PROJECT_BEFORE_ADVANCE);
        let advanced = self.transform.advance(&step.captures, &mut reader).await;
        if reader.is_torn() {
            return self.replay(state).await;
        }
        let advanced = advanced?;
        failpoint::reached(failpoint::PROJECT_AFTER_ADVANCE);
        state.compacted = reader.compacted();
        state.applied = self.transform.applied().await?;
        self.events.send(Event::Advanced { rows: advanced.rows, took: started.elapsed() });
        for capture in &step.captures {
            self.recent.forget(&capture.capture, &capture.to.position);
        }
        state.forgotten = false;
        // Letting go costs a durable write of its own: it waits for an idle moment, or until it is worth it.
        if self.transform.changes_kept().await? > FORGET_ABOVE_ROWS {
            self.forget(state).await?;
        }
        Ok(())
    }

    /// Lets the transform go of changes that every projection has consumed.
    async fn forget(&mut self, state: &mut State) -> Result<()> {
        let too_many = self.transform.changes_kept().await? > KEPT_CHANGES_MAX_ROWS;
        let mut needed = Vec::new();
        for worker in &state.workers {
            let history = matches!(worker.projection.derivation, Derivation::History(_));
            let lags = worker.not_before.is_some();
            match &worker.checkpoint {
                Some(checkpoint) if !(too_many && lags) => needed.push(checkpoint.clone()),
                None if history && !(too_many && lags) => needed.push(Positions::new()),
                // Others are computed afresh from state.
                _ => {}
            }
        }
        self.transform.forget(&needed).await?;
        state.forgotten = true;
        failpoint::reached(failpoint::PROJECT_AFTER_FORGET);
        Ok(())
    }

    /// Computes an output for every worker that is free and has something to do, and commits it in the background.
    async fn start_outputs(&mut self, state: &mut State, log: &LogState) -> Result<bool> {
        let mut moved = false;
        for index in 0..state.workers.len() {
            while let Some(done) = state.commits.try_join_next() {
                self.committed(state, done).await?;
            }
            let worker = &state.workers[index];
            let resting = worker.not_before.is_some_and(|time| time > Instant::now());
            let Some(target) = worker.target.clone().filter(|_| worker.loaded && !worker.committing && !resting) else {
                continue;
            };
            if self.is_within_horizon(worker, &target, state, log) {
                continue;
            }
            let readiness = readiness(&worker.projection, &target, state, log);
            let complete = match readiness {
                Readiness::Wait => continue,
                Readiness::Failed(reason) => {
                    let error = Error::new(
                        ErrorKind::Projection,
                        "refresh",
                        format!("projection {}", target.projection),
                        reason,
                    );
                    self.failed(state, index, error).await?;
                    continue;
                }
                Readiness::Ready { complete } => complete,
            };
            match self.transform.compute(&target.projection, worker.checkpoint.as_ref()).await {
                Ok(Computed::UpToDate | Computed::Behind) => {}
                Ok(Computed::NeedsReplay) => {
                    self.replay(state).await?;
                    return Ok(true);
                }
                Ok(Computed::Output { positions, as_of_time, reader }) => {
                    let horizon =
                        target.captures.first().and_then(|id| log.captures.get(id)).map(|state| state.horizon);
                    let commit = Commit {
                        worker: index,
                        store: worker.store.clone(),
                        transform: self.transform.clone(),
                        target,
                        expected: worker.checkpoint.clone(),
                        positions,
                        as_of_time,
                        horizon: horizon.unwrap_or(Position::ZERO),
                        complete,
                        run_id: self.run_id.clone(),
                        events: self.events.clone(),
                    };
                    state.workers[index].committing = true;
                    state.commits.spawn(commit.run(reader));
                    moved = true;
                }
                Err(error) => self.failed(state, index, error).await?,
            }
        }
        Ok(moved)
    }

    /// Whether a history that is built anew would end within the commit of the log's horizon, with more to come there.
    /// Its target knows versions by commit, so it could not tell what it keeps from what follows.
    fn is_within_horizon(&self, worker: &Worker, target: &Target, state: &State, log: &LogState) -> bool {
        if worker.checkpoint.is_some() || target.shape != TargetShape::Versions {
            return false;
        }
        let next = self.next_step(state, log);
        let more = |id: &CaptureId| next.iter().flat_map(|step| &step.captures).any(|advance| advance.capture == *id);
        target.captures.iter().any(|id| {
            let known = log.captures.get(id).map_or(Position::ZERO, |capture| capture.horizon);
            let horizon = state.compacted.get(id).map_or(known, |horizon| known.max(*horizon));
            more(id) && state.applied.get(id).is_some_and(|applied| applied.position.lsn <= horizon.lsn)
        })
    }

    /// A history needs changes that are gone: the cache is rebuilt from the log, by way of every checkpoint.
    async fn replay(&mut self, state: &mut State) -> Result<()> {
        while let Some(done) = state.commits.join_next().await {
            self.committed(state, done).await?;
        }
        self.transform.discard().await?;
        state.tables.clear();
        state.applied.clear();
        state.compacted.clear();
        Ok(())
    }

    async fn committed(&mut self, state: &mut State, done: Result<Outcome, tokio::task::JoinError>) -> Result<()> {
        let outcome = done.map_err(|cause| Error::new(ErrorKind::Internal, "finish", "a commit", cause))?;
        let worker = &mut state.workers[outcome.worker];
        worker.committing = false;
        state.forgotten = false;
        match outcome.result {
            Ok(positions) => {
                worker.checkpoint = Some(positions);
                worker.backoff.succeeded();
                worker.not_before = None;
                worker.answer();
                self.report(&state.workers[outcome.worker], None);
                Ok(())
            }
            Err(error) => self.failed(state, outcome.worker, error).await,
        }
    }

    /// Records why a projection does not move, and when it is tried again. Its checkpoint is read anew then.
    async fn failed(&mut self, state: &mut State, index: usize, error: Error) -> Result<()> {
        if error.response() == Response::StopPipeline {
            return Err(error);
        }
        let worker = &mut state.workers[index];
        worker.loaded = false;
        worker.not_before = Some(Instant::now() + worker.backoff.failed());
        let reason = error.to_string();
        if error.kind() == ErrorKind::Unavailable {
            let after = worker.not_before.map_or(Duration::ZERO, |time| time - Instant::now());
            let what = format!("projection {}", worker.projection.name);
            self.events.send(Event::Retrying { what, reason, after });
            return Ok(());
        }
        for waiting in worker.waiting.drain(..) {
            // A receiver that has gone away no longer wants the answer.
            let _ = waiting.send(Err(Error::new(error.kind(), error.operation(), error.object(), reason.clone())));
        }
        let projection = worker.projection.name.clone();
        if let Err(unrecorded) = state.workers[index].store.record_error(&projection, &reason).await {
            let what = format!("recording the error of {projection}");
            self.events.send(Event::Retrying { what, reason: unrecorded.to_string(), after: Duration::ZERO });
        }
        self.report(&state.workers[index], Some(reason.clone()));
        self.events.send(Event::ProjectionFailed { projection, reason });
        Ok(())
    }

    fn report(&self, worker: &Worker, failure: Option<String>) {
        self.progress.send_modify(|progress| {
            let name = worker.projection.name.clone();
            progress.checkpoints.insert(name.clone(), worker.checkpoint.clone());
            match failure {
                Some(reason) => progress.failed.insert(name, reason),
                None => progress.failed.remove(&name),
            };
        });
    }

    /// Keeps steps apart by the debounce time.
    async fn rest(&self, last_step: &mut Option<Instant>, stop: &CancellationToken) {
        if let Some(last) = last_step.filter(|_| !self.settings.debounce.is_zero()) {
            tokio::select! { biased; _ = stop.cancelled() => {}, _ = tokio::time::sleep_until(last + self.settings.debounce) => {} }
        }
        *last_step = Some(Instant::now());
    }

    /// Waits for the log to move, a commit to end, a request, or the next try of a failed projection.
    async fn wait(&mut self, state: &mut State, stop: &CancellationToken) -> Result<()> {
        let latest = Instant::now() + self.settings.interval;
        let retries = state.workers.iter().filter_map(|worker| worker.not_before);
        let until = retries.min().unwrap_or(latest).min(latest);
        tokio::select! {
            biased;
            _ = stop.cancelled() => {}
            Some(done) = state.commits.join_next(), if !state.commits.is_empty() => self.committed(state, done).await?,
            Some(request) = self.requests.recv() => self.serve(state, request).await?,
            changed = self.log.changed() => if changed.is_err() { tokio::time::sleep_until(until).await },
            _ = tokio::time::sleep_until(until) => {}
        }
        Ok(())
    }

    async fn serve(&mut self, state: &mut State, request: ProjectRequest) -> Result<()> {
        let ProjectRequest::Rebuild { projection, done } = request;
        let Some(index) = state.workers.iter().position(|worker| *worker.projection.name == *projection) else {
            let unknown = Error::new(
                ErrorKind::Usage,
                "rebuild",
                format!("projection {projection}"),
                "there is none of that name",
            );
            // A receiver that has gone away no longer wants the answer.
            let _ = done.send(Err(unknown));
            return Ok(());
        };
        while let Some(finished) = state.commits.join_next().await {
            self.committed(state, finished).await?;
        }
        if let Err(error) = state.workers[index].store.reset_projection(&projection).await {
            let _ = done.send(Err(error));
            return Ok(());
        }
        let goal = cutoffs(&self.log.borrow());
        let worker = &mut state.workers[index];
        worker.waiting.push(done);
        worker.goal = goal;
        worker.loaded = false;
        worker.not_before = None;
        Ok(())
    }

    /// Whether every source of this process has brought what it will.
    fn has_ended(&self, log: &LogState) -> bool {
        log.ready.len() >= self.timelines && log.ready.values().all(|activity| *activity == Activity::Ended)
    }

    fn finished(&self, state: &State, log: &LogState) -> bool {
        if !self.has_ended(log) || !state.commits.is_empty() || self.next_step(state, log).is_some() {
            return false;
        }
        let failed = self.progress.borrow().failed.clone();
        let settled = |worker: &Worker| {
            failed.contains_key(&worker.projection.name)
                || worker.checkpoint.as_ref().is_some_and(|checkpoint| {
                    checkpoint
                        .iter()
                        .all(|(id, at)| state.applied.get(id).is_none_or(|applied| applied.position <= *at))
                })
        };
        state.workers.iter().all(settled)
    }

    fn first_failure(&self) -> Result<()> {
        match self.progress.borrow().failed.iter().next() {
            Some((name, reason)) => {
                Err(Error::new(ErrorKind::Projection, "refresh", format!("projection {name}"), reason.clone()))
            }
            None => Ok(()),
        }
    }
}

/// How far captures that do not stand still can be projected: per timeline, its lowest boundary.
fn cutoffs(log: &LogState) -> Positions {
    let mut lowest: BTreeMap<&Arc<str>, Position> = BTreeMap::new();
    let moving = || log.captures.iter().filter(|(_, capture)| capture.failed.is_none());
    for (_, capture) in moving() {
        let boundary = capture.watermark.boundary;
        lowest.entry(&capture.timeline).and_modify(|at| *at = (*at).min(boundary)).or_insert(boundary);
    }
    moving().filter_map(|(id, capture)| Some((id.clone(), *lowest.get(&capture.timeline)?))).collect()
}

fn key_of(tables: &[StateTable], table: &str) -> Vec<String> {
    let found = tables.iter().find(|state| &*state.schema.table == table);
    found.map(|state| state.schema.key_names().into_iter().map(String::from).collect()).unwrap_or_default()
}

/// Whether a projection can be brought to where state stands.
enum Readiness {
    Ready { complete: bool },
    Wait,
    Failed(String),
}

fn readiness(projection: &Projection, target: &Target, state: &State, log: &LogState) -> Readiness {
    let mut complete = true;
    let mut by_timeline: BTreeMap<Arc<str>, BTreeSet<Position>> = BTreeMap::new();
    for id in &target.captures {
        let Some(capture) = log.captures.get(id) else { return Readiness::Wait };
        if let Some(reason) = &capture.failed {
            return Readiness::Failed(format!("capture {id} stands still: {reason}"));
        }
        let Some(applied) = state.applied.get(id) else { return Readiness::Wait };
        if state.compacted.get(id).is_some_and(|horizon| applied.position < *horizon) {
            return Readiness::Wait;
        }
        by_timeline.entry(capture.timeline.clone()).or_default().insert(applied.position);
        let first = capture.snapshot.generation <= 1;
        complete &= !first || (capture.snapshot.is_done() && capture.snapshot.end <= applied.position);
    }
    // Captures of one timeline must stand at one place: contract 3.
    if by_timeline.values().any(|positions| positions.len() > 1) {
        return Readiness::Wait;
    }
    if !complete && !projection.shows_partial_snapshot() {
        return Readiness::Wait;
    }
    Readiness::Ready { complete }
}

/// A computed output on its way into its store.
struct Commit {
    worker: usize,
    store: Arc<dyn Store>,
    transform: Arc<dyn Transform>,
    target: Arc<Target>,
    expected: Option<Positions>,
    positions: Positions,
    as_of_time: i64,
    horizon: Position,
    complete: bool,
    run_id: Arc<str>,
    events: Events,
}

impl Commit {
    async fn run(self, mut reader: Box<dyn OutputReader>) -> Outcome {
        Outcome { worker: self.worker, result: self.commit(&mut *reader).await }
    }

    /// Commits and settles. Another process may have been here first: then its checkpoint is an error to try again
    /// from, because what was computed does not start where the target now stands (contract 6).
    async fn commit(&self, output: &mut dyn OutputReader) -> Result<Positions> {
        let started = Instant::now();
        let projection = self.target.projection.clone();
        let one = self.positions.values().collect::<BTreeSet<_>>();
        let as_of_lsn = one.first().filter(|_| one.len() == 1).map(|position| position.lsn);
        let commit = OutputCommit {
            target: &self.target,
            expected: self.expected.as_ref(),
            checkpoint: &self.positions,
            as_of_lsn,
            as_of_time: self.as_of_time,
            horizon: self.horizon,
            complete: self.complete,
            run_id: &self.run_id,
            output,
        };
        failpoint::reached(failpoint::PROJECT_BEFORE_COMMIT);
        match self.store.commit_output(commit).await? {
            Committed::Applied { rows } => {
                let (positions, as_of_time, took) = (self.positions.clone(), self.as_of_time, started.elapsed());
                self.events.send(Event::Projected {
                    projection: projection.clone(),
                    positions,
                    as_of_time,
                    rows,
                    took,
                });
            }
            Committed::AlreadyApplied => {}
            Committed::Conflict => {
                let cause = "another process has written it meanwhile";
                return Err(Error::new(ErrorKind::Unavailable, "commit", format!("projection {projection}"), cause));
            }
        }
        failpoint::reached(failpoint::PROJECT_AFTER_COMMIT);
        self.transform.settle(&projection, Some(&self.positions)).await?;
        failpoint::reached(failpoint::PROJECT_AFTER_SETTLE);
        Ok(self.positions.clone())
    }
}
