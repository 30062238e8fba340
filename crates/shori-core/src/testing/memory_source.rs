//! A source over a [`MemoryDatabase`]. Several may read one database, one after another or at once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::faults::Faults;
use super::memory_database::{
    FIRST_COMMIT_TIME, Image, MemoryDatabase, chunk_position, commit_end, commit_of, is_snapshot_position,
};
use super::value::{Row, Value, arrays_of};
use crate::change::{ChangeBatch, ChangeHeadBuilder, Op};
use crate::error::{Error, ErrorKind, Result};
use crate::position::{CaptureId, Micros, Position, Watermark};
use crate::schema::TableSchema;
use crate::source::{
    BatchLimit, CaptureInfo, Head, Resume, SnapshotProgress, SnapshotState, Source, SourceBatch, Started,
};

/// Liberties that a source may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SourceHabits {
    /// Most rows of a snapshot chunk; each chunk has a drawn number of them.
    pub chunk_rows: u64,
    /// Commits that may come again at a start, below the lowest watermark.
    pub redelivered: u64,
    /// Leaves unchanged columns out of some images, and all but the key out of some deletes.
    pub partial_images: bool,
    /// Ends some batches early.
    pub short_batches: bool,
}

impl SourceHabits {
    pub const PLAIN: SourceHabits =
        SourceHabits { chunk_rows: 2, redelivered: 0, partial_images: false, short_batches: false };
    pub const ROUGH: SourceHabits =
        SourceHabits { chunk_rows: 3, redelivered: 3, partial_images: true, short_batches: true };
}

pub struct MemorySource {
    database: MemoryDatabase,
    faults: Faults,
    habits: SourceHabits,
    captures: BTreeMap<CaptureId, Reading>,
    watermark: Watermark,
    /// The commit that the next chunk was read under.
    chunk_commit: Option<u64>,
    started: bool,
}

/// One capture as this source reads it.
struct Reading {
    schema: Arc<TableSchema>,
    /// What the store holds of it; chunks must stand above.
    staged: Position,
    snapshot: SnapshotProgress,
}

/// Images of a batch, by capture.
#[derive(Default)]
struct Collected {
    images: BTreeMap<CaptureId, Vec<Image>>,
    rows: usize,
}

impl MemorySource {
    pub fn new(database: &MemoryDatabase, faults: Faults, habits: SourceHabits) -> Self {
        Self {
            database: database.clone(),
            faults,
            habits,
            captures: BTreeMap::new(),
            watermark: Watermark::ZERO,
            chunk_commit: None,
            started: false,
        }
    }

    /// How far it has read.
    pub fn position(&self) -> Position {
        self.watermark.staged
    }

    fn gap(&self, table: &str) -> Error {
        Error::new(ErrorKind::Gap, "read", format!("table {table}"), "source retention has passed the watermark")
            .with_remedy(format!("run shori resnapshot {table}"))
    }

    fn broken(&self, table: &str) -> Error {
        Error::new(ErrorKind::Schema, "capture", format!("table {table}"), "a column has a type that is not carried")
            .with_remedy(format!("run shori resnapshot {table}"))
    }

    /// Whether the log still has what follows `position`.
    fn readable(&self, position: &Position) -> bool {
        let commit = commit_of(position);
        let whole = *position >= commit_end(commit);
        commit + u64::from(whole) > self.database.pruned()
    }

    fn set_position(&mut self, commit: u64) {
        let at = commit_end(commit);
        let boundary_time = if commit == 0 { 0 } else { self.database.commit_time(commit) };
        self.watermark = Watermark { staged: at, boundary: at, boundary_time };
    }

    /// Where reading goes on: the lowest of `marks`, or somewhat below where that may happen.
    fn resume_at(&mut self, marks: Vec<Watermark>) {
        let Some(lowest) = marks.into_iter().min_by_key(|mark| mark.staged) else {
            return self.set_position(self.database.head());
        };
        self.watermark = lowest;
        let back = self.faults.draw(self.habits.redelivered + 1);
        if back > 0 {
            let commit = commit_of(&lowest.staged).saturating_sub(back);
            if self.readable(&commit_end(commit)) {
                self.set_position(commit);
            }
        }
    }

    /// The capture whose chunk comes next.
    fn wants_chunk(&self) -> Option<CaptureId> {
        let waiting = |reading: &Reading| !reading.snapshot.is_done() && self.watermark.staged >= reading.staged;
        let mut waiting = self.captures.iter().filter(|(_, reading)| waiting(reading));
        waiting.next().map(|(id, _)| id.clone())
    }

    fn fail_captures(&mut self, batch: &mut SourceBatch) {
        let commit = commit_of(&self.watermark.staged);
        let gone = !self.readable(&self.watermark.staged);
        for (id, reading) in &self.captures {
            if self.database.is_broken(&reading.schema.table, commit) {
                batch.failed.push((id.clone(), self.broken(&reading.schema.table)));
            } else if gone {
                batch.failed.push((id.clone(), self.gap(&reading.schema.table)));
            }
        }
        for (id, _) in &batch.failed {
            self.captures.remove(id);
        }
    }

    /// Reads one chunk under the present boundary.
    fn read_chunk(&mut self, id: &CaptureId, limit: BatchLimit) -> Result<(ChangeBatch, SnapshotProgress)> {
        let staged = self.watermark.staged;
        let commit = commit_of(&staged);
        let chunk = match is_snapshot_position(&staged) {
            true => u32::from_be_bytes(staged.seq.as_slice()[1..5].try_into().unwrap()) + 1,
            false => 0,
        };
        let most = 1 + self.faults.draw(self.habits.chunk_rows.min(limit.rows as u64)) as usize;
        let time = self.database.commit_time(commit);
        let mut state = self.database.state_at(&commit_end(commit));
        let reading = self.captures.get_mut(id).unwrap();
        let progress = &mut reading.snapshot;
        if progress.state == SnapshotState::Requested {
            *progress = SnapshotProgress { state: SnapshotState::Running, start: staged, ..progress.clone() };
        }
        let rows = state.remove(&reading.schema.table).unwrap();
        let after = decode_key(&progress.resume);
        let mut left = rows.into_iter().filter(|(key, _)| after.as_ref().is_none_or(|after| key > after));
        let taken: Vec<(Row, Row)> = left.by_ref().take(most).collect();
        let end = chunk_position(commit, chunk, u32::MAX);
        if let Some((key, _)) = taken.last() {
            progress.resume = encode_key(key);
        }
        progress.rows += taken.len() as u64;
        if left.next().is_none() {
            progress.state = SnapshotState::Done;
            (progress.end, progress.end_time) = (end, time);
        }
        let image = |(index, (_, row)): (usize, (Row, Row))| Image {
            table: reading.schema.table.clone(),
            position: chunk_position(commit, chunk, index as u32),
            op: Op::Snapshot,
            commit_time: time,
            row,
            unchanged: Vec::new(),
        };
        let images: Vec<Image> = taken.into_iter().enumerate().map(image).collect();
        self.watermark = Watermark { staged: end, boundary: end, boundary_time: time };
        Ok((batch_of_images(id, &reading.schema, &images)?, progress.clone()))
    }

    /// Takes images of the stream until the batch is full, the log ends, or a chunk is due.
    fn read_stream(&mut self, limit: BatchLimit) -> Collected {
        let head = self.database.head();
        let end = match self.chunk_commit {
            Some(commit) => commit,
            None => head,
        };
        let mut most = limit.rows.max(1);
        if self.habits.short_batches && self.faults.draw(3) == 0 {
            most = 1 + self.faults.draw(most.min(6) as u64) as usize;
        }
        let mut collected = Collected::default();
        while collected.rows < most {
            let at = self.watermark.staged;
            let mut commit = commit_of(&at);
            let mut first = 0;
            if at >= commit_end(commit) {
                commit += 1;
            } else {
                first = u32::from_be_bytes(at.seq.as_slice()[1..5].try_into().unwrap()) + 1;
            }
            if commit > end || commit <= self.database.pruned() {
                break;
            }
            let images = self.database.images(commit, first);
            let count = images.len();
            let mut taken = 0;
            for image in images.into_iter().take(most - collected.rows) {
                taken += 1;
                self.watermark.staged = image.position;
                self.collect(&mut collected, image);
            }
            if taken == count {
                self.set_position(commit);
                self.pass_chunks(commit);
            }
        }
        collected
    }

    /// Chunks read under a commit before the start do not come again when its changes do: reading goes on after them.
    fn pass_chunks(&mut self, commit: u64) {
        let staged = self.captures.values().map(|reading| reading.staged);
        if let Some(passed) = staged.filter(|staged| commit_of(staged) == commit).max() {
            self.watermark.staged = self.watermark.staged.max(passed);
            self.watermark.boundary = self.watermark.staged;
        }
    }

    fn collect(&self, collected: &mut Collected, mut image: Image) {
        collected.rows += 1;
        let id = self.database.capture(&image.table);
        let Some(reading) = self.captures.get(&id) else { return };
        // Before the whole row has been read, an incomplete image could not be resolved.
        if !self.habits.partial_images || !reading.snapshot.is_done() || self.faults.draw(2) == 0 {
            image.unchanged.clear();
        } else if image.op == Op::Delete {
            image.unchanged = (0..image.row.len()).filter(|column| !reading.schema.key.contains(column)).collect();
        }
        collected.images.entry(id).or_default().push(image);
    }

    fn more_waits(&self) -> bool {
        let at_end = self.watermark.staged >= commit_end(self.database.head());
        !self.captures.is_empty() && (!at_end || self.wants_chunk().is_some())
    }
}

#[async_trait]
impl Source for MemorySource {
    fn timeline(&self) -> Arc<str> {
        self.database.source()
    }

    async fn start(&mut self, resume: &BTreeMap<CaptureId, Resume>) -> Result<Started> {
        self.started = false;
        self.faults.step("source.start").await?;
        self.captures.clear();
        self.chunk_commit = None;
        let mut started = Started { identity: self.database.identity(), captures: Vec::new(), failed: Vec::new() };
        let mut marks = Vec::new();
        for schema in self.database.tables().to_vec() {
            let id = self.database.capture(&schema.table);
            let known = resume.get(&id);
            let mark = known.map_or(Watermark::ZERO, |known| known.watermark);
            let snapshot = known.map_or_else(|| SnapshotProgress::requested(1), |known| known.snapshot.clone());
            let begins = snapshot.state == SnapshotState::Requested;
            if self.database.is_broken(&schema.table, self.database.head()) {
                started.failed.push((id, self.broken(&schema.table)));
                continue;
            }
            if !self.readable(&mark.staged) && !begins {
                started.failed.push((id, self.gap(&schema.table)));
                continue;
            }
            if self.readable(&mark.staged) && mark.staged != Position::ZERO || !begins {
                marks.push(mark);
            }
            started.captures.push(CaptureInfo { id: id.clone(), schema: schema.clone() });
            self.captures.insert(id, Reading { schema, staged: mark.staged, snapshot });
        }
        self.resume_at(marks);
        self.faults.step("source.started").await?;
        self.started = true;
        Ok(started)
    }

    async fn next(&mut self, limit: BatchLimit) -> Result<SourceBatch> {
        if !self.started {
            return Err(Error::new(ErrorKind::Internal, "read", "the memory source", "it was not started"));
        }
        self.faults.step("source.next").await?;
        let at = self.watermark.staged;
        if !self.readable(&at) && self.captures.values().any(|reading| reading.staged > at) {
            // What is gone is what it would have brought again.
            let cause = "its log was pruned while it read again what is staged";
            return Err(Error::new(ErrorKind::Unavailable, "read", "the memory source", cause));
        }
        let mut batch = SourceBatch::empty(self.watermark);
        self.fail_captures(&mut batch);
        let commit = commit_of(&self.watermark.staged);
        let between = self.watermark.staged == self.watermark.boundary;
        let chunk = self.wants_chunk();
        if chunk.is_none() {
            // Whoever wanted it may have failed meanwhile.
            self.chunk_commit = None;
        }
        if chunk.is_some() && self.chunk_commit.is_none_or(|due| due < commit) {
            self.chunk_commit = Some(self.database.head());
        }
        match chunk {
            Some(id) if between && self.chunk_commit == Some(commit) && batch.failed.is_empty() => {
                let (rows, progress) = self.read_chunk(&id, limit)?;
                self.chunk_commit = None;
                batch.changes.push(rows);
                batch.snapshots.push((id, progress));
            }
            _ if self.captures.is_empty() => {}
            _ => {
                for (id, images) in self.read_stream(limit).images {
                    batch.changes.push(batch_of_images(&id, &self.captures[&id].schema, &images)?);
                }
            }
        }
        batch.watermark = self.watermark;
        batch.more = self.more_waits();
        self.faults.step("source.read").await?;
        Ok(batch)
    }

    async fn wait(&mut self, at_most: Duration) -> Result<()> {
        self.faults.step("source.wait").await?;
        if self.captures.is_empty() {
            // Whatever comes, there is nobody to read it for.
            tokio::time::sleep(at_most).await;
            return Ok(());
        }
        let seen = commit_of(&self.watermark.staged);
        // Either outcome is a return in time.
        let _ = tokio::time::timeout(at_most, self.database.commit_after(seen)).await;
        Ok(())
    }

    async fn acknowledge(&mut self, durable: &Position) -> Result<()> {
        self.faults.step("source.acknowledge").await?;
        self.database.acknowledge(*durable);
        self.faults.step("source.acknowledged").await
    }

    async fn head(&mut self) -> Result<Head> {
        self.faults.step("source.head").await?;
        let head = self.database.head();
        let time = if head == 0 { 0 } else { self.database.commit_time(head) };
        Ok(Head { boundary: commit_end(head), time, changes_waiting: None })
    }
}

/// A change batch; columns marked unchanged are null in it.
pub fn batch_of_images(id: &CaptureId, schema: &Arc<TableSchema>, images: &[Image]) -> Result<ChangeBatch> {
    let mut head = ChangeHeadBuilder::default();
    let mut masks = Vec::with_capacity(images.len());
    let mut rows: Vec<Row> = Vec::with_capacity(images.len());
    for image in images {
        head.push(&image.position, image.op, image.commit_time);
        masks.push(mask_of(&image.unchanged, image.row.len()));
        let left_out = |column: usize| image.unchanged.contains(&column);
        let value = |(column, value): (usize, &Value)| if left_out(column) { Value::Null } else { value.clone() };
        rows.push(image.row.iter().enumerate().map(value).collect());
    }
    let mut batch = head.finish(id.clone(), schema.clone(), arrays_of(schema.columns.fields(), &rows))?;
    if masks.iter().any(Option::is_some) {
        batch.unchanged = Some(masks.into_iter().collect());
    }
    Ok(batch)
}

/// The bit mask of [`ChangeBatch::unchanged`].
pub fn mask_of(unchanged: &[usize], columns: usize) -> Option<Vec<u8>> {
    if unchanged.is_empty() {
        return None;
    }
    let mut mask = vec![0; columns.div_ceil(8)];
    for column in unchanged {
        mask[column / 8] |= 1 << (column % 8);
    }
    Some(mask)
}

/// The columns that a mask names.
pub fn columns_of_mask(mask: &[u8]) -> Vec<usize> {
    (0..mask.len() * 8).filter(|column| mask[column / 8] & (1 << (column % 8)) != 0).collect()
}

fn encode_key(key: &Row) -> Vec<u8> {
    let mut bytes = Vec::new();
    for value in key.iter() {
        let (tag, body) = match value {
            Value::Integer(number) => (0, number.to_be_bytes().to_vec()),
            Value::Text(text) => (1, text.as_bytes().to_vec()),
            other => panic!("{other:?} is no key of the model"),
        };
        bytes.extend([tag, body.len() as u8]);
        bytes.extend(body);
    }
    bytes
}

fn decode_key(mut bytes: &[u8]) -> Option<Row> {
    let mut values = Vec::new();
    while let [tag, length, rest @ ..] = bytes {
        let (body, next) = rest.split_at(usize::from(*length));
        values.push(match tag {
            0 => Value::Integer(i64::from_be_bytes(body.try_into().unwrap())),
            _ => Value::Text(std::str::from_utf8(body).unwrap().into()),
        });
        bytes = next;
    }
    (!values.is_empty()).then(|| values.into())
}

/// Commit times of a source whose clock is not to be trusted: mostly ahead, at times not at all, or back.
pub fn next_commit_time(last: Option<Micros>, draw: u64) -> Micros {
    let last = last.unwrap_or(FIRST_COMMIT_TIME);
    match draw % 8 {
        0 => last,
        1 => last - (draw / 8 % 3_000) as Micros,
        2 => last + 1,
        _ => last + 1 + (draw / 8 % 2_000_000) as Micros,
    }
}
