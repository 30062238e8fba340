//! A transform in memory. What is committed lives in [`MemoryCache`] and survives; a [`MemoryTransform`] is one
//! process's way to it, and can end at any step.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef};
use async_trait::async_trait;

use super::faults::Faults;
use super::memory_query::{Query, QueryResult, QueryTable, QueryTables, query};
use super::memory_state::{Change, StateRow, TableState};
use super::value::{Row, Value, batch_of, pick};
use crate::change::ChangeBatch;
use crate::error::{Error, ErrorKind, Result};
use crate::position::{CaptureId, Micros, Position, Positions};
use crate::projection::{self, Deletes, Derivation, HistoryProjection, Projection, SqlProjection, Tracked, history};
use crate::schema::TableSchema;
use crate::store::{OutputKind, OutputReader, OutputRows};
use crate::transform::{Advanced, Applied, CaptureAdvance, Computed, LogReader, StateTable, Transform};

/// Rows of a part of an output.
const PART_ROWS: usize = 3;

/// What is durable.
#[derive(Clone, Default)]
pub struct MemoryCache(Arc<Mutex<Cache>>);

#[derive(Clone, Default)]
struct Cache {
    store_id: String,
    tables: BTreeMap<CaptureId, TableState>,
    projections: BTreeMap<Arc<str>, Kept>,
}

/// What is kept for one projection.
#[derive(Clone)]
struct Kept {
    projection: Projection,
    /// The checkpoint that the store was last known to hold.
    settled: Option<Positions>,
    /// Of a query: the result that the store holds.
    result: Option<(Positions, QueryResult)>,
    /// Of a query: the result that the store may hold by now.
    pending: Option<(Positions, QueryResult)>,
}

pub struct MemoryTransform {
    cache: MemoryCache,
    faults: Faults,
}

struct MemoryOutput {
    kind: OutputKind,
    rows: u64,
    parts: VecDeque<OutputRows>,
    faults: Faults,
}

impl MemoryCache {
    pub fn open(&self, faults: Faults) -> MemoryTransform {
        MemoryTransform { cache: self.clone(), faults }
    }

    /// Current rows of a table, in key order.
    pub fn rows(&self, table: &str) -> Vec<Row> {
        let cache = self.cache();
        let tables = cache.tables.values().filter(|state| &*state.schema.table == table);
        tables.flat_map(|state| state.rows.values().map(|row| row.row.clone())).collect()
    }

    /// A cache of its own with the same content.
    pub fn copy(&self) -> MemoryCache {
        MemoryCache(Arc::new(Mutex::new(self.cache().clone())))
    }

    pub fn changes_kept(&self) -> u64 {
        self.cache().tables.values().map(|table| table.changes.len() as u64).sum()
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn fresh(projection: &Projection) -> Kept {
    Kept { projection: projection.clone(), settled: None, result: None, pending: None }
}

fn refuse(projection: &str, cause: String) -> Error {
    Error::new(ErrorKind::Projection, "compute", format!("projection {projection}"), cause)
}

impl Cache {
    fn open(&mut self, store_id: &str, tables: &[StateTable], projections: &[Projection]) {
        let other_shape =
            |table: &StateTable| self.tables.get(&table.capture).is_some_and(|known| known.schema != table.schema);
        if self.store_id != store_id || tables.iter().any(other_shape) {
            *self = Cache { store_id: store_id.into(), ..Cache::default() };
        }
        for StateTable { capture, schema } in tables {
            let state = || TableState::new(capture.clone(), schema.clone());
            self.tables.entry(capture.clone()).or_insert_with(state);
        }
        for projection in projections {
            let kept = self.projections.entry(projection.name.clone()).or_insert_with(|| fresh(projection));
            if kept.projection != *projection {
                *kept = fresh(projection);
            }
        }
    }

    fn kept(&self, name: &str) -> Result<&Kept> {
        self.projections.get(name).ok_or_else(|| refuse(name, "it is not known".into()))
    }

    /// The captures of a projection's tables; fails when a table has none.
    fn tables_of(&self, projection: &Projection) -> Result<Vec<&TableState>> {
        let mut found = Vec::new();
        for name in projection.tables() {
            let before = found.len();
            found.extend(self.tables.values().filter(|state| state.schema.table == name));
            if found.len() == before {
                return Err(refuse(&projection.name, format!("table {name} is not captured")));
            }
        }
        Ok(found)
    }

    fn describe(&self, name: &str) -> Result<SchemaRef> {
        let projection = &self.kept(name)?.projection;
        let tables = self.tables_of(projection)?;
        match &projection.derivation {
            Derivation::Sql(sql) => {
                let query = query(sql)?;
                Ok(Arc::new(query.columns.project(&query.published(sql))?))
            }
            Derivation::Latest { .. } => Ok(Arc::new(Schema::new(latest_fields(&tables[0].schema)))),
            Derivation::History(derivation) => Ok(Arc::new(Schema::new(history_fields(&tables[0].schema, derivation)))),
        }
    }

    fn advance(&mut self, advances: &[CaptureAdvance], log: &BTreeMap<CaptureId, Vec<ChangeBatch>>) -> Result<u64> {
        let mut moved = Vec::new();
        let mut rows = 0;
        for advance in advances {
            let unknown = || {
                Error::new(ErrorKind::Internal, "advance", format!("capture {}", advance.capture), "it is not known")
            };
            let mut state = self.tables.get(&advance.capture).ok_or_else(unknown)?.clone();
            rows += state.advance(advance, log.get(&advance.capture).map_or(&[], Vec::as_slice))?;
            moved.push(state);
        }
        self.tables.extend(moved.into_iter().map(|state| (state.capture.clone(), state)));
        Ok(rows)
    }

    fn compute(&mut self, name: &str, since: Option<&Positions>, faults: &Faults) -> Result<Computed> {
        let kept = self.kept(name)?;
        let projection = kept.projection.clone();
        let tables = self.tables_of(&projection)?;
        let at = |table: &&TableState| since.and_then(|since| since.get(&table.capture)).copied();
        let from = |table: &&TableState| at(table).unwrap_or(Position::ZERO);
        if tables.iter().any(|table| table.position() < from(table)) {
            return Ok(Computed::Behind);
        }
        let applied = tables.iter().filter_map(|table| Some((table.capture.clone(), table.applied?)));
        let applied: BTreeMap<CaptureId, Applied> = applied.collect();
        let positions: Positions = applied.iter().map(|(id, applied)| (id.clone(), applied.position)).collect();
        if since == Some(&positions) {
            return Ok(Computed::UpToDate);
        }
        let told = tables.iter().all(|table| table.kept_from <= from(table));
        let mut pending = None;
        let (kind, rows) = match &projection.derivation {
            Derivation::History(_) if !told => return Ok(Computed::NeedsReplay),
            Derivation::History(derivation) => {
                let kind = if since.is_some() { OutputKind::Versions } else { OutputKind::ReplaceVersions };
                (
                    kind,
                    versions(derivation, tables[0], kind, tables.iter().map(|table| table.changes_since(&from(table)))),
                )
            }
            Derivation::Latest { .. } if told && since.is_some() => {
                (OutputKind::Merge, latest_changes(tables.iter().map(|table| (*table, from(table)))))
            }
            Derivation::Latest { .. } => (OutputKind::Replace, latest_rows(&tables)),
            Derivation::Sql(sql) => {
                let stands = kept.result.as_ref().filter(|(at, _)| told && Some(at) == since).map(|(_, rows)| rows);
                let since = since.filter(|_| stands.is_some());
                let (next, output) = query_output(sql, &tables, stands.zip(since))?;
                pending = Some((positions.clone(), next));
                output
            }
        };
        let as_of_time = applied.values().map(|applied| applied.time).min().unwrap_or(0);
        if let Some(kept) = self.projections.get_mut(name).filter(|_| pending.is_some()) {
            kept.pending = pending;
        }
        let count = rows.iter().map(part_rows).sum();
        let reader = MemoryOutput { kind, rows: count, parts: rows.into(), faults: faults.clone() };
        Ok(Computed::Output { positions, as_of_time, reader: Box::new(reader) })
    }

    fn settle(&mut self, name: &str, checkpoint: Option<&Positions>) -> Result<()> {
        let projection = self.kept(name)?.projection.clone();
        let tables = self.tables_of(&projection)?;
        let here = |table: &&TableState| checkpoint.and_then(|at| at.get(&table.capture)) == Some(&table.position());
        let rebuilt = match &projection.derivation {
            Derivation::Sql(sql) if tables.iter().all(here) => {
                checkpoint.cloned().zip(query(sql)?.result(sql, &query_tables(&tables, None)).ok())
            }
            _ => None,
        };
        let kept = self.projections.get_mut(name).ok_or_else(|| refuse(name, "it is not known".into()))?;
        let pending = kept.pending.take().filter(|(at, _)| Some(at) == checkpoint);
        let result = kept.result.take().filter(|(at, _)| Some(at) == checkpoint);
        kept.result = pending.or(result).or(rebuilt);
        kept.settled = checkpoint.cloned();
        Ok(())
    }

    fn forget(&mut self, checkpoints: &[Positions]) {
        if checkpoints.iter().any(Positions::is_empty) {
            return;
        }
        let waits = |table: &TableState| {
            self.projections.values().any(|kept| {
                let history = matches!(kept.projection.derivation, Derivation::History(_));
                history && kept.settled.is_none() && kept.projection.tables().contains(&table.schema.table)
            })
        };
        let held: Vec<CaptureId> =
            self.tables.values().filter(|table| waits(table)).map(|t| t.capture.clone()).collect();
        let read = |table: &TableState| {
            self.projections.values().any(|kept| kept.projection.tables().contains(&table.schema.table))
        };
        let unread: Vec<CaptureId> =
            self.tables.values().filter(|table| !read(table)).map(|t| t.capture.clone()).collect();
        for (id, table) in self.tables.iter_mut().filter(|(id, _)| !held.contains(id)) {
            let consumed = checkpoints.iter().filter_map(|positions| positions.get(id)).min();
            let everything = table.position();
            match consumed {
                Some(consumed) => table.forget(consumed),
                None if unread.contains(id) => table.forget(&everything),
                None => {}
            }
        }
    }
}

fn part_rows(part: &OutputRows) -> u64 {
    match part {
        OutputRows::Upsert(rows) | OutputRows::Delete(rows) | OutputRows::Version(rows) | OutputRows::Close(rows) => {
            rows.num_rows() as u64
        }
    }
}

/// Rows in parts of bounded size.
fn parts(fields: &Fields, rows: &[Row], part: fn(arrow::array::RecordBatch) -> OutputRows) -> Vec<OutputRows> {
    rows.chunks(PART_ROWS).map(|rows| part(batch_of(fields, rows))).collect()
}

fn key_fields(schema: &TableSchema) -> Fields {
    schema.key.iter().map(|&index| schema.columns.fields()[index].clone()).collect()
}

fn latest_fields(schema: &TableSchema) -> Fields {
    let lsn = Arc::new(Field::new(projection::SOURCE_LSN, DataType::Binary, false));
    schema.columns.fields().iter().cloned().chain([lsn]).collect()
}

fn latest_row(state: &StateRow) -> Row {
    state.row.iter().cloned().chain([Value::Binary(state.lsn.as_slice().to_vec())]).collect()
}

fn latest_rows(tables: &[&TableState]) -> Vec<OutputRows> {
    let rows: Vec<Row> = tables.iter().flat_map(|table| table.rows.values().map(latest_row)).collect();
    parts(&latest_fields(&tables[0].schema), &rows, OutputRows::Upsert)
}

fn latest_changes<'a>(tables: impl Iterator<Item = (&'a TableState, Position)>) -> Vec<OutputRows> {
    let mut output = Vec::new();
    for (table, since) in tables {
        let last = table.changes_since(&since).iter().map(|change| (change.key.clone(), change.after.as_ref()));
        let last: BTreeMap<Row, Option<&StateRow>> = last.collect();
        let upserts: Vec<Row> = last.values().flatten().map(|state| latest_row(state)).collect();
        let gone = last.iter().filter(|(_, after)| after.is_none());
        let deletes: Vec<Row> = gone.map(|(key, _)| key.clone()).collect();
        output.extend(parts(&latest_fields(&table.schema), &upserts, OutputRows::Upsert));
        output.extend(parts(&key_fields(&table.schema), &deletes, OutputRows::Delete));
    }
    output
}

fn tracked(schema: &TableSchema, derivation: &HistoryProjection) -> Vec<usize> {
    let is_tracked = |index: &usize| derivation.tracks(schema.columns.field(*index).name());
    (0..schema.columns.fields().len()).filter(|index| !schema.key.contains(index)).filter(is_tracked).collect()
}

fn history_key_fields(schema: &TableSchema, derivation: &HistoryProjection) -> Vec<Field> {
    let renamed = schema.key.iter().zip(&derivation.key);
    renamed.map(|(&index, name)| schema.columns.field(index).clone().with_name(name)).collect()
}

fn history_fields(schema: &TableSchema, derivation: &HistoryProjection) -> Fields {
    let mut fields = history_key_fields(schema, derivation);
    fields.extend(tracked(schema, derivation).into_iter().map(|index| {
        let field = schema.columns.field(index).clone().with_nullable(true);
        let name = history::published_name(field.name());
        field.with_name(name)
    }));
    fields.extend(history::fields());
    fields.into()
}

fn versions<'a>(
    derivation: &HistoryProjection,
    table: &TableState,
    kind: OutputKind,
    changes: impl Iterator<Item = &'a [Arc<Change>]>,
) -> Vec<OutputRows> {
    let schema = &table.schema;
    let mut closes = Vec::new();
    let mut opened = Vec::new();
    for capture in changes {
        let mut by_key: BTreeMap<&Row, Vec<&Change>> = BTreeMap::new();
        for change in capture {
            by_key.entry(&change.key).or_default().push(change);
        }
        for (key, changes) in by_key {
            let changes: Vec<&Change> =
                changes.into_iter().filter(|change| makes_version(schema, derivation, change)).collect();
            let Some(first) = changes.first() else { continue };
            let is_tombstone_ended = derivation.deletes == Deletes::Tombstone && kind == OutputKind::Versions;
            if first.before.is_some() || is_tombstone_ended {
                closes.push(key.iter().cloned().chain([Value::Time(first.boundary)]).collect::<Row>());
            }
            for (index, change) in changes.iter().enumerate() {
                let (row, operation) = match (&change.after, &change.before) {
                    (Some(after), _) => (after, change.operation),
                    (None, Some(before)) if derivation.deletes == Deletes::Tombstone => (before, history::DELETE),
                    (None, _) => continue,
                };
                let end = changes.get(index + 1).map(|next| next.boundary);
                opened.push(version(schema, derivation, change, (row, operation), end));
            }
        }
    }
    let mut close_fields = history_key_fields(schema, derivation);
    close_fields.push(history::fields()[1].clone());
    let mut output = parts(&close_fields.into(), &closes, OutputRows::Close);
    output.extend(parts(&history_fields(schema, derivation), &opened, OutputRows::Version));
    output
}

fn makes_version(schema: &TableSchema, derivation: &HistoryProjection, change: &Change) -> bool {
    let tracked = tracked(schema, derivation);
    let values = |state: &StateRow| pick(&state.row, &tracked);
    match (&change.before, &change.after) {
        (Some(before), Some(after)) => derivation.tracked == Tracked::All || values(before) != values(after),
        _ => true,
    }
}

fn version(
    schema: &TableSchema,
    derivation: &HistoryProjection,
    change: &Change,
    (row, operation): (&StateRow, &'static str),
    end: Option<Micros>,
) -> Row {
    let mut values = change.key.to_vec();
    values.extend(pick(&row.row, &tracked(schema, derivation)).iter().cloned());
    values.extend([
        Value::Time(change.boundary),
        end.map_or(Value::Null, Value::Time),
        Value::Boolean(end.is_none()),
        operation.into(),
        Value::Time(change.commit_time),
        Value::Binary(change.lsn.as_slice().to_vec()),
    ]);
    values.into()
}

/// Tables as they stand, or as they were at `since`.
fn query_tables(tables: &[&TableState], since: Option<&Positions>) -> QueryTables {
    let mut found = QueryTables::new();
    for table in tables {
        let rows = match since {
            Some(since) => table.rows_at(since.get(&table.capture).unwrap_or(&Position::ZERO)),
            None => table.rows.clone(),
        };
        let empty = || QueryTable { schema: table.schema.clone(), rows: Vec::new() };
        found.entry(table.schema.table.clone()).or_insert_with(empty).rows.extend(rows.into_values());
    }
    found
}

/// The next result, and the output that takes a target there: from the result that stands at a checkpoint, or anew.
fn query_output(
    sql: &SqlProjection,
    tables: &[&TableState],
    stands: Option<(&QueryResult, &Positions)>,
) -> Result<(QueryResult, (OutputKind, Vec<OutputRows>))> {
    let query: Query = query(sql)?;
    let published = query.published(sql);
    let columns = query.columns.project(&published)?;
    let key_columns = query.columns.project(&query.indexes(&sql.key)?)?;
    let new = query_tables(tables, None);
    let Some((before, since)) = stands else {
        let next = query.result(sql, &new)?;
        let rows: Vec<Row> = next.values().map(|row| pick(row, &published)).collect();
        let output = parts(&columns.fields, &rows, OutputRows::Upsert);
        return Ok((next, (OutputKind::Replace, output)));
    };
    let old = query_tables(tables, Some(since));
    let mut touched = Vec::new();
    for table in tables {
        for change in table.changes_since(since.get(&table.capture).unwrap_or(&Position::ZERO)) {
            let images = change.before.iter().chain(&change.after);
            touched.extend(images.map(|state| (table.schema.table.clone(), state.row.clone())));
        }
    }
    let next = query.refresh(sql, before, &old, &new, &touched)?;
    let changed =
        |(key, row): &(&Row, &Row)| before.get(*key).map(|row| pick(row, &published)) != Some(pick(row, &published));
    let upserts: Vec<Row> = next.iter().filter(changed).map(|(_, row)| pick(row, &published)).collect();
    let deletes: Vec<Row> = before.keys().filter(|key| !next.contains_key(*key)).cloned().collect();
    let mut output = parts(&columns.fields, &upserts, OutputRows::Upsert);
    output.extend(parts(&key_columns.fields, &deletes, OutputRows::Delete));
    Ok((next, (OutputKind::Merge, output)))
}

#[async_trait]
impl OutputReader for MemoryOutput {
    fn kind(&self) -> OutputKind {
        self.kind
    }

    fn rows_hint(&self) -> Option<u64> {
        Some(self.rows)
    }

    async fn next(&mut self) -> Result<Option<OutputRows>> {
        self.faults.step("transform.output").await?;
        Ok(self.parts.pop_front())
    }
}

#[async_trait]
impl Transform for MemoryTransform {
    async fn open(&self, store_id: &str, tables: &[StateTable], projections: &[Projection]) -> Result<()> {
        self.faults.step("transform.open").await?;
        self.cache.cache().open(store_id, tables, projections);
        Ok(())
    }

    async fn describe(&self, projection: &str) -> Result<SchemaRef> {
        self.cache.cache().describe(projection)
    }

    async fn applied(&self) -> Result<BTreeMap<CaptureId, Applied>> {
        self.faults.step("transform.applied").await?;
        let cache = self.cache.cache();
        Ok(cache.tables.values().filter_map(|table| Some((table.capture.clone(), table.applied?))).collect())
    }

    async fn advance(&self, captures: &[CaptureAdvance], log: &mut dyn LogReader) -> Result<Advanced> {
        self.faults.step("transform.advance").await?;
        let mut batches: BTreeMap<CaptureId, Vec<ChangeBatch>> = BTreeMap::new();
        while let Some(batch) = log.next().await? {
            batches.entry(batch.capture.clone()).or_default().push(batch);
            self.faults.step("transform.advance.batch").await?;
        }
        self.faults.step("transform.advance.commit").await?;
        let rows = self.cache.cache().advance(captures, &batches)?;
        self.faults.step("transform.advanced").await?;
        Ok(Advanced { rows })
    }

    async fn compute(&self, projection: &str, since: Option<&Positions>) -> Result<Computed> {
        self.faults.step("transform.compute").await?;
        let computed = self.cache.cache().compute(projection, since, &self.faults)?;
        self.faults.step("transform.computed").await?;
        Ok(computed)
    }

    async fn settle(&self, projection: &str, checkpoint: Option<&Positions>) -> Result<()> {
        self.faults.step("transform.settle").await?;
        self.cache.cache().settle(projection, checkpoint)?;
        self.faults.step("transform.settled").await
    }

    async fn forget(&self, checkpoints: &[Positions]) -> Result<()> {
        self.faults.step("transform.forget").await?;
        self.cache.cache().forget(checkpoints);
        Ok(())
    }

    async fn changes_kept(&self) -> Result<u64> {
        Ok(self.cache.changes_kept())
    }

    async fn discard(&self) -> Result<()> {
        self.faults.step("transform.discard").await?;
        let mut cache = self.cache.cache();
        for table in cache.tables.values_mut() {
            *table = TableState::new(table.capture.clone(), table.schema.clone());
        }
        for kept in cache.projections.values_mut() {
            *kept = fresh(&kept.projection);
        }
        Ok(())
    }
}
