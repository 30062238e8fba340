//! Hands an output out in parts of bounded size, by ranges of row ids.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::compute::concat_batches;
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use shori_core::store::{OutputKind, OutputReader, OutputRows};
use shori_core::{Error, ErrorKind, Result};

use super::compute::Laid;
use super::session::{Session, failure};
use super::tables::comma;
use crate::database::{Database, quote_name};

const PART_ROWS_MAX: i64 = 65_536;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum PartKind {
    Upsert,
    Delete,
    Version,
    Close,
}

/// One table of an output.
pub(super) struct Part {
    kind: PartKind,
    select: String,
    table: String,
    columns: SchemaRef,
    /// Row ids go from 0 to below this; there may be gaps.
    end: i64,
    rows: u64,
}

impl Part {
    /// Of a table that was just made with so many rows.
    pub fn of_table(kind: PartKind, table: String, columns: SchemaRef, rows: i64) -> Self {
        let select = comma(columns.fields().iter().map(|field| quote_name(field.name())));
        Self { kind, select, table, columns, end: rows, rows: rows as u64 }
    }

    pub fn of_state(session: &Session, select: String, table: String, columns: SchemaRef) -> Result<Self> {
        let rows = session.number(&format!("select count(*) from {table}"))? as u64;
        let end = session.optional_number(&format!("select max(rowid) from {table}"))?.map_or(0, |last| last + 1);
        Ok(Self { kind: PartKind::Upsert, select, table, columns, end, rows })
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

    fn wrap(&self, rows: RecordBatch) -> OutputRows {
        match self.kind {
            PartKind::Upsert => OutputRows::Upsert(rows),
            PartKind::Delete => OutputRows::Delete(rows),
            PartKind::Version => OutputRows::Version(rows),
            PartKind::Close => OutputRows::Close(rows),
        }
    }
}

pub(super) struct Reader {
    database: Database,
    /// Lent to each pull; gone when one was dropped half way.
    session: Option<Session>,
    kind: OutputKind,
    parts: Arc<Vec<Part>>,
    rows: u64,
    at: usize,
    next: i64,
}

impl Reader {
    pub fn new(database: &Database, session: Session, laid: Laid) -> Self {
        let rows = laid.parts.iter().map(|part| part.rows).sum();
        let (kind, parts) = (laid.kind, Arc::new(laid.parts));
        Self { database: database.clone(), session: Some(session), kind, parts, rows, at: 0, next: 0 }
    }
}

#[async_trait]
impl OutputReader for Reader {
    fn kind(&self) -> OutputKind {
        self.kind
    }

    fn rows_hint(&self) -> Option<u64> {
        Some(self.rows)
    }

    async fn next(&mut self) -> Result<Option<OutputRows>> {
        while let Some(part) = self.parts.get(self.at) {
            if self.next >= part.end {
                self.at += 1;
                self.next = 0;
                continue;
            }
            let (parts, at) = (self.parts.clone(), self.at);
            let range = self.next..(self.next + PART_ROWS_MAX).min(part.end);
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
                return Ok(Some(self.parts[self.at].wrap(rows)));
            }
        }
        Ok(None)
    }
}
