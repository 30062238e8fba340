//! Large targets in layers: what a reader sees is what one table would hold. Tests have bounds of a few rows.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arrow::array::AsArray;
use arrow::datatypes::{DataType, Field, Int64Type, Schema};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use shori_core::failpoint;
use shori_core::position::Position;
use shori_core::projection::Target;
use shori_core::store::{Committed, OutputKind, OutputRows, Store};
use shori_duckdb::store::DuckdbStore;

use crate::store::*;
use crate::store_output::*;

/// Whether the target is a view just now.
pub async fn is_layered(store: &DuckdbStore, target: &Target) -> bool {
    number(store, &format!("select count(*) from duckdb_views() where view_name = '{}'", target.projection)).await > 0
}

async fn number(store: &DuckdbStore, sql: &str) -> i64 {
    let answer = store.query(sql).await.unwrap();
    let column = arrow::compute::cast(answer[0].column(0), &DataType::Int64).unwrap();
    column.as_primitive::<Int64Type>().value(0)
}

/// A random merge, and what stands after it.
pub fn merge(random: &mut ChaCha8Rng, model: &mut Rows) -> Vec<OutputRows> {
    let key = |random: &mut ChaCha8Rng| {
        let minute = random.random_range(0..9);
        ((minute > 0).then_some(minute), format!("s{}", random.random_range(0..4)))
    };
    let upserted: Rows =
        (0..random.random_range(0..8)).map(|_| (key(random), Some(random.random_range(0..1_000)))).collect();
    let gone: Vec<Key> = (0..random.random_range(0..4)).map(|_| key(random)).collect();
    let mut gone: Vec<Key> = gone.into_iter().filter(|key| !upserted.contains_key(key)).collect();
    gone.sort();
    gone.dedup();
    model.retain(|key, _| !gone.contains(key));
    model.extend(upserted.clone());
    vec![OutputRows::Upsert(upserts(&upserted)), OutputRows::Delete(deletes(&gone))]
}

pub fn replacement(random: &mut ChaCha8Rng, model: &mut Rows) -> Vec<OutputRows> {
    model.retain(|_, _| random.random_bool(0.8));
    model.values_mut().for_each(|amount| *amount = amount.map(|amount| amount / 2));
    vec![OutputRows::Upsert(upserts(model))]
}

/// The same target with one column more.
fn widened(target: &Target, column: &str) -> Target {
    let mut fields: Vec<Field> = target.columns.fields().iter().map(|field| field.as_ref().clone()).collect();
    fields.push(Field::new(column, DataType::Int64, true));
    Target { columns: Arc::new(Schema::new(fields)), ..target.clone() }
}

#[tokio::test]
async fn rows_in_layers_are_what_a_map_holds() {
    let mut layered = 0;
    for seed in 0..8 {
        let directory = tempfile::tempdir().unwrap();
        let mut store = open(directory.path());
        store.bootstrap().await.unwrap();
        let target = rows_target();
        let mut prepared = target.clone();
        store.prepare_target(&target).await.unwrap();
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut model = Rows::new();
        for step in 1..40 {
            let is_replacement = random.random_bool(0.05);
            let (kind, parts) = match is_replacement {
                true => (OutputKind::Replace, replacement(&mut random, &mut model)),
                false => (OutputKind::Merge, merge(&mut random, &mut model)),
            };
            let outcome = commit(&store, &target, (step - 1, step), kind, parts, Position::ZERO).await.unwrap();
            assert!(matches!(outcome, Committed::Applied { .. }), "seed {seed}: {outcome:?}");
            if random.random_bool(0.1) {
                drop(store);
                store = open(directory.path());
                store.bootstrap().await.unwrap();
                store.prepare_target(&prepared).await.unwrap();
            }
            if random.random_bool(0.05) {
                prepared = widened(&prepared, &format!("added_{step}"));
                store.prepare_target(&prepared).await.unwrap();
                assert!(!is_layered(&store, &target).await, "a column is added to one table");
            }
            let expected: Vec<_> = model.clone().into_iter().collect();
            assert_eq!(stored_rows(&store).await, expected, "seed {seed} step {step} {kind:?}");
            layered += usize::from(is_layered(&store, &target).await);
        }
        let checkpoint = store.checkpoint(&target.projection).await.unwrap().unwrap();
        assert_eq!(checkpoint.positions, positions(39));
    }
    assert!(layered > 100, "only {layered} of 312 steps ended in layers");
}

/// A random output of versions, and what stands after it.
pub fn versions(random: &mut ChaCha8Rng, model: &mut Vec<Version>, step: u64, keys: i64) -> Vec<OutputRows> {
    let (mut fresh, mut closed): (Vec<Version>, BTreeMap<i64, i64>) = Default::default();
    for change in 0..random.random_range(0..8) {
        let (key, clock) = (random.random_range(0..keys), (step * 100 + change) as i64);
        let open = fresh.iter_mut().find(|version| version.id == key && version.to.is_none());
        if let Some(open) = open {
            open.to = Some(clock);
        } else {
            let old = model.iter_mut().find(|version| version.id == key && version.to.is_none());
            // A key without an open version may be closed as well.
            if old.is_some() || random.random_bool(0.2) {
                closed.entry(key).or_insert(clock);
            }
            if let Some(old) = old {
                old.to = Some(clock);
            }
        }
        if random.random_bool(0.8) {
            fresh.push(Version { id: key, lsn: clock as u64, from: clock, to: None, text: format!("{clock}") });
        }
    }
    let closed: Vec<_> = closed.into_iter().collect();
    let mut parts = vec![OutputRows::Close(closes(&closed)), OutputRows::Version(version_rows(&fresh))];
    if random.random_bool(0.5) {
        parts.reverse();
    }
    model.extend(fresh);
    model.sort();
    parts
}

#[tokio::test]
async fn versions_in_layers_are_what_a_list_holds() {
    let mut layered = 0;
    for seed in 0..8 {
        let directory = tempfile::tempdir().unwrap();
        let mut store = open(directory.path());
        store.bootstrap().await.unwrap();
        let target = versions_target();
        let mut prepared = target.clone();
        store.prepare_target(&target).await.unwrap();
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut model = Vec::new();
        for step in 1..40 {
            let (kind, parts) = if random.random_bool(0.05) {
                // All versions, as a history made anew gives them.
                (OutputKind::ReplaceVersions, vec![OutputRows::Version(version_rows(&model))])
            } else {
                let keys = if seed % 2 == 0 { 6 } else { 30 };
                (OutputKind::Versions, versions(&mut random, &mut model, step, keys))
            };
            let outcome = commit(&store, &target, (step - 1, step), kind, parts, Position::ZERO).await.unwrap();
            assert!(matches!(outcome, Committed::Applied { .. }), "seed {seed}: {outcome:?}");
            if random.random_bool(0.1) {
                drop(store);
                store = open(directory.path());
                store.bootstrap().await.unwrap();
                store.prepare_target(&prepared).await.unwrap();
            }
            if random.random_bool(0.05) {
                prepared = widened(&prepared, &format!("added_{step}"));
                store.prepare_target(&prepared).await.unwrap();
            }
            assert_eq!(stored_versions(&store).await.0, model, "seed {seed} step {step} {kind:?}");
            layered += usize::from(is_layered(&store, &target).await);
        }
        let closed_late = "select count(*) from dim_orders_history where updated_at < created_at";
        assert_eq!(number(&store, closed_late).await, 0);
    }
    assert!(layered > 100, "only {layered} of 312 steps ended in layers");
}

/// Folds that the process below dies in.
static FOLDS_LEFT: AtomicU64 = AtomicU64::new(0);

fn die_in_a_fold(place: &'static str) {
    if place == failpoint::STORE_INSIDE_FOLD && FOLDS_LEFT.fetch_sub(1, Ordering::SeqCst) == 1 {
        std::process::abort();
    }
}

const CRASH_STEPS: u64 = 60;

/// Commits to both kinds of targets from where their checkpoints are; the same in every process.
async fn commit_from(directory: &Path, seed: u64, until: u64) -> (Rows, Vec<Version>) {
    let store = open(directory);
    store.bootstrap().await.unwrap();
    let (rows, history) = (rows_target(), versions_target());
    store.prepare_target(&rows).await.unwrap();
    store.prepare_target(&history).await.unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let (mut row_model, mut version_model) = (Rows::new(), Vec::new());
    for step in 1..=until {
        let merged = merge(&mut random, &mut row_model);
        let versioned = versions(&mut random, &mut version_model, step, 12);
        for (target, kind, parts) in [(&rows, OutputKind::Merge, merged), (&history, OutputKind::Versions, versioned)] {
            let checkpoint = store.checkpoint(&target.projection).await.unwrap();
            let stands_behind = checkpoint.is_none_or(|checkpoint| checkpoint.positions < positions(step));
            if stands_behind {
                let outcome = commit(&store, target, (step - 1, step), kind, parts, Position::ZERO).await.unwrap();
                assert!(matches!(outcome, Committed::Applied { .. }), "seed {seed} step {step}: {outcome:?}");
            }
        }
    }
    assert_eq!(stored_rows(&store).await, row_model.clone().into_iter().collect::<Vec<_>>(), "seed {seed}");
    assert_eq!(stored_versions(&store).await.0, version_model, "seed {seed}");
    (row_model, version_model)
}

/// Not a test of its own: the process that dies in the test below.
#[tokio::test]
#[ignore = "run by another test, as another process"]
async fn commit_and_die() {
    let Ok(directory) = std::env::var("SHORI_DIE") else { return };
    let variable = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap();
    FOLDS_LEFT.store(variable("SHORI_DIE_FOLD"), Ordering::SeqCst);
    failpoint::set_hook(die_in_a_fold);
    commit_from(Path::new(&directory), variable("SHORI_DIE_SEED"), CRASH_STEPS).await;
}

#[tokio::test]
async fn contract10_a_crash_inside_a_fold_loses_and_doubles_nothing() {
    for seed in 0..6u64 {
        let directory = tempfile::tempdir().unwrap();
        for fold in 1..4u64 {
            let ended = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "store_layers::commit_and_die", "--ignored"])
                .env("SHORI_DIE", directory.path())
                .env("SHORI_DIE_SEED", seed.to_string())
                .env("SHORI_DIE_FOLD", fold.to_string())
                .output()
                .unwrap();
            if fold == 1 {
                assert_eq!(ended.status.code(), None, "seed {seed}: {}", String::from_utf8_lossy(&ended.stdout));
            }
        }
        commit_from(directory.path(), seed, CRASH_STEPS + 5).await;
    }
}

/// Each merge moves an amount from one key to another: whoever reads sees the same sum, and every key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_sees_one_state_while_layers_are_folded() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(open(directory.path()));
    store.bootstrap().await.unwrap();
    let target = rows_target();
    store.prepare_target(&target).await.unwrap();
    let keys = 40i64;
    let mut model: Rows = (0..keys).map(|key| ((Some(key), "s".to_string()), Some(100))).collect();
    let first = vec![OutputRows::Upsert(upserts(&model))];
    commit(&store, &target, (0, 1), OutputKind::Merge, first, Position::ZERO).await.unwrap();
    let ended = Arc::new(AtomicBool::new(false));
    let (reader, ends) = (store.clone(), ended.clone());
    let read = tokio::spawn(async move {
        let mut answers = 0;
        while !ends.load(Ordering::Relaxed) {
            let sum = number(&reader, "select sum(amount) * 1000 + count(*) from proj_kpi").await;
            assert_eq!(sum, keys * 100 * 1000 + keys);
            answers += 1;
        }
        answers
    });
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for step in 2..150 {
        let mut moved = Rows::new();
        let (from, to) = (random.random_range(0..keys), random.random_range(0..keys - 1));
        let to = if to >= from { to + 1 } else { to };
        for (key, change) in [(from, -5), (to, 5)] {
            let key = (Some(key), "s".to_string());
            let amount = model[&key].map(|amount| amount + change);
            moved.insert(key, amount);
        }
        model.extend(moved.clone());
        let parts = vec![OutputRows::Upsert(upserts(&moved))];
        commit(&store, &target, (step - 1, step), OutputKind::Merge, parts, Position::ZERO).await.unwrap();
    }
    ended.store(true, Ordering::Relaxed);
    assert!(read.await.unwrap() > 0);
    assert_eq!(stored_rows(&store).await, model.into_iter().collect::<Vec<_>>());
}

/// A store with a layered target of rows, and its rows.
async fn layered_store(directory: &Path) -> (DuckdbStore, Vec<(Key, Option<i64>)>) {
    let store = open(directory);
    store.bootstrap().await.unwrap();
    let target = rows_target();
    store.prepare_target(&target).await.unwrap();
    let mut model = Rows::new();
    for step in 1..3u64 {
        let rows: Rows = (0..6).map(|key| ((Some(key), format!("s{step}")), Some(key))).collect();
        model.extend(rows.clone());
        let parts = vec![OutputRows::Upsert(upserts(&rows))];
        commit(&store, &target, (step - 1, step), OutputKind::Merge, parts, Position::ZERO).await.unwrap();
    }
    assert!(is_layered(&store, &target).await);
    let rows = stored_rows(&store).await;
    assert_eq!(rows, model.into_iter().collect::<Vec<_>>());
    (store, rows)
}

fn execute(directory: &Path, sql: &str) {
    let database = database(directory);
    database.attach(&directory.join("serving.duckdb"), "serving").unwrap();
    database.connect("serving").unwrap().execute_batch(sql).unwrap();
}

#[tokio::test]
async fn a_layered_target_that_somebody_dropped_is_made_anew() {
    for dropped in ["drop view proj_kpi", "drop table proj_kpi__base", "drop table proj_kpi__changes_b"] {
        let directory = tempfile::tempdir().unwrap();
        drop(layered_store(directory.path()).await);
        execute(directory.path(), dropped);
        let store = open(directory.path());
        store.bootstrap().await.unwrap();
        store.prepare_target(&rows_target()).await.unwrap();
        assert_eq!(store.checkpoint("proj_kpi").await.unwrap(), None, "{dropped}");
        assert_eq!(stored_rows(&store).await, []);
        let left = "select count(*) from duckdb_tables() where table_name like 'proj\\_kpi\\_\\_%' escape '\\'";
        assert_eq!(number(&store, left).await, 0, "{dropped}");
        let part = vec![OutputRows::Upsert(upserts(&Rows::from([((Some(1), "a".into()), Some(1))])))];
        commit(&store, &rows_target(), (0, 1), OutputKind::Merge, part, Position::ZERO).await.unwrap();
        assert_eq!(stored_rows(&store).await.len(), 1);
    }
}

#[tokio::test]
async fn a_layered_target_keeps_to_what_prepare_promises() {
    let directory = tempfile::tempdir().unwrap();
    let (store, rows) = layered_store(directory.path()).await;
    store.prepare_target(&rows_target()).await.unwrap();
    assert!(is_layered(&store, &rows_target()).await, "nothing is to be done");
    store.reset_projection("proj_kpi").await.unwrap();
    assert_eq!(stored_rows(&store).await, rows, "rows stay until the next output replaces them");
    let other = Target { definition: "another query".into(), ..rows_target() };
    store.prepare_target(&other).await.unwrap();
    assert_eq!(store.checkpoint("proj_kpi").await.unwrap(), None);
    assert_eq!(stored_rows(&store).await, rows);
    let shape = Target { projection: rows_target().projection, ..versions_target() };
    store.prepare_target(&shape).await.unwrap_err();
    let anew = Target { key: vec!["segment".into()], ..rows_target() };
    store.prepare_target(&anew).await.unwrap();
    assert_eq!(stored_rows(&store).await, []);
}

#[tokio::test]
async fn a_target_whose_layers_have_no_free_names_stays_one_table() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store.bootstrap().await.unwrap();
    drop(store);
    execute(directory.path(), "create table PROJ_KPI__CHANGES_A (note varchar)");
    let store = open(directory.path());
    store.prepare_target(&rows_target()).await.unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let mut model = Rows::new();
    for step in 1..12 {
        let parts = merge(&mut random, &mut model);
        commit(&store, &rows_target(), (step - 1, step), OutputKind::Merge, parts, Position::ZERO).await.unwrap();
        assert_eq!(stored_rows(&store).await, model.clone().into_iter().collect::<Vec<_>>());
    }
    assert!(!is_layered(&store, &rows_target()).await);
    let reserved = Target { projection: "orders__base".into(), ..rows_target() };
    assert_eq!(store.prepare_target(&reserved).await.unwrap_err().kind(), shori_core::ErrorKind::Usage);
}
