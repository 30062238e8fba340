//! What a SQLite file holds: its tables at one moment, its change table, and the ledger of the
//! generator where there is one.
//!
//! The tables are read first, then the projections, then the change table: a pipeline that runs is then at or past the
//! moment of the tables, and the images since take them to where it is.

use std::collections::BTreeMap;
use std::path::Path;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Transaction};
use serde::Deserialize;
use shori_core::{Error, ErrorKind, Result};

use super::scratch::{Scratch, quote_name};
use super::serving::Checkpoint;
use super::source::{Images, catch_up_first, used_tables};
use super::values::Loader;
use super::{ColumnInput, TableInput, VerifyInput};

/// `op` of the change table's row images: see [`shori_core::change::Op`].
const IMAGE_OPS: &str = "1, 2, 3, 4";

/// `op` of the image before an update that keeps its key: the change is told by the image that follows. All rows that
/// are neither mark that changes of the table went by unseen, and that it must be read again.
const BEFORE_OP: &str = "8";

/// The position of a table's columns in the change table.
#[derive(Clone, Debug)]
struct Capture {
    number: i64,
    /// By column of the table; none for a column that no change row holds yet.
    slots: Vec<Option<usize>>,
    /// Change rows up to this one may be gone.
    pruned_to: u64,
}

pub(super) struct SqliteSource {
    connection: Connection,
    /// The newest change when the tables were read.
    pub head: u64,
    captures: BTreeMap<String, Capture>,
    /// Rows of each table with a value that does not fit its column: what is told of them.
    misfits: BTreeMap<String, u64>,
}

impl SqliteSource {
    /// Copies every table that a projection reads to `base`.
    pub(super) fn load(path: &Path, input: &VerifyInput, scratch: &Scratch) -> Result<Self> {
        let mut connection = open(path)?;
        let reading = connection.transaction().map_err(fail("read", "the source"))?;
        let head = read_head(&reading)?;
        let (mut captures, mut misfits) = (BTreeMap::new(), BTreeMap::new());
        for table in used_tables(input)? {
            captures.insert(table.name.clone(), read_capture(&reading, table)?);
            misfits.insert(table.name.clone(), load_table(&reading, scratch, table)?);
        }
        reading.finish().map_err(fail("read", "the source"))?;
        Ok(Self { connection, head, captures, misfits })
    }

    /// Copies the change rows of every table to `touched`; a projection shows an earlier state of those named `behind`.
    pub(super) fn load_changes(&mut self, input: &VerifyInput, scratch: &Scratch, behind: &[String]) -> Result<()> {
        let reading = self.connection.transaction().map_err(fail("read", "the change table"))?;
        for table in used_tables(input)? {
            let capture = read_capture(&reading, table)?;
            let rejected = load_images(&reading, scratch, "touched", table, &capture)?;
            // What an update found is what is still shown where it was rejected, or has not been captured.
            if rejected > 0
                || behind.contains(&table.name)
                || self.misfits.get(&table.name).is_some_and(|misfits| *misfits > 0)
            {
                load_images(&reading, scratch, "before", table, &capture)?;
            } else {
                scratch.execute(&format!(
                    "create table before.{0} as from touched.{0} limit 0",
                    quote_name(&table.name)
                ))?;
            }
            self.captures.insert(table.name.clone(), capture);
        }
        reading.finish().map_err(fail("read", "the change table"))
    }

    /// Fails when changes between a checkpoint and the copies are no longer kept.
    pub(super) fn must_reach(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let reading = self.connection.transaction().map_err(fail("read", "the change table"))?;
        for (table, id) in checkpoint {
            let Some(capture) = self.captures.get(table) else { continue };
            let (oldest, newest) = (self.head.min(*id), self.head.max(*id));
            if oldest < newest && capture.pruned_to > oldest || lacks_changes(&reading, capture, oldest, newest)? {
                return Err(catch_up_first(table));
            }
        }
        Ok(())
    }

    /// Rows of a table that cannot be carried.
    pub(super) fn misfits(&self, table: &str) -> u64 {
        self.misfits.get(table).copied().unwrap_or(0)
    }

    /// Whether change rows of a table are gone.
    pub(super) fn is_pruned(&self, table: &str) -> bool {
        self.captures.get(table).is_some_and(|capture| capture.pruned_to > 0)
    }

    /// What the generator's ledger says of `table` at change `id`, or why it says nothing.
    pub(super) fn images(&mut self, table: &str, id: u64) -> Result<std::result::Result<Images, String>> {
        let Some(capture) = self.captures.get(table).cloned() else { return Ok(Err("it is not captured".into())) };
        let reading = self.connection.transaction().map_err(fail("read", "the ledger"))?;
        if !reading.table_exists(None, "generator_ledger").map_err(fail("read", "the ledger"))? {
            return Ok(Err("the source has no ledger of its writer".into()));
        }
        let head = read_head(&reading)?;
        let sum = |condition: &str| -> Result<u64> {
            let query = format!("select coalesce(sum(rows), 0) from generator_ledger where {condition}");
            let sum: i64 =
                reading.query_row(&query, [], |row| row.get(0)).map_err(fail("read", "table generator_ledger"))?;
            Ok(sum.max(0) as u64)
        };
        let of_table = format!("table_name = '{}'", table.replace('\'', "''"));
        // An update has two images: before and after.
        let counted = sum("captured = 1")? + sum("captured = 1 and op in ('update', 'key_update')")?;
        if counted > head {
            return Ok(Err("the ledger of the source's writer is older than its change table".into()));
        }
        let after = |ops: &str| -> Result<u64> {
            let query = format!("select count(*) from _shori_changes where id > ?1 and capture = ?2 and op in ({ops})");
            let count: i64 = reading
                .query_row(&query, [id as i64, capture.number], |row| row.get(0))
                .map_err(fail("read", "the change table"))?;
            Ok(count.max(0) as u64)
        };
        if capture.pruned_to > id {
            return Err(catch_up_first(table));
        }
        let opening = sum(&format!("{of_table} and captured = 1 and op in ('insert', 'update', 'key_update')"))?;
        let ending = sum(&format!("{of_table} and captured = 1 and op in ('delete', 'key_update')"))?;
        let came = sum(&format!("{of_table} and captured = 0 and op = 'insert'"))?;
        let went = sum(&format!("{of_table} and captured = 0 and op = 'delete'"))?;
        Ok(Ok(Images {
            opening: opening.saturating_sub(after("2, 4")?),
            ending: ending.saturating_sub(after("1, 3")?),
            before_capture: came.saturating_sub(went),
            by_others: head - counted,
        }))
    }
}

fn fail(operation: &'static str, object: &'static str) -> impl Fn(rusqlite::Error) -> Error {
    move |cause| Error::new(ErrorKind::Refused, operation, object, cause)
}

fn open(path: &Path) -> Result<Connection> {
    let object = || format!("SQLite file {}", path.display());
    let refuse = |cause: rusqlite::Error| Error::new(ErrorKind::Refused, "open", object(), cause);
    if !path.exists() {
        return Err(Error::new(ErrorKind::Usage, "open", object(), "there is no such file"));
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(refuse)?;
    connection.busy_timeout(std::time::Duration::from_secs(10)).map_err(refuse)?;
    if !connection.table_exists(None, "_shori_captures").map_err(refuse)? {
        return Err(Error::new(ErrorKind::Usage, "verify against", object(), "nothing in it is captured")
            .with_remedy("start the pipeline and let it catch up"));
    }
    Ok(connection)
}

/// The newest change ever, whether or not it is still kept.
fn read_head(reading: &Transaction<'_>) -> Result<u64> {
    let query = "
        select max(
            ifnull((select seq from sqlite_sequence where name = '_shori_changes'), 0),
            ifnull((select max(id) from _shori_changes), 0)
        )
    ";
    let head: i64 = reading.query_row(query, [], |row| row.get(0)).map_err(fail("read", "the change table"))?;
    Ok(head.max(0) as u64)
}

/// Whether changes between went by without an image.
fn lacks_changes(reading: &Transaction<'_>, capture: &Capture, oldest: u64, newest: u64) -> Result<bool> {
    let query = format!(
        "
        select exists (
            select 1
            from _shori_changes
            where capture = ?1
                and id > ?2
                and id <= ?3
                and op not in ({IMAGE_OPS}, {BEFORE_OP})
        )
        "
    );
    reading
        .query_row(&query, [capture.number, oldest as i64, newest as i64], |row| row.get(0))
        .map_err(fail("read", "the change table"))
}

#[derive(Deserialize)]
struct SlotColumn {
    name: String,
    live: bool,
}

fn read_capture(reading: &Transaction<'_>, table: &TableInput) -> Result<Capture> {
    let query = "
        select number, columns, pruned_to
        from _shori_captures
        where lower(table_name) = lower(?1)
    ";
    let object = || format!("the capture of table {}", table.name);
    let row: Option<(i64, String, i64)> = reading
        .query_row(query, [&table.name], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .optional()
        .map_err(|cause| Error::new(ErrorKind::Refused, "read", object(), cause))?;
    let (number, columns, pruned_to) =
        row.ok_or_else(|| Error::new(ErrorKind::Usage, "read", object(), "the table is not captured"))?;
    let columns: Vec<SlotColumn> =
        serde_json::from_str(&columns).map_err(|cause| Error::new(ErrorKind::Corrupt, "read", object(), cause))?;
    let slot = |wanted: &ColumnInput| columns.iter().position(|column| column.live && column.name == wanted.name);
    Ok(Capture { number, slots: table.columns.iter().map(slot).collect(), pruned_to: pruned_to.max(0) as u64 })
}

/// Returns how many rows cannot be carried.
fn load_table(reading: &Transaction<'_>, scratch: &Scratch, table: &TableInput) -> Result<u64> {
    let refuse = |cause| Error::new(ErrorKind::Refused, "read", format!("table {}", table.name), cause);
    let columns = table.columns.iter().map(|column| quote_name(&column.name)).collect::<Vec<_>>().join(", ");
    let mut statement =
        reading.prepare(&format!("select {columns} from {}", quote_name(&table.name))).map_err(refuse)?;
    let loader = Loader::new(scratch, "base", &table.name, table.columns.clone(), &table.key, None)?;
    let mut loader = loader.keeping_keys();
    let mut rows = statement.query([]).map_err(refuse)?;
    while let Some(row) = rows.next().map_err(refuse)? {
        loader.push(|index| row.get_ref(index))?;
    }
    loader.finish()
}

/// Copies images of change rows: to `touched` those that tell the change, to `before` those that tell what an update that
/// keeps its key found. Returns how many cannot be carried.
fn load_images(
    reading: &Transaction<'_>,
    scratch: &Scratch,
    schema: &'static str,
    table: &TableInput,
    capture: &Capture,
) -> Result<u64> {
    let refuse = |cause| Error::new(ErrorKind::Refused, "read", format!("changes of table {}", table.name), cause);
    let ops = if schema == "before" { BEFORE_OP } else { IMAGE_OPS };
    let slots: Vec<_> =
        capture.slots.iter().map(|slot| slot.map_or("null".into(), |slot| format!("v{slot}"))).collect();
    let query = format!(
        "select id, op, {} from _shori_changes where capture = ?1 and op in ({ops}) order by id",
        slots.join(", ")
    );
    let mut columns = vec![ColumnInput::new("change_id", "int64"), ColumnInput::new("change_op", "int64")];
    columns.extend(table.columns.iter().cloned());
    let mut statement = reading.prepare(&query).map_err(refuse)?;
    // Of a row that is gone, only the key counts.
    let key_counts = Some("change_op in (1, 3)");
    let mut loader = Loader::new(scratch, schema, &table.name, columns, &table.key, key_counts)?;
    let mut rows = statement.query([capture.number]).map_err(refuse)?;
    while let Some(row) = rows.next().map_err(refuse)? {
        loader.push(|index| -> rusqlite::Result<ValueRef<'_>> { row.get_ref(index) })?;
    }
    loader.finish()
}
