//! What every [`Transform`] must do, checked on one given by a [`TransformHarness`].
//!
//! Most is checked by comparing: random transactions flow through a model source and store into the transform, and
//! after each step the targets must be what the oracle works out from the commit log.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::faults::{FaultPlan, Faults};
use super::hand_driven;
use super::memory_database::{MemoryDatabase, Write};
use super::memory_query::{KPI, ORDERS_WITH_SEGMENT, SUM_BY_GROUP};
use super::memory_source::{MemorySource, SourceHabits};
use super::memory_store::MemoryStorage;
use super::model_projections::{history, latest, model_projections, sums};
use super::oracle;
use super::transactions::{TransactionShape, commit_random, model_tables};
use super::value::{Value, row};
use crate::error::ErrorKind;
use crate::position::Positions;
use crate::projection::{Derivation, Projection};
use crate::source::BatchLimit;
use crate::store::{OutputReader, OutputRows, Store};
use crate::transform::{Computed, StateTable, Transform};

/// Makes empty transforms.
#[async_trait]
pub trait TransformHarness: Send + Sync {
    async fn fresh(&self) -> Box<dyn TransformSystem>;

    /// The query text for a name; the default is SQL (see [`sql_text`]).
    fn text(&self, name: &str) -> String {
        sql_text(name).into()
    }

    /// How many random runs are made.
    fn seeds(&self) -> u64 {
        10
    }
}

/// One place where a transform keeps its cache.
#[async_trait]
pub trait TransformSystem: Send + Sync {
    /// Opens what is durable; the one opened before has been dropped.
    async fn open(&self) -> Box<dyn Transform>;
}

/// The queries of the model, as SQL.
pub fn sql_text(name: &str) -> &'static str {
    match name {
        SUM_BY_GROUP => {
            "select coalesce(c.segment, 'UNKNOWN') as segment,
             count(*) as orders_count,
             cast(coalesce(sum(o.amount), 0) as decimal(38, 2)) as amount_sum
             from orders o
             left join customers c on c.customer_id = o.customer_id
             group by 1"
        }
        ORDERS_WITH_SEGMENT => {
            "select o.order_id, o.customer_id, c.segment, o.amount, o.__lsn as __source_lsn
             from orders o
             left join customers c on c.customer_id = o.customer_id"
        }
        KPI => {
            "with by_order as (
               select date_trunc('minute', coalesce(o.created_at, timestamp '1970-01-01')) as minute_bucket,
               coalesce(c.segment, 'UNKNOWN') as segment,
               count(*) as orders_count,
               coalesce(sum(o.amount), 0) as orders_amount_sum
               from orders o
               left join customers c on c.customer_id = o.customer_id
               group by 1, 2
             ), by_payment as (
               select date_trunc('minute', coalesce(p.paid_at, timestamp '1970-01-01')) as minute_bucket,
               coalesce(c.segment, 'UNKNOWN') as segment,
               count(*) as payments_count,
               coalesce(sum(p.paid_amount), 0) as paid_amount_sum
               from payments p
               join orders o on o.order_id = p.order_id
               left join customers c on c.customer_id = o.customer_id
               group by 1, 2
             )
             select coalesce(o.minute_bucket, p.minute_bucket) as minute_bucket,
             coalesce(o.segment, p.segment) as segment,
             coalesce(o.orders_count, 0) as orders_count,
             cast(coalesce(o.orders_amount_sum, 0) as decimal(38, 2)) as orders_amount_sum,
             cast(coalesce(p.paid_amount_sum, 0) as decimal(38, 2)) as paid_amount_sum,
             coalesce(o.orders_count, 0) + coalesce(p.payments_count, 0) as base_rows
             from by_order o
             full join by_payment p on p.minute_bucket = o.minute_bucket and p.segment = o.segment"
        }
        other => panic!("there is no query {other}"),
    }
}

pub async fn run(harness: &dyn TransformHarness) {
    let system = harness.fresh().await;
    a_cache_belongs_to_one_store(system.as_ref()).await;
    a_faulty_query_is_named(harness.fresh().await.as_ref()).await;
    computing_twice_gives_the_same(harness, harness.fresh().await.as_ref()).await;
    state_behind_a_checkpoint_is_told(harness, harness.fresh().await.as_ref()).await;
    forgotten_changes_are_told(harness, harness.fresh().await.as_ref()).await;
    a_crash_between_commit_and_settle_is_repaired(harness, harness.fresh().await.as_ref()).await;
    an_output_from_before_a_discard_is_not_taken_over(harness, harness.fresh().await.as_ref()).await;
    for seed in 0..harness.seeds() {
        random_run(harness, seed).await;
    }
}

/// The model's projections, in the harness's language.
fn spoken(harness: &dyn TransformHarness, mut projections: Vec<Projection>) -> Vec<Projection> {
    for projection in &mut projections {
        if let Derivation::Sql(sql) = &mut projection.derivation {
            sql.text = harness.text(&sql.text);
        }
    }
    projections
}

fn tables(database: &MemoryDatabase) -> Vec<StateTable> {
    let table = |schema: &Arc<_>| StateTable { capture: database.capture(table_name(schema)), schema: schema.clone() };
    database.tables().iter().map(table).collect()
}

fn table_name(schema: &crate::schema::TableSchema) -> &str {
    &schema.table
}

const LIMIT: BatchLimit = BatchLimit { rows: 100, bytes: 1 << 20 };

/// A shop with a customer and two orders, staged.
async fn shop() -> (MemoryDatabase, MemoryStorage) {
    let database = MemoryDatabase::new("shop", model_tables());
    let storage = MemoryStorage::new("store");
    storage.open(Faults::none()).bootstrap().await.unwrap();
    stage(&database, &storage).await;
    database.commit(1_000, &[customer(1, "a"), order(1, 1_000), order(2, 250)]);
    stage(&database, &storage).await;
    (database, storage)
}

fn customer(id: i64, segment: &str) -> Write {
    Write::Insert { table: "customers".into(), row: row([id.into(), segment.into(), Value::Time(1)]) }
}

fn order(id: i64, cents: i128) -> Write {
    let values = [id.into(), 1.into(), Value::Decimal(cents), "open".into(), Value::Time(60_000_000)];
    Write::Insert { table: "orders".into(), row: row(values) }
}

async fn stage(database: &MemoryDatabase, storage: &MemoryStorage) {
    let mut source = MemorySource::new(database, Faults::none(), SourceHabits::PLAIN);
    hand_driven::ingest(&mut source, &storage.open(Faults::none()), LIMIT).await.unwrap();
}

async fn a_cache_belongs_to_one_store(system: &dyn TransformSystem) {
    let (database, storage) = shop().await;
    let store = storage.open(Faults::none());
    let transform = system.open().await;
    transform.open("one", &tables(&database), &[]).await.unwrap();
    hand_driven::advance(&store, transform.as_ref(), None).await.unwrap();
    let applied = transform.applied().await.unwrap();
    assert_eq!(applied.len(), database.tables().len(), "binding: every capture has been applied");
    drop(transform);
    let transform = system.open().await;
    transform.open("one", &tables(&database), &[]).await.unwrap();
    assert_eq!(transform.applied().await.unwrap(), applied, "state: what advance returned from is durable");
    drop(transform);
    let transform = system.open().await;
    transform.open("another", &tables(&database), &[]).await.unwrap();
    assert!(transform.applied().await.unwrap().is_empty(), "binding: a cache of another store is discarded");
}

async fn a_faulty_query_is_named(system: &dyn TransformSystem) {
    let database = MemoryDatabase::new("shop", model_tables());
    let mut faulty = sums();
    if let Derivation::Sql(sql) = &mut faulty.derivation {
        sql.text = "select nonsense from nowhere".into();
    }
    let transform = system.open().await;
    // Some find it when it is opened, all when it is described.
    let error = match transform.open("store", &tables(&database), &[faulty]).await {
        Ok(()) => transform.describe("sums").await.expect_err("a faulty query has no columns"),
        Err(error) => error,
    };
    assert_eq!(error.kind(), ErrorKind::Projection, "{error}");
    assert!(error.to_string().contains("sums"), "the message names the query: {error}");
}

async fn output(transform: &dyn Transform, projection: &str, since: Option<&Positions>) -> (Positions, Vec<String>) {
    match transform.compute(projection, since).await.unwrap() {
        Computed::Output { positions, mut reader, .. } => (positions, parts(reader.as_mut()).await),
        other => panic!("{projection} has no output but is {}", name(&other)),
    }
}

async fn parts(reader: &mut dyn OutputReader) -> Vec<String> {
    let mut lines = vec![format!("{:?}", reader.kind())];
    while let Some(part) = reader.next().await.unwrap() {
        let (kind, rows) = match &part {
            OutputRows::Upsert(rows) => ("upsert", rows),
            OutputRows::Delete(rows) => ("delete", rows),
            OutputRows::Version(rows) => ("version", rows),
            OutputRows::Close(rows) => ("close", rows),
        };
        lines.extend(super::value::rows_of(rows).iter().map(|row| format!("{kind} {row:?}")));
    }
    lines[1..].sort();
    lines
}

fn name(computed: &Computed) -> &'static str {
    match computed {
        Computed::UpToDate => "up to date",
        Computed::Behind => "behind",
        Computed::NeedsReplay => "in need of a replay",
        Computed::Output { .. } => "an output",
    }
}

fn three(harness: &dyn TransformHarness) -> Vec<Projection> {
    spoken(harness, vec![sums(), latest("orders"), history("orders", &["order_key"])])
}

async fn computing_twice_gives_the_same(harness: &dyn TransformHarness, system: &dyn TransformSystem) {
    let (database, storage) = shop().await;
    let store = storage.open(Faults::none());
    let projections = three(harness);
    let transform = system.open().await;
    hand_driven::open(&store, transform.as_ref(), &projections).await.unwrap();
    hand_driven::advance(&store, transform.as_ref(), None).await.unwrap();
    for projection in &projections {
        let once = output(transform.as_ref(), &projection.name, None).await;
        assert_eq!(once, output(transform.as_ref(), &projection.name, None).await, "contract 6: {}", projection.name);
    }
    // An output stays readable while state goes on, and as it was.
    for (round, projection) in projections.iter().enumerate() {
        let name = &projection.name;
        let (positions, before) = output(transform.as_ref(), name, None).await;
        let Computed::Output { positions: at, mut reader, .. } = transform.compute(name, None).await.unwrap() else {
            panic!("{name} has no output");
        };
        database.commit(2_000 + round as i64, &[order(3 + round as i64, 1)]);
        stage(&database, &storage).await;
        hand_driven::advance(&store, transform.as_ref(), None).await.unwrap();
        assert_eq!((at, parts(reader.as_mut()).await), (positions, before), "{name}: a later advance has touched it");
    }
    for projection in &projections {
        hand_driven::project(&store, transform.as_ref(), projection).await.unwrap();
        let at = store.checkpoint(&projection.name).await.unwrap().unwrap().positions;
        let computed = transform.compute(&projection.name, Some(&at)).await.unwrap();
        assert_eq!(name(&computed), "up to date", "{}", projection.name);
    }
    oracle::assert_right(&database, &storage, &[sums(), latest("orders"), history("orders", &["order_key"])], "shop");
}

async fn state_behind_a_checkpoint_is_told(harness: &dyn TransformHarness, system: &dyn TransformSystem) {
    let (_, storage) = shop().await;
    let store = storage.open(Faults::none());
    let transform = system.open().await;
    let projections = three(harness);
    hand_driven::open(&store, transform.as_ref(), &projections).await.unwrap();
    hand_driven::advance(&store, transform.as_ref(), None).await.unwrap();
    let (positions, _) = output(transform.as_ref(), "orders_latest", None).await;
    transform.discard().await.unwrap();
    for projection in &projections {
        let mut at = positions.clone();
        at.extend(storage.captures().into_iter().map(|(id, state)| (id, state.watermark.boundary)));
        at.retain(|id, _| projection.tables().contains(&id.instance));
        let computed = transform.compute(&projection.name, Some(&at)).await.unwrap();
        assert_eq!(name(&computed), "behind", "{}", projection.name);
    }
}

async fn forgotten_changes_are_told(harness: &dyn TransformHarness, system: &dyn TransformSystem) {
    let (database, storage) = shop().await;
    let store = storage.open(Faults::none());
    let transform = system.open().await;
    let projections = three(harness);
    hand_driven::open(&store, transform.as_ref(), &projections).await.unwrap();
    hand_driven::advance(&store, transform.as_ref(), None).await.unwrap();
    let mut checkpoints = Vec::new();
    for projection in &projections {
        hand_driven::project(&store, transform.as_ref(), projection).await.unwrap();
        checkpoints.push(store.checkpoint(&projection.name).await.unwrap().unwrap().positions);
    }
    assert!(transform.changes_kept().await.unwrap() > 0);
    transform.forget(&checkpoints).await.unwrap();
    assert_eq!(transform.changes_kept().await.unwrap(), 0, "changes that everyone has consumed are let go");
    let computed = transform.compute("orders_history", None).await.unwrap();
    assert_eq!(name(&computed), "in need of a replay");
    for projection in ["sums", "orders_latest"] {
        let (_, lines) = output(transform.as_ref(), projection, None).await;
        assert_eq!(lines[0], "Replace", "{projection} can be told from state");
    }
    // What follows is still told exactly.
    transform.settle("sums", Some(&checkpoints[0])).await.unwrap();
    database.commit(2_000, &[Write::Delete { table: "orders".into(), key: row([1.into()]) }]);
    stage(&database, &storage).await;
    hand_driven::advance(&store, transform.as_ref(), None).await.unwrap();
    for (projection, checkpoint) in projections.iter().zip(&checkpoints) {
        let (_, lines) = output(transform.as_ref(), &projection.name, Some(checkpoint)).await;
        assert!(["Merge", "Versions"].contains(&&*lines[0]), "{} goes on by changes: {lines:?}", projection.name);
        assert_eq!(lines.len(), 2, "one row changes in {}: {lines:?}", projection.name);
    }
}

/// A store that committed an output whose transform never heard of it (contract 10).
async fn a_crash_between_commit_and_settle_is_repaired(harness: &dyn TransformHarness, system: &dyn TransformSystem) {
    let (database, storage) = shop().await;
    let projections = three(harness);
    for turn in 0..4 {
        let faults = Faults::none();
        faults.crash_at("store.committed_output", turn % 3);
        let (store, transform) = (storage.open(faults.clone()), system.open().await);
        let step = async {
            hand_driven::open(&store, transform.as_ref(), &projections).await?;
            hand_driven::advance(&store, transform.as_ref(), None).await?;
            for projection in &projections {
                hand_driven::project(&store, transform.as_ref(), projection).await?;
            }
            Ok::<_, crate::Error>(())
        };
        tokio::select! { biased; () = faults.crashed() => {}, done = step => done.unwrap() }
        let model = [sums(), latest("orders"), history("orders", &["order_key"])];
        oracle::assert_right(&database, &storage, &model, &format!("contract 10, turn {turn}"));
        database.commit(3_000 + turn as i64, &[order(10 + turn as i64, 5), customer(2 + turn as i64, "b")]);
        stage(&database, &storage).await;
    }
}

/// An output is committed, state is begun anew, and only then the transform hears of it: the output is no part of what
/// stands now.
async fn an_output_from_before_a_discard_is_not_taken_over(
    harness: &dyn TransformHarness,
    system: &dyn TransformSystem,
) {
    let (database, storage) = shop().await;
    let of_second = |id: i64| {
        let values = [id.into(), 2.into(), Value::Decimal(700), "open".into(), Value::Time(60_000_000)];
        Write::Insert { table: "orders".into(), row: row(values) }
    };
    database.commit(1_500, &[customer(2, "b"), of_second(3)]);
    stage(&database, &storage).await;
    let store = storage.open(Faults::none());
    let projections = three(harness);
    let transform = system.open().await;
    hand_driven::open(&store, transform.as_ref(), &projections).await.unwrap();
    hand_driven::advance(&store, transform.as_ref(), None).await.unwrap();
    hand_driven::project(&store, transform.as_ref(), &projections[0]).await.unwrap();
    let begun = store.checkpoint("sums").await.unwrap().unwrap().positions;
    database.commit(2_000, &[order(4, 5)]);
    stage(&database, &storage).await;
    hand_driven::advance(&store, transform.as_ref(), None).await.unwrap();
    let (at, _) = output(transform.as_ref(), "sums", Some(&begun)).await;
    transform.discard().await.unwrap();
    hand_driven::advance(&store, transform.as_ref(), Some(&at)).await.unwrap();
    transform.settle("sums", Some(&at)).await.unwrap();
    // Of a group that the output did not name.
    database.commit(2_500, &[of_second(5)]);
    stage(&database, &storage).await;
    hand_driven::advance(&store, transform.as_ref(), None).await.unwrap();
    let (_, lines) = output(transform.as_ref(), "sums", Some(&at)).await;
    let (_, whole) = output(transform.as_ref(), "sums", None).await;
    let upserts: Vec<_> = lines.iter().filter(|line| line.starts_with("upsert")).collect();
    assert!(!upserts.is_empty(), "the group has changed: {lines:?}");
    assert!(upserts.iter().all(|line| whole.contains(line)), "{lines:?} is not of {whole:?}");
}

/// Random transactions, with crashes, resnapshots, resets and lost caches.
async fn random_run(harness: &dyn TransformHarness, seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let system = harness.fresh().await;
    let database = MemoryDatabase::new("shop", model_tables());
    let storage = MemoryStorage::new("store");
    let all = Faults::seeded(seed, FaultPlan { errors: 5, longest_sleep: Duration::ZERO, ..FaultPlan::NONE });
    let model = model_projections();
    let projections = spoken(harness, model.clone());
    for turn in 0..12 {
        for _ in 0..rng.random_range(0..6) {
            commit_random(&database, &TransactionShape::default(), &mut rng);
        }
        let faults = all.process();
        if turn == 10 {
            all.set_plan(FaultPlan::NONE);
        } else if turn < 10 && rng.random_range(0..3) == 0 {
            faults.crash_after(rng.random_range(0..120));
        }
        let (store, transform) = (storage.open(faults.clone()), system.open().await);
        let mut source = MemorySource::new(&database, faults.clone(), SourceHabits::ROUGH);
        let forget = rng.random();
        let skips = || turn < 11 && faults.draw(4) == 0;
        let round = hand_driven::round(&mut source, &store, transform.as_ref(), &projections, LIMIT, forget, skips);
        tokio::select! {
            biased;
            () = faults.crashed() => {}
            done = round => if let Err(error) = done {
                assert_eq!(error.kind(), ErrorKind::Unavailable, "seed {seed} turn {turn}: {error}");
            }
        }
        oracle::assert_right(&database, &storage, &model, &format!("seed {seed} turn {turn}"));
        if rng.random_range(0..8) == 0 {
            transform.discard().await.unwrap();
        }
        let calm = storage.open(Faults::none());
        if rng.random_range(0..6) == 0 {
            calm.reset_projection(&model[rng.random_range(0..model.len())].name).await.unwrap();
        }
        for id in storage.captures().keys() {
            if rng.random_range(0..16) == 0 {
                calm.request_snapshot(id, false).await.unwrap();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory_transform::MemoryCache;

    struct Memory;

    #[async_trait]
    impl TransformHarness for Memory {
        async fn fresh(&self) -> Box<dyn TransformSystem> {
            Box::new(MemoryCache::default())
        }

        fn text(&self, name: &str) -> String {
            name.into()
        }
    }

    #[async_trait]
    impl TransformSystem for MemoryCache {
        async fn open(&self) -> Box<dyn Transform> {
            Box::new(MemoryCache::open(self, Faults::none()))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_memory_transform_keeps_the_contract() {
        run(&Memory).await;
    }
}
