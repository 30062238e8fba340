//! Versions of rows in a target: open ones are closed where they stand, new ones are copied in behind them.
//!
//! The partial unique index over current versions is how an open version is found, and holds that a key has one.

use arrow::array::RecordBatch;
use shori_core::Result;
use shori_core::projection::history;
use shori_core::store::{OutputReader, OutputRows};

use super::copy_in::Column;
use super::layout;
use super::output::{Loader, Step, columns, has_null_keys, is_empty, plan, target_names};
use super::session::{Link, Time, bytes_literal, now};
use super::target::{Nulls, has_null, same_key};
use crate::connect::quoted;

const CLOSES: &str = "pg_temp.ctl_closes";
const VERSIONS: &str = "pg_temp.ctl_versions";
/// Versions that are open, and have not come.
const ENDED: &str = "pg_temp.ctl_ended";

/// Closes, then inserts: [`OutputKind::Versions`](shori_core::store::OutputKind::Versions).
pub(super) async fn add(link: &Link, step: &Step<'_>, output: &mut dyn OutputReader) -> Result<u64> {
    let starts_empty = is_empty(link, step.table()).await?;
    let mut loader = Loader::new(link);
    let (mut closes, mut null_keys, mut written) = (0, false, 0);
    let mut opened = false;
    while let Some(part) = output.next().await? {
        match &part {
            OutputRows::Close(_) if opened => return Err(step.misplaced("closed keys")),
            OutputRows::Close(_) if starts_empty => {}
            OutputRows::Close(rows) => {
                loader.load_temporary(CLOSES, step, rows).await?;
                closes += rows.num_rows() as u64;
                null_keys |= has_null_keys(step.target, rows);
            }
            OutputRows::Version(rows) => {
                if !opened {
                    loader.finish().await?;
                    written += close(link, step, closes, null_keys).await?;
                    opened = true;
                }
                insert(&mut loader, step, rows).await?;
                written += rows.num_rows() as u64;
            }
            OutputRows::Upsert(_) | OutputRows::Delete(_) => return Err(step.misplaced("rows")),
        }
    }
    loader.finish().await?;
    if !opened {
        written += close(link, step, closes, null_keys).await?;
    }
    Ok(written)
}

/// Copies versions straight into the table.
async fn insert(loader: &mut Loader<'_>, step: &Step<'_>, rows: &RecordBatch) -> Result<()> {
    let names = target_names(step.target, rows);
    let mut columns = columns(&names, rows)?;
    columns.push(Column::text(history::BATCH_ID, step.run_id));
    columns.extend([history::CREATED_AT, history::UPDATED_AT].map(|name| Column::time(name, now())));
    loader.load(&quoted(step.table()), step.table(), &columns, rows.num_rows()).await
}

async fn close(link: &Link, step: &Step<'_>, closes: u64, null_keys: bool) -> Result<u64> {
    if closes == 0 {
        return Ok(0);
    }
    let update = |condition: &str| {
        format!(
            "update {} as t set valid_to = l.valid_to, is_current = false, updated_at = $1 \
             from {CLOSES} as l where t.is_current and {condition}",
            quoted(step.table())
        )
    };
    let mut closed = 0;
    if null_keys {
        let null = has_null(step.target, "l");
        let sql = update(&format!("{null} and {}", same_key(step.target, "t", "l", Nulls::Match)));
        closed += link.execute_of(&sql, &[&Time(now())], step.table()).await?;
    }
    plan(link, step.table(), &[CLOSES], closes).await?;
    let sql = update(&same_key(step.target, "t", "l", Nulls::Never));
    Ok(closed + link.execute_of(&sql, &[&Time(now())], step.table()).await?)
}

/// What came takes the place of what stands above the horizon:
/// [`OutputKind::ReplaceVersions`](shori_core::store::OutputKind::ReplaceVersions).
pub(super) async fn replace(link: &Link, step: &Step<'_>, output: &mut dyn OutputReader) -> Result<u64> {
    let starts_empty = is_empty(link, step.table()).await?;
    let mut loader = Loader::new(link);
    let mut loaded = 0;
    while let Some(part) = output.next().await? {
        match &part {
            OutputRows::Version(rows) if starts_empty => insert(&mut loader, step, rows).await?,
            OutputRows::Version(rows) => loader.load_temporary(VERSIONS, step, rows).await?,
            OutputRows::Close(_) => return Err(step.misplaced("closed keys")),
            OutputRows::Upsert(_) | OutputRows::Delete(_) => return Err(step.misplaced("rows")),
        }
        loaded += part.batch().num_rows() as u64;
    }
    if starts_empty {
        return loader.finish().await.map(|()| loaded);
    }
    if !loader.has(VERSIONS) {
        let none = RecordBatch::new_empty(step.target.columns.clone());
        loader.load_temporary(VERSIONS, step, &none).await?;
    }
    loader.finish().await?;
    link.run(&format!("analyze {VERSIONS}"), step.table()).await?;
    bring_in(link, step).await
}

/// In an order in which no key ever has two current versions: what goes, goes first; then versions are closed; then
/// opened.
async fn bring_in(link: &Link, step: &Step<'_>) -> Result<u64> {
    let (table, object) = (quoted(step.table()), step.table());
    let same = same_key(step.target, "t", "l", Nulls::Match) + " and t.__source_lsn = l.__source_lsn";
    let written_at = Time(now());
    let sql = format!(
        "delete from {table} as t where t.__source_lsn > {} \
         and not exists (select 1 from {VERSIONS} as l where {same})",
        bytes_literal(step.horizon.lsn.as_slice())
    );
    let mut written = link.run(&sql, object).await?;
    written += end_older(link, step, &same, written_at).await?;
    for is_current in ["not l.is_current", "l.is_current"] {
        let sql = format!(
            "update {table} as t set valid_to = l.valid_to, is_current = l.is_current, updated_at = $1 \
             from {VERSIONS} as l where {same} and {is_current} \
             and (t.valid_to is distinct from l.valid_to or t.is_current <> l.is_current)"
        );
        written += link.execute_of(&sql, &[&written_at], object).await?;
    }
    let names = step.target.columns.fields().iter().map(|field| field.name());
    let columns: Vec<String> = names.map(|name| quoted(&layout::target_column(&step.target.shape, name))).collect();
    let columns = columns.join(", ");
    let sql = format!(
        "insert into {table} ({columns}, batch_id, created_at, updated_at) select {columns}, $1::text, $2::timestamp, $2::timestamp \
         from {VERSIONS} as l where not exists (select 1 from {table} as t where {same})"
    );
    Ok(written + link.execute_of(&sql, &[&step.run_id, &written_at], object).await?)
}

/// Ends open versions that did not come: the target stood behind the log's horizon, and what ended them is not in the log
/// any more. Their key's next version may be one that came; a tombstone ends only where there is one.
async fn end_older(link: &Link, step: &Step<'_>, same: &str, written_at: Time) -> Result<u64> {
    let (table, object) = (quoted(step.table()), step.table());
    let find = format!(
        "create temporary table {} on commit drop as select t.* from {table} as t \
         where t.is_current and not exists (select 1 from {VERSIONS} as l where {same})",
        ENDED.trim_start_matches("pg_temp.")
    );
    if link.run(&find, object).await? == 0 {
        return Ok(0);
    }
    link.run(&format!("analyze {ENDED}"), object).await?;
    let key = layout::key_columns(step.target);
    let of = |row: &str| key.iter().map(|column| format!("{row}.{column}")).collect::<Vec<_>>().join(", ");
    let end = format!(
        "update {table} as t set valid_to = e.valid_to, is_current = false, updated_at = $1 \
         from (select o.surrogate_key, coalesce(min(n.valid_from), \
                 greatest($2::timestamp, o.valid_from + interval '1 microsecond')) as valid_to \
             from {ENDED} as o left join ( \
                 select {}, t.valid_from from {table} as t \
                 union all \
                 select {}, l.valid_from from {VERSIONS} as l where not exists (select 1 from {table} as t where {same}) \
             ) as n on {} and n.valid_from > o.valid_from \
             group by o.surrogate_key, o.valid_from, o.cdc_operation \
             having o.cdc_operation <> '{}' or count(n.valid_from) > 0) as e \
         where t.surrogate_key = e.surrogate_key",
        of("t"),
        of("l"),
        same_key(step.target, "n", "o", Nulls::Match),
        history::DELETE,
    );
    link.execute_of(&end, &[&written_at, &Time(step.as_of_time)], object).await
}
