//! How rows lie in the state file: each column a cell of bytes, so that a row can be compared, cut and put together
//! without being decoded.
//!
//! A row is its columns' cells, one after the other: the length plus one (0: null) as a variable-length number, then
//! the bytes. Whole numbers, decimals and times are their two's complement in as few little-endian bytes as hold it, so
//! equal values are equal bytes. Columns that a table gained later are missing at the end of older rows: null.

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryBuilder, BooleanBuilder, Date32Builder, Decimal128Builder, Float32Builder,
    Float64Builder, Int16Builder, Int32Builder, Int64Builder, StringBuilder, Time64MicrosecondBuilder,
    TimestampMicrosecondBuilder,
};
use arrow::datatypes::{
    DataType, Date32Type, Decimal128Type, Float32Type, Float64Type, Int16Type, Int32Type, Int64Type,
    Time64MicrosecondType, TimestampMicrosecondType,
};
use shori_core::{Error, ErrorKind, Result};

/// A column's value; null is `None`.
pub(super) type Cell<'a> = Option<&'a [u8]>;

fn corrupt(cause: &str) -> Error {
    Error::new(ErrorKind::Corrupt, "read", "a row of the state file", cause)
        .with_remedy("remove the file: it comes back from the log")
}

fn uncarried(data_type: &DataType) -> Error {
    Error::new(ErrorKind::Internal, "keep", format!("a column of type {data_type}"), "no store carries it")
}

pub(super) fn write_length(out: &mut Vec<u8>, mut length: usize) {
    while length >= 0x80 {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
}

/// Takes a number from the front of `bytes`.
fn read_length(bytes: &mut &[u8]) -> Result<usize> {
    let mut length = 0;
    for shift in (0..usize::BITS).step_by(7) {
        let Some((&byte, rest)) = bytes.split_first() else { break };
        *bytes = rest;
        length |= usize::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(length);
        }
    }
    Err(corrupt("a length is cut off"))
}

pub(super) fn write_cell(out: &mut Vec<u8>, cell: Cell<'_>) {
    match cell {
        None => out.push(0),
        Some(bytes) => {
            write_length(out, bytes.len() + 1);
            out.extend_from_slice(bytes);
        }
    }
}

/// Goes through the cells of a row; past its last one all are null.
pub(super) struct Cells<'a>(pub &'a [u8]);

impl<'a> Cells<'a> {
    pub fn next(&mut self) -> Result<Cell<'a>> {
        if self.0.is_empty() {
            return Ok(None);
        }
        match read_length(&mut self.0)?.checked_sub(1) {
            None => Ok(None),
            Some(length) => match self.0.split_at_checked(length) {
                Some((cell, rest)) => {
                    self.0 = rest;
                    Ok(Some(cell))
                }
                None => Err(corrupt("a cell is cut off")),
            },
        }
    }

    /// The cells of the first `count` columns.
    pub fn collect(mut self, count: usize, into: &mut Vec<Cell<'a>>) -> Result<()> {
        into.clear();
        for _ in 0..count {
            into.push(self.next()?);
        }
        Ok(())
    }
}

/// The cells of the first `count` columns of a row.
pub(super) fn cells_of(row: &[u8], count: usize) -> Result<Vec<Cell<'_>>> {
    let mut cells = Vec::with_capacity(count);
    Cells(row).collect(count, &mut cells)?;
    Ok(cells)
}

/// The two's complement of `number` without the bytes that only repeat its sign.
pub(super) fn shortened(number: i128, buffer: &mut [u8; 16]) -> &[u8] {
    *buffer = number.to_le_bytes();
    let sign = if number < 0 { 0xff } else { 0 };
    let mut length = 16;
    while length > 1 && buffer[length - 1] == sign && (buffer[length - 2] ^ sign) < 0x80 {
        length -= 1;
    }
    &buffer[..length]
}

/// The inverse of [`shortened`].
pub(super) fn number(cell: &[u8]) -> Result<i128> {
    let Some(&last) = cell.last().filter(|_| cell.len() <= 16) else {
        return Err(corrupt("a number has no or too many bytes"));
    };
    let mut bytes = if last < 0x80 { [0; 16] } else { [0xff; 16] };
    bytes[..cell.len()].copy_from_slice(cell);
    Ok(i128::from_le_bytes(bytes))
}

/// Whether the type's cells are whole numbers of at most 64 bits.
pub(super) fn is_whole(data_type: &DataType) -> bool {
    matches!(
        data_type,
        DataType::Boolean
            | DataType::Int16
            | DataType::Int32
            | DataType::Int64
            | DataType::Date32
            | DataType::Time64(_)
            | DataType::Timestamp(..)
    )
}

/// Writes the cell of value `row` of an array.
pub(super) fn write_value(array: &dyn Array, row: usize, out: &mut Vec<u8>) -> Result<()> {
    if array.is_null(row) {
        out.push(0);
        return Ok(());
    }
    let mut buffer = [0; 16];
    let number: i128 = match array.data_type() {
        DataType::Boolean => array.as_boolean().value(row).into(),
        DataType::Int16 => array.as_primitive::<Int16Type>().value(row).into(),
        DataType::Int32 => array.as_primitive::<Int32Type>().value(row).into(),
        DataType::Int64 => array.as_primitive::<Int64Type>().value(row).into(),
        DataType::Date32 => array.as_primitive::<Date32Type>().value(row).into(),
        DataType::Time64(_) => array.as_primitive::<Time64MicrosecondType>().value(row).into(),
        DataType::Timestamp(..) => array.as_primitive::<TimestampMicrosecondType>().value(row).into(),
        DataType::Decimal128(..) => array.as_primitive::<Decimal128Type>().value(row),
        DataType::Float32 => {
            write_cell(out, Some(&array.as_primitive::<Float32Type>().value(row).to_le_bytes()));
            return Ok(());
        }
        DataType::Float64 => {
            write_cell(out, Some(&array.as_primitive::<Float64Type>().value(row).to_le_bytes()));
            return Ok(());
        }
        DataType::Utf8 => {
            write_cell(out, Some(array.as_string::<i32>().value(row).as_bytes()));
            return Ok(());
        }
        DataType::Binary => {
            write_cell(out, Some(array.as_binary::<i32>().value(row)));
            return Ok(());
        }
        other => return Err(uncarried(other)),
    };
    write_cell(out, Some(shortened(number, &mut buffer)));
    Ok(())
}

/// The cell of a whole number, as [`write_value`] makes it.
pub(super) fn write_number(number: i64, out: &mut Vec<u8>) {
    write_cell(out, Some(shortened(number.into(), &mut [0; 16])));
}

/// A column in the making.
pub(super) enum Column {
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
    Decimal(Decimal128Builder),
}

impl Column {
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
            DataType::Time64(_) => Self::Time(Time64MicrosecondBuilder::new()),
            DataType::Timestamp(..) => {
                Self::Timestamp(TimestampMicrosecondBuilder::new().with_data_type(data_type.clone()))
            }
            DataType::Decimal128(..) => Self::Decimal(Decimal128Builder::new().with_data_type(data_type.clone())),
            other => return Err(uncarried(other)),
        })
    }

    pub fn push(&mut self, cell: Cell<'_>) -> Result<()> {
        let whole = |cell: &[u8]| i64::try_from(number(cell)?).map_err(|_| corrupt("a number is too large"));
        let wide = || corrupt("a value does not fit its column");
        match (self, cell) {
            (Self::Boolean(builder), cell) => {
                builder.append_option(cell.map(|cell| whole(cell).map(|value| value != 0)).transpose()?);
            }
            (Self::Int16(builder), cell) => {
                let value = cell.map(whole).transpose()?;
                builder.append_option(value.map(i16::try_from).transpose().map_err(|_| wide())?);
            }
            (Self::Int32(builder), cell) => {
                let value = cell.map(whole).transpose()?;
                builder.append_option(value.map(i32::try_from).transpose().map_err(|_| wide())?);
            }
            (Self::Date(builder), cell) => {
                let value = cell.map(whole).transpose()?;
                builder.append_option(value.map(i32::try_from).transpose().map_err(|_| wide())?);
            }
            (Self::Int64(builder), cell) => builder.append_option(cell.map(whole).transpose()?),
            (Self::Time(builder), cell) => builder.append_option(cell.map(whole).transpose()?),
            (Self::Timestamp(builder), cell) => builder.append_option(cell.map(whole).transpose()?),
            (Self::Decimal(builder), cell) => builder.append_option(cell.map(number).transpose()?),
            (Self::Float32(builder), cell) => {
                let bytes = cell.map(<[u8; 4]>::try_from).transpose().map_err(|_| wide())?;
                builder.append_option(bytes.map(f32::from_le_bytes));
            }
            (Self::Float64(builder), cell) => {
                let bytes = cell.map(<[u8; 8]>::try_from).transpose().map_err(|_| wide())?;
                builder.append_option(bytes.map(f64::from_le_bytes));
            }
            (Self::Text(builder), cell) => {
                let text = cell.map(std::str::from_utf8).transpose().map_err(|_| corrupt("text is not UTF-8"))?;
                builder.append_option(text);
            }
            (Self::Binary(builder), cell) => builder.append_option(cell),
        }
        Ok(())
    }

    pub fn finish(&mut self) -> ArrayRef {
        use std::sync::Arc;
        match self {
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
            Self::Timestamp(builder) => Arc::new(builder.finish()),
            Self::Decimal(builder) => Arc::new(builder.finish()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{
        BinaryArray, BooleanArray, Date32Array, Decimal128Array, Float64Array, Int16Array, Int64Array, StringArray,
        TimestampMicrosecondArray,
    };

    use super::*;

    #[test]
    fn numbers_are_as_short_as_they_can_be_and_come_back() {
        let edges = [0, 1, -1, 127, 128, -128, -129, 255, 256, 1 << 40, i64::MAX.into(), i64::MIN.into()];
        for number in edges.into_iter().chain([i128::MAX, i128::MIN]) {
            let mut buffer = [0; 16];
            let cell = shortened(number, &mut buffer).to_vec();
            assert_eq!(super::number(&cell).unwrap(), number);
            assert!(cell.len() == 1 || super::number(&cell[..cell.len() - 1]).unwrap() != number, "{number}: {cell:?}");
        }
        assert!(number(&[]).is_err() && number(&[0; 17]).is_err());
    }

    #[test]
    fn values_of_every_kind_come_back() {
        let arrays: Vec<ArrayRef> = vec![
            Arc::new(BooleanArray::from(vec![Some(true), Some(false), None])),
            Arc::new(Int16Array::from(vec![Some(i16::MIN), None, Some(i16::MAX)])),
            Arc::new(Int64Array::from(vec![Some(i64::MIN), Some(0), None])),
            Arc::new(Float64Array::from(vec![Some(-0.0), Some(f64::MAX), None])),
            Arc::new(Date32Array::from(vec![Some(-1), None, Some(i32::MAX)])),
            Arc::new(TimestampMicrosecondArray::from(vec![Some(-1), Some(1 << 50), None]).with_timezone("UTC")),
            Arc::new(
                Decimal128Array::from(vec![Some(-1), None, Some(10i128.pow(37))])
                    .with_precision_and_scale(38, 2)
                    .unwrap(),
            ),
            Arc::new(StringArray::from(vec![Some(""), None, Some("ä\0b")])),
            Arc::new(BinaryArray::from(vec![Some(&[][..]), None, Some(&[0xff; 300][..])])),
        ];
        let mut columns: Vec<Column> = arrays.iter().map(|array| Column::new(array.data_type()).unwrap()).collect();
        for row in 0..3 {
            let mut bytes = Vec::new();
            arrays.iter().for_each(|array| write_value(array.as_ref(), row, &mut bytes).unwrap());
            let mut cells = Cells(&bytes);
            columns.iter_mut().for_each(|column| column.push(cells.next().unwrap()).unwrap());
            // A column that came later.
            assert_eq!(cells.next().unwrap(), None);
        }
        for (array, column) in arrays.iter().zip(&mut columns) {
            assert_eq!(&column.finish(), array);
        }
    }

    #[test]
    fn any_bytes_give_cells_or_an_error() {
        for bytes in [&[5, 1][..], &[0xff, 0xff], &[0xff; 12], &[200]] {
            assert!(Cells(bytes).next().is_err(), "{bytes:?}");
        }
        assert!(Column::new(&DataType::Int16).unwrap().push(Some(&[0, 0, 1])).is_err());
        assert!(Column::new(&DataType::Utf8).unwrap().push(Some(&[0xff])).is_err());
    }
}
