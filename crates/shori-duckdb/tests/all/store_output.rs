//! Outputs of every kind against a model of the target.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, BooleanArray, Int64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, TimeUnit, TimestampMicrosecondType};
use async_trait::async_trait;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use shori_core::position::{Position, Positions};
use shori_core::projection::{Target, TargetShape, history};
use shori_core::store::{Committed, OutputCommit, OutputKind, OutputReader, OutputRows, Store};
use shori_core::{Error, ErrorKind};
use shori_duckdb::store::DuckdbStore;

use crate::store::*;

struct Parts {
    kind: OutputKind,
    parts: std::vec::IntoIter<OutputRows>,
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

    async fn next(&mut self) -> shori_core::Result<Option<OutputRows>> {
        match self.parts.next() {
            None if self.fails => Err(Error::new(ErrorKind::Unavailable, "compute", "rows", "the test says so")),
            next => Ok(next),
        }
    }
}

pub fn positions(step: u64) -> Positions {
    Positions::from([(id("orders"), at(step, 0))])
}

pub async fn commit(
    store: &DuckdbStore,
    target: &Target,
    steps: (u64, u64),
    kind: OutputKind,
    parts: Vec<OutputRows>,
    horizon: Position,
) -> shori_core::Result<Committed> {
    commit_reader(store, target, steps, &mut Parts { kind, parts: parts.into_iter(), fails: false }, horizon).await
}

async fn commit_reader(
    store: &DuckdbStore,
    target: &Target,
    steps: (u64, u64),
    reader: &mut Parts,
    horizon: Position,
) -> shori_core::Result<Committed> {
    let expected = (steps.0 > 0).then(|| positions(steps.0));
    let commit = OutputCommit {
        target,
        expected: expected.as_ref(),
        checkpoint: &positions(steps.1),
        as_of_lsn: Some(at(steps.1, 0).lsn),
        as_of_time: steps.1 as i64,
        horizon,
        complete: true,
        run_id: "run",
        output: reader,
    };
    store.commit_output(commit).await
}

pub fn rows_target() -> Target {
    let fields = vec![
        Field::new("minute", DataType::Int64, true),
        Field::new("segment", DataType::Utf8, false),
        Field::new("amount", DataType::Int64, true),
    ];
    Target {
        projection: "proj_kpi".into(),
        shape: TargetShape::Rows,
        key: vec!["minute".into(), "segment".into()],
        columns: Arc::new(Schema::new(fields)),
        definition: String::new(),
        keeps_tombstones: false,
        captures: vec![id("orders")],
    }
}

pub type Key = (Option<i64>, String);
pub type Rows = BTreeMap<Key, Option<i64>>;

pub fn upserts(rows: &Rows) -> RecordBatch {
    let columns: Vec<ArrayRef> = vec![
        Arc::new(rows.keys().map(|key| key.0).collect::<Int64Array>()),
        Arc::new(rows.keys().map(|key| Some(key.1.clone())).collect::<StringArray>()),
        Arc::new(rows.values().copied().collect::<Int64Array>()),
    ];
    RecordBatch::try_new(rows_target().columns, columns).unwrap()
}

pub fn deletes(keys: &[Key]) -> RecordBatch {
    let schema = rows_target().columns.project(&[0, 1]).unwrap();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(keys.iter().map(|key| key.0).collect::<Int64Array>()),
        Arc::new(keys.iter().map(|key| Some(key.1.clone())).collect::<StringArray>()),
    ];
    RecordBatch::try_new(Arc::new(schema), columns).unwrap()
}

pub async fn stored_rows(store: &DuckdbStore) -> Vec<(Key, Option<i64>)> {
    rows_in(store, "proj_kpi").await
}

pub async fn rows_in(store: &DuckdbStore, table: &str) -> Vec<(Key, Option<i64>)> {
    let mut rows = Vec::new();
    for batch in store.query(&format!("select minute, segment, amount from serving.main.\"{table}\"")).await.unwrap() {
        let number = |column: usize, row: usize| {
            let array = batch.column(column).as_primitive::<Int64Type>();
            array.is_valid(row).then(|| array.value(row))
        };
        for row in 0..batch.num_rows() {
            let segment = batch.column(1).as_string::<i32>().value(row).to_string();
            rows.push(((number(0, row), segment), number(2, row)));
        }
    }
    rows.sort();
    rows
}

#[tokio::test]
async fn merges_and_replacements_leave_what_a_map_would_hold() {
    for seed in 0..6 {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        store.bootstrap().await.unwrap();
        store.prepare_target(&rows_target()).await.unwrap();
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut model = Rows::new();
        for step in 1..15 {
            let key = |random: &mut ChaCha8Rng| {
                let minute = random.random_range(0..8);
                ((minute > 0).then_some(minute), format!("s{}", random.random_range(0..3)))
            };
            let mut next = Rows::new();
            for _ in 0..random.random_range(0..10) {
                let amount = random.random_range(0..3);
                next.insert(key(&mut random), (amount > 0).then_some(amount));
            }
            let mut parts = Vec::new();
            let kind = if random.random_bool(0.3) {
                model = next.clone();
                OutputKind::Replace
            } else {
                let keys: Vec<Key> = (0..random.random_range(0..5)).map(|_| key(&mut random)).collect();
                let keys: Vec<Key> = keys.into_iter().filter(|key| !next.contains_key(key)).collect();
                model.retain(|key, _| !keys.contains(key));
                model.extend(next.clone());
                parts.push(OutputRows::Delete(deletes(&keys)));
                OutputKind::Merge
            };
            parts.push(OutputRows::Upsert(upserts(&next)));
            let outcome = commit(&store, &rows_target(), (step - 1, step), kind, parts, Position::ZERO).await.unwrap();
            assert!(matches!(outcome, Committed::Applied { .. }), "seed {seed}: {outcome:?}");
            let expected: Vec<_> = model.clone().into_iter().collect();
            assert_eq!(stored_rows(&store).await, expected, "seed {seed} step {step} {kind:?}");
        }
    }
}

#[tokio::test]
async fn contract4_rows_checkpoint_and_metadata_are_one() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store.bootstrap().await.unwrap();
    let target = rows_target();
    store.prepare_target(&target).await.unwrap();
    store.prepare_target(&target).await.unwrap();
    assert_eq!(store.checkpoint("proj_kpi").await.unwrap(), None);
    let part = |amount| vec![OutputRows::Upsert(upserts(&Rows::from([((Some(1), "a".into()), Some(amount))])))];
    let zero = Position::ZERO;
    let applied = commit(&store, &target, (0, 1), OutputKind::Merge, part(1), zero).await.unwrap();
    assert_eq!(applied, Committed::Applied { rows: 1 });
    let again = commit(&store, &target, (0, 1), OutputKind::Merge, part(2), zero).await.unwrap();
    assert_eq!(again, Committed::AlreadyApplied);
    let stale = commit(&store, &target, (0, 2), OutputKind::Merge, part(3), zero).await.unwrap();
    assert_eq!(stale, Committed::Conflict);
    let mut failing = Parts { kind: OutputKind::Merge, parts: part(4).into_iter(), fails: true };
    commit_reader(&store, &target, (1, 2), &mut failing, zero).await.unwrap_err();
    assert_eq!(stored_rows(&store).await, [((Some(1), "a".into()), Some(1))]);
    let checkpoint = store.checkpoint("proj_kpi").await.unwrap().unwrap();
    assert_eq!((checkpoint.positions, checkpoint.as_of_time), (positions(1), 1));
    store.record_error("proj_kpi", Some("no such column")).await.unwrap();
    let status = store.projection_statuses().await.unwrap().remove(0);
    assert_eq!((status.status.as_str(), status.last_error.as_deref()), ("ERROR", Some("no such column")));
    store.record_error("proj_kpi", None).await.unwrap();
    let status = store.projection_statuses().await.unwrap().remove(0);
    assert_eq!((status.status.as_str(), status.last_error, status.as_of_lsn), ("OK", None, Some(at(1, 0).lsn)));
    store.record_error("proj_kpi", Some("no such column")).await.unwrap();
    commit(&store, &target, (1, 2), OutputKind::Merge, part(5), zero).await.unwrap();
    let status = store.projection_statuses().await.unwrap().remove(0);
    assert_eq!((status.status.as_str(), status.last_error, status.as_of_lsn), ("OK", None, Some(at(2, 0).lsn)));
    store.reset_projection("proj_kpi").await.unwrap();
    assert_eq!(store.checkpoint("proj_kpi").await.unwrap(), None);
    assert_eq!(stored_rows(&store).await.len(), 1, "rows stay until the next output replaces them");
}

#[tokio::test]
async fn contract6_of_two_outputs_of_one_step_one_is_applied() {
    let directory = tempfile::tempdir().unwrap();
    let database = database(directory.path());
    let path = directory.path().join("serving.duckdb");
    let one = DuckdbStore::open(&database, &path, "serving").unwrap();
    let other = DuckdbStore::open(&database, &path, "serving").unwrap();
    one.bootstrap().await.unwrap();
    let target = rows_target();
    one.prepare_target(&target).await.unwrap();
    let part = |amount| vec![OutputRows::Upsert(upserts(&Rows::from([((Some(1), "a".into()), Some(amount))])))];
    let zero = Position::ZERO;
    for step in 1..20 {
        let (first, second) = tokio::join!(
            commit(&one, &target, (step - 1, step), OutputKind::Merge, part(1), zero),
            commit(&other, &target, (step - 1, step), OutputKind::Merge, part(1), zero),
        );
        let applied = [&first, &second].into_iter().filter(|end| matches!(end, Ok(Committed::Applied { .. }))).count();
        assert_eq!(applied, 1, "{first:?} {second:?}");
        for end in [first, second] {
            match end {
                Ok(end) => assert_ne!(end, Committed::Conflict),
                Err(error) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}"),
            }
        }
    }
    assert_eq!(stored_rows(&one).await.len(), 1);
}

#[tokio::test]
async fn rows_of_another_shape_are_made_anew_and_versions_are_kept() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store.bootstrap().await.unwrap();
    let (rows, zero) = (rows_target(), Position::ZERO);
    store.prepare_target(&rows).await.unwrap();
    let part = vec![OutputRows::Upsert(upserts(&Rows::from([((Some(1), "a".into()), Some(1))])))];
    commit(&store, &rows, (0, 1), OutputKind::Merge, part, zero).await.unwrap();
    let mut fields: Vec<Field> = rows.columns.fields().iter().map(|field| field.as_ref().clone()).collect();
    fields[2] = Field::new("amount", DataType::Decimal128(18, 2), true);
    let retyped = Target { columns: Arc::new(Schema::new(fields)), ..rows_target() };
    for other in [Target { key: vec!["minute".into()], ..rows_target() }, rows_target(), retyped] {
        store.prepare_target(&other).await.unwrap();
        assert_eq!(store.checkpoint("proj_kpi").await.unwrap(), None);
        let status = store.projection_statuses().await.unwrap().remove(0);
        assert_eq!((status.status.as_str(), stored_rows(&store).await.len()), ("INIT", 0));
    }
    let versions = versions_target();
    store.prepare_target(&versions).await.unwrap();
    let other = Target { key: vec!["text".into()], ..versions_target() };
    assert_eq!(store.prepare_target(&other).await.unwrap_err().kind(), ErrorKind::Schema);
}

#[tokio::test]
async fn a_target_of_another_shape_is_refused_and_a_new_column_added() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store.bootstrap().await.unwrap();
    store.prepare_target(&rows_target()).await.unwrap();
    let refused = |target: Target| {
        let store = &store;
        async move { assert_eq!(store.prepare_target(&target).await.unwrap_err().kind(), ErrorKind::Schema) }
    };
    refused(Target { shape: TargetShape::Versions, ..rows_target() }).await;
    let mut fields: Vec<Field> = rows_target().columns.fields().iter().map(|field| field.as_ref().clone()).collect();
    fields.push(Field::new("paid", DataType::Decimal128(18, 2), true));
    fields.push(Field::new("seen", DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())), true));
    let wider = Target { columns: Arc::new(Schema::new(fields)), ..rows_target() };
    store.prepare_target(&wider).await.unwrap();
    store.prepare_target(&wider).await.unwrap();
    let usage = store.prepare_target(&Target { projection: "ctl_store".into(), ..rows_target() }).await.unwrap_err();
    assert_eq!(usage.kind(), ErrorKind::Usage);
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub id: i64,
    pub lsn: u64,
    pub from: i64,
    pub to: Option<i64>,
    pub text: String,
}

pub fn versions_target() -> Target {
    let mut fields = vec![
        Field::new("order_key", DataType::Int64, false),
        Field::new("text", DataType::Utf8, true),
        Field::new("created_at", DataType::Int64, true),
    ];
    fields.extend(history::fields());
    Target {
        projection: "dim_orders_history".into(),
        shape: TargetShape::Versions,
        key: vec!["order_key".into()],
        columns: Arc::new(Schema::new(fields)),
        definition: String::new(),
        keeps_tombstones: false,
        captures: vec![id("orders")],
    }
}

pub fn version_rows(versions: &[Version]) -> RecordBatch {
    let times = |time: &dyn Fn(&Version) -> Option<i64>| -> ArrayRef {
        Arc::new(versions.iter().map(time).collect::<TimestampMicrosecondArray>())
    };
    let columns: Vec<ArrayRef> = vec![
        Arc::new(versions.iter().map(|version| Some(version.id)).collect::<Int64Array>()),
        Arc::new(versions.iter().map(|version| Some(version.text.clone())).collect::<StringArray>()),
        Arc::new(Int64Array::new_null(versions.len())),
        times(&|version| Some(version.from)),
        times(&|version| version.to),
        Arc::new(versions.iter().map(|version| Some(version.to.is_none())).collect::<BooleanArray>()),
        Arc::new(versions.iter().map(|_| Some("INSERT")).collect::<StringArray>()),
        times(&|version| Some(version.from)),
        Arc::new(BinaryArray::from_iter_values(versions.iter().map(|version| version.lsn.to_be_bytes()))),
    ];
    RecordBatch::try_new(versions_target().columns, columns).unwrap()
}

pub fn closes(closes: &[(i64, i64)]) -> RecordBatch {
    let fields = vec![
        Field::new("order_key", DataType::Int64, false),
        Field::new("valid_to", DataType::Timestamp(TimeUnit::Microsecond, None), false),
    ];
    let columns: Vec<ArrayRef> = vec![
        Arc::new(closes.iter().map(|close| Some(close.0)).collect::<Int64Array>()),
        Arc::new(closes.iter().map(|close| Some(close.1)).collect::<TimestampMicrosecondArray>()),
    ];
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap()
}

/// All versions, and by (key, commit) their surrogate keys.
pub async fn stored_versions(store: &DuckdbStore) -> (Vec<Version>, BTreeMap<(i64, u64), i64>) {
    versions_in(store, "dim_orders_history").await
}

pub async fn versions_in(store: &DuckdbStore, table: &str) -> (Vec<Version>, BTreeMap<(i64, u64), i64>) {
    let (mut versions, mut surrogates) = (Vec::new(), BTreeMap::new());
    let sql = format!(
        "select surrogate_key, order_key, text, valid_from, valid_to, is_current, __source_lsn \
         from serving.main.\"{table}\""
    );
    for batch in store.query(&sql).await.unwrap() {
        let number = |column: usize, row: usize| batch.column(column).as_primitive::<Int64Type>().value(row);
        for row in 0..batch.num_rows() {
            let time = |column: usize| {
                let array = batch.column(column).as_primitive::<TimestampMicrosecondType>();
                array.is_valid(row).then(|| array.value(row))
            };
            let lsn = batch.column(6).as_binary::<i32>().value(row).try_into().map(u64::from_be_bytes).unwrap();
            let text = batch.column(2).as_string::<i32>().value(row).to_string();
            assert_eq!(batch.column(5).as_boolean().value(row), time(4).is_none());
            let version = Version { id: number(1, row), lsn, from: time(3).unwrap(), to: time(4), text };
            let taken = surrogates.insert((version.id, version.lsn), number(0, row));
            assert_eq!(taken, None, "two versions of one commit");
            versions.push(version);
        }
    }
    versions.sort();
    let distinct: std::collections::BTreeSet<_> = surrogates.values().collect();
    assert_eq!(distinct.len(), surrogates.len(), "surrogate keys are unique");
    (versions, surrogates)
}

#[tokio::test]
async fn spec4_16_versions_load_close_and_are_replaced_above_the_horizon() {
    for seed in 0..6 {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        store.bootstrap().await.unwrap();
        let target = versions_target();
        store.prepare_target(&target).await.unwrap();
        store.prepare_target(&target).await.unwrap();
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        // Many keys: some of those that close lie far from the target's end.
        let (keys, changes) = if seed % 2 == 0 { (6, 12) } else { (60, 60) };
        let mut model: Vec<Version> = Vec::new();
        let mut clock = 0i64;
        for step in 1..10u64 {
            let mut fresh: Vec<Version> = Vec::new();
            let mut closed: BTreeMap<i64, i64> = BTreeMap::new();
            for _ in 0..random.random_range(0..changes) {
                clock += 1;
                let key = random.random_range(0..keys);
                let open =
                    fresh.iter_mut().chain(model.iter_mut()).find(|version| version.id == key && version.to.is_none());
                let is_old = open.as_ref().is_some_and(|version| version.lsn / 100 < step);
                if let Some(open) = open {
                    open.to = Some(clock);
                }
                if is_old || random.random_bool(0.1) {
                    closed.entry(key).or_insert(clock);
                }
                if random.random_bool(0.8) {
                    let lsn = step * 100 + clock as u64 % 100;
                    fresh.push(Version { id: key, lsn, from: clock, to: None, text: format!("{clock}") });
                }
            }
            let closed: Vec<_> = closed.into_iter().collect();
            let mut parts = vec![OutputRows::Version(version_rows(&fresh)), OutputRows::Close(closes(&closed))];
            if random.random_bool(0.5) {
                parts.reverse();
            }
            model.extend(fresh);
            let zero = Position::ZERO;
            commit(&store, &target, (step - 1, step), OutputKind::Versions, parts, zero).await.unwrap();
            model.sort();
            assert_eq!(stored_versions(&store).await.0, model, "seed {seed} step {step}");
        }
        replace_above_horizon(&store, &target, model, seed).await;
    }
}

async fn replace_above_horizon(store: &DuckdbStore, target: &Target, mut model: Vec<Version>, seed: u64) {
    let (_, before) = stored_versions(store).await;
    let horizon = at(550, 9);
    store.reset_projection(&target.projection).await.unwrap();
    // What a rebuild gives: the version that stands at the horizon, those after it with some gone and some new.
    let gone = model.iter().filter(|version| version.lsn > 550).map(|version| version.lsn).min();
    model.retain(|version| Some(version.lsn) != gone);
    let standing = |version: &&mut Version| version.lsn > 550 || version.to.is_none();
    // Even seeds take the time of the output, odd ones find that it lies before the version's own.
    let as_of = if seed.is_multiple_of(2) { 100_000 } else { 1 };
    let mut given: Vec<Version> = Vec::new();
    for version in model.iter_mut().filter(standing) {
        let is_older_and_open = version.lsn <= 550 && version.to.is_none();
        match version.id % 4 {
            // The log has forgotten it: deleted meanwhile, or changed.
            0 if is_older_and_open => version.to = Some(as_of.max(version.from + 1)),
            1 if is_older_and_open => {
                version.to = Some(5_555);
                given.push(Version { lsn: 550, from: 5_555, to: None, ..version.clone() });
            }
            2 if version.to.is_none() => {
                version.to = Some(9_999);
                given.push(version.clone());
                given.push(Version { lsn: 5_000, from: 9_999, to: None, ..version.clone() });
            }
            _ => given.push(version.clone()),
        }
    }
    let is_new = |version: &&Version| [5_555, 9_999].contains(&version.from);
    model.extend(given.iter().filter(is_new).cloned());
    model.sort();
    let parts = vec![OutputRows::Version(version_rows(&given))];
    commit(store, target, (0, as_of as u64), OutputKind::ReplaceVersions, parts, horizon).await.unwrap();
    let (stored, after) = stored_versions(store).await;
    assert_eq!(stored, model, "seed {seed}");
    for (version, surrogate) in &before {
        assert!(after.get(version).is_none_or(|kept| kept == surrogate), "seed {seed}: a kept version keeps its row");
    }
    let newest = before.values().max().copied().unwrap_or(0);
    for (version, surrogate) in &after {
        assert!(before.contains_key(version) || *surrogate > newest, "seed {seed}");
    }
}
