//! What a query gave for touched entities and gives now, row by row, where that is little: as most steps are.

use std::collections::VecDeque;

use shori_core::Result;
use shori_core::projection::SqlProjection;
use shori_core::store::OutputRows;

use super::cells::cells_of;
use super::hands::{Hands, Second, both};
use super::key::Key;
use super::query::{self, Shape};
use super::reader::READY_ROWS_MAX;
use super::results::{Row, each_row};
use super::session::Session;
use super::tables::Batch;

/// What is held of either side at most.
const HELD_ROWS_MAX: i64 = READY_ROWS_MAX;
pub(super) const HELD_BYTES_MAX: usize = 16 << 20;

/// A key's row before and after.
pub(super) struct Pair {
    pub key: Key,
    pub before: Option<Row>,
    pub after: Option<Row>,
}

/// A key's row on one side.
type Keyed = (Key, Row);

/// The rows of either side, by key; none where they are too many to be held, or a key comes twice.
pub(super) fn pairs(
    hands: Hands<'_>,
    second: &mut Option<Second<'_>>,
    sql: &SqlProjection,
    shape: &Shape,
    (before, after): (&str, &str),
) -> Result<Option<Vec<Pair>>> {
    let read = |schema| move |hands: Hands<'_>| side(hands.session, sql, shape, schema);
    let (before, after) = both(hands, second.as_mut(), read(before), read(after))?;
    let (Some(before), Some(after)) = (before, after) else { return Ok(None) };
    let mut pairs = Vec::with_capacity(before.len().max(after.len()));
    let mut after = after.into_iter().peekable();
    for (key, row) in before {
        while let Some((key, row)) = after.next_if(|(other, _)| *other < key) {
            pairs.push(Pair { key, before: None, after: Some(row) });
        }
        let now = after.next_if(|(other, _)| *other == key).map(|(_, row)| row);
        pairs.push(Pair { key, before: Some(row), after: now });
    }
    pairs.extend(after.map(|(key, row)| Pair { key, before: None, after: Some(row) }));
    Ok(Some(pairs))
}

/// The rows of one side in the order of their keys.
fn side(session: &Session, sql: &SqlProjection, shape: &Shape, schema: &str) -> Result<Option<Vec<Keyed>>> {
    let (key, all) = (shape.key_indexes(), (0..shape.fields.len()).collect::<Vec<_>>());
    let (mut rows, mut count, mut bytes) = (Vec::new(), 0, 0);
    query::each(session, sql, schema, HELD_ROWS_MAX + 1, |batch| {
        count += batch.num_rows() as i64;
        each_row(&batch, &key, &all, |_, key, row| {
            bytes += row.len();
            if bytes <= HELD_BYTES_MAX {
                rows.push((key, row.into()));
            }
            Ok(())
        })
    })?;
    if count > HELD_ROWS_MAX || bytes > HELD_BYTES_MAX {
        return Ok(None);
    }
    rows.sort_unstable_by(|(one, _), (other, _): &Keyed| one.cmp(other));
    let is_unique = rows.windows(2).all(|neighbours| neighbours[0].0 != neighbours[1].0);
    Ok(is_unique.then_some(rows))
}

/// The output that takes one side to the other.
pub(super) fn output(shape: &Shape, pairs: Vec<Pair>) -> Result<VecDeque<OutputRows>> {
    let mut held = Held::new(shape)?;
    for pair in pairs {
        match (&pair.before, &pair.after) {
            (before, Some(after)) if before.as_ref() != Some(after) => held.upsert(after)?,
            (Some(before), None) => {
                let cells = cells_of(before, shape.fields.len())?;
                held.gone.push(shape.key_indexes().into_iter().map(|index| cells[index]))?;
            }
            _ => {}
        }
    }
    held.finish()
}

/// An output in the making that is held in memory.
pub(super) struct Held<'s> {
    shape: &'s Shape,
    /// Where the published columns stand among all.
    published: Vec<usize>,
    rows: Batch,
    gone: Batch,
}

impl<'s> Held<'s> {
    pub fn new(shape: &'s Shape) -> Result<Self> {
        let is_published = |index: &usize| shape.published.index_of(shape.fields[*index].name()).is_ok();
        let published = (0..shape.fields.len()).filter(is_published).collect();
        let (rows, gone) = (Batch::new(shape.published.clone())?, Batch::new(shape.key_columns())?);
        Ok(Self { shape, published, rows, gone })
    }

    /// Takes the cells of a row of all columns.
    pub fn upsert(&mut self, row: &[u8]) -> Result<()> {
        let cells = cells_of(row, self.shape.fields.len())?;
        self.rows.push(self.published.iter().map(|&index| cells[index]))
    }

    /// Takes the cells of the key columns.
    pub fn delete(&mut self, key: &[u8]) -> Result<()> {
        self.gone.push(cells_of(key, self.shape.key.len())?)
    }

    pub fn finish(mut self) -> Result<VecDeque<OutputRows>> {
        let mut parts = VecDeque::new();
        if self.rows.rows() > 0 {
            parts.push_back(OutputRows::Upsert(self.rows.take()?));
        }
        if self.gone.rows() > 0 {
            parts.push_back(OutputRows::Delete(self.gone.take()?));
        }
        Ok(parts)
    }
}
