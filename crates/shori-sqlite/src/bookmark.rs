//! How a snapshot remembers the last key it read. Permanent: stores keep it between runs.
//!
//! One entry per key column: a tag, then the value. `1` integer (i64 BE), `2` real (IEEE bits BE), `3` text and `4` blob
//! (u32 BE length, bytes). Storage classes are kept because SQLite orders by them first.

use rusqlite::types::{ToSql, ToSqlOutput, ValueRef};
use shori_core::{Error, ErrorKind, Result};

const INTEGER: u8 = 1;
const REAL: u8 = 2;
const TEXT: u8 = 3;
const BLOB: u8 = 4;

/// One value of a key. Text is kept as bytes: SQLite stores what is no UTF-8, too.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum KeyValue {
    Integer(i64),
    Real(f64),
    Text(Vec<u8>),
    Blob(Vec<u8>),
}

impl ToSql for KeyValue {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            KeyValue::Integer(number) => ValueRef::Integer(*number),
            KeyValue::Real(number) => ValueRef::Real(*number),
            KeyValue::Text(text) => ValueRef::Text(text),
            KeyValue::Blob(blob) => ValueRef::Blob(blob),
        }))
    }
}

/// Adds one key value; NULL is no key.
pub(crate) fn push(bookmark: &mut Vec<u8>, value: ValueRef<'_>) {
    let bytes = |bookmark: &mut Vec<u8>, tag: u8, bytes: &[u8]| {
        bookmark.push(tag);
        bookmark.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
        bookmark.extend_from_slice(bytes);
    };
    match value {
        ValueRef::Null => {}
        ValueRef::Integer(number) => {
            bookmark.push(INTEGER);
            bookmark.extend_from_slice(&number.to_be_bytes());
        }
        ValueRef::Real(number) => {
            bookmark.push(REAL);
            bookmark.extend_from_slice(&number.to_bits().to_be_bytes());
        }
        ValueRef::Text(text) => bytes(bookmark, TEXT, text),
        ValueRef::Blob(blob) => bytes(bookmark, BLOB, blob),
    }
}

/// The key values of a bookmark: as many as the key has columns.
pub(crate) fn read(table: &str, mut bookmark: &[u8], key_columns: usize) -> Result<Vec<KeyValue>> {
    let mut values = Vec::with_capacity(key_columns);
    while !bookmark.is_empty() {
        let value = read_one(&mut bookmark).ok_or_else(|| misfit(table))?;
        values.push(value);
    }
    if values.len() == key_columns { Ok(values) } else { Err(misfit(table)) }
}

fn misfit(table: &str) -> Error {
    Error::new(ErrorKind::Data, "resume", format!("the snapshot of table {table}"), "its bookmark cannot be read")
        .with_remedy(format!("run shori resnapshot {table}"))
}

fn read_one(bytes: &mut &[u8]) -> Option<KeyValue> {
    let tag = take(bytes, 1)?[0];
    Some(match tag {
        INTEGER => KeyValue::Integer(i64::from_be_bytes(take(bytes, 8)?.try_into().ok()?)),
        REAL => KeyValue::Real(f64::from_bits(u64::from_be_bytes(take(bytes, 8)?.try_into().ok()?))),
        TEXT => KeyValue::Text(take_sized(bytes)?.to_vec()),
        BLOB => KeyValue::Blob(take_sized(bytes)?.to_vec()),
        _ => return None,
    })
}

fn take_sized<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = u32::from_be_bytes(take(bytes, 4)?.try_into().ok()?);
    take(bytes, length as usize)
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (head, tail) = bytes.split_at_checked(length)?;
    *bytes = tail;
    Some(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bookmark_comes_back_and_its_layout_is_permanent() {
        let values = [
            KeyValue::Integer(-2),
            KeyValue::Real(1.5),
            KeyValue::Text("é".into()),
            KeyValue::Text(vec![0xff]),
            KeyValue::Blob(vec![0, 255]),
        ];
        let mut bookmark = Vec::new();
        push(&mut bookmark, ValueRef::Integer(-2));
        push(&mut bookmark, ValueRef::Real(1.5));
        push(&mut bookmark, ValueRef::Text("é".as_bytes()));
        push(&mut bookmark, ValueRef::Text(&[0xff]));
        push(&mut bookmark, ValueRef::Blob(&[0, 255]));
        assert_eq!(read("t", &bookmark, 5).unwrap(), values);
        let mut text = Vec::new();
        push(&mut text, ValueRef::Text(b"ab"));
        assert_eq!(text, [3, 0, 0, 0, 2, b'a', b'b']);
    }

    #[test]
    fn bytes_that_are_no_bookmark_are_refused() {
        for bytes in [&[9u8][..], &[1, 0], &[3, 0, 0, 0, 9, 1], &[4, 0], &[]] {
            assert!(read("t", bytes, 1).is_err(), "{bytes:?}");
        }
    }
}
