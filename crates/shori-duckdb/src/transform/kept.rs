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
    /// Where the next one of the key begins.
    pub end: Option<Micros>,
    /// It is the key's first one since the checkpoint.
    pub is_first: bool,
}

/// Gives `take` every version since the checkpoint, key by key, each in its order.
pub(super) fn versions(
    connection: &Connection,
    table: &Table,
    ranges: &Ranges,
    mut take: impl FnMut(&KeptVersion) -> Result<()>,
) -> Result<()> {
    let reading = |cause| failure("read", cause);
    let sql = format!(
        "select id, capture, k, boundary, op, existed, v from version_{} where id >= ? order by k, id",
        table.number
    );
    let mut statement = connection.prepare_cached(&sql).map_err(reading)?;
    let mut rows = statement.query([ranges.lowest(table) << STEP_SHIFT]).map_err(reading)?;
    let mut last: Option<(Key, i64, KeptVersion)> = None;
    while let Some(row) = rows.next().map_err(reading)? {
        let (id, capture): (i64, CaptureNumber) = (row.get(0).map_err(reading)?, row.get(1).map_err(reading)?);
        let step = id >> STEP_SHIFT;
        if !ranges.hold(capture, step) {
            continue;
        }
        let key: Key = row.get(2).map_err(reading)?;
        let mut version = KeptVersion {
            op: Op::from_u8(row.get(4).map_err(reading)?)?,
            existed: row.get(5).map_err(reading)?,
            boundary: row.get(3).map_err(reading)?,
            row: Row::read(blob(row, 6)?)?,
            end: None,
            is_first: true,
        };
        match last.take() {
            Some((of, at, before)) if of == key && at == step && before.row.head.lsn == version.row.head.lsn => {
                (version.existed, version.is_first) = (before.existed, before.is_first);
            }
            Some((of, _, mut before)) if of == key => {
                before.end = Some(version.boundary);
                version.is_first = !give_version(&before, &mut take)? && before.is_first;
            }
            Some((_, _, before)) => drop(give_version(&before, &mut take)?),
            None => {}
        }
        last = Some((key, step, version));
    }
    if let Some((_, _, version)) = &last {
        give_version(version, &mut take)?;
    }
    Ok(())
}

/// Parts of one commit may come to nothing: it found no row and left none. Returns whether it is a version.
fn give_version(version: &KeptVersion, take: &mut impl FnMut(&KeptVersion) -> Result<()>) -> Result<bool> {
    let counts = version.existed || version.op.leaves_row();
    if counts {
        take(version)?;
    }
    Ok(counts)
}
