//! Compaction: below the horizon, the last image per key remains.
//!
//! Rows are deleted and updated in place, never moved: position order holds, and appends go on meanwhile, since they
//! touch other rows. DuckDB gives the space of deleted rows back to later appends when it next checkpoints.
//!
//! Three things must survive the images that go:
//!
//! - **Columns marked unchanged** take their value from the key's latest image that has it.
//! - **History boundaries.** A key's boundary at commit `i` is `max(commit_time_i, boundary_(i-1) + 1 us)`; over a run
//!   of commits that is `i + max(commit_time_j - j)`. The kept image holds the last one in `boundary_time`, and reading
//!   gives it as the commit time, so that the chain goes on from there.
//! - **Snapshot images that changed nothing** leave the earlier image as the one that counts (its commit is what state
//!   and histories name). The last one is kept beside it while a reader may come to the end of the snapshot, which removes
//!   keys that it did not see.

use shori_core::Result;
use shori_core::position::{CaptureId, Position};
use shori_core::source::{SnapshotProgress, SnapshotState};
use shori_core::store::Compacted;

use super::captures::{self, Capture};
use super::layout;
use super::session::{Session, above, at_or_below, blob_literal, get_position};
use crate::database::quote_name;

const VERDICTS: &str = "ctl_verdicts";

/// What a compaction decides by.
struct Pass<'a> {
    capture: &'a Capture,
    table: String,
    horizon: Position,
    keep_deletes: bool,
    /// Snapshots that have ended since the former horizon: what they did not see goes.
    finished: Vec<SnapshotProgress>,
    /// Where the first snapshot began whose end a reader of the log may still come to.
    pending: Option<Position>,
    has_masks: bool,
    /// Only keys with images above the former horizon need to be looked at.
    only_touched: bool,
}

pub(super) fn compact(session: &Session, id: &CaptureId, horizon: &Position, keep_deletes: bool) -> Result<Compacted> {
    session.transaction("the log", |session| {
        let capture = captures::one(session, id)?;
        let table = quote_name(&capture.staging_table);
        let rows = || session.number(&format!("select count(*) from {table}"), &table).map(|rows| rows.max(0) as u64);
        let rows_before = rows()?;
        let horizon = capture.horizon.max(*horizon);
        let all_below = above("l", &capture.horizon);
        let moved = has_rows(session, &table, &format!("{all_below} and {}", at_or_below("l", &horizon)))?;
        let pass = plan(session, &capture, table.clone(), horizon, keep_deletes)?;
        if moved || !pass.only_touched {
            pass.run(session)?;
        }
        if !keep_deletes {
            let sql = format!("delete from {table} as l where l.op in (1, 3, 5) and {}", at_or_below("l", &horizon));
            session.execute(&sql, &[], &table)?;
        }
        captures::put_horizon(session, id, &horizon)?;
        Ok(Compacted { rows_before, rows_after: rows()? })
    })
}

fn has_rows(session: &Session, table: &str, condition: &str) -> Result<bool> {
    let sql = format!("select count(*) from (select 1 from {table} l where {condition} limit 1)");
    Ok(session.number(&sql, table)? > 0)
}

fn plan<'a>(
    session: &Session,
    capture: &'a Capture,
    table: String,
    horizon: Position,
    keep_deletes: bool,
) -> Result<Pass<'a>> {
    let snapshots = captures::snapshots(session)?.remove(&capture.id).unwrap_or_default();
    let is_finished =
        |progress: &SnapshotProgress| progress.is_done() && progress.end <= horizon && progress.end > capture.horizon;
    let begun = snapshots.iter().filter(|progress| progress.state != SnapshotState::Requested);
    let newest = begun.clone().next_back();
    let to_come = begun.filter(|progress| progress.is_done() && progress.end > horizon);
    let pending = newest.into_iter().chain(to_come).map(|progress| progress.start).min();
    let swept = snapshots.iter().any(is_finished);
    let truncated = above("l", &capture.horizon);
    let truncated = has_rows(session, &table, &format!("l.op = 5 and {truncated} and {}", at_or_below("l", &horizon)))?;
    let masks = format!("l.unchanged_columns is not null and {}", at_or_below("l", &horizon));
    Ok(Pass {
        pending,
        finished: snapshots.iter().filter(|progress| is_finished(progress)).cloned().collect(),
        has_masks: has_rows(session, &table, &masks)?,
        only_touched: capture.horizon != Position::ZERO && !swept && !truncated,
        capture,
        table,
        horizon,
        keep_deletes,
    })
}

impl Pass<'_> {
    fn run(&self, session: &Session) -> Result<()> {
        let table = &self.table;
        self.empty_below_truncate(session)?;
        session.batch(&format!("create or replace temp table {VERDICTS} as {}", self.verdicts()), VERDICTS)?;
        let matched = format!("from temp.{VERDICTS} as v where {table}.rowid = v.id and v.is_kept");
        session.execute(
            &format!(
                "update {table} set boundary_time = make_timestamp(v.boundary) {matched} and v.boundary is not null"
            ),
            &[],
            table,
        )?;
        if self.has_masks {
            self.resolve(session, &matched)?;
        }
        if self.keep_deletes {
            session.execute(&format!("update {table} set op = 1 {matched} and v.is_swept"), &[], table)?;
        }
        let sql = format!("delete from {table} where rowid in (select id from temp.{VERDICTS} where not is_kept)");
        session.execute(&sql, &[], table)?;
        session.batch(&format!("drop table temp.{VERDICTS}"), VERDICTS)
    }

    fn empty_below_truncate(&self, session: &Session) -> Result<()> {
        let table = &self.table;
        let sql = format!(
            "select l.lsn, l.seqval from {table} l where l.op = 5 and {} order by l.lsn desc, l.seqval desc limit 1",
            at_or_below("l", &self.horizon)
        );
        let last = session.rows(&sql, &[], table, |row| get_position(row, 0))?;
        if let Some(last) = last.first() {
            let sql = format!("delete from {table} as l where not {}", at_or_above_columns("l.lsn", "l.seqval", last));
            session.execute(&sql, &[], table)?;
        }
        Ok(())
    }

    /// Indexes of the schema's columns within the staging columns, and their quoted names.
    fn columns(&self) -> Vec<(usize, String)> {
        let place = |name: &String| self.capture.staging_columns.iter().position(|known| known == name);
        let fields = self.capture.schema.columns.fields().iter();
        fields
            .map(|field| (place(field.name()).unwrap_or(usize::MAX), quote_name(&layout::staging_column(field.name()))))
            .collect()
    }

    fn key_columns(&self) -> Vec<String> {
        let names = self.capture.schema.key_names();
        names.into_iter().map(|name| quote_name(&layout::staging_column(name))).collect()
    }

    /// One row per image looked at: whether it stays, and what it becomes.
    fn verdicts(&self) -> String {
        let columns = self.columns();
        let keys: Vec<String> = (0..self.capture.schema.key.len()).map(|index| format!("k{index}")).collect();
        let by_key = keys.join(", ");
        let values: Vec<String> = (0..columns.len()).map(|index| format!("c{index}")).collect();
        let image = format!("row({})", values.join(", "));
        format!(
            "with images as ({images}),
            resolved as ({resolved}),
            linked as (
                select *, lag(op) over by_key as before_op, lag(lsn) over by_key as before_lsn,
                    lag(seqval) over by_key as before_seqval, lag({image}) over by_key as before_image
                from resolved
                window by_key as (partition by {by_key} order by lsn, seqval)
            ),
            compared as (
                select *, op = 0 and coalesce(before_op in (0, 2, 4), false)
                    and before_image is not distinct from {image} and not {swept_between} as is_same
                from linked
            ),
            numbered as (
                select *, dense_rank() over (partition by {by_key}, is_same order by lsn) as commit_number,
                    row_number() over (partition by {by_key}, is_same order by lsn desc, seqval desc) as from_end,
                    row_number() over (partition by {by_key} order by lsn desc, seqval desc) as from_key_end,
                    first_value(lsn) over (partition by {by_key} order by lsn desc, seqval desc) as touched_lsn,
                    first_value(seqval) over (partition by {by_key} order by lsn desc, seqval desc) as touched_seqval
                from compared
            ),
            bounded as (
                select *, max(commit_number) over (partition by {by_key}, is_same)
                    + max(commit_at - commit_number) over (partition by {by_key}, is_same) as boundary_at,
                    {is_swept} as is_swept
                from numbered
            )
            select id, is_swept, is_masked,
                case when not is_same and boundary_at <> commit_at then boundary_at end as boundary,
                case when is_same then from_key_end = 1 and not is_swept and {is_pending}
                    else from_end = 1 and (not is_swept or {keep_swept}) end as is_kept{kept_values}
            from (select id, lsn, seqval, op, commit_at, is_masked, is_same, from_end, from_key_end, boundary_at, is_swept{carried}
                from bounded)",
            images = self.images(),
            resolved = self.resolved(),
            swept_between = self.swept_between(),
            is_swept = self.is_swept(),
            is_pending = self.pending.map_or("false".into(), |start| above_columns("lsn", "seqval", &start)),
            keep_swept = self.keep_deletes,
            kept_values = self.each_resolved(|index| format!(", case when is_masked then c{index} end as c{index}, u{index}")),
            carried = self.each_resolved(|index| format!(", c{index}, u{index}")),
        )
    }

    /// `text` of each column, where there are marks to resolve.
    fn each_resolved(&self, text: impl Fn(usize) -> String) -> String {
        let columns = if self.has_masks { self.capture.schema.columns.fields().len() } else { 0 };
        (0..columns).map(text).collect()
    }

    fn images(&self) -> String {
        let table = &self.table;
        let mut condition = format!("l.op <> 5 and {}", at_or_below("l", &self.horizon));
        if self.only_touched {
            let same: Vec<String> =
                self.key_columns().iter().map(|key| format!("n.{key} is not distinct from l.{key}")).collect();
            condition.push_str(&format!(
                " and exists (select 1 from {table} n where {} and {} and {})",
                above("n", &self.capture.horizon),
                at_or_below("n", &self.horizon),
                same.join(" and ")
            ));
        }
        format!("select l.rowid as shori_id, l.* from {table} l where {condition}")
    }

    fn resolved(&self) -> String {
        let keys = self.key_columns();
        let mut select = String::from(
            "select shori_id as id, lsn, seqval, op, epoch_us(coalesce(boundary_time, commit_time)) as commit_at, \
             unchanged_columns is not null as is_masked",
        );
        for (index, key) in keys.iter().enumerate() {
            select.push_str(&format!(", {key} as k{index}"));
        }
        for (index, (place, column)) in self.columns().into_iter().enumerate() {
            if !self.has_masks {
                select.push_str(&format!(", {column} as c{index}"));
                continue;
            }
            let marked = is_marked(place);
            let known = format!(
                "last_value(case when op in (0, 2, 4) and not {marked} then {{'v': {column}}} end ignore nulls) \
                 over (partition by {} order by lsn, seqval)",
                keys.join(", ")
            );
            select.push_str(&format!(", case when {marked} then ({known}).v else {column} end as c{index}"));
            select.push_str(&format!(", {marked} and {known} is null as u{index}"));
        }
        select + " from images"
    }

    /// Whether a finished snapshot removed the row that the image before had left.
    fn swept_between(&self) -> String {
        let swept = self.finished.iter().map(|progress| {
            format!(
                "(not {} and {})",
                above_columns("before_lsn", "before_seqval", &progress.start),
                above_columns("lsn", "seqval", &progress.end)
            )
        });
        any_of(swept)
    }

    fn is_swept(&self) -> String {
        let swept = self.finished.iter();
        any_of(swept.map(|progress| format!("not {}", above_columns("touched_lsn", "touched_seqval", &progress.start))))
    }

    /// Gives marked columns their value; marks of columns that no image had stay.
    fn resolve(&self, session: &Session, matched: &str) -> Result<()> {
        let columns = self.columns();
        let bytes = columns.iter().filter(|(place, _)| *place != usize::MAX).map(|(place, _)| place / 8 + 1).max();
        let mut mask = Vec::new();
        for byte in 0..bytes.unwrap_or(0) {
            let bits = columns.iter().enumerate().filter(|(_, (place, _))| *place != usize::MAX && place / 8 == byte);
            let bits =
                bits.map(|(index, (place, _))| format!("case when v.u{index} then {} else 0 end", 1 << (place % 8)));
            let sum = bits.fold(String::from("0"), |sum, bit| format!("{sum} + {bit}"));
            mask.push(format!("format('{{:02x}}', {sum})"));
        }
        let unknown = any_of((0..columns.len()).map(|index| format!("v.u{index}")));
        let mut set = vec![format!("unchanged_columns = case when {unknown} then unhex({}) end", mask.join(" || "))];
        set.extend(columns.iter().enumerate().map(|(index, (_, column))| format!("{column} = v.c{index}")));
        let sql = format!("update {} set {} {matched} and v.is_masked", self.table, set.join(", "));
        session.execute(&sql, &[], &self.table).map(|_| ())
    }
}

fn any_of(conditions: impl Iterator<Item = String>) -> String {
    let conditions: Vec<String> = conditions.collect();
    if conditions.is_empty() { "false".into() } else { format!("({})", conditions.join(" or ")) }
}

/// `(lsn, seqval) > bound` over two columns of any name.
fn above_columns(lsn: &str, seqval: &str, bound: &Position) -> String {
    let [at_lsn, at_seq] = [bound.lsn, bound.seq].map(|key| blob_literal(key.as_slice()));
    format!("({lsn} > {at_lsn} or ({lsn} = {at_lsn} and {seqval} > {at_seq}))")
}

fn at_or_above_columns(lsn: &str, seqval: &str, bound: &Position) -> String {
    let [at_lsn, at_seq] = [bound.lsn, bound.seq].map(|key| blob_literal(key.as_slice()));
    format!("({lsn} > {at_lsn} or ({lsn} = {at_lsn} and {seqval} >= {at_seq}))")
}

/// Whether the mask marks column `place`: bit `place % 8` of byte `place / 8`, counted from the lowest.
fn is_marked(place: usize) -> String {
    if place == usize::MAX {
        return "false".into();
    }
    let (byte, bit) = (place / 8, place % 8);
    format!(
        "(case when unchanged_columns is null or octet_length(unchanged_columns) <= {byte} then false \
         else get_bit(unchanged_columns::bit, {}) = 1 end)",
        byte * 8 + 7 - bit
    )
}
