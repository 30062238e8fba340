//! Sources, and the tables that they capture.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::{ServerConfig, refusals};

const BUSY_TIMEOUT_MS: u64 = 5_000;
const KEEP_CHANGES_SECONDS: u64 = 600;
const POLL_SECONDS: u64 = 10;
const OVERLAP_SECONDS: u64 = 60;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceKind {
    Sqlite,
    Postgres,
    Files,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    pub name: String,
    pub kind: SourceKind,
    pub tables: BTreeMap<String, TableConfig>,
    /// Rows of one snapshot chunk.
    pub snapshot_chunk_rows: Option<usize>,
    /// Of `sqlite`: its file. Of `files`: the folder of the change logs.
    pub path: Option<PathBuf>,
    /// Of `sqlite`: how long a busy source is waited for before trying again.
    pub busy_timeout_ms: Option<u64>,
    /// Of `sqlite`: how long change rows stay in the source after they are in the log.
    pub keep_changes_seconds: Option<u64>,
    /// Of `postgres`: where it is.
    pub server: Option<ServerConfig>,
    /// Of `postgres`: the database schema of the tables.
    pub schema: Option<String>,
    /// Of `postgres`: what is read of it, by names of its own; both if not given are those of the pipeline and the source.
    pub publication: Option<String>,
    pub slot: Option<String>,
    /// Of `postgres`: whether publication and slot are made where they are missing.
    pub manage: Option<bool>,
    /// Of `postgres`: what its changes are found by.
    pub capture: Option<CaptureKind>,
    /// Of `postgres` captured by timestamp: from one poll to the next, and how far each looks back beyond the last.
    pub poll_seconds: Option<u64>,
    pub overlap_seconds: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CaptureKind {
    #[default]
    Logical,
    Timestamp,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableConfig {
    /// Types of columns whose declared type says less than there is to know.
    #[serde(default)]
    pub columns: BTreeMap<String, String>,
    /// Of tables captured by timestamp: the column that every insert and update sets.
    pub changed_at: Option<String>,
}

impl SourceConfig {
    /// Of `sqlite` and `files`.
    pub fn file(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new(""))
    }

    pub fn busy_timeout(&self) -> Duration {
        Duration::from_millis(self.busy_timeout_ms.unwrap_or(BUSY_TIMEOUT_MS))
    }

    pub fn keep_changes(&self) -> Duration {
        Duration::from_secs(self.keep_changes_seconds.unwrap_or(KEEP_CHANGES_SECONDS))
    }

    pub fn capture(&self) -> CaptureKind {
        self.capture.unwrap_or_default()
    }

    pub fn poll_interval(&self) -> Duration {
        Duration::from_secs(self.poll_seconds.unwrap_or(POLL_SECONDS))
    }

    pub fn overlap(&self) -> Duration {
        Duration::from_secs(self.overlap_seconds.unwrap_or(OVERLAP_SECONDS))
    }

    pub fn schema(&self) -> &str {
        self.schema.as_deref().unwrap_or(super::defaults::SCHEMA)
    }
}

impl TableConfig {
    /// Whether it gives a column what is no type: one of the [refusals](Loaded::refusals).
    pub fn is_mistyped(&self) -> bool {
        refusals::is_mistyped(self)
    }
}
