//! What a query gave for touched entities and gives now, row by row, where that is little: as most steps are.

use std::collections::{HashMap, VecDeque};

use shori_core::Result;
use shori_core::projection::SqlProjection;
use shori_core::store::OutputRows;

use super::cells::cells_of;
use super::key::Key;
use super::query::{self, Shape};
use super::reader::READY_ROWS_MAX;
use super::results::{Row, each_row};
use super::session::Session;
use super::tables::Batch;

/// What is held of either side at most.
const HELD_ROWS_MAX: i64 = READY_ROWS_MAX / 2;
const HELD_BYTES_MAX: usize = 16 << 20;

/// A key's row before and after.
pub(super) struct Pair {
    pub key: Key,
    pub before: Option<Row>,
    pub after: Option<Row>,
}

/// The rows of either side, by key; none where they are too many to be held, or a key comes twice.
pub(super) fn pairs(
    session: &Session,
    sql: &SqlProjection,
    shape: &Shape,
    (before, after): (&str, &str),
) -> Result<Option<Vec<Pair>>> {
    let (key, all) = (shape.key_indexes(), (0..shape.fields.len()).collect::<Vec<_>>());
    let mut found: HashMap<Key, (Option<Row>, Option<Row>)> = HashMap::new();
    for (schema, is_after) in [(before, false), (after, true)] {
        let (mut rows, mut bytes, mut is_unique) = (0, 0, true);
        query::each(session, sql, schema, HELD_ROWS_MAX + 1, |batch| {
            rows += batch.num_rows() as i64;
            each_row(&batch, &key, &all, |_, key, row| {
                bytes += row.len();
                if bytes > HELD_BYTES_MAX {
                    return Ok(());
                }
                let sides = found.entry(key).or_default();
                let side = if is_after { &mut sides.1 } else { &mut sides.0 };
                is_unique &= side.replace(row.into()).is_none();
                Ok(())
            })
        })?;
        if rows > HELD_ROWS_MAX || bytes > HELD_BYTES_MAX || !is_unique {
            return Ok(None);
        }
    }
    let pair = |(key, (before, after))| Pair { key, before, after };
    let mut pairs: Vec<Pair> = found.into_iter().map(pair).collect();
    pairs.sort_unstable_by(|one, other| one.key.cmp(&other.key));
    Ok(Some(pairs))
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
