//! What every [`Source`] must do, checked on one given by a [`SourceHarness`].
//!
//! The suite keeps its own idea of the tables by running its writes on a [`MemoryDatabase`] too, and works out from
//! the changes that it reads what a reader would hold.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::{DataType, Field, TimeUnit};
use async_trait::async_trait;

use super::memory_database::{FIRST_COMMIT_TIME, MemoryDatabase, Rows, Write};
use super::memory_log::{LogRow, log_rows};
use super::value::{Row, Value, row};
use crate::change::Op;
use crate::error::{ErrorKind, Result};
use crate::position::{CaptureId, Position, Watermark};
use crate::schema::TableSchema;
use crate::source::{BatchLimit, Resume, SnapshotProgress, Source, SourceBatch};

/// Makes databases with the tables of [`tables`], both empty.
#[async_trait]
pub trait SourceHarness: Send + Sync {
    async fn fresh(&self) -> Box<dyn SourceSystem>;
}

/// One database.
#[async_trait]
pub trait SourceSystem: Send + Sync {
    /// Another source over it; the one opened before has been dropped.
    async fn open(&self) -> Box<dyn Source>;

    /// Runs the writes as one transaction.
    async fn commit(&self, writes: &[Write]);

    /// The capture of a table.
    fn capture(&self, table: &str) -> CaptureId;

    /// Lets the database forget all changes so far, read or not; false if it cannot.
    async fn prune(&self) -> bool;

    /// What the source can know of changes.
    fn sees(&self) -> Sees {
        Sees::EveryChange
    }
}

/// What a source can know of changes. Tables may have columns besides those of [`tables`], by which it does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sees {
    /// Every change that was committed.
    EveryChange,
    /// Rows as they stand when it looks: nothing of rows that are gone by then, and no version between. It is held to the
    /// rows that stand, to a resnapshot that finds what is gone, and to all else of the contract; but what it has read
    /// and nobody has stored may come at another position.
    StandingRows,
}

/// `items(id bigint, name text, price decimal(18,2), changed_at timestamp)` and `quiet(id bigint, name text)`, keyed by
/// `id`; other columns may be null.
pub fn tables() -> Vec<TableSchema> {
    let id = || Field::new("id", DataType::Int64, false);
    let name = || Field::new("name", DataType::Utf8, true);
    let price = Field::new("price", DataType::Decimal128(18, 2), true);
    let changed_at = Field::new("changed_at", DataType::Timestamp(TimeUnit::Microsecond, None), true);
    vec![
        TableSchema::new("items", vec![id(), name(), price, changed_at], &["id"]).unwrap(),
        TableSchema::new("quiet", vec![id(), name()], &["id"]).unwrap(),
    ]
}

pub async fn run(harness: &dyn SourceHarness) {
    run_without_resnapshots(harness).await;
    a_resnapshot_has_the_next_generation(harness.fresh().await).await;
    captures_apart_meet_again(harness.fresh().await).await;
    a_gap_is_an_error_with_a_remedy(harness.fresh().await).await;
}

/// For a source of a log that somebody else keeps: its rows do not come a second time.
pub async fn run_without_resnapshots(harness: &dyn SourceHarness) {
    rows_before_capture_are_there(harness.fresh().await).await;
    changes_come_whole_and_in_order(harness.fresh().await).await;
    a_large_transaction_is_split_but_never_half_visible(harness.fresh().await).await;
    reading_goes_on_where_the_store_stands(harness.fresh().await).await;
    idle_captures_move_on(harness.fresh().await).await;
    an_interrupted_snapshot_is_resumed(harness.fresh().await).await;
}

const SMALL: BatchLimit = BatchLimit { rows: 3, bytes: 1 << 20 };
const LARGE: BatchLimit = BatchLimit { rows: 1000, bytes: 1 << 20 };
/// Calls of `next` that bring nothing before a source is held to be at its end.
const IDLE_CALLS: u32 = 3;
/// Calls of `next` before a source is held to run in circles.
const MOST_CALLS: u32 = 10_000;
/// Between two calls that bring nothing: what is committed may be on its way.
const PAUSE: Duration = Duration::from_millis(10);

/// Reads as an ingestor does, and keeps what a store would.
struct Reader {
    system: Box<dyn SourceSystem>,
    model: MemoryDatabase,
    source: Option<Box<dyn Source>>,
    known: BTreeMap<CaptureId, Resume>,
    schemas: BTreeMap<String, Arc<TableSchema>>,
    watermark: Watermark,
    /// Whether the source hears what is stored.
    acknowledges: bool,
    log: BTreeMap<CaptureId, Vec<Arc<LogRow>>>,
    /// What a reader of boundaries would have seen of `items`, each time.
    seen: Vec<Rows>,
    /// Keys that ever stood in each table.
    keys: BTreeMap<Arc<str>, BTreeSet<Row>>,
}

impl Reader {
    fn new(system: Box<dyn SourceSystem>) -> Self {
        let model = MemoryDatabase::new("model", tables());
        let (known, log) = (BTreeMap::new(), BTreeMap::new());
        Self {
            system,
            model,
            source: None,
            known,
            schemas: tables().into_iter().map(|schema| (schema.table.to_string(), Arc::new(schema))).collect(),
            watermark: Watermark::ZERO,
            acknowledges: true,
            log,
            seen: Vec::new(),
            keys: BTreeMap::new(),
        }
    }

    async fn commit(&mut self, writes: &[Write]) {
        for write in writes {
            if let Write::Insert { table, row: to } | Write::Update { table, row: to, .. } = write {
                self.keys.entry(table.clone()).or_default().insert(row([to[0].clone()]));
            }
        }
        self.model.commit(FIRST_COMMIT_TIME, writes);
        self.system.commit(writes).await;
    }

    /// Starts a new source where the log stands.
    async fn start(&mut self) {
        self.source = None;
        let mut source = self.system.open().await;
        let started = source.start(&self.known).await.unwrap();
        assert!(started.failed.is_empty(), "captures fail: {:?}", started.failed);
        for capture in started.captures {
            let fresh = || Resume {
                watermark: Watermark::ZERO,
                snapshot: SnapshotProgress::requested(1),
                schema: Some(capture.schema.clone()),
            };
            self.known.entry(capture.id.clone()).or_insert_with(fresh).schema = Some(capture.schema.clone());
        }
        for table in ["items", "quiet"] {
            assert!(self.known.contains_key(&self.system.capture(table)), "table {table} is captured");
        }
        let lowest = self.known.values().map(|known| known.watermark).min_by_key(|mark| mark.staged);
        self.watermark = lowest.unwrap();
        self.source = Some(source);
    }

    async fn next(&mut self, limit: BatchLimit) -> Result<SourceBatch> {
        self.source.as_mut().unwrap().next(limit).await
    }

    /// One batch, appended; whether it brought anything.
    async fn step(&mut self, limit: BatchLimit) -> bool {
        let batch = self.next(limit).await.unwrap();
        assert!(batch.failed.is_empty(), "captures fail: {:?}", batch.failed);
        assert!(batch.rows() <= 2 * limit.rows, "bounds: {} rows where {} are the limit", batch.rows(), limit.rows);
        let mark = batch.watermark;
        assert!(mark.boundary <= mark.staged, "contract 3: a boundary above what is staged: {mark:?}");
        assert!(mark.staged >= self.watermark.staged, "order: the watermark moves back to {mark:?}");
        assert!(mark.boundary >= self.watermark.boundary, "contract 3: the boundary moves back to {mark:?}");
        for changes in &batch.changes {
            let known = &self.known[&changes.capture].watermark.staged;
            for image in log_rows(changes, 0).unwrap() {
                let at = image.position;
                assert!(at > self.watermark.staged && at <= mark.staged, "order: {at} is out of place");
                if at > *known {
                    let log = self.log.entry(changes.capture.clone()).or_default();
                    assert!(log.last().is_none_or(|last| last.position < at), "order: {at} comes after a later one");
                    log.push(Arc::new(image.in_schema(&self.schemas[&*changes.schema.table])));
                }
            }
        }
        let moved = mark != self.watermark || !batch.snapshots.is_empty();
        for (id, progress) in batch.snapshots {
            assert!(!progress.is_done() || progress.end <= mark.boundary, "snapshots: {id} ends above the boundary");
            assert!(!progress.is_done() || progress.start < progress.end, "snapshots: {id} ends below its start");
            self.known.get_mut(&id).unwrap().snapshot = progress;
        }
        for known in self.known.values_mut() {
            known.watermark = Watermark { staged: known.watermark.staged.max(mark.staged), ..mark };
        }
        self.watermark = mark;
        if self.acknowledges {
            self.source.as_mut().unwrap().acknowledge(&mark.staged).await.unwrap();
        }
        self.seen.push(self.rows_at("items", &mark.boundary));
        moved || batch.more
    }

    /// Reads until nothing more comes, and at least up to what is committed now.
    async fn read_all(&mut self, limit: BatchLimit) {
        let head = self.source.as_mut().unwrap().head().await.unwrap().boundary;
        let mut idle = 0;
        for _ in 0..MOST_CALLS {
            idle = if self.step(limit).await { 0 } else { idle + 1 };
            if idle >= IDLE_CALLS && self.watermark.boundary >= head {
                return;
            }
            if idle > 0 {
                self.source.as_mut().unwrap().wait(PAUSE).await.unwrap();
            }
        }
        panic!("the source is never at its end: it stands at {:?}, of {head}", self.watermark);
    }

    /// What the log up to `position` leaves of a table.
    fn rows_at(&self, table: &str, position: &Position) -> Rows {
        let id = self.system.capture(table);
        let snapshot = &self.known[&id].snapshot;
        let mut rows: BTreeMap<Row, (Position, Row)> = BTreeMap::new();
        let log = self.log.get(&id).map_or(&[][..], Vec::as_slice);
        for image in log.iter().filter(|image| image.position <= *position) {
            if image.op == Op::Truncate {
                rows.clear();
            } else if image.op.leaves_row() {
                let before = rows.get(&image.key()).map(|(_, before)| before.clone());
                let value = |index: usize| match &before {
                    Some(before) if image.unchanged.contains(&index) => before[index].clone(),
                    _ => image.row[index].clone(),
                };
                let whole: Row = (0..image.row.len()).map(value).collect();
                rows.insert(image.key(), (image.position, whole));
            } else {
                rows.remove(&image.key());
            }
        }
        if snapshot.is_done() && snapshot.end <= *position && snapshot.generation > 1 {
            rows.retain(|_, (touched, _)| *touched > snapshot.start);
        }
        rows.into_iter().map(|(key, (_, row))| (key, row)).collect()
    }

    async fn assert_caught_up(&mut self, what: &str) {
        self.assert_rows(what, self.system.sees());
        if self.system.sees() == Sees::StandingRows {
            for known in self.known.values_mut() {
                known.snapshot = SnapshotProgress::requested(known.snapshot.generation + 1);
            }
            self.start().await;
            self.read_all(LARGE).await;
            self.assert_rows(&format!("{what}, read again"), Sees::EveryChange);
        }
    }

    fn assert_rows(&self, what: &str, sees: Sees) {
        for table in ["items", "quiet"] {
            let known = &self.known[&self.system.capture(table)];
            assert!(known.snapshot.is_done(), "{what}: the snapshot of {table} has not ended");
            let mut found = self.rows_at(table, &self.watermark.boundary);
            let standing = self.model.state()[table].clone();
            if sees == Sees::StandingRows {
                let stood = |key: &Row| self.keys.get(table).is_some_and(|keys| keys.contains(key));
                assert!(found.keys().all(stood), "{what}: {table} has keys that no row ever had");
                found.retain(|key, _| standing.contains_key(key));
            }
            assert_eq!(found, standing, "{what}: rows of {table}");
        }
    }
}

fn item(id: i64, name: &str) -> Write {
    Write::Insert { table: "items".into(), row: item_row(id, name) }
}

fn item_row(id: i64, name: &str) -> Row {
    // A price that no binary fraction is, and a time with microseconds.
    row([id.into(), name.into(), Value::Decimal(1_000_010 + i128::from(id)), Value::Time(1_700_000_000_123_457 + id)])
}

fn update(id: i64, to: Row) -> Write {
    Write::Update { table: "items".into(), key: row([id.into()]), row: to }
}

fn delete(id: i64) -> Write {
    Write::Delete { table: "items".into(), key: row([id.into()]) }
}

async fn rows_before_capture_are_there(system: Box<dyn SourceSystem>) {
    let mut reader = Reader::new(system);
    let before: Vec<Write> = (1..=10).map(|id| item(id, "before")).collect();
    reader.commit(&before).await;
    reader.start().await;
    reader.read_all(SMALL).await;
    reader.assert_caught_up("rows that stood before capture began").await;
    reader.commit(&[update(3, item_row(3, "after")), delete(4), item(11, "after")]).await;
    reader.read_all(SMALL).await;
    reader.assert_caught_up("changes after the snapshot").await;
}

async fn changes_come_whole_and_in_order(system: Box<dyn SourceSystem>) {
    let mut reader = Reader::new(system);
    reader.start().await;
    reader.read_all(LARGE).await;
    let nothing = row([5.into(), Value::Null, Value::Null, Value::Null]);
    reader.commit(&[item(1, "one"), item(2, "two"), Write::Insert { table: "items".into(), row: nothing }]).await;
    reader.commit(&[update(1, item_row(1, "eins")), update(1, item_row(1, "un"))]).await;
    // Delete and insert of one key in one transaction keep both, in order.
    reader.commit(&[delete(2), item(2, "again")]).await;
    // A key that changes leaves its old place.
    reader.commit(&[update(1, item_row(7, "moved"))]).await;
    reader.commit(&[item(8, "never seen"), delete(8)]).await;
    reader.commit(&[Write::Insert { table: "quiet".into(), row: row([1.into(), Value::Null]) }, delete(5)]).await;
    reader.read_all(LARGE).await;
    reader.assert_caught_up("changes of every kind").await;
    let log = &reader.log[&reader.system.capture("items")];
    let names: Vec<&Value> = log.iter().filter(|image| image.op.leaves_row()).map(|image| &image.row[1]).collect();
    let every = ["eins", "un", "again", "moved"];
    let standing = ["again", "moved"];
    for name in if reader.system.sees() == Sees::EveryChange { &every[..] } else { &standing } {
        assert!(names.contains(&&Value::from(*name)), "every committed image is read: {name} is missing");
    }
    reader.commit(&[Write::Truncate { table: "items".into() }]).await;
    reader.commit(&[item(1, "after")]).await;
    reader.read_all(LARGE).await;
    reader.assert_caught_up("an emptied table").await;
}

async fn a_large_transaction_is_split_but_never_half_visible(system: Box<dyn SourceSystem>) {
    let mut reader = Reader::new(system);
    reader.start().await;
    reader.read_all(SMALL).await;
    reader.seen.clear();
    let large: Vec<Write> = (1..=20).map(|id| item(id, "large")).collect();
    reader.commit(&large).await;
    let all: Vec<Write> = (1..=20).map(|id| update(id, item_row(id, "changed"))).collect();
    reader.commit(&all).await;
    reader.read_all(SMALL).await;
    reader.assert_caught_up("a transaction larger than a batch").await;
    for rows in &reader.seen {
        let changed = rows.values().filter(|row| row[1] == Value::from("changed")).count();
        assert!([0, 20].contains(&rows.len()), "contract 3: {} of 20 rows are visible", rows.len());
        assert!([0, 20].contains(&changed), "contract 3: {changed} of 20 changes are visible");
    }
}

async fn reading_goes_on_where_the_store_stands(system: Box<dyn SourceSystem>) {
    let mut reader = Reader::new(system);
    reader.start().await;
    reader.read_all(SMALL).await;
    let large: Vec<Write> = (1..=10).map(|id| item(id, "large")).collect();
    reader.commit(&large).await;
    // Ends in the middle of the transaction, with a batch read that nobody stored.
    reader.step(SMALL).await;
    let lost = reader.next(SMALL).await.unwrap();
    let lost: Vec<Position> =
        lost.changes.iter().flat_map(|changes| log_rows(changes, 0).unwrap()).map(|i| i.position).collect();
    reader.start().await;
    reader.commit(&[item(11, "later")]).await;
    reader.read_all(SMALL).await;
    reader.assert_caught_up("contract 5: after a restart").await;
    if reader.system.sees() != Sees::EveryChange {
        return;
    }
    let read: Vec<Position> = reader.log.values().flatten().map(|image| image.position).collect();
    assert!(lost.iter().all(|at| read.contains(at)), "order: positions are the same on every reading");
}

async fn idle_captures_move_on(system: Box<dyn SourceSystem>) {
    let mut reader = Reader::new(system);
    reader.start().await;
    reader.read_all(LARGE).await;
    let before = reader.watermark;
    reader.commit(&[item(1, "one")]).await;
    let head = reader.source.as_mut().unwrap().head().await.unwrap();
    assert!(head.boundary > before.boundary, "the head is the source's own, not what was read");
    reader.source.as_mut().unwrap().wait(Duration::from_secs(10)).await.unwrap();
    reader.read_all(LARGE).await;
    assert!(reader.watermark.boundary >= head.boundary, "contract 2: the watermark reaches the head");
    assert!(reader.watermark.boundary_time > 0, "the boundary has a commit time");
    let still = (reader.watermark, reader.source.as_mut().unwrap().head().await.unwrap().boundary);
    reader.read_all(LARGE).await;
    // A server may write to its log of its own accord.
    if reader.source.as_mut().unwrap().head().await.unwrap().boundary == still.1 {
        assert_eq!(reader.watermark, still.0, "an unmoved watermark means that there is nothing new");
    }
    reader.source.as_mut().unwrap().wait(Duration::from_millis(1)).await.unwrap();
}

async fn an_interrupted_snapshot_is_resumed(system: Box<dyn SourceSystem>) {
    let mut reader = Reader::new(system);
    let before: Vec<Write> = (1..=12).map(|id| item(id, "before")).collect();
    reader.commit(&before).await;
    for turn in 0..200 {
        reader.start().await;
        reader.step(SMALL).await;
        reader.commit(&[update(1 + turn % 12, item_row(1 + turn % 12, "meanwhile"))]).await;
        if reader.known.values().all(|known| known.snapshot.is_done()) {
            break;
        }
        if turn > 20 {
            reader.step(SMALL).await;
        }
    }
    reader.read_all(SMALL).await;
    reader.assert_caught_up("a snapshot interrupted after each batch").await;
}

async fn a_resnapshot_has_the_next_generation(system: Box<dyn SourceSystem>) {
    let mut reader = Reader::new(system);
    let before: Vec<Write> = (1..=6).map(|id| item(id, "before")).collect();
    reader.commit(&before).await;
    reader.start().await;
    reader.read_all(SMALL).await;
    let id = reader.system.capture("items");
    reader.known.get_mut(&id).unwrap().snapshot = SnapshotProgress::requested(2);
    // A row that the log has and the table does not: only the resnapshot can tell.
    let stale = reader.log[&id][0].clone();
    let stale = LogRow { row: item_row(99, "stale"), ..stale.as_ref().clone() };
    reader.log.get_mut(&id).unwrap().insert(0, Arc::new(stale));
    reader.start().await;
    reader.commit(&[item(7, "meanwhile"), delete(2)]).await;
    reader.read_all(SMALL).await;
    let progress = &reader.known[&id].snapshot;
    assert_eq!(progress.generation, 2, "snapshots: the generation is the one requested");
    assert!(progress.end_time > 0, "snapshots: the end has a source time");
    reader.assert_caught_up("a resnapshot").await;
}

async fn captures_apart_meet_again(system: Box<dyn SourceSystem>) {
    let mut reader = Reader::new(system);
    reader.commit(&[item(1, "one"), item(2, "two")]).await;
    reader.start().await;
    reader.read_all(LARGE).await;
    let quiet = reader.system.capture("quiet");
    let behind = reader.known[&quiet].watermark;
    // What is not in every capture's log is not acknowledged.
    reader.acknowledges = false;
    reader.commit(&[item(3, "three")]).await;
    reader.known.get_mut(&reader.system.capture("items")).unwrap().snapshot = SnapshotProgress::requested(2);
    reader.start().await;
    reader.read_all(LARGE).await;
    let furthest = reader.watermark.staged;
    reader.known.get_mut(&quiet).unwrap().watermark = behind;
    reader.start().await;
    reader.read_all(LARGE).await;
    assert!(reader.watermark.boundary >= furthest, "boundaries: captures that were apart never stand at one place");
    reader.assert_caught_up("captures apart").await;
}

async fn a_gap_is_an_error_with_a_remedy(system: Box<dyn SourceSystem>) {
    let mut reader = Reader::new(system);
    reader.start().await;
    reader.read_all(LARGE).await;
    reader.source = None;
    reader.commit(&[item(1, "lost")]).await;
    reader.commit(&[item(2, "lost too")]).await;
    if !reader.system.prune().await {
        return;
    }
    let mut source = reader.system.open().await;
    let mut errors = Vec::new();
    match source.start(&reader.known).await {
        Err(error) => errors.push(error),
        Ok(started) if !started.failed.is_empty() => errors.extend(started.failed.into_iter().map(|(_, error)| error)),
        Ok(_) => match source.next(LARGE).await {
            Err(error) => errors.push(error),
            Ok(batch) => errors.extend(batch.failed.into_iter().map(|(_, error)| error)),
        },
    }
    assert!(!errors.is_empty(), "contract 8: a gap is passed over in silence");
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Gap, "contract 8: {error}");
        assert!(error.remedy().is_some_and(|remedy| remedy.contains("resnapshot")), "contract 8: {error}");
    }
    drop(source);
    // The remedy works.
    for known in reader.known.values_mut() {
        known.snapshot = SnapshotProgress::requested(2);
    }
    reader.start().await;
    reader.read_all(LARGE).await;
    reader.assert_caught_up("a resnapshot after a gap").await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::faults::Faults;
    use crate::testing::memory_source::{MemorySource, SourceHabits};

    struct Memory(SourceHabits);

    struct Database(MemoryDatabase, SourceHabits);

    #[async_trait]
    impl SourceHarness for Memory {
        async fn fresh(&self) -> Box<dyn SourceSystem> {
            Box::new(Database(MemoryDatabase::new("memory", tables()), self.0))
        }
    }

    #[async_trait]
    impl SourceSystem for Database {
        async fn open(&self) -> Box<dyn Source> {
            Box::new(MemorySource::new(&self.0, Faults::none(), self.1))
        }

        async fn commit(&self, writes: &[Write]) {
            let head = self.0.head() as i64;
            self.0.commit(FIRST_COMMIT_TIME + head, writes);
        }

        fn capture(&self, table: &str) -> CaptureId {
            self.0.capture(table)
        }

        async fn prune(&self) -> bool {
            self.0.prune(self.0.head());
            true
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_memory_source_keeps_the_contract() {
        run(&Memory(SourceHabits::PLAIN)).await;
        run(&Memory(SourceHabits { redelivered: 0, ..SourceHabits::ROUGH })).await;
    }
}
