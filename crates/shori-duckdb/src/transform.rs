//! State, kept changes and outputs in a DuckDB file that is only a cache.
//!
//! Constraints: one transaction writes one attached file; tables have no primary key (its index would live in memory);
//! memory is bounded by the instance, so a step of any size is set operations over tables that spill.
//!
//! Layout: see [`layout`]. Changes of a step are staged in temporary tables ([`staging`]), completed ([`resolve`]), applied
//! to state and kept ([`advance`], [`chain`]) in one transaction. An output is computed from what was kept since the
//! target's checkpoint ([`compute`]), for queries over the rows of touched entities alone ([`entity`], [`query`]), and
//! read in parts ([`reader`]); what a query's next output builds on is kept by [`settle`].
//!
//! One connection writes state, another computes; each is behind a lock. Outputs are read on connections of their own.

mod advance;
mod chain;
mod compute;
mod entity;
mod layout;
mod query;
mod reader;
mod resolve;
mod session;
mod settle;
mod staging;
mod steps;
mod tables;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use shori_core::change::ChangeBatch;
use shori_core::position::{CaptureId, Position, Positions};
use shori_core::projection::{Derivation, Projection};
use shori_core::store::OutputKind;
use shori_core::transform::{Advanced, Applied, CaptureAdvance, Computed, LogReader, StateTable, Transform};
use shori_core::{Error, ErrorKind, Result, failpoint};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

use self::advance::Kept;
use self::compute::{Computation, Outcome, Place};
use self::entity::Sets;
use self::layout::Layout;
use self::query::Shape;
use self::reader::Reader;
use self::session::{CACHE, Session, WORK};
use self::settle::Pending;
use self::staging::{Leg, Staging};
use crate::database::{Database, locked};

/// Changes staged at a time, unless one batch alone has more.
const GATHERED_MAX_ROWS: usize = 16_384;

/// The engine's working memory in a DuckDB file. The file is locked by this process while this lives.
pub struct DuckdbTransform {
    database: Database,
    writer: Arc<AsyncMutex<Session>>,
    computer: Arc<AsyncMutex<Computer>>,
    shared: Arc<Shared>,
    /// Declared last: the file is let go of after all connections to it.
    _attached: Attached,
}

/// What computes outputs.
struct Computer {
    session: Session,
    sets: Sets,
    shapes: BTreeMap<Arc<str>, Arc<Shape>>,
    pending: BTreeMap<Arc<str>, Pending>,
    outputs: u64,
}

#[derive(Default)]
struct Shared {
    layout: Mutex<Arc<Layout>>,
    applied: Mutex<BTreeMap<CaptureId, Applied>>,
    /// Projections whose target has a checkpoint: those that can use kept changes.
    started: Mutex<BTreeSet<Arc<str>>>,
}

struct Attached(Database);

impl Drop for Attached {
    fn drop(&mut self) {
        for name in [CACHE, WORK] {
            if let Err(error) = self.0.detach(name) {
                tracing::debug!(%error, "a catalog stays attached");
            }
        }
    }
}

impl Shared {
    fn layout(&self) -> Arc<Layout> {
        locked(&self.layout).clone()
    }

    /// Whether any projection that works by differences may come to need what a step does to `table`.
    fn needs_nets(&self, layout: &Layout, table: &str) -> bool {
        let started = locked(&self.started);
        layout.projections.values().any(|projection| {
            !matches!(projection.derivation, Derivation::History(_))
                && started.contains(&projection.name)
                && projection.tables().iter().any(|name| **name == *table)
        })
    }
}

impl DuckdbTransform {
    /// Attaches the cache file, creating it if it is missing or cannot be used.
    pub fn open(database: &Database, path: &Path) -> Result<Self> {
        layout::attach(database, path)?;
        let attached = Attached(database.clone());
        let writer = Session::open(database)?;
        writer.run(&format!("attach ':memory:' as {WORK}"))?;
        let session = Session::open(database)?;
        let computer =
            Computer { session, sets: Sets::default(), shapes: BTreeMap::new(), pending: BTreeMap::new(), outputs: 0 };
        Ok(Self {
            database: database.clone(),
            writer: Arc::new(AsyncMutex::new(writer)),
            computer: Arc::new(AsyncMutex::new(computer)),
            shared: Arc::default(),
            _attached: attached,
        })
    }

    async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Session, &Shared) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let writer = self.writer.clone().lock_owned().await;
        let shared = self.shared.clone();
        self.database.run(move || work(&writer, &shared)).await
    }

    async fn compute_with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Computer, &Shared) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let mut computer = self.computer.clone().lock_owned().await;
        let shared = self.shared.clone();
        self.database.run(move || work(&mut computer, &shared)).await
    }

    /// Stages what `log` gives. The writer's lock is held from here to the end of the step.
    async fn stage(
        &self,
        mut writer: OwnedMutexGuard<Session>,
        legs: &Arc<Vec<Leg>>,
        log: &mut dyn LogReader,
    ) -> Result<(OwnedMutexGuard<Session>, Staging)> {
        let mut staging = Staging::default();
        let mut ahead = None;
        while let Some(batch) = gather(log, &mut ahead).await? {
            let legs = legs.clone();
            (writer, staging) = self
                .database
                .run(move || {
                    let Some(leg) = legs.iter().find(|leg| leg.capture == batch.capture) else {
                        return Err(Error::new(
                            ErrorKind::Internal,
                            "apply",
                            format!("changes of {}", batch.capture),
                            "the step does not name this capture",
                        ));
                    };
                    let batch = batch.between(&leg.from, &leg.to.position)?;
                    if !batch.is_empty() {
                        staging.rows += batch.len() as u64;
                        staging.entry(&writer, &leg.table)?.append(&writer, leg.number, leg.generation, &batch)?;
                    }
                    Ok((writer, staging))
                })
                .await?;
        }
        Ok((writer, staging))
    }

    fn legs(&self, captures: &[CaptureAdvance]) -> Result<Vec<Leg>> {
        let (layout, applied) = (self.shared.layout(), locked(&self.shared.applied).clone());
        let leg = |advance: &CaptureAdvance| {
            let (number, table) = layout.capture(&advance.capture)?;
            Ok(Leg {
                number,
                capture: advance.capture.clone(),
                table: table.clone(),
                from: applied.get(&advance.capture).map_or(Position::ZERO, |applied| applied.position),
                to: advance.to,
                generation: advance.generation,
                sweep: advance.sweep,
            })
        };
        captures.iter().map(leg).collect()
    }
}

/// The next changes, small batches put together: each one staged costs as much as some thousand rows.
async fn gather(log: &mut dyn LogReader, ahead: &mut Option<ChangeBatch>) -> Result<Option<ChangeBatch>> {
    let mut parts: Vec<ChangeBatch> = Vec::new();
    let mut rows = 0;
    loop {
        let next = match ahead.take() {
            Some(batch) => Some(batch),
            None => log.next().await?,
        };
        let Some(batch) = next else { break };
        let follows = parts.first().is_none_or(|first| first.capture == batch.capture && first.schema == batch.schema);
        if !follows || (rows > 0 && rows + batch.len() > GATHERED_MAX_ROWS) {
            *ahead = Some(batch);
            break;
        }
        rows += batch.len();
        parts.push(batch);
    }
    match parts.as_slice() {
        [one] => Ok(Some(one.clone())),
        several => ChangeBatch::concat(several),
    }
}

/// Applies a staged step in one transaction.
fn apply(session: &Session, shared: &Shared, legs: &[Leg], mut staging: Staging) -> Result<Advanced> {
    let layout = shared.layout();
    for leg in legs.iter().filter(|leg| leg.sweep.is_some()) {
        staging.entry(session, &leg.table)?;
    }
    session.transaction(|| {
        let step = steps::last(session)? + 1;
        let mut kept_rows = BTreeMap::new();
        for (name, staged) in &mut staging.tables {
            let nets = shared.needs_nets(&layout, name);
            let rows = advance::apply(session, staged, legs, Kept { step, nets })?;
            kept_rows.insert(name.clone(), (rows, nets, staged.table.has_history));
        }
        failpoint::reached(failpoint::TRANSFORM_INSIDE_ADVANCE);
        for leg in legs {
            // Several captures of a table share its count: it is told once.
            let (rows, nets, versions) = match kept_rows.get_mut(&leg.table.name) {
                Some((rows, nets, versions)) => (std::mem::take(rows), *nets, *versions),
                None => (0, true, true),
            };
            steps::record(session, step, leg, nets, versions, rows)?;
        }
        Ok(())
    })?;
    let mut applied = locked(&shared.applied);
    applied.extend(legs.iter().map(|leg| (leg.capture.clone(), leg.to)));
    for staged in staging.tables.values() {
        session.run(&format!("drop table if exists {}", staged.table.staged()))?;
    }
    let deleted = staging.tables.values().map(|staged| (staged.table.state_name(), staged.deleted_from));
    session.deleted_from_vectors(deleted);
    Ok(Advanced { rows: staging.rows })
}

impl Computer {
    fn shape(&mut self, layout: &Layout, projection: &Projection) -> Result<Option<Arc<Shape>>> {
        let Derivation::Sql(sql) = &projection.derivation else { return Ok(None) };
        if let Some(shape) = self.shapes.get(&projection.name) {
            return Ok(Some(shape.clone()));
        }
        let shape = Arc::new(query::shape(&self.session, layout, sql)?);
        self.shapes.insert(projection.name.clone(), shape.clone());
        Ok(Some(shape))
    }

    fn drop_pending(&mut self, projection: &str) -> Result<()> {
        match self.pending.remove(projection) {
            Some(pending) => pending.place.drop_tables(&self.session),
            None => Ok(()),
        }
    }

    fn compute(
        &mut self,
        database: &Database,
        layout: &Layout,
        name: &str,
        since: Option<&Positions>,
    ) -> Result<Computed> {
        let projection = layout.projection(name)?;
        self.drop_pending(name)?;
        let shape = self.shape(layout, projection)?;
        self.outputs += 1;
        let place = Place(self.outputs);
        // The output is read on the connection that computed it only where it needs that one's transaction.
        let own = Session::open(database)?;
        let on_own = matches!(projection.derivation, Derivation::Latest { .. });
        let session = if on_own { &own } else { &self.session };
        let computation = Computation { session, layout, projection, since, place: &place };
        session.run("begin transaction")?;
        let outcome = computation.run(shape.as_deref(), &mut self.sets);
        let holds = matches!(&outcome, Ok(Outcome::Output { laid, .. }) if laid.holds_transaction);
        if let Err(error) = outcome {
            session.roll_back()?;
            session.relieve_after(&error);
            self.sets.clear();
            return Err(error);
        }
        if !holds {
            session.run("commit")?;
        }
        Ok(match outcome? {
            Outcome::UpToDate => Computed::UpToDate,
            Outcome::Behind => Computed::Behind,
            Outcome::NeedsReplay => Computed::NeedsReplay,
            Outcome::Output { positions, as_of_time, laid } => {
                let replaces = laid.kind == OutputKind::Replace;
                let pending = Pending { place, positions: positions.clone(), replaces };
                self.pending.insert(projection.name.clone(), pending);
                Computed::Output { positions, as_of_time, reader: Box::new(Reader::new(database, own, laid)) }
            }
        })
    }
}

#[async_trait]
impl Transform for DuckdbTransform {
    async fn open(&self, store_id: &str, tables: &[StateTable], projections: &[Projection]) -> Result<()> {
        let (store_id, tables, projections) = (store_id.to_string(), tables.to_vec(), projections.to_vec());
        let mut computer = self.computer.clone().lock_owned().await;
        self.write(move |session, shared| {
            computer.shapes.clear();
            let layout = layout::open(session, &store_id, &tables, &projections)?;
            *locked(&shared.applied) = steps::applied(session, &layout)?;
            *locked(&shared.layout) = Arc::new(layout);
            computer.sets.clear();
            Ok(())
        })
        .await
    }

    async fn describe(&self, projection: &str) -> Result<SchemaRef> {
        let name = projection.to_string();
        self.compute_with(move |computer, shared| {
            let layout = shared.layout();
            query::output_columns(&computer.session, &layout, layout.projection(&name)?)
        })
        .await
    }

    async fn applied(&self) -> Result<BTreeMap<CaptureId, Applied>> {
        Ok(locked(&self.shared.applied).clone())
    }

    async fn advance(&self, captures: &[CaptureAdvance], log: &mut dyn LogReader) -> Result<Advanced> {
        let writer = self.writer.clone().lock_owned().await;
        let legs = Arc::new(self.legs(captures)?);
        let (writer, staging) = self.stage(writer, &legs, log).await?;
        let shared = self.shared.clone();
        self.database.run(move || apply(&writer, &shared, &legs, staging)).await
    }

    async fn compute(&self, projection: &str, since: Option<&Positions>) -> Result<Computed> {
        let (name, since, database) = (projection.to_string(), since.cloned(), self.database.clone());
        self.compute_with(move |computer, shared| {
            let layout = shared.layout();
            if since.is_some() {
                locked(&shared.started).insert(name.as_str().into());
            }
            computer.compute(&database, &layout, &name, since.as_ref())
        })
        .await
    }

    async fn settle(&self, projection: &str, checkpoint: Option<&Positions>) -> Result<()> {
        let (name, checkpoint) = (projection.to_string(), checkpoint.cloned());
        self.compute_with(move |computer, shared| {
            let layout = shared.layout();
            let projection = layout.projection(&name)?;
            match checkpoint {
                Some(_) => locked(&shared.started).insert(projection.name.clone()),
                None => locked(&shared.started).remove(&projection.name),
            };
            let shape = match computer.pending.contains_key(&projection.name) {
                true => computer.shape(&layout, projection)?,
                false => None,
            };
            let pending = computer.pending.get(&projection.name);
            settle::settle(&computer.session, &layout, projection, shape.as_deref(), pending, checkpoint.as_ref())?;
            computer.drop_pending(&name)
        })
        .await
    }

    async fn forget(&self, checkpoints: &[Positions]) -> Result<()> {
        let checkpoints = checkpoints.to_vec();
        self.write(move |session, shared| {
            let layout = shared.layout();
            let started = locked(&shared.started).clone();
            session.transaction(|| steps::forget(session, &layout, &checkpoints, &started))
        })
        .await
    }

    async fn changes_kept(&self) -> Result<u64> {
        self.write(|session, _| Ok(session.number("select sum(rows)::bigint from steps")?.max(0) as u64)).await
    }

    async fn discard(&self) -> Result<()> {
        let layout = self.shared.layout();
        let mut computer = self.computer.clone().lock_owned().await;
        self.write(move |session, shared| {
            layout::clear(session)?;
            let captures = |table: &Arc<tables::Table>| {
                let schema = Arc::new(table.schema());
                let of = |(_, id): &(_, CaptureId)| StateTable { capture: id.clone(), schema: schema.clone() };
                table.captures.iter().map(of).collect::<Vec<_>>()
            };
            let tables: Vec<StateTable> = layout.tables.values().flat_map(captures).collect();
            let projections: Vec<Projection> = layout.projections.values().cloned().collect();
            if !layout.store_id.is_empty() {
                *locked(&shared.layout) = Arc::new(layout::open(session, &layout.store_id, &tables, &projections)?);
            }
            locked(&shared.applied).clear();
            computer.sets.clear();
            Ok(())
        })
        .await
    }
}
