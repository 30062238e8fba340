//! Reading the log: one copy, in the order of its primary key, under one snapshot of the database.

use std::pin::Pin;
use std::sync::Arc;

use futures::StreamExt;
use shori_core::Result;
use shori_core::change::ChangeBatch;
use shori_core::position::{CaptureId, Position};
use shori_core::store::LogStream;
use tokio_postgres::CopyOutStream;

use super::append::move_marks;
use super::captures::{self, Capture};
use super::copy_out::Images;
use super::layout;
use super::session::{Link, Links, above, at_or_below, failed};
use crate::connect::quoted;
use crate::copied::Rows;

/// Changes and bytes in a batch that is handed out.
const BATCH_ROWS: usize = 32_768;
const BATCH_BYTES: usize = 16 << 20;

/// One snapshot; no bound on how long a reader may take; and no way but along the primary key, so that nothing is sorted.
const BEGIN: &str = "
begin isolation level repeatable read, read only;
set local statement_timeout = 0;
set local enable_seqscan = off;
set local enable_bitmapscan = off;
set local enable_sort = off";

struct Reading {
    links: Arc<Links>,
    link: Link,
    copy: Pin<Box<CopyOutStream>>,
    capture: Capture,
    rows: Rows,
    ended: bool,
}

pub(super) async fn read_log(
    links: &Arc<Links>,
    id: &CaptureId,
    after: &Position,
    up_to: &Position,
) -> Result<LogStream> {
    let object = object(id);
    let mut link = links.take().await?;
    if link.run(BEGIN, &object).await.is_err() {
        // It may be from before the server's last start.
        link = links.connect().await?;
        link.run(BEGIN, &object).await?;
    }
    let capture = captures::one(&link, id).await?;
    let copy = link.client().copy_out(&select(&capture, after, up_to)).await;
    let copy = Box::pin(copy.map_err(|cause| failed("read", &object, cause))?);
    let reading = Reading { links: links.clone(), link, copy, capture, rows: Rows::default(), ended: false };
    Ok(futures::stream::try_unfold(reading, next).boxed())
}

fn object(id: &CaptureId) -> String {
    format!("the log of {id}")
}

async fn next(mut reading: Reading) -> Result<Option<(ChangeBatch, Reading)>> {
    let object = object(&reading.capture.id);
    let mut images = Images::new(reading.capture.id.clone(), reading.capture.schema.clone())?;
    while images.len() < BATCH_ROWS && images.bytes() < BATCH_BYTES {
        if images.take(&mut reading.rows, BATCH_ROWS)? || reading.ended {
            break;
        }
        match reading.copy.next().await {
            Some(message) => reading.rows.push(message.map_err(|cause| failed("read", &object, cause))?),
            None => reading.ended = true,
        }
    }
    if images.len() == 0 {
        reading.link.run("commit", &object).await?;
        reading.links.give_back(reading.link);
        return Ok(None);
    }
    let (mut batch, masks) = images.finish();
    if let Some(masks) = masks {
        let from: Vec<&str> = reading.capture.staging_columns.iter().map(String::as_str).collect();
        let to: Vec<&str> = batch.schema.columns.fields().iter().map(|field| field.name().as_str()).collect();
        batch.unchanged = Some(move_marks(&masks, &from, &to)?);
    }
    Ok(Some((batch, reading)))
}

fn select(capture: &Capture, after: &Position, up_to: &Position) -> String {
    let mut columns = String::from("lsn, seqval, op, coalesce(boundary_time, commit_time), unchanged_columns");
    for field in capture.schema.columns.fields() {
        columns.push_str(", ");
        columns.push_str(&quoted(&layout::staging_column(field.name())));
    }
    format!(
        "copy (select {columns} from {} where {} and {} order by lsn, seqval) to stdout (format binary)",
        quoted(&capture.staging_table),
        above("lsn", "seqval", after),
        at_or_below("lsn", "seqval", up_to)
    )
}
