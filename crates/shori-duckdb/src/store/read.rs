//! Reading the log.
//!
//! The physical order of a staging table is position order: an append stands above every one before it, DuckDB keeps
//! the order of insertion, and compaction only deletes and updates in place. So reading never sorts.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{TimestampMicrosecondType, UInt8Type};
use duckdb::types::Value;
use futures::StreamExt;
use shori_core::change::ChangeBatch;
use shori_core::position::{CaptureId, Micros, Position};
use shori_core::store::LogStream;
use shori_core::{Error, ErrorKind, Result};

use super::append::move_marks;
use super::captures::{self, Capture};
use super::layout;
use super::session::{Session, Sessions, above, at_or_below, get_position, time};
use crate::database::{duckdb_error, quote_name};

/// Changes in a batch that is handed out.
const BATCH_ROWS: usize = 32_768;
/// Batches that wait for a slow reader.
const BATCHES_WAITING: usize = 2;

pub(super) async fn read_log(
    sessions: &Arc<Sessions>,
    capture: &CaptureId,
    after: Position,
    up_to: Position,
) -> Result<LogStream> {
    let (reader, id) = (sessions.clone(), capture.clone());
    if sessions.database.is_inline() {
        let mut batches = Vec::new();
        scan(&reader.session()?, &id, &after, &up_to, &mut |batch| {
            batches.push(Ok(batch));
            true
        })?;
        return Ok(futures::stream::iter(batches).boxed());
    }
    let (sender, receiver) = tokio::sync::mpsc::channel(BATCHES_WAITING);
    tokio::task::spawn_blocking(move || {
        let scanned = reader.session().and_then(|session| {
            scan(&session, &id, &after, &up_to, &mut |batch| sender.blocking_send(Ok(batch)).is_ok())?;
            session.give_back();
            Ok(())
        });
        if let Err(error) = scanned {
            // A reader that has gone away does not want to know.
            let _ = sender.blocking_send(Err(error));
        }
    });
    let next = |mut receiver: tokio::sync::mpsc::Receiver<Result<ChangeBatch>>| async move {
        receiver.recv().await.map(|batch| (batch, receiver))
    };
    Ok(futures::stream::unfold(receiver, next).boxed())
}

/// Hands batches to `take` until it wants no more.
fn scan(
    session: &Session,
    id: &CaptureId,
    after: &Position,
    up_to: &Position,
    take: &mut dyn FnMut(ChangeBatch) -> bool,
) -> Result<()> {
    let fail = |cause| duckdb_error("read", format!("the log of {id}"), cause);
    let capture = captures::one(session, id)?;
    let mut statement = session.connection.prepare(&select(&capture, after, up_to)).map_err(fail)?;
    // What the stream is read by panics on an error; `step` returns it.
    drop(statement.stream_arrow([]).map_err(fail)?);
    let mut parts = Vec::new();
    let mut rows = 0;
    loop {
        let part = statement.step().map_err(fail)?.map(|array| RecordBatch::from(&array));
        let ended = part.is_none();
        if let Some(part) = part {
            rows += part.num_rows();
            parts.push(part);
        }
        if rows >= BATCH_ROWS || (ended && rows > 0) {
            let joined = arrow::compute::concat_batches(&parts[0].schema(), &parts)?;
            (parts, rows) = (Vec::new(), 0);
            if !take(change_batch(&capture, &joined)?) {
                return Ok(());
            }
        }
        if ended {
            return Ok(());
        }
    }
}

fn select(capture: &Capture, after: &Position, up_to: &Position) -> String {
    let mut columns =
        String::from("l.lsn, l.seqval, l.op, coalesce(l.boundary_time, l.commit_time), l.unchanged_columns");
    for field in capture.schema.columns.fields() {
        columns.push_str(", l.");
        columns.push_str(&quote_name(&layout::staging_column(field.name())));
    }
    format!(
        "select {columns} from {} l where {} and {}",
        quote_name(&capture.staging_table),
        above("l", after),
        at_or_below("l", up_to)
    )
}

fn change_batch(capture: &Capture, rows: &RecordBatch) -> Result<ChangeBatch> {
    let misfit =
        || Error::new(ErrorKind::Corrupt, "read", format!("the log of {}", capture.id), "a column is of another type");
    let binary = |index: usize| rows.column(index).as_binary_opt::<i32>().cloned().ok_or_else(misfit);
    let mut columns: Vec<ArrayRef> = Vec::with_capacity(capture.schema.columns.fields().len());
    for (index, field) in capture.schema.columns.fields().iter().enumerate() {
        let array = rows.column(5 + index);
        if array.data_type() != field.data_type() {
            return Err(misfit());
        }
        columns.push(array.clone());
    }
    let masks = binary(4)?;
    let unchanged = if masks.null_count() == masks.len() {
        None
    } else {
        let from: Vec<&str> = capture.staging_columns.iter().map(String::as_str).collect();
        let to: Vec<&str> = capture.schema.columns.fields().iter().map(|field| field.name().as_str()).collect();
        Some(move_marks(&masks, &from, &to)?)
    };
    Ok(ChangeBatch {
        capture: capture.id.clone(),
        schema: capture.schema.clone(),
        lsn: binary(0)?,
        seq: binary(1)?,
        op: rows.column(2).as_primitive_opt::<UInt8Type>().cloned().ok_or_else(misfit)?,
        commit_time: rows.column(3).as_primitive_opt::<TimestampMicrosecondType>().cloned().ok_or_else(misfit)?,
        unchanged,
        columns,
    })
}

/// See [`Store::retention_horizon`](shori_core::store::Store::retention_horizon).
pub(super) fn retention_horizon(
    session: &Session,
    id: &CaptureId,
    staged_before: Option<Micros>,
    keep_rows: Option<u64>,
) -> Result<Position> {
    let capture = captures::one(session, id)?;
    let table = quote_name(&capture.staging_table);
    let mut horizon = capture.horizon;
    let mut raise = |sql: &str, values: &[Value]| -> Result<()> {
        let found = session.rows(sql, values, &table, |row| get_position(row, 0))?;
        horizon = found.into_iter().fold(horizon, Position::max);
        Ok(())
    };
    if let Some(before) = staged_before {
        let sql = format!(
            "select lsn, seqval from {table} where rowid = (select max(rowid) from {table} where ingested_at < ?)"
        );
        raise(&sql, &[time(before)])?;
    }
    if let Some(keep) = keep_rows {
        let rows = session.number(&format!("select count(*) from {table}"), &table)?.max(0) as u64;
        if rows > keep {
            raise(&format!("select lsn, seqval from {table} limit 1 offset {}", rows - keep - 1), &[])?;
        }
    }
    Ok(horizon)
}
