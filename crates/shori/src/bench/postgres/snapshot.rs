//! postgres.snapshot: a table that was there before, into the durable log.
//!
//! The floor is `COPY … TO STDOUT (FORMAT binary)` of the same table, its bytes read and thrown away: the median of five.

use std::time::Instant;

use futures::TryStreamExt;
use shori_core::{Error, ErrorKind, Result};

use super::pipeline::{self, Results};
use super::server::{SOURCE, Server, refused};
use super::stream::{TABLE, row};
use crate::bench::{Measured, Place};

const ROWS: u64 = 1_100_000;
/// Copies of which the one in the middle is the floor: on a shared machine one differs from the next by a third.
const FLOORS: usize = 5;

pub(super) fn prepare(place: &Place) -> Result<Measured> {
    let server = Server::make(place, SOURCE)?;
    place.fresh(pipeline::FOLDER)?;
    let rows = place.rows(ROWS);
    let insert =
        format!("insert into orders select {}, repeat(md5(n::text), 2) from generate_series(1, {rows}) as n", row("n"));
    // As wide as the target's: 150 MB.
    let wider = "alter table orders add column note text";
    crate::cli::block_on(server.run(&[TABLE, wider, &insert, "vacuum analyze orders", "checkpoint"]))?;
    Ok(Measured::default())
}

pub(super) fn measure(place: &Place) -> Result<Measured> {
    let server = Server::again(place, SOURCE)?;
    let (floor, bytes) = crate::cli::block_on(async {
        let client = &server.connect().await?.client;
        // Once before, so that all find the table in memory.
        copy_out(client).await?;
        let mut seconds = [0.0; FLOORS];
        let mut bytes = 0;
        for second in &mut seconds {
            (*second, bytes) = copy_out(client).await?;
        }
        seconds.sort_by(f64::total_cmp);
        Ok((seconds[FLOORS / 2], bytes))
    })?;
    let loaded = pipeline::loaded(&place.folder(pipeline::FOLDER), &server, &Results::LogInDuckdb)?;
    let (_, seconds) = pipeline::read(&loaded)?;
    let rows = pipeline::rows_in_log(&loaded)?;
    if rows != place.rows(ROWS) {
        let cause = format!("{rows} rows came of {}", place.rows(ROWS));
        return Err(Error::new(ErrorKind::Internal, "read", "the table", cause));
    }
    let measured = Measured { floor: Some(floor), ..Measured::new(seconds) };
    Ok(measured.part("copied_mb", bytes as f64 / 1e6).part("rate_rows_s", rows as f64 / seconds))
}

/// Seconds and bytes.
async fn copy_out(client: &tokio_postgres::Client) -> Result<(f64, usize)> {
    let begun = Instant::now();
    let stream = client.copy_out("copy orders to stdout (format binary)").await.map_err(refused)?;
    let bytes = stream.try_fold(0, async |sum, part| Ok(sum + part.len())).await.map_err(refused)?;
    Ok((begun.elapsed().as_secs_f64(), bytes))
}
