//! Tables as they stand, in DuckDB: for queries that run in full.
//!
//! A mirror is made from the state file when a query first needs it. It stays, and follows the steps, as long as some
//! projection is computed in full at each of them; others let go of it at once. What does not fit into memory spills.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema};
use rusqlite::Connection;
use shori_core::Result;
use shori_core::projection::SqlProjection;

use super::cells::Cells;
use super::file::number;
use super::kept;
use super::layout::Layout;
use super::rows::scan;
use super::session::{Loader, Session, WORK, WorkTable};
use super::steps::{self, Ranges};
use super::tables::{CaptureNumber, Table};
use crate::database::quote_name;

/// The schema in which a projection's query sees every table as it stands.
pub(super) const LIVE: &str = "live";

/// Which mirrors are filled, and after which step they stand.
#[derive(Default)]
pub(super) struct Mirrors(BTreeMap<Arc<str>, i64>);

impl Mirrors {
    /// Gives every table its name, without rows.
    pub fn open(&mut self, session: &Session, layout: &Layout) -> Result<()> {
        self.0.clear();
        session.run(&format!("drop schema if exists {WORK}.{LIVE} cascade; create schema {WORK}.{LIVE}"))?;
        layout.tables.values().try_for_each(|table| session.create(&mirror(table)))
    }

    /// Makes the tables of a query stand as they do in `view`.
    pub fn fill(&mut self, session: &Session, view: &Connection, layout: &Layout, sql: &SqlProjection) -> Result<()> {
        let step = steps::last(view)?;
        for name in &sql.tables {
            let table = layout.table(name)?;
            match self.0.remove(name) {
                Some(at) if at == step => {}
                Some(at) if is_kept_since(view, table, at)? => follow(session, view, table, at)?,
                _ => fill(session, view, table)?,
            }
            self.0.insert(name.clone(), step);
        }
        Ok(())
    }

    /// Lets go of the rows of tables that `is_needed` does not name.
    pub fn release(&mut self, session: &Session, layout: &Layout, is_needed: impl Fn(&str) -> bool) -> Result<()> {
        let unneeded: Vec<Arc<str>> = self.0.keys().filter(|name| !is_needed(name)).cloned().collect();
        for name in unneeded {
            self.0.remove(&name);
            session.create(&mirror(layout.table(&name)?))?;
        }
        Ok(())
    }
}

fn mirror(table: &Table) -> WorkTable {
    let mut fields: Vec<_> = table.columns.iter().map(|field| field.as_ref().clone().with_nullable(true)).collect();
    fields.push(Field::new("__lsn", DataType::Binary, true));
    WorkTable { schema: LIVE.into(), name: table.name.to_string(), columns: Arc::new(Schema::new(fields)) }
}

fn fill(session: &Session, view: &Connection, table: &Table) -> Result<()> {
    let mirror = mirror(table);
    session.create(&mirror)?;
    let mut loader = Loader::new(session, mirror)?;
    scan(view, table, |head, row| {
        let mut cells = Vec::with_capacity(table.columns.len());
        row.collect(table.columns.len(), &mut cells)?;
        loader.push(cells.into_iter().chain([Some(head.lsn.as_slice())]))
    })?;
    loader.finish()
}

/// Whether every change since step `at` is kept.
fn is_kept_since(view: &Connection, table: &Table, at: i64) -> Result<bool> {
    for (capture, _) in &table.captures {
        let oldest = number(view, "select min(step) from steps where capture = ?", &[capture])?;
        let missing = "select count(*) from steps where capture = ? and step > ? and not nets_kept";
        if oldest > at || number(view, missing, &[capture, &at])? > 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Takes touched rows out and puts them in as they are now.
fn follow(session: &Session, view: &Connection, table: &Table, at: i64) -> Result<()> {
    let mirror = mirror(table);
    let keys = table.key.iter().map(|&index| mirror.columns.field(index).clone()).collect::<Vec<_>>();
    let gone = WorkTable { schema: "main".into(), name: "gone".into(), columns: Arc::new(Schema::new(keys)) };
    let come = WorkTable { schema: "main".into(), name: "come".into(), columns: mirror.columns.clone() };
    session.create(&gone)?;
    session.create(&come)?;
    let (mut old, mut new) = (Loader::new(session, gone.clone())?, Loader::new(session, come.clone())?);
    let captures: Vec<CaptureNumber> = table.captures.iter().map(|(number, _)| *number).collect();
    kept::nets(view, table, &Ranges::all_since(&captures, at), |net| {
        let mut cells = Vec::new();
        if let Some(row) = &net.before {
            Cells(&row.cells).collect(table.columns.len(), &mut cells)?;
            old.push(table.key.iter().map(|&index| cells[index]))?;
        }
        if let Some(row) = &net.after {
            Cells(&row.cells).collect(table.columns.len(), &mut cells)?;
            new.push(cells.iter().copied().chain([Some(row.head.lsn.as_slice())]))?;
        }
        Ok(())
    })?;
    old.finish()?;
    new.finish()?;
    let same = |&index: &usize| format!("m.{0} = g.{0}", quote_name(table.columns[index].name()));
    let same = table.key.iter().map(same).collect::<Vec<_>>().join(" and ");
    session.run(&format!(
        "delete from {mirror} m using {gone} g where {same};
         insert into {mirror} from {come};
         drop table {gone};
         drop table {come}",
        mirror = mirror.full_name(),
        gone = gone.full_name(),
        come = come.full_name()
    ))
}
