//! Where state goes next: the nearest place at which it must stop on its way to the cutoff.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::position::{CaptureId, Position, Positions};
use crate::source::{SnapshotProgress, SnapshotState};
use crate::store::CaptureState;
use crate::transform::{Applied, CaptureAdvance};

/// One advance of state.
#[derive(Clone, Debug)]
pub struct Step {
    pub captures: Vec<CaptureAdvance>,
}

/// The next step, or `None` if state stands at the cutoff.
///
/// The cutoff of a timeline is the lowest boundary among its captures; captures that stand still are left out, so that
/// they hold nobody back (contract 11). State stops on the way at each of `checkpoints`, so that an output can start
/// where its target stands, and at both ends of each snapshot, where rows begin or cease to count as seen by it.
pub fn next<'a>(
    captures: &BTreeMap<CaptureId, CaptureState>,
    applied: &BTreeMap<CaptureId, Applied>,
    checkpoints: impl Iterator<Item = &'a Positions>,
) -> Option<Step> {
    let checkpoints: Vec<&Positions> = checkpoints.collect();
    let mut by_timeline: BTreeMap<&Arc<str>, Vec<(&CaptureId, &CaptureState)>> = BTreeMap::new();
    for (id, capture) in captures.iter().filter(|(_, capture)| capture.failed.is_none()) {
        by_timeline.entry(&capture.timeline).or_default().push((id, capture));
    }
    let advances = by_timeline.values().flat_map(|captures| timeline_step(captures, applied, &checkpoints));
    let captures: Vec<CaptureAdvance> = advances.collect();
    (!captures.is_empty()).then_some(Step { captures })
}

fn timeline_step(
    captures: &[(&CaptureId, &CaptureState)],
    applied: &BTreeMap<CaptureId, Applied>,
    checkpoints: &[&Positions],
) -> Vec<CaptureAdvance> {
    let stands = |id: &CaptureId| applied.get(id).map_or(Position::ZERO, |applied| applied.position);
    let Some(cutoff) = captures.iter().map(|(_, capture)| capture.watermark).min_by_key(|mark| mark.boundary) else {
        return Vec::new();
    };
    let mut stop = cutoff.boundary;
    for (id, capture) in captures {
        let here = stands(id);
        let ends = snapshots(capture)
            .flat_map(|snapshot| [snapshot.start, if snapshot.is_done() { snapshot.end } else { Position::ZERO }]);
        let reached = checkpoints.iter().filter_map(|checkpoint| checkpoint.get(*id).copied());
        for place in ends.chain(reached).filter(|place| *place > here) {
            stop = stop.min(place);
        }
    }
    let advance = |(id, capture): &(&CaptureId, &CaptureState)| {
        let here = applied.get(*id);
        if stands(id) >= stop {
            return None;
        }
        let time = if stop == cutoff.boundary { cutoff.boundary_time } else { 0 };
        let ended = snapshots(capture).find(|snapshot| snapshot.is_done() && snapshot.end == stop);
        let time = time.max(ended.map_or(0, |snapshot| snapshot.end_time)).max(here.map_or(0, |applied| applied.time));
        Some(CaptureAdvance {
            capture: (*id).clone(),
            to: Applied { position: stop, time },
            generation: generation_below(capture, &stop),
            sweep: ended.filter(|snapshot| snapshot.generation > 1).map(|snapshot| snapshot.end_time),
        })
    };
    captures.iter().filter_map(advance).collect()
}

fn snapshots(capture: &CaptureState) -> impl Iterator<Item = &SnapshotProgress> {
    capture.earlier_snapshots.iter().chain([&capture.snapshot])
}

/// The newest generation that began below `position`: steps end at starts, so it holds for the whole step.
fn generation_below(capture: &CaptureState, position: &Position) -> u32 {
    let begun = snapshots(capture).filter(|snapshot| snapshot.state != SnapshotState::Requested);
    begun.filter(|snapshot| snapshot.start < *position).map(|snapshot| snapshot.generation).max().unwrap_or(0)
}
