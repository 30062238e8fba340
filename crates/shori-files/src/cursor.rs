//! Where reading stands: plain data, so that a call that is given up leaves it as it was.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use shori_core::position::{CaptureId, Micros, Position, Watermark};
use shori_core::schema::TableSchema;
use shori_core::source::{CaptureInfo, Resume, SnapshotProgress, SnapshotState, Started};
use shori_core::{Error, ErrorKind, Result};

use crate::ends::{self, Head};
use crate::names::{self, Chain, FileName};
use crate::tail::{Place, gap};
use crate::writer::Origin;
use crate::{FilesConfig, lines::Header};

#[derive(Clone)]
pub struct Cursor {
    pub watermark: Watermark,
    pub tables: Vec<Table>,
    /// The boundary that is being read up to.
    pub target: Option<Target>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    pub position: Position,
    pub time: Micros,
}

/// One capture as this source reads it.
#[derive(Clone)]
pub struct Table {
    pub id: CaptureId,
    pub folder: PathBuf,
    /// As it was told last.
    pub schema: Arc<TableSchema>,
    /// What the store holds of it.
    pub stored: Watermark,
    /// The newest snapshot that has been told.
    pub progress: SnapshotProgress,
    /// Snapshots that are known to end where reading has not come yet.
    pub ends: Vec<SnapshotProgress>,
    pub place: Option<Place>,
}

impl Table {
    /// Where reading goes on, of a cursor at `watermark`.
    pub fn from(&self, watermark: &Watermark) -> Position {
        self.stored.staged.max(watermark.staged)
    }

    /// Takes in what a file tells of snapshots; returns those that begin.
    pub fn meet(&mut self, header: &Header, watermark: &Watermark) -> Vec<SnapshotProgress> {
        let mut begun = Vec::new();
        for told in header.snapshots.iter().map(|snapshot| snapshot.progress()) {
            if is_over(&told, &self.stored.boundary.max(watermark.boundary)) {
                continue;
            }
            // Generations are counted anew by whoever reads: the log may begin with a later one than the first.
            let is_known = self.progress.state != SnapshotState::Requested && self.progress.start == told.start;
            let generation = match self.progress.state {
                _ if is_known => self.progress.generation,
                SnapshotState::Requested => self.progress.generation,
                SnapshotState::Running | SnapshotState::Done => self.progress.generation.saturating_add(1),
            };
            let told = SnapshotProgress { generation, ..told };
            if !is_known {
                self.progress = SnapshotProgress {
                    state: SnapshotState::Running,
                    start: told.start,
                    rows: told.rows,
                    ..SnapshotProgress::requested(generation)
                };
                begun.push(self.progress.clone());
            }
            if told.is_done() && !self.progress.is_done() && self.ends.iter().all(|end| end.start != told.start) {
                self.ends.push(told);
            }
        }
        begun
    }

    /// Takes out the snapshots that have ended at or below a boundary.
    pub fn ended(&mut self, boundary: &Position) -> Vec<SnapshotProgress> {
        let (ended, ahead) = std::mem::take(&mut self.ends).into_iter().partition(|snapshot| snapshot.end <= *boundary);
        self.ends = ahead;
        let ended: Vec<SnapshotProgress> = ended;
        if let Some(newest) = ended.last().filter(|newest| newest.generation == self.progress.generation) {
            self.progress = newest.clone();
        }
        ended
    }
}

fn is_over(snapshot: &SnapshotProgress, boundary: &Position) -> bool {
    snapshot.is_done() && snapshot.end <= *boundary
}

/// Where the store stands, and what can be read from there.
pub fn start(config: &FilesConfig, resume: &BTreeMap<CaptureId, Resume>) -> Result<(Started, Cursor)> {
    if !config.path.is_dir() {
        let object = format!("change logs {}", config.path.display());
        return Err(Error::new(ErrorKind::Unavailable, "read", object, "there is no such folder")
            .with_remedy("have them written by the pipeline that has the log: shori export"));
    }
    let mut origin: Option<Origin> = None;
    let (mut captures, mut failed, mut tables) = (Vec::new(), Vec::new(), Vec::new());
    for name in &config.tables {
        let id = CaptureId::new(&config.source_name, name);
        match start_table(config, &id, resume.get(&id), &mut origin) {
            Ok(table) => {
                captures.push(CaptureInfo { id, schema: table.schema.clone() });
                tables.push(table);
            }
            Err(error) if error.kind() == ErrorKind::Schema => failed.push((id, error)),
            // Whoever puts the files back can go on: no capture is marked.
            Err(error) => return Err(error),
        }
    }
    let lowest = tables.iter().map(|table| table.stored).min_by_key(|mark| mark.staged);
    let cursor = Cursor { watermark: lowest.unwrap_or(Watermark::ZERO), tables, target: None };
    let identity = origin.map(|origin| format!("the log of source {} in store {}", origin.source, origin.store));
    Ok((Started { identity: identity.unwrap_or_default(), captures, failed }, cursor))
}

fn start_table(
    config: &FilesConfig,
    id: &CaptureId,
    resume: Option<&Resume>,
    origin: &mut Option<Origin>,
) -> Result<Table> {
    let folder = names::table_folder(&config.path, &id.instance);
    let stored = resume.map_or(Watermark::ZERO, |known| known.watermark);
    let progress = resume.map_or_else(|| SnapshotProgress::requested(1), |known| known.snapshot.clone());
    let shown = &stored.staged;
    let chain = must_have_files(config, id).map_err(|error| match error.kind() {
        ErrorKind::Schema if *shown != Position::ZERO => files_are_gone(&folder, shown),
        _ => error,
    })?;
    let name = match (chain.following(shown), chain.beyond(shown), chain.last()) {
        (Some(name), ..) => name,
        (None, Some(beyond), _) => return Err(gap(&folder, shown, &beyond)),
        (None, None, Some(last)) => last,
        (None, None, None) => return Err(no_files(config, id)),
    };
    let head = ends::read_head(&folder, &name)?;
    let of = Origin { store: head.header.store.clone(), source: head.header.source.clone() };
    ends::must_be_of(&folder, &head.header, origin.get_or_insert(of))?;
    must_not_be_asked_anew(id, &progress, &stored, &name, &head)?;
    let schema = resume.and_then(|known| known.schema.clone()).unwrap_or_else(|| head.schema.clone());
    Ok(Table { id: id.clone(), folder, schema, stored, progress, ends: Vec::new(), place: None })
}

/// What is in the log already cannot be read into it again; only a snapshot that the files go on with can be asked for,
/// as after a change of a column's type.
fn must_not_be_asked_anew(
    id: &CaptureId,
    progress: &SnapshotProgress,
    stored: &Watermark,
    name: &FileName,
    head: &Head,
) -> Result<()> {
    // The first one is asked for by the log itself, and begins where the files have it.
    let is_first = progress.generation <= 1 || stored.staged == Position::ZERO;
    if progress.state != SnapshotState::Requested || is_first {
        return Ok(());
    }
    let goes_on = |told: SnapshotProgress| !is_over(&told, &stored.boundary) && told.start >= stored.boundary;
    if name.up_to > stored.staged && head.header.snapshots.iter().any(|told| goes_on(told.progress())) {
        return Ok(());
    }
    let cause = "its rows come from change log files, which are in the log up to here, and do not come a second time";
    Err(Error::new(ErrorKind::Schema, "resnapshot", format!("table {}", id.instance), cause)
        .with_remedy("start a new pipeline from the files, with stores of its own"))
}

fn files_are_gone(folder: &Path, shown: &Position) -> Error {
    let cause = format!("it has been read up to {shown}, and there are no files any more");
    Error::new(ErrorKind::Gap, "read", format!("change log {}", folder.display()), cause)
        .with_remedy("put the files back")
}

pub fn must_have_files(config: &FilesConfig, id: &CaptureId) -> Result<Chain> {
    let folder = names::table_folder(&config.path, &id.instance);
    Chain::read(&folder)?.filter(|chain| chain.first().is_some()).ok_or_else(|| no_files(config, id))
}

pub fn no_files(config: &FilesConfig, id: &CaptureId) -> Error {
    let cause = format!("there are no files of it in {}", config.path.display());
    Error::new(ErrorKind::Schema, "read", format!("the change log of table {}", id.instance), cause)
        .with_remedy("name a table that has been exported, or export it: shori export")
}

/// A boundary, with the table and the file that end at it.
type Candidate = (Position, usize, FileName);

/// Boundaries above where reading stands that every table's files reach, in order.
///
/// A boundary is one of the timeline, whichever table's file ends at it. Below a table's horizon there is none: its log
/// was compacted before it was written.
fn boundaries(cursor: &Cursor) -> Result<Vec<Candidate>> {
    let staged = cursor.watermark.staged;
    let (mut reach, mut horizon) = (None, Position::ZERO);
    let mut found: Vec<Candidate> = Vec::new();
    for (index, table) in cursor.tables.iter().enumerate() {
        let from = table.from(&cursor.watermark);
        let (chain, reached) = reached(table, &from)?;
        reach = Some(reach.map_or(reached, |reach: Position| reach.min(reached)));
        if let Some(next) = chain.following(&from) {
            horizon = horizon.max(match table.place.as_ref().filter(|place| place.name == next) {
                Some(place) => place.head.header.horizon.position(),
                None => ends::read_head(&table.folder, &next)?.header.horizon.position(),
            });
        }
        found.extend(chain.files().iter().filter(|file| file.is_whole).map(|file| (file.up_to, index, *file)));
    }
    let reach = reach.unwrap_or(staged);
    found.retain(|(position, ..)| *position > staged && *position >= horizon && *position <= reach);
    found.sort_unstable_by_key(|(position, ..)| *position);
    Ok(found)
}

/// A table's files, and how far they reach. Fails where one is missing.
fn reached(table: &Table, from: &Position) -> Result<(Chain, Position)> {
    let list = || -> Result<(Chain, Position, Option<FileName>)> {
        let chain = Chain::read(&table.folder)?.unwrap_or_default();
        let reach = chain.reach(from);
        let beyond = chain.beyond(&reach);
        Ok((chain, reach, beyond))
    };
    let (chain, reach, beyond) = list()?;
    if beyond.is_none() {
        return Ok((chain, reach));
    }
    // A list that is made while files come may have a later one alone; the next has both.
    match list()? {
        (_, reach, Some(beyond)) => Err(gap(&table.folder, &reach, &beyond)),
        (chain, reach, None) => Ok((chain, reach)),
    }
}

/// The next boundary to read up to; `None` at the end of what there is.
pub fn next_target(cursor: &Cursor) -> Result<Option<Target>> {
    boundaries(cursor)?.first().map(|candidate| target(cursor, candidate)).transpose()
}

/// The last boundary of what there is, if it is above where reading stands.
pub fn last_target(cursor: &Cursor) -> Result<Option<Target>> {
    boundaries(cursor)?.last().map(|candidate| target(cursor, candidate)).transpose()
}

fn target(cursor: &Cursor, (position, index, name): &Candidate) -> Result<Target> {
    let end = ends::read_end(&cursor.tables[*index].folder, name)?;
    Ok(Target { position: *position, time: end.boundary_time.unwrap_or_default() })
}
