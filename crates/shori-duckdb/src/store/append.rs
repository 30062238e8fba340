//! Appending to the log: rows and watermarks of a timeline's batch in one transaction.
//!
//! A watermark is compared and set (contract 6): the transaction reads the stored ones, decides, and updates each row
//! that it decided by, so that of two writers one loses with a conflict, is begun again, and sees the other's.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BinaryArray, BinaryBuilder, RecordBatch, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Field, Schema, TimestampMicrosecondType};
use shori_core::change::ChangeBatch;
use shori_core::position::{CaptureId, Micros, Position, SortKey, Watermark};
use shori_core::source::{CaptureInfo, Rejected, SnapshotProgress};
use shori_core::store::{Append, Appended};
use shori_core::{Error, ErrorKind, Result, failpoint};

use super::captures::{self, id_values, unknown};
use super::layout;
use super::rewrite::{Taken, rewrite};
use super::session::{Session, blob, now, position_values, text, time, time_type};
use crate::database::duckdb_error;

const WATERMARKS: &str = "watermarks";
const WATERMARKS_TABLE: &str = "ctl_ingestion_watermarks";

const INSERT_REJECTED: &str = "
insert into ctl_rejected_changes
values (?, ?, ?, ?, ?, ?, ?)";

/// An [`Append`] that owns what it holds; arrays are shared, not copied.
pub(super) struct OwnedAppend {
    timeline: String,
    expected: BTreeMap<CaptureId, Position>,
    changes: Vec<ChangeBatch>,
    watermark: Watermark,
    snapshots: Vec<(CaptureId, SnapshotProgress)>,
    schemas: Vec<CaptureInfo>,
    rejected: Vec<Rejected>,
}

impl OwnedAppend {
    pub fn of(append: &Append<'_>) -> Self {
        Self {
            timeline: append.timeline.to_string(),
            expected: append.expected.clone(),
            changes: append.changes.to_vec(),
            watermark: append.watermark,
            snapshots: append.snapshots.to_vec(),
            schemas: append.schemas.to_vec(),
            rejected: append.rejected.to_vec(),
        }
    }
}

struct Stored {
    staging_table: String,
    watermark: Watermark,
}

pub(super) fn append(session: &Session, append: &OwnedAppend) -> Result<Appended> {
    session.transaction("the log", |session| append_once(session, append))
}

fn append_once(session: &Session, append: &OwnedAppend) -> Result<Appended> {
    // Where two writers meet: the second one fails here, before it has written rows.
    let taken = Taken::take(session, WATERMARKS_TABLE, "timeline = ?", &[text(&append.timeline)])?;
    let stored = stored_captures(&taken)?;
    let mut applied = true;
    let mut conflict = false;
    for (id, expected) in &append.expected {
        let watermark = stored.get(id).ok_or_else(|| unknown(id))?.watermark;
        applied &= watermark.staged >= append.watermark.staged && watermark.boundary >= append.watermark.boundary;
        conflict |= watermark.staged != *expected;
    }
    if applied {
        return taken.put(session, &[]).map(|()| Appended::AlreadyApplied);
    }
    if conflict {
        return taken.put(session, &[]).map(|()| Appended::Conflict);
    }
    move_watermarks(session, append, taken, &stored)?;
    for info in &append.schemas {
        captures::take_schema(session, &captures::one(session, &info.id)?, &info.schema)?;
    }
    let ingested_at = now();
    let mut rows = 0;
    for batch in &append.changes {
        let known = stored.get(&batch.capture).ok_or_else(|| unknown(&batch.capture))?;
        if !batch.is_empty() && batch.position(batch.len() - 1)? > append.watermark.staged {
            let cause = "it reaches above the watermark that comes with it";
            return Err(Error::new(ErrorKind::Internal, "append", format!("a batch of {}", batch.capture), cause));
        }
        rows += stage(session, batch, known, ingested_at)?;
    }
    failpoint::reached(failpoint::STORE_INSIDE_APPEND);
    for (id, progress) in &append.snapshots {
        captures::put_snapshot(session, id, progress)?;
    }
    for rejected in &append.rejected {
        let known = stored.get(&rejected.capture).ok_or_else(|| unknown(&rejected.capture))?;
        if rejected.position > known.watermark.staged {
            put_rejected(session, rejected)?;
        }
    }
    Ok(Appended::Applied { rows })
}

fn stored_captures(taken: &Taken) -> Result<BTreeMap<CaptureId, Stored>> {
    let names = |column| taken.column(column).filter_map(|array| array.as_string_opt::<i32>());
    let bytes = |column| taken.column(column).filter_map(|array| array.as_binary_opt::<i32>());
    let times = taken.column("boundary_time").filter_map(|array| array.as_primitive_opt::<TimestampMicrosecondType>());
    let ids = names("source_name").zip(names("capture_instance")).zip(names("staging_table"));
    let staged = bytes("last_ingested_lsn").zip(bytes("last_seq"));
    let boundaries = bytes("boundary_lsn").zip(bytes("boundary_seq")).zip(times);
    let mut stored = BTreeMap::new();
    for ((((sources, instances), tables), (lsns, seqs)), ((boundary_lsns, boundary_seqs), times)) in
        ids.zip(staged).zip(boundaries)
    {
        for row in 0..sources.len() {
            let watermark = Watermark {
                staged: Position::from_slices(lsns.value(row), seqs.value(row))?,
                boundary: Position::from_slices(boundary_lsns.value(row), boundary_seqs.value(row))?,
                boundary_time: if times.is_null(row) { 0 } else { times.value(row) },
            };
            let known = Stored { staging_table: tables.value(row).to_string(), watermark };
            stored.insert(CaptureId::new(sources.value(row), instances.value(row)), known);
        }
    }
    if stored.len() != taken.rows() {
        let cause = "a row has columns of other types than this program writes";
        return Err(Error::new(ErrorKind::Corrupt, "read", WATERMARKS, cause));
    }
    Ok(stored)
}

/// All at once where all captures of the timeline move alike, which is the rule.
fn move_watermarks(
    session: &Session,
    append: &OwnedAppend,
    taken: Taken,
    stored: &BTreeMap<CaptureId, Stored>,
) -> Result<()> {
    let next = append.watermark;
    let moves = |known: &Stored| known.watermark.staged <= next.staged && known.watermark.boundary <= next.boundary;
    let set = |watermark: &Watermark| {
        let ([lsn, seq], [boundary_lsn, boundary_seq]) =
            (position_values(&watermark.staged), position_values(&watermark.boundary));
        [
            ("last_ingested_lsn", lsn),
            ("last_seq", seq),
            ("boundary_lsn", boundary_lsn),
            ("boundary_seq", boundary_seq),
            ("boundary_time", time(watermark.boundary_time)),
            ("updated_at", time(now())),
        ]
    };
    if stored.len() == append.expected.len() && stored.values().all(moves) {
        return taken.put(session, &set(&next));
    }
    taken.put(session, &[])?;
    for (id, known) in stored.iter().filter(|(id, _)| append.expected.contains_key(id)) {
        let mut moved = known.watermark;
        moved.staged = moved.staged.max(next.staged);
        if next.boundary > moved.boundary {
            (moved.boundary, moved.boundary_time) = (next.boundary, next.boundary_time);
        }
        let condition = "source_name = ? and capture_instance = ?";
        rewrite(session, WATERMARKS_TABLE, &set(&moved), condition, &id_values(id))?;
    }
    Ok(())
}

/// Appends the rows above the stored watermark.
fn stage(session: &Session, batch: &ChangeBatch, known: &Stored, ingested_at: Micros) -> Result<u64> {
    let last = Position::new(SortKey::MAX, SortKey::MAX);
    let batch = batch.between(&known.watermark.staged, &last)?;
    if batch.is_empty() {
        return Ok(0);
    }
    let (names, rows) = staging_rows(session, &batch, ingested_at)?;
    let count = rows.num_rows() as u64;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    append_rows(session, session.catalog(), &known.staging_table, &names, rows)?;
    Ok(count)
}

/// Appends to the named columns of a table; the others are null.
pub(super) fn append_rows(
    session: &Session,
    catalog: &str,
    table: &str,
    columns: &[&str],
    rows: RecordBatch,
) -> Result<()> {
    let append = || {
        let connection = &session.connection;
        let mut appender = connection.appender_with_columns_to_catalog_and_db(table, catalog, "main", columns)?;
        appender.append_record_batch(rows)?;
        appender.flush()
    };
    append().map_err(|cause| duckdb_error("append to", table, cause))
}

/// The columns' names, and the batch as the staging table takes it.
fn staging_rows(session: &Session, batch: &ChangeBatch, ingested_at: Micros) -> Result<(Vec<String>, RecordBatch)> {
    let mut fields = vec![
        Field::new("lsn", DataType::Binary, false),
        Field::new("seqval", DataType::Binary, false),
        Field::new("op", DataType::UInt8, false),
    ];
    let mut arrays: Vec<ArrayRef> =
        vec![Arc::new(batch.lsn.clone()), Arc::new(batch.seq.clone()), Arc::new(batch.op.clone())];
    for (field, array) in batch.schema.columns.fields().iter().zip(&batch.columns) {
        fields.push(Field::new(layout::staging_column(field.name()), field.data_type().clone(), true));
        arrays.push(array.clone());
    }
    fields.push(Field::new("ingested_at", time_type(), false));
    arrays.push(Arc::new(TimestampMicrosecondArray::from_value(ingested_at, batch.len())));
    fields.push(Field::new("commit_time", time_type(), false));
    arrays.push(Arc::new(batch.commit_time.clone()));
    if let Some(masks) = &batch.unchanged {
        let capture = captures::one(session, &batch.capture)?;
        let from: Vec<&str> = batch.schema.columns.fields().iter().map(|field| field.name().as_str()).collect();
        let to: Vec<&str> = capture.staging_columns.iter().map(String::as_str).collect();
        fields.push(Field::new("unchanged_columns", DataType::Binary, true));
        arrays.push(Arc::new(move_marks(masks, &from, &to)?));
    }
    let names = fields.iter().map(|field| field.name().clone()).collect();
    Ok((names, RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays)?))
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

fn put_rejected(session: &Session, rejected: &Rejected) -> Result<()> {
    let [source, instance] = id_values(&rejected.capture);
    let [lsn, seq] = position_values(&rejected.position);
    let values = [source, instance, lsn, seq, text(&rejected.reason), blob(&rejected.raw), time(now())];
    match session.execute(INSERT_REJECTED, &values, "rejected changes")? {
        1 => Ok(()),
        other => Err(Error::new(ErrorKind::Internal, "write", "a rejected change", format!("{other} rows written"))),
    }
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
