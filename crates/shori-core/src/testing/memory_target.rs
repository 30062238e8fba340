//! A projection's table in memory, and how outputs change it.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Error, ErrorKind, Result};
use crate::position::{Lsn, Micros, Position};
use crate::projection::{Target, TargetShape, history};
use crate::store::{Checkpoint, OutputKind, OutputRows, target_mismatch};

use super::value::{Row, Value, pick, rows_of};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    Init,
    Ok,
    Error,
}

/// Rows, checkpoint and metadata: what one output transaction writes.
#[derive(Clone, Debug)]
pub struct TargetTable {
    pub target: Target,
    pub checkpoint: Option<Checkpoint>,
    pub as_of_lsn: Option<Lsn>,
    pub status: Status,
    pub last_error: Option<String>,
    /// Outputs applied.
    pub outputs: u64,
    /// By key; of a history, versions by `__source_lsn`.
    rows: BTreeMap<Row, BTreeMap<Vec<u8>, Row>>,
}

/// Indexes of the columns of a history that outputs change.
/// What a commit tells beside its rows, as far as versions need it.
#[derive(Clone, Copy)]
pub struct Told {
    pub horizon: Position,
    pub as_of_time: Micros,
}

struct Columns {
    key: Vec<usize>,
    valid_from: usize,
    valid_to: usize,
    is_current: usize,
    source_lsn: usize,
    operation: usize,
}

impl TargetTable {
    pub fn new(target: Target) -> Self {
        Self {
            target,
            checkpoint: None,
            as_of_lsn: None,
            status: Status::Init,
            last_error: None,
            outputs: 0,
            rows: BTreeMap::new(),
        }
    }

    /// Takes the target's shape: added columns are null in rows that stand. Rows of another shape are made anew.
    pub fn reshape(&mut self, target: &Target) -> Result<()> {
        let rows = self.target.shape == TargetShape::Rows && target.shape == TargetShape::Rows;
        let reshaped = self.follow(target);
        if rows && reshaped.is_err() {
            *self = Self::new(target.clone());
            return Ok(());
        }
        reshaped?;
        if rows && self.target.definition != target.definition {
            (self.checkpoint, self.status) = (None, Status::Init);
        }
        self.target = target.clone();
        Ok(())
    }

    fn follow(&mut self, target: &Target) -> Result<()> {
        if self.target.key != target.key || self.target.shape != target.shape {
            return Err(target_mismatch(&target.projection, "its key is another".into()));
        }
        let mut sources = Vec::new();
        for field in target.columns.fields() {
            match self.target.columns.index_of(field.name()) {
                Ok(index) if self.target.columns.field(index).data_type() == field.data_type() => {
                    sources.push(Some(index));
                }
                Ok(_) => {
                    return Err(target_mismatch(&target.projection, format!("{} is of another type", field.name())));
                }
                Err(_) => sources.push(None),
            }
        }
        if self.target.columns != target.columns {
            for row in self.rows.values_mut().flat_map(|versions| versions.values_mut()) {
                let value = |source: &Option<usize>| source.map_or(Value::Null, |index| row[index].clone());
                *row = sources.iter().map(value).collect();
            }
        }
        Ok(())
    }

    /// All rows, in key order; of a history, a key's versions in their order.
    pub fn rows(&self) -> Vec<Row> {
        self.rows.values().flat_map(|versions| versions.values()).cloned().collect()
    }

    /// Applies a whole output, or fails and must be thrown away. Returns the rows written.
    pub fn apply(&mut self, kind: OutputKind, parts: &[OutputRows], told: Told) -> Result<u64> {
        let versions = matches!(kind, OutputKind::Versions | OutputKind::ReplaceVersions);
        if versions != (self.target.shape == TargetShape::Versions) {
            return self.refuse(format!("{kind:?} does not fit {:?}", self.target.shape));
        }
        self.outputs += 1;
        if versions { self.apply_versions(kind, parts, told) } else { self.apply_rows(kind, parts) }
    }

    fn refuse<T>(&self, cause: String) -> Result<T> {
        let object = format!("projection {}", self.target.projection);
        Err(Error::new(ErrorKind::Internal, "apply an output of", object, cause))
    }

    fn key_columns(&self) -> Vec<usize> {
        self.target.key.iter().map(|name| self.target.columns.index_of(name).unwrap()).collect()
    }

    fn apply_rows(&mut self, kind: OutputKind, parts: &[OutputRows]) -> Result<u64> {
        let key = self.key_columns();
        let mut seen = BTreeSet::new();
        let mut written = 0;
        for part in parts {
            let (rows, upsert) = match part {
                OutputRows::Upsert(rows) if rows.num_columns() == self.target.columns.fields().len() => (rows, true),
                OutputRows::Delete(rows) if kind == OutputKind::Merge && rows.num_columns() == key.len() => {
                    (rows, false)
                }
                other => return self.refuse(format!("{kind:?} with {other:?}")),
            };
            for row in rows_of(rows) {
                let id = if upsert { pick(&row, &key) } else { row.clone() };
                if !seen.insert(id.clone()) {
                    return self.refuse(format!("key {id:?} comes twice"));
                }
                let before = match upsert {
                    true => self.rows.insert(id, BTreeMap::from([(Vec::new(), row.clone())])),
                    false => self.rows.remove(&id),
                };
                let same = before.is_some_and(|before| upsert && before[&Vec::new()] == row);
                written += u64::from(!same);
            }
        }
        if kind == OutputKind::Replace {
            let before = self.rows.len();
            self.rows.retain(|key, _| seen.contains(key));
            written += (before - self.rows.len()) as u64;
        }
        Ok(written)
    }

    fn columns(&self) -> Columns {
        let index = |name: &str| self.target.columns.index_of(name).unwrap();
        Columns {
            key: self.key_columns(),
            valid_from: index(history::VALID_FROM),
            valid_to: index(history::VALID_TO),
            is_current: index(history::IS_CURRENT),
            source_lsn: index(history::SOURCE_LSN),
            operation: index(history::CDC_OPERATION),
        }
    }

    fn apply_versions(&mut self, kind: OutputKind, parts: &[OutputRows], told: Told) -> Result<u64> {
        let columns = self.columns();
        let mut came = BTreeSet::new();
        let mut written = 0;
        let mut opened = false;
        for part in parts {
            match part {
                OutputRows::Close(rows) if kind == OutputKind::Versions && !opened => {
                    for close in rows_of(rows) {
                        written += self.close(&columns, &close);
                    }
                }
                OutputRows::Version(rows) if rows.num_columns() == self.target.columns.fields().len() => {
                    opened = true;
                    for version in rows_of(rows) {
                        let id = (pick(&version, &columns.key), lsn_of(&version[columns.source_lsn]));
                        if !came.insert(id.clone()) {
                            return self.refuse(format!("version {id:?} comes twice"));
                        }
                        written += self.insert(&columns, kind, id, version)?;
                    }
                }
                other => return self.refuse(format!("{kind:?} with {other:?}")),
            }
        }
        if kind == OutputKind::ReplaceVersions {
            for (key, versions) in &mut self.rows {
                let before = versions.len();
                let old = |lsn: &Vec<u8>| lsn.as_slice() <= told.horizon.lsn.as_slice();
                versions.retain(|lsn, _| old(lsn) || came.contains(&(key.clone(), lsn.clone())));
                written += (before - versions.len()) as u64;
                written +=
                    end_older(&columns, versions, |lsn| came.contains(&(key.clone(), lsn.clone())), told.as_of_time);
            }
            self.rows.retain(|_, versions| !versions.is_empty());
        }
        Ok(written)
    }

    fn close(&mut self, columns: &Columns, close: &Row) -> u64 {
        let key: Row = close[..columns.key.len()].into();
        let versions = self.rows.get_mut(&key).into_iter().flat_map(|versions| versions.values_mut());
        let mut closed = 0;
        for version in versions.filter(|version| version[columns.valid_to].is_null()) {
            *version = ended(columns, version, close[columns.key.len()].clone());
            closed += 1;
        }
        closed
    }

    fn insert(&mut self, columns: &Columns, kind: OutputKind, id: (Row, Vec<u8>), version: Row) -> Result<u64> {
        let (key, lsn) = id;
        let versions = self.rows.entry(key).or_default();
        match versions.get_mut(&lsn) {
            None => drop(versions.insert(lsn, version)),
            Some(_) if kind == OutputKind::Versions => {
                return self.refuse(format!("version {version:?} stands already"));
            }
            Some(stands) => {
                let next = ended(columns, stands, version[columns.valid_to].clone());
                let same = next == *stands;
                *stands = next;
                return Ok(u64::from(!same));
            }
        }
        Ok(1)
    }
}

/// Ends a key's open versions that did not come. A tombstone ends when something follows it.
fn end_older(
    columns: &Columns,
    versions: &mut BTreeMap<Vec<u8>, Row>,
    came: impl Fn(&Vec<u8>) -> bool,
    as_of_time: Micros,
) -> u64 {
    let starts: Vec<Micros> = versions.values().map(|version| time_of(&version[columns.valid_from])).collect();
    let open = versions.iter_mut().filter(|(lsn, version)| version[columns.valid_to].is_null() && !came(lsn));
    let mut written = 0;
    for (_, version) in open {
        let start = time_of(&version[columns.valid_from]);
        let next = starts.iter().copied().filter(|other| *other > start).min();
        if next.is_none() && version[columns.operation] == Value::from(history::DELETE) {
            continue;
        }
        *version = ended(columns, version, Value::Time(next.unwrap_or(as_of_time.max(start + 1))));
        written += 1;
    }
    written
}

fn time_of(value: &Value) -> Micros {
    match value {
        Value::Time(micros) => *micros,
        other => panic!("{other:?} is no time"),
    }
}

fn lsn_of(value: &Value) -> Vec<u8> {
    match value {
        Value::Binary(bytes) => bytes.clone(),
        other => panic!("{other:?} is no LSN"),
    }
}

fn ended(columns: &Columns, version: &Row, valid_to: Value) -> Row {
    let mut values = version.to_vec();
    values[columns.is_current] = Value::Boolean(valid_to.is_null());
    values[columns.valid_to] = valid_to;
    values.into()
}
