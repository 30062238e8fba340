//! SQLite values on their way into the scratch database: as numbers, text or bytes, made what their column declares by
//! DuckDB's own casts, so that no decoder of the engine takes part.

use std::sync::Arc;

use arrow::array::{ArrayRef, BinaryBuilder, Float64Builder, Int64Builder, RecordBatch, StringBuilder};
use arrow::datatypes::{DataType, Field, Schema};
use rusqlite::types::ValueRef;
use shori_core::{Error, ErrorKind, Result};

use super::ColumnInput;
use super::scratch::{Scratch, quote_name};

/// Rows moved at once.
const BATCH_ROWS: usize = 122_880;

enum Builder {
    Integer(Int64Builder),
    Real(Float64Builder),
    Text(StringBuilder),
    Bytes(BinaryBuilder),
}

impl Builder {
    fn of(type_name: &str) -> Self {
        match type_name {
            "boolean" | "int16" | "int32" | "int64" => Builder::Integer(Int64Builder::new()),
            "float32" | "float64" => Builder::Real(Float64Builder::new()),
            "binary" => Builder::Bytes(BinaryBuilder::new()),
            _ => Builder::Text(StringBuilder::new()),
        }
    }

    fn data_type(&self) -> DataType {
        match self {
            Builder::Integer(_) => DataType::Int64,
            Builder::Real(_) => DataType::Float64,
            Builder::Text(_) => DataType::Utf8,
            Builder::Bytes(_) => DataType::Binary,
        }
    }

    fn duckdb_type(&self) -> &'static str {
        match self {
            Builder::Integer(_) => "bigint",
            Builder::Real(_) => "double",
            Builder::Text(_) => "varchar",
            Builder::Bytes(_) => "blob",
        }
    }

    /// False where the value is of a kind that the column cannot hold.
    fn push(&mut self, value: ValueRef<'_>) -> bool {
        match (self, value) {
            (Builder::Integer(builder), ValueRef::Null) => builder.append_null(),
            (Builder::Integer(builder), ValueRef::Integer(number)) => builder.append_value(number),
            (Builder::Real(builder), ValueRef::Null) => builder.append_null(),
            (Builder::Real(builder), ValueRef::Real(number)) => builder.append_value(number),
            (Builder::Real(builder), ValueRef::Integer(number)) => builder.append_value(number as f64),
            (Builder::Text(builder), ValueRef::Null) => builder.append_null(),
            (Builder::Text(builder), ValueRef::Integer(number)) => builder.append_value(number.to_string()),
            (Builder::Text(builder), ValueRef::Real(number)) => builder.append_value(number.to_string()),
            (Builder::Text(builder), ValueRef::Text(text)) => match std::str::from_utf8(text) {
                Ok(text) => builder.append_value(text),
                Err(_) => return false,
            },
            (Builder::Bytes(builder), ValueRef::Null) => builder.append_null(),
            (Builder::Bytes(builder), ValueRef::Blob(bytes)) => builder.append_value(bytes),
            _ => return false,
        }
        true
    }

    fn finish(&mut self) -> ArrayRef {
        match self {
            Builder::Integer(builder) => Arc::new(builder.finish()),
            Builder::Real(builder) => Arc::new(builder.finish()),
            Builder::Text(builder) => Arc::new(builder.finish()),
            Builder::Bytes(builder) => Arc::new(builder.finish()),
        }
    }
}

/// The DuckDB type of a column, from its name in the configuration: `decimal(18,2)`.
pub(super) fn duckdb_type(type_name: &str) -> &str {
    match type_name {
        "int16" => "smallint",
        "int32" => "integer",
        "int64" => "bigint",
        "float32" => "float",
        "float64" => "double",
        "text" => "varchar",
        "binary" => "blob",
        // boolean, date, time, timestamp, timestamptz and decimals are called the same.
        other => other,
    }
}

/// Writes rows of SQLite values to a table of the scratch database, a batch at a time.
pub(super) struct Loader<'s> {
    scratch: &'s Scratch,
    schema: &'static str,
    table: String,
    columns: Vec<ColumnInput>,
    builders: Vec<Builder>,
    rows: usize,
    /// Rows with a value that does not fit its column are left out instead of refused.
    leaves_misfits: bool,
}

impl<'s> Loader<'s> {
    /// Creates `schema.table` with `columns`.
    pub(super) fn new(
        scratch: &'s Scratch,
        schema: &'static str,
        table: &str,
        columns: Vec<ColumnInput>,
    ) -> Result<Self> {
        let builders: Vec<_> = columns.iter().map(|column| Builder::of(&column.type_name)).collect();
        let target: Vec<_> = columns
            .iter()
            .map(|column| format!("{} {}", quote_name(&column.name), duckdb_type(&column.type_name)))
            .collect();
        let raw: Vec<_> = columns
            .iter()
            .zip(&builders)
            .map(|(column, builder)| format!("{} {}", quote_name(&column.name), builder.duckdb_type()))
            .collect();
        scratch.execute(&format!(
            "create table {schema}.{} ({}); create or replace table main.raw ({});",
            quote_name(table),
            target.join(", "),
            raw.join(", ")
        ))?;
        Ok(Self { scratch, schema, table: table.to_string(), columns, builders, rows: 0, leaves_misfits: false })
    }

    /// Leaves out rows with a value that does not fit: such a change is in the rejected log, not in a projection.
    pub(super) fn leaving_misfits(mut self) -> Self {
        self.leaves_misfits = true;
        self
    }

    /// Adds one row; `value` gives the value of each column.
    pub(super) fn push<'v>(&mut self, mut value: impl FnMut(usize) -> rusqlite::Result<ValueRef<'v>>) -> Result<()> {
        for index in 0..self.builders.len() {
            let object = || format!("column {} of table {}", self.columns[index].name, self.table);
            let value = value(index).map_err(|cause| Error::new(ErrorKind::Refused, "read", object(), cause))?;
            if !self.builders[index].push(value) {
                let cause =
                    format!("a value of type {} where {} should be", value.data_type(), self.columns[index].type_name);
                return Err(Error::new(ErrorKind::Data, "read", object(), cause));
            }
        }
        self.rows += 1;
        if self.rows == BATCH_ROWS { self.flush() } else { Ok(()) }
    }

    pub(super) fn finish(mut self) -> Result<()> {
        self.flush()?;
        self.scratch.execute("drop table main.raw")
    }

    fn flush(&mut self) -> Result<()> {
        if self.rows == 0 {
            return Ok(());
        }
        self.rows = 0;
        let fields: Vec<_> = self
            .columns
            .iter()
            .zip(&self.builders)
            .map(|(column, builder)| Field::new(&column.name, builder.data_type(), true))
            .collect();
        let arrays = self.builders.iter_mut().map(Builder::finish).collect();
        let batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays)?;
        self.scratch.append("main", "raw", batch)?;
        let casts: Vec<_> = self
            .columns
            .iter()
            .map(|column| format!("cast({} as {})", quote_name(&column.name), duckdb_type(&column.type_name)))
            .collect();
        let fits = |column: &ColumnInput| {
            let (name, wanted) = (quote_name(&column.name), duckdb_type(&column.type_name));
            format!("({name} is null or try_cast({name} as {wanted}) is not null)")
        };
        let condition = match self.leaves_misfits {
            true => self.columns.iter().map(fits).collect::<Vec<_>>().join(" and "),
            false => "true".into(),
        };
        self.scratch.execute(&format!(
            "insert into {}.{} select {} from main.raw where {condition}; truncate main.raw;",
            self.schema,
            quote_name(&self.table),
            casts.join(", ")
        ))
    }
}
