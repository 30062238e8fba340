//! One DuckDB instance for everything embedded: its files share one memory limit and one set of threads.
//!
//! The instance itself is in memory; files are attached by name. A transaction may write to one attached file only, so
//! store and transform use connections of their own.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use duckdb::{Config, Connection};
use shori_core::{Error, ErrorKind, Result};

use crate::checkpoint::{Checkpointer, Checkpoints};
use crate::freed_memory::{self, Watch};
use crate::known_targets::KnownTargets;
use crate::scattered::Due;

/// Join values that are compared with the lowest and highest of each part of a table: comparing more costs more than
/// reading.
const JOIN_VALUES_MAX: i64 = 1_024;

/// Write-ahead logs are folded into their files by [`checkpoint`](crate::checkpoint), not by whose commit it happens to be.
const WAL_AUTOCHECKPOINT: &str = "1TiB";

/// Bounds of the instance.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Memory for data, in MiB. The process takes some more for Arrow batches and code.
    pub memory_limit_mib: u64,
    pub threads: usize,
    /// Where what does not fit into memory goes.
    pub spill_directory: PathBuf,
    /// Run calls on the caller's thread: for the simulation, where order must be the same in every run.
    pub inline: bool,
}

/// A handle to the instance; clones share it.
#[derive(Clone)]
pub struct Database {
    root: Arc<Mutex<Connection>>,
    checkpoints: Arc<Checkpoints>,
    checkpointer: Option<Arc<Checkpointer>>,
    known_targets: Arc<KnownTargets>,
    inline: bool,
    /// What a new connection is told about time.
    set_time: &'static str,
    _freed_memory: Option<Arc<Watch>>,
}

impl Database {
    pub fn open(settings: &Settings) -> Result<Self> {
        let fail = |cause| duckdb_error("open", "the embedded DuckDB", cause);
        let config = Config::default()
            .with("autoinstall_known_extensions", "false")
            .and_then(|config| config.with("autoload_known_extensions", "false"))
            .and_then(|config| config.with("wal_autocheckpoint", WAL_AUTOCHECKPOINT))
            .and_then(|config| config.with("dynamic_or_filter_threshold", JOIN_VALUES_MAX.to_string()))
            .and_then(|config| config.with("memory_limit", format!("{}MiB", settings.memory_limit_mib)))
            .and_then(|config| config.with("threads", settings.threads.to_string()))
            .and_then(|config| config.with("temp_directory", settings.spill_directory.display().to_string()))
            .map_err(fail)?;
        let root = Connection::open_in_memory_with_flags(config).map_err(fail)?;
        root.execute_batch(freed_memory::LARGE_ALLOCATION).map_err(fail)?;
        let set_time = set_time(&root).map_err(fail)?;
        let watch = match settings.inline {
            true => None,
            false => Watch::start(root.try_clone().map_err(fail)?, settings.memory_limit_mib),
        };
        let root = Arc::new(Mutex::new(root));
        let known_targets = Arc::default();
        let checkpoints = Checkpoints::new(&root, &known_targets, settings.memory_limit_mib, settings.inline);
        let checkpoints = Arc::new(checkpoints);
        let checkpointer = if settings.inline { None } else { Checkpointer::start(&checkpoints) };
        Ok(Self {
            root,
            checkpoints,
            checkpointer: checkpointer.map(Arc::new),
            known_targets,
            inline: settings.inline,
            set_time,
            _freed_memory: watch.map(Arc::new),
        })
    }

    /// Attaches the file as catalog `name`, creating it if missing. Attaching it again under its name does nothing.
    pub fn attach(&self, path: &Path, name: &str) -> Result<()> {
        let root = locked(&self.root);
        let object = || format!("DuckDB file {}", path.display());
        let attach = || {
            let mut attached = root.prepare("select path from duckdb_databases() where database_name = ?")?;
            let attached: Vec<Option<String>> =
                attached.query_map([name], |row| row.get(0))?.collect::<Result<_, _>>()?;
            if let Some(other) = attached.into_iter().next() {
                return Ok(other);
            }
            let path = quote_text(&path.display().to_string());
            // The type is said, lest a file of another kind is taken for one that an extension reads.
            root.execute_batch(&format!("attach {path} as {} (type duckdb)", quote_name(name)))?;
            Ok(None)
        };
        match attach().map_err(|cause| duckdb_error("open", object(), cause))? {
            Some(other) if other != path.display().to_string() => {
                let cause = format!("the name {name} is that of {other}");
                Err(Error::new(ErrorKind::Internal, "open", object(), cause))
            }
            _ => {
                self.checkpoints.attached(name, path);
                Ok(())
            }
        }
    }

    /// Whether calls run on the caller's thread.
    pub fn is_inline(&self) -> bool {
        self.inline
    }

    pub fn detach(&self, name: &str) -> Result<()> {
        let root = locked(&self.root);
        root.execute_batch(&format!("detach {}", quote_name(name))).map_err(|cause| duckdb_error("close", name, cause))
    }

    /// A connection whose unqualified names are those of catalog `name`. Times read as UTC, whatever the machine's zone.
    pub fn connect(&self, name: &str) -> Result<Connection> {
        let root = locked(&self.root);
        let connect = || {
            let connection = root.try_clone()?;
            connection.execute_batch(&format!("use {}; {}", quote_name(name), self.set_time))?;
            Ok(connection)
        };
        connect().map_err(|cause| duckdb_error("connect to", format!("DuckDB catalog {name}"), cause))
    }

    /// What is known of targets in the stores of this instance.
    pub(crate) fn known_targets(&self) -> &KnownTargets {
        &self.known_targets
    }

    /// Ends the connection's transaction, undoing it, with some memory in reserve.
    pub(crate) fn roll_back(&self, connection: &Connection) -> duckdb::Result<()> {
        self.checkpoints.with_reserve(|| connection.execute_batch("rollback"))
    }

    /// Takes note that a committed transaction has deleted from at most so many vectors of a table of `catalog`.
    pub(crate) fn deleted(&self, catalog: &str, table: &str, vectors: u64) {
        self.checkpoints.deleted(catalog, table, vectors);
    }

    pub(crate) fn is_loading(&self) -> bool {
        self.checkpoints.is_loading()
    }

    /// Tells whether tables are first loaded, or a projection is built anew: memory is then needed beside DuckDB.
    pub(crate) fn set_loading(&self, loading: bool) {
        self.checkpoints.set_loading(loading);
    }

    /// Runs `work` unless a checkpoint is under way.
    pub(crate) fn unless_checkpointing(&self, work: impl FnOnce()) {
        self.checkpoints.unless_running(work);
    }

    /// Has `catalog` checkpointed if that is due; one that is overdue is made at once. Only outside of a transaction.
    pub(crate) fn checkpoint_if_due(&self, connection: &Connection, catalog: &str) {
        match (self.checkpoints.due(connection, catalog), &self.checkpointer) {
            (Due::No, _) => {}
            (Due::WhenFree, Some(checkpointer)) => checkpointer.ask(catalog),
            (due, _) => self.checkpoints.run(connection, catalog, due == Due::Overdue),
        }
    }

    /// Takes note of an error of a transaction that wrote. After a disk was full, DuckDB may take its own file for damaged: what
    /// is wrong is the disk.
    pub(crate) fn failed(&self, error: Error) -> Error {
        match error.kind() {
            ErrorKind::DiskFull => self.checkpoints.distrust_memory(),
            ErrorKind::Corrupt if self.checkpoints.distrusts_memory() => {
                return Error::new(ErrorKind::DiskFull, "write", "a DuckDB file", error).with_remedy(FREE_SPACE);
            }
            _ => {}
        }
        error
    }

    /// After something has failed for want of memory: makes room, so that trying again may succeed. Only outside of a
    /// transaction.
    pub(crate) fn relieve(&self, connection: &Connection) {
        self.checkpoints.relieve(connection);
    }

    /// Runs blocking work off the async threads.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        if self.inline {
            return work();
        }
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result,
            Err(cause) => Err(Error::new(ErrorKind::Internal, "finish", "a DuckDB call", cause)),
        }
    }
}

/// What makes a connection read times as UTC: nothing where DuckDB was built without time zones.
pub fn set_time(connection: &Connection) -> duckdb::Result<&'static str> {
    let query = "select count(*) > 0 from duckdb_settings() where name = 'TimeZone'";
    let has_zones = connection.query_row(query, [], |row| row.get(0))?;
    Ok(if has_zones { "set TimeZone = 'UTC';" } else { "" })
}

/// The lock, also after a panic of who held it.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a statement, and tells how long it took to those who trace `shori_duckdb::sql`.
pub(crate) fn traced<T>(sql: &str, run: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let outcome = run();
    tracing::trace!(target: "shori_duckdb::sql", elapsed_us = started.elapsed().as_micros() as u64, sql);
    outcome
}

/// `"name"`, safe in a statement.
pub fn quote_name(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// `'text'`, safe in a statement.
pub fn quote_text(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// A message of DuckDB without its line breaks and the caret under an excerpt.
pub(crate) fn one_line(message: &str) -> String {
    let lines = message.lines().map(str::trim).filter(|line| !line.is_empty() && *line != "^");
    lines.collect::<Vec<_>>().join(" ")
}

const FREE_SPACE: &str = "free some space and start again: nothing is lost";
const START_AGAIN: &str = "start again: the file is recovered from its write-ahead log";
const RAISE_MEMORY: &str = "raise memory.limit_mib in the configuration";

/// Whether the error tells that memory has run out.
pub(crate) fn is_out_of_memory(error: &Error) -> bool {
    error.remedy() == Some(RAISE_MEMORY)
}

/// Tells apart what the engine must: DuckDB gives kinds only as text.
pub fn duckdb_error(operation: &str, object: impl Into<String>, cause: duckdb::Error) -> Error {
    let text = cause.to_string();
    let has = |parts: &[&str]| parts.iter().any(|part| text.contains(part));
    let (kind, remedy) = if has(&["No space left", "Disk quota", "max_temp_directory_size"]) {
        (ErrorKind::DiskFull, Some(FREE_SPACE))
    } else if has(&["TransactionContext Error", "write-write conflict", "Conflict on tuple", "Conflict on update"])
        && !has(&["invalidated", "is aborted"])
    {
        (ErrorKind::Unavailable, None)
    } else if has(&["Could not set lock", "Conflicting lock"]) {
        (ErrorKind::InUse, Some("stop the other process, or use the commands that reach it through its socket"))
    } else if has(&["in-memory column"]) {
        // What memory held is no longer trusted; the file is as it was at the last commit.
        (ErrorKind::Corrupt, Some(START_AGAIN))
    } else if has(&[
        "not a valid DuckDB database",
        "corrupt",
        "Corrupt",
        "Serialization Error",
        "checksum",
        "could not read all bytes",
        "Could not read enough bytes",
    ]) {
        (ErrorKind::Corrupt, Some("restore the file from a copy, or move it away to start afresh"))
    } else if has(&["database has been invalidated"]) {
        (ErrorKind::Corrupt, Some(START_AGAIN))
    } else if has(&["Out of Memory"]) {
        (ErrorKind::Refused, Some(RAISE_MEMORY))
    } else {
        (ErrorKind::Refused, None)
    };
    let error = match cause {
        // Beside the message there is only a code, which is the same for every failure.
        duckdb::Error::DuckDBFailure(_, Some(message)) => Error::new(kind, operation, object, one_line(&message)),
        other => Error::new(kind, operation, object, other),
    };
    match remedy {
        Some(remedy) => error.with_remedy(remedy),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_that_trusts_its_memory_no_more_is_started_again() {
        // As DuckDB says it after memory ran out in the middle of an append.
        let text = "TransactionContext Error: Failed to commit: Checkpoint failed for database \"st\". The database has been \
            invalidated. Original error: Corrupted in-memory column - column with index 0 has misaligned count";
        let cause = duckdb::Error::DuckDBFailure(duckdb::ffi::Error::new(duckdb::ffi::DuckDBError), Some(text.into()));
        let error = duckdb_error("write", "the log", cause);
        assert_eq!((error.kind(), error.remedy()), (ErrorKind::Corrupt, Some(START_AGAIN)), "{error}");
    }
}
