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
