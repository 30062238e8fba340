//! Gives real parts the steps that in-memory parts have of their own: before and after every call, and at every pull of
//! a batch that a call reads.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use futures::StreamExt;

use crate::change::ChangeBatch;
use crate::error::Result;
use crate::position::{CaptureId, Micros, Position, Positions};
use crate::projection::{Projection, Target};
use crate::source::{CaptureInfo, SnapshotProgress};
use crate::store::{
    Append, Appended, CaptureState, Checkpoint, Committed, Compacted, LogStream, OutputCommit, OutputKind,
    OutputReader, OutputRows, RunRecord, Store,
};
use crate::testing::faults::Faults;
use crate::transform::{Advanced, Applied, CaptureAdvance, Computed, LogReader, StateTable, Transform};

pub struct FaultyStore {
    pub inner: Arc<dyn Store>,
    pub faults: Faults,
}

pub struct FaultyTransform {
    pub inner: Arc<dyn Transform>,
    pub faults: Faults,
}

struct FaultyLog<'a>(&'a mut dyn LogReader, Faults);
struct FaultyOutput<'a>(&'a mut dyn OutputReader, Faults);

#[async_trait]
impl LogReader for FaultyLog<'_> {
    async fn next(&mut self) -> Result<Option<ChangeBatch>> {
        self.1.step("transform.advance.batch").await?;
        self.0.next().await
    }
}

#[async_trait]
impl OutputReader for FaultyOutput<'_> {
    fn kind(&self) -> OutputKind {
        self.0.kind()
    }

    fn rows_hint(&self) -> Option<u64> {
        self.0.rows_hint()
    }

    async fn next(&mut self) -> Result<Option<OutputRows>> {
        self.1.step("store.commit_output.part").await?;
        self.0.next().await
    }
}

/// A call between two steps. What was done stays done if the second one fails.
macro_rules! between {
    ($self:ident, $call:ident($($argument:expr),*)) => {{
        $self.faults.step(concat!("before ", stringify!($call))).await?;
        let answer = $self.inner.$call($($argument),*).await?;
        $self.faults.step(concat!("after ", stringify!($call))).await?;
        Ok(answer)
    }};
}

#[async_trait]
impl Store for FaultyStore {
    async fn bootstrap(&self) -> Result<String> {
        between!(self, bootstrap())
    }

    async fn prepare_captures(&self, timeline: &str, identity: &str, captures: &[CaptureInfo]) -> Result<()> {
        between!(self, prepare_captures(timeline, identity, captures))
    }

    async fn captures(&self) -> Result<BTreeMap<CaptureId, CaptureState>> {
        between!(self, captures())
    }

    async fn append(&self, append: &Append<'_>) -> Result<Appended> {
        between!(self, append(append))
    }

    async fn read_log(&self, capture: &CaptureId, after: &Position, up_to: &Position) -> Result<LogStream> {
        self.faults.step("read_log").await?;
        let faults = self.faults.clone();
        let read = move |batch| {
            let faults = faults.clone();
            async move {
                faults.step("read_log.next").await?;
                batch
            }
        };
        Ok(self.inner.read_log(capture, after, up_to).await?.then(read).boxed())
    }

    async fn request_snapshot(&self, capture: &CaptureId, retyped: bool) -> Result<SnapshotProgress> {
        between!(self, request_snapshot(capture, retyped))
    }

    async fn mark_failed(&self, capture: &CaptureId, reason: &str) -> Result<()> {
        between!(self, mark_failed(capture, reason))
    }

    async fn compact(&self, capture: &CaptureId, horizon: &Position, keep_deletes: bool) -> Result<Compacted> {
        between!(self, compact(capture, horizon, keep_deletes))
    }

    async fn retention_horizon(
        &self,
        capture: &CaptureId,
        staged_before: Option<Micros>,
        keep_rows: Option<u64>,
    ) -> Result<Position> {
        between!(self, retention_horizon(capture, staged_before, keep_rows))
    }

    async fn prepare_target(&self, target: &Target) -> Result<()> {
        between!(self, prepare_target(target))
    }

    async fn checkpoint(&self, projection: &str) -> Result<Option<Checkpoint>> {
        between!(self, checkpoint(projection))
    }

    async fn commit_output(&self, commit: OutputCommit<'_>) -> Result<Committed> {
        let mut output = FaultyOutput(commit.output, self.faults.clone());
        let commit = OutputCommit { output: &mut output, ..commit };
        between!(self, commit_output(commit))
    }

    async fn record_error(&self, projection: &str, message: Option<&str>) -> Result<()> {
        between!(self, record_error(projection, message))
    }

    async fn reset_projection(&self, projection: &str) -> Result<()> {
        between!(self, reset_projection(projection))
    }

    async fn start_run(&self, run: &RunRecord) -> Result<()> {
        between!(self, start_run(run))
    }

    async fn update_run(&self, run: &RunRecord) -> Result<()> {
        between!(self, update_run(run))
    }
}

#[async_trait]
impl Transform for FaultyTransform {
    async fn open(&self, store_id: &str, tables: &[StateTable], projections: &[Projection]) -> Result<()> {
        between!(self, open(store_id, tables, projections))
    }

    async fn describe(&self, projection: &str) -> Result<SchemaRef> {
        self.inner.describe(projection).await
    }

    async fn applied(&self) -> Result<BTreeMap<CaptureId, Applied>> {
        between!(self, applied())
    }

    async fn advance(&self, captures: &[CaptureAdvance], log: &mut dyn LogReader) -> Result<Advanced> {
        let mut log = FaultyLog(log, self.faults.clone());
        between!(self, advance(captures, &mut log))
    }

    async fn compute(&self, projection: &str, since: Option<&Positions>) -> Result<Computed> {
        between!(self, compute(projection, since))
    }

    async fn settle(&self, projection: &str, checkpoint: Option<&Positions>) -> Result<()> {
        between!(self, settle(projection, checkpoint))
    }

    async fn forget(&self, checkpoints: &[Positions]) -> Result<()> {
        between!(self, forget(checkpoints))
    }

    async fn changes_kept(&self) -> Result<u64> {
        self.inner.changes_kept().await
    }

    async fn discard(&self) -> Result<()> {
        between!(self, discard())
    }
}
