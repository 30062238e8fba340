//! Lines of one file into a change batch.

use std::sync::Arc;

use arrow::array::{ArrayRef, BinaryBuilder};
use shori_core::Result;
use shori_core::change::{ChangeBatch, ChangeHeadBuilder, Op};
use shori_core::position::CaptureId;
use shori_core::schema::TableSchema;

use crate::lines::ChangeLine;
use crate::values::{Cell, ColumnBuilder};

/// Collects changes of one capture and one schema.
pub struct BatchBuilder {
    capture: CaptureId,
    schema: Arc<TableSchema>,
    head: ChangeHeadBuilder,
    columns: Vec<ColumnBuilder>,
    unchanged: BinaryBuilder,
    is_partial: bool,
}

impl BatchBuilder {
    pub fn new(capture: CaptureId, schema: Arc<TableSchema>) -> Result<Self> {
        let fields = schema.columns.fields();
        let columns = fields.iter().map(|field| ColumnBuilder::new(field.data_type())).collect::<Result<_>>()?;
        let (head, unchanged) = (ChangeHeadBuilder::default(), BinaryBuilder::new());
        Ok(Self { capture, schema, head, columns, unchanged, is_partial: false })
    }

    /// What is wrong with the change, if it does not fit; then nothing of the builder may be used.
    pub fn push(&mut self, change: &ChangeLine<'_>) -> std::result::Result<(), String> {
        let mask = self.mask(change)?;
        let mut next = change.cells.0.iter().peekable();
        for (column, (builder, field)) in self.columns.iter_mut().zip(self.schema.columns.fields()).enumerate() {
            match next.next_if(|(name, _)| *name == *field.name()) {
                Some((_, cell)) if !is_marked(&mask, column) => {
                    if !builder.push(cell) {
                        return Err(format!("column {} does not take {}", field.name(), shown(cell)));
                    }
                }
                Some(_) => return Err(format!("column {} has a value, and is unchanged", field.name())),
                None if is_marked(&mask, column) || change.op == Op::Truncate => builder.push_null(),
                None => return Err(format!("column {} has no value, or not in the header's order", field.name())),
            }
        }
        if let Some((name, _)) = next.next() {
            return Err(format!("column {name} is not in the header, or not in its order"));
        }
        self.is_partial |= !mask.is_empty();
        if mask.is_empty() {
            self.unchanged.append_null()
        } else {
            self.unchanged.append_value(&mask)
        }
        self.head.push(&change.position, change.op, change.commit_time);
        Ok(())
    }

    /// Empty where the image is whole.
    fn mask(&self, change: &ChangeLine<'_>) -> std::result::Result<Vec<u8>, String> {
        let mut mask = if change.unchanged.is_empty() { Vec::new() } else { vec![0; self.columns.len().div_ceil(8)] };
        for name in &change.unchanged {
            let unknown = || format!("column {name} is unchanged, and not in the header");
            let column = self.schema.columns.index_of(name).map_err(|_| unknown())?;
            mask[column / 8] |= 1 << (column % 8);
        }
        Ok(mask)
    }

    pub fn finish(mut self) -> Result<ChangeBatch> {
        let columns: Vec<ArrayRef> = self.columns.into_iter().map(ColumnBuilder::finish).collect();
        let mut batch = self.head.finish(self.capture, self.schema, columns)?;
        batch.unchanged = self.is_partial.then(|| self.unchanged.finish());
        Ok(batch)
    }
}

fn is_marked(mask: &[u8], column: usize) -> bool {
    mask.get(column / 8).is_some_and(|byte| byte >> (column % 8) & 1 == 1)
}

fn shown(cell: &Cell<'_>) -> String {
    const LETTERS_MAX: usize = 40;
    match cell {
        Cell::Null => "null".into(),
        Cell::Boolean(value) => value.to_string(),
        Cell::Integer(value) => value.to_string(),
        Cell::Float(value) => value.to_string(),
        Cell::Text(text) => format!("{:?}", text.chars().take(LETTERS_MAX).collect::<String>()),
    }
}
