//! The [`Source`] over one PostgreSQL database.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::Field;
use async_trait::async_trait;
use bytes::Bytes;
use shori_core::position::{CaptureId, Position, Watermark};
use shori_core::schema::{SchemaChange, TableSchema};
use shori_core::source::{
    BatchLimit, CaptureInfo, Head, Resume, SnapshotProgress, SnapshotState, Source, SourceBatch, Started,
};
use shori_core::{Error, ErrorKind, Result};
use tokio::time::Instant;

use crate::catalog::{self, Layout, Sent, Types};
use crate::connect::{Server, Session, sql_error};
use crate::message::{self, Message, Value, WalLocation};
use crate::replication::{Item, Replication, Request};
use crate::setup::{self, Facts, Published};
use crate::snapshot::{self, Bookmark, Sight};
use crate::stream::{Capture, Cursor, Gathered, Next, Reshaped};
use crate::{PostgresConfig, positions};

/// A place without changes is told no more often than this, lest a store in the same server never rests.
const IDLE_INTERVAL: Duration = Duration::from_millis(500);
/// How long a call waits for what the server was asked for.
const SHORT_WAIT: Duration = Duration::from_millis(20);
/// Shortest time between two looks at what is published.
const WATCH_INTERVAL: Duration = Duration::from_secs(5);
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
    open: Option<Open>,
}

/// Transactions that were open at start.
struct OpenAtStart {
    ids: Vec<u64>,
    /// Until when they are waited for; for tables that may just have been published, until they end: what such a
    /// transaction wrote before is in no stream.
    until: Option<Instant>,
}

struct Open {
    session: Session,
    replication: Replication,
    binary: bool,
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
    /// The furthest that any capture was staged at start; chunks stand above it.
    furthest: Position,
    /// Tables that are to be read anew, still to be told.
    snapshots: Vec<(CaptureId, SnapshotProgress)>,
    /// A call was dropped before it had ended: what it had read is lost.
    interrupted: bool,
}

impl PostgresSource {
    pub fn new(config: PostgresConfig) -> Self {
        let timeline = config.source_name.as_str().into();
        Self { config: Arc::new(config), timeline, open: None }
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
        let (started, open) = Open::start(&self.config, resume).await?;
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
                self.open = None;
                Err(error)
            }
        }
    }

    async fn wait(&mut self, at_most: Duration) -> Result<()> {
        let until = Instant::now() + at_most;
        let open = self.opened()?;
        loop {
            let due = open.idle.map(|_| open.idle_told + IDLE_INTERVAL);
            let stop = due.map_or(until, |due| due.min(until));
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
    async fn start(config: &PostgresConfig, resume: &BTreeMap<CaptureId, Resume>) -> Result<(Started, Self)> {
        let session = config.server.connect().await?;
        let client = &session.client;
        let facts = Facts::read(client, config).await?;
        let mut types = Types::default();
        let found = catalog::tables(client, config, &mut types).await?;
        let names: Vec<String> = found.layouts.iter().map(|(table, _)| table.name.clone()).collect();
        let (published, made) = setup::publication(client, config, &names).await?;
        let has_begun = |known: &Resume| known.snapshot.state != SnapshotState::Requested;
        let slot = setup::slot(client, config, made, resume.values().any(has_begun)).await?;
        let id = |name: &str| CaptureId::new(&config.source_name, name);
        let mut failed: Vec<_> = found.failed.into_iter().map(|(table, error)| (id(&table.name), error)).collect();
        let mut captures = Vec::with_capacity(found.layouts.len());
        let mut lowest: Option<Watermark> = None;
        let (mut furthest, mut is_partly_read) = (Position::ZERO, false);
        let mut snapshots = Vec::new();
        for (table, layout) in found.layouts {
            let id = id(&table.name);
            let columns = published.get(&table.name).and_then(|published| published.columns.as_deref());
            let layout = match layout.published(&table, columns, &types) {
                Ok(layout) => layout,
                Err(error) => {
                    failed.push((id, error));
                    continue;
                }
            };
            let known = resume.get(&id);
            let watermark = known.map_or(Watermark::ZERO, |known| known.watermark);
            furthest = furthest.max(watermark.staged);
            let begun = known.filter(|known| has_begun(known));
            if let Some(known) = begun {
                if let Err(error) = check_resume(config, known, &layout, &slot) {
                    failed.push((id, error));
                    continue;
                }
                is_partly_read |= !known.snapshot.is_done() || watermark.boundary < watermark.staged;
                lowest = Some(lowest.filter(|lowest| lowest.staged <= watermark.staged).unwrap_or(watermark));
            }
            let mut progress = known.map_or(SnapshotProgress::requested(1), |known| known.snapshot.clone());
            if let Some(known) = begun
                && catalog::hold_values(client, layout.oid, &added(known, &layout)).await?
            {
                progress = read_anew(&id, &progress);
                snapshots.push((id.clone(), progress.clone()));
            }
            captures.push(Capture {
                progress,
                schema_name: config.schema.as_str().into(),
                layout: Arc::new(layout),
                failed: false,
                table,
                id,
            });
        }
        check_reaches(config, &facts, positions::read_on_at(&furthest)?)?;
        // Where nothing older is needed, reading begins where the slot does.
        let fresh = positions::of_boundary(slot.forgotten_to)?.max(furthest);
        let told = resume.values().map(|known| known.watermark.boundary).max().unwrap_or(Position::ZERO);
        let fresh = Watermark {
            staged: fresh,
            boundary: if positions::is_between_commits(&fresh) { fresh } else { told },
            boundary_time: resume.values().map(|known| known.watermark.boundary_time).max().unwrap_or(0),
        };
        let watermark = lowest.unwrap_or(fresh);
        let from = positions::read_on_at(&watermark.staged)?;
        let binary = !captures.iter().any(|capture| capture.layout.columns.iter().any(catalog::Column::needs_text));
        let request = Request { slot: config.slot.clone(), from, publication: config.publication.clone(), binary };
        let sight = Sight::of(client).await?;
        setup::slot_is_free(client, config).await?;
        let replication = Replication::start(&config.server, request).await?;
        let infos = captures
            .iter()
            .map(|capture| CaptureInfo { id: capture.id.clone(), schema: capture.layout.schema.clone() });
        let started = Started { identity: facts.identity, captures: infos.collect(), failed };
        let is_wanted_whole = captures.iter().any(|capture| capture.progress.state == SnapshotState::Requested);
        let mut cursor = Cursor::new(captures, watermark, from);
        if is_partly_read {
            // What was read under snapshots may show commits up to here, and it is not remembered up to which.
            cursor.hold_until(sight.wal_end);
        }
        let now = Instant::now();
        let open = Self {
            session,
            replication,
            binary,
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
            furthest,
            snapshots,
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
        gathered.snapshots.append(&mut self.snapshots);
        answered(config, self.watch(config, &mut gathered)).await?;
        answered(config, self.settle()).await?;
        let read_chunk = self.chunk(config, limit, &mut gathered).await?;
        if !read_chunk {
            self.stream(config, limit, &mut gathered).await?;
        }
        self.tell_idle(!gathered.is_empty() || self.cursor.is_held())?;
        let gathered = gathered.finish()?;
        let wants_chunk = self.cursor.captures.iter().any(Capture::needs_snapshot);
        Ok(SourceBatch {
            changes: gathered.finished,
            watermark: self.cursor.watermark,
            snapshots: gathered.snapshots,
            schemas: gathered.schemas,
            rejected: gathered.rejected,
            failed: gathered.failed,
            more: wants_chunk || self.cursor.is_held() || !self.pending.is_empty(),
        })
    }

    /// Reads what has come, up to the limit.
    async fn stream(&mut self, config: &PostgresConfig, limit: BatchLimit, gathered: &mut Gathered) -> Result<()> {
        while gathered.rows() < limit.rows && gathered.bytes() < limit.bytes {
            let Some(item) = self.pending.pop_front() else {
                match self.replication.try_receive()? {
                    Some(block) => self.absorb(block),
                    None if gathered.is_empty() && self.cursor.is_held() => {
                        self.replication.ask();
                        match tokio::time::timeout(SHORT_WAIT, self.replication.receive()).await {
                            Ok(block) => self.absorb(block?),
                            Err(_) => return Ok(()),
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
                Ok(!gathered.is_empty() || !gathered.schemas.is_empty())
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
        capture.progress = read_anew(&capture.id, &capture.progress);
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
            SchemaChange::Same => {}
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
        self.cursor.hold_until(sight.wal_end);
        self.cursor.take(message, raw, Some(&whole), gathered).map(|_| ())
    }

    /// Reads the next chunk of a table, if one is to be read and this is a place for it.
    async fn chunk(&mut self, config: &PostgresConfig, limit: BatchLimit, gathered: &mut Gathered) -> Result<bool> {
        if !self.cursor.is_between_commits() || self.cursor.is_held() || !gathered.is_empty() {
            return Ok(false);
        }
        let Some(index) = self.cursor.captures.iter().position(Capture::needs_snapshot) else { return Ok(false) };
        let (read_to, before) = (self.cursor.read_to, self.cursor.watermark.staged);
        // A transaction that was read in part comes again before anything else, and what a capture has already of what
        // is read again.
        let above = before.max(self.furthest);
        let chunk = positions::next_chunk(read_to, &above);
        if positions::of_chunk_row(read_to, chunk, 0)? <= above {
            return Ok(false);
        }
        let transaction = answered(config, snapshot::begin(&mut self.session.client)).await?;
        let sight = answered(config, Sight::of(&transaction)).await?;
        let unseen = self.cursor.unsettled.iter().any(|xid| !sight.visibility.shows(*xid));
        if unseen || !is_settled(&transaction, &sight, &mut self.open_at_start).await? {
            drop(transaction);
            self.replication.ask();
            return Ok(false);
        }
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
        transaction.commit().await.map_err(|cause| sql_error("end", "a snapshot", cause))?;
        let capture = &mut self.cursor.captures[index];
        capture.progress = chunk.progress.clone();
        gathered.finished.extend(chunk.rows);
        gathered.rejected.extend(chunk.rejected);
        gathered.snapshots.push((capture.id.clone(), chunk.progress));
        self.cursor.hold_until(sight.wal_end);
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

/// Columns that the table has and the log does not know of.
fn added(known: &Resume, layout: &Layout) -> Vec<String> {
    match known.schema.as_ref().map(|schema| schema.change_to(&layout.schema)) {
        Some(SchemaChange::Evolved { added, .. }) => added.iter().map(|field| field.name().clone()).collect(),
        _ => Vec::new(),
    }
}

fn read_anew(capture: &CaptureId, progress: &SnapshotProgress) -> SnapshotProgress {
    tracing::info!(%capture, "an added column has values already: the table is read again");
    SnapshotProgress::requested(progress.generation.saturating_add(1))
}

/// Whether reading can go on where `known` stands.
fn check_resume(config: &PostgresConfig, known: &Resume, layout: &Layout, slot: &setup::Slot) -> Result<()> {
    let table = &layout.schema.table;
    let object = || format!("table {}", config.qualified(table));
    let schema: Option<&Arc<TableSchema>> = known.schema.as_ref();
    if let Some(SchemaChange::Incompatible { reason }) = schema.map(|schema| schema.change_to(&layout.schema)) {
        return Err(Error::new(ErrorKind::Schema, "capture", object(), reason)
            .with_remedy(format!("run shori resnapshot --retyped {table}")));
    }
    let gap = |cause: String| {
        Err(Error::new(ErrorKind::Gap, "read", format!("changes of {}", object()), cause)
            .with_remedy(format!("run shori resnapshot {table}")))
    };
    if let Some(lost) = &slot.lost {
        return gap(format!("{lost}: what was committed since may be missing"));
    }
    let read_on = positions::read_on_at(&known.watermark.staged)?;
    if slot.forgotten_to > read_on {
        return gap(format!(
            "source retention has passed the watermark: the log has it up to {}, the slot begins at {}",
            shown(read_on),
            shown(slot.forgotten_to)
        ));
    }
    match Bookmark::decode(&known.snapshot.resume)? {
        Some(bookmark) if bookmark.table != layout.oid => gap("it was dropped and created again".into()),
        _ => Ok(()),
    }
}

/// Fails where the server's log ends before what was read of it.
fn check_reaches(config: &PostgresConfig, facts: &Facts, read_on: WalLocation) -> Result<()> {
    if facts.wal_end >= read_on {
        return Ok(());
    }
    let cause = format!(
        "the log has its changes up to {}, but its own ends at {}: it is an older copy",
        shown(read_on),
        shown(facts.wal_end)
    );
    Err(Error::new(ErrorKind::SourceReplaced, "read", config.server.name(), cause)
        .with_remedy("put the captured server back and start again, or start with an empty log"))
}

/// As PostgreSQL prints it.
fn shown(location: WalLocation) -> String {
    format!("{:X}/{:X}", location >> 32, location & u64::from(u32::MAX))
}

/// What could be captured, and what is in the way of it: nothing is changed.
pub struct Inspected {
    pub captures: Vec<CaptureInfo>,
    /// Tables that cannot be captured, each with the reason.
    pub failed: Vec<(CaptureId, Error)>,
    /// Missing rights and settings.
    pub problems: Vec<Error>,
}

pub async fn inspect(config: &PostgresConfig) -> Result<Inspected> {
    let session = config.server.connect().await?;
    let client = &session.client;
    let found = catalog::tables(client, config, &mut Types::default()).await?;
    let id = |name: &str| CaptureId::new(&config.source_name, name);
    let names: Vec<String> = config.tables.iter().map(|table| table.name.clone()).collect();
    let mut problems = setup::missing_rights(client, config, &names).await?;
    problems.extend(Facts::read(client, config).await.err());
    Ok(Inspected {
        captures: found
            .layouts
            .into_iter()
            .map(|(table, layout)| CaptureInfo { id: id(&table.name), schema: layout.schema })
            .collect(),
        failed: found.failed.into_iter().map(|(table, error)| (id(&table.name), error)).collect(),
        problems,
    })
}

/// Makes publication and slot. May be repeated. Returns the tables that are captured, and why others are not.
pub async fn install(config: &PostgresConfig) -> Result<(Vec<String>, Vec<Error>)> {
    let session = config.server.connect().await?;
    let client = &session.client;
    Facts::read(client, config).await?;
    let found = catalog::tables(client, config, &mut Types::default()).await?;
    let names: Vec<String> = found.layouts.iter().map(|(table, _)| table.name.clone()).collect();
    let (_, made) = setup::publication(client, config, &names).await?;
    setup::slot(client, config, made, false).await?;
    let unique: BTreeSet<String> = names.into_iter().collect();
    Ok((unique.into_iter().collect(), found.failed.into_iter().map(|(_, error)| error).collect()))
}

/// The first rows of every table that can be captured, at most `rows` of each. Positions mean nothing.
pub async fn sample(config: &PostgresConfig, rows: usize) -> Result<Vec<shori_core::change::ChangeBatch>> {
    const SAMPLE_MAX_BYTES: usize = 16 << 20;
    let mut session = config.server.connect().await?;
    let found = catalog::tables(&session.client, config, &mut Types::default()).await?;
    let transaction = snapshot::begin(&mut session.client).await?;
    let mut sampled = Vec::new();
    for (table, layout) in found.layouts {
        let capture = Capture {
            id: CaptureId::new(&config.source_name, &table.name),
            schema_name: config.schema.as_str().into(),
            progress: SnapshotProgress::requested(1),
            layout: Arc::new(layout),
            failed: false,
            table,
        };
        let place = snapshot::Place { read_to: 8, chunk: 0, before: Position::ZERO, time: 0, filter: None };
        let limit = BatchLimit { rows, bytes: SAMPLE_MAX_BYTES };
        sampled.extend(snapshot::read_chunk(&transaction, &capture, &place, limit).await?.rows);
    }
    Ok(sampled)
}

/// Runs a script of the user's.
pub async fn execute(server: &Server, script: &str) -> Result<()> {
    let session = server.connect().await?;
    session.client.batch_execute(script).await.map_err(server.fail("run a script in"))
}

/// Bytes of the server's log above the position with this `lsn`, changes of other tables among them.
pub async fn log_bytes_above(config: &PostgresConfig, lsn: u64) -> Result<u64> {
    let session = config.server.connect().await?;
    let facts = Facts::read(&session.client, config).await?;
    check_reaches(config, &facts, lsn)?;
    Ok(facts.wal_end.saturating_sub(lsn.saturating_add(1)))
}
