//! Rows that are read apart from the stream: chunks of tables, and what an update does not bring.

use std::time::Duration;

use bytes::Bytes;
use shori_core::source::BatchLimit;
use shori_core::{Error, ErrorKind, Result};
use tokio::time::Instant;
use tokio_postgres::Transaction;

use super::{Open, answered, is_of_table, read_whole};
use crate::connect::sql_error;
use crate::message::{Message, Value};
use crate::snapshot::{self, Bookmark, Sight};
use crate::stream::{Capture, Gathered};
use crate::{PostgresConfig, positions};

/// Between two tries of a chunk that must wait for transactions to end.
const CHUNK_PAUSE: Duration = Duration::from_millis(50);
/// How long a transaction that was open at start may be about to be visible, unless it waits for a standby, or a table is
/// to be read that may have been published since the transaction wrote to it.
pub(super) const GRACE: Duration = Duration::from_secs(2);
/// Transactions read, beyond which it is asked which of them every new snapshot shows.
const UNSETTLED_MAX: usize = 10_000;

/// Transactions that were open at start.
pub(super) struct OpenAtStart {
    pub ids: Vec<u64>,
    /// Until when they are waited for; for tables that may just have been published, until they end: what such a
    /// transaction wrote before is in no stream.
    pub until: Option<Instant>,
}

impl Open {
    /// Reads what an update does not bring, while no snapshot has brought it either: the row may have moved out of the
    /// way of one that goes by places.
    pub(super) async fn complete(
        &mut self,
        message: &Message<'_>,
        raw: &Bytes,
        index: usize,
        gathered: &mut Gathered,
    ) -> Result<()> {
        let Message::Update { old, new, .. } = message else {
            return Err(Error::new(ErrorKind::Internal, "complete", "a row", "it is no update"));
        };
        let capture = &self.cursor.captures[index];
        let mut values: Vec<Value<'_>> = new.iter().collect();
        // A key that is kept out of line and unchanged is in the old row.
        for (value, old) in values.iter_mut().zip(old.tuple().iter().flat_map(|old| old.iter())) {
            if *value == Value::Unchanged {
                *value = old;
            }
        }
        let key: Vec<Value<'_>> =
            capture.layout.schema.key.iter().filter_map(|column| values.get(*column).copied()).collect();
        let transaction = snapshot::begin(&mut self.session.client).await?;
        let sight = Sight::of(&transaction).await?;
        let found = match snapshot::read_row(&transaction, capture, &key).await {
            Ok(found) => found,
            Err(error) if error.kind() == ErrorKind::Schema => {
                drop(transaction);
                self.fail(index, error, gathered)?;
                // Its places are taken all the same.
                return self.cursor.take(message, raw, None, gathered).map(|_| ());
            }
            Err(error) => return Err(error),
        };
        let read_by = Sight::of(&transaction).await?.wal_end;
        transaction.commit().await.map_err(|cause| sql_error("end", "a snapshot", cause))?;
        let layout = capture.layout.clone();
        let whole: Vec<Value<'_>> = match &found {
            Some(found) => {
                let raw = found.iter().map(|bytes| bytes.as_deref().map(snapshot::Raw));
                raw.enumerate().map(|(index, raw)| snapshot::value_of(&layout, index, raw)).collect()
            }
            // It is gone since: its deletion comes before any boundary.
            None => vec![Value::Unchanged; values.len()],
        };
        self.cursor.hold_until(sight.wal_end.max(read_by));
        self.cursor.take(message, raw, Some(&whole), gathered).map(|_| ())
    }

    /// Reads the next chunk of a table, if one is to be read and this is a place for it.
    pub(super) async fn chunk(
        &mut self,
        config: &PostgresConfig,
        limit: BatchLimit,
        gathered: &mut Gathered,
    ) -> Result<bool> {
        if !self.wants_chunk() || Instant::now() < self.chunk_due || self.cursor.is_held() || !gathered.is_empty() {
            return Ok(false);
        }
        let Some(index) = self.cursor.captures.iter().position(Capture::needs_snapshot) else { return Ok(false) };
        let Some(chunk) = self.free_chunk()? else { return Ok(false) };
        let (read_to, before) = (self.cursor.read_to, self.cursor.watermark.staged);
        let transaction = answered(config, snapshot::begin(&mut self.session.client)).await?;
        let sight = answered(config, Sight::of(&transaction)).await?;
        let unseen = self.cursor.unsettled.iter().any(|xid| !sight.visibility.shows(*xid));
        if unseen || !answered(config, is_settled(&transaction, &sight, &mut self.open_at_start)).await? {
            drop(transaction);
            if !std::mem::replace(&mut self.told_of_waiting, true) {
                tracing::info!(slot = config.slot, "the snapshot waits for transactions that are open in the server");
            }
            self.chunk_due = Instant::now() + CHUNK_PAUSE;
            return Ok(false);
        }
        self.told_of_waiting = false;
        self.cursor.unsettled.clear();
        let capture = &self.cursor.captures[index];
        let place = snapshot::Place {
            read_to,
            chunk,
            time: sight.time,
            filter: self.published.get(&capture.table.name).and_then(|published| published.filter.as_deref()),
        };
        let limit = BatchLimit { rows: limit.rows.min(config.snapshot_chunk_rows.max(1)), ..limit };
        let local = format!("set local statement_timeout = {}", config.read_timeout.as_millis());
        let begun =
            async { transaction.batch_execute(&local).await.map_err(|cause| sql_error("begin", "a snapshot", cause)) };
        answered(config, begun).await?;
        let bookmark = Bookmark::decode(&capture.progress.resume)?;
        let read = snapshot::read_chunk(transaction.client(), capture, &place, bookmark, limit);
        let chunk = match read_whole(config, read).await {
            Ok(chunk) => chunk,
            // One bad table stops itself only (contract 11).
            Err(error) if is_of_table(&error) => {
                drop(transaction);
                self.fail(index, error, gathered)?;
                return Ok(true);
            }
            Err(error) => return Err(error),
        };
        // A truncation is no matter of snapshots: one that came before the copy is seen by it.
        let read_by = answered(config, Sight::of(&transaction)).await?.wal_end;
        let ended = async { transaction.commit().await.map_err(|cause| sql_error("end", "a snapshot", cause)) };
        answered(config, ended).await?;
        let progress = chunk.progress(&capture.progress, before, &place)?;
        let is_closing = progress.is_done();
        let place = place.chunk;
        let capture = &mut self.cursor.captures[index];
        capture.progress = progress.clone();
        gathered.finished.extend(chunk.changes);
        gathered.rejected.extend(chunk.rejected);
        gathered.snapshots.push((capture.id.clone(), progress));
        if !is_closing {
            self.cursor.hold_until(sight.wal_end.max(read_by));
        }
        self.cursor.move_to(positions::of_chunk_end(read_to, place)?, sight.time);
        Ok(true)
    }

    /// The number of a chunk that stands above all that was read, if one can stand here: a transaction that was read in
    /// part comes again before anything else, and what a capture has already of what is read again.
    fn free_chunk(&self) -> Result<Option<u32>> {
        let above = self.cursor.watermark.staged.max(self.cursor.furthest);
        let chunk = positions::next_chunk(self.cursor.read_to, &above);
        let is_free = positions::of_chunk_row(self.cursor.read_to, chunk, 0)? > above;
        Ok(is_free.then_some(chunk))
    }

    /// Forgets transactions that every snapshot shows by now.
    pub(super) async fn settle(&mut self) -> Result<()> {
        if self.cursor.unsettled.len() > UNSETTLED_MAX {
            let sight = Sight::of(&self.session.client).await?;
            self.cursor.unsettled.retain(|xid| !sight.visibility.shows(*xid));
        }
        Ok(())
    }
}

/// Whether no transaction that was open at start can have been read before without being visible yet.
///
/// A commit is in the log, and may be sent, an instant before it is visible; but as long as it waits for a standby.
async fn is_settled(transaction: &Transaction<'_>, sight: &Sight, open_at_start: &mut OpenAtStart) -> Result<bool> {
    let OpenAtStart { ids: open, until } = open_at_start;
    open.retain(|id| sight.visibility.running.contains(id));
    if open.is_empty() {
        return Ok(true);
    }
    if until.is_none_or(|until| Instant::now() < until) {
        return Ok(false);
    }
    let query = "select count(*) from pg_catalog.pg_stat_activity where wait_event = 'SyncRep'";
    let row = transaction
        .query_one(query, &[])
        .await
        .map_err(|cause| sql_error("look at", "who waits for a standby", cause))?;
    let waiting: i64 = row.get(0);
    if waiting == 0 {
        open.clear();
    }
    Ok(waiting == 0)
}
