//! Change logs as files: the log of a pipeline written as JSON Lines, and read back as a source.
//!
//! # Constraints
//!
//! - A folder holds one timeline: the tables of one source, as one store's log has them, each in a folder of its own.
//!   Positions are those of the log, so that what is read back makes the same history.
//! - What is there is never changed. Files appear whole and in order, and what a folder ends at is where writing goes on:
//!   a writer that is killed at any instant neither loses nor doubles a change.
//! - Only boundaries become visible to a reader. One that a file ends at holds for all tables; a transaction that spans
//!   files, or that is in the files of some tables only, waits for the rest.
//! - Snapshots are part of the log. Rows cannot be asked for a second time: a capture that is to be read anew is read by
//!   a new pipeline.
//! - A file that is damaged or missing ends the reading with an error that names it. Put back, it is read on from there.
//!
//! # Layout
//!
//! `names`, `lines`, `values` and `calendar` are the format: names, lines, values, times. `writer` writes; `ends` and
//! `tail` read a file, `decode` makes batches, `cursor` and `stream` merge tables, `source` joins them under the contract
//! of [`shori_core::source::Source`].

mod calendar;
mod cursor;
mod decode;
mod ends;
mod lines;
mod look;
mod names;
mod source;
mod stream;
mod tail;
mod values;
mod writer;

use std::path::PathBuf;

pub use look::{Inspected, bytes_above, inspect, sample};
pub use source::FilesSource;
pub use writer::{FILE_CHANGES_MAX, LogFolder, Origin, Range, RangeWriter, TableLog};

/// What to read.
#[derive(Clone, Debug)]
pub struct FilesConfig {
    /// The folder that has a folder for each table.
    pub path: PathBuf,
    /// The timeline's name, and the source's in capture ids: need not be the one that the log was written of.
    pub source_name: String,
    pub tables: Vec<String>,
}
