//! What a simulated pipeline is made of: a store and a transform, whose files outlive every process.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::plan::CacheFate;
use crate::error::Result;
use crate::projection::Projection;
use crate::store::Store;
use crate::testing::faults::Faults;
use crate::testing::memory_store::MemoryStorage;
use crate::testing::memory_transform::MemoryCache;
use crate::testing::model_projections::model_projections;
use crate::testing::planted::{self, Plant};
use crate::transform::Transform;

/// A way to make stores and transforms for one world.
pub trait Parts: Send + Sync {
    /// Projections of every kind over the model's tables, in the words of the transform.
    fn projections(&self) -> Vec<Projection>;

    /// Starts a process of `worker`: both parts open what they left. Their steps follow `faults`.
    fn start(&self, worker: usize, faults: &Faults) -> Result<(Arc<dyn Store>, Arc<dyn Transform>)>;

    /// The process has ended, by a crash or not; everything it held has been dropped.
    fn end(&self, worker: usize, fate: CacheFate);

    /// The store as a person opens it, who asks for something.
    fn store(&self) -> Result<Arc<dyn Store>>;

    /// What is durable now, as far as an oracle needs it. No process sees this call.
    fn durable(&self) -> Result<MemoryStorage>;

    /// Changes kept in a worker's cache.
    fn changes_kept(&self, worker: usize) -> Result<u64>;
}

/// Everything in memory; workers share the store, each has its own cache.
pub struct MemoryParts {
    storage: MemoryStorage,
    caches: Mutex<Vec<Caches>>,
}

#[derive(Default)]
struct Caches {
    now: MemoryCache,
    older: MemoryCache,
}

impl MemoryParts {
    pub fn new(workers: usize) -> Self {
        let caches = (0..workers).map(|_| Caches::default()).collect();
        Self { storage: MemoryStorage::new("simulated"), caches: Mutex::new(caches) }
    }

    fn caches(&self) -> MutexGuard<'_, Vec<Caches>> {
        self.caches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Parts for MemoryParts {
    fn projections(&self) -> Vec<Projection> {
        model_projections()
    }

    fn start(&self, worker: usize, faults: &Faults) -> Result<(Arc<dyn Store>, Arc<dyn Transform>)> {
        let transform = self.caches()[worker].now.open(faults.clone());
        Ok((Arc::new(self.storage.open(faults.clone())), Arc::new(transform)))
    }

    fn end(&self, worker: usize, fate: CacheFate) {
        if planted::is(Plant::AppendNotDurable) {
            self.storage.lose_last_append();
        }
        let Caches { now, older } = &mut self.caches()[worker];
        let left = now.copy();
        match fate {
            // A copy, for a task of the old process may still hold the cache itself.
            CacheFate::Kept => *now = left.clone(),
            CacheFate::Lost => *now = MemoryCache::default(),
            CacheFate::Older => *now = older.copy(),
        }
        *older = left.copy();
    }

    fn store(&self) -> Result<Arc<dyn Store>> {
        Ok(Arc::new(self.storage.open(Faults::none())))
    }

    fn durable(&self) -> Result<MemoryStorage> {
        Ok(self.storage.clone())
    }

    fn changes_kept(&self, worker: usize) -> Result<u64> {
        Ok(self.caches()[worker].now.changes_kept())
    }
}
