//! Rows that were copied out, into batches of the log.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, BinaryArray, BinaryBuilder, TimestampMicrosecondArray, UInt8Array};
use shori_core::change::{ChangeBatch, Op};
use shori_core::position::CaptureId;
use shori_core::schema::TableSchema;
use shori_core::{Error, ErrorKind, Result};

use super::layout;
use crate::column_builder::{ColumnBuilder, Misfit};
use crate::copied::Rows;
use crate::date_time::timestamp_from_binary;
use crate::message::Value;

/// Columns that come before the table's own: lsn, seqval, op, commit time, unchanged columns.
pub(super) const HEAD_COLUMNS: usize = 5;

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
            let Some(bytes) = rows.advance().map_err(|misfit| self.misfit("its rows", misfit))? else {
                return Ok(false);
            };
            if rows.len() != HEAD_COLUMNS + self.columns.len() {
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
            self.bytes += bytes;
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
