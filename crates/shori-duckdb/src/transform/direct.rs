//! Current rows, straight from the state file.

use arrow::datatypes::Schema;
use rusqlite::Connection;
use shori_core::Result;
use shori_core::store::OutputRows;
use std::sync::Arc;

use super::cells::{Cell, Cells};
use super::kept;
use super::query;
use super::reader::{PartKind, Sink};
use super::rows::scan;
use super::steps::Ranges;
use super::tables::Table;

pub(super) type Give<'g> = &'g mut dyn FnMut(OutputRows) -> Result<()>;

pub(super) fn cells_of<'r>(table: &Table, row: &'r [u8]) -> Result<Vec<Cell<'r>>> {
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
