//! One projection's worker: its target and checkpoint, its failures, and who waits for it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{ProjectRequest, Projector, State};
use crate::error::{Error, ErrorKind, Response, Result};
use crate::event::Event;
use crate::ingest::LogState;
use crate::position::{CaptureId, Position, Positions};
use crate::projection::{Derivation, Projection, Target, TargetShape};
use crate::retry::Backoff;
use crate::store::{CaptureState, Store};
use crate::transform::{Applied, StateTable};

/// One projection's worker.
pub(super) struct Worker {
    pub(super) projection: Projection,
    pub(super) store: Arc<dyn Store>,
    /// Known once the tables it reads are captured and its SQL binds.
    pub(super) target: Option<Arc<Target>>,
    pub(super) checkpoint: Option<Positions>,
    /// Whether `checkpoint` is what the store holds.
    pub(super) loaded: bool,
    /// While an output of it is being committed.
    pub(super) committing_since: Option<Instant>,
    /// Its last commit took long.
    pub(super) slow: bool,
    pub(super) backoff: Backoff,
    pub(super) not_before: Option<Instant>,
    /// Why it did not move when it last could have; told once, until it moves again.
    pub(super) failure: Option<String>,
    /// Whether that is a capture that stands still.
    pub(super) blocked: bool,
    /// Whether its store is known to show no error of it.
    pub(super) well: bool,
    pub(super) waiting: Vec<oneshot::Sender<Result<()>>>,
    /// Where a projection that is built anew must stand before those who wait for it are answered.
    pub(super) goal: Positions,
}

impl Worker {
    /// Whether this is a history that is being built anew, and state has not yet come as far as was asked: until then its
    /// target shows what it did. The first stops of a replay would empty it.
    pub(super) fn waits_for_goal(&self, target: &Target, applied: &BTreeMap<CaptureId, Applied>) -> bool {
        let is_ahead = |(id, goal): (&CaptureId, &Position)| {
            target.captures.contains(id) && applied.get(id).is_none_or(|applied| applied.position < *goal)
        };
        self.checkpoint.is_none() && target.shape == TargetShape::Versions && self.goal.iter().any(is_ahead)
    }

    /// Tells those who wait that the projection is built, if it has come as far as they asked.
    pub(super) fn answer(&mut self) {
        let Some(checkpoint) = &self.checkpoint else { return };
        if self.goal.iter().all(|(id, goal)| checkpoint.get(id).is_none_or(|at| at >= goal)) {
            for waiting in self.waiting.drain(..) {
                // A receiver that has gone away no longer wants the answer.
                let _ = waiting.send(Ok(()));
            }
            self.goal.clear();
        }
    }
}

impl Projector {
    pub(super) fn worker(&self, projection: Projection, store: Arc<dyn Store>) -> Worker {
        Worker {
            projection,
            store,
            target: None,
            checkpoint: None,
            loaded: false,
            committing_since: None,
            slow: false,
            backoff: Backoff::new(self.settings.retry),
            not_before: None,
            failure: None,
            blocked: false,
            well: false,
            waiting: Vec::new(),
            goal: Positions::new(),
        }
    }

    /// Opens the transform when tables are new or have changed, and describes targets not described yet.
    pub(super) async fn open(&mut self, state: &mut State, log: &LogState) -> Result<()> {
        let capture = |(id, capture): (&CaptureId, &CaptureState)| StateTable {
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
        state.opened = self.staging.captures().await?.into_iter().map(|(id, capture)| (id, capture.horizon)).collect();
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
    pub(super) async fn load_checkpoints(&mut self, state: &mut State, log: &LogState) -> Result<()> {
        for index in 0..state.workers.len() {
            let worker = &state.workers[index];
            if worker.loaded
                || worker.committing_since.is_some()
                || worker.not_before.is_some_and(|time| time > Instant::now())
            {
                continue;
            }
            match self.load_checkpoint(&state.workers[index], state).await {
                Ok((target, checkpoint)) => {
                    let worker = &mut state.workers[index];
                    worker.target = Some(Arc::new(target));
                    worker.checkpoint = checkpoint;
                    // Whoever asked for it anew may have been another process, or this one before it was started again.
                    if worker.checkpoint.is_none() && worker.goal.is_empty() {
                        worker.goal = cutoffs(log);
                    }
                    worker.loaded = true;
                    worker.not_before = None;
                    state.forgotten = false;
                    // Another process may have built what was asked of this one.
                    worker.answer();
                    let worker = &state.workers[index];
                    self.report(worker, worker.failure.clone());
                }
                Err(error) => self.failed(state, index, error).await?,
            }
        }
        Ok(())
    }

    async fn load_checkpoint(&self, worker: &Worker, state: &State) -> Result<(Target, Option<Positions>)> {
        let name = &worker.projection.name;
        let tables = &state.tables;
        let mut captures = Vec::new();
        for table in worker.projection.tables() {
            let found: Vec<&StateTable> = tables.iter().filter(|state| state.schema.table == table).collect();
            if found.is_empty() {
                let cause = format!("table {table} is not captured");
                return Err(Error::new(ErrorKind::Projection, "build", format!("projection {name}"), cause)
                    .with_remedy(format!(
                        "add {table} to the tables of a source; if it is there, shori check tells why it cannot be captured"
                    )));
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
        let (definition, keeps_tombstones) = (named.definition(), named.keeps_tombstones());
        let projection = name.clone();
        let target = Target { projection, shape, key, columns, definition, keeps_tombstones, captures };
        worker.store.bootstrap().await?;
        worker.store.prepare_target(&target).await?;
        let mut checkpoint = worker.store.checkpoint(name).await?.map(|checkpoint| checkpoint.positions);
        let missed = |(id, at): (&CaptureId, &Position)| state.opened.get(id).is_some_and(|horizon| at < horizon);
        if checkpoint.as_ref().is_some_and(|positions| positions.iter().any(missed)) {
            worker.store.reset_projection(name).await?;
            checkpoint = None;
            self.events.send(Event::MissedByCompaction { projection: name.clone() });
        }
        self.transform.settle(name, checkpoint.as_ref()).await?;
        Ok((target, checkpoint))
    }

    /// Records why a projection does not move, and when it is tried again. Its checkpoint is read anew then.
    pub(super) async fn failed(&mut self, state: &mut State, index: usize, error: Error) -> Result<()> {
        if error.response() == Response::StopPipeline {
            return Err(error);
        }
        let worker = &mut state.workers[index];
        worker.loaded = false;
        worker.well = false;
        worker.not_before = Some(Instant::now() + worker.backoff.failed());
        let reason = error.to_string();
        if error.kind() == ErrorKind::Unavailable {
            let after = worker.not_before.map_or(Duration::ZERO, |time| time - Instant::now());
            let what = format!("projection {}", worker.projection.name);
            self.events.send(Event::Retrying { what, reason, after });
            return Ok(());
        }
        self.tell(&mut state.workers[index], &error).await;
        Ok(())
    }

    /// No capture that the projection reads stands still, or none any more.
    pub(super) fn unblock(&self, worker: &mut Worker) {
        if std::mem::take(&mut worker.blocked) {
            worker.failure = None;
            self.report(worker, None);
        }
    }

    /// A capture that the projection reads stands still. It waits without trying: nothing that it does would help.
    pub(super) async fn block(&self, worker: &mut Worker, target: &Target, reason: String) {
        let object = format!("projection {}", target.projection);
        worker.blocked = true;
        self.tell(worker, &Error::new(ErrorKind::Projection, "refresh", object, reason)).await;
    }

    /// Tells everybody why a projection does not move: those who wait for it, its store, the world.
    async fn tell(&self, worker: &mut Worker, error: &Error) {
        let reason = error.to_string();
        for waiting in worker.waiting.drain(..) {
            // A receiver that has gone away no longer wants the answer.
            let _ = waiting.send(Err(Error::repeated(error.kind(), reason.clone())));
        }
        if worker.failure.as_ref() == Some(&reason) {
            return;
        }
        worker.well = false;
        if self.record(worker, Some(&reason)).await {
            worker.failure = Some(reason.clone());
        }
        self.report(worker, Some(reason.clone()));
        self.events.send(Event::ProjectionFailed { projection: worker.projection.name.clone(), reason });
    }

    /// The projection is level: an error that its store may still show is over.
    pub(super) async fn recovered(&self, worker: &mut Worker) {
        if !worker.well {
            worker.well = self.record(worker, None).await;
            worker.failure = None;
            self.report(worker, None);
        }
    }

    /// Whether the store has taken it.
    async fn record(&self, worker: &Worker, reason: Option<&str>) -> bool {
        let projection = &worker.projection.name;
        let recorded = worker.store.record_error(projection, reason).await;
        if let Err(error) = &recorded {
            let what = format!("recording the status of {projection}");
            self.events.send(Event::Retrying { what, reason: error.to_string(), after: Duration::ZERO });
        }
        recorded.is_ok()
    }

    pub(super) fn report(&self, worker: &Worker, failure: Option<String>) {
        self.progress.send_modify(|progress| {
            let name = worker.projection.name.clone();
            progress.checkpoints.insert(name.clone(), worker.checkpoint.clone());
            match failure {
                Some(reason) => progress.failed.insert(name, reason),
                None => progress.failed.remove(&name),
            };
        });
    }

    pub(super) async fn serve(&mut self, state: &mut State, request: ProjectRequest) -> Result<()> {
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
        worker.failure = None;
        worker.not_before = None;
        Ok(())
    }
}

/// How far captures can be projected: per timeline to the lowest boundary of those that move. One that stands still goes
/// on from where it stands.
fn cutoffs(log: &LogState) -> Positions {
    let mut lowest: BTreeMap<&Arc<str>, Position> = BTreeMap::new();
    for capture in log.captures.values().filter(|capture| capture.failed.is_none()) {
        let boundary = capture.watermark.boundary;
        lowest.entry(&capture.timeline).and_modify(|at| *at = (*at).min(boundary)).or_insert(boundary);
    }
    let cutoff = |capture: &CaptureState| match &capture.failed {
        None => lowest.get(&capture.timeline).copied(),
        Some(_) => Some(capture.watermark.boundary),
    };
    log.captures.iter().filter_map(|(id, capture)| Some((id.clone(), cutoff(capture)?))).collect()
}

fn key_of(tables: &[StateTable], table: &str) -> Vec<String> {
    let found = tables.iter().find(|state| &*state.schema.table == table);
    found.map(|state| state.schema.key_names().into_iter().map(String::from).collect()).unwrap_or_default()
}
