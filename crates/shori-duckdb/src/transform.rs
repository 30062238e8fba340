//! State, kept changes and outputs: a cache that comes back from the log.
//!
//! Constraints: a step costs what it touches, however large the tables are; memory is bounded, so a step of any size is
//! written in parts within one transaction; queries are DuckDB's SQL.
//!
//! Rows lie by key in a state file of their own ([`file`], [`layout`], [`rows`]; as bytes: [`cells`], [`key`],
//! [`tables`]). A step applies changes to them one after the other and keeps what they changed ([`advance`],
//! [`images`], [`steps`], [`kept`]). An output is made from what was kept since the target's checkpoint ([`compute`]):
//! straight from the file ([`direct`], [`history`]), or by DuckDB, for queries over the rows of touched entities alone ([`entity`],
//! [`query`], [`mirror`]), on two threads where there is enough to do ([`hands`]). Differences that are small are told and added
//! up in memory ([`difference`], [`adding`]). It is handed out in parts ([`reader`]); what a query's next output builds on is kept in
//! [`results`], and where that is little, also in memory ([`held`]).
//!
//! One connection writes the file; others see it as it was when they began. DuckDB's tables are in memory and spill.

mod adding;
mod advance;
mod cells;
mod compute;
mod difference;
mod direct;
mod entity;
mod file;
mod hands;
mod held;
mod history;
mod images;
mod kept;
mod key;
mod layout;
mod mirror;
mod query;
mod reader;
mod results;
mod rows;
mod session;
mod steps;
mod tables;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use rusqlite::Connection;
use shori_core::change::ChangeBatch;
use shori_core::position::{CaptureId, Position, Positions};
use shori_core::projection::{Derivation, Maintenance, Projection};
use shori_core::transform::{Advanced, Applied, CaptureAdvance, Computed, LogReader, StateTable, Transform};
use shori_core::{Error, ErrorKind, Result, failpoint};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

use self::advance::{Leg, TableStep};
use self::compute::{Computation, Outcome, Place, Working};
use self::file::StateFile;
use self::layout::Layout;
use self::query::Shape;
use self::results::{Pending, Settling};
use self::session::{Session, WORK};
use crate::database::{Database, locked, traced};

/// Rows that are gathered before they are applied.
const APPLY_ROWS: usize = 8_192;

/// The engine's working memory: a state file, and DuckDB for queries.
pub struct DuckdbTransform {
    database: Database,
    file: StateFile,
    writer: Arc<AsyncMutex<Connection>>,
    computer: Arc<AsyncMutex<Computer>>,
    shared: Arc<Shared>,
    /// Declared last: the work catalog is let go of after all connections to it.
    _attached: Attached,
}

/// What computes outputs.
struct Computer {
    session: Session,
    working: Working,
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
        if let Err(error) = self.0.detach(WORK) {
            tracing::debug!(%error, "a catalog stays attached");
        }
    }
}

impl Drop for DuckdbTransform {
    fn drop(&mut self) {
        // Who still works on it is not waited for: the file then counts as one that was not closed.
        if let Ok(writer) = self.writer.try_lock()
            && let Err(error) = file::mark_closed(&writer)
        {
            tracing::debug!(%error, "the state file is not marked as closed");
        }
    }
}

/// A step being applied: its transaction is open as long as this lives.
struct OpenStep {
    writer: OwnedMutexGuard<Connection>,
    step: i64,
    tables: BTreeMap<Arc<str>, TableStep>,
    rows: u64,
}

/// A step that is not yet applied.
enum Unfinished {
    New(OwnedMutexGuard<Connection>),
    Open(OpenStep),
}

impl Unfinished {
    fn open(self) -> Result<OpenStep> {
        match self {
            Self::New(writer) => OpenStep::begin(writer),
            Self::Open(step) => Ok(step),
        }
    }
}

/// Changes that are applied at a time.
struct Gathered {
    batches: Vec<ChangeBatch>,
    is_last: bool,
}

impl Gathered {
    async fn from(log: &mut dyn LogReader) -> Result<Self> {
        let (mut batches, mut rows) = (Vec::new(), 0);
        while rows < APPLY_ROWS {
            let Some(batch) = log.next().await? else { return Ok(Self { batches, is_last: true }) };
            rows += batch.len();
            batches.push(batch);
        }
        Ok(Self { batches, is_last: false })
    }
}

impl Drop for OpenStep {
    fn drop(&mut self) {
        file::roll_back(&self.writer);
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
            let differs = match &projection.derivation {
                Derivation::History(of) => history::needs_before(of),
                Derivation::Sql(_) | Derivation::Latest { .. } => true,
            };
            differs && started.contains(&projection.name) && projection.tables().iter().any(|name| **name == *table)
        })
    }
}

impl DuckdbTransform {
    /// Opens the state file, creating it if it is missing or cannot be used.
    pub fn open(database: &Database, path: &Path) -> Result<Self> {
        let (file, writer) = StateFile::open(path)?;
        let root = database.connect("memory")?;
        let attach = format!("attach ':memory:' as {WORK}");
        root.execute_batch(&attach).map_err(|cause| session::failure("make", cause))?;
        let attached = Attached(database.clone());
        let session = Session::open(database)?;
        let computer = Computer {
            session,
            working: Working::default(),
            shapes: BTreeMap::new(),
            pending: BTreeMap::new(),
            outputs: 0,
        };
        Ok(Self {
            database: database.clone(),
            file,
            writer: Arc::new(AsyncMutex::new(writer)),
            computer: Arc::new(AsyncMutex::new(computer)),
            shared: Arc::default(),
            _attached: attached,
        })
    }

    async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection, &Shared) -> Result<T> + Send + 'static,
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

impl OpenStep {
    fn begin(writer: OwnedMutexGuard<Connection>) -> Result<Self> {
        file::run(&writer, "begin immediate")?;
        let step = steps::last(&writer)? + 1;
        Ok(Self { writer, step, tables: BTreeMap::new(), rows: 0 })
    }

    fn table(&mut self, shared: &Shared, leg: &Leg) -> (&mut TableStep, &Connection) {
        let nets = || shared.needs_nets(&shared.layout(), &leg.table.name);
        let step = self.step;
        let table = self.tables.entry(leg.table.name.clone());
        (table.or_insert_with(|| TableStep::new(&leg.table, nets(), step)), &self.writer)
    }

    fn apply(&mut self, shared: &Shared, legs: &[Leg], batch: &ChangeBatch) -> Result<()> {
        let Some(leg) = legs.iter().find(|leg| leg.capture == batch.capture) else {
            let cause = "the step does not name this capture";
            return Err(Error::new(ErrorKind::Internal, "apply", format!("changes of {}", batch.capture), cause));
        };
        let batch = batch.between(&leg.from, &leg.to.position)?;
        self.rows += batch.len() as u64;
        let (table, writer) = self.table(shared, leg);
        table.apply(writer, leg, &batch)
    }

    fn finish(mut self, shared: &Shared, legs: &[Leg]) -> Result<Advanced> {
        for leg in legs.iter().filter(|leg| leg.sweep.is_some()) {
            self.table(shared, leg);
        }
        for table in self.tables.values_mut() {
            let own: Vec<&Leg> = legs.iter().filter(|leg| leg.table.name == table.table.name).collect();
            table.finish(&self.writer, own.into_iter())?;
        }
        failpoint::reached(failpoint::TRANSFORM_INSIDE_ADVANCE);
        let mut told = BTreeSet::new();
        for leg in legs {
            let table = self.tables.get(&leg.table.name);
            // Several captures of a table share its count: it is told once.
            let kept = table.filter(|_| told.insert(&leg.table.name)).map_or(0, TableStep::kept);
            steps::record(&self.writer, self.step, leg, table, kept)?;
        }
        file::run(&self.writer, "commit")?;
        locked(&shared.applied).extend(legs.iter().map(|leg| (leg.capture.clone(), leg.to)));
        Ok(Advanced { rows: self.rows })
    }
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

    /// State is begun anew: what was computed from it before does not follow.
    fn begin_anew(&mut self) -> Result<()> {
        self.working.sets.clear();
        self.working.held.clear();
        let pending = std::mem::take(&mut self.pending);
        pending.values().try_for_each(|pending| pending.drop_tables(&self.session))
    }

    fn drop_pending(&mut self, projection: &str) -> Result<()> {
        match self.pending.remove(projection) {
            Some(pending) => pending.drop_tables(&self.session),
            None => Ok(()),
        }
    }

    /// Lets go of tables in DuckDB that no projection reads in full at each step.
    fn release(&mut self, layout: &Layout) -> Result<()> {
        let shapes = &self.shapes;
        let is_needed = |table: &str| {
            layout.projections.values().any(|projection| match &projection.derivation {
                Derivation::Sql(sql) if sql.tables.iter().any(|name| **name == *table) => {
                    matches!(sql.maintenance, Maintenance::Recompute)
                        || (results::keeps_result(sql)
                            && shapes.get(&projection.name).is_some_and(|shape| shape.has_others))
                }
                _ => false,
            })
        };
        self.working.mirrors.release(&self.session, layout, is_needed)
    }

    fn compute(
        &mut self,
        database: &Database,
        (file, connection): (&StateFile, &Connection),
        layout: &Arc<Layout>,
        name: &str,
        since: Option<&Positions>,
    ) -> Result<Computed> {
        let projection = layout.projection(name)?;
        self.drop_pending(name)?;
        let shape = self.shape(layout, projection)?;
        self.outputs += 1;
        let (session, place) = (&self.session, &Place(self.outputs));
        let computation = Computation { database, session, connection, file, layout, projection, since, place };
        let outcome = traced("compute", || computation.run(shape.as_deref(), &mut self.working));
        match outcome.and_then(|outcome| self.release(layout).map(|()| outcome)) {
            Ok(Outcome::UpToDate) => Ok(Computed::UpToDate),
            Ok(Outcome::Behind) => Ok(Computed::Behind),
            Ok(Outcome::NeedsReplay) => Ok(Computed::NeedsReplay),
            Ok(Outcome::Output { positions, as_of_time, reader, change }) => {
                if shape.is_some() {
                    let (place, since, positions) = (place.clone(), since.cloned(), positions.clone());
                    let pending = Pending { place, since, positions, change };
                    self.pending.insert(projection.name.clone(), pending);
                }
                Ok(Computed::Output { positions, as_of_time, reader })
            }
            Err(error) => {
                // What is held of others is as the file has it, and their outputs may be on their way.
                let held = std::mem::take(&mut self.working.held);
                self.working = Working { held, ..Working::default() };
                self.session.recover(&error)?;
                place.drop_tables(&self.session)?;
                self.working.mirrors.open(&self.session, layout)?;
                Err(error)
            }
        }
    }
}

#[async_trait]
impl Transform for DuckdbTransform {
    async fn open(&self, store_id: &str, tables: &[StateTable], projections: &[Projection]) -> Result<()> {
        let (store_id, tables, projections) = (store_id.to_string(), tables.to_vec(), projections.to_vec());
        let mut computer = self.computer.clone().lock_owned().await;
        self.write(move |writer, shared| {
            computer.shapes.clear();
            let layout = layout::open(writer, &store_id, &tables, &projections)?;
            *locked(&shared.applied) = steps::applied(writer, &layout)?;
            let computer = &mut *computer;
            computer.begin_anew()?;
            computer.working.mirrors.open(&computer.session, &layout)?;
            *locked(&shared.layout) = Arc::new(layout);
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
        // Each change of threads may wait for a processor: a small step makes one.
        let mut gathered = Gathered::from(log).await?;
        let mut step = Unfinished::New(writer);
        loop {
            let (legs, shared, is_last) = (legs.clone(), self.shared.clone(), gathered.is_last);
            let apply = move || {
                let mut step = step.open()?;
                gathered.batches.iter().try_for_each(|batch| step.apply(&shared, &legs, batch))?;
                if is_last { step.finish(&shared, &legs).map(Ok) } else { Ok(Err(Unfinished::Open(step))) }
            };
            match self.database.run(move || traced("advance", apply)).await? {
                Ok(advanced) => return Ok(advanced),
                Err(unfinished) => step = unfinished,
            }
            gathered = Gathered::from(log).await?;
        }
    }

    async fn compute(&self, projection: &str, since: Option<&Positions>) -> Result<Computed> {
        let (name, since) = (projection.to_string(), since.cloned());
        let (database, file) = (self.database.clone(), self.file.clone());
        let mut computer = self.computer.clone().lock_owned().await;
        self.write(move |writer, shared| {
            let layout = shared.layout();
            if since.is_some() {
                locked(&shared.started).insert(name.as_str().into());
            }
            computer.compute(&database, (&file, writer), &layout, &name, since.as_ref())
        })
        .await
    }

    async fn settle(&self, projection: &str, checkpoint: Option<&Positions>) -> Result<()> {
        let (name, checkpoint, file) = (projection.to_string(), checkpoint.cloned(), self.file.clone());
        let layout = self.shared.layout();
        let settled = layout.projection(projection)?;
        let loading = {
            let mut started = locked(&self.shared.started);
            match checkpoint {
                Some(_) => started.insert(settled.name.clone()),
                None => started.remove(&settled.name),
            };
            !layout.projections.keys().all(|name| started.contains(name))
        };
        if self.database.is_loading() != loading {
            // With less memory, DuckDB may have to write out what it holds.
            let database = self.database.clone();
            self.database
                .run(move || {
                    database.set_loading(loading);
                    Ok(())
                })
                .await?;
        }
        if !matches!(settled.derivation, Derivation::Sql(_)) {
            return Ok(());
        }
        let mut computer = self.computer.clone().lock_owned().await;
        self.write(move |writer, shared| {
            let (layout, computer) = (shared.layout(), &mut *computer);
            let projection = layout.projection(&name)?;
            let shape = match checkpoint {
                // Its query may fail: whoever computes next will say so.
                Some(_) => computer.shape(&layout, projection).unwrap_or_default(),
                None => None,
            };
            let pending = computer.pending.get_mut(&projection.name);
            let settling = Settling { session: &computer.session, file: &file, writer, layout: &layout, projection };
            let settle = || settling.settle(shape.as_deref(), pending, checkpoint.as_ref(), &mut computer.working);
            let outcome = traced("settle", settle);
            if let Err(error) = outcome {
                computer.session.recover(&error)?;
                return Err(error);
            }
            computer.release(&layout)?;
            computer.drop_pending(&name)
        })
        .await
    }

    async fn forget(&self, checkpoints: &[Positions]) -> Result<()> {
        let checkpoints = checkpoints.to_vec();
        self.write(move |writer, shared| {
            let layout = shared.layout();
            let started = locked(&shared.started).clone();
            file::transaction(writer, || steps::forget(writer, &layout, &checkpoints, &started))
        })
        .await
    }

    async fn changes_kept(&self) -> Result<u64> {
        self.write(|writer, _| Ok(steps::kept(writer)?.max(0) as u64)).await
    }

    async fn discard(&self) -> Result<()> {
        let layout = self.shared.layout();
        let mut computer = self.computer.clone().lock_owned().await;
        self.write(move |writer, shared| {
            layout::clear(writer)?;
            let captures = |table: &Arc<tables::Table>| {
                let schema = Arc::new(table.schema());
                let of = |(_, id): &(_, CaptureId)| StateTable { capture: id.clone(), schema: schema.clone() };
                table.captures.iter().map(of).collect::<Vec<_>>()
            };
            let tables: Vec<StateTable> = layout.tables.values().flat_map(captures).collect();
            let projections: Vec<Projection> = layout.projections.values().cloned().collect();
            let computer = &mut *computer;
            computer.begin_anew()?;
            if !layout.store_id.is_empty() {
                let layout = layout::open(writer, &layout.store_id, &tables, &projections)?;
                computer.working.mirrors.open(&computer.session, &layout)?;
                *locked(&shared.layout) = Arc::new(layout);
            }
            locked(&shared.applied).clear();
            Ok(())
        })
        .await
    }
}
