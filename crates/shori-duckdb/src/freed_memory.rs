//! Gives freed memory back to the system while the process holds much.
//!
//! DuckDB counts what it uses against its limit, but its allocator keeps pages that were freed for about a second, in case
//! they are wanted again. Work that spills frees and takes blocks of many sizes, and may have as much again in such pages
//! as in use. DuckDB gives them back before an allocation above a threshold; set so low that each one is above it, small
//! steps would pay for what only large ones need. So it is set to what large hash tables take; and a thread looks at what
//! the process holds, and sets it lower for a moment where that is above the limit and has grown.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use duckdb::Connection;

/// Growth since pages were last given back at which they are again: what is held then may all be in use.
const GROWN_KIB: u64 = 16 * 1024;
/// Time between two looks while what is held moves.
const LOOK_MOVING: Duration = Duration::from_millis(10);
/// Time between two looks while it stands still.
const LOOK_STILL: Duration = Duration::from_millis(250);
/// Less than this is standing still.
const MOVING_KIB: u64 = 2 * 1024;

/// A single allocation before which all freed pages are given back. No small step makes one.
pub(crate) const LARGE_ALLOCATION: &str = "set allocator_bulk_deallocation_flush_threshold = '8MiB'";
const ANY_ALLOCATION: &str = "set allocator_bulk_deallocation_flush_threshold = '0KiB'";
const ALLOCATE: &str = "select count(distinct number) from range(3) as numbers(number)";

/// A thread that looks. It has ended, and let go of its connection, when this is dropped.
pub(crate) struct Watch {
    alive: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// `None` where what the process holds cannot be told. DuckDB has an allocator of its own on Linux alone.
    pub fn start(connection: Connection, limit_mib: u64) -> Option<Self> {
        held_kib()?;
        let (alive, ended) = channel();
        let look = move || look(&connection, limit_mib * 1024, &ended);
        match thread::Builder::new().name("freed-memory".into()).spawn(look) {
            Ok(thread) => Some(Self { alive: Some(alive), thread: Some(thread) }),
            Err(error) => {
                tracing::warn!(%error, "freed memory is given back late");
                None
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.alive.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::warn!("the thread that gives freed memory back has failed");
        }
    }
}

fn look(connection: &Connection, limit_kib: u64, ended: &Receiver<()>) {
    let (mut last, mut lowest, mut pause) = (0, 0, LOOK_STILL);
    while matches!(ended.recv_timeout(pause), Err(RecvTimeoutError::Timeout)) {
        let Some(held) = held_kib() else { return };
        lowest = held.min(lowest);
        if held > limit_kib && held > lowest + GROWN_KIB {
            give_back(connection);
            lowest = held_kib().unwrap_or(held);
        }
        pause = if held.abs_diff(last) < MOVING_KIB { LOOK_STILL } else { LOOK_MOVING };
        last = held;
    }
}

fn give_back(connection: &Connection) {
    for statement in [ANY_ALLOCATION, ALLOCATE, LARGE_ALLOCATION] {
        if let Err(error) = connection.execute_batch(statement) {
            tracing::debug!(%error, "freed memory is given back at the next look");
        }
    }
}

/// Resident memory of the process that belongs to no file.
fn held_kib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_told_and_given_back_by_statements_that_duckdb_knows() {
        let connection = Connection::open_in_memory().unwrap();
        assert!(held_kib().is_none_or(|held| held > 0));
        for statement in [ANY_ALLOCATION, ALLOCATE, LARGE_ALLOCATION] {
            connection.execute_batch(statement).unwrap();
        }
    }

    #[test]
    fn the_instance_ends_with_its_handle() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("held.duckdb");
        let connection = Connection::open(&file).unwrap();
        let watch = Watch::start(connection.try_clone().unwrap(), 0);
        drop(connection);
        drop(watch);
        // A file is locked as long as any connection to it stands.
        Connection::open(&file).unwrap();
    }
}
