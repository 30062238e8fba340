//! The one retry policy: growing pauses up to a bound, from the start again after a success.

use std::time::Duration;

#[derive(Clone, Copy, Debug)]
pub struct RetryPolicy {
    pub first: Duration,
    pub longest: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self { first: Duration::from_millis(100), longest: Duration::from_secs(15) }
    }
}

#[derive(Debug)]
pub struct Backoff {
    policy: RetryPolicy,
    failures: u32,
}

impl Backoff {
    pub fn new(policy: RetryPolicy) -> Self {
        Self { policy, failures: 0 }
    }

    pub fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// The pause before the next try: doubled each time.
    pub fn failed(&mut self) -> Duration {
        let pause = self.policy.first.saturating_mul(1 << self.failures.min(16));
        self.failures += 1;
        pause.min(self.policy.longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_to_the_longest_and_start_again_after_success() {
        let policy = RetryPolicy { first: Duration::from_millis(100), longest: Duration::from_secs(1) };
        let mut backoff = Backoff::new(policy);
        let pauses: Vec<u128> = (0..6).map(|_| backoff.failed().as_millis()).collect();
        assert_eq!(pauses, [100, 200, 400, 800, 1000, 1000]);
        backoff.succeeded();
        assert_eq!(backoff.failed().as_millis(), 100);
    }
}
