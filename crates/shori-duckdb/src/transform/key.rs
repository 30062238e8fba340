//! What rows are found by: the key of a table, a column that others lead to, the key of a result.
//!
//! A single whole number is SQLite's own integer; everything else is bytes that compare as the columns do, one after
//! the other: 0 for null, else 1 and the value (numbers big-endian with the sign bit turned, text and bytes ended by two
//! zeros, zeros inside followed by 255).

use arrow::datatypes::DataType;
use rusqlite::ToSql;
use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSqlOutput, ValueRef};
use shori_core::Result;

use super::cells::{Cell, is_whole, number};

/// Sorts as SQLite sorts it: integers before bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(super) enum Key {
    Number(i64),
    Bytes(Box<[u8]>),
}

impl Key {
    /// Of one column.
    pub fn of_one(data_type: &DataType, cell: Cell<'_>) -> Result<Self> {
        if let Some(cell) = cell.filter(|_| is_whole(data_type))
            && let Ok(number) = i64::try_from(number(cell)?)
        {
            return Ok(Self::Number(number));
        }
        let mut bytes = Vec::with_capacity(20);
        write_part(data_type, cell, &mut bytes)?;
        Ok(Self::Bytes(bytes.into()))
    }

    /// Of the columns at `indexes`.
    pub fn of<'a>(indexes: &[usize], type_of: impl Fn(usize) -> &'a DataType, cells: &[Cell<'_>]) -> Result<Self> {
        if let [only] = indexes {
            return Self::of_one(type_of(*only), cells[*only]);
        }
        let mut bytes = Vec::with_capacity(20 * indexes.len());
        for &index in indexes {
            write_part(type_of(index), cells[index], &mut bytes)?;
        }
        Ok(Self::Bytes(bytes.into()))
    }

    /// Memory that it takes beside itself.
    pub fn heap_bytes(&self) -> usize {
        match self {
            Self::Number(_) => 0,
            Self::Bytes(bytes) => bytes.len(),
        }
    }
}

/// Floats that compare as equal are one: both zeros, and all that are no numbers.
fn one_float(cell: &[u8]) -> std::borrow::Cow<'_, [u8]> {
    let canonical: Option<Vec<u8>> = match *cell {
        [a, b, c, d] => match f32::from_le_bytes([a, b, c, d]) {
            number if number.is_nan() => Some(f32::NAN.to_le_bytes().into()),
            0.0 => Some(0_f32.to_le_bytes().into()),
            _ => None,
        },
        [a, b, c, d, e, f, g, h] => match f64::from_le_bytes([a, b, c, d, e, f, g, h]) {
            number if number.is_nan() => Some(f64::NAN.to_le_bytes().into()),
            0.0 => Some(0_f64.to_le_bytes().into()),
            _ => None,
        },
        _ => None,
    };
    canonical.map_or(cell.into(), Into::into)
}

fn write_part(data_type: &DataType, cell: Cell<'_>, out: &mut Vec<u8>) -> Result<()> {
    let Some(cell) = cell else {
        out.push(0);
        return Ok(());
    };
    out.push(1);
    match data_type {
        DataType::Utf8 | DataType::Binary => {
            for &byte in cell {
                out.push(byte);
                if byte == 0 {
                    out.push(0xff);
                }
            }
            out.extend_from_slice(&[0, 0]);
        }
        DataType::Float32 | DataType::Float64 => {
            let cell = &*one_float(cell);
            let is_negative = cell.last().is_some_and(|last| last & 0x80 != 0);
            let turned = |byte: &u8| if is_negative { !byte } else { *byte };
            let start = out.len();
            out.extend(cell.iter().rev().map(turned));
            if !is_negative && let Some(first) = out.get_mut(start) {
                *first |= 0x80;
            }
        }
        _ => out.extend_from_slice(&(number(cell)? ^ i128::MIN).to_be_bytes()),
    }
    Ok(())
}

impl ToSql for Key {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self {
            Self::Number(number) => ToSqlOutput::from(*number),
            Self::Bytes(bytes) => ToSqlOutput::Borrowed(ValueRef::Blob(bytes)),
        })
    }
}

impl FromSql for Key {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        match value {
            ValueRef::Integer(number) => Ok(Self::Number(number)),
            ValueRef::Blob(bytes) => Ok(Self::Bytes(bytes.into())),
            _ => Err(FromSqlError::InvalidType),
        }
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, Decimal128Array, Float64Array, StringArray};
    use std::sync::Arc;

    use super::super::cells::{Cells, write_value};
    use super::*;

    #[test]
    fn floats_that_are_equal_are_one_key() {
        let key = |number: f64| Key::of_one(&DataType::Float64, Some(&number.to_le_bytes())).unwrap();
        let single = |number: f32| Key::of_one(&DataType::Float32, Some(&number.to_le_bytes())).unwrap();
        assert_eq!(key(-0.0), key(0.0));
        assert_eq!(single(-0.0), single(0.0));
        assert_eq!(key(-f64::NAN), key(f64::NAN));
        assert_eq!(single(f32::from_bits(0x7fc0_0001)), single(f32::NAN));
        assert!(key(-f64::MIN_POSITIVE) < key(0.0) && key(f64::INFINITY) < key(f64::NAN));
    }

    #[test]
    fn keys_sort_and_differ_as_their_values_do() {
        let sorted: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from(vec![
                None,
                Some(""),
                Some("a"),
                Some("a\0"),
                Some("a\0b"),
                Some("ab"),
                Some("b"),
            ])),
            Arc::new(Float64Array::from(vec![None, Some(f64::MIN), Some(-1.5), Some(0.0), Some(1e-9), Some(2.0)])),
            Arc::new(Decimal128Array::from(vec![
                None,
                Some(-(10i128.pow(30))),
                Some(-1),
                Some(0),
                Some(1),
                Some(1 << 90),
            ])),
        ];
        for array in sorted {
            let key = |row| {
                let mut bytes = Vec::new();
                write_value(array.as_ref(), row, &mut bytes).unwrap();
                Key::of_one(array.data_type(), Cells(&bytes).next().unwrap()).unwrap()
            };
            for row in 1..array.len() {
                assert!(key(row - 1) < key(row), "{array:?} at {row}");
            }
        }
    }

    #[test]
    fn columns_of_a_key_do_not_run_into_each_other() {
        let types = [DataType::Utf8, DataType::Utf8];
        let key = |cells: &[Cell<'_>]| Key::of(&[0, 1], |index| &types[index], cells).unwrap();
        let texts: [Cell<'_>; 5] = [None, Some(b""), Some(b"a"), Some(b"a\0"), Some(b"ab")];
        let mut keys: Vec<Key> = texts.iter().flat_map(|a| texts.map(|b| key(&[*a, b]))).collect();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), 25);
    }

    #[test]
    fn a_single_number_is_one() {
        assert_eq!(Key::of_one(&DataType::Int64, Some(&[0x2c, 1])).unwrap(), Key::Number(300));
        assert!(matches!(Key::of_one(&DataType::Int64, None).unwrap(), Key::Bytes(_)));
    }
}
