//! Change logs under the contract that every source keeps: written of a database that is captured meanwhile.

use std::collections::BTreeMap;

use async_trait::async_trait;
use shori_core::change::ChangeBatch;
use shori_core::position::{CaptureId, Position, Watermark};
use shori_core::source::{BatchLimit, CaptureInfo, SnapshotProgress, Source};
use shori_core::testing::faults::Faults;
use shori_core::testing::memory_database::{FIRST_COMMIT_TIME, MemoryDatabase, Write};
use shori_core::testing::memory_source::{MemorySource, SourceHabits};
use shori_core::testing::source_contract::{SourceHarness, SourceSystem, run_without_resnapshots, tables};
use tokio::sync::Mutex;

use crate::harness::Logs;

struct Exported;

/// A database, its log, and the files of it.
struct System {
    database: MemoryDatabase,
    log: Mutex<Log>,
    logs: Logs,
}

struct Log {
    source: MemorySource,
    captures: Vec<CaptureInfo>,
    changes: BTreeMap<CaptureId, Vec<ChangeBatch>>,
    snapshots: BTreeMap<CaptureId, SnapshotProgress>,
}

#[async_trait]
impl SourceHarness for Exported {
    async fn fresh(&self) -> Box<dyn SourceSystem> {
        let database = MemoryDatabase::new("shop", tables());
        let mut source = MemorySource::new(&database, Faults::none(), SourceHabits::PLAIN);
        let captures = source.start(&BTreeMap::new()).await.unwrap().captures;
        let log = Log { source, captures, changes: BTreeMap::new(), snapshots: BTreeMap::new() };
        Box::new(System { database, log: Mutex::new(log), logs: Logs::new(4) })
    }
}

impl System {
    /// Captures what there is, and exports it.
    async fn export(&self) {
        let mut log = self.log.lock().await;
        let mut mark: Watermark;
        loop {
            let batch = log.source.next(BatchLimit { rows: 7, bytes: 1 << 20 }).await.unwrap();
            mark = batch.watermark;
            for changes in batch.changes {
                log.changes.entry(changes.capture.clone()).or_default().push(changes);
            }
            log.snapshots.extend(batch.snapshots);
            if !batch.more {
                break;
            }
        }
        if mark.boundary == Position::ZERO {
            return;
        }
        for capture in &log.captures {
            let changes = log.changes.get(&capture.id).map_or(&[][..], Vec::as_slice);
            let snapshots: Vec<_> = log.snapshots.get(&capture.id).cloned().into_iter().collect();
            let folder = self.logs.open();
            let is_behind = folder.table(&capture.id).unwrap().end() < mark.boundary;
            drop(folder);
            if is_behind {
                self.logs.write(&capture.schema, changes, &mark, &snapshots);
            }
        }
    }
}

#[async_trait]
impl SourceSystem for System {
    async fn open(&self) -> Box<dyn Source> {
        self.export().await;
        Box::new(self.logs.source(&["items", "quiet"]))
    }

    async fn commit(&self, writes: &[Write]) {
        let head = self.database.head() as i64;
        self.database.commit(FIRST_COMMIT_TIME + head, writes);
        self.export().await;
    }

    fn capture(&self, table: &str) -> CaptureId {
        CaptureId::new("replay", table)
    }

    async fn prune(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn the_contract_of_sources_holds() {
    run_without_resnapshots(&Exported).await;
}
