//! A connection of the transform to DuckDB, which runs queries over what it is given.

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use duckdb::Connection;
use shori_core::{Error, Result};

use super::cells::Cell;
use super::tables::Batch;
use crate::database::{Database, duckdb_error, is_out_of_memory, quote_name, traced};
use crate::types::duckdb_type;

/// A catalog in memory: tables that queries read, outputs being read, names for queries. Nothing in it need survive.
pub(super) const WORK: &str = "cache_work";

const OBJECT: &str = "the working tables";

pub(super) struct Session {
    pub connection: Connection,
    database: Database,
}

impl Session {
    pub fn open(database: &Database) -> Result<Self> {
        Ok(Self { connection: database.connect(WORK)?, database: database.clone() })
    }

    pub fn run(&self, sql: &str) -> Result<()> {
        traced(sql, || self.connection.execute_batch(sql)).map_err(|cause| failure("update", cause))
    }

    /// Runs one statement that makes or changes rows, and returns how many.
    pub fn made(&self, sql: &str) -> Result<i64> {
        // The count is the statement's only row: that of a table being created is not told as rows changed.
        traced(sql, || self.connection.query_row(sql, [], |row| row.get(0))).map_err(|cause| failure("update", cause))
    }

    /// All rows of a query, each made by `make`.
    pub fn rows<T>(&self, sql: &str, mut make: impl FnMut(&duckdb::Row<'_>) -> duckdb::Result<T>) -> Result<Vec<T>> {
        let read = || {
            let mut statement = self.connection.prepare(sql)?;
            let mut rows = statement.query([])?;
            let mut made = Vec::new();
            while let Some(row) = rows.next()? {
                made.push(make(row)?);
            }
            Ok(made)
        };
        traced(sql, read).map_err(|cause| failure("read", cause))
    }

    /// The batches of a query's answer, one after the other.
    pub fn batches(&self, sql: &str, mut take: impl FnMut(RecordBatch) -> Result<()>) -> Result<()> {
        let reading = |cause| failure("read", cause);
        traced(sql, || {
            let mut statement = self.connection.prepare(sql).map_err(reading)?;
            let batches = statement.stream_arrow([]).map_err(reading)?;
            batches.into_iter().try_for_each(&mut take)
        })
    }

    /// Makes an empty table, in the place of what has its name.
    pub fn create(&self, table: &WorkTable) -> Result<()> {
        let definition = |field: &arrow::datatypes::FieldRef| {
            Ok(format!("{} {}", quote_name(field.name()), duckdb_type(field.data_type())?))
        };
        let definitions: Result<Vec<String>> = table.columns.fields().iter().map(definition).collect();
        self.run(&format!("create or replace table {} ({})", table.full_name(), definitions?.join(", ")))
    }

    pub fn load(&self, table: &WorkTable, rows: RecordBatch) -> Result<()> {
        let load = || {
            let mut appender = self.connection.appender_to_catalog_and_db(&table.name, WORK, &table.schema)?;
            appender.append_record_batch(rows)?;
            appender.flush()
        };
        traced("append", load).map_err(|cause| {
            let error = failure("load rows into", cause);
            self.relieve_after(&error);
            error
        })
    }

    /// Makes room if memory ran out. Only outside of a transaction.
    pub fn relieve_after(&self, error: &Error) {
        if is_out_of_memory(error) {
            self.database.relieve(&self.connection);
        }
    }

    /// Work may have failed while names meant those of a query: they mean the work catalog's again.
    pub fn recover(&self, error: &Error) -> Result<()> {
        self.relieve_after(error);
        self.run(&format!("use {WORK}"))
    }
}

/// A table of the work catalog that rows are loaded into.
#[derive(Clone)]
pub(super) struct WorkTable {
    pub schema: String,
    pub name: String,
    pub columns: SchemaRef,
}

impl WorkTable {
    pub fn full_name(&self) -> String {
        format!("{WORK}.{}.{}", quote_name(&self.schema), quote_name(&self.name))
    }
}

/// Rows that are loaded at a time.
const LOAD_ROWS: usize = 16_384;

/// Loads rows into a table, some thousand at a time.
pub(super) struct Loader<'s> {
    session: &'s Session,
    table: WorkTable,
    batch: Batch,
}

impl<'s> Loader<'s> {
    pub fn new(session: &'s Session, table: WorkTable) -> Result<Self> {
        let batch = Batch::new(table.columns.clone())?;
        Ok(Self { session, table, batch })
    }

    /// Adds a row of as many cells as the table has columns.
    pub fn push<'a>(&mut self, cells: impl IntoIterator<Item = Cell<'a>>) -> Result<()> {
        self.batch.push(cells)?;
        if self.batch.rows() == LOAD_ROWS { self.load() } else { Ok(()) }
    }

    fn load(&mut self) -> Result<()> {
        match self.batch.rows() {
            0 => Ok(()),
            _ => self.session.load(&self.table, self.batch.take()?),
        }
    }

    pub fn finish(mut self) -> Result<()> {
        self.load()
    }
}

pub(super) fn comma(parts: impl IntoIterator<Item = String>) -> String {
    parts.into_iter().collect::<Vec<_>>().join(", ")
}

/// An error about the working tables as a whole.
pub(super) fn failure(operation: &str, cause: duckdb::Error) -> Error {
    duckdb_error(operation, OBJECT, cause)
}
