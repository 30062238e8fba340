//! Where the log is kept and results are written.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::RecordBatch;
use async_trait::async_trait;
use futures::stream::BoxStream;

use crate::change::ChangeBatch;
use crate::error::{Error, Result};
use crate::position::{CaptureId, Lsn, Micros, Position, Positions, Watermark};
use crate::projection::Target;
use crate::schema::TableSchema;
use crate::source::{CaptureInfo, Rejected, SnapshotProgress};

/// Changes of one capture in position order, in batches of bounded size.
pub type LogStream = BoxStream<'static, Result<ChangeBatch>>;

/// A database or lakehouse that holds the log (as the pipeline's staging), results (as a target), or both.
///
/// # Contract
///
/// - **Durability.** When a call returns `Applied`, its effect survives SIGKILL and power loss as far as the system
///   below promises; before that, nothing of it is visible to any reader. Dropping a call's future leaves it done or
///   not done, never half done.
/// - **Append** (contracts 1, 2, 6). Rows of all captures, their watermarks, snapshot progress, schemas and rejected
///   rows are one transaction. Rows at or below their own capture's stored watermark are left out, by position. If
///   every capture's watermark is at or above the batch's, nothing happens: `AlreadyApplied`. If a capture's stored
///   `staged` is another than `expected` says, nothing happens: `Conflict`; another writer has been here.
/// - **Log.** [`read_log`](Store::read_log) returns each change once, in position order, with the capture's newest
///   schema. Readers see a stable state while appends go on.
/// - **Output** (contracts 4, 6). Rows, checkpoint and metadata are one transaction. If the stored checkpoint is
///   already the new one: `AlreadyApplied`; if it is neither that nor `expected`: `Conflict`. An output is applied to
///   what the last applied output left: [`OutputKind`] says how.
/// - **Concurrency.** Every call may run beside every other; appends of one timeline do not, and outputs of one
///   projection do not, but two processes may try.
/// - **Errors.** `Unavailable`: the same call may be made again. `DiskFull`, `Corrupt`: the pipeline stops.
#[async_trait]
pub trait Store: Send + Sync {
    /// Creates what is missing of the control tables, and returns the store's random id, made once.
    async fn bootstrap(&self) -> Result<String>;

    /// Makes the log ready for captures; those unknown start with [`Watermark::ZERO`] and their first snapshot
    /// requested. A schema that is an evolution of the stored one takes its place (rows staged before read as null in
    /// added columns); an incompatible one fails with [`ErrorKind::Schema`](crate::ErrorKind::Schema). `identity` is stored, and must be the stored one
    /// ([`ErrorKind::SourceReplaced`](crate::ErrorKind::SourceReplaced)).
    async fn prepare_captures(&self, timeline: &str, identity: &str, captures: &[CaptureInfo]) -> Result<()>;

    /// All captures that the log knows.
    async fn captures(&self) -> Result<BTreeMap<CaptureId, CaptureState>>;

    async fn append(&self, append: &Append<'_>) -> Result<Appended>;

    /// Changes with `after < position <= up_to`.
    async fn read_log(&self, capture: &CaptureId, after: &Position, up_to: &Position) -> Result<LogStream>;

    /// Marks a new snapshot as wanted: generation + 1, `Requested`; clears a failure. With `retyped`, the stored schema
    /// is forgotten, and the log of the capture emptied: what follows is of another shape.
    async fn request_snapshot(&self, capture: &CaptureId, retyped: bool) -> Result<SnapshotProgress>;

    /// Marks a capture as stopped until a person acts (contract 11).
    async fn mark_failed(&self, capture: &CaptureId, reason: &str) -> Result<()>;

    /// Brings down to the last image per key (the last deletion too, while `keep_deletes`) all changes at or below
    /// `horizon`, columns marked unchanged resolved. A reader of the log from zero gets the same state at any position
    /// from `horizon` on. The horizon is stored, and never moves back.
    async fn compact(&self, capture: &CaptureId, horizon: &Position, keep_deletes: bool) -> Result<Compacted>;

    /// Newest position whose change was staged before `staged_before` (microseconds UTC), or such that at most
    /// `keep_rows` stand above: what retention by age or size allows as a horizon.
    async fn retention_horizon(
        &self,
        capture: &CaptureId,
        staged_before: Option<Micros>,
        keep_rows: Option<u64>,
    ) -> Result<Position>;

    /// Creates the target's table and control rows if missing; an added column is added. A table of rows that this
    /// projection wrote with another key or column type is made anew, empty and without checkpoint; so is a table that
    /// somebody has dropped. Rows of another definition stay, without checkpoint: the next output replaces them. Fails when a table of versions stands with another key or column type.
    async fn prepare_target(&self, target: &Target) -> Result<()>;

    /// What the target's last output left; `None` before the first.
    async fn checkpoint(&self, projection: &str) -> Result<Option<Checkpoint>>;

    async fn commit_output(&self, commit: OutputCommit<'_>) -> Result<Committed>;

    /// Sets status ERROR and the message, leaves rows and checkpoint. `None` takes an error back, if there is one.
    async fn record_error(&self, projection: &str, message: Option<&str>) -> Result<()>;

    /// Forgets the projection's checkpoint, so that it is built anew; its rows stay until the next output replaces
    /// them. A history keeps the versions at or below the log's horizon.
    async fn reset_projection(&self, projection: &str) -> Result<()>;

    /// Opens a run record; every record of this pipeline that a dead owner left open is closed as failed.
    async fn start_run(&self, run: &RunRecord) -> Result<()>;

    /// Writes the run record's counts; with an end, closes it.
    async fn update_run(&self, run: &RunRecord) -> Result<()>;
}

/// What the log knows of one capture.
#[derive(Clone, Debug)]
pub struct CaptureState {
    pub timeline: Arc<str>,
    pub schema: Arc<TableSchema>,
    pub watermark: Watermark,
    /// The newest snapshot, and the finished ones before it whose end is above the horizon.
    pub snapshot: SnapshotProgress,
    pub earlier_snapshots: Vec<SnapshotProgress>,
    /// Below it, the log holds only the last image per key.
    pub horizon: Position,
    /// Why the capture stands still until a person acts.
    pub failed: Option<String>,
    /// The capture is read anew after a change of its shape: the next schema may be any.
    pub schema_forgotten: bool,
}

/// One batch of a timeline, to be appended as one transaction.
#[derive(Debug)]
pub struct Append<'a> {
    pub timeline: &'a str,
    /// Every active capture of the timeline, with the `staged` position that the writer believes stored.
    pub expected: &'a BTreeMap<CaptureId, Position>,
    pub changes: &'a [ChangeBatch],
    /// New watermark of all captures in `expected` (those already above it keep theirs).
    pub watermark: Watermark,
    pub snapshots: &'a [(CaptureId, SnapshotProgress)],
    pub schemas: &'a [CaptureInfo],
    pub rejected: &'a [Rejected],
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Appended {
    Applied { rows: u64 },
    AlreadyApplied,
    Conflict,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Compacted {
    pub rows_before: u64,
    pub rows_after: u64,
}

/// How far a projection's target has come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Checkpoint {
    pub positions: Positions,
    pub as_of_time: Micros,
}

/// How an output's rows change the target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OutputKind {
    /// `Upsert` rows take the place of the rows with their key, `Delete` keys lose theirs. A key comes at most once.
    Merge,
    /// `Upsert` rows are all there is: keys that do not come are deleted. Rows that stand already may stay untouched.
    Replace,
    /// `Close` ends the open version of each key given, if it has one, then `Version` rows are inserted, each with its
    /// own end already set where a later one of the same key follows. Columns are those of [`history`](crate::projection::history).
    Versions,
    /// `Version` rows are all versions from the log's horizon on, the one that stands at the horizon included: a version
    /// that the target has (same key and `__source_lsn`) keeps its row and start and takes the new end; others are
    /// inserted; versions above the horizon that do not come are removed; older ones stay. One of these that is still
    /// open, since the target stood behind the horizon, ends where its key's next version begins, else at `as_of_time`
    /// (or a microsecond after it began, if that is later).
    ReplaceVersions,
}

/// Part of an output.
#[derive(Clone, Debug)]
pub enum OutputRows {
    /// The target's columns.
    Upsert(RecordBatch),
    /// The target's key columns, in key order.
    Delete(RecordBatch),
    /// The target's columns.
    Version(RecordBatch),
    /// The target's key columns, in key order, then `valid_to`.
    Close(RecordBatch),
}

impl OutputRows {
    pub fn batch(&self) -> &RecordBatch {
        match self {
            Self::Upsert(rows) | Self::Delete(rows) | Self::Version(rows) | Self::Close(rows) => rows,
        }
    }
}

/// Hands out an output in parts of bounded size, once. A pull that fails makes the commit fail.
#[async_trait]
pub trait OutputReader: Send {
    fn kind(&self) -> OutputKind;
    /// Rows to come, if known: for progress only.
    fn rows_hint(&self) -> Option<u64>;
    async fn next(&mut self) -> Result<Option<OutputRows>>;
}

/// A projection's step from `expected` to `checkpoint`.
pub struct OutputCommit<'a> {
    pub target: &'a Target,
    pub expected: Option<&'a Positions>,
    pub checkpoint: &'a Positions,
    /// The cutoff, where all captures share one timeline; else none.
    pub as_of_lsn: Option<Lsn>,
    pub as_of_time: Micros,
    /// The log's horizon of the history's table; [`OutputKind::ReplaceVersions`] needs it.
    pub horizon: Position,
    /// Whether all initial snapshots have ended: status is OK, else INIT.
    pub complete: bool,
    pub run_id: &'a str,
    pub output: &'a mut dyn OutputReader,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Committed {
    /// Rows written, deletions and closed versions included.
    Applied {
        rows: u64,
    },
    AlreadyApplied,
    Conflict,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RunStatus {
    Running,
    Completed,
    Failed,
    Cancelled,
}

impl RunStatus {
    pub fn name(self) -> &'static str {
        match self {
            RunStatus::Running => "running",
            RunStatus::Completed => "completed",
            RunStatus::Failed => "failed",
            RunStatus::Cancelled => "cancelled",
        }
    }
}

/// One run of a pipeline, as `pipeline_metadata` shows it.
#[derive(Clone, Debug)]
pub struct RunRecord {
    pub pipeline: String,
    pub run_id: String,
    pub started: Micros,
    pub ended: Option<Micros>,
    pub status: RunStatus,
    pub records_processed: u64,
    pub records_successful: u64,
    pub records_failed: u64,
    pub error: Option<String>,
    /// JSON.
    pub metrics: String,
}

/// A store's refusal because of a target that stands with another shape.
pub fn target_mismatch(table: &str, cause: String) -> Error {
    Error::new(crate::ErrorKind::Schema, "prepare", format!("target table {table}"), cause)
        .with_remedy("rename or drop the table, or give the projection another name")
}
