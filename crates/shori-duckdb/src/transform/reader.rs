//! Hands an output out in parts of bounded size.
//!
//! What a query gave lies in tables of the work catalog and is read by ranges of row ids, few rows at once when they are
//! computed. What comes straight from the state file is read in one go in key order, by a thread that waits for who takes
//! it: an open view of the file keeps it as it was.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::compute::concat_batches;
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use shori_core::store::{OutputKind, OutputReader, OutputRows};
use shori_core::{Error, ErrorKind, Result};
use tokio::sync::mpsc;

use super::session::{Session, comma, failure};
use super::tables::Batch;
use crate::database::{Database, quote_name};

const PART_ROWS_MAX: i64 = 65_536;
/// So few rows are read at once, on the connection that computed them.
pub(super) const READY_ROWS_MAX: i64 = 65_536;
/// Rows of a part that comes from the state file, and parts that wait to be taken.
const STREAM_ROWS: usize = 16_384;
const STREAM_PARTS: usize = 2;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum PartKind {
    Upsert,
    Delete,
    Version,
    Close,
}

impl PartKind {
    fn wrap(self, rows: RecordBatch) -> OutputRows {
        match self {
            PartKind::Upsert => OutputRows::Upsert(rows),
            PartKind::Delete => OutputRows::Delete(rows),
            PartKind::Version => OutputRows::Version(rows),
            PartKind::Close => OutputRows::Close(rows),
        }
    }
}

/// One table of an output.
pub(super) struct Part {
    kind: PartKind,
    select: String,
    table: String,
    columns: SchemaRef,
    /// Row ids go from 0 to below this.
    pub rows: i64,
}

impl Part {
    /// Of a table that was just made with so many rows.
    pub fn of_table(kind: PartKind, table: String, columns: SchemaRef, rows: i64) -> Self {
        let select = comma(columns.fields().iter().map(|field| quote_name(field.name())));
        Self { kind, select, table, columns, rows }
    }

    fn read(&self, session: &Session, range: Range<i64>) -> Result<RecordBatch> {
        let text = format!(
            "select {} from {} where rowid >= {} and rowid < {}",
            self.select, self.table, range.start, range.end
        );
        let read = || -> duckdb::Result<Vec<RecordBatch>> {
            Ok(session.connection.prepare(&text)?.query_arrow([])?.collect())
        };
        let batches = read().map_err(|cause| failure("read an output from", cause))?;
        let Some(first) = batches.first() else { return Ok(RecordBatch::new_empty(self.columns.clone())) };
        let whole = concat_batches(&first.schema(), &batches)?;
        Ok(RecordBatch::try_new(self.columns.clone(), whole.columns().to_vec())?)
    }

    /// All of its rows; meant for few.
    pub fn read_all(&self, session: &Session) -> Result<Option<OutputRows>> {
        if self.rows == 0 {
            return Ok(None);
        }
        self.read(session, 0..self.rows).map(|rows| Some(self.kind.wrap(rows)))
    }
}

/// An output that is at hand.
pub(super) struct Ready {
    pub kind: OutputKind,
    pub parts: VecDeque<OutputRows>,
}

#[async_trait]
impl OutputReader for Ready {
    fn kind(&self) -> OutputKind {
        self.kind
    }

    fn rows_hint(&self) -> Option<u64> {
        Some(self.parts.iter().map(|part| part.batch().num_rows() as u64).sum())
    }

    async fn next(&mut self) -> Result<Option<OutputRows>> {
        Ok(self.parts.pop_front())
    }
}

/// An output that lies in tables.
pub(super) struct Tables {
    database: Database,
    /// Lent to each pull; gone when one was dropped half way.
    session: Option<Session>,
    kind: OutputKind,
    parts: Arc<Vec<Part>>,
    at: usize,
    next: i64,
}

impl Tables {
    pub fn new(database: &Database, kind: OutputKind, parts: Vec<Part>) -> Result<Self> {
        let session = Some(Session::open(database)?);
        Ok(Self { database: database.clone(), session, kind, parts: Arc::new(parts), at: 0, next: 0 })
    }
}

#[async_trait]
impl OutputReader for Tables {
    fn kind(&self) -> OutputKind {
        self.kind
    }

    fn rows_hint(&self) -> Option<u64> {
        Some(self.parts.iter().map(|part| part.rows as u64).sum())
    }

    async fn next(&mut self) -> Result<Option<OutputRows>> {
        while let Some(part) = self.parts.get(self.at) {
            if self.next >= part.rows {
                self.at += 1;
                self.next = 0;
                continue;
            }
            let (parts, at) = (self.parts.clone(), self.at);
            let range = self.next..(self.next + PART_ROWS_MAX).min(part.rows);
            self.next = range.end;
            let Some(session) = self.session.take() else {
                return Err(Error::new(ErrorKind::Internal, "read", "an output", "an earlier pull was abandoned"));
            };
            let (session, rows) = self
                .database
                .run(move || {
                    let rows = parts[at].read(&session, range)?;
                    Ok((session, rows))
                })
                .await?;
            self.session = Some(session);
            if rows.num_rows() > 0 {
                return Ok(Some(self.parts[self.at].kind.wrap(rows)));
            }
        }
        Ok(None)
    }
}

/// An output that is read from the state file while it is taken.
pub(super) struct Stream {
    kind: OutputKind,
    parts: mpsc::Receiver<Result<OutputRows>>,
}

/// Takes rows of one kind, and gives them on in parts.
pub(super) struct Sink<'g> {
    kind: PartKind,
    batch: Batch,
    give: &'g mut dyn FnMut(OutputRows) -> Result<()>,
}

impl<'g> Sink<'g> {
    pub fn new(kind: PartKind, columns: &SchemaRef, give: &'g mut dyn FnMut(OutputRows) -> Result<()>) -> Result<Self> {
        Ok(Self { kind, batch: Batch::new(columns.clone())?, give })
    }

    pub fn push<'a>(&mut self, cells: impl IntoIterator<Item = super::cells::Cell<'a>>) -> Result<()> {
        self.batch.push(cells)?;
        if self.batch.rows() == STREAM_ROWS { self.give() } else { Ok(()) }
    }

    fn give(&mut self) -> Result<()> {
        match self.batch.rows() {
            0 => Ok(()),
            _ => (self.give)(self.kind.wrap(self.batch.take()?)),
        }
    }

    pub fn finish(mut self) -> Result<()> {
        self.give()
    }
}

/// Reads an output by `read`, which is given what takes its parts. Where calls run on the caller's thread, all is read at
/// once.
pub(super) fn stream(
    database: &Database,
    kind: OutputKind,
    read: impl FnOnce(&mut dyn FnMut(OutputRows) -> Result<()>) -> Result<()> + Send + 'static,
) -> Result<Box<dyn OutputReader>> {
    if database.is_inline() {
        let mut parts = VecDeque::new();
        read(&mut |part| {
            parts.push_back(part);
            Ok(())
        })?;
        return Ok(Box::new(Ready { kind, parts }));
    }
    let (sender, parts) = mpsc::channel(STREAM_PARTS);
    tokio::task::spawn_blocking(move || {
        let outcome = read(&mut |part| {
            let given = sender.blocking_send(Ok(part));
            given.map_err(|cause| Error::new(ErrorKind::Unavailable, "read", "an output", cause.to_string()))
        });
        if let Err(error) = outcome {
            // Nobody waits for it where the receiver is gone.
            let _ = sender.blocking_send(Err(error));
        }
    });
    Ok(Box::new(Stream { kind, parts }))
}

#[async_trait]
impl OutputReader for Stream {
    fn kind(&self) -> OutputKind {
        self.kind
    }

    fn rows_hint(&self) -> Option<u64> {
        None
    }

    async fn next(&mut self) -> Result<Option<OutputRows>> {
        self.parts.recv().await.transpose()
    }
}
