//! Adds what touched entities now contribute, more or less than before, to the result that stands.
//!
//! The query gives how far each group has moved; what the group held is found by its key, and the sum is made here. So a
//! row goes once from the query to the output and to what is kept of it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use arrow::array::AsArray;
use arrow::datatypes::{DataType, Decimal128Type, Field, Schema};
use rusqlite::Connection;
use shori_core::projection::SqlProjection;
use shori_core::store::OutputRows;
use shori_core::{Error, ErrorKind, Result};

use super::cells::{Cell, Cells, cells_of, number, shortened, write_cell};
use super::compute::{Counts, Place};
use super::difference::{Held, Pair};
use super::hands::{Hands, Second, both, worth_sharing};
use super::held::HeldResult;
use super::key::Key;
use super::query::{self, Shape};
use super::reader::READY_ROWS_MAX;
use super::results::{self, KeptRow, Row, Stood};
use super::session::{Loader, Session, WorkTable, comma};
use crate::database::{quote_name, traced};

/// Groups that moved are added so many at a time, in the order of their keys.
const CHUNK_ROWS: i64 = READY_ROWS_MAX;

/// A group whose sums are others than before.
struct Moved {
    key: Key,
    key_cells: Row,
    /// By how much, in the order of the shape's sums.
    by: Vec<i128>,
}

/// What a column is: which of the key's, or which of the sums.
enum Of {
    Key(usize),
    Sum(usize),
}

/// A projection's sums, and how they are added.
#[derive(Clone, Copy)]
pub(super) struct Sums<'a> {
    pub projection: &'a str,
    pub shape: &'a Shape,
}

/// A group, and the row that it comes to.
type Added = (Moved, Option<Row>);

impl Sums<'_> {
    /// Adds what few groups came to before and after. Returns an output, and each key's new row.
    pub fn hold(
        &self,
        hands: Hands<'_>,
        second: &mut Option<Second<'_>>,
        result: Option<&HeldResult>,
        mut pairs: Vec<Pair>,
    ) -> Result<(VecDeque<OutputRows>, Vec<KeptRow>)> {
        let second = worth_sharing(second, pairs.len());
        let others = pairs.split_off(if second.is_some() { pairs.len() / 2 } else { pairs.len() });
        let add = |pairs| move |hands: Hands<'_>| self.add(hands, result, pairs);
        let (own, others) = traced("add", || both(hands, second, add(pairs), add(others)))?;
        let mut held = Held::new(self.shape)?;
        let mut kept = Vec::with_capacity(own.len() + others.len());
        for (moved, row) in own.into_iter().chain(others) {
            match &row {
                Some(row) => held.upsert(row)?,
                None => held.delete(&moved.key_cells)?,
            }
            kept.push((moved.key, row));
        }
        Ok((held.finish()?, kept))
    }

    fn add(&self, hands: Hands<'_>, result: Option<&HeldResult>, pairs: Vec<Pair>) -> Result<Vec<Added>> {
        let mut added = Vec::with_capacity(pairs.len());
        let moved = pairs.into_iter().filter_map(|pair| self.moved(pair).transpose());
        self.each(self.stood(hands.view, result)?, moved, |moved, row| {
            added.push((moved, row.map(Row::from)));
            Ok(())
        })?;
        Ok(added)
    }

    fn moved(&self, pair: Pair) -> Result<Option<Moved>> {
        let fields = self.shape.fields.len();
        let (before, after) = (cells_of(pair.before.as_deref().unwrap_or_default(), fields)?, pair.after.as_deref());
        let after = cells_of(after.unwrap_or_default(), fields)?;
        let mut by = Vec::with_capacity(self.shape.sums.len());
        for index in self.shape.sum_indexes() {
            let value = |cells: &[Cell<'_>]| cells[index].map(number).transpose().map(Option::unwrap_or_default);
            let difference = value(&after)?.checked_sub(value(&before)?);
            by.push(difference.ok_or_else(|| self.too_large(&self.shape.fields[index]))?);
        }
        if by.iter().all(|by| *by == 0) {
            return Ok(None);
        }
        let (mut key_cells, there) = (Vec::new(), if pair.after.is_some() { &after } else { &before });
        self.shape.key_indexes().into_iter().for_each(|index| write_cell(&mut key_cells, there[index]));
        Ok(Some(Moved { key: pair.key, key_cells: key_cells.into(), by }))
    }

    /// The result to which is added: where it is held, else in the file.
    fn stood<'c>(&self, view: &'c Connection, result: Option<&'c HeldResult>) -> Result<Stood<'c>> {
        result.map_or_else(|| Stood::open(view, self.projection), |result| Ok(Stood::Held(result)))
    }

    /// Gives `take` each group that has moved with its new row, if there is one. One that neither was nor is, is left out.
    fn each(
        &self,
        mut stood: Stood<'_>,
        moved: impl Iterator<Item = Result<Moved>>,
        mut take: impl FnMut(Moved, Option<&[u8]>) -> Result<()>,
    ) -> Result<()> {
        let mut row = Vec::new();
        let parts: Vec<Of> = self.shape.fields.iter().map(|field| self.of(field)).collect();
        for moved in moved {
            let moved = moved?;
            let found = stood.find(&moved.key, |held| self.sum(&parts, &moved, held, &mut row))?;
            let weight = found.map_or_else(|| self.sum(&parts, &moved, &[], &mut row), Ok)?;
            match (weight > 0, found.is_some()) {
                (true, _) => take(moved, Some(&row))?,
                (false, true) => take(moved, None)?,
                (false, false) => {}
            }
        }
        Ok(())
    }

    fn of(&self, field: &Field) -> Of {
        let place = |names: &[String]| names.iter().position(|name| name == field.name());
        place(&self.shape.key).map_or_else(|| Of::Sum(place(&self.shape.sums).unwrap_or_default()), Of::Key)
    }

    /// Writes the row that a group comes to, where it held the cells `held`. Returns its weight.
    fn sum(&self, parts: &[Of], moved: &Moved, held: &[u8], row: &mut Vec<u8>) -> Result<i128> {
        let (mut held, mut weight) = (Cells(held), 0);
        let keys = cells_of(&moved.key_cells, self.shape.key.len())?;
        row.clear();
        for (field, part) in self.shape.fields.iter().zip(parts) {
            let stood = held.next()?;
            let sum = match part {
                Of::Key(key) => {
                    write_cell(row, keys[*key]);
                    continue;
                }
                Of::Sum(sum) => *sum,
            };
            let total = stood.map(number).transpose()?.unwrap_or(0).checked_add(moved.by[sum]);
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
}

/// Where sums are added that do not fit into memory.
pub(super) struct Adding<'a> {
    pub session: &'a Session,
    /// The state file.
    pub connection: &'a Connection,
    pub sums: Sums<'a>,
    pub result: Option<&'a HeldResult>,
    pub place: &'a Place,
}

impl Adding<'_> {
    /// `__before` holds what the entities contributed; what they do now is what the query gives over `schema`. Lays the
    /// difference that it makes at the place.
    pub fn lay(&self, sql: &SqlProjection, schema: &str) -> Result<Counts> {
        let moved = query::run(self.session, sql, schema, &self.make_moved()?)?;
        let (all, key) = (Arc::new(Schema::new(self.sums.shape.fields.clone())), self.sums.shape.key_columns());
        let mut rows = self.loader(self.place.rows_table(all))?;
        let mut gone = self.loader(self.place.keys_table(key))?;
        let mut counts = (0, 0);
        for start in (0..moved).step_by(CHUNK_ROWS as usize) {
            let chunk = self.read(start..start + CHUNK_ROWS)?;
            let stood = self.sums.stood(self.connection, self.result)?;
            self.sums.each(stood, chunk.into_iter().map(Ok), |moved, row| match row {
                Some(row) => {
                    counts.0 += 1;
                    rows.push(cells_of(row, self.sums.shape.fields.len())?)
                }
                None => {
                    counts.1 += 1;
                    gone.push(cells_of(&moved.key_cells, self.sums.shape.key.len())?)
                }
            })?;
        }
        rows.finish()?;
        gone.finish()?;
        Ok(counts)
    }

    fn loader(&self, table: WorkTable) -> Result<Loader<'_>> {
        self.session.create(&table)?;
        Loader::new(self.session, table)
    }

    /// The statement that makes `__moved`: key columns, and by how much each sum has changed, where any has.
    fn make_moved(&self) -> Result<String> {
        let keys = self.sums.shape.keys("x");
        let (mut sums, mut moved) = (Vec::new(), Vec::new());
        for name in &self.sums.shape.sums {
            let (column, scale) = (quote_name(name), scale_of(self.sums.shape.type_of(name)?));
            sums.push(format!(
                "(coalesce(sum(x.{column}) filter (x.__sign), 0) - coalesce(sum(x.{column}) filter (not x.__sign), 0))
                     ::decimal(38, {scale}) as {column}"
            ));
            moved.push(format!("{column} <> 0"));
        }
        // The query begins on the second line.
        Ok(format!(
            "create or replace temp table __moved as
             select * from (
                 select {keys}, {} from (select *, true as __sign from {{query}} union all select *, false from __before) x
                 group by {keys}
             ) where {}",
            comma(sums),
            moved.join(" or ")
        )
        .replace('\n', " "))
    }

    /// Some rows of `__moved`, by key: neighbours are looked for one after the other.
    fn read(&self, rows: Range<i64>) -> Result<Vec<Moved>> {
        let (keys, mut chunk) = ((0..self.sums.shape.key.len()).collect::<Vec<_>>(), Vec::new());
        let (from, to) = (rows.start, rows.end);
        let query = format!("from temp.main.__moved where rowid >= {from} and rowid < {to}");
        self.session.batches(&query, |batch| {
            let sums: Vec<_> =
                batch.columns()[keys.len()..].iter().map(|sum| sum.as_primitive::<Decimal128Type>()).collect();
            results::each_row(&batch, &keys, &keys, |row, key, key_cells| {
                let by = sums.iter().map(|sum| sum.value(row)).collect();
                chunk.push(Moved { key, key_cells: key_cells.into(), by });
                Ok(())
            })
        })?;
        chunk.sort_unstable_by(|one, other| one.key.cmp(&other.key));
        Ok(chunk)
    }
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
