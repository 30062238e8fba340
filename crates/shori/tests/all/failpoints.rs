//! SIGKILL between every two durable writes, in every pairing of a source and a store of which one is a PostgreSQL server.
//!
//! What `make torture` does with files, for fewer kills.

use std::time::{Duration, Instant};

use shori_core::failpoint;

use crate::harness::{Running, World};

/// A place that is not reached by then is given up: the process is killed all the same.
const PATIENCE: Duration = Duration::from_secs(15);
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A log that is compacted soon, so that compaction has something to do.
pub const RETENTION: &str = "[retention]\nkeep_hours = 0.0005\n";

/// What can be asked of the pipeline.
pub struct Asked {
    pub table: &'static str,
    pub projection: &'static str,
}

/// Kills the pipeline at every place there is; `is_written` is called each time, and keeps somebody writing. Returns the
/// places that were not reached.
pub fn kill_at_each(world: &World, asked: &Asked, mut is_written: impl FnMut()) -> Vec<&'static str> {
    let mut unreached = Vec::new();
    for (round, place) in failpoint::ALL.iter().enumerate() {
        is_written();
        let mut command = world.command(&["run"]);
        let count = if is_asked_for(place) { 1 } else { 1 + round % 2 };
        command.env("SHORI_FAILPOINT", format!("{place}:{count}"));
        let mut running = Running::start(command);
        let begun = Instant::now();
        let mut question: Option<Running> = None;
        while !running.has_ended() {
            if begun.elapsed() > PATIENCE {
                running.kill();
                unreached.push(*place);
                break;
            }
            let is_due = match &mut question {
                None => true,
                Some(question) => is_asked_for(place) && question.has_ended(),
            };
            if is_due && world.client().is_some() {
                question = question_of(asked, round, place).map(|words| world.start(&words));
            }
            // The process's end is looked for, not waited for.
            std::thread::sleep(LOOK_EVERY);
        }
        // A question that is still open when the pipeline is gone dies with it.
    }
    unreached
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
