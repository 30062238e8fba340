//! One DuckDB instance for everything embedded: its files share one memory limit and one set of threads.
//!
//! The instance itself is in memory; files are attached by name. A transaction may write to one attached file only, so
//! store and transform use connections of their own.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use duckdb::{Config, Connection};
use shori_core::{Error, ErrorKind, Result};

use crate::freed_memory::{self, Watch};
use crate::known_targets::KnownTargets;
use crate::scattered::{Due, Scattered, vectors_of};
use crate::tail::JOIN_VALUES_MAX;

/// Size of a write-ahead log at which DuckDB folds it into the file: rarely enough not to hold up steady work, often
/// enough for a quick start after a crash.
const WAL_AUTOCHECKPOINT: &str = "64MiB";

/// Memory above the limit that may be used while something is rolled back or checkpointed. What was done must be read to be
/// undone; where there is no room for it, DuckDB gives up the whole instance.
const RESERVE_MIB: u64 = 64;

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

/// How often a checkpoint is tried that has to be made, before it is forced: forcing keeps a core busy while it waits for
/// those who write, and holds up all who would begin.
const ATTEMPTS: u32 = 200;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(10);

/// A handle to the instance; clones share it.
#[derive(Clone)]
pub struct Database {
    root: Arc<Mutex<Connection>>,
    memory_limit_mib: u64,
    /// How many may use the reserve just now.
    using_reserve: Arc<Mutex<usize>>,
    scattered: Arc<Mutex<Scattered>>,
    /// Held by the one who checkpoints.
    checkpointing: Arc<Mutex<()>>,
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
        Ok(Self {
            root: Arc::new(Mutex::new(root)),
            memory_limit_mib: settings.memory_limit_mib,
            using_reserve: Arc::default(),
            scattered: Arc::new(Mutex::new(Scattered::new(settings.memory_limit_mib))),
            checkpointing: Arc::default(),
            known_targets: Arc::default(),
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
            _ => Ok(()),
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
        self.with_reserve(|| connection.execute_batch("rollback"))
    }

    /// Takes note that a committed transaction has deleted from at most so many vectors of a table of `catalog`.
    pub(crate) fn deleted(&self, catalog: &str, table: &str, vectors: u64) {
        self.scattered().add(catalog, table, vectors);
    }

    /// Checkpoints `catalog` if deletions make that due; while others write, it has to wait for another time, but not for
    /// ever. Only outside of a transaction.
    pub(crate) fn checkpoint_if_due(&self, connection: &Connection, catalog: &str) {
        let due = self.scattered().due(catalog, |table| vectors_of(connection, catalog, table));
        if due != Due::No {
            self.checkpoint(connection, catalog, due == Due::Overdue);
        }
    }

    /// After something has failed for want of memory: checkpoints what holds some, so that trying again may succeed. Only
    /// outside of a transaction.
    pub(crate) fn relieve(&self, connection: &Connection) {
        let catalogs = self.scattered().catalogs();
        for catalog in catalogs {
            self.checkpoint(connection, &catalog, true);
        }
    }

    /// With `wait`, those who write are waited for; where calls share one thread, they would wait for this one.
    fn checkpoint(&self, connection: &Connection, catalog: &str, wait: bool) {
        // Whoever comes while another is at it goes on: reads and appends do not queue up for one checkpoint.
        let _only = match self.checkpointing.try_lock() {
            Ok(only) => only,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let attempts = if wait && !self.inline { ATTEMPTS } else { 1 };
        for attempt in 1..=attempts {
            let force = if attempt == ATTEMPTS { "force " } else { "" };
            let checkpoint = format!("{force}checkpoint {}", quote_name(catalog));
            match self.with_reserve(|| traced(&checkpoint, || connection.execute_batch(&checkpoint))) {
                Ok(()) => return self.scattered().clear(catalog),
                Err(cause) => tracing::debug!(%cause, catalog, "a checkpoint waits"),
            }
            if attempt < attempts {
                std::thread::sleep(ATTEMPT_PAUSE);
            }
        }
    }

    fn scattered(&self) -> MutexGuard<'_, Scattered> {
        locked(&self.scattered)
    }

    fn with_reserve<T>(&self, work: impl FnOnce() -> T) -> T {
        self.count_using_reserve(|count| count + 1, 1, self.memory_limit_mib + RESERVE_MIB);
        let outcome = work();
        self.count_using_reserve(|count| count.saturating_sub(1), 0, self.memory_limit_mib);
        outcome
    }

    /// Changes the count, and the memory limit if the count has then come to `edge`.
    fn count_using_reserve(&self, change: impl Fn(usize) -> usize, edge: usize, limit_mib: u64) {
        let mut count = locked(&self.using_reserve);
        *count = change(*count);
        if *count != edge {
            return;
        }
        let root = locked(&self.root);
        if let Err(cause) = root.execute_batch(&format!("set memory_limit = '{limit_mib}MiB'")) {
            // Memory that is in use is not given back before its time: whoever uses the reserve next tries again.
            tracing::debug!(%cause, limit_mib, "the memory limit stays as it is");
        }
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
        (ErrorKind::DiskFull, Some("free some space and start again: nothing is lost"))
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
