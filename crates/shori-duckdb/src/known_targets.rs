//! What is known of the targets in an instance's stores, so that a commit need not ask again each time.
//!
//! All handles to a store share it. Whether a target is layered is no part of it: that, the transaction reads. Counts of
//! rows are estimates by which work is put off or begun; nothing but speed depends on them.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use shori_core::failpoint;

use crate::database::locked;

/// How long a fold that failed is left alone.
const RETRY_AFTER: Duration = Duration::from_secs(10);

/// Tests have small tables: where they run, these bounds lie within their sizes.
fn or_tested(bound: u64, tested: u64) -> u64 {
    if cfg!(debug_assertions) || failpoint::is_armed() { tested } else { bound }
}

/// A target of so many rows is layered: in a smaller one, looking for keys takes milliseconds.
pub(crate) fn large_from_rows() -> u64 {
    or_tested(1_000_000, 4)
}

/// Rows of the active overlay from which on the two overlays change places: what every commit searches, and what every
/// reader joins.
pub(crate) fn overlay_rows() -> u64 {
    or_tested(250_000, 6)
}

/// Rows of it that a commit adds none to before the other overlay is folded.
pub(crate) fn overlay_rows_max() -> u64 {
    4 * overlay_rows()
}

/// Deleted rows that a plain table may hold before it is written anew, unless it has as many live ones: they are read by
/// every search until then, since a checkpoint beside others does not sweep them up.
pub(crate) fn deleted_rows_max() -> u64 {
    or_tested(100_000, 5)
}

/// What is known of a target.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Known {
    /// Rows of a plain table, or of a layered one's active overlay.
    pub rows: u64,
    /// Deleted rows of a plain table, as far as this process has deleted them.
    pub deleted: u64,
    /// The other overlay waits to be folded.
    pub frozen: bool,
    /// A fold is under way, or will be.
    pub asked: bool,
    /// A fold failed, and is not tried again before.
    pub retry_at: Option<Instant>,
    /// It could not be layered.
    pub stays_plain: bool,
}

impl Known {
    /// Whether a fold is to be asked for, by whom it has then been.
    pub fn ask(&mut self) -> bool {
        let wanted = self.frozen && !self.asked && self.retry_at.is_none_or(|time| time <= Instant::now());
        self.asked |= wanted;
        wanted
    }

    /// Takes note of a fold's end.
    pub fn folded(&mut self, succeeded: bool) {
        self.asked = false;
        self.frozen &= !succeeded;
        self.retry_at = if succeeded { None } else { Instant::now().checked_add(RETRY_AFTER) };
    }
}

/// Targets by catalog and projection.
#[derive(Default)]
pub(crate) struct KnownTargets {
    targets: Mutex<BTreeMap<(String, String), Known>>,
    folding: Mutex<()>,
}

impl KnownTargets {
    pub fn get(&self, catalog: &str, projection: &str) -> Option<Known> {
        locked(&self.targets).get(&(catalog.to_string(), projection.to_string())).copied()
    }

    pub fn put(&self, catalog: &str, projection: &str, known: Known) {
        locked(&self.targets).insert((catalog.to_string(), projection.to_string()), known);
    }

    /// Changes what is known, if anything is.
    pub fn change<T>(&self, catalog: &str, projection: &str, change: impl FnOnce(&mut Known) -> T) -> Option<T> {
        locked(&self.targets).get_mut(&(catalog.to_string(), projection.to_string())).map(change)
    }

    pub fn forget(&self, catalog: &str, projection: &str) {
        locked(&self.targets).remove(&(catalog.to_string(), projection.to_string()));
    }

    /// Held by the one who folds, or brings a target from one form into another.
    pub fn folding(&self) -> MutexGuard<'_, ()> {
        locked(&self.folding)
    }

    /// As [`folding`](Self::folding), but `None` while somebody folds.
    pub fn try_folding(&self) -> Option<MutexGuard<'_, ()>> {
        match self.folding.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fold_is_asked_for_once_and_left_alone_after_a_failure() {
        let mut known = Known { frozen: true, ..Known::default() };
        assert!(known.ask());
        assert!(!known.ask(), "it is under way");
        known.folded(false);
        assert!(known.frozen && !known.ask(), "not at once again");
        known.retry_at = None;
        assert!(known.ask());
        known.folded(true);
        assert!(!known.frozen && !known.ask());
    }
}
