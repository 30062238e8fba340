//! Boundaries of versions: when the image that a commit left began to hold.
//!
//! One version per key and commit: the last image of a commit counts, so a delete and insert in one commit are an
//! update. A commit that finds no row and leaves none is no version. The boundary of a key's commit is its time, but at
//! least one microsecond above the key's boundary before. Over the commits 1, 2, .. of a key with times t and the
//! boundary b before them that is boundary(i) = i + max(b, t(1) - 1, .., t(i) - i): a running maximum, so a key can have
//! any number of versions in a step.

use shori_core::Result;

use super::advance::LEAVES_ROW;
use super::session::Session;
use super::staging::Staged;
use super::tables::lsn_parts;

/// Makes `step_chain`: `__n` of each commit's last image, `__existed` (the key had a row before), `__boundary`.
pub(super) fn build(session: &Session, staged: &Staged, several: bool) -> Result<()> {
    let (table, rows) = (&staged.table, staged.table.staged());
    session.run(&format!(
        "create or replace temp table step_before as
         select {}, coalesce(f.__boundary, f.__time) as __boundary, true as __existed from step_found f
         union all
         select {}, t.__boundary, false from {} t
         semi join step_keys k on {}
         anti join step_found f on {}",
        table.keys("f"),
        table.keys("t"),
        table.tomb(),
        table.key_match("t", "k"),
        table.key_match("t", "f"),
    ))?;
    if !several {
        return session.run(&format!(
            "create or replace temp table step_chain as
             select r.__n, coalesce(b.__existed, false) as __existed,
                 greatest(r.__time, coalesce(b.__boundary + 1, r.__time)) as __boundary
             from {rows} r left join step_before b on {}
             where b.__existed or r.{LEAVES_ROW}",
            table.key_match("r", "b")
        ));
    }
    let keys = table.keys("");
    session.run(&format!(
        "create or replace temp table step_ranked as
         select i.*, b.__boundary as __before,
             coalesce(
                 lag(i.__leaves) over (partition by {of_key} order by i.__n), coalesce(b.__existed, false)
             ) as __existed,
             row_number() over (partition by {of_key} order by i.__n) as __rank
         from (
             select {keys}, max(__n) as __n, arg_max({LEAVES_ROW}, __n) as __leaves, arg_max(__time, __n) as __time
             from {rows} group by {keys}, __commit
         ) i
         left join step_before b on {matches}",
        of_key = table.keys("i"),
        matches = table.key_match("i", "b"),
    ))?;
    let idle = session.number("select count(*) from step_ranked where not (__existed or __leaves)")?;
    if idle > 0 {
        session.run(&format!(
            "create or replace temp table step_ranked as
             select * replace (row_number() over (partition by {keys} order by __n) as __rank)
             from step_ranked where __existed or __leaves"
        ))?;
    }
    session.run(&format!(
        "create or replace temp table step_chain as
         select __n, __existed,
             __rank + greatest(
                 max(__time - __rank) over (partition by {keys} order by __n rows unbounded preceding),
                 coalesce(__before, __time - __rank)
             ) as __boundary
         from step_ranked"
    ))
}

/// Keeps the step's versions, and the boundaries of keys that have no row any more. Returns how many versions.
pub(super) fn keep(session: &Session, staged: &Staged, step: i64, last: &str) -> Result<i64> {
    let (table, rows) = (&staged.table, staged.table.staged());
    let versions = session.made(&format!(
        "insert into {delta} (__step, __capture, __op, __existed, {names}, __time, __boundary)
         select {step}, r.__capture,
             case when r.__op = 0 then 0 when r.__op in (1, 3) then 1 when c.__existed then 4 else 2 end,
             c.__existed, {columns}, r.__time, c.__boundary
         from {rows} r join step_chain c on c.__n = r.__n",
        delta = table.delta(),
        names = format_args!("{}, {}", table.list(""), lsn_parts("")),
        columns = format_args!("{}, {}", table.list("r"), lsn_parts("r")),
    ))?;
    session.run(&format!(
        "delete from {tomb} t using step_keys k where {}",
        table.key_match("t", "k"),
        tomb = table.tomb()
    ))?;
    if staged.has_deletes {
        session.run(&format!(
            "insert into {} select {}, coalesce(c.__boundary, b.__boundary)
             from {last} l left join step_chain c on c.__n = l.__n left join step_before b on {}
             where l.__op in (1, 3) and (c.__boundary is not null or b.__boundary is not null)",
            table.tomb(),
            table.keys("l"),
            table.key_match("l", "b"),
        ))?;
    }
    Ok(versions)
}
