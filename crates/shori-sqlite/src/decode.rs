//! SQLite values into Arrow arrays.
//!
//! A value either fits the type of its column exactly, or its row is rejected: nothing is coerced. Of a row that is gone
//! only the key counts; its other values are null where they do not fit.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, BinaryBuilder, BooleanArray, BooleanBuilder, Date32Builder, Decimal128Builder, Float32Builder,
    Float64Builder, Int16Builder, Int32Builder, Int64Builder, StringBuilder, Time64MicrosecondBuilder,
    TimestampMicrosecondBuilder,
};
use arrow::datatypes::{DataType, TimeUnit};
use rusqlite::Row;
use rusqlite::types::ValueRef;
use shori_core::change::{ChangeBatch, ChangeHeadBuilder, Op};
use shori_core::position::{CaptureId, Micros, Position};
use shori_core::schema::TableSchema;
use shori_core::{Error, ErrorKind, Result};

use crate::text::{self, Misfit};

const WRONG_CLASS: Misfit = "a value of another kind than the column's type";
const OUT_OF_RANGE: Misfit = "outside the range of the column's type";
const NOT_UTF8: Misfit = "not UTF-8";

/// Builds one column.
enum ColumnBuilder {
    Boolean(BooleanBuilder),
    Int16(Int16Builder),
    Int32(Int32Builder),
    Int64(Int64Builder),
    Float32(Float32Builder),
    Float64(Float64Builder),
    Text(StringBuilder),
    Binary(BinaryBuilder),
    Date(Date32Builder),
    Time(Time64MicrosecondBuilder),
    Timestamp(TimestampMicrosecondBuilder),
    Decimal(Decimal128Builder, u8, i8),
}

impl ColumnBuilder {
    fn new(data_type: &DataType) -> Result<Self> {
        Ok(match data_type {
            DataType::Boolean => Self::Boolean(BooleanBuilder::new()),
            DataType::Int16 => Self::Int16(Int16Builder::new()),
            DataType::Int32 => Self::Int32(Int32Builder::new()),
            DataType::Int64 => Self::Int64(Int64Builder::new()),
            DataType::Float32 => Self::Float32(Float32Builder::new()),
            DataType::Float64 => Self::Float64(Float64Builder::new()),
            DataType::Utf8 => Self::Text(StringBuilder::new()),
            DataType::Binary => Self::Binary(BinaryBuilder::new()),
            DataType::Date32 => Self::Date(Date32Builder::new()),
            DataType::Time64(TimeUnit::Microsecond) => Self::Time(Time64MicrosecondBuilder::new()),
            DataType::Timestamp(TimeUnit::Microsecond, zone) => {
                Self::Timestamp(TimestampMicrosecondBuilder::new().with_timezone_opt(zone.clone()))
            }
            DataType::Decimal128(precision, scale) => {
                let builder = Decimal128Builder::new().with_precision_and_scale(*precision, *scale)?;
                Self::Decimal(builder, *precision, *scale)
            }
            other => return Err(Error::new(ErrorKind::Internal, "decode", "a column", format!("of type {other}"))),
        })
    }

    /// Appends one value, or nothing when it does not fit.
    fn append(&mut self, value: ValueRef<'_>) -> Result<(), Misfit> {
        match (self, value) {
            (builder, ValueRef::Null) => builder.append_null(),
            (Self::Int64(builder), ValueRef::Integer(number)) => builder.append_value(number),
            (Self::Text(builder), ValueRef::Text(bytes)) => {
                builder.append_value(std::str::from_utf8(bytes).map_err(|_| NOT_UTF8)?);
            }
            (Self::Decimal(builder, precision, scale), value) => builder.append_value(match value {
                ValueRef::Text(bytes) => text::decimal(bytes, *precision, *scale)?,
                ValueRef::Integer(number) => text::decimal_from_integer(number, *precision, *scale)?,
                ValueRef::Real(number) => text::decimal_from_real(number, *precision, *scale)?,
                _ => return Err(WRONG_CLASS),
            }),
            (Self::Timestamp(builder), ValueRef::Text(bytes)) => builder.append_value(text::timestamp(bytes)?),
            (Self::Date(builder), ValueRef::Text(bytes)) => builder.append_value(text::date(bytes)?),
            (Self::Time(builder), ValueRef::Text(bytes)) => builder.append_value(text::time(bytes)?),
            (Self::Binary(builder), ValueRef::Blob(bytes)) => builder.append_value(bytes),
            (Self::Boolean(builder), ValueRef::Integer(number @ (0 | 1))) => builder.append_value(number == 1),
            (Self::Boolean(_), ValueRef::Integer(_)) => return Err(OUT_OF_RANGE),
            (Self::Int32(builder), ValueRef::Integer(number)) => {
                builder.append_value(i32::try_from(number).map_err(|_| OUT_OF_RANGE)?);
            }
            (Self::Int16(builder), ValueRef::Integer(number)) => {
                builder.append_value(i16::try_from(number).map_err(|_| OUT_OF_RANGE)?);
            }
            (Self::Float64(builder), ValueRef::Real(number)) => builder.append_value(number),
            (Self::Float64(builder), ValueRef::Integer(number)) => builder.append_value(exact_double(number)?),
            (Self::Float32(builder), ValueRef::Real(number)) => {
                let single = number as f32;
                if f64::from(single) != number {
                    return Err(OUT_OF_RANGE);
                }
                builder.append_value(single);
            }
            _ => return Err(WRONG_CLASS),
        }
        Ok(())
    }

    fn append_null(&mut self) {
        match self {
            Self::Boolean(builder) => builder.append_null(),
            Self::Int16(builder) => builder.append_null(),
            Self::Int32(builder) => builder.append_null(),
            Self::Int64(builder) => builder.append_null(),
            Self::Float32(builder) => builder.append_null(),
            Self::Float64(builder) => builder.append_null(),
            Self::Text(builder) => builder.append_null(),
            Self::Binary(builder) => builder.append_null(),
            Self::Date(builder) => builder.append_null(),
            Self::Time(builder) => builder.append_null(),
            Self::Timestamp(builder) => builder.append_null(),
            Self::Decimal(builder, _, _) => builder.append_null(),
        }
    }

    fn finish(self) -> ArrayRef {
        match self {
            Self::Boolean(mut builder) => Arc::new(builder.finish()),
            Self::Int16(mut builder) => Arc::new(builder.finish()),
            Self::Int32(mut builder) => Arc::new(builder.finish()),
            Self::Int64(mut builder) => Arc::new(builder.finish()),
            Self::Float32(mut builder) => Arc::new(builder.finish()),
            Self::Float64(mut builder) => Arc::new(builder.finish()),
            Self::Text(mut builder) => Arc::new(builder.finish()),
            Self::Binary(mut builder) => Arc::new(builder.finish()),
            Self::Date(mut builder) => Arc::new(builder.finish()),
            Self::Time(mut builder) => Arc::new(builder.finish()),
            Self::Timestamp(mut builder) => Arc::new(builder.finish()),
            Self::Decimal(mut builder, _, _) => Arc::new(builder.finish()),
        }
    }
}

fn exact_double(number: i64) -> Result<f64, Misfit> {
    const EXACT_TO: u64 = 1 << 53;
    if number.unsigned_abs() <= EXACT_TO { Ok(number as f64) } else { Err(OUT_OF_RANGE) }
}

/// Builds a batch of one capture, row by row.
pub(crate) struct BatchBuilder {
    capture: CaptureId,
    schema: Arc<TableSchema>,
    is_key: Vec<bool>,
    head: ChangeHeadBuilder,
    columns: Vec<ColumnBuilder>,
    /// Which rows of `columns` are accepted; empty while all are.
    accepted: Vec<bool>,
}

impl BatchBuilder {
    pub fn new(capture: CaptureId, schema: Arc<TableSchema>) -> Result<Self> {
        let fields = schema.columns.fields();
        let columns = fields.iter().map(|field| ColumnBuilder::new(field.data_type())).collect::<Result<_>>()?;
        let is_key = (0..fields.len()).map(|column| schema.key.contains(&column)).collect();
        Ok(Self { capture, schema, is_key, head: ChangeHeadBuilder::default(), columns, accepted: Vec::new() })
    }

    /// Rows accepted so far.
    pub fn len(&self) -> usize {
        self.head.len()
    }

    /// Appends a row whose column `i` is result column `at(i)`. Answers the bytes that it takes, or why it is rejected.
    pub fn push(
        &mut self,
        row: &Row<'_>,
        at: impl Fn(usize) -> usize,
        position: &Position,
        op: Op,
        time: Micros,
    ) -> rusqlite::Result<Result<usize, String>> {
        let (mut bytes, mut misfit) = (0, None);
        for (column, builder) in self.columns.iter_mut().enumerate() {
            let value = if misfit.is_some() { ValueRef::Null } else { row.get_ref(at(column))? };
            bytes += match value {
                ValueRef::Text(value) | ValueRef::Blob(value) => value.len() + 8,
                _ => 8,
            };
            let appended = match value {
                ValueRef::Null if self.is_key[column] && misfit.is_none() => Err("null in a key"),
                value => builder.append(value),
            };
            if let Err(reason) = appended {
                builder.append_null();
                if self.is_key[column] || op.leaves_row() {
                    misfit = Some(format!("column {}: {reason}", self.schema.columns.field(column).name()));
                }
            }
        }
        match misfit {
            None => {
                if !self.accepted.is_empty() {
                    self.accepted.push(true);
                }
                self.head.push(position, op, time);
                Ok(Ok(bytes + HEAD_BYTES))
            }
            Some(reason) => {
                if self.accepted.is_empty() {
                    self.accepted.resize(self.head.len(), true);
                }
                self.accepted.push(false);
                Ok(Err(reason))
            }
        }
    }

    /// `None` when no row was accepted.
    pub fn finish(self) -> Result<Option<ChangeBatch>> {
        if self.head.is_empty() {
            return Ok(None);
        }
        let mut columns: Vec<ArrayRef> = self.columns.into_iter().map(ColumnBuilder::finish).collect();
        if !self.accepted.is_empty() {
            let accepted = BooleanArray::from(self.accepted);
            for column in &mut columns {
                *column = arrow::compute::filter(column, &accepted)?;
            }
        }
        Ok(Some(self.head.finish(self.capture, self.schema, columns)?))
    }
}

/// Position, operation and time of a row, in bytes.
const HEAD_BYTES: usize = 32;

/// The row as JSON, as far as JSON can say it: what is kept of a rejected row.
pub(crate) fn raw_row(
    row: &Row<'_>,
    schema: &TableSchema,
    at: impl Fn(usize) -> usize,
    op: Op,
) -> rusqlite::Result<Vec<u8>> {
    use serde_json::{Map, Value, json};
    let mut values = Map::new();
    for (column, field) in schema.columns.fields().iter().enumerate() {
        let value = match row.get_ref(at(column))? {
            ValueRef::Null => Value::Null,
            ValueRef::Integer(number) => json!(number),
            ValueRef::Real(number) if number.is_finite() => json!(number),
            // JSON has no infinity, and SQLite no other number that it lacks.
            ValueRef::Real(number) => json!(number.to_string()),
            ValueRef::Text(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) => json!(text),
                Err(_) => json!({ "text_hex": hex(bytes) }),
            },
            ValueRef::Blob(bytes) => json!({ "blob_hex": hex(bytes) }),
        };
        values.insert(field.name().clone(), value);
    }
    Ok(json!({ "op": op as u8, "row": values }).to_string().into_bytes())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
