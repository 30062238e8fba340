//! engine.backlog: changes that wait in the source, into the durable log.
//!
//! The changes are the generator's, logged by triggers. The log has taken over the empty tables before, so that nothing
//! but changes is read. Timed from the start of the ingestor to its end, connecting and the last commit included.

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use shori_core::event::Events;
use shori_core::{Error, ErrorKind, Result};

use crate::bench::{Measured, Place, drive};
use crate::config::Loaded;
use crate::generate::{Application, Shop, Workload};
use crate::{assemble, cli};

pub(super) const FOLDER: &str = "backlog";
const CHANGES: u64 = 1_000_000;

pub(super) fn prepare(place: &Place) -> Result<Measured> {
    let loaded = drive::demo(&place.fresh(FOLDER)?)?;
    read(&loaded)?;
    let shop = Application::Shop(Shop::new(loaded.resolve(loaded.config.sources[0].file())));
    let workload = Workload { changes: Some(place.rows(CHANGES)), ..Workload::default() };
    shop.run(&workload, &AtomicBool::new(false), |_| {})?;
    Ok(Measured::default())
}

pub(super) fn measure(place: &Place) -> Result<Measured> {
    let loaded = Loaded::demo(&place.folder(FOLDER))?;
    let (changes, seconds) = read(&loaded)?;
    if changes < place.rows(CHANGES) {
        let cause = format!("{changes} changes came of {}", place.rows(CHANGES));
        return Err(Error::new(ErrorKind::Internal, "read", "the backlog", cause));
    }
    Ok(Measured::new(changes as f64 / seconds).part("seconds_s", seconds))
}

fn read(loaded: &Loaded) -> Result<(u64, f64)> {
    let opened = assemble::open(loaded)?;
    let pipeline = assemble::pipeline(loaded, &opened, true, Events::nowhere())?;
    cli::block_on(async {
        pipeline.staging.bootstrap().await?;
        let begun = Instant::now();
        let changes = drive::ingest(loaded, &pipeline).await?;
        Ok((changes, begun.elapsed().as_secs_f64()))
    })
}
