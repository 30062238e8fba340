//! What steps changed, read back: put together per key over all steps above a checkpoint.
//!
//! Read in key order, so that no more than one key's changes are in memory at a time.

use rusqlite::Connection;
use shori_core::Result;
use shori_core::change::Op;
use shori_core::position::Micros;

use super::advance::{Row, STEP_SHIFT};
use super::file::failure;
use super::key::Key;
use super::rows::blob;
use super::steps::Ranges;
use super::tables::{CaptureNumber, Table};

/// A key's row at the checkpoint and now.
pub(super) struct Net {
    pub key: Key,
    pub before: Option<Row>,
    pub after: Option<Row>,
}

/// Gives `take` what has become of each key that was touched. One that was nowhere before or after is left out.
pub(super) fn nets(
    connection: &Connection,
    table: &Table,
    ranges: &Ranges,
    mut take: impl FnMut(Net) -> Result<()>,
) -> Result<()> {
    let reading = |cause| failure("read", cause);
    let sql = format!("select id, capture, k, before, after from net_{} where id >= ? order by k, id", table.number);
    let mut statement = connection.prepare_cached(&sql).map_err(reading)?;
    let mut rows = statement.query([ranges.lowest(table) << STEP_SHIFT]).map_err(reading)?;
    let mut net: Option<Net> = None;
    while let Some(row) = rows.next().map_err(reading)? {
        let (id, capture): (i64, CaptureNumber) = (row.get(0).map_err(reading)?, row.get(1).map_err(reading)?);
        if !ranges.hold(capture, id >> STEP_SHIFT) {
            continue;
        }
        let key: Key = row.get(2).map_err(reading)?;
        let after = optional(row, 4)?;
        match &mut net {
            Some(net) if net.key == key => net.after = after,
            _ => give(net.replace(Net { key, before: optional(row, 3)?, after }), &mut take)?,
        }
    }
    give(net, &mut take)
}

fn give(net: Option<Net>, take: &mut impl FnMut(Net) -> Result<()>) -> Result<()> {
    match net.filter(|net| net.before.is_some() || net.after.is_some()) {
        Some(net) => take(net),
        None => Ok(()),
    }
}

fn optional(row: &rusqlite::Row<'_>, index: usize) -> Result<Option<Row>> {
    let value = row.get_ref(index).map_err(|cause| failure("read", cause))?;
    match value.data_type() {
        rusqlite::types::Type::Null => Ok(None),
        _ => Row::read(blob(row, index)?).map(Some),
    }
}

/// One version of a key.
pub(super) struct KeptVersion {
    pub op: Op,
    /// The key had a row before it.
    pub existed: bool,
    pub boundary: Micros,
    pub row: Row,
    /// It is the key's first one since the checkpoint.
    pub is_first: bool,
    /// Of the first one: the row at the checkpoint, where that is asked for.
    pub before: Option<Row>,
}

/// Gives `take` every version since the checkpoint, key by key, each in its order.
pub(super) fn versions(
    connection: &Connection,
    table: &Table,
    ranges: &Ranges,
    with_before: bool,
    mut take: impl FnMut(KeptVersion) -> Result<()>,
) -> Result<()> {
    let reading = |cause| failure("read", cause);
    let mut statement = connection.prepare_cached(&versions_query(table, with_before)).map_err(reading)?;
    let lowest = ranges.lowest(table) << STEP_SHIFT;
    let mut rows = statement.query(rusqlite::named_params! { ":lowest": lowest }).map_err(reading)?;
    let mut last: Option<(Key, i64, KeptVersion)> = None;
    let mut found: Option<(Key, Option<Row>)> = None;
    while let Some(row) = rows.next().map_err(reading)? {
        let (id, capture): (i64, CaptureNumber) = (row.get(0).map_err(reading)?, row.get(1).map_err(reading)?);
        let step = id >> STEP_SHIFT;
        if !ranges.hold(capture, step) {
            continue;
        }
        let key: Key = row.get(2).map_err(reading)?;
        let Some(op) = row.get(4).map_err(reading)? else {
            // Of several, the first tells what stood.
            if found.as_ref().is_none_or(|(of, _)| *of != key) {
                found = Some((key, optional(row, 6)?));
            }
            continue;
        };
        let mut version = KeptVersion {
            op: Op::from_u8(op)?,
            existed: row.get(5).map_err(reading)?,
            boundary: row.get(3).map_err(reading)?,
            row: Row::read(blob(row, 6)?)?,
            is_first: true,
            before: None,
        };
        match last.take() {
            Some((of, at, before)) if of == key && at == step && before.row.head.lsn == version.row.head.lsn => {
                (version.existed, version.is_first, version.before) = (before.existed, before.is_first, before.before);
            }
            Some((of, _, before)) if of == key => {
                version.is_first = before.is_first && !counts(&before);
                give_version(before, &mut take)?;
            }
            last => {
                if let Some((_, _, before)) = last {
                    give_version(before, &mut take)?;
                }
                version.before = found.take().filter(|(of, _)| *of == key).and_then(|(_, row)| row);
            }
        }
        last = Some((key, step, version));
    }
    last.map_or(Ok(()), |(_, _, version)| give_version(version, &mut take))
}

/// In key order, the rows before each key's versions.
fn versions_query(table: &Table, with_before: bool) -> String {
    let number = table.number;
    let versions =
        format!("select id, capture, k, boundary, op, existed, v, 1 as part from version_{number} where id >= :lowest");
    if !with_before {
        return format!("{versions} order by k, id");
    }
    let before =
        format!("select id, capture, k, null, null, null, before, 0 as part from net_{number} where id >= :lowest");
    format!("{before} union all {versions} order by k, part, id")
}

/// Parts of one commit may come to nothing: it found no row and left none.
fn counts(version: &KeptVersion) -> bool {
    version.existed || version.op.leaves_row()
}

fn give_version(version: KeptVersion, take: &mut impl FnMut(KeptVersion) -> Result<()>) -> Result<()> {
    if counts(&version) { take(version) } else { Ok(()) }
}
