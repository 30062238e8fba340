//! One step of reading: a boundary is chosen as the target, then changes of all tables are merged up to there.

use shori_core::Result;
use shori_core::position::Position;
use shori_core::schema::SchemaChange;
use shori_core::source::{BatchLimit, CaptureInfo, SourceBatch};
use shori_core::{Error, ErrorKind};

use crate::cursor::{self, Cursor, Table};
use crate::decode::BatchBuilder;
use crate::names::Chain;
use crate::tail::{Place, Tail};

/// Most bytes of one batch whatever the limit: Arrow's offsets end at 2 GiB.
const BATCH_BYTES_MAX: usize = 512 << 20;

/// Reads one batch, and where reading stands after it.
pub fn step(mut cursor: Cursor, limit: BatchLimit) -> Result<(SourceBatch, Cursor)> {
    let limit = BatchLimit { rows: limit.rows.max(1), bytes: limit.bytes.clamp(1, BATCH_BYTES_MAX) };
    let mut batch = SourceBatch::empty(cursor.watermark);
    if cursor.target.is_none() {
        cursor.target = cursor::next_target(&cursor)?;
    }
    let Some(target) = cursor.target else { return Ok((batch, cursor)) };
    let reached = read(&mut cursor, target.position, limit, &mut batch)?;
    let mark = &mut cursor.watermark;
    mark.staged = mark.staged.max(reached);
    if reached == target.position {
        (mark.boundary, mark.boundary_time) = (reached, mark.boundary_time.max(target.time));
        cursor.target = None;
    }
    let boundary = mark.boundary;
    for table in &mut cursor.tables {
        let ended = table.ended(&boundary);
        batch.snapshots.extend(ended.into_iter().map(|progress| (table.id.clone(), progress)));
    }
    batch.watermark = cursor.watermark;
    batch.more = !cursor.tables.is_empty();
    Ok((batch, cursor))
}

/// A table while a batch is read.
struct Reading {
    chain: Chain,
    /// `None` where its files end.
    tail: Option<Tail>,
    builder: BatchBuilder,
    rows: usize,
}

/// Reads up to `target`, as far as the limit allows. Returns how far.
fn read(cursor: &mut Cursor, target: Position, limit: BatchLimit, batch: &mut SourceBatch) -> Result<Position> {
    let watermark = cursor.watermark;
    let mut cap = target;
    let mut readings = Vec::with_capacity(cursor.tables.len());
    let mut tables = Vec::with_capacity(cursor.tables.len());
    for mut table in std::mem::take(&mut cursor.tables) {
        let chain = Chain::read(&table.folder)?.unwrap_or_default();
        let from = table.from(&watermark);
        let mut tail = None;
        if let Some(name) = chain.following(&from) {
            let place = match table.place.take().filter(|place| place.name == name) {
                Some(place) => place,
                None => Place::begin(&table.folder, &name)?,
            };
            if let Err(error) = follow_schema(&mut table, &place, batch) {
                batch.failed.push((table.id.clone(), error));
                continue;
            }
            tell_begun(&mut table, &place, cursor, batch);
            tail = Some(Tail::open(&table.folder, place, &from)?);
        }
        let builder = BatchBuilder::new(table.id.clone(), table.schema.clone())?;
        let mut reading = Reading { chain, tail, builder, rows: 0 };
        pass_ends(&mut table, &mut reading, &mut cap, cursor, batch)?;
        readings.push(reading);
        tables.push(table);
    }
    let reached = merge(&mut tables, &mut readings, &mut cap, limit, cursor, batch)?;
    for (table, reading) in tables.iter_mut().zip(readings) {
        table.place = reading.tail.map(|tail| tail.place());
        if reading.rows > 0 {
            batch.changes.push(reading.builder.finish()?);
        }
    }
    cursor.tables = tables;
    Ok(reached)
}

/// Takes changes in position order until the cap or the limit. A table whose next file has another schema lowers the cap.
fn merge(
    tables: &mut [Table],
    readings: &mut [Reading],
    cap: &mut Position,
    limit: BatchLimit,
    cursor: &Cursor,
    batch: &mut SourceBatch,
) -> Result<Position> {
    let (mut rows, mut bytes, mut last) = (0, 0, cursor.watermark.staged);
    loop {
        let heads = readings.iter().enumerate();
        let heads = heads.filter_map(|(index, reading)| Some((reading.tail.as_ref()?.next()?, index)));
        let Some((position, index)) = heads.min().filter(|(position, _)| *position <= *cap) else { return Ok(*cap) };
        if rows >= limit.rows || bytes >= limit.bytes {
            return Ok(last);
        }
        let reading = &mut readings[index];
        let builder = &mut reading.builder;
        if let Some(tail) = &mut reading.tail {
            bytes += tail.take(|change| builder.push(change))?;
        }
        reading.rows += 1;
        (rows, last) = (rows + 1, position);
        pass_ends(&mut tables[index], reading, cap, cursor, batch)?;
    }
}

/// At the end of a file, goes on in the next one, if it is of the same schema.
fn pass_ends(
    table: &mut Table,
    reading: &mut Reading,
    cap: &mut Position,
    cursor: &Cursor,
    batch: &mut SourceBatch,
) -> Result<()> {
    while let Some(tail) = reading.tail.as_ref().filter(|tail| tail.next().is_none()) {
        let end = tail.name().up_to;
        let Some(name) = reading.chain.following(&end).filter(|_| end < *cap) else { return Ok(()) };
        let place = Place::begin(&table.folder, &name)?;
        if place.head.schema != table.schema {
            *cap = end;
            return Ok(());
        }
        tell_begun(table, &place, cursor, batch);
        reading.tail = Some(Tail::open(&table.folder, place, &end)?);
    }
    Ok(())
}

fn tell_begun(table: &mut Table, place: &Place, cursor: &Cursor, batch: &mut SourceBatch) {
    let begun = table.meet(&place.head.header, &cursor.watermark);
    batch.snapshots.extend(begun.into_iter().map(|progress| (table.id.clone(), progress)));
}

/// From here on, changes have the schema of the file at `place`.
fn follow_schema(table: &mut Table, place: &Place, batch: &mut SourceBatch) -> Result<()> {
    let next = &place.head.schema;
    if *next == table.schema {
        return Ok(());
    }
    if let SchemaChange::Incompatible { reason } = table.schema.change_to(next) {
        let object = format!("table {}", table.id.instance);
        return Err(Error::new(ErrorKind::Schema, "capture", object, reason)
            .with_remedy(format!("run shori resnapshot --retyped {}", table.id.instance)));
    }
    table.schema = next.clone();
    batch.schemas.push(CaptureInfo { id: table.id.clone(), schema: next.clone() });
    Ok(())
}
