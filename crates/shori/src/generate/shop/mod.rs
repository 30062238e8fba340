//! A shop in a SQLite file: orders, payments and customers, for the demo, tests and benchmarks.
//!
//! Every change is one statement on one row; a transaction holds 1 to 100,000 of them, mostly few. Only time values come
//! from the clock.
//!
//! [`mix`] says what happens and how often, [`application`] does it, [`ledger`] counts.

mod application;
mod clock;
mod ledger;
mod mix;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rusqlite::{Connection, OpenFlags};
use shori_core::{Error, ErrorKind, Result};

pub use clock::Clock;

use super::pace::{Pace, Sizes};
use super::{Generated, PROGRESS_EVERY, Progress, Workload};
use application::Application;
use ledger::{Ledger, TABLES};

/// A lock is waited for in steps of this length, so that a stop is noticed.
const LOCK_WAIT_STEP: Duration = Duration::from_millis(250);
/// A lock held for longer is an error.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(60);
/// Rows of a transaction of the first customers.
const FIRST_CUSTOMERS_ROWS: u64 = 1_000;
/// Of a given number of changes, at most one in so many goes to the first customers.
const FIRST_CUSTOMERS_SHARE: u64 = 4;

/// Where the shop is.
#[derive(Clone, Debug)]
pub struct Shop {
    /// The SQLite file; it must have the sample tables.
    pub path: PathBuf,
    pub clock: Clock,
}

impl Shop {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), clock: Clock::Wall }
    }

    /// As [`super::Application::run`]. Missing customers are inserted first, at any pace; they count as changes. Of a small
    /// number of changes, at most a quarter goes to them. Waits for locks of other writers up to a minute.
    pub fn run(
        &self,
        workload: &Workload,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Generated> {
        if workload.writers > 1 {
            let cause = "SQLite has one writer at a time";
            return Err(Error::new(ErrorKind::Usage, "generate with", format!("{} writers", workload.writers), cause));
        }
        let connection = open(&self.path)?;
        let mut generator = Generator::new(&connection, workload, self.clock)?;
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
                pace.get_or_insert_with(|| Pace::new(workload.pacing)).wait_after(rows, stop);
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
    fn new(connection: &'c Connection, workload: &Workload, clock: Clock) -> Result<Self> {
        let rng = ChaCha8Rng::seed_from_u64(workload.seed);
        let share = workload.changes.map_or(u64::MAX, |changes| (changes / FIRST_CUSTOMERS_SHARE).max(1));
        Ok(Self {
            connection,
            application: Application::new(connection, rng, clock)?,
            ledger: Ledger::new(connection)?,
            sizes: Sizes::new(workload.pacing, workload.transaction_max_rows),
            first_customers: u64::from(workload.customers.max(1)).min(share) as i64,
            changes_max: workload.changes.unwrap_or(u64::MAX),
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
