//! Outputs of every kind against a model of the target.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, BinaryArray, BooleanArray, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use arrow::datatypes::{DataType, Field, Schema, TimeUnit};
use async_trait::async_trait;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use shori_core::position::{Position, Positions};
use shori_core::projection::{Target, TargetShape, history};
use shori_core::store::{Committed, OutputCommit, OutputKind, OutputReader, OutputRows, Store};
use shori_core::{Error, ErrorKind};
use shori_postgres::PostgresStore;
use tokio_postgres::Client;

use crate::server::Server;
use crate::stored::*;

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
    store: &PostgresStore,
    target: &Target,
    steps: (u64, u64),
    kind: OutputKind,
    parts: Vec<OutputRows>,
    horizon: Position,
) -> shori_core::Result<Committed> {
    commit_reader(store, target, steps, &mut Parts { kind, parts: parts.into_iter(), fails: false }, horizon).await
}

async fn commit_reader(
    store: &PostgresStore,
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

pub async fn stored_rows(client: &Client) -> Vec<(Key, Option<i64>)> {
    rows_in(client, "proj_kpi").await
}

pub async fn rows_in(client: &Client, table: &str) -> Vec<(Key, Option<i64>)> {
    let sql = format!("select minute, segment, amount from public.\"{table}\"");
    let rows = client.query(&sql, &[]).await.unwrap();
    let mut rows: Vec<_> = rows.iter().map(|row| ((row.get(0), row.get(1)), row.get(2))).collect();
    rows.sort();
    rows
}

/// Status, last error and as_of_lsn of the only projection.
async fn status(client: &Client) -> (String, Option<String>, Option<Vec<u8>>) {
    let sql = "select status, last_error, as_of_lsn from ctl_projection_metadata where projection_name = 'proj_kpi'";
    let row = client.query_one(sql, &[]).await.unwrap();
    (row.get(0), row.get(1), row.get(2))
}

#[tokio::test(flavor = "multi_thread")]
async fn merges_and_replacements_leave_what_a_map_would_hold() {
    for seed in 0..6 {
        let Stored { store, client, .. } = Stored::fresh().await;
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
            assert_eq!(stored_rows(&client).await, expected, "seed {seed} step {step} {kind:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn contract4_rows_checkpoint_and_metadata_are_one() {
    let Stored { store, client, .. } = Stored::fresh().await;
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
    assert_eq!(stored_rows(&client).await, [((Some(1), "a".into()), Some(1))]);
    let checkpoint = store.checkpoint("proj_kpi").await.unwrap().unwrap();
    assert_eq!((checkpoint.positions, checkpoint.as_of_time), (positions(1), 1));
    store.record_error("proj_kpi", Some("no such column")).await.unwrap();
    let (shown, error, _) = status(&client).await;
    assert_eq!((shown.as_str(), error.as_deref()), ("ERROR", Some("no such column")));
    store.record_error("proj_kpi", None).await.unwrap();
    assert_eq!(status(&client).await, ("OK".into(), None, Some(at(1, 0).lsn.as_slice().to_vec())));
    store.record_error("proj_kpi", Some("no such column")).await.unwrap();
    commit(&store, &target, (1, 2), OutputKind::Merge, part(5), zero).await.unwrap();
    assert_eq!(status(&client).await, ("OK".into(), None, Some(at(2, 0).lsn.as_slice().to_vec())));
    store.reset_projection("proj_kpi").await.unwrap();
    assert_eq!(store.checkpoint("proj_kpi").await.unwrap(), None);
    assert_eq!(stored_rows(&client).await.len(), 1, "rows stay until the next output replaces them");
}

#[tokio::test(flavor = "multi_thread")]
async fn contract6_of_two_outputs_of_one_step_one_is_applied() {
    let Stored { store: one, client, database } = Stored::fresh().await;
    let other = open(Server::shared(), &database);
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
    assert_eq!(stored_rows(&client).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_another_shape_are_made_anew_and_versions_are_kept() {
    let Stored { store, client, .. } = Stored::fresh().await;
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
        assert_eq!((status(&client).await.0.as_str(), stored_rows(&client).await.len()), ("INIT", 0));
    }
    let versions = versions_target();
    store.prepare_target(&versions).await.unwrap();
    let other = Target { key: vec!["text".into()], ..versions_target() };
    assert_eq!(store.prepare_target(&other).await.unwrap_err().kind(), ErrorKind::Schema);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_of_another_shape_is_refused_and_a_new_column_added() {
    let Stored { store, .. } = Stored::fresh().await;
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
pub async fn stored_versions(client: &Client) -> (Vec<Version>, BTreeMap<(i64, u64), i64>) {
    versions_in(client, "dim_orders_history").await
}

pub async fn versions_in(client: &Client, table: &str) -> (Vec<Version>, BTreeMap<(i64, u64), i64>) {
    let (mut versions, mut surrogates) = (Vec::new(), BTreeMap::new());
    let sql = format!(
        "
        select surrogate_key, order_key, text, (extract(epoch from valid_from) * 1000000)::bigint,
            (extract(epoch from valid_to) * 1000000)::bigint, is_current, __source_lsn
        from public.\"{table}\""
    );
    for row in client.query(&sql, &[]).await.unwrap() {
        let lsn = u64::from_be_bytes(row.get::<_, Vec<u8>>(6).try_into().unwrap());
        let version = Version { id: row.get(1), lsn, from: row.get(3), to: row.get(4), text: row.get(2) };
        assert_eq!(row.get::<_, bool>(5), version.to.is_none());
        let taken = surrogates.insert((version.id, version.lsn), row.get(0));
        assert_eq!(taken, None, "two versions of one commit");
        versions.push(version);
    }
    versions.sort();
    let distinct: std::collections::BTreeSet<_> = surrogates.values().collect();
    assert_eq!(distinct.len(), surrogates.len(), "surrogate keys are unique");
    (versions, surrogates)
}

#[tokio::test(flavor = "multi_thread")]
async fn spec4_16_versions_load_close_and_are_replaced_above_the_horizon() {
    for seed in 0..6 {
        let Stored { store, client, .. } = Stored::fresh().await;
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
            let parts = vec![OutputRows::Close(closes(&closed)), OutputRows::Version(version_rows(&fresh))];
            model.extend(fresh);
            let zero = Position::ZERO;
            commit(&store, &target, (step - 1, step), OutputKind::Versions, parts, zero).await.unwrap();
            model.sort();
            assert_eq!(stored_versions(&client).await.0, model, "seed {seed} step {step}");
        }
        replace_above_horizon(&store, &client, &target, model, seed).await;
    }
}

async fn replace_above_horizon(
    store: &PostgresStore,
    client: &Client,
    target: &Target,
    mut model: Vec<Version>,
    seed: u64,
) {
    let (_, before) = stored_versions(client).await;
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
    let (stored, after) = stored_versions(client).await;
    assert_eq!(stored, model, "seed {seed}");
    for (version, surrogate) in &before {
        assert!(after.get(version).is_none_or(|kept| kept == surrogate), "seed {seed}: a kept version keeps its row");
    }
    let newest = before.values().max().copied().unwrap_or(0);
    for (version, surrogate) in &after {
        assert!(before.contains_key(version) || *surrogate > newest, "seed {seed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_a_view_depends_on_is_not_made_anew_and_the_error_says_so() {
    let Stored { store, client, .. } = Stored::fresh().await;
    store.prepare_target(&rows_target()).await.unwrap();
    client.batch_execute("create view report as select * from proj_kpi").await.unwrap();
    let other = Target { key: vec!["segment".into()], ..rows_target() };
    let refused = store.prepare_target(&other).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Schema, "{refused}");
    assert!(refused.to_string().contains("view report depends on table proj_kpi"), "{refused}");
    store.prepare_target(&rows_target()).await.unwrap();
    client.batch_execute("drop view report").await.unwrap();
    store.prepare_target(&other).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_not_a_projection_s_own_is_left_alone() {
    let Stored { store, client, .. } = Stored::fresh().await;
    client.batch_execute("create table proj_kpi (mine text); insert into proj_kpi values ('kept')").await.unwrap();
    assert_eq!(store.prepare_target(&rows_target()).await.unwrap_err().kind(), ErrorKind::Schema);
    store.record_error("proj_kpi", Some("refused")).await.unwrap();
    assert_eq!(store.prepare_target(&rows_target()).await.unwrap_err().kind(), ErrorKind::Schema);
    assert_eq!(client.query_one("select mine from proj_kpi", &[]).await.unwrap().get::<_, &str>(0), "kept");
    client.batch_execute("drop table proj_kpi").await.unwrap();
    store.prepare_target(&rows_target()).await.unwrap();
}
