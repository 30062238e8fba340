//! Writing a folder of change logs.
//!
//! Files of a range of the log are written beside the others under names that no reader takes, synchronised, and only
//! then renamed, one after another in position order, each synchronised with its folder before the next: whatever
//! happens, what is there is a chain without a gap, and what it ends at is where the next range begins. Nothing else is
//! remembered.

use std::fs::{File, TryLockError};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use shori_core::change::ChangeBatch;
use shori_core::position::{CaptureId, Position, Watermark};
use shori_core::schema::TableSchema;
use shori_core::source::SnapshotProgress;
use shori_core::{Error, ErrorKind, Result, failpoint};

use crate::ends;
use crate::lines::{self, FORMAT, Header, PositionText, SnapshotText, VERSION};
use crate::names::{self, Chain, FileName, folder_error};

/// Most changes of one file.
pub const FILE_CHANGES_MAX: u64 = 100_000;
/// A file that has reached this size takes no more changes.
const FILE_BYTES_MAX: u64 = 64 << 20;
const LOCK: &str = ".lock";

/// Whose log it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Origin {
    /// The random id of the store that keeps the log.
    pub store: String,
    pub source: String,
}

/// A folder that this process alone writes to, until dropped.
pub struct LogFolder {
    root: PathBuf,
    origin: Origin,
    changes_max: u64,
    _lock: File,
}

impl LogFolder {
    /// Makes the folder if it is missing.
    pub fn open(root: &Path, origin: Origin) -> Result<Self> {
        let fail = |cause| folder_error("write to", root, cause);
        std::fs::create_dir_all(root).map_err(fail)?;
        let lock = File::create(root.join(LOCK)).map_err(fail)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { root: root.to_path_buf(), origin, changes_max: FILE_CHANGES_MAX, _lock: lock }),
            Err(TryLockError::WouldBlock) => {
                let object = format!("change log {}", root.display());
                Err(Error::new(ErrorKind::InUse, "write to", object, "another process writes to it")
                    .with_remedy("stop that process, or name another folder"))
            }
            Err(TryLockError::Error(cause)) => Err(fail(cause)),
        }
    }

    /// In place of [`FILE_CHANGES_MAX`].
    pub fn with_changes_per_file(self, changes_max: u64) -> Self {
        Self { changes_max, ..self }
    }

    /// Makes the table's folder if it is missing, and clears what a writer that was killed has left.
    pub fn table(&self, capture: &CaptureId) -> Result<TableLog> {
        let folder = names::table_folder(&self.root, &capture.instance);
        std::fs::create_dir_all(&folder).map_err(|cause| folder_error("create", &folder, cause))?;
        sync_folder(&self.root)?;
        clear(&folder)?;
        let chain = Chain::read(&folder)?.unwrap_or_default();
        let begin = chain.first().map_or(Position::ZERO, |file| file.after);
        let end = chain.reach(&begin);
        if let Some(beyond) = chain.beyond(&end) {
            let cause = format!("what stands before {beyond} is missing");
            return Err(Error::new(ErrorKind::Gap, "go on with", format!("change log {}", folder.display()), cause)
                .with_remedy("put the missing files back, or export to another folder"));
        }
        let mut idle = None;
        if let Some(last) = chain.last() {
            let (head, ending) = ends::read(&folder, &last)?;
            ends::must_be_of(&folder, &head.header, &self.origin)?;
            idle = (ending.changes == 0 && last.is_whole).then_some(last);
        }
        let (origin, capture, changes_max) = (self.origin.clone(), capture.clone(), self.changes_max);
        Ok(TableLog { folder, origin, capture, changes_max, end, is_new: chain.first().is_none(), idle })
    }
}

/// One table's files.
pub struct TableLog {
    folder: PathBuf,
    origin: Origin,
    capture: CaptureId,
    changes_max: u64,
    end: Position,
    is_new: bool,
    /// The last file, if it has no changes: what is written next takes its place.
    idle: Option<FileName>,
}

impl TableLog {
    /// What is above has not been written yet.
    pub fn end(&self) -> Position {
        self.end
    }

    /// Whether there is no file yet.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Begins to write a range that follows [`end`](TableLog::end). `snapshots` are those that the log knows.
    pub fn write(&self, horizon: Position, snapshots: &[SnapshotProgress]) -> RangeWriter<'_> {
        let begin = self.idle.map_or(self.end, |idle| idle.after);
        let known = snapshots.iter().filter(|snapshot| !is_over(snapshot, &begin));
        RangeWriter {
            table: self,
            horizon,
            snapshots: known.map(SnapshotText::of).collect(),
            has_news: snapshots.iter().any(|snapshot| snapshot.is_done() && snapshot.end > self.end),
            begin,
            last: self.end,
            open: None,
            files: Vec::new(),
            changes: 0,
        }
    }
}

fn is_over(snapshot: &SnapshotProgress, begin: &Position) -> bool {
    use shori_core::source::SnapshotState::{Done, Requested};
    snapshot.state == Requested || snapshot.state == Done && snapshot.end <= *begin
}

/// Writes one range of a table's log.
pub struct RangeWriter<'a> {
    table: &'a TableLog,
    horizon: Position,
    snapshots: Vec<SnapshotText>,
    has_news: bool,
    /// Where the next file begins.
    begin: Position,
    /// The last change written.
    last: Position,
    open: Option<OpenFile>,
    files: Vec<Unpublished>,
    changes: u64,
}

struct OpenFile {
    file: BufWriter<File>,
    path: Unfinished,
    schema: Arc<TableSchema>,
    changes: u64,
    bytes: u64,
}

struct Unpublished {
    path: Unfinished,
    name: FileName,
}

/// A file that is taken away again unless it is renamed: what cannot be finished, as on a full disk, is not to fill it.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Renamed, as a rule. What is left all the same, the next writer clears.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl<'a> RangeWriter<'a> {
    /// The next changes, in position order.
    pub fn push(&mut self, batch: &ChangeBatch) -> Result<()> {
        if self.open.as_ref().is_some_and(|open| open.schema != batch.schema) {
            self.close(self.last, None)?;
        }
        let mut line = Vec::new();
        for row in 0..batch.len() {
            let position = batch.position(row)?;
            if position <= self.last {
                let cause = format!("the change at {position} comes after the one at {}", self.last);
                let object = format!("a change log of {}", self.table.capture);
                return Err(Error::new(ErrorKind::Internal, "write", object, cause));
            }
            let is_full = |open: &OpenFile| open.changes >= self.table.changes_max || open.bytes >= FILE_BYTES_MAX;
            if self.open.as_ref().is_some_and(is_full) {
                self.close(self.last, None)?;
            }
            line.clear();
            lines::write_change(&mut line, batch, row)?;
            let mut open = match self.open.take() {
                Some(open) => open,
                None => self.begin_file(&batch.schema)?,
            };
            open.write(&line)?;
            open.changes += 1;
            self.open = Some(open);
            self.last = position;
            self.changes += 1;
        }
        Ok(())
    }

    /// The range is read to its end, a boundary. Nothing is visible yet.
    pub fn finish(mut self, boundary: &Watermark, schema: &Arc<TableSchema>) -> Result<Range<'a>> {
        if self.open.is_none() {
            self.open = Some(self.begin_file(schema)?);
        }
        self.close(boundary.boundary, Some(boundary.boundary_time))?;
        let has_news = self.has_news || self.changes > 0 || self.table.is_new;
        Ok(Range { table: self.table, files: std::mem::take(&mut self.files), changes: self.changes, has_news })
    }

    fn begin_file(&self, schema: &Arc<TableSchema>) -> Result<OpenFile> {
        let table = self.table;
        let name = FileName { after: self.begin, up_to: self.begin, is_whole: false };
        let path = table.folder.join(names::unfinished(&name));
        let file = File::create(&path).map_err(|cause| folder_error("write", &table.folder, cause))?;
        let header = Header {
            format: FORMAT.into(),
            version: VERSION,
            store: table.origin.store.clone(),
            source: table.origin.source.clone(),
            capture: table.capture.instance.to_string(),
            after: PositionText::of(&self.begin),
            horizon: PositionText::of(&self.horizon),
            snapshots: self.snapshots.clone(),
        };
        let mut line = Vec::new();
        lines::write_header(&mut line, &header, schema)?;
        let path = Unfinished(path);
        let mut open = OpenFile { file: BufWriter::new(file), path, schema: schema.clone(), changes: 0, bytes: 0 };
        open.write(&line)?;
        Ok(open)
    }

    /// Ends the open file at a position, which is a boundary if it has a time.
    fn close(&mut self, up_to: Position, boundary_time: Option<i64>) -> Result<()> {
        let Some(mut open) = self.open.take() else { return Ok(()) };
        let mut line = Vec::new();
        lines::write_end(&mut line, &up_to, boundary_time, open.changes)?;
        open.write(&line)?;
        let fail = |cause| folder_error("write", &self.table.folder, cause);
        let file = open.file.into_inner().map_err(|cause| fail(cause.into_error()))?;
        file.sync_all().map_err(fail)?;
        let name = FileName { after: self.begin, up_to, is_whole: boundary_time.is_some() };
        self.files.push(Unpublished { path: open.path, name });
        self.begin = up_to;
        Ok(())
    }
}

impl OpenFile {
    fn write(&mut self, line: &[u8]) -> Result<()> {
        self.bytes += line.len() as u64;
        let folder = self.path.0.parent().unwrap_or(&self.path.0);
        self.file.write_all(line).map_err(|cause| folder_error("write", folder, cause))
    }
}

/// A range that is written, and that no reader sees yet.
pub struct Range<'a> {
    table: &'a TableLog,
    files: Vec<Unpublished>,
    changes: u64,
    has_news: bool,
}

impl Range<'_> {
    /// Whether it tells more than how far the log has come.
    pub fn has_news(&self) -> bool {
        self.has_news
    }

    /// Takes the files away again.
    pub fn discard(self) -> Result<()> {
        self.files.iter().try_for_each(|file| remove(&file.path.0))
    }

    /// Makes the files visible; returns the number of changes.
    pub fn publish(self) -> Result<u64> {
        let folder = &self.table.folder;
        failpoint::reached(failpoint::EXPORT_BEFORE_PUBLISH);
        for file in &self.files {
            let path = folder.join(file.name.to_string());
            std::fs::rename(&file.path.0, &path).map_err(|cause| folder_error("write", &path, cause))?;
            sync_folder(folder)?;
            failpoint::reached(failpoint::EXPORT_AFTER_FILE);
        }
        let replaced = self.table.idle.filter(|idle| self.files.iter().all(|file| file.name != *idle));
        if let Some(idle) = replaced {
            // It reaches less far than what has taken its place: readers no longer look at it.
            remove(&folder.join(idle.to_string()))?;
        }
        Ok(self.changes)
    }
}

fn clear(folder: &Path) -> Result<()> {
    let fail = |cause| folder_error("list", folder, cause);
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        if entry.file_name().to_str().is_some_and(names::is_unfinished) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    std::fs::remove_file(path).map_err(|cause| folder_error("remove", path, cause))
}

/// What was renamed in a folder is durable after this.
fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(|cause| folder_error("write to", folder, cause))
}
