//! Change batches: row images of one table in Arrow, with what happened, where and when.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, BinaryBuilder, RecordBatch, TimestampMicrosecondArray, UInt8Array,
};
use arrow::datatypes::{DataType, Field, Schema, TimeUnit, TimestampMicrosecondType, UInt8Type};

use crate::error::{Error, ErrorKind, Result};
use crate::position::{CaptureId, Micros, Position};
use crate::schema::TableSchema;

/// What a row image is. The numbers are stored in the log (`op`): 1 to 4 are SQL Server's `__$operation`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Op {
    /// A row found by a snapshot. Takes the place of the key's row, like an insert.
    Snapshot = 0,
    /// The key's row is gone. The image holds at least the key.
    Delete = 1,
    Insert = 2,
    /// The image before an update. Sources give it only where the update changed the key: the old key's row is gone.
    UpdateBefore = 3,
    /// The image after an update.
    UpdateAfter = 4,
    /// All rows are gone. All columns are null.
    Truncate = 5,
}

impl Op {
    pub fn from_u8(code: u8) -> Result<Self> {
        Ok(match code {
            0 => Op::Snapshot,
            1 => Op::Delete,
            2 => Op::Insert,
            3 => Op::UpdateBefore,
            4 => Op::UpdateAfter,
            5 => Op::Truncate,
            _ => return Err(Error::new(ErrorKind::Corrupt, "decode", "op", format!("{code} is none of 0 to 5"))),
        })
    }

    /// Whether the key holds this image's row afterwards (else it holds none).
    pub fn leaves_row(self) -> bool {
        matches!(self, Op::Snapshot | Op::Insert | Op::UpdateAfter)
    }
}

/// Row images of one capture, in position order.
///
/// All arrays have the same length. `columns` are those of `schema`, in its order; every one may hold nulls.
/// `unchanged` marks columns whose value the source did not send because it did not change: bit `i % 8` of byte `i / 8`
/// stands for column `i`; null means the image is whole. Only the projector resolves such columns, from state.
#[derive(Clone, Debug)]
pub struct ChangeBatch {
    pub capture: CaptureId,
    pub schema: Arc<TableSchema>,
    pub lsn: BinaryArray,
    pub seq: BinaryArray,
    pub op: UInt8Array,
    /// Source commit time in microseconds UTC.
    pub commit_time: TimestampMicrosecondArray,
    pub unchanged: Option<BinaryArray>,
    pub columns: Vec<ArrayRef>,
}

/// Names of the columns that [`ChangeBatch::to_record_batch`] puts before and after the table's own.
pub const LSN: &str = "lsn";
pub const SEQVAL: &str = "seqval";
pub const OP: &str = "op";
pub const COMMIT_TIME: &str = "commit_time";
pub const UNCHANGED: &str = "unchanged_columns";

impl ChangeBatch {
    pub fn len(&self) -> usize {
        self.op.len()
    }

    pub fn is_empty(&self) -> bool {
        self.op.is_empty()
    }

    /// Position of image `row`.
    pub fn position(&self, row: usize) -> Result<Position> {
        Position::from_slices(self.lsn.value(row), self.seq.value(row))
    }

    pub fn commit_time(&self, row: usize) -> Micros {
        self.commit_time.value(row)
    }

    /// The images with `after < position <= up_to`, without copying.
    pub fn between(&self, after: &Position, up_to: &Position) -> Result<ChangeBatch> {
        let start = self.first_after(after)?;
        let end = self.first_after(up_to)?.max(start);
        Ok(self.slice(start, end - start))
    }

    fn first_after(&self, position: &Position) -> Result<usize> {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = (low + high) / 2;
            if self.position(middle)? <= *position {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    pub fn slice(&self, offset: usize, length: usize) -> ChangeBatch {
        ChangeBatch {
            capture: self.capture.clone(),
            schema: self.schema.clone(),
            lsn: self.lsn.slice(offset, length),
            seq: self.seq.slice(offset, length),
            op: self.op.slice(offset, length),
            commit_time: self.commit_time.slice(offset, length),
            unchanged: self.unchanged.as_ref().map(|mask| mask.slice(offset, length)),
            columns: self.columns.iter().map(|column| column.slice(offset, length)).collect(),
        }
    }

    /// One batch of several that follow each other, of one capture and schema.
    pub fn concat(batches: &[ChangeBatch]) -> Result<Option<ChangeBatch>> {
        let Some(first) = batches.first() else { return Ok(None) };
        let parts = batches.iter().map(ChangeBatch::to_record_batch).collect::<Result<Vec<_>>>()?;
        let rows = arrow::compute::concat_batches(&parts[0].schema(), &parts)?;
        ChangeBatch::from_record_batch(&first.capture, &first.schema, &rows).map(Some)
    }

    /// Bytes held in memory, as far as Arrow counts them.
    pub fn memory_bytes(&self) -> usize {
        self.columns.iter().map(|column| column.get_array_memory_size()).sum::<usize>()
            + self.lsn.get_array_memory_size()
            + self.seq.get_array_memory_size()
            + self.op.get_array_memory_size()
            + self.commit_time.get_array_memory_size()
    }

    /// One record batch: `lsn, seqval, op`, the table's columns, `commit_time, unchanged_columns`.
    pub fn to_record_batch(&self) -> Result<RecordBatch> {
        let mut fields = vec![
            Arc::new(Field::new(LSN, DataType::Binary, false)),
            Arc::new(Field::new(SEQVAL, DataType::Binary, false)),
            Arc::new(Field::new(OP, DataType::UInt8, false)),
        ];
        fields.extend(
            self.schema.columns.fields().iter().map(|field| Arc::new(field.as_ref().clone().with_nullable(true))),
        );
        fields.push(Arc::new(Field::new(COMMIT_TIME, DataType::Timestamp(TimeUnit::Microsecond, None), false)));
        fields.push(Arc::new(Field::new(UNCHANGED, DataType::Binary, true)));
        let mut arrays: Vec<ArrayRef> =
            vec![Arc::new(self.lsn.clone()), Arc::new(self.seq.clone()), Arc::new(self.op.clone())];
        arrays.extend(self.columns.iter().cloned());
        arrays.push(Arc::new(self.commit_time.clone()));
        arrays.push(match &self.unchanged {
            Some(mask) => Arc::new(mask.clone()),
            None => Arc::new(BinaryArray::new_null(self.len())),
        });
        Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays)?)
    }

    /// The inverse of [`ChangeBatch::to_record_batch`]; columns are found by name, so a wider batch serves too.
    /// A table column that the batch lacks is null throughout.
    pub fn from_record_batch(capture: &CaptureId, schema: &Arc<TableSchema>, rows: &RecordBatch) -> Result<Self> {
        let misfit = |name: &str| {
            Error::new(
                ErrorKind::Corrupt,
                "read",
                format!("the log of {capture}"),
                format!("column {name} is missing or of another type"),
            )
        };
        let binary = |name: &str| rows.column_by_name(name).and_then(|array| array.as_binary_opt::<i32>().cloned());
        let mut columns = Vec::with_capacity(schema.columns.fields().len());
        for field in schema.columns.fields() {
            columns.push(match rows.column_by_name(field.name()) {
                Some(array) if array.data_type() == field.data_type() => array.clone(),
                Some(_) => return Err(misfit(field.name())),
                None => arrow::array::new_null_array(field.data_type(), rows.num_rows()),
            });
        }
        let unchanged = binary(UNCHANGED).filter(|mask| mask.null_count() < mask.len());
        Ok(Self {
            capture: capture.clone(),
            schema: schema.clone(),
            lsn: binary(LSN).ok_or_else(|| misfit(LSN))?,
            seq: binary(SEQVAL).ok_or_else(|| misfit(SEQVAL))?,
            op: rows
                .column_by_name(OP)
                .and_then(|array| array.as_primitive_opt::<UInt8Type>().cloned())
                .ok_or_else(|| misfit(OP))?,
            commit_time: rows
                .column_by_name(COMMIT_TIME)
                .and_then(|array| array.as_primitive_opt::<TimestampMicrosecondType>().cloned())
                .ok_or_else(|| misfit(COMMIT_TIME))?,
            unchanged,
            columns,
        })
    }
}

/// Collects the columns that every change has, beside the builders of a table's own columns.
#[derive(Default)]
pub struct ChangeHeadBuilder {
    lsn: BinaryBuilder,
    seq: BinaryBuilder,
    op: Vec<u8>,
    commit_time: Vec<Micros>,
}

impl ChangeHeadBuilder {
    pub fn push(&mut self, position: &Position, op: Op, commit_time: Micros) {
        self.lsn.append_value(position.lsn.as_slice());
        self.seq.append_value(position.seq.as_slice());
        self.op.push(op as u8);
        self.commit_time.push(commit_time);
    }

    pub fn len(&self) -> usize {
        self.op.len()
    }

    pub fn is_empty(&self) -> bool {
        self.op.is_empty()
    }

    /// Ends the batch with the table's columns, which must have as many rows as were pushed.
    pub fn finish(
        mut self,
        capture: CaptureId,
        schema: Arc<TableSchema>,
        columns: Vec<ArrayRef>,
    ) -> Result<ChangeBatch> {
        if let Some(column) = columns.iter().find(|column| column.len() != self.op.len()) {
            return Err(Error::new(
                ErrorKind::Internal,
                "build",
                format!("a batch of {capture}"),
                format!("{} changes, but a column of {} values", self.op.len(), column.len()),
            ));
        }
        Ok(ChangeBatch {
            capture,
            schema,
            lsn: self.lsn.finish(),
            seq: self.seq.finish(),
            op: UInt8Array::from(self.op),
            commit_time: TimestampMicrosecondArray::from(self.commit_time),
            unchanged: None,
            columns,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::SortKey;
    use arrow::array::Int64Array;

    fn batch(lsns: &[u64]) -> ChangeBatch {
        let schema = TableSchema::new("t", vec![Field::new("id", DataType::Int64, false)], &["id"]).unwrap();
        let mut head = ChangeHeadBuilder::default();
        for &lsn in lsns {
            head.push(&at(lsn), Op::Insert, lsn as i64);
        }
        let ids = Int64Array::from_iter_values(lsns.iter().map(|&lsn| lsn as i64));
        head.finish(CaptureId::new("s", "t"), Arc::new(schema), vec![Arc::new(ids)]).unwrap()
    }

    fn at(lsn: u64) -> Position {
        Position::new(SortKey::from_u64(lsn), SortKey::EMPTY)
    }

    #[test]
    fn between_excludes_the_lower_and_includes_the_upper_position() {
        let all = batch(&[1, 3, 3, 5, 9]);
        let lsns = |after, up_to| {
            let part = all.between(&at(after), &at(up_to)).unwrap();
            part.commit_time.values().to_vec()
        };
        assert_eq!(lsns(1, 5), [3, 3, 5]);
        assert_eq!(lsns(0, 9), [1, 3, 3, 5, 9]);
        assert_eq!(lsns(9, 20), Vec::<i64>::new());
        assert_eq!(lsns(6, 2), Vec::<i64>::new());
    }

    #[test]
    fn a_record_batch_comes_back_and_a_missing_column_is_null() {
        let all = batch(&[1, 2]);
        let rows = all.to_record_batch().unwrap();
        let back = ChangeBatch::from_record_batch(&all.capture, &all.schema, &rows).unwrap();
        assert_eq!(back.to_record_batch().unwrap(), rows);
        let wider = TableSchema::new(
            "t",
            vec![Field::new("id", DataType::Int64, false), Field::new("new", DataType::Utf8, true)],
            &["id"],
        );
        let back = ChangeBatch::from_record_batch(&all.capture, &Arc::new(wider.unwrap()), &rows).unwrap();
        assert_eq!(back.columns[1].null_count(), 2);
    }

    #[test]
    fn batches_become_one() {
        let parts = [batch(&[1, 3]), batch(&[4]), batch(&[5, 9])];
        let one = ChangeBatch::concat(&parts).unwrap().unwrap();
        assert_eq!(one.commit_time.values(), &[1, 3, 4, 5, 9]);
        assert_eq!(one.position(4).unwrap(), at(9));
        assert!(ChangeBatch::concat(&[]).unwrap().is_none());
    }

    #[test]
    fn ops_come_back_and_others_are_refused() {
        for code in 0..=5 {
            assert_eq!(Op::from_u8(code).unwrap() as u8, code);
        }
        assert!(Op::from_u8(6).is_err());
    }
}
