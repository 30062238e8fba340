//! Which outputs can be made, and each one's way into its store.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinError;
use tokio::time::Instant;

use super::worker::Worker;
use super::{Projector, State};
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Events};
use crate::failpoint;
use crate::ingest::LogState;
use crate::position::{CaptureId, Micros, Position, Positions};
use crate::projection::{Projection, Target, TargetShape};
use crate::store::{Committed, OutputCommit, OutputReader, Store};
use crate::transform::{Computed, Transform};

/// A commit that takes longer is not waited for.
const SHORT_COMMIT: Duration = Duration::from_millis(250);

/// What a commit task brings back.
pub(super) struct Outcome {
    worker: usize,
    result: Result<Positions>,
    took: Duration,
}

impl Projector {
    /// Waits a little for commits that are about to end, so that the outputs of a step are computed together: what it touched
    /// is then read once. A target that was slow the last time is not waited for, and no commit for long (contract 11).
    pub(super) async fn gather(&mut self, state: &mut State) -> Result<()> {
        let until =
            |worker: &Worker| worker.committing_since.filter(|_| !worker.slow).map(|since| since + SHORT_COMMIT);
        while let Some(latest) = state.workers.iter().filter_map(until).filter(|until| *until > Instant::now()).max() {
            match tokio::time::timeout_at(latest, state.commits.join_next()).await {
                Ok(Some(done)) => self.committed(state, done).await?,
                Ok(None) | Err(_) => break,
            }
        }
        Ok(())
    }

    /// Computes an output for every worker that is free and has something to do, and commits it in the background.
    pub(super) async fn start_outputs(&mut self, state: &mut State, log: &LogState) -> Result<bool> {
        let mut moved = false;
        for index in 0..state.workers.len() {
            while let Some(done) = state.commits.try_join_next() {
                self.committed(state, done).await?;
            }
            let worker = &state.workers[index];
            let resting = worker.not_before.is_some_and(|time| time > Instant::now());
            let Some(target) =
                worker.target.clone().filter(|_| worker.loaded && worker.committing_since.is_none() && !resting)
            else {
                continue;
            };
            if self.is_within_horizon(worker, &target, state, log) {
                continue;
            }
            let readiness = readiness(&worker.projection, &target, state, log);
            if let Readiness::Failed(reason) = readiness {
                self.block(&mut state.workers[index], &target, reason).await;
                continue;
            }
            self.unblock(&mut state.workers[index]);
            let Readiness::Ready { complete } = readiness else { continue };
            let worker = &state.workers[index];
            if worker.waits_for_goal(&target, &state.applied) {
                continue;
            }
            match self.transform.compute(&target.projection, worker.checkpoint.as_ref()).await {
                Ok(Computed::UpToDate) if complete => self.recovered(&mut state.workers[index]).await,
                Ok(Computed::UpToDate | Computed::Behind) => {}
                Ok(Computed::NeedsReplay) => {
                    self.replay(state).await?;
                    return Ok(true);
                }
                Ok(Computed::Output { positions, as_of_time, reader }) => {
                    let commit = self.commit(state, log, index, target, complete, (positions, as_of_time));
                    state.workers[index].committing_since = Some(Instant::now());
                    state.commits.spawn(commit.run(reader));
                    moved = true;
                }
                Err(error) => self.failed(state, index, error).await?,
            }
        }
        Ok(moved)
    }

    fn commit(
        &self,
        state: &State,
        log: &LogState,
        index: usize,
        target: Arc<Target>,
        complete: bool,
        (positions, as_of_time): (Positions, Micros),
    ) -> Commit {
        let worker = &state.workers[index];
        let horizon = target.captures.first().map(|id| horizon(state, log, id));
        Commit {
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
        }
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
            let lsn = horizon(state, log, id).lsn;
            more(id) && state.applied.get(id).is_some_and(|applied| applied.position.lsn <= lsn)
        })
    }

    pub(super) async fn committed(&mut self, state: &mut State, done: Result<Outcome, JoinError>) -> Result<()> {
        let outcome = done.map_err(|cause| Error::new(ErrorKind::Internal, "finish", "a commit", cause))?;
        let worker = &mut state.workers[outcome.worker];
        worker.committing_since = None;
        worker.slow = outcome.took > SHORT_COMMIT;
        state.forgotten = false;
        match outcome.result {
            Ok(positions) => {
                worker.checkpoint = Some(positions);
                worker.backoff.succeeded();
                worker.not_before = None;
                worker.well = true;
                worker.failure = None;
                worker.answer();
                self.report(&state.workers[outcome.worker], None);
                Ok(())
            }
            Err(error) => self.failed(state, outcome.worker, error).await,
        }
    }
}

/// The highest horizon of a capture's log that this process has met. Another process may have compacted it, or this one
/// without hearing that it had: then reading the log was what told.
fn horizon(state: &State, log: &LogState, id: &CaptureId) -> Position {
    let known = log.captures.get(id).map(|capture| capture.horizon);
    let met = [&state.compacted, &state.opened].into_iter().filter_map(|horizons| horizons.get(id).copied());
    known.into_iter().chain(met).max().unwrap_or(Position::ZERO)
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
        let horizons = [&state.compacted, &state.opened].into_iter().filter_map(|horizons| horizons.get(id));
        if horizons.max().is_some_and(|horizon| applied.position < *horizon) {
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
    as_of_time: Micros,
    horizon: Position,
    complete: bool,
    run_id: Arc<str>,
    events: Events,
}

impl Commit {
    async fn run(self, mut reader: Box<dyn OutputReader>) -> Outcome {
        let started = Instant::now();
        let result = self.commit(&mut *reader).await;
        Outcome { worker: self.worker, result, took: started.elapsed() }
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
