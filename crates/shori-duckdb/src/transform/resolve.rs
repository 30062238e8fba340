//! Fills in what partial images lack, from the image before or from state.
//!
//! Images form lines: the images of a key, one after the other. A line goes on over a changed key, where an image of the
//! old key (op 3) is directly followed by the partial image of the new one, and ends where a row is gone. Along a line,
//! a column holds what the last image that has it says; before the first one, what state says.

use shori_core::Result;

use super::session::Session;
use super::staging::Staged;
use super::tables::{MASK_BITS, comma};

pub(super) fn resolve(session: &Session, staged: &Staged) -> Result<()> {
    find_parts(session, staged)?;
    find_lines(session)?;
    let columns = staged.masked_columns();
    find_values(session, staged, &columns)?;
    let (table, rows) = (&staged.table, staged.table.staged());
    let set = comma(columns.iter().map(|&index| {
        let (name, word, bit) = (table.name_of(index), index / MASK_BITS, index % MASK_BITS);
        format!("{name} = case when (r.__mask_{word} >> {bit}) & 1 = 1 then x.{name}.v else r.{name} end")
    }));
    session.run(&format!("update {rows} r set {set} from step_resolved x where x.__n = r.__n"))
}

/// Makes `step_parts`: the part of a line that each image belongs to, named by its first one.
fn find_parts(session: &Session, staged: &Staged) -> Result<()> {
    let (table, rows) = (&staged.table, staged.table.staged());
    let keys = table.keys("");
    let masked = (0..table.mask_words()).map(|word| format!("__mask_{word} <> 0")).collect::<Vec<_>>().join(" or ");
    session.run(&format!(
        "create or replace temp table step_parts as
         with images as (
             select {keys}, __n, __op, __commit, ({masked}) as __partial,
                 lag(__op) over (partition by {keys} order by __n) as __op_before,
                 lag(__op) over (order by __n) as __beside_op,
                 lag(__commit) over (order by __n) as __beside_commit
             from {rows}
         ),
         starts as (
             select *, coalesce(__partial and __op = 4 and __beside_op = 3 and __beside_commit = __commit, false)
                 as __linked
             from images
         )
         select {keys}, __n, __partial, __op_before is null as __first, __linked,
             max(case when __linked or __op_before is null or __op_before in (1, 3) then __n end)
                 over (partition by {keys} order by __n) as __part
         from starts"
    ))
}

/// Makes `step_lines`: the line that each part belongs to.
fn find_lines(session: &Session) -> Result<()> {
    session.run(
        "create or replace temp table step_lines as
         with recursive links as (
             select p.__part, b.__part as __parent from step_parts p join step_parts b on b.__n = p.__n - 1
             where p.__linked
         ),
         lines(__part, __line) as (
             select distinct __part, __part from step_parts where __part not in (select __part from links)
             union all
             select k.__part, l.__line from links k join lines l on l.__part = k.__parent
         )
         select * from lines",
    )
}

/// Makes `step_resolved`: for partial images, what each of `columns` holds there.
fn find_values(session: &Session, staged: &Staged, columns: &[usize]) -> Result<()> {
    let (table, rows) = (&staged.table, staged.table.staged());
    let values = comma(columns.iter().map(|&index| {
        let name = table.name_of(index);
        format!(
            "last_value(case when not r.__lacks_{index} then {{'v': r.{name}}} end ignore nulls) over line as {name}"
        )
    }));
    let lacks = |index: &usize| {
        let (word, bit) = (index / MASK_BITS, index % MASK_BITS);
        format!("r.__op in (1, 3) or (r.__mask_{word} >> {bit}) & 1 = 1 as __lacks_{index}")
    };
    session.run(&format!(
        "create or replace temp table step_resolved as
         select * from (
             select r.__n, r.__partial, {values}
             from (
                 select l.__line, p.__n, p.__partial, {image_columns}, {lacks}
                 from {rows} r join step_parts p on p.__n = r.__n join step_lines l on l.__part = p.__part
                 union all
                 select p.__part, -1, false, {state_columns}, {has}
                 from step_parts p join step_found f on {matches}
                 where p.__first and not p.__linked
             ) r
             window line as (partition by r.__line order by r.__n)
         ) where __partial",
        image_columns = comma(columns.iter().map(|&index| format!("r.{}", table.name_of(index)))),
        lacks = comma(columns.iter().map(lacks)),
        state_columns = comma(columns.iter().map(|&index| format!("f.{}", table.name_of(index)))),
        has = comma(columns.iter().map(|_| "false".to_string())),
        matches = table.key_match("p", "f"),
    ))
}
