//! When files are checkpointed, and how that holds nobody up.
//!
//! A checkpoint takes up to a second. While some transaction reads an older state, DuckDB 1.5 lets others append and delete
//! beside a checkpoint; with none, it makes everybody wait who would write. So one reads an older state, for that
//! purpose alone. Rows updated in place keep such a checkpoint from beginning: what is changed at each step is taken out
//! and put back instead.
//!
//! What a checkpoint beside others does not do is to sweep up deleted rows, and to give back the memory that they take: that is
//! for one that has the file for itself. Such a one is made every ten minutes, when memory calls for it, and when the file is
//! closed; never while row ids are in use.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use duckdb::Connection;
use shori_core::{ErrorKind, failpoint};

use crate::background;
use crate::database::{duckdb_error, locked, quote_name, traced};
use crate::known_targets::KnownTargets;
use crate::scattered::{Due, Scattered, vectors_of};

/// Memory above the limit that may be used while something is rolled back or checkpointed. What was done must be read to be
/// undone; where there is no room for it, DuckDB gives up the whole instance.
const RESERVE_MIB: u64 = 48;

/// How much of its limit DuckDB gets while tables are first loaded: reading them and laying their rows out takes memory of its
/// own, and less is asked of DuckDB than by many small commits.
const WHILE_LOADING: (u64, u64) = (5, 8);
/// It gets this much in any case, if the limit is no lower.
const LEAST_MIB: u64 = 96;

/// Size of a write-ahead log at which it is folded into its file: rarely enough not to hold up steady work, often enough
/// for a quick start after a crash. Crash tests write little: where they run, checkpoints come as often.
fn log_bytes() -> u64 {
    if failpoint::is_armed() { 256 << 10 } else { 64 << 20 }
}

/// So many times as large, those who write are waited for.
const LOG_OVERDUE: u64 = 16;

/// How often a checkpoint is tried while others write, and how often one that has to be made, before it is forced: forcing
/// keeps a core busy while it waits for those who write, and holds up all who would begin.
const ATTEMPTS: u32 = 20;
const ATTEMPTS_THAT_MUST: u32 = 200;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(10);

/// Time between two checkpoints that sweep up: what is held up by one is few of all changes.
const SWEEP_EVERY: Duration = Duration::from_secs(600);

/// A table with one row that is written so that the state before is an older one.
pub(crate) const MARK_TABLE: &str = "ctl_checkpoints";

/// What all handles to an instance, and the thread that checkpoints, share.
pub(crate) struct Checkpoints {
    root: Arc<Mutex<Connection>>,
    memory_limit_mib: u64,
    /// Tables are first loaded.
    loading: AtomicBool,
    /// How many may use the reserve just now.
    using_reserve: Mutex<usize>,
    scattered: Mutex<Scattered>,
    /// Where the write-ahead log of each catalog lies.
    logs: Mutex<BTreeMap<String, PathBuf>>,
    /// A commit has failed: memory is not what the files are.
    distrusted: AtomicBool,
    /// Held by the one who checkpoints: when each catalog was last swept up.
    running: Mutex<BTreeMap<String, Instant>>,
    known_targets: Arc<KnownTargets>,
    inline: bool,
}

impl Checkpoints {
    pub fn new(
        root: &Arc<Mutex<Connection>>,
        known_targets: &Arc<KnownTargets>,
        memory_limit_mib: u64,
        inline: bool,
    ) -> Self {
        Self {
            root: root.clone(),
            known_targets: known_targets.clone(),
            memory_limit_mib,
            loading: AtomicBool::new(false),
            using_reserve: Mutex::default(),
            scattered: Mutex::new(Scattered::new(memory_limit_mib)),
            logs: Mutex::default(),
            distrusted: AtomicBool::new(false),
            running: Mutex::default(),
            inline,
        }
    }

    pub fn attached(&self, catalog: &str, path: &Path) {
        let mut log = path.as_os_str().to_owned();
        log.push(".wal");
        locked(&self.logs).insert(catalog.to_string(), log.into());
    }

    /// Takes note that a committed transaction has deleted from at most so many vectors of a table.
    pub fn deleted(&self, catalog: &str, table: &str, vectors: u64) {
        locked(&self.scattered).add(catalog, table, vectors);
    }

    /// Whether `catalog` is to be checkpointed: deletions lie all over its tables, or its log has grown.
    pub fn due(&self, connection: &Connection, catalog: &str) -> Due {
        let log = locked(&self.logs).get(catalog).cloned();
        let bytes = log.and_then(|log| std::fs::metadata(log).ok()).map_or(0, |log| log.len());
        match locked(&self.scattered).due(catalog, |table| vectors_of(connection, catalog, table)) {
            Due::No if bytes > log_bytes() => Due::WhenFree,
            _ if bytes > LOG_OVERDUE * log_bytes() => Due::Overdue,
            due => due,
        }
    }

    /// After something has failed for want of memory: checkpoints what holds some, so that trying again may succeed. Only
    /// outside of a transaction.
    pub fn relieve(&self, connection: &Connection) {
        let catalogs = locked(&self.scattered).catalogs();
        for catalog in catalogs {
            self.run_once(connection, &catalog, true, true);
        }
    }

    /// After a commit that failed for want of disk space: DuckDB 1.5 may then hold rows for deleted that are not. The files are
    /// right, so nothing more of what memory holds is folded into them; the next start reads them.
    pub fn distrust_memory(&self) {
        self.distrusted.store(true, Ordering::Relaxed);
        if let Err(error) = locked(&self.root).execute_batch("pragma disable_checkpoint_on_shutdown") {
            tracing::warn!(%error, "a checkpoint when the files are closed cannot be prevented");
        }
    }

    /// Whether a disk was full, so that memory is not trusted any more.
    pub fn distrusts_memory(&self) -> bool {
        self.distrusted.load(Ordering::Relaxed)
    }

    /// Runs `work` unless somebody checkpoints, and keeps checkpoints off meanwhile.
    pub fn unless_running(&self, work: impl FnOnce()) {
        let _only = match self.running.try_lock() {
            Ok(only) => only,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        work();
    }

    /// With `must`, those who write are waited for; where calls share one thread, they would wait for this one. Only outside
    /// of a transaction.
    pub fn run(&self, connection: &Connection, catalog: &str, must: bool) {
        self.run_once(connection, catalog, must, false);
    }

    fn run_once(&self, connection: &Connection, catalog: &str, must: bool, sweep: bool) {
        if self.distrusts_memory() {
            return;
        }
        // Whoever comes while another is at it goes on: reads and appends do not queue up for one checkpoint.
        let mut swept = match self.running.try_lock() {
            Ok(only) => only,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let attempts = match must {
            _ if self.inline => 1,
            true => ATTEMPTS_THAT_MUST,
            false => ATTEMPTS,
        };
        let is_worn = locked(&self.scattered).is_worn(catalog, |table| vectors_of(connection, catalog, table));
        let since = swept.entry(catalog.to_string()).or_insert_with(Instant::now);
        // Whoever folds goes by row ids.
        let folding = self.known_targets.try_folding();
        let sweep = folding.is_some() && (sweep || is_worn || since.elapsed() > SWEEP_EVERY);
        for attempt in 1..=attempts {
            let forced = attempt == ATTEMPTS_THAT_MUST;
            match self.with_reserve(|| self.attempt(connection, catalog, forced, sweep)) {
                Ok(()) if sweep => {
                    *since = Instant::now();
                    return locked(&self.scattered).swept(catalog);
                }
                Ok(()) => return locked(&self.scattered).clear(catalog),
                Err(cause) => {
                    tracing::debug!(%cause, catalog, "a checkpoint waits");
                    if duckdb_error("checkpoint", catalog, cause).kind() == ErrorKind::DiskFull {
                        return self.distrust_memory();
                    }
                }
            }
            if attempt < attempts {
                thread::sleep(ATTEMPT_PAUSE);
            }
        }
    }

    fn attempt(&self, connection: &Connection, catalog: &str, forced: bool, sweep: bool) -> duckdb::Result<()> {
        let name = quote_name(catalog);
        let checkpoint = format!("{}checkpoint {name}", if forced { "force " } else { "" });
        let older = match self.inline || forced || sweep {
            true => None,
            false => self.older_reader(connection, &name)?,
        };
        let outcome = traced(&checkpoint, || connection.execute_batch(&checkpoint));
        if let Some(reader) = older
            && let Err(cause) = reader.execute_batch("rollback")
        {
            // DuckDB ends the process where a connection to a file that it has given up is let go of within a transaction.
            tracing::debug!(%cause, "a reader of an older state is left open");
            std::mem::forget(reader);
        }
        outcome
    }

    /// A transaction that reads the state before the newest one. None where the catalog is no store's.
    fn older_reader(&self, connection: &Connection, catalog: &str) -> duckdb::Result<Option<Connection>> {
        let reader = locked(&self.root).try_clone()?;
        let mark = format!("{catalog}.main.{MARK_TABLE}");
        let begin = format!("begin; select count(*) from {mark}");
        if let Err(cause) = reader.execute_batch(&begin) {
            tracing::debug!(%cause, catalog, "a checkpoint has the file for itself");
            return Ok(None);
        }
        let write =
            format!("begin; delete from {mark}; insert into {mark} values (make_timestamp(epoch_us(now()))); commit");
        if let Err(cause) = connection.execute_batch(&write) {
            connection.execute_batch("rollback")?;
            return Err(cause);
        }
        Ok(Some(reader))
    }

    /// Runs `work` with some memory above the limit.
    pub fn with_reserve<T>(&self, work: impl FnOnce() -> T) -> T {
        self.count_using_reserve(|count| count + 1, 1);
        let outcome = work();
        self.count_using_reserve(|count| count.saturating_sub(1), 0);
        outcome
    }

    pub fn is_loading(&self) -> bool {
        self.loading.load(Ordering::Relaxed)
    }

    /// Tells whether tables are first loaded.
    pub fn set_loading(&self, loading: bool) {
        if self.loading.swap(loading, Ordering::Relaxed) != loading {
            let count = locked(&self.using_reserve);
            self.set_limit(*count);
        }
    }

    /// Changes the count, and the memory limit if the count has then come to `edge`.
    fn count_using_reserve(&self, change: impl Fn(usize) -> usize, edge: usize) {
        let mut count = locked(&self.using_reserve);
        *count = change(*count);
        if *count == edge {
            self.set_limit(*count);
        }
    }

    /// Sets the memory limit to what is right while `using_reserve` use the reserve.
    fn set_limit(&self, using_reserve: usize) {
        let limit_mib = match self.is_loading() {
            true => {
                (self.memory_limit_mib * WHILE_LOADING.0 / WHILE_LOADING.1).max(LEAST_MIB.min(self.memory_limit_mib))
            }
            false => self.memory_limit_mib,
        };
        let limit_mib = if using_reserve > 0 { limit_mib + RESERVE_MIB } else { limit_mib };
        let root = locked(&self.root);
        if let Err(cause) = root.execute_batch(&format!("set memory_limit = '{limit_mib}MiB'")) {
            // Memory that is in use is not given back before its time: whoever uses the reserve next tries again.
            tracing::debug!(%cause, limit_mib, "the memory limit stays as it is");
        }
    }
}

/// A thread that checkpoints, so that nobody waits for it who has only found that it is due. Dropping it waits for the
/// checkpoint under way.
pub(crate) struct Checkpointer {
    wanted: Option<SyncSender<String>>,
    thread: Option<JoinHandle<()>>,
}

impl Checkpointer {
    /// Without a connection or thread of its own, nothing is begun: then who finds that a checkpoint is due makes it.
    pub fn start(checkpoints: &Arc<Checkpoints>) -> Option<Self> {
        let connection = locked(&checkpoints.root).try_clone();
        let connection = connection.inspect_err(|error| tracing::debug!(%error, "no connection to checkpoint with"));
        let (wanted, catalogs) = sync_channel(1);
        let (connection, checkpoints) = (connection.ok()?, checkpoints.clone());
        let work = move || checkpoint_all(&checkpoints, &connection, &catalogs);
        let thread = background::spawn("checkpoint", work);
        let thread = thread.inspect_err(|error| tracing::debug!(%error, "no thread to checkpoint with"));
        Some(Self { wanted: Some(wanted), thread: Some(thread.ok()?) })
    }

    /// Asks for a checkpoint; one that waits already will do.
    pub fn ask(&self, catalog: &str) {
        if let Some(wanted) = &self.wanted {
            // Where it is full, another one is asked for by the next who finds that it is due.
            let _ = wanted.try_send(catalog.to_string());
        }
    }
}

fn checkpoint_all(checkpoints: &Checkpoints, connection: &Connection, catalogs: &Receiver<String>) {
    while let Ok(catalog) = catalogs.recv() {
        if checkpoints.due(connection, &catalog) != Due::No {
            checkpoints.run(connection, &catalog, false);
        }
    }
}

impl Drop for Checkpointer {
    fn drop(&mut self) {
        drop(self.wanted.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::warn!("the thread that checkpoints has failed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loading_and_the_reserve_move_the_limit_and_it_comes_back() {
        let root = Arc::new(Mutex::new(Connection::open_in_memory().unwrap()));
        let limit = || {
            let setting = "select current_setting('memory_limit')";
            locked(&root).query_row(setting, [], |row| row.get::<_, String>(0)).unwrap()
        };
        let checkpoints = Checkpoints::new(&root, &Arc::default(), 256, true);
        for (loading, alone, with_reserve) in
            [(true, "160.0 MiB", "208.0 MiB"), (false, "256.0 MiB", "304.0 MiB"), (true, "160.0 MiB", "208.0 MiB")]
        {
            checkpoints.set_loading(loading);
            assert_eq!(limit(), alone);
            checkpoints.with_reserve(|| assert_eq!(limit(), with_reserve));
            assert_eq!(limit(), alone);
        }
        checkpoints.with_reserve(|| {
            checkpoints.set_loading(false);
            assert_eq!(limit(), "304.0 MiB");
        });
        assert_eq!(limit(), "256.0 MiB");
        // No less than DuckDB can do with.
        let small = Checkpoints::new(&root, &Arc::default(), 100, true);
        small.set_loading(true);
        assert_eq!(limit(), "96.0 MiB");
    }
}
