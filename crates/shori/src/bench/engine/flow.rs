//! The whole demo pipeline over the large state, while the generator, a process of its own, writes at a given rate.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use shori_core::event::Events;
use shori_core::pipeline::Handle;
use shori_core::position::Position;
use shori_core::project::Progress;
use shori_core::{Error, ErrorKind, Result};

use crate::assemble;
use crate::bench::watch::{Seen, Watch};
use crate::bench::{Place, drive};
use crate::config::Loaded;
use crate::systems;

use super::world::World;

/// Changes per second.
pub(super) const RATE: u64 = 5_000;
/// A pipeline that is so far behind when the generator ends does not keep up.
const CATCH_UP_MAX: Duration = Duration::from_secs(120);

/// What a run under load brought.
#[derive(Debug)]
pub(super) struct Flow {
    pub seen: Seen,
    pub generated: u64,
    /// Seconds by which the generator missed its rate.
    pub late_seconds: f64,
    /// Seconds from the generator's end until all was projected; `None` if that took too long.
    pub caught_up_seconds: Option<f64>,
}

/// What `shori generate --json` prints, as far as it matters here.
#[derive(Deserialize)]
struct Generated {
    changes: u64,
    late_seconds: f64,
}

/// Measures for `measured` after `warm_up`.
pub(super) async fn run(place: &Place, warm_up: Duration, measured: Duration) -> Result<Flow> {
    let loaded = World::loaded(place)?;
    let opened = assemble::open(&loaded)?;
    let watch = Arc::new(Watch::new(loaded.config.projections.len()));
    let watching = watch.clone();
    let events = Events::new(move |event| watching.listen(event));
    let prepared = assemble::pipeline(&loaded, &opened, false, events)?.prepare();
    let handle = prepared.handle();
    let running = tokio::spawn(prepared.run());
    let driven = drive(&loaded, &handle, &watch, warm_up, measured).await;
    handle.stop.cancel();
    let ran = running.await.map_err(|cause| Error::new(ErrorKind::Internal, "finish", "the pipeline", cause))?;
    ran.and(driven)
}

async fn drive(loaded: &Loaded, handle: &Handle, watch: &Watch, warm_up: Duration, measured: Duration) -> Result<Flow> {
    handle.ready().await?;
    let changes = (RATE as f64 * (warm_up + measured).as_secs_f64()) as u64;
    let generator = generate(loaded, changes)?;
    tokio::time::sleep(warm_up).await;
    watch.begin();
    let generated = tokio::task::spawn_blocking(move || finished(generator)).await;
    let generated = generated.map_err(|cause| Error::new(ErrorKind::Internal, "finish", "generating", cause))??;
    let ended = tokio::time::Instant::now();
    let end = shori_sqlite::log_end(&systems::sqlite_config(loaded, &loaded.config.sources[0]))?;
    let caught_up = tokio::time::timeout(CATCH_UP_MAX, projected(handle, end)).await;
    let caught_up_seconds = match caught_up {
        Ok(shown) => shown.map(|()| Some(ended.elapsed().as_secs_f64()))?,
        Err(_) => None,
    };
    Ok(Flow {
        seen: watch.seen(),
        generated: generated.changes,
        late_seconds: generated.late_seconds,
        caught_up_seconds,
    })
}

/// A state that was measured before has a seed of its own: the same choices again would change nothing, a customer being in
/// the segment already to which it moves.
fn generate(loaded: &Loaded, changes: u64) -> Result<Child> {
    let newest = "select coalesce(max(order_id), 0) from orders";
    let seed: i64 =
        drive::open_source(loaded)?.query_row(newest, [], |row| row.get(0)).map_err(drive::source_error("look at"))?;
    let fail = |cause| Error::new(ErrorKind::Refused, "start", "the generator", cause);
    let program = std::env::current_exe().map_err(fail)?;
    let (rate, changes, seed) = (RATE.to_string(), changes.to_string(), seed.to_string());
    Command::new(program)
        .args(["generate", "--json", "--rate", &rate, "--changes", &changes, "--seed", &seed, "--dir"])
        .arg(&loaded.base)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(fail)
}

fn finished(generator: Child) -> Result<Generated> {
    let fail =
        |cause: Box<dyn std::error::Error + Send + Sync>| Error::new(ErrorKind::Refused, "run", "the generator", cause);
    let output = generator.wait_with_output().map_err(|cause| fail(cause.into()))?;
    if !output.status.success() {
        return Err(fail(format!("it ended with {}", output.status).into()));
    }
    serde_json::from_slice(&output.stdout).map_err(|cause| fail(cause.into()))
}

/// Returns when every projection shows everything up to `end`, or when the pipeline ends.
async fn projected(handle: &Handle, end: Position) -> Result<()> {
    let shown = |progress: &Progress| {
        let mut checkpoints = progress.checkpoints.values();
        checkpoints.all(|checkpoint| checkpoint.as_ref().is_some_and(|at| at.values().all(|at| at.lsn >= end.lsn)))
    };
    let mut progress = handle.progress.clone();
    tokio::select! {
        biased;
        _ = handle.stop.cancelled() => Ok(()),
        // When the pipeline has ended by itself, its own error tells why.
        _ = progress.wait_for(shown) => Ok(()),
    }
}
