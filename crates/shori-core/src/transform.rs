//! Where the log becomes state, and state becomes output: the engine's working memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;

use crate::change::ChangeBatch;
use crate::error::Result;
use crate::position::{CaptureId, Micros, Position, Positions};
use crate::projection::Projection;
use crate::schema::TableSchema;
use crate::store::OutputReader;

/// Keeps, per captured table, the current rows and what changed in them; computes outputs from both.
///
/// Everything here is a cache: it can be discarded at any time and comes back from the log.
///
/// # Contract
///
/// - **Binding.** A cache belongs to one store id. [`open`](Transform::open) discards it when the id, the layout or the
///   shape of a table is another; then positions are empty.
/// - **State.** After [`advance`](Transform::advance) to a position, state is what the log up to there leaves: per key,
///   the image at the highest position (columns marked unchanged taken from before), or none. A snapshot image equal to
///   the row that stands changes nothing. `advance` is atomic and durable: all captures move, or none.
/// - **Changes.** What each `advance` changed is kept until [`forget`](Transform::forget) says that no projection needs
///   it. Deletions found by a sweep are changes like others.
/// - **Output.** [`compute`](Transform::compute) gives what takes a target from `since` to the applied position: exactly
///   the difference, or a replacement where the difference can no longer be told. Computing twice gives the same rows.
///   An output stays readable while later `advance`s go on; one output per projection is open at a time.
/// - **Settling.** What a projection keeps for its next step (its last result) moves only by
///   [`settle`](Transform::settle), after its store has committed. A crash between the two is repaired by calling
///   `settle` with the checkpoint that the store holds, before anything else.
/// - **Bounds.** Memory is bounded by configuration, whatever the size of a step (contract 9).
#[async_trait]
pub trait Transform: Send + Sync {
    /// Opens or creates the cache. Tables may be added later by opening again.
    async fn open(&self, store_id: &str, tables: &[StateTable], projections: &[Projection]) -> Result<()>;

    /// Columns of a projection's output. Fails with [`ErrorKind::Projection`](crate::ErrorKind::Projection) when its
    /// SQL does not parse or bind, naming file and line.
    async fn describe(&self, projection: &str) -> Result<SchemaRef>;

    /// How far the log has been applied; captures never applied are missing.
    async fn applied(&self) -> Result<BTreeMap<CaptureId, Applied>>;

    /// Applies the log from where each capture stands.
    async fn advance(&self, captures: &[CaptureAdvance], log: &mut dyn LogReader) -> Result<Advanced>;

    /// `since` is the target's checkpoint, `None` before its first output.
    async fn compute(&self, projection: &str, since: Option<&Positions>) -> Result<Computed>;

    /// Makes what is kept for `projection` agree with its store's `checkpoint` (`None`: it was reset).
    async fn settle(&self, projection: &str, checkpoint: Option<&Positions>) -> Result<()>;

    /// Lets go of changes at or below what every one of `checkpoints` has consumed.
    async fn forget(&self, checkpoints: &[Positions]) -> Result<()>;

    /// Changes kept, in rows: what a lagging projection costs.
    async fn changes_kept(&self) -> Result<u64>;

    /// Empties the cache.
    async fn discard(&self) -> Result<()>;
}

/// A table of state: that of one capture.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StateTable {
    pub capture: CaptureId,
    pub schema: Arc<TableSchema>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Applied {
    pub position: Position,
    /// Source commit time there.
    pub time: Micros,
}

/// One capture's part of an [`advance`](Transform::advance).
#[derive(Clone, Debug)]
pub struct CaptureAdvance {
    pub capture: CaptureId,
    pub to: Applied,
    /// The snapshot generation that rows touched in this step belong to.
    pub generation: u32,
    /// This step ends at the end of that generation: rows of lower ones, untouched since, are deleted at this time.
    pub sweep: Option<Micros>,
}

/// The changes of one step: capture by capture, each in position order, above where it stands and up to its `to`.
#[async_trait]
pub trait LogReader: Send {
    async fn next(&mut self) -> Result<Option<ChangeBatch>>;
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Advanced {
    /// Changes read.
    pub rows: u64,
}

pub enum Computed {
    /// The target is where state is.
    UpToDate,
    /// State is behind the target's checkpoint: advance exactly to it first.
    Behind,
    /// The changes since are gone and cannot be told from state: discard, and advance by way of the checkpoint.
    NeedsReplay,
    Output {
        positions: Positions,
        as_of_time: Micros,
        reader: Box<dyn OutputReader>,
    },
}
