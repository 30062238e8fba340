//! Applies changes to state, one after the other, and keeps what they changed.
//!
//! A step is one transaction of the state file. Rows of touched keys are held in memory until they come to
//! [`HELD_MAX_BYTES`]; then they are written, and read again when they are touched again: a step has any size.
//!
//! Versions, where a history is kept: one per key and commit, the last image counts, so a delete and insert in one commit
//! are an update. A commit that finds no row and leaves none is no version. The boundary of a version is the time of
//! its commit, but at least one microsecond above the key's boundary before.
//!
//! What was written in the midst of a commit comes out as several parts of one version, and of one net change: whoever
//! reads them puts them together (see [`kept`](super::kept)). Where the commit found such keys is noted, so that it goes
//! on as if all had been held.

use std::collections::HashMap;
use std::sync::Arc;

use rusqlite::Connection;
use shori_core::Result;
use shori_core::change::{ChangeBatch, Op};
use shori_core::position::{CaptureId, Lsn, Micros, Position};
use shori_core::transform::Applied;

use super::cells::{Cell, Cells, write_cell};
use super::images::Images;
use super::key::Key;
use super::rows::Writer;
use super::tables::{CaptureNumber, Head, Table};

/// Tests have small tables: where they run, rows are written in the midst of a step.
const HELD_MAX_BYTES: usize = if cfg!(debug_assertions) { 8 << 10 } else { 32 << 20 };

/// Memory of an entry beside its rows: itself, and its place, in a table that is half full at worst.
const ENTRY_BYTES: usize = size_of::<(Key, Entry)>() + 2 * size_of::<(Key, u32)>();

/// What is kept of step n has ids from n times 2 to the power of this.
pub(super) const STEP_SHIFT: i64 = 32;

/// Rows that are gone through at a time, of all that a truncate or sweep deletes.
const PAGE_ROWS: usize = 4_096;

/// Where one capture goes in a step.
#[derive(Clone)]
pub(super) struct Leg {
    pub number: CaptureNumber,
    pub capture: CaptureId,
    pub table: Arc<Table>,
    pub from: Position,
    pub to: Applied,
    pub generation: u32,
    pub sweep: Option<Micros>,
}

/// A row, cut into its head and the columns' cells.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub head: Head,
    pub cells: Box<[u8]>,
}

impl Row {
    pub fn read(bytes: &[u8]) -> Result<Self> {
        let (head, cells) = Head::read(bytes)?;
        Ok(Self { head, cells: cells.0.into() })
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        out.clear();
        self.head.write(out);
        out.extend_from_slice(&self.cells);
    }
}

/// A commit that has touched a key, as far as it has come.
struct Pending {
    lsn: Lsn,
    /// The key had a row before it.
    existed: bool,
    /// The key's boundary before it.
    boundary: Option<Micros>,
    /// Part of it was written.
    goes_on: bool,
    /// Its last image; none since a part was written.
    last: Option<(Op, Micros, Box<[u8]>)>,
}

/// A touched key.
pub(super) struct Entry {
    pub capture: CaptureNumber,
    pub generation: u32,
    pub stored_generation: u32,
    pub before: Option<Row>,
    pub now: Option<Row>,
    pub changed: bool,
    /// The key's last boundary, of its row or of its deletion.
    pub boundary: Option<Micros>,
    /// The file has a tomb of the key.
    pub has_tomb: bool,
    pending: Option<Pending>,
}

/// What a step does to one table.
pub(super) struct TableStep {
    pub table: Arc<Table>,
    /// Rows before and after are kept.
    pub nets: bool,
    versions: i64,
    net_changes: i64,
    next_id: i64,
    /// Where a touched key is in `held`: entries are large, and a hash table has room for twice as many as it holds.
    places: HashMap<Key, u32>,
    held: Vec<(Key, Entry)>,
    held_bytes: usize,
    /// The commit in whose midst rows were written.
    written_in: Option<(CaptureNumber, Lsn)>,
    /// The row that an update has just taken from its old key, and its commit.
    moved: Option<(CaptureNumber, Lsn, Option<Row>)>,
}

impl TableStep {
    pub fn new(table: &Arc<Table>, nets: bool, step: i64) -> Self {
        Self {
            table: table.clone(),
            nets,
            versions: 0,
            net_changes: 0,
            next_id: step << STEP_SHIFT,
            places: HashMap::new(),
            held: Vec::new(),
            held_bytes: 0,
            written_in: None,
            moved: None,
        }
    }

    /// Applies the images of one capture, in their order.
    pub fn apply(&mut self, connection: &Connection, leg: &Leg, batch: &ChangeBatch) -> Result<()> {
        let table = self.table.clone();
        let images = Images::of(batch, &table)?;
        let mut writer = Writer::new(connection, &table)?;
        let mut cells = Vec::new();
        for row in 0..images.len() {
            let (lsn, op, time) = (images.lsn(row)?, images.op(row)?, images.time(row));
            if self.written_in.is_some_and(|commit| commit != (leg.number, lsn)) {
                self.written_in = None;
                writer.end_commit()?;
            }
            if op == Op::Truncate {
                self.delete_all(&mut writer, leg, None, (lsn, time))?;
                continue;
            }
            let is_partial = images.write(row, &mut cells)? && op.leaves_row();
            let key = self.key_of(&cells)?;
            let moved = self.moved.take();
            if is_partial {
                let stands = self.entry(&mut writer, leg, &key, lsn)?.now.as_ref();
                let before = match &moved {
                    Some((capture, commit, row))
                        if op == Op::UpdateAfter && (*capture, *commit) == (leg.number, lsn) =>
                    {
                        row.as_ref()
                    }
                    _ => stands,
                };
                images.write_over(row, before.map(|row| &*row.cells), &mut cells)?;
            }
            let taken = self.image(&mut writer, leg, key, (lsn, op, time), &cells)?;
            if op == Op::UpdateBefore {
                self.moved = Some((leg.number, lsn, taken));
            }
            if self.held_bytes > HELD_MAX_BYTES {
                self.write_held(&mut writer, Some((leg.number, lsn)))?;
            }
        }
        Ok(())
    }

    /// Ends the step for the captures of this table.
    pub fn finish<'a>(&mut self, connection: &Connection, legs: impl Iterator<Item = &'a Leg>) -> Result<()> {
        let table = self.table.clone();
        let mut writer = Writer::new(connection, &table)?;
        for leg in legs {
            if let Some(time) = leg.sweep {
                let at = (leg.to.position.lsn, time);
                self.delete_all(&mut writer, leg, Some(leg.generation), at)?;
            }
        }
        self.write_held(&mut writer, None)?;
        writer.end_commit()
    }

    fn key_of(&self, cells: &[u8]) -> Result<Key> {
        let mut list: Vec<Cell<'_>> = Vec::with_capacity(self.table.columns.len());
        Cells(cells).collect(self.table.columns.len(), &mut list)?;
        self.table.key_of(&list)
    }

    /// The touched key, read from the file when it is first met.
    fn entry(&mut self, writer: &mut Writer<'_>, leg: &Leg, key: &Key, lsn: Lsn) -> Result<&mut Entry> {
        if let Some(&place) = self.places.get(key) {
            return Ok(&mut self.held[place as usize].1);
        }
        let mut entry = writer.read(key)?;
        if self.table.has_history
            && self.written_in == Some((leg.number, lsn))
            && let Some((existed, boundary)) = writer.noted(key)?
        {
            entry.pending = Some(Pending { lsn, existed, boundary, goes_on: true, last: None });
        }
        self.held_bytes += ENTRY_BYTES + 2 * key.heap_bytes() + 2 * entry.now.as_ref().map_or(0, |row| row.cells.len());
        entry.capture = leg.number;
        let place = self.held.len();
        self.places.insert(key.clone(), place as u32);
        self.held.push((key.clone(), entry));
        Ok(&mut self.held[place].1)
    }

    /// Applies one whole image. Returns the row that stood before it.
    fn image(
        &mut self,
        writer: &mut Writer<'_>,
        leg: &Leg,
        key: Key,
        (lsn, op, time): (Lsn, Op, Micros),
        cells: &[u8],
    ) -> Result<Option<Row>> {
        let has_history = self.table.has_history;
        let mut version = None;
        let entry = self.entry(writer, leg, &key, lsn)?;
        entry.generation = entry.generation.max(leg.generation);
        if op == Op::Snapshot && entry.now.as_ref().is_some_and(|row| is_same(&row.cells, cells)) {
            return Ok(None);
        }
        entry.generation = leg.generation;
        entry.changed = true;
        if has_history {
            if entry.pending.as_ref().is_some_and(|pending| pending.lsn != lsn) {
                version = entry.close();
            }
            let (existed, boundary) = (entry.now.is_some(), entry.boundary);
            let pending = entry.pending.get_or_insert(Pending { lsn, existed, boundary, goes_on: false, last: None });
            pending.last = Some((op, time, cells.into()));
        }
        let next = op.leaves_row().then(|| Row { head: Head { lsn, time, boundary: None }, cells: cells.into() });
        let before = std::mem::replace(&mut entry.now, next);
        if let Some(version) = version {
            self.keep_version(writer, &key, &version)?;
        }
        self.held_bytes += 2 * cells.len();
        Ok(before)
    }

    /// Deletes all rows of a capture, or with `below` those of lower generations.
    fn delete_all(
        &mut self,
        writer: &mut Writer<'_>,
        leg: &Leg,
        below: Option<u32>,
        (lsn, time): (Lsn, Micros),
    ) -> Result<()> {
        let commit = Some((leg.number, lsn));
        self.write_held(writer, commit)?;
        self.moved = None;
        let mut after = None;
        let mut cells = Vec::new();
        loop {
            let page = writer.page(leg.number, below, after.as_ref(), PAGE_ROWS)?;
            let Some((last, _)) = page.last() else { return Ok(()) };
            after = Some(last.clone());
            for (key, row) in page {
                self.only_key(&row, &mut cells)?;
                self.image(writer, leg, key, (lsn, Op::Delete, time), &cells)?;
            }
            self.write_held(writer, commit)?;
        }
    }

    /// The image of a deletion that nobody sent: the key's columns, null for all others.
    fn only_key(&self, row: &Row, out: &mut Vec<u8>) -> Result<()> {
        out.clear();
        let mut cells = Cells(&row.cells);
        for column in 0..self.table.columns.len() {
            let cell = cells.next()?;
            write_cell(out, cell.filter(|_| self.table.key.contains(&column)));
        }
        Ok(())
    }

    /// How many changes are kept.
    pub fn kept(&self) -> i64 {
        self.versions.max(self.net_changes)
    }

    fn take_id(&mut self) -> i64 {
        self.next_id += 1;
        self.next_id - 1
    }

    fn keep_version(&mut self, writer: &mut Writer<'_>, key: &Key, version: &Version) -> Result<()> {
        self.versions += 1;
        writer.keep_version(self.take_id(), key, version)
    }

    /// Writes what is held, in the order of keys; what `commit` has touched, which may go on, is noted.
    fn write_held(&mut self, writer: &mut Writer<'_>, commit: Option<(CaptureNumber, Lsn)>) -> Result<()> {
        self.written_in = commit;
        self.places.clear();
        let mut held = std::mem::take(&mut self.held);
        held.sort_unstable_by(|(left, _), (right, _)| left.cmp(right));
        for (key, entry) in &mut held {
            if let Some((number, lsn)) = commit
                && entry.capture == number
                && let Some(pending) = entry.pending.as_ref().filter(|pending| pending.lsn == lsn)
            {
                writer.note(key, pending.existed, pending.boundary)?;
            }
            if let Some(version) = entry.close() {
                self.keep_version(writer, key, &version)?;
            }
            if entry.changed && self.nets && (entry.before.is_some() || entry.now.is_some()) {
                self.net_changes += 1;
                writer.keep_net(self.take_id(), key, entry)?;
            }
        }
        self.held_bytes = 0;
        writer.write(&held)?;
        held.clear();
        self.held = held;
        Ok(())
    }
}

/// Whether two rows hold the same. One may have been written before its table gained a column.
fn is_same(left: &[u8], right: &[u8]) -> bool {
    let (mut one, mut other) = (Cells(left), Cells(right));
    while left != right && !(one.0.is_empty() && other.0.is_empty()) {
        match (one.next(), other.next()) {
            (Ok(one), Ok(other)) if one == other => {}
            _ => return false,
        }
    }
    true
}

/// A version, or a part of one.
pub(super) struct Version {
    pub capture: CaptureNumber,
    pub op: Op,
    pub existed: bool,
    pub row: Row,
    pub boundary: Micros,
}

impl Entry {
    /// A key of which nothing is known yet.
    pub fn unknown() -> Self {
        Self {
            capture: 0,
            generation: 0,
            stored_generation: 0,
            before: None,
            now: None,
            changed: false,
            boundary: None,
            has_tomb: false,
            pending: None,
        }
    }

    /// Ends the commit that has touched the key: its version, if it is one.
    fn close(&mut self) -> Option<Version> {
        let pending = self.pending.take()?;
        let (op, time, cells) = pending.last?;
        let is_version = pending.existed || op.leaves_row();
        let boundary = time.max(pending.boundary.map_or(time, |before| before + 1));
        self.boundary = if is_version { Some(boundary) } else { pending.boundary };
        if !is_version && !pending.goes_on {
            return None;
        }
        let head = Head { lsn: pending.lsn, time, boundary: Some(boundary) };
        if let Some(row) = &mut self.now {
            row.head.boundary = Some(boundary);
        }
        let row = Row { head, cells };
        Some(Version { capture: self.capture, op, existed: pending.existed, row, boundary })
    }
}
