//! engine.history: changes in the log, into a durable history that already has as many versions.
//!
//! Each key has about five versions before and gets about five more, in random order. Timed: state, versions, commit and
//! settling.

use std::time::Instant;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rusqlite::{Connection, params};
use shori_core::Result;
use shori_core::event::Events;

use crate::bench::drive::{self, Engine, source_error};
use crate::bench::{Measured, Place};
use crate::config::{Loaded, ProjectionKind};
use crate::{assemble, cli};

pub(super) const FOLDER: &str = "history";
const KEYS: u64 = 200_000;
const CHANGES: u64 = 1_000_000;
const TRANSACTION_ROWS: u64 = 1_000;

const INSERT: &str = "
insert into orders (order_id, customer_id, amount, status)
values (?1, ?2, ?3, 'open')
";
const UPDATE: &str = "
update orders
set amount = ?2, status = ?3
where order_id = ?1
";

/// The demo pipeline with its history alone.
fn pipeline(loaded: Loaded) -> Loaded {
    let mut loaded = loaded;
    loaded.config.projections.retain(|projection| projection.kind == ProjectionKind::History);
    loaded
}

pub(super) fn prepare(place: &Place) -> Result<Measured> {
    let loaded = pipeline(drive::demo(&place.fresh(FOLDER)?)?);
    let connection = drive::open_source(&loaded)?;
    let (keys, changes) = (place.rows(KEYS), place.rows(CHANGES));
    cli::block_on(async {
        read_empty(&loaded).await?;
        insert(&connection, keys).map_err(source_error("insert into"))?;
        update(&connection, keys, changes - keys.min(changes), 1).map_err(source_error("update"))?;
        let mut engine = Engine::open(&loaded).await?;
        drive::ingest(&loaded, &engine.pipeline).await?;
        engine.look().await?;
        engine.advance().await?;
        for projection in engine.projections() {
            engine.output(&projection).await?;
        }
        engine.forget().await?;
        update(&connection, keys, changes, 2).map_err(source_error("update"))?;
        drive::ingest(&loaded, &engine.pipeline).await
    })?;
    Ok(Measured::default())
}

/// Takes over the empty tables, so that changes alone make versions.
async fn read_empty(loaded: &Loaded) -> Result<()> {
    let opened = assemble::open(loaded)?;
    let pipeline = assemble::pipeline(loaded, &opened, true, Events::nowhere())?;
    pipeline.staging.bootstrap().await?;
    drive::ingest(loaded, &pipeline).await.map(|_| ())
}

pub(super) fn measure(place: &Place) -> Result<Measured> {
    let loaded = pipeline(Loaded::demo(&place.folder(FOLDER))?);
    cli::block_on(async {
        let mut engine = Engine::open(&loaded).await?;
        let begun = Instant::now();
        let changes = engine.advance().await?;
        let advance = begun.elapsed();
        let mut measured = Measured::default().part("advance_s", advance.as_secs_f64());
        for projection in engine.projections() {
            let times = engine.output(&projection).await?;
            measured = measured
                .part("compute_s", times.compute.as_secs_f64())
                .part("commit_s", times.commit.as_secs_f64())
                .part("settle_s", times.settle.as_secs_f64())
                .part("rows_written", times.rows as f64);
        }
        measured.value = changes as f64 / begun.elapsed().as_secs_f64();
        Ok(measured.part("changes", changes as f64))
    })
}

fn insert(connection: &Connection, keys: u64) -> rusqlite::Result<()> {
    let transaction = connection.unchecked_transaction()?;
    let mut statement = transaction.prepare(INSERT)?;
    for key in 1..=keys {
        statement.execute(params![key as i64, (key % 10_000) as i64, "1.00"])?;
    }
    drop(statement);
    transaction.commit()
}

fn update(connection: &Connection, keys: u64, changes: u64, seed: u64) -> rusqlite::Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut left = changes;
    while left > 0 {
        let rows = left.min(TRANSACTION_ROWS);
        let transaction = connection.unchecked_transaction()?;
        let mut statement = transaction.prepare_cached(UPDATE)?;
        for _ in 0..rows {
            let amount = format!("{}.{:02}", rng.random_range(1..1_000), rng.random_range(0..100));
            let status = ["open", "paid", "cancelled"][rng.random_range(0..3)];
            statement.execute(params![rng.random_range(1..=keys) as i64, amount, status])?;
        }
        drop(statement);
        transaction.commit()?;
        left -= rows;
    }
    Ok(())
}
