//! How large transactions are, and when each is due.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rand::Rng;
use shori_core::{Error, ErrorKind, Result};

/// A stop is noticed within this time.
const SLEEP_MAX: Duration = Duration::from_millis(50);
/// A generator that is late by more than this gives up the rest: catching up would be a burst.
const LATE_MAX: Duration = Duration::from_secs(1);
/// The time between commits that a rate is spread over.
const COMMIT_EVERY_SECONDS: f64 = 0.004;
/// The silence that one large transaction may leave behind at a given rate.
const LARGE_SECONDS: f64 = 0.25;

/// How changes are spread over time.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub enum Pacing {
    /// As fast as possible.
    #[default]
    FlatOut,
    /// Row changes per second, spread evenly.
    Rate(f64),
    /// A few changes, then nothing for so long: an application that little happens to.
    Rounds(Duration),
}

impl Pacing {
    /// Refuses what no time can be made of.
    pub(super) fn check(self) -> Result<()> {
        match self {
            Self::Rate(rate) if !(rate.is_finite() && rate > 0.0) => {
                Err(Error::new(ErrorKind::Usage, "generate at", format!("rate {rate}"), "it must be above 0"))
            }
            _ => Ok(()),
        }
    }

    /// What each of several writers keeps to.
    pub(super) fn shared_by(self, writers: u32) -> Self {
        match self {
            Self::Rate(rate) => Self::Rate(rate / f64::from(writers.max(1))),
            other => other,
        }
    }
}

/// Draws how many rows a transaction holds.
pub(super) struct Sizes {
    pacing: Pacing,
    max_rows: u32,
}

impl Sizes {
    pub(super) fn new(pacing: Pacing, max_rows: u32) -> Self {
        Self { pacing, max_rows: max_rows.max(1) }
    }

    pub(super) fn draw(&self, rng: &mut impl Rng) -> u32 {
        let chance = rng.random_range(0..10_000);
        let rows = match self.pacing {
            Pacing::FlatOut => flat_out(rng, chance),
            Pacing::Rate(rate) => paced(rng, chance, rate),
            Pacing::Rounds(_) => rng.random_range(1..=5),
        };
        rows.clamp(1, self.max_rows)
    }
}

/// Most transactions have a few rows; most rows come from the larger ones.
fn flat_out(rng: &mut impl Rng, chance: u32) -> u32 {
    match chance {
        0 => spread(rng, 10_000, 100_000),
        1..20 => spread(rng, 1_000, 10_000),
        20..500 => spread(rng, 100, 1_000),
        500..3_500 => spread(rng, 10, 100),
        _ => rng.random_range(1..=5),
    }
}

fn paced(rng: &mut impl Rng, chance: u32, rate: f64) -> u32 {
    let usual = (2.0 * rate * COMMIT_EVERY_SECONDS) as u32;
    match chance {
        0 => spread(rng, usual.max(5), (rate * LARGE_SECONDS) as u32),
        1..4_000 => rng.random_range(1..=usual.max(5)),
        _ => rng.random_range(1..=5),
    }
}

/// Between `low` and `high`, each order of magnitude as likely as the next.
fn spread(rng: &mut impl Rng, low: u32, high: u32) -> u32 {
    let (low, high) = (f64::from(low.max(1)), f64::from(high.max(low).max(1)));
    (low.ln() + rng.random::<f64>() * (high / low).ln()).exp().round() as u32
}

/// Spreads changes over time, by deadlines: a late commit does not move the ones after it.
pub(super) struct Pace {
    pacing: Pacing,
    begin: Instant,
    due_after: f64,
    given_up: Duration,
}

impl Pace {
    pub(super) fn new(pacing: Pacing) -> Self {
        Self { pacing, begin: Instant::now(), due_after: 0.0, given_up: Duration::ZERO }
    }

    /// Takes note of a transaction of `rows`, and waits until the next one is due, or until `stop`.
    pub(super) fn wait_after(&mut self, rows: u64, stop: &AtomicBool) {
        self.due_after += match self.pacing {
            Pacing::FlatOut => return,
            Pacing::Rate(rate) => rows as f64 / rate,
            Pacing::Rounds(pause) => pause.as_secs_f64(),
        };
        let due = self.begin + Duration::from_secs_f64(self.due_after) + self.given_up;
        let late = Instant::now().saturating_duration_since(due);
        if late > LATE_MAX {
            self.given_up += late - LATE_MAX;
        }
        while !stop.load(Ordering::Relaxed) {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            thread::sleep(left.min(SLEEP_MAX));
        }
    }

    /// Time in which the given pace was not kept up.
    pub(super) fn given_up(&self) -> Duration {
        self.given_up
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn small_transactions_dominate_and_large_ones_come() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let sizes = Sizes::new(Pacing::FlatOut, 100_000);
        let drawn: Vec<_> = (0..100_000).map(|_| sizes.draw(&mut rng)).collect();
        let small = drawn.iter().filter(|rows| **rows <= 5).count();
        assert!((60_000..70_000).contains(&small), "{small}");
        assert!(drawn.iter().any(|rows| *rows > 10_000));
        assert!(drawn.iter().all(|rows| (1..=100_000).contains(rows)));
    }

    #[test]
    fn at_a_rate_transactions_are_a_few_milliseconds_apart() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for rate in [10_f64, 1_000.0, 20_000.0, 100_000.0] {
            let sizes = Sizes::new(Pacing::Rate(rate), 100_000);
            let rows: u64 = (0..20_000).map(|_| u64::from(sizes.draw(&mut rng))).sum();
            let apart = rows as f64 / 20_000.0 / rate;
            assert!(apart < 0.006_f64.max(4.0 / rate), "{rate}: {apart}");
        }
    }

    #[test]
    fn waiting_ends_with_stop() {
        let stop = AtomicBool::new(true);
        Pace::new(Pacing::Rate(0.001)).wait_after(1_000, &stop);
    }
}
