//! Tries out what a projection declares of its query: on sampled rows, kept by change and computed in full, it must come
//! to the same.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, UInt64Array};
use arrow::compute::take;
use arrow::datatypes::TimestampMicrosecondType;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use async_trait::async_trait;
use shori_core::change::{ChangeBatch, ChangeHeadBuilder, Op};
use shori_core::position::{CaptureId, Position, Positions, SortKey};
use shori_core::store::{OutputKind, OutputRows};
use shori_core::transform::{Applied, CaptureAdvance, Computed, LogReader, StateTable, Transform};
use shori_core::{Error, ErrorKind, Result};

/// Of a table's sampled rows, one in so many comes with the changes, changes, or goes.
const INSERTED: usize = 3;
const CHANGED: usize = 4;
const DELETED: usize = 7;

/// Rows of a result, by key, both as text.
type Rows = BTreeMap<String, String>;

/// Two steps of changes, the same for every projection.
pub struct Trial<'a> {
    pub transform: &'a dyn Transform,
    pub tables: &'a [StateTable],
    pub sample: &'a [ChangeBatch],
}

/// A projection to be tried.
pub struct Tried {
    pub name: String,
    pub key: Vec<String>,
    pub tables: Vec<Arc<str>>,
}

impl Trial<'_> {
    /// Applies the sample, then changes to it, and compares what every projection has then. One that differs, or fails,
    /// is a problem.
    pub async fn run(&self, projections: &[Tried]) -> Result<Vec<Error>> {
        let first = self.advance(1, self.sample.iter().map(before).collect::<Result<_>>()?).await?;
        let mut kept = BTreeMap::new();
        let mut problems = Vec::new();
        for tried in projections {
            match self.output(tried, None, Rows::new()).await {
                Ok(rows) => drop(kept.insert(&tried.name, rows)),
                Err(error) => problems.push(error),
            }
            self.transform.settle(&tried.name, Some(&self.of(tried, &first))).await?;
        }
        self.advance(2, self.sample.iter().map(after).collect::<Result<_>>()?).await?;
        for tried in projections {
            let Some(before) = kept.remove(&tried.name) else { continue };
            let compared = async {
                let by_change = self.output(tried, Some(&self.of(tried, &first)), before).await?;
                let in_full = self.output(tried, None, Rows::new()).await?;
                Ok(difference(&tried.name, &by_change, &in_full))
            };
            match compared.await {
                Ok(difference) => problems.extend(difference),
                Err(error) => problems.push(error),
            }
        }
        Ok(problems)
    }

    async fn advance(&self, lsn: u64, batches: Vec<ChangeBatch>) -> Result<Positions> {
        let to = Applied { position: Position::new(SortKey::from_u64(lsn), SortKey::MAX), time: lsn as i64 };
        let captures: Vec<CaptureAdvance> = (self.tables.iter())
            .map(|table| CaptureAdvance { capture: table.capture.clone(), to, generation: 1, sweep: None })
            .collect();
        let positions = captures.iter().map(|advance| (advance.capture.clone(), to.position)).collect();
        self.transform.advance(&captures, &mut Sampled(batches.into())).await?;
        Ok(positions)
    }

    /// A projection's checkpoint names the captures that it reads, and no others.
    fn of(&self, tried: &Tried, positions: &Positions) -> Positions {
        let reads = |id: &CaptureId| {
            self.tables.iter().any(|table| table.capture == *id && tried.tables.contains(&table.schema.table))
        };
        positions.iter().filter(|(id, _)| reads(id)).map(|(id, position)| (id.clone(), *position)).collect()
    }

    /// `rows` after the projection's output since `since`.
    async fn output(&self, tried: &Tried, since: Option<&Positions>, mut rows: Rows) -> Result<Rows> {
        let key = &tried.key;
        let computed = self.transform.compute(&tried.name, since).await?;
        let Computed::Output { mut reader, .. } = computed else { return Ok(rows) };
        if reader.kind() == OutputKind::Replace {
            rows.clear();
        }
        while let Some(part) = reader.next().await? {
            match part {
                OutputRows::Upsert(batch) => rows.extend(texts(&batch, key)?),
                OutputRows::Delete(batch) => texts(&batch, key)?.keys().for_each(|key| drop(rows.remove(key))),
                OutputRows::Version(_) | OutputRows::Close(_) => {}
            }
        }
        Ok(rows)
    }
}

fn difference(name: &str, by_change: &Rows, in_full: &Rows) -> Option<Error> {
    let keys = by_change.keys().chain(in_full.keys());
    let mut wrong = keys.filter(|key| by_change.get(*key) != in_full.get(*key));
    let key = wrong.next()?;
    let tell = |rows: &Rows| rows.get(key).cloned().unwrap_or_else(|| "no row".into());
    let cause =
        format!("tried on sampled rows, key {key} is kept as {} but computed as {}", tell(by_change), tell(in_full));
    Some(
        Error::new(ErrorKind::Projection, "keep", format!("projection {name}"), cause)
            .with_remedy("mend its entity, additive columns or weight, or leave them out to compute it in full"),
    )
}

/// Key and row of each row of `batch`.
fn texts(batch: &RecordBatch, key: &[String]) -> Result<Rows> {
    let options = FormatOptions::default().with_null("null");
    let schema = batch.schema();
    // The name of a zone tells nothing here, and Arrow would look it up.
    let plain = |array: &ArrayRef| match array.as_primitive_opt::<TimestampMicrosecondType>() {
        Some(times) => Arc::new(times.clone().with_timezone_opt(None::<&str>)),
        None => array.clone(),
    };
    let columns: Vec<ArrayRef> = batch.columns().iter().map(plain).collect();
    let formatters: Vec<(&str, ArrayFormatter<'_>)> = (columns.iter().zip(schema.fields()))
        .map(|(array, field)| Ok((field.name().as_str(), ArrayFormatter::try_new(array, &options)?)))
        .collect::<Result<_>>()?;
    let text = |row: usize, wanted: &dyn Fn(&str) -> bool| {
        let values = formatters.iter().filter(|(name, _)| wanted(name));
        let values: Vec<String> = values.map(|(name, formatter)| format!("{name}={}", formatter.value(row))).collect();
        format!("({})", values.join(", "))
    };
    let of_key = |name: &str| key.iter().any(|part| part == name);
    Ok((0..batch.num_rows()).map(|row| (text(row, &of_key), text(row, &|_| true))).collect())
}

/// The sample without the rows that come later.
fn before(sample: &ChangeBatch) -> Result<ChangeBatch> {
    let rows = (0..sample.len()).filter(|row| row % INSERTED != 0).map(|row| (row, row, Op::Snapshot));
    build(sample, 1, rows.collect())
}

/// What is left out of [`before`] comes; of the rest, some take over their neighbour's values, some go.
fn after(sample: &ChangeBatch) -> Result<ChangeBatch> {
    let count = sample.len();
    let rows = (0..count).filter_map(|row| match row {
        _ if row % INSERTED == 0 => Some((row, row, Op::Insert)),
        _ if row % DELETED == 0 => Some((row, row, Op::Delete)),
        _ if row % CHANGED == 0 => Some((row, (row + 1) % count, Op::UpdateAfter)),
        _ => None,
    });
    build(sample, 2, rows.collect())
}

/// Changes at `lsn`: the key of one sampled row, the values of another.
fn build(sample: &ChangeBatch, lsn: u64, rows: Vec<(usize, usize, Op)>) -> Result<ChangeBatch> {
    let mut head = ChangeHeadBuilder::default();
    for (index, (.., op)) in rows.iter().enumerate() {
        head.push(&Position::new(SortKey::from_u64(lsn), SortKey::from_u64(index as u64)), *op, lsn as i64);
    }
    let of_key = UInt64Array::from_iter_values(rows.iter().map(|(key, ..)| *key as u64));
    let of_values = UInt64Array::from_iter_values(rows.iter().map(|(_, values, _)| *values as u64));
    let columns = sample.columns.iter().enumerate().map(|(index, column)| {
        let from = if sample.schema.key.contains(&index) { &of_key } else { &of_values };
        Ok(take(column.as_ref() as &dyn Array, from, None)?)
    });
    let columns: Vec<ArrayRef> = columns.collect::<Result<_>>()?;
    let (capture, schema): (CaptureId, Arc<_>) = (sample.capture.clone(), sample.schema.clone());
    head.finish(capture, schema, columns)
}

struct Sampled(VecDeque<ChangeBatch>);

#[async_trait]
impl LogReader for Sampled {
    async fn next(&mut self) -> Result<Option<ChangeBatch>> {
        Ok(self.0.pop_front())
    }
}
