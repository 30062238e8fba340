//! Outputs that come straight from the state file: current rows, and versions.

use arrow::datatypes::{Schema, SchemaRef};
use rusqlite::Connection;
use shori_core::Result;
use shori_core::change::Op;
use shori_core::projection::{HistoryProjection, history};
use shori_core::store::OutputRows;
use std::sync::Arc;

use super::cells::{Cell, Cells, shortened};
use super::kept;
use super::query;
use super::reader::{PartKind, Sink};
use super::rows::scan;
use super::steps::Ranges;
use super::tables::Table;

type Give<'g> = &'g mut dyn FnMut(OutputRows) -> Result<()>;

fn cells_of<'r>(table: &Table, row: &'r [u8]) -> Result<Vec<Cell<'r>>> {
    let mut cells = Vec::with_capacity(table.columns.len() + 1);
    Cells(row).collect(table.columns.len(), &mut cells)?;
    Ok(cells)
}

/// What has become of touched rows.
pub(super) fn latest(view: &Connection, table: &Table, ranges: &Ranges, give: Give<'_>) -> Result<()> {
    let mut sink = Sink::new(PartKind::Upsert, &query::latest_columns(table), give)?;
    kept::nets(view, table, ranges, |net| match &net.after {
        Some(row) => {
            let cells = cells_of(table, &row.cells)?;
            sink.push(cells.into_iter().chain([Some(row.head.lsn.as_slice())]))
        }
        None => Ok(()),
    })?;
    sink.finish()?;
    let keys: Vec<_> = table.key.iter().map(|&index| table.columns[index].clone()).collect();
    let mut sink = Sink::new(PartKind::Delete, &Arc::new(Schema::new(keys)), give)?;
    kept::nets(view, table, ranges, |net| match (&net.before, &net.after) {
        (Some(row), None) => {
            let cells = cells_of(table, &row.cells)?;
            sink.push(table.key.iter().map(|&index| cells[index]))
        }
        _ => Ok(()),
    })?;
    sink.finish()
}

/// All rows.
pub(super) fn whole_table(view: &Connection, table: &Table, give: Give<'_>) -> Result<()> {
    let mut sink = Sink::new(PartKind::Upsert, &query::latest_columns(table), give)?;
    scan(view, table, |head, row| {
        let cells = cells_of(table, row.0)?;
        sink.push(cells.into_iter().chain([Some(head.lsn.as_slice())]))
    })?;
    sink.finish()
}

/// Ends of versions that stood open, then the versions since; without ends where `is_whole`.
pub(super) fn history(
    view: &Connection,
    table: &Table,
    of: &HistoryProjection,
    ranges: &Ranges,
    is_whole: bool,
    give: Give<'_>,
) -> Result<()> {
    let columns = query::history_columns(table, &of.key);
    if !is_whole {
        let mut sink = Sink::new(PartKind::Close, &closed_columns(&columns, of), give)?;
        kept::versions(view, table, ranges, |version| {
            if !(version.is_first && version.existed) {
                return Ok(());
            }
            let cells = cells_of(table, &version.row.cells)?;
            let mut buffer = [0; 16];
            let end = shortened(version.boundary.into(), &mut buffer);
            sink.push(table.key.iter().map(|&index| cells[index]).chain([Some(end)]))
        })?;
        sink.finish()?;
    }
    let order: Vec<usize> = table.key.iter().copied().chain(query::tracked(table)).collect();
    let mut sink = Sink::new(PartKind::Version, &columns, give)?;
    kept::versions(view, table, ranges, |version| {
        if !version.op.leaves_row() {
            return Ok(());
        }
        let cells = cells_of(table, &version.row.cells)?;
        let operation: &[u8] = match version.op {
            Op::Snapshot => b"SNAPSHOT",
            _ if version.existed => b"UPDATE",
            _ => b"INSERT",
        };
        let mut buffers = [[0; 16]; 3];
        let [from, to, at] = &mut buffers;
        let own = [
            Some(shortened(version.boundary.into(), from)),
            version.end.map(|end| shortened(end.into(), to)),
            Some(if version.end.is_none() { &[1] } else { &[0] }),
            Some(operation),
            Some(shortened(version.row.head.time.into(), at)),
            Some(version.row.head.lsn.as_slice()),
        ];
        sink.push(order.iter().map(|&index| cells[index]).chain(own))
    })?;
    sink.finish()
}

fn closed_columns(columns: &SchemaRef, of: &HistoryProjection) -> SchemaRef {
    let mut fields: Vec<_> = columns.fields()[..of.key.len()].to_vec();
    fields.extend(columns.fields().iter().filter(|field| field.name() == history::VALID_TO).cloned());
    Arc::new(Schema::new(fields))
}
