//! A file with a writer, and a reader that keeps what a store would: folded rows, watermark, snapshot progress.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, AsArray};
use arrow::datatypes::TimestampMicrosecondType;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use rusqlite::Connection;
use rusqlite::types::ValueRef;
use shori_core::Error;
use shori_core::change::{ChangeBatch, Op};
use shori_core::position::{CaptureId, Position, Watermark};
use shori_core::schema::TableSchema;
use shori_core::source::{BatchLimit, Rejected, Resume, SnapshotProgress, Source, SourceBatch, Started};
use shori_sqlite::{SqliteConfig, SqliteSource, SqliteTable};
use tempfile::TempDir;

pub const ALL: BatchLimit = BatchLimit { rows: 100_000, bytes: 100 << 20 };

/// A row as text by column; NULL left out.
pub type Row = BTreeMap<String, String>;

pub struct Fixture {
    pub directory: TempDir,
    pub writer: Connection,
    pub config: SqliteConfig,
}

impl Fixture {
    /// A new file in which `schema` was run.
    pub fn new(schema: &str, tables: Vec<SqliteTable>) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("source.db");
        let writer = open(&path);
        writer.execute_batch(schema).unwrap();
        let mut config = SqliteConfig::new(path, "shop", tables);
        config.busy_timeout = Duration::from_millis(50);
        config.keep_changes = Duration::ZERO;
        config.prune_interval = Duration::ZERO;
        Self { directory, writer, config }
    }

    pub fn run(&self, sql: &str) {
        self.writer.execute_batch(sql).unwrap_or_else(|cause| panic!("{sql}: {cause}"));
    }

    pub fn reader(&self) -> Reader {
        Reader::new(self.config.clone())
    }

    /// Every row of the table, by key as the reader has it.
    pub fn rows(&self, schema: &TableSchema) -> BTreeMap<Vec<String>, Row> {
        rows(&self.writer, schema)
    }

    pub fn number(&self, query: &str) -> i64 {
        self.writer.query_row(query, [], |row| row.get(0)).unwrap()
    }

    pub fn newest_change(&self) -> i64 {
        self.number("select ifnull((select max(id) from _shori_changes), 0)")
    }
}

pub fn open(path: &PathBuf) -> Connection {
    let connection = Connection::open(path).unwrap();
    connection.busy_timeout(Duration::from_secs(5)).unwrap();
    connection
}

pub fn rows(connection: &Connection, schema: &TableSchema) -> BTreeMap<Vec<String>, Row> {
    let names: Vec<&str> = schema.columns.fields().iter().map(|field| field.name().as_str()).collect();
    let list = names.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
    let mut statement = connection.prepare(&format!("select {list} from \"{}\"", schema.table)).unwrap();
    let mut found = statement.query([]).unwrap();
    let mut rows = BTreeMap::new();
    while let Some(row) = found.next().unwrap() {
        let value = |at: usize| match row.get_ref(at).unwrap() {
            ValueRef::Null => None,
            ValueRef::Integer(number) => Some(number.to_string()),
            ValueRef::Real(number) => Some(number.to_string()),
            ValueRef::Text(text) => Some(String::from_utf8(text.into()).unwrap()),
            ValueRef::Blob(blob) => Some(blob.iter().map(|byte| format!("{byte:02x}")).collect()),
        };
        let values: Row = (0..names.len()).filter_map(|at| Some((names[at].to_string(), value(at)?))).collect();
        rows.insert(schema.key.iter().map(|&at| value(at).unwrap_or_default()).collect(), values);
    }
    rows
}

/// One image as the reader saw it.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    pub capture: String,
    pub position: Position,
    pub op: Op,
    pub key: Vec<String>,
    pub row: Row,
    pub time: i64,
}

#[derive(Clone)]
struct Kept {
    row: Row,
    touched: Position,
}

pub struct Reader {
    pub config: SqliteConfig,
    pub source: SqliteSource,
    pub started: Option<Started>,
    pub watermark: Watermark,
    pub progress: BTreeMap<CaptureId, SnapshotProgress>,
    pub schemas: BTreeMap<CaptureId, Arc<TableSchema>>,
    pub images: Vec<Image>,
    pub rejected: Vec<Rejected>,
    pub failed: Vec<(CaptureId, Error)>,
    state: BTreeMap<CaptureId, BTreeMap<Vec<String>, Kept>>,
    runtime: tokio::runtime::Runtime,
}

impl Reader {
    pub fn new(config: SqliteConfig) -> Self {
        Self {
            source: SqliteSource::new(config.clone()),
            config,
            started: None,
            watermark: Watermark::ZERO,
            progress: BTreeMap::new(),
            schemas: BTreeMap::new(),
            images: Vec::new(),
            rejected: Vec::new(),
            failed: Vec::new(),
            state: BTreeMap::new(),
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
        }
    }

    pub fn id(&self, table: &str) -> CaptureId {
        CaptureId::new(&self.config.source_name, table)
    }

    /// Starts a new source where the store stands.
    pub fn start(&mut self) -> Result<(), Error> {
        self.source = SqliteSource::new(self.config.clone());
        let resume = self.schemas.iter().map(|(id, schema)| {
            let snapshot = self.progress.get(id).cloned().unwrap_or(SnapshotProgress::requested(1));
            let schema = (self.watermark != Watermark::ZERO).then(|| schema.clone());
            (id.clone(), Resume { watermark: self.watermark, snapshot, schema })
        });
        let started = self.runtime.block_on(self.source.start(&resume.collect()))?;
        for info in &started.captures {
            self.schemas.insert(info.id.clone(), info.schema.clone());
        }
        self.started = Some(started);
        Ok(())
    }

    pub fn next(&mut self, limit: BatchLimit) -> Result<SourceBatch, Error> {
        let mut batch = self.runtime.block_on(self.source.next(limit))?;
        self.check(&batch, limit);
        let images = self.apply(&batch);
        self.images.extend(images);
        self.rejected.append(&mut batch.rejected.clone());
        self.failed.append(&mut batch.failed);
        Ok(batch)
    }

    /// Reads until nothing more comes. (Nothing more may be known to wait while the file has more: a batch may end what an
    /// older look has begun.)
    pub fn drain(&mut self, limit: BatchLimit) {
        for _ in 0..1_000_000 {
            let before = self.watermark;
            if !self.next(limit).unwrap().more && self.watermark == before {
                return;
            }
        }
        panic!("reading does not end");
    }

    pub fn acknowledge(&mut self) {
        let staged = self.watermark.staged;
        self.runtime.block_on(self.source.acknowledge(&staged)).unwrap();
    }

    pub fn block_on<T>(&mut self, work: impl AsyncFnOnce(&mut SqliteSource) -> T) -> T {
        self.runtime.block_on(work(&mut self.source))
    }

    pub fn rows(&self, table: &str) -> BTreeMap<Vec<String>, Row> {
        let state = self.state.get(&self.id(table)).into_iter().flatten();
        state.map(|(key, kept)| (key.clone(), kept.row.clone())).collect()
    }

    pub fn all_read(&self) -> bool {
        self.schemas.keys().all(|id| self.progress.get(id).is_some_and(SnapshotProgress::is_done))
    }

    /// What the contract says of every batch.
    fn check(&self, batch: &SourceBatch, limit: BatchLimit) {
        let (before, after) = (self.watermark, batch.watermark);
        assert!(after.staged >= before.staged && after.boundary >= before.boundary, "{before:?} {after:?}");
        assert!(after.boundary <= after.staged && after.boundary_time >= before.boundary_time);
        // A chunk may have been read within the limit of an earlier call.
        assert!(batch.rows() <= limit.rows.max(1) + self.config.snapshot_chunk_rows, "{} rows", batch.rows());
        for changes in &batch.changes {
            assert!(!changes.is_empty());
            let positions: Vec<Position> = (0..changes.len()).map(|row| changes.position(row).unwrap()).collect();
            assert!(positions.iter().all(|position| *position > before.staged && *position <= after.staged));
        }
        for id in self.schemas.keys() {
            let of_one = batch.changes.iter().filter(|changes| changes.capture == *id);
            let positions: Vec<Position> =
                of_one.flat_map(|changes| (0..changes.len()).map(|row| changes.position(row).unwrap())).collect();
            assert!(positions.windows(2).all(|pair| pair[0] < pair[1]), "{positions:?}");
        }
    }

    fn apply(&mut self, batch: &SourceBatch) -> Vec<Image> {
        let mut images = Vec::new();
        for info in &batch.schemas {
            self.schemas.insert(info.id.clone(), info.schema.clone());
        }
        for changes in &batch.changes {
            let state = self.state.entry(changes.capture.clone()).or_default();
            for image in to_images(changes) {
                state.remove(&image.key);
                if image.op.leaves_row() {
                    let kept = Kept { row: image.row.clone(), touched: image.position };
                    state.insert(image.key.clone(), kept);
                }
                images.push(image);
            }
        }
        for (id, progress) in &batch.snapshots {
            if progress.is_done() {
                assert!(progress.end <= batch.watermark.staged && progress.end > progress.start);
                let state = self.state.entry(id.clone()).or_default();
                state.retain(|_, kept| kept.touched > progress.start);
            }
            self.progress.insert(id.clone(), progress.clone());
        }
        self.watermark = batch.watermark;
        images
    }
}

/// Arrow formats named zones only with a feature that nothing else needs.
fn without_zone(column: &ArrayRef) -> ArrayRef {
    match column.as_primitive_opt::<TimestampMicrosecondType>() {
        Some(times) => Arc::new(times.clone().with_timezone_opt(None::<&str>)),
        None => column.clone(),
    }
}

fn to_images(changes: &ChangeBatch) -> Vec<Image> {
    let options = FormatOptions::default();
    let fields = changes.schema.columns.fields();
    let columns: Vec<ArrayRef> = changes.columns.iter().map(without_zone).collect();
    let formatters: Vec<_> = columns.iter().map(|column| ArrayFormatter::try_new(column, &options).unwrap()).collect();
    let value = |column: usize, row: usize| {
        (!changes.columns[column].is_null(row)).then(|| formatters[column].value(row).to_string())
    };
    (0..changes.len())
        .map(|row| Image {
            capture: changes.capture.instance.to_string(),
            position: changes.position(row).unwrap(),
            op: Op::from_u8(changes.op.value(row)).unwrap(),
            key: changes.schema.key.iter().map(|&column| value(column, row).unwrap()).collect(),
            row: (0..fields.len())
                .filter_map(|column| Some((fields[column].name().clone(), value(column, row)?)))
                .collect(),
            time: changes.commit_time(row),
        })
        .collect()
}
