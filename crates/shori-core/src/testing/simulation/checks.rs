//! What must hold: at any time, and at the end.

use std::collections::BTreeSet;

use super::plan::Act;
use super::world::World;
use crate::position::{CaptureId, Position};
use crate::projection::TargetShape;
use crate::store::RunStatus;
use crate::testing::memory_database::commit_end;
use crate::testing::memory_store::MemoryStorage;
use crate::testing::memory_target::Status;
use crate::testing::model_projections::model_projections;
use crate::testing::oracle;

pub use crate::testing::oracle::Verdict;

fn durable(world: &World) -> Result<MemoryStorage, String> {
    world.parts.durable().map_err(|error| error.to_string())
}

/// The log holds what was committed.
pub fn log(world: &World) -> Verdict {
    oracle::check_log(&world.database, &durable(world)?)
}

/// The rows of a projection's target are what its checkpoint says, and the checkpoint is a place between two commits.
pub fn target(world: &World, projection: &str) -> Verdict {
    check_target(world, &durable(world)?, projection)
}

fn check_target(world: &World, storage: &MemoryStorage, projection: &str) -> Verdict {
    let Some(checkpoint) = storage.target(projection).and_then(|target| target.checkpoint) else { return Ok(()) };
    let places: BTreeSet<&Position> = checkpoint.positions.values().collect();
    if places.len() > 1 {
        return Err(format!("projection {projection} stands at several places of one timeline: {places:?}"));
    }
    if let Some(torn) = places.into_iter().find(|place| !is_boundary(place)) {
        return Err(format!("projection {projection} stands at {torn}, within a transaction"));
    }
    // As the oracle knows it, whatever words the transform has for it.
    let model = model_projections();
    let found = model.iter().find(|other| &*other.name == projection);
    found.map_or(Ok(()), |projection| oracle::check_target(&world.database, storage, projection))
}

/// How many versions a target holds, if it is one of versions.
pub fn versions(world: &World, projection: &str) -> Result<Option<usize>, String> {
    let target = durable(world)?.target(projection);
    let versions = target.filter(|target| target.target.shape == TargetShape::Versions);
    Ok(versions.map(|target| target.rows().len()))
}

/// Ends of commits and of snapshot chunks have the highest number there is.
fn is_boundary(position: &Position) -> bool {
    *position == Position::ZERO || position.seq.as_slice().ends_with(&[0xff; 4])
}

/// Everything that has been committed has reached every target, nothing stands still, and no change is kept.
pub fn is_caught_up(world: &World) -> Result<bool, String> {
    let storage = durable(world)?;
    let captures = storage.captures();
    let head = commit_end(world.database.head());
    let all = captures.len() == world.database.tables().len();
    let staged = captures
        .values()
        .all(|state| state.failed.is_none() && state.snapshot.is_done() && state.watermark.boundary >= head);
    if !all || !staged || !oracle::is_caught_up(&world.database, &storage, &world.projections) {
        return Ok(false);
    }
    let shown = world
        .projections
        .iter()
        .all(|projection| storage.target(&projection.name).is_some_and(|target| target.status == Status::Ok));
    Ok(shown && kept(world)? == 0)
}

fn kept(world: &World) -> Result<u64, String> {
    let kept = (0..world.plan.workers).map(|worker| world.parts.changes_kept(worker));
    kept.sum::<crate::Result<u64>>().map_err(|error| error.to_string())
}

/// What is not yet as [`is_caught_up`] wants it.
pub fn lag(world: &World) -> Result<String, String> {
    let storage = durable(world)?;
    let mut lag = format!("head {}, {} changes kept", commit_end(world.database.head()), kept(world)?);
    for (id, state) in storage.captures() {
        let (mark, failed) = (state.watermark, state.failed);
        lag.push_str(&format!("\n  {id}: {} {} {:?} {failed:?}", mark.staged, mark.boundary, state.snapshot.state));
    }
    for projection in &world.projections {
        let target = storage.target(&projection.name);
        let shown = target.as_ref().map(|target| (target.status, target.last_error.clone()));
        let checkpoint = target.and_then(|target| target.checkpoint).map(|checkpoint| checkpoint.positions);
        lag.push_str(&format!("\n  {}: {shown:?} {checkpoint:?}", projection.name));
    }
    Ok(lag)
}

/// Whether captures and projections that have nothing to do with `table` have come to commit `goal` (contract 11).
pub fn neighbours_reached(world: &World, table: &str, goal: u64) -> Result<bool, String> {
    let storage = durable(world)?;
    let goal = commit_end(goal);
    let captures = storage.captures();
    let stands = |id: &CaptureId| captures.get(id).is_none_or(|state| state.failed.is_some());
    let staged = captures.values().filter(|state| &*state.schema.table != table && state.failed.is_none());
    if !staged.map(|state| state.watermark.boundary).all(|boundary| boundary >= goal) {
        return Ok(false);
    }
    let neighbours = world.projections.iter().filter(|projection| {
        let tables = projection.tables();
        !tables.iter().any(|read| &**read == table || stands(&world.database.capture(read)))
    });
    let reached = neighbours.map(|projection| {
        let checkpoint = storage.target(&projection.name).and_then(|target| target.checkpoint);
        checkpoint.is_some_and(|checkpoint| checkpoint.positions.values().all(|position| *position >= goal))
    });
    Ok(reached.into_iter().all(|reached| reached))
}

/// Everything, when nothing runs any more.
pub fn at_the_end(world: &World) -> Verdict {
    let storage = durable(world)?;
    oracle::check_log(&world.database, &storage)?;
    for projection in &world.projections {
        check_target(world, &storage, &projection.name)?;
        let Some(target) = storage.target(&projection.name) else { continue };
        if let Some(error) = target.last_error {
            return Err(format!("projection {} still shows the error {error}", projection.name));
        }
    }
    rejected(world, &storage)?;
    match storage.runs().into_iter().find(|run| run.ended.is_none() || run.status == RunStatus::Running) {
        Some(run) => Err(format!("run {} was never closed", run.run_id)),
        None => Ok(()),
    }
}

/// Messages that could not be decoded are kept, each once (contract 7).
fn rejected(world: &World, storage: &MemoryStorage) -> Verdict {
    // Whoever jumps to a later place after a gap or a break need not bring what he handed out before, and what came for
    // a capture that stands still may come again.
    if world.plan.acts.iter().any(|act| matches!(act, Act::Break { .. } | Act::Overtake)) {
        return Ok(());
    }
    let mut kept: Vec<Position> = storage.rejected().iter().map(|rejected| rejected.position).collect();
    let count = kept.len();
    kept.sort();
    kept.dedup();
    if kept.len() < count {
        return Err("a rejected message is kept twice".into());
    }
    let lowest = storage.captures().values().map(|state| state.watermark.staged).min().unwrap_or(Position::ZERO);
    let lost = world.handed_out.up_to(&lowest).into_iter().find(|position| kept.binary_search(position).is_err());
    lost.map_or(Ok(()), |lost| Err(format!("the rejected message at {lost} is kept nowhere")))
}
