//! From messages to row images: what is sent of transactions, placed and gathered into batches.
//!
//! # How it works
//!
//! Transactions come whole, in the order of their commits. Each image stands at its commit and its index there; after
//! the commit the watermark moves to where its record ends, and there is a boundary. Where nothing is committed, the
//! server tells how far it has read.
//!
//! A boundary is held back while a snapshot, or a value read apart, shows commits that are still to come: see
//! `snapshot`.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use shori_core::change::{ChangeBatch, Op};
use shori_core::position::{CaptureId, Micros, Position, Watermark};
use shori_core::source::{CaptureInfo, Rejected, SnapshotProgress, SnapshotState};
use shori_core::{Error, ErrorKind, Result};

use crate::PostgresTable;
use crate::batch::BatchBuilder;
use crate::catalog::{Layout, Sent};
use crate::generated::{self, Inputs};
use crate::message::{Message, OldTuple, Relation, Tuple, Value, WalLocation};
use crate::positions;

/// A captured table.
pub(crate) struct Capture {
    pub id: CaptureId,
    pub table: PostgresTable,
    /// The database schema it is in.
    pub schema_name: Arc<str>,
    pub layout: Arc<Layout>,
    pub progress: SnapshotProgress,
    pub failed: bool,
}

impl Capture {
    /// Nothing of it has been read yet, and what comes before its first chunk is in that.
    fn is_untouched(&self) -> bool {
        self.progress.generation == 1 && self.progress.state == SnapshotState::Requested
    }

    fn is_named(&self, relation: &Relation<'_>) -> bool {
        relation.namespace == &*self.schema_name && relation.name == self.table.name
    }

    pub fn needs_snapshot(&self) -> bool {
        !self.failed && !self.progress.is_done()
    }
}

struct Transaction {
    commit_lsn: WalLocation,
    commit_time: Micros,
    xid: u32,
    images: u64,
}

/// Where reading stands.
pub(crate) struct Cursor {
    pub captures: Vec<Capture>,
    pub watermark: Watermark,
    /// Where the log has been read up to; between commits, what `watermark.staged` stands at or above.
    pub read_to: WalLocation,
    /// The furthest that any capture was staged at start.
    pub furthest: Position,
    /// The boundary does not move before the log has been read up to here.
    pub held_until: WalLocation,
    /// Time of what the held boundary will show.
    pub held_time: Micros,
    /// Transactions read of which it is not known yet that every new snapshot shows them.
    pub unsettled: Vec<u32>,
    transaction: Option<Transaction>,
    /// The capture of each relation named so far; `None` for one that is not captured.
    relations: HashMap<u32, Option<usize>>,
}

/// What a message asks of the caller.
pub(crate) enum Next {
    GoOn,
    /// A table is sent in another shape from here on: the caller follows it.
    Reshaped(Reshaped),
    /// A table is named, in the shape that is known: what is not sent of it may be another.
    Named {
        capture: usize,
    },
    /// The image of a row lacks columns that nothing else will bring: the caller reads them and comes again.
    Incomplete {
        capture: usize,
    },
    /// The table is no longer the one that was captured.
    Lost {
        capture: usize,
        cause: String,
    },
}

/// A table as it is sent from here on.
pub(crate) struct Reshaped {
    pub capture: usize,
    pub columns: Vec<(String, u32, i32)>,
    /// Its generated columns, if they are to be others than those that are known.
    pub generated: Option<Vec<Sent>>,
}

/// What has been read for the next batch.
#[derive(Default)]
pub(crate) struct Gathered {
    builders: Vec<Option<Building>>,
    pub finished: Vec<ChangeBatch>,
    /// What columns are to be computed of, with the place of the batch that lacks them, and its layout.
    pub inputs: Vec<(usize, Arc<Layout>, Inputs)>,
    pub schemas: Vec<CaptureInfo>,
    pub rejected: Vec<Rejected>,
    pub failed: Vec<(CaptureId, Error)>,
    pub snapshots: Vec<(CaptureId, SnapshotProgress)>,
    rejected_bytes: usize,
}

/// What is being built of a capture, in the shape that its table has meanwhile.
struct Building {
    batch: BatchBuilder,
    layout: Arc<Layout>,
}

impl Gathered {
    pub fn rows(&self) -> usize {
        let finished: usize = self.finished.iter().map(ChangeBatch::len).sum();
        let building: usize = self.builders.iter().flatten().map(|building| building.batch.len()).sum();
        finished + building + self.rejected.len()
    }

    pub fn bytes(&self) -> usize {
        self.rejected_bytes + self.builders.iter().flatten().map(|building| building.batch.bytes()).sum::<usize>()
    }

    pub fn is_empty(&self) -> bool {
        self.rows() == 0
    }

    /// Ends what was gathered of a capture: what follows has another shape.
    pub fn cut(&mut self, capture: usize) -> Result<()> {
        match self.builders.get_mut(capture).and_then(Option::take) {
            Some(building) => self.end(building),
            None => Ok(()),
        }
    }

    fn end(&mut self, building: Building) -> Result<()> {
        let Building { mut batch, layout } = building;
        let inputs = batch.take_inputs();
        if let Some(batch) = batch.finish()? {
            self.inputs.extend(inputs.map(|inputs| (self.finished.len(), layout, inputs)));
            self.finished.push(batch);
        }
        Ok(())
    }

    pub fn finish(mut self) -> Result<Self> {
        for building in std::mem::take(&mut self.builders).into_iter().flatten() {
            self.end(building)?;
        }
        Ok(self)
    }

    fn builder(&mut self, index: usize, capture: &Capture) -> Result<&mut BatchBuilder> {
        if self.builders.len() <= index {
            self.builders.resize_with(index + 1, || None);
        }
        let building = match &mut self.builders[index] {
            Some(building) => building,
            empty => {
                let batch = BatchBuilder::of_sent(capture.id.clone(), &capture.layout)?;
                empty.insert(Building { batch, layout: capture.layout.clone() })
            }
        };
        Ok(&mut building.batch)
    }

    fn reject(&mut self, capture: &Capture, position: Position, reason: String, raw: &[u8]) {
        self.rejected_bytes += raw.len();
        self.rejected.push(Rejected { capture: capture.id.clone(), position, reason, raw: raw.to_vec() });
    }
}

impl Cursor {
    pub fn new(captures: Vec<Capture>, watermark: Watermark, read_to: WalLocation, furthest: Position) -> Self {
        Self {
            furthest,
            captures,
            watermark,
            read_to,
            held_until: 0,
            held_time: 0,
            unsettled: Vec::new(),
            transaction: None,
            relations: HashMap::new(),
        }
    }

    pub fn is_between_commits(&self) -> bool {
        self.transaction.is_none()
    }

    pub fn is_held(&self) -> bool {
        self.read_to < self.held_until
    }

    /// The server has read up to `wal_end`, and has sent all that ends there or before.
    pub fn read_to(&mut self, wal_end: WalLocation) -> Result<()> {
        if self.transaction.is_some() || wal_end <= self.read_to {
            return Ok(());
        }
        self.read_to = wal_end;
        self.move_to(positions::of_boundary(wal_end)?, 0);
        Ok(())
    }

    /// Everything at or below `position` is read, and there is a boundary.
    pub fn move_to(&mut self, position: Position, time: Micros) {
        // Chunks that were read here before do not come again: captures that were apart come to one place.
        let passed = self.furthest.lsn == position.lsn && positions::is_between_commits(&self.furthest);
        let position = if passed { position.max(self.furthest) } else { position };
        self.watermark.staged = self.watermark.staged.max(position);
        self.held_time = self.held_time.max(time);
        if !self.is_held() {
            self.watermark.boundary = self.watermark.staged;
            self.watermark.boundary_time = self.watermark.boundary_time.max(self.held_time);
        }
    }

    /// Nothing above `held_until` may be visible before the log has been read up to there.
    pub fn hold_until(&mut self, held_until: WalLocation) {
        self.held_until = self.held_until.max(held_until);
    }

    /// Takes one message. `whole` stands for the columns that the image lacks, if they were read.
    pub fn take(
        &mut self,
        message: &Message<'_>,
        raw: &Bytes,
        whole: Option<&[Value<'_>]>,
        into: &mut Gathered,
    ) -> Result<Next> {
        match message {
            Message::Begin { final_lsn, commit_time, xid } => {
                let (commit_lsn, commit_time, xid) = (*final_lsn, *commit_time, *xid);
                self.transaction = Some(Transaction { commit_lsn, commit_time, xid, images: 0 });
            }
            Message::Commit { end_lsn, .. } => self.commit(*end_lsn)?,
            Message::Relation(relation) => return Ok(self.relation(relation)),
            Message::Insert { relation, new, .. } => {
                let row = RowImage { relation: *relation, op: Op::Insert, tuple: *new, old: OldRow::Unknown };
                return self.image(row, raw, None, into);
            }
            Message::Update { relation, old, new, .. } => return self.update(*relation, old, new, raw, whole, into),
            Message::Delete { relation, old, .. } => {
                let Some(tuple) = old.tuple() else { return Ok(Next::GoOn) };
                let row = RowImage { relation: *relation, op: Op::Delete, tuple, old: OldRow::Unknown };
                return self.image(row, raw, None, into);
            }
            Message::Truncate { relations, .. } => self.truncate(relations, into)?,
            Message::Origin { .. } | Message::Type { .. } | Message::Logical { .. } => {}
            Message::StreamStart { .. }
            | Message::StreamStop
            | Message::StreamCommit { .. }
            | Message::StreamAbort { .. } => {
                let cause = "a transaction comes in parts, which was not asked for";
                return Err(Error::new(ErrorKind::Internal, "read", "the replication stream", cause));
            }
        }
        Ok(Next::GoOn)
    }

    fn commit(&mut self, end_lsn: WalLocation) -> Result<()> {
        let Some(transaction) = self.transaction.take() else { return Err(out_of_place("a commit")) };
        self.unsettled.push(transaction.xid);
        // One that ends at or before where reading began was read before: its images were dropped.
        if end_lsn > self.read_to {
            self.read_to = end_lsn;
            let time = if transaction.images > 0 { transaction.commit_time } else { 0 };
            self.move_to(positions::of_boundary(end_lsn)?, time);
        }
        Ok(())
    }

    fn relation(&mut self, relation: &Relation<'_>) -> Next {
        // By name first: of two that have swapped their names, each is to be told.
        let named = self.captures.iter().position(|capture| capture.is_named(relation));
        let found = named.or_else(|| self.captures.iter().position(|capture| capture.layout.oid == relation.oid));
        self.relations.insert(relation.oid, found);
        let Some(index) = found else { return Next::GoOn };
        let capture = &self.captures[index];
        if !capture.is_named(relation) {
            let cause = format!("it is named {}.{} now", relation.namespace, relation.name);
            return Next::Lost { capture: index, cause };
        }
        if capture.layout.oid != relation.oid {
            return Next::Lost { capture: index, cause: "it was dropped and created again".into() };
        }
        let is_told = |name: &&str| relation.columns.iter().any(|column| column.name == *name && column.is_key);
        if let Some(name) = capture.layout.schema.key_names().iter().find(|name| !is_told(name)) {
            let cause = format!("its key column {name} is no part of its replica identity any more");
            return Next::Lost { capture: index, cause };
        }
        let sent = relation.columns.iter().map(|column| (column.name, column.type_oid, column.type_modifier));
        let known = capture.layout.sent().iter().map(|column| (column.name.as_str(), column.type_oid, column.modifier));
        if sent.clone().eq(known) {
            return Next::Named { capture: index };
        }
        let columns = sent.map(|(name, oid, modifier)| (name.to_string(), oid, modifier)).collect();
        Next::Reshaped(Reshaped { capture: index, columns, generated: None })
    }

    /// The place of the next image of the transaction; `None` where it was read before.
    fn place(&mut self) -> Result<Option<(Position, Micros)>> {
        let Some(transaction) = &mut self.transaction else { return Err(out_of_place("a row")) };
        let position = positions::of_image(transaction.commit_lsn, transaction.images)?;
        transaction.images += 1;
        Ok((position > self.watermark.staged).then_some((position, transaction.commit_time)))
    }

    /// The capture of a relation, if its images are wanted.
    fn wanted(&self, relation: u32) -> Result<Option<usize>> {
        let Some(index) = self.relations.get(&relation) else { return Err(out_of_place("a row of an unnamed table")) };
        Ok(index.filter(|index| !self.captures[*index].failed && !self.captures[*index].is_untouched()))
    }

    fn image(
        &mut self,
        row: RowImage<'_>,
        raw: &Bytes,
        whole: Option<&[Value<'_>]>,
        into: &mut Gathered,
    ) -> Result<Next> {
        let Some((position, time)) = self.place()? else { return Ok(Next::GoOn) };
        if let Some(index) = self.wanted(row.relation)? {
            let capture = &self.captures[index];
            let op = row.op;
            if let Err(reason) = into.builder(index, capture)?.push(row.values(whole), &position, op, time) {
                into.reject(capture, position, reason, raw);
            }
        }
        self.watermark.staged = position;
        Ok(Next::GoOn)
    }

    fn update(
        &mut self,
        relation: u32,
        old: &OldTuple<'_>,
        new: &Tuple<'_>,
        raw: &Bytes,
        whole: Option<&[Value<'_>]>,
        into: &mut Gathered,
    ) -> Result<Next> {
        let wanted = self.wanted(relation)?;
        let full = match old {
            OldTuple::Full(tuple) => Some(*tuple),
            _ => None,
        };
        let moved = match (wanted, old.tuple()) {
            (Some(index), Some(tuple)) => key_differs(&self.captures[index].layout, &tuple, new),
            _ => false,
        };
        // What is unchanged is looked for in the key's own images: a new key has none, and one that no snapshot has
        // reached may have none. A key that is kept out of line is in the old row.
        if let Some(index) = wanted
            && whole.is_none()
            && full.is_none()
            && lacks_values(&self.captures[index], new, moved)
        {
            return Ok(Next::Incomplete { capture: index });
        }
        match old.tuple().filter(|_| moved) {
            Some(tuple) => drop(self.image(
                RowImage { relation, op: Op::UpdateBefore, tuple, old: OldRow::Unknown },
                raw,
                None,
                into,
            )?),
            // The place is taken whether or not it is needed.
            None => drop(self.place()?),
        }
        let old = match (full, wanted, old.tuple()) {
            (Some(full), ..) => OldRow::Whole(full),
            (None, Some(index), Some(key)) => OldRow::Key(key, self.captures[index].layout.clone()),
            _ => OldRow::Unknown,
        };
        self.image(RowImage { relation, op: Op::UpdateAfter, tuple: *new, old }, raw, whole, into)
    }

    fn truncate(&mut self, relations: &[u32], into: &mut Gathered) -> Result<()> {
        for relation in relations {
            let Some((position, time)) = self.place()? else { continue };
            if let Some(index) = self.wanted(*relation)? {
                let capture = &self.captures[index];
                if let Err(reason) = into.builder(index, capture)?.push_nulls(&position, Op::Truncate, time) {
                    into.reject(capture, position, reason, &[]);
                }
            }
            self.watermark.staged = position;
        }
        Ok(())
    }
}

/// A row as it is sent, and what is sent of what it was before.
struct RowImage<'a> {
    relation: u32,
    op: Op,
    tuple: Tuple<'a>,
    old: OldRow<'a>,
}

enum OldRow<'a> {
    Unknown,
    /// Its other columns are null, whatever they were.
    Key(Tuple<'a>, Arc<Layout>),
    Whole(Tuple<'a>),
}

impl<'a> RowImage<'a> {
    /// Its values, with those that did not change from its old ones or from what was read apart.
    fn values(self, whole: Option<&'a [Value<'a>]>) -> impl Iterator<Item = Value<'a>> {
        let (mut old, layout) = match self.old {
            OldRow::Unknown => (None, None),
            OldRow::Key(tuple, layout) => (Some(tuple.iter()), Some(layout)),
            OldRow::Whole(tuple) => (Some(tuple.iter()), None),
        };
        self.tuple.iter().enumerate().map(move |(index, value)| {
            let before = old.as_mut().and_then(Iterator::next);
            let before = before.filter(|_| layout.as_ref().is_none_or(|layout| layout.schema.key.contains(&index)));
            match (value, before, whole) {
                (Value::Unchanged, Some(before), _) => before,
                (Value::Unchanged, None, Some(whole)) => whole.get(index).copied().unwrap_or(value),
                _ => value,
            }
        })
    }
}

/// Whether a column outside of the key was not sent that nothing else will bring, or that others are computed of.
fn lacks_values(capture: &Capture, new: &Tuple<'_>, moved: bool) -> bool {
    let layout = &capture.layout;
    let is_lost = moved || !capture.progress.is_done();
    new.iter().enumerate().any(|(index, value)| {
        value == Value::Unchanged
            && !layout.schema.key.contains(&index)
            && (is_lost || generated::is_input(layout, index))
    })
}

/// Whether an update gave the row another key. What was not sent did not change.
fn key_differs(layout: &Layout, old: &Tuple<'_>, new: &Tuple<'_>) -> bool {
    let pairs = old.iter().zip(new.iter()).enumerate();
    pairs
        .filter(|(index, _)| layout.schema.key.contains(index))
        .any(|(_, (old, new))| new != Value::Unchanged && old != new)
}

fn out_of_place(what: &str) -> Error {
    Error::new(ErrorKind::Data, "read", "the replication stream", format!("{what} is out of place"))
}
