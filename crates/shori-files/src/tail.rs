//! One table's files, read line by line from a place on.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use shori_core::position::Position;
use shori_core::{Error, ErrorKind, Result};

use crate::ends::{self, Head, damaged};
use crate::lines::{ChangeLine, Line, read_line};
use crate::names::{FileName, folder_error};

/// Longest line: Arrow's offsets end at 2 GiB, and so does a batch.
const LINE_BYTES_MAX: u64 = 1 << 30;
const BUFFER_BYTES: usize = 1 << 18;

/// A place in a file, before a line.
#[derive(Clone, Debug)]
pub struct Place {
    pub name: FileName,
    pub head: Arc<Head>,
    offset: u64,
    /// Lines before it.
    lines: u64,
    /// Changes before it.
    changes: u64,
}

impl Place {
    /// Before the first change.
    pub fn begin(folder: &Path, name: &FileName) -> Result<Self> {
        let head = ends::read_head(folder, name)?;
        if head.header.after.position() != name.after {
            return Err(damaged(folder, name, 1, "it begins elsewhere than its name says".into()));
        }
        let offset = head.bytes;
        Ok(Self { name: *name, head: Arc::new(head), offset, lines: 1, changes: 0 })
    }
}

/// A file, open at a place.
pub struct Tail {
    folder: PathBuf,
    place: Place,
    file: BufReader<File>,
    line: Vec<u8>,
    /// The position of the change in `line`.
    next: Option<Position>,
}

impl Tail {
    /// Stands before the first change above `above`.
    pub fn open(folder: &Path, place: Place, above: &Position) -> Result<Self> {
        let path = folder.join(place.name.to_string());
        let mut file = BufReader::with_capacity(BUFFER_BYTES, ends::open(folder, &place.name)?);
        file.seek(SeekFrom::Start(place.offset)).map_err(|cause| folder_error("read", &path, cause))?;
        let mut tail = Self { folder: folder.to_path_buf(), place, file, line: Vec::new(), next: None };
        tail.read()?;
        while tail.next.is_some_and(|next| next <= *above) {
            tail.pass()?;
        }
        Ok(tail)
    }

    pub fn name(&self) -> &FileName {
        &self.place.name
    }

    /// Of the next change; `None` at the file's end.
    pub fn next(&self) -> Option<Position> {
        self.next
    }

    /// Before the next change.
    pub fn place(&self) -> Place {
        self.place.clone()
    }

    /// Hands the next change, with its size in bytes, to `take`, and goes on behind it.
    pub fn take(&mut self, take: impl FnOnce(&ChangeLine<'_>) -> std::result::Result<(), String>) -> Result<usize> {
        let taken = match read_line(&self.line) {
            Ok(Line::Change(change)) => take(&change),
            Ok(Line::End(_)) => Err("there are no more changes".into()),
            Err(cause) => Err(cause),
        };
        taken.map_err(|cause| self.damaged(cause))?;
        let bytes = self.line.len();
        self.pass()?;
        Ok(bytes)
    }

    fn pass(&mut self) -> Result<()> {
        let before = self.next;
        self.place.offset += self.line.len() as u64;
        self.place.lines += 1;
        self.place.changes += 1;
        self.read()?;
        match self.next {
            Some(next) if before.is_some_and(|before| next <= before) => {
                Err(self.damaged(format!("the change at {next} is out of order")))
            }
            _ => Ok(()),
        }
    }

    /// Reads the line at the place, which stays there.
    fn read(&mut self) -> Result<()> {
        self.line.clear();
        let mut limited = (&mut self.file).take(LINE_BYTES_MAX);
        limited.read_until(b'\n', &mut self.line).map_err(|cause| {
            let path = self.folder.join(self.place.name.to_string());
            folder_error("read", &path, cause)
        })?;
        if self.line.last() != Some(&b'\n') {
            let cause = if self.line.is_empty() { "its end is missing: it is cut off" } else { "the line is cut off" };
            return Err(self.damaged(cause.into()));
        }
        self.next = match read_line(&self.line) {
            Ok(Line::Change(change)) => {
                let name = self.place.name;
                if change.position <= name.after || change.position > name.up_to {
                    let cause =
                        format!("the change at {} is not between those that the file's name has", change.position);
                    return Err(self.damaged(cause));
                }
                Some(change.position)
            }
            Ok(Line::End(end)) => {
                let name = self.place.name;
                if end.up_to != name.up_to || end.boundary_time.is_some() != name.is_whole {
                    return Err(self.damaged("the file ends elsewhere than its name says".into()));
                }
                if end.changes != self.place.changes {
                    let cause = format!("the file has {} changes, and had {}", self.place.changes, end.changes);
                    return Err(self.damaged(cause));
                }
                None
            }
            Err(cause) => return Err(self.damaged(cause)),
        };
        Ok(())
    }

    fn damaged(&self, cause: String) -> Error {
        damaged(&self.folder, &self.place.name, self.place.lines + 1, cause)
    }
}

/// A chain that lacks what follows a place.
pub fn gap(folder: &Path, at: &Position, beyond: &FileName) -> Error {
    let cause = format!("the changes above {at} are missing, up to file {beyond}");
    Error::new(ErrorKind::Gap, "read", format!("change log {}", folder.display()), cause).with_remedy(
        "put the missing files back, or have the log exported to another folder and start a new pipeline from it",
    )
}
