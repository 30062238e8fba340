//! Writes a log to a folder, and reads it back as an ingestor does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use shori_core::Result;
use shori_core::change::{ChangeBatch, ChangeHeadBuilder, Op};
use shori_core::position::{CaptureId, Position, SortKey, Watermark};
use shori_core::schema::TableSchema;
use shori_core::source::{BatchLimit, CaptureInfo, Resume, SnapshotProgress, Source};
use shori_core::testing::value::{Row, arrays_of};
use shori_files::{FilesConfig, FilesSource, LogFolder, Origin};
use tempfile::TempDir;

pub fn at(lsn: u64) -> Position {
    Position::new(SortKey::from_u64(lsn), SortKey::EMPTY)
}

pub fn boundary(lsn: u64) -> Watermark {
    Watermark { staged: at(lsn), boundary: at(lsn), boundary_time: lsn as i64 }
}

pub fn origin() -> Origin {
    Origin { store: "store".into(), source: "shop".into() }
}

/// Changes of one row each, at the positions given.
pub fn changes(schema: &Arc<TableSchema>, rows: &[(u64, Row)]) -> ChangeBatch {
    let mut head = ChangeHeadBuilder::default();
    for (lsn, _) in rows {
        head.push(&at(*lsn), Op::Insert, *lsn as i64);
    }
    let values: Vec<Row> = rows.iter().map(|(_, row)| row.clone()).collect();
    let columns = arrays_of(schema.columns.fields(), &values);
    head.finish(CaptureId::new("shop", &schema.table), schema.clone(), columns).unwrap()
}

/// A folder of change logs.
pub struct Logs {
    folder: TempDir,
    pub changes_per_file: u64,
}

impl Logs {
    pub fn new(changes_per_file: u64) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), changes_per_file }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn open(&self) -> LogFolder {
        LogFolder::open(self.path(), origin()).unwrap().with_changes_per_file(self.changes_per_file)
    }

    /// One range of one table.
    pub fn write(
        &self,
        schema: &Arc<TableSchema>,
        batches: &[ChangeBatch],
        end: &Watermark,
        snapshots: &[SnapshotProgress],
    ) {
        self.try_write(schema, batches, end, snapshots).unwrap();
    }

    pub fn try_write(
        &self,
        schema: &Arc<TableSchema>,
        batches: &[ChangeBatch],
        end: &Watermark,
        snapshots: &[SnapshotProgress],
    ) -> Result<u64> {
        let folder = self.open();
        let table = folder.table(&CaptureId::new("shop", &schema.table))?;
        let mut writer = table.write(Position::ZERO, snapshots);
        for batch in batches {
            writer.push(&batch.between(&table.end(), &end.boundary)?)?;
        }
        writer.finish(end, schema)?.publish()
    }

    /// A table's files, in order.
    pub fn files(&self, table: &str) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.path().join(table)).unwrap();
        let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }

    pub fn source(&self, tables: &[&str]) -> FilesSource {
        FilesSource::new(FilesConfig {
            path: self.path().to_path_buf(),
            source_name: "replay".into(),
            tables: tables.iter().map(|table| table.to_string()).collect(),
        })
    }
}

/// What a store would hold.
#[derive(Default)]
pub struct Reader {
    pub known: BTreeMap<CaptureId, Resume>,
    pub changes: BTreeMap<CaptureId, Vec<ChangeBatch>>,
    pub schemas: Vec<CaptureInfo>,
    pub watermark: Option<Watermark>,
    pub boundaries: Vec<Position>,
    pub snapshots: Vec<SnapshotProgress>,
}

impl Reader {
    pub async fn start(&mut self, source: &mut FilesSource) -> Result<()> {
        let started = source.start(&self.known).await?;
        if let Some((_, error)) = started.failed.into_iter().next() {
            return Err(error);
        }
        for capture in started.captures {
            let fresh = || Resume {
                watermark: Watermark::ZERO,
                snapshot: SnapshotProgress::requested(1),
                schema: Some(capture.schema.clone()),
            };
            self.known.entry(capture.id.clone()).or_insert_with(fresh).schema = Some(capture.schema.clone());
        }
        Ok(())
    }

    /// Reads to the end of what there is.
    pub async fn read(&mut self, source: &mut FilesSource, rows: usize) -> Result<()> {
        while self.step(source, rows).await? {}
        Ok(())
    }

    pub async fn step(&mut self, source: &mut FilesSource, rows: usize) -> Result<bool> {
        let batch = source.next(BatchLimit { rows, bytes: 1 << 20 }).await?;
        if let Some((_, error)) = batch.failed.into_iter().next() {
            return Err(error);
        }
        for changes in batch.changes {
            self.changes.entry(changes.capture.clone()).or_default().push(changes);
        }
        for info in batch.schemas {
            self.known.get_mut(&info.id).unwrap().schema = Some(info.schema.clone());
            self.schemas.push(info);
        }
        for (id, progress) in batch.snapshots {
            self.known.get_mut(&id).unwrap().snapshot = progress.clone();
            self.snapshots.push(progress);
        }
        for known in self.known.values_mut() {
            known.watermark = batch.watermark;
        }
        if self.watermark.is_none_or(|mark| mark.boundary < batch.watermark.boundary) {
            self.boundaries.push(batch.watermark.boundary);
        }
        self.watermark = Some(batch.watermark);
        Ok(batch.more)
    }

    pub fn positions(&self) -> Vec<Position> {
        let batches = self.changes.values().flatten();
        batches.flat_map(|batch| (0..batch.len()).map(|row| batch.position(row).unwrap())).collect()
    }
}
