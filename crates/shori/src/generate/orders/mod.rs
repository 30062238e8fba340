//! The orders of a PostgreSQL database: one table, whose rows come, change and go.
//!
//! Constraints: writes go through the server's own defaults, checks and triggers, as an application's do; a server that
//! goes away is waited for, for a minute; one that is not there at the start is an error at once.
//!
//! [`mix`] says what happens and how often, [`statements`] does it on one connection. Each writer is a thread with a
//! connection of its own: it waits for its pace without holding up the others.

mod mix;
mod statements;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use shori_core::{Error, ErrorKind, Result};
use shori_postgres::Server;
use tokio::runtime::Runtime;

use super::counts::{Operation, OperationCounts, TableCounts};
use super::pace::{Pace, Pacing, Sizes};
use super::{Generated, PROGRESS_EVERY, Progress, Workload};
use mix::{draw_operation, draw_round};
use statements::{Desk, Failure, Share};

const TABLE: &str = "orders";
/// How long a server that went away is waited for, and the pause between two tries.
const ABSENCE_MAX: Duration = Duration::from_secs(60);
const TRY_EVERY: Duration = Duration::from_millis(250);
/// Transactions in a row that others may be in the way of.
const CONFLICTS_MAX: u32 = 100;
const WRITERS_MAX: u32 = 64;

/// Where the orders are.
#[derive(Clone, Debug)]
pub struct Orders {
    pub server: Server,
    /// The database schema of the table.
    pub schema: String,
}

/// What the writers of one run have in common.
struct Shared<'a> {
    stop: &'a AtomicBool,
    left: AtomicU64,
    changes: AtomicU64,
    transactions: AtomicU64,
}

/// What one writer did.
struct Written {
    counts: OperationCounts,
    late: Duration,
}

impl Orders {
    /// As [`super::Application::run`]. A transaction whose commit was not answered, because the server went away, counts as
    /// not made.
    pub(super) fn run(
        &self,
        workload: &Workload,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Generated> {
        if !(1..=WRITERS_MAX).contains(&workload.writers) {
            let cause = format!("there may be 1 to {WRITERS_MAX}");
            return Err(Error::new(ErrorKind::Usage, "generate with", format!("{} writers", workload.writers), cause));
        }
        // All of them first: what is wrong is told before anything is written.
        let writers: Vec<Writer> =
            (0..workload.writers).map(|index| Writer::new(self, workload, index)).collect::<Result<_>>()?;
        let shared = Shared {
            stop,
            left: AtomicU64::new(workload.changes.unwrap_or(u64::MAX)),
            changes: AtomicU64::new(0),
            transactions: AtomicU64::new(0),
        };
        let begin = Instant::now();
        let written = thread::scope(|scope| {
            let (ended, ends) = channel();
            for writer in writers {
                let (shared, ended) = (&shared, ended.clone());
                scope.spawn(move || writer.run(shared, &ended));
            }
            drop(ended);
            let mut written = Vec::new();
            loop {
                match ends.recv_timeout(PROGRESS_EVERY) {
                    Ok(end) => {
                        if end.is_err() {
                            // The others end too.
                            stop.store(true, Ordering::Relaxed);
                        }
                        written.push(end);
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => break written,
                }
                progress(&shared.progress(begin));
            }
        });
        let mut counts = OperationCounts::default();
        let mut late = Duration::ZERO;
        for one in written {
            let one = one?;
            counts.add(&one.counts);
            late = late.max(one.late);
        }
        let Progress { changes, transactions, elapsed } = shared.progress(begin);
        Ok(Generated {
            changes,
            transactions,
            seconds: elapsed.as_secs_f64(),
            late_seconds: late.as_secs_f64(),
            tables: TableCounts(vec![(TABLE, counts)]),
        })
    }

    fn table(&self) -> String {
        format!("\"{}\".{TABLE}", self.schema.replace('"', "\"\""))
    }
}

impl Shared<'_> {
    fn progress(&self, begin: Instant) -> Progress {
        Progress {
            changes: self.changes.load(Ordering::Relaxed),
            transactions: self.transactions.load(Ordering::Relaxed),
            elapsed: begin.elapsed(),
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Takes up to `rows` of the changes that are left.
    fn claim(&self, rows: usize) -> usize {
        let rows = rows as u64;
        let claimed = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left - left.min(rows)));
        claimed.map_or(0, |left| left.min(rows)) as usize
    }
}

struct Writer {
    runtime: Runtime,
    orders: Orders,
    desk: Desk,
    share: Share,
    customers: u32,
    rng: ChaCha8Rng,
    pacing: Pacing,
    sizes: Sizes,
    counts: OperationCounts,
}

impl Writer {
    fn new(orders: &Orders, workload: &Workload, index: u32) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|cause| Error::new(ErrorKind::Internal, "start", "the async runtime", cause))?;
        let share = Share { writers: workload.writers.into(), remainder: index.into() };
        let desk = runtime.block_on(Desk::open(&orders.server, &orders.table(), share, workload.customers))?;
        let mut rng = ChaCha8Rng::seed_from_u64(workload.seed);
        rng.set_stream(index.into());
        let pacing = workload.pacing.shared_by(workload.writers);
        let sizes = Sizes::new(pacing, workload.transaction_max_rows);
        let (orders, customers) = (orders.clone(), workload.customers);
        let counts = OperationCounts::default();
        Ok(Self { runtime, orders, desk, share, customers, rng, pacing, sizes, counts })
    }

    fn run(mut self, shared: &Shared<'_>, ended: &Sender<Result<Written>>) {
        let mut pace = Pace::new(self.pacing);
        let written = loop {
            let wanted = self.draw(shared);
            let is_over = shared.left.load(Ordering::Relaxed) == 0 && wanted.is_empty();
            if is_over || shared.stopped() {
                break Ok(Written { counts: self.counts, late: pace.given_up() });
            }
            if !wanted.is_empty()
                && let Err(error) = self.write(shared, &wanted)
            {
                break Err(error);
            }
            pace.wait_after(wanted.len() as u64, shared.stop);
        };
        // Nobody listens any more only where the run is given up.
        drop(ended.send(written));
    }

    /// What the next transaction does; nothing, where a round has nothing, or no change is left.
    fn draw(&mut self, shared: &Shared<'_>) -> Vec<Operation> {
        if let Pacing::Rounds(_) = self.pacing {
            let mut round = draw_round(&mut self.rng);
            round.truncate(shared.claim(round.len()));
            return round;
        }
        let rows = self.sizes.draw(&mut self.rng) as usize;
        (0..shared.claim(rows)).map(|_| draw_operation(&mut self.rng)).collect()
    }

    /// Commits the changes, again and again where that fails by what passes; returns without having done so when stopped.
    fn write(&mut self, shared: &Shared<'_>, wanted: &[Operation]) -> Result<()> {
        let mut conflicts = 0;
        loop {
            let failure = match self.runtime.block_on(self.desk.transact(&mut self.rng, wanted)) {
                Ok(made) => {
                    self.took_note(shared, &made);
                    return Ok(());
                }
                Err(failure) => failure,
            };
            let failure = match failure {
                Failure::Conflict(error) if conflicts == CONFLICTS_MAX => return Err(error),
                Failure::Conflict(_) => {
                    conflicts += 1;
                    self.runtime.block_on(self.desk.roll_back()).err()
                }
                other => Some(other),
            };
            match failure {
                None => {}
                Some(Failure::Conflict(error) | Failure::Other(error)) => self.await_server(shared, error)?,
            }
            if shared.stopped() {
                return Ok(());
            }
        }
    }

    fn took_note(&mut self, shared: &Shared<'_>, made: &[Operation]) {
        let mut counts = OperationCounts::default();
        made.iter().for_each(|operation| counts.count(*operation));
        self.counts.add(&counts);
        shared.changes.fetch_add(made.len() as u64, Ordering::Relaxed);
        shared.transactions.fetch_add(1, Ordering::Relaxed);
        if let Pacing::Rounds(_) = self.pacing {
            let OperationCounts { inserts, updates, deletes, .. } = counts;
            tracing::info!(inserts, updates, deletes, "wrote");
        }
    }

    /// Connects again, where a server that has gone is what failed.
    fn await_server(&mut self, shared: &Shared<'_>, failed: Error) -> Result<()> {
        if failed.kind() != ErrorKind::Unavailable {
            return Err(failed);
        }
        tracing::warn!(reason = %failed, "the server has gone, trying again");
        let since = Instant::now();
        let mut last = failed;
        while !shared.stopped() && since.elapsed() < ABSENCE_MAX {
            let table = self.orders.table();
            let opening = Desk::open(&self.orders.server, &table, self.share, self.customers);
            match self.runtime.block_on(opening) {
                Ok(desk) => {
                    self.desk = desk;
                    tracing::info!("the server is back");
                    return Ok(());
                }
                Err(error) if error.kind() != ErrorKind::Unavailable => return Err(error),
                Err(error) => last = error,
            }
            thread::sleep(TRY_EVERY);
        }
        if shared.stopped() { Ok(()) } else { Err(last) }
    }
}
