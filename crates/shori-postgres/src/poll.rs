//! Capture by timestamp: the [`Source`] over a PostgreSQL on which nobody may make a publication or a slot.
//!
//! # Constraints
//!
//! - Nothing is needed on the server but the right to read the tables.
//! - What is not there any more when a poll looks was not seen: deletions, keys that a row had before, versions between
//!   two polls. An update that does not set the timestamp column is not seen either. Reading the table again
//!   (`resnapshot`) mends the rows.
//! - A commit is seen however late it comes, as far as its timestamp is when its transaction began or later, and the
//!   server tells when that was; else if it comes within the overlap.
//! - No image makes a second version because it was read twice, whatever happens between.
//!
//! # Layout
//!
//! `begin` looks at who writes and opens the transaction that a poll reads in; `changed` reads a table's changed rows;
//! `bookmark` is how far a table was polled, as it is stored; `start` is where polling goes on.
//!
//! # How it works
//!
//! A poll is one snapshot over all tables, read in as many batches as it takes; after the last one is a boundary. Its
//! place in the timeline is when it began. Before it, the server is asked when the oldest open transaction began: what
//! this snapshot does not show has a timestamp from then on, and there the next poll looks from, less the overlap. What
//! it finds is in the log already if the last snapshot showed who wrote it, which the bookmark keeps: stored with the
//! rows, in the same transaction.
//!
//! A table without progress is read whole by its first poll, in the order of its blocks. If that is interrupted, the next
//! poll reads the blocks that are left, and then whatever the first snapshot did not show. A poll that is interrupted is
//! finished by the next one, from the row on that it had come to, before that looks for what came since.

mod begin;
mod bookmark;
mod changed;
mod start;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use shori_core::position::{CaptureId, Micros, Position, Watermark};
use shori_core::source::{BatchLimit, Head, Resume, SnapshotState, Source, SourceBatch, Started};
use shori_core::{Error, ErrorKind, Result};
use tokio::time::Instant;
use tokio_postgres::Client;

use crate::catalog::Types;
use crate::connect::{Session, sql_error};
use crate::setup::Facts;
use crate::source::{answered, read_whole};
use crate::visibility::Visibility;
use crate::{Polls, PostgresConfig, positions, snapshot};
use begin::Activity;
use bookmark::{Bookmark, Passed, Seen};
use changed::{Cursor, Remembered, Wanted, end_of};
pub(crate) use start::hints;
use start::{Polled, Ready, blind_spots};

/// Polls tables by their timestamp columns. See the module's documentation for what it can and cannot see.
pub struct PollSource {
    config: Arc<PostgresConfig>,
    timeline: Arc<str>,
    has_warned: bool,
    open: Option<Open>,
}

struct Open {
    session: Session,
    tables: Vec<Polled>,
    types: Types,
    watermark: Watermark,
    /// The furthest that any capture was staged at start.
    furthest: Position,
    remembered: Remembered,
    poll: Option<Poll>,
    due: Instant,
    /// A call was dropped before it had ended: what it had read is lost.
    interrupted: bool,
}

/// A poll under way.
struct Poll {
    begun: Instant,
    time: Micros,
    visibility: Visibility,
    /// The first id of a transaction that was not given yet.
    given: u64,
    activity: Activity,
    /// What stands before it.
    before: Position,
    /// The number of the next part.
    part: u32,
    /// The table at hand, and whether it has been begun.
    table: usize,
    is_inside: bool,
    /// Of the table at hand, and whether what it finds may be in the log.
    cursor: Option<(Cursor, bool)>,
    /// How far the time of the table's column is from UTC.
    offset: Micros,
    newest: Micros,
}

impl PollSource {
    pub fn new(config: PostgresConfig) -> Self {
        let timeline = config.source_name.as_str().into();
        Self { config: Arc::new(config), timeline, has_warned: false, open: None }
    }

    fn opened(&mut self) -> Result<&mut Open> {
        self.open.as_mut().ok_or_else(|| {
            Error::new(ErrorKind::Unavailable, "poll", format!("source {}", self.timeline), "it is not connected")
        })
    }

    fn polls(&self) -> Polls {
        self.config.polls.unwrap_or_default()
    }
}

#[async_trait]
impl Source for PollSource {
    fn timeline(&self) -> Arc<str> {
        self.timeline.clone()
    }

    async fn start(&mut self, resume: &BTreeMap<CaptureId, Resume>) -> Result<Started> {
        self.open = None;
        let config = self.config.clone();
        let session = config.server.connect().await?;
        let facts = answered(&config, Facts::read(&session.client, &config)).await?;
        let mut types = Types::default();
        let ready = start::tables(&session.client, &config, resume, &mut types);
        let Ready { tables, failed, watermark, furthest } = read_whole(&config, ready).await?;
        if !std::mem::replace(&mut self.has_warned, true) {
            let notes = answered(&config, notes(&session.client, &config)).await?;
            notes.iter().for_each(|note| tracing::warn!("{note}"));
        }
        let captures = tables.iter().map(Polled::info).collect();
        self.open = Some(Open {
            session,
            tables,
            types,
            watermark,
            furthest,
            remembered: Remembered::default(),
            poll: None,
            due: Instant::now(),
            interrupted: false,
        });
        Ok(Started { identity: facts.identity, captures, failed })
    }

    async fn next(&mut self, limit: BatchLimit) -> Result<SourceBatch> {
        let (config, polls) = (self.config.clone(), self.polls());
        let open = self.opened()?;
        if std::mem::replace(&mut open.interrupted, true) {
            let cause = "an earlier call was interrupted: it is read again from what is in the log";
            return Err(Error::new(ErrorKind::Unavailable, "poll", config.server.name(), cause));
        }
        let limit = BatchLimit { rows: limit.rows.max(1), bytes: limit.bytes.max(1) };
        match open.step(&config, polls, limit).await {
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
        let open = self.opened()?;
        if open.poll.is_none() {
            tokio::time::sleep_until(open.due.min(Instant::now() + at_most)).await;
        }
        Ok(())
    }

    /// The server keeps nothing for who polls it.
    async fn acknowledge(&mut self, _durable: &Position) -> Result<()> {
        Ok(())
    }

    /// Only a poll that begins from now on is sure to show all that is committed by now.
    async fn head(&mut self) -> Result<Head> {
        let (config, open) = (self.config.clone(), self.opened()?);
        let clock = answered(&config, begin::clock(&open.session.client)).await?;
        let time = clock.max(open.last().saturating_add(1));
        Ok(Head {
            boundary: positions::of_boundary(end_of(time))?,
            time: open.watermark.boundary_time,
            changes_waiting: None,
        })
    }
}

/// Whether the log has a table by polling.
pub(crate) fn is_polled(known: &Resume) -> bool {
    Bookmark::is_one(&known.snapshot.resume)
}

/// What who relies on it should know.
pub(crate) async fn notes(client: &Client, config: &PostgresConfig) -> Result<Vec<String>> {
    let mut notes = vec![blind_spots(config)];
    if !begin::activity(client).await?.is_all {
        notes.push(unseen_transactions(config));
    }
    Ok(notes)
}

fn unseen_transactions(config: &PostgresConfig) -> String {
    format!(
        "role {user} does not see when the transactions of others began: a row is missed that a transaction commits more \
         than overlap_seconds after it began, if it wrote its first one after the poll before; run: grant \
         pg_read_all_stats to {user}",
        user = config.server.user
    )
}

impl Open {
    /// When the last poll was, or the one that is under way.
    fn last(&self) -> Micros {
        let place =
            |position: &Position| position.lsn.to_u64().and_then(|place| i64::try_from(place).ok()).unwrap_or(0);
        let staged = place(&self.furthest).max(place(&self.watermark.staged));
        self.poll.as_ref().map_or(staged, |poll| poll.time.max(staged))
    }

    async fn step(&mut self, config: &PostgresConfig, polls: Polls, limit: BatchLimit) -> Result<SourceBatch> {
        let mut batch = SourceBatch::empty(self.watermark);
        let mut poll = match self.poll.take() {
            Some(poll) => poll,
            None if Instant::now() < self.due => return Ok(batch),
            None => self.begin(config, &mut batch).await?,
        };
        let mut room = limit;
        while room.rows > 0 && room.bytes > 0 {
            if poll.table == self.tables.len() {
                self.due = poll.begun + polls.every;
                answered(config, self.end(poll, &mut batch)).await?;
                return Ok(batch);
            }
            read_whole(config, self.read(config, polls, &mut poll, &mut room, &mut batch)).await?;
        }
        // What has come of the poll may be in the log from here on, and the poll may not come to its end.
        for index in 0..self.tables.len() {
            let polled = &mut self.tables[index];
            if std::mem::take(&mut polled.is_touched) && !polled.capture.failed {
                if let Some(passed) = &mut polled.bookmark.passed {
                    passed.file = answered(config, changed::file_of(&self.session.client, passed.relation)).await?;
                }
                let capture = &mut polled.capture;
                capture.progress.resume = polled.bookmark.encode();
                batch.snapshots.push((capture.id.clone(), capture.progress.clone()));
            }
        }
        if let Some(last) = poll.part.checked_sub(1) {
            self.watermark.staged = positions::of_chunk_end(end_of(poll.time), last)?;
        }
        batch.watermark = self.watermark;
        batch.more = true;
        self.poll = Some(poll);
        Ok(batch)
    }

    async fn begin(&mut self, config: &PostgresConfig, batch: &mut SourceBatch) -> Result<Poll> {
        let begun = Instant::now();
        let client = &self.session.client;
        let activity = answered(config, begin::activity(client)).await?;
        let time = activity.time.max(self.last().saturating_add(1));
        answered(config, begin::transaction(client, config)).await?;
        for index in 0..self.tables.len() {
            if self.tables[index].capture.failed {
                continue;
            }
            let table = &self.tables[index].capture.table.name;
            let locked = answered(config, begin::lock(&self.session.client, config, table)).await;
            self.allow(index, locked, batch)?;
        }
        let (visibility, given) = answered(config, begin::visibility(&self.session.client)).await?;
        for index in 0..self.tables.len() {
            let polled = &mut self.tables[index];
            if !polled.capture.failed {
                let followed = polled.follow(&self.session.client, config, &mut self.types, batch);
                match answered(config, followed).await {
                    // What the server refuses ends the transaction.
                    Err(error) if !matches!(error.kind(), ErrorKind::Schema | ErrorKind::Gap) => return Err(error),
                    followed => self.allow(index, followed, batch)?,
                }
            }
        }
        Ok(Poll {
            begun,
            time,
            visibility,
            given,
            activity,
            before: self.furthest.max(self.watermark.staged),
            part: 0,
            table: 0,
            is_inside: false,
            cursor: None,
            offset: 0,
            newest: 0,
        })
    }

    /// Lets a failure that is one table's be its own (contract 11).
    fn allow(&mut self, index: usize, done: Result<()>, batch: &mut SourceBatch) -> Result<()> {
        let Err(error) = done else { return Ok(()) };
        match error.kind() {
            ErrorKind::Data | ErrorKind::Refused | ErrorKind::Schema | ErrorKind::Usage | ErrorKind::Gap => {
                let capture = &mut self.tables[index].capture;
                capture.failed = true;
                batch.failed.push((capture.id.clone(), error));
                Ok(())
            }
            _ => Err(error),
        }
    }

    /// What the poll tells of a table once it is read.
    fn seen(&self, poll: &Poll, index: usize) -> Seen {
        let whole = self.tables[index].bookmark.whole.as_ref();
        let told = poll.activity.oldest.map_or(poll.activity.time, |oldest| oldest.min(poll.activity.time));
        // Before the first poll, nothing is known.
        let at_least = if poll.activity.is_all && !poll.activity.has_prepared { told } else { 0 };
        let since = |id: u64| whole.map_or(at_least, |whole| whole.since(id));
        let waits: Vec<(u64, Micros)> = poll.visibility.running.iter().map(|id| (*id, since(*id))).collect();
        let unlisted = poll.visibility.first_unlisted();
        let unlisted = if unlisted < poll.given { since(unlisted) } else { poll.activity.time };
        let floor = waits.iter().map(|(_, since)| *since).chain([unlisted]).fold(told, Micros::min);
        let highest = self.tables[index].highest;
        Seen {
            visibility: poll.visibility.clone(),
            time: poll.activity.time,
            floor,
            waits,
            given: poll.given,
            unlisted,
            highest,
        }
    }

    /// Reads on in the table at hand.
    async fn read(
        &mut self,
        config: &PostgresConfig,
        polls: Polls,
        poll: &mut Poll,
        room: &mut BatchLimit,
        batch: &mut SourceBatch,
    ) -> Result<()> {
        let index = poll.table;
        if !self.tables[index].capture.failed {
            if !poll.is_inside {
                let begun = self.session.client.batch_execute("savepoint part").await;
                begun.map_err(|cause| sql_error("go on with", "a poll", cause))?;
                poll.is_inside = true;
            }
            let polled = &self.tables[index];
            let read = match polled.bookmark.whole.is_some() {
                true => self.changed(polls, poll, room, batch).await,
                false => self.blocks(config, poll, room, batch).await,
            };
            match read {
                Ok(false) => return Ok(()),
                Ok(true) => {}
                Err(error) => {
                    self.allow(index, Err(error), batch)?;
                    poll.cursor = None;
                    begin::back(&self.session.client, "part").await?;
                }
            }
            let ended = self.session.client.batch_execute("release savepoint part").await;
            ended.map_err(|cause| sql_error("go on with", "a poll", cause))?;
            poll.is_inside = false;
        }
        poll.table += 1;
        Ok(())
    }

    /// Reads blocks of a table that is read whole; whether the table is done with.
    async fn blocks(
        &mut self,
        config: &PostgresConfig,
        poll: &mut Poll,
        room: &mut BatchLimit,
        batch: &mut SourceBatch,
    ) -> Result<bool> {
        let index = poll.table;
        if !self.tables[index].has_begun() {
            let mut bookmark = Bookmark::new(self.tables[index].capture.layout.oid);
            bookmark.begun = Some(self.seen(poll, index));
            let polled = &mut self.tables[index];
            polled.bookmark = bookmark;
            polled.capture.progress.state = SnapshotState::Running;
            polled.capture.progress.start = poll.before;
        }
        let client = &self.session.client;
        let polled = &mut self.tables[index];
        let place = snapshot::Place { read_to: end_of(poll.time), chunk: poll.part, time: poll.time, filter: None };
        let limit = BatchLimit { rows: room.rows.min(config.snapshot_chunk_rows.max(1)), ..*room };
        let chunk = snapshot::read_chunk(client, &polled.capture, &place, polled.bookmark.place, limit).await?;
        poll.part = next_part(poll.part)?;
        let rows = chunk.len() + chunk.rejected.len();
        (room.rows, room.bytes) = (room.rows.saturating_sub(rows), room.bytes.saturating_sub(chunk.bytes));
        polled.capture.progress.rows += chunk.len() as u64;
        polled.bookmark.place = Some(chunk.bookmark);
        polled.is_touched = true;
        if rows > 0 {
            poll.newest = poll.newest.max(poll.time);
        }
        batch.changes.extend(chunk.changes);
        batch.rejected.extend(chunk.rejected);
        if !chunk.ended {
            return Ok(false);
        }
        // Others were read under later snapshots: what the first one did not show is still to be looked for.
        let first = polled.bookmark.begun.take();
        let is_of_this_poll = first.as_ref().is_some_and(|first| first.time == poll.activity.time);
        (polled.bookmark.whole, polled.bookmark.place) = (first, None);
        if is_of_this_poll {
            self.note_highest(poll).await?;
        }
        Ok(is_of_this_poll)
    }

    /// Reads changed rows of a table; whether it is done with.
    ///
    /// What a poll that was not finished showed is read to its end first, then what came since: so each poll goes on where
    /// the last one was interrupted, and whoever is interrupted always comes to an end all the same.
    async fn changed(
        &mut self,
        polls: Polls,
        poll: &mut Poll,
        room: &mut BatchLimit,
        batch: &mut SourceBatch,
    ) -> Result<bool> {
        let seen = self.seen(poll, poll.table);
        let client = &self.session.client;
        let polled = &mut self.tables[poll.table];
        let is_whole = !polled.capture.progress.is_done();
        polled.bookmark.begun.get_or_insert_with(|| seen.clone());
        let begun = polled.bookmark.begun.as_ref().unwrap_or(&seen);
        let is_finishing = begun.time != seen.time;
        let Some(since) = &polled.bookmark.whole else {
            let object = format!("table {}", polled.capture.table.name);
            return Err(Error::new(ErrorKind::Corrupt, "poll", object, "nothing tells how far it was polled"));
        };
        let (mut cursor, is_again) = match poll.cursor.take() {
            Some(cursor) => cursor,
            None => {
                poll.offset = polled.column.offset(client, poll.activity.time).await?;
                look(client, polled, since, polls, poll.offset, is_finishing).await?
            }
        };
        let wanted = Wanted {
            column: &polled.column,
            since,
            up_to: is_finishing.then_some(&begun.visibility),
            after: None,
            from: None,
            is_snapshot: is_whole || is_again,
        };
        let (part, offset) = (poll.part, poll.offset);
        let place = changed::Place { time: poll.time, part, visibility: &poll.visibility, offset };
        let read = cursor.read(client, &polled.capture, &wanted, &place, &mut self.remembered, *room).await?;
        let rows = read.rows.as_ref().map_or(0, |rows| rows.len());
        if rows + read.rejected.len() > 0 {
            poll.part = next_part(poll.part)?;
        }
        polled.is_touched = true;
        room.rows = room.rows.saturating_sub(rows + read.rejected.len());
        room.bytes = room.bytes.saturating_sub(read.bytes);
        poll.newest = poll.newest.max(read.newest);
        polled.highest = polled.highest.max(read.highest);
        if is_whole {
            polled.capture.progress.rows += rows as u64;
        }
        batch.changes.extend(read.rows);
        batch.rejected.extend(read.rejected);
        polled.bookmark.passed = read.last.map(passed_at).or(polled.bookmark.passed);
        if !read.ended {
            poll.cursor = Some((cursor, is_again));
            return Ok(false);
        }
        cursor.close(client, &polled.capture).await?;
        polled.bookmark.passed = None;
        polled.bookmark.whole = polled.bookmark.begun.take().map(|begun| Seen { highest: polled.highest, ..begun });
        if is_whole && !is_finishing {
            self.note_highest(poll).await?;
        }
        Ok(!is_finishing)
    }

    /// Of a table that has been read whole.
    async fn note_highest(&mut self, poll: &Poll) -> Result<()> {
        let client = &self.session.client;
        let polled = &mut self.tables[poll.table];
        let now = poll.activity.time + polled.column.offset(client, poll.activity.time).await?;
        polled.highest = changed::highest(client, &polled.capture, &polled.column, now).await?;
        if let Some(whole) = &mut polled.bookmark.whole {
            whole.highest = polled.highest;
        }
        Ok(())
    }

    /// All tables are read: what the poll showed is in the log with this batch.
    async fn end(&mut self, poll: Poll, batch: &mut SourceBatch) -> Result<()> {
        let ended = self.session.client.batch_execute("commit").await;
        ended.map_err(|cause| sql_error("end", "a poll", cause))?;
        let end = positions::of_chunk_end(end_of(poll.time), poll.part)?;
        for index in 0..self.tables.len() {
            let polled = &mut self.tables[index];
            if polled.capture.failed {
                continue;
            }
            polled.is_touched = false;
            let progress = &mut polled.capture.progress;
            if !progress.is_done() {
                progress.state = SnapshotState::Done;
                (progress.end, progress.end_time) = (end, poll.time);
            }
            progress.resume = polled.bookmark.encode();
            batch.snapshots.push((polled.capture.id.clone(), progress.clone()));
        }
        self.remembered.settle(&poll.visibility);
        let boundary_time = self.watermark.boundary_time.max(poll.newest);
        self.watermark = Watermark { staged: end, boundary: end, boundary_time };
        batch.watermark = self.watermark;
        Ok(())
    }
}

/// Opens the cursor on a table's changes since a poll. Whether nothing tells how much of what it finds is in the log, too.
async fn look(
    client: &Client,
    polled: &Polled,
    since: &Seen,
    polls: Polls,
    offset: Micros,
    is_finishing: bool,
) -> Result<(Cursor, bool)> {
    let is_whole = !polled.capture.progress.is_done();
    let then = polled.column.offset(client, since.floor).await?;
    let from = looked_from(since, polls.overlap, offset.min(then)).filter(|_| !is_whole);
    let after = match polled.bookmark.passed {
        Some(passed) if changed::file_of(client, passed.relation).await? == passed.file => Some(passed),
        _ => None,
    };
    let wanted = Wanted { column: &polled.column, since, up_to: None, after, from, is_snapshot: is_whole };
    Ok((Cursor::open(client, &polled.capture, &wanted).await?, is_finishing && after.is_none()))
}

/// The file is looked up when it is stored.
fn passed_at((relation, place): (u32, [u8; 6])) -> Passed {
    let [a, b, c, d, line @ ..] = place;
    Passed { relation, file: 0, block: u32::from_be_bytes([a, b, c, d]), line: u16::from_be_bytes(line) }
}

fn next_part(part: u32) -> Result<u32> {
    part.checked_add(1).ok_or_else(|| Error::new(ErrorKind::Internal, "place", "a poll", "no poll has so many parts"))
}

/// From which timestamp on a table is looked at: by the clock, and by the highest timestamp that was there. Each alone
/// misses rows: the clock where the column is in another time zone than is thought, the other where one row is ahead of
/// its time. `None` where nothing is known.
fn looked_from(since: &Seen, overlap: Duration, offset: Micros) -> Option<Micros> {
    let overlap = i64::try_from(overlap.as_micros()).unwrap_or(i64::MAX);
    let by_highest = since.highest?.saturating_sub(since.time.saturating_sub(since.floor));
    Some(since.floor.saturating_add(offset).min(by_highest).saturating_sub(overlap))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_poll_looks_from_before_all_that_the_last_one_could_not_see() {
        let visibility = Visibility::read("7:7:").unwrap();
        let seen = |floor, highest| Seen {
            visibility: visibility.clone(),
            time: 1000,
            floor,
            waits: Vec::new(),
            given: 7,
            unlisted: 1000,
            highest,
        };
        let from = |floor, highest, offset| looked_from(&seen(floor, highest), Duration::from_micros(100), offset);
        assert_eq!(from(1000, Some(990), 0), Some(890));
        assert_eq!(from(600, Some(990), 0), Some(490), "a transaction was open since 600");
        assert_eq!(from(1000, Some(9_000), 0), Some(900), "a row is ahead of its time");
        assert_eq!(from(1000, Some(990), 7_200), Some(890), "the column is in another zone than the database");
        assert_eq!(from(1000, Some(8_190), 7_200), Some(8_090));
        assert_eq!(from(0, None, 0), None);
    }
}
