//! Rows out of `copy … to stdout (format binary)`, into batches of the log.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, BinaryArray, BinaryBuilder, TimestampMicrosecondArray, UInt8Array};
use bytes::{Buf, Bytes, BytesMut};
use shori_core::change::{ChangeBatch, Op};
use shori_core::position::CaptureId;
use shori_core::schema::TableSchema;
use shori_core::{Error, ErrorKind, Result};

use super::layout;
use crate::column_builder::{ColumnBuilder, Misfit};
use crate::date_time::timestamp_from_binary;
use crate::message::Value;

/// Signature, flags, and the length of an extension that follows.
const HEADER_BYTES: usize = 19;

/// Columns that come before the table's own: lsn, seqval, op, commit time, unchanged columns.
pub(super) const HEAD_COLUMNS: usize = 5;

/// Cuts the bytes of a copy into rows, wherever its messages end.
#[derive(Default)]
pub(super) struct Rows {
    bytes: BytesMut,
    has_header: bool,
    ended: bool,
    /// Where each value of the row stands; none for null.
    fields: Vec<Option<(usize, usize)>>,
}

impl Rows {
    pub fn push(&mut self, message: &Bytes) {
        self.bytes.extend_from_slice(message);
    }

    /// The next whole row: its values stand in `bytes`. `None`: more has to come, or nothing will.
    fn next(&mut self) -> Result<Option<usize>, Misfit> {
        if !self.has_header {
            let Some(extension) = self.number::<4>(HEADER_BYTES - 4).map(u32::from_be_bytes) else { return Ok(None) };
            let header = HEADER_BYTES + extension as usize;
            if !self.bytes.starts_with(b"PGCOPY\n\xff\r\n\0") {
                return Err("no signature of a binary copy");
            }
            if self.bytes.len() < header {
                return Ok(None);
            }
            self.bytes.advance(header);
            self.has_header = true;
        }
        let Some(count) = self.number::<2>(0).map(i16::from_be_bytes) else { return Ok(None) };
        if count < 0 || self.ended {
            self.ended = true;
            return Ok(None);
        }
        self.fields.clear();
        let mut at = 2;
        for _ in 0..count {
            let Some(length) = self.number::<4>(at).map(i32::from_be_bytes) else { return Ok(None) };
            at += 4;
            match usize::try_from(length) {
                Ok(length) => {
                    self.fields.push(Some((at, at + length)));
                    at += length;
                }
                Err(_) => self.fields.push(None),
            }
        }
        Ok((self.bytes.len() >= at).then_some(at))
    }

    fn number<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.bytes.get(at..at + N)?.try_into().ok()
    }

    fn value(&self, index: usize) -> Option<&[u8]> {
        let (start, end) = (*self.fields.get(index)?)?;
        self.bytes.get(start..end)
    }
}

/// Builds a batch of the log's images, in the columns of one schema.
pub(super) struct Images {
    capture: CaptureId,
    schema: Arc<TableSchema>,
    lsn: BinaryBuilder,
    seq: BinaryBuilder,
    op: Vec<u8>,
    commit_time: Vec<i64>,
    unchanged: BinaryBuilder,
    columns: Vec<ColumnBuilder>,
    bytes: usize,
}

impl Images {
    pub fn new(capture: CaptureId, schema: Arc<TableSchema>) -> Result<Self> {
        let columns = (schema.columns.fields().iter())
            .map(|field| ColumnBuilder::new(field.data_type(), &layout::read_type(field.data_type())?))
            .collect::<Result<_>>()?;
        Ok(Self {
            capture,
            schema,
            lsn: BinaryBuilder::new(),
            seq: BinaryBuilder::new(),
            op: Vec::new(),
            commit_time: Vec::new(),
            unchanged: BinaryBuilder::new(),
            columns,
            bytes: 0,
        })
    }

    pub fn len(&self) -> usize {
        self.op.len()
    }

    /// Bytes that its rows came in.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes whole rows, `most` at a time; whether there may be more of them.
    pub fn take(&mut self, rows: &mut Rows, most: usize) -> Result<bool> {
        while self.len() < most {
            let Some(end) = rows.next().map_err(|misfit| self.misfit("its rows", misfit))? else { return Ok(false) };
            if rows.fields.len() != HEAD_COLUMNS + self.columns.len() {
                return Err(self.misfit("its rows", "another number of columns than was asked for"));
            }
            self.take_head(rows)?;
            for (index, column) in self.columns.iter_mut().enumerate() {
                let value = rows.value(HEAD_COLUMNS + index).map_or(Value::Null, Value::Binary);
                if let Err(misfit) = column.append(value) {
                    let name = self.schema.columns.field(index).name().clone();
                    return Err(self.misfit(&format!("column {name}"), misfit));
                }
            }
            self.bytes += end;
            rows.bytes.advance(end);
        }
        Ok(true)
    }

    fn take_head(&mut self, rows: &Rows) -> Result<()> {
        let wanted = |index: usize| rows.value(index).ok_or_else(|| self.misfit("its positions", "null"));
        let (lsn, seq, op, time) = (wanted(0)?, wanted(1)?, wanted(2)?, wanted(3)?);
        let op = match op {
            [0, op] => Op::from_u8(*op)? as u8,
            _ => return Err(self.misfit("column op", "not an op")),
        };
        let time = timestamp_from_binary(time).map_err(|misfit| self.misfit("column commit_time", misfit))?;
        self.lsn.append_value(lsn);
        self.seq.append_value(seq);
        self.op.push(op);
        self.commit_time.push(time);
        match rows.value(4) {
            Some(mask) => self.unchanged.append_value(mask),
            None => self.unchanged.append_null(),
        }
        Ok(())
    }

    fn misfit(&self, what: &str, misfit: Misfit) -> Error {
        Error::new(ErrorKind::Corrupt, "read", format!("{what} in the log of {}", self.capture), misfit)
    }

    /// The batch; masks are as the staging table holds them.
    pub fn finish(mut self) -> (ChangeBatch, Option<BinaryArray>) {
        let masks = self.unchanged.finish();
        let columns: Vec<ArrayRef> = self.columns.into_iter().map(ColumnBuilder::finish).collect();
        let batch = ChangeBatch {
            capture: self.capture,
            schema: self.schema,
            lsn: self.lsn.finish(),
            seq: self.seq.finish(),
            op: UInt8Array::from(self.op),
            commit_time: TimestampMicrosecondArray::from(self.commit_time),
            unchanged: None,
            columns,
        };
        (batch, (masks.null_count() < masks.len()).then_some(masks))
    }
}
