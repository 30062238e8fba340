//! A connection of the transform, and transactions on it.

use duckdb::Connection;
use shori_core::{Error, Result};

use crate::database::{Database, duckdb_error, is_out_of_memory, traced};
use crate::tail;

/// The attached cache file.
pub(super) const CACHE: &str = "cache";
/// A catalog in memory for what need not survive: outputs being read, rows of touched entities, names for queries.
pub(super) const WORK: &str = "cache_work";

const OBJECT: &str = "the state cache";

pub(super) struct Session {
    pub connection: Connection,
    database: Database,
}

impl Session {
    pub fn open(database: &Database) -> Result<Self> {
        Ok(Self { connection: database.connect(CACHE)?, database: database.clone() })
    }

    pub fn run(&self, sql: &str) -> Result<()> {
        traced(sql, || self.connection.execute_batch(sql)).map_err(|cause| failure("update", cause))
    }

    /// Runs one statement that makes or changes rows, and returns how many.
    pub fn made(&self, sql: &str) -> Result<i64> {
        // The count is the statement's only row: that of a table being created is not told as rows changed.
        traced(sql, || self.connection.query_row(sql, [], |row| row.get(0))).map_err(|cause| failure("update", cause))
    }

    /// The single number that a query gives; null is 0.
    pub fn number(&self, sql: &str) -> Result<i64> {
        Ok(self.optional_number(sql)?.unwrap_or(0))
    }

    pub fn optional_number(&self, sql: &str) -> Result<Option<i64>> {
        let read = || self.connection.query_row(sql, [], |row| row.get::<_, Option<i64>>(0));
        traced(sql, read).map_err(|cause| failure("read", cause))
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

    /// Makes room if memory ran out. Only outside of a transaction.
    pub fn relieve_after(&self, error: &Error) {
        if is_out_of_memory(error) {
            self.database.relieve(&self.connection);
        }
    }

    /// Ends the transaction without effect. Work may have failed while names meant those of a query: they mean the cache's
    /// again.
    pub fn roll_back(&self) -> Result<()> {
        self.database.roll_back(&self.connection).map_err(|cause| failure("roll back", cause))?;
        self.run(&format!("use {CACHE}"))
    }

    /// Where the end of a table of the cache begins, if it is a large one.
    pub fn tail_of(&self, table: &str) -> Result<Option<i64>> {
        tail::start_of(&self.connection, CACHE, table).map_err(|cause| failure("read", cause))
    }

    /// Tells from how many vectors of tables of the cache committed work has deleted rows. Only outside of a transaction.
    pub fn deleted_from_vectors(&self, deleted: impl IntoIterator<Item = (String, i64)>) {
        for (table, vectors) in deleted {
            self.database.deleted(CACHE, &table, vectors.max(0) as u64);
        }
        self.database.checkpoint_if_due(&self.connection, CACHE);
    }

    /// Runs `work` in a transaction: all of it, or nothing.
    pub fn transaction<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.run("begin transaction")?;
        match work() {
            Ok(value) => {
                self.run("commit")?;
                Ok(value)
            }
            Err(error) => {
                if let Err(cause) = self.roll_back() {
                    tracing::debug!(%cause, "a rollback failed");
                }
                self.relieve_after(&error);
                Err(error)
            }
        }
    }
}

/// An error about the cache as a whole.
pub(super) fn failure(operation: &str, cause: duckdb::Error) -> Error {
    duckdb_error(operation, OBJECT, cause)
}

/// `x'..'` as DuckDB spells it.
pub(super) fn blob(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut text = String::with_capacity(bytes.len() * 4 + 8);
    text.push('\'');
    for byte in bytes {
        // Writing to a string cannot fail.
        let _ = write!(text, "\\x{byte:02X}");
    }
    text.push_str("'::blob");
    text
}
