//! Compares what a pipeline left in a [`MemoryStorage`] with what the [`MemoryDatabase`] committed.
//!
//! Every expectation is worked out from the beginning, image by image, without anything that the transform uses.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::memory_database::{Image, MemoryDatabase, Rows, commit_end, commit_of, is_snapshot_position};
use super::memory_log::LogRow;
use super::memory_query::{QueryTable, QueryTables, query};
use super::memory_state::StateRow;
use super::memory_store::MemoryStorage;
use super::memory_target::TargetTable;
use super::value::{Row, Value, pick};
use crate::change::Op;
use crate::position::{CaptureId, Lsn, Micros, Position};
use crate::projection::{Deletes, Derivation, HistoryProjection, Projection, Tracked, history};
use crate::schema::TableSchema;
use crate::source::{SnapshotProgress, SnapshotState};

/// `Err` says what differs.
pub type Verdict = Result<(), String>;

/// One thing that the log says about a capture.
struct Step {
    position: Position,
    commit_time: Micros,
    event: Event,
}

enum Event {
    Put {
        key: Row,
        row: Row,
        snapshot: bool,
    },
    Remove {
        key: Row,
    },
    Clear,
    /// End of a snapshot that began above this position.
    Sweep {
        start: Position,
    },
}

/// What the log says that a table held.
#[derive(Default)]
struct Told {
    rows: BTreeMap<Row, (Row, Lsn)>,
    touched: BTreeMap<Row, Position>,
    /// A deletion among them is one whose row is that which stood before it.
    versions: BTreeMap<Row, Vec<Version>>,
    boundaries: BTreeMap<Row, Micros>,
}

#[derive(Clone)]
struct Version {
    row: Row,
    valid_from: Micros,
    valid_to: Option<Micros>,
    operation: &'static str,
    commit_time: Micros,
    lsn: Lsn,
}

/// Log and targets.
pub fn check(database: &MemoryDatabase, storage: &MemoryStorage, projections: &[Projection]) -> Verdict {
    check_log(database, storage)?;
    projections.iter().try_for_each(|projection| check_target(database, storage, projection))
}

/// Panics when something differs; `context` (a seed) goes into the message.
pub fn assert_right(database: &MemoryDatabase, storage: &MemoryStorage, projections: &[Projection], context: &str) {
    if let Err(difference) = check(database, storage, projections) {
        panic!("{context}: {difference}");
    }
}

/// Whether everything that the database holds has reached the targets.
pub fn is_caught_up(database: &MemoryDatabase, storage: &MemoryStorage, projections: &[Projection]) -> bool {
    let head = commit_end(database.head());
    let staged = storage
        .captures()
        .values()
        .all(|state| state.failed.is_some() || (state.watermark.boundary >= head && state.snapshot.is_done()));
    staged
        && projections.iter().all(|projection| {
            let checkpoint = storage.target(&projection.name).and_then(|target| target.checkpoint);
            let captures = projection.tables().into_iter().map(|table| database.capture(&table));
            let captures = storage.captures().into_iter().filter(|(id, _)| captures.clone().any(|read| read == *id));
            let lowest = captures.map(|(_, state)| state.watermark.boundary).min();
            checkpoint.is_some_and(|checkpoint| {
                !checkpoint.positions.is_empty()
                    && checkpoint.positions.values().all(|position| Some(*position) >= lowest)
            })
        })
}

/// Each staged image is one that was committed, once, in order; none is missing from where the newest snapshot began.
pub fn check_log(database: &MemoryDatabase, storage: &MemoryStorage) -> Verdict {
    for (id, state) in storage.captures() {
        let log = storage.log(&id);
        if !log.is_sorted_by(|one, next| one.position < next.position) {
            return Err(format!("the log of {id} is out of order, or has a change twice"));
        }
        let table = &state.schema.table;
        let committed = database.history_at(table, &Position::ZERO, &state.watermark.staged);
        let committed: BTreeMap<Position, Image> = committed.into_iter().map(|image| (image.position, image)).collect();
        for staged in &log {
            check_image(database, &id, staged, &committed, &state.horizon)?;
        }
        let began = state.snapshot.start.max(state.horizon);
        if state.snapshot.state != SnapshotState::Requested && state.failed.is_none() {
            let staged: Vec<Position> = log.iter().map(|row| row.position).collect();
            let missing = committed.keys().find(|at| **at > began && staged.binary_search(at).is_err());
            if let Some(missing) = missing {
                return Err(format!("the log of {id} lacks the change at {missing}"));
            }
        }
    }
    Ok(())
}

fn check_image(
    database: &MemoryDatabase,
    id: &CaptureId,
    staged: &Arc<LogRow>,
    committed: &BTreeMap<Position, Image>,
    horizon: &Position,
) -> Verdict {
    let at = staged.position;
    if is_snapshot_position(&at) {
        let rows = database.state_at(&commit_end(commit_of(&at))).remove(&staged.schema.table).unwrap_or_default();
        let right = staged.op == Op::Snapshot && rows.get(&staged.key()) == Some(&staged.row);
        return right.then_some(()).ok_or_else(|| format!("{id} never held the snapshot row {staged:?}"));
    }
    let Some(image) = committed.get(&at) else {
        return Err(format!("the log of {id} has a change at {at} that was never committed"));
    };
    let same = |column: &usize| staged.unchanged.contains(column) || staged.row[*column] == image.row[*column];
    // Compaction may keep the key's boundary in place of the time, so that its history goes on from there.
    let bounded = at <= *horizon && staged.commit_time > image.commit_time;
    let right = staged.op == image.op
        && (staged.commit_time == image.commit_time || bounded)
        && (0..image.row.len()).all(|column| same(&column));
    right.then_some(()).ok_or_else(|| format!("the log of {id} has {staged:?} where {image:?} was committed"))
}

/// The target's rows are what its checkpoint says; nothing is checked before its first output.
pub fn check_target(database: &MemoryDatabase, storage: &MemoryStorage, projection: &Projection) -> Verdict {
    let Some(target) = storage.target(&projection.name) else { return Ok(()) };
    let Some(checkpoint) = &target.checkpoint else { return Ok(()) };
    let mut tables = QueryTables::new();
    let (mut expected, mut live) = (Vec::new(), Vec::new());
    let mut compacted = Position::ZERO;
    let mut below = false;
    for table in projection.tables() {
        let id = database.capture(&table);
        let position = checkpoint.positions.get(&id).copied().unwrap_or(Position::ZERO);
        let mut told = told_at(database, storage, &id, &position)?;
        let capture = storage.captures().remove(&id);
        compacted = compacted.max(capture.as_ref().map_or(Position::ZERO, |state| state.horizon));
        if let Some(state) = capture.filter(|state| position < state.horizon) {
            // A process that had read on before the log was compacted still knows what stood here; the log does not.
            if !state.snapshot.is_done() || state.snapshot.end > position {
                return Ok(());
            }
            below = true;
            let rows = database.state_at(&position).remove(&table).unwrap_or_default();
            told.rows = rows.into_iter().map(|(key, row)| (key, (row, Lsn::EMPTY))).collect();
        }
        let schema = database.schema(&table);
        match &projection.derivation {
            Derivation::Latest { .. } => expected.extend(told.rows.values().map(|(row, lsn)| with_lsn(row, lsn))),
            Derivation::History(of) => {
                expected.extend(version_rows(&schema, of, &told));
                let columns: Vec<usize> = schema.key.iter().copied().chain(tracked(&schema, of)).collect();
                live.extend(told.rows.values().map(|(row, _)| pick(row, &columns)));
            }
            Derivation::Sql(_) => {}
        }
        let rows = told.rows.values().map(|(row, lsn)| StateRow::new(row.clone(), *lsn)).collect();
        tables.insert(table, QueryTable { schema, rows });
    }
    if let Derivation::Sql(sql) = &projection.derivation {
        let query = query(sql).map_err(|error| error.to_string())?;
        let published = query.published(sql);
        let result = query.result(sql, &tables).map_err(|error| error.to_string())?;
        expected.extend(result.values().map(|row| pick(row, &published)));
    }
    if matches!(projection.derivation, Derivation::History(_)) && compacted > Position::ZERO {
        // What stood before the horizon can no longer be told from the log.
        check_open(projection, &target, live)?;
        return check_chains(projection, &target, &compacted, &expected);
    }
    let mut found = target.rows();
    if below {
        // Whether the stream or a snapshot brought a row last is told by the log alone.
        let names = target.target.columns.fields().iter().map(|field| field.name().as_str());
        let values: Vec<usize> =
            names.enumerate().filter(|(_, name)| !name.ends_with("_lsn")).map(|(index, _)| index).collect();
        found = found.iter().map(|row| pick(row, &values)).collect();
        expected = expected.iter().map(|row| pick(row, &values)).collect();
    }
    compare(projection, found, expected, &format!("{:?}", checkpoint.positions))
}

/// The open versions are the table's rows.
fn check_open(projection: &Projection, target: &TargetTable, live: Vec<Row>) -> Verdict {
    let to = target.target.columns.index_of(history::VALID_TO).unwrap();
    let own = target.target.columns.fields().iter().position(|field| field.name() == history::VALID_FROM);
    let values: Vec<usize> = (0..own.unwrap()).collect();
    let operation = target.target.columns.index_of(history::CDC_OPERATION).unwrap();
    let is_live = |row: &&Row| row[to].is_null() && row[operation] != Value::from(history::DELETE);
    let open = target.rows().iter().filter(is_live).map(|row| pick(row, &values)).collect();
    compare(projection, open, live, "its open versions")
}

/// Versions follow each other without gap over changes, none overlap, and those above the horizon are all there.
fn check_chains(projection: &Projection, target: &TargetTable, horizon: &Position, expected: &[Row]) -> Verdict {
    let index = |name: &str| target.target.columns.index_of(name).unwrap();
    let (from, to) = (index(history::VALID_FROM), index(history::VALID_TO));
    let (current, lsn) = (index(history::IS_CURRENT), index(history::SOURCE_LSN));
    let found = target.rows();
    let keys = target.target.key.len();
    let above = |row: &&Row| row[lsn] > Value::Binary(horizon.lsn.as_slice().to_vec());
    for pair in found.windows(2).filter(|pair| pair[0][..keys] == pair[1][..keys]) {
        // Of versions below the horizon the log no longer tells where they ended, if the source's clock went back.
        let told = above(&&pair[0]);
        if pair[0][to].is_null() || told && pair[0][to] > pair[1][from] {
            return Err(format!("projection {} has overlapping versions {pair:?}", projection.name));
        }
    }
    if let Some(row) = found.iter().find(|row| row[to].is_null() != (row[current] == Value::Boolean(true))) {
        return Err(format!("projection {} has a wrong {}: {row:?}", projection.name, history::IS_CURRENT));
    }
    // Boundaries depend on those before, which may be gone: content, operation and commit are compared.
    let content = |row: &Row| -> Row {
        row.iter().enumerate().filter(|(column, _)| ![from, to].contains(column)).map(|(_, v)| v.clone()).collect()
    };
    let found = found.iter().filter(above).map(content).collect();
    compare(projection, found, expected.iter().filter(above).map(content).collect(), "above the horizon")
}

fn compare(projection: &Projection, mut found: Vec<Row>, mut expected: Vec<Row>, at: &str) -> Verdict {
    found.sort();
    expected.sort();
    if found == expected {
        return Ok(());
    }
    let extra: Vec<_> = found.iter().filter(|row| !expected.contains(row)).collect();
    let missing: Vec<_> = expected.iter().filter(|row| !found.contains(row)).collect();
    Err(format!("projection {} at {at} has {extra:?} and lacks {missing:?}", projection.name))
}

/// What the log of a capture says of its table at `position`; checked against the database where that is possible.
fn told_at(
    database: &MemoryDatabase,
    storage: &MemoryStorage,
    id: &CaptureId,
    position: &Position,
) -> Result<Told, String> {
    let Some(state) = storage.captures().remove(id) else { return Ok(Told::default()) };
    let mut snapshots = state.earlier_snapshots.clone();
    snapshots.push(state.snapshot.clone());
    let told = tell(database, &storage.log(id), &snapshots, position);
    let newest = &state.snapshot;
    if newest.is_done() && newest.end <= *position && state.failed.is_none() && *position >= state.horizon {
        let rows: Rows = told.rows.iter().map(|(key, (row, _))| (key.clone(), row.clone())).collect();
        let committed = database.state_at(position).remove(&state.schema.table).unwrap_or_default();
        if rows != committed {
            return Err(format!("the log of {id} makes {rows:?} at {position}, the table holds {committed:?}"));
        }
    }
    Ok(told)
}

fn tell(database: &MemoryDatabase, log: &[Arc<LogRow>], snapshots: &[SnapshotProgress], position: &Position) -> Told {
    let mut steps: Vec<Step> = log.iter().map(|row| step_of(database, row)).collect();
    let ended = snapshots.iter().filter(|snapshot| snapshot.is_done());
    steps.extend(ended.map(|snapshot| Step {
        position: snapshot.end,
        commit_time: snapshot.end_time,
        event: Event::Sweep { start: snapshot.start },
    }));
    steps.sort_by_key(|step| step.position);
    let reached = steps.partition_point(|step| step.position <= *position);
    let mut told = Told::default();
    for commit in steps[..reached].chunk_by(|one, next| one.commit() == next.commit()) {
        told.apply(commit);
    }
    told
}

/// The image as it was committed, whole.
fn step_of(database: &MemoryDatabase, row: &LogRow) -> Step {
    let mut whole = row.row.clone();
    if !row.unchanged.is_empty() {
        let commit = commit_of(&row.position);
        let images = database.images(commit, 0);
        whole = images.into_iter().find(|image| image.position == row.position).map_or(whole, |image| image.row);
    }
    let key = row.key();
    let event = match row.op {
        Op::Truncate => Event::Clear,
        op if op.leaves_row() => Event::Put { key, row: whole, snapshot: op == Op::Snapshot },
        _ => Event::Remove { key },
    };
    Step { position: row.position, commit_time: row.commit_time, event }
}

impl Step {
    fn commit(&self) -> (Lsn, bool) {
        (self.position.lsn, matches!(self.event, Event::Sweep { .. }))
    }
}

impl Told {
    /// Applies all that one commit did, then compares before and after.
    fn apply(&mut self, commit: &[Step]) {
        let before = self.rows.clone();
        let mut effects: BTreeMap<Row, &Step> = BTreeMap::new();
        for step in commit {
            for key in self.apply_step(step) {
                effects.insert(key, step);
            }
        }
        for (key, step) in effects {
            let had = before.contains_key(&key);
            let has = self.rows.get(&key).cloned();
            if !had && has.is_none() {
                continue;
            }
            let last = self.boundaries.get(&key).map_or(step.commit_time, |last| step.commit_time.max(last + 1));
            self.boundaries.insert(key.clone(), last);
            let versions = self.versions.entry(key.clone()).or_default();
            if let Some(open) = versions.last_mut() {
                open.valid_to = Some(last);
            }
            let operation = match &step.event {
                _ if has.is_none() => history::DELETE,
                Event::Put { snapshot: true, .. } => "SNAPSHOT",
                _ if had => "UPDATE",
                _ => "INSERT",
            };
            let commit_time = step.commit_time;
            let gone = || before.get(&key).map(|(row, _)| (row.clone(), step.position.lsn));
            if let Some((row, lsn)) = has.or_else(gone) {
                versions.push(Version { row, valid_from: last, valid_to: None, operation, commit_time, lsn });
            }
        }
    }

    /// The keys that the step had an effect on.
    fn apply_step(&mut self, step: &Step) -> Vec<Row> {
        let gone: Vec<Row> = match &step.event {
            Event::Put { key, row, snapshot } => {
                self.touched.insert(key.clone(), step.position);
                if *snapshot && self.rows.get(key).is_some_and(|(stands, _)| stands == row) {
                    return Vec::new();
                }
                self.rows.insert(key.clone(), (row.clone(), step.position.lsn));
                return vec![key.clone()];
            }
            Event::Remove { key } => vec![key.clone()],
            Event::Clear => self.rows.keys().cloned().collect(),
            Event::Sweep { start } => self.rows.keys().filter(|key| self.touched[*key] <= *start).cloned().collect(),
        };
        gone.iter().for_each(|key| drop(self.rows.remove(key)));
        gone
    }
}

fn with_lsn(row: &Row, lsn: &Lsn) -> Row {
    row.iter().cloned().chain([Value::Binary(lsn.as_slice().to_vec())]).collect()
}

/// Versions in the columns of a history: key, tracked columns, then what the engine fills.
fn version_rows(schema: &TableSchema, of: &HistoryProjection, told: &Told) -> Vec<Row> {
    let tracked = tracked(schema, of);
    let mut rows = Vec::new();
    for version in told.versions.values().flat_map(|versions| made(of, &tracked, versions)) {
        let mut values = pick(&version.row, &schema.key).to_vec();
        values.extend(pick(&version.row, &tracked).iter().cloned());
        values.extend([
            Value::Time(version.valid_from),
            version.valid_to.map_or(Value::Null, Value::Time),
            Value::Boolean(version.valid_to.is_none()),
            version.operation.into(),
            Value::Time(version.commit_time),
            Value::Binary(version.lsn.as_slice().to_vec()),
        ]);
        rows.push(values.into());
    }
    rows
}

fn tracked(schema: &TableSchema, of: &HistoryProjection) -> Vec<usize> {
    let fields = schema.columns.fields().iter().enumerate();
    let wanted = fields.filter(|(index, field)| !schema.key.contains(index) && of.tracks(field.name()));
    wanted.map(|(index, _)| index).collect()
}

/// What a history makes of all versions of a key.
fn made(of: &HistoryProjection, tracked: &[usize], versions: &[Version]) -> Vec<Version> {
    let mut made: Vec<Version> = Vec::new();
    for version in versions {
        let goes_on = |stands: &Version| {
            of.tracked != Tracked::All
                && [stands, version].iter().all(|version| version.operation != history::DELETE)
                && stands.valid_to == Some(version.valid_from)
                && pick(&stands.row, tracked) == pick(&version.row, tracked)
        };
        match made.last_mut() {
            Some(stands) if goes_on(stands) => stands.valid_to = version.valid_to,
            _ => made.push(version.clone()),
        }
    }
    made.retain(|version| version.operation != history::DELETE || of.deletes == Deletes::Tombstone);
    made
}
