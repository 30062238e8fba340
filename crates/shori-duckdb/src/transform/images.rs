//! Change images as they come from the log, each as cells in the order of the table's columns.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef};
use arrow::datatypes::Field;
use shori_core::change::{ChangeBatch, Op};
use shori_core::position::{Lsn, Micros, SortKey};
use shori_core::{Error, ErrorKind, Result};

use super::cells::{Cells, write_cell, write_value};
use super::tables::Table;

/// A batch, seen through the columns that its table has in the file.
pub(super) struct Images<'a> {
    batch: &'a ChangeBatch,
    /// Per column of the table, the batch's array and its place there; one that the batch lacks is null.
    columns: Vec<Option<(&'a ArrayRef, usize)>>,
}

impl<'a> Images<'a> {
    pub fn of(batch: &'a ChangeBatch, table: &Table) -> Result<Self> {
        let refuse = |cause: String| {
            Err(Error::new(ErrorKind::Internal, "apply", format!("changes of {}", batch.capture), cause))
        };
        let fields = batch.schema.columns.fields();
        if let Some(field) = fields.iter().find(|field| table.index_of(field.name()).is_none()) {
            return refuse(format!("the cache was not opened with their column {}", field.name()));
        }
        let place = |field: &Arc<Field>| fields.iter().position(|own| own.name() == field.name());
        let columns: Vec<_> =
            (table.columns.iter()).map(|field| place(field).map(|index| (&batch.columns[index], index))).collect();
        for (field, column) in table.columns.iter().zip(&columns) {
            if let Some((array, _)) = column
                && array.data_type() != field.data_type()
            {
                let cause = format!("column {} is {}, not {}", field.name(), array.data_type(), field.data_type());
                return refuse(cause);
            }
        }
        Ok(Self { batch, columns })
    }

    pub fn len(&self) -> usize {
        self.batch.len()
    }

    pub fn lsn(&self, row: usize) -> Result<Lsn> {
        SortKey::from_slice(self.batch.lsn.value(row))
    }

    pub fn op(&self, row: usize) -> Result<Op> {
        Op::from_u8(self.batch.op.value(row))
    }

    pub fn time(&self, row: usize) -> Micros {
        self.batch.commit_time(row)
    }

    /// Writes the image's cells; columns that it leaves out are null. Returns whether there are any.
    pub fn write(&self, row: usize, out: &mut Vec<u8>) -> Result<bool> {
        out.clear();
        for column in &self.columns {
            match column {
                Some((array, _)) => write_value(array.as_ref(), row, out)?,
                None => out.push(0),
            }
        }
        let masks = self.batch.unchanged.as_ref();
        Ok(masks.is_some_and(|masks| masks.is_valid(row) && masks.value(row).iter().any(|&byte| byte != 0)))
    }

    /// Writes the cells of a partial image: columns that it leaves out hold what `before` does, or null.
    pub fn write_over(&self, row: usize, before: Option<&[u8]>, out: &mut Vec<u8>) -> Result<()> {
        out.clear();
        let marks = self.batch.unchanged.as_ref().filter(|masks| masks.is_valid(row)).map(|masks| masks.value(row));
        let is_left_out = |place: usize| {
            marks.and_then(|marks| marks.get(place / 8)).is_some_and(|byte| byte >> (place % 8) & 1 == 1)
        };
        let mut old = Cells(before.unwrap_or_default());
        for column in &self.columns {
            let stands = old.next()?;
            match column {
                Some((_, place)) if is_left_out(*place) => write_cell(out, stands),
                Some((array, _)) => write_value(array.as_ref(), row, out)?,
                None => out.push(0),
            }
        }
        Ok(())
    }
}
