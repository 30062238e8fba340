//! The tables of a cache file: what marks it as one, how they are made, and how they grow.
//!
//! Not permanent: a file with another version is discarded and comes back from the log.
//!
//! | table | content |
//! |---|---|
//! | `cache_layout` | version, store id |
//! | `cache_captures` | number of each capture, its table and that table's shape |
//! | `applied` | how far each capture has been applied |
//! | `steps` | where each capture stood after each step, and whether its changes were kept |
//! | `settled` | per `sql` projection: its definition and the checkpoint that `result_<projection>` belongs to |
//! | `state_<table>` | current rows |
//! | `net_<table>` | per step, rows before (`__at` even: 2 x step) and after it (odd) |
//! | `delta_<table>` | per step, key and commit, the image that the commit left, and its boundary |
//! | `tomb_<table>` | last boundary of each deleted key, so that a later version never overlaps |
//! | `seen_<table>` | keys that a running snapshot found unchanged |
//! | `result_<projection>` | what the target holds, where the next output is derived from it |

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use shori_core::position::CaptureId;
use shori_core::projection::{Derivation, Projection};
use shori_core::schema::TableSchema;
use shori_core::transform::StateTable;
use shori_core::{Error, ErrorKind, Result};

use super::session::{CACHE, Session, WORK};
use super::tables::{CaptureNumber, Table, definition, lsn_bytes};
use crate::database::{Database, quote_name, quote_text};

const VERSION: i64 = 1;

/// Everything that SQL is made from; replaced as a whole by each opening.
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

/// Attaches the cache file; what is no cache, damaged, or of another layout is moved aside.
pub(super) fn attach(database: &Database, path: &Path) -> Result<()> {
    match database.attach(path, CACHE) {
        Ok(()) => {}
        Err(error) if matches!(error.kind(), ErrorKind::InUse | ErrorKind::DiskFull) => return Err(error),
        Err(error) if !path.exists() => return Err(error),
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "the state cache is unreadable and starts afresh");
            move_aside(path)?;
            database.attach(path, CACHE)?;
        }
    }
    if !is_ours(database)? {
        tracing::warn!(path = %path.display(), "the file is no state cache of this version and is moved aside");
        database.detach(CACHE)?;
        move_aside(path)?;
        database.attach(path, CACHE)?;
    }
    Ok(())
}

fn is_ours(database: &Database) -> Result<bool> {
    let session = Session::open(database)?;
    let outcome = (|| {
        let tables =
            session.number(&format!("select count(*) from duckdb_tables() where database_name = '{CACHE}'"))?;
        let layout = format!(
            "select count(*) from duckdb_tables() where database_name = '{CACHE}' and table_name = 'cache_layout'"
        );
        if session.number(&layout)? == 0 {
            return Ok(tables == 0);
        }
        Ok(session.number("select max(version) from cache_layout")? == VERSION)
    })();
    // A file whose pages cannot be read is as good as none.
    outcome.or_else(|error: Error| if error.kind() == ErrorKind::DiskFull { Err(error) } else { Ok(false) })
}

/// Keeps the file beside, so that nothing of somebody else's is lost.
fn move_aside(path: &Path) -> Result<()> {
    let suffixed = |path: &Path, suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    let fail = |cause| Error::new(ErrorKind::Corrupt, "move aside", format!("file {}", path.display()), cause);
    let log = suffixed(path, ".wal");
    if log.exists() {
        std::fs::remove_file(&log).map_err(fail)?;
    }
    std::fs::rename(path, suffixed(path, ".replaced")).map_err(fail)
}

/// Makes the file hold what `tables` and `projections` need. A shape that does not fit empties it first.
pub(super) fn open(
    session: &Session,
    store_id: &str,
    tables: &[StateTable],
    projections: &[Projection],
) -> Result<Layout> {
    if stored_id(session)?.is_some_and(|stored| stored != store_id) {
        tracing::info!("the state cache belongs to another store and starts afresh");
        clear(session)?;
    }
    let layout = match grown(session, store_id, tables, projections) {
        Err(error) if error.kind() == ErrorKind::Schema => {
            tracing::info!(%error, "the state cache has another shape and starts afresh");
            clear(session)?;
            grown(session, store_id, tables, projections)?
        }
        outcome => outcome?,
    };
    drop_stale_results(session, &layout)?;
    name_tables(session, &layout)?;
    Ok(layout)
}

fn stored_id(session: &Session) -> Result<Option<String>> {
    session.run(CREATE_CONTROL)?;
    Ok(session.rows("select store_id from cache_layout", |row| row.get(0))?.pop())
}

const CREATE_CONTROL: &str = "
create table if not exists cache_layout (version bigint, store_id varchar);
create table if not exists cache_captures (number usmallint, source varchar, instance varchar, shape varchar);
create table if not exists applied (capture usmallint, lsn blob, seq blob, time bigint);
create table if not exists steps (
    step bigint, capture usmallint, lsn blob, seq blob, nets_kept boolean, versions_kept boolean, rows bigint
);
create table if not exists settled (projection varchar, definition varchar, checkpoint varchar);
";

/// Drops all tables of the file.
pub(super) fn clear(session: &Session) -> Result<()> {
    let names = session.rows(
        &format!("select table_name from duckdb_tables() where database_name = '{CACHE}' and schema_name = 'main'"),
        |row| row.get::<_, String>(0),
    )?;
    session.transaction(|| {
        for name in names {
            session.run(&format!("drop table {CACHE}.main.{}", quote_name(&name)))?;
        }
        session.run(CREATE_CONTROL)
    })
}

fn grown(session: &Session, store_id: &str, wanted: &[StateTable], projections: &[Projection]) -> Result<Layout> {
    let (mut tables, mut last) = (stored_tables(session)?, 0);
    for table in tables.values() {
        last = table.captures.iter().map(|(number, _)| *number).fold(last, CaptureNumber::max);
    }
    session.transaction(|| {
        session.run(&format!(
            "delete from cache_layout; insert into cache_layout values ({VERSION}, {})",
            quote_text(store_id)
        ))?;
        for StateTable { capture, schema } in wanted {
            let table = tables.entry(schema.table.clone()).or_insert_with(|| Table::new(schema));
            create(session, table)?;
            for field in table.added_by(schema)? {
                add_column(session, table, &field)?;
                table.columns.push(field);
            }
            if !table.captures.iter().any(|(_, known)| known == capture) {
                last += 1;
                table.captures.push((last, capture.clone()));
                session.run(&format!(
                    "insert into cache_captures values ({last}, {}, {}, null);
                     insert into steps values (0, {last}, ''::blob, ''::blob, true, true, 0)",
                    quote_text(&capture.source),
                    quote_text(&capture.instance),
                ))?;
            }
            for (number, _) in &table.captures {
                session.run(&format!(
                    "update cache_captures set shape = {} where number = {number}",
                    quote_text(&table.schema().to_json())
                ))?;
            }
        }
        Ok(())
    })?;
    for projection in projections {
        if let Derivation::History(history) = &projection.derivation
            && let Some(table) = tables.get_mut(&history.table)
        {
            table.has_history = true;
        }
    }
    Ok(Layout {
        store_id: store_id.to_string(),
        tables: tables.into_iter().map(|(name, table)| (name, Arc::new(table))).collect(),
        projections: projections.iter().map(|projection| (projection.name.clone(), projection.clone())).collect(),
    })
}

fn stored_tables(session: &Session) -> Result<BTreeMap<Arc<str>, Table>> {
    let stored = session.rows("select number, source, instance, shape from cache_captures order by number", |row| {
        Ok((row.get(0)?, row.get::<_, String>(1)?, row.get::<_, String>(2)?, row.get::<_, String>(3)?))
    })?;
    let mut tables = BTreeMap::new();
    for (number, source, instance, shape) in stored {
        let schema = TableSchema::from_json(&shape)?;
        let table = tables.entry(schema.table.clone()).or_insert_with(|| Table::new(&schema));
        table.captures.push((number, CaptureId::new(&source, &instance)));
    }
    Ok(tables)
}

const LSN_DEFINITIONS: &str = "__lsn_a ubigint, __lsn_b ubigint, __lsn_length utinyint";

fn create(session: &Session, table: &Table) -> Result<()> {
    let (columns, key) = (table.definitions()?, table.key_definitions()?);
    session.run(&format!(
        "create table if not exists {} ({columns}, {LSN_DEFINITIONS}, __time bigint, __boundary bigint,
             __generation uinteger, __capture usmallint);
         create table if not exists {} ({key}, __boundary bigint);
         create table if not exists {} ({key}, __generation uinteger, __capture usmallint);",
        table.state(),
        table.tomb(),
        table.seen(),
    ))?;
    create_kept(session, table, "create table if not exists")
}

/// The tables of kept changes; with `create or replace table` they are emptied, and leave no deleted rows behind.
pub(super) fn create_kept(session: &Session, table: &Table, create: &str) -> Result<()> {
    let columns = table.definitions()?;
    session.run(&format!(
        "{create} {} (__at bigint, __capture usmallint, {columns}, {LSN_DEFINITIONS});
         {create} {} (__step bigint, __capture usmallint, __op utinyint, __existed boolean, {columns},
             {LSN_DEFINITIONS}, __time bigint, __boundary bigint);",
        table.net(),
        table.delta(),
    ))
}

/// Columns of these tables are always named when they are read or written: an added one stands last.
fn add_column(session: &Session, table: &Table, field: &arrow::datatypes::FieldRef) -> Result<()> {
    let definition = definition(field)?;
    for stored in [table.state(), table.net(), table.delta()] {
        session.run(&format!("alter table {stored} add column {definition}"))?;
    }
    Ok(())
}

/// A result belongs to the very query that it was made by.
fn drop_stale_results(session: &Session, layout: &Layout) -> Result<()> {
    let stored = session.rows("select projection, definition from settled", |row| {
        Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
    })?;
    for (name, definition) in stored {
        let current = layout.projections.get(name.as_str()).map(|projection| projection.definition());
        if current.as_ref() != Some(&definition) {
            session.run(&format!(
                "delete from settled where projection = {}; drop table if exists {}",
                quote_text(&name),
                result_table(&name)
            ))?;
        }
    }
    Ok(())
}

pub(super) fn result_table(projection: &str) -> String {
    format!("{CACHE}.main.{}", quote_name(&format!("result_{projection}")))
}

/// The schema in which a projection's query sees every table as it stands.
pub(super) const LIVE: &str = "live";

fn name_tables(session: &Session, layout: &Layout) -> Result<()> {
    session.run(&format!("create schema if not exists {WORK}.{LIVE}"))?;
    for table in layout.tables.values() {
        session.run(&format!(
            "create or replace view {WORK}.{LIVE}.{} as select {}, {} as __lsn from {}",
            quote_name(&table.name),
            table.list(""),
            lsn_bytes(""),
            table.state()
        ))?;
    }
    Ok(())
}
