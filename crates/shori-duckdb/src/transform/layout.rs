//! The tables of a state file: how they are made, and how they grow. Not permanent: see [`file`](super::file).
//!
//! | table | content |
//! |---|---|
//! | `owner` | id of the store that the state belongs to |
//! | `opened` | the start of the machine since which the file is open |
//! | `captures` | number of each capture, its table and that table's shape |
//! | `applied` | how far each capture has been applied |
//! | `steps` | where each capture stood after each step, and whether its changes were kept |
//! | `results` | per `sql` projection: its definition and the checkpoint that `result_<number>` belongs to, with what `result_log` adds |
//! | `state_<table>` | current rows by key, with the capture and snapshot generation that they belong to |
//! | `tomb_<table>` | last boundary of each deleted key, so that a later version never overlaps |
//! | `index_<number>` | keys of `state_<table>` by what a column holds, for entities that are reached by it |
//! | `net_<table>` | per step and key, the row before and after it |
//! | `version_<table>` | per step, key and commit, the image that the commit left, and its boundary |
//! | `result_<number>` | what the target holds, where the next output is derived from it |

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rusqlite::Connection;
use shori_core::position::CaptureId;
use shori_core::projection::{Derivation, EntityPath, Maintenance, Projection};
use shori_core::schema::TableSchema;
use shori_core::transform::StateTable;
use shori_core::{Error, ErrorKind, Result};

use super::file::{self, CREATE_CONTROL, execute, number, rows, run, transaction};
use super::key::Key;
use super::rows::blob;
use super::tables::{CaptureNumber, Head, Index, Table};

/// Everything that work is done by; replaced as a whole by each opening.
#[derive(Clone, Default)]
pub(super) struct Layout {
    pub store_id: String,
    pub tables: BTreeMap<Arc<str>, Arc<Table>>,
    pub projections: BTreeMap<Arc<str>, Projection>,
}

impl Layout {
    pub fn projection(&self, name: &str) -> Result<&Projection> {
        self.projections.get(name).ok_or_else(|| {
            Error::new(ErrorKind::Internal, "compute", format!("projection {name}"), "the cache was not opened with it")
        })
    }

    pub fn table(&self, name: &str) -> Result<&Arc<Table>> {
        self.tables.get(name).ok_or_else(|| {
            Error::new(ErrorKind::Projection, "read", format!("table {name}"), "no capture of that name is configured")
        })
    }

    pub fn tables_of(&self, projection: &Projection) -> Result<Vec<Arc<Table>>> {
        projection.tables().iter().map(|name| self.table(name).cloned()).collect()
    }

    pub fn capture(&self, id: &CaptureId) -> Result<(CaptureNumber, &Arc<Table>)> {
        for table in self.tables.values() {
            if let Some((number, _)) = table.captures.iter().find(|(_, known)| known == id) {
                return Ok((*number, table));
            }
        }
        Err(Error::new(ErrorKind::Internal, "apply", format!("capture {id}"), "the cache was not opened with it"))
    }
}

/// Makes the file hold what `tables` and `projections` need. A shape that does not fit empties it first.
pub(super) fn open(
    connection: &Connection,
    store_id: &str,
    tables: &[StateTable],
    projections: &[Projection],
) -> Result<Layout> {
    let owners = rows(connection, "select store_id from owner", &[], |row| row.get::<_, String>(0))?;
    if owners.first().is_some_and(|stored| stored != store_id) {
        tracing::info!("the state belongs to another store and starts afresh");
        clear(connection)?;
    }
    let layout = match grown(connection, store_id, tables, projections) {
        Err(error) if error.kind() == ErrorKind::Schema => {
            tracing::info!(%error, "the state has another shape and starts afresh");
            clear(connection)?;
            grown(connection, store_id, tables, projections)?
        }
        outcome => outcome?,
    };
    drop_stale_results(connection, &layout)?;
    Ok(layout)
}

/// Drops all tables of the file.
pub(super) fn clear(connection: &Connection) -> Result<()> {
    let names =
        rows(connection, "select name from sqlite_master where type = 'table'", &[], |row| row.get::<_, String>(0))?;
    transaction(connection, || {
        for name in names {
            run(connection, &format!("drop table {name}"))?;
        }
        run(connection, CREATE_CONTROL)
    })
}

fn grown(connection: &Connection, store_id: &str, wanted: &[StateTable], projections: &[Projection]) -> Result<Layout> {
    transaction(connection, || {
        let mut tables = stored_tables(connection)?;
        execute(connection, "delete from owner", &[])?;
        execute(connection, "insert into owner values (?)", &[&store_id])?;
        for StateTable { capture, schema } in wanted {
            let next = tables.values().map(|table| table.number).max().unwrap_or(0) + 1;
            let table = tables.entry(schema.table.clone()).or_insert_with(|| Table::new(next, schema));
            create(connection, table)?;
            table.columns.extend(table.added_by(schema)?);
            if !table.captures.iter().any(|(_, known)| known == capture) {
                table.captures.push((add_capture(connection, capture, table.number)?, capture.clone()));
            }
            let shape = table.schema().to_json();
            execute(connection, "update captures set shape = ? where table_number = ?", &[&shape, &table.number])?;
        }
        for projection in projections {
            if let Derivation::History(history) = &projection.derivation
                && let Some(table) = tables.get_mut(&history.table)
            {
                table.has_history = true;
            }
        }
        for table in tables.values_mut() {
            table.indexes = indexes(connection, table, projections)?;
        }
        Ok(Layout {
            store_id: store_id.to_string(),
            tables: tables.into_iter().map(|(name, table)| (name, Arc::new(table))).collect(),
            projections: projections.iter().map(|projection| (projection.name.clone(), projection.clone())).collect(),
        })
    })
}

fn add_capture(connection: &Connection, id: &CaptureId, table: i64) -> Result<CaptureNumber> {
    let last = number(connection, "select max(number) from captures", &[])?;
    let number = CaptureNumber::try_from(last + 1)
        .map_err(|cause| Error::new(ErrorKind::Usage, "keep", format!("capture {id}"), cause))?;
    let (source, instance) = (&*id.source, &*id.instance);
    execute(connection, "insert into captures values (?, ?, ?, ?, null)", &[&number, &source, &instance, &table])?;
    execute(connection, "insert into steps values (0, ?, x'', x'', true, true, 0)", &[&number])?;
    Ok(number)
}

fn stored_tables(connection: &Connection) -> Result<BTreeMap<Arc<str>, Table>> {
    let sql = "select number, source, instance, table_number, shape from captures order by number";
    let stored = rows(connection, sql, &[], |row| {
        let id = CaptureId::new(&row.get::<_, String>(1)?, &row.get::<_, String>(2)?);
        Ok((row.get::<_, CaptureNumber>(0)?, id, row.get::<_, i64>(3)?, row.get::<_, String>(4)?))
    })?;
    let mut tables = BTreeMap::new();
    for (number, id, table_number, shape) in stored {
        let schema = TableSchema::from_json(&shape)?;
        let table = tables.entry(schema.table.clone()).or_insert_with(|| Table::new(table_number, &schema));
        table.captures.push((number, id));
    }
    Ok(tables)
}

fn create(connection: &Connection, table: &Table) -> Result<()> {
    let (number, by_number) = (table.number, table.has_number_key());
    let key = if by_number { "k integer primary key" } else { "k primary key" };
    let tail = if by_number { "" } else { " without rowid" };
    run(
        connection,
        &format!(
            "create table if not exists state_{number} ({key}, capture integer, generation integer, v blob){tail};
             create table if not exists tomb_{number} ({key}, boundary integer){tail};
             create table if not exists net_{number} (
                 id integer primary key, capture integer, k, before blob, after blob
             );
             create table if not exists version_{number} (
                 id integer primary key, capture integer, k, boundary integer, op integer, existed integer, v blob
             );"
        ),
    )
}

/// Columns of `table` by which projections find its rows.
fn sought(table: &Table, projections: &[Projection]) -> BTreeSet<usize> {
    let mut columns = BTreeSet::new();
    for projection in projections {
        let Derivation::Sql(sql) = &projection.derivation else { continue };
        let Maintenance::ByEntity { entity, .. } = &sql.maintenance else { continue };
        for (name, path) in &entity.paths {
            match path {
                EntityPath::Column(column) if *name == table.name => columns.extend(table.index_of(column)),
                EntityPath::Column(_) => {}
                EntityPath::Through { table: other, own_column, their_column } => {
                    if *name == table.name {
                        columns.extend(table.index_of(own_column));
                    }
                    if *other == table.name {
                        columns.extend(table.index_of(their_column));
                    }
                }
            }
        }
    }
    columns.retain(|&column| table.key != [column]);
    columns
}

/// Makes the indexes that are missing and lets go of those that nobody uses.
fn indexes(connection: &Connection, table: &Table, projections: &[Projection]) -> Result<Vec<Index>> {
    let sql = "select number, name from indexes where table_number = ?";
    let stored = rows(connection, sql, &[&table.number], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?)))?;
    let wanted = sought(table, projections);
    let mut kept = Vec::new();
    for (number, name) in stored {
        match table.index_of(&name).filter(|column| wanted.contains(column)) {
            Some(column) => kept.push(Index { number, column }),
            None => {
                execute(connection, "delete from indexes where number = ?", &[&number])?;
                run(connection, &format!("drop table index_{number}"))?;
            }
        }
    }
    for column in wanted {
        if kept.iter().all(|index| index.column != column) {
            kept.push(make_index(connection, table, column)?);
        }
    }
    Ok(kept)
}

fn make_index(connection: &Connection, table: &Table, column: usize) -> Result<Index> {
    let index = Index { number: number(connection, "select max(number) from indexes", &[])? + 1, column };
    let name = table.columns[column].name();
    execute(connection, "insert into indexes values (?, ?, ?)", &[&table.number, &name, &index.number])?;
    run(connection, &format!("create table index_{} (v, k, primary key (v, k)) without rowid", index.number))?;
    let reading = |cause| file::failure("index", cause);
    let mut select = connection.prepare(&format!("select k, v from state_{}", table.number)).map_err(reading)?;
    let insert = format!("insert into index_{} values (?, ?)", index.number);
    let mut insert = connection.prepare(&insert).map_err(reading)?;
    let mut rows = select.query([]).map_err(reading)?;
    while let Some(row) = rows.next().map_err(reading)? {
        let mut cells = Vec::new();
        Head::read(blob(row, 1)?)?.1.collect(table.columns.len(), &mut cells)?;
        let (value, key): (Key, Key) = (table.value_of(column, &cells)?, row.get(0).map_err(reading)?);
        insert.execute(rusqlite::params![value, key]).map_err(reading)?;
    }
    Ok(index)
}

/// A result belongs to the very query that it was made by.
fn drop_stale_results(connection: &Connection, layout: &Layout) -> Result<()> {
    let stored = rows(connection, "select projection, definition from results", &[], |row| {
        Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
    })?;
    for (name, definition) in stored {
        let current = layout.projections.get(name.as_str()).map(|projection| projection.definition());
        if current.as_ref() != Some(&definition) {
            transaction(connection, || super::results::forget(connection, &name))?;
        }
    }
    Ok(())
}
