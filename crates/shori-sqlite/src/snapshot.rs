//! Reading a table whole, a chunk at a time, while the stream goes on.
//!
//! A chunk is read by key, from the bookmark on, in the same read transaction that finds the newest change. It is held
//! until the stream has been emitted up to that change, and then stands directly above it. What changes later, stands
//! later; a row that moved to a key already passed comes with the stream.
//!
//! A chunk is never split between batches, so it is read within the limit of one.

use rusqlite::{Connection, Row, params_from_iter};
use shori_core::change::{ChangeBatch, Op};
use shori_core::position::{CaptureId, Micros, Position};
use shori_core::source::{BatchLimit, Rejected, SnapshotProgress, SnapshotState};
use shori_core::{Error, ErrorKind, Result};

use crate::bookmark;
use crate::connection::{quote_name, sqlite_error};
use crate::cursor::Capture;
use crate::decode::{self, BatchBuilder};
use crate::install::Layout;
use crate::positions;
use crate::table::KeyColumn;

/// Rows of one capture, read at one place in the stream.
pub(crate) struct Chunk {
    pub capture: CaptureId,
    pub rows: Option<ChangeBatch>,
    pub rejected: Vec<Rejected>,
    /// As it is once the chunk is emitted.
    pub progress: SnapshotProgress,
    /// Above the chunk's last row.
    pub end: Position,
    /// When it was read.
    pub time: Micros,
}

/// Where and when a chunk is read.
pub(crate) struct Place {
    /// The newest change that the read transaction shows.
    pub change: i64,
    /// The chunk's number at that change.
    pub chunk: u32,
    /// What is emitted before it.
    pub before: Position,
    pub time: Micros,
}

pub(crate) fn read_chunk(
    connection: &Connection,
    capture: &Capture,
    place: &Place,
    limit: BatchLimit,
) -> Result<Chunk> {
    let table = &capture.layout.table;
    let fail = |cause| sqlite_error("read a snapshot of", format!("table {}", table.name), cause);
    let mut progress = capture.progress.clone();
    if progress.state == SnapshotState::Requested {
        progress.state = SnapshotState::Running;
        progress.start = place.before;
    }
    let mut reader = Reader {
        capture,
        place,
        builder: BatchBuilder::new(capture.id.clone(), table.schema.clone())?,
        rejected: Vec::new(),
        rows: 0,
        bytes: 0,
    };
    if progress.resume.is_empty() {
        reader.read_without_key(connection, limit)?;
    }
    let ended = reader.read_by_key(connection, &mut progress.resume, limit).map_err(fail)??;
    let end = positions::of_chunk_end(place.change, place.chunk)?;
    progress.rows += reader.builder.len() as u64;
    if ended {
        progress.state = SnapshotState::Done;
        progress.end = end;
        progress.end_time = place.time;
    }
    let Reader { builder, rejected, .. } = reader;
    Ok(Chunk { capture: capture.id.clone(), rows: builder.finish()?, rejected, progress, end, time: place.time })
}

struct Reader<'a> {
    capture: &'a Capture,
    place: &'a Place,
    builder: BatchBuilder,
    rejected: Vec<Rejected>,
    rows: u32,
    bytes: usize,
}

impl Reader<'_> {
    /// Rows that no key finds again: all rejected, in the first chunk.
    fn read_without_key(&mut self, connection: &Connection, limit: BatchLimit) -> Result<()> {
        let layout = &self.capture.layout;
        let table = &layout.table;
        let nullable = table.key.iter().filter(|key| key.nullable);
        let null: Vec<String> =
            nullable.map(|key| format!("{} is null", quote_name(&table.columns[key.column].name))).collect();
        if null.is_empty() {
            return Ok(());
        }
        let query = format!("select {} from {} where {}", columns(layout), table.quoted(), null.join(" or "));
        let fail = |cause| sqlite_error("read a snapshot of", format!("table {}", table.name), cause);
        let mut statement = connection.prepare_cached(&query).map_err(fail)?;
        let mut rows = statement.query([]).map_err(fail)?;
        while let Some(row) = rows.next().map_err(fail)? {
            if self.rows as usize >= limit.rows {
                let cause = format!("more than {} of its rows have null in the key", limit.rows);
                return Err(Error::new(ErrorKind::Data, "read a snapshot of", format!("table {}", table.name), cause)
                    .with_remedy("give these rows a key, or raise snapshot_chunk_rows"));
            }
            self.push(row).map_err(fail)??;
        }
        Ok(())
    }

    /// Rows after the bookmark, which is moved. Answers whether the table ends there.
    fn read_by_key(
        &mut self,
        connection: &Connection,
        resume: &mut Vec<u8>,
        limit: BatchLimit,
    ) -> rusqlite::Result<Result<bool>> {
        let layout = &self.capture.layout;
        let after = match resume.is_empty() {
            true => Vec::new(),
            false => match bookmark::read(&layout.table.name, resume, layout.table.key.len()) {
                Ok(values) => values,
                Err(error) => return Ok(Err(error)),
            },
        };
        // Rows that follow a composite key: those that are equal in all but its last column, then in all but the last
        // two, and so on. Each is one range of the index, which a comparison of whole keys is not always to SQLite.
        let (first, mut equal) = (self.rows, after.len().saturating_sub(1));
        loop {
            let mut statement = connection.prepare_cached(&query(layout, !after.is_empty(), equal))?;
            let mut rows = statement.query(params_from_iter(after.iter().take(equal + 1)))?;
            while let Some(row) = rows.next()? {
                let read = (self.rows - first) as usize;
                if read >= limit.rows || (read > 0 && self.bytes >= limit.bytes) {
                    return Ok(Ok(false));
                }
                if let Err(error) = self.push(row)? {
                    return Ok(Err(error));
                }
                resume.clear();
                for key in &layout.table.key {
                    bookmark::push(resume, row.get_ref(key.column)?);
                }
            }
            match equal.checked_sub(1) {
                Some(fewer) => equal = fewer,
                None => return Ok(Ok(true)),
            }
        }
    }

    fn push(&mut self, row: &Row<'_>) -> rusqlite::Result<Result<()>> {
        let position = match positions::of_chunk_row(self.place.change, self.place.chunk, self.rows) {
            Ok(position) => position,
            Err(error) => return Ok(Err(error)),
        };
        self.rows += 1;
        match self.builder.push(row, |column| column, &position, Op::Snapshot, self.place.time)? {
            Ok(bytes) => self.bytes += bytes,
            Err(reason) => {
                let raw = decode::raw_row(row, &self.capture.layout.table.schema, |column| column, Op::Snapshot)?;
                self.bytes += raw.len();
                self.rejected.push(Rejected { capture: self.capture.id.clone(), position, reason, raw });
            }
        }
        Ok(Ok(()))
    }
}

fn columns(layout: &Layout) -> String {
    let columns = layout.table.columns.iter();
    columns.map(|column| quote_name(&column.name)).collect::<Vec<_>>().join(", ")
}

/// Rows in key order: all, or those that equal the bookmarked key in its first `equal` columns and are above it in the
/// next one.
fn query(layout: &Layout, bookmarked: bool, equal: usize) -> String {
    let table = &layout.table;
    let collated = |(name, key): (String, &KeyColumn)| match table.key_is_rowid {
        true => name,
        false => format!("{name} collate {}", quote_name(&key.collation)),
    };
    let key: Vec<String> = table.key_names().into_iter().zip(&table.key).map(collated).collect();
    let nullable = table.key_names().into_iter().zip(&table.key).filter(|(_, key)| key.nullable);
    let mut conditions: Vec<String> = nullable.map(|(name, _)| format!("{name} is not null")).collect();
    if bookmarked {
        conditions.extend(key.iter().take(equal).map(|column| format!("{column} = ?")));
        conditions.extend(key.iter().skip(equal).take(1).map(|column| format!("{column} > ?")));
    }
    let condition = if conditions.is_empty() { "true".into() } else { conditions.join(" and ") };
    format!("select {} from {} where {condition} order by {}", columns(layout), table.quoted(), key.join(", "))
}
