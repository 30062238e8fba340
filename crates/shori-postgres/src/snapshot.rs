//! Reading a table whole, a chunk at a time, while the stream goes on.
//!
//! # How it works
//!
//! Each chunk is read under a snapshot of its own, and stands above what the stream has brought by then. That is right if
//! the snapshot shows every transaction read so far: if it does not yet (a commit is sent before it is visible), the
//! chunk is tried again. The snapshot may show commits that are still to come in the stream: they come again, as the
//! newer images that they are, and no boundary is told before all of them have come. So at each boundary the log
//! holds every change up to it and none above (contract 3).
//!
//! A table is read in the order of its blocks, from the bookmark on, up to where it ended when the snapshot began: what
//! moves or comes meanwhile comes with the stream. Each partition is read so, by its object id. A table that was
//! rewritten (`vacuum full`) is begun anew.

use bytes::Bytes;
use futures::StreamExt;
use shori_core::change::{ChangeBatch, Op};
use shori_core::position::{Micros, Position};
use shori_core::source::{BatchLimit, Rejected, SnapshotProgress, SnapshotState};
use shori_core::{Error, ErrorKind, Result};
use tokio_postgres::types::{FromSql, PgLsn, Type};
use tokio_postgres::{Client, Transaction};

use crate::batch::BatchBuilder;
use crate::catalog::{Layout, columns_gone};
use crate::connect::{quoted, sql_error};
use crate::copied::Rows;
use crate::message::{Value, WalLocation};
use crate::positions;
use crate::stream::Capture;
use crate::visibility::Visibility;

/// Rows and bytes that a block is taken to hold before it is known.
const ROWS_PER_BLOCK: f64 = 100.0;
const BYTES_PER_BLOCK: f64 = 16_384.0;
/// Blocks read by one statement.
const BLOCKS_MAX: f64 = 65_536.0;
/// Rows of a chunk that stand in one batch: more would be moved each time that a column of it grows.
const BATCH_ROWS: usize = 16_384;

/// What a session sees, and when.
pub(crate) struct Sight {
    pub visibility: Visibility,
    /// Above every commit that is shown.
    pub wal_end: WalLocation,
    pub time: Micros,
}

impl Sight {
    /// The first statement of a transaction of isolation level repeatable read: its snapshot is taken here.
    pub async fn of(client: &impl tokio_postgres::GenericClient) -> Result<Self> {
        let query = "
            select
                pg_catalog.pg_current_snapshot()::text,
                pg_catalog.pg_current_wal_insert_lsn(),
                (extract(epoch from pg_catalog.clock_timestamp()) * 1000000)::int8,
                pg_catalog.current_setting('wal_block_size')::int8,
                pg_catalog.pg_size_bytes(pg_catalog.current_setting('wal_segment_size'))";
        let row =
            client.query_one(query, &[]).await.map_err(|cause| sql_error("look at", "the server's snapshot", cause))?;
        let text: String = row.get(0);
        let visibility = Visibility::read(&text)?;
        let (page, file): (i64, i64) = (row.get(3), row.get(4));
        let wal_end = end_of_record(row.get::<_, PgLsn>(1).into(), page.unsigned_abs(), file.unsigned_abs());
        Ok(Self { visibility, wal_end, time: row.get(2) })
    }
}

/// Where the last record ends, given where the next one is to begin: behind a header, if that is on a new page. At rest
/// the log is read up to the one, and not to the other. Header sizes: `XLogPageHeaderData` and, first in a file,
/// `XLogLongPageHeaderData`.
fn end_of_record(next: WalLocation, page_bytes: u64, file_bytes: u64) -> WalLocation {
    const HEADER: u64 = 24;
    const FILE_HEADER: u64 = 40;
    let offset = |bytes: u64| next.checked_rem(bytes).unwrap_or(0);
    if offset(file_bytes) == FILE_HEADER {
        next - FILE_HEADER
    } else if offset(page_bytes) == HEADER {
        next - HEADER
    } else {
        next
    }
}

pub(crate) async fn begin(client: &mut Client) -> Result<Transaction<'_>> {
    let building =
        client.build_transaction().read_only(true).isolation_level(tokio_postgres::IsolationLevel::RepeatableRead);
    building.start().await.map_err(|cause| sql_error("begin", "a snapshot", cause))
}

/// Rows of one capture, read under one snapshot.
pub(crate) struct Chunk {
    pub changes: Vec<ChangeBatch>,
    pub rejected: Vec<Rejected>,
    pub bytes: usize,
    /// Where the next one goes on.
    pub bookmark: Bookmark,
    /// Whether nothing of the table is left to be read.
    pub ended: bool,
}

/// Where and when a chunk is read.
pub(crate) struct Place<'a> {
    /// How far the stream has been read.
    pub read_to: WalLocation,
    /// The chunk's number there.
    pub chunk: u32,
    pub time: Micros,
    /// Rows that the publication leaves out are left out.
    pub filter: Option<&'a str>,
}

/// Reads the next rows of a table within the limit, in a transaction of the client's.
pub(crate) async fn read_chunk(
    client: &Client,
    capture: &Capture,
    place: &Place<'_>,
    bookmark: Option<Bookmark>,
    limit: BatchLimit,
) -> Result<Chunk> {
    let layout = &*capture.layout;
    let mut reader = Reader {
        client,
        capture,
        place,
        limit,
        builder: BatchBuilder::new(capture.id.clone(), layout)?,
        changes: Vec::new(),
        bytes: 0,
        rejected: Vec::new(),
        rows: 0,
        gone: columns_gone(client, layout).await?,
    };
    let mut bookmark = bookmark.filter(|bookmark| bookmark.table == layout.oid);
    let ended = loop {
        let Some(part) = reader.part_after(bookmark).await? else { break true };
        let at = reader.read(part).await?;
        bookmark = Some(at);
        if reader.is_full() {
            break false;
        }
    };
    let bookmark = bookmark.unwrap_or(Bookmark::nowhere(layout.oid));
    let bytes = reader.bytes();
    let Reader { builder, mut changes, rejected, .. } = reader;
    changes.extend(builder.finish()?);
    Ok(Chunk { changes, rejected, bytes, bookmark, ended })
}

impl Chunk {
    /// Of images that can be carried.
    pub fn len(&self) -> usize {
        self.changes.iter().map(ChangeBatch::len).sum()
    }

    /// How far the snapshot has come once the chunk is in the log, which had come to `before` and stands at `at`.
    pub fn progress(&self, before: &SnapshotProgress, at: Position, place: &Place<'_>) -> Result<SnapshotProgress> {
        let mut progress = before.clone();
        let has_begun = progress.state != SnapshotState::Requested;
        if !has_begun {
            progress.state = SnapshotState::Running;
            progress.start = at;
        }
        progress.resume = self.bookmark.encode();
        progress.rows += self.len() as u64;
        // The end is a boundary, by which projections may stop. So it has a chunk of its own that read nothing: by then,
        // all that the one before it showed has come in the stream.
        if self.ended && has_begun && self.len() == 0 && self.rejected.is_empty() {
            progress.state = SnapshotState::Done;
            progress.end = positions::of_chunk_end(place.read_to, place.chunk)?;
            progress.end_time = place.time;
        }
        Ok(progress)
    }
}

struct Reader<'a> {
    client: &'a Client,
    capture: &'a Capture,
    place: &'a Place<'a>,
    limit: BatchLimit,
    builder: BatchBuilder,
    /// Batches before the one that is being built, and their bytes.
    changes: Vec<ChangeBatch>,
    bytes: usize,
    rejected: Vec<Rejected>,
    rows: u32,
    /// Columns that the table has no more.
    gone: Vec<bool>,
}

/// A table or partition with storage of its own, and where to read on in it.
struct Part {
    bookmark: Bookmark,
    /// As many as the rows take that are still to be read.
    blocks_at_once: u32,
}

impl Reader<'_> {
    fn fail(&self, cause: tokio_postgres::Error) -> Error {
        sql_error("read a snapshot of", &format!("table {}", self.capture.table.name), cause)
    }

    fn bytes(&self) -> usize {
        self.bytes + self.builder.bytes()
    }

    fn is_full(&self) -> bool {
        self.rows as usize >= self.limit.rows || self.bytes() >= self.limit.bytes
    }

    /// Where to go on; `None` at the end of the last part.
    async fn part_after(&self, bookmark: Option<Bookmark>) -> Result<Option<Part>> {
        let query = "
            with parts as (
                select relid::oid as part from pg_catalog.pg_partition_tree($1::oid::regclass) where isleaf
                union
                select oid from pg_catalog.pg_class where oid = $1 and relkind = 'r'
            )
            select
                part,
                coalesce(pg_catalog.pg_relation_filenode(part), 0::oid),
                coalesce(pg_catalog.pg_relation_size(part), 0) / pg_catalog.current_setting('block_size')::int8,
                reltuples::float8,
                relpages::float8,
                coalesce(pg_catalog.pg_table_size(part), 0)::float8
            from parts
            join pg_catalog.pg_class on pg_class.oid = part
            where part >= $2 and relkind = 'r'
            order by part";
        let table = self.capture.layout.oid;
        let from = bookmark.map_or(0, |bookmark| bookmark.part);
        let rows = self.client.query(query, &[&table, &from]).await.map_err(|cause| self.fail(cause))?;
        for row in &rows {
            let (part, file): (u32, u32) = (row.get(0), row.get(1));
            let blocks = u32::try_from(row.get::<_, i64>(2)).unwrap_or(u32::MAX);
            let here = match bookmark {
                Some(known) if known.part == part && known.file == file => known,
                _ => Bookmark { table, part, file, blocks, block: 0, row: 0 },
            };
            if here.block >= here.blocks {
                continue;
            }
            let (tuples, pages, bytes): (f64, f64, f64) = (row.get(3), row.get(4), row.get(5));
            let per_block = if tuples > 0.0 && pages > 0.0 { (tuples / pages).max(1.0) } else { ROWS_PER_BLOCK };
            let block_bytes = if blocks > 0 { (bytes / f64::from(blocks)).max(1.0) } else { BYTES_PER_BLOCK };
            let by_rows = self.limit.rows.saturating_sub(self.rows as usize) as f64 / per_block;
            let by_bytes = self.limit.bytes.saturating_sub(self.bytes()) as f64 / block_bytes;
            let blocks_at_once = by_rows.min(by_bytes).ceil().clamp(1.0, BLOCKS_MAX) as u32;
            return Ok(Some(Part { bookmark: here, blocks_at_once }));
        }
        Ok(None)
    }

    /// Reads some blocks of a part, as far as the limit allows.
    async fn read(&mut self, part: Part) -> Result<Bookmark> {
        let Part { bookmark: from, blocks_at_once } = part;
        let end = from.block.saturating_add(blocks_at_once).min(from.blocks);
        let query = self.query(&from, end).await?;
        let layout = self.capture.layout.clone();
        let stream = self.client.copy_out(&query).await.map_err(|cause| self.fail(cause))?;
        let mut stream = std::pin::pin!(stream);
        let undecoded = |table: &str, cause: &'static str| {
            Error::new(ErrorKind::Data, "decode", format!("a row of table {table}"), cause)
        };
        let mut rows = Rows::default();
        while let Some(message) = stream.next().await {
            rows.push(message.map_err(|cause| self.fail(cause))?);
            while rows.advance().map_err(|fault| undecoded(&self.capture.table.name, fault))?.is_some() {
                let (block, offset) =
                    place_of(&rows).ok_or_else(|| undecoded(&self.capture.table.name, "it has no place"))?;
                self.push(&layout, &rows)?;
                if self.is_full() {
                    return Ok(Bookmark { block, row: offset.saturating_add(1), ..from });
                }
            }
        }
        Ok(Bookmark { block: end, row: 0, ..from })
    }

    async fn query(&self, from: &Bookmark, end: u32) -> Result<String> {
        let name = "select n.nspname::text, c.relname::text from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.oid = $1";
        let row = self.client.query_one(name, &[&from.part]).await.map_err(|cause| self.fail(cause))?;
        let (schema, table): (String, String) = (row.get(0), row.get(1));
        let filter = self.place.filter.map(|filter| format!(" and ({filter})")).unwrap_or_default();
        Ok(format!(
            "copy (
                select ctid, {}
                from only {}.{}
                where ctid >= '({},{})'::tid and ctid < '({end},0)'::tid{filter}
            ) to stdout (format binary)",
            selected(&self.capture.layout, &self.gone),
            quoted(&schema),
            quoted(&table),
            from.block,
            from.row,
        ))
    }

    fn push(&mut self, layout: &Layout, row: &Rows) -> Result<()> {
        let position = positions::of_chunk_row(self.place.read_to, self.place.chunk, self.rows)?;
        self.rows += 1;
        // Behind its place.
        let values = (1..row.len()).map(|column| value_of(layout, column - 1, row.value(column).map(Raw)));
        if let Err(reason) = self.builder.push(values.clone(), &position, Op::Snapshot, self.place.time) {
            self.rejected.push(rejected(self.capture, position, reason, &values.collect::<Vec<_>>()));
        }
        if self.builder.len() >= BATCH_ROWS {
            self.bytes += self.builder.bytes();
            let next = self.builder.next(layout)?;
            self.changes.extend(std::mem::replace(&mut self.builder, next).finish()?);
        }
        Ok(())
    }
}

/// Columns of a table for a query, each as it is decoded.
///
/// Those that are gone since are null: so they are in all images to come.
pub(crate) fn selected(layout: &Layout, gone: &[bool]) -> String {
    let column = |(index, column): (usize, &crate::catalog::Column)| {
        if gone.get(index) == Some(&true) {
            return "null".into();
        }
        let name = quoted(&column.name);
        // What the type's output function prints: a cast to text may print something else. The type may be another one by
        // now, so this is asked of what prints as itself, too.
        if column.as_text {
            format!("case when {name} is not null then pg_catalog.format('%s', {name}) end")
        } else {
            name
        }
    };
    layout.columns.iter().enumerate().map(column).collect::<Vec<String>>().join(", ")
}

/// A selected column's value.
pub(crate) fn value_of<'a>(layout: &Layout, index: usize, raw: Option<Raw<'a>>) -> Value<'a> {
    match raw {
        None => Value::Null,
        Some(Raw(bytes)) if layout.columns[index].as_text => Value::Text(bytes),
        Some(Raw(bytes)) => Value::Binary(bytes),
    }
}

/// A row that cannot be carried, with its values a line each.
pub(crate) fn rejected(capture: &Capture, position: Position, reason: String, values: &[Value<'_>]) -> Rejected {
    let mut raw = Vec::new();
    for value in values {
        if let Value::Text(bytes) | Value::Binary(bytes) = value {
            raw.extend_from_slice(bytes);
        }
        raw.push(b'\n');
    }
    Rejected { capture: capture.id.clone(), position, reason, raw }
}

/// Where a row lies: block and line, the binary format of `tid`.
fn place_of(row: &Rows) -> Option<(u32, u16)> {
    let (block, line) = row.value(0)?.split_first_chunk::<4>()?;
    Some((u32::from_be_bytes(*block), u16::from_be_bytes(line.try_into().ok()?)))
}

/// Bytes of a value, of whatever type.
pub(crate) struct Raw<'a>(pub &'a [u8]);

impl<'a> FromSql<'a> for Raw<'a> {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Raw(raw))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

/// Where a snapshot goes on. Its encoding is permanent: logs keep it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Bookmark {
    /// The captured table, so that another of its name is told apart.
    pub table: u32,
    /// It, or the partition that is being read.
    part: u32,
    /// The file that holds the part: another one after it was rewritten.
    file: u32,
    /// How many blocks it had when it was begun.
    blocks: u32,
    block: u32,
    row: u16,
}

const BOOKMARK_VERSION: u8 = 1;
const BOOKMARK_BYTES: usize = 23;

impl Bookmark {
    fn nowhere(table: u32) -> Self {
        Self { table, part: 0, file: 0, blocks: 0, block: 0, row: 0 }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![BOOKMARK_VERSION];
        for number in [self.table, self.part, self.file, self.blocks, self.block] {
            bytes.extend_from_slice(&number.to_be_bytes());
        }
        bytes.extend_from_slice(&self.row.to_be_bytes());
        bytes
    }

    /// Nothing before the first chunk.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>> {
        let number = |index: usize| {
            bytes.get(1 + 4 * index..5 + 4 * index).and_then(|part| part.try_into().ok()).map(u32::from_be_bytes)
        };
        if bytes.is_empty() {
            return Ok(None);
        }
        let decoded = || {
            let row = bytes.get(21..23)?.try_into().ok().map(u16::from_be_bytes)?;
            let (table, part, file) = (number(0)?, number(1)?, number(2)?);
            Some(Self { table, part, file, blocks: number(3)?, block: number(4)?, row })
        };
        match decoded() {
            Some(bookmark) if bytes.len() == BOOKMARK_BYTES && bytes[0] == BOOKMARK_VERSION => Ok(Some(bookmark)),
            _ => Err(Error::new(ErrorKind::Corrupt, "decode", "where a snapshot goes on", "it is of no known layout")),
        }
    }
}

/// Reads columns that the stream did not send, of the row with this key; `None` when it is gone.
pub(crate) async fn read_row(
    transaction: &Transaction<'_>,
    capture: &Capture,
    key: &[Value<'_>],
) -> Result<Option<Vec<Option<Bytes>>>> {
    let layout = &capture.layout;
    let gone = columns_gone(transaction, layout).await?;
    let conditions: Vec<String> = (layout.schema.key.iter().enumerate())
        .map(|(place, index)| format!("{} = ${}", quoted(&layout.columns[*index].name), place + 1))
        .collect();
    let query = format!(
        "select {} from {}.{} where {}",
        selected(layout, &gone),
        quoted(&capture.schema_name),
        quoted(&capture.table.name),
        conditions.join(" and ")
    );
    let fail = |cause| sql_error("read a row of", &format!("table {}", capture.table.name), cause);
    let statement = transaction.prepare(&query).await.map_err(fail)?;
    let parameters: Vec<Parameter<'_>> = key.iter().map(|value| Parameter(*value)).collect();
    let parameters: Vec<&(dyn tokio_postgres::types::ToSql + Sync)> =
        parameters.iter().map(|parameter| parameter as &(dyn tokio_postgres::types::ToSql + Sync)).collect();
    let row = transaction.query_opt(&statement, &parameters).await.map_err(fail)?;
    let Some(row) = row else { return Ok(None) };
    let value = |index: usize| {
        let raw = row.try_get::<_, Option<Raw<'_>>>(index).map_err(fail)?;
        Ok(raw.map(|Raw(bytes)| Bytes::copy_from_slice(bytes)))
    };
    (0..layout.columns.len()).map(value).collect::<Result<_>>().map(Some)
}

/// A value sent back as it came.
#[derive(Debug)]
pub(crate) struct Parameter<'a>(pub Value<'a>);

impl tokio_postgres::types::ToSql for Parameter<'_> {
    fn to_sql(
        &self,
        _: &Type,
        out: &mut bytes::BytesMut,
    ) -> Result<tokio_postgres::types::IsNull, Box<dyn std::error::Error + Sync + Send>> {
        match self.0 {
            Value::Text(bytes) | Value::Binary(bytes) => {
                out.extend_from_slice(bytes);
                Ok(tokio_postgres::types::IsNull::No)
            }
            Value::Null | Value::Unchanged => Ok(tokio_postgres::types::IsNull::Yes),
        }
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> tokio_postgres::types::Format {
        match self.0 {
            Value::Text(_) => tokio_postgres::types::Format::Text,
            _ => tokio_postgres::types::Format::Binary,
        }
    }

    tokio_postgres::types::to_sql_checked!();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_ends_before_the_header_of_the_next_page() {
        let (page, file) = (8192, 16 << 20);
        for (next, end) in [
            (3 * file + 40, 3 * file),
            (3 * file + 48, 3 * file + 48),
            (3 * file + 5 * page + 24, 3 * file + 5 * page),
            (3 * file + 5 * page + 40, 3 * file + 5 * page + 40),
            (3 * file + 5 * page, 3 * file + 5 * page),
        ] {
            assert_eq!(end_of_record(next, page, file), end);
        }
    }

    #[test]
    fn the_bookmark_is_the_permanent_one() {
        let bookmark = Bookmark { table: 1, part: 2, file: 3, blocks: 4, block: 5, row: 6 };
        let bytes = bookmark.encode();
        let shown: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(shown, "0100000001000000020000000300000004000000050006");
        assert_eq!(Bookmark::decode(&bytes).unwrap(), Some(bookmark));
        assert_eq!(Bookmark::decode(&[]).unwrap(), None);
        for damaged in [&bytes[..22], &[bytes.as_slice(), &[0]].concat(), &[2; 23]] {
            assert_eq!(Bookmark::decode(damaged).unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }
}
