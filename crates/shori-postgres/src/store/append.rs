//! Appending to the log: rows and watermarks of a timeline's batch in one transaction.
//!
//! A watermark is compared and set (contract 6): the transaction locks the rows of its timeline before it reads them, so
//! that of two writers the second waits for the first, and decides by what it has left.

use std::collections::BTreeMap;

use arrow::array::{BinaryArray, BinaryBuilder};
use shori_core::change::ChangeBatch;
use shori_core::position::{CaptureId, Position, SortKey, Watermark};
use shori_core::source::Rejected;
use shori_core::store::{Append, Appended};
use shori_core::{Error, ErrorKind, Result, failpoint};

use super::captures::{self, unknown};
use super::copy_in::{Column, CopyIn};
use super::layout;
use super::session::{Link, Time, get_position, now, storable};
use crate::connect::quoted;

const WATERMARKS: &str = "watermarks";

const LOCK_WATERMARKS: &str = "
select source_name, capture_instance, staging_table, last_ingested_lsn, last_seq, boundary_lsn, boundary_seq,
    boundary_time
from ctl_ingestion_watermarks
where timeline = $1
order by source_name, capture_instance
for update";

const MOVE_WATERMARKS: &str = "
update ctl_ingestion_watermarks as w
set last_ingested_lsn = n.lsn, last_seq = n.seq, boundary_lsn = n.boundary_lsn, boundary_seq = n.boundary_seq,
    boundary_time = n.boundary_time, updated_at = $8
from unnest($1::text[], $2::text[], $3::bytea[], $4::bytea[], $5::bytea[], $6::bytea[], $7::timestamp[])
    as n (source_name, capture_instance, lsn, seq, boundary_lsn, boundary_seq, boundary_time)
where w.source_name = n.source_name and w.capture_instance = n.capture_instance";

const INSERT_REJECTED: &str = "
insert into ctl_rejected_changes
    (source_name, capture_instance, lsn, seqval, reason, raw, rejected_at)
values ($1, $2, $3, $4, $5, $6, $7)";

struct Stored {
    staging_table: String,
    watermark: Watermark,
}

pub(super) async fn append(link: &Link, append: &Append<'_>) -> Result<Appended> {
    let stored = lock(link, append.timeline).await?;
    let new = append.watermark;
    let mut applied = true;
    let mut conflict = false;
    for (id, expected) in append.expected {
        let watermark = stored.get(id).ok_or_else(|| unknown(id))?.watermark;
        applied &= watermark.staged >= new.staged && watermark.boundary >= new.boundary;
        conflict |= watermark.staged != *expected;
    }
    if applied {
        return Ok(Appended::AlreadyApplied);
    }
    if conflict {
        return Ok(Appended::Conflict);
    }
    for info in append.schemas {
        captures::take_schema(link, &captures::one(link, &info.id).await?, &info.schema).await?;
    }
    if !append.changes.is_empty() {
        link.run("set local statement_timeout = 0", "the log").await?;
    }
    let mut rows = 0;
    for batch in append.changes.iter().filter(|batch| append.expected.contains_key(&batch.capture)) {
        let known = stored.get(&batch.capture).ok_or_else(|| unknown(&batch.capture))?;
        if !batch.is_empty() && batch.position(batch.len() - 1)? > new.staged {
            let cause = "it reaches above the watermark that comes with it";
            return Err(Error::new(ErrorKind::Internal, "append", format!("a batch of {}", batch.capture), cause));
        }
        rows += stage(link, batch, known).await?;
    }
    failpoint::reached(failpoint::STORE_INSIDE_APPEND);
    for (id, progress) in append.snapshots {
        // A capture that is ahead of the batch has been here before.
        if stored.get(id).ok_or_else(|| unknown(id))?.watermark.staged < new.staged {
            captures::put_snapshot(link, id, progress).await?;
        }
    }
    for rejected in append.rejected {
        let known = stored.get(&rejected.capture).ok_or_else(|| unknown(&rejected.capture))?;
        if rejected.position > known.watermark.staged {
            put_rejected(link, rejected).await?;
        }
    }
    move_watermarks(link, append, &stored).await?;
    Ok(Appended::Applied { rows })
}

async fn lock(link: &Link, timeline: &str) -> Result<BTreeMap<CaptureId, Stored>> {
    let mut stored = BTreeMap::new();
    for row in link.rows(LOCK_WATERMARKS, &[&timeline], WATERMARKS).await? {
        let watermark = Watermark {
            staged: get_position(&row, 3)?,
            boundary: get_position(&row, 5)?,
            boundary_time: row.get::<_, Time>(7).0,
        };
        stored.insert(CaptureId::new(row.get(0), row.get(1)), Stored { staging_table: row.get(2), watermark });
    }
    Ok(stored)
}

/// Neither part of a watermark ever moves back.
async fn move_watermarks(link: &Link, append: &Append<'_>, stored: &BTreeMap<CaptureId, Stored>) -> Result<()> {
    let next = append.watermark;
    let moved: Vec<(&CaptureId, Watermark)> = (stored.iter())
        .filter(|(id, _)| append.expected.contains_key(id))
        .map(|(id, known)| {
            let mut moved = known.watermark;
            moved.staged = moved.staged.max(next.staged);
            if next.boundary > moved.boundary {
                (moved.boundary, moved.boundary_time) = (next.boundary, next.boundary_time);
            }
            (id, moved)
        })
        .collect();
    let names = |name: fn(&CaptureId) -> &str| moved.iter().map(|(id, _)| name(id)).collect::<Vec<_>>();
    let keys = |key: fn(&Watermark) -> &SortKey| moved.iter().map(|(_, mark)| key(mark).as_slice()).collect::<Vec<_>>();
    let times: Vec<Time> = moved.iter().map(|(_, mark)| Time(mark.boundary_time)).collect();
    link.execute(
        MOVE_WATERMARKS,
        &[
            &names(|id| &id.source),
            &names(|id| &id.instance),
            &keys(|mark| &mark.staged.lsn),
            &keys(|mark| &mark.staged.seq),
            &keys(|mark| &mark.boundary.lsn),
            &keys(|mark| &mark.boundary.seq),
            &times,
            &Time(now()),
        ],
        WATERMARKS,
    )
    .await
    .map(drop)
}

/// Appends the rows above the stored watermark.
async fn stage(link: &Link, batch: &ChangeBatch, known: &Stored) -> Result<u64> {
    let last = Position::new(SortKey::MAX, SortKey::MAX);
    let batch = batch.between(&known.watermark.staged, &last)?;
    if batch.is_empty() {
        return Ok(0);
    }
    let masks = match &batch.unchanged {
        Some(masks) => {
            let capture = captures::one(link, &batch.capture).await?;
            let from: Vec<&str> = batch.schema.columns.fields().iter().map(|field| field.name().as_str()).collect();
            let to: Vec<&str> = capture.staging_columns.iter().map(String::as_str).collect();
            Some(move_marks(masks, &from, &to)?)
        }
        None => None,
    };
    let names: Vec<String> =
        batch.schema.columns.fields().iter().map(|field| layout::staging_column(field.name())).collect();
    let mut columns =
        vec![Column::new("lsn", &batch.lsn)?, Column::new("seqval", &batch.seq)?, Column::new("op", &batch.op)?];
    for (name, array) in names.iter().zip(&batch.columns) {
        columns.push(Column::new(name, array)?);
    }
    columns.push(Column::time("ingested_at", now()));
    columns.push(Column::new("commit_time", &batch.commit_time)?);
    if let Some(masks) = &masks {
        columns.push(Column::new("unchanged_columns", masks)?);
    }
    let into: Vec<String> = columns.iter().map(|column| column.name().to_string()).collect();
    let mut copy = CopyIn::begin(link, &quoted(&known.staging_table), &into, &known.staging_table).await?;
    copy.push(&columns, batch.len()).await?;
    copy.finish().await
}

/// Masks over the columns `from`, as masks over the columns `to`. Marks of columns that `to` lacks are left out; a mask
/// without marks is null.
pub(super) fn move_marks(masks: &BinaryArray, from: &[&str], to: &[&str]) -> Result<BinaryArray> {
    if to.starts_with(from) {
        return Ok(masks.clone());
    }
    let places: Vec<Option<usize>> = from.iter().map(|name| to.iter().position(|other| other == name)).collect();
    let mut moved = BinaryBuilder::new();
    for mask in masks {
        let mut bytes = vec![0u8; to.len().div_ceil(8)];
        for (index, place) in places.iter().enumerate() {
            let is_marked = mask.and_then(|mask| mask.get(index / 8)).is_some_and(|byte| byte >> (index % 8) & 1 == 1);
            if let (true, Some(place)) = (is_marked, place) {
                bytes[place / 8] |= 1 << (place % 8);
            }
        }
        if bytes.iter().all(|byte| *byte == 0) {
            moved.append_null();
        } else {
            moved.append_value(&bytes);
        }
    }
    Ok(moved.finish())
}

async fn put_rejected(link: &Link, rejected: &Rejected) -> Result<()> {
    let (lsn, seq) = (rejected.position.lsn.as_slice(), rejected.position.seq.as_slice());
    let (source, instance, reason) = (&*rejected.capture.source, &*rejected.capture.instance, &rejected.reason);
    link.execute(
        INSERT_REJECTED,
        &[&source, &instance, &lsn, &seq, &storable(reason), &rejected.raw, &Time(now())],
        "rejected changes",
    )
    .await
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_follow_their_columns() {
        let masks = BinaryArray::from(vec![Some(&[0b101u8][..]), None, Some(&[0b010][..])]);
        let moved = move_marks(&masks, &["a", "b", "c"], &["a", "x", "c"]).unwrap();
        assert_eq!(moved, BinaryArray::from(vec![Some(&[0b101u8][..]), None, None]));
        let wide = ["a", "1", "2", "3", "4", "5", "6", "7", "b", "c"];
        let moved = move_marks(&masks, &["a", "b", "c"], &wide).unwrap();
        assert_eq!(moved.value(0), [1, 2]);
        assert_eq!(moved.value(2), [0, 1]);
    }
}
