//! Changing a few rows by taking them out and putting them back.
//!
//! Until a row that was updated in place is swept up, no checkpoint can go on beside other writers, and while one does, an
//! update waits for it: see [`checkpoint`](crate::checkpoint). Deletions and insertions do neither.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, BinaryArray, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray, new_null_array,
};
use duckdb::types::{TimeUnit, Value};
use shori_core::{Error, ErrorKind, Result};

use super::session::Session;
use crate::database::{duckdb_error, traced};

/// Rows that were taken out of a table, to be put back within the same transaction.
pub(super) struct Taken {
    table: &'static str,
    batches: Vec<RecordBatch>,
}

impl Taken {
    /// Takes the rows that meet `condition`, which takes `values`.
    pub fn take(session: &Session, table: &'static str, condition: &str, values: &[Value]) -> Result<Self> {
        let sql = format!("delete from {table} where {condition} returning *");
        let take = || -> duckdb::Result<Vec<RecordBatch>> {
            let mut statement = session.connection.prepare(&sql)?;
            Ok(statement.query_arrow(duckdb::params_from_iter(values))?.collect())
        };
        let mut batches = traced(&sql, take).map_err(|cause| duckdb_error("write", table, cause))?;
        batches.retain(|batch| batch.num_rows() > 0);
        Ok(Self { table, batches })
    }

    pub fn rows(&self) -> usize {
        self.batches.iter().map(RecordBatch::num_rows).sum()
    }

    /// The column `name` of each batch.
    pub fn column<'t>(&'t self, name: &'t str) -> impl Iterator<Item = &'t ArrayRef> {
        self.batches.iter().filter_map(move |batch| batch.column_by_name(name))
    }

    /// All of the rows; none are left.
    pub fn take_all(&mut self) -> Self {
        Self { table: self.table, batches: std::mem::take(&mut self.batches) }
    }

    /// Puts the rows back with some columns set.
    pub fn put(self, session: &Session, set: &[(&str, Value)]) -> Result<()> {
        for batch in &self.batches {
            let changed = changed(batch, self.table, set)?;
            let put = || {
                let (catalog, connection) = (session.catalog(), &session.connection);
                let mut appender = connection.appender_to_catalog_and_db(self.table, catalog, "main")?;
                appender.append_record_batch(changed)?;
                appender.flush()
            };
            traced("put back", put).map_err(|cause| duckdb_error("write", self.table, cause))?;
        }
        Ok(())
    }
}

/// Sets columns of the rows of `table` that meet `condition`, which takes `values`. Within the caller's transaction.
pub(super) fn rewrite(
    session: &Session,
    table: &'static str,
    set: &[(&str, Value)],
    condition: &str,
    values: &[Value],
) -> Result<()> {
    Taken::take(session, table, condition, values)?.put(session, set)
}

fn changed(batch: &RecordBatch, table: &str, set: &[(&str, Value)]) -> Result<RecordBatch> {
    let schema = batch.schema();
    let mut columns = batch.columns().to_vec();
    for (name, value) in set {
        let wrong = |cause: &str| Error::new(ErrorKind::Internal, "write", format!("{table}.{name}"), cause);
        let index = schema.index_of(name).map_err(|_| wrong("there is no such column"))?;
        let column = constant(value, batch.num_rows()).ok_or_else(|| wrong("a value of this kind is not written"))?;
        columns[index] = match value {
            Value::Null => new_null_array(schema.field(index).data_type(), batch.num_rows()),
            _ if column.data_type() == schema.field(index).data_type() => column,
            _ => return Err(wrong("the value is of another type")),
        };
    }
    Ok(RecordBatch::try_new(schema, columns)?)
}

fn constant(value: &Value, count: usize) -> Option<ArrayRef> {
    Some(match value {
        Value::Null => new_null_array(&arrow::datatypes::DataType::Null, count),
        Value::BigInt(number) => Arc::new(Int64Array::from_value(*number, count)),
        Value::Text(text) => Arc::new(StringArray::from_iter_values(std::iter::repeat_n(text, count))),
        Value::Blob(bytes) => Arc::new(BinaryArray::from_iter_values(std::iter::repeat_n(bytes, count))),
        Value::Timestamp(TimeUnit::Microsecond, micros) => {
            Arc::new(TimestampMicrosecondArray::from_value(*micros, count))
        }
        _ => return None,
    })
}
