//! SIGKILL between every two durable writes, in every pairing of a source and a store of which one is a PostgreSQL server.
//!
//! What `make torture` does with files, for fewer kills.

use std::time::{Duration, Instant};

use shori_core::failpoint;

use crate::harness::{Running, World};

/// A place that is not reached by then is given up: the process is killed all the same.
const PATIENCE: Duration = Duration::from_secs(15);
/// Lives in which a place may be reached.
const TRIES: usize = 3;
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A log that is compacted soon, so that compaction has something to do.
pub const RETENTION: &str = "[retention]\nkeep_hours = 0.0005\n";

/// What can be asked of the pipeline.
pub struct Asked {
    pub table: &'static str,
    pub projection: &'static str,
}

/// Of a target of as few rows there is nothing to fold, and a server's are never folded; only sums are settled in parts.
/// `make torture` kills there.
const RARE: [&str; 2] = [failpoint::STORE_INSIDE_FOLD, failpoint::TRANSFORM_INSIDE_SETTLE];

/// Kills the pipeline at every place that it comes to; `is_written` is called each time, and keeps somebody writing. Returns
/// the places that were not reached, tried again: a busy machine may have had something else to do.
pub fn kill_at_each(world: &World, asked: &Asked, mut is_written: impl FnMut()) -> Vec<&'static str> {
    let mut unreached = Vec::new();
    for (round, place) in failpoint::ALL.iter().filter(|place| !RARE.contains(place)).enumerate() {
        is_written();
        let is_reached = |tries: usize| kill_at(world, asked, (round, tries), place);
        if !(0..TRIES).any(is_reached) {
            unreached.push(*place);
        }
    }
    unreached
}

/// One life of the pipeline. Whether it ended at the place.
fn kill_at(world: &World, asked: &Asked, (round, tries): (usize, usize), place: &str) -> bool {
    let mut command = world.command(&["run"]);
    let count = if is_asked_for(place) || tries > 0 { 1 } else { 1 + round % 2 };
    command.env("SHORI_FAILPOINT", format!("{place}:{count}"));
    let mut running = Running::start(command);
    let begun = Instant::now();
    let mut question: Option<Running> = None;
    while !running.has_ended() {
        if begun.elapsed() > PATIENCE {
            running.kill();
            return false;
        }
        let is_due = match &mut question {
            None => tries == 0 || is_asked_for(place),
            Some(question) => is_asked_for(place) && question.has_ended(),
        };
        if is_due && world.client().is_some() {
            question = question_of(asked, round, place).map(|words| world.start(&words));
        }
        // The process's end is looked for, not waited for.
        std::thread::sleep(LOOK_EVERY);
    }
    // A question that is still open when the pipeline is gone dies with it.
    true
}

/// Places that are only come to when somebody asks for something.
fn is_asked_for(place: &str) -> bool {
    [failpoint::COMPACT_BETWEEN, failpoint::INGEST_AFTER_REQUEST].contains(&place)
}

/// Something unusual, in every second life.
fn question_of(asked: &Asked, round: usize, place: &str) -> Option<Vec<&'static str>> {
    Some(match (place, round % 6) {
        (failpoint::COMPACT_BETWEEN, _) => vec!["compact"],
        (failpoint::INGEST_AFTER_REQUEST, _) => vec!["resnapshot", asked.table],
        (_, 0) => vec!["compact"],
        (_, 2) => vec!["resnapshot", asked.table],
        (_, 4) => vec!["rebuild", asked.projection],
        _ => return None,
    })
}
