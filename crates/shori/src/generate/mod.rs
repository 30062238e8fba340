//! Writes to the sample source as an application would: for demo, pipelines, tests and benchmarks.
//!
//! Bounded: memory does not grow with the tables. All choices come from the seed, so equal seeds on equal databases issue
//! equal statements, as long as one writer issues them. It continues on a database that it or another wrote before.
//!
//! One folder for each application, with the system that its database is of: [`shop`] in SQLite, [`orders`] in PostgreSQL.
//! [`pace`] says when they write, [`counts`] what they have written.

mod amount;
mod counts;
mod orders;
mod pace;
mod shop;

use std::fmt;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde::Serialize;
use shori_core::Result;

pub use counts::{OperationCounts, TableCounts};
pub use orders::Orders;
pub use pace::Pacing;
pub use shop::{Clock, Shop};

const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// What to write, and how fast.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Row changes in all, or until stopped. A row inserted, updated or deleted counts one, a key update too.
    pub changes: Option<u64>,
    pub pacing: Pacing,
    pub seed: u64,
    /// Customers that orders are of.
    pub customers: u32,
    /// Most rows that one transaction holds.
    pub transaction_max_rows: u32,
    /// Connections that write at once, where the database lets them.
    pub writers: u32,
}

impl Default for Workload {
    fn default() -> Self {
        Self {
            changes: None,
            pacing: Pacing::FlatOut,
            seed: 1,
            customers: 10_000,
            transaction_max_rows: 100_000,
            writers: 1,
        }
    }
}

/// An application, and the database that it writes to.
#[derive(Clone, Debug)]
pub enum Application {
    Shop(Shop),
    Orders(Orders),
}

impl Application {
    /// Writes until `workload.changes` are committed, or `stop` is set: the transaction in hand is then committed, never
    /// cut. `progress` hears of it about every 100 ms, and at the end.
    pub fn run(
        &self,
        workload: &Workload,
        stop: &AtomicBool,
        mut progress: impl FnMut(&Progress),
    ) -> Result<Generated> {
        workload.pacing.check()?;
        match self {
            Self::Shop(shop) => shop.run(workload, stop, &mut progress),
            Self::Orders(orders) => orders.run(workload, stop, &mut progress),
        }
    }
}

/// How far a run has come.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Progress {
    pub changes: u64,
    pub transactions: u64,
    pub elapsed: Duration,
}

/// What a run has committed.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Generated {
    pub changes: u64,
    pub transactions: u64,
    pub seconds: f64,
    /// Seconds by which the given pace was missed, because the database was too slow.
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
