//! Where state goes next: the nearest place at which it must stop on its way to the cutoff, and the changes up to there.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt;

use crate::change::ChangeBatch;
use crate::error::{Error, ErrorKind, Result};
use crate::position::{CaptureId, Position, Positions};
use crate::recent::Recent;
use crate::source::{SnapshotProgress, SnapshotState};
use crate::store::{CaptureState, LogStream, Store};
use crate::transform::{Applied, CaptureAdvance, LogReader};

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
    for (id, capture) in captures.iter().filter(|(_, capture)| capture.failed.is_none() || failed_count()) {
        by_timeline.entry(&capture.timeline).or_default().push((id, capture));
    }
    let advances = by_timeline.values().flat_map(|captures| timeline_step(captures, applied, &checkpoints));
    let captures: Vec<CaptureAdvance> = advances.collect();
    (!captures.is_empty()).then_some(Step { captures })
}

/// Whether the simulation has taken the rule away that captures which stand still hold nobody back.
#[cfg(feature = "testing")]
fn failed_count() -> bool {
    crate::testing::planted::is(crate::testing::planted::Plant::FailedHoldsBack)
}

#[cfg(not(feature = "testing"))]
fn failed_count() -> bool {
    false
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
            // The first one too: a capture may have rows from before it, and a gap after them.
            sweep: ended.map(|snapshot| snapshot.end_time),
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

/// What one capture contributes to a step.
pub struct Range {
    pub after: Position,
    pub capture: CaptureAdvance,
}

/// Hands a step's changes to the transform: from memory where they are contiguous, else from the log.
///
/// What is read above a place that compaction has passed meanwhile is not what followed there: deletions may be missing.
/// Such a step fails, and state must be begun from the log's start. Begun from there, state goes on below the horizon
/// that the log had then, as long as the log keeps that horizon.
pub struct StepReader {
    staging: Arc<dyn Store>,
    recent: Recent,
    ranges: VecDeque<Range>,
    parts: VecDeque<ChangeBatch>,
    stream: Option<LogStream>,
    /// Where state stands in what was read from the log.
    read: Positions,
    compacted: Positions,
    /// The log's horizons when the cache was opened.
    opened: Positions,
    torn: bool,
}

impl StepReader {
    /// `compacted`: the horizons that the log had when state was begun from its start.
    pub fn new(
        staging: Arc<dyn Store>,
        recent: Recent,
        ranges: VecDeque<Range>,
        compacted: Positions,
        opened: Positions,
    ) -> Self {
        let (parts, read) = (VecDeque::new(), Positions::new());
        Self { staging, recent, ranges, parts, stream: None, read, compacted, opened, torn: false }
    }

    /// The range's changes as they came, if they are in memory. State that was begun from a compacted log lacks rows below
    /// the horizon: an image that leaves columns out could not be resolved there, and the log has it resolved.
    fn recent(&self, range: &Range) -> Result<Option<Vec<ChangeBatch>>> {
        let id = &range.capture.capture;
        let horizon = [&self.compacted, &self.opened].into_iter().filter_map(|horizons| horizons.get(id)).max();
        if range.after != Position::ZERO && horizon.is_some_and(|horizon| range.after < *horizon) {
            return Ok(None);
        }
        self.recent.read(id, &range.after, &range.capture.to.position)
    }

    /// Whether the log no longer has what follows where state stands.
    pub fn is_torn(&self) -> bool {
        self.torn
    }

    pub fn compacted(self) -> Positions {
        self.compacted
    }

    async fn open(&mut self, range: &Range) -> Result<LogStream> {
        let id = &range.capture.capture;
        if range.after == Position::ZERO {
            let horizon = self.staging.captures().await?.get(id).map_or(Position::ZERO, |capture| capture.horizon);
            self.compacted.insert(id.clone(), horizon);
        }
        self.read.insert(id.clone(), range.after);
        self.staging.read_log(id, &range.after, &range.capture.to.position).await
    }

    /// Everything has been read: it must still be what followed when reading ended.
    async fn check(&mut self) -> Result<()> {
        if self.read.is_empty() {
            return Ok(());
        }
        let captures = self.staging.captures().await?;
        for (id, after) in &self.read {
            let horizon = captures.get(id).map_or(Position::ZERO, |capture| capture.horizon);
            if horizon > *after && self.compacted.get(id) != Some(&horizon) {
                self.torn = true;
                let cause = format!("the log has been compacted past {after}");
                return Err(Error::new(ErrorKind::Unavailable, "apply", format!("the log of {id}"), cause));
            }
        }
        Ok(())
    }
}

#[async_trait]
impl LogReader for StepReader {
    async fn next(&mut self) -> Result<Option<ChangeBatch>> {
        loop {
            if let Some(part) = self.parts.pop_front() {
                return Ok(Some(part));
            }
            if let Some(stream) = &mut self.stream {
                match stream.next().await {
                    Some(batch) => return batch.map(Some),
                    None => self.stream = None,
                }
            }
            let Some(range) = self.ranges.pop_front() else {
                self.check().await?;
                return Ok(None);
            };
            match self.recent(&range)? {
                Some(parts) => self.parts = parts.into(),
                None => self.stream = Some(self.open(&range).await?),
            }
        }
    }
}
