//! engine.memory_state and engine.memory_transaction: peak resident memory of the pipeline's process.
//!
//! Sources are written by other processes, so that their memory does not count.

use std::time::{Duration, Instant};

use shori_core::Result;

use super::flow;
use super::world::World;
use crate::bench::drive::{self, source_error};
use crate::bench::machine::peak_resident_mb;
use crate::bench::{Measured, Place};
use crate::cli;
use crate::config::Loaded;

pub(super) const FOLDER: &str = "memory";
const TRANSACTION_ROWS: u64 = 1_000_000;
const CUSTOMERS: i64 = 10_000;
const RUNNING_SECONDS: f64 = 20.0;

const FILL: &str = "
with recursive numbers (number) as (
    select 1
    union all
    select number + 1 from numbers where number < ?1
)
insert into orders (order_id, customer_id, amount, status)
select number, number % ?2 + 1, (number % 900 + 1) || '.50', 'open'
from numbers
";

/// The larger of two peaks: that of making the state, and that of running under load with it.
pub(super) fn measure_state(place: &Place) -> Result<Measured> {
    let world = World::read(place)?;
    let seconds = RUNNING_SECONDS * place.scale.max(0.25);
    let flow = cli::block_on(flow::run(place, Duration::ZERO, Duration::from_secs_f64(seconds)))?;
    let running = peak_resident_mb();
    Ok(Measured::new(world.peak_resident_mb.max(running))
        .part("making_mb", world.peak_resident_mb)
        .part("running_mb", running)
        .part("making_s", world.seconds)
        .part("changes", flow.generated as f64))
}

/// One transaction waits in a source whose tables were taken over empty.
pub(super) fn prepare_transaction(place: &Place) -> Result<Measured> {
    let loaded = drive::demo(&place.fresh(FOLDER)?)?;
    drive::run_once(&loaded)?;
    let mut connection = drive::open_source(&loaded)?;
    let mut fill = || {
        let transaction = connection.transaction()?;
        transaction.execute(FILL, [place.rows(TRANSACTION_ROWS) as i64, CUSTOMERS])?;
        transaction.commit()
    };
    fill().map_err(source_error("fill"))?;
    Ok(Measured::default())
}

pub(super) fn measure_transaction(place: &Place) -> Result<Measured> {
    let begun = Instant::now();
    drive::run_once(&Loaded::demo(&place.folder(FOLDER))?)?;
    Ok(Measured::new(peak_resident_mb()).part("seconds_s", begun.elapsed().as_secs_f64()))
}
