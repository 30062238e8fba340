//! The [`Source`] over one PostgreSQL database.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::Field;
use async_trait::async_trait;
use bytes::Bytes;
use shori_core::position::{CaptureId, Position};
use shori_core::schema::SchemaChange;
use shori_core::source::{
    BatchLimit, CaptureInfo, Head, Resume, SnapshotProgress, SnapshotState, Source, SourceBatch, Started,
};
use shori_core::{Error, ErrorKind, Result};
use tokio::time::Instant;

use crate::catalog::{self, Sent, Types};
use crate::connect::{Session, sql_error};
use crate::message::{self, Message, Value, WalLocation};
use crate::replication::{Item, Replication, Request};
use crate::setup::{self, Facts, Published};
use crate::snapshot::{self, Sight};
use crate::stream::{Capture, Cursor, Gathered, Next, Reshaped};
use crate::{PostgresConfig, positions, start};

/// A place without changes is told no more often than this, lest a store in the same server never rests.
const IDLE_INTERVAL: Duration = Duration::from_millis(500);
/// How long a call waits for what the server was asked for.
const SHORT_WAIT: Duration = Duration::from_millis(20);
/// Shortest time between two looks at what is published.
const WATCH_INTERVAL: Duration = Duration::from_secs(5);
/// Between two tries of a chunk that must wait for transactions to end.
const CHUNK_PAUSE: Duration = Duration::from_millis(50);
/// How long a transaction that was open at start may be about to be visible, unless it waits for a standby, or a table is
/// to be read that may have been published since the transaction wrote to it.
const GRACE: Duration = Duration::from_secs(2);
/// What a statement's answer may take longer than the server's own limit for the statement.
const ANSWER_GRACE: Duration = Duration::from_secs(5);
/// Transactions read, beyond which it is asked which of them every new snapshot shows.
const UNSETTLED_MAX: usize = 10_000;

/// Reads a replication slot. See the crate's documentation for what it can and cannot see.
pub struct PostgresSource {
    config: Arc<PostgresConfig>,
    timeline: Arc<str>,
    /// The stream has columns that only their text tells, whatever the tables are now.
    in_text: bool,
    open: Option<Open>,
}

/// Transactions that were open at start.
struct OpenAtStart {
    ids: Vec<u64>,
    /// Until when they are waited for; for tables that may just have been published, until they end: what such a
    /// transaction wrote before is in no stream.
    until: Option<Instant>,
}

/// Other columns, and snapshots asked for.
#[derive(Default)]
struct News {
    schemas: Vec<CaptureInfo>,
    snapshots: Vec<(CaptureId, SnapshotProgress)>,
}

struct Open {
    session: Session,
    replication: Replication,
    binary: bool,
    wants_text: bool,
    cursor: Cursor,
    types: Types,
    published: BTreeMap<String, Published>,
    /// What has come and is still to be read.
    pending: VecDeque<Item>,
    /// Place without changes that has not been told yet.
    idle: Option<WalLocation>,
    idle_told: Instant,
    watched: Instant,
    /// Those of them that may have been read before.
    open_at_start: OpenAtStart,
    /// When the next chunk is tried, and whether somebody was told that it must wait.
    chunk_due: Instant,
    told_of_waiting: bool,
    /// What goes into the log with the next batch that moves on: it would take one that does not for known.
    news: News,
    /// A call was dropped before it had ended: what it had read is lost.
    interrupted: bool,
}

impl PostgresSource {
    pub fn new(config: PostgresConfig) -> Self {
        let timeline = config.source_name.as_str().into();
        Self { config: Arc::new(config), timeline, in_text: false, open: None }
    }

    fn opened(&mut self) -> Result<&mut Open> {
        self.open.as_mut().ok_or_else(|| {
            Error::new(ErrorKind::Unavailable, "read", format!("source {}", self.timeline), "it is not connected")
        })
    }
}

#[async_trait]
impl Source for PostgresSource {
    fn timeline(&self) -> Arc<str> {
        self.timeline.clone()
    }

    async fn start(&mut self, resume: &BTreeMap<CaptureId, Resume>) -> Result<Started> {
        self.open = None;
        let (started, open) = Open::start(&self.config, resume, self.in_text).await?;
        self.open = Some(open);
        Ok(started)
    }

    async fn next(&mut self, limit: BatchLimit) -> Result<SourceBatch> {
        let config = self.config.clone();
        let open = self.opened()?;
        if std::mem::replace(&mut open.interrupted, true) {
            let cause = "an earlier call was interrupted: it is read again from what is in the log";
            return Err(Error::new(ErrorKind::Unavailable, "read", config.server.name(), cause));
        }
        let limit = BatchLimit { rows: limit.rows.max(1), bytes: limit.bytes.max(1) };
        let read = open.step(&config, limit).await;
        match read {
            Ok(batch) => {
                open.interrupted = false;
                Ok(batch)
            }
            Err(error) => {
                self.in_text |= self.open.as_ref().is_some_and(|open| open.wants_text);
                self.open = None;
                Err(error)
            }
        }
    }

    async fn wait(&mut self, at_most: Duration) -> Result<()> {
        let until = Instant::now() + at_most;
        let open = self.opened()?;
        loop {
            let idle_due = open.idle.map(|_| open.idle_told + IDLE_INTERVAL);
            let chunk_due = open.wants_chunk().then_some(open.chunk_due);
            let stop = [idle_due, chunk_due].into_iter().flatten().fold(until, Instant::min);
            if !open.pending.is_empty() || open.cursor.is_held() || stop <= Instant::now() {
                return Ok(());
            }
            match tokio::time::timeout_at(stop, open.replication.receive()).await {
                Ok(block) => open.absorb(block?),
                Err(_) => return Ok(()),
            }
        }
    }

    async fn acknowledge(&mut self, durable: &Position) -> Result<()> {
        let read_on = positions::read_on_at(durable)?;
        if let Some(open) = &self.open {
            open.replication.acknowledge(read_on);
        }
        Ok(())
    }

    async fn head(&mut self) -> Result<Head> {
        let config = self.config.clone();
        let open = self.opened()?;
        let wal_end = answered(&config, setup::wal_end(&open.session.client)).await?;
        let watermark = open.cursor.watermark;
        let boundary = positions::of_boundary(wal_end)?.max(watermark.staged);
        Ok(Head { boundary, time: watermark.boundary_time.max(open.cursor.held_time), changes_waiting: None })
    }
}

impl Open {
    async fn start(
        config: &PostgresConfig,
        resume: &BTreeMap<CaptureId, Resume>,
        in_text: bool,
    ) -> Result<(Started, Self)> {
        let session = config.server.connect().await?;
        let client = &session.client;
        let facts = Facts::read(client, config).await?;
        let mut types = Types::default();
        let furthest = resume.values().map(|known| known.watermark.staged).max().unwrap_or(Position::ZERO);
        // Before anything is made in it.
        start::check_reaches(config, &facts, positions::read_on_at(&furthest)?)?;
        let mut found = catalog::tables(client, config, &mut types).await?;
        start::leave_out_unpublished(client, config, resume, &mut found).await?;
        let names: Vec<String> = found.layouts.iter().map(|(table, _)| table.name.clone()).collect();
        let (published, made) = setup::publication(client, config, &names).await?;
        let slot = setup::slot(client, config, made, resume.values().any(start::has_begun)).await?;
        let ready = start::captures(client, config, resume, found, &published, &slot, &types).await?;
        let watermark = ready.watermark(&slot, resume)?;
        let from = positions::read_on_at(&watermark.staged)?;
        let binary = !in_text
            && !ready.captures.iter().any(|capture| capture.layout.columns.iter().any(catalog::Column::needs_text));
        let request = Request { slot: config.slot.clone(), from, publication: config.publication.clone(), binary };
        let sight = Sight::of(client).await?;
        setup::slot_is_free(client, config).await?;
        let replication = Replication::start(&config.server, request).await?;
        let started = Started { identity: facts.identity, captures: ready.infos(resume), failed: ready.failed };
        let is_wanted_whole = ready.captures.iter().any(|capture| capture.progress.state == SnapshotState::Requested);
        let mut cursor = Cursor::new(ready.captures, watermark, from, ready.furthest);
        if ready.is_partly_read {
            // What was read under snapshots may show commits up to here, and it is not remembered up to which.
            cursor.hold_until(sight.wal_end);
        }
        let now = Instant::now();
        let open = Self {
            session,
            replication,
            binary,
            wants_text: false,
            cursor,
            types,
            published,
            pending: VecDeque::new(),
            idle: None,
            idle_told: now - IDLE_INTERVAL,
            watched: now,
            open_at_start: OpenAtStart {
                ids: sight.visibility.running,
                until: (!is_wanted_whole).then_some(now + GRACE),
            },
            chunk_due: now,
            told_of_waiting: false,
            news: News {
                schemas: ready.reshaped.iter().map(|(info, _)| info.clone()).collect(),
                snapshots: ready.reshaped.into_iter().map(|(info, progress)| (info.id, progress)).collect(),
            },
            interrupted: false,
        };
        Ok((started, open))
    }

    /// Takes a block into what is pending; of places without changes, only the last counts.
    fn absorb(&mut self, block: Vec<Item>) {
        for item in block {
            match item {
                Item::ReadTo(wal_end) if self.pending.is_empty() => self.idle = Some(wal_end),
                Item::ReadTo(_) if matches!(self.pending.back(), Some(Item::ReadTo(_))) => {
                    self.pending.pop_back();
                    self.pending.push_back(item);
                }
                item => self.pending.push_back(item),
            }
        }
    }

    async fn step(&mut self, config: &PostgresConfig, limit: BatchLimit) -> Result<SourceBatch> {
        let mut gathered = Gathered::default();
        let before = self.cursor.watermark.staged;
        gathered.schemas.append(&mut self.news.schemas);
        gathered.snapshots.append(&mut self.news.snapshots);
        answered(config, self.watch(config, &mut gathered)).await?;
        answered(config, self.settle()).await?;
        let read_chunk = self.chunk(config, limit, &mut gathered).await?;
        if !read_chunk {
            self.stream(config, limit, &mut gathered).await?;
        }
        self.tell_idle(!gathered.is_empty() || self.cursor.is_held())?;
        let mut gathered = gathered.finish()?;
        if self.cursor.watermark.staged == before {
            self.news = News {
                schemas: std::mem::take(&mut gathered.schemas),
                snapshots: std::mem::take(&mut gathered.snapshots),
            };
        }
        let reads_on = self.wants_chunk() && Instant::now() >= self.chunk_due;
        Ok(SourceBatch {
            changes: gathered.finished,
            watermark: self.cursor.watermark,
            snapshots: gathered.snapshots,
            schemas: gathered.schemas,
            rejected: gathered.rejected,
            failed: gathered.failed,
            more: reads_on || self.cursor.is_held() || !self.pending.is_empty(),
        })
    }

    /// Whether a table is to be read, and this is a place for it.
    fn wants_chunk(&self) -> bool {
        self.cursor.is_between_commits() && self.cursor.captures.iter().any(Capture::needs_snapshot)
    }

    /// Reads what has come, up to the limit.
    async fn stream(&mut self, config: &PostgresConfig, limit: BatchLimit, gathered: &mut Gathered) -> Result<()> {
        let deadline = Instant::now() + SHORT_WAIT;
        while gathered.rows() < limit.rows && gathered.bytes() < limit.bytes {
            let Some(item) = self.pending.pop_front() else {
                match self.replication.try_receive()? {
                    Some(block) => self.absorb(block),
                    None if gathered.is_empty() && self.cursor.is_held() => {
                        if !self.hears_more(deadline).await? {
                            return Ok(());
                        }
                    }
                    None => return Ok(()),
                }
                if self.pending.is_empty()
                    && (gathered.is_empty() || self.idle.is_none())
                    && self.tell_idle(self.cursor.is_held())?
                {
                    return Ok(());
                }
                continue;
            };
            match item {
                Item::ReadTo(wal_end) => self.idle = Some(wal_end),
                Item::Message(raw) => {
                    // What has been read since is at least as far.
                    self.idle = None;
                    if self.message(config, &raw, gathered).await? {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    /// Asks the server how far it is, and waits for something new. An answer that tells nothing new is not asked again
    /// before the next call.
    async fn hears_more(&mut self, deadline: Instant) -> Result<bool> {
        self.replication.ask();
        while let Ok(block) = tokio::time::timeout_at(deadline, self.replication.receive()).await {
            self.absorb(block?);
            if !self.pending.is_empty() || self.idle.is_some_and(|wal_end| wal_end > self.cursor.read_to) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Moves on to a place without changes, if it is time to. Whether it did.
    fn tell_idle(&mut self, at_once: bool) -> Result<bool> {
        let due = at_once || self.idle_told.elapsed() >= IDLE_INTERVAL;
        let Some(wal_end) = self.idle.filter(|_| due && self.pending.is_empty()) else { return Ok(false) };
        self.idle = None;
        let before = self.cursor.read_to;
        self.cursor.read_to(wal_end)?;
        if self.cursor.read_to == before {
            return Ok(false);
        }
        self.idle_told = Instant::now();
        Ok(true)
    }

    /// Takes one message; whether the batch ends with it.
    async fn message(&mut self, config: &PostgresConfig, raw: &Bytes, gathered: &mut Gathered) -> Result<bool> {
        let message = message::decode(raw, false)?;
        match self.cursor.take(&message, raw, None, gathered)? {
            Next::GoOn => Ok(false),
            Next::Reshaped(reshaped) => {
                answered(config, self.reshape(config, reshaped, gathered)).await?;
                Ok(!gathered.is_empty())
            }
            Next::Incomplete { capture } => {
                answered(config, self.complete(&message, raw, capture, gathered)).await?;
                Ok(false)
            }
            Next::Lost { capture, cause } => {
                let table = config.qualified(&self.cursor.captures[capture].table.name);
                let remedy = format!("run shori resnapshot {}", self.cursor.captures[capture].table.name);
                let error = Error::new(ErrorKind::Gap, "capture", format!("table {table}"), cause).with_remedy(remedy);
                self.fail(capture, error, gathered)?;
                Ok(false)
            }
        }
    }

    /// A capture goes no further; its neighbours do (contract 11).
    fn fail(&mut self, capture: usize, error: Error, gathered: &mut Gathered) -> Result<()> {
        gathered.cut(capture)?;
        let capture = &mut self.cursor.captures[capture];
        capture.failed = true;
        gathered.failed.push((capture.id.clone(), error));
        Ok(())
    }

    /// Rows hold what was not sent of them: the table is read whole, if it is not about to be anyhow.
    fn read_anew(&mut self, index: usize, gathered: &mut Gathered) {
        let capture = &mut self.cursor.captures[index];
        if capture.progress.state == SnapshotState::Requested {
            return;
        }
        capture.progress = start::read_anew(&capture.id, &capture.progress);
        gathered.snapshots.push((capture.id.clone(), capture.progress.clone()));
    }

    /// Follows a table that is sent in another shape from here on.
    async fn reshape(&mut self, config: &PostgresConfig, reshaped: Reshaped, gathered: &mut Gathered) -> Result<()> {
        let Reshaped { capture: index, columns } = reshaped;
        let client = &self.session.client;
        let capture = &self.cursor.captures[index];
        if capture.failed {
            return Ok(());
        }
        let table = capture.table.clone();
        self.types.learn(client, columns.iter().map(|(_, oid, _)| *oid)).await?;
        let key = catalog::key_of(client, &config.qualified(&table.name), capture.layout.oid).await;
        let nullable = |name: &str| {
            let known = capture.layout.columns.iter().find(|column| column.name == name);
            known.is_none_or(|column| column.nullable)
        };
        let sent = columns.into_iter().map(|(name, type_oid, modifier)| Sent {
            nullable: nullable(&name),
            name,
            type_oid,
            modifier,
        });
        let sent: Vec<Sent> = sent.collect();
        let made = key.and_then(|key| catalog::layout_of(&table, capture.layout.oid, sent, &key, &self.types));
        let layout = match made {
            Ok(layout) => layout,
            Err(error) if error.kind() == ErrorKind::Schema => return self.fail(index, error, gathered),
            Err(error) => return Err(error),
        };
        if self.binary && layout.columns.iter().any(catalog::Column::needs_text) {
            self.wants_text = true;
            let cause = format!(
                "table {} has a column now that is configured as text: reading goes on in text format",
                table.name
            );
            return Err(Error::new(ErrorKind::Unavailable, "read", config.server.name(), cause));
        }
        match capture.layout.schema.change_to(&layout.schema) {
            SchemaChange::Incompatible { reason } => {
                let error = Error::new(
                    ErrorKind::Schema,
                    "capture",
                    format!("table {}", config.qualified(&table.name)),
                    reason,
                )
                .with_remedy(format!("run shori resnapshot --retyped {}", table.name));
                return self.fail(index, error, gathered);
            }
            SchemaChange::Same => {
                // The same type here, and another there: its values may have been written anew.
                let known = |column: &catalog::Column| {
                    let mut known = capture.layout.columns.iter();
                    let found = known.find(|known| known.name == column.name);
                    found.is_none_or(|known| known.type_oid == column.type_oid && known.modifier == column.modifier)
                };
                if !layout.columns.iter().all(known) {
                    self.read_anew(index, gathered);
                }
            }
            SchemaChange::Evolved { added, dropped } => {
                let names = |fields: &[Arc<Field>]| fields.iter().map(|field| field.name().clone()).collect::<Vec<_>>();
                let (added, dropped) = (names(&added), names(&dropped));
                tracing::info!(table = table.name, ?added, ?dropped, "the table has other columns");
                gathered.schemas.push(CaptureInfo { id: capture.id.clone(), schema: layout.schema.clone() });
                if catalog::hold_values(client, layout.oid, &added).await? {
                    self.read_anew(index, gathered);
                }
            }
        }
        gathered.cut(index)?;
        self.cursor.captures[index].layout = Arc::new(layout);
        Ok(())
    }

    /// Reads what an update does not bring, while no snapshot has brought it either: the row may have moved out of the
    /// way of one that goes by places.
    async fn complete(
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
    async fn chunk(&mut self, config: &PostgresConfig, limit: BatchLimit, gathered: &mut Gathered) -> Result<bool> {
        if !self.wants_chunk() || Instant::now() < self.chunk_due || self.cursor.is_held() || !gathered.is_empty() {
            return Ok(false);
        }
        let Some(index) = self.cursor.captures.iter().position(Capture::needs_snapshot) else { return Ok(false) };
        let (read_to, before) = (self.cursor.read_to, self.cursor.watermark.staged);
        // A transaction that was read in part comes again before anything else, and what a capture has already of what
        // is read again.
        let above = before.max(self.cursor.furthest);
        let chunk = positions::next_chunk(read_to, &above);
        if positions::of_chunk_row(read_to, chunk, 0)? <= above {
            return Ok(false);
        }
        let transaction = answered(config, snapshot::begin(&mut self.session.client)).await?;
        let sight = answered(config, Sight::of(&transaction)).await?;
        let unseen = self.cursor.unsettled.iter().any(|xid| !sight.visibility.shows(*xid));
        if unseen || !is_settled(&transaction, &sight, &mut self.open_at_start).await? {
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
            before,
            time: sight.time,
            filter: self.published.get(&capture.table.name).and_then(|published| published.filter.as_deref()),
        };
        let limit = BatchLimit { rows: limit.rows.min(config.snapshot_chunk_rows.max(1)), ..limit };
        let local = "set local statement_timeout = 0";
        transaction.batch_execute(local).await.map_err(|cause| sql_error("begin", "a snapshot", cause))?;
        let chunk = match snapshot::read_chunk(&transaction, capture, &place, limit).await {
            Ok(chunk) => chunk,
            // One bad table stops itself only (contract 11).
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::Data | ErrorKind::Refused | ErrorKind::Schema | ErrorKind::Usage
                ) =>
            {
                drop(transaction);
                self.fail(index, error, gathered)?;
                return Ok(true);
            }
            Err(error) => return Err(error),
        };
        // A truncation is no matter of snapshots: one that came before the copy is seen by it.
        let read_by = Sight::of(&transaction).await?.wal_end;
        transaction.commit().await.map_err(|cause| sql_error("end", "a snapshot", cause))?;
        let is_closing = chunk.progress.is_done();
        let capture = &mut self.cursor.captures[index];
        capture.progress = chunk.progress.clone();
        gathered.finished.extend(chunk.rows);
        gathered.rejected.extend(chunk.rejected);
        gathered.snapshots.push((capture.id.clone(), chunk.progress));
        if !is_closing {
            self.cursor.hold_until(sight.wal_end.max(read_by));
        }
        self.cursor.move_to(positions::of_chunk_end(read_to, place.chunk)?, sight.time);
        Ok(true)
    }

    /// Forgets transactions that every snapshot shows by now.
    async fn settle(&mut self) -> Result<()> {
        if self.cursor.unsettled.len() > UNSETTLED_MAX {
            let sight = Sight::of(&self.session.client).await?;
            self.cursor.unsettled.retain(|xid| !sight.visibility.shows(*xid));
        }
        Ok(())
    }

    /// Looks whether all tables are still published: those that are not would just seem idle.
    async fn watch(&mut self, config: &PostgresConfig, gathered: &mut Gathered) -> Result<()> {
        if self.watched.elapsed() < WATCH_INTERVAL {
            return Ok(());
        }
        self.watched = Instant::now();
        let published = setup::published(&self.session.client, config).await?;
        for index in 0..self.cursor.captures.len() {
            let capture = &self.cursor.captures[index];
            if capture.failed || published.contains_key(&capture.table.name) {
                continue;
            }
            let table = capture.table.name.clone();
            let cause = format!("it is not in publication {} any more, or was dropped", config.publication);
            let remedy = format!("put it back, then run shori resnapshot {table}");
            let object = format!("table {}", config.qualified(&table));
            self.fail(index, Error::new(ErrorKind::Gap, "capture", object, cause).with_remedy(remedy), gathered)?;
        }
        Ok(())
    }
}

/// The outcome of statements that each end within the server's own limit, or that the server keeps silent.
async fn answered<T>(config: &PostgresConfig, statements: impl Future<Output = Result<T>>) -> Result<T> {
    let at_most = config.server.statement_timeout + ANSWER_GRACE;
    tokio::time::timeout(at_most, statements).await.unwrap_or_else(|_| {
        let cause = format!("it has not answered for {} s", at_most.as_secs());
        Err(Error::new(ErrorKind::Unavailable, "ask", config.server.name(), cause))
    })
}

/// Whether no transaction that was open at start can have been read before without being visible yet.
///
/// A commit is in the log, and may be sent, an instant before it is visible; but as long as it waits for a standby.
async fn is_settled(
    transaction: &tokio_postgres::Transaction<'_>,
    sight: &Sight,
    open_at_start: &mut OpenAtStart,
) -> Result<bool> {
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
