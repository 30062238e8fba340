//! Versions of rows, straight from the state file.

use std::sync::Arc;

use arrow::datatypes::{Schema, SchemaRef};
use rusqlite::Connection;
use shori_core::Result;
use shori_core::change::Op;
use shori_core::position::Micros;
use shori_core::projection::{Deletes, HistoryProjection, Tracked, history};

use super::advance::Row;
use super::cells::{Cell, shortened};
use super::direct::{Give, cells_of};
use super::kept::{self, KeptVersion};
use super::query;
use super::reader::{PartKind, Sink};
use super::steps::Ranges;
use super::tables::Table;

/// What a history has to be told of.
struct Turn {
    version: KeptVersion,
    /// Where the next one of the key begins.
    end: Option<Micros>,
    /// A version of the key may stand open from before.
    ends_standing: bool,
    /// It is a version, and not just the end of one.
    opens: bool,
}

/// Whether it must be known which row stood at the checkpoint.
pub(super) fn needs_before(of: &HistoryProjection) -> bool {
    of.tracked != Tracked::All || of.deletes == Deletes::Tombstone
}

/// Ends of versions that stood open, then the versions since; without ends where `is_whole`.
pub(super) fn output(
    view: &Connection,
    table: &Table,
    of: &HistoryProjection,
    ranges: &Ranges,
    is_whole: bool,
    give: Give<'_>,
) -> Result<()> {
    let columns = query::history_columns(table, of);
    if !is_whole {
        let mut sink = Sink::new(PartKind::Close, &closed_columns(&columns, of), give)?;
        turns(view, table, of, ranges, is_whole, |turn| {
            if !turn.ends_standing {
                return Ok(());
            }
            let cells = cells_of(table, &turn.version.row.cells)?;
            let mut buffer = [0; 16];
            let end = shortened(turn.version.boundary.into(), &mut buffer);
            sink.push(table.key.iter().map(|&index| cells[index]).chain([Some(end)]))
        })?;
        sink.finish()?;
    }
    let order: Vec<usize> = table.key.iter().copied().chain(query::tracked(table, of)).collect();
    let mut sink = Sink::new(PartKind::Version, &columns, give)?;
    turns(view, table, of, ranges, is_whole, |turn| match turn.opens {
        true => push(&mut sink, table, &order, &turn),
        false => Ok(()),
    })?;
    sink.finish()
}

fn push(sink: &mut Sink<'_>, table: &Table, order: &[usize], turn: &Turn) -> Result<()> {
    let Turn { version, end, .. } = turn;
    let cells = cells_of(table, &version.row.cells)?;
    let operation: &[u8] = match version.op {
        Op::Snapshot => b"SNAPSHOT",
        op if !op.leaves_row() => history::DELETE.as_bytes(),
        _ if version.existed => b"UPDATE",
        _ => b"INSERT",
    };
    let mut buffers = [[0; 16]; 3];
    let [from, to, at] = &mut buffers;
    let own = [
        Some(shortened(version.boundary.into(), from)),
        end.map(|end| shortened(end.into(), to)),
        Some(if end.is_none() { &[1] } else { &[0] }),
        Some(operation),
        Some(shortened(version.row.head.time.into(), at)),
        Some(version.row.head.lsn.as_slice()),
    ];
    sink.push(order.iter().map(|&index| cells[index]).chain(own))
}

/// Gives `take` what the versions since the checkpoint are to the history, key by key, in their order.
fn turns(
    view: &Connection,
    table: &Table,
    of: &HistoryProjection,
    ranges: &Ranges,
    is_whole: bool,
    mut take: impl FnMut(Turn) -> Result<()>,
) -> Result<()> {
    let needs_before = needs_before(of);
    let tracked = match of.tracked {
        Tracked::All => None,
        Tracked::Only(_) | Tracked::AllBut(_) => Some(query::tracked(table, of)),
    };
    let tombstones = of.deletes == Deletes::Tombstone;
    // What stands of the key that comes, and whether anything of it may stand in the history from before.
    let (mut stands, mut may_stand): (Option<Row>, bool) = (None, false);
    let mut waiting: Option<Turn> = None;
    kept::versions(view, table, ranges, needs_before && !is_whole, |mut version| {
        if version.is_first {
            if let Some(turn) = waiting.take() {
                take(turn)?;
            }
            may_stand = version.existed || tombstones;
            stands = version.before.take();
        }
        let leaves_row = version.op.leaves_row();
        if let (true, Some(tracked), Some(before)) = (leaves_row, &tracked, &stands)
            && is_same(table, tracked, before, &version.row)?
        {
            return Ok(());
        }
        if needs_before {
            let left = leaves_row.then(|| version.row.clone());
            let gone = std::mem::replace(&mut stands, left);
            // A tombstone has the values that stood; what a deletion brings may be the key alone.
            if let (false, Some(gone)) = (leaves_row, gone) {
                version.row.cells = gone.cells;
            }
        }
        if let Some(mut turn) = waiting.take() {
            turn.end = Some(version.boundary);
            take(turn)?;
        }
        let ends_standing = std::mem::take(&mut may_stand);
        waiting = Some(Turn { version, end: None, ends_standing, opens: leaves_row || tombstones });
        Ok(())
    })?;
    waiting.map_or(Ok(()), take)
}

/// Whether two rows have the same values in `columns`.
fn is_same(table: &Table, columns: &[usize], one: &Row, other: &Row) -> Result<bool> {
    let (one, other): (Vec<Cell<'_>>, Vec<Cell<'_>>) = (cells_of(table, &one.cells)?, cells_of(table, &other.cells)?);
    Ok(columns.iter().all(|&index| one[index] == other[index]))
}

fn closed_columns(columns: &SchemaRef, of: &HistoryProjection) -> SchemaRef {
    let mut fields: Vec<_> = columns.fields()[..of.key.len()].to_vec();
    fields.extend(columns.fields().iter().filter(|field| field.name() == history::VALID_TO).cloned());
    Arc::new(Schema::new(fields))
}
