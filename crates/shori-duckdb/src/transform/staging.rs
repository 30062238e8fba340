//! Loads the changes of a step into a temporary table per logical table, in position order.
//!
//! Batches are appended as they come, and what does not fit into memory spills: a step has any size. Beside its columns
//! a staged image has `__n`, its order in the step, and `__commit`, the order of its commit; SQL compares these two
//! numbers where positions are meant.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, Int64Array, RecordBatch, UInt8Array, UInt16Array, UInt32Array, UInt64Array, new_null_array,
};
use arrow::datatypes::{Field, Schema};
use shori_core::change::{ChangeBatch, Op};
use shori_core::position::{CaptureId, Lsn, Micros, Position, SortKey};
use shori_core::{Error, ErrorKind, Result};

use super::session::{Session, failure};
use super::tables::{CaptureNumber, MASK_BITS, Table, split_lsn};

/// What a step holds for one table.
pub(super) struct Staged {
    pub table: Arc<Table>,
    pub rows: i64,
    commits: i64,
    last_commit: Option<(CaptureNumber, Lsn)>,
    pub has_snapshot: bool,
    pub has_deletes: bool,
    /// Per word, the columns that some image lacks.
    pub masks: Vec<u64>,
    pub truncates: Vec<Truncate>,
    /// Where the end of state begins, if that is a large table.
    pub tail: Option<i64>,
    /// Vectors of state that lost rows.
    pub deleted_from: i64,
}

/// All keys of a capture go, at `n` in the order of the step.
pub(super) struct Truncate {
    pub n: i64,
    pub commit: i64,
    pub capture: CaptureNumber,
    pub lsn: Lsn,
    pub time: Micros,
}

impl Staged {
    pub fn new(session: &Session, table: &Arc<Table>) -> Result<Self> {
        let masks: String = (0..table.mask_words()).map(|word| format!("__mask_{word} ubigint, ")).collect();
        session.run(&format!(
            "create or replace temp table {} (__n bigint, __commit bigint, __capture usmallint, __generation uinteger,
                 __op utinyint, __lsn_a ubigint, __lsn_b ubigint, __lsn_length utinyint, __time bigint, {masks}{})",
            table.staged().trim_start_matches("temp.main."),
            table.definitions()?
        ))?;
        Ok(Self {
            table: table.clone(),
            rows: 0,
            commits: 0,
            last_commit: None,
            has_snapshot: false,
            has_deletes: false,
            masks: vec![0; table.mask_words()],
            truncates: Vec::new(),
            tail: None,
            deleted_from: 0,
        })
    }

    /// The order of `lsn` among the step's commits, which come in order.
    fn commit_of(&mut self, capture: CaptureNumber, lsn: Lsn) -> i64 {
        if self.last_commit != Some((capture, lsn)) {
            self.last_commit = Some((capture, lsn));
            self.commits += 1;
        }
        self.commits
    }

    /// Takes the order of a commit that stands after all others.
    pub fn next_commit(&mut self) -> i64 {
        self.last_commit = None;
        self.commits += 1;
        self.commits
    }

    pub fn append(
        &mut self,
        session: &Session,
        capture: CaptureNumber,
        generation: u32,
        batch: &ChangeBatch,
    ) -> Result<()> {
        let rows = batch.len();
        let (mut lsn_a, mut lsn_b, mut lsn_length) =
            (Vec::with_capacity(rows), Vec::with_capacity(rows), Vec::with_capacity(rows));
        let mut commits = Vec::with_capacity(rows);
        for row in 0..rows {
            let lsn = SortKey::from_slice(batch.lsn.value(row))?;
            let (a, b, length) = split_lsn(lsn.as_slice());
            lsn_a.push(a);
            lsn_b.push(b);
            lsn_length.push(length);
            let commit = self.commit_of(capture, lsn);
            commits.push(commit);
            let time = batch.commit_time(row);
            match Op::from_u8(batch.op.value(row))? {
                Op::Truncate => {
                    self.truncates.push(Truncate { n: self.rows + row as i64, commit, capture, lsn, time });
                }
                Op::Snapshot => self.has_snapshot = true,
                Op::Delete | Op::UpdateBefore => self.has_deletes = true,
                Op::Insert | Op::UpdateAfter => {}
            }
        }
        let mut arrays: Vec<(&str, ArrayRef)> = vec![
            ("__n", Arc::new(Int64Array::from_iter_values(self.rows..self.rows + rows as i64))),
            ("__commit", Arc::new(Int64Array::from(commits))),
            ("__capture", Arc::new(UInt16Array::from_value(capture, rows))),
            ("__generation", Arc::new(UInt32Array::from_value(generation, rows))),
            ("__op", Arc::new(batch.op.clone())),
            ("__lsn_a", Arc::new(UInt64Array::from(lsn_a))),
            ("__lsn_b", Arc::new(UInt64Array::from(lsn_b))),
            ("__lsn_length", Arc::new(UInt8Array::from(lsn_length))),
            ("__time", Arc::new(Int64Array::from(batch.commit_time.values().to_vec()))),
        ];
        arrays.extend(self.mask_words(batch)?.into_iter().map(|word| ("__mask", Arc::new(word) as ArrayRef)));
        let columns = self.columns_of(batch)?;
        let mut fields: Vec<Field> =
            arrays.iter().map(|(name, array)| Field::new(*name, array.data_type().clone(), true)).collect();
        fields.extend(self.table.columns.iter().map(|field| field.as_ref().clone().with_nullable(true)));
        let arrays = arrays.into_iter().map(|(_, array)| array).chain(columns).collect();
        let rows_in_arrow = RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays)?;
        self.rows += rows as i64;
        self.write(session, rows_in_arrow)
    }

    fn write(&self, session: &Session, rows: RecordBatch) -> Result<()> {
        let name = format!("staged_{}", self.table.name);
        let write = || {
            let mut appender = session.connection.appender_to_catalog_and_db(&name, "temp", "main")?;
            appender.append_record_batch(rows)?;
            appender.flush()
        };
        write().map_err(|cause| {
            let error = failure("load changes into", cause);
            session.relieve_after(&error);
            error
        })
    }

    /// The batch's columns in the cache's order; one that the batch lacks is null.
    fn columns_of(&self, batch: &ChangeBatch) -> Result<Vec<ArrayRef>> {
        if let Some(field) =
            batch.schema.columns.fields().iter().find(|field| self.table.index_of(field.name()).is_none())
        {
            return Err(Error::new(
                ErrorKind::Internal,
                "apply",
                format!("changes of {}", batch.capture),
                format!("the cache was not opened with their column {}", field.name()),
            ));
        }
        let column = |field: &Arc<Field>| match batch.schema.columns.index_of(field.name()) {
            Ok(index) if batch.columns[index].data_type() == field.data_type() => Ok(batch.columns[index].clone()),
            Ok(index) => Err(Error::new(
                ErrorKind::Internal,
                "apply",
                format!("changes of {}", batch.capture),
                format!("column {} is {}, not {}", field.name(), batch.columns[index].data_type(), field.data_type()),
            )),
            Err(_) => Ok(new_null_array(field.data_type(), batch.len())),
        };
        self.table.columns.iter().map(column).collect()
    }

    /// The unchanged marks in the cache's order of columns, 64 to a word.
    fn mask_words(&mut self, batch: &ChangeBatch) -> Result<Vec<UInt64Array>> {
        let mut words = vec![vec![0u64; batch.len()]; self.masks.len()];
        if let Some(masks) = &batch.unchanged {
            let fields = batch.schema.columns.fields();
            let places: Vec<Option<usize>> = fields.iter().map(|field| self.table.index_of(field.name())).collect();
            for row in (0..batch.len()).filter(|&row| !masks.is_null(row)) {
                let marks = masks.value(row);
                for (index, place) in places.iter().enumerate() {
                    let marked = marks.get(index / 8).is_some_and(|byte| byte >> (index % 8) & 1 == 1);
                    if let (true, Some(place)) = (marked, place) {
                        let bit = 1 << (place % MASK_BITS);
                        words[place / MASK_BITS][row] |= bit;
                        self.masks[place / MASK_BITS] |= bit;
                    }
                }
            }
        }
        Ok(words.into_iter().map(UInt64Array::from).collect())
    }

    /// Columns that some image lacks.
    pub fn masked_columns(&self) -> Vec<usize> {
        (0..self.table.columns.len())
            .filter(|index| self.masks[index / MASK_BITS] >> (index % MASK_BITS) & 1 == 1)
            .collect()
    }
}

/// The staged tables of a step.
#[derive(Default)]
pub(super) struct Staging {
    pub tables: BTreeMap<Arc<str>, Staged>,
    pub rows: u64,
}

impl Staging {
    pub fn entry(&mut self, session: &Session, table: &Arc<Table>) -> Result<&mut Staged> {
        if !self.tables.contains_key(&table.name) {
            let staged = Staged::new(session, table)?;
            self.tables.insert(table.name.clone(), staged);
        }
        self.tables.get_mut(&table.name).ok_or_else(|| {
            Error::new(ErrorKind::Internal, "stage", format!("changes of table {}", table.name), "its entry is missing")
        })
    }
}

/// Where one capture goes in a step, as the cache knows it.
#[derive(Clone)]
pub(super) struct Leg {
    pub number: CaptureNumber,
    pub capture: CaptureId,
    pub table: Arc<Table>,
    pub from: Position,
    pub to: shori_core::transform::Applied,
    pub generation: u32,
    pub sweep: Option<Micros>,
}
