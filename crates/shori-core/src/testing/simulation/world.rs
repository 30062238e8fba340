//! One simulated world: what survives crashes, who runs in it, and what has been seen to go wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

use super::checks;
use super::parts::Parts;
use super::plan::Plan;
use super::source::HandedOut;
use crate::event::Event;
use crate::pipeline::Handle;
use crate::projection::Projection;
use crate::testing::faults::Faults;
use crate::testing::memory_database::MemoryDatabase;

pub struct World {
    pub seed: u64,
    pub plan: Plan,
    pub database: MemoryDatabase,
    pub parts: Box<dyn Parts>,
    pub projections: Vec<Projection>,
    pub faults: Faults,
    pub handed_out: HandedOut,
    /// Every process that is started from here on has all projections.
    pub settling: CancellationToken,
    /// No process is started again.
    pub ending: CancellationToken,
    pub failed: CancellationToken,
    pub crashes: AtomicU64,
    looks: AtomicU64,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    failure: Option<String>,
    processes: Vec<Option<Process>>,
    /// Tables that could not be captured at some time.
    broken: BTreeSet<Arc<str>>,
    /// Tables whose break has not been dealt with yet.
    held: BTreeSet<Arc<str>>,
    overtaken: bool,
    /// Versions that each history showed when its newest output was committed.
    versions: BTreeMap<Arc<str>, usize>,
}

/// A worker's process while it lives.
#[derive(Clone)]
pub struct Process {
    pub handle: Handle,
    pub faults: Faults,
}

impl World {
    pub fn new(
        seed: u64,
        plan: Plan,
        database: MemoryDatabase,
        parts: Box<dyn Parts>,
        projections: Vec<Projection>,
        faults: Faults,
    ) -> Self {
        let processes = (0..plan.workers).map(|_| None).collect();
        Self {
            seed,
            plan,
            database,
            parts,
            projections,
            faults,
            handed_out: HandedOut::default(),
            settling: CancellationToken::new(),
            ending: CancellationToken::new(),
            failed: CancellationToken::new(),
            crashes: AtomicU64::new(0),
            looks: AtomicU64::new(0),
            seen: Mutex::new(Seen { processes, ..Seen::default() }),
        }
    }

    /// Notes what went wrong; the first thing counts.
    pub fn fail(&self, what: String) {
        self.faults.note(&format!("failure: {what}"));
        self.seen().failure.get_or_insert(what);
        self.failed.cancel();
    }

    pub fn failure(&self) -> Option<String> {
        self.seen().failure.clone()
    }

    pub fn process(&self, worker: usize) -> Option<Process> {
        self.seen().processes[worker].clone()
    }

    pub fn set_process(&self, worker: usize, process: Option<Process>) {
        self.seen().processes[worker] = process;
    }

    /// All processes that live.
    pub fn processes(&self) -> Vec<Process> {
        self.seen().processes.iter().flatten().filter(|process| !process.faults.has_crashed()).cloned().collect()
    }

    pub fn break_table(&self, table: &Arc<str>) {
        self.database.break_capture(table);
        let mut seen = self.seen();
        seen.broken.insert(table.clone());
        seen.held.insert(table.clone());
    }

    /// From here on, whoever repairs things may do so.
    pub fn mend_table(&self, table: &Arc<str>) {
        self.database.mend_capture(table);
        self.seen().held.remove(table);
    }

    /// Whether nobody has dealt with the table's break yet.
    pub fn is_held(&self, table: &str) -> bool {
        self.seen().held.contains(table)
    }

    pub fn was_broken(&self, table: &str) -> bool {
        self.seen().broken.contains(table)
    }

    /// The source lets go of everything, read or not.
    pub fn overtake(&self) {
        self.seen().overtaken = true;
        self.database.prune(self.database.head());
    }

    pub fn was_overtaken(&self) -> bool {
        self.seen().overtaken
    }

    /// Looks at what a process tells, at once: nothing has happened since.
    pub fn observe(&self, worker: usize, event: &Event) {
        match event {
            Event::Appended { watermark, rows, .. } => {
                self.note(worker, || format!("appended {rows} up to {}", watermark.staged));
                if self.looks_now() {
                    self.hold(checks::log(self));
                }
            }
            Event::Projected { projection, positions, rows, .. } => {
                self.note(worker, || format!("projected {projection} {rows} {:?}", positions.values().next()));
                if self.looks_now() {
                    self.hold(checks::target(self, projection));
                }
                self.hold(self.loses_no_versions(projection));
            }
            Event::CaptureFailed { capture, reason } => {
                self.note(worker, || format!("{capture} stands still: {reason}"));
                if !self.was_overtaken() && !self.was_broken(&capture.instance) {
                    self.fail(format!("capture {capture} stands still for no reason: {reason}"));
                }
            }
            Event::ProjectionFailed { projection, reason } => {
                self.note(worker, || format!("{projection} failed: {reason}"));
                if !reason.contains("stands still") {
                    self.fail(format!("projection {projection} failed: {reason}"));
                }
            }
            Event::SourceFailed { reason, .. } => self.fail(format!("the source ended: {reason}")),
            Event::Advanced { rows, .. } => self.note(worker, || format!("advanced {rows}")),
            Event::Snapshot { capture, rows, done } => {
                self.note(worker, || format!("snapshot {capture} {rows} {done}"));
            }
            Event::Compacted { capture, rows_before, rows_after } => {
                self.note(worker, || format!("compacted {capture} {rows_before} {rows_after}"));
                if self.looks_now() {
                    self.hold(checks::log(self));
                }
            }
            Event::Retrying { what, reason, .. } => self.note(worker, || format!("retries {what}: {reason}")),
            // One process rebuilds a projection to where its own state stands, another compacts up to where it knew it.
            Event::MissedByCompaction { projection } => self.note(worker, || format!("{projection} missed changes")),
            Event::Rejected { .. } => {}
        }
    }

    /// A history that is built anew shows what it did until it is there again. Of two processes, each may be asked to, and
    /// builds it from where its own state stands.
    fn loses_no_versions(&self, projection: &Arc<str>) -> checks::Verdict {
        if self.plan.workers > 1 {
            return Ok(());
        }
        let Some(now) = checks::versions(self, projection)? else { return Ok(()) };
        match self.seen().versions.insert(projection.clone(), now) {
            Some(before) if before > now => Err(format!("{projection} had {before} versions and shows {now}")),
            _ => Ok(()),
        }
    }

    pub fn note(&self, worker: usize, text: impl FnOnce() -> String) {
        self.faults.note(&format!("worker {worker}: {}", text()));
    }

    pub fn hold(&self, verdict: checks::Verdict) {
        if let Err(difference) = verdict {
            self.fail(difference);
        }
    }

    /// Whether this look is one of those that are taken.
    fn looks_now(&self) -> bool {
        let look = self.looks.fetch_add(1, Ordering::Relaxed);
        // Spread over the run, other places in other seeds.
        let mixed = (look ^ (self.seed << 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        mixed % 1000 < u64::from(self.plan.checks)
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
