//! Where reading stands.
//!
//! A step of reading works on a copy and hands it back with its batch: a call that is dropped half-way changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension};
use shori_core::position::{CaptureId, Micros, Position, Watermark};
use shori_core::schema::SchemaChange;
use shori_core::source::{Resume, SnapshotProgress, SnapshotState, SourceBatch, Started};
use shori_core::{Error, ErrorKind, Result};

use crate::connection::Database;
use crate::install::{self, BEFORE, Layout};
use crate::snapshot::Chunk;
use crate::{SqliteConfig, positions, table};

#[derive(Clone)]
pub(crate) struct Cursor {
    pub identity: Arc<str>,
    pub schema_version: i64,
    /// SQLite's own counter of foreign commits, as of the newest look.
    pub data_version: Option<i64>,
    pub captures: Vec<Capture>,
    pub watermark: Watermark,
    /// The furthest that any capture is staged; new chunks stand above it.
    pub furthest: Position,
    /// Nothing at or below the first look's newest change is needed.
    pub from_head: bool,
    /// The newest change of the last look, while it is being read up to.
    pub target: Option<Target>,
    /// Read under the target, to be emitted when the stream has come to it.
    pub chunk: Option<Arc<Chunk>>,
}

#[derive(Clone, Copy)]
pub(crate) struct Target {
    pub id: i64,
    pub time: Micros,
}

#[derive(Clone)]
pub(crate) struct Capture {
    pub id: CaptureId,
    pub layout: Arc<Layout>,
    /// Changes at or below are staged already.
    pub after: i64,
    pub progress: SnapshotProgress,
    pub failed: bool,
}

impl Capture {
    /// Whether a pruned change above `after` would be missed. A snapshot that has not begun misses none.
    fn needs_every_change(&self) -> bool {
        self.progress.state != SnapshotState::Requested
    }
}

/// Newest change id ever given, whether or not its row is still there.
pub(crate) fn newest_change(connection: &Connection) -> rusqlite::Result<i64> {
    let query = "
        select max(
            ifnull((select seq from sqlite_sequence where name = '_shori_changes'), 0),
            ifnull((select max(id) from _shori_changes), 0)
        )";
    connection.prepare_cached(query)?.query_row([], |row| row.get(0))
}

/// Change rows that are looked at to count changes: beyond, an update counts as two.
const COUNT_ROWS_MAX: i64 = 1_000_000;

/// Changes above `after`, at or below `up_to`.
pub(crate) fn count_changes(connection: &Connection, after: i64, up_to: i64) -> rusqlite::Result<u64> {
    let query = "select count(*) from _shori_changes where id > ?1 and id <= ?2 and op <> ?3";
    let near = up_to.min(after.saturating_add(COUNT_ROWS_MAX));
    let counted: i64 = connection.prepare_cached(query)?.query_row([after, near, BEFORE], |row| row.get(0))?;
    Ok((counted + (up_to - near).max(0)).unsigned_abs())
}

/// The newest change of this capture that has been pruned.
pub(crate) fn pruned_to(connection: &Connection, number: i64) -> rusqlite::Result<i64> {
    let query = "select pruned_to from _shori_captures where number = ?1";
    connection.prepare_cached(query)?.query_row([number], |row| row.get(0))
}

/// Makes capture ready and finds where reading goes on.
pub(crate) fn start(
    database: &mut Database,
    config: &SqliteConfig,
    resume: &BTreeMap<CaptureId, Resume>,
) -> Result<(Started, Cursor)> {
    let accept = read_anew(config, resume);
    let applied = install::apply(database, config, &accept)?;
    let fail = database.fail("read");
    let newest = newest_change(&database.connection).map_err(&fail)?;
    let mut failed = applied.failed;
    let mut captures = Vec::with_capacity(applied.captures.len());
    let mut lowest: Option<Watermark> = None;
    let mut furthest = Position::ZERO;
    for layout in applied.captures {
        let id = layout.info(&config.source_name).id;
        let known = resume.get(&id);
        let watermark = known.map_or(Watermark::ZERO, |known| known.watermark);
        furthest = furthest.max(watermark.staged);
        let capture = Capture {
            after: positions::change_at(&watermark.staged)?,
            progress: known.map_or(SnapshotProgress::requested(1), |known| known.snapshot.clone()),
            layout: Arc::new(layout),
            failed: false,
            id,
        };
        check_reaches(database, capture.after, newest)?;
        let pruned = pruned_to(&database.connection, capture.layout.number).map_err(&fail)?;
        let read_anew = accept.contains(&*capture.id.instance);
        if let Err(error) = check_resume(&capture, known.filter(|_| !read_anew), pruned) {
            failed.push((capture.id, error));
            continue;
        }
        if watermark.staged != Position::ZERO {
            // Only a capture that is read anew may stand below what was pruned.
            let staged = if pruned > capture.after { positions::of_change(pruned)? } else { watermark.staged };
            let from = Watermark { staged, ..watermark };
            lowest = Some(lowest.filter(|lowest| lowest.staged <= from.staged).unwrap_or(from));
        }
        captures.push(capture);
    }
    let infos = captures.iter().map(|capture| capture.layout.info(&config.source_name)).collect();
    let started = Started { identity: applied.identity.clone(), captures: infos, failed };
    let cursor = Cursor {
        identity: applied.identity.into(),
        schema_version: applied.schema_version,
        data_version: None,
        captures,
        watermark: lowest.unwrap_or(Watermark::ZERO),
        furthest,
        from_head: lowest.is_none(),
        target: None,
        chunk: None,
    };
    Ok((started, cursor))
}

/// Tables whose snapshot has not begun: they may have any shape.
fn read_anew(config: &SqliteConfig, resume: &BTreeMap<CaptureId, Resume>) -> BTreeSet<String> {
    let names = config.tables.iter().map(|table| table.name.clone());
    let is_read_anew = |name: &String| {
        let known = resume.get(&CaptureId::new(&config.source_name, name));
        known.is_none_or(|known| known.snapshot.state == SnapshotState::Requested)
    };
    names.filter(is_read_anew).collect()
}

/// Whether reading can go on where `known` stands, which is nothing for a capture that is read anew.
fn check_resume(capture: &Capture, known: Option<&Resume>, pruned: i64) -> Result<()> {
    let schema = known.and_then(|known| known.schema.as_ref());
    let next = &capture.layout.table.schema;
    if let Some(SchemaChange::Incompatible { reason }) = schema.map(|schema| schema.change_to(next)) {
        let table = &capture.layout.table.name;
        return Err(table::refused(table, reason).with_remedy(format!("run shori resnapshot --retyped {table}")));
    }
    check_gap(capture, capture.after, pruned)
}

/// Contract 8: the capture's own changes, pruned above what is staged, are lost. Idle captures have none.
pub(crate) fn check_gap(capture: &Capture, staged: i64, pruned: i64) -> Result<()> {
    if !capture.needs_every_change() || pruned <= staged {
        return Ok(());
    }
    let table = &capture.layout.table.name;
    let cause = format!("source retention has passed the watermark: change {staged} is staged, {pruned} is pruned");
    Err(Error::new(ErrorKind::Gap, "read", format!("changes of table {table}"), cause)
        .with_remedy(format!("run shori resnapshot {table}")))
}

/// Fails where the file knows fewer changes than the log has.
pub(crate) fn check_reaches(database: &Database, staged: i64, newest: i64) -> Result<()> {
    if newest >= staged {
        return Ok(());
    }
    let cause =
        format!("the log has its change {staged}, but its newest is {newest}: it is an older copy or another file");
    Err(replaced(database, cause))
}

fn replaced(database: &Database, cause: String) -> Error {
    Error::new(ErrorKind::SourceReplaced, "read", database.name(), cause)
        .with_remedy("put the captured file back and start again, or start with an empty log")
}

/// Whether the file is the one that the log was read from, as far as the log has come: it has that change, and has not
/// given its number to a later one. A copy that was put back and written to since may have come past it.
pub(crate) fn check_history(database: &Database, watermark: &Watermark, newest: i64) -> Result<()> {
    check_reaches(database, positions::change_at(&watermark.staged)?, newest)?;
    let boundary = positions::change_at(&watermark.boundary)?;
    let query = "select at_us from _shori_changes where id = ?1";
    let read = |row: &rusqlite::Row<'_>| row.get::<_, Micros>(0);
    let mut statement = database.connection.prepare_cached(query).map_err(database.fail("read"))?;
    let found = statement.query_row([boundary], read).optional().map_err(database.fail("read"))?;
    // The boundary's time is that of its change, or later where the clock went back or a snapshot was read there.
    match found.is_some_and(|time| time > watermark.boundary_time) {
        true => {
            let cause =
                format!("its change {boundary} is not the one that the log has: it is an older copy, written to since");
            Err(replaced(database, cause))
        }
        false => Ok(()),
    }
}

/// Change rows that Shori has pruned, of whichever capture, end at or below this one. A before image is not remembered,
/// and may have gone ahead of its change.
pub(crate) fn pruned_at_most(connection: &Connection) -> rusqlite::Result<i64> {
    let query = "select ifnull(max(pruned_to), 0) + 1 from _shori_captures";
    connection.prepare_cached(query)?.query_row([], |row| row.get(0))
}

/// Change rows are missing that nobody but a stranger can have deleted: any capture may have lost some.
pub(crate) fn fail_all(cursor: &mut Cursor, first: i64, last: i64, batch: &mut SourceBatch) {
    let captures = cursor.captures.iter_mut();
    for capture in captures.filter(|capture| !capture.failed && capture.needs_every_change() && capture.after < last) {
        let table = &capture.layout.table.name;
        let cause = format!("changes {first} to {last} are gone from _shori_changes, and Shori has not pruned them");
        let error = Error::new(ErrorKind::Gap, "read", format!("changes of table {table}"), cause)
            .with_remedy(format!("run shori resnapshot {table}"));
        capture.failed = true;
        batch.failed.push((capture.id.clone(), error));
    }
}

/// Follows the tables after their schema changed, and tells what is another from here on.
pub(crate) fn follow(
    database: &mut Database,
    config: &SqliteConfig,
    cursor: &mut Cursor,
    batch: &mut SourceBatch,
) -> Result<()> {
    let requested = |capture: &&Capture| capture.progress.state == SnapshotState::Requested;
    let accept = cursor.captures.iter().filter(requested).map(|capture| capture.id.instance.to_string()).collect();
    let applied = install::apply(database, config, &accept)?;
    check_identity(database, &cursor.identity, &applied.identity)?;
    cursor.schema_version = applied.schema_version;
    for (id, error) in applied.failed {
        let failing = cursor.captures.iter_mut().find(|capture| capture.id == id && !capture.failed);
        if let Some(capture) = failing {
            capture.failed = true;
            batch.failed.push((id, error));
        }
    }
    for layout in applied.captures {
        let info = layout.info(&config.source_name);
        let Some(capture) = cursor.captures.iter_mut().find(|capture| capture.id == info.id) else { continue };
        if !capture.failed && capture.layout.table.schema != info.schema {
            batch.schemas.push(info);
        }
        capture.layout = Arc::new(layout);
    }
    Ok(())
}

pub(crate) fn check_identity(database: &Database, known: &str, found: &str) -> Result<()> {
    if known == found {
        return Ok(());
    }
    let cause = "its capture tables were made anew while it was read";
    Err(Error::new(ErrorKind::SourceReplaced, "read", database.name(), cause)
        .with_remedy("put the captured file back and start again, or start with an empty log"))
}
