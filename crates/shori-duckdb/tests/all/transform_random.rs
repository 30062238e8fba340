//! Random pipelines with crashes: a source and store in memory, the transform in DuckDB, and an oracle that knows what
//! was committed.

use std::path::Path;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use shori_core::ErrorKind;
use shori_core::Result;
use shori_core::position::{Position, Positions};
use shori_core::projection::{Derivation, Projection};
use shori_core::source::BatchLimit;
use shori_core::store::Store;
use shori_core::testing::faults::{FaultPlan, Faults};
use shori_core::testing::hand_driven::{advance, ingest, open, project};
use shori_core::testing::memory_database::MemoryDatabase;
use shori_core::testing::memory_query::{KPI, ORDERS_WITH_SEGMENT, SUM_BY_GROUP};
use shori_core::testing::memory_source::{MemorySource, SourceHabits};
use shori_core::testing::memory_store::MemoryStorage;
use shori_core::testing::model_projections::model_projections;
use shori_core::testing::oracle;
use shori_core::testing::transactions::{TransactionShape, commit_random, model_tables};
use shori_core::transform::Transform;
use shori_duckdb::database::{Database, Settings};
use shori_duckdb::transform::DuckdbTransform;

/// The model's queries in SQL.
pub fn in_sql(name: &str) -> &'static str {
    match name {
        SUM_BY_GROUP => {
            "select coalesce(c.segment, 'UNKNOWN') as segment, count(*) as orders_count,
                 coalesce(sum(o.amount), 0)::decimal(38,2) as amount_sum
             from orders o left join customers c using (customer_id)
             group by 1"
        }
        ORDERS_WITH_SEGMENT => {
            "select o.order_id, o.customer_id, c.segment, o.amount, o.__lsn as __source_lsn
             from orders o left join customers c using (customer_id);"
        }
        KPI => {
            "with by_order as (
                 select date_trunc('minute', coalesce(o.created_at, make_timestamp(0))) as minute_bucket,
                     coalesce(c.segment, 'UNKNOWN') as segment, count(distinct o.order_id) as n,
                     sum(o.amount) as amount
                 from orders o left join customers c using (customer_id)
                 group by 1, 2
             ),
             by_payment as (
                 select date_trunc('minute', coalesce(p.paid_at, make_timestamp(0))) as minute_bucket,
                     coalesce(c.segment, 'UNKNOWN') as segment, count(*) as n, sum(p.paid_amount) as paid
                 from payments p join orders o using (order_id) left join customers c using (customer_id)
                 group by 1, 2
             )
             select minute_bucket, segment, coalesce(o.n, 0)::bigint as orders_count,
                 coalesce(o.amount, 0)::decimal(38,2) as orders_amount_sum,
                 coalesce(p.paid, 0)::decimal(38,2) as paid_amount_sum,
                 (coalesce(o.n, 0) + coalesce(p.n, 0))::bigint as base_rows
             from by_order o full join by_payment p using (minute_bucket, segment) -- both sides"
        }
        other => panic!("no query {other}"),
    }
}

pub fn projections_in_sql() -> Vec<Projection> {
    let mut projections = model_projections();
    for projection in &mut projections {
        if let Derivation::Sql(sql) = &mut projection.derivation {
            sql.text = in_sql(&sql.text).to_string();
        }
    }
    projections
}

pub fn transform(directory: &Path) -> DuckdbTransform {
    open_transform(directory, true)
}

fn open_transform(directory: &Path, inline: bool) -> DuckdbTransform {
    let settings = Settings { memory_limit_mib: 256, threads: 2, spill_directory: directory.join("spill"), inline };
    DuckdbTransform::open(&Database::open(&settings).unwrap(), &directory.join("state.sqlite")).unwrap()
}

struct World {
    database: MemoryDatabase,
    storage: MemoryStorage,
    directory: tempfile::TempDir,
    projections: Vec<Projection>,
    faults: Faults,
    inline: bool,
}

impl World {
    /// Everything, some times over, in a process that may end at any step.
    async fn process(&self, faults: &Faults, rounds: u64, rows: usize, shape: &TransactionShape) -> Result<()> {
        let store = self.storage.open(faults.clone());
        let transform = open_transform(self.directory.path(), self.inline);
        let mut source = MemorySource::new(&self.database, faults.clone(), SourceHabits::ROUGH);
        store.bootstrap().await?;
        for round in 0..rounds {
            if round > 0 {
                let mut rng = ChaCha8Rng::seed_from_u64(faults.draw(u64::MAX));
                (0..rng.random_range(0..4)).for_each(|_| _ = commit_random(&self.database, shape, &mut rng));
            }
            ingest(&mut source, &store, BatchLimit { rows, bytes: 1 << 20 }).await?;
            if round == 0 {
                open(&store, &transform, &self.projections).await?;
            }
            advance(&store, &transform, None).await?;
            let mut checkpoints = Vec::new();
            for projection in &self.projections {
                if faults.draw(4) > 0 {
                    project(&store, &transform, projection).await?;
                }
                let checkpoint = store.checkpoint(&projection.name).await?;
                checkpoints.push(checkpoint.map_or_else(Positions::new, |checkpoint| checkpoint.positions));
            }
            if faults.draw(2) == 0 {
                transform.forget(&checkpoints).await?;
            }
        }
        Ok(())
    }

    fn assert_right(&self, context: &str) {
        oracle::assert_right(&self.database, &self.storage, &model_projections(), context);
    }
}

async fn run(seed: u64, shape: TransactionShape, inline: bool) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let world = World {
        database: MemoryDatabase::new("shop", model_tables()),
        storage: MemoryStorage::new("store"),
        directory: tempfile::tempdir().unwrap(),
        projections: projections_in_sql(),
        faults: Faults::seeded(seed, FaultPlan { errors: 3, ..FaultPlan::NONE }),
        inline,
    };
    for _ in 0..rng.random_range(0..6) {
        commit_random(&world.database, &shape, &mut rng);
    }
    for process in 0..6 {
        let faults = world.faults.process();
        if rng.random_range(0..3) == 0 {
            faults.crash_after(rng.random_range(0..250));
        }
        for _ in 0..rng.random_range(0..6) {
            commit_random(&world.database, &shape, &mut rng);
        }
        let (rounds, rows) = (rng.random_range(1..5), rng.random_range(1..5 * shape.statements as usize));
        tokio::select! {
            biased;
            () = faults.crashed() => {}
            result = world.process(&faults, rounds, rows, &shape) => {
                if let Err(error) = result {
                    assert_eq!(error.kind(), ErrorKind::Unavailable, "seed {seed} process {process}: {error}");
                }
            }
        }
        world.assert_right(&format!("seed {seed} process {process}"));
        disturb(&world, &mut rng).await;
    }
    world.faults.set_plan(FaultPlan::NONE);
    for _ in 0..4 {
        let rows = shape.statements as usize * 12;
        world.process(&world.faults.process(), 3, rows, &TransactionShape { statements: 0, ..shape }).await.unwrap();
    }
    world.assert_right(&format!("seed {seed} at the end"));
}

/// What people and retention do meanwhile.
async fn disturb(world: &World, rng: &mut ChaCha8Rng) {
    let store = world.storage.open(Faults::none());
    let captures = world.storage.captures();
    for (id, state) in &captures {
        let dice = rng.random_range(0..24);
        if dice == 0 || state.failed.is_some() && dice < 12 {
            store.request_snapshot(id, false).await.unwrap();
        }
    }
    if rng.random_range(0..12) == 0 {
        world.database.prune(world.database.head());
    }
    if rng.random_range(0..12) == 0 {
        let projection = &world.projections[rng.random_range(0..world.projections.len())];
        store.reset_projection(&projection.name).await.unwrap();
    }
    if rng.random_range(0..12) == 0 {
        std::fs::write(world.directory.path().join("state.sqlite"), b"no database").unwrap();
    }
    for (id, state) in &captures {
        if rng.random_range(0..8) > 0 {
            continue;
        }
        let readers = world.projections.iter().filter(|projection| projection.tables().contains(&state.schema.table));
        let reached = readers.map(|projection| {
            let checkpoint = world.storage.target(&projection.name).and_then(|target| target.checkpoint);
            checkpoint.and_then(|checkpoint| checkpoint.positions.get(id).copied()).unwrap_or(Position::ZERO)
        });
        let horizon = reached.chain([state.watermark.boundary]).min().unwrap();
        store.compact(id, &horizon, rng.random()).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn outputs_are_right_whatever_happens() {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse().ok());
    let (first, seeds): (u64, u64) = (number("SHORI_SEED").unwrap_or(0), number("SHORI_SEEDS").unwrap_or(6));
    for seed in first..first + seeds {
        println!("seed {seed}");
        run(seed, TransactionShape::default(), true).await;
    }
}

/// Large enough that the work of a step is shared between threads.
#[tokio::test(start_paused = true)]
async fn outputs_of_large_steps_are_right() {
    for seed in 0..2 {
        run(seed, TransactionShape { keys: 1_000, statements: 800, ..TransactionShape::default() }, false).await;
    }
}
