//! Looking at a source without reading from it: for checks and for backlog. Nothing is written.

use std::sync::Arc;

use shori_core::change::ChangeBatch;
use shori_core::position::{CaptureId, Position};
use shori_core::source::{BatchLimit, CaptureInfo, SnapshotProgress};
use shori_core::{Error, ErrorKind, Result};

use crate::connection::Database;
use crate::cursor::Capture;
use crate::snapshot::Place;
use crate::{SqliteConfig, cursor, install, positions, snapshot, table};

/// Bytes of one table's sample.
const SAMPLE_MAX_BYTES: usize = 16 << 20;

/// What could be captured.
#[derive(Debug)]
pub struct Inspected {
    pub captures: Vec<CaptureInfo>,
    /// Tables that cannot be captured, each with the reason.
    pub failed: Vec<(CaptureId, Error)>,
}

/// The shape of every configured table as it is now, whether or not capture is installed.
pub fn inspect(config: &SqliteConfig) -> Result<Inspected> {
    let database = Database::open(&config.path, config.busy_timeout)?;
    let mut inspected = Inspected { captures: Vec::new(), failed: Vec::new() };
    for wanted in &config.tables {
        let id = CaptureId::new(&config.source_name, &wanted.name);
        match table::inspect(&database.connection, wanted) {
            Ok(found) => inspected.captures.push(CaptureInfo { id, schema: found.schema }),
            Err(error) if error.kind() == ErrorKind::Schema => inspected.failed.push((id, error)),
            Err(error) => return Err(error),
        }
    }
    Ok(inspected)
}

/// The position of the newest change; [`Position::ZERO`] before capture is installed.
pub fn log_end(config: &SqliteConfig) -> Result<Position> {
    let database = Database::open(&config.path, config.busy_timeout)?;
    let fail = database.fail("read the newest change of");
    if !install::has_layout(&database.connection).map_err(&fail)? {
        return Ok(Position::ZERO);
    }
    positions::of_change(cursor::newest_change(&database.connection).map_err(&fail)?)
}

/// Changes in the source's own log above `position`, over all captured tables; fails if it does not reach there.
pub fn changes_above(config: &SqliteConfig, position: &Position) -> Result<u64> {
    let read_to = positions::change_at(position)?;
    let database = Database::open(&config.path, config.busy_timeout)?;
    let fail = database.fail("count changes of");
    if !install::has_layout(&database.connection).map_err(&fail)? {
        return Ok(0);
    }
    let newest = cursor::newest_change(&database.connection).map_err(&fail)?;
    cursor::check_reaches(&database, read_to, newest)?;
    cursor::count_changes(&database.connection, read_to, newest).map_err(&fail)
}

/// The first rows of every table that can be captured, at most `rows` of each, by key; rows that cannot be decoded are
/// left out. Positions mean nothing.
pub fn sample(config: &SqliteConfig, rows: usize) -> Result<Vec<ChangeBatch>> {
    let database = Database::open(&config.path, config.busy_timeout)?;
    let mut found = Vec::new();
    for wanted in &config.tables {
        let table = match table::inspect(&database.connection, wanted) {
            Ok(table) => table,
            Err(error) if error.kind() == ErrorKind::Schema => continue,
            Err(error) => return Err(error),
        };
        let slots = (0..table.columns.len()).collect();
        let capture = Capture {
            id: CaptureId::new(&config.source_name, &wanted.name),
            layout: Arc::new(install::Layout { number: 0, table, slots }),
            after: 0,
            progress: SnapshotProgress::requested(1),
            failed: false,
        };
        let place = Place { change: 1, chunk: 0, before: Position::ZERO, time: 0 };
        let limit = BatchLimit { rows, bytes: SAMPLE_MAX_BYTES };
        found.extend(snapshot::read_chunk(&database.connection, &capture, &place, limit)?.rows);
    }
    Ok(found)
}
