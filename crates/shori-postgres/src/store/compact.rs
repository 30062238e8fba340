//! Compaction: below the horizon, the last image per key remains.
//!
//! Rows are deleted and updated where they stand; appends go on meanwhile, since they touch other rows, and readers see
//! what was there when they began. The server gives the space of deleted rows back to later appends when it next vacuums.
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

use std::collections::BTreeSet;

use shori_core::Result;
use shori_core::position::{CaptureId, Position};
use shori_core::source::{SnapshotProgress, SnapshotState};
use shori_core::store::Compacted;

use super::captures::{self, Capture};
use super::layout;
use super::session::{Link, above, at_or_above, at_or_below, lock_name};
use crate::connect::quoted;

const VERDICTS: &str = "pg_temp.ctl_verdicts";

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
    /// The schema's columns that some image leaves to an earlier one.
    marked: BTreeSet<usize>,
    /// Only keys with images above the former horizon need to be looked at.
    only_touched: bool,
}

pub(super) async fn compact(
    link: &Link,
    schema: &str,
    id: &CaptureId,
    horizon: &Position,
    keep_deletes: bool,
) -> Result<Compacted> {
    let object = format!("the log of {id}");
    let lock = lock_name(schema, &format!("compaction {id}"));
    link.run(
        &format!("set local statement_timeout = 0; select pg_advisory_xact_lock(hashtextextended({lock}, 0))"),
        &object,
    )
    .await?;
    let capture = captures::one(link, id).await?;
    let table = quoted(&capture.staging_table);
    let rows_before = link.number(&format!("select count(*) from {table}"), &object).await?.max(0) as u64;
    let horizon = capture.horizon.max(*horizon);
    let moved = between(&capture.horizon, &horizon);
    let moved = has_rows(link, &table, &moved).await?;
    let pass = plan(link, &capture, table.clone(), horizon, keep_deletes).await?;
    let mut gone = 0;
    if moved || !pass.only_touched {
        gone += pass.run(link).await?;
    }
    if !keep_deletes {
        let below = at_or_below("l.lsn", "l.seqval", &horizon);
        gone += link.run(&format!("delete from {table} as l where l.op in (1, 3, 5) and {below}"), &object).await?;
    }
    captures::put_horizon(link, id, &horizon).await?;
    Ok(Compacted { rows_before, rows_after: rows_before.saturating_sub(gone) })
}

fn between(after: &Position, up_to: &Position) -> String {
    format!("{} and {}", above("l.lsn", "l.seqval", after), at_or_below("l.lsn", "l.seqval", up_to))
}

async fn has_rows(link: &Link, table: &str, condition: &str) -> Result<bool> {
    let sql = format!("select count(*) from (select 1 from {table} as l where {condition} limit 1) as found");
    Ok(link.number(&sql, table).await? > 0)
}

async fn plan<'a>(
    link: &Link,
    capture: &'a Capture,
    table: String,
    horizon: Position,
    keep_deletes: bool,
) -> Result<Pass<'a>> {
    let snapshots = captures::snapshots(link).await?.remove(&capture.id).unwrap_or_default();
    let is_finished =
        |progress: &SnapshotProgress| progress.is_done() && progress.end <= horizon && progress.end > capture.horizon;
    let begun = snapshots.iter().filter(|progress| progress.state != SnapshotState::Requested);
    let newest = begun.clone().next_back();
    let to_come = begun.filter(|progress| progress.is_done() && progress.end > horizon);
    let pending = newest.into_iter().chain(to_come).map(|progress| progress.start).min();
    let swept = snapshots.iter().any(is_finished);
    let truncated = has_rows(link, &table, &format!("l.op = 5 and {}", between(&capture.horizon, &horizon))).await?;
    Ok(Pass {
        pending,
        finished: snapshots.iter().filter(|progress| is_finished(progress)).cloned().collect(),
        marked: marked(link, capture, &table, &horizon).await?,
        only_touched: capture.horizon != Position::ZERO && !swept && !truncated,
        capture,
        table,
        horizon,
        keep_deletes,
    })
}

/// Masks are few, whatever the number of rows.
async fn marked(link: &Link, capture: &Capture, table: &str, horizon: &Position) -> Result<BTreeSet<usize>> {
    let below = at_or_below("l.lsn", "l.seqval", horizon);
    let sql = format!(
        "select distinct l.unchanged_columns from {table} as l where l.unchanged_columns is not null and {below}"
    );
    let rows = link.rows_of(&sql, &[], table).await?;
    let masks: Vec<&[u8]> = rows.iter().map(|row| row.get(0)).collect();
    let is_marked =
        |place: usize| masks.iter().any(|mask| mask.get(place / 8).is_some_and(|byte| byte >> (place % 8) & 1 == 1));
    let columns = capture.schema.columns.fields().len();
    Ok((0..columns).filter(|index| place_of(capture, *index).is_some_and(is_marked)).collect())
}

/// The bit of the schema's column `index` in masks.
fn place_of(capture: &Capture, index: usize) -> Option<usize> {
    let name = capture.schema.columns.field(index).name();
    capture.staging_columns.iter().position(|known| known == name)
}

impl Pass<'_> {
    /// Returns how many rows went.
    async fn run(&self, link: &Link) -> Result<u64> {
        let table = &self.table;
        let mut gone = self.empty_below_truncate(link).await?;
        let plain = VERDICTS.trim_start_matches("pg_temp.");
        let create = format!("create temporary table {plain} on commit drop as {}", self.verdicts());
        link.run(&create, table).await?;
        link.run(&format!("analyze {VERDICTS}"), table).await?;
        let sql = format!("delete from {table} as t using {VERDICTS} as v where t.ctid = v.id and not v.is_kept");
        gone += link.run(&sql, table).await?;
        // Once, for a row that was updated stands elsewhere.
        link.run(&self.change_kept(), table).await?;
        Ok(gone)
    }

    async fn empty_below_truncate(&self, link: &Link) -> Result<u64> {
        let table = &self.table;
        let sql = format!(
            "select l.lsn, l.seqval from {table} as l where l.op = 5 and {} order by l.lsn desc, l.seqval desc limit 1",
            at_or_below("l.lsn", "l.seqval", &self.horizon)
        );
        let Some(row) = link.rows_of(&sql, &[], table).await?.into_iter().next() else { return Ok(0) };
        let last = super::session::get_position(&row, 0)?;
        let kept = at_or_above("l.lsn", "l.seqval", &last);
        link.run(&format!("delete from {table} as l where not {kept}"), table).await
    }

    fn columns(&self) -> Vec<String> {
        let fields = self.capture.schema.columns.fields().iter();
        fields.map(|field| quoted(&layout::staging_column(field.name()))).collect()
    }

    /// Updates kept images to what they stand for now.
    fn change_kept(&self) -> String {
        let columns = self.columns();
        let at = "timestamp 'epoch' + (v.boundary / 86400000000) * interval '1 day' \
                  + (v.boundary % 86400000000) * interval '1 microsecond'";
        let mut set = vec![format!("boundary_time = case when v.boundary is null then t.boundary_time else {at} end")];
        let mut changed = String::from("v.boundary is not null");
        if self.keep_deletes {
            set.push("op = case when v.is_swept then 1 else t.op end".into());
            changed.push_str(" or v.is_swept");
        }
        if !self.marked.is_empty() {
            changed.push_str(" or v.is_masked");
            set.push(format!(
                "unchanged_columns = case when not v.is_masked then t.unchanged_columns else {} end",
                self.unresolved_mask()
            ));
        }
        for index in &self.marked {
            let column = &columns[*index];
            set.push(format!("{column} = case when v.is_masked then v.c{index} else t.{column} end"));
        }
        format!(
            "update {} as t set {} from {VERDICTS} as v where t.ctid = v.id and v.is_kept and ({changed})",
            self.table,
            set.join(", ")
        )
    }

    /// The marks of columns that no image had.
    fn unresolved_mask(&self) -> String {
        let places = self.marked.iter().filter_map(|index| Some((index, place_of(self.capture, *index)?)));
        let bytes = places.clone().map(|(_, place)| place / 8 + 1).max().unwrap_or(0);
        let empty = format!("'\\x{}'::bytea", "00".repeat(bytes));
        let mask = places.fold(empty, |mask, (index, place)| format!("set_bit({mask}, {place}, v.u{index}::integer)"));
        let unknown = any_of(self.marked.iter().map(|index| format!("v.u{index}")));
        format!("case when {unknown} then {mask} end")
    }

    /// One row per image looked at: whether it stays, and what it becomes.
    fn verdicts(&self) -> String {
        let keys: Vec<String> = (0..self.capture.schema.key.len()).map(|index| format!("k{index}")).collect();
        let by_key = keys.join(", ");
        let values: Vec<String> = (0..self.columns().len()).map(|index| format!("c{index}")).collect();
        format!(
            "with images as ({images}),
            grouped as ({grouped}),
            resolved as ({resolved}),
            pictured as (select *, row({image}) as image from resolved),
            linked as (
                select *, lag(op) over by_key as before_op, lag(lsn) over by_key as before_lsn,
                    lag(seqval) over by_key as before_seqval, lag(image) over by_key as before_image
                from pictured
                window by_key as (partition by {by_key} order by lsn, seqval)
            ),
            compared as (
                select *, op = 0 and coalesce(before_op in (0, 2, 4), false)
                    and before_image is not distinct from image and not {swept_between} as is_same
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
            from bounded",
            images = self.images(),
            grouped = self.grouped(&by_key),
            resolved = self.resolved(&by_key),
            image = values.join(", "),
            swept_between = self.swept_between(),
            is_swept = self.is_swept(),
            is_pending = self.pending.map_or("false".into(), |start| above("lsn", "seqval", &start)),
            keep_swept = self.keep_deletes,
            kept_values = self.each_marked(|index| format!(", c{index}, u{index}")),
        )
    }

    fn each_marked(&self, text: impl Fn(&usize) -> String) -> String {
        self.marked.iter().map(text).collect()
    }

    /// Images looked at: key, values, and marks of columns that have any.
    fn images(&self) -> String {
        let columns = self.columns();
        let fields = self.capture.schema.columns.fields();
        let mut condition = format!("l.op <> 5 and {}", at_or_below("l.lsn", "l.seqval", &self.horizon));
        if self.only_touched {
            let same = self.capture.schema.key.iter().map(|index| match fields[*index].is_nullable() {
                true => format!("array[n.{0}] = array[l.{0}]", columns[*index]),
                false => format!("n.{0} = l.{0}", columns[*index]),
            });
            condition.push_str(&format!(
                " and exists (select 1 from {} as n where {} and {} and {})",
                self.table,
                above("n.lsn", "n.seqval", &self.capture.horizon),
                at_or_below("n.lsn", "n.seqval", &self.horizon),
                same.collect::<Vec<_>>().join(" and ")
            ));
        }
        let mut select = String::from(
            "select l.ctid as id, l.lsn, l.seqval, l.op, \
             (extract(epoch from coalesce(l.boundary_time, l.commit_time)) * 1000000)::bigint as commit_at, \
             l.unchanged_columns is not null as is_masked",
        );
        for (index, column) in self.capture.schema.key.iter().enumerate() {
            select.push_str(&format!(", l.{} as k{index}", columns[*column]));
        }
        for (index, column) in columns.iter().enumerate() {
            select.push_str(&format!(", l.{column} as c{index}"));
        }
        select.push_str(&self.each_marked(|index| {
            let place = place_of(self.capture, *index).unwrap_or(usize::MAX);
            format!(
                ", case when l.unchanged_columns is null or octet_length(l.unchanged_columns) <= {} then false \
                 else get_bit(l.unchanged_columns, {place}) = 1 end as m{index}",
                place / 8
            )
        }));
        format!("{select} from {} as l where {condition}", self.table)
    }

    /// Numbers runs of images that end where the next one has the column's value.
    fn grouped(&self, by_key: &str) -> String {
        let groups = self.each_marked(|index| {
            format!(
                ", count(*) filter (where op in (0, 2, 4) and not m{index}) \
                 over (partition by {by_key} order by lsn, seqval) as g{index}"
            )
        });
        format!("select *{groups} from images")
    }

    /// The first image of a run has the value of them all.
    fn resolved(&self, by_key: &str) -> String {
        let mut select = String::from("select id, lsn, seqval, op, commit_at, is_masked");
        (0..self.capture.schema.key.len()).for_each(|index| select.push_str(&format!(", k{index}")));
        for index in 0..self.columns().len() {
            if self.marked.contains(&index) {
                select.push_str(&format!(
                    ", case when not m{index} then c{index} when g{index} > 0 then first_value(c{index}) \
                     over (partition by {by_key}, g{index} order by lsn, seqval) end as c{index}, \
                     m{index} and g{index} = 0 as u{index}"
                ));
            } else {
                select.push_str(&format!(", c{index}"));
            }
        }
        select + " from grouped"
    }

    /// Whether a finished snapshot removed the row that the image before had left.
    fn swept_between(&self) -> String {
        let swept = self.finished.iter().map(|progress| {
            format!(
                "(not {} and {})",
                above("before_lsn", "before_seqval", &progress.start),
                above("lsn", "seqval", &progress.end)
            )
        });
        any_of(swept)
    }

    fn is_swept(&self) -> String {
        let swept = self.finished.iter();
        any_of(swept.map(|progress| format!("not {}", above("touched_lsn", "touched_seqval", &progress.start))))
    }
}

fn any_of(conditions: impl Iterator<Item = String>) -> String {
    let conditions: Vec<String> = conditions.collect();
    if conditions.is_empty() { "false".into() } else { format!("({})", conditions.join(" or ")) }
}
