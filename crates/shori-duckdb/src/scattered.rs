//! Deletions that lie anywhere in large tables, and when they make a checkpoint due.
//!
//! Until a checkpoint, DuckDB keeps 16 KiB for each vector of rows that lost one, which it can neither spill nor evict:
//! without a bound, they come to fill the memory of the instance.

use std::collections::{BTreeMap, BTreeSet};

use duckdb::Connection;

/// Rows of one of DuckDB's vectors.
pub(crate) const VECTOR_ROWS: u64 = 2_048;

/// Memory that a vector takes once it has lost a row.
const VECTOR_KIB: u64 = 16;

/// Whether a checkpoint is due.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Due {
    No,
    WhenFree,
    Overdue,
}

/// Vectors that lost rows since the last checkpoint, by catalog and table.
pub(crate) struct Scattered {
    tables: BTreeMap<(String, String), u64>,
    /// The same since the last one that had the file for itself: only that one sweeps up.
    unswept: BTreeMap<(String, String), u64>,
    /// From here on the next checkpoint has to sweep up.
    worn: u64,
    /// From here on a checkpoint is made beside those who write: a quarter of the memory.
    due: u64,
    /// From here on those who write are waited for.
    overdue: u64,
}

impl Scattered {
    pub fn new(memory_limit_mib: u64) -> Self {
        let vectors = memory_limit_mib * 1024 / VECTOR_KIB;
        Self {
            tables: BTreeMap::new(),
            unswept: BTreeMap::new(),
            worn: vectors * 3 / 4,
            due: vectors / 4,
            overdue: vectors / 2,
        }
    }

    pub fn add(&mut self, catalog: &str, table: &str, vectors: u64) {
        if vectors > 0 {
            for known in [&mut self.tables, &mut self.unswept] {
                *known.entry((catalog.to_string(), table.to_string())).or_default() += vectors;
            }
        }
    }

    pub fn clear(&mut self, catalog: &str) {
        self.tables.retain(|(known, _), _| known != catalog);
    }

    /// A checkpoint has swept up.
    pub fn swept(&mut self, catalog: &str) {
        self.clear(catalog);
        self.unswept.retain(|(known, _), _| known != catalog);
    }

    /// Whether a checkpoint of `catalog` has to sweep up: vectors that lost rows fill most of the memory.
    pub fn is_worn(&mut self, catalog: &str, vectors_of: impl Fn(&str) -> u64) -> bool {
        if self.unswept.values().sum::<u64>() <= self.worn {
            return false;
        }
        for ((_, table), vectors) in self.unswept.iter_mut().filter(|((known, _), _)| known == catalog) {
            *vectors = (*vectors).min(vectors_of(table));
        }
        self.unswept.values().sum::<u64>() > self.worn && self.unswept.keys().any(|(known, _)| known == catalog)
    }

    pub fn catalogs(&self) -> BTreeSet<String> {
        self.unswept.keys().map(|(catalog, _)| catalog.clone()).collect()
    }

    /// Whether `catalog` is the one to be checkpointed. A vector may have been counted many times: no table counts for more
    /// than it has, which `vectors_of` tells.
    pub fn due(&mut self, catalog: &str, vectors_of: impl Fn(&str) -> u64) -> Due {
        if self.tables.values().sum::<u64>() <= self.due {
            return Due::No;
        }
        for ((_, table), vectors) in self.tables.iter_mut().filter(|((known, _), _)| known == catalog) {
            *vectors = (*vectors).min(vectors_of(table));
        }
        let sum: u64 = self.tables.values().sum();
        let own: u64 = self.tables.iter().filter(|((known, _), _)| known == catalog).map(|(_, vectors)| vectors).sum();
        match sum {
            _ if own < sum - own => Due::No,
            sum if sum > self.overdue => Due::Overdue,
            sum if sum > self.due => Due::WhenFree,
            _ => Due::No,
        }
    }
}

/// Rows of a table of schema `main`, deleted ones among them until they are swept up.
pub(crate) fn rows_of(connection: &Connection, catalog: &str, table: &str) -> duckdb::Result<i64> {
    let size = "select estimated_size from duckdb_tables()
                where database_name = ? and schema_name = 'main' and table_name = ?";
    connection.query_row(size, [catalog, table], |row| row.get(0))
}

/// How many vectors a table has; where that cannot be told, any number.
pub(crate) fn vectors_of(connection: &Connection, catalog: &str, table: &str) -> u64 {
    match rows_of(connection, catalog, table) {
        Ok(rows) => rows.max(0) as u64 / VECTOR_ROWS + 1,
        Err(cause) => {
            tracing::debug!(%cause, table, "its size is not known");
            u64::MAX
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Due above 1,024 vectors, overdue above 2,048.
    fn scattered() -> Scattered {
        Scattered::new(64)
    }

    #[test]
    fn a_table_counts_for_no_more_vectors_than_it_has() {
        let mut scattered = scattered();
        (0..10).for_each(|_| scattered.add("serving", "small", 1_024));
        scattered.add("serving", "large", 1_024);
        assert_eq!(scattered.due("serving", |table| if table == "small" { 80 } else { 10_000 }), Due::WhenFree);
        assert_eq!(scattered.due("serving", |_| 80), Due::No);
    }

    #[test]
    fn a_checkpoint_that_waited_long_is_overdue_and_ends_the_count() {
        let mut scattered = scattered();
        for (vectors, due) in [(1_024, Due::No), (1, Due::WhenFree), (1_023, Due::WhenFree), (1, Due::Overdue)] {
            scattered.add("serving", "large", vectors);
            assert_eq!(scattered.due("serving", |_| u64::MAX), due, "{vectors} more");
        }
        assert_eq!(scattered.catalogs().len(), 1);
        scattered.clear("serving");
        assert_eq!(scattered.due("serving", |_| u64::MAX), Due::No);
    }

    #[test]
    fn only_what_sweeps_up_ends_the_wear() {
        let mut scattered = scattered();
        scattered.add("serving", "large", 3_000);
        scattered.clear("serving");
        assert!(!scattered.is_worn("serving", |_| u64::MAX));
        scattered.add("serving", "large", 73);
        scattered.clear("serving");
        assert!(scattered.is_worn("serving", |_| u64::MAX) && !scattered.is_worn("cache", |_| u64::MAX));
        scattered.swept("serving");
        assert!(!scattered.is_worn("serving", |_| u64::MAX));
        scattered.add("serving", "small", 5_000);
        assert!(!scattered.is_worn("serving", |_| 80));
    }

    #[test]
    fn the_catalog_that_holds_most_is_checkpointed() {
        let mut scattered = scattered();
        scattered.add("serving", "large", 900);
        scattered.add("cache", "state", 300);
        assert_eq!(scattered.due("cache", |_| u64::MAX), Due::No);
        assert_eq!(scattered.due("serving", |_| u64::MAX), Due::WhenFree);
        scattered.clear("serving");
        assert_eq!(scattered.due("cache", |_| u64::MAX), Due::No);
    }
}
