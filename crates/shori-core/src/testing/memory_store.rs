//! A store in memory. What is committed lives in [`MemoryStorage`] and survives; a [`MemoryStore`] is one process's
//! way to it, and can end at any step.
//!
//! Each call gathers what it needs, then changes the storage at once, between two steps: nothing is ever half done.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use futures::StreamExt;
use tokio::time::Instant;

use super::faults::Faults;
use super::memory_database::FIRST_COMMIT_TIME;
use super::memory_log::{LogRow, change_batch, compact, log_rows};
use super::memory_target::{Status, TargetTable, Told};
use super::planted::{self, Plant};
use super::value::Row;
use crate::change::ChangeBatch;
use crate::error::{Error, ErrorKind, Result};
use crate::position::{CaptureId, Micros, Position, Watermark};
use crate::projection::Target;
use crate::schema::SchemaChange;
use crate::source::{CaptureInfo, Rejected, SnapshotProgress};
use crate::store::{
    Append, Appended, CaptureState, Checkpoint, Committed, Compacted, LogStream, OutputCommit, OutputRows, RunRecord,
    RunStatus, Store,
};

/// Images of a part of the log.
const READ_ROWS: usize = 16;

/// What is durable.
#[derive(Clone)]
pub struct MemoryStorage(Arc<Mutex<Stored>>);

struct Stored {
    id: String,
    bootstrapped: bool,
    opened: Instant,
    identities: BTreeMap<String, String>,
    captures: BTreeMap<CaptureId, CaptureLog>,
    rejected: Vec<Rejected>,
    targets: BTreeMap<String, TargetTable>,
    runs: BTreeMap<String, RunRecord>,
    appends: u64,
    /// Captures as they were before the newest append, for one that is not durable.
    before_append: Option<BTreeMap<CaptureId, CaptureLog>>,
}

#[derive(Clone)]
struct CaptureLog {
    state: CaptureState,
    rows: Vec<Arc<LogRow>>,
}

pub struct MemoryStore {
    storage: MemoryStorage,
    faults: Faults,
}

impl MemoryStorage {
    pub fn new(id: &str) -> Self {
        Self(Arc::new(Mutex::new(Stored {
            id: id.into(),
            bootstrapped: false,
            opened: Instant::now(),
            identities: BTreeMap::new(),
            captures: BTreeMap::new(),
            rejected: Vec::new(),
            targets: BTreeMap::new(),
            runs: BTreeMap::new(),
            appends: 0,
            before_append: None,
        })))
    }

    /// What another store holds, for an oracle to look at.
    pub fn seen(
        captures: Vec<(CaptureState, Vec<ChangeBatch>)>,
        targets: Vec<TargetTable>,
        rejected: Vec<Rejected>,
        runs: Vec<RunRecord>,
    ) -> Result<Self> {
        let storage = Self::new("seen");
        let mut stored = storage.stored();
        for (state, batches) in captures {
            let id = CaptureId::new(&state.timeline, &state.schema.table);
            let mut rows = Vec::new();
            for batch in &batches {
                rows.extend(log_rows(batch, 0)?);
            }
            stored.captures.insert(id, CaptureLog { state, rows });
        }
        stored.targets.extend(targets.into_iter().map(|table| (table.target.projection.to_string(), table)));
        stored.rejected = rejected;
        stored.runs.extend(runs.into_iter().map(|run| (run.run_id.clone(), run)));
        drop(stored);
        Ok(storage)
    }

    pub fn open(&self, faults: Faults) -> MemoryStore {
        MemoryStore { storage: self.clone(), faults }
    }

    pub fn captures(&self) -> BTreeMap<CaptureId, CaptureState> {
        self.stored().captures.iter().map(|(id, capture)| (id.clone(), capture.state.clone())).collect()
    }

    /// All images of a capture that are staged.
    pub fn log(&self, capture: &CaptureId) -> Vec<Arc<LogRow>> {
        self.stored().captures.get(capture).map_or_else(Vec::new, |capture| capture.rows.clone())
    }

    pub fn rejected(&self) -> Vec<Rejected> {
        self.stored().rejected.clone()
    }

    /// A projection's table as it stands.
    pub fn target(&self, projection: &str) -> Option<TargetTable> {
        self.stored().targets.get(projection).cloned()
    }

    pub fn rows(&self, projection: &str) -> Vec<Row> {
        self.stored().targets.get(projection).map_or_else(Vec::new, TargetTable::rows)
    }

    pub fn runs(&self) -> Vec<RunRecord> {
        self.stored().runs.values().cloned().collect()
    }

    /// Appends that changed something.
    pub fn appends(&self) -> u64 {
        self.stored().appends
    }

    /// Takes back the newest append.
    pub fn lose_last_append(&self) {
        let mut stored = self.stored();
        if let Some(before) = stored.before_append.take() {
            stored.captures = before;
        }
    }

    /// The time by which the storage dates what it stages.
    pub fn now(&self) -> Micros {
        self.stored().now()
    }

    fn stored(&self) -> MutexGuard<'_, Stored> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stored {
    fn now(&self) -> Micros {
        FIRST_COMMIT_TIME + self.opened.elapsed().as_micros() as Micros
    }

    fn capture(&mut self, id: &CaptureId) -> Result<&mut CaptureLog> {
        self.captures.get_mut(id).ok_or_else(|| unknown("use", format!("capture {id}")))
    }

    fn prepare(&mut self, timeline: &str, identity: &str, captures: &[CaptureInfo]) -> Result<()> {
        if !self.bootstrapped {
            return Err(unknown("prepare", "a store that was not bootstrapped".into()));
        }
        if self.identities.get(timeline).is_some_and(|stored| stored != identity) {
            let cause = format!("its log was read from another database than {identity}");
            return Err(Error::new(ErrorKind::SourceReplaced, "read", format!("source {timeline}"), cause));
        }
        for info in captures {
            let known = self.captures.get(&info.id).filter(|known| !known.state.schema_forgotten);
            let change = known.map(|known| known.state.schema.change_to(&info.schema));
            if let Some(SchemaChange::Incompatible { reason }) = change {
                return Err(Error::new(ErrorKind::Schema, "prepare", format!("capture {}", info.id), reason));
            }
        }
        self.identities.insert(timeline.into(), identity.into());
        for info in captures {
            let known = self.captures.entry(info.id.clone()).or_insert_with(|| new_capture(timeline, info));
            known.state.schema = info.schema.clone();
            known.state.schema_forgotten = false;
        }
        Ok(())
    }

    /// Whether a batch is there already, or does not follow what is.
    fn append_outcome(&mut self, append: &Append<'_>) -> Result<Option<Appended>> {
        let new = append.watermark;
        let mut all_there = true;
        let mut expected = true;
        for (id, staged) in append.expected {
            let stored = self.capture(id)?.state.watermark;
            all_there &= stored.staged >= new.staged && stored.boundary >= new.boundary;
            expected &= stored.staged == *staged || planted::is(Plant::StaleAppendWins);
        }
        Ok(if all_there {
            Some(Appended::AlreadyApplied)
        } else if !expected {
            Some(Appended::Conflict)
        } else {
            None
        })
    }

    /// Adds the rows of a batch that are not there. Returns how many.
    fn append_rows(&mut self, append: &Append<'_>, rows: Vec<(CaptureId, Vec<Arc<LogRow>>)>) -> Result<u64> {
        let mut added: BTreeMap<CaptureId, Vec<Arc<LogRow>>> = BTreeMap::new();
        for (id, images) in rows {
            let mut stored = self.capture(&id)?.state.watermark.staged;
            if planted::is(Plant::StaleAppendWins) {
                stored = append.expected[&id];
            }
            let all = planted::is(Plant::OverlapAppended);
            added.entry(id).or_default().extend(images.into_iter().filter(|image| all || image.position > stored));
        }
        for (id, images) in &added {
            let sorted = images.is_sorted_by(|one, next| one.position < next.position);
            if !sorted || images.last().is_some_and(|last| last.position > append.watermark.staged) {
                return Err(misplaced(id));
            }
        }
        let count = added.values().map(|images| images.len() as u64).sum();
        for (id, images) in added {
            self.capture(&id)?.rows.extend(images);
        }
        Ok(count)
    }

    /// Writes all of a batch but its rows.
    fn append_progress(&mut self, append: &Append<'_>) -> Result<()> {
        let new = append.watermark;
        for rejected in append.rejected {
            let dropped = planted::is(Plant::RejectedDropped) && append.changes.is_empty();
            if rejected.position > self.capture(&rejected.capture)?.state.watermark.staged && !dropped {
                self.rejected.push(rejected.clone());
            }
        }
        for info in append.schemas {
            self.capture(&info.id)?.state.schema = info.schema.clone();
        }
        for (id, progress) in append.snapshots {
            let state = &mut self.capture(id)?.state;
            if state.watermark.staged < new.staged && progress.generation >= state.snapshot.generation {
                state.snapshot = progress.clone();
            }
        }
        let idle = |id: &CaptureId| !append.changes.iter().any(|changes| changes.capture == *id);
        let moved = append.expected.keys().filter(|id| !(planted::is(Plant::IdleStandsStill) && idle(id)));
        for id in moved {
            let mark = &mut self.capture(id)?.state.watermark;
            // A source that reads a stretch again may split it otherwise: neither part ever moves back.
            mark.staged = mark.staged.max(new.staged);
            if new.boundary > mark.boundary {
                (mark.boundary, mark.boundary_time) = (new.boundary, new.boundary_time);
            }
        }
        self.appends += 1;
        Ok(())
    }

    /// Whether an output from `expected` to `checkpoint` can be applied.
    fn output_outcome(&self, commit: &OutputCommit<'_>) -> Result<Option<Committed>> {
        let name = &*commit.target.projection;
        let table = self.targets.get(name).ok_or_else(|| unknown("write", format!("projection {name}")))?;
        let stored = table.checkpoint.as_ref().map(|checkpoint| &checkpoint.positions);
        Ok(if stored == Some(commit.checkpoint) {
            Some(Committed::AlreadyApplied)
        } else if stored != commit.expected && !planted::is(Plant::StaleOutputWins) {
            Some(Committed::Conflict)
        } else {
            None
        })
    }

    fn apply_output(&mut self, commit: &OutputCommit<'_>, parts: &[OutputRows]) -> Result<u64> {
        let name = &*commit.target.projection;
        let mut table = self.targets[name].clone();
        let rows = table.apply(
            commit.output.kind(),
            parts,
            Told { horizon: commit.horizon, as_of_time: commit.as_of_time },
        )?;
        self.targets.insert(name.into(), table);
        Ok(rows)
    }

    fn apply_checkpoint(&mut self, commit: &OutputCommit<'_>) {
        if let Some(table) = self.targets.get_mut(&*commit.target.projection) {
            table.checkpoint = Some(Checkpoint { positions: commit.checkpoint.clone(), as_of_time: commit.as_of_time });
            table.as_of_lsn = commit.as_of_lsn;
            table.status = if commit.complete { Status::Ok } else { Status::Init };
            table.last_error = None;
        }
    }
}

fn new_capture(timeline: &str, info: &CaptureInfo) -> CaptureLog {
    let state = CaptureState {
        timeline: timeline.into(),
        schema: info.schema.clone(),
        watermark: Watermark::ZERO,
        snapshot: SnapshotProgress::requested(1),
        earlier_snapshots: Vec::new(),
        horizon: Position::ZERO,
        failed: None,
        schema_forgotten: false,
    };
    CaptureLog { state, rows: Vec::new() }
}

fn unknown(operation: &str, object: String) -> Error {
    Error::new(ErrorKind::Internal, operation, object, "it was not prepared")
}

fn misplaced(capture: &CaptureId) -> Error {
    let cause = "its changes are not in position order, or above the watermark";
    Error::new(ErrorKind::Internal, "append to", format!("the log of {capture}"), cause)
}

#[async_trait]
impl Store for MemoryStore {
    async fn bootstrap(&self) -> Result<String> {
        self.faults.step("store.bootstrap").await?;
        let mut stored = self.storage.stored();
        stored.bootstrapped = true;
        Ok(stored.id.clone())
    }

    async fn prepare_captures(&self, timeline: &str, identity: &str, captures: &[CaptureInfo]) -> Result<()> {
        self.faults.step("store.prepare_captures").await?;
        self.storage.stored().prepare(timeline, identity, captures)?;
        self.faults.step("store.prepared_captures").await
    }

    async fn captures(&self) -> Result<BTreeMap<CaptureId, CaptureState>> {
        self.faults.step("store.captures").await?;
        Ok(self.storage.captures())
    }

    async fn append(&self, append: &Append<'_>) -> Result<Appended> {
        self.faults.step("store.append").await?;
        let now = self.storage.now();
        let mut rows = Vec::new();
        for batch in append.changes.iter().filter(|batch| append.expected.contains_key(&batch.capture)) {
            rows.push((batch.capture.clone(), log_rows(batch, now)?));
        }
        self.faults.step("store.append.commit").await?;
        if let Some(outcome) = self.storage.stored().append_outcome(append)? {
            return Ok(outcome);
        }
        if planted::is(Plant::AppendNotDurable) {
            let mut stored = self.storage.stored();
            stored.before_append = Some(stored.captures.clone());
        }
        let rows = self.storage.stored().append_rows(append, rows)?;
        if planted::is(Plant::RowsBeforeWatermarks) {
            self.faults.step("store.append.between").await?;
        }
        self.storage.stored().append_progress(append)?;
        self.faults.step("store.appended").await?;
        Ok(Appended::Applied { rows })
    }

    async fn read_log(&self, capture: &CaptureId, after: &Position, up_to: &Position) -> Result<LogStream> {
        self.faults.step("store.read_log").await?;
        let mut stored = self.storage.stored();
        let log = stored.capture(capture)?;
        let wanted = |row: &&Arc<LogRow>| row.position > *after && row.position <= *up_to;
        let rows: Vec<_> = log.rows.iter().filter(wanted).cloned().collect();
        let (schema, capture, faults) = (log.state.schema.clone(), capture.clone(), self.faults.clone());
        let parts: Vec<Vec<_>> = rows.chunks(READ_ROWS).map(<[_]>::to_vec).collect();
        let read = move |part: Vec<Arc<LogRow>>| {
            let (schema, capture, faults) = (schema.clone(), capture.clone(), faults.clone());
            async move {
                faults.step("store.read_log.next").await?;
                change_batch(&capture, &schema, &part)
            }
        };
        Ok(futures::stream::iter(parts).then(read).boxed())
    }

    async fn request_snapshot(&self, capture: &CaptureId, retyped: bool) -> Result<SnapshotProgress> {
        self.faults.step("store.request_snapshot").await?;
        let progress = {
            let mut stored = self.storage.stored();
            let log = stored.capture(capture)?;
            let state = &mut log.state;
            let next = SnapshotProgress::requested(state.snapshot.generation + 1);
            let before = std::mem::replace(&mut state.snapshot, next);
            if before.is_done() && before.end > state.horizon {
                state.earlier_snapshots.push(before);
            }
            state.failed = None;
            let progress = state.snapshot.clone();
            log.state.schema_forgotten |= retyped;
            if retyped {
                log.rows.clear();
            }
            progress
        };
        self.faults.step("store.requested_snapshot").await?;
        Ok(progress)
    }

    async fn mark_failed(&self, capture: &CaptureId, reason: &str) -> Result<()> {
        self.faults.step("store.mark_failed").await?;
        self.storage.stored().capture(capture)?.state.failed = Some(reason.into());
        self.faults.step("store.marked_failed").await
    }

    async fn compact(&self, capture: &CaptureId, horizon: &Position, keep_deletes: bool) -> Result<Compacted> {
        self.faults.step("store.compact").await?;
        let compacted = {
            let mut stored = self.storage.stored();
            let CaptureLog { state, rows, .. } = stored.capture(capture)?;
            let mut snapshots = state.earlier_snapshots.clone();
            snapshots.push(state.snapshot.clone());
            state.horizon = state.horizon.max(*horizon);
            let horizon = state.horizon;
            state.earlier_snapshots.retain(|snapshot| snapshot.end > horizon);
            compact(rows, &state.schema, &snapshots, &horizon, keep_deletes)
        };
        self.faults.step("store.compacted").await?;
        Ok(compacted)
    }

    async fn retention_horizon(
        &self,
        capture: &CaptureId,
        staged_before: Option<Micros>,
        keep_rows: Option<u64>,
    ) -> Result<Position> {
        self.faults.step("store.retention_horizon").await?;
        let mut stored = self.storage.stored();
        let rows = &stored.capture(capture)?.rows;
        let old = staged_before.map_or(0, |time| rows.partition_point(|row| row.staged_at < time));
        let surplus = keep_rows.map_or(0, |keep| rows.len().saturating_sub(keep as usize));
        Ok(old.max(surplus).checked_sub(1).map_or(Position::ZERO, |last| rows[last].position))
    }

    async fn prepare_target(&self, target: &Target) -> Result<()> {
        self.faults.step("store.prepare_target").await?;
        let mut stored = self.storage.stored();
        let name = target.projection.to_string();
        let table = stored.targets.entry(name).or_insert_with(|| TargetTable::new(target.clone()));
        table.reshape(target)
    }

    async fn checkpoint(&self, projection: &str) -> Result<Option<Checkpoint>> {
        self.faults.step("store.checkpoint").await?;
        Ok(self.storage.stored().targets.get(projection).and_then(|table| table.checkpoint.clone()))
    }

    async fn commit_output(&self, commit: OutputCommit<'_>) -> Result<Committed> {
        self.faults.step("store.commit_output").await?;
        let outcome = self.storage.stored().output_outcome(&commit)?;
        if let Some(outcome) = outcome {
            return Ok(outcome);
        }
        let mut parts = Vec::new();
        while let Some(part) = commit.output.next().await? {
            parts.push(part);
            self.faults.step("store.commit_output.part").await?;
        }
        self.faults.step("store.commit_output.commit").await?;
        let outcome = self.storage.stored().output_outcome(&commit)?;
        if let Some(outcome) = outcome {
            return Ok(outcome);
        }
        if planted::is(Plant::CheckpointBeforeRows) {
            self.storage.stored().apply_checkpoint(&commit);
            self.faults.step("store.commit_output.between").await?;
        }
        let rows = self.storage.stored().apply_output(&commit, &parts)?;
        self.storage.stored().apply_checkpoint(&commit);
        self.faults.step("store.committed_output").await?;
        Ok(Committed::Applied { rows })
    }

    async fn record_error(&self, projection: &str, message: Option<&str>) -> Result<()> {
        self.faults.step("store.record_error").await?;
        if let Some(table) = self.storage.stored().targets.get_mut(projection) {
            table.status = match (message, &table.checkpoint) {
                (Some(_), _) => Status::Error,
                (None, _) if table.status != Status::Error => return Ok(()),
                (None, None) => Status::Init,
                (None, Some(_)) => Status::Ok,
            };
            table.last_error = message.map(String::from);
        }
        Ok(())
    }

    async fn reset_projection(&self, projection: &str) -> Result<()> {
        self.faults.step("store.reset_projection").await?;
        if let Some(table) = self.storage.stored().targets.get_mut(projection) {
            table.checkpoint = None;
            table.status = Status::Init;
        }
        self.faults.step("store.reset").await
    }

    async fn start_run(&self, run: &RunRecord) -> Result<()> {
        self.faults.step("store.start_run").await?;
        let mut stored = self.storage.stored();
        let open = |other: &&mut RunRecord| other.pipeline == run.pipeline && other.ended.is_none();
        for left in stored.runs.values_mut().filter(open).filter(|other| other.run_id != run.run_id) {
            left.ended = Some(run.started);
            left.status = RunStatus::Failed;
            left.error = Some("its process ended without closing it".into());
        }
        stored.runs.insert(run.run_id.clone(), run.clone());
        Ok(())
    }

    async fn update_run(&self, run: &RunRecord) -> Result<()> {
        self.faults.step("store.update_run").await?;
        self.storage.stored().runs.insert(run.run_id.clone(), run.clone());
        Ok(())
    }
}
