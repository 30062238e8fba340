//! Row images of one table on their way into a change batch.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, BinaryArray, BinaryBuilder, BooleanArray, TimestampMicrosecondBuilder, UInt8Builder, new_null_array,
};
use shori_core::Result;
use shori_core::change::{ChangeBatch, Op};
use shori_core::position::{CaptureId, Micros, Position};
use shori_core::schema::TableSchema;

use crate::catalog::Layout;
use crate::column_builder::ColumnBuilder;
use crate::generated::Inputs;
use crate::message::Value;

/// What each row takes besides its columns.
const ROW_BYTES: usize = 48;
/// What either half of a position takes, at most.
const POSITION_BYTES: usize = 9;

pub(crate) struct BatchBuilder {
    capture: CaptureId,
    schema: Arc<TableSchema>,
    columns: Vec<ColumnBuilder>,
    lsn: BinaryBuilder,
    seq: BinaryBuilder,
    op: UInt8Builder,
    commit_time: TimestampMicrosecondBuilder,
    /// Empty until a row has an unchanged column; then as long as there are rows.
    unchanged: Vec<Option<Vec<u8>>>,
    /// Rows that could not be decoded, to be taken out.
    refused: Vec<usize>,
    rows: usize,
    /// Bytes of texts and the like, as they came.
    value_bytes: usize,
    /// What columns are to be computed of that do not come.
    inputs: Option<Inputs>,
}

/// A row that cannot be carried: the column, and why.
pub(crate) type Refused = String;

impl BatchBuilder {
    pub fn new(capture: CaptureId, layout: &Layout) -> Result<Self> {
        Self::with_room(capture, layout, 0, |_| 0)
    }

    /// For images as they are sent: columns behind those stay null until they are computed.
    pub fn of_sent(capture: CaptureId, layout: &Layout) -> Result<Self> {
        let mut builder = Self::new(capture, layout)?;
        builder.columns.truncate(layout.sent().len());
        builder.inputs = Inputs::of(layout);
        Ok(builder)
    }

    /// An empty one for what follows, which is taken to need as much room.
    pub fn next(&self, layout: &Layout) -> Result<Self> {
        // Where it needs a little more, it does not have to grow for that.
        let with_some = |size: usize| size + size / 8;
        Self::with_room(self.capture.clone(), layout, with_some(self.rows), |column| {
            self.columns.get(column).map_or(0, |column| with_some(column.text_bytes()))
        })
    }

    fn with_room(
        capture: CaptureId,
        layout: &Layout,
        rows: usize,
        text_bytes: impl Fn(usize) -> usize,
    ) -> Result<Self> {
        let fields = layout.schema.columns.fields().iter().zip(&layout.columns).enumerate();
        let columns = fields.map(|(index, (field, column))| {
            ColumnBuilder::with_room(field.data_type(), &column.resolved, rows, text_bytes(index))
        });
        Ok(Self {
            capture,
            schema: layout.schema.clone(),
            columns: columns.collect::<Result<_>>()?,
            lsn: BinaryBuilder::with_capacity(rows, rows * POSITION_BYTES),
            seq: BinaryBuilder::with_capacity(rows, rows * POSITION_BYTES),
            op: UInt8Builder::with_capacity(rows),
            commit_time: TimestampMicrosecondBuilder::with_capacity(rows),
            unchanged: Vec::new(),
            refused: Vec::new(),
            rows: 0,
            value_bytes: 0,
            inputs: None,
        })
    }

    /// Rows that will be in the batch.
    pub fn len(&self) -> usize {
        self.rows - self.refused.len()
    }

    pub fn bytes(&self) -> usize {
        let inputs = self.inputs.as_ref().map_or(0, Inputs::memory_bytes);
        self.value_bytes + self.rows * ROW_BYTES + inputs
    }

    /// Adds a row image of as many values as there are columns; one that cannot be carried leaves no trace.
    pub fn push<'a>(
        &mut self,
        values: impl Iterator<Item = Value<'a>>,
        position: &Position,
        op: Op,
        time: Micros,
    ) -> Result<(), Refused> {
        let mut mask: Option<Vec<u8>> = None;
        let mut fault: Option<Refused> = None;
        let mut given = 0;
        for (index, (builder, value)) in self.columns.iter_mut().zip(values).enumerate() {
            given += 1;
            if let Some(inputs) = &mut self.inputs {
                inputs.take(index, value);
            }
            match value {
                Value::Unchanged => {
                    let bytes = self.schema.columns.fields().len().div_ceil(8);
                    mask.get_or_insert_with(|| vec![0; bytes])[index / 8] |= 1 << (index % 8);
                    builder.append_null();
                }
                Value::Text(bytes) | Value::Binary(bytes) => {
                    self.value_bytes += bytes.len();
                    if let Err(misfit) = builder.append(value) {
                        fault.get_or_insert_with(|| {
                            format!("column {}: {misfit}", self.schema.columns.field(index).name())
                        });
                        builder.append_null();
                    }
                }
                Value::Null => builder.append_null(),
            }
        }
        for builder in self.columns.iter_mut().skip(given) {
            fault.get_or_insert_with(|| format!("it has {given} columns"));
            builder.append_null();
        }
        if let Some(inputs) = &mut self.inputs {
            if inputs.end_row(op.leaves_row()) {
                let all = self.schema.columns.fields().len();
                let bytes = mask.get_or_insert_with(|| vec![0; all.div_ceil(8)]);
                (self.columns.len()..all).for_each(|index| bytes[index / 8] |= 1 << (index % 8));
            }
            if fault.is_some() {
                inputs.forget_row();
            }
        }
        self.lsn.append_value(position.lsn.as_slice());
        self.seq.append_value(position.seq.as_slice());
        self.op.append_value(op as u8);
        self.commit_time.append_value(time);
        if mask.is_some() && self.unchanged.is_empty() {
            self.unchanged.resize(self.rows, None);
        }
        if mask.is_some() || !self.unchanged.is_empty() {
            self.unchanged.push(mask);
        }
        if fault.is_some() {
            self.refused.push(self.rows);
        }
        self.rows += 1;
        fault.map_or(Ok(()), Err)
    }

    /// All columns null: for a table emptied.
    pub fn push_nulls(&mut self, position: &Position, op: Op, time: Micros) -> Result<(), Refused> {
        let columns = self.columns.len();
        self.push((0..columns).map(|_| Value::Null), position, op, time)
    }

    /// What columns are to be computed of, if some are.
    pub fn take_inputs(&mut self) -> Option<Inputs> {
        self.inputs.take()
    }

    /// The batch; columns that are still to be computed are null.
    pub fn finish(mut self) -> Result<Option<ChangeBatch>> {
        if self.len() == 0 {
            return Ok(None);
        }
        let unchanged = (!self.unchanged.is_empty())
            .then(|| BinaryArray::from_iter(self.unchanged.iter().map(|mask| mask.as_deref())));
        let computed = self.schema.columns.fields().iter().skip(self.columns.len());
        let computed: Vec<ArrayRef> = computed.map(|field| new_null_array(field.data_type(), self.rows)).collect();
        let batch = ChangeBatch {
            capture: self.capture,
            schema: self.schema,
            lsn: self.lsn.finish(),
            seq: self.seq.finish(),
            op: self.op.finish(),
            commit_time: self.commit_time.finish(),
            unchanged,
            columns: self.columns.into_iter().map(ColumnBuilder::finish).chain(computed).collect(),
        };
        if self.refused.is_empty() {
            return Ok(Some(batch));
        }
        let mut keep = vec![true; self.rows];
        self.refused.iter().for_each(|row| keep[*row] = false);
        let kept = arrow::compute::filter_record_batch(&batch.to_record_batch()?, &BooleanArray::from(keep))?;
        ChangeBatch::from_record_batch(&batch.capture, &batch.schema, &kept).map(Some)
    }
}
