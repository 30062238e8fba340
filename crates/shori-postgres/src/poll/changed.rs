//! Reads the rows of a table that changed, through a cursor of the poll's transaction.
//!
//! The timestamp column finds them cheaply, and too many: it is looked at from well before the last poll. Which of them
//! are in the log already, the transaction that wrote each (`xmin`) tells: those that the last poll's snapshot showed.
//! That holds after a restart, too, and whatever the column says.

use std::collections::HashSet;

use shori_core::change::{ChangeBatch, Op};
use shori_core::position::Micros;
use shori_core::source::{BatchLimit, Rejected};
use shori_core::{Error, ErrorKind, Result};
use tokio_postgres::{Client, Row, Statement};

use super::begin::Column;
use super::bookmark::{Passed, Seen};
use crate::batch::BatchBuilder;
use crate::connect::{quoted, sql_error};
use crate::date_time::timestamp_from_binary;
use crate::positions;
use crate::snapshot::{Raw, rejected, selected, value_of};
use crate::stream::Capture;
use crate::visibility::{Shown, Visibility};

/// Rows of one fetch: what a batch may be larger than its limit in bytes.
const FETCH_ROWS: usize = 100;
/// A timestamp later than that after the clock is no measure of anything.
const AHEAD_MAX: Micros = 24 * 3600 * 1_000_000;
/// Row versions remembered. The others come again, as rows of a snapshot, which change nothing.
const REMEMBERED_MAX: usize = 200_000;
/// Before the table's columns: table, place, transaction, timestamp.
const HEAD_COLUMNS: usize = 4;

/// What a poll is to find in a table.
pub(super) struct Wanted<'a> {
    pub column: &'a Column,
    /// What is in the log.
    pub since: &'a Seen,
    /// Only what this shows: a poll that showed it was not finished.
    pub up_to: Option<&'a Visibility>,
    /// Only what lies behind.
    pub after: Option<Passed>,
    /// Rows from here on, by their timestamp; all if `None`.
    pub from: Option<Micros>,
    /// The table is being read whole, or it is not known how much of it is in the log.
    pub is_snapshot: bool,
}

/// A row version: table, block and line, transaction.
type Version = (u32, [u8; 6], u32);

/// Row versions that are in the log, and that the next poll could not tell by their transaction: it may have been part
/// of one that is still open.
#[derive(Default)]
pub(super) struct Remembered(HashSet<Version>);

impl Remembered {
    fn insert(&mut self, version: Version) {
        if self.0.len() < REMEMBERED_MAX {
            self.0.insert(version);
        }
    }

    /// Forgets those that `visibility` tells.
    pub fn settle(&mut self, visibility: &Visibility) {
        self.0.retain(|(.., xid)| visibility.tells(*xid) == Shown::Unknown);
    }
}

/// Where and when rows are read.
pub(super) struct Place<'a> {
    pub time: Micros,
    pub part: u32,
    pub visibility: &'a Visibility,
    /// How far the column's own time is from UTC.
    pub offset: Micros,
}

#[derive(Default)]
pub(super) struct Part {
    pub rows: Option<ChangeBatch>,
    pub rejected: Vec<Rejected>,
    pub bytes: usize,
    pub newest: Micros,
    pub highest: Option<Micros>,
    /// The last row that was looked at.
    pub last: Option<(u32, [u8; 6])>,
    pub ended: bool,
}

/// An open cursor.
pub(super) struct Cursor {
    fetch: Option<(usize, Statement)>,
}

fn fail(capture: &Capture) -> impl Fn(tokio_postgres::Error) -> Error + use<> {
    let table = capture.table.name.clone();
    move |cause| sql_error("poll", &format!("table {table}"), cause)
}

fn table(capture: &Capture) -> String {
    format!("{}.{}", quoted(&capture.schema_name), quoted(&capture.table.name))
}

impl Cursor {
    pub async fn open(client: &Client, capture: &Capture, wanted: &Wanted<'_>) -> Result<Self> {
        let name = quoted(&wanted.column.name);
        let by_time = match wanted.from {
            // Who sets no timestamp is seen, too.
            Some(from) if wanted.column.nullable => {
                format!("({name} >= {} or {name} is null) and", wanted.column.literal(from))
            }
            Some(from) => format!("{name} >= {} and", wanted.column.literal(from)),
            None => String::new(),
        };
        let behind = wanted.after.map_or(String::new(), |Passed { relation, block, line, .. }| {
            format!("(tableoid > {relation} or tableoid = {relation} and ctid > '({block},{line})'::tid) and")
        });
        let declare = format!(
            "declare shori_poll no scroll cursor for
            select tableoid, ctid, xmin, {name}, {}
            from {}
            where {by_time} {behind} pg_catalog.age(xmin) <= pg_catalog.age('{}'::xid)
            order by tableoid, ctid",
            selected(&capture.layout, &[]),
            table(capture),
            wanted.since.visibility.oldest_xid(),
        );
        client.batch_execute(&declare).await.map_err(fail(capture))?;
        Ok(Self { fetch: None })
    }

    pub async fn close(self, client: &Client, capture: &Capture) -> Result<()> {
        client.batch_execute("close shori_poll").await.map_err(fail(capture))
    }

    /// The next rows within the limit.
    pub async fn read(
        &mut self,
        client: &Client,
        capture: &Capture,
        wanted: &Wanted<'_>,
        place: &Place<'_>,
        remembered: &mut Remembered,
        limit: BatchLimit,
    ) -> Result<Part> {
        let mut part = Part::default();
        let mut builder = BatchBuilder::new(capture.id.clone(), &capture.layout)?;
        let mut index = 0;
        while (index as usize) < limit.rows && builder.bytes() < limit.bytes && !part.ended {
            let count = FETCH_ROWS.min(limit.rows - index as usize);
            let rows = self.fetch(client, capture, count).await?;
            part.ended = rows.len() < count;
            for row in &rows {
                let found = Found::of(capture, row)?;
                part.last = Some((found.version.0, found.version.1));
                let Some(op) = found.op(wanted, remembered) else { continue };
                let values: Vec<_> = (0..capture.layout.columns.len())
                    .map(|column| {
                        let raw = row.try_get::<_, Option<Raw<'_>>>(HEAD_COLUMNS + column).map_err(fail(capture))?;
                        Ok(value_of(&capture.layout, column, raw))
                    })
                    .collect::<Result<_>>()?;
                let position = positions::of_chunk_row(end_of(place.time), place.part, index)?;
                index += 1;
                let time = found.time.map_or(place.time, |time| (time - place.offset).min(place.time));
                part.newest = part.newest.max(time);
                part.highest =
                    part.highest.max(found.time.filter(|time| *time <= place.time + place.offset + AHEAD_MAX));
                if place.visibility.tells(found.version.2) == Shown::Unknown {
                    remembered.insert(found.version);
                }
                if let Err(reason) = builder.push(values.iter().copied(), &position, op, time) {
                    part.rejected.push(rejected(capture, position, reason, &values));
                }
            }
        }
        part.bytes = builder.bytes();
        part.rows = builder.finish()?;
        Ok(part)
    }

    async fn fetch(&mut self, client: &Client, capture: &Capture, count: usize) -> Result<Vec<Row>> {
        let statement = match &self.fetch {
            Some((prepared, statement)) if *prepared == count => statement.clone(),
            _ => {
                let text = format!("fetch forward {count} from shori_poll");
                let statement = client.prepare(&text).await.map_err(fail(capture))?;
                self.fetch = Some((count, statement.clone()));
                statement
            }
        };
        client.query(&statement, &[]).await.map_err(fail(capture))
    }
}

/// A poll's place as positions take it: the place in a log that ends behind it.
pub(super) fn end_of(time: Micros) -> u64 {
    time.unsigned_abs().saturating_add(1)
}

/// The file that a table or partition is in.
pub(super) async fn file_of(client: &Client, relation: u32) -> Result<u32> {
    let query = "select coalesce(pg_catalog.pg_relation_filenode($1::oid), 0::oid)";
    let row = client.query_one(query, &[&relation]).await;
    Ok(row.map_err(|cause| sql_error("look at", "the file of a table", cause))?.get(0))
}

/// The highest timestamp in a table.
pub(super) async fn highest(
    client: &Client,
    capture: &Capture,
    column: &Column,
    now: Micros,
) -> Result<Option<Micros>> {
    let name = quoted(&column.name);
    let query = format!(
        "select (extract(epoch from max({name})) * 1000000)::int8 from {} where {name} <= {} and {name} > '-infinity'",
        table(capture),
        column.literal(now.saturating_add(AHEAD_MAX))
    );
    Ok(client.query_one(&query, &[]).await.map_err(fail(capture))?.get(0))
}

/// A row that was found, besides its columns.
struct Found {
    version: Version,
    /// In the column's own time; none where it is null, or no moment.
    time: Option<Micros>,
}

impl Found {
    fn of(capture: &Capture, row: &Row) -> Result<Self> {
        let raw = |index: usize| row.try_get::<_, Option<Raw<'_>>>(index).map_err(fail(capture));
        let (relation, place, xid, time) = (raw(0)?, raw(1)?, raw(2)?, raw(3)?);
        let number = |raw: Option<Raw<'_>>| Some(u32::from_be_bytes(raw?.0.try_into().ok()?));
        let version = || Some((number(relation)?, place?.0.try_into().ok()?, number(xid)?));
        let version = version().ok_or_else(|| {
            let object = format!("a row of table {}", capture.table.name);
            Error::new(ErrorKind::Data, "decode", object, "it has no place or no transaction")
        })?;
        Ok(Self { version, time: time.and_then(|Raw(bytes)| timestamp_from_binary(bytes).ok()) })
    }

    /// What its image is; `None` where that is in the log.
    ///
    /// What may be there already is told as a row of a snapshot: one that is as it stands changes nothing.
    fn op(&self, wanted: &Wanted<'_>, remembered: &Remembered) -> Option<Op> {
        let xid = self.version.2;
        match wanted.since.visibility.tells(xid) {
            Shown::Yes => None,
            // The next look finds it.
            _ if wanted.up_to.is_some_and(|begun| begun.tells(xid) == Shown::No) => None,
            _ if wanted.is_snapshot => Some(Op::Snapshot),
            Shown::No if wanted.up_to.is_none_or(|begun| begun.tells(xid) == Shown::Yes) => Some(Op::UpdateAfter),
            Shown::No => Some(Op::Snapshot),
            Shown::Unknown => (!remembered.0.contains(&self.version)).then_some(Op::Snapshot),
        }
    }
}
