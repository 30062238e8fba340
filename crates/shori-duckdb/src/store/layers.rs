//! Large targets in layers: read merged, written aside.
//!
//! A statement that looks for keys in a table of many million rows, or deletes from it, takes a fifth of a second however few
//! are meant. So what comes to a large target goes into a small overlay, and the target is a view that shows what one table
//! would. Of two overlays one is active; when it has grown, a commit lets them change places, and the one that rests is
//! [folded](super::fold) into the base beside the commits that follow. Names and meaning: [`layout`].
//!
//! Bringing a target from one form into the other changes nothing that a reader sees, so it is a transaction of its own.
//! It meets a commit of the same projection in the metadata row, and a fold in the lock that both hold.

use shori_core::projection::{Target, TargetShape, history};
use shori_core::store::target_mismatch;
use shori_core::{ErrorKind, Result};

use super::layout::{self, GONE, Side, base_table, changes_table, ends_table};
use super::session::{Session, text};
use super::{fold, target};
use crate::database::{quote_name, quote_text};
use crate::known_targets::{Known, large_from_rows};

const SELECT_ACTIVE: &str = "
select active_layer
from ctl_projection_metadata
where projection_name = ?";

const SET_ACTIVE: &str = "
update ctl_projection_metadata
set active_layer = ?
where projection_name = ?";

/// Older versions take a view for a table, and fail at it.
const SET_LAYOUT: &str = "
update ctl_store
set layout_version = ?
where layout_version < ?";

/// What a commit needs done before it can begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reform {
    /// The target is large, and an incremental output comes to it.
    Layer,
    /// Its output is compared with the whole target.
    Flatten,
    /// The active overlay is full, and the other one not folded yet.
    Fold,
}

pub(super) fn reform(session: &Session, target: &Target, reform: Reform) -> Result<()> {
    match reform {
        Reform::Layer => layer(session, target),
        Reform::Flatten => flatten(session, target),
        Reform::Fold => fold::fold(session, target),
    }
}

/// The active overlay of a layered target; `None`: it is a plain table.
pub(super) fn active(session: &Session, projection: &str) -> Result<Option<Side>> {
    let found = session.rows(SELECT_ACTIVE, &[text(projection)], projection, |row| row.get::<_, Option<String>>(0))?;
    Ok(found.into_iter().flatten().next().as_deref().and_then(Side::named))
}

fn set_active(session: &Session, projection: &str, side: Option<Side>) -> Result<()> {
    let side = side.map_or(duckdb::types::Value::Null, |side| text(side.name()));
    session.execute(SET_ACTIVE, &[side, text(projection)], projection).map(|_| ())
}

/// The tables beside the base.
fn overlays(target: &Target) -> Vec<String> {
    let name = &target.projection;
    let mut tables: Vec<String> = Side::BOTH.iter().map(|side| changes_table(name, *side)).collect();
    if target.shape == TargetShape::Versions {
        tables.extend(Side::BOTH.iter().map(|side| ends_table(name, *side)));
    }
    tables
}

/// A target that cannot be layered stays as it is, and slow.
fn layer(session: &Session, target: &Target) -> Result<()> {
    let (name, _only) = (&*target.projection, session.known_targets().folding());
    let layered = session.transaction(name, |session| layer_once(session, target));
    let known = match layered {
        Ok(()) => Known::default(),
        Err(error) if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::DiskFull | ErrorKind::Corrupt) => {
            return Err(error);
        }
        Err(error) => {
            tracing::warn!(%error, projection = name, "a large target stays one table, so that its commits are slow");
            Known { rows: large_from_rows(), stays_plain: true, ..Known::default() }
        }
    };
    session.known_targets().put(session.catalog(), name, known);
    Ok(())
}

fn layer_once(session: &Session, target: &Target) -> Result<()> {
    let name = &*target.projection;
    if active(session, name)?.is_some() {
        return Ok(());
    }
    set_active(session, name, Some(Side::A))?;
    if let Some(taken) = existing(session, &internal_tables(target))?.into_iter().next() {
        return Err(target_mismatch(name, format!("it needs a table {taken}, and there is one of that name")));
    }
    let columns = target::columns(session, name)?;
    let base = quote_name(&base_table(name));
    session.batch(&format!("alter table {} rename to {base}", quote_name(name)), name)?;
    for side in Side::BOTH {
        create_overlay(session, target, side)?;
    }
    session.batch(&create_view(target, &columns, Side::A), name)?;
    let version = duckdb::types::Value::BigInt(layout::LAYOUT_VERSION);
    session.execute(SET_LAYOUT, &[version.clone(), version], "control tables").map(|_| ())
}

/// Makes an overlay anew, empty: so no deleted rows stay behind.
pub(super) fn create_overlay(session: &Session, target: &Target, side: Side) -> Result<()> {
    let name = &*target.projection;
    let (base, changes) = (quote_name(&base_table(name)), changes_table(name, side));
    let create = format!("create or replace table {} as", quote_name(&changes));
    if target.shape == TargetShape::Rows {
        return session.batch(&format!("{create} select *, false as {GONE} from {base} limit 0"), &changes);
    }
    session.batch(&format!("{create} from {base} limit 0"), &changes)?;
    let ends = ends_table(name, side);
    let columns = format!("{}, valid_to, updated_at", key_list(target, ""));
    let sql = format!("create or replace table {} as select {columns} from {base} limit 0", quote_name(&ends));
    session.batch(&sql, &ends)
}

/// Lets the overlays change places, within a commit, if the other one is empty.
pub(super) fn swap(session: &Session, target: &Target, active: Side) -> Result<bool> {
    let name = &*target.projection;
    if holds_rows(session, target, active.other())? {
        return Ok(false);
    }
    let columns = target::columns(session, &base_table(name))?;
    session.batch(&create_view(target, &columns, active.other()), name)?;
    set_active(session, name, Some(active.other()))?;
    Ok(true)
}

pub(super) fn holds_rows(session: &Session, target: &Target, side: Side) -> Result<bool> {
    let name = &*target.projection;
    if !target::is_empty(session, &changes_table(name, side))? {
        return Ok(true);
    }
    Ok(target.shape == TargetShape::Versions && !target::is_empty(session, &ends_table(name, side))?)
}

/// What a commit that knows nothing yet counts.
pub(super) fn look(session: &Session, target: &Target, active: Side) -> Result<Known> {
    let name = &*target.projection;
    let mut tables = vec![changes_table(name, active)];
    if target.shape == TargetShape::Versions {
        tables.push(ends_table(name, active));
    }
    let counts: Vec<String> =
        tables.iter().map(|table| format!("(select count(*) from {})", quote_name(table))).collect();
    let rows = session.number(&format!("select {}", counts.join(" + ")), name)?.max(0) as u64;
    Ok(Known { rows, frozen: holds_rows(session, target, active.other())?, ..Known::default() })
}

/// Brings a layered target down to one plain table. A commit in between is folded, too.
pub(super) fn flatten(session: &Session, target: &Target) -> Result<()> {
    let _only = session.known_targets().folding();
    flatten_alone(session, target)
}

/// For who holds the lock.
pub(super) fn flatten_alone(session: &Session, target: &Target) -> Result<()> {
    let name = &*target.projection;
    loop {
        let folded = session.transaction(name, |session| {
            let Some(side) = active(session, name)? else { return Ok(0) };
            // It meets commits of the projection here.
            set_active(session, name, Some(side))?;
            Ok(fold::fold_side(session, target, side.other())? + fold::fold_side(session, target, side)?)
        })?;
        session.deleted(&base_table(name), folded);
        let is_plain = session.transaction(name, |session| {
            let Some(side) = active(session, name)? else { return Ok(true) };
            set_active(session, name, None)?;
            if holds_rows(session, target, side)? || holds_rows(session, target, side.other())? {
                set_active(session, name, Some(side))?;
                return Ok(false);
            }
            let drops: Vec<String> =
                overlays(target).iter().map(|table| format!("drop table {}", quote_name(table))).collect();
            let (view, base) = (quote_name(name), quote_name(&base_table(name)));
            let sql = format!("drop view {view}; {}; alter table {base} rename to {view}", drops.join("; "));
            session.batch(&sql, name)?;
            Ok(true)
        })?;
        session.known_targets().forget(session.catalog(), name);
        if is_plain {
            return Ok(());
        }
    }
}

/// Whether all of a layered target stands that the store has made.
pub(super) fn is_whole(session: &Session, target: &Target) -> Result<bool> {
    let tables = internal_tables(target);
    Ok(is_view(session, &target.projection)? && existing(session, &tables)?.len() == tables.len())
}

/// Drops what is left of a layered target; what somebody has put in the view's place stays.
pub(super) fn drop_layers(session: &Session, target: &Target) -> Result<()> {
    let name = &*target.projection;
    let mut names: Vec<String> = Side::BOTH.iter().map(|side| ends_table(name, *side)).collect();
    names.extend(Side::BOTH.iter().map(|side| changes_table(name, *side)));
    names.push(base_table(name));
    let mut drops: Vec<String> =
        names.iter().map(|table| format!("drop table if exists {}", quote_name(table))).collect();
    if is_view(session, name)? {
        drops.push(format!("drop view {}", quote_name(name)));
    }
    session.batch(&drops.join("; "), name)?;
    set_active(session, name, None)?;
    session.known_targets().forget(session.catalog(), name);
    Ok(())
}

fn internal_tables(target: &Target) -> Vec<String> {
    let mut tables = overlays(target);
    tables.push(base_table(&target.projection));
    tables
}

fn is_view(session: &Session, name: &str) -> Result<bool> {
    let sql = format!(
        "select count(*) from duckdb_views()
         where database_name = current_database() and schema_name = 'main' and lower(view_name) = lower({})",
        quote_text(name)
    );
    Ok(session.number(&sql, name)? > 0)
}

/// Those of the names that tables or views have.
fn existing(session: &Session, names: &[String]) -> Result<Vec<String>> {
    let list: Vec<String> = names.iter().map(|name| quote_text(&name.to_lowercase())).collect();
    let sql = format!(
        "select table_name from information_schema.tables
         where table_catalog = current_database() and table_schema = 'main' and lower(table_name) in ({})",
        list.join(", ")
    );
    session.rows(&sql, &[], "tables", |row| row.get(0))
}

/// The key columns, each behind `before`.
pub(super) fn key_list(target: &Target, before: &str) -> String {
    let names: Vec<String> = target.key.iter().map(|name| format!("{before}{}", quote_name(name))).collect();
    names.join(", ")
}

/// The statement that makes the view, with `active` above the other overlay.
fn create_view(target: &Target, columns: &[(String, String)], active: Side) -> String {
    let query = match target.shape {
        TargetShape::Rows => view_of_rows(target, columns, active),
        TargetShape::Versions => view_of_versions(target, columns, active),
    };
    format!("create or replace view {} as\n{query}", quote_name(&target.projection))
}

fn view_of_rows(target: &Target, columns: &[(String, String)], active: Side) -> String {
    let name = &target.projection;
    let columns: Vec<String> = columns.iter().map(|(column, _)| format!("r.{}", quote_name(column))).collect();
    let (columns, key) = (columns.join(", "), key_list(target, ""));
    let (base, above) = (quote_name(&base_table(name)), quote_name(&changes_table(name, active)));
    let below = quote_name(&changes_table(name, active.other()));
    let same = target::same_key(target, "r", "l");
    format!(
        "select {columns}
         from {base} r
         anti join (select {key} from {above} union all select {key} from {below}) l on {same}
         union all
         select {columns}
         from (from {below} where not {GONE}) r
         anti join {above} l on {same}
         union all
         select {columns}
         from {above} r
         where not {GONE}"
    )
}

/// An end closes the version that stands open below it. Where both overlays hold one of a key, the lower one's closes the
/// base's, and the upper one's what the lower overlay has brought. Equality alone makes the join one by hashes.
fn view_of_versions(target: &Target, columns: &[(String, String)], active: Side) -> String {
    let name = &target.projection;
    let merged: Vec<String> = columns.iter().map(|(column, _)| merged_column(column)).collect();
    let plain: Vec<String> = columns.iter().map(|(column, _)| format!("r.{}", quote_name(column))).collect();
    let (merged, plain) = (merged.join(", "), plain.join(", "));
    let (base, above) = (quote_name(&base_table(name)), quote_name(&changes_table(name, active)));
    let below = quote_name(&changes_table(name, active.other()));
    let (ends_above, ends_below) =
        (quote_name(&ends_table(name, active)), quote_name(&ends_table(name, active.other())));
    let (same, twice) = (target::same_key(target, "r", "l"), target::same_key(target, "u", "w"));
    format!(
        "select {merged}
         from {base} r
         left join (
             select *, true as is_current from {ends_below}
             union all
             select u.*, true as is_current from {ends_above} u anti join {ends_below} w on {twice}
         ) l on {same} and r.is_current = l.is_current
         union all
         select {merged}
         from {below} r
         left join (select *, true as is_current from {ends_above}) l on {same} and r.is_current = l.is_current
         union all
         select {plain}
         from {above} r"
    )
}

fn merged_column(column: &str) -> String {
    match column {
        history::VALID_TO => "coalesce(r.valid_to, l.valid_to) as valid_to".into(),
        history::IS_CURRENT => "r.is_current and l.valid_to is null as is_current".into(),
        history::UPDATED_AT => "coalesce(l.updated_at, r.updated_at) as updated_at".into(),
        other => format!("r.{}", quote_name(other)),
    }
}
