//! A table of state, and how its parts are spelled in SQL.
//!
//! A commit's lsn is kept as two numbers (its first and last eight bytes, zero padded) and a length: they sort as its
//! bytes do, and cost a tenth of a byte string in space and scanning.

use std::sync::Arc;

use arrow::datatypes::{FieldRef, Schema};
use shori_core::position::{CaptureId, Lsn};
use shori_core::schema::{SchemaChange, TableSchema};
use shori_core::{Error, ErrorKind, Result};

use super::session::CACHE;
use crate::database::quote_name;
use crate::types::duckdb_type;

/// Captures are numbered in the cache, from 1.
pub(super) type CaptureNumber = u16;

pub(super) const LSN_PARTS: [&str; 3] = ["__lsn_a", "__lsn_b", "__lsn_length"];

/// Columns that fit into one word of an unchanged mask.
pub(super) const MASK_BITS: usize = 64;

/// One logical table; several captures may feed it, each with keys of its own.
#[derive(Clone, Debug)]
pub(super) struct Table {
    pub name: Arc<str>,
    /// As they stand in the cache: later columns follow.
    pub columns: Vec<FieldRef>,
    pub key: Vec<usize>,
    pub captures: Vec<(CaptureNumber, CaptureId)>,
    /// A history reads it: every committed version is kept.
    pub has_history: bool,
}

impl Table {
    pub fn new(schema: &TableSchema) -> Self {
        Self {
            name: schema.table.clone(),
            columns: schema.columns.fields().iter().cloned().collect(),
            key: schema.key.clone(),
            captures: Vec::new(),
            has_history: false,
        }
    }

    /// Columns that `schema` has besides. Fails when it does not fit what stands.
    pub fn added_by(&self, schema: &TableSchema) -> Result<Vec<FieldRef>> {
        match self.schema().change_to(schema) {
            SchemaChange::Same => Ok(Vec::new()),
            SchemaChange::Evolved { added, .. } => Ok(added),
            SchemaChange::Incompatible { reason } => {
                Err(Error::new(ErrorKind::Schema, "keep", format!("state of table {}", self.name), reason))
            }
        }
    }

    pub fn schema(&self) -> TableSchema {
        TableSchema {
            table: self.name.clone(),
            columns: Arc::new(Schema::new(self.columns.clone())),
            key: self.key.clone(),
        }
    }

    pub fn index_of(&self, column: &str) -> Option<usize> {
        self.columns.iter().position(|field| field.name() == column)
    }

    pub fn mask_words(&self) -> usize {
        self.columns.len().div_ceil(MASK_BITS)
    }

    fn stored(&self, kind: &str) -> String {
        format!("{CACHE}.main.{}", quote_name(&format!("{kind}_{}", self.name)))
    }

    pub fn state(&self) -> String {
        format!("{CACHE}.main.{}", quote_name(&self.state_name()))
    }

    /// As catalogs know it.
    pub fn state_name(&self) -> String {
        format!("state_{}", self.name)
    }

    /// What steps changed, before and after: for outputs that need only the difference.
    pub fn net(&self) -> String {
        self.stored("net")
    }

    /// What steps changed, commit by commit: for histories.
    pub fn delta(&self) -> String {
        self.stored("delta")
    }

    pub fn tomb(&self) -> String {
        self.stored("tomb")
    }

    /// Keys that the running snapshot has seen as they stand.
    pub fn seen(&self) -> String {
        self.stored("seen")
    }

    /// Change images of the step being applied, in position order.
    pub fn staged(&self) -> String {
        format!("temp.main.{}", quote_name(&format!("staged_{}", self.name)))
    }

    pub fn name_of(&self, index: usize) -> String {
        quote_name(self.columns[index].name())
    }

    /// `a."x", a."y"`; without alias just the names.
    pub fn list(&self, alias: &str) -> String {
        comma((0..self.columns.len()).map(|index| qualified(alias, &self.name_of(index))))
    }

    pub fn keys(&self, alias: &str) -> String {
        comma(self.key.iter().map(|&index| qualified(alias, &self.name_of(index))))
    }

    pub fn key_match(&self, left: &str, right: &str) -> String {
        let equal = |&index: &usize| {
            let name = self.name_of(index);
            format!("{left}.{name} = {right}.{name}")
        };
        self.key.iter().map(equal).collect::<Vec<_>>().join(" and ")
    }

    /// Whether two rows hold the same values.
    pub fn same_row(&self, left: &str, right: &str) -> String {
        let same = |index: usize| {
            let name = self.name_of(index);
            format!("{left}.{name} is not distinct from {right}.{name}")
        };
        (0..self.columns.len()).map(same).collect::<Vec<_>>().join(" and ")
    }

    pub fn definitions(&self) -> Result<String> {
        Ok(self.definitions_of(0..self.columns.len())?.join(", "))
    }

    pub fn key_definitions(&self) -> Result<String> {
        Ok(self.definitions_of(self.key.iter().copied())?.join(", "))
    }

    fn definitions_of(&self, indexes: impl Iterator<Item = usize>) -> Result<Vec<String>> {
        indexes.map(|index| definition(&self.columns[index])).collect()
    }
}

pub(super) fn definition(field: &FieldRef) -> Result<String> {
    Ok(format!("{} {}", quote_name(field.name()), duckdb_type(field.data_type())?))
}

pub(super) fn comma(parts: impl IntoIterator<Item = String>) -> String {
    parts.into_iter().collect::<Vec<_>>().join(", ")
}

pub(super) fn qualified(alias: &str, name: &str) -> String {
    if alias.is_empty() { name.to_string() } else { format!("{alias}.{name}") }
}

/// `a.__lsn_a, a.__lsn_b, a.__lsn_length`.
pub(super) fn lsn_parts(alias: &str) -> String {
    comma(LSN_PARTS.iter().map(|part| qualified(alias, part)))
}

/// The lsn's bytes again.
pub(super) fn lsn_bytes(alias: &str) -> String {
    let [a, b, length] = LSN_PARTS.map(|part| qualified(alias, part));
    format!("unhex(left(lpad(to_hex({a}), 16, '0') || lpad(to_hex({b}), 16, '0'), 2 * {length}))")
}

/// What an lsn is kept as.
pub(super) fn split_lsn(bytes: &[u8]) -> (u64, u64, u8) {
    let mut padded = [0; 16];
    let length = bytes.len().min(padded.len());
    padded[..length].copy_from_slice(&bytes[..length]);
    let mut halves = padded.chunks_exact(8).map(|half| half.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte)));
    (halves.next().unwrap_or(0), halves.next().unwrap_or(0), length as u8)
}

pub(super) fn lsn_literals(lsn: &Lsn) -> String {
    let (a, b, length) = split_lsn(lsn.as_slice());
    format!("{a}::ubigint, {b}::ubigint, {length}::utinyint")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_lsns_sort_as_their_bytes() {
        let lsns: [&[u8]; 7] = [&[], &[0], &[0, 0], &[0, 0, 0, 0, 0, 0, 0, 0, 1], &[0, 1], &[1], &[1, 0]];
        for pair in lsns.windows(2) {
            assert!(pair[0] < pair[1] && split_lsn(pair[0]) < split_lsn(pair[1]), "{pair:?}");
        }
        assert_eq!(split_lsn(&[0, 0, 0, 0, 0, 0, 1, 2, 3]), (258, 3 << 56, 9));
    }
}
