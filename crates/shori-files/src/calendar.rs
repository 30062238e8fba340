//! Dates and times as ISO 8601 has them, over all that the carried types hold: years beyond four digits have a sign.

use std::fmt::{self, Write};

pub const DAY_MICROS: i64 = 86_400_000_000;
const SECOND_MICROS: i64 = 1_000_000;
/// No 32-bit count of days reaches further.
const YEARS_MAX: i64 = 6_000_000;

/// Year, month and day of a day counted from 1970-01-01, in the proleptic Gregorian calendar.
///
/// Counted in eras of 400 years that begin on 1 March, so that a leap day ends its year.
fn civil(days: i64) -> (i64, i64, i64) {
    let from_march = days + 719_468;
    let (era, day) = (from_march.div_euclid(146_097), from_march.rem_euclid(146_097));
    let year_of_era = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day_of_year - (153 * shifted + 2) / 5 + 1)
}

/// The inverse of [`civil`].
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

/// `2024-02-29`
pub struct Date(pub i64);

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = civil(self.0);
        if (0..=9_999).contains(&year) {
            write!(f, "{year:04}")?
        } else {
            write!(f, "{year:+05}")?
        }
        write!(f, "-{month:02}-{day:02}")
    }
}

/// `23:59:59.000001`; what ends a day may be `24:00:00.000000`.
pub struct Time(pub i64);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, micros) = (self.0 / SECOND_MICROS, self.0 % SECOND_MICROS);
        write!(f, "{:02}:{:02}:{:02}.{micros:06}", seconds / 3_600, seconds / 60 % 60, seconds % 60)
    }
}

/// `2024-02-29T23:59:59.000001`, of microseconds since 1970.
pub struct Timestamp(pub i64);

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Date(self.0.div_euclid(DAY_MICROS)).fmt(f)?;
        f.write_char('T')?;
        Time(self.0.rem_euclid(DAY_MICROS)).fmt(f)
    }
}

pub fn parse_date(text: &str) -> Option<i64> {
    let (sign, rest) = match text.as_bytes().first()? {
        b'-' => (-1, &text[1..]),
        b'+' => (1, &text[1..]),
        _ => (1, text),
    };
    let mut parts = rest.split('-').map(number);
    let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
    let count = (year <= YEARS_MAX && month <= 12 && day <= 31).then(|| days(sign * year, month, day))?;
    // A day that the month does not have reads otherwise.
    (parts.next().is_none() && Date(count).to_string() == text).then_some(count)
}

pub fn parse_time(text: &str) -> Option<i64> {
    let (clock, fraction) = text.split_once('.')?;
    let mut parts = clock.split(':').map(number);
    let (hours, minutes, seconds) = (parts.next()??, parts.next()??, parts.next()??);
    if hours > 24 || minutes > 59 || seconds > 59 {
        return None;
    }
    let micros = ((hours * 60 + minutes) * 60 + seconds) * SECOND_MICROS + number(fraction)?;
    (micros <= DAY_MICROS && Time(micros).to_string() == text).then_some(micros)
}

pub fn parse_timestamp(text: &str) -> Option<i64> {
    let (date, time) = text.split_once('T')?;
    let time = parse_time(time).filter(|time| *time < DAY_MICROS)?;
    i64::try_from(i128::from(parse_date(date)?) * i128::from(DAY_MICROS) + i128::from(time)).ok()
}

/// Digits alone.
fn number(text: &str) -> Option<i64> {
    (!text.is_empty() && text.len() <= 9 && text.bytes().all(|digit| digit.is_ascii_digit()))
        .then(|| text.parse().ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_days_read_as_people_write_them() {
        for (count, text) in [
            (0, "1970-01-01"),
            (19_782, "2024-02-29"),
            (-719_528, "0000-01-01"),
            (-719_529, "-0001-12-31"),
            (2_932_897, "+10000-01-01"),
        ] {
            assert_eq!(Date(count).to_string(), text);
            assert_eq!(parse_date(text), Some(count));
        }
        assert_eq!(Timestamp(-1).to_string(), "1969-12-31T23:59:59.999999");
        assert_eq!(parse_time("24:00:00.000000"), Some(DAY_MICROS));
    }

    #[test]
    fn the_ends_of_every_type_come_back() {
        for count in [i64::from(i32::MIN), i64::from(i32::MAX)] {
            assert_eq!(parse_date(&Date(count).to_string()), Some(count));
        }
        for micros in [i64::MIN, i64::MAX] {
            assert_eq!(parse_timestamp(&Timestamp(micros).to_string()), Some(micros));
        }
    }

    #[test]
    fn what_is_no_date_or_time_is_refused() {
        for text in [
            "",
            "-",
            "2023-02-29",
            "2024-13-01",
            "2024-1-01",
            "+2024-01-01",
            "2024-01-01x",
            "é-01-01",
            "999999999-01-01",
        ] {
            assert_eq!(parse_date(text), None, "{text}");
        }
        for text in ["", "24:00:00.000001", "1:00:00.000000", "10:60:00.000000", "10:00:00", "10:00:00.1"] {
            assert_eq!(parse_time(text), None, "{text}");
        }
        for text in ["2024-01-01", "2024-01-01T24:00:00.000000", "+999999-01-01T00:00:00.000000"] {
            assert_eq!(parse_timestamp(text), None, "{text}");
        }
    }
}
