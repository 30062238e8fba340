//! postgres.memory, postgres.memory_transaction: the most memory that reading takes.

use shori_core::Result;

use super::pipeline::{self, Results};
use super::server::{SOURCE, Server, refused};
use super::stream::{TABLE, row};
use crate::bench::task::{self, PEAK_RESIDENT_MB};
use crate::bench::{Measured, Place, machine};

const TRANSACTION_ROWS: u64 = 10_000_000;

const FIGURES: [&str; 4] =
    ["postgres.stream_duckdb", "postgres.snapshot", "postgres.history_insert", "postgres.history_update"];

/// The greatest of what the other figures take.
pub(super) fn measure(place: &Place) -> Result<Measured> {
    let mut measured = Measured::default();
    for figure in FIGURES {
        task::run(place, "postgres", &format!("{figure}/prepare"))?;
        let peak = task::run(place, "postgres", &format!("{figure}/measure"))?.parts[PEAK_RESIDENT_MB];
        measured.value = measured.value.max(peak);
        measured = measured.part(&format!("{}_mb", figure.replace('.', "_")), peak);
    }
    Ok(measured)
}

pub(super) fn prepare_transaction(place: &Place) -> Result<Measured> {
    let server = Server::make(place, SOURCE)?;
    let folder = place.fresh(pipeline::FOLDER)?;
    crate::cli::block_on(server.run(&[TABLE]))?;
    pipeline::read(&pipeline::loaded(&folder, &server, &Results::LogInDuckdb)?)?;
    crate::cli::block_on(async {
        let client = &server.connect().await?.client;
        let rows = place.rows(TRANSACTION_ROWS);
        let insert = format!("insert into orders select {} from generate_series(1, {rows}) as n", row("n"));
        client.batch_execute(&insert).await.map_err(refused)
    })?;
    Ok(Measured::default())
}

pub(super) fn measure_transaction(place: &Place) -> Result<Measured> {
    let server = Server::again(place, SOURCE)?;
    let loaded = pipeline::loaded(&place.folder(pipeline::FOLDER), &server, &Results::LogInDuckdb)?;
    let (changes, seconds) = pipeline::read(&loaded)?;
    let rate = changes as f64 / seconds;
    Ok(Measured::new(machine::peak_resident_mb()).part("changes", changes as f64).part("rate_changes_s", rate))
}
