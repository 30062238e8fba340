//! What is done to the pipeline while it runs: by the application, by people, and by bad luck.

use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use tokio::task::JoinSet;

use super::checks;
use super::plan::Act;
use super::world::World;
use crate::testing::memory_database::Write;
use crate::testing::transactions::commit_random;
use crate::testing::value::{Value, row};

/// Longest time that a request may take while its process lives.
const REQUEST_LIMIT: Duration = Duration::from_secs(600);
/// Longest time that neighbours of a broken table may need to reach a place.
const NEIGHBOUR_LIMIT: Duration = Duration::from_secs(300);
/// How often somebody looks whether a capture stands still.
const REPAIR_PAUSE: Duration = Duration::from_millis(1_700);

/// Runs through the plan.
pub async fn perform(world: &Arc<World>, rng: &mut ChaCha8Rng) {
    let mut requests = JoinSet::new();
    for act in world.plan.acts.clone() {
        if world.failed.is_cancelled() {
            return;
        }
        if rng.random_range(0..3) == 0 {
            let most = world.plan.pause.as_millis() as u64;
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..=most))).await;
        }
        perform_act(world, act, rng, &mut requests);
        while requests.try_join_next().is_some() {}
    }
    while requests.join_next().await.is_some() {}
}

fn perform_act(world: &Arc<World>, act: Act, rng: &mut ChaCha8Rng, requests: &mut JoinSet<()>) {
    if act != Act::Commit {
        world.faults.note(&format!("{act:?}"));
    }
    let table = |table: usize| world.database.tables()[table].table.clone();
    match act {
        Act::Commit => commit(world, rng),
        Act::Crash { worker, steps } => {
            if let Some(process) = world.process(worker) {
                process.faults.crash_after(steps);
            }
        }
        Act::Stop { worker } => {
            if let Some(process) = world.process(worker) {
                process.handle.stop.cancel();
            }
        }
        Act::Resnapshot { table: index } => {
            requests.spawn(request(world.clone(), Request::Resnapshot(table(index))));
        }
        Act::Rebuild { projection } => {
            let name = world.projections[projection].name.clone();
            requests.spawn(request(world.clone(), Request::Rebuild(name)));
        }
        Act::Compact => drop(requests.spawn(request(world.clone(), Request::Compact))),
        Act::Break { table: index } => drop(requests.spawn(break_table(world.clone(), table(index)))),
        Act::Overtake => world.overtake(),
    }
}

/// One transaction of the application. Now and then, one row of the table that is idle otherwise.
pub fn commit(world: &World, rng: &mut ChaCha8Rng) {
    let commit = match rng.random_range(0..32) {
        0 => {
            let head = world.database.head();
            let note = row([Value::Integer(head as i64), "noted".into()]);
            world
                .database
                .commit(world.database.commit_time(head) + 1, &[Write::Insert { table: "notes".into(), row: note }])
        }
        _ => commit_random(&world.database, &world.plan.shape, rng),
    };
    world.faults.note(&format!("commit {commit}"));
}

enum Request {
    Resnapshot(Arc<str>),
    Rebuild(Arc<str>),
    Compact,
}

/// Asks some process, and expects an answer while it lives.
async fn request(world: Arc<World>, request: Request) {
    let processes = world.processes();
    if processes.is_empty() {
        return;
    }
    let process = processes[world.faults.draw(processes.len() as u64) as usize].clone();
    let answer = async {
        match &request {
            // A process that has not read the captures yet refuses.
            Request::Resnapshot(table) => drop(process.handle.resnapshot(table, false).await),
            Request::Rebuild(projection) => drop(process.handle.rebuild(projection).await),
            Request::Compact => drop(process.handle.compact().await),
        }
    };
    tokio::select! {
        biased;
        () = process.faults.crashed() => {}
        answered = tokio::time::timeout(REQUEST_LIMIT, answer) => {
            let what = match &request {
                Request::Resnapshot(table) => format!("resnapshot {table}"),
                Request::Rebuild(projection) => format!("rebuild {projection}"),
                Request::Compact => "compact".into(),
            };
            match answered {
                Ok(()) => world.faults.note(&format!("answered {what}")),
                Err(_) => {
                    let lag = checks::lag(&world).unwrap_or_default();
                    world.fail(format!("{what} was never answered: {lag}"));
                }
            }
        }
    }
}

/// A table breaks; its neighbours must go on until somebody mends it (contract 11).
async fn break_table(world: Arc<World>, table: Arc<str>) {
    let known = match world.parts.durable() {
        Ok(storage) => storage.captures(),
        Err(error) => return world.fail(error.to_string()),
    };
    if known.len() < world.database.tables().len() || world.database.is_broken(&table, u64::MAX) {
        return;
    }
    world.break_table(&table);
    tokio::time::sleep(world.plan.pause * 4).await;
    let goal = world.database.head();
    let reached = async {
        loop {
            match checks::neighbours_reached(&world, &table, goal) {
                Ok(false) => tokio::time::sleep(Duration::from_millis(500)).await,
                Ok(true) => return,
                Err(error) => return world.fail(error),
            }
        }
    };
    if tokio::time::timeout(NEIGHBOUR_LIMIT, reached).await.is_err() {
        let lag = checks::lag(&world).unwrap_or_default();
        world.fail(format!("neighbours of {table} stand still with it: {lag}"));
    }
    world.faults.note(&format!("mend {table}"));
    world.mend_table(&table);
}

/// Reads captures anew that stand still.
pub async fn repair(world: Arc<World>) {
    loop {
        tokio::time::sleep(REPAIR_PAUSE).await;
        let captures = match world.parts.durable() {
            Ok(storage) => storage.captures(),
            Err(error) => return world.fail(error.to_string()),
        };
        for (capture, state) in captures {
            if state.failed.is_none() || world.is_held(&capture.instance) {
                continue;
            }
            if !world.plan.settings.ingest.once {
                request(world.clone(), Request::Resnapshot(state.schema.table.clone())).await;
            } else {
                // A process that runs once may end before it would look at requests.
                let requested = match world.parts.store() {
                    Ok(store) => store.request_snapshot(&capture, false).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = requested {
                    return world.fail(error.to_string());
                }
            }
        }
    }
}
