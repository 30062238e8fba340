//! Versions of rows in a target: new ones are appended with surrogate keys that go on from a control row (so that the
//! table need not be searched for its highest), open ones are taken out and put back closed.

use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Field, Schema};
use shori_core::position::Micros;
use shori_core::projection::history;
use shori_core::store::OutputKind;
use shori_core::{Error, ErrorKind, Result};

use super::layout::{self, Side};
use super::output::{Form, Step, Written, create_temporary, drop_temporary, load_rows};
use super::session::{Session, blob_literal, now, text, time, time_type};
use super::target;
use crate::database::quote_name;

const VERSIONS: &str = "ctl_versions";
const CLOSES: &str = "ctl_closes";
const CLOSED: &str = "ctl_closed";

/// What an output of versions has loaded so far.
pub(super) struct Versions {
    form: Form,
    /// The table that versions go straight into, since they need no comparison with those that stand.
    direct: Option<String>,
    first_key: i64,
    next_key: i64,
    written_at: Micros,
    has_versions: bool,
    close_rows: u64,
}

impl Versions {
    pub fn new(step: &Step, form: Form, next_key: i64) -> Self {
        let name = &*step.target.projection;
        let direct = match form {
            Form::Layered(side) => Some(layout::changes_table(name, side)),
            Form::Plain if step.kind == OutputKind::ReplaceVersions => None,
            _ => Some(name.to_string()),
        };
        let (first_key, written_at) = (next_key, now());
        Self { form, direct, first_key, next_key, written_at, has_versions: false, close_rows: 0 }
    }

    pub fn load(&mut self, session: &Session, step: &Step, rows: RecordBatch) -> Result<()> {
        if let Some(table) = self.direct.clone() {
            let rows = self.with_own_columns(&step.run_id, rows)?;
            return load_rows(session, session.catalog(), &table, rows);
        }
        if !self.has_versions {
            create_temporary(session, VERSIONS, rows.schema().fields())?;
            self.has_versions = true;
        }
        load_rows(session, "temp", VERSIONS, rows)
    }

    pub fn load_closes(&mut self, session: &Session, step: &Step, rows: RecordBatch) -> Result<()> {
        if step.kind != OutputKind::Versions {
            let cause = "closed keys belong to outputs of versions alone";
            return Err(Error::new(ErrorKind::Internal, "write", format!("target {}", step.target.projection), cause));
        }
        if self.close_rows == 0 {
            create_temporary(session, CLOSES, rows.schema().fields())?;
        }
        self.close_rows += rows.num_rows() as u64;
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
    pub fn apply(&self, session: &Session, step: &Step, next_key: &mut i64) -> Result<Written> {
        let inserted = (self.next_key - self.first_key) as u64;
        let mut written = Written { rows: inserted, grown: inserted, deleted: 0 };
        *next_key = self.next_key;
        if self.close_rows > 0 && self.form != Form::Empty {
            let closed = match self.form {
                Form::Layered(side) => self.close_layered(session, step, side)?,
                _ => self.close(session, step)?,
            };
            written.add(&closed);
        }
        if self.close_rows > 0 {
            drop_temporary(session, CLOSES, self.close_rows)?;
        }
        if self.direct.is_none() {
            written.add(&self.replace(session, step, next_key)?);
        }
        Ok(written)
    }

    /// Versions of this very output are never closed by it, whatever the order in which its parts came.
    ///
    /// Rows are taken out and put back, closed. An update in place keeps 24 KiB in memory for each column of each vector of
    /// rows that it meets, until the next checkpoint, and that one writes those columns anew.
    fn close(&self, session: &Session, step: &Step) -> Result<Written> {
        let rows = self.close_in(session, step, &step.target.projection)?;
        Ok(Written { rows, grown: 0, deleted: rows })
    }

    /// Closes the open versions that are in `table`, and returns how many.
    fn close_in(&self, session: &Session, step: &Step, table: &str) -> Result<u64> {
        let object = &step.target.projection;
        let table = quote_name(table);
        let find = format!(
            "create or replace temp table {CLOSED} as \
             select t.* replace (l.valid_to as valid_to, false as is_current, ?::timestamp as updated_at) \
             from (select rowid as shori_row, * from {table} where is_current) t join temp.{CLOSES} as l on {} \
             where t.surrogate_key < {}",
            target::same_key(&step.target, "t", "l"),
            self.first_key
        );
        session.execute(&find, &[time(self.written_at)], object)?;
        let delete = format!("delete from {table} where rowid in (select shori_row from temp.{CLOSED})");
        let rows = session.execute(&delete, &[], object)?;
        let insert = format!("insert into {table} by name select * exclude (shori_row) from temp.{CLOSED}");
        session.execute(&insert, &[], object)?;
        drop_temporary(session, CLOSED, rows)?;
        Ok(rows)
    }

    /// Versions in the active overlay are closed there; whether there is one below is not asked, and the first end of a
    /// key is the one that counts.
    fn close_layered(&self, session: &Session, step: &Step, side: Side) -> Result<Written> {
        let object = &step.target.projection;
        let changes = layout::changes_table(object, side);
        let ends = quote_name(&layout::ends_table(object, side));
        self.close_in(session, step, &changes)?;
        let end = format!(
            "insert into {ends} by name select l.*, ?::timestamp as updated_at from temp.{CLOSES} l \
             anti join {ends} e on {}",
            target::same_key(&step.target, "l", "e")
        );
        let grown = session.execute(&end, &[time(self.written_at)], object)?;
        Ok(Written { rows: self.close_rows, grown, deleted: 0 })
    }

    fn replace(&self, session: &Session, step: &Step, next_key: &mut i64) -> Result<Written> {
        if !self.has_versions {
            create_temporary(session, VERSIONS, step.target.columns.fields())?;
        }
        let object = &step.target.projection;
        let table = quote_name(object);
        let horizon = blob_literal(step.horizon.lsn.as_slice());
        let same = target::same_key(&step.target, "t", "l") + " and t.__source_lsn = l.__source_lsn";
        let sql = format!(
            "update {table} as t set valid_to = l.valid_to, is_current = l.is_current, updated_at = ? \
             from temp.{VERSIONS} as l where {same} \
             and (t.valid_to is distinct from l.valid_to or t.is_current is distinct from l.is_current)"
        );
        let updated = session.execute(&sql, &[time(self.written_at)], object)?;
        let sql = format!(
            "delete from {table} as t where t.__source_lsn > {horizon} \
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
             from temp.{VERSIONS} as l where not exists (select 1 from {table} as t where {same})"
        );
        let values = [text(&step.run_id), time(self.written_at), time(self.written_at)];
        let inserted = session.execute(&sql, &values, object)?;
        *next_key += inserted as i64;
        let ended = self.end_older(session, step, &same)?;
        session.batch(&format!("drop table temp.{VERSIONS}"), VERSIONS)?;
        // An update in place counts as much as a deletion: its old values are kept, too.
        let rows = updated + deleted + inserted + ended;
        Ok(Written { rows, grown: inserted, deleted: updated + deleted + ended })
    }

    /// Ends open versions that did not come: the target stood behind the log's horizon, and what ended them is not in the
    /// log any more. A tombstone ends when something follows it.
    fn end_older(&self, session: &Session, step: &Step, same: &str) -> Result<u64> {
        let object = &step.target.projection;
        let table = quote_name(object);
        let find = format!(
            "create or replace temp table {CLOSED} as select t.rowid as shori_row from {table} as t \
             where t.is_current and not exists (select 1 from temp.{VERSIONS} l where {same})"
        );
        session.batch(&find, CLOSED)?;
        if session.number(&format!("select count(*) from temp.{CLOSED}"), CLOSED)? == 0 {
            return session.batch(&format!("drop table temp.{CLOSED}"), CLOSED).map(|()| 0);
        }
        let tombstone = history::DELETE;
        let end = format!(
            "update {table} as t set valid_to = e.valid_to, is_current = false, updated_at = $1 \
             from (select o.rowid as shori_row, coalesce(min(n.valid_from), \
                 greatest($2::timestamp, any_value(o.valid_from) + interval 1 microsecond)) as valid_to \
                 from {table} o left join {table} n on {} and n.valid_from > o.valid_from \
                 where o.rowid in (select shori_row from temp.{CLOSED}) group by o.rowid \
                 having any_value(o.cdc_operation) <> '{tombstone}' or count(n.valid_from) > 0) as e \
             where t.rowid = e.shori_row",
            target::same_key(&step.target, "o", "n")
        );
        let ended = session.execute(&end, &[time(self.written_at), time(step.as_of_time)], object)?;
        session.batch(&format!("drop table temp.{CLOSED}"), CLOSED)?;
        Ok(ended)
    }
}
