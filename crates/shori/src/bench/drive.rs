//! The production parts of a pipeline, driven step by step, so that each can be timed.
//!
//! Calls are those of [`shori_core::ingest`] and [`shori_core::project`], in their order; only the waiting between them
//! is left out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::StreamExt;
use shori_core::change::ChangeBatch;
use shori_core::event::{Event, Events};
use shori_core::ingest::{Ingestor, LogState};
use shori_core::pipeline::Pipeline;
use shori_core::position::{CaptureId, Position, Positions};
use shori_core::projection::{Derivation, Projection, Target, TargetShape};
use shori_core::recent::Recent;
use shori_core::store::{CaptureState, Committed, LogStream, OutputCommit, Store};
use shori_core::transform::{Applied, Computed, LogReader, StateTable};
use shori_core::{Error, ErrorKind, Result, step};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::assemble::{self, Opened};
use crate::cli;
use crate::config::Loaded;
use crate::systems;

/// The demo pipeline in `folder`: its sample tables and capture are made if missing.
pub fn demo(folder: &Path) -> Result<Loaded> {
    let loaded = Loaded::demo(folder)?;
    sample(&loaded)?;
    install(&loaded)?;
    Ok(loaded)
}

/// Creates the sample tables, without capture.
pub fn sample(loaded: &Loaded) -> Result<()> {
    let script = loaded.config.pipeline.sample.as_ref().map(|file| loaded.read(file)).transpose()?.unwrap_or_default();
    let connection = open_source(loaded)?;
    connection.execute_batch(&script).map_err(source_error("create the sample tables of"))
}

pub fn install(loaded: &Loaded) -> Result<()> {
    for source in &loaded.config.sources {
        shori_sqlite::install(&systems::sqlite_config(loaded, source))?;
    }
    Ok(())
}

/// The application's connection to the source.
pub fn open_source(loaded: &Loaded) -> Result<rusqlite::Connection> {
    let path = loaded.resolve(loaded.config.sources[0].file());
    let open = || {
        let connection = rusqlite::Connection::open(&path)?;
        connection.busy_timeout(Duration::from_secs(60))?;
        connection.pragma_update(None, "synchronous", "normal")?;
        Ok(connection)
    };
    open().map_err(source_error("open"))
}

pub fn source_error(operation: &'static str) -> impl Fn(rusqlite::Error) -> Error {
    move |cause| Error::new(ErrorKind::Refused, operation, "the benchmark's SQLite file", cause)
}

/// Reads everything that the source holds into the log, by the production ingestor, and ends. Returns the changes
/// appended, rows of snapshots left out.
pub async fn ingest(loaded: &Loaded, pipeline: &Pipeline) -> Result<u64> {
    let mut changes = 0;
    for source in assemble::sources(loaded)? {
        let counted = Arc::new(AtomicU64::new(0));
        let counter = counted.clone();
        let events = Events::new(move |event| {
            if let Event::Appended { commits, .. } = event {
                counter.fetch_add(commits.iter().map(|run| run.rows).sum(), Ordering::Relaxed);
            }
        });
        let (log, _log) = watch::channel(LogState::default());
        let (_requests, requests) = mpsc::channel(1);
        let (staging, settings) = (pipeline.staging.clone(), pipeline.settings.ingest);
        let ingestor = Ingestor::new(source, staging, Recent::default(), Arc::new(log), requests, events, settings);
        ingestor.run(CancellationToken::new()).await?;
        changes += counted.load(Ordering::Relaxed);
    }
    Ok(changes)
}

/// The whole pipeline until it is level with its sources. Must not be called from asynchronous code.
pub fn run_once(loaded: &Loaded) -> Result<()> {
    let opened = assemble::open(loaded)?;
    let events = Events::new(|event| {
        if let Event::ProjectionFailed { projection, reason } = event {
            eprintln!("  {projection}: {reason}");
        }
    });
    cli::block_on(assemble::pipeline(loaded, &opened, true, events)?.prepare().run())
}

/// Log, state and targets of a pipeline whose sources stand still.
pub struct Engine {
    pub opened: Opened,
    pub pipeline: Pipeline,
    captures: BTreeMap<CaptureId, CaptureState>,
    applied: BTreeMap<CaptureId, Applied>,
    targets: Vec<(Target, Option<Positions>)>,
}

/// How long the parts of one output took.
#[derive(Clone, Copy, Debug, Default)]
pub struct OutputTimes {
    pub compute: Duration,
    pub commit: Duration,
    pub settle: Duration,
    pub rows: u64,
}

impl Engine {
    /// Opens files and cache, and settles every projection at its checkpoint. The log must hold the captures.
    pub async fn open(loaded: &Loaded) -> Result<Self> {
        let opened = assemble::open(loaded)?;
        let pipeline = assemble::pipeline(loaded, &opened, true, Events::nowhere())?;
        let store_id = pipeline.staging.bootstrap().await?;
        let captures = pipeline.staging.captures().await?;
        let table =
            |(id, state): (&CaptureId, &CaptureState)| StateTable { capture: id.clone(), schema: state.schema.clone() };
        let tables: Vec<StateTable> = captures.iter().map(table).collect();
        let projections: Vec<Projection> = pipeline.projections.iter().map(|(known, _)| known.clone()).collect();
        pipeline.transform.open(&store_id, &tables, &projections).await?;
        let applied = pipeline.transform.applied().await?;
        let mut engine = Self { opened, pipeline, captures, applied, targets: Vec::new() };
        for (projection, store) in &engine.pipeline.projections {
            let target = engine.target(projection, &tables).await?;
            store.bootstrap().await?;
            store.prepare_target(&target).await?;
            let checkpoint = store.checkpoint(&target.projection).await?.map(|checkpoint| checkpoint.positions);
            engine.pipeline.transform.settle(&target.projection, checkpoint.as_ref()).await?;
            engine.targets.push((target, checkpoint));
        }
        Ok(engine)
    }

    async fn target(&self, projection: &Projection, tables: &[StateTable]) -> Result<Target> {
        let reads = projection.tables();
        let captures = tables.iter().filter(|table| reads.contains(&table.schema.table));
        let key_of = |name: &str| {
            let table = tables.iter().find(|table| &*table.schema.table == name);
            table.map(|table| table.schema.key_names().into_iter().map(String::from).collect()).unwrap_or_default()
        };
        let (shape, key) = match &projection.derivation {
            Derivation::Sql(sql) => (TargetShape::Rows, sql.key.clone()),
            Derivation::Latest { table } => (TargetShape::Rows, key_of(table)),
            Derivation::History(history) => (TargetShape::Versions, history.key.clone()),
        };
        Ok(Target {
            projection: projection.name.clone(),
            shape,
            key,
            columns: self.pipeline.transform.describe(&projection.name).await?,
            definition: projection.definition(),
            keeps_tombstones: projection.keeps_tombstones(),
            captures: captures.map(|table| table.capture.clone()).collect(),
        })
    }

    /// Names of the key columns of a captured table.
    pub fn key_of(&self, table: &str) -> Vec<String> {
        let found = self.captures.values().find(|state| &*state.schema.table == table);
        found.map(|state| state.schema.key_names().into_iter().map(String::from).collect()).unwrap_or_default()
    }

    /// Names of the projections, in their order.
    pub fn projections(&self) -> Vec<String> {
        self.targets.iter().map(|(target, _)| target.projection.to_string()).collect()
    }

    /// Looks again at how far the log reaches.
    pub async fn look(&mut self) -> Result<()> {
        self.captures = self.pipeline.staging.captures().await?;
        Ok(())
    }

    /// Brings state to the cutoff. Returns the changes read.
    pub async fn advance(&mut self) -> Result<u64> {
        let mut rows = 0;
        loop {
            let checkpoints = self.targets.iter().filter_map(|(_, checkpoint)| checkpoint.as_ref());
            let Some(step) = step::next(&self.captures, &self.applied, checkpoints) else { return Ok(rows) };
            let after = |id: &CaptureId| self.applied.get(id).map_or(Position::ZERO, |applied| applied.position);
            let ranges = step.captures.iter().map(|advance| Range {
                capture: advance.capture.clone(),
                after: after(&advance.capture),
                up_to: advance.to.position,
            });
            let staging = self.pipeline.staging.clone();
            let mut log = Log { staging, ranges: ranges.collect(), stream: None };
            rows += self.pipeline.transform.advance(&step.captures, &mut log).await?.rows;
            self.applied = self.pipeline.transform.applied().await?;
        }
    }

    /// Brings one target to where state stands, durably.
    pub async fn output(&mut self, projection: &str) -> Result<OutputTimes> {
        let unknown =
            || Error::new(ErrorKind::Internal, "refresh", format!("projection {projection}"), "there is none");
        let found = self.targets.iter().position(|(target, _)| &*target.projection == projection);
        let index = found.ok_or_else(unknown)?;
        let (target, expected) = &self.targets[index];
        let (transform, store) = (&self.pipeline.transform, &self.pipeline.projections[index].1);
        let begun = Instant::now();
        let (positions, as_of_time, mut reader) = match transform.compute(projection, expected.as_ref()).await? {
            Computed::UpToDate => return Ok(OutputTimes::default()),
            Computed::Output { positions, as_of_time, reader } => (positions, as_of_time, reader),
            Computed::Behind | Computed::NeedsReplay => {
                let cause = "its state does not follow from its checkpoint";
                return Err(Error::new(ErrorKind::Internal, "refresh", format!("projection {projection}"), cause));
            }
        };
        let computed = Instant::now();
        let horizon = target.captures.first().and_then(|id| self.captures.get(id)).map(|state| state.horizon);
        let lsns: BTreeSet<_> = positions.values().map(|position| position.lsn).collect();
        let commit = OutputCommit {
            target,
            expected: expected.as_ref(),
            checkpoint: &positions,
            as_of_lsn: lsns.first().copied().filter(|_| lsns.len() == 1),
            as_of_time,
            horizon: horizon.unwrap_or(Position::ZERO),
            complete: true,
            run_id: &self.pipeline.run_id,
            output: &mut *reader,
        };
        let Committed::Applied { rows } = store.commit_output(commit).await? else {
            let cause = "another process writes to it";
            return Err(Error::new(ErrorKind::InUse, "commit", format!("projection {projection}"), cause));
        };
        let committed = Instant::now();
        drop(reader);
        transform.settle(projection, Some(&positions)).await?;
        self.targets[index].1 = Some(positions);
        let (compute, commit) = (computed - begun, committed - computed);
        Ok(OutputTimes { compute, commit, settle: committed.elapsed(), rows })
    }

    /// Lets go of changes that every projection has consumed.
    pub async fn forget(&self) -> Result<()> {
        let checkpoints: Vec<Positions> =
            self.targets.iter().map(|(_, checkpoint)| checkpoint.clone().unwrap_or_default()).collect();
        self.pipeline.transform.forget(&checkpoints).await
    }
}

struct Range {
    capture: CaptureId,
    after: Position,
    up_to: Position,
}

/// A step's changes, from the log.
struct Log {
    staging: Arc<dyn Store>,
    ranges: VecDeque<Range>,
    stream: Option<LogStream>,
}

#[async_trait]
impl LogReader for Log {
    async fn next(&mut self) -> Result<Option<ChangeBatch>> {
        loop {
            if let Some(stream) = &mut self.stream {
                if let Some(batch) = stream.next().await {
                    return batch.map(Some);
                }
                self.stream = None;
            }
            let Some(range) = self.ranges.pop_front() else { return Ok(None) };
            self.stream = Some(self.staging.read_log(&range.capture, &range.after, &range.up_to).await?);
        }
    }
}
