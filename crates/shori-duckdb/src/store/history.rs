//! Versions of rows in a target: new ones are appended with surrogate keys that go on from a control row (so that the
//! table need not be searched for its highest), open ones are taken out and put back closed.

use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Field, Schema};
use duckdb::types::Value;
use shori_core::position::Micros;
use shori_core::projection::history;
use shori_core::store::OutputKind;
use shori_core::{Error, ErrorKind, Result};

use super::layout;
use super::output::{Step, Written, create_temporary, load_rows};
use super::session::{Session, blob_literal, now, text, time, time_type};
use crate::database::quote_name;
use crate::scattered::VECTOR_ROWS;
use crate::tail::{self, FEW_ROWS};

const VERSIONS: &str = "shori_versions";
const CLOSES: &str = "shori_closes";
const CLOSED: &str = "shori_closed";
const REST: &str = "shori_closes_rest";
const ROWS: &str = "shori_closes_rows";

const SELECT_NEXT_KEY: &str = "
select next_surrogate_key
from ctl_projection_metadata
where projection_name = ?";

const UPDATE_NEXT_KEY: &str = "
update ctl_projection_metadata
set next_surrogate_key = ?
where projection_name = ?";

/// What an output of versions has loaded so far.
pub(super) struct Versions {
    /// Versions need no comparison with those that stand: they go straight into the target.
    direct: bool,
    first_key: i64,
    next_key: i64,
    written_at: Micros,
    has_versions: bool,
    has_closes: bool,
}

impl Versions {
    pub fn begin(session: &Session, step: &Step, direct: bool) -> Result<Self> {
        let table = &step.target.projection;
        let keys = session.rows(SELECT_NEXT_KEY, &[text(table)], table, |row| row.get::<_, i64>(0))?;
        let next_key = keys.first().copied().ok_or_else(|| {
            Error::new(ErrorKind::Internal, "write", format!("target {table}"), "it was never prepared")
        })?;
        Ok(Self { direct, first_key: next_key, next_key, written_at: now(), has_versions: false, has_closes: false })
    }

    pub fn load(&mut self, session: &Session, step: &Step, rows: RecordBatch) -> Result<()> {
        if self.direct {
            let rows = self.with_own_columns(&step.run_id, rows)?;
            return load_rows(session, session.catalog(), &step.target.projection, rows);
        }
        if !self.has_versions {
            create_temporary(session, VERSIONS, &rows)?;
            self.has_versions = true;
        }
        load_rows(session, "temp", VERSIONS, rows)
    }

    pub fn load_closes(&mut self, session: &Session, step: &Step, rows: RecordBatch) -> Result<()> {
        if step.kind != OutputKind::Versions {
            let cause = "closed keys belong to outputs of versions alone";
            return Err(Error::new(ErrorKind::Internal, "write", format!("target {}", step.target.projection), cause));
        }
        if !self.has_closes {
            create_temporary(session, CLOSES, &rows)?;
            self.has_closes = true;
        }
        load_rows(session, "temp", CLOSES, rows)
    }

    fn with_own_columns(&mut self, run_id: &str, rows: RecordBatch) -> Result<RecordBatch> {
        let count = rows.num_rows();
        let end = self.next_key + count as i64;
        let schema = rows.schema();
        let carried = |field: &Arc<Field>| field.as_ref().clone().with_name(layout::history_column(field.name()));
        let mut fields: Vec<Field> = schema.fields().iter().map(carried).collect();
        let mut arrays: Vec<ArrayRef> = rows.columns().to_vec();
        fields.push(Field::new(history::SURROGATE_KEY, DataType::Int64, false));
        arrays.push(Arc::new(Int64Array::from_iter_values(self.next_key..end)));
        fields.push(Field::new(history::BATCH_ID, DataType::Utf8, false));
        arrays.push(Arc::new(StringArray::from_iter_values(std::iter::repeat_n(run_id, count))));
        for name in [history::CREATED_AT, history::UPDATED_AT] {
            fields.push(Field::new(name, time_type(), false));
            arrays.push(Arc::new(TimestampMicrosecondArray::from_value(self.written_at, count)));
        }
        self.next_key = end;
        Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays)?)
    }

    /// Closes, replaces and inserts what has been loaded.
    pub fn apply(&self, session: &Session, step: &Step) -> Result<Written> {
        let mut written = Written { rows: (self.next_key - self.first_key) as u64, deleted: 0 };
        let mut next_key = self.next_key;
        if self.has_closes {
            let closed = self.close(session, step)?;
            written = Written { rows: written.rows + closed.rows, deleted: closed.deleted };
            session.batch(&format!("drop table temp.{CLOSES}"), CLOSES)?;
        }
        if step.kind == OutputKind::ReplaceVersions && !self.direct {
            let replaced = self.replace(session, step, &mut next_key)?;
            written = Written { rows: written.rows + replaced.rows, deleted: written.deleted + replaced.deleted };
        }
        if next_key != self.first_key {
            let values = [Value::BigInt(next_key), text(&step.target.projection)];
            session.execute(UPDATE_NEXT_KEY, &values, &step.target.projection)?;
        }
        Ok(written)
    }

    /// Versions of this very output are never closed by it, whatever the order in which its parts came.
    ///
    /// Rows are taken out and put back, closed. An update in place keeps 24 KiB in memory for each column of each vector of
    /// rows that it meets, until the next checkpoint, and that one writes those columns anew.
    fn close(&self, session: &Session, step: &Step) -> Result<Written> {
        let object = &step.target.projection;
        let table = quote_name(object);
        let tail = session.tail_of(object)?;
        self.find_open(session, step, tail)?;
        for deletion in tail::deletions(&table, &format!("temp.{CLOSED}"), "shori_row", tail) {
            session.execute(&deletion, &[], object)?;
        }
        let sql = format!("insert into {table} by name select * exclude (shori_row) from temp.{CLOSED}");
        let rows = session.execute(&sql, &[], object)?;
        let vectors = format!("select count(distinct shori_row // {VECTOR_ROWS}) from temp.{CLOSED}");
        let deleted = session.number(&vectors, CLOSED)? as u64;
        session.batch(&format!("drop table temp.{CLOSED}"), CLOSED)?;
        Ok(Written { rows, deleted })
    }

    /// Makes `CLOSED`: open versions of the keys in `CLOSES`, as they will be. In a large table those at its end are looked
    /// for first.
    fn find_open(&self, session: &Session, step: &Step, tail: Option<i64>) -> Result<()> {
        let object = &step.target.projection;
        let values = [time(self.written_at)];
        let (own, first_key) = (quote_name(object), self.first_key);
        let closing = |closes: &str, rows: &str| {
            format!(
                "select t.* replace (l.valid_to as valid_to, false as is_current, ?::timestamp as updated_at) \
                 from (select rowid as shori_row, * from {own} where {rows}) t join temp.{closes} as l on {} \
                 where t.is_current and t.surrogate_key < {first_key}",
                step.same_key("t", "l")
            )
        };
        let create = format!("create or replace temp table {CLOSED} as");
        let Some(tail) = tail else {
            session.execute(&format!("{create} {}", closing(CLOSES, "true")), &values, object)?;
            return Ok(());
        };
        session.execute(&format!("{create} {}", closing(CLOSES, &format!("rowid >= {tail}"))), &values, object)?;
        let rest = format!(
            "create or replace temp table {REST} as from temp.{CLOSES} l anti join temp.{CLOSED} c on {}",
            step.same_key("l", "c")
        );
        session.batch(&rest, REST)?;
        let left = session.number(&format!("select count(*) from temp.{REST}"), REST)?;
        let mut rows = format!("rowid < {tail}");
        if left > 0 && left <= FEW_ROWS {
            let sql = format!(
                "create or replace temp table {ROWS} as select {own}.rowid as shori_row \
                 from {own} join temp.{REST} as l on {} where {own}.is_current and {own}.rowid < {tail}",
                step.same_key(&own, "l")
            );
            session.execute(&sql, &[], object)?;
            rows = format!("rowid in (select shori_row from temp.{ROWS})");
        }
        if left > 0 {
            let sql = format!("insert into temp.{CLOSED} {}", closing(REST, &rows));
            session.execute(&sql, &values, object)?;
        }
        session.batch(&format!("drop table if exists temp.{ROWS}; drop table temp.{REST}"), REST)
    }

    fn replace(&self, session: &Session, step: &Step, next_key: &mut i64) -> Result<Written> {
        if !self.has_versions {
            create_temporary(session, VERSIONS, &RecordBatch::new_empty(step.target.columns.clone()))?;
        }
        let object = &step.target.projection;
        let table = quote_name(object);
        let horizon = blob_literal(step.horizon.lsn.as_slice());
        let same = format!("{} and {table}.__source_lsn = l.__source_lsn", step.same_key(&table, "l"));
        let sql = format!(
            "update {table} set valid_to = l.valid_to, is_current = l.is_current, updated_at = ? \
             from temp.{VERSIONS} as l where {same} \
             and ({table}.valid_to is distinct from l.valid_to or {table}.is_current is distinct from l.is_current)"
        );
        let updated = session.execute(&sql, &[time(self.written_at)], object)?;
        let sql = format!(
            "delete from {table} where {table}.__source_lsn > {horizon} \
             and not exists (select 1 from temp.{VERSIONS} l where {same})"
        );
        let deleted = session.execute(&sql, &[], object)?;
        let names = || step.target.columns.fields().iter().map(|field| field.name());
        let columns: Vec<String> = names().map(|name| quote_name(&layout::history_column(name))).collect();
        let columns = columns.join(", ");
        let loaded: Vec<String> = names().map(|name| format!("l.{}", quote_name(name))).collect();
        let loaded = loaded.join(", ");
        let sql = format!(
            "insert into {table} (surrogate_key, {columns}, batch_id, created_at, updated_at) \
             select {next_key} - 1 + row_number() over (order by l.rowid), {loaded}, ?, ?, ? \
             from temp.{VERSIONS} as l where not exists (select 1 from {table} where {same})"
        );
        let values = [text(&step.run_id), time(self.written_at), time(self.written_at)];
        let inserted = session.execute(&sql, &values, object)?;
        *next_key += inserted as i64;
        let ended = self.end_older(session, step, &same)?;
        session.batch(&format!("drop table temp.{VERSIONS}"), VERSIONS)?;
        // An update in place counts as much as a deletion: its old values are kept, too.
        Ok(Written { rows: updated + deleted + inserted + ended, deleted: updated + deleted + ended })
    }

    /// Ends open versions that did not come: the target stood behind the log's horizon, and what ended them is not in the
    /// log any more.
    fn end_older(&self, session: &Session, step: &Step, same: &str) -> Result<u64> {
        let object = &step.target.projection;
        let table = quote_name(object);
        let find = format!(
            "create or replace temp table {CLOSED} as select rowid as shori_row from {table} \
             where is_current and not exists (select 1 from temp.{VERSIONS} l where {same})"
        );
        session.batch(&find, CLOSED)?;
        if session.number(&format!("select count(*) from temp.{CLOSED}"), CLOSED)? == 0 {
            return session.batch(&format!("drop table temp.{CLOSED}"), CLOSED).map(|()| 0);
        }
        let end = format!(
            "update {table} set valid_to = e.valid_to, is_current = false, updated_at = $1 \
             from (select o.rowid as shori_row, coalesce(min(n.valid_from), \
                 greatest($2::timestamp, any_value(o.valid_from) + interval 1 microsecond)) as valid_to \
                 from {table} o left join {table} n on {} and n.valid_from > o.valid_from \
                 where o.rowid in (select shori_row from temp.{CLOSED}) group by o.rowid) as e \
             where {table}.rowid = e.shori_row",
            step.same_key("o", "n")
        );
        let ended = session.execute(&end, &[time(self.written_at), time(step.as_of_time)], object)?;
        session.batch(&format!("drop table temp.{CLOSED}"), CLOSED)?;
        Ok(ended)
    }
}
