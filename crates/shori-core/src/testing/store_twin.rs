//! Two stores as one: every call goes to both, and both must answer alike.

use std::collections::{BTreeMap, VecDeque};

use async_trait::async_trait;
use futures::StreamExt;

use super::value::{Row, rows_of};
use crate::change::ChangeBatch;
use crate::error::Result;
use crate::position::{CaptureId, Micros, Position};
use crate::projection::Target;
use crate::source::{CaptureInfo, SnapshotProgress};
use crate::store::{
    Append, Appended, CaptureState, Checkpoint, Committed, Compacted, LogStream, OutputCommit, OutputKind,
    OutputReader, OutputRows, RunRecord, Store,
};

/// `model` says what is right, `other` is put to the test.
pub struct StoreTwin<'a> {
    pub model: &'a dyn Store,
    pub other: &'a dyn Store,
}

struct Replay {
    kind: OutputKind,
    parts: VecDeque<OutputRows>,
}

#[async_trait]
impl OutputReader for Replay {
    fn kind(&self) -> OutputKind {
        self.kind
    }

    fn rows_hint(&self) -> Option<u64> {
        None
    }

    async fn next(&mut self) -> Result<Option<OutputRows>> {
        Ok(self.parts.pop_front())
    }
}

/// The images of a log as plain rows: what stands before, between and after a table's own columns.
pub fn log_lines(batches: &[ChangeBatch]) -> Vec<Row> {
    batches.iter().flat_map(|batch| rows_of(&batch.to_record_batch().unwrap())).collect()
}

pub async fn collect(stream: LogStream) -> Result<Vec<ChangeBatch>> {
    stream.collect::<Vec<_>>().await.into_iter().collect()
}

fn same_states(model: &BTreeMap<CaptureId, CaptureState>, other: &BTreeMap<CaptureId, CaptureState>) {
    assert_eq!(model.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>(), "captures");
    for (id, one) in model {
        let two = &other[id];
        assert_eq!(one.watermark, two.watermark, "watermark of {id}");
        assert_eq!(one.snapshot, two.snapshot, "snapshot of {id}");
        assert_eq!(one.earlier_snapshots, two.earlier_snapshots, "earlier snapshots of {id}");
        assert_eq!(one.horizon, two.horizon, "horizon of {id}");
        assert_eq!(one.failed, two.failed, "failure of {id}");
        assert_eq!((&one.timeline, &one.schema), (&two.timeline, &two.schema), "shape of {id}");
    }
}

/// Both fail with one kind, or both succeed.
fn alike<T>(model: Result<T>, other: Result<T>, what: &str) -> Result<(T, T)> {
    match (model, other) {
        (Ok(model), Ok(other)) => Ok((model, other)),
        (Err(model), Err(other)) => {
            assert_eq!(model.kind(), other.kind(), "{what}: {model} and {other}");
            Err(other)
        }
        (Ok(_), Err(error)) => panic!("{what} should succeed: {error}"),
        (Err(error), Ok(_)) => panic!("{what} should fail: {error}"),
    }
}

#[async_trait]
impl Store for StoreTwin<'_> {
    async fn bootstrap(&self) -> Result<String> {
        self.other.bootstrap().await?;
        self.model.bootstrap().await
    }

    async fn prepare_captures(&self, timeline: &str, identity: &str, captures: &[CaptureInfo]) -> Result<()> {
        let model = self.model.prepare_captures(timeline, identity, captures).await;
        let other = self.other.prepare_captures(timeline, identity, captures).await;
        alike(model, other, "prepare_captures").map(drop)
    }

    async fn captures(&self) -> Result<BTreeMap<CaptureId, CaptureState>> {
        let (model, other) = alike(self.model.captures().await, self.other.captures().await, "captures")?;
        same_states(&model, &other);
        Ok(other)
    }

    async fn append(&self, append: &Append<'_>) -> Result<Appended> {
        let model = self.model.append(append).await;
        let (model, other) = alike(model, self.other.append(append).await, "append")?;
        assert_eq!(model, other, "append up to {:?}", append.watermark);
        Ok(other)
    }

    async fn read_log(&self, capture: &CaptureId, after: &Position, up_to: &Position) -> Result<LogStream> {
        let model = collect(self.model.read_log(capture, after, up_to).await?).await?;
        let other = collect(self.other.read_log(capture, after, up_to).await?).await?;
        // What stands below the horizon may be kept in more than one way.
        if *after >= self.model.captures().await?[capture].horizon {
            assert_eq!(log_lines(&other), log_lines(&model), "the log of {capture} in ({after}, {up_to}]");
        }
        Ok(futures::stream::iter(other.into_iter().map(Ok)).boxed())
    }

    async fn request_snapshot(&self, capture: &CaptureId, retyped: bool) -> Result<SnapshotProgress> {
        let model = self.model.request_snapshot(capture, retyped).await;
        let other = self.other.request_snapshot(capture, retyped).await;
        let (model, other) = alike(model, other, "request_snapshot")?;
        assert_eq!(model, other, "request_snapshot of {capture}");
        Ok(other)
    }

    async fn mark_failed(&self, capture: &CaptureId, reason: &str) -> Result<()> {
        let model = self.model.mark_failed(capture, reason).await;
        alike(model, self.other.mark_failed(capture, reason).await, "mark_failed").map(drop)
    }

    async fn compact(&self, capture: &CaptureId, horizon: &Position, keep_deletes: bool) -> Result<Compacted> {
        let model = self.model.compact(capture, horizon, keep_deletes).await;
        let other = self.other.compact(capture, horizon, keep_deletes).await;
        alike(model, other, "compact").map(|(_, other)| other)
    }

    async fn retention_horizon(
        &self,
        capture: &CaptureId,
        staged_before: Option<Micros>,
        keep_rows: Option<u64>,
    ) -> Result<Position> {
        let model = self.model.retention_horizon(capture, staged_before, keep_rows).await;
        let other = self.other.retention_horizon(capture, staged_before, keep_rows).await;
        alike(model, other, "retention_horizon").map(|(_, other)| other)
    }

    async fn prepare_target(&self, target: &Target) -> Result<()> {
        let model = self.model.prepare_target(target).await;
        alike(model, self.other.prepare_target(target).await, "prepare_target").map(drop)
    }

    async fn checkpoint(&self, projection: &str) -> Result<Option<Checkpoint>> {
        let model = self.model.checkpoint(projection).await;
        let (model, other) = alike(model, self.other.checkpoint(projection).await, "checkpoint")?;
        assert_eq!(model, other, "checkpoint of {projection}");
        Ok(other)
    }

    async fn commit_output(&self, commit: OutputCommit<'_>) -> Result<Committed> {
        let kind = commit.output.kind();
        let mut parts = VecDeque::new();
        while let Some(part) = commit.output.next().await? {
            parts.push_back(part);
        }
        let mut first = Replay { kind, parts: parts.clone() };
        let mut second = Replay { kind, parts };
        let with = |output| OutputCommit {
            target: commit.target,
            expected: commit.expected,
            checkpoint: commit.checkpoint,
            as_of_lsn: commit.as_of_lsn,
            as_of_time: commit.as_of_time,
            horizon: commit.horizon,
            complete: commit.complete,
            run_id: commit.run_id,
            output,
        };
        let model = self.model.commit_output(with(&mut first)).await;
        let other = self.other.commit_output(with(&mut second)).await;
        let (model, other) = alike(model, other, "commit_output")?;
        let applied = |committed| matches!(committed, Committed::Applied { .. });
        assert!(model == other || (applied(model) && applied(other)), "commit_output: {model:?} and {other:?}");
        Ok(other)
    }

    async fn record_error(&self, projection: &str, message: Option<&str>) -> Result<()> {
        let model = self.model.record_error(projection, message).await;
        alike(model, self.other.record_error(projection, message).await, "record_error").map(drop)
    }

    async fn reset_projection(&self, projection: &str) -> Result<()> {
        let model = self.model.reset_projection(projection).await;
        alike(model, self.other.reset_projection(projection).await, "reset_projection").map(drop)
    }

    async fn start_run(&self, run: &RunRecord) -> Result<()> {
        alike(self.model.start_run(run).await, self.other.start_run(run).await, "start_run").map(drop)
    }

    async fn update_run(&self, run: &RunRecord) -> Result<()> {
        alike(self.model.update_run(run).await, self.other.update_run(run).await, "update_run").map(drop)
    }
}
