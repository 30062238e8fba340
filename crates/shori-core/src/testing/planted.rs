//! Bugs that the simulation can be given, one at a time, to show that it finds such bugs: a test that cannot fail
//! shows nothing.
//!
//! A plant holds for one thread, so that runs side by side do not see each other's. In-memory parts and, where a rule
//! is the engine's own, the engine ask [`is`] at the place in question.

use std::cell::Cell;

thread_local! {
    static PLANTED: Cell<Option<Plant>> = const { Cell::new(None) };
}

/// A way to break a contract, as it might happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Plant {
    /// Contract 1: rows are committed first, watermarks in a transaction of their own.
    RowsBeforeWatermarks,
    /// Contract 1: a batch is left out if all of it is there already; one that reaches further is appended whole.
    OverlapAppended,
    /// Contract 2: only captures with changes in a batch get its watermark.
    IdleStandsStill,
    /// Contract 3: a source takes how far it has read for a place between two commits.
    BoundaryIsStaged,
    /// Contract 4: the checkpoint is committed first, rows in a transaction of their own.
    CheckpointBeforeRows,
    /// Contract 5: a source is told that changes are durable as soon as they are read.
    AcknowledgedWhenRead,
    /// Contract 6: the store believes a writer's word on where the log stands.
    StaleAppendWins,
    /// Contract 6: the store does not compare checkpoints before it writes an output.
    StaleOutputWins,
    /// Contract 7: rejected rows are kept beside changes only, and dropped from an empty batch.
    RejectedDropped,
    /// Contract 8: a source whose log has been pruned goes on with what is left.
    GapJumped,
    /// Contract 10: the last append is reported as done, and lost when its process ends.
    AppendNotDurable,
    /// Contract 11: a capture that stands still counts in its timeline's cutoff.
    FailedHoldsBack,
}

impl Plant {
    pub const ALL: [Plant; 12] = [
        Plant::RowsBeforeWatermarks,
        Plant::OverlapAppended,
        Plant::IdleStandsStill,
        Plant::BoundaryIsStaged,
        Plant::CheckpointBeforeRows,
        Plant::AcknowledgedWhenRead,
        Plant::StaleAppendWins,
        Plant::StaleOutputWins,
        Plant::RejectedDropped,
        Plant::GapJumped,
        Plant::AppendNotDurable,
        Plant::FailedHoldsBack,
    ];
}

/// Whether the bug is planted on this thread.
pub fn is(plant: Plant) -> bool {
    PLANTED.get() == Some(plant)
}

/// Plants a bug on this thread until dropped.
pub struct Planted(Option<Plant>);

impl Planted {
    pub fn new(plant: Option<Plant>) -> Self {
        Self(PLANTED.replace(plant))
    }
}

impl Drop for Planted {
    fn drop(&mut self) {
        PLANTED.set(self.0);
    }
}
