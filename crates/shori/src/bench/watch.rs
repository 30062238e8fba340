//! What a running pipeline's events tell of its speed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;
use shori_core::event::Event;
use shori_core::pipeline::now;
use shori_core::{Error, ErrorKind, Result};

use super::Measured;
use crate::freshness::{Freshness, Percentiles};

/// Longest time that is told apart, in microseconds: one hour.
const LONGEST_US: u64 = 3_600_000_000;

/// Listens from [`begin`](Watch::begin) on.
pub struct Watch {
    begun: AtomicBool,
    freshness: Freshness,
    inner: Mutex<Inner>,
}

struct Inner {
    /// Microseconds from source commit to the log, per change.
    appended: Option<Histogram<u64>>,
    work: BTreeMap<String, (u64, Duration)>,
}

/// What was seen.
#[derive(Debug)]
pub struct Seen {
    pub freshness: Percentiles,
    /// Changes that every projection shows.
    pub projected: u64,
    /// How long changes took into the log: the first part of `freshness`.
    appended: Percentiles,
    /// What was done, how often, and the mean milliseconds of one: `append`, `advance`, and a projection's commit.
    work: Vec<(String, u64, f64)>,
}

impl Watch {
    pub fn new(projections: usize) -> Self {
        let appended = Histogram::new_with_bounds(1, LONGEST_US, 3).ok();
        Self {
            begun: AtomicBool::new(false),
            freshness: Freshness::new(projections),
            inner: Mutex::new(Inner { appended, work: BTreeMap::new() }),
        }
    }

    pub fn begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }

    pub fn listen(&self, event: &Event) {
        if let Event::ProjectionFailed { projection, reason } = event {
            eprintln!("  {projection}: {reason}");
        }
        if let Event::Retrying { what, reason, .. } = event {
            eprintln!("  trying {what} again: {reason}");
        }
        if !self.begun.load(Ordering::Relaxed) {
            return;
        }
        self.freshness.listen(event);
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let (name, took) = match event {
            Event::Appended { took, commits, .. } => {
                let time = now();
                if let Some(appended) = &mut inner.appended {
                    for run in commits {
                        appended.saturating_record_n((time - run.time).max(1) as u64, run.rows);
                    }
                }
                ("append".to_string(), *took)
            }
            Event::Advanced { took, .. } => ("advance".to_string(), *took),
            Event::Projected { projection, took, .. } => (projection.to_string(), *took),
            _ => return,
        };
        let work = inner.work.entry(name).or_default();
        *work = (work.0 + 1, work.1 + took);
    }

    pub fn seen(&self) -> Seen {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let mean = |(name, (times, took)): (&String, &(u64, Duration))| {
            (name.clone(), *times, took.as_secs_f64() * 1000.0 / (*times).max(1) as f64)
        };
        let at = |percentile| {
            inner.appended.as_ref().map_or(0.0, |taken| taken.value_at_percentile(percentile) as f64 / 1000.0)
        };
        Seen {
            freshness: self.freshness.percentiles(),
            projected: self.freshness.projected(),
            appended: Percentiles { p50: at(50.0), p95: at(95.0), p99: at(99.0) },
            work: inner.work.iter().map(mean).collect(),
        }
    }
}

impl Seen {
    /// The 99th percentile of freshness, with all that explains it.
    pub fn measured(&self) -> Result<Measured> {
        if self.projected == 0 {
            let cause = "no change was shown by every projection";
            return Err(Error::new(ErrorKind::Internal, "measure", "freshness", cause));
        }
        let mut measured = Measured::new(self.freshness.p99)
            .part("p50_ms", self.freshness.p50)
            .part("p95_ms", self.freshness.p95)
            .part("changes", self.projected as f64)
            .part("appended_p50_ms", self.appended.p50)
            .part("appended_p99_ms", self.appended.p99);
        for (name, times, mean_ms) in &self.work {
            measured =
                measured.part(&format!("{name}_times"), *times as f64).part(&format!("{name}_mean_ms"), *mean_ms);
        }
        Ok(measured)
    }
}
