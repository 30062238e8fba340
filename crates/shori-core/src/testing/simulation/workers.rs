//! A worker's life: one process after another, each with the production pipeline in it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::plan::{CacheFate, rng_of};
use super::source::SimulatedSource;
use super::world::{Process, World};
use crate::error::Result;
use crate::event::Events;
use crate::pipeline::{Pipeline, Prepared};
use crate::projection::Projection;
use crate::testing::faults::Faults;
use crate::testing::memory_source::MemorySource;

/// Longest time from the wish that a process ends to its end.
const STOP_LIMIT: Duration = Duration::from_secs(120);
/// Turns that tasks of a dropped process may need to be dropped too.
const DROP_TURNS: usize = 4;

/// Runs processes until the world ends.
pub async fn live(world: Arc<World>, worker: usize) {
    let mut rng = rng_of(world.seed, 100 + worker as u64);
    for process in 0.. {
        if world.ending.is_cancelled() {
            return;
        }
        let faults = world.faults.process();
        world.note(worker, || format!("starts process {process}"));
        let run_id = format!("{worker}-{process}");
        let configured = configured(&world, &mut rng);
        run(&world, worker, &run_id, &faults, configured).await;
        world.set_process(worker, None);
        for _ in 0..DROP_TURNS {
            tokio::task::yield_now().await;
        }
        if faults.has_crashed() {
            world.crashes.fetch_add(1, Ordering::Relaxed);
        }
        let fate = CacheFate::draw(&mut rng);
        world.note(worker, || format!("ended, its cache is {fate:?}"));
        world.parts.end(worker, fate);
        let pause = Duration::from_millis(rng.random_range(0..500));
        tokio::select! { biased; () = world.ending.cancelled() => {}, () = tokio::time::sleep(pause) => {} }
    }
}

/// The projections of the next process: now and then somebody leaves some out for a while.
fn configured(world: &World, rng: &mut ChaCha8Rng) -> Vec<Projection> {
    let some = world.plan.leaves_out && !world.settling.is_cancelled() && rng.random_range(0..2) == 0;
    world.projections.iter().filter(|_| !some || rng.random_range(0..2) == 0).cloned().collect()
}

async fn run(world: &Arc<World>, worker: usize, run_id: &str, faults: &Faults, projections: Vec<Projection>) {
    let is_partial = projections.len() < world.projections.len();
    let prepared = match prepare(world, worker, run_id, faults, projections) {
        Ok(prepared) => prepared,
        Err(error) => return world.fail(format!("worker {worker} cannot open its parts: {error}")),
    };
    let handle = prepared.handle();
    let stop = handle.stop.clone();
    world.set_process(worker, Some(Process { handle, faults: faults.clone() }));
    let overdue = async {
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = world.settling.cancelled(), if is_partial => stop.cancel(),
        }
        tokio::time::sleep(STOP_LIMIT).await;
    };
    tokio::select! {
        biased;
        () = faults.crashed() => {}
        () = overdue => world.fail(format!("worker {worker} did not end when told to")),
        result = prepared.run() => match result {
            Ok(()) => world.note(worker, || "ends by itself".into()),
            // With `once`, a projection that cannot move is what there is to tell.
            Err(error) if world.plan.settings.project.once && error.to_string().contains("stands still") => {
                world.note(worker, || format!("ends with {error}"));
            }
            Err(error) => world.fail(format!("worker {worker} ended: {error}")),
        },
    }
}

fn prepare(
    world: &Arc<World>,
    worker: usize,
    run_id: &str,
    faults: &Faults,
    projections: Vec<Projection>,
) -> Result<Prepared> {
    let (store, transform) = world.parts.start(worker, faults)?;
    let source = SimulatedSource {
        inner: MemorySource::new(&world.database, faults.clone(), world.plan.habits),
        database: world.database.clone(),
        rejects: world.plan.rejects,
        rejecting: world.database.capture("notes"),
        handed_out: world.handed_out.clone(),
        prunes: world.plan.prunes,
    };
    let observer = world.clone();
    let pipeline = Pipeline {
        name: format!("worker {worker}"),
        run_id: run_id.into(),
        sources: vec![Box::new(source)],
        staging: store.clone(),
        transform,
        projections: projections.into_iter().map(|projection| (projection, store.clone())).collect(),
        settings: world.plan.settings,
        events: Events::new(move |event| observer.observe(worker, event)),
    };
    Ok(pipeline.prepare())
}
