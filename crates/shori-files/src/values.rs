//! Values of the carried types as JSON, and back: nothing is lost on the way.
//!
//! Integers and finite floating-point numbers are JSON numbers; decimals, dates, times, bytes (base64) and what is no
//! number are text. See `docs/change-logs.md`. Permanent: files keep it.

use std::borrow::Cow;
use std::fmt;
use std::io::Write;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryBuilder, BooleanBuilder, Date32Builder, Decimal128Builder, Float32Builder,
    Float64Builder, Int16Builder, Int32Builder, Int64Builder, StringBuilder, Time64MicrosecondBuilder,
    TimestampMicrosecondBuilder,
};
use arrow::datatypes::{
    DataType, Date32Type, Decimal128Type, Float32Type, Float64Type, Int16Type, Int32Type, Int64Type,
    Time64MicrosecondType, TimeUnit, TimestampMicrosecondType,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer};
use shori_core::schema::type_name;
use shori_core::{Error, ErrorKind, Result};

use crate::calendar::{self, DAY_MICROS};

/// Writes one value.
pub fn write_value(out: &mut Vec<u8>, array: &ArrayRef, row: usize) -> Result<()> {
    let unwritten = |cause: String| Error::new(ErrorKind::Data, "write", "a value as JSON", cause);
    if array.is_null(row) {
        out.extend_from_slice(b"null");
        return Ok(());
    }
    let written = match array.data_type() {
        DataType::Boolean => write!(out, "{}", array.as_boolean().value(row)),
        DataType::Int16 => write!(out, "{}", array.as_primitive::<Int16Type>().value(row)),
        DataType::Int32 => write!(out, "{}", array.as_primitive::<Int32Type>().value(row)),
        DataType::Int64 => write!(out, "{}", array.as_primitive::<Int64Type>().value(row)),
        // Every one is a number of double precision, which is read back exactly.
        DataType::Float32 => return write_float(out, f64::from(array.as_primitive::<Float32Type>().value(row))),
        DataType::Float64 => return write_float(out, array.as_primitive::<Float64Type>().value(row)),
        DataType::Utf8 => return write_text(out, array.as_string::<i32>().value(row)),
        DataType::Binary => write!(out, "\"{}\"", BASE64.encode(array.as_binary::<i32>().value(row))),
        DataType::Date32 => {
            write!(out, "\"{}\"", calendar::Date(array.as_primitive::<Date32Type>().value(row).into()))
        }
        DataType::Time64(TimeUnit::Microsecond) => {
            let micros = array.as_primitive::<Time64MicrosecondType>().value(row);
            if !(0..=DAY_MICROS).contains(&micros) {
                return Err(unwritten(format!("a time of {micros} microseconds is in no day")));
            }
            write!(out, "\"{}\"", calendar::Time(micros))
        }
        DataType::Timestamp(TimeUnit::Microsecond, zone) => {
            let zone = if zone.is_some() { "Z" } else { "" };
            let time = calendar::Timestamp(array.as_primitive::<TimestampMicrosecondType>().value(row));
            write!(out, "\"{time}{zone}\"")
        }
        DataType::Decimal128(_, scale) => {
            let text = decimal_text(array.as_primitive::<Decimal128Type>().value(row), *scale);
            write!(out, "\"{text}\"")
        }
        other => return Err(unwritten(format!("type {} is not carried", type_name(other)))),
    };
    written.map_err(|cause| unwritten(cause.to_string()))
}

pub fn write_text(out: &mut Vec<u8>, text: &str) -> Result<()> {
    serde_json::to_writer(out, text).map_err(|cause| Error::new(ErrorKind::Internal, "write", "text as JSON", cause))
}

fn write_float(out: &mut Vec<u8>, value: f64) -> Result<()> {
    if !value.is_finite() {
        let name = if value.is_nan() {
            "NaN"
        } else if value > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        };
        return write_text(out, name);
    }
    serde_json::to_writer(out, &value)
        .map_err(|cause| Error::new(ErrorKind::Internal, "write", "a number as JSON", cause))
}

fn decimal_text(unscaled: i128, scale: i8) -> String {
    let scale = usize::try_from(scale).unwrap_or(0);
    let digits = format!("{:0width$}", unscaled.unsigned_abs(), width = scale + 1);
    let (whole, fraction) = digits.split_at(digits.len() - scale);
    let (sign, point) = (if unscaled < 0 { "-" } else { "" }, if scale > 0 { "." } else { "" });
    format!("{sign}{whole}{point}{fraction}")
}

fn parse_decimal(text: &str, precision: u8, scale: i8) -> Option<i128> {
    let (sign, digits) = text.strip_prefix('-').map_or((1, text), |rest| (-1, rest));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let is_digits = |part: &str| part.bytes().all(|digit| digit.is_ascii_digit());
    if whole.is_empty() || !is_digits(whole) || !is_digits(fraction) || fraction.len() != usize::try_from(scale).ok()? {
        return None;
    }
    let unscaled: i128 = format!("{whole}{fraction}").parse().ok()?;
    (unscaled < 10i128.checked_pow(u32::from(precision))?).then_some(sign * unscaled)
}

/// A value as JSON has it.
#[derive(Clone, PartialEq, Debug)]
pub enum Cell<'a> {
    Null,
    Boolean(bool),
    Integer(i64),
    Float(f64),
    Text(Cow<'a, str>),
}

impl<'de> Deserialize<'de> for Cell<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Cell<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("null, a boolean, a number or text")
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Cell::Null)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
                Ok(Cell::Boolean(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
                Ok(Cell::Integer(value))
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Self::Value, E> {
                i64::try_from(value)
                    .map(Cell::Integer)
                    .map_err(|_| E::custom("the integer is too large for any column"))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
                Ok(Cell::Float(value))
            }

            fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Self::Value, E> {
                Ok(Cell::Text(Cow::Borrowed(value)))
            }

            fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
                Ok(Cell::Text(Cow::Owned(value.to_string())))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

/// Collects the values of one column.
pub enum ColumnBuilder {
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
    /// Whether it has a zone.
    Timestamp(TimestampMicrosecondBuilder, bool),
    Decimal(Decimal128Builder, u8, i8),
}

impl ColumnBuilder {
    pub fn new(data_type: &DataType) -> Result<Self> {
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
                let builder = TimestampMicrosecondBuilder::new().with_timezone_opt(zone.clone());
                Self::Timestamp(builder, zone.is_some())
            }
            DataType::Decimal128(precision, scale) => {
                let builder = Decimal128Builder::new().with_data_type(data_type.clone());
                Self::Decimal(builder, *precision, *scale)
            }
            other => {
                let cause = format!("type {} is not carried", type_name(other));
                return Err(Error::new(ErrorKind::Schema, "read", "a column of a change log", cause));
            }
        })
    }

    pub fn push_null(&mut self) {
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
            Self::Timestamp(builder, _) => builder.append_null(),
            Self::Decimal(builder, ..) => builder.append_null(),
        }
    }

    /// Whether the value is one of the column's type; nothing is pushed if not.
    pub fn push(&mut self, cell: &Cell<'_>) -> bool {
        if *cell == Cell::Null {
            self.push_null();
            return true;
        }
        self.push_value(cell).is_some()
    }

    fn push_value(&mut self, cell: &Cell<'_>) -> Option<()> {
        match (self, cell) {
            (Self::Boolean(builder), Cell::Boolean(value)) => builder.append_value(*value),
            (Self::Int16(builder), Cell::Integer(value)) => builder.append_value(i16::try_from(*value).ok()?),
            (Self::Int32(builder), Cell::Integer(value)) => builder.append_value(i32::try_from(*value).ok()?),
            (Self::Int64(builder), Cell::Integer(value)) => builder.append_value(*value),
            (Self::Float32(builder), cell) => builder.append_value(single(float(cell)?)?),
            (Self::Float64(builder), cell) => builder.append_value(float(cell)?),
            (Self::Text(builder), Cell::Text(text)) => builder.append_value(text),
            (Self::Binary(builder), Cell::Text(text)) => builder.append_value(BASE64.decode(text.as_bytes()).ok()?),
            (Self::Date(builder), Cell::Text(text)) => {
                builder.append_value(i32::try_from(calendar::parse_date(text)?).ok()?);
            }
            (Self::Time(builder), Cell::Text(text)) => builder.append_value(calendar::parse_time(text)?),
            (Self::Timestamp(builder, is_zoned), Cell::Text(text)) => {
                let text = if *is_zoned { text.strip_suffix('Z')? } else { text };
                builder.append_value(calendar::parse_timestamp(text)?);
            }
            (Self::Decimal(builder, precision, scale), Cell::Text(text)) => {
                builder.append_value(parse_decimal(text, *precision, *scale)?);
            }
            _ => return None,
        }
        Some(())
    }

    pub fn finish(mut self) -> ArrayRef {
        match &mut self {
            Self::Boolean(builder) => Arc::new(builder.finish()),
            Self::Int16(builder) => Arc::new(builder.finish()),
            Self::Int32(builder) => Arc::new(builder.finish()),
            Self::Int64(builder) => Arc::new(builder.finish()),
            Self::Float32(builder) => Arc::new(builder.finish()),
            Self::Float64(builder) => Arc::new(builder.finish()),
            Self::Text(builder) => Arc::new(builder.finish()),
            Self::Binary(builder) => Arc::new(builder.finish()),
            Self::Date(builder) => Arc::new(builder.finish()),
            Self::Time(builder) => Arc::new(builder.finish()),
            Self::Timestamp(builder, _) => Arc::new(builder.finish()),
            Self::Decimal(builder, ..) => Arc::new(builder.finish()),
        }
    }
}

fn float(cell: &Cell<'_>) -> Option<f64> {
    Some(match cell {
        Cell::Float(value) => *value,
        // Another writer may leave the fraction out.
        Cell::Integer(value) => *value as f64,
        Cell::Text(text) => match &**text {
            "NaN" => f64::NAN,
            "Infinity" => f64::INFINITY,
            "-Infinity" => f64::NEG_INFINITY,
            _ => return None,
        },
        _ => return None,
    })
}

/// `None` for a number that single precision does not hold.
fn single(value: f64) -> Option<f32> {
    let narrow = value as f32;
    (value.is_nan() || f64::from(narrow) == value).then_some(narrow)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_keep_every_digit() {
        for (unscaled, scale, text) in [(1_250, 2, "12.50"), (-5, 3, "-0.005"), (7, 0, "7"), (0, 2, "0.00")] {
            assert_eq!(decimal_text(unscaled, scale), text);
            assert_eq!(parse_decimal(text, 18, scale), Some(unscaled));
        }
        let most = 10i128.pow(38) - 1;
        assert_eq!(parse_decimal(&decimal_text(-most, 38), 38, 38), Some(-most));
        for text in ["", "-", "1.5", "1.500", "1,50", "+1.50", "1e2", "100.00", "1.-5"] {
            assert_eq!(parse_decimal(text, 4, 2), None, "{text}");
        }
    }
}
