//! A model database with one timeline: tables, committed transactions, and a log that can be pruned.
//!
//! It keeps everything that it ever committed, so that a test can ask what was true at any position; sources see only
//! what is not pruned. Commit `n` (from 1) has positions `(n, 0x00 ‖ image index)`, its end is the boundary
//! `(n, 0x00 ff ff ff ff)`; chunk `c` of a snapshot read under commit `n` stands at `(n, 0x01 ‖ c ‖ row)` and ends at
//! `(n, 0x01 ‖ c ‖ ff ff ff ff)`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::value::{Row, Value, pick};
use crate::change::Op;
use crate::position::{CaptureId, Micros, Position, SortKey};
use crate::schema::TableSchema;

/// Rows of one table by key.
pub type Rows = BTreeMap<Row, Row>;
/// Rows of all tables, by name.
pub type State = BTreeMap<Arc<str>, Rows>;

/// One statement of a transaction. Keys are the values of the key columns, in key order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Write {
    Insert {
        table: Arc<str>,
        row: Row,
    },
    /// `row` may have another key: the key's row moves there.
    Update {
        table: Arc<str>,
        key: Row,
        row: Row,
    },
    Delete {
        table: Arc<str>,
        key: Row,
    },
    Truncate {
        table: Arc<str>,
    },
}

/// A row image as committed, always whole (except that a truncation has none).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Image {
    pub table: Arc<str>,
    pub position: Position,
    pub op: Op,
    pub commit_time: Micros,
    pub row: Row,
    /// Columns that an update left as they were: a source may leave these out.
    pub unchanged: Vec<usize>,
}

#[derive(Clone)]
pub struct MemoryDatabase(Arc<Shared>);

struct Shared {
    source: Arc<str>,
    tables: Vec<Arc<TableSchema>>,
    model: Mutex<Model>,
    /// Wakes whoever waits in the order in which they came: the same in every run.
    committed: Notify,
}

struct Model {
    identity: String,
    commits: Vec<Commit>,
    now: State,
    pruned: u64,
    acknowledged: Position,
    broken: BTreeMap<Arc<str>, u64>,
}

struct Commit {
    time: Micros,
    images: Vec<Image>,
}

/// Source time before the first commit.
pub const FIRST_COMMIT_TIME: Micros = 1_700_000_000_000_000;

/// Position of image `index` of commit `commit`.
pub fn image_position(commit: u64, index: u32) -> Position {
    let mut seq = vec![0];
    seq.extend(index.to_be_bytes());
    Position::new(SortKey::from_u64(commit), SortKey::from_slice(&seq).unwrap())
}

/// The boundary after commit `commit`; before the first commit it is zero.
pub fn commit_end(commit: u64) -> Position {
    if commit == 0 { Position::ZERO } else { image_position(commit, u32::MAX) }
}

pub fn chunk_position(commit: u64, chunk: u32, row: u32) -> Position {
    let mut seq = vec![1];
    seq.extend(chunk.to_be_bytes());
    seq.extend(row.to_be_bytes());
    Position::new(SortKey::from_u64(commit), SortKey::from_slice(&seq).unwrap())
}

/// Whether the position is one of a snapshot, not of the stream.
pub fn is_snapshot_position(position: &Position) -> bool {
    position.seq.as_slice().first() == Some(&1)
}

pub fn commit_of(position: &Position) -> u64 {
    position.lsn.to_u64().unwrap()
}

impl MemoryDatabase {
    /// `source` names the source of all captures, and the timeline.
    pub fn new(source: &str, tables: Vec<TableSchema>) -> Self {
        let tables: Vec<_> = tables.into_iter().map(Arc::new).collect();
        let now = tables.iter().map(|schema| (schema.table.clone(), Rows::new())).collect();
        let model = Model {
            identity: format!("memory:{source}"),
            commits: Vec::new(),
            now,
            pruned: 0,
            acknowledged: Position::ZERO,
            broken: BTreeMap::new(),
        };
        Self(Arc::new(Shared { source: source.into(), tables, model: Mutex::new(model), committed: Notify::new() }))
    }

    pub fn source(&self) -> Arc<str> {
        self.0.source.clone()
    }

    pub fn tables(&self) -> &[Arc<TableSchema>] {
        &self.0.tables
    }

    pub fn schema(&self, table: &str) -> Arc<TableSchema> {
        self.0.tables.iter().find(|schema| &*schema.table == table).expect("a table of the model").clone()
    }

    pub fn capture(&self, table: &str) -> CaptureId {
        CaptureId::new(&self.0.source, table)
    }

    /// Runs the writes as one transaction; a write whose key is not as it needs is left out. Returns the commit.
    pub fn commit(&self, time: Micros, writes: &[Write]) -> u64 {
        let mut model = self.model();
        let commit = model.commits.len() as u64 + 1;
        let mut images = Vec::new();
        for write in writes {
            for (table, op, row, unchanged) in self.run(&mut model.now, write) {
                let position = image_position(commit, images.len() as u32);
                images.push(Image { table, position, op, commit_time: time, row, unchanged });
            }
        }
        model.commits.push(Commit { time, images });
        drop(model);
        self.0.committed.notify_waiters();
        commit
    }

    fn run(&self, now: &mut State, write: &Write) -> Vec<(Arc<str>, Op, Row, Vec<usize>)> {
        let (Write::Insert { table, .. }
        | Write::Update { table, .. }
        | Write::Delete { table, .. }
        | Write::Truncate { table }) = write;
        let schema = self.schema(table);
        let rows = now.get_mut(table).expect("a table of the model");
        let image = |op, row: &Row| (table.clone(), op, row.clone(), Vec::new());
        match write {
            Write::Insert { row, .. } => {
                let key = pick(row, &schema.key);
                if rows.contains_key(&key) {
                    return Vec::new();
                }
                rows.insert(key, row.clone());
                vec![image(Op::Insert, row)]
            }
            Write::Update { key, row, .. } => {
                let new_key = pick(row, &schema.key);
                if !rows.contains_key(key) || (new_key != *key && rows.contains_key(&new_key)) {
                    return Vec::new();
                }
                let before = rows.remove(key).unwrap();
                rows.insert(new_key.clone(), row.clone());
                if new_key != *key {
                    return vec![image(Op::UpdateBefore, &before), image(Op::UpdateAfter, row)];
                }
                let same = |&column: &usize| !schema.key.contains(&column) && before[column] == row[column];
                let unchanged = (0..row.len()).filter(same).collect();
                vec![(table.clone(), Op::UpdateAfter, row.clone(), unchanged)]
            }
            Write::Delete { key, .. } => match rows.remove(key) {
                Some(before) => vec![image(Op::Delete, &before)],
                None => Vec::new(),
            },
            Write::Truncate { .. } => {
                rows.clear();
                vec![image(Op::Truncate, &vec![Value::Null; schema.columns.fields().len()].into())]
            }
        }
    }

    /// The newest commit.
    pub fn head(&self) -> u64 {
        self.model().commits.len() as u64
    }

    pub fn commit_time(&self, commit: u64) -> Micros {
        match commit.checked_sub(1) {
            Some(index) => self.model().commits[index as usize].time,
            None => FIRST_COMMIT_TIME,
        }
    }

    /// Images of commit `commit`, from `first` on.
    pub fn images(&self, commit: u64, first: u32) -> Vec<Image> {
        let model = self.model();
        let images = &model.commits[commit as usize - 1].images;
        images[(first as usize).min(images.len())..].to_vec()
    }

    /// All images of a table with `after < position <= up_to`, pruned or not.
    pub fn history_at(&self, table: &str, after: &Position, up_to: &Position) -> Vec<Image> {
        let model = self.model();
        let images = model.commits.iter().flat_map(|commit| &commit.images);
        let wanted = |image: &&Image| &*image.table == table && image.position > *after && image.position <= *up_to;
        images.filter(wanted).cloned().collect()
    }

    /// The rows of all tables as they are now.
    pub fn state(&self) -> State {
        self.model().now.clone()
    }

    /// The rows of all tables as changes at or below `position` left them.
    pub fn state_at(&self, position: &Position) -> State {
        let model = self.model();
        if commit_end(model.commits.len() as u64) <= *position {
            return model.now.clone();
        }
        let mut state: State = self.0.tables.iter().map(|schema| (schema.table.clone(), Rows::new())).collect();
        let images = model.commits.iter().flat_map(|commit| &commit.images);
        for image in images.take_while(|image| image.position <= *position) {
            let key = &self.schema(&image.table).key;
            let rows = state.get_mut(&image.table).unwrap();
            match image.op {
                Op::Truncate => rows.clear(),
                op if op.leaves_row() => drop(rows.insert(pick(&image.row, key), image.row.clone())),
                _ => drop(rows.remove(&pick(&image.row, key))),
            }
        }
        state
    }

    /// Lets go of all commits up to `commit`, read or not.
    pub fn prune(&self, commit: u64) {
        let mut model = self.model();
        model.pruned = commit.min(model.commits.len() as u64).max(model.pruned);
    }

    /// Commits up to here can no longer be read.
    pub fn pruned(&self) -> u64 {
        self.model().pruned
    }

    /// What the pipeline has said is durable (contract 5).
    pub fn acknowledged(&self) -> Position {
        self.model().acknowledged
    }

    pub fn acknowledge(&self, durable: Position) {
        let mut model = self.model();
        model.acknowledged = model.acknowledged.max(durable);
    }

    pub fn identity(&self) -> String {
        self.model().identity.clone()
    }

    /// Makes it look like another database under the same name.
    pub fn set_identity(&self, identity: &str) {
        self.model().identity = identity.into();
    }

    /// From the next commit on, the table cannot be captured (contract 11).
    pub fn break_capture(&self, table: &str) {
        let mut model = self.model();
        let head = model.commits.len() as u64;
        model.broken.entry(table.into()).or_insert(head);
    }

    pub fn mend_capture(&self, table: &str) {
        self.model().broken.remove(table);
    }

    /// Whether reading commits after `commit` fails for the table.
    pub fn is_broken(&self, table: &str, commit: u64) -> bool {
        self.model().broken.get(table).is_some_and(|last| commit >= *last)
    }

    /// Returns when there is a commit after `seen`.
    pub async fn commit_after(&self, seen: u64) {
        loop {
            let mut committed = std::pin::pin!(self.0.committed.notified());
            committed.as_mut().enable();
            if self.head() > seen {
                return;
            }
            committed.await;
        }
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        self.0.model.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
