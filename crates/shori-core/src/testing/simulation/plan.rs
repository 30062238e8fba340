//! What one seed decides: settings of the pipeline, habits of source and faults, and what happens meanwhile.

use std::sync::Arc;
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::ingest::IngestSettings;
use crate::pipeline::{Retention, Settings};
use crate::project::ProjectSettings;
use crate::retry::RetryPolicy;
use crate::source::BatchLimit;
use crate::testing::faults::FaultPlan;
use crate::testing::memory_source::SourceHabits;
use crate::testing::transactions::TransactionShape;

/// How large a run may get.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Transactions, on average.
    pub transactions: u64,
    pub workers: usize,
    /// Statements of a transaction, at most, in one seed of eight.
    pub large_transaction: u32,
    /// Looks at the targets that are checked, in a thousand; all are at the end.
    pub checks: u32,
}

impl Size {
    pub const FULL: Size = Size { transactions: 50, workers: 2, large_transaction: 24, checks: 60 };
    /// For parts that take a thousand times as long as memory does.
    pub const SMALL: Size = Size { transactions: 12, workers: 1, large_transaction: 8, checks: 20 };
}

/// Something that is done to the pipeline, or to what it reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Act {
    Commit,
    /// A worker's process ends within so many steps.
    Crash {
        worker: usize,
        steps: u64,
    },
    /// A worker is told to end, and finishes what it has in hand.
    Stop {
        worker: usize,
    },
    Resnapshot {
        table: usize,
    },
    Rebuild {
        projection: usize,
    },
    Compact,
    /// A table can no longer be captured, until it is mended and read anew.
    Break {
        table: usize,
    },
    /// The source lets go of changes that nobody has read.
    Overtake,
}

/// What becomes of a worker's cache between two of its processes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CacheFate {
    Kept,
    Lost,
    /// Replaced by the copy that was made at an earlier end.
    Older,
}

#[derive(Clone, Debug)]
pub struct Plan {
    pub workers: usize,
    pub shape: TransactionShape,
    pub settings: Settings,
    pub habits: SourceHabits,
    pub faults: FaultPlan,
    /// Longest pause between two acts.
    pub pause: Duration,
    /// Commits before the pipeline first starts.
    pub before: u64,
    pub acts: Vec<Act>,
    /// Indexes of the projections that are derived, in order.
    pub projections: Vec<usize>,
    /// The source lets go of what was acknowledged.
    pub prunes: bool,
    /// One commit in so many brings a message that cannot be decoded.
    pub rejects: Option<u64>,
    /// Some processes are configured without some of the projections.
    pub leaves_out: bool,
    pub checks: u32,
}

fn one_in(rng: &mut ChaCha8Rng, count: u32) -> bool {
    rng.random_range(0..count) == 0
}

fn millis(rng: &mut ChaCha8Rng, most: u64) -> Duration {
    Duration::from_millis(rng.random_range(1..=most))
}

impl Plan {
    pub fn draw(seed: u64, size: &Size, tables: usize, projections: usize) -> Plan {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let workers = if size.workers > 1 && one_in(rng, 3) { 2 } else { 1 };
        let mut chosen: Vec<usize> = (0..projections).filter(|_| one_in(rng, 2)).collect();
        if chosen.is_empty() {
            chosen.push(rng.random_range(0..projections));
        }
        let mut shape = TransactionShape { keys: rng.random_range(3..12), ..TransactionShape::default() };
        shape.truncates = if one_in(rng, 2) { 0 } else { 20 };
        if one_in(rng, 8) {
            (shape.keys, shape.statements) = (24, size.large_transaction);
        }
        let acts = draw_acts(rng, size, workers, tables, chosen.len());
        let breaks = acts.iter().any(|act| matches!(act, Act::Break { .. }));
        Plan {
            workers,
            shape,
            settings: draw_settings(rng, &acts),
            habits: SourceHabits {
                chunk_rows: rng.random_range(1..8),
                redelivered: if one_in(rng, 2) { 0 } else { rng.random_range(1..4) },
                partial_images: one_in(rng, 2),
                short_batches: one_in(rng, 3),
            },
            faults: FaultPlan {
                errors: if one_in(rng, 2) { 0 } else { rng.random_range(1..12) },
                sleeps: if one_in(rng, 2) { 0 } else { rng.random_range(1..60) },
                longest_sleep: millis(rng, 400),
                yields: rng.random_range(0..200),
            },
            pause: millis(rng, 600),
            before: rng.random_range(0..5),
            acts,
            projections: chosen,
            prunes: !one_in(rng, 4),
            rejects: one_in(rng, 4).then(|| rng.random_range(1..6)),
            // While a table is broken, its neighbours must come as far as the source, whoever runs.
            leaves_out: !breaks && one_in(rng, 4),
            checks: size.checks,
        }
    }
}

fn draw_settings(rng: &mut ChaCha8Rng, acts: &[Act]) -> Settings {
    let once = one_in(rng, 8);
    let retry = RetryPolicy { first: millis(rng, 100), longest: millis(rng, 5_000) };
    let compacts = acts.contains(&Act::Compact) || one_in(rng, 3);
    // By age, everything is old: the storage's clock stands years behind this machine's.
    let by_age = compacts && one_in(rng, 3);
    Settings {
        ingest: IngestSettings {
            linger: Duration::ZERO,
            batch: BatchLimit {
                rows: if one_in(rng, 2) { rng.random_range(1..20) } else { rng.random_range(1..=200) },
                bytes: 1 << 20,
            },
            poll_interval: millis(rng, 1_000),
            retry,
            once,
        },
        project: ProjectSettings {
            interval: millis(rng, 5_000),
            debounce: if one_in(rng, 2) { Duration::ZERO } else { millis(rng, 300) },
            retry,
            once,
        },
        retention: Retention {
            keep: by_age.then_some(Duration::from_secs(1)),
            keep_rows: (compacts && !by_age).then(|| rng.random_range(0..40)),
            every: (compacts && one_in(rng, 2)).then(|| millis(rng, 3_000)),
        },
    }
}

fn draw_acts(rng: &mut ChaCha8Rng, size: &Size, workers: usize, tables: usize, projections: usize) -> Vec<Act> {
    let transactions = rng.random_range(size.transactions / 2..=size.transactions * 3 / 2);
    let mut acts = vec![Act::Commit; transactions as usize];
    let mut add = |rng: &mut ChaCha8Rng, most: u32, act: &dyn Fn(&mut ChaCha8Rng) -> Act| {
        for _ in 0..rng.random_range(0..=most) {
            let place = rng.random_range(0..=acts.len());
            let act = act(rng);
            acts.insert(place, act);
        }
    };
    add(rng, 15, &|rng| Act::Crash { worker: rng.random_range(0..workers), steps: rng.random_range(0..80) });
    add(rng, 1, &|rng| Act::Stop { worker: rng.random_range(0..workers) });
    add(rng, 2, &|rng| Act::Resnapshot { table: rng.random_range(0..tables) });
    add(rng, 2, &|rng| Act::Rebuild { projection: rng.random_range(0..projections) });
    if one_in(rng, 3) {
        add(rng, 3, &|_| Act::Compact);
    }
    if one_in(rng, 4) {
        add(rng, 1, &|rng| Act::Break { table: rng.random_range(0..tables) });
    }
    if one_in(rng, 8) {
        add(rng, 1, &|_| Act::Overtake);
    }
    acts
}

/// A random sequence of its own for each part of a run.
pub fn rng_of(seed: u64, part: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(part + 1);
    rng
}

impl CacheFate {
    pub fn draw(rng: &mut ChaCha8Rng) -> Self {
        match rng.random_range(0..8) {
            0 => CacheFate::Lost,
            1 => CacheFate::Older,
            _ => CacheFate::Kept,
        }
    }
}

/// Names of the model's tables, in order.
pub fn table_names(tables: &[Arc<crate::schema::TableSchema>]) -> Vec<Arc<str>> {
    tables.iter().map(|schema| schema.table.clone()).collect()
}
