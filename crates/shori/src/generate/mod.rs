//! Writes to the sample source as an application would: orders, payments and customers, for the demo, tests and
//! benchmarks.
//!
//! Bounded: memory does not grow with the tables. Every change is one statement on one row; a transaction holds 1 to
//! 100,000 of them, mostly few. All choices come from the seed, so equal seeds on equal databases issue equal
//! statements; only time values come from the clock. It continues on a database that it or another wrote before.
//!
//! [`mix`] says what happens and how often, [`application`] does it, [`pace`] says when, [`ledger`] counts.

mod application;
mod clock;
mod ledger;
mod mix;
mod pace;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rusqlite::{Connection, OpenFlags};
use serde::Serialize;
use shori_core::{Error, ErrorKind, Result};

pub use clock::Clock;
pub use ledger::{OperationCounts, TableCounts};

use application::Application;
use ledger::{Ledger, TABLES};
use pace::{Pace, Sizes};

/// A lock is waited for in steps of this length, so that a stop is noticed.
const LOCK_WAIT_STEP: Duration = Duration::from_millis(250);
/// A lock held for longer is an error.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(60);
const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// Rows of a transaction of the first customers.
const FIRST_CUSTOMERS_ROWS: u64 = 1_000;
/// Of a given number of changes, at most one in so many goes to the first customers.
const FIRST_CUSTOMERS_SHARE: u64 = 4;

/// What to generate, and how fast.
#[derive(Clone, Debug)]
pub struct GenerateConfig {
    /// The SQLite file; it must have the sample tables.
    pub path: PathBuf,
    /// Row changes in all, or until stopped. A row inserted, updated or deleted counts one, a key update too.
    pub changes: Option<u64>,
    /// Row changes per second, spread evenly, or as fast as possible.
    pub rate: Option<f64>,
    pub seed: u64,
    /// Missing customers are inserted first, at any rate; they count as changes. Of a small number of changes, at most
    /// a quarter goes to them.
    pub customers: u32,
    /// Most rows that one transaction holds.
    pub transaction_max_rows: u32,
    pub clock: Clock,
}

impl GenerateConfig {
    /// Until stopped, as fast as possible, 10,000 customers, transactions up to 100,000 rows, seed 1.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            changes: None,
            rate: None,
            seed: 1,
            customers: 10_000,
            transaction_max_rows: 100_000,
            clock: Clock::Wall,
        }
    }
}

/// How far a run has come. Reported about every 100 ms, and at the end.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Progress {
    pub changes: u64,
    pub transactions: u64,
    pub elapsed: Duration,
}

/// What a run has committed.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Generated {
    pub changes: u64,
    pub transactions: u64,
    pub seconds: f64,
    /// Seconds by which the given rate was missed, because the database was too slow.
    pub late_seconds: f64,
    #[serde(flatten)]
    pub tables: TableCounts,
}

impl fmt::Display for Generated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = self.changes as f64 / self.seconds.max(1e-6);
        write!(f, "{} changes in {} transactions", self.changes, self.transactions)?;
        writeln!(f, " in {:.1} s ({rate:.0} changes/s)", self.seconds)?;
        write!(f, "{}", self.tables)
    }
}

/// Generates until `config.changes` are committed, or `stop` is set: the transaction in hand is then committed, never cut.
/// Waits for locks of other writers up to a minute.
pub fn run(config: &GenerateConfig, stop: &AtomicBool, mut progress: impl FnMut(&Progress)) -> Result<Generated> {
    if let Some(rate) = config.rate
        && !(rate.is_finite() && rate > 0.0)
    {
        return Err(Error::new(ErrorKind::Usage, "generate at", format!("rate {rate}"), "it must be above 0"));
    }
    let connection = open(&config.path)?;
    let mut generator = Generator::new(&connection, config)?;
    let begin = Instant::now();
    let mut reported = begin;
    let mut pace = None;
    while !stop.load(Ordering::Relaxed) && generator.left() > 0 {
        let transaction = generator.transaction(stop)?;
        let now = generator.progress(begin);
        if reported.elapsed() >= PROGRESS_EVERY {
            reported = Instant::now();
            progress(&now);
        }
        if let Transaction::Usual { rows } = transaction {
            pace.get_or_insert_with(|| Pace::new(config.rate)).wait_after(rows, stop);
        }
    }
    let last = generator.progress(begin);
    progress(&last);
    Ok(Generated {
        changes: last.changes,
        transactions: last.transactions,
        seconds: last.elapsed.as_secs_f64(),
        late_seconds: pace.map_or(0.0, |pace| pace.given_up().as_secs_f64()),
        tables: generator.ledger.counts(),
    })
}

/// Fails when the file or one of the sample tables is missing.
fn open(path: &Path) -> Result<Connection> {
    let object = || format!("SQLite file {}", path.display());
    let sample = "run shori init --sample to create it";
    if !path.exists() {
        return Err(Error::new(ErrorKind::Usage, "open", object(), "there is no such file").with_remedy(sample));
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection =
        Connection::open_with_flags(path, flags).map_err(|cause| database_error("open", &object(), cause))?;
    let prepare = || {
        connection.busy_timeout(LOCK_WAIT_MAX)?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        connection.pragma_update(None, "synchronous", "normal")?;
        connection.pragma_update(None, "cache_size", -65_536)?;
        connection.execute_batch(ledger::CREATE)?;
        connection.busy_timeout(LOCK_WAIT_STEP)
    };
    prepare().map_err(|cause| database_error("open", &object(), cause))?;
    for (_, table) in TABLES {
        let exists = connection
            .table_exists(None, table)
            .map_err(|cause| database_error("read the schema of", &object(), cause))?;
        if !exists {
            let object = format!("table {table} of {}", object());
            return Err(Error::new(ErrorKind::Usage, "find", object, "there is no such table").with_remedy(sample));
        }
    }
    Ok(connection)
}

enum Transaction {
    /// Part of the first customers: not held to the rate.
    FirstCustomers,
    Usual {
        rows: u64,
    },
    /// Stopped before it began.
    None,
}

struct Generator<'c> {
    connection: &'c Connection,
    application: Application<'c>,
    ledger: Ledger<'c>,
    sizes: Sizes,
    first_customers: i64,
    changes_max: u64,
    changes: u64,
    transactions: u64,
    data_version: Option<i64>,
}

impl<'c> Generator<'c> {
    fn new(connection: &'c Connection, config: &GenerateConfig) -> Result<Self> {
        let rng = ChaCha8Rng::seed_from_u64(config.seed);
        let share = config.changes.map_or(u64::MAX, |changes| (changes / FIRST_CUSTOMERS_SHARE).max(1));
        Ok(Self {
            connection,
            application: Application::new(connection, rng, config.clock)?,
            ledger: Ledger::new(connection)?,
            sizes: Sizes::new(config.rate, config.transaction_max_rows),
            first_customers: u64::from(config.customers.max(1)).min(share) as i64,
            changes_max: config.changes.unwrap_or(u64::MAX),
            changes: 0,
            transactions: 0,
            data_version: None,
        })
    }

    fn left(&self) -> u64 {
        self.changes_max - self.changes
    }

    fn progress(&self, begin: Instant) -> Progress {
        Progress { changes: self.changes, transactions: self.transactions, elapsed: begin.elapsed() }
    }

    fn transaction(&mut self, stop: &AtomicBool) -> Result<Transaction> {
        if !self.begin(stop)? {
            return Ok(Transaction::None);
        }
        let missing = self.first_customers - self.application.customers();
        let first = missing > 0;
        let rows = if first {
            (missing as u64).min(FIRST_CUSTOMERS_ROWS)
        } else {
            u64::from(self.sizes.draw(self.application.rng()))
        };
        let rows = rows.min(self.left());
        for _ in 0..rows {
            let (table, operation) =
                if first { self.application.insert_customer()? } else { self.application.act()? };
            self.ledger.count(table, operation);
        }
        self.ledger.write()?;
        self.execute("commit").map_err(|cause| database_error("commit", "a transaction", cause))?;
        self.ledger.committed();
        self.changes += rows;
        self.transactions += 1;
        Ok(if first { Transaction::FirstCustomers } else { Transaction::Usual { rows } })
    }

    /// Takes the write lock; false when stopped while waiting for it.
    fn begin(&mut self, stop: &AtomicBool) -> Result<bool> {
        let since = Instant::now();
        loop {
            match self.execute("begin immediate") {
                Ok(()) => break,
                Err(cause) if is_busy(&cause) && since.elapsed() < LOCK_WAIT_MAX => {
                    if stop.load(Ordering::Relaxed) {
                        return Ok(false);
                    }
                }
                Err(cause) => return Err(database_error("begin", "a transaction", cause)),
            }
        }
        let schema_version = self.pragma("pragma schema_version")?;
        self.ledger.begin(schema_version)?;
        let data_version = Some(self.pragma("pragma data_version")?);
        if data_version != self.data_version {
            self.application.read_ids(self.connection)?;
            self.data_version = data_version;
        }
        Ok(true)
    }

    fn execute(&self, statement: &str) -> rusqlite::Result<()> {
        self.connection.prepare_cached(statement)?.execute([]).map(|_| ())
    }

    fn pragma(&self, statement: &str) -> Result<i64> {
        let read = || self.connection.prepare_cached(statement)?.query_row([], |row| row.get(0));
        read().map_err(|cause| database_error("read", statement, cause))
    }
}

fn is_busy(cause: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseBusy, DatabaseLocked};
    matches!(cause.sqlite_error_code(), Some(DatabaseBusy | DatabaseLocked))
}

/// Tells apart what a person must: a lock, a full disk, a damaged file.
fn database_error(operation: &str, object: &str, cause: rusqlite::Error) -> Error {
    use rusqlite::ErrorCode;
    match cause.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            Error::new(ErrorKind::Unavailable, operation, object, cause)
                .with_remedy("another program holds the database's write lock: end it or wait for it")
        }
        _ if shori_sqlite::is_disk_full(&cause) => {
            Error::new(ErrorKind::DiskFull, operation, object, cause).with_remedy("free some space and start again")
        }
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            Error::new(ErrorKind::Corrupt, operation, object, cause)
        }
        _ => Error::new(ErrorKind::Refused, operation, object, cause),
    }
}
