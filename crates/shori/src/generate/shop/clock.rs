//! Time values as an application writes them: UTC text with microseconds, never twice the same.

use std::time::{SystemTime, UNIX_EPOCH};

use chrono::DateTime;
use shori_core::position::Micros;

/// Where time values come from. Nothing else depends on the clock.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Clock {
    /// The machine's.
    #[default]
    Wall,
    /// Begins at `start` (microseconds UTC) and moves on by `step_us` with every reading: equal runs write equal times.
    Fixed { start: Micros, step_us: u32 },
}

/// Reads the clock: every reading is later than the one before, whatever the machine's clock does.
pub(super) struct Readings {
    clock: Clock,
    last: Micros,
    second: i64,
    prefix: String,
}

impl Readings {
    pub(super) fn new(clock: Clock) -> Self {
        Self { clock, last: i64::MIN, second: i64::MIN, prefix: String::new() }
    }

    pub(super) fn next(&mut self) -> Micros {
        let now = match self.clock {
            Clock::Wall => SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as Micros),
            Clock::Fixed { start, .. } if self.last == i64::MIN => start,
            Clock::Fixed { step_us, .. } => self.last + i64::from(step_us),
        };
        self.last = now.max(self.last.saturating_add(1));
        self.last
    }

    /// Writes `2026-01-02T03:04:05.123456Z` into `text`. The part up to the second is kept from call to call.
    pub(super) fn format(&mut self, time: Micros, text: &mut String) {
        use std::fmt::Write;
        let second = time.div_euclid(1_000_000);
        if second != self.second {
            self.second = second;
            self.prefix.clear();
            let moment = DateTime::from_timestamp(second, 0).unwrap_or_default();
            // Writing to a string cannot fail.
            let _ = write!(self.prefix, "{}.", moment.format("%Y-%m-%dT%H:%M:%S"));
        }
        text.clear();
        text.push_str(&self.prefix);
        push_digits(text, time.rem_euclid(1_000_000) as u32, 100_000);
        text.push('Z');
    }
}

fn push_digits(text: &mut String, mut number: u32, mut place: u32) {
    while place > 0 {
        text.push((b'0' + (number / place) as u8) as char);
        number %= place;
        place /= 10;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_text_with_all_microseconds() {
        let mut readings = Readings::new(Clock::Wall);
        let mut text = String::new();
        readings.format(1_767_323_045_000_007, &mut text);
        assert_eq!(text, "2026-01-02T03:04:05.000007Z");
        readings.format(1_767_323_046_123_456, &mut text);
        assert_eq!(text, "2026-01-02T03:04:06.123456Z");
    }

    #[test]
    fn a_reading_is_always_later_than_the_one_before() {
        for clock in [Clock::Wall, Clock::Fixed { start: 5, step_us: 0 }, Clock::Fixed { start: 5, step_us: 10 }] {
            let mut readings = Readings::new(clock);
            let times: Vec<_> = (0..1_000).map(|_| readings.next()).collect();
            assert!(times.windows(2).all(|pair| pair[0] < pair[1]), "{clock:?}");
        }
    }
}
