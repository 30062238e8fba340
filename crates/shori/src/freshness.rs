//! How long a change takes from its source commit to the commit of every projection that shows it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use hdrhistogram::Histogram;
use serde::Serialize;
use shori_core::event::{CommitRun, Event};
use shori_core::pipeline::now;
use shori_core::position::{Micros, Position};

/// Longest time that is told apart, in microseconds: one hour.
const LONGEST_US: u64 = 3_600_000_000;
/// Runs waiting at most; older ones are dropped from the measure, not from the pipeline.
const WAITING_MAX: usize = 1 << 20;

/// Milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Percentiles {
    pub p50: f64,
    pub p95: f64,
    pub p99: f64,
}

/// Listens to a pipeline's events. Meant for one timeline: positions of several do not compare.
pub struct Freshness {
    projections: usize,
    inner: Mutex<Inner>,
}

struct Inner {
    waiting: VecDeque<CommitRun>,
    shown: BTreeMap<Arc<str>, Shown>,
    histogram: Option<Histogram<u64>>,
    projected: u64,
}

/// Where a projection stands.
#[derive(Clone, Copy)]
struct Shown {
    position: Position,
    as_of_time: Micros,
}

impl Freshness {
    pub fn new(projections: usize) -> Self {
        let histogram = Histogram::new_with_bounds(1, LONGEST_US, 3).ok();
        let inner = Inner { waiting: VecDeque::new(), shown: BTreeMap::new(), histogram, projected: 0 };
        Self { projections, inner: Mutex::new(inner) }
    }

    pub fn listen(&self, event: &Event) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Appended { commits, .. } => {
                inner.waiting.extend(commits);
                while inner.waiting.len() > WAITING_MAX {
                    inner.waiting.pop_front();
                }
            }
            Event::Projected { projection, positions, as_of_time, .. } => {
                let Some(position) = positions.values().min() else { return };
                let shown = Shown { position: *position, as_of_time: *as_of_time };
                inner.shown.insert(projection.clone(), shown);
                if inner.shown.len() >= self.projections {
                    inner.count();
                }
            }
            _ => {}
        }
    }

    /// Changes that every projection shows.
    pub fn projected(&self) -> u64 {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).projected
    }

    /// Microseconds since the newest source commit that the projection shows; on an idle source this grows although
    /// nothing is missing. `None` before its first output.
    pub fn age(&self, projection: &str) -> Option<Micros> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.shown.get(projection).map(|shown| now() - shown.as_of_time)
    }

    pub fn percentiles(&self) -> Percentiles {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(histogram) = &inner.histogram else { return Percentiles::default() };
        let at = |percentile| histogram.value_at_percentile(percentile) as f64 / 1000.0;
        Percentiles { p50: at(50.0), p95: at(95.0), p99: at(99.0) }
    }
}

impl Inner {
    fn count(&mut self) {
        let Some(shown) = self.shown.values().map(|shown| shown.position).min() else { return };
        let time = now();
        // Runs of several captures are interleaved, so what is still waiting may stand among what is shown.
        let mut rest = VecDeque::with_capacity(self.waiting.len());
        for run in self.waiting.drain(..) {
            if run.up_to > shown {
                rest.push_back(run);
                continue;
            }
            self.projected += run.rows;
            let took = (time - run.time).clamp(1, LONGEST_US as i64) as u64;
            if let Some(histogram) = &mut self.histogram {
                histogram.saturating_record_n(took, run.rows);
            }
        }
        self.waiting = rest;
    }
}
