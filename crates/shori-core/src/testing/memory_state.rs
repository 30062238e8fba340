//! Current rows of one capture and what changed in them.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::memory_log::{LogRow, log_rows};
use super::value::{Row, Value};
use crate::change::{ChangeBatch, Op};
use crate::error::{Error, ErrorKind, Result};
use crate::position::{CaptureId, Lsn, Micros, Position};
use crate::schema::TableSchema;
use crate::transform::{Applied, CaptureAdvance};

/// A row as it stands, and the commit that left it so.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StateRow {
    pub row: Row,
    pub lsn: Lsn,
    /// The snapshot generation that last saw it.
    generation: u32,
}

/// What one commit did to one key.
#[derive(Clone, Debug)]
pub struct Change {
    pub position: Position,
    pub lsn: Lsn,
    pub commit_time: Micros,
    pub key: Row,
    pub before: Option<StateRow>,
    pub after: Option<StateRow>,
    /// End of the version before and start of the version after.
    pub boundary: Micros,
    /// What opens the version after, as `cdc_operation` says it.
    pub operation: &'static str,
}

#[derive(Clone, Debug)]
pub struct TableState {
    pub capture: CaptureId,
    pub schema: Arc<TableSchema>,
    pub rows: BTreeMap<Row, StateRow>,
    pub applied: Option<Applied>,
    /// In position order; everything above `kept_from`.
    pub changes: Vec<Arc<Change>>,
    pub kept_from: Position,
    /// Each key's last boundary, deleted keys included.
    boundaries: BTreeMap<Row, Micros>,
}

/// One commit while it is applied.
#[derive(Default)]
struct Commit {
    lsn: Option<Lsn>,
    keys: BTreeMap<Row, Touched>,
}

struct Touched {
    before: Option<StateRow>,
    position: Position,
    commit_time: Micros,
    op: Op,
}

impl StateRow {
    pub fn new(row: Row, lsn: Lsn) -> Self {
        Self { row, lsn, generation: 0 }
    }
}

impl TableState {
    pub fn new(capture: CaptureId, schema: Arc<TableSchema>) -> Self {
        Self {
            capture,
            schema,
            rows: BTreeMap::new(),
            applied: None,
            changes: Vec::new(),
            kept_from: Position::ZERO,
            boundaries: BTreeMap::new(),
        }
    }

    pub fn position(&self) -> Position {
        self.applied.map_or(Position::ZERO, |applied| applied.position)
    }

    /// Applies one step; on an error the state is to be thrown away. Returns the images read.
    pub fn advance(&mut self, advance: &CaptureAdvance, batches: &[ChangeBatch]) -> Result<u64> {
        let mut commit = Commit::default();
        let mut last = self.position();
        let mut count = 0;
        for batch in batches {
            for image in log_rows(batch, 0)? {
                if image.position <= last || image.position > advance.to.position {
                    return Err(self.misplaced(&image.position));
                }
                last = image.position;
                count += 1;
                if commit.lsn != Some(image.position.lsn) {
                    self.finish(std::mem::take(&mut commit));
                    commit.lsn = Some(image.position.lsn);
                }
                self.apply(&mut commit, &image.in_schema(&self.schema), advance.generation);
            }
        }
        self.finish(commit);
        if let Some(time) = advance.sweep {
            self.sweep(advance, time);
        }
        self.applied = Some(advance.to);
        Ok(count)
    }

    fn misplaced(&self, position: &Position) -> Error {
        let cause = format!("a change at {position} is out of place");
        Error::new(ErrorKind::Internal, "apply", format!("the log of {}", self.capture), cause)
    }

    fn apply(&mut self, commit: &mut Commit, image: &LogRow, generation: u32) {
        if image.op == Op::Truncate {
            for (key, before) in std::mem::take(&mut self.rows) {
                commit.touch(key, Some(before), image);
            }
            return;
        }
        let key = image.key();
        let before = self.rows.remove(&key);
        if !image.op.leaves_row() {
            return commit.touch(key, before, image);
        }
        let value = |index: usize| match &before {
            Some(before) if image.unchanged.contains(&index) => before.row[index].clone(),
            _ => image.row[index].clone(),
        };
        let row: Row = (0..image.row.len()).map(value).collect::<Vec<Value>>().into();
        if let Some(before) = before.as_ref().filter(|before| image.op == Op::Snapshot && before.row == row) {
            self.rows.insert(key, StateRow { generation, ..before.clone() });
            return;
        }
        self.rows.insert(key.clone(), StateRow { row, lsn: image.position.lsn, generation });
        commit.touch(key, before, image);
    }

    fn finish(&mut self, commit: Commit) {
        let mut changes = Vec::new();
        for (key, touched) in commit.keys {
            let after = self.rows.get(&key).cloned();
            if touched.before.is_none() && after.is_none() {
                continue;
            }
            let operation = match (touched.op, &touched.before) {
                (Op::Snapshot, _) => "SNAPSHOT",
                (_, Some(_)) => "UPDATE",
                (_, None) => "INSERT",
            };
            let boundary = self.next_boundary(&key, touched.commit_time);
            changes.push(Arc::new(Change {
                position: touched.position,
                lsn: touched.position.lsn,
                commit_time: touched.commit_time,
                key,
                before: touched.before,
                after,
                boundary,
                operation,
            }));
        }
        // A boundary may stand within one LSN, between a commit and the chunks read under it.
        changes.sort_by_key(|change| change.position);
        self.changes.extend(changes);
    }

    fn next_boundary(&mut self, key: &Row, commit_time: Micros) -> Micros {
        let last = self.boundaries.get(key).copied();
        let boundary = last.map_or(commit_time, |last| commit_time.max(last + 1));
        self.boundaries.insert(key.clone(), boundary);
        boundary
    }

    /// Rows that the ended snapshot did not see, and nothing touched meanwhile, are gone.
    fn sweep(&mut self, advance: &CaptureAdvance, time: Micros) {
        let gone = self.rows.iter().filter(|(_, row)| row.generation < advance.generation);
        let gone: Vec<Row> = gone.map(|(key, _)| key.clone()).collect();
        for key in gone {
            let before = self.rows.remove(&key);
            let boundary = self.next_boundary(&key, time);
            self.changes.push(Arc::new(Change {
                position: advance.to.position,
                lsn: advance.to.position.lsn,
                commit_time: time,
                key,
                before,
                after: None,
                boundary,
                operation: "DELETE",
            }));
        }
    }

    /// Changes after `since`.
    pub fn changes_since(&self, since: &Position) -> &[Arc<Change>] {
        &self.changes[self.changes.partition_point(|change| change.position <= *since)..]
    }

    /// Rows as they were at `since`, which must not be below `kept_from`.
    pub fn rows_at(&self, since: &Position) -> BTreeMap<Row, StateRow> {
        let mut rows = self.rows.clone();
        for change in self.changes_since(since).iter().rev() {
            match &change.before {
                Some(before) => drop(rows.insert(change.key.clone(), before.clone())),
                None => drop(rows.remove(&change.key)),
            }
        }
        rows
    }

    pub fn forget(&mut self, consumed: &Position) {
        let consumed = *consumed.min(&self.position());
        if consumed > self.kept_from {
            self.changes.retain(|change| change.position > consumed);
            self.kept_from = consumed;
        }
    }
}

impl Commit {
    fn touch(&mut self, key: Row, before: Option<StateRow>, image: &LogRow) {
        let fresh = Touched { before, position: image.position, commit_time: image.commit_time, op: image.op };
        let touched = self.keys.entry(key).or_insert(fresh);
        (touched.position, touched.commit_time, touched.op) = (image.position, image.commit_time, image.op);
    }
}
