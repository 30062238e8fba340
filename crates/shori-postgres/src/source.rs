//! The [`Source`] over one PostgreSQL database.
//!
//! `chunks` reads rows apart from the stream, `shapes` follows tables that change.

mod chunks;
mod shapes;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use shori_core::position::{CaptureId, Position};
use shori_core::source::{
    BatchLimit, CaptureInfo, Head, Resume, SnapshotProgress, SnapshotState, Source, SourceBatch, Started,
};
use shori_core::{Error, ErrorKind, Result};
use tokio::time::Instant;

use crate::catalog::{self, Types};
use crate::connect::Session;
use crate::generated::Evaluator;
use crate::message::{self, WalLocation};
use crate::replication::{Item, Replication, Request};
use crate::setup::{self, Facts, Published};
use crate::snapshot::Sight;
use crate::stream::{Capture, Cursor, Gathered, Next};

use crate::{PostgresConfig, positions, start};
use chunks::{GRACE, OpenAtStart};

/// A place without changes is told no more often than this, lest a store in the same server never rests.
const IDLE_INTERVAL: Duration = Duration::from_millis(500);
/// How long a call waits for what the server was asked for.
const SHORT_WAIT: Duration = Duration::from_millis(20);
/// Shortest time between two looks at what is published.
const WATCH_INTERVAL: Duration = Duration::from_secs(5);
/// What a statement's answer may take longer than the server's own limit for the statement.
const ANSWER_GRACE: Duration = Duration::from_secs(5);

/// Reads a replication slot. See the crate's documentation for what it can and cannot see.
pub struct PostgresSource {
    config: Arc<PostgresConfig>,
    timeline: Arc<str>,
    /// The stream has columns that only their text tells, whatever the tables are now.
    in_text: bool,
    open: Option<Open>,
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
    /// Captures whose tables had other columns at start than their log, or have other generated ones since, and where what had
    /// waited until then ends.
    behind: Vec<usize>,
    waited_until: WalLocation,
    evaluator: Evaluator,
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
        start::must_be_streamed(config, resume)?;
        start::check_reaches(config, &facts, positions::read_on_at(&furthest)?)?;
        let mut found = catalog::tables(client, config, &mut types).await?;
        start::leave_out_unpublished(client, config, resume, &mut found).await?;
        let names: Vec<String> = found.layouts.iter().map(|(table, _)| table.name.clone()).collect();
        let (published, made) = setup::publication(client, config, &names).await?;
        let slot = setup::slot(client, config, made, resume.values().any(start::has_begun)).await?;
        let ready = start::captures(config, resume, found, &published, &slot, &types)?;
        let watermark = ready.watermark(&slot, resume)?;
        let from = positions::read_on_at(&watermark.staged)?;
        let binary = !in_text
            && !ready.captures.iter().any(|capture| capture.layout.sent().iter().any(catalog::Column::needs_text));
        let request = Request { slot: config.slot.clone(), from, publication: config.publication.clone(), binary };
        let sight = Sight::of(client).await?;
        setup::slot_is_free(client, config).await?;
        let replication = Replication::start(&config.server, request).await?;
        let started = Started { identity: facts.identity, captures: ready.infos(), failed: ready.failed };
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
            news: News::default(),
            behind: ready.behind,
            waited_until: sight.wal_end,
            evaluator: Evaluator::default(),
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
        answered(config, self.follow_shapes(config, &mut gathered)).await?;
        let read_chunk = self.chunk(config, limit, &mut gathered).await?;
        if !read_chunk {
            self.stream(config, limit, &mut gathered).await?;
        }
        self.tell_idle(!gathered.is_empty() || self.cursor.is_held())?;
        if !read_chunk {
            // It may have waited for no more than what has come now. So it is read while the one before is appended.
            self.chunk(config, limit, &mut gathered).await?;
        }
        // Before anybody takes what was read for all there is.
        answered(config, self.follow_shapes(config, &mut gathered)).await?;
        let mut gathered = gathered.finish()?;
        self.compute_generated(config, &mut gathered).await?;
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
            Next::Named { capture } => {
                answered(config, self.look_for_generated(config, capture)).await?;
                Ok(false)
            }
            Next::Reshaped(reshaped) => {
                let capture = reshaped.capture;
                answered(config, self.reshape(config, reshaped, gathered)).await?;
                answered(config, self.look_for_generated(config, capture)).await?;
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

/// Whether a statement about one table has failed for what the table is, and not the server.
fn is_of_table(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Data | ErrorKind::Refused | ErrorKind::Schema | ErrorKind::Usage)
}

/// The outcome of statements that each end within the server's own limit, or that the server keeps silent.
pub(crate) async fn answered<T>(config: &PostgresConfig, statements: impl Future<Output = Result<T>>) -> Result<T> {
    answered_within(config, config.server.statement_timeout, statements).await
}

/// The same of statements that may read a table whole. Where the server has stopped in the middle of one, nothing tells
/// that from a large table, and its system confirms whatever is sent: only time does.
pub(crate) async fn read_whole<T>(config: &PostgresConfig, statements: impl Future<Output = Result<T>>) -> Result<T> {
    answered_within(config, config.read_timeout, statements).await
}

async fn answered_within<T>(
    config: &PostgresConfig,
    limit: Duration,
    statements: impl Future<Output = Result<T>>,
) -> Result<T> {
    let at_most = limit + ANSWER_GRACE;
    tokio::time::timeout(at_most, statements).await.unwrap_or_else(|_| {
        let cause = format!("it has not answered for {} s", at_most.as_secs());
        Err(Error::new(ErrorKind::Unavailable, "ask", config.server.name(), cause))
    })
}
