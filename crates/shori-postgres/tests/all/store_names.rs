//! Targets that are called what the store's own statements call something else: they hold what others do.

use shori_core::position::Position;
use shori_core::projection::Target;
use shori_core::store::{OutputKind, OutputRows, Store};
use shori_postgres::PostgresStore;

use crate::store_output::*;
use crate::stored::*;

/// Aliases, tables and words of such statements.
const NAMES: [&str; 12] = [
    "e",
    "excluded",
    "l",
    "n",
    "o",
    "public",
    "shori_closes",
    "shori_deletes",
    "shori_ended",
    "shori_upserts",
    "shori_versions",
    "t",
];

async fn commit_rows(store: &PostgresStore, name: &str) {
    let target = Target { projection: name.into(), ..rows_target() };
    store.prepare_target(&target).await.unwrap();
    let key = |minute: i64| ((minute > 0).then_some(minute), "s".to_string());
    let rows = |minutes: std::ops::Range<i64>, amount: i64| -> Rows {
        minutes.map(|minute| (key(minute), Some(amount + minute))).collect()
    };
    let upsert = |rows: Rows| OutputRows::Upsert(upserts(&rows));
    let outputs = [
        (OutputKind::Merge, vec![upsert(rows(0..8, 0))]),
        (OutputKind::Merge, vec![upsert(rows(0..3, 10)), OutputRows::Delete(deletes(&[key(4), key(5)]))]),
        (OutputKind::Merge, vec![upsert(rows(1..4, 20)), OutputRows::Delete(deletes(&[key(0)]))]),
        (OutputKind::Replace, vec![upsert(rows(0..7, 15))]),
        (OutputKind::Replace, vec![upsert(rows(0..6, 16))]),
    ];
    for (step, (kind, parts)) in (1..).zip(outputs) {
        let outcome = commit(store, &target, (step - 1, step), kind, parts, Position::ZERO).await;
        outcome.unwrap_or_else(|error| panic!("{name} step {step} {kind:?}: {error}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_target_of_any_name_are_those_of_another() {
    let Stored { store, client, .. } = Stored::fresh().await;
    commit_rows(&store, "proj_kpi").await;
    let expected = stored_rows(&client).await;
    assert_eq!(expected.len(), 6);
    for name in NAMES {
        commit_rows(&store, name).await;
        assert_eq!(rows_in(&client, name).await, expected, "{name}");
    }
}

async fn commit_versions(store: &PostgresStore, name: &str) {
    let target = Target { projection: name.into(), ..versions_target() };
    store.prepare_target(&target).await.unwrap();
    let opened = |ids: std::ops::Range<i64>, lsn: u64| -> Vec<Version> {
        let version = |id| Version { id, lsn, from: lsn as i64, to: None, text: format!("{lsn}") };
        ids.map(version).collect()
    };
    let first = [opened(0..4, 10), opened(6..9, 11)].concat();
    let closed = OutputRows::Close(closes(&[(0, 20), (1, 20), (7, 20)]));
    let outputs = [
        (OutputKind::Versions, vec![OutputRows::Version(version_rows(&first))]),
        (OutputKind::Versions, vec![closed, OutputRows::Version(version_rows(&opened(0..2, 20)))]),
        // Those that stand open and do not come are ended.
        (OutputKind::ReplaceVersions, vec![OutputRows::Version(version_rows(&opened(1..3, 30)))]),
    ];
    for (step, (kind, parts)) in (1..).zip(outputs) {
        let outcome = commit(store, &target, (step - 1, step), kind, parts, at(25, 0)).await;
        outcome.unwrap_or_else(|error| panic!("{name} step {step} {kind:?}: {error}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_of_a_target_of_any_name_are_those_of_another() {
    let Stored { store, client, .. } = Stored::fresh().await;
    commit_versions(&store, "dim_orders_history").await;
    let (expected, surrogates) = stored_versions(&client).await;
    assert_eq!(expected.iter().filter(|version| version.to.is_none()).count(), 2);
    for name in NAMES {
        commit_versions(&store, name).await;
        assert_eq!(versions_in(&client, name).await, (expected.clone(), surrogates.clone()), "{name}");
    }
}
