//! postgres.freshness: from a commit in the source to the commit of the version of its rows in another server.
//!
//! Per change, and every transaction has as many. The writers are a process of their own, each with a connection.

use std::sync::Arc;
use std::time::Duration;

use shori_core::event::Events;
use shori_core::{Error, ErrorKind, Result};
use tokio::time::{Instant, MissedTickBehavior};

use super::pipeline::{self, Results};
use super::server::{DATABASE, SOURCE, Server, WAREHOUSE, refused};
use super::stream::{TABLE, row};
use crate::bench::watch::Watch;
use crate::bench::{Measured, Place, drive, task};
use crate::{assemble, cli};

pub(super) const WRITE: &str = "postgres.freshness/write";
/// The source's port, for the writers' process.
const PORT: &str = "SHORI_BENCH_PORT";

const KEYS: u64 = 200_000;
const WRITERS: u64 = 4;
/// Of one writer.
const TRANSACTIONS_PER_SECOND: u64 = 250;
const WARM_UP_SECONDS: f64 = 10.0;
const MEASURED_SECONDS: f64 = 60.0;

pub(super) fn prepare(place: &Place) -> Result<Measured> {
    let (source, warehouse) = (Server::make(place, SOURCE)?, Server::make(place, WAREHOUSE)?);
    let folder = place.fresh(pipeline::FOLDER)?;
    let fill = format!("insert into orders select {} from generate_series(1, {}) as n", row("n"), place.rows(KEYS));
    cli::block_on(source.run(&[TABLE, &fill, "vacuum analyze orders"]))?;
    drive::run_once(&pipeline::loaded(&folder, &source, &Results::HistoryIn(&warehouse))?)?;
    Ok(Measured::default())
}

pub(super) fn measure(place: &Place) -> Result<Measured> {
    let (source, warehouse) = (Server::again(place, SOURCE)?, Server::again(place, WAREHOUSE)?);
    let loaded = pipeline::loaded(&place.folder(pipeline::FOLDER), &source, &Results::HistoryIn(&warehouse))?;
    let opened = assemble::open(&loaded)?;
    let watch = Arc::new(Watch::new(1));
    let watching = watch.clone();
    let prepared =
        assemble::pipeline(&loaded, &opened, false, Events::new(move |event| watching.listen(event)))?.prepare();
    let handle = prepared.handle();
    let writing = place.clone();
    let written = cli::block_on(async {
        let running = tokio::spawn(prepared.run());
        handle.ready().await?;
        let environment = [(PORT, source.port().to_string())];
        let writers = tokio::task::spawn_blocking(move || task::run_with(&writing, "postgres", WRITE, &environment));
        tokio::time::sleep(seconds(place, WARM_UP_SECONDS)).await;
        watch.begin();
        let written = writers.await.map_err(|cause| Error::new(ErrorKind::Internal, "finish", "writing", cause))??;
        let seen = watch.seen();
        handle.stop.cancel();
        running.await.map_err(|cause| Error::new(ErrorKind::Internal, "finish", "the pipeline", cause))??;
        Ok((written, seen))
    });
    let (written, seen) = written?;
    let measured = seen.measured()?;
    Ok(measured.part("transactions_s", written.value).part("writers_late_s", written.parts["late_s"]))
}

fn seconds(place: &Place, seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds * place.scale.max(0.1))
}

/// Transactions of one new order and one that is changed. The value is how many a second.
pub(super) fn write(place: &Place) -> Result<Measured> {
    let missing = |cause| Error::new(ErrorKind::Usage, "read", PORT, cause);
    let port: u16 = match std::env::var(PORT) {
        Ok(text) => text.parse().map_err(|cause| missing(format!("{cause}")))?,
        Err(cause) => return Err(missing(cause.to_string())),
    };
    let (keys, lasting) = (place.rows(KEYS), seconds(place, WARM_UP_SECONDS + MEASURED_SECONDS));
    let begun = Instant::now();
    let (count, late) = cli::block_on(async {
        let writers: Vec<_> = (0..WRITERS).map(|writer| tokio::spawn(write_one(port, keys, writer, lasting))).collect();
        let (mut count, mut late) = (0, Duration::ZERO);
        for writer in writers {
            let (wrote, was_late) =
                writer.await.map_err(|cause| Error::new(ErrorKind::Internal, "finish", "a writer", cause))??;
            count += wrote;
            late = late.max(was_late);
        }
        Ok::<_, Error>((count, late))
    })?;
    Ok(Measured::new(count as f64 / begun.elapsed().as_secs_f64()).part("late_s", late.as_secs_f64()))
}

/// How many, and by how much the last of them was late.
async fn write_one(port: u16, keys: u64, writer: u64, lasting: Duration) -> Result<(u64, Duration)> {
    let client = &super::server::address(port, DATABASE).connect().await?.client;
    let sql = format!(
        "with changed as (update orders set amount = amount + 1, status = 'paid' where order_id = $2)
        insert into orders select {}",
        row("$1::bigint")
    );
    let statement = client.prepare(&sql).await.map_err(refused)?;
    let period = Duration::from_secs(1) / u32::try_from(TRANSACTIONS_PER_SECOND).unwrap_or(u32::MAX);
    let mut tick = tokio::time::interval(period);
    tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let begun = Instant::now();
    let (mut count, mut late) = (0, Duration::ZERO);
    while begun.elapsed() < lasting {
        let due = tick.tick().await;
        late = due.elapsed();
        let new = (1 << 40) + count * WRITERS + writer;
        // Spread, and seldom the same twice.
        let old = (count * WRITERS + writer).wrapping_mul(2_654_435_761) % keys + 1;
        client.execute(&statement, &[&(new as i64), &(old as i64)]).await.map_err(refused)?;
        count += 1;
    }
    Ok((count, late))
}
