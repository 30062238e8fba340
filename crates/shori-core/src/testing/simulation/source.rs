//! The simulated source: the model's, with messages that cannot be decoded, a log that is pruned by acknowledgement,
//! and the bugs planted in sources.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;

use crate::error::Result;
use crate::position::{CaptureId, Position, Watermark};
use crate::source::{BatchLimit, Head, Rejected, Resume, Source, SourceBatch, Started};
use crate::testing::memory_database::{MemoryDatabase, commit_end, commit_of};
use crate::testing::memory_source::MemorySource;
use crate::testing::planted::{self, Plant};

/// Positions of messages that a source handed out as rejected, and that so must be in the log once it is past them.
#[derive(Clone, Default)]
pub struct HandedOut(Arc<Mutex<Handed>>);

#[derive(Default)]
struct Handed {
    /// The commit at which the log begins: before it is durable, the next start may be anywhere.
    first: Option<u64>,
    positions: BTreeSet<Position>,
}

impl HandedOut {
    pub fn up_to(&self, position: &Position) -> Vec<Position> {
        self.handed().positions.range(..=position).copied().collect()
    }

    fn add(&self, position: Position) {
        let mut handed = self.handed();
        if handed.first.is_some_and(|first| commit_of(&position) > first) {
            handed.positions.insert(position);
        }
    }

    fn is_durable(&self, position: &Position) {
        self.handed().first.get_or_insert(commit_of(position));
    }

    fn handed(&self) -> std::sync::MutexGuard<'_, Handed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub struct SimulatedSource {
    pub inner: MemorySource,
    pub database: MemoryDatabase,
    /// One commit in so many brings a message that cannot be decoded, for `rejecting`.
    pub rejects: Option<u64>,
    pub rejecting: CaptureId,
    pub handed_out: HandedOut,
    pub prunes: bool,
}

impl SimulatedSource {
    fn reject(&self, batch: &mut SourceBatch, after: &Position) {
        let Some(every) = self.rejects else { return };
        for commit in commit_of(after)..=commit_of(&batch.watermark.staged) {
            let position = commit_end(commit);
            if commit % every == 0 && position > *after && position <= batch.watermark.staged {
                let (capture, raw) = (self.rejecting.clone(), commit.to_be_bytes().to_vec());
                batch.rejected.push(Rejected { capture, position, reason: "it cannot be decoded".into(), raw });
                self.handed_out.add(position);
            }
        }
    }

    fn prune(&self, durable: &Position) {
        let commit = commit_of(durable);
        let whole = *durable >= commit_end(commit);
        if self.prunes {
            self.database.prune(if whole { commit } else { commit - 1 });
        }
    }
}

#[async_trait]
impl Source for SimulatedSource {
    fn timeline(&self) -> Arc<str> {
        self.inner.timeline()
    }

    async fn start(&mut self, resume: &BTreeMap<CaptureId, Resume>) -> Result<Started> {
        let mut resume = resume.clone();
        if planted::is(Plant::GapJumped) {
            let oldest = commit_end(self.database.pruned());
            for known in resume.values_mut().filter(|known| known.watermark.staged < oldest) {
                known.watermark = Watermark { staged: oldest, boundary: oldest, ..known.watermark };
            }
        }
        self.inner.start(&resume).await
    }

    async fn next(&mut self, limit: BatchLimit) -> Result<SourceBatch> {
        let after = self.inner.position();
        let mut batch = self.inner.next(limit).await?;
        self.reject(&mut batch, &after);
        if planted::is(Plant::BoundaryIsStaged) {
            batch.watermark.boundary = batch.watermark.staged;
        }
        if planted::is(Plant::AcknowledgedWhenRead) {
            self.database.acknowledge(batch.watermark.staged);
            self.prune(&batch.watermark.staged);
        }
        Ok(batch)
    }

    async fn wait(&mut self, at_most: Duration) -> Result<()> {
        self.inner.wait(at_most).await
    }

    async fn acknowledge(&mut self, durable: &Position) -> Result<()> {
        self.handed_out.is_durable(durable);
        let acknowledged = self.inner.acknowledge(durable).await;
        self.prune(&self.database.acknowledged());
        acknowledged
    }

    async fn head(&mut self) -> Result<Head> {
        self.inner.head().await
    }
}
