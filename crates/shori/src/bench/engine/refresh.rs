//! engine.refresh_recent and engine.refresh_random: the KPI after 10,000 changes, held against computing it in full.
//!
//! Changes go through the source and the production ingestor into the log. Timed from there: state update, output, its
//! commit, settling. The floor is the projection's own query over the same rows (those that the log leaves, in a table of
//! DuckDB's own) into a durable table, in the same DuckDB with the same memory and threads, in turns with the refreshes; both
//! numbers are medians. With the pipeline's small
//! memory the full query spills, so it is also told what it takes with plenty. State is kept for all projections of the
//! demo, whose own outputs are brought up to date between the rounds, untimed.

use std::ops::RangeInclusive;
use std::time::Instant;

use duckdb::Connection as DuckdbConnection;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rusqlite::{Connection, params};
use shori_core::projection::Derivation;
use shori_core::{Error, ErrorKind, Result};
use shori_duckdb::database::{duckdb_error, quote_name};

use super::world::{DAYS, TimeText, World};
use crate::bench::drive::{self, Engine, OutputTimes, source_error};
use crate::bench::{Measured, Place};
use crate::cli;

const KPI: &str = "proj_orders_kpi_by_minute_segment";
const CHANGES: u64 = 10_000;
const ROUNDS: usize = 5;
const TRANSACTION_ROWS: u64 = 100;
/// Of 100 changes: new amounts, new payments; the rest deletes orders.
const UPDATES: u32 = 75;
const PAYMENTS: u32 = 20;

const UPDATE_ORDER: &str = "
update orders
set amount = ?2
where order_id = ?1
";
const INSERT_PAYMENT: &str = "
insert into payments (payment_id, order_id, paid_amount, paid_at)
select (select max(payment_id) + 1 from payments), ?1, ?2, ?3
";
const DELETE_ORDER: &str = "
delete from orders
where order_id = ?1
";

/// Changes of the orders of the last hour.
pub(super) fn measure_recent(place: &Place) -> Result<Measured> {
    let world = World::read(place)?;
    let hour = (world.orders / (DAYS * 24)).max(1);
    measure(place, &world, world.orders - hour + 1..=world.orders, 1)
}

/// Changes of orders anywhere in the 30 days.
pub(super) fn measure_random(place: &Place) -> Result<Measured> {
    let world = World::read(place)?;
    measure(place, &world, 1..=world.orders, 2)
}

/// Seconds of one round.
#[derive(Default)]
struct Round {
    advance: f64,
    output: OutputTimes,
    refresh: f64,
    full: f64,
}

fn measure(place: &Place, world: &World, orders: RangeInclusive<u64>, seed: u64) -> Result<Measured> {
    let loaded = World::loaded(place)?;
    let connection = drive::open_source(&loaded)?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let changes = CHANGES.min(place.rows(CHANGES * 10));
    let (mut rounds, mut plenty) = (Vec::with_capacity(ROUNDS), 0.0);
    cli::block_on(async {
        let mut engine = Engine::open(&loaded).await?;
        let floor = Floor::open(&engine, &loaded)?;
        // The first round warms up, and takes along what an earlier figure left.
        for round in 0..=ROUNDS {
            change(&connection, world, &orders, changes, &mut rng).map_err(source_error("change"))?;
            drive::ingest(&loaded, &engine.pipeline).await?;
            engine.look().await?;
            let measured = refresh(&mut engine, &floor).await?;
            for projection in engine.projections() {
                engine.output(&projection).await?;
            }
            engine.forget().await?;
            if round > 0 {
                rounds.push(measured);
            }
        }
        plenty = floor.compute_with_plenty(loaded.config.memory.limit_mib)?;
        floor.close()
    })?;
    let median = |part: fn(&Round) -> f64| median(rounds.iter().map(part));
    let measured = Measured { floor: Some(median(|round| round.full)), ..Measured::new(median(|round| round.refresh)) };
    Ok(measured
        .part("advance_s", median(|round| round.advance))
        .part("compute_s", median(|round| round.output.compute.as_secs_f64()))
        .part("commit_s", median(|round| round.output.commit.as_secs_f64()))
        .part("settle_s", median(|round| round.output.settle.as_secs_f64()))
        .part("rows_written", median(|round| round.output.rows as f64))
        .part("full_with_2_gib_s", plenty))
}

async fn refresh(engine: &mut Engine, floor: &Floor) -> Result<Round> {
    let begun = Instant::now();
    engine.advance().await?;
    let advance = begun.elapsed().as_secs_f64();
    let output = engine.output(KPI).await?;
    let refresh = begun.elapsed().as_secs_f64();
    Ok(Round { advance, output, refresh, full: floor.compute()? })
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Makes `count` changes of orders in a range of ids, as an application would.
fn change(
    connection: &Connection,
    world: &World,
    orders: &RangeInclusive<u64>,
    count: u64,
    rng: &mut ChaCha8Rng,
) -> rusqlite::Result<()> {
    let (mut left, mut time) = (count, TimeText::default());
    while left > 0 {
        let transaction = connection.unchecked_transaction()?;
        let wanted = left.min(TRANSACTION_ROWS);
        let mut made = 0;
        while made < wanted {
            let order = rng.random_range(orders.clone());
            let amount = format!("{}.{:02}", rng.random_range(1..1_000), rng.random_range(0..100));
            let paid = world.created(order) + rng.random_range(0..600_000_000);
            let id = order as i64;
            made += match rng.random_range(0..100) {
                0..UPDATES => transaction.prepare_cached(UPDATE_ORDER)?.execute(params![id, amount])?,
                UPDATES.. if rng.random_range(0..100 - UPDATES) < PAYMENTS => {
                    transaction.prepare_cached(INSERT_PAYMENT)?.execute(params![id, amount, time.format(paid)])?
                }
                _ => transaction.prepare_cached(DELETE_ORDER)?.execute([id])?,
            } as u64;
        }
        transaction.commit()?;
        left -= made.min(left);
    }
    Ok(())
}

/// Computes the projection in full.
struct Floor {
    connection: DuckdbConnection,
    text: String,
    tables: Vec<String>,
}

/// The rows that the query is computed over.
fn floor_table(table: &str) -> String {
    format!("bench_rows_{table}")
}

const RESULT: &str = "bench_full_result";

impl Floor {
    fn open(engine: &Engine, loaded: &crate::config::Loaded) -> Result<Self> {
        let found = engine.pipeline.projections.iter().find(|(projection, _)| &*projection.name == KPI);
        let Some(Derivation::Sql(sql)) = found.map(|(projection, _)| &projection.derivation) else {
            return Err(Error::new(ErrorKind::Internal, "find", format!("projection {KPI}"), "there is none"));
        };
        let connection = engine.opened.database.connect(&loaded.staging()?.name)?;
        let floor = Self {
            connection,
            text: sql.text.clone(),
            tables: sql.tables.iter().map(|table| table.to_string()).collect(),
        };
        // With room to sort in: it is no part of what is measured.
        floor.run("set memory_limit = '4GiB'")?;
        for table in &floor.tables {
            let key: Vec<String> = engine.key_of(table).iter().map(|name| quote_name(name)).collect();
            let (log, rows) = (quote_name(&format!("stg_cdc_{table}")), quote_name(&floor_table(table)));
            floor.run(&format!(
                "create or replace table {rows} as
                 select * from {log}
                 qualify row_number() over (partition by {} order by lsn desc, seqval desc) = 1 and op in (0, 2, 4);
                 create or replace temp view {} as from {rows}",
                key.join(", "),
                quote_name(table)
            ))?;
        }
        floor.run(&format!("set memory_limit = '{}MiB'; checkpoint", loaded.config.memory.limit_mib))?;
        Ok(floor)
    }

    fn run(&self, sql: &str) -> Result<()> {
        self.connection.execute_batch(sql).map_err(|cause| duckdb_error("compute", "the KPI in full", cause))
    }

    /// Seconds until the result is durable.
    fn compute(&self) -> Result<f64> {
        self.run(&format!("drop table if exists {RESULT}"))?;
        let begun = Instant::now();
        self.run(&format!("create table {RESULT} as\n{}", self.text))?;
        Ok(begun.elapsed().as_secs_f64())
    }

    /// The same, the memory limit raised meanwhile; the faster of two.
    fn compute_with_plenty(&self, usual_mib: u64) -> Result<f64> {
        self.run("set memory_limit = '2GiB'")?;
        let seconds = self.compute()?.min(self.compute()?);
        self.run(&format!("set memory_limit = '{usual_mib}MiB'"))?;
        Ok(seconds)
    }

    fn close(self) -> Result<()> {
        for table in &self.tables {
            self.run(&format!("drop table {}", quote_name(&floor_table(table))))?;
        }
        self.run(&format!("drop table if exists {RESULT}"))
    }
}
