//! What a `sql` projection keeps from one output to the next: what its target holds.
//!
//! It moves only after the target's store has committed. Where the two do not agree, it is made from state if that
//! stands where the target does, else forgotten: then the next output replaces everything.

use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::Schema;
use rusqlite::{CachedStatement, Connection};
use shori_core::position::{CaptureId, Position, Positions};
use shori_core::projection::{Derivation, Maintenance, Measures, Projection, SqlProjection};
use shori_core::{Error, ErrorKind, Result, failpoint};

use super::cells::{Cell, Cells, write_value};
use super::compute::{Place, Working, target};
use super::file::{self, StateFile, execute, failure, run, transaction};
use super::held::{HeldResult, Way};
use super::key::Key;
use super::layout::Layout;
use super::mirror::LIVE;
use super::query::{self, Shape};
use super::rows::blob;
use super::session::{Loader, Session, WorkTable};
use super::steps;

/// A row's cells.
pub(super) type Row = Box<[u8]>;

/// A key, and the row that it has now.
pub(super) type KeptRow = (Key, Option<Row>);

/// What an output that was computed and not settled does to what is kept.
#[derive(Debug)]
pub(super) enum Change {
    Nothing,
    /// Each of these keys has this row now, or none.
    Rows(Vec<KeptRow>),
    /// Rows and keys lie at its place.
    Difference,
    /// All rows lie at its place.
    Whole,
}

/// An output that was computed and not settled.
pub(super) struct Pending {
    pub place: Place,
    /// The checkpoint from which it was computed.
    pub since: Option<Positions>,
    pub positions: Positions,
    pub change: Change,
}

impl Pending {
    /// Whether it takes what is kept as of `settled` further: a part does so only from where it began.
    pub fn follows(&self, settled: Option<&Positions>) -> bool {
        matches!(self.change, Change::Whole) || self.since.as_ref() == settled
    }

    pub fn drop_tables(&self, session: &Session) -> Result<()> {
        match self.change {
            Change::Nothing | Change::Rows(_) => Ok(()),
            Change::Difference | Change::Whole => self.place.drop_tables(session),
        }
    }
}

/// Whether the projection's next output is derived from its last result.
pub(super) fn keeps_result(sql: &SqlProjection) -> bool {
    !matches!(sql.maintenance, Maintenance::ByEntity { measures: Measures::PerEntity, .. })
}

/// The checkpoint that the kept result belongs to. Where no result is kept, any checkpoint: that there is one tells that
/// the target was made by this very definition.
pub(super) fn settled(connection: &Connection, projection: &str) -> Result<Option<Positions>> {
    let sql = "select checkpoint from results where projection = ?";
    let stored = file::rows(connection, sql, &[&projection], |row| row.get::<_, String>(0))?;
    stored.first().map(|text| decode(text)).transpose()
}

/// By which the table of a kept result is named, and its part of the log.
pub(super) fn number_of(connection: &Connection, projection: &str) -> Result<Option<i64>> {
    let sql = "select number from results where projection = ?";
    Ok(file::rows(connection, sql, &[&projection], |row| row.get(0))?.first().copied())
}

/// Where the rows of a kept result lie, or those of an earlier one to which the log adds.
pub(super) fn table_of(connection: &Connection, projection: &str) -> Result<Option<String>> {
    Ok(number_of(connection, projection)?.map(|number| format!("result_{number}")))
}

/// What settling works on.
pub(super) struct Settling<'a> {
    pub session: &'a Session,
    pub file: &'a StateFile,
    pub writer: &'a Connection,
    pub layout: &'a Layout,
    pub projection: &'a Projection,
}

impl Settling<'_> {
    /// Makes what is kept agree with the target's checkpoint. `shape` is that of the projection's query.
    pub fn settle(
        &self,
        shape: Option<&Shape>,
        pending: Option<&mut Pending>,
        checkpoint: Option<&Positions>,
        working: &mut Working,
    ) -> Result<()> {
        let (Derivation::Sql(sql), name) = (&self.projection.derivation, &*self.projection.name) else {
            return Ok(());
        };
        let Some(checkpoint) = checkpoint else {
            working.held.let_go(name);
            return transaction(self.writer, || forget(self.writer, name));
        };
        let settled = settled(self.writer, name)?;
        if let (Some(pending), Some(shape)) = (pending, shape)
            && pending.positions == *checkpoint
            && (!keeps_result(sql) || pending.follows(settled.as_ref()))
        {
            if !keeps_result(sql) && settled.is_some() {
                return Ok(());
            }
            return self.take(sql, shape, pending, working);
        }
        if settled.as_ref() == Some(checkpoint) || (settled.is_some() && !keeps_result(sql)) {
            return Ok(());
        }
        working.held.let_go(name);
        if !keeps_result(sql) {
            return transaction(self.writer, || self.mark(checkpoint));
        }
        match shape {
            Some(shape) => self.make_again(sql, shape, checkpoint, working),
            None => transaction(self.writer, || forget(self.writer, name)),
        }
    }

    /// Takes the result to where an output took the target.
    fn take(&self, sql: &SqlProjection, shape: &Shape, pending: &mut Pending, working: &mut Working) -> Result<()> {
        let (name, held) = (&*self.projection.name, &mut working.held);
        // Rows of the log count over those of the table: nothing goes into the table beside them.
        if held.get(name).is_none() && HeldResult::is_logged(self.writer, name)? {
            held.load(self.writer, name)?;
        }
        let rows = match &mut pending.change {
            Change::Nothing => Some(&mut Vec::new()),
            Change::Rows(rows) => Some(rows),
            Change::Difference | Change::Whole => None,
        };
        if let (Some(result), Some(rows)) = (held.get(name), rows) {
            let way = held.way(result, rows);
            transaction(self.writer, || {
                self.mark(&pending.positions)?;
                result.write(self.writer, rows, way)?;
                failpoint::reached(failpoint::TRANSFORM_INSIDE_SETTLE);
                Ok(())
            })?;
            held.take(name, std::mem::take(rows), way);
            return Ok(());
        }
        transaction(self.writer, || {
            self.mark(&pending.positions)?;
            // It changes there.
            if let Some(result) = held.get(name).filter(|_| !matches!(pending.change, Change::Whole)) {
                result.write(self.writer, &[], Way::IntoTable)?;
            }
            if keeps_result(sql) {
                self.take_over(shape, pending)?;
            }
            failpoint::reached(failpoint::TRANSFORM_INSIDE_SETTLE);
            Ok(())
        })?;
        if held.get(name).is_some() || matches!(pending.change, Change::Whole) {
            held.let_go(name);
        }
        Ok(())
    }

    /// Computes the result from state, if that stands where the target does.
    fn make_again(
        &self,
        sql: &SqlProjection,
        shape: &Shape,
        checkpoint: &Positions,
        working: &mut Working,
    ) -> Result<()> {
        let view = self.file.view()?;
        let applied = steps::applied(&view, self.layout)?;
        let place = Place(0);
        let made = match target(&self.layout.tables_of(self.projection)?, &applied).0 == *checkpoint {
            false => None,
            true => Some(working.mirrors.fill(self.session, &view, self.layout, sql).and_then(|()| {
                let create = format!("create or replace table {} as select * from {{query}}", place.rows());
                query::run(self.session, sql, LIVE, &create)
            })),
        };
        match made {
            Some(Ok(_)) => {
                let pending = Pending { place, since: None, positions: checkpoint.clone(), change: Change::Whole };
                transaction(self.writer, || {
                    self.mark(checkpoint)?;
                    self.take_over(shape, &pending)
                })?;
                pending.drop_tables(self.session)
            }
            Some(Err(error)) if error.kind() != ErrorKind::Projection => Err(error),
            // The query fails now: whoever computes next will say so.
            _ => transaction(self.writer, || forget(self.writer, &self.projection.name)),
        }
    }

    fn take_over(&self, shape: &Shape, pending: &Pending) -> Result<()> {
        let connection = self.writer;
        let Some(table) = table_of(connection, &self.projection.name)? else { return Ok(()) };
        let mut keeper = Keeper::new(connection, &table)?;
        match &pending.change {
            Change::Nothing => return Ok(()),
            Change::Rows(rows) => return rows.iter().try_for_each(|(key, row)| keeper.keep(key, row.as_deref())),
            Change::Whole => {
                run(connection, &format!("delete from {table}"))?;
                HeldResult::drop_log(connection, &self.projection.name)?;
            }
            Change::Difference => {
                let keys: Vec<usize> = (0..shape.key.len()).collect();
                self.session.batches(&format!("from {}", pending.place.keys()), |batch| {
                    each_row(&batch, &keys, &keys, |_, key, _| keeper.keep(&key, None))
                })?;
            }
        }
        let (key, all) = (shape.key_indexes(), (0..shape.fields.len()).collect::<Vec<_>>());
        self.session.batches(&format!("from {}", pending.place.rows()), |batch| {
            each_row(&batch, &key, &all, |_, key, row| keeper.keep(&key, Some(row)))
        })
    }

    /// Says which checkpoint the result belongs to; within a transaction.
    fn mark(&self, checkpoint: &Positions) -> Result<()> {
        let (name, definition, encoded) = (&*self.projection.name, self.projection.definition(), encode(checkpoint));
        execute(
            self.writer,
            "insert into results (projection, definition, checkpoint) values (?1, ?2, ?3)
             on conflict (projection) do update set definition = ?2, checkpoint = ?3",
            &[&name, &definition, &encoded],
        )?;
        match table_of(self.writer, name)? {
            Some(table) => {
                run(self.writer, &format!("create table if not exists {table} (k primary key, v blob) without rowid"))
            }
            None => Ok(()),
        }
    }
}

/// Writes rows of a kept result.
pub(super) struct Keeper<'c> {
    put: CachedStatement<'c>,
    delete: CachedStatement<'c>,
}

impl<'c> Keeper<'c> {
    pub fn new(connection: &'c Connection, table: &str) -> Result<Self> {
        let put = prepared(connection, &format!("insert or replace into {table} values (?, ?)"))?;
        Ok(Self { put, delete: prepared(connection, &format!("delete from {table} where k = ?"))? })
    }

    pub fn keep(&mut self, key: &Key, row: Option<&[u8]>) -> Result<()> {
        let kept = match row {
            Some(row) => self.put.execute(rusqlite::params![key, row]),
            None => self.delete.execute([key]),
        };
        kept.map(|_| ()).map_err(|cause| failure("update", cause))
    }
}

fn prepared<'c>(connection: &'c Connection, sql: &str) -> Result<CachedStatement<'c>> {
    connection.prepare_cached(sql).map_err(|cause| failure("update", cause))
}

/// Lets go of a result; within a transaction.
pub(super) fn forget(connection: &Connection, projection: &str) -> Result<()> {
    if let Some(table) = table_of(connection, projection)? {
        HeldResult::drop_log(connection, projection)?;
        run(connection, &format!("drop table if exists {table}"))?;
        execute(connection, "delete from results where projection = ?", &[&projection])?;
    }
    Ok(())
}

/// Gives `take` each row's number, its key, and its cells of `columns`.
pub(super) fn each_row(
    batch: &RecordBatch,
    key: &[usize],
    columns: &[usize],
    mut take: impl FnMut(usize, Key, &[u8]) -> Result<()>,
) -> Result<()> {
    let schema = batch.schema();
    let mut row_cells = Vec::new();
    for row in 0..batch.num_rows() {
        row_cells.clear();
        for &column in columns {
            write_value(batch.column(column).as_ref(), row, &mut row_cells)?;
        }
        let mut cells: Vec<Cell<'_>> = Vec::with_capacity(columns.len());
        Cells(&row_cells).collect(columns.len(), &mut cells)?;
        let key = Key::of(key, |index| schema.field(index).data_type(), &cells)?;
        take(row, key, &row_cells)?;
    }
    Ok(())
}

fn work_table(shape: &Shape) -> WorkTable {
    let fields: Vec<_> = shape.fields.iter().map(|field| field.as_ref().clone().with_nullable(true)).collect();
    WorkTable { schema: "main".into(), name: "stood".into(), columns: Arc::new(Schema::new(fields)) }
}

fn push(loader: &mut Loader<'_>, shape: &Shape, row: &[u8]) -> Result<()> {
    let mut cells = Vec::with_capacity(shape.fields.len());
    Cells(row).collect(shape.fields.len(), &mut cells)?;
    loader.push(cells)
}

/// Loads what is kept of the result for the keys in `keys`, a table that begins with those columns.
pub(super) fn load(
    session: &Session,
    view: &Connection,
    projection: &str,
    shape: &Shape,
    keys: &str,
) -> Result<WorkTable> {
    let stood = work_table(shape);
    session.create(&stood)?;
    let mut kept = Stood::open(view, projection)?;
    let mut wanted = Vec::new();
    let columns: Vec<usize> = (0..shape.key.len()).collect();
    session.batches(&format!("select {} from {keys} x", shape.keys("x")), |batch| {
        each_row(&batch, &columns, &columns, |_, key, _| {
            wanted.push(key);
            Ok(())
        })
    })?;
    wanted.sort_unstable();
    let mut loader = Loader::new(session, stood.clone())?;
    for key in &wanted {
        kept.find(key, |row| push(&mut loader, shape, row))?;
    }
    loader.finish()?;
    Ok(stood)
}

/// What is kept of a result, found by key.
pub(super) enum Stood<'c> {
    Nothing,
    Held(&'c HeldResult),
    Stored(CachedStatement<'c>),
}

impl<'c> Stood<'c> {
    pub fn open(connection: &'c Connection, projection: &str) -> Result<Self> {
        let Some(table) = table_of(connection, projection)? else { return Ok(Self::Nothing) };
        let get = connection.prepare_cached(&format!("select v from {table} where k = ?"));
        get.map(Self::Stored).map_err(|cause| failure("read", cause))
    }

    /// What `take` makes of the cells of the key's row; none where it has none.
    pub fn find<T>(&mut self, key: &Key, take: impl FnOnce(&[u8]) -> Result<T>) -> Result<Option<T>> {
        let reading = |cause| failure("read", cause);
        match self {
            Self::Nothing => Ok(None),
            Self::Held(held) => held.find(key).map(take).transpose(),
            Self::Stored(get) => {
                let mut rows = get.query([key]).map_err(reading)?;
                rows.next().map_err(reading)?.map(|row| take(blob(row, 0)?)).transpose()
            }
        }
    }
}

/// Loads all of the result.
pub(super) fn load_all(session: &Session, view: &Connection, projection: &str, shape: &Shape) -> Result<WorkTable> {
    let stood = work_table(shape);
    session.create(&stood)?;
    let Some(table) = table_of(view, projection)? else { return Ok(stood) };
    let mut loader = Loader::new(session, stood.clone())?;
    let reading = |cause| failure("read", cause);
    let mut all = prepared(view, &format!("select v from {table}"))?;
    let mut rows = all.query([]).map_err(reading)?;
    while let Some(row) = rows.next().map_err(reading)? {
        push(&mut loader, shape, blob(row, 0)?)?;
    }
    loader.finish()?;
    Ok(stood)
}

/// A JSON list of source, instance, and lsn and seq in hexadecimal digits.
pub(super) fn encode(positions: &Positions) -> String {
    let digits = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let list: Vec<_> = positions
        .iter()
        .map(|(id, at)| {
            [id.source.to_string(), id.instance.to_string(), digits(at.lsn.as_slice()), digits(at.seq.as_slice())]
        })
        .collect();
    serde_json::json!(list).to_string()
}

fn decode(text: &str) -> Result<Positions> {
    let corrupt = |cause: String| Error::new(ErrorKind::Corrupt, "read", "a checkpoint in the state cache", cause);
    let list: Vec<[String; 4]> = serde_json::from_str(text).map_err(|cause| corrupt(cause.to_string()))?;
    let bytes = |digits: &str| -> Result<Vec<u8>> {
        let pairs = (0..digits.len() / 2).map(|at| digits.get(2 * at..2 * at + 2));
        pairs
            .map(|pair| pair.and_then(|pair| u8::from_str_radix(pair, 16).ok()))
            .collect::<Option<_>>()
            .ok_or_else(|| corrupt(format!("{digits} is no position")))
    };
    list.iter()
        .map(|[source, instance, lsn, seq]| {
            Ok((CaptureId::new(source, instance), Position::from_slices(&bytes(lsn)?, &bytes(seq)?)?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_come_back() {
        let at = |lsn: &[u8], seq: &[u8]| Position::from_slices(lsn, seq).unwrap();
        let positions = Positions::from([
            (CaptureId::new("a", "b/c"), at(&[1, 255], &[])),
            (CaptureId::new("a'", "\"d\""), at(&[], &[0, 16])),
        ]);
        assert_eq!(decode(&encode(&positions)).unwrap(), positions);
        assert!(decode("[[\"a\",\"b\",\"zz\",\"\"]]").is_err() && decode("{}").is_err());
    }
}
