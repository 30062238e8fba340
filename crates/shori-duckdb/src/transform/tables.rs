//! A table of state: where its rows lie in the state file, and how a row is written.
//!
//! What is kept of a row is a head (the commit that left it: length of its lsn and lsn; its time; the boundary of its
//! version, if any: each as a cell of [`cells`](super::cells)), and then the columns' cells.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::{DataType, FieldRef, Schema, SchemaRef};
use shori_core::position::{CaptureId, Lsn, Micros, SortKey};
use shori_core::schema::{SchemaChange, TableSchema};
use shori_core::{Error, ErrorKind, Result};

use super::cells::{Cell, Cells, Column, is_whole, number, write_cell, write_number};
use super::key::Key;

/// Captures are numbered in the file, from 1.
pub(super) type CaptureNumber = u16;

/// One logical table; several captures may feed it, each with keys of its own.
#[derive(Clone, Debug)]
pub(super) struct Table {
    pub number: i64,
    pub name: Arc<str>,
    /// As they stand in the file: later columns follow.
    pub columns: Vec<FieldRef>,
    pub key: Vec<usize>,
    pub captures: Vec<(CaptureNumber, CaptureId)>,
    /// A history reads it: every committed version is kept.
    pub has_history: bool,
    /// Columns by which rows are found beside their key.
    pub indexes: Vec<Index>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Index {
    pub number: i64,
    pub column: usize,
}

/// When a row was left as it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Head {
    pub lsn: Lsn,
    pub time: Micros,
    /// When its version began to hold, where a history is kept.
    pub boundary: Option<Micros>,
}

impl Head {
    pub fn write(&self, out: &mut Vec<u8>) {
        write_cell(out, Some(self.lsn.as_slice()));
        write_number(self.time, out);
        match self.boundary {
            Some(boundary) => write_number(boundary, out),
            None => write_cell(out, None),
        }
    }

    /// The head, and the cells behind it.
    pub fn read(row: &[u8]) -> Result<(Self, Cells<'_>)> {
        let mut cells = Cells(row);
        let lsn = SortKey::from_slice(cells.next()?.unwrap_or_default())?;
        let time = cells.next()?.map(micros).transpose()?.unwrap_or_default();
        let boundary = cells.next()?.map(micros).transpose()?;
        Ok((Self { lsn, time, boundary }, cells))
    }
}

fn micros(cell: &[u8]) -> Result<Micros> {
    Micros::try_from(number(cell)?)
        .map_err(|cause| Error::new(ErrorKind::Corrupt, "read", "a time in the state file", cause))
}

impl Table {
    pub fn new(number: i64, schema: &TableSchema) -> Self {
        Self {
            number,
            name: schema.table.clone(),
            columns: schema.columns.fields().iter().cloned().collect(),
            key: schema.key.clone(),
            captures: Vec::new(),
            has_history: false,
            indexes: Vec::new(),
        }
    }

    /// Columns that `schema` has besides. Fails when it does not fit what stands.
    pub fn added_by(&self, schema: &TableSchema) -> Result<Vec<FieldRef>> {
        match self.schema().change_to(schema) {
            SchemaChange::Same => Ok(Vec::new()),
            SchemaChange::Evolved { added, .. } => Ok(added),
            SchemaChange::Incompatible { reason } => {
                Err(Error::new(ErrorKind::Schema, "keep", format!("state of table {}", self.name), reason))
            }
        }
    }

    pub fn schema(&self) -> TableSchema {
        TableSchema {
            table: self.name.clone(),
            columns: Arc::new(Schema::new(self.columns.clone())),
            key: self.key.clone(),
        }
    }

    pub fn index_of(&self, column: &str) -> Option<usize> {
        self.columns.iter().position(|field| field.name() == column)
    }

    /// Whether SQLite's own row number is the key: smaller, and faster to find.
    pub fn has_number_key(&self) -> bool {
        matches!(self.key.as_slice(), [only] if is_whole(self.columns[*only].data_type()) && !self.columns[*only].is_nullable())
    }

    pub fn type_of(&self, column: usize) -> &DataType {
        self.columns[column].data_type()
    }

    /// The key of a row with these cells.
    pub fn key_of(&self, cells: &[Cell<'_>]) -> Result<Key> {
        Key::of(&self.key, |index| self.type_of(index), cells)
    }

    /// What a row holds in a column, to find others by.
    pub fn value_of(&self, column: usize, cells: &[Cell<'_>]) -> Result<Key> {
        Key::of_one(self.type_of(column), cells[column])
    }

    pub fn index_on(&self, column: usize) -> Option<&Index> {
        self.indexes.iter().find(|index| index.column == column)
    }
}

/// Rows being laid out as Arrow columns.
pub(super) struct Batch {
    schema: SchemaRef,
    columns: Vec<Column>,
    rows: usize,
}

impl Batch {
    pub fn new(schema: SchemaRef) -> Result<Self> {
        let columns = schema.fields().iter().map(|field| Column::new(field.data_type())).collect::<Result<_>>()?;
        Ok(Self { schema, columns, rows: 0 })
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Adds a row of as many cells as there are columns.
    pub fn push<'a>(&mut self, cells: impl IntoIterator<Item = Cell<'a>>) -> Result<()> {
        let mut cells = cells.into_iter();
        for column in &mut self.columns {
            column.push(cells.next().flatten())?;
        }
        self.rows += 1;
        Ok(())
    }

    /// The rows added so far; it goes on empty.
    pub fn take(&mut self) -> Result<RecordBatch> {
        let arrays: Vec<ArrayRef> = self.columns.iter_mut().map(Column::finish).collect();
        self.rows = 0;
        Ok(RecordBatch::try_new(self.schema.clone(), arrays)?)
    }
}
