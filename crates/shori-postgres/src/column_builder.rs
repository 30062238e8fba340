//! Values of a column into an Arrow array.
//!
//! A value fits the type of its column exactly, or it is refused and leaves no trace: nothing is coerced. The text and
//! the binary format of a value end in the same.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, BinaryBuilder, BooleanBuilder, Date32Builder, Decimal128Builder, Float32Builder, Float64Builder,
    Int16Builder, Int32Builder, Int64Builder, StringBuilder, Time64MicrosecondBuilder, TimestampMicrosecondBuilder,
};
use arrow::datatypes::{DataType, TimeUnit};
use shori_core::{Error, ErrorKind, Result};

use crate::column_types::{Kind, PostgresType, arrow_type, oid};
use crate::message::Value;
use crate::{date_time, numeric, plain_values};

/// Why a value does not fit the type of its column.
pub type Misfit = &'static str;

const UNCHANGED: Misfit = "it was not sent";
const NO_TEXT: Misfit = "a binary value, where the column is read as text";
const FULL: Misfit = "too large for the values of its column to stand in one batch";

/// Builds one column.
pub struct ColumnBuilder {
    values: Values,
    rows: usize,
    /// Bytes of a row, besides what text and bytes take.
    row_bytes: usize,
}

enum Values {
    Boolean(BooleanBuilder),
    Int16(Int16Builder),
    Int32(Int32Builder),
    Int64(Int64Builder),
    ObjectId(Int64Builder),
    Float32(Float32Builder),
    Float64(Float64Builder),
    Text(StringBuilder, Spelling),
    /// With room for the bytes that text stands for.
    Binary(BinaryBuilder, Vec<u8>),
    Date(Date32Builder),
    Time(Time64MicrosecondBuilder),
    Timestamp(TimestampMicrosecondBuilder),
    Instant(TimestampMicrosecondBuilder),
    Decimal {
        builder: Decimal128Builder,
        precision: u8,
        scale: u8,
    },
}

/// How the text of a type is written in binary.
#[derive(Clone, Copy)]
enum Spelling {
    AsText,
    Char,
    Uuid,
    Jsonb,
    /// Some other way: only what the server prints can be read.
    Unread,
}

impl ColumnBuilder {
    /// Fails with [`ErrorKind::Schema`] when `data_type` is not what [`arrow_type`] makes of the column, configured as
    /// text or not.
    pub fn new(data_type: &DataType, column: &PostgresType) -> Result<Self> {
        Self::with_room(data_type, column, 0, 0)
    }

    /// With room for so many rows, and for the bytes that their texts take.
    pub fn with_room(data_type: &DataType, column: &PostgresType, rows: usize, text_bytes: usize) -> Result<Self> {
        let native = arrow_type(column, false);
        if native.as_ref() != Ok(data_type) && *data_type != DataType::Utf8 {
            return Err(Error::new(
                ErrorKind::Schema,
                "decode",
                format!("a column of type {}", column.name),
                format!("it is not carried as {data_type}"),
            ));
        }
        let values = match data_type {
            DataType::Boolean => Values::Boolean(BooleanBuilder::with_capacity(rows)),
            DataType::Int16 => Values::Int16(Int16Builder::with_capacity(rows)),
            DataType::Int32 => Values::Int32(Int32Builder::with_capacity(rows)),
            DataType::Int64 if column.oid == oid::OID => Values::ObjectId(Int64Builder::with_capacity(rows)),
            DataType::Int64 => Values::Int64(Int64Builder::with_capacity(rows)),
            DataType::Float32 => Values::Float32(Float32Builder::with_capacity(rows)),
            DataType::Float64 => Values::Float64(Float64Builder::with_capacity(rows)),
            DataType::Utf8 => {
                let spelling = if native == Ok(DataType::Utf8) { spelling(column) } else { Spelling::Unread };
                Values::Text(StringBuilder::with_capacity(rows, text_bytes), spelling)
            }
            DataType::Binary => Values::Binary(BinaryBuilder::with_capacity(rows, text_bytes), Vec::new()),
            DataType::Date32 => Values::Date(Date32Builder::with_capacity(rows)),
            DataType::Time64(TimeUnit::Microsecond) => Values::Time(Time64MicrosecondBuilder::with_capacity(rows)),
            DataType::Timestamp(TimeUnit::Microsecond, None) => {
                Values::Timestamp(TimestampMicrosecondBuilder::with_capacity(rows))
            }
            DataType::Timestamp(TimeUnit::Microsecond, zone) => {
                Values::Instant(TimestampMicrosecondBuilder::with_capacity(rows).with_timezone_opt(zone.clone()))
            }
            DataType::Decimal128(precision, scale) => Values::Decimal {
                builder: Decimal128Builder::with_capacity(rows).with_precision_and_scale(*precision, *scale)?,
                precision: *precision,
                scale: scale.unsigned_abs(),
            },
            other => return Err(Error::new(ErrorKind::Internal, "decode", "a column", format!("of type {other}"))),
        };
        let row_bytes = data_type.primitive_width().unwrap_or(size_of::<i32>());
        Ok(Self { values, rows: 0, row_bytes })
    }

    pub fn len(&self) -> usize {
        self.rows
    }

    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Bytes that texts and the like take.
    pub fn text_bytes(&self) -> usize {
        match &self.values {
            Values::Text(builder, _) => builder.values_slice().len(),
            Values::Binary(builder, _) => builder.values_slice().len(),
            _ => 0,
        }
    }

    /// Bytes that the values take, without spare room.
    pub fn memory_bytes(&self) -> usize {
        let spare = if let Values::Binary(_, spare) = &self.values { spare.capacity() } else { 0 };
        self.rows * self.row_bytes + self.text_bytes() + spare
    }

    /// Appends one value, or nothing when it does not fit. [`Value::Unchanged`] never does.
    pub fn append(&mut self, value: Value<'_>) -> Result<(), Misfit> {
        match value {
            Value::Null => self.append_null(),
            Value::Unchanged => return Err(UNCHANGED),
            Value::Text(text) => {
                self.values.append_text(text)?;
                self.rows += 1;
            }
            Value::Binary(bytes) => {
                self.values.append_binary(bytes)?;
                self.rows += 1;
            }
        }
        Ok(())
    }

    pub fn append_null(&mut self) {
        self.rows += 1;
        match &mut self.values {
            Values::Boolean(builder) => builder.append_null(),
            Values::Int16(builder) => builder.append_null(),
            Values::Int32(builder) => builder.append_null(),
            Values::Int64(builder) | Values::ObjectId(builder) => builder.append_null(),
            Values::Float32(builder) => builder.append_null(),
            Values::Float64(builder) => builder.append_null(),
            Values::Text(builder, _) => builder.append_null(),
            Values::Binary(builder, _) => builder.append_null(),
            Values::Date(builder) => builder.append_null(),
            Values::Time(builder) => builder.append_null(),
            Values::Timestamp(builder) | Values::Instant(builder) => builder.append_null(),
            Values::Decimal { builder, .. } => builder.append_null(),
        }
    }

    pub fn finish(self) -> ArrayRef {
        match self.values {
            Values::Boolean(mut builder) => Arc::new(builder.finish()),
            Values::Int16(mut builder) => Arc::new(builder.finish()),
            Values::Int32(mut builder) => Arc::new(builder.finish()),
            Values::Int64(mut builder) | Values::ObjectId(mut builder) => Arc::new(builder.finish()),
            Values::Float32(mut builder) => Arc::new(builder.finish()),
            Values::Float64(mut builder) => Arc::new(builder.finish()),
            Values::Text(mut builder, _) => Arc::new(builder.finish()),
            Values::Binary(mut builder, _) => Arc::new(builder.finish()),
            Values::Date(mut builder) => Arc::new(builder.finish()),
            Values::Time(mut builder) => Arc::new(builder.finish()),
            Values::Timestamp(mut builder) | Values::Instant(mut builder) => Arc::new(builder.finish()),
            Values::Decimal { mut builder, .. } => Arc::new(builder.finish()),
        }
    }
}

impl Values {
    fn append_text(&mut self, text: &[u8]) -> Result<(), Misfit> {
        match self {
            Self::Boolean(builder) => builder.append_value(plain_values::boolean_from_text(text)?),
            Self::Int16(builder) => builder.append_value(plain_values::integer_from_text(text)?),
            Self::Int32(builder) => builder.append_value(plain_values::integer_from_text(text)?),
            Self::Int64(builder) => builder.append_value(plain_values::integer_from_text(text)?),
            Self::ObjectId(builder) => {
                builder.append_value(plain_values::integer_from_text::<u32>(text)?.into());
            }
            Self::Float32(builder) => builder.append_value(plain_values::float_from_text(text)?),
            Self::Float64(builder) => builder.append_value(plain_values::float_from_text(text)?),
            Self::Text(builder, _) => append_str(builder, plain_values::utf8(text)?)?,
            Self::Binary(builder, bytes) => {
                plain_values::bytes_from_text(text, bytes)?;
                append_bytes(builder, bytes)?;
            }
            Self::Date(builder) => builder.append_value(date_time::date_from_text(text)?),
            Self::Time(builder) => builder.append_value(date_time::time_from_text(text)?),
            Self::Timestamp(builder) => builder.append_value(date_time::timestamp_from_text(text)?),
            Self::Instant(builder) => builder.append_value(date_time::instant_from_text(text)?),
            Self::Decimal { builder, precision, scale } => {
                builder.append_value(numeric::from_text(text, *precision, *scale)?);
            }
        }
        Ok(())
    }

    fn append_binary(&mut self, bytes: &[u8]) -> Result<(), Misfit> {
        match self {
            Self::Boolean(builder) => builder.append_value(plain_values::boolean_from_binary(bytes)?),
            Self::Int16(builder) => builder.append_value(i16::from_be_bytes(plain_values::fixed(bytes)?)),
            Self::Int32(builder) => builder.append_value(i32::from_be_bytes(plain_values::fixed(bytes)?)),
            Self::Int64(builder) => builder.append_value(i64::from_be_bytes(plain_values::fixed(bytes)?)),
            Self::ObjectId(builder) => builder.append_value(u32::from_be_bytes(plain_values::fixed(bytes)?).into()),
            Self::Float32(builder) => builder.append_value(plain_values::single_from_binary(bytes)?),
            Self::Float64(builder) => builder.append_value(plain_values::double_from_binary(bytes)?),
            Self::Text(builder, Spelling::AsText) => append_str(builder, plain_values::utf8(bytes)?)?,
            Self::Text(builder, Spelling::Char) => append_str(builder, &plain_values::char_from_binary(bytes)?)?,
            Self::Text(builder, Spelling::Uuid) => append_str(builder, &plain_values::uuid_from_binary(bytes)?)?,
            Self::Text(builder, Spelling::Jsonb) => append_str(builder, plain_values::jsonb_from_binary(bytes)?)?,
            Self::Text(_, Spelling::Unread) => return Err(NO_TEXT),
            Self::Binary(builder, _) => append_bytes(builder, bytes)?,
            Self::Date(builder) => builder.append_value(date_time::date_from_binary(bytes)?),
            Self::Time(builder) => builder.append_value(date_time::time_from_binary(bytes)?),
            Self::Timestamp(builder) | Self::Instant(builder) => {
                builder.append_value(date_time::timestamp_from_binary(bytes)?);
            }
            Self::Decimal { builder, precision, scale } => {
                builder.append_value(numeric::from_binary(bytes, *precision, *scale)?);
            }
        }
        Ok(())
    }
}

fn spelling(column: &PostgresType) -> Spelling {
    match (column.kind, column.oid) {
        (Kind::Base, oid::CHAR) => Spelling::Char,
        (Kind::Base, oid::UUID) => Spelling::Uuid,
        (Kind::Base, oid::JSONB) => Spelling::Jsonb,
        _ => Spelling::AsText,
    }
}

fn append_str(builder: &mut StringBuilder, text: &str) -> Result<(), Misfit> {
    room(builder.values_slice().len(), text.len())?;
    builder.append_value(text);
    Ok(())
}

fn append_bytes(builder: &mut BinaryBuilder, bytes: &[u8]) -> Result<(), Misfit> {
    room(builder.values_slice().len(), bytes.len())?;
    builder.append_value(bytes);
    Ok(())
}

/// Arrow counts the bytes of a column in 31 bits.
fn room(held: usize, added: usize) -> Result<(), Misfit> {
    if held.saturating_add(added) <= i32::MAX as usize { Ok(()) } else { Err(FULL) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_ends_where_arrow_cannot_count_its_bytes() {
        assert_eq!(room(0, i32::MAX as usize), Ok(()));
        assert_eq!(room(1, i32::MAX as usize), Err(FULL));
        assert_eq!(room(i32::MAX as usize, 1), Err(FULL));
        assert_eq!(room(usize::MAX, 1), Err(FULL));
    }
}
