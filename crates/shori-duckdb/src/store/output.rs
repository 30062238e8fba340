//! Committing an output: rows, checkpoint and metadata in one transaction (contracts 4 and 6).
//!
//! Parts are loaded as they come: into temporary tables where they must be compared with what stands, straight into
//! the target where there is nothing to compare with. The statements that bring them into the target follow when all
//! have come. Memory is bounded: temporary tables spill.

use std::sync::Arc;

use arrow::array::{BooleanArray, RecordBatch};
use arrow::datatypes::{DataType, Field, Fields, Schema};
use duckdb::types::Value;
use shori_core::position::{Lsn, Micros, Position, Positions};
use shori_core::projection::Target;
use shori_core::store::{Committed, OutputCommit, OutputKind, OutputReader, OutputRows};
use shori_core::{Error, ErrorKind, Result, failpoint};

use super::append::append_rows;
use super::history::Versions;
use super::layers::{self, Reform};
use super::layout::{GONE, Side};
use super::rewrite::Taken;
use super::session::{Session, Sessions, blob, now, text, time};
use super::target::Standing;
use super::{layout, target};
use crate::database::quote_name;
use crate::known_targets::{Known, deleted_rows_max, large_from_rows, overlay_rows, overlay_rows_max};

/// Rows that are gathered before they are loaded.
const LOAD_ROWS: usize = 16_384;

/// Rows that a temporary table may keep until the connection needs it again.
const KEPT_ROWS: u64 = 8_192;
/// How often a target is brought into another form before a commit to it begins.
const REFORMS_MAX: usize = 4;

/// Upserts, and the keys of deletions with [`GONE`] set.
const CHANGES: &str = "ctl_changes";

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

    fn put_metadata(&self, session: &Session, taken: Taken, next_surrogate_key: i64) -> Result<()> {
        let set = [
            ("as_of_lsn", self.as_of_lsn.map_or(Value::Null, |lsn| blob(lsn.as_slice()))),
            ("as_of_time", time(self.as_of_time)),
            ("built_at", time(now())),
            ("status", text(if self.complete { "OK" } else { "INIT" })),
            ("last_error", Value::Null),
            ("run_id", text(&self.run_id)),
            ("next_surrogate_key", Value::BigInt(next_surrogate_key)),
        ];
        taken.put(session, &set)
    }
}

enum Begun {
    Open(Box<OpenOutput>),
    Ended(Committed),
}

/// What the rows of an output meet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Form {
    /// The target is empty: rows go straight into it.
    Empty,
    Plain,
    Layered(Side),
}

/// An output whose transaction is open. Dropping it rolls back.
pub(super) struct OpenOutput {
    session: Session,
    step: Step,
    /// Control rows, taken out.
    standing: Standing,
    form: Form,
    /// What was known of the target when the transaction began.
    known: Known,
    loads: Loads,
    versions: Option<Versions>,
}

/// What a commit did to its target.
#[derive(Default)]
pub(super) struct Written {
    /// Rows that are other than before, or gone.
    pub rows: u64,
    /// Rows by which the table or overlay that was written has grown, at most.
    pub grown: u64,
    /// Vectors of the target that lost rows, at most.
    pub deleted: u64,
}

impl Written {
    pub fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        self.grown += other.grown;
        self.deleted += other.deleted;
    }
}

/// How a commit has ended.
pub(super) struct Finished {
    pub committed: Committed,
    /// An overlay of the target waits to be folded.
    pub to_fold: Option<Target>,
}

#[derive(Default)]
struct Loads {
    has_changes: bool,
    upsert_rows: u64,
    delete_rows: u64,
}

/// Parts that are loaded at a time.
pub(super) struct Gathered {
    parts: Vec<OutputRows>,
    is_last: bool,
}

impl Gathered {
    /// Takes parts from the reader until they are worth loading.
    pub async fn from(reader: &mut dyn OutputReader) -> Result<Self> {
        let (mut parts, mut rows) = (Vec::new(), 0);
        while rows < LOAD_ROWS {
            let Some(part) = reader.next().await? else { return Ok(Self { parts, is_last: true }) };
            rows += part.batch().num_rows();
            parts.push(part);
        }
        Ok(Self { parts, is_last: false })
    }
}

/// An output of which more is to come.
pub(super) enum Unfinished {
    New(Box<Step>),
    Open(Box<OpenOutput>),
}

/// What has become of an output.
pub(super) enum Loaded {
    Open(Box<OpenOutput>),
    Ended(Finished),
}

impl Unfinished {
    /// Begins the output if that was not done, loads what was gathered, and finishes it with the last of it.
    pub fn load(self, sessions: &Arc<Sessions>, gathered: Gathered) -> Result<Loaded> {
        let mut open = match self {
            Self::Open(open) => open,
            Self::New(step) => match begin(sessions, &step)? {
                Begun::Open(open) => open,
                Begun::Ended(committed) => return Ok(Loaded::Ended(Finished { committed, to_fold: None })),
            },
        };
        if let Err(error) = open.load(gathered.parts) {
            open.roll_back();
            return Err(error);
        }
        if gathered.is_last { open.finish(sessions).map(Loaded::Ended) } else { Ok(Loaded::Open(open)) }
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

fn begin(sessions: &Arc<Sessions>, step: &Step) -> Result<Begun> {
    for _ in 0..=REFORMS_MAX {
        let tried = begin_once(sessions.session()?, step).and_then(|tried| {
            if let Tried::Reform(session, reform) = &tried {
                layers::reform(session, &step.target, *reform)?;
            }
            Ok(tried)
        });
        match tried {
            Ok(Tried::Begun(begun)) => return Ok(begun),
            Ok(Tried::Reform(session, _)) => session.give_back(),
            Err(error) => return settled(sessions, step, error).map(Begun::Ended),
        }
    }
    let cause = "another writer keeps changing its form";
    Err(Error::new(ErrorKind::Unavailable, "write", format!("target {}", step.target.projection), cause))
}

enum Tried {
    Begun(Begun),
    /// Nothing has happened: this has to come first.
    Reform(Session, Reform),
}

fn begin_once(session: Session, step: &Step) -> Result<Tried> {
    let table = &*step.target.projection;
    session.batch("begin", table)?;
    let Some(standing) = target::take_standing(&session, table)? else {
        return Err(Error::new(ErrorKind::Internal, "write", format!("target {table}"), "it was never prepared"));
    };
    if let Some(verdict) = step.verdict(standing.checkpoint.as_ref()) {
        session.roll_back();
        session.give_back();
        return Ok(Tried::Begun(Begun::Ended(verdict)));
    }
    let known = known(&session, &step.target, standing.active)?;
    let is_incremental = matches!(step.kind, OutputKind::Merge | OutputKind::Versions);
    let reform = match standing.active {
        Some(_) if !is_incremental => Some(Reform::Flatten),
        Some(_) if known.frozen && known.rows > overlay_rows_max() => Some(Reform::Fold),
        // Until then, large outputs come, most of them of new rows.
        None if is_incremental && step.complete && known.rows >= large_from_rows() && !known.stays_plain => {
            Some(Reform::Layer)
        }
        _ => None,
    };
    if let Some(reform) = reform {
        session.roll_back();
        return Ok(Tried::Reform(session, reform));
    }
    let form = match standing.active {
        Some(side) => Form::Layered(side),
        None if known.rows == 0 && target::is_empty(&session, table)? => Form::Empty,
        None => Form::Plain,
    };
    let versions = match step.kind {
        OutputKind::Versions | OutputKind::ReplaceVersions => {
            Some(Versions::new(step, form, standing.next_surrogate_key))
        }
        OutputKind::Merge | OutputKind::Replace => None,
    };
    let (step, loads) = (step.clone(), Loads::default());
    Ok(Tried::Begun(Begun::Open(Box::new(OpenOutput { session, step, standing, form, known, loads, versions }))))
}

/// What is known of the target, looked up where nothing is, or where it decides.
fn known(session: &Session, target: &Target, active: Option<Side>) -> Result<Known> {
    let (known_targets, name) = (session.known_targets(), &*target.projection);
    let known = known_targets.get(session.catalog(), name);
    let looked = match (known, active) {
        (Some(known), Some(_)) => return Ok(known),
        (Some(known), None) if known.stays_plain || (1..large_from_rows()).contains(&known.rows) => return Ok(known),
        (None, Some(side)) => layers::look(session, target, side)?,
        // Rows were counted as they came: those that took the place of others are not more.
        (_, None) => Known { rows: session.table_rows(name)?, ..Known::default() },
    };
    known_targets.put(session.catalog(), name, looked);
    Ok(looked)
}

impl OpenOutput {
    fn load(&mut self, parts: Vec<OutputRows>) -> Result<()> {
        for part in parts {
            if part.batch().num_rows() == 0 {
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

    fn roll_back(self: Box<Self>) {
        self.session.roll_back();
    }

    fn load_upserts(&mut self, rows: RecordBatch) -> Result<()> {
        self.loads.upsert_rows += rows.num_rows() as u64;
        if self.form == Form::Empty {
            return load_rows(&self.session, self.session.catalog(), &self.step.target.projection, rows);
        }
        self.load_changes(rows, false)
    }

    fn load_deletes(&mut self, rows: RecordBatch) -> Result<()> {
        if self.form == Form::Empty || self.step.kind == OutputKind::Replace {
            return Ok(());
        }
        self.loads.delete_rows += rows.num_rows() as u64;
        self.load_changes(rows, true)
    }

    fn load_changes(&mut self, rows: RecordBatch, gone: bool) -> Result<()> {
        if !self.loads.has_changes {
            let gone = Arc::new(Field::new(GONE, DataType::Boolean, false));
            let columns = self.step.target.columns.fields().iter().cloned().chain([gone]);
            create_temporary(&self.session, CHANGES, &columns.collect())?;
            self.loads.has_changes = true;
        }
        let (schema, mut columns) = (rows.schema(), rows.columns().to_vec());
        let marked = schema.fields().iter().cloned().chain([Arc::new(Field::new(GONE, DataType::Boolean, false))]);
        columns.push(Arc::new(BooleanArray::from(vec![gone; rows.num_rows()])));
        load_rows(
            &self.session,
            "temp",
            CHANGES,
            RecordBatch::try_new(Arc::new(Schema::new(marked.collect::<Fields>())), columns)?,
        )
    }

    fn finish(mut self: Box<Self>, sessions: &Arc<Sessions>) -> Result<Finished> {
        match self.finish_once() {
            Ok((written, swapped)) => {
                let (name, known_targets) = (&*self.step.target.projection, self.session.known_targets());
                self.session.deleted(name, written.deleted);
                // A fold may have ended meanwhile: what else is known stays.
                let to_fold = known_targets.change(self.session.catalog(), name, |known| {
                    known.deleted = self.known.deleted;
                    known.rows = if swapped { 0 } else { self.known.rows + written.grown };
                    known.frozen |= swapped;
                    known.ask()
                });
                let to_fold = to_fold.unwrap_or(false).then(|| self.step.target.clone());
                self.session.give_back();
                Ok(Finished { committed: Committed::Applied { rows: written.rows }, to_fold })
            }
            Err(error) => {
                let step = self.step.clone();
                let error = self.session.failed(error);
                self.roll_back();
                settled(sessions, &step, error).map(|committed| Finished { committed, to_fold: None })
            }
        }
    }

    /// What was written, and whether the overlays have changed places.
    fn finish_once(&mut self) -> Result<(Written, bool)> {
        let mut next_key = self.standing.next_surrogate_key;
        let written = match (&self.versions, self.step.kind) {
            (Some(versions), _) => versions.apply(&self.session, &self.step, &mut next_key)?,
            (None, _) if self.form == Form::Empty => {
                Written { rows: self.loads.upsert_rows, grown: self.loads.upsert_rows, deleted: 0 }
            }
            (None, OutputKind::Replace) => self.replace()?,
            (None, _) => self.merge()?,
        };
        failpoint::reached(failpoint::STORE_INSIDE_OUTPUT);
        let (session, step, table) = (&self.session, &self.step, &self.step.target.projection);
        let standing = &mut self.standing;
        step.put_metadata(session, standing.metadata.take_all(), next_key)?;
        let checkpoints = standing.checkpoints.take_all();
        target::put_checkpoint(session, table, checkpoints, standing.checkpoint.as_ref(), &step.checkpoint)?;
        let swapped = match self.form {
            Form::Layered(side) if self.known.rows + written.grown >= overlay_rows() && !self.is_frozen() => {
                layers::swap(session, &step.target, side)?
            }
            _ => false,
        };
        if self.loads.has_changes {
            drop_temporary(session, CHANGES, self.loads.upsert_rows + self.loads.delete_rows)?;
        }
        session.batch("commit", table)?;
        self.known.deleted += written.deleted;
        if self.form == Form::Plain && self.known.deleted > deleted_rows_max().max(self.known.rows) {
            self.write_anew();
        }
        Ok((written, swapped))
    }

    /// Leaves the deleted rows of a plain table behind, in a transaction of its own, so that a table that cannot be written anew
    /// undoes no commit and is merely slower. It would wait for a checkpoint under way: another time then.
    fn write_anew(&mut self) {
        let (session, known, table) = (&self.session, &mut self.known, &self.step.target.projection);
        let name = quote_name(table);
        let write = || match session.batch(&format!("create or replace table {name} as from {name}"), table) {
            Ok(()) => known.deleted = 0,
            Err(error) => {
                let error = session.failed(error);
                tracing::debug!(%error, projection = &**table, "its deleted rows stay for now");
            }
        };
        session.unless_checkpointing(write);
    }

    /// Whether the other overlay still waits to be folded, as far as is known.
    fn is_frozen(&self) -> bool {
        let known = self.session.known_targets().get(self.session.catalog(), &self.step.target.projection);
        known.is_some_and(|known| known.frozen)
    }

    /// Changes go to the active overlay of a layered target as they are, deletions too.
    fn merge(&self) -> Result<Written> {
        if !self.loads.has_changes {
            return Ok(Written::default());
        }
        let (session, target, object) = (&self.session, &self.step.target, &self.step.target.projection);
        let columns = column_list(target);
        let (table, columns, rest) = match self.form {
            Form::Layered(side) => (layout::changes_table(object, side), format!("{columns}, {GONE}"), ""),
            _ => (object.to_string(), columns, " where not gone"),
        };
        let (table, rest) = (quote_name(&table), rest.replace("gone", GONE));
        // It is searched once for what goes and for what is replaced.
        let same_key = target::same_key(target, "t", "l");
        let delete = format!("delete from {table} as t using temp.{CHANGES} as l where {same_key}");
        let deleted = session.execute(&delete, &[], object)?;
        let insert = format!("insert into {table} ({columns}) select {columns} from temp.{CHANGES}{rest}");
        let inserted = session.execute(&insert, &[], object)?;
        let grown = inserted.saturating_sub(deleted);
        Ok(match self.form {
            // Whether a deleted key had a row is not asked.
            Form::Layered(_) => Written { rows: inserted, grown, deleted: 0 },
            _ => Written { rows: deleted.min(self.loads.delete_rows) + inserted, grown, deleted },
        })
    }

    /// Writes only what differs, so that a recomputed result that is the same costs no writes.
    fn replace(&self) -> Result<Written> {
        let (session, step) = (&self.session, &self.step);
        let object = &step.target.projection;
        let table = quote_name(object);
        if !self.loads.has_changes {
            let deleted = session.execute(&format!("delete from {table}"), &[], object)?;
            return Ok(Written { rows: deleted, grown: 0, deleted });
        }
        let same_key = target::same_key(&step.target, "t", "l");
        let found = format!("exists (select 1 from temp.{CHANGES} l where {same_key}");
        let gone = session.execute(&format!("delete from {table} as t where not {found})"), &[], object)?;
        let mut written = Written { rows: gone, grown: 0, deleted: gone };
        let key = &step.target.key;
        let rest = step.target.columns.fields().iter().filter(|field| !key.contains(field.name()));
        let differs: Vec<String> = rest
            .map(|field| quote_name(field.name()))
            .map(|name| format!("t.{name} is distinct from l.{name}"))
            .collect();
        if !differs.is_empty() {
            let differs = differs.join(" or ");
            let sql = format!("delete from {table} as t using temp.{CHANGES} as l where {same_key} and ({differs})");
            written.deleted += session.execute(&sql, &[], object)?;
        }
        let columns = column_list(&step.target);
        let sql = format!(
            "insert into {table} ({columns}) select {columns} from temp.{CHANGES} as l \
             where not exists (select 1 from {table} as t where {same_key})"
        );
        written.grown = session.execute(&sql, &[], object)?;
        written.rows += written.grown;
        Ok(written)
    }
}

fn column_list(target: &Target) -> String {
    target.columns.fields().iter().map(|field| quote_name(field.name())).collect::<Vec<_>>().join(", ")
}

/// An empty temporary table with these columns, in the place of any that stands.
pub(super) fn create_temporary(session: &Session, name: &str, fields: &Fields) -> Result<()> {
    let definitions: Result<Vec<String>> =
        fields.iter().map(|field| layout::column_definition(field.name(), field.data_type())).collect();
    session.batch(&format!("create or replace temp table {name} ({})", definitions?.join(", ")), name)
}

/// Drops a temporary table that holds too much to be kept.
pub(super) fn drop_temporary(session: &Session, name: &str, rows: u64) -> Result<()> {
    if rows > KEPT_ROWS { session.batch(&format!("drop table temp.{name}"), name) } else { Ok(()) }
}

/// Appends `rows` by the names of their columns.
pub(super) fn load_rows(session: &Session, catalog: &str, table: &str, rows: RecordBatch) -> Result<()> {
    let schema = rows.schema();
    let names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
    append_rows(session, catalog, table, &names, rows)
}
