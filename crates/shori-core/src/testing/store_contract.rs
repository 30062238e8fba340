//! What every [`Store`] must do, checked on one given by a [`StoreHarness`].
//!
//! The store in memory is the model: random pipelines run on both at once, and both must answer and hold the same.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::faults::Faults;
use super::hand_driven;
use super::memory_database::{Image, MemoryDatabase, image_position};
use super::memory_source::{MemorySource, SourceHabits, batch_of_images};
use super::memory_store::MemoryStorage;
use super::memory_transform::MemoryCache;
use super::model_projections::{latest, model_projections, target_of};
use super::oracle;
use super::store_twin::{StoreTwin, collect, log_lines};
use super::transactions::{TransactionShape, commit_random, model_tables};
use super::value::{Row, Value, batch_of, row};
use crate::change::{ChangeBatch, Op};
use crate::error::{Error, ErrorKind, Result};
use crate::position::{CaptureId, Position, Positions, Watermark};
use crate::projection::{Projection, Target, TargetShape};
use crate::schema::TableSchema;
use crate::source::{BatchLimit, CaptureInfo, SnapshotState};
use crate::store::{Append, Appended, Committed, OutputCommit, OutputKind, OutputReader, OutputRows, Store};

/// Makes empty stores.
#[async_trait]
pub trait StoreHarness: Send + Sync {
    async fn fresh(&self) -> Box<dyn StoreSystem>;

    /// How many random runs are made.
    fn seeds(&self) -> u64 {
        10
    }
}

/// One place where a store keeps what is durable.
#[async_trait]
pub trait StoreSystem: Send + Sync {
    /// Opens it; the one opened before has been dropped.
    async fn open(&self) -> Box<dyn Store>;

    /// The rows of a target, in its columns (`target.columns`) and any order. The store may be open meanwhile.
    async fn rows(&self, store: &dyn Store, target: &Target) -> Vec<Row>;
}

pub async fn run(harness: &dyn StoreHarness) {
    its_id_is_made_once(harness.fresh().await.as_ref()).await;
    captures_are_prepared(harness.fresh().await.as_ref()).await;
    appends_are_atomic_and_idempotent(harness.fresh().await.as_ref()).await;
    a_stale_writer_is_fenced(harness.fresh().await.as_ref()).await;
    a_boundary_never_moves_back(harness.fresh().await.as_ref()).await;
    snapshots_and_failures_are_kept(harness.fresh().await.as_ref()).await;
    outputs_are_one_transaction(harness.fresh().await.as_ref()).await;
    for seed in 0..harness.seeds() {
        random_run(harness, seed).await;
    }
}

fn schema(table: &str) -> Arc<TableSchema> {
    Arc::new(model_tables().into_iter().find(|schema| &*schema.table == table).unwrap())
}

fn info(table: &str) -> CaptureInfo {
    CaptureInfo { id: CaptureId::new("shop", table), schema: schema(table) }
}

/// An insert into `notes` or `customers`, as image `index` of commit `commit`.
fn insert(table: &str, commit: u64, index: u32, id: i64) -> ChangeBatch {
    let mut values = vec![Value::Integer(id), "text".into()];
    values.resize(schema(table).columns.fields().len(), Value::Null);
    let image = Image {
        table: table.into(),
        position: image_position(commit, index),
        op: Op::Insert,
        commit_time: commit as i64,
        row: row(values),
        unchanged: Vec::new(),
    };
    batch_of_images(&CaptureId::new("shop", table), &schema(table), &[image]).unwrap()
}

fn mark(commit: u64, index: u32) -> Watermark {
    let at = image_position(commit, index);
    Watermark { staged: at, boundary: at, boundary_time: commit as i64 }
}

type Expected = BTreeMap<CaptureId, Position>;

fn expected(tables: &[(&str, Position)]) -> Expected {
    tables.iter().map(|(table, staged)| (CaptureId::new("shop", table), *staged)).collect()
}

async fn append(store: &dyn Store, expected: &Expected, changes: &[ChangeBatch], watermark: Watermark) -> Appended {
    let append = Append { timeline: "shop", expected, changes, watermark, snapshots: &[], schemas: &[], rejected: &[] };
    store.append(&append).await.unwrap()
}

async fn prepared(system: &dyn StoreSystem) -> Box<dyn Store> {
    let store = system.open().await;
    store.bootstrap().await.unwrap();
    store.prepare_captures("shop", "here", &[info("notes"), info("customers")]).await.unwrap();
    store
}

async fn log(store: &dyn Store, table: &str) -> Vec<Row> {
    let id = CaptureId::new("shop", table);
    let all = image_position(u64::MAX, 0);
    log_lines(&collect(store.read_log(&id, &Position::ZERO, &all).await.unwrap()).await.unwrap())
}

async fn its_id_is_made_once(system: &dyn StoreSystem) {
    let store = system.open().await;
    let id = store.bootstrap().await.unwrap();
    assert_eq!(store.bootstrap().await.unwrap(), id);
    drop(store);
    assert_eq!(system.open().await.bootstrap().await.unwrap(), id, "a store's id is made once");
}

async fn captures_are_prepared(system: &dyn StoreSystem) {
    let store = prepared(system).await;
    let captures = store.captures().await.unwrap();
    for state in captures.values() {
        assert_eq!((state.watermark, state.horizon, &state.failed), (Watermark::ZERO, Position::ZERO, &None));
        assert_eq!((state.snapshot.generation, state.snapshot.state), (1, SnapshotState::Requested));
    }
    let other = store.prepare_captures("shop", "elsewhere", &[info("notes")]).await.unwrap_err();
    assert_eq!(other.kind(), ErrorKind::SourceReplaced, "{other}");
    append(store.as_ref(), &expected(&[("notes", Position::ZERO)]), &[insert("notes", 1, 0, 1)], mark(1, 0)).await;
    let mut fields: Vec<_> = schema("notes").columns.fields().iter().map(|field| field.as_ref().clone()).collect();
    fields.push(arrow::datatypes::Field::new("added", arrow::datatypes::DataType::Int64, true));
    let wider = TableSchema::new("notes", fields.clone(), &["note_id"]).unwrap();
    let wider = CaptureInfo { id: CaptureId::new("shop", "notes"), schema: Arc::new(wider) };
    store.prepare_captures("shop", "here", std::slice::from_ref(&wider)).await.unwrap();
    assert_eq!(store.captures().await.unwrap()[&wider.id].schema, wider.schema);
    let lines = log(store.as_ref(), "notes").await;
    assert_eq!((lines.len(), &lines[0][5]), (1, &Value::Null), "rows staged before are null in an added column");
    fields[1] = arrow::datatypes::Field::new("body", arrow::datatypes::DataType::Int64, true);
    let retyped = TableSchema::new("notes", fields, &["note_id"]).unwrap();
    let retyped = CaptureInfo { id: wider.id, schema: Arc::new(retyped) };
    let error = store.prepare_captures("shop", "here", &[retyped]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Schema, "{error}");
}

async fn appends_are_atomic_and_idempotent(system: &dyn StoreSystem) {
    let store = prepared(system).await;
    let start = expected(&[("notes", Position::ZERO), ("customers", Position::ZERO)]);
    let changes = [insert("notes", 1, 0, 1), insert("notes", 1, 1, 2)];
    assert_eq!(append(store.as_ref(), &start, &changes, mark(1, 1)).await, Appended::Applied { rows: 2 });
    let captures = store.captures().await.unwrap();
    assert!(captures.values().all(|state| state.watermark == mark(1, 1)), "contract 2: idle captures move too");
    for staged in [Position::ZERO, image_position(1, 1)] {
        let again = expected(&[("notes", staged), ("customers", staged)]);
        assert_eq!(append(store.as_ref(), &again, &changes, mark(1, 1)).await, Appended::AlreadyApplied, "contract 1");
    }
    drop(store);
    let store = system.open().await;
    store.bootstrap().await.unwrap();
    assert_eq!(log(store.as_ref(), "notes").await.len(), 2, "contract 10: what was appended is durable");
    // What stands below the watermark is left out by position, also within a batch that goes on above.
    let at = expected(&[("notes", image_position(1, 1)), ("customers", image_position(1, 1))]);
    let changes = [insert("notes", 1, 1, 2), insert("notes", 2, 0, 3)];
    assert_eq!(append(store.as_ref(), &at, &changes, mark(2, 0)).await, Appended::Applied { rows: 1 }, "contract 1");
    assert_eq!(log(store.as_ref(), "notes").await.len(), 3);
    let id = CaptureId::new("shop", "notes");
    let part = store.read_log(&id, &image_position(1, 0), &image_position(1, 1)).await.unwrap();
    assert_eq!(log_lines(&collect(part).await.unwrap()).len(), 1, "read_log: after is excluded, up_to included");
}

async fn a_stale_writer_is_fenced(system: &dyn StoreSystem) {
    let store = prepared(system).await;
    let start = expected(&[("notes", Position::ZERO), ("customers", Position::ZERO)]);
    append(store.as_ref(), &start, &[insert("notes", 1, 0, 1)], mark(1, 0)).await;
    let stale = append(store.as_ref(), &start, &[insert("notes", 2, 0, 2)], mark(2, 0)).await;
    assert_eq!(stale, Appended::Conflict, "contract 6");
    assert_eq!(log(store.as_ref(), "notes").await.len(), 1, "a conflict changes nothing");
    assert!(store.captures().await.unwrap().values().all(|state| state.watermark == mark(1, 0)));
}

async fn a_boundary_never_moves_back(system: &dyn StoreSystem) {
    let store = prepared(system).await;
    let start = expected(&[("notes", Position::ZERO), ("customers", Position::ZERO)]);
    append(store.as_ref(), &start, &[insert("notes", 1, 0, 1)], mark(1, 9)).await;
    let at = expected(&[("notes", image_position(1, 9)), ("customers", image_position(1, 9))]);
    let split = Watermark { staged: image_position(2, 0), ..mark(1, 4) };
    append(store.as_ref(), &at, &[insert("notes", 2, 0, 2)], split).await;
    let state = &store.captures().await.unwrap()[&CaptureId::new("shop", "notes")];
    assert_eq!((state.watermark.staged, state.watermark.boundary), (image_position(2, 0), image_position(1, 9)));
}

async fn snapshots_and_failures_are_kept(system: &dyn StoreSystem) {
    let store = prepared(system).await;
    let id = CaptureId::new("shop", "notes");
    store.mark_failed(&id, "its reason").await.unwrap();
    assert_eq!(store.captures().await.unwrap()[&id].failed.as_deref(), Some("its reason"), "contract 11");
    let requested = store.request_snapshot(&id, false).await.unwrap();
    assert_eq!((requested.generation, requested.state), (2, SnapshotState::Requested));
    let state = store.captures().await.unwrap().remove(&id).unwrap();
    assert_eq!((state.snapshot.clone(), state.failed), (requested, None), "a request clears the failure");
    // Progress is stored with the rows of its chunk.
    let mut progress = state.snapshot;
    progress.state = SnapshotState::Running;
    progress.resume = vec![1, 2, 3];
    let watermark = mark(1, 0);
    let expected = expected(&[("notes", Position::ZERO)]);
    let snapshots = [(id.clone(), progress.clone())];
    let changes = [insert("notes", 1, 0, 1)];
    let append = Append {
        timeline: "shop",
        expected: &expected,
        changes: &changes,
        watermark,
        snapshots: &snapshots,
        schemas: &[],
        rejected: &[],
    };
    assert_eq!(store.append(&append).await.unwrap(), Appended::Applied { rows: 1 });
    assert_eq!(store.captures().await.unwrap()[&id].snapshot, progress);
    store.request_snapshot(&id, true).await.unwrap();
    assert!(log(store.as_ref(), "notes").await.is_empty(), "a retyped capture's log is emptied");
}

/// Hands out its parts, then fails if it is told to.
struct Parts {
    parts: Vec<OutputRows>,
    kind: OutputKind,
    fails: bool,
}

#[async_trait]
impl OutputReader for Parts {
    fn kind(&self) -> OutputKind {
        self.kind
    }

    fn rows_hint(&self) -> Option<u64> {
        None
    }

    async fn next(&mut self) -> Result<Option<OutputRows>> {
        match self.parts.pop() {
            None if self.fails => Err(Error::new(ErrorKind::Unavailable, "read", "an output", "injected fault")),
            part => Ok(part),
        }
    }
}

async fn outputs_are_one_transaction(system: &dyn StoreSystem) {
    let store = prepared(system).await;
    let notes = schema("notes");
    let captures = BTreeMap::from([(CaptureId::new("shop", "notes"), notes.clone())]);
    let target = target_of(&latest("notes"), notes.columns.clone(), &captures);
    assert_eq!(target.shape, TargetShape::Rows);
    store.prepare_target(&target).await.unwrap();
    assert_eq!(store.checkpoint("notes_latest").await.unwrap(), None);
    let at = |commit| Positions::from([(CaptureId::new("shop", "notes"), image_position(commit, 0))]);
    let upsert = |id: i64, body: &str| {
        OutputRows::Upsert(batch_of(notes.columns.fields(), &[row([Value::Integer(id), body.into()])]))
    };
    let commit = async |from: Option<u64>, to: u64, kind, parts, fails| {
        let (expected, checkpoint) = (from.map(at), at(to));
        let mut output = Parts { parts, kind, fails };
        let commit = OutputCommit {
            target: &target,
            expected: expected.as_ref(),
            checkpoint: &checkpoint,
            as_of_lsn: None,
            as_of_time: to as i64,
            horizon: Position::ZERO,
            complete: true,
            run_id: "run",
            output: &mut output,
        };
        store.commit_output(commit).await
    };
    let both = || vec![upsert(1, "one"), upsert(2, "two")];
    assert!(commit(None, 1, OutputKind::Replace, both(), true).await.is_err());
    assert!(system.rows(store.as_ref(), &target).await.is_empty(), "contract 4: a pull that fails leaves nothing");
    assert_eq!(store.checkpoint("notes_latest").await.unwrap(), None, "contract 4");
    assert!(matches!(commit(None, 1, OutputKind::Replace, both(), false).await.unwrap(), Committed::Applied { .. }));
    let again = commit(None, 1, OutputKind::Replace, vec![], false).await.unwrap();
    assert_eq!(again, Committed::AlreadyApplied, "contract 6");
    let stale = commit(None, 2, OutputKind::Replace, vec![], false).await.unwrap();
    assert_eq!(stale, Committed::Conflict, "contract 6");
    assert_eq!(system.rows(store.as_ref(), &target).await.len(), 2, "neither changes a row");
    let gone = OutputRows::Delete(batch_of(&notes.columns.project(&[0]).unwrap().fields, &[row([Value::Integer(1)])]));
    commit(Some(1), 2, OutputKind::Merge, vec![upsert(3, "three"), gone], false).await.unwrap();
    store.record_error("notes_latest", Some("a message")).await.unwrap();
    store.record_error("notes_latest", None).await.unwrap();
    let mut rows = system.rows(store.as_ref(), &target).await;
    rows.sort();
    assert_eq!(rows, [row([2.into(), "two".into()]), row([3.into(), "three".into()])]);
    let checkpoint = store.checkpoint("notes_latest").await.unwrap().unwrap();
    assert_eq!((checkpoint.positions, checkpoint.as_of_time), (at(2), 2));
    commit(Some(2), 3, OutputKind::Replace, vec![upsert(3, "drei")], false).await.unwrap();
    assert_eq!(system.rows(store.as_ref(), &target).await, [row([3.into(), "drei".into()])]);
    store.reset_projection("notes_latest").await.unwrap();
    assert_eq!(store.checkpoint("notes_latest").await.unwrap(), None);
    assert_eq!(system.rows(store.as_ref(), &target).await.len(), 1, "rows stay until the next output replaces them");
}

/// A random pipeline on the store and its model at once: appends, resnapshots, compaction, outputs of all kinds.
async fn random_run(harness: &dyn StoreHarness, seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let system = harness.fresh().await;
    let database = MemoryDatabase::new("shop", model_tables());
    let storage = MemoryStorage::new("store");
    let model = storage.open(Faults::none());
    let cache = MemoryCache::default();
    let projections = model_projections();
    let faults = Faults::seeded(seed, super::faults::FaultPlan::NONE);
    for turn in 0..10 {
        let context = format!("seed {seed} turn {turn}");
        for _ in 0..rng.random_range(0..6) {
            commit_random(&database, &TransactionShape::default(), &mut rng);
        }
        let store = system.open().await;
        let twin = StoreTwin { model: &model, other: store.as_ref() };
        let transform = cache.open(Faults::none());
        let mut source = MemorySource::new(&database, faults.clone(), SourceHabits::ROUGH);
        let limit = BatchLimit { rows: rng.random_range(1..40), bytes: 1 << 20 };
        let skips = || faults.draw(4) == 0;
        let forget = rng.random();
        hand_driven::round(&mut source, &twin, &transform, &projections, limit, forget, skips).await.unwrap();
        oracle::assert_right(&database, &storage, &projections, &context);
        compare_rows(system.as_ref(), store.as_ref(), &storage, &projections, &context).await;
        disturb(&twin, &storage, &transform, &projections, &mut rng).await;
    }
}

async fn compare_rows(
    system: &dyn StoreSystem,
    store: &dyn Store,
    storage: &MemoryStorage,
    projections: &[Projection],
    context: &str,
) {
    for projection in projections {
        let Some(table) = storage.target(&projection.name) else { continue };
        let (mut expected, mut found) = (table.rows(), system.rows(store, &table.target).await);
        expected.sort();
        found.sort();
        assert_eq!(found, expected, "{context}: rows of {}", projection.name);
    }
}

async fn disturb(
    twin: &StoreTwin<'_>,
    storage: &MemoryStorage,
    transform: &dyn crate::transform::Transform,
    projections: &[Projection],
    rng: &mut ChaCha8Rng,
) {
    for (id, state) in storage.captures() {
        match rng.random_range(0..16) {
            0 => drop(twin.request_snapshot(&id, false).await.unwrap()),
            1..4 => {
                let reads = projections.iter().filter(|projection| projection.tables().contains(&state.schema.table));
                let reached = reads.map(|projection| {
                    let checkpoint = storage.target(&projection.name).and_then(|target| target.checkpoint);
                    checkpoint.and_then(|at| at.positions.get(&id).copied()).unwrap_or(Position::ZERO)
                });
                let horizon = reached.chain([state.watermark.boundary]).min().unwrap();
                twin.compact(&id, &horizon, rng.random()).await.unwrap();
            }
            _ => {}
        }
    }
    if rng.random_range(0..5) == 0 {
        let projection = &projections[rng.random_range(0..projections.len())];
        twin.reset_projection(&projection.name).await.unwrap();
    }
    if rng.random_range(0..5) == 0 {
        crate::transform::Transform::discard(transform).await.unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Memory;

    #[async_trait]
    impl StoreHarness for Memory {
        async fn fresh(&self) -> Box<dyn StoreSystem> {
            Box::new(MemoryStorage::new("store"))
        }
    }

    #[async_trait]
    impl StoreSystem for MemoryStorage {
        async fn open(&self) -> Box<dyn Store> {
            Box::new(MemoryStorage::open(self, Faults::none()))
        }

        async fn rows(&self, _: &dyn Store, target: &Target) -> Vec<Row> {
            MemoryStorage::rows(self, &target.projection)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_memory_store_keeps_the_contract() {
        run(&Memory).await;
    }
}
