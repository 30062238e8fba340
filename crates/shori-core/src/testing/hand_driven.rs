//! Drives source, store and transform by hand, one step after another: the plainest pipeline there is. It shows that
//! the parts fit each other before the engine is trusted with them.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt;

use super::model_projections::target_of;
use crate::change::ChangeBatch;
use crate::error::Result;
use crate::position::{CaptureId, Position, Positions, Watermark};
use crate::projection::Projection;
use crate::source::{BatchLimit, Resume, SnapshotState, Source};
use crate::store::{Append, Appended, CaptureState, Committed, LogStream, OutputCommit, Store};
use crate::transform::{Applied, CaptureAdvance, Computed, LogReader, StateTable, Transform};

/// Hands log streams to a transform, one after another.
pub struct LogStreams(Vec<LogStream>);

impl LogStreams {
    pub fn new(mut streams: Vec<LogStream>) -> Self {
        streams.reverse();
        Self(streams)
    }
}

#[async_trait]
impl LogReader for LogStreams {
    async fn next(&mut self) -> Result<Option<ChangeBatch>> {
        while let Some(stream) = self.0.last_mut() {
            match stream.next().await {
                Some(batch) => return batch.map(Some),
                None => drop(self.0.pop()),
            }
        }
        Ok(None)
    }
}

/// Starts the source where the store stands, and appends until nothing more is known to wait.
pub async fn ingest(source: &mut dyn Source, store: &dyn Store, limit: BatchLimit) -> Result<()> {
    let timeline = source.timeline();
    let known = store.captures().await?;
    let furthest = known.values().map(|state| state.watermark).max_by_key(|mark| mark.staged);
    let resume = known.iter().map(|(id, state)| {
        let watermark = if state.failed.is_some() { furthest.unwrap_or(state.watermark) } else { state.watermark };
        let schema = (watermark != Watermark::ZERO).then(|| state.schema.clone());
        (id.clone(), Resume { watermark, snapshot: state.snapshot.clone(), schema })
    });
    let started = source.start(&resume.collect()).await?;
    store.prepare_captures(&timeline, &started.identity, &started.captures).await?;
    let known = store.captures().await?;
    for (id, error) in started.failed.iter().filter(|(id, _)| known.contains_key(id)) {
        store.mark_failed(id, &error.to_string()).await?;
    }
    let known = store.captures().await?;
    let active = known
        .iter()
        .filter(|(id, state)| state.failed.is_none() && started.captures.iter().any(|capture| capture.id == **id));
    let mut expected: BTreeMap<CaptureId, Position> =
        active.map(|(id, state)| (id.clone(), state.watermark.staged)).collect();
    loop {
        let mut batch = source.next(limit).await?;
        for (id, error) in std::mem::take(&mut batch.failed) {
            store.mark_failed(&id, &error.to_string()).await?;
            expected.remove(&id);
        }
        batch.changes.retain(|changes| expected.contains_key(&changes.capture));
        batch.snapshots.retain(|(id, _)| expected.contains_key(id));
        let append = Append {
            timeline: &timeline,
            expected: &expected,
            changes: &batch.changes,
            watermark: batch.watermark,
            snapshots: &batch.snapshots,
            schemas: &batch.schemas,
            rejected: &batch.rejected,
        };
        if store.append(&append).await? == Appended::Conflict {
            return Ok(());
        }
        for staged in expected.values_mut() {
            *staged = batch.watermark.staged.max(*staged);
        }
        source.acknowledge(&batch.watermark.staged).await?;
        if !batch.more {
            return Ok(());
        }
    }
}

/// Applies the log to state up to `goal` (or what is staged), stopping where a snapshot begins or ends.
pub async fn advance(store: &dyn Store, transform: &dyn Transform, goal: Option<&Positions>) -> Result<()> {
    let captures = store.captures().await?;
    let torn = |(id, applied): (&CaptureId, &Applied)| applied.position < captures[id].horizon;
    if transform.applied().await?.iter().any(torn) {
        // What it would read next is not what followed, but what compaction left of it.
        transform.discard().await?;
    }
    loop {
        let applied = transform.applied().await?;
        let mut advances = Vec::new();
        let mut streams = Vec::new();
        for (id, state) in &captures {
            let from = applied.get(id).map_or(Position::ZERO, |applied| applied.position);
            let cutoff = goal.and_then(|goal| goal.get(id).copied()).unwrap_or(state.watermark.boundary);
            if from < cutoff {
                let advance = next_advance(id, state, from, cutoff);
                streams.push(store.read_log(id, &from, &advance.to.position).await?);
                advances.push(advance);
            }
        }
        if advances.is_empty() {
            return Ok(());
        }
        transform.advance(&advances, &mut LogStreams::new(streams)).await?;
    }
}

fn next_advance(id: &CaptureId, state: &CaptureState, from: Position, cutoff: Position) -> CaptureAdvance {
    let mut generation = 0;
    let (mut to, mut sweep) = (cutoff, None);
    for snapshot in state.earlier_snapshots.iter().chain([&state.snapshot]) {
        if snapshot.state == SnapshotState::Requested {
            continue;
        }
        if snapshot.start <= from {
            generation = snapshot.generation;
        } else if snapshot.start < to {
            (to, sweep) = (snapshot.start, None);
        }
        if snapshot.is_done() && snapshot.end > from && snapshot.end <= to {
            (to, sweep) = (snapshot.end, Some(snapshot.end_time));
        }
    }
    let to = Applied { position: to, time: state.watermark.boundary_time };
    CaptureAdvance { capture: id.clone(), to, generation, sweep }
}

/// Prepares targets and cache; call it first, and after each crash.
pub async fn open(store: &dyn Store, transform: &dyn Transform, projections: &[Projection]) -> Result<()> {
    let id = store.bootstrap().await?;
    let captures = store.captures().await?;
    let table =
        |(id, state): (&CaptureId, &CaptureState)| StateTable { capture: id.clone(), schema: state.schema.clone() };
    let tables: Vec<StateTable> = captures.iter().map(table).collect();
    transform.open(&id, &tables, projections).await?;
    let schemas = captures.iter().map(|(id, state)| (id.clone(), state.schema.clone())).collect();
    for projection in projections {
        let columns = transform.describe(&projection.name).await?;
        store.prepare_target(&target_of(projection, columns, &schemas)).await?;
        let checkpoint = store.checkpoint(&projection.name).await?;
        transform.settle(&projection.name, checkpoint.as_ref().map(|checkpoint| &checkpoint.positions)).await?;
    }
    Ok(())
}

/// Takes one projection's target to where state is.
pub async fn project(store: &dyn Store, transform: &dyn Transform, projection: &Projection) -> Result<()> {
    let captures = store.captures().await?;
    let schemas = captures.iter().map(|(id, state)| (id.clone(), Arc::clone(&state.schema))).collect();
    let target = target_of(projection, transform.describe(&projection.name).await?, &schemas);
    let name = &*projection.name;
    loop {
        let checkpoint = store.checkpoint(name).await?.map(|checkpoint| checkpoint.positions);
        let (positions, as_of_time, mut reader) = match transform.compute(name, checkpoint.as_ref()).await? {
            Computed::UpToDate => return Ok(()),
            Computed::Behind => {
                advance(store, transform, checkpoint.as_ref()).await?;
                continue;
            }
            Computed::NeedsReplay => {
                transform.discard().await?;
                advance(store, transform, Some(checkpoint.as_ref().unwrap_or(&Positions::new()))).await?;
                transform.settle(name, checkpoint.as_ref()).await?;
                continue;
            }
            Computed::Output { positions, as_of_time, reader } => (positions, as_of_time, reader),
        };
        let horizon = target.captures.iter().filter_map(|id| captures.get(id)).map(|state| state.horizon).max();
        let committed = store
            .commit_output(OutputCommit {
                target: &target,
                expected: checkpoint.as_ref(),
                checkpoint: &positions,
                as_of_lsn: positions.values().next().map(|position| position.lsn),
                as_of_time,
                horizon: horizon.unwrap_or(Position::ZERO),
                complete: true,
                run_id: "by hand",
                output: reader.as_mut(),
            })
            .await?;
        assert_ne!(committed, Committed::Conflict, "nobody else writes");
        return transform.settle(name, Some(&positions)).await;
    }
}

/// Everything once: reads what there is, applies it, and projects it, except where `skips` says so.
pub async fn round(
    source: &mut dyn Source,
    store: &dyn Store,
    transform: &dyn Transform,
    projections: &[Projection],
    limit: BatchLimit,
    forget: bool,
    mut skips: impl FnMut() -> bool + Send,
) -> Result<()> {
    store.bootstrap().await?;
    ingest(source, store, limit).await?;
    open(store, transform, projections).await?;
    advance(store, transform, None).await?;
    let mut checkpoints = Vec::new();
    for projection in projections {
        if !skips() {
            project(store, transform, projection).await?;
        }
        let checkpoint = store.checkpoint(&projection.name).await?;
        checkpoints.push(checkpoint.map_or_else(Positions::new, |checkpoint| checkpoint.positions));
    }
    if forget { transform.forget(&checkpoints).await } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::testing::faults::{FaultPlan, Faults};
    use crate::testing::memory_database::MemoryDatabase;
    use crate::testing::memory_source::{MemorySource, SourceHabits};
    use crate::testing::memory_store::MemoryStorage;
    use crate::testing::memory_transform::MemoryCache;
    use crate::testing::model_projections::model_projections;
    use crate::testing::oracle;
    use crate::testing::transactions::{TransactionShape, commit_random, model_tables};

    struct World {
        database: MemoryDatabase,
        storage: MemoryStorage,
        cache: MemoryCache,
        projections: Vec<Projection>,
        faults: Faults,
    }

    impl World {
        /// Everything once, in a process that may end at any step.
        async fn round(&self, faults: &Faults, rows: usize, forget: bool) -> Result<()> {
            let store = self.storage.open(faults.clone());
            let transform = self.cache.open(faults.clone());
            let mut source = MemorySource::new(&self.database, faults.clone(), SourceHabits::ROUGH);
            let limit = BatchLimit { rows, bytes: 1 << 20 };
            round(&mut source, &store, &transform, &self.projections, limit, forget, || faults.draw(4) == 0).await
        }
    }

    async fn run(seed: u64) -> u64 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let world = World {
            database: MemoryDatabase::new("shop", model_tables()),
            storage: MemoryStorage::new("store"),
            cache: MemoryCache::default(),
            projections: model_projections(),
            faults: Faults::seeded(seed, FaultPlan { errors: 5, ..FaultPlan::NONE }),
        };
        let shape = TransactionShape::default();
        for _ in 0..rng.random_range(0..6) {
            commit_random(&world.database, &shape, &mut rng);
        }
        for round in 0..12 {
            let faults = world.faults.process();
            if rng.random_range(0..3) == 0 {
                faults.crash_after(rng.random_range(0..150));
            }
            for _ in 0..rng.random_range(0..6) {
                commit_random(&world.database, &shape, &mut rng);
            }
            let rows = rng.random_range(1..20);
            let forget = rng.random_range(0..2) == 0;
            tokio::select! {
                biased;
                () = faults.crashed() => {}
                result = world.round(&faults, rows, forget) => {
                    if let Err(error) = result {
                        assert_eq!(error.kind(), crate::ErrorKind::Unavailable, "seed {seed}: {error}");
                    }
                }
            }
            oracle::assert_right(
                &world.database,
                &world.storage,
                &world.projections,
                &format!("seed {seed} round {round}"),
            );
            disturb(&world, &mut rng).await;
        }
        world.faults.set_plan(FaultPlan::NONE);
        for _ in 0..20 {
            world.round(&world.faults.process(), 50, false).await.unwrap();
        }
        oracle::assert_right(&world.database, &world.storage, &world.projections, &format!("seed {seed} at the end"));
        assert!(
            oracle::is_caught_up(&world.database, &world.storage, &world.projections),
            "seed {seed}: {:?}",
            world.storage.captures()
        );
        world.faults.fingerprint()
    }

    /// What people and retention do meanwhile.
    async fn disturb(world: &World, rng: &mut ChaCha8Rng) {
        let store = world.storage.open(Faults::none());
        let captures = world.storage.captures();
        for (id, state) in &captures {
            let dice = rng.random_range(0..24);
            if dice == 0 || state.failed.is_some() && dice < 12 {
                store.request_snapshot(id, false).await.unwrap();
            }
        }
        if rng.random_range(0..12) == 0 {
            world.database.prune(world.database.head());
        }
        if rng.random_range(0..12) == 0 {
            let projection = &world.projections[rng.random_range(0..world.projections.len())];
            store.reset_projection(&projection.name).await.unwrap();
        }
        if rng.random_range(0..12) == 0 {
            world.cache.open(Faults::none()).discard().await.unwrap();
        }
        for (id, state) in &captures {
            if rng.random_range(0..8) > 0 {
                continue;
            }
            let readers =
                world.projections.iter().filter(|projection| projection.tables().contains(&state.schema.table));
            let reached = readers.map(|projection| {
                let checkpoint = world.storage.target(&projection.name).and_then(|target| target.checkpoint);
                checkpoint.and_then(|checkpoint| checkpoint.positions.get(id).copied()).unwrap_or(Position::ZERO)
            });
            let horizon = reached.chain([state.watermark.boundary]).min().unwrap();
            store.compact(id, &horizon, rng.random()).await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn parts_driven_by_hand_agree_with_the_oracle() {
        let seeds = std::env::var("SHORI_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(100);
        let first = std::env::var("SHORI_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0);
        for seed in first..first + seeds {
            run(seed).await;
        }
        assert_eq!(run(3).await, run(3).await, "a seed gives one run");
    }
}
