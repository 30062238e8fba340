//! One step of reading: a look at how far the file is, then changes up to there, then the chunk read at that place.
//!
//! SQLite has one writer, and ids are given in commit order: the newest id that a read transaction shows is a place
//! between two commits. A look fixes it as the target. Steps read up to it in batches; only at the target the boundary
//! moves.

use std::sync::Arc;

use rusqlite::Row;
use shori_core::change::Op;
use shori_core::position::{Micros, Position};
use shori_core::source::{BatchLimit, Rejected, SnapshotProgress, SnapshotState, SourceBatch};
use shori_core::{Error, ErrorKind, Result};

use crate::connection::Database;
use crate::cursor::{self, Cursor, Target};
use crate::decode::{self, BatchBuilder};
use crate::install::{self, BEFORE, REREAD};
use crate::snapshot::{self, Place};
use crate::triggers::NOW;
use crate::{SqliteConfig, positions};

/// How often one look follows a schema that keeps changing.
const FOLLOW_ATTEMPTS: usize = 5;

/// Most bytes of one batch whatever the limit: Arrow's offsets end at 2 GiB, and one SQLite value may have 1 GB.
const BATCH_BYTES_MAX: usize = 512 << 20;

/// Reads one batch, and where reading stands after it.
pub(crate) fn step(
    database: &mut Database,
    config: &SqliteConfig,
    mut cursor: Cursor,
    limit: BatchLimit,
) -> Result<(SourceBatch, Cursor)> {
    let limit = BatchLimit { rows: limit.rows.max(1), bytes: limit.bytes.clamp(1, BATCH_BYTES_MAX) };
    let mut batch = SourceBatch::empty(cursor.watermark);
    if cursor.target.is_none() {
        look(database, config, &mut cursor, limit, &mut batch)?;
    }
    if let Some(target) = cursor.target {
        let room = read_changes(database, &mut cursor, target, limit, &mut batch)?;
        if let Some(room) = room {
            arrive(&mut cursor, target, room, &mut batch)?;
        }
    }
    batch.watermark = cursor.watermark;
    let snapshots_wait = || cursor.captures.iter().any(|capture| !capture.failed && !capture.progress.is_done());
    batch.more = cursor.target.is_some() || snapshots_wait();
    Ok((batch, cursor))
}

/// Fixes the next target, and reads the next chunk under it.
fn look(
    database: &mut Database,
    config: &SqliteConfig,
    cursor: &mut Cursor,
    limit: BatchLimit,
    batch: &mut SourceBatch,
) -> Result<()> {
    database.check_same_file()?;
    for _ in 0..FOLLOW_ATTEMPTS {
        let fail = database.fail("read");
        let name = database.name();
        let reading = database.connection.unchecked_transaction().map_err(&fail)?;
        if install::schema_version(&reading).map_err(&fail)? == cursor.schema_version {
            let seen = Seen::read(&reading).map_err(&fail)?;
            cursor::check_identity(database, &cursor.identity, &seen.identity)?;
            let staged = positions::change_at(&cursor.watermark.staged)?;
            cursor::check_history(database, &cursor.watermark, seen.newest)?;
            check_gaps(&reading, cursor, staged, batch)?;
            settle_start(cursor, &seen)?;
            cursor.data_version = Some(seen.data_version);
            cursor.target = Some(Target { id: seen.newest, time: seen.newest_time });
            read_chunk(&reading, config, cursor, &seen, limit, batch)?;
            return reading.finish().map_err(&fail);
        }
        drop(reading);
        tracing::info!(file = name, "the schema has changed");
        cursor::follow(database, config, cursor, batch)?;
    }
    let cause = format!("its schema changed {FOLLOW_ATTEMPTS} times during one look");
    Err(Error::new(ErrorKind::Unavailable, "read", database.name(), cause))
}

/// What one read transaction shows.
struct Seen {
    identity: String,
    newest: i64,
    newest_time: Micros,
    now: Micros,
    data_version: i64,
}

impl Seen {
    fn read(connection: &rusqlite::Connection) -> rusqlite::Result<Self> {
        let newest = cursor::newest_change(connection)?;
        let query = format!(
            "select
                (select identity from _shori_source),
                ifnull((select at_us from _shori_changes order by id desc limit 1), 0),
                {NOW}"
        );
        let (identity, newest_time, now) =
            connection.prepare_cached(&query)?.query_row([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        let data_version = data_version(connection)?;
        Ok(Self { identity, newest, newest_time, now, data_version })
    }
}

/// Changes when another connection has committed.
pub(crate) fn data_version(connection: &rusqlite::Connection) -> rusqlite::Result<i64> {
    connection.prepare_cached("pragma data_version")?.query_row([], |row| row.get(0))
}

fn check_gaps(
    connection: &rusqlite::Connection,
    cursor: &mut Cursor,
    staged: i64,
    batch: &mut SourceBatch,
) -> Result<()> {
    for capture in cursor.captures.iter_mut().filter(|capture| !capture.failed) {
        let object = format!("the capture of table {}", capture.layout.table.name);
        let pruned = cursor::pruned_to(connection, capture.layout.number)
            .map_err(|cause| crate::connection::sqlite_error("read", object, cause))?;
        if let Err(error) = cursor::check_gap(capture, capture.after.max(staged), pruned) {
            capture.failed = true;
            batch.failed.push((capture.id.clone(), error));
        }
    }
    Ok(())
}

/// Where nothing older is needed, reading begins at the newest change.
fn settle_start(cursor: &mut Cursor, seen: &Seen) -> Result<()> {
    if cursor.from_head {
        cursor.from_head = false;
        move_to(cursor, positions::of_change(seen.newest)?, seen.newest_time);
    }
    Ok(())
}

fn move_to(cursor: &mut Cursor, position: Position, time: Micros) {
    let watermark = &mut cursor.watermark;
    watermark.staged = watermark.staged.max(position);
    watermark.boundary = watermark.staged;
    watermark.boundary_time = watermark.boundary_time.max(time);
}

fn read_chunk(
    connection: &rusqlite::Connection,
    config: &SqliteConfig,
    cursor: &mut Cursor,
    seen: &Seen,
    limit: BatchLimit,
    batch: &mut SourceBatch,
) -> Result<()> {
    let Some(capture) = cursor.captures.iter_mut().find(|capture| !capture.failed && !capture.progress.is_done())
    else {
        return Ok(());
    };
    let before = cursor.watermark.staged.max(positions::of_change(seen.newest)?);
    let place = Place {
        change: seen.newest,
        chunk: positions::next_chunk(seen.newest, &before.max(cursor.furthest)),
        before,
        time: seen.now,
    };
    let limit = BatchLimit { rows: limit.rows.min(config.snapshot_chunk_rows.max(1)), ..limit };
    match snapshot::read_chunk(connection, capture, &place, limit) {
        Ok(chunk) => cursor.chunk = Some(Arc::new(chunk)),
        // One bad table stops itself only (contract 11).
        Err(error) if error.kind() == ErrorKind::Data => {
            capture.failed = true;
            batch.failed.push((capture.id.clone(), error));
        }
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Reads changes up to the target. Answers the rows and bytes left, or `None` when the batch is full before it.
fn read_changes(
    database: &Database,
    cursor: &mut Cursor,
    target: Target,
    limit: BatchLimit,
    batch: &mut SourceBatch,
) -> Result<Option<BatchLimit>> {
    let after = positions::change_at(&cursor.watermark.staged)?;
    if after >= target.id {
        return Ok(Some(limit));
    }
    let fail = database.fail("read changes of");
    let mut changes = Changes::new(cursor);
    let mut statement = database.connection.prepare_cached(&changes.query()).map_err(&fail)?;
    let mut rows = statement.query([after, target.id]).map_err(&fail)?;
    let (mut last, mut read, mut full) = (after, 0, false);
    while let Some(row) = rows.next().map_err(&fail)? {
        let id: i64 = row.get(0).map_err(&fail)?;
        // The batch ends before a gap, so that it fails nobody who has changes in it.
        let ends = id > last + 1 && last > after;
        if ends || read >= limit.rows || changes.bytes >= limit.bytes {
            full = true;
            break;
        }
        if id > last + 1 && id - 1 > cursor::pruned_at_most(&database.connection).map_err(&fail)? {
            cursor::fail_all(cursor, last + 1, id - 1, batch);
        }
        last = id;
        // Before images are numbered too: gaps show only where they are counted.
        if row.get::<_, i64>(2).map_err(&fail)? != BEFORE {
            changes.push(row, id, cursor, batch).map_err(&fail)??;
            read += 1;
        }
    }
    if !full && last < target.id {
        // The newest row is never pruned.
        match last > after {
            true => full = true,
            false => cursor::fail_all(cursor, last + 1, target.id, batch),
        }
    }
    for builder in changes.builders.into_iter().flatten() {
        batch.changes.extend(builder.finish()?);
    }
    if full {
        cursor.watermark.staged = positions::of_change(last)?;
        return Ok(None);
    }
    Ok(Some(BatchLimit { rows: limit.rows - read, bytes: limit.bytes.saturating_sub(changes.bytes) }))
}

/// The stream is at the target: the boundary moves, and the chunk follows if it fits into this batch.
fn arrive(cursor: &mut Cursor, target: Target, room: BatchLimit, batch: &mut SourceBatch) -> Result<()> {
    let at = positions::of_change(target.id)?;
    // Chunks that were read here before do not come again: reading goes on after them.
    let passed = Some(cursor.furthest).filter(|furthest| furthest.lsn == at.lsn);
    move_to(cursor, passed.map_or(at, |passed| passed.max(at)), target.time);
    let Some(chunk) = cursor.chunk.clone() else {
        cursor.target = None;
        return Ok(());
    };
    let rows = chunk.rows.as_ref().map_or(0, |rows| rows.len());
    if rows > room.rows && !batch.changes.is_empty() {
        return Ok(());
    }
    batch.changes.extend(chunk.rows.clone());
    batch.rejected.extend(chunk.rejected.iter().cloned());
    batch.snapshots.push((chunk.capture.clone(), chunk.progress.clone()));
    if let Some(capture) = cursor.captures.iter_mut().find(|capture| capture.id == chunk.capture) {
        capture.progress = chunk.progress.clone();
    }
    move_to(cursor, chunk.end, chunk.time);
    cursor.chunk = None;
    cursor.target = None;
    Ok(())
}

/// Result columns before the slots: id, capture, op, time.
const HEAD_COLUMNS: usize = 4;

/// Change rows on their way into one batch per capture.
struct Changes {
    /// By a capture's number: its index among the captures.
    by_number: Vec<Option<usize>>,
    builders: Vec<Option<BatchBuilder>>,
    slots: usize,
    bytes: usize,
}

impl Changes {
    fn new(cursor: &Cursor) -> Self {
        let (mut by_number, mut slots) = (Vec::new(), 0);
        for (index, capture) in cursor.captures.iter().enumerate().filter(|(_, capture)| !capture.failed) {
            let number = capture.layout.number.unsigned_abs() as usize;
            if by_number.len() <= number {
                by_number.resize(number + 1, None);
            }
            by_number[number] = Some(index);
            slots = capture.layout.slots.iter().map(|slot| slot + 1).fold(slots, usize::max);
        }
        let builders = cursor.captures.iter().map(|_| None).collect();
        Self { by_number, builders, slots, bytes: 0 }
    }

    fn query(&self) -> String {
        let slots: String = (0..self.slots).map(|slot| format!(", v{slot}")).collect();
        format!(
            "select id, capture, op, at_us{slots} from _shori_changes
            where id > ?1 and id <= ?2
            order by id"
        )
    }

    fn push(
        &mut self,
        row: &Row<'_>,
        id: i64,
        cursor: &mut Cursor,
        batch: &mut SourceBatch,
    ) -> rusqlite::Result<Result<()>> {
        let number: i64 = row.get(1)?;
        let Some(index) = self.by_number.get(number.unsigned_abs() as usize).copied().flatten() else {
            return Ok(Ok(()));
        };
        let capture = &mut cursor.captures[index];
        if id <= capture.after || capture.failed {
            return Ok(Ok(()));
        }
        let op: i64 = row.get(2)?;
        if op == REREAD {
            self.reread(index, cursor, batch);
            return Ok(Ok(()));
        }
        let prepared = || -> Result<(Op, Position)> {
            Ok((Op::from_u8(u8::try_from(op).unwrap_or(u8::MAX))?, positions::of_change(id)?))
        };
        let (op, position) = match prepared() {
            Ok(prepared) => prepared,
            Err(error) => return Ok(Err(error)),
        };
        let schema = &capture.layout.table.schema;
        let builder = match &mut self.builders[index] {
            Some(builder) => builder,
            empty => match BatchBuilder::new(capture.id.clone(), schema.clone()) {
                Ok(builder) => empty.insert(builder),
                Err(error) => return Ok(Err(error)),
            },
        };
        let slots = &capture.layout.slots;
        let at = |column: usize| HEAD_COLUMNS + slots[column];
        match builder.push(row, at, &position, op, row.get(3)?)? {
            Ok(bytes) => self.bytes += bytes,
            Err(reason) => {
                let raw = decode::raw_row(row, schema, at, op)?;
                self.bytes += raw.len();
                batch.rejected.push(Rejected { capture: capture.id.clone(), position, reason, raw });
            }
        }
        Ok(Ok(()))
    }

    /// Changes of this capture have gone unlogged: its table is read again whole, if it is not about to be anyhow.
    fn reread(&mut self, index: usize, cursor: &mut Cursor, batch: &mut SourceBatch) {
        let capture = &mut cursor.captures[index];
        if capture.progress.state == SnapshotState::Requested {
            return;
        }
        tracing::info!(capture = %capture.id, "changes went unlogged: the table is read again");
        capture.progress = SnapshotProgress::requested(capture.progress.generation.saturating_add(1));
        batch.snapshots.push((capture.id.clone(), capture.progress.clone()));
        if cursor.chunk.as_ref().is_some_and(|chunk| chunk.capture == capture.id) {
            cursor.chunk = None;
        }
    }
}
