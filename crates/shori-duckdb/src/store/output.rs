//! Committing an output: rows, checkpoint and metadata in one transaction (contracts 4 and 6).
//!
//! Parts are loaded as they come: into temporary tables where they must be compared with what stands, straight into
//! the target where there is nothing to compare with. The statements that bring them into the target follow when all
//! have come. Memory is bounded: temporary tables spill.

use std::sync::Arc;

use arrow::array::RecordBatch;
use duckdb::types::Value;
use shori_core::position::{Lsn, Micros, Position, Positions};
use shori_core::projection::Target;
use shori_core::store::{Committed, OutputCommit, OutputKind, OutputReader, OutputRows};
use shori_core::{Error, ErrorKind, Result, failpoint};

use super::append::append_rows;
use super::history::Versions;
use super::session::{Session, Sessions, blob, now, text, time};
use super::{layout, target};
use crate::database::quote_name;

/// Rows that are gathered before they are loaded.
const LOAD_ROWS: usize = 65_536;

pub(super) const UPSERTS: &str = "shori_upserts";
pub(super) const DELETES: &str = "shori_deletes";

const TOUCH_METADATA: &str = "
update ctl_projection_metadata
set run_id = ?
where projection_name = ?";

const UPDATE_METADATA: &str = "
update ctl_projection_metadata
set as_of_lsn = ?, as_of_time = ?, built_at = ?, status = ?, last_error = null, run_id = ?
where projection_name = ?";

/// What a commit is about, apart from its rows.
#[derive(Clone)]
pub(super) struct Step {
    pub target: Target,
    pub kind: OutputKind,
    pub run_id: String,
    pub horizon: Position,
    expected: Option<Positions>,
    checkpoint: Positions,
    as_of_lsn: Option<Lsn>,
    pub as_of_time: Micros,
    complete: bool,
}

impl Step {
    pub fn of(commit: &OutputCommit<'_>) -> Self {
        Self {
            target: commit.target.clone(),
            kind: commit.output.kind(),
            run_id: commit.run_id.to_string(),
            horizon: commit.horizon,
            expected: commit.expected.cloned(),
            checkpoint: commit.checkpoint.clone(),
            as_of_lsn: commit.as_of_lsn,
            as_of_time: commit.as_of_time,
            complete: commit.complete,
        }
    }

    /// How the step ends when its target stands at `stored`; `None`: it can be made.
    fn verdict(&self, stored: Option<&Positions>) -> Option<Committed> {
        if stored == Some(&self.checkpoint) {
            Some(Committed::AlreadyApplied)
        } else if stored != self.expected.as_ref() {
            Some(Committed::Conflict)
        } else {
            None
        }
    }

    /// Equality of the key in `left` and `right`; the join that DuckDB makes best where no key is null.
    pub fn same_key(&self, left: &str, right: &str) -> String {
        let equal = |name: &String| {
            let nullable = self.target.columns.field_with_name(name).map_or(true, |field| field.is_nullable());
            let comparison = if nullable { "is not distinct from" } else { "=" };
            let name = quote_name(name);
            format!("{left}.{name} {comparison} {right}.{name}")
        };
        self.target.key.iter().map(equal).collect::<Vec<_>>().join(" and ")
    }
}

pub(super) enum Begun {
    Open(Box<OpenOutput>),
    Ended(Committed),
}

/// An output whose transaction is open. Dropping it rolls back.
pub(super) struct OpenOutput {
    session: Session,
    step: Step,
    stored: Option<Positions>,
    loads: Loads,
    versions: Option<Versions>,
}

/// What a commit did to its target.
#[derive(Default)]
pub(super) struct Written {
    /// Rows that are other than before, or gone.
    pub rows: u64,
    /// Vectors of it that lost rows, at most.
    pub deleted: u64,
}

/// Which temporary tables stand, and how rows come into the target.
#[derive(Default)]
struct Loads {
    /// The target is empty: rows go straight into it.
    direct: bool,
    direct_rows: u64,
    has_upserts: bool,
    has_deletes: bool,
    delete_rows: u64,
}

/// Takes parts from the reader until they are worth loading; none when all have come.
pub(super) async fn gather(reader: &mut dyn OutputReader) -> Result<Vec<OutputRows>> {
    let mut parts = Vec::new();
    let mut rows = 0;
    while rows < LOAD_ROWS {
        let Some(part) = reader.next().await? else { break };
        rows += record_batch(&part).num_rows();
        parts.push(part);
    }
    Ok(parts)
}

fn record_batch(part: &OutputRows) -> &RecordBatch {
    match part {
        OutputRows::Upsert(rows) | OutputRows::Delete(rows) | OutputRows::Version(rows) | OutputRows::Close(rows) => {
            rows
        }
    }
}

/// After a conflict between transactions: what has become of the step.
fn settled(sessions: &Arc<Sessions>, step: &Step, error: Error) -> Result<Committed> {
    if error.kind() != ErrorKind::Unavailable {
        return Err(error);
    }
    let session = sessions.session()?;
    let stored = target::positions(&session, &step.target.projection)?;
    session.give_back();
    step.verdict(stored.as_ref()).ok_or(error)
}

pub(super) fn begin(sessions: &Arc<Sessions>, step: Step) -> Result<Begun> {
    match begin_once(sessions.session()?, step.clone()) {
        Ok(begun) => Ok(begun),
        Err(error) => settled(sessions, &step, error).map(Begun::Ended),
    }
}

fn begin_once(session: Session, step: Step) -> Result<Begun> {
    let table = step.target.projection.clone();
    session.batch("begin", &table)?;
    let stored = target::positions(&session, &table)?;
    if let Some(verdict) = step.verdict(stored.as_ref()) {
        session.roll_back();
        session.give_back();
        return Ok(Begun::Ended(verdict));
    }
    // The row by which two writers of one projection meet: the second one fails here, before it has read any rows.
    if session.execute(TOUCH_METADATA, &[text(&step.run_id), text(&table)], &table)? == 0 {
        return Err(Error::new(ErrorKind::Internal, "write", format!("target {table}"), "it was never prepared"));
    }
    let direct = target::is_empty(&session, &table)?;
    let versions = match step.kind {
        OutputKind::Versions => Some(Versions::begin(&session, &step, true)?),
        OutputKind::ReplaceVersions => Some(Versions::begin(&session, &step, direct)?),
        OutputKind::Merge | OutputKind::Replace => None,
    };
    let loads = Loads { direct, ..Loads::default() };
    Ok(Begun::Open(Box::new(OpenOutput { session, step, stored, loads, versions })))
}

impl OpenOutput {
    pub fn load(&mut self, parts: Vec<OutputRows>) -> Result<()> {
        for part in parts {
            if record_batch(&part).num_rows() == 0 {
                continue;
            }
            match (part, &mut self.versions) {
                (OutputRows::Upsert(rows), None) => self.load_upserts(rows)?,
                (OutputRows::Delete(rows), None) => self.load_deletes(rows)?,
                (OutputRows::Version(rows), Some(versions)) => versions.load(&self.session, &self.step, rows)?,
                (OutputRows::Close(rows), Some(versions)) => versions.load_closes(&self.session, &self.step, rows)?,
                _ => {
                    let table = &self.step.target.projection;
                    let cause = format!("a part that does not belong to {:?}", self.step.kind);
                    return Err(Error::new(ErrorKind::Internal, "write", format!("target {table}"), cause));
                }
            }
        }
        Ok(())
    }

    pub fn roll_back(self: Box<Self>) {
        self.session.roll_back();
    }

    fn load_upserts(&mut self, rows: RecordBatch) -> Result<()> {
        if self.loads.direct {
            self.loads.direct_rows += rows.num_rows() as u64;
            return load_rows(&self.session, self.session.catalog(), &self.step.target.projection, rows);
        }
        if !self.loads.has_upserts {
            create_temporary(&self.session, UPSERTS, &rows)?;
            self.loads.has_upserts = true;
        }
        load_rows(&self.session, "temp", UPSERTS, rows)
    }

    fn load_deletes(&mut self, rows: RecordBatch) -> Result<()> {
        if self.loads.direct {
            return Ok(());
        }
        if !self.loads.has_deletes {
            create_temporary(&self.session, DELETES, &rows)?;
            self.loads.has_deletes = true;
        }
        self.loads.delete_rows += rows.num_rows() as u64;
        load_rows(&self.session, "temp", DELETES, rows)
    }

    pub fn finish(self: Box<Self>, sessions: &Arc<Sessions>) -> Result<Committed> {
        match self.finish_once() {
            Ok(Written { rows, deleted }) => {
                self.session.deleted(&self.step.target.projection, deleted);
                self.session.give_back();
                Ok(Committed::Applied { rows })
            }
            Err(error) => {
                let step = self.step.clone();
                self.roll_back();
                settled(sessions, &step, error)
            }
        }
    }

    fn finish_once(&self) -> Result<Written> {
        let (session, step) = (&self.session, &self.step);
        let written = match (&self.versions, step.kind) {
            (Some(versions), _) => versions.apply(session, step)?,
            (None, _) if self.loads.direct => Written { rows: self.loads.direct_rows, deleted: 0 },
            (None, OutputKind::Replace) => self.replace()?,
            (None, _) => self.merge()?,
        };
        failpoint::reached(failpoint::STORE_INSIDE_OUTPUT);
        let table = &step.target.projection;
        target::put_checkpoint(session, table, self.stored.as_ref(), &step.checkpoint)?;
        let values = [
            step.as_of_lsn.map_or(Value::Null, |lsn| blob(lsn.as_slice())),
            time(step.as_of_time),
            time(now()),
            text(if step.complete { "OK" } else { "INIT" }),
            text(&step.run_id),
            text(table),
        ];
        session.execute(UPDATE_METADATA, &values, table)?;
        for (stands, name) in [(self.loads.has_upserts, UPSERTS), (self.loads.has_deletes, DELETES)] {
            if stands {
                session.batch(&format!("drop table temp.{name}"), name)?;
            }
        }
        session.batch("commit", table)?;
        Ok(written)
    }

    fn merge(&self) -> Result<Written> {
        let (session, step) = (&self.session, &self.step);
        let table = quote_name(&step.target.projection);
        let key = step.target.key.iter().map(|name| quote_name(name)).collect::<Vec<_>>().join(", ");
        let loaded = [(self.loads.has_deletes, DELETES), (self.loads.has_upserts, UPSERTS)];
        let keys: Vec<String> = loaded
            .iter()
            .filter(|(stands, _)| *stands)
            .map(|(_, name)| format!("select {key} from temp.{name}"))
            .collect();
        let mut written = Written::default();
        // The target is searched once for what goes and for what is replaced.
        if !keys.is_empty() {
            let same_key = step.same_key(&table, "l");
            let sql = format!("delete from {table} using ({}) as l where {same_key}", keys.join(" union all "));
            written.deleted = session.execute(&sql, &[], &step.target.projection)?;
            written.rows = written.deleted.min(self.loads.delete_rows);
        }
        if self.loads.has_upserts {
            let columns = column_list(&step.target);
            let sql = format!("insert into {table} ({columns}) select {columns} from temp.{UPSERTS}");
            written.rows += session.execute(&sql, &[], &step.target.projection)?;
        }
        Ok(written)
    }

    /// Writes only what differs, so that a recomputed result that is the same costs no writes.
    fn replace(&self) -> Result<Written> {
        let (session, step) = (&self.session, &self.step);
        let object = &step.target.projection;
        let table = quote_name(object);
        if !self.loads.has_upserts {
            let deleted = session.execute(&format!("delete from {table}"), &[], object)?;
            return Ok(Written { rows: deleted, deleted });
        }
        let same_key = step.same_key(&table, "l");
        let found = format!("exists (select 1 from temp.{UPSERTS} l where {same_key}");
        let gone = session.execute(&format!("delete from {table} where not {found})"), &[], object)?;
        let mut written = Written { rows: gone, deleted: gone };
        let key = &step.target.key;
        let rest = step.target.columns.fields().iter().filter(|field| !key.contains(field.name()));
        let differs: Vec<String> = rest
            .map(|field| quote_name(field.name()))
            .map(|name| format!("{table}.{name} is distinct from l.{name}"))
            .collect();
        if !differs.is_empty() {
            let differs = differs.join(" or ");
            let sql = format!("delete from {table} using temp.{UPSERTS} as l where {same_key} and ({differs})");
            written.deleted += session.execute(&sql, &[], object)?;
        }
        let columns = column_list(&step.target);
        let sql = format!(
            "insert into {table} ({columns}) select {columns} from temp.{UPSERTS} as l \
             where not exists (select 1 from {table} where {same_key})"
        );
        written.rows += session.execute(&sql, &[], object)?;
        Ok(written)
    }
}

fn column_list(target: &Target) -> String {
    target.columns.fields().iter().map(|field| quote_name(field.name())).collect::<Vec<_>>().join(", ")
}

/// A temporary table with the columns of `rows`.
pub(super) fn create_temporary(session: &Session, name: &str, rows: &RecordBatch) -> Result<()> {
    let schema = rows.schema();
    let definitions: Result<Vec<String>> =
        schema.fields().iter().map(|field| layout::column_definition(field.name(), field.data_type())).collect();
    session.batch(&format!("create or replace temp table {name} ({})", definitions?.join(", ")), name)
}

/// Appends `rows` by the names of their columns.
pub(super) fn load_rows(session: &Session, catalog: &str, table: &str, rows: RecordBatch) -> Result<()> {
    let schema = rows.schema();
    let names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
    append_rows(session, catalog, table, &names, rows)
}
