//! Applies staged changes to state, and keeps what they changed.
//!
//! Tables in memory carry a step, one logical table after the other:
//!
//! - `step_keys`: touched keys, with their number of images and the last one;
//! - `step_found`: their rows in state, each found by one scan;
//! - `step_last`: the last image of each key;
//! - `step_chain`: per key and commit, the boundary of the version (see [`chain`](super::chain)).
//!
//! Row ids hold within the transaction only: a checkpoint of the file may move rows.

use shori_core::Result;
use shori_core::change::Op;

use super::chain;
use super::resolve;
use super::session::Session;
use super::staging::{Leg, Staged};
use super::tables::{LSN_PARTS, Table, comma, lsn_literals, lsn_parts};
use crate::scattered::VECTOR_ROWS;
use crate::tail::{self, FEW_ROWS};

/// What is kept of a step for projections, beside state.
#[derive(Clone, Copy)]
pub(super) struct Kept {
    pub step: i64,
    pub nets: bool,
}

/// Images that leave a row.
pub(super) const LEAVES_ROW: &str = "__op in (0, 2, 4)";

/// Applies the changes of one table. Returns how many changes were kept.
pub(super) fn apply(session: &Session, staged: &mut Staged, legs: &[Leg], kept: Kept) -> Result<i64> {
    expand_truncates(session, staged)?;
    let table = staged.table.clone();
    for leg in legs.iter().filter(|leg| leg.table.name == table.name) {
        if let Some(time) = leg.sweep {
            sweep(session, staged, leg, time)?;
        }
    }
    if staged.rows == 0 {
        return Ok(0);
    }
    let has_masks = staged.masks.iter().any(|&word| word != 0);
    let mut keys = find_keys(session, &table)?;
    staged.tail = session.tail_of(&table.state_name())?;
    find_rows(session, &table, kept.nets || has_masks || staged.has_snapshot, staged.tail)?;
    if has_masks {
        resolve::resolve(session, staged)?;
    }
    if staged.has_snapshot && drop_known(session, staged, keys != staged.rows)? {
        keys = find_keys(session, &table)?;
        session.run(&format!(
            "create or replace temp table step_found as from step_found f semi join step_keys k on {}",
            table.key_match("f", "k")
        ))?;
    }
    if keys == 0 {
        return Ok(0);
    }
    let several = keys != staged.rows;
    let last = if several {
        session.run(&format!(
            "create or replace temp table step_last as
             select r.* from {} r semi join step_keys k on r.__n = k.__last",
            table.staged()
        ))?;
        "temp.main.step_last".to_string()
    } else {
        table.staged()
    };
    let mut kept_rows = 0;
    if table.has_history {
        chain::build(session, staged, several)?;
        kept_rows += chain::keep(session, staged, kept.step, &last)?;
    }
    if kept.nets {
        keep_nets(session, &table, kept.step, &last)?;
        kept_rows = kept_rows.max(keys);
    }
    staged.deleted_from = write_state(session, staged, &last)?;
    Ok(kept_rows)
}

/// Writes a deletion of every key that stands for each truncate, so that all later rules see only rows.
fn expand_truncates(session: &Session, staged: &mut Staged) -> Result<()> {
    if staged.truncates.is_empty() {
        return Ok(());
    }
    let (table, rows) = (&staged.table, staged.table.staged());
    let mut parts = vec![format!("select *, 0 as __order from {rows} where __op <> {}", Op::Truncate as u8)];
    for truncate in &staged.truncates {
        let head = deletion_head(table, truncate.n, truncate.commit, &format!("{}::usmallint", truncate.capture));
        parts.push(format!(
            "select {head}, {}, {} as __time, {}, 1 as __order
             from (
                 select {keys} from {} where __capture = {capture}
                 union
                 select {keys} from {rows} where __n < {} and __op <> {} and __capture = {capture}
             ) as k",
            lsn_columns(&lsn_literals(&truncate.lsn)),
            truncate.time,
            deleted_columns(table),
            table.state(),
            truncate.n,
            Op::Truncate as u8,
            keys = table.keys(""),
            capture = truncate.capture,
        ));
    }
    session.run(&format!(
        "create or replace temp table step_expanded as
         select * replace (row_number() over (order by __n, __order) - 1 as __n) from ({})",
        parts.join(" union all by name ")
    ))?;
    session.run(&format!(
        "alter table temp.main.step_expanded drop column __order;
         truncate {rows};
         insert into {rows} by name from step_expanded;
         drop table temp.main.step_expanded"
    ))?;
    staged.truncates.clear();
    staged.has_deletes = true;
    staged.rows = session.number(&format!("select count(*) from {rows}"))?;
    Ok(())
}

/// Deletes what a snapshot did not find: rows of lower generations that neither it nor anything newer touched.
fn sweep(session: &Session, staged: &mut Staged, leg: &Leg, time: i64) -> Result<()> {
    let table = staged.table.clone();
    let rows = table.staged();
    let commit = staged.next_commit();
    let gone = format!(
        "from {} s anti join {rows} r on {} anti join {} n on {} and n.__generation >= {generation}
         where s.__capture = {number} and s.__generation < {generation}",
        table.state(),
        table.key_match("s", "r"),
        table.seen(),
        table.key_match("s", "n"),
        generation = leg.generation,
        number = leg.number,
    );
    session.run(&format!(
        "insert into {rows} by name
         select row_number() over () + {} as __n, {commit} as __commit, s.__capture, {} as __generation,
             {} as __op, {}, {time} as __time, {}{}
         {gone}",
        staged.rows,
        leg.generation,
        Op::Delete as u8,
        lsn_columns(&lsn_literals(&leg.to.position.lsn)),
        mask_zeros(&table),
        table.keys("s"),
    ))?;
    session.run(&format!(
        "delete from {} where __capture = {} and __generation <= {}",
        table.seen(),
        leg.number,
        leg.generation
    ))?;
    let found = session.number(&format!("select count(*) from {rows}"))?;
    // The order goes on above the last row, with a gap where none was found.
    staged.has_deletes |= found > staged.rows;
    staged.rows = found;
    Ok(())
}

fn deletion_head(table: &Table, n: i64, commit: i64, capture: &str) -> String {
    format!(
        "{n} as __n, {commit} as __commit, {capture} as __capture, 0::uinteger as __generation,
         {}::utinyint as __op, {}",
        Op::Delete as u8,
        mask_zeros(table).trim_end_matches(", ")
    )
}

fn mask_zeros(table: &Table) -> String {
    (0..table.mask_words()).map(|word| format!("0::ubigint as __mask_{word}, ")).collect()
}

fn lsn_columns(literals: &str) -> String {
    comma(literals.split(", ").zip(LSN_PARTS).map(|(value, name)| format!("{value} as {name}")))
}

/// The key's columns from `k`, null for all others.
fn deleted_columns(table: &Table) -> String {
    comma((0..table.columns.len()).map(|index| {
        let name = table.name_of(index);
        if table.key.contains(&index) { format!("k.{name}") } else { format!("null as {name}") }
    }))
}

/// Returns the number of touched keys.
fn find_keys(session: &Session, table: &Table) -> Result<i64> {
    session.made(&format!(
        "create or replace temp table step_keys as
         select {keys}, max(__n) as __last from {} group by {keys}",
        table.staged(),
        keys = table.keys("")
    ))
}

/// Finds the rows of touched keys, in a large table in three parts: at its end, of keys beyond those there (new ones, where
/// keys grow), and the rest.
fn find_rows(session: &Session, table: &Table, whole: bool, tail: Option<i64>) -> Result<()> {
    let columns = if whole { format!("{}, {}", table.list("s"), lsn_parts("s")) } else { table.keys("s") };
    let state = table.state();
    let select = format!(
        "select s.rowid as __row, {columns}, s.__time, s.__boundary, s.__capture, s.__generation from {state} s"
    );
    let of = |keys: &str| format!("semi join {keys} k on {}", table.key_match("s", "k"));
    let Some(tail) = tail else {
        return session.run(&format!("create or replace temp table step_found as {select} {}", of("step_keys")));
    };
    let first = table.name_of(table.key[0]);
    session.run(&format!(
        "create or replace temp table step_found as {select} {} where s.rowid >= {tail};
         create or replace temp table step_rest as from step_keys k anti join step_found f on {};
         create or replace temp table step_beyond as
             from step_rest where {first} > (select max({first}) from {state} where rowid >= {tail});
         insert into step_found {select} {} where s.rowid < {tail}",
        of("step_keys"),
        table.key_match("k", "f"),
        of("step_beyond"),
    ))?;
    let sparse = session.made(&format!(
        "create or replace temp table step_sparse as from step_rest k anti join step_beyond b on {}",
        table.key_match("k", "b")
    ))?;
    if sparse == 0 {
        return Ok(());
    }
    if sparse > FEW_ROWS {
        return session.run(&format!("insert into step_found {select} {} where s.rowid < {tail}", of("step_sparse")));
    }
    session.run(&format!(
        "create or replace temp table step_rows as
             select s.rowid as __row from {state} s {} where s.rowid < {tail};
         insert into step_found {select} where s.rowid in (select __row from step_rows)",
        of("step_sparse")
    ))
}

/// Drops snapshot images that equal the row that stands where they come. Returns whether there were any.
fn drop_known(session: &Session, staged: &mut Staged, several: bool) -> Result<bool> {
    let (table, rows) = (&staged.table, staged.table.staged());
    let columns = format!("i.__n, {}, i.__generation, i.__capture, f.__generation as __standing", table.keys("i"));
    let (of_key, stands) = (table.key_match("i", "f"), table.same_row("i", "f"));
    let mut known =
        format!("select {columns} from {rows} i join step_found f on {of_key} where i.__op = 0 and {stands}");
    if several {
        // What comes before an image in the step itself is found by narrow rows: whole ones would not fit into memory
        // beside the joins.
        session.run(&format!(
            "create or replace temp table step_previous as
             select __n, __previous from (
                 select __n, __op, lag(__n) over (partition by {} order by __n) as __previous from {rows}
             ) where __op = 0 and __previous is not null",
            table.keys("")
        ))?;
        session.run(&format!(
            "create or replace temp table step_known_here as
             select {columns}
             from step_previous v join {rows} i on i.__n = v.__n join {rows} p on p.__n = v.__previous
             left join step_found f on {of_key}
             where p.{LEAVES_ROW} and {}",
            table.same_row("i", "p"),
        ))?;
        known = format!(
            "select * from ({known}) s where s.__n not in (select __n from step_previous)
             union all select * from step_known_here"
        );
    }
    let count = session.made(&format!("create or replace temp table step_known as {known}"))?;
    if count == 0 {
        return Ok(false);
    }
    session.run(&format!(
        "insert into {} select {}, __generation, __capture from step_known where __standing < __generation",
        table.seen(),
        table.keys(""),
    ))?;
    // A snapshot of a table that is known already leaves next to nothing: what is left is put anew, since deletions of
    // most rows would take more memory than the rows.
    session.run(&format!(
        "create or replace temp table {name} as select r.* from {rows} r anti join step_known k on r.__n = k.__n",
        name = rows.trim_start_matches("temp.main."),
    ))?;
    staged.rows -= count;
    Ok(true)
}

/// Keeps the rows before and after the step.
fn keep_nets(session: &Session, table: &Table, step: i64, last: &str) -> Result<()> {
    let (before, after) = (2 * step, 2 * step + 1);
    let names = format!("{}, {}", table.list(""), lsn_parts(""));
    session.run(&format!(
        "insert into {net} (__at, __capture, {names})
         select {before}, __capture, {names} from step_found
         union all
         select {after}, __capture, {names} from {last} where {LEAVES_ROW}",
        net = table.net(),
    ))
}

/// Takes the touched rows out of state and puts the last images in. Faster than updates in place, which rewrite what
/// they touch at the next checkpoint. Returns how many vectors of state lost rows.
fn write_state(session: &Session, staged: &Staged, last: &str) -> Result<i64> {
    let table = &staged.table;
    for deletion in tail::deletions(&table.state(), "step_found", "__row", staged.tail) {
        session.run(&deletion)?;
    }
    let (boundary, join) =
        if table.has_history { ("c.__boundary", "left join step_chain c on c.__n = l.__n") } else { ("null", "") };
    session.run(&format!(
        "insert into {state} ({names}, __time, __boundary, __generation, __capture)
         select {columns}, l.__time, {boundary}, l.__generation, l.__capture
         from {last} l {join}
         where l.{LEAVES_ROW}
         order by l.__n",
        state = table.state(),
        names = format_args!("{}, {}", table.list(""), lsn_parts("")),
        columns = format_args!("{}, {}", table.list("l"), lsn_parts("l")),
    ))?;
    session.number(&format!("select count(distinct __row // {VECTOR_ROWS}) from step_found"))
}
