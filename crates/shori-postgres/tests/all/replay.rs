//! A table as a log leaves it.

use std::collections::BTreeMap;

use shori_core::change::Op;
use shori_core::position::Position;
use shori_core::source::SnapshotProgress;
use shori_core::testing::memory_log::LogRow;
use shori_core::testing::value::{Row, Value, pick};

/// Stands in a row for what no image brought.
const LACKING: &str = "(no image brought this)";

/// Goes from boundary to boundary.
pub struct Replay<'a> {
    log: &'a [LogRow],
    snapshots: &'a [SnapshotProgress],
    /// Each with the position that last touched it.
    pub rows: BTreeMap<Row, (Position, LogRow)>,
}

impl<'a> Replay<'a> {
    pub fn new(log: &'a [LogRow], snapshots: &'a [SnapshotProgress]) -> Self {
        Self { log, snapshots, rows: BTreeMap::new() }
    }

    pub fn advance(&mut self, boundary: &Position) {
        loop {
            let ended = self.snapshots.first().map(|snapshot| snapshot.end).filter(|end| end <= boundary);
            let up_to = ended.unwrap_or(*boundary);
            let (due, rest) = self.log.split_at(self.log.partition_point(|row| row.position <= up_to));
            self.log = rest;
            due.iter().for_each(|row| self.apply(row));
            let Some((snapshot, others)) = self.snapshots.split_first().filter(|_| ended.is_some()) else { return };
            self.rows.retain(|_, (touched, _)| *touched > snapshot.start);
            self.snapshots = others;
        }
    }

    fn apply(&mut self, row: &LogRow) {
        if row.op == Op::Truncate {
            self.rows.clear();
            return;
        }
        let key = pick(&row.row, &row.schema.key);
        assert!(key.iter().all(|value| !value.is_null()), "{row:?} has no key");
        if !row.op.leaves_row() {
            self.rows.remove(&key);
            return;
        }
        let mut whole = row.clone();
        if !row.unchanged.is_empty() {
            let before = self.rows.get(&key).map(|(_, before)| before.in_schema(&row.schema));
            let value = |index: usize| match (row.unchanged.contains(&index), &before) {
                (false, _) => row.row[index].clone(),
                (true, Some(before)) => before.row[index].clone(),
                (true, None) => Value::from(LACKING),
            };
            whole.row = (0..row.row.len()).map(value).collect();
            whole.unchanged.clear();
        }
        self.rows.insert(key, (row.position, whole));
    }
}
