//! The tables and triggers that capture adds to a file, and how they follow the captured tables.
//!
//! # Layout (permanent: released files have it)
//!
//! - `_shori_source`: one row: the file's random identity, and the layout's version.
//! - `_shori_captures`: a row per table ever captured: its number, in which slot each column is kept, what its triggers
//!   were made for, and up to which change its rows have been pruned.
//! - `_shori_changes`: a row per row image, in commit order, for all captures. `op` as in [`shori_core::change::Op`], or
//!   [`BEFORE`], or [`REREAD`]. A deletion holds the row as it was. An update has two rows, one after the other: the row
//!   as it was (3 where its key is gone, else [`BEFORE`]), then as it is (4). Columns `v0 …` are the slots, as many as
//!   the widest capture needs; they have no declared type, so values keep their storage class. A slot belongs to one
//!   column for ever. `autoincrement` keeps ids rising after pruning.
//! - `_shori_evicted`: scratch of the triggers, see [`crate::triggers`].
//!
//! # Following the tables
//!
//! [`apply`] compares what stands with what should, and writes only if they differ, in one immediate transaction. Where
//! changes may have gone unlogged, it leaves a [`REREAD`] row in the change table: the source reads the table again whole
//! when it comes to that row. So it is known after any crash, and exactly once, that the log lacks something. That is
//! when
//!
//! - triggers are missing or not as they were left (released, dropped with their table, rewritten by a renamed column);
//! - the key or a unique index is another one, through which rows may have been evicted unseen;
//! - an added column holds values: by its default, or written before the triggers knew it. A column that is added and
//!   still empty costs nothing.

use std::collections::BTreeSet;
use std::path::Path;

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use serde::{Deserialize, Serialize};
use shori_core::position::CaptureId;
use shori_core::schema::{SchemaChange, TableSchema};
use shori_core::source::CaptureInfo;
use shori_core::{Error, ErrorKind, Result};

use crate::connection::{Database, quote_name};
use crate::table::{self, Table};
use crate::triggers::{self, NOW};
use crate::{SqliteConfig, SqliteTable};

/// `op` of a row as an update found it, where its key still stands. It belongs to the change that follows, and is no
/// change itself.
pub(crate) const BEFORE: i64 = 8;

/// `op` of a change row that is no image: the capture's table must be read again.
pub(crate) const REREAD: i64 = 9;

const LAYOUT_VERSION: i64 = 1;

const CREATE_TABLES: &str = "
create table if not exists _shori_source (identity, layout);
create table if not exists _shori_captures (
    number integer primary key,
    table_name,
    columns,
    schema,
    shape,
    triggers,
    pruned_to
);
create table if not exists _shori_changes (id integer primary key autoincrement, capture, op, at_us);
create table if not exists _shori_evicted (capture);
insert into _shori_source (identity, layout)
select lower(hex(randomblob(16))), 1
where not exists (select 1 from _shori_source);
";

const ADD_CAPTURE: &str = "insert into _shori_captures (table_name, pruned_to) values (?1, 0) returning number";

const SET_CAPTURE: &str = "
update _shori_captures
set columns = ?2, schema = ?3, shape = ?4, triggers = ?5
where number = ?1
";

const TRIGGERS_OF: &str = "
select name, tbl_name, sql from sqlite_schema
where type = 'trigger' and name glob '_shori_' || ?1 || '_*'
order by name
";

/// What capture found or made.
#[derive(Debug)]
pub struct Installed {
    /// Names this very file.
    pub identity: String,
    pub captures: Vec<CaptureInfo>,
    /// Tables that cannot be captured, each with the reason.
    pub failed: Vec<(CaptureId, Error)>,
    /// Whether anything had to be written.
    pub changed: bool,
}

/// Makes capture ready: what a source does when it starts. Does nothing where all is in place.
pub fn install(config: &SqliteConfig) -> Result<Installed> {
    let mut database = Database::open(&config.path, config.busy_timeout)?;
    let applied = apply(&mut database, config, &BTreeSet::new())?;
    let captures = applied.captures.iter();
    Ok(Installed {
        identity: applied.identity,
        captures: captures.map(|layout| layout.info(&config.source_name)).collect(),
        failed: applied.failed,
        changed: applied.changed,
    })
}

/// Takes the triggers off a table, so that its columns can be dropped. Changes are not seen until capture is installed
/// again; the table is read again whole then.
pub fn release(path: &Path, table: &str) -> Result<()> {
    let config = SqliteConfig::new(path, "", Vec::new());
    let mut database = Database::open(path, config.busy_timeout)?;
    let fail = database.fail("release a table of");
    let transaction = database.connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(&fail)?;
    let captured = has_layout(&transaction).map_err(&fail)?;
    let stored = if captured { Stored::of_table(&transaction, table)? } else { None };
    let stored = stored.ok_or_else(|| {
        Error::new(ErrorKind::Usage, "release", format!("table {table}"), "it is not captured")
            .with_remedy("give the name of a captured table")
    })?;
    drop_triggers(&transaction, stored.number).map_err(&fail)?;
    transaction.commit().map_err(&fail)
}

/// The capture side of a file, at one schema version.
pub(crate) struct Applied {
    pub identity: String,
    pub schema_version: i64,
    pub captures: Vec<Layout>,
    pub failed: Vec<(CaptureId, Error)>,
    pub changed: bool,
}

/// A captured table, and where its values are kept.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub number: i64,
    pub table: Table,
    /// Slot of each column.
    pub slots: Vec<usize>,
}

impl Layout {
    pub fn info(&self, source: &str) -> CaptureInfo {
        CaptureInfo { id: CaptureId::new(source, &self.table.name), schema: self.table.schema.clone() }
    }
}

/// Brings capture in line with the tables. `accept` names tables that may have another key or column type than before,
/// because they are about to be read anew.
pub(crate) fn apply(database: &mut Database, config: &SqliteConfig, accept: &BTreeSet<String>) -> Result<Applied> {
    let fail = database.fail("install capture in");
    check_names(config)?;
    set_write_ahead(database)?;
    let connection = &mut database.connection;
    let reading = connection.transaction().map_err(&fail)?;
    let found = if has_layout(&reading).map_err(&fail)? { Some(plan(&reading, config, accept)?) } else { None };
    reading.finish().map_err(&fail)?;
    if let Some(found) = found
        && found.steps.is_empty()
    {
        return Ok(found.applied);
    }
    let writing = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(&fail)?;
    writing.execute_batch(CREATE_TABLES).map_err(&fail)?;
    let mut plan = plan(&writing, config, accept)?;
    for step in &plan.steps {
        step.write(&writing, &mut plan.applied).map_err(&fail)?;
    }
    plan.applied.schema_version = schema_version(&writing).map_err(&fail)?;
    plan.applied.changed = true;
    writing.commit().map_err(&fail)?;
    Ok(plan.applied)
}

fn check_names(config: &SqliteConfig) -> Result<()> {
    let mut names = BTreeSet::new();
    match config.tables.iter().find(|table| !names.insert(table.name.to_ascii_lowercase())) {
        Some(table) => {
            let cause = "it is named twice";
            Err(Error::new(ErrorKind::Usage, "capture", format!("table {}", table.name), cause)
                .with_remedy("name each table once"))
        }
        None => Ok(()),
    }
}

/// With a write-ahead log, readers and the writer do not wait for each other.
fn set_write_ahead(database: &Database) -> Result<()> {
    let fail = database.fail("set journal_mode of");
    let connection = &database.connection;
    let mode: String = connection.query_row("pragma journal_mode", [], |row| row.get(0)).map_err(&fail)?;
    if mode != "wal" {
        let mode: String = connection.query_row("pragma journal_mode = wal", [], |row| row.get(0)).map_err(&fail)?;
        if mode != "wal" {
            tracing::warn!(path = %database.path.display(), mode, "no write-ahead log here: reads and writes will wait");
        }
    }
    Ok(())
}

pub(crate) fn schema_version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.prepare_cached("pragma schema_version")?.query_row([], |row| row.get(0))
}

pub(crate) fn has_layout(connection: &Connection) -> rusqlite::Result<bool> {
    let query = "select count(*) = 4 from sqlite_schema where type = 'table' and name in \
                 ('_shori_source', '_shori_captures', '_shori_changes', '_shori_evicted')";
    connection.query_row(query, [], |row| row.get(0))
}

/// What stands, and what is to be written.
struct Plan {
    applied: Applied,
    steps: Vec<Step>,
}

fn plan(connection: &Connection, config: &SqliteConfig, accept: &BTreeSet<String>) -> Result<Plan> {
    let fail =
        |cause| crate::connection::sqlite_error("read capture of", crate::connection::file_name(&config.path), cause);
    let (identity, layout) = connection
        .query_row("select identity, layout from _shori_source", [], |row| Ok((row.get(0)?, row.get::<_, i64>(1)?)))
        .map_err(fail)?;
    if layout != LAYOUT_VERSION {
        let cause = format!("its capture tables are of layout {layout}, this release knows {LAYOUT_VERSION}");
        return Err(Error::new(ErrorKind::Usage, "read", crate::connection::file_name(&config.path), cause)
            .with_remedy("use the release that installed capture, or a newer one"));
    }
    let schema_version = schema_version(connection).map_err(fail)?;
    let mut plan = Plan {
        applied: Applied { identity, schema_version, captures: Vec::new(), failed: Vec::new(), changed: false },
        steps: Vec::new(),
    };
    for wanted in &config.tables {
        match plan_table(connection, wanted, accept) {
            Ok(Planned { layout, step }) => {
                plan.steps.extend(step.map(|step| Step { capture: plan.applied.captures.len(), ..step }));
                plan.applied.captures.push(layout);
            }
            Err(error) if error.kind() == ErrorKind::Schema => {
                plan.applied.failed.push((CaptureId::new(&config.source_name, &wanted.name), error));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(plan)
}

struct Planned {
    layout: Layout,
    step: Option<Step>,
}

/// Something about one capture to be written.
struct Step {
    /// Index of the capture's layout.
    capture: usize,
    columns: Vec<StoredColumn>,
    is_new: bool,
    reread: bool,
}

fn plan_table(connection: &Connection, wanted: &SqliteTable, accept: &BTreeSet<String>) -> Result<Planned> {
    let stored = Stored::of_table(connection, &wanted.name)?;
    let number = stored.as_ref().map_or(0, |stored| stored.number);
    let fail = |cause| crate::connection::sqlite_error("read", format!("triggers of {}", wanted.name), cause);
    let standing = triggers_of(connection, number).map_err(fail)?;
    let elsewhere = standing.iter().find(|trigger| !trigger.table.eq_ignore_ascii_case(&wanted.name));
    let table = table::inspect(connection, wanted).map_err(|error| match elsewhere {
        Some(trigger) if !exists(connection, &wanted.name) => renamed(&wanted.name, &trigger.table),
        _ => error,
    })?;
    if let Some(stored) = stored.as_ref().filter(|_| !accept.contains(&wanted.name)) {
        check_follows(stored, &table)?;
    }
    let (columns, slots, added) = place(stored.as_ref(), &table);
    let expected = triggers::statements(&table, number, &slots);
    let in_place = elsewhere.is_none() && same_triggers(&standing, &expected);
    let layout = Layout { number, table, slots };
    let Some(stored) = stored else {
        return Ok(Planned { layout, step: Some(Step { capture: 0, columns, is_new: true, reread: false }) });
    };
    let table = &layout.table;
    let as_left = elsewhere.is_none() && stored.triggers == named(&standing);
    if in_place && as_left && stored.schema.as_deref() == Some(&table.schema) {
        return Ok(Planned { layout, step: None });
    }
    let reread = !as_left || stored.shape != table.shape() || holds_values(connection, table, &added).map_err(fail)?;
    Ok(Planned { layout, step: Some(Step { capture: 0, columns, is_new: false, reread }) })
}

fn renamed(table: &str, now: &str) -> Error {
    table::refused(table, format!("it was renamed to {now}"))
        .with_remedy(format!("rename it back, or capture {now} in its place"))
}

fn exists(connection: &Connection, table: &str) -> bool {
    connection.table_exists(None, table).unwrap_or(false)
}

fn check_follows(stored: &Stored, table: &Table) -> Result<()> {
    match stored.schema.as_ref().map(|old| old.change_to(&table.schema)) {
        Some(SchemaChange::Incompatible { reason }) => {
            Err(table::refused(&table.name, reason)
                .with_remedy(format!("run shori resnapshot --retyped {}", table.name)))
        }
        _ => Ok(()),
    }
}

/// Gives every column its slot: the one that it had, or a new one. Also tells which columns are new.
fn place(stored: Option<&Stored>, table: &Table) -> (Vec<StoredColumn>, Vec<usize>, Vec<String>) {
    let mut columns = stored.map(|stored| stored.columns.clone()).unwrap_or_default();
    let old_schema = stored.and_then(|stored| stored.schema.as_deref());
    let mut live = BTreeSet::new();
    let (mut slots, mut added) = (Vec::with_capacity(table.columns.len()), Vec::new());
    for field in table.schema.columns.fields() {
        let same_type = |old: &TableSchema| {
            old.columns.field_with_name(field.name()).is_ok_and(|old| old.data_type() == field.data_type())
        };
        let kept = columns.iter().position(|column| column.live && column.name == *field.name());
        let slot = kept.filter(|_| old_schema.is_some_and(same_type)).unwrap_or(columns.len());
        if slot == columns.len() {
            columns.push(StoredColumn { name: field.name().clone(), live: true });
            added.push(field.name().clone());
        }
        live.insert(slot);
        slots.push(slot);
    }
    for (slot, column) in columns.iter_mut().enumerate() {
        column.live = live.contains(&slot);
    }
    (columns, slots, added)
}

/// Whether any row holds a value in one of these columns.
fn holds_values(connection: &Connection, table: &Table, columns: &[String]) -> rusqlite::Result<bool> {
    if columns.is_empty() {
        return Ok(false);
    }
    let not_null: Vec<String> = columns.iter().map(|name| format!("{} is not null", quote_name(name))).collect();
    let query = format!("select exists (select 1 from {} where {})", table.quoted(), not_null.join(" or "));
    connection.query_row(&query, [], |row| row.get(0))
}

impl Step {
    fn write(&self, connection: &Connection, applied: &mut Applied) -> rusqlite::Result<()> {
        let layout = &mut applied.captures[self.capture];
        if self.is_new {
            layout.number = connection.query_row(ADD_CAPTURE, [&layout.table.name], |row| row.get(0))?;
        }
        widen(connection, "_shori_changes", self.columns.len())?;
        widen(connection, "_shori_evicted", self.columns.len())?;
        drop_triggers(connection, layout.number)?;
        connection.execute("delete from _shori_evicted where capture = ?1", [layout.number])?;
        let mut triggers = triggers::statements(&layout.table, layout.number, &layout.slots);
        // The newest trigger of a table runs first, as far as SQLite goes; nothing relies on it.
        for (_, statement) in &triggers {
            connection.execute_batch(statement)?;
        }
        triggers.sort();
        let as_json = |value: serde_json::Value| value.to_string();
        connection.execute(
            SET_CAPTURE,
            params![
                layout.number,
                as_json(serde_json::json!(self.columns)),
                layout.table.schema.to_json(),
                layout.table.shape(),
                as_json(serde_json::json!(triggers)),
            ],
        )?;
        if self.reread {
            let mark = format!("insert into _shori_changes (capture, op, at_us) values (?1, ?2, {NOW})");
            connection.execute(&mark, [layout.number, REREAD])?;
        }
        Ok(())
    }
}

fn widen(connection: &Connection, table: &str, slots: usize) -> rusqlite::Result<()> {
    let present = "select count(*) from pragma_table_info(?1) where name glob 'v[0-9]*'";
    let present: i64 = connection.query_row(present, [table], |row| row.get(0))?;
    for slot in present..slots as i64 {
        connection.execute_batch(&format!("alter table {table} add column v{slot}"))?;
    }
    Ok(())
}

struct Trigger {
    name: String,
    table: String,
    sql: String,
}

fn triggers_of(connection: &Connection, number: i64) -> rusqlite::Result<Vec<Trigger>> {
    let mut statement = connection.prepare(TRIGGERS_OF)?;
    let rows =
        statement.query_map([number], |row| Ok(Trigger { name: row.get(0)?, table: row.get(1)?, sql: row.get(2)? }))?;
    rows.collect()
}

fn drop_triggers(connection: &Connection, number: i64) -> rusqlite::Result<()> {
    for trigger in triggers_of(connection, number)? {
        connection.execute_batch(&format!("drop trigger {}", quote_name(&trigger.name)))?;
    }
    Ok(())
}

fn named(triggers: &[Trigger]) -> Vec<(String, String)> {
    let mut named: Vec<_> = triggers.iter().map(|trigger| (trigger.name.clone(), trigger.sql.clone())).collect();
    named.sort();
    named
}

fn same_triggers(standing: &[Trigger], expected: &[(String, String)]) -> bool {
    let mut expected = expected.to_vec();
    expected.sort();
    named(standing) == expected
}

/// A row of `_shori_captures`.
struct Stored {
    number: i64,
    columns: Vec<StoredColumn>,
    schema: Option<std::sync::Arc<TableSchema>>,
    shape: String,
    triggers: Vec<(String, String)>,
}

/// The column of a slot: its place in the list.
#[derive(Clone, Serialize, Deserialize)]
struct StoredColumn {
    name: String,
    live: bool,
}

impl Stored {
    fn of_table(connection: &Connection, table: &str) -> Result<Option<Stored>> {
        let object = || format!("the capture of table {table}");
        let corrupt = |cause: serde_json::Error| Error::new(ErrorKind::Corrupt, "read", object(), cause);
        let row = connection
            .query_row(
                "select number, columns, schema, shape, triggers from _shori_captures where lower(table_name) = lower(?1)",
                [table],
                |row| {
                    let text = |at: usize| row.get::<_, String>(at);
                    Ok((row.get(0)?, text(1)?, text(2)?, text(3)?, text(4)?))
                },
            )
            .optional()
            .map_err(|cause| crate::connection::sqlite_error("read", object(), cause))?;
        let Some((number, columns, schema, shape, triggers)) = row else { return Ok(None) };
        Ok(Some(Stored {
            number,
            columns: serde_json::from_str(&columns).map_err(corrupt)?,
            schema: Some(std::sync::Arc::new(TableSchema::from_json(&schema)?)),
            shape,
            triggers: serde_json::from_str(&triggers).map_err(corrupt)?,
        }))
    }
}
