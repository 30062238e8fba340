//! What was generated, by table and operation.

use std::fmt;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Operation {
    Insert = 0,
    Update = 1,
    Delete = 2,
    KeyUpdate = 3,
}

pub(super) const OPERATIONS: [(Operation, &str); 4] = [
    (Operation::Insert, "insert"),
    (Operation::Update, "update"),
    (Operation::Delete, "delete"),
    (Operation::KeyUpdate, "key_update"),
];

/// Row changes of one table. A key update counts once, here and not as an update.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct OperationCounts {
    pub inserts: u64,
    pub updates: u64,
    pub deletes: u64,
    pub key_updates: u64,
}

impl OperationCounts {
    pub fn total(&self) -> u64 {
        self.inserts + self.updates + self.deletes + self.key_updates
    }

    pub(super) fn count(&mut self, operation: Operation) {
        *match operation {
            Operation::Insert => &mut self.inserts,
            Operation::Update => &mut self.updates,
            Operation::Delete => &mut self.deletes,
            Operation::KeyUpdate => &mut self.key_updates,
        } += 1;
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.inserts += other.inserts;
        self.updates += other.updates;
        self.deletes += other.deletes;
        self.key_updates += other.key_updates;
    }
}

/// Row changes of every table that the application has.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TableCounts(pub Vec<(&'static str, OperationCounts)>);

impl TableCounts {
    /// Of one table; none where the application has no table of that name.
    pub fn of(&self, table: &str) -> OperationCounts {
        self.0.iter().find(|(name, _)| *name == table).map(|(_, counts)| *counts).unwrap_or_default()
    }

    pub fn total(&self) -> u64 {
        self.0.iter().map(|(_, counts)| counts.total()).sum()
    }
}

impl Serialize for TableCounts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, counts) in &self.0 {
            map.serialize_entry(name, counts)?;
        }
        map.end()
    }
}

impl fmt::Display for TableCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, counts) in &self.0 {
            writeln!(
                f,
                "{name:<10} {:>12} inserts {:>12} updates {:>10} deletes {:>8} key updates",
                counts.inserts, counts.updates, counts.deletes, counts.key_updates
            )?;
        }
        Ok(())
    }
}
