//! Adds what touched entities now contribute, more or less than before, to the result that stands.
//!
//! The query gives how far each group has moved; what the group held is found by its key, and the sum is made here. So a
//! row goes once from the query to the output and to what is kept of it.

use std::collections::VecDeque;
use std::ops::Range;

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::{DataType, Decimal128Type, Field, Schema, SchemaRef};
use rusqlite::Connection;
use shori_core::projection::SqlProjection;
use shori_core::store::OutputRows;
use shori_core::{Error, ErrorKind, Result};

use super::cells::{Cells, number, shortened, write_cell, write_value};
use super::compute::{Counts, Place};
use super::key::Key;
use super::query::{self, Shape};
use super::reader::READY_ROWS_MAX;
use super::results::{self, Row, Stood};
use super::session::{Loader, Session, comma};
use super::tables::Batch;
use crate::database::quote_name;

/// Groups that moved are added so many at a time, in the order of their keys.
const CHUNK_ROWS: i64 = READY_ROWS_MAX;

/// What was added up.
pub(super) enum Added {
    /// An output that is at hand, and each key's new row.
    Held { parts: VecDeque<OutputRows>, rows: Vec<(Key, Option<Row>)> },
    /// Too much for that: it lies at the place.
    Laid(Counts),
}

pub(super) struct Adding<'a> {
    pub session: &'a Session,
    /// The state file.
    pub connection: &'a Connection,
    pub projection: &'a str,
    pub shape: &'a Shape,
    pub place: &'a Place,
}

impl Adding<'_> {
    /// `__before` holds what the entities contributed; what they do now is what the query gives over `schema`.
    pub fn add(&self, sql: &SqlProjection, schema: &str) -> Result<Added> {
        let moved = query::run(self.session, sql, schema, &self.moved()?)?;
        let stood = Stood::open(self.connection, self.projection)?;
        if moved <= READY_ROWS_MAX {
            return self.hold(moved, stood);
        }
        let (mut rows, mut gone) = (
            self.loader(self.place.rows_table(self.all_columns()))?,
            self.loader(self.place.keys_table(self.shape.key_columns()))?,
        );
        let mut counts = (0, 0);
        self.each(moved, stood, |_, key_cells, row| match row {
            Some(row) => {
                counts.0 += 1;
                rows.push(cells_of(row, self.shape.fields.len())?)
            }
            None => {
                counts.1 += 1;
                gone.push(cells_of(key_cells, self.shape.key.len())?)
            }
        })?;
        rows.finish()?;
        gone.finish()?;
        Ok(Added::Laid(counts))
    }

    fn loader(&self, table: super::session::WorkTable) -> Result<Loader<'_>> {
        self.session.create(&table)?;
        Loader::new(self.session, table)
    }

    fn hold(&self, moved: i64, stood: Option<Stood<'_>>) -> Result<Added> {
        let (mut upserts, mut gone) =
            (Batch::new(self.shape.published.clone())?, Batch::new(self.shape.key_columns())?);
        let published: Vec<usize> = self.published().collect();
        let mut kept = Vec::with_capacity(usize::try_from(moved).unwrap_or_default());
        self.each(moved, stood, |key, key_cells, row| {
            match row {
                Some(row) => {
                    let cells = cells_of(row, self.shape.fields.len())?;
                    upserts.push(published.iter().map(|&index| cells[index]))?;
                }
                None => gone.push(cells_of(key_cells, self.shape.key.len())?)?,
            }
            kept.push((key, row.map(Row::from)));
            Ok(())
        })?;
        let mut parts = VecDeque::new();
        if upserts.rows() > 0 {
            parts.push_back(OutputRows::Upsert(upserts.take()?));
        }
        if gone.rows() > 0 {
            parts.push_back(OutputRows::Delete(gone.take()?));
        }
        Ok(Added::Held { parts, rows: kept })
    }

    /// The statement that makes `__moved`: key columns, and by how much each sum has changed, where any has.
    fn moved(&self) -> Result<String> {
        let keys = self.shape.keys("x");
        let (mut sums, mut moved) = (Vec::new(), Vec::new());
        for name in &self.shape.sums {
            let (column, scale) = (quote_name(name), scale_of(self.shape.type_of(name)?));
            sums.push(format!(
                "(coalesce(sum(x.{column}) filter (x.__sign), 0) - coalesce(sum(x.{column}) filter (not x.__sign), 0))
                     ::decimal(38, {scale}) as {column}"
            ));
            moved.push(format!("{column} <> 0"));
        }
        Ok(format!(
            "create or replace temp table __moved as select * from (select {keys}, {} from (select *, true as __sign from \
             {{query}} union all select *, false from temp.main.__before) x group by {keys}) where {}",
            comma(sums),
            moved.join(" or ")
        )
        .replace('\n', " "))
    }

    /// Gives `take` each group that has moved, its key's cells, and its new row, if there is one. One that neither was nor
    /// is, is left out.
    fn each(
        &self,
        moved: i64,
        mut stood: Option<Stood<'_>>,
        mut take: impl FnMut(Key, &[u8], Option<&[u8]>) -> Result<()>,
    ) -> Result<()> {
        let (mut key_cells, mut row) = (Vec::new(), Vec::new());
        for start in (0..moved).step_by(CHUNK_ROWS as usize) {
            let batches = self.read(start..start + CHUNK_ROWS)?;
            for (key, batch, at) in self.sorted(&batches)? {
                key_cells.clear();
                for column in 0..self.shape.key.len() {
                    write_value(batch.column(column).as_ref(), at, &mut key_cells)?;
                }
                let find = |stood: &mut Stood<'_>| stood.find(&key, |held| self.sum(batch, at, held, &mut row));
                let (found, weight) = match stood.as_mut().map(find).transpose()?.flatten() {
                    Some(weight) => (true, weight),
                    None => (false, self.sum(batch, at, &[], &mut row)?),
                };
                match (weight > 0, found) {
                    (true, _) => take(key, &key_cells, Some(&row))?,
                    (false, true) => take(key, &key_cells, None)?,
                    (false, false) => {}
                }
            }
        }
        Ok(())
    }

    fn read(&self, rows: Range<i64>) -> Result<Vec<RecordBatch>> {
        let mut batches = Vec::new();
        let (from, to) = (rows.start, rows.end);
        self.session.batches(&format!("from temp.main.__moved where rowid >= {from} and rowid < {to}"), |batch| {
            batches.push(batch);
            Ok(())
        })?;
        Ok(batches)
    }

    /// Neighbours are looked for one after the other.
    fn sorted<'b>(&self, batches: &'b [RecordBatch]) -> Result<Vec<(Key, &'b RecordBatch, usize)>> {
        let columns: Vec<usize> = (0..self.shape.key.len()).collect();
        let mut sorted = Vec::with_capacity(batches.iter().map(RecordBatch::num_rows).sum());
        for batch in batches {
            results::each_row(batch, &columns, &columns, |row, key, _| {
                sorted.push((key, batch, row));
                Ok(())
            })?;
        }
        sorted.sort_unstable_by(|one, other| one.0.cmp(&other.0));
        Ok(sorted)
    }

    /// Writes the row that a group of `batch` comes to, where it held the cells `held`. Returns its weight.
    fn sum(&self, batch: &RecordBatch, at: usize, held: &[u8], row: &mut Vec<u8>) -> Result<i128> {
        let (keys, mut held, mut weight) = (self.shape.key.len(), Cells(held), 0);
        row.clear();
        for field in &self.shape.fields {
            let stood = held.next()?;
            if let Some(column) = self.shape.key.iter().position(|name| name == field.name()) {
                write_value(batch.column(column).as_ref(), at, row)?;
                continue;
            }
            let sum = self.shape.sums.iter().position(|name| name == field.name()).unwrap_or_default();
            let by = batch.column(keys + sum).as_primitive::<Decimal128Type>().value(at);
            let total = stood.map(number).transpose()?.unwrap_or(0).checked_add(by);
            let total = total.filter(|total| fits(*total, field.data_type())).ok_or_else(|| self.too_large(field))?;
            if self.shape.weight.as_ref() == Some(field.name()) {
                weight = total;
            }
            write_cell(row, Some(shortened(total, &mut [0; 16])));
        }
        Ok(weight)
    }

    fn too_large(&self, field: &Field) -> Error {
        let cause = format!("a sum in column {} is too large for {}", field.name(), field.data_type());
        Error::new(ErrorKind::Projection, "refresh", format!("projection {}", self.projection), cause)
            .with_remedy("cast the column to a wider type in its query")
    }

    fn all_columns(&self) -> SchemaRef {
        Schema::new(self.shape.fields.clone()).into()
    }

    /// Where the published columns stand among all.
    fn published(&self) -> impl Iterator<Item = usize> {
        let is_published = |index: &usize| self.shape.published.index_of(self.shape.fields[*index].name()).is_ok();
        (0..self.shape.fields.len()).filter(is_published)
    }
}

fn cells_of(row: &[u8], count: usize) -> Result<Vec<super::cells::Cell<'_>>> {
    let mut cells = Vec::with_capacity(count);
    Cells(row).collect(count, &mut cells)?;
    Ok(cells)
}

fn scale_of(data_type: &DataType) -> i8 {
    match data_type {
        DataType::Decimal128(_, scale) => *scale,
        _ => 0,
    }
}

fn fits(number: i128, data_type: &DataType) -> bool {
    match data_type {
        DataType::Int16 => i16::try_from(number).is_ok(),
        DataType::Int32 => i32::try_from(number).is_ok(),
        DataType::Int64 => i64::try_from(number).is_ok(),
        DataType::Decimal128(precision, _) => {
            10_u128.checked_pow((*precision).into()).is_some_and(|end| number.unsigned_abs() < end)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_fits_what_its_type_holds() {
        assert!(fits(32_767, &DataType::Int16) && !fits(32_768, &DataType::Int16));
        assert!(fits(i64::MIN.into(), &DataType::Int64) && !fits(i128::from(i64::MIN) - 1, &DataType::Int64));
        let money = DataType::Decimal128(18, 2);
        assert!(fits(-(10_i128.pow(18) - 1), &money) && !fits(10_i128.pow(18), &money));
        let widest = DataType::Decimal128(38, 0);
        assert!(fits(10_i128.pow(38) - 1, &widest) && !fits(10_i128.pow(38), &widest));
    }
}
