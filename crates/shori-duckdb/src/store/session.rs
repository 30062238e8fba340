//! Connections of a store, and transactions on them.
//!
//! A connection returns to the pool only between transactions: one that is dropped otherwise is closed, which rolls
//! back what it had begun.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arrow::datatypes::{DataType, TimeUnit};
use duckdb::Connection;
use duckdb::types::Value;
use shori_core::position::{Micros, Position};
use shori_core::{Error, ErrorKind, Result};

use crate::database::{Database, duckdb_error, traced};
use crate::known_targets::KnownTargets;
use crate::scattered::rows_of;

/// Connections that wait for use at most; more are closed.
const IDLE_CONNECTIONS_MAX: usize = 4;
/// How often a transaction that lost against another is tried again before the caller hears of it.
const CONFLICT_RETRIES_MAX: u32 = 10;
const CONFLICT_PAUSE: Duration = Duration::from_millis(2);
/// Prepared statements that a connection keeps.
const STATEMENTS_KEPT: usize = 64;

/// What all handles to one store share.
pub(super) struct Sessions {
    pub database: Database,
    pub catalog: String,
    idle: Mutex<Vec<Connection>>,
}

impl Sessions {
    pub fn new(database: Database, catalog: &str) -> Self {
        Self { database, catalog: catalog.to_string(), idle: Mutex::default() }
    }

    /// The connection that was used last, so that its prepared statements serve again, or a new one.
    pub fn session(self: &Arc<Self>) -> Result<Session> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let connection = match idle {
            Some(connection) => connection,
            None => {
                let connection = self.database.connect(&self.catalog)?;
                connection.set_prepared_statement_cache_capacity(STATEMENTS_KEPT);
                connection
            }
        };
        Ok(Session { connection, sessions: self.clone() })
    }
}

/// A connection on loan.
pub(super) struct Session {
    pub connection: Connection,
    sessions: Arc<Sessions>,
}

impl Session {
    pub fn catalog(&self) -> &str {
        &self.sessions.catalog
    }

    /// Takes note of an error of a transaction that wrote.
    pub fn failed(&self, error: Error) -> Error {
        self.sessions.database.failed(error)
    }

    /// Whether calls run on the caller's thread.
    pub fn is_inline(&self) -> bool {
        self.sessions.database.is_inline()
    }

    /// Gives the connection back. Only outside of a transaction: a checkpoint that is due is made before.
    pub fn give_back(self) {
        self.sessions.database.checkpoint_if_due(&self.connection, &self.sessions.catalog);
        let mut idle = self.sessions.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_CONNECTIONS_MAX {
            idle.push(self.connection);
        }
    }

    pub fn batch(&self, sql: &str, object: &str) -> Result<()> {
        traced(sql, || self.connection.execute_batch(sql)).map_err(|cause| duckdb_error("write", object, cause))
    }

    /// Planned anew at each call, as in [`rows`](Session::rows): a kept plan has the statistics of the tables as they
    /// were when it was made built into it, so that later it gives rows and counts that are not there.
    pub fn execute(&self, sql: &str, values: &[Value], object: &str) -> Result<u64> {
        let run = || self.connection.prepare(sql)?.execute(duckdb::params_from_iter(values));
        traced(sql, run).map(|rows| rows as u64).map_err(|cause| duckdb_error("write", object, cause))
    }

    pub fn rows<T>(
        &self,
        sql: &str,
        values: &[Value],
        object: &str,
        read: impl FnMut(&duckdb::Row<'_>) -> duckdb::Result<T>,
    ) -> Result<Vec<T>> {
        let run = || -> duckdb::Result<Vec<T>> {
            let mut statement = self.connection.prepare(sql)?;
            statement.query_map(duckdb::params_from_iter(values), read)?.collect()
        };
        traced(sql, run).map_err(|cause| duckdb_error("read", object, cause))
    }

    /// The count or other number that `sql` gives.
    pub fn number(&self, sql: &str, object: &str) -> Result<i64> {
        let rows = self.rows(sql, &[], object, |row| row.get(0))?;
        rows.first().copied().ok_or_else(|| Error::new(ErrorKind::Internal, "read", object, "no row came"))
    }

    /// Runs `work` in a transaction: all of it is durable, or nothing has happened. A transaction that lost against
    /// another is begun again, so `work` must read what it decides by.
    pub fn transaction<T>(&self, object: &str, mut work: impl FnMut(&Session) -> Result<T>) -> Result<T> {
        let mut attempt = 0;
        loop {
            self.batch("begin", object)?;
            let result = work(self).and_then(|done| self.batch("commit", object).map(|()| done));
            match result {
                Ok(done) => return Ok(done),
                Err(error) => {
                    let error = self.failed(error);
                    self.roll_back();
                    if error.kind() != ErrorKind::Unavailable || attempt == CONFLICT_RETRIES_MAX {
                        return Err(error);
                    }
                    attempt += 1;
                    std::thread::sleep(CONFLICT_PAUSE * attempt);
                }
            }
        }
    }

    /// Rows of a table, deleted ones among them until they are swept up.
    pub fn table_rows(&self, table: &str) -> Result<u64> {
        let rows = rows_of(&self.connection, self.catalog(), table);
        rows.map(|rows| rows.max(0) as u64).map_err(|cause| duckdb_error("read", table, cause))
    }

    /// What the instance knows of its targets.
    pub fn known_targets(&self) -> &KnownTargets {
        self.sessions.database.known_targets()
    }

    /// Tells that committed work has deleted rows from so many vectors of `table`, at most.
    pub fn deleted(&self, table: &str, vectors: u64) {
        self.sessions.database.deleted(&self.sessions.catalog, table, vectors);
    }

    /// Runs `work` unless a checkpoint is under way.
    pub fn unless_checkpointing(&self, work: impl FnOnce()) {
        self.sessions.database.unless_checkpointing(work);
    }

    /// Ends what is begun, if anything is: a failed commit has ended it already.
    pub fn roll_back(&self) {
        if let Err(cause) = self.sessions.database.roll_back(&self.connection) {
            tracing::debug!(%cause, "nothing to roll back");
        }
    }
}

/// A position's two values.
pub(super) fn position_values(position: &Position) -> [Value; 2] {
    [blob(position.lsn.as_slice()), blob(position.seq.as_slice())]
}

pub(super) fn blob(bytes: &[u8]) -> Value {
    Value::Blob(bytes.to_vec())
}

pub(super) fn text(text: &str) -> Value {
    Value::Text(text.to_string())
}

pub(super) fn time(micros: Micros) -> Value {
    Value::Timestamp(duckdb::types::TimeUnit::Microsecond, micros)
}

pub(super) fn now() -> Micros {
    chrono::Utc::now().timestamp_micros()
}

/// The type of the store's own times in Arrow.
pub(super) fn time_type() -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, None)
}

/// A time that a row holds.
pub(super) fn get_time(row: &duckdb::Row<'_>, index: usize) -> duckdb::Result<Option<Micros>> {
    match row.get_ref(index)? {
        duckdb::types::ValueRef::Null => Ok(None),
        duckdb::types::ValueRef::Timestamp(unit, value) => Ok(Some(unit.to_micros(value))),
        other => Err(duckdb::Error::InvalidColumnType(index, "a time".into(), other.data_type())),
    }
}

/// A position that a row holds in two columns.
pub(super) fn get_position(row: &duckdb::Row<'_>, index: usize) -> duckdb::Result<Position> {
    let (lsn, seq): (Vec<u8>, Vec<u8>) = (row.get(index)?, row.get(index + 1)?);
    Position::from_slices(&lsn, &seq)
        .map_err(|cause| duckdb::Error::FromSqlConversionFailure(index, duckdb::types::Type::Blob, Box::new(cause)))
}

/// A blob, as a constant that DuckDB can compare with its zone maps (a parameter is not known when it plans).
pub(super) fn blob_literal(bytes: &[u8]) -> String {
    let mut literal = String::from("'");
    for byte in bytes {
        literal.push_str(&format!("\\x{byte:02X}"));
    }
    literal.push_str("'::blob");
    literal
}

/// `position <= bound` over the columns `lsn, seqval` of `table`; the first part is for the zone maps.
pub(super) fn at_or_below(table: &str, bound: &Position) -> String {
    let (lsn, seq) = (blob_literal(bound.lsn.as_slice()), blob_literal(bound.seq.as_slice()));
    format!("({table}.lsn <= {lsn} and ({table}.lsn < {lsn} or {table}.seqval <= {seq}))")
}

/// `position > bound`.
pub(super) fn above(table: &str, bound: &Position) -> String {
    let (lsn, seq) = (blob_literal(bound.lsn.as_slice()), blob_literal(bound.seq.as_slice()));
    format!("({table}.lsn >= {lsn} and ({table}.lsn > {lsn} or {table}.seqval > {seq}))")
}
