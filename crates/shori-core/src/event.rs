//! What a running pipeline tells the world.

use std::sync::Arc;
use std::time::Duration;

use crate::position::{CaptureId, Micros, Position, Positions, Watermark};

/// Something that happened. Listeners must return at once: they run between two steps of the engine.
#[derive(Clone, Debug)]
pub enum Event {
    /// A batch is durable in the log.
    Appended {
        timeline: Arc<str>,
        rows: u64,
        watermark: Watermark,
        took: Duration,
        commits: Vec<CommitRun>,
    },
    /// A capture's snapshot has come further or ended.
    Snapshot {
        capture: CaptureId,
        rows: u64,
        done: bool,
    },
    /// Rows or messages went to the rejected log.
    Rejected {
        capture: CaptureId,
        count: u64,
        reason: String,
    },
    /// A capture stands still until a person acts.
    CaptureFailed {
        capture: CaptureId,
        reason: String,
    },
    /// A source has ended for good.
    SourceFailed {
        timeline: Arc<str>,
        reason: String,
    },
    /// The log has been applied to state.
    Advanced {
        rows: u64,
        took: Duration,
    },
    /// A projection's output is committed: everything at or below `positions` is visible.
    Projected {
        projection: Arc<str>,
        positions: Positions,
        as_of_time: Micros,
        rows: u64,
        took: Duration,
    },
    ProjectionFailed {
        projection: Arc<str>,
        reason: String,
    },
    /// The log was compacted past where the target stands: it is built anew from what is left, and a history lacks the
    /// versions between.
    MissedByCompaction {
        projection: Arc<str>,
    },
    /// Something failed and will be tried again.
    Retrying {
        what: String,
        reason: String,
        after: Duration,
    },
    /// Log brought down to the last image per key.
    Compacted {
        capture: CaptureId,
        rows_before: u64,
        rows_after: u64,
    },
}

/// Consecutive changes with one source commit time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CommitRun {
    /// Position of the last of them.
    pub up_to: Position,
    pub time: Micros,
    pub rows: u64,
}

/// Where events go.
#[derive(Clone)]
pub struct Events(Arc<dyn Fn(&Event) + Send + Sync>);

impl Events {
    pub fn new(listener: impl Fn(&Event) + Send + Sync + 'static) -> Self {
        Self(Arc::new(listener))
    }

    pub fn nowhere() -> Self {
        Self::new(|_| {})
    }

    pub fn send(&self, event: Event) {
        (self.0)(&event);
    }
}
