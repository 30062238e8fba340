//! Seeded faults: where an operation pauses, fails, or is the last thing its process does.
//!
//! Every in-memory part awaits [`Faults::step`] at named points. One random sequence serves all processes of a run, so
//! a seed and a plan tell the whole run.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::Notify;

use crate::error::{Error, ErrorKind, Result};

/// Steps of a run, at most: one that goes on in a circle without time passing comes to a stand here.
pub const STEPS_MAX: u64 = 1_000_000;

/// How often a step does what. Rates are per thousand steps.
#[derive(Clone, Copy, Debug)]
pub struct FaultPlan {
    /// Steps that fail with [`ErrorKind::Unavailable`].
    pub errors: u32,
    /// Steps that sleep, up to `longest_sleep` of the runtime's time.
    pub sleeps: u32,
    pub longest_sleep: Duration,
    /// Steps that let other tasks run first, up to three times.
    pub yields: u32,
}

impl FaultPlan {
    pub const NONE: FaultPlan = FaultPlan { errors: 0, sleeps: 0, longest_sleep: Duration::ZERO, yields: 0 };
}

/// Faults of one process in a run. Cloning names the same process; [`Faults::process`] starts another.
#[derive(Clone)]
pub struct Faults {
    run: Arc<Mutex<Run>>,
    process: Arc<Process>,
}

struct Run {
    rng: ChaCha8Rng,
    plan: FaultPlan,
    steps: u64,
    fingerprint: u64,
    trace: Option<Vec<String>>,
}

#[derive(Default)]
struct Process {
    crash: Mutex<Crash>,
    crashed: Notify,
}

#[derive(Default)]
struct Crash {
    after_steps: Option<u64>,
    at_point: Option<(String, u64)>,
    done: bool,
}

enum Outcome {
    Pass,
    Fail,
    Sleep(Duration),
    Yield(u32),
}

impl Faults {
    /// Every step passes at once.
    pub fn none() -> Self {
        Self::seeded(0, FaultPlan::NONE)
    }

    pub fn seeded(seed: u64, plan: FaultPlan) -> Self {
        let run = Run {
            rng: ChaCha8Rng::seed_from_u64(seed),
            plan,
            steps: 0,
            fingerprint: 0xcbf2_9ce4_8422_2325,
            trace: None,
        };
        Self { run: Arc::new(Mutex::new(run)), process: Arc::default() }
    }

    /// Another process of the same run: it crashes by itself, and is what a crashed one starts again as.
    pub fn process(&self) -> Faults {
        Faults { run: self.run.clone(), process: Arc::default() }
    }

    /// The process ends at its `steps`th step from now (0: the next).
    pub fn crash_after(&self, steps: u64) {
        self.crash_state().after_steps = Some(steps);
    }

    /// The process ends at the `occurrence`th time from now (0: the next) that it comes to `point`.
    pub fn crash_at(&self, point: &str, occurrence: u64) {
        self.crash_state().at_point = Some((point.into(), occurrence));
    }

    /// Takes back a planned crash.
    pub fn spare(&self) {
        let mut crash = self.crash_state();
        crash.after_steps = None;
        crash.at_point = None;
    }

    /// Returns when the process has ended: whatever runs in it must be dropped, for its steps never return.
    pub async fn crashed(&self) {
        let mut notified = std::pin::pin!(self.process.crashed.notified());
        notified.as_mut().enable();
        if !self.has_crashed() {
            notified.await;
        }
    }

    pub fn has_crashed(&self) -> bool {
        self.crash_state().done
    }

    /// From here on, in all processes, steps follow `plan`.
    pub fn set_plan(&self, plan: FaultPlan) {
        self.run_state().plan = plan;
    }

    /// A number below `below` (at least 1) from the run's random sequence.
    pub fn draw(&self, below: u64) -> u64 {
        self.run_state().rng.random_range(0..below.max(1))
    }

    /// Steps taken so far by all processes.
    pub fn steps(&self) -> u64 {
        self.run_state().steps
    }

    /// Sums up all steps and notes so far: a seed run twice gives the same.
    pub fn fingerprint(&self) -> u64 {
        self.run_state().fingerprint
    }

    /// Adds something to the fingerprint, and to the trace if one is kept.
    pub fn note(&self, text: &str) {
        self.run_state().record(text);
    }

    /// Keeps the names of all steps from here on.
    pub fn keep_trace(&self) {
        self.run_state().trace.get_or_insert_default();
    }

    pub fn trace(&self) -> Vec<String> {
        self.run_state().trace.clone().unwrap_or_default()
    }

    /// A place where the process may pause, fail or end.
    pub async fn step(&self, point: &'static str) -> Result<()> {
        if self.steps() > STEPS_MAX {
            return std::future::pending().await;
        }
        if self.ends_here(point) {
            self.process.crashed.notify_waiters();
            return std::future::pending().await;
        }
        let outcome = self.run_state().next(point);
        match outcome {
            Outcome::Pass => {}
            Outcome::Fail => return Err(Error::new(ErrorKind::Unavailable, "reach", point, "injected fault")),
            Outcome::Sleep(time) => tokio::time::sleep(time).await,
            Outcome::Yield(times) => {
                for _ in 0..times {
                    tokio::task::yield_now().await;
                }
            }
        }
        // The process may have ended in another task meanwhile.
        if self.has_crashed() { std::future::pending().await } else { Ok(()) }
    }

    fn ends_here(&self, point: &str) -> bool {
        let mut crash = self.crash_state();
        if crash.done {
            return true;
        }
        let now = match &mut crash.after_steps {
            Some(0) => true,
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        };
        let here = match &mut crash.at_point {
            Some((name, 0)) => name == point,
            Some((name, left)) if name == point => {
                *left -= 1;
                false
            }
            _ => false,
        };
        crash.done = now || here;
        if crash.done {
            drop(crash);
            self.run_state().record(&format!("crash at {point}"));
        }
        now || here
    }

    fn run_state(&self) -> MutexGuard<'_, Run> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn crash_state(&self) -> MutexGuard<'_, Crash> {
        self.process.crash.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Run {
    fn next(&mut self, point: &str) -> Outcome {
        self.steps += 1;
        let plan = self.plan;
        let mut dice = self.rng.random_range(0..1000_u32);
        let mut falls = |rate: u32| {
            let hit = dice < rate;
            dice = if hit { 1000 } else { dice - rate };
            hit
        };
        let outcome = if falls(plan.errors) {
            Outcome::Fail
        } else if falls(plan.sleeps) {
            let longest = plan.longest_sleep.as_micros() as u64;
            Outcome::Sleep(Duration::from_micros(self.rng.random_range(0..=longest)))
        } else if falls(plan.yields) {
            Outcome::Yield(self.rng.random_range(1..=3))
        } else {
            Outcome::Pass
        };
        self.record(point);
        if matches!(outcome, Outcome::Fail) {
            self.record("fails");
        }
        outcome
    }

    fn record(&mut self, text: &str) {
        for byte in text.bytes().chain([0]) {
            self.fingerprint = (self.fingerprint ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        if let Some(trace) = &mut self.trace {
            trace.push(text.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUGH: FaultPlan =
        FaultPlan { errors: 100, sleeps: 200, longest_sleep: Duration::from_millis(50), yields: 300 };

    async fn walk(seed: u64) -> (u64, usize, Duration) {
        let faults = Faults::seeded(seed, ROUGH);
        let begun = tokio::time::Instant::now();
        let mut failures = 0;
        for _ in 0..500 {
            failures += usize::from(faults.step("somewhere").await.is_err());
        }
        (faults.fingerprint(), failures, begun.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn a_seed_gives_one_walk_and_another_seed_another() {
        let (fingerprint, failures, took) = walk(7).await;
        assert!((20..100).contains(&failures) && took > Duration::from_millis(100), "{failures} {took:?}");
        assert_eq!(walk(7).await, (fingerprint, failures, took));
        assert_ne!(walk(8).await.0, fingerprint);
    }

    #[tokio::test]
    async fn a_crash_ends_its_own_process_alone() {
        let faults = Faults::none();
        let other = faults.process();
        faults.crash_at("here", 1);
        for _ in 0..2 {
            faults.step("elsewhere").await.unwrap();
        }
        faults.step("here").await.unwrap();
        tokio::select! {
            biased;
            _ = faults.step("here") => panic!("the step returned"),
            () = faults.crashed() => {}
        }
        tokio::select! {
            biased;
            _ = faults.step("elsewhere") => panic!("a step of an ended process returned"),
            () = faults.crashed() => {}
        }
        assert!(!other.has_crashed());
        other.step("here").await.unwrap();
    }
}
