//! Applies the log to state, and brings each projection's target to where state stands.
//!
//! One projector serves a pipeline; each projection has its own worker state, its own pauses after failures, and commits
//! beside the others: a slow or broken target delays no neighbour (contract 11).
//!
//! The target's checkpoint is the truth. State is advanced in steps that end at boundaries only (contract 3): at the
//! cutoff, and on the way at every checkpoint that a target already has and at the ends of snapshots. So an output always
//! starts exactly where its target stands.

mod output;
#[cfg(test)]
mod slow_target_tests;
mod worker;

use std::collections::{BTreeMap, VecDeque};
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
use crate::projection::{Derivation, Projection};
use crate::recent::Recent;
use crate::retry::{Backoff, RetryPolicy};
use crate::step::{self, Range, Step, StepReader};
use crate::store::Store;
use crate::transform::{Applied, StateTable, Transform};
use output::Outcome;
use worker::Worker;

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

struct State {
    store_id: Option<String>,
    workers: Vec<Worker>,
    applied: BTreeMap<CaptureId, Applied>,
    /// The log's horizon when state was last begun from the log's start. Below it, state is not yet what the source
    /// held: nothing goes out from there.
    compacted: Positions,
    /// The log's horizon when the cache was opened: whether state below it was begun from a compacted log is not known.
    opened: Positions,
    tables: Vec<StateTable>,
    commits: JoinSet<Outcome>,
    /// Whether the transform has let go of everything consumed.
    forgotten: bool,
    /// When the newest step began, while more follow at once.
    stepped: Option<Instant>,
}

impl Projector {
    /// Projects until stopped, or with `once` until all is done. An error returned is one that trying again does not
    /// mend; with `once`, also the first failure of a projection.
    pub async fn run(mut self, stop: CancellationToken) -> Result<()> {
        let mut state = State {
            store_id: None,
            workers: std::mem::take(&mut self.projections).into_iter().map(|(p, s)| self.worker(p, s)).collect(),
            applied: BTreeMap::new(),
            compacted: Positions::new(),
            opened: Positions::new(),
            tables: Vec::new(),
            commits: JoinSet::new(),
            forgotten: false,
            stepped: None,
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
        self.load_checkpoints(state, log).await?;
        // Outputs of the step before go out before state moves on, so that neighbours share one step.
        let mut moved = self.start_outputs(state, log).await?;
        if let Some(step) = self.next_step(state, log) {
            self.advance(state, &step).await?;
            moved = true;
            self.gather(state).await?;
            self.start_outputs(state, log).await?;
        }
        if !moved && state.commits.is_empty() {
            state.stepped = None;
            self.recent.set_pace(Duration::ZERO);
        }
        let is_open = !state.tables.is_empty();
        if !moved && is_open && !state.forgotten && state.commits.is_empty() {
            self.forget(state).await?;
        }
        Ok(moved)
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
        let before = state.stepped.replace(started);
        self.recent.set_pace(before.map_or(Duration::ZERO, |before| started - before));
        let zero = Applied { position: Position::ZERO, time: 0 };
        let ranges = step.captures.iter().map(|capture| Range {
            after: state.applied.get(&capture.capture).unwrap_or(&zero).position,
            capture: capture.clone(),
        });
        let ranges: VecDeque<Range> = ranges.filter(|range| range.capture.to.position > range.after).collect();
        let (compacted, opened) = (state.compacted.clone(), state.opened.clone());
        let mut reader = StepReader::new(self.staging.clone(), self.recent.clone(), ranges, compacted, opened);
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
            let lags = worker.not_before.is_some() || worker.failure.is_some();
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
                let object = format!("projection {name}");
                let named = reason.contains(&object) || reason.contains(&format!("table {name}:"));
                Err(match named {
                    true => Error::repeated(ErrorKind::Projection, reason.clone()),
                    false => Error::new(ErrorKind::Projection, "refresh", object, reason.clone()),
                })
            }
            None => Ok(()),
        }
    }
}
