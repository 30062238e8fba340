//! The log of one capture in memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::change::{ChangeBatch, ChangeHeadBuilder, Op};
use crate::error::Result;
use crate::position::{CaptureId, Micros, Position};
use crate::schema::TableSchema;
use crate::source::SnapshotProgress;
use crate::store::Compacted;

use super::memory_source::{columns_of_mask, mask_of};
use super::value::{Row, Value, arrays_of, pick, row_at};

/// A staged row image, in the columns of the schema that it came with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogRow {
    pub position: Position,
    pub op: Op,
    pub commit_time: Micros,
    pub row: Row,
    pub unchanged: Vec<usize>,
    pub schema: Arc<TableSchema>,
    pub staged_at: Micros,
}

/// The images of a batch.
pub fn log_rows(batch: &ChangeBatch, staged_at: Micros) -> Result<Vec<Arc<LogRow>>> {
    let mut rows = Vec::with_capacity(batch.len());
    for index in 0..batch.len() {
        let mask = batch.unchanged.as_ref().filter(|masks| arrow::array::Array::is_valid(*masks, index));
        rows.push(Arc::new(LogRow {
            position: batch.position(index)?,
            op: Op::from_u8(batch.op.value(index))?,
            commit_time: batch.commit_time(index),
            row: row_at(&batch.columns, index),
            unchanged: mask.map_or_else(Vec::new, |masks| columns_of_mask(masks.value(index))),
            schema: batch.schema.clone(),
            staged_at,
        }));
    }
    Ok(rows)
}

/// The inverse of [`log_rows`], in the columns of `schema`.
pub fn change_batch(capture: &CaptureId, schema: &Arc<TableSchema>, rows: &[Arc<LogRow>]) -> Result<ChangeBatch> {
    let mut head = ChangeHeadBuilder::default();
    let mut masks = Vec::with_capacity(rows.len());
    let mut values = Vec::with_capacity(rows.len());
    for row in rows {
        let fitted = row.in_schema(schema);
        head.push(&fitted.position, fitted.op, fitted.commit_time);
        masks.push(mask_of(&fitted.unchanged, fitted.row.len()));
        values.push(fitted.row);
    }
    let columns = arrays_of(schema.columns.fields(), &values);
    let mut batch = head.finish(capture.clone(), schema.clone(), columns)?;
    if masks.iter().any(Option::is_some) {
        batch.unchanged = Some(masks.into_iter().collect());
    }
    Ok(batch)
}

impl LogRow {
    /// The same image with the columns of `schema`: what it lacks is null.
    pub fn in_schema(&self, schema: &Arc<TableSchema>) -> LogRow {
        let mut fitted = self.clone();
        if self.schema.columns != schema.columns {
            let names = schema.columns.fields().iter().map(|field| self.schema.columns.index_of(field.name()).ok());
            let sources: Vec<Option<usize>> = names.collect();
            let value = |source: &Option<usize>| source.map_or(Value::Null, |index| self.row[index].clone());
            fitted.row = sources.iter().map(value).collect();
            let was = |index: &usize| sources[*index].is_some_and(|source| self.unchanged.contains(&source));
            fitted.unchanged = (0..sources.len()).filter(was).collect();
            fitted.schema = schema.clone();
        }
        fitted
    }

    pub fn key(&self) -> Row {
        pick(&self.row, &self.schema.key)
    }

    /// Whole, with unchanged columns from `before`.
    fn resolved(&self, before: Option<&Row>) -> Row {
        let Some(before) = before else { return self.row.clone() };
        let value = |index: usize| if self.unchanged.contains(&index) { &before[index] } else { &self.row[index] };
        (0..self.row.len()).map(|index| value(index).clone()).collect()
    }
}

/// What compaction keeps of a key.
struct Kept {
    image: Arc<LogRow>,
    /// Where a snapshot found the row as it stands, or it last changed.
    touched: Arc<LogRow>,
}

/// Brings rows at or below `horizon` down to the last image per key. Sweeps of `snapshots` that ended there are
/// carried out, for nobody else will know of them.
pub fn compact(
    rows: &mut Vec<Arc<LogRow>>,
    schema: &Arc<TableSchema>,
    snapshots: &[SnapshotProgress],
    horizon: &Position,
    keep_deletes: bool,
) -> Compacted {
    let rows_before = rows.len() as u64;
    let split = rows.partition_point(|row| row.position <= *horizon);
    let above = rows.split_off(split);
    let mut ended: Vec<_> =
        snapshots.iter().filter(|snapshot| snapshot.is_done() && snapshot.end <= *horizon).collect();
    ended.sort_by_key(|snapshot| snapshot.end);
    let mut keys: BTreeMap<Row, Kept> = BTreeMap::new();
    let mut truncation = None;
    let mut due = ended.iter().peekable();
    for row in rows.drain(..) {
        while let Some(snapshot) = due.next_if(|snapshot| snapshot.end < row.position) {
            keys.retain(|_, kept| kept.touched.position > snapshot.start);
        }
        let mut row = row.in_schema(schema);
        if row.op == Op::Truncate {
            keys.clear();
            truncation = Some(Arc::new(row));
            continue;
        }
        let before = keys.get(&row.key()).filter(|kept| kept.image.op.leaves_row());
        if row.op.leaves_row() && before.is_some() {
            row.row = row.resolved(before.map(|kept| &kept.image.row));
            row.unchanged.clear();
        }
        let same = row.op == Op::Snapshot && before.is_some_and(|kept| kept.image.row == row.row);
        let touched = Arc::new(row);
        let image = before.filter(|_| same).map_or_else(|| touched.clone(), |kept| kept.image.clone());
        keys.insert(touched.key(), Kept { image, touched });
    }
    for snapshot in due {
        keys.retain(|_, kept| kept.touched.position > snapshot.start);
    }
    for kept in keys.into_values() {
        if kept.image.op.leaves_row() || keep_deletes {
            // The image tells since when the row stands so, the other that a snapshot has seen it: a reader that
            // sweeps at the snapshot's end needs both.
            if kept.touched.position != kept.image.position {
                rows.push(kept.touched);
            }
            rows.push(kept.image);
        }
    }
    rows.extend(truncation.filter(|_| keep_deletes));
    rows.sort_by_key(|row| row.position);
    rows.extend(above);
    Compacted { rows_before, rows_after: rows.len() as u64 }
}
