//! Batches just appended, handed to the projector in memory when they follow on from where it stands.
//!
//! A shortcut only: what is not here is read from the log, with the same result. The other way, the ingestor learns how
//! fast the projector takes them.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::change::ChangeBatch;
use crate::error::Result;
use crate::position::{CaptureId, Position};

/// Bytes of batches kept, over all captures.
pub const RECENT_MAX_BYTES: usize = 12 << 20;

#[derive(Clone, Default)]
pub struct Recent(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    captures: HashMap<CaptureId, Run>,
    bytes: usize,
    pace: Duration,
}

/// An unbroken run of a capture's log: every change with `after < position <= up_to`.
struct Run {
    after: Position,
    up_to: Position,
    batches: VecDeque<(Position, ChangeBatch)>,
}

impl Recent {
    /// The time from one step of the projector to the next, zero while it waits for changes.
    pub fn pace(&self) -> Duration {
        self.lock().pace
    }

    pub fn set_pace(&self, pace: Duration) {
        self.lock().pace = pace;
    }

    /// Everything of `capture` in `(after, up_to]` is `changes`.
    pub fn push(&self, capture: &CaptureId, after: Position, up_to: Position, changes: Vec<ChangeBatch>) -> Result<()> {
        let mut inner = self.lock();
        let mut added = 0;
        let fresh = || Run { after, up_to: after, batches: VecDeque::new() };
        let run = inner.captures.entry(capture.clone()).or_insert_with(fresh);
        let mut freed = 0;
        if run.up_to != after {
            freed = run.batches.iter().map(|(_, batch)| batch.memory_bytes()).sum();
            *run = fresh();
        }
        run.up_to = up_to;
        for batch in changes.into_iter().filter(|batch| !batch.is_empty()) {
            added += batch.memory_bytes();
            run.batches.push_back((batch.position(batch.len() - 1)?, batch));
        }
        inner.bytes = (inner.bytes + added).saturating_sub(freed);
        if inner.bytes > RECENT_MAX_BYTES {
            inner.captures.clear();
            inner.bytes = 0;
        }
        Ok(())
    }

    /// The changes in `(after, up_to]`, or `None` if not all of them are here.
    pub fn read(&self, capture: &CaptureId, after: &Position, up_to: &Position) -> Result<Option<Vec<ChangeBatch>>> {
        let inner = self.lock();
        let Some(run) = inner.captures.get(capture) else { return Ok(None) };
        if *after < run.after || *up_to > run.up_to {
            return Ok(None);
        }
        let mut found = Vec::new();
        for (_, batch) in run.batches.iter().filter(|(last, _)| last > after) {
            let part = batch.between(after, up_to)?;
            if !part.is_empty() {
                found.push(part);
            }
        }
        Ok(Some(found))
    }

    /// Lets go of what is at or below `consumed`.
    pub fn forget(&self, capture: &CaptureId, consumed: &Position) {
        let mut inner = self.lock();
        let Some(run) = inner.captures.get_mut(capture) else { return };
        let mut freed = 0;
        while run.batches.front().is_some_and(|(last, _)| last <= consumed) {
            if let Some((last, batch)) = run.batches.pop_front() {
                freed += batch.memory_bytes();
                run.after = last;
            }
        }
        if run.batches.is_empty() && run.after < *consumed && *consumed <= run.up_to {
            run.after = *consumed;
        }
        inner.bytes = inner.bytes.saturating_sub(freed);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
