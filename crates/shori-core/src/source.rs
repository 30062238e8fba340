//! Where committed changes come from.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::change::ChangeBatch;
use crate::error::{Error, Result};
use crate::position::{CaptureId, Micros, Position, Watermark};
use crate::schema::TableSchema;

/// One timeline of committed changes: a database's log, or a single Kafka partition.
///
/// # Contract
///
/// - **Order.** [`next`](Source::next) returns changes in position order, across all captures of the timeline: every
///   position in a batch is above the watermark of the batch before, and at or below its own. Positions of one change
///   are the same on every reading, also after a restart; a source that polls tables has changes for as long only as they
///   are in the log, and gives what is not a higher place on the next reading.
/// - **Resumption.** After [`start`](Source::start), reading goes on above the lowest watermark given; captures with a
///   higher one may see changes again, which the store drops by position. A source keeps nothing durable of its own
///   about what was read: the watermarks given are the truth (contract 5). The end of what there is to read is never
///   below the highest watermark given: captures that were apart come to one place, though nothing new is committed.
/// - **Boundaries.** `watermark.boundary` is a place between two commits, at or below `watermark.staged`, and never
///   moves back (contract 3). A transaction may span batches.
/// - **Idle captures.** The batch's watermark holds for every active capture of the timeline, whether or not it changed
///   (contract 2). If the timeline has moved on without changes, an empty batch says so.
/// - **Snapshots.** A capture without stored progress, or with a requested one, is read whole: chunks of
///   [`Op::Snapshot`](crate::change::Op::Snapshot) rows, each at the position that it was read under, interleaved with
///   the stream in position order, so that a later image always stands later. After the last chunk the progress is
///   `Done`, with the position of its end, which is a boundary at or below the batch's. A resumed snapshot goes on at `resume`.
/// - **Gaps.** If what follows a watermark is no longer kept, `start` or `next` fails with
///   [`ErrorKind::Gap`](crate::error::ErrorKind::Gap) and a remedy (contract 8): for one capture, in
///   [`SourceBatch::failed`].
/// - **Bounds.** A batch holds at most about `limit.rows` changes and `limit.bytes` bytes, whatever the transaction.
/// - **Errors.** `Unavailable` means that calling again may help: the source reconnects by itself on the next call.
///   After any other error it must be started again.
/// - **Concurrency and shutdown.** Calls never overlap. Dropping the future of a call, or the source, at any instant
///   loses nothing that was not acknowledged.
#[async_trait]
pub trait Source: Send {
    /// The timeline's name: unique in a pipeline, and the same in every run.
    fn timeline(&self) -> Arc<str>;

    /// Connects, makes capture ready, and sets where reading goes on. Called first, and again after a failure or when a
    /// resnapshot was asked for.
    async fn start(&mut self, resume: &BTreeMap<CaptureId, Resume>) -> Result<Started>;

    /// The next changes; an unmoved watermark means that nothing new has arrived. Does not wait for changes that are
    /// still to be committed, nor long for those on their way.
    async fn next(&mut self, limit: BatchLimit) -> Result<SourceBatch>;

    /// Returns when changes may have come, after `at_most` at the latest.
    async fn wait(&mut self, at_most: Duration) -> Result<()>;

    /// Everything at or below `durable` is in the log: the source may let go of it (contract 5).
    async fn acknowledge(&mut self, durable: &Position) -> Result<()>;

    /// The newest boundary of the source's own log: backlog is measured against it, not against what was read.
    async fn head(&mut self) -> Result<Head>;
}

/// What the store knows of a capture.
#[derive(Clone, Debug)]
pub struct Resume {
    pub watermark: Watermark,
    pub snapshot: SnapshotProgress,
    /// As it was when the newest change was appended; `None` before the first.
    pub schema: Option<Arc<TableSchema>>,
}

/// What a source captures, and who it is.
#[derive(Debug)]
pub struct Started {
    /// Names this very database: another file or server under the same name differs. Compared with what the log was
    /// read from before anything is appended.
    pub identity: String,
    pub captures: Vec<CaptureInfo>,
    /// Captures that cannot go on, each with the reason; the others can.
    pub failed: Vec<(CaptureId, Error)>,
}

#[derive(Clone, Debug)]
pub struct CaptureInfo {
    pub id: CaptureId,
    pub schema: Arc<TableSchema>,
}

#[derive(Clone, Copy, Debug)]
pub struct BatchLimit {
    pub rows: usize,
    pub bytes: usize,
}

/// What [`Source::next`] read.
#[derive(Debug)]
pub struct SourceBatch {
    /// Each in position order, of one capture and one schema; a capture may come more than once, later parts after.
    pub changes: Vec<ChangeBatch>,
    pub watermark: Watermark,
    /// Captures whose snapshot began, went on or ended in this batch.
    pub snapshots: Vec<(CaptureId, SnapshotProgress)>,
    /// Captures whose schema is another from here on (also named by the batches that have it).
    pub schemas: Vec<CaptureInfo>,
    pub rejected: Vec<Rejected>,
    pub failed: Vec<(CaptureId, Error)>,
    /// Whether more is known to wait.
    pub more: bool,
}

impl SourceBatch {
    /// Nothing, up to `watermark`.
    pub fn empty(watermark: Watermark) -> Self {
        Self {
            changes: Vec::new(),
            watermark,
            snapshots: Vec::new(),
            schemas: Vec::new(),
            rejected: Vec::new(),
            failed: Vec::new(),
            more: false,
        }
    }

    pub fn rows(&self) -> usize {
        self.changes.iter().map(ChangeBatch::len).sum()
    }
}

/// A message or row that cannot be decoded: kept with its reason, never dropped unseen (contract 7).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rejected {
    pub capture: CaptureId,
    pub position: Position,
    pub reason: String,
    pub raw: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    pub boundary: Position,
    /// Source commit time of the newest change; 0 when there is none.
    pub time: Micros,
    /// Changes above the last watermark that `next` returned, if the source can count them cheaply.
    pub changes_waiting: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SnapshotState {
    /// Wanted, not begun.
    Requested,
    Running,
    Done,
}

/// How far the snapshot of a capture has come. Stored with the rows of each chunk, in the same transaction.
///
/// `generation` counts the snapshots of a capture from 1. Rows that an earlier generation or the stream brought, that
/// this one did not see, and that nothing between `start` and `end` touched, are gone from the source: applying the log
/// up to `end` deletes them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotProgress {
    pub generation: u32,
    pub state: SnapshotState,
    /// Rows above this position belong to the snapshot or came while it ran.
    pub start: Position,
    /// The end's own position, above its last row; meaningful when `Done`.
    pub end: Position,
    /// Source time at the end; the commit time of deletions that it finds.
    pub end_time: Micros,
    pub rows: u64,
    /// Where the source goes on, in its own encoding; empty before the first chunk. A source that keeps no place in its
    /// system's log may keep it here after the end, too: it tells the progress again, with another one.
    pub resume: Vec<u8>,
}

impl SnapshotProgress {
    pub fn requested(generation: u32) -> Self {
        Self {
            generation,
            state: SnapshotState::Requested,
            start: Position::ZERO,
            end: Position::ZERO,
            end_time: 0,
            rows: 0,
            resume: Vec::new(),
        }
    }

    pub fn is_done(&self) -> bool {
        self.state == SnapshotState::Done
    }
}
