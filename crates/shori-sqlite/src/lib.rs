//! SQLite files as a source of changes.
//!
//! # Constraints
//!
//! - SQLite keeps no log that outlives a checkpoint, so triggers write one: a row per row image in one change table
//!   (`install`, `triggers`). Other processes need nothing but SQLite 3.23 or newer, and see no difference but the cost.
//! - Triggers see statements, not transactions. Each change row therefore counts as a commit of its own, and its time is
//!   that of its statement, in whole milliseconds: SQLite's clock has no more. Rolled back changes never appear.
//! - A trigger records what the table holds after it, not what the statement asked for, so that other triggers on the
//!   table may change it too, in any order. Two things cannot be seen: a row that `OR REPLACE` evicts when another
//!   trigger, itself run *before* the same statement, has just put it into the same table; and a row that was written when
//!   another trigger, run *after* it, ends the statement but lets the row stand: by `raise(ignore)`, `raise(fail)`, or a
//!   constraint of its own that fails under `OR FAIL`.
//! - One process captures a file at a time: the change table has one reader.
//!
//! # Layout
//!
//! `positions` and `bookmark` hold the stored encodings. `declared`, `index_sql` and `table` read what a table is;
//! `triggers` and `install` make it captured. `stream` and `snapshot` read, `decode` and `text` turn values into Arrow,
//! `source` joins them under the contract of [`shori_core::source::Source`].

mod bookmark;
mod connection;
mod cursor;
mod declared;
mod decode;
mod index_sql;
mod install;
mod look;
mod positions;
mod prune;
mod snapshot;
mod source;
mod stream;
mod table;
mod text;
mod triggers;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

pub use connection::is_disk_full;
pub use install::{Installed, install, release};
pub use look::{Inspected, changes_above, inspect, log_end, sample};
pub use source::SqliteSource;

/// What to capture, and how.
#[derive(Clone, Debug)]
pub struct SqliteConfig {
    pub path: PathBuf,
    /// The timeline's name, and the source's in capture ids.
    pub source_name: String,
    pub tables: Vec<SqliteTable>,
    /// How long a call waits for another process's lock before it fails as `Unavailable`.
    pub busy_timeout: Duration,
    /// Most rows that one snapshot chunk holds.
    pub snapshot_chunk_rows: usize,
    /// Acknowledged change rows stay in the file at least this long, for a log restored from an older copy.
    pub keep_changes: Duration,
    /// Shortest time between two prunings.
    pub prune_interval: Duration,
    /// Run blocking calls on the caller's thread: for the simulation, where order must be the same in every run.
    pub inline: bool,
}

impl SqliteConfig {
    pub fn new(path: impl Into<PathBuf>, source_name: impl Into<String>, tables: Vec<SqliteTable>) -> Self {
        Self {
            path: path.into(),
            source_name: source_name.into(),
            tables,
            busy_timeout: Duration::from_secs(5),
            snapshot_chunk_rows: 10_000,
            keep_changes: Duration::from_secs(600),
            prune_interval: Duration::from_secs(5),
            inline: false,
        }
    }
}

/// A captured table.
#[derive(Clone, Debug, Default)]
pub struct SqliteTable {
    pub name: String,
    /// Type by column, as [`shori_core::schema::parse_type`] reads it, in place of what the declared type stands for.
    pub columns: BTreeMap<String, String>,
}

impl SqliteTable {
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), columns: BTreeMap::new() }
    }

    pub fn with_type(mut self, column: impl Into<String>, type_name: impl Into<String>) -> Self {
        self.columns.insert(column.into(), type_name.into());
        self
    }
}
