//! Arrow columns into a table, by `copy … from stdin (format binary)` (PostgreSQL documentation, "COPY", binary format).
//!
//! The format is row by row: each row is written straight from the arrays into the buffer that is sent. A value that the
//! column's type has no place for fails, with the column's name, before it is sent.

use std::pin::Pin;

use arrow::array::{
    Array, BinaryArray, BooleanArray, Date32Array, Decimal128Array, Float32Array, Float64Array, Int16Array, Int32Array,
    Int64Array, StringArray, Time64MicrosecondArray, TimestampMicrosecondArray, UInt8Array,
};
use arrow::datatypes::DataType;
use bytes::{BufMut, Bytes, BytesMut};
use futures::SinkExt;
use shori_core::position::Micros;
use shori_core::{Error, ErrorKind, Result};
use tokio_postgres::CopyInSink;

use super::session::{Link, failed};
use crate::connect::quoted;
use crate::message::POSTGRES_EPOCH_MICROS;

/// Bytes that are sent at a time.
const SEND_BYTES: usize = 128 * 1024;
const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

const MICROS_PER_DAY: i64 = 86_400_000_000;
/// The days that PostgreSQL has, counted from 2000-01-01: 4714-11-24 BC to 5874897-12-31.
const DAYS: std::ops::Range<i64> = -2_451_545..2_145_031_949;
/// The instants that both have, counted from 2000-01-01: PostgreSQL's begin at 4714-11-24 BC, Arrow's end before 294247-01-10,
/// at a number that stands for infinity where rows are kept.
const INSTANTS: std::ops::Range<i64> = -211_813_488_000_000_000..i64::MAX - POSTGRES_EPOCH_MICROS;

/// One column of the rows that are copied.
pub(super) struct Column<'a> {
    name: &'a str,
    nulls: Option<&'a dyn Array>,
    values: Values<'a>,
}

enum Values<'a> {
    Boolean(&'a BooleanArray),
    /// As `smallint`.
    Byte(&'a UInt8Array),
    Int16(&'a Int16Array),
    Int32(&'a Int32Array),
    Int64(&'a Int64Array),
    Float32(&'a Float32Array),
    Float64(&'a Float64Array),
    Text(&'a StringArray),
    Binary(&'a BinaryArray),
    Date(&'a Date32Array),
    Time(&'a Time64MicrosecondArray),
    Timestamp(&'a TimestampMicrosecondArray),
    Decimal(&'a Decimal128Array, u8),
    /// The same in every row: its length and bytes.
    Constant(Vec<u8>),
}

impl<'a> Column<'a> {
    /// Fails for a type that no table has a column for.
    pub fn new(name: &'a str, array: &'a dyn Array) -> Result<Self> {
        let any = array.as_any();
        let values = match array.data_type() {
            DataType::Boolean => any.downcast_ref().map(Values::Boolean),
            DataType::UInt8 => any.downcast_ref().map(Values::Byte),
            DataType::Int16 => any.downcast_ref().map(Values::Int16),
            DataType::Int32 => any.downcast_ref().map(Values::Int32),
            DataType::Int64 => any.downcast_ref().map(Values::Int64),
            DataType::Float32 => any.downcast_ref().map(Values::Float32),
            DataType::Float64 => any.downcast_ref().map(Values::Float64),
            DataType::Utf8 => any.downcast_ref().map(Values::Text),
            DataType::Binary => any.downcast_ref().map(Values::Binary),
            DataType::Date32 => any.downcast_ref().map(Values::Date),
            DataType::Time64(_) => any.downcast_ref().map(Values::Time),
            DataType::Timestamp(..) => any.downcast_ref().map(Values::Timestamp),
            DataType::Decimal128(_, scale) => {
                any.downcast_ref().map(|array| Values::Decimal(array, scale.unsigned_abs()))
            }
            _ => None,
        };
        let values = values.ok_or_else(|| {
            let cause = format!("no table has a column for type {}", array.data_type());
            Error::new(ErrorKind::Internal, "write", format!("column {name}"), cause)
        })?;
        Ok(Self { name, nulls: (array.null_count() > 0).then_some(array), values })
    }

    pub fn name(&self) -> &'a str {
        self.name
    }

    pub fn text(name: &'a str, text: &str) -> Self {
        let mut bytes = Vec::with_capacity(4 + text.len());
        bytes.put_i32(text.len() as i32);
        bytes.extend_from_slice(text.as_bytes());
        Self { name, nulls: None, values: Values::Constant(bytes) }
    }

    pub fn time(name: &'a str, micros: Micros) -> Self {
        let mut bytes = Vec::with_capacity(12);
        bytes.put_i32(8);
        bytes.put_i64(micros.saturating_sub(POSTGRES_EPOCH_MICROS));
        Self { name, nulls: None, values: Values::Constant(bytes) }
    }

    /// Appends the value of `row` with its length, or says why it has no place.
    fn put(&self, row: usize, out: &mut BytesMut) -> Result<(), &'static str> {
        if self.nulls.is_some_and(|nulls| nulls.is_null(row)) {
            out.put_i32(-1);
            return Ok(());
        }
        match &self.values {
            Values::Boolean(array) => {
                out.put_i32(1);
                out.put_u8(u8::from(array.value(row)));
            }
            Values::Byte(array) => {
                out.put_i32(2);
                out.put_i16(i16::from(array.value(row)));
            }
            Values::Int16(array) => {
                out.put_i32(2);
                out.put_i16(array.value(row));
            }
            Values::Int32(array) => {
                out.put_i32(4);
                out.put_i32(array.value(row));
            }
            Values::Int64(array) => {
                out.put_i32(8);
                out.put_i64(array.value(row));
            }
            Values::Float32(array) => {
                out.put_i32(4);
                out.put_u32(array.value(row).to_bits());
            }
            Values::Float64(array) => {
                out.put_i32(8);
                out.put_u64(array.value(row).to_bits());
            }
            Values::Text(array) => {
                let text = array.value(row).as_bytes();
                if text.contains(&0) {
                    return Err("a text holds the character NUL (U+0000), which PostgreSQL has no place for");
                }
                put_bytes(text, out)?;
            }
            Values::Binary(array) => put_bytes(array.value(row), out)?,
            Values::Date(array) => {
                let days = i64::from(array.value(row)) - POSTGRES_EPOCH_MICROS / MICROS_PER_DAY;
                out.put_i32(4);
                out.put_i32(within(days, &DAYS, "a date is outside the range of PostgreSQL's")? as i32);
            }
            Values::Time(array) => {
                let micros = within(array.value(row), &(0..MICROS_PER_DAY), "a time is no time of a day")?;
                out.put_i32(8);
                out.put_i64(micros);
            }
            Values::Timestamp(array) => {
                let micros = array.value(row).saturating_sub(POSTGRES_EPOCH_MICROS);
                out.put_i32(8);
                out.put_i64(within(micros, &INSTANTS, "a timestamp is outside the range of PostgreSQL's")?);
            }
            Values::Decimal(array, scale) => put_decimal(array.value(row), *scale, out),
            Values::Constant(bytes) => out.put_slice(bytes),
        }
        Ok(())
    }
}

fn within(value: i64, range: &std::ops::Range<i64>, misfit: &'static str) -> Result<i64, &'static str> {
    if range.contains(&value) { Ok(value) } else { Err(misfit) }
}

fn put_bytes(bytes: &[u8], out: &mut BytesMut) -> Result<(), &'static str> {
    let length = i32::try_from(bytes.len()).map_err(|_| "a value is longer than PostgreSQL holds")?;
    out.put_i32(length);
    out.put_slice(bytes);
    Ok(())
}

/// `unscaled` · 10^-`scale` as `numeric_recv` takes it: Int16 count, weight, sign and printed places, then digits to the
/// base 10,000, the first of which counts `10,000^weight`; no zeros at either end.
fn put_decimal(unscaled: i128, scale: u8, out: &mut BytesMut) {
    const BASE: u128 = 10_000;
    /// 39 decimal digits, and one group more where the point divides one.
    const DIGITS_MAX: usize = 12;
    let mut rest = unscaled.unsigned_abs();
    // From the last digit to the first.
    let mut digits = [0u16; DIGITS_MAX];
    let mut count = 0;
    let mut push = |digit: u128| {
        digits[count] = digit as u16;
        count += 1;
    };
    let odd_places = u32::from(scale % 4);
    let mut fraction_groups = i16::from(scale / 4);
    if odd_places > 0 {
        let unit = 10u128.pow(odd_places);
        push(rest % unit * 10u128.pow(4 - odd_places));
        rest /= unit;
    }
    while rest > 0 || fraction_groups > 0 {
        // Most decimals are as short as money is.
        let (quotient, digit) = match u64::try_from(rest) {
            Ok(short) => (u128::from(short / BASE as u64), u128::from(short % BASE as u64)),
            Err(_) => (rest / BASE, rest % BASE),
        };
        push(digit);
        rest = quotient;
        fraction_groups -= 1;
    }
    // `fraction_groups` is now minus the count of groups before the point.
    let digits = &digits[..count];
    let trailing = digits.iter().take_while(|digit| **digit == 0).count();
    let leading = digits[trailing..].iter().rev().take_while(|digit| **digit == 0).count();
    let kept = &digits[trailing..count - leading];
    let weight = if kept.is_empty() { 0 } else { -fraction_groups - 1 - leading as i16 };
    out.put_i32(8 + 2 * kept.len() as i32);
    out.put_i16(kept.len() as i16);
    out.put_i16(weight);
    out.put_u16(if unscaled < 0 { 0x4000 } else { 0 });
    out.put_u16(u16::from(scale));
    kept.iter().rev().for_each(|digit| out.put_u16(*digit));
}

/// A copy under way: nothing else can be done on the connection until it is finished. Dropping it makes the transaction
/// fail.
pub(super) struct CopyIn {
    sink: Pin<Box<CopyInSink<Bytes>>>,
    buffer: BytesMut,
    object: String,
}

impl CopyIn {
    /// Into columns of a table, both as SQL spells them; `object` is the table's name in messages.
    pub async fn begin(link: &Link, table: &str, columns: &[String], object: &str) -> Result<Self> {
        let columns: Vec<String> = columns.iter().map(|column| quoted(column)).collect();
        let sql = format!("copy {table} ({}) from stdin (format binary)", columns.join(", "));
        let sink = link.client().copy_in(&sql).await.map_err(|cause| failed("write", object, cause))?;
        let mut buffer = BytesMut::with_capacity(SEND_BYTES * 2);
        buffer.put_slice(SIGNATURE);
        Ok(Self { sink: Box::pin(sink), buffer, object: object.to_string() })
    }

    /// Rows of the columns that the copy was begun with.
    pub async fn push(&mut self, columns: &[Column<'_>], rows: usize) -> Result<()> {
        let mut row = 0;
        while row < rows {
            row = self.encode(columns, row, rows)?;
            if self.buffer.len() >= SEND_BYTES {
                let full = self.buffer.split().freeze();
                self.buffer.reserve(SEND_BYTES * 2);
                self.sink.send(full).await.map_err(|cause| failed("write", &self.object, cause))?;
            }
        }
        Ok(())
    }

    /// Encodes rows until there are enough to send; the next one.
    fn encode(&mut self, columns: &[Column<'_>], from: usize, rows: usize) -> Result<usize> {
        for row in from..rows {
            self.buffer.put_i16(columns.len() as i16);
            for column in columns {
                column.put(row, &mut self.buffer).map_err(|misfit| {
                    let object = format!("column {} of {}", column.name, self.object);
                    Error::new(ErrorKind::Data, "write", object, misfit)
                        .with_remedy("correct the value in the source, or leave the column out")
                })?;
            }
            if self.buffer.len() >= SEND_BYTES {
                return Ok(row + 1);
            }
        }
        Ok(rows)
    }

    /// Ends the copy; the rows that it wrote.
    pub async fn finish(mut self) -> Result<u64> {
        self.buffer.put_i16(-1);
        let rest = self.buffer.split().freeze();
        let fail = |cause| failed("write", &self.object, cause);
        self.sink.send(rest).await.map_err(fail)?;
        self.sink.as_mut().finish().await.map_err(fail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric;

    #[test]
    fn decimals_are_read_as_they_were_written() {
        let ten = |power: u32| 10i128.pow(power);
        let mut checked = 0;
        for scale in 0..=38u8 {
            let near = (0..38).flat_map(|power| [ten(power) - 1, ten(power), ten(power) + 1, 7 * ten(power)]);
            for value in near.chain([0, 1, 9999, 10_000, 123_456_789, ten(38) - 1]).filter(|value| *value < ten(38)) {
                for value in [value, -value] {
                    let mut out = BytesMut::new();
                    put_decimal(value, scale, &mut out);
                    assert_eq!(out.len(), 4 + i32::from_be_bytes(out[..4].try_into().unwrap()) as usize);
                    assert_eq!(numeric::from_binary(&out[4..], 38, scale), Ok(value), "{value} of scale {scale}");
                    let digits: Vec<u8> = out[12..].to_vec();
                    assert!(!digits.starts_with(&[0, 0]) && !digits.ends_with(&[0, 0]), "{value} of scale {scale}");
                    checked += 1;
                }
            }
        }
        assert!(checked > 10_000);
    }

    #[test]
    fn what_has_no_place_is_refused() {
        let refused = |array: &dyn Array| {
            let mut out = BytesMut::new();
            Column::new("c", array).unwrap().put(0, &mut out).unwrap_err()
        };
        assert!(refused(&StringArray::from(vec!["a\0b"])).contains("NUL"));
        assert!(refused(&Date32Array::from(vec![i32::MIN])).contains("date"));
        assert!(refused(&Date32Array::from(vec![i32::MAX])).contains("date"));
        assert!(refused(&TimestampMicrosecondArray::from(vec![i64::MAX])).contains("timestamp"));
        assert!(refused(&TimestampMicrosecondArray::from(vec![i64::MIN])).contains("timestamp"));
        assert!(refused(&Time64MicrosecondArray::from(vec![MICROS_PER_DAY])).contains("time"));
        assert!(Column::new("c", &arrow::array::UInt64Array::from(vec![1])).is_err());
    }
}
